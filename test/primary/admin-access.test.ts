/**
 * Owns: whom the admin server lets in: tokens, certificates of clients, guessing, TLS, and files that change.
 * Must not know: what it answers to whom it knows (admin.test.ts).
 * Runs: in one test process, over real connections.
 */
import assert from 'node:assert/strict';
import { createHash, generateKeyPairSync } from 'node:crypto';
import { once } from 'node:events';
import { chmodSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import type { IncomingMessage } from 'node:http';
import { Agent } from 'node:https';
import type { RequestOptions } from 'node:https';
import { connect } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { text } from 'node:stream/consumers';
import { before, describe, it } from 'node:test';
import type { TestContext } from 'node:test';
import { connect as connectTls } from 'node:tls';
import pino from 'pino';
import type { AdminConfig } from '../../src/config/config.ts';
import { ServiceError } from '../../src/errors.ts';
import { startAdmin } from '../../src/primary/admin.ts';
import type { Admin } from '../../src/primary/admin.ts';
import { AdminAccess } from '../../src/primary/admin-access.ts';
import { ask, begin, brief, loopback, testView } from '../support/admin.ts';
import type { Reply, TestView } from '../support/admin.ts';
import { createAuthority } from '../support/authority.ts';
import type { Authority } from '../support/authority.ts';
import { until } from '../support/until.ts';

const token = 'correct-horse-battery-staple';
/** RFC 5280 4.2.1.12. */
const clientAuthentication = '1.3.6.1.5.5.7.3.2';
const bearer = (value: string) => ({ authorization: `Bearer ${value}` });
const post = { 'x-keygate': '1' };

describe('an admin server with a token', () => {
  it('tells who comes without it nothing, and what it needs', async (test) => {
    const { get, view } = await started(test);
    for (const path of ['/metrics', '/status.json', '/status/events', '/log-level', '/reload', '/drain', '/nothing']) {
      for (const method of ['GET', 'HEAD', 'POST']) {
        const { status, headers } = await get(path, { method, headers: post });
        assert.deepEqual([status, headers['www-authenticate']], [401, 'Bearer realm="keygate"'], `${method} ${path}`);
      }
    }
    assert.deepEqual([view.scrapes, view.drains], [0, 0]);
  });

  it('answers who has it, under any name', async (test) => {
    const { get, view } = await started(test);
    for (const authorization of [`Bearer ${token}`, `bearer  ${token}`, `BEARER ${token} `]) {
      const { status, body } = await get('/metrics', { headers: { authorization, host: 'keygate.example.org' } });
      assert.deepEqual([status, body], [200, `scrapes ${view.scrapes}\n`]);
    }
  });

  it('refuses another one', async (test) => {
    const { get, view } = await started(test);
    const wrong = [`Bearer ${token}x`, `Bearer ${token.slice(1)}`, 'Bearer', 'Bearer  ', token, `Basic ${token}`, ''];
    for (const authorization of wrong) {
      const { status, headers } = await get('/metrics', { headers: { authorization } });
      assert.equal(status, 401, authorization);
      assert.match(String(headers['www-authenticate']), /^Bearer realm="keygate", error="invalid_token"$/);
    }
    assert.equal(view.scrapes, 0);
  });

  it('answers probes without it, and keeps the reason to who has it', async (test) => {
    const { get, view } = await started(test);
    assert.deepEqual(brief(await get('/live')), [200, 'live\n']);
    assert.deepEqual(brief(await get('/ready')), [200, 'ready\n']);
    view.unreadiness = 'worker 3 has failed 4 times in a row';
    assert.deepEqual(brief(await get('/ready')), [503, 'not ready\n']);
    assert.deepEqual(brief(await get('/ready', { headers: bearer(token) })), [503, `${view.unreadiness}\n`]);
    assert.equal((await get('/ready', { headers: bearer('wrong') })).status, 401);
  });

  it('gives everybody the page, which holds no data', async (test) => {
    const { get } = await started(test);
    for (const path of [
      '/status',
      '/status.css',
      '/status.js',
      '/status/uplot.js',
      '/status/uplot.css',
      '/status/icon.svg',
    ])
      assert.equal((await get(path)).status, 200, path);
  });

  it('demands the header against other sites all the same', async (test) => {
    const { get, view } = await started(test);
    assert.equal((await get('/drain', { method: 'POST', headers: bearer(token) })).status, 403);
    assert.equal((await get('/drain', { method: 'POST', headers: { ...bearer(token), ...post } })).status, 202);
    assert.equal(view.drains, 1);
  });

  it('looks at no token of an address that has guessed ten times, until a while later', async (test) => {
    const { get, logged } = await started(test);
    for (let count = 0; count < 10; count += 1)
      assert.equal((await get('/metrics', { headers: bearer('wrong') })).status, 401);
    for (const value of ['wrong', token]) {
      const { status, headers } = await get('/metrics', { headers: bearer(value) });
      assert.equal(status, 429, value);
      assert.match(String(headers['retry-after']), /^([1-9]|10)$/);
    }
    assert.equal((await get('/live')).status, 200);
    assert.equal((await get('/metrics', { headers: bearer(token), localAddress: '127.0.0.2' })).status, 200);
    assert.equal(logged().match(/admin_token_refused/g)?.length, 1);
    assert.match(logged(), /"from":"127\.0\.0\.1"/);
    const again = async () => (await get('/metrics', { headers: bearer(token) })).status === 200;
    await until('answer when the window has ended', again, { deadlineMs: 15_000 });
  });

  it('does not take a request without a token for a guess', async (test) => {
    const { get } = await started(test);
    for (let count = 0; count < 20; count += 1) assert.equal((await get('/metrics')).status, 401);
    assert.equal((await get('/metrics', { headers: bearer(token) })).status, 200);
  });

  it('never logs a token, right or wrong', async (test) => {
    const { get, logged, admin, file } = await started(test);
    await get('/metrics', { headers: bearer(token) });
    await get('/metrics', { headers: bearer('a-wrong-token-of-somebody') });
    writeFileSync(file, 'short-secret');
    assert.throws(
      () => admin.reread(),
      (error) => doesNotTell(error, /short-secret/),
    );
    assert.doesNotMatch(logged(), /correct-horse|a-wrong-token/);
  });

  it('takes the new token after a reload, and ends the pages of who had the former', async (test) => {
    const { get, admin, file, port } = await started(test);
    const page = await begin({ port, path: '/status/events', headers: bearer(token) });
    const ended = text(page);
    const renewed = 'another-token-of-many-characters';
    writeFileSync(file, `${renewed}\n`);
    const next = admin.reread();
    assert.deepEqual(next.changes, ['admin.token changed']);
    assert.equal((await get('/metrics', { headers: bearer(token) })).status, 200, 'nothing is committed yet');
    next.commit();
    await ended;
    assert.equal((await get('/metrics', { headers: bearer(token) })).status, 401);
    assert.equal((await get('/metrics', { headers: bearer(renewed) })).status, 200);
    assert.deepEqual(admin.reread().changes, []);
  });

  it('does not start with one that is not there, is short, is no token, or is open to all', async (test) => {
    const directory = privateDirectory(test);
    const file = join(directory, 'token');
    const attempt = async (content: string | undefined, mode = 0o600): Promise<string> => {
      rmSync(file, { force: true });
      if (content !== undefined) {
        writeFileSync(file, content);
        chmodSync(file, mode);
      }
      try {
        const admin = await startAdmin({ ...loopback, token: { file } }, testView(), pino({ enabled: false }));
        await admin.close();
        return 'started';
      } catch (error) {
        assert.ok(error instanceof ServiceError);
        assert.equal(error.code, 'admin_failed');
        assert.ok(error.message.startsWith(`admin.token: file ${file} `), error.message);
        assert.doesNotMatch(`${error.message} ${error.hint}`, /secret/);
        return error.message.slice(`admin.token: file ${file} `.length);
      }
    };
    assert.equal(await attempt(undefined), 'cannot be read: ENOENT');
    assert.equal(await attempt('secret-of-15-ch'), 'is shorter than 16 characters');
    assert.equal(await attempt('secret-of-16-chr\n'), 'started');
    assert.equal(await attempt('s'.repeat(1024)), 'started');
    assert.equal(await attempt('s'.repeat(1025)), 'is longer than 1024 characters');
    assert.equal(await attempt('s'.repeat(5000)), 'is longer than 1024 characters');
    assert.equal(await attempt('a secret of many words'), 'holds a character that a bearer token cannot have');
    assert.equal(await attempt('secret-of-many-characters\n\n'), 'holds a character that a bearer token cannot have');
    assert.equal(await attempt('secret-of-many-characters', 0o644), 'is open to every user of this machine');
  });

  it('asks for it on a unix socket too', async (test) => {
    const path = join(privateDirectory(test), 'admin.sock');
    await started(test, { listen: { path } });
    assert.equal((await ask({ socketPath: path, path: '/metrics' })).status, 401);
    assert.equal((await ask({ socketPath: path, path: '/metrics', headers: bearer(token) })).status, 200);
    for (let count = 0; count < 10; count += 1)
      await ask({ socketPath: path, path: '/metrics', headers: bearer('wrong') });
    assert.equal((await ask({ socketPath: path, path: '/metrics', headers: bearer(token) })).status, 429);
  });

  it('warns when the token would cross a network in the clear', async (test) => {
    const everywhere = await started(test, { listen: { host: '0.0.0.0', port: 0 } });
    assert.match(everywhere.logged(), /"level":40.*admin_token_in_clear/);
    assert.equal((await everywhere.get('/metrics', { headers: bearer(token) })).status, 200);
    assert.doesNotMatch((await started(test)).logged(), /admin_token_in_clear/);
  });
});

describe('an admin server with TLS', () => {
  let authority: Authority;
  before(async () => {
    authority = await createAuthority();
  });

  it('speaks HTTPS, TLS 1.2 or newer, and nothing else', async (test) => {
    const { port, ca } = await secured(test, authority);
    assert.deepEqual(brief(await ask({ port, path: '/live', ...ca })), [200, 'live\n']);
    for (const version of ['TLSv1.2', 'TLSv1.3'] as const)
      assert.equal((await ask({ port, path: '/live', ...ca, maxVersion: version, minVersion: version })).status, 200);
    const old = { maxVersion: 'TLSv1.1', minVersion: 'TLSv1.1', ciphers: 'DEFAULT@SECLEVEL=0' } as const;
    await assert.rejects(ask({ port, path: '/live', ...ca, ...old }), /ALERT_PROTOCOL_VERSION|alert protocol version/i);
    const plain = connect(port, '127.0.0.1').on('error', () => {});
    plain.write('GET /live HTTP/1.1\r\nHost: localhost\r\n\r\n');
    assert.doesNotMatch(await text(plain).catch(() => ''), /live/);
  });

  it('cuts off who does not finish its handshake', async (test) => {
    const { port } = await secured(test, authority);
    const silent = connect(port, '127.0.0.1').on('error', () => {});
    silent.resume();
    await once(silent, 'close');
  });

  it('takes its own origin to be https', async (test) => {
    const { port, ca, view } = await secured(test, authority);
    const drain = async (origin: string) =>
      ask({ port, path: '/drain', method: 'POST', ...ca, headers: { ...post, origin, host: `localhost:${port}` } });
    assert.equal((await drain(`http://localhost:${port}`)).status, 403);
    assert.equal((await drain(`https://localhost:${port}`)).status, 202);
    assert.equal(view.drains, 1);
  });

  it('shows a renewed certificate after a reload', async (test) => {
    const { port, admin, chain, key } = await secured(test, authority);
    const subjectOf = async (): Promise<string> => {
      const socket = connectTls({ port, host: '127.0.0.1', rejectUnauthorized: false });
      await once(socket, 'secureConnect');
      const { subject } = socket.getPeerCertificate();
      socket.destroy();
      return String(subject.CN);
    };
    assert.equal(await subjectOf(), 'leaf');
    const renewed = await identity(authority, { commonName: 'renewed' });
    writeFileSync(chain, renewed.chain);
    assert.throws(
      () => admin.reread(),
      (error) => doesNotTell(error, /PRIVATE|BEGIN/, `${key} cannot be used with ${chain}`),
    );
    writeFileSync(key, renewed.key);
    const next = admin.reread();
    assert.deepEqual(next.changes, ['admin.tls changed']);
    assert.equal(await subjectOf(), 'leaf');
    next.commit();
    assert.equal(await subjectOf(), 'renewed');
  });

  it('does not start with files that it cannot use', async (test) => {
    const { config, chain, key } = await secured(test, authority);
    const good = await identity(authority);
    const refusal = async (pattern: RegExp): Promise<void> => {
      await assert.rejects(startAdmin(config, testView(), pino({ enabled: false })), (error) =>
        doesNotTell(error, /BEGIN|MIG|MII/, pattern),
      );
    };
    chmodSync(key, 0o644);
    await refusal(/^admin\.tls\.key: file .* is open to every user of this machine$/);
    chmodSync(key, 0o600);
    writeFileSync(key, 'no key');
    await refusal(/^admin\.tls\.key: file .* cannot be used with/);
    writeFileSync(key, good.key);
    writeFileSync(chain, 'no certificate');
    await refusal(/^admin\.tls\.chain: file .* holds no certificate/);
    writeFileSync(chain, '-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n');
    await refusal(/^admin\.tls\.chain: file .* holds a certificate that cannot be decoded$/);
    rmSync(chain);
    await refusal(/^admin\.tls\.chain: file .* cannot be read: ENOENT$/);
  });
});

describe('an admin server that asks for certificates of clients', () => {
  let authority: Authority;
  let foreign: Authority;
  before(async () => {
    authority = await createAuthority();
    foreign = await createAuthority();
  });

  it('lets in whose certificate the authority issued, under any name, and nobody else', async (test) => {
    const { port, ca, view } = await secured(test, authority, { clients: authority });
    const own = await clientIdentity(authority);
    assert.deepEqual(brief(await ask({ port, path: '/metrics', ...ca, ...own })), [200, 'scrapes 1\n']);
    const named = await ask({ port, path: '/live', ...ca, ...own, headers: { host: 'keygate.example.org' } });
    assert.equal(named.status, 200);
    view.unreadiness = 'draining';
    assert.deepEqual(brief(await ask({ port, path: '/ready', ...ca, ...own })), [503, 'draining\n']);
    for (const stranger of [{}, await clientIdentity(foreign)])
      await assert.rejects(ask({ port, path: '/live', ...ca, ...stranger }), 'a stranger was answered');
    assert.equal(view.scrapes, 1);
  });

  it('asks for the token as well when there is one', async (test) => {
    const file = join(privateDirectory(test), 'token');
    writeFileSync(file, token, { mode: 0o600 });
    const { port, ca } = await secured(test, authority, { clients: authority, token: { file } });
    const own = await clientIdentity(authority);
    assert.equal((await ask({ port, path: '/metrics', ...ca, ...own })).status, 401);
    assert.equal((await ask({ port, path: '/metrics', ...ca, ...own, headers: bearer(token) })).status, 200);
    await assert.rejects(ask({ port, path: '/metrics', ...ca, headers: bearer(token) }));
  });

  it('lets in nobody of the former authority after a reload, not on a connection that is open either', async (test) => {
    const { port, ca, admin, authorities } = await secured(test, authority, { clients: authority });
    const own = await clientIdentity(authority);
    const agent = new Agent({ keepAlive: true, maxSockets: 1, ...own });
    test.after(() => agent.destroy());
    const kept: RequestOptions = { port, path: '/metrics', ...ca, agent };
    assert.equal((await ask(kept)).status, 200);
    writeFileSync(authorities, foreign.rootPem + foreign.intermediatePem);
    const next = admin.reread();
    assert.deepEqual(next.changes, ['admin.tls.clientCertificates changed']);
    next.commit();
    await assert.rejects(ask(kept));
    await assert.rejects(ask({ port, path: '/metrics', ...ca, ...own }));
    assert.equal((await ask({ port, path: '/metrics', ...ca, ...(await clientIdentity(foreign)) })).status, 200);
  });
});

describe('guesses', () => {
  const hash = createHash('sha256').update(token).digest();
  const rules = { listen: { host: '::', port: 1 }, isEncrypted: true, needsCertificate: false };
  const from = (access: AdminAccess, remoteAddress: string, value: string): number | string => {
    const request = { socket: { remoteAddress }, headers: bearer(value) } as unknown as IncomingMessage;
    const answer = access.of(request);
    return typeof answer === 'string' ? answer : answer.status;
  };

  it('from one IPv6 network are counted together, from another apart', () => {
    const access = new AdminAccess(rules, hash, pino({ enabled: false }));
    for (let count = 0; count < 10; count += 1) assert.equal(from(access, `2001:db8:1:2::${count}`, 'wrong'), 401);
    assert.equal(from(access, '2001:db8:1:2:ffff::1', token), 429);
    assert.equal(from(access, '2001:db8:1:3::1', token), 'known');
    assert.equal(from(access, '::ffff:192.0.2.1', token), 'known');
  });

  it('of more addresses than can be remembered are forgotten in their order', () => {
    const access = new AdminAccess(rules, hash, pino({ enabled: false }));
    for (let count = 0; count < 10; count += 1) from(access, '192.0.2.1', 'wrong');
    assert.equal(from(access, '192.0.2.1', token), 429);
    for (let count = 0; count < 1024; count += 1) from(access, `198.18.${count >> 8}.${count & 255}`, 'wrong');
    assert.equal(from(access, '192.0.2.1', token), 'known');
  });
});

interface Started {
  readonly admin: Admin;
  readonly view: TestView;
  readonly port: number;
  /** The file of the token. */
  readonly file: string;
  readonly get: (path: string, options?: RequestOptions) => Promise<Reply>;
  /** Every line so far. */
  readonly logged: () => string;
}

async function started(test: TestContext, config: Partial<AdminConfig> = {}): Promise<Started> {
  const file = join(privateDirectory(test), 'token');
  writeFileSync(file, `${token}\n`, { mode: 0o600 });
  const lines: string[] = [];
  const view = testView();
  const log = pino({ errorKey: 'error' }, { write: (line) => lines.push(line) });
  const admin = await startAdmin({ ...loopback, token: { file }, ...config }, view, log);
  test.after(async () => admin.close());
  const port = portOf(admin);
  return {
    admin,
    view,
    port,
    file,
    get: async (path, options) => ask({ port, path, ...options }),
    logged: () => lines.join(''),
  };
}

interface Secured {
  readonly admin: Admin;
  readonly view: TestView;
  readonly port: number;
  readonly config: AdminConfig;
  readonly chain: string;
  readonly key: string;
  readonly authorities: string;
  /** Of a request that trusts it. */
  readonly ca: RequestOptions;
}

async function secured(
  test: TestContext,
  authority: Authority,
  { clients, token: place }: { readonly clients?: Authority; readonly token?: AdminConfig['token'] } = {},
): Promise<Secured> {
  const directory = privateDirectory(test);
  const [chain, key, authorities] = ['admin.pem', 'admin-key.pem', 'clients.pem'].map((name) =>
    join(directory, name),
  ) as [string, string, string];
  const own = await identity(authority);
  writeFileSync(chain, own.chain);
  writeFileSync(key, own.key, { mode: 0o600 });
  if (clients !== undefined) writeFileSync(authorities, clients.rootPem + clients.intermediatePem);
  const config: AdminConfig = {
    ...loopback,
    token: place,
    tls: { chain, key, clientCertificates: clients === undefined ? undefined : authorities },
  };
  const view = testView();
  const admin = await startAdmin(config, view, pino({ enabled: false }));
  test.after(async () => admin.close());
  const ca = { protocol: 'https:', ca: authority.rootPem, servername: 'localhost' };
  return { admin, view, port: portOf(admin), config, chain, key, authorities, ca };
}

interface Identity {
  readonly chain: string;
  readonly key: string;
}

async function identity(
  authority: Authority,
  options: { commonName?: string; purpose?: string } = {},
): Promise<Identity> {
  const { publicKey, privateKey } = generateKeyPairSync('ec', { namedCurve: 'P-256' });
  const leaf = await authority.issue(publicKey, { names: ['localhost'], ...options });
  return {
    chain: `${leaf}\n${authority.intermediatePem}`,
    key: privateKey.export({ format: 'pem', type: 'pkcs8' }),
  };
}

async function clientIdentity(authority: Authority): Promise<{ readonly cert: string; readonly key: string }> {
  const { chain, key } = await identity(authority, { purpose: clientAuthentication });
  return { cert: chain, key };
}

function doesNotTell(error: unknown, secret: RegExp, message: RegExp | string = ''): true {
  assert.ok(error instanceof ServiceError);
  assert.equal(error.code, 'admin_failed');
  assert.doesNotMatch(`${error.message} ${error.hint}`, secret);
  if (typeof message === 'string') assert.ok(error.message.includes(message), error.message);
  else assert.match(error.message, message);
  return true;
}

function portOf(admin: Admin): number {
  return Number(admin.address.slice(admin.address.lastIndexOf(':') + 1));
}

function privateDirectory(test: TestContext): string {
  const directory = mkdtempSync(join(tmpdir(), 'keygate-admin-'));
  test.after(() => rmSync(directory, { recursive: true }));
  return directory;
}
