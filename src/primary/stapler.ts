/**
 * Owns: the OCSP responses of the certificates that are served: fetching each well before the one before ends, keeping it on
 * disk, taking it away when it has ended; and what is to be known of that.
 * Must not know: how workers get them, how a responder is asked (ocsp/exchange.ts), what makes a response good (ocsp/response.ts).
 * Runs: main thread of the primary. Nothing waits for it: neither a start, nor a reload, nor a handshake.
 *
 * ```text
 *   follow ──> read from the cache ──> wait until due ──> ask ──answer──> serve, keep, wait until due
 *                                           ^              └──failure──> wait, twice as long each time
 *                                           └──────────────────────────────────┘
 *   nextUpdate has come and there is no other: it is taken away
 * ```
 */
import { EventEmitter } from 'node:events';
import { setImmediate as turn } from 'node:timers/promises';
import type { CertificateConfig, Config, OcspConfig } from '../config/config.ts';
import type { Log } from '../log.ts';
import type { Staple } from '../messages.ts';
import { askResponder, fetchOutcomes, isAnswer } from '../ocsp/exchange.ts';
import type { FetchFailure, FetchOutcome } from '../ocsp/exchange.ts';
import { verifyResponse } from '../ocsp/response.ts';
import type { OcspAnswer } from '../ocsp/response.ts';
import { StapleCache } from './staple-cache.ts';
import { StapledCertificates } from './stapled-certificate.ts';
import type { StapledCertificate } from './stapled-certificate.ts';

/** Delay after the first failure; doubled by each one in a row. */
const retryMinMs = 1000;
const retryMaxMs = 10 * 60_000;
/** How often it is looked what is due and what has ended. */
const lookIntervalMs = 500;
/** Questions to one responder at the same time. One that is dead takes up nobody else's time. */
const questionsAtOnceMax = 4;
/**
 * Reading chains and the cache holds up whatever else the primary does for so long at a time: the first time longer, so that a few
 * certificates have their staples before the first worker is forked. Ten thousand take half a minute.
 */
const firstSliceMs = 200;
const sliceMs = 20;

export const stapleStates = ['good', 'revoked', 'missing'] as const;
/** What clients get that ask for it. */
export type StapleState = (typeof stapleStates)[number];

/** What is to be known of one certificate. */
export interface StapleStatus {
  readonly certificate: string;
  readonly state: StapleState;
  readonly mustStaple: boolean;
  /** Who is asked next. */
  readonly responder: string | undefined;
  /** Of the response that is served. */
  readonly thisUpdate: Date | undefined;
  readonly nextUpdate: Date | undefined;
  /** When the next one is asked for. */
  readonly nextFetch: Date | undefined;
  /** Why there is none, or why the last fetch has failed. */
  readonly problem: string | undefined;
  readonly fetches: Readonly<Record<FetchOutcome, number>>;
}

interface Entry {
  readonly certificate: StapledCertificate;
  /** A name in the configuration, for the log. */
  name: string;
  served: OcspAnswer | undefined;
  /** In Unix milliseconds. */
  dueAt: number;
  isAsking: boolean;
  failuresInRow: number;
  problem: string | undefined;
  readonly fetches: Record<FetchOutcome, number>;
  readonly ending: AbortController;
}

interface StaplerEvents {
  /** For the workers: what certificates are served with from now on. */
  changed: [readonly Staple[]];
}

export class Stapler extends EventEmitter<StaplerEvents> {
  readonly #log: Log;
  #config: OcspConfig;
  readonly #chains = new StapledCertificates();
  /** By digest. */
  readonly #entries = new Map<string, Entry>();
  /** Digests by name in the configuration. */
  #names = new Map<string, string>();
  /** How many are asking, and who waits to, by responder. */
  readonly #responders = new Map<string, { asking: number; readonly waiting: Entry[] }>();
  #following = 0;
  #cacheFault: string | undefined;
  readonly #timer = setInterval(() => this.#look(), lookIntervalMs).unref();

  constructor({ ocsp }: Config, log: Log) {
    super();
    this.#config = ocsp;
    this.#log = log;
    if (ocsp.cache !== undefined) void new StapleCache(ocsp.cache).prune();
  }

