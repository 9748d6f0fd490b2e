/**
 * Owns: the package that `npm pack` makes: what is in it, and that it works where it is installed.
 * Must not know: what keygate does.
 * Runs: node:test; npm and the installed keygate in processes of their own, all their files in one private directory.
 */
import assert from 'node:assert/strict';
import { execFile, execFileSync, spawn, spawnSync } from 'node:child_process';
import { once } from 'node:events';
import { existsSync, globSync, mkdirSync, mkdtempSync, readFileSync, rmSync, symlinkSync } from 'node:fs';
import { request } from 'node:https';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { text } from 'node:stream/consumers';
import { after, before, it } from 'node:test';
import type { TestContext } from 'node:test';
import { promisify } from 'node:util';

const run = promisify(execFile);
const root = join(import.meta.dirname, '../..');
const directory = mkdtempSync(join(tmpdir(), 'keygate-package-'));
const { version } = JSON.parse(readFileSync(join(root, 'package.json'), 'utf8')) as { version: string };
/** npm installs itself with a Node of its own; what stands in its cache need not be fetched again. */
const npmCache = execFileSync('npm', ['config', 'get', 'cache'], { cwd: root, encoding: 'utf8' }).trim();

let tarball = '';

before(async () => {
  const { stdout } = await run('npm', ['pack', '--json', '--pack-destination', directory], {
    cwd: root,
    // What npm is run from is not what it packs.
    env: { ...process.env, KEYGATE_REVISION: 'abcdef012345' },
  });
  const [packed] = JSON.parse(stdout.slice(stdout.indexOf('[\n'))) as { readonly filename: string }[];
  tarball = join(directory, packed?.filename ?? '');
});
after(() => rmSync(directory, { recursive: true, force: true }));

it('has what keygate needs, and nothing that it is made or tested with', () => {
  const files = execFileSync('tar', ['-tzf', tarball], { encoding: 'utf8' })
    .trimEnd()
    .split('\n')
    .map((path) => path.replace('package/', ''));
  for (const wanted of [
    'LICENSE',
    'README.md',
    'CHANGELOG.md',
    'docs/production.md',
    'bin/keygate',
    'dist/cli/main.js',
    'dist/worker/main.js',
    'dist/engine/keygate-engine.node',
    'dist/build.json',
    'dist/sbom.cdx.json',
    'dist/THIRD-PARTY-LICENCES',
    'native-config/systemd/keygate.service',
    'node_modules/pkcs11js/build/Release/pkcs11.node',
  ])
    assert.ok(files.includes(wanted), `${wanted} is missing`);

  const own = files.filter((path) => !path.startsWith('node_modules/'));
  const unwanted =
    /\.(?:ts|rs|toml|lock|log|tgz)$|(?:^|\/)(?:test|bench|scripts|target|src|\.git|\.keygate)\/|package-lock/;
  assert.deepEqual(
    own.filter((path) => unwanted.test(path)),
    [],
  );
  // With one of them npm would compile it again, or refuse to.
  assert.deepEqual(
    files.filter((path) => path.endsWith('binding.gyp')),
    [],
  );
  const executables = files.filter((path) => path.endsWith('.node'));
  assert.deepEqual(executables.toSorted(), [
    'dist/engine/keygate-engine.node',
    'node_modules/pkcs11js/build/Release/pkcs11.node',
  ]);
});

it('has every file beside the TypeScript that the program may read', () => {
  const assets = globSync('src/**/*.{html,css,js,svg,json}', { cwd: root, exclude: ['src/engine/**'] });
  for (const asset of assets) {
    const packed = asset.replace(/^src/, 'dist');
    assert.deepEqual(readFileSync(join(root, packed)), readFileSync(join(root, asset)), packed);
  }
});

it('is installed without a compiler, and its demo serves', async (test) => {
  const keygate = await install(test, 'with-node', ['--prefer-offline', '--cache', npmCache]);
  assert.equal(keygate.run('--version').stdout, `${version} (abcdef012345, ${process.platform}-${process.arch})\n`);

  const demo = keygate.demo();
  const output = await demo.printed('stop     Ctrl-C');
  const port = /https:\/\/localhost:(\d+)/.exec(output)?.[1];
  const ca = readFileSync(/^.* (\/.*p256\.pem)/m.exec(output)?.[1] ?? '');
  const asked = request({ host: '127.0.0.1', servername: 'localhost', port, ca, agent: false });
  asked.end();
  const [response] = (await once(asked, 'response')) as [import('node:http').IncomingMessage];
  assert.match(await text(response), /arrived as plaintext/);
  assert.equal(await demo.end(), 0);
});

