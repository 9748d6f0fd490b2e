/**
 * Owns: a keygate that Prometheus watches, and what can happen to it: clients of every kind, and every trouble that a test can
 * make without waiting long.
 * Must not know: dashboards and rules.
 * Runs: in test processes, and for the pictures of the dashboards.
 */
import assert from 'node:assert/strict';
import { once } from 'node:events';
import type { Socket } from 'node:net';
import { join } from 'node:path';
import { connect } from 'node:tls';
import type { SecureVersion } from 'node:tls';
import { FaultModule } from '../support/fault-module.ts';
import { startKeygate } from '../support/keygate.ts';
import type { Keygate, KeygateDocument } from '../support/keygate.ts';
import { startPrometheus } from '../support/prometheus.ts';
import type { Prometheus } from '../support/prometheus.ts';
import { provisionedToken } from '../support/provisioned-token.ts';
import type { ProvisionedToken } from '../support/provisioned-token.ts';
import { answerTo, assertEchoes, refusalOf, restOf, tlsClient } from '../support/tls-client.ts';
import type { TlsOptions } from '../support/tls-client.ts';
import { echoUpstream } from '../support/upstream.ts';
import type { Upstream } from '../support/upstream.ts';

/** PKCS#11 v3.0: what a token says that has forgotten its sessions. */
const sessionHandleInvalid = 0xb3;

export interface SceneOptions {
  readonly workers: number;
  readonly lanes: number;
  /** Of the token in the configuration. */
  readonly queue: { readonly max: number; readonly age: string };
  readonly scrapeMs: number;
}

/** With a token that has an EC and an RSA key, and an upstream of which one server in two is there. */
export async function startScene(options: SceneOptions): Promise<Scene> {
  const disposal = new AsyncDisposableStack();
  try {
    const token = disposal.use(
      await provisionedToken({
        www: { kind: 'p256', dns: ['www.example.org'] },
        legacy: { kind: 'rsa2048', dns: ['www.example.org'] },
        api: { kind: 'p256', dns: ['api.example.org'] },
      }),
    );
    const faults = new FaultModule(token);
    disposal.defer(() => faults.close());
    const upstream = disposal.use(await echoUpstream());
    const gone = await echoUpstream();
    await gone.close();
    const document = documentOf(options, token, faults, upstream, gone.address);
    const keygate = disposal.use(await startKeygate(token, document, { env: faults.env }));
    const prometheus = disposal.use(await startPrometheus(keygate.adminAddress, options.scrapeMs));
    return new Scene(keygate, prometheus, faults, document, disposal.move());
  } catch (error) {
    await disposal.disposeAsync();
    throw error;
  }
}

function documentOf(
  { workers, lanes, queue }: SceneOptions,
  token: ProvisionedToken,
  faults: FaultModule,
  upstream: Upstream,
  gone: string,
): KeygateDocument {
  const hsm = { ...token.settings, module: faults.module, lanes, queue, signDeadline: '1s' };
  return {
    workers,
    tokens: { hsm },
    log: { access: { file: join(token.directory, 'access.log'), sample: 2 } },
    upstreams: {
      web: { servers: [upstream.address, gone] },
      api: { servers: [upstream.address], health: { tcp: '1s' } },
      down: { servers: [gone] },
      secure: { servers: [gone], tls: { roots: join(token.directory, 'www.pem'), name: 'www.example.org' } },
    },
    listeners: {
      known: {
        certificates: ['www'],
        clientCertificates: { mode: 'request', roots: join(token.directory, 'www.pem'), ocsp: {} },
        upstream: 'web',
      },
      https: { certificates: ['www', 'legacy'], upstream: 'web' },
      api: { certificates: ['api'], upstream: 'api', unknownName: 'refuse' },
      broken: { certificates: ['www'], upstream: 'down' },
      narrow: { certificates: ['www'], upstream: 'web', limits: { connections: 1 } },
    },
  };
}

export class Scene {
  readonly keygate: Keygate;
  readonly prometheus: Prometheus;
  readonly faults: FaultModule;
  readonly #document: KeygateDocument;
  readonly #disposal: AsyncDisposableStack;

