/**
 * Owns: which files log lines go to, and whether workers that are in their sandbox already can write to others.
 * Must not know: what is logged, how a sandbox is entered.
 * Runs: main thread of the primary and of each worker.
 */
import { dirname, isAbsolute, relative } from 'node:path';
import type { Config, LogConfig } from './config.ts';

/** Absolute paths. None: log lines go to standard output, which stays open. */
export function logFiles(_log: LogConfig): readonly string[] {
  return [];
}

/**
 * Log files of a new configuration that workers of the former one could not open. A worker may write beside the log files
 * it started with, so that they can be rotated, and what `sandbox.writable` names.
 */
export function logFilesOutside(former: Pick<Config, 'log' | 'sandbox'>, files: readonly string[]): readonly string[] {
  const { enabled, writable } = former.sandbox;
  if (!enabled) return [];
  const besideLogs = new Set(logFiles(former.log).map((file) => dirname(file)));
  return files.filter(
    (file) => !besideLogs.has(dirname(file)) && !writable.some((directory) => isWithin(file, directory)),
  );
}

function isWithin(file: string, directory: string): boolean {
  const path = relative(directory, file);
  return path !== '..' && !path.startsWith('../') && !isAbsolute(path);
}
