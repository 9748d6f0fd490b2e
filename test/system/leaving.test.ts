/**
 * Owns: that nothing is left of clients and servers that leave, wherever in a handshake or a connection that is, and that no
 * worker minds. What `npm run test:sanitizers` looks for faults of memory and of threads with.
 * Must not know: what each of them is counted as (hostile.test.ts, relay.test.ts).
 * Runs: against a real `keygate serve` with one worker on SoftHSM, behind the fault module: a signature takes long enough to be
 * left in the middle of.
 */
import assert from 'node:assert/strict';
import { readdirSync } from 'node:fs';
import type { Socket } from 'node:net';
import { after, before, it } from 'node:test';
import { FaultModule } from '../support/fault-module.ts';
import { startKeygate } from '../support/keygate.ts';
import type { Keygate } from '../support/keygate.ts';
import { provisionedToken } from '../support/provisioned-token.ts';
import type { ProvisionedToken } from '../support/provisioned-token.ts';
import { assertEchoes, tappedClient, tlsClient } from '../support/tls-client.ts';
import { until } from '../support/until.ts';
import { tcpUpstream } from '../support/upstream.ts';
import type { Upstream } from '../support/upstream.ts';

const versions = ['TLSv1.2', 'TLSv1.3'] as const;
/** By a FIN or by a RST. */
const ways = { ends: (socket: Socket) => socket.end(), resets: (socket: Socket) => socket.resetAndDestroy() };
type Way = keyof typeof ways;
/** So many places in what one side sends, and at a time so many clients. */
const placesOfASide = 200;
const atATime = 8;
const message = 'are you there?';

let token: ProvisionedToken;
let faults: FaultModule;
let upstream: Upstream;
let keygate: Keygate;
/** What the server does with the next connections; default: echoes. */
let serve: (socket: Socket) => void = echo;

before(async () => {
  token = await provisionedToken({ www: { kind: 'p256' } });
  faults = new FaultModule(token);
  upstream = await tcpUpstream((socket) => serve(socket));
  keygate = await startKeygate(
    token,
    {
      upstreams: { web: { servers: [upstream.address], passive: { failures: 1000 } } },
      listeners: { https: {} },
      tokens: { hsm: { ...token.settings, module: faults.module } },
    },
    { env: faults.env },
  );
});
after(async () => {
  await keygate?.stop();
  await upstream?.close();
  faults?.close();
  token?.dispose();
});

for (const version of versions) {
  for (const way of Object.keys(ways) as Way[]) {
    for (const counted of ['sent', 'received'] as const) {
      it(`a client of ${version} that ${way} wherever in what it has ${counted} leaves nothing behind`, async () => {
        const here = await established();
        faults.slow('C_Sign', { delayMs: 5 });
        const whole = await leaveAt(version, way, counted, Infinity);
        const places = placesIn(whole);
        await atOnce(places, async (place) => leaveAt(version, way, counted, place));
        faults.clear();
        await here.alone();
      });
    }
  }
}

it('a client that leaves while the token signs is not signed for any more, and leaves nothing behind', async () => {
  const here = await established();
  faults.hang('C_Sign');
  const left = Array.from({ length: 50 }, (_, index) => index).map(async (index) => {
    const { tls, raw } = await tappedClient({ port: keygate.port() });
    tls.on('error', () => {});
    return { raw, way: index % 2 === 0 ? ways.ends : ways.resets };
  });
  const clients = await Promise.all(left);
  await until('signature for each', async () => {
    const { tokens } = (await keygate.status()).engine;
    return tokens[0] !== undefined && tokens[0].queueDepthEc + tokens[0].lanesBusy === clients.length;
  });
  const begun = faults.read('C_Sign', 'calls');
  for (const { raw, way } of clients) way(raw);
  await until('end of each', async () => (await connectionsOpen()) === 1);
  faults.clear();
  await here.alone();
  assert.equal(faults.read('C_Sign', 'calls'), begun, 'somebody who had left was signed for');
});

