/**
 * Owns: that the certificates of a run are what they say, and that only the slow token is slow. That the keys in the token are
 * those in the files, contenders.test.ts finds by handshakes.
 * Must not know: who uses them.
 * Runs: in a test process.
 */
import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { X509Certificate, createPrivateKey } from 'node:crypto';
import { existsSync, readFileSync } from 'node:fs';
import { after, before, test } from 'node:test';
import { makeKeys } from '../../bench/keys.ts';
import type { Keys } from '../../bench/keys.ts';
import { keyKinds } from '../../bench/scenarios.ts';

let keys: Keys;

before(() => {
  keys = makeKeys();
});
after(() => {
  keys.dispose();
  assert.ok(!existsSync(keys.token.directory));
});

for (const kind of keyKinds) {
  test(`the ${kind} certificate belongs to its key, names localhost and is signed by itself`, () => {
    const files = keys.files[kind];
    const certificate = new X509Certificate(readFileSync(files.certificate));
    assert.ok(certificate.checkPrivateKey(createPrivateKey(readFileSync(files.privateKey))));
    assert.equal(certificate.checkHost('localhost', { subject: 'never' }), 'localhost');
    assert.ok(certificate.verify(certificate.publicKey));
    assert.equal(certificate.ca, false);
    assert.ok(Date.parse(certificate.validFrom) < Date.now() && Date.parse(certificate.validTo) > Date.now());
    const { both, privateKey } = files;
    assert.equal(
      readFileSync(both, 'utf8'),
      readFileSync(files.certificate, 'utf8') + readFileSync(privateKey, 'utf8'),
    );
  });
}

test('openssl takes a certificate of ours for a valid one', () => {
  const { certificate } = keys.files.p384;
  const said = execFileSync('openssl', [
    'verify',
    '-x509_strict',
    '-partial_chain',
    '-trusted',
    certificate,
    certificate,
  ]);
  assert.match(said.toString(), /OK/);
});

test('a thousand certificates have a name each and one key, and are not made twice', () => {
  const thousand = keys.certificates('p256', 1000);
  assert.equal(new Set(thousand.map(({ name }) => name)).size, 1000);
  const { file } = keys.certificates('p256', 1002)[999] ?? assert.fail('no certificate');
  assert.equal(file, thousand[999]?.file);
  const certificate = new X509Certificate(readFileSync(file));
  assert.equal(certificate.checkHost('n999.bench.test', { subject: 'never' }), 'n999.bench.test');
  assert.ok(certificate.checkPrivateKey(createPrivateKey(readFileSync(keys.files.p256.privateKey))));
});

test('only the slow token is slow, and it is the same token', () => {
  const [quick, slow] = [keys.access(0), keys.access(2)];
  assert.notEqual(slow.module, quick.module);
  assert.deepEqual(keys.access(2), slow);
  assert.notEqual(keys.access(10).env['KEYGATE_FAULT_CONTROL'], slow.env['KEYGATE_FAULT_CONTROL']);
  assert.equal(slow.env['SOFTHSM2_CONF'], quick.env['SOFTHSM2_CONF']);
  const control = readFileSync(slow.env['KEYGATE_FAULT_CONTROL'] ?? '');
  // Word 64 + 32 × 16 of the control file (test/fault-module/README.md): the delay of C_Sign, microseconds.
  assert.equal(control.readBigUInt64LE((64 + 32 * 16) * 8), 2000n);
});
