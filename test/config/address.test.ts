/**
 * Owns: addresses: what is read, what is refused.
 * Must not know: the configuration.
 * Runs: node:test, in memory.
 */
import assert from 'node:assert/strict';
import { it } from 'node:test';
import * as fc from 'fast-check';
import {
  formatAddress,
  isLocal,
  parseAdminAddress,
  parseBindAddress,
  parseNetwork,
  parseProxyUrl,
  parseServerAddress,
} from '../../src/config/address.ts';

it('servers are IP addresses, DNS names or unix sockets', () => {
  assert.deepEqual(parseServerAddress('10.0.0.1:8080'), { value: { host: '10.0.0.1', port: 8080 } });
  assert.deepEqual(parseServerAddress('[2001:DB8::1]:443'), { value: { host: '2001:db8::1', port: 443 } });
  assert.deepEqual(parseServerAddress('Web.internal:65535'), { value: { host: 'web.internal', port: 65_535 } });
  assert.deepEqual(parseServerAddress('unix:/run/web.sock'), { value: { path: '/run/web.sock' } });
});

it('a proxy is a URL of a host and a port, and a password in it is never shown', () => {
  assert.deepEqual(parseProxyUrl('http://Proxy.internal:3128'), { value: { host: 'proxy.internal', port: 3128 } });
  assert.deepEqual(parseProxyUrl('http://[::1]:80/'), { value: { host: '::1', port: 80 } });
  for (const text of [
    'proxy:3128',
    'http://proxy',
    'https://proxy:443',
    'http://proxy:0',
    'http://proxy:80/path',
    '',
  ]) {
    assert.ok('fault' in parseProxyUrl(text), text);
  }
  for (const text of ['http://user:s3cret@proxy:80', 'socks5://user:s3cret@proxy:80', 'user:s3cret@proxy']) {
    const parsed = parseProxyUrl(text);
    assert.ok('fault' in parsed && parsed.fault.code === 'config_secret', text);
    assert.doesNotMatch(JSON.stringify(parsed), /s3cret/);
  }
});

it('the word original is a server of its own', () => {
  assert.deepEqual(parseServerAddress('original'), { value: { original: true } });
  assert.equal(formatAddress({ original: true }), 'original');
  assert.deepEqual(parseServerAddress('original:80'), { value: { host: 'original', port: 80 } });
});

it('networks come out in canonical form, an address as a network of one', () => {
  for (const [text, value] of [
    ['10.0.0.0/8', '10.0.0.0/8'],
    ['10.0.0.1', '10.0.0.1/32'],
    ['192.0.2.128/25', '192.0.2.128/25'],
    ['0.0.0.0/0', '0.0.0.0/0'],
    ['2001:DB8::/32', '2001:db8::/32'],
    ['2001:db8:0:0::1', '2001:db8::1/128'],
    ['::/0', '::/0'],
    ['::1', '::1/128'],
    ['1:2:3:4:5:6:7:8000/113', '1:2:3:4:5:6:7:8000/113'],
  ] as const) {
    assert.deepEqual(parseNetwork(text), { value }, text);
  }
});

it('what is no network is refused, and what has bits beyond its prefix', () => {
  for (const text of [
    '',
    '10.0.0.0/33',
    '10.0.0.0/08',
    '10.0.0.0/',
    '10.0.0/8',
    '10.0.0.1/8',
    '192.0.2.129/25',
    '0.0.0.1/0',
    '2001:db8::1/64',
    '1:2:3:4:5:6:7:8001/113',
    '::/129',
    'fe80::1%eth0',
    'proxy.example',
    '10.0.0.0/8 ',
  ]) {
    assert.ok('fault' in parseNetwork(text), text);
  }
});

it('an address is in its own network, however long the prefix', () => {
  fc.assert(
    fc.property(fc.ipV6(), fc.integer({ min: 0, max: 128 }), (address, bits) => {
      // One of IPv4 inside is written in another form by everybody.
      fc.pre(!address.includes('.'));
      const whole = parseNetwork(address);
      assert.ok('value' in whole && whole.value.endsWith('/128'), address);
      const parsed = parseNetwork(`${address}/${bits}`);
      if ('value' in parsed) assert.equal(parsed.value, whole.value.replace(/128$/, String(bits)));
    }),
  );
});

