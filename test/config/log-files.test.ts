/**
 * Owns: which log files workers in their sandbox cannot write to.
 * Must not know: sandboxes.
 * Runs: node:test.
 */
import assert from 'node:assert/strict';
import { it } from 'node:test';
import { logFilesOutside } from '../../src/config/log-files.ts';

const log = { level: 'info' } as const;

it('a log file is outside unless it is within what workers may write, however similar the names', () => {
  const former = { log, sandbox: { enabled: true, writable: ['/var/log/keygate', '/srv/one.log'] } };
  assert.deepEqual(
    logFilesOutside(former, [
      '/var/log/keygate/access.log',
      '/var/log/keygate/..more/access.log',
      '/srv/one.log',
      '/var/log/keygate-2/access.log',
      '/var/log/access.log',
      '/srv/two.log',
    ]),
    ['/var/log/keygate-2/access.log', '/var/log/access.log', '/srv/two.log'],
  );
});

it('without a sandbox nothing is outside', () => {
  assert.deepEqual(logFilesOutside({ log, sandbox: { enabled: false, writable: [] } }, ['/anywhere.log']), []);
});
