/**
 * Owns: what the rounds of a result say: numbers, ratios and goals, each with its interval and what may be concluded from it.
 * Must not know: how anything was measured, how it is shown.
 * Runs: anywhere.
 */
import { metrics } from './metrics.ts';
import type { Metric, MetricName } from './metrics.ts';
import type { GoalResult, Result, ScenarioResult, SubjectResult } from './result.ts';
import { intervalOf, pairedRatio } from './statistics.ts';
import type { Interval, Missing } from './statistics.ts';

/** A median alone would call a tie a win. */
export type Verdict = 'met' | 'met by the median only' | 'missed' | 'not measured';

/** Of the first of two: `tie` when the interval holds 1, or convinces nobody. */
export type Standing = 'better' | 'worse' | 'tie';

export interface JudgedGoal {
  readonly goal: GoalResult;
  readonly scenario: string;
  /** A ratio when the goal is against somebody, otherwise the number itself. */
  readonly measured: Interval | Missing;
  /** For people: who the first is compared with. */
  readonly against: string | undefined;
  readonly verdict: Verdict;
}

/** Of all scenarios, also of those that could not be measured. */
export function judgedGoals(result: Result): readonly JudgedGoal[] {
  return [
    ...result.scenarios.flatMap((scenario) => scenario.goals.map((goal) => judge(goal, scenario))),
    ...result.failed.flatMap(({ name, goals }) =>
      (goals ?? []).map((goal): JudgedGoal => ({
        goal,
        scenario: name,
        measured: { missing: 'the scenario failed' },
        against: goal.against,
        verdict: 'not measured',
      })),
    ),
  ];
}

export function numberOf(subject: SubjectResult, metric: MetricName): Interval | Missing {
  return intervalOf(subject.rounds.map((round) => round[metric]));
}

/** In all rounds: a median would hide the one that failed. */
export function totalOf(subject: SubjectResult, metric: MetricName): number {
  return subject.rounds.reduce((sum, round) => sum + (round[metric] ?? 0), 0);
}

/** The scenario's first subject's number divided by that of another one. */
export function ratioOf(
  { subjects: [first] }: ScenarioResult,
  other: SubjectResult,
  metric: MetricName,
): Interval | Missing {
  return first === undefined ? { missing: 'nobody was measured' } : ratioBetween(first, other, metric);
}

/** Of two who were measured in the same rounds. */
export function ratioBetween(one: SubjectResult, other: SubjectResult, metric: MetricName): Interval | Missing {
  return pairedRatio(
    one.rounds.map((round) => round[metric]),
    other.rounds.map((round) => round[metric]),
  );
}

export function standing(metric: MetricName, ratio: Interval): Standing {
  const { better }: Metric = metrics[metric];
  if (better === 'neither' || !convinces(ratio) || (ratio.low <= 1 && ratio.high >= 1)) return 'tie';
  return ratio.high < 1 === (better === 'less') ? 'better' : 'worse';
}

/** Of a scenario's metrics those of which less or more is better, so that a ratio says who is ahead. */
export function comparable({ metrics: names }: ScenarioResult): readonly MetricName[] {
  return names.filter((name) => {
    const { better, total }: Metric = metrics[name];
    return better !== 'neither' && total !== true;
  });
}

/** Who the first ones of these scenarios are compared with; `label` is as short as it can be and still tell them apart. */
export function comparedIn(
  scenarios: readonly ScenarioResult[],
): readonly { readonly title: string; readonly label: string }[] {
  const titles = new Map(
    scenarios.flatMap(({ subjects }) => subjects.slice(1).map(({ title, contender }) => [title, contender] as const)),
  );
  const contenders = [...titles.values()];
  return [...titles].map(([title, contender]) => {
    const variations = contenders.filter((other) => other === contender).length;
    return { title, label: variations === 1 ? contender : title };
  });
}

/** Five rounds cover the median with 94 %, four with 88 %. */
export const convincingCoverage = 0.9;

export function convinces({ coverage }: Interval): boolean {
  return coverage >= convincingCoverage;
}

function judge(goal: GoalResult, scenario: ScenarioResult): JudgedGoal {
  const [first, ...others] = scenario.subjects;
  const other = others.find(({ contender }) => contender === goal.against);
  const measured =
    goal.against === undefined ? first && numberOf(first, goal.metric) : other && ratioOf(scenario, other, goal.metric);
  return {
    goal,
    scenario: scenario.name,
    measured: measured ?? { missing: `${first === undefined ? 'nobody' : goal.against} was not measured` },
    against: other?.title ?? goal.against,
    verdict: measured === undefined || 'missing' in measured ? 'not measured' : verdict(goal, measured),
  };
}

function verdict({ max = Infinity, min = -Infinity }: GoalResult, measured: Interval): Verdict {
  const { median, low, high } = measured;
  if (median > max || median < min) return 'missed';
  return high <= max && low >= min && convinces(measured) ? 'met' : 'met by the median only';
}
