/**
 * Owns: reading the list of Certificate Transparency's logs (Google's format, version 3) and which of them count.
 * Must not know: certificates, SCTs.
 * Runs: main thread of a worker, at a start or a reload, and of `keygate check`.
 */
import { createHash } from 'node:crypto';
import { readFileSync } from 'node:fs';
import * as z from 'zod';
import type { TransparencyConfig } from '../config/config.ts';
import type { TransparencyLogSettings } from '../engine/native.d.ts';
import { ConfigError } from '../errors.ts';

const bytesMax = 16 * 1024 * 1024;
/** After so long browsers do not enforce by a list any more: logs have come and gone. */
const ageDaysMax = 70;

const seconds = z.iso
  .datetime({ offset: true })
  .transform((text) => Math.floor(Date.parse(text) / 1000))
  .pipe(z.int().min(0).max(0xffff_ffff));
const since = z.object({ timestamp: seconds });
const base64 = z.base64().transform((text) => Buffer.from(text, 'base64'));

const log = z.object({
  description: z.string().optional(),
  log_id: base64,
  key: base64,
  /** Exactly one of them. A log without any is there for tests, and counts for nothing. */
  state: z
    .object({ usable: since, qualified: since, readonly: since, retired: since, pending: since, rejected: since })
    .partial()
    .optional(),
  temporal_interval: z.object({ start_inclusive: seconds, end_exclusive: seconds }).optional(),
});

const list = z.object({
  log_list_timestamp: z.iso.datetime({ offset: true }).optional(),
  operators: z.array(
    z.object({
      name: z.string().min(1),
      logs: z.array(log).default([]),
      // Logs of the newer kind sign as the others do.
      tiled_logs: z.array(log).default([]),
    }),
  ),
});

export interface TransparencyLogs {
  /** Those whose SCTs count. */
  readonly logs: readonly TransparencyLogSettings[];
  readonly warnings: readonly string[];
}

/** @throws ConfigError `config_certificate` when it is not such a list, or no log of it counts. */
export function readTransparencyLogs({ logs: file }: TransparencyConfig, now = new Date()): TransparencyLogs {
  const { operators, log_list_timestamp: timestamp } = parse(file);
  const logs = operators.flatMap(({ name, logs: older, tiled_logs: newer }) =>
    [...older, ...newer].flatMap((entry) => logSettings(entry, name, file)),
  );
  if (logs.length === 0)
    throw fault(file, 'no log that counts', 'a list with usable, qualified, readonly or retired logs');
  const ageDays = timestamp === undefined ? 0 : (now.getTime() - Date.parse(timestamp)) / 86_400_000;
  const warnings =
    ageDays > ageDaysMax
      ? [`${file} is ${Math.floor(ageDays)} days old: fetch it again, certificates of new logs are refused`]
      : [];
  return { logs, warnings };
}

function logSettings(
  { log_id: id, key, state = {}, temporal_interval: interval, description }: z.output<typeof log>,
  operator: string,
  file: string,
): TransparencyLogSettings[] {
  if (!createHash('sha256').update(key).digest().equals(id))
    throw fault(file, `${description ?? 'a log'} with a log_id that is not the SHA-256 of its key`, 'an unharmed list');
  const { usable, qualified, readonly, retired } = state;
  if ((usable ?? qualified ?? readonly ?? retired) === undefined) return [];
  return [
    {
      id,
      key,
      operator,
      ...(retired === undefined ? {} : { retiredAt: retired.timestamp }),
      ...(interval === undefined ? {} : { endsFrom: interval.start_inclusive, endsBefore: interval.end_exclusive }),
    },
  ];
}

function parse(file: string): z.output<typeof list> {
  let text: string;
  try {
    text = readFileSync(file, 'utf8');
  } catch (error) {
    throw fault(file, (error as NodeJS.ErrnoException).code ?? String(error), 'a list of logs that keygate can read');
  }
  if (text.length > bytesMax) throw fault(file, `more than ${bytesMax} characters`, 'a list of logs');
  const parsed = list.safeParse(json(text, file));
  if (parsed.success) return parsed.data;
  const [first] = parsed.error.issues;
  throw fault(file, `${first?.path.join('.')}: ${first?.message}`, 'a list of logs, version 3');
}

function json(text: string, file: string): unknown {
  try {
    return JSON.parse(text);
  } catch {
    throw fault(file, 'something that is not JSON', 'a list of logs as JSON');
  }
}

function fault(file: string, found: string, expected: string): ConfigError {
  return new ConfigError([{ file, path: 'transparency.logs', code: 'config_certificate', found, expected }]);
}
