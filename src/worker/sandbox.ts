/**
 * Owns: putting this worker into its sandbox as the configuration wants it, and what modules are known to write.
 * Must not know: what is forbidden there (engine/src/sandbox.rs).
 * Runs: main thread of a worker, once, before a PKCS#11 module is loaded: there is no way back.
 */
import { existsSync, readFileSync } from 'node:fs';
import { homedir } from 'node:os';
import { join } from 'node:path';
import type { Config } from '../config/config.ts';
import { isSoftHsm } from '../config/softhsm.ts';
import type { EngineBinding } from '../engine/binding.ts';
import type { Log } from '../log.ts';
import type { WorkerSandbox } from '../messages.ts';

/** What the kernel lacks is left out, and the primary warns of it. */
export function enterSandbox(
  { sandbox, tokens, upstreams, log: logConfig }: Pick<Config, 'sandbox' | 'tokens' | 'upstreams' | 'log'>,
  native: Pick<EngineBinding, 'enterSandbox'>,
  log: Pick<Log, 'info'>,
): WorkerSandbox | undefined {
  if (!sandbox.enabled) return undefined;
  const writable = [...sandbox.writable];
  const files = [logConfig.file, logConfig.access?.file, logConfig.keyLog];
  const logs = files.filter((file) => file !== undefined);
  const states = Object.values(tokens).some(isSoftHsm) ? softHsmState() : [];
  const entered = native.enterSandbox({
    logs,
    states,
    writable,
    bindsTcp: Object.values(upstreams).some(({ transparent }) => transparent),
  });
  const { landlockAbi, seccomp, missing } = entered;
  log.info(
    { event: 'sandbox_entered', landlockAbi, seccomp, missing, writable: [...writable, ...states, ...logs] },
    'in the sandbox',
  );
  return entered;
}

/**
 * SoftHSM 2.6 writes a flag at each login. When it cannot, it serves what it has read so far and never looks again, so that
 * a reload would not find a new key. Whether it can is decided by the permissions of the directory, as without a sandbox.
 */
function softHsmState(): string[] {
  // softhsm2.conf(5), and where Debian and Fedora keep it.
  const places = [
    process.env['SOFTHSM2_CONF'],
    join(homedir(), '.config/softhsm2/softhsm2.conf'),
    '/etc/softhsm/softhsm2.conf',
    '/etc/softhsm2.conf',
  ];
  const file = places.find((place) => place !== undefined && existsSync(place));
  try {
    const directory = /^\s*directories\.tokendir\s*=\s*(\S.*?)\s*$/m.exec(readFileSync(file ?? '', 'utf8'))?.[1];
    return directory !== undefined && existsSync(directory) ? [directory] : [];
  } catch {
    return []; // SoftHSM will say why it cannot read it
  }
}
