/**
 * Owns: what a certificate chain file may and may not be.
 * Must not know: tokens.
 * Runs: in one test process.
 */
import assert from 'node:assert/strict';
import { generateKeyPairSync } from 'node:crypto';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, describe, it } from 'node:test';
import { chainBytesMax, chainCertificatesMax, isServerName, readChain } from '../../src/pkcs11/certificates.ts';
import type { ChainReading } from '../../src/pkcs11/certificates.ts';
import { anyPublicKey, createAuthority, daysFromNow } from '../support/authority.ts';
import type { Authority } from '../support/authority.ts';

describe('a certificate chain', () => {
  let authority: Authority;
  let directory: string;
  before(async () => {
    authority = await createAuthority();
    directory = mkdtempSync(join(tmpdir(), 'keygate-chain-'));
  });
  after(() => rmSync(directory, { recursive: true }));

  const read = (...parts: readonly string[]): ChainReading => {
    const chain = join(directory, 'chain.pem');
    writeFileSync(chain, parts.map((part) => `${part.trim()}\n`).join(''));
    return readChain({ name: 'www', chain, key: { object: 'www' }, tokens: ['hsm'], ocsp: 'off' });
  };
  const leaf = (options?: Parameters<Authority['issue']>[1]) => authority.issue(anyPublicKey(), options);

  it('gives the chain, the names in lower case, the kind of key and the first expiry', async () => {
    const notAfter = daysFromNow(30);
    const { chain, problems, warnings } = read(
      await leaf({ names: ['WWW.example.org', '*.example.org'], notAfter }),
      authority.intermediatePem,
    );
    assert.deepEqual(problems, []);
    assert.deepEqual(warnings, []);
    assert.equal(chain?.chainDer.length, 2);
    assert.deepEqual(chain?.names, ['www.example.org', '*.example.org']);
    assert.equal(chain?.keyAlgorithm, 'p256');
    assert.equal(chain?.notAfter.getTime(), Math.floor(notAfter.getTime() / 1000) * 1000);
  });

  it('is refused when a certificate is not followed by its issuer, naming the line', async () => {
    const first = await leaf();
    const { chain, problems } = read(first, authority.rootPem);
    assert.equal(chain, undefined);
    assert.equal(problems.length, 1);
    assert.equal(problems[0]?.line, first.trim().split('\n').length + 1);
    assert.match(problems[0]?.expected ?? '', /Test Intermediate/);
  });

  it('is refused when the leaf does not come first', async () => {
    const { problems } = read(authority.intermediatePem, await leaf());
    assert.equal(problems.length, 1);
    assert.match(problems[0]?.hint ?? '', /leaf first/);
  });

  it('is refused when a certificate has expired or is not valid yet, both reported', async () => {
    const expired = read(
      await leaf({ notBefore: daysFromNow(-20), notAfter: daysFromNow(-10) }),
      authority.intermediatePem,
    );
    assert.match(expired.problems[0]?.found ?? '', /expired at/);
    const early = read(await leaf({ notBefore: daysFromNow(1) }), authority.intermediatePem);
    assert.match(early.problems[0]?.found ?? '', /valid from/);
    const both = read(await leaf({ notBefore: daysFromNow(-20), notAfter: daysFromNow(-10) }), authority.rootPem);
    assert.equal(both.problems.length, 2);
  });

  it('warns of an expiry in less than two weeks, and not of one a day later', async () => {
    assert.match(
      read(await leaf({ notAfter: daysFromNow(13.5) }), authority.intermediatePem).warnings.join(),
      /expires in 13 days/,
    );
    assert.deepEqual(read(await leaf({ notAfter: daysFromNow(14.5) }), authority.intermediatePem).warnings, []);
  });

  it('warns of a root in the chain, of no names, and of a purpose that is not TLS servers', async () => {
    assert.match(
      read(await leaf(), authority.intermediatePem, authority.rootPem).warnings.join(),
      /root is in the chain/,
    );
    const unnamed = read(await leaf({ names: [], commonName: 'Old.example.org' }), authority.intermediatePem);
    assert.match(unnamed.warnings.join(), /only CN=Old\.example\.org/);
    assert.deepEqual(unnamed.chain?.names, ['old.example.org']);
    const client = read(await leaf({ purpose: '1.3.6.1.5.5.7.3.2' }), authority.intermediatePem);
    assert.match(client.warnings.join(), /serverAuth/);
  });

  it('warns of a purpose that is not what the certificate is used for, and of no other', async () => {
    const [server, client] = ['1.3.6.1.5.5.7.3.1', '1.3.6.1.5.5.7.3.2'];
    for (const [purpose, uses, warns] of [
      [server, ['server'], []],
      [client, ['client'], []],
      [server, ['client'], ['clientAuth']],
      [client, ['server'], ['serverAuth']],
      [server, ['server', 'client'], ['clientAuth']],
      ['2.5.29.37.0', ['server', 'client'], []],
    ] as const) {
      const chain = join(directory, 'purpose.pem');
      writeFileSync(chain, `${await leaf({ purpose })}\n${authority.intermediatePem}\n`);
      const config = { name: 'www', chain, key: { object: 'www' }, tokens: ['hsm'], ocsp: 'off' as const };
      const { warnings } = readChain(config, new Date(), new Map(), uses);
      assert.deepEqual(
        warnings.map((warning) => /\((\w+)\)$/.exec(warning)?.[1]),
        warns,
      );
    }
  });

  it('leaves out names that SNI cannot ask for, also one that hides another behind a comma', async () => {
    const { chain, warnings } = read(
      await leaf({ names: ['ok.example.org', 'a, DNS:evil.example.org, DNS:b', 'w*.example.org'] }),
      authority.intermediatePem,
    );
    assert.deepEqual(chain?.names, ['ok.example.org']);
    assert.equal(warnings.length, 2);
  });

  it('is refused with a private key in the file', async () => {
    const { privateKey } = generateKeyPairSync('ed25519');
    const { problems } = read(
      await leaf(),
      authority.intermediatePem,
      privateKey.export({ format: 'pem', type: 'pkcs8' }),
    );
    assert.match(problems[0]?.found ?? '', /private key in a file/);
  });

  it('is refused with a key that is too short or on another curve', async () => {
    const { publicKey: short } = generateKeyPairSync('rsa', { modulusLength: 1024 });
    assert.match(
      read(await authority.issue(short), authority.intermediatePem).problems[0]?.found ?? '',
      /RSA 1024 bits/,
    );
    const { publicKey: exotic } = generateKeyPairSync('ec', { namedCurve: 'secp256k1' });
    assert.match(read(await authority.issue(exotic), authority.intermediatePem).problems[0]?.found ?? '', /secp256k1/);
  });

  it('is refused when the file is absent, a directory, empty, torn, garbled or too large', async () => {
    const pem = (await leaf()).trim();
    const absent = readChain({ name: 'www', chain: join(directory, 'absent.pem'), key: {}, tokens: [], ocsp: 'off' });
    assert.equal(absent.problems[0]?.found, 'ENOENT');
    const folder = readChain({ name: 'www', chain: directory, key: {}, tokens: [], ocsp: 'off' });
    assert.equal(folder.problems[0]?.found, 'no regular file');
    assert.equal(read('').problems[0]?.found, 'no certificate');
    assert.match(read(pem.slice(0, -10)).problems[0]?.found ?? '', /does not end/);
    const body = pem.split('\n');
    assert.match(read([body[0], 'AAAA', ...body.slice(2)].join('\n')).problems[0]?.found ?? '', /no X\.509/);
    assert.match(read('#'.repeat(chainBytesMax)).problems[0]?.found ?? '', /bytes/);
  });

  it('may have ten certificates and not eleven', async () => {
    const pem = await leaf();
    const problems = (count: number) =>
      read(...Array.from({ length: count }, () => pem)).problems.map(({ expected }) => expected);
    assert.equal(problems(chainCertificatesMax).includes(`at most ${chainCertificatesMax}`), false);
    assert.deepEqual(problems(chainCertificatesMax + 1), [`at most ${chainCertificatesMax}`]);
  });
});

describe('a name for SNI', () => {
  const cases: [string, boolean][] = [
    ['www.example.org', true],
    ['*.example.org', true],
    ['localhost', true],
    ['_dmarc.example.org', true],
    ['xn--bcher-kva.example', true],
    ['w*.example.org', false],
    ['www.*.org', false],
    ['*', false],
    ['', false],
    ['a..b', false],
    ['-a.example', false],
    ['a b', false],
    [`${'a'.repeat(63)}.example`, true],
    [`${'a'.repeat(64)}.example`, false],
    [`${'a.'.repeat(126)}a`, true],
    [`${'a.'.repeat(127)}a`, false],
  ];
  for (const [name, valid] of cases) {
    it(`${JSON.stringify(name.slice(0, 40))} of ${name.length} characters is ${valid ? 'valid' : 'refused'}`, () =>
      assert.equal(isServerName(name), valid));
  }
});
