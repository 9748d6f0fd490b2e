/**
 * Owns: `keygate demo` after starts that did not end well, and when its ports are taken.
 * Must not know: how the demo remembers what it has done.
 * Runs: the demo in process groups of its own, a directory per test.
 */
import assert from 'node:assert/strict';
import { execFileSync, spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { request } from 'node:https';
import { createServer } from 'node:net';
import type { AddressInfo } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { text } from 'node:stream/consumers';
import { it } from 'node:test';
import type { TestContext } from 'node:test';
import { fileURLToPath } from 'node:url';
import { disposableToken } from '../support/softhsm.ts';

it('killed at each of its steps, it starts in the end', async (test) => {
  const demo = demoIn(privateDirectory(test));
  for (const during of ['private directory', 'SoftHSM token', 'p256 key', 'rsa2048 key', 'HTTP upstream']) {
    const started = demo.start(test);
    await started.printed(during);
    await started.end('SIGKILL');
  }
  await demo.serves(test);
});

it('a token that was left without a PIN, and certificates that are cut off or gone, are made anew', async (test) => {
  const directory = privateDirectory(test);
  const { module, dispose } = disposableToken({ empty: true });
  test.after(dispose);
  const softHsmConfig = join(directory, 'softhsm2.conf');
  mkdirSync(join(directory, 'tokens'));
  writeFileSync(softHsmConfig, `directories.tokendir = ${join(directory, 'tokens')}\nobjectstore.backend = file\n`);
  const initialise = ['--init-token', '--slot-index', '0', '--label', 'keygate-demo', '--so-pin', '58820417'];
  execFileSync('pkcs11-tool', ['--module', module, ...initialise], {
    stdio: 'pipe',
    env: { ...process.env, SOFTHSM2_CONF: softHsmConfig },
  });

  const demo = demoIn(directory);
  await demo.serves(test);
  rmSync(join(directory, 'rsa2048.pem'));
  writeFileSync(join(directory, 'p256.pem'), readFileSync(join(directory, 'p256.pem')).subarray(0, 100));
  await demo.serves(test);
});

it('a port that is taken is reported with the option that chooses another one', async (test) => {
  const demo = demoIn(privateDirectory(test));
  const taken = createServer().listen(0, '127.0.0.1');
  test.after(() => taken.close());
  await once(taken, 'listening');
  const { port } = taken.address() as AddressInfo;
  for (const option of ['--admin-port', '--port']) {
    const { exitCode, stderr } = await demo.start(test, option, `${port}`).ended;
    assert.equal(exitCode, 1, stderr);
    assert.match(stderr, new RegExp(`EADDRINUSE[^]*hint: choose another ${option}, or 0`));
    assert.doesNotMatch(stderr, /admin\.listen/);
  }
});

function demoIn(directory: string) {
  const start = (test: TestContext, ...args: readonly string[]) => startDemo(test, directory, args);
  return {
    start,
    /** Starts, answers over TLS with the certificate that is said to be its own, and ends with 0. */
    async serves(test: TestContext): Promise<void> {
      const demo = start(test);
      const output = await demo.printed('stop     Ctrl-C');
      const port = /https:\/\/localhost:(\d+)/.exec(output)?.[1] ?? '';
      const asked = request({ host: '127.0.0.1', port, ca: readFileSync(join(directory, 'p256.pem')), agent: false });
      asked.end();
      const [response] = (await once(asked, 'response')) as [import('node:http').IncomingMessage];
      assert.match(await text(response), /arrived as plaintext/);
      const { exitCode, stderr } = await demo.end('SIGTERM');
      assert.equal(exitCode, 0, stderr);
    },
  };
}

function startDemo(test: TestContext, directory: string, args: readonly string[]) {
  // What comes last counts: a test may choose a port.
  const anyPort = ['--port', '0', '--admin-port', '0'];
  const child = spawn(process.execPath, [main, 'demo', '--dir', directory, '--workers', '1', ...anyPort, ...args], {
    stdio: ['ignore', 'pipe', 'pipe'],
    // A group of its own, so that its commands and workers end with it.
    detached: true,
  });
  const signal = (name: NodeJS.Signals, pid: number) => {
    try {
      process.kill(pid, name);
    } catch {
      // Nothing is left of it.
    }
  };
  const { pid } = child;
  assert.ok(pid !== undefined);
  test.after(() => signal('SIGKILL', -pid));
  const output = { stdout: '', stderr: '' };
  const printed = (stream: 'stdout' | 'stderr', chunk: string) => (output[stream] += chunk);
  child.stdout.setEncoding('utf8').on('data', (chunk: string) => printed('stdout', chunk));
  child.stderr.setEncoding('utf8').on('data', (chunk: string) => printed('stderr', chunk));
  const ended = once(child, 'close').then(([exitCode]: unknown[]) => ({ exitCode, ...output }));
  return {
    ended,
    /** Waits until the words are printed. @returns all that is. */
    async printed(words: string): Promise<string> {
      while (!output.stdout.includes(words)) {
        const more = await Promise.race([once(child.stdout, 'data'), ended]);
        if (!Array.isArray(more))
          assert.fail(`the demo ended before it printed "${words}":\n${output.stdout}${output.stderr}`);
      }
      return output.stdout;
    },
    /** SIGKILL reaches all of it, as when a machine stops; other signals the demo alone. */
    async end(name: NodeJS.Signals) {
      signal(name, name === 'SIGKILL' ? -pid : pid);
      return ended;
    },
  };
}

function privateDirectory(test: TestContext): string {
  const directory = mkdtempSync(join(tmpdir(), 'keygate-demo-'));
  test.after(() => rmSync(directory, { recursive: true, force: true }));
  return directory;
}

const main = fileURLToPath(new URL('../../src/cli/main.ts', import.meta.url));
