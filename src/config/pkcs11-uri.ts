/**
 * Owns: PKCS#11 URIs (RFC 7512), as far as they name a token or an object: a strict parser and a printer.
 * Must not know: PINs, modules, PKCS#11 calls.
 * Runs: everywhere.
 *
 * Refused although RFC 7512 has them: `slot-*`, because slot numbers change with every start of many modules;
 * `library-*` and all of the query, because the configuration has keys of its own for the module and the PIN, and
 * because a URI that cannot hold a PIN can be logged.
 */
import type { Fault, Parsed } from './fault.ts';

/** Percent-decoded path attributes. There is no field for a PIN, so printing one cannot show it. */
export interface Pkcs11Uri {
  /** Label of the token, at most 32 bytes; trailing blanks do not count. */
  readonly token?: string;
  readonly manufacturer?: string;
  readonly model?: string;
  readonly serial?: string;
  /** CKA_LABEL of the object. */
  readonly object?: string;
  /** CKA_ID of the object, in lower-case hex. */
  readonly id?: string;
  readonly type?: 'public' | 'private' | 'cert' | 'secret-key' | 'data';
}

/** Widths of the blank-padded fields of CK_TOKEN_INFO (PKCS#11 v3.0 3.2); others by what tokens accept. */
const bytesMax = { token: 32, manufacturer: 32, model: 16, serial: 16, object: 255, id: 255, type: 10 } as const;
type Attribute = keyof typeof bytesMax;

const uriLengthMax = 2048;
const objectTypes: readonly string[] = ['public', 'private', 'cert', 'secret-key', 'data'];

export function parsePkcs11Uri(text: string): Parsed<Pkcs11Uri> {
  if (!/^pkcs11:/i.test(text))
    return refuse({ expected: 'a PKCS#11 URI such as pkcs11:token=NAME or pkcs11:object=NAME' }, text);
  if (text.length > uriLengthMax) return refuse({ expected: `at most ${uriLengthMax} characters` }, text);
  const [path = '', ...query] = text.slice('pkcs11:'.length).split('?');
  if (query.length > 0) return refuse(queryFault(query.join('?')), text);

  const uri: Partial<Record<Attribute, string>> = {};
  for (const part of path === '' ? [] : path.split(';')) {
    const equals = part.indexOf('=');
    const name = equals < 0 ? part : part.slice(0, equals);
    if (equals < 0) return refuse({ expected: 'NAME=VALUE between the semicolons' }, text);
    if (!isAttribute(name)) return refuse(unknownFault(name), text);
    if (uri[name] !== undefined) return refuse({ expected: `the attribute ${name} once` }, text);
    const parsed = parseValue(name, part.slice(equals + 1));
    if ('fault' in parsed) return refuse(parsed.fault, text);
    uri[name] = parsed.value;
  }
  return { value: uri as Pkcs11Uri };
}

/** Parses back to an equal value. */
export function formatPkcs11Uri(uri: Pkcs11Uri): string {
  const parts = Object.keys(bytesMax)
    .filter(isAttribute)
    .flatMap((name) => (uri[name] === undefined ? [] : [`${name}=${encode(name, uri[name])}`]));
  return `pkcs11:${parts.join(';')}`;
}

/** A URI with anything like a PIN in it is never shown. */
function refuse(fault: Fault, text: string): { readonly fault: Fault } {
  return {
    fault: /pin/i.test(text) ? { found: 'a URI that is not shown because it may hold a PIN', ...fault } : fault,
  };
}

function queryFault(query: string): Fault {
  if (/pin-/i.test(query)) {
    return {
      code: 'config_secret',
      expected: 'a URI without pin-value and pin-source',
      hint: 'say where the PIN is kept with the key "pin" of the token; if a PIN stood here, change it',
    };
  }
  return { expected: 'a URI without a query', hint: 'name the module with the key "module" of the token' };
}

function unknownFault(name: string): Fault {
  if (/^pin-/i.test(name)) return queryFault(name);
  const expected = 'only the attributes token, manufacturer, model, serial, object, id and type';
  return /^(?:slot|library)-/.test(name)
    ? { expected, hint: 'slot numbers and library versions change; name the token by label and serial' }
    : { expected };
}

function isAttribute(name: string): name is Attribute {
  return Object.hasOwn(bytesMax, name);
}

function parseValue(name: Attribute, raw: string): Parsed<string> {
  // RFC 7512 2.3: pk11-pchar, that is unreserved, pk11-path-res-avail, "&" or a percent-encoded byte.
  const illegal = /%(?![0-9A-Fa-f]{2})|[^A-Za-z0-9\-._~:[\]@!$'()*+,=&%]/u.exec(raw)?.[0];
  if (illegal !== undefined) {
    return {
      fault: {
        expected: `${name} with every special character as %XX`,
        hint: `write "${illegal}" as ${percent(Buffer.from(illegal))}`,
      },
    };
  }
  const bytes = Buffer.from(
    raw.replaceAll(/%(..)/g, (_, hex: string) => String.fromCharCode(Number.parseInt(hex, 16))),
    'latin1',
  );
  if (name === 'id') return lengthChecked(name, bytes.toString('hex'), bytes.length);

  const text = bytes.toString('utf8').replace(/ +$/, '');
  if (!Buffer.from(bytes.toString('utf8')).equals(bytes) || text.includes('\0')) {
    return { fault: { expected: `${name} in UTF-8 without zero bytes` } };
  }
  if (name === 'type' && !objectTypes.includes(text))
    return { fault: { expected: `type to be one of ${objectTypes.join(', ')}` } };
  return lengthChecked(name, text, Buffer.byteLength(text));
}

function lengthChecked(name: Attribute, value: string, length: number): Parsed<string> {
  if (length >= 1 && length <= bytesMax[name]) return { value };
  return { fault: { expected: `${name} with 1 to ${bytesMax[name]} bytes` } };
}

function encode(name: Attribute, value: string): string {
  if (name === 'id') return percent(Buffer.from(value, 'hex'));
  return value.replaceAll(/[^A-Za-z0-9\-._~]+/gu, (special) => percent(Buffer.from(special)));
}

function percent(bytes: Buffer): string {
  return bytes.toString('hex').replaceAll(/../g, (hex) => `%${hex.toUpperCase()}`);
}
