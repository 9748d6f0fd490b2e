/**
 * Owns: building and running the load generator (bench/load), and the shape of what it prints.
 * Must not know: who answers.
 * Runs: in the benchmark's process; the generator is a process of its own on the load's cores.
 */
import { execFile } from 'node:child_process';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';
import type { Pinned } from './processes.ts';
import { runProgram, Talk } from './talk.ts';

/** What every client command is told. The generator refuses what is out of range; `keygate-load` prints what that is. */
export interface ClientPlan {
  /** `127.0.0.1:PORT`, several separated by commas: they are used in turn. */
  readonly to: string;
  /** The PEM file that the server must show. */
  readonly certificate: string;
  /** Default 1.3. */
  readonly tls?: '1.2' | '1.3';
  /** Another one is a failure; default X25519. */
  readonly group?: 'X25519' | 'X25519MLKEM768' | 'secp256r1' | 'secp384r1';
  /** Names separated by commas, used in turn; `{0..9999}` in a name stands for that many. Default localhost. */
  readonly serverName?: string;
  /** One signature in so many is verified; default 32. */
  readonly verifyEvery?: number;
  /** Without any progress for so long, a connection has failed; default 10. */
  readonly deadlineSeconds?: number;
}

export interface HandshakesPlan extends ClientPlan {
  /** Clients with one connection each at a time; with a rate, the most connections in flight. */
  readonly connections?: number;
  readonly seconds?: number;
  readonly count?: number;
  /** Connections begun per second, whatever the server does. Without it each client begins when its last one has ended. */
  readonly rate?: number;
  readonly resume?: boolean;
  /** What follows the handshake; default line. */
  readonly exchange?: 'none' | 'line' | 'http';
  /** Gives way to every other load on the same core. */
  readonly yielding?: boolean;
}

export interface EchoPlan extends ClientPlan {
  readonly connections?: number;
  readonly seconds?: number;
  readonly count?: number;
  /**
   * Messages per second on all connections together, at fixed spacing whatever the server does. Without it each connection
   * sends when its last message has come back.
   */
  readonly rate?: number;
  /** Of a message. */
  readonly bytes?: number;
}

export interface RelayPlan extends ClientPlan {
  readonly connections?: number;
  readonly seconds?: number;
  /** `up` needs a sink or a source for an upstream, the others a source; default both. */
  readonly direction?: 'up' | 'down' | 'both';
  /** Bytes that each write hands to TLS; a multiple of 8, 64 to 1 MiB. */
  readonly message?: number;
}

export interface IdlePlan extends ClientPlan {
  readonly connections?: number;
  /** Connections begun per second; without it as fast as they go, 256 handshakes at a time. */
  readonly rate?: number;
}

/** By kind (`connect`, `tls`, `not_begun`, ...); empty when there was none. */
export type Failures = Readonly<Record<string, number>>;

/** What every client command prints. */
export interface Outcome {
  readonly seconds: number;
  readonly failures: Failures;
  /** What was wrong with the first failure of kind `tls`. */
  readonly tlsError: string | null;
  /** What the first handshake negotiated. */
  readonly negotiated: Negotiated | null;
  /** Handshakes that negotiated something else than the first one. */
  readonly deviations: number;
}

export interface HandshakesResult extends Outcome {
  /** Connections that went as expected from connect to close. */
  readonly handshakes: number;
  /** Connections that were to begin: those that did, and with a rate those that were due and could not. */
  readonly intended: number;
  /** Session tickets that the server gave. */
  readonly tickets: number;
  /** To the end of the handshake, from connect, and with a rate from when the connection was due. */
  readonly handshakeUs: Latency;
  /** To the close. */
  readonly connectionUs: Latency;
}

/** In rustls' words. */
export interface Negotiated {
  readonly protocol: string;
  readonly cipherSuite: string;
  readonly group: string | null;
  readonly resumed: boolean;
}

/** Failures count messages. */
export interface EchoResult extends Outcome {
  /** Messages that came back as they were. */
  readonly messages: number;
  /** Messages that were due. */
  readonly intended: number;
  /** From when each message was due to its echo. */
  readonly latencyUs: Latency;
}

/** Seconds are from the first byte to the last; failures count connections. */
export interface RelayResult extends Outcome {
  /** That the upstream has received, and found right. */
  readonly upBytes: number;
  /** That came here and were right. */
  readonly downBytes: number;
}

/** How a crowd of idle connections is. Seconds are since the first began. */
export interface IdleState extends Outcome {
  /** Established and not lost. */
  readonly open: number;
  /** Established once, and closed by the server. */
  readonly lost: number;
}

export interface IdleCheck {
  readonly asked: number;
  readonly answered: number;
}

