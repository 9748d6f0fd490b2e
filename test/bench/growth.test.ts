/**
 * Owns: that growth is measured from end to end, also of a small configuration. Asserts no timing.
 * Must not know: what is fast.
 * Runs: in a test process; the benchmark's processes are children.
 */
import assert from 'node:assert/strict';
import { availableParallelism } from 'node:os';
import { test } from 'node:test';
import { measureGrowth } from '../../bench/growth.ts';
import { makeKeys } from '../../bench/keys.ts';
import { buildLoad } from '../../bench/load.ts';
import { stopAll } from '../../bench/processes.ts';

test(
  'a round with 20 certificates and 5 listeners fills every number, and the sizes are those asked for',
  { skip: availableParallelism() < 2 && 'needs two cores' },
  async (context) => {
    const keys = makeKeys(['p256']);
    context.after(async () => {
      await stopAll();
      keys.dispose();
    });
    const bed = { loadProgram: await buildLoad(), keys };
    const plan = { certificates: 20, listeners: 5, scrapes: 20, seconds: 0.2, connections: 2, rounds: 1 };
    const [round, ...more] = await measureGrowth(bed, plan, () => {});
    assert.ok(round !== undefined);
    assert.deepEqual(more, []);
    for (const [name, value] of Object.entries(round)) assert.ok(Number.isFinite(value), `${name}: ${value}`);
    // Few certificates drown in the noise of two processes; all else is there or is not.
    const { certificate_bytes: _, ...positive } = round;
    for (const [name, value] of Object.entries(positive)) assert.ok(value > 0, `${name}: ${value}`);
    assert.ok(round.scrape_bytes > round.one_scrape_bytes);
  },
);
