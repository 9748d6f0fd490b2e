/**
 * Owns: turning what a PKCS#11 module answered into a TokenError.
 * Must not know: PINs, or what the caller does next.
 * Runs: on the main thread of a worker or of a command.
 */
import { type ErrorCode, TokenError } from '../errors.ts';

interface Place {
  readonly code?: ErrorCode;
  readonly hint?: string;
}

/**
 * @param doing a phrase that completes "token X: ... failed", such as `C_Login`.
 * @returns TokenError with the CKR name where the module gave one; an existing TokenError as it is.
 */
export function tokenFailure(error: unknown, token: string, doing: string, place: Place = {}): TokenError {
  if (error instanceof TokenError) return error;
  const ckr = ckrName(error);
  return new TokenError(place.code ?? 'token_operation', `token ${token}: ${doing} failed: ${failureReason(error)}`, {
    token,
    ...(ckr === undefined ? {} : { ckr }),
    ...(place.hint === undefined ? {} : { hint: place.hint }),
    cause: error,
  });
}

/** `CKR_PIN_INCORRECT`; undefined when the module did not answer with a code. */
export function ckrName(error: unknown): string | undefined {
  // pkcs11js wraps most calls in Pkcs11Error but lets C_FindObjects through as a plain Error with the code in its text.
  return error instanceof Error ? /\bCKR_[A-Z0-9_]+/.exec(error.message)?.[0] : undefined;
}

/** Its number; of a TokenError that was made of it, too. */
export function ckrCode(error: unknown): number | undefined {
  const cause = error instanceof TokenError ? error.cause : error;
  const code = cause instanceof Error && 'code' in cause ? cause.code : undefined;
  return typeof code === 'number' ? code : undefined;
}

/** The CKR name, or what else went wrong in one line: pkcs11js appends a native stack with paths of its build. */
export function failureReason(error: unknown): string {
  const text = error instanceof Error ? error.message : String(error);
  return ckrName(error) ?? text.split('\n', 1)[0] ?? '';
}
