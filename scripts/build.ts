/**
 * Owns: dist/: what is run where there is no checkout: JavaScript, what it reads at run time, the engine, and which build it is.
 * Must not know: how it is packed or deployed.
 * Runs: `npm run build`; by scripts/prepack.ts. The engine is built before, by scripts/bootstrap.
 */
import { execFileSync } from 'node:child_process';
import { copyFileSync, existsSync, globSync, mkdirSync, rmSync, writeFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { engine as loadEngine } from '../src/engine/binding.ts';
import type { Build } from '../src/version.ts';

const root = join(import.meta.dirname, '..');
const dist = join(root, 'dist');
const engine = 'engine/keygate-engine.node';

main();

function main(): void {
  if (!existsSync(join(root, 'src', engine))) throw new Error(`src/${engine} is missing: run scripts/bootstrap`);
  rmSync(dist, { recursive: true, force: true });
  execFileSync(join(root, 'node_modules/.bin/tsc'), ['-p', 'tsconfig.build.json'], { cwd: root, stdio: 'inherit' });
  copyAssets();
  // Line tables are four fifths of it. The symbols that are left name the functions of a backtrace.
  execFileSync('strip', ['--strip-debug', '-o', join(dist, engine), join(root, 'src', engine)], { stdio: 'inherit' });
  writeFileSync(join(dist, 'build.json'), `${JSON.stringify(build(), undefined, 2)}\n`);
}

/** What the program reads beside itself, such as the status page. The engine's folder is Rust, which is not shipped. */
function copyAssets(): void {
  const exclude = ['engine/**', '**/*.ts', '**/README.md'];
  for (const entry of globSync('**/*', { cwd: join(root, 'src'), exclude, withFileTypes: true })) {
    if (!entry.isFile()) continue;
    const source = join(entry.parentPath, entry.name);
    const target = join(dist, source.slice(join(root, 'src').length));
    mkdirSync(dirname(target), { recursive: true });
    copyFileSync(source, target);
  }
}

function build(): Build {
  return { revision: revision(), os: process.platform, cpu: process.arch, fips: loadEngine().isFips() };
}

/** Where there is no history, as in an image's build, the builder says it. */
function revision(): string {
  const told = process.env['KEYGATE_REVISION'];
  if (told !== undefined && told !== '') return told;
  try {
    const git = (...args: readonly string[]) =>
      execFileSync('git', ['-C', root, ...args], { encoding: 'utf8', stdio: ['ignore', 'pipe', 'ignore'] }).trim();
    return `${git('rev-parse', '--short=12', 'HEAD')}${git('status', '--porcelain') === '' ? '' : '+changes'}`;
  } catch {
    return 'unknown';
  }
}
