/**
 * Owns: what is said of two results: what is better, worse, the same, or cannot be compared; and the command with its exit codes.
 * Must not know: real measurements.
 * Runs: in a test process; the command is a child.
 */
import assert from 'node:assert/strict';
import { spawnSync } from 'node:child_process';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'node:test';
import type { TestContext } from 'node:test';
import { fileURLToPath } from 'node:url';
import { stripVTControlCharacters } from 'node:util';
import { compareResults, comparisonText } from '../../bench/compare.ts';
import type { Change } from '../../bench/compare.ts';
import type { MetricName, Sample } from '../../bench/metrics.ts';
import { writeResult } from '../../bench/result.ts';
import type { Result } from '../../bench/result.ts';
import { around, aResult, aScenario, aSubject } from './results.ts';

test('a result compared with itself is unchanged in everything', () => {
  const { warnings, changes, unmatched } = compareResults(measured(50), measured(50));
  assert.deepEqual([warnings, unmatched], [[], []]);
  assert.deepEqual(new Set(changes.map(({ direction }) => direction)), new Set(['unchanged']));
});

test('what is better depends on the metric', () => {
  const changes = compareResults(measured(50), measured(40)).changes;
  assert.equal(of(changes, 'handshake_cpu_us').direction, 'better');
  assert.equal(of(changes, 'handshakes_per_second').direction, 'better');
  const back = compareResults(measured(40), measured(50)).changes;
  assert.equal(of(back, 'handshake_cpu_us').direction, 'worse');
  assert.equal(of(back, 'handshakes_per_second').direction, 'worse');
});

test('intervals that overlap are no change', () => {
  assert.equal(of(compareResults(measured(50), measured(51)).changes, 'handshake_cpu_us').direction, 'unchanged');
});

test('a machine that was twice as slow that day has changed nothing, because the other one was too', () => {
  const change = of(compareResults(measured(50, 100), measured(100, 200)).changes, 'handshake_cpu_us');
  assert.equal(change.direction, 'unchanged');
  assert.equal(change.reference?.contender, 'nginx');
  assert.deepEqual([change.numbers.ratio, change.reference?.ratio].map(median), [2, 1]);
});

test('a machine that was faster that day does not hide a regression', () => {
  assert.equal(of(compareResults(measured(50, 100), measured(45, 50)).changes, 'handshake_cpu_us').direction, 'worse');
});

test('the ratio of a change is as uncertain as both numbers together', () => {
  const { ratio } = of(compareResults(measured(50), measured(100)).changes, 'handshake_cpu_us').numbers;
  assert.ok('low' in ratio);
  const rounded = [ratio.median, ratio.low, ratio.high].map((value) => value.toFixed(4));
  assert.deepEqual(rounded, ['2.0000', (98 / 51).toFixed(4), (102 / 49).toFixed(4)]);
});

test('who a goal is against is preferred as the reference', () => {
  const goal = { title: 'CPU', metric: 'handshake_cpu_us' as const, against: 'haproxy', max: 1 };
  const result = aResult(
    aScenario([aSubject('keygate', around(50)), aSubject('nginx', around(100)), aSubject('haproxy', around(90))], {
      goals: [goal],
    }),
  );
  assert.equal(of(compareResults(result, result).changes, 'handshake_cpu_us').reference?.contender, 'haproxy');
});

test('who was measured in another version is no reference, and that is said', () => {
  const newer = measured(50);
  newer.versions['nginx'] = { nginx: '1.28', openssl: '3.0' };
  const { warnings, changes } = compareResults(measured(50), newer);
  assert.equal(of(changes, 'handshake_cpu_us').reference, undefined);
  assert.deepEqual(warnings, ['another version: nginx: nginx: 1.22, now 1.28']);
});

test('another machine, kernel, load or pace is said', () => {
  const other = measured(50);
  other.machine = { ...other.machine, cpu: 'another CPU', cores: 64, kernel: '6.2' };
  other.pace = { rounds: 5, seconds: 1, connections: 32 };
  assert.deepEqual(compareResults(measured(50), other).warnings, [
    'another machine: CPU: a CPU, now another CPU',
    'another machine: cores: 2, now 64',
    'another kernel: 6.1, now 6.2',
    'another load: clients: 16, now 32',
    'another pace: seconds: 2, now 1',
  ]);
});

test('scenarios, subjects and metrics that only one result has are named', () => {
  const before = aResult(
    aScenario([aSubject('keygate', around(50)), aSubject('nginx', around(100))]),
    aScenario([aSubject('keygate', around(50))], { name: 'gone' }),
  );
  const after = aResult(
    aScenario([aSubject('keygate', around(50)), aSubject('hitch', around(100))], {
      metrics: ['handshake_cpu_us', 'reload_ms'],
    }),
    aScenario([aSubject('keygate', around(50))], { name: 'new' }),
  );
  const { unmatched, changes } = compareResults(before, after);
  assert.deepEqual(unmatched, [
    'gone (only in the old result)',
    'new (only in the new result)',
    'nginx, key in a token (full: only in the old result)',
    'hitch, key in a token (full: only in the new result)',
    'handshakes/s (full: only in the old result)',
    'core used by it (full: only in the old result)',
    'failures (full: only in the old result)',
    'reload ms (full: only in the new result)',
  ]);
  assert.deepEqual(
    changes.map(({ metric, reference }) => [metric, reference]),
    [['handshake_cpu_us', undefined]],
  );
});

