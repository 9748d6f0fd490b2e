/**
 * Owns: that the load generator counts what happened, and takes nothing else for a success.
 * Must not know: keygate; the server here is Node's own.
 * Runs: in a test process.
 */
import assert from 'node:assert/strict';
import { spawnSync } from 'node:child_process';
import { constants } from 'node:crypto';
import { once } from 'node:events';
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import type { AddressInfo } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, test } from 'node:test';
import type { TestContext } from 'node:test';
import { createServer } from 'node:tls';
import type { TlsOptions, TLSSocket } from 'node:tls';
import { makeKeyFiles } from '../../bench/keys.ts';
import type { KeyFiles } from '../../bench/keys.ts';
import { buildLoad, runHandshakes } from '../../bench/load.ts';
import type { HandshakesPlan, HandshakesResult } from '../../bench/load.ts';

const question = 'keygate?\n';
const answer = 'keygate!\n';
/** So that pinning works wherever this runs. */
const cores = [0];
const count = 20;

let program: string;
let keys: KeyFiles;
let otherKeys: KeyFiles;
const directory = mkdtempSync(join(tmpdir(), 'keygate-load-'));

before(async () => {
  program = await buildLoad();
  keys = makeKeyFiles(directory, 'p256');
  otherKeys = makeKeyFiles(directory, 'rsa2048');
});
after(() => rmSync(directory, { recursive: true, force: true }));

for (const tls of ['1.2', '1.3'] as const) {
  test(`exactly the connections that were asked for are made and counted, TLS ${tls}`, async (context) => {
    let questions = 0;
    const port = await serve(context, (socket) => {
      socket.once('data', (data) => {
        assert.equal(data.toString(), question);
        questions += 1;
        socket.end(answer);
      });
    });
    const result = await handshakes(port, { tls });
    assert.deepEqual([result.handshakes, result.failures, result.deviations], [count, {}, 0]);
    assert.equal(questions, count);
    assert.equal(result.negotiated?.protocol, `TLSv1_${tls.slice(2)}`);
    assert.equal(result.negotiated?.resumed, false);
    assert.ok(result.seconds > 0);
    for (const latency of [result.handshakeUs, result.connectionUs]) {
      const { p50, p99, max } = latency;
      assert.ok(
        p50 !== null && p99 !== null && max !== null && p50 > 0 && p50 <= p99 && p99 <= max,
        JSON.stringify(latency),
      );
    }
  });

  test(`every handshake is resumed where that is asked for, TLS ${tls}`, async (context) => {
    const port = await serve(context, (socket) => socket.once('data', () => socket.end(answer)));
    // Node gives two tickets in a full TLS 1.3 handshake and none in a resumed one, and a ticket is used once.
    const few = { count: 2, connections: 1 };
    const result = await handshakes(port, { tls, resume: true, ...few });
    assert.deepEqual([result.handshakes, result.failures, result.deviations], [few.count, {}, 0]);
    assert.equal(result.negotiated?.resumed, true);
  });
}

test('each client has a TLS session before resumed handshakes are counted', async (context) => {
  const port = await serve(context, (socket) => socket.once('data', () => socket.end(answer)));
  const result = await handshakes(port, { tls: '1.2', resume: true });
  assert.deepEqual([result.handshakes, result.failures], [count, {}]);
});

test('a full handshake is no success where a resumed one is asked for', async (context) => {
  const port = await serve(context, (socket) => socket.once('data', () => socket.end(answer)), { tickets: false });
  const result = await handshakes(port, { resume: true });
  assert.deepEqual([result.handshakes, result.failures], [0, { wrong_kind: count }]);
});

test('another answer is no success', async (context) => {
  const port = await serve(context, (socket) => socket.once('data', () => socket.end('keygate?\n')));
  const result = await handshakes(port);
  assert.deepEqual([result.handshakes, result.failures], [0, { wrong_answer: count }]);
});

test('half an answer is no success', async (context) => {
  const port = await serve(context, (socket) => socket.once('data', () => socket.end(answer.slice(0, 4))));
  const result = await handshakes(port);
  assert.deepEqual([result.handshakes, result.failures], [0, { closed_before_answer: count }]);
});

test('another certificate is no success', async (context) => {
  const port = await serve(context, (socket) => socket.once('data', () => socket.end(answer)));
  const result = await handshakes(port, { certificate: otherKeys.certificate });
  assert.deepEqual([result.handshakes, result.failures], [0, { tls: count }]);
});

test('a server that only fails ends the run instead of spinning', () => {
  // Nobody listens at the port of the discard service.
  const { status, stderr } = command('handshakes', '--to', '127.0.0.1:9', '--certificate', keys.certificate);
  assert.equal(status, 1);
  assert.match(stderr, /too many failures: \{"connect":\d+\}/);
});

test('addresses that are not of the loopback interface are refused', () => {
  for (const args of [
    ['handshakes', '--to', '192.0.2.1:443', '--certificate', keys.certificate],
    ['upstream', '--listen', '0.0.0.0:0'],
  ]) {
    const { status, stderr } = command(...args);
    assert.equal(status, 64);
    assert.match(stderr, /only loopback addresses are allowed/);
  }
});

async function serve(
  context: TestContext,
  onConnection: (socket: TLSSocket) => void,
  { tickets = true } = {},
): Promise<number> {
  const options: TlsOptions = { cert: readFileSync(keys.certificate), key: readFileSync(keys.privateKey) };
  const server = createServer(
    tickets ? options : { ...options, secureOptions: constants.SSL_OP_NO_TICKET },
    (socket) => {
      // A client that found something wrong resets; that is what the client's counts are about.
      socket.on('error', () => {});
      onConnection(socket);
    },
  );
  server.listen(0, '127.0.0.1');
  await once(server, 'listening');
  context.after(() => server.close());
  return (server.address() as AddressInfo).port;
}

function handshakes(port: number, plan: Partial<HandshakesPlan> = {}): Promise<HandshakesResult> {
  const preset = { to: `127.0.0.1:${port}`, certificate: keys.certificate, connections: 4, seconds: 60, count };
  return runHandshakes(program, cores, { ...preset, ...plan });
}

function command(...args: string[]): { readonly status: number | null; readonly stderr: string } {
  return spawnSync(program, args, { encoding: 'utf8' });
}
