/**
 * Owns: what a handshake agrees on: key, signature scheme, group, version, certificate by name, protocol, resumption.
 * Must not know: what is done with bad clients (hostile.test.ts), who the clients are (matrix.test.ts).
 * Runs: in a test process, against keygates with SoftHSM.
 */
import assert from 'node:assert/strict';
import { X509Certificate } from 'node:crypto';
import { once } from 'node:events';
import { after, before, describe, it } from 'node:test';
import type { TLSSocket } from 'node:tls';
import type { GeneratedKind } from '../../src/pkcs11/provision.ts';
import { startKeygate } from '../support/keygate.ts';
import type { Keygate } from '../support/keygate.ts';
import { provisionedToken } from '../support/provisioned-token.ts';
import type { ProvisionedToken } from '../support/provisioned-token.ts';
import { assertEchoes, program, refusalOf, tappedClient, tlsClient } from '../support/tls-client.ts';
import type { TlsOptions } from '../support/tls-client.ts';
import { echoUpstream } from '../support/upstream.ts';
import type { Upstream } from '../support/upstream.ts';

const kinds = ['p256', 'p384', 'rsa2048', 'rsa3072', 'rsa4096', 'ed25519'] as const satisfies readonly GeneratedKind[];
const groups = ['X25519MLKEM768', 'X25519', 'secp256r1', 'secp384r1'] as const;

