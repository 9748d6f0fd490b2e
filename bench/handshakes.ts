/**
 * Owns: `npm run bench`: from the command line to the table and the file with the numbers.
 * Must not know: how a contender is configured, how a round is measured.
 * Runs: a process of its own. Everything it starts listens on loopback and ends with it.
 */
import { mkdirSync, writeFileSync } from 'node:fs';
import { availableParallelism } from 'node:os';
import { dirname } from 'node:path';
import { parseArgs } from 'node:util';
import { contenders, missingNeeds } from './contenders.ts';
import type { Contender } from './contenders.ts';
import { makeKeys } from './keys.ts';
import { buildLoad, startUpstream } from './load.ts';
import { cores, measure } from './measure.ts';
import type { Pace } from './measure.ts';
import { stopAll } from './processes.ts';
import { summarise, table } from './report.ts';
import type { ScenarioReport } from './report.ts';
import { scenarios } from './scenarios.ts';
import type { Scenario } from './scenarios.ts';
import { machine } from './versions.ts';

export interface Plan extends Pace {
  readonly scenarios: readonly Scenario[];
  readonly contenders: readonly Contender[];
}

/** What --out gets. */
export interface Report {
  readonly startedAt: string;
  readonly machine: ReturnType<typeof machine>;
  readonly pace: Pace;
  readonly versions: Readonly<Record<string, Readonly<Record<string, string>>>>;
  readonly scenarios: readonly ScenarioReport[];
}

/** @throws when something is missing, does not start, or does other work than the scenario says. */
export async function benchmark(plan: Plan, progress: (line: string) => void): Promise<Report> {
  refuseWhatIsMissing(plan);
  progress('building the load generator');
  const loadProgram = await buildLoad();
  const report = {
    startedAt: new Date().toISOString(),
    machine: machine(),
    pace: { rounds: plan.rounds, seconds: plan.seconds, connections: plan.connections },
    versions: Object.fromEntries(plan.contenders.map(({ name, versions }) => [name, versions()])),
  };
  progress('making keys and a token');
  const keys = makeKeys();
  try {
    const upstream = await startUpstream(loadProgram, cores.load);
    const reports: ScenarioReport[] = [];
    for (const scenario of plan.scenarios) {
      const bed = { loadProgram, keys, upstreamPort: upstream.port };
      const measured = await measure(scenario, plan.contenders, bed, plan, progress);
      reports.push(summarise(scenario, measured));
    }
    return { ...report, scenarios: reports };
  } finally {
    await stopAll();
    keys.dispose();
  }
}

function refuseWhatIsMissing(plan: Plan): void {
  const missing = plan.contenders.flatMap((contender) =>
    missingNeeds(contender).map((need) => `${contender.name} needs ${need}`),
  );
  if (availableParallelism() < 2) missing.push('two cores: one for the contender, one for the load');
  if (missing.length > 0)
    throw new Error(
      `${missing.join('\n')}\nleave contenders out with --contenders ${contenders.map(({ name }) => name).join(',')}`,
    );
}

async function main(): Promise<void> {
  const { values } = parseArgs({
    options: {
      rounds: { type: 'string', default: '5' },
      seconds: { type: 'string', default: '3' },
      connections: { type: 'string', default: '16' },
      scenarios: { type: 'string', default: 'p256-full,rsa2048-full' },
      contenders: { type: 'string', default: contenders.map(({ name }) => name).join(',') },
      out: { type: 'string' },
    },
  });
  const plan: Plan = {
    rounds: number('rounds', values.rounds, 1, 100),
    seconds: number('seconds', values.seconds, 0.1, 60),
    connections: number('connections', values.connections, 1, 4096),
    scenarios: chosen('scenarios', values.scenarios, scenarios),
    contenders: chosen('contenders', values.contenders, contenders),
  };
  for (const signal of ['SIGINT', 'SIGTERM'] as const) {
    // The rounds fail as soon as their processes are gone, and the way out removes the keys.
    process.once(signal, () => void stopAll());
  }
  const progress = (line: string) => process.stderr.write(`${line}\n`);
  const report = await benchmark(plan, progress);
  for (const scenario of report.scenarios) process.stdout.write(`${table(scenario)}\n\n`);
  process.stdout.write(caveats(report));
  if (values.out !== undefined) {
    mkdirSync(dirname(values.out), { recursive: true });
    writeFileSync(values.out, `${JSON.stringify(report, undefined, 1)}\n`);
  }
  const failed = report.scenarios.some((scenario) =>
    scenario.contenders.some(({ failures }) => Object.keys(failures).length > 0),
  );
  if (failed) process.exitCode = 1;
}

function caveats(report: Report): string {
  const { cpu, cores: count, kernel, loadAverage } = report.machine;
  const versions = Object.entries(report.versions).map(
    ([name, all]) =>
      `  ${name}: ${Object.entries(all)
        .map((pair) => pair.join(' '))
        .join(', ')}`,
  );
  return [
    `Medians of ${report.pace.rounds} rounds of ${report.pace.seconds} s with ${report.pace.connections} clients; in brackets the lowest and highest round.`,
    `Absolute numbers are those of this machine (${cpu}, ${count} cores, Linux ${kernel}, load average at the start ${loadAverage.map((load) => load.toFixed(1)).join(' ')}):`,
    'compare ratios. CPU per handshake stands noise best; handshakes/s means something only where "by others" is near 0 %.',
    'Measured:',
    ...versions,
    '',
  ].join('\n');
}

function number(name: string, text: string, min: number, max: number): number {
  const value = Number(text);
  const whole = name === 'seconds' || Number.isInteger(value);
  if (text.trim() === '' || !whole || !(value >= min && value <= max))
    throw new Error(`--${name} ${text}: expected a number from ${min} to ${max}`);
  return value;
}

function chosen<T extends { readonly name: string }>(flag: string, text: string, known: readonly T[]): T[] {
  return text.split(',').map((name) => {
    const found = known.find((each) => each.name === name);
    if (found === undefined)
      throw new Error(`--${flag} ${name}: expected some of ${known.map((each) => each.name).join(',')}`);
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
