/**
 * Owns: from a file to a configuration or to all of its problems, each at its place.
 * Must not know: how the loader does it.
 * Runs: node:test, with files in a private directory.
 */
import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { it, type TestContext } from 'node:test';
import * as fc from 'fast-check';
import { configBytesMax, loadConfig, parseConfig } from '../../src/config/load.ts';
import { ConfigError, formatProblem, type ErrorCode, type Problem } from '../../src/errors.ts';

const base = {
  tokens: '{ a: { module: /m.so, uri: "pkcs11:token=a", pin: { file: pin } } }',
  certificates: '{ www: { chain: www.pem, key: "pkcs11:object=www" } }',
  upstreams: '{ web: { servers: ["10.0.0.1:80"] } }',
  listeners: '{ https: { bind: ["0.0.0.0:443"], certificates: [www], upstream: web } }',
};

type Sections = Partial<Record<keyof typeof base | 'more' | 'policies', string>>;

it('defaults are filled in, units are in names, paths are absolute', () => {
  const config = parseConfig(document(), '/etc/keygate/keygate.yaml');
  assert.deepEqual(plain(config), {
    file: '/etc/keygate/keygate.yaml',
    workers: 'auto',
    drainDeadlineMs: 30_000,
    reloadDeadlineMs: 60_000,
    log: { level: 'info' },
    sandbox: { enabled: true, writable: [] },
    tokens: {
      a: {
        name: 'a',
        module: '/m.so',
        uri: { token: 'a' },
        pin: { file: '/etc/keygate/pin' },
        lanes: 8,
        weight: 1,
        queue: { max: 1024, ageMs: 3000 },
        signDeadlineMs: 5000,
        verify: { rsa: 'always', ec: 64 },
        isolate: true,
        loginLockWaitMs: 10_000,
      },
    },
    certificates: {
      www: { name: 'www', chain: '/etc/keygate/www.pem', key: { object: 'www' }, tokens: ['a'], ocsp: 'off' },
    },
    policies: {
      modern: { ...plain(config.policies['modern']), name: 'modern', minVersion: '1.3', maxVersion: '1.3' },
      intermediate: {
        ...plain(config.policies['intermediate']),
        name: 'intermediate',
        minVersion: '1.2',
        maxVersion: '1.3',
      },
      fips: { ...plain(config.policies['fips']), name: 'fips', minVersion: '1.2', maxVersion: '1.3' },
    },
    tickets: { lifetimeMs: 43_200_000, rotationMs: 43_200_000 },
    ocsp: { nonce: false, timeoutMs: 10_000 },
    upstreams: {
      web: {
        name: 'web',
        servers: [{ host: '10.0.0.1', port: 80 }],
        proxyClientCertificate: false,
        slowStartMs: 0,
        balance: 'round-robin',
        connectDeadlineMs: 5000,
        attempts: 3,
        passive: { failures: 3, ejectionMs: 10_000 },
        transparent: false,
      },
    },
    listeners: {
      https: {
        name: 'https',
        bind: [{ host: '0.0.0.0', port: 443 }],
        mode: 'offload',
        certificates: ['www'],
        unknownName: 'default',
        alpn: [],
        policy: 'intermediate',
        upstream: 'web',
        routes: [],
        transparent: false,
        deadlines: { handshakeMs: 10_000, idleMs: 300_000, lifetimeMs: 0, halfClosedMs: 60_000 },
        limits: { connections: 20_000, handshakes: 1024 },
        backlog: 4096,
      },
    },
  });
});

it('an access log has everything in it unless told otherwise, and log files are absolute', () => {
  const { log } = parseConfig(
    document({ more: 'log: { file: logs/k.log, access: {}, keyLog: k.keys }' }),
    '/etc/keygate/keygate.yaml',
  );
  assert.deepEqual(plain(log), {
    level: 'info',
    file: '/etc/keygate/logs/k.log',
    access: { sample: 1, failures: 'always', rate: 1000 },
    keyLog: '/etc/keygate/k.keys',
  });
});

it('what a module may write is a list of paths, relative to the file', () => {
  const text = document({ more: 'sandbox: { writable: [state, /dev/bus/usb] }' });
  assert.deepEqual(parseConfig(text, '/etc/keygate/keygate.yaml').sandbox, {
    enabled: true,
    writable: ['/etc/keygate/state', '/dev/bus/usb'],
  });
});

it('an admin server may be reachable from other hosts with a token or client certificates', () => {
  const listen = 'listen: "0.0.0.0:9180"';
  const tls = 'tls: { chain: admin.pem, key: admin-key.pem, clientCertificates: ca.pem }';
  const adminOf = (keys: string) => parseConfig(document({ more: `admin: { ${keys} }` }), '/etc/keygate/k.yaml').admin;
  assert.deepEqual(plain(adminOf(`${listen}, token: { file: token }`)), {
    listen: { host: '0.0.0.0', port: 9180 },
    token: { file: '/etc/keygate/token' },
  });
  assert.deepEqual(plain(adminOf(`${listen}, ${tls}`)), {
    listen: { host: '0.0.0.0', port: 9180 },
    tls: {
      chain: '/etc/keygate/admin.pem',
      key: '/etc/keygate/admin-key.pem',
      clientCertificates: '/etc/keygate/ca.pem',
    },
  });
  assert.deepEqual(adminOf('listen: "127.0.0.1:0", token: { credential: admin-token }')?.token, {
    credential: 'admin-token',
  });
});

it('the example that is shipped loads', () => {
  const file = join(import.meta.dirname, '../../native-config/keygate.yaml');
  const config = parseConfig(readFileSync(file, 'utf8'), file);
  assert.deepEqual(Object.keys(config.listeners), ['https']);
  assert.equal(config.upstreams['web']?.health?.intervalMs, 5000);
});

