/**
 * Owns: the listening sockets, opened once for all workers and kept for the life of the primary, so that connections
 * waiting in a dead worker's accept queue are never lost.
 * Must not know: TLS, tokens, who accepts.
 * Runs: main thread of the primary.
 */
import { formatAddress } from '../config/address.ts';
import type { Config, ListenerConfig } from '../config/config.ts';
import type { EngineBinding } from '../engine/binding.ts';
import { ServiceError } from '../errors.ts';
import type { InheritedSocket } from '../messages.ts';

/** cluster gives a worker its sockets from this descriptor on: 0, 1, 2 are standard, 3 is the channel to the primary. */
const firstInheritedFd = 4;

export interface Listeners {
  /** Descriptors in the primary, in the order in which workers inherit them. */
  readonly fds: readonly number[];
  /** What the worker in each slot accepts from, as descriptors in the worker. */
  readonly bySlot: readonly (readonly InheritedSocket[])[];
  /** Where each listener listens, with the port that was chosen for port 0. */
  readonly addresses: Readonly<Record<string, readonly string[]>>;
}

/**
 * Opens one socket per address and worker slot (SO_REUSEPORT).
 * @throws ServiceError `bind_failed`, naming listener and address
 */
export function openListeners(config: Config, slots: number, native: EngineBinding): Listeners {
  const fds: number[] = [];
  const bySlot: InheritedSocket[][] = Array.from({ length: slots }, () => []);
  const addresses: Record<string, string[]> = {};
  for (const listener of Object.values(config.listeners)) {
    const bound: string[] = [];
    for (const wanted of listener.bind) {
      let address = formatAddress(wanted);
      attempt(listener, address, () => native.probeAddress(address));
      for (const sockets of bySlot) {
        const opened = attempt(listener, address, () => native.openListener(address, listener.backlog));
        address = opened.address; // the slots share the port that the first was given
        sockets.push({ listener: listener.name, fd: firstInheritedFd + fds.length });
        fds.push(opened.fd);
      }
      bound.push(address);
    }
    addresses[listener.name] = bound;
  }
  return { fds, bySlot, addresses };
}

/** Clients are refused from now on, so that they turn to another host; what no worker has accepted is reset. */
export function shutListeners({ fds }: Listeners, native: EngineBinding): void {
  for (const fd of fds) native.shutListener(fd);
}

function attempt<T>(listener: ListenerConfig, address: string, open: () => T): T {
  try {
    return open();
  } catch (cause) {
    const found = cause instanceof Error ? cause.message : String(cause);
    throw new ServiceError('bind_failed', `listener ${listener.name} cannot listen on ${address}: ${found}`, {
      cause,
      ...hintFor(found),
    });
  }
}

function hintFor(found: string): { hint?: string } {
  if (found.startsWith('EADDRINUSE')) {
    return { hint: 'another process listens there already; stop it (ss -ltnp shows which) or choose another port' };
  }
  if (found.startsWith('EACCES')) {
    return { hint: 'ports below 1024 need root at start, with `user` to give it up, or CAP_NET_BIND_SERVICE' };
  }
  if (found.startsWith('EADDRNOTAVAIL')) {
    return { hint: 'no interface of this host has that address' };
  }
  return {};
}
