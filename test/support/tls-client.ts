/**
 * Owns: clients of a TLS port: Node's, foreign programs, and one that sends bytes of its own making and reads alerts.
 * Must not know: keygate.
 * Runs: in test processes.
 */
import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { connect } from 'node:net';
import type { Socket } from 'node:net';
import { Duplex } from 'node:stream';
import { buffer, text } from 'node:stream/consumers';
import { connect as connectTls } from 'node:tls';
import type { ConnectionOptions, TLSSocket } from 'node:tls';
import { until } from './until.ts';

/** Node's types lack what its OpenSSL 3.5 has. */
export interface TlsOptions extends ConnectionOptions {
  readonly port: number;
  readonly localAddress?: string;
}

/**
 * A finished handshake; the certificate is not verified unless `ca` is given. The connection may stay half-open.
 * @throws what Node makes of the server's alert: `code` is `ERR_SSL_...`
 */
export async function tlsClient({ host = '127.0.0.1', ...options }: TlsOptions): Promise<TLSSocket> {
  const socket = connectTls({
    host,
    rejectUnauthorized: options.ca !== undefined,
    allowHalfOpen: true,
    ...options,
  } as ConnectionOptions);
  await once(socket, 'secureConnect');
  // Whoever reads or writes sees the failure; a connection that a test has done with may break in peace.
  socket.on('error', () => {});
  return socket;
}

export interface TappedClient {
  readonly tls: TLSSocket;
  /** The connection below; what is written to it goes between the client's records. */
  readonly raw: Socket;
  /** The ciphertext that came so far. */
  received(): Buffer;
  /** Keeps what the client sends from now on. */
  hold(): void;
  /** Sends what was kept, in one piece. */
  release(): void;
}

/**
 * A TLS client, not yet connected, whose ciphertext the test sees and can hold back.
 * @param change what the client says is sent as this makes of it
 */
export async function tappedClient(
  { port, ...options }: TlsOptions,
  change: (sent: Buffer) => Buffer = (sent) => sent,
): Promise<TappedClient> {
  const raw = await rawClient(port);
  const received: Buffer[] = [];
  let held: Buffer[] | undefined;
  const wire = new Duplex({
    read() {},
    write(chunk: Buffer, _encoding, done) {
      if (held === undefined) raw.write(change(chunk));
      else held.push(chunk);
      done();
    },
  });
  raw.on('data', (chunk: Buffer) => {
    received.push(chunk);
    wire.push(chunk);
  });
  raw.on('end', () => wire.push(null));
  const tls = connectTls({ socket: wire, rejectUnauthorized: false, ...options });
  tls.on('close', () => raw.destroy());
  return {
    tls,
    raw,
    received: () => Buffer.concat(received),
    hold() {
      held ??= [];
    },
    release() {
      raw.write(Buffer.concat(held ?? []));
      held = undefined;
    },
  };
}

/** Resolves when nobody listens at the port any more. */
export async function untilRefused(port: number): Promise<void> {
  await until('refusal', async () => {
    try {
      (await rawClient(port)).destroy();
      return false;
    } catch (error) {
      return (error as NodeJS.ErrnoException).code === 'ECONNREFUSED';
    }
  });
}

/** The code of the error that the handshake ends with. */
export async function refusalOf(options: TlsOptions): Promise<string> {
  try {
    const socket = await tlsClient(options);
    socket.destroy();
  } catch (error) {
    return String((error as NodeJS.ErrnoException).code);
  }
  return assert.fail('the handshake succeeded');
}

/** A handshake and an echo. @returns the names in the certificate, as Node writes them */
export async function assertServes(port: number): Promise<string> {
  const client = await tlsClient({ port });
  try {
    await assertEchoes(client);
    return client.getPeerCertificate().subjectaltname ?? '';
  } finally {
    client.destroy();
  }
}

/** Sends and awaits the same bytes back. */
export async function assertEchoes(socket: Socket, what = 'are you there?'): Promise<void> {
  socket.write(what);
  assert.equal((await readBytes(socket, Buffer.byteLength(what))).toString(), what);
}

/** Exactly `bytes` bytes. @throws when the peer ends before */
export async function readBytes(socket: Socket, bytes: number): Promise<Buffer> {
  for (;;) {
    const read = socket.read(bytes) as Buffer | null;
    if (read !== null) {
      assert.equal(read.length, bytes, 'the peer ended early');
      return read;
    }
    assert.ok(!socket.readableEnded && !socket.destroyed, 'the peer ended early');
    const next = Promise.withResolvers<void>();
    const events = ['readable', 'end', 'close', 'error'];
    for (const event of events) socket.once(event, next.resolve);
    await next.promise;
    for (const event of events) socket.off(event, next.resolve);
  }
}

/** Everything until the peer ends; unlike the consumers of node:stream it leaves our own direction open. */
export async function restOf(socket: Socket): Promise<string> {
  const chunks: Buffer[] = [];
  const ended = Promise.withResolvers<void>();
  socket.on('data', (chunk: Buffer) => chunks.push(chunk));
  socket.once('end', ended.resolve);
  socket.once('close', ended.resolve);
  socket.resume();
  await ended.promise;
  return Buffer.concat(chunks).toString();
}

/** A bare TCP connection that may stay half-open; resolves when it is there. */
export async function rawClient(port: number, host = '127.0.0.1'): Promise<Socket> {
  const socket = connect({ host, port, allowHalfOpen: true, noDelay: true });
  await once(socket, 'connect');
  socket.on('error', () => {});
  return socket;
}

/** Everything that a server answers to `bytes`, until it ends. */
export async function answerTo(port: number, bytes: Uint8Array): Promise<Buffer> {
  const socket = await rawClient(port);
  socket.write(bytes);
  const answer = await buffer(socket);
  socket.destroy();
  return answer;
}

