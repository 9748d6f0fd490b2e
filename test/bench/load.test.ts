/**
 * Owns: that the load generator counts what happened, and takes nothing else for a success.
 * Must not know: keygate; the server here is Node's own.
 * Runs: in a test process.
 */
import assert from 'node:assert/strict';
import { execFileSync, spawnSync } from 'node:child_process';
import { constants } from 'node:crypto';
import { once } from 'node:events';
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { get, Agent } from 'node:http';
import type { IncomingMessage } from 'node:http';
import { connect, createServer as createTcpServer } from 'node:net';
import type { AddressInfo } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, test } from 'node:test';
import type { TestContext } from 'node:test';
import { createSecureContext, createServer } from 'node:tls';
import { Transform } from 'node:stream';
import type { TransformCallback } from 'node:stream';
import { text } from 'node:stream/consumers';
import type { TlsOptions, TLSSocket } from 'node:tls';
import { makeKeyFiles } from '../../bench/keys.ts';
import type { KeyFiles } from '../../bench/keys.ts';
import { buildLoad, runEcho, runHandshakes, runRelay, startIdle, startUpstream } from '../../bench/load.ts';
import type { HandshakesPlan, HandshakesResult, RelayPlan, Serve } from '../../bench/load.ts';

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
  const port = await serve(context, (socket) => socket.once('data', () => socket.end(answer)), {
    secureOptions: constants.SSL_OP_NO_TICKET,
  });
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

for (const group of ['X25519', 'X25519MLKEM768', 'secp256r1', 'secp384r1'] as const) {
  test(`a handshake uses the group that was asked for, ${group}`, async (context) => {
    const port = await serve(context, (socket) => socket.once('data', () => socket.end(answer)), { ecdhCurve: group });
    const result = await handshakes(port, { group });
    assert.deepEqual([result.handshakes, result.failures, result.negotiated?.group], [count, {}, group]);
  });
}

test('a server without the group fails in TLS 1.3, and one that takes another in TLS 1.2', async (context) => {
  const options = { ecdhCurve: 'P-256' };
  const port = await serve(context, (socket) => socket.once('data', () => socket.end(answer)), options);
  const latest = await handshakes(port);
  assert.deepEqual([latest.handshakes, latest.failures], [0, { tls: count }]);
  assert.match(latest.tlsError ?? '', /alert/);
  const older = await handshakes(port, { tls: '1.2' });
  assert.deepEqual([older.handshakes, older.failures], [0, { wrong_group: count }]);
});

for (const kind of ['p384', 'ed25519', 'rsa2048'] as const) {
  for (const tls of ['1.2', '1.3'] as const) {
    test(`every signature is verified where that is asked for, ${kind} in TLS ${tls}`, async (context) => {
      const files = makeKeyFiles(directory, kind);
      const pair = { cert: readFileSync(files.certificate), key: readFileSync(files.privateKey) };
      const port = await serve(context, (socket) => socket.once('data', () => socket.end(answer)), pair);
      const result = await handshakes(port, { certificate: files.certificate, tls, verifyEvery: 1 });
      assert.deepEqual([result.handshakes, result.failures], [count, {}]);
    });
  }
}

test('a wrong signature is noticed', async (context) => {
  const port = await serve(context, (socket) => socket.once('data', () => socket.end(answer)));
  // Of TLS 1.2, because there the signature is not encrypted.
  const result = await handshakes(await forgeSignatures(context, port), { tls: '1.2', verifyEvery: 1 });
  assert.deepEqual([result.handshakes, result.failures], [0, { tls: count }]);
  // Unverified it would show only in Finished, as an alert of the server.
  assert.match(result.tlsError ?? '', /BadSignature/);
});

test('several names are used in turn, and each must get its own certificate', async (context) => {
  const contexts = new Map(['a.test', 'host0.test', 'host1.test'].map((name) => [name, contextFor(name)]));
  const asked = new Map<string, number>();
  let mistaken = false;
  const port = await serve(context, (socket) => socket.once('data', () => socket.end(answer)), {
    SNICallback(name, done) {
      asked.set(name, (asked.get(name) ?? 0) + 1);
      done(null, contexts.get(mistaken ? 'a.test' : name));
    },
  });
  const plan = { serverName: 'a.test,host{0..1}.test', count: 30 };
  const result = await handshakes(port, plan);
  assert.deepEqual([result.handshakes, result.failures], [30, {}]);
  assert.deepEqual(Object.fromEntries(asked), { 'a.test': 10, 'host0.test': 10, 'host1.test': 10 });

  mistaken = true;
  const wrong = await handshakes(port, plan);
  assert.deepEqual([wrong.handshakes, wrong.failures], [10, { tls: 20 }]);

  mistaken = false;
  const otherKey = await handshakes(port, { ...plan, certificate: otherKeys.certificate });
  assert.deepEqual([otherKey.handshakes, otherKey.failures], [0, { tls: 30 }]);
});

