/**
 * Owns: what the workers have measured, so that a scrape never waits for one of them and nothing counted is ever lost:
 * the last snapshot of each, and the counts of those that are gone.
 * Must not know: processes, metric names.
 * Runs: main thread of the primary.
 */
import { isIP } from 'node:net';
import { formatAddress } from '../config/address.ts';
import type { Config, UpstreamConfig } from '../config/config.ts';
import type { ProcessUse, WorkerSnapshot } from '../messages.ts';
import type { LogCounts } from '../log.ts';
import type {
  EngineSnapshot,
  LatencySnapshot,
  ListenerSnapshot,
  ServerSnapshot,
  TicketSnapshot,
  TokenSnapshot,
} from '../engine/native.d.ts';

/** Answers that come later are not waited for; the last known snapshot serves. */
const observeDeadlineMs = 250;
/** No observation has this number. */
export const unasked = 0;

/** All workers as one, living and dead. */
export interface Observation {
  readonly engine: EngineSnapshot;
  readonly logs: LogCounts;
  /** By slot, of the workers that live. */
  readonly processes: ReadonlyMap<number, ProcessUse>;
  /** By slot, of all that have been in it. */
  readonly cpu: ReadonlyMap<number, CpuUse>;
}

interface CpuUse {
  readonly cpuUs: number;
  readonly ioCpuUs: number;
}

export class SnapshotBook {
  readonly #living = new Map<number, WorkerSnapshot>();
  #retired: Pick<WorkerSnapshot, 'engine' | 'logs'> | undefined;
  /** By slot. */
  readonly #retiredCpu = new Map<number, CpuUse>();
  readonly #answeredAt = new Map<number, number>();
  #awaited = { id: unasked, pages: new Set<number>(), done: () => {} };

  /**
   * Begins observation `id`, and ends the one before. `answered` resolves when each of `pages` has been entered for it, or
   * at its deadline.
   */
  expect(pages: readonly number[]): { readonly id: number; readonly answered: Promise<void> } {
    this.#awaited.done();
    const { promise: answered, resolve } = Promise.withResolvers<void>();
    const timer = setTimeout(resolve, observeDeadlineMs);
    const done = (): void => {
      clearTimeout(timer);
      resolve();
    };
    const id = this.#awaited.id + 1;
    this.#awaited = { id, pages: new Set(pages), done };
    if (pages.length === 0) done();
    return { id, answered };
  }

