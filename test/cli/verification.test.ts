/**
 * Owns: what `keygate check` says of how upstream servers' certificates would be verified.
 * Must not know: how they are.
 * Runs: node:test, with nsd and unbound as children.
 */
import assert from 'node:assert/strict';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, describe, it } from 'node:test';
import { examineVerification } from '../../src/cli/verification.ts';
import { parseConfig } from '../../src/config/load.ts';
import { createAuthority } from '../support/authority.ts';
import { signedZones } from '../support/signed-zones.ts';
import type { SignedZones } from '../support/signed-zones.ts';
import { logList, TransparencyLog } from '../support/transparency-log.ts';
import { until } from '../support/until.ts';

describe('keygate check of what verifies servers', { timeout: 60_000 }, () => {
  const directory = mkdtempSync(join(tmpdir(), 'keygate-check-'));
  let zones: SignedZones;
  before(async () => {
    const authority = await createAuthority();
    writeFileSync(join(directory, 'roots.pem'), authority.rootPem);
    writeFileSync(join(directory, 'revoked.pem'), await authority.revoke('12'));
    writeFileSync(join(directory, 'logs.json'), logList([new TransparencyLog('one')]));
    writeFileSync(join(directory, 'wrong'), 'wrong');
    zones = await signedZones();
    zones.publish('secure', [`_443._tcp.www IN TLSA 3 1 1 ${'ab'.repeat(32)}`]);
    await until('record', async () => (await findings({ dane: 'enforce' })).some((line) => line.includes('3 1 1')));
  });
  after(async () => {
    await zones[Symbol.asyncDispose]();
    rmSync(directory, { recursive: true });
  });

  async function findings(tls: object, servers = ['www.secure.test:443'], logs = 'logs.json'): Promise<string[]> {
    const document = {
      tokens: { a: { module: '/m.so', uri: 'pkcs11:token=a', pin: { file: 'pin' } } },
      certificates: { www: { chain: 'www.pem', key: 'pkcs11:object=www' } },
      dns: { resolver: `127.0.0.1:${zones.resolver.address.port}` },
      transparency: { logs, scts: 1, operators: 1 },
      upstreams: { web: { servers, tls: { roots: 'roots.pem', ...tls } } },
      listeners: { https: { bind: ['127.0.0.1:0'], mode: 'encrypt', upstream: 'web' } },
    };
    const config = parseConfig(JSON.stringify(document), join(directory, 'keygate.yaml'));
    const found = await examineVerification(config);
    return found.map(({ severity, subject, message }) => `${severity} ${subject}: ${message}`);
  }

  it('counts what it has read, and shows the records', async () => {
    const all = { crls: ['revoked.pem'], pins: [`sha256/${'A'.repeat(43)}=`], dane: 'enforce', transparency: 'report' };
    assert.deepEqual(await findings(all), [
      'ok upstream web: certificates of servers: 1 trusted roots, 1 revocation lists, 1 pins',
      'ok transparency: 1 logs count',
      'ok upstream web: TLSA _443._tcp.www.secure.test: 3 1 1 abababab...',
    ]);
  });

  it('says of each listener what certificates of clients must be', async () => {
    const clientCertificates = { roots: 'roots.pem', crls: ['revoked.pem'] };
    const config = parseConfig(
      JSON.stringify({
        tokens: { hsm: { module: '/m.so', uri: 'pkcs11:token=t', pin: { file: 'pin' } } },
        certificates: { www: { chain: 'www.pem', key: 'pkcs11:object=www' } },
        policies: { mutual: { clientCertificates: { ...clientCertificates, mode: 'request' } } },
        upstreams: { web: { servers: ['127.0.0.1:1'] } },
        listeners: {
          byPolicy: { bind: ['127.0.0.1:0'], certificates: ['www'], policy: 'mutual', upstream: 'web' },
          own: {
            bind: ['127.0.0.1:0'],
            certificates: ['www'],
            clientCertificates: { ...clientCertificates, allow: { commonNames: ['a', 'b'] } },
            upstream: 'web',
          },
          gone: {
            bind: ['127.0.0.1:0'],
            certificates: ['www'],
            clientCertificates: { roots: 'gone.pem' },
            upstream: 'web',
          },
        },
      }),
      join(directory, 'keygate.yaml'),
    );
    const found = await examineVerification(config);
    const [byPolicy, own, gone] = found.map(({ severity, subject, message }) => `${severity} ${subject}: ${message}`);
    const files = '1 trusted roots, 1 revocation lists';
    assert.equal(
      byPolicy,
      `ok listener byPolicy: certificates of clients are asked for: ${files}, all that they vouch for`,
    );
    assert.equal(own, `ok listener own: certificates of clients are required: ${files}, 2 names that are let in`);
    assert.match(gone ?? '', /^error listener gone: .*gone\.pem.*clientCertificates\.roots.*ENOENT/);
  });

  it('warns where any server would be accepted, or none', async () => {
    const [trust] = await findings({ verify: 'report' });
    assert.match(trust ?? '', /^warning .*any server is accepted, because tls\.verify is report$/);
    for (const [server, said] of [
      ['other.secure.test:443', 'there is no record'],
      ['www.insecure.test:443', 'the answer is insecure'],
    ] as const) {
      const [, tlsa] = await findings({ dane: 'enforce' }, [server]);
      assert.equal(
        tlsa,
        `warning upstream web: TLSA _443._tcp.${server.split(':')[0]}: ${said}: every handshake would be refused`,
      );
    }
  });

  it('names each file that is not what it should be', async () => {
    for (const tls of [{ roots: 'wrong' }, { crls: ['wrong'] }, { crls: ['none.pem'] }]) {
      const [found = ''] = await findings(tls);
      assert.match(found, /^error upstream web: .*(wrong|none\.pem).*unusable certificate file/);
    }
    const found = await findings({ transparency: 'report' }, undefined, 'wrong');
    assert.match(found[1] ?? '', /^error transparency: .*wrong.*something that is not JSON/);
  });
});
