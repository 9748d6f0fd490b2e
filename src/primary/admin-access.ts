/**
 * Owns: who may ask the admin server for what: by token, by Host, by Origin; and how often somebody may guess.
 * Must not know: what is asked for and how it is answered; certificates of clients, which TLS has looked at before.
 * Runs: main thread of the primary.
 */
import { createHash, timingSafeEqual } from 'node:crypto';
import type { IncomingMessage } from 'node:http';
import { isIPv6, SocketAddress } from 'node:net';
import type { TcpAddress, UnixAddress } from '../config/config.ts';
import type { Log } from '../log.ts';

/** Wrong tokens that one address may send within a window; then its tokens are not looked at until the window ends. */
const failuresMax = 10;
const failureWindowMs = 10_000;
/** Who has more addresses than this to guess from gets forgotten in the order in which they came. */
const addressesMax = 1024;

/** Why a request is not answered, with what. */
export interface Refusal {
  readonly status: 401 | 403 | 421 | 429;
  readonly line: string;
  readonly headers?: Readonly<Record<string, string>>;
}

/**
 * `known`: whoever asks may have everything. `unknown`: a token is needed and none came, which is enough for what is
 * public.
 */
export type Access = 'known' | 'unknown' | Refusal;

export interface AccessRules {
  readonly listen: TcpAddress | UnixAddress;
  /** Of HTTPS. */
  readonly isEncrypted: boolean;
  /** Whether TLS has asked for a certificate. */
  readonly needsCertificate: boolean;
}

export class AdminAccess {
  readonly #rules: AccessRules;
  readonly #log: Log;
  readonly #isOwnName: (host: string | undefined) => boolean;
  readonly #failures = new Map<string, { readonly since: number; count: number }>();
  #tokenHash: Buffer | undefined;

  constructor(rules: AccessRules, tokenHash: Buffer | undefined, log: Log) {
    this.#rules = rules;
    this.#tokenHash = tokenHash;
    this.#log = log;
    this.#isOwnName = 'path' in rules.listen ? () => true : localNames(rules.listen.host);
  }

  /** From now on this one is right, and the former is not. */
  expect(tokenHash: Buffer | undefined): void {
    this.#tokenHash = tokenHash;
  }

  of(request: IncomingMessage): Access {
    if (this.#tokenHash !== undefined) return this.#byToken(request, this.#tokenHash);
    // A page under a rebound name cannot show the certificate that TLS asks for: the browser does not trust ours for its name.
    if (this.#rules.needsCertificate || this.#isOwnName(request.headers.host)) return 'known';
    return {
      status: 421,
      line: 'the Host header must be the address that the admin server listens on, or localhost',
    };
  }

  /**
   * A form on another site can POST here, but not with a header of its own choice: for that the browser first asks for
   * permission (OPTIONS), which is never given. Origin is checked as well, for pages of other servers on this host.
   */
  crossSiteRefusal({ headers }: IncomingMessage): Refusal | undefined {
    if (headers['x-keygate'] === undefined) {
      const line =
        "the header x-keygate is missing: curl -X POST -H 'x-keygate: 1'; it keeps web pages of other sites out";
      return { status: 403, line };
    }
    const own = `${this.#rules.isEncrypted ? 'https' : 'http'}://${headers.host}`;
    if (headers.origin === undefined || headers.origin === own) return undefined;
    return { status: 403, line: 'requests from other sites are refused' };
  }

  /** A page under a rebound name does not have the token, so Host may be any name. */
  #byToken(request: IncomingMessage, expected: Buffer): Access {
    const { authorization } = request.headers;
    if (authorization === undefined) return 'unknown';
    const from = sourceOf(request);
    const failures = this.#failures.get(from);
    const ageMs = failures === undefined ? Infinity : performance.now() - failures.since;
    if (failures !== undefined && ageMs < failureWindowMs && failures.count >= failuresMax) {
      const seconds = Math.ceil((failureWindowMs - ageMs) / 1000);
      return {
        status: 429,
        line: `too many wrong tokens came from this address; try again in ${seconds} s`,
        headers: { 'retry-after': String(seconds) },
      };
    }
    const token = /^Bearer +([^ ]+) *$/i.exec(authorization)?.[1];
    if (token !== undefined && timingSafeEqual(createHash('sha256').update(token).digest(), expected)) return 'known';
    this.#count(from, ageMs < failureWindowMs);
    return {
      status: 401,
      line: 'this is not the token of `admin.token`',
      headers: { 'www-authenticate': 'Bearer realm="keygate", error="invalid_token"' },
    };
  }

  #count(from: string, isSameWindow: boolean): void {
    const known = this.#failures.get(from);
    if (known !== undefined && isSameWindow) {
      known.count += 1;
      return;
    }
    // Also when it is known: the order is that of the windows.
    this.#failures.delete(from);
    const [oldest] = this.#failures.keys();
    if (this.#failures.size >= addressesMax && oldest !== undefined) this.#failures.delete(oldest);
    this.#failures.set(from, { since: performance.now(), count: 1 });
    // Once per window: a log that a stranger can fill is no good.
    this.#log.warn({ event: 'admin_token_refused', from }, 'a request to the admin server came with a wrong token');
  }
}

export const tokenMissing: Refusal = {
  status: 401,
  line: "a token is needed: curl -H 'authorization: Bearer TOKEN'",
  headers: { 'www-authenticate': 'Bearer realm="keygate"' },
};

/** Who has one IPv6 address has 2^64 of them. */
function sourceOf({ socket }: IncomingMessage): string {
  const { remoteAddress } = socket;
  if (remoteAddress === undefined || remoteAddress === '') return 'unix';
  if (!isIPv6(remoteAddress) || remoteAddress.startsWith('::ffff:')) return remoteAddress;
  return networkOf(remoteAddress);
}

function networkOf(address: string): string {
  const { address: canonical } = new SocketAddress({ address: address.split('%', 1)[0] ?? address, family: 'ipv6' });
  const [head = '', tail] = canonical.split('::');
  const groups = (part: string | undefined) => (part === undefined || part === '' ? [] : part.split(':'));
  const [left, right] = [groups(head), groups(tail)];
  const all = [...left, ...Array.from({ length: 8 - left.length - right.length }, () => '0'), ...right];
  return `${all.slice(0, 4).join(':')}::/64`;
}

/**
 * A page of another site can make a browser connect here under that site's own name (DNS rebinding), and the Host header
 * tells. Addresses cannot be rebound. The port is not compared: through a forwarded port it is another one.
 */
function localNames(host: string): (found: string | undefined) => boolean {
  const names = new Set(['localhost', '127.0.0.1', '[::1]', host.includes(':') ? `[${host}]` : host]);
  return (found) => found !== undefined && names.has(found.replace(/:[0-9]*$/, '').toLowerCase());
}
