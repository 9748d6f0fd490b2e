/**
 * Owns: a real `keygate serve` in processes of its own: its configuration file, its log, its admin server, its end.
 * Must not know: what is tested.
 * Runs: in test processes.
 */
import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import type { ChildProcessByStdio } from 'node:child_process';
import { EventEmitter, once } from 'node:events';
import { readFileSync, readdirSync, writeFileSync } from 'node:fs';
import { request } from 'node:http';
import { dirname, join } from 'node:path';
import { createInterface } from 'node:readline';
import type { Readable } from 'node:stream';
import { text } from 'node:stream/consumers';
import { fileURLToPath } from 'node:url';
import { stringify } from 'yaml';
import type { EngineSnapshot } from '../../src/engine/native.d.ts';
import type { ReloadReport } from '../../src/primary/reload.ts';
import type { SlotStatus } from '../../src/primary/slot.ts';
import { parseScrape } from './prometheus-text.ts';
import type { ProvisionedToken } from './provisioned-token.ts';
import { until } from './until.ts';

/** Sections of the configuration document as people write it; see `configurationOf` for what is filled in. */
export interface KeygateDocument {
  readonly upstreams: Readonly<Record<string, object>>;
  readonly listeners: Readonly<Record<string, object>>;
  readonly [section: string]: unknown;
}

export interface LogLine {
  readonly level: string;
  readonly event?: string;
  readonly message: string;
  readonly worker?: number;
  readonly [field: string]: unknown;
}

/** `/status.json`. */
export interface Status {
  readonly ready: boolean;
  readonly unreadiness?: string;
  readonly configuration: { readonly generation: number; readonly hash: string };
  readonly listeners: Readonly<Record<string, readonly string[]>>;
  readonly workers: readonly SlotStatus[];
  readonly engine: EngineSnapshot;
}

export interface EndedKeygate {
  readonly exitCode: number | null;
  readonly signal: string | null;
  readonly stdout: string;
  readonly stderr: string;
}

export interface LaunchOptions {
  /** Added to the environment of the token. */
  readonly env?: Readonly<Record<string, string>>;
  /** Of `serve`, beside the configuration. */
  readonly args?: readonly string[];
  /** What starts it, with its command line as further arguments; it must become keygate by exec. */
  readonly launcher?: readonly string[];
  /** Descriptors that it finds from 3 on. */
  readonly inherit?: readonly number[];
}

const startDeadlineMs = 30_000;
const endDeadlineMs = 30_000;

/**
 * Starts keygate and waits until every worker is ready. Use it as `await using keygate = await startKeygate(...)`, or call
 * `stop()` in an `after` hook: either asserts that it leaves with 0 and leaves no process behind.
 */
export async function startKeygate(
  token: ProvisionedToken,
  document: KeygateDocument,
  options: LaunchOptions = {},
): Promise<Keygate> {
  const keygate = launchKeygate(token, document, options);
  try {
    await keygate.started();
  } catch (error) {
    keygate.kill();
    throw error;
  }
  return keygate;
}

/** Does not wait until it is ready. */
export function launchKeygate(
  token: ProvisionedToken,
  document: KeygateDocument,
  options: LaunchOptions = {},
): Keygate {
  launched += 1;
  const file = join(token.directory, `keygate-${launched}.yaml`);
  const configure = (other: KeygateDocument): void => {
    writeFileSync(file, stringify({ ...faultSandbox(token, options), ...configurationOf(token, other) }), {
      mode: 0o600,
    });
  };
  configure(document);
  return new Keygate(launch(token, file, options), file, configure);
}

/** Starts a keygate that is expected to give up by itself. */
export async function refusedKeygate(
  token: ProvisionedToken,
  document: KeygateDocument,
  options: LaunchOptions = {},
): Promise<EndedKeygate> {
  const keygate = launchKeygate(token, document, options);
  try {
    return await keygate.ended({ deadlineMs: startDeadlineMs });
  } finally {
    keygate.kill();
  }
}

