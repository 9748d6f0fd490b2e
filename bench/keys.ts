/**
 * Owns: the private keys and certificates of a run: in files, and the same keys in a SoftHSM token, so that every contender
 * shows the same certificate and computes with the same numbers.
 * Must not know: who uses them.
 * Runs: in the benchmark's process, before anything is measured.
 *
 * A key that was imported is exactly what keygate warns about; it is right here, where the key protects nothing.
 */
import { execFileSync } from 'node:child_process';
import { readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { disposableToken } from '../test/support/softhsm.ts';
import type { DisposableToken } from '../test/support/softhsm.ts';
import { keyKinds } from './scenarios.ts';
import type { KeyKind } from './scenarios.ts';

export interface Keys {
  readonly token: DisposableToken;
  readonly files: Readonly<Record<KeyKind, KeyFiles>>;
  dispose(): void;
}

export interface KeyFiles {
  /** Label of the key in the token. */
  readonly label: string;
  readonly certificate: string;
  readonly privateKey: string;
  /** Certificate and private key in one file, as HAProxy reads them. */
  readonly both: string;
}

/** In a private directory below the system's for temporary files; `dispose` removes it. */
export function makeKeys(): Keys {
  const token = disposableToken({ label: 'keygate-bench' });
  try {
    const files = Object.fromEntries(keyKinds.map((kind) => [kind, makeKeyFiles(token.directory, kind)]));
    keyKinds.forEach((kind, index) => importKey(token, kind, files[kind] as KeyFiles, index + 1));
    return { token, files: files as Keys['files'], dispose: () => token.dispose() };
  } catch (error) {
    token.dispose();
    throw error;
  }
}

/** A new private key and a certificate that it signed itself, for `localhost` and two days. */
export function makeKeyFiles(directory: string, kind: KeyKind): KeyFiles {
  const path = (extension: string) => join(directory, `${kind}.${extension}`);
  const [privateKey, certificate, both] = [path('key'), path('pem'), path('both.pem')];
  run('openssl', ['genpkey', ...algorithms[kind], '-out', privateKey]);
  run('openssl', ['req', '-new', '-x509', '-key', privateKey, '-out', certificate, '-days', '2', ...contents]);
  writeFileSync(both, readFileSync(certificate, 'utf8') + readFileSync(privateKey, 'utf8'), { mode: 0o600 });
  return { label: kind, certificate, privateKey, both };
}

const algorithms: Record<KeyKind, readonly string[]> = {
  p256: ['-algorithm', 'EC', '-pkeyopt', 'ec_paramgen_curve:P-256'],
  rsa2048: ['-algorithm', 'RSA', '-pkeyopt', 'rsa_keygen_bits:2048'],
};

const contents = [
  '-subj',
  '/CN=localhost',
  ...[
    'subjectAltName=DNS:localhost',
    'basicConstraints=critical,CA:FALSE',
    'keyUsage=critical,digitalSignature',
    'extendedKeyUsage=serverAuth',
  ].flatMap((extension) => ['-addext', extension]),
];

function importKey(token: DisposableToken, kind: KeyKind, files: KeyFiles, id: number): void {
  const which = ['--label', kind, '--id', id.toString(16).padStart(2, '0')];
  run('softhsm2-util', ['--import', files.privateKey, '--token', token.label, '--pin', token.pin, ...which], token.env);
}

function run(command: string, args: readonly string[], env: Readonly<Record<string, string>> = {}): void {
  execFileSync(command, args, { env: { ...process.env, ...env }, stdio: ['ignore', 'pipe', 'pipe'] });
}
