/**
 * Owns: what becomes of the worker slots: forking the first worker alone, then the others; replacing the dead with growing
 * delay, and the stuck by successors; draining; when none is left.
 * Must not know: what is asked of workers that are ready, what a reload changes, tokens, TLS, HTTP.
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
import type { Log } from '../log.ts';
import type { WorkerFailure } from '../messages.ts';
import { abandon, adoptAgain, adoptOrphans, takeBack } from './accept-queues.ts';
import type { ReloadPhases } from './reload-phases.ts';
import type { Served } from './served.ts';
import { backoffMs, newSlot, newSuccessor } from './slot.ts';
import type { Slot } from './slot.ts';
import { unasked } from './snapshot-book.ts';
import type { SnapshotBook } from './snapshot-book.ts';
import { failureError, forkFailure } from './worker-failures.ts';
import { forkWorker, WorkerProcess } from './worker-process.ts';
import type { ForkedWorker, WorkerNews } from './worker-process.ts';
import { WorkerWarnings } from './worker-warnings.ts';

/** A worker that has been ready this long has not failed "in a row". */
const stableAfterMs = 60_000;

export class Slots {
  readonly #served: Served;
  readonly #book: SnapshotBook;
  readonly #log: Log;
  readonly #warnings: WorkerWarnings;
  readonly #current: Slot[];
  /** Workers that have lost their slots to successors and end with their connections. */
  readonly #retired = new Set<Slot>();
  /** While there is one nobody is forked: a worker is of one configuration. */
  #reload: ReloadPhases | undefined;
  #draining = false;
  /** A worker has logged in since the last loss. */
  #proved = false;
  /** Until a reload: no process may be forked any more. */
  #halted: WorkerFailure | undefined;
  #everReady = false;
  /** `ended` has been said. */
  #isOver = false;
  #settled: (() => void) | undefined;
  readonly #allReady = Promise.withResolvers<void>();
  readonly #ended = Promise.withResolvers<void>();

  constructor(count: number, served: Served, book: SnapshotBook, log: Log) {
    this.#served = served;
    this.#book = book;
    this.#log = log;
    this.#warnings = new WorkerWarnings(log);
    this.#current = Array.from({ length: count }, (_, index) => newSlot(index));
  }

  /** By number; the list changes when a successor takes a slot. */
  get current(): readonly Slot[] {
    return this.#current;
  }

