/**
 * Owns: paths in the configuration: environment variables in them, and what they are relative to.
 * Must not know: whether anything is there.
 * Runs: at start, on the main thread.
 */
import { resolve } from 'node:path';
import type { Parsed } from './fault.ts';

/** PATH_MAX of Linux, with the final zero. */
const pathBytesMax = 4095;

/** Replaces `${NAME}` by the environment variable: only paths have this, so a secret cannot come in this way. */
export function parsePath(text: string): Parsed<string> {
  // What was pasted here by mistake may be a key: it is refused before anything shows it.
  if (text.includes('\n') || text.includes('-----BEGIN')) {
    return {
      fault: {
        expected: 'a path of one line',
        found: 'several lines or a PEM block, not shown',
        hint: 'write what belongs into a file, and its path here; if it was a key, replace it',
      },
    };
  }
  const unset = [...text.matchAll(variable)].map(([, name]) => name ?? '').find((name) => !process.env[name]);
  if (unset !== undefined) {
    return {
      fault: {
        expected: `the environment variable ${unset} to be set`,
        hint: `export ${unset}, or write the path out`,
      },
    };
  }
  const path = text.replaceAll(variable, (_, name: string) => process.env[name] ?? '');
  if (path === '' || path.includes('\0'))
    return { fault: { expected: 'a path that is not empty and holds no zero byte' } };
  if (path.includes('${')) return { fault: { expected: 'environment variables as ${NAME}' } };
  if (Buffer.byteLength(path) > pathBytesMax) return { fault: { expected: `a path of at most ${pathBytesMax} bytes` } };
  return { value: path };
}

/** Relative paths are relative to the directory of the configuration file, wherever keygate is started. */
export function absolutePath(path: string, directory: string): string {
  return resolve(directory, path);
}

const variable = /\$\{([A-Za-z_][A-Za-z0-9_]*)\}/g;
