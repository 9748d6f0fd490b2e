/**
 * Owns: the admin server: what it answers, its limits, its TLS.
 * Must not know: workers, metric names, what draining is; it is given a view. Who may ask for what (admin-access.ts).
 * Runs: main thread of the primary.
 *
 * Without a token or client certificates, what protects it is that only this host's users can reach it (loopback), or only
 * those the socket's file mode admits (unix), and that no web page in a browser on this host can speak to it: not by DNS
 * rebinding (Host is checked), not by a cross-site POST (it must carry a header that a page can add on its own site only).
 */
import { lstatSync, unlinkSync } from 'node:fs';
import { createServer } from 'node:http';
import type { IncomingMessage, RequestListener, Server, ServerOptions, ServerResponse } from 'node:http';
import { createServer as createTlsServer } from 'node:https';
import { connect } from 'node:net';
import type { AddressInfo, Socket } from 'node:net';
import type { TLSSocket, TlsOptions } from 'node:tls';
import { formatAddress, isLocal } from '../config/address.ts';
import { logLevels } from '../config/config.ts';
import type { AdminConfig, LogLevel, UnixAddress } from '../config/config.ts';
import { ServiceError } from '../errors.ts';
import type { Log } from '../log.ts';
import { AdminAccess, tokenMissing } from './admin-access.ts';
import type { Access } from './admin-access.ts';
import { changedCredentials, readCredentials } from './admin-credentials.ts';
import type { AdminTls } from './admin-credentials.ts';
import { metricsContentType } from './metrics.ts';
import { shown } from './reload.ts';
import type { NextCredentials, ReloadReport } from './reload.ts';
import { StatusFeed } from './status-feed.ts';
import { statusFiles } from './status-page.ts';

const connectionsMax = 64;
const headerBytesMax = 8 * 1024;
const headersMax = 64;
/** From the first byte of a request, or from accept, to its end; with TLS also for the handshake. */
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
  /** What the page at `/status` is told: of the last minutes, and as of now. */
  history(): object;
  overview(): object;
  readonly logLevel: LogLevel;
  /** Of the primary and of every worker. */
  setLogLevel(level: LogLevel): void;
  reload(): Promise<ReloadReport>;
  /** Has a successor take over; its process, or why there is none. */
  upgrade(): Promise<{ readonly pid: number } | { readonly refused: string }>;
  drain(): void;
}

export interface Admin {
  /** With the port that was chosen for port 0; a socket as `unix:/path`. */
  readonly address: string;
  /** Tells the pages that are open what was measured. */
  announce(): void;
  /** Reads the files of token and TLS again, for a reload. @throws ServiceError `admin_failed` */
  reread(): NextCredentials;
  /** Accepts nothing any more, so that another may; who has asked is answered. */
  retire(): void;
  /** Accepts nothing any more and ends every connection within a second. */
  close(): Promise<void>;
}

/** @throws ServiceError `admin_failed`, naming the address or the file, when it cannot be bound or read */
export async function startAdmin(config: AdminConfig, view: AdminView, log: Log): Promise<Admin> {
  const { listen, token, tls } = config;
  let credentials = readCredentials(config);
  const rules = { listen, isEncrypted: tls !== undefined, needsCertificate: tls?.clientCertificates !== undefined };
  const access = new AdminAccess(rules, credentials.tokenHash, log);
  const feed = new StatusFeed(view);
  const routes = routesOf(view, feed, access, log);
  /** TLS connections made under the present credentials. */
  let current = new WeakSet<Socket>();
  const respond: RequestListener = (request, response) => {
    // Whose certificate was good for the former authorities connects again, and is looked at anew.
    if (tls !== undefined && !current.has(request.socket)) {
      request.socket.destroy();
      return;
    }
    answer(request, response, routes, access).catch((error: unknown) => {
      log.error({ event: 'admin_request', path: pathOf(request), error }, 'the admin server could not answer');
      if (response.headersSent) response.destroy();
      else send(request, response, text(500, 'the answer could not be made; the log says why'));
    });
  };
  const secured = credentials.tls && createTlsServer({ ...limits, ...tlsOptions(credentials.tls) }, respond);
  secured?.on('secureConnection', (socket: TLSSocket) => current.add(socket));
  secured?.on('tlsClientError', ({ message }) => {
    log.debug({ event: 'admin_tls', reason: message }, 'a client of the admin server did not get through TLS');
  });
  const server = secured ?? createServer(limits, respond);
  server.maxConnections = connectionsMax;
  server.maxHeadersCount = headersMax;
  server.setTimeout(idleDeadlineMs);
  const address = await bind(server, listen);
  server.on('error', (error) => log.error({ event: 'admin_server', error }, 'the admin server failed to accept'));
  if (token !== undefined && tls === undefined && !isLocal(listen)) {
    log.warn(
      { event: 'admin_token_in_clear', address },
      'the token of the admin server crosses the network unencrypted: set `admin.tls`',
    );
  }
  const commit = (next: typeof credentials): void => {
    credentials = next;
    access.expect(next.tokenHash);
    if (next.tls !== undefined) secured?.setSecureContext(tlsOptions(next.tls));
    current = new WeakSet();
    feed.end();
  };
  return {
    address,
    announce: () => feed.announce(),
    reread() {
      const next = readCredentials(config);
      const changes = changedCredentials(credentials, next);
      return { changes, commit: () => (changes.length === 0 ? undefined : commit(next)) };
    },
    retire() {
      feed.end();
      // The socket is closed at once; what is still answered is not waited for.
      server.close();
    },
    async close() {
      feed.end();
      await close(server);
    },
  };
}

