/**
 * Owns: who is measured, one row each: what must be installed, how it is configured and started.
 * Must not know: how it is measured.
 * Runs: in the benchmark's process.
 *
 * All of them: one worker, one certificate, the scenario's one version, suite and group, the scenario's number of session
 * tickets, no TLS session cache, no access log, one upstream over TCP.
 */
import { existsSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import type { KeyFiles, Keys } from './keys.ts';
import type { Command } from './processes.ts';
import { negotiation, suiteOf } from './scenarios.ts';
import type { Scenario } from './scenarios.ts';
import { haproxyVersion, keygateVersion, nginxVersion, pkcs11EngineVersion, softHsmVersion } from './versions.ts';

export interface Contender {
  readonly name: string;
  readonly title: string;
  /** Debian's packages, and a file that each of them must have put there. */
  readonly needs: readonly Need[];
  readonly versions: () => Readonly<Record<string, string>>;
  /** Writes its configuration and says how it is started. */
  readonly command: (place: Place) => Command;
}

export interface Need {
  /** Any one of them. */
  readonly files: readonly string[];
  readonly from: string;
}

export interface Place {
  readonly scenario: Scenario;
  readonly keys: Keys;
  /** Private to this contender and scenario; exists. */
  readonly directory: string;
  readonly port: number;
  readonly upstreamPort: number;
}

const root = fileURLToPath(new URL('..', import.meta.url));
const libraryDirectories = ['/usr/lib/x86_64-linux-gnu', '/usr/lib/aarch64-linux-gnu'];
const pkcs11Engines = libraryDirectories.map((directory) => `${directory}/engines-3/pkcs11.so`);
const nginxStreams = ['/usr/lib/nginx/modules/ngx_stream_module.so'];

const softHsm: Need = { files: ['/usr/bin/softhsm2-util'], from: 'apt-get install softhsm2' };
const nginx: Need = { files: ['/usr/sbin/nginx'], from: 'apt-get install nginx' };
const nginxStream: Need = { files: nginxStreams, from: 'apt-get install libnginx-mod-stream' };
const pkcs11Engine: Need = { files: pkcs11Engines, from: 'apt-get install libengine-pkcs11-openssl' };
const haproxy: Need = { files: ['/usr/sbin/haproxy'], from: 'apt-get install haproxy' };
const engine: Need = { files: [join(root, 'src/engine/keygate-engine.node')], from: 'scripts/bootstrap' };

export const contenders: readonly Contender[] = [
  {
    name: 'keygate',
    title: 'keygate, key in SoftHSM',
    needs: [softHsm, engine],
    versions: () => ({ ...keygateVersion(root), softhsm: softHsmVersion() }),
    command: keygateCommand,
  },
  {
    name: 'nginx-softhsm',
    title: 'nginx stream + libp11 engine, key in SoftHSM',
    needs: [softHsm, nginx, nginxStream, pkcs11Engine],
    versions: () => ({ ...nginxVersion(), libp11: pkcs11EngineVersion(), softhsm: softHsmVersion() }),
    command: (place) =>
      nginxCommand(
        place,
        `engine:pkcs11:pkcs11:token=${place.keys.token.label};object=${filesOf(place).label};type=private`,
      ),
  },
  {
    name: 'nginx-file',
    title: 'nginx stream, key in a file',
    needs: [nginx, nginxStream],
    versions: nginxVersion,
    command: (place) => nginxCommand(place, filesOf(place).privateKey),
  },
  {
    name: 'haproxy-file',
    title: 'HAProxy, key in a file',
    needs: [haproxy],
    versions: haproxyVersion,
    command: haproxyCommand,
  },
];

/** What is missing, and where it comes from; empty when all is there. */
export function missingNeeds(contender: Contender): readonly string[] {
  return contender.needs
    .filter(({ files }) => !files.some(existsSync))
    .map(({ files, from }) => `${files.join(' or ')} (${from})`);
}

function keygateCommand(place: Place): Command {
  const { scenario, keys } = place;
  const files = filesOf(place);
  const config = write(place, 'keygate.yaml', [
    'workers: 1',
    'log: { level: warn }',
    'tokens:',
    `  hsm: { module: ${keys.token.module}, uri: "pkcs11:token=${keys.token.label}", pin: { file: ${keys.token.pinFile} } }`,
    'certificates:',
    `  www: { chain: ${files.certificate}, key: "pkcs11:object=${files.label}" }`,
    'policies:',
    `  bench: { minVersion: "${scenario.tls}", maxVersion: "${scenario.tls}", groups: [${negotiation.group}], cipherSuites: [${suiteOf(scenario).iana}], tickets: ${scenario.tickets > 0} }`,
    'upstreams:',
    `  lines: { servers: ["127.0.0.1:${place.upstreamPort}"] }`,
    'listeners:',
    `  tls: { bind: ["127.0.0.1:${place.port}"], certificates: [www], policy: bench, upstream: lines }`,
  ]);
  return { file: join(root, 'bin/keygate'), args: ['serve', '-c', config], env: keys.token.env, cwd: place.directory };
}

/**
 * nginx without a master: libp11 0.4.12 loses its handles when nginx forks ("Object handle invalid" in every handshake), and
 * one process is what is measured anyway.
 */
function nginxCommand(place: Place, key: string): Command {
  const { scenario, keys } = place;
  const openssl = write(place, 'openssl.cnf', [
    'openssl_conf = init',
    '[init]',
    'engines = engines',
    '[engines]',
    'pkcs11 = pkcs11',
    '[pkcs11]',
    'engine_id = pkcs11',
    `dynamic_path = ${pkcs11Engines.find(existsSync) ?? ''}`,
    `MODULE_PATH = ${keys.token.module}`,
    `PIN = ${keys.token.pin}`,
    'init = 1',
  ]);
  const config = write(place, 'nginx.conf', [
    `load_module ${nginxStreams[0]};`,
    'daemon off;',
    'master_process off;',
    `pid ${join(place.directory, 'nginx.pid')};`,
    'error_log stderr error;',
    'events { worker_connections 4096; }',
    'stream {',
    '  access_log off;',
    '  server {',
    `    listen 127.0.0.1:${place.port} ssl backlog=4096;`,
    `    proxy_pass 127.0.0.1:${place.upstreamPort};`,
    `    ssl_certificate ${filesOf(place).certificate};`,
    `    ssl_certificate_key "${key}";`,
    `    ssl_protocols TLSv${scenario.tls};`,
    `    ssl_ecdh_curve ${negotiation.group};`,
    scenario.tls === '1.3'
      ? `    ssl_conf_command Ciphersuites ${suiteOf(scenario).openssl};`
      : `    ssl_ciphers ${suiteOf(scenario).openssl};`,
    `    ssl_conf_command NumTickets ${scenario.tickets};`,
    `    ssl_session_tickets ${scenario.tickets > 0 ? 'on' : 'off'};`,
    // "off" would refuse tickets as well.
    `    ssl_session_cache ${scenario.tickets > 0 ? 'none' : 'off'};`,
    '  }',
    '}',
  ]);
  const env = key.startsWith('engine:') ? { ...keys.token.env, OPENSSL_CONF: openssl } : {};
  return { file: '/usr/sbin/nginx', args: ['-e', 'stderr', '-c', config], env, cwd: place.directory };
}

function haproxyCommand(place: Place): Command {
  const { scenario } = place;
  // HAProxy has no word for the number of tickets; the library has.
  const openssl = write(place, 'openssl.cnf', [
    'openssl_conf = init',
    '[init]',
    'ssl_conf = ssl',
    '[ssl]',
    'system_default = system',
    '[system]',
    `NumTickets = ${scenario.tickets}`,
  ]);
  const version = `TLSv${scenario.tls}`;
  const suites = `${scenario.tls === '1.3' ? 'ciphersuites' : 'ciphers'} ${suiteOf(scenario).openssl}`;
  const bind = `crt ${filesOf(place).both} ssl-min-ver ${version} ssl-max-ver ${version} curves ${negotiation.group} ${suites}`;
  const config = write(place, 'haproxy.cfg', [
    'global',
    '  nbthread 1',
    '  maxconn 4096',
    '  tune.ssl.cachesize 0',
    'defaults',
    '  mode tcp',
    '  timeout connect 5s',
    '  timeout client 60s',
    '  timeout server 60s',
    'listen tls',
    `  bind 127.0.0.1:${place.port} backlog 4096 ssl ${bind}${scenario.tickets > 0 ? '' : ' no-tls-tickets'}`,
    `  server lines 127.0.0.1:${place.upstreamPort}`,
  ]);
  return {
    file: '/usr/sbin/haproxy',
    args: ['-db', '-f', config],
    env: { OPENSSL_CONF: openssl },
    cwd: place.directory,
  };
}

function filesOf(place: Place): KeyFiles {
  return place.keys.files[place.scenario.key];
}

/** Readable by its owner only: some of them hold the PIN. */
function write(place: Place, name: string, lines: readonly string[]): string {
  const path = join(place.directory, name);
  writeFileSync(path, `${lines.join('\n')}\n`, { mode: 0o600 });
  return path;
}
