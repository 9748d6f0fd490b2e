/**
 * Owns: generating, finding and proving keys; requests and certificates made with them, judged by OpenSSL.
 * Must not know: the configuration.
 * Runs: in one test process, one token per test.
 */
import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { createHmac, X509Certificate } from 'node:crypto';
import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, it } from 'node:test';
import { MechanismEnum } from 'graphene-pk11';
import type { ITemplate, Key } from 'graphene-pk11';
import type { ErrorCode } from '../../src/errors.ts';
import { TokenError, UsageError } from '../../src/errors.ts';
import { keyIdentifier, mechanisms } from '../../src/pkcs11/algorithm.ts';
import { createSelfSigned, createSigningRequest, validityDaysMax } from '../../src/pkcs11/issue.ts';
import type { Subject } from '../../src/pkcs11/issue.ts';
import { findPrivateKey, KeySearch, listKeys, proveConfined, proveKey, publicKeyOf } from '../../src/pkcs11/keys.ts';
import type { OpenToken } from '../../src/pkcs11/keys.ts';
import { generatedKinds, generateKeyPair, generateTicketKey } from '../../src/pkcs11/provision.ts';
import { anyPublicKey } from '../support/authority.ts';
import { openDisposableToken } from '../support/softhsm.ts';

describe('a generated key', () => {
  for (const kind of generatedKinds) {
    it(`of kind ${kind} cannot leave, is proved, and makes a request and a certificate that OpenSSL accepts`, async (test) => {
      const { disposable, open } = openDisposableToken(test);
      const { key, publicKey } = generateKeyPair(open, 'www', kind);
      assert.deepEqual(proveConfined(open, key), []);
      const spki = publicKey.export({ format: 'der', type: 'spki' });
      assert.match(kind, new RegExp(`^${proveKey(open, key, spki)}`));
      assert.deepEqual(key.id, keyIdentifier(publicKey));
      assert.ok(publicKeyOf(open, key).equals(publicKey));

      const subject = { dns: ['www.example.org', '*.example.net'], ip: ['192.0.2.1', '2001:db8::1'] };
      const request = join(disposable.directory, 'request.pem');
      writeFileSync(request, await createSigningRequest(open, key, subject));
      const requestText = openssl('req', '-in', request, '-verify', '-noout', '-text', '-subject');
      assert.match(
        requestText,
        /DNS:www\.example\.org, DNS:\*\.example\.net, IP Address:192\.0\.2\.1, IP Address:2001:DB8:0:0:0:0:0:1/,
      );

      const certificate = join(disposable.directory, 'certificate.pem');
      const pem = await createSelfSigned(open, key, subject, 30);
      writeFileSync(certificate, pem);
      openssl(
        'verify',
        '-x509_strict',
        '-purpose',
        'sslserver',
        '-verify_hostname',
        'www.example.org',
        '-CAfile',
        certificate,
        certificate,
      );
      const parsed = new X509Certificate(pem);
      assert.equal(parsed.ca, false);
      assert.deepEqual(parsed.keyUsage, ['1.3.6.1.5.5.7.3.1']);
      const text = openssl('x509', '-in', certificate, '-noout', '-text');
      assert.match(text, /Subject Key Identifier:\s+([0-9A-F]{2}:){19}/);
      assert.match(text.replaceAll(':', '').toLowerCase(), new RegExp(key.id.toString('hex')));
    });
  }

  it('makes a request and a certificate for TLS clients where that is wanted, and for nothing else', async (test) => {
    const { disposable, open } = openDisposableToken(test);
    const { key } = generateKeyPair(open, 'near', 'p256');
    const subject = { dns: ['near.example.org'], ip: [], purpose: 'client' } as const;
    const certificate = join(disposable.directory, 'near.pem');
    const pem = await createSelfSigned(open, key, subject, 30);
    writeFileSync(certificate, pem);
    openssl('verify', '-x509_strict', '-purpose', 'sslclient', '-CAfile', certificate, certificate);
    assert.deepEqual(new X509Certificate(pem).keyUsage, ['1.3.6.1.5.5.7.3.2']);
    const request = join(disposable.directory, 'near.csr');
    writeFileSync(request, await createSigningRequest(open, key, subject));
    const text = openssl('req', '-in', request, '-noout', '-text');
    assert.match(text, /TLS Web Client Authentication/);
    assert.doesNotMatch(text, /TLS Web Server Authentication/);
  });

  it('does not take a label that is taken', (test) => {
    const { open } = openDisposableToken(test);
    generateKeyPair(open, 'www', 'p256');
    assert.throws(() => generateKeyPair(open, 'www', 'p384'), tokenError('token_operation', /"www" is there already/));
    assert.throws(() => generateTicketKey(open, 'www'), tokenError('token_operation', /"www" is there already/));
    assert.equal(listKeys(open).length, 1);
  });

  it('for tickets cannot leave, and computes the HMAC', (test) => {
    const { open } = openDisposableToken(test);
    const key = generateTicketKey(open, 'tickets');
    assert.deepEqual(proveConfined(open, key), []);
    const mac = () =>
      open.session.createSign(MechanismEnum.SHA256_HMAC, key.object.toType<Key>()).once(Buffer.from('epoch 1'));
    assert.equal(mac().length, 32);
    assert.deepEqual(mac(), mac());
    assert.notDeepEqual(mac(), createHmac('sha256', '').update('epoch 1').digest());
  });
});

