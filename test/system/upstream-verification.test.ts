/**
 * Owns: that a server with a bad certificate is refused with its own close reason, or only counted where that was asked for:
 * PKIX with revocation and pins, DANE by a signed zone behind a validating resolver, Certificate Transparency.
 * Must not know: how certificates are verified.
 * Runs: against a real `keygate serve` on SoftHSM; servers of Node, OpenSSL's command line, nsd and unbound.
 */
import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { createHash, generateKeyPairSync, X509Certificate } from 'node:crypto';
import type { KeyObject } from 'node:crypto';
import { once } from 'node:events';
import { readFileSync, writeFileSync } from 'node:fs';
import { connect } from 'node:net';
import type { AddressInfo, Socket } from 'node:net';
import { join } from 'node:path';
import { after, before, describe, it } from 'node:test';
import { createServer } from 'node:tls';
import { lookUpTlsa } from '../../src/worker/dns.ts';
import { createAuthority } from '../support/authority.ts';
import type { Authority, LeafOptions } from '../support/authority.ts';
import { startKeygate } from '../support/keygate.ts';
import type { Keygate } from '../support/keygate.ts';
import { provisionedToken } from '../support/provisioned-token.ts';
import type { ProvisionedToken } from '../support/provisioned-token.ts';
import { signedZones } from '../support/signed-zones.ts';
import type { SignedZones } from '../support/signed-zones.ts';
import { logList, TransparencyLog } from '../support/transparency-log.ts';
import { until } from '../support/until.ts';

const name = 'www.secure.test';

