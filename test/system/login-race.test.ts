/**
 * Owns: many engines that log in to one SoftHSM token at the same moment, and what must be left of the token.
 * Must not know: how logins are kept apart.
 * Runs: real engines in child processes; one disposable token per test.
 */
import assert from 'node:assert/strict';
import { chmodSync, chownSync, lstatSync, readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { it } from 'node:test';
import type { TestContext } from 'node:test';
import { engineParameters, startEngineProcess } from '../support/engine-process.ts';
import { startKeygate } from '../support/keygate.ts';
import { whyNotNobody } from '../support/nobody.ts';
import { provisionedToken } from '../support/provisioned-token.ts';
import type { ProvisionedToken } from '../support/provisioned-token.ts';

it(
  '200 starts and stops of engines, four processes at a time, leave the token whole',
  { timeout: 120_000 },
  async (test) => {
    const token = await tokenFor(test);
    const processes = Array.from({ length: 4 }, () => startEngineProcess(test, engineParameters(token), token.env));
    for (const engines of processes) engines.order({ do: 'rounds', count: 50 });
    for (const engines of processes) {
      assert.deepEqual(await engines.answer(), { rounds: 50 });
      engines.order({ do: 'exit' });
      assert.equal(await engines.ended(), 'exit 0');
    }
    assertWhole(token);
    await assertStarts(test, token);
  },
);

it('the whole service starts and stops again and again on one token', { timeout: 120_000 }, async (test) => {
  const token = await tokenFor(test);
  for (let round = 0; round < 10; round++) {
    const keygate = await startKeygate(token, {
      workers: 2,
      upstreams: { echo: { servers: ['127.0.0.1:1'] } },
      listeners: { tls: { upstream: 'echo' } },
    });
    await keygate.stop();
  }
  assertWhole(token);
});

it(
  'processes that start their first engine at the same moment all start, round after round',
  { timeout: 120_000 },
  async (test) => {
    const token = await tokenFor(test);
    for (let round = 0; round < 5; round++) {
      const processes = Array.from({ length: 6 }, () => startEngineProcess(test, engineParameters(token), token.env));
      for (const engines of processes) engines.order({ do: 'start' });
      for (const engines of processes) await engines.answer();
      for (const { child } of processes) child.kill('SIGTERM');
      for (const engines of processes) assert.equal(await engines.ended(), 'exit 0');
    }
    assertWhole(token);
  },
);

it(
  'a token that its workers can only read survives workers that are killed while they start',
  // Root can write whatever the mode says, so it becomes somebody else.
  { timeout: 120_000, skip: process.getuid?.() === 0 && whyNotNobody() },
  async (test) => {
    const token = await tokenFor(test);
    const before = tokenObject(token);
    const { account, restore } = readOnly(token.directory);
    try {
      for (let round = 0; round < 12; round++) {
        const engines = startEngineProcess(test, engineParameters(token), token.env, account);
        engines.order({ do: 'rounds', count: 1000 });
        // Spread over start and login: that it was in the middle of something is certain, of what is left to chance.
        await new Promise((resolve) => setTimeout(resolve, 100 + 15 * round));
        engines.child.kill('SIGKILL');
        assert.equal(await engines.ended(), 'SIGKILL');
      }
      assert.deepEqual(tokenObject(token), before);
      await assertStarts(test, token, account);
    } finally {
      restore();
    }
  },
);

async function tokenFor(test: TestContext): Promise<ProvisionedToken> {
  const token = await provisionedToken({ www: { kind: 'p256' } });
  test.after(token.dispose);
  return token;
}

/** SoftHSM 2.6.1 truncates this file before it writes it again: a lost login race leaves it empty and the token unusable. */
function assertWhole(token: ProvisionedToken): void {
  assert.notEqual(tokenObject(token).length, 0);
  assert.match(token.pkcs11Tool('--list-objects', '--type', 'privkey'), /label: +www/);
}

async function assertStarts(
  test: TestContext,
  token: ProvisionedToken,
  account: { readonly uid?: number } = {},
): Promise<void> {
  const engines = startEngineProcess(test, engineParameters(token), token.env, account);
  engines.order({ do: 'start' });
  assert.match(JSON.stringify(await engines.answer()), /127\.0\.0\.1:\d+/);
  engines.order({ do: 'exit' });
  assert.equal(await engines.ended(), 'exit 0');
}

function tokenObject({ directory: parent }: ProvisionedToken): Buffer {
  const tokens = join(parent, 'tokens');
  const [directory = ''] = readdirSync(tokens);
  return readFileSync(join(tokens, directory, 'token.object'));
}

/** Takes away the right to write; root has it anyway, so its workers run as somebody else. */
function readOnly(directory: string): {
  readonly account: { readonly uid?: number; readonly gid?: number };
  restore(): void;
} {
  const isRoot = process.getuid?.() === 0;
  const paths = [
    directory,
    ...readdirSync(directory, { recursive: true, encoding: 'utf8' }).map((path) => join(directory, path)),
  ];
  const isDirectory = (path: string) => lstatSync(path).isDirectory();
  for (const path of paths) {
    chmodSync(path, isDirectory(path) ? 0o550 : 0o440);
    if (isRoot) chownSync(path, 0, nobody);
  }
  return {
    account: isRoot ? { uid: nobody, gid: nobody } : {},
    restore: () => {
      for (const path of paths) if (isDirectory(path)) chmodSync(path, 0o700);
    },
  };
}

const nobody = 65_534;
