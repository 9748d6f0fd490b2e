/**
 * Owns: what every contender is told to negotiate, and what the load must find in every handshake.
 * Must not know: who negotiates.
 * Runs: anywhere.
 */
import type { Setting } from './scenarios.ts';

export interface Suite {
  readonly iana: string;
  readonly openssl: string;
}

/** AES-128-GCM everywhere: the cheapest that all of them have. */
export function suiteOf({ tls, key }: Pick<Setting, 'tls' | 'key'>): Suite {
  if (tls === '1.3') return { iana: 'TLS_AES_128_GCM_SHA256', openssl: 'TLS_AES_128_GCM_SHA256' };
  // Ed25519 goes with the ECDSA suites, RFC 8422 section 5.10.
  return key.startsWith('rsa')
    ? { iana: 'TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256', openssl: 'ECDHE-RSA-AES128-GCM-SHA256' }
    : { iana: 'TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256', openssl: 'ECDHE-ECDSA-AES128-GCM-SHA256' };
}
