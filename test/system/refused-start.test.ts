/**
 * Owns: that `keygate serve` refuses to start with tokens, keys and addresses that it cannot serve, names them, and leaves
 * nothing behind; above all that a wrong PIN is tried once.
 * Must not know: what `keygate check` says (test/cli/check.test.ts).
 * Runs: in a test process, against SoftHSM, through the fault module where calls are counted.
 */
import assert from 'node:assert/strict';
import { chmodSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { after, before, describe, it } from 'node:test';
import { createSelfSigned } from '../../src/pkcs11/issue.ts';
import { findPrivateKey } from '../../src/pkcs11/keys.ts';
import { FaultModule } from '../support/fault-module.ts';
import { refusedKeygate } from '../support/keygate.ts';
import type { KeygateDocument } from '../support/keygate.ts';
import { provisionedToken } from '../support/provisioned-token.ts';
import type { ProvisionedToken } from '../support/provisioned-token.ts';
import { echoUpstream } from '../support/upstream.ts';
import type { Upstream } from '../support/upstream.ts';

const wrongPin = '48151623';

describe('serve refuses to start', { timeout: 90_000 }, () => {
  const fixtures = new AsyncDisposableStack();
  let token: ProvisionedToken;
  let echo: Upstream;

  before(async () => {
    token = fixtures.use(await provisionedToken({ ec: { kind: 'p256' }, other: { kind: 'p256' } }));
    echo = fixtures.use(await echoUpstream());
    for (const id of ['0a', '0b'])
      token.pkcs11Tool('--keypairgen', '--key-type', 'EC:prime256v1', '--label', 'twice', '--id', id);
    token.pkcs11Tool(
      '--keypairgen',
      '--key-type',
      'EC:prime256v1',
      '--label',
      'exposed',
      '--id',
      '0c',
      '--extractable',
    );
    await token.use(async (open) => {
      const exposed = findPrivateKey(open, { object: 'exposed' });
      const pem = await createSelfSigned(open, exposed, { dns: ['localhost'], ip: [] }, 30);
      writeFileSync(join(token.directory, 'exposed.pem'), pem);
    });
  });
  after(async () => fixtures.disposeAsync());

  function document(sections: Partial<KeygateDocument> = {}): KeygateDocument {
    return { workers: 2, upstreams: { echo: { servers: [echo.address] } }, listeners: { https: {} }, ...sections };
  }

  /** Exit code and standard error; whatever it says, no PIN is among it. */
  async function refusal(sections: Partial<KeygateDocument>, env = {}) {
    const { exitCode, stdout, stderr } = await refusedKeygate(token, document(sections), { env });
    for (const secret of [token.pin, token.soPin, wrongPin]) {
      assert.ok(!`${stdout}${stderr}`.includes(secret), 'a PIN is in the output');
    }
    assert.doesNotMatch(stdout, /"event":"ready"/);
    return { exitCode, stderr };
  }

  function pinFile(pin: string, mode = 0o600): string {
    const file = join(token.directory, `pin-${mode.toString(8)}`);
    writeFileSync(file, pin);
    chmodSync(file, mode);
    return file;
  }

  it('with a wrong PIN, which two workers try once in total', async () => {
    const faults = new FaultModule(token);
    fixtures.defer(() => faults.close());
    const settings = { ...token.settings, module: faults.module, pin: { file: pinFile(wrongPin) } };
    const { exitCode, stderr } = await refusal({ tokens: { 'hsm-a': settings } }, faults.env);
    assert.equal(exitCode, 77);
    assert.match(stderr, /keygate-test|hsm-a/);
    assert.match(stderr, /CKR_PIN_INCORRECT/);
    assert.equal(faults.read('C_Login', 'calls'), 1);
    assert.equal(faults.violations, 0);
  });

  it('with a PIN that other users can read, before the token sees it', async () => {
    const faults = new FaultModule(token);
    fixtures.defer(() => faults.close());
    const file = pinFile(token.pin, 0o644);
    const settings = { ...token.settings, module: faults.module, pin: { file } };
    const { exitCode, stderr } = await refusal({ tokens: { 'hsm-a': settings } }, faults.env);
    assert.equal(exitCode, 77);
    assert.ok(stderr.includes(file), stderr);
    assert.equal(faults.read('C_Login', 'calls'), 0);
  });

  const chain = (name: string) => join(token.directory, `${name}.pem`);

  for (const [what, certificate, expected] of [
    ['without the private key', () => ({ chain: chain('ec'), key: 'pkcs11:object=nowhere' }), /www.*nowhere/s],
    [
      'with two private keys under one label',
      () => ({ chain: chain('ec'), key: 'pkcs11:object=twice' }),
      /www.*twice/s,
    ],
    [
      'with a private key that can leave the token',
      () => ({ chain: chain('exposed'), key: 'pkcs11:object=exposed' }),
      /www.*exposed.*EXTRACTABLE/is,
    ],
    ['with the certificate of another key', () => ({ chain: chain('other'), key: 'pkcs11:object=ec' }), /www.*ec/s],
  ] as const) {
    it(`${what}, named with its certificate`, async () => {
      const { exitCode, stderr } = await refusal({ certificates: { www: certificate() } });
      assert.equal(exitCode, 69, stderr);
      assert.match(stderr, expected);
    });
  }

  it('with several keys at fault, and names them all', async () => {
    const { exitCode, stderr } = await refusal({
      certificates: {
        ec: { chain: chain('ec'), key: 'pkcs11:object=ec' },
        one: { chain: chain('ec'), key: 'pkcs11:object=nowhere' },
        two: { chain: chain('other'), key: 'pkcs11:object=ec' },
      },
    });
    assert.equal(exitCode, 69);
    assert.match(stderr, /certificate one/);
    assert.match(stderr, /certificate two/);
    assert.doesNotMatch(stderr, /certificate ec\b/);
  });

  it('without the token', async () => {
    const { exitCode, stderr } = await refusal({
      tokens: { hsm: { ...token.settings, uri: 'pkcs11:token=elsewhere' } },
    });
    assert.equal(exitCode, 69);
    assert.match(stderr, /elsewhere/);
  });

  it('without the PKCS#11 module', async () => {
    const module = join(token.directory, 'no-such-module.so');
    const { exitCode, stderr } = await refusal({ tokens: { hsm: { ...token.settings, module } } });
    assert.equal(exitCode, 69);
    assert.ok(stderr.includes(module), stderr);
  });

  it('on an address that is in use, named with its listener', async () => {
    const { exitCode, stderr } = await refusal({ listeners: { https: { bind: [echo.address] } } });
    assert.equal(exitCode, 1);
    assert.ok(stderr.includes(`listener https cannot listen on ${echo.address}: EADDRINUSE`), stderr);
  });

  it('on an admin address that is in use', async () => {
    const { exitCode, stderr } = await refusal({ admin: { listen: echo.address } });
    assert.equal(exitCode, 1);
    assert.ok(stderr.includes(echo.address), stderr);
  });
});
