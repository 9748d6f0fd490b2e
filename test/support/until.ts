/**
 * Owns: waiting for what announces itself by no event, such as a counter of another process.
 * Must not know: what is waited for.
 * Runs: in test processes.
 */
import { setTimeout as pause } from 'node:timers/promises';

/** Looks again and again. @throws naming `what` when it has not come true in time; that time is no measurement. */
export async function until(what: string, condition: () => boolean | Promise<boolean>, deadlineMs = 15_000): Promise<void> {
  const giveUp = Date.now() + deadlineMs;
  while (!(await condition())) {
    if (Date.now() > giveUp) throw new Error(`waited ${deadlineMs} ms in vain until ${what}`);
    await pause(intervalMs);
  }
}

const intervalMs = 5;
