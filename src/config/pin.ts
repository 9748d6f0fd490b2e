/**
 * Owns: what a PIN may be, and what is said when there is none.
 * Must not know: tokens, PKCS#11, the configuration file's syntax; how a secret is read (secret.ts).
 * Runs: on the main thread of whoever logs in.
 */
import { TokenError } from '../errors.ts';
import { readSecret, SecretFault, secretSubject } from './secret.ts';
import type { SecretPlace } from './secret.ts';

/** The place of a PIN, never the PIN. */
export type PinSource = SecretPlace;

/** PKCS#11 leaves the maximum to the token; no known token takes more. */
export const pinBytesMax = 255;

/**
 * Reads the PIN: 1..255 bytes, without the one newline that editors leave at its end.
 * The caller owns the buffer and fills it with zeros after use.
 * A file must not be accessible for others; a systemd credential is a file that systemd protects.
 * @param place what messages begin with: `tokens.hsm.pin`, so that it is known whose PIN it is.
 * @throws TokenError `pin_unavailable`, `pin_invalid` or `pin_exposed`, naming the source and never the content.
 */
export function readPin(source: PinSource, place = 'PIN'): Buffer {
  const subject = secretSubject(source, place);
  let pin: Buffer;
  try {
    pin = readSecret(source, subject, pinBytesMax);
  } catch (error) {
    if (!(error instanceof SecretFault)) throw error;
    const { kind, message, hint } = error;
    throw new TokenError(
      kind === 'exposed' ? 'pin_exposed' : 'pin_unavailable',
      message,
      hint === undefined ? {} : { hint },
    );
  }
  const fault =
    pin.length === 0
      ? 'is empty'
      : pin.length > pinBytesMax
        ? `is longer than ${pinBytesMax} bytes`
        : pin.includes(0)
          ? 'holds a zero byte'
          : undefined;
  if (fault === undefined) return pin;
  pin.fill(0);
  throw new TokenError('pin_invalid', `${subject} ${fault}`, {
    hint: 'a PIN is 1 to 255 bytes, with at most one newline at its end',
  });
}
