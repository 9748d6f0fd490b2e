/**
 * Owns: what the page at /status is told: every number that it shows, ready to be shown, in tables of bounded length.
 * Must not know: how it is shown or sent; HTTP.
 * Runs: main thread of the primary, once per second while a page is open.
 */
import type { Config } from '../config/config.ts';
import { engine } from '../engine/binding.ts';
import type {
  CloseReason,
  CloseSnapshot,
  EngineSnapshot,
  ListenerSnapshot,
  ServerSnapshot,
  TokenSnapshot,
} from '../engine/native.d.ts';
import { version } from '../version.ts';
import type { History, Point } from './history.ts';
import type { ReloadReport, Reloads } from './reload.ts';
import type { SlotStatus } from './slot.ts';

/** What a person looks through; `/status.json` has all of them. */
const rowsMax = 100;
const reasonsMax = 3;

/** What is wrong with the rest comes first where rows are left out. */
export interface Table<Row> {
  readonly rows: readonly Row[];
  /** How many were left out. */
  readonly more: number;
}

export interface Overview {
  readonly version: string;
  readonly atMs: number;
  readonly ready: boolean;
  readonly unreadiness: string | undefined;
  readonly logLevel: string;
  readonly configuration: Pick<Reloads['status'], 'file' | 'generation' | 'since'> & {
    readonly lastReload: (Pick<ReloadReport, 'outcome' | 'reasons'> & { readonly at: Date }) | undefined;
  };
  readonly now: Point | undefined;
  readonly tokens: Table<TokenRow>;
  readonly listeners: Table<ListenerRow>;
  readonly servers: Table<ServerRow>;
  readonly certificates: Table<CertificateRow>;
  readonly workers: Table<SlotStatus>;
  readonly closes: Table<CloseRow>;
}

export interface TokenRow extends Pick<
  TokenSnapshot,
  'name' | 'lanesIdle' | 'lanesBusy' | 'lanesLost' | 'reopened' | 'loggedIn' | 'refound' | 'wentDown'
> {
  readonly up: boolean;
  readonly queueDepth: number;
  readonly signatures: number;
  readonly failures: number;
  readonly p50Ms: number | null;
  readonly p99Ms: number | null;
}

export interface ListenerRow {
  readonly name: string;
  readonly addresses: readonly string[];
  readonly open: number;
  readonly openMax: number;
  readonly inFlight: number;
  readonly inFlightMax: number;
  /** Per second, as the two below. */
  readonly accepted: number;
  readonly toUpstreamBytes: number;
  readonly toClientBytes: number;
}

export interface ServerRow {
  readonly upstream: string;
  readonly address: string;
  readonly up: boolean;
  readonly open: number;
  /** Per second. */
  readonly connects: number;
  /** Per second, and ever. */
  readonly failures: number;
  readonly failed: number;
}

export interface CertificateRow {
  readonly name: string;
  readonly notAfterMs: number;
}

export interface CloseRow extends CloseSnapshot {
  readonly meaning: string;
  /** How connections end where nothing is wrong. */
  readonly isNormal: boolean;
  readonly perSecond: number;
}

/** What an overview is made of. */
export interface Subjects {
  readonly atMs: number;
  readonly unreadiness: string | undefined;
  readonly config: Config;
  readonly configuration: Reloads['status'];
  readonly addresses: Readonly<Record<string, readonly string[]>>;
  readonly workers: readonly SlotStatus[];
  readonly certificates: readonly CertificateRow[];
  readonly logLevel: string;
  readonly history: History;
}

export function overviewOf(subjects: Subjects): Overview {
  const { atMs, unreadiness, configuration, workers, logLevel, history } = subjects;
  const snapshot = history.newest;
  return {
    version,
    atMs,
    ready: unreadiness === undefined,
    unreadiness,
    logLevel,
    configuration: configurationOf(configuration),
    now: history.points.at(-1),
    tokens: table(
      byName(snapshot?.tokens),
      ({ up }) => Number(up),
      (token) => tokenRow(token, subjects),
    ),
    listeners: table(
      byName(snapshot?.listeners),
      ({ connectionsOpen }) => -connectionsOpen,
      (listener) => listenerRow(listener, subjects),
    ),
    servers: table(
      byName(snapshot?.upstreams).flatMap(({ name, servers }) =>
        servers.map((server) => ({ upstream: name, ...server })),
      ),
      (server) => (server.up ? -failedOf(server) : -Infinity),
      (server) => serverRow(server, subjects),
    ),
    certificates: table(
      subjects.certificates,
      ({ notAfterMs }) => notAfterMs,
      ({ name, notAfterMs }) => ({ name, notAfterMs }),
    ),
    workers: table(
      workers,
      ({ state }) => Number(state === 'ready'),
      (worker) => worker,
    ),
    closes: table(
      snapshot?.closes.filter(({ count }) => count > 0),
      ({ count }) => -count,
      (close) => closeRow(close, history),
    ),
  };
}

/** A reload may have changed thousands of things, for as many reasons. */
function configurationOf({ file, generation, since, lastReload }: Reloads['status']): Overview['configuration'] {
  if (lastReload === undefined) return { file, generation, since, lastReload };
  const { outcome, at, reasons } = lastReload;
  return { file, generation, since, lastReload: { outcome, at, reasons: reasons.slice(0, reasonsMax) } };
}