it('a name that every object has is an ordinary name, and no name is defined by accident', () => {
  const config = parseConfig(
    document({
      upstreams: '{ constructor: { servers: ["10.0.0.1:80"] } }',
      listeners: base.listeners.replace('web', 'constructor'),
    }),
    '/k.yaml',
  );
  assert.equal(config.listeners['https']?.upstream, 'constructor');
  assert.equal(config.tokens['toString'], undefined);
  const [problem] = problemsOf(document({ listeners: base.listeners.replace('web', 'toString') }));
  assert.equal(problem?.code, 'config_reference');
});

it('what was pasted where a path belongs is refused and not shown', () => {
  const admin = 'admin: { listen: "127.0.0.1:0", tls: { chain: a.pem, key: "-----BEGIN SECRET" } }';
  const [problem] = problemsOf(document({ more: admin }));
  assert.equal(problem?.path, 'admin.tls.key');
  assert.match(problem.hint ?? '', /replace it/);
  assert.doesNotMatch(JSON.stringify(problem), /SECRET/);
});

it('environment variables are substituted in paths, and only there', (test) => {
  process.env['KEYGATE_TEST_DIRECTORY'] = '/run/secrets';
  test.after(() => delete process.env['KEYGATE_TEST_DIRECTORY']);
  const config = parseConfig(
    document({ tokens: base.tokens.replace('file: pin', 'file: "${KEYGATE_TEST_DIRECTORY}/pin"') }),
    '/k.yaml',
  );
  assert.deepEqual(config.tokens['a']?.pin, { file: '/run/secrets/pin' });
  const [problem] = problemsOf(
    document({ listeners: base.listeners.replace('0.0.0.0:443', '${KEYGATE_TEST_DIRECTORY}:443') }),
  );
  assert.equal(problem?.path, 'listeners.https.bind[0]');
});

it('all problems are reported at once, in the order of the file', () => {
  const problems = problemsOf(
    [
      'workers: 0',
      'foo: 1',
      'tokens: { a: { module: /m.so, uri: "pkcs11:token=a", pin: { file: pin }, lanse: 3 } }',
      'certificates: { www: { chain: www.pem, key: "pkcs11:object=www", tokens: [b] } }',
      'upstreams: { web: { servers: ["a:0"] } }',
      'listeners: { https: { bind: ["0.0.0.0:443"], certificates: [www], upstream: wbe, policy: 5 } }',
    ].join('\n'),
  );
  assert.deepEqual(
    problems.map(({ line, path, code }) => [line, path, code]),
    [
      [1, 'workers', 'config_value'],
      [2, 'foo', 'config_unknown_key'],
      [3, 'tokens.a.lanse', 'config_unknown_key'],
      [4, 'certificates.www.tokens[0]', 'config_reference'],
      [5, 'upstreams.web.servers[0]', 'config_value'],
      [6, 'listeners.https.upstream', 'config_reference'],
      [6, 'listeners.https.policy', 'config_type'],
    ],
  );
});

it('a misspelt key or name comes with the one that was meant', () => {
  const [key] = problemsOf(document(token('uri: "pkcs11:token=a", pin: { file: pin }, isolte: true')));
  assert.match(key?.hint ?? '', /"isolate"/);
  const [name] = problemsOf(document({ listeners: base.listeners.replace('upstream: web', 'upstream: wbe') }));
  assert.match(name?.hint ?? '', /"web"/);
  const [policy] = problemsOf(document({ listeners: base.listeners.replace('upstream', 'policy: Modern, upstream') }));
  assert.match(policy?.hint ?? '', /"modern"/);
});

interface Placed {
  /** The mark stands where the problem must be. */
  readonly sections: Sections;
  readonly path: string;
  readonly code: ErrorCode;
  readonly expected?: RegExp;
  /** Paths of problems that follow from it. */
  readonly also?: readonly string[];
}

const token = (keys: string): Sections => ({ tokens: `{ a: { module: /m.so, ${keys} } }` });
const tokenUri = (uri: string): Sections => token(`uri: ${uri}, pin: { file: pin }`);
const tokenPin = (pin: string): Sections => token(`uri: "pkcs11:token=a", pin: ${pin}`);
const tokenLanes = (lanes: string): Sections => token(`uri: "pkcs11:token=a", pin: { file: pin }, lanes: ${lanes}`);
const certificate = (keys: string): Sections => ({ certificates: `{ www: { ${keys} } }` });
const upstream = (keys: string): Sections => ({ upstreams: `{ web: ${keys} }` });
/** Beside the one that listeners go to. */
const farUpstream = (keys: string): Sections => ({ upstreams: `{ web: { servers: ["a:1"] }, far: ${keys} }` });
const listener = (keys: string): Sections => ({ listeners: `{ https: { bind: ["0.0.0.0:443"], ${keys} } }` });
const policy = (keys: string): Sections => ({ more: `policies: { p: { ${keys} } }` });

