/**
 * Owns: what a policy does to the clients and servers of those that name it: schemes, order, tickets, a change by reload, FIPS.
 * Must not know: how policies are written and made from one another (test/config/policies.test.ts).
 * Runs: in a test process, against keygates with SoftHSM.
 */
import assert from 'node:assert/strict';
import { once } from 'node:events';
import { after, before, describe, it } from 'node:test';
import { signatureSchemes } from '../../src/config/config.ts';
import { engine } from '../../src/engine/binding.ts';
import { keygate as command } from '../support/command.ts';
import { refusedKeygate, startKeygate } from '../support/keygate.ts';
import type { Keygate, KeygateDocument } from '../support/keygate.ts';
import { provisionedToken } from '../support/provisioned-token.ts';
import type { ProvisionedToken } from '../support/provisioned-token.ts';
import { assertEchoes, program, rawClient, refusalOf, tlsClient } from '../support/tls-client.ts';
import type { TlsOptions } from '../support/tls-client.ts';
import { until } from '../support/until.ts';
import { echoUpstream } from '../support/upstream.ts';
import type { Upstream } from '../support/upstream.ts';

const versions = ['TLSv1.2', 'TLSv1.3'] as const;
type Version = (typeof versions)[number];

describe('a policy', { timeout: 120_000 }, () => {
  const fixtures = new AsyncDisposableStack();
  let token: ProvisionedToken;
  let echo: Upstream;
  let keygate: Keygate;

  before(async () => {
    token = fixtures.use(await provisionedToken({ ec: { kind: 'p256' }, rsa: { kind: 'rsa2048' } }));
    echo = fixtures.use(await echoUpstream());
    keygate = fixtures.use(
      await startKeygate(token, {
        policies: {
          everything: { signatureSchemes: [...signatureSchemes] },
          sha512: { signatureSchemes: ['rsa_pss_rsae_sha512', 'rsa_pkcs1_sha512', 'rsa_pss_rsae_sha384'] },
          ownOrder: {
            cipherOrder: 'server',
            cipherSuites: ['TLS_CHACHA20_POLY1305_SHA256', 'TLS_AES_128_GCM_SHA256'],
            minVersion: '1.3',
          },
          brief: { ticketLifetime: '1s' },
          otherGroup: { groups: ['secp384r1'] },
          otherScheme: { signatureSchemes: ['ecdsa_secp256r1_sha256', 'ed25519'] },
          otherVersion: { minVersion: '1.3' },
          demanding: { extendedMasterSecret: 'required' },
          sameByName: {},
          ticketless: { tickets: false },
        },
        upstreams: { echo: { servers: [echo.address] } },
        listeners: {
          everything: { policy: 'everything' },
          sha512: { certificates: ['rsa'], policy: 'sha512' },
          ownOrder: { certificates: ['ec'], policy: 'ownOrder' },
          intermediate: { certificates: ['ec'] },
          ...Object.fromEntries(
            ['brief', 'otherGroup', 'otherScheme', 'otherVersion', 'demanding', 'sameByName', 'ticketless'].map(
              (policy) => [policy, { certificates: ['ec'], policy }],
            ),
          ),
        },
      }),
    );
  });
  after(async () => fixtures.disposeAsync());

  it('knows every signature scheme that the configuration has', async () => {
    const client = await tlsClient({ port: keygate.port('everything') });
    await assertEchoes(client);
    client.destroy();
  });

  for (const [offered, version, type, digest] of [
    ['rsa_pss_rsae_sha256:rsa_pss_rsae_sha384:rsa_pss_rsae_sha512', '1_3', 'RSA-PSS', 'SHA512'],
    ['rsa_pss_rsae_sha256:rsa_pss_rsae_sha384', '1_3', 'RSA-PSS', 'SHA384'],
    ['rsa_pkcs1_sha256:rsa_pkcs1_sha512', '1_2', 'RSA', 'SHA512'],
  ] as const) {
    it(`signs in TLS ${version.replace('_', '.')} with what stands first in it of ${offered}`, async () => {
      const { output } = await openssl('sha512', `-tls${version}`, '-sigalgs', offered);
      assert.match(output, new RegExp(`^Peer signature type: ${type}$`, 'm'));
      assert.match(output, new RegExp(`^Peer signing digest: ${digest}$`, 'm'));
    });
  }

  for (const [offered, maxVersion] of [
    ['rsa_pss_rsae_sha256', 'TLSv1.3'],
    ['rsa_pkcs1_sha256', 'TLSv1.2'],
  ] as const) {
    it(`signs with no other scheme of the key, although the client of ${maxVersion} takes nothing else`, async () => {
      const earlier = await keygate.closes();
      const code = await refusalOf({ port: keygate.port('sha512'), maxVersion, sigalgs: offered });
      assert.equal(code, 'ERR_SSL_SSL/TLS_ALERT_HANDSHAKE_FAILURE');
      await keygate.closed('client/handshake/no_shared_signature_scheme', { before: earlier });
    });
  }

  for (const [listener, ciphers, expected] of [
    ['ownOrder', 'TLS_AES_128_GCM_SHA256:TLS_CHACHA20_POLY1305_SHA256', 'TLS_CHACHA20_POLY1305_SHA256'],
    ['intermediate', 'TLS_CHACHA20_POLY1305_SHA256:TLS_AES_128_GCM_SHA256', 'TLS_CHACHA20_POLY1305_SHA256'],
    ['intermediate', 'TLS_AES_256_GCM_SHA384:TLS_AES_128_GCM_SHA256', 'TLS_AES_256_GCM_SHA384'],
  ] as const) {
    it(`of the listener ${listener} takes ${expected} for a client that prefers ${ciphers.split(':')[0]}`, async () => {
      const client = await tlsClient({ port: keygate.port(listener), ciphers });
      assert.equal(client.getCipher().name, expected);
      client.destroy();
    });
  }

  it('takes the group that the client prefers, whatever stands first: rustls has no other way', async () => {
    const { output } = await openssl('intermediate', '-groups', 'P-384:X25519', '-trace');
    assert.match(output, /NamedGroup: secp384r1 \(P-384\)/);
    assert.match(output, /^Server Temp Key: ECDH, secp384r1/m);
  });

  it('may refuse TLS 1.2 without extended master secrets, and does not by itself', async () => {
    const withoutEms = (listener: string) => {
      const priority = 'NORMAL:-VERS-ALL:+VERS-TLS1.2:%NO_SESSION_HASH';
      const options = ['--insecure', '--priority', priority, '--port', String(keygate.port(listener)), '127.0.0.1'];
      return program('gnutls-cli', options);
    };
    const served = await withoutEms('intermediate');
    assert.match(served.output, /Handshake was completed/);
    assert.doesNotMatch(served.output, /extended master secret/);
    const earlier = await keygate.closes();
    const refused = await withoutEms('demanding');
    assert.match(refused.output, /Received alert \[40\]/);
    await keygate.closed('client/handshake/no_extended_master_secret', { before: earlier });
    const client = await tlsClient({ port: keygate.port('demanding'), maxVersion: 'TLSv1.2' });
    await assertEchoes(client);
    client.destroy();
  });

  for (const version of versions) {
    it(`tells clients of ${version} how long tickets live, and takes back no older ones, whoever issued them`, async () => {
      // In time it is taken back there as well: how long a ticket is good is no part of what it is for.
      const fresh = await sessionOf('intermediate', version);
      assert.equal(await resumes('brief', version, fresh), true);
      const session = await sessionOf('intermediate', version);
      // Every try is older than the one before.
      await until(
        'state in which the ticket is too old for a policy with a shorter life',
        async () => !(await resumes('brief', version, session)),
      );
      assert.equal(await resumes('intermediate', version, session), true, 'for its own policy it is not');
      assert.ok((await sessionOf('brief', version)).includes(lifetimeHint(1)));
    });

    it(`takes back tickets of ${version} of a policy that says the same under another name`, async () => {
      assert.equal(await resumes('sameByName', version, await sessionOf('intermediate', version)), true);
    });

    for (const [listener, what] of [
      ['otherGroup', 'group'],
      ['otherScheme', 'signature scheme'],
      ['demanding', 'extended master secret'],
      ['ticketless', 'no ticket'],
      ...(version === 'TLSv1.3' ? [['otherVersion', 'version'] as const] : []),
    ] as const) {
      it(`takes back no ticket of ${version} of a policy with another word about ${what}: that is a full handshake`, async () => {
        assert.equal(await resumes(listener, version, await sessionOf('intermediate', version)), false);
      });
    }
  }

  async function openssl(listener: string, ...options: readonly string[]) {
    return program('openssl', ['s_client', '-connect', `127.0.0.1:${keygate.port(listener)}`, ...options]);
  }

  async function sessionOf(listener: string, version: Version): Promise<Buffer> {
    const client = await tlsClient({ port: keygate.port(listener), minVersion: version, maxVersion: version });
    const session = once(client, 'session');
    await assertEchoes(client);
    const bytes = version === 'TLSv1.3' ? ((await session) as [Buffer])[0] : client.getSession();
    client.destroy();
    return bytes ?? assert.fail('no session');
  }

  async function resumes(listener: string, version: Version, session: Buffer): Promise<boolean> {
    const options: TlsOptions = { port: keygate.port(listener), minVersion: version, maxVersion: version, session };
    const client = await tlsClient(options);
    await assertEchoes(client);
    const resumed = client.isSessionReused();
    client.destroy();
    return resumed;
  }
});

