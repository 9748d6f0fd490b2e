/**
 * Owns: what the logs say and to whom, that they can be rotated, and that neither a full disk nor a stalled reader costs a
 * connection anything.
 * Must not know: how lines are queued (src/engine/src/log.rs has tests of that).
 * Runs: against a real `keygate serve` on SoftHSM, one token for all, one keygate per test.
 */
import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { chmodSync, existsSync, readFileSync, renameSync, statSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { after, before, describe, it } from 'node:test';
import type { TestContext } from 'node:test';
import { connect } from 'node:tls';
import { fileURLToPath } from 'node:url';
import { keygate as command } from '../support/command.ts';
import { launchKeygate, startKeygate } from '../support/keygate.ts';
import type { Keygate, LogLine } from '../support/keygate.ts';
import { provisionedToken } from '../support/provisioned-token.ts';
import type { ProvisionedToken } from '../support/provisioned-token.ts';
import { assertEchoes, refusalOf, tlsClient } from '../support/tls-client.ts';
import { until } from '../support/until.ts';
import { echoUpstream } from '../support/upstream.ts';
import type { Upstream } from '../support/upstream.ts';

describe('the logs', { timeout: 110_000 }, () => {
  const fixtures = new AsyncDisposableStack();
  let token: ProvisionedToken;
  let upstream: Upstream;

  before(async () => {
    token = fixtures.use(await provisionedToken({ www: { kind: 'p256', dns: ['www.example.org'] } }));
    upstream = fixtures.use(await echoUpstream());
  });
  after(async () => fixtures.disposeAsync());

  async function started(test: TestContext, log: object, listener: object = {}, args: readonly string[] = []) {
    const keygate = await startKeygate(token, document(log, listener), { args });
    test.after(async () => keygate.stop());
    return keygate;
  }

  function document(log: object, listener: object = {}, more: object = {}) {
    return {
      upstreams: { echo: { servers: [upstream.address] } },
      listeners: { https: { alpn: ['h2'], ...listener } },
      log,
      ...more,
    };
  }

  it('a connection is one line with what was negotiated, where it went, how long each part took and why it ended', async (test) => {
    const keygate = await started(test, { access: {} });
    const client = await tlsClient({
      port: keygate.port(),
      servername: 'www.example.org',
      ALPNProtocols: ['h2'],
      ecdhCurve: 'X25519',
    });
    const { localPort } = client;
    await assertEchoes(client, '12345');
    client.end();
    const line = await keygate.logged({ event: 'connection' });
    const { time, pid, handshakeMs, signWaitMs, signMs, connectMs, totalMs, ...words } = line;
    const [worker] = await keygate.workers();
    assert.deepEqual(words, {
      level: 'info',
      worker: 0,
      event: 'connection',
      client: `127.0.0.1:${localPort}`,
      listener: 'https',
      serverName: 'www.example.org',
      protocol: 'TLSv1.3',
      cipher: 'TLS_AES_256_GCM_SHA384',
      group: 'X25519',
      alpn: 'h2',
      resumed: false,
      upstream: 'echo',
      server: upstream.address,
      toUpstreamBytes: 5,
      toClientBytes: 5,
      token: 'hsm',
      side: 'client',
      phase: 'relay',
      reason: 'closed',
      message: 'connection ended',
    });
    assert.equal(pid, worker?.pid);
    assert.ok(Math.abs(Date.parse(String(time)) - Date.now()) < 60_000, String(time));
    const parts = [handshakeMs, signWaitMs, signMs, connectMs].map(Number);
    assert.ok(
      parts.every((ms) => ms >= 0 && ms <= Number(totalMs)),
      JSON.stringify(line),
    );
    assert.ok(Number(signWaitMs) + Number(signMs) <= Number(handshakeMs), JSON.stringify(line));
  });

  it('a resumed connection has no signature, and one that failed says as much as was known', async (test) => {
    const keygate = await started(test, { access: {} }, { unknownName: 'refuse' });
    const first = connect({ host: '127.0.0.1', port: keygate.port(), rejectUnauthorized: false });
    const [session] = (await once(first, 'session')) as [Buffer];
    first.destroy();
    const again = await tlsClient({ port: keygate.port(), session });
    await assertEchoes(again);
    again.end();
    const resumed = await keygate.logged({ event: 'connection', resumed: true });
    assert.equal(resumed['signMs'], undefined);
    assert.equal(resumed['token'], undefined);
    await refusalOf({ port: keygate.port(), servername: 'unknown.example.org' });
    const refused = await keygate.logged({ event: 'connection', reason: 'unknown_name' });
    assert.equal(refused['serverName'], 'unknown.example.org');
    for (const field of ['protocol', 'server', 'connectMs', 'handshakeMs'])
      assert.equal(refused[field], undefined, field);
  });

  it('sampling leaves lines out, never those of failures unless told to, and counts them', async (test) => {
    const keygate = await started(test, { access: { sample: 10 } }, { unknownName: 'refuse' });
    const port = keygate.port();
    for (let count = 0; count < 20; count++) {
      const client = await tlsClient({ port });
      client.end();
    }
    for (let count = 0; count < 3; count++) await refusalOf({ port, servername: 'unknown.example.org' });
    await keygate.closed('client/relay/closed', { count: 20 });
    await keygate.closed('client/handshake/unknown_name', { count: 3 });
    await until('3 failures in the log', () => lines(keygate, { reason: 'unknown_name' }).length === 3);
    await until('2 of 20 in the log', () => lines(keygate, { reason: 'closed' }).length === 2);
    assert.equal(await keygate.metric('keygate_log_lines_total', { log: 'access', outcome: 'sampled_out' }), 18);
    assert.equal(await keygate.metric('keygate_log_lines_total', { log: 'access', outcome: 'written' }), 5);

    const { outcome } = await keygate.reload(document({ access: { sample: 2, failures: 'sampled' } }, {}));
    assert.equal(outcome, 'committed', 'samples and rates are settings');
    const off = await keygate.reload(document({}, {}));
    assert.equal(off.outcome, 'committed');
    const before = lines(keygate, { event: 'connection' }).length;
    const client = await tlsClient({ port });
    client.end();
    await keygate.closed('client/relay/closed', { count: 21 });
    assert.equal(lines(keygate, { event: 'connection' }).length, before, 'and so is whether there is an access log');
  });

  it('no more lines than the rate allows are written', async (test) => {
    const keygate = await started(test, { access: { rate: 1 } });
    for (let count = 0; count < 10; count++) {
      const client = await tlsClient({ port: keygate.port() });
      client.end();
    }
    await keygate.closed('client/relay/closed', { count: 10 });
    const limited = async () =>
      (await keygate.metric('keygate_log_lines_total', { log: 'access', outcome: 'rate_limited' })) ?? 0;
    await until('lines that the rate did not allow', async () => (await limited()) > 0);
    const written = lines(keygate, { event: 'connection' }).length;
    assert.equal(written + (await limited()), 10);
  });

  for (const [name, signals] of [
    ['SIGUSR2', ['SIGUSR2']],
    ['SIGHUP', ['SIGHUP']],
  ] as const) {
    it(`files that were renamed are written to until ${name}, and then new ones, by the primary and the workers`, async (test) => {
      const directory = token.directory;
      const file = join(directory, `${name}-events.log`);
      const accessFile = join(directory, `${name}-access.log`);
      const socket = join(directory, `${name}.sock`);
      const keygate = launchKeygate(
        token,
        document({ file, access: { file: accessFile } }, {}, { admin: { listen: `unix:${socket}` } }),
      );
      test.after(async () => keygate.stop());
      const ready = await loggedTo(file, { event: 'ready' });
      keygate.addresses = ready['addresses'] as Keygate['addresses'];
      keygate.adminAddress = `unix:${socket}`;
      assert.equal(statSync(file).mode & 0o777, 0o640);
      await connection(keygate);
      await loggedTo(accessFile, { event: 'connection' });

      for (const each of [file, accessFile]) renameSync(each, `${each}.1`);
      await connection(keygate);
      await until('2 lines in the renamed file', () => linesIn(`${accessFile}.1`).length === 2);
      assert.ok(!existsSync(accessFile));

      for (const signal of signals) process.kill(keygate.pid, signal);
      await loggedTo(file, { event: 'logs_reopened', worker: 0 });
      await loggedTo(file, { event: 'logs_reopened', worker: undefined });
      await connection(keygate);
      await loggedTo(accessFile, { event: 'connection' });
      assert.equal(linesIn(accessFile).length, 1);
      assert.equal(linesIn(`${accessFile}.1`).length, 2);
      assert.equal(keygate.log.length, 0, 'nothing goes to standard output');
    });
  }

  it('a log that cannot be opened is a refusal that names it', async () => {
    const missing = join(token.directory, 'missing', 'keygate.log');
    const keygate = launchKeygate(token, document({ file: missing }));
    const { exitCode, stderr } = await keygate.ended();
    assert.equal(exitCode, 1);
    assert.match(stderr, /log_failed: the log cannot be opened: .*missing\/keygate\.log: No such file/);
  });

  it('another file needs a restart, and the reload says so', async (test) => {
    const keygate = await started(test, {});
    const report = await keygate.reload(document({ file: join(token.directory, 'other.log') }));
    assert.equal(report.outcome, 'refused');
    assert.deepEqual(
      report.reasons.map(({ code }) => code),
      ['config_restart', 'config_restart'],
    );
  });

  it('a full disk costs lines, which are counted and reported, and no connection', async (test) => {
    const keygate = await started(test, { access: { file: '/dev/full' } });
    for (let count = 0; count < 5; count++) await connection(keygate);
    await until(
      '5 dropped lines',
      async () => (await keygate.metric('keygate_log_lines_total', { log: 'access', outcome: 'dropped' })) === 5,
    );
    assert.equal(await keygate.metric('keygate_log_lines_total', { log: 'event', outcome: 'dropped' }), 0);
    const reported = await keygate.logged({ event: 'log_lines_dropped' });
    assert.equal(reported.level, 'warn');
  });

  it('a reader that has stalled stops neither clients nor the admin server nor the end', async () => {
    const keygate = launchKeygate(
      token,
      document(
        { level: 'debug', access: {} },
        {},
        { admin: { listen: `unix:${join(token.directory, 'stalled.sock')}` } },
      ),
    );
    keygate.kill();
    await keygate.ended();
    // The same configuration again, with a standard output that nobody reads.
    const child = spawn(process.execPath, [main, 'serve', '-c', keygate.file], {
      env: { ...process.env, ...token.env },
      stdio: ['ignore', 'pipe', 'inherit'],
    });
    try {
      keygate.adminAddress = `unix:${join(token.directory, 'stalled.sock')}`;
      const status = await until('status', async () => {
        const found = await keygate.status().catch(() => undefined);
        return found?.ready === true && found;
      });
      keygate.addresses = status.listeners;
      // More than a pipe holds (64 KiB), and what Node reads ahead.
      const written = async () =>
        (await keygate.metric('keygate_log_lines_total', { log: 'access', outcome: 'written' })) ?? 0;
      const ended = async () => (await keygate.closes())['client/relay/closed'] ?? 0;
      let connections = 0;
      await until(
        'pipe that is full',
        async () => {
          for (let count = 0; count < 50; count++) await connection(keygate);
          connections += 50;
          return (await ended()) - (await written()) > 50;
        },
        { deadlineMs: 60_000 },
      );
      await connection(keygate);
      await keygate.closed('client/relay/closed', { count: connections + 1 });
      assert.equal((await keygate.admin('/ready')).status, 200);
      child.kill('SIGTERM');
      const [exitCode] = (await once(child, 'exit')) as [number | null];
      assert.equal(exitCode, 0);
    } finally {
      child.kill('SIGKILL');
    }
  });

  it('the PIN is in no line, whatever happens', async (test) => {
    const pin = readFileSync(token.pinFile, 'utf8').trim();
    const keygate = await started(test, { level: 'debug', access: {} });
    await connection(keygate);
    await keygate.reload(document({ level: 'debug' }, {}, { tokens: { hsm: { ...token.settings, lanes: 3 } } }));
    const elsewhere = { www: { ...token.certificates['www'], key: 'pkcs11:object=missing' } };
    const wrong = await keygate.reload(document({ level: 'debug' }, {}, { certificates: elsewhere }));
    assert.equal(wrong.outcome, 'rolled_back');
    const [worker] = await keygate.workers();
    process.kill(worker?.pid ?? 0, 'SIGKILL');
    await keygate.logged({ event: 'worker_lost' });
    await keygate.workers();
    const everything = JSON.stringify(keygate.log) + (await keygate.admin('/status.json')).body;
    assert.ok(everything.length > 1000 && pin.length >= 4);
    assert.ok(!everything.includes(pin));
  });

  it('a key log is refused without the flag, by serve and before anything is done', async () => {
    const keyLog = join(token.directory, 'refused.keys');
    const keygate = launchKeygate(token, document({ keyLog }));
    const { exitCode, stderr } = await keygate.ended();
    assert.equal(exitCode, 78);
    assert.match(stderr, /log\.keyLog: TLS secrets would be written without permission: .*--allow-key-log/);
    const checked = await command(['check', '-c', keygate.file], token.env);
    assert.equal(checked.exitCode, 78, 'check says what serve will');
    assert.equal((await command(['check', '-c', keygate.file, '--allow-key-log'], token.env)).exitCode, 0);
    assert.ok(!existsSync(keyLog));
  });

  it('a key log has the secrets that the client has, is for its owner alone, and is reported loudly', async (test) => {
    const keyLog = join(token.directory, 'allowed.keys');
    const keygate = await started(test, { keyLog }, {}, ['--allow-key-log']);
    const ofClient: string[] = [];
    for (const version of ['TLSv1.2', 'TLSv1.3'] as const) {
      const client = connect({
        host: '127.0.0.1',
        port: keygate.port(),
        rejectUnauthorized: false,
        minVersion: version,
        maxVersion: version,
      });
      client.on('keylog', (line: Buffer) => ofClient.push(line.toString().trim()));
      await once(client, 'secureConnect');
      await assertEchoes(client);
      client.destroy();
    }
    assert.ok(ofClient.length >= 6, ofClient.join('\n'));
    await until('the secrets of both clients in the key log', () =>
      ofClient.every((line) => readFileSync(keyLog, 'utf8').split('\n').includes(line)),
    );
    assert.equal(statSync(keyLog).mode & 0o777, 0o600);
    const reported = await keygate.logged({ event: 'key_log_enabled' });
    assert.equal(reported.level, 'warn');
    assert.equal(await keygate.metric('keygate_key_log_enabled'), 1);
    const shown = JSON.parse((await keygate.admin('/status.json')).body) as { keyLog?: string };
    assert.equal(shown.keyLog, keyLog);
    assert.ok(!JSON.stringify(keygate.log).includes('CLIENT_RANDOM'));
  });

  it('a key log does not go into a file that others can read', async () => {
    const keyLog = join(token.directory, 'exposed.keys');
    writeFileSync(keyLog, '');
    chmodSync(keyLog, 0o644);
    const keygate = launchKeygate(token, document({ keyLog }), { args: ['--allow-key-log'] });
    const { exitCode, stderr } = await keygate.ended();
    assert.equal(exitCode, 1);
    assert.match(stderr, /log_failed: .*exposed\.keys: it is open to others \(mode 644, expected 600\)/);
  });

  it('signals that reach workers too end none of them', async (test) => {
    const keygate = await started(test, {});
    const before = await keygate.workers();
    for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP', 'SIGUSR2'] as const) {
      for (const { pid } of before) process.kill(pid, signal);
    }
    await connection(keygate);
    assert.deepEqual(
      (await keygate.workers()).map(({ pid }) => pid),
      before.map(({ pid }) => pid),
    );
    assert.equal(keygate.log.filter(({ event }) => event === 'worker_lost').length, 0);
  });

  it('serve says in its help what the flag does', async () => {
    const { stdout } = await command(['serve', '--help']);
    assert.match(stdout, /--allow-key-log\s+accept `log\.keyLog`/);
  });

  async function connection(keygate: Keygate): Promise<void> {
    const client = await tlsClient({ port: keygate.port() });
    await assertEchoes(client);
    client.end();
    await once(client.resume(), 'close');
  }
});

const main = fileURLToPath(new URL('../../src/cli/main.ts', import.meta.url));

function lines(keygate: Keygate, fields: Readonly<Record<string, unknown>>): LogLine[] {
  return keygate.log.filter((line) => Object.entries(fields).every(([field, value]) => line[field] === value));
}

function linesIn(file: string): LogLine[] {
  if (!existsSync(file)) return [];
  const whole = readFileSync(file, 'utf8').split('\n').slice(0, -1);
  return whole.map((line) => JSON.parse(line) as LogLine);
}

async function loggedTo(file: string, fields: Readonly<Record<string, unknown>>): Promise<LogLine> {
  return until(
    `line ${JSON.stringify(fields)} in ${file}`,
    () => linesIn(file).find((line) => Object.entries(fields).every(([field, value]) => line[field] === value)),
    { deadlineMs: 30_000, found: () => linesIn(file).slice(-5) },
  );
}
