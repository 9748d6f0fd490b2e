/**
 * Owns: what DNS says about the servers of upstreams with `dane`: asking in time, what counts until the next answer, telling.
 * Must not know: how a question is asked (dns.ts), what a certificate is compared with (engine/src/verify/dane.rs).
 * Runs: main thread of a worker; the engine refuses by itself what has become too old, should this thread be late.
 *
 * ```
 *             secure answer
 *  nothing ──────────────────> held, until TTL + grace ──(that is over)──> what the last lookup said
 *                               │  ^
 *                               └──┘ another secure answer takes its place at once, also "there is no record";
 *                                    whatever is not secure leaves it alone
 * ```
 */
import { isDeepStrictEqual } from 'node:util';
import type { TlsaAnswer, TlsaRecord, UpstreamSettings } from '../engine/native.d.ts';
import type { Log } from '../log.ts';
import { lookUpTlsa } from './dns.ts';
import type { Resolver, TlsaLookup } from './dns.ts';

/** A server of an upstream, by its place among those that have an address. */
export interface TlsaTarget {
  readonly upstream: string;
  readonly server: number;
  /** `_443._tcp.example.org`. */
  readonly name: string;
}

/** How long a secure answer outlives its TTL while no other is to be had: an operator restarts the resolver. */
const graceMs = 10 * 60_000;
const refreshMsMin = 1000;
const refreshMsMax = 3_600_000;
const retryMsMin = 1000;
const retryMsMax = 60_000;
/** Of u32, with room. */
const validMsMax = 30 * 86_400_000;

interface Options {
  readonly resolver: Resolver;
  readonly targets: readonly TlsaTarget[];
  readonly log: Pick<Log, 'info' | 'warn'>;
  readonly graceMs?: number;
}

export class TlsaWatch {
  readonly #resolver: Resolver;
  readonly #targets: readonly TlsaTarget[];
  readonly #log: Pick<Log, 'info' | 'warn'>;
  readonly #graceMs: number;
  readonly #names: ReadonlyMap<string, TlsaName>;
  #tell: ((target: TlsaTarget, answer: TlsaAnswer) => void) | undefined;

