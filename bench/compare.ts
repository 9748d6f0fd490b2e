/**
 * Owns: `bench/compare`: what has changed between two results, and whether that is more than noise.
 * Must not know: how anything was measured.
 * Runs: a process of its own. Exit codes as in sysexits.h, and 1 for a regression when that is asked for.
 *
 * Two runs are not interleaved: the machine may have been another one that day. Somebody else who was measured in both of them, in the
 * same version, met both days as well; so what is compared is, where it can be, the ratio to that one in each run.
 */
import { parseArgs } from 'node:util';
import { metrics, numberText } from './metrics.ts';
import type { Metric, MetricName } from './metrics.ts';
import { readResult } from './result.ts';
import type { Result, ScenarioResult, SubjectResult } from './result.ts';
import { convinces, numberOf, ratioBetween, totalOf } from './summary.ts';
import type { Interval, Missing } from './statistics.ts';
import { coloured, intervalText, ratioText, terminalTable } from './table.ts';

export interface Comparison {
  /** Why less may be concluded from it than it seems. */
  readonly warnings: readonly string[];
  readonly changes: readonly Change[];
  /** What only one of the results has. */
  readonly unmatched: readonly string[];
}

/** Better and worse: the intervals do not overlap. */
export type Direction = 'better' | 'worse' | 'unchanged' | 'not comparable';

export interface Change {
  readonly scenario: string;
  readonly subject: string;
  readonly metric: MetricName;
  /** Of who is measured; `ratio` is new ÷ old. */
  readonly numbers: Pair;
  /** Its ratios to somebody who is in both results, if there is one; then `direction` is theirs. */
  readonly reference: (Pair & { readonly contender: string }) | undefined;
  readonly direction: Direction;
}

export interface Pair {
  readonly old: Interval | Missing;
  readonly new: Interval | Missing;
  readonly ratio: Interval | Missing;
}

export function compareResults(before: Result, after: Result): Comparison {
  const scenarios = before.scenarios.flatMap((old) => {
    const match = after.scenarios.find(({ name }) => name === old.name);
    return match === undefined ? [] : [{ old, new: match }];
  });
  return {
    warnings: warningsOf(before, after),
    changes: scenarios.flatMap((pair) => changesOf(pair, sameVersions(before, after))),
    unmatched: [
      ...onlyIn('only in the old result', before.scenarios, after.scenarios),
      ...onlyIn('only in the new result', after.scenarios, before.scenarios),
      ...scenarios.flatMap((pair) => [
        ...onlyIn(`${pair.old.name}: only in the old result`, subjectNames(pair.old), subjectNames(pair.new)),
        ...onlyIn(`${pair.old.name}: only in the new result`, subjectNames(pair.new), subjectNames(pair.old)),
        ...onlyIn(`${pair.old.name}: only in the old result`, metricNames(pair.old), metricNames(pair.new)),
        ...onlyIn(`${pair.old.name}: only in the new result`, metricNames(pair.new), metricNames(pair.old)),
      ]),
    ],
  };
}

/** In colours when standard output is a terminal. */
export function comparisonText({ warnings, changes, unmatched }: Comparison): string {
  const scenarios = Object.entries(Object.groupBy(changes, ({ scenario }) => scenario));
  const count = (direction: Direction) => changes.filter((change) => change.direction === direction).length;
  return [
    ...warnings.map((warning) => `${coloured('yellow', '!')} ${warning}`),
    ...scenarios.flatMap(([scenario, own = []]) => [
      '',
      coloured('bold', scenario),
      ...terminalTable([
        ['', 'old', 'new', 'new ÷ old', 'ratio to', 'old', 'new', 'new ÷ old', ''],
        ...own.map((change) => changeRow(change, new Set(own.map(({ subject }) => subject)).size > 1)),
      ]),
    ]),
    '',
    ...unmatched.map((what) => `not compared: ${what}`),
    `${count('better')} better, ${count('worse')} worse, ${count('unchanged')} unchanged, ${count('not comparable')} not comparable. Better and worse: the intervals do not overlap.`,
    '',
  ].join('\n');
}

interface ScenarioPair {
  readonly old: ScenarioResult;
  readonly new: ScenarioResult;
}

interface SubjectPair {
  readonly old: SubjectResult;
  readonly new: SubjectResult;
}