describe('a private key', () => {
  it('that is absent is named, with those that are there', (test) => {
    const { open } = openDisposableToken(test);
    generateKeyPair(open, 'other', 'p256');
    assert.throws(
      () => findPrivateKey(open, { object: 'www' }),
      tokenError('token_key_not_found', /object=www: not found; .*"other" \(id [0-9a-f]{40}\)/),
    );
  });

  it('that is ambiguous is refused with the ids of all, and found by its id', (test) => {
    const { disposable, open } = openDisposableToken(test);
    disposable.pkcs11Tool('--keypairgen', '--key-type', 'EC:prime256v1', '--label', 'www', '--id', '01', '--sensitive');
    disposable.pkcs11Tool('--keypairgen', '--key-type', 'EC:prime256v1', '--label', 'www', '--id', '02', '--sensitive');
    assert.throws(
      () => findPrivateKey(open, { object: 'www' }),
      tokenError('token_key_not_found', /found 2 keys, expected one: .*\(id 0[12]\), .*\(id 0[12]\)/),
    );
    assert.equal(findPrivateKey(open, { object: 'www', id: '02' }).id.toString('hex'), '02');
    assert.equal(findPrivateKey(open, { id: '01' }).label, 'www');
  });

  it('that is one of many wanted is found, ambiguous or absent as it is when it is the only one', (test) => {
    const { disposable, open } = openDisposableToken(test);
    const { key } = generateKeyPair(open, 'www', 'p256');
    const id = key.id.toString('hex');
    for (const twin of ['01', '02'])
      disposable.pkcs11Tool('--keypairgen', '--key-type', 'EC:prime256v1', '--label', 'twin', '--id', twin);
    const search = new KeySearch(open);
    // Far past where it stops asking for each of them.
    for (let round = 0; round < 20; round += 1) {
      const { object, ...found } = search.find({ object: 'www' });
      const { object: asked, ...alone } = findPrivateKey(open, { object: 'www' });
      assert.deepEqual([object.handle, found], [asked.handle, alone]);
      for (const uri of [{ id }, { object: 'www', id }]) assert.deepEqual(search.find(uri).object.handle, asked.handle);
      assert.equal(search.find({ object: 'twin', id: '02' }).id.toString('hex'), '02');
      assert.throws(
        () => search.find({ object: 'twin' }),
        tokenError('token_key_not_found', /found 2 keys, expected one: .*\(id 0[12]\), .*\(id 0[12]\)/),
      );
      for (const absent of [{ object: 'nobody' }, { id: '0f' }, { object: 'www', id: '01' }]) {
        assert.throws(
          () => search.find(absent),
          tokenError('token_key_not_found', /not found; private keys there: (?=.*"www")(?=.*"twin")/),
        );
      }
    }
  });

  it('that is extractable is refused by name, and so is one that is not sensitive', (test) => {
    const { open } = openDisposableToken(test);
    createKeyPair(open, 'loose', { sensitive: true, extractable: true });
    assert.throws(
      () => proveConfined(open, findPrivateKey(open, { object: 'loose' })),
      tokenError('token_key_exposed', /"loose".*CKA_EXTRACTABLE true/),
    );
    createKeyPair(open, 'open', { sensitive: false, extractable: false });
    assert.throws(
      () => proveConfined(open, findPrivateKey(open, { object: 'open' })),
      tokenError('token_key_exposed', /"open".*CKA_SENSITIVE false/),
    );
  });

  it('whose attributes lie is refused because the token shows its value', (test) => {
    const { open } = openDisposableToken(test);
    createKeyPair(open, 'liar', { sensitive: false, extractable: true });
    const liar = { ...findPrivateKey(open, { object: 'liar' }), sensitive: true, extractable: false };
    assert.throws(() => proveConfined(open, liar), tokenError('token_key_exposed', /"liar".*with the private value/));
  });

  it('that was imported works, with a warning that a copy may exist', (test) => {
    const { disposable, open } = openDisposableToken(test);
    const file = join(disposable.directory, 'imported.pem');
    openssl('genpkey', '-algorithm', 'EC', '-pkeyopt', 'ec_paramgen_curve:P-256', '-out', file);
    execFileSync(
      'softhsm2-util',
      ['--import', file, '--token', disposable.label, '--label', 'imported', '--id', '0a', '--pin', disposable.pin],
      {
        env: { ...process.env, ...disposable.env },
        stdio: 'ignore',
      },
    );
    const warnings = proveConfined(open, findPrivateKey(open, { object: 'imported' })).join('\n');
    for (const attribute of ['CKA_ALWAYS_SENSITIVE', 'CKA_NEVER_EXTRACTABLE', 'CKA_LOCAL'])
      assert.match(warnings, new RegExp(`"imported".*${attribute} is false`));
  });

  it('that belongs to another certificate, or is of another kind, is refused by name', (test) => {
    const { open } = openDisposableToken(test);
    const { key } = generateKeyPair(open, 'www', 'p256');
    const foreign = anyPublicKey().export({ format: 'der', type: 'spki' });
    assert.throws(() => proveKey(open, key, foreign), tokenError('token_key_mismatch', /"www".*does not verify/));
    const rsa = generateKeyPair(open, 'rsa', 'rsa2048').publicKey.export({ format: 'der', type: 'spki' });
    assert.throws(
      () => proveKey(open, key, rsa),
      tokenError('token_key_mismatch', /"www".*type EC, expected.*RSA 2048 bits/),
    );
    const p384 = generateKeyPair(open, 'p384', 'p384').publicKey.export({ format: 'der', type: 'spki' });
    assert.throws(() => proveKey(open, key, p384), tokenError('token_key_mismatch', /"www"/));
  });

  it('that wants the PIN for every signature, or cannot sign, is refused', (test) => {
    const { open } = openDisposableToken(test);
    createKeyPair(open, 'always', { sensitive: true, extractable: false, alwaysAuth: true });
    const always = findPrivateKey(open, { object: 'always' });
    const spki = publicKeyOf(open, always).export({ format: 'der', type: 'spki' });
    assert.throws(
      () => proveKey(open, always, spki),
      tokenError('token_mechanism', /"always".*CKA_ALWAYS_AUTHENTICATE/),
    );
    createKeyPair(open, 'mute', { sensitive: true, extractable: false, sign: false, derive: true });
    const mute = findPrivateKey(open, { object: 'mute' });
    assert.throws(
      () => proveKey(open, mute, publicKeyOf(open, mute).export({ format: 'der', type: 'spki' })),
      tokenError('token_mechanism', /"mute".*CKA_SIGN false/),
    );
  });
});

