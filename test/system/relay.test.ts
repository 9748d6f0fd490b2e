/**
 * Owns: what happens to the bytes of established connections: all of them, in order, both ways, no more in memory than
 * fits, and an end that the other side can tell from a failure.
 * Must not know: how connections come about (handshake.test.ts, upstreams.test.ts).
 * Runs: in a test process, against keygates with one worker and SoftHSM.
 */
import assert from 'node:assert/strict';
import { createHash } from 'node:crypto';
import { once } from 'node:events';
import type { Socket } from 'node:net';
import { Readable } from 'node:stream';
import { pipeline } from 'node:stream/promises';
import { after, before, beforeEach, describe, it } from 'node:test';
import type { TLSSocket } from 'node:tls';
import { residentBytes, startKeygate } from '../support/keygate.ts';
import type { Keygate } from '../support/keygate.ts';
import { provisionedToken } from '../support/provisioned-token.ts';
import type { ProvisionedToken } from '../support/provisioned-token.ts';
import { assertEchoes, program, readBytes, restOf, tappedClient, tlsClient } from '../support/tls-client.ts';
import { until } from '../support/until.ts';
import { echoUpstream, hashOf, noise, tcpUpstream } from '../support/upstream.ts';
import type { Upstream } from '../support/upstream.ts';

const mebibyte = 1024 * 1024;

