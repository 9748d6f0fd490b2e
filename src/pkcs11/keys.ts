/**
 * Owns: finding keys in a token, describing them, and proving that a private key cannot leave and belongs to its
 * certificate.
 * Must not know: PINs, certificates beyond their public key, the configuration file.
 * Runs: on the main thread of a worker or of a command, on a session that is logged in.
 */
import { createPublicKey, randomBytes } from 'node:crypto';
import type { KeyObject } from 'node:crypto';
import { MechanismEnum, ObjectClass, RsaMgf, RsaPssParams } from 'graphene-pk11';
import type { ITemplate, Key, Session, SessionObject } from 'graphene-pk11';
import type { Pkcs11Uri } from '../config/pkcs11-uri.ts';
import { formatPkcs11Uri } from '../config/pkcs11-uri.ts';
import { TokenError } from '../errors.ts';
import {
  algorithmOf,
  algorithmTraits,
  describePublicKey,
  handshakeScheme,
  keyTypes,
  mechanisms,
  pssSaltBytes,
  publicKeyFromSpki,
} from './algorithm.ts';
import type { KeyAlgorithm, SignatureScheme } from './algorithm.ts';
import { ckrName, tokenFailure } from './failure.ts';
import type { TokenInSlot } from './module.ts';

/** A session that is logged in, and the token it belongs to. */
export interface OpenToken {
  readonly session: Session;
  readonly token: TokenInSlot;
}

/** A private or secret key object. Attributes are undefined where the token does not have them. */
export interface TokenKey {
  readonly object: SessionObject;
  readonly kind: 'private' | 'secret';
  /** CKA_LABEL; may be empty. */
  readonly label: string;
  /** CKA_ID; may be empty. */
  readonly id: Buffer;
  /** CKK_* number. */
  readonly keyType: number;
  readonly sensitive: boolean | undefined;
  readonly extractable: boolean | undefined;
  readonly alwaysSensitive: boolean | undefined;
  readonly neverExtractable: boolean | undefined;
  /** Generated inside the token. */
  readonly local: boolean | undefined;
  readonly alwaysAuthenticate: boolean | undefined;
  readonly sign: boolean | undefined;
}

/** All private and secret keys of the token, as it lists them. */
export function listKeys(open: OpenToken): TokenKey[] {
  return [...findKeys(open, 'private', {}), ...findKeys(open, 'secret', {})];
}

/**
 * The one private key that the URI's `object` and `id` mean.
 * @throws TokenError `token_key_not_found` for none or several, listing what is there by label and id.
 */
export function findPrivateKey(open: OpenToken, uri: Pkcs11Uri): TokenKey {
  return findKey(open, 'private', uri);
}

/** The same for a secret key. */
export function findSecretKey(open: OpenToken, uri: Pkcs11Uri): TokenKey {
  return findKey(open, 'secret', uri);
}

function findKey(open: OpenToken, kind: TokenKey['kind'], uri: Pkcs11Uri): TokenKey {
  const template: ITemplate = {
    ...(uri.object === undefined ? {} : { label: uri.object }),
    ...(uri.id === undefined ? {} : { id: Buffer.from(uri.id, 'hex') }),
  };
  return onlyKey(open, kind, uri, findKeys(open, kind, template), () => findKeys(open, kind, {}));
}

/**
 * Finds private keys as `findPrivateKey` does, many of them: a token may look at every object that it holds in each
 * search, so after a few searches it is asked for all its keys once.
 */
export class KeySearch {
  readonly #open: OpenToken;
  #searches = 0;
  #directory: KeyDirectory | undefined;

  constructor(open: OpenToken) {
    this.#open = open;
  }

