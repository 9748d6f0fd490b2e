/**
 * Owns: to which server a connection goes, and what becomes of connections and servers when one is not there.
 * Must not know: what is relayed (relay.test.ts).
 * Runs: in a test process, against one keygate with one worker and SoftHSM: balance is each worker's own.
 */
import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { connect } from 'node:net';
import { join } from 'node:path';
import { after, before, beforeEach, describe, it } from 'node:test';
import type { TLSSocket } from 'node:tls';
import type { ServerSnapshot } from '../../src/engine/native.d.ts';
import { startKeygate } from '../support/keygate.ts';
import type { Keygate } from '../support/keygate.ts';
import { provisionedToken } from '../support/provisioned-token.ts';
import type { ProvisionedToken } from '../support/provisioned-token.ts';
import { assertEchoes, restOf, tlsClient } from '../support/tls-client.ts';
import { until } from '../support/until.ts';
import { echoUpstream } from '../support/upstream.ts';
import type { Upstream } from '../support/upstream.ts';

describe('an upstream', { timeout: 60_000 }, () => {
  const fixtures = new AsyncDisposableStack();
  let token: ProvisionedToken;
  let three: Upstream[];
  let two: Upstream[];
  let sound: Upstream;
  let returning: Upstream;
  let checked: Upstream[];
  let keygate: Keygate;
  let earlier: Readonly<Record<string, number>>;

  before(async () => {
    token = fixtures.use(await provisionedToken({ ec: { kind: 'p256' } }));
    const echo = async (place = {}) => fixtures.use(await echoUpstream(place));
    three = [await echo(), await echo(), await echo()];
    two = [await echo(), await echo()];
    checked = [await echo(), await echo()];
    sound = await echo();
    returning = await echo();
    const unix = await echo({ path: join(token.directory, 'echo.sock') });
    const six = await echo({ host: '::1' });
    const full = fixtures.use(await fullServer());
    const [refusing, alsoRefusing] = [await vacantAddress(), await vacantAddress()];
    const addresses = (upstreams: readonly Upstream[]) => upstreams.map(({ address }) => address);
    keygate = fixtures.use(
      await startKeygate(token, {
        upstreams: {
          sound: { servers: [sound.address] },
          three: { servers: addresses(three) },
          least: { servers: addresses(two), balance: 'least-connections' },
          unix: { servers: [unix.address] },
          six: { servers: [six.address] },
          refusing: { servers: [refusing] },
          half: { servers: [refusing, sound.address], passive: { failures: 3, ejection: '1h' } },
          single: { servers: [alsoRefusing, sound.address], attempts: 1, passive: { failures: 1000 } },
          missing: { servers: [`unix:${join(token.directory, 'missing.sock')}`] },
          full: { servers: [full.address], connectDeadline: '200ms' },
          returning: { servers: [returning.address, sound.address], passive: { failures: 1, ejection: '100ms' } },
          checked: { servers: addresses(checked), health: { tcp: '100ms', fall: 2, rise: 2 } },
        },
        listeners: {
          ...Object.fromEntries(
            [
              'sound',
              'three',
              'least',
              'unix',
              'refusing',
              'half',
              'single',
              'missing',
              'full',
              'returning',
              'checked',
            ].map((name) => [name, { upstream: name }]),
          ),
          six: { upstream: 'six', bind: ['[::1]:0'] },
        },
      }),
    );
  });
  beforeEach(async () => {
    earlier = await keygate.closes();
  });
  after(async () => fixtures.disposeAsync());

  async function connected(listener: string, host = '127.0.0.1'): Promise<TLSSocket> {
    const client = await tlsClient({ port: keygate.port(listener), host });
    await assertEchoes(client, `through ${listener}`);
    return client;
  }

  /** One after the other, each with an echo. */
  async function connectTimes(listener: string, count: number): Promise<void> {
    for (let time = 0; time < count; time += 1) (await connected(listener)).destroy();
  }

  async function servers(upstream: string): Promise<readonly ServerSnapshot[]> {
    const { engine } = await keygate.status();
    return engine.upstreams.find(({ name }) => name === upstream)?.servers ?? assert.fail(`no upstream ${upstream}`);
  }

  async function connects(upstream: string, outcome: string): Promise<number[]> {
    return (await servers(upstream)).map(
      (server) => server.connects.find((found) => found.outcome === outcome)?.count ?? 0,
    );
  }

  it('with three servers gets connections in turn', async () => {
    await connectTimes('three', 30);
    assert.deepEqual(
      three.map(({ accepted }) => accepted),
      [10, 10, 10],
    );
  });

  it('balanced by connections gets the next where the fewest are open', async () => {
    const open = () => two.map(({ sockets }) => sockets.size);
    const onFirst: TLSSocket[] = [];
    for (let count = 0; count < 6; count += 1) {
      const [openBefore = 0] = open();
      const client = await connected('least');
      fixtures.defer(() => void client.destroy());
      if ((open()[0] ?? 0) > openBefore) onFirst.push(client);
    }
    assert.deepEqual(open(), [3, 3]);
    for (const client of onFirst) client.destroy();
    await until('room on the first server', async () => (await servers('least'))[0]?.connectionsOpen === 0);
    for (let count = 0; count < 3; count += 1) {
      const client = await connected('least');
      fixtures.defer(() => void client.destroy());
    }
    assert.deepEqual(open(), [3, 3]);
  });

  it('may be a unix socket', async () => {
    (await connected('unix')).destroy();
  });

  it('and its listener may have IPv6 addresses', async () => {
    assert.match(keygate.addresses['six']?.[0] ?? '', /^\[::1\]:\d+$/);
    (await connected('six', '::1')).destroy();
  });

  for (const [listener, what, reason] of [
    ['refusing', 'refuses', 'refused'],
    ['missing', 'has no socket', 'unreachable'],
    ['full', 'does not answer', 'deadline'],
  ] as const) {
    it(`that ${what} costs its clients the connection, counted as ${reason}, and nobody else`, async () => {
      const bystander = await connected('sound');
      const client = await tlsClient({ port: keygate.port(listener) });
      assert.equal(await restOf(client), '');
      await keygate.closed(`upstream/connect/${reason}`, { before: earlier });
      await assertEchoes(bystander);
      (await connected('sound')).destroy();
      bystander.destroy();
      client.destroy();
    });
  }

  it('that is down is said once in the log, not once for each client', async () => {
    const since = keygate.log.length;
    for (let count = 0; count < 20; count += 1) {
      const client = await tlsClient({ port: keygate.port('refusing') });
      await restOf(client);
      client.destroy();
    }
    await keygate.logged({ event: 'server_down', server: `refusing ${(await servers('refusing'))[0]?.address ?? ''}` });
    assert.ok(keygate.log.length - since <= 1, JSON.stringify(keygate.log.slice(since)));
  });

  it('with a server that refuses serves everybody from the next, and soon asks that server no more', async () => {
    await connectTimes('half', 20);
    assert.deepEqual(await connects('half', 'ok'), [0, 20]);
    assert.deepEqual(await connects('half', 'refused'), [3, 0]);
    assert.deepEqual(
      (await servers('half')).map(({ up }) => up),
      [false, true],
    );
    assert.equal(
      await keygate.metric('keygate_connections_closed_total', { side: 'upstream', phase: 'connect' }),
      failedConnects(earlier),
    );
  });

  it('is tried no more often than its attempts', async () => {
    let refused = 0;
    for (let count = 0; count < 4; count += 1) {
      const client = await tlsClient({ port: keygate.port('single') });
      client.end();
      await restOf(client);
      client.destroy();
      refused = (await connects('single', 'refused'))[0] ?? 0;
    }
    assert.equal(refused, 2, 'every other connection begins with the server that refuses');
    await keygate.closed('upstream/connect/refused', { before: earlier, count: 2 });
  });

  it('gets a server back that was ejected, as soon as that takes a connection again', async () => {
    const { address } = returning;
    await returning.close();
    await until('ejection', async () => {
      await connectTimes('returning', 1);
      return (await servers('returning'))[0]?.up === false;
    });
    const port = Number(address.split(':').at(-1));
    fixtures.use(await echoUpstream({ port }));
    const okBefore = (await connects('returning', 'ok'))[0] ?? 0;
    await until('connection to the returned server', async () => {
      await connectTimes('returning', 1);
      return ((await connects('returning', 'ok'))[0] ?? 0) > okBefore;
    });
    assert.ok((await servers('returning'))[0]?.up);
    assert.deepEqual(await keygate.closes().then(failedConnects), failedConnects(earlier), 'no client has noticed');
  });

  it('with checks loses a server that is gone and gets it back, without a client having tried', async () => {
    const [first, second] = checked as [Upstream, Upstream];
    await connectTimes('checked', 2);
    await first.close();
    const isUp = async (index: number) => (await servers('checked'))[index]?.up;
    await until('server taken out by checks', async () => (await isUp(0)) === false);
    const [okFirst = 0, okSecond = 0] = await connects('checked', 'ok');
    await connectTimes('checked', 6);
    assert.deepEqual(await connects('checked', 'ok'), [okFirst, okSecond + 6]);
    assert.deepEqual(await connects('checked', 'refused'), [0, 0], 'no client was sent to it');
    await keygate.logged({ event: 'server_down', server: `checked ${first.address}` });

    await second.close();
    await until('second server taken out', async () => (await isUp(1)) === false);
    const client = await tlsClient({ port: keygate.port('checked') });
    assert.equal(await restOf(client), '');
    client.destroy();
    await keygate.closed('upstream/connect/no_server', { before: earlier });

    for (const { address } of [first, second])
      fixtures.use(await echoUpstream({ port: Number(address.split(':').at(-1)) }));
    await until('both servers back', async () => (await isUp(0)) === true && (await isUp(1)) === true);
    await connectTimes('checked', 4);
    assert.deepEqual(await connects('checked', 'ok'), [okFirst + 2, okSecond + 8]);
    await keygate.logged({ event: 'server_up', server: `checked ${first.address}` });
  });
});