/** Of the first subject and its variations; the others are there to be compared with. */
function changesOf(scenarios: ScenarioPair, isSame: (contender: string) => boolean): Change[] {
  const subjects = scenarios.old.subjects.flatMap((old) => {
    const match = scenarios.new.subjects.find(
      ({ title, contender }) => title === old.title && contender === old.contender,
    );
    return match === undefined ? [] : [{ old, new: match }];
  });
  const ours = scenarios.old.subjects[0]?.contender;
  const references = subjects.filter(({ old }) => old.contender !== ours && isSame(old.contender));
  const goals = scenarios.old.goals.map(({ against }) => against);
  // Who a goal is against has been chosen with care: as much of the same work as there is.
  const reference = references.find(({ old }) => goals.includes(old.contender)) ?? references[0];
  const names = scenarios.old.metrics.filter(
    (name) => scenarios.new.metrics.includes(name) && metrics[name].better !== 'neither',
  );
  return subjects
    .filter(({ old }) => old.contender === ours)
    .flatMap((subject) => names.map((name) => changeOf(scenarios.old.name, subject, reference, name)));
}

function changeOf(
  scenario: string,
  subject: SubjectPair,
  reference: SubjectPair | undefined,
  metric: MetricName,
): Change {
  const { total }: Metric = metrics[metric];
  const place = { scenario, subject: subject.old.title, metric };
  if (total === true) {
    const [old, new_] = [totalOf(subject.old, metric), totalOf(subject.new, metric)];
    const numbers = { old: exactly(old), new: exactly(new_), ratio: { missing: 'a sum has no interval' } };
    return { ...place, numbers, reference: undefined, direction: totalDirection(old, new_) };
  }
  const numbers = pairOf(numberOf(subject.old, metric), numberOf(subject.new, metric));
  const ratios =
    reference &&
    pairOf(ratioBetween(subject.old, reference.old, metric), ratioBetween(subject.new, reference.new, metric));
  const usable = ratios !== undefined && !('missing' in ratios.ratio);
  return {
    ...place,
    numbers,
    reference: usable ? { ...ratios, contender: reference?.old.contender ?? '' } : undefined,
    direction: directionOf(metric, usable ? ratios : numbers),
  };
}

/** The interval of the ratio is the widest that both intervals allow. */
function pairOf(old: Interval | Missing, new_: Interval | Missing): Pair {
  if ('missing' in old) return { old, new: new_, ratio: { missing: `old: ${old.missing}` } };
  if ('missing' in new_) return { old, new: new_, ratio: { missing: `new: ${new_.missing}` } };
  if (!(old.low > 0)) return { old, new: new_, ratio: { missing: 'no ratio to 0' } };
  const ratio = {
    median: new_.median / old.median,
    low: new_.low / old.high,
    high: new_.high / old.low,
    coverage: Math.min(old.coverage, new_.coverage),
  };
  return { old, new: new_, ratio };
}

function directionOf(metric: MetricName, { old, new: new_ }: Pair): Direction {
  if ('missing' in old || 'missing' in new_) return 'not comparable';
  if (!convinces(old) || !convinces(new_)) return 'unchanged';
  if (new_.low <= old.high && new_.high >= old.low) return 'unchanged';
  return new_.high < old.low === (metrics[metric].better === 'less') ? 'better' : 'worse';
}

/** Of failures: that there are any is news, how many there are is chance. */
function totalDirection(old: number, new_: number): Direction {
  if (old === 0 && new_ > 0) return 'worse';
  return old > 0 && new_ === 0 ? 'better' : 'unchanged';
}

function exactly(value: number): Interval {
  return { median: value, low: value, high: value, coverage: 0 };
}