it('a server needs a port from 1 to 65535', () => {
  for (const text of [
    '10.0.0.1',
    '10.0.0.1:',
    '10.0.0.1:0',
    '10.0.0.1:65536',
    '10.0.0.1:080',
    '10.0.0.1:-1',
    '10.0.0.1:8o',
  ]) {
    assert.ok('fault' in parseServerAddress(text), text);
  }
});

it('what looks like a broken IPv4 address is no name', () => {
  for (const text of ['10.0.0.256:80', '10.0.0:80', '1:80', '10.0.0.1.:80'])
    assert.ok('fault' in parseServerAddress(text), text);
});

it('IPv6 addresses need brackets and no zone', () => {
  for (const text of ['::1:80', '[::1', '[::1]', '[::g]:80', '[fe80::1%eth0]:80', '[10.0.0.1]:80', '[]:80']) {
    assert.ok('fault' in parseServerAddress(text), text);
  }
});

it('names with labels that DNS does not allow are refused', () => {
  for (const text of [
    '-a:80',
    'a-:80',
    'a..b:80',
    'a b:80',
    'user@a:80',
    'http://a:80',
    `${'a'.repeat(64)}:80`,
    `${'a.'.repeat(130)}a:80`,
  ]) {
    assert.ok('fault' in parseServerAddress(text), text);
  }
});

it('unix sockets need an absolute path of at most 107 bytes', () => {
  const longest = `/${'a'.repeat(106)}`;
  assert.deepEqual(parseServerAddress(`unix:${longest}`), { value: { path: longest } });
  for (const text of [
    `unix:${longest}a`,
    'unix:',
    'unix:web.sock',
    'unix:/',
    'unix:/a\0b',
    `unix:/${'ä'.repeat(54)}`,
  ]) {
    assert.ok('fault' in parseServerAddress(text), text);
  }
});

it('listeners bind IP addresses only, and may let the kernel choose a port', () => {
  assert.deepEqual(parseBindAddress('[::]:0'), { value: { host: '::', port: 0 } });
  for (const text of ['localhost:443', '*:443', ':443', 'unix:/run/a.sock'])
    assert.ok('fault' in parseBindAddress(text), text);
});

it('two spellings of one IPv6 address read as the same', () => {
  assert.deepEqual(parseBindAddress('[0:0:0:0:0:0:0:1]:443'), parseBindAddress('[::1]:443'));
});

it('the admin server listens on an address or a unix socket, not on a name', () => {
  for (const text of ['localhost:9180', 'unix:admin.sock', '9180', '0.0.0.0'])
    assert.ok('fault' in parseAdminAddress(text), text);
});

it('only loopback addresses and unix sockets are local', () => {
  const local = (text: string) => {
    const parsed = parseAdminAddress(text);
    return 'value' in parsed && isLocal(parsed.value);
  };
  for (const text of ['127.0.0.1:9180', '127.1.2.3:0', '[::1]:9180', 'unix:/run/keygate/admin.sock'])
    assert.equal(local(text), true, text);
  for (const text of ['0.0.0.0:9180', '[::]:9180', '10.0.0.1:9180', '[::ffff:127.0.0.1]:9180', '128.0.0.1:1'])
    assert.equal(local(text), false, text);
});

it('what is printed reads back as the same', () => {
  const port = fc.integer({ min: 1, max: 65_535 });
  const written = fc.oneof(
    fc.tuple(fc.ipV4(), port).map(([host, number]) => `${host}:${number}`),
    fc.tuple(fc.ipV6(), port).map(([host, number]) => `[${host}]:${number}`),
    fc.stringMatching(/^unix:\/[a-z.]{1,20}$/),
  );
  fc.assert(
    fc.property(written, (text) => {
      const parsed = parseServerAddress(text);
      assert.ok('value' in parsed, text);
      assert.deepEqual(parseServerAddress(formatAddress(parsed.value)), parsed);
    }),
  );
});

it('arbitrary text is read or refused, never an exception', () => {
  fc.assert(
    fc.property(fc.string({ unit: 'binary' }), (text) => {
      for (const parse of [parseServerAddress, parseBindAddress, parseAdminAddress])
        assert.ok('fault' in parse(text) || 'value' in parse(text));
    }),
  );
});
