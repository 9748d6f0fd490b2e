/**
 * Owns: which descriptor of this process is which listening socket. The descriptors themselves are the engine's.
 * Must not know: who accepts from them, when.
 * Runs: main thread of a worker.
 */
import type { Engine } from '../engine/native.d.ts';
import { ServiceError } from '../errors.ts';
import type { SocketUse } from '../messages.ts';

export class Sockets {
  readonly #fds = new Map<number, number>();

  /** @param sockets inherited from descriptor `firstFd` on. */
  constructor(sockets: readonly number[], firstFd: number) {
    for (const [index, socket] of sockets.entries()) this.#fds.set(socket, firstFd + index);
  }

  get all(): readonly number[] {
    return [...this.#fds.keys()];
  }

  /**
   * Takes what the primary has put into the channel for this reload, before it said so.
   * @throws ServiceError `engine_failed` when that is not what it said; then nothing was taken.
   */
  take(engine: Engine, reload: number, sockets: readonly number[]): void {
    if (sockets.length === 0) return;
    const fds = engine.takeOver(reload);
    if (fds.length !== sockets.length) {
      engine.retire(fds);
      throw new ServiceError(
        'engine_failed',
        `expected ${sockets.length} sockets from the primary, found ${fds.length}`,
      );
    }
    for (const [index, socket] of sockets.entries()) this.#fds.set(socket, fds[index] ?? -1);
  }

  /** Those that are not here (any more) are left out. */
  fds(sockets: readonly number[]): number[] {
    return sockets.flatMap((socket) => this.#fds.get(socket) ?? []);
  }

  uses(accept: readonly SocketUse[]): { readonly listener: string; readonly fd: number }[] {
    return accept.flatMap(({ socket, listener }) => this.fds([socket]).map((fd) => ({ listener, fd })));
  }

  /** Who waits there is taken, because nobody else will come for them. */
  retire(engine: Engine, sockets: readonly number[]): void {
    engine.retire(this.fds(sockets));
    for (const socket of sockets) this.#fds.delete(socket);
  }
}
