/**
 * Owns: what is asked of the workers and told to them, whichever processes they are at the moment: to measure, to serve what a
 * reload brings, to let go of sockets, to drain; and whether the service as a whole is ready.
 * Must not know: who is forked when, and who replaces whom (slots.ts). Tokens, TLS, HTTP; never loads a PKCS#11 module.
 * Runs: main thread of the primary.
 */
import type { Config, LogLevel } from '../config/config.ts';
import { engine } from '../engine/binding.ts';
import type { Log } from '../log.ts';
import type { PrimaryMessage, Staple } from '../messages.ts';
import { closeSockets, shutSockets } from './listeners.ts';
import type { Listeners, ListeningSocket, NextListeners } from './listeners.ts';
import { ReloadPhases } from './reload-phases.ts';
import type { Refusal } from './reload-phases.ts';
import { Served } from './served.ts';
import { statusOf, whyStuck } from './slot.ts';
import type { Slot, SlotStatus } from './slot.ts';
import { Slots } from './slots.ts';
import { SnapshotBook } from './snapshot-book.ts';
import type { Observation } from './snapshot-book.ts';
import type { TicketEpochs } from './ticket-epochs.ts';

/** This many failures in a row are a crash loop. */
const crashLoopFailures = 4;
/** A worker is asked each second. One that has not answered for so long is stuck, as when a module hangs in a reload. */
const stuckSilenceMs = 15_000;
/** A worker accepts what waits at a socket in no time; one whose JavaScript thread hangs does not know that it should. */
const retireDeadlineMs = 2_000;

export class Workers {
  readonly #served: Served;
  readonly #slots: Slots;
  readonly #book = new SnapshotBook();
  #reloads = 0;

  /** @param staples what a worker that begins is to serve certificates with */
  constructor(
    config: Config,
    slots: number,
    listeners: Listeners,
    epochs: TicketEpochs,
    staples: () => readonly Staple[],
    log: Log,
  ) {
    this.#served = new Served(config, listeners, epochs, staples);
    this.#slots = new Slots(slots, this.#served, this.#book, log);
  }

  start(): void {
    this.#slots.forkDue();
  }

  /** Resolves when every worker is ready, for the first time. */
  get allReady(): Promise<void> {
    return this.#slots.allReady;
  }

  /** When no worker is left: resolves after a drain, rejects when none may be forked any more. */
  get ended(): Promise<void> {
    return this.#slots.ended;
  }

  /** What those who are forked from now on listen on. */
  get listening(): Listeners {
    return this.#served.listeners;
  }

  get status(): readonly SlotStatus[] {
    return this.#slots.current.map((slot) => statusOf(slot, this.#book.silenceMs(slot.index) ?? 0));
  }

  /** Why the service is not ready; undefined when it is. */
  get unreadiness(): string | undefined {
    const { current, isDraining, halted } = this.#slots;
    if (isDraining) return 'draining';
    if (halted !== undefined) return `no worker may be forked any more: ${halted.message}`;
    const looping = current.find(
      (slot) => (slot.state !== 'ready' || whyStuck(slot) !== undefined) && slot.failuresInRow >= crashLoopFailures,
    );
    if (looping !== undefined) return `worker ${looping.index} has failed ${looping.failuresInRow} times in a row`;
    const ready = current.filter(({ state }) => state === 'ready');
    if (ready.length === 0) return 'no worker is ready';
    // Full handshakes fail; a load balancer should know a better place.
    return this.#book.tokensDown(ready.map(({ page }) => page));
  }

