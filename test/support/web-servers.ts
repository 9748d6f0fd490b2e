/**
 * Owns: the web servers that people run: nginx, HAProxy, OpenSSL's, GnuTLS' and Node's. Each serves plaintext, where it can, and TLS
 * with any of several certificates, asks for a client certificate, and says in every page what it has seen of the connection.
 * Must not know: keygate.
 * Runs: in test processes; all but Node's are children. Unix sockets, where there are any: they need no free port.
 */
import { createHash } from 'node:crypto';
import { once } from 'node:events';
import { existsSync, readdirSync, readFileSync, readlinkSync, writeFileSync } from 'node:fs';
import { createServer as createHttpServer } from 'node:http';
import type { RequestListener, Server } from 'node:http';
import { createServer as createHttpsServer } from 'node:https';
import { join } from 'node:path';
import type { TLSSocket } from 'node:tls';
import { startDaemon } from './daemon.ts';
import type { Daemon } from './daemon.ts';

/** A certificate and its key, as files: of PEM, the certificate's issuers after it. */
export interface Identity {
  readonly name: string;
  readonly chain: string;
  readonly key: string;
}

export interface WebServer extends AsyncDisposable {
  /** As a configuration of keygate has them, by the name of the certificate; `plain`: plaintext. */
  readonly addresses: Readonly<Record<string, string>>;
}

/** What a server has seen of a connection. */
export interface Seen {
  /** The name that was asked for; empty: none; undefined: this server does not tell. */
  readonly name?: string;
  /** `TLSv1.3`; empty: plaintext. */
  readonly protocol: string;
  /** SHA-1 of the client's certificate, in hexadecimal; empty: there was none. */
  readonly certificate: string;
}

interface ServerProgram {
  /** Whether it can do without TLS. */
  readonly hasPlain: boolean;
  /** @param directory for its files and sockets */
  start(directory: string, identities: readonly Identity[]): Promise<WebServer>;
  /** From one of its pages; undefined: it is none. */
  seen(page: string): Seen | undefined;
}

/** Where a server says it in words of ours. */
const seenInWords = (program: string) => (page: string) => {
  const [, name, protocol, certificate] =
    new RegExp(`${program} saw \\((.*)\\) \\((.*)\\) \\((.*)\\)`).exec(page) ?? [];
  return name === undefined || protocol === undefined || certificate === undefined
    ? undefined
    : { name, protocol, certificate: certificate.replaceAll(':', '').toLowerCase() };
};

/** Where it shows the certificate itself. */
function seenInPem(page: string, protocol: RegExp): Seen | undefined {
  const [, version] = protocol.exec(page) ?? [];
  if (version === undefined) return undefined;
  const [, pem] = /-----BEGIN CERTIFICATE-----([^-]+)-----END/.exec(page) ?? [];
  const certificate = pem === undefined ? '' : createHash('sha1').update(Buffer.from(pem, 'base64')).digest('hex');
  return { protocol: `TLSv${version}`, certificate };
}

export type WebServerName = 'nginx' | 'HAProxy' | 'openssl s_server' | 'gnutls-serv' | 'Node';

