/**
 * Owns: making things in a token: initialising it, generating key pairs and ticket keys inside it.
 * Must not know: the configuration file, certificates, where a PIN came from.
 * Runs: on the main thread of a command; never in a worker, which needs no write access to the token.
 */
import { isUtf8 } from 'node:buffer';
import type { KeyObject } from 'node:crypto';
import { ObjectClass, TokenFlag, UserType } from 'graphene-pk11';
import type { IKeyPair, ITemplate, Module, SessionObject } from 'graphene-pk11';
import { TokenError } from '../errors.ts';
import { keyIdentifier, mechanisms } from './algorithm.ts';
import { tokenFailure } from './failure.ts';
import { findPrivateKey, listKeys, publicKeyOf } from './keys.ts';
import type { OpenToken, TokenKey } from './keys.ts';
import { closeSession, findToken, listTokens, openSession, sendPin } from './module.ts';
import type { TokenInSlot } from './module.ts';

export const generatedKinds = ['p256', 'p384', 'rsa2048', 'rsa3072', 'rsa4096', 'ed25519'] as const;
export type GeneratedKind = (typeof generatedKinds)[number];

/** A key pair that was just made. */
export interface GeneratedKey {
  readonly key: TokenKey;
  readonly publicKey: KeyObject;
}

/**
 * Initialises an empty token and sets its user PIN (PKCS#11 v3.0 5.5, C_InitToken and C_InitPIN). An initialised
 * token is never touched: C_InitToken would destroy its keys.
 * @param pins zeroed here.
 * @throws TokenError `token_operation` when the label is taken or no empty token is there; `pin_invalid`.
 */
export function initialiseToken(
  module: Module,
  label: string,
  pins: { readonly securityOfficer: Buffer; readonly user: Buffer },
): TokenInSlot {
  try {
    const empty = emptyToken(module, label);
    for (const pin of [pins.securityOfficer, pins.user]) checkNewPin(pin, label, empty);
    const { slot } = empty;
    try {
      // Not graphene's initToken: C_InitToken reads 32 bytes whatever is given, so the label is padded here.
      slot.lib.C_InitToken(slot.handle, pins.securityOfficer.toString('utf8'), paddedLabel(label));
    } catch (error) {
      throw tokenFailure(error, label, 'C_InitToken');
    }
    // SoftHSM gives the token another slot once it is initialised.
    const token = findToken(module, { token: label });
    const session = openSession(token, 'read-write');
    try {
      sendPin(session, label, pins.securityOfficer, UserType.SO);
      session.initPin(pins.user.toString('utf8'));
      session.logout();
    } catch (error) {
      throw tokenFailure(error, label, 'C_InitPIN');
    } finally {
      closeSession(session);
    }
    return findToken(module, { token: label });
  } finally {
    pins.securityOfficer.fill(0);
    pins.user.fill(0);
  }
}

/**
 * Generates a key pair inside the token: private, sensitive, not extractable, for signing only.
 * CKA_ID is the SHA-1 of the public key's bit string, the same number as the subject key identifier of its
 * certificates (RFC 5280 4.2.1.2, method 1).
 * @param open a read-write session, logged in.
 * @throws TokenError `token_operation`; an existing label is never used again.
 */
export function generateKeyPair(open: OpenToken, label: string, kind: GeneratedKind): GeneratedKey {
  refuseTakenLabel(open, label);
  const recipe = recipes[kind];
  let pair: IKeyPair;
  try {
    pair = open.session.generateKeyPair(
      { name: mechanisms[recipe.mechanism], params: null },
      { token: true, label, verify: true, encrypt: false, wrap: false, ...recipe.publicTemplate },
      { token: true, label, ...confined, decrypt: false, unwrap: false, signRecover: false },
    );
  } catch (error) {
    throw tokenFailure(error, open.token.label, `generating ${kind} key "${label}"`);
  }
  try {
    const key = findPrivateKey(open, { object: label });
    const publicKey = publicKeyOf(open, key);
    const id = keyIdentifier(publicKey);
    pair.publicKey.setAttribute({ id });
    pair.privateKey.setAttribute({ id });
    return { key: findPrivateKey(open, { object: label, id: id.toString('hex') }), publicKey };
  } catch (error) {
    // Half a key pair under a label would block the next try.
    destroyQuietly(pair.publicKey, pair.privateKey);
    throw tokenFailure(error, open.token.label, `naming ${kind} key "${label}"`);
  }
}

/**
 * Generates the secret that session ticket keys are derived from with CKM_SHA256_HMAC: 32 bytes, private, sensitive,
 * not extractable, for signing only.
 * @param open a read-write session, logged in.
 */
