/**
 * Owns: the examples of configurations that are shipped: each is loaded, and serves.
 * Must not know: what modes do in every case (modes.test.ts).
 * Runs: against a real `keygate serve` with the example as it stands, but for addresses, paths and names of this machine.
 */
import assert from 'node:assert/strict';
import { generateKeyPairSync } from 'node:crypto';
import { once } from 'node:events';
import { readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { connect } from 'node:net';
import type { AddressInfo, Socket } from 'node:net';
import { join } from 'node:path';
import { after, before, describe, it } from 'node:test';
import { createServer } from 'node:tls';
import { parse } from 'yaml';
import { parseConfig } from '../../src/config/load.ts';
import { createAuthority } from '../support/authority.ts';
import { startKeygate } from '../support/keygate.ts';
import type { KeygateDocument } from '../support/keygate.ts';
import { provisionedToken } from '../support/provisioned-token.ts';
import type { ProvisionedToken } from '../support/provisioned-token.ts';
import { tlsClient } from '../support/tls-client.ts';
import type { TlsOptions } from '../support/tls-client.ts';
import { tcpUpstream } from '../support/upstream.ts';
import type { Upstream } from '../support/upstream.ts';

/** ExtendedKeyUsage, RFC 5280 4.2.1.12. */
const clientAuth = '1.3.6.1.5.5.7.3.2';
const directory = join(import.meta.dirname, '../../native-config/examples');
const documentation = readFileSync(join(import.meta.dirname, '../../docs/modes.md'), 'utf8');

/** For each example what a client asks for, and which upstream must answer. */
const expected: Readonly<
  Record<string, readonly { name?: string; alpn?: string[]; client?: string; answer: string }[]>
> = {
  'offload.yaml': [
    { name: 'www.example.org', alpn: ['http/1.1'], answer: 'web' },
    { name: 'api.example.org', alpn: ['h2'], answer: 'api' },
    { name: 'v1.api.example.org', answer: 'api' },
    { name: 'www.example.org', alpn: ['h2'], answer: 'grpc' },
    { name: 'old.example.org', answer: '' },
  ],
  'encrypt.yaml': [{ answer: 'service' }],
  'bridge.yaml': [{ name: 'www.example.org', alpn: ['http/1.1'], answer: 'web' }],
  'client-certificates.yaml': [
    { client: 'spiffe://example.org/ns/prod/sa/billing', answer: 'billing' },
    { client: 'spiffe://example.org/ns/prod/sa/shipping', answer: 'web' },
  ],
  'passthrough.yaml': [
    { name: 'www.example.org', answer: 'web' },
    { name: 'a.mail.example.org', answer: 'mail' },
  ],
};

describe('the examples', { timeout: 100_000 }, () => {
  const fixtures = new AsyncDisposableStack();
  let token: ProvisionedToken;
  let plain: (name: string) => Promise<Upstream>;
  let secure: (name: string) => Promise<string>;
  let roots: string;
  let revoked: string;
  let clientOf: (uri: string) => Promise<Pick<TlsOptions, 'cert' | 'key'>>;

  before(async () => {
    token = fixtures.use(await provisionedToken({ www: { kind: 'p256' }, client: { kind: 'p256' } }));
    const authority = await createAuthority();
    roots = join(token.directory, 'roots.pem');
    writeFileSync(roots, authority.rootPem);
    revoked = join(token.directory, 'revoked.pem');
    writeFileSync(revoked, await authority.revoke());
    clientOf = async (uri) => {
      const { publicKey, privateKey } = generateKeyPairSync('ec', { namedCurve: 'P-256' });
      const leaf = await authority.issue(publicKey, { uris: [uri], purpose: clientAuth });
      const key = privateKey.export({ type: 'pkcs8', format: 'pem' });
      return { cert: `${leaf}\n${authority.intermediatePem}`, key };
    };
    plain = async (name) => fixtures.use(await tcpUpstream((socket) => answer(socket, name)));
    secure = async (name) => {
      const { publicKey, privateKey } = generateKeyPairSync('ec', { namedCurve: 'P-256' });
      const names = ['www.example.org', 'a.mail.example.org', 'service.example.org', 'web.internal.example'];
      const server = createServer(
        {
          cert: `${await authority.issue(publicKey, { names })}\n${authority.intermediatePem}`,
          key: privateKey.export({ type: 'pkcs8', format: 'pem' }),
          ALPNProtocols: ['http/1.1'],
        },
        (socket) => answer(socket, name),
      );
      server.listen(0, '127.0.0.1');
      await once(server, 'listening');
      fixtures.defer(() => {
        server.close();
      });
      return `127.0.0.1:${(server.address() as AddressInfo).port}`;
    };
  });
  after(async () => fixtures.disposeAsync());

  it('are all known here, and shown in docs/modes.md', () => {
    assert.deepEqual(Object.keys(expected).toSorted(), readdirSync(directory).toSorted());
    for (const file of Object.keys(expected)) {
      const text = readFileSync(join(directory, file), 'utf8').trimEnd();
      assert.ok(documentation.includes(`\`\`\`yaml\n${text}\n\`\`\``), `docs/modes.md does not show ${file} as it is`);
    }
  });

  for (const [file, asked] of Object.entries(expected)) {
    it(`${file} loads as it stands, and serves`, async () => {
      const text = readFileSync(join(directory, file), 'utf8');
      parseConfig(text, join(directory, file));
      const keygate = await startKeygate(token, await onThisMachine(parse(text) as KeygateDocument));
      try {
        for (const { name: servername = '', alpn: ALPNProtocols = [], client: uri, answer: wanted } of asked) {
          const own = uri === undefined ? {} : await clientOf(uri);
          const client =
            file === 'encrypt.yaml'
              ? await plainClient(keygate.port('local'))
              : await tlsClient({
                  port: keygate.port(Object.keys(keygate.addresses)[0]),
                  servername,
                  ALPNProtocols,
                  ...own,
                });
          let said = '';
          for await (const chunk of client) said += String(chunk);
          assert.equal(said, wanted, `${servername} ${ALPNProtocols.join(' ')}`);
          client.destroy();
        }
      } finally {
        await keygate.stop();
      }
    });
  }

  /** Free ports, servers that are there, the token and the files of the test; nothing else is changed. */
  async function onThisMachine(example: KeygateDocument): Promise<KeygateDocument> {
    const modes = Object.values(example.listeners as Record<string, { mode?: string }>).map(({ mode }) => mode);
    const upstreams: Record<string, object> = {};
    for (const [name, upstream] of Object.entries(example.upstreams as Record<string, { tls?: object }>)) {
      const isSecure = upstream.tls !== undefined || modes.includes('passthrough');
      const address = isSecure ? await secure(name) : (await plain(name)).address;
      const tls = upstream.tls === undefined ? {} : { tls: { name: 'service.example.org', ...upstream.tls, roots } };
      // The servers of this test do not read a PROXY header.
      upstreams[name] = { ...upstream, servers: [address], proxyProtocol: undefined, ...tls };
    }
    const policies = Object.entries((example['policies'] as Record<string, object> | undefined) ?? {}).map(
      ([name, policy]) => {
        if (!('clientCertificates' in policy)) return [name, policy] as const;
        const clientCertificates = { ...(policy.clientCertificates as object), roots, crls: [revoked] };
        return [name, { ...policy, clientCertificates }] as const;
      },
    );
    const certificates = Object.entries((example['certificates'] as Record<string, object> | undefined) ?? {});
    return {
      ...example,
      policies: Object.fromEntries(policies),
      upstreams,
      listeners: Object.fromEntries(
        Object.entries(example.listeners).map(([name, listener]) => [
          name,
          { certificates: undefined, upstream: undefined, ...listener, bind: ['127.0.0.1:0'] },
        ]),
      ),
      tokens: example['tokens'] === undefined ? {} : { hsm: token.settings },
      certificates: Object.fromEntries(certificates.map(([name]) => [name, token.certificates[name]])),
    };
  }
});

function answer(socket: Socket, name: string): void {
  socket.on('error', () => {});
  socket.resume();
  socket.end(name);
}

async function plainClient(port: number): Promise<Socket> {
  const socket = connect({ port, host: '127.0.0.1' });
  await once(socket, 'connect');
  return socket;
}
