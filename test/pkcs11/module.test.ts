/**
 * Owns: finding a token and logging in to it, and what must not happen to its PIN.
 * Must not know: keys.
 * Runs: in one test process, one token directory per test.
 */
import assert from 'node:assert/strict';
import { it } from 'node:test';
import type { TestContext } from 'node:test';
import { TokenFlag } from 'graphene-pk11';
import type { Module } from 'graphene-pk11';
import { TokenError } from '../../src/errors.ts';
import { closeSession, findToken, listTokens, login, openModule, openSession } from '../../src/pkcs11/module.ts';
import { initialiseToken } from '../../src/pkcs11/provision.ts';
import { nativeGuard } from '../../src/pkcs11/native-guard.ts';
import { disposableToken, unguarded } from '../support/softhsm.ts';
import type { DisposableToken } from '../support/softhsm.ts';

it('a token is found by its label, and by label and serial when two have it', (test) => {
  const disposable = disposableToken();
  disposable.addToken(disposable.label);
  const { module } = open(test, disposable);
  const serial = listTokens(module)[0]?.serial ?? '';
  assert.throws(
    () => findToken(module, { token: disposable.label }),
    tokenError('token_not_found', /means 2 tokens.*serial/),
  );
  assert.equal(findToken(module, { token: disposable.label, serial }).serial, serial);
  assert.throws(
    () => findToken(module, { token: disposable.label, model: 'other' }),
    tokenError('token_not_found', /is not in module/),
  );
});

it('a token that is absent is named together with those that are there', (test) => {
  const { module } = open(test);
  assert.throws(
    () => findToken(module, { token: 'absent' }),
    tokenError('token_not_found', /absent.*"keygate-test" \(serial [0-9a-f]+\)/),
  );
});

it('a module that cannot be loaded is named, once', () => {
  const once = /^module \/nonexistent\/module\.so: cannot open shared object file: No such file or directory$/;
  for (const guard of [unguarded, nativeGuard])
    assert.throws(() => openModule('/nonexistent/module.so', true, guard), tokenError('token_module', once));
});

it('a module is finalised by who initialised it, and by nobody else', (test) => {
  const { disposable, module } = open(test);
  const session = openSession(findToken(module, { token: disposable.label }));
  openModule(disposable.module, false, unguarded).close();
  assert.equal(module.lib.C_GetSessionInfo(session.handle).state, 0);
  closeSession(session);
});

it('a login wipes the PIN, and a second login does not ask for it', (test) => {
  const { disposable, module } = open(test);
  const token = findToken(module, { token: disposable.label });
  const session = openSession(token);
  const pin = Buffer.from(disposable.pin);
  assert.deepEqual(
    login(session, token, () => pin, unguarded),
    [],
  );
  assert.ok(pin.every((byte) => byte === 0));
  const second = openSession(token);
  assert.deepEqual(
    login(second, token, () => assert.fail('asked for a PIN'), unguarded),
    [],
  );
  closeSession(second);
  closeSession(session);
});

it('a wrong PIN is wiped, is not in the error, and leaves a warning for the next good login', (test) => {
  const { disposable, module } = open(test);
  const session = openSession(findToken(module, { token: disposable.label }));
  const wrong = '66602840';
  const pin = Buffer.from(wrong);
  assert.throws(
    () => login(session, findToken(module, { token: disposable.label }), () => pin, unguarded),
    (error) => {
      assert.ok(error instanceof TokenError);
      assert.equal(error.ckr, 'CKR_PIN_INCORRECT');
      assert.equal(error.token, disposable.label);
      assert.equal(error.exitCode, 77);
      assert.doesNotMatch(`${error.message} ${error.hint} ${error.stack} ${String(error.cause)}`, new RegExp(wrong));
      return true;
    },
  );
  assert.ok(pin.every((byte) => byte === 0));
  const token = findToken(module, { token: disposable.label });
  assert.notEqual(token.flags & TokenFlag.USER_PIN_COUNT_LOW, 0);
  assert.match(login(session, token, () => Buffer.from(disposable.pin), unguarded).join(), /wrong PIN was given/);
  closeSession(session);
});

