/**
 * Owns: the logs of a process: which there are, what a line of the event log looks like, opening them again, their end.
 * Must not know: who logs, or how lines get into a file (engine/src/log.rs). Never given a PIN, a key or a URI with a PIN in it.
 * Runs: main thread of the primary and of each worker; it hands lines to a thread of the engine and never waits for a disk
 * or a reader, except for a moment when the process ends: the last line before an exit is the one that matters.
 */
import pino from 'pino';
import type { Logger } from 'pino';
import { prettyFactory } from 'pino-pretty';
import type { LogConfig } from './config/config.ts';
import { engine } from './engine/binding.ts';
import type { LineLog, LogSnapshot } from './engine/native.d.ts';
import { ServiceError } from './errors.ts';

export type Log = Logger;

/** How long a process that ends waits for its last lines to be written. */
const flushBudgetMs = 500;

/** What has become of the lines of one process, by log. */
export interface LogCounts {
  readonly event: LogSnapshot['lines'];
  readonly access: LogSnapshot['records'];
  readonly key: LogSnapshot['lines'];
}

/** The open logs of a process. */
export interface Logs {
  readonly log: Log;
  /** For the engine: lines of connections. */
  readonly access: LineLog;
  /** For the engine; undefined when there is none. */
  readonly key: LineLog | undefined;
  readonly counts: LogCounts;
  /** Opens the files by their names again, after a rotation. What cannot be opened is logged where that still goes. */
  reopen(): void;
  /** Waits a moment until everything has been written. */
  flush(): void;
}

/**
 * @param worker slot of the worker, absent in the primary.
 * @throws ServiceError `log_failed`, naming the file
 */
export function openLogs(config: LogConfig, worker?: number): Logs {
  const event = open(config.file);
  const accessFile = config.access?.file;
  // One writer for one file: lines of two would meet in the middle.
  const access = accessFile === undefined || accessFile === config.file ? event : open(accessFile);
  // The primary sees no secret of a connection.
  const key = config.keyLog === undefined || worker === undefined ? undefined : open(config.keyLog, true);
  const log = eventLog(event, config, worker);
  const all = [...new Set([event, access, ...(key === undefined ? [] : [key])])];
  const flush = (): void => {
    for (const each of all) each.flush(flushBudgetMs);
  };
  process.on('exit', flush);
  return {
    log,
    access,
    key,
    get counts() {
      return {
        event: event.snapshot().lines,
        access: access.snapshot().records,
        key: key?.snapshot().lines ?? { written: 0, dropped: 0 },
      };
    },
    reopen() {
      for (const each of all) {
        try {
          each.reopen();
        } catch (error) {
          log.error({ event: 'log_reopen_failed', error }, 'a log cannot be opened again; the old file is still used');
        }
      }
      log.info({ event: 'logs_reopened' }, 'logs opened again');
    },
    flush,
  };
}

function open(file: string | undefined, secret = false): LineLog {
  try {
    return engine().LineLog.open(file, secret);
  } catch (cause) {
    const found = cause instanceof Error ? cause.message : String(cause);
    throw new ServiceError('log_failed', `the log cannot be opened: ${found}`, {
      cause,
      hint: 'keygate appends to it as `user`, which must be allowed to write there and to enter the directories above',
    });
  }
}

function eventLog(lines: LineLog, { level, file }: LogConfig, worker: number | undefined): Log {
  const options = {
    level,
    base: worker === undefined ? { pid: process.pid } : { pid: process.pid, worker },
    timestamp: pino.stdTimeFunctions.isoTime,
    formatters: { level: (label: string) => ({ level: label }) },
    messageKey: 'message',
    errorKey: 'error',
  };
  const format = file === undefined && process.stdout.isTTY ? forPeople() : (line: string) => line;
  return pino(options, {
    write(line) {
      lines.line(format(line).trimEnd());
    },
  });
}

function forPeople(): (line: string) => string {
  const format = prettyFactory({
    colorize: true,
    messageKey: 'message',
    ignore: 'pid',
    translateTime: 'SYS:HH:MM:ss.l',
  });
  return (line) => format(line) ?? '';
}
