/**
 * Owns: sockets that a service manager passes: they are served on, shared, kept over restarts and reloads, or refused.
 * Must not know: systemd's units (units.test.ts).
 * Runs: against a real `keygate serve` with two workers on SoftHSM, passed sockets as systemd passes them, and once by
 * systemd's own systemd-socket-activate.
 */
import assert from 'node:assert/strict';
import { spawnSync } from 'node:child_process';
import { once } from 'node:events';
import { closeSync, readdirSync, readFileSync } from 'node:fs';
import { connect, createServer } from 'node:net';
import { it } from 'node:test';
import type { TestContext } from 'node:test';
import type { TLSSocket } from 'node:tls';
import { engine } from '../../src/engine/binding.ts';
import { launchKeygate, refusedKeygate, startKeygate } from '../support/keygate.ts';
import type { Keygate, KeygateDocument, LaunchOptions } from '../support/keygate.ts';
import { provisionedToken } from '../support/provisioned-token.ts';
import type { ProvisionedToken } from '../support/provisioned-token.ts';
import { assertEchoes, tlsClient } from '../support/tls-client.ts';
import { until } from '../support/until.ts';
import { echoUpstream } from '../support/upstream.ts';

it('a passed socket is served on by every worker, also by one that was replaced', async (test) => {
  const { start, https } = await ingredients(test);
  await using keygate = await start([https]);
  assert.deepEqual(keygate.addresses, { https: [https.address] });
  await assertBothAccept(keygate, https);

  const [killed] = await keygate.workers();
  assert.ok(killed !== undefined);
  const since = keygate.log.length;
  process.kill(killed.pid, 'SIGKILL');
  await keygate.logged({ event: 'worker_ready', worker: killed.slot }, { since });
  await assertBothAccept(keygate, https);
});

it('every one of several sockets of an address is accepted from', async (test) => {
  const { start, https, another } = await ingredients(test);
  const [second, third] = [another(https.address), another(https.address)];
  await using keygate = await start([https, second, third]);
  assert.deepEqual(keygate.addresses, { https: [https.address] });
  // The kernel spreads connections over the sockets: one that nobody accepts from would leave some of these waiting.
  for (let client = 0; client < 48; client++) await assertServed(https.port);
});

it('an address without a passed socket is opened beside those that have one', async (test) => {
  const { start, https, document } = await ingredients(test);
  const listeners = { ...document.listeners, other: { bind: ['127.0.0.1:0'] } };
  await using keygate = await start([https], { ...document, listeners });
  await assertServed(https.port);
  await assertServed(keygate.port('other'));
});

it('a restart loses no client: who comes while it drains, or while none runs, is served by it or by the next', async (test) => {
  const { start, https } = await ingredients(test);
  const first = await start([https]);
  const open = await tlsClient({ port: https.port });
  process.kill(first.pid, 'SIGTERM');
  await first.logged({ event: 'drain_started' });
  // The open connection holds the drain: workers that accept no more are there for a while.
  const whileDraining = Array.from({ length: 10 }, () => waitingClient(https.port));
  for (const { connected } of whileDraining) await connected;
  const served = Promise.all(whileDraining.map(async ({ handshake }) => endServed(await handshake)));
  await assertEchoes(open);
  open.destroy();
  await first.stop();
  const whileNobodyRuns = waitingClient(https.port);
  await whileNobodyRuns.connected;

  await using second = await start([https]);
  await served;
  await endServed(await whileNobodyRuns.handshake);
  assert.ok(((await second.metric('keygate_connections_accepted_total', { listener: 'https' })) ?? 0) >= 1);
});

it('a reload keeps a passed socket, and is refused when it would drop one', async (test) => {
  const { start, https, document } = await ingredients(test);
  await using keygate = await start([https]);
  const changed = { ...document, listeners: { https: { bind: [https.address], alpn: ['http/1.1'] } } };
  assert.equal((await keygate.reload(changed)).outcome, 'committed');
  await assertServed(https.port);

  const elsewhere = { ...document, listeners: { https: { bind: ['127.0.0.1:0'] } } };
  const { outcome, reasons } = await keygate.reload(elsewhere);
  assert.equal(outcome, 'refused');
  assert.equal(reasons[0]?.code, 'bind_failed');
  assert.match(reasons[0].message, new RegExp(`no listener binds the passed socket .*:${https.port}`));
  await assertServed(https.port);

  assert.equal((await keygate.reload(document)).outcome, 'committed');
  await assertBothAccept(keygate, https);
});

it('workers are not told that sockets were passed', async (test) => {
  const { start, https } = await ingredients(test);
  await using keygate = await start([https]);
  for (const { pid } of await keygate.workers()) {
    const names = readFileSync(`/proc/${pid}/environ`, 'utf8')
      .split('\0')
      .map((entry) => entry.split('=')[0] ?? '');
    assert.deepEqual(
      names.filter((name) => name.startsWith('LISTEN_')),
      [],
    );
  }
});

it('sockets that were passed to another process are left alone', async (test) => {
  const { token, document } = await ingredients(test);
  const free = { ...document, listeners: { https: { bind: ['127.0.0.1:0'] } } };
  await using keygate = await startKeygate(token, free, { env: { LISTEN_PID: '1', LISTEN_FDS: '1' } });
  await assertServed(keygate.port());
});

it('a passed socket that no listener binds is refused by name', async (test) => {
  const { token, document, https, another } = await ingredients(test);
  const foreign = another('127.0.0.1:0');
  const { exitCode, stderr } = await refusedKeygate(token, document, passing([https, foreign]));
  assert.equal(exitCode, 1);
  assert.match(
    stderr,
    new RegExp(`bind_failed.*no listener binds the passed socket ${foreign.address} \\(descriptor 4, socket-1\\)`),
  );
  assert.ok(stderr.includes(`expected ${https.address}`), stderr);
});

