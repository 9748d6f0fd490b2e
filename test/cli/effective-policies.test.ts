/**
 * Owns: what `keygate check` says of policies where they are used.
 * Must not know: tokens, how policies are made from one another.
 * Runs: in a test process; no file.
 */
import assert from 'node:assert/strict';
import { it } from 'node:test';
import { explainPolicies } from '../../src/cli/effective-policies.ts';
import { parseConfig } from '../../src/config/load.ts';
import type { KeyAlgorithm } from '../../src/pkcs11/algorithm.ts';

const config = parseConfig(
  `
tokens: { hsm: { module: /m.so, uri: "pkcs11:token=t", pin: { file: pin } } }
certificates:
  ec: { chain: ec.pem, key: "pkcs11:object=ec" }
  rsa: { chain: rsa.pem, key: "pkcs11:object=rsa" }
policies:
  mutual: { base: modern, clientCertificates: { roots: ca.pem } }
  ecOnly: { signatureSchemes: [ecdsa_secp256r1_sha256] }
upstreams: { web: { servers: ["10.0.0.1:443"], tls: { policy: modern, roots: ca.pem, name: a.test } } }
listeners:
  byPolicy: { mode: bridge, bind: ["127.0.0.1:1"], certificates: [ec], policy: mutual, upstream: web }
  byItself: { mode: bridge, bind: ["127.0.0.1:2"], certificates: [ec], policy: mutual, clientCertificates: { mode: request, roots: ca.pem }, upstream: web }
  old: { mode: bridge, bind: ["127.0.0.1:3"], certificates: [rsa], upstream: web }
  wrong: { mode: bridge, bind: ["127.0.0.1:4"], certificates: [ec, rsa], policy: ecOnly, upstream: web }
`,
  '/etc/keygate.yaml',
);
const keys = new Map<string, KeyAlgorithm>([
  ['ec', 'p256'],
  ['rsa', 'rsa'],
]);
const { findings, policies } = explainPolicies(config, keys);

const about = (subject: string) => policies.find((it) => it.subject === subject);
const messages = (subject: string, severity: string) =>
  findings.filter((it) => it.subject === subject && it.severity === severity).map(({ message }) => message);

it('a listener has the client certificates that it asks for, and not those of the policy that it overrides', () => {
  for (const [listener, mode] of [
    ['byPolicy', 'require'],
    ['byItself', 'request'],
  ] as const) {
    const policy = about(`listener ${listener}`);
    assert.ok(policy !== undefined && 'clientCertificates' in policy);
    assert.equal(policy.clientCertificates?.mode, mode);
    assert.match(messages(`listener ${listener}`, 'ok').join('\n'), new RegExp(`client certificates: ${mode}`));
  }
});

it('an upstream has nothing that only listeners have', () => {
  const policy = about('upstream web') ?? assert.fail('no word about it');
  assert.equal(policy.policy, 'modern');
  assert.deepEqual([policy.minVersion, policy.maxVersion], ['1.3', '1.3']);
  for (const key of ['tickets', 'ticketLifetimeMs', 'cipherOrder', 'clientCertificates'])
    assert.ok(!(key in policy), key);
});

it('what each certificate signs with is told by version', () => {
  assert.deepEqual(about('listener old')?.certificates['rsa']?.['1.3'], [
    'rsa_pss_rsae_sha256',
    'rsa_pss_rsae_sha384',
    'rsa_pss_rsae_sha512',
  ]);
  assert.ok(about('listener old')?.certificates['rsa']?.['1.2']?.includes('rsa_pkcs1_sha256'));
});

it('RSA alone is worth a warning, and a certificate that can sign nothing is an error at its place', () => {
  assert.match(messages('listener old', 'warning').join('\n'), /TLS 1\.2 with RSA keys only/);
  const errors = messages('listener wrong', 'error');
  assert.equal(errors.length, 1);
  assert.match(errors[0] ?? '', /listeners\.wrong\.certificates.*found rsa, of kind rsa/);
});
