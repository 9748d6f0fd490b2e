/**
 * Owns: the admin server: what it answers, to whom, and its limits.
 * Must not know: workers, metric names, what draining is; it is given a view.
 * Runs: main thread of the primary.
 *
 * It has no authentication. What protects it is that only this host's users can reach it (loopback), or only those the
 * socket's file mode admits (unix), and that no web page in a browser on this host can speak to it: not by DNS rebinding
 * (Host is checked), not by a cross-site POST (it must carry a header that a page can add on its own site only).
 */
import { lstatSync, unlinkSync } from 'node:fs';
import { createServer } from 'node:http';
import type { IncomingMessage, Server, ServerResponse } from 'node:http';
import { connect } from 'node:net';
import type { AddressInfo } from 'node:net';
import { formatAddress } from '../config/address.ts';
import type { AdminConfig, UnixAddress } from '../config/config.ts';
import { ServiceError } from '../errors.ts';
import type { Log } from '../log.ts';
import { metricsContentType } from './metrics.ts';
import { shown } from './reload.ts';
import type { ReloadReport } from './reload.ts';
import { statusPage, statusScript, statusStyle } from './status-page.ts';

const connectionsMax = 64;
const headerBytesMax = 8 * 1024;
const headersMax = 64;
/** From the first byte of a request, or from accept, to its end. */
const requestDeadlineMs = 2_000;
/** A client that takes nothing of its answer for so long is cut off. */
const idleDeadlineMs = 10_000;
/** Kept open between requests; shorter than a scrape interval, so connections are for people's pages. */
const keepAliveMs = 5_000;
/** What answers under way may take when the server closes. */
const closeGraceMs = 1_000;

/** What the server shows and may ask for. */
export interface AdminView {
  /** The scrape, in the text format of `metricsContentType`. */
  metrics(): Promise<string>;
  /** Why the service is not ready; undefined when it is. */
  readonly unreadiness: string | undefined;
  /** What `/status.json` says. */
  status(): Promise<object>;
  reload(): Promise<ReloadReport>;
  drain(): void;
}

export interface Admin {
  /** With the port that was chosen for port 0; a socket as `unix:/path`. */
  readonly address: string;
  /** Accepts nothing any more and ends every connection within a second. */
  close(): Promise<void>;
}

/** @throws ServiceError `admin_failed`, naming the address, when it is in use or cannot be bound */
export async function startAdmin(listen: AdminConfig['listen'], view: AdminView, log: Log): Promise<Admin> {
  const routes = routesOf(view, log);
  const isLocalName = 'path' in listen ? () => true : localNames(listen.host);
  const server = createServer(
    {
      maxHeaderSize: headerBytesMax,
      headersTimeout: requestDeadlineMs,
      requestTimeout: requestDeadlineMs,
      connectionsCheckingInterval: requestDeadlineMs / 4,
      keepAliveTimeout: keepAliveMs,
    },
    (request, response) => {
      answer(request, response, routes, isLocalName).catch((error: unknown) => {
        log.error({ event: 'admin_request', path: request.url, error }, 'the admin server could not answer');
        if (response.headersSent) response.destroy();
        else send(response, text(500, 'the answer could not be made; the log says why'));
      });
    },
  );
  server.maxConnections = connectionsMax;
  server.maxHeadersCount = headersMax;
  server.setTimeout(idleDeadlineMs);
  const address = await bind(server, listen);
  server.on('error', (error) => log.error({ event: 'admin_server', error }, 'the admin server failed to accept'));
  return { address, close: async () => close(server) };
}

/** What one path answers, by method. HEAD is GET without its body. */
type Route = Readonly<Partial<Record<'GET' | 'POST', (request: IncomingMessage) => Answer | Promise<Answer>>>>;

interface Answer {
  readonly status: number;
  readonly type: string;
  readonly body: string;
  readonly headers?: Readonly<Record<string, string>>;
}

