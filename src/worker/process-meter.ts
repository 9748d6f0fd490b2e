/**
 * Owns: measuring what a worker uses of its host.
 * Must not know: what for, or who asks.
 * Runs: main thread of a worker.
 */
import { openSync, readdirSync, readSync, statSync } from 'node:fs';
import { monitorEventLoopDelay } from 'node:perf_hooks';
import type { ProcessUse } from '../messages.ts';

/** How often the event loop is looked at: a timer of its own, which a worker that has nothing to do should hardly notice. */
const lagResolutionMs = 100;
const descriptors = '/proc/self/fd';

export class ProcessMeter {
  readonly #delay = monitorEventLoopDelay({ resolution: lagResolutionMs });
  /** Open from the start: a worker without a free descriptor is one that somebody wants to look at. */
  readonly #status = openSync('/proc/self/status', 'r');
  readonly #text = Buffer.alloc(4096);
  #openFds = 0;

  constructor() {
    this.#delay.enable();
  }

  take(): ProcessUse {
    const { user, system } = process.cpuUsage();
    // Without a look since the last reset, the maximum is 0.
    const eventLoopLagMs = Math.max(0, this.#delay.max / 1e6 - lagResolutionMs);
    this.#delay.reset();
    return { cpuUs: user + system, residentBytes: this.#residentBytes(), openFds: this.#countFds(), eventLoopLagMs };
  }

  #residentBytes(): number {
    const bytes = readSync(this.#status, this.#text, 0, this.#text.length, 0);
    const [, kibibytes] = /^VmRSS:\s+(\d+) kB$/m.exec(this.#text.toString('latin1', 0, bytes)) ?? [];
    return Number(kibibytes ?? 0) * 1024;
  }

  /** Since Linux 6.2 the size of the directory is their number; listing them takes milliseconds with tens of thousands. */
  #countFds(): number {
    const { size } = statSync(descriptors);
    try {
      this.#openFds = size > 0 ? size : readdirSync(descriptors).length;
    } catch {
      // There is none left to list them with: about as many as before.
    }
    return this.#openFds;
  }
}
