/**
 * Owns: the clients that people fetch pages with, over TLS of one version and, where they can, in the clear.
 * Must not know: keygate; who is visited is a port of 127.0.0.1 and a name.
 * Runs: in test processes; all but Node's are children.
 */
import { once } from 'node:events';
import { connect } from 'node:net';
import type { Socket } from 'node:net';
import { text } from 'node:stream/consumers';
import { readFileSync } from 'node:fs';
import { chromium } from 'playwright-core';
import type { Browser } from 'playwright-core';
import { program, tlsClient } from './tls-client.ts';

export type TlsVersion = '1.2' | '1.3';

export interface Visit {
  readonly port: number;
  /** What is asked for, and must be in the certificate. */
  readonly name: string;
  readonly path: string;
}

export interface TlsVisit extends Visit {
  readonly version: TlsVersion;
  /** PEM file of whom to trust. */
  readonly trusted: string;
}

export interface ClientProgram {
  /** The page, or what it said on failing. */
  readonly tls: (visit: TlsVisit) => Promise<string>;
  /** Undefined: it speaks nothing but TLS. */
  readonly plain?: (visit: Visit) => Promise<string>;
}

const request = ({ name, path }: Visit): string => `GET ${path} HTTP/1.1\r\nHost: ${name}\r\nConnection: close\r\n\r\n`;

/** `1.2` with a separator. */
const spelled = (version: TlsVersion, between: string): string => version.replace('.', between);

export type WebClientName = 'curl' | 'openssl s_client' | 'gnutls-cli' | 'Python' | 'Node';

/** Beside the browser, which must be started. */
export const webClients: Readonly<Record<WebClientName, ClientProgram>> = {
  curl: {
    async tls({ port, name, path, version, trusted }) {
      const only = [`--tlsv${version}`, '--tls-max', version];
      return (await curl(port, name, ...only, '--cacert', trusted, `https://${name}:${port}${path}`)).output;
    },
    plain: async ({ port, name, path }) => (await curl(port, name, `http://${name}:${port}${path}`)).output,
  },

  'openssl s_client': {
    async tls(visit) {
      const { port, name, version, trusted } = visit;
      const args = ['s_client', '-quiet', '-connect', `127.0.0.1:${port}`, `-tls${spelled(version, '_')}`];
      const verify = ['-servername', name, '-verify_return_error', '-verify_hostname', name, '-CAfile', trusted];
      return (await program('openssl', [...args, ...verify], request(visit))).output;
    },
  },

  'gnutls-cli': {
    async tls(visit) {
      const { port, name, version, trusted } = visit;
      const only = ['--priority', `NORMAL:-VERS-ALL:+VERS-TLS${version}`];
      const verify = ['--x509cafile', trusted, '--sni-hostname', name, '--verify-hostname', name];
      return (await program('gnutls-cli', [...only, ...verify, '-p', String(port), '127.0.0.1'], request(visit)))
        .output;
    },
  },

  Python: {
    async tls(visit) {
      const { port, name, version, trusted } = visit;
      const args = [String(port), name, `TLSv${spelled(version, '_')}`, trusted];
      return (await program('python3', ['-c', pythonClient, ...args], request(visit))).output;
    },
  },

  Node: {
    async tls(visit) {
      const { port, name, version, trusted } = visit;
      const protocol = `TLSv${version}` as const;
      const versions = { minVersion: protocol, maxVersion: protocol };
      return answerOf(await tlsClient({ port, servername: name, ca: readFileSync(trusted), ...versions }), visit);
    },
    async plain(visit) {
      const socket = connect({ host: '127.0.0.1', port: visit.port, allowHalfOpen: true });
      await once(socket, 'connect');
      return answerOf(socket, visit);
    },
  },
};

async function curl(port: number, name: string, ...args: readonly string[]) {
  const direct = ['--silent', '--show-error', '--max-time', '20', '--noproxy', '*'];
  return program('curl', [...direct, '--connect-to', `${name}:${port}:127.0.0.1:${port}`, ...args]);
}

async function answerOf(socket: Socket, visit: Visit): Promise<string> {
  socket.write(request(visit));
  const answer = await text(socket);
  socket.destroy();
  return answer;
}

/** Python's own HTTP client cannot connect elsewhere than to the host of the URL. */
const pythonClient = `
import socket, ssl, sys
port, name, version, trusted = sys.argv[1:]
context = ssl.create_default_context(cafile=trusted)
context.minimum_version = context.maximum_version = ssl.TLSVersion[version]
with socket.create_connection(("127.0.0.1", int(port))) as tcp, context.wrap_socket(tcp, server_hostname=name) as tls:
    tls.sendall(sys.stdin.buffer.read())
    while piece := tls.recv(65536):
        sys.stdout.buffer.write(piece)
`;

export interface BrowserClient extends ClientProgram, AsyncDisposable {
  readonly plain: (visit: Visit) => Promise<string>;
  /** The key exchange of the last visit. */
  readonly group: string | undefined;
}

/**
 * Chromium without a screen; it is started when it is needed first. It trusts no file: a chain with one of these keys is
 * accepted, and no other.
 * @param pins SHA-256 of each SubjectPublicKeyInfo, base64
 */
export function browserClient(pins: readonly string[]): BrowserClient {
  const browsers = new Map<TlsVersion, Promise<Browser>>();
  let group: string | undefined;
  const visit = async ({ port, name, path }: Visit, scheme: string, version: TlsVersion): Promise<string> => {
    const started = browsers.get(version) ?? launch(version, pins);
    browsers.set(version, started);
    // A profile of its own, whose connections go with it.
    const profile = await (await started).newContext();
    try {
      const tab = await profile.newPage();
      const inspector = await profile.newCDPSession(tab);
      await inspector.send('Network.enable');
      inspector.once('Network.responseReceived', ({ response: { securityDetails } }) => {
        group = securityDetails?.keyExchangeGroup;
      });
      const response = await tab.goto(`${scheme}://${name}:${port}${path}`, { timeout: 20_000 });
      return (await response?.text()) ?? '';
    } catch (error) {
      return String(error);
    } finally {
      await profile.close();
    }
  };
  return {
    tls: async (where) => visit(where, 'https', where.version),
    plain: async (where) => visit(where, 'http', '1.3'),
    get group() {
      return group;
    },
    async [Symbol.asyncDispose]() {
      for (const browser of browsers.values()) await (await browser).close();
    },
  };
}

async function launch(version: TlsVersion, pins: readonly string[]): Promise<Browser> {
  return chromium.launch({
    executablePath: process.env['CHROMIUM'] ?? '/usr/bin/chromium',
    args: [
      '--no-sandbox',
      '--disable-gpu',
      '--no-proxy-server',
      '--host-resolver-rules=MAP *.test 127.0.0.1',
      `--ignore-certificate-errors-spki-list=${pins.join(',')}`,
      version === '1.2' ? '--ssl-version-max=tls1.2' : '--ssl-version-min=tls1.3',
    ],
  });
}
