/**
 * Owns: reading lists of revoked certificates (RFC 5280 5) from their files, PEM or DER.
 * Must not know: who is verified with them.
 * Runs: main thread of a worker, at a start or a reload, and of `keygate check`.
 */
import { readFileSync } from 'node:fs';
import { accessHint } from '../config/access.ts';
import { engine } from '../engine/binding.ts';
import { ConfigError } from '../errors.ts';

/** Those of large public CAs have some megabytes. */
const bytesMax = 64 * 1024 * 1024;

/**
 * @param key of the configuration, for the fault.
 * @returns DER, in the order of the files.
 * @throws ConfigError `config_certificate`
 */
export function readRevocationLists(files: readonly string[], key = 'tls.crls'): Buffer[] {
  return files.flatMap((file) => {
    const lists = listsIn(read(file, key), file, key);
    if (lists.length === 0) throw fault(file, key, 'no list');
    for (const der of lists) {
      const why = engine().revocationListFault(der);
      if (why !== null) throw fault(file, key, `one that cannot be used (${why})`);
    }
    return lists;
  });
}

function listsIn(bytes: Buffer, file: string, key: string): Buffer[] {
  if (bytes[0] === 0x30) return [bytes];
  const blocks = bytes.toString('latin1').matchAll(/-----BEGIN X509 CRL-----([^-]+)-----END X509 CRL-----/g);
  return [...blocks].map(([, base64 = '']) => {
    const der = Buffer.from(base64, 'base64');
    if (der.length === 0) throw fault(file, key, 'an empty PEM block');
    return der;
  });
}

function read(file: string, key: string): Buffer {
  let bytes: Buffer;
  try {
    bytes = readFileSync(file);
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException;
    throw fault(file, key, code ?? String(error), accessHint(code).hint);
  }
  if (bytes.length > bytesMax) throw fault(file, key, `more than ${bytesMax} bytes`);
  return bytes;
}

function fault(file: string, key: string, found: string, hint?: string): ConfigError {
  const expected = 'a list of revoked certificates, PEM or DER';
  return new ConfigError([
    { file, path: key, code: 'config_certificate', found, expected, ...(hint === undefined ? {} : { hint }) },
  ]);
}
