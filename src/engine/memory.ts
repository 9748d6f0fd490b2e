/**
 * Owns: giving back the memory that a start or a reload needed and the rest of a process' life does not.
 * Must not know: what needed it.
 * Runs: main thread of the primary and of a worker; takes it some ten milliseconds, which no connection waits for.
 */
import { setFlagsFromString } from 'node:v8';
import { runInNewContext } from 'node:vm';
import type { EngineBinding } from './binding.ts';

/**
 * V8 collects when it is allocated from, and after its start JavaScript allocates next to nothing here: with ten thousand
 * certificates a worker would keep most of a hundred megabytes of parsed files for ever.
 */
export function giveBackMemory(native: Pick<EngineBinding, 'trimMemory'>): void {
  collect ??= garbageCollector();
  collect({ type: 'major', execution: 'sync', flavor: 'last-resort' });
  native.trimMemory();
}

/** Reloads come in bursts, from whatever renews certificates: once after the last is enough. */
const quietMs = 5_000;

let pending: NodeJS.Timeout | undefined;

/** The same, when nobody has asked for it for a while. */
export function giveBackMemorySoon(native: Pick<EngineBinding, 'trimMemory'>): void {
  clearTimeout(pending);
  pending = setTimeout(() => giveBackMemory(native), quietMs).unref();
}

type Collect = (how: { readonly type: 'major'; readonly execution: 'sync'; readonly flavor: 'last-resort' }) => void;

let collect: Collect | undefined;

/** Contexts made while the flag is set have the function; it is the documented flag of V8, and of Node's --expose-gc. */
function garbageCollector(): Collect {
  setFlagsFromString('--expose-gc');
  try {
    return runInNewContext('gc') as Collect;
  } finally {
    setFlagsFromString('--no-expose-gc');
  }
}
