/**
 * Owns: the worker processes: forking the first alone, then the others; replacing the dead with growing delay; having a
 * sibling serve a dead worker's accept queue; draining; ending.
 * Must not know: tokens, TLS, HTTP. Never loads a PKCS#11 module.
 * Runs: main thread of the primary.
 *
 * ```text
 *   starting ──ready──> ready ──exit──> waiting ──delay──> starting
 *      └────exit──────────────────────────^  │
 *      └────failed (PIN)────> halted <───────┘   a halted slot halts every later fork
 * ```
 */
import cluster from 'node:cluster';
import type { Worker } from 'node:cluster';
import { EventEmitter } from 'node:events';
import { fileURLToPath } from 'node:url';
import type { Config } from '../config/config.ts';
import type { EngineSnapshot } from '../engine/native.d.ts';
import { ServiceError, TokenError } from '../errors.ts';
import type { KeygateError } from '../errors.ts';
import type { Log } from '../log.ts';
import type { PrimaryMessage, WorkerFailure, WorkerMessage } from '../messages.ts';
import type { Listeners } from './listeners.ts';
import { SnapshotBook } from './snapshot-book.ts';
import type { TicketEpochs } from './ticket-epochs.ts';

/** A worker that is not ready by then hangs in a token's login and is killed. */
const startDeadlineMs = 60_000;
/** Delay before the first replacement; doubled by each failure in a row. */
const backoffMinMs = 100;
const backoffMaxMs = 30_000;
/** A worker that was ready this long has not failed "in a row", and its earlier failures are forgotten. */
const stableAfterMs = 10_000;
/** This many failures in a row are a crash loop. */
const crashLoopFailures = 4;
/** Answers to `observe` that come later are not waited for; the last known snapshot serves. */
const observeDeadlineMs = 250;
/** What a worker may take beyond the drain deadline before it is killed. */
const killGraceMs = 2_000;

export type SlotState = 'starting' | 'ready' | 'waiting' | 'halted';

interface Slot {
  readonly index: number;
  state: SlotState;
  worker: Worker | undefined;
  failure: WorkerFailure | undefined;
  failuresInRow: number;
  restarts: number;
  readySince: number;
  timer: NodeJS.Timeout | undefined;
  /** Slot of the sibling that serves this slot's accept queue. */
  adoptedBy: Slot | undefined;
}

export interface SlotStatus {
  readonly slot: number;
  readonly state: SlotState;
  readonly pid: number | undefined;
  readonly restarts: number;
  readonly failure: string | undefined;
}

interface WorkersEvents {
  /** Every slot is ready. */
  allReady: [];
  /** A drain has ended: no worker is left. */
  drained: [];
}

export class Workers extends EventEmitter<WorkersEvents> {
  readonly #config: Config;
  readonly #listeners: Listeners;
  readonly #epochs: TicketEpochs;
  readonly #log: Log;
  readonly #slots: Slot[];
  readonly #book = new SnapshotBook();
  #observation = 0;
  #draining = false;
  /** Set once: no process may be forked any more. */
  #halted: WorkerFailure | undefined;
  #allReadySaid = false;

  constructor(config: Config, listeners: Listeners, epochs: TicketEpochs, log: Log) {
    super();
    this.#config = config;
    this.#listeners = listeners;
    this.#epochs = epochs;
    this.#log = log;
    this.#slots = listeners.bySlot.map((_, index) => newSlot(index));
  }

