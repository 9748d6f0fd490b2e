/**
 * Owns: measuring what a worker uses of its host.
 * Must not know: what for, or who asks.
 * Runs: main thread of a worker.
 */
import { readdirSync, statSync } from 'node:fs';
import { monitorEventLoopDelay } from 'node:perf_hooks';
import type { ProcessUse } from '../messages.ts';

/** How often the event loop is looked at: a timer of its own, which a worker that has nothing to do should hardly notice. */
const lagResolutionMs = 100;
const descriptors = '/proc/self/fd';

export class ProcessMeter {
  readonly #delay = monitorEventLoopDelay({ resolution: lagResolutionMs });

  constructor() {
    this.#delay.enable();
  }

  take(): ProcessUse {
    const { user, system } = process.cpuUsage();
    // Without a look since the last reset, the maximum is 0.
    const eventLoopLagMs = Math.max(0, this.#delay.max / 1e6 - lagResolutionMs);
    this.#delay.reset();
    return { cpuUs: user + system, residentBytes: process.memoryUsage.rss(), openFds: openFds(), eventLoopLagMs };
  }
}

/** Since Linux 6.2 the size of the directory is their number; listing them takes milliseconds with tens of thousands. */
function openFds(): number {
  const { size } = statSync(descriptors);
  return size > 0 ? size : readdirSync(descriptors).length;
}
