/**
 * Owns: measuring the contenders in one scenario: started one after the other, then round by round in turn, so that whatever
 * else the machine does in between meets all of them.
 * Must not know: what the numbers mean, how they are shown.
 * Runs: in the benchmark's process, which is idle while a round runs.
 */
import { mkdirSync } from 'node:fs';
import { join } from 'node:path';
import type { Contender } from './contenders.ts';
import type { Keys } from './keys.ts';
import { runLoad } from './load.ts';
import type { LoadResult } from './load.ts';
import { accepting, coreBusySeconds, cpuTime, freePort, Pinned } from './processes.ts';
import type { CpuTime } from './processes.ts';
import { negotiation, suiteOf } from './scenarios.ts';
import type { Scenario } from './scenarios.ts';

/** Two, so that the load takes nothing from who is measured. */
export const cores = { contender: 0, load: 1 } as const;

export interface Pace {
  /** 1..100. */
  readonly rounds: number;
  /** Of each contender in each round, 0.1..60. */
  readonly seconds: number;
  /** Clients, each with one connection at a time, 1..4096. */
  readonly connections: number;
}

/** One contender in one round. */
export interface Round {
  readonly handshakes: number;
  readonly seconds: number;
  /** User and system, of all its processes. */
  readonly cpuSeconds: number;
  /** What others used of its core, 0..1: the noise. */
  readonly strangersShare: number;
  readonly failures: Readonly<Record<string, number>>;
  readonly handshakeUs: LoadResult['handshakeUs'];
  readonly connectionUs: LoadResult['connectionUs'];
}

export interface Measured {
  readonly contender: Contender;
  readonly rounds: readonly Round[];
}

/** What all contenders share. */
export interface Bed {
  readonly loadProgram: string;
  readonly keys: Keys;
  readonly upstreamPort: number;
}

/** @throws when a contender does not start, dies, or negotiates something else than the scenario says. */
export async function measure(
  scenario: Scenario,
  contenders: readonly Contender[],
  bed: Bed,
  pace: Pace,
  progress: (line: string) => void,
): Promise<readonly Measured[]> {
  const started: Started[] = [];
  try {
    // One at a time: two programs that log in to SoftHSM at once can miss the token.
    for (const contender of contenders) {
      progress(`${scenario.name}: starting ${contender.name}`);
      started.push(await start(contender, scenario, bed, pace));
    }
    const rounds = started.map((): Round[] => []);
    for (let round = 0; round < pace.rounds; round += 1) {
      for (let turn = 0; turn < started.length; turn += 1) {
        // Another one begins each round: whoever follows the heaviest one is not always the same.
        const index = (round + turn) % started.length;
        const running = started[index] as Started;
        const result = await measureRound(running, pace);
        rounds[index]?.push(result);
        progress(
          `${scenario.name}: round ${round + 1}/${pace.rounds} ${running.contender.name} ${Math.round(result.handshakes / result.seconds)}/s`,
        );
      }
    }
    return started.map(({ contender }, index) => ({ contender, rounds: rounds[index] ?? [] }));
  } finally {
    await Promise.all(started.map(({ pinned }) => pinned.stop()));
  }
}

interface Started {
  readonly contender: Contender;
  readonly scenario: Scenario;
  readonly bed: Bed;
  readonly pinned: Pinned;
  readonly port: number;
}

async function start(contender: Contender, scenario: Scenario, bed: Bed, pace: Pace): Promise<Started> {
  const { keys, upstreamPort } = bed;
  const directory = join(keys.token.directory, scenario.name, contender.name);
  mkdirSync(directory, { recursive: true, mode: 0o700 });
  const port = await freePort();
  const pinned = new Pinned(
    contender.name,
    cores.contender,
    contender.command({ scenario, keys, directory, port, upstreamPort }),
  );
  const started = { contender, scenario, bed, pinned, port };
  try {
    await accepting(pinned, port);
    // Also waits for the login: until then connections wait in the accept queue.
    check(started, await load(started, { ...pace, seconds: Math.min(pace.seconds, warmUpSecondsMax) }));
  } catch (error) {
    await pinned.stop();
    throw new Error(`${contender.name} is not fit to be measured: ${String(error)}; ${pinned.obituary}`, {
      cause: error,
    });
  }
  return started;
}

/** Caches, branch predictors, memory pools and just-in-time compilers have seen it all by then. */
const warmUpSecondsMax = 1;

async function measureRound(running: Started, pace: Pace): Promise<Round> {
  const { pid } = running.pinned;
  const before = { cpu: cpuTime(pid), core: coreBusySeconds(cores.contender) };
  const result = await load(running, pace, () => {
    // After the clients' warm-up, which is part of no number.
    before.cpu = cpuTime(pid);
    before.core = coreBusySeconds(cores.contender);
  });
  const after = { cpu: cpuTime(pid), core: coreBusySeconds(cores.contender) };
  check(running, result);
  const cpuSeconds = cpuUsed(running, before.cpu, after.cpu);
  return {
    handshakes: result.handshakes,
    seconds: result.seconds,
    cpuSeconds,
    strangersShare: Math.max(0, after.core - before.core - cpuSeconds) / result.seconds,
    failures: result.failures,
    handshakeUs: result.handshakeUs,
    connectionUs: result.connectionUs,
  };
}

function load(
  { scenario, port, bed }: Started,
  { seconds, connections }: Pick<Pace, 'seconds' | 'connections'>,
  started?: () => void,
): Promise<LoadResult> {
  const { certificate } = bed.keys.files[scenario.key];
  return runLoad(bed.loadProgram, cores.load, { port, certificate, scenario, connections, seconds }, started);
}

function cpuUsed(running: Started, before: CpuTime, after: CpuTime): number {
  if (before.pids.join() !== after.pids.join()) {
    throw new Error(
      `${running.contender.name}: processes ${before.pids.join()} became ${after.pids.join()} during a round: ${running.pinned.obituary}`,
    );
  }
  return after.seconds - before.seconds;
}

/** A contender that does less work than the others must not win by it. */
function check({ contender, scenario }: Started, result: LoadResult): void {
  const found = {
    protocol: result.negotiated?.protocol,
    suite: result.negotiated?.cipherSuite,
    group: result.negotiated?.group,
    resumed: result.negotiated?.resumed,
    deviations: result.deviations,
    ticketsPerHandshake: Math.round((result.tickets / result.handshakes) * 100) / 100,
  };
  const expected = {
    protocol: `TLSv1_${scenario.tls.slice(2)}`,
    // rustls' own spelling of the suites of TLS 1.3.
    suite: suiteOf(scenario).iana.replace(/^TLS_AES/, 'TLS13_AES'),
    group: negotiation.group,
    resumed: scenario.resume,
    deviations: 0,
    ticketsPerHandshake: scenario.tickets,
  };
  const wrong = Object.entries(expected).filter(([name, value]) => found[name as keyof typeof found] !== value);
  if (wrong.length === 0) return;
  const list = wrong.map(([name, value]) => `${name}: expected ${value}, found ${found[name as keyof typeof found]}`);
  throw new Error(
    `${contender.name} in ${scenario.name}: ${list.join('; ')}; failures ${JSON.stringify(result.failures)}`,
  );
}
