/**
 * Owns: child processes that are pinned to a core: starting, knowing why they died, how much CPU they used, ending them.
 * Must not know: what they are.
 * Runs: in the benchmark's process.
 */
import { execFileSync, spawn } from 'node:child_process';
import type { ChildProcess } from 'node:child_process';
import { once } from 'node:events';
import { readFileSync, readdirSync } from 'node:fs';
import { createServer, connect } from 'node:net';
import type { AddressInfo } from 'node:net';
import { setTimeout as delay } from 'node:timers/promises';

export interface Command {
  readonly file: string;
  readonly args: readonly string[];
  readonly env?: Readonly<Record<string, string>>;
  readonly cwd?: string;
}

/** A process of ours and what it started itself. */
export class Pinned {
  readonly name: string;
  readonly child: ChildProcess;
  #said = '';

  constructor(name: string, core: number, command: Command) {
    this.name = name;
    // taskset becomes the command, so the PID is the command's.
    this.child = spawn('taskset', ['-c', String(core), command.file, ...command.args], {
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

/** Everything that is still there, for the way out after an error. */
export async function stopAll(): Promise<void> {
  await Promise.all([...running].map((pinned) => pinned.stop()));
}

/** CPU seconds, user and system, of a process and its descendants. */
export interface CpuTime {
  readonly seconds: number;
  /** A process that came or went makes two readings incomparable. */
  readonly pids: readonly number[];
}

/** @throws when a process is gone. */
export function cpuTime(pid: number): CpuTime {
  const pids = [pid, ...descendants(pid)].toSorted((left, right) => left - right);
  return { seconds: pids.reduce((sum, each) => sum + ticksOf(each), 0) / ticksPerSecond(), pids };
}

/** Seconds that a core was not idle since boot, whoever used it. */
export function coreBusySeconds(core: number): number {
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

/** A port that was free a moment ago, for programs that cannot choose one themselves. */
export async function freePort(): Promise<number> {
  const server = createServer().listen(0, '127.0.0.1');
  await once(server, 'listening');
  const { port } = server.address() as AddressInfo;
  server.close();
  await once(server, 'close');
  return port;
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
    .flatMap((thread) => readFileSync(`/proc/${pid}/task/${thread}/children`, 'utf8').split(' '))
    .flatMap((text) => (text.trim() === '' ? [] : [Number(text), ...descendants(Number(text))]));
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
