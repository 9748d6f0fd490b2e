/**
 * Owns: telling the log, when it can be told again, that lines of some log were lost: a full disk, a reader that stalled.
 * Must not know: how lines are written.
 * Runs: main thread of the primary.
 */
import type { Log, LogCounts } from '../log.ts';

const logNames = ['event', 'access', 'key'] as const;

export class LogLosses {
  readonly #log: Log;
  #known = 0;

  constructor(log: Log) {
    this.#log = log;
  }

  /** @param all of every process. */
  look(all: readonly LogCounts[]): void {
    const dropped = logNames.map((name) => all.reduce((sum, counts) => sum + counts[name].dropped, 0));
    const total = dropped.reduce((sum, count) => sum + count, 0);
    if (total <= this.#known) return;
    const lost = total - this.#known;
    this.#known = total;
    const since = Object.fromEntries(logNames.map((name, index) => [name, dropped[index]]));
    // May be lost itself; the next loss says the sum again, and the metric says it all the time.
    this.#log.warn({ event: 'log_lines_dropped', lost, dropped: since }, 'lines of a log could not be written');
  }
}
