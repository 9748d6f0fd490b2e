/**
 * Owns: services that keygate forwards to: echo, HTTP, one that reads the PROXY header first, and the noise that is sent.
 * Must not know: TLS, keygate's configuration beyond the form of an address.
 * Runs: in test processes, over TCP or a unix socket.
 */
import { createHash } from 'node:crypto';
import { EventEmitter, once } from 'node:events';
import { createServer as createHttpServer } from 'node:http';
import type { RequestListener } from 'node:http';
import { createServer } from 'node:net';
import type { AddressInfo, ListenOptions, Server, Socket } from 'node:net';
import { parseProxyHeader } from './proxy-header.ts';
import type { ProxyHeader } from './proxy-header.ts';

/** Where to listen; default: a free port of 127.0.0.1. */
export type Place = Pick<ListenOptions, 'host' | 'port' | 'path'>;

export interface Upstream extends AsyncDisposable {
  /** As the configuration has it. */
  readonly address: string;
  /** Connections accepted so far. */
  readonly accepted: number;
  /** Those that are open. */
  readonly sockets: ReadonlySet<Socket>;
  /** The next connection that is accepted after this call. */
  nextConnection(): Promise<Socket>;
  /** Accepts nothing any more; what is open goes on. */
  refuse(): void;
  /** Accepts again, at the same address. */
  listen(): Promise<void>;
  /** Closes with every connection. */
  close(): Promise<void>;
}

/** Sends back what comes, and ends when the other side has. */
export async function echoUpstream(place?: Place): Promise<Upstream> {
  return tcpUpstream((socket) => {
    socket.pipe(socket);
  }, place);
}

/** Gives each connection to `serve`; errors of a connection end it and nothing else. */
export async function tcpUpstream(serve: (socket: Socket) => void, place?: Place): Promise<Upstream> {
  return listen(createServer({ allowHalfOpen: true, noDelay: true }, serve), place);
}

export interface HttpUpstream extends Upstream {
  /** Paths asked for so far. */
  readonly paths: string[];
}

/** Answers with `says`, or as `answer` does. */
export async function httpUpstream(
  says: string,
  { answer, ...place }: Place & { readonly answer?: RequestListener } = {},
): Promise<HttpUpstream> {
  const paths: string[] = [];
  const server = createHttpServer((request, response) => {
    paths.push(request.url ?? '');
    if (answer !== undefined) answer(request, response);
    else response.setHeader('content-type', 'text/html').end(says);
  });
  // Node's server drops the answer to a client that ends its half after the request, as gnutls-cli does.
  Object.assign(server, { httpAllowHalfOpen: true });
  return Object.assign(await listen(server, place), { paths });
}

export interface ProxyUpstream extends Upstream {
  /** The header of the next connection that is accepted after this call. */
  nextHeader(): Promise<ProxyHeader>;
}

/** Reads the PROXY header that every connection must begin with, then echoes. */
export async function proxyUpstream(place?: Place): Promise<ProxyUpstream> {
  const headers = new EventEmitter<{ header: [ProxyHeader]; error: [Error] }>();
  const upstream = await tcpUpstream((socket) => {
    let received = Buffer.alloc(0);
    const look = (chunk: Buffer) => {
      received = Buffer.concat([received, chunk]);
      try {
        const header = parseProxyHeader(received);
        if (header === undefined) return;
        socket.off('data', look);
        socket.pause();
        socket.unshift(received.subarray(header.bytes));
        socket.pipe(socket);
        headers.emit('header', header);
      } catch (error) {
        headers.emit('error', error as Error);
        socket.destroy();
      }
    };
    socket.on('data', look);
  }, place);
  const next = async (): Promise<ProxyHeader> => {
    const [header] = (await once(headers, 'header')) as [ProxyHeader];
    return header;
  };
  return Object.assign(upstream, { nextHeader: next });
}

/** `bytes` of noise that differ everywhere, in chunks, so that a lost, doubled or moved chunk changes the hash. */
export async function* noise(bytes: number): AsyncGenerator<Buffer> {
  const chunkBytes = 256 * 1024;
  let place = 0;
  for (let sent = 0; sent < bytes; sent += chunkBytes) {
    const chunk = Buffer.from(noiseBlock.buffer, noiseBlock.byteOffset, Math.min(chunkBytes, bytes - sent));
    const copy = Buffer.from(chunk);
    for (let offset = 0; offset + 8 <= copy.length; offset += 4096) copy.writeBigUInt64LE(BigInt(place++), offset);
    yield copy;
  }
}

const noiseBlock = createHash('shake256', { outputLength: 256 * 1024 })
  .update('noise')
  .digest();

/** SHA-256 of everything that a stream gives, without keeping it. */
export async function hashOf(
  source: AsyncIterable<Buffer>,
): Promise<{ readonly sha256: string; readonly bytes: number }> {
  const hash = createHash('sha256');
  let bytes = 0;
  for await (const chunk of source) {
    hash.update(chunk);
    bytes += chunk.length;
  }
  return { sha256: hash.digest('hex'), bytes };
}

async function listen(server: Server, place: Place = {}): Promise<Upstream> {
  const sockets = new Set<Socket>();
  let accepted = 0;
  server.on('connection', (socket: Socket) => {
    accepted += 1;
    sockets.add(socket);
    socket.on('error', () => socket.destroy());
    socket.once('close', () => sockets.delete(socket));
  });
  server.listen('path' in place ? place : { host: '127.0.0.1', port: 0, ...place });
  await once(server, 'listening');
  const close = async () => {
    const closed = once(server, 'close');
    server.close();
    for (const socket of sockets) socket.destroy();
    await closed;
  };
  const bound = server.address() as AddressInfo | string;
  return {
    address:
      typeof bound === 'string'
        ? `unix:${bound}`
        : bound.family === 'IPv6'
          ? `[${bound.address}]:${bound.port}`
          : `${bound.address}:${bound.port}`,
    get accepted() {
      return accepted;
    },
    sockets,
    async nextConnection() {
      const [socket] = (await once(server, 'connection')) as [Socket];
      return socket;
    },
    refuse: () => void server.close(),
    async listen() {
      server.listen(typeof bound === 'string' ? bound : { host: bound.address, port: bound.port });
      await once(server, 'listening');
    },
    close,
    [Symbol.asyncDispose]: close,
  };
}