test('an HTTP request is answered with its status and body, or it is no success', async (context) => {
  let status = '200 OK';
  const port = await serve(context, (socket) => {
    socket.once('data', (data) => {
      assert.match(data.toString(), /^GET \/ HTTP\/1\.1\r\nHost: localhost\r\nConnection: close\r\n\r\n$/);
      socket.end(`HTTP/1.1 ${status}\r\nContent-Length: 9\r\n\r\n${answer}`);
    });
  });
  const right = await handshakes(port, { exchange: 'http' });
  assert.deepEqual([right.handshakes, right.failures], [count, {}]);
  status = '503 Service Unavailable';
  const wrong = await handshakes(port, { exchange: 'http' });
  assert.deepEqual([wrong.handshakes, wrong.failures], [0, { wrong_answer: count }]);
});

test('without an exchange the connection ends with its handshake', async (context) => {
  let bytes = 0;
  const port = await serve(context, (socket) => socket.on('data', (data) => (bytes += data.length)));
  const result = await handshakes(port, { exchange: 'none' });
  assert.deepEqual([result.handshakes, result.failures, bytes], [count, {}, 0]);
});

test('an open loop begins what is due, and counts what could not begin', async (context) => {
  const port = await serve(context, (socket) => socket.once('data', () => socket.end(answer)));
  const served = await handshakes(port, { rate: 200, connections: 100 });
  assert.deepEqual([served.handshakes, served.intended, served.failures], [count, count, {}]);
  assert.equal(
    served.connectionUs.histogram.reduce((sum, [, each]) => sum + each, 0),
    count,
  );

  const silent = await serve(context, () => {});
  const overload = await handshakes(silent, { rate: 10_000, connections: 2, deadlineSeconds: 2 });
  assert.deepEqual([overload.handshakes, overload.intended], [0, count]);
  assert.deepEqual(overload.failures, { deadline: 2, not_begun: count - 2 });
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

test('more connections than the descriptors allow are refused before the first', () => {
  const args = ['idle', '--to', '127.0.0.1:9', '--certificate', keys.certificate, '--connections', '1000'];
  const { status, stderr } = spawnSync('sh', ['-c', 'ulimit -n 100; exec "$0" "$@"', program, ...args], {
    encoding: 'utf8',
  });
  assert.equal(status, 64);
  assert.match(stderr, /the hard limit of open descriptors allows \d+/);
});

test('idle connections are held, answer when asked, and are counted when they are lost', async (context) => {
  const sockets: TLSSocket[] = [];
  const port = await serve(context, (socket) => {
    sockets.push(socket.on('data', (data) => socket.write(data)));
  });
  const idle = await startIdle(program, cores, { ...target(port), connections: 300 });
  context.after(() => idle.pinned.stop());
  assert.deepEqual([idle.held.open, idle.held.lost, idle.held.failures], [300, 0, {}]);
  assert.equal(new Set(sockets.map(({ remoteAddress }) => remoteAddress)).size, 250);
  assert.deepEqual(await idle.check(), { event: 'checked', asked: 300, answered: 300 });

  for (const socket of sockets.slice(0, 3)) socket.destroy();
  assert.equal((await idle.check()).answered, 297);
  const { open, lost, failures } = await idle.end();
  assert.deepEqual([open, lost, failures], [297, 3, { lost: 3 }]);
});

test('an idle connection that says something else is no success', async (context) => {
  const port = await serve(context, (socket) => socket.on('data', () => socket.write('who is there?\n')));
  const idle = await startIdle(program, cores, { ...target(port), connections: 5, rate: 1000 });
  context.after(() => idle.pinned.stop());
  assert.equal((await idle.check()).answered, 0);
  assert.deepEqual((await idle.end()).failures, { wrong_answer: 5 });
});

test('every message of the echo comes back and is timed', async (context) => {
  const port = await serve(context, (socket) => socket.on('data', (data) => socket.write(data)));
  const result = await runEcho(program, cores, { ...target(port), connections: 3, rate: 500, bytes: 99, count: 50 });
  assert.deepEqual([result.messages, result.intended, result.failures], [50, 50, {}]);
  assert.equal(
    result.latencyUs.histogram.reduce((sum, [, each]) => sum + each, 0),
    50,
  );
});

test('without a rate each connection sends when its last message has come back', async (context) => {
  const lengths: number[] = [];
  const port = await serve(context, (socket) =>
    socket.on('data', (data) => {
      lengths.push(data.length);
      socket.write(data);
    }),
  );
  const result = await runEcho(program, cores, { ...target(port), connections: 2, bytes: 40, count: 50, seconds: 60 });
  assert.deepEqual([result.messages, result.intended, result.failures], [50, 50, {}]);
  assert.deepEqual(
    lengths,
    Array.from({ length: 50 }, () => 40),
  );
});

test('an echo with one wrong byte, none, or a closed connection is no success', async (context) => {
  const plan = { connections: 2, rate: 500, count: 10, deadlineSeconds: 1 };
  const changed = await serve(context, (socket) => socket.on('data', (data) => socket.write(flip(data as Buffer))));
  const wrong = await runEcho(program, cores, { ...target(changed), ...plan });
  assert.equal(wrong.messages, 0);
  assert.ok((wrong.failures['wrong_answer'] ?? 0) >= 2, JSON.stringify(wrong.failures));
  assert.equal(sum(wrong.failures), 10);

  const silent = await serve(context, () => {});
  const none = await runEcho(program, cores, { ...target(silent), ...plan });
  assert.deepEqual([none.messages, none.failures], [0, { deadline: 10 }]);

  const rude = await serve(context, (socket) => socket.once('data', () => socket.destroy()));
  const closed = await runEcho(program, cores, { ...target(rude), ...plan });
  assert.deepEqual([closed.messages, sum(closed.failures)], [0, 10]);
});

for (const direction of ['up', 'down', 'both'] as const) {
  for (const message of [64, 1024 * 1024]) {
    test(`bulk is checked at its end and counted there, ${direction} in messages of ${message}`, async (context) => {
      const passed = { up: 0, down: 0 };
      const port = await offload(context, direction === 'up' ? 'sink' : 'source', {
        up: (data) => ((passed.up += data.length), data),
        down: (data) => ((passed.down += data.length), data),
      });
      const result = await relay(port, { direction, message });
      assert.deepEqual(result.failures, {});
      // A word of eight bytes on each connection says that a stream ends.
      assert.deepEqual([result.upBytes + 16, result.downBytes + 16], [passed.up, passed.down]);
      assert.ok(direction === 'down' || result.upBytes > message, String(result.upBytes));
      assert.ok(direction === 'up' || result.downBytes > message, String(result.downBytes));
    });
  }
}

test('bulk with one wrong byte is no success, in either direction', async (context) => {
  let chunks = 0;
  const once = (data: Buffer) => ((chunks += 1) === 3 ? flip(data) : data);
  const down = await relay(await offload(context, 'source', { down: once }), { direction: 'down', connections: 1 });
  assert.deepEqual(down.failures, { wrong_answer: 1 });
  chunks = 0;
  const up = await relay(await offload(context, 'sink', { up: once }), { direction: 'up', connections: 1 });
  assert.deepEqual([up.failures, up.upBytes], [{ closed_before_answer: 1 }, 0]);
});

test('bulk of which a piece is lost is no success', async (context) => {
  let chunks = 0;
  const port = await offload(context, 'source', { down: (data) => ((chunks += 1) === 3 ? data.subarray(8) : data) });
  const result = await relay(port, { direction: 'down', connections: 1 });
  assert.deepEqual(result.failures, { wrong_answer: 1 });
});

test('the upstream listens at every address, and answers HTTP on a connection that stays', async (context) => {
  const upstream = await startUpstream(program, cores, 'http', { listen: '127.0.0.1:0,127.0.0.2:0' });
  context.after(() => upstream.pinned.stop());
  assert.match(upstream.addresses.join(), /^127\.0\.0\.1:\d+,127\.0\.0\.2:\d+$/);
  const agent = new Agent({ keepAlive: true, maxSockets: 1 });
  context.after(() => agent.destroy());
  const ports = new Set<number | undefined>();
  for (const address of upstream.addresses) {
    for (let request = 0; request < 2; request += 1) {
      const [response] = (await once(get(`http://${address}/`, { agent }), 'response')) as [IncomingMessage];
      ports.add(response.socket.localPort);
      assert.deepEqual([response.statusCode, await text(response)], [200, answer]);
    }
  }
  assert.equal(ports.size, upstream.addresses.length);
});

test('the upstream ends with its standard input', async () => {
  const upstream = await startUpstream(program, cores);
  const exit = once(upstream.pinned.child, 'exit');
  upstream.pinned.child.stdin?.end();
  assert.deepEqual(await exit, [0, null]);
});

function target(port: number): { readonly to: string; readonly certificate: string } {
  return { to: `127.0.0.1:${port}`, certificate: keys.certificate };
}

function handshakes(port: number, plan: Partial<HandshakesPlan> = {}): Promise<HandshakesResult> {
  return runHandshakes(program, cores, { ...target(port), connections: 4, seconds: 60, count, ...plan });
}

function relay(port: number, plan: Partial<RelayPlan>) {
  return runRelay(program, cores, { ...target(port), connections: 2, seconds: 0.2, ...plan });
}

async function serve(
  context: TestContext,
  onConnection: (socket: TLSSocket) => void,
  options: TlsOptions = {},
): Promise<number> {
  const pair = { cert: readFileSync(keys.certificate), key: readFileSync(keys.privateKey) };
  const server = createServer({ ...pair, ...options }, (socket) => {
    // A client that found something wrong resets; that is what the client's counts are about.
    socket.on('error', () => {});
    onConnection(socket);
  });
  server.listen(0, '127.0.0.1');
  await once(server, 'listening');
  context.after(() => server.close());
  return (server.address() as AddressInfo).port;
}

/** A server in front of the upstream, which may do something to the bytes. */
async function offload(
  context: TestContext,
  kind: Serve,
  { up = keep, down = keep }: { readonly up?: Change; readonly down?: Change },
): Promise<number> {
  const upstream = await startUpstream(program, cores, kind);
  context.after(() => upstream.pinned.stop());
  const [host, port] = upstream.addresses.join().split(':');
  return await serve(context, (client) => {
    const server = connect(Number(port), host);
    for (const [one, other] of [
      [client, server],
      [server, client],
    ] as const) {
      one.on('error', () => {}).on('close', () => other.destroy());
    }
    client.pipe(changing(up)).pipe(server);
    server.pipe(changing(down)).pipe(client);
  });
}

/** In front of a TLS server: changes the last byte of each ServerKeyExchange, which is of its signature (RFC 5246 7.4.3). */
async function forgeSignatures(context: TestContext, port: number): Promise<number> {
  const [recordHeadBytes, handshakeRecord, serverKeyExchange] = [5, 22, 12];
  const server = createTcpServer((client) => {
    const upstream = connect(port, '127.0.0.1');
    client.on('error', () => {}).on('close', () => upstream.destroy());
    upstream.on('error', () => {}).on('close', () => client.destroy());
    client.pipe(upstream);
    let pending = Buffer.alloc(0);
    upstream.on('data', (data: Buffer) => {
      pending = Buffer.concat([pending, data]);
      while (pending.length >= recordHeadBytes) {
        const end = recordHeadBytes + pending.readUInt16BE(3);
        if (pending.length < end) return;
        const record = Buffer.from(pending.subarray(0, end));
        pending = pending.subarray(end);
        const isSigned = record[0] === handshakeRecord && record[recordHeadBytes] === serverKeyExchange;
        if (isSigned) record.writeUInt8(record.readUInt8(end - 1) ^ 1, end - 1);
        client.write(record);
      }
    });
  });
  server.listen(0, '127.0.0.1');
  await once(server, 'listening');
  context.after(() => server.close());
  return (server.address() as AddressInfo).port;
}

type Change = (data: Buffer) => Buffer;

function keep(data: Buffer): Buffer {
  return data;
}

/** The last bit of the first byte. */
function flip(data: Buffer): Buffer {
  const copy = Buffer.from(data);
  copy.writeUInt8(copy.readUInt8(0) ^ 1, 0);
  return copy;
}

function changing(change: Change): Transform {
  return new Transform({
    transform(data: Buffer, _encoding: BufferEncoding, done: TransformCallback) {
      done(null, change(data));
    },
  });
}

/** A certificate for a name, of the key that all have. */
function contextFor(name: string) {
  const certificate = join(directory, `${name}.pem`);
  const about = ['-subj', '/CN=many', '-addext', `subjectAltName=DNS:${name}`, '-days', '2'];
  execFileSync('openssl', ['req', '-new', '-x509', '-key', keys.privateKey, '-out', certificate, ...about], {
    stdio: 'pipe',
  });
  return createSecureContext({ cert: readFileSync(certificate), key: readFileSync(keys.privateKey) });
}

function sum(counts: Readonly<Record<string, number>>): number {
  return Object.values(counts).reduce((total, each) => total + each, 0);
}

function command(...args: string[]): { readonly status: number | null; readonly stderr: string } {
  return spawnSync(program, args, { encoding: 'utf8' });
}
