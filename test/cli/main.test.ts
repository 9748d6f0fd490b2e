/**
 * Owns: the command line as a whole: help, failures, exit codes, and what is loaded for what.
 * Must not know: what the commands do.
 * Runs: node:test; each command in a process of its own.
 */
import assert from 'node:assert/strict';
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { it } from 'node:test';
import { keygate } from '../support/command.ts';

const root = join(import.meta.dirname, '../..');

it('--help names every command and every exit code', async () => {
  const { exitCode, stdout, stderr } = await keygate(['--help']);
  assert.equal(exitCode, 0);
  assert.equal(stderr, '');
  for (const word of ['serve', 'check', 'demo', 'token', 'key', 'config', '64', '69', '77', '78'])
    assert.match(stdout, new RegExp(`\\b${word}\\b`));
});

it('--version is the version of the package', async () => {
  const { version } = JSON.parse(readFileSync(join(root, 'package.json'), 'utf8')) as { version: string };
  assert.deepEqual(await keygate(['--version']), { exitCode: 0, stdout: `${version}\n`, stderr: '' });
});

const misused: Record<string, { args: string[]; says: RegExp }> = {
  'no command': { args: [], says: /a command is missing/ },
  'half a command': { args: ['key'], says: /a command is missing/ },
  'an unknown command': { args: ['srve'], says: /unknown command 'srve'[^]*serve/ },
  'an unknown option': { args: ['check', '-c', 'x', '--jsn'], says: /unknown option '--jsn'[^]*--json/ },
  'a missing option': { args: ['serve'], says: /required option '-c, --config <file>'/ },
  'an option without its value': { args: ['serve', '-c'], says: /argument missing/ },
  'too many arguments': { args: ['config', 'schema', 'x'], says: /too many arguments/ },
  'a port that is none': { args: ['demo', '--port', '65536'], says: /whole number from 0 to 65535/ },
  'a port with a unit': { args: ['demo', '--port', '84e1'], says: /whole number/ },
  'no worker': { args: ['demo', '--workers', '0'], says: /from 1 to 1024/ },
  'a certificate for no day': { args: ['key', 'self-sign', '--label', 'a', '--days', '0'], says: /from 1 to 3650/ },
};
for (const [what, { args, says }] of Object.entries(misused)) {
  it(`${what} is a usage error with exit code 64`, async () => {
    const { exitCode, stdout, stderr } = await keygate(args);
    assert.equal(exitCode, 64);
    assert.equal(stdout, '');
    assert.match(stderr, says);
    assert.match(stderr, /^keygate: usage: /m);
    assert.match(stderr, /^hint: /m);
  });
}

it('no command takes a PIN as an argument', async () => {
  for (const command of [
    ['token', 'init'],
    ['key', 'generate'],
  ]) {
    const { stdout } = await keygate([...command, '--help']);
    assert.doesNotMatch(stdout, /--(?:so-)?pin[ =<]/);
    const { exitCode } = await keygate([...command, '--pin', '1234']);
    assert.equal(exitCode, 64);
  }
});

it('a wrong configuration prints one line per problem and exits with 78', async (test) => {
  const directory = mkdtempSync(join(tmpdir(), 'keygate-cli-'));
  test.after(() => rmSync(directory, { recursive: true }));
  const file = join(directory, 'keygate.yaml');
  writeFileSync(file, 'workers: 0\ntokns: {}\n');
  const { exitCode, stdout, stderr } = await keygate(['serve', '-c', file]);
  assert.equal(exitCode, 78);
  assert.equal(stdout, '');
  const lines = stderr.trimEnd().split('\n');
  assert.match(
    lines.find((line) => line.includes(':1:10 workers')) ?? '',
    /keygate\.yaml:1:10 workers: invalid value: found 0, expected auto/,
  );
  assert.match(lines.find((line) => line.includes(':2:1 tokns')) ?? '', /unknown key.*did you mean "tokens"\?$/);
  assert.match(lines.at(-1) ?? '', new RegExp(`^keygate: ${lines.length - 1} problems in the configuration$`));
});

it('a configuration that is not there exits with 78', async () => {
  const { exitCode, stderr } = await keygate(['serve', '-c', '/nonexistent/keygate.yaml']);
  assert.equal(exitCode, 78);
  assert.match(stderr, /^\/nonexistent\/keygate\.yaml: the file cannot be read: found ENOENT/);
});

it('config schema prints JSON, config reference prints a table', async () => {
  const schema = await keygate(['config', 'schema']);
  assert.equal((JSON.parse(schema.stdout) as { type: string }).type, 'object');
  const reference = await keygate(['config', 'reference']);
  assert.match(reference.stdout, /^\| key \| value \| default \| meaning \|\n/);
});

const loads: Record<string, { args: string[]; not: RegExp }> = {
  '--help loads no command': {
    args: ['--help'],
    not: /zod|yaml|graphene|pino|src\/(?:config|pkcs11|primary)|cli\/(?!main)/,
  },
  // Reading chains, for their staples, is no business with a token.
  'serve loads nothing that calls a PKCS#11 module': {
    args: ['serve', '-c', '/nonexistent'],
    not: /graphene|pkcs11js|src\/pkcs11\/(?!certificates|algorithm)/,
  },
};
for (const [what, { args, not }] of Object.entries(loads)) {
  it(what, async () => {
    const report = `import { registerHooks } from 'node:module';
      const loaded = [];
      registerHooks({ resolve(specifier, context, next) { const result = next(specifier, context); loaded.push(result.url); return result; } });
      process.on('exit', () => process.stderr.write('loaded ' + loaded.join(' ')));`;
    const { stderr } = await keygate(args, {
      NODE_OPTIONS: `--import data:text/javascript,${encodeURIComponent(report)}`,
    });
    const loaded = (/loaded (.*)$/.exec(stderr)?.[1] ?? '').replaceAll(`file://${root}/`, '');
    assert.match(loaded, /src\/cli\/main\.ts/);
    assert.doesNotMatch(loaded, not);
  });
}
