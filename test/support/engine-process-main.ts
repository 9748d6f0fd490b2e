/**
 * Owns: a process that holds an engine as a worker does, for tests of how engines start and how processes with lanes end.
 * Must not know: what is tested.
 * Runs: as a child process of a test, started by engine-process.ts; obeys one `EngineOrder` after the other.
 */
import { X509Certificate } from 'node:crypto';
import { readFileSync } from 'node:fs';
import { engine as loadEngine } from '../../src/engine/binding.ts';
import type { Engine, EngineSettings } from '../../src/engine/native.d.ts';

export interface EngineParameters {
  readonly module: string;
  readonly label: string;
  readonly pin: string;
  /** PEM file with the one certificate; its private key is in the token. */
  readonly chain: string;
  readonly keyLabel: string;
  readonly lanes: number;
  /** `127.0.0.1:80` */
  readonly upstream: string;
}

export type EngineOrder =
  /** Starts and stops so many times. */
  | { readonly do: 'rounds'; readonly count: number }
  /** Starts and stays; answers with `address`. */
  | { readonly do: 'start' }
  | { readonly do: 'exit' }
  /** Leaves as process.exit would if nobody had stopped the engine. */
  | { readonly do: 'exit unstopped' }
  | { readonly do: 'throw' };

export type EngineAnswer = { readonly address: string } | { readonly rounds: number };

/** As a worker's. */
const stopBudgetMs = 200;
/** Nobody waits for the end of a round but the next round. */
const roundStopBudgetMs = 10_000;

const parameters = JSON.parse(process.argv[2] ?? '{}') as EngineParameters;
const native = loadEngine();
let engine: Engine | undefined;

const stopEngine = (): void => engine?.stop(stopBudgetMs);
process.on('exit', stopEngine);
process.on('SIGTERM', () => process.exit(0));
process.on('disconnect', () => process.exit(1));
process.on('message', (order: EngineOrder) => {
  switch (order.do) {
    case 'rounds':
      for (let round = 0; round < order.count; round++) start([]).stop(roundStopBudgetMs);
      answer({ rounds: order.count });
      return;
    case 'start': {
      const { fd, address } = native.openListener('127.0.0.1:0', 128, false);
      engine = start([fd]);
      answer({ address });
      return;
    }
    case 'exit':
      return process.exit(0);
    case 'exit unstopped':
      process.off('exit', stopEngine);
      return process.exit(0);
    case 'throw':
      throw new Error('this process was told to crash');
  }
});

function start(sockets: number[]): Engine {
  const { raw, publicKey } = new X509Certificate(readFileSync(parameters.chain));
  const settings: EngineSettings = {
    tokens: [
      {
        name: 'hsm',
        module: parameters.module,
        away: false,
        label: parameters.label,
        pin: Buffer.from(parameters.pin),
        lanes: parameters.lanes,
        threadsMax: 2 * parameters.lanes,
        weight: 1,
        queueMax: 1024,
        queueAgeMs: 3000,
        signDeadlineMs: 5000,
        loginLockWaitMs: 60_000,
        isolate: true,
        verifyRsaEvery: 1,
        verifyEcEvery: 64,
      },
    ],
    certificates: [
      {
        name: 'www',
        names: ['localhost'],
        chain: [raw],
        publicKey: publicKey.export({ format: 'der', type: 'spki' }),
        keys: [{ token: 'hsm', label: parameters.keyLabel }],
      },
    ],
    upstreams: [
      {
        name: 'web',
        servers: [parameters.upstream],
        balance: 'round-robin',
        connectDeadlineMs: 3000,
        connectAttemptsMax: 1,
        passiveFailuresMax: 3,
        passiveEjectionMs: 1000,
        proxyClientCertificate: false,
        slowStartMs: 0,
        transparent: false,
      },
    ],
    listeners: [
      {
        name: 'https',
        front: 'tls',
        routes: [],
        certificates: ['www'],
        unknownName: 'default',
        alpn: [],
        policy: {
          versions: [],
          cipherSuites: [],
          groups: [],
          signatureSchemes: [],
          cipherOrder: 'client',
          requireExtendedMasterSecret: false,
          ticketLifetimeMs: 3_600_000,
          fips: false,
        },
        upstream: 'web',
        handshakeDeadlineMs: 10_000,
        idleDeadlineMs: 60_000,
        halfClosedDeadlineMs: 5000,
        lifetimeDeadlineMs: 0,
        transparent: false,
        connectionsMax: 1000,
        handshakesMax: 1000,
        sockets,
      },
    ],
  };
  return new native.Engine(settings, [Buffer.alloc(32, 1)], native.LineLog.open('/dev/null', false), undefined, [], {
    sockets,
  });
}

function answer(message: EngineAnswer): void {
  process.send?.(message);
}
