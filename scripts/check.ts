/**
 * Owns: the checks of `npm test`, their order, their deadlines and the sum of their results.
 * Must not know: what any of them looks at.
 * Runs: by scripts/check after the bootstrap. Arguments name the checks to run (`scripts/check types lint`); default: all.
 */
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { rmSync } from 'node:fs';
import { availableParallelism } from 'node:os';
import { join } from 'node:path';
import { stripVTControlCharacters, styleText } from 'node:util';

interface Check {
  readonly name: string;
  readonly command: readonly string[];
  /** Reads how many tests passed and failed from what the command printed; without it the check counts as one. */
  readonly count?: (output: string) => Result;
}

interface Result {
  readonly passed: number;
  readonly failed: number;
}

const root = join(import.meta.dirname, '..');
const bin = join(root, 'node_modules/.bin');
const manifest = ['--manifest-path', 'src/engine/Cargo.toml'];
/** A crate of its own: the PKCS#11 module that tests load to make a token fail. */
const faultModule = ['--manifest-path', 'test/fault-module/Cargo.toml'];
/** The load of the benchmarks. What it has in common with the engine is compiled already, and takes minutes. */
const load = ['--manifest-path', 'bench/load/Cargo.toml'];
const sharedTarget = ['--target-dir', 'src/engine/target'];
const clippy = ['clippy', '--all-targets', '--locked'];
const denyWarnings = ['--', '-D', 'warnings'];
/** A test that hangs must not take the whole run with it. */
const checkDeadlineMs = 40 * 60_000;
const testDeadlineMs = 2 * 60_000;

/** Most of what tests cost is the start of a process, and half of that is compiling JavaScript that the last one compiled too. */
const compileCache = join(root, '.keygate/compile-cache');

const checks: readonly Check[] = [
  { name: 'format', command: [`${bin}/oxfmt`, '--check'] },
  { name: 'format-rust', command: ['cargo', 'fmt', '--check', ...manifest] },
  { name: 'format-fault-module', command: ['cargo', 'fmt', '--check', ...faultModule] },
  { name: 'format-load', command: ['cargo', 'fmt', '--check', ...load] },
  // Its modules are compiled, linted and run by the engine's own tests.
  { name: 'format-fuzz', command: ['cargo', 'fmt', '--check', '--manifest-path', 'src/engine/fuzz/Cargo.toml'] },
  { name: 'types', command: [`${bin}/tsc`, '-p', '.'] },
  { name: 'lint', command: [`${bin}/oxlint`, '--type-aware', '--deny-warnings'] },
  { name: 'lint-rust', command: ['cargo', ...clippy, '--release', ...manifest, ...denyWarnings] },
  { name: 'lint-fault-module', command: ['cargo', ...clippy, ...faultModule, ...denyWarnings] },
  { name: 'lint-load', command: ['cargo', ...clippy, '--release', ...load, ...sharedTarget, ...denyWarnings] },
  { name: 'dead-code', command: [`${bin}/knip`] },
  { name: 'licences', command: [process.execPath, 'scripts/licences.ts', '--check'] },
  { name: 'docs', command: [process.execPath, 'scripts/docs.ts', '--check'] },
  { name: 'dashboards', command: [process.execPath, 'grafana/dashboards.ts', '--check'] },
  { name: 'binding-types', command: [process.execPath, 'scripts/binding-types.ts', '--check'] },
  {
    name: 'test-rust',
    // Without the examples: linking each with the engine takes half a minute, and they hold no test.
    command: ['cargo', 'test', '--release', '--locked', '--lib', '--tests', ...manifest],
    count: countCargo,
  },
  {
    name: 'test-load',
    command: ['cargo', 'test', '--release', '--locked', ...load, ...sharedTarget],
    count: countCargo,
  },
  {
    name: 'test',
    command: [
      process.execPath,
      '--test',
      `--test-timeout=${testDeadlineMs}`,
      // By default one file less: on two cores one after the other, of which most wait most of the time.
      `--test-concurrency=${availableParallelism()}`,
      '--test-reporter=spec',
      'test/**/*.test.ts',
    ],
    count: countNode,
  },
];