describe('a policy of an upstream', { timeout: 120_000 }, () => {
  for (const [allowed, mechanism] of [
    ['rsa_pss_rsae_sha256', 'rsa_pkcs_pss'],
    ['ecdsa_secp256r1_sha256', 'ecdsa'],
  ] as const) {
    it(`lets a server sign with ${allowed} and nothing else`, async (test) => {
      const { token, echo } = await setting(test, { ec: { kind: 'p256' }, rsa: { kind: 'rsa2048' } });
      const server = await started(test, token, {
        upstreams: { echo: { servers: [echo.address] } },
        listeners: { https: {} },
      });
      const keygate = await started(test, token, encrypting(server, { signatureSchemes: [allowed] }));
      const client = await plainEcho(keygate);
      client.destroy();
      assert.equal(await server.metric('keygate_signatures_total', { mechanism, outcome: 'ok' }), 1);
    });
  }

  it('refuses a server that signs with none of its schemes, and counts why', async (test) => {
    const { token, echo } = await setting(test, { ec: { kind: 'p256' } });
    const server = await started(test, token, {
      upstreams: { echo: { servers: [echo.address] } },
      listeners: { https: {} },
    });
    const keygate = await started(
      test,
      token,
      encrypting(server, { signatureSchemes: ['ed25519', 'rsa_pss_rsae_sha256'] }),
    );
    await assert.rejects(plainEcho(keygate));
    await keygate.closed('upstream/handshake/alert');
    await server.closed('client/handshake/no_shared_signature_scheme');
  });
});

