/**
 * Owns: who is taken for the client when proxies stand in front: PROXY headers of those who may send them, in every shape and
 * cut everywhere, and of those who may not.
 * Must not know: keygate's reader; HAProxy, nginx and a second keygate send headers as well.
 * Runs: in a test process, against keygates with SoftHSM. 127.0.0.1 is a proxy, 127.0.0.2 is not.
 */
import assert from 'node:assert/strict';
import { once } from 'node:events';
import { writeFileSync } from 'node:fs';
import { connect } from 'node:net';
import type { Socket } from 'node:net';
import { join } from 'node:path';
import { after, before, describe, it } from 'node:test';
import { freePort } from '../../bench/processes.ts';
import { setImmediate as turn } from 'node:timers/promises';
import { connect as connectTls } from 'node:tls';
import type { TLSSocket } from 'node:tls';
import { startDaemon } from '../support/daemon.ts';
import { startKeygate } from '../support/keygate.ts';
import type { Keygate, LogLine } from '../support/keygate.ts';
import { provisionedToken } from '../support/provisioned-token.ts';
import type { ProvisionedToken } from '../support/provisioned-token.ts';
import type { ProxyHeader } from '../support/proxy-header.ts';
import { alertIn, assertEchoes, clientHello, rawClient, tlsClient } from '../support/tls-client.ts';
import { proxyUpstream } from '../support/upstream.ts';
import type { ProxyUpstream } from '../support/upstream.ts';

const v1 = Buffer.from('PROXY TCP4 192.0.2.1 198.51.100.7 56324 443\r\n');
const v2 = Buffer.from('0d0a0d0a000d0a515549540a 2111000c c0000201 c6336407 dc0401bb'.replaceAll(' ', ''), 'hex');
const v2Local = Buffer.from('0d0a0d0a000d0a515549540a20000000', 'hex');
const v1OfIpv6 = Buffer.from('PROXY TCP6 2001:db8::1 2001:db8::2 1 65535\r\n');

const said = { source: '192.0.2.1', sourcePort: 56_324, destination: '198.51.100.7', destinationPort: 443 };

