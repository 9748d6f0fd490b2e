/**
 * Owns: `keygate check` as its users see it: what it reports, all at once, and how it ends.
 * Must not know: how things are examined.
 * Runs: the command in child processes, a token directory per test.
 */
import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { createPublicKey, generateKeyPairSync } from 'node:crypto';
import { once } from 'node:events';
import { chmodSync, writeFileSync } from 'node:fs';
import { createServer } from 'node:net';
import type { AddressInfo } from 'node:net';
import { join } from 'node:path';
import { before, it } from 'node:test';
import type { TestContext } from 'node:test';
import { anyPublicKey, createAuthority, daysFromNow } from '../support/authority.ts';
import type { Authority, LeafOptions } from '../support/authority.ts';
import { keygate } from '../support/command.ts';
import { whyNotNobody } from '../support/nobody.ts';
import { disposableToken } from '../support/softhsm.ts';

let authority: Authority;
before(async () => {
  authority = await createAuthority();
});

it('a configuration that can be served ends with 0, every part of it ok', async (test) => {
  const bench = await openBench(test);
  await bench.generate('www');
  bench.configure({ certificates: { www: await bench.chain('www') } });
  const { exitCode, stdout, stderr } = await bench.check();
  assert.equal(exitCode, 0, stdout + stderr);
  assert.match(stdout, /^ok +token hsm +"keygate-test"/m);
  assert.match(stdout, /^ok +certificate www +p256, 2 in chain, until .*, for www\.example\.org$/m);
  assert.match(stdout, /^ok +certificate www +key "www" .*cannot leave it, belongs to the certificate$/m);
  assert.match(stdout, /^ok +upstream web +127\.0\.0\.1:\d+ accepts connections$/m);
  assert.match(stdout, /^0 errors, 0 warnings$/m);
});

it('each token that a certificate names is proved to hold its key, by a signature of its own', async (test) => {
  const bench = await openBench(test);
  const { disposable } = bench;
  const keyFile = (name: string) => {
    const { privateKey, publicKey } = generateKeyPairSync('ec', { namedCurve: 'P-256' });
    const file = join(disposable.directory, name);
    writeFileSync(file, privateKey.export({ format: 'pem', type: 'pkcs8' }), { mode: 0o600 });
    return { file, publicKey };
  };
  const [own, other] = [keyFile('own.key'), keyFile('other.key')];
  const tokens = { [disposable.label]: own, same: own, differs: other };
  for (const [label, { file }] of Object.entries(tokens)) {
    if (label !== disposable.label) disposable.addToken(label);
    const key = ['--type', 'privkey', '--label', 'www', '--id', '01', '--sensitive'];
    disposable.pkcs11Tool('--token-label', label, '--write-object', file, ...key);
  }
  const chain = join(disposable.directory, 'www.pem');
  writeFileSync(chain, `${await authority.issue(own.publicKey)}\n${authority.intermediatePem}\n`);
  const settings = (label: string) =>
    `{ module: ${disposable.module}, uri: "pkcs11:token=${label}", pin: { file: ${disposable.pinFile} } }`;
  writeFileSync(
    bench.configure({ certificates: {} }),
    [
      `tokens: { hsm: ${settings(disposable.label)}, same: ${settings('same')}, differs: ${settings('differs')} }`,
      `certificates: { www: { chain: ${chain}, key: "pkcs11:object=www", tokens: [hsm, same, differs] } }`,
      'upstreams: { web: { servers: ["127.0.0.1:9"] } }',
      'listeners: { https: { bind: ["127.0.0.1:0"], certificates: [www], upstream: web } }',
    ].join('\n'),
  );
  const { exitCode, stdout } = await bench.check();
  assert.equal(exitCode, 69, stdout);
  for (const name of ['hsm', 'same'])
    assert.match(
      stdout,
      new RegExp(`^ok +certificate www +key "www" .*in token ${name}: .*belongs to the certificate$`, 'm'),
    );
  assert.doesNotMatch(stdout, /in token differs: .*belongs/);
  assert.match(stdout, /^error +certificate www +.*differs.*does not verify/m);
});

it('the files of the admin server are checked as serve would read them', async (test) => {
  const bench = await openBench(test);
  await bench.generate('www');
  const file = join(bench.disposable.directory, 'admin-token');
  const extra = `admin: { listen: "0.0.0.0:0", token: { file: ${file} } }`;
  bench.configure({ certificates: { www: await bench.chain('www') }, extra });
  writeFileSync(file, 'short', { mode: 0o600 });
  const refused = await bench.check();
  assert.equal(refused.exitCode, 1, refused.stdout);
  assert.match(refused.stdout, /^error +admin +admin\.token: file .* is shorter than 16 characters$/m);
  writeFileSync(file, 'long-enough-for-a-token');
  const { exitCode, stdout } = await bench.check();
  assert.equal(exitCode, 0, stdout);
  assert.match(stdout, /^ok +admin +its files can be used$/m);
});

