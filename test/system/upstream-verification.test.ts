/**
 * Owns: that a server is accepted when everything that can be checked is right, and what DNS' word about it does (DANE): every usage of
 * TLSA records, answers of every kind, records and resolvers that change.
 * Must not know: how certificates are verified (engine/src/verify), what else is wrong with bad ones (bad-certificates.test.ts).
 * Runs: against real `keygate serve` processes on SoftHSM; `openssl s_server`, and a signed zone of nsd behind unbound.
 */
import assert from 'node:assert/strict';
import { createHash, generateKeyPairSync, X509Certificate } from 'node:crypto';
import { readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { after, before, describe, it } from 'node:test';
import { lookUpTlsa } from '../../src/worker/dns.ts';
import { createAuthority, daysFromNow } from '../support/authority.ts';
import type { Authority, LeafOptions } from '../support/authority.ts';
import { startDaemon } from '../support/daemon.ts';
import { startKeygate } from '../support/keygate.ts';
import type { Keygate } from '../support/keygate.ts';
import { provisionedToken } from '../support/provisioned-token.ts';
import type { ProvisionedToken } from '../support/provisioned-token.ts';
import { signedZones, zoneOf } from '../support/signed-zones.ts';
import type { SignedZones, ZoneKind } from '../support/signed-zones.ts';
import { logList, TransparencyLog } from '../support/transparency-log.ts';
import { until } from '../support/until.ts';
import { webClients } from '../support/web-clients.ts';
import { webServers } from '../support/web-servers.ts';
import type { Identity } from '../support/web-servers.ts';

interface Situation {
  /** The server's certificate, of the authority that is trusted unless `tls` says otherwise. */
  readonly leaf?: LeafOptions;
  /** The zone that the server's name is in; default: `secure`. */
  readonly zone?: ZoneKind;
  /** In the zone, for the server's port. */
  readonly records: (about: About) => readonly string[];
  /** Settings of the upstream. */
  readonly tls?: object;
  /** The third word of the close reason; undefined: it is accepted. */
  readonly refused?: string;
}

/** Data of TLSA records (RFC 6698 2.1) that fit to the server. */
interface About {
  readonly key: string;
  readonly certificate: string;
  readonly issuerKey: string;
  readonly issuerCertificate: string;
}

const nobody = `1 1 ${'00'.repeat(32)}`;
const strangers = { roots: 'strangers.pem' };
const gone: LeafOptions = { notBefore: daysFromNow(-20), notAfter: daysFromNow(-1), names: ['www.other.test'] };

const situations: Readonly<Record<string, Situation>> = {
  'usage 0 fits to an issuer that PKIX trusts': { records: ({ issuerKey }) => [`0 ${issuerKey}`] },
  'usage 0 fits to an issuer that PKIX does not trust': {
    records: ({ issuerKey }) => [`0 ${issuerKey}`],
    tls: strangers,
    refused: 'unknown_issuer',
  },
  'usage 0 fits to the leaf, which is no issuer': { records: ({ key }) => [`0 ${key}`], refused: 'tlsa_mismatch' },
  'usage 1 fits to a leaf that PKIX trusts': { records: ({ certificate }) => [`1 ${certificate}`] },
  'usage 1 fits to a leaf that PKIX does not trust': {
    records: ({ key }) => [`1 ${key}`],
    tls: strangers,
    refused: 'unknown_issuer',
  },
  'usage 1 fits to nothing': { records: () => [`1 ${nobody}`], refused: 'tlsa_mismatch' },
  'usage 2 fits to an issuer that nobody else trusts': {
    records: ({ issuerKey }) => [`2 ${issuerKey}`],
    tls: strangers,
  },
  'usage 2 fits to an issuer, by its certificate': {
    records: ({ issuerCertificate }) => [`2 ${issuerCertificate}`],
    tls: strangers,
  },
  'usage 2 fits, and the certificate is for another name': {
    leaf: { names: ['www.other.test'] },
    records: ({ issuerKey }) => [`2 ${issuerKey}`],
    refused: 'wrong_name',
  },
  'usage 2 fits to nothing': { records: () => [`2 ${nobody}`], refused: 'tlsa_mismatch' },
  'usage 3 fits to a leaf that nobody trusts, of another name and out of date': {
    leaf: gone,
    records: ({ key }) => [`3 ${key}`],
    tls: strangers,
  },
  'usage 3 fits by the whole certificate': { records: ({ certificate }) => [`3 ${certificate}`] },
  'usage 3 fits to nothing': { records: () => [`3 ${nobody}`], refused: 'tlsa_mismatch' },
  'one of two records fits': { records: ({ key }) => [`3 ${nobody}`, `3 ${key}`], tls: strangers },
  'one of four usages fits': {
    records: ({ issuerKey }) => [`3 ${nobody}`, `2 ${nobody}`, `1 ${nobody}`, `0 ${issuerKey}`],
  },
  'it is proved that there is no such name (NXDOMAIN)': { records: () => [], refused: 'tlsa_missing' },
  'it is proved that the name has no such record (NODATA)': { records: () => ['TXT'], refused: 'tlsa_missing' },
  'there are only records of usages that nobody knows': {
    records: ({ key }) => [`4 ${key}`],
    refused: 'tlsa_missing',
  },
  'it is proved that a zone below a signed one is not signed': {
    zone: 'delegated',
    records: ({ key }) => [`3 ${key}`],
    refused: 'tlsa_insecure',
  },
  'the zone is not signed': { zone: 'insecure', records: ({ key }) => [`3 ${key}`], refused: 'tlsa_insecure' },
  'the record was changed after it was signed': {
    zone: 'bogus',
    records: ({ key }) => [`3 ${key}`],
    refused: 'tlsa_unavailable',
  },
};

describe('a server is', { timeout: 110_000 }, () => {
  const fixtures = new AsyncDisposableStack();
  const logs = ['one', 'two'].map((operator) => new TransparencyLog(operator));
  let token: ProvisionedToken;
  let authority: Authority;
  let zones: SignedZones;
  let keygate: Keygate;

  before(async () => {
    token = fixtures.use(await provisionedToken({ p256: { kind: 'p256' } }));
    authority = await createAuthority();
    zones = fixtures.use(await signedZones());
    write('roots.pem', authority.rootPem);
    write('strangers.pem', (await createAuthority('Stranger')).rootPem);
    write('logs.json', logList(logs));
    write('revoked.pem', await authority.revoke('1234'));

    const identities = await Promise.all(
      Object.values(situations).map(async ({ leaf, zone }, index) => issued(`${index}`, leaf, zone)),
    );
    const servers = fixtures.use(await webServers['openssl s_server'].start(token.directory, identities));
    for (const kind of ['secure', 'insecure', 'bogus', 'delegated'] as const) {
      zones.publish(
        kind,
        Object.values(situations).flatMap(({ zone = 'secure', records }, index) =>
          zone === kind ? linesOf(servers.addresses[index], records(about(identities[index]))) : [],
        ),
      );
    }
    const known = linesOf(servers.addresses[0], ['']).join('').split(' ', 1)[0];
    await until('zone that is served', async () => holds(`${known}.secure.test`));
    keygate = await started(
      Object.fromEntries(
        Object.values(situations).map(({ zone = 'secure', tls = {} }, index) => [
          index,
          { servers: [servers.addresses[index]], tls: { name: `www.${zoneOf(zone)}`, dane: 'enforce', ...tls } },
        ]),
      ),
    );
  });
  after(async () => fixtures.disposeAsync());

  for (const [index, [what, { refused }]] of Object.entries(situations).entries()) {
    it(`${refused === undefined ? 'accepted' : `refused with ${refused}`} when ${what}`, async () => {
      const earlier = await keygate.closes();
      assert.equal(await isAnswered(keygate, String(index)), refused === undefined);
      if (refused !== undefined) await keygate.closed(`upstream/handshake/${refused}`, { before: earlier });
    });
  }

  it('accepted when everything that can be checked is right', async () => {
    const identity = await issued('right', { logs });
    const server = await serverOf(identity);
    await publish(server, [`1 ${about(identity).key}`]);
    const issuer = new X509Certificate(authority.intermediatePem);
    const right = await started({
      web: {
        servers: [server.address],
        tls: {
          name: 'www.secure.test',
          crls: ['revoked.pem'],
          pins: [`sha256/${createHash('sha256').update(spkiOf(issuer)).digest('base64')}`],
          dane: 'enforce',
          transparency: 'enforce',
        },
      },
    });
    assert.equal(await isAnswered(right), true);
    assert.equal(await right.metric('keygate_upstream_certificates_accepted_total', { upstream: 'web' }), 1);
  });

  it('known by its record alone, and follows the record without a reload, resumed sessions too', async () => {
    const identity = await issued('alone', gone);
    const server = await serverOf(identity);
    await publish(server, [`3 ${about(identity).key}`]);
    const alone = await started(daneTo(server));
    assert.equal(await isAnswered(alone), true);
    assert.equal(await isAnswered(alone), true);
    assert.equal(await alone.metric('keygate_upstream_handshake_seconds_count', { resumed: 'true' }), 1);

    await publish(server, [`3 ${nobody}`]);
    await alone.logged({ event: 'tlsa_changed', answer: 'secure, 3 1 1 00000000...' }, { deadlineMs: 20_000 });
    assert.equal(await isAnswered(alone), false);
    await alone.closed('upstream/handshake/tlsa_mismatch');
    await publish(server, [`3 ${about(identity).key}`]);
    await until('answer', async () => isAnswered(alone), { deadlineMs: 20_000 });
  });

  it('never refused while its key is replaced as RFC 7671 8.1 has it: both records, then the key, then one record', async () => {
    const [old, next] = [await issued('old', gone), await issued('next', gone)];
    let server = await serverOf(old);
    await publish(server, [`3 ${about(old).key}`]);
    const rolling = await started(daneTo(server));
    assert.equal(await isAnswered(rolling), true);

    let since = rolling.log.length;
    await publish(server, [`3 ${about(old).key}`, `3 ${about(next).key}`]);
    await rolling.logged({ event: 'tlsa_changed' }, { since, deadlineMs: 20_000 });
    assert.equal(await isAnswered(rolling), true);
    await server.end();
    server = await serverOf(next, server.port);
    assert.equal(await isAnswered(rolling), true);

    since = rolling.log.length;
    await publish(server, [`3 ${about(next).key}`]);
    await rolling.logged({ event: 'tlsa_changed' }, { since, deadlineMs: 20_000 });
    assert.equal(await isAnswered(rolling), true);
    assert.equal((await rolling.closes())['upstream/handshake/tlsa_mismatch'], undefined);

    await server.end();
    await serverOf(old, server.port);
    assert.equal(await isAnswered(rolling), false);
    await rolling.closed('upstream/handshake/tlsa_mismatch');
  });

  it('refused when the resolver does not validate, and when it is gone from the start', async () => {
    const identity = await issued('blind');
    const server = await serverOf(identity);
    await publish(server, [`3 ${about(identity).key}`]);
    await zones.stopResolver();
    const blind = await started(daneTo(server));
    assert.equal(await isAnswered(blind), false);
    await blind.closed('upstream/handshake/tlsa_unavailable');

    await zones.startResolver({ validates: false });
    const credulous = await started(daneTo(server));
    assert.equal(await isAnswered(credulous), false);
    await credulous.closed('upstream/handshake/tlsa_insecure');
    // The keygate from before has asked again by then, and is not fooled either.
    await blind.logged(
      { event: 'tlsa_changed', answer: 'insecure; the last answer was insecure' },
      { deadlineMs: 20_000 },
    );
    assert.equal(await isAnswered(blind), false);

    await zones.stopResolver();
    await zones.startResolver();
    await until('answer', async () => isAnswered(credulous), { deadlineMs: 20_000 });
  });

  async function issued(name: string, leaf?: LeafOptions, zone: ZoneKind = 'secure'): Promise<Identity> {
    const { publicKey, privateKey } = generateKeyPairSync('ec', { namedCurve: 'P-256' });
    const certificate = await authority.issue(publicKey, { names: [`www.${zoneOf(zone)}`], ...leaf });
    const key = write(`${name}.key`, privateKey.export({ type: 'pkcs8', format: 'pem' }));
    return { name, key, chain: write(`${name}.pem`, `${certificate}\n${authority.intermediatePem}\n`) };
  }

  /** Beside the token. */
  function write(file: string, text: string | Buffer): string {
    const path = join(token.directory, file);
    writeFileSync(path, text);
    return path;
  }

  function about(identity: Identity | undefined): About {
    const leaf = new X509Certificate(readFileSync(identity?.chain ?? ''));
    const issuer = new X509Certificate(authority.intermediatePem);
    return {
      key: `1 1 ${sha256(spkiOf(leaf))}`,
      certificate: `0 1 ${sha256(leaf.raw)}`,
      issuerKey: `1 1 ${sha256(spkiOf(issuer))}`,
      issuerCertificate: `0 1 ${sha256(issuer.raw)}`,
    };
  }

  /** One whose certificate can be replaced: another one at its port. */
  async function serverOf({ chain, key }: Identity, port = 0) {
    const daemon = fixtures.use(
      await startDaemon(
        'openssl',
        ['s_server', '-accept', `127.0.0.1:${port}`, '-www', '-cert', chain, '-cert_chain', chain, '-key', key],
        ({ said }) => /^ACCEPT/m.test(said),
      ),
    );
    // It tells a port that it was not given.
    const bound = port === 0 ? Number(/^ACCEPT .*:(\d+)$/m.exec(daemon.said)?.[1]) : port;
    return { address: `127.0.0.1:${bound}`, port: bound, end: daemon.end };
  }

  async function publish({ address }: { readonly address: string }, records: readonly string[]): Promise<void> {
    const lines = linesOf(address, records);
    zones.publish('secure', lines);
    await until('records', async () => {
      const answer = await lookUpTlsa(zones.resolver, `${lines[0]?.split(' ', 1)[0]}.secure.test`);
      const data = answer.state === 'secure' ? answer.records.map((record) => record.data.toString('hex')) : [];
      return data.length === records.length && records.every((record) => data.includes(record.split(' ')[3] ?? ''));
    });
  }

  async function holds(name: string): Promise<boolean> {
    const answer = await lookUpTlsa(zones.resolver, name);
    return answer.state === 'secure' && answer.records.length > 0;
  }

  const daneTo = ({ address }: { readonly address: string }) => ({
    web: { servers: [address], tls: { name: 'www.secure.test', dane: 'enforce' } },
  });

  /** With a listener for each upstream. */
  async function started(
    upstreams: Readonly<Record<string, { readonly servers: readonly unknown[]; readonly tls: object }>>,
  ): Promise<Keygate> {
    return fixtures.use(
      await startKeygate(token, {
        drainDeadline: '0s',
        dns: { resolver: `127.0.0.1:${zones.resolver.address.port}` },
        transparency: { logs: 'logs.json' },
        upstreams: Object.fromEntries(
          Object.entries(upstreams).map(([name, upstream]) => [
            name,
            { ...upstream, tls: { roots: 'roots.pem', ...upstream.tls } },
          ]),
        ),
        listeners: Object.fromEntries(
          Object.keys(upstreams).map((name) => [name, { mode: 'encrypt', upstream: name, certificates: undefined }]),
        ),
      }),
    );
  }

  async function isAnswered(by: Keygate, listener = 'web'): Promise<boolean> {
    const page = await webClients.Node.plain?.({ port: by.port(listener), name: 'localhost', path: '/' }).catch(String);
    return webServers['openssl s_server'].seen(page ?? '') !== undefined;
  }
});

/** Of a zone file, for the server's port of `www`; `TXT`: a record of another type. */
function linesOf(address: string | undefined, records: readonly string[]): string[] {
  const name = `_${address?.split(':')[1]}._tcp.www`;
  return records.map((record) => (record === 'TXT' ? `${name} IN TXT "no TLSA"` : `${name} IN TLSA ${record}`));
}

function spkiOf({ publicKey }: X509Certificate): Buffer {
  return publicKey.export({ format: 'der', type: 'spki' });
}

function sha256(bytes: Buffer): string {
  return createHash('sha256').update(bytes).digest('hex');
}