describe('a handshake', { timeout: 120_000 }, () => {
  const fixtures = new AsyncDisposableStack();
  let token: ProvisionedToken;
  let echo: Upstream;
  let keygate: Keygate;

  before(async () => {
    token = fixtures.use(
      await provisionedToken({
        ...Object.fromEntries(kinds.map((kind) => [kind, { kind }])),
        site: { kind: 'p256', key: 'p256', dns: ['site.example', 'www.site.example'] },
        wild: { kind: 'p256', key: 'p256', dns: ['*.site.example'] },
        dualEc: { kind: 'p256', key: 'p256', dns: ['dual.example'] },
        dualRsa: { kind: 'rsa2048', key: 'rsa2048', dns: ['dual.example'] },
      }),
    );
    echo = fixtures.use(await echoUpstream());
    const sites = ['dualEc', 'dualRsa', 'site', 'wild'];
    keygate = fixtures.use(
      await startKeygate(token, {
        workers: 2,
        policies: Object.fromEntries(
          groups.map((group) => [group, { groups: [group], minVersion: group === 'X25519MLKEM768' ? '1.3' : '1.2' }]),
        ),
        upstreams: { echo: { servers: [echo.address] } },
        listeners: {
          ...Object.fromEntries(kinds.map((kind) => [kind, { certificates: [kind] }])),
          ...Object.fromEntries(groups.map((group) => [group, { certificates: ['p256'], policy: group }])),
          sites: { certificates: sites },
          refusing: { certificates: sites, unknownName: 'refuse' },
          alpn: { certificates: ['p256'], alpn: ['h2', 'http/1.1'] },
        },
      }),
    );
  });
  after(async () => fixtures.disposeAsync());

  /** A client that has shaken hands and got an echo; destroyed when `look` is done. */
  async function connected<Seen>(options: TlsOptions, look: (client: TLSSocket) => Seen): Promise<Awaited<Seen>> {
    const client = await tlsClient(options);
    try {
      await assertEchoes(client);
      return await look(client);
    } finally {
      client.destroy();
    }
  }

  for (const [kind, version, scheme, type, digest] of [
    ['rsa2048', '1_3', 'rsa_pss_rsae_sha256', 'RSA-PSS', 'SHA256'],
    ['rsa2048', '1_3', 'rsa_pss_rsae_sha384', 'RSA-PSS', 'SHA384'],
    ['rsa4096', '1_3', 'rsa_pss_rsae_sha512', 'RSA-PSS', 'SHA512'],
    ['rsa2048', '1_2', 'rsa_pss_rsae_sha256', 'RSA-PSS', 'SHA256'],
    ['rsa2048', '1_2', 'rsa_pkcs1_sha256', 'RSA', 'SHA256'],
    ['rsa3072', '1_2', 'rsa_pkcs1_sha384', 'RSA', 'SHA384'],
    ['rsa4096', '1_2', 'rsa_pkcs1_sha512', 'RSA', 'SHA512'],
    ['p256', '1_3', 'ecdsa_secp256r1_sha256', 'ECDSA', 'SHA256'],
    ['p384', '1_3', 'ecdsa_secp384r1_sha384', 'ECDSA', 'SHA384'],
    ['p384', '1_2', 'ecdsa_secp384r1_sha384', 'ECDSA', 'SHA384'],
    ['ed25519', '1_3', 'ed25519', 'Ed25519', undefined],
  ] as const) {
    it(`signs with ${scheme} for a client of TLS ${version.replace('_', '.')} that takes nothing else`, async () => {
      const client = ['s_client', '-connect', `127.0.0.1:${keygate.port(kind)}`, `-tls${version}`, '-sigalgs', scheme];
      const trust = ['-CAfile', token.certificates[kind]?.chain ?? '', '-verify_return_error'];
      const { output, exitCode } = await program('openssl', [...client, ...trust]);
      assert.equal(exitCode, 0, output);
      assert.match(output, new RegExp(`^Peer signature type: (?:${type}|${scheme})$`, 'im'));
      if (digest !== undefined) assert.match(output, new RegExp(`^Peer signing digest: ${digest}$`, 'm'));
    });
  }

  for (const group of groups) {
    it(`takes ${group} when the client offers a share of it`, async () => {
      await connected({ port: keygate.port('p256'), ecdhCurve: opensslNames[group] }, (client) => {
        assert.equal(keyExchangeGroup(client), group);
      });
    });

    it(`asks for ${group} with a HelloRetryRequest when the client offers a share of another group`, async () => {
      const other = group === 'X25519' ? 'secp256r1' : 'X25519';
      const ecdhCurve = `${opensslNames[other]}:${opensslNames[group]}`;
      const client = await tappedClient({ port: keygate.port(group), ecdhCurve });
      await once(client.tls, 'secureConnect');
      await assertEchoes(client.tls);
      assert.equal(keyExchangeGroup(client.tls), group);
      assert.ok(client.received().includes(helloRetryRandom), 'the first ServerHello is a HelloRetryRequest');
      client.tls.destroy();
    });
  }

  for (const group of ['X25519', 'secp256r1', 'secp384r1'] as const) {
    it(`takes ${group} in TLS 1.2`, async () => {
      await connected(
        { port: keygate.port('rsa2048'), ecdhCurve: opensslNames[group], maxVersion: 'TLSv1.2' },
        (client) => {
          assert.equal(keyExchangeGroup(client), group);
        },
      );
    });
  }

  describe('by the name that the client asks for', () => {
    for (const [name, certificate] of [
      ['site.example', 'site'],
      ['www.site.example', 'site'],
      ['WWW.Site.Example', 'site'],
      ['other.site.example', 'wild'],
      ['two.labels.site.example', 'dualEc'],
      ['unheard-of.example', 'dualEc'],
      ['', 'dualEc'],
    ] as const) {
      it(`gives ${name === '' ? 'a client without a name' : name} the certificate ${certificate}`, async () => {
        assert.equal(await certificateFor('sites', { servername: name }), certificate);
      });
    }

    for (const name of ['unheard-of.example', 'two.labels.site.example']) {
      it(`refuses ${name} with unrecognized_name when unknown names are refused`, async () => {
        const earlier = await keygate.closes();
        const refusal = await refusalOf({ port: keygate.port('refusing'), servername: name });
        assert.equal(refusal, 'ERR_SSL_TLSV1_UNRECOGNIZED_NAME');
        await keygate.closed('client/handshake/unknown_name', { before: earlier });
      });
    }

    it('still serves known names and clients without a name when unknown names are refused', async () => {
      assert.equal(await certificateFor('refusing', { servername: 'other.site.example' }), 'wild');
      assert.equal(await certificateFor('refusing', { servername: '' }), 'dualEc');
    });

    for (const [why, options, certificate] of [
      ['takes both, in the order of the configuration', {}, 'dualEc'],
      ['takes ECDSA only', { sigalgs: 'ecdsa_secp256r1_sha256' }, 'dualEc'],
      ['takes RSA only', { sigalgs: 'rsa_pss_rsae_sha256' }, 'dualRsa'],
      ['takes RSA only, in TLS 1.2', { sigalgs: 'RSA+SHA256', maxVersion: 'TLSv1.2' }, 'dualRsa'],
      [
        'takes any signature but only RSA cipher suites',
        { ciphers: 'ECDHE-RSA-AES128-GCM-SHA256', maxVersion: 'TLSv1.2' },
        'dualRsa',
      ],
      [
        'takes any signature but only ECDSA cipher suites',
        { ciphers: 'ECDHE-ECDSA-AES128-GCM-SHA256', maxVersion: 'TLSv1.2' },
        'dualEc',
      ],
    ] as const) {
      it(`of two certificates for it, gives ${certificate} to a client that ${why}`, async () => {
        assert.equal(await certificateFor('sites', { servername: 'dual.example', ...options }), certificate);
      });
    }

    /** The name of the certificate that a client gets. */
    async function certificateFor(listener: string, options: Omit<TlsOptions, 'port'>): Promise<string | undefined> {
      return connected({ port: keygate.port(listener), ...options }, (client) => {
        const raw = client.getPeerX509Certificate()?.raw;
        return Object.keys(token.certificates).find((name) => raw?.equals(new X509Certificate(token.pem(name)).raw));
      });
    }
  });

  for (const [offered, agreed] of [
    [['http/1.1'], 'http/1.1'],
    [['h2'], 'h2'],
    [['http/1.1', 'h2'], 'h2'],
    [['spdy/3', 'http/1.1'], 'http/1.1'],
    [undefined, false],
  ] as const) {
    it(`agrees on ${agreed === false ? 'no protocol' : agreed} with a client that offers ${offered?.join(', ') ?? 'none'}`, async () => {
      const options = offered === undefined ? {} : { ALPNProtocols: [...offered] };
      await connected({ port: keygate.port('alpn'), ...options }, (client) => {
        assert.equal(client.alpnProtocol, agreed);
      });
    });
  }

  it('agrees on no protocol when none is configured, whatever the client offers', async () => {
    await connected({ port: keygate.port('p256'), ALPNProtocols: ['h2'] }, (client) => {
      assert.equal(client.alpnProtocol, false);
    });
  });

  describe('resumed', () => {
    for (const version of ['TLSv1.2', 'TLSv1.3'] as const) {
      it(`with ${version} needs no signature`, async () => {
        const session = await firstSession(version);
        const signatures = await keygate.metric('keygate_signatures_total');
        const resumed = await keygate.metric('keygate_handshake_seconds_count', { protocol: version, resumed: 'true' });
        await connected({ port: keygate.port('p256'), session, maxVersion: version }, (client) => {
          assert.equal(client.getProtocol(), version);
          assert.ok(client.isSessionReused());
        });
        assert.equal(await keygate.metric('keygate_signatures_total'), signatures);
        assert.equal(
          await keygate.metric('keygate_handshake_seconds_count', { protocol: version, resumed: 'true' }),
          (resumed ?? 0) + 1,
        );
      });

      it(`with ${version} by another worker than the one that gave the ticket, which is dead`, async () => {
        const client = await tlsClient({ port: keygate.port('p256'), maxVersion: version });
        const session = await sessionOf(client);
        await killWorkerOf(client);
        await connected({ port: keygate.port('p256'), session, maxVersion: version }, (next) => {
          assert.ok(next.isSessionReused());
        });
      });
    }

    it('by one ticket for each full handshake', async () => {
      const client = await tlsClient({ port: keygate.port('p256') });
      let tickets = 0;
      client.on('session', () => (tickets += 1));
      await assertEchoes(client);
      assert.equal(tickets, 1);
      client.destroy();
    });

    it('not with a ticket that was tampered with: that is a full handshake', async () => {
      const session = Buffer.from(await firstSession('TLSv1.3'));
      const ticket = session.findIndex((_, place) => isTicket(session.subarray(place)));
      assert.ok(ticket !== -1, 'no ticket in the session');
      const lastByte = ticket + 1 + session.readUInt8(ticket + 1);
      session.writeUInt8(session.readUInt8(lastByte) ^ 1, lastByte);
      await connected({ port: keygate.port('p256'), session }, (client) => {
        assert.ok(!client.isSessionReused());
      });
    });

    async function firstSession(version: 'TLSv1.2' | 'TLSv1.3'): Promise<Buffer> {
      const client = await tlsClient({ port: keygate.port('p256'), maxVersion: version });
      assert.ok(!client.isSessionReused());
      const session = await sessionOf(client);
      client.destroy();
      return session;
    }

    /** Kills workers, each replaced before the next, until the connection of `client` breaks. */
    async function killWorkerOf(client: TLSSocket): Promise<void> {
      for (const { slot: worker, pid } of await keygate.workers()) {
        const since = keygate.log.length;
        process.kill(pid, 'SIGKILL');
        await keygate.logged({ event: 'worker_lost', worker }, { since });
        const isAlive = await assertEchoes(client).then(
          () => true,
          () => false,
        );
        if (!isAlive) return;
        await keygate.logged({ event: 'worker_ready', worker }, { since });
      }
      assert.fail('no worker served the connection');
    }
  });
});