describe('a request', () => {
  it('is refused without a name, with a malformed one, and with too many', async (test) => {
    const { open } = openDisposableToken(test);
    const { key } = generateKeyPair(open, 'www', 'p256');
    const request = (subject: Partial<Subject>) =>
      createSigningRequest(open, key, { dns: ['localhost'], ip: [], ...subject });
    await request({ dns: manyNames(100), distinguishedName: `CN=${'a'.repeat(64)}` });
    const refused: Partial<Subject>[] = [
      { dns: [] },
      { dns: ['not a name'] },
      { dns: ['a,b'] },
      { dns: ['192.0.2.1'] },
      { ip: ['localhost'] },
      { dns: manyNames(101) },
      { distinguishedName: '' },
      { distinguishedName: 'no name' },
      { distinguishedName: `CN=${'a'.repeat(65)}` },
      { distinguishedName: `CN=a${', O=b'.repeat(200)}` },
    ];
    for (const subject of refused)
      await assert.rejects(request(subject), UsageError, JSON.stringify(subject).slice(0, 80));
  });

  it('carries the distinguished name it is given, or the first DNS name', async (test) => {
    const { open } = openDisposableToken(test);
    const { key } = generateKeyPair(open, 'www', 'p256');
    const subject = async (options: Partial<Subject>) =>
      openssl('req', '-noout', '-subject', {
        input: await createSigningRequest(open, key, { dns: ['www.example.org'], ip: [], ...options }),
      }).trim();
    assert.equal(await subject({}), 'subject=CN = www.example.org');
    assert.equal(
      await subject({ distinguishedName: 'C=DE, O="Example, Inc", CN=www' }),
      'subject=C = DE, O = "Example, Inc", CN = www',
    );
    assert.equal(await subject({ dns: [], ip: ['192.0.2.1'] }), 'subject=');
  });

  it('for a certificate takes 1 to 3650 days', async (test) => {
    const { open } = openDisposableToken(test);
    const { key } = generateKeyPair(open, 'www', 'p256');
    for (const days of [1, validityDaysMax]) await createSelfSigned(open, key, { dns: ['localhost'], ip: [] }, days);
    for (const days of [0, validityDaysMax + 1, 1.5, Number.NaN]) {
      await assert.rejects(createSelfSigned(open, key, { dns: ['localhost'], ip: [] }, days), UsageError);
    }
  });
});

function manyNames(count: number): string[] {
  return Array.from({ length: count }, (_, index) => `n${index}.example.org`);
}

/** With any attributes, as an operator's own tool might make it. */
function createKeyPair(open: OpenToken, label: string, attributes: ITemplate): void {
  open.session.generateKeyPair(
    { name: mechanisms.CKM_EC_KEY_PAIR_GEN, params: null },
    { token: true, label, verify: true, paramsEC: Buffer.from('06082a8648ce3d030107', 'hex') },
    { token: true, label, sign: true, ...attributes },
  );
}

function openssl(...args: readonly (string | { readonly input: string })[]): string {
  const options = args.find((arg) => typeof arg === 'object') ?? {};
  return execFileSync(
    'openssl',
    args.filter((arg) => typeof arg === 'string'),
    { encoding: 'utf8', stdio: ['pipe', 'pipe', 'pipe'], ...options },
  );
}

function tokenError(code: ErrorCode, message: RegExp): (error: unknown) => true {
  return (error) => {
    assert.ok(error instanceof TokenError);
    assert.equal(error.code, code);
    assert.match(error.message, message);
    return true;
  };
}
