/**
 * Owns: certificate signing requests and self-signed certificates, signed by a key inside a token.
 * Must not know: how the key was found, the configuration file, files.
 * Runs: on the main thread of a command.
 */
// @peculiar/x509 wires itself with decorators, which need this before it is loaded.
import 'reflect-metadata';
import { webcrypto } from 'node:crypto';
import type { KeyObject } from 'node:crypto';
import { isIP } from 'node:net';
import {
  BasicConstraintsExtension,
  ExtendedKeyUsage,
  ExtendedKeyUsageExtension,
  Extension,
  KeyUsageFlags,
  KeyUsagesExtension,
  Name,
  Pkcs10CertificateRequestGenerator,
  SubjectAlternativeNameExtension,
  SubjectKeyIdentifierExtension,
  X509CertificateGenerator,
} from '@peculiar/x509';
import type { JsonGeneralNames } from '@peculiar/x509';
import { isServerName } from './certificates.ts';
import type { Purpose } from './certificates.ts';
import { UsageError } from '../errors.ts';
import { certificateScheme, keyIdentifier } from './algorithm.ts';
import type { KeyAlgorithm } from './algorithm.ts';
import { proveKey, publicKeyOf, signRaw } from './keys.ts';
import type { OpenToken, TokenKey } from './keys.ts';

/** Who a certificate is for; at least one name or address. */
export interface Subject {
  /** Distinguished name such as `CN=www.example.org, O=Example` (RFC 4514). Default: CN is the first DNS name. */
  readonly distinguishedName?: string;
  /** DNS names, also `*.example.org`. */
  readonly dns: readonly string[];
  /** IPv4 and IPv6 addresses. */
  readonly ip: readonly string[];
  /** What it may be used for; default: `server`. */
  readonly purpose?: Purpose;
}

/** The longest that public certificates may live; self-signed ones are for tests and private use and may live longer. */
export const validityDaysMax = 3650;

/**
 * @returns PKCS #10 in PEM (RFC 2986), with the names as an extension request.
 * @throws UsageError for a malformed name, TokenError when the token fails.
 */
export async function createSigningRequest(open: OpenToken, key: TokenKey, subject: Subject): Promise<string> {
  const names = checkedNames(subject);
  const name = subjectName(subject);
  const signer = signerFor(open, key);
  const request = await Pkcs10CertificateRequestGenerator.create(
    { name, keys: signer.keys, signingAlgorithm: signer.algorithm, extensions: extensionsFor(names, subject, signer) },
    signer.crypto,
  );
  return `${request.toString('pem')}\n`;
}

/**
 * @param days 1..3650 from now.
 * @returns a certificate in PEM (RFC 5280) that is no CA and is for TLS servers only, or for TLS clients only.
 * @throws UsageError for a malformed name or number of days, TokenError when the token fails.
 */
export async function createSelfSigned(
  open: OpenToken,
  key: TokenKey,
  subject: Subject,
  days: number,
): Promise<string> {
  if (!Number.isInteger(days) || days < 1 || days > validityDaysMax) {
    throw new UsageError(`days: found ${days}, expected a whole number from 1 to ${validityDaysMax}`);
  }
  const names = checkedNames(subject);
  const name = subjectName(subject);
  const signer = signerFor(open, key);
  // A minute back: clocks differ, and a client that is a second behind would refuse it.
  const notBefore = new Date(Date.now() - 60_000);
  const certificate = await X509CertificateGenerator.createSelfSigned(
    {
      name,
      notBefore,
      notAfter: new Date(notBefore.getTime() + days * 86_400_000),
      keys: signer.keys,
      signingAlgorithm: signer.algorithm,
      extensions: [new BasicConstraintsExtension(false, undefined, true), ...extensionsFor(names, subject, signer)],
    },
    signer.crypto,
  );
  return `${certificate.toString('pem')}\n`;
}

function checkedNames({ dns, ip }: Subject): JsonGeneralNames {
  const count = dns.length + ip.length;
  if (count < 1 || count > namesMax) {
    throw new UsageError(`names: found ${count}, expected 1 to ${namesMax} DNS names and IP addresses`);
  }
  for (const name of dns.filter((candidate) => !isServerName(candidate) || isIP(candidate) !== 0)) {
    throw new UsageError(
      `DNS name: found ${JSON.stringify(name)}, expected one such as www.example.org or *.example.org`,
    );
  }
  for (const address of ip.filter((candidate) => isIP(candidate) === 0)) {
    throw new UsageError(`IP address: found ${JSON.stringify(address)}, expected one such as 192.0.2.1 or 2001:db8::1`);
  }
  return [
    ...dns.map((value) => ({ type: 'dns' as const, value: value.toLowerCase() })),
    ...ip.map((value) => ({ type: 'ip' as const, value })),
  ];
}