const placed: Record<string, Placed> = {
  'a key given twice': { sections: { more: 'workers: 1\n▸workers: 2' }, path: 'workers', code: 'config_duplicate_key' },
  'a nested key given twice': {
    sections: upstream('{ servers: ["a:1"], attempts: 1, ▸attempts: 2 }'),
    path: 'upstreams.web.attempts',
    code: 'config_duplicate_key',
  },
  'the key __proto__': { sections: { more: '▸__proto__: {}' }, path: '__proto__', code: 'config_unknown_key' },
  'the name __proto__': {
    sections: { upstreams: '{ web: { servers: ["a:1"] }, ▸__proto__: { servers: ["a:1"] } }' },
    path: 'upstreams.__proto__',
    code: 'config_unknown_key',
  },
  'an unknown section': { sections: { more: '▸listener: {}' }, path: 'listener', code: 'config_unknown_key' },
  'an unknown key': {
    sections: upstream('{ servers: ["a:1"], ▸helth: 1 }'),
    path: 'upstreams.web.helth',
    code: 'config_unknown_key',
  },
  'a key that is absent': {
    sections: { upstreams: '{ ▸web: {} }' },
    path: 'upstreams.web.servers',
    code: 'config_missing_key',
  },
  'a value that is absent': { sections: { more: 'admin:▸' }, path: 'admin', code: 'config_type' },
  'an empty section': {
    sections: { upstreams: '▸{}' },
    path: 'upstreams',
    code: 'config_value',
    expected: /at least one/,
    also: ['listeners.https.upstream'],
  },
  'a list in the place of a mapping': {
    sections: { upstreams: '▸[web]' },
    path: 'upstreams',
    code: 'config_type',
    also: ['listeners.https.upstream'],
  },
  'a name that begins with a dash': {
    sections: { upstreams: '{ web: { servers: ["a:1"] }, ▸-x: { servers: ["a:1"] } }' },
    path: 'upstreams.-x',
    code: 'config_value',
  },
  'a duration without a unit': {
    sections: { more: 'drainDeadline: ▸30' },
    path: 'drainDeadline',
    code: 'config_type',
    expected: /such as/,
  },
  'a duration out of range': {
    sections: { more: 'drainDeadline: ▸25h' },
    path: 'drainDeadline',
    code: 'config_value',
    expected: /0ms to 1d/,
  },
  'a lifetime that does not fit into 32 bits of milliseconds': {
    sections: listener('certificates: [www], upstream: web, deadlines: { lifetime: ▸50d }'),
    path: 'listeners.https.deadlines.lifetime',
    code: 'config_value',
    expected: /1s to 49d, or none/,
  },
  'too few lanes': { sections: tokenLanes('▸0'), path: 'tokens.a.lanes', code: 'config_value', expected: /1 to 256/ },
  'too many lanes': { sections: tokenLanes('▸257'), path: 'tokens.a.lanes', code: 'config_value' },
  'half a lane': { sections: tokenLanes('▸1.5'), path: 'tokens.a.lanes', code: 'config_type' },
  'a token URI that names an object': {
    sections: tokenUri('▸"pkcs11:token=a;object=b"'),
    path: 'tokens.a.uri',
    code: 'config_value',
  },
  'a token URI without a label': {
    sections: tokenUri('▸"pkcs11:serial=1"'),
    path: 'tokens.a.uri',
    code: 'config_value',
  },
  'a key URI that names a token': {
    sections: certificate('chain: w, key: ▸"pkcs11:token=a;object=b"'),
    path: 'certificates.www.key',
    code: 'config_value',
  },
  'a key URI that names nothing': {
    sections: certificate('chain: w, key: ▸"pkcs11:type=private"'),
    path: 'certificates.www.key',
    code: 'config_value',
  },
  'a key URI of a public key': {
    sections: certificate('chain: w, key: ▸"pkcs11:object=b;type=public"'),
    path: 'certificates.www.key',
    code: 'config_value',
  },
  'a PIN in a URI': {
    sections: tokenUri('▸"pkcs11:token=a?pin-value=9876"'),
    path: 'tokens.a.uri',
    code: 'config_secret',
  },
  'a PIN in the place of its place': { sections: tokenPin('▸9876'), path: 'tokens.a.pin', code: 'config_type' },
  'two places of a PIN': { sections: tokenPin('▸{ file: pin, env: PIN }'), path: 'tokens.a.pin', code: 'config_value' },
  'no place of a PIN': { sections: tokenPin('▸{}'), path: 'tokens.a.pin', code: 'config_value' },
  'a credential outside of its directory': {
    sections: tokenPin('{ credential: ▸../pin }'),
    path: 'tokens.a.pin.credential',
    code: 'config_value',
  },
  'a variable that is not set': {
    sections: certificate('chain: ▸"${KEYGATE_TEST_UNSET}/w", key: "pkcs11:object=w"'),
    path: 'certificates.www.chain',
    code: 'config_value',
    expected: /KEYGATE_TEST_UNSET/,
  },
  'an upstream that is not defined': {
    sections: listener('certificates: [www], upstream: ▸api'),
    path: 'listeners.https.upstream',
    code: 'config_reference',
    expected: /web/,
  },
  'a policy that is not defined': {
    sections: listener('certificates: [www], upstream: web, policy: ▸old'),
    path: 'listeners.https.policy',
    code: 'config_reference',
    expected: /modern, intermediate/,
  },
  'a certificate that is not defined': {
    sections: listener('certificates: [www, ▸ftp], upstream: web'),
    path: 'listeners.https.certificates[1]',
    code: 'config_reference',
  },
  'a certificate named twice': {
    sections: listener('certificates: [www, ▸www], upstream: web'),
    path: 'listeners.https.certificates[1]',
    code: 'config_conflict',
  },
  'no certificate': {
    sections: listener('certificates: ▸[], upstream: web'),
    path: 'listeners.https.certificates',
    code: 'config_value',
  },
  'a server named twice': {
    sections: upstream('{ servers: ["a:1", ▸"a:1"] }'),
    path: 'upstreams.web.servers[1]',
    code: 'config_conflict',
  },
  'a token that is not defined': {
    sections: certificate('chain: w, key: "pkcs11:object=w", tokens: [▸b]'),
    path: 'certificates.www.tokens[0]',
    code: 'config_reference',
  },
  'fewer sessions than three for each worker': {
    sections: { tokens: base.tokens.replace('{ file: pin }', '{ file: pin }, sessions: ▸11'), more: 'workers: 4' },
    path: 'tokens.a.sessions',
    code: 'config_conflict',
    expected: /at least 12: 3 for each of 4 workers/,
  },
  'DANE without a resolver': {
    sections: farUpstream('{ servers: ["a.test:1"], tls: { dane: ▸enforce } }'),
    path: 'upstreams.far.tls.dane',
    code: 'config_reference',
    expected: /a section `dns`/,
  },
  'DANE for an address': {
    sections: {
      ...farUpstream('{ servers: ["a.test:1", ▸"10.0.0.1:1"], tls: { dane: report } }'),
      more: 'dns: { resolver: "127.0.0.1:53" }',
    },
    path: 'upstreams.far.servers[1]',
    code: 'config_conflict',
    expected: /addresses have no TLSA records/,
  },
  'DANE for a socket': {
    sections: {
      ...farUpstream('{ servers: [▸"unix:/run/a"], tls: { name: a.test, dane: report } }'),
      more: 'dns: { resolver: "127.0.0.1:53" }',
    },
    path: 'upstreams.far.servers[0]',
    code: 'config_conflict',
    expected: /TLSA records are about one/,
  },
  'transparency without a list of logs': {
    sections: farUpstream('{ servers: ["a.test:1"], tls: { transparency: ▸report } }'),
    path: 'upstreams.far.tls.transparency',
    code: 'config_reference',
    expected: /a section `transparency`/,
  },
  'a pin that is not one': {
    sections: farUpstream('{ servers: ["a.test:1"], tls: { pins: [▸"sha256/AAAA"] } }'),
    path: 'upstreams.far.tls.pins[0]',
    code: 'config_value',
    expected: /sha256\/ and 32 bytes/,
  },
  'a resolver that is not on this host': {
    sections: { more: 'dns: { resolver: ▸"192.0.2.53:53" }' },
    path: 'dns.resolver',
    code: 'config_value',
    expected: /a loopback address/,
  },
  'a resolver by name': {
    sections: { more: 'dns: { resolver: ▸"localhost:53" }' },
    path: 'dns.resolver',
    code: 'config_value',
    expected: /IP-ADDRESS:PORT/,
  },
  'more operators than SCTs': {
    sections: { more: 'transparency: { logs: l, scts: 1, operators: ▸2 }' },
    path: 'transparency.operators',
    code: 'config_conflict',
  },
  'an admin server that everybody can reach': {
    sections: { more: 'admin: { listen: ▸"0.0.0.0:9180" }' },
    path: 'admin.listen',
    code: 'config_conflict',
    expected: /loopback.*admin\.token or admin\.tls\.clientCertificates/,
  },
  'an admin server that everybody can reach with TLS': {
    sections: { more: 'admin: { listen: ▸"[::]:9180", tls: { chain: c, key: k } }' },
    path: 'admin.listen',
    code: 'config_conflict',
  },
  'a name as the address of the admin server': {
    sections: { more: 'admin: { listen: ▸"localhost:9180" }' },
    path: 'admin.listen',
    code: 'config_value',
    expected: /127\.0\.0\.1:9180/,
  },
  'a token in the place of its place': {
    sections: { more: 'admin: { listen: "127.0.0.1:9180", token: ▸"9876987698769876" }' },
    path: 'admin.token',
    code: 'config_type',
  },
  'two places of the admin token': {
    sections: { more: 'admin: { listen: "127.0.0.1:9180", token: ▸{ file: token, env: TOKEN } }' },
    path: 'admin.token',
    code: 'config_value',
  },
  'TLS of the admin server without a key': {
    sections: { more: 'admin: { listen: "127.0.0.1:9180", ▸tls: { chain: c } }' },
    path: 'admin.tls.key',
    code: 'config_missing_key',
  },
  'a mode of a later version': {
    sections: listener('certificates: [www], upstream: web, mode: ▸forward'),
    path: 'listeners.https.mode',
    code: 'config_unsupported',
  },
  'a mode that does not exist': {
    sections: listener('certificates: [www], upstream: web, mode: ▸http'),
    path: 'listeners.https.mode',
    code: 'config_value',
  },
  'a policy with a name that is built in': {
    sections: { more: 'policies: { ▸modern: {} }' },
    path: 'policies.modern',
    code: 'config_conflict',
  },
  'versions the wrong way round': {
    sections: policy('minVersion: ▸"1.3", maxVersion: 1.2'),
    path: 'policies.p.minVersion',
    code: 'config_conflict',
  },
  'a TLS version that is gone': {
    sections: policy('minVersion: ▸1.1'),
    path: 'policies.p.minVersion',
    code: 'config_value',
  },
  'a cipher suite of a forbidden version': {
    sections: policy('maxVersion: 1.2, cipherSuites: ▸[TLS_AES_128_GCM_SHA256, TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256]'),
    path: 'policies.p.cipherSuites',
    code: 'config_conflict',
    expected: /TLS_AES_128_GCM_SHA256/,
  },
  'no cipher suite for a version': {
    sections: policy('cipherSuites: ▸[TLS_AES_128_GCM_SHA256]'),
    path: 'policies.p.cipherSuites',
    code: 'config_conflict',
    expected: /TLS 1.2/,
  },
  'no group for TLS 1.2': {
    sections: policy('groups: ▸[X25519MLKEM768]'),
    path: 'policies.p.groups',
    code: 'config_conflict',
  },
  'no cipher suite for a version that the base forbids': {
    sections: policy('base: modern, minVersion: ▸1.2'),
    path: 'policies.p.minVersion',
    code: 'config_conflict',
    expected: /cipher suite for TLS 1.2/,
  },
  'no signature scheme for TLS 1.3': {
    sections: policy('signatureSchemes: ▸[rsa_pkcs1_sha256]'),
    path: 'policies.p.signatureSchemes',
    code: 'config_conflict',
    expected: /TLS 1.3/,
  },
  'a signature scheme that does not exist': {
    sections: policy('signatureSchemes: [▸rsa_pkcs1_sha1]'),
    path: 'policies.p.signatureSchemes[0]',
    code: 'config_value',
    expected: /rsa_pss_rsae_sha256/,
  },
  'the same signature scheme twice': {
    sections: policy('signatureSchemes: [ed25519, ▸ed25519]'),
    path: 'policies.p.signatureSchemes[1]',
    code: 'config_conflict',
  },
  'a base that is not defined': {
    sections: policy('base: ▸strict'),
    path: 'policies.p.base',
    code: 'config_reference',
  },
  'a policy that is made from itself': {
    sections: { more: 'policies: { p: { base: q }, q: { base: ▸r }, r: { base: q } }' },
    path: 'policies.q.base',
    code: 'config_conflict',
  },
  'tickets that live longer than those of any policy': {
    sections: policy('ticketLifetime: ▸13h'),
    path: 'policies.p.ticketLifetime',
    code: 'config_conflict',
    expected: /tickets.lifetime, which is 12h/,
  },
  'a group that FIPS 140-3 does not approve': {
    sections: policy('base: fips, groups: ▸[X25519, secp256r1]'),
    path: 'policies.p.groups',
    code: 'config_conflict',
    expected: /secp384r1/,
  },
  'an extended master secret that FIPS 140-3 wants and a policy does not': {
    sections: policy('base: fips, extendedMasterSecret: ▸optional'),
    path: 'policies.p.extendedMasterSecret',
    code: 'config_conflict',
  },
  'a client that may never come': {
    sections: listener('certificates: [www], upstream: web, limits: { perClient: { rate: ▸0 } }'),
    path: 'listeners.https.limits.perClient.rate',
    code: 'config_value',
  },
  'a policy where no TLS ends': {
    sections: listener('mode: passthrough, policy: ▸modern, upstream: web'),
    path: 'listeners.https.policy',
    code: 'config_conflict',
  },
  'what unknown names get where no TLS ends': {
    sections: listener('mode: passthrough, unknownName: ▸refuse, upstream: web'),
    path: 'listeners.https.unknownName',
    code: 'config_conflict',
  },
  "a client's certificate in a header that has no room for it": {
    sections: upstream('{ servers: ["10.0.0.1:80"], proxyProtocol: v1, proxyClientCertificate: ▸true }'),
    path: 'upstreams.web.proxyClientCertificate',
    code: 'config_conflict',
  },
  'a proxy network with bits beyond its prefix': {
    sections: listener('certificates: [www], upstream: web, proxyProtocol: { from: [10.0.0.0/8, ▸10.0.0.1/8] }'),
    path: 'listeners.https.proxyProtocol.from[1]',
    code: 'config_value',
  },
  'nobody who may send a PROXY header': {
    sections: listener('certificates: [www], upstream: web, proxyProtocol: { from: ▸[] }'),
    path: 'listeners.https.proxyProtocol.from',
    code: 'config_value',
  },
  'a transparent listener behind proxies': {
    sections: listener('certificates: [www], upstream: web, transparent: ▸true, proxyProtocol: { from: [10.0.0.1] }'),
    path: 'listeners.https.transparent',
    code: 'config_conflict',
  },
  'the original destination of clients that nobody redirected': {
    sections: {
      ...upstream('{ servers: [original] }'),
      ...listener('certificates: [www], upstream: ▸web'),
    },
    path: 'listeners.https.upstream',
    code: 'config_conflict',
    expected: /transparent: true/,
  },
  'the original destination by a route of clients that nobody redirected': {
    sections: {
      upstreams: '{ web: { servers: ["10.0.0.1:80"] }, there: { servers: [original] } }',
      ...listener('certificates: [www], upstream: web, routes: [{ names: [a.example], upstream: ▸there }]'),
    },
    path: 'listeners.https.routes[0].upstream',
    code: 'config_conflict',
  },
  'client certificates where no TLS ends': {
    sections: listener('mode: passthrough, upstream: web, clientCertificates: ▸{ roots: ca.pem }'),
    path: 'listeners.https.clientCertificates',
    code: 'config_conflict',
  },
  'a route by client where nobody shows a certificate': {
    sections: listener('certificates: [www], routes: [{ clients: ▸{ commonNames: [a] }, upstream: web }]'),
    path: 'listeners.https.routes[0].clients',
    code: 'config_conflict',
  },
  'nobody to let in': {
    sections: listener('certificates: [www], upstream: web, clientCertificates: { roots: ca.pem, allow: ▸{} }'),
    path: 'listeners.https.clientCertificates.allow',
    code: 'config_value',
    expected: /at least one client/,
  },
  'a tree of URIs over all hosts': {
    sections: listener(
      'certificates: [www], upstream: web, clientCertificates: { roots: ca.pem, allow: { uris: [▸"spiffe://*"] } }',
    ),
    path: 'listeners.https.clientCertificates.allow.uris[0]',
    code: 'config_value',
    expected: /below a host/,
  },
  'an OCSP responder that is asked over TLS': {
    sections: listener(
      'certificates: [www], upstream: web, clientCertificates: { roots: ca.pem, ocsp: { responder: ▸"https://a/" } }',
    ),
    path: 'listeners.https.clientCertificates.ocsp.responder',
    code: 'config_value',
    expected: /http:/,
  },
  'TLS to the original destination without a name': {
    sections: {
      ...upstream('{ servers: [original], tls: ▸{} }'),
      ...listener('certificates: [www], mode: bridge, upstream: web, transparent: true'),
    },
    path: 'upstreams.web.tls',
    code: 'config_conflict',
  },
  'the original destination beside a server': {
    sections: {
      ...upstream('{ servers: ▸[original, "10.0.0.1:80"] }'),
      ...listener('certificates: [www], upstream: web, transparent: true'),
    },
    path: 'upstreams.web.servers',
    code: 'config_conflict',
  },
  'checks of the original destination': {
    sections: {
      ...upstream('{ servers: [original], health: ▸{ tcp: 5s } }'),
      ...listener('certificates: [www], upstream: web, transparent: true'),
    },
    path: 'upstreams.web.health',
    code: 'config_conflict',
  },
  "a client's address towards a unix socket": {
    sections: upstream('{ servers: ["unix:/s"], transparent: ▸true }'),
    path: 'upstreams.web.transparent',
    code: 'config_conflict',
  },
  'a ticket lifetime above the rotation': {
    sections: { more: 'tickets: { lifetime: ▸2h, rotation: 1h }' },
    path: 'tickets.lifetime',
    code: 'config_conflict',
  },
  'a proxy with a password': {
    sections: { more: 'ocsp: { proxy: ▸"http://user:secret@proxy:3128" }' },
    path: 'ocsp.proxy',
    code: 'config_secret',
  },
  'an OCSP timeout above a minute': {
    sections: { more: 'ocsp: { timeout: ▸61s }' },
    path: 'ocsp.timeout',
    code: 'config_value',
  },
  'a ticket lifetime above seven days': {
    sections: { more: 'tickets: { lifetime: ▸8d, rotation: 7d }' },
    path: 'tickets.lifetime',
    code: 'config_value',
  },
};
for (const [what, { sections, path, code, expected, also = [] }] of Object.entries(placed)) {
  it(`${what} is reported at its place`, () => {
    const { text, line, column } = unmarked(document(sections));
    const problems = problemsOf(text);
    assert.deepEqual(
      problems.map((problem) => problem.path),
      [path, ...also],
    );
    const [problem] = problems;
    assert.deepEqual([problem?.line, problem?.column], [line, column]);
    assert.equal(problem?.code, code);
    if (expected !== undefined) assert.match(problem.expected, expected);
  });
}

