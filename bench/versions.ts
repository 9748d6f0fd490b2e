/**
 * Owns: which versions were measured, and on which machine. A number without them means nothing.
 * Must not know: the numbers.
 * Runs: in the benchmark's process, before anything is measured.
 */
import { execFileSync } from 'node:child_process';
import { readFileSync } from 'node:fs';
import { cpus, loadavg, release, totalmem } from 'node:os';
import { join } from 'node:path';

export type Versions = Readonly<Record<string, string>>;

export function keygateVersion(root: string): Versions {
  const { version } = JSON.parse(readFileSync(join(root, 'package.json'), 'utf8')) as { version: string };
  const lock = readFileSync(join(root, 'src/engine/Cargo.lock'), 'utf8');
  const locked = (name: string) => lock.match(new RegExp(`name = "${name}"\nversion = "([^"]+)"`))?.[1] ?? 'unknown';
  return {
    keygate: `${version} (${said('git', ['-C', root, 'describe', '--always', '--dirty'], /.+/)})`,
    node: process.version,
    rustls: locked('rustls'),
    'aws-lc-rs': locked('aws-lc-rs'),
    'aws-lc-sys': locked('aws-lc-sys'),
    tokio: locked('tokio'),
  };
}

export function nginxVersion(): Versions {
  return {
    nginx: said('/usr/sbin/nginx', ['-v'], /nginx\/\S+/),
    openssl: said('/usr/sbin/nginx', ['-V'], /running with (OpenSSL \S+)/, /built with (OpenSSL \S+)/),
  };
}

export function haproxyVersion(): Versions {
  return {
    haproxy: said('/usr/sbin/haproxy', ['-v'], /version (\S+)/),
    openssl: said('/usr/sbin/haproxy', ['-vv'], /Running on OpenSSL version : (OpenSSL \S+)/),
  };
}

export function softHsmVersion(): string {
  return said('softhsm2-util', ['--version'], /\S+/);
}

export function pkcs11EngineVersion(): string {
  return said('dpkg-query', ['-W', '-f', '${Version}', 'libengine-pkcs11-openssl'], /\S+/);
}

/** What absolute numbers belong to. */
export function machine(): {
  readonly cpu: string;
  readonly cores: number;
  readonly memoryBytes: number;
  readonly kernel: string;
  readonly loadAverage: readonly number[];
} {
  const cores = cpus();
  return {
    cpu: cores[0]?.model ?? 'unknown',
    cores: cores.length,
    memoryBytes: totalmem(),
    kernel: release(),
    loadAverage: loadavg(),
  };
}

/** The first pattern that a program's output matches: its group, or all of it. nginx answers on standard error. */
function said(file: string, args: readonly string[], ...patterns: readonly RegExp[]): string {
  let output: string;
  try {
    output = execFileSync('sh', ['-c', 'exec "$0" "$@" 2>&1', file, ...args], { encoding: 'utf8' });
  } catch {
    return 'unknown';
  }
  for (const pattern of patterns) {
    const match = output.match(pattern);
    if (match !== null) return match[1] ?? match[0];
  }
  return 'unknown';
}