function routesOf(view: AdminView, log: Log): ReadonlyMap<string, Route> {
  // However many ask at once, the workers are asked once.
  const metrics = shared(async () => view.metrics());
  const status = shared(async () => view.status());
  const drain = (request: IncomingMessage): Answer => {
    const refusal = crossSiteRefusal(request);
    if (refusal !== undefined) return text(403, refusal);
    log.info({ event: 'drain_requested' }, 'drain requested through the admin server');
    view.drain();
    return text(202, 'draining');
  };
  const reload = async (request: IncomingMessage): Promise<Answer> => {
    const refusal = crossSiteRefusal(request);
    if (refusal !== undefined) return text(403, refusal);
    log.info({ event: 'reload_requested' }, 'reload requested through the admin server');
    // It has a deadline of its own, and says nothing until it has ended.
    request.socket.setTimeout(0);
    const report = await view.reload();
    request.socket.setTimeout(idleDeadlineMs);
    return json(statusOf(report), { ...report, changes: shown(report.changes) });
  };
  return new Map<string, Route>([
    ['/metrics', { GET: async () => ({ status: 200, type: metricsContentType, body: await metrics() }) }],
    // That this is answered at all says that the primary's loop turns.
    ['/live', { GET: () => text(200, 'live') }],
    ['/ready', { GET: () => (view.unreadiness === undefined ? text(200, 'ready') : text(503, view.unreadiness)) }],
    ['/status.json', { GET: async () => json(200, await status()) }],
    ['/status', { GET: () => ({ status: 200, type: 'text/html; charset=utf-8', body: statusPage }) }],
    ['/status.css', { GET: () => ({ status: 200, type: 'text/css; charset=utf-8', body: statusStyle }) }],
    ['/status.js', { GET: () => ({ status: 200, type: 'text/javascript; charset=utf-8', body: statusScript }) }],
    ['/reload', { POST: reload }],
    ['/drain', { POST: drain }],
  ]);
}

async function answer(
  request: IncomingMessage,
  response: ServerResponse,
  routes: ReadonlyMap<string, Route>,
  isLocalName: (host: string | undefined) => boolean,
): Promise<void> {
  // Nothing here takes a body, and one that is not read would be in the way of the next request.
  if (hasBody(request)) {
    response.setHeader('connection', 'close');
    send(response, text(413, 'no request here has a body'));
    return;
  }
  if (!isLocalName(request.headers.host)) {
    send(response, text(421, 'the Host header must be the address that the admin server listens on, or localhost'));
    return;
  }
  const path = request.url?.split('?', 1)[0] ?? '';
  const route = routes.get(path);
  if (route === undefined) {
    send(response, text(404, `nothing here; there is ${[...routes.keys()].join(', ')}`));
    return;
  }
  const method = request.method === 'HEAD' ? 'GET' : request.method;
  const respond = method === 'GET' || method === 'POST' ? route[method] : undefined;
  if (respond === undefined) {
    const allow = route.GET === undefined ? 'POST' : 'GET, HEAD';
    send(response, { ...text(405, `only ${allow} here`), headers: { allow } });
    return;
  }
  send(response, await respond(request));
}

function hasBody({ headers }: IncomingMessage): boolean {
  return headers['transfer-encoding'] !== undefined || (headers['content-length'] ?? '0') !== '0';
}

/**
 * A page of another site can make a browser connect here under that site's own name (DNS rebinding), and the Host header
 * tells. Addresses cannot be rebound. The port is not compared: through a forwarded port it is another one.
 */
function localNames(host: string): (found: string | undefined) => boolean {
  const names = new Set(['localhost', '127.0.0.1', '[::1]', host.includes(':') ? `[${host}]` : host]);
  return (found) => found !== undefined && names.has(found.replace(/:[0-9]*$/, '').toLowerCase());
}

/**
 * A form on another site can POST here, but not with a header of its own choice: for that the browser first asks for
 * permission (OPTIONS), which is never given. Origin is checked as well, for pages of other servers on this host.
 */
function crossSiteRefusal({ headers }: IncomingMessage): string | undefined {
  if (headers['x-keygate'] === undefined) {
    return "the header x-keygate is missing: curl -X POST -H 'x-keygate: 1'; it keeps web pages of other sites out";
  }
  if (headers.origin !== undefined && headers.origin !== `http://${headers.host}`)
    return 'requests from other sites are refused';
  return undefined;
}

