/**
 * Owns: one worker process: forking it with the sockets that it inherits, both channels to it, and that it ends in time when
 * its start hangs or its drain is late.
 * Must not know: what its slot is without it, the other workers, when a process is forked and what follows from its end.
 * Runs: main thread of the primary.
 */
import cluster from 'node:cluster';
import type { Worker } from 'node:cluster';
import { closeSync } from 'node:fs';
import { fileURLToPath } from 'node:url';
import type { Config } from '../config/config.ts';
import { engine } from '../engine/binding.ts';
import type { Log } from '../log.ts';
import type { PrimaryMessage, WorkerFailure, WorkerMessage, WorkerSandbox } from '../messages.ts';
import type { ListeningSocket } from './listeners.ts';
import { exitFailure, forkFailure, hangFailure } from './worker-failures.ts';

/** A worker that is not ready by then, beyond what its configuration lets it wait, hangs in a token and is killed. */
const startDeadlineMs = 60_000;
/** What a worker may take beyond the drain deadline before it is killed. */
const killGraceMs = 2_000;
/** What a worker inherits before its sockets: three standard descriptors, the channel for messages, that for sockets. */
const handoverFd = 4;
const firstSocketFd = 5;

/** What a worker is told first, but for the sockets. */
export type WorkerStart = Omit<MessageOf<'start'>, 'type' | 'sockets' | 'firstFd' | 'handoverFd'>;

type MessageOf<Type extends PrimaryMessage['type']> = Extract<PrimaryMessage, { type: Type }>;

/** What a worker says that is not for its process alone. */
export type WorkerNews = Exclude<WorkerMessage, { type: 'doing' | 'retired' }>;

export interface ForkedWorker {
  readonly worker: Worker;
  /** The channel through which it is handed sockets. */
  readonly handover: number;
  /** What it inherits, in this order. */
  readonly sockets: readonly ListeningSocket[];
}

interface Listening {
  readonly onNews: (news: WorkerNews) => void;
  /** Once, after the last news: there is no process any more, or never was one. */
  readonly onEnd: (failure: WorkerFailure) => void;
}

/**
 * @param sockets all of all workers
 * @throws Error there is nothing to fork it with: out of descriptors. Other reasons are told by `onEnd`.
 */
export function forkWorker(slot: number, sockets: readonly ListeningSocket[]): ForkedWorker {
  const handover = engine().openHandover();
  const extension = import.meta.url.endsWith('.ts') ? 'ts' : 'js';
  try {
    // Before each fork: a reload changes what there is to inherit.
    cluster.setupPrimary({
      exec: fileURLToPath(new URL(`../worker/main.${extension}`, import.meta.url)),
      args: [],
      // Without it the same user can have any process of Node start a debugger, with a thread that no sandbox reaches.
      execArgv: [...process.execArgv, '--disable-sigusr1'],
      serialization: 'advanced',
      stdio: ['inherit', 'inherit', 'inherit', 'ipc', handover.worker, ...sockets.map(({ fd }) => fd)],
    });
    return { worker: cluster.fork({ KEYGATE_SLOT: String(slot) }), handover: handover.primary, sockets };
  } catch (error) {
    closeSync(handover.primary);
    throw error;
  } finally {
    closeSync(handover.worker);
  }
}

export class WorkerProcess {
  readonly startedAt: Date;
  readonly #worker: Worker;
  /** The channel through which it is handed sockets. */
  readonly #handover: number;
  readonly #listening: Listening;
  readonly #startTimer: NodeJS.Timeout;
  #killTimer: NodeJS.Timeout | undefined;
  #isGone = false;
  #doing: string | undefined;
  #sandbox: WorkerSandbox | undefined;
  /** What it said, or why it was killed: better words than how it ended. */
  #failure: WorkerFailure | undefined;
  #hasRetired = (): void => {};

