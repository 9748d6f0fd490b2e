/**
 * Owns: what an answer about TLSA records is taken for: by a real validating resolver, and by one that misbehaves.
 * Must not know: what becomes of it.
 * Runs: node:test, with nsd and unbound as children.
 */
import assert from 'node:assert/strict';
import { createSocket } from 'node:dgram';
import { once } from 'node:events';
import { generateKeyPairSync } from 'node:crypto';
import { after, before, describe, it } from 'node:test';
import { decode, encode } from 'dns-packet';
import { lookUpTlsa } from '../../src/worker/dns.ts';
import type { TlsaLookup } from '../../src/worker/dns.ts';
import { createAuthority } from '../support/authority.ts';
import type { Authority } from '../support/authority.ts';
import { signedZones } from '../support/signed-zones.ts';
import type { SignedZones } from '../support/signed-zones.ts';
import { until } from '../support/until.ts';

const data = 'ab'.repeat(32);

describe('an answer about TLSA records', { timeout: 60_000 }, () => {
  let zones: SignedZones;
  let authority: Authority;

  before(async () => {
    authority = await createAuthority();
    const { publicKey, privateKey } = generateKeyPairSync('ec', { namedCurve: 'P-256' });
    const chain = `${await authority.issue(publicKey, { names: ['resolver.test'] })}\n${authority.intermediatePem}\n`;
    const key = privateKey.export({ type: 'pkcs8', format: 'pem' });
    zones = await signedZones({ ttl: 30, certificate: { chain, key } });
    for (const kind of ['secure', 'insecure', 'bogus'] as const) {
      zones.publish(kind, [
        `_443._tcp.www IN TLSA 3 1 1 ${data}`,
        '_443._tcp.alias IN CNAME _443._tcp.www',
        '_443._tcp.outside IN CNAME _443._tcp.www.insecure.test.',
        // Longer than what goes into one datagram.
        ...Array.from({ length: 40 }, (_, index) => `_443._tcp.many IN TLSA 3 1 1 ${String(index + 10).repeat(32)}`),
      ]);
    }
    // What was asked before is remembered for a while; these names are new.
    await until('zones that are served', async () => (await ask('_443._tcp.www.secure.test')).state === 'secure');
    await zones.stopResolver();
    await zones.startResolver();
  });
  after(async () => zones[Symbol.asyncDispose]());

  const ask = async (name: string): Promise<TlsaLookup> => lookUpTlsa(zones.resolver, name);

  it('is secure when DNSSEC vouches for it, with the records and how long they hold', async () => {
    const answer = await ask('_443._tcp.www.secure.test');
    assert.ok(answer.state === 'secure');
    assert.deepEqual(answer.records, [{ usage: 3, selector: 1, matchingType: 1, data: Buffer.from(data, 'hex') }]);
    assert.ok(answer.ttlMs > 0 && answer.ttlMs <= 30_000, String(answer.ttlMs));
  });

  it('is secure also at the end of an alias, whatever the case of the letters', async () => {
    const answer = await ask('_443._TCP.Alias.Secure.test');
    assert.ok(answer.state === 'secure');
    assert.equal(answer.records.length, 1);
  });

  it('is insecure when an alias leads out of the signed zone', async () => {
    assert.deepEqual(await ask('_443._tcp.outside.secure.test'), { state: 'insecure' });
  });

  it('is secure without records when DNSSEC vouches for that: no such record, no such name', async () => {
    for (const name of ['www.secure.test', '_444._tcp.nobody.secure.test']) {
      const answer = await ask(name);
      assert.ok(answer.state === 'secure', name);
      assert.deepEqual(answer.records, []);
      assert.ok(answer.ttlMs > 0 && answer.ttlMs <= 30_000);
    }
  });

  it('is asked for again over TCP when it is too long for UDP', async () => {
    const answer = await ask('_443._tcp.many.secure.test');
    assert.ok(answer.state === 'secure');
    assert.equal(answer.records.length, 40);
  });

  it('is insecure when the zone is not signed', async () => {
    assert.deepEqual(await ask('_443._tcp.www.insecure.test'), { state: 'insecure' });
    assert.deepEqual(await ask('_443._tcp.nobody.insecure.test'), { state: 'insecure' });
  });

  it('is bogus when it was changed after it was signed', async () => {
    assert.deepEqual(await ask('_443._tcp.www.bogus.test'), { state: 'bogus' });
  });

  it('comes over TLS from a resolver of that name, and not from another one', async () => {
    const over = async (name: string, roots: string) =>
      lookUpTlsa(
        { address: { host: '127.0.0.1', port: zones.tlsPort }, tls: { name, roots: [roots] } },
        '_443._tcp.www.secure.test',
      );
    const answer = await over('resolver.test', authority.rootPem);
    assert.ok(answer.state === 'secure');
    assert.equal(answer.records.length, 1);
    const { rootPem: stranger } = await createAuthority();
    for (const [name, roots, why] of [
      ['other.test', authority.rootPem, 'ERR_TLS_CERT_ALTNAME_INVALID'],
      ['resolver.test', stranger, 'SELF_SIGNED_CERT_IN_CHAIN'],
    ] as const) {
      const refused = await over(name, roots);
      assert.ok(refused.state === 'indeterminate');
      if (name === 'other.test') assert.equal(refused.why, why);
    }
  });
});