export function generateTicketKey(open: OpenToken, label: string): TokenKey {
  refuseTakenLabel(open, label);
  try {
    open.session.generateKey(
      { name: mechanisms.CKM_GENERIC_SECRET_KEY_GEN, params: null },
      {
        token: true,
        label,
        valueLen: ticketKeyBytes,
        ...confined,
        verify: false,
        encrypt: false,
        decrypt: false,
        wrap: false,
        unwrap: false,
      },
    );
  } catch (error) {
    throw tokenFailure(error, open.token.label, `generating ticket key "${label}"`);
  }
  const key = listKeys(open).find((candidate) => candidate.kind === 'secret' && candidate.label === label);
  if (key === undefined)
    throw new TokenError('token_operation', `token ${open.token.label}: the new ticket key "${label}" is not there`);
  return key;
}

/** SHA-256's own size; SoftHSM refuses less for HMAC keys. */
const ticketKeyBytes = 32;

/** What makes a key one that cannot leave. */
const confined: ITemplate = { private: true, sensitive: true, extractable: false, sign: true, derive: false };

interface Recipe {
  readonly mechanism: 'CKM_EC_KEY_PAIR_GEN' | 'CKM_EC_EDWARDS_KEY_PAIR_GEN' | 'CKM_RSA_PKCS_KEY_PAIR_GEN';
  readonly publicTemplate: ITemplate;
}

const recipes: Record<GeneratedKind, Recipe> = {
  p256: { mechanism: 'CKM_EC_KEY_PAIR_GEN', publicTemplate: { paramsEC: Buffer.from('06082a8648ce3d030107', 'hex') } },
  p384: { mechanism: 'CKM_EC_KEY_PAIR_GEN', publicTemplate: { paramsEC: Buffer.from('06052b81040022', 'hex') } },
  rsa2048: rsaRecipe(2048),
  rsa3072: rsaRecipe(3072),
  rsa4096: rsaRecipe(4096),
  // The name "edwards25519" as a PrintableString (PKCS#11 v3.0 6.3.2): SoftHSM and others take it.
  ed25519: {
    mechanism: 'CKM_EC_EDWARDS_KEY_PAIR_GEN',
    publicTemplate: { paramsEC: Buffer.from('130c656477617264733235353139', 'hex') },
  },
};

function rsaRecipe(modulusBits: number): Recipe {
  return {
    mechanism: 'CKM_RSA_PKCS_KEY_PAIR_GEN',
    publicTemplate: { modulusBits, publicExponent: Buffer.from([1, 0, 1]) },
  };
}

function emptyToken(module: Module, label: string): TokenInSlot {
  const tokens = listTokens(module);
  if (tokens.some((token) => token.label === label)) {
    throw new TokenError(
      'token_operation',
      `token ${label}: a token with this label is there already, and is not initialised again`,
      {
        token: label,
        hint: 'choose another label; two tokens with one label could not be told apart',
      },
    );
  }
  const empty = tokens.find((token) => (token.flags & TokenFlag.TOKEN_INITIALIZED) === 0);
  if (empty !== undefined) return empty;
  throw new TokenError('token_operation', `token ${label}: module ${module.libFile} has no empty token to initialise`, {
    token: label,
    hint: 'make room for one with the tools of the vendor',
  });
}

/** Before anything is written: a token with a label and without a user PIN could be neither used nor made again. */
function checkNewPin(pin: Buffer, label: string, { pinBytes: { min, max } }: TokenInSlot): void {
  if (isUtf8(pin) && pin.length >= min && pin.length <= max) return;
  throw new TokenError('pin_invalid', `token ${label}: the token takes PINs of ${min} to ${max} bytes of UTF-8`, {
    token: label,
  });
}

/** CK_TOKEN_INFO.label: 32 bytes of UTF-8, padded with blanks, without a zero byte (PKCS#11 v3.0 3.2). */
function paddedLabel(label: string): string {
  return label + ' '.repeat(Math.max(0, tokenLabelBytesMax - Buffer.byteLength(label)));
}

export const tokenLabelBytesMax = 32;

/** Among private, secret and public objects, so that a label always means one key. */
function refuseTakenLabel(open: OpenToken, label: string): void {
  const { label: token } = open.token;
  let taken: number;
  try {
    const classes = [ObjectClass.PRIVATE_KEY, ObjectClass.SECRET_KEY, ObjectClass.PUBLIC_KEY];
    taken = classes.reduce((sum, objectClass) => sum + open.session.find({ class: objectClass, label }).length, 0);
  } catch (error) {
    throw tokenFailure(error, token, 'C_FindObjects');
  }
  if (taken === 0) return;
  throw new TokenError('token_operation', `token ${token}: a key with the label "${label}" is there already`, {
    token,
    hint: 'choose another label; keygate overwrites no key and deletes none',
  });
}

function destroyQuietly(...objects: readonly SessionObject[]): void {
  for (const object of objects) {
    try {
      object.destroy();
    } catch {
      // The failure that led here is the one to report.
    }
  }
}
