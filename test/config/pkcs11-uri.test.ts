/**
 * Owns: PKCS#11 URIs: what is read, what is refused, and that nothing of a PIN comes out again.
 * Must not know: tokens.
 * Runs: node:test, in memory.
 */
import assert from 'node:assert/strict';
import { it } from 'node:test';
import * as fc from 'fast-check';
import { formatPkcs11Uri, parsePkcs11Uri, type Pkcs11Uri } from '../../src/config/pkcs11-uri.ts';

it('path attributes are read and percent-decoded', () => {
  const text =
    'pkcs11:token=The%20Software%20PKCS%2311%20Softtoken;manufacturer=Snake%20Oil,%20Inc.;model=1.0;serial=01a;object=my-certificate;type=cert;id=%69%95%3E%5C';
  assert.deepEqual(parsePkcs11Uri(text), {
    value: {
      token: 'The Software PKCS#11 Softtoken',
      manufacturer: 'Snake Oil, Inc.',
      model: '1.0',
      serial: '01a',
      object: 'my-certificate',
      type: 'cert',
      id: '69953e5c',
    },
  });
});

it('a URI may name nothing', () => {
  assert.deepEqual(parsePkcs11Uri('pkcs11:'), { value: {} });
});

it('the scheme is not case sensitive, attributes are', () => {
  assert.deepEqual(parsePkcs11Uri('PKCS11:token=a'), { value: { token: 'a' } });
  assert.ok('fault' in parsePkcs11Uri('pkcs11:Token=a'));
});

it('blank padding at the end of a label does not count', () => {
  assert.deepEqual(parsePkcs11Uri('pkcs11:token=a%20%20'), { value: { token: 'a' } });
});

it('an id is binary', () => {
  assert.deepEqual(parsePkcs11Uri('pkcs11:id=%00%FFa'), { value: { id: '00ff61' } });
});

const refused: Record<string, string> = {
  'another scheme': 'file:/a',
  'no scheme': 'token=a',
  'an attribute twice': 'pkcs11:token=a;token=a',
  'an unknown attribute': 'pkcs11:tokn=a',
  'an inherited property as attribute': 'pkcs11:constructor=a',
  'an empty attribute': 'pkcs11:token=a;',
  'an attribute without a value': 'pkcs11:token',
  'an empty value': 'pkcs11:token=',
  'a label of blanks': 'pkcs11:token=%20',
  'a bare blank': 'pkcs11:token=a b',
  'a bare slash': 'pkcs11:token=a/b',
  'a fragment': 'pkcs11:token=a#b',
  'half an escape': 'pkcs11:token=%4',
  'a wrong escape': 'pkcs11:token=%zz',
  'an escape that is not UTF-8': 'pkcs11:token=%ff',
  'a zero byte': 'pkcs11:token=a%00',
  'a label of 33 bytes': `pkcs11:token=${'a'.repeat(33)}`,
  'a serial of 17 bytes': `pkcs11:serial=${'1'.repeat(17)}`,
  'a type that does not exist': 'pkcs11:type=secret',
  'a slot': 'pkcs11:slot-id=0',
  'a library': 'pkcs11:library-version=2',
  'a module': 'pkcs11:token=a?module-path=/lib/a.so',
  'a very long URI': `pkcs11:object=${'%41'.repeat(1000)}`,
};
for (const [what, text] of Object.entries(refused)) {
  it(`${what} is refused`, () => assert.ok('fault' in parsePkcs11Uri(text)));
}

it('labels of exactly 32 bytes and serials of exactly 16 pass', () => {
  assert.ok('value' in parsePkcs11Uri(`pkcs11:token=${'a'.repeat(32)};serial=${'1'.repeat(16)}`));
});

it('a bare special character is answered with its escape', () => {
  const parsed = parsePkcs11Uri('pkcs11:token=a b');
  assert.ok('fault' in parsed);
  assert.match(parsed.fault.hint ?? '', /%20/);
});

it('a PIN in a URI is refused as a secret and does not come out again', () => {
  for (const text of [
    'pkcs11:token=a?pin-value=9876',
    'pkcs11:token=a?x=1&pin-value=9876',
    'pkcs11:token=a?pin-source=|cat%209876',
    'pkcs11:token=a;pin-value=9876',
  ]) {
    const parsed = parsePkcs11Uri(text);
    assert.ok('fault' in parsed, text);
    assert.ok(parsed.fault.found !== undefined, 'something stands in for the URI');
    assert.doesNotMatch(JSON.stringify(parsed), /9876/);
    assert.equal(parsed.fault.code, 'config_secret', text);
  }
});

it('what is printed reads back as the same', () => {
  const label = (max: number) =>
    fc.string({ minLength: 1, maxLength: max, unit: 'grapheme' }).filter((text) => {
      return Buffer.byteLength(text) <= max && !text.includes('\0') && !text.endsWith(' ') && text.isWellFormed();
    });
  const uris = fc.record(
    {
      token: label(32),
      manufacturer: label(32),
      model: label(16),
      serial: label(16),
      object: label(64),
      id: fc.uint8Array({ minLength: 1, maxLength: 64 }).map((bytes) => Buffer.from(bytes).toString('hex')),
      type: fc.constantFrom('public', 'private', 'cert', 'secret-key', 'data'),
    },
    { requiredKeys: [] },
  );
  fc.assert(
    fc.property(uris, (uri) =>
      assert.deepEqual(parsePkcs11Uri(formatPkcs11Uri(uri as Pkcs11Uri)), { value: { ...uri } }),
    ),
  );
});

it('arbitrary text is read or refused, never an exception', () => {
  fc.assert(
    fc.property(fc.string({ unit: 'binary' }), (text) => {
      for (const uri of [text, `pkcs11:${text}`, `pkcs11:token=${text}`])
        assert.ok('fault' in parsePkcs11Uri(uri) || 'value' in parsePkcs11Uri(uri));
    }),
  );
});