it('absent, ambiguous, extractable and foreign keys and bad chains are all reported in one run, by name', async (test) => {
  const bench = await openBench(test);
  await bench.generate('good');
  bench.disposable.pkcs11Tool(
    '--keypairgen',
    '--key-type',
    'EC:prime256v1',
    '--label',
    'twin',
    '--id',
    '01',
    '--sensitive',
  );
  bench.disposable.pkcs11Tool(
    '--keypairgen',
    '--key-type',
    'EC:prime256v1',
    '--label',
    'twin',
    '--id',
    '02',
    '--sensitive',
  );
  bench.disposable.pkcs11Tool(
    '--keypairgen',
    '--key-type',
    'EC:prime256v1',
    '--label',
    'loose',
    '--id',
    '03',
    '--extractable',
  );
  bench.configure({
    certificates: {
      absent: await bench.chain('absent'),
      twin: await bench.chain('twin'),
      loose: await bench.chain('loose'),
      foreign: { ...(await bench.chain('foreign')), key: 'pkcs11:object=good' },
      expired: { ...(await bench.chain('good', { notBefore: daysFromNow(-9), notAfter: daysFromNow(-1) }, 'expired')) },
    },
  });
  const { exitCode, stdout } = await bench.check();
  assert.equal(exitCode, 78, stdout);
  assert.match(stdout, /^error +certificate absent +.*not found/m);
  assert.match(stdout, /^error +certificate twin +.*found 2 keys/m);
  assert.match(stdout, /^error +certificate loose +.*"loose".*CKA_EXTRACTABLE/m);
  assert.match(stdout, /^error +certificate foreign +.*does not verify/m);
  assert.match(stdout, /^error +certificate expired +.*expired\.pem:1:1 .*expired at/m);
  assert.match(stdout, /^5 errors, 0 warnings$/m);
});

it('key problems alone end with 69', async (test) => {
  const bench = await openBench(test);
  bench.configure({ certificates: { www: await bench.chain('www') } });
  assert.equal((await bench.check()).exitCode, 69);
});

it('a wrong PIN is tried once for the whole run and ends with 77 naming the token; no PIN is in any output', async (test) => {
  const bench = await openBench(test);
  await bench.generate('www');
  const wrongPin = '66602842';
  writeFileSync(bench.disposable.pinFile, wrongPin);
  bench.configure({ certificates: { www: await bench.chain('www'), again: await bench.chain('www', {}, 'again') } });
  const { exitCode, stdout, stderr } = await bench.check();
  assert.equal(exitCode, 77, stdout);
  assert.equal(stdout.match(/CKR_PIN_INCORRECT/g)?.length, 1);
  assert.match(stdout, /^error +token hsm +token keygate-test: C_Login failed: CKR_PIN_INCORRECT$/m);
  assert.doesNotMatch(stdout + stderr, new RegExp(wrongPin));
});

it('problems of the file end with 78 and name its lines, and no token is asked', async (test) => {
  const bench = await openBench(test);
  const file = bench.configure({ certificates: { www: await bench.chain('www') }, extra: 'bogus: true\n' });
  const { exitCode, stdout } = await bench.check();
  assert.equal(exitCode, 78, stdout);
  assert.ok(stdout.includes(`${file}:`), stdout);
  assert.match(stdout, /bogus/);
  assert.doesNotMatch(stdout, /^ok +token/m);
});

it('an upstream that refuses is a warning only', async (test) => {
  const bench = await openBench(test);
  await bench.generate('www');
  bench.configure({ certificates: { www: await bench.chain('www') } });
  await bench.stopUpstream();
  const { exitCode, stdout } = await bench.check();
  assert.equal(exitCode, 0, stdout);
  assert.match(stdout, /^warning +upstream web +127\.0\.0\.1:\d+ cannot be reached: ECONNREFUSED$/m);
});

it('a server without an address is a warning, an upstream without one is an error as it is for serve', async (test) => {
  const bench = await openBench(test);
  await bench.generate('www');
  const certificates = { www: await bench.chain('www') };
  bench.configure({ certificates, otherServer: 'gone.invalid:80' });
  const some = await bench.check();
  assert.equal(some.exitCode, 0, some.stdout);
  assert.match(some.stdout, /^warning +upstream web +upstream web: gone\.invalid:80 \(E[A-Z_]+\) has no address/m);
  assert.match(some.stdout, /^ok +upstream web +127\.0\.0\.1:\d+ accepts connections$/m);

  bench.configure({ certificates, server: 'lost.invalid:80', otherServer: 'gone.invalid:80' });
  const none = await bench.check('--json');
  assert.equal(none.exitCode, 69, none.stdout);
  const { findings } = JSON.parse(none.stdout);
  const error = findings.find(({ severity }: { severity: string }) => severity === 'error');
  assert.equal(error.code, 'upstream_unresolved');
});

it('a user or a group that does not exist is an error, and the rest is still examined', async (test) => {
  const bench = await openBench(test);
  await bench.generate('www');
  const certificates = { www: await bench.chain('www') };
  bench.configure({ certificates, extra: 'user: keygate-nobody' });
  const user = await bench.check();
  assert.equal(user.exitCode, 1, user.stdout);
  assert.match(user.stdout, /^error +user keygate-nobody +user: found keygate-nobody/m);
  assert.match(user.stdout, /^ok +token hsm/m);
  bench.configure({ certificates, extra: 'user: nobody\ngroup: keygate-none' });
  assert.match((await bench.check()).stdout, /^error +user nobody +group: found keygate-none/m);
});

