/**
 * Owns: what a package of keygate consists of besides keygate: npm packages of the lock file, crates that are linked into the
 * engine, Rust's standard library. For this machine's platform.
 * Must not know: who asks for it.
 * Runs: by scripts/sbom.ts, scripts/licences.ts and their tests. Needs no network.
 *
 * Not `npm sbom --omit dev`: npm 11 leaves out what a development dependency uses too, such as zod.
 */
import { execFileSync } from 'node:child_process';
import { existsSync, globSync, readFileSync } from 'node:fs';
import { homedir } from 'node:os';
import { join } from 'node:path';

export interface Part {
  /** A package URL, https://github.com/package-url/purl-spec: the name of the part in lists. */
  readonly purl: string;
  readonly name: string;
  readonly version: string;
  /** An SPDX expression. */
  readonly licence: string;
  /** Where its files are; undefined when they are not on this machine. */
  readonly directory: string | undefined;
  /** Of the archive that it came in; undefined when it came in none. */
  readonly hash: { readonly algorithm: 'SHA-256' | 'SHA-512'; readonly hex: string } | undefined;
  /** Package URLs of the parts that it uses. */
  readonly uses: readonly string[];
}

interface Parts {
  readonly parts: readonly Part[];
  /** What keygate's TypeScript uses. */
  readonly ofKeygate: readonly string[];
  /** What the engine uses. */
  readonly ofEngine: readonly string[];
}

interface LockedPackage {
  readonly version: string;
  readonly integrity?: string;
  readonly dev?: true;
  readonly optional?: true;
  readonly dependencies?: Readonly<Record<string, string>>;
  readonly optionalDependencies?: Readonly<Record<string, string>>;
}

const root = join(import.meta.dirname, '..');

export function thirdParties(): Parts {
  const npm = npmParts();
  const cargo = cargoParts();
  const byPurl = (left: Part, right: Part) => (left.purl < right.purl ? -1 : 1);
  return {
    parts: [...npm.parts, ...cargo.parts].toSorted(byPurl),
    ofKeygate: npm.direct,
    ofEngine: cargo.direct,
  };
}

function npmParts(): { parts: Part[]; direct: string[] } {
  const lock = JSON.parse(readFileSync(join(root, 'package-lock.json'), 'utf8')) as {
    readonly packages: Readonly<Record<string, LockedPackage>>;
  };
  const isInstalled = (path: string) => existsSync(join(root, path, 'package.json'));
  const purlOf = (path: string) => npmPurl(nameOf(path), lock.packages[path]?.version ?? '');
  /** As Node resolves: beside the user's own modules first, then further up. */
  const resolve = (user: string, name: string): string | undefined => {
    for (let folder = user; ; folder = folder.slice(0, Math.max(0, folder.lastIndexOf('node_modules/') - 1))) {
      const path = folder === '' ? `node_modules/${name}` : `${folder}/node_modules/${name}`;
      if (lock.packages[path] !== undefined) return path;
      if (folder === '') return undefined;
    }
  };
  const usesOf = (user: string): string[] => {
    const { dependencies, optionalDependencies } = lock.packages[user] ?? {};
    return Object.keys({ ...dependencies, ...optionalDependencies }).flatMap((name) => {
      const path = resolve(user, name);
      return path !== undefined && isInstalled(path) ? [purlOf(path)] : [];
    });
  };

  const parts = Object.entries(lock.packages).flatMap(([path, { version, integrity, dev, optional }]): Part[] => {
    if (path === '' || dev === true) return [];
    // Optional ones are for one platform each.
    if (!isInstalled(path) && optional === true) return [];
    const directory = join(root, path);
    const { license = '' } = JSON.parse(readFileSync(join(directory, 'package.json'), 'utf8')) as { license?: string };
    const hex = integrity === undefined ? '' : Buffer.from(integrity.replace(/^sha512-/, ''), 'base64').toString('hex');
    const hash = hex === '' ? undefined : ({ algorithm: 'SHA-512', hex } as const);
    return [{ purl: purlOf(path), name: nameOf(path), version, licence: license, directory, hash, uses: usesOf(path) }];
  });
  return { parts, direct: usesOf('') };
}

function nameOf(path: string): string {
  return path.slice(path.lastIndexOf('node_modules/') + 'node_modules/'.length);
}

function npmPurl(name: string, version: string): string {
  return `pkg:npm/${name.replace('@', '%40')}@${version}`;
}

/** Not `cargo metadata`, which wants the crates of every platform and of tests on the disk. */
function cargoParts(): { parts: Part[]; direct: string[] } {
  const target = `${process.arch === 'arm64' ? 'aarch64' : 'x86_64'}-unknown-linux-gnu`;
  const manifest = join(root, 'src/engine/Cargo.toml');
  // Linked is what is neither for building, nor for tests, nor a macro.
  const linked = ['--edges', 'normal,no-proc-macro', '--target', target];
  const format = ['--prefix', 'depth', '--no-dedupe', '--format', '{p}|{l}'];
  const options = ['--locked', '--offline', '--manifest-path', manifest];
  const tree = execFileSync('cargo', ['tree', ...options, ...linked, ...format], { encoding: 'utf8' });
  const checksums = cargoChecksums();

  const uses = new Map<string, Set<string>>();
  const parts = new Map<string, Part>();
  const path: string[] = [];
  for (const [, depth = '', name = '', version = '', licence = ''] of tree.matchAll(
    /^(\d+)(\S+) v(\S+)[^|\n]*\|(.*)$/gm,
  )) {
    const purl = depth === '0' ? '' : `pkg:cargo/${name}@${version}`;
    path.length = Number(depth);
    const user = path.at(-1);
    if (user !== undefined) uses.set(user, (uses.get(user) ?? new Set()).add(purl));
    path.push(purl);
    if (purl === '') continue;
    const hex = checksums.get(`${name} ${version}`);
    const hash = hex === undefined ? undefined : ({ algorithm: 'SHA-256', hex } as const);
    // Cargo once wrote "either of" as a slash.
    const spdx = licence.replaceAll(/\s*\/\s*/g, ' OR ');
    parts.set(purl, { purl, name, version, licence: spdx, directory: crateDirectory(name, version), hash, uses: [] });
  }
  const std = standardLibrary();
  return {
    parts: [...[...parts.values()].map((part) => ({ ...part, uses: [...(uses.get(part.purl) ?? [])] })), std],
    direct: [...(uses.get('') ?? []), std.purl],
  };
}

function cargoChecksums(): ReadonlyMap<string, string> {
  const lock = readFileSync(join(root, 'src/engine/Cargo.lock'), 'utf8');
  const entries = lock.matchAll(/^name = "(.*)"\nversion = "(.*)"\nsource = .*\nchecksum = "(.*)"$/gm);
  return new Map([...entries].map(([, name, version, checksum = '']) => [`${name} ${version}`, checksum]));
}

function crateDirectory(name: string, version: string): string | undefined {
  const cargoHome = process.env['CARGO_HOME'] ?? join(homedir(), '.cargo');
  return globSync(join(cargoHome, 'registry/src/*', `${name}-${version}`))[0];
}

/** Linked into every Rust program; no lock file knows it. */
function standardLibrary(): Part {
  const version = execFileSync('rustc', ['--version'], { encoding: 'utf8' }).split(' ')[1] ?? '';
  return {
    purl: `pkg:generic/rust-std@${version}`,
    name: 'rust-std',
    version,
    licence: 'MIT OR Apache-2.0',
    directory: undefined,
    hash: undefined,
    uses: [],
  };
}
