/**
 * Owns: which certificate of the configuration is to be stapled, and what is in the way of it.
 * Must not know: responses.
 * Runs: main thread of the primary and of `keygate check`.
 */
import { createHash, X509Certificate } from 'node:crypto';
import { readFileSync } from 'node:fs';
import type { CertificateConfig } from '../config/config.ts';
import { certificateDigest, ocspFacts, ocspIssuer, ocspSubject } from '../ocsp/subject.ts';
import type { OcspIssuer, OcspSubject } from '../ocsp/subject.ts';
import { chainBytesMax, readChain } from '../pkcs11/certificates.ts';

export interface StapledCertificate {
  /** SHA-256 of the leaf's DER. */
  readonly digest: Buffer;
  readonly mustStaple: boolean;
  /** Undefined with `obstacle`. */
  readonly subject: OcspSubject | undefined;
  /** Who can be asked; at least one, or there is an `obstacle`. */
  readonly responders: readonly URL[];
  /** Why nobody can be asked. */
  readonly obstacle: string | undefined;
}

/** Reads chains, and knows those again that have not changed: thousands of them, and few that are new. */
export class StapledCertificates {
  /** By path: the digest of the file and what was in it. */
  #known = new Map<string, { readonly file: string; readonly certificate: StapledCertificate | undefined }>();
  #readLast = new Map<string, { readonly file: string; readonly certificate: StapledCertificate | undefined }>();
  readonly #issuers = new Map<string, OcspIssuer>();

  /** @returns undefined for a chain that cannot be served either, which is the workers' to report. */
  read(config: CertificateConfig): StapledCertificate | undefined {
    const file = fileDigest(config.chain);
    if (file === undefined) return undefined;
    const known = this.#known.get(config.chain);
    const certificate = known?.file === file ? known.certificate : this.#parse(config);
    this.#readLast.set(config.chain, { file, certificate });
    return certificate;
  }

  /** Every chain of a configuration has been read: others are forgotten. */
  settle(): void {
    this.#known = this.#readLast;
    this.#readLast = new Map();
    this.#issuers.clear();
  }

  #parse(config: CertificateConfig): StapledCertificate | undefined {
    const { chain } = readChain(config);
    const [leafDer, issuerDer] = chain?.chainDer ?? [];
    if (leafDer === undefined) return undefined;
    try {
      const leaf = new X509Certificate(leafDer);
      const { responders, mustStaple } = ocspFacts(leaf);
      const subject = issuerDer === undefined ? undefined : ocspSubject(leaf, this.#issuer(issuerDer));
      const digest = certificateDigest(leafDer);
      return { digest, mustStaple, subject, responders, obstacle: obstacleOf(subject, responders) };
    } catch {
      return undefined; // not DER
    }
  }

  #issuer(der: Buffer): OcspIssuer {
    const key = certificateDigest(der).toString('hex');
    const known = this.#issuers.get(key) ?? ocspIssuer(new X509Certificate(der));
    this.#issuers.set(key, known);
    return known;
  }
}

function obstacleOf(subject: OcspSubject | undefined, responders: readonly URL[]): string | undefined {
  if (responders.length === 0) {
    return 'it names no OCSP responder (authorityInfoAccess with an http URL), so there is nothing to staple';
  }
  if (subject === undefined) {
    return 'its chain has no issuer, and without that no OCSP response can be asked for: append the issuer to the file';
  }
  return undefined;
}

function fileDigest(path: string): string | undefined {
  try {
    const text = readFileSync(path);
    return text.length > chainBytesMax ? undefined : createHash('sha256').update(text).digest('base64');
  } catch {
    return undefined;
  }
}
