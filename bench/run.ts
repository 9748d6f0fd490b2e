/**
 * Owns: `npm run bench`: from the command line to the tables and the files with the numbers.
 * Must not know: how a contender is configured, how a round is measured.
 * Runs: a process of its own. Everything it starts listens on loopback and ends with it.
 */
import { availableParallelism } from 'node:os';
import { join } from 'node:path';
import { parseArgs } from 'node:util';
import { fileURLToPath } from 'node:url';
import { contenders } from './contenders/contenders.ts';
import type { ContenderName } from './contenders/contenders.ts';
import { makeKeys } from './keys.ts';
import { buildLoad } from './load.ts';
import { measure } from './measure.ts';
import { stopAll } from './processes.ts';
import { writeReport } from './report.ts';
import { terminalReport } from './report.ts';
import type { Result, ScenarioResult } from './result.ts';
import { scenarios } from './scenarios.ts';
import type { Scenario } from './scenarios.ts';
import { buildTokenRate } from './token-rate.ts';
import { loadVersion, machine } from './versions.ts';
import type { Pace } from './workloads/workload.ts';

const root = fileURLToPath(new URL('..', import.meta.url));

export interface Plan {
  readonly pace: Pace;
  readonly scenarios: readonly Scenario[];
  readonly contenders: readonly ContenderName[];
}

/**
 * @param finished gets what there is after each scenario, so that an interruption loses one scenario and not all.
 * @throws when nothing can be measured. A scenario that could not be measured is in the result, with its error.
 */
export async function benchmark(
  plan: Plan,
  progress: (line: string) => void,
  finished: (result: Result) => void = () => {},
): Promise<Result> {
  if (availableParallelism() < 2) throw new Error('two cores are needed: one for who is measured, one for the load');
  progress('building the load generator');
  const loadProgram = await buildLoad();
  if (plan.scenarios.some(({ workload }) => workload === 'saturation')) {
    progress('building the loop that signs');
    await buildTokenRate();
  }
  progress('making keys and a token');
  const keys = makeKeys(
    plan.scenarios.flatMap(({ setting, subjects }) => [
      setting.key,
      ...subjects.flatMap((subject) => subject.setting?.key ?? []),
    ]),
  );
  const { cpu, cpuFlags, cores, memoryBytes, kernel, loadAverage } = machine();
  const [measured, failed]: [ScenarioResult[], Result['failed']] = [[], []];
  const result: Result = {
    format: 2,
    started_at: new Date().toISOString(),
    machine: {
      cpu,
      cpu_flags: [...cpuFlags],
      cores,
      memory_bytes: memoryBytes,
      kernel,
      load_average: [...loadAverage],
    },
    pace: { ...plan.pace },
    versions: {
      ...Object.fromEntries(plan.contenders.map((name) => [name, { ...contenders[name].versions() }])),
      load: { ...loadVersion(root) },
    },
    scenarios: measured,
    failed,
  };
  try {
    for (const [index, scenario] of plan.scenarios.entries()) {
      const step = (line: string) => progress(`[${index + 1}/${plan.scenarios.length}] ${line}`);
      try {
        const bed = { loadProgram, keys, contenders: plan.contenders };
        measured.push(await measure(scenario, bed, plan.pace, step));
      } catch (error) {
        if (interrupted) throw error;
        const reason = error instanceof Error ? error.message : String(error);
        step(`${scenario.name}: NOT MEASURED: ${reason}`);
        failed.push({ name: scenario.name, reason, goals: scenario.goals.map((goal) => ({ ...goal })) });
      }
      finished(result);
    }
    return result;
  } finally {
    await stopAll();
    keys.dispose();
  }
}

/** Set by a signal: what fails from then on fails because its processes have ended. */
let interrupted = false;

async function main(): Promise<void> {
  const { values } = parseArgs({
    options: {
      full: { type: 'boolean', default: false },
      rounds: { type: 'string' },
      seconds: { type: 'string' },
      connections: { type: 'string', default: '16' },
      scenarios: { type: 'string' },
      contenders: { type: 'string' },
      out: { type: 'string' },
      list: { type: 'boolean', default: false },
    },
  });
  if (values.list) {
    for (const { name, title, short } of scenarios)
      process.stdout.write(`${name.padEnd(40)} ${short ? 'short' : 'full '} ${title}\n`);
    return;
  }
  const all = Object.keys(contenders) as ContenderName[];
  const plan: Plan = {
    pace: {
      rounds: number('rounds', values.rounds ?? (values.full ? '7' : '5'), 1, 100),
      seconds: number('seconds', values.seconds ?? (values.full ? '1.5' : '1'), 0.1, 60),
      connections: number('connections', values.connections, 1, 4096),
    },
    scenarios:
      values.scenarios === undefined
        ? scenarios.filter(({ short }) => values.full || short)
        : chosen(
            'scenarios',
            values.scenarios,
            scenarios.map(({ name }) => name),
          ).map((name) => scenarios.find((scenario) => scenario.name === name) as Scenario),
    contenders:
      values.contenders === undefined
        ? values.full
          ? all.filter((name) => name !== 'keygate-before')
          : mostTelling
        : chosen('contenders', values.contenders, all),
  };
  for (const signal of ['SIGINT', 'SIGTERM'] as const) {
    // The round fails as soon as its processes are gone, and the way out removes the keys.
    process.once(signal, () => {
      interrupted = true;
      void stopAll();
    });
  }
  const startedAt = new Date().toISOString().replaceAll(/[-:]|\..*/g, '');
  const directory = values.out ?? join(root, '.keygate', 'bench', startedAt);
  const progress = (line: string) => process.stderr.write(`${line}\n`);
  const result = await benchmark(plan, progress, (soFar) => writeReport(directory, soFar));
  process.stdout.write(terminalReport(result));
  progress(`numbers, tables and plots: ${directory}`);
  const failures = result.scenarios.flatMap(({ subjects }) =>
    subjects.flatMap(({ rounds }) => rounds.map((round) => round.failures ?? 0)),
  );
  if (result.failed.length > 0 || failures.some((count) => count > 0)) process.exitCode = 1;
}

/** Of the short run: keygate's own kind, and the fastest with a key in a file. */
const mostTelling: readonly ContenderName[] = ['keygate', 'nginx-softhsm', 'nginx-file', 'haproxy-file'];

function number(name: string, text: string, min: number, max: number): number {
  const value = Number(text);
  const whole = name === 'seconds' || Number.isInteger(value);
  if (text.trim() === '' || !whole || !(value >= min && value <= max))
    throw new Error(`--${name} ${text}: expected a number from ${min} to ${max}`);
  return value;
}

function chosen<T extends string>(flag: string, text: string, known: readonly T[]): T[] {
  return text.split(',').map((name) => {
    const found = known.find((each) => each === name);
    if (found === undefined) throw new Error(`--${flag} ${name}: expected some of ${known.join(',')}`);
    return found;
  });
}

if (import.meta.main) {
  try {
    await main();
  } catch (error) {
    process.stderr.write(`${error instanceof Error ? error.message : String(error)}\n`);
    process.exitCode = 1;
  }
}
