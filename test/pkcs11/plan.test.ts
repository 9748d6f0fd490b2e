/**
 * Owns: what a configuration must bring to be served, and how much is said at once when it does not.
 * Must not know: the file that a configuration comes from.
 * Runs: in one test process, one token directory per test.
 */
import assert from 'node:assert/strict';
import { generateKeyPairSync } from 'node:crypto';
import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { before, it } from 'node:test';
import type { TestContext } from 'node:test';
import { TokenFlag } from 'graphene-pk11';
import { readPin } from '../../src/config/pin.ts';
import { ConfigError, TokenError } from '../../src/errors.ts';
import { findPrivateKey } from '../../src/pkcs11/keys.ts';
import { findToken, listTokens } from '../../src/pkcs11/module.ts';
import { examinePlan, provePlan } from '../../src/pkcs11/plan.ts';
import type { PlanTools } from '../../src/pkcs11/plan.ts';
import { generateKeyPair } from '../../src/pkcs11/provision.ts';
import type { GeneratedKey } from '../../src/pkcs11/provision.ts';
import { anyPublicKey, createAuthority, daysFromNow } from '../support/authority.ts';
import type { Authority, LeafOptions } from '../support/authority.ts';
import { planConfig, tokenConfig } from '../support/plan-config.ts';
import { openDisposableToken, unguarded } from '../support/softhsm.ts';

const tools: PlanTools = { guard: unguarded, readPin };
let authority: Authority;
before(async () => {
  authority = await createAuthority();
});

it('a token, a key and its certificate make a plan that says where everything is', async (test) => {
  const bench = openBench(test);
  const www = generateKeyPair(bench.open, 'www', 'p256');
  const plan = provePlan(planConfig([tokenConfig(bench.disposable)], [await bench.certificate('www', www)]), tools);
  const { label, serial } = bench.open.token;
  assert.deepEqual(plan.tokens, [{ name: 'hsm', label, serial, isAway: false }]);
  assert.deepEqual(plan.warnings, []);
  const spki = www.publicKey.export({ format: 'der', type: 'spki' });
  assert.equal(plan.certificates.length, 1);
  assert.deepEqual(plan.certificates[0]?.perToken, [{ token: 'hsm', keyId: www.key.id, keyLabel: 'www', spki }]);
  assert.deepEqual(plan.certificates[0]?.names, ['www.example.org']);
  assert.equal(plan.certificates[0]?.chainDer.length, 2);
});

it('everything that is wrong is reported in one error, by name', async (test) => {
  const bench = openBench(test);
  const { disposable, open } = bench;
  const good = generateKeyPair(open, 'good', 'p256');
  disposable.pkcs11Tool('--keypairgen', '--key-type', 'EC:prime256v1', '--label', 'twin', '--id', '01', '--sensitive');
  disposable.pkcs11Tool('--keypairgen', '--key-type', 'EC:prime256v1', '--label', 'twin', '--id', '02', '--sensitive');
  disposable.pkcs11Tool(
    '--keypairgen',
    '--key-type',
    'EC:prime256v1',
    '--label',
    'loose',
    '--id',
    '03',
    '--extractable',
  );
  const config = planConfig(
    [tokenConfig(disposable), tokenConfig(disposable, { name: 'gone', uri: { token: 'gone' } })],
    [
      await bench.certificate('good', good),
      await bench.certificate('absent'),
      await bench.certificate('twin'),
      await bench.certificate('loose'),
      { ...(await bench.certificate('foreign')), key: { object: 'good' } },
      await bench.certificate('expired', good, { notBefore: daysFromNow(-9), notAfter: daysFromNow(-1) }),
    ],
  );
  assert.throws(
    () => provePlan(config, tools),
    (error) => {
      assert.ok(error instanceof TokenError);
      assert.equal(error.exitCode, 69);
      for (const part of [
        /token gone: .* is not in module/,
        /object=absent: not found/,
        /object=twin: found 2 keys/,
        /key "loose" .*CKA_EXTRACTABLE true/,
        /key "good" .*does not verify with the public key of the certificate/,
        /expired\.pem:1:1 certificates\.expired\.chain: .*expired at/,
      ]) {
        assert.match(error.message, part);
      }
      return true;
    },
  );
  const { findings } = examinePlan(config, tools);
  assert.deepEqual(
    findings
      .filter(({ severity, subject }) => severity === 'ok' && subject === 'certificate good')
      .map(({ message }) => message.includes('belongs to the certificate')),
    [false, true],
  );
});

