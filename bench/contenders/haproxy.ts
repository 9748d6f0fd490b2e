/**
 * Owns: HAProxy as a contender: what must be installed, how it is configured and started.
 * Must not know: how it is measured.
 * Runs: in the benchmark's process.
 */
import { mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { suiteOf } from '../negotiation.ts';
import type { Command } from '../processes.ts';
import { haproxyVersion } from '../versions.ts';
import { backlog, connectionsMax, filesOf, idleSeconds, write } from './contender.ts';
import type { Contender, Place } from './contender.ts';
import { cannotInOpenSsl, cannotReload, cannotWithFileKey, opensslEnvironment, ticketDefaults } from './openssl.ts';

export const haproxyFile: Contender = {
  title: 'HAProxy, key in a file',
  needs: [{ files: ['/usr/sbin/haproxy'], from: 'apt-get install haproxy' }],
  versions: haproxyVersion,
  cannot: (setting) =>
    cannotWithFileKey(setting) ?? cannotReload(setting) ?? cannotInOpenSsl(haproxyVersion()['openssl'] ?? '', setting),
  command,
};

function command(place: Place): Command {
  const { setting } = place;
  const version = `TLSv${setting.tls}`;
  const suites = `${setting.tls === '1.3' ? 'ciphersuites' : 'ciphers'} ${suiteOf(setting).openssl}`;
  const config = write(place, 'haproxy.cfg', [
    'global',
    `  nbthread ${setting.workers}`,
    `  maxconn ${connectionsMax(place)}`,
    '  tune.ssl.cachesize 0',
    // The default, said because the relay is measured with it.
    '  tune.bufsize 16384',
    'defaults',
    '  mode tcp',
    '  timeout connect 5s',
    `  timeout client ${idleSeconds}s`,
    `  timeout server ${idleSeconds}s`,
    'listen tls',
    [
      `  bind 127.0.0.1:${place.port} backlog ${backlog}`,
      // A listening socket for each thread.
      `shards ${setting.workers}`,
      `ssl crt ${certificates(place)}`,
      `ssl-min-ver ${version} ssl-max-ver ${version} curves ${setting.group} ${suites}`,
      setting.resume ? '' : 'no-tls-tickets',
    ].join(' '),
    '  balance roundrobin',
    ...place.upstreams.map((address, index) => `  server upstream${index} ${address}`),
  ]);
  return {
    file: '/usr/sbin/haproxy',
    args: ['-db', '-f', config],
    env: opensslEnvironment(place, { defaults: ticketDefaults(setting) }),
    cwd: place.directory,
  };
}

/** A file, or a directory where the first in the order of names is the default. */
function certificates(place: Place): string {
  const { setting, keys } = place;
  if (setting.certificates === 1) return filesOf(place).both;
  const directory = join(place.directory, 'certificates');
  mkdirSync(directory, { mode: 0o700 });
  const privateKey = readFileSync(filesOf(place).privateKey, 'utf8');
  for (const { name, file } of keys.certificates(setting.key, setting.certificates))
    writeFileSync(join(directory, `${name}.pem`), readFileSync(file, 'utf8') + privateKey, { mode: 0o600 });
  return directory;
}