/** 422: the file must be corrected; 409: it may be right, and the moment was wrong. */
function statusOf({ outcome, reasons }: ReloadReport): number {
  if (outcome === 'committed') return 200;
  return outcome === 'rolled_back' || reasons.some(({ code }) => code === 'reload_busy') ? 409 : 422;
}

function json(status: number, value: object): Answer {
  return { status, type: 'application/json', body: `${JSON.stringify(value)}\n` };
}

function text(status: number, line: string): Answer {
  return { status, type: 'text/plain; charset=utf-8', body: `${line}\n` };
}

function send(response: ServerResponse, { status, type, body, headers }: Answer): void {
  response.writeHead(status, {
    'content-type': type,
    'content-length': Buffer.byteLength(body),
    'cache-control': 'no-store',
    'content-security-policy':
      "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    'cross-origin-resource-policy': 'same-origin',
    'referrer-policy': 'no-referrer',
    'x-content-type-options': 'nosniff',
    ...headers,
  });
  response.end(body); // Node leaves it out for HEAD
}

/** Calls made while one is under way get its result. */
function shared<T>(make: () => Promise<T>): () => Promise<T> {
  let underWay: Promise<T> | undefined;
  return async () => {
    underWay ??= make().finally(() => {
      underWay = undefined;
    });
    return underWay;
  };
}

async function bind(server: Server, listen: AdminConfig['listen']): Promise<string> {
  const wanted = formatAddress(listen);
  try {
    if (!('path' in listen)) {
      await listening(server, () => server.listen(listen.port, listen.host));
      const { address, port } = server.address() as AddressInfo;
      return formatAddress({ host: address, port });
    }
    await removeStaleSocket(listen);
    await listening(server, () => listenPrivately(server, listen));
    return wanted;
  } catch (cause) {
    if (cause instanceof ServiceError) throw cause;
    const found = cause instanceof Error ? cause.message : String(cause);
    throw new ServiceError('admin_failed', `the admin server cannot listen on ${wanted}: ${found}`, {
      cause,
      hint: 'free the address, or set another one in `admin.listen`',
    });
  }
}

async function listening(server: Server, listen: () => void): Promise<void> {
  const { promise, resolve, reject } = Promise.withResolvers<void>();
  server.once('error', reject).once('listening', resolve);
  listen();
  await promise;
  server.off('error', reject);
}

/** The mode must be right from the start: between bind and a chmod anybody could connect. Node binds within `listen`. */
function listenPrivately(server: Server, { path }: UnixAddress): void {
  const former = process.umask(0o177);
  try {
    server.listen(path);
  } finally {
    process.umask(former);
  }
}

/**
 * A primary that was killed leaves its socket behind, and bind(2) refuses an existing path even if nobody listens there.
 * @throws ServiceError `admin_failed` when it is not ours to replace
 */
async function removeStaleSocket({ path }: UnixAddress): Promise<void> {
  const existing = lstatSync(path, { throwIfNoEntry: false });
  if (existing === undefined) return;
  if (!existing.isSocket()) {
    throw new ServiceError(
      'admin_failed',
      `the admin server cannot listen on unix:${path}: found a file that is not a socket`,
      {
        hint: 'move it away, or set another path in `admin.listen`',
      },
    );
  }
  const found = await probe(path);
  if (found !== 'ECONNREFUSED') {
    throw new ServiceError(
      'admin_failed',
      `the admin server cannot listen on unix:${path}: another process has it (connect: ${found})`,
      {
        hint: 'stop that process (ss -lxp shows which), or set another path in `admin.listen`',
      },
    );
  }
  unlinkSync(path);
}

/** `connected`, or the code of connect(2). */
async function probe(path: string): Promise<string> {
  const { promise, resolve } = Promise.withResolvers<string>();
  const socket = connect(path);
  socket.once('connect', () => resolve('connected'));
  socket.once('error', ({ code, message }: NodeJS.ErrnoException) => resolve(code ?? message));
  const found = await promise;
  socket.destroy();
  return found;
}

async function close(server: Server): Promise<void> {
  const { promise, resolve } = Promise.withResolvers<void>();
  server.close(() => resolve());
  const grace = setTimeout(() => server.closeAllConnections(), closeGraceMs);
  await promise;
  clearTimeout(grace);
}
