/**
 * Owns: rotating log files while keygate writes them, with logrotate and the file of native-config.
 * Must not know: how files are opened again (src/log.ts).
 * Runs: logrotate and a real `keygate serve`, without systemd: its `systemctl kill` is a kill here
 * (test/images/systemd.image.ts has the other).
 */
import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { existsSync, mkdirSync, readFileSync, readdirSync, statSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { it } from 'node:test';
import { launchKeygate } from '../support/keygate.ts';
import type { Keygate, LogLine } from '../support/keygate.ts';
import { provisionedToken } from '../support/provisioned-token.ts';
import { assertEchoes, tlsClient } from '../support/tls-client.ts';
import { until } from '../support/until.ts';
import { echoUpstream } from '../support/upstream.ts';

const rotations = 3;

it('rotated while clients come, no line is lost, torn or written twice', async (test) => {
  const token = await provisionedToken({ www: { kind: 'p256' } });
  test.after(() => token[Symbol.dispose]());
  const upstream = await echoUpstream();
  test.after(async () => upstream.close());
  const logs = join(token.directory, 'log');
  mkdirSync(logs);
  const [file, accessFile] = [join(logs, 'keygate.log'), join(logs, 'access.log')];
  const keygate = launchKeygate(token, {
    workers: 2,
    log: { file, access: { file: accessFile } },
    upstreams: { echo: { servers: [upstream.address] } },
    listeners: { https: {} },
  });
  test.after(async () => keygate.stop());
  const ready = await until('ready keygate', () => readLog(file).find(({ event }) => event === 'ready'), {
    deadlineMs: 30_000,
  });
  keygate.addresses = ready['addresses'] as Keygate['addresses'];
  const rules = join(token.directory, 'logrotate.conf');
  writeFileSync(rules, rulesFor(logs, keygate.pid), { mode: 0o644 });

  const written = async () =>
    until('line in each file', () => [file, accessFile].every((log) => readLog(log).length > 0));
  const stop = new AbortController();
  const clients = clientsUntil(stop.signal, keygate);
  // What is empty is not rotated.
  await written();
  for (let rotation = 1; rotation <= rotations; rotation++) {
    execFileSync('logrotate', ['--force', '--state', join(token.directory, 'state'), rules]);
    await written();
  }
  stop.abort();
  const served = await clients;
  const connections = () =>
    filesIn(logs)
      .filter((log) => log.includes('/access.log'))
      .flatMap(readLog);
  await until('line for each connection', () => connections().length >= served, { found: () => connections().length });
  assert.equal(connections().length, served);
  assert.ok(connections().every(({ event }) => event === 'connection'));
  // One file for each rotation and the current one, with the mode that the rules say.
  assert.equal(filesIn(logs).length, 2 * (rotations + 1));
  assert.equal(statSync(join(logs, 'access.log')).mode & 0o777, 0o640);
});

/** One after the other; how many there were. */
async function clientsUntil(signal: AbortSignal, keygate: Keygate): Promise<number> {
  let served = 0;
  for (; !signal.aborted; served++) {
    const client = await tlsClient({ port: keygate.port() });
    await assertEchoes(client);
    client.destroy();
  }
  return served;
}

/** The rules as they are shipped, but for where the files are, whose they are, and who passes the signal on. */
function rulesFor(logs: string, pid: number): string {
  const shipped = readFileSync(join(import.meta.dirname, '../../native-config/logrotate/keygate'), 'utf8');
  const user = execFileSync('id', ['-un'], { encoding: 'utf8' }).trim();
  const group = execFileSync('id', ['-gn'], { encoding: 'utf8' }).trim();
  return [
    ['/var/log/keygate/*.log {', `${logs}/*.log {`],
    ['su keygate keygate', `su ${user} ${group}`],
    ['create 0640 keygate keygate', `create 0640 ${user} ${group}`],
    ['systemctl kill --signal=USR2 --kill-whom=main keygate.service', `kill -USR2 ${pid}`],
  ].reduce((rules, [from = '', to = '']) => {
    assert.ok(rules.includes(from), `native-config/logrotate/keygate has no "${from}"`);
    return rules.replace(from, to);
  }, shipped);
}

function filesIn(directory: string): readonly string[] {
  return readdirSync(directory).map((name) => join(directory, name));
}

/** Old ones are compressed; the last line of the current one may be on its way. */
function readLog(file: string): readonly LogLine[] {
  if (!existsSync(file)) return [];
  const text = file.endsWith('.gz') ? execFileSync('zcat', [file], { encoding: 'utf8' }) : readFileSync(file, 'utf8');
  return text
    .split('\n')
    .slice(0, -1)
    .map((line) => JSON.parse(line) as LogLine);
}
