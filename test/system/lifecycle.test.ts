/**
 * Owns: the life of keygate's processes: workers that are killed, that cannot start, that nobody can replace; drains; the
 * account they run as; and that nothing is left of them.
 * Must not know: how a token fails (faults.test.ts), how one process leaves (exit.test.ts).
 * Runs: against a real `keygate serve` on SoftHSM behind the fault module, one token and one keygate per test.
 */
import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { once } from 'node:events';
import { chmodSync, chownSync, lstatSync, readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { createServer } from 'node:net';
import type { AddressInfo } from 'node:net';
import { join } from 'node:path';
import { describe, it } from 'node:test';
import type { TestContext } from 'node:test';
import type { TLSSocket } from 'node:tls';
import { freePort } from '../../bench/processes.ts';
import { FaultModule } from '../support/fault-module.ts';
import { launchKeygate, refusedKeygate, startKeygate } from '../support/keygate.ts';
import type { Keygate, KeygateDocument, LogLine } from '../support/keygate.ts';
import { whyNotNobody } from '../support/nobody.ts';
import { parseScrape } from '../support/prometheus-text.ts';
import { provisionedToken } from '../support/provisioned-token.ts';
import type { ProvisionedToken } from '../support/provisioned-token.ts';
import { assertEchoes, assertServes, rawClient, tlsClient, untilRefused } from '../support/tls-client.ts';
import { until } from '../support/until.ts';
import { echoUpstream } from '../support/upstream.ts';

it('a killed worker costs its own connections, and no other client notices', async (test) => {
  const { keygate } = await service(test, { workers: 2 });
  const scrapes = [await counters(keygate)];
  for (const slot of [0, 1]) {
    const established = await Promise.all(Array.from({ length: 24 }, () => tlsClient({ port: keygate.port() })));
    const stream = clientStream(keygate);
    const echoing = established.map((client) => echoWhile(stream.isRunning, client));
    const killed = await stoppedWorker(keygate, slot);
    stream.workerStopped = true;
    // What the kernel gives to the stopped worker waits in its queue: these were never accepted.
    const waiting = Promise.all(Array.from({ length: 40 }, () => tlsClient({ port: keygate.port() })));
    const since = keygate.log.length;
    process.kill(killed, 'SIGKILL');
    await keygate.logged({ event: 'queue_adopted', worker: slot }, { since });
    scrapes.push(await counters(keygate));
    for (const client of await waiting) {
      await assertEchoes(client);
      client.destroy();
    }
    await keygate.logged({ event: 'worker_ready', worker: slot }, { since });
    scrapes.push(await counters(keygate));

    await stream.end();
    assert.deepEqual(stream.failedAfterStop, [], 'clients that came after the worker was stopped');
    const survivors = (await Promise.all(echoing)).filter((survived) => survived).length;
    assert.ok(
      survivors > 0 && survivors < established.length,
      `${survivors} of ${established.length} connections survived`,
    );
    await until('only the connections of the sibling', async () => (await connectionsOpen(keygate)) === survivors);
    for (const client of established) client.destroy();

    const { workers } = await keygate.status();
    assert.deepEqual(
      workers.map(({ state, restarts }) => [state, restarts]),
      [['ready', 1], slot === 0 ? ['ready', 0] : ['ready', 1]],
    );
    assert.notEqual(workers[slot]?.pid, killed);
    await until('all connections closed', async () => (await connectionsOpen(keygate)) === 0);
  }
  scrapes.push(await counters(keygate));
  assertNeverBackwards(scrapes);
  // A connection that keygate had cut itself would have another reason.
  const others = Object.keys(await keygate.closes()).filter((reason) => !reason.startsWith('client/'));
  assert.deepEqual(others, []);
});

it('a worker that hangs costs a scrape no more than a moment, is not up, and is up again when it goes on', async (test) => {
  const { keygate } = await service(test, { workers: 2 });
  const before = await counters(keygate);
  const [, hung] = await keygate.workers();
  assert.ok(hung !== undefined);
  const up = async () => keygate.metric('keygate_worker_up', { worker: String(hung.slot) });
  assert.equal(await up(), 1);
  process.kill(hung.pid, 'SIGSTOP');
  try {
    await until('worker that is not up', async () => (await up()) === 0, { deadlineMs: 20_000 });
    assertNeverBackwards([before, await counters(keygate)]);
    const other = String(1 - hung.slot);
    assert.equal(await keygate.metric('keygate_worker_up', { worker: other }), 1);
  } finally {
    process.kill(hung.pid, 'SIGCONT');
  }
  await until('worker that is up again', async () => (await up()) === 1);
});

it('a worker that crashes again and again is replaced ever later, and keygate is not ready until it holds', async (test) => {
  const { keygate, faults } = await service(test, { workers: 2 });
  assert.equal((await keygate.admin('/ready')).status, 200);
  // The sibling has all the PKCS#11 sessions it needs.
  await useEveryLane(keygate);
  faults.fail('C_OpenSession', 0x30);
  await killWorker(keygate, 0);
  const lost: LogLine[] = [];
  for (let failuresInRow = 1; failuresInRow <= 4; failuresInRow++) {
    lost.push(await keygate.logged({ event: 'worker_lost', worker: 0, failuresInRow }));
  }
  const delaysMs = lost.slice(1).map((line, index) => msBetween(lost[index], line));
  for (const [index, delayMs] of delaysMs.entries())
    assert.ok(delayMs >= 100 * 2 ** index, `delays in milliseconds: ${delaysMs.join(', ')}`);
  const { status, body } = await keygate.admin('/ready');
  assert.equal(status, 503);
  assert.match(body, /worker 0 has failed \d+ times in a row/);
  await assertServes(keygate.port());

  faults.clear();
  await keygate.logged({ event: 'worker_ready', worker: 0 }, { since: keygate.log.length, deadlineMs: 30_000 });
  await until('readiness', async () => (await keygate.admin('/ready')).status === 200, { deadlineMs: 30_000 });
});

it('a module that crashes costs its worker the connections, and nobody else any', async (test) => {
  const { keygate, faults } = await service(test, { workers: 2 });
  const since = keygate.log.length;
  faults.set('crashLeft', 1);
  await assert.rejects(assertServes(keygate.port()), 'who was signed for');
  const { message, worker } = await keygate.logged({ event: 'worker_lost' }, { since });
  assert.match(message, /was ended by SIGSEGV$/);
  for (let client = 0; client < 10; client++) await assertServes(keygate.port());
  await keygate.logged({ event: 'worker_ready', worker }, { since });
});

it('a primary without descriptors loses nothing, and replaces a worker once it has some again', async (test) => {
  const { keygate } = await service(test, { workers: 2 });
  const established = await Promise.all(Array.from({ length: 24 }, () => tlsClient({ port: keygate.port() })));
  const ofOther = clientsOf(await pidOf(keygate, 0), keygate.port());
  assert.ok(ofOther > 0 && ofOther < established.length);
  // A new one must be below the limit: none at all, or two for a channel and none for a process.
  for (const limit of [() => 1, () => freeDescriptors(keygate.pid)[1] ?? 0]) {
    const since = keygate.log.length;
    // Without a descriptor for the connection the admin server is out of reach.
    const worker = await pidOf(keygate, 1);
    const before = limitDescriptors(keygate.pid, limit());
    process.kill(worker, 'SIGKILL');
    await until('word of a worker that cannot be forked', () =>
      keygate.log
        .slice(since)
        .some(({ event, message }) => event === 'worker_lost' && /cannot be forked/.test(message)),
    );
    await assertServes(keygate.port());
    limitDescriptors(keygate.pid, before);
    await keygate.logged({ event: 'worker_ready', worker: 1 }, { since });
  }
  const echoes = await Promise.allSettled(established.map(async (client) => assertEchoes(client)));
  const survivors = echoes.filter(({ status }) => status === 'fulfilled').length;
  assert.equal(survivors, ofOther);
  for (const client of established) client.destroy();
});

it('a PIN that was changed after the start is tried once, and no worker is started any more', async (test) => {
  const { keygate, faults, token } = await service(test, { workers: 2 });
  const wrongPin = '11223344';
  const logins = faults.read('C_Login', 'calls');
  writeFileSync(token.pinFile, wrongPin);
  await killWorker(keygate, 0);
  await keygate.logged({ event: 'worker_lost', worker: 0, code: 'token_login' });
  const { status, body } = await keygate.admin('/ready');
  assert.equal(status, 503);
  assert.match(body, /no worker may be forked any more.*CKR_PIN_INCORRECT/);
  assert.deepEqual(
    (await keygate.status()).workers.map(({ state }) => state),
    ['waiting', 'ready'],
  );
  // The sibling serves both queues.
  for (let client = 0; client < 20; client++) await assertServes(keygate.port());

  // Nobody is left who could serve.
  await killWorker(keygate, 1);
  const { exitCode, stdout, stderr } = await keygate.ended();
  assert.equal(exitCode, 77);
  assert.equal(faults.read('C_Login', 'calls'), logins + 1);
  for (const pin of [wrongPin, token.pin]) assert.ok(!`${stdout}${stderr}`.includes(pin), 'a PIN was printed');
});

it('a wrong PIN is tried once, however many workers were to start', async (test) => {
  const { token, faults, document } = await ingredients(test, { workers: 4 });
  writeFileSync(token.pinFile, '11223344');
  const { exitCode, stderr } = await refusedKeygate(token, document, { env: faults.env });
  assert.equal(exitCode, 77);
  assert.match(stderr, /CKR_PIN_INCORRECT/);
  assert.equal(faults.read('C_Login', 'calls'), 1);
});

const drains: Readonly<Record<string, (keygate: Keygate) => unknown>> = {
  SIGTERM: ({ pid }) => process.kill(pid, 'SIGTERM'),
  // Ctrl-C in a terminal: the workers get it as well.
  'SIGINT to everybody': ({ pid }) => process.kill(-pid, 'SIGINT'),
  'POST /drain': async (keygate) => keygate.admin('/drain', 'POST'),
};

for (const [name, drain] of Object.entries(drains)) {
  it(`${name} refuses new clients, lets the others end, and cuts at the deadline who stays`, async (test) => {
    const { keygate } = await service(test, { workers: 2, drainDeadline: '2s' });
    const leaver = await tlsClient({ port: keygate.port() });
    const stayers = await Promise.all(Array.from({ length: 4 }, () => tlsClient({ port: keygate.port() })));

    await drain(keygate);
    await keygate.logged({ event: 'drain_started' });
    for (let client = 0; client < 10; client++)
      await assert.rejects(rawClient(keygate.port()), { code: 'ECONNREFUSED' });
    const ready = await keygate.admin('/ready');
    assert.deepEqual([ready.status, ready.body.trim()], [503, 'draining']);
    for (const client of [leaver, ...stayers]) await assertEchoes(client);
    leaver.destroy();

    await Promise.all(stayers.map(ended));
    const { exitCode } = await keygate.ended();
    assert.equal(exitCode, 0);
    assert.equal((await keygate.logged({ event: 'ended' }))['cut'], stayers.length);
  });
}

it('a drain is over when the last connection has ended', async (test) => {
  const { keygate } = await service(test, { workers: 2, drainDeadline: '1h' });
  const client = await tlsClient({ port: keygate.port() });
  process.kill(keygate.pid, 'SIGTERM');
  await keygate.logged({ event: 'drain_started' });
  await assertEchoes(client);
  client.destroy();
  assert.equal((await keygate.ended()).exitCode, 0);
  assert.equal((await keygate.logged({ event: 'ended' }))['cut'], 0);
});

it('a drain ends in time also while C_Sign hangs', async (test) => {
  const { keygate, faults } = await service(test, { drainDeadline: '1s' });
  const established = await tlsClient({ port: keygate.port() });
  faults.hang('C_Sign');
  const pending = assert.rejects(tlsClient({ port: keygate.port() }));
  await until('hang of a lane', () => faults.read('C_Sign', 'inFlight') === 1);
  process.kill(keygate.pid, 'SIGTERM');
  await keygate.logged({ event: 'drain_started' });
  await assertEchoes(established);
  assert.equal((await keygate.ended()).exitCode, 0);
  await pending;
});

it('SIGTERM while the token hangs in the first login ends keygate with 0', async (test) => {
  const { token, faults, document } = await ingredients(test, { drainDeadline: '0s' });
  faults.hang('C_Login');
  const keygate = launchKeygate(token, document, { env: faults.env });
  test.after(() => keygate.kill());
  await until('hang of the login', () => faults.read('C_Login', 'inFlight') === 1);
  process.kill(keygate.pid, 'SIGTERM');
  assert.equal((await keygate.ended()).exitCode, 0);
});

it('a killed primary costs nothing that is established, and the next keygate serves all who come', async (test) => {
  const { keygate, ...parts } = await service(test, { workers: 2, drainDeadline: '60s' });
  const established = await Promise.all(Array.from({ length: 24 }, () => tlsClient({ port: keygate.port() })));
  let isRunning = true;
  const echoing = established.map((client) => echoWhile(() => isRunning, client));
  process.kill(keygate.pid, 'SIGKILL');
  // As its service manager does, with the same configuration.
  await untilRefused(keygate.port());
  const listeners = { https: { bind: [`127.0.0.1:${keygate.port()}`] } };
  const next = await start(test, { ...parts, document: { ...parts.document, listeners } });
  for (let client = 0; client < 48; client++) await assertServes(next.port());
  const lost = keygate.log.filter(({ event }) => event === 'primary_lost');
  assert.deepEqual(new Set(lost.map(({ worker }) => worker)), new Set([0, 1]));

  isRunning = false;
  assert.deepEqual(await Promise.all(echoing), Array(24).fill(true));
  for (const client of established) client.destroy();
  // Also says that no worker holds its standard output any more: they leave with their last connection.
  assert.equal((await keygate.ended()).signal, 'SIGKILL');
  await next.stop();
});

it('the next keygate starts at once also while a worker of a killed primary hangs in a reload', async (test) => {
  const { keygate, ...parts } = await service(test, { drainDeadline: '60s' });
  const established = await tlsClient({ port: keygate.port() });
  parts.faults.only('C_Sign', { pid: await pidOf(keygate, 0) });
  parts.faults.hang('C_Sign');
  // The worker hangs when it has taken the new socket; that of the second reload is on its way to it.
  const [taken, onItsWay] = [await freePort(), await freePort()];
  const listeners = (port: number) => ({ https: {}, api: { bind: [`127.0.0.1:${port}`] } });
  const reload = { ...parts.document, reloadDeadline: '500ms', listeners: listeners(taken) };
  assert.equal((await keygate.reload(reload)).outcome, 'rolled_back');
  keygate.reload({ ...parts.document, listeners: listeners(onItsWay) }).catch(() => {});
  await until('socket of the second reload', () => isListenedOn(onItsWay));

  process.kill(keygate.pid, 'SIGKILL');
  const ports = [keygate.port(), taken, onItsWay];
  for (const port of ports) await untilRefused(port);
  const bind = ports.map((port) => `127.0.0.1:${port}`);
  const next = await start(test, { ...parts, document: { ...parts.document, listeners: { https: { bind } } } });
  await assertServes(next.port());
  await assertEchoes(established);
  established.destroy();
});

it('who waits in the accept queue when the primary is killed is served', async (test) => {
  const { keygate } = await service(test, { drainDeadline: '60s' });
  const worker = await stoppedWorker(keygate, 0);
  const waiting = Promise.all(Array.from({ length: 40 }, () => tlsClient({ port: keygate.port() })));
  await until('clients that wait', () => clientsWaiting(keygate.port()) === 40);
  process.kill(keygate.pid, 'SIGKILL');
  process.kill(worker, 'SIGCONT');
  for (const client of await waiting) {
    await assertEchoes(client);
    client.destroy();
  }
  await keygate.ended();
});

for (const hangs of [false, true]) {
  it(`a killed primary leaves nothing beyond the drain deadline${hangs ? ', also while C_Sign hangs' : ''}`, async (test) => {
    const drainMs = 1000;
    const sections = { workers: 2, drainDeadline: `${drainMs}ms`, log: { access: {} } };
    const { keygate, faults } = await service(test, sections);
    const client = await tlsClient({ port: keygate.port() });
    const address = `127.0.0.1:${client.localPort}`;
    if (hangs) {
      faults.hang('C_Sign');
      tlsClient({ port: keygate.port() }).catch(() => {});
      await until('hang of a lane', () => faults.read('C_Sign', 'inFlight') === 1);
    }
    process.kill(keygate.pid, 'SIGKILL');
    const leave = keygate.ended({ deadlineMs: drainMs + kernelOvertimeMs });
    const [{ signal }] = await Promise.all([leave, untilRefused(keygate.port()), ended(client)]);
    assert.equal(signal, 'SIGKILL');

    // A process that the kernel had ended would have said nothing of its connections.
    const cut = await keygate.logged({ event: 'connection', client: address });
    assert.deepEqual([cut['side'], cut['phase'], cut['reason']], ['proxy', 'drain', 'deadline']);
    const lost = await keygate.logged({ event: 'primary_lost', worker: cut.worker });
    assert.equal(lost['deadlineMs'], drainMs);
    // Clocks are rounded, and a timer of a busy machine is late.
    const lateMs = msBetween(lost, cut) - drainMs;
    assert.ok(lateMs > -5 && lateMs < 2000, JSON.stringify({ lost, cut }));
  });
}

it('a worker that hangs in a reload ends after a killed primary too, whatever the module does', async (test) => {
  const { keygate, faults } = await service(test, { drainDeadline: '0s' });
  faults.hang('C_FindObjectsInit');
  const reload = keygate.reload().catch(() => {});
  await until('hang of the reload', () => faults.read('C_FindObjectsInit', 'inFlight') === 1);
  process.kill(keygate.pid, 'SIGKILL');
  await reload;
  assert.equal((await keygate.ended({ deadlineMs: 2 * kernelOvertimeMs })).signal, 'SIGKILL');
});

it('a worker that hangs in its start ends with a killed primary', async (test) => {
  const { token, faults, document } = await ingredients(test, {});
  faults.hang('C_Login');
  const keygate = launchKeygate(token, document, { env: faults.env });
  test.after(() => keygate.kill());
  await until('hang of the login', () => faults.read('C_Login', 'inFlight') === 1);
  process.kill(keygate.pid, 'SIGKILL');
  assert.equal((await keygate.ended()).signal, 'SIGKILL');
});

describe('started as root with a user', { skip: whyNotNobody() }, () => {
  const access = {
    'who owns the token': (directory: string) => give(directory, nobody, { directories: 0o700, files: 0o600 }),
    'who can only read the token': (directory: string) => give(directory, 0, { directories: 0o750, files: 0o640 }),
  };
  for (const [name, prepare] of Object.entries(access)) {
    it(`keygate binds a privileged port and runs as that user, ${name}`, async (test) => {
      const port = await privilegedPort();
      const parts = await ingredients(test, { workers: 2, user: 'nobody' }, { bind: [`127.0.0.1:${port}`] });
      const { token, document } = parts;
      prepare(token.directory);
      // Without the fault module, whose control file would have to be writable.
      const keygate = await start(test, { ...parts, document: { ...document, tokens: { hsm: token.settings } } });
      for (let client = 0; client < 10; client++) await assertServes(keygate.port());
      assert.equal(keygate.port(), port);

      const workers = [await pidOf(keygate, 0), await pidOf(keygate, 1)];
      for (const pid of [keygate.pid, ...workers]) {
        assert.deepEqual(statusOf(pid, 'Uid'), Array(4).fill(String(nobody)));
        assert.deepEqual(statusOf(pid, 'Gid'), Array(4).fill(String(nobody)));
        assert.deepEqual(statusOf(pid, 'CapEff'), ['0000000000000000']);
      }
      for (const pid of workers) assert.deepEqual(statusOf(pid, 'NoNewPrivs'), ['1']);

      // A worker that is started later has no more rights than the first.
      const since = keygate.log.length;
      await killWorker(keygate, 0);
      await keygate.logged({ event: 'worker_ready', worker: 0 }, { since });
      for (let client = 0; client < 10; client++) await assertServes(keygate.port());
    });
  }
});

/** By then after the drain deadline the kernel ends a worker without a primary that has not left (src/worker/main.ts). */
const kernelOvertimeMs = 5000;

interface Parts {
  readonly token: ProvisionedToken;
  readonly faults: FaultModule;
  readonly document: KeygateDocument;
}

/** A token behind the fault module and an echo upstream, which go with the test. */
async function ingredients(test: TestContext, sections: object, listener: object = {}): Promise<Parts> {
  const token = await provisionedToken({ www: { kind: 'p256' } });
  const upstream = await echoUpstream();
  const faults = new FaultModule(token);
  test.after(async () => {
    await upstream.close();
    faults.close();
    token.dispose();
  });
  const document = {
    upstreams: { echo: { servers: [upstream.address] } },
    listeners: { https: listener },
    tokens: { hsm: { ...token.settings, module: faults.module, signDeadline: '1m' } },
    drainDeadline: '0s',
    ...sections,
  };
  return { token, faults, document };
}

async function start(test: TestContext, { token, faults, document }: Parts): Promise<Keygate> {
  const keygate = await startKeygate(token, document, { env: faults.env });
  test.after(() => keygate.kill());
  return keygate;
}

async function service(test: TestContext, sections: object): Promise<Parts & { readonly keygate: Keygate }> {
  const parts = await ingredients(test, sections);
  return { ...parts, keygate: await start(test, parts) };
}

async function killWorker(keygate: Keygate, slot: number): Promise<void> {
  process.kill(await pidOf(keygate, slot), 'SIGKILL');
}

/** @returns its process id when each of its threads has stopped */
async function stoppedWorker(keygate: Keygate, slot: number): Promise<number> {
  const pid = await pidOf(keygate, slot);
  process.kill(pid, 'SIGSTOP');
  await until('stopped worker', () =>
    readdirSync(`/proc/${pid}/task`).every((thread) =>
      /\) T /.test(readFileSync(`/proc/${pid}/task/${thread}/stat`, 'utf8')),
    ),
  );
  return pid;
}