  /** Asks nobody yet. What `former` holds of the same names from the same resolver is taken over. */
  constructor({ resolver, targets, log, graceMs: grace = graceMs }: Options, former?: TlsaWatch) {
    this.#resolver = resolver;
    this.#targets = targets;
    this.#log = log;
    this.#graceMs = grace;
    const known = former !== undefined && isDeepStrictEqual(former.#resolver, resolver) ? former.#names : undefined;
    this.#names = new Map(targets.map(({ name }) => [name, new TlsaName(known?.get(name))]));
  }

  /** Asks for every name once; an engine that starts then knows. Resolves when there is an answer for each, of whatever kind. */
  async ask(): Promise<void> {
    await Promise.all([...this.#names].map(async ([name, state]) => this.#ask(name, state)));
  }

  /** Of the servers of an upstream, in their order. */
  answers(upstream: string): TlsaAnswer[] {
    return this.#targets
      .filter((target) => target.upstream === upstream)
      .toSorted((a, b) => a.server - b.server)
      .map(({ name }) => this.#names.get(name)?.answer() ?? unavailable);
  }

  /** From now on answers are told as they come, first those that are known. */
  begin(tell: (target: TlsaTarget, answer: TlsaAnswer) => void): void {
    this.#tell = tell;
    for (const [name, state] of this.#names) {
      this.#say(name, state);
      this.#schedule(name, state);
    }
  }

  end(): void {
    this.#tell = undefined;
    for (const state of this.#names.values()) clearTimeout(state.timer);
  }

  async #ask(name: string, state: TlsaName): Promise<void> {
    const before = state.describe();
    state.learn(await lookUpTlsa(this.#resolver, name), this.#graceMs);
    // Before the log says so: whoever reads it may count on it.
    this.#say(name, state);
    const after = state.describe();
    if (after === before) return;
    const details = { event: 'tlsa_changed', name, answer: after } as const;
    if (state.answer().state === 'secure' && !state.isDoubted) this.#log.info(details, `TLSA ${name}: ${after}`);
    else this.#log.warn(details, `TLSA ${name}: ${after}`);
  }

  #say(name: string, state: TlsaName): void {
    const answer = state.answer();
    for (const target of this.#targets) if (target.name === name) this.#tell?.(target, answer);
  }

  #schedule(name: string, state: TlsaName): void {
    state.timer = setTimeout(() => {
      void this.#ask(name, state).then(() => {
        if (this.#tell !== undefined) this.#schedule(name, state);
      });
    }, state.delayMs()).unref();
  }
}

const unavailable: TlsaAnswer = { state: 'unavailable', records: [], validMs: 0 };

/** Times are of `performance.now()`: a clock that is set must not make an answer older or younger. */
class TlsaName {
  timer: NodeJS.Timeout | undefined;
  #held: { readonly records: readonly TlsaRecord[]; readonly until: number } | undefined;
  #last: TlsaLookup = { state: 'indeterminate', why: 'nobody has asked yet' };
  #failures = 0;

  constructor(former: TlsaName | undefined) {
    if (former !== undefined) this.#held = former.#held;
  }

  learn(lookup: TlsaLookup, graceFor: number): void {
    this.#last = lookup;
    this.#failures = lookup.state === 'secure' ? 0 : this.#failures + 1;
    if (lookup.state !== 'secure') return;
    this.#held = { records: lookup.records, until: performance.now() + lookup.ttlMs + graceFor };
  }

  /** The last lookup was not secure, and what it said does not count yet. */
  get isDoubted(): boolean {
    return this.#last.state !== 'secure';
  }

  answer(): TlsaAnswer {
    const left = (this.#held?.until ?? 0) - performance.now();
    if (this.#held !== undefined && left > 0) {
      const validMs = Math.min(Math.ceil(left), validMsMax);
      return { state: 'secure', records: [...this.#held.records], validMs };
    }
    return this.#last.state === 'insecure' ? { ...unavailable, state: 'insecure' } : unavailable;
  }

  /** Until the next question. Spread, so that the workers do not all ask at once. */
  delayMs(): number {
    const spread = 0.9 + Math.random() * 0.2;
    if (this.#last.state === 'secure') return Math.min(Math.max(this.#last.ttlMs * spread, refreshMsMin), refreshMsMax);
    const retryMs = Math.min(retryMsMin * 2 ** (this.#failures - 1), retryMsMax) * spread;
    const leftMs = (this.#held?.until ?? 0) - performance.now();
    // When what is held runs out, the engine is told, and forgets the TLS sessions that came of it.
    return leftMs > 0 ? Math.min(retryMs, leftMs + 1) : retryMs;
  }

  /** For people: the same text while nothing has changed. */
  describe(): string {
    const { state } = this.answer();
    const records = this.#held?.records ?? [];
    const counted = state === 'secure' ? `secure, ${describeRecords(records)}` : state;
    switch (this.#last.state) {
      case 'secure':
        return counted;
      case 'indeterminate':
        return `${counted}; the last question found no answer: ${this.#last.why}`;
      default:
        return `${counted}; the last answer was ${this.#last.state}`;
    }
  }
}

export function describeRecords(records: readonly TlsaRecord[]): string {
  if (records.length === 0) return 'no record';
  const words = records.map(
    ({ usage, selector, matchingType, data }) =>
      `${usage} ${selector} ${matchingType} ${data.subarray(0, 4).toString('hex')}...`,
  );
  return words.toSorted((a, b) => a.localeCompare(b)).join(', ');
}

/** The servers that DNS is asked about, with their names there (RFC 6698 3). */
export function tlsaTargets(upstreams: readonly UpstreamSettings[]): TlsaTarget[] {
  return upstreams.flatMap(({ name: upstream, servers, tls }) => {
    if (tls === undefined || tls.verification.dane === 'off') return [];
    return tls.names.map((name, server) => {
      const port = /:(\d+)$/.exec(servers[server] ?? '')?.[1];
      if (port === undefined)
        throw new Error('a server without a port and with DANE passed the checks of the configuration');
      return { upstream, server, name: `_${port}._tcp.${name}` };
    });
  });
}