const twoBinds = (bind: string, other: string, more = '') =>
  document({
    listeners: `{ a: { bind: ["${bind}"], certificates: [www], upstream: web }, b: { bind: ["${other}"], certificates: [www], upstream: web } }`,
    more,
  });

it('two listeners that cannot both bind are a conflict at both places', () => {
  for (const [bind, other] of [
    ['[::1]:443', '[0::1]:443'],
    ['0.0.0.0:443', '127.0.0.1:443'],
    ['127.0.0.1:443', '0.0.0.0:443'],
    ['[::]:443', '[::1]:443'],
    ['[::1]:443', '[::]:443'],
  ] as const) {
    const text = twoBinds(bind, other);
    const [problem, ...others] = problemsOf(text);
    assert.deepEqual(others, []);
    assert.deepEqual([problem?.path, problem?.code], ['listeners.b.bind[0]', 'config_conflict']);
    const line = text.split('\n').findIndex((each) => each.includes(bind)) + 1;
    const column = (text.split('\n')[line - 1]?.indexOf(`"${bind}"`) ?? 0) + 1;
    assert.equal(problem?.hint, `it cannot be beside listeners.a.bind[0] at ${line}:${column}`);
  }
});

it('a token that stands in the configuration itself is not repeated in what is said about it', () => {
  for (const wrong of ['"98769876987698769876"', '{ 98769876987698769876: x }', '[98769876987698769876]']) {
    const said = problemsOf(document({ more: `admin: { listen: "127.0.0.1:9180", token: ${wrong} }` })).map(
      formatProblem,
    );
    assert.doesNotMatch(said.join('\n'), /9876/, wrong);
    assert.match(said.join('\n'), /keep the secret outside of the configuration/, wrong);
  }
});

