/**
 * Owns: what the engine does for graphene in the same process: isolation of the module, the login lock, and the memory of
 * PINs that were refused or are not answered yet.
 * Must not know: graphene, tokens.
 * Runs: main thread of a worker, and of the commands that use a token.
 */
import { engine } from '../engine/binding.ts';
import type { NativeModuleGuard } from './module.ts';

export const nativeGuard: NativeModuleGuard = {
  enter(modulePath, isolate) {
    const visit = engine().ModuleVisit.begin(modulePath, isolate);
    return () => {
      visit.end();
    };
  },
  lockLogin(modulePath, waitMs) {
    const lock = engine().LoginLock.acquire(modulePath, waitMs);
    return () => {
      lock.release();
    };
  },
  presentPin: ({ modulePath, serial }, pin) => engine().presentPin(modulePath, serial, pin) ?? undefined,
  pinAnswered({ modulePath, serial }, pin, ckr) {
    engine().pinAnswered(modulePath, serial, pin, ckr);
  },
};
