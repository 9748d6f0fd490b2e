/**
 * Owns: tables of text, for terminals and as Markdown; and how numbers, ratios and intervals are written in them.
 * Must not know: what is in them.
 * Runs: anywhere.
 */
import { stripVTControlCharacters, styleText } from 'node:util';
import type { Interval, Missing } from './statistics.ts';

/** The first row is the head. Columns of numbers are aligned to the right. */
export type Rows = readonly (readonly string[])[];

/** Aligned, so that it can be read as it is. */
export function markdownTable(rows: Rows): string[] {
  const escaped = rows.map((row) => row.map((cell) => cell.replaceAll('|', String.raw`\|`)));
  const widths = widthsOf(escaped);
  const numeric = numericColumns(escaped);
  const line = (cells: readonly string[]) => `| ${cells.join(' | ')} |`;
  const [head = '', ...body] = escaped.map((row) => line(padded(row, widths, numeric)));
  const rule = widths.map((width, column) =>
    numeric[column] === true ? `${'-'.repeat(width - 1)}:` : '-'.repeat(width),
  );
  return [head, line(rule), ...body];
}

export function terminalTable(rows: Rows): string[] {
  const widths = widthsOf(rows);
  const numeric = numericColumns(rows);
  return rows.map((row) => padded(row, widths, numeric).join('  ').trimEnd());
}

/** Ratios from a thousandth to thousands: three digits of them. */
export function ratioText(value: number): string {
  if (value === 0) return '0';
  return value.toFixed(value >= 100 ? 0 : value >= 10 ? 1 : value >= 0.1 ? 2 : 3);
}

/** `median (low to high)`; one round has no interval. */
export function intervalText(value: Interval | Missing, text: (value: number) => string): string {
  if ('missing' in value) return '–';
  if (value.coverage === 0) return text(value.median);
  return `${text(value.median)} (${text(value.low)} to ${text(value.high)})`;
}

/** When standard output is a terminal. */
export function coloured(style: 'bold' | 'dim' | 'green' | 'red' | 'yellow', text: string): string {
  return styleText(style, text, { stream: process.stdout });
}

function padded(row: readonly string[], widths: readonly number[], numeric: readonly boolean[]): string[] {
  return widths.map((width, column) => {
    const cell = row[column] ?? '';
    const space = ' '.repeat(width - lengthOf(cell));
    return numeric[column] === true ? space + cell : cell + space;
  });
}

function widthsOf(rows: Rows): number[] {
  const columns = Math.max(...rows.map(({ length }) => length));
  // A rule needs three dashes.
  return Array.from({ length: columns }, (_, column) => Math.max(3, ...rows.map((row) => lengthOf(row[column] ?? ''))));
}

function numericColumns([head = [], ...body]: Rows): boolean[] {
  return head.map((_, column) => body.every((row) => /^(?:$|[\d–])/.test(stripVTControlCharacters(row[column] ?? ''))));
}

function lengthOf(cell: string): number {
  return stripVTControlCharacters(cell).length;
}
