/**
 * Owns: reading PINs: every source, every bound, and that no message holds a PIN.
 * Must not know: tokens.
 * Runs: node:test, with files in a private directory.
 */
import assert from 'node:assert/strict';
import { execFileSync, spawnSync } from 'node:child_process';
import { chmodSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { it, type TestContext } from 'node:test';
import { pinBytesMax, readPin, type PinSource } from '../../src/config/pin.ts';
import { TokenError, type ErrorCode } from '../../src/errors.ts';
import { whyNotNobody } from '../support/nobody.ts';

it('a PIN is what stands in the file, without one newline at its end', (test) => {
  const write = privateFile(test);
  assert.equal(read(write('1234')), '1234');
  assert.equal(read(write('1234\n')), '1234');
  assert.equal(read(write('12 34\n\n')), '12 34\n');
  assert.equal(read(write(' 1234\r\n')), ' 1234\r');
});

it('a PIN of the longest size is read, one byte more is refused', (test) => {
  const write = privateFile(test);
  assert.equal(read(write('1'.repeat(pinBytesMax))).length, pinBytesMax);
  assert.equal(read(write(`${'1'.repeat(pinBytesMax)}\n`)).length, pinBytesMax);
  refuses(write('1'.repeat(pinBytesMax + 1)), 'pin_invalid');
  refuses(write(`${'1'.repeat(pinBytesMax + 1)}\n`), 'pin_invalid');
  refuses(write('1'.repeat(10_000)), 'pin_invalid');
});

it('an empty PIN is refused: some tokens count it as a try', (test) => {
  const write = privateFile(test);
  refuses(write(''), 'pin_invalid');
  refuses(write('\n'), 'pin_invalid');
});

it('a PIN with a zero byte is refused', (test) => refuses(privateFile(test)('12\x0034'), 'pin_invalid'));

it('a file that other users can read, write or run is refused', (test) => {
  for (const mode of [0o604, 0o602, 0o601, 0o644]) refuses(privateFile(test, mode)('98761234'), 'pin_exposed');
  assert.equal(read(privateFile(test, 0o640)('1234')), '1234');
});

it('what is not a regular file is refused and does not block', (test) => {
  const directory = privateDirectory(test);
  const fifo = join(directory, 'fifo');
  execFileSync('mkfifo', ['-m', '600', fifo]);
  refuses({ file: fifo }, 'pin_unavailable');
  refuses({ file: directory }, 'pin_unavailable');
  refuses({ file: join(directory, 'absent') }, 'pin_unavailable');
});

it('a PIN comes from the environment', (test) => {
  environment(test, 'KEYGATE_TEST_PIN', '1234');
  assert.equal(read({ env: 'KEYGATE_TEST_PIN' }), '1234');
  environment(test, 'KEYGATE_TEST_PIN', '');
  refuses({ env: 'KEYGATE_TEST_PIN' }, 'pin_invalid');
  environment(test, 'KEYGATE_TEST_PIN', undefined);
  refuses({ env: 'KEYGATE_TEST_PIN' }, 'pin_unavailable');
});

it('a PIN comes from a systemd credential', (test) => {
  const directory = privateDirectory(test);
  writeFileSync(join(directory, 'hsm-pin'), '1234\n', { mode: 0o400 });
  environment(test, 'CREDENTIALS_DIRECTORY', directory);
  assert.equal(read({ credential: 'hsm-pin' }), '1234');
  refuses({ credential: 'absent' }, 'pin_unavailable');
  environment(test, 'CREDENTIALS_DIRECTORY', undefined);
  refuses({ credential: 'hsm-pin' }, 'pin_unavailable');
});

it('a message begins with the place of the PIN in the configuration', (test) => {
  assert.throws(
    () => readPin(privateFile(test)(''), 'tokens.hsm.pin'),
    /^TokenError: tokens\.hsm\.pin: file .* is empty$/,
  );
});

it('a file that the user may not read is refused with a hint that names the user', { skip: whyNotNobody() }, (test) => {
  const source = privateFile(test)('98761234');
  const script = `
      import { readPin } from ${JSON.stringify(new URL('../../src/config/pin.ts', import.meta.url).href)};
      try { readPin(${JSON.stringify(source)}); } catch ({ code, message, hint }) { console.log(code, message, hint); }
    `;
  const { stdout, stderr } = spawnSync(process.execPath, ['--input-type=module', '--eval', script], {
    encoding: 'utf8',
    uid: Number(execFileSync('id', ['-u', 'nobody'])),
    gid: Number(execFileSync('id', ['-g', 'nobody'])),
  });
  assert.match(stdout, /^pin_unavailable PIN: file .* cannot be read: EACCES user nobody must be allowed/, stderr);
});

function read(source: PinSource): string {
  return readPin(source).toString('utf8');
}

function refuses(source: PinSource, code: ErrorCode): void {
  assert.throws(
    () => readPin(source),
    (error) => {
      assert.ok(error instanceof TokenError);
      assert.equal(error.code, code);
      assert.ok(error.message.includes(Object.values(source).join('')), 'the message names the source');
      assert.doesNotMatch(`${error.message} ${error.hint}`, /9876|1111/, 'the message holds nothing of the PIN');
      return true;
    },
  );
}

function privateFile(test: TestContext, mode = 0o600): (content: string) => PinSource {
  const file = join(privateDirectory(test), 'pin');
  return (content) => {
    writeFileSync(file, content);
    chmodSync(file, mode);
    return { file };
  };
}

function privateDirectory(test: TestContext): string {
  const directory = mkdtempSync(join(tmpdir(), 'keygate-pin-'));
  test.after(() => rmSync(directory, { recursive: true }));
  return directory;
}

function environment(test: TestContext, name: string, value: string | undefined): void {
  const before = process.env[name];
  const set = (text: string | undefined) => {
    if (text === undefined) delete process.env[name];
    else process.env[name] = text;
  };
  set(value);
  test.after(() => set(before));
}
