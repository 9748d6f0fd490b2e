/**
 * Owns: what a keygate does when its successor fails late.
 * Must not know: what a keygate serves.
 * Runs: in one test process, with a successor that is a script.
 */
import assert from 'node:assert/strict';
import { once } from 'node:events';
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { createServer } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { it } from 'node:test';
import type { TestContext } from 'node:test';
import { freePort } from '../../bench/processes.ts';
import { noListeners } from '../../src/primary/listeners.ts';
import { handOver } from '../../src/primary/succession.ts';
import { TicketEpochs } from '../../src/primary/ticket-epochs.ts';

it('the admin server opens again when the successor that had its address is no more', async (test) => {
  const port = await freePort();
  const successor = successorThat(
    test,
    // It has the address, and then says what nobody expects.
    `require('node:net').createServer().listen(${port}, '127.0.0.1', () => process.send({ type: 'prepared' }))`,
  );
  const acts: string[] = [];
  const handedOver = handOver({
    inheritance: { listeners: noListeners, tickets: new TicketEpochs().inheritance },
    env: {},
    deadlineMs: 20_000,
    closeAdmin: () => void acts.push('closed'),
    async openAdmin() {
      acts.push(successor.isThere() ? 'opened beside it' : 'opened');
      const admin = createServer().listen(port, '127.0.0.1');
      await once(admin, 'listening');
      admin.close();
    },
    signal: new AbortController().signal,
  });
  await assert.rejects(handedOver, /the successor said prepared, expected serving/);
  assert.deepEqual(acts, ['closed', 'opened']);
});

/** @param act a statement: what it does when it is its turn */
function successorThat(test: TestContext, act: string) {
  const directory = mkdtempSync(join(tmpdir(), 'keygate-succession-'));
  const [command, pidFile] = [join(directory, 'keygate'), join(directory, 'pid')];
  writeFileSync(
    command,
    `#!${process.execPath}
    require('node:fs').writeFileSync('${pidFile}', String(process.pid));
    process.on('disconnect', () => process.exit());
    process.on('message', ({ type }) => {
      if (type === 'inheritance') process.send({ type: 'prepared' });
      else ${act};
    });
    `,
    { mode: 0o700 },
  );
  process.env['KEYGATE_COMMAND'] = command;
  test.after(() => {
    delete process.env['KEYGATE_COMMAND'];
    rmSync(directory, { recursive: true });
  });
  return {
    /** Until its end has been heard of. */
    isThere() {
      try {
        return process.kill(Number(readFileSync(pidFile, 'utf8')), 0);
      } catch {
        return false;
      }
    },
  };
}
