/**
 * Owns: that another keygate takes over: a new program or new settings that only a start can have, without a client that
 * notices. In which order the two act, and what the successor is given: listening sockets, secrets of session tickets.
 * Must not know: workers, what listens where, what the admin server is.
 * Runs: main thread of both primaries.
 *
 * ```text
 *  old: spawn ──inheritance──> new: starts its workers on the same sockets
 *       closes its admin server <──prepared── all are ready: both accept
 *       ──go──> opens its admin server
 *       retires sockets that only it has <──serving── the service manager's main process from now on
 *       drains
 * ```
 * Until `go` the new one can fail or be late without consequences, and afterwards the old one opens its admin server again.
 */
import { spawn } from 'node:child_process';
import type { ChildProcess } from 'node:child_process';
import { once } from 'node:events';
import type { Listeners } from './listeners.ts';
import type { TicketSecrets } from './ticket-epochs.ts';

/** What it knows of itself that the next one must know. Sockets have the number that they had in the former process. */
export interface Inheritance {
  readonly listeners: Listeners;
  readonly tickets: TicketSecrets;
}

type FromFormer = { readonly type: 'inheritance'; readonly inheritance: Inheritance } | { readonly type: 'go' };
type FromSuccessor =
  | { readonly type: 'prepared' }
  /** `retired`: numbers of sockets that it does not go on with; an older release does not say. */
  | { readonly type: 'serving'; readonly retired?: readonly number[] };

/** Of the command that started keygate, as it was called: a link to it may lead to another release by now (bin/keygate). */
const commandVariable = 'KEYGATE_COMMAND';
const successorVariable = 'KEYGATE_SUCCESSOR';
/** Behind standard input, output and error, and the channel. */
const firstFd = 4;

/** What the former keygate has to do, in this order. */
export interface Handover {
  readonly inheritance: Inheritance;
  /** What the service manager gave to this process, and so gives to the next. */
  readonly env: NodeJS.ProcessEnv;
  readonly deadlineMs: number;
  readonly closeAdmin: () => void;
  readonly openAdmin: () => Promise<void>;
  /** This keygate drains, and shuts its sockets: nobody can take them over any more. */
  readonly signal: AbortSignal;
}

class UpgradeError extends Error {}

export interface Succession {
  readonly pid: number;
  /** Sockets that only the former keygate has now, by number. */
  readonly retired: readonly number[];
}

/**
 * Starts a successor; resolves when it serves.
 * @throws UpgradeError the successor gave up, and why is in its log; or it was late. Nothing has changed.
 */
export async function handOver(handover: Handover): Promise<Succession> {
  const { inheritance, env, deadlineMs, closeAdmin, openAdmin, signal } = handover;
  const fds = inheritance.listeners.sockets.map(({ fd }) => fd);
  const child = start(fds, env);
  const end = (): void => void child.kill('SIGKILL');
  const late = setTimeout(end, deadlineMs);
  signal.addEventListener('abort', end);
  let isAdminClosed = false;
  let retired: readonly number[];
  try {
    tell(child, { type: 'inheritance', inheritance });
    await heard(child, 'prepared');
    closeAdmin();
    isAdminClosed = true;
    tell(child, { type: 'go' });
    ({ retired = [] } = await heard(child, 'serving'));
  } catch (error) {
    end();
    if (isAdminClosed) {
      // It may have the address.
      await ended(child);
      await openAdmin();
    }
    throw error;
  } finally {
    clearTimeout(late);
    signal.removeEventListener('abort', end);
  }
  child.unref();
  return { pid: child.pid ?? 0, retired };
}

function start(fds: readonly number[], env: NodeJS.ProcessEnv): ChildProcess {
  const command = process.env[commandVariable];
  const [program, ...args] =
    command === undefined
      ? [process.execPath, ...process.execArgv, ...process.argv.slice(1)]
      : [command, ...process.argv.slice(2)];
  const child = spawn(program, args, {
    env: { ...process.env, ...env, [successorVariable]: '1' },
    stdio: ['ignore', 'inherit', 'inherit', 'ipc', ...fds],
    // Buffers are told as what they are.
    serialization: 'advanced',
  });
  // Whoever waits hears of it; afterwards it is on its own.
  child.on('error', () => {});
  return child;
}

