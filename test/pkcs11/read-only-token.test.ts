/**
 * Owns: SoftHSM with a token directory that workers can only read, the set-up that survives a kill in C_Login.
 * Must not know: how plans are proved.
 * Runs: a child process without write access to the token.
 */
import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { it } from 'node:test';
import { createSelfSigned } from '../../src/pkcs11/issue.ts';
import { generateKeyPair } from '../../src/pkcs11/provision.ts';
import { openDisposableToken } from '../support/softhsm.ts';

it('a plan is proved again and again, also while the engine is logged in, though C_GetTokenInfo fails after a login', async (test) => {
  const { disposable, open } = openDisposableToken(test);
  const { key } = generateKeyPair(open, 'www', 'p256');
  const chain = join(disposable.directory, 'www.pem');
  writeFileSync(chain, await createSelfSigned(open, key, { dns: ['localhost'], ip: [] }, 90));
  execFileSync('chmod', ['-R', 'a+rX,a-w', disposable.directory]);
  try {
    const script = new URL('../support/read-only-plan.ts', import.meta.url).pathname;
    const output = execFileSync(process.execPath, [script, disposable.module, disposable.label, chain], {
      env: { ...process.env, ...disposable.env, KEYGATE_TEST_PIN: disposable.pin },
      encoding: 'utf8',
      timeout: 30_000,
    });
    assert.deepEqual(JSON.parse(output), { faults: [], remembered: true });
  } finally {
    execFileSync('chmod', ['-R', 'u+w', disposable.directory]);
  }
});
