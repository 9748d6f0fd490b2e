/**
 * Owns: the TLS policies that every configuration has.
 * Must not know: what a listener is.
 * Runs: everywhere; constants.
 */
import { cipherSuites, groups, type CipherSuite, type PolicyConfig, type TlsVersion } from './config.ts';

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