async function pidOf(keygate: Keygate, slot: number): Promise<number> {
  const { pid } = (await keygate.status()).workers[slot] ?? {};
  assert.ok(pid !== undefined, `no worker in slot ${slot}`);
  return pid;
}

interface ClientStream {
  /** Set when a worker accepts nothing any more: whoever comes from then on must be served. */
  workerStopped: boolean;
  readonly failedAfterStop: readonly unknown[];
  readonly isRunning: () => boolean;
  end(): Promise<void>;
}

/** Clients that come one after the other, a few at once, and want an echo each. */
function clientStream(keygate: Keygate): ClientStream {
  const failedAfterStop: unknown[] = [];
  let running = true;
  const stream: ClientStream = {
    workerStopped: false,
    failedAfterStop,
    isRunning: () => running,
    async end() {
      running = false;
      await Promise.all(clients);
    },
  };
  const clients = [1, 2, 3].map(async () => {
    while (stream.isRunning()) {
      const mustBeServed = stream.workerStopped;
      try {
        await assertServes(keygate.port());
      } catch (error) {
        if (mustBeServed) failedAfterStop.push(error);
      }
    }
  });
  return stream;
}

/** @returns whether the connection echoed as long as it was asked to */
async function echoWhile(goesOn: () => boolean, client: TLSSocket): Promise<boolean> {
  try {
    while (goesOn()) await assertEchoes(client);
    return true;
  } catch {
    return false;
  }
}

