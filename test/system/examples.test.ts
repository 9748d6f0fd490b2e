/**
 * Owns: the examples of configurations that are shipped: each is loaded as it stands, serves, and does what it is an example of.
 * Must not know: what keygate does in every case.
 * Runs: against real `keygate serve` processes with the example's text, but for addresses, and the places of what is not on this machine.
 */
import assert from 'node:assert/strict';
import { createHash, generateKeyPairSync, X509Certificate } from 'node:crypto';
import { once } from 'node:events';
import { mkdirSync, readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { connect } from 'node:net';
import type { AddressInfo, Socket } from 'node:net';
import { join } from 'node:path';
import { text } from 'node:stream/consumers';
import { after, before, describe, it } from 'node:test';
import { connect as connectTls, createServer } from 'node:tls';
import { parse } from 'yaml';
import { parseConfig } from '../../src/config/load.ts';
import { createSigningRequest } from '../../src/pkcs11/issue.ts';
import { findPrivateKey } from '../../src/pkcs11/keys.ts';
import { generateTicketKey } from '../../src/pkcs11/provision.ts';
import { lookUpTlsa } from '../../src/worker/dns.ts';
import { createAuthority } from '../support/authority.ts';
import type { Authority } from '../support/authority.ts';
import { startDaemon } from '../support/daemon.ts';
import { startKeygate } from '../support/keygate.ts';
import type { Keygate, KeygateDocument, LaunchOptions } from '../support/keygate.ts';
import { addresses, Network, whyNoNetwork } from '../support/network.ts';
import { ocspAuthority } from '../support/ocsp-authority.ts';
import { provisionedToken } from '../support/provisioned-token.ts';
import type { ProvisionedToken } from '../support/provisioned-token.ts';
import { signedZones } from '../support/signed-zones.ts';
import { assertEchoes, program, rawClient, refusalOf, tlsClient } from '../support/tls-client.ts';
import type { TlsOptions } from '../support/tls-client.ts';
import { logList, TransparencyLog } from '../support/transparency-log.ts';
import { until } from '../support/until.ts';
import { echoUpstream, proxyUpstream, tcpUpstream } from '../support/upstream.ts';

const root = join(import.meta.dirname, '../..');
const directory = join(root, 'native-config/examples');
const read = (path: string): string => readFileSync(join(root, path), 'utf8');

/** ExtendedKeyUsage, RFC 5280 4.2.1.12. */
const clientAuth = '1.3.6.1.5.5.7.3.2';
const names = ['www', 'api', 'v1.api', 'old', 'a.mail', 'service', 'internal', 'partner', 'public'].map(
  (label) => `${label}.example.org`,
);

describe('an example that is shipped', { timeout: 110_000 }, () => {
  const fixtures = new AsyncDisposableStack();
  const run = new Set<string>();
  let token: ProvisionedToken;
  let authority: Authority;

  before(async () => {
    // The token's label and the names of keys, certificates and files are those of the examples.
    token = fixtures.use(
      await provisionedToken(
        {
          www: { kind: 'p256', dns: names },
          far: { kind: 'p256', dns: ['far.example.org'] },
          near: { kind: 'p256', dns: ['near.example.org'], purpose: 'client' },
          client: { kind: 'p256', dns: ['client.example.org'], purpose: 'client' },
        },
        'keygate',
      ),
    );
    await token.use((open) => generateTicketKey(open, 'tickets'));
    authority = await createAuthority();
    for (const file of ['internal-roots.pem', 'internal-ca.pem', 'clients-ca.pem']) beside(file, authority.rootPem);
    for (const file of ['internal-ca.crl', 'clients-ca.crl']) beside(file, await authority.revoke('1234'));
  });
  after(async () => fixtures.disposeAsync());

  it('offload.yaml routes by name and protocol', async () => {
    const servers = { web: '10.0.0.1:8080', again: '10.0.0.2:8080', api: '10.0.0.3:8080', grpc: '10.0.0.4:8080' };
    const keygate = await started('offload.yaml', await eachSays(servers));
    assert.match(
      await said(keygate, { servername: 'www.example.org', ALPNProtocols: ['http/1.1'] }),
      /^(?:web|again)$/,
    );
    assert.equal(await said(keygate, { servername: 'api.example.org', ALPNProtocols: ['h2'] }), 'api');
    assert.equal(await said(keygate, { servername: 'v1.api.example.org' }), 'api');
    assert.equal(await said(keygate, { servername: 'www.example.org', ALPNProtocols: ['h2'] }), 'grpc');
    assert.equal(await said(keygate, { servername: 'old.example.org' }), '');
  });

  it('encrypt.yaml takes plaintext to a server that is verified', async () => {
    const keygate = await started(
      'encrypt.yaml',
      { 'service.example.org:443': await secure('service') },
      (document) => {
        // The certificates of this host do not vouch for the test's.
        tlsOf(document, 'service')['roots'] = 'internal-roots.pem';
      },
    );
    assert.equal(await saidInTheClear(keygate, 'local'), 'service');
  });

  it('bridge.yaml shows its own certificate to clients, and another one to the server', async () => {
    const keygate = await started('bridge.yaml', {
      '10.0.0.1:8443': await secure('web', { names: ['web.internal.example'], requestCert: true }),
    });
    const answer = await said(keygate, { servername: 'www.example.org', ALPNProtocols: ['http/1.1'] });
    assert.equal(answer, 'web, asked by client.example.org');
  });

  it('passthrough.yaml leaves TLS to the servers', async () => {
    const keygate = await started('passthrough.yaml', {
      '10.0.0.1:443': await secure('web'),
      '10.0.0.2:443': await secure('mail'),
    });
    const ca = authority.rootPem;
    assert.equal(await said(keygate, { servername: 'www.example.org', ca }), 'web');
    assert.equal(await said(keygate, { servername: 'a.mail.example.org', ca }), 'mail');
  });

  it('client-certificates.yaml lets in whom the authority knows, and routes them', async () => {
    const keygate = await started(
      'client-certificates.yaml',
      await eachSays({ web: '10.0.0.1:8080', billing: '10.0.0.2:8080' }),
    );
    const servername = 'www.example.org';
    const as = async (identity: string) =>
      said(keygate, { servername, ...(await clientOf(`spiffe://example.org/ns/${identity}`)) });
    assert.equal(await as('prod/sa/billing'), 'billing');
    assert.equal(await as('prod/sa/shipping'), 'web');
    await said(keygate, { servername }).catch(() => {});
    await keygate.closed('client/handshake/certificate_required');
    await as('test/sa/billing').catch(() => {});
    await keygate.closed('client/handshake/certificate_not_allowed');
  });

  it('tunnel-near.yaml and tunnel-far.yaml make a tunnel that nobody else can enter or end', async () => {
    const service = fixtures.use(await echoUpstream());
    const far = await started('tunnel-far.yaml', { '127.0.0.1:6379': service.address });
    const near = await started('tunnel-near.yaml', { 'far.example.org:8443': `127.0.0.1:${far.port('tunnel')}` });
    const client = await rawClient(near.port('local'));
    await assertEchoes(client, 'x'.repeat(10_000));
    client.destroy();

    await said(far, { servername: 'far.example.org', maxVersion: 'TLSv1.3' }, 'far').catch(() => {});
    await far.closed('client/handshake/certificate_required');
    const stranger = await clientOf('spiffe://example.org/ns/prod/sa/stranger');
    await said(far, { servername: 'far.example.org', ...stranger }, 'far').catch(() => {});
    await far.closed('client/handshake/certificate_unknown_issuer');
    assert.equal(
      await refusalOf({ port: far.port('tunnel'), maxVersion: 'TLSv1.2' }),
      'ERR_SSL_TLSV1_ALERT_PROTOCOL_VERSION',
    );

    const impostor = await secure('impostor', { names: ['far.example.org'] });
    const deceived = await started('tunnel-near.yaml', { 'far.example.org:8443': impostor });
    assert.equal(await saidInTheClear(deceived, 'local').catch(() => ''), '');
    await deceived.closed('upstream/handshake/unknown_issuer');
  });

  it('policies.yaml says for each listener what it negotiates', async () => {
    const keygate = await started('policies.yaml', await eachSays({ web: '10.0.0.1:8080' }));
    const to = (listener: string) => ({ port: keygate.port(listener), servername: 'www.example.org' });
    assert.equal(await said(keygate, { ...to('public'), maxVersion: 'TLSv1.2' }), 'web');
    assert.equal(await said(keygate, to('internal')), 'web');
    for (const [refused, code] of [
      [{ maxVersion: 'TLSv1.2' }, 'ERR_SSL_TLSV1_ALERT_PROTOCOL_VERSION'],
      [{ ciphers: 'TLS_AES_128_GCM_SHA256' }, 'ERR_SSL_SSL/TLS_ALERT_HANDSHAKE_FAILURE'],
      [{ ecdhCurve: 'X25519' }, 'ERR_SSL_SSL/TLS_ALERT_HANDSHAKE_FAILURE'],
      [{ sigalgs: 'rsa_pss_rsae_sha512' }, 'ERR_SSL_SSL/TLS_ALERT_HANDSHAKE_FAILURE'],
    ] as const)
      assert.equal(await refusalOf({ ...to('internal'), ...refused }), code);
    const partner = await clientOf('spiffe://example.org/ns/partners');
    assert.equal(await said(keygate, { ...to('partners'), ...partner }), 'web');
    await said(keygate, to('partners')).catch(() => {});
    await keygate.closed('client/handshake/certificate_required');
  });

  it('proxy-in.yaml believes what a proxy says, and tells the service', async () => {
    const service = fixtures.use(await proxyUpstream());
    const keygate = await started('proxy-in.yaml', { '10.0.0.1:8080': service.address }, ({ listeners }) => {
      const { proxyProtocol } = listeners['https'] as { proxyProtocol: { from: string[] } };
      proxyProtocol.from.push('127.0.0.1');
    });
    const next = service.nextHeader();
    const raw = await rawClient(keygate.port());
    raw.write('PROXY TCP4 192.0.2.1 198.51.100.7 56324 443\r\n');
    const client = connectTls({ socket: raw, servername: 'www.example.org', ca: token.pem('www') });
    await once(client, 'secureConnect');
    await assertEchoes(client);
    const { source, sourcePort, destination } = await next;
    assert.deepEqual(
      { source, sourcePort, destination },
      {
        source: '192.0.2.1',
        sourcePort: 56_324,
        destination: '198.51.100.7',
      },
    );
    client.destroy();
  });

  it('transparent.yaml stands unseen between clients and servers', { skip: whyNoNetwork() }, async () => {
    using network = new Network();
    network.routes('up');
    network.use('tproxy');
    const [netns = '', ...inside] = network.on('server');
    const site = join(token.directory, 'site');
    mkdirSync(site);
    beside('site/index.html', 'from the server');
    await using server = await startDaemon(
      netns,
      [...inside, 'python3', '-u', '-m', 'http.server', '443', '--directory', site],
      (daemon) => daemon.said.includes('Serving HTTP'),
    );
    await using keygate = await start(
      'transparent.yaml',
      {},
      (document) => Object.assign(document, { admin: { listen: `unix:${join(token.directory, 'admin.sock')}` } }),
      { launcher: network.on('keygate') },
    );
    assert.equal(keygate.port(), 8443);
    const [ip = '', ...client] = network.on('client');
    const to = `www.example.org:443:${addresses.server.ipv4}:443`;
    const { output } = await program(
      ip,
      [
        ...client,
        'curl',
        '-sS',
        '--noproxy',
        '*',
        '--cacert',
        'www.pem',
        '--connect-to',
        to,
        'https://www.example.org/',
      ].map((arg) => (arg === 'www.pem' ? join(token.directory, arg) : arg)),
    );
    assert.equal(output, 'from the server');
    assert.ok(server.said.includes(`${addresses.client.ipv4} - - `), server.said);
  });

  it('upstream-verification.yaml accepts servers that are what they should be', async () => {
    const zones = fixtures.use(await signedZones());
    const logs = ['one', 'two'].map((operator) => new TransparencyLog(operator));
    beside('log_list.json', logList(logs));
    const partner = await secure('partner', { names: ['www.secure.test'] });
    const leaf = new X509Certificate(leaves.get(partner) ?? '');
    const name = `_${partner.split(':')[1]}._tcp.www`;
    zones.publish('secure', [`${name} IN TLSA 3 1 1 ${spkiDigest(leaf).toString('hex')}`]);
    await until('record', async () => {
      const answer = await lookUpTlsa(zones.resolver, `${name}.secure.test`);
      return answer.state === 'secure' && answer.records.length > 0;
    });
    const keygate = await started(
      'upstream-verification.yaml',
      {
        'internal.example.org:443': await secure('internal'),
        'partner.example.org:443': partner,
        'public.example.org:443': await secure('public', { logs }),
        '127.0.0.1:53': `127.0.0.1:${zones.resolver.address.port}`,
      },
      (document) => {
        const issuer = new X509Certificate(authority.intermediatePem);
        tlsOf(document, 'internal')['pins'] = [`sha256/${spkiDigest(issuer).toString('base64')}`];
        tlsOf(document, 'partner')['name'] = 'www.secure.test';
        tlsOf(document, 'public')['roots'] = 'internal-roots.pem';
      },
    );
    for (const listener of ['internal', 'partner', 'public']) {
      assert.equal(await saidInTheClear(keygate, listener), listener);
    }
    const { engine } = await keygate.status();
    for (const { name: upstream, findings } of engine.upstreams) {
      assert.deepEqual(
        findings.filter(({ refused, reported }) => refused + reported > 0),
        [],
        upstream,
      );
    }
  });

  it('ocsp-stapling.yaml gives clients the status of the certificate', async (test) => {
    const issuer = ocspAuthority(test);
    const responder = await issuer.startResponder();
    const request = await token.use(async (open) =>
      createSigningRequest(open, findPrivateKey(open, { object: 'www' }), { dns: names, ip: [] }),
    );
    const leaf = issuer.issue(request, { responder: `http://127.0.0.1:${responder.port}/` });
    const selfSigned = token.pem('www');
    beside('www.pem', `${leaf}${issuer.certificate}`);
    try {
      mkdirSync(join(token.directory, 'ocsp'));
      const places = await eachSays({ web: '10.0.0.1:8080' });
      await using keygate = await start('ocsp-stapling.yaml', places, (document) => {
        (document['ocsp'] as Record<string, string>)['cache'] = 'ocsp';
      });
      await keygate.logged({ event: 'ocsp_stapled', certificate: 'www' });
      const trust = ['-CAfile', join(issuer.directory, 'issuer.pem'), '-verify_return_error'];
      const { output } = await program('openssl', [
        's_client',
        '-connect',
        `127.0.0.1:${keygate.port()}`,
        '-status',
        ...trust,
      ]);
      assert.match(output, /Cert Status: good/);
    } finally {
      beside('www.pem', selfSigned);
    }
  });

  it('fleet-tickets.yaml makes one keygate resume the TLS sessions of another', async () => {
    const echo = fixtures.use(await echoUpstream());
    const places = { '10.0.0.1:8080': echo.address };
    const [one, other] = [await started('fleet-tickets.yaml', places), await started('fleet-tickets.yaml', places)];
    const options = { servername: 'www.example.org', ca: token.pem('www') };
    const first = await tlsClient({ port: one.port(), ...options });
    const [[session]] = (await Promise.all([once(first, 'session'), assertEchoes(first)])) as [[Buffer], void];
    first.destroy();
    const second = await tlsClient({ port: other.port(), session, ...options });
    await assertEchoes(second);
    assert.ok(second.isSessionReused());
    second.destroy();
  });

  it('is run by a test above, and shown in docs/ or linked from README.md', () => {
    assert.deepEqual([...run].toSorted(), readdirSync(directory).toSorted());
    const [pages, readme] = [read('docs/modes.md') + read('docs/tls.md'), read('README.md')];
    for (const file of run) {
      const shown = `\`\`\`yaml\n${read(`native-config/examples/${file}`).trimEnd()}\n\`\`\``;
      const link = `](native-config/examples/${file})`;
      assert.ok(pages.includes(shown) || readme.includes(link), `${file} is in neither`);
    }
    const shown = [...pages.matchAll(/```yaml\n([^`]*)```/g)].map(([, example]) => example);
    const all = readdirSync(directory).map((file) => read(`native-config/examples/${file}`));
    for (const example of shown) assert.ok(all.includes(example ?? ''), `no example is\n${example}`);
  });

  /** As `start`; it stops with the test. */
  async function started(...args: Parameters<typeof start>): Promise<Keygate> {
    return fixtures.use(await start(...args));
  }

  /**
   * The example, on free ports of this machine.
   * @param places where its servers are here
   * @param adapt what else cannot be the same here
   */
  async function start(
    file: string,
    places: Readonly<Record<string, string>>,
    adapt: (document: ExampleDocument) => void = unchanged,
    options: LaunchOptions = {},
  ): Promise<Keygate> {
    run.add(file);
    parseConfig(read(`native-config/examples/${file}`), join(directory, file));
    const document = parse(read(`native-config/examples/${file}`)) as ExampleDocument;
    for (const upstream of Object.values(document.upstreams)) {
      const [first = ''] = upstream.servers;
      upstream.servers = upstream.servers.map((server) => (server === 'original' ? server : placeOf(server, places)));
      // Servers that are here have no name but the one that they had.
      if (upstream.tls !== undefined) upstream.tls['name'] ??= first.slice(0, first.lastIndexOf(':'));
      // Those that end at the first byte read no PROXY header; proxy-in.yaml is about it.
      if (file !== 'proxy-in.yaml') delete upstream.proxyProtocol;
    }
    const { dns } = document;
    if (dns !== undefined) dns.resolver = placeOf(dns.resolver, places);
    for (const [name, listener] of Object.entries(document.listeners)) {
      if (listener['transparent'] !== true) listener['bind'] = ['127.0.0.1:0'];
      document.listeners[name] = { certificates: undefined, upstream: undefined, ...listener };
    }
    adapt(document);
    return startKeygate(token, { tokens: {}, certificates: {}, drainDeadline: '0s', ...document }, options);
  }

  /** Beside the configuration, where the examples have their files. */
  function beside(file: string, content: string): void {
    writeFileSync(join(token.directory, file), content);
  }

  /** By the address that an example has. */
  async function eachSays(servers: Readonly<Record<string, string>>): Promise<Record<string, string>> {
    const places: Record<string, string> = {};
    for (const [name, address] of Object.entries(servers)) {
      places[address] = fixtures.use(await tcpUpstream((socket) => answer(socket, name))).address;
    }
    return places;
  }

  /** A TLS server with a certificate of the authority, that says its name and who asks. */
  async function secure(
    name: string,
    {
      requestCert = false,
      ...leafOptions
    }: Parameters<Authority['issue']>[1] & { readonly requestCert?: boolean } = {},
  ): Promise<string> {
    const { publicKey, privateKey } = generateKeyPairSync('ec', { namedCurve: 'P-256' });
    const leaf = await authority.issue(publicKey, { names, ...leafOptions });
    const server = createServer(
      {
        cert: `${leaf}\n${authority.intermediatePem}`,
        key: privateKey.export({ type: 'pkcs8', format: 'pem' }),
        ALPNProtocols: ['http/1.1'],
        requestCert,
        rejectUnauthorized: false,
      },
      (socket) => {
        const { subject } = requestCert ? socket.getPeerCertificate() : {};
        answer(socket, subject === undefined ? name : `${name}, asked by ${String(subject.CN)}`);
      },
    );
    server.on('tlsClientError', () => {});
    server.listen(0, '127.0.0.1');
    await once(server, 'listening');
    fixtures.defer(() => void server.close());
    const address = `127.0.0.1:${(server.address() as AddressInfo).port}`;
    leaves.set(address, leaf);
    return address;
  }

  async function clientOf(uri: string): Promise<Pick<TlsOptions, 'cert' | 'key'>> {
    const { publicKey, privateKey } = generateKeyPairSync('ec', { namedCurve: 'P-256' });
    const leaf = await authority.issue(publicKey, { uris: [uri], purpose: clientAuth });
    return {
      cert: `${leaf}\n${authority.intermediatePem}`,
      key: privateKey.export({ type: 'pkcs8', format: 'pem' }),
    };
  }

  /** To a client that trusts `certificate`, unless it says otherwise. */
  async function said(keygate: Keygate, options: Partial<TlsOptions>, certificate = 'www'): Promise<string> {
    const [listener] = Object.keys(keygate.addresses);
    return text(await tlsClient({ port: keygate.port(listener), ca: token.pem(certificate), ...options }));
  }
});

interface ExampleDocument extends KeygateDocument {
  readonly upstreams: Record<string, ExampleUpstream>;
  readonly listeners: Record<string, Record<string, unknown>>;
  readonly dns?: { resolver: string };
}

interface ExampleUpstream {
  servers: string[];
  proxyProtocol?: string;
  readonly tls?: Record<string, unknown>;
}

/** Of each server of the tests, by its address. */
const leaves = new Map<string, string>();

const unchanged = (): void => {};

function placeOf(address: string, places: Readonly<Record<string, string>>): string {
  return places[address] ?? assert.fail(`the test has nothing in the place of ${address}`);
}

function tlsOf({ upstreams }: ExampleDocument, upstream: string): Record<string, unknown> {
  return upstreams[upstream]?.tls ?? assert.fail(`upstream ${upstream} has no tls`);
}

function answer(socket: Socket, name: string): void {
  socket.on('error', () => {});
  socket.resume();
  socket.end(name);
}

async function saidInTheClear(keygate: Keygate, listener: string): Promise<string> {
  const socket = connect({ port: keygate.port(listener), host: '127.0.0.1' });
  await once(socket, 'connect');
  return text(socket);
}

function spkiDigest({ publicKey }: X509Certificate): Buffer {
  return createHash('sha256')
    .update(publicKey.export({ format: 'der', type: 'spki' }))
    .digest();
}