describe('the relay', { timeout: 110_000 }, () => {
  const fixtures = new AsyncDisposableStack();
  let token: ProvisionedToken;
  let echo: Upstream;
  /** Leaves its connections to the test. */
  let manual: Upstream;
  let keygate: Keygate;
  let worker: number;
  let earlier: Readonly<Record<string, number>>;

  before(async () => {
    token = fixtures.use(await provisionedToken({ ec: { kind: 'p256' } }));
    echo = fixtures.use(await echoUpstream());
    manual = fixtures.use(await tcpUpstream((socket) => socket.pause()));
    keygate = fixtures.use(
      await startKeygate(token, {
        upstreams: { echo: { servers: [echo.address] }, manual: { servers: [manual.address] } },
        listeners: {
          echo: { upstream: 'echo' },
          manual: { upstream: 'manual' },
          idle: { upstream: 'echo', deadlines: { idle: '1s' } },
          lifetime: { upstream: 'echo', deadlines: { lifetime: '1s' } },
          halfClosed: { upstream: 'manual', deadlines: { halfClosed: '1s' } },
        },
      }),
    );
    worker = (await keygate.workers())[0]?.pid ?? 0;
  });
  beforeEach(async () => {
    earlier = await keygate.closes();
  });
  after(async () => fixtures.disposeAsync());

  /** Both ends of a new connection. */
  async function pair(listener = 'manual', options = {}): Promise<{ client: TLSSocket; upstream: Socket }> {
    const [client, upstream] = await Promise.all([
      tlsClient({ port: keygate.port(listener), ...options }),
      manual.nextConnection(),
    ]);
    return { client, upstream };
  }

  async function listenerStats(name: string) {
    const { engine } = await keygate.status();
    return engine.listeners.find((listener) => listener.name === name) ?? assert.fail(`no listener ${name}`);
  }

  it('carries a gibibyte to the upstream and back, bit by bit the same', async () => {
    const bytes = 1024 * mebibyte;
    const client = await tlsClient({ port: keygate.port('echo') });
    const sent = createHash('sha256');
    const outgoing = Readable.from(noise(bytes)).on('data', (chunk: Buffer) => sent.update(chunk));
    const [received] = await Promise.all([hashOf(client), pipeline(outgoing, client)]);
    assert.deepEqual(received, { sha256: sent.digest('hex'), bytes });
    await keygate.closed('client/relay/closed', { before: earlier });
    const { toUpstreamBytes, toClientBytes } = await listenerStats('echo');
    assert.ok(toUpstreamBytes >= bytes && toClientBytes >= bytes);
  });

  it('holds 2,000 idle connections in little memory while others work', async () => {
    const count = 2000;
    const first = await tlsClient({ port: keygate.port('echo') });
    const [[session]] = (await Promise.all([once(first, 'session'), assertEchoes(first)])) as [[Buffer], void];
    const before2000 = residentBytes(worker);
    const idle: TLSSocket[] = [];
    while (idle.length < count) {
      const batch = Array.from({ length: 50 }, () => tlsClient({ port: keygate.port('echo'), session }));
      idle.push(...(await Promise.all(batch)));
      await assertEchoes(first);
    }
    await until(`${count} open connections`, async () => (await listenerStats('echo')).connectionsOpen === count + 1);
    await until('connection to the upstream for each', () => echo.sockets.size === count + 1);
    const eachBytes = (residentBytes(worker) - before2000) / count;
    assert.ok(eachBytes < 12 * 1024, `${Math.round(eachBytes / 1024)} KiB each`);
    await Promise.all(idle.map((client, index) => assertEchoes(client, `number ${index}`)));
    await assertEchoes(first);
    for (const client of [first, ...idle]) client.destroy();
    await until('moment without connections', async () => (await listenerStats('echo')).connectionsOpen === 0);
  });

  for (const version of ['TLSv1.2', 'TLSv1.3'] as const) {
    it(`lets the upstream go on when a client of ${version} has ended its half`, async () => {
      const { client, upstream } = await pair('manual', { maxVersion: version });
      client.end('the last word');
      assert.equal(await restOf(upstream), 'the last word');
      upstream.write('not of the ');
      assert.equal(String(await readBytes(client, 11)), 'not of the ');
      upstream.end('upstream');
      assert.equal(await restOf(client), 'upstream');
      await keygate.closed('client/relay/closed', { before: earlier });
    });

    it(`lets a client of ${version} go on when the upstream has ended its half`, async () => {
      const { client, upstream } = await pair('manual', { maxVersion: version });
      upstream.end('the last word');
      assert.equal(await restOf(client), 'the last word');
      client.write('not of the ');
      assert.equal(String(await readBytes(upstream, 11)), 'not of the ');
      client.end('client');
      assert.equal(await restOf(upstream), 'client');
      await keygate.closed('upstream/relay/closed', { before: earlier });
    });

    it(`answers a request that comes in one packet with the end of the handshake and of the client's half, ${version}`, async () => {
      const wire = await tappedClient({ port: keygate.port('echo'), maxVersion: version });
      // The client's Finished ends the handshake of TLS 1.3, the server's that of TLS 1.2.
      if (version === 'TLSv1.3') wire.raw.once('data', () => wire.hold());
      await once(wire.tls, 'secureConnect');
      wire.hold();
      const answer = restOf(wire.tls);
      wire.tls.end('all at once');
      await once(wire.tls, 'finish');
      wire.release();
      assert.equal(await answer, 'all at once');
      await keygate.closed('client/relay/closed', { before: earlier });
    });
  }

  it('stops an upstream whose client does not read, in bounded memory, and loses nothing', async () => {
    const bytes = 128 * mebibyte;
    await assertStops({ bytes, from: 'upstream' });
  });

  it('stops a client whose upstream does not read, in bounded memory, and loses nothing', async () => {
    const bytes = 128 * mebibyte;
    await assertStops({ bytes, from: 'client' });
  });

  /** The sender's bytes stop on their way; when they are read at last, all are there. */
  async function assertStops({
    bytes,
    from,
  }: {
    readonly bytes: number;
    readonly from: 'client' | 'upstream';
  }): Promise<void> {
    const { client, upstream } = await pair();
    const [sender, reader] = from === 'client' ? [client, upstream] : [upstream, client];
    const residentBefore = residentBytes(worker);
    const relayed = async () => {
      const { toUpstreamBytes, toClientBytes } = await listenerStats('manual');
      return from === 'client' ? toUpstreamBytes : toClientBytes;
    };
    const relayedBefore = await relayed();
    const sending = pipeline(Readable.from(noise(bytes)), sender);
    let last = relayedBefore;
    let stillFor = 0;
    await until('standstill', async () => {
      const now = await relayed();
      stillFor = now === last && now > relayedBefore ? stillFor + 1 : 0;
      last = now;
      return stillFor >= 20;
    });
    assert.ok(last - relayedBefore < bytes / 4, `${last - relayedBefore} bytes were taken from the sender`);
    const grownBytes = residentBytes(worker) - residentBefore;
    assert.ok(grownBytes < 4 * mebibyte, `the worker grew by ${grownBytes} bytes`);
    const [received, expected] = await Promise.all([hashOf(reader), hashOf(Readable.from(noise(bytes))), sending]);
    assert.deepEqual(received, expected);
    reader.end();
    await keygate.closed(`${from}/relay/closed`, { before: earlier });
  }

  it('closes a connection without traffic at its idle deadline, and not one with', async () => {
    const port = keygate.port('idle');
    const [quiet, busy] = [await tlsClient({ port }), await tlsClient({ port })];
    await assertEchoes(quiet);
    const end = restOf(quiet);
    while (!quiet.readableEnded) await assertEchoes(busy);
    await end;
    await assertEchoes(busy);
    await keygate.closed('proxy/relay/idle_deadline', { before: earlier });
    busy.destroy();
    quiet.destroy();
  });

  it('closes the busiest connection at its lifetime deadline', async () => {
    const client = await tlsClient({ port: keygate.port('lifetime') });
    await assert.rejects(async () => {
      for (;;) await assertEchoes(client);
    }, /the peer ended early/);
    await keygate.closed('proxy/relay/lifetime_deadline', { before: earlier });
  });

  for (const side of ['client', 'upstream'] as const) {
    it(`closes a connection whose ${side} has ended and whose other side says nothing at the deadline for half-closed ones`, async () => {
      const { client, upstream } = await pair('halfClosed');
      const [ended, silent] = side === 'client' ? [client, upstream] : [upstream, client];
      const over = Promise.all([restOf(silent), restOf(ended)]);
      ended.end('bye');
      assert.deepEqual(await over, ['bye', '']);
      await keygate.closed('proxy/relay/half_closed_deadline', { before: earlier });
      client.destroy();
      upstream.destroy();
    });
  }

  it('tells the upstream of a client that is cut off without close_notify, and counts it as truncated', async () => {
    const { tls, raw } = await tappedClient({ port: keygate.port('manual') });
    const upstream = await manual.nextConnection();
    tls.write('half a mess');
    assert.equal(String(await readBytes(upstream, 11)), 'half a mess');
    raw.end();
    upstream.resume();
    await once(upstream, 'end');
    upstream.end();
    await keygate.closed('client/relay/truncated', { before: earlier });
  });

  it('ends the connection to the upstream when the client resets', async () => {
    const { tls, raw } = await tappedClient({ port: keygate.port('manual') });
    const upstream = await manual.nextConnection();
    raw.resetAndDestroy();
    await restOf(upstream);
    tls.destroy();
    await keygate.closed('client/relay/reset', { before: earlier });
  });

  for (const [what, leave, complaint] of [
    ['ended', (upstream: Socket) => upstream.end(), undefined],
    ['was cut off', (upstream: Socket) => upstream.resetAndDestroy(), 'unexpected eof while reading'],
  ] as const) {
    it(`lets a client know whether the upstream ended or was cut off: it ${what}`, async () => {
      const relayedBefore = (await listenerStats('manual')).toClientBytes;
      const next = manual.nextConnection();
      const client = program('openssl', ['s_client', '-connect', `127.0.0.1:${keygate.port('manual')}`, '-quiet']);
      const upstream = await next;
      upstream.write('half a message?');
      await until('byte relayed', async () => (await listenerStats('manual')).toClientBytes > relayedBefore);
      leave(upstream);
      const { output } = await client;
      assert.ok(output.includes('half a message?'));
      assert.equal(/unexpected eof while reading/.exec(output)?.[0], complaint);
      await keygate.closed(`upstream/relay/${complaint === undefined ? 'closed' : 'reset'}`, { before: earlier });
    });
  }
});
