/**
 * Owns: what contenders that use OpenSSL have in common: what it cannot do, and openssl.cnf for what they have no words for.
 * Must not know: any of them.
 * Runs: in the benchmark's process.
 */
import { existsSync } from 'node:fs';
import type { Setting } from '../scenarios.ts';
import { filesOf, write } from './contender.ts';
import type { Need, Place } from './contender.ts';

const libraryDirectories = ['/usr/lib/x86_64-linux-gnu', '/usr/lib/aarch64-linux-gnu'];
const pkcs11Engines = libraryDirectories.map((directory) => `${directory}/engines-3/pkcs11.so`);

export const softHsmNeed: Need = { files: ['/usr/bin/softhsm2-util'], from: 'apt-get install softhsm2' };
export const pkcs11EngineNeed: Need = { files: pkcs11Engines, from: 'apt-get install libengine-pkcs11-openssl' };

/** @param version as in `OpenSSL 3.0.19`. */
export function cannotInOpenSsl(version: string, { group }: Setting): string | undefined {
  const [major = 0, minor = 0] = (version.match(/(\d+)\.(\d+)/) ?? []).slice(1).map(Number);
  const postQuantum = major > 3 || (major === 3 && minor >= 5);
  return group === 'X25519MLKEM768' && !postQuantum ? `${version} has no X25519MLKEM768` : undefined;
}

export function cannotWithFileKey({ tokenLatencyMs }: Setting): string | undefined {
  return tokenLatencyMs > 0 ? 'its key is in a file: there is no token that could be slow' : undefined;
}

/** @param version as in `0.4.12-0.1`. */
export function cannotInLibp11(version: string, { key }: Setting): string | undefined {
  return key === 'ed25519' ? `libp11 ${version} has no Ed25519` : undefined;
}

export function cannotServeMany({ certificates }: Setting): string | undefined {
  return certificates > 1 ? 'this benchmark configures many certificates for keygate and HAProxy only' : undefined;
}

/** Without a ticket, some give a TLS 1.2 session an identifier all the same, and the client comes back with it. */
export function cannotRefuseSessions({ tls, resume }: Setting): string | undefined {
  return tls === '1.2' && !resume ? 'it has no way not to offer the resumption of a TLS 1.2 session' : undefined;
}

/** A reload in them is a new set of processes, and CPU of processes that come and go is in no sum. */
export function cannotReload({ reload }: Setting): string | undefined {
  return reload ? 'its reload replaces its processes, which cannot be measured as one' : undefined;
}

/** As the engine wants the private key to be called. */
export function pkcs11Uri(place: Place): string {
  const { token, label } = filesOf(place);
  return `pkcs11:token=${token};object=${label};type=private`;
}

export interface OpenSslParts {
  /** The engine that signs with the token. */
  readonly engine?: boolean;
  /** What is true of every SSL_CTX, as in SSL_CONF_cmd(3). */
  readonly defaults?: readonly string[];
}

/** @returns what makes a program use it. */
export function opensslEnvironment(
  place: Place,
  { engine = false, defaults = [] }: OpenSslParts,
): { OPENSSL_CONF: string } {
  const file = write(place, 'openssl.cnf', [
    'openssl_conf = init',
    '[init]',
    ...(engine ? ['engines = engines'] : []),
    'ssl_conf = ssl',
    '[ssl]',
    'system_default = system',
    '[system]',
    ...defaults,
    '[engines]',
    'pkcs11 = pkcs11',
    '[pkcs11]',
    'engine_id = pkcs11',
    `dynamic_path = ${pkcs11Engines.find(existsSync) ?? ''}`,
    `MODULE_PATH = ${place.token.module}`,
    `PIN = ${place.token.pin}`,
    'init = 1',
  ]);
  return { OPENSSL_CONF: file };
}

/** One ticket in each handshake or none, for programs that have no word for the number of tickets. */
export function ticketDefaults({ resume }: Setting): readonly string[] {
  return resume ? ['NumTickets = 1', 'Options = SessionTicket'] : ['NumTickets = 0', 'Options = -SessionTicket'];
}
