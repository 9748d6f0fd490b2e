/**
 * Owns: what the token can sign when nothing else is asked of it (src/engine/examples/token_rate.rs): building and running it.
 * Must not know: who shakes hands with these keys.
 * Runs: in the benchmark's process; the signing threads are in a process of their own on the subject's cores.
 */
import { execFile } from 'node:child_process';
import { X509Certificate } from 'node:crypto';
import { readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';
import type { Keys } from './keys.ts';
import type { Setting } from './scenarios.ts';
import { runProgram } from './talk.ts';

/** keygate's default: more threads would use the token for more than keygate may. */
const lanes = 8;
const engine = fileURLToPath(new URL('../src/engine/', import.meta.url));

/** Signatures per second. @throws when the token does not sign. */
export async function tokenRate(
  keys: Keys,
  { key, tokenLatencyMs }: Setting,
  cores: readonly number[],
  seconds: number,
): Promise<number> {
  const { module, pinFile, env } = keys.access(tokenLatencyMs);
  const files = keys.files[key];
  const spki = join(keys.token.directory, `${key}.spki`);
  writeFileSync(
    spki,
    new X509Certificate(readFileSync(files.certificate)).publicKey.export({ type: 'spki', format: 'der' }),
  );
  const flags = { module, token: files.token, pinFile, key: files.label, spki, threads: lanes, seconds };
  const result = await runProgram<{ readonly signatures: number; readonly seconds: number }>(
    { file: await buildTokenRate(), args: ['sign'], env },
    cores,
    flags,
  );
  return result.signatures / result.seconds;
}

/** Once; before anything is measured, if somebody asks then. @returns the path of the program. @throws what cargo said. */
export function buildTokenRate(): Promise<string> {
  built ??= build();
  return built;
}

let built: Promise<string> | undefined;

async function build(): Promise<string> {
  await promisify(execFile)('cargo', ['build', '--release', '--locked', '--quiet', '--example', 'token_rate'], {
    cwd: engine,
  });
  return join(engine, 'target/release/examples/token_rate');
}