it('the admin server cannot have the address of a listener, nor one that a wildcard takes', () => {
  for (const bind of ['127.0.0.1:9180', '0.0.0.0:9180']) {
    const [problem] = problemsOf(twoBinds('127.0.0.1:443', bind, 'admin: { listen: "127.0.0.1:9180" }'));
    assert.deepEqual([problem?.path, problem?.code], ['admin.listen', 'config_conflict']);
    assert.match(problem?.hint ?? '', /listeners\.b\.bind\[0\] at \d+:\d+$/);
  }
});

it('addresses that can be bound beside each other are no conflict', () => {
  for (const [bind, other, admin] of [
    ['127.0.0.1:0', '127.0.0.1:0', '127.0.0.1:0'],
    ['127.0.0.1:443', '127.0.0.2:443', '127.0.0.3:443'],
    ['0.0.0.0:443', '[::]:443', '127.0.0.1:9180'],
    ['0.0.0.0:443', '127.0.0.1:8443', 'unix:/run/keygate.sock'],
  ] as const)
    assert.ok(parseConfig(twoBinds(bind, other, `admin: { listen: "${admin}" }`), '/k.yaml'));
});

it('a ticket key is in all tokens unless some are named, which must be there', () => {
  const key = (more: string) => `tickets: { key: "pkcs11:object=tickets", ${more} }`;
  const { tickets } = parseConfig(document({ more: key('') }), '/k.yaml');
  assert.deepEqual(plain(tickets.key), { uri: { object: 'tickets' }, tokens: ['a'] });
  const [unknown] = problemsOf(document({ more: key('tokens: [b]') }));
  assert.deepEqual([unknown?.path, unknown?.code], ['tickets.tokens[0]', 'config_reference']);
  const [keyless] = problemsOf(document({ more: 'tickets: { tokens: [a] }' }));
  assert.deepEqual([keyless?.path, keyless?.code], ['tickets.tokens', 'config_conflict']);
  const [otherType] = problemsOf(document({ more: 'tickets: { key: "pkcs11:object=t;type=private" }' }));
  assert.equal(otherType?.expected, 'type=secret-key or no type');
});

