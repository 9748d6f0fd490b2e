/**
 * Owns: whether a test can become the user `nobody` and still run keygate from this checkout.
 * Must not know: what is tested.
 * Runs: in test processes.
 */
import { execFileSync, spawnSync } from 'node:child_process';
import { join } from 'node:path';

const checkout = join(import.meta.dirname, '../..');

/** For a test's `skip`: false, or why it cannot run here. */
export function whyNotNobody(): string | false {
  if (process.geteuid?.() !== 0) return 'only root can become somebody else';
  const [uid, gid] = ['-u', '-g'].map((option) => Number(execFileSync('id', [option, 'nobody'])));
  if (uid === undefined || gid === undefined) return 'there is no user nobody';
  const reads = (path: string) => spawnSync('test', ['-r', path], { uid, gid }).status === 0;
  const readable = [process.execPath, join(checkout, 'package.json')].every(reads);
  return readable ? false : `the user nobody cannot read ${checkout}: clone it to where others may read`;
}
