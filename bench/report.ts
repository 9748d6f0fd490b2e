/**
 * Owns: what people read of a result: tables for the terminal, and a directory with the numbers, the tables as Markdown and
 * the plots.
 * Must not know: how anything was measured, what may be concluded from a number.
 * Runs: anywhere.
 */
import { mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { pngOf } from './charts.ts';
import { metrics, numberText } from './metrics.ts';
import type { Metric, MetricName } from './metrics.ts';
import { plots } from './plots.ts';
import type { Plot } from './plots.ts';
import { writeResult } from './result.ts';
import type { GoalResult, Result, ScenarioResult, SubjectResult } from './result.ts';
import {
  comparable,
  comparedIn,
  convincingCoverage,
  judgedGoals,
  numberOf,
  ratioOf,
  standing,
  totalOf,
} from './summary.ts';
import type { JudgedGoal, Standing, Verdict } from './summary.ts';
import type { Interval, Missing } from './statistics.ts';
import { coloured, intervalText, markdownTable, ratioText, terminalTable } from './table.ts';
import type { Rows } from './table.ts';

/** `result.json`, `report.md` and the plots, over what a run in the same directory has written before. */
export function writeReport(directory: string, result: Result): void {
  mkdirSync(directory, { recursive: true });
  const drawn = plots(result);
  for (const { name, svg } of drawn) {
    writeFileSync(join(directory, `${name}.svg`), svg);
    writeFileSync(join(directory, `${name}.png`), pngOf(svg));
  }
  writeFileSync(join(directory, 'report.md'), markdownReport(result, drawn));
  writeResult(join(directory, 'result.json'), result);
}

/** In colours when standard output is a terminal. */
export function terminalReport(result: Result): string {
  const goals = judgedGoals(result);
  return [
    ...(goals.length === 0 ? [] : ['', bold('Goals'), ...terminalTable(goalRows(goals, colouredVerdict))]),
    ...summaries(result, briefRatio).flatMap(({ title, rows }) => ['', bold(title), ...terminalTable(rows)]),
    ...result.scenarios.flatMap((scenario) => [
      '',
      `${bold(scenario.title)} (${scenario.name})`,
      ...terminalTable(briefRows(scenario)),
      ...gapNotes(scenario),
    ]),
    '',
    ...leftOut(result).map(({ title, reason, scenarios }) => `left out: ${title}: ${reason} (${scenarios.join(', ')})`),
    ...result.failed.map(({ name, reason }) => `${coloured('red', '✘')} NOT MEASURED: ${name}: ${oneLine(reason)}`),
    ...noiseNotes(result),
    `Ratios are the first row ÷ this row, median (${coverageText(result)}). ▲ the first is ahead, ▼ behind, = a tie.`,
    '',
  ].join('\n');
}

/** @param drawn lie beside it. */
export function markdownReport(result: Result, drawn: readonly Plot[]): string {
  const { machine, pace } = result;
  const goals = judgedGoals(result);
  return [
    `# Benchmark of keygate ${result.versions['keygate']?.['keygate'] ?? '(not measured)'}`,
    '',
    `${result.started_at.slice(0, 16).replace('T', ' ')} UTC. ${pace.rounds} rounds of ${pace.seconds} s, ${pace.connections} clients. ${machine.cores} × ${[machine.cpu, ...(machine.cpu_flags ?? [])].join(' ')}, ${(machine.memory_bytes / 2 ** 30).toFixed(0)} GiB, Linux ${machine.kernel}, load average ${machine.load_average.map((load) => load.toFixed(2)).join(' ')} at the start.`,
    ...section(
      'Goals',
      goals.length === 0 ? [] : markdownTable(goalRows(goals, (verdict) => `${verdictSigns[verdict]} ${verdict}`)),
    ),
    ...drawn.flatMap(({ name, title }) => ['', `![${title}](${name}.svg)`]),
    ...summaries(result, signed).flatMap(({ title, rows }) => section(title, markdownTable(rows))),
    ...section('Scenarios', result.scenarios.flatMap(scenarioSection)),
    ...section(
      'Not measured',
      result.failed.map(({ name, reason }) => `* \`${name}\`: ${oneLine(reason)}`),
    ),
    ...section(
      'Left out',
      leftOut(result).map(({ title, reason, scenarios }) => `* ${title}: ${oneLine(reason)} (${scenarios.join(', ')})`),
    ),
    ...section(
      'Versions',
      Object.entries(result.versions).map(
        ([contender, versions]) =>
          `* **${contender}**: ${Object.entries(versions)
            .map(([name, version]) => `${name} ${version}`)
            .join(', ')}`,
      ),
    ),
    ...section('How to read it', readingNotes(result)),
    '',
  ].join('\n');
}

const verdictSigns: Readonly<Record<Verdict, string>> = {
  met: '✔',
  'met by the median only': '≈',
  missed: '✘',
  'not measured': '–',
};

const standingSigns: Readonly<Record<Standing, string>> = { better: '▲', worse: '▼', tie: '=' };

function goalRows(goals: readonly JudgedGoal[], verdictText: (verdict: Verdict) => string): Rows {
  return [
    ['goal', 'wanted', 'measured', 'against', 'verdict'],
    ...goals.map(({ goal, measured, against, verdict }) => [
      goal.title,
      wanted(goal),
      'missing' in measured
        ? measured.missing
        : intervalText(measured, against === undefined ? numberText(goal.metric) : ratioText),
      against ?? `${metrics[goal.metric].title}, itself`,
      verdictText(verdict),
    ]),
  ];
}

function wanted({ against, max, min, metric }: GoalResult): string {
  const text = against === undefined ? numberText(metric) : ratioText;
  return [...(min === undefined ? [] : [`≥ ${text(min)}`]), ...(max === undefined ? [] : [`≤ ${text(max)}`])].join(
    ' and ',
  );
}

/** Of a workload with several scenarios: all of them at a glance. */
function summaries(
  { scenarios }: Result,
  text: (metric: MetricName, ratio: Interval | Missing) => string,
): { readonly title: string; readonly rows: Rows }[] {
  const groups = Object.values(Object.groupBy(scenarios, ({ workload }) => workload));
  return groups.flatMap((group = []) => {
    const [metric] = group[0]?.metrics ?? [];
    const others = comparedIn(group);
    if (metric === undefined || group.length < 2 || others.length === 0) return [];
    const rows = group.map((scenario) => [
      scenario.title,
      ...others.map(({ title }) => {
        const other = scenario.subjects.slice(1).find((subject) => subject.title === title);
        return other === undefined ? '–' : text(metric, ratioOf(scenario, other, metric));
      }),
    ]);
    const [first] = new Set(group.map(({ subjects }) => subjects[0]?.title));
    return [
      { title: `${metrics[metric].title}: ${first} ÷ …`, rows: [['', ...others.map(({ label }) => label)], ...rows] },
    ];
  });
}

function scenarioSection(scenario: ScenarioResult): string[] {
  const numbers = markdownTable(numberRows(scenario));
  const heading = ['', `### ${scenario.title} (\`${scenario.name}\`)`, ''];
  if (scenario.subjects.length === 0) return [...heading, 'Nobody was measured.'];
  if (scenario.subjects.length === 1) return [...heading, ...numbers, ...bullets(gapNotes(scenario))];
  return [
    ...heading,
    ...markdownTable(ratioRows(scenario)),
    ...bullets(gapNotes(scenario)),
    '',
    '<details><summary>Numbers</summary>',
    '',
    ...numbers,
    '',
    '</details>',
  ];
}

/** First what compares: every number of which less or more is better. */
function ratioRows(scenario: ScenarioResult): Rows {
  const [first, ...others] = scenario.subjects;
  const names = comparable(scenario);
  return [
    [`${first?.title} ÷ …`, ...names.map((name) => metrics[name].title)],
    ...others.map((other) => [other.title, ...names.map((name) => signed(name, ratioOf(scenario, other, name)))]),
  ];
}

function numberRows(scenario: ScenarioResult): Rows {
  const [compared] = scenario.metrics;
  return [
    [
      '',
      `${compared === undefined ? '' : metrics[compared].title}: first ÷ this`,
      ...scenario.metrics.map((name) => metrics[name].title),
    ],
    ...scenario.subjects.map((subject, index) => [
      subject.title,
      index === 0 || compared === undefined ? '' : intervalText(ratioOf(scenario, subject, compared), ratioText),
      ...scenario.metrics.map((name) => cell(subject, name, (value) => intervalText(value, numberText(name)))),
    ]),
  ];
}

/** For terminals: the interval of the ratio only. */
function briefRows(scenario: ScenarioResult): Rows {
  const [compared] = scenario.metrics;
  return [
    ['', 'ratio', ...scenario.metrics.map((name) => metrics[name].title)].map((title) => coloured('dim', title)),
    ...scenario.subjects.map((subject, index) => {
      const ratio = index === 0 || compared === undefined ? undefined : ratioOf(scenario, subject, compared);
      return [
        subject.title,
        ratio === undefined || compared === undefined ? '' : colouredRatio(compared, ratio),
        ...scenario.metrics.map((name) =>
          cell(subject, name, (value) => ('missing' in value ? '–' : numberText(name)(value.median))),
        ),
      ];
    }),
  ];
}

function cell(subject: SubjectResult, name: MetricName, text: (value: Interval | Missing) => string): string {
  const { total }: Metric = metrics[name];
  return total === true ? numberText(name)(totalOf(subject, name)) : text(numberOf(subject, name));
}

/** Why a cell has no number. */
function gapNotes(scenario: ScenarioResult): string[] {
  const notes = scenario.subjects.flatMap((subject, index) =>
    scenario.metrics.flatMap((name) => {
      const { total }: Metric = metrics[name];
      const number = total === true ? undefined : numberOf(subject, name);
      if (number !== undefined && 'missing' in number)
        return [`${subject.title}: ${metrics[name].title}: ${number.missing}`];
      const ratio = index === 0 || !comparable(scenario).includes(name) ? undefined : ratioOf(scenario, subject, name);
      if (ratio !== undefined && 'missing' in ratio)
        return [`no ratio to ${subject.title}: ${metrics[name].title}: ${ratio.missing}`];
      return [];
    }),
  );
  return [...new Set(notes)];
}

function leftOut({
  scenarios,
}: Result): { readonly title: string; readonly reason: string; readonly scenarios: string[] }[] {
  const all = scenarios.flatMap(({ name, left_out }) => left_out.map((each) => ({ ...each, name })));
  return Object.values(Object.groupBy(all, ({ title, reason }) => `${title}: ${reason}`)).flatMap((group = []) => {
    const [first] = group;
    return first === undefined
      ? []
      : [{ title: first.title, reason: first.reason, scenarios: group.map(({ name }) => name) }];
  });
}

function readingNotes(result: Result): string[] {
  return [
    'Compare ratios, not microseconds: those belong to the machine and to its day.',
    `A ratio is taken round by round, of rounds that followed each other; shown is its median (${coverageText(result)}, by order statistics: no distribution is assumed, no round left out).`,
    '▲: the first is ahead; ▼: behind; =: a tie, the interval holds 1. A goal is *met* when the whole interval is within it, and *met by the median only* when the median alone is.',
    '“core used by it” well below 1 means that its rate is not its limit: the token, the load or others set the pace. CPU per handshake is right all the same.',
    'Failures are the sum of all rounds.',
    ...noiseNotes(result),
  ].map((note) => `* ${note}`);
}

/** Of a machine that was not ours alone: why the intervals are wide. */
function noiseNotes({ scenarios }: Result): string[] {
  const shares = scenarios.flatMap(({ subjects }) =>
    subjects.flatMap((subject) => {
      const share = numberOf(subject, 'strangers_share');
      return 'missing' in share ? [] : [share.median];
    }),
  );
  const highest = Math.max(0, ...shares);
  if (highest < noticedShare) return [];
  return [
    `Others used up to ${(highest * 100).toFixed(0)} % of the cores of who was measured (“by others”): the intervals are as wide as that makes them, rates and latencies are not what this machine can do.`,
  ];
}

const noticedShare = 0.1;

/** What the intervals are worth; some scenarios have fewer rounds. */
function coverageText({ scenarios }: Result): string {
  const intervals = scenarios.flatMap((scenario) =>
    scenario.subjects.flatMap((subject) => scenario.metrics.map((name) => numberOf(subject, name))),
  );
  const coverages = intervals.flatMap((value) => ('missing' in value ? [] : [value.coverage]));
  const [lowest, highest] = [Math.min(...coverages), Math.max(...coverages)];
  if (!(highest > 0)) return `no interval: ${coverages.length === 0 ? 'nothing was measured' : 'one round'}`;
  const percent = (value: number) => (value * 100).toFixed(1);
  const worth = lowest === highest ? percent(lowest) : `${percent(lowest)} to ${percent(highest)}`;
  const weak = lowest < convincingCoverage ? `; below ${percent(convincingCoverage)} % nothing is concluded` : '';
  return `its ${worth} % confidence interval${weak}`;
}

function signed(metric: MetricName, ratio: Interval | Missing): string {
  if ('missing' in ratio) return '–';
  return `${intervalText(ratio, ratioText)} ${standingSigns[standing(metric, ratio)]}`;
}

/** For terminals, where a table of intervals is too wide. */
function briefRatio(metric: MetricName, ratio: Interval | Missing): string {
  if ('missing' in ratio) return '–';
  return colouredRatio(metric, ratio, `${ratioText(ratio.median)} ${standingSigns[standing(metric, ratio)]}`);
}

function colouredRatio(metric: MetricName, ratio: Interval | Missing, text = signed(metric, ratio)): string {
  if ('missing' in ratio) return text;
  const colours = { better: 'green', worse: 'red', tie: 'yellow' } as const;
  return coloured(colours[standing(metric, ratio)], text);
}

function colouredVerdict(verdict: Verdict): string {
  const colours = { met: 'green', 'met by the median only': 'yellow', missed: 'red', 'not measured': 'dim' } as const;
  return coloured(colours[verdict], `${verdictSigns[verdict]} ${verdict}`);
}

function section(title: string, lines: readonly string[]): string[] {
  return lines.length === 0 ? [] : ['', `## ${title}`, '', ...lines];
}

function bullets(lines: readonly string[]): string[] {
  return lines.length === 0 ? [] : ['', ...lines.map((line) => `* ${line}`)];
}

function oneLine(text: string): string {
  return text.replaceAll(/\s+/g, ' ').trim();
}

function bold(text: string): string {
  return coloured('bold', text);
}
