/**
 * Owns: what an upstream learns of the client by the PROXY protocol, in versions 1 and 2.
 * Must not know: keygate's writer; the parser here was written from the document.
 * Runs: in a test process, against one keygate with SoftHSM; HAProxy judges as well.
 */
import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { existsSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { text } from 'node:stream/consumers';
import { after, before, describe, it } from 'node:test';
import type { TLSSocket } from 'node:tls';
import { startKeygate } from '../support/keygate.ts';
import type { Keygate } from '../support/keygate.ts';
import { provisionedToken } from '../support/provisioned-token.ts';
import type { ProvisionedToken } from '../support/provisioned-token.ts';
import { proxySslTlv, proxyTlv } from '../support/proxy-header.ts';
import type { ProxyHeader } from '../support/proxy-header.ts';
import { assertEchoes, program, tlsClient } from '../support/tls-client.ts';
import type { TlsOptions } from '../support/tls-client.ts';
import { until } from '../support/until.ts';
import { proxyUpstream } from '../support/upstream.ts';
import type { ProxyUpstream } from '../support/upstream.ts';

describe('the PROXY header', { timeout: 60_000 }, () => {
  const fixtures = new AsyncDisposableStack();
  let token: ProvisionedToken;
  let upstream: ProxyUpstream;
  let unixUpstream: ProxyUpstream;
  let keygate: Keygate;

  before(async () => {
    token = fixtures.use(await provisionedToken({ ec: { kind: 'p256', dns: ['www.example.org'] } }));
    upstream = fixtures.use(await proxyUpstream());
    unixUpstream = fixtures.use(await proxyUpstream({ path: join(token.directory, 'proxy.sock') }));
    const haproxy = fixtures.use(await startHaproxy(token.directory));
    keygate = fixtures.use(
      await startKeygate(token, {
        upstreams: {
          v1: { servers: [upstream.address], proxyProtocol: 'v1' },
          v2: { servers: [upstream.address], proxyProtocol: 'v2' },
          unix: { servers: [unixUpstream.address], proxyProtocol: 'v2' },
          haproxyV1: { servers: [haproxy.address], proxyProtocol: 'v1' },
          haproxyV2: { servers: [haproxy.address], proxyProtocol: 'v2' },
        },
        listeners: {
          v1: { upstream: 'v1', bind: ['127.0.0.1:0', '[::1]:0'] },
          v2: { upstream: 'v2', bind: ['127.0.0.1:0', '[::1]:0'], alpn: ['h2', 'http/1.1'] },
          unix: { upstream: 'unix' },
          haproxyV1: { upstream: 'haproxyV1' },
          haproxyV2: { upstream: 'haproxyV2' },
        },
      }),
    );
  });
  after(async () => fixtures.disposeAsync());

  /** The header that the upstream gets of a client, whose bytes come right behind it. */
  async function headerFor(
    options: TlsOptions,
    from: ProxyUpstream = upstream,
  ): Promise<{ header: ProxyHeader; client: Addresses }> {
    const next = from.nextHeader();
    const client = await tlsClient({ servername: 'www.example.org', ...options });
    await assertEchoes(client, 'behind the header');
    const addresses = addressesOf(client);
    client.destroy();
    return { header: await next, client: addresses };
  }

  for (const version of [1, 2] as const) {
    for (const [family, host, index] of [
      ['TCP4', '127.0.0.1', 0],
      ['TCP6', '::1', 1],
    ] as const) {
      it(`of version ${version} tells a client's ${family} address and the one that it connected to`, async () => {
        const { header, client } = await headerFor({ host, port: keygate.port(`v${version}`, index) });
        assert.deepEqual({ version: header.version, family: header.family }, { version, family });
        assert.deepEqual(addressesIn(header), client);
      });
    }
  }

  for (const [version, cipher] of [
    ['TLSv1.2', 'ECDHE-ECDSA-AES256-GCM-SHA384'],
    ['TLSv1.3', 'TLS_AES_256_GCM_SHA384'],
  ] as const) {
    it(`of version 2 tells the name, the protocol, the cipher suite and the version of ${version}, under a checksum`, async () => {
      const ciphers = version === 'TLSv1.2' ? { ciphers: 'ECDHE-ECDSA-AES256-GCM-SHA384' } : {};
      const options = { ALPNProtocols: ['http/1.1'], minVersion: version, maxVersion: version, ...ciphers };
      const { header } = await headerFor({ port: keygate.port('v2'), ...options });
      const words = (tlvs: ReadonlyMap<number, Buffer>, type: number) => tlvs.get(type)?.toString('latin1');
      assert.equal(words(header.tlvs, proxyTlv.authority), 'www.example.org');
      assert.equal(words(header.tlvs, proxyTlv.alpn), 'http/1.1');
      assert.equal(header.ssl?.client, clientSsl, 'TLS, and no certificate of the client');
      assert.notEqual(header.ssl?.verify, 0, 'zero would say that a certificate of the client was verified');
      assert.equal(words(header.ssl?.tlvs ?? new Map(), proxySslTlv.version), version);
      assert.equal(words(header.ssl?.tlvs ?? new Map(), proxySslTlv.cipher), cipher);
      // That it is right the parser has checked.
      assert.ok(header.tlvs.has(proxyTlv.crc32c));
    });
  }

  it('of version 2 leaves out what the client did not say', async () => {
    const { header } = await headerFor({ port: keygate.port('v2'), servername: '' });
    assert.ok(!header.tlvs.has(proxyTlv.authority));
    assert.ok(!header.tlvs.has(proxyTlv.alpn));
  });

  it('of version 2 has an id of its own for each connection', async () => {
    const ids = new Set<string>();
    for (let count = 0; count < 10; count += 1) {
      const { header } = await headerFor({ port: keygate.port('v2') });
      const id = header.tlvs.get(proxyTlv.uniqueId);
      assert.ok(id !== undefined && id.length > 0 && id.length <= 128, 'at most 128 bytes (section 2.2.5)');
      ids.add(id.toString('hex'));
    }
    assert.equal(ids.size, 10);
  });

  it('goes over a unix socket as well', async () => {
    const { header, client } = await headerFor({ port: keygate.port('unix') }, unixUpstream);
    assert.deepEqual(addressesIn(header), client);
  });

  for (const listener of ['haproxyV1', 'haproxyV2']) {
    it(`is understood by HAProxy: ${listener}`, async () => {
      const resolve = ['--resolve', `www.example.org:${keygate.port(listener)}:127.0.0.1`];
      const trust = ['--cacert', token.certificates['ec']?.chain ?? ''];
      const options = ['-sS', '--noproxy', '*', '-w', '\\n%{local_ip} %{local_port}', ...resolve, ...trust];
      const { output } = await program('curl', [...options, `https://www.example.org:${keygate.port(listener)}/`]);
      const [said, source] = output.split('\n');
      assert.equal(said, `${source} ${listener === 'haproxyV2' ? 'www.example.org' : ''}`);
    });
  }
});

/** PP2_CLIENT_SSL (section 2.2.6). */
const clientSsl = 0x01;

interface Addresses {
  readonly source: string | undefined;
  readonly sourcePort: number | undefined;
  readonly destination: string | undefined;
  readonly destinationPort: number | undefined;
}

function addressesIn({ source, sourcePort, destination, destinationPort }: ProxyHeader): Addresses {
  return { source, sourcePort, destination, destinationPort };
}

function addressesOf({ localAddress, localPort, remoteAddress, remotePort }: TLSSocket): Addresses {
  return { source: localAddress, sourcePort: localPort, destination: remoteAddress, destinationPort: remotePort };
}

/** An HAProxy that accepts PROXY headers and answers with what they say. */
async function startHaproxy(directory: string) {
  const file = join(directory, 'haproxy.cfg');
  const socket = join(directory, 'haproxy.sock');
  const answer =
    'http-request return status 200 content-type text/plain lf-string "%[src] %[src_port] %[fc_pp_authority]"';
  const timeouts = ['client', 'server', 'connect'].map((what) => `  timeout ${what} 10s`);
  const lines = ['frontend in', '  mode http', `  bind unix@${socket} accept-proxy`, `  ${answer}`];
  writeFileSync(file, ['defaults', ...timeouts, ...lines, ''].join('\n'));
  const child = spawn('haproxy', ['-db', '-f', file], { stdio: ['ignore', 'ignore', 'pipe'] });
  const said = text(child.stderr);
  const ended = once(child, 'exit');
  await Promise.race([
    until('socket of HAProxy', () => existsSync(socket)),
    ended.then(async () => Promise.reject(new Error(`HAProxy ended: ${await said}`))),
  ]);
  return {
    address: `unix:${socket}`,
    async [Symbol.asyncDispose]() {
      child.kill('SIGTERM');
      await ended;
    },
  };
}
