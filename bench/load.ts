/**
 * Owns: building and running the load generator (bench/load), and the shape of what it prints.
 * Must not know: who answers.
 * Runs: in the benchmark's process; the generator is a process of its own on the load's core.
 */
import { execFile } from 'node:child_process';
import { once } from 'node:events';
import { createInterface } from 'node:readline';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';
import { Pinned } from './processes.ts';
import type { Scenario } from './scenarios.ts';

/** What `keygate-load handshakes` prints at its end. */
export interface LoadResult {
  /** Connections that went as expected from connect to close. */
  readonly handshakes: number;
  readonly seconds: number;
  /** By kind; empty when there was none. */
  readonly failures: Readonly<Record<string, number>>;
  /** Handshakes that negotiated something else than the first one. */
  readonly deviations: number;
  /** Session tickets that the server gave. */
  readonly tickets: number;
  readonly negotiated: {
    readonly protocol: string;
    readonly cipherSuite: string;
    readonly group: string | null;
    readonly resumed: boolean;
  } | null;
  /** From connect to the end of the handshake, microseconds. */
  readonly handshakeUs: Percentiles;
  /** From connect to the close, microseconds. */
  readonly connectionUs: Percentiles;
}

/** Null when there was no sample. */
export type Percentiles = Readonly<Record<'p50' | 'p90' | 'p99' | 'p999' | 'max', number | null>>;

export interface LoadPlan {
  readonly port: number;
  readonly certificate: string;
  readonly scenario: Pick<Scenario, 'tls' | 'resume'>;
  readonly connections: number;
  readonly seconds: number;
  readonly count?: number;
}

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

/** The upstream, and where it listens. It ends with this process. */
export async function startUpstream(
  program: string,
  core: number,
): Promise<{ readonly pinned: Pinned; readonly port: number }> {
  const pinned = new Pinned('upstream', core, { file: program, args: ['upstream'] });
  for await (const event of eventsOf(pinned)) {
    if (event.event === 'listening') return { pinned, port: Number(String(event['address']).split(':').at(-1)) };
  }
  throw new Error(`did not start: ${pinned.obituary}`);
}

/**
 * @param started called when every client is warm and the clock starts.
 * @throws when the generator gave up.
 */
export async function runLoad(
  program: string,
  core: number,
  plan: LoadPlan,
  started: () => void = () => {},
): Promise<LoadResult> {
  const args = ['handshakes', '--to', `127.0.0.1:${plan.port}`, '--certificate', plan.certificate];
  args.push('--tls', plan.scenario.tls, '--connections', String(plan.connections), '--seconds', String(plan.seconds));
  if (plan.scenario.resume) args.push('--resume');
  if (plan.count !== undefined) args.push('--count', String(plan.count));
  const pinned = new Pinned('load', core, { file: program, args });
  const exit = once(pinned.child, 'close');
  let result: LoadResult | undefined;
  for await (const event of eventsOf(pinned)) {
    if (event.event === 'started') started();
    if (event.event === 'finished') result = event as unknown as LoadResult;
  }
  await exit;
  if (result === undefined) throw new Error(pinned.obituary);
  return result;
}

/** One JSON object per line of standard output. */
async function* eventsOf(pinned: Pinned): AsyncGenerator<Record<string, unknown>> {
  if (pinned.child.stdout === null) return;
  for await (const line of createInterface({ input: pinned.child.stdout })) {
    yield JSON.parse(line) as Record<string, unknown>;
  }
}
