/**
 * Owns: putting this worker into its sandbox as the configuration wants it.
 * Must not know: what is forbidden there (engine/src/sandbox.rs).
 * Runs: main thread of a worker, once, before a PKCS#11 module is loaded: there is no way back.
 */
import type { Config } from '../config/config.ts';
import { logFiles } from '../config/log-files.ts';
import type { EngineBinding } from '../engine/binding.ts';
import type { Log } from '../log.ts';
import type { WorkerSandbox } from '../messages.ts';

/** What the kernel lacks is left out, and said by the primary once for all workers. */
export function enterSandbox(
  { sandbox, log: logConfig }: Pick<Config, 'sandbox' | 'log'>,
  native: Pick<EngineBinding, 'enterSandbox'>,
  log: Pick<Log, 'info'>,
): WorkerSandbox | undefined {
  if (!sandbox.enabled) return undefined;
  const entered = native.enterSandbox({ logs: [...logFiles(logConfig)], writable: [...sandbox.writable] });
  const { landlockAbi, seccomp } = entered;
  log.info({ event: 'sandbox_entered', landlockAbi, seccomp, writable: sandbox.writable }, 'in the sandbox');
  return entered;
}