/** The description of a fatal alert that stands alone, unencrypted (RFC 8446 6, RFC 5246 7.2). */
export function alertIn(answer: Buffer): number | undefined {
  const [contentType, major, , lengthHigh, length, level, description] = answer;
  const isFatalAlert =
    contentType === 21 && major === 3 && lengthHigh === 0 && length === 2 && level === 2 && answer.length === 7;
  return isFatalAlert ? description : undefined;
}

/** RFC 8446 6. */
export const alerts = {
  unexpectedMessage: 10,
  recordOverflow: 22,
  handshakeFailure: 40,
  illegalParameter: 47,
  decodeError: 50,
  protocolVersion: 70,
  unrecognizedName: 112,
  noApplicationProtocol: 120,
} as const;

/** What Node's client says first, without anybody to say it to: one or more records. */
export async function clientHello(options: ConnectionOptions = {}): Promise<Buffer> {
  const hello = Promise.withResolvers<Buffer>();
  const nobody = new Duplex({
    read() {},
    write(chunk: Buffer, _encoding, done) {
      hello.resolve(chunk);
      done();
    },
  });
  const client = connectTls({ socket: nobody, ...options });
  client.on('error', () => {});
  const bytes = await hello.promise;
  client.destroy();
  return bytes;
}

/** A ClientHello in its parts (RFC 8446 4.1.2). */
export interface ClientHelloParts {
  version: number;
  readonly random: Buffer;
  readonly sessionId: Buffer;
  cipherSuites: number[];
  compressionMethods: number[];
  /** By type; in this order. */
  readonly extensions: Map<number, Buffer>;
}

/** The ClientHello with something else in it, in as many records as that takes. */
export function editedHello(hello: Buffer, edit: (parts: ClientHelloParts) => void): Buffer {
  const body = hello.subarray(recordHeaderBytes + 4);
  let offset = 2 + 32;
  const vector = (lengthBytes: number): Buffer => {
    const start = offset + lengthBytes;
    offset = start + body.readUIntBE(offset, lengthBytes);
    return body.subarray(start, offset);
  };
  const sessionId = vector(1);
  const cipherSuites = vector(2);
  const compressionMethods = [...vector(1)];
  const list = vector(2);
  const extensions = new Map<number, Buffer>();
  for (let at = 0; at < list.length;) {
    const bytes = list.readUInt16BE(at + 2);
    extensions.set(list.readUInt16BE(at), list.subarray(at + 4, at + 4 + bytes));
    at += 4 + bytes;
  }
  const parts: ClientHelloParts = {
    version: body.readUInt16BE(0),
    random: body.subarray(2, 2 + 32),
    sessionId,
    cipherSuites: Array.from({ length: cipherSuites.length / 2 }, (_, index) => cipherSuites.readUInt16BE(2 * index)),
    compressionMethods,
    extensions,
  };
  edit(parts);
  const edited = Buffer.concat([
    uint16(parts.version),
    parts.random,
    prefixed(1, parts.sessionId),
    prefixed(2, ...parts.cipherSuites.map(uint16)),
    prefixed(1, Buffer.from(parts.compressionMethods)),
    prefixed(2, ...[...extensions].map(([type, content]) => Buffer.concat([uint16(type), prefixed(2, content)]))),
  ]);
  return inRecords(handshakeMessage(1, edited));
}

/** The same ClientHello with a padding extension (RFC 7685) of so many bytes. */
export function paddedHello(hello: Buffer, paddingBytes: number): Buffer {
  return editedHello(hello, ({ extensions }) => extensions.set(21, Buffer.alloc(paddingBytes)));
}

export function handshakeMessage(type: number, body: Buffer): Buffer {
  return Buffer.concat([Buffer.from([type]), uint24(body.length), body]);
}

/** A vector of TLS: its length in so many bytes, and what is in it. */
export function prefixed(lengthBytes: number, ...content: readonly Buffer[]): Buffer {
  const joined = Buffer.concat(content);
  const length = Buffer.alloc(lengthBytes);
  length.writeUIntBE(joined.length, 0, lengthBytes);
  return Buffer.concat([length, joined]);
}

/** A handshake message in records of the largest size, or smaller ones. */
export function inRecords(message: Buffer, fragmentBytes = recordBytesMax): Buffer {
  const records: Buffer[] = [];
  for (let start = 0; start < message.length; start += fragmentBytes) {
    const fragment = message.subarray(start, start + fragmentBytes);
    records.push(Buffer.from([22, 3, 1]), uint16(fragment.length), fragment);
  }
  return Buffer.concat(records);
}

const recordHeaderBytes = 5;
const recordBytesMax = 16_384;

const uint16 = (value: number): Buffer => Buffer.from([value >> 8, value & 0xff]);
const uint24 = (value: number): Buffer => Buffer.from([value >> 16, (value >> 8) & 0xff, value & 0xff]);

export interface ProgramResult {
  readonly exitCode: number | null;
  /** Standard output and standard error, as they came. */
  readonly output: string;
}

/** Runs a foreign client to its end, which it must find within half a minute. */
export async function program(command: string, args: readonly string[], input = ''): Promise<ProgramResult> {
  const child = spawn(command, args, { stdio: ['pipe', 'pipe', 'pipe'], timeout: 30_000, killSignal: 'SIGKILL' });
  // A client that gives up closes its input.
  child.stdin.on('error', () => {});
  child.stdin.end(input);
  const [stdout, stderr, [exitCode]] = (await Promise.all([
    text(child.stdout),
    text(child.stderr),
    once(child, 'close'),
  ])) as [string, string, [number | null]];
  return { exitCode, output: stdout + stderr };
}