it('no PIN is sent to a token that is locked, on its last try, without a PIN, or known from memory only', (test) => {
  const { disposable, module } = open(test);
  const token = findToken(module, { token: disposable.label });
  const session = openSession(token);
  const refused: [typeof token, RegExp][] = [
    [{ ...token, flags: token.flags | TokenFlag.USER_PIN_LOCKED }, /locked/],
    [{ ...token, flags: token.flags | TokenFlag.USER_PIN_FINAL_TRY }, /one more wrong PIN/],
    [{ ...token, flags: token.flags & ~TokenFlag.USER_PIN_INITIALIZED }, /no user PIN/],
    [{ ...token, remembered: true }, /C_GetTokenInfo/],
  ];
  for (const [state, message] of refused) {
    assert.throws(() => login(session, state, () => assert.fail('asked for a PIN'), unguarded), message);
  }
  closeSession(session);
});

it('a PIN that is not UTF-8 is not sent', (test) => {
  const { disposable, module } = open(test);
  const token = findToken(module, { token: disposable.label });
  const session = openSession(token);
  assert.throws(
    () => login(session, token, () => Buffer.from([0xff, 0x31, 0x32, 0x33]), unguarded),
    tokenError('pin_invalid', /UTF-8/),
  );
  assert.equal(findToken(module, { token: disposable.label }).flags & TokenFlag.USER_PIN_COUNT_LOW, 0);
  closeSession(session);
});

it('an empty token is initialised once, with a label of up to 32 bytes, and never again', (test) => {
  const { module } = open(test, disposableToken({ empty: true }));
  const label = 'ä'.repeat(16);
  assert.equal(initialiseToken(module, label, goodPins()).label, label);
  const token = findToken(module, { token: label });
  const session = openSession(token);
  login(session, token, () => Buffer.from('87654321'), unguarded);
  closeSession(session);
  assert.throws(
    () => initialiseToken(module, label, goodPins()),
    tokenError('token_operation', /not initialised again/),
  );
  assert.equal(listTokens(module).filter((candidate) => candidate.label === label).length, 1);
});

it('a token is left empty when one of the new PINs is not acceptable, and the PINs are wiped', (test) => {
  const { module } = open(test, disposableToken({ empty: true }));
  for (const bad of [Buffer.from('1'), Buffer.alloc(300, 0x31), Buffer.from([0x31, 0x32, 0x33, 0xff])]) {
    for (const pins of [
      { ...goodPins(), user: Buffer.from(bad) },
      { ...goodPins(), securityOfficer: Buffer.from(bad) },
    ]) {
      assert.throws(() => initialiseToken(module, 'fresh', pins), tokenError('pin_invalid', /token fresh/));
      assert.ok([...pins.user, ...pins.securityOfficer].every((byte) => byte === 0));
    }
  }
  assert.equal(
    listTokens(module).some(({ label }) => label === 'fresh'),
    false,
  );
});

/** New buffers each time, because they are wiped. */
function goodPins(): Parameters<typeof initialiseToken>[2] {
  return { securityOfficer: Buffer.from('12345678'), user: Buffer.from('87654321') };
}

function open(test: TestContext, disposable = disposableToken()): { disposable: DisposableToken; module: Module } {
  process.env['SOFTHSM2_CONF'] = disposable.env.SOFTHSM2_CONF;
  const opened = openModule(disposable.module, false, unguarded);
  test.after(() => {
    opened.close();
    disposable.dispose();
  });
  return { disposable, module: opened.module };
}

function tokenError(code: TokenError['code'], message: RegExp): (error: unknown) => true {
  return (error) => {
    assert.ok(error instanceof TokenError);
    assert.equal(error.code, code);
    assert.match(error.message, message);
    return true;
  };
}