  /**
   * What is served from now on, or perhaps soon: both configurations while a reload is under way. Certificates that are new are
   * read from the cache, at once if there are few, and asked for; what is about others is forgotten.
   */
  async follow(current: Config, coming?: Config): Promise<void> {
    const following = ++this.#following;
    this.#config = (coming ?? current).ocsp;
    const names = new Map<string, string>();
    const wanted = new Set<string>();
    let sliceEndsAt = performance.now() + firstSliceMs;
    for (const config of configsOf(current, coming)) {
      const certificate = this.#chains.read(config);
      if (certificate === undefined) continue;
      const digest = certificate.digest.toString('hex');
      wanted.add(digest);
      names.set(config.name, digest);
      this.#enter(digest, certificate, config.name);
      if (performance.now() < sliceEndsAt) continue;
      await turn();
      if (following !== this.#following) return;
      sliceEndsAt = performance.now() + sliceMs;
    }
    this.#chains.settle();
    this.#names = names;
    for (const [digest, entry] of this.#entries) if (!wanted.has(digest)) this.#forget(digest, entry);
    this.#look();
  }

  /** For a worker that begins. */
  get staples(): readonly Staple[] {
    return [...this.#entries.values()].flatMap(({ certificate, served }) =>
      served === undefined ? [] : [{ leaf: certificate.digest, response: served.response }],
    );
  }

  /** Of each certificate that is to be stapled. */
  get statuses(): readonly StapleStatus[] {
    return [...this.#names.keys()].flatMap((name) => this.status(name) ?? []);
  }

  /** @returns undefined for a certificate that is not to be stapled. */
  status(name: string): StapleStatus | undefined {
    const entry = this.#entries.get(this.#names.get(name) ?? '');
    return entry && statusOf(name, entry);
  }

  stop(): void {
    clearInterval(this.#timer);
    this.#following += 1;
    for (const { ending } of this.#entries.values()) ending.abort();
    this.#entries.clear();
  }

  #enter(digest: string, certificate: StapledCertificate, name: string): void {
    const known = this.#entries.get(digest);
    if (known !== undefined) {
      known.name = name;
      return;
    }
    const entry: Entry = {
      certificate,
      name,
      served: undefined,
      dueAt: certificate.obstacle === undefined ? 0 : Number.POSITIVE_INFINITY,
      isAsking: false,
      failuresInRow: 0,
      problem: certificate.obstacle,
      fetches: Object.fromEntries(fetchOutcomes.map((outcome) => [outcome, 0])) as Record<FetchOutcome, number>,
      ending: new AbortController(),
    };
    this.#entries.set(digest, entry);
    if (certificate.obstacle !== undefined) {
      this.#log.warn({ event: 'ocsp_impossible', certificate: name }, `certificate ${name}: ${certificate.obstacle}`);
      this.#sayWhatIsMissing(entry);
    }
    this.#readCache(entry);
  }

  #readCache(entry: Entry): void {
    const { digest, subject } = entry.certificate;
    if (subject === undefined || this.#config.cache === undefined) return;
    const kept = new StapleCache(this.#config.cache).read(digest);
    const found = kept === undefined ? undefined : verifyResponse(kept, subject, undefined, Date.now());
    if (found !== undefined && isAnswer(found)) this.#serve(entry, found);
  }

  #forget(digest: string, entry: Entry): void {
    entry.ending.abort();
    this.#entries.delete(digest);
    if (entry.served !== undefined) this.emit('changed', [{ leaf: entry.certificate.digest, response: undefined }]);
  }

  #look(): void {
    const now = Date.now();
    for (const entry of this.#entries.values()) {
      // Before it ends, as some clients' clocks see it.
      if (entry.served !== undefined && entry.served.nextUpdate.getTime() <= now + lookIntervalMs) this.#expire(entry);
      if (entry.isAsking || entry.dueAt > now) continue;
      entry.isAsking = true;
      const responder = this.#responder(entry);
      responder.waiting.push(entry);
      this.#askNext(responder);
    }
  }

  #expire(entry: Entry): void {
    const { certificate, name, served } = entry;
    entry.served = undefined;
    this.emit('changed', [{ leaf: certificate.digest, response: undefined }]);
    const details = {
      event: 'ocsp_expired',
      certificate: name,
      nextUpdate: served?.nextUpdate,
      reason: entry.problem,
    } as const;
    this.#log.warn(details, `the OCSP response of certificate ${name} has ended, and there is no other`);
    this.#sayWhatIsMissing(entry);
  }

  #responder(entry: Entry): { asking: number; readonly waiting: Entry[] } {
    const { host } = responderOf(entry) ?? { host: '' };
    const known = this.#responders.get(host) ?? { asking: 0, waiting: [] };
    this.#responders.set(host, known);
    return known;
  }

  #askNext(responder: { asking: number; readonly waiting: Entry[] }): void {
    while (responder.asking < questionsAtOnceMax) {
      const entry = responder.waiting.shift();
      if (entry === undefined) return;
      if (entry.ending.signal.aborted) continue;
      responder.asking += 1;
      void this.#ask(entry).finally(() => {
        responder.asking -= 1;
        this.#askNext(responder);
      });
    }
  }

  async #ask(entry: Entry): Promise<void> {
    const { subject, digest } = entry.certificate;
    const url = responderOf(entry);
    if (subject === undefined || url === undefined) throw new Error('invariant: there is an obstacle');
    const found = await askResponder(url, subject, this.#config, entry.ending.signal);
    entry.isAsking = false;
    if (entry.ending.signal.aborted) return;
    if (!isAnswer(found)) {
      this.#failed(entry, url, found);
      return;
    }
    entry.fetches.ok += 1;
    entry.failuresInRow = 0;
    entry.problem = undefined;
    // What lies between us and the responder may have kept an older one.
    const isOlder = entry.served !== undefined && found.thisUpdate < entry.served.thisUpdate;
    const answer = isOlder ? entry.served : found;
    if (answer === undefined) return;
    this.#serve(entry, answer);
    if (answer === found) await this.#keep(digest, found.response);
  }

  #failed(entry: Entry, { href }: URL, { outcome, reason }: FetchFailure): void {
    const { certificate, name } = entry;
    entry.fetches[outcome] += 1;
    entry.failuresInRow += 1;
    entry.dueAt = Date.now() + retryDelayMs(entry.failuresInRow, Math.random());
    const isNews = entry.problem !== reason;
    entry.problem = reason;
    const details = { event: 'ocsp_fetch_failed', certificate: name, responder: href, outcome, reason } as const;
    const message = `certificate ${name}: no OCSP response from ${href}: ${reason}`;
    // Of thousands of certificates with one dead responder each says so once.
    if (isNews) this.#log.warn(details, message);
    else this.#log.debug(details, message);
    if (entry.served === undefined && certificate.mustStaple) this.#sayWhatIsMissing(entry);
  }

  /** Again and again while it lasts: it is an outage for the clients that look. */
  #sayWhatIsMissing({ certificate, name, problem }: Entry): void {
    if (!certificate.mustStaple) return;
    this.#log.error(
      { event: 'ocsp_must_staple_missing', certificate: name, reason: problem },
      `certificate ${name} is must-staple (RFC 7633) and there is no valid OCSP response: it is served without, and clients that honour must-staple refuse it`,
    );
  }

  #serve(entry: Entry, answer: OcspAnswer): void {
    const { certificate, name, served } = entry;
    entry.dueAt = refreshAt(answer, Date.now(), Math.random());
    if (served?.response.equals(answer.response) === true) return;
    entry.served = answer;
    this.emit('changed', [{ leaf: certificate.digest, response: answer.response }]);
    if (served?.status === answer.status) return;
    const { status, nextUpdate, revokedAt } = answer;
    if (status === 'good') {
      this.#log.info({ event: 'ocsp_stapled', certificate: name, nextUpdate }, `certificate ${name} is stapled`);
      return;
    }
    this.#log.error(
      { event: 'ocsp_revoked', certificate: name, revokedAt, nextUpdate },
      `certificate ${name} is revoked, says its issuer, and clients that ask are told so: replace it, and its key`,
    );
  }

  async #keep(digest: Buffer, response: Buffer): Promise<void> {
    const { cache } = this.#config;
    if (cache === undefined) return;
    try {
      await new StapleCache(cache).write(digest, response);
      this.#cacheFault = undefined;
    } catch (error) {
      const fault = error instanceof Error ? error.message : String(error);
      // Not once for each of thousands of files.
      if (this.#cacheFault === undefined) {
        this.#log.warn(
          { event: 'ocsp_cache_failed', directory: cache, error },
          `OCSP responses cannot be kept: ${fault}`,
        );
      }
      this.#cacheFault = fault;
    }
  }
}

