/**
 * Owns: which logs of a list count, and what is said about a list that is not one.
 * Must not know: certificates.
 * Runs: node:test.
 */
import assert from 'node:assert/strict';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, describe, it } from 'node:test';
import { ConfigError } from '../../src/errors.ts';
import { readTransparencyLogs } from '../../src/worker/transparency-logs.ts';
import type { TransparencyLogs } from '../../src/worker/transparency-logs.ts';
import { logList, TransparencyLog } from '../support/transparency-log.ts';

describe('the list of transparency logs', () => {
  const directory = mkdtempSync(join(tmpdir(), 'keygate-logs-'));
  after(() => rmSync(directory, { recursive: true }));
  const one = new TransparencyLog('one');

  function read(text: string, now = new Date()): TransparencyLogs {
    const logs = join(directory, 'logs.json');
    writeFileSync(logs, text);
    return readTransparencyLogs({ logs, scts: 2, operators: 2 }, now);
  }

  function refusal(text: string): string {
    try {
      read(text);
    } catch (error) {
      assert.ok(error instanceof ConfigError);
      return error.message;
    }
    return assert.fail('it was accepted');
  }

  it('gives logs that sign or have signed, with their operators', () => {
    for (const state of ['usable', 'qualified', 'readonly']) {
      const { logs, warnings } = read(logList([one], state));
      assert.deepEqual(logs, [{ id: one.id, key: one.key, operator: 'one' }]);
      assert.deepEqual(warnings, []);
    }
  });

  it('gives retired logs with when they were', () => {
    const [log] = read(logList([one], 'retired')).logs;
    assert.equal(log?.retiredAt, Date.parse('2024-01-01T00:00:00Z') / 1000);
  });

  it('leaves out logs that are pending or rejected, or that have no state', () => {
    const two = new TransparencyLog('two');
    for (const state of ['pending', 'rejected', 'unheard-of']) {
      const list = JSON.parse(logList([one, two])) as { operators: { logs: { state: object }[] }[] };
      const [log] = list.operators[0]?.logs ?? [];
      assert.ok(log !== undefined);
      log.state = { [state]: { timestamp: '2024-01-01T00:00:00Z' } };
      assert.deepEqual(
        read(JSON.stringify(list)).logs.map(({ operator }) => operator),
        ['two'],
      );
    }
  });

  it('knows the interval of a log', () => {
    const interval = { start_inclusive: '2026-01-01T00:00:00Z', end_exclusive: '2026-07-01T00:00:00Z' };
    const [log] = read(logList([one], 'usable', { temporal_interval: interval })).logs;
    assert.equal(log?.endsFrom, Date.parse(interval.start_inclusive) / 1000);
    assert.equal(log?.endsBefore, Date.parse(interval.end_exclusive) / 1000);
  });

  it('reads logs of the newer kind too', () => {
    const list = JSON.parse(logList([one])) as { operators: { logs: object[]; tiled_logs: object[] }[] };
    for (const operator of list.operators) [operator.logs, operator.tiled_logs] = [[], operator.logs];
    assert.equal(read(JSON.stringify(list)).logs.length, 1);
  });

  it('warns when it is older than what browsers take', () => {
    const list = logList([one]);
    const { log_list_timestamp: made } = JSON.parse(list) as { log_list_timestamp: string };
    const afterDays = (days: number): Date => new Date(Date.parse(made) + days * 86_400_000);
    assert.deepEqual(read(list, afterDays(70)).warnings, []);
    assert.match(read(list, afterDays(71.5)).warnings.join(), /71 days old: fetch it again/);
  });

  it('is refused when it is no such list, or an id does not fit its key, or no log counts', () => {
    assert.match(refusal('{'), /something that is not JSON/);
    assert.match(refusal('{}'), /operators: /);
    assert.match(refusal(logList([one], 'pending')), /no log that counts/);
    const id = one.id.toString('base64');
    assert.match(
      refusal(logList([one]).replace(id, Buffer.alloc(32).toString('base64'))),
      /a log of one with a log_id/,
    );
    assert.throws(
      () => readTransparencyLogs({ logs: join(directory, 'none'), scts: 1, operators: 1 }),
      (error) => error instanceof ConfigError && error.message.includes('ENOENT'),
    );
  });
});
