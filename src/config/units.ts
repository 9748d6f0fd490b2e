/**
 * Owns: durations and sizes as people write them.
 * Must not know: which keys hold them, their ranges.
 * Runs: everywhere.
 */
import type { Parsed } from './fault.ts';

const milliseconds = { ms: 1, s: 1000, m: 60_000, h: 3_600_000, d: 86_400_000 } as const;
const bytes = { B: 1, KiB: 1024, MiB: 1024 ** 2, GiB: 1024 ** 3 } as const;

/** `250ms`, `5s`, `1m`, `2h`, `7d` to milliseconds: one whole number, one unit, nothing else. */
export function parseDuration(text: string): Parsed<number> {
  return parseQuantity(text, milliseconds, 'a duration such as 250ms, 5s, 1m, 2h or 7d');
}

/** `512B`, `64KiB`, `1MiB`, `2GiB` to bytes: one whole number, one unit, nothing else. */
export function parseSize(text: string): Parsed<number> {
  return parseQuantity(text, bytes, 'a size such as 512B, 64KiB, 1MiB or 2GiB');
}

/** In the largest unit that is exact: 90000 is `90s`, 3600000 is `1h`. */
export function formatDuration(durationMs: number): string {
  return formatQuantity(durationMs, milliseconds);
}

/** In the largest unit that is exact: 65536 is `64KiB`. */
export function formatSize(sizeBytes: number): string {
  return formatQuantity(sizeBytes, bytes);
}

function parseQuantity(text: string, units: Readonly<Record<string, number>>, expected: string): Parsed<number> {
  const match = /^(?<count>0|[1-9][0-9]{0,14})(?<unit>[A-Za-z]+)$/.exec(text);
  const unit = match?.groups?.['unit'] ?? '';
  if (!Object.hasOwn(units, unit)) return { fault: { expected } };
  const value = Number(match?.groups?.['count']) * (units[unit] ?? Number.NaN);
  return Number.isSafeInteger(value) ? { value } : { fault: { expected: `${expected}, below 2^53` } };
}

function formatQuantity(value: number, units: Readonly<Record<string, number>>): string {
  const [unit, factor] = Object.entries(units).findLast(([, each]) => value >= each && value % each === 0) ?? ['', 1];
  return `${value / factor}${unit === '' ? Object.keys(units)[0] : unit}`;
}
