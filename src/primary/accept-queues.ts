/**
 * Owns: who accepts from which sockets: each worker from those of its own slot, and for one that is not there a sibling, so
 * that connections that wait in its queue are served meanwhile.
 * Must not know: why a worker is not there, or when it comes back.
 * Runs: main thread of the primary.
 */
import type { Log } from '../log.ts';
import type { SocketUse } from '../messages.ts';
import type { Listeners } from './listeners.ts';
import type { Slot } from './slot.ts';

/** What the worker in a slot accepts from by itself. */
export function usesOf({ sockets }: Listeners, { index }: Slot): SocketUse[] {
  return sockets.filter(({ slots }) => slots.includes(index)).map(({ socket, listener }) => ({ socket, listener }));
}

/** Has a sibling accept from the queues that nobody accepts from, if one is ready. */
export function adoptOrphans(slots: readonly Slot[], listeners: Listeners, log: Log): void {
  const adopter = slots.find(({ state }) => state === 'ready');
  if (adopter === undefined) return;
  for (const orphaned of slots) {
    if (orphaned.state === 'ready' || orphaned.adoptedBy !== undefined) continue;
    orphaned.adoptedBy = adopter;
    adopt(orphaned, adopter, listeners);
    log.info(
      { event: 'queue_adopted', worker: orphaned.index, by: adopter.index },
      'a sibling serves the accept queue',
    );
  }
}

/** What there is to listen on has changed. */
export function adoptAgain(slots: readonly Slot[], listeners: Listeners): void {
  for (const slot of slots) if (slot.adoptedBy !== undefined) adopt(slot, slot.adoptedBy, listeners);
}

/** The slot's own worker accepts from its queues again. */
export function takeBack(slot: Slot, listeners: Listeners): void {
  const adopter = slot.adoptedBy;
  slot.adoptedBy = undefined;
  if (adopter === undefined) return;
  const sockets = orphansOf(slot, adopter, listeners).map(({ socket }) => socket);
  adopter.worker?.tell({ type: 'release', sockets });
}

/** Who accepted from siblings' queues does so no more. */
export function abandon(slots: readonly Slot[], adopter: Slot): void {
  for (const slot of slots) if (slot.adoptedBy === adopter) slot.adoptedBy = undefined;
}

function adopt(orphaned: Slot, adopter: Slot, listeners: Listeners): void {
  adopter.worker?.tell({ type: 'adopt', accept: orphansOf(orphaned, adopter, listeners) });
}

/** Without those that the sibling shares: it accepts from them, before and after. */
function orphansOf(orphaned: Slot, sibling: Slot, listeners: Listeners): SocketUse[] {
  const shared = new Set(usesOf(listeners, sibling).map(({ socket }) => socket));
  return usesOf(listeners, orphaned).filter(({ socket }) => !shared.has(socket));
}
