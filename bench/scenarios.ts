/**
 * Owns: what is measured, one row each.
 * Must not know: who is measured, or how.
 * Runs: in the benchmark's process.
 */

export const keyKinds = ['p256', 'rsa2048'] as const;
export type KeyKind = (typeof keyKinds)[number];

export interface Scenario {
  readonly name: string;
  readonly title: string;
  readonly key: KeyKind;
  readonly tls: '1.2' | '1.3';
  readonly resume: boolean;
  /** Session tickets that a server gives in each handshake. */
  readonly tickets: 0 | 1;
  /** The most that keygate's CPU per handshake may be of another contender's. */
  readonly goals: readonly { readonly against: string; readonly cpuRatioMax: number }[];
}

/** Each connection is: connect, handshake, connect to the upstream, one line there and back, close. */
export const scenarios: readonly Scenario[] = [
  {
    name: 'p256-full',
    title: 'full TLS 1.3 handshake, EC P-256',
    key: 'p256',
    tls: '1.3',
    resume: false,
    tickets: 0,
    goals: [{ against: 'nginx-softhsm', cpuRatioMax: 0.65 }],
  },
  {
    name: 'rsa2048-full',
    title: 'full TLS 1.3 handshake, RSA-2048',
    key: 'rsa2048',
    tls: '1.3',
    resume: false,
    tickets: 0,
    goals: [{ against: 'nginx-softhsm', cpuRatioMax: 0.9 }],
  },
  {
    name: 'p256-resumed',
    title: 'resumed TLS 1.3 handshake',
    key: 'p256',
    tls: '1.3',
    resume: true,
    tickets: 1,
    goals: [{ against: 'haproxy-file', cpuRatioMax: 0.65 }],
  },
  {
    name: 'p256-full-tls12',
    title: 'full TLS 1.2 handshake, EC P-256',
    key: 'p256',
    tls: '1.2',
    resume: false,
    tickets: 0,
    goals: [],
  },
];

/** What every contender is told to negotiate, and what the load finds in every handshake. */
export const negotiation = {
  group: 'X25519',
  suites: {
    '1.3': { iana: 'TLS_AES_128_GCM_SHA256', openssl: 'TLS_AES_128_GCM_SHA256' },
    '1.2': {
      p256: { iana: 'TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256', openssl: 'ECDHE-ECDSA-AES128-GCM-SHA256' },
      rsa2048: { iana: 'TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256', openssl: 'ECDHE-RSA-AES128-GCM-SHA256' },
    },
  },
} as const;

export function suiteOf(scenario: Scenario): { readonly iana: string; readonly openssl: string } {
  return scenario.tls === '1.3' ? negotiation.suites['1.3'] : negotiation.suites['1.2'][scenario.key];
}
