/**
 * Owns: what is measured, one row each, and what is expected of it.
 * Must not know: how anything is measured, how a contender is configured.
 * Runs: in the benchmark's process.
 */
import type { ContenderName } from './contenders/contenders.ts';
import type { MetricName } from './metrics.ts';
import type { WorkloadName } from './workloads/workload.ts';

export const keyKinds = ['p256', 'p384', 'rsa2048', 'rsa3072', 'ed25519'] as const;
export type KeyKind = (typeof keyKinds)[number];
export const groups = ['X25519', 'X25519MLKEM768'] as const;
export type Group = (typeof groups)[number];
export type TlsVersion = '1.2' | '1.3';

/** What is the same for all who are measured, unless a subject says otherwise. */
export interface Setting {
  readonly key: KeyKind;
  readonly tls: TlsVersion;
  readonly group: Group;
  /** Handshakes of the load resume, and servers give one session ticket in each; none otherwise. */
  readonly resume: boolean;
  /** What each C_Sign takes longer, milliseconds; 0: SoftHSM as it is. */
  readonly tokenLatencyMs: 0 | 2 | 10;
  readonly workers: 1 | 2;
  /** Configured; the load asks for those of some of them in turn. */
  readonly certificates: number;
  /** The configuration is loaded again and again meanwhile. */
  readonly reload: boolean;
  /** keygate's workers are in their sandbox. */
  readonly sandbox: boolean;
}

/** One who is measured: a contender, in the scenario's setting or a variation of it. */
export interface Subject {
  readonly contender: ContenderName;
  /** Of the subject in tables; the contender's, if it is in the scenario's own setting. */
  readonly title?: string;
  readonly setting?: Partial<Setting>;
}

/** What design.md asks for. A ratio is the first subject's number divided by that of `against`; without it the number itself. */
export interface Goal {
  readonly title: string;
  readonly metric: MetricName;
  readonly against?: ContenderName;
  /** One of them. */
  readonly max?: number;
  readonly min?: number;
}

export interface Scenario {
  readonly name: string;
  readonly title: string;
  readonly workload: WorkloadName | 'growth';
  readonly setting: Setting;
  /** The first is compared with each of the others. */
  readonly subjects: readonly Subject[];
  readonly goals: readonly Goal[];
  /** In the short run too, which takes about five minutes in all. */
  readonly short: boolean;
  /** Clients, where it is not as many as the run says. */
  readonly connections?: number;
  /** Fewer rounds than the run says, where one takes long. */
  readonly roundsMax?: number;
  readonly parameters?: Parameters;
}

/** What only some workloads read. */
export interface Parameters {
  /** Of each write. */
  readonly messageBytes?: number;
  /** At the end of the ramp. */
  readonly idleConnections?: number;
  /** On all connections together, whether answered or not. */
  readonly echoesPerSecond?: number;
  /** Handshakes begun, whether done or not. */
  readonly stormPerSecond?: number;
  readonly certificates?: number;
  readonly listeners?: number;
}

const usual: Setting = {
  key: 'p256',
  tls: '1.3',
  group: 'X25519',
  resume: false,
  tokenLatencyMs: 0,
  workers: 1,
  certificates: 1,
  reload: false,
  sandbox: true,
};

/** Wherever keygate is one of several, the one of another checkout can be another. */
const all = (...names: readonly ContenderName[]): Subject[] =>
  names
    .flatMap((name): ContenderName[] => (name === 'keygate' ? [name, 'keygate-before'] : [name]))
    .map((contender) => ({ contender }));

const handshakeSubjects = all(
  'keygate',
  'nginx-softhsm',
  'nginx-file',
  'haproxy-file',
  'hitch-file',
  'stunnel-softhsm',
  'node-file',
);

/** Goals of single handshakes, by key; the other kinds have none. */
const handshakeGoals: Partial<Record<KeyKind, readonly Goal[]>> = {
  p256: [
    {
      title: 'CPU per full TLS 1.3 handshake, P-256, key in SoftHSM',
      metric: 'handshake_cpu_us',
      against: 'nginx-softhsm',
      max: 0.65,
    },
  ],
  rsa2048: [
    {
      title: 'CPU per full TLS 1.3 handshake, RSA-2048, key in SoftHSM',
      metric: 'handshake_cpu_us',
      against: 'nginx-softhsm',
      max: 0.9,
    },
  ],
};

const fullHandshakes: readonly Scenario[] = keyKinds.flatMap((key) =>
  (['1.3', '1.2'] as const).flatMap((tls) =>
    groups
      // TLS 1.2 has no name for a post-quantum group.
      .filter((group) => tls === '1.3' || group === 'X25519')
      .map((group) => ({
        name: `full-${key}-tls${tls}-${group}`.toLowerCase(),
        title: `full TLS ${tls} handshake, ${key}, ${group}`,
        workload: 'handshakes' as const,
        setting: { ...usual, key, tls, group },
        subjects: handshakeSubjects,
        goals: tls === '1.3' && group === 'X25519' ? (handshakeGoals[key] ?? []) : [],
        short: tls === '1.3' && group === 'X25519' && (key === 'p256' || key === 'rsa2048'),
      })),
  ),
);