it('ticket lifetime may equal the rotation', () => {
  const { tickets } = parseConfig(document({ more: 'tickets: { lifetime: 1h, rotation: 1h }' }), '/k.yaml');
  assert.deepEqual(plain(tickets), {
    lifetimeMs: 3_600_000,
    rotationMs: 3_600_000,
  });
});

it('positions count lines and columns as editors do, also behind comments and wide characters', () => {
  const { text, line, column } = unmarked(
    `# Grüße 😀\n${document(upstream('{ servers: ["a:1"], "wé😀b": 1, ▸helth: 2 }'))}`,
  );
  const [wide, behind] = problemsOf(text);
  assert.equal(wide?.path, 'upstreams.web."wé😀b"');
  assert.deepEqual([behind?.line, behind?.column], [line, column]);
});

it('a syntax error is reported at its place and nothing is guessed behind it', () => {
  const problems = problemsOf('tokens: {\nworkers: 0\n');
  assert.ok(problems.length > 0 && problems.every(({ code }) => code === 'config_syntax'));
  assert.ok((problems[0]?.line ?? 0) >= 1);
});

const unusable: Record<string, string> = {
  'two documents': 'a: 1\n---\nb: 1\n',
  'a tag': 'workers: !!binary aGk=\n',
  'an unknown tag': 'workers: !secret 1\n',
  'a key that is no text': '? [a]\n: 1\n',
  'an alias that names nothing': 'workers: *a\n',
  'an alias that contains itself': 'a: &a [*a]\n',
  'deep nesting': `a: ${'['.repeat(40)}${']'.repeat(40)}`,
  'very deep nesting': '['.repeat(100_000),
  'many aliases': `a: &a [${'x,'.repeat(50)}]\nb: &b [${'*a,'.repeat(50)}]\nc: [${'*b,'.repeat(50)}]\n`,
};
for (const [what, text] of Object.entries(unusable)) {
  it(`${what} is a problem, not an exception`, () => assert.ok(problemsOf(text).length > 0));
}

