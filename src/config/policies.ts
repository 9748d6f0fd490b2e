/**
 * Owns: the TLS policies that every configuration has, and what a listener has from its policy.
 * Must not know: what the engine makes of a policy.
 * Runs: everywhere; pure.
 */
import { cipherSuites, groups } from './config.ts';
import type {
  CipherSuite,
  ClientCertificatesConfig,
  Config,
  ListenerConfig,
  PolicyConfig,
  TlsVersion,
} from './config.ts';

export const builtInPolicies: readonly PolicyConfig[] = [
  {
    name: 'modern',
    minVersion: '1.3',
    maxVersion: '1.3',
    groups,
    cipherSuites: cipherSuitesOf('1.3', '1.3'),
    tickets: true,
    clientCertificates: undefined,
  },
  {
    name: 'intermediate',
    minVersion: '1.2',
    maxVersion: '1.3',
    groups,
    cipherSuites: cipherSuitesOf('1.2', '1.3'),
    tickets: true,
    clientCertificates: undefined,
  },
];

/** What clients of a listener are asked for: its own word counts, then its policy's. */
export function clientCertificatesOf(
  { clientCertificates, policy }: Pick<ListenerConfig, 'clientCertificates' | 'policy'>,
  policies: Config['policies'],
): ClientCertificatesConfig | undefined {
  return clientCertificates ?? policies[policy]?.clientCertificates;
}

/** Every cipher suite that a range of versions can use, preferred first. */
export function cipherSuitesOf(minVersion: TlsVersion, maxVersion: TlsVersion): readonly CipherSuite[] {
  return cipherSuites.filter((suite) => {
    const version = cipherSuiteVersion(suite);
    return minVersion <= version && version <= maxVersion;
  });
}

/** TLS 1.3 suites name no key exchange (RFC 8446 B.4). */
export function cipherSuiteVersion(suite: string): TlsVersion {
  return suite.includes('_WITH_') ? '1.2' : '1.3';
}