export const webServers: Readonly<Record<WebServerName, ServerProgram>> = {
  nginx: {
    hasPlain: true,
    seen: seenInWords('nginx'),
    async start(directory, identities) {
      const socket = (name: string) => join(directory, `nginx-${name}.sock`);
      const configuration = [
        'daemon off;',
        'master_process off;',
        `pid ${join(directory, 'nginx.pid')};`,
        'error_log stderr;',
        'events {}',
        'http {',
        '  access_log off;',
        ...['client_body', 'proxy', 'fastcgi', 'uwsgi', 'scgi'].map(
          (kind) => `  ${kind}_temp_path ${join(directory, `nginx-${kind}`)};`,
        ),
        // The page is the same for plaintext, where all that it says is empty. Old keys and signatures are for those who verify.
        '  ssl_protocols TLSv1.2 TLSv1.3;',
        '  ssl_ciphers DEFAULT:@SECLEVEL=0;',
        '  ssl_verify_client optional_no_ca;',
        '  default_type text/plain;',
        `  server { listen unix:${socket('plain')}; ${nginxPage} }`,
        ...identities.map(
          ({ name, chain, key }) =>
            `  server { listen unix:${socket(name)} ssl; ssl_certificate ${chain}; ssl_certificate_key ${key}; ${nginxPage} }`,
        ),
        '}',
        '',
      ];
      const file = join(directory, 'nginx.conf');
      writeFileSync(file, configuration.join('\n'));
      const names = ['plain', ...identities.map(({ name }) => name)];
      const daemon = await startDaemon('nginx', ['-c', file, '-p', directory, '-e', 'stderr'], () =>
        names.every((name) => existsSync(socket(name))),
      );
      return server([daemon], Object.fromEntries(names.map((name) => [name, `unix:${socket(name)}`])));
    },
  },

  HAProxy: {
    hasPlain: true,
    seen: seenInWords('HAProxy'),
    async start(directory, identities) {
      const socket = (name: string) => join(directory, `haproxy-${name}.sock`);
      const bundle = ({ name, chain, key }: Identity) => {
        const file = join(directory, `haproxy-${name}.pem`);
        writeFileSync(file, readFileSync(chain, 'utf8') + readFileSync(key, 'utf8'));
        return file;
      };
      const anyClient = (chain: string) => `verify optional ca-file ${chain} ca-ignore-err all crt-ignore-err all`;
      const configuration = [
        'defaults',
        '  mode http',
        ...['client', 'server', 'connect'].map((side) => `  timeout ${side} 10s`),
        'frontend all',
        `  bind unix@${socket('plain')}`,
        ...identities.map(
          (identity) =>
            `  bind unix@${socket(identity.name)} ssl crt ${bundle(identity)} ssl-min-ver TLSv1.2 ${anyClient(identity.chain)}`,
        ),
        `  http-request return status 200 content-type text/plain lf-string "HAProxy saw (%[ssl_fc_sni]) (%[ssl_fc_protocol]) (%[ssl_c_sha1,hex])"`,
        '',
      ];
      const file = join(directory, 'haproxy.conf');
      writeFileSync(file, configuration.join('\n'));
      const names = ['plain', ...identities.map(({ name }) => name)];
      const daemon = await startDaemon('haproxy', ['-db', '-f', file], () =>
        names.every((name) => existsSync(socket(name))),
      );
      return server([daemon], Object.fromEntries(names.map((name) => [name, `unix:${socket(name)}`])));
    },
  },

  'openssl s_server': {
    hasPlain: false,
    seen: (page) => seenInPem(page, /^\s*Protocol *: TLSv(\S+)$/m),
    async start(_directory, identities) {
      const daemons = await Promise.all(
        identities.map(async ({ chain, key }) =>
          startDaemon(
            'openssl',
            // The file as the chain too: of `-cert` only the first certificate is taken.
            ['s_server', '-accept', '127.0.0.1:0', '-www', '-verify', '9', '-cipher', 'DEFAULT:@SECLEVEL=0'].concat([
              '-cert',
              chain,
              '-cert_chain',
              chain,
              '-key',
              key,
            ]),
            ({ said }) => accepting.test(said),
          ),
        ),
      );
      const addresses = identities.map(({ name }, index) => [
        name,
        `127.0.0.1:${accepting.exec(daemons[index]?.said ?? '')?.[1]}`,
      ]);
      return server(daemons, Object.fromEntries(addresses) as Record<string, string>);
    },
  },

  'gnutls-serv': {
    hasPlain: false,
    seen: (page) => {
      const [, version] = /<TD>Protocol version:<\/TD><TD>TLS(\S+)<\/TD>/.exec(page) ?? [];
      if (version === undefined) return undefined;
      const [, certificate = ''] = /Fingerprint:\s+sha1:(\w+)/.exec(page) ?? [];
      return { protocol: `TLSv${version}`, certificate };
    },
    async start(_directory, identities) {
      const daemons = await Promise.all(
        identities.map(async ({ chain, key }) =>
          startDaemon(
            'gnutls-serv',
            ['--port', '0', '--http', '--x509certfile', chain, '--x509keyfile', key],
            ({ pid }) => portOf(pid) !== undefined,
          ),
        ),
      );
      const addresses = identities.map(({ name }, index) => [name, `127.0.0.1:${portOf(daemons[index]?.pid ?? 0)}`]);
      return server(daemons, Object.fromEntries(addresses) as Record<string, string>);
    },
  },

  Node: {
    hasPlain: true,
    seen: seenInWords('Node'),
    async start(directory, identities) {
      const socket = (name: string) => join(directory, `node-${name}.sock`);
      const servers: Server[] = [createHttpServer(nodePage)];
      for (const { chain, key } of identities) {
        const files = { cert: readFileSync(chain), key: readFileSync(key) };
        servers.push(createHttpsServer({ ...files, requestCert: true, rejectUnauthorized: false }, nodePage));
      }
      const names = ['plain', ...identities.map(({ name }) => name)];
      for (const [index, each] of servers.entries()) {
        // Node's server drops the answer to a client that ends its half after the request, as gnutls-cli does.
        Object.assign(each, { httpAllowHalfOpen: true });
        each.listen(socket(names[index] ?? ''));
        await once(each, 'listening');
      }
      return {
        addresses: Object.fromEntries(names.map((name) => [name, `unix:${socket(name)}`])),
        async [Symbol.asyncDispose]() {
          for (const each of servers) {
            each.close();
            each.closeAllConnections();
          }
          await Promise.all(servers.map(async (each) => each.listening && once(each, 'close')));
        },
      };
    },
  },
};

const nginxPage =
  'location / { return 200 "nginx saw ($ssl_server_name) ($ssl_protocol) ($ssl_client_fingerprint)"; } keepalive_timeout 0;';

const nodePage: RequestListener = ({ socket }, response) => {
  const tls = 'encrypted' in socket ? (socket as TLSSocket) : undefined;
  const certificate = tls?.getPeerX509Certificate()?.fingerprint ?? '';
  const name = tls?.servername ?? '';
  response.setHeader('connection', 'close').end(`Node saw (${name}) (${tls?.getProtocol() ?? ''}) (${certificate})`);
};

/** What OpenSSL's servers say when they listen. */
const accepting = /^ACCEPT .*:(\d+)$/m;

function server(daemons: readonly Daemon[], addresses: Readonly<Record<string, string>>): WebServer {
  return {
    addresses,
    async [Symbol.asyncDispose]() {
      await Promise.all(daemons.map(async (daemon) => daemon.end()));
    },
  };
}

/** The port of IPv4 that a process listens at, which it does not tell: proc(5), `/proc/PID/fd` and `/proc/net/tcp`. */
function portOf(pid: number): number | undefined {
  const sockets = new Set(readdirSync(`/proc/${pid}/fd`).map((fd) => linkOf(`/proc/${pid}/fd/${fd}`)));
  for (const line of readFileSync('/proc/net/tcp', 'utf8').split('\n').slice(1)) {
    const [, local = '', , state, , , , , , inode] = line.trim().split(/\s+/);
    if (state === '0A' && sockets.has(`socket:[${inode}]`)) return Number.parseInt(local.split(':')[1] ?? '', 16);
  }
  return undefined;
}

function linkOf(path: string): string {
  try {
    return readlinkSync(path);
  } catch {
    return ''; // closed between the two looks
  }
}