const resumedHandshakes: readonly Scenario[] = [
  {
    name: 'resumed-tls1.3',
    title: 'resumed TLS 1.3 handshake',
    workload: 'handshakes',
    setting: { ...usual, resume: true },
    subjects: handshakeSubjects,
    goals: [{ title: 'CPU per resumed handshake', metric: 'handshake_cpu_us', against: 'haproxy-file', max: 0.65 }],
    short: true,
  },
  {
    name: 'resumed-tls1.2',
    title: 'resumed TLS 1.2 handshake',
    workload: 'handshakes',
    setting: { ...usual, tls: '1.2', resume: true },
    subjects: handshakeSubjects,
    goals: [],
    short: false,
  },
];

const slowToken: readonly Scenario[] = ([2, 10] as const).map((tokenLatencyMs) => ({
  name: `slow-token-${tokenLatencyMs}ms`,
  title: `full TLS 1.3 handshake, p256, token that takes ${tokenLatencyMs} ms longer`,
  workload: 'handshake-rate',
  setting: { ...usual, tokenLatencyMs },
  subjects: all('keygate', 'nginx-softhsm', 'stunnel-softhsm'),
  goals:
    tokenLatencyMs === 2
      ? [
          {
            title: 'handshakes/s of one worker with a token that takes 2 ms',
            metric: 'handshakes_per_second',
            against: 'nginx-softhsm',
            min: 5,
          },
        ]
      : [],
  short: tokenLatencyMs === 2,
  connections: 64,
}));

/** Two cores are all there are: from the gentle to what no worker with a blocking token can keep up with. */
const storms: readonly Scenario[] = [200, 1000].map((stormPerSecond) => ({
  name: `storm-${stormPerSecond}`,
  title: `echo of 50 connections in a storm of ${stormPerSecond} handshakes/s, token that takes 2 ms longer`,
  workload: 'storm',
  setting: { ...usual, tokenLatencyMs: 2 },
  subjects: all('keygate', 'nginx-softhsm'),
  goals: [
    {
      title: `p99 of an established connection's echo in a storm of ${stormPerSecond} handshakes/s, against its own before`,
      metric: 'storm_p99_ratio',
      max: 2,
    },
  ],
  short: stormPerSecond === 1000,
  connections: 50,
  parameters: { messageBytes: 64, echoesPerSecond: 2000, stormPerSecond },
}));

const saturation: readonly Scenario[] = (
  [
    ['p256', 0],
    ['rsa2048', 0],
    ['p256', 2],
    ['p256', 10],
  ] as const
).map(([key, tokenLatencyMs]) => ({
  name: `token-saturation-${key}-${tokenLatencyMs}ms`,
  title: `handshakes as a share of what the token signs, ${key}, ${tokenLatencyMs} ms longer`,
  workload: 'saturation',
  setting: { ...usual, key, tokenLatencyMs },
  subjects: all('keygate', 'nginx-softhsm'),
  goals: [],
  short: false,
  connections: 64,
}));

const http: readonly Scenario[] = [
  {
    name: 'http-close',
    title: 'handshake, one HTTP request, close',
    workload: 'http-close',
    setting: usual,
    subjects: all('keygate', 'nginx-softhsm', 'nginx-file', 'haproxy-file'),
    goals: [],
    short: false,
  },
  {
    name: 'http-keep-alive',
    title: 'HTTP requests over connections that stay open (autocannon)',
    workload: 'http-keep-alive',
    setting: usual,
    subjects: all('keygate', 'nginx-file', 'haproxy-file'),
    goals: [],
    short: true,
  },
];

const largest = 1_048_576;

const relays: readonly Scenario[] = (['up', 'down'] as const).flatMap((direction) =>
  [64, 1024, 16_384, 1_048_576].map((messageBytes) => ({
    name: `relay-${direction}-${messageBytes}`,
    title: `${direction === 'up' ? 'to' : 'from'} the upstream in writes of ${messageBytes} bytes`,
    workload: `relay-${direction}` as const,
    setting: usual,
    subjects: all('keygate', 'nginx-file', 'haproxy-file'),
    goals:
      messageBytes === largest
        ? [
            {
              title: `CPU per GiB ${direction === 'up' ? 'to' : 'from'} the upstream`,
              metric: 'relay_cpu_s_per_gib',
              against: 'nginx-file',
              max: 0.9,
            },
          ]
        : [],
    short: messageBytes === largest,
    connections: 8,
    parameters: { messageBytes },
  })),
);