describe('a change of one policy', { timeout: 120_000 }, () => {
  it('changes every listener and upstream that names it or is made from it, by a reload, and no connection that is there', async (test) => {
    const { token, echo } = await setting(test, { ec: { kind: 'p256' } });
    const server = await started(test, token, {
      upstreams: { echo: { servers: [echo.address] } },
      listeners: { https: {} },
    });
    const document = (shared: object): KeygateDocument => ({
      policies: { shared, child: { base: 'shared', tickets: false } },
      upstreams: {
        echo: { servers: [echo.address] },
        far: {
          servers: [`127.0.0.1:${server.port()}`],
          tls: { verify: 'report', roots: token.certificates['ec']?.chain, policy: 'shared' },
        },
      },
      listeners: {
        one: { policy: 'shared' },
        two: { policy: 'child' },
        other: {},
        encrypt: { mode: 'encrypt', certificates: undefined, upstream: 'far' },
      },
    });
    const keygate = await started(test, token, document({ maxVersion: '1.2' }));
    const protocol = async (listener: string) => {
      const client = await tlsClient({ port: keygate.port(listener) });
      test.after(() => client.destroy());
      await assertEchoes(client);
      return client.getProtocol();
    };
    const upstreamProtocol = async (expected: string) => {
      const before = (await server.metric('keygate_handshake_seconds_count', { protocol: expected })) ?? 0;
      (await plainEcho(keygate, 'encrypt')).destroy();
      assert.equal(await server.metric('keygate_handshake_seconds_count', { protocol: expected }), before + 1);
    };
    const established = await tlsClient({ port: keygate.port('one') });
    test.after(() => established.destroy());
    assert.deepEqual(await Promise.all(['one', 'two', 'other'].map(protocol)), ['TLSv1.2', 'TLSv1.2', 'TLSv1.3']);
    await upstreamProtocol('TLSv1.2');

    const { outcome, changes } = await keygate.reload(document({ minVersion: '1.3' }));
    assert.equal(outcome, 'committed');
    assert.deepEqual(changes, ['policies.shared changed', 'policies.child changed']);
    assert.deepEqual(await Promise.all(['one', 'two', 'other'].map(protocol)), ['TLSv1.3', 'TLSv1.3', 'TLSv1.3']);
    for (const listener of ['one', 'two']) {
      const code = await refusalOf({ port: keygate.port(listener), maxVersion: 'TLSv1.2' });
      assert.equal(code, 'ERR_SSL_TLSV1_ALERT_PROTOCOL_VERSION');
    }
    await upstreamProtocol('TLSv1.3');
    await assertEchoes(established);
    assert.equal(established.getProtocol(), 'TLSv1.2');
  });
});

