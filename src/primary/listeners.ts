/**
 * Owns: the listening sockets: opened once for all workers and kept as long as the configuration has them, so that
 * connections waiting in a dead worker's accept queue are never lost; what a reload opens and retires. Sockets that were
 * passed by a service manager are taken instead, and never closed or shut: what waits there is for whoever accepts next.
 * Must not know: TLS, tokens, who accepts.
 * Runs: main thread of the primary.
 */
import { closeSync } from 'node:fs';
import { isIPv6 } from 'node:net';
import { formatAddress } from '../config/address.ts';
import type { Config, ListenerConfig, TcpAddress } from '../config/config.ts';
import type { EngineBinding } from '../engine/binding.ts';
import { ServiceError } from '../errors.ts';
import type { SocketUse } from '../messages.ts';
import { formatPassedSocket } from './passed-sockets.ts';
import type { PassedSocket } from './passed-sockets.ts';

export interface Listeners {
  /** In the order in which workers inherit them. */
  readonly sockets: readonly ListeningSocket[];
  /** Where each listener listens, with the port that was chosen for port 0. */
  readonly addresses: Readonly<Record<string, readonly string[]>>;
  /** All that there are: each belongs to a listener, also after a reload. */
  readonly passed: readonly PassedSocket[];
}

/** One address of a listener has one socket for each worker slot (SO_REUSEPORT), or those that were passed for it. */
export interface ListeningSocket extends SocketUse {
  readonly fd: number;
  /** Who accepts from it. More than one only when fewer were passed than there are workers. */
  readonly slots: readonly number[];
  readonly passed: boolean;
  readonly backlog: number;
  /** As the listener has it. */
  readonly wanted: TcpAddress;
  readonly transparent: boolean;
  readonly bound: string;
}

/** What becomes of the listeners when the configuration does. */
export interface NextListeners extends Listeners {
  /** Not in `former`. */
  readonly opened: readonly ListeningSocket[];
  /** Only in `former`. */
  readonly retired: readonly ListeningSocket[];
  /** In both, with another backlog. */
  readonly resized: readonly ListeningSocket[];
}

export const noListeners: Listeners = { sockets: [], addresses: {}, passed: [] };

/** What another process had, for whoever goes on with it: in its own slots, which may be more or fewer. */
export function inheritListeners({ sockets, addresses, passed }: Listeners, slots: number): Listeners {
  numbered = Math.max(numbered, ...sockets.map(({ socket }) => socket + 1));
  const groups = Map.groupBy(sockets, identity);
  return {
    sockets: [...groups.values()].flatMap((group) =>
      group.map((socket, index) => ({ ...socket, slots: dealt(index, group.length, slots) })),
    ),
    addresses,
    passed,
  };
}

/**
 * Opens what `former` lacks. A socket stays what it is when its address does, even if the listener's name changes: nobody
 * who waits in its queue notices.
 * @throws ServiceError `bind_failed`, naming listener and address, or the passed socket that no listener wants; then nothing
 * stays open.
 */
export function openListeners(
  former: Listeners,
  config: Pick<Config, 'listeners'>,
  slots: number,
  native: EngineBinding,
): NextListeners {
  const kept = Map.groupBy(former.sockets, identity);
  const sockets: ListeningSocket[] = [];
  const opened: ListeningSocket[] = [];
  const addresses: Record<string, string[]> = {};
  try {
    for (const listener of Object.values(config.listeners)) {
      addresses[listener.name] = listener.bind.map((wanted) => {
        const { name, backlog, transparent } = listener;
        const use = { listener: name, backlog, wanted, transparent };
        const same = takeOne(kept.get(identity(use)), slots)?.map((socket) => ({ ...socket, ...use }));
        const group =
          same ?? takePassed(use, listener, slots, former, native) ?? openAddress(use, listener, slots, former, native);
        if (same === undefined) opened.push(...group);
        sockets.push(...group);
        return group[0]?.bound ?? formatAddress(wanted);
      });
    }
    refuseForeignSockets(former.passed, sockets, addresses);
  } catch (error) {
    closeSockets(opened);
    throw error;
  }
  const next = new Map(sockets.map((own) => [own.socket, own]));
  return {
    sockets,
    addresses,
    passed: former.passed,
    opened,
    retired: former.sockets.filter(({ socket }) => !next.has(socket)),
    resized: former.sockets.flatMap(({ socket, backlog }) => {
      const own = next.get(socket);
      return own === undefined || own.backlog === backlog ? [] : [own];
    }),
  };
}

