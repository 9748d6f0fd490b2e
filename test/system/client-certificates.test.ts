/**
 * Owns: which clients a listener lets in by their certificates, each refusal with its reason; routes by client; what the
 * upstream and the access log are told of who it is; resumed sessions, over a reload too.
 * Must not know: how.
 * Runs: against real `keygate serve` processes on SoftHSM, with Node, OpenSSL and curl as clients.
 */
import assert from 'node:assert/strict';
import { createHash, generateKeyPairSync, X509Certificate } from 'node:crypto';
import type { KeyObject } from 'node:crypto';
import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { after, before, describe, it } from 'node:test';
import { connect } from 'node:tls';
import { createAuthority, daysFromNow } from '../support/authority.ts';
import type { Authority, LeafOptions } from '../support/authority.ts';
import { startKeygate } from '../support/keygate.ts';
import type { Keygate } from '../support/keygate.ts';
import { proxySslTlv, proxyTlv } from '../support/proxy-header.ts';
import { ocspAuthority, responderAddress } from '../support/ocsp-authority.ts';
import type { OcspAuthority, ResponderAddress, Signer } from '../support/ocsp-authority.ts';
import { provisionedToken } from '../support/provisioned-token.ts';
import type { ProvisionedToken } from '../support/provisioned-token.ts';
import { program } from '../support/tls-client.ts';
import { until } from '../support/until.ts';
import { httpUpstream, proxyUpstream } from '../support/upstream.ts';
import type { HttpUpstream } from '../support/upstream.ts';

/** ExtendedKeyUsage, RFC 5280 4.2.1.12. */
const clientAuth = '1.3.6.1.5.5.7.3.2';
const serverAuth = '1.3.6.1.5.5.7.3.1';
const spiffeId = 'spiffe://example.org/ns/prod/sa/billing';

interface Client {
  readonly cert: string;
  readonly key: string | Buffer;
  readonly leaf: X509Certificate;
}

