/**
 * Owns: hitch as a contender: what must be installed, how it is configured and started.
 * Must not know: how it is measured.
 * Runs: in the benchmark's process.
 *
 * hitch knows one upstream address. It has no word for tickets; the library has. Its buffers have a fixed size.
 */
import { suiteOf } from '../negotiation.ts';
import type { Command } from '../processes.ts';
import { hitchVersion } from '../versions.ts';
import { backlog, filesOf, write } from './contender.ts';
import type { Contender, Place } from './contender.ts';
import {
  cannotInOpenSsl,
  cannotRefuseSessions,
  cannotReload,
  cannotServeMany,
  cannotWithFileKey,
  opensslEnvironment,
  ticketDefaults,
} from './openssl.ts';

export const hitchFile: Contender = {
  title: 'hitch, key in a file',
  needs: [{ files: ['/usr/sbin/hitch'], from: 'apt-get install hitch' }],
  versions: hitchVersion,
  cannot: (setting) =>
    cannotWithFileKey(setting) ??
    cannotServeMany(setting) ??
    cannotReload(setting) ??
    cannotRefuseSessions(setting) ??
    cannotInOpenSsl(hitchVersion()['openssl'] ?? '', setting),
  command,
};

function command(place: Place): Command {
  const { setting } = place;
  const [host, port] = place.upstreams[0]?.split(':') ?? [];
  const config = write(place, 'hitch.conf', [
    `frontend = "[127.0.0.1]:${place.port}"`,
    `backend = "[${host}]:${port}"`,
    // The directory of OCSP answers is another user's.
    'ocsp-dir = ""',
    `pem-file = "${filesOf(place).both}"`,
    `workers = ${setting.workers}`,
    `backlog = ${backlog}`,
    `tls-protos = TLSv${setting.tls}`,
    `${setting.tls === '1.3' ? 'ciphersuites' : 'ciphers'} = "${suiteOf(setting).openssl}"`,
    `ecdh-curve = "${setting.group}"`,
    'log-level = 1',
    'syslog = off',
    'daemon = off',
    // It refuses to stay root. The files are read before.
    ...(process.getuid?.() === 0 ? ['user = "nobody"'] : []),
  ]);
  return {
    file: '/usr/sbin/hitch',
    args: [`--config=${config}`],
    env: opensslEnvironment(place, { defaults: ticketDefaults(setting) }),
    cwd: place.directory,
  };
}