/** A passed socket that nobody accepts from lets clients wait for ever: only whoever passed it can close it. */
function refuseForeignSockets(
  passed: readonly PassedSocket[],
  sockets: readonly ListeningSocket[],
  addresses: Listeners['addresses'],
): void {
  const foreign = passed.filter(({ fd }) => !sockets.some((own) => own.fd === fd));
  if (foreign.length === 0) return;
  const found = foreign.map(formatPassedSocket).join(', ');
  const expected = Object.values(addresses).flat().join(', ');
  throw new ServiceError('bind_failed', `no listener binds the passed socket ${found}; expected ${expected}`, {
    hint: 'ListenStream= of the socket unit and `bind` of the listeners must name the same addresses',
  });
}

/** Clients are refused from now on, so that they turn to another host; what no worker has accepted is reset. */
export function shutSockets(sockets: readonly ListeningSocket[], native: EngineBinding): void {
  for (const { fd, passed } of sockets) if (!passed) native.shutListener(fd);
}

/** For the primary; who inherited or was handed one has it still. */
export function closeSockets(sockets: readonly ListeningSocket[]): void {
  for (const { fd, passed } of sockets) if (!passed) closeSync(fd);
}

/**
 * Port 0 is another port each time, so there the listener says which is meant; else the address does. Transparent a socket
 * is made, and does not become.
 */
function identity({
  listener,
  wanted,
  transparent,
}: Pick<ListeningSocket, 'listener' | 'wanted' | 'transparent'>): string {
  const place = wanted.port === 0 ? `${listener} ${formatAddress(wanted)}` : formatAddress(wanted);
  return transparent ? `${place} transparent` : place;
}

/** The sockets of one address; a listener may have several at port 0, where nothing is passed. */
function takeOne(group: ListeningSocket[] | undefined, slots: number): ListeningSocket[] | undefined {
  if (group === undefined || group.length === 0) return undefined;
  return group.splice(0, group[0]?.wanted.port === 0 ? slots : group.length);
}

let numbered = 0;

/** What the configuration says of an address. */
type Wanted = Pick<ListeningSocket, 'listener' | 'backlog' | 'wanted' | 'transparent'>;

function takePassed(
  use: Wanted,
  listener: ListenerConfig,
  slots: number,
  { passed }: Listeners,
  native: EngineBinding,
): ListeningSocket[] | undefined {
  const bound = formatAddress(use.wanted);
  const found = passed.filter(({ address }) => address === bound);
  if (found.length === 0) return undefined;
  return found.map(({ fd }, index) => {
    attempt(listener, bound, () => native.setBacklog(fd, use.backlog));
    return { ...use, socket: numbered++, fd, slots: dealt(index, found.length, slots), passed: true, bound };
  });
}

/** The slots of one of so many sockets: dealt out in turns, until each slot has one and each socket is somebody's. */
function dealt(index: number, sockets: number, slots: number): number[] {
  const turns = Array.from({ length: Math.max(sockets, slots) }, (_, turn) => turn);
  return turns.filter((turn) => turn % sockets === index).map((turn) => turn % slots);
}

function openAddress(
  use: Wanted,
  listener: ListenerConfig,
  slots: number,
  former: Listeners,
  native: EngineBinding,
): ListeningSocket[] {
  let bound = formatAddress(use.wanted);
  // Beside sockets of our own, which SO_REUSEPORT allows, the question whether another process is there has no answer.
  if (!former.sockets.some((own) => isBeside(own, use.wanted))) {
    attempt(listener, bound, () => native.probeAddress(bound));
  }
  const sockets: ListeningSocket[] = [];
  try {
    for (let slot = 0; slot < slots; slot++) {
      const { fd, address } = attempt(listener, bound, () => native.openListener(bound, use.backlog, use.transparent));
      bound = address; // the slots share the port that the first was given
      sockets.push({ ...use, socket: numbered++, fd, slots: [slot], passed: false, bound });
    }
    return sockets;
  } catch (error) {
    closeSockets(sockets);
    throw error;
  }
}

function isBeside({ wanted }: ListeningSocket, { host, port }: TcpAddress): boolean {
  return wanted.port === port && port !== 0 && isIPv6(wanted.host) === isIPv6(host);
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
    return {
      hint: 'ports below 1024 need root at start, with `user` to give it up, CAP_NET_BIND_SERVICE, or a socket unit',
    };
  }
  if (found.startsWith('EPERM')) {
    return { hint: '`transparent` needs root at start, with `user` to give it up, or CAP_NET_RAW' };
  }
  if (found.startsWith('EADDRNOTAVAIL')) {
    return { hint: 'no interface of this host has that address' };
  }
  return {};
}