describe('client certificates', { timeout: 110_000 }, () => {
  const fixtures = new AsyncDisposableStack();
  let token: ProvisionedToken;
  let authority: Authority;
  let roots: string;
  let anybody: HttpUpstream;
  let billing: HttpUpstream;
  let good: Client;

  before(async () => {
    token = fixtures.use(await provisionedToken({ p256: { kind: 'p256' } }));
    anybody = fixtures.use(await httpUpstream('anybody'));
    billing = fixtures.use(await httpUpstream('billing'));
    authority = await createAuthority();
    roots = join(token.directory, 'client-roots.pem');
    writeFileSync(roots, authority.rootPem);
    good = await client();
  });
  after(async () => fixtures.disposeAsync());

  /** One of the authority, with all kinds of names, unless told otherwise. */
  async function client(options: LeafOptions = {}, by = authority, keys = ecKeys()): Promise<Client> {
    const leaf = await by.issue(keys.publicKey, {
      commonName: 'Billing',
      names: ['billing.clients.test'],
      uris: [spiffeId],
      emails: ['billing@example.org'],
      purpose: clientAuth,
      ...options,
    });
    const key = keys.privateKey.export({ type: 'pkcs8', format: 'pem' });
    return { cert: `${leaf}\n${by.intermediatePem}`, key, leaf: new X509Certificate(leaf) };
  }

  async function started(clientCertificates: object, document: object = {}, listener: object = {}): Promise<Keygate> {
    return startKeygate(token, {
      drainDeadline: '0s',
      upstreams: { web: { servers: [anybody.address] }, billing: { servers: [billing.address] } },
      listeners: { https: { clientCertificates: { roots, ...clientCertificates }, ...listener } },
      ...document,
    });
  }

  /** A request on a connection of its own: what the upstream said, or what became of the handshake. */
  async function asked(keygate: Keygate, options: object = {}): Promise<Asked> {
    const where = { port: 'port' in options ? undefined : keygate.port(), host: '127.0.0.1' };
    const socket = connect({ ...where, rejectUnauthorized: false, ...options });
    let [said, refusal, isReused]: [string, string, boolean] = ['', '', false];
    let session: Buffer | undefined;
    socket.on('session', (ticket: Buffer) => (session = ticket));
    socket.on('secureConnect', () => (isReused = socket.isSessionReused()));
    socket.on('data', (chunk: Buffer) => (said += chunk.toString('latin1')));
    socket.on('error', ({ message }) => (refusal = message));
    socket.write('GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n');
    const closed = Promise.withResolvers<void>();
    socket.on('close', () => closed.resolve());
    await closed.promise;
    return { body: said.split('\r\n\r\n')[1] ?? '', refusal, session, isReused };
  }

  const versions = [
    ['1.2', { maxVersion: 'TLSv1.2' }],
    ['1.3', { minVersion: 'TLSv1.3' }],
  ] as const;

  for (const [version, options] of versions) {
    it(`TLS ${version}: a client with a certificate of the authority is served, with EC and with RSA keys`, async () => {
      await using keygate = await started({});
      const rsa = await client({}, authority, generateKeyPairSync('rsa', { modulusLength: 2048 }));
      for (const { cert, key } of [good, rsa])
        assert.equal((await asked(keygate, { cert, key, ...options })).body, 'anybody');
    });

    it(`TLS ${version}: each bad certificate is refused for its own reason, with an alert that says so`, async () => {
      await using keygate = await started({ allow: { commonNames: ['Billing'] } });
      const namesake = await createAuthority();
      const stranger = await createAuthority('Stranger');
      const weak = generateKeyPairSync('rsa', { modulusLength: 1024 });
      const table: readonly [string, string, Client | undefined][] = [
        ['certificate_required', 'certificate required', undefined],
        ['certificate_bad_signature', 'decrypt error', await client({}, namesake)],
        ['certificate_unknown_issuer', 'unknown ca', await client({}, stranger)],
        ['certificate_expired', 'certificate expired', await client({ notAfter: daysFromNow(-0.5) })],
        ['certificate_not_yet_valid', 'certificate expired', await client({ notBefore: daysFromNow(1) })],
        ['certificate_wrong_purpose', 'unsupported certificate', await client({ purpose: serverAuth })],
        ['certificate_weak', 'certificate unknown', await client({}, authority, weak)],
        ['certificate_not_allowed', 'access denied', await client({ commonName: 'Shipping' })],
      ];
      for (const [reason, alert, refused] of table) {
        const before = await keygate.closes();
        // Node's own OpenSSL would not use a weak key.
        const own = { cert: refused?.cert, key: refused?.key, ciphers: 'DEFAULT:@SECLEVEL=0' };
        const { body, refusal } = await asked(keygate, { ...own, ...options });
        assert.equal(body, '', reason);
        await keygate.closed(`client/handshake/${reason}`, { before });
        assert.match(refusal, new RegExp(`alert ${alert}:`), reason);
      }
    });

    it(`TLS ${version}: mode request serves those without a certificate, and refuses bad ones`, async () => {
      await using keygate = await started({ mode: 'request' });
      assert.equal((await asked(keygate, options)).body, 'anybody');
      assert.equal((await asked(keygate, { ...own(good), ...options })).body, 'anybody');
      const expired = await client({ notAfter: daysFromNow(-0.5) });
      assert.equal((await asked(keygate, { ...own(expired), ...options })).body, '');
      await keygate.closed('client/handshake/certificate_expired');
    });

    it(`TLS ${version}: a resumed session is who it was, and is refused once a list revokes it`, async () => {
      const crl = join(token.directory, `clients-${version}.crl`);
      writeFileSync(crl, await authority.revoke());
      const routes = [{ clients: { uris: ['spiffe://example.org/ns/prod/*'] }, upstream: 'billing' }];
      await using keygate = await started({ crls: [crl] }, {}, { routes });
      const { body, session } = await asked(keygate, { ...own(good), ...options });
      assert.equal(body, 'billing');
      const resumed = await asked(keygate, { ...own(good), ...options, session });
      assert.deepEqual({ isReused: resumed.isReused, body: resumed.body }, { isReused: true, body: 'billing' });

      writeFileSync(crl, await authority.revoke(good.leaf.serialNumber));
      assert.equal((await keygate.reload()).outcome, 'committed');
      assert.equal((await asked(keygate, { ...own(good), ...options, session })).body, '');
      await keygate.closed('client/handshake/certificate_revoked');
    });
  }

  it('a list that is out of date or of another issuer lets nobody in', async () => {
    const crl = join(token.directory, 'other.crl');
    writeFileSync(crl, await (await createAuthority()).revoke());
    await using keygate = await started({ crls: [crl] });
    assert.equal((await asked(keygate, own(good))).body, '');
    await keygate.closed('client/handshake/certificate_revocation_unknown');
  });

  it('clients are allowed by each kind of name alone', async () => {
    const spki = createHash('sha256').update(good.leaf.publicKey.export({ type: 'spki', format: 'der' }));
    const other = await client({
      commonName: 'Other',
      names: ['other.test'],
      uris: ['spiffe://example.org/ns/test/sa/other'],
      emails: ['other@example.org'],
    });
    const kinds: readonly object[] = [
      { commonNames: ['Billing'] },
      { dnsNames: ['*.clients.test'] },
      { uris: [spiffeId] },
      { uris: ['spiffe://example.org/ns/prod/*'] },
      { emails: ['billing@example.org'] },
      { keys: [`sha256/${spki.digest('base64')}`] },
    ];
    const ports = Object.fromEntries(kinds.map((allow, index) => [`kind${index}`, allow]));
    await using keygate = await started(
      {},
      {
        listeners: Object.fromEntries(
          Object.entries(ports).map(([name, allow]) => [name, { clientCertificates: { roots, allow } }]),
        ),
      },
    );
    for (const name of Object.keys(ports)) {
      const port = keygate.port(name);
      assert.equal((await asked(keygate, { ...own(good), port })).body, 'anybody', name);
      assert.equal((await asked(keygate, { ...own(other), port })).body, '', name);
    }
  });

  it('a session of one listener is not let in at another that would refuse its client', async () => {
    await using keygate = await started(
      {},
      {
        listeners: {
          open: { clientCertificates: undefined },
          https: { clientCertificates: { roots } },
          strict: { clientCertificates: { roots, allow: { commonNames: ['Nobody'] } } },
        },
      },
    );
    const anonymous = await asked(keygate, { port: keygate.port('open') });
    const known = await asked(keygate, { ...own(good), port: keygate.port('https') });
    assert.ok(anonymous.session !== undefined && known.session !== undefined);
    assert.equal((await asked(keygate, { session: anonymous.session, port: keygate.port('https') })).body, '');
    await keygate.closed('client/handshake/certificate_required');
    assert.equal(
      (await asked(keygate, { ...own(good), session: known.session, port: keygate.port('strict') })).body,
      '',
    );
    await keygate.closed('client/handshake/certificate_not_allowed');
  });

  it('routes tell clients apart, and those without a certificate go where nobody is named', async () => {
    const routes = [{ clients: { commonNames: ['Billing'] }, upstream: 'billing' }];
    await using keygate = await started({ mode: 'request' }, {}, { routes });
    assert.equal((await asked(keygate, own(good))).body, 'billing');
    assert.equal((await asked(keygate, own(await client({ commonName: 'Shipping' })))).body, 'anybody');
    assert.equal((await asked(keygate)).body, 'anybody');
  });

  it('a policy has them for all of its listeners, and a listener its own instead', async () => {
    const other = await createAuthority();
    const otherRoots = join(token.directory, 'other-roots.pem');
    writeFileSync(otherRoots, other.rootPem);
    await using keygate = await started(
      {},
      {
        policies: { mutual: { clientCertificates: { roots } } },
        listeners: {
          https: { policy: 'mutual' },
          own: { policy: 'mutual', clientCertificates: { roots: otherRoots } },
        },
      },
    );
    const stranger = await client({}, other);
    const port = keygate.port('own');
    assert.equal((await asked(keygate, { ...own(good), port: keygate.port('https') })).body, 'anybody');
    assert.equal((await asked(keygate, { ...own(stranger), port: keygate.port('https') })).body, '');
    assert.equal((await asked(keygate, { ...own(good), port })).body, '');
    assert.equal((await asked(keygate, { ...own(stranger), port })).body, 'anybody');
  });

  it('clients sign with what the policy has, and one that it is made from says what they need', async () => {
    await using keygate = await started(
      {},
      {
        policies: {
          mutual: { clientCertificates: { roots } },
          strict: { base: 'mutual', signatureSchemes: ['ecdsa_secp256r1_sha256'] },
        },
        listeners: { https: { policy: 'strict' } },
      },
    );
    const rsa = await client({}, authority, generateKeyPairSync('rsa', { modulusLength: 2048 }));
    for (const [, options] of versions) {
      assert.equal((await asked(keygate, { ...own(good), ...options })).body, 'anybody');
      assert.equal((await asked(keygate, { ...own(rsa), ...options })).body, '');
      assert.equal((await asked(keygate, options)).body, '');
    }
  });

  it('the upstream hears by PROXY v2 who the client is, and the access log has it too', async () => {
    await using told = await proxyUpstream();
    const web = { servers: [told.address], proxyProtocol: 'v2' };
    await using keygate = await started(
      { mode: 'request' },
      { upstreams: { web: { ...web, proxyClientCertificate: true } }, log: { access: {} } },
    );
    for (const [options, client, verify, name, uri, certificate] of [
      [own(good), 0x07, 0, 'Billing', spiffeId, good.leaf.raw],
      [{}, 0x01, 1, undefined, undefined, undefined],
    ] as const) {
      const next = told.nextHeader();
      const socket = connect({ port: keygate.port(), host: '127.0.0.1', rejectUnauthorized: false, ...options });
      socket.on('error', () => {});
      socket.write('x');
      const { ssl, tlvs } = await next;
      socket.destroy();
      assert.deepEqual(
        [ssl?.client, ssl?.verify, ssl?.tlvs.get(proxySslTlv.commonName)?.toString()],
        [client, verify, name],
      );
      assert.equal(tlvs.get(proxyTlv.clientUri)?.toString(), uri);
      assert.deepEqual(ssl?.tlvs.get(proxySslTlv.clientCertificate), certificate);
    }
    const clientFingerprint = good.leaf.fingerprint256.replaceAll(':', '').toLowerCase();
    await keygate.logged({ event: 'connection', clientName: spiffeId, clientFingerprint });
  });

  describe('whose status a responder of OpenSSL tells', () => {
    let issuer: OcspAuthority;
    let ocspRoots: string;

    before(() => {
      issuer = ocspAuthority({ after: (cleanup) => fixtures.defer(cleanup as () => Promise<void>) });
      ocspRoots = join(issuer.directory, 'issuer.pem');
    });

    const asking = async (ocsp: object) => started({ roots: ocspRoots, ocsp });
    const statuses = async (keygate: Keygate, outcome: string) =>
      keygate.metric('keygate_client_certificate_statuses_total', { outcome });

    /** A responder behind an address that certificates can name; it has read the database as it is now. */
    const responder = async (signer: Signer, address?: ResponderAddress) => {
      const { port } = await issuer.startResponder({ signer });
      if (address === undefined) return `http://127.0.0.1:${port}/`;
      await address.become({ forwardTo: port });
      return address.url;
    };

    for (const signer of ['issuer', 'delegate'] as const) {
      it(`a certificate names its responder, whose answer is signed by the ${signer} and kept`, async () => {
        const address = await responderAddress('dead');
        fixtures.defer(address.close);
        const [kept, revoked] = [
          issuer.issueWithKey({ responder: address.url }),
          issuer.issueWithKey({ responder: address.url }),
        ];
        issuer.revoke(revoked.cert);
        await responder(signer, address);
        await using keygate = await asking({ mode: 'hard' });
        assert.equal((await asked(keygate, kept)).body, 'anybody');
        assert.equal((await asked(keygate, revoked)).body, '');
        await keygate.closed('client/handshake/certificate_revoked');
        await address.become('dead');
        assert.equal((await asked(keygate, kept)).body, 'anybody');
        assert.deepEqual([await statuses(keygate, 'good'), await statuses(keygate, 'revoked')], [2, 1]);
        assert.deepEqual(address.requests, ['POST / HTTP/1.0', 'POST / HTTP/1.0']);
      });
    }

    it('a certificate that its issuer does not know is refused, one that names nobody is let in by soft and not by hard', async () => {
      const forgotten = issuer.issueWithKey();
      issuer.forget(forgotten.cert);
      const ocsp = { responder: await responder('issuer') };
      await using hard = await asking({ mode: 'hard', ...ocsp });
      await using soft = await asking({ mode: 'soft', ...ocsp });
      for (const keygate of [hard, soft]) {
        assert.equal((await asked(keygate, forgotten)).body, '');
        await keygate.closed('client/handshake/certificate_status_unknown');
        assert.equal(await statuses(keygate, 'unknown'), 1);
      }
      const nobody = { clientCertificates: { roots: ocspRoots, ocsp: {} } };
      const listeners = { soft: nobody, hard: { clientCertificates: { roots: ocspRoots, ocsp: { mode: 'hard' } } } };
      const upstreams = { web: { servers: [anybody.address] } };
      await using alone = await startKeygate(token, { drainDeadline: '0s', upstreams, listeners });
      assert.equal((await asked(alone, { ...forgotten, port: alone.port('soft') })).body, 'anybody');
      assert.equal((await asked(alone, { ...forgotten, port: alone.port('hard') })).body, '');
      assert.equal(await statuses(alone, 'unavailable'), 2);
    });

    it('an answer of somebody else is none: soft lets the client in, hard does not', async () => {
      const client = issuer.issueWithKey();
      const others = ['no-purpose', 'expired', 'stranger', 'strangers-delegate'] as const;
      const upstreams = { web: { servers: [anybody.address] } };
      const listeners: Record<string, object> = {};
      for (const signer of others) {
        const url = await responder(signer);
        for (const mode of ['soft', 'hard'])
          listeners[`${signer}-${mode}`] = { clientCertificates: { roots: ocspRoots, ocsp: { mode, responder: url } } };
      }
      await using keygate = await startKeygate(token, { drainDeadline: '0s', upstreams, listeners });
      for (const signer of others) {
        assert.equal(
          (await asked(keygate, { ...client, port: keygate.port(`${signer}-soft`) })).body,
          'anybody',
          signer,
        );
        assert.equal((await asked(keygate, { ...client, port: keygate.port(`${signer}-hard`) })).body, '', signer);
      }
      await keygate.closed('client/handshake/certificate_status_unknown', { count: others.length });
    });

    it('a silent responder holds up nobody but those whom it is asked about, and these until its timeout', async () => {
      const silent = await responderAddress('silent');
      fixtures.defer(silent.close);
      const ocsp = { responder: silent.url, timeout: '2s' };
      await using keygate = await started({ roots: ocspRoots, mode: 'request', ocsp });
      const waiting = asked(keygate, issuer.issueWithKey());
      await until('question', () => silent.requests.length === 1);
      assert.equal((await asked(keygate)).body, 'anybody');
      assert.equal(await statuses(keygate, 'unavailable'), 0);
      assert.equal((await waiting).body, 'anybody');
      assert.equal(await statuses(keygate, 'unavailable'), 1);
    });
  });

  it('OpenSSL and curl are let in with their certificates and not without', async () => {
    await using keygate = await started({});
    const [cert, key] = [join(token.directory, 'curl.pem'), join(token.directory, 'curl.key')];
    writeFileSync(cert, good.cert);
    writeFileSync(key, good.key);
    const url = `https://127.0.0.1:${keygate.port()}/`;
    const curl = async (...args: string[]) =>
      program('curl', ['--silent', '--insecure', '--max-time', '10', ...args, url]);
    assert.equal((await curl('--cert', cert, '--key', key)).output, 'anybody');
    assert.notEqual((await curl()).exitCode, 0);
    const { output } = await program('openssl', ['s_client', '-connect', `127.0.0.1:${keygate.port()}`, '-tls1_2']);
    assert.match(output, /Acceptable client certificate CA names\nCN ?= ?Test Root/);
  });
});

interface Asked {
  readonly body: string;
  /** The alert, in OpenSSL's words. */
  readonly refusal: string;
  readonly session: Buffer | undefined;
  readonly isReused: boolean;
}

function own({ cert, key }: Client): { readonly cert: string; readonly key: string | Buffer } {
  return { cert, key };
}

function ecKeys(): { readonly publicKey: KeyObject; readonly privateKey: KeyObject } {
  return generateKeyPairSync('ec', { namedCurve: 'P-256' });
}
