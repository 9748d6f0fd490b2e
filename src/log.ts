/**
 * Owns: the log, one JSON line per event on standard output, or readable lines on a terminal.
 * Must not know: who logs. Never given a PIN, a key or a URI with a PIN in it.
 * Runs: main thread of the primary and of each worker. Synchronous: these are rare events, and the last line before an
 * exit is the one that matters.
 */
import pino from 'pino';
import type { Logger } from 'pino';
import pretty from 'pino-pretty';
import type { LogLevel } from './config/config.ts';

export type Log = Logger;

/** @param worker slot of the worker, absent in the primary. */
export function openLog(level: LogLevel, worker?: number): Log {
  const options = {
    level,
    base: worker === undefined ? { pid: process.pid } : { pid: process.pid, worker },
    timestamp: pino.stdTimeFunctions.isoTime,
    formatters: { level: (label: string) => ({ level: label }) },
    messageKey: 'message',
    errorKey: 'error',
  };
  if (process.stdout.isTTY) {
    return pino(options, pretty({ sync: true, messageKey: 'message', ignore: 'pid', translateTime: 'SYS:HH:MM:ss.l' }));
  }
  return pino(options, pino.destination({ fd: 1, sync: true }));
}