it('what is passed and cannot be listened on as configured is refused by name', async (test) => {
  const { token, document } = await ingredients(test);
  const channel = engine().openHandover();
  const bothFamilies = createServer().listen({ host: '::', port: 0 });
  await once(bothFamilies, 'listening');
  test.after(() => {
    for (const fd of [channel.primary, channel.worker]) closeSync(fd);
    bothFamilies.close();
  });
  // Node has no other way to tell it.
  const { _handle: handle } = bothFamilies as unknown as { readonly _handle: { readonly fd: number } };
  for (const [own, found] of [
    [channel.worker, 'it is not a TCP socket'],
    [handle.fd, 'it takes IPv4 as well as IPv6; hint: set BindIPv6Only=ipv6-only'],
  ] as const) {
    const { exitCode, stderr } = await refusedKeygate(token, document, passing([{ fd: own }]));
    assert.equal(exitCode, 1);
    assert.ok(stderr.includes('bind_failed') && stderr.includes('descriptor 3 (socket-0)'), stderr);
    assert.ok(
      found.split('; hint: ').every((part) => stderr.includes(part)),
      stderr,
    );
  }
});

it('systemd-socket-activate starts it with the first client', async (test) => {
  if (spawnSync('systemd-socket-activate', ['--version']).error !== undefined) {
    test.skip('systemd-socket-activate is not installed');
    return;
  }
  const { token, document, https } = await ingredients(test);
  closeSync(https.fd);
  https.isClosed = true;
  const names = Object.keys(token.env).flatMap((name) => ['-E', name]);
  const keygate = launchKeygate(token, document, {
    launcher: ['systemd-socket-activate', '--fdname=https', `--listen=${https.address}`, ...names],
  });
  test.after(async () => keygate.stop());
  await until('socket that listens', () => isListenedOn(https.port));
  await assertServed(https.port);
  await keygate.started();
  assert.deepEqual(keygate.addresses, { https: [https.address] });
});

interface OpenedSocket {
  readonly fd: number;
  readonly address: string;
  readonly port: number;
  isClosed: boolean;
}

interface Ingredients {
  readonly token: ProvisionedToken;
  readonly document: KeygateDocument;
  /** Where the document listens; open until the test has ended. */
  readonly https: OpenedSocket;
  another(address: string): OpenedSocket;
  start(sockets: readonly OpenedSocket[], document?: KeygateDocument): Promise<Keygate>;
}

async function ingredients(test: TestContext): Promise<Ingredients> {
  const token = await provisionedToken({ www: { kind: 'p256' } });
  const upstream = await echoUpstream();
  const opened: OpenedSocket[] = [];
  const another = (wanted: string): OpenedSocket => {
    const { fd, address } = engine().openListener(wanted, 16, false);
    const socket = { fd, address, port: Number(address.split(':').at(-1)), isClosed: false };
    opened.push(socket);
    return socket;
  };
  const https = another('127.0.0.1:0');
  test.after(async () => {
    for (const { fd, isClosed } of opened) if (!isClosed) closeSync(fd);
    await upstream.close();
    token[Symbol.dispose]();
  });
  const document = {
    workers: 2,
    upstreams: { echo: { servers: [upstream.address] } },
    listeners: { https: { bind: [https.address] } },
  };
  return {
    token,
    document,
    https,
    another,
    start: async (sockets, own = document) => startKeygate(token, own, passing(sockets)),
  };
}

/** As systemd does: from descriptor 3 on, and for the process of this number only. */
function passing(sockets: readonly { readonly fd: number }[]): LaunchOptions {
  return {
    inherit: sockets.map(({ fd }) => fd),
    launcher: ['sh', '-c', 'export LISTEN_PID=$$; exec "$@"', 'sh'],
    env: {
      LISTEN_FDS: String(sockets.length),
      LISTEN_FDNAMES: sockets.map((_, index) => `socket-${index}`).join(':'),
    },
  };
}

async function assertServed(port: number): Promise<void> {
  await endServed(await tlsClient({ port }));
}

async function endServed(client: TLSSocket): Promise<void> {
  await assertEchoes(client);
  client.destroy();
}

/** With either worker stopped the other one serves. */
async function assertBothAccept(keygate: Keygate, { port }: OpenedSocket): Promise<void> {
  for (const { pid } of await keygate.workers()) {
    process.kill(pid, 'SIGSTOP');
    try {
      // A thread that has not noticed yet could accept the client, and keep it waiting.
      await until('process that stands still', () => threadStates(pid).every((state) => state === 'T'));
      await assertServed(port);
    } finally {
      process.kill(pid, 'SIGCONT');
    }
  }
}

/** proc_pid_stat(5): what follows the name, which may hold anything. */
function threadStates(pid: number): string[] {
  return readdirSync(`/proc/${pid}/task`).map((thread) =>
    readFileSync(`/proc/${pid}/task/${thread}/stat`, 'utf8')
      .replace(/^.*\) /s, '')
      .slice(0, 1),
  );
}

/** Is in the accept queue when it is `connected`, and may have to wait there for the handshake. */
function waitingClient(port: number): { readonly connected: Promise<unknown>; readonly handshake: Promise<TLSSocket> } {
  const socket = connect({ host: '127.0.0.1', port });
  return { connected: once(socket, 'connect'), handshake: tlsClient({ port, socket }) };
}

/** Looks without connecting: the first client would start it. proc_net_tcp(5): local address in hexadecimal, state 0A. */
function isListenedOn(port: number): boolean {
  const local = `:${port.toString(16).toUpperCase().padStart(4, '0')} 00000000:0000 0A`;
  return readFileSync('/proc/net/tcp', 'utf8').includes(local);
}
