/**
 * Owns: which tokens are SoftHSM's: its module has to write its token directory, also where nothing else may be written.
 * Must not know: where that directory is (worker/sandbox.ts).
 * Runs: everywhere.
 */
import { basename } from 'node:path';
import type { TokenConfig } from './config.ts';

export function isSoftHsm({ module }: Pick<TokenConfig, 'module'>): boolean {
  return basename(module).startsWith('libsofthsm');
}
