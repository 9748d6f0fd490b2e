/**
 * Owns: which plots a result has, and what each of them shows.
 * Must not know: how anything is drawn or was measured.
 * Runs: anywhere.
 */
import { dotChart, lineChart } from './charts.ts';
import type { Dot, DotRow, LinePoint, Scale, Tone } from './charts.ts';
import { metrics, numberText } from './metrics.ts';
import type { MetricName } from './metrics.ts';
import type { Result, ScenarioResult, SubjectResult } from './result.ts';
import { comparedIn, judgedGoals, numberOf, ratioOf, standing } from './summary.ts';
import type { JudgedGoal, Standing, Verdict } from './summary.ts';
import { intervalText, ratioText } from './table.ts';

export interface Plot {
  /** Of the file, without its extension. */
  readonly name: string;
  readonly title: string;
  readonly svg: string;
}

/** Only what has something to show. */
export function plots(result: Result): readonly Plot[] {
  const workloads = Object.entries(Object.groupBy(result.scenarios, ({ workload }) => workload));
  return [
    goalsPlot(judgedGoals(result)),
    ...workloads.flatMap(([workload, scenarios = []]) => [
      ratiosPlot(workload, scenarios),
      ...sweepPlots(workload, scenarios),
    ]),
    ...numbersPlots.map((plot) => numbersPlot(plot, result.scenarios)),
  ].filter((plot) => plot !== undefined);
}

const verdictTones: Readonly<Record<Verdict, Tone>> = {
  met: 'good',
  'met by the median only': 'open',
  missed: 'bad',
  'not measured': 'plain',
};
const standingTones: Readonly<Record<Standing, Tone>> = { better: 'good', worse: 'bad', tie: 'open' };

/** How many times the goal: one axis for ratios and numbers, for what should be low and what should be high. */
function goalsPlot(goals: readonly JudgedGoal[]): Plot | undefined {
  if (goals.length === 0) return undefined;
  const title = 'Goals';
  const rows = goals.map(({ goal, measured, against, verdict }): DotRow => {
    if ('missing' in measured) return { label: goal.title, cells: [`not measured: ${measured.missing}`] };
    const number = against === undefined ? numberText(goal.metric) : ratioText;
    const limit = goal.max ?? goal.min ?? 1;
    const sign = goal.max === undefined ? '≥' : '≤';
    const unit = against === undefined ? ` ${metrics[goal.metric].title}` : '';
    const text = `${intervalText(measured, number)}${unit}, wanted ${sign} ${number(limit)}`;
    const { median, low, high, coverage } = measured;
    const value =
      goal.max === undefined
        ? { median: limit / median, low: limit / high, high: limit / low, coverage }
        : { median: median / limit, low: low / limit, high: high / limit, coverage };
    return {
      label: goal.title,
      cells: [Object.values(value).every(Number.isFinite) ? { value, tone: verdictTones[verdict], text } : text],
    };
  });
  const svg = dotChart({
    title,
    note: 'Left of the line is within the goal. Circle: met; hollow: by the median only; diamond: missed. Bars: confidence intervals.',
    axis: 'measured ÷ goal (where more is better: goal ÷ measured), logarithmic',
    scale: 'log',
    panels: [''],
    rows,
    reference: { value: 1, text: 'goal' },
  });
  return { name: 'goals', title, svg };
}

/** A panel for each who is compared with, a row for each scenario. */
function ratiosPlot(workload: string, scenarios: readonly ScenarioResult[]): Plot | undefined {
  const [metric] = scenarios[0]?.metrics ?? [];
  const [first] = scenarios[0]?.subjects ?? [];
  const others = comparedIn(scenarios);
  if (metric === undefined || first === undefined || others.length === 0) return undefined;
  const rows = scenarios.map((scenario): DotRow => ({
    label: scenario.title,
    cells: others.map(({ title }): Dot | string => {
      const other = scenario.subjects.slice(1).find((subject) => subject.title === title);
      const value = other === undefined ? { missing: '' } : ratioOf(scenario, other, metric);
      if ('missing' in value) return '–';
      return { value, tone: standingTones[standing(metric, value)], text: ratioText(value.median) };
    }),
  }));
  const { better, title: number } = metrics[metric];
  const title = `${number}: ${first.title} ÷ others`;
  const svg = dotChart({
    title,
    note: `${better === 'more' ? 'Right' : 'Left'} of the line ${first.contender} is ahead. Hollow: a tie; diamond: behind. Bars: confidence intervals.`,
    axis: 'ratio of the same rounds, median, logarithmic',
    scale: 'log',
    panels: others.map(({ label }) => label),
    rows,
    reference: { value: 1, text: '' },
  });
  return { name: `ratios-${workload}`, title, svg };
}

