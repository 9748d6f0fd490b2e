/**
 * Owns: the table of error codes: each is used, each has a place in the README, each class has its exit code.
 * Must not know: who throws them.
 * Runs: node:test; reads the sources.
 */
import assert from 'node:assert/strict';
import { globSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { it } from 'node:test';
import {
  ConfigError,
  errorCodes,
  formatProblem,
  KeygateError,
  ServiceError,
  TokenError,
  UsageError,
} from '../src/errors.ts';

const root = join(import.meta.dirname, '..');
const problem = {
  file: '/k.yaml',
  line: 5,
  column: 7,
  path: 'workers',
  code: 'config_value',
  found: '0',
  expected: 'at least 1',
} as const;

it('each class has the exit code that sysexits.h gives it', () => {
  assert.equal(new UsageError('x').exitCode, 64);
  assert.equal(new TokenError('token_not_found', 'x').exitCode, 69);
  assert.equal(new TokenError('token_login', 'x').exitCode, 77);
  assert.equal(new ServiceError('bind_failed', 'x').exitCode, 1);
  assert.equal(new ServiceError('engine_missing', 'x', { unavailable: true }).exitCode, 69);
  assert.equal(new ConfigError([problem]).exitCode, 78);
});

it('an error of any class has its name, its code, its hint and its cause', () => {
  const cause = new Error('cause');
  const error = new TokenError('token_login', 'refused', { token: 'a', ckr: 'CKR_PIN_INCORRECT', hint: 'try', cause });
  assert.ok(error instanceof KeygateError && error instanceof Error);
  assert.deepEqual(
    [error.name, error.code, error.message, error.hint, error.cause, error.token, error.ckr],
    ['TokenError', 'token_login', 'refused', 'try', cause, 'a', 'CKR_PIN_INCORRECT'],
  );
});

it('a ConfigError carries every problem, and its message is all of them', () => {
  const error = new ConfigError([problem, { ...problem, line: 6 }]);
  assert.equal(error.problems.length, 2);
  assert.equal(error.code, 'config_value');
  assert.deepEqual(
    error.message.split('\n').map((line) => line.slice(0, 12)),
    ['/k.yaml:5:7 ', '/k.yaml:6:7 '],
  );
});

it('a problem of a whole file reads without position and path', () => {
  assert.equal(
    formatProblem({
      file: '/k.yaml',
      path: '',
      code: 'config_unreadable',
      found: 'ENOENT',
      expected: 'a file',
      hint: 'make it',
    }),
    '/k.yaml: the file cannot be read: found ENOENT, expected a file; make it',
  );
});

it('every code in the table is used by the code', () => {
  const sources = globSync('src/**/*.ts', { cwd: root }).filter((file) => file !== 'src/errors.ts');
  const text = sources.map((file) => readFileSync(join(root, file), 'utf8')).join('\n');
  const unused = Object.keys(errorCodes).filter((code) => !text.includes(`'${code}'`) && code !== 'usage');
  assert.deepEqual(unused, []);
});
