/**
 * Owns: the images of the Dockerfile: that they are built, what is in them, and that the demo in one serves.
 * Must not know: where base images come from on another machine: here they are made of Debian's packages and this machine's
 * Rust and Node, because no registry of images is needed then.
 * Runs: by `npm run test:images`, as root, with buildah and no daemon; the images run in systemd-nspawn.
 */
import assert from 'node:assert/strict';
import { execFileSync, spawn } from 'node:child_process';
import { once } from 'node:events';
import { existsSync, mkdirSync, readFileSync, readdirSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { after, before, describe, it } from 'node:test';
import { rootCertificates } from 'node:tls';
import { debianRoot, whyNotHere } from './debian-root.ts';

const checkout = join(import.meta.dirname, '../..');
const kept = join(checkout, '.keygate');
const buildah = ['--root', join(kept, 'images'), '--runroot', join(kept, 'images-run'), '--storage-driver', 'vfs'];
/** vfs has no shared layers: a build needs some gigabytes for a while. */
const buildDeadlineMs = 40 * 60_000;
/** The runtime image as it is, and what it may grow to before somebody should ask why. */
const runtimeMegabytesMax = 260;

const skip = whyNotHere('buildah', 'systemd-nspawn', 'rustc', 'npm');

describe('images', { skip, timeout: buildDeadlineMs }, () => {
  let runtime = '';
  let demo = '';

  before(() => {
    mkdirSync(kept, { recursive: true });
    const args = { BASE: baseImage(), RUST_IMAGE: rustImage(), NODE_IMAGE: nodeImage(), REVISION: 'abcdef123456' };
    build('runtime', args);
    build('demo', args);
    runtime = mounted('runtime');
    demo = mounted('demo');
  });
  after(() => {
    run('umount', '--all');
    run('rm', '--all');
    rmSync(join(kept, 'images-run'), { recursive: true, force: true });
  });

  it('the image runs as a number that is not root, and ends by SIGTERM', () => {
    const { config } = inspect('runtime');
    assert.deepEqual(config.User, '10001:10001');
    assert.deepEqual(config.Entrypoint, ['keygate']);
    assert.equal(config.StopSignal, 'SIGTERM');
    assert.equal(config.Labels['org.opencontainers.image.revision'], 'abcdef123456');
  });

  it('the image is small, and has no compiler, no package manager of Node and no source in it', (test) => {
    const bytes = Number(execFileSync('du', ['-sxb', runtime], { encoding: 'utf8' }).split('\t')[0]);
    test.diagnostic(
      `${Math.round(bytes / 1e6)} MB, of which /opt/keygate ${megabytesOf(join(runtime, 'opt/keygate'))}`,
    );
    assert.ok(bytes < runtimeMegabytesMax * 1e6, `${bytes} bytes`);
    for (const path of ['usr/bin/npm', 'usr/bin/gcc', 'usr/bin/python3', 'usr/bin/softhsm2-util', 'opt/keygate/src'])
      assert.ok(!existsSync(join(runtime, path)), path);
    assert.deepEqual(readdirSync(join(runtime, 'opt/keygate')).toSorted(), [
      'LICENSE',
      'bin',
      'dist',
      'node_modules',
      'package.json',
    ]);
    const development = ['typescript', 'knip', 'playwright-core', 'oxlint'];
    for (const name of development) assert.ok(!existsSync(join(runtime, 'opt/keygate/node_modules', name)), name);
    assert.ok(statSync(join(runtime, 'opt/keygate/dist/THIRD-PARTY-LICENCES')).size > 10_000);
  });

  it('nothing in the image may be written by its user, or runs as somebody else', () => {
    const found = execFileSync(
      'find',
      [runtime, '-xdev', '(', '-uid', '10001', '-o', '-perm', '/o+w', '-not', '-type', 'l', '-not', '-type', 'c', ')'],
      { encoding: 'utf8' },
    )
      .split('\n')
      .map((path) => path.slice(runtime.length))
      .filter((path) => path !== '' && !/^\/(?:tmp|var\/tmp|run\/lock|dev\/.*)$/.test(path));
    assert.deepEqual(found, []);
  });

  it('it says what it is', async () => {
    const { output } = await inside(runtime, ['keygate', '--version']);
    assert.match(output, /^\d+\.\d+\.\d+ \(abcdef123456, linux-/);
  });

  it('it refuses a configuration that is not there', async () => {
    const { exitCode, output } = await inside(runtime, ['keygate', 'serve', '-c', '/etc/keygate/keygate.yaml']);
    assert.equal(exitCode, 78);
    assert.match(output, /config_unreadable/);
  });

  it('the demo serves, in a container that can write nothing but /tmp, and its health check knows', async (test) => {
    // By itself, so that no port of this machine is taken.
    const machine = start(demo, [
      'bash',
      '-c',
      `keygate demo & keygate=$!
       for _ in $(seq 300); do
         (exec 3<>/dev/tcp/127.0.0.1/8443) 2>/dev/null && ${healthCheck()} && break; sleep 0.1
       done
       ${healthCheck()} && echo healthy
       /opt/keygate/node_modules/.bin/node -e "
         const ca = require('node:fs').readFileSync('/tmp/keygate/demo/p256.pem');
         require('node:https').get({ host: 'localhost', port: 8443, ca, agent: false }, (response) => response.pipe(process.stdout));"
       touch /opt/keygate/written 2>/dev/null && echo writable
       kill -TERM $keygate; wait $keygate; echo "left with $?"; ${healthCheck()} || echo unhealthy`,
    ]);
    test.after(() => machine.kill());
    const { output } = await machine.ended;
    assert.match(output, /^healthy$/m, output);
    assert.match(output, /arrived as plaintext; the private key is still in the token/, output);
    assert.doesNotMatch(output, /^writable$/m);
    assert.match(output, /^left with 0$/m, output);
    assert.match(output, /^unhealthy$/m, output);
  });
});

interface ImageConfig {
  readonly User: string;
  readonly Entrypoint: readonly string[];
  readonly StopSignal: string;
  readonly Labels: Readonly<Record<string, string>>;
  readonly Healthcheck?: { readonly Test: readonly string[] };
}

function run(...args: readonly string[]): string {
  return execFileSync('nice', ['buildah', ...buildah, ...args], {
    encoding: 'utf8',
    stdio: ['ignore', 'pipe', 'inherit'],
    maxBuffer: 64 * 1024 * 1024,
  }).trim();
}

function build(target: string, args: Readonly<Record<string, string>>): void {
  run(
    'bud',
    '--isolation=chroot',
    '--format=docker',
    '--layers',
    '--quiet',
    `--target=${target}`,
    `--tag=keygate-${target}`,
    ...Object.entries(args).map(([name, value]) => `--build-arg=${name}=${value}`),
    checkout,
  );
}

function inspect(target: string): { readonly config: ImageConfig } {
  const { Docker } = JSON.parse(run('inspect', '--type=image', `keygate-${target}`)) as {
    readonly Docker: { readonly config: ImageConfig };
  };
  return Docker;
}

function mounted(target: string): string {
  return run('mount', run('from', '--pull-never', `keygate-${target}`));
}

/** As the image has it, for a shell. */
function healthCheck(): string {
  const [kind, ...command] = inspect('runtime').config.Healthcheck?.Test ?? [];
  assert.equal(kind, 'CMD');
  return command.map((word) => `'${word.replaceAll("'", `'\\''`)}'`).join(' ');
}

interface Ended {
  readonly exitCode: number | null;
  readonly output: string;
}

/** As a container runtime would at its strictest: read-only, one user, no capability, a network of its own. */
function start(root: string, command: readonly string[]): { readonly ended: Promise<Ended>; kill(): void } {
  const child = spawn(
    'unshare',
    [
      '--fork',
      '--pid',
      '--mount-proc',
      '--kill-child=KILL',
      'systemd-nspawn',
      '--quiet',
      '--register=no',
      '--keep-unit',
      '--private-network',
      '--as-pid2',
      '--console=pipe',
      `--directory=${root}`,
      '--read-only',
      '--tmpfs=/tmp',
      '--drop-capability=all',
      '--no-new-privileges=yes',
      '--user=keygate',
      '--setenv=XDG_STATE_HOME=/tmp',
      '--setenv=KEYGATE_ADMIN=http://127.0.0.1:9180',
      ...command,
    ],
    { stdio: ['ignore', 'pipe', 'pipe'], timeout: 120_000, killSignal: 'SIGKILL' },
  );
  let output = '';
  for (const stream of [child.stdout, child.stderr])
    createInterface({ input: stream }).on('line', (line) => {
      output += `${line}\n`;
    });
  const ended = once(child, 'close').then(([exitCode]): Ended => ({ exitCode: exitCode as number | null, output }));
  return { ended, kill: () => child.kill('SIGKILL') };
}

async function inside(root: string, command: readonly string[]): Promise<Ended> {
  return start(root, command).ended;
}

/** An image of a folder, made once. */
function imageOf(name: string, fill: (add: (source: string, target: string) => void) => readonly string[]): string {
  const image = `localhost/keygate-${name}`;
  if (run('images', '--quiet', '--filter', `reference=${image}`) !== '') return image;
  const container = run('from', 'scratch');
  const settings = fill((source, target) => run('copy', '--quiet', container, source, target));
  run('config', ...settings, container);
  run('commit', '--quiet', '--rm', container, image);
  return image;
}

function baseImage(): string {
  return imageOf('base', (add) => {
    add(debianRoot('base', []), '/');
    return ['--env', 'PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin'];
  });
}

function rustImage(): string {
  return imageOf('rust', (add) => {
    add(debianRoot('rust', ['gcc', 'libc6-dev', 'binutils']), '/');
    const sysroot = execFileSync('rustc', ['--print', 'sysroot'], { encoding: 'utf8' }).trim();
    for (const part of ['bin', 'lib', 'share/doc/rust'].filter((name) => existsSync(join(sysroot, name))))
      add(join(sysroot, part), `/usr/local/${part}`);
    return [...trust(add), '--env', 'PATH=/usr/local/bin:/usr/bin:/bin', '--env', 'CARGO_HOME=/usr/local/cargo'];
  });
}

function nodeImage(): string {
  return imageOf('node', (add) => {
    add(debianRoot('node', ['libatomic1']), '/');
    const root = execFileSync('npm', ['root', '--global'], { encoding: 'utf8' }).trim();
    add(process.execPath, '/usr/local/bin/node');
    add(join(root, 'npm'), '/usr/local/lib/node_modules/npm');
    const link = join(kept, 'npm');
    writeFileSync(link, '#!/bin/sh\nexec node /usr/local/lib/node_modules/npm/bin/npm-cli.js "$@"\n', { mode: 0o755 });
    add(link, '/usr/local/bin/npm');
    return [...trust(add), '--env', 'PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin'];
  });
}

/** Whom this machine trusts, where registries are reached by a proxy. Only images that build have it. */
function trust(add: (source: string, target: string) => void): readonly string[] {
  const bundle = '/etc/ssl/certs/ca-certificates.crt';
  const file = join(kept, 'ca.pem');
  writeFileSync(file, existsSync(bundle) ? readFileSync(bundle) : rootCertificates.join('\n'));
  add(file, bundle);
  return ['--env', `NODE_EXTRA_CA_CERTS=${bundle}`];
}

function megabytesOf(directory: string): string {
  return readdirSync(directory)
    .map((name) => {
      const bytes = execFileSync('du', ['-sb', join(directory, name)], { encoding: 'utf8' }).split('\t')[0];
      return `${name} ${Math.round(Number(bytes) / 1e6)}`;
    })
    .join(', ');
}