it('a key that certificates share is warned about once, and is proved for each public key that it should have', async (test) => {
  const bench = openBench(test);
  const { disposable, open } = bench;
  const file = join(disposable.directory, 'imported.key');
  const { privateKey, publicKey } = generateKeyPairSync('ec', { namedCurve: 'P-256' });
  writeFileSync(file, privateKey.export({ format: 'pem', type: 'pkcs8' }), { mode: 0o600 });
  disposable.pkcs11Tool('--write-object', file, '--type', 'privkey', '--label', 'shared', '--id', '01', '--sensitive');
  const key = { key: findPrivateKey(open, { object: 'shared' }), publicKey };
  const names = ['one', 'two', 'three'];
  const good = await Promise.all(names.map((name) => bench.certificate(name, key)));
  const plan = provePlan(planConfig([tokenConfig(disposable)], good), tools);
  assert.deepEqual(
    plan.certificates.map(({ name }) => name),
    names,
  );
  assert.equal(plan.warnings.filter((warning) => warning.includes('CKA_LOCAL')).length, 1);

  const foreign = { ...(await bench.certificate('foreign')), key: { object: 'shared' } };
  const { findings } = examinePlan(planConfig([tokenConfig(disposable)], [...good, foreign]), tools);
  assert.deepEqual(
    findings.filter(({ error }) => error !== undefined).map(({ subject, error }) => [subject, error?.code]),
    [['certificate foreign', 'token_key_mismatch']],
  );
});

it('wrong certificate files alone are a configuration error with every problem', async (test) => {
  const bench = openBench(test);
  const www = generateKeyPair(bench.open, 'www', 'p256');
  const expired = await bench.certificate('old', www, { notBefore: daysFromNow(-9), notAfter: daysFromNow(-1) });
  const absent = {
    name: 'absent',
    chain: join(bench.disposable.directory, 'nope.pem'),
    key: { object: 'www' },
    tokens: ['hsm'],
    ocsp: 'off' as const,
  };
  assert.throws(
    () => provePlan(planConfig([tokenConfig(bench.disposable)], [expired, absent]), tools),
    (error) => error instanceof ConfigError && error.problems.length === 2 && error.exitCode === 78,
  );
});

it('a wrong PIN is tried once, even for a token that two names mean, and comes first in the error', async (test) => {
  const bench = openBench(test, { loggedIn: false });
  let asked = 0;
  const wrong = { ...tools, readPin: () => (asked++, Buffer.from('00000000')) };
  const config = planConfig(
    [
      tokenConfig(bench.disposable, { name: 'gone', uri: { token: 'gone' } }),
      tokenConfig(bench.disposable),
      tokenConfig(bench.disposable, { name: 'again' }),
    ],
    [await bench.certificate('www')],
  );
  assert.throws(
    () => provePlan(config, wrong),
    (error) => {
      assert.ok(error instanceof TokenError);
      assert.equal(error.ckr, 'CKR_PIN_INCORRECT');
      assert.equal(error.token, bench.disposable.label);
      assert.doesNotMatch(error.message, /00000000/);
      return true;
    },
  );
  assert.equal(asked, 1);
  assert.notEqual(findToken(bench.module, { token: bench.disposable.label }).flags & TokenFlag.USER_PIN_COUNT_LOW, 0);
});

it('a PIN that cannot be read is an error and no PIN is sent', async (test) => {
  const bench = openBench(test, { loggedIn: false });
  const config = planConfig(
    [tokenConfig(bench.disposable, { pin: { file: '/nonexistent/pin' } })],
    [await bench.certificate('www')],
  );
  assert.throws(
    () => provePlan(config, tools),
    (error) => error instanceof TokenError && error.code === 'pin_unavailable',
  );
  assert.equal(findToken(bench.module, { token: bench.disposable.label }).flags & TokenFlag.USER_PIN_COUNT_LOW, 0);
});

it('a token that is out of reach is awaited while another has every key, and an error otherwise', async (test) => {
  const bench = openBench(test);
  const www = generateKeyPair(bench.open, 'www', 'p256');
  const tokens = [
    tokenConfig(bench.disposable, { name: 'gone', uri: { token: 'gone' } }),
    tokenConfig(bench.disposable),
  ];
  const both = { ...(await bench.certificate('www', www)), tokens: ['gone', 'hsm'] };
  const plan = provePlan(planConfig(tokens, [both]), tools);
  const places = plan.certificates[0]?.perToken ?? [];
  assert.deepEqual(
    places.map(({ token, keyId, keyLabel }) => ({ token, keyId, keyLabel })),
    [
      // As the configuration calls it.
      { token: 'gone', keyId: undefined, keyLabel: 'www' },
      { token: 'hsm', keyId: www.key.id, keyLabel: 'www' },
    ],
  );
  assert.deepEqual(
    plan.tokens.map(({ name, label, isAway }) => ({ name, label, isAway })),
    [
      { name: 'gone', label: 'gone', isAway: true },
      { name: 'hsm', label: bench.disposable.label, isAway: false },
    ],
  );
  assert.match(plan.warnings.join(), /token gone is used once it is back: .* is not in module/);
  const onlyGone = { ...both, name: 'only', tokens: ['gone'] };
  assert.throws(() => provePlan(planConfig(tokens, [both, onlyGone]), tools), /is not in module/);
  assert.equal(
    examinePlan(planConfig(tokens, [both]), tools).findings.filter(({ severity }) => severity === 'error').length,
    1,
  );
});

