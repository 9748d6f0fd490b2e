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
  const locked = lockedIn(join(root, 'src/engine/Cargo.lock'));
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

export function hitchVersion(): Versions {
  return { hitch: said('/usr/sbin/hitch', ['--version'], /hitch (\S+)/), openssl: systemOpenSsl() };
}

export function stunnelVersion(): Versions {
  return {
    stunnel: said('/usr/bin/stunnel4', ['-version'], /stunnel (\S+) on/),
    // Both in one line when it runs with the one that it was compiled with.
    openssl: said(
      '/usr/bin/stunnel4',
      ['-version'],
      /Running +with (OpenSSL \S+)/,
      /Compiled\/running with (OpenSSL \S+)/,
    ),
  };
}

/** Node has its OpenSSL linked in. */
export function nodeVersion(): Versions {
  return { node: process.version, openssl: `OpenSSL ${process.versions.openssl}` };
}

/** The load checks signatures and keys with these; they are in no contender's CPU time. */
export function loadVersion(root: string): Versions {
  const locked = lockedIn(join(root, 'bench/load/Cargo.lock'));
  const { devDependencies } = JSON.parse(readFileSync(join(root, 'package.json'), 'utf8')) as {
    devDependencies: Readonly<Record<string, string>>;
  };
  return {
    autocannon: devDependencies['autocannon'] ?? 'unknown',
    rustls: locked('rustls'),
    'aws-lc-rs': locked('aws-lc-rs'),
  };
}

/** Of a program that does not say what it runs with: the library that Debian's packages share. */
function systemOpenSsl(): string {
  return said('openssl', ['version'], /Library: (OpenSSL \S+)/, /OpenSSL \S+/);
}

export function softHsmVersion(): string {
  return said('softhsm2-util', ['--version'], /\S+/);
}

export function pkcs11EngineVersion(): string {
  return said('dpkg-query', ['-W', '-f', '${Version}', 'libengine-pkcs11-openssl'], /\S+/);
}

function lockedIn(cargoLock: string): (crate: string) => string {
  const lock = readFileSync(cargoLock, 'utf8');
  return (crate) => lock.match(new RegExp(`name = "${crate}"\nversion = "([^"]+)"`))?.[1] ?? 'unknown';
}

/** What absolute numbers belong to. */
export function machine(): {
  readonly cpu: string;
  /** Instructions that some of the libraries compute with and others do not. */
  readonly cpuFlags: readonly string[];
  readonly cores: number;
  readonly memoryBytes: number;
  readonly kernel: string;
  readonly loadAverage: readonly number[];
} {
  const cores = cpus();
  return {
    cpu: cores[0]?.model ?? 'unknown',
    cpuFlags: cpuFlags.filter((flag) => new RegExp(`^(flags|Features)\\s*:.*\\b${flag}\\b`, 'm').test(cpuinfo())),
    cores: cores.length,
    memoryBytes: totalmem(),
    kernel: release(),
    loadAverage: loadavg(),
  };
}

/** As /proc/cpuinfo calls them, on x86_64 and aarch64. */
const cpuFlags = [
  'aes',
  'vaes',
  'pclmulqdq',
  'vpclmulqdq',
  'sha_ni',
  'avx2',
  'avx512f',
  'avx512ifma',
  'adx',
  'bmi2',
  'pmull',
  'sha2',
];

function cpuinfo(): string {
  return readFileSync('/proc/cpuinfo', 'utf8');
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
