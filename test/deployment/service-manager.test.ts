/**
 * Owns: what a service manager hears of keygate (Type=notify): when it is ready, reloads, stops.
 * Must not know: systemd's units (units.test.ts).
 * Runs: against a real `keygate serve` on SoftHSM, and a datagram socket like systemd's, which Node cannot open: in Python.
 */
import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { it } from 'node:test';
import type { TestContext } from 'node:test';
import { launchKeygate, startKeygate } from '../support/keygate.ts';
import type { KeygateDocument } from '../support/keygate.ts';
import { provisionedToken } from '../support/provisioned-token.ts';
import type { ProvisionedToken } from '../support/provisioned-token.ts';
import { tlsClient } from '../support/tls-client.ts';
import { echoUpstream } from '../support/upstream.ts';

type State = Readonly<Record<string, string>>;

it('the service manager hears when keygate is ready, reloads, what came of it, and when it stops', async (test) => {
  const { token, document, manager } = await ingredients(test);
  await using keygate = launchKeygate(token, document, { env: { NOTIFY_SOCKET: manager.socket } });
  assert.deepEqual(await manager.next(), { READY: '1', STATUS: 'serving' });
  // Ready means that a client is served at once.
  await keygate.started();
  const client = await tlsClient({ port: keygate.port() });
  client.destroy();

  const before = process.hrtime.bigint() / 1000n;
  process.kill(keygate.pid, 'SIGHUP');
  const { MONOTONIC_USEC: at, ...reloading } = await manager.next();
  assert.deepEqual(reloading, { RELOADING: '1', STATUS: 'reloading' });
  assert.ok(BigInt(at ?? 0) >= before, 'systemd takes an older time for an answer to an earlier signal');
  assert.deepEqual(await manager.next(), { READY: '1', STATUS: 'serving generation 2' });

  keygate.configure({ ...document, workers: 3 });
  process.kill(keygate.pid, 'SIGHUP');
  assert.equal((await manager.next())['RELOADING'], '1');
  const { READY: ready, STATUS: status = '' } = await manager.next();
  assert.equal(ready, '1', 'what was served still is');
  assert.match(status, /^serving generation 2; the last reload was refused: .*workers: cannot change by a reload/);

  process.kill(keygate.pid, 'SIGTERM');
  assert.deepEqual(await manager.next(), { STOPPING: '1', STATUS: 'draining' });
});

it('workers do not know the socket of the service manager', async (test) => {
  const { token, document, manager } = await ingredients(test);
  await using keygate = await startKeygate(token, document, { env: { NOTIFY_SOCKET: manager.socket } });
  for (const { pid } of await keygate.workers()) {
    assert.ok(!readFileSync(`/proc/${pid}/environ`, 'utf8').includes('NOTIFY_SOCKET'));
  }
});

it('a service manager that does not listen does not keep keygate from serving', async (test) => {
  const { token, document } = await ingredients(test);
  await using keygate = await startKeygate(token, document, { env: { NOTIFY_SOCKET: '/nonexistent/notify' } });
  assert.equal((await keygate.logged({ event: 'notify_failed' })).level, 'warn');
  const client = await tlsClient({ port: keygate.port() });
  client.destroy();
});

async function ingredients(
  test: TestContext,
): Promise<{ readonly token: ProvisionedToken; readonly document: KeygateDocument; readonly manager: Manager }> {
  const token = await provisionedToken({ www: { kind: 'p256' } });
  const upstream = await echoUpstream();
  const manager = await serviceManager(join(token.directory, 'notify'));
  test.after(async () => {
    manager.end();
    await upstream.close();
    token[Symbol.dispose]();
  });
  const document = { upstreams: { echo: { servers: [upstream.address] } }, listeners: { https: {} } };
  return { token, document, manager };
}

interface Manager {
  readonly socket: string;
  /** What is said next, by name. */
  next(): Promise<State>;
  end(): void;
}

const receiver = `
import json, socket, sys
receiver = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
receiver.bind(sys.argv[1])
print(json.dumps({}), flush=True)
while True:
    print(json.dumps(dict(line.split("=", 1) for line in receiver.recv(65536).decode().splitlines())), flush=True)
`;

async function serviceManager(socket: string): Promise<Manager> {
  const child = spawn('python3', ['-c', receiver, socket], { stdio: ['ignore', 'pipe', 'inherit'] });
  const ended = once(child, 'exit');
  const lines = createInterface({ input: child.stdout })[Symbol.asyncIterator]();
  const next = async (): Promise<State> => {
    const { value, done } = await lines.next();
    assert.ok(done !== true, 'the receiver has ended');
    return JSON.parse(value) as State;
  };
  // It is bound.
  await next();
  return {
    socket,
    next,
    end() {
      child.kill();
      void ended;
    },
  };
}
