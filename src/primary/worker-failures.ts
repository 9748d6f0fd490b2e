/**
 * Owns: the words for what a worker failed with where the primary has to find them: it ended without a word, could not be
 * forked, hung; and the error that a failure is for whoever started keygate.
 * Must not know: what follows from a failure.
 * Runs: main thread of the primary.
 */
import { ConfigError, ServiceError, TokenError } from '../errors.ts';
import type { KeygateError } from '../errors.ts';
import type { WorkerFailure } from '../messages.ts';

export function exitFailure(slot: number, code: number | null, signal: string | null): WorkerFailure {
  const how = signal === null ? `exited with ${code}` : `was ended by ${signal}`;
  return failureOf('worker_failed', `worker ${slot} ${how}`, 1);
}

export function forkFailure(slot: number, error: unknown): WorkerFailure {
  const { code, message } = error as NodeJS.ErrnoException;
  const failure = failureOf('worker_failed', `worker ${slot} cannot be forked: ${message}`, 1);
  if (code !== 'EACCES') return failure;
  return {
    ...failure,
    hint: 'the user that workers run as must be allowed to read and execute what keygate consists of',
  };
}

export function hangFailure(slot: number, doing: string | undefined): WorkerFailure {
  const what = `worker ${slot} hung while ${doing ?? 'it started'} and was killed`;
  return {
    ...failureOf('token_operation', what, 69),
    hint: 'a token does not answer: try it with keygate token list, or pkcs11-tool',
  };
}

export function failureOf(code: WorkerFailure['code'], message: string, exitCode: number): WorkerFailure {
  return { code, message, hint: undefined, exitCode, problems: undefined, haltsForking: false };
}

/** For whoever started keygate, when no worker is left and none may be forked. */
export function failureError({ code, message, hint, exitCode, problems }: WorkerFailure): KeygateError {
  const details = hint === undefined ? {} : { hint };
  const [first, ...others] = problems ?? [];
  if (first !== undefined) return new ConfigError([first, ...others], details);
  if (/^(?:token|pin)_/.test(code)) return new TokenError(code, message, details);
  return new ServiceError(code, message, { ...details, unavailable: exitCode === 69 });
}
