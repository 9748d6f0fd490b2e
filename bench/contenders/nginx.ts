/**
 * Owns: nginx as a contender, with its key in the token or in a file: what must be installed, how it is configured and started.
 * Must not know: how it is measured.
 * Runs: in the benchmark's process.
 */
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { suiteOf } from '../negotiation.ts';
import type { Command } from '../processes.ts';
import type { Setting } from '../scenarios.ts';
import { nginxVersion, pkcs11EngineVersion, softHsmVersion } from '../versions.ts';
import { backlog, connectionsMax, filesOf, idleSeconds, write } from './contender.ts';
import type { Contender, Need, Place } from './contender.ts';
import {
  cannotInLibp11,
  cannotInOpenSsl,
  cannotReload,
  cannotServeMany,
  cannotWithFileKey,
  opensslEnvironment,
  pkcs11EngineNeed,
  pkcs11Uri,
  softHsmNeed,
} from './openssl.ts';

const streamModule = '/usr/lib/nginx/modules/ngx_stream_module.so';
const nginx: Need = { files: ['/usr/sbin/nginx'], from: 'apt-get install nginx' };
const nginxStream: Need = { files: [streamModule], from: 'apt-get install libnginx-mod-stream' };

export const nginxSoftHsm: Contender = {
  title: 'nginx stream + libp11 engine, key in SoftHSM',
  needs: [softHsmNeed, nginx, nginxStream, pkcs11EngineNeed],
  versions: () => ({ ...nginxVersion(), libp11: pkcs11EngineVersion(), softhsm: softHsmVersion() }),
  cannot: (setting) => cannotInLibp11(pkcs11EngineVersion(), setting) ?? cannotAsNginx(setting),
  command: (place) => ({
    ...nginxCommand(place, `engine:pkcs11:${pkcs11Uri(place)}`),
    env: { ...place.token.env, ...opensslEnvironment(place, { engine: true }), SOFTHSM2_CONF: softHsmThatForks(place) },
  }),
};

export const nginxFile: Contender = {
  title: 'nginx stream, key in a file',
  needs: [nginx, nginxStream],
  versions: nginxVersion,
  cannot: (setting) => cannotWithFileKey(setting) ?? cannotAsNginx(setting),
  command: (place) => nginxCommand(place, filesOf(place).privateKey),
};

/** nginx's stream module chooses a certificate by name only with a variable, which reads the files in every handshake. */
function cannotAsNginx(setting: Setting): string | undefined {
  return cannotServeMany(setting) ?? cannotReload(setting) ?? cannotInOpenSsl(nginxVersion()['openssl'] ?? '', setting);
}

function nginxCommand(place: Place, key: string): Command {
  const { setting } = place;
  const several = setting.workers > 1;
  const config = write(place, 'nginx.conf', [
    `load_module ${streamModule};`,
    'daemon off;',
    `worker_processes ${setting.workers};`,
    // The key files and the token are the user's who runs the benchmark.
    ...(process.getuid?.() === 0 ? ['user root;'] : []),
    // Workers that log in to the token need it, and nginx takes its environment from them.
    ...Object.keys(place.token.env).map((name) => `env ${name};`),
    `pid ${join(place.directory, 'nginx.pid')};`,
    'error_log stderr error;',
    `events { worker_connections ${2 * connectionsMax(place) + 100}; }`,
    'stream {',
    '  access_log off;',
    '  upstream bench {',
    ...place.upstreams.map((address) => `    server ${address};`),
    '  }',
    '  server {',
    `    listen 127.0.0.1:${place.port} ssl backlog=${backlog}${several ? ' reuseport' : ''};`,
    '    proxy_pass bench;',
    `    proxy_timeout ${idleSeconds}s;`,
    // The default, said because the relay is measured with it.
    '    proxy_buffer_size 16k;',
    `    ssl_certificate ${filesOf(place).certificate};`,
    `    ssl_certificate_key "${key}";`,
    `    ssl_protocols TLSv${setting.tls};`,
    `    ssl_ecdh_curve ${setting.group};`,
    setting.tls === '1.3'
      ? `    ssl_conf_command Ciphersuites ${suiteOf(setting).openssl};`
      : `    ssl_ciphers ${suiteOf(setting).openssl};`,
    `    ssl_conf_command NumTickets ${setting.resume ? 1 : 0};`,
    `    ssl_session_tickets ${setting.resume ? 'on' : 'off'};`,
    // "off" would refuse tickets as well.
    `    ssl_session_cache ${setting.resume ? 'none' : 'off'};`,
    '  }',
    '}',
  ]);
  return { file: '/usr/sbin/nginx', args: ['-e', 'stderr', '-c', config], cwd: place.directory };
}

/**
 * The token's configuration, and that SoftHSM begins anew in a process that was forked: without it libp11 0.4.12 has lost its
 * handles in nginx's workers ("Object handle invalid" in every handshake).
 */
function softHsmThatForks(place: Place): string {
  const original = readFileSync(place.token.env['SOFTHSM2_CONF'] ?? '', 'utf8');
  return write(place, 'softhsm2.conf', [original.trimEnd(), 'library.reset_on_fork = true']);
}
