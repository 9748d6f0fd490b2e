/**
 * Owns: the arithmetic of a benchmark: medians, their confidence intervals, ratios round by round.
 * Must not know: what was measured.
 * Runs: anywhere.
 *
 * Rounds on a shared machine are not normally distributed: one of them meets a compiler. So nothing here assumes a
 * distribution, and no round is thrown away.
 */

/** A median, and between what the true one lies with the probability `coverage`. */
export interface Interval {
  readonly median: number;
  readonly low: number;
  readonly high: number;
  /** 0..1: 0 for one round, which says nothing about others. */
  readonly coverage: number;
}

/** Instead of a number: why there is none. */
export interface Missing {
  readonly missing: string;
}

const wantedCoverage = 0.95;

/**
 * From the rank-th lowest to the rank-th highest value, with the largest rank that still covers the median with at least
 * the wanted probability; with less than six rounds none does, and it is from the lowest to the highest.
 * @param values at least one, all finite.
 */
export function interval(values: readonly number[]): Interval {
  const sorted = sortedCopy(values);
  let rank = 1;
  while (coverageOf(rank + 1, sorted.length) >= wantedCoverage) rank += 1;
  return {
    median: middle(sorted),
    low: sorted[rank - 1] as number,
    high: sorted[sorted.length - rank] as number,
    coverage: coverageOf(rank, sorted.length),
  };
}

/**
 * How probable it is that the true median lies between the rank-th lowest and the rank-th highest of so many values: it does
 * not when fewer than `rank` fall on one side of it, as of so many tosses of a coin. Ties only make it more probable.
 */
export function coverageOf(rank: number, count: number): number {
  if (2 * rank > count + 1) return 0;
  let outcomes = 1;
  let fewer = 0;
  for (let heads = 0; heads < rank; heads += 1) {
    fewer += outcomes;
    outcomes = (outcomes * (count - heads)) / (heads + 1);
  }
  return Math.max(0, 1 - (2 * fewer) / 2 ** count);
}

/** Of one who is measured. A round without the number counts as if there were none: who fails must not win by it. */
export function intervalOf(values: readonly (number | undefined)[]): Interval | Missing {
  const known = values.filter(isNumber);
  if (known.length === values.length && known.length > 0) return interval(known);
  return { missing: known.length === 0 ? 'not measured' : `not measured in ${gaps(values)}` };
}

/** Of two who are measured, round by round: what disturbed the machine in one round disturbed both. */
export function pairedRatio(
  numerators: readonly (number | undefined)[],
  denominators: readonly (number | undefined)[],
): Interval | Missing {
  if (numerators.length !== denominators.length) {
    return { missing: `${numerators.length} and ${denominators.length} rounds are not pairs` };
  }
  for (const side of [intervalOf(numerators), intervalOf(denominators)]) if ('missing' in side) return side;
  const zeros = denominators.map((denominator) => (denominator === 0 ? undefined : denominator));
  if (zeros.includes(undefined)) return { missing: `no ratio to 0 in ${gaps(zeros)}` };
  return interval(numerators.map((numerator, round) => (numerator as number) / (denominators[round] as number)));
}

function sortedCopy(values: readonly number[]): readonly number[] {
  if (values.length === 0) throw new RangeError('a median of no values');
  const wrong = values.find((value) => !Number.isFinite(value));
  if (wrong !== undefined) throw new RangeError(`a median with ${wrong} among its values`);
  return values.toSorted((left, right) => left - right);
}

function middle(sorted: readonly number[]): number {
  const half = sorted.length / 2;
  const upper = sorted[Math.floor(half)] as number;
  return Number.isInteger(half) ? ((sorted[half - 1] as number) + upper) / 2 : upper;
}

function gaps(values: readonly (number | undefined)[]): string {
  const rounds = values.flatMap((value, index) => (isNumber(value) ? [] : [index + 1]));
  return `round ${rounds.join(', ')}`;
}

function isNumber(value: number | undefined): value is number {
  return value !== undefined && Number.isFinite(value);
}
