/**
 * Owns: what a parser of a single value answers.
 * Must not know: where the value stood.
 * Runs: everywhere.
 */
import type { ErrorCode } from '../errors.ts';

/** Why a value was refused. */
export interface Fault {
  readonly expected: string;
  /** Stands in for the value when the value itself must not be shown, or when a part of it says more. */
  readonly found?: string;
  readonly hint?: string;
  /** Default: `config_value`. */
  readonly code?: ErrorCode;
}

export type Parsed<T> = { readonly value: T } | { readonly fault: Fault };