  /** @param id of the observation that it answers, or `unasked` */
  enter(id: number, page: number, snapshot: WorkerSnapshot): void {
    this.#living.set(page, snapshot);
    this.#answeredAt.set(page, performance.now());
    if (id !== this.#awaited.id) return;
    this.#awaited.pages.delete(page);
    if (this.#awaited.pages.size === 0) this.#awaited.done();
  }

  /** Milliseconds since the worker said what it has measured; undefined when it has not yet. */
  silenceMs(slot: number): number | undefined {
    const answeredAt = this.#answeredAt.get(slot);
    return answeredAt === undefined ? undefined : performance.now() - answeredAt;
  }

  /** Another worker has the slot from now on. @returns where this one is entered until it is gone */
  move(slot: number): number {
    let page = pagesBeyond;
    while (this.#living.has(page)) page += 1;
    const last = this.#living.get(slot);
    if (last !== undefined) this.#living.set(page, last);
    this.#living.delete(slot);
    this.#answeredAt.delete(slot);
    return page;
  }

  /** Why no full handshake can succeed: none of these workers has a token that is up. */
  tokensDown(pages: readonly number[]): string | undefined {
    const tokens = pages.map((page) => this.#living.get(page)?.engine.tokens ?? []);
    if (!tokens.every((own) => own.length > 0 && own.every(({ up }) => !up))) return undefined;
    const whys = (tokens[0] ?? []).map(({ name, downReason = 'down' }) => `token ${name}: ${downReason}`);
    return `no token is up: ${whys.join('; ')}`;
  }

  /** The worker is gone: its counts stay, its gauges go with it. */
  retire(page: number, slot = page): void {
    const last = this.#living.get(page);
    this.#answeredAt.delete(page);
    this.#living.delete(page);
    if (last === undefined) return;
    const { engine, logs } = this.#retired ?? nothing;
    this.#retired = { engine: sum(engine, withoutGauges(last.engine)), logs: sumLogs(logs, last.logs) };
    this.#retiredCpu.set(slot, sumCpu(this.#retiredCpu.get(slot), last));
  }

  /** After a reload: what the dead have counted of things that are no more would be shown for ever. */
  keepOnly({ listeners, upstreams, tokens }: Pick<Config, 'listeners' | 'upstreams' | 'tokens'>): void {
    if (this.#retired === undefined) return;
    const { engine, logs } = this.#retired;
    this.#retired = {
      engine: {
        ...engine,
        listeners: engine.listeners.filter(({ name }) => name in listeners),
        upstreams: engine.upstreams
          .filter(({ name }) => name in upstreams)
          .map((upstream) => ({ ...upstream, servers: serversOf(upstream.servers, upstreams[upstream.name]) })),
        tokens: engine.tokens.filter(({ name }) => name in tokens),
      },
      logs,
    };
  }

  total(): Observation {
    const living = [...this.#living.values()];
    const retired = this.#retired ?? nothing;
    const inSlots = [...this.#living].filter(([page]) => page < pagesBeyond);
    return {
      engine: living.map(({ engine }) => engine).reduce(sum, retired.engine),
      logs: living.map(({ logs }) => logs).reduce(sumLogs, retired.logs),
      processes: new Map(inSlots.map(([slot, { process }]) => [slot, process])),
      cpu: new Map([
        ...this.#retiredCpu,
        ...inSlots.map(([slot, own]) => [slot, sumCpu(this.#retiredCpu.get(slot), own)] as const),
      ]),
    };
  }
}

/** Beyond any slot: where workers are entered that have none any more. */
const pagesBeyond = 100_000;

/** What a name has resolved to is the workers' to know: with one among the servers, all are kept. */
function serversOf(snapshots: ServerSnapshot[], upstream: UpstreamConfig | undefined): ServerSnapshot[] {
  const servers = upstream?.servers ?? [];
  if (servers.some((server) => 'host' in server && isIP(server.host) === 0)) return snapshots;
  const addresses = new Set(servers.map(formatAddress));
  return snapshots.filter(({ address }) => addresses.has(address));
}

const empty: EngineSnapshot = {
  running: true,
  listeners: [],
  upstreams: [],
  closes: [],
  tokens: [],
  ciphers: [],
  groups: [],
  access: { sampledOut: 0, rateLimited: 0 },
  tickets: { wanted: false, deriving: false },
  ioCpuUs: 0,
};

const noLines = { written: 0, dropped: 0 };
const nothing = { engine: empty, logs: { event: noLines, access: noLines, key: noLines } };

function sumCpu(former: CpuUse | undefined, { process, engine }: WorkerSnapshot): CpuUse {
  return { cpuUs: (former?.cpuUs ?? 0) + process.cpuUs, ioCpuUs: (former?.ioCpuUs ?? 0) + engine.ioCpuUs };
}

function sumLogs(a: LogCounts, b: LogCounts): LogCounts {
  return {
    event: addNumbers(a.event, b.event),
    access: addNumbers(a.access, b.access),
    key: addNumbers(a.key, b.key),
  };
}

function sum(a: EngineSnapshot, b: EngineSnapshot): EngineSnapshot {
  return {
    running: a.running && b.running,
    listeners: merge(a.listeners, b.listeners, ({ name }) => name, sumListener),
    upstreams: merge(
      a.upstreams,
      b.upstreams,
      ({ name }) => name,
      (x, y) => ({
        ...addNumbers(x, y),
        servers: merge(x.servers, y.servers, ({ address }) => address, sumServer),
        findings: merge(x.findings, y.findings, ({ reason }) => reason, addNumbers),
      }),
    ),
    closes: merge(
      a.closes,
      b.closes,
      ({ side, phase, reason }) => `${side}/${phase}/${reason}`,
      (x, y) => ({ ...x, count: x.count + y.count }),
    ),
    tokens: merge(a.tokens, b.tokens, ({ name }) => name, sumToken),
    ciphers: merge(
      a.ciphers,
      b.ciphers,
      ({ cipher }) => cipher,
      (x, y) => ({ ...x, count: x.count + y.count }),
    ),
    groups: merge(
      a.groups,
      b.groups,
      ({ group }) => group,
      (x, y) => ({ ...x, count: x.count + y.count }),
    ),
    access: addNumbers(a.access, b.access),
    tickets: oldest(a.tickets, b.tickets),
    ioCpuUs: a.ioCpuUs + b.ioCpuUs,
  };
}

/** A worker that is behind is what counts. */
function oldest(a: TicketSnapshot, b: TicketSnapshot): TicketSnapshot {
  return (b.epoch ?? Number.POSITIVE_INFINITY) < (a.epoch ?? Number.POSITIVE_INFINITY) ? b : a;
}

function sumListener(a: ListenerSnapshot, b: ListenerSnapshot): ListenerSnapshot {
  return {
    ...addNumbers(a, b),
    handshakes: merge(
      a.handshakes,
      b.handshakes,
      ({ protocol, resumed }) => `${protocol} ${resumed}`,
      (x, y) => ({ ...x, latency: sumLatency(x.latency, y.latency) }),
    ),
    clientStatuses: merge(a.clientStatuses, b.clientStatuses, ({ outcome }) => outcome, addNumbers),
  };
}

function sumServer(a: ServerSnapshot, b: ServerSnapshot): ServerSnapshot {
  return {
    ...addNumbers(a, b),
    up: a.up && b.up, // down for one worker is down enough to be looked at
    connects: merge(
      a.connects,
      b.connects,
      ({ outcome }) => outcome,
      (x, y) => ({ outcome: x.outcome, count: x.count + y.count }),
    ),
    connectLatency: sumLatency(a.connectLatency, b.connectLatency),
    fullHandshakeLatency: sumLatency(a.fullHandshakeLatency, b.fullHandshakeLatency),
    resumedHandshakeLatency: sumLatency(a.resumedHandshakeLatency, b.resumedHandshakeLatency),
  };
}

function sumToken(a: TokenSnapshot, b: TokenSnapshot): TokenSnapshot {
  return {
    ...addNumbers(a, b),
    up: a.up && b.up,
    ...((a.downReason ?? b.downReason) === undefined ? {} : { downReason: a.downReason ?? b.downReason }),
    mechanisms: merge(
      a.mechanisms,
      b.mechanisms,
      ({ mechanism }) => mechanism,
      (x, y) => ({ ...addNumbers(x, y), latency: sumLatency(x.latency, y.latency) }),
    ),
    signWait: sumLatency(a.signWait, b.signWait),
  };
}

function sumLatency(a: LatencySnapshot, b: LatencySnapshot): LatencySnapshot {
  return { buckets: a.buckets.map((count, index) => count + (b.buckets[index] ?? 0)), sumUs: a.sumUs + b.sumUs };
}

/** `a` with each of its own numbers increased by that of `b`; everything else is `a`'s. */
function addNumbers<T extends object>(a: T, b: T): T {
  const summed = { ...a } as Record<string, unknown>;
  for (const [key, value] of Object.entries(b)) {
    const own = summed[key];
    if (typeof own === 'number' && typeof value === 'number') summed[key] = own + value;
  }
  return summed as T;
}

/** Items of both lists; those with the same key as one. */
function merge<T>(a: readonly T[], b: readonly T[], keyOf: (item: T) => string, add: (x: T, y: T) => T): T[] {
  const merged = new Map(a.map((item) => [keyOf(item), item]));
  for (const item of b) {
    const own = merged.get(keyOf(item));
    merged.set(keyOf(item), own === undefined ? item : add(own, item));
  }
  return [...merged.values()];
}

/** A dead worker holds no connection, no lane and no queue, and says nothing about what is up. */
function withoutGauges(snapshot: EngineSnapshot): EngineSnapshot {
  return {
    ...snapshot,
    running: true,
    tickets: empty.tickets,
    listeners: snapshot.listeners.map((listener) => ({ ...listener, connectionsOpen: 0, handshakesInFlight: 0 })),
    upstreams: snapshot.upstreams.map((upstream) => ({
      ...upstream,
      servers: upstream.servers.map((server) => ({ ...server, connectionsOpen: 0, up: true })),
    })),
    tokens: snapshot.tokens.map(restingToken),
  };
}

function restingToken(token: TokenSnapshot): TokenSnapshot {
  const resting = {
    ...token,
    up: true,
    queueDepthEc: 0,
    queueDepthRsa: 0,
    lanesIdle: 0,
    lanesBusy: 0,
    lanesLost: 0,
    sessionsOpen: 0,
  };
  delete resting.downReason;
  return resting;
}