describe('the certificate of an upstream server', { timeout: 110_000 }, () => {
  const fixtures = new AsyncDisposableStack();
  const logs = ['one', 'two'].map((operator) => new TransparencyLog(operator));
  let token: ProvisionedToken;
  let authority: Authority;
  let zones: SignedZones;
  /** Writes a file beside the token and gives its path. */
  const file = (called: string, text: string): string => {
    const path = join(token.directory, called);
    writeFileSync(path, text);
    return path;
  };

  before(async () => {
    token = fixtures.use(await provisionedToken({ p256: { kind: 'p256' } }));
    authority = await createAuthority();
    zones = fixtures.use(await signedZones());
    file('roots.pem', authority.rootPem);
    file('logs.json', logList(logs));
    file('revoked.pem', await authority.revoke('1234'));
  });
  after(async () => fixtures.disposeAsync());

  interface Server {
    readonly address: string;
    readonly port: number;
    readonly leaf: X509Certificate;
  }

  /** Echoes, with a certificate of the authority. */
  async function issued(options: LeafOptions = {}): Promise<Server> {
    const { publicKey, privateKey } = generateKeyPairSync('ec', { namedCurve: 'P-256' });
    const leaf = await authority.issue(publicKey, { names: [name], ...options });
    return served(leaf, privateKey, authority.intermediatePem);
  }

  async function served(leaf: string, key: KeyObject | string, issuers = ''): Promise<Server> {
    const pem = typeof key === 'string' ? key : key.export({ type: 'pkcs8', format: 'pem' });
    const server = createServer({ cert: `${leaf}\n${issuers}`, key: pem, ciphers: 'DEFAULT:@SECLEVEL=0' }, (socket) => {
      socket.on('error', () => {});
      socket.pipe(socket);
    });
    server.on('tlsClientError', () => {});
    server.listen(0, '127.0.0.1');
    await once(server, 'listening');
    fixtures.defer(() => void server.close());
    const { port } = server.address() as AddressInfo;
    return { address: `127.0.0.1:${port}`, port, leaf: new X509Certificate(leaf) };
  }

  /** Made by OpenSSL, by itself. */
  async function selfSigned(newkey: string, ...more: readonly string[]): Promise<Server> {
    const key = join(token.directory, 'openssl.key');
    const leaf = execFileSync(
      'openssl',
      ['req', '-x509', '-newkey', ...newkey.split(' '), '-nodes', '-keyout', key, '-subj', '/CN=leaf', '-days', '9']
        .concat(['-addext', `subjectAltName=DNS:${name}`])
        .concat(more),
      { encoding: 'utf8', stdio: ['ignore', 'pipe', 'ignore'] },
    );
    return served(leaf, readFileSync(key, 'utf8'));
  }

  async function started(server: Server, tls: object): Promise<Keygate> {
    const keygate = await startKeygate(token, {
      drainDeadline: '0s',
      dns: { resolver: `127.0.0.1:${zones.resolver.address.port}` },
      transparency: { logs: 'logs.json' },
      upstreams: { web: { servers: [server.address], tls: { name, roots: 'roots.pem', ...tls } } },
      listeners: { https: { mode: 'encrypt', certificates: undefined } },
    });
    fixtures.defer(async () => {
      await keygate.stop();
    });
    return keygate;
  }

  /** @returns whether the server answered. */
  async function isAnswered(keygate: Keygate): Promise<boolean> {
    const client = connect({ port: keygate.port(), host: '127.0.0.1' });
    client.on('error', () => {});
    await once(client, 'connect');
    client.write('x');
    const answered = await firstByte(client);
    client.destroy();
    return answered;
  }

  const finding = async (keygate: Keygate, reason: string, outcome: string) =>
    keygate.metric('keygate_upstream_certificate_findings_total', { upstream: 'web', reason, outcome });

  const tlsaOf = (usage: number, leaf: X509Certificate) =>
    `${usage} 1 1 ${createHash('sha256').update(spkiOf(leaf)).digest('hex')}`;

  /** Publishes the record of a server's port; by then it can be looked up. */
  function publish(server: Server, record?: string): void {
    zones.publish('secure', record === undefined ? [] : [`_${server.port}._tcp.www IN TLSA ${record}`]);
  }

  it('is accepted when everything that can be checked is right', async () => {
    const server = await issued({ logs });
    publish(server, tlsaOf(1, server.leaf));
    await until('record', async () => zoneHolds(zones, `_${server.port}._tcp.www.secure.test`));
    const keygate = await started(server, {
      crls: ['revoked.pem'],
      pins: [pinOf(new X509Certificate(authority.intermediatePem))],
      dane: 'enforce',
      transparency: 'enforce',
    });
    assert.equal(await isAnswered(keygate), true);
    assert.equal(await keygate.metric('keygate_upstream_certificates_accepted_total', { upstream: 'web' }), 1);
  });

  interface Bad {
    readonly what: string;
    readonly server: () => Promise<Server>;
    readonly tls?: object;
    readonly reason: string;
    /** Beside those that TLS itself does not get to with such a key. */
    readonly canBeReported?: false;
    /** What it is published to be. */
    readonly record?: (server: Server) => string;
  }
  const bad: readonly Bad[] = [
    {
      what: 'self-signed',
      server: async () => selfSigned('ec -pkeyopt ec_paramgen_curve:P-256'),
      reason: 'self_signed',
    },
    {
      what: 'with a weak key',
      server: async () => selfSigned('rsa:1024'),
      reason: 'weak_key',
      canBeReported: false,
    },
    {
      what: 'revoked',
      server: async () => issued({ serial: '1234' }),
      tls: { crls: ['revoked.pem'] },
      reason: 'revoked',
    },
    {
      what: 'without a pinned key',
      server: async () => issued(),
      tls: { pins: [`sha256/${Buffer.alloc(32).toString('base64')}`] },
      reason: 'pin_mismatch',
    },
    { what: 'without SCTs', server: async () => issued(), tls: { transparency: 'enforce' }, reason: 'sct_missing' },
    {
      what: 'with SCTs of one operator',
      server: async () => issued({ logs: logs.slice(1) }),
      tls: { transparency: 'enforce' },
      reason: 'sct_insufficient',
    },
    {
      what: 'with another key than its TLSA record says',
      server: async () => issued(),
      tls: { dane: 'enforce' },
      record: () => `3 1 1 ${'00'.repeat(32)}`,
      reason: 'tlsa_mismatch',
    },
    { what: 'without a TLSA record', server: async () => issued(), tls: { dane: 'enforce' }, reason: 'tlsa_missing' },
    {
      what: 'in a zone that is not signed',
      server: async () => issued({ names: ['www.insecure.test'] }),
      tls: { dane: 'enforce', name: 'www.insecure.test' },
      reason: 'tlsa_insecure',
    },
  ];
  for (const { what, server: make, tls = {}, reason, canBeReported, record } of bad) {
    it(`${what} is refused with upstream/handshake/${reason}`, async () => {
      const server = await make();
      publish(server, record?.(server));
      if (record !== undefined)
        await until('record', async () => zoneHolds(zones, `_${server.port}._tcp.www.secure.test`));
      const keygate = await started(server, tls);
      assert.equal(await isAnswered(keygate), false);
      await keygate.closed(`upstream/handshake/${reason}`);
      assert.equal(await finding(keygate, reason, 'refused'), 1);
      await keygate.logged({ event: 'server_certificate', upstream: 'web', reason, refused: 1 });
      await keygate.stop();
      if (canBeReported === false) return;

      const reporting = Object.fromEntries(
        Object.entries(tls).map(([key, value]) => [key, value === 'enforce' ? 'report' : (value as unknown)]),
      );
      const lenient = await started(server, { ...reporting, verify: 'report' });
      assert.equal(await isAnswered(lenient), true);
      assert.equal(await finding(lenient, reason, 'reported'), 1);
      assert.equal(await finding(lenient, reason, 'refused'), 0);
      await lenient.logged({ event: 'server_certificate', upstream: 'web', reason, reported: 1 });
    });
  }

  it('is known by a TLSA record alone, and follows the record without a reload, resumed sessions too', async () => {
    const server = await selfSigned('ec -pkeyopt ec_paramgen_curve:P-256');
    publish(server, tlsaOf(3, server.leaf));
    await until('record', async () => zoneHolds(zones, `_${server.port}._tcp.www.secure.test`));
    const keygate = await started(server, { dane: 'enforce' });
    assert.equal(await isAnswered(keygate), true);
    assert.equal(await isAnswered(keygate), true);
    const resumed = async () => keygate.metric('keygate_upstream_handshake_seconds_count', { resumed: 'true' });
    assert.equal(await resumed(), 1);

    publish(server, `3 1 1 ${'00'.repeat(32)}`);
    await keygate.logged({ event: 'tlsa_changed', answer: 'secure, 3 1 1 00000000...' }, { deadlineMs: 20_000 });
    assert.equal(await isAnswered(keygate), false);
    await keygate.closed('upstream/handshake/tlsa_mismatch');
    publish(server, tlsaOf(3, server.leaf));
    await until('answer', async () => isAnswered(keygate), { deadlineMs: 20_000 });
  });

  it('is not accepted from a forged zone, nor when the resolver is gone from the start', async () => {
    const server = await issued({ names: ['www.bogus.test'] });
    zones.publish('bogus', [`_${server.port}._tcp.www IN TLSA ${tlsaOf(3, server.leaf)}`]);
    const keygate = await started(server, { dane: 'enforce', name: 'www.bogus.test' });
    await until('refusal', async () => !(await isAnswered(keygate)));
    await keygate.closed('upstream/handshake/tlsa_unavailable');
    await keygate.stop();
    await zones.stopResolver();
    const blind = await started(server, { dane: 'enforce', name: 'www.bogus.test' });
    assert.equal(await isAnswered(blind), false);
    await blind.closed('upstream/handshake/tlsa_unavailable');
    await zones.startResolver();
  });
});

function spkiOf({ publicKey }: X509Certificate): Buffer {
  return publicKey.export({ format: 'der', type: 'spki' });
}

function pinOf(certificate: X509Certificate): string {
  return `sha256/${createHash('sha256').update(spkiOf(certificate)).digest('base64')}`;
}

async function zoneHolds(zones: SignedZones, name: string): Promise<boolean> {
  const answer = await lookUpTlsa(zones.resolver, name);
  return answer.state === 'secure' && answer.records.length > 0;
}

async function firstByte(client: Socket): Promise<boolean> {
  const { promise, resolve } = Promise.withResolvers<boolean>();
  client.once('data', () => resolve(true));
  client.once('close', () => resolve(false));
  return promise;
}
