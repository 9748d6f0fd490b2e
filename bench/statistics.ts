/**
 * Owns: the arithmetic of a benchmark.
 * Must not know: what was measured.
 * Runs: anywhere.
 */

/** A middle value and how far the rounds were apart. */
export interface Spread {
  readonly median: number;
  readonly min: number;
  readonly max: number;
}

/** @param values at least one, all finite. */
export function spread(values: readonly number[]): Spread {
  const sorted = checked(values).toSorted((left, right) => left - right);
  return { median: middle(sorted), min: sorted[0] as number, max: sorted.at(-1) as number };
}

/**
 * Of two contenders, round by round: what disturbed the machine in one round disturbed both.
 * @param numerators as many as `denominators`, which are positive.
 */
export function pairedRatio(numerators: readonly number[], denominators: readonly number[]): Spread {
  if (numerators.length !== denominators.length) {
    throw new RangeError(
      `paired ratio: ${numerators.length} and ${denominators.length} rounds, expected as many of each`,
    );
  }
  return spread(
    numerators.map((numerator, round) => {
      const denominator = denominators[round] as number;
      if (!(denominator > 0))
        throw new RangeError(`paired ratio: denominator ${denominator} in round ${round}, expected more than 0`);
      return numerator / denominator;
    }),
  );
}

function middle(sorted: readonly number[]): number {
  const half = sorted.length / 2;
  const upper = sorted[Math.floor(half)] as number;
  return Number.isInteger(half) ? ((sorted[half - 1] as number) + upper) / 2 : upper;
}

function checked(values: readonly number[]): readonly number[] {
  if (values.length === 0) throw new RangeError('a spread of no values');
  const wrong = values.find((value) => !Number.isFinite(value));
  if (wrong !== undefined) throw new RangeError(`a spread with ${wrong} among its values`);
  return values;
}
