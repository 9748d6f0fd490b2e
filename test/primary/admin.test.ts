/**
 * Owns: what the admin server answers, whom it refuses, and its limits; over real connections.
 * Must not know: workers, the engine.
 * Runs: in one test process.
 */
import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { existsSync, mkdtempSync, rmSync, statSync, writeFileSync } from 'node:fs';
import type { IncomingMessage, RequestOptions } from 'node:http';
import { connect, createServer } from 'node:net';
import type { Socket } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { text } from 'node:stream/consumers';
import { after, afterEach, before, beforeEach, describe, it } from 'node:test';
import pino from 'pino';
import { ServiceError } from '../../src/errors.ts';
import { startAdmin } from '../../src/primary/admin.ts';
import type { Admin } from '../../src/primary/admin.ts';
import { pagesMax } from '../../src/primary/status-feed.ts';
import { ask, begin, brief, loopback, testView } from '../support/admin.ts';
import type { TestView } from '../support/admin.ts';
import { until } from '../support/until.ts';

describe('the admin server', () => {
  let logged: string[];
  let view: TestView;
  let admin: Admin;
  let port: number;
  beforeEach(async () => {
    logged = [];
    view = testView();
    admin = await startAdmin(loopback, view, pino({ errorKey: 'error' }, { write: (line) => logged.push(line) }));
    port = Number(admin.address.split(':')[1]);
  });
  afterEach(async () => admin.close());

  const get = async (path: string, options: RequestOptions = {}) => ask({ port, path, ...options });
  const drain = async (headers: Record<string, string>) => get('/drain', { method: 'POST', headers });

  it('serves the metrics as a scraper expects them', async () => {
    const { status, headers, body } = await get('/metrics');
    assert.equal(status, 200);
    assert.equal(headers['content-type'], 'text/plain; version=0.0.4; charset=utf-8');
    assert.equal(body, 'scrapes 1\n');
  });

  it('asks the workers once, however many scrape at the same time', async () => {
    const underWay = Promise.withResolvers<string>();
    let asked = 0;
    view.metrics = async () => {
      asked += 1;
      return underWay.promise;
    };
    const raw = await open(port);
    // Pipelined, so that the server has all of them before it can answer the first.
    raw.write(
      'GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n'.repeat(9) +
        'GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n',
    );
    assert.equal((await get('/live')).status, 200); // sent later and answered: the scrapes have arrived
    underWay.resolve('scraped\n');
    assert.equal((await text(raw)).match(/^scraped$/gm)?.length, 10);
    assert.equal(asked, 1);
  });

  it('asks the workers anew for the next scrape', async () => {
    await get('/metrics');
    assert.equal((await get('/metrics')).body, 'scrapes 2\n');
  });

  it('is alive even when the service is not ready', async () => {
    view.unreadiness = 'no worker is ready';
    assert.deepEqual(brief(await get('/live')), [200, 'live\n']);
  });

  it('says whether the service is ready, and why not', async () => {
    assert.deepEqual(brief(await get('/ready')), [200, 'ready\n']);
    view.unreadiness = 'worker 3 has failed 4 times in a row';
    assert.deepEqual(brief(await get('/ready')), [503, 'worker 3 has failed 4 times in a row\n']);
  });

  it('tells the status as JSON', async () => {
    const { status, headers, body } = await get('/status.json');
    assert.equal(status, 200);
    assert.equal(headers['content-type'], 'application/json');
    assert.deepEqual(JSON.parse(body), await view.status());
  });

  it('has a status page that obeys its own content security policy', async () => {
    const { status, headers, body } = await get('/status');
    assert.equal(status, 200);
    assert.match(
      String(headers['content-security-policy']),
      /^default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'/,
    );
    assert.doesNotMatch(body, /<style|<script>|\sstyle=|\son[a-z]+=/);
    const parts = [...body.matchAll(/(?:src|href)="([^"#]+)"/g)].map(([, path]) => path ?? '');
    assert.deepEqual(
      [...new Set(parts)],
      ['/status/icon.svg', '/status/uplot.css', '/status.css', '/status/uplot.js', '/status.js'],
    );
    for (const part of parts) assert.equal((await get(part)).status, 200, part);
    assert.match(String((await get('/status.js')).headers['content-type']), /^text\/javascript/);
  });

  it('reloads for who says that no web page sent it, and answers with the outcome', async () => {
    const reload = async (headers: Record<string, string>) => get('/reload', { method: 'POST', headers });
    assert.equal((await reload({})).status, 403);
    const { status, headers, body } = await reload({ 'x-keygate': '1' });
    assert.deepEqual([status, headers['content-type']], [200, 'application/json']);
    assert.deepEqual(JSON.parse(body), await view.reload());
    const answers = [
      [409, 'rolled_back', 'token_operation'],
      [422, 'refused', 'config_syntax'],
      [409, 'refused', 'reload_busy'],
    ] as const;
    for (const [expected, outcome, code] of answers) {
      view.reload = async () => ({ outcome, seconds: 1, changes: [], reasons: [{ code, message: 'why' }] });
      assert.equal((await reload({ 'x-keygate': '1' })).status, expected);
    }
  });

  it('ignores a query', async () => {
    assert.equal((await get('/live?since=1')).status, 200);
  });

  it('answers HEAD with the headers of GET and no body', async () => {
    const { status, headers, body } = await get('/status', { method: 'HEAD' });
    assert.equal(status, 200);
    assert.equal(headers['content-length'], (await get('/status')).headers['content-length']);
    assert.equal(body, '');
  });

  it('says what there is when nothing is at a path', async () => {
    for (const path of ['/', '/metrics/', '/../metrics', '//metrics', '/constructor']) {
      const { status, body } = await get(path);
      assert.equal(status, 404, path);
      assert.match(body, /\/metrics/);
    }
  });

  it('names the methods that a path allows when it is asked with another', async () => {
    for (const [method, path, allow] of [
      ['POST', '/metrics', 'GET, HEAD'],
      ['DELETE', '/status', 'GET, HEAD'],
      ['OPTIONS', '/drain', 'POST'],
      ['GET', '/drain', 'POST'],
      ['DELETE', '/log-level', 'GET, HEAD, POST'],
      ['HEAD', '/drain', 'POST'],
    ] as const) {
      const { status, headers } = await get(path, { method });
      assert.equal(status, 405, `${method} ${path}`);
      assert.equal(headers.allow, allow);
    }
    assert.equal(view.drains, 0);
  });

  it('drains when it is asked with the header x-keygate', async () => {
    assert.deepEqual(brief(await drain({ 'x-keygate': '1' })), [202, 'draining\n']);
    assert.equal(view.drains, 1);
    assert.match(logged.join(''), /drain_requested/);
  });

  it('drains when its own page asks', async () => {
    assert.equal(
      (await drain({ 'x-keygate': '1', origin: `http://localhost:${port}`, host: `localhost:${port}` })).status,
      202,
    );
  });

  it('does not drain when a page of another site could have asked', async () => {
    for (const headers of [
      {},
      { origin: `http://127.0.0.1:${port}` },
      { 'x-keygate': '1', origin: 'http://example.org' },
      { 'x-keygate': '1', origin: `http://127.0.0.1:${port + 1}` },
      { 'x-keygate': '1', origin: 'null' },
    ]) {
      assert.equal((await drain(headers)).status, 403, JSON.stringify(headers));
    }
    assert.equal(view.drains, 0);
  });

  it('answers nothing under a name that is not its own, so that no page can rebind one', async () => {
    for (const host of [
      'example.org',
      `example.org:${port}`,
      'localhost.example.org',
      '127.0.0.1.example.org',
      '127.0.0.2',
    ]) {
      for (const path of ['/metrics', '/status.json', '/live'])
        assert.equal((await get(path, { headers: { host } })).status, 421, host);
    }
    assert.equal((await drain({ 'x-keygate': '1', host: 'example.org' })).status, 421);
    assert.equal(view.drains, 0);
    for (const nameless of [
      'GET /metrics HTTP/1.0\r\n\r\n',
      'GET /metrics HTTP/1.1\r\nHost:\r\nConnection: close\r\n\r\n',
    ]) {
      const raw = await open(port);
      raw.write(nameless);
      assert.match(await text(raw), /^HTTP\/1\.1 421 /);
    }
  });

  it('answers under every name of this host, also through a forwarded port', async () => {
    for (const host of [`127.0.0.1:${port}`, `localhost:${port}`, 'LOCALHOST', 'localhost:8080', `[::1]:${port}`]) {
      assert.equal((await get('/live', { headers: { host } })).status, 200, host);
    }
  });

  it('refuses a request with a body and closes the connection', async () => {
    for (const framing of ['Content-Length: 1000000', 'Transfer-Encoding: chunked']) {
      const raw = await open(port);
      raw.write(`POST /drain HTTP/1.1\r\nHost: localhost\r\nX-Keygate: 1\r\n${framing}\r\n\r\n`);
      const answered = await text(raw);
      assert.match(answered, /^HTTP\/1\.1 413 /, framing);
      assert.match(answered, /^connection: close\r$/im);
    }
    assert.equal(view.drains, 0);
  });

  it('refuses headers above 8 KiB and takes those below', async () => {
    assert.equal((await get('/live', { headers: { filler: 'x'.repeat(7 * 1024) } })).status, 200);
    assert.equal((await get('/live', { headers: { filler: 'x'.repeat(9 * 1024) } })).status, 431);
  });

  it('cuts off a client that does not finish its request', async () => {
    const raw = await open(port);
    raw.write('GET /live HTTP/1.1\r\nHost: localhost\r\n');
    assert.match(await text(raw), /^HTTP\/1\.1 408 /);
  });

  it('holds 64 connections and closes one more at once', async () => {
    const held = [];
    for (let count = 0; count < 64; count += 1) {
      const raw = await open(port);
      raw.write('GET /live HTTP/1.1\r\nHost: localhost\r\n\r\n');
      await once(raw, 'data');
      held.push(raw);
    }
    assert.equal(await text(await open(port)), '');
    const last = held.pop();
    assert.ok(last);
    last.end('GET /live HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n');
    await once(last, 'close');
    assert.equal((await get('/live')).status, 200);
    for (const raw of held) raw.destroy();
  });

  it('answers 500 and goes on when the view fails, and logs what failed', async () => {
    view.status = async () => Promise.reject(new Error('the worker said nonsense'));
    const { status, body } = await get('/status.json');
    assert.equal(status, 500);
    assert.doesNotMatch(body, /nonsense/);
    assert.match(logged.join(''), /"admin_request".*\/status\.json.*the worker said nonsense/);
    assert.equal((await get('/metrics')).status, 200);
  });

  it('says the log level, and sets it when it is asked with the header x-keygate', async () => {
    const post = async (path: string, headers = { 'x-keygate': '1' }) => get(path, { method: 'POST', headers });
    assert.deepEqual(brief(await get('/log-level')), [200, 'info\n']);
    assert.deepEqual(brief(await post('/log-level?level=debug')), [200, 'debug\n']);
    assert.deepEqual(brief(await get('/log-level')), [200, 'debug\n']);
    assert.equal((await get('/log-level?level=warn', { method: 'POST' })).status, 403);
    assert.equal(view.logLevel, 'debug');
    assert.match(logged.join(''), /"event":"log_level_changed","from":"info","to":"debug"/);
  });

  it('refuses a log level that there is not, and says which there are', async () => {
    for (const path of [
      '/log-level',
      '/log-level?level=',
      '/log-level?level=trace',
      '/log-level?level=DEBUG',
      '/log-level?level=debug&level=info',
      '/log-level?level=debug&for=1h',
      '/log-level?Level=debug',
    ]) {
      const { status, body } = await get(path, { method: 'POST', headers: { 'x-keygate': '1' } });
      assert.equal(status, 400, path);
      assert.match(body, /debug, info, warn, error/);
    }
    assert.equal(view.logLevel, 'info');
  });

  it('tells a page the last minutes first, then what is, each time something was measured', async () => {
    const page = await begin({ port, path: '/status/events' });
    assert.equal(page.headers['content-type'], 'text/event-stream');
    assert.equal(
      await chunk(page),
      'event: history\ndata: {"points":[1,2,3]}\n\nevent: overview\ndata: {"ready":true,"filler":""}\n\n',
    );
    view.unreadiness = 'draining';
    admin.announce();
    assert.equal(await chunk(page), 'event: overview\ndata: {"ready":false,"filler":""}\n\n');
    page.destroy();
  });

  it('has a bounded number of pages open, and room for another when one is closed', async () => {
    const pages = [];
    for (let count = 0; count < pagesMax; count += 1) pages.push(await begin({ port, path: '/status/events' }));
    const refused = await get('/status/events');
    assert.deepEqual([refused.status, refused.headers['retry-after']], [503, '5']);
    assert.equal((await get('/metrics')).status, 200);
    pages[0]?.destroy();
    const next = await until('room for another page', async () => {
      const page = await begin({ port, path: '/status/events' });
      return page.statusCode === 200 && page;
    });
    for (const page of [...pages, next]) page.destroy();
  });

  it('drops a page that takes nothing', async () => {
    const page = await open(port);
    page.pause();
    page.write('GET /status/events HTTP/1.1\r\nHost: localhost\r\n\r\n');
    const other = await begin({ port, path: '/status/events' });
    // What the kernel held for the page is read at last, and then there is an end.
    let told = 0;
    other.on('data', ({ length }: Buffer) => {
      told += length;
      if (told > 32 * view.overviewBytes) page.resume();
    });
    view.overviewBytes = 1024 * 1024;
    const dropped = Promise.withResolvers<void>();
    page.once('close', dropped.resolve).on('error', () => {});
    const telling = setInterval(() => admin.announce(), 20);
    await dropped.promise;
    clearInterval(telling);
    assert.equal(other.destroyed, false);
    other.destroy();
  });

  it('answers HEAD of the stream with its headers alone', async () => {
    const { status, body } = await get('/status/events', { method: 'HEAD' });
    assert.deepEqual([status, body], [200, '']);
  });

  it('ends the pages at once when it closes', async () => {
    const page = await begin({ port, path: '/status/events' });
    const ended = text(page);
    const began = performance.now();
    await admin.close();
    await ended;
    assert.ok(performance.now() - began < 900, 'it waited for the page');
  });

  it('closes without waiting for a client that never asks', async () => {
    const silent = await open(port);
    const ended = once(silent, 'close');
    silent.resume();
    await admin.close();
    await ended;
    await assert.rejects(get('/live'), { code: 'ECONNREFUSED' });
  });

  it('finishes the answer under way when it closes', async () => {
    const asked = Promise.withResolvers<void>();
    const underWay = Promise.withResolvers<string>();
    view.metrics = async () => {
      asked.resolve();
      return underWay.promise;
    };
    const scrape = get('/metrics');
    await asked.promise;
    const closed = admin.close();
    underWay.resolve('last\n');
    assert.deepEqual(brief(await scrape), [200, 'last\n']);
    await closed;
  });

  it('names the address when the port is in use', async () => {
    await assert.rejects(
      startAdmin({ ...loopback, listen: { host: '127.0.0.1', port } }, view, pino({ enabled: false })),
      (error) => {
        assert.ok(error instanceof ServiceError);
        assert.equal(error.code, 'admin_failed');
        assert.match(error.message, new RegExp(`127\\.0\\.0\\.1:${port}: .*EADDRINUSE`));
        return true;
      },
    );
  });
});

describe('the admin server on a unix socket', () => {
  const log = pino({ enabled: false });
  const view = testView();
  let directory: string;
  let path: string;
  before(() => {
    directory = mkdtempSync(join(tmpdir(), 'keygate-admin-'));
  });
  beforeEach(() => {
    path = join(directory, 'admin.sock');
    rmSync(path, { force: true });
  });
  after(() => rmSync(directory, { recursive: true }));

  it('is reachable by its user only, and leaves nothing behind', async (t) => {
    const umask = process.umask();
    const admin = await startAdmin({ ...loopback, listen: { path } }, view, log);
    t.after(async () => admin.close());
    assert.equal(admin.address, `unix:${path}`);
    assert.equal(statSync(path).mode & 0o777, 0o600);
    assert.equal(process.umask(), umask);
    assert.equal((await ask({ socketPath: path, path: '/live' })).status, 200);
    assert.equal(
      (await ask({ socketPath: path, path: '/live', headers: { host: 'behind.a.proxy.example' } })).status,
      200,
    );
    await admin.close();
    assert.equal(existsSync(path), false);
  });

  it('replaces the socket of a process that was killed', async (t) => {
    const former = spawn(process.execPath, [
      '-e',
      `require('net').createServer().listen(process.argv[1], () => console.log('up'))`,
      path,
    ]);
    await once(former.stdout, 'data');
    former.kill('SIGKILL');
    await once(former, 'exit');
    assert.ok(statSync(path).isSocket());
    const admin = await startAdmin({ ...loopback, listen: { path } }, view, log);
    t.after(async () => admin.close());
    assert.equal((await ask({ socketPath: path, path: '/live' })).status, 200);
    assert.equal(statSync(path).mode & 0o777, 0o600);
  });

  it('does not take a socket from a process that listens', async (t) => {
    const other = createServer((socket) => socket.on('error', () => {}).end('other'));
    t.after(() => other.close());
    other.listen(path);
    await once(other, 'listening');
    await assert.rejects(startAdmin({ ...loopback, listen: { path } }, view, log), (error) => {
      assert.ok(error instanceof ServiceError);
      assert.equal(error.code, 'admin_failed');
      assert.ok(error.message.includes(`unix:${path}: another process has it`), error.message);
      return true;
    });
    assert.equal(await text(connect(path)), 'other');
  });

  it('does not replace a file that is not a socket', async () => {
    writeFileSync(path, 'precious');
    await assert.rejects(startAdmin({ ...loopback, listen: { path } }, view, log), {
      code: 'admin_failed',
      message: /not a socket/,
    });
    assert.equal(statSync(path).size, 'precious'.length);
  });

  it('names the path when its directory does not exist', async () => {
    const missing = join(directory, 'missing', 'admin.sock');
    await assert.rejects(startAdmin({ ...loopback, listen: { path: missing } }, view, log), {
      code: 'admin_failed',
      message: new RegExp(missing),
    });
  });
});

async function open(port: number): Promise<Socket> {
  const socket = connect(port, '127.0.0.1');
  await once(socket, 'connect');
  return socket;
}

async function chunk(page: IncomingMessage): Promise<string> {
  const [data] = (await once(page, 'data')) as [Buffer];
  return data.toString();
}
