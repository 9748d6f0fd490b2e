/**
 * Owns: what each mode of a listener does with the ends of a connection, where connections are routed to, what becomes of servers with
 * which TLS cannot be spoken.
 * Must not know: how; who the peers are (matrix.test.ts), what is wrong with certificates (bad-certificates.test.ts).
 * Runs: against real `keygate serve` processes on SoftHSM.
 */
import assert from 'node:assert/strict';
import { once } from 'node:events';
import { generateKeyPairSync, X509Certificate } from 'node:crypto';
import { writeFileSync } from 'node:fs';
import { connect as connectTcp } from 'node:net';
import type { AddressInfo, Socket } from 'node:net';
import { join } from 'node:path';
import { Readable } from 'node:stream';
import { after, before, describe, it } from 'node:test';
import { createServer } from 'node:tls';
import type { TLSSocket, TlsOptions } from 'node:tls';
import { createAuthority } from '../support/authority.ts';
import type { Authority, LeafOptions } from '../support/authority.ts';
import { startKeygate } from '../support/keygate.ts';
import type { Keygate } from '../support/keygate.ts';
import { provisionedToken } from '../support/provisioned-token.ts';
import type { ProvisionedToken } from '../support/provisioned-token.ts';
import { assertEchoes, tlsClient } from '../support/tls-client.ts';
import { until } from '../support/until.ts';
import { echoUpstream, tcpUpstream } from '../support/upstream.ts';
import type { Upstream } from '../support/upstream.ts';

