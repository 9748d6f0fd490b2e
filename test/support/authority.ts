/**
 * Owns: a certificate authority for tests: a root, an intermediate, leaves with any dates and names, and who is revoked.
 * Must not know: tokens; a leaf is issued for a public key.
 * Runs: in test processes.
 */
import 'reflect-metadata';
import { generateKeyPairSync, randomBytes, webcrypto } from 'node:crypto';
import type { KeyObject } from 'node:crypto';
import {
  BasicConstraintsExtension,
  ExtendedKeyUsage,
  ExtendedKeyUsageExtension,
  Extension,
  SubjectAlternativeNameExtension,
  X509CertificateGenerator,
  X509CrlGenerator,
} from '@peculiar/x509';
import { sctList } from './transparency-log.ts';
import type { TransparencyLog } from './transparency-log.ts';

export interface LeafOptions {
  readonly names?: readonly string[];
  readonly uris?: readonly string[];
  readonly emails?: readonly string[];
  readonly commonName?: string;
  readonly notBefore?: Date;
  readonly notAfter?: Date;
  readonly purpose?: string;
  /** Marked as a certificate authority's; default: not marked at all. */
  readonly isAuthority?: boolean;
  /** Of the signature on it. */
  readonly hash?: 'SHA-1' | 'SHA-256';
  /** Has an extension that nobody knows and everybody must. */
  readonly isPuzzling?: boolean;
  /** Hexadecimal. */
  readonly serial?: string;
  /** Have seen the leaf, and their SCTs are in it. */
  readonly logs?: readonly TransparencyLog[];
}

export interface Authority {
  readonly rootPem: string;
  readonly intermediatePem: string;
  /** A leaf in PEM, issued by the intermediate. */
  issue(publicKey: KeyObject, options?: LeafOptions): Promise<string>;
  /** The intermediate's list of leaves that it has revoked, in PEM. */
  revoke(...serials: readonly string[]): Promise<string>;
}

export const daysFromNow = (days: number): Date => new Date(Date.now() + days * 86_400_000);

export async function createAuthority(name = 'Test'): Promise<Authority> {
  const algorithm = { name: 'ECDSA', namedCurve: 'P-256', hash: 'SHA-256' };
  const keys = () => webcrypto.subtle.generateKey(algorithm, true, ['sign', 'verify']);
  const [rootKeys, intermediateKeys] = [await keys(), await keys()];
  const validity = { notBefore: daysFromNow(-365), notAfter: daysFromNow(365) };
  const ca = [new BasicConstraintsExtension(true, undefined, true)];
  const root = await X509CertificateGenerator.createSelfSigned(
    { name: `CN=${name} Root`, keys: rootKeys, signingAlgorithm: algorithm, extensions: ca, ...validity },
    webcrypto,
  );
  const intermediate = await X509CertificateGenerator.create(
    {
      subject: `CN=${name} Intermediate`,
      issuer: root.subject,
      publicKey: intermediateKeys.publicKey,
      signingKey: rootKeys.privateKey,
      signingAlgorithm: algorithm,
      extensions: ca,
      ...validity,
    },
    webcrypto,
  );
  return {
    rootPem: root.toString('pem'),
    intermediatePem: intermediate.toString('pem'),
    async issue(publicKey, options = {}) {
      const {
        names = ['www.example.org'],
        uris = [],
        emails = [],
        commonName = 'leaf',
        notBefore = daysFromNow(-1),
        notAfter = daysFromNow(90),
        purpose,
        isAuthority = false,
        hash = 'SHA-256',
        isPuzzling = false,
        serial = randomBytes(8).toString('hex').replace(/^./, '1'),
        logs = [],
      } = options;
      const subjectAltName = [
        ...names.map((value) => ({ type: 'dns' as const, value })),
        ...uris.map((value) => ({ type: 'url' as const, value })),
        ...emails.map((value) => ({ type: 'email' as const, value })),
      ];
      const create = async (scts: readonly Extension[]) =>
        X509CertificateGenerator.create(
          {
            serialNumber: serial,
            subject: [{ CN: [commonName] }],
            issuer: intermediate.subject,
            publicKey: new Uint8Array(publicKey.export({ format: 'der', type: 'spki' })),
            signingKey: intermediateKeys.privateKey,
            signingAlgorithm: { ...algorithm, hash },
            notBefore,
            notAfter,
            extensions: [
              new ExtendedKeyUsageExtension([purpose ?? ExtendedKeyUsage.serverAuth]),
              ...(subjectAltName.length === 0 ? [] : [new SubjectAlternativeNameExtension(subjectAltName)]),
              ...(isAuthority ? ca : []),
              ...(isPuzzling ? [new Extension('1.3.6.1.4.1.99999.1', true, new Uint8Array([5, 0]))] : []),
              ...scts,
            ],
          },
          webcrypto,
        );
      const seen = await create([]);
      if (logs.length === 0) return seen.toString('pem');
      const [tbs, issuer] = [tbsOf(Buffer.from(seen.rawData)), Buffer.from(intermediate.publicKey.rawData)];
      const list = sctList(logs.map((log) => log.signPrecertificate(issuer, tbs)));
      const logged = await create([new Extension(sctListOid, false, octetString(list))]);
      return logged.toString('pem');
    },
    async revoke(...serials) {
      const list = await X509CrlGenerator.create(
        {
          issuer: intermediate.subject,
          thisUpdate: daysFromNow(-1),
          nextUpdate: daysFromNow(1),
          entries: serials.map((serialNumber) => ({ serialNumber, revocationDate: daysFromNow(-1) })),
          // RFC 5280 5.2.3 wants it.
          extensions: [new Extension('2.5.29.20', false, new Uint8Array([2, 1, 1]))],
          signingKey: intermediateKeys.privateKey,
          signingAlgorithm: algorithm,
        },
        webcrypto,
      );
      // The library's own label for it is one that others do not know (RFC 7468 7).
      return `-----BEGIN X509 CRL-----\n${Buffer.from(list.rawData).toString('base64')}\n-----END X509 CRL-----\n`;
    },
  };
}

const sctListOid = '1.3.6.1.4.1.11129.2.4.2';

/** DER; of a length with two bytes or fewer. */
function octetString(content: Buffer): Uint8Array<ArrayBuffer> {
  const length = content.length < 0x80 ? [content.length] : [0x82, content.length >> 8, content.length & 0xff];
  // 0x82 for what one byte of length could say would not be DER.
  if (content.length >= 0x80 && content.length < 0x100) length.splice(0, 2, 0x81);
  return new Uint8Array([4, ...length, ...content]);
}

/** The first value inside a certificate, whole: what is signed. */
function tbsOf(certificate: Buffer): Buffer {
  const inside = certificate.subarray(headBytes(certificate));
  const [, length = 0] = inside;
  const head = headBytes(inside);
  return inside.subarray(0, head + (head === 2 ? length : inside.readUIntBE(2, head - 2)));
}

/** Of tag and length (X.690 8.1.3). */
function headBytes(value: Buffer): number {
  const [, length = 0] = value;
  return length < 0x80 ? 2 : 2 + (length & 0x7f);
}

/** A public key whose private half nobody has any more. */
export function anyPublicKey(): KeyObject {
  return generateKeyPairSync('ec', { namedCurve: 'P-256' }).publicKey;
}
