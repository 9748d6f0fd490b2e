/**
 * Owns: the worker processes: forking the first alone, then the others; replacing the dead with growing delay; having a
 * sibling serve a dead worker's accept queue; both phases of a reload; retiring sockets; draining; ending.
 * Must not know: tokens, TLS, HTTP. Never loads a PKCS#11 module.
 * Runs: main thread of the primary.
 *
 * ```text
 *   due ──fork──> starting ──ready──> ready
 *    ^               │                  │
 *    └──delay── waiting <──exit─────────┘        a refused PIN halts: no slot is forked any more
 * ```
 *
 * A worker that is ready and stuck (a PKCS#11 module does not return) serves on, for what needs no key, while a successor
 * starts beside it, one at a time for all slots. Once that is ready it has the slot; the former one is retired: it accepts
 * nothing any more and leaves with its last connection, or at the drain deadline.
 *
 * While the PIN is not known to be good (at start, and after any loss) at most one worker is starting: a PIN that became
 * wrong is tried once, not once per worker.
 */
import { randomBytes } from 'node:crypto';
import type { Config, LogLevel } from '../config/config.ts';
import { engine } from '../engine/binding.ts';
import type { Log } from '../log.ts';
import type { PinRefusal, Staple, WorkerFailure } from '../messages.ts';
import { abandon, adoptAgain, adoptOrphans, takeBack, usesOf } from './accept-queues.ts';
import { closeSockets, shutSockets } from './listeners.ts';
import type { Listeners, ListeningSocket, NextListeners } from './listeners.ts';
import { ReloadPhases } from './reload-phases.ts';
import type { Refusal } from './reload-phases.ts';
import { backoffMs, newSlot, newSuccessor, statusOf, whyStuck } from './slot.ts';
import type { Slot, SlotStatus } from './slot.ts';
import { SnapshotBook, unasked } from './snapshot-book.ts';
import type { Observation } from './snapshot-book.ts';
import type { TicketEpochs } from './ticket-epochs.ts';
import { failureError } from './worker-failures.ts';
import { WorkerProcess } from './worker-process.ts';
import type { WorkerNews } from './worker-process.ts';
import { WorkerWarnings } from './worker-warnings.ts';

/** A worker that has been ready this long has not failed "in a row". */
const stableAfterMs = 60_000;
/** This many failures in a row are a crash loop. */
const crashLoopFailures = 4;
/** A worker is asked each second. One that has not answered for so long will not any more, as when a module hangs in a reload: it is stuck. */
const stuckSilenceMs = 15_000;
/** A worker accepts what waits at a socket in no time; one whose JavaScript thread hangs does not know that it should. */
const retireDeadlineMs = 2_000;

export class Workers {
  #config: Config;
  #listeners: Listeners;
  readonly #epochs: TicketEpochs;
  readonly #staples: () => readonly Staple[];
  readonly #log: Log;
  readonly #slots: Slot[];
  /** Workers that have lost their slots to successors and end with their connections. */
  readonly #retired = new Set<Slot>();
  readonly #book = new SnapshotBook();
  #reloads = 0;
  /** While there is one nobody is forked: a worker is of one configuration. */
  #reload: ReloadPhases | undefined;
  #settled: (() => void) | undefined;
  #draining = false;
  #everReady = false;
  /** Of this keygate alone. */
  readonly #refusalSecret = randomBytes(32);
  /** Of workers that could not start, by their digests: a reload lets others try, and not the same PIN. */
  readonly #refusals = new Map<string, PinRefusal>();
  readonly #warnings: WorkerWarnings;
  readonly #allReady = Promise.withResolvers<void>();
  readonly #ended = Promise.withResolvers<void>();
  /** A worker has logged in since the last loss. */
  #proved = false;
  /** Until a reload: no process may be forked any more. */
  #halted: WorkerFailure | undefined;

  /** @param staples what a worker that begins is to serve certificates with */
  constructor(
    config: Config,
    slots: number,
    listeners: Listeners,
    epochs: TicketEpochs,
    staples: () => readonly Staple[],
    log: Log,
  ) {
    this.#config = config;
    this.#listeners = listeners;
    this.#epochs = epochs;
    this.#staples = staples;
    this.#log = log;
    this.#warnings = new WorkerWarnings(log);
    this.#slots = Array.from({ length: slots }, (_, index) => newSlot(index));
  }

  /** Forks the first worker, and the others once it is ready. */
  start(): void {
    this.#forkDue();
  }

  /** Resolves when every slot is ready, for the first time. */
  get allReady(): Promise<void> {
    return this.#allReady.promise;
  }