  constructor(
    keygate: Keygate,
    prometheus: Prometheus,
    faults: FaultModule,
    document: KeygateDocument,
    disposal: AsyncDisposableStack,
  ) {
    [this.keygate, this.prometheus, this.faults] = [keygate, prometheus, faults];
    [this.#document, this.#disposal] = [document, disposal];
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#disposal.disposeAsync();
  }

  /** A full handshake, and so many bytes there and back. What it gives resumes its TLS session. */
  async full({ listener = 'https', version = 'TLSv1.3', bytes = 1000, ...options }: Visit = {}): Promise<Buffer> {
    const client = connect({ host: '127.0.0.1', ...this.#options(listener, version), ...options });
    try {
      const [session] = (await once(client, 'session')) as [Buffer];
      client.on('error', () => {});
      await exchange(client, bytes);
      client.end();
      return session;
    } finally {
      client.destroySoon();
    }
  }

  async resumed(session: Buffer, { listener = 'https', version = 'TLSv1.3', bytes = 1000 }: Visit = {}): Promise<void> {
    const client = await tlsClient({ ...this.#options(listener, version), session });
    assert.ok(client.isSessionReused(), 'the handshake was not resumed');
    await exchange(client, bytes);
    client.end();
    client.destroySoon();
  }

  /** A client that takes no EC certificate. */
  async rsa(): Promise<void> {
    await this.full({ version: 'TLSv1.2', ciphers: 'ECDHE-RSA-AES128-GCM-SHA256' });
  }

  /** http:// on the TLS port. */
  async plainHttp(): Promise<void> {
    await answerTo(this.keygate.port(), Buffer.from('GET / HTTP/1.1\r\nHost: www.example.org\r\n\r\n'));
  }

  /** A name that no certificate of the listener is for. */
  async unknownName(): Promise<void> {
    await refusalOf({ ...this.#options('api', 'TLSv1.3'), servername: 'other.example.org' });
  }

  /** A listener whose upstream has one server, which is not there. */
  async refusedUpstream(): Promise<void> {
    const client = await tlsClient(this.#options('broken', 'TLSv1.3'));
    await restOf(client);
    client.destroy();
  }

  /** More connections than there may be: one for each worker. */
  async overLimit(): Promise<void> {
    const before = await this.keygate.closes();
    const attempts = await Promise.allSettled(
      Array.from({ length: 16 }, () => tlsClient(this.#options('narrow', 'TLSv1.3'))),
    );
    for (const attempt of attempts) if (attempt.status === 'fulfilled') attempt.value.destroySoon();
    await this.keygate.closed('proxy/accept/connection_limit', { before });
  }

  /** More clients at once than lanes and queue take while each signature takes so long. Answers how many were refused. */
  async burst(clients: number, signMs: number): Promise<number> {
    this.faults.delay('C_Sign', signMs);
    const outcomes = await Promise.allSettled(Array.from({ length: clients }, () => this.full()));
    this.faults.delay('C_Sign', 0);
    return outcomes.filter(({ status }) => status === 'rejected').length;
  }

  /** One signature with a bit wrong, and handshakes until one finds out: EC signatures are verified by sample. */
  async wrongSignature(): Promise<void> {
    const before = await this.keygate.closes();
    this.faults.damage();
    // The first signature of a PKCS#11 session is always verified.
    this.faults.fail('C_Sign', sessionHandleInvalid, 1);
    await this.full().catch(() => {});
    this.faults.clear();
    await this.keygate.closed('token/signing/wrong_signature', { before });
  }

  /** The token forgets a PKCS#11 session; the handshake does not fail for it. */
  async repair(): Promise<void> {
    this.faults.fail('C_SignInit', sessionHandleInvalid, 1);
    await this.full();
  }

  async reload(): Promise<void> {
    const { outcome } = await this.keygate.reload(this.#document);
    assert.equal(outcome, 'committed');
  }

  async refusedReload(): Promise<void> {
    const { outcome } = await this.keygate.reload({ ...this.#document, certificates: {} });
    assert.equal(outcome, 'refused');
  }

  #options(listener: string, version: SecureVersion): TlsOptions {
    const servername = listener === 'api' ? 'api.example.org' : 'www.example.org';
    return {
      port: this.keygate.port(listener),
      servername,
      minVersion: version,
      maxVersion: version,
      rejectUnauthorized: false,
    };
  }
}

/** In pieces that a socket of Node buffers. */
async function exchange(client: Socket, bytes: number): Promise<void> {
  for (let sent = 0; sent < bytes; sent += pieceBytes)
    await assertEchoes(client, 'x'.repeat(Math.min(pieceBytes, bytes - sent)));
}

const pieceBytes = 10_000;

interface Visit {
  readonly listener?: string;
  readonly version?: SecureVersion;
  readonly bytes?: number;
  readonly ciphers?: string;
}
