/**
 * Owns: loading the engine's shared library and its types.
 * Must not know: what it is used for.
 * Runs: main thread; loading starts no thread.
 */
import { accessSync, constants } from 'node:fs';
import { createRequire } from 'node:module';
import { isMainThread } from 'node:worker_threads';
import { ServiceError } from '../errors.ts';
import { readBuild } from '../version.ts';

export type EngineBinding = typeof import('./native.d.ts');

let loaded: EngineBinding | undefined;

/**
 * The engine. A module of PKCS#11 knows only processes, so the engine refuses to be loaded in a worker thread.
 * @throws ServiceError `engine_missing`
 */
export function engine(): EngineBinding {
  loaded ??= load();
  return loaded;
}

function load(): EngineBinding {
  if (!isMainThread) {
    throw new ServiceError('engine_missing', 'the engine can be used on the main thread of a process only');
  }
  const path = new URL('keygate-engine.node', import.meta.url).pathname;
  try {
    // The addon is trusted to be what native.d.ts says: both come from one build, which a check compares.
    return createRequire(import.meta.url)(path) as EngineBinding;
  } catch (cause) {
    throw new ServiceError('engine_missing', `${path} cannot be loaded: ${String(cause)}`, {
      cause,
      hint: hintFor(path),
    });
  }
}

/** "Cannot find module" is also what Node says of a file that this user may not reach. */
function hintFor(path: string): string {
  const build = readBuild();
  try {
    accessSync(path, constants.R_OK);
    return build === undefined
      ? 'it was built for another system or another Node: run scripts/bootstrap to build it'
      : `it was built for ${build.os}-${build.cpu}, this is ${process.platform}-${process.arch}: install the package for this system`;
  } catch (error) {
    if (error instanceof Error && 'code' in error && error.code === 'EACCES')
      return 'this user must be allowed to read what keygate consists of';
    return build === undefined ? 'run scripts/bootstrap to build it' : 'install the package again';
  }
}