/**
 * After half of the time that it holds, not all at once, and never at once again when it is old already.
 * @param random 0..1
 * @returns Unix milliseconds before nextUpdate
 */
export function refreshAt(
  { thisUpdate, nextUpdate }: Pick<OcspAnswer, 'thisUpdate' | 'nextUpdate'>,
  nowMs: number,
  random: number,
): number {
  const lifeMs = nextUpdate.getTime() - thisUpdate.getTime();
  const leftMs = nextUpdate.getTime() - nowMs;
  return Math.max(thisUpdate.getTime() + lifeMs * (1 / 2 + random / 8), nowMs + leftMs / 8);
}

/** @param random 0..1 */
export function retryDelayMs(failuresInRow: number, random: number): number {
  return Math.min(retryMinMs * 2 ** (failuresInRow - 1), retryMaxMs) * (3 / 4 + random / 2);
}

/** The next one after each failure. */
function responderOf({ certificate: { responders }, failuresInRow }: Entry): URL | undefined {
  return responders[failuresInRow % responders.length];
}

/** Of the coming configuration where a name is in both. */
function configsOf(current: Config, coming: Config | undefined): readonly CertificateConfig[] {
  const all = [...Object.values(current.certificates), ...Object.values(coming?.certificates ?? {})];
  return all.filter(({ ocsp }) => ocsp === 'staple');
}

function statusOf(name: string, entry: Entry): StapleStatus {
  const { certificate, served, dueAt, isAsking, problem, fetches } = entry;
  return {
    certificate: name,
    state: served?.status ?? 'missing',
    mustStaple: certificate.mustStaple,
    responder: responderOf(entry)?.href,
    thisUpdate: served?.thisUpdate,
    nextUpdate: served?.nextUpdate,
    nextFetch: isAsking || !Number.isFinite(dueAt) ? undefined : new Date(dueAt),
    problem: problem ?? (served === undefined ? 'no responder has answered yet' : undefined),
    fetches,
  };
}
