/**
 * Owns: which version of keygate this is, and which build of it.
 * Must not know: who asks.
 * Runs: everywhere.
 */
import { createRequire } from 'node:module';

/** dist/build.json, written by scripts/build.ts. */
export interface Build {
  /** Of git; `+changes` when there were files that it does not know. */
  readonly revision: string;
  readonly os: string;
  readonly cpu: string;
  /** Whether the engine has the FIPS 140-3 module. */
  readonly fips: boolean;
}

const require = createRequire(import.meta.url);

// Beside src/ and dist/ alike, so the same path serves both.
export const { version } = require('../package.json') as { readonly version: string };

/** `0.1.0`, or in a package `0.1.0 (00f700bf12cd, linux-x64)`, where it has the module `…, linux-x64, FIPS 140-3)`. */
export function describeVersion(): string {
  const build = readBuild();
  if (build === undefined) return version;
  return `${version} (${build.revision}, ${build.os}-${build.cpu}${build.fips ? ', FIPS 140-3' : ''})`;
}

/** Undefined in a checkout, which is not built. */
export function readBuild(): Build | undefined {
  try {
    return require('./build.json') as Build;
  } catch {
    return undefined;
  }
}