describe('a certificate that its policy lets sign nothing', { timeout: 120_000 }, () => {
  const wrong = (echo: Upstream): KeygateDocument => ({
    policies: { strict: { signatureSchemes: ['ed25519', 'rsa_pss_rsae_sha256'] } },
    upstreams: { echo: { servers: [echo.address] } },
    listeners: { https: { certificates: ['ec', 'rsa'], policy: 'strict' } },
  });
  const problem =
    /listeners\.https\.certificates.*found ec, of kind p256, expected .*policy strict allows: ed25519, rsa_pss_rsae_sha256/;

  it('is a problem at the start and in check', async (test) => {
    const { token, echo } = await setting(test, { ec: { kind: 'p256' }, rsa: { kind: 'rsa2048' } });
    const { exitCode, stderr, stdout } = await refusedKeygate(token, wrong(echo));
    assert.equal(exitCode, 78, stdout + stderr);
    assert.match(stderr, problem);
  });

  it('is a reason to roll a reload back', async (test) => {
    const { token, echo } = await setting(test, { ec: { kind: 'p256' }, rsa: { kind: 'rsa2048' } });
    const keygate = await started(test, token, { ...wrong(echo), policies: { strict: {} } });
    const { outcome, reasons } = await keygate.reload(wrong(echo));
    assert.equal(outcome, 'rolled_back');
    assert.match(reasons[0]?.message ?? '', problem);
    const checked = await command(['check', '-c', keygate.file], token.env);
    assert.equal(checked.exitCode, 78);
    assert.match(checked.stdout, problem);
    const client = await tlsClient({ port: keygate.port() });
    await assertEchoes(client);
    client.destroy();
  });
});