/** The ticket, after an echo: in TLS 1.3 it comes after the handshake. */
async function sessionOf(client: TLSSocket): Promise<Buffer> {
  if (client.getProtocol() === 'TLSv1.3') {
    const [[session]] = (await Promise.all([once(client, 'session'), assertEchoes(client)])) as [[Buffer], void];
    return session;
  }
  await assertEchoes(client);
  return client.getSession() ?? assert.fail('no session');
}

/** In OpenSSL's DER of a session element 10 is the ticket, as an OCTET STRING; ours is of 64 to 125 bytes. */
const isTicket = ([element, elementBytes = 0, type, bytes = 0]: Uint8Array): boolean =>
  element === 0xaa && type === 0x04 && bytes >= 64 && elementBytes < 128 && elementBytes === bytes + 2;

/** The same groups under the names that OpenSSL takes. */
const opensslNames = {
  X25519MLKEM768: 'X25519MLKEM768',
  X25519: 'X25519',
  secp256r1: 'P-256',
  secp384r1: 'P-384',
} as const;

function keyExchangeGroup(client: TLSSocket): string | undefined {
  const { name } = client.getEphemeralKeyInfo() as { name?: string };
  return name === 'prime256v1' ? 'secp256r1' : name;
}

/** The random of a ServerHello that is a HelloRetryRequest (RFC 8446 4.1.3). */
const helloRetryRandom = Buffer.from('cf21ad74e59a6111be1d8c021e65b891c2a211167abb8c5e079e09e2c8a8339c', 'hex');
