/**
 * Owns: stunnel as a contender: what must be installed, how it is configured and started.
 * Must not know: how it is measured.
 * Runs: in the benchmark's process.
 *
 * One process with a thread for each connection, on as many cores as it is given: it has no workers to count.
 */
import { suiteOf } from '../negotiation.ts';
import type { Command } from '../processes.ts';
import { pkcs11EngineVersion, softHsmVersion, stunnelVersion } from '../versions.ts';
import { filesOf, idleSeconds, write } from './contender.ts';
import type { Contender, Place } from './contender.ts';
import {
  cannotInLibp11,
  cannotInOpenSsl,
  cannotReload,
  cannotServeMany,
  opensslEnvironment,
  pkcs11EngineNeed,
  pkcs11Uri,
  softHsmNeed,
} from './openssl.ts';

export const stunnelSoftHsm: Contender = {
  title: 'stunnel + libp11 engine, key in SoftHSM',
  needs: [softHsmNeed, { files: ['/usr/bin/stunnel4'], from: 'apt-get install stunnel4' }, pkcs11EngineNeed],
  versions: () => ({ ...stunnelVersion(), libp11: pkcs11EngineVersion(), softhsm: softHsmVersion() }),
  cannot: (setting) =>
    cannotInLibp11(pkcs11EngineVersion(), setting) ??
    cannotServeMany(setting) ??
    cannotReload(setting) ??
    cannotInOpenSsl(stunnelVersion()['openssl'] ?? '', setting),
  command,
};

function command(place: Place): Command {
  const { setting, token } = place;
  const config = write(place, 'stunnel.conf', [
    'foreground = quiet',
    'debug = err',
    'syslog = no',
    'pid =',
    // Its module and its PIN are in openssl.cnf: what is said here to an engine, stunnel prints.
    'engine = pkcs11',
    '[bench]',
    `accept = 127.0.0.1:${place.port}`,
    ...place.upstreams.map((address) => `connect = ${address}`),
    'failover = rr',
    `TIMEOUTidle = ${idleSeconds}`,
    'engineId = pkcs11',
    `cert = ${filesOf(place).certificate}`,
    `key = ${pkcs11Uri(place)}`,
    `sslVersion = TLSv${setting.tls}`,
    `${setting.tls === '1.3' ? 'ciphersuites' : 'ciphers'} = ${suiteOf(setting).openssl}`,
    `curves = ${setting.group}`,
    `sessionResume = ${setting.resume ? 'yes' : 'no'}`,
    `options = ${setting.resume ? '-NO_TICKET' : 'NO_TICKET'}`,
    `config = NumTickets:${setting.resume ? 1 : 0}`,
  ]);
  return {
    file: '/usr/bin/stunnel4',
    args: [config],
    env: { ...token.env, ...opensslEnvironment(place, { engine: true }) },
    cwd: place.directory,
  };
}
