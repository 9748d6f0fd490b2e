/**
 * Owns: whether an OCSP response may be believed: who signed it, whom it is about, when it holds (RFC 6960 3.2, RFC 5019 4).
 * Must not know: where it came from: a responder, or a file that anybody may have written.
 * Runs: main thread of any process; a response takes a millisecond or two.
 */
import { createHash, verify, X509Certificate } from 'node:crypto';
import type { KeyObject } from 'node:crypto';
import {
  BasicOCSPResponse,
  id_kp_OCSPSigning,
  id_pkix_ocsp_basic,
  id_pkix_ocsp_nonce,
  OCSPResponse,
  OCSPResponseStatus,
} from '@peculiar/asn1-ocsp';
import type { CertID, SingleResponse } from '@peculiar/asn1-ocsp';
import { AsnConvert, OctetString } from '@peculiar/asn1-schema';
import type { Extension } from '@peculiar/asn1-x509';
import { contextTag, derElement, derElements, tags } from './der.ts';
import type { DerElement } from './der.ts';
import { ocspIssuer } from './subject.ts';
import type { OcspIssuer, OcspSubject } from './subject.ts';

/** What a responder says, verified. */
export interface OcspAnswer {
  readonly status: 'good' | 'revoked';
  readonly thisUpdate: Date;
  readonly nextUpdate: Date;
  readonly revokedAt: Date | undefined;
  /** The whole response in DER, for a client to verify as well. */
  readonly response: Buffer;
}

/**
 * `invalid`: it is not what it should be; `responder_error`: the responder says that it cannot answer; `unknown`: it does not
 * know the certificate.
 */
export interface OcspRefusal {
  readonly outcome: 'invalid' | 'responder_error' | 'unknown';
  readonly reason: string;
}

/** With a delegated signer's certificate some 2 KiB. It is part of a handshake, so what is larger is refused. */
export const responseBytesMax = 16 * 1024;
/** How far our clock and a responder's may be apart. */
const clockSkewMs = 5 * 60_000;
/** More certificates than that in a response are not looked at. */
const signersMax = 4;

/**
 * @param nonce of the request; undefined when it had none, or when this is no fresh answer.
 * @param now in milliseconds.
 */
export function verifyResponse(
  response: Buffer,
  subject: OcspSubject,
  nonce: Buffer | undefined,
  now: number,
): OcspAnswer | OcspRefusal {
  try {
    return judge(response, subject, nonce, now);
  } catch (error) {
    return invalid(`it is not an OCSP response: ${error instanceof Error ? error.message : String(error)}`);
  }
}

function judge(
  response: Buffer,
  subject: OcspSubject,
  nonce: Buffer | undefined,
  now: number,
): OcspAnswer | OcspRefusal {
  if (response.length > responseBytesMax) return invalid(`it has more than ${responseBytesMax} bytes`);
  // Clients would get whatever stood behind it, too.
  derElement(response, tags.sequence);
  const { responseStatus, responseBytes } = AsnConvert.parse(response, OCSPResponse);
  if (responseStatus !== OCSPResponseStatus.successful) {
    const name = OCSPResponseStatus[responseStatus] ?? String(responseStatus);
    return { outcome: 'responder_error', reason: `the responder answers ${name}` };
  }
  if (responseBytes?.responseType !== id_pkix_ocsp_basic) return invalid('it is of a type that nobody knows');
  const der = Buffer.from(responseBytes.response.buffer);
  const basic = AsnConvert.parse(der, BasicOCSPResponse);
  const { producedAt, responses, responseExtensions = [] } = basic.tbsResponseData;
  const single = responses.find(({ certID }) => isAbout(certID, subject));
  if (single === undefined) return invalid('it is about another certificate');
  const unsigned = signatureFault(der, basic, subject.issuer, now);
  if (unsigned !== undefined) return invalid(unsigned);
  const critical = [...responseExtensions, ...(single.singleExtensions ?? [])].find((extension) => extension.critical);
  if (critical !== undefined) return invalid(`it has the critical extension ${critical.extnID}`);
  if (nonce !== undefined && !hasNonce(responseExtensions, nonce)) return invalid('it does not have our nonce');
  if (producedAt.getTime() > now + clockSkewMs) return invalid(`it is from the future: ${producedAt.toISOString()}`);
  return answerOf(single, response, now);
}

function answerOf(single: SingleResponse, response: Buffer, now: number): OcspAnswer | OcspRefusal {
  const { certStatus, thisUpdate, nextUpdate } = single;
  if (thisUpdate.getTime() > now + clockSkewMs) return invalid(`it holds from ${thisUpdate.toISOString()} on`);
  // RFC 5019 4: without one a client cannot tell whether it is fresh.
  if (nextUpdate === undefined) return invalid('it does not say until when it holds (nextUpdate)');
  if (nextUpdate <= thisUpdate) return invalid('it ends before it begins');
  // Without allowance: clients would have to make the same.
  if (nextUpdate.getTime() <= now) return invalid(`it held until ${nextUpdate.toISOString()}`);
  const { revoked } = certStatus;
  if (revoked !== undefined) {
    return { status: 'revoked', thisUpdate, nextUpdate, revokedAt: revoked.revocationTime, response };
  }
  if (certStatus.good === undefined)
    return { outcome: 'unknown', reason: 'the responder does not know the certificate' };
  return { status: 'good', thisUpdate, nextUpdate, revokedAt: undefined, response };
}

