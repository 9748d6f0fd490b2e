/**
 * Owns: that the clients people use get their page through keygate, with EC and RSA keys and both TLS versions.
 * Must not know: what is negotiated in detail (handshake.test.ts).
 * Runs: in a test process, against one keygate with two workers and SoftHSM.
 */
import assert from 'node:assert/strict';
import { after, before, describe, it } from 'node:test';
import { text } from 'node:stream/consumers';
import { chromium } from 'playwright-core';
import { startKeygate } from '../support/keygate.ts';
import type { Keygate } from '../support/keygate.ts';
import { provisionedToken } from '../support/provisioned-token.ts';
import type { ProvisionedToken } from '../support/provisioned-token.ts';
import { program, tlsClient } from '../support/tls-client.ts';
import { httpUpstream } from '../support/upstream.ts';
import type { HttpUpstream } from '../support/upstream.ts';

const page = '<title>keygate</title>served in the clear';

/** Each fetches /NAME from the port, trusts the one certificate, and returns what came, or what it said on failing. */
interface Fetch {
  readonly port: number;
  readonly version: '1.2' | '1.3';
  /** File of the certificate to trust. */
  readonly trusted: string;
  readonly pem: string;
  readonly path: string;
}

const clients: Readonly<Record<string, (fetch: Fetch) => Promise<string>>> = {
  async curl({ port, version, trusted, path }) {
    const range = ['--tlsv1.' + version.slice(2), '--tls-max', version];
    return (
      await program('curl', [
        '-sS',
        '--noproxy',
        '*',
        ...range,
        '--cacert',
        trusted,
        `https://localhost:${port}${path}`,
      ])
    ).output;
  },
  async 'openssl s_client'({ port, version, trusted, path }) {
    const options = [
      '-quiet',
      '-verify_return_error',
      '-verify_hostname',
      'localhost',
      '-servername',
      'localhost',
      '-CAfile',
      trusted,
    ];
    const args = ['s_client', '-connect', `127.0.0.1:${port}`, `-tls${version.replace('.', '_')}`, ...options];
    return (await program('openssl', args, httpRequest(path))).output;
  },
  async 'gnutls-cli'({ port, version, trusted, path }) {
    const options = ['--x509cafile', trusted, '--priority', `NORMAL:-VERS-ALL:+VERS-TLS${version}`];
    return (await program('gnutls-cli', [...options, '-p', String(port), 'localhost'], httpRequest(path))).output;
  },
  async Python({ port, version, trusted, path }) {
    return (
      await program('python3', ['-c', pythonClient, String(port), `TLSv${version.replace('.', '_')}`, trusted, path])
    ).output;
  },
  async Node({ port, version, pem, path }) {
    const protocol = `TLSv${version}` as const;
    const socket = await tlsClient({
      port,
      servername: 'localhost',
      ca: pem,
      minVersion: protocol,
      maxVersion: protocol,
    });
    socket.write(httpRequest(path));
    const answer = await text(socket);
    socket.destroy();
    return answer;
  },
};

const httpRequest = (path: string): string => `GET ${path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n`;

const pythonClient = `
import ssl, sys, urllib.request
port, version, trusted, path = sys.argv[1:]
context = ssl.create_default_context(cafile=trusted)
context.minimum_version = context.maximum_version = ssl.TLSVersion[version]
direct = urllib.request.ProxyHandler({})
opener = urllib.request.build_opener(direct, urllib.request.HTTPSHandler(context=context))
print(opener.open(f"https://localhost:{port}{path}").read().decode())
`;

describe('a client gets its page', { timeout: 60_000 }, () => {
  const fixtures = new AsyncDisposableStack();
  let token: ProvisionedToken;
  let web: HttpUpstream;
  let keygate: Keygate;

  before(async () => {
    token = fixtures.use(await provisionedToken({ ec: { kind: 'p256' }, rsa: { kind: 'rsa2048' } }));
    web = fixtures.use(await httpUpstream(page));
    keygate = fixtures.use(
      await startKeygate(token, {
        workers: 2,
        upstreams: { web: { servers: [web.address] } },
        listeners: { ec: { certificates: ['ec'] }, rsa: { certificates: ['rsa'] } },
      }),
    );
  });
  after(async () => fixtures.disposeAsync());

  for (const [name, fetch] of Object.entries(clients)) {
    for (const certificate of ['ec', 'rsa'] as const) {
      for (const version of ['1.2', '1.3'] as const) {
        it(`with ${name}, an ${certificate.toUpperCase()} key and TLS ${version}`, async () => {
          const path = `/${name.replaceAll(' ', '-')}/${certificate}/${version}`;
          const trusted = token.certificates[certificate]?.chain ?? '';
          const answer = await fetch({
            port: keygate.port(certificate),
            version,
            trusted,
            pem: token.pem(certificate),
            path,
          });
          assert.ok(answer.includes(page), `${name} got ${answer}`);
          assert.equal(web.paths.at(-1), path);
        });
      }
    }
  }

  it('with a headless Chromium, both keys and both TLS versions, by default with a post-quantum key exchange', async () => {
    for (const [version, flag] of [
      ['TLS 1.3', '--ssl-version-min=tls1.3'],
      ['TLS 1.2', '--ssl-version-max=tls1.2'],
    ] as const) {
      const browser = await chromium.launch({
        executablePath: chromiumPath,
        args: ['--no-sandbox', '--disable-gpu', '--no-proxy-server', flag],
      });
      try {
        for (const certificate of ['ec', 'rsa']) {
          const tab = await browser.newPage({ ignoreHTTPSErrors: true });
          const inspector = await tab.context().newCDPSession(tab);
          await inspector.send('Network.enable');
          const group = Promise.withResolvers<string | undefined>();
          inspector.once('Network.responseReceived', ({ response: { securityDetails } }) =>
            group.resolve(securityDetails?.keyExchangeGroup),
          );
          const response = await tab.goto(`https://localhost:${keygate.port(certificate)}/chromium`);
          assert.equal(await tab.title(), 'keygate');
          assert.equal((await response?.securityDetails())?.protocol, version);
          assert.equal(await group.promise, version === 'TLS 1.3' ? 'X25519MLKEM768' : 'X25519');
          await tab.close();
        }
      } finally {
        await browser.close();
      }
    }
  });
});

const chromiumPath = process.env['CHROMIUM'] ?? '/usr/bin/chromium';
