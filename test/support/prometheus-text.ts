/**
 * Owns: reading Prometheus' text format (0.0.4) as strictly as its documentation states it, and the rules for names and
 * histograms that a linter would hold against a scrape. What breaks a rule throws, with the line.
 * Must not know: which metrics there are.
 * Runs: in test processes.
 */
import assert from 'node:assert/strict';

export interface ScrapedFamily {
  readonly name: string;
  readonly type: string;
  readonly help: string;
  /** Values by series, `name{label="value"}` as it was printed. */
  readonly series: Map<string, number>;
  /** The names of the labels of each series, without `le`. */
  readonly labels: Set<string>;
}

/** The families by name. */
export function parseScrape(text: string): Map<string, ScrapedFamily> {
  assert.ok(text.endsWith('\n'), 'the last line must end');
  const families = new Map<string, ScrapedFamily>();
  let current: ScrapedFamily | undefined;
  let announced: { name: string; help: string } | undefined;
  for (const line of text.split('\n')) {
    if (line === '') continue;
    if (line.startsWith('# HELP ')) {
      const { name = '', help = '' } = match(
        line,
        /^# HELP (?<name>[a-zA-Z_:][a-zA-Z0-9_:]*) (?<help>(?:[^\\]|\\\\|\\n)+)$/,
      );
      assert.ok(!families.has(name), `a second family of that name: ${line}`);
      announced = { name, help };
    } else if (line.startsWith('# TYPE ')) {
      const { name = '', type = '' } = match(line, /^# TYPE (?<name>\S+) (?<type>counter|gauge|histogram)$/);
      assert.equal(name, announced?.name, `TYPE does not follow its HELP: ${line}`);
      current = { name, type, help: announced?.help ?? '', series: new Map(), labels: new Set() };
      families.set(name, current);
    } else {
      assert.ok(current, `a sample without a family: ${line}`);
      addSample(current, line);
    }
  }
  for (const family of families.values()) lint(family);
  return families;
}

function addSample(family: ScrapedFamily, line: string): void {
  const {
    name,
    labels = '',
    value,
  } = match(line, /^(?<name>[a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(?<labels>.*)\})? (?<value>\S+)$/);
  const suffixes = family.type === 'histogram' ? ['_bucket', '_sum', '_count'] : [''];
  assert.ok(
    suffixes.some((suffix) => name === family.name + suffix),
    `a sample of another family in ${family.name}: ${line}`,
  );
  const names: string[] = [];
  let rest = labels;
  while (rest !== '') {
    const label = match(rest, /^(?<name>[a-zA-Z_][a-zA-Z0-9_]*)="(?:[^"\\]|\\\\|\\"|\\n)*"(?<rest>|,.+)$/);
    names.push(label['name'] ?? '');
    rest = (label['rest'] ?? '').slice(1);
  }
  assert.equal(new Set(names).size, names.length, `a label twice: ${line}`);
  family.labels.add(names.filter((label) => label !== 'le').join(','));
  const series = `${name}{${labels}}`;
  assert.ok(!family.series.has(series), `a series twice: ${line}`);
  assert.match(value ?? '', /^(?:[+-]?(?:[0-9]+(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?|Inf)|NaN)$/i, `not a number: ${line}`);
  family.series.set(series, value === '+Inf' ? Infinity : Number(value));
}

function lint({ name, type, help, series, labels }: ScrapedFamily): void {
  assert.ok(help.length > 0, `${name} has no help`);
  assert.equal(name.endsWith('_total'), type === 'counter', `${name}: counters and only counters end in _total`);
  assert.doesNotMatch(
    name,
    /_(?:bucket|count|sum|ms|us|minutes|hours)$|milli|micro|nano|kilo|mega/,
    `${name}: a suffix that has a meaning, or no base unit`,
  );
  assert.ok(labels.size <= 1, `${name}: series with different labels`);
  if (type === 'counter') for (const [one, value] of series) assert.ok(value >= 0, `${one} is negative`);
  if (type === 'histogram') lintHistogram(name, series);
}

function lintHistogram(name: string, series: ReadonlyMap<string, number>): void {
  const buckets = Map.groupBy(
    [...series].filter(([one]) => one.startsWith(`${name}_bucket`)),
    ([one]) =>
      one
        .replace(/,?le="[^"]*"/, '')
        .replace('{,', '{')
        .replace(`${name}_bucket`, ''),
  );
  for (const [labels, own] of buckets) {
    const bounds = own
      .map(([one]) => /le="([^"]*)"/.exec(one)?.[1] ?? '')
      .map((le) => (le === '+Inf' ? Infinity : Number(le)));
    assert.deepEqual(
      bounds,
      bounds.toSorted((a, b) => a - b),
      `${name}${labels}: bounds do not ascend`,
    );
    assert.equal(bounds.at(-1), Infinity, `${name}${labels}: no +Inf`);
    const counts = own.map(([, count]) => count);
    assert.deepEqual(
      counts,
      counts.toSorted((a, b) => a - b),
      `${name}${labels}: buckets are not cumulative`,
    );
    assert.equal(
      series.get(`${name}_count${labels}`),
      counts.at(-1),
      `${name}${labels}: the count is not that of +Inf`,
    );
    assert.ok(series.has(`${name}_sum${labels}`), `${name}${labels}: no sum`);
  }
  assert.equal(
    series.size,
    [...buckets.values()].reduce((all, own) => all + own.length + 2, 0),
    `${name}: series without buckets`,
  );
}

function match(line: string, pattern: RegExp): Record<string, string> {
  const groups = pattern.exec(line)?.groups;
  assert.ok(groups, `malformed: ${line}`);
  return groups;
}
