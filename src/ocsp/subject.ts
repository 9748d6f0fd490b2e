/**
 * Owns: what OCSP needs to know of a certificate and its issuer (RFC 6960 4.1.1), and what the certificate says about OCSP:
 * its responders (RFC 5280 4.2.2.1) and whether it demands a staple (RFC 7633).
 * Must not know: responses, files, the network.
 * Runs: main thread of any process.
 */
import { createHash } from 'node:crypto';
import type { X509Certificate } from 'node:crypto';
import { contextTag, derElement, derElements, tags } from './der.ts';
import type { DerElement } from './der.ts';

/** The one that signs responses, or lets somebody sign them. */
export interface OcspIssuer {
  readonly certificate: X509Certificate;
  /** Its subject as a DER Name. */
  readonly name: Buffer;
  /** Its public key: the content of the BIT STRING, which is what responders hash. */
  readonly key: Buffer;
}

/** Whose status is asked. */
export interface OcspSubject {
  /** Content of the INTEGER. */
  readonly serial: Buffer;
  readonly issuer: OcspIssuer;
}

/** What a certificate says about OCSP. */
export interface OcspFacts {
  /** In the order of the certificate; plain HTTP only, as RFC 5019 5 has it. */
  readonly responders: readonly URL[];
  /** Clients that know RFC 7633 refuse it without a staple. */
  readonly mustStaple: boolean;
}

/** @throws RangeError when the certificate is not DER */
export function ocspIssuer(certificate: X509Certificate): OcspIssuer {
  const { subject, publicKey } = fieldsOf(certificate.raw);
  return { certificate, name: subject.whole, key: keyBits(publicKey) };
}

/** @throws RangeError when the certificate is not DER */
export function ocspSubject(certificate: X509Certificate, issuer: OcspIssuer): OcspSubject {
  return { serial: fieldsOf(certificate.raw).serial.content, issuer };
}

/** @throws RangeError when the certificate is not DER */
export function ocspFacts(certificate: X509Certificate): OcspFacts {
  return { responders: respondersOf(certificate), mustStaple: isMustStaple(certificate.raw) };
}

/** What names a certificate for good: SHA-256 of its DER. */
export function certificateDigest(der: Uint8Array): Buffer {
  return createHash('sha256').update(der).digest();
}

/** @throws RangeError when the certificate is not DER */
export function isMustStaple(certificate: Buffer): boolean {
  // Nearly all have it not, and thousands may have to be looked at.
  if (!certificate.includes(tlsFeature)) return false;
  const list = fieldsOf(certificate).extensions?.content;
  if (list === undefined) return false;
  return derElements(derElement(list, tags.sequence).content).some((extension) => {
    const [id, ...rest] = derElements(extension.content);
    const value = rest.at(-1);
    if (id?.whole.equals(tlsFeature) !== true || value?.tag !== tags.octetString) return false;
    const features = derElements(derElement(value.content, tags.sequence).content);
    return features.some(({ content }) => content.length === 1 && content[0] === statusRequest);
  });
}

/** id-pe-tlsfeature, with its tag and length. */
const tlsFeature = Buffer.from('06082b06010505070118', 'hex');
/** The TLS extension status_request (RFC 6066 8). */
const statusRequest = 5;

interface Fields {
  readonly serial: DerElement;
  readonly subject: DerElement;
  readonly publicKey: DerElement;
  readonly extensions: DerElement | undefined;
}

/** RFC 5280 4.1. */
function fieldsOf(certificate: Buffer): Fields {
  const [signed] = derElements(derElement(certificate, tags.sequence).content);
  const all = derElements(signed?.content ?? Buffer.of());
  const fields = all[0]?.tag === contextTag(0) ? all.slice(1) : all;
  const [serial, , , , subject, publicKey] = fields;
  if (serial === undefined || subject === undefined || publicKey === undefined) throw new RangeError('no certificate');
  return { serial, subject, publicKey, extensions: fields.find(({ tag }) => tag === contextTag(3)) };
}

function keyBits(publicKey: DerElement): Buffer {
  const bits = derElements(publicKey.content).find(({ tag }) => tag === tags.bitString);
  if (bits === undefined) throw new RangeError('no public key');
  // Its first byte counts the bits that are not used: none.
  return bits.content.subarray(1);
}

function respondersOf({ infoAccess }: X509Certificate): URL[] {
  return (infoAccess ?? '').split('\n').flatMap((line) => {
    const [, value] = /^OCSP - URI:(.*)$/.exec(line) ?? [];
    if (value === undefined) return [];
    // Node quotes a value with special characters as JSON.
    const url = URL.parse(value.startsWith('"') ? String(JSON.parse(value)) : value);
    return url?.protocol === 'http:' ? [url] : [];
  });
}