test('a number that one of them lacks cannot be compared, and a number of 0 has no ratio', () => {
  const without = measured(50);
  for (const round of without.scenarios[0]?.subjects[0]?.rounds ?? []) delete round.handshake_cpu_us;
  const change = of(compareResults(without, measured(50)).changes, 'handshake_cpu_us');
  assert.equal(change.direction, 'not comparable');
  const zero = compareResults(measured(50, 100, { handshakes_per_second: 0 }), measured(50)).changes;
  assert.deepEqual(of(zero, 'handshakes_per_second').numbers.ratio, { missing: 'no ratio to 0' });
});

test('too few rounds are no change, and that is said', () => {
  const few = (us: number) => aResult(aScenario([aSubject('keygate', [us, us, us])]));
  const [before, after] = [few(50), few(500)].map((result) => ({ ...result, pace: { ...result.pace, rounds: 3 } }));
  assert.ok(before !== undefined && after !== undefined);
  const { changes, warnings } = compareResults(before, after);
  assert.equal(of(changes, 'handshake_cpu_us').direction, 'unchanged');
  assert.deepEqual(warnings, ['less than 5 rounds: nothing can be concluded']);
});

test('failures where there were none are worse, more of them are chance', () => {
  const direction = (old: number, new_: number) =>
    of(compareResults(measured(50, 100, { failures: old }), measured(50, 100, { failures: new_ })).changes, 'failures')
      .direction;
  assert.deepEqual([direction(0, 1), direction(1, 0), direction(1, 2)], ['worse', 'better', 'unchanged']);
});

test('variations of the first are compared too, with somebody else as their reference', () => {
  const many = { ...aSubject('keygate', around(60)), title: '10,000 certificates' };
  const result = aResult(aScenario([aSubject('keygate', around(50)), many, aSubject('nginx', around(100))]));
  const changes = compareResults(result, result).changes.filter(({ metric }) => metric === 'handshake_cpu_us');
  assert.deepEqual(
    changes.map(({ subject, reference }) => [subject, reference?.contender]),
    [
      ['keygate, key in a token', 'nginx'],
      ['10,000 certificates', 'nginx'],
    ],
  );
});

test('the text has no holes', () => {
  const empty = aResult();
  const without = measured(50);
  for (const round of without.scenarios[0]?.subjects[0]?.rounds ?? []) delete round.handshake_cpu_us;
  for (const pair of [
    [measured(50), measured(60)],
    [empty, measured(50)],
    [empty, empty],
    [without, measured(50)],
  ] as const) {
    const text = stripVTControlCharacters(comparisonText(compareResults(...pair)));
    assert.doesNotMatch(text, /NaN|undefined|null|Infinity|\[object/);
    assert.match(text, /\d+ better, \d+ worse, \d+ unchanged, \d+ not comparable/);
  }
});

test('the command fails on a regression only when it is asked to', (t) => {
  const files = written(t, { old: measured(50), worse: measured(60), better: measured(40) });
  assert.equal(run(files.old, files.worse).status, 0);
  assert.equal(run('--fail-on-regression', files.old, files.worse).status, 1);
  assert.equal(run('--fail-on-regression', files.old, files.better).status, 0);
  assert.match(run(files.old, files.worse).stdout, /▼ worse/);
});

test('the command prints JSON', (t) => {
  const files = written(t, { old: measured(50), new: measured(40) });
  const { stdout } = run('--json', files.old, files.new);
  assert.deepEqual(JSON.parse(stdout), JSON.parse(JSON.stringify(compareResults(measured(50), measured(40)))));
});

test('the command refuses other arguments with its usage, and other files with their path', (t) => {
  const files = written(t, { old: measured(50) });
  for (const args of [[], [files.old], [files.old, files.old, files.old], ['--quiet', files.old, files.old]]) {
    const { status, stderr } = run(...args);
    assert.equal(status, 64);
    assert.match(stderr, /usage: bench\/compare/);
  }
  const other = join(files.directory, 'package.json');
  writeFileSync(other, '{"name":"other"}');
  for (const path of [other, `${other}.gone`]) {
    const { status, stdout, stderr } = run(files.old, path);
    assert.deepEqual([status, stdout], [65, '']);
    assert.ok(stderr.startsWith(`bench/compare: ${path}: `), stderr);
  }
  assert.equal(run('--help').status, 0);
});

function measured(keygateUs: number, nginxUs = 100, more: Sample = {}): Result {
  return aResult(
    aScenario([aSubject('keygate', around(keygateUs), more), aSubject('nginx', around(nginxUs).toReversed())]),
  );
}

function of(changes: readonly Change[], metric: MetricName): Change {
  const change = changes.find((each) => each.metric === metric);
  assert.ok(change !== undefined, `${metric} is not compared`);
  return change;
}

function median(value: Change['numbers']['ratio'] | undefined): number | undefined {
  return value !== undefined && 'median' in value ? value.median : undefined;
}

function written<Name extends string>(
  t: TestContext,
  results: Record<Name, Result>,
): Record<Name | 'directory', string> {
  const directory = mkdtempSync(join(tmpdir(), 'keygate-compare-'));
  t.after(() => rmSync(directory, { recursive: true }));
  const paths = Object.entries<Result>(results).map(([name, result]) => {
    const path = join(directory, `${name}.json`);
    writeResult(path, result);
    return [name, path] as const;
  });
  return { ...Object.fromEntries(paths), directory } as Record<Name | 'directory', string>;
}

function run(...args: readonly string[]) {
  return spawnSync(fileURLToPath(new URL('../../bench/compare', import.meta.url)), args, { encoding: 'utf8' });
}
