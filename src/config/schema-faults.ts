/**
 * Owns: from what zod says to faults in our words.
 * Must not know: what the keys mean, positions.
 * Runs: at start, on the main thread.
 */
import type * as z from 'zod';
import type { Fault } from './fault.ts';
import { isSecret, knownKeys } from './schema.ts';
import type { Path, PlacedFault } from './source.ts';
import { suggest } from './suggestion.ts';

export function schemaFaults(error: z.ZodError | undefined, document: unknown): PlacedFault[] {
  return (error?.issues ?? []).flatMap((issue) => issueFaults(issue, document));
}

function issueFaults(issue: z.core.$ZodIssue, document: unknown): PlacedFault[] {
  const path = issue.path.filter((step) => typeof step !== 'symbol');
  switch (issue.code) {
    case 'unrecognized_keys':
      return unknownKeyFaults(path, issue.keys, document);
    case 'invalid_key':
      return [{ path, at: 'key', expected: issue.issues[0]?.message ?? issue.message }];
    case 'invalid_type':
    case 'invalid_union':
      return [{ path, code: 'config_type', expected: issue.message, ...secretHint(path) }];
    case 'custom':
      // Our own parsers put a Fault there.
      return [{ path, ...(issue.params as Partial<Fault> | undefined), expected: issue.message }];
    default:
      return [{ path, expected: issue.message }];
  }
}

function unknownKeyFaults(parent: Path, keys: readonly string[], document: unknown): PlacedFault[] {
  const known = knownKeys(parent);
  const present = valueAt(document, parent);
  const absent = known.filter((key) => present === undefined || !Object.hasOwn(present, key));
  // source.ts reports __proto__ wherever it stands; zod sees it in some places only.
  const unreported = keys.filter((key) => key !== '__proto__');
  return unreported.map((key) => {
    const path = [...parent, key];
    const suggestion = suggest(key, absent);
    return {
      path,
      at: 'key',
      code: 'config_unknown_key',
      expected: `one of ${known.join(', ')}`,
      ...(suggestion === undefined ? {} : { hint: `did you mean "${suggestion}"?` }),
      ...secretHint(path),
    };
  });
}

function secretHint(path: Path): { hint?: string } {
  return isSecret(path) ? { hint: 'keep the secret outside of the configuration; if one stood here, change it' } : {};
}

function valueAt(document: unknown, path: Path): object | undefined {
  let value: unknown = document;
  for (const step of path)
    value = typeof value === 'object' && value !== null ? (value as Record<string | number, unknown>)[step] : undefined;
  return typeof value === 'object' && value !== null ? value : undefined;
}
