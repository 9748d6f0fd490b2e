/**
 * Owns: that a server with a bad certificate is refused, each with its own close reason, and hears nothing of what the client said; or that
 * this is only counted, where that is what was asked for.
 * Must not know: how certificates are verified (engine/src/verify), how DNS answers change (upstream-verification.test.ts).
 * Runs: against one keygate on SoftHSM with a listener for each certificate, version, mode and verdict; nginx and `openssl s_server` show the
 * certificates, nsd and unbound what DNS says of them.
 */
import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { generateKeyPairSync, X509Certificate } from 'node:crypto';
import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { after, before, describe, it } from 'node:test';
import { lookUpTlsa } from '../../src/worker/dns.ts';
import { createAuthority, daysFromNow } from '../support/authority.ts';
import type { LeafOptions } from '../support/authority.ts';
import { startKeygate } from '../support/keygate.ts';
import type { Keygate } from '../support/keygate.ts';
import { provisionedToken } from '../support/provisioned-token.ts';
import type { ProvisionedToken } from '../support/provisioned-token.ts';
import { signedZones } from '../support/signed-zones.ts';
import type { ZoneKind } from '../support/signed-zones.ts';
import { logList, TransparencyLog } from '../support/transparency-log.ts';
import { until } from '../support/until.ts';
import { webClients } from '../support/web-clients.ts';
import { webServers } from '../support/web-servers.ts';
import type { Identity } from '../support/web-servers.ts';

const logs = ['one', 'two'].map((operator) => new TransparencyLog(operator));
/** Signs with another key than that of the log for which it gives itself out. */
const forger = Object.assign(new TransparencyLog('one'), { id: logs[0]?.id });
const clientAuth = '1.3.6.1.5.5.7.3.2';
const zeros = '00'.repeat(32);

interface Bad {
  readonly reason: string;
  /** In a certificate that is good otherwise; `self-signed` and `stranger`: of another issuer. */
  readonly leaf?: LeafOptions | 'self-signed' | 'stranger';
  readonly keyBits?: number;
  /** Afterwards. */
  readonly isForged?: true;
  /** Settings of the upstream under which it is bad. */
  readonly tls?: object;
  /** In which zone its name is, and which TLSA record there is of it. */
  readonly dane?: { readonly zone: ZoneKind; readonly record?: string };
  /** Nobody can know, or trust, the key with which the server signs the handshake. */
  readonly isRefusedAnyway?: true;
}

const bad: Readonly<Record<string, Bad>> = {
  expired: { leaf: { notBefore: daysFromNow(-20), notAfter: daysFromNow(-1) }, reason: 'expired' },
  'not valid yet': { leaf: { notBefore: daysFromNow(1), notAfter: daysFromNow(20) }, reason: 'not_yet_valid' },
  'for another name': { leaf: { names: ['www.other.test'] }, reason: 'wrong_name' },
  'for no name but a common one': { leaf: { names: [], commonName: 'www.secure.test' }, reason: 'wrong_name' },
  'self-signed': { leaf: 'self-signed', reason: 'self_signed' },
  'of an unknown root': { leaf: 'stranger', reason: 'unknown_issuer' },
  revoked: { leaf: { serial: '1234' }, tls: { crls: ['revoked.pem'] }, reason: 'revoked' },
  'of an issuer without a list': { tls: { crls: ['strangers.pem'] }, reason: 'revocation_unknown' },
  'with a key of 1024 bits': { keyBits: 1024, reason: 'weak_key', isRefusedAnyway: true },
  'signed over SHA-1': { leaf: { hash: 'SHA-1' }, reason: 'weak_signature' },
  'changed after it was signed': { isForged: true, reason: 'bad_signature' },
  'for clients': { leaf: { purpose: clientAuth }, reason: 'wrong_purpose' },
  'of an authority': { leaf: { isAuthority: true }, reason: 'wrong_purpose' },
  'with an unknown critical extension': {
    leaf: { isPuzzling: true },
    reason: 'invalid',
    isRefusedAnyway: true,
  },
  'with another key than a pinned one': {
    tls: { pins: [`sha256/${Buffer.alloc(32).toString('base64')}`] },
    reason: 'pin_mismatch',
  },
  'that no log has seen': { tls: { transparency: 'enforce' }, reason: 'sct_missing' },
  'that logs of one operator have seen': {
    leaf: { logs: logs.slice(1) },
    tls: { transparency: 'enforce' },
    reason: 'sct_insufficient',
  },
  'with the signature of no log': {
    leaf: { logs: [forger] },
    tls: { transparency: 'enforce' },
    reason: 'sct_invalid',
  },
  'with another key than in its TLSA record': {
    dane: { zone: 'secure', record: `3 1 1 ${zeros}` },
    reason: 'tlsa_mismatch',
  },
  'without a TLSA record': { dane: { zone: 'secure' }, reason: 'tlsa_missing' },
  'with a TLSA record in an unsigned zone': {
    dane: { zone: 'insecure', record: `3 1 1 ${zeros}` },
    reason: 'tlsa_insecure',
  },
  'with a forged TLSA record': {
    dane: { zone: 'bogus', record: `3 1 1 ${zeros}` },
    reason: 'tlsa_unavailable',
  },
};