const limits: ServerOptions = {
  maxHeaderSize: headerBytesMax,
  headersTimeout: requestDeadlineMs,
  requestTimeout: requestDeadlineMs,
  connectionsCheckingInterval: requestDeadlineMs / 4,
  keepAliveTimeout: keepAliveMs,
};

function tlsOptions({ cert, key, ca }: AdminTls): TlsOptions {
  return {
    cert,
    key,
    minVersion: 'TLSv1.2',
    handshakeTimeout: requestDeadlineMs,
    ...(ca === undefined ? {} : { ca, requestCert: true, rejectUnauthorized: true }),
  };
}

/** What one path answers, by method. HEAD is GET without its body. */
interface Route {
  readonly GET?: Handler;
  readonly POST?: Handler;
  /** Answers also who has not shown the token that is needed. */
  readonly isPublic?: true;
}

type Handler = (request: IncomingMessage, access: 'known' | 'unknown') => Answer | Promise<Answer>;

interface Answer {
  readonly status: number;
  readonly type: string;
  /** Or who goes on with the answer once its headers are sent. */
  readonly body: string | Buffer | ((response: ServerResponse) => void);
  readonly headers?: Readonly<Record<string, string>>;
}

function routesOf(view: AdminView, feed: StatusFeed, access: AdminAccess, log: Log): ReadonlyMap<string, Route> {
  // However many ask at once, the workers are asked once.
  const metrics = shared(async () => view.metrics());
  const status = shared(async () => view.status());
  /** What changes something is done for no other site's page. */
  const change = (make: (request: IncomingMessage) => Answer | Promise<Answer>): Handler => {
    return async (request) => {
      const refusal = access.crossSiteRefusal(request);
      return refusal === undefined ? make(request) : text(refusal.status, refusal.line);
    };
  };
  const drain = (): Answer => {
    log.info({ event: 'drain_requested' }, 'drain requested through the admin server');
    view.drain();
    return text(202, 'draining');
  };
  const reload = async (request: IncomingMessage): Promise<Answer> => {
    log.info({ event: 'reload_requested' }, 'reload requested through the admin server');
    // It has a deadline of its own, and says nothing until it has ended.
    request.socket.setTimeout(0);
    const report = await view.reload();
    request.socket.setTimeout(idleDeadlineMs);
    return json(statusOf(report), { ...report, changes: shown(report.changes) });
  };
  const upgrade = async (request: IncomingMessage): Promise<Answer> => {
    log.info({ event: 'upgrade_requested' }, 'a successor requested through the admin server');
    // As a reload.
    request.socket.setTimeout(0);
    const report = await view.upgrade();
    return 'pid' in report ? json(200, report) : json(409, report);
  };
  const setLogLevel = (request: IncomingMessage): Answer => {
    const level = wantedLevel(request);
    if (level === undefined) return text(400, `one level is needed: /log-level?level=, with ${logLevels.join(', ')}`);
    const from = view.logLevel;
    // Nothing that could be set would hide it.
    const tell = () =>
      log.warn({ event: 'log_level_changed', from, to: level }, 'log level changed until the next reload');
    if (logLevels.indexOf(level) > logLevels.indexOf(from)) tell();
    view.setLogLevel(level);
    if (logLevels.indexOf(level) <= logLevels.indexOf(from)) tell();
    return text(200, level);
  };
  const events = (): Answer => {
    if (feed.isFull) return { ...text(503, 'too many pages are open'), headers: { 'retry-after': '5' } };
    return { status: 200, type: 'text/event-stream', body: (response) => feed.add(response) };
  };
  // Probes have no token; why a service is not ready is for those who have.
  const ready: Handler = (_, who) =>
    view.unreadiness === undefined ? text(200, 'ready') : text(503, who === 'known' ? view.unreadiness : 'not ready');
  return new Map<string, Route>([
    ['/metrics', { GET: async () => ({ status: 200, type: metricsContentType, body: await metrics() }) }],
    // That this is answered at all says that the primary's loop turns.
    ['/live', { isPublic: true, GET: () => text(200, 'live') }],
    ['/ready', { isPublic: true, GET: ready }],
    ['/status.json', { GET: async () => json(200, await status()) }],
    ['/status/events', { GET: events }],
    ['/log-level', { GET: () => text(200, view.logLevel), POST: change(setLogLevel) }],
    ['/reload', { POST: change(reload) }],
    ['/upgrade', { POST: change(upgrade) }],
    ['/drain', { POST: change(drain) }],
    ...[...statusFiles()].map(([path, file]): [string, Route] => [
      path,
      { isPublic: true, GET: () => ({ status: 200, ...file }) },
    ]),
  ]);
}

