/**
 * Owns: `keygate token` as its users see it.
 * Must not know: how tokens are found.
 * Runs: the command in child processes, a token directory per test.
 */
import assert from 'node:assert/strict';
import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { it } from 'node:test';
import type { TestContext } from 'node:test';
import { keygate } from '../support/command.ts';
import { disposableToken } from '../support/softhsm.ts';

it('token list shows label, serial, state and mechanisms, as a table and as JSON', async (test) => {
  const { disposable, list } = bench(test);
  const table = await keygate(['token', 'list', '--module', disposable.module], disposable.env);
  assert.equal(table.exitCode, 0, table.stderr);
  assert.match(table.stdout, /^LABEL +SERIAL +MODEL +STATE/);
  assert.match(table.stdout, /^keygate-test +[0-9a-f]{16} +SoftHSM v2 +ready .*ECDSA/m);
  assert.match(table.stdout, /^- .*empty/m);
  const token = (await list()).find(({ label }) => label === disposable.label);
  assert.deepEqual(token?.state, ['ready']);
  assert.ok(token?.mechanisms.includes('CKM_RSA_PKCS_PSS'));
});

it('token init makes a token that can be logged in to, shows no PIN, and does not touch it again', async (test) => {
  const { disposable, soPinFile, list } = bench(test);
  const init = () =>
    keygate(
      [
        'token',
        'init',
        '--module',
        disposable.module,
        '--label',
        'fresh',
        '--pin-file',
        disposable.pinFile,
        '--so-pin-file',
        soPinFile,
      ],
      disposable.env,
    );
  const first = await init();
  assert.equal(first.exitCode, 0, first.stderr);
  assert.match(first.stdout, /token "fresh" \(serial [0-9a-f]{16}\): initialised/);
  const keys = await keygate(
    ['key', 'list', '--module', disposable.module, '--token', 'fresh', '--pin-file', disposable.pinFile],
    disposable.env,
  );
  assert.equal(keys.exitCode, 0, keys.stderr);
  const second = await init();
  assert.equal(second.exitCode, 69);
  assert.match(second.stderr, /not initialised again/);
  assert.equal((await list()).filter(({ label }) => label === 'fresh').length, 1);
  for (const { stdout, stderr } of [first, second, keys])
    assert.doesNotMatch(stdout + stderr, new RegExp(`${disposable.pin}|${disposable.soPin}`));
});

it('a label of 32 bytes is taken, of 33 bytes or none refused', async (test) => {
  const { disposable, soPinFile } = bench(test);
  const init = (label: string) =>
    keygate(
      [
        'token',
        'init',
        '--module',
        disposable.module,
        '--label',
        label,
        '--pin-file',
        disposable.pinFile,
        '--so-pin-file',
        soPinFile,
      ],
      disposable.env,
    );
  assert.equal((await init('x'.repeat(32))).exitCode, 0);
  assert.equal((await init('x'.repeat(33))).exitCode, 64);
  assert.equal((await init('')).exitCode, 64);
});

it('a PIN file that others can read is refused before the token is touched', async (test) => {
  const { disposable, soPinFile, list } = bench(test);
  const open = join(disposable.directory, 'open');
  writeFileSync(open, '1234\n', { mode: 0o644 });
  const { exitCode, stderr } = await keygate(
    [
      'token',
      'init',
      '--module',
      disposable.module,
      '--label',
      'fresh',
      '--pin-file',
      open,
      '--so-pin-file',
      soPinFile,
    ],
    disposable.env,
  );
  assert.equal(exitCode, 77);
  assert.match(stderr, /chmod/);
  assert.equal(
    (await list()).some(({ label }) => label === 'fresh'),
    false,
  );
});

it('a module that is not there ends with 69, and no module with 64', async () => {
  const absent = await keygate(['token', 'list', '--module', '/nonexistent/module.so']);
  assert.equal(absent.exitCode, 69);
  assert.match(absent.stderr, /\/nonexistent\/module\.so/);
  assert.equal((await keygate(['token', 'list'])).exitCode, 64);
});

function bench(test: TestContext) {
  const disposable = disposableToken();
  test.after(() => disposable.dispose());
  const soPinFile = join(disposable.directory, 'so-pin');
  writeFileSync(soPinFile, `${disposable.soPin}\n`, { mode: 0o600 });
  return {
    disposable,
    soPinFile,
    list: async (): Promise<ListedToken[]> =>
      JSON.parse((await keygate(['token', 'list', '--module', disposable.module, '--json'], disposable.env)).stdout),
  };
}

interface ListedToken {
  readonly label: string;
  readonly state: readonly string[];
  readonly mechanisms: readonly string[];
}
