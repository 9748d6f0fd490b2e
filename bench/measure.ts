/**
 * Owns: measuring the subjects of one scenario: started one after the other, then round by round in turn, so that whatever
 * else the machine does in between meets all of them.
 * Must not know: what is measured, what the numbers mean, how they are shown.
 * Runs: in the benchmark's process, which is idle while a round runs.
 */
import { mkdirSync } from 'node:fs';
import { join } from 'node:path';
import { missingNeeds } from './contenders/contender.ts';
import type { Contender } from './contenders/contender.ts';
import { contenders } from './contenders/contenders.ts';
import type { ContenderName } from './contenders/contenders.ts';
import type { Keys } from './keys.ts';
import { runHandshakes, startUpstream } from './load.ts';
import type { Upstream } from './load.ts';
import type { Sample } from './metrics.ts';
import { accepting, freePort, Pinned } from './processes.ts';
import type { ScenarioResult, SubjectResult } from './result.ts';
import type { Scenario, Setting, Subject } from './scenarios.ts';
import { growth } from './workloads/growth.ts';
import { reasons, sum, target } from './workloads/running.ts';
import type { Cores, Pace, Running, Workload } from './workloads/workload.ts';
import { workloads } from './workloads/workloads.ts';

/** What all scenarios share. */
export interface Bed {
  readonly loadProgram: string;
  readonly keys: Keys;
  /** Who may be measured; a scenario's other subjects are left out. */
  readonly contenders: readonly ContenderName[];
}

/** @throws when a subject does not start, dies, or does other work than the scenario says. */
export async function measure(
  scenario: Scenario,
  bed: Bed,
  run: Pace,
  progress: (line: string) => void,
): Promise<ScenarioResult> {
  const pace = paceOf(scenario, run);
  if (scenario.workload === 'growth') return await growth(scenario, bed, pace, progress);
  const workload = workloads[scenario.workload];
  const wanted = scenario.subjects.filter(({ contender }) => bed.contenders.includes(contender));
  const leftOut = wanted.flatMap((subject) => {
    const reason = obstacle(subject, settingOf(scenario, subject));
    return reason === undefined ? [] : [{ subject, title: titleOf(subject), reason }];
  });
  const upstream = await startUpstream(
    bed.loadProgram,
    coresOf(scenario.setting).load,
    workload.upstream,
    workload.upstreamPlan?.(scenario),
  );
  const started: Running[] = [];
  try {
    // One at a time: two programs that log in to SoftHSM at once can miss the token.
    for (const subject of wanted.filter((each) => !leftOut.some(({ subject: out }) => out === each))) {
      progress(`${scenario.name}: starting ${titleOf(subject)}`);
      started.push(await start(subject, started.length, scenario, workload, upstream, bed, pace));
    }
    const rounds = started.map((): Sample[] => []);
    for (let round = 0; round < pace.rounds; round += 1) {
      for (let turn = 0; turn < started.length; turn += 1) {
        // Another one begins each round: whoever follows the heaviest one is not always the same.
        const index = (round + turn) % started.length;
        const running = started[index] as Running;
        const sample = await workload.round(running, pace);
        rounds[index]?.push(sample);
        progress(`${scenario.name}: round ${round + 1}/${pace.rounds} ${running.title} ${brief(workload, sample)}`);
      }
    }
    return {
      name: scenario.name,
      title: scenario.title,
      workload: scenario.workload,
      metrics: [...workload.metrics],
      subjects: started.map((running, index): SubjectResult => ({
        contender: running.contender,
        title: running.title,
        rounds: rounds[index] ?? [],
      })),
      left_out: leftOut.map(({ title, reason }) => ({ title, reason })),
      goals: scenario.goals.map((goal) => ({ ...goal })),
      parameters: { ...scenario.parameters },
    };
  } finally {
    await Promise.all([...started.map(({ pinned }) => pinned.stop()), upstream.pinned.stop()]);
  }
}

/** Why a subject is not measured in a setting. */
function obstacle(subject: Subject, setting: Setting): string | undefined {
  const contender: Contender = contenders[subject.contender];
  const missing = missingNeeds(contender);
  return missing.length > 0 ? `needs ${missing.join(', ')}` : contender.cannot(setting);
}

async function start(
  subject: Subject,
  index: number,
  scenario: Scenario,
  workload: Workload,
  upstream: Upstream,
  bed: Bed,
  pace: Pace,
): Promise<Running> {
  const contender: Contender = contenders[subject.contender];
  const setting = settingOf(scenario, subject);
  const directory = join(bed.keys.token.directory, scenario.name, `${index}-${subject.contender}`);
  mkdirSync(directory, { recursive: true, mode: 0o700 });
  const [port, adminPort] = [await freePort(), await freePort()];
  const cores = coresOf(setting);
  const title = titleOf(subject);
  const command = contender.command({
    setting,
    keys: bed.keys,
    token: bed.keys.access(setting.tokenLatencyMs),
    directory,
    port,
    adminPort,
    upstreams: upstream.addresses,
    upstreamKind: workload.upstream,
  });
  const running: Running = {
    title,
    contender: subject.contender,
    scenario,
    setting,
    pinned: new Pinned(title, cores.subject, command),
    address: `127.0.0.1:${port}`,
    adminAddress: contender.isKeygate === true ? `127.0.0.1:${adminPort}` : undefined,
    cores,
    keys: bed.keys,
    loadProgram: bed.loadProgram,
  };
  try {
    await accepting(running.pinned, port);
    await answering(running);
    await workload.warmUp(running, pace);
  } catch (error) {
    await running.pinned.stop();
    const { message } = error as Error;
    const { obituary } = running.pinned;
    const last = message.includes(obituary) ? '' : `; ${obituary}`;
    throw new Error(`${title} is not fit to be measured: ${message}${last}`, { cause: error });
  }
  return running;
}

/** Some listen long before they have logged in to their token or read their certificates. */
async function answering(running: Running): Promise<void> {
  const result = await runHandshakes(running.loadProgram, running.cores.load, {
    ...target(running),
    exchange: 'none',
    connections: 1,
    count: answersBefore(running.setting),
    deadlineSeconds: startSeconds,
    seconds: startSeconds,
  });
  if (sum(result.failures) > 0) throw new Error(`no handshake: ${reasons(result)}`);
}

/**
 * One after the other, so that every worker has had one: libp11 waits for ever when two processes log in to SoftHSM 2.6.1 in the
 * middle of a burst, and a worker that starts during a round makes its CPU unreadable.
 */
function answersBefore({ workers }: Setting): number {
  return workers === 1 ? 1 : 32;
}

/** With 10,000 certificates on a machine that is busy otherwise. */
const startSeconds = 120;

/** Two cores, so that the load takes nothing from who is measured; with two workers there is no core left for it alone. */
function coresOf({ workers }: Setting): Cores {
  return workers === 1 ? { subject: [0], load: [1] } : { subject: [0, 1], load: [0, 1] };
}

function paceOf({ connections, roundsMax = Infinity }: Scenario, run: Pace): Pace {
  return { ...run, rounds: Math.min(run.rounds, roundsMax), connections: connections ?? run.connections };
}

function settingOf(scenario: Scenario, subject: Subject): Setting {
  return { ...scenario.setting, ...subject.setting };
}

function titleOf(subject: Subject): string {
  return subject.title ?? contenders[subject.contender].title;
}

function brief(workload: Workload, sample: Sample): string {
  const [metric] = workload.metrics;
  const value = metric === undefined ? undefined : sample[metric];
  return value === undefined ? '' : `${metric} ${value.toPrecision(4)}`;
}
