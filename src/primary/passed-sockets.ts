/**
 * Owns: the listening sockets that a service manager opened for keygate (socket activation, sd_listen_fds(3)).
 * Must not know: listeners, workers.
 * Runs: main thread of the primary, once, before anything is forked.
 */
import type { EngineBinding } from '../engine/binding.ts';
import { ServiceError } from '../errors.ts';

/** The service manager has it too: it stays open there, and what waits in its queue is for whoever accepts next. */
export interface PassedSocket {
  readonly fd: number;
  /** FileDescriptorName= of the unit. */
  readonly name: string;
  /** As a listener's `bind` has it. */
  readonly address: string;
}

const firstFd = 3;

/**
 * Takes them, and takes what says so out of the environment: workers must not take it for theirs.
 * @throws ServiceError `bind_failed` when one of them is something that keygate cannot accept from.
 */
export function takePassedSockets(env: NodeJS.ProcessEnv, native: EngineBinding): readonly PassedSocket[] {
  const { LISTEN_PID: pid, LISTEN_FDS: count = '0', LISTEN_FDNAMES: names = '' } = env;
  for (const name of ['LISTEN_PID', 'LISTEN_FDS', 'LISTEN_FDNAMES', 'LISTEN_PIDFDID']) delete env[name];
  // Somebody else's: a parent's that did not take them.
  if (pid !== String(process.pid)) return [];
  if (!/^\d{1,4}$/.test(count)) {
    throw new ServiceError('bind_failed', `LISTEN_FDS: found "${count}", expected a number of sockets`);
  }
  const name = names.split(':');
  return Array.from({ length: Number(count) }, (_, index) => take(firstFd + index, name[index] ?? 'unnamed', native));
}

/** `127.0.0.1:443 (descriptor 3, keygate.socket)`, for messages. */
export function formatPassedSocket({ fd, name, address }: PassedSocket): string {
  return `${address} (descriptor ${fd}, ${name})`;
}

function take(fd: number, name: string, native: EngineBinding): PassedSocket {
  try {
    return { fd, name, address: native.adoptListener(fd) };
  } catch (cause) {
    const found = cause instanceof Error ? cause.message : String(cause);
    throw new ServiceError('bind_failed', `descriptor ${fd} (${name}), passed to listen on, is unusable: ${found}`, {
      cause,
      hint: found.includes('IPv4 as well')
        ? 'set BindIPv6Only=ipv6-only in the socket unit, and give IPv4 a ListenStream= of its own'
        : 'a socket unit for keygate has ListenStream= with addresses and ports, and Accept=no',
    });
  }
}
