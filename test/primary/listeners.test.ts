/**
 * Owns: which sockets a configuration keeps, opens, retires and resizes of those that the one before it had.
 * Must not know: workers, reloads.
 * Runs: in one test process, with real sockets of loopback.
 */
import assert from 'node:assert/strict';
import { once } from 'node:events';
import { closeSync, readdirSync } from 'node:fs';
import { createServer } from 'node:net';
import type { AddressInfo } from 'node:net';
import { afterEach, it } from 'node:test';
import { freePort } from '../../bench/processes.ts';
import { parseConfig } from '../../src/config/load.ts';
import { engine } from '../../src/engine/binding.ts';
import { closeSockets, noListeners, openListeners } from '../../src/primary/listeners.ts';
import type { Listeners, ListeningSocket, NextListeners } from '../../src/primary/listeners.ts';

const slots = 2;
const opened: ListeningSocket[] = [];
afterEach(() => closeSockets(opened.splice(0)));

it('an address has a socket for each slot, at the port that the first was given', () => {
  const { sockets, addresses, opened: all } = open(noListeners, 'web: { bind: ["127.0.0.1:0", "[::1]:0"] }');
  assert.deepEqual(all, sockets);
  assert.deepEqual(
    sockets.map(({ listener, slots: own, bound }) => [listener, ...own, bound]),
    addresses['web']?.flatMap((address) => [
      ['web', 0, address],
      ['web', 1, address],
    ]),
  );
});

it('an address that stays keeps its sockets, whatever else changes', () => {
  const first = open(noListeners, 'web: { bind: ["127.0.0.1:0", "127.0.0.1:0"] }, api: { bind: ["127.0.0.1:0"] }');
  const second = open(first, 'api: { bind: ["127.0.0.1:0"], alpn: [h2] }, web: { bind: ["127.0.0.1:0"] }');
  assert.deepEqual([second.opened, second.resized], [[], []]);
  assert.deepEqual(second.addresses, { api: first.addresses['api'], web: first.addresses['web']?.slice(0, 1) });
  assert.deepEqual(numbers(second.retired), numbers(first.sockets.slice(slots, 2 * slots)));
});

it('an address that goes to another listener takes its sockets along', async () => {
  const address = `127.0.0.1:${await freePort()}`;
  const first = open(noListeners, `web: { bind: ["${address}"] }`);
  const second = open(first, `site: { bind: ["${address}"] }`);
  assert.deepEqual([second.opened, second.retired], [[], []]);
  assert.deepEqual(numbers(second.sockets), numbers(first.sockets));
  assert.deepEqual(
    second.sockets.map(({ listener }) => listener),
    ['site', 'site'],
  );
});

it('a free port of one listener is not that of another', () => {
  const first = open(noListeners, 'web: { bind: ["127.0.0.1:0"] }');
  const second = open(first, 'site: { bind: ["127.0.0.1:0"] }');
  assert.deepEqual([second.opened.length, second.retired.length], [slots, slots]);
  assert.notDeepEqual(second.addresses['site'], first.addresses['web']);
});

it(
  'an address that becomes transparent gets other sockets, beside those that it has',
  { skip: process.geteuid?.() !== 0 && 'needs CAP_NET_RAW' },
  async () => {
    const port = await freePort();
    const first = open(noListeners, `web: { bind: ["127.0.0.1:${port}"] }`);
    const second = open(first, `web: { bind: ["127.0.0.1:${port}"], transparent: true }`);
    assert.deepEqual([second.opened.length, second.retired.length], [slots, slots]);
    const third = open(second, `web: { bind: ["127.0.0.1:${port}"], transparent: true, alpn: [h2] }`);
    assert.deepEqual([third.opened, third.retired], [[], []]);
  },
);

it('another backlog resizes the queue of a socket that stays', () => {
  const first = open(noListeners, 'web: { bind: ["127.0.0.1:0"], backlog: 16 }');
  const second = open(first, 'web: { bind: ["127.0.0.1:0"], backlog: 32 }');
  assert.deepEqual(
    second.resized.map(({ socket, backlog }) => [socket, backlog]),
    first.sockets.map(({ socket }) => [socket, 32]),
  );
  for (const { fd, backlog } of second.resized) engine().setBacklog(fd, backlog);
});

it('every address of a port can be bound beside one of them, while its sockets are still open', async () => {
  const port = await freePort();
  const first = open(noListeners, `web: { bind: ["127.0.0.1:${port}"] }`);
  const second = open(first, `web: { bind: ["0.0.0.0:${port}"] }`);
  assert.deepEqual(numbers(second.retired), numbers(first.sockets));
  assert.deepEqual(second.addresses, { web: [`0.0.0.0:${port}`] });
});

it('passed sockets are dealt out until each slot has one and each socket is accepted from', () => {
  const dealt = (count: number) => {
    const first = engine().openListener('127.0.0.1:0', 16, false);
    const others = Array.from({ length: count - 1 }, () => engine().openListener(first.address, 16, false));
    const passed = [first, ...others].map(({ fd, address }) => ({ fd, name: 'https', address }));
    const { sockets, opened: taken } = open({ ...noListeners, passed }, `web: { bind: ["${first.address}"] }`);
    closeSockets(taken);
    // Not ours: closing what was opened has left them open, and this fails otherwise.
    for (const { fd } of passed) closeSync(fd);
    return sockets.map(({ slots: own }) => own);
  };
  assert.deepEqual(dealt(1), [[0, 1]]);
  assert.deepEqual(dealt(2), [[0], [1]]);
  assert.deepEqual(dealt(3), [[0], [1], [0]]);
});

it('an address that somebody else has is refused, and nothing stays open', async () => {
  const other = createServer().listen({ host: '127.0.0.1', port: 0 });
  await once(other, 'listening');
  const { port } = other.address() as AddressInfo;
  const before = readdirSync('/proc/self/fd').length;
  assert.throws(() => open(noListeners, `web: { bind: ["127.0.0.1:0"] }, api: { bind: ["127.0.0.1:${port}"] }`), {
    code: 'bind_failed',
    message: /^listener api cannot listen on 127\.0\.0\.1:\d+: EADDRINUSE/,
  });
  assert.equal(readdirSync('/proc/self/fd').length, before);
  other.close();
  await once(other, 'close');
});

function open(former: Listeners, listeners: string): NextListeners {
  const config = parseConfig(
    [
      'tokens: { a: { module: /m.so, uri: "pkcs11:token=a", pin: { file: pin } } }',
      'certificates: { www: { chain: www.pem, key: "pkcs11:object=www" } }',
      'upstreams: { web: { servers: ["127.0.0.1:1"] } }',
      `listeners: { ${listeners.replaceAll(' }', ', certificates: [www], upstream: web }')} }`,
    ].join('\n'),
    '/k.yaml',
  );
  const next = openListeners(former, config, slots, engine());
  opened.push(...next.opened);
  return next;
}

function numbers(sockets: readonly ListeningSocket[]): number[] {
  return sockets.map(({ socket }) => socket);
}
