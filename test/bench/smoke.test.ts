/**
 * Owns: that every workload of the benchmark runs from end to end, fills every number, and leaves nothing behind. Asserts no
 * timing: that is what it measures.
 * Must not know: what is fast.
 * Runs: in a test process; the benchmark's processes are children.
 */
import assert from 'node:assert/strict';
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { availableParallelism, tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, test } from 'node:test';
import { metrics } from '../../bench/metrics.ts';
import type { Metric } from '../../bench/metrics.ts';
import { terminalReport, writeReport } from '../../bench/report.ts';
import type { Result, ScenarioResult } from '../../bench/result.ts';
import { benchmark } from '../../bench/run.ts';
import { scenarios } from '../../bench/scenarios.ts';
import type { Parameters, Scenario, Subject } from '../../bench/scenarios.ts';
import { workloads } from '../../bench/workloads/workloads.ts';

const skip = availableParallelism() < 2 && 'needs two cores';
const directory = mkdtempSync(join(tmpdir(), 'keygate-smoke-'));
/** Installed wherever the tests run; one other is enough to see that they take turns. */
const other = 'haproxy-file';
const withOther = ['full-p256-tls1.3-x25519', 'relay-down-64', 'idle-2000'];
const few: Omit<Required<Parameters>, 'certificates' | 'listeners'> = {
  messageBytes: 1024,
  idleConnections: 40,
  echoesPerSecond: 200,
  stormPerSecond: 40,
};
const certificatesMax = 20;
/** Every workload once, and the rows that differ in more than numbers. */
const rows = [
  ...Object.keys(workloads).map((workload) => scenarios.find((scenario) => scenario.workload === workload)),
  ...['resumed-tls1.3', 'scaling', 'certificates'].map((name) => scenarios.find((scenario) => scenario.name === name)),
].map((scenario) => small(scenario as Scenario));

let result: Result;
const said: string[] = [];

before(
  async () => {
    if (skip !== false) return;
    result = await benchmark(
      { pace: { rounds: 1, seconds: 0.25, connections: 4 }, scenarios: rows, contenders: ['keygate', other] },
      (line) => said.push(line),
      (soFar) => writeReport(directory, soFar),
    );
  },
  // With a build of the signing loop, when the engine has changed.
  { timeout: 600_000 },
);
after(() => rmSync(directory, { recursive: true, force: true }));

for (const row of rows) {
  test(`one short round of ${row.name} fills every number`, { skip }, () => {
    const measured = result.scenarios.find(({ name }) => name === row.name);
    const failed = result.failed.find(({ name }) => name === row.name);
    assert.ok(measured !== undefined, `${failed?.reason}`);
    assert.deepEqual(
      measured.subjects.map(({ contender }) => contender),
      row.subjects.map(({ contender }) => contender),
    );
    assert.deepEqual(measured.left_out, []);
    for (const subject of measured.subjects) everyNumberIsThere(measured, subject);
  });
}

test('the result is shown and kept, and says what was measured', { skip }, () => {
  assert.deepEqual(result.failed, []);
  for (const text of [terminalReport(result), readFileSync(join(directory, 'report.md'), 'utf8')]) {
    assert.doesNotMatch(text, /NaN|undefined|\bnull\b/);
    for (const { title } of rows) assert.ok(text.includes(title), title);
  }
  assert.equal(JSON.parse(readFileSync(join(directory, 'result.json'), 'utf8')).scenarios.length, rows.length);
  for (const versions of Object.values(result.versions)) {
    for (const [name, version] of Object.entries(versions)) assert.doesNotMatch(version, /unknown/, name);
  }
  for (const { name } of rows)
    assert.ok(
      said.some((line) => line.includes(`${name}: round 1/1`)),
      name,
    );
});

function everyNumberIsThere(scenario: ScenarioResult, { title, rounds }: ScenarioResult['subjects'][number]): void {
  assert.equal(rounds.length, 1);
  const [round] = rounds;
  for (const name of scenario.metrics) {
    // Who is not told to reload has nothing to say about how long that takes.
    if (name === 'reload_ms' && round?.reloads === 0) continue;
    const value = round?.[name];
    assert.ok(Number.isFinite(value), `${scenario.name}, ${title}: ${name} is ${value}`);
    const { better }: Metric = metrics[name];
    if (better === 'more') assert.ok(Number(value) > 0, `${scenario.name}, ${title}: ${name} is ${value}`);
  }
  assert.equal(round?.failures ?? 0, 0, `${scenario.name}, ${title}`);
}

/** The same row with few of everything. */
function small(scenario: Scenario): Scenario {
  const { parameters = {}, subjects, setting } = scenario;
  const names = Object.keys(parameters) as (keyof typeof few)[];
  const lessOf = (subject: Subject): Subject =>
    subject.setting?.certificates === undefined
      ? subject
      : { ...subject, setting: { ...subject.setting, certificates: certificatesMax } };
  return {
    ...scenario,
    setting,
    connections: 4,
    parameters: Object.fromEntries(names.map((name) => [name, few[name]])),
    subjects: subjects
      .filter(({ contender }) => contender === 'keygate' || (contender === other && withOther.includes(scenario.name)))
      .map(lessOf),
  };
}
