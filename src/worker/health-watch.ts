/**
 * Owns: telling the log when a token or an upstream server goes down or comes back, and when a token had to be repaired.
 * Must not know: how that is found out.
 * Runs: main thread of a worker.
 */
import type { EngineSnapshot, TokenSnapshot } from '../engine/native.d.ts';
import type { Log } from '../log.ts';

/** Remembers what was up at the last look. Everything is up when the engine starts. */
export class HealthWatch {
  readonly #log: Log;
  readonly #down = new Set<string>();
  readonly #repairs = new Map<string, number>();
  readonly #lost = new Map<string, number>();

  constructor(log: Log) {
    this.#log = log;
  }

  look({ tokens, upstreams }: EngineSnapshot): void {
    const seen = new Set<string>();
    for (const token of tokens) {
      seen.add(this.#notice('token', token.name, token.up, token.downReason));
      this.#noticeRepairs(token);
      this.#noticeLost(token);
    }
    for (const { name, servers } of upstreams) {
      for (const { address, up } of servers) seen.add(this.#notice('server', `${name} ${address}`, up));
    }
    // What a reload has removed is neither down nor back.
    for (const key of this.#down) if (!seen.has(key)) this.#down.delete(key);
  }

  #noticeLost({ name, lanesWrittenOff, lanesLost }: TokenSnapshot): void {
    const known = this.#lost.get(name) ?? 0;
    this.#lost.set(name, lanesWrittenOff);
    if (lanesWrittenOff <= known) return;
    const sums = { lost: lanesLost, writtenOff: lanesWrittenOff };
    this.#log.warn({ event: 'lanes_lost', token: name, ...sums }, `token ${name}: calls into its module do not return`);
  }

  #noticeRepairs({ name, reopened, loggedIn, refound, reinitialized }: TokenSnapshot): void {
    const repairs = reopened + loggedIn + refound + reinitialized;
    const known = this.#repairs.get(name);
    this.#repairs.set(name, repairs);
    // The login of the start repairs nothing.
    if (known === undefined || repairs <= known) return;
    const sums = { reopened, loggedIn, refound, reinitialized };
    this.#log.info({ event: 'token_repaired', token: name, ...sums }, `token ${name} was repaired`);
  }

  #notice(what: 'token' | 'server', name: string, up: boolean, why?: string): string {
    const key = `${what} ${name}`;
    if (up === !this.#down.has(key)) return key;
    if (up) {
      this.#down.delete(key);
      this.#log.info({ event: `${what}_up`, [what]: name } as const, `${key} is back`);
    } else {
      this.#down.add(key);
      const details = { event: `${what}_down`, [what]: name } as const;
      if (why === undefined) this.#log.error(details, `${key} is down`);
      else this.#log.error({ ...details, reason: why }, `${key} is down: ${why}`);
    }
    return key;
  }
}
