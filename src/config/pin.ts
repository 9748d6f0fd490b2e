/**
 * Owns: where a PIN comes from, and reading it from there.
 * Must not know: tokens, PKCS#11, the configuration file's syntax.
 * Runs: on the main thread of whoever logs in.
 */
import { closeSync, constants, fstatSync, openSync, readSync } from 'node:fs';
import { isAbsolute, join } from 'node:path';
import { TokenError } from '../errors.ts';
import { accessHint } from './access.ts';

/** The place of a PIN, never the PIN. */
export type PinSource =
  /** Absolute path. */
  | { readonly file: string }
  /** Name of an environment variable. */
  | { readonly env: string }
  /** Name of a systemd credential in `$CREDENTIALS_DIRECTORY`. */
  | { readonly credential: string };

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
  const subject = `${place}: ${formatPinSource(source)}`;
  if ('env' in source) return pinFromEnvironment(source.env, subject);
  if ('credential' in source) return pinFromFile(credentialPath(source.credential, subject), subject);
  return pinFromFile(source.file, subject);
}

/** `file /run/secrets/pin`, for messages. */
function formatPinSource(source: PinSource): string {
  if ('env' in source) return `environment variable ${source.env}`;
  if ('credential' in source) return `systemd credential ${source.credential}`;
  return `file ${source.file}`;
}

function pinFromEnvironment(name: string, subject: string): Buffer {
  const value = process.env[name];
  if (value === undefined) {
    throw new TokenError('pin_unavailable', `${subject} is not set`, {
      hint: `export ${name}, or name another source`,
    });
  }
  return checkedPin(Buffer.from(value, 'utf8'), subject);
}

function credentialPath(name: string, subject: string): string {
  const directory = process.env['CREDENTIALS_DIRECTORY'];
  if (directory === undefined || !isAbsolute(directory)) {
    throw new TokenError('pin_unavailable', `${subject}: $CREDENTIALS_DIRECTORY is not set`, {
      hint: `start keygate from a unit with LoadCredential=${name}:PATH`,
    });
  }
  return join(directory, name);
}

function pinFromFile(path: string, subject: string): Buffer {
  // One byte of newline and one that shows that the file is too long.
  const bytes = Buffer.alloc(pinBytesMax + 2);
  let length: number;
  let descriptor: number | undefined;
  try {
    // Without O_NONBLOCK, opening a FIFO waits for a writer for ever.
    descriptor = openSync(path, constants.O_RDONLY | constants.O_NONBLOCK);
    const stat = fstatSync(descriptor);
    if (!stat.isFile()) throw new TokenError('pin_unavailable', `${subject} is not a regular file`);
    if ((stat.mode & 0o007) !== 0) {
      throw new TokenError('pin_exposed', `${subject} is open to every user of this machine`, {
        hint: `chmod o= ${path}`,
      });
    }
    length = readSync(descriptor, bytes, 0, bytes.length, 0);
  } catch (error) {
    if (error instanceof TokenError) throw error;
    const { code } = error as NodeJS.ErrnoException;
    throw new TokenError('pin_unavailable', `${subject} cannot be read: ${code ?? 'unknown error'}`, accessHint(code));
  } finally {
    if (descriptor !== undefined) closeSync(descriptor);
  }
  return checkedPin(bytes.subarray(0, length), subject);
}

/** Takes over `bytes`: wipes them when they are refused. */
function checkedPin(bytes: Buffer, subject: string): Buffer {
  const pin = bytes.at(-1) === 0x0a ? bytes.subarray(0, -1) : bytes;
  const fault =
    pin.length === 0
      ? 'is empty'
      : pin.length > pinBytesMax
        ? `is longer than ${pinBytesMax} bytes`
        : pin.includes(0)
          ? 'holds a zero byte'
          : undefined;
  if (fault === undefined) return pin;
  bytes.fill(0);
  throw new TokenError('pin_invalid', `${subject} ${fault}`, {
    hint: 'a PIN is 1 to 255 bytes, with at most one newline at its end',
  });
}