  /**
   * Forks the first worker, and the others once it is ready: a wrong PIN is tried once, not once per worker.
   * @throws TokenError or ServiceError, what the first worker failed with
   */
  async start(): Promise<void> {
    const extension = import.meta.url.endsWith('.ts') ? 'ts' : 'js';
    cluster.setupPrimary({
      exec: fileURLToPath(new URL(`../worker/main.${extension}`, import.meta.url)),
      args: [],
      serialization: 'advanced',
      stdio: ['inherit', 'inherit', 'inherit', 'ipc', ...this.#listeners.fds],
    });
    const [first, ...others] = this.#slots;
    if (first === undefined) return;
    const outcome = await this.#fork(first);
    if (outcome !== 'ready') throw failureError(outcome);
    if (this.#draining) return;
    for (const slot of others) void this.#fork(slot);
    this.#sayWhenAllReady();
  }

  get status(): readonly SlotStatus[] {
    return this.#slots.map(({ index, state, worker, restarts, failure }) => ({
      slot: index,
      state,
      pid: worker?.process.pid,
      restarts,
      failure: failure?.message,
    }));
  }

  /** Why the service is not ready; undefined when it is. */
  get unreadiness(): string | undefined {
    if (this.#draining) return 'draining';
    if (this.#halted !== undefined) return `no worker may be forked any more: ${this.#halted.message}`;
    const looping = this.#slots.find((slot) => slot.failuresInRow >= crashLoopFailures && !isStable(slot));
    if (looping !== undefined) return `worker ${looping.index} has failed ${looping.failuresInRow} times in a row`;
    if (!this.#slots.some(({ state }) => state === 'ready')) return 'no worker is ready';
    return undefined;
  }

  /** What all workers measured, living and dead, as one; a worker that does not answer in time counts with its last answer. */
  async observe(): Promise<EngineSnapshot> {
    const id = ++this.#observation;
    const asked = this.#slots.filter(({ state, worker }) => state === 'ready' && worker !== undefined);
    const answers = this.#book.expect(
      id,
      asked.map(({ index }) => index),
    );
    for (const slot of asked) this.#tell(slot, { type: 'observe', id });
    const deadline = Promise.withResolvers<void>();
    const timer = setTimeout(deadline.resolve, observeDeadlineMs);
    await Promise.race([answers, deadline.promise]);
    clearTimeout(timer);
    return this.#book.total();
  }

  rotateTickets(): void {
    this.#epochs.rotate();
    for (const slot of this.#slots) {
      if (slot.state === 'ready') this.#tell(slot, { type: 'tickets', ticketSecrets: this.#epochs.secrets });
    }
  }

  /** Every worker accepts nothing any more and leaves when its last connection has ended, or at the deadline. */
  drain(deadlineMs: number): void {
    this.#draining = true;
    for (const slot of this.#slots) {
      clearTimeout(slot.timer);
      if (slot.worker === undefined) continue;
      this.#tell(slot, { type: 'drain', deadlineMs });
      const { worker } = slot;
      slot.timer = setTimeout(() => worker.process.kill('SIGKILL'), deadlineMs + killGraceMs);
    }
    this.#sayWhenDrained();
  }

  /** Settles when the new worker is ready or gone. */
  async #fork(slot: Slot): Promise<'ready' | WorkerFailure> {
    const { promise, resolve } = Promise.withResolvers<'ready' | WorkerFailure>();
    const worker = cluster.fork({ KEYGATE_SLOT: String(slot.index) });
    slot.worker = worker;
    slot.state = 'starting';
    slot.timer = setTimeout(() => {
      this.#log.error(
        { event: 'worker_start_deadline', worker: slot.index },
        'the worker hangs while it starts; killing it',
      );
      worker.process.kill('SIGKILL');
    }, startDeadlineMs);
    let failure: WorkerFailure | undefined;
    worker.on('message', (message: WorkerMessage) => {
      switch (message.type) {
        case 'ready':
          this.#ready(slot, message.warnings);
          resolve('ready');
          return;
        case 'failed':
          failure = message.failure;
          return;
        case 'snapshot':
          // Its last words may arrive after its end, when its counts have been kept already.
          if (slot.worker === worker) this.#book.enter(message.id, slot.index, message.snapshot);
          return;
      }
    });
    worker.on('error', (error) => {
      this.#log.error({ event: 'worker_channel', worker: slot.index, error }, 'the channel to a worker failed');
    });
    worker.once('exit', (code: number | null, signal: string | null) => {
      const found = failure ?? exitFailure(slot.index, code, signal);
      this.#gone(slot, worker, found);
      resolve(found);
    });
    this.#tell(slot, {
      type: 'start',
      config: this.#config,
      sockets: this.#listeners.bySlot[slot.index] ?? [],
      ticketSecrets: this.#epochs.secrets,
    });
    return promise;
  }

  #ready(slot: Slot, warnings: readonly string[]): void {
    clearTimeout(slot.timer);
    slot.state = 'ready';
    slot.failure = undefined;
    slot.readySince = Date.now();
    const adopter = slot.adoptedBy;
    slot.adoptedBy = undefined;
    if (adopter !== undefined) this.#tell(adopter, { type: 'release', sockets: this.#socketsOf(slot) });
    if (slot.restarts === 0 && slot.index === 0) {
      for (const warning of warnings) this.#log.warn({ event: 'token_warning' }, warning);
    }
    this.#log.info({ event: 'worker_ready', worker: slot.index, workerPid: slot.worker?.process.pid }, 'worker ready');
    this.#adoptOrphans();
    this.#sayWhenAllReady();
  }

  #gone(slot: Slot, worker: Worker, failure: WorkerFailure): void {
    clearTimeout(slot.timer);
    const wasReady = slot.state === 'ready';
    const wasStable = isStable(slot);
    slot.worker = undefined;
    slot.state = 'waiting';
    this.#book.retire(slot.index);
    if (this.#draining) {
      this.#log.info({ event: 'worker_ended', worker: slot.index }, 'worker ended');
      this.#sayWhenDrained();
      return;
    }
    slot.failure = failure;
    slot.failuresInRow = wasStable ? 1 : slot.failuresInRow + 1;
    this.#log.error(
      {
        event: 'worker_lost',
        worker: slot.index,
        workerPid: worker.process.pid,
        code: failure.code,
        failuresInRow: slot.failuresInRow,
      },
      failure.message,
    );
    if (failure.haltsForking) this.#halted = failure;
    for (const orphaned of this.#slots) if (orphaned.adoptedBy === slot) orphaned.adoptedBy = undefined;
    this.#adoptOrphans();
    if (this.#halted !== undefined) {
      slot.state = 'halted';
      return;
    }
    // Nothing to replace it with before the first worker has proved the tokens: start() throws.
    if (!wasReady && this.#slots.every(({ restarts, readySince }) => restarts === 0 && readySince === 0)) return;
    const delayMs = Math.min(backoffMinMs * 2 ** (slot.failuresInRow - 1), backoffMaxMs);
    slot.timer = setTimeout(() => {
      slot.restarts += 1;
      void this.#fork(slot);
    }, delayMs);
  }

  /** Connections that wait in the queue of a worker that is gone are accepted by a sibling meanwhile. */
  #adoptOrphans(): void {
    for (const orphaned of this.#slots) {
      if (orphaned.state === 'ready' || orphaned.adoptedBy !== undefined) continue;
      if (orphaned.state === 'starting' && orphaned.restarts === 0) continue; // its first start: it will serve its own
      const adopter = this.#slots.find(({ state }) => state === 'ready');
      if (adopter === undefined) return;
      orphaned.adoptedBy = adopter;
      this.#tell(adopter, { type: 'adopt', sockets: this.#socketsOf(orphaned) });
      this.#log.info(
        { event: 'queue_adopted', worker: orphaned.index, by: adopter.index },
        'a sibling serves the accept queue',
      );
    }
  }

  #socketsOf(slot: Slot): Listeners['bySlot'][number] {
    return this.#listeners.bySlot[slot.index] ?? [];
  }

  #tell(slot: Slot, message: PrimaryMessage): void {
    // A worker that has just died cannot be told; its exit event follows.
    slot.worker?.send(message, undefined, () => {});
  }

  #sayWhenAllReady(): void {
    if (this.#allReadySaid || !this.#slots.every(({ state }) => state === 'ready')) return;
    this.#allReadySaid = true;
    this.emit('allReady');
  }

  #sayWhenDrained(): void {
    if (this.#slots.every(({ worker }) => worker === undefined)) this.emit('drained');
  }
}

function newSlot(index: number): Slot {
  return {
    index,
    state: 'starting',
    worker: undefined,
    failure: undefined,
    failuresInRow: 0,
    restarts: 0,
    readySince: 0,
    timer: undefined,
    adoptedBy: undefined,
  };
}

function isStable({ state, readySince }: Slot): boolean {
  return state === 'ready' && Date.now() - readySince >= stableAfterMs;
}

function exitFailure(slot: number, code: number | null, signal: string | null): WorkerFailure {
  const how = signal === null ? `exited with ${code}` : `was ended by ${signal}`;
  return { code: 'worker_failed', message: `worker ${slot} ${how}`, hint: undefined, exitCode: 1, haltsForking: false };
}

function failureError({ code, message, hint, exitCode }: WorkerFailure): KeygateError {
  const details = hint === undefined ? {} : { hint };
  if (exitCode === 69) return new TokenError(code, message, details);
  return new ServiceError(code, message, details);
}
