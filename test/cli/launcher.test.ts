/**
 * Owns: bin/keygate: it finds its Node and its program from anywhere and becomes them.
 * Must not know: what the program does.
 * Runs: node:test; the launcher in processes of its own.
 */
import assert from 'node:assert/strict';
import { spawn, spawnSync } from 'node:child_process';
import { once } from 'node:events';
import { chmodSync, cpSync, mkdirSync, mkdtempSync, realpathSync, rmSync, symlinkSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { text } from 'node:stream/consumers';
import { it, type TestContext } from 'node:test';

const launcher = join(import.meta.dirname, '../../bin/keygate');

it('works through symbolic links and from any directory', (test) => {
  const directory = privateDirectory(test);
  symlinkSync(launcher, join(directory, 'first'));
  symlinkSync('first', join(directory, 'keygate'));
  const { status, stdout } = spawnSync(join(directory, 'keygate'), ['--version'], { cwd: '/', encoding: 'utf8' });
  assert.equal(status, 0);
  assert.match(stdout, /^\d+\.\d+\.\d+\n$/);
});

it('keeps the process id, so that signals reach keygate', async () => {
  const child = spawn(launcher, ['--version'], {
    env: {
      ...process.env,
      NODE_OPTIONS: `--import data:text/javascript,${encodeURIComponent('process.stderr.write(String(process.pid))')}`,
    },
    stdio: ['ignore', 'ignore', 'pipe'],
  });
  const [stderr] = await Promise.all([text(child.stderr), once(child, 'exit')]);
  // The launcher asks that Node for its version before.
  assert.ok(stderr.endsWith(String(child.pid)), stderr);
});

it('passes arguments on as they are', () => {
  const { status, stderr } = spawnSync(launcher, ['serve', '-c', '/nonexistent/a b*$(c)'], { encoding: 'utf8' });
  assert.equal(status, 78);
  assert.ok(stderr.startsWith('/nonexistent/a b*$(c): '), stderr);
});

it('runs dist when it is packaged, with the Node beside the package', (test) => {
  const modules = join(privateDirectory(test), 'node_modules');
  installation(join(modules, 'keygate'), 'dist/cli/main.js');
  fakeNode(join(modules, '.bin'), 'v26.0.0');
  const { status, stdout } = spawnSync(join(modules, 'keygate/bin/keygate'), ['a', 'b c'], { encoding: 'utf8' });
  assert.equal(status, 0);
  assert.equal(stdout, `${join(modules, 'keygate/dist/cli/main.js')}|a|b c|\n`);
});

it('an older Node is refused with a sentence and exit code 69', (test) => {
  const root = privateDirectory(test);
  installation(root, 'src/cli/main.ts');
  fakeNode(join(root, 'node_modules/.bin'), 'v20.20.2');
  const { status, stderr } = spawnSync(join(root, 'bin/keygate'), [], { encoding: 'utf8' });
  assert.equal(status, 69);
  assert.match(stderr, /Node 26 or newer is needed.*v20\.20\.2/);
});

function privateDirectory(test: TestContext): string {
  const directory = realpathSync(mkdtempSync(join(tmpdir(), 'keygate-launcher-')));
  test.after(() => rmSync(directory, { recursive: true }));
  return directory;
}

function installation(root: string, main: string): void {
  mkdirSync(join(root, 'bin'), { recursive: true });
  cpSync(launcher, join(root, 'bin/keygate'));
  mkdirSync(join(root, main, '..'), { recursive: true });
  writeFileSync(join(root, main), '');
}

/** Says a version, and otherwise what it was called with. */
function fakeNode(directory: string, version: string): void {
  mkdirSync(directory, { recursive: true });
  const file = join(directory, 'node');
  writeFileSync(file, `#!/bin/sh\nif [ "$1" = --version ]; then echo ${version}; else printf '%s|' "$@"; echo; fi\n`);
  chmodSync(file, 0o755);
}