process.exitCode = await main(process.argv.slice(2));

async function main(names: readonly string[]): Promise<number> {
  const unknown = names.filter((name) => !checks.some((check) => check.name === name));
  if (unknown.length > 0)
    throw new Error(`no check is called ${unknown.join(', ')}; there are ${checks.map(({ name }) => name).join(', ')}`);

  // What earlier runs compiled may be of files that are no more.
  rmSync(compileCache, { recursive: true, force: true });
  let passed = 0;
  const failures: string[] = [];
  let failed = 0;
  for (const check of checks.filter(({ name }) => names.length === 0 || names.includes(name))) {
    const result = await run(check);
    passed += result.passed;
    failed += result.failed;
    if (result.failed > 0) failures.push(check.name);
  }
  if (failures.length > 0) console.log(`\nfailed: ${failures.join(', ')}; run one again with scripts/check NAME`);
  console.log(`\n${passed} passed, ${failed} failed`);
  return failed === 0 ? 0 : 1;
}

async function run({ name, command, count }: Check): Promise<Result> {
  console.log(styleText('bold', `==> ${name}`));
  const startedAt = performance.now();
  const [program = '', ...args] = command;
  // A group of its own, so that at the deadline also what it has started ends.
  const env = { ...process.env, NODE_COMPILE_CACHE: compileCache };
  const child = spawn(program, args, { cwd: root, env, stdio: ['ignore', 'pipe', 'pipe'], detached: true });
  let output = '';
  for (const stream of [child.stdout, child.stderr]) {
    stream.setEncoding('utf8').on('data', (chunk: string) => {
      output += chunk;
      process.stdout.write(chunk);
    });
  }
  const deadline = setTimeout(() => {
    console.log(`${name}: not done after ${checkDeadlineMs} ms`);
    if (child.pid !== undefined) process.kill(-child.pid, 'SIGKILL');
  }, checkDeadlineMs);
  const exitCode = await ended(child);
  clearTimeout(deadline);

  const result = judge(exitCode, count?.(stripVTControlCharacters(output)));
  const seconds = ((performance.now() - startedAt) / 1000).toFixed(1);
  console.log(
    `    ${name}: ${result.failed === 0 ? styleText('green', 'ok') : styleText('red', 'failed')}, ${seconds} s`,
  );
  return result;
}

/** The exit code, or null for a signal or a program that is not there. */
async function ended(child: ReturnType<typeof spawn>): Promise<number | null> {
  try {
    const [exitCode] = (await once(child, 'close')) as [number | null];
    return exitCode;
  } catch (error) {
    console.log(String(error));
    return null;
  }
}

/** A runner that failed without a failed test, or passed without a test, has failed: a count alone could hide both. */
function judge(exitCode: number | null, counted?: Result): Result {
  if (counted === undefined) return exitCode === 0 ? { passed: 1, failed: 0 } : { passed: 0, failed: 1 };
  const unexplained = exitCode !== 0 && counted.failed === 0;
  const empty = counted.passed + counted.failed === 0;
  return unexplained || empty ? { passed: counted.passed, failed: counted.failed + 1 } : counted;
}

function countCargo(output: string): Result {
  return sum(output, /^test result: .*?(?<passed>\d+) passed; (?<failed>\d+) failed;/gm);
}

function countNode(output: string): Result {
  return sum(output, /^ℹ (?:pass (?<passed>\d+)|(?:fail|cancelled) (?<failed>\d+))$/gm);
}

function sum(output: string, pattern: RegExp): Result {
  let [passed, failed] = [0, 0];
  for (const { groups } of output.matchAll(pattern)) {
    passed += Number(groups?.['passed'] ?? 0);
    failed += Number(groups?.['failed'] ?? 0);
  }
  return { passed, failed };
}
