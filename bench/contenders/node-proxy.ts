/**
 * Owns: a TLS proxy as one writes it with nothing but Node: tls.createServer, net.connect and two pipes; cluster for workers.
 * Must not know: the benchmark.
 * Runs: as a contender, a process of its own and one for each worker beyond the first; ends with whoever started it.
 */
import cluster from 'node:cluster';
import { constants } from 'node:crypto';
import { readFileSync } from 'node:fs';
import { connect } from 'node:net';
import type { Socket } from 'node:net';
import { createServer } from 'node:tls';
import type { SecureVersion } from 'node:tls';

/** The content of the file that the program is given. */
export interface NodeProxyPlan {
  readonly port: number;
  readonly backlog: number;
  readonly workers: number;
  /** Used by turns. */
  readonly upstreams: readonly { readonly host: string; readonly port: number }[];
  readonly certificate: string;
  readonly privateKey: string;
  readonly version: SecureVersion;
  readonly ciphers: string;
  readonly group: string;
  readonly tickets: boolean;
  /** 48 bytes in hexadecimal. */
  readonly ticketKeys: string;
}

function main(): void {
  const plan = JSON.parse(readFileSync(process.argv[2] ?? '', 'utf8')) as NodeProxyPlan;
  if (cluster.isPrimary && plan.workers > 1) {
    for (let worker = 0; worker < plan.workers; worker += 1) cluster.fork();
    return;
  }
  serve(plan);
}

function serve(plan: NodeProxyPlan): void {
  let turn = 0;
  const server = createServer({
    cert: readFileSync(plan.certificate),
    key: readFileSync(plan.privateKey),
    minVersion: plan.version,
    maxVersion: plan.version,
    ciphers: plan.ciphers,
    ecdhCurve: plan.group,
    ticketKeys: Buffer.from(plan.ticketKeys, 'hex'),
    secureOptions: plan.tickets ? 0 : constants.SSL_OP_NO_TICKET,
    allowHalfOpen: true,
    noDelay: true,
  });
  server.on('secureConnection', (client) => {
    const { host, port } = plan.upstreams[turn++ % plan.upstreams.length] as NodeProxyPlan['upstreams'][number];
    const upstream = connect({ host, port, allowHalfOpen: true, noDelay: true });
    join(client, upstream);
    join(upstream, client);
  });
  server.listen({ port: plan.port, host: '127.0.0.1', backlog: plan.backlog });
}

function join(from: Socket, to: Socket): void {
  from.pipe(to);
  from.once('error', () => to.destroy());
  from.once('close', () => to.destroySoon());
}

main();
