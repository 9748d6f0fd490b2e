/**
 * Owns: saying what each listener and upstream negotiates: versions, cipher suites, groups, tickets, which certificate signs with what.
 * Must not know: how a policy was made.
 * Runs: on the main thread of a command.
 */
import type { ClientCertificatesConfig, Config, PolicyConfig, SignatureScheme } from '../config/config.ts';
import { cipherSuiteVersion, isSchemeOf, versionsOf } from '../config/policies.ts';
import { formatDuration } from '../config/units.ts';
import { ConfigError, formatProblem } from '../errors.ts';
import type { KeyAlgorithm } from '../pkcs11/algorithm.ts';
import type { Finding } from '../pkcs11/plan.ts';
import { policyUses, unusableCertificates, usableSchemes } from '../worker/effective-policy.ts';
import type { PolicyUse } from '../worker/effective-policy.ts';

/** For programs; the findings say the same to people. */
export type EffectivePolicy = Common | (Common & OfListener);

/** What upstreams have no use for: a client's order is its own, and it issues no tickets. */
type OfListener = Pick<PolicyConfig, 'cipherOrder' | 'tickets' | 'ticketLifetimeMs'> & {
  /** Its own, or its policy's. */
  readonly clientCertificates: ClientCertificatesConfig | undefined;
};

interface Common extends Omit<PolicyConfig, 'name' | keyof OfListener> {
  readonly subject: string;
  readonly policy: string;
  /** By name and version, what each signs with. */
  readonly certificates: Readonly<Record<string, Readonly<Record<string, readonly SignatureScheme[]>>>>;
}

/** @param keys of the certificates that could be read */
export function explainPolicies(
  config: Config,
  keys: ReadonlyMap<string, KeyAlgorithm>,
): { readonly findings: readonly Finding[]; readonly policies: readonly EffectivePolicy[] } {
  const uses = policyUses(config).map((use) => ({ use, certificates: schemesOf(use, keys) }));
  return {
    findings: [
      ...uses.flatMap(({ use, certificates }) => [
        ...describe(use, certificates),
        ...warnings(use, keys).map((message): Finding => ({ severity: 'warning', subject: use.subject, message })),
      ]),
      ...unusableCertificates(config, keys).map(({ subject, ...problem }): Finding => {
        return { severity: 'error', subject, message: formatProblem(problem), error: new ConfigError([problem]) };
      }),
    ],
    policies: uses.map(({ use: { kind, subject, policy, clientCertificates }, certificates }) => {
      const { name, cipherOrder, tickets, ticketLifetimeMs, clientCertificates: _, ...settings } = policy;
      const common = { subject, policy: name, ...settings, certificates };
      return kind === 'upstream' ? common : { ...common, cipherOrder, tickets, ticketLifetimeMs, clientCertificates };
    }),
  };
}

function schemesOf({ policy, certificates }: PolicyUse, keys: ReadonlyMap<string, KeyAlgorithm>) {
  return Object.fromEntries(
    certificates.flatMap((name) => {
      const key = keys.get(name);
      if (key === undefined) return [];
      return [[name, Object.fromEntries(versionsOf(policy).map((it) => [it, usableSchemes(policy, key, it)]))]];
    }),
  );
}

function describe(
  { kind, subject, policy, clientCertificates }: PolicyUse,
  certificates: EffectivePolicy['certificates'],
): Finding[] {
  const versions = versionsOf(policy);
  const isListener = kind === 'listener';
  const parts = [`TLS ${versions.toReversed().join(' and ')}`];
  // A client's order is its own.
  if (isListener) parts.push(`the ${policy.cipherOrder}'s order of cipher suites`);
  if (isListener)
    parts.push(
      policy.tickets ? `session tickets for ${formatDuration(policy.ticketLifetimeMs)}` : 'no session tickets',
    );
  if (policy.extendedMasterSecret === 'required' && versions.includes('1.2'))
    parts.push('extended master secret required');
  if (clientCertificates !== undefined) parts.push(`client certificates: ${clientCertificates.mode}`);
  if (policy.fips) parts.push('FIPS 140-3');
  const suites = versions.map((version) => {
    const words = policy.cipherSuites.filter((suite) => cipherSuiteVersion(suite) === version);
    return `TLS ${version}: ${words.join(' ')}`;
  });
  // Of servers every scheme is accepted that the policy has; ours sign with what their keys can.
  const accepted = policy.signatureSchemes.filter((scheme) => versions.some((version) => isSchemeOf(scheme, version)));
  const lines = [
    `policy ${policy.name}: ${parts.join(', ')}`,
    ...suites,
    `groups: ${policy.groups.join(' ')}`,
    ...(isListener ? [] : [`servers sign with: ${accepted.join(' ')}`]),
    ...Object.entries(certificates).flatMap(([name, byVersion]) => {
      const schemes = [...new Set(Object.values(byVersion).flat())];
      return schemes.length === 0 ? [] : [`certificate ${name} signs with: ${schemes.join(' ')}`];
    }),
  ];
  return lines.map((message) => ({ severity: 'ok', subject, message }));
}

function warnings({ kind, policy, certificates }: PolicyUse, keys: ReadonlyMap<string, KeyAlgorithm>): string[] {
  const known = certificates.flatMap((name) => {
    const key = keys.get(name);
    return key === undefined
      ? []
      : [{ name, key, schemes: (version: '1.2' | '1.3') => usableSchemes(policy, key, version) }];
  });
  const versions = versionsOf(policy);
  const found = known.flatMap(({ name, schemes }) => {
    const unusable = versions.filter((version) => schemes(version).length === 0);
    // In none: an error.
    if (unusable.length === 0 || unusable.length === versions.length) return [];
    return [
      `certificate ${name} cannot be used in TLS ${unusable.join(' and ')} with the cipher suites and signature schemes of policy ${policy.name}`,
    ];
  });
  if (kind === 'upstream' || known.length === 0) return found;
  if (known.every(({ key }) => key === 'ed25519')) {
    found.push(
      'every certificate is of kind ed25519, which no browser accepts: add one of kind p256 for the same names',
    );
  }
  if (versions.includes('1.2') && known.every(({ key }) => key === 'rsa')) {
    const pkcs1 = known.some(({ schemes }) => schemes('1.2').some((scheme) => scheme.startsWith('rsa_pkcs1')));
    const old = pkcs1 ? ', and clients of TLS 1.2 may have it sign with PKCS #1 v1.5' : '';
    found.push(
      `TLS 1.2 with RSA keys only: the cipher suites for ECDSA are never used${old}; add a certificate of kind p256 for the same names`,
    );
  }
  return found;
}
