/**
 * Owns: the secrets of session tickets while no token derives them: random, shared by all workers, gone with the primary.
 * Must not know: how a ticket is made from them (the engine), or how they reach the workers.
 * Runs: main thread of the primary.
 */
import { randomBytes } from 'node:crypto';

const secretBytes = 32;

export interface TicketEpoch {
  readonly number: number;
  readonly since: Date;
}

/** For a successor of this primary; its tickets go on. */
export interface TicketSecrets {
  readonly current: Buffer;
  readonly next: Buffer;
  readonly previous: Buffer | undefined;
  readonly number: number;
  readonly since: Date;
}

/** The previous, the current and the next epoch; a worker encrypts under the current one and opens all three. */
export class TicketEpochs {
  #current: Buffer;
  #next: Buffer;
  #previous: Buffer | undefined;
  #number: number;
  #since: Date;

  constructor(inherited?: TicketSecrets) {
    this.#current = inherited?.current ?? randomBytes(secretBytes);
    this.#next = inherited?.next ?? randomBytes(secretBytes);
    this.#previous = inherited?.previous;
    this.#number = inherited?.number ?? 1;
    this.#since = inherited?.since ?? new Date();
  }

  get inheritance(): TicketSecrets {
    const [current, next, previous, number, since] = [
      this.#current,
      this.#next,
      this.#previous,
      this.#number,
      this.#since,
    ];
    return { current, next, previous, number, since };
  }

  /** Counted from the start of the first primary that had them. */
  get current(): TicketEpoch {
    return { number: this.#number, since: this.#since };
  }

  /** For a worker, the current epoch first. */
  get secrets(): readonly Uint8Array[] {
    return [this.#current, this.#next, ...(this.#previous === undefined ? [] : [this.#previous])];
  }

  /** The next epoch begins; tickets from before the previous one can no longer be opened. */
  rotate(): void {
    this.#number += 1;
    this.#since = new Date();
    this.#previous?.fill(0);
    this.#previous = this.#current;
    this.#current = this.#next;
    this.#next = randomBytes(secretBytes);
  }
}
