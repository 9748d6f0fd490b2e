/**
 * Owns: child processes that are pinned to cores: starting, knowing why they died, how much CPU they used, ending them.
 * Must not know: what they are.
 * Runs: in the benchmark's process.
 */
import { execFileSync, spawn } from 'node:child_process';
import type { ChildProcess } from 'node:child_process';
import { randomInt } from 'node:crypto';
import { once } from 'node:events';
import { existsSync, readFileSync, readdirSync } from 'node:fs';
import { createServer, connect } from 'node:net';
import { setTimeout as delay } from 'node:timers/promises';

export interface Command {
  readonly file: string;
  readonly args: readonly string[];
  readonly env?: Readonly<Record<string, string>>;
  readonly cwd?: string;
  /** Gives way at once to whoever else wants its core. */
  readonly yielding?: boolean;
}

/** A process of ours and what it started itself. */
export class Pinned {
  readonly name: string;
  readonly child: ChildProcess;
  #said = '';

  constructor(name: string, cores: readonly number[], command: Command) {
    this.name = name;
    // Each becomes the next, and the last one the command, so the PID is the command's.
    const launched = ['/bin/sh', '-c', launcher, command.file, ...command.args];
    const scheduled = command.yielding === true ? ['chrt', '--idle', '0', ...launched] : launched;
    this.child = spawn('taskset', ['-c', cores.join(','), ...scheduled], {
      cwd: command.cwd,
      env: { ...process.env, ...command.env },
      stdio: ['pipe', 'pipe', 'pipe'],
    });
    running.add(this);
    this.child.once('exit', () => running.delete(this));
    this.child.once('error', (error) => this.#hear(String(error)));
    for (const stream of [this.child.stdout, this.child.stderr]) {
      // Read even when nobody asks: a full pipe would stop who writes into it.
      stream?.setEncoding('utf8').on('data', (text: string) => this.#hear(text));
    }
  }

  get pid(): number {
    if (this.child.pid === undefined) throw new Error(`${this.name}: not started: ${this.#said}`);
    return this.child.pid;
  }

  get ended(): boolean {
    return this.child.exitCode !== null || this.child.signalCode !== null;
  }

  /** For a message: how it ended, and the last it said. */
  get obituary(): string {
    return `${this.name} (exit ${this.child.exitCode ?? this.child.signalCode ?? 'none'}): ${this.#said.trim() || 'said nothing'}`;
  }

  #hear(text: string): void {
    this.#said = (this.#said + text).slice(-saidCharactersMax);
  }

  /** Asks it to end; kills it when it has not ended in time. */
  async stop(): Promise<void> {
    if (this.ended || this.child.pid === undefined) return;
    const exit = once(this.child, 'exit');
    this.child.stdin?.end();
    this.child.kill('SIGTERM');
    const timer = setTimeout(() => this.child.kill('SIGKILL'), stopMs);
    await exit;
    clearTimeout(timer);
  }
}

const saidCharactersMax = 2000;
const stopMs = 10_000;
const running = new Set<Pinned>();

/** Of every process here. */
export function openFilesMax(): number {
  filesMax ??= Number(execFileSync('/bin/sh', ['-c', `${raiseLimit}; ulimit -n`], { encoding: 'utf8' }));
  return filesMax;
}

/** To what the kernel allows at most, or else, without the right to raise it, to the hard limit. */
const raiseLimit = 'ulimit -n "$(cat /proc/sys/fs/nr_open)" 2>/dev/null || ulimit -n "$(ulimit -H -n)"';
/** It also ends with the benchmark, however that ends. */
const launcher = `${raiseLimit}; exec setpriv --pdeathsig TERM -- "$0" "$@"`;
let filesMax: number | undefined;

/** Everything that is still there, for the way out after an error. */
export async function stopAll(): Promise<void> {
  await Promise.all([...running].map((pinned) => pinned.stop()));
}

/** What a subject and everybody else used of the subject's cores in a round. */
export interface CpuUsed {
  /** User and system, of all processes of the subject. */
  readonly cpuSeconds: number;
  /** Of the cores that it may use, 0..1. */
  readonly coreShare: number;
  readonly strangersShare: number;
}

/** Reads the clocks of a subject before and after. Resolution: one tick of the kernel, usually 10 ms. */
export class CpuMeter {
  readonly #pinned: Pinned;
  readonly #cores: readonly number[];
  #before: Reading;

  constructor(pinned: Pinned, cores: readonly number[]) {
    this.#pinned = pinned;
    this.#cores = cores;
    this.#before = reading(pinned.pid, cores);
  }

  start(): void {
    this.#before = reading(this.#pinned.pid, this.#cores);
  }