describe('policies of FIPS 140-3', { timeout: 120_000 }, () => {
  const approved = (echo: Upstream): KeygateDocument => ({
    policies: { stricter: { base: 'fips', minVersion: '1.3' } },
    upstreams: { echo: { servers: [echo.address] } },
    listeners: { https: { policy: 'fips' }, recent: { policy: 'stricter' } },
  });
  const isFips = engine().isFips();

  it(
    'are refused by an engine without the module, at the start, by a reload and by check',
    { skip: isFips },
    async (test) => {
      const { token, echo } = await setting(test, { ec: { kind: 'p256' } });
      const { exitCode, stderr } = await refusedKeygate(token, approved(echo));
      assert.equal(exitCode, 78);
      for (const where of ['https.policy.*found fips', 'recent.policy.*found stricter'])
        assert.match(stderr, new RegExp(`listeners\\.${where}, expected .*without a FIPS 140-3 module`));
      assert.match(stderr, /KEYGATE_ENGINE_FEATURES=fips/);
      const keygate = await started(test, token, { ...approved(echo), listeners: { https: {} } });
      const { outcome, reasons } = await keygate.reload(approved(echo));
      assert.equal(outcome, 'refused');
      assert.equal(reasons[0]?.code, 'config_unsupported');
      const checked = await command(['check', '-c', keygate.file], token.env);
      assert.equal(checked.exitCode, 78);
      assert.match(checked.stdout, /without a FIPS 140-3 module/);
    },
  );

  it('serve what is approved and nothing else, with the module', { skip: !isFips }, async (test) => {
    const { token, echo } = await setting(test, { ec: { kind: 'p256' } });
    const keygate = await started(test, token, approved(echo));
    const port = keygate.port();
    for (const options of [{}, { maxVersion: 'TLSv1.2' }, { ecdhCurve: 'X25519MLKEM768' }] as const) {
      const client = await tlsClient({ port, ...options });
      await assertEchoes(client);
      client.destroy();
    }
    for (const options of [{ ecdhCurve: 'X25519' }, { ciphers: 'TLS_CHACHA20_POLY1305_SHA256' }] as const)
      assert.equal(await refusalOf({ port, ...options }), 'ERR_SSL_SSL/TLS_ALERT_HANDSHAKE_FAILURE');
    const checked = await command(['check', '-c', keygate.file], token.env);
    assert.equal(checked.exitCode, 0, checked.stdout);
    assert.match(checked.stdout, /listener https +policy fips: .*FIPS 140-3$/m);
  });
});

/** In OpenSSL's DER of a session: element 9, an INTEGER, here of one byte. */
const lifetimeHint = (seconds: number): Buffer => Buffer.from([0xa9, 0x03, 0x02, 0x01, seconds]);

interface Ending {
  after(run: () => unknown): void;
}

async function setting(test: Ending, certificates: Parameters<typeof provisionedToken>[0]) {
  const token = await provisionedToken(certificates);
  const echo = await echoUpstream();
  test.after(async () => {
    await echo.close();
    token.dispose();
  });
  return { token, echo };
}

async function started(test: Ending, token: ProvisionedToken, document: KeygateDocument): Promise<Keygate> {
  const keygate = await startKeygate(token, document);
  test.after(() => keygate.kill());
  return keygate;
}

/** Plaintext in, TLS to another keygate out. */
function encrypting(server: Keygate, policy: object): KeygateDocument {
  return {
    policies: { limited: policy },
    upstreams: {
      far: { servers: [`127.0.0.1:${server.port()}`], tls: { verify: 'report', policy: 'limited' } },
    },
    listeners: { https: { mode: 'encrypt', certificates: undefined } },
  };
}

async function plainEcho(keygate: Keygate, listener = 'https') {
  const client = await rawClient(keygate.port(listener));
  await assertEchoes(client);
  return client;
}