export class Keygate {
  /** By listener, as `host:port`. */
  addresses: Readonly<Record<string, readonly string[]>> = {};
  adminAddress = '';
  /** The configuration file. */
  readonly file: string;
  /** Writes another configuration into the file. */
  readonly configure: (document: KeygateDocument) => void;
  /** Every line so far, of the primary and the workers. */
  readonly log: LogLine[] = [];
  readonly #child: ChildProcessByStdio<null, Readable, Readable>;
  readonly #lines = new EventEmitter<{ line: [LogLine] }>();
  readonly #stderr: Promise<string>;
  readonly #exit: Promise<[number | null, string | null]>;
  #stdout = '';
  #hasExited = false;

  constructor(
    child: ChildProcessByStdio<null, Readable, Readable>,
    file: string,
    configure: (document: KeygateDocument) => void,
  ) {
    this.#child = child;
    this.file = file;
    this.configure = configure;
    this.#lines.setMaxListeners(0);
    this.#stderr = text(child.stderr);
    createInterface({ input: child.stdout }).on('line', (line) => {
      this.#stdout += `${line}\n`;
      const parsed = parseLine(line);
      this.log.push(parsed);
      this.#lines.emit('line', parsed);
    });
    this.#exit = once(child, 'close').then(([code, signal]: unknown[]) => {
      this.#hasExited = true;
      process.off('exit', this.#killGroup);
      return [code, signal] as [number | null, string | null];
    });
    // A test process that is ended from outside must not leave keygates behind.
    process.on('exit', this.#killGroup);
  }

  /** Of the primary; also its process group, which the workers are in. */
  get pid(): number {
    const { pid } = this.#child;
    assert.ok(pid !== undefined, 'the process could not be started');
    return pid;
  }

  async started(): Promise<void> {
    const ready = await this.logged({ event: 'ready' }, { deadlineMs: startDeadlineMs });
    this.addresses = ready['addresses'] as Keygate['addresses'];
    this.adminAddress = String(ready['admin']);
  }

  /** Port of a listener's first address, or of the one at `index`. */
  port(listener = 'https', index = 0): number {
    const address = this.addresses[listener]?.[index];
    assert.ok(
      address !== undefined,
      `no address ${index} of listener ${listener} in ${JSON.stringify(this.addresses)}`,
    );
    return Number(address.slice(address.lastIndexOf(':') + 1));
  }