describe('modes', { timeout: 180_000 }, () => {
  const fixtures = new AsyncDisposableStack();
  let token: ProvisionedToken;
  let authority: Authority;
  let plain: Upstream;
  let roots: string;

  before(async () => {
    token = fixtures.use(await provisionedToken({ p256: { kind: 'p256' } }));
    plain = fixtures.use(await echoUpstream());
    authority = await createAuthority();
    roots = join(token.directory, 'roots.pem');
    writeFileSync(roots, authority.rootPem);
  });
  after(async () => fixtures.disposeAsync());

  /** A TLS server with a certificate of the authority, that echoes; stopped with the others. */
  async function tlsServer(
    leaf: LeafOptions = {},
    options: TlsOptions = {},
    serve?: (socket: TLSSocket) => void,
    path?: string,
  ): Promise<TlsServer> {
    const { publicKey, privateKey } = generateKeyPairSync('ec', { namedCurve: 'P-256' });
    const chain = await authority.issue(publicKey, { names: ['localhost'], ...leaf });
    const server = await startTlsServer(
      {
        cert: `${chain}\n${authority.intermediatePem}`,
        key: privateKey.export({ type: 'pkcs8', format: 'pem' }),
        ...options,
      },
      serve,
      path,
    );
    fixtures.defer(() => server.close());
    return server;
  }

  async function started(document: Parameters<typeof startKeygate>[1]): Promise<Keygate> {
    const keygate = await startKeygate(token, { drainDeadline: '0s', ...document });
    fixtures.defer(async () => {
      await keygate.stop();
    });
    return keygate;
  }

  /** TLS to a server of the authority, whose certificate is for localhost. */
  const tlsTo = (server: { readonly address: string }, tls: object = {}) => ({
    servers: [server.address],
    tls: { roots, name: 'localhost', ...tls },
  });

  it('sessions with a server are resumed, without the token and unless told otherwise', async () => {
    const server = await tlsServer();
    for (const [resume, expected] of [
      [true, true],
      [false, false],
    ] as const) {
      const keygate = await started({
        upstreams: { secure: tlsTo(server, { resume }) },
        listeners: { https: { mode: 'encrypt', certificates: undefined } },
      });
      for (let count = 0; count < 2; count++) {
        const client = await plainClient(keygate);
        await assertEchoes(client);
        client.end();
        await ended(client);
      }
      assert.equal(server.reused, expected);
      const resumed = await keygate.metric('keygate_upstream_handshake_seconds_count', { resumed: 'true' });
      assert.equal(resumed, expected ? 1 : 0);
    }
  });

  /** A client of a keygate that speaks TLS to the server, and in mode bridge to the client too. */
  async function connected(mode: 'encrypt' | 'bridge', server: { readonly address: string }) {
    const keygate = await started({
      upstreams: { secure: tlsTo(server) },
      listeners: { https: { mode, certificates: mode === 'bridge' ? ['p256'] : undefined } },
    });
    const client = mode === 'bridge' ? await tlsClient({ port: keygate.port() }) : await plainClient(keygate);
    return { keygate, client };
  }

  for (const mode of ['encrypt', 'bridge'] as const) {
    it(`${mode}: an end that the server did not say is counted`, async () => {
      const wire = await wireTo((await tlsServer()).address);
      fixtures.defer(async () => wire.close());
      const { keygate, client } = await connected(mode, wire);
      await assertEchoes(client);
      // TCP ends, and TLS says nothing of it.
      wire.cut();
      await ended(client);
      await keygate.closed('upstream/relay/truncated');
    });

    it(`${mode}: a record that does not decrypt ends the connection, and plaintext with a reset`, async () => {
      const wire = await wireTo((await tlsServer()).address);
      fixtures.defer(async () => wire.close());
      const { keygate, client } = await connected(mode, wire);
      await assertEchoes(client);
      let failure: string | undefined;
      client.on('error', ({ code }: NodeJS.ErrnoException) => (failure = code));
      wire.spoil();
      await ended(client);
      if (mode === 'encrypt') assert.equal(failure, 'ECONNRESET');
      await keygate.closed('upstream/relay/protocol_error');
    });

    it(`${mode}: bulk data comes whole, whatever the size of the server's records`, async () => {
      const megabytes = 40;
      const piece = Buffer.alloc(1024 * 1024, 'keygate');
      const server = await tlsServer({}, {}, (socket) => {
        socket.setMaxSendFragment(10_000);
        Readable.from(Array.from({ length: megabytes }, () => piece)).pipe(socket);
      });
      const { client } = await connected(mode, server);
      client.end();
      let bytes = 0;
      for await (const chunk of client) bytes += (chunk as Buffer).length;
      assert.equal(bytes, megabytes * piece.length);
    });

    it(`${mode}: half-close passes through, both ways`, async () => {
      const server = await tlsServer();
      const { client } = await connected(mode, server);
      await assertEchoes(client);
      const peer = server.last;
      assert.ok(peer !== undefined);
      const heard = once(peer, 'end');
      client.end('last words');
      await heard;
      peer.end('the end');
      let rest = '';
      for await (const chunk of client) rest += String(chunk);
      assert.equal(rest, 'last wordsthe end');
    });
  }

  const badServers: readonly { what: string; own: TlsOptions; tls?: object; close: string }[] = [
    { what: 'of an old version', own: { maxVersion: 'TLSv1.2' }, tls: { policy: 'modern' }, close: 'handshake/alert' },
    {
      what: 'without a protocol in common',
      own: { ALPNProtocols: ['b'] },
      tls: { alpn: ['a'] },
      close: 'handshake/alert',
    },
    // It complains after our Finished (RFC 8446 4.4.2.4).
    {
      what: 'that wants a certificate',
      own: { requestCert: true, rejectUnauthorized: true },
      close: 'relay/alert',
    },
  ];
  for (const { what, own, tls, close } of badServers) {
    it(`a server ${what} ends a connection with upstream/${close}`, async () => {
      const server = await tlsServer({}, own);
      const keygate = await started({
        upstreams: { secure: tlsTo(server, tls) },
        listeners: { https: { mode: 'encrypt', certificates: undefined } },
      });
      const client = await plainClient(keygate);
      client.write('secret');
      await ended(client);
      assert.equal(server.received, '', 'a server that is not trusted was told something');
      await keygate.closed(`upstream/${close}`);
    });
  }

  it('a server that does not speak TLS, or says nothing, has its own reason', async () => {
    const keygate = await started({
      upstreams: { secure: { servers: [plain.address], tls: { roots, name: 'localhost', deadline: '1s' } } },
      listeners: { https: { mode: 'encrypt', certificates: undefined } },
    });
    const client = await plainClient(keygate);
    await ended(client);
    // Our own ClientHello comes back.
    await keygate.closed('upstream/handshake/protocol_error');
  });

  it('a server behind a unix socket gets a client certificate as any other', async () => {
    const own = { requestCert: true, rejectUnauthorized: false };
    const server = await tlsServer({}, own, undefined, join(token.directory, 'tls.sock'));
    const keygate = await started({
      upstreams: { secure: tlsTo(server, { certificate: 'p256' }) },
      listeners: { https: { mode: 'encrypt', certificates: undefined } },
    });
    await assertEchoes(await plainClient(keygate));
    assert.equal(server.last?.getPeerX509Certificate()?.raw.equals(new X509Certificate(token.pem('p256')).raw), true);
  });

  it('when the handshake with one server fails, the next is tried, and the bad one is left out for a while', async () => {
    const good = await tlsServer();
    const rubbish = fixtures.use(await namedUpstream('this is not TLS'));
    const stranger = await tlsServer({ names: ['other.test'] });
    const silent = fixtures.use(await tcpUpstream((socket) => socket.resume()));
    for (const bad of [rubbish, stranger, silent]) {
      const keygate = await started({
        upstreams: {
          secure: {
            ...tlsTo(good, { deadline: '2s' }),
            servers: [bad.address, good.address],
            passive: { failures: 1 },
          },
        },
        listeners: { https: { mode: 'encrypt', certificates: undefined } },
      });
      for (let count = 0; count < 4; count++) await assertEchoes(await plainClient(keygate));
      const up = async (server: string) => keygate.metric('keygate_upstream_server_up', { server });
      await until('ejection', async () => (await up(bad.address)) === 0);
      assert.equal(await up(good.address), 1);
      // One client was so unlucky, and did not notice.
      assert.equal(await keygate.metric('keygate_upstream_connects_total', { server: bad.address, outcome: 'ok' }), 1);
    }
  });

  it('handshakes with servers count for limits.handshakes', async () => {
    const silent = fixtures.use(await tcpUpstream((socket) => socket.resume()));
    const keygate = await started({
      upstreams: { secure: tlsTo(silent) },
      listeners: { https: { mode: 'encrypt', certificates: undefined, limits: { handshakes: 1 } } },
    });
    const waiting = await plainClient(keygate);
    await until('handshake with the server', async () => {
      return (await keygate.metric('keygate_handshakes_in_flight')) === 1 && silent.accepted === 1;
    });
    const turnedAway = connectTcp({ port: keygate.port(), host: '127.0.0.1' });
    // The reset can be there before the connection is noticed.
    turnedAway.on('error', () => {});
    await ended(turnedAway);
    await keygate.closed('proxy/accept/handshake_limit');
    waiting.destroy();
  });

  it("when the handshake fails with all servers, the last reason is the connection's", async () => {
    const rubbish = fixtures.use(await namedUpstream('this is not TLS'));
    const stranger = await tlsServer({ names: ['other.test'] });
    const servers = [rubbish.address, stranger.address];
    const keygate = await started({
      upstreams: { secure: { ...tlsTo(stranger), servers } },
      listeners: { https: { mode: 'encrypt', certificates: undefined } },
    });
    const client = await plainClient(keygate);
    client.write('x');
    await ended(client);
    const closes = await until('close', async () => {
      const reasons = Object.keys(await keygate.closes());
      return reasons.length > 0 && reasons;
    });
    assert.match(closes.join(' '), /^upstream\/handshake\/(?:not_tls|wrong_name)$/);
  });

  it('passthrough: TLS is routed by name and not ended, and an unknown name gets an alert', async () => {
    const [first, second] = [await tlsServer({ names: ['first.test'] }), await tlsServer({ names: ['a.second.test'] })];
    const keygate = await started({
      upstreams: { first: { servers: [first.address] }, second: { servers: [second.address] } },
      listeners: {
        https: {
          mode: 'passthrough',
          certificates: undefined,
          upstream: undefined,
          routes: [
            { names: ['first.test'], upstream: 'first' },
            { names: ['*.second.test'], upstream: 'second' },
          ],
        },
      },
    });
    for (const [servername, server] of [
      ['first.test', first],
      ['a.second.test', second],
    ] as const) {
      const client = await tlsClient({ port: keygate.port(), servername, ca: authority.rootPem });
      await assertEchoes(client, servername);
      assert.equal(server.last?.servername, servername);
      client.end();
      await ended(client);
    }
    for (const servername of ['third.test', 'second.test']) {
      await assert.rejects(tlsClient({ port: keygate.port(), servername }), /unrecognized name/i);
    }
    await keygate.closed('client/handshake/no_route', { count: 2 });
    const notTls = await plainClient(keygate);
    notTls.write('GET / HTTP/1.1\r\n\r\n');
    await ended(notTls);
    await keygate.closed('client/handshake/not_tls');
  });

  it('offload: routes by name and by protocol, the default for others, and a route that refuses', async () => {
    const upstreams = {
      web: fixtures.use(await namedUpstream('web')),
      api: fixtures.use(await namedUpstream('api')),
      grpc: fixtures.use(await namedUpstream('grpc')),
    };
    const keygate = await started({
      upstreams: Object.fromEntries(
        Object.entries(upstreams).map(([name, { address }]) => [name, { servers: [address] }]),
      ),
      listeners: {
        https: {
          certificates: ['p256'],
          alpn: ['h2', 'http/1.1'],
          upstream: 'web',
          routes: [
            { names: ['closed.test'], refuse: true },
            { names: ['API.test'], upstream: 'api' },
            { alpn: ['h2'], upstream: 'grpc' },
          ],
        },
      },
      log: { access: {} },
    });
    const answerTo = async (servername: string, ALPNProtocols: string[] = []) => {
      const client = await tlsClient({ port: keygate.port(), servername, ALPNProtocols });
      let text = '';
      for await (const chunk of client) text += String(chunk);
      return text;
    };
    assert.equal(await answerTo('other.test'), 'web');
    assert.equal(await answerTo('api.TEST'), 'api');
    assert.equal(await answerTo('api.test', ['h2']), 'api');
    assert.equal(await answerTo('other.test', ['h2']), 'grpc');
    assert.equal(await answerTo('other.test', ['http/1.1']), 'web');
    assert.equal(await answerTo('closed.test'), '');
    await keygate.closed('client/handshake/no_route');
    await keygate.logged({ event: 'connection', upstream: 'grpc', alpn: 'h2' });
  });
});

