/**
 * Owns: that floods stay within limits: memory is bounded, whoever was there goes on, and nobody has to restart anything.
 * Must not know: single bad clients (hostile.test.ts).
 * Runs: against a real `keygate serve` with SoftHSM; hundreds of clients in the test's own process.
 */
import assert from 'node:assert/strict';
import { connect } from 'node:net';
import type { Socket } from 'node:net';
import { after, before, beforeEach, describe, it } from 'node:test';
import { residentBytes, startKeygate } from '../support/keygate.ts';
import type { Keygate } from '../support/keygate.ts';
import { provisionedToken } from '../support/provisioned-token.ts';
import type { ProvisionedToken } from '../support/provisioned-token.ts';
import { assertEchoes, clientHello, tlsClient } from '../support/tls-client.ts';
import { until } from '../support/until.ts';
import { echoUpstream, tcpUpstream } from '../support/upstream.ts';

const handshakesMax = 300;
/** What allocators keep, whoever comes. With what each test allows a client it is twice what is measured. */
const baseBytes = 4 * 1024 * 1024;

describe('a flood', { timeout: 110_000 }, () => {
  const fixtures = new AsyncDisposableStack();
  let token: ProvisionedToken;
  let keygate: Keygate;
  let bystander: Socket;
  let worker: number;
  let earlier: Readonly<Record<string, number>>;

  before(async () => {
    token = fixtures.use(await provisionedToken({ p256: { kind: 'p256' } }));
    const echo = fixtures.use(await echoUpstream());
    const endless = fixtures.use(await tcpUpstream(pour));
    keygate = fixtures.use(
      await startKeygate(token, {
        drainDeadline: '0s',
        upstreams: { echo: { servers: [echo.address] }, endless: { servers: [endless.address] } },
        listeners: {
          https: {},
          few: { limits: { handshakes: handshakesMax } },
          hasty: { deadlines: { handshake: '2s' } },
          endless: { upstream: 'endless' },
        },
      }),
    );
    bystander = await tlsClient({ port: keygate.port() });
    fixtures.defer(() => void bystander.destroy());
    const [{ pid } = { pid: 0 }] = await keygate.workers();
    worker = pid;
  });
  beforeEach(async () => {
    earlier = await keygate.closes();
  });
  after(async () => fixtures.disposeAsync());

  it('of handshakes that nobody ends costs the limit and no more, and the rest is shed at once', async (test) => {
    const hello = await clientHello();
    const before = residentBytes(worker);
    const crowd = await crowdOf(4 * handshakesMax, keygate.port('few'), (client) => void client.write(hello));
    await keygate.closed('proxy/accept/handshake_limit', { count: 3 * handshakesMax, before: earlier });
    await assertEchoes(bystander);
    const growth = residentBytes(worker) - before;
    test.diagnostic(`the worker grew by ${Math.round(growth / 1024)} KiB`);
    assert.ok(growth < baseBytes + handshakesMax * 32 * 1024, `${growth} bytes`);
    end(crowd);
    await until('room', async () => (await inFlight('few')) === 0);
    const next = await tlsClient({ port: keygate.port('few') });
    await assertEchoes(next);
    next.destroy();
  });

  it('of clients that say a byte now and then ends at the deadline', async (test) => {
    const hello = await clientHello();
    const count = 400;
    const before = residentBytes(worker);
    const crowd = await crowdOf(count, keygate.port('hasty'), (client) => {
      let said = 0;
      const timer = setInterval(() => client.write(hello.subarray(said, (said += 1))), 100);
      client.once('close', () => clearInterval(timer));
    });
    await keygate.closed('client/handshake/deadline', { count, before: earlier });
    await assertEchoes(bystander);
    const growth = residentBytes(worker) - before;
    test.diagnostic(`the worker grew by ${Math.round(growth / 1024)} KiB`);
    assert.ok(growth < baseBytes + count * 16 * 1024, `${growth} bytes`);
    end(crowd);
  });

  it('of clients that never read what they asked for costs a little memory each, and no more with time', async (test) => {
    const count = 200;
    const before = residentBytes(worker);
    const crowd: Socket[] = [];
    for (let index = 0; index < count; index += 1) {
      const client = await tlsClient({ port: keygate.port('endless') });
      client.pause();
      crowd.push(client);
    }
    await until('state in which nothing is relayed any more', async () => {
      const first = await relayed();
      await assertEchoes(bystander, 'x'.repeat(1000));
      return first > 0 && (await relayed()) === first;
    });
    const growth = residentBytes(worker) - before;
    test.diagnostic(`the worker grew by ${Math.round(growth / 1024)} KiB`);
    assert.ok(growth < baseBytes + count * 256 * 1024, `${growth} bytes`);
    end(crowd);
    await until('end of them all', async () => (await listener('endless'))?.connectionsOpen === 0);
  });

  async function listener(name: string) {
    const { engine } = await keygate.status();
    return engine.listeners.find((it) => it.name === name);
  }

  async function inFlight(name: string): Promise<number> {
    return (await listener(name))?.handshakesInFlight ?? -1;
  }

  async function relayed(): Promise<number> {
    return (await keygate.metric('keygate_relay_bytes_total', { listener: 'endless' })) ?? 0;
  }
});

/** Connections that were accepted by the kernel at least; what becomes of them is the server's business. */
async function crowdOf(count: number, port: number, begin: (client: Socket) => void): Promise<Socket[]> {
  const crowd: Socket[] = [];
  for (let index = 0; index < count; index += 1) {
    const client = connect({ host: '127.0.0.1', port, noDelay: true });
    client.on('error', () => {});
    client.resume();
    await new Promise<void>((settled) => {
      client.once('connect', settled).once('close', () => settled());
    });
    begin(client);
    crowd.push(client);
  }
  return crowd;
}

function end(crowd: readonly Socket[]): void {
  for (const client of crowd) client.destroy();
}

/** Writes for ever, as fast as it is taken. */
function pour(client: Socket): void {
  const chunk = Buffer.alloc(64 * 1024);
  const write = (): void => {
    while (!client.destroyed && client.write(chunk));
  };
  client.on('drain', write);
  client.on('error', () => {});
  client.resume();
  write();
}
