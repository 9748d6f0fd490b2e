/**
 * Owns: both phases of one reload in the workers: who prepares it in which order, what they answer, why it must not be
 * committed, and that each who has prepared it commits it or is killed.
 * Must not know: what the configuration says, what a reload is outside of the workers (reload.ts), who is forked when.
 * Runs: main thread of the primary.
 */
import type { Config } from '../config/config.ts';
import type { WorkerFailure, WorkerMessage } from '../messages.ts';
import { usesOf } from './accept-queues.ts';
import type { NextListeners } from './listeners.ts';
import type { Slot } from './slot.ts';
import { failureOf } from './worker-failures.ts';

/** A worker that has prepared a reload commits it in no time; one that does not is killed, and its replacement is whole. */
const commitDeadlineMs = 15_000;

/** What a worker cannot serve, and so none will. */
export interface Refusal {
  /** Slot of the worker; undefined when it is about all of them. */
  readonly worker: number | undefined;
  readonly failure: WorkerFailure;
}

export class ReloadPhases {
  readonly number: number;
  readonly config: Config;
  readonly listeners: NextListeners;
  /** What workers that have prepared it say of the tokens. */
  readonly warnings = new Set<string>();
  /** Workers that were told to prepare. */
  readonly #asked = new Set<Slot>();
  /** Those that have not answered yet. */
  readonly #answers = new Map<Slot, PromiseWithResolvers<WorkerFailure | undefined>>();
  /** Set once: the second phase has begun, and cannot be refused. */
  #committing = false;
  /** Workers that have not said yet that they have committed. */
  readonly #commits = new Map<Slot, PromiseWithResolvers<void>>();
  /** Set once: this reload must not be committed. */
  #refusal: Refusal | undefined;
  /** While the first phase waits for who is starting. */
  #waitNoMore = (): void => {};

  /** @param number of this reload alone: what is said of another comes too late */
  constructor(number: number, config: Config, listeners: NextListeners) {
    this.number = number;
    this.config = config;
    this.listeners = listeners;
  }

  get refusal(): Refusal | undefined {
    return this.#refusal;
  }

  /**
   * First phase. One worker does it alone, so that what is wrong costs one worker's effort and one try of a PIN.
   * @param slots as they are from now on
   * @param settled nobody is starting: whoever runs is ready
   */
  async prepare(slots: readonly Slot[], settled: Promise<void>, deadlineMs: number): Promise<Refusal | undefined> {
    const late = setTimeout(() => {
      const slot = slots.find(({ state }) => state === 'starting') ?? this.#answers.keys().next().value;
      this.refuse(slot, `no answer within ${deadlineMs} ms; ${slot?.worker?.doing ?? 'it said nothing'}`);
    }, deadlineMs);
    const refused = Promise.withResolvers<void>();
    this.#waitNoMore = refused.resolve;
    if (this.#refusal === undefined) await Promise.race([settled, refused.promise]);
    const ready = () => slots.filter((slot) => slot.state === 'ready' && !this.#asked.has(slot));
    const [first] = ready();
    if (first === undefined) this.refuse(undefined, 'no worker is ready to try it');
    else await this.#ask(first);
    await Promise.all(ready().map(async (slot) => this.#ask(slot)));
    clearTimeout(late);
    return this.#refusal;
  }

  async #ask(slot: Slot): Promise<void> {
    if (this.#refusal !== undefined) return;
    const answer = Promise.withResolvers<WorkerFailure | undefined>();
    this.#asked.add(slot);
    this.#answers.set(slot, answer);
    const { number, config, listeners } = this;
    try {
      slot.worker?.prepare({ reload: number, config, accept: usesOf(listeners, slot) }, listeners.opened);
    } catch (error) {
      answer.resolve(failureOf('worker_failed', `it cannot be handed the new sockets: ${String(error)}`, 1));
    }
    const failure = await answer.promise;
    this.#answers.delete(slot);
    if (failure !== undefined) this.refuse(slot, failure);
  }

  /** The first reason counts; nobody is waited for any more. */
  refuse(slot: Slot | undefined, reason: WorkerFailure | string): void {
    if (this.#committing) return;
    const failure = typeof reason === 'string' ? failureOf('worker_failed', reason, 69) : reason;
    this.#refusal ??= { worker: slot?.index, failure };
    for (const { resolve } of this.#answers.values()) resolve(undefined);
    this.#waitNoMore();
  }

  /** Second phase. From its first moment on a worker that is lost is replaced by one of the new configuration. */
  async commit(): Promise<void> {
    this.#committing = true;
    const commits = [...this.#asked].map(async (slot) => {
      const committed = Promise.withResolvers<void>();
      this.#commits.set(slot, committed);
      slot.worker?.tell({ type: 'commit', reload: this.number });
      return committed.promise;
    });
    const late = setTimeout(() => {
      for (const { worker } of this.#commits.keys()) worker?.kill();
    }, commitDeadlineMs);
    await Promise.all(commits);
    clearTimeout(late);
  }

  /** In place of the second phase: every worker forgets what it prepared. */
  discard(): void {
    for (const { worker } of this.#asked) worker?.tell({ type: 'discard', reload: this.number });
  }

  hear(slot: Slot, news: Extract<WorkerMessage, { type: 'prepared' | 'refused' | 'committed' }>): void {
    switch (news.type) {
      case 'prepared':
        for (const warning of news.warnings) this.warnings.add(warning);
        this.#answers.get(slot)?.resolve(undefined);
        return;
      case 'refused':
        this.#answers.get(slot)?.resolve(news.failure);
        return;
      case 'committed':
        this.#hasCommitted(slot);
        return;
    }
  }

  /** One that was asked cannot answer any more. */
  lost(slot: Slot, failure: WorkerFailure): void {
    if (!this.#asked.has(slot)) return;
    this.refuse(slot, failure);
    this.#hasCommitted(slot);
  }

  /** Or has gone, and its replacement will have. */
  #hasCommitted(slot: Slot): void {
    this.#commits.get(slot)?.resolve();
    this.#commits.delete(slot);
  }
}
