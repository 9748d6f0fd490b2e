/**
 * Owns: what the login lock is for: SoftHSM's token file survives logins of several processes.
 * Must not know: how the lock works.
 * Runs: two child processes on one disposable token.
 */
import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { text } from 'node:stream/consumers';
import { it } from 'node:test';
import { generateKeyPair } from '../../src/pkcs11/provision.ts';
import { openDisposableToken } from '../support/softhsm.ts';

/** Without the lock a third of the logins of two processes fail: two hundred leave no room for luck. */
const logins = 200;

it(`${logins} logins of two processes at once never break the token`, { timeout: 120_000 }, async (test) => {
  const { disposable, open } = openDisposableToken(test);
  generateKeyPair(open, 'www', 'p256');
  const script = new URL('../support/login-loop.ts', import.meta.url).pathname;
  const processes = [1, 2].map(() => {
    const child = spawn(process.execPath, [script, disposable.module, disposable.label, 'www', String(logins / 2)], {
      env: { ...process.env, ...disposable.env, KEYGATE_TEST_PIN: disposable.pin },
      stdio: ['pipe', 'ignore', 'pipe'],
    });
    test.after(() => child.kill('SIGKILL'));
    return { child, ended: once(child, 'exit'), errors: text(child.stderr) };
  });
  for (const { child } of processes) child.stdin.end();
  for (const { ended, errors } of processes) {
    const [code] = await ended;
    assert.equal(code, 0, await errors);
  }
});
