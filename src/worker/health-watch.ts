/**
 * Owns: telling the log when a token or an upstream server goes down or comes back.
 * Must not know: how that is found out.
 * Runs: main thread of a worker.
 */
import type { EngineSnapshot } from '../engine/native.d.ts';
import type { Log } from '../log.ts';

/** Remembers what was up at the last look. Everything is up when the engine starts. */
export class HealthWatch {
  readonly #log: Log;
  readonly #down = new Set<string>();

  constructor(log: Log) {
    this.#log = log;
  }

  look({ tokens, upstreams }: EngineSnapshot): void {
    const seen = new Set<string>();
    for (const { name, up, downReason } of tokens) seen.add(this.#notice('token', name, up, downReason));
    for (const { name, servers } of upstreams) {
      for (const { address, up } of servers) seen.add(this.#notice('server', `${name} ${address}`, up));
    }
    // What a reload has removed is neither down nor back.
    for (const key of this.#down) if (!seen.has(key)) this.#down.delete(key);
  }

  #notice(what: 'token' | 'server', name: string, up: boolean, why?: string): string {
    const key = `${what} ${name}`;
    if (up === !this.#down.has(key)) return key;
    if (up) {
      this.#down.delete(key);
      this.#log.info({ event: `${what}_up`, [what]: name }, `${key} is back`);
    } else {
      this.#down.add(key);
      const details = { event: `${what}_down`, [what]: name };
      if (why === undefined) this.#log.error(details, `${key} is down`);
      else this.#log.error({ ...details, reason: why }, `${key} is down: ${why}`);
    }
    return key;
  }
}