/** Established connections to the port that this process has. */
function clientsOf(pid: number, port: number): number {
  const found = execFileSync('ss', ['-Htnp', 'state', 'established', `sport = :${port}`], { encoding: 'utf8' });
  return found.split('\n').filter((line) => line.includes(`pid=${pid},`)).length;
}

/** Numbers that it has not given to a file, lowest first. */
function freeDescriptors(pid: number): number[] {
  const taken = new Set(readdirSync(`/proc/${pid}/fd`).map(Number));
  return Array.from({ length: taken.size + 10 }, (_, number) => number).filter((number) => !taken.has(number));
}

/** @returns what the limit was */
function limitDescriptors(pid: number, limit: number): number {
  const [, soft] = /^Max open files +(\d+)/m.exec(readFileSync(`/proc/${pid}/limits`, 'utf8')) ?? [];
  execFileSync('prlimit', ['--pid', String(pid), `--nofile=${limit}:`]);
  return Number(soft);
}

/** How many clients are in the accept queue: the rx_queue of a listening socket. */
function clientsWaiting(port: number): number {
  const queues = listeningAt(port).map(([, , , , queues]) => queues);
  return queues.reduce((sum, queue) => sum + Number.parseInt(queue?.split(':')[1] ?? '', 16), 0);
}

