/**
 * Owns: telling the log what was found about the certificates of upstream servers, above all what is only reported.
 * Must not know: what the checks are.
 * Runs: main thread of a worker.
 */
import type { EngineSnapshot } from '../engine/native.d.ts';
import type { Log } from '../log.ts';

/** One line for each upstream and reason in so long: a busy upstream finds the same thousands of times. */
const intervalMs = 60_000;

interface Told {
  readonly refused: number;
  readonly reported: number;
  readonly at: number;
}

export class FindingWatch {
  readonly #log: Pick<Log, 'warn'>;
  readonly #told = new Map<string, Told>();

  constructor(log: Pick<Log, 'warn'>) {
    this.#log = log;
  }

  look({ upstreams }: Pick<EngineSnapshot, 'upstreams'>, now = performance.now()): void {
    for (const { name: upstream, findings } of upstreams) {
      for (const { reason, refused, reported } of findings) {
        const key = `${upstream} ${reason}`;
        const told = this.#told.get(key);
        const before = told ?? { refused: 0, reported: 0 };
        // A name that has come back after a reload counts from 0 again.
        if (refused < before.refused || reported < before.reported) this.#told.delete(key);
        if (refused <= before.refused && reported <= before.reported) continue;
        if (told !== undefined && now - told.at < intervalMs) continue;
        this.#told.set(key, { refused, reported, at: now });
        const counts = { refused: refused - before.refused, reported: reported - before.reported };
        const what = counts.refused > 0 ? 'refused' : 'reported and accepted';
        this.#log.warn(
          { event: 'server_certificate', upstream, reason, ...counts },
          `upstream ${upstream}: certificates of servers are ${what}: ${reason}`,
        );
      }
    }
  }
}
