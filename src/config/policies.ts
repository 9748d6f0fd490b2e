/**
 * Owns: the TLS policies that every configuration has, how one is made from another, and what a listener has from its policy.
 * Must not know: whether a policy makes sense (policy-faults.ts), what the engine makes of it.
 * Runs: everywhere; pure.
 */
import { cipherSuites, groups, signatureSchemes } from './config.ts';
import type {
  ClientCertificatesConfig,
  Config,
  ListenerConfig,
  PolicyConfig,
  SignatureScheme,
  TlsVersion,
} from './config.ts';
import type { ClientCertificatesDocument } from './schema.ts';

/** As it is written: where nothing is said of how long tickets live, `tickets.lifetime` says it. */
export type Policy = Omit<PolicyConfig, 'ticketLifetimeMs' | 'clientCertificates'> & {
  readonly ticketLifetimeMs: number | undefined;
  readonly clientCertificates: ClientCertificatesDocument | undefined;
};

/** Mozilla's, Server Side TLS 6.0. */
const intermediate: Policy = {
  name: 'intermediate',
  minVersion: '1.2',
  maxVersion: '1.3',
  groups,
  cipherSuites,
  cipherOrder: 'client',
  signatureSchemes,
  extendedMasterSecret: 'optional',
  tickets: true,
  ticketLifetimeMs: undefined,
  clientCertificates: undefined,
  fips: false,
};

/** What policies that are made from it must stay within. */
export const fipsPolicy = derivePolicy('fips', intermediate, {
  // SP 800-56A has no X25519; beside ML-KEM (FIPS 203), which comes first, it may stand (SP 800-56C rev. 2, 2).
  groups: groups.filter((group) => group !== 'X25519'),
  cipherSuites: cipherSuites.filter((suite) => !suite.includes('CHACHA20')),
  // Of FIPS 186-5, what every validated module and HSM has.
  signatureSchemes: signatureSchemes.filter((scheme) => /^(?:ecdsa|rsa)_/.test(scheme)),
  // FIPS 140-3 IG, D.Q.
  extendedMasterSecret: 'required',
  fips: true,
});

export const builtInPolicies: readonly Policy[] = [
  derivePolicy('modern', intermediate, { minVersion: '1.3' }),
  intermediate,
  fipsPolicy,
];

type Own = { readonly [Key in keyof Policy]?: Policy[Key] | undefined };

/** The policy that is like another but for what it names. Cipher suites of versions that it forbids are left out. */
export function derivePolicy(name: string, base: Policy, own: Own): Policy {
  const { minVersion = base.minVersion, maxVersion = base.maxVersion } = own;
  const inherited = base.cipherSuites.filter((suite) => {
    const version = cipherSuiteVersion(suite);
    return minVersion <= version && version <= maxVersion;
  });
  return {
    name,
    minVersion,
    maxVersion,
    groups: own.groups ?? base.groups,
    cipherSuites: own.cipherSuites ?? inherited,
    cipherOrder: own.cipherOrder ?? base.cipherOrder,
    signatureSchemes: own.signatureSchemes ?? base.signatureSchemes,
    extendedMasterSecret: own.extendedMasterSecret ?? base.extendedMasterSecret,
    tickets: own.tickets ?? base.tickets,
    ticketLifetimeMs: own.ticketLifetimeMs ?? base.ticketLifetimeMs,
    clientCertificates: own.clientCertificates ?? base.clientCertificates,
    fips: own.fips ?? base.fips,
  };
}

/** What clients of a listener are asked for: its own word counts, then its policy's. */
export function clientCertificatesOf(
  { clientCertificates, policy }: Pick<ListenerConfig, 'clientCertificates' | 'policy'>,
  policies: Config['policies'],
): ClientCertificatesConfig | undefined {
  return clientCertificates ?? policies[policy]?.clientCertificates;
}

/** TLS 1.3 suites name no key exchange (RFC 8446 B.4). */
export function cipherSuiteVersion(suite: string): TlsVersion {
  return suite.includes('_WITH_') ? '1.2' : '1.3';
}

/** TLS 1.3 has no PKCS #1 v1.5 (RFC 8446 4.2.3), TLS 1.2 no ML-DSA. */
export function isSchemeOf(scheme: SignatureScheme, version: TlsVersion): boolean {
  return version === '1.3' ? !scheme.startsWith('rsa_pkcs1') : !scheme.startsWith('mldsa');
}

/** Newest first. */
export function versionsOf({ minVersion, maxVersion }: Pick<PolicyConfig, 'minVersion' | 'maxVersion'>): TlsVersion[] {
  return (['1.3', '1.2'] as const).filter((version) => minVersion <= version && version <= maxVersion);
}