interface TlsServer {
  readonly address: string;
  /** The last client whose handshake ended well. */
  last: TLSSocket | undefined;
  /** Whether that one was resumed. */
  reused: boolean;
  /** What all clients have said. */
  received: string;
  close(): void;
}

async function startTlsServer(
  options: TlsOptions,
  serve?: (socket: TLSSocket) => void,
  path?: string,
): Promise<TlsServer> {
  const server = createServer({ allowHalfOpen: true, ALPNProtocols: ['echo/1'], ...options } as TlsOptions);
  const raw = new Set<Socket>();
  const state: TlsServer = {
    address: '',
    last: undefined,
    reused: false,
    received: '',
    close() {
      server.close();
      for (const socket of raw) socket.destroy();
    },
  };
  server.on('connection', (socket: Socket) => {
    raw.add(socket);
  });
  server.on('tlsClientError', () => {});
  server.on('secureConnection', (socket: TLSSocket) => {
    state.last = socket;
    state.reused = socket.isSessionReused();
    socket.on('error', () => {});
    serve?.(socket);
    if (serve !== undefined) return;
    socket.on('data', (chunk: Buffer) => {
      state.received += chunk.length > 1000 ? '' : chunk.toString();
      socket.write(chunk);
    });
    // A client that ends its half has ended, unless the test says more.
    socket.on('end', () => setImmediate(() => socket.end()));
  });
  if (path === undefined) server.listen(0, '127.0.0.1');
  else server.listen(path);
  await once(server, 'listening');
  if (path !== undefined) return Object.assign(state, { address: `unix:${path}` });
  return Object.assign(state, { address: `127.0.0.1:${(server.address() as AddressInfo).port}` });
}