  /** Whose process may be there: in a slot, about to have one, or no longer. */
  get all(): readonly Slot[] {
    return [...this.#current.flatMap((slot) => slot.successor ?? []), ...this.#current, ...this.#retired];
  }

  get reload(): ReloadPhases | undefined {
    return this.#reload;
  }

  get isDraining(): boolean {
    return this.#draining;
  }

  /** Why no process may be forked any more. */
  get halted(): WorkerFailure | undefined {
    return this.#halted;
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

  /** Forks who is due and may be forked now: the first worker, and the others once it is ready. */
  forkDue(): void {
    for (const slot of this.#current) {
      if (this.#isOver || this.#draining || this.#halted !== undefined || this.#reload !== undefined) return;
      if (slot.state !== 'due') continue;
      if (!this.#proved && this.#isStarting) return;
      this.#fork(slot);
    }
  }

  get #isStarting(): boolean {
    return this.all.some(({ state }) => state === 'starting');
  }

  #fork(slot: Slot): void {
    slot.state = 'starting';
    let forked: ForkedWorker;
    try {
      forked = forkWorker(slot.index, this.#served.listeners.sockets);
    } catch (error) {
      return this.#gone(slot, forkFailure(slot.index, error));
    }
    slot.worker = new WorkerProcess(slot.index, forked, this.#served.startOf(slot), this.#log, {
      onNews: (news) => {
        this.#hear(slot, news);
      },
      onEnd: (failure) => {
        this.#gone(slot, failure);
      },
    });
  }

  #hear(slot: Slot, news: WorkerNews): void {
    switch (news.type) {
      case 'ready':
        this.#ready(slot, news.warnings);
        return;
      case 'failed':
        this.#served.keepRefusals(news.refusals);
        return;
      case 'stuck':
        this.stuck(slot, news.why);
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
    takeBack(slot, this.#served.listeners);
    this.#warnings.ofTokens(warnings);
    this.#warnings.ofSandbox(slot.worker?.sandbox);
    this.#everReady = true;
    this.#proved = true;
    this.#log.info({ event: 'worker_ready', worker: slot.index, workerPid: slot.worker?.pid }, 'worker ready');
    adoptOrphans(this.#current, this.#served.listeners, this.#log);
    this.forkDue();
    this.#sayWhatCameToPass();
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
      abandon(this.#current, slot);
      // The one that was to take its place is on its way.
      if (successor !== undefined) this.#takeSlot(slot, successor);
      adoptOrphans(this.#current, this.#served.listeners, this.#log);
      if (successor === undefined) this.#replaceLater(slot);
    }
    this.#sayWhatCameToPass();
  }

  #logLoss({ index, failuresInRow }: Slot, workerPid: number | undefined, { code, message }: WorkerFailure): void {
    this.#log.error({ event: 'worker_lost', worker: index, workerPid, code, failuresInRow }, message);
  }

  #replaceLater(slot: Slot): void {
    if (this.#halted !== undefined) return;
    slot.timer = setTimeout(() => {
      this.#replaceNow(slot);
    }, backoffMs(slot));
    // Who waited for this one to prove the PIN is next.
    this.forkDue();
  }

  #replaceNow(slot: Slot): void {
    clearTimeout(slot.timer);
    slot.state = 'due';
    slot.restarts += 1;
    this.forkDue();
  }

  #succeed(former: Slot, successor: Slot): void {
    this.#takeSlot(former, successor);
    clearTimeout(former.timer);
    former.page = this.#book.move(former.page);
    this.#retired.add(former);
    former.worker?.drain(this.#served.config.drainDeadlineMs);
    const { index, worker } = former;
    this.#log.warn(
      { event: 'worker_replaced', worker: index, workerPid: worker?.pid, by: successor.worker?.pid },
      'a worker that was stuck has a successor, and ends with its connections',
    );
  }

  #takeSlot(former: Slot, successor: Slot): void {
    former.successor = undefined;
    successor.replaces = undefined;
    this.#current[former.index] = successor;
    abandon(this.#current, former);
  }

  /** The worker that is stuck serves on as well as it can, and waits longer for the next. */
  #neverSucceeded(former: Slot, pid: number | undefined, failure: WorkerFailure): void {
    former.successor = undefined;
    former.failure = failure;
    former.failuresInRow += 1;
    former.successorAtMs = performance.now() + backoffMs(former);
    if (failure.haltsForking) this.#halted = failure;
    this.#logLoss(former, pid, failure);
    this.forkDue();
    this.#sayWhatCameToPass();
  }

  /** A worker serves on, and another is started beside it, unless one that was failed a moment ago. */
  stuck(slot: Slot, why: string): void {
    slot.stuck = { why, saidAtMs: performance.now() };
    const isInOrder = !this.#draining && this.#halted === undefined && this.#reload === undefined;
    const isInTime = !this.#isStarting && performance.now() >= slot.successorAtMs;
    if (!isInOrder || !isInTime || this.#current[slot.index] !== slot) return;
    this.#log.error({ event: 'worker_stuck', worker: slot.index, workerPid: slot.worker?.pid }, why);
    slot.successor = newSuccessor(slot);
    this.#fork(slot.successor);
  }

  /** Nobody is forked until it ends. */
  beginReload(reload: ReloadPhases): void {
    this.#reload = reload;
    if (this.#draining) reload.refuse(undefined, 'keygate drains');
  }

  /** Resolves when nobody is starting: whoever runs is ready. */
  async whenSettled(): Promise<void> {
    if (!this.#isStarting) return;
    const { promise, resolve } = Promise.withResolvers<void>();
    this.#settled = resolve;
    await promise;
  }

  /** What it brought is served, and who is forked from now on is given it. */
  reloaded({ warnings }: ReloadPhases): void {
    this.#warnings.forgetTokens();
    this.#warnings.ofTokens(warnings);
    // What kept them from starting may be mended. A PIN that was refused is not tried again, and another one by one worker for all.
    if (this.#halted !== undefined) this.#proved = false;
    this.#halted = undefined;
    for (const slot of this.#current) {
      if (slot.state !== 'waiting') continue;
      slot.failuresInRow = 0;
      this.#replaceNow(slot);
    }
    adoptAgain(this.#current, this.#served.listeners);
    this.endReload();
  }

  endReload(): void {
    this.#reload = undefined;
    this.forkDue();
  }

  /** Nobody is forked any more; every worker ends with its last connection, or at the deadline. */
  drain(deadlineMs: number): void {
    this.#draining = true;
    this.#reload?.refuse(undefined, 'keygate drains');
    for (const slot of this.all) {
      if (slot.state === 'waiting') clearTimeout(slot.timer);
      slot.worker?.drain(deadlineMs);
    }
    this.#sayWhatCameToPass();
  }

  #sayWhatCameToPass(): void {
    if (!this.#isStarting) this.#settled?.();
    if (this.#current.every(({ state }) => state === 'ready')) this.#allReady.resolve();
    if (this.all.some(({ worker }) => worker !== undefined)) return;
    const failure =
      this.#halted ??
      (this.#everReady ? undefined : this.#current.find(({ failure: found }) => found !== undefined)?.failure);
    this.#isOver = this.#draining || failure !== undefined;
    if (this.#draining) this.#ended.resolve();
    else if (failure !== undefined) this.#ended.reject(failureError(failure));
  }
}
