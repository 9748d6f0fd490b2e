/**
 * Owns: a process that logs in to a token again and again, each time from C_Initialize on, under the login lock.
 * Must not know: who else does.
 * Runs: as a child process of a test: `login-loop.ts MODULE LABEL KEY ROUNDS`, PIN in KEYGATE_TEST_PIN. Begins when its
 * standard input ends, so that several begin together.
 */
import { once } from 'node:events';
import { readPin } from '../../src/config/pin.ts';
import { findPrivateKey, proveConfined } from '../../src/pkcs11/keys.ts';
import { closeSession, findToken, login, openModule, openSession } from '../../src/pkcs11/module.ts';
import { nativeGuard } from '../../src/pkcs11/native-guard.ts';

const [path = '', label = '', object = '', rounds = '0'] = process.argv.slice(2);
const lockWaitMs = 30_000;

process.stdin.resume();
await once(process.stdin, 'end');
for (let round = 0; round < Number(rounds); round++) {
  const release = nativeGuard.lockLogin(path, lockWaitMs);
  const opened = openModule(path, true, nativeGuard);
  const token = findToken(opened.module, { token: label });
  const session = openSession(token);
  login(session, token, () => readPin({ env: 'KEYGATE_TEST_PIN' }), nativeGuard);
  const open = { session, token };
  const key = findPrivateKey(open, { object });
  release();
  proveConfined(open, key);
  closeSession(session);
  opened.close();
}
