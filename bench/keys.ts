/**
 * Owns: the private keys and certificates of a run: in files, and the same keys in a SoftHSM token, so that every contender
 * shows the same certificate and computes with the same numbers; and how long that token takes to sign.
 * Must not know: who uses them.
 * Runs: in the benchmark's process, before anything is measured.
 *
 * A key that was imported is exactly what keygate warns about; it is right here, where the key protects nothing.
 */
import { execFileSync } from 'node:child_process';
import { createPrivateKey, createPublicKey, generateKeyPairSync } from 'node:crypto';
import { mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { FaultModule } from '../test/support/fault-module.ts';
import { disposableToken } from '../test/support/softhsm.ts';
import type { DisposableToken } from '../test/support/softhsm.ts';
import { selfSigner } from './certificates.ts';
import { keyKinds } from './scenarios.ts';
import type { KeyKind, Setting } from './scenarios.ts';

export interface Keys {
  readonly token: DisposableToken;
  /** Of every kind; but only those that were asked for exist. */
  readonly files: Readonly<Record<KeyKind, KeyFiles>>;
  /** The same token, slower to sign. */
  access(latencyMs: Setting['tokenLatencyMs']): TokenAccess;
  /** `count` certificates for distinct names, all of the one key; those that exist already are not made again. */
  certificates(kind: KeyKind, count: number): readonly NamedCertificate[];
  dispose(): void;
}

export interface KeyFiles {
  /** Labels of the token that holds the key, and of the key in it. */
  readonly token: string;
  readonly label: string;
  readonly certificate: string;
  /** PKCS #8, PEM. */
  readonly privateKey: string;
  /** Certificate and private key in one file, as HAProxy reads them. */
  readonly both: string;
}

/** What a program needs to sign with the token. */
export interface TokenAccess {
  /** Absolute path of the PKCS#11 module. */
  readonly module: string;
  readonly pin: string;
  readonly pinFile: string;
  readonly env: Readonly<Record<string, string>>;
}

export interface NamedCertificate {
  readonly name: string;
  readonly file: string;
}

/** In a private directory below the system's for temporary files; `dispose` removes it. */
export function makeKeys(kinds: readonly KeyKind[] = keyKinds): Keys {
  const token = disposableToken({ label: usualToken });
  try {
    if (kinds.includes('ed25519')) token.addToken(ed25519Token);
    for (const kind of new Set(kinds)) importKey(token, kind, makeKeyFiles(token.directory, kind));
  } catch (error) {
    token.dispose();
    throw error;
  }
  const files = Object.fromEntries(keyKinds.map((kind) => [kind, keyFilesIn(token.directory, kind)])) as Keys['files'];
  const slowed = new Map<number, FaultModule>();
  const made = new Map<KeyKind, NamedCertificate[]>();
  return {
    token,
    files,
    access(latencyMs) {
      const { pin, pinFile } = token;
      if (latencyMs === 0) return { module: token.module, pin, pinFile, env: token.env };
      const faults = slowed.get(latencyMs) ?? new FaultModule(token);
      slowed.set(latencyMs, faults);
      faults.delay('C_Sign', latencyMs);
      return { module: faults.module, pin, pinFile, env: faults.env };
    },
    certificates(kind, count) {
      const known = made.get(kind) ?? [];
      made.set(kind, known);
      if (known.length < count) known.push(...makeCertificates(token.directory, kind, known.length, count));
      return known.slice(0, count);
    },
    dispose() {
      for (const faults of slowed.values()) faults.close();
      token.dispose();
    },
  };
}

/** A new private key and a certificate that it signed itself, for `localhost`. */
export function makeKeyFiles(directory: string, kind: KeyKind): KeyFiles {
  const files = keyFilesIn(directory, kind);
  const { privateKey, publicKey } = generators[kind]();
  const keyPem = privateKey.export({ format: 'pem', type: 'pkcs8' });
  const certificatePem = selfSigner(privateKey, publicKey).pem('localhost');
  writeFileSync(files.privateKey, keyPem, { mode: 0o600 });
  writeFileSync(files.certificate, certificatePem);
  writeFileSync(files.both, certificatePem + keyPem, { mode: 0o600 });
  return files;
}

function keyFilesIn(directory: string, kind: KeyKind): KeyFiles {
  const path = (extension: string) => join(directory, `${kind}.${extension}`);
  const inToken = { token: tokenOf(kind), label: kind };
  return { ...inToken, certificate: path('pem'), privateKey: path('key'), both: path('both.pem') };
}

/** libp11 0.4.12 finds no key at all in a token with an Ed25519 key. */
function tokenOf(kind: KeyKind): string {
  return kind === 'ed25519' ? ed25519Token : usualToken;
}

const usualToken = 'keygate-bench';
const ed25519Token = 'keygate-bench-ed25519';

const generators = {
  p256: () => generateKeyPairSync('ec', { namedCurve: 'P-256' }),
  p384: () => generateKeyPairSync('ec', { namedCurve: 'P-384' }),
  rsa2048: () => generateKeyPairSync('rsa', { modulusLength: 2048 }),
  rsa3072: () => generateKeyPairSync('rsa', { modulusLength: 3072 }),
  ed25519: () => generateKeyPairSync('ed25519'),
} as const satisfies Record<KeyKind, unknown>;

function importKey(token: DisposableToken, kind: KeyKind, files: KeyFiles): void {
  const id = (keyKinds.indexOf(kind) + 1).toString(16).padStart(2, '0');
  const args = ['--import', files.privateKey, '--token', files.token, '--pin', token.pin, '--label', kind, '--id', id];
  execFileSync('softhsm2-util', args, { env: { ...process.env, ...token.env }, stdio: ['ignore', 'pipe', 'pipe'] });
}

function makeCertificates(directory: string, kind: KeyKind, from: number, to: number): NamedCertificate[] {
  const privateKey = createPrivateKey(readFileSync(keyFilesIn(directory, kind).privateKey));
  const signer = selfSigner(privateKey, createPublicKey(privateKey));
  const own = join(directory, `${kind}-certificates`);
  mkdirSync(own, { recursive: true });
  return Array.from({ length: to - from }, (_, index) => {
    const name = `n${from + index}.bench.test`;
    const file = join(own, `${name}.pem`);
    writeFileSync(file, signer.pem(name));
    return { name, file };
  });
}
