/**
 * Owns: what is served from now on, as a worker that is forked gets it: configuration, listening sockets, secrets of session
 * tickets, staples, and what former workers knew of PINs that were refused.
 * Must not know: what workers that run already have of it.
 * Runs: main thread of the primary.
 */
import { randomBytes } from 'node:crypto';
import type { Config } from '../config/config.ts';
import type { PinRefusal, Staple } from '../messages.ts';
import { usesOf } from './accept-queues.ts';
import type { Listeners } from './listeners.ts';
import type { Slot } from './slot.ts';
import type { TicketEpochs } from './ticket-epochs.ts';
import type { WorkerStart } from './worker-process.ts';

export class Served {
  /** Others are served after a reload. */
  config: Config;
  listeners: Listeners;
  readonly epochs: TicketEpochs;
  readonly #staples: () => readonly Staple[];
  /** Of this keygate alone. */
  readonly #refusalSecret = randomBytes(32);
  /** Of workers that could not start, by their digests: a reload lets others try, and not the same PIN. */
  readonly #refusals = new Map<string, PinRefusal>();

  /** @param staples what a worker that begins is to serve certificates with */
  constructor(config: Config, listeners: Listeners, epochs: TicketEpochs, staples: () => readonly Staple[]) {
    this.config = config;
    this.listeners = listeners;
    this.epochs = epochs;
    this.#staples = staples;
  }

  startOf(slot: Slot): WorkerStart {
    return {
      config: this.config,
      accept: usesOf(this.listeners, slot),
      ticketSecrets: this.epochs.secrets,
      refusalSecret: this.#refusalSecret,
      refusals: [...this.#refusals.values()],
      staples: this.#staples(),
    };
  }

  /** For workers that come later. */
  keepRefusals(refusals: readonly PinRefusal[]): void {
    for (const refusal of refusals) this.#refusals.set(Buffer.from(refusal.digest).toString('hex'), refusal);
  }
}
