/**
 * Owns: a minimal Debian in a folder, made once and kept in .keygate: what a machine boots or an image is built from.
 * Must not know: what is done with it.
 * Runs: in test processes, as root. Asks the mirror that this machine is set up with.
 */
import { execFileSync } from 'node:child_process';
import { existsSync, mkdirSync, readFileSync, renameSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';

const kept = join(import.meta.dirname, '../../.keygate/roots');

/** For a test's `skip`: false, or what is missing. */
export function whyNotHere(...programs: readonly string[]): string | false {
  if (process.geteuid?.() !== 0) return 'root is needed';
  const missing = ['mmdebstrap', ...programs].filter((program) => {
    try {
      execFileSync('sh', ['-c', `command -v ${program}`], { stdio: 'ignore' });
      return false;
    } catch {
      return true;
    }
  });
  return missing.length === 0
    ? false
    : `install the packages of kind image in scripts/debian-packages: ${missing.join(', ')}`;
}

/** The folder is shared by everybody who asks: nothing may be written to it. `suite`: default is this machine's. */
export function debianRoot(name: string, packages: readonly string[], suite?: string): string {
  const root = join(kept, name);
  const stamp = `${root}.packages`;
  const wanted = packages.join('\n');
  if (existsSync(root) && existsSync(stamp) && readFileSync(stamp, 'utf8') === wanted) return root;
  const sources = '/etc/apt/sources.list.d/debian.sources';
  for (const old of [root, `${root}.new`, stamp]) rmSync(old, { recursive: true, force: true });
  mkdirSync(kept, { recursive: true });
  execFileSync(
    'nice',
    [
      'mmdebstrap',
      '--quiet',
      '--variant=minbase',
      ...(packages.length === 0 ? [] : [`--include=${packages.join(',')}`]),
      // A mirror may lag behind.
      '--aptopt=Acquire::Check-Valid-Until "false"',
      suite ?? codename(),
      `${root}.new`,
      ...(suite === undefined && existsSync(sources) ? [sources] : []),
    ],
    { stdio: ['ignore', 'inherit', 'inherit'] },
  );
  renameSync(`${root}.new`, root);
  writeFileSync(stamp, wanted);
  return root;
}

function codename(): string {
  const found = /^VERSION_CODENAME=(.+)$/m.exec(readFileSync('/etc/os-release', 'utf8'))?.[1];
  if (found === undefined) throw new Error('/etc/os-release: found no VERSION_CODENAME, expected that of Debian');
  return found;
}
