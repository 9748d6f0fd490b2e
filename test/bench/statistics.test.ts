/**
 * Owns: that the arithmetic of the benchmark is right: known values, exact binomials, properties.
 * Must not know: real measurements.
 * Runs: in a test process.
 */
import assert from 'node:assert/strict';
import { test } from 'node:test';
import * as fc from 'fast-check';
import { coverageOf, interval, intervalOf, pairedRatio } from '../../bench/statistics.ts';

test('a median is the middle value, or the mean of the two in the middle, whatever the order', () => {
  assert.equal(interval([3, 1, 2]).median, 2);
  assert.equal(interval([10, 2, 4, 1]).median, 3);
  assert.equal(interval([7]).median, 7);
});

test('numbers are sorted as numbers', () => {
  assert.deepEqual(interval([9, 10, 100]), { median: 10, low: 9, high: 100, coverage: 0.75 });
});

test('no values and values that are no numbers are refused', () => {
  for (const values of [[], [1, Number.NaN], [Number.POSITIVE_INFINITY]])
    assert.throws(() => interval(values), RangeError);
});

test('up to eight rounds the interval is all of them, with the coverage that this has', () => {
  for (let count = 1; count <= 8; count += 1) {
    const values = Array.from({ length: count }, (_, index) => index + 1);
    const { low, high, coverage } = interval(values);
    assert.deepEqual({ low, high, coverage }, { low: 1, high: count, coverage: 1 - 2 ** (1 - count) });
  }
});

test('with more rounds the interval is the tightest that covers the median with 95 %', () => {
  // Ranks as printed in tables of the sign test.
  for (const [count, rank] of [
    [9, 2],
    [11, 2],
    [12, 3],
    [15, 4],
    [20, 6],
    [25, 8],
    [100, 40],
  ] as const) {
    const { low, high } = interval(Array.from({ length: count }, (_, index) => index + 1));
    assert.deepEqual([count, low, high], [count, rank, count + 1 - rank]);
  }
});

test('coverage is the exact binomial', () => {
  for (let count = 1; count <= 24; count += 1) {
    for (let rank = 1; rank <= count; rank += 1) {
      const inside = Array.from({ length: count + 1 }, (_, heads) => heads)
        .filter((heads) => heads >= rank && heads <= count - rank)
        .reduce((sum, heads) => sum + binomial(count, heads), 0);
      const close = Math.abs(coverageOf(rank, count) - inside / 2 ** count) < 1e-12;
      assert.ok(close, `rank ${rank} of ${count}: ${coverageOf(rank, count)}, expected ${inside / 2 ** count}`);
    }
  }
});

test('of all orders in which values can fall around the true median, the interval holds it as often as it says', () => {
  // Every outcome of nine tosses: below the median at 0, or above it.
  let held = 0;
  for (let outcome = 0; outcome < 2 ** 9; outcome += 1) {
    const values = Array.from({ length: 9 }, (_, index) => ((outcome >> index) & 1 ? index + 1 : -index - 1));
    const { low, high } = interval(values);
    if (low <= 0 && high >= 0) held += 1;
  }
  assert.equal(held / 2 ** 9, interval([1, 2, 3, 4, 5, 6, 7, 8, 9]).coverage);
});

test('an interval holds its median, consists of values, and does not depend on their order', () => {
  fc.assert(
    fc.property(rounds, (values) => {
      const found = interval(values);
      assert.ok(found.low <= found.median && found.median <= found.high);
      assert.ok(values.includes(found.low) && values.includes(found.high));
      assert.deepEqual(interval(values.toReversed()), found);
    }),
  );
});

test('a ratio is taken round by round, not of the medians', () => {
  // The medians are 20 and 10; one disturbed round must not make a ratio that no round had.
  const { median, low, high } = found(pairedRatio([10, 20, 90], [10, 40, 10]));
  assert.deepEqual({ median, low, high }, { median: 1, low: 0.5, high: 9 });
});

test('what disturbs both of a pair alike does not change their ratio', () => {
  fc.assert(
    fc.property(fc.array(fc.tuple(positive, positive, positive), { minLength: 1, maxLength: 30 }), (pairs) => {
      const quiet = found(
        pairedRatio(
          pairs.map(([one]) => one),
          pairs.map(([, other]) => other),
        ),
      );
      const disturbed = found(
        pairedRatio(
          pairs.map(([one, , by]) => one * by),
          pairs.map(([, other, by]) => other * by),
        ),
      );
      for (const key of ['median', 'low', 'high'] as const)
        assert.ok(Math.abs(quiet[key] / disturbed[key] - 1) < 1e-9, `${key}: ${quiet[key]} and ${disturbed[key]}`);
    }),
  );
});

test('there is no ratio to 0, of nothing, or of what some rounds lack, and it says which', () => {
  assert.deepEqual(pairedRatio([1, 2, 3], [1, 0, 0]), { missing: 'no ratio to 0 in round 2, 3' });
  assert.deepEqual(pairedRatio([1, undefined, Number.NaN], [1, 2, 3]), { missing: 'not measured in round 2, 3' });
  assert.deepEqual(pairedRatio([undefined], [1]), { missing: 'not measured' });
  assert.deepEqual(pairedRatio([1, 2], [1]), { missing: '2 and 1 rounds are not pairs' });
  assert.deepEqual(pairedRatio([], []), { missing: 'not measured' });
  assert.equal(found(pairedRatio([0, 0], [1, 2])).median, 0);
});

test('a number that one round lacks is not made of the other rounds', () => {
  assert.deepEqual(intervalOf([1, undefined, 3]), { missing: 'not measured in round 2' });
  assert.deepEqual(intervalOf([]), { missing: 'not measured' });
});

const positive = fc.double({ min: 1e-3, max: 1e6, noNaN: true });
/** What is measured is not negative, and no -0 either: that is another value to `deepEqual`, and the same to a sort. */
const rounds = fc.array(fc.double({ min: 0, max: 1e15, noNaN: true }), { minLength: 1, maxLength: 60 });

function found<T extends object>(value: T | { readonly missing: string }): T {
  assert.ok(!('missing' in value), JSON.stringify(value));
  return value;
}

function binomial(count: number, chosen: number): number {
  return chosen === 0 ? 1 : (binomial(count, chosen - 1) * (count - chosen + 1)) / chosen;
}