function tokenRow(token: TokenSnapshot, { history, workers }: Subjects): TokenRow {
  const { name, lanesIdle, lanesBusy, lanesLost, reopened, loggedIn, refound, wentDown } = token;
  const latencies = (snapshot: EngineSnapshot) =>
    tokenIn(snapshot, name)?.mechanisms.map(({ latency }) => latency) ?? [];
  return {
    name,
    lanesIdle,
    lanesBusy,
    lanesLost,
    reopened,
    loggedIn,
    refound,
    wentDown,
    up: token.up && isServed(workers),
    queueDepth: token.queueDepthEc + token.queueDepthRsa,
    signatures: history.rate((snapshot) => countOf(tokenIn(snapshot, name)?.mechanisms, ({ ok }) => ok)),
    failures: history.rate((snapshot) => failuresOf(tokenIn(snapshot, name))),
    p50Ms: history.quantileMs(0.5, latencies),
    p99Ms: history.quantileMs(0.99, latencies),
  };
}

/** Requests that came back without a signature that was used, or were never taken. */
function failuresOf(token: TokenSnapshot | undefined): number {
  if (token === undefined) return 0;
  const { mechanisms, shedQueueFull, shedQueueAged, shedTokenDown } = token;
  return countOf(mechanisms, ({ failed, wrong }) => failed + wrong) + shedQueueFull + shedQueueAged + shedTokenDown;
}

function listenerRow(
  { name, connectionsOpen, handshakesInFlight }: ListenerSnapshot,
  { config, addresses, history, workers }: Subjects,
): ListenerRow {
  const limits = config.listeners[name]?.limits;
  const rate = (count: (listener: ListenerSnapshot) => number) =>
    history.rate(({ listeners }) => countOf(listeners, (other) => (other.name === name ? count(other) : 0)));
  return {
    name,
    addresses: addresses[name] ?? [],
    open: connectionsOpen,
    openMax: (limits?.connections ?? 0) * workers.length,
    inFlight: handshakesInFlight,
    inFlightMax: (limits?.handshakes ?? 0) * workers.length,
    accepted: rate(({ accepted }) => accepted),
    toUpstreamBytes: rate(({ toUpstreamBytes }) => toUpstreamBytes),
    toClientBytes: rate(({ toClientBytes }) => toClientBytes),
  };
}

function serverRow(
  { upstream, address, up, connectionsOpen, connects }: ServerSnapshot & { readonly upstream: string },
  { history, workers }: Subjects,
): ServerRow {
  const then = ({ upstreams }: EngineSnapshot) =>
    upstreams.find(({ name }) => name === upstream)?.servers.find((server) => server.address === address);
  return {
    upstream,
    address,
    up: up && isServed(workers),
    open: connectionsOpen,
    connects: history.rate((snapshot) => countOf(then(snapshot)?.connects, ({ count }) => count)),
    failures: history.rate((snapshot) => failedOf(then(snapshot))),
    failed: failedOf({ connects }),
  };
}

/** Without those that were given up because the client had gone. */
function failedOf(server: Pick<ServerSnapshot, 'connects'> | undefined): number {
  return countOf(server?.connects, ({ outcome, count }) => (['ok', 'cancelled'].includes(outcome) ? 0 : count));
}

function closeRow(close: CloseSnapshot, history: History): CloseRow {
  const words = wordsOf(close);
  const reason = closeReasons().get(words);
  return {
    ...close,
    meaning: reason?.meaning ?? '',
    isNormal: reason?.ordinary === true,
    perSecond: history.rate(({ closes }) => closes.find((other) => wordsOf(other) === words)?.count),
  };
}

let reasons: ReadonlyMap<string, CloseReason> | undefined;

function closeReasons(): ReadonlyMap<string, CloseReason> {
  reasons ??= new Map(
    engine()
      .closeReasons()
      .map((reason) => [wordsOf(reason), reason]),
  );
  return reasons;
}

function wordsOf({ side, phase, reason }: { side: string; phase: string; reason: string }): string {
  return `${side}/${phase}/${reason}`;
}

/** Dead workers say nothing of what is up, and where no worker says anything nothing is. */
function isServed(workers: readonly SlotStatus[]): boolean {
  return workers.some(({ state }) => state === 'ready');
}

function tokenIn({ tokens }: EngineSnapshot, name: string): TokenSnapshot | undefined {
  return tokens.find((token) => token.name === name);
}

function countOf<T>(items: readonly T[] | undefined, count: (item: T) => number): number {
  return (items ?? []).reduce((sum, item) => sum + count(item), 0);
}

/** An engine has them in no order. */
function byName<Named extends { readonly name: string }>(all: readonly Named[] = []): Named[] {
  return all.toSorted((a, b) => (a.name < b.name ? -1 : 1));
}

/** All in their order, or where they are too many, the first by `rank`. */
function table<Subject, Row>(
  all: readonly Subject[] = [],
  rank: (subject: Subject) => number,
  row: (subject: Subject) => Row,
): Table<Row> {
  const more = Math.max(0, all.length - rowsMax);
  const shown = more === 0 ? all : all.toSorted((a, b) => rank(a) - rank(b)).slice(0, rowsMax);
  return { rows: shown.map(row), more };
}
