/**
 * Owns: reading the certificates of authorities that peers are trusted by.
 * Must not know: who is verified with them.
 * Runs: main thread of a worker, at a start or a reload, and of `keygate check`.
 */
import { X509Certificate } from 'node:crypto';
import { readFileSync } from 'node:fs';
import { getCACertificates } from 'node:tls';
import { ConfigError } from '../errors.ts';

const bytesMax = 4 * 1024 * 1024;

/**
 * @param path of a PEM file; undefined: the roots of this host.
 * @param configFile that names it.
 * @param key of the configuration, for the fault.
 * @returns certificates in DER, at least one.
 * @throws ConfigError `config_certificate`
 */
export function readRoots(path: string | undefined, configFile: string, key = 'tls.roots'): Buffer[] {
  const pems = path === undefined ? getCACertificates('system') : pemBlocks(path, configFile, key);
  const roots = pems.flatMap((pem) => {
    try {
      return [Buffer.from(new X509Certificate(pem).raw)];
    } catch {
      return []; // one of hundreds of the host that this OpenSSL cannot read
    }
  });
  if (roots.length > 0 && (path === undefined || roots.length === pems.length)) return roots;
  throw fault(path, configFile, key, `${pems.length} certificates, ${roots.length} of which can be read`);
}

/** As Node's TLS wants them. */
export function pemOf(der: Buffer): string {
  return new X509Certificate(der).toString();
}

function pemBlocks(path: string, configFile: string, key: string): string[] {
  try {
    const text = readFileSync(path, 'latin1');
    if (text.length > bytesMax) throw new Error(`more than ${bytesMax} bytes`);
    return text.match(/-----BEGIN CERTIFICATE-----[^-]+-----END CERTIFICATE-----/g) ?? [];
  } catch (error) {
    throw fault(path, configFile, key, (error as NodeJS.ErrnoException).code ?? String(error));
  }
}

function fault(path: string | undefined, configFile: string, key: string, found: string): ConfigError {
  return new ConfigError([
    {
      file: path ?? configFile,
      path: key,
      code: 'config_certificate',
      found,
      expected: path === undefined ? 'trusted certificates of this host' : 'a PEM file of trusted certificates',
      ...(path === undefined ? { hint: 'install ca-certificates, or name a file in tls.roots' } : {}),
    },
  ]);
}