it('a module that does not load is named, and the tokens of other modules are examined all the same', async (test) => {
  const bench = openBench(test);
  const www = generateKeyPair(bench.open, 'www', 'p256');
  const broken = tokenConfig(bench.disposable, { name: 'broken', module: '/nonexistent/module.so' });
  const { findings } = examinePlan(
    planConfig([broken, tokenConfig(bench.disposable)], [await bench.certificate('www', www)]),
    tools,
  );
  assert.match(findings.find(({ subject }) => subject === 'token broken')?.message ?? '', /\/nonexistent\/module\.so/);
  assert.equal(findings.find(({ subject }) => subject === 'token hsm')?.severity, 'ok');
});

it('a login lock that is not free is a warning', async (test) => {
  const bench = openBench(test);
  const www = generateKeyPair(bench.open, 'www', 'p256');
  const lockLogin = () => {
    throw new Error('held by another process');
  };
  const plan = provePlan(planConfig([tokenConfig(bench.disposable)], [await bench.certificate('www', www)]), {
    ...tools,
    guard: { ...unguarded, lockLogin },
  });
  assert.match(plan.warnings.join(), /without the login lock: held by another process/);
});

it('the login lock is held from before C_Initialize until the keys are found, and given back also after a failure', async (test) => {
  const bench = openBench(test, { loggedIn: false });
  const events: string[] = [];
  const guard = {
    ...unguarded,
    lockLogin: () => {
      events.push('locked');
      return () => events.push('released');
    },
  };
  const spyingReadPin: PlanTools['readPin'] = (source) => (events.push('pin'), readPin(source));
  const config = planConfig(
    [tokenConfig(bench.disposable), tokenConfig(bench.disposable, { name: 'gone', uri: { token: 'gone' } })],
    [await bench.certificate('www')],
  );
  examinePlan(config, { guard, readPin: spyingReadPin });
  assert.deepEqual(events, ['locked', 'pin', 'released']);
});

it('a PIN that cannot be read is reported with its place in the configuration', async (test) => {
  const bench = openBench(test, { loggedIn: false });
  const token = tokenConfig(bench.disposable, { pin: { file: join(bench.disposable.directory, 'nope') } });
  const { findings } = examinePlan(planConfig([token], [await bench.certificate('www')]), tools);
  const [{ message, error } = assert.fail('nothing was found')] = findings;
  assert.equal(error?.code, 'pin_unavailable');
  assert.match(message, /^tokens\.hsm\.pin: file .*nope cannot be read: ENOENT$/);
});

it('no session is left open', async (test) => {
  const bench = openBench(test, { loggedIn: false });
  const config = planConfig([tokenConfig(bench.disposable)], [await bench.certificate('www')]);
  let asked = 0;
  const counting = { ...tools, readPin: (source: Parameters<typeof readPin>[0]) => (asked++, readPin(source)) };
  examinePlan(config, counting);
  // The last session took the login with it: the PIN is needed again.
  examinePlan(config, counting);
  assert.equal(asked, 2);
  assert.equal(
    listTokens(bench.module).some(({ sessions }) => (sessions.open ?? 0) > 0),
    false,
  );
});

function openBench(test: TestContext, { loggedIn = true } = {}) {
  const { disposable, open } = openDisposableToken(test);
  // The plan's own login is looked at only when nobody in this process is logged in.
  if (!loggedIn) open.session.logout();
  if (!loggedIn) open.token.slot.closeAll();
  return {
    disposable,
    open,
    module: open.token.slot.module,
    /** A certificate file for the key, or for one that nobody has, and its place in a configuration. */
    async certificate(name: string, key?: GeneratedKey, options?: LeafOptions) {
      const chain = join(disposable.directory, `${name}.pem`);
      writeFileSync(
        chain,
        `${await authority.issue(key?.publicKey ?? anyPublicKey(), options)}\n${authority.intermediatePem}\n`,
      );
      return { name, chain, key: { object: key?.key.label ?? name }, tokens: ['hsm'], ocsp: 'off' as const };
    },
  };
}