describe('a PROXY header that comes in', { timeout: 100_000 }, () => {
  const fixtures = new AsyncDisposableStack();
  let token: ProvisionedToken;
  let upstream: ProxyUpstream;
  let keygate: Keygate;

  before(async () => {
    token = fixtures.use(await provisionedToken({ ec: { kind: 'p256', dns: ['www.example.org'] } }));
    upstream = fixtures.use(await proxyUpstream());
    const proxyProtocol = { from: ['127.0.0.1', '::1/128'] };
    keygate = fixtures.use(
      await startKeygate(token, {
        log: { access: {} },
        upstreams: {
          v1: { servers: [upstream.address], proxyProtocol: 'v1' },
          v2: { servers: [upstream.address], proxyProtocol: 'v2' },
        },
        listeners: {
          https: { upstream: 'v2', bind: ['127.0.0.1:0', '[::1]:0', '0.0.0.0:0'], proxyProtocol },
          toV1: { upstream: 'v1', proxyProtocol },
          hasty: { upstream: 'v2', proxyProtocol: { ...proxyProtocol, deadline: '300ms' } },
        },
      }),
    );
  });
  after(async () => fixtures.disposeAsync());

  /** What the upstream is told of a client whose bytes begin with these pieces, and the line that the connection gets. */
  async function told(
    pieces: readonly Buffer[],
    { listener = 'https', index = 0, host = '127.0.0.1', peerIs = 'via' } = {},
  ): Promise<{ header: ProxyHeader; line: LogLine; peer: string }> {
    const next = upstream.nextHeader();
    const raw = await rawClient(keygate.port(listener, index), host);
    for (const piece of pieces) {
      raw.write(piece);
      // Pieces are written in turns of their own, and without delay (TCP_NODELAY): they are packets of their own.
      await turn();
    }
    const tls = await secured(raw);
    await assertEchoes(tls, 'behind two headers');
    const peer = `${host === '::1' ? '[::1]' : host}:${raw.localPort}`;
    tls.destroy();
    const line = await keygate.logged({ event: 'connection', [peerIs]: peer });
    return { header: await next, line, peer };
  }

  for (const [name, header] of Object.entries({ v1, v2 })) {
    it(`of ${name} says who the client is: to the upstream, in the PROXY header out, and in the access log`, async () => {
      for (const listener of ['https', 'toV1']) {
        const { header: out, line, peer } = await told([header], { listener });
        assert.deepEqual(addressesIn(out), said);
        assert.deepEqual(
          { client: line['client'], via: line['via'], destination: line['destination'] },
          { client: '192.0.2.1:56324', via: peer, destination: '198.51.100.7:443' },
        );
      }
    });

    it(`of ${name} is read from whatever packets it comes in`, async () => {
      for (let end = 1; end < header.length; end += 1) {
        const { header: out } = await told([header.subarray(0, end), header.subarray(end)]);
        assert.deepEqual(addressesIn(out), said, `cut at ${end}`);
      }
    });

    it(`of ${name} can come in one packet with what the client says first`, async () => {
      const hello = await clientHello({ servername: 'www.example.org' });
      for (const end of [0, 1, 5, hello.length]) {
        const raw = await rawClient(keygate.port());
        raw.write(Buffer.concat([header, hello.subarray(0, end)]));
        await turn();
        raw.write(hello.subarray(end));
        const [answer] = (await once(raw, 'data')) as [Buffer];
        assert.equal(answer[0], 22, 'a ServerHello');
        raw.destroy();
      }
    });
  }

  it('can speak of another family than that of the connection', async () => {
    const { header } = await told([v1OfIpv6]);
    const ipv6 = { source: '2001:db8::1', sourcePort: 1, destination: '2001:db8::2', destinationPort: 65_535 };
    assert.deepEqual(addressesIn(header), ipv6);
    assert.deepEqual(addressesIn((await told([v2], { index: 1, host: '::1' })).header), said);
  });

  for (const [what, header] of [
    ['LOCAL', v2Local],
    ['UNKNOWN', Buffer.from('PROXY UNKNOWN\r\n')],
  ] as const) {
    it(`that is ${what} leaves the peer the client`, async () => {
      const { header: out, line, peer } = await told([header], { peerIs: 'client' });
      assert.equal(`${out.source}:${out.sourcePort}`, peer);
      assert.equal(line['client'], peer);
      assert.ok(!('via' in line) && !('destination' in line), JSON.stringify(line));
    });
  }

  it('must come from those who may send it', async () => {
    const closed = keygate.closed('client/proxy_header/missing', { before: await keygate.closes() });
    const raw = await rawClient(keygate.port());
    raw.write(await clientHello());
    await gone(raw);
    await closed;
  });

  for (const [name, header] of Object.entries({ v1, v2, v2Local })) {
    it(`is believed of nobody else: ${name}`, async () => {
      const closed = keygate.closed('client/handshake/not_tls', { before: await keygate.closes() });
      const raw = await rawClientFrom('127.0.0.2', keygate.port('https', 2));
      const peer = `127.0.0.2:${raw.localPort}`;
      const answer: Buffer[] = [];
      raw.on('data', (chunk: Buffer) => answer.push(chunk));
      raw.write(Buffer.concat([header, await clientHello()]));
      await gone(raw);
      await closed;
      assert.notEqual(alertIn(Buffer.concat(answer)), undefined);
      const line = await keygate.logged({ event: 'connection', client: peer });
      assert.equal(line['via'], undefined);
    });
  }

  it('is not expected of anybody else', async () => {
    const next = upstream.nextHeader();
    const raw = await rawClientFrom('127.0.0.2', keygate.port('https', 2));
    await assertEchoes(await secured(raw));
    const { source, sourcePort } = await next;
    assert.deepEqual([source, sourcePort], ['127.0.0.2', raw.localPort]);
    raw.destroy();
  });

  for (const [what, bytes] of Object.entries({
    'a wrong address': Buffer.from('PROXY TCP4 192.0.2.256 198.51.100.7 1 2\r\n'),
    'a line that does not end': Buffer.from(`PROXY UNKNOWN ${'x'.repeat(100)}`),
    'a block of 65535 bytes': Buffer.from('0d0a0d0a000d0a515549540a2111ffff', 'hex'),
    'a value that reaches beyond the header': Buffer.concat([
      v2.subarray(0, 15),
      Buffer.from([15]),
      v2.subarray(16),
      Buffer.from([2, 0, 9]),
    ]),
  })) {
    it(`with ${what} is malformed`, async () => {
      const closed = keygate.closed('client/proxy_header/malformed', { before: await keygate.closes() });
      const raw = await rawClient(keygate.port());
      raw.write(bytes);
      await gone(raw);
      await closed;
    });
  }

  it('has its own deadline, however busily a client sends byte after byte', async () => {
    const closed = keygate.closed('client/proxy_header/deadline', { before: await keygate.closes() });
    const raw = await rawClient(keygate.port('hasty'));
    raw.write('PROXY UNKNOWN ');
    const drip = setInterval(() => raw.write('x'), 20);
    const began = performance.now();
    await gone(raw);
    clearInterval(drip);
    await closed;
    assert.ok(performance.now() - began < 5_000, 'before the deadline of handshakes');
  });

  it('costs nothing while a peer that has ended its half of half a header waits', async () => {
    const closed = keygate.closed('client/proxy_header/closed', { before: await keygate.closes() });
    const raw = await rawClient(keygate.port());
    raw.end(v2.subarray(0, 20));
    await gone(raw);
    await closed;
  });

  it('of a peer that closes before it is no header', async () => {
    const closed = keygate.closed('client/proxy_header/closed', { before: await keygate.closes() });
    (await rawClient(keygate.port())).end();
    await closed;
  });

  for (const [what, option] of [
    ['version 1', 'send-proxy'],
    ['version 2', 'send-proxy-v2'],
    ['version 2 with values and a checksum', 'send-proxy-v2 proxy-v2-options crc32c,unique-id'],
  ] as const) {
    it(`is understood of HAProxy: ${what}`, async () => {
      const port = await freePort();
      await using proxy = await frontProxy('haproxy', token.directory, port, [
        'defaults',
        '  mode tcp',
        ...['client', 'server', 'connect'].map((side) => `  timeout ${side} 10s`),
        'listen in',
        `  bind 127.0.0.1:${port}`,
        '  unique-id-format %[uuid]',
        `  server keygate 127.0.0.1:${keygate.port()} ${option}`,
      ]);
      await assertPassedOn(proxy.port);
    });
  }

  it('is understood of nginx', async () => {
    const port = await freePort();
    await using proxy = await frontProxy('nginx', token.directory, port, [
      'load_module /usr/lib/nginx/modules/ngx_stream_module.so;',
      `pid ${join(token.directory, 'nginx.pid')};`,
      'daemon off;',
      'error_log stderr;',
      'events {}',
      `stream { server { listen 127.0.0.1:${port}; proxy_pass 127.0.0.1:${keygate.port()}; proxy_protocol on; } }`,
    ]);
    await assertPassedOn(proxy.port);
  });

  for (const version of ['v1', 'v2']) {
    it(`is understood of another keygate: ${version}`, async () => {
      // The front one decrypts, the one behind it once more: the client speaks TLS in TLS.
      await using front = await startKeygate(token, {
        upstreams: { behind: { servers: [`127.0.0.1:${keygate.port()}`], proxyProtocol: version } },
        listeners: { https: { upstream: 'behind' } },
      });
      const next = upstream.nextHeader();
      const outer = await tlsClient({ port: front.port(), servername: 'www.example.org' });
      const inner = await secured(outer);
      await assertEchoes(inner);
      const { localAddress: source, localPort: sourcePort } = outer;
      const destination = { destination: '127.0.0.1', destinationPort: front.port() };
      assert.deepEqual(addressesIn(await next), { source, sourcePort, ...destination });
      inner.destroy();
      outer.destroy();
    });
  }

  /** A client of a proxy in front is the client behind keygate. */
  async function assertPassedOn(port: number): Promise<void> {
    const next = upstream.nextHeader();
    const client = await tlsClient({ port, servername: 'www.example.org' });
    await assertEchoes(client);
    const { localAddress: source, localPort: sourcePort } = client;
    assert.deepEqual(addressesIn(await next), { source, sourcePort, destination: '127.0.0.1', destinationPort: port });
    client.destroy();
  }
});

