/**
 * Owns: which version of keygate this is.
 * Must not know: who asks.
 * Runs: everywhere.
 */
import { createRequire } from 'node:module';

// Beside src/ and dist/ alike, so the same path serves both.
const manifest = createRequire(import.meta.url)('../package.json') as { readonly version: string };

export const { version } = manifest;
