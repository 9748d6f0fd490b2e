/**
 * Owns: telling the log once what every worker says when it is ready: what is wrong with a token, what its sandbox lacks.
 * Must not know: workers, slots, reloads.
 * Runs: main thread of the primary.
 */
import type { Log } from '../log.ts';
import type { WorkerSandbox } from '../messages.ts';

export class WorkerWarnings {
  readonly #log: Log;
  readonly #saidOfTokens = new Set<string>();
  /** What is missing, as it was logged last. */
  #saidOfSandbox = JSON.stringify([]);

  constructor(log: Log) {
    this.#log = log;
  }

  /** Each worker says it; a token that was away for one only is told of, too. */
  ofTokens(warnings: Iterable<string>): void {
    for (const warning of warnings) {
      if (!this.#saidOfTokens.has(warning)) this.#log.warn({ event: 'token_warning' }, warning);
      this.#saidOfTokens.add(warning);
    }
  }

  /** Another configuration is served: what is wrong still is said again. */
  forgetTokens(): void {
    this.#saidOfTokens.clear();
  }

  /** When it is not what was said last: as a rule every worker's is the same. */
  ofSandbox(sandbox: WorkerSandbox | undefined): void {
    const said = JSON.stringify(sandbox?.missing ?? 'off');
    if (said === this.#saidOfSandbox) return;
    this.#saidOfSandbox = said;
    if (sandbox === undefined) {
      this.#log.warn({ event: 'sandbox_off' }, 'workers are in no sandbox: `sandbox.enabled` is false');
    } else if (sandbox.missing.length > 0) {
      const { landlockAbi, seccomp, missing } = sandbox;
      this.#log.warn({ event: 'sandbox_limited', landlockAbi, seccomp, missing }, 'the sandbox is not as it should be');
    }
  }
}
