/**
 * Owns: which OCSP responses are believed.
 * Must not know: where they come from, who gets them.
 * Runs: in one test process, on responses that `openssl ocsp` has made.
 */
import assert from 'node:assert/strict';
import { X509Certificate } from 'node:crypto';
import { describe, it } from 'node:test';
import { before, after } from 'node:test';
import { verifyResponse } from '../../src/ocsp/response.ts';
import type { OcspAnswer, OcspRefusal } from '../../src/ocsp/response.ts';
import { ocspFacts, ocspIssuer, ocspSubject } from '../../src/ocsp/subject.ts';
import { ocspAuthority } from '../support/ocsp-authority.ts';
import type { OcspAuthority, Signer } from '../support/ocsp-authority.ts';

describe('an OCSP response', () => {
  let authority: OcspAuthority;
  let leaf: string;
  const cleanups: (() => void)[] = [];
  before(() => {
    authority = ocspAuthority({ after: (cleanup) => cleanups.push(cleanup as () => void) });
    leaf = authority.issueAny();
  });
  after(() => {
    for (const cleanup of cleanups) cleanup();
  });

  const subjectOf = (certificate: string) =>
    ocspSubject(new X509Certificate(certificate), ocspIssuer(new X509Certificate(authority.certificate)));
  const verified = (
    response: Buffer,
    { now = Date.now(), certificate = leaf, nonce = undefined as Buffer | undefined } = {},
  ) => verifyResponse(response, subjectOf(certificate), nonce, now);

  for (const signer of ['issuer', 'delegate'] as const) {
    it(`of the ${signer} that says good is believed, with its times`, () => {
      const response = authority.respond(leaf, { signer });
      const answer = answerIn(verified(response));
      assert.equal(answer.status, 'good');
      assert.deepEqual(answer.response, response);
      assert.equal(answer.nextUpdate.getTime() - answer.thisUpdate.getTime(), 10 * 60_000);
      assert.ok(Math.abs(answer.thisUpdate.getTime() - Date.now()) < 60_000);
    });
  }

  it('that says revoked is believed, with the time since when', () => {
    const revoked = authority.issueAny();
    authority.revoke(revoked);
    const answer = answerIn(verified(authority.respond(revoked), { certificate: revoked }));
    assert.equal(answer.status, 'revoked');
    assert.ok(Math.abs((answer.revokedAt?.getTime() ?? 0) - Date.now()) < 60_000);
  });

  it('that says unknown is no answer', () => {
    const forgotten = authority.issueAny();
    authority.forget(forgotten);
    const refusal = refusalIn(verified(authority.respond(forgotten), { certificate: forgotten }));
    assert.equal(refusal.outcome, 'unknown');
  });

  const wrongSigners: Readonly<Record<Exclude<Signer, 'issuer' | 'delegate'>, RegExp>> = {
    'no-purpose': /not for OCSP/,
    expired: /not valid now/,
    stranger: /not issued by the issuer/,
    'strangers-delegate': /not issued by the issuer/,
  };
  for (const [signer, reason] of Object.entries(wrongSigners)) {
    it(`signed by ${signer} is refused`, () => {
      const refusal = refusalIn(verified(authority.respond(leaf, { signer: signer as Signer })));
      assert.equal(refusal.outcome, 'invalid');
      assert.match(refusal.reason, reason);
    });
  }

  it('about another certificate is refused', () => {
    const other = authority.issueAny();
    assert.match(refusalIn(verified(authority.respond(other))).reason, /another certificate/);
  });

  it('is believed from five minutes before it holds until the moment it ends, and not outside of that', () => {
    const response = authority.respond(leaf);
    const { thisUpdate, nextUpdate } = answerIn(verified(response));
    const [from, to] = [thisUpdate.getTime(), nextUpdate.getTime()];
    answerIn(verified(response, { now: from - 5 * 60_000 }));
    assert.match(refusalIn(verified(response, { now: from - 5 * 60_000 - 1 })).reason, /future|holds from/);
    answerIn(verified(response, { now: to - 1 }));
    assert.match(refusalIn(verified(response, { now: to })).reason, /held until/);
  });

  it('that does not say until when it holds is refused', () => {
    assert.match(refusalIn(verified(authority.respond(leaf, { validity: [] }))).reason, /nextUpdate/);
  });

  it('without the nonce of the request is refused', () => {
    const refusal = refusalIn(verified(authority.respond(leaf), { nonce: Buffer.alloc(32, 1) }));
    assert.match(refusal.reason, /nonce/);
  });

  it('that says that the responder cannot answer is no answer, with its word', () => {
    // RFC 6960 4.2.1: tryLater.
    assert.deepEqual(verified(Buffer.from('30030a0103', 'hex')), {
      outcome: 'responder_error',
      reason: 'the responder answers tryLater',
    });
  });

  it('with any one bit of it turned over is refused, or says the same', () => {
    const response = authority.respond(leaf, { signer: 'delegate' });
    const { thisUpdate, nextUpdate } = answerIn(verified(response));
    for (let index = 0; index < response.length; index += 1) {
      const torn = Buffer.from(response);
      torn.writeUInt8(torn.readUInt8(index) ^ (1 << (index % 8)), index);
      const found = verified(torn);
      if ('status' in found)
        assert.deepEqual(
          [found.status, found.thisUpdate, found.nextUpdate],
          ['good', thisUpdate, nextUpdate],
          `byte ${index}`,
        );
    }
  });

  it('that is cut short, has something behind it, is too large, or is none at all is refused', () => {
    const response = authority.respond(leaf);
    for (let length = 0; length < response.length; length += 1) {
      assert.equal(refusalIn(verified(response.subarray(0, length))).outcome, 'invalid', `${length} bytes`);
    }
    for (const bytes of [
      Buffer.concat([response, Buffer.of(0)]),
      Buffer.concat([response, response]),
      Buffer.alloc(16 * 1024 + 1, 0x30),
      Buffer.from('<html>not found</html>'),
      Buffer.from('3080', 'hex'),
      Buffer.alloc(4096, 0x30),
    ]) {
      assert.equal(refusalIn(verified(bytes)).outcome, 'invalid', bytes.subarray(0, 8).toString('hex'));
    }
  });

  it('can be asked for from the responders that the certificate names, and must-staple is seen', () => {
    const facts = (options?: Parameters<OcspAuthority['issueAny']>[0]) =>
      ocspFacts(new X509Certificate(authority.issueAny(options)));
    const none = facts();
    assert.deepEqual([none.responders, none.mustStaple], [[], false]);
    const url = 'http://ocsp.example.org/a/b';
    const both = facts({ responder: url, mustStaple: true });
    assert.deepEqual([both.responders.map(({ href }) => href), both.mustStaple], [[url], true]);
    assert.deepEqual(facts({ responder: 'https://ocsp.example.org/' }).responders, []);
  });
});

function answerIn(found: OcspAnswer | OcspRefusal): OcspAnswer {
  assert.ok('status' in found, JSON.stringify(found));
  return found;
}

function refusalIn(found: OcspAnswer | OcspRefusal): OcspRefusal {
  assert.ok('outcome' in found, 'it was believed');
  return found;
}
