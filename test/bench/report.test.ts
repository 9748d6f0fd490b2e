/**
 * Owns: what people are told of a result: verdicts, tables, plots, files.
 * Must not know: real measurements.
 * Runs: in a test process.
 */
import assert from 'node:assert/strict';
import { mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'node:test';
import { stripVTControlCharacters } from 'node:util';
import { pngOf } from '../../bench/charts.ts';
import { numberText } from '../../bench/metrics.ts';
import { plots } from '../../bench/plots.ts';
import { markdownReport, terminalReport, writeReport } from '../../bench/report.ts';
import { readResult } from '../../bench/result.ts';
import type { GoalResult, Result } from '../../bench/result.ts';
import { judgedGoals, standing } from '../../bench/summary.ts';
import { markdownTable, ratioText } from '../../bench/table.ts';
import { around, aResult, aScenario, aSubject } from './results.ts';

test('a goal is met when all of the interval is within it', () => {
  assert.equal(verdictOf([60, 61, 62, 63, 64]), 'met');
  assert.equal(verdictOf([60, 61, 62, 63, 65]), 'met');
});

test('a goal that a part of the interval misses is met by the median only', () => {
  assert.equal(verdictOf([60, 61, 65, 66, 90]), 'met by the median only');
});

test('a goal is missed as soon as the median is outside, even when the interval holds it', () => {
  assert.equal(verdictOf([60, 61, 66, 67, 68]), 'missed');
});

test('rounds too few to conclude anything meet a goal by the median only', () => {
  assert.equal(verdictOf([60, 61, 62, 63]), 'met by the median only');
  assert.equal(verdictOf([60]), 'met by the median only');
});

test('a goal can ask for more, and for a number itself', () => {
  const atLeast: GoalResult = { title: 'rate', metric: 'handshakes_per_second', against: 'nginx', min: 2 };
  assert.equal(verdictOf(around(40), atLeast), 'met');
  assert.equal(verdictOf(around(60), atLeast), 'missed');
  const itself: GoalResult = { title: 'CPU', metric: 'handshake_cpu_us', max: 50 };
  assert.equal(verdictOf(around(40), itself), 'met');
  assert.equal(verdictOf(around(50), itself), 'met by the median only');
  assert.equal(verdictOf(around(60), itself), 'missed');
});

test('a goal is not measured without the other one, without the number, and when the scenario failed', () => {
  const [alone] = judgedGoals(aResult(aScenario([aSubject('keygate', around(60))], { goals: [goal] })));
  assert.equal(alone?.verdict, 'not measured');
  assert.deepEqual(alone?.measured, { missing: 'nginx was not measured' });
  assert.equal(verdictOf(around(60), { ...goal, metric: 'reload_ms' }), 'not measured');
  const failed = { ...aResult(), failed: [{ name: 'full', reason: 'nginx has ended', goals: [goal] }] };
  assert.equal(judgedGoals(failed)[0]?.verdict, 'not measured');
  assert.match(terminal(failed), /– not measured/);
});

test('who is ahead depends on which way is better, and an interval that holds 1 is a tie', () => {
  const less = { median: 0.8, low: 0.7, high: 0.9, coverage: 0.95 };
  assert.equal(standing('handshake_cpu_us', less), 'better');
  assert.equal(standing('handshakes_per_second', less), 'worse');
  assert.equal(standing('core_share', less), 'tie');
  assert.equal(standing('handshake_cpu_us', { ...less, high: 1 }), 'tie');
  assert.equal(standing('handshake_cpu_us', { ...less, coverage: 0.5 }), 'tie');
  assert.equal(standing('handshake_cpu_us', { ...less, low: 1.01, median: 1.1, high: 1.2 }), 'worse');
});

test('no report says NaN, undefined, null or Infinity, whatever is missing', () => {
  for (const [what, result] of Object.entries(oddResults())) {
    const drawn = plots(result);
    for (const text of [terminal(result), markdownReport(result, drawn), ...drawn.map(({ svg }) => svg)])
      assert.doesNotMatch(text, /NaN|undefined|null|Infinity|\[object/, what);
  }
});

test('every Markdown table has a rule and as many cells in each row', () => {
  for (const result of Object.values(oddResults())) {
    const lines = markdownReport(result, plots(result)).split('\n');
    for (const [index, line] of lines.entries()) {
      if (!line.startsWith('|') || lines[index - 1]?.startsWith('|')) continue;
      const end = lines.findIndex((each, at) => at > index && !each.startsWith('|'));
      const cells = lines.slice(index, end).map((row) => row.match(/(?<!\\)\|/g)?.length);
      assert.equal(new Set(cells).size, 1, lines.slice(index, end).join('\n'));
      assert.match(lines[index + 1] ?? '', /^(?:\| -+:? )+\|$/);
      assert.equal(lines[index - 1], '');
    }
  }
});

test('a cell with a bar does not split its row', () => {
  assert.deepEqual(
    markdownTable([
      ['a', 'b'],
      ['x|y', '1'],
    ]),
    ['| a    |   b |', '| ---- | --: |', String.raw`| x\|y |   1 |`],
  );
});

test('the Markdown report begins with the goals, and has the numbers only beside their ratio', () => {
  const text = markdownReport(whole(), plots(whole()));
  const headings = text.match(/^##+ .*/gm) ?? [];
  assert.equal(headings[0], '## Goals');
  const [ratios = '', numbers = ''] = text.split('<details>');
  assert.match(ratios, /\| nginx, key in a token +\|.*0\.50 \(0\.50 to 0\.50\) ▲/);
  assert.match(numbers, /\| +\| CPU µs\/handshake: first ÷ this \|/);
});

test('who was left out, what failed, versions, machine and pace are in the report', () => {
  const text = markdownReport(whole(), []);
  for (const expected of [
    'stunnel: needs stunnel4 (full, resumed)',
    '`reload`: it has ended exit code 1',
    'nginx 1.22, openssl 3.0',
    '2 × a CPU avx2, 24 GiB',
    '5 rounds of 2 s, 16 clients',
    '93.8 % confidence interval',
  ])
    assert.ok(text.includes(expected), `${expected} is not in\n${text}`);
});

test('what the intervals are worth is said, also when it differs or is nothing', () => {
  const said = (...rounds: readonly number[]) => {
    const scenarios = rounds.map((count, index) =>
      aScenario([aSubject('keygate', around(50).slice(0, count))], { name: `scenario ${index}` }),
    );
    return terminal(aResult(...scenarios)).match(/median \((.*)\)/)?.[1];
  };
  assert.equal(said(5, 5), 'its 93.8 % confidence interval');
  assert.equal(said(3, 5), 'its 75.0 to 93.8 % confidence interval; below 90.0 % nothing is concluded');
  assert.equal(said(1, 1), 'no interval: one round');
  assert.equal(said(), 'no interval: nothing was measured');
});

test('a machine that others used meanwhile is said', () => {
  const said = (share: number) =>
    terminal(aResult(aScenario([aSubject('keygate', around(50), { strangers_share: share })])));
  assert.match(said(0.5), /Others used up to 50 % of the cores/);
  assert.doesNotMatch(said(0.01), /Others used/);
});

test('small numbers get more digits, as many as tell them apart', () => {
  const text = numberText('relay_gib_per_second');
  assert.deepEqual([0, 0.0072, 0.072, 0.72, 7.2].map(text), ['0.00', '0.0072', '0.072', '0.72', '7.20']);
  assert.equal(numberText('handshake_cpu_us')(0.4), '0');
});

test('failures are added up over all rounds', () => {
  const result = aResult(aScenario([aSubject('keygate', around(60), { failures: 3 })]));
  assert.match(terminal(result), /15$/m);
});

test('scenarios of one workload are summed up, each in a row, with a dash where somebody was not measured', () => {
  const lines = terminal(whole()).split('\n');
  const start = lines.findIndex((line) => line.startsWith('CPU µs/handshake: keygate, key in a token ÷'));
  assert.deepEqual(
    lines.slice(start + 1, start + 4).map((line) => line.trim().split(/\s{2,}/)),
    [
      ['nginx', 'haproxy'],
      ['full handshakes', '0.50 ▲', '–'],
      ['resumed handshakes', '0.50 ▲', '2.00 ▼'],
    ],
  );
});

test('variations of one contender are told apart by their titles', () => {
  const [few, many] = [aSubject('keygate', around(50)), aSubject('keygate', around(51))];
  const result = aResult(
    aScenario([few, { ...many, title: '10,000 certificates' }, { ...many, title: '100 certificates' }]),
    aScenario([few, { ...many, title: '10,000 certificates' }], { name: 'resumed', title: 'resumed handshakes' }),
  );
  assert.match(terminal(result), /^ +10,000 certificates +100 certificates$/m);
});

test('ratios have three digits from thousandths to thousands', () => {
  assert.deepEqual([0, 0.0123, 0.5, 1, 12.34, 1234.5].map(ratioText), ['0', '0.012', '0.50', '1.00', '12.3', '1235']);
});

test('every plot can be parsed and drawn, has a title, and contains each who is in it', () => {
  const drawn = plots(whole());
  assert.deepEqual(
    drawn.map(({ name }) => name),
    [
      'goals',
      'ratios-handshakes',
      'ratios-relay',
      'sweep-relay-message-bytes',
      'ratios-idle',
      'relay-cpu',
      'storm-latency',
      'idle-memory',
    ],
  );
  for (const { name, title, svg } of drawn) {
    const png = pngOf(svg);
    assert.equal(png.subarray(1, 4).toString(), 'PNG', name);
    assert.ok(svg.includes(`<title>${title}</title>`), name);
    const [, width, height] = svg.match(/width="(\d+)" height="(\d+)"/) ?? [];
    assert.deepEqual([png.readUInt32BE(16), png.readUInt32BE(20)], [Number(width) * 2, Number(height) * 2], name);
    if (name !== 'goals') assert.match(svg, /nginx/, name);
    assert.match(svg, /keygate|CPU per full handshake/, name);
  }
});

test('the text of a plot is also in its PNG', () => {
  const [goals] = plots(whole());
  assert.ok(goals !== undefined);
  const silent = goals.svg.replaceAll(/<text .*?<\/text>/g, '');
  assert.notDeepEqual(pngOf(goals.svg), pngOf(silent));
});

test('nothing of a plot is outside of it', () => {
  for (const { name, svg } of [...plots(whole()), ...Object.values(oddResults()).flatMap(plots)]) {
    const [, width = '0', height = '0'] = svg.match(/width="(\d+)" height="(\d+)"/) ?? [];
    for (const [, axis, value] of svg.matchAll(/ (x|y|x1|x2|y1|y2|cx|cy)="([^"]+)"/g)) {
      const max = Number(axis?.includes('x') ? width : height);
      assert.ok(Number(value) >= -4 && Number(value) <= max, `${name}: ${axis}=${value}, expected 0..${max}`);
    }
  }
});

test('titles cannot break the markup of a plot', () => {
  const evil = { ...aSubject('nginx', around(100)), title: '<nginx> & "co"' };
  for (const { svg } of plots(aResult(aScenario([aSubject('keygate', around(50)), evil], { title: 'a < b & c' }))))
    assert.doesNotThrow(() => pngOf(svg));
});

test('a directory gets numbers, tables and plots, and again when there is more', (t) => {
  const directory = join(mkdtempSync(join(tmpdir(), 'keygate-report-')), 'new');
  t.after(() => rmSync(join(directory, '..'), { recursive: true }));
  writeReport(directory, aResult());
  assert.deepEqual(readdirSync(directory), ['report.md', 'result.json']);
  writeReport(directory, whole());
  assert.deepEqual(readResult(join(directory, 'result.json')), whole());
  const report = readFileSync(join(directory, 'report.md'), 'utf8');
  const files = readdirSync(directory);
  for (const [, file = ''] of report.matchAll(/!\[.*?\]\((.*?)\)/g)) assert.ok(files.includes(file), file);
  assert.ok(files.includes('goals.png'));
});

test('a number that a round could not have is absent in the file, so that it can be read again', (t) => {
  const directory = mkdtempSync(join(tmpdir(), 'keygate-report-'));
  t.after(() => rmSync(directory, { recursive: true }));
  writeReport(directory, aResult(aScenario([aSubject('keygate', around(60), { core_share: Number.NaN })])));
  const [scenario] = readResult(join(directory, 'result.json')).scenarios;
  assert.equal('core_share' in (scenario?.subjects[0]?.rounds[0] ?? {}), false);
});

test('a file that is no result is refused with its path and what is wrong', (t) => {
  const directory = mkdtempSync(join(tmpdir(), 'keygate-report-'));
  t.after(() => rmSync(directory, { recursive: true }));
  const path = join(directory, 'other.json');
  assert.throws(() => readResult(path), /other\.json: ENOENT/);
  writeFileSync(path, '{"format":1}');
  assert.throws(() => readResult(path), /other\.json: not a result of npm run bench.*expected 2/s);
});

const goal: GoalResult = { title: 'CPU per full handshake', metric: 'handshake_cpu_us', against: 'nginx', max: 0.65 };

/** Of keygate, with nginx at 100 µs in every round. */
function verdictOf(cpuUs: readonly number[], asked = goal): string | undefined {
  const nginx = aSubject(
    'nginx',
    cpuUs.map(() => 100),
  );
  return judgedGoals(aResult(aScenario([aSubject('keygate', cpuUs), nginx], { goals: [asked] })))[0]?.verdict;
}

function terminal(result: Result): string {
  return stripVTControlCharacters(terminalReport(result));
}

/** Has everything that a report can show. */
function whole(): Result {
  const [keygate, nginx, haproxy] = [
    aSubject('keygate', around(50)),
    aSubject('nginx', around(100)),
    aSubject('haproxy', around(25)),
  ];
  const leftOut = [{ title: 'stunnel', reason: 'needs stunnel4' }];
  const numbers = (contender: string, round: object) => ({
    contender,
    title: contender,
    rounds: around(1).map(() => ({ ...round })),
  });
  return {
    ...aResult(
      aScenario([keygate, nginx], { goals: [goal], left_out: leftOut }),
      aScenario([keygate, nginx, haproxy], { name: 'resumed', title: 'resumed handshakes', left_out: leftOut }),
      ...[64, 1024, 65536].map((size) =>
        aScenario(
          [
            numbers('keygate', { relay_cpu_s_per_gib: 90 / size }),
            numbers('nginx', { relay_cpu_s_per_gib: 95 / size }),
          ],
          {
            name: `relay-${size}`,
            title: `relay of ${size} B`,
            workload: 'relay',
            metrics: ['relay_cpu_s_per_gib'],
            parameters: { messageBytes: size, idleConnections: 1000 },
          },
        ),
      ),
      aScenario(
        [
          numbers('keygate', { quiet_echo_p99_ms: 0.4, echo_p50_ms: 0.2, echo_p99_ms: 0.6 }),
          numbers('nginx', { quiet_echo_p99_ms: 0.4, echo_p50_ms: 20, echo_p99_ms: 60 }),
        ],
        {
          name: 'storm',
          title: 'a storm',
          workload: 'idle',
          metrics: ['quiet_echo_p99_ms', 'echo_p50_ms', 'echo_p99_ms'],
        },
      ),
      aScenario(
        [numbers('keygate', { idle_connection_bytes: 12_000 }), numbers('nginx', { idle_connection_bytes: 38_000 })],
        {
          name: 'idle',
          title: 'idle connections',
          workload: 'idle',
          metrics: ['idle_connection_bytes'],
          goals: [{ title: 'memory', metric: 'idle_connection_bytes', max: 12_287 }],
        },
      ),
    ),
    failed: [
      {
        name: 'reload',
        reason: 'it has ended\nexit code 1',
        goals: [{ title: 'reload', metric: 'reload_ms', max: 1000 }],
      },
    ],
  };
}

function oddResults(): Record<string, Result> {
  const keygate = aSubject('keygate', around(50));
  const silent = { ...aSubject('nginx', around(100)), rounds: around(1).map(() => ({})) };
  const hole = { ...silent, rounds: [{}, ...aSubject('nginx', around(100)).rounds.slice(1)] };
  return {
    'nothing was measured': aResult(),
    'nobody was measured': aResult(
      aScenario([], { goals: [goal], left_out: [{ title: 'nginx', reason: 'needs nginx' }] }),
    ),
    'everything failed': { ...aResult(), versions: {}, failed: [{ name: 'full', reason: 'no token' }] },
    'one alone': aResult(aScenario([keygate], { goals: [goal] })),
    'one has no numbers': aResult(
      aScenario([keygate, silent], { goals: [goal] }),
      aScenario([keygate, silent], { name: 'again' }),
    ),
    'the first has no numbers': aResult(aScenario([silent, keygate], { goals: [{ ...goal, against: 'keygate' }] })),
    'one round lacks them': aResult(aScenario([keygate, hole], { goals: [goal] })),
    'one round': aResult(aScenario([aSubject('keygate', [50]), aSubject('nginx', [100])], { goals: [goal] })),
    'all numbers are 0': aResult(
      aScenario([aSubject('keygate', around(50), zeros), aSubject('nginx', around(100), zeros)], {
        goals: [goal, { title: 'rate', metric: 'handshakes_per_second', min: 5 }],
      }),
    ),
    'not a number': aResult(
      aScenario([keygate, aSubject('nginx', around(100), { handshake_cpu_us: Number.NaN })], { goals: [goal] }),
    ),
    whole: whole(),
  };
}

const zeros = { handshake_cpu_us: 0, handshakes_per_second: 0, core_share: 0, failures: 0 };