const versions = ['1.2', '1.3'] as const;
const modes = ['encrypt', 'bridge'] as const;
const verdicts = ['enforce', 'report'] as const;

describe('a server whose certificate is', { timeout: 110_000 }, () => {
  const fixtures = new AsyncDisposableStack();
  let token: ProvisionedToken;
  let keygate: Keygate;

  before(async () => {
    token = fixtures.use(await provisionedToken({ p256: { kind: 'p256' } }));
    const zones = fixtures.use(await signedZones());
    const identities = await badIdentities();
    const nginx = fixtures.use(await webServers.nginx.start(token.directory, identities));
    const openssl = fixtures.use(await webServers['openssl s_server'].start(token.directory, identities));
    for (const zone of ['secure', 'insecure', 'bogus'] as const) {
      const records = Object.entries(bad).flatMap(([what, { dane }]) =>
        dane?.zone !== zone || dane.record === undefined
          ? []
          : [`_${openssl.addresses[slug(what)]?.split(':')[1]}._tcp.www IN TLSA ${dane.record}`],
      );
      zones.publish(zone, [...records, `_1._tcp.www IN TLSA 3 1 1 ${zeros}`]);
    }
    await until('zones that are served', async () => {
      const [secure, bogus] = await Promise.all(
        ['secure', 'bogus'].map(async (zone) => lookUpTlsa(zones.resolver, `_1._tcp.www.${zone}.test`)),
      );
      return secure?.state === 'secure' && secure.records.length > 0 && bogus?.state === 'bogus';
    });

    const upstreams: Record<string, object> = {};
    const listeners: Record<string, object> = {};
    for (const [what, { tls = {}, dane }] of Object.entries(bad)) {
      for (const version of versions) {
        for (const mode of modes) {
          for (const verdict of verdicts) {
            const name = nameOf(what, version, mode, verdict);
            // A unix socket has no port that a TLSA record could be for.
            const server = mode === 'bridge' && dane === undefined ? nginx : openssl;
            const settings = { ...tls, ...(dane === undefined ? {} : { dane: 'enforce' }) };
            upstreams[name] = {
              servers: [server.addresses[slug(what)]],
              tls: {
                name: `www.${dane?.zone ?? 'secure'}.test`,
                roots: 'roots.pem',
                policy: `only-${version.replace('.', '-')}`,
                verify: verdict,
                ...(verdict === 'enforce' ? settings : reported(settings)),
              },
            };
            listeners[name] = { mode, upstream: name, certificates: mode === 'bridge' ? ['p256'] : undefined };
          }
        }
      }
    }
    keygate = fixtures.use(
      await startKeygate(token, {
        log: { access: {} },
        dns: { resolver: `127.0.0.1:${zones.resolver.address.port}` },
        transparency: { logs: 'logs.json' },
        policies: Object.fromEntries(
          versions.map((version) => [
            `only-${version.replace('.', '-')}`,
            { minVersion: version, maxVersion: version },
          ]),
        ),
        upstreams,
        listeners,
      }),
    );
  });
  after(async () => fixtures.disposeAsync());

  for (const [what, { reason, isRefusedAnyway = false }] of Object.entries(bad)) {
    it(`${what} is refused with upstream/handshake/${reason}`, async () => {
      for (const version of versions) {
        for (const mode of modes) await assertRefused(nameOf(what, version, mode, 'enforce'), reason);
      }
    });

    it(`${what} is ${isRefusedAnyway ? 'refused' : 'accepted and counted'} where that is only reported`, async () => {
      for (const version of versions) {
        for (const mode of modes) {
          const name = nameOf(what, version, mode, 'report');
          if (isRefusedAnyway) await assertRefused(name, reason);
          else await assertReported(name, version);
        }
      }
    });
  }

  it('bad is counted once for each of them', async () => {
    // A worker's numbers are a moment old.
    const upstreams = await until('the last visit in the numbers', async () => {
      const { engine } = await keygate.status();
      return engine.upstreams.every(({ findings }) => findings.some(isFound)) && engine.upstreams;
    });
    for (const [what, { reason, isRefusedAnyway = false }] of Object.entries(bad)) {
      for (const verdict of verdicts) {
        const names = versions.flatMap((version) => modes.map((mode) => nameOf(what, version, mode, verdict)));
        for (const { name, findings, certificatesAccepted } of upstreams.filter((one) => names.includes(one.name))) {
          const [found, ...others] = findings.filter(isFound);
          assert.deepEqual([found?.reason, others], [reason, []], name);
          assert.equal(found?.refused, verdict === 'enforce' || isRefusedAnyway ? 1 : 0, name);
          // What is refused for its signature may have been accepted before.
          if (!isRefusedAnyway)
            assert.deepEqual([found?.reported, certificatesAccepted], verdict === 'report' ? [1, 1] : [0, 0], name);
          await keygate.logged({ event: 'server_certificate', upstream: name, ...found });
        }
      }
    }
  });

  it('bad is in this table for every reason that there is', async () => {
    const [upstream] = (await keygate.status()).engine.upstreams;
    const reasons = new Set(upstream?.findings.map(({ reason }) => reason));
    assert.ok(reasons.size > 0);
    assert.deepEqual(new Set(Object.values(bad).map(({ reason }) => reason)), reasons);
  });

  async function badIdentities(): Promise<Identity[]> {
    const authority = await createAuthority();
    const stranger = await createAuthority('Stranger');
    write('roots.pem', authority.rootPem);
    write('logs.json', logList(logs));
    write('revoked.pem', await authority.revoke('1234'));
    write('strangers.pem', await stranger.revoke('1234'));
    return Promise.all(
      Object.entries(bad).map(async ([what, { leaf = {}, keyBits, isForged, dane }], index) => {
        const { publicKey, privateKey } =
          keyBits === undefined
            ? generateKeyPairSync('ec', { namedCurve: 'P-256' })
            : generateKeyPairSync('rsa', { modulusLength: keyBits });
        const key = write(`${index}.key`, privateKey.export({ type: 'pkcs8', format: 'pem' }));
        const name = `www.${dane?.zone ?? 'secure'}.test`;
        if (leaf === 'self-signed')
          return { name: slug(what), key, chain: write(`${index}.pem`, selfSigned(key, name)) };
        const issuer = leaf === 'stranger' ? stranger : authority;
        const issued = await issuer.issue(publicKey, { names: [name], ...(leaf === 'stranger' ? {} : leaf) });
        const chain = `${isForged === true ? forged(issued) : issued}\n${issuer.intermediatePem}\n`;
        return { name: slug(what), key, chain: write(`${index}.pem`, chain) };
      }),
    );
  }

  /** Beside the token. */
  function write(file: string, text: string | Buffer): string {
    const path = join(token.directory, file);
    writeFileSync(path, text);
    return path;
  }

  /** Asks for a page by a listener; whichever server there is says what it has seen. */
  async function visit(listener: string) {
    const since = keygate.log.length;
    const where = { port: keygate.port(listener), name: 'localhost', path: '/' };
    const secured = { ...where, version: '1.3', trusted: token.certificates['p256']?.chain ?? '' } as const;
    const { plain, tls } = webClients.Node;
    // A client that gets no answer may see a reset.
    const text = await (listener.includes('encrypt') ? plain?.(where) : tls(secured))?.catch(String);
    const seen = [webServers.nginx, webServers['openssl s_server']].map((server) => server.seen(text ?? ''));
    const line = await keygate.logged({ event: 'connection', listener }, { since });
    return { page: seen.find((one) => one !== undefined), line };
  }

  async function assertRefused(listener: string, reason: string): Promise<void> {
    const { page, line } = await visit(listener);
    assert.equal(page, undefined, listener);
    assert.deepEqual([line['side'], line['phase'], line['reason']], ['upstream', 'handshake', reason], listener);
    assert.equal(line['toUpstreamBytes'], 0, 'a server that is not trusted was told something');
  }

  async function assertReported(listener: string, version: string): Promise<void> {
    const { page, line } = await visit(listener);
    assert.equal(page?.protocol, `TLSv${version}`, listener);
    assert.equal(line['phase'], 'relay', listener);
  }
});

const isFound = ({ refused, reported: counted }: { readonly refused: number; readonly reported: number }): boolean =>
  refused + counted > 0;

const nameOf = (what: string, version: string, mode: string, verdict: string): string =>
  `${mode}-${verdict}-${slug(version)}-${slug(what)}`;

const slug = (text: string): string => text.replaceAll(/[ .]/g, '-');

/** The same settings, which now only count. */
const reported = (settings: object): object =>
  Object.fromEntries(
    Object.entries(settings).map(([key, value]) => [key, value === 'enforce' ? 'report' : (value as unknown)]),
  );

function selfSigned(key: string, name: string): string {
  const subject = ['-subj', '/CN=leaf', '-days', '9', '-addext', `subjectAltName=DNS:${name}`];
  return execFileSync('openssl', ['req', '-x509', '-key', key, ...subject], { encoding: 'utf8' });
}

/** The last byte of a certificate is one of the signature. */
function forged(pem: string): string {
  const der = Buffer.from(new X509Certificate(pem).raw);
  der.writeUInt8(der.readUInt8(der.length - 1) ^ 1, der.length - 1);
  return `-----BEGIN CERTIFICATE-----\n${der.toString('base64')}\n-----END CERTIFICATE-----`;
}
