/**
 * Owns: `keygate key` as its users see it.
 * Must not know: how keys are generated and certificates made.
 * Runs: the command in child processes, a token directory per test.
 */
import assert from 'node:assert/strict';
import { createPublicKey, X509Certificate } from 'node:crypto';
import { execFileSync } from 'node:child_process';
import { readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { it } from 'node:test';
import type { TestContext } from 'node:test';
import { keygate } from '../support/command.ts';
import type { CommandResult } from '../support/command.ts';
import { disposableToken } from '../support/softhsm.ts';

it('a key is generated, listed, and makes a request and a certificate of its own', async (test) => {
  const { directory, key } = bench(test);
  const generated = await key('generate', '--label', 'www', '--type', 'p256');
  assert.match(succeeded(generated), /p256 key "www" \(id [0-9a-f]{40}\): generated/);
  assert.match(succeeded(await key('list')), /^www +[0-9a-f]{40} +private +EC +no$/m);

  const request = join(directory, 'www.csr');
  succeeded(
    await key(
      'csr',
      '--label',
      'www',
      '--dns',
      'www.example.org',
      '--dns',
      '*.example.net',
      '--ip',
      '192.0.2.1',
      '--out',
      request,
    ),
  );
  execFileSync('openssl', ['req', '-verify', '-noout', '-in', request], { stdio: 'ignore' });

  const certificate = join(directory, 'www.pem');
  succeeded(await key('self-sign', '--label', 'www', '--dns', 'www.example.org', '--days', '30', '--out', certificate));
  execFileSync('openssl', ['verify', '-CAfile', certificate, certificate], { stdio: 'ignore' });
  const parsed = new X509Certificate(readFileSync(certificate));
  const requested = createPublicKey(execFileSync('openssl', ['req', '-pubkey', '-noout', '-in', request]));
  assert.ok(parsed.publicKey.equals(requested));
  assert.equal(parsed.validToDate.getTime() - parsed.validFromDate.getTime(), 30 * 86_400_000);
  const client = succeeded(await key('self-sign', '--label', 'www', '--dns', 'www.example.org', '--purpose', 'client'));
  assert.deepEqual(new X509Certificate(client).keyUsage, ['1.3.6.1.5.5.7.3.2']);
});

it('without a file the result goes to standard output, and a file that is there is not overwritten', async (test) => {
  const { directory, key } = bench(test);
  succeeded(await key('generate', '--label', 'www', '--type', 'p256'));
  assert.match(
    succeeded(await key('csr', '--label', 'www', '--dns', 'localhost')),
    /^-----BEGIN CERTIFICATE REQUEST-----\n/,
  );
  const file = join(directory, 'precious');
  writeFileSync(file, 'precious');
  const refused = await key('csr', '--label', 'www', '--dns', 'localhost', '--out', file);
  assert.equal(refused.exitCode, 1);
  assert.match(refused.stderr, /precious: is there already/);
  assert.equal(readFileSync(file, 'utf8'), 'precious');
});

it('a ticket key is generated, and its label taken', async (test) => {
  const { key } = bench(test);
  succeeded(await key('generate', '--label', 'tickets', '--type', 'ticket'));
  assert.match(succeeded(await key('list')), /^tickets +- +secret +generic secret +no$/m);
  const again = await key('generate', '--label', 'tickets', '--type', 'p256');
  assert.equal(again.exitCode, 69);
  assert.match(again.stderr, /"tickets" is there already/);
});

it('a key that could leave is shouted about', async (test) => {
  const { disposable, key } = bench(test);
  disposable.pkcs11Tool(
    '--keypairgen',
    '--key-type',
    'EC:prime256v1',
    '--label',
    'loose',
    '--id',
    '01',
    '--extractable',
  );
  assert.match(succeeded(await key('list')), /^loose +01 +private +EC +YES$/m);
});

it('what is not understood ends with 64 and says what is expected', async (test) => {
  const { key } = bench(test);
  const refused: [[string, ...string[]], RegExp][] = [
    [['generate', '--label', 'www', '--type', 'dsa'], /p256, p384, rsa2048/],
    [['generate', '--label', '', '--type', 'p256'], /expected 1 to 255/],
  ];
  for (const [args, message] of refused) {
    const { exitCode, stderr } = await key(...args);
    assert.equal(exitCode, 64, stderr);
    assert.match(stderr, message);
  }
  succeeded(await key('generate', '--label', 'www', '--type', 'p256'));
  const malformed: [string, ...string[]][] = [
    ['csr', '--label', 'www'],
    ['csr', '--label', 'www', '--dns', 'a b'],
    ['csr', '--label', 'www', '--dns', 'localhost', '--purpose', 'mail'],
    ['csr', '--label', 'www', '--dns', 'localhost', '--id', 'xyz'],
  ];
  for (const args of malformed) assert.equal((await key(...args)).exitCode, 64, args.join(' '));
});

it('a wrong PIN is tried once, ends with 77 naming the token, and no PIN is in any output', async (test) => {
  const { disposable, directory } = bench(test);
  const wrongPin = '66602841';
  const pinFile = join(directory, 'wrong-pin');
  writeFileSync(pinFile, wrongPin, { mode: 0o600 });
  const { exitCode, stdout, stderr } = await keygate(
    ['key', 'list', '--module', disposable.module, '--token', disposable.label, '--pin-file', pinFile],
    disposable.env,
  );
  assert.equal(exitCode, 77);
  assert.match(stderr, /token keygate-test: .*CKR_PIN_INCORRECT/);
  assert.doesNotMatch(stdout + stderr, new RegExp(wrongPin));
});

it('two sources of the PIN, or none, end with 64', async (test) => {
  const { disposable } = bench(test);
  const args = ['key', 'list', '--module', disposable.module, '--token', disposable.label];
  const env = { ...disposable.env, KEYGATE_TEST_PIN: disposable.pin };
  assert.equal((await keygate(args, env)).exitCode, 64);
  assert.equal(
    (await keygate([...args, '--pin-file', disposable.pinFile, '--pin-env', 'KEYGATE_TEST_PIN'], env)).exitCode,
    64,
  );
  const good = await keygate([...args, '--pin-env', 'KEYGATE_TEST_PIN'], env);
  assert.equal(good.exitCode, 0, good.stderr);
});

function bench(test: TestContext) {
  const disposable = disposableToken();
  test.after(() => disposable.dispose());
  return {
    disposable,
    directory: disposable.directory,
    key: (command: string, ...args: readonly string[]) =>
      keygate(
        [
          'key',
          command,
          '--module',
          disposable.module,
          '--token',
          disposable.label,
          '--pin-file',
          disposable.pinFile,
          ...args,
        ],
        disposable.env,
      ),
  };
}

function succeeded({ exitCode, stdout, stderr }: CommandResult): string {
  assert.equal(exitCode, 0, stderr);
  return stdout;
}
