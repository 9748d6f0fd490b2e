/**
 * Owns: a certificate authority for tests: a root, an intermediate, and leaves with any dates and names.
 * Must not know: tokens; a leaf is issued for a public key.
 * Runs: in test processes.
 */
import 'reflect-metadata';
import { generateKeyPairSync, webcrypto } from 'node:crypto';
import type { KeyObject } from 'node:crypto';
import {
  BasicConstraintsExtension,
  ExtendedKeyUsage,
  ExtendedKeyUsageExtension,
  SubjectAlternativeNameExtension,
  X509CertificateGenerator,
} from '@peculiar/x509';

export interface LeafOptions {
  readonly names?: readonly string[];
  readonly commonName?: string;
  readonly notBefore?: Date;
  readonly notAfter?: Date;
  readonly purpose?: string;
}

export interface Authority {
  readonly rootPem: string;
  readonly intermediatePem: string;
  /** A leaf in PEM, issued by the intermediate. */
  issue(publicKey: KeyObject, options?: LeafOptions): Promise<string>;
}

export const daysFromNow = (days: number): Date => new Date(Date.now() + days * 86_400_000);

export async function createAuthority(): Promise<Authority> {
  const algorithm = { name: 'ECDSA', namedCurve: 'P-256', hash: 'SHA-256' };
  const keys = () => webcrypto.subtle.generateKey(algorithm, true, ['sign', 'verify']);
  const [rootKeys, intermediateKeys] = [await keys(), await keys()];
  const validity = { notBefore: daysFromNow(-365), notAfter: daysFromNow(365) };
  const ca = [new BasicConstraintsExtension(true, undefined, true)];
  const root = await X509CertificateGenerator.createSelfSigned(
    { name: 'CN=Test Root', keys: rootKeys, signingAlgorithm: algorithm, extensions: ca, ...validity },
    webcrypto,
  );
  const intermediate = await X509CertificateGenerator.create(
    {
      subject: 'CN=Test Intermediate',
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
        commonName = 'leaf',
        notBefore = daysFromNow(-1),
        notAfter = daysFromNow(90),
        purpose,
      } = options;
      const leaf = await X509CertificateGenerator.create(
        {
          subject: [{ CN: [commonName] }],
          issuer: intermediate.subject,
          publicKey: new Uint8Array(publicKey.export({ format: 'der', type: 'spki' })),
          signingKey: intermediateKeys.privateKey,
          signingAlgorithm: algorithm,
          notBefore,
          notAfter,
          extensions: [
            new ExtendedKeyUsageExtension([purpose ?? ExtendedKeyUsage.serverAuth]),
            ...(names.length === 0
              ? []
              : [new SubjectAlternativeNameExtension(names.map((value) => ({ type: 'dns' as const, value })))]),
          ],
        },
        webcrypto,
      );
      return leaf.toString('pem');
    },
  };
}

/** A public key whose private half nobody has any more. */
export function anyPublicKey(): KeyObject {
  return generateKeyPairSync('ec', { namedCurve: 'P-256' }).publicKey;
}
