/**
 * Owns: the logs of a process: which there are, what a line of the event log looks like, opening them again, their end.
 * Must not know: who logs, or how lines get into a file (engine/src/log.rs). Never given a PIN, a key or a URI with a PIN in it.
 * Runs: main thread of the primary and of each worker; it hands lines to a thread of the engine and never waits for a disk
 * or a reader, except for a moment when the process ends: the last line before an exit is the one that matters.
 */
import pino from 'pino';
import { prettyFactory } from 'pino-pretty';
import type { LogConfig } from './config/config.ts';
import { engine } from './engine/binding.ts';
import type { LineLog, LogSnapshot } from './engine/native.d.ts';
import { ServiceError } from './errors.ts';

/**
 * Every event that can be in the log, with its meaning. Names are stable: what reads logs matches on them. README has the
 * same table.
 */
export const logEvents = {
  starting: 'keygate begins to start: version, configuration file',
  privileges_dropped: 'root was given up for the configured user',
  privileges_kept: 'keygate runs as root, because no `user` is configured',
  sandbox_entered: 'a worker is in its sandbox, and what holds there',
  sandbox_limited: 'the sandbox of a worker is not as it should be, and what is missing; again when that changes',
  sandbox_off: 'workers are in no sandbox, because `sandbox.enabled` is false',
  ready: 'every worker serves; with the addresses of listeners and admin server',
  worker_ready: 'a worker serves',
  worker_lost: 'a worker died or failed, and why; it is replaced',
  worker_crashed: 'a defect ended a worker: report it',
  worker_channel: 'the channel between primary and a worker failed',
  primary_lost:
    'the primary is gone: this worker has taken what waited in its queue, accepts nothing more and ends with its last connection, or at the drain deadline',
  worker_ended: 'a worker has drained and left',
  queue_adopted: 'a sibling serves the accept queue of a worker that is gone',
  token_warning: 'something about a token or key that works and should not stay so',
  token_down: 'a worker cannot sign with a token any more, and why',
  token_up: 'it can again',
  lanes_lost: 'signing threads of a worker are lost in the module of a token, and others have taken their places',
  worker_stuck: 'calls into a module do not return in a worker: another takes its place, and it keeps its connections',
  worker_replaced: 'a worker that was stuck accepts nothing any more; its connections may end until the drain deadline',
  token_repaired: 'PKCS#11 sessions were reopened, a login repeated, keys found again, or the module initialised again',
  server_down: 'a worker holds a server of an upstream for unhealthy',
  server_up: 'it does not any more',
  server_certificate:
    "certificates of an upstream's servers were refused, or reported and accepted, and why; once a minute",
  tlsa_changed: 'DNS says something else about the TLSA records of a server, or nothing that holds',
  transparency_logs_old: 'the list of transparency logs is out of date',
  upstream_unresolved: 'the name of a server has no address; the server is left out',
  tickets_rotated: 'another key issues session tickets',
  tickets_not_rotated:
    'no token could derive the next ticket key, and why; the one derived beforehand is used for an epoch, and then there are no tickets',
  ocsp_stapled: 'a certificate has an OCSP response that says good, and until when; not for each that follows',
  ocsp_revoked: 'the issuer says that a certificate is revoked, and clients that ask are told so',
  ocsp_fetch_failed:
    'no OCSP response could be fetched, and why; once for each reason, and tried again until there is one',
  ocsp_expired: 'the OCSP response of a certificate has ended, and there was no other: it is served without',
  ocsp_must_staple_missing:
    'a must-staple certificate has no valid OCSP response: clients that honour that refuse it; repeated',
  ocsp_impossible: 'a certificate that is to be stapled cannot be: it names no responder, or its chain has no issuer',
  ocsp_cache_failed: 'OCSP responses cannot be kept on disk, and why',
  reload_requested: 'somebody asked the admin server for a reload',
  reload_committed: 'the file is what is served; with what has changed',
  reload_refused: 'the file is wrong, and where; nothing has changed',
  reload_rolled_back: 'a worker could not serve the new configuration, and why; nothing has changed',
  signal: 'SIGTERM or SIGINT was received',
  upgrade_requested: 'somebody asked the admin server for a successor',
  upgrade_failed: 'the successor could not take over, and why; nothing has changed',
  retire_failed: 'sockets that a successor does not have could not be closed; keygate drains all the same',
  upgraded: 'a successor has taken over; what is open here ends here',
  drain_requested: 'somebody asked the admin server for a drain',
  drain_started: 'nobody is accepted any more; connections may end',
  notify_failed: 'systemd cannot be told that keygate is ready, reloads or stops',
  ended: 'no worker is left; with the number of connections that were cut',
  admin_server: 'the admin server could not accept a connection',
  admin_request: 'the admin server could not answer a request',
  admin_status: 'the status page could not be told what was measured: a defect, report it',
  admin_tls: 'a client of the admin server did not get through TLS (debug)',
  admin_token_in_clear: 'the admin token is sent without TLS over the network',
  admin_token_refused: 'requests to the admin server came with a wrong token; once in ten seconds for each source',
  log_level_changed: 'somebody asked the admin server for another log level',
  logs_reopened: 'log files were opened again',
  log_reopen_failed: 'a log file could not be opened again; the old one is still used',
  log_lines_dropped: 'lines were lost: the disk was full, or a reader stalled',
  key_log_enabled: 'the secrets of every connection are written to a file: never in production',
  connection: 'a connection has ended (access log)',
} as const;

/** `connection` is the engine's. */
type LogEvent = Exclude<keyof typeof logEvents, 'connection'>;

type Write = (details: { readonly event: LogEvent; readonly [field: string]: unknown }, message: string) => void;

/** pino's, with events that are in the table and nothing else. */
export interface Log {
  level: string;
  readonly debug: Write;
  readonly info: Write;
  readonly warn: Write;
  readonly error: Write;
  readonly fatal: Write;
}

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
  process.on('exit', () => {
    for (const each of all) each.flush(flushBudgetMs);
  });
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
