/**
 * Owns: durations and sizes: what is read, what is refused.
 * Must not know: the configuration.
 * Runs: node:test, in memory.
 */
import assert from 'node:assert/strict';
import { it } from 'node:test';
import * as fc from 'fast-check';
import { formatDuration, formatSize, parseDuration, parseSize } from '../../src/config/units.ts';

it('durations are read to milliseconds', () => {
  const written = { '0ms': 0, '250ms': 250, '5s': 5000, '1m': 60_000, '2h': 7_200_000, '7d': 604_800_000 };
  for (const [text, value] of Object.entries(written)) assert.deepEqual(parseDuration(text), { value }, text);
});

it('sizes are read to bytes', () => {
  const written = { '0B': 0, '512B': 512, '64KiB': 65_536, '1MiB': 1_048_576, '2GiB': 2_147_483_648 };
  for (const [text, value] of Object.entries(written)) assert.deepEqual(parseSize(text), { value }, text);
});

it('whatever is not one whole number and one unit is refused', () => {
  const malformed = [
    '',
    '5',
    's',
    '5 s',
    ' 5s',
    '5s ',
    '-5s',
    '+5s',
    '1.5s',
    '1e3s',
    '05s',
    '5S',
    '5sec',
    '1m30s',
    '5\n',
    '٥s',
    '5constructor',
  ];
  for (const text of malformed) assert.ok('fault' in parseDuration(text), text);
  for (const text of ['64', '64k', '64KB', '64kib', '1TiB', '-1B', '0x10B', '1 KiB'])
    assert.ok('fault' in parseSize(text), text);
});

it('what does not fit a number exactly is refused', () => {
  assert.ok('fault' in parseDuration('999999999999999d'));
  assert.ok('fault' in parseDuration('9'.repeat(400) + 'ms'));
  assert.deepEqual(parseSize('8388607GiB'), { value: 8_388_607 * 1024 ** 3 });
  assert.ok('fault' in parseSize('8388608GiB'));
});

it('what is printed reads back as the same', () => {
  fc.assert(
    fc.property(fc.nat({ max: 10 ** 12 }), (value) => {
      assert.deepEqual(parseDuration(formatDuration(value)), { value });
      assert.deepEqual(parseSize(formatSize(value)), { value });
    }),
  );
});

it('the largest exact unit is printed', () => {
  assert.equal(formatDuration(90_000), '90s');
  assert.equal(formatDuration(3_600_000), '1h');
  assert.equal(formatDuration(0), '0ms');
  assert.equal(formatSize(65_536), '64KiB');
  assert.equal(formatSize(65_537), '65537B');
});

it('arbitrary text is read or refused, never an exception, never a negative or broken number', () => {
  fc.assert(
    fc.property(fc.oneof(fc.string(), fc.stringMatching(/^[0-9]{1,20}[a-zA-Z]{0,4}$/)), (text) => {
      for (const parsed of [parseDuration(text), parseSize(text)])
        assert.ok('fault' in parsed || (Number.isSafeInteger(parsed.value) && parsed.value >= 0));
    }),
  );
});