/** The hash is the responder's choice, as long as it is one that names the certificate for good. */
function isAbout(
  { hashAlgorithm, issuerNameHash, issuerKeyHash, serialNumber }: CertID,
  subject: OcspSubject,
): boolean {
  const hash = hashes[hashAlgorithm.algorithm];
  if (hash === undefined) return false;
  const digest = (bytes: Buffer) => createHash(hash).update(bytes).digest();
  return (
    subject.serial.equals(new Uint8Array(serialNumber)) &&
    digest(subject.issuer.name).equals(new Uint8Array(issuerNameHash.buffer)) &&
    digest(subject.issuer.key).equals(new Uint8Array(issuerKeyHash.buffer))
  );
}

const hashes: Readonly<Record<string, string>> = {
  '1.3.14.3.2.26': 'sha1',
  '2.16.840.1.101.3.4.2.1': 'sha256',
  '2.16.840.1.101.3.4.2.2': 'sha384',
  '2.16.840.1.101.3.4.2.3': 'sha512',
};

/** RFC 6960 4.2.2.2: signed by the issuer itself, or by one whom the issuer itself has certified to do that. */
function signatureFault(
  der: Buffer,
  { signatureAlgorithm, signature }: BasicOCSPResponse,
  issuer: OcspIssuer,
  now: number,
): string | undefined {
  const [data, , , certificates] = derElements(derElement(der, tags.sequence).content);
  if (data === undefined) return 'nothing in it is signed';
  const faults: string[] = [];
  for (const signer of [issuer, ...certificatesIn(certificates?.whole)]) {
    if (!isNamed(data, signer)) continue;
    const fault =
      (signer === issuer ? undefined : delegationFault(signer.certificate, issuer.certificate, now)) ??
      (isSigned(data.whole, signer.certificate.publicKey, signatureAlgorithm.algorithm, signature)
        ? undefined
        : `its signature (${signatureAlgorithm.algorithm}) does not verify`);
    if (fault === undefined) return undefined;
    faults.push(fault);
  }
  return faults[0] ?? 'it was signed by somebody else than the issuer, without a certificate of the issuer';
}

function certificatesIn(element: Buffer | undefined): OcspIssuer[] {
  if (element === undefined) return [];
  const list = derElement(derElement(element, contextTag(0)).content, tags.sequence);
  return derElements(list.content)
    .slice(0, signersMax)
    .map(({ whole }) => ocspIssuer(new X509Certificate(whole)));
}

/** By its name, or by the hash of its key. */
function isNamed(data: DerElement, signer: OcspIssuer): boolean {
  const [first, second] = derElements(data.content);
  const id = first?.tag === contextTag(0) ? second : first;
  if (id?.tag === contextTag(1)) return id.content.equals(signer.name);
  if (id?.tag !== contextTag(2)) return false;
  return derElement(id.content, tags.octetString).content.equals(createHash('sha1').update(signer.key).digest());
}

function delegationFault(signer: X509Certificate, issuer: X509Certificate, now: number): string | undefined {
  if (!signer.checkIssued(issuer) || !signer.verify(issuer.publicKey)) {
    return 'the certificate of its signer was not issued by the issuer';
  }
  // Node's types do not know that it may be absent.
  const purposes: readonly string[] | undefined = signer.keyUsage;
  if (purposes === undefined || !purposes.includes(id_kp_OCSPSigning))
    return 'the certificate of its signer is not for OCSP (OCSPSigning)';
  const [from, to] = [signer.validFromDate.getTime(), signer.validToDate.getTime()];
  if (now + clockSkewMs < from || now > to) return 'the certificate of its signer is not valid now';
  return undefined;
}

function isSigned(data: Buffer, key: KeyObject, algorithm: string, signature: ArrayBuffer): boolean {
  const scheme = signatureSchemes[algorithm];
  return (
    scheme !== undefined &&
    scheme.keys.includes(key.asymmetricKeyType ?? '') &&
    verify(scheme.hash, data, key, new Uint8Array(signature))
  );
}

/** SHA-1 is left out: who can make collisions can make responses. */
const signatureSchemes: Readonly<Record<string, { readonly hash: string | null; readonly keys: readonly string[] }>> = {
  '1.2.840.113549.1.1.11': { hash: 'sha256', keys: ['rsa'] },
  '1.2.840.113549.1.1.12': { hash: 'sha384', keys: ['rsa'] },
  '1.2.840.113549.1.1.13': { hash: 'sha512', keys: ['rsa'] },
  '1.2.840.10045.4.3.2': { hash: 'sha256', keys: ['ec'] },
  '1.2.840.10045.4.3.3': { hash: 'sha384', keys: ['ec'] },
  '1.2.840.10045.4.3.4': { hash: 'sha512', keys: ['ec'] },
  '1.3.101.112': { hash: null, keys: ['ed25519'] },
};

function hasNonce(extensions: readonly Extension[], nonce: Buffer): boolean {
  const found = extensions.find(({ extnID }) => extnID === id_pkix_ocsp_nonce);
  if (found === undefined) return false;
  return nonce.equals(new Uint8Array(AsnConvert.parse(found.extnValue.buffer, OctetString).buffer));
}

function invalid(reason: string): OcspRefusal {
  return { outcome: 'invalid', reason };
}