interface Wire {
  readonly address: string;
  /** Ends every connection towards who made it. */
  cut(): void;
  /** Sends it what no server has said. */
  spoil(): void;
  close(): Promise<void>;
}

/** Passes bytes on to a server. */
async function wireTo(address: string): Promise<Wire> {
  const [host = '', port] = address.split(':');
  const ends = new Set<Socket>();
  const wire = await tcpUpstream((socket) => {
    const server = connectTcp({ host, port: Number(port) });
    server.on('error', () => socket.destroy());
    ends.add(socket);
    socket.pipe(server);
    server.pipe(socket, { end: false });
  });
  return {
    address: wire.address,
    cut() {
      for (const socket of ends) socket.end();
    },
    spoil() {
      // An application data record that no key has made.
      for (const socket of ends) socket.write(Buffer.concat([Buffer.from('1703030040', 'hex'), Buffer.alloc(0x40)]));
    },
    close: async () => wire.close(),
  };
}

/** Says its name, and ends. */
async function namedUpstream(name: string): Promise<Upstream> {
  return tcpUpstream((socket) => {
    socket.end(name);
    socket.resume();
  });
}

async function plainClient(keygate: Keygate): Promise<Socket> {
  const socket = connectTcp({ port: keygate.port(), host: '127.0.0.1', allowHalfOpen: true });
  await once(socket, 'connect');
  socket.on('error', () => {});
  return socket;
}

/** The other side has ended, and so do we. */
async function ended(client: Socket): Promise<void> {
  client.on('end', () => client.end());
  client.resume();
  // A reset is an end too.
  const { promise, resolve } = Promise.withResolvers<void>();
  client.once('close', () => resolve());
  if (!client.destroyed) await promise;
}