  /** The first line, past or to come, from `since` on, whose fields equal those of `fields`. */
  async logged(fields: Readonly<Record<string, unknown>>, { deadlineMs = 10_000, since = 0 } = {}): Promise<LogLine> {
    const matches = (line: LogLine) => Object.entries(fields).every(([field, value]) => line[field] === value);
    const past = this.log.slice(since).find(matches);
    if (past !== undefined) return past;
    const { promise, resolve, reject } = Promise.withResolvers<LogLine>();
    const look = (line: LogLine) => {
      if (matches(line)) resolve(line);
    };
    this.#lines.on('line', look);
    const wanted = JSON.stringify(fields);
    const timer = setTimeout(
      () => reject(new Error(`no log line ${wanted} within ${deadlineMs} ms:\n${this.#stdout}`)),
      deadlineMs,
    );
    void this.#exit.then(async () =>
      reject(new Error(`keygate ended without log line ${wanted}:\n${this.#stdout}${await this.#stderr}`)),
    );
    try {
      return await promise;
    } finally {
      clearTimeout(timer);
      this.#lines.off('line', look);
    }
  }

  /** Asks the admin server. */
  async admin(path: string, method = 'GET'): Promise<{ readonly status: number; readonly body: string }> {
    const socketPath = this.adminAddress.startsWith('unix:') ? this.adminAddress.slice('unix:'.length) : undefined;
    const place = socketPath === undefined ? addressParts(this.adminAddress) : { socketPath, host: 'localhost' };
    // Without it the admin server takes a POST for one of a foreign web page.
    const headers = method === 'POST' ? { 'x-keygate': '1' } : {};
    const asked = request({ ...place, path, method, headers, agent: false });
    asked.end();
    const [response] = (await once(asked, 'response')) as [import('node:http').IncomingMessage];
    return { status: response.statusCode ?? 0, body: await text(response) };
  }

  /** Has it read its file again, with another configuration in it if one is given. */
  async reload(document?: KeygateDocument): Promise<ReloadReport & { readonly status: number }> {
    if (document !== undefined) this.configure(document);
    const { status, body } = await this.admin('/reload', 'POST');
    return { status, ...(JSON.parse(body) as ReloadReport) };
  }

  async status(): Promise<Status> {
    return JSON.parse((await this.admin('/status.json')).body) as Status;
  }

  /** The sum over the series of `name` (also `..._count`) that carry all `labels`; undefined when there is none. */
  async metric(name: string, labels: Readonly<Record<string, string>> = {}): Promise<number | undefined> {
    const wanted = Object.entries(labels).map(([label, value]) => `${label}="${value}"`);
    let sum: number | undefined;
    for (const { series } of parseScrape((await this.admin('/metrics')).body).values()) {
      for (const [one, value] of series) {
        const [, found, list = ''] = /^([^{]+)\{(.*)\}$/.exec(one) ?? [];
        if (found === name && wanted.every((label) => `,${list},`.includes(`,${label},`))) sum = (sum ?? 0) + value;
      }
    }
    return sum;
  }

  /** How often connections ended, by `side/phase/reason`; only what happened. */
  async closes(): Promise<Readonly<Record<string, number>>> {
    const { engine } = await this.status();
    return Object.fromEntries(
      engine.closes
        .filter(({ count }) => count > 0)
        .map(({ side, phase, reason, count }) => [`${side}/${phase}/${reason}`, count]),
    );
  }

  /** Resolves when connections have ended so often for this reason since `before`, an answer of `closes`. */
  async closed(reason: string, { count = 1, before = {}, deadlineMs = 10_000 }: ClosedOptions = {}): Promise<void> {
    let now: Readonly<Record<string, number>> = {};
    await until(
      `${count} more connections closed for ${reason}`,
      async () => {
        now = await this.closes();
        return (now[reason] ?? 0) - (before[reason] ?? 0) >= count;
      },
      { deadlineMs, found: () => ({ before, now }) },
    );
  }

  /** Every worker, when every one is ready. */
  async workers(): Promise<readonly { readonly slot: number; readonly pid: number }[]> {
    return until('state in which every worker is ready', async () => {
      const { workers } = await this.status();
      const ready = workers.flatMap(({ slot, pid, state }) =>
        pid !== undefined && state === 'ready' ? [{ slot, pid }] : [],
      );
      return ready.length === workers.length && ready;
    });
  }

  /** Asks it to leave, and waits until it has, however long its connections last: the drain's deadline is its own. */
  async stop({ signal = 'SIGTERM' }: { readonly signal?: NodeJS.Signals } = {}): Promise<EndedKeygate> {
    if (!this.#hasExited) this.#child.kill(signal);
    try {
      const ended = await this.ended();
      assert.equal(
        ended.exitCode,
        0,
        `keygate left with ${ended.exitCode ?? ended.signal}:\n${ended.stdout}${ended.stderr}`,
      );
      assert.deepEqual(processesInGroup(this.pid), [], 'processes were left behind');
      return ended;
    } finally {
      this.kill();
    }
  }

  async ended({ deadlineMs = endDeadlineMs } = {}): Promise<EndedKeygate> {
    const { promise: late, reject } = Promise.withResolvers<never>();
    const timer = setTimeout(
      () => reject(new Error(`keygate did not end within ${deadlineMs} ms:\n${this.#stdout}`)),
      deadlineMs,
    );
    try {
      const [exitCode, signal] = await Promise.race([this.#exit, late]);
      return { exitCode, signal, stdout: this.#stdout, stderr: await this.#stderr };
    } finally {
      clearTimeout(timer);
    }
  }

  /** Ends what is left of it, hard. */
  kill(): void {
    this.#killGroup();
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.stop();
  }

  readonly #killGroup = (): void => {
    try {
      process.kill(-this.pid, 'SIGKILL');
    } catch {
      // Nothing is left of it: the normal end.
    }
  };
}

interface ClosedOptions {
  readonly count?: number;
  readonly before?: Readonly<Record<string, number>>;
  readonly deadlineMs?: number;
}

/** The fault module counts in its control file; and nobody can know that SoftHSM is behind it. */
function faultSandbox({ directory }: ProvisionedToken, { env }: LaunchOptions): object {
  // A sanitizer starts a program that names what it has found.
  if (process.env['KEYGATE_SANITIZER'] !== undefined) return { sandbox: { enabled: false } };
  const control = env?.['KEYGATE_FAULT_CONTROL'];
  return control === undefined ? {} : { sandbox: { writable: [dirname(control), join(directory, 'tokens')] } };
}

/** One worker unless the document says otherwise: what a test counts is then in one place. */
function configurationOf(token: ProvisionedToken, document: KeygateDocument): object {
  const everyCertificate = Object.keys((document['certificates'] as object | undefined) ?? token.certificates);
  const listeners = Object.entries(document.listeners).map(([name, listener]) => [
    name,
    {
      bind: ['127.0.0.1:0'],
      certificates: everyCertificate,
      upstream: Object.keys(document.upstreams)[0],
      ...listener,
    },
  ]);
  return {
    workers: 1,
    admin: { listen: '127.0.0.1:0' },
    drainDeadline: '2s',
    tokens: { hsm: token.settings },
    certificates: token.certificates,
    ...document,
    listeners: Object.fromEntries(listeners) as object,
  };
}

/** Resident memory of a process, in bytes. */
export function residentBytes(pid: number): number {
  const kibibytes = /^VmRSS:\s+(\d+) kB$/m.exec(readFileSync(`/proc/${pid}/status`, 'utf8'))?.[1];
  return Number(kibibytes) * 1024;
}

let launched = 0;

function launch(
  token: ProvisionedToken,
  file: string,
  { env, args = [], launcher = [], inherit = [] }: LaunchOptions,
): ChildProcessByStdio<null, Readable, Readable> {
  const [program, ...rest] = [...launcher, process.execPath, main];
  return spawn(program, [...rest, 'serve', '-c', file, ...args], {
    env: { ...process.env, ...token.env, ...env },
    stdio: ['ignore', 'pipe', 'pipe', ...inherit],
    // A process group of its own, by which its workers are found when it has gone.
    detached: true,
  }) as ChildProcessByStdio<null, Readable, Readable>;
}

const main = fileURLToPath(new URL('../../src/cli/main.ts', import.meta.url));

function parseLine(line: string): LogLine {
  try {
    return JSON.parse(line) as LogLine;
  } catch {
    return { level: 'unparsed', message: line };
  }
}

function addressParts(address: string): { readonly host: string; readonly port: number } {
  const colon = address.lastIndexOf(':');
  return { host: address.slice(0, colon).replace(/^\[(.*)\]$/, '$1'), port: Number(address.slice(colon + 1)) };
}

/** Without the dead that nobody has waited for. */
function processesInGroup(group: number): number[] {
  return readdirSync('/proc')
    .filter((name) => /^\d+$/.test(name))
    .map(Number)
    .filter((pid) => {
      try {
        // proc(5): the name in parentheses may hold anything; state, parent and group follow it.
        const [state, , pgrp] = readFileSync(`/proc/${pid}/stat`, 'utf8')
          .replace(/^.*\) /s, '')
          .split(' ');
        return Number(pgrp) === group && state !== 'Z';
      } catch {
        return false; // gone between the two looks
      }
    });
}