async function answer(
  request: IncomingMessage,
  response: ServerResponse,
  routes: ReadonlyMap<string, Route>,
  access: AdminAccess,
): Promise<void> {
  // Nothing here takes a body, and one that is not read would be in the way of the next request.
  if (hasBody(request)) {
    response.setHeader('connection', 'close');
    send(request, response, text(413, 'no request here has a body'));
    return;
  }
  const route = routes.get(pathOf(request));
  const who = admitted(access.of(request), route);
  send(request, response, typeof who === 'string' ? await routed(request, route, who, routes) : who);
}

function admitted(access: Access, route: Route | undefined): 'known' | 'unknown' | Answer {
  const refusal = access === 'unknown' && route?.isPublic !== true ? tokenMissing : access;
  if (typeof refusal === 'string') return refusal;
  return { ...text(refusal.status, refusal.line), headers: refusal.headers ?? {} };
}

async function routed(
  request: IncomingMessage,
  route: Route | undefined,
  who: 'known' | 'unknown',
  routes: ReadonlyMap<string, Route>,
): Promise<Answer> {
  if (route === undefined) return text(404, `nothing here; there is ${[...routes.keys()].join(', ')}`);
  const method = request.method === 'HEAD' ? 'GET' : request.method;
  const respond = method === 'GET' || method === 'POST' ? route[method] : undefined;
  if (respond !== undefined) return respond(request, who);
  const allow = [...(route.GET === undefined ? [] : ['GET', 'HEAD']), ...(route.POST === undefined ? [] : ['POST'])];
  return { ...text(405, `only ${allow.join(', ')} here`), headers: { allow: allow.join(', ') } };
}

function hasBody({ headers }: IncomingMessage): boolean {
  return headers['transfer-encoding'] !== undefined || (headers['content-length'] ?? '0') !== '0';
}

/** Without the query, which may be anything. */
function pathOf({ url = '' }: IncomingMessage): string {
  return url.split('?', 1)[0] ?? '';
}

/** Undefined unless the query is one level and nothing else. */
function wantedLevel({ url = '' }: IncomingMessage): LogLevel | undefined {
  return logLevels.find((level) => url === `/log-level?level=${level}`);
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

function send({ method }: IncomingMessage, response: ServerResponse, { status, type, body, headers }: Answer): void {
  response.writeHead(status, {
    'content-type': type,
    ...(typeof body === 'function' ? {} : { 'content-length': Buffer.byteLength(body) }),
    'cache-control': 'no-store',
    'content-security-policy':
      "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    'cross-origin-resource-policy': 'same-origin',
    'referrer-policy': 'no-referrer',
    'x-content-type-options': 'nosniff',
    ...headers,
  });
  if (typeof body !== 'function') response.end(body); // Node leaves it out for HEAD
  else if (method === 'HEAD') response.end();
  else body(response);
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
  // One that has retired long since waits for nobody.
  if (!server.listening) server.closeAllConnections();
  server.close(() => resolve());
  const grace = setTimeout(() => server.closeAllConnections(), closeGraceMs);
  await promise;
  clearTimeout(grace);
}
