/**
 * Owns: that a key log needs permission on the command line: nobody gets one by a line in a file that he did not read.
 * Must not know: how one is written.
 * Runs: at start, on the main thread of `serve` and of `check`.
 */
import type { Problem } from '../errors.ts';
import type { Config } from './config.ts';

/** What is wrong when the configuration asks for a key log without that permission. */
export function keyLogProblems({ file, log: { keyLog } }: Pick<Config, 'file' | 'log'>): Problem[] {
  if (keyLog === undefined) return [];
  return [
    {
      file,
      path: 'log.keyLog',
      code: 'config_key_log',
      found: keyLog,
      expected: 'nothing, or keygate serve --allow-key-log',
      hint: 'whoever reads that file can decrypt every connection: remove the key, or start with the flag to debug',
    },
  ];
}
