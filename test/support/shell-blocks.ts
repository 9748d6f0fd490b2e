/**
 * Owns: the shell blocks of a Markdown document: finding them, and running those of one section in one shell, as a reader
 * would who types them one after the other.
 * Must not know: which documents there are.
 * Runs: in test processes; the shell in a process group, a home and, where the machine allows, a network of its own.
 *
 *     ```sh                    is run; each of its commands must succeed
 *     ```text                  right after it: what it prints, standard error included, with … for what varies
 *     <!-- not run: why -->    in the line above: this block is not run
 */
import assert from 'node:assert/strict';
import { spawn, spawnSync } from 'node:child_process';
import { once } from 'node:events';
import { existsSync, mkdirSync, mkdtempSync, readFileSync, rmSync, symlinkSync, writeFileSync } from 'node:fs';
import { createServer } from 'node:net';
import type { AddressInfo } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';

interface ShellBlock {
  /** Where it begins, from 1. */
  readonly line: number;
  readonly commands: string;
  /** Why it is not run. */
  readonly notRun?: string;
  /** What it must print. */
  readonly prints?: string;
}

interface Section {
  /** The heading of level 2. */
  readonly heading: string;
  readonly blocks: readonly ShellBlock[];
}

interface Fence {
  readonly line: number;
  readonly lastLine: number;
  readonly language: string;
  readonly text: string;
}

