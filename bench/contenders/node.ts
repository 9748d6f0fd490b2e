/**
 * Owns: a proxy of Node's own `tls` and `net` as a contender: how it is configured and started.
 * Must not know: how it is measured, how the proxy works.
 * Runs: in the benchmark's process.
 *
 * With its key in a file only: Node has its own OpenSSL linked in, and the engine that Debian has belongs to another one.
 */
import { randomBytes } from 'node:crypto';
import { fileURLToPath } from 'node:url';
import { suiteOf } from '../negotiation.ts';
import type { Command } from '../processes.ts';
import type { Setting } from '../scenarios.ts';
import { nodeVersion } from '../versions.ts';
import { backlog, filesOf, write } from './contender.ts';
import type { Contender, Place } from './contender.ts';
import type { NodeProxyPlan } from './node-proxy.ts';
import {
  cannotInOpenSsl,
  cannotRefuseSessions,
  cannotReload,
  cannotServeMany,
  cannotWithFileKey,
  opensslEnvironment,
  ticketDefaults,
} from './openssl.ts';

const program = fileURLToPath(new URL('node-proxy.ts', import.meta.url));

export const nodeFile: Contender = {
  title: "Node's own tls, key in a file",
  needs: [],
  versions: nodeVersion,
  cannot: (setting) =>
    cannotWithFileKey(setting) ??
    cannotServeMany(setting) ??
    cannotReload(setting) ??
    cannotRefuseSessions(setting) ??
    cannotResumeAgain(setting) ??
    cannotInOpenSsl(nodeVersion()['openssl'] ?? '', setting),
  command,
};

/** Its callback for ticket keys never says that a ticket is to be renewed, and a client uses a ticket once, RFC 8446 appendix C.4. */
function cannotResumeAgain({ tls, resume }: Setting): string | undefined {
  return resume && tls === '1.3'
    ? 'Node gives no session ticket in a resumed handshake, so nobody resumes from there'
    : undefined;
}

function command(place: Place): Command {
  const { setting } = place;
  const { certificate, privateKey } = filesOf(place);
  const plan: NodeProxyPlan = {
    port: place.port,
    backlog,
    workers: setting.workers,
    upstreams: place.upstreams.map((address) => {
      const [host = '', port] = address.split(':');
      return { host, port: Number(port) };
    }),
    certificate,
    privateKey,
    version: `TLSv${setting.tls}`,
    ciphers: suiteOf(setting).openssl,
    group: setting.group,
    tickets: setting.resume,
    // One for all workers: a client comes back to any of them.
    ticketKeys: randomBytes(48).toString('hex'),
  };
  const file = write(place, 'node-proxy.json', [JSON.stringify(plan)]);
  const { OPENSSL_CONF } = opensslEnvironment(place, { defaults: ticketDefaults(setting) });
  return {
    file: process.execPath,
    // Node reads OPENSSL_CONF only on request, and a section of its own name unless told otherwise.
    args: ['--openssl-shared-config', `--openssl-config=${OPENSSL_CONF}`, program, file],
    cwd: place.directory,
  };
}
