/**
 * Owns: that the benchmark runs from end to end, and leaves nothing behind. Asserts no timing: that is what it measures.
 * Must not know: what is fast.
 * Runs: in a test process; the benchmark's processes are children.
 */
import assert from 'node:assert/strict';
import { availableParallelism } from 'node:os';
import { test } from 'node:test';
import { contenders } from '../../bench/contenders.ts';
import { benchmark } from '../../bench/handshakes.ts';
import { table } from '../../bench/report.ts';
import { scenarios } from '../../bench/scenarios.ts';

test(
  'one short round measures every contender and fills every number',
  { skip: availableParallelism() < 2 && 'needs two cores' },
  async () => {
    const said: string[] = [];
    const report = await benchmark(
      {
        rounds: 1,
        seconds: 0.3,
        connections: 4,
        scenarios: scenarios.filter(({ name }) => name === 'p256-full' || name === 'p256-resumed'),
        contenders: contenders.filter(({ name }) => name === 'keygate' || name === 'haproxy-file'),
      },
      (line) => said.push(line),
    );

    assert.deepEqual(
      report.scenarios.map(({ name }) => name),
      ['p256-full', 'p256-resumed'],
    );
    for (const scenario of report.scenarios) {
      assert.deepEqual(
        scenario.contenders.map(({ name }) => name),
        ['keygate', 'haproxy-file'],
      );
      for (const { rounds, ...contender } of scenario.contenders) {
        assert.equal(rounds.length, 1);
        assert.deepEqual(contender.failures, {});
        for (const number of [
          contender.cpuUs,
          contender.perSecond,
          contender.busy,
          contender.handshakeP50Us,
          contender.handshakeP99Us,
        ]) {
          assert.ok(number.median > 0, `${scenario.name} ${JSON.stringify(contender)}`);
        }
        assert.ok(contender.strangersShare.median >= 0);
      }
      const [keygate, haproxy] = scenario.contenders;
      const ratio = Number(keygate?.cpuUs.median) / Number(haproxy?.cpuUs.median);
      assert.ok(Math.abs(Number(haproxy?.cpuRatio?.median) - ratio) < 1e-9);
      assert.doesNotMatch(table(scenario), /NaN|undefined|null/);
    }
    assert.equal(report.scenarios[1]?.goals.length, 1);
    for (const versions of Object.values(report.versions)) {
      for (const [name, version] of Object.entries(versions)) assert.doesNotMatch(version, /unknown/, name);
    }
    assert.ok(said.some((line) => line.includes('round 1/1 keygate')));
  },
);