describe('a resolver that misbehaves', { timeout: 60_000 }, () => {
  const name = '_443._tcp.www.secure.test';

  /** Answers each datagram with what `reply` makes of it. */
  async function against(reply: (query: Buffer) => readonly Buffer[]): Promise<TlsaLookup> {
    const socket = createSocket('udp4').bind(0, '127.0.0.1');
    await once(socket, 'listening');
    socket.on('message', (query, { port }) => {
      for (const answer of reply(query)) socket.send(answer, port);
    });
    try {
      return await lookUpTlsa({ address: { host: '127.0.0.1', port: socket.address().port }, tls: undefined }, name);
    } finally {
      socket.close();
    }
  }

  /** Vouched for, with one record, and what else is given. */
  const answerTo = (query: Buffer, changed: object = {}): Buffer => {
    const { id, questions } = decode(query);
    const record = { usage: 3, selector: 1, matchingType: 1, certificate: Buffer.from(data, 'hex') };
    return encode({
      type: 'response',
      id,
      flags: 1 << 5,
      questions,
      answers: [{ type: 'TLSA', name, ttl: 60, data: record }],
      ...changed,
    });
  };

  it('is known by the test when it behaves', async () => {
    const answer = await against((query) => [answerTo(query)]);
    assert.ok(answer.state === 'secure');
    assert.equal(answer.records.length, 1);
  });

  const wrong: Record<string, (query: Buffer) => Buffer> = {
    'another id': (query) => answerTo(query, { id: decode(query).id === 1 ? 2 : 1 }),
    'another question': (query) => answerTo(query, { questions: [{ type: 'TLSA', name: '_443._tcp.other.test' }] }),
    'another type': (query) => answerTo(query, { questions: [{ type: 'A', name }] }),
    'a question': (query) => answerTo(query, { type: 'query' }),
    'no question': (query) => answerTo(query, { questions: [] }),
    'half a message': (query) => answerTo(query).subarray(0, 20),
    'what is not a message': () => Buffer.from([1]),
  };
  for (const [what, reply] of Object.entries(wrong)) {
    it(`is not heard when it sends ${what}`, async () => {
      const answer = await against((query) => [reply(query), answerTo(query)]);
      assert.ok(answer.state === 'secure', 'the answer behind it counts');
    });
  }

  it('is taken for silent when nothing that it says fits', async () => {
    const answer = await against((query) => Object.values(wrong).map((reply) => reply(query)));
    assert.ok(answer.state === 'indeterminate');
    assert.match(answer.why, /no answer in 3000 ms/);
  });

  it('is not believed about records of another name', async () => {
    const record = { usage: 3, selector: 1, matchingType: 1, certificate: Buffer.from(data, 'hex') };
    const answers = [{ type: 'TLSA' as const, name: '_443._tcp.other.test', ttl: 60, data: record }];
    const answer = await against((query) => [answerTo(query, { answers })]);
    assert.ok(answer.state === 'secure');
    assert.deepEqual(answer.records, []);
  });

  it('says nothing when it refuses, fails, or is not there', async () => {
    const refused = await against((query) => [answerTo(query, { flags: (1 << 5) | 5, answers: [] })]);
    assert.deepEqual(refused, { state: 'indeterminate', why: 'the resolver answered REFUSED' });
    const failed = await against((query) => [answerTo(query, { flags: 2, answers: [] })]);
    assert.deepEqual(failed, { state: 'indeterminate', why: 'the resolver failed (SERVFAIL)' });
    const nobody = await lookUpTlsa({ address: { host: '127.0.0.1', port: 1 }, tls: undefined }, name);
    assert.deepEqual(nobody, { state: 'indeterminate', why: 'ECONNREFUSED' });
  });
});
