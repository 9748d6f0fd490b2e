/**
 * Owns: from a file to a `Config`, or to every problem in it with its position.
 * Must not know: what a key means (schema.ts), which names must exist (references.ts).
 * Runs: at start, on the main thread; reads one file of bounded size, synchronously.
 */
import assert from 'node:assert/strict';
import { closeSync, constants, fstatSync, openSync, readSync } from 'node:fs';
import { dirname, resolve } from 'node:path';
import { ConfigError, type ErrorCode, type Problem } from '../errors.ts';
import type { Config } from './config.ts';
import { normalise } from './normalise.ts';
import { referenceFaults } from './references.ts';
import { documentSchema, isSecret } from './schema.ts';
import { schemaFaults } from './schema-faults.ts';
import { parseSource } from './source.ts';

/** 10,000 certificates take 1 to 2 MiB; what a parser may have to hold in memory is a multiple. */
export const configBytesMax = 16 * 1024 * 1024;

/** What a person can read; a wrong file can have one in every line. */
const problemsMax = 200;

/**
 * Reads and checks a configuration file. Relative paths in it are relative to its directory.
 * @throws ConfigError with all problems, sorted by position.
 */
export function loadConfig(file: string): Config {
  const path = resolve(file);
  return parseConfig(readBounded(path), path);
}

/**
 * The same for a text that is already there.
 * @param file absolute path that problems name and relative paths are relative to.
 * @throws ConfigError
 */
export function parseConfig(text: string, file: string): Config {
  const source = parseSource(text, file, isSecret);
  const checked = documentSchema.safeParse(source.value, {
    // For kinds that state no expectation of their own.
    error: (issue) => (issue.code === 'invalid_type' && issue.expected === 'object' ? 'a mapping' : undefined),
  });
  // After a syntax error the values are guesses: what else is wrong with them would only distract.
  const faults = source.usable
    ? [...source.faults, ...schemaFaults(checked.error, source.value), ...referenceFaults(source.value)]
    : [];
  const problems = [...source.problems, ...faults.slice(0, problemsMax).map((fault) => source.problem(fault))];
  const [first, ...others] = problems.toSorted(byPosition);
  if (first !== undefined) {
    const more = faults.length - problemsMax;
    throw new ConfigError([first, ...others], more > 0 ? { hint: `${more} more problems are not shown` } : {});
  }
  // Each issue of a failed check becomes at least one problem, so without problems there is a document.
  assert(checked.success);
  return normalise(checked.data, file, dirname(file));
}

function byPosition(left: Problem, right: Problem): number {
  return (left.line ?? 0) - (right.line ?? 0) || (left.column ?? 0) - (right.column ?? 0);
}

function readBounded(file: string): string {
  const fail = (code: ErrorCode, found: string, expected: string): never => {
    throw new ConfigError([{ file, path: '', code, found, expected }]);
  };
  let descriptor: number | undefined;
  try {
    // Without O_NONBLOCK, opening a FIFO waits for a writer for ever.
    descriptor = openSync(file, constants.O_RDONLY | constants.O_NONBLOCK);
    if (!fstatSync(descriptor).isFile())
      return fail('config_unreadable', 'something that is not a regular file', 'a YAML file');
    const bytes = Buffer.alloc(configBytesMax + 1);
    let length = 0;
    for (;;) {
      const count = readSync(descriptor, bytes, length, bytes.length - length, null);
      if (count === 0) break;
      length += count;
    }
    if (length > configBytesMax)
      return fail('config_too_large', `more than ${configBytesMax} bytes`, `at most ${configBytesMax} bytes`);
    return new TextDecoder('utf-8', { fatal: true }).decode(bytes.subarray(0, length));
  } catch (error) {
    if (error instanceof ConfigError) throw error;
    const { code } = error as NodeJS.ErrnoException;
    if (code === 'ERR_ENCODING_INVALID_ENCODED_DATA')
      return fail('config_syntax', 'bytes that are not UTF-8', 'UTF-8 text');
    return fail('config_unreadable', code ?? String(error), 'a file that keygate can read');
  } finally {
    if (descriptor !== undefined) closeSync(descriptor);
  }
}
