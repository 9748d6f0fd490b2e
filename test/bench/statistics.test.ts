/**
 * Owns: the arithmetic of the benchmark, and what a report makes of rounds.
 * Must not know: real measurements.
 * Runs: in a test process.
 */
import assert from 'node:assert/strict';
import { test } from 'node:test';
import { contenders } from '../../bench/contenders.ts';
import type { Contender } from '../../bench/contenders.ts';
import type { Measured, Round } from '../../bench/measure.ts';
import { summarise, table } from '../../bench/report.ts';
import { scenarios } from '../../bench/scenarios.ts';
import type { Scenario } from '../../bench/scenarios.ts';
import { pairedRatio, spread } from '../../bench/statistics.ts';
import type { Spread } from '../../bench/statistics.ts';

test('a median is the middle value, or the mean of the two in the middle, whatever the order', () => {
  assert.deepEqual(spread([3, 1, 2]), { median: 2, min: 1, max: 3 });
  assert.deepEqual(spread([10, 2, 4, 1]), { median: 3, min: 1, max: 10 });
  assert.deepEqual(spread([7]), { median: 7, min: 7, max: 7 });
});

test('numbers are sorted as numbers', () => {
  assert.deepEqual(spread([9, 10, 100]), { median: 10, min: 9, max: 100 });
});

test('no values and values that are no numbers are refused', () => {
  for (const values of [[], [1, Number.NaN], [Number.POSITIVE_INFINITY]])
    assert.throws(() => spread(values), RangeError);
});

test('a ratio is taken round by round, not of the medians', () => {
  // The medians are 20 and 10; one disturbed round must not make a ratio that no round had.
  assert.deepEqual(pairedRatio([10, 20, 90], [10, 40, 10]), { median: 1, min: 0.5, max: 9 });
});

test('a ratio of different numbers of rounds, or by nothing, is refused', () => {
  assert.throws(() => pairedRatio([1, 2], [1]), RangeError);
  assert.throws(() => pairedRatio([1], [0]), RangeError);
});

test('CPU per handshake, the ratio to keygate and the goals come from the rounds', () => {
  const report = summarise(scenario, [
    measured('keygate', [round(1000, 0.2), round(1000, 0.3)]),
    measured('nginx-softhsm', [round(500, 0.2), round(1000, 0.5)]),
  ]);
  const [keygate, nginx] = report.contenders;
  assert.deepEqual(keygate?.cpuUs, { median: 250, min: 200, max: 300 });
  assert.equal(keygate?.cpuRatio, undefined);
  assert.deepEqual(nginx?.cpuUs, { median: 450, min: 400, max: 500 });
  assert.deepEqual(rounded(nginx?.cpuRatio), { median: 0.55, min: 0.5, max: 0.6 });
  assert.deepEqual(nginx?.perSecond, { median: 375, min: 250, max: 500 });
  assert.deepEqual(nginx?.busy, { median: 0.175, min: 0.1, max: 0.25 });
  assert.deepEqual(report.goals, [{ against: 'nginx-softhsm', cpuRatioMax: 0.65, verdict: 'met in every round' }]);
});

test('a goal that some rounds miss is not called met in every round', () => {
  const verdict = (...cpuSeconds: number[]) => {
    const ours = measured(
      'keygate',
      cpuSeconds.map((seconds) => round(100, seconds)),
    );
    const theirs = measured(
      'nginx-softhsm',
      cpuSeconds.map(() => round(100, 1)),
    );
    return summarise(scenario, [ours, theirs]).goals[0]?.verdict;
  };
  assert.equal(verdict(0.5, 0.6, 0.64), 'met in every round');
  assert.equal(verdict(0.5, 0.6, 0.66), 'met by the median, not in every round');
  assert.equal(verdict(0.5, 0.66, 0.7), 'missed');
});

test('failures of all rounds are shown', () => {
  const failing = { ...round(100, 1), failures: { tls: 2 } };
  const report = summarise(scenario, [
    measured('keygate', [failing, { ...failing, failures: { tls: 1, deadline: 4 } }]),
  ]);
  assert.deepEqual(report.contenders[0]?.failures, { tls: 3, deadline: 4 });
  assert.match(table(report), /3 tls, 4 deadline \|$/m);
});

test('every goal names a contender that exists', () => {
  const names = new Set(contenders.map(({ name }) => name));
  assert.ok(names.has('keygate'));
  for (const { name, goals } of scenarios) {
    for (const { against } of goals) assert.ok(names.has(against), `${name}: ${against}`);
  }
});

const scenario = scenarios.find(({ name }) => name === 'p256-full') as Scenario;

function measured(name: string, rounds: readonly Round[]): Measured {
  return { contender: contenders.find((contender) => contender.name === name) as Contender, rounds };
}

/** Of two seconds. */
function round(handshakes: number, cpuSeconds: number): Round {
  const latency = { p50: 1000, p90: 2000, p99: 3000, p999: 4000, max: 5000 };
  return {
    handshakes,
    cpuSeconds,
    seconds: 2,
    strangersShare: 0,
    failures: {},
    handshakeUs: latency,
    connectionUs: latency,
  };
}

function rounded(values: Spread | undefined): Record<string, number> {
  return Object.fromEntries(
    Object.entries(values ?? {}).map(([name, value]) => [name, Number((value as number).toFixed(6))]),
  );
}
