/**
 * Owns: `keygate config schema` and `keygate config reference`.
 * Must not know: the keys; both are printed from the schema.
 * Runs: on the main thread of a command.
 */
import { configReference } from '../config/reference.ts';
import { jsonSchema } from '../config/schema.ts';
import { printJson, printLine } from './output.ts';

export function schema(): void {
  printJson(jsonSchema());
}

export function reference(): void {
  printLine(configReference());
}
