/**
 * Owns: the admin server of a running keygate: beyond this host with TLS and a token, files that change with a reload, and
 * the log level of every process.
 * Must not know: what is answered to whom in detail (test/primary/admin*.test.ts).
 * Runs: against a real `keygate serve` with SoftHSM, one keygate per test.
 */
import assert from 'node:assert/strict';
import { generateKeyPairSync } from 'node:crypto';
import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { it } from 'node:test';
import { refusedKeygate, startKeygate } from '../support/keygate.ts';
import type { Keygate } from '../support/keygate.ts';
import { ask } from '../support/admin.ts';
import { createAuthority } from '../support/authority.ts';
import { provisionedToken } from '../support/provisioned-token.ts';
import { until } from '../support/until.ts';
import { echoUpstream } from '../support/upstream.ts';

it('the admin server of a reachable address asks for its token, over TLS, and a reload takes new files', async () => {
  using token = await provisionedToken({ www: { kind: 'p256' } });
  await using echo = await echoUpstream();
  const authority = await createAuthority();
  const { publicKey, privateKey } = generateKeyPairSync('ec', { namedCurve: 'P-256' });
  const place = (name: string, content: string): string => {
    const file = join(token.directory, name);
    writeFileSync(file, content, { mode: 0o600 });
    return file;
  };
  const leaf = await authority.issue(publicKey, { names: ['localhost'] });
  const document = {
    admin: {
      listen: '0.0.0.0:0',
      token: { file: place('admin-token', 'the-first-token-there-is\n') },
      tls: {
        chain: place('admin.pem', `${leaf}\n${authority.intermediatePem}`),
        key: place('admin-key.pem', privateKey.export({ format: 'pem', type: 'pkcs8' })),
      },
    },
    upstreams: { web: { servers: [echo.address] } },
    listeners: { https: {} },
  };
  await using keygate = await startKeygate(token, document);
  const port = Number(keygate.adminAddress.split(':')[1]);
  const get = async (path: string, value?: string) => {
    const headers = value === undefined ? {} : { authorization: `Bearer ${value}` };
    const trust = { ca: authority.rootPem, servername: 'localhost' };
    return (await ask({ protocol: 'https:', port, path, headers, ...trust })).status;
  };
  assert.equal(await get('/ready'), 200);
  assert.equal(await get('/metrics'), 401);
  assert.equal(await get('/metrics', 'the-first-token-there-is'), 200);

  // A file that cannot be used is a reason not to reload; the former goes on.
  place('admin-token', 'short');
  process.kill(keygate.pid, 'SIGHUP');
  const { reasons } = await keygate.logged({ event: 'reload_refused' });
  assert.match(JSON.stringify(reasons), /admin_failed.*admin\.token: file .* is shorter than 16 characters/);
  assert.equal(await get('/metrics', 'the-first-token-there-is'), 200);

  place('admin-token', 'the-second-token-there-is');
  process.kill(keygate.pid, 'SIGHUP');
  const { changes } = await keygate.logged({ event: 'reload_committed' });
  assert.deepEqual(changes, ['admin.token changed']);
  assert.equal(await get('/metrics', 'the-first-token-there-is'), 401);
  assert.equal(await get('/metrics', 'the-second-token-there-is'), 200);
  assert.doesNotMatch(JSON.stringify(keygate.log), /the-(?:first|second)-token/);
});

it('keygate does not start with an admin token that it cannot use, and says which', async () => {
  using token = await provisionedToken({ www: { kind: 'p256' } });
  const file = join(token.directory, 'absent');
  const { exitCode, stderr } = await refusedKeygate(token, {
    admin: { listen: '127.0.0.1:0', token: { file } },
    upstreams: { web: { servers: ['127.0.0.1:1'] } },
    listeners: { https: {} },
  });
  assert.equal(exitCode, 1);
  assert.match(stderr, new RegExp(`admin\\.token: file ${file} cannot be read: ENOENT`));
});

it('the log level is that of every process at once, also of one that is started later, until a reload', async () => {
  using token = await provisionedToken({ www: { kind: 'p256' } });
  await using servers = new AsyncDisposableStack();
  let server = servers.use(await echoUpstream());
  const { address } = server;
  const [host = '', port] = address.split(':');
  const document = {
    upstreams: { web: { servers: [address], health: { tcp: '100ms', timeout: '1s', fall: 1, rise: 1 } } },
    listeners: { https: {} },
  };
  await using keygate = await startKeygate(token, document);
  assert.equal((await keygate.reload({ ...document, log: { level: 'error' } })).status, 200);
  assert.deepEqual(await levelOf(keygate), [200, 'error\n']);
  assert.deepEqual(await levelOf(keygate, 'info'), [200, 'info\n']);
  await keygate.logged({ event: 'log_level_changed', from: 'error', to: 'info' });

  /** A worker says that a server is gone as an error, that it is back as information. */
  const workerSpeaks = async (): Promise<void> => {
    const since = keygate.log.length;
    await server.close();
    await keygate.logged({ event: 'server_down', server: `web ${address}` }, { since });
    server = servers.use(await echoUpstream({ host, port: Number(port) }));
    await keygate.logged({ event: 'server_up', server: `web ${address}` }, { since });
  };
  await workerSpeaks();
  const [worker] = await keygate.workers();
  process.kill(worker?.pid ?? 0, 'SIGKILL');
  await until('replacement', async () => (await keygate.workers())[0]?.pid !== worker?.pid);
  await workerSpeaks();

  assert.equal((await keygate.reload()).status, 200);
  assert.deepEqual(await levelOf(keygate), [200, 'error\n']);
});

/** Sets it first, if one is given. */
async function levelOf(keygate: Keygate, wanted?: string): Promise<readonly [number, string]> {
  const { status, body } = await (wanted === undefined
    ? keygate.admin('/log-level')
    : keygate.admin(`/log-level?level=${wanted}`, 'POST'));
  return [status, body];
}
