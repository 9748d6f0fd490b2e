/**
 * Owns: a machine that systemd boots, with the units of native-config as they are and keygate as it is packed.
 * Must not know: what is checked inside (systemd-guest.sh).
 * Runs: by `npm run test:images`, as root, in a systemd-nspawn container with a network of its own; nothing of it stays.
 */
import assert from 'node:assert/strict';
import { execFileSync, spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { it } from 'node:test';
import { stringify } from 'yaml';
import { debianRoot, whyNotHere } from './debian-root.ts';

const checkout = join(import.meta.dirname, '../..');
const packages = ['systemd', 'softhsm2', 'libatomic1', 'procps', 'curl', 'logrotate'];
const bootDeadlineMs = 4 * 60_000;

const configuration = {
  workers: 2,
  admin: { listen: 'unix:/run/keygate/admin' },
  log: { file: '/var/log/keygate/keygate.log', access: { file: '/var/log/keygate/access.log' } },
  drainDeadline: '5s',
  tokens: {
    hsm: {
      module: '/usr/lib/softhsm/libsofthsm2.so',
      uri: 'pkcs11:token=keygate',
      pin: { credential: 'pin' },
    },
  },
  certificates: { www: { chain: 'www.pem', key: 'pkcs11:object=www' } },
  upstreams: { web: { servers: ['127.0.0.1:8080'] } },
  listeners: { https: { bind: ['0.0.0.0:443', '[::]:443'], certificates: ['www'], upstream: 'web' } },
};

const upstream = `[Service]
ExecStart=/opt/keygate/node_modules/.bin/node -e "require('node:http').createServer((_, response) => response.end('hello')).listen(8080, '127.0.0.1')"
`;

const guest = `[Unit]
Requires=basic.target
After=basic.target
[Service]
Type=oneshot
StandardOutput=append:/results/output
StandardError=inherit
ExecStart=/bin/bash /opt/guest/systemd-guest.sh
`;

it('the units run keygate under systemd', { skip: whyNotHere('systemd-nspawn') }, async (test) => {
  execFileSync(process.execPath, ['scripts/build.ts'], { cwd: checkout, stdio: 'inherit' });
  const root = debianRoot('systemd', packages);
  const laid = mkdtempSync(join(tmpdir(), 'keygate-systemd-'));
  test.after(() => rmSync(laid, { recursive: true, force: true }));
  mkdirSync(join(laid, 'results'));
  writeFileSync(join(laid, 'guest.service'), guest);
  writeFileSync(join(laid, 'upstream.service'), upstream);
  writeFileSync(join(laid, 'keygate.yaml'), stringify(configuration));
  // Whatever ends the outer process ends everything in its process namespace, also a machine that would not.
  const machine = spawn(
    'unshare',
    [
      '--fork',
      '--pid',
      '--mount-proc',
      '--kill-child=KILL',
      'systemd-nspawn',
      '--quiet',
      `--directory=${root}`,
      '--volatile=overlay',
      '--register=no',
      '--keep-unit',
      '--private-network',
      '--console=pipe',
      ...['dist', 'bin', 'package.json'].map((name) => `--bind-ro=${join(checkout, name)}:/opt/keygate/${name}`),
      `--bind-ro=${join(checkout, 'node_modules')}:/opt/keygate/node_modules`,
      `--bind-ro=${join(checkout, 'native-config')}:/opt/native-config`,
      `--bind-ro=${join(checkout, 'test/images')}:/opt/guest`,
      `--bind-ro=${join(laid, 'keygate.yaml')}:/opt/keygate.yaml`,
      ...['guest', 'upstream'].map(
        (name) => `--bind-ro=${join(laid, name)}.service:/etc/systemd/system/${name}.service`,
      ),
      `--bind=${join(laid, 'results')}:/results`,
      '--boot',
      'systemd.unit=guest.service',
    ],
    { stdio: ['ignore', 'ignore', 'inherit'], timeout: bootDeadlineMs, killSignal: 'SIGKILL' },
  );
  await once(machine, 'exit');
  const output = readFileSync(join(laid, 'results/output'), 'utf8');
  const checks = [...output.matchAll(/^(?<verdict>ok|not ok) (?<name>.+)\n(?<details>(?: {4}.*\n)*)/gm)];
  for (const { groups } of checks) {
    await test.test(groups?.['name'] ?? '', () => assert.equal(groups?.['verdict'], 'ok', groups?.['details'] ?? ''));
  }
  assert.match(output, /^guest ended 0$/m, output);
});
