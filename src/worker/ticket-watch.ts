/**
 * Owns: when a token derives the secrets of session tickets anew: at the begin of an epoch, by the clock, so that all hosts do
 * it at the same time; and telling the log what came of it.
 * Must not know: how they are derived.
 * Runs: main thread of a worker.
 */
import type { Engine, TicketSnapshot } from '../engine/native.d.ts';
import type { Log } from '../log.ts';

/** After a failure. The engine has the secrets of the next epoch already; or none yet, and then hosts of a fleet do not resume
 * each other's sessions. */
const retryMs = 10_000;
const firstRetryMs = 2_000;

/** Epochs are counted from 1970, in rotations. */
export function ticketEpoch(rotationMs: number, nowMs = Date.now()): number {
  return Math.floor(nowMs / rotationMs);
}

export class TicketWatch {
  readonly #log: Log;
  #hasLooked = false;
  #known: number | undefined;
  #failure: string | undefined;
  #askedAt = Number.NEGATIVE_INFINITY;

  constructor(log: Log) {
    this.#log = log;
  }

  /** To be called every second or so. */
  look(
    engine: Pick<Engine, 'rotateTickets'>,
    { wanted: isWanted, epoch, deriving, failure }: TicketSnapshot,
    rotationMs: number,
  ): void {
    if (!isWanted) return;
    if (this.#hasLooked && epoch !== undefined && this.#known !== epoch)
      this.#log.info({ event: 'tickets_rotated', epoch }, 'another key issues session tickets');
    if (failure !== undefined && failure !== this.#failure)
      this.#log.error(
        { event: 'tickets_not_rotated', reason: failure, ...(epoch === undefined ? {} : { epoch }) },
        'the next ticket key could not be derived',
      );
    this.#hasLooked = true;
    this.#known = epoch;
    this.#failure = failure;
    const wanted = ticketEpoch(rotationMs);
    if (wanted === epoch || deriving) return;
    const now = performance.now();
    if (failure !== undefined && now - this.#askedAt < (epoch === undefined ? firstRetryMs : retryMs)) return;
    this.#askedAt = now;
    engine.rotateTickets(wanted);
  }
}
