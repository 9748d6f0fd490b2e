/**
 * Owns: the files of the admin server: its token, its certificate and key, the authorities of its clients; reading and
 * checking them.
 * Must not know: requests, connections.
 * Runs: main thread of the primary, at its start and at each reload, once root is given up; and of `keygate check`.
 */
import { createHash, X509Certificate } from 'node:crypto';
import { readFileSync } from 'node:fs';
import { createSecureContext } from 'node:tls';
import { accessHint } from '../config/access.ts';
import type { AdminConfig, AdminTlsConfig } from '../config/config.ts';
import { readSecret, readSecretFile, SecretFault, secretSubject } from '../config/secret.ts';
import type { SecretPlace } from '../config/secret.ts';
import { ServiceError } from '../errors.ts';

const tokenCharactersMin = 16;
/** Headers are bounded, and the token is one of them. */
const tokenCharactersMax = 1024;
const keyBytesMax = 64 * 1024;
const certificateBytesMax = 1024 * 1024;

export interface AdminCredentials {
  /** SHA-256 of the token; what it is compared with is hashed as well. */
  readonly tokenHash: Buffer | undefined;
  readonly tls: AdminTls | undefined;
}

export interface AdminTls {
  readonly cert: string;
  readonly key: Buffer;
  /** PEM; with it every client must have a certificate. */
  readonly ca: string | undefined;
  /** When the certificate of the admin server expires. */
  readonly notAfterMs: number;
}

/** @throws ServiceError `admin_failed`, naming the file and what is wrong with it, never what is in it */
export function readCredentials({ token, tls }: AdminConfig): AdminCredentials {
  return {
    tokenHash: token && hashOfToken(token),
    tls: tls && readTls(tls),
  };
}

/** Which of the files say something else than before, by their keys in the configuration. */
export function changedCredentials(former: AdminCredentials, now: AdminCredentials): string[] {
  const same = (a?: Buffer, b?: Buffer) => (a === undefined || b === undefined ? a === b : a.equals(b));
  const [old, next] = [former.tls, now.tls];
  return [
    ...(same(former.tokenHash, now.tokenHash) ? [] : ['admin.token changed']),
    ...(old?.cert === next?.cert && same(old?.key, next?.key) ? [] : ['admin.tls changed']),
    ...(old?.ca === next?.ca ? [] : ['admin.tls.clientCertificates changed']),
  ];
}

function hashOfToken(place: SecretPlace): Buffer {
  const token = readToken(place);
  const hash = createHash('sha256').update(token).digest();
  token.fill(0);
  return hash;
}

function readToken(place: SecretPlace): Buffer {
  const subject = secretSubject(place, 'admin.token');
  const token = readGuarded(() => readSecret(place, subject, tokenCharactersMax));
  const fault =
    token.length < tokenCharactersMin
      ? `is shorter than ${tokenCharactersMin} characters`
      : token.length > tokenCharactersMax
        ? `is longer than ${tokenCharactersMax} characters`
        : isBearerToken(token)
          ? undefined
          : 'holds a character that a bearer token cannot have';
  if (fault === undefined) return token;
  throw new ServiceError('admin_failed', `${subject} ${fault}`, {
    hint: 'make one with: openssl rand -hex 32',
  });
}

/** RFC 6750 2.1: anything else would not survive a header. */
function isBearerToken(token: Buffer): boolean {
  return /^[A-Za-z0-9._~+/-]+=*$/.test(token.toString('latin1'));
}

function readTls({ chain, key, clientCertificates }: AdminTlsConfig): AdminTls {
  const certificates = readCertificates(chain, 'admin.tls.chain');
  const authorities =
    clientCertificates === undefined
      ? undefined
      : readCertificates(clientCertificates, 'admin.tls.clientCertificates').pem;
  const subject = secretSubject({ file: key }, 'admin.tls.key');
  const tls = {
    cert: certificates.pem,
    key: readGuarded(() => readSecretFile(key, subject, keyBytesMax)),
    ca: authorities,
    notAfterMs: certificates.notAfterMs,
  };
  try {
    createSecureContext({ cert: tls.cert, key: tls.key, ca: tls.ca });
    return tls;
  } catch (cause) {
    const { message } = cause as Error;
    throw new ServiceError('admin_failed', `${subject} cannot be used with ${chain}: ${message}`, {
      cause,
      hint: 'it must be the private key of the first certificate of the chain, in PEM, without a passphrase',
    });
  }
}

/**
 * Node ignores what is no certificate, and with no authority left it would refuse every client. A certificate that begins
 * on the line where another ends, as in files put together from several, is such a thing: each gets its own lines.
 */
function readCertificates(path: string, owner: string): { readonly pem: string; readonly notAfterMs: number } {
  const refuse = (what: string, details: { cause?: unknown; hint?: string }) =>
    new ServiceError('admin_failed', `${owner}: file ${path} ${what}`, details);
  let pem: string;
  try {
    pem = readFileSync(path, 'utf8');
  } catch (cause) {
    const { code } = cause as NodeJS.ErrnoException;
    throw refuse(`cannot be read: ${code ?? String(cause)}`, { cause, ...accessHint(code) });
  }
  const blocks = pem.match(/-----BEGIN CERTIFICATE-----[^-]+-----END CERTIFICATE-----/g) ?? [];
  if (blocks.length === 0 || pem.length > certificateBytesMax) {
    throw refuse('holds no certificate, or too many', { hint: 'it must hold certificates in PEM, at most 1 MiB' });
  }
  try {
    const [first] = blocks.map((block) => new X509Certificate(block));
    return { pem: `${blocks.join('\n')}\n`, notAfterMs: first?.validToDate.getTime() ?? 0 };
  } catch (cause) {
    throw refuse('holds a certificate that cannot be decoded', { cause });
  }
}

function readGuarded(read: () => Buffer): Buffer {
  try {
    return read();
  } catch (cause) {
    if (!(cause instanceof SecretFault)) throw cause;
    const { message, hint } = cause;
    throw new ServiceError('admin_failed', message, { cause, ...(hint === undefined ? {} : { hint }) });
  }
}