const serversThatLeave: Readonly<Record<string, (socket: Socket) => void>> = {
  'at once': (socket) => socket.end(),
  'by a reset at once': (socket) => socket.resetAndDestroy(),
  'with the first byte': (socket) => void socket.once('data', () => socket.end()),
  'by a reset with the first byte': (socket) => void socket.once('data', () => socket.resetAndDestroy()),
  'after half an answer': (socket) => void socket.once('data', () => socket.end('are')),
  'by a reset after much of an answer': (socket) =>
    void socket.once('data', () => {
      socket.write(Buffer.alloc(1_000_000));
      setTimeout(() => socket.resetAndDestroy(), 5);
    }),
};
for (const [when, leave] of Object.entries(serversThatLeave)) {
  it(`a server that leaves ${when} ends its client and leaves nothing behind`, async () => {
    const here = await established();
    serve = leave;
    await atOnce(
      Array.from({ length: 40 }, (_, index) => index),
      async (index) => {
        const version = versions[index % 2] ?? 'TLSv1.3';
        const client = await tlsClient({ port: keygate.port(), minVersion: version, maxVersion: version });
        const closed = Promise.withResolvers<void>();
        client.once('close', () => closed.resolve());
        client.on('end', () => client.end()).resume();
        client.write(message);
        await closed.promise;
      },
    );
    serve = echo;
    await here.alone();
  });
}

interface Established {
  /** Goes on, and is the only one that is left. */
  alone(): Promise<void>;
}

/** Somebody who is there all the time, and what is open for him. */
async function established(): Promise<Established> {
  const client = await tlsClient({ port: keygate.port() });
  await assertEchoes(client);
  const [worker] = await keygate.workers();
  assert.ok(worker !== undefined);
  const descriptors = () => readdirSync(`/proc/${worker.pid}/fd`).length;
  const open = descriptors();
  return {
    async alone() {
      await assertEchoes(client);
      // A lane may have begun meanwhile, with a descriptor of the module's for its session.
      await until('end of everybody else', async () => (await connectionsOpen()) === 1 && descriptors() <= open, {
        found: () => ({ open, now: descriptors() }),
      });
      client.destroy();
      await until('end of the last one', async () => (await connectionsOpen()) === 0);
      const { workers } = await keygate.status();
      assert.deepEqual(
        workers.map(({ pid, restarts }) => [pid, restarts]),
        [[worker.pid, 0]],
      );
      assert.equal((await keygate.closes())['proxy/internal/panic'], undefined);
      assert.deepEqual(faults.broken, []);
    },
  };
}

async function connectionsOpen(): Promise<number> {
  const { listeners } = (await keygate.status()).engine;
  return listeners.reduce((sum, listener) => sum + listener.connectionsOpen, 0);
}

/**
 * A client that wants an echo and leaves when so many bytes of ciphertext were sent or received, at the latest with the echo.
 * @returns how many there were
 */
async function leaveAt(
  version: (typeof versions)[number],
  way: Way,
  counted: 'sent' | 'received',
  place: number,
): Promise<number> {
  const so = { sent: 0, received: 0 };
  let hasLeft = false;
  const leave = (): void => {
    if (hasLeft) return;
    hasLeft = true;
    setImmediate(() => ways[way](raw));
  };
  const { tls, raw } = await tappedClient(
    { port: keygate.port(), minVersion: version, maxVersion: version },
    (bytes) => {
      const room = counted === 'sent' ? Math.max(0, place - so.sent) : bytes.length;
      so.sent += bytes.length;
      if (counted === 'sent' && so.sent >= place) leave();
      return bytes.subarray(0, room);
    },
  );
  const closed = Promise.withResolvers<void>();
  raw.once('close', () => closed.resolve());
  tls.on('error', () => {});
  raw.on('error', () => {});
  raw.on('data', (bytes: Buffer) => {
    so.received += bytes.length;
    if (counted === 'received' && so.received >= place) leave();
  });
  tls.once('secureConnect', () => tls.write(message));
  tls.once('data', leave);
  await closed.promise;
  return so[counted];
}

/** The first bytes of all, where records begin, and then evenly. */
function placesIn(whole: number): number[] {
  return [
    0,
    1,
    4,
    5,
    6,
    ...Array.from({ length: placesOfASide }, (_, index) => 7 + Math.floor((index * (whole - 7)) / placesOfASide)),
  ];
}

async function atOnce<Item>(items: readonly Item[], work: (item: Item) => Promise<unknown>): Promise<void> {
  const left = items.values();
  await Promise.all(
    Array.from({ length: atATime }, async () => {
      for (const item of left) await work(item);
    }),
  );
}

function echo(socket: Socket): void {
  socket.pipe(socket);
}