function isListenedOn(port: number): boolean {
  return listeningAt(port).length > 0;
}

/** Lines of proc(5), `/proc/net/tcp`. */
function listeningAt(port: number): string[][] {
  const local = `0100007F:${port.toString(16).toUpperCase().padStart(4, '0')}`;
  const lines = readFileSync('/proc/net/tcp', 'utf8')
    .split('\n')
    .map((line) => line.trim().split(/\s+/));
  return lines.filter(([, address, , state]) => address === local && state === '0A');
}

/** Resolves when the peer has ended the connection, be it by a reset. */
async function ended(client: TLSSocket): Promise<void> {
  const closed = Promise.withResolvers<void>();
  client.once('close', () => closed.resolve());
  client.on('end', () => client.destroy()).resume();
  await closed.promise;
}

/** Lanes open their PKCS#11 sessions when they are needed first. */
async function useEveryLane(keygate: Keygate): Promise<void> {
  await until('PKCS#11 session of each lane', async () => {
    await Promise.all(Array.from({ length: 20 }, () => assertServes(keygate.port())));
    const [token] = (await keygate.status()).engine.tokens;
    return token !== undefined && token.lanesIdle === 2 * lanesPerWorker;
  });
}

const lanesPerWorker = 2;

function msBetween(earlier: LogLine | undefined, later: LogLine): number {
  return Date.parse(String(later['time'])) - Date.parse(String(earlier?.['time']));
}

