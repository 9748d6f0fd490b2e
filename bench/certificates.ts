/**
 * Owns: certificates that their own key signed, thousands in a second: libraries that build them from objects take
 * milliseconds for each, which a run with 10,000 certificates has not.
 * Must not know: tokens, who shows them.
 * Runs: in the benchmark's process, before anything is measured.
 */
import { randomBytes, sign } from 'node:crypto';
import type { KeyObject } from 'node:crypto';

export interface SelfSigner {
  /** For one DNS name. */
  readonly pem: (name: string) => string;
}

/** @throws for other keys than EC P-256 and P-384, RSA and Ed25519. */
export function selfSigner(privateKey: KeyObject, publicKey: KeyObject): SelfSigner {
  const { hash, algorithm } = signatureOf(privateKey);
  const spki = publicKey.export({ format: 'der', type: 'spki' });
  const validity = sequence(utcTime(Date.now() - dayMs), utcTime(Date.now() + validDays * dayMs));
  return {
    pem(name) {
      const distinguished = sequence(set(sequence(oids.commonName, tlv(tags.utf8String, Buffer.from(name)))));
      // RFC 5280 section 4.1: the first byte keeps the serial number positive and its length fixed.
      const serial = tlv(tags.integer, Buffer.from([1]), randomBytes(15));
      const signed = sequence(
        version3,
        serial,
        algorithm,
        distinguished,
        validity,
        distinguished,
        spki,
        tlv(tags.extensions, sequence(...commonExtensions, subjectAltName(name))),
      );
      const signature = tlv(tags.bitString, noUnusedBits, sign(hash, signed, privateKey));
      return pemOf(sequence(signed, algorithm, signature));
    },
  };
}

interface Signature {
  /** Null: the algorithm hashes by itself. */
  readonly hash: string | null;
  /** AlgorithmIdentifier, RFC 5280 section 4.1.1.2. */
  readonly algorithm: Buffer;
}

function signatureOf(key: KeyObject): Signature {
  const type = key.asymmetricKeyType;
  const curve = key.asymmetricKeyDetails?.namedCurve;
  if (type === 'rsa') return { hash: 'sha256', algorithm: sequence(oids.sha256WithRsa, asn1Null) };
  if (type === 'ed25519') return { hash: null, algorithm: sequence(oids.ed25519) };
  if (curve === 'prime256v1') return { hash: 'sha256', algorithm: sequence(oids.ecdsaWithSha256) };
  if (curve === 'secp384r1') return { hash: 'sha384', algorithm: sequence(oids.ecdsaWithSha384) };
  throw new Error(`certificates: expected a key of P-256, P-384, RSA or Ed25519, found ${type} ${curve ?? ''}`);
}

function subjectAltName(name: string): Buffer {
  return extension(oids.subjectAltName, false, sequence(tlv(tags.dnsName, Buffer.from(name))));
}

function extension(oid: Buffer, critical: boolean, value: Buffer): Buffer {
  return sequence(oid, ...(critical ? [asn1True] : []), tlv(tags.octetString, value));
}

function utcTime(ms: number): Buffer {
  return tlv(tags.utcTime, Buffer.from(`${new Date(ms).toISOString().replaceAll(/[-:T]/g, '').slice(2, 14)}Z`));
}

function sequence(...parts: readonly Buffer[]): Buffer {
  return tlv(tags.sequence, ...parts);
}

function set(...parts: readonly Buffer[]): Buffer {
  return tlv(tags.set, ...parts);
}

/** X.690 section 8.1: tag, length, value. */
function tlv(tag: number, ...parts: readonly Buffer[]): Buffer {
  const length = parts.reduce((sum, part) => sum + part.length, 0);
  const head =
    length < 0x80 ? [tag, length] : length < 0x100 ? [tag, 0x81, length] : [tag, 0x82, length >> 8, length & 0xff];
  return Buffer.concat([Buffer.from(head), ...parts]);
}

function pemOf(der: Buffer): string {
  const lines = der.toString('base64').match(/.{1,64}/g) ?? [];
  return ['-----BEGIN CERTIFICATE-----', ...lines, '-----END CERTIFICATE-----', ''].join('\n');
}

/** Longer than keygate warns before. */
const validDays = 90;
const dayMs = 86_400_000;

const tags = {
  integer: 0x02,
  bitString: 0x03,
  octetString: 0x04,
  oid: 0x06,
  utf8String: 0x0c,
  utcTime: 0x17,
  sequence: 0x30,
  set: 0x31,
  dnsName: 0x82,
  version: 0xa0,
  extensions: 0xa3,
} as const;

const oid = (hex: string) => tlv(tags.oid, Buffer.from(hex, 'hex'));
const oids = {
  commonName: oid('550403'),
  subjectAltName: oid('551d11'),
  basicConstraints: oid('551d13'),
  keyUsage: oid('551d0f'),
  extendedKeyUsage: oid('551d25'),
  serverAuth: oid('2b06010505070301'),
  sha256WithRsa: oid('2a864886f70d01010b'),
  ecdsaWithSha256: oid('2a8648ce3d040302'),
  ecdsaWithSha384: oid('2a8648ce3d040303'),
  ed25519: oid('2b6570'),
};
const asn1Null = Buffer.from([0x05, 0]);
const asn1True = Buffer.from([0x01, 1, 0xff]);
const noUnusedBits = Buffer.from([0]);
const version3 = tlv(tags.version, tlv(tags.integer, Buffer.from([2])));
/** Bit 0 of KeyUsage, and the seven that are not there. */
const digitalSignature = tlv(tags.bitString, Buffer.from([7, 0x80]));
const commonExtensions = [
  extension(oids.basicConstraints, true, sequence()),
  extension(oids.keyUsage, true, digitalSignature),
  extension(oids.extendedKeyUsage, false, sequence(oids.serverAuth)),
];