it(
  'root sees files as the configured user will: what that user cannot read is an error that names file and user',
  { skip: whyNotNobody() },
  async (test) => {
    const bench = await openBench(test);
    await bench.generate('www');
    bench.configure({ certificates: { www: await bench.chain('www') }, extra: 'user: nobody' });
    const chown = (owner: string, ...paths: readonly string[]) => execFileSync('chown', ['-R', owner, ...paths]);
    const { directory, pinFile } = bench.disposable;
    const chain = join(directory, 'www.pem');

    chown('nobody', directory);
    const readable = await bench.check();
    assert.equal(readable.exitCode, 0, readable.stdout + readable.stderr);
    assert.match(readable.stdout, /^ok +user nobody +uid \d+, gid \d+; all that follows is seen as this user$/m);

    chown('root', pinFile, chain);
    chmodSync(chain, 0o600);
    const { exitCode, stdout } = await bench.check();
    assert.equal(exitCode, 78, stdout);
    assert.match(
      stdout,
      /^error +token hsm +tokens\.hsm\.pin: file .*\/pin cannot be read: EACCES\n +user nobody must/m,
    );
    assert.match(stdout, /^error +certificate www +.*\/www\.pem .*found EACCES, .*; user nobody must/m);
  },
);

it('JSON has the same findings, with codes', async (test) => {
  const bench = await openBench(test);
  bench.configure({ certificates: { www: await bench.chain('www') } });
  const { exitCode, stdout } = await bench.check('--json');
  const report = JSON.parse(stdout);
  assert.equal(exitCode, 69);
  assert.equal(report.ok, false);
  assert.equal(report.exitCode, 69);
  const error = report.findings.find(({ severity }: { severity: string }) => severity === 'error');
  assert.equal(error.code, 'token_key_not_found');
  assert.equal(error.token, 'keygate-test');
});

interface CertificateEntry {
  readonly chain: string;
  readonly key: string;
}

async function openBench(test: TestContext) {
  const disposable = disposableToken();
  const upstream = createServer().listen(0, '127.0.0.1');
  await once(upstream, 'listening');
  const { port } = upstream.address() as AddressInfo;
  const stopUpstream = async () => {
    upstream.close();
    await once(upstream, 'close');
  };
  test.after(() => {
    upstream.close();
    disposable.dispose();
  });
  const file = join(disposable.directory, 'keygate.yaml');
  const onToken = ['--module', disposable.module, '--token', disposable.label, '--pin-file', disposable.pinFile];
  return {
    disposable,
    stopUpstream,
    check: (...args: readonly string[]) => keygate(['check', '--config', file, ...args], disposable.env),
    async generate(label: string) {
      const { exitCode, stderr } = await keygate(
        ['key', 'generate', ...onToken, '--label', label, '--type', 'p256'],
        disposable.env,
      );
      assert.equal(exitCode, 0, stderr);
    },
    /** A chain for the key with this label, or for a key that nobody has when the token has none. */
    async chain(label: string, options: LeafOptions = {}, name = label): Promise<CertificateEntry> {
      const request = await keygate(
        ['key', 'csr', ...onToken, '--label', label, '--dns', 'www.example.org'],
        disposable.env,
      );
      const publicKey =
        request.exitCode === 0
          ? createPublicKey(execFileSync('openssl', ['req', '-pubkey', '-noout'], { input: request.stdout }))
          : anyPublicKey();
      const chain = join(disposable.directory, `${name}.pem`);
      writeFileSync(chain, `${await authority.issue(publicKey, options)}\n${authority.intermediatePem}\n`);
      return { chain, key: `pkcs11:object=${label}` };
    },
    /** @returns the path of the configuration. */
    configure({
      certificates,
      server = `127.0.0.1:${port}`,
      otherServer,
      extra = '',
    }: {
      readonly certificates: Readonly<Record<string, CertificateEntry>>;
      readonly server?: string;
      readonly otherServer?: string;
      readonly extra?: string;
    }): string {
      const servers = otherServer === undefined ? [server] : [server, otherServer];
      const entries = Object.entries(certificates);
      writeFileSync(
        file,
        [
          'tokens:',
          `  hsm: { module: ${disposable.module}, uri: "pkcs11:token=${disposable.label}", pin: { file: ${disposable.pinFile} } }`,
          'certificates:',
          ...entries.map(([name, { chain, key }]) => `  ${name}: { chain: ${chain}, key: "${key}", tokens: [hsm] }`),
          'upstreams:',
          `  web: { servers: ${JSON.stringify(servers)} }`,
          'listeners:',
          `  https: { bind: ["127.0.0.1:0"], mode: offload, certificates: [${entries.map(([name]) => name).join(', ')}], upstream: web }`,
          extra,
        ].join('\n'),
      );
      return file;
    },
  };
}
