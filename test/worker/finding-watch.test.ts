/**
 * Owns: how often the log hears of the same finding about servers' certificates.
 * Must not know: what is checked.
 * Runs: node:test, in memory.
 */
import assert from 'node:assert/strict';
import { it } from 'node:test';
import { FindingWatch } from '../../src/worker/finding-watch.ts';

it('a finding is told at once, its next ones after a minute and together, another one by itself', () => {
  const told: string[] = [];
  const watch = new FindingWatch({
    warn: ({ reason, refused, reported }, message) =>
      void told.push(`${String(reason)} ${String(refused)} ${String(reported)}: ${message}`),
  });
  const look = (seconds: number, refused: number, reported: number, reason = 'expired') =>
    watch.look(
      { upstreams: [{ name: 'web', servers: [], certificatesAccepted: 0, findings: [{ reason, refused, reported }] }] },
      seconds * 1000,
    );
  const refusedLine = 'upstream web: certificates of servers are refused: expired';

  look(0, 0, 0);
  assert.deepEqual(told.splice(0), []);
  look(1, 1, 0);
  assert.deepEqual(told.splice(0), [`expired 1 0: ${refusedLine}`]);
  look(2, 5, 0);
  look(60, 8, 0);
  assert.deepEqual(told.splice(0), []);
  look(61, 9, 0);
  assert.deepEqual(told.splice(0), [`expired 8 0: ${refusedLine}`]);
  look(200, 9, 0);
  assert.deepEqual(told.splice(0), []);
  look(201, 0, 1, 'sct_missing');
  assert.deepEqual(told.splice(0), [
    'sct_missing 0 1: upstream web: certificates of servers are reported and accepted: sct_missing',
  ]);
});
