/**
 * Owns: what a policy comes to where it is used: which certificate signs with what, and whether each can.
 * Must not know: tokens, the engine.
 * Runs: main thread of a worker before it serves, and of `keygate check`.
 */
import type { ClientCertificatesConfig, Config, PolicyConfig, SignatureScheme, TlsVersion } from '../config/config.ts';
import { clientCertificatesOf, isSchemeOf, versionsOf } from '../config/policies.ts';
import type { Problem } from '../errors.ts';
import type { KeyAlgorithm } from '../pkcs11/algorithm.ts';

/** Where TLS is spoken, and by which policy. */
export interface PolicyUse {
  readonly kind: 'listener' | 'upstream';
  /** `listener https`, `upstream web`. */
  readonly subject: string;
  /** Of the certificates, in the configuration. */
  readonly path: string;
  readonly policy: PolicyConfig;
  readonly certificates: readonly string[];
  /** What clients of a listener are asked for: by it, or by its policy. */
  readonly clientCertificates: ClientCertificatesConfig | undefined;
}

type Used = Pick<Config, 'file' | 'policies' | 'listeners' | 'upstreams'>;

export function policyUses(config: Used): PolicyUse[] {
  const listeners = Object.values(config.listeners).filter(({ mode }) => mode === 'offload' || mode === 'bridge');
  return [
    ...listeners.map((listener) => ({
      kind: 'listener' as const,
      subject: `listener ${listener.name}`,
      path: `listeners.${listener.name}.certificates`,
      policy: policyOf(listener.policy, config),
      certificates: listener.certificates,
      clientCertificates: clientCertificatesOf(listener, config.policies),
    })),
    ...Object.values(config.upstreams).flatMap(({ name, tls }) => {
      if (tls === undefined) return [];
      const certificates = tls.certificate === undefined ? [] : [tls.certificate];
      const path = `upstreams.${name}.tls.certificate`;
      const subject = `upstream ${name}`;
      const policy = policyOf(tls.policy, config);
      return [{ kind: 'upstream' as const, subject, path, policy, certificates, clientCertificates: undefined }];
    }),
  ];
}

export function policyOf(name: string, { policies }: Pick<Config, 'policies'>): PolicyConfig {
  const policy = policies[name];
  if (policy === undefined) throw new Error(`policy ${name} passed the configuration's checks and is not there`);
  return policy;
}

/** What a key of this kind signs with in this version, preferred first; empty where it can do nothing. */
export function usableSchemes(policy: PolicyConfig, key: KeyAlgorithm, version: TlsVersion): SignatureScheme[] {
  const schemes = policy.signatureSchemes.filter((it) => schemesOfKey[key].includes(it) && isSchemeOf(it, version));
  // Cipher suites of TLS 1.2 say what kind of key signs (RFC 8422 2: EdDSA counts as ECDSA).
  const kind = key === 'rsa' ? '_RSA_WITH_' : '_ECDSA_WITH_';
  const isSigned = version === '1.3' || policy.cipherSuites.some((suite) => suite.includes(kind));
  return isSigned ? schemes : [];
}

/** As in the engine, signing/public_key.rs: an EC key signs with the hash of its curve, and none of P-521 is served. */
const schemesOfKey: Readonly<Record<KeyAlgorithm, readonly SignatureScheme[]>> = {
  p256: ['ecdsa_secp256r1_sha256'],
  p384: ['ecdsa_secp384r1_sha384'],
  p521: [],
  ed25519: ['ed25519'],
  rsa: [
    'rsa_pss_rsae_sha256',
    'rsa_pss_rsae_sha384',
    'rsa_pss_rsae_sha512',
    'rsa_pkcs1_sha256',
    'rsa_pkcs1_sha384',
    'rsa_pkcs1_sha512',
  ],
};

/**
 * Certificates that their policy lets sign in no version: no client would ever get one.
 * @param keys by the certificate's name; those that are not there are somebody else's problem
 */
export function unusableCertificates(
  config: Used,
  keys: ReadonlyMap<string, KeyAlgorithm>,
): (Problem & { readonly subject: string })[] {
  return policyUses(config).flatMap(({ subject, path, policy, certificates }) =>
    certificates.flatMap((name) => {
      const key = keys.get(name);
      if (key === undefined) return [];
      if (versionsOf(policy).some((version) => usableSchemes(policy, key, version).length > 0)) return [];
      const expected = `a certificate whose key signs with what policy ${policy.name} allows: ${policy.signatureSchemes.join(', ')}`;
      const hint = 'the cipher suites of the policy count too: those of TLS 1.2 are for ECDSA or for RSA';
      const found = `${name}, of kind ${key}`;
      return [{ subject, file: config.file, path, code: 'config_conflict' as const, found, expected, hint }];
    }),
  );
}
