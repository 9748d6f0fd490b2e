/**
 * Owns: snapshots of an engine in which only what a test looks at is not zero.
 * Must not know: what is tested.
 * Runs: in test processes.
 */
import type {
  EngineSnapshot,
  ListenerSnapshot,
  ServerSnapshot,
  TokenSnapshot,
  UpstreamSnapshot,
} from '../../src/engine/native.d.ts';

export function snapshotOf(parts: Partial<EngineSnapshot>): EngineSnapshot {
  return {
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
    ...parts,
  };
}

export function listenerOf(parts: Partial<ListenerSnapshot>): ListenerSnapshot {
  return withZeros({ name: 'https', handshakes: [], clientStatuses: [], ...parts });
}

export function tokenOf(parts: Partial<TokenSnapshot>): TokenSnapshot {
  return withZeros({ name: 'hsm', up: true, mechanisms: [], signWait: { buckets: [], sumUs: 0 }, ...parts });
}

export function upstreamOf(...servers: ServerSnapshot[]): UpstreamSnapshot {
  return { name: 'web', servers, certificatesAccepted: 0, findings: [] };
}

export function serverOf(parts: Partial<ServerSnapshot>): ServerSnapshot {
  const connectLatency = { buckets: [], sumUs: 0 };
  return withZeros({ address: '127.0.0.1:80', up: true, connects: [], connectLatency, ...parts });
}

/** Every number that is not there is 0, also one that the engine learns to count tomorrow. */
function withZeros<T extends object>(parts: Partial<T>): T {
  return new Proxy(parts, {
    get: (target, key) => (key in target ? Reflect.get(target, key) : typeof key === 'string' ? 0 : undefined),
  }) as T;
}