async function connectionsOpen(keygate: Keygate): Promise<number> {
  const { listeners } = (await keygate.status()).engine;
  return listeners.reduce((sum, listener) => sum + listener.connectionsOpen, 0);
}

/** Every series that may only grow. */
async function counters(keygate: Keygate): Promise<Map<string, number>> {
  const families = parseScrape((await keygate.admin('/metrics')).body);
  return new Map([...families.values()].filter(({ type }) => type !== 'gauge').flatMap(({ series }) => [...series]));
}

function assertNeverBackwards(scrapes: readonly ReadonlyMap<string, number>[]): void {
  for (const [index, earlier] of scrapes.slice(0, -1).entries()) {
    const later = scrapes[index + 1];
    for (const [series, value] of earlier) {
      const next = later?.get(series);
      assert.ok(next !== undefined && next >= value, `${series} went from ${value} to ${next}`);
    }
  }
}

const nobody = 65_534;

/** To `owner`, and nobody's group. */
function give(directory: string, owner: number, modes: { readonly directories: number; readonly files: number }): void {
  const inside = readdirSync(directory, { recursive: true, encoding: 'utf8' }).map((path) => join(directory, path));
  for (const path of [directory, ...inside]) {
    chownSync(path, owner, nobody);
    chmodSync(path, lstatSync(path).isDirectory() ? modes.directories : modes.files);
  }
}

/** One that is free now. */
async function privilegedPort(): Promise<number> {
  for (let port = 1023; port > 512; port--) {
    const server = createServer();
    try {
      server.listen({ host: '127.0.0.1', port });
      await once(server, 'listening');
      return (server.address() as AddressInfo).port;
    } catch {
      // Somebody has it.
    } finally {
      server.close();
    }
  }
  return assert.fail('no privileged port is free');
}

/** A field of proc(5)'s status, in words. */
function statusOf(pid: number, field: string): string[] {
  const line = new RegExp(`^${field}:\\s+(.*)$`, 'm').exec(readFileSync(`/proc/${pid}/status`, 'utf8'));
  return line?.[1]?.split(/\s+/) ?? [];
}