  constructor(slot: number, forked: ForkedWorker, start: WorkerStart, log: Log, listening: Listening) {
    const { worker, sockets } = forked;
    this.startedAt = new Date();
    this.#worker = worker;
    this.#handover = forked.handover;
    this.#listening = listening;
    this.#startTimer = setTimeout(() => {
      this.#failure = hangFailure(slot, this.#doing);
      this.kill();
    }, startDeadlineOf(start.config));
    worker.on('message', (message: WorkerMessage) => {
      // Its last words may arrive after its end, when its counts have been kept and its slot is free already.
      if (!this.#isGone) this.#hear(message);
    });
    worker.on('error', (error) => {
      // No process, so no exit event: out of descriptors or of processes, or not allowed to execute.
      if (worker.process.pid === undefined) this.#end(forkFailure(slot, error));
      else log.error({ event: 'worker_channel', worker: slot, error }, 'the channel to a worker failed');
    });
    worker.once('exit', (code: number | null, signal: string | null) => {
      this.#end(this.#failure ?? exitFailure(slot, code, signal));
    });
    this.tell({
      type: 'start',
      ...start,
      sockets: sockets.map(({ socket }) => socket),
      firstFd: firstSocketFd,
      handoverFd,
    });
  }

  /** Undefined when it could not be forked. */
  get pid(): number | undefined {
    return this.#worker.process.pid;
  }

  /** What it was last doing while it started or prepared a reload. */
  get doing(): string | undefined {
    return this.#doing;
  }

  /** What holds in it since it is ready. */
  get sandbox(): WorkerSandbox | undefined {
    return this.#sandbox;
  }

  tell(message: PrimaryMessage): void {
    // One that has just died cannot be told; its end is noticed by other means.
    if (this.#worker.isConnected()) this.#worker.send(message, undefined, () => {});
  }

  /** First phase of a reload. @throws Error the sockets that it opened cannot be handed over */
  prepare(next: Omit<MessageOf<'prepare'>, 'type' | 'sockets'>, opened: readonly ListeningSocket[]): void {
    this.#doing = undefined;
    if (opened.length > 0) {
      engine().handOver(
        this.#handover,
        next.reload,
        opened.map(({ fd }) => fd),
      );
    }
    this.tell({ type: 'prepare', ...next, sockets: opened.map(({ socket }) => socket) });
  }

  /** Nobody has these sockets any more. Resolves when it has let go of them, or is gone. */
  async retire(sockets: readonly number[]): Promise<void> {
    const { promise, resolve } = Promise.withResolvers<void>();
    this.#hasRetired = resolve;
    this.tell({ type: 'retire', sockets });
    return promise;
  }

  /** It accepts nothing any more and ends with its last connection, or at the deadline. A second call moves the deadline. */
  drain(deadlineMs: number): void {
    this.tell({ type: 'drain', deadlineMs });
    // Its JavaScript thread may hang, and then would go on to accept beside whoever has its place.
    engine().sayFarewell(this.#handover);
    clearTimeout(this.#killTimer);
    this.#killTimer = setTimeout(() => this.kill(), deadlineMs + killGraceMs);
  }

  kill(): void {
    this.#worker.process.kill('SIGKILL');
  }

  #hear(message: WorkerMessage): void {
    switch (message.type) {
      case 'doing':
        this.#doing = message.what;
        return;
      case 'retired':
        this.#hasRetired();
        return;
      case 'ready':
        clearTimeout(this.#startTimer);
        this.#sandbox = message.sandbox;
        break;
      case 'failed':
        this.#failure = message.failure;
        break;
      default: // says nothing of the process itself
    }
    this.#listening.onNews(message);
  }

  #end(failure: WorkerFailure): void {
    if (this.#isGone) return;
    this.#isGone = true;
    clearTimeout(this.#startTimer);
    clearTimeout(this.#killTimer);
    this.#hasRetired();
    closeSync(this.#handover);
    this.#listening.onEnd(failure);
  }
}

/** A worker waits for other processes' logins, once to prove a token and once to start it. */
function startDeadlineOf({ tokens }: Config): number {
  return Object.values(tokens).reduce((sum, { loginLockWaitMs }) => sum + 2 * loginLockWaitMs, startDeadlineMs);
}