/** For every number that differs between the scenarios of a workload, such as the size of a message. */
function sweepPlots(workload: string, scenarios: readonly ScenarioResult[]): Plot[] {
  const [metric] = scenarios[0]?.metrics ?? [];
  const parameters = new Set(scenarios.flatMap(({ parameters: all }) => Object.keys(all ?? {})));
  return [...parameters].flatMap((parameter) => {
    const swept = scenarios
      .flatMap((scenario) => {
        const x = scenario.parameters?.[parameter];
        return typeof x === 'number' && x > 0 ? [{ x, scenario }] : [];
      })
      .toSorted((left, right) => left.x - right.x);
    // Of two values nobody sees a curve.
    if (metric === undefined || new Set(swept.map(({ x }) => x)).size < 3) return [];
    const titles = new Set(swept.flatMap(({ scenario }) => scenario.subjects.map(({ title }) => title)));
    const lines = [...titles].map((label) => ({
      label,
      points: swept.flatMap(({ x, scenario }): LinePoint[] => {
        const subject = scenario.subjects.find((each) => each.title === label);
        const value = subject === undefined ? { missing: '' } : numberOf(subject, metric);
        return 'missing' in value ? [] : [{ x, value }];
      }),
    }));
    const title = `${metrics[metric].title} over ${spoken(parameter)}`;
    const svg = lineChart({
      title,
      note: 'Medians with their confidence intervals. Both axes are logarithmic.',
      xAxis: spoken(parameter),
      yAxis: metrics[metric].title,
      lines: lines.filter(({ points }) => points.length > 0),
    });
    return [{ name: `sweep-${workload}-${spoken(parameter).replaceAll(' ', '-')}`, title, svg }];
  });
}

interface NumbersPlot {
  readonly name: string;
  readonly title: string;
  readonly axis: string;
  readonly scale: Scale;
  /** All of one unit; a scenario with all of them is in the plot. */
  readonly metrics: readonly MetricName[];
}

const numbersPlots: readonly NumbersPlot[] = [
  {
    name: 'relay-cpu',
    title: 'CPU per GiB relayed',
    axis: 'CPU s/GiB, logarithmic',
    scale: 'log',
    metrics: ['relay_cpu_s_per_gib'],
  },
  {
    name: 'storm-latency',
    title: 'Echo of established connections, before and during a handshake storm',
    axis: 'ms, logarithmic',
    scale: 'log',
    metrics: ['quiet_echo_p99_ms', 'echo_p50_ms', 'echo_p99_ms'],
  },
  {
    name: 'idle-memory',
    title: 'Memory per idle TLS connection',
    axis: 'bytes/connection',
    scale: 'linear',
    metrics: ['idle_connection_bytes'],
  },
];

/** Numbers, where a ratio alone would not say whether it matters; with the ratio beside each. */
function numbersPlot(plot: NumbersPlot, all: readonly ScenarioResult[]): Plot | undefined {
  const scenarios = all.filter(({ metrics: names }) => plot.metrics.every((name) => names.includes(name)));
  const rows = scenarios.flatMap((scenario) => [
    { label: scenario.title, cells: [] },
    ...scenario.subjects.flatMap((subject) => subjectRows(plot, scenario, subject)),
  ]);
  if (!rows.some(({ cells }) => cells.some((cell) => typeof cell !== 'string'))) return undefined;
  const limits = scenarios.flatMap(({ goals }) =>
    goals.flatMap(({ metric, against, max, min }) => {
      const value = max ?? min;
      return against === undefined && value !== undefined && plot.metrics.includes(metric)
        ? [{ value, text: 'goal' }]
        : [];
    }),
  );
  const svg = dotChart({
    title: plot.title,
    note: 'Medians with their confidence intervals. Less is better. Ratio: the first of the group ÷ this one.',
    axis: plot.axis,
    scale: plot.scale,
    panels: [''],
    rows,
    reference: limits[0],
  });
  return { name: plot.name, title: plot.title, svg };
}

function subjectRows(plot: NumbersPlot, scenario: ScenarioResult, subject: SubjectResult): DotRow[] {
  return plot.metrics.map((metric): DotRow => {
    const label = plot.metrics.length === 1 ? subject.title : `${subject.title}: ${metrics[metric].title}`;
    const value = numberOf(subject, metric);
    if ('missing' in value) return { label, cells: [value.missing] };
    return {
      label,
      cells: [
        {
          value,
          tone: 'plain',
          text: `${intervalText(value, numberText(metric))}${besides(scenario, subject, metric)}`,
        },
      ],
    };
  });
}

function besides(scenario: ScenarioResult, subject: SubjectResult, metric: MetricName): string {
  if (subject === scenario.subjects[0]) return '';
  const ratio = ratioOf(scenario, subject, metric);
  return 'missing' in ratio ? '' : `, ratio ${ratioText(ratio.median)}`;
}

/** `messageBytes`: message bytes. */
function spoken(parameter: string): string {
  return parameter.replaceAll(/[A-Z]/g, (letter) => ` ${letter.toLowerCase()}`);
}
