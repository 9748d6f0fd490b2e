/**
 * Owns: how results of commands look: tables, colours, files.
 * Must not know: what the results mean.
 * Runs: on the main thread of a command.
 */
import { writeFileSync } from 'node:fs';
import { styleText } from 'node:util';
import Table from 'cli-table3';
import { ServiceError } from '../errors.ts';

export type Colour = 'green' | 'yellow' | 'red' | 'bold' | 'dim';

/** Colours only where a terminal shows them and NO_COLOR does not forbid it. */
export function coloured(colour: Colour, text: string): string {
  return styleText(colour, text, { stream: process.stdout });
}

export function printLine(text: string): void {
  process.stdout.write(`${text}\n`);
}

export function printJson(value: unknown): void {
  printLine(JSON.stringify(value, undefined, 2));
}

/** Columns without borders, so that the output can be cut by column and still be read. */
export function printTable(head: readonly string[], rows: readonly (readonly string[])[]): void {
  const table = new Table({
    head: head.map((title) => coloured('bold', title)),
    chars: noBorders,
    style: { head: [], 'padding-left': 0, 'padding-right': 2 },
  });
  table.push(...rows.map((row) => [...row]));
  for (const line of table.toString().split('\n')) printLine(line.trimEnd());
}

/**
 * To standard output, or to a file that is not there yet: what is there may be the only copy of a certificate.
 * @throws ServiceError `output_failed`
 */
export function writeResult(text: string, file: string | undefined): void {
  if (file === undefined) {
    process.stdout.write(text);
    return;
  }
  try {
    writeFileSync(file, text, { flag: 'wx', mode: 0o644 });
  } catch (error) {
    const exists = (error as NodeJS.ErrnoException).code === 'EEXIST';
    throw new ServiceError('output_failed', `${file}: ${exists ? 'is there already' : (error as Error).message}`, {
      ...(exists ? { hint: 'choose another name; keygate overwrites no file' } : {}),
      cause: error,
    });
  }
}

const noBorders = Object.fromEntries(
  ['top', 'top-mid', 'top-left', 'top-right', 'bottom', 'bottom-mid', 'bottom-left', 'bottom-right']
    .concat(['left', 'left-mid', 'mid', 'mid-mid', 'right', 'right-mid', 'middle'])
    .map((name) => [name, '']),
);