it('an empty file lacks its sections', () => {
  for (const text of ['', '\n', '# nothing\n', '---\n']) {
    assert.deepEqual(
      problemsOf(text).map(({ path, code }) => `${path} ${code}`),
      ['upstreams config_missing_key', 'listeners config_missing_key'],
    );
  }
});

it('a file with more problems than a person reads says how many it does not show', () => {
  const error = errorOf(Array.from({ length: 5000 }, (_, index) => `key${index}: 1`).join('\n'));
  assert.equal(error.problems.length, 200);
  assert.match(error.hint ?? '', /^48\d\d more problems/);
});

it('nothing of a PIN is shown, wherever in the token it was written', () => {
  const secret = 'hunter2secret';
  const written = [
    `pin: ${secret}`,
    `pin: [${secret}]`,
    `pin: { value: ${secret} }`,
    `pin: { ${secret} }`,
    `pin: { ${secret}: 1, ${secret}: 2 }`,
    `pin: { file: [${secret}] }`,
    `pin: { env: "${secret}!" }`,
    `pin: { credential: "/${secret}" }`,
    `pin: *${secret}`,
    `pin: !${secret} x`,
    `pin: { file: pin }, uri: "pkcs11:token=a?pin-value=${secret}"`,
    `pin: { file: pin }, uri: "pkcs11:token=a;pin-value=${secret}"`,
  ];
  for (const pin of written) {
    const error = errorOf(
      document({ tokens: `{ a: { module: /m.so, ${pin.includes('uri') ? '' : 'uri: "pkcs11:token=a", '}${pin} } }` }),
    );
    assert.doesNotMatch(
      `${error.message} ${error.hint} ${JSON.stringify(error.problems)} ${error.stack}`,
      /hunter2/,
      pin,
    );
  }
});

it('a problem reads as file, position, path, what was found and what was expected', () => {
  const [problem] = problemsOf(document({ listeners: base.listeners.replace('upstream: web', 'upstream: wbe') }));
  assert.equal(
    problem && formatProblem(problem),
    '/k.yaml:4:77 listeners.https.upstream: undefined name: found "wbe", expected one of the upstreams: web; did you mean "web"?',
  );
});

it('when very many names are undefined, the first few get a suggestion', () => {
  const names = Array.from({ length: 50 }, (_, index) => `site-${index}`);
  const text = document({
    certificates: `{ ${names.map((name) => `${name}: { chain: c.pem, key: "pkcs11:object=k" }`).join(', ')} }`,
    listeners: base.listeners.replace('[www]', `[${names.map((name) => `${name}x`).join(', ')}]`),
  });
  const problems = problemsOf(text);
  assert.equal(problems.length, names.length);
  assert.deepEqual(
    problems.slice(0, 11).map(({ hint }) => hint),
    [...names.slice(0, 10).map((name) => `did you mean "${name}"?`), undefined],
  );
});

