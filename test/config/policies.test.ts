/**
 * Owns: the built-in policies, and what comes of a policy that is made from another.
 * Must not know: where policies are used.
 * Runs: in a test process; no file.
 */
import assert from 'node:assert/strict';
import { it } from 'node:test';
import { groups } from '../../src/config/config.ts';
import { parseConfig } from '../../src/config/load.ts';

/** Of https://ssl-config.mozilla.org/guidelines/6.0.json what is about the server's side of TLS. */
const mozilla = {
  modern: { versions: ['1.3', '1.3'], suites12: [] },
  intermediate: {
    versions: ['1.2', '1.3'],
    suites12: [
      'TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256',
      'TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256',
      'TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384',
      'TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384',
      'TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256',
      'TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256',
    ],
  },
} as const;

for (const [name, { versions, suites12 }] of Object.entries(mozilla)) {
  it(`the policy ${name} has the versions, cipher suites, groups and order of Mozilla's guidelines`, () => {
    const policy = policies('{}')[name];
    assert.deepEqual([policy?.minVersion, policy?.maxVersion], versions);
    const suites13 = ['TLS_AES_128_GCM_SHA256', 'TLS_AES_256_GCM_SHA384', 'TLS_CHACHA20_POLY1305_SHA256'];
    assert.deepEqual(policy?.cipherSuites, [...suites13, ...suites12]);
    assert.equal(policy.cipherOrder, 'client');
    assert.deepEqual(policy.groups, ['X25519MLKEM768', 'X25519', 'secp256r1', 'secp384r1']);
  });
}

it('the policy fips has neither ChaCha20 nor X25519 alone nor EdDSA, and wants extended master secrets', () => {
  const { fips } = policies('{}');
  assert.ok(fips?.fips);
  assert.deepEqual(fips.groups, ['X25519MLKEM768', 'secp256r1', 'secp384r1']);
  assert.ok(!fips.cipherSuites.some((suite) => suite.includes('CHACHA20')));
  assert.ok(!fips.signatureSchemes.some((scheme) => scheme.startsWith('ed') || scheme.startsWith('mldsa')));
  assert.equal(fips.extendedMasterSecret, 'required');
});

it('a policy is like its base but for what it names, and without a base like intermediate', () => {
  const { intermediate, plain, child } = policies(
    '{ child: { base: plain, tickets: false }, plain: { groups: [secp384r1], cipherOrder: server } }',
  );
  assert.deepEqual(plain, { ...intermediate, name: 'plain', groups: ['secp384r1'], cipherOrder: 'server' });
  assert.deepEqual(child, { ...plain, name: 'child', tickets: false });
});

it('a policy has those cipher suites of its base that its versions can use', () => {
  const { old, recent } = policies('{ old: { maxVersion: 1.2 }, recent: { minVersion: 1.3 } }');
  assert.deepEqual(old?.cipherSuites, mozilla.intermediate.suites12);
  assert.equal(recent?.cipherSuites.length, 3);
});

it('tickets live as long as tickets.lifetime says, unless the policy or its base says less', () => {
  const made = '{ brief: { ticketLifetime: 5m }, briefToo: { base: brief, groups: [X25519] } }';
  const { modern, brief, briefToo } = policies(made, 'tickets: { lifetime: 1h }');
  assert.deepEqual(
    [modern, brief, briefToo].map((policy) => policy?.ticketLifetimeMs),
    [3_600_000, 300_000, 300_000],
  );
});

it('what is made from fips is of FIPS too', () => {
  const { approved } = policies('{ approved: { base: fips, minVersion: 1.3, groups: [secp384r1] } }');
  assert.ok(approved?.fips);
  assert.equal(approved.cipherSuites.length, 2);
});

it('a long chain of bases costs neither the stack nor minutes', () => {
  const count = 20_000;
  const chain = Array.from({ length: count }, (_, index) => `p${index}: { base: p${index + 1} }`);
  const last = policies(`{ ${chain.join(', ')}, p${count}: { groups: [X25519] } }`)['p0'];
  assert.deepEqual(last?.groups, groups.slice(1, 2));
});

function policies(yaml: string, more = '') {
  const text = `
tokens: { a: { module: /m.so, uri: "pkcs11:token=a", pin: { file: pin } } }
certificates: { www: { chain: www.pem, key: "pkcs11:object=www" } }
upstreams: { web: { servers: ["10.0.0.1:80"] } }
listeners: { https: { bind: ["0.0.0.0:443"], certificates: [www], upstream: web } }
policies: ${yaml}
${more}`;
  return parseConfig(text, '/k.yaml').policies;
}
