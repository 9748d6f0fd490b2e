/**
 * Owns: what bad input gets: the right alert, one counted close reason, no line in the log, and no effect on others.
 * Must not know: what good clients get (matrix.test.ts, handshake.test.ts).
 * Runs: in a test process, against one keygate with one worker and SoftHSM: what harms that worker harms the bystander.
 */
import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { once } from 'node:events';
import { connect } from 'node:net';
import type { Socket } from 'node:net';
import { after, afterEach, before, beforeEach, describe, it } from 'node:test';
import type { TLSSocket } from 'node:tls';
import { startKeygate } from '../support/keygate.ts';
import type { Keygate } from '../support/keygate.ts';
import { provisionedToken } from '../support/provisioned-token.ts';
import type { ProvisionedToken } from '../support/provisioned-token.ts';
import {
  alertIn,
  alerts,
  answerTo,
  assertEchoes,
  clientHello,
  paddedHello,
  program,
  rawClient,
  refusalOf,
  tappedClient,
  tlsClient,
} from '../support/tls-client.ts';
import { until } from '../support/until.ts';
import { echoUpstream } from '../support/upstream.ts';
import type { Upstream } from '../support/upstream.ts';

describe('a bad client', { timeout: 60_000 }, () => {
  const fixtures = new AsyncDisposableStack();
  let token: ProvisionedToken;
  let echo: Upstream;
  let keygate: Keygate;
  let bystander: TLSSocket;
  let earlier: Readonly<Record<string, number>>;
  let linesBefore: number;

  before(async () => {
    token = fixtures.use(await provisionedToken({ ec: { kind: 'p256' } }));
    echo = fixtures.use(await echoUpstream());
    keygate = fixtures.use(
      await startKeygate(token, {
        policies: { p384: { groups: ['secp384r1'] } },
        upstreams: { echo: { servers: [echo.address] } },
        listeners: {
          https: {},
          hasty: { deadlines: { handshake: '300ms' } },
          modern: { policy: 'modern' },
          p384: { policy: 'p384' },
          alpn: { alpn: ['h2'] },
          fewConnections: { limits: { connections: 2 } },
          fewHandshakes: { limits: { handshakes: 1 } },
          perClient: { limits: { perClient: { rate: 1, burst: 3 } } },
          behindProxy: { limits: { perClient: { rate: 1, burst: 3 } }, proxyProtocol: { from: ['127.0.0.1'] } },
        },
      }),
    );
    bystander = await tlsClient({ port: keygate.port() });
    fixtures.defer(() => void bystander.destroy());
  });
  beforeEach(async () => {
    earlier = await keygate.closes();
    linesBefore = keygate.log.length;
  });
  afterEach(async () => {
    await assertEchoes(bystander);
    assert.deepEqual(keygate.log.slice(linesBefore), [], 'what a client does must not fill the log');
  });
  after(async () => fixtures.disposeAsync());

  /** It and nothing else has ended, for this reason. */
  async function assertOneClosed(reason: string): Promise<void> {
    await keygate.closed(reason, { before: earlier });
    const now = await keygate.closes();
    const ended = Object.entries(now).flatMap(([why, count]) =>
      count === earlier[why] ? [] : [[why, count - (earlier[why] ?? 0)]],
    );
    assert.deepEqual(ended, [[reason, 1]]);
  }

  for (const { what, listener = 'https', says, alert, reason } of [
    {
      what: 'plain HTTP',
      says: () => 'GET / HTTP/1.1\r\nHost: localhost\r\n\r\n',
      alert: alerts.decodeError,
      reason: 'plain_http',
    },
    { what: 'another protocol', says: () => 'SSH-2.0-OpenSSH_9.2\r\n', alert: alerts.decodeError, reason: 'not_tls' },
    { what: 'garbage', says: () => randomBytes(1000).fill(0xff, 0, 1), alert: alerts.decodeError, reason: 'not_tls' },
    { what: 'zeros', says: () => Buffer.alloc(1000), alert: alerts.decodeError, reason: 'not_tls' },
    {
      what: 'a record longer than any may be',
      says: () => Buffer.from([22, 3, 1, 0xff, 0xff]),
      alert: alerts.recordOverflow,
      reason: 'malformed',
    },
    {
      what: 'application data first',
      says: () => Buffer.from([23, 3, 3, 0, 1, 0]),
      alert: alerts.unexpectedMessage,
      reason: 'protocol_error',
    },
    {
      what: 'a ClientHello that is too large',
      says: async () => paddedHello(await clientHello(), 64_100),
      alert: alerts.decodeError,
      reason: 'malformed',
    },
    {
      what: 'TLS 1.1',
      says: async () => clientHello({ minVersion: 'TLSv1.1', maxVersion: 'TLSv1.1', ciphers: 'DEFAULT@SECLEVEL=0' }),
      alert: alerts.protocolVersion,
      reason: 'no_shared_protocol',
    },
    {
      what: 'TLS 1.2 to a listener for TLS 1.3',
      listener: 'modern',
      says: async () => clientHello({ maxVersion: 'TLSv1.2' }),
      alert: alerts.protocolVersion,
      reason: 'no_shared_protocol',
    },
    {
      what: 'only cipher suites that are not offered',
      says: async () => clientHello({ maxVersion: 'TLSv1.2', ciphers: 'ECDHE-ECDSA-AES128-SHA' }),
      alert: alerts.handshakeFailure,
      reason: 'no_shared_cipher',
    },
    {
      what: 'only cipher suites for another kind of key',
      says: async () => clientHello({ maxVersion: 'TLSv1.2', ciphers: 'ECDHE-RSA-AES128-GCM-SHA256' }),
      alert: alerts.handshakeFailure,
      reason: 'no_shared_cipher',
    },
    {
      what: 'only groups that are not offered',
      listener: 'p384',
      says: async () => clientHello({ ecdhCurve: 'X25519' }),
      alert: alerts.handshakeFailure,
      reason: 'no_shared_group',
    },
    {
      what: 'only groups that are not offered, in TLS 1.2',
      listener: 'p384',
      says: async () => clientHello({ ecdhCurve: 'X25519', maxVersion: 'TLSv1.2' }),
      alert: alerts.handshakeFailure,
      reason: 'no_shared_group',
    },
    {
      what: 'only application protocols that are not offered',
      listener: 'alpn',
      says: async () => clientHello({ ALPNProtocols: ['http/1.1'], maxVersion: 'TLSv1.2' }),
      alert: alerts.noApplicationProtocol,
      reason: 'no_shared_alpn',
    },
  ]) {
    it(`that says ${what} gets alert ${alert} and is counted as ${reason}`, async () => {
      const answer = await answerTo(keygate.port(listener), Buffer.from(await says()));
      assert.equal(alertIn(answer), alert, `answered ${answer.toString('hex')}`);
      await assertOneClosed(`client/handshake/${reason}`);
    });
  }

  for (const { what, listener = 'https', options, code, reason } of [
    {
      what: 'signature schemes',
      options: { sigalgs: 'rsa_pss_rsae_sha256' },
      code: 'ERR_SSL_SSL/TLS_ALERT_HANDSHAKE_FAILURE',
      reason: 'no_shared_signature_scheme',
    },
    {
      what: 'application protocols',
      listener: 'alpn',
      options: { ALPNProtocols: ['http/1.1'] },
      code: 'ERR_SSL_TLSV1_ALERT_NO_APPLICATION_PROTOCOL',
      reason: 'no_shared_alpn',
    },
  ]) {
    it(`that shares no ${what} in TLS 1.3 gets the alert encrypted and is counted as ${reason}`, async () => {
      assert.equal(await refusalOf({ port: keygate.port(listener), ...options }), code);
      await assertOneClosed(`client/handshake/${reason}`);
    });
  }

  it('with a ClientHello of nearly 64 KiB in several records is answered like any other', async () => {
    const hello = paddedHello(await clientHello(), 60_000);
    assert.ok(hello.length > 3 * 16_384);
    const client = await rawClient(keygate.port());
    client.write(hello);
    const [answer] = (await once(client, 'data')) as [Buffer];
    assert.deepEqual(
      [...answer.subarray(0, 1), ...answer.subarray(5, 6)],
      [22, 2],
      'a handshake record with a ServerHello',
    );
    client.destroy();
    await assertOneClosed('client/handshake/closed');
  });

  for (const [when, prepare] of [
    ['without a byte', () => rawClient(keygate.port('hasty'))],
    ['in half a ClientHello', () => afterHalfHello('hasty')],
    ['between ServerHello and Finished', () => beforeFinished('hasty')],
  ] as const) {
    it(`that falls silent ${when} is closed at the handshake's deadline`, async () => {
      const client = await prepare();
      client.resume();
      await once(client, 'end');
      client.destroy();
      await assertOneClosed('client/handshake/deadline');
    });
  }

  for (const [how, leave, reason] of [
    ['leaves', (client: Socket) => client.end(), 'closed'],
    ['resets', (client: Socket) => client.resetAndDestroy(), 'reset'],
  ] as const) {
    for (const [when, prepare] of [
      ['in half a ClientHello', () => afterHalfHello('https')],
      ['between ServerHello and Finished', () => beforeFinished('https')],
    ] as const) {
      it(`that ${how} ${when} is counted as ${reason}`, async () => {
        const client = await prepare();
        leave(client);
        await assertOneClosed(`client/handshake/${reason}`);
        client.destroy();
      });
    }
  }

  it('that leaves without a byte, as port scans do, is counted as closed', async () => {
    const client = await rawClient(keygate.port());
    client.end();
    await assertOneClosed('client/handshake/closed');
    client.destroy();
  });

  for (const version of ['1_2', '1_3']) {
    it(`that does not trust the certificate, in TLS ${version.replace('_', '.')}, is counted by its alert`, async () => {
      const address = ['-connect', `127.0.0.1:${keygate.port()}`, `-tls${version}`];
      const { output } = await program('openssl', ['s_client', ...address, '-verify_return_error']);
      assert.match(output, /self-signed certificate/);
      await assertOneClosed('client/handshake/alert');
    });
  }

  it('that sends a forged record after its handshake is told bad_record_mac and closed', async () => {
    const { tls, raw } = await tappedClient({ port: keygate.port(), maxVersion: 'TLSv1.2' });
    await assertEchoes(tls);
    const told = once(tls, 'error');
    raw.write(Buffer.concat([Buffer.from([23, 3, 3, 0, 64]), randomBytes(64)]));
    const [error] = (await told) as [NodeJS.ErrnoException];
    assert.equal(error.code, 'ERR_SSL_SSL/TLS_ALERT_BAD_RECORD_MAC');
    await assertOneClosed('client/relay/protocol_error');
  });

  it('beyond the limit of connections is shed at once, and one that leaves makes room', async () => {
    const port = keygate.port('fewConnections');
    const [first, second] = [await tlsClient({ port }), await tlsClient({ port })];
    await assertShed(port);
    await assertOneClosed('proxy/accept/connection_limit');
    await assertEchoes(second);
    first.destroy();
    await until('room for a connection', async () => {
      const { engine } = await keygate.status();
      return engine.listeners.find(({ name }) => name === 'fewConnections')?.connectionsOpen === 1;
    });
    const third = await tlsClient({ port });
    await assertEchoes(third);
    second.destroy();
    third.destroy();
  });

  it('beyond the limit of handshakes is shed at once', async () => {
    const port = keygate.port('fewHandshakes');
    const silent = await rawClient(port);
    await until('handshake in flight', async () => {
      const { engine } = await keygate.status();
      return engine.listeners.find(({ name }) => name === 'fewHandshakes')?.handshakesInFlight === 1;
    });
    await assertShed(port);
    await assertOneClosed('proxy/accept/handshake_limit');
    silent.destroy();
    await keygate.closed('client/handshake/closed', { before: earlier });
    const client = await tlsClient({ port });
    await assertEchoes(client);
    client.destroy();
  });

  it('among hundreds at once leaves nothing open and nothing in the log', async () => {
    const hello = await clientHello();
    const said = [
      Buffer.from('GET / HTTP/1.1\r\n\r\n'),
      randomBytes(3000),
      Buffer.alloc(100),
      Buffer.from([22, 3, 1, 0, 4, 1, 0, 0, 0]),
    ];
    const bad = Array.from({ length: 400 }, async (_, index) => {
      const bytes = said[index % (said.length + 1)];
      if (bytes !== undefined) {
        await answerTo(keygate.port(), bytes);
        return;
      }
      const client = await rawClient(keygate.port());
      client.write(hello.subarray(0, 1 + (index % hello.length)), () => client.resetAndDestroy());
      await once(client, 'close');
    });
    for (let echoes = 0; echoes < 50; echoes += 1) await assertEchoes(bystander);
    await Promise.all(bad);
    const quiet = await until('moment with only the bystander open', async () => {
      const { engine, workers } = await keygate.status();
      const https = engine.listeners.find(({ name }) => name === 'https');
      return https?.connectionsOpen === 1 && https.handshakesInFlight === 0 && { workers, https };
    });
    assert.equal(quiet.workers[0]?.restarts, 0);
    const total = Object.values(await keygate.closes()).reduce((sum, count) => sum + count, 0);
    assert.equal(total - Object.values(earlier).reduce((sum, count) => sum + count, 0), 400, 'each is counted once');
  });

  async function afterHalfHello(listener: string): Promise<Socket> {
    const hello = await clientHello();
    const client = await rawClient(keygate.port(listener));
    client.write(hello.subarray(0, hello.length / 2));
    return client;
  }

  async function beforeFinished(listener: string): Promise<Socket> {
    const client = await rawClient(keygate.port(listener));
    client.write(await clientHello());
    await once(client, 'data');
    return client;
  }

  /** No answer and no wait: a reset, which may come before the client knows that it is connected. */
  it('that comes too often is shed at once, and others are served', async () => {
    const port = keygate.port('perClient');
    await untilShed(async () => tlsClient({ port }));
    await keygate.closed('proxy/accept/client_rate', { before: earlier });
    const other = await tlsClient({ port, localAddress: '127.0.0.2' });
    await assertEchoes(other);
    other.destroy();
  });

  it('that comes too often over a proxy is told apart from others of the same proxy', async () => {
    const as = async (client: string) => {
      const socket = await rawClient(keygate.port('behindProxy'));
      socket.write(`PROXY TCP4 ${client} 192.0.2.200 4711 443\r\n`);
      return tlsClient({ port: 0, socket });
    };
    await untilShed(async () => as('192.0.2.1'));
    await keygate.closed('proxy/accept/client_rate', { before: earlier });
    const other = await as('192.0.2.2');
    await assertEchoes(other);
    other.destroy();
  });

  /** The rate is one in a second, so the burst ends soon, however slow the machine is. */
  async function untilShed(come: () => Promise<TLSSocket>): Promise<void> {
    for (let count = 1; count <= 20; count += 1) {
      try {
        (await come()).destroy();
      } catch {
        assert.ok(count > 3, `only ${count - 1} were let in`);
        return;
      }
    }
    assert.fail('nobody was shed');
  }

  async function assertShed(port: number): Promise<void> {
    const client = connect({ host: '127.0.0.1', port });
    const shed = Promise.withResolvers<string | undefined>();
    client.once('error', ({ code }: NodeJS.ErrnoException) => shed.resolve(code));
    client.once('data', () => shed.resolve('an answer'));
    assert.equal(await shed.promise, 'ECONNRESET');
  }
});