function failedConnects(closes: Readonly<Record<string, number>>): number {
  return Object.entries(closes).reduce(
    (sum, [reason, count]) => (reason.startsWith('upstream/connect/') ? sum + count : sum),
    0,
  );
}

/** Where nobody listens. */
async function vacantAddress(): Promise<string> {
  const upstream = await echoUpstream();
  await upstream.close();
  return upstream.address;
}

/** A server whose accept queue is full: its kernel drops what comes further (listen(2)). */
async function fullServer(): Promise<{ readonly address: string; [Symbol.asyncDispose](): Promise<void> }> {
  const script = `
import socket, sys
listener = socket.socket()
listener.bind(("127.0.0.1", 0))
listener.listen(0)
print(listener.getsockname()[1], flush=True)
sys.stdin.read()`;
  const child = spawn('python3', ['-c', script], { stdio: ['pipe', 'pipe', 'inherit'] });
  const [line] = (await once(child.stdout, 'data')) as [Buffer];
  const port = Number(line.toString());
  const first = connect({ host: '127.0.0.1', port });
  await once(first, 'connect');
  return {
    address: `127.0.0.1:${port}`,
    async [Symbol.asyncDispose]() {
      first.destroy();
      child.stdin.end();
      await once(child, 'exit');
    },
  };
}
