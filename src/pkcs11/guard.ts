/**
 * Owns: the engine's answer to what only native code can do for a PKCS#11 module.
 * Must not know: tokens, PINs.
 * Runs: on the main thread of a worker or of a command.
 */
import { engine } from '../engine/binding.ts';
import type { NativeModuleGuard } from './module.ts';

export const engineGuard: NativeModuleGuard = {
  preload: (modulePath, isolate) => engine().preloadModule(modulePath, isolate),
  lockLogin(modulePath, waitMs) {
    const lock = engine().LoginLock.acquire(modulePath, waitMs);
    return () => lock.release();
  },
};