  /**
   * Resolves when a drain has ended: no worker is left. Rejects when no worker is left and none may be forked: before the
   * first was ready, or after a PIN was refused.
   */
  get ended(): Promise<void> {
    return this.#ended.promise;
  }

  /** What those who are forked from now on listen on. */
  get listening(): Listeners {
    return this.#listeners;
  }

  get status(): readonly SlotStatus[] {
    return this.#slots.map((slot) => statusOf(slot, this.#book.silenceMs(slot.index) ?? 0));
  }

  /** Why the service is not ready; undefined when it is. */
  get unreadiness(): string | undefined {
    if (this.#draining) return 'draining';
    if (this.#halted !== undefined) return `no worker may be forked any more: ${this.#halted.message}`;
    const looping = this.#slots.find(
      (slot) => (slot.state !== 'ready' || whyStuck(slot) !== undefined) && slot.failuresInRow >= crashLoopFailures,
    );
    if (looping !== undefined) return `worker ${looping.index} has failed ${looping.failuresInRow} times in a row`;
    const ready = this.#slots.filter(({ state }) => state === 'ready');
    if (ready.length === 0) return 'no worker is ready';
    // Full handshakes fail; a load balancer should know a better place.
    return this.#book.tokensDown(ready.map(({ page }) => page));
  }

  /** What all workers measured, living and dead, as one; a worker that does not answer in time counts with its last answer. */
  async observe(): Promise<Observation> {
    const asked = [...this.#slots.filter(({ state }) => state === 'ready'), ...this.#retired];
    const { id, answered } = this.#book.expect(asked.map(({ page }) => page));
    for (const { worker } of asked) worker?.tell({ type: 'observe', id });
    await answered;
    for (const slot of this.#slots) {
      const silenceMs = slot.state === 'ready' ? (this.#book.silenceMs(slot.index) ?? 0) : 0;
      if (silenceMs > stuckSilenceMs) this.#stuck(slot, 'its JavaScript thread hangs, perhaps in a token');
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
    this.#reload = reload;
    if (this.#draining) reload.refuse(undefined, 'keygate drains');
    return reload.prepare(this.#slots, this.#whenSettled(), deadlineMs);
  }

  /**
   * Second phase: what was prepared serves. From here on every worker that is forked is of the new configuration, and
   * one that cannot commit is replaced.
   * @returns why it was not done, and must be discarded: a worker was lost at the last moment.
   */
  async commit(): Promise<Refusal | undefined> {
    const reload = this.#reload;
    if (reload === undefined) throw new Error('invariant: nothing is prepared');
    if (reload.refusal !== undefined) return reload.refusal;
    this.#config = reload.config;
    this.#listeners = reload.listeners;
    for (const { fd, backlog } of reload.listeners.resized) engine().setBacklog(fd, backlog);
    await reload.commit();
    this.#book.keepOnly(reload.config);
    this.#warnings.forgetTokens();
    this.#warnings.ofTokens(reload.warnings);
    // What kept them from starting may be mended. A PIN that was refused is not tried again, and another one by one worker for all.
    if (this.#halted !== undefined) this.#proved = false;
    this.#halted = undefined;
    for (const slot of this.#slots) {
      if (slot.state !== 'waiting') continue;
      slot.failuresInRow = 0;
      this.#replaceNow(slot);
    }
    adoptAgain(this.#slots, this.#listeners);
    this.#endReload();
    return undefined;
  }

  /**
   * Nobody has these sockets any more: what waits there is accepted, then clients are refused. A worker that does not
   * answer is not waited for; what waits for it is reset.
   */
  async retire(sockets: readonly ListeningSocket[]): Promise<void> {
    if (sockets.length === 0) return;
    const numbers = sockets.map(({ socket }) => socket);
    const kept = this.#listeners.sockets.filter(({ socket }) => !numbers.includes(socket));
    this.#listeners = { ...this.#listeners, sockets: kept };
    const ready = this.#all.filter(({ state }) => state === 'ready');
    const answers = ready.map(async ({ worker }) => worker?.retire(numbers));
    const deadline = Promise.withResolvers<void>();
    const timer = setTimeout(deadline.resolve, retireDeadlineMs);
    await Promise.race([Promise.all(answers), deadline.promise]);
    clearTimeout(timer);
    shutSockets(sockets, engine());
    closeSockets(sockets);
  }

  /** Every worker forgets what it prepared. */
  discard(): void {
    const reload = this.#reload;
    if (reload === undefined) return;
    reload.discard();
    this.#endReload();
  }

  rotateTickets(): void {
    this.#epochs.rotate();
    for (const slot of this.#all) {
      if (slot.state === 'ready') slot.worker?.tell({ type: 'tickets', ticketSecrets: this.#epochs.secrets });
    }
  }

  /** Also those who are starting: they have been given what there was when they were forked. */
  giveStaples(staples: readonly Staple[]): void {
    for (const slot of this.#all) slot.worker?.tell({ type: 'staples', staples });
  }

  reopenLogs(): void {
    for (const slot of this.#all) slot.worker?.tell({ type: 'reopen-logs' });
  }

  /** Of every worker there is or will be, until a reload commits its own. */
  setLogLevel(level: LogLevel): void {
    this.#config = { ...this.#config, log: { ...this.#config.log, level } };
    for (const slot of this.#all) slot.worker?.tell({ type: 'log-level', level });
  }

  /**
   * Every worker accepts nothing any more and leaves when its last connection has ended, or at the deadline. A second
   * call moves the deadline.
   */
  drain(deadlineMs: number): void {
    this.#draining = true;
    this.#reload?.refuse(undefined, 'keygate drains');
    for (const slot of this.#all) {
      if (slot.state === 'waiting') clearTimeout(slot.timer);
      slot.worker?.drain(deadlineMs);
    }
    this.#sayWhatCameToPass();
  }

  /** Whose process may be there: in a slot, about to have one, or no longer. */
  get #all(): readonly Slot[] {
    return [...this.#slots.flatMap((slot) => slot.successor ?? []), ...this.#slots, ...this.#retired];
  }

  get #isStarting(): boolean {
    return this.#all.some(({ state }) => state === 'starting');
  }

  /** Nobody is starting: whoever runs is ready. */
  async #whenSettled(): Promise<void> {
    if (!this.#isStarting) return;
    const { promise, resolve } = Promise.withResolvers<void>();
    this.#settled = resolve;
    await promise;
  }

  #endReload(): void {
    this.#reload = undefined;
    this.#forkDue();
  }

  #forkDue(): void {
    for (const slot of this.#slots) {
      if (this.#draining || this.#halted !== undefined || this.#reload !== undefined) return;
      if (slot.state !== 'due') continue;
      if (!this.#proved && this.#isStarting) return;
      this.#fork(slot);
    }
  }

  #fork(slot: Slot): void {
    const start = {
      config: this.#config,
      accept: usesOf(this.#listeners, slot),
      ticketSecrets: this.#epochs.secrets,
      refusalSecret: this.#refusalSecret,
      refusals: [...this.#refusals.values()],
      staples: this.#staples(),
    };
    slot.worker = new WorkerProcess(slot.index, this.#listeners.sockets, start, this.#log, {
      onNews: (news) => {
        this.#hear(slot, news);
      },
      onEnd: (failure) => {
        this.#gone(slot, failure);
      },
    });
    slot.state = 'starting';
  }

  #hear(slot: Slot, news: WorkerNews): void {
    switch (news.type) {
      case 'ready':
        this.#ready(slot, news.warnings);
        return;
      case 'failed':
        for (const refusal of news.refusals) this.#refusals.set(Buffer.from(refusal.digest).toString('hex'), refusal);
        return;
      case 'stuck':
        this.#stuck(slot, news.why);
        return;
      case 'ended':
        this.#book.enter(unasked, slot.page, news.snapshot);
        slot.worker?.tell({ type: 'leave' });
        return;
      case 'prepared':
      case 'refused':
      case 'committed':
        if (this.#reload?.number === news.reload) this.#reload.hear(slot, news);
        return;
      case 'snapshot':
        this.#book.enter(news.id, slot.page, news.snapshot);
        return;
    }
  }

  #ready(slot: Slot, warnings: readonly string[]): void {
    slot.state = 'ready';
    slot.failure = undefined;
    if (slot.replaces !== undefined) this.#succeed(slot.replaces, slot);
    slot.timer = setTimeout(() => {
      slot.failuresInRow = 0;
    }, stableAfterMs).unref();
    takeBack(slot, this.#listeners);
    this.#warnings.ofTokens(warnings);
    this.#warnings.ofSandbox(slot.worker?.sandbox);
    this.#everReady = true;
    this.#proved = true;
    this.#log.info({ event: 'worker_ready', worker: slot.index, workerPid: slot.worker?.pid }, 'worker ready');
    adoptOrphans(this.#slots, this.#listeners, this.#log);
    this.#forkDue();
    this.#sayWhatCameToPass();
  }

  /** A worker serves on, and another is started beside it, unless one that was failed a moment ago. */
  #stuck(slot: Slot, why: string): void {
    slot.stuck = { why, saidAtMs: performance.now() };
    const isInOrder = !this.#draining && this.#halted === undefined && this.#reload === undefined;
    const isInTime = !this.#isStarting && performance.now() >= slot.successorAtMs;
    if (!isInOrder || !isInTime || this.#slots[slot.index] !== slot) return;
    this.#log.error({ event: 'worker_stuck', worker: slot.index, workerPid: slot.worker?.pid }, why);
    slot.successor = newSuccessor(slot);
    this.#fork(slot.successor);
  }

  #succeed(former: Slot, successor: Slot): void {
    this.#takeSlot(former, successor);
    clearTimeout(former.timer);
    former.page = this.#book.move(former.page);
    this.#retired.add(former);
    former.worker?.drain(this.#config.drainDeadlineMs);
    const { index, worker } = former;
    this.#log.warn(
      { event: 'worker_replaced', worker: index, workerPid: worker?.pid, by: successor.worker?.pid },
      'a worker that was stuck has a successor, and ends with its connections',
    );
  }

  #takeSlot(former: Slot, successor: Slot): void {
    former.successor = undefined;
    successor.replaces = undefined;
    this.#slots[former.index] = successor;
    abandon(this.#slots, former);
  }

  #gone(slot: Slot, failure: WorkerFailure): void {
    const pid = slot.worker?.pid;
    clearTimeout(slot.timer);
    slot.worker = undefined;
    slot.state = 'waiting';
    if (slot.replaces !== undefined) return this.#neverSucceeded(slot.replaces, pid, failure);
    if (this.#retired.delete(slot)) {
      this.#book.retire(slot.page, slot.index);
      this.#log.info({ event: 'worker_ended', worker: slot.index }, 'worker ended');
      return this.#sayWhatCameToPass();
    }
    this.#reload?.lost(slot, failure);
    this.#book.retire(slot.page, slot.index);
    if (this.#draining) {
      this.#log.info({ event: 'worker_ended', worker: slot.index }, 'worker ended');
      this.#sayWhatCameToPass();
      return;
    }
    slot.failure = failure;
    slot.failuresInRow += 1;
    this.#proved = false;
    if (failure.haltsForking) this.#halted = failure;
    if (this.#everReady) {
      this.#logLoss(slot, pid, failure);
      const { successor } = slot;
      abandon(this.#slots, slot);
      // The one that was to take its place is on its way.
      if (successor !== undefined) this.#takeSlot(slot, successor);
      adoptOrphans(this.#slots, this.#listeners, this.#log);
      if (successor === undefined) this.#replaceLater(slot);
    }
    this.#sayWhatCameToPass();
  }

  #logLoss({ index, failuresInRow }: Slot, workerPid: number | undefined, { code, message }: WorkerFailure): void {
    this.#log.error({ event: 'worker_lost', worker: index, workerPid, code, failuresInRow }, message);
  }

  /** The worker that is stuck serves on as well as it can, and waits longer for the next. */
  #neverSucceeded(former: Slot, pid: number | undefined, failure: WorkerFailure): void {
    former.successor = undefined;
    former.failure = failure;
    former.failuresInRow += 1;
    former.successorAtMs = performance.now() + backoffMs(former);
    if (failure.haltsForking) this.#halted = failure;
    this.#logLoss(former, pid, failure);
    this.#forkDue();
    this.#sayWhatCameToPass();
  }

  #replaceLater(slot: Slot): void {
    if (this.#halted !== undefined) return;
    slot.timer = setTimeout(() => {
      this.#replaceNow(slot);
    }, backoffMs(slot));
    // Who waited for this one to prove the PIN is next.
    this.#forkDue();
  }

  #replaceNow(slot: Slot): void {
    clearTimeout(slot.timer);
    slot.state = 'due';
    slot.restarts += 1;
    this.#forkDue();
  }

  #sayWhatCameToPass(): void {
    if (!this.#isStarting) this.#settled?.();
    if (this.#slots.every(({ state }) => state === 'ready')) this.#allReady.resolve();
    if (this.#all.some(({ worker }) => worker !== undefined)) return;
    const failure =
      this.#halted ??
      (this.#everReady ? undefined : this.#slots.find(({ failure: found }) => found !== undefined)?.failure);
    if (this.#draining) this.#ended.resolve();
    else if (failure !== undefined) this.#ended.reject(failureError(failure));
  }
}