const namesMax = 100;

function subjectName({ distinguishedName, dns }: Subject): Name {
  if (distinguishedName === undefined) {
    const name = dns.find((candidate) => candidate.length <= commonNameMax);
    // A subject may be empty when the alternative names say it all (RFC 5280 4.1.2.6).
    return new Name(name === undefined ? [] : [{ CN: [name] }]);
  }
  const refuse = (expected: string, cause?: unknown) => {
    throw new UsageError(`subject: found ${JSON.stringify(distinguishedName.slice(0, 80))}, expected ${expected}`, {
      cause,
    });
  };
  if (distinguishedName.length > distinguishedNameMax) refuse(`at most ${distinguishedNameMax} characters`);
  try {
    const name = new Name(distinguishedName);
    if (name.toJSON().length === 0) refuse('a distinguished name such as CN=www.example.org');
    if (name.getField('CN').some((value) => value.length > commonNameMax))
      refuse(`a CN of at most ${commonNameMax} characters`);
    return name;
  } catch (error) {
    if (error instanceof UsageError) throw error;
    return refuse('a distinguished name such as CN=www.example.org, O=Example', error);
  }
}

/** RFC 5280 appendix A.1, ub-common-name. */
const commonNameMax = 64;
const distinguishedNameMax = 512;

function extensionsFor(names: JsonGeneralNames, { purpose = 'server' }: Subject, signer: Signer): Extension[] {
  return [
    new SubjectAlternativeNameExtension(names),
    // Signing is all the key can do (CKA_DECRYPT is off), and all that TLS 1.3 and ECDHE ask of it.
    new KeyUsagesExtension(KeyUsageFlags.digitalSignature, true),
    new ExtendedKeyUsageExtension([ExtendedKeyUsage[`${purpose}Auth`]]),
    new SubjectKeyIdentifierExtension(keyIdentifier(signer.publicKey).toString('hex')),
  ];
}

interface WebAlgorithm {
  readonly name: string;
  readonly hash: string;
  readonly namedCurve?: string;
}

interface Signer {
  readonly publicKey: KeyObject;
  readonly algorithm: WebAlgorithm;
  readonly keys: webcrypto.CryptoKeyPair;
  readonly crypto: Crypto;
}

/** What @peculiar/x509 asks of Web Crypto, answered by the token: the public key, and signatures. */
function signerFor(open: OpenToken, key: TokenKey): Signer {
  const publicKey = publicKeyOf(open, key);
  const spki = publicKey.export({ format: 'der', type: 'spki' });
  // Before a CA is paid for it: the public key object beside a private key could be another key's.
  const algorithm = proveKey(open, key, spki);
  const scheme = certificateScheme(algorithm);
  const webAlgorithm = webAlgorithms[algorithm];
  const keys = {
    publicKey: { algorithm: webAlgorithm },
    privateKey: { algorithm: webAlgorithm },
  } as unknown as webcrypto.CryptoKeyPair;
  const subtle = {
    exportKey: () => Promise.resolve(exactBytes(spki)),
    sign: (_algorithm: unknown, _key: unknown, message: ArrayBuffer) =>
      Promise.resolve(exactBytes(signRaw(open, key, scheme, Buffer.from(message)))),
  };
  const crypto = { subtle, getRandomValues: webcrypto.getRandomValues.bind(webcrypto) } as unknown as Crypto;
  return { publicKey, algorithm: webAlgorithm, keys, crypto };
}

const webAlgorithms: Record<KeyAlgorithm, WebAlgorithm> = {
  p256: { name: 'ECDSA', namedCurve: 'P-256', hash: 'SHA-256' },
  p384: { name: 'ECDSA', namedCurve: 'P-384', hash: 'SHA-384' },
  p521: { name: 'ECDSA', namedCurve: 'P-521', hash: 'SHA-512' },
  rsa: { name: 'RSASSA-PKCS1-v1_5', hash: 'SHA-256' },
  // The hash belongs to Ed25519 itself; the field is there for the type only and appears nowhere.
  ed25519: { name: 'Ed25519', hash: 'SHA-512' },
};

/** Not the pool that a small Buffer may be a window of. */
function exactBytes(bytes: Buffer): ArrayBuffer {
  return new Uint8Array(bytes).buffer;
}
