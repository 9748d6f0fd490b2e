/**
 * Owns: what is known of a worker slot, and what follows from that alone.
 * Must not know: what brings a slot from one state to the next (slots.ts, which draws them).
 * Runs: main thread of the primary.
 */
import type { WorkerFailure, WorkerSandbox } from '../messages.ts';
import type { WorkerProcess } from './worker-process.ts';

/** Delay before the first replacement; doubled by each failure in a row. */
const backoffMinMs = 100;
const backoffMaxMs = 30_000;
/** A worker is asked each second; one that has not answered for so long is not up. */
const silenceMsMax = 5_000;
/** A worker that has not said so again for this long is not stuck any more. */
const stuckMsMax = 3_000;

export type SlotState = 'due' | 'starting' | 'ready' | 'waiting';

export interface Slot {
  readonly index: number;
  state: SlotState;
  /** There is one while it is starting or ready. */
  worker: WorkerProcess | undefined;
  /** Of whoever was lost last, until another is ready. */
  failure: WorkerFailure | undefined;
  failuresInRow: number;
  restarts: number;
  /** Of the state: back-off, or becoming stable. */
  timer: NodeJS.Timeout | undefined;
  /** Slot of the sibling that serves this slot's accept queue. */
  adoptedBy: Slot | undefined;
  /** Its worker cannot sign any more and will not again: why, and when it said so last. */
  stuck: { readonly why: string; readonly saidAtMs: number } | undefined;
  /** Starts beside a worker that is stuck, to take its place. */
  successor: Slot | undefined;
  /** The other way round. */
  replaces: Slot | undefined;
  /** No successor before. */
  successorAtMs: number;
  /** In the book of snapshots: the slot's number, but of a worker that is retired. */
  page: number;
}

export interface SlotStatus {
  readonly slot: number;
  readonly state: SlotState;
  readonly pid: number | undefined;
  readonly restarts: number;
  /** When its process was forked; undefined while there is none. */
  readonly startedAt: Date | undefined;
  readonly failure: string | undefined;
  /** Why it waits for another in its place. */
  readonly stuck: string | undefined;
  /** False when it is ready and says nothing any more: its JavaScript thread hangs, or the process was stopped. */
  readonly answers: boolean;
  /** What holds in the worker that is ready; `landlockAbi` is 0 without Landlock. */
  readonly sandbox: { readonly landlockAbi: number; readonly seccomp: boolean } | undefined;
}

export function newSlot(index: number): Slot {
  return {
    index,
    state: 'due',
    worker: undefined,
    failure: undefined,
    failuresInRow: 0,
    restarts: 0,
    timer: undefined,
    adoptedBy: undefined,
    stuck: undefined,
    successor: undefined,
    replaces: undefined,
    successorAtMs: 0,
    page: index,
  };
}

/** With the same number; it has the place once it is ready. */
export function newSuccessor(slot: Slot): Slot {
  const { index, restarts, failuresInRow } = slot;
  return { ...newSlot(index), replaces: slot, restarts: restarts + 1, failuresInRow };
}

/** How long the next worker is waited for after a failure. */
export function backoffMs({ failuresInRow }: Slot): number {
  return Math.min(backoffMinMs * 2 ** (failuresInRow - 1), backoffMaxMs);
}

/** Undefined: it is not, or not any more. */
export function whyStuck({ stuck }: Slot): string | undefined {
  return stuck !== undefined && performance.now() - stuck.saidAtMs < stuckMsMax ? stuck.why : undefined;
}

/** @param silenceMs since its worker answered last */
export function statusOf(slot: Slot, silenceMs: number): SlotStatus {
  const { index, state, worker, restarts, failure } = slot;
  return {
    slot: index,
    state,
    pid: worker?.pid,
    restarts,
    startedAt: worker?.startedAt,
    failure: failure?.message,
    stuck: whyStuck(slot),
    answers: silenceMs < silenceMsMax,
    sandbox: state === 'ready' ? sandboxStatus(worker?.sandbox) : undefined,
  };
}

function sandboxStatus(sandbox: WorkerSandbox | undefined): NonNullable<SlotStatus['sandbox']> {
  return { landlockAbi: sandbox?.landlockAbi ?? 0, seccomp: sandbox?.seccomp ?? false };
}