it('is installed without a registry where there is a Node, with the versions that the SBOM names', async (test) => {
  // An empty cache, and nobody to ask.
  const keygate = await install(test, 'offline', ['--offline', '--omit=optional']);
  const bare = keygate.run('--version');
  assert.equal(bare.status, 69);
  assert.match(bare.stderr, /Node 26 or newer is/);

  symlinkSync(process.execPath, join(keygate.home, 'bin/node'));
  const options = ['--module', '/nonexistent.so'];
  // Only a compiled pkcs11js can say this.
  assert.match(keygate.run('token', 'list', ...options).stderr, /^keygate: token_module: .*\/nonexistent\.so/m);

  const sbom = JSON.parse(readFileSync(join(keygate.package, 'dist/sbom.cdx.json'), 'utf8')) as {
    readonly components: readonly { readonly purl: string }[];
  };
  const named = sbom.components
    .map(({ purl }) => decodeURIComponent(purl))
    .filter((purl) => purl.startsWith('pkg:npm/'));
  assert.deepEqual(
    installedPackages(keygate.package).toSorted(),
    named.filter((purl) => !purl.startsWith('pkg:npm/node-linux-')).toSorted(),
  );
});

function installedPackages(directory: string): string[] {
  const manifests = globSync('node_modules/**/package.json', { cwd: directory }).filter((path) =>
    /(?:^|\/)node_modules\/(?:@[^/]+\/)?[^/]+\/package\.json$/.test(path),
  );
  const names = manifests.map((path) => {
    const { name, version: found } = JSON.parse(readFileSync(join(directory, path), 'utf8')) as Record<string, string>;
    return `pkg:npm/${name}@${found}`;
  });
  return [...new Set(names)];
}

/** As root or with a prefix of one's own; nobody's home, and a compiler that fails. */
async function install(test: TestContext, name: string, options: readonly string[]) {
  const home = join(directory, name);
  const prefix = join(home, 'prefix');
  mkdirSync(join(home, 'bin'), { recursive: true });
  await run('npm', ['install', '--global', '--prefix', prefix, ...options, tarball], {
    cwd: home,
    env: { ...withoutNpm(process.env), HOME: home, CC: 'false', CXX: 'false', MAKE: 'false' },
  });
  const installed = join(prefix, 'lib/node_modules/keygate');
  assert.ok(existsSync(installed));
  const launcher = join(prefix, 'bin/keygate');
  // Nothing of what a checkout needs: no npm, and no Node but the one that came with the package or is put into bin.
  const env = { HOME: home, PATH: `${join(home, 'bin')}:${systemCommands(home)}` };
  return {
    home,
    package: installed,
    run: (...args: readonly string[]) => spawnSync(launcher, args, { cwd: home, env, encoding: 'utf8' }),
    demo: () => startDemo(test, launcher, home, env),
  };
}

/** `npm test` hands its settings on, among them what npm then installs; an operator's shell has none. */
function withoutNpm(env: NodeJS.ProcessEnv): NodeJS.ProcessEnv {
  return Object.fromEntries(Object.entries(env).filter(([name]) => !/^npm_/i.test(name)));
}

/** The few commands that the launcher calls, in a directory that holds no Node. */
function systemCommands(home: string): string {
  const commands = join(home, 'commands');
  mkdirSync(commands);
  for (const command of ['readlink', 'sh'])
    symlinkSync(execFileSync('which', [command], { encoding: 'utf8' }).trim(), join(commands, command));
  return commands;
}

function startDemo(test: TestContext, launcher: string, home: string, env: Readonly<Record<string, string>>) {
  const anyPort = ['--port', '0', '--admin-port', '0'];
  const child = spawn(launcher, ['demo', '--workers', '1', ...anyPort], {
    cwd: home,
    env,
    stdio: ['ignore', 'pipe', 'pipe'],
    // A group of its own, so that its workers end with it.
    detached: true,
  });
  const { pid } = child;
  assert.ok(pid !== undefined);
  test.after(() => {
    try {
      process.kill(-pid, 'SIGKILL');
    } catch {
      // Nothing is left of it.
    }
  });
  let output = '';
  for (const stream of [child.stdout, child.stderr])
    stream.setEncoding('utf8').on('data', (chunk: string) => (output += chunk));
  const ended = once(child, 'close').then(([exitCode]: unknown[]) => exitCode as number | null);
  return {
    /** Waits until the words are printed. @returns all that is. */
    async printed(words: string): Promise<string> {
      while (!output.includes(words)) {
        const more = await Promise.race([once(child.stdout, 'data'), ended]);
        if (!Array.isArray(more)) assert.fail(`the demo ended before it printed "${words}":\n${output}`);
      }
      return output;
    },
    async end(): Promise<number | null> {
      child.kill('SIGTERM');
      return ended;
    },
  };
}
