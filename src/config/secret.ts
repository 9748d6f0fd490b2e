/**
 * Owns: where a secret is kept, and reading it from there.
 * Must not know: what the secret is for (pin.ts, primary/admin-credentials.ts), the configuration file's syntax.
 * Runs: on the main thread of whoever needs the secret.
 */
import { closeSync, constants, fstatSync, openSync, readSync } from 'node:fs';
import { isAbsolute, join } from 'node:path';
import { accessHint } from './access.ts';

/** The place of a secret, never the secret. */
export type SecretPlace =
  /** Absolute path. */
  | { readonly file: string }
  /** Name of an environment variable. */
  | { readonly env: string }
  /** Name of a systemd credential in `$CREDENTIALS_DIRECTORY`. */
  | { readonly credential: string };

/** Why there is no secret. The message names the place and never what is there. */
export class SecretFault extends Error {
  /** `exposed`: every user of this machine can get at it. */
  readonly kind: 'unavailable' | 'exposed';
  readonly hint: string | undefined;

  constructor(kind: SecretFault['kind'], message: string, hint?: string) {
    super(message);
    this.kind = kind;
    this.hint = hint;
  }
}

/** `tokens.hsm.pin: file /run/secrets/pin`: what messages about a secret begin with. */
export function secretSubject(place: SecretPlace, owner: string): string {
  if ('env' in place) return `${owner}: environment variable ${place.env}`;
  if ('credential' in place) return `${owner}: systemd credential ${place.credential}`;
  return `${owner}: file ${place.file}`;
}

/**
 * What is kept there, without the one newline that editors leave at its end; a byte longer than `bytesMax` when it is longer
 * than that. The caller owns the buffer and fills it with zeros after use. A file must not be accessible for others; a
 * systemd credential is a file that systemd protects.
 * @throws SecretFault
 */
export function readSecret(place: SecretPlace, subject: string, bytesMax: number): Buffer {
  if ('env' in place) return fromEnvironment(place.env, subject);
  const path = 'credential' in place ? credentialPath(place.credential, subject) : place.file;
  // One byte of newline and one that shows that it is too long.
  return withoutNewline(readSecretFile(path, subject, bytesMax + 2));
}

/**
 * The first `bytesMax` bytes of a file that no other user can read.
 * @throws SecretFault
 */
export function readSecretFile(path: string, subject: string, bytesMax: number): Buffer {
  const bytes = Buffer.alloc(bytesMax);
  let descriptor: number | undefined;
  try {
    // Without O_NONBLOCK, opening a FIFO waits for a writer for ever.
    descriptor = openSync(path, constants.O_RDONLY | constants.O_NONBLOCK);
    const stat = fstatSync(descriptor);
    if (!stat.isFile()) throw new SecretFault('unavailable', `${subject} is not a regular file`);
    if ((stat.mode & 0o007) !== 0) {
      throw new SecretFault('exposed', `${subject} is open to every user of this machine`, `chmod o= ${path}`);
    }
    return bytes.subarray(0, readSync(descriptor, bytes, 0, bytes.length, 0));
  } catch (error) {
    if (error instanceof SecretFault) throw error;
    const { code } = error as NodeJS.ErrnoException;
    const { hint } = accessHint(code);
    throw new SecretFault('unavailable', `${subject} cannot be read: ${code ?? 'unknown error'}`, hint);
  } finally {
    if (descriptor !== undefined) closeSync(descriptor);
  }
}

function fromEnvironment(name: string, subject: string): Buffer {
  const value = process.env[name];
  if (value === undefined) {
    throw new SecretFault('unavailable', `${subject} is not set`, `export ${name}, or name another source`);
  }
  return withoutNewline(Buffer.from(value, 'utf8'));
}

function credentialPath(name: string, subject: string): string {
  const directory = process.env['CREDENTIALS_DIRECTORY'];
  if (directory === undefined || !isAbsolute(directory)) {
    throw new SecretFault(
      'unavailable',
      `${subject}: $CREDENTIALS_DIRECTORY is not set`,
      `start keygate from a unit with LoadCredential=${name}:PATH`,
    );
  }
  return join(directory, name);
}

function withoutNewline(bytes: Buffer): Buffer {
  return bytes.at(-1) === 0x0a ? bytes.subarray(0, -1) : bytes;
}