it('a file is read up to its limit and refused above it', (test) => {
  const write = privateFile(test);
  assert.ok(loadConfig(write(`${document()}\n#`.padEnd(configBytesMax, '#'))));
  assert.deepEqual(codesOf(write(`${document()}\n#`.padEnd(configBytesMax + 1, '#'))), ['config_too_large']);
});

it('what cannot be read is a problem of the file', (test) => {
  const write = privateFile(test);
  const file = write(document());
  assert.deepEqual(codesOf(`${file}.absent`), ['config_unreadable']);
  assert.deepEqual(codesOf(join(file, '..')), ['config_unreadable']);
  execFileSync('mkfifo', [`${file}.fifo`]);
  assert.deepEqual(codesOf(`${file}.fifo`), ['config_unreadable']);
  writeFileSync(file, Buffer.from([0x61, 0x3a, 0x20, 0xff]));
  assert.deepEqual(codesOf(file), ['config_syntax']);
});

it('arbitrary text is a configuration or a ConfigError with positions, nothing else', () => {
  const yamlLike = fc.array(
    fc.oneof(
      fc.constantFrom(
        ...'{}[]:,-?&*!|>%@`"\'#\n\t '.split(''),
        ...Object.keys(base),
        ...Object.values(base),
        '<<',
        '&a',
        '*a',
        '---',
        '__proto__',
        'null',
        '1.2',
      ),
      fc.string({ maxLength: 5 }),
    ),
    { maxLength: 30 },
  );
  fc.assert(
    fc.property(
      fc.oneof(
        fc.string({ unit: 'binary' }),
        yamlLike.map((parts) => parts.join('')),
        yamlLike.map((parts) => parts.join(' ')),
      ),
      (text) => {
        for (const { file, line = 0, column = 0 } of problemsOf(text))
          assert.ok(file === '/k.yaml' && line >= 1 && column >= 1);
      },
    ),
    { numRuns: 500 },
  );
});

it('arbitrary values at known keys are a configuration or a ConfigError, nothing else', () => {
  const value = fc.oneof(
    fc.jsonValue({ maxDepth: 3 }),
    fc.constantFrom('5s', 'none', 'www', 'web', 'a:1', '0.0.0.0:1', 'pkcs11:token=a'),
  );
  const entry = (...keys: string[]) =>
    fc.record(Object.fromEntries(keys.map((key) => [key, value])), { requiredKeys: [] });
  const documents = fc.record({
    workers: value,
    log: fc.oneof(value, entry('level')),
    admin: fc.oneof(value, entry('listen', 'token', 'tls')),
    tokens: fc.oneof(
      value,
      fc.dictionary(fc.string(), fc.oneof(value, entry('module', 'uri', 'pin', 'lanes', 'queue', 'verify'))),
    ),
    certificates: fc.oneof(value, fc.dictionary(fc.string(), fc.oneof(value, entry('chain', 'key', 'tokens')))),
    policies: fc.oneof(
      value,
      fc.dictionary(
        fc.string(),
        fc.oneof(
          value,
          entry('base', 'minVersion', 'maxVersion', 'groups', 'cipherSuites', 'signatureSchemes', 'ticketLifetime'),
        ),
      ),
    ),
    tickets: fc.oneof(value, entry('lifetime', 'rotation')),
    upstreams: fc.oneof(
      value,
      fc.dictionary(fc.string(), fc.oneof(value, entry('servers', 'balance', 'health', 'passive'))),
    ),
    listeners: fc.oneof(
      value,
      fc.dictionary(
        fc.string(),
        fc.oneof(value, entry('bind', 'mode', 'certificates', 'policy', 'upstream', 'deadlines')),
      ),
    ),
  });
  fc.assert(
    // JSON is YAML.
    fc.property(documents, (content) => assert.ok(problemsOf(JSON.stringify(content)).length >= 0)),
    { numRuns: 300 },
  );
});

/** The text without its mark, and where that stood, as an editor counts. */
function unmarked(marked: string): { text: string; line: number; column: number } {
  const before = marked.slice(0, marked.indexOf('▸')).split('\n');
  return { text: marked.replace('▸', ''), line: before.length, column: (before.at(-1) ?? '').length + 1 };
}

function document(sections: Sections = {}): string {
  const { more, ...others } = sections;
  const lines = Object.entries({ ...base, ...others }).map(([name, content]) => `${name}: ${content}`);
  return [...lines, ...(more === undefined ? [] : [more])].join('\n');
}

/** Without prototypes and undefined members, as it would cross to another process. */
function plain(value: unknown): object {
  return JSON.parse(JSON.stringify(value)) as object;
}

/** Empty when the text is a configuration; any error but ConfigError fails the test. */
function problemsOf(text: string): readonly Problem[] {
  try {
    parseConfig(text, '/k.yaml');
    return [];
  } catch (error) {
    if (error instanceof ConfigError) return error.problems;
    throw error;
  }
}

function errorOf(text: string): ConfigError {
  try {
    parseConfig(text, '/k.yaml');
  } catch (error) {
    if (error instanceof ConfigError) return error;
    throw error;
  }
  return assert.fail('the text was accepted');
}

function codesOf(file: string): string[] {
  try {
    loadConfig(file);
    return [];
  } catch (error) {
    if (error instanceof ConfigError) return error.problems.map(({ code }) => code);
    throw error;
  }
}

function privateFile(test: TestContext): (content: string) => string {
  const directory = mkdtempSync(join(tmpdir(), 'keygate-config-'));
  test.after(() => rmSync(directory, { recursive: true }));
  return (content) => {
    const file = join(directory, 'keygate.yaml');
    writeFileSync(file, content);
    return file;
  };
}