/** Microseconds, within 0.1 %. The percentiles are null when there was no sample. */
export type Latency = Readonly<Record<'p50' | 'p90' | 'p99' | 'p999' | 'max', number | null>> & {
  /** Upper bound and count of each bucket that is not empty, two buckets per factor of two. */
  readonly histogram: readonly (readonly [number, number])[];
};

const crate = fileURLToPath(new URL('load/', import.meta.url));
const buildOutputBytesMax = 10_000_000;

/**
 * @returns the path of the program.
 * @throws what cargo said.
 */
export async function buildLoad(): Promise<string> {
  // In the directory of the crate, where .cargo/config.toml says that it shares what the engine has compiled.
  const { stdout } = await promisify(execFile)(
    'cargo',
    ['build', '--release', '--locked', '--quiet', '--message-format', 'json'],
    { cwd: crate, maxBuffer: buildOutputBytesMax },
  );
  const messages = stdout.split('\n').filter((line) => line.startsWith('{'));
  const programs = messages.map((line) => (JSON.parse(line) as { executable?: string | null }).executable);
  const program = programs.findLast((path) => typeof path === 'string');
  if (program === undefined) throw new Error(`cargo built no program in ${crate}`);
  return program;
}

/** What the upstream does with a connection. */
export type Serve = 'line' | 'http' | 'echo' | 'sink' | 'source';

export interface Upstream {
  readonly pinned: Pinned;
  /** `IP:PORT` of each listening socket. */
  readonly addresses: readonly string[];
}

export interface UpstreamPlan {
  /** Addresses separated by commas; default 127.0.0.1:0. */
  readonly listen?: string;
  /** Bytes of each write of a source. */
  readonly message?: number;
}

/** The upstream, and where it listens. It ends with this process. */
export async function startUpstream(
  program: string,
  cores: readonly number[],
  serve: Serve = 'line',
  plan: UpstreamPlan = {},
): Promise<Upstream> {
  const { listen, message } = plan;
  const talk = new Talk({ file: program, args: ['upstream'] }, cores, { serve, listen, message });
  const { addresses } = await talk.event<{ addresses: readonly string[] }>('listening');
  return { pinned: talk.pinned, addresses };
}

/**
 * @param started called when every client is warm and the clock starts.
 * @throws when the generator gave up.
 */
export function runHandshakes(
  program: string,
  cores: readonly number[],
  plan: HandshakesPlan,
  started: () => void = () => {},
): Promise<HandshakesResult> {
  const { yielding = false, ...flags } = plan;
  return runProgram({ file: program, args: ['handshakes'], yielding }, cores, flags, started);
}

/** As runHandshakes, for messages on connections that are established before the clock starts. The upstream is an echo. */
export function runEcho(
  program: string,
  cores: readonly number[],
  plan: EchoPlan,
  started: () => void = () => {},
): Promise<EchoResult> {
  return runProgram({ file: program, args: ['echo'] }, cores, { ...plan }, started);
}

/** As runHandshakes, for bulk on connections that are established before the clock starts. The upstream is a sink or a source. */
export function runRelay(
  program: string,
  cores: readonly number[],
  plan: RelayPlan,
  started: () => void = () => {},
): Promise<RelayResult> {
  return runProgram({ file: program, args: ['relay'] }, cores, { ...plan }, started);
}

/**
 * Connections that say nothing. The upstream is an echo. They end with this process.
 * @param started called before the first begins.
 * @param progress called each second while they are being established.
 * @returns when each is established or has failed.
 */
export async function startIdle(
  program: string,
  cores: readonly number[],
  plan: IdlePlan,
  started: () => void = () => {},
  progress: (state: IdleState) => void = () => {},
): Promise<IdleConnections> {
  const talk = new Talk({ file: program, args: ['idle'] }, cores, { ...plan });
  await talk.event('started');
  started();
  const held = await talk.event<IdleState>('holding', (event) => progress(event as unknown as IdleState));
  return new IdleConnections(talk, held);
}

export class IdleConnections {
  readonly #talk: Talk;
  /** When the last was established. */
  readonly held: IdleState;

  constructor(talk: Talk, held: IdleState) {
    this.#talk = talk;
    this.held = held;
  }

  get pinned(): Pinned {
    return this.#talk.pinned;
  }

  /** Sends a line on at most 1000 of them, evenly spread, and waits for the echoes. One check at a time. */
  async check(): Promise<IdleCheck> {
    this.pinned.child.stdin?.write('check\n');
    return await this.#talk.event<IdleCheck>('checked');
  }

  async end(): Promise<IdleState> {
    this.pinned.child.stdin?.end();
    const state = await this.#talk.event<IdleState>('finished');
    await this.#talk.exit;
    return state;
  }
}
