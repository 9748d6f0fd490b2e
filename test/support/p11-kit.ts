/**
 * Owns: a token in another process: p11-kit's server in front of a SoftHSM token, and the module that reaches it.
 * Must not know: what is done to it.
 * Runs: in test processes; the server ends with the test.
 */
import { spawn } from 'node:child_process';
import type { ChildProcess } from 'node:child_process';
import { once } from 'node:events';
import { existsSync, readdirSync, readFileSync, rmSync } from 'node:fs';
import { join } from 'node:path';
import type { TestContext } from 'node:test';
import type { DisposableToken } from './softhsm.ts';
import { until } from './until.ts';

export class P11KitServer {
  /** Absolute path of the module to configure. */
  readonly module =
    ['x86_64-linux-gnu', 'aarch64-linux-gnu', '../lib64']
      .map((directory) => `/usr/lib/${directory}/pkcs11/p11-kit-client.so`)
      .find(existsSync) ?? 'p11-kit-client.so';
  /** For every process that loads the module. */
  readonly env: Readonly<Record<string, string>>;
  readonly #token: DisposableToken;
  readonly #socket: string;
  #server: ChildProcess | undefined;

  constructor(test: TestContext, token: DisposableToken) {
    this.#token = token;
    this.#socket = join(token.directory, 'p11-kit.sock');
    this.env = { P11_KIT_SERVER_ADDRESS: `unix:path=${this.#socket}` };
    test.after(async () => this.stop());
  }

  async start(): Promise<void> {
    const { module, env, label } = this.#token;
    const args = ['server', '--foreground', '--name', this.#socket, '--provider', module, `pkcs11:token=${label}`];
    this.#server = spawn('p11-kit', args, { env: { ...process.env, ...env }, stdio: ['ignore', 'ignore', 'inherit'] });
    await until('socket of p11-kit', () => existsSync(this.#socket));
  }

  /** One for each process that is connected, oldest first: each has loaded SoftHSM by itself. */
  get children(): readonly number[] {
    return readdirSync('/proc')
      .filter((pid) => /^\d+$/.test(pid) && parentOf(pid) === this.#server?.pid)
      .map(Number)
      .toSorted((a, b) => a - b);
  }

  signalChildren(signal: NodeJS.Signals): void {
    for (const pid of this.children) process.kill(pid, signal);
  }

  /** With all its children, without a word. */
  async stop(): Promise<void> {
    const server = this.#server;
    if (server === undefined) return;
    this.#server = undefined;
    const children = readdirSync('/proc').filter((pid) => /^\d+$/.test(pid) && parentOf(pid) === server.pid);
    for (const pid of children) process.kill(Number(pid), 'SIGKILL');
    if (server.exitCode === null && server.signalCode === null) {
      server.kill('SIGKILL');
      await once(server, 'exit');
    }
    rmSync(this.#socket, { force: true });
  }
}

/** proc_pid_stat(5): the name of the program, in parentheses, may hold anything. */
function parentOf(pid: string): number | undefined {
  try {
    const stat = readFileSync(`/proc/${pid}/stat`, 'utf8');
    return Number(stat.slice(stat.lastIndexOf(')')).split(' ')[2]);
  } catch {
    return undefined; // it has gone
  }
}