function addressesIn({ source, sourcePort, destination, destinationPort }: ProxyHeader) {
  return { source, sourcePort, destination, destinationPort };
}

/** TLS over a connection that may have carried something else before. */
async function secured(socket: Socket): Promise<TLSSocket> {
  const tls = connectTls({ socket, rejectUnauthorized: false, servername: 'www.example.org' });
  await once(tls, 'secureConnect');
  tls.on('error', () => {});
  return tls;
}

/** The whole of 127.0.0.0/8 is this host. */
async function rawClientFrom(localAddress: string, port: number): Promise<Socket> {
  const socket = connect({ host: '127.0.0.1', port, localAddress, noDelay: true });
  await once(socket, 'connect');
  socket.on('error', () => {});
  return socket;
}

/** Unlike `once` it takes a reset for an end. */
async function gone(socket: Socket): Promise<void> {
  const { promise, resolve } = Promise.withResolvers<void>();
  socket.once('close', () => resolve());
  if (socket.listenerCount('data') === 0) socket.resume();
  await promise;
}

/** A proxy in front of keygate that listens at `port`. */
async function frontProxy(program: 'haproxy' | 'nginx', directory: string, port: number, lines: readonly string[]) {
  const file = join(directory, `${program}.conf`);
  writeFileSync(file, [...lines, ''].join('\n'));
  const args = program === 'haproxy' ? ['-db', '-f', file] : ['-c', file, '-p', directory, '-e', 'stderr'];
  const daemon = await startDaemon(program, args, async () => listens(port));
  return { port, [Symbol.asyncDispose]: daemon.end };
}

async function listens(port: number): Promise<boolean> {
  const socket = connect({ host: '127.0.0.1', port });
  const { promise, resolve } = Promise.withResolvers<boolean>();
  socket.once('connect', () => resolve(true));
  socket.once('error', () => resolve(false));
  const answer = await promise;
  socket.destroy();
  return answer;
}