async function ended(child: ChildProcess): Promise<void> {
  if (child.exitCode !== null || child.signalCode !== null) return;
  const { promise, resolve } = Promise.withResolvers<void>();
  // Not `once` of node:events, which gives up at an error of the channel.
  child.once('exit', () => resolve());
  await promise;
}

function tell(child: ChildProcess, message: FromFormer): void {
  // One that has gone cannot be told; that it has is heard.
  child.send(message, () => {});
}

async function heard<Type extends FromSuccessor['type']>(
  child: ChildProcess,
  wanted: Type,
): Promise<FromSuccessor & { readonly type: Type }> {
  const stop = new AbortController();
  const { signal } = stop;
  const gone = async (): Promise<never> => {
    const [code, killedBy] = (await once(child, 'exit', { signal })) as [number | null, string | null];
    const found = killedBy === 'SIGKILL' ? 'was not ready in time' : `left with ${code ?? killedBy}`;
    throw new UpgradeError(`the successor ${found}, before it was ${wanted}; the log says why`);
  };
  const said = async () => {
    const [message] = (await once(child, 'message', { signal })) as [FromSuccessor];
    if (message.type === wanted) return message as FromSuccessor & { readonly type: Type };
    throw new UpgradeError(`the successor said ${message.type}, expected ${wanted}`);
  };
  try {
    // `once` rejects with an error that the child emits: one that could not be started.
    return await Promise.race([gone(), said()]);
  } catch (error) {
    throw error instanceof UpgradeError
      ? error
      : new UpgradeError(`the successor could not be started: ${String(error)}`, { cause: error });
  } finally {
    stop.abort();
  }
}

/** The successor's side. */
export interface Predecessor {
  readonly inheritance: Inheritance;
  /** Every worker is ready; resolves when it is the successor's turn. */
  prepared(): Promise<void>;
  /** There is no way back from here. @param retired the numbers of inherited sockets that this keygate does not go on with */
  serving(retired: readonly number[]): void;
}

/** Undefined: nobody was here before. Takes what says so out of the environment: workers are nobody's successors. */
export async function findPredecessor(env: NodeJS.ProcessEnv): Promise<Predecessor | undefined> {
  const isSuccessor = env[successorVariable] !== undefined;
  delete env[successorVariable];
  if (!isSuccessor || process.send === undefined) return undefined;
  // Its death is the end of what it was about to give away, unless that is done.
  const orphaned = (): void => process.exit(1);
  process.once('disconnect', orphaned);
  const { inheritance } = (await heardOfFormer('inheritance')) as FromFormer & { readonly type: 'inheritance' };
  const { sockets, passed, addresses } = inheritance.listeners;
  const fds = new Map(sockets.map(({ fd }, index) => [fd, firstFd + index]));
  const moved = <Owner extends { readonly fd: number }>(owner: Owner): Owner => ({
    ...owner,
    fd: fds.get(owner.fd) ?? owner.fd,
  });
  const listeners = { sockets: sockets.map(moved), passed: passed.map(moved), addresses };
  return {
    inheritance: { ...inheritance, listeners },
    async prepared() {
      process.send?.({ type: 'prepared' } satisfies FromSuccessor);
      await heardOfFormer('go');
    },
    serving(retired) {
      process.off('disconnect', orphaned);
      process.send?.({ type: 'serving', retired } satisfies FromSuccessor, undefined, {}, () => process.disconnect?.());
    },
  };
}

async function heardOfFormer(wanted: FromFormer['type']): Promise<FromFormer> {
  for (;;) {
    const [message] = (await once(process, 'message')) as [FromFormer];
    if (message.type === wanted) return message;
  }
}