  /** @throws when a process of the subject came or went: then the two readings do not belong together. */
  stop(seconds: number): CpuUsed {
    const [before, after] = [this.#before, reading(this.#pinned.pid, this.#cores)];
    if (before.pids.join() !== after.pids.join())
      throw new Error(
        `processes ${before.pids.join()} became ${after.pids.join()} during a round: ${this.#pinned.obituary}`,
      );
    const cpuSeconds = after.cpuSeconds - before.cpuSeconds;
    const available = seconds * this.#cores.length;
    return {
      cpuSeconds,
      coreShare: cpuSeconds / available,
      strangersShare: Math.max(0, after.busySeconds - before.busySeconds - cpuSeconds) / available,
    };
  }
}

/** CPU that a process and its descendants have used since they began; what ended is in it no more. @throws when it is gone. */
export function cpuSecondsSinceStart(pid: number): number {
  return cpuSecondsOf(familyOf(pid));
}

interface Reading {
  readonly pids: readonly number[];
  readonly cpuSeconds: number;
  /** Whoever used the cores. */
  readonly busySeconds: number;
}

/** @throws when the process is gone. */
function reading(pid: number, cores: readonly number[]): Reading {
  const pids = familyOf(pid);
  return {
    pids,
    cpuSeconds: cpuSecondsOf(pids),
    busySeconds: cores.reduce((sum, core) => sum + busySeconds(core), 0),
  };
}

function cpuSecondsOf(pids: readonly number[]): number {
  return pids.reduce((sum, each) => sum + ticksOf(each), 0) / ticksPerSecond();
}

/** A process and its descendants. @throws when it is gone. */
export function familyOf(pid: number): readonly number[] {
  return [pid, ...descendants(pid)].toSorted((left, right) => left - right);
}

/**
 * Memory of a process and its descendants; pages that several of them share are counted once. What the kernel keeps for their
 * sockets is not in it. proc_pid_smaps(5). @throws when it is gone, or belongs to somebody else.
 */
export function pssBytes(pid: number): number {
  const kib = familyOf(pid).map((each) => {
    const rollup = readFileSync(`/proc/${each}/smaps_rollup`, 'utf8');
    const pss = rollup.match(/^Pss: +(\d+) kB$/m)?.[1];
    if (pss === undefined) throw new Error(`/proc/${each}/smaps_rollup: no Pss`);
    return Number(pss);
  });
  return kib.reduce((sum, each) => sum + each, 0) * 1024;
}

/** Seconds that a core was not idle since boot. */
function busySeconds(core: number): number {
  const line = readFileSync('/proc/stat', 'utf8').match(new RegExp(`^cpu${core} (.*)$`, 'm'))?.[1];
  if (line === undefined) throw new Error(`/proc/stat: no core ${core}`);
  // proc_stat(5): user nice system idle iowait irq softirq steal
  const [user = 0, nice = 0, system = 0, , , irq = 0, softirq = 0, steal = 0] = line.split(' ').map(Number);
  return (user + nice + system + irq + softirq + steal) / ticksPerSecond();
}

/** Resolves when somebody accepts at the port. */
export async function accepting(pinned: Pinned, port: number): Promise<void> {
  const until = Date.now() + startMs;
  while (!(await accepts(port))) {
    if (pinned.ended) throw new Error(`did not start: ${pinned.obituary}`);
    if (Date.now() > until) throw new Error(`does not listen on port ${port} after ${startMs} ms: ${pinned.obituary}`);
    // Nothing tells when a foreign program listens.
    await delay(retryMs);
  }
}

const startMs = 20_000;
const retryMs = 20;

/**
 * A port that was free a moment ago, for programs that cannot choose one themselves. Not one of those that the kernel gives to
 * outgoing connections: the load makes thousands of them, and one would have it before the program does.
 */
export async function freePort(): Promise<number> {
  const [low = portMax] = readFileSync('/proc/sys/net/ipv4/ip_local_port_range', 'utf8').split('\t').map(Number);
  for (let attempt = 0; attempt < portAttemptsMax; attempt += 1) {
    const port = randomInt(portMin, Math.max(low, portMin + 1));
    if (await isFree(port)) return port;
  }
  throw new Error(`no free port among ${portAttemptsMax} between ${portMin} and ${low}`);
}

const portMin = 10_000;
const portMax = 32_768;
const portAttemptsMax = 100;

async function isFree(port: number): Promise<boolean> {
  const server = createServer();
  const { promise, resolve } = Promise.withResolvers<boolean>();
  server.once('listening', () => server.close(() => resolve(true)));
  server.once('error', () => resolve(false));
  server.listen(port, '127.0.0.1');
  return promise;
}

function accepts(port: number): Promise<boolean> {
  const { promise, resolve } = Promise.withResolvers<boolean>();
  const socket = connect(port, '127.0.0.1');
  socket.once('connect', () => {
    // Reset, not closed: a proxy need not take this for a client that shakes hands.
    socket.resetAndDestroy();
    resolve(true);
  });
  socket.once('error', () => resolve(false));
  return promise;
}

function descendants(pid: number): number[] {
  return readdirSync(`/proc/${pid}/task`)
    .flatMap((thread) => childrenOf(pid, thread).split(' '))
    .flatMap((text) => (text.trim() === '' ? [] : [Number(text), ...descendants(Number(text))]));
}

/** The children of a thread that has just ended belong to another one by now. */
function childrenOf(pid: number, thread: string): string {
  try {
    return readFileSync(`/proc/${pid}/task/${thread}/children`, 'utf8');
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT' && existsSync(`/proc/${pid}`)) return '';
    throw error;
  }
}

/** utime + stime, proc_pid_stat(5); the name before them may contain blanks and brackets. */
function ticksOf(pid: number): number {
  const stat = readFileSync(`/proc/${pid}/stat`, 'utf8');
  const fields = stat.slice(stat.lastIndexOf(')') + 2).split(' ');
  return Number(fields[11]) + Number(fields[12]);
}

let ticks: number | undefined;

function ticksPerSecond(): number {
  ticks ??= Number(execFileSync('getconf', ['CLK_TCK'], { encoding: 'utf8' }));
  return ticks;
}