  /** What all workers measured, living and dead, as one; a worker that does not answer in time counts with its last answer. */
  async observe(): Promise<Observation> {
    const asked = this.#ready;
    const { id, answered } = this.#book.expect(asked.map(({ page }) => page));
    for (const { worker } of asked) worker?.tell({ type: 'observe', id });
    await answered;
    for (const slot of this.#slots.current) {
      const silenceMs = slot.state === 'ready' ? (this.#book.silenceMs(slot.index) ?? 0) : 0;
      if (silenceMs > stuckSilenceMs) this.#slots.stuck(slot, 'its JavaScript thread hangs, perhaps in a token');
    }
    return this.#book.total();
  }

  /**
   * First phase of a reload: every worker makes the configuration ready beside the one that serves. Workers that are
   * starting are waited for; those that wait to be forked will start with what is committed.
   * @returns why it must be discarded, or undefined: then `commit` or `discard` ends it.
   */
  async prepare(config: Config, listeners: NextListeners, deadlineMs: number): Promise<Refusal | undefined> {
    const reload = new ReloadPhases(++this.#reloads, config, listeners);
    this.#slots.beginReload(reload);
    return reload.prepare(this.#slots.current, this.#slots.whenSettled(), deadlineMs);
  }

  /**
   * Second phase: what was prepared serves. From here on every worker that is forked is of the new configuration, and
   * one that cannot commit is replaced.
   * @returns why it was not done, and must be discarded: a worker was lost at the last moment.
   */
  async commit(): Promise<Refusal | undefined> {
    const { reload } = this.#slots;
    if (reload === undefined) throw new Error('invariant: nothing is prepared');
    if (reload.refusal !== undefined) return reload.refusal;
    this.#served.config = reload.config;
    this.#served.listeners = reload.listeners;
    for (const { fd, backlog } of reload.listeners.resized) engine().setBacklog(fd, backlog);
    await reload.commit();
    this.#book.keepOnly(reload.config);
    this.#slots.reloaded(reload);
    return undefined;
  }

  /** Every worker forgets what it prepared. */
  discard(): void {
    const { reload } = this.#slots;
    if (reload === undefined) return;
    reload.discard();
    this.#slots.endReload();
  }

  /**
   * Nobody has these sockets any more: what waits there is accepted, then clients are refused. A worker that does not
   * answer is not waited for; what waits for it is reset.
   */
  async retire(sockets: readonly ListeningSocket[]): Promise<void> {
    if (sockets.length === 0) return;
    const numbers = sockets.map(({ socket }) => socket);
    const { listeners } = this.#served;
    const kept = listeners.sockets.filter(({ socket }) => !numbers.includes(socket));
    this.#served.listeners = { ...listeners, sockets: kept };
    const answers = this.#ready.map(async ({ worker }) => worker?.retire(numbers));
    const deadline = Promise.withResolvers<void>();
    const timer = setTimeout(deadline.resolve, retireDeadlineMs);
    await Promise.race([Promise.all(answers), deadline.promise]);
    clearTimeout(timer);
    shutSockets(sockets, engine());
    closeSockets(sockets);
  }

  rotateTickets(): void {
    const { epochs } = this.#served;
    epochs.rotate();
    for (const { worker } of this.#ready) worker?.tell({ type: 'tickets', ticketSecrets: epochs.secrets });
  }

  /** Also those who are starting: they have been given what there was when they were forked. */
  giveStaples(staples: readonly Staple[]): void {
    this.#tellAll({ type: 'staples', staples });
  }

  reopenLogs(): void {
    this.#tellAll({ type: 'reopen-logs' });
  }

  /** Of every worker there is or will be, until a reload commits its own. */
  setLogLevel(level: LogLevel): void {
    const { config } = this.#served;
    this.#served.config = { ...config, log: { ...config.log, level } };
    this.#tellAll({ type: 'log-level', level });
  }

  /**
   * Every worker accepts nothing any more and leaves when its last connection has ended, or at the deadline. A second
   * call moves the deadline.
   */
  drain(deadlineMs: number): void {
    this.#slots.drain(deadlineMs);
  }

  /** Also those that have lost their slots and end with their connections. */
  get #ready(): readonly Slot[] {
    return this.#slots.all.filter(({ state }) => state === 'ready');
  }

  #tellAll(message: PrimaryMessage): void {
    for (const { worker } of this.#slots.all) worker?.tell(message);
  }
}
