/**
 * Owns: SoftHSM tokens that live as long as one test, in a private directory.
 * Must not know: what is tested.
 * Runs: in test processes. SoftHSM reads SOFTHSM2_CONF in C_Initialize, so one process has one token directory at a time.
 */
import { execFileSync } from 'node:child_process';
import { existsSync, mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import type { TestContext } from 'node:test';
import type { OpenToken } from '../../src/pkcs11/keys.ts';
import { closeSession, findToken, login, openModule, openSession } from '../../src/pkcs11/module.ts';
import type { NativeModuleGuard } from '../../src/pkcs11/module.ts';

export interface DisposableToken {
  /** Private to the test; removed with everything in it. */
  readonly directory: string;
  readonly module: string;
  readonly label: string;
  readonly pin: string;
  readonly soPin: string;
  /** File of mode 0600 that holds the PIN. */
  readonly pinFile: string;
  /** For child processes. */
  readonly env: { readonly SOFTHSM2_CONF: string };
  /** Adds another token to the same directory. */
  addToken(label: string, pin?: string): void;
  /** Runs pkcs11-tool logged in to the token. */
  pkcs11Tool(...args: readonly string[]): string;
  dispose(): void;
}

/** Makes an initialised token, unless `empty`; nothing else in the process changes. */
export function disposableToken({ label = 'keygate-test', empty = false } = {}): DisposableToken {
  const directory = mkdtempSync(join(tmpdir(), 'keygate-token-'));
  const conf = join(directory, 'softhsm2.conf');
  const pinFile = join(directory, 'pin');
  mkdirSync(join(directory, 'tokens'), { mode: 0o700 });
  writeFileSync(
    conf,
    `directories.tokendir = ${join(directory, 'tokens')}\nobjectstore.backend = file\nlog.level = ERROR\nslots.removable = false\n`,
  );
  writeFileSync(pinFile, `${userPin}\n`, { mode: 0o600 });
  const env = { SOFTHSM2_CONF: conf };
  const run = (command: string, args: readonly string[]) =>
    execFileSync(command, args, {
      env: { ...process.env, ...env },
      encoding: 'utf8',
      stdio: ['ignore', 'pipe', 'pipe'],
    });
  const token: DisposableToken = {
    directory,
    module: softhsmModule,
    label,
    pin: userPin,
    soPin,
    pinFile,
    env,
    addToken(name, pin = userPin) {
      run('softhsm2-util', ['--init-token', '--free', '--label', name, '--pin', pin, '--so-pin', soPin]);
    },
    pkcs11Tool: (...args) =>
      run('pkcs11-tool', ['--module', softhsmModule, '--token-label', label, '--login', '--pin', userPin, ...args]),
    dispose: () => rmSync(directory, { recursive: true, force: true }),
  };
  if (!empty) token.addToken(label);
  return token;
}

/** A disposable token, and a read-write session of this process that is logged in to it; gone when the test ends. */
export function openDisposableToken(test: TestContext): {
  readonly disposable: DisposableToken;
  readonly open: OpenToken;
} {
  const disposable = disposableToken();
  process.env['SOFTHSM2_CONF'] = disposable.env.SOFTHSM2_CONF;
  const opened = openModule(disposable.module, false, unguarded);
  const token = findToken(opened.module, { token: disposable.label });
  const session = openSession(token, 'read-write');
  test.after(() => {
    closeSession(session);
    opened.close();
    disposable.dispose();
  });
  login(session, token, () => Buffer.from(disposable.pin), unguarded);
  return { disposable, open: { session, token } };
}

/** For processes that have the token directory to themselves: nobody to keep out, and Node's OpenSSL does for SoftHSM. */
export const unguarded: NativeModuleGuard = {
  enter: () => () => {},
  lockLogin: () => () => {},
  presentPin: () => undefined,
  pinAnswered() {},
};

/** Easy to find in any output it leaks to. */
const userPin = '73190264';
const soPin = '58820417';

/** Debian's and Fedora's places. */
const softhsmModule =
  ['/usr/lib/softhsm/libsofthsm2.so', '/usr/lib64/pkcs11/libsofthsm2.so', '/usr/lib64/softhsm/libsofthsm2.so'].find(
    existsSync,
  ) ?? '/usr/lib/softhsm/libsofthsm2.so';
