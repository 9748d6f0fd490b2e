/**
 * Owns: `keygate key list`, `generate`, `csr` and `self-sign`.
 * Must not know: how PKCS#11 is called.
 * Runs: on the main thread of a command.
 */
import type { Pkcs11Uri } from '../config/pkcs11-uri.ts';
import { UsageError } from '../errors.ts';
import type { Purpose } from '../pkcs11/certificates.ts';
import { createSelfSigned, createSigningRequest } from '../pkcs11/issue.ts';
import type { Subject } from '../pkcs11/issue.ts';
import { findPrivateKey, formatKey, formatKeyType, listKeys } from '../pkcs11/keys.ts';
import type { TokenKey } from '../pkcs11/keys.ts';
import { generatedKinds, generateKeyPair, generateTicketKey } from '../pkcs11/provision.ts';
import type { GeneratedKind } from '../pkcs11/provision.ts';
import { printJson, printLine, printTable, writeResult } from './output.ts';
import { withToken } from './with-token.ts';
import type { TokenOptions } from './with-token.ts';

export interface KeyListOptions extends TokenOptions {
  readonly json?: boolean;
}

export interface KeyGenerateOptions extends TokenOptions {
  readonly label: string;
  /** `p256`, `p384`, `rsa2048`, `rsa3072`, `rsa4096`, `ed25519`, or `ticket` for the secret behind session tickets. */
  readonly type: string;
}

export interface KeySubjectOptions extends TokenOptions {
  /** Label of the private key. */
  readonly label: string;
  /** Its CKA_ID in hex, where the label means several. */
  readonly id?: string;
  /** Distinguished name; default: CN is the first DNS name. */
  readonly subject?: string;
  /** Together with `ip` at least one. */
  readonly dns?: readonly string[];
  readonly ip?: readonly string[];
  readonly purpose: Purpose;
  /** A file that is not there yet; standard output when absent. */
  readonly out?: string;
}

export interface KeySelfSignOptions extends KeySubjectOptions {
  /** A whole number, 1..3650. */
  readonly days: number;
}

export const generatedTypes = [...generatedKinds, 'ticket'] as const;

export async function list(options: KeyListOptions): Promise<void> {
  const keys = await withToken(options, 'read', (open) => listKeys(open).map(describe));
  if (options.json === true) {
    printJson(keys);
    return;
  }
  printTable(
    ['LABEL', 'ID', 'KIND', 'TYPE', 'CAN LEAVE'],
    keys.map(({ label, id, kind, type, confined }) => [
      label === '' ? '-' : label,
      id === '' ? '-' : id,
      kind,
      type,
      confined ? 'no' : 'YES',
    ]),
  );
}

export async function generate(options: KeyGenerateOptions): Promise<void> {
  const { label, type } = options;
  if (!isGeneratedType(type))
    throw new UsageError(`type: found ${JSON.stringify(type)}, expected one of ${generatedTypes.join(', ')}`);
  const length = Buffer.byteLength(label);
  if (length < 1 || length > labelBytesMax)
    throw new UsageError(`label: found ${length} bytes, expected 1 to ${labelBytesMax}`);
  await withToken(options, 'read-write', (open) => {
    const key = type === 'ticket' ? generateTicketKey(open, label) : generateKeyPair(open, label, type).key;
    printLine(`token "${open.token.label}": ${type} key ${formatKey(key)}: generated`);
  });
}

export async function csr(options: KeySubjectOptions): Promise<void> {
  const uri = keyUri(options);
  const pem = await withToken(options, 'read', (open) =>
    createSigningRequest(open, findPrivateKey(open, uri), subjectOf(options)),
  );
  writeResult(pem, options.out);
}

export async function selfSign(options: KeySelfSignOptions): Promise<void> {
  const uri = keyUri(options);
  const pem = await withToken(options, 'read', (open) =>
    createSelfSigned(open, findPrivateKey(open, uri), subjectOf(options), options.days),
  );
  writeResult(pem, options.out);
}

/** What fits into a PKCS#11 URI of the configuration. */
const labelBytesMax = 255;

function describe(key: TokenKey) {
  return {
    label: key.label,
    id: key.id.toString('hex'),
    kind: key.kind,
    type: formatKeyType(key.keyType),
    confined: key.sensitive === true && key.extractable === false,
    sensitive: key.sensitive,
    extractable: key.extractable,
    alwaysSensitive: key.alwaysSensitive,
    neverExtractable: key.neverExtractable,
    local: key.local,
  };
}

function isGeneratedType(type: string): type is GeneratedKind | 'ticket' {
  return (generatedTypes as readonly string[]).includes(type);
}

function keyUri({ label, id }: KeySubjectOptions): Pkcs11Uri {
  if (id !== undefined && !/^(?:[0-9a-f]{2}){1,255}$/i.test(id)) {
    throw new UsageError(`id: found ${JSON.stringify(id.slice(0, 80))}, expected 1 to 255 bytes in hex`);
  }
  return { object: label, ...(id === undefined ? {} : { id: id.toLowerCase() }) };
}

function subjectOf({ subject, dns = [], ip = [], purpose }: KeySubjectOptions): Subject {
  return { dns, ip, purpose, ...(subject === undefined ? {} : { distinguishedName: subject }) };
}