function warningsOf(before: Result, after: Result): string[] {
  const different = (what: string, old: unknown, new_: unknown) =>
    String(old) === String(new_) ? [] : [`${what}: ${String(old)}, now ${String(new_)}`];
  const contenders = Object.keys(before.versions).filter((name) => after.versions[name] !== undefined);
  const tooFew = [before, after].some(({ pace }) => pace.rounds < 5);
  return [
    ...different('another machine: CPU', before.machine.cpu, after.machine.cpu),
    ...different('another machine: cores', before.machine.cores, after.machine.cores),
    ...different('another machine: bytes of memory', before.machine.memory_bytes, after.machine.memory_bytes),
    ...different('another kernel', before.machine.kernel, after.machine.kernel),
    ...different('another load: clients', before.pace.connections, after.pace.connections),
    ...different('another pace: seconds', before.pace.seconds, after.pace.seconds),
    ...contenders.flatMap((contender) => {
      const [old, new_] = [before.versions[contender] ?? {}, after.versions[contender] ?? {}];
      const parts = [...new Set([...Object.keys(old), ...Object.keys(new_)])];
      return parts.flatMap((part) =>
        different(`another version: ${contender}: ${part}`, old[part] ?? 'none', new_[part] ?? 'none'),
      );
    }),
    ...(tooFew ? ['less than 5 rounds: nothing can be concluded'] : []),
  ];
}

/** Who has changed is no reference. */
function sameVersions(before: Result, after: Result): (contender: string) => boolean {
  const text = (result: Result, contender: string) =>
    JSON.stringify(Object.entries(result.versions[contender] ?? {}).toSorted(([a], [b]) => (a < b ? -1 : 1)));
  return (contender) => text(before, contender) === text(after, contender);
}

function onlyIn(
  where: string,
  these: readonly { readonly name: string }[],
  those: readonly { readonly name: string }[],
): string[] {
  return these
    .filter(({ name }) => !those.some((other) => other.name === name))
    .map(({ name }) => `${name} (${where})`);
}

function subjectNames({ subjects }: ScenarioResult): { readonly name: string }[] {
  return subjects.map(({ title }) => ({ name: title }));
}

function metricNames({ metrics: names }: ScenarioResult): { readonly name: string }[] {
  return names.map((name) => ({ name: metrics[name].title }));
}

function changeRow({ subject, metric, numbers, reference, direction }: Change, severalSubjects: boolean): string[] {
  const number = numberText(metric);
  const signs = { better: '▲', worse: '▼', unchanged: '=', 'not comparable': '–' } as const;
  const colours = { better: 'green', worse: 'red', unchanged: 'dim', 'not comparable': 'dim' } as const;
  return [
    `${severalSubjects ? `${subject}: ` : ''}${metrics[metric].title}`,
    intervalText(numbers.old, number),
    intervalText(numbers.new, number),
    intervalText(numbers.ratio, ratioText),
    reference?.contender ?? '',
    reference === undefined ? '' : intervalText(reference.old, ratioText),
    reference === undefined ? '' : intervalText(reference.new, ratioText),
    reference === undefined ? '' : intervalText(reference.ratio, ratioText),
    coloured(colours[direction], `${signs[direction]} ${direction}`),
  ];
}

const usage = `usage: bench/compare [--json] [--fail-on-regression] OLD.json NEW.json
  --json                 everything as JSON
  --fail-on-regression   exit code 1 when something is worse
`;

function main(args: readonly string[]): number {
  let parsed: ReturnType<typeof parsedArguments>;
  try {
    parsed = parsedArguments(args);
  } catch (error) {
    process.stderr.write(`bench/compare: ${messageOf(error)}\n${usage}`);
    return 64;
  }
  const { values, old, new: new_ } = parsed;
  if (values.help) {
    process.stdout.write(usage);
    return 0;
  }
  let comparison: Comparison;
  try {
    comparison = compareResults(readResult(old), readResult(new_));
  } catch (error) {
    process.stderr.write(`bench/compare: ${messageOf(error)}\n`);
    return 65;
  }
  process.stdout.write(values.json ? `${JSON.stringify(comparison, undefined, 1)}\n` : comparisonText(comparison));
  return values['fail-on-regression'] && comparison.changes.some(({ direction }) => direction === 'worse') ? 1 : 0;
}

function parsedArguments(args: readonly string[]) {
  const { values, positionals } = parseArgs({
    args: [...args],
    allowPositionals: true,
    options: {
      json: { type: 'boolean', default: false },
      'fail-on-regression': { type: 'boolean', default: false },
      help: { type: 'boolean', short: 'h', default: false },
    },
  });
  const [old = '', new_ = ''] = positionals;
  if (!values.help && positionals.length !== 2) throw new Error(`${positionals.length} files, expected two`);
  return { values, old, new: new_ };
}

function messageOf(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}

if (import.meta.main) process.exitCode = main(process.argv.slice(2));
