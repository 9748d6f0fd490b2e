/**
 * Owns: what the rounds say: medians, ratios with their intervals, the table for people.
 * Must not know: how anything was measured.
 * Runs: anywhere.
 */
import type { Measured, Round } from './measure.ts';
import type { Scenario } from './scenarios.ts';
import { pairedRatio, spread } from './statistics.ts';
import type { Spread } from './statistics.ts';

/** The one whose ratio to the others is asked for. */
const ours = 'keygate';

export interface ScenarioReport {
  readonly name: string;
  readonly title: string;
  readonly contenders: readonly ContenderReport[];
  readonly goals: readonly { readonly against: string; readonly cpuRatioMax: number; readonly verdict: Verdict }[];
}

/** A median alone would call a tie a win. */
export type Verdict = 'met in every round' | 'met by the median, not in every round' | 'missed';

export interface ContenderReport {
  readonly name: string;
  readonly title: string;
  /** Microseconds of CPU per handshake, its connection and its close included. */
  readonly cpuUs: Spread;
  readonly perSecond: Spread;
  /** Of its core, while it was measured; well below 1 means that the load or others set the pace, not the contender. */
  readonly busy: Spread;
  readonly strangersShare: Spread;
  readonly handshakeP50Us: Spread;
  readonly handshakeP99Us: Spread;
  /** In all rounds. */
  readonly failures: Readonly<Record<string, number>>;
  /** keygate's CPU per handshake divided by this one's, round by round; undefined for keygate, and without it. */
  readonly cpuRatio: Spread | undefined;
  readonly rounds: readonly Round[];
}

export function summarise(scenario: Scenario, measured: readonly Measured[]): ScenarioReport {
  const our = measured.find(({ contender }) => contender.name === ours);
  const contenders = measured.map(({ contender, rounds }): ContenderReport => {
    const ratio =
      our !== undefined && contender.name !== ours ? pairedRatio(our.rounds.map(cpuUs), rounds.map(cpuUs)) : undefined;
    return {
      name: contender.name,
      title: contender.title,
      cpuUs: spread(rounds.map(cpuUs)),
      perSecond: spread(rounds.map((round) => round.handshakes / round.seconds)),
      busy: spread(rounds.map((round) => round.cpuSeconds / round.seconds)),
      strangersShare: spread(rounds.map((round) => round.strangersShare)),
      handshakeP50Us: spread(rounds.map((round) => round.handshakeUs.p50 ?? Number.NaN)),
      handshakeP99Us: spread(rounds.map((round) => round.handshakeUs.p99 ?? Number.NaN)),
      failures: totals(rounds.map((round) => round.failures)),
      cpuRatio: ratio,
      rounds,
    };
  });
  const goals = scenario.goals.flatMap((goal) => {
    const ratio = contenders.find(({ name }) => name === goal.against)?.cpuRatio;
    return ratio === undefined ? [] : [{ ...goal, verdict: verdict(ratio, goal.cpuRatioMax) }];
  });
  return { name: scenario.name, title: scenario.title, contenders, goals };
}

/** Markdown, aligned for terminals. */
export function table(report: ScenarioReport): string {
  const rows = report.contenders.map((contender) => [
    contender.title,
    contender.cpuRatio === undefined ? '' : interval(contender.cpuRatio, 2),
    interval(contender.cpuUs, 0),
    interval(contender.perSecond, 0),
    `${(contender.busy.median * 100).toFixed(0)} %`,
    `${(contender.strangersShare.median * 100).toFixed(0)} %`,
    (contender.handshakeP50Us.median / 1000).toFixed(1),
    (contender.handshakeP99Us.median / 1000).toFixed(1),
    Object.entries(contender.failures)
      .map(([kind, count]) => `${count} ${kind}`)
      .join(', ') || '0',
  ]);
  const goals = report.goals.map(
    ({ against, cpuRatioMax, verdict: what }) => `Goal: at most ${cpuRatioMax} of the CPU of ${against}: ${what}.`,
  );
  return [`### ${report.title} (${report.name})`, '', ...aligned([columns, ...rows]), '', ...goals].join('\n');
}

const columns = [
  'contender',
  "keygate's CPU ÷ its CPU",
  'CPU µs/handshake',
  'handshakes/s',
  'core used by it',
  'by others',
  'p50 ms',
  'p99 ms',
  'failures',
];

function cpuUs(round: Round): number {
  return (round.cpuSeconds / round.handshakes) * 1e6;
}

function verdict(ratio: Spread, max: number): Verdict {
  if (ratio.median > max) return 'missed';
  return ratio.max <= max ? 'met in every round' : 'met by the median, not in every round';
}

function totals(failures: readonly Readonly<Record<string, number>>[]): Record<string, number> {
  const sum: Record<string, number> = {};
  for (const [kind, count] of failures.flatMap((each) => Object.entries(each))) sum[kind] = (sum[kind] ?? 0) + count;
  return sum;
}

function interval({ median, min, max }: Spread, digits: number): string {
  return `${median.toFixed(digits)} (${min.toFixed(digits)} to ${max.toFixed(digits)})`;
}

function aligned(rows: readonly (readonly string[])[]): string[] {
  const widths = columns.map((_, column) => Math.max(...rows.map((row) => row[column]?.length ?? 0)));
  const line = (row: readonly string[]) =>
    `| ${row.map((cell, column) => (column === 0 ? cell.padEnd(widths[column] ?? 0) : cell.padStart(widths[column] ?? 0))).join(' | ')} |`;
  const rule = `|${widths.map((width, column) => (column === 0 ? '-'.repeat(width + 2) : `${'-'.repeat(width + 1)}:`)).join('|')}|`;
  const [head, ...body] = rows;
  return [line(head ?? []), rule, ...body.map(line)];
}