const echoes: readonly Scenario[] = [64, 16_384].map((messageBytes) => ({
  name: `echo-${messageBytes}`,
  title: `messages of ${messageBytes} bytes there and back`,
  workload: 'echo',
  setting: usual,
  subjects: all('keygate', 'nginx-file', 'haproxy-file'),
  goals: [],
  short: false,
  parameters: { messageBytes, echoesPerSecond: 10_000 },
}));

const idles: readonly Scenario[] = (
  [
    [2000, undefined],
    [100_000, 2],
  ] as const
).map(([idleConnections, roundsMax]) => ({
  name: `idle-${idleConnections}`,
  title: `idle connections, ${idleConnections} or as many as open files allow`,
  workload: 'idle',
  setting: usual,
  subjects: all('keygate', 'nginx-file', 'haproxy-file'),
  goals: [
    { title: `bytes per idle connection, up to ${idleConnections}`, metric: 'idle_connection_bytes', max: 12 * 1024 },
    {
      title: `memory per idle connection, up to ${idleConnections}`,
      metric: 'idle_connection_bytes',
      against: 'nginx-file',
      max: 1,
    },
    {
      title: `memory per idle connection, up to ${idleConnections}`,
      metric: 'idle_connection_bytes',
      against: 'haproxy-file',
      max: 1,
    },
  ],
  short: idleConnections === 2000,
  ...(roundsMax === undefined ? {} : { roundsMax }),
  parameters: { idleConnections },
}));

const others: readonly Scenario[] = [
  {
    name: 'overload',
    title: 'twice as many new connections as it can take',
    workload: 'overload',
    setting: usual,
    subjects: all('keygate', 'nginx-softhsm', 'haproxy-file'),
    goals: [],
    short: false,
  },
  {
    name: 'reload',
    title: 'full TLS 1.3 handshake while the configuration is loaded again and again',
    workload: 'reload',
    setting: usual,
    subjects: [
      { contender: 'keygate', title: 'keygate, reloading', setting: { reload: true } },
      { contender: 'keygate', title: 'keygate, left alone' },
    ],
    goals: [{ title: 'connections lost while reloading', metric: 'failures', max: 0 }],
    short: true,
  },
  {
    // Two cores are all there are, and with two workers the load shares them: the CPU per handshake is what can be compared.
    name: 'scaling',
    title: 'full TLS 1.3 handshake, one and two workers (two share the cores with the load)',
    workload: 'handshakes',
    setting: usual,
    subjects: [
      { contender: 'keygate', title: 'keygate, 2 workers', setting: { workers: 2 } },
      { contender: 'keygate', title: 'keygate, 1 worker' },
      { contender: 'nginx-file', title: 'nginx, key in a file, 2 workers', setting: { workers: 2 } },
      { contender: 'haproxy-file', title: 'HAProxy, key in a file, 2 threads', setting: { workers: 2 } },
    ],
    goals: [],
    short: false,
    connections: 32,
  },
  {
    name: 'sandbox',
    title: 'full TLS 1.3 handshake, in the sandbox and without it',
    workload: 'handshakes',
    setting: usual,
    subjects: [
      { contender: 'keygate', title: 'keygate, in the sandbox' },
      { contender: 'keygate', title: 'keygate, no sandbox', setting: { sandbox: false } },
    ],
    goals: [
      {
        title: 'CPU per handshake in the sandbox, against none',
        metric: 'handshake_cpu_us',
        against: 'keygate',
        max: 1.03,
      },
    ],
    short: false,
  },
  {
    name: 'certificates',
    title: 'full TLS 1.3 handshake, 10,000 certificates and one',
    workload: 'handshakes',
    setting: usual,
    subjects: [
      { contender: 'keygate', title: 'keygate, 10,000 certificates', setting: { certificates: 10_000 } },
      { contender: 'keygate', title: 'keygate, 1 certificate' },
    ],
    goals: [
      {
        title: 'CPU per handshake with 10,000 certificates, against one',
        metric: 'handshake_cpu_us',
        against: 'keygate',
        max: 1.05,
      },
    ],
    short: false,
  },
  {
    name: 'growth',
    title: 'what grows with the configuration',
    workload: 'growth',
    setting: usual,
    // It starts its own: one of each size, in every round.
    subjects: all('keygate'),
    goals: [],
    short: false,
    roundsMax: 5,
    parameters: { certificates: 10_000, listeners: 200 },
  },
];

export const scenarios: readonly Scenario[] = [
  ...fullHandshakes,
  ...resumedHandshakes,
  ...slowToken,
  ...storms,
  ...saturation,
  ...http,
  ...relays,
  ...echoes,
  ...idles,
  ...others,
];
