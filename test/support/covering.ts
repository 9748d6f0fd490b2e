/**
 * Owns: choosing few of many combinations so that each interaction that is asked for is in one of them.
 * Must not know: what is combined.
 * Runs: in test processes.
 */

/**
 * The same choice every time: the combination that has the most that was not chosen yet comes first.
 * @param interactions what each combination would show
 */
export function covering<Combination>(
  combinations: readonly Combination[],
  interactions: (combination: Combination) => readonly string[],
): Combination[] {
  const shown = combinations.map((combination) => ({ combination, shows: interactions(combination) }));
  const wanted = new Set(shown.flatMap(({ shows }) => shows));
  const chosen: Combination[] = [];
  const gain = (shows: readonly string[]) => shows.filter((interaction) => wanted.has(interaction)).length;
  while (wanted.size > 0) {
    const best = shown.reduce((before, next) => (gain(next.shows) > gain(before.shows) ? next : before));
    chosen.push(best.combination);
    for (const interaction of best.shows) wanted.delete(interaction);
  }
  return chosen;
}