  /** @throws TokenError `token_key_not_found` */
  find(uri: Pkcs11Uri): TokenKey {
    this.#searches += 1;
    if (this.#searches > searchesMax) this.#directory ??= keyDirectory(this.#open);
    const directory = this.#directory;
    if (directory === undefined || directory.isPartial) return findPrivateKey(this.#open, uri);
    const { object: label, id } = uri;
    const named = label === undefined ? directory.byId.get(id ?? '') : directory.byLabel.get(label);
    const found = (named ?? []).filter((entry) => id === undefined || entry.id.toString('hex') === id);
    try {
      const described = found.map(({ object }) => describeKey(object, 'private'));
      return onlyKey(this.#open, 'private', uri, described, () => directory.entries);
    } catch (error) {
      throw tokenFailure(error, this.#open.token.label, 'C_GetAttributeValue');
    }
  }
}

/** A token may hold far more keys than a configuration names: listing them all must not be the price of a few. */
const searchesMax = 16;

/** Every private key of a token by what it is called. */
interface KeyDirectory {
  readonly entries: readonly DirectoryEntry[];
  readonly byLabel: ReadonlyMap<string, readonly DirectoryEntry[]>;
  /** By CKA_ID in hex. */
  readonly byId: ReadonlyMap<string, readonly DirectoryEntry[]>;
  /** The token holds more keys than are listed. */
  readonly isPartial: boolean;
}

interface DirectoryEntry extends Pick<TokenKey, 'label' | 'id'> {
  readonly object: SessionObject;
}

function keyDirectory(open: OpenToken): KeyDirectory {
  const objects = findObjects(open, 'private', {}, directoryKeysMax);
  try {
    const entries = objects.map((object) => ({ object, ...nameOf(object) }));
    return {
      entries,
      byLabel: Map.groupBy(entries, ({ label }) => label),
      byId: Map.groupBy(entries, ({ id }) => id.toString('hex')),
      isPartial: objects.length >= directoryKeysMax,
    };
  } catch (error) {
    throw tokenFailure(error, open.token.label, 'C_GetAttributeValue');
  }
}

/** @param there what to list when it is not one key that was found. */
function onlyKey(
  { token: { label, remembered } }: OpenToken,
  kind: TokenKey['kind'],
  uri: Pkcs11Uri,
  found: readonly TokenKey[],
  there: () => readonly Pick<TokenKey, 'label' | 'id'>[],
): TokenKey {
  const [key] = found;
  if (key !== undefined && found.length === 1) return key;
  const place = `token ${label}: ${kind} key ${formatPkcs11Uri(uri)}`;
  if (found.length > 1) {
    throw new TokenError(
      'token_key_not_found',
      `${place}: found ${found.length} keys, expected one: ${formatKeys(found)}`,
      {
        token: label,
        hint: 'name one of them by its id, or remove the others',
      },
    );
  }
  throw new TokenError('token_key_not_found', `${place}: not found; ${kind} keys there: ${formatKeys(there())}`, {
    token: label,
    hint: remembered
      ? 'a key that was made after the start is seen after a restart: SoftHSM that cannot write its token directory looks once'
      : 'see keygate key list, or make one with keygate key generate',
  });
}

/**
 * Proves that the key cannot leave the token: CKA_SENSITIVE, not CKA_EXTRACTABLE, and a refusal to show it.
 * @returns warnings: what is not wrong now but says that the key was outside once, or may have been.
 * @throws TokenError `token_key_exposed` naming the key.
 */
export function proveConfined(open: OpenToken, key: TokenKey): string[] {
  const name = formatKey(key);
  const { label } = open.token;
  const exposed = (found: string) => {
    throw new TokenError('token_key_exposed', `token ${label}: key ${name}: ${found}`, {
      token: label,
      hint: 'generate a new key inside the token with keygate key generate; a key that could be copied stays suspect',
    });
  };
  if (key.sensitive !== true) exposed(`found CKA_SENSITIVE ${formatBoolean(key.sensitive)}, expected true`);
  if (key.extractable !== false) exposed(`found CKA_EXTRACTABLE ${formatBoolean(key.extractable)}, expected false`);
  const answer = askForSecret(key);
  if (answer !== 'CKR_ATTRIBUTE_SENSITIVE') {
    exposed(`asked for the private value, the token answered ${answer}, expected CKR_ATTRIBUTE_SENSITIVE`);
  }

  const history = {
    CKA_ALWAYS_SENSITIVE: key.alwaysSensitive,
    CKA_NEVER_EXTRACTABLE: key.neverExtractable,
    CKA_LOCAL: key.local,
  };
  return Object.entries(history)
    .filter(([, value]) => value !== true)
    .map(
      ([attribute, value]) =>
        `token ${label}: key ${name}: ${attribute} is ${formatBoolean(value)}: a copy may exist outside the token`,
    );
}

/**
 * Proves that the private key can be used for TLS and belongs to the certificate: the right type, the mechanisms the
 * engine needs, and one signature over random bytes verified with the certificate's public key.
 * @param certificateSpki SubjectPublicKeyInfo in DER (RFC 5280 4.1.2.7).
 * @throws TokenError `token_key_mismatch`, `token_mechanism` or `token_operation` naming the key.
 */
export function proveKey(open: OpenToken, key: TokenKey, certificateSpki: Buffer): KeyAlgorithm {
  const { label } = open.token;
  const place = `token ${label}: key ${formatKey(key)}`;
  const publicKey = publicKeyFromSpki(certificateSpki);
  const algorithm = algorithmOf(publicKey);
  if (algorithm === undefined || algorithmTraits[algorithm].keyType !== key.keyType) {
    throw new TokenError(
      'token_key_mismatch',
      `${place}: found a key of type ${formatKeyType(key.keyType)}, expected one for the certificate's ${describePublicKey(publicKey)}`,
      { token: label },
    );
  }
  if (key.sign === false) {
    throw new TokenError('token_mechanism', `${place}: found CKA_SIGN false, expected true`, { token: label });
  }
  if (key.alwaysAuthenticate === true) {
    // C_Login(CKU_CONTEXT_SPECIFIC) before every signature: the engine does not do it.
    throw new TokenError('token_mechanism', `${place}: found CKA_ALWAYS_AUTHENTICATE true, expected false`, {
      token: label,
      hint: 'a key that wants the PIN before every signature cannot serve handshakes; generate one without it',
    });
  }
  requireMechanisms(open.token, algorithmTraits[algorithm].signing, `${algorithm} keys need`);

  const message = randomBytes(64);
  const scheme = handshakeScheme(algorithm);
  const signature = signRaw(open, key, scheme, message);
  if (!scheme.verifies(message, publicKey, signature)) {
    throw new TokenError(
      'token_key_mismatch',
      `${place}: its signature does not verify with the public key of the certificate`,
      {
        token: label,
        hint: 'the certificate belongs to another key: name that key, or have a certificate issued for this one (keygate key csr)',
      },
    );
  }
  return algorithm;
}

/**
 * Proves that session tickets' secrets can be derived from the key.
 * @returns a MAC that tells it from other keys, and nothing about what it makes of tickets.
 * @throws TokenError `token_mechanism` or `token_operation` naming the key.
 */
export function proveTicketKey(open: OpenToken, key: TokenKey): Buffer {
  const { label } = open.token;
  if (key.sign === false) {
    throw new TokenError(
      'token_mechanism',
      `token ${label}: key ${formatKey(key)}: found CKA_SIGN false, expected true`,
      { token: label },
    );
  }
  requireMechanisms(open.token, ['CKM_SHA256_HMAC'], 'ticket keys need');
  try {
    return open.session
      .createSign({ name: mechanisms.CKM_SHA256_HMAC, params: null }, key.object.toType<Key>())
      .once(Buffer.from('keygate compares ticket keys'));
  } catch (error) {
    throw tokenFailure(error, label, `CKM_SHA256_HMAC with key ${formatKey(key)}`);
  }
}

/** One C_Sign; for ECDSA the result is r || s. */
export function signRaw(open: OpenToken, key: TokenKey, scheme: SignatureScheme, message: Buffer): Buffer {
  const params =
    scheme.mechanism === 'CKM_RSA_PKCS_PSS'
      ? new RsaPssParams(MechanismEnum.SHA256, RsaMgf.MGF1_SHA256, pssSaltBytes)
      : null;
  try {
    return open.session
      .createSign({ name: mechanisms[scheme.mechanism], params }, key.object.toType<Key>())
      .once(scheme.input(message));
  } catch (error) {
    throw tokenFailure(error, open.token.label, `signing with key ${formatKey(key)} and ${scheme.mechanism}`);
  }
}

/**
 * SubjectPublicKeyInfo of a private key: from its own attributes for RSA, else from the public key object beside it.
 * The caller proves the pair with proveKey: nothing but a signature ties the two objects together.
 * @throws TokenError `token_key_not_found` when there is no public key object.
 */
export function publicKeyOf(open: OpenToken, key: TokenKey): KeyObject {
  const { label } = open.token;
  try {
    if (key.keyType === keyTypes.rsa) return rsaPublicKey(key.object);
    const template: ITemplate = key.id.length > 0 ? { id: key.id } : { label: key.label };
    const [publicObject] = [...open.session.find({ ...template, class: ObjectClass.PUBLIC_KEY })];
    if (publicObject !== undefined) return ecPublicKey(publicObject, key.keyType);
  } catch (error) {
    throw tokenFailure(error, label, `reading the public key of ${formatKey(key)}`);
  }
  throw new TokenError(
    'token_key_not_found',
    `token ${label}: key ${formatKey(key)} has no public key object with its id`,
    { token: label },
  );
}

/** `"www" (id 0a1b)`: what a person needs to find the key, and no secret. */
export function formatKey(key: Pick<TokenKey, 'label' | 'id'>): string {
  return `"${key.label}" (id ${key.id.length === 0 ? 'none' : key.id.toString('hex')})`;
}

export function formatKeyType(keyType: number): string {
  return keyTypeNames[keyType] ?? `0x${keyType.toString(16)}`;
}

/** What a token may hold is its own business; what is read of it into a message or a table is bounded. */
const keysListedMax = 20;
const keysFoundMax = 10_000;
const directoryKeysMax = 100_000;

const keyTypeNames: Record<number, string> = {
  [keyTypes.rsa]: 'RSA',
  [keyTypes.ec]: 'EC',
  [keyTypes.ecEdwards]: 'EdDSA',
  [keyTypes.genericSecret]: 'generic secret',
  [keyTypes.sha256Hmac]: 'HMAC-SHA256',
};

function findKeys(open: OpenToken, kind: TokenKey['kind'], template: ITemplate): TokenKey[] {
  const objects = findObjects(open, kind, template, keysFoundMax);
  try {
    return objects.map((object) => describeKey(object, kind));
  } catch (error) {
    throw tokenFailure(error, open.token.label, 'C_GetAttributeValue');
  }
}

function findObjects(open: OpenToken, kind: TokenKey['kind'], template: ITemplate, countMax: number): SessionObject[] {
  const objectClass = kind === 'private' ? ObjectClass.PRIVATE_KEY : ObjectClass.SECRET_KEY;
  const objects: SessionObject[] = [];
  try {
    open.session.find({ ...template, class: objectClass }, (object) => {
      objects.push(object);
      return objects.length < countMax;
    });
    return objects;
  } catch (error) {
    throw tokenFailure(error, open.token.label, 'C_FindObjects');
  }
}

function describeKey(object: SessionObject, kind: TokenKey['kind']): TokenKey {
  const read = readAttributes(object, describedAttributes);
  const isTrue = (attribute: number): boolean | undefined => {
    const value = read.get(attribute);
    return value?.length === 1 ? value[0] !== 0 : undefined;
  };
  return {
    object,
    kind,
    label: read.get(attributes.CKA_LABEL)?.toString('utf8') ?? '',
    id: read.get(attributes.CKA_ID) ?? Buffer.alloc(0),
    keyType: read.get(attributes.CKA_KEY_TYPE)?.readUInt32LE(0) ?? -1,
    sensitive: isTrue(attributes.CKA_SENSITIVE),
    extractable: isTrue(attributes.CKA_EXTRACTABLE),
    alwaysSensitive: isTrue(attributes.CKA_ALWAYS_SENSITIVE),
    neverExtractable: isTrue(attributes.CKA_NEVER_EXTRACTABLE),
    local: isTrue(attributes.CKA_LOCAL),
    alwaysAuthenticate: isTrue(attributes.CKA_ALWAYS_AUTHENTICATE),
    sign: isTrue(attributes.CKA_SIGN),
  };
}

function nameOf(object: SessionObject): Pick<TokenKey, 'label' | 'id'> {
  const read = readAttributes(object, [attributes.CKA_LABEL, attributes.CKA_ID]);
  return {
    label: read.get(attributes.CKA_LABEL)?.toString('utf8') ?? '',
    id: read.get(attributes.CKA_ID) ?? Buffer.alloc(0),
  };
}

/** By number: graphene's names are ambiguous both ways (CKA_EC_PARAMS comes back under another name than it was asked for). */
const attributes = {
  CKA_LABEL: 0x003,
  CKA_VALUE: 0x011,
  CKA_KEY_TYPE: 0x100,
  CKA_ID: 0x102,
  CKA_SENSITIVE: 0x103,
  CKA_SIGN: 0x108,
  CKA_MODULUS: 0x120,
  CKA_PUBLIC_EXPONENT: 0x122,
  CKA_PRIVATE_EXPONENT: 0x123,
  CKA_EXTRACTABLE: 0x162,
  CKA_LOCAL: 0x163,
  CKA_NEVER_EXTRACTABLE: 0x164,
  CKA_ALWAYS_SENSITIVE: 0x165,
  CKA_EC_PARAMS: 0x180,
  CKA_EC_POINT: 0x181,
  CKA_ALWAYS_AUTHENTICATE: 0x202,
} as const;

const describedAttributes: readonly number[] = [
  attributes.CKA_LABEL,
  attributes.CKA_ID,
  attributes.CKA_KEY_TYPE,
  attributes.CKA_SENSITIVE,
  attributes.CKA_EXTRACTABLE,
  attributes.CKA_ALWAYS_SENSITIVE,
  attributes.CKA_NEVER_EXTRACTABLE,
  attributes.CKA_LOCAL,
  attributes.CKA_ALWAYS_AUTHENTICATE,
  attributes.CKA_SIGN,
];

/** What the object has of `wanted`: all in one call, or one by one, because a token that lacks one refuses them all. */
function readAttributes(object: SessionObject, wanted: readonly number[]): ReadonlyMap<number, Buffer> {
  try {
    const { session, handle, lib } = object;
    const read = lib.C_GetAttributeValue(
      session.handle,
      handle,
      wanted.map((type) => ({ type })),
    );
    return new Map(read.flatMap(({ type, value }) => (Buffer.isBuffer(value) ? [[type, value] as const] : [])));
  } catch (error) {
    if (!isAbsence(error)) throw error;
  }
  const found = new Map<number, Buffer>();
  for (const attribute of wanted) {
    try {
      found.set(attribute, object.getAttribute(attribute));
    } catch (error) {
      if (!isAbsence(error)) throw error;
    }
  }
  return found;
}

function isAbsence(error: unknown): boolean {
  const ckr = ckrName(error);
  return ckr === 'CKR_ATTRIBUTE_TYPE_INVALID' || ckr === 'CKR_ATTRIBUTE_SENSITIVE';
}

/** Asks for what must never be given. @returns the CKR name of the refusal, or that there was none. */
function askForSecret(key: TokenKey): string {
  const attribute = key.keyType === keyTypes.rsa ? attributes.CKA_PRIVATE_EXPONENT : attributes.CKA_VALUE;
  try {
    const value: Buffer | undefined = key.object.getAttribute(attribute);
    value?.fill(0);
    return value === undefined ? 'without a refusal' : 'with the private value';
  } catch (error) {
    return ckrName(error) ?? 'with an unknown failure';
  }
}

function requireMechanisms(token: TokenInSlot, wanted: readonly (keyof typeof mechanisms)[], whose: string): void {
  let offered: Set<number>;
  try {
    offered = new Set(token.slot.lib.C_GetMechanismList(token.slot.handle));
  } catch (error) {
    throw tokenFailure(error, token.label, 'C_GetMechanismList');
  }
  const missing = wanted.filter((name) => !offered.has(mechanisms[name]));
  if (missing.length === 0) return;
  throw new TokenError('token_mechanism', `token ${token.label}: lacks ${missing.join(' and ')}, which ${whose}`, {
    token: token.label,
  });
}

function rsaPublicKey(object: SessionObject): KeyObject {
  const n = object.getAttribute(attributes.CKA_MODULUS).toString('base64url');
  const e = object.getAttribute(attributes.CKA_PUBLIC_EXPONENT).toString('base64url');
  return createPublicKey({ format: 'jwk', key: { kty: 'RSA', n, e } });
}

function ecPublicKey(object: SessionObject, keyType: number): KeyObject {
  const point = unwrapOctetString(object.getAttribute(attributes.CKA_EC_POINT));
  if (keyType === keyTypes.ecEdwards) {
    return createPublicKey({ format: 'jwk', key: { kty: 'OKP', crv: 'Ed25519', x: point.toString('base64url') } });
  }
  const curve = curves[object.getAttribute(attributes.CKA_EC_PARAMS).toString('hex')];
  if (curve === undefined || point.length !== 1 + 2 * curve.bytes || point[0] !== 0x04) {
    throw new Error('its curve is none of P-256, P-384, P-521, or its point is not uncompressed');
  }
  return createPublicKey({
    format: 'jwk',
    key: {
      kty: 'EC',
      crv: curve.name,
      x: point.subarray(1, 1 + curve.bytes).toString('base64url'),
      y: point.subarray(1 + curve.bytes).toString('base64url'),
    },
  });
}

/** CKA_EC_PARAMS, a DER object identifier in hex. */
const curves: Record<string, { readonly name: string; readonly bytes: number }> = {
  '06082a8648ce3d030107': { name: 'P-256', bytes: 32 },
  '06052b81040022': { name: 'P-384', bytes: 48 },
  '06052b81040023': { name: 'P-521', bytes: 66 },
};

/** CKA_EC_POINT is a DER OCTET STRING by the standard (PKCS#11 v3.0 6.3.3); some tokens give the bare point. */
function unwrapOctetString(value: Buffer): Buffer {
  if (value[0] !== 0x04) return value;
  if (value[1] === value.length - 2) return value.subarray(2);
  return value[1] === 0x81 && value[2] === value.length - 3 ? value.subarray(3) : value;
}

function formatKeys(keys: readonly Pick<TokenKey, 'label' | 'id'>[]): string {
  if (keys.length === 0) return 'none';
  const listed = keys.slice(0, keysListedMax).map(formatKey).join(', ');
  return keys.length > keysListedMax ? `${listed} and ${keys.length - keysListedMax} more` : listed;
}

function formatBoolean(value: boolean | undefined): string {
  return value === undefined ? 'not given' : String(value);
}