const launcher = join(import.meta.dirname, '../../bin/keygate');
const otherShells = ['bash', 'shell', 'console', 'zsh', 'shell-session'];
/** What a reader would take for commands. */
const looksLikeCommands = /^\s*(?:[$#] )?(?:sudo )?(?:keygate|curl|npm|docker|kubectl|systemctl|git|openssl) [^|]*$/m;

/** @throws AssertionError for blocks whose language hides that they are commands. */
export function shellSections(file: string): Section[] {
  const lines = readFileSync(file, 'utf8').split('\n');
  const fences = fencesOf(lines);
  const sections = new Map<string, ShellBlock[]>();
  for (const [index, fence] of fences.entries()) {
    const where = `${file}:${fence.line}`;
    assert.ok(!otherShells.includes(fence.language), `${where}: say sh instead of ${fence.language}`);
    if (fence.language === '') assert.doesNotMatch(fence.text, looksLikeCommands, `${where}: commands, but not sh`);
    if (fence.language !== 'sh') continue;
    const heading = headingAbove(lines, fences, fence.line);
    const notRun = /^\s*<!-- not run: (.+) -->$/.exec(lines[fence.line - 2] ?? '')?.[1];
    const next = fences[index + 1];
    const follows =
      next !== undefined && lines.slice(fence.lastLine, next.line - 1).every((line) => line.trim() === '');
    const block: ShellBlock = {
      line: fence.line,
      commands: fence.text,
      ...(notRun === undefined ? {} : { notRun }),
      ...(follows && next.language === 'text' ? { prints: next.text } : {}),
    };
    sections.set(heading, [...(sections.get(heading) ?? []), block]);
  }
  return [...sections].map(([heading, blocks]) => ({ heading, blocks }));
}

function fencesOf(lines: readonly string[]): Fence[] {
  const fences: Fence[] = [];
  let open: { readonly line: number; readonly indent: string; readonly language: string } | undefined;
  for (const [index, line] of lines.entries()) {
    const [, indent = '', language = ''] = /^(\s*)```\s*(\S*)/.exec(line) ?? [];
    if (!/^\s*```/.test(line)) continue;
    if (open === undefined) {
      open = { line: index + 1, indent, language };
      continue;
    }
    const inside = lines.slice(open.line, index);
    const { indent: outer } = open;
    const text = inside.map((each) => (each.startsWith(outer) ? each.slice(outer.length) : each)).join('\n');
    fences.push({ line: open.line, lastLine: index + 1, language: open.language, text });
    open = undefined;
  }
  assert.equal(open, undefined, `a block begins in line ${open?.line} and does not end`);
  return fences;
}

function headingAbove(lines: readonly string[], fences: readonly Fence[], line: number): string {
  for (let above = line; above > 0; above -= 1) {
    const [, heading] = /^## (.+)$/.exec(lines[above - 1] ?? '') ?? [];
    const isInFence = fences.some((fence) => fence.line < above && above < fence.lastLine);
    if (heading !== undefined && !isInFence) return heading;
  }
  return '';
}

/**
 * Runs the blocks of a section one after the other in one shell.
 * @throws AssertionError when a command fails or prints something else than the document says.
 */
export async function runSection(file: string, { blocks }: Section): Promise<void> {
  const home = mkdtempSync(join(tmpdir(), 'keygate-readme-'));
  const files = { script: join(home, '.script'), trace: join(home, '.trace') };
  mkdirSync(join(home, 'bin'));
  symlinkSync(launcher, join(home, 'bin/keygate'));
  const namespace = networkNamespace();
  const runnable = blocks.filter(({ notRun }) => notRun === undefined);
  const ports = namespace === undefined ? await freePorts() : {};
  const adapt = (text: string) => inPrivatePlaces(text, home, ports);
  const network = namespace === undefined ? '' : 'ip link set lo up';
  const script = [network, runnable.map(({ commands }) => adapt(commands)).join(`\n${separator}\n`)].join('\n');
  // The trace says which command failed.
  writeFileSync(files.script, `set -eu\nexec 3>${files.trace} 2>&1\nBASH_XTRACEFD=3\nset -x\n${script}\n`);

  const [program, ...args] = [...(namespace ?? []), 'bash', '--norc', files.script];
  const child = spawn(program, args, {
    cwd: home,
    env: environment(home),
    stdio: ['ignore', 'pipe', 'pipe'],
    // A group of its own, by which what the shell left in the background ends.
    detached: true,
  });
  const killGroup = () => {
    try {
      if (child.pid !== undefined) process.kill(-child.pid, 'SIGKILL');
    } catch {
      // Nothing is left of it.
    }
  };
  process.on('exit', killGroup);
  try {
    let output = '';
    for (const stream of [child.stdout, child.stderr])
      stream.setEncoding('utf8').on('data', (chunk: string) => (output += chunk));
    // Not close: what is in the background holds the pipes.
    const [exitCode] = (await once(child, 'exit')) as [number | null];
    killGroup();
    await Promise.all([child.stdout, child.stderr].map(async (stream) => stream.readableEnded || once(stream, 'end')));
    const printed = output.split(`${marker}\n`);
    const last = runnable[printed.length - 1];
    const trace = existsSync(files.trace) ? readFileSync(files.trace, 'utf8').split('\n').slice(-4).join('\n') : '';
    assert.equal(
      exitCode,
      0,
      `${file}:${last?.line}: a command failed:\n${trace}\nprinted was:\n${output.slice(-4000)}`,
    );
    for (const [index, { line, prints }] of runnable.entries()) {
      if (prints === undefined) continue;
      assert.match(printed[index] ?? '', asPattern(adapt(prints)), `${file}:${line} prints something else`);
    }
  } finally {
    killGroup();
    process.off('exit', killGroup);
    rmSync(home, { recursive: true, force: true });
  }
}

/** Between the output of two blocks. */
const marker = '--- next block ---';
const separator = `{ set +x; } 2>/dev/null; echo '${marker}'; set -x`;

/** What belongs to the machine in the document belongs to the test in here. */
function inPrivatePlaces(text: string, home: string, ports: Readonly<Record<string, string>>): string {
  return text
    .replaceAll(/\/(?:etc|var\/lib)\/keygate/g, (place) => join(home, place))
    .replaceAll(/\b(?:8443|9180|8080)\b/g, (port) => ports[port] ?? port);
}

function environment(home: string): Record<string, string> {
  const { PATH = '' } = process.env;
  return { HOME: home, PATH: `${join(home, 'bin')}:${PATH}`, LANG: 'C.UTF-8', TERM: 'dumb' };
}

/** For a test's `skip`: why ports of files that a document copies may not be free. */
export function whyNoOwnNetwork(): string | false {
  return networkNamespace() === undefined && 'this machine gives the shell no network of its own';
}

/** In one all ports are free: the document's can be taken as they are written. */
function networkNamespace(): readonly string[] | undefined {
  const ways = [
    ['unshare', '--net'],
    ['unshare', '--user', '--map-root-user', '--net'],
  ];
  return ways.find(
    ([program = '', ...args]) => spawnSync(program, [...args, 'ip', 'link', 'set', 'lo', 'up']).status === 0,
  );
}

/** Without a network of their own: another port for each one that the documents use. */
async function freePorts(): Promise<Record<string, string>> {
  const ports: Record<string, string> = {};
  for (const port of ['8443', '9180', '8080']) ports[port] = String(await freePort());
  return ports;
}

async function freePort(): Promise<number> {
  const server = createServer().listen(0, '127.0.0.1');
  await once(server, 'listening');
  const { port } = server.address() as AddressInfo;
  server.close();
  await once(server, 'close');
  return port;
}

function asPattern(prints: string): RegExp {
  const parts = prints.trim().split('…');
  return new RegExp(`^\\s*${parts.map((part) => escaped(part)).join('[^]*?')}\\s*$`);
}

function escaped(text: string): string {
  return text.replaceAll(/[.*+?^${}()|[\]\\]/g, String.raw`\$&`);
}
