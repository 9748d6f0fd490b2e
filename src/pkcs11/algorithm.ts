/**
 * Owns: which kinds of private key keygate signs with, how a public key is recognised as one of them, and the raw
 * PKCS#11 mechanism, digest and verification that belong to each.
 * Must not know: sessions, tokens, certificates.
 * Runs: everywhere; pure.
 *
 * The engine signs with the same raw mechanisms (hash here, sign there), so a proof made with these means something.
 */
import { constants, createHash, createPublicKey, verify } from 'node:crypto';
import type { KeyObject } from 'node:crypto';

export type KeyAlgorithm = 'p256' | 'p384' | 'p521' | 'rsa' | 'ed25519';

/** rustls takes RSA keys of these sizes and no others. */
const rsaBitsMin = 2048;
const rsaBitsMax = 8192;

/** Mechanisms by number (PKCS#11 v3.0), because graphene's list ends before EdDSA. */
export const mechanisms = {
  CKM_RSA_PKCS_KEY_PAIR_GEN: 0x0000,
  CKM_RSA_PKCS: 0x0001,
  CKM_RSA_PKCS_PSS: 0x000d,
  CKM_SHA256_HMAC: 0x0251,
  CKM_GENERIC_SECRET_KEY_GEN: 0x0350,
  CKM_EC_KEY_PAIR_GEN: 0x1040,
  CKM_ECDSA: 0x1041,
  CKM_EC_EDWARDS_KEY_PAIR_GEN: 0x1055,
  CKM_EDDSA: 0x1057,
} as const;
type MechanismName = keyof typeof mechanisms;

/** CKK_* (PKCS#11 v3.0). */
export const keyTypes = { rsa: 0x00, ec: 0x03, genericSecret: 0x10, sha256Hmac: 0x2b, ecEdwards: 0x40 } as const;

interface Traits {
  readonly keyType: number;
  /** Everything the engine may ask of such a key. */
  readonly signing: readonly MechanismName[];
  readonly hash: 'sha256' | 'sha384' | 'sha512' | undefined;
}

export const algorithmTraits: Record<KeyAlgorithm, Traits> = {
  p256: { keyType: keyTypes.ec, signing: ['CKM_ECDSA'], hash: 'sha256' },
  p384: { keyType: keyTypes.ec, signing: ['CKM_ECDSA'], hash: 'sha384' },
  p521: { keyType: keyTypes.ec, signing: ['CKM_ECDSA'], hash: 'sha512' },
  // TLS 1.3 allows PSS only (RFC 8446 4.2.3), TLS 1.2 clients may insist on PKCS #1 v1.5.
  rsa: { keyType: keyTypes.rsa, signing: ['CKM_RSA_PKCS_PSS', 'CKM_RSA_PKCS'], hash: 'sha256' },
  ed25519: { keyType: keyTypes.ecEdwards, signing: ['CKM_EDDSA'], hash: undefined },
};

/** Undefined for a key that keygate cannot use: another curve, RSA outside 2048..8192 bits, RSA restricted to PSS. */
export function algorithmOf(key: KeyObject): KeyAlgorithm | undefined {
  if (key.asymmetricKeyType === 'ed25519') return 'ed25519';
  if (key.asymmetricKeyType === 'ec') return curveAlgorithms[key.asymmetricKeyDetails?.namedCurve ?? ''];
  const bits = key.asymmetricKeyDetails?.modulusLength ?? 0;
  return key.asymmetricKeyType === 'rsa' && bits >= rsaBitsMin && bits <= rsaBitsMax ? 'rsa' : undefined;
}

/** `RSA 1024 bits`, `EC secp256k1`: for messages. */
export function describePublicKey(key: KeyObject): string {
  const { modulusLength, namedCurve } = key.asymmetricKeyDetails ?? {};
  const type = (key.asymmetricKeyType ?? 'unknown').toUpperCase();
  if (namedCurve !== undefined) return `${type} ${namedCurve}`;
  return modulusLength === undefined ? type : `${type} ${modulusLength} bits`;
}

export function publicKeyFromSpki(spki: Buffer): KeyObject {
  return createPublicKey({ key: spki, format: 'der', type: 'spki' });
}

/**
 * SHA-1 over the contents of the BIT STRING subjectPublicKey (RFC 5280 4.2.1.2, method 1): the subject key identifier
 * of a certificate, and the CKA_ID of a key that keygate generated.
 */
export function keyIdentifier(key: KeyObject): Buffer {
  return createHash('sha1').update(subjectPublicKey(key)).digest();
}

/** A signature with one of the raw mechanisms: what the token is given, and how its answer is verified. */
export interface SignatureScheme {
  readonly mechanism: MechanismName;
  /** What C_Sign gets for this message. */
  input(message: Buffer): Buffer;
  /** Verifies what C_Sign returned: r || s for ECDSA. */
  verifies(message: Buffer, publicKey: KeyObject, signature: Buffer): boolean;
}

/** The scheme that certificates and requests are signed with. */
export function certificateScheme(algorithm: KeyAlgorithm): SignatureScheme {
  const { hash } = algorithmTraits[algorithm];
  if (hash === undefined) {
    return {
      mechanism: 'CKM_EDDSA',
      input: (message) => message,
      verifies: (message, key, signature) => verify(null, message, key, signature),
    };
  }
  const digest = (message: Buffer) => createHash(hash).update(message).digest();
  if (algorithm === 'rsa') {
    return {
      mechanism: 'CKM_RSA_PKCS',
      input: (message) => Buffer.concat([sha256DigestInfo, digest(message)]),
      verifies: (message, key, signature) =>
        verify(hash, message, { key, padding: constants.RSA_PKCS1_PADDING }, signature),
    };
  }
  return {
    mechanism: 'CKM_ECDSA',
    input: digest,
    verifies: (message, key, signature) => verify(hash, message, { key, dsaEncoding: 'ieee-p1363' }, signature),
  };
}

/** The scheme that most TLS 1.3 handshakes will use; for RSA that is PSS with SHA-256 and a salt of its length. */
export function handshakeScheme(algorithm: KeyAlgorithm): SignatureScheme {
  if (algorithm !== 'rsa') return certificateScheme(algorithm);
  return {
    mechanism: 'CKM_RSA_PKCS_PSS',
    input: (message) => createHash('sha256').update(message).digest(),
    verifies: (message, key, signature) =>
      verify('sha256', message, { key, padding: constants.RSA_PKCS1_PSS_PADDING, saltLength: pssSaltBytes }, signature),
  };
}

export const pssSaltBytes = 32;

function subjectPublicKey(key: KeyObject): Buffer {
  if (key.asymmetricKeyType === 'rsa') return key.export({ format: 'der', type: 'pkcs1' });
  const { x = '', y } = key.export({ format: 'jwk' });
  const coordinates = [x, y ?? ''].map((coordinate) => Buffer.from(coordinate, 'base64url'));
  // Uncompressed point for EC (RFC 5480 2.2); the bare key for Ed25519 (RFC 8410 4).
  return Buffer.concat(y === undefined ? coordinates : [Buffer.from([0x04]), ...coordinates]);
}

const curveAlgorithms: Record<string, KeyAlgorithm> = { prime256v1: 'p256', secp384r1: 'p384', secp521r1: 'p521' };

/** DER of DigestInfo up to the digest, for SHA-256 (RFC 8017 9.2 note 1). */
const sha256DigestInfo = Buffer.from('3031300d060960864801650304020105000420', 'hex');
