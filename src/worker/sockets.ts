/**
 * Owns: which descriptor of this process is which listening socket.
 * Must not know: who accepts from them, when.
 * Runs: main thread of a worker.
 */
import { closeSync } from 'node:fs';
import { engine } from '../engine/binding.ts';
import { ServiceError } from '../errors.ts';
import type { SocketUse } from '../messages.ts';

export class Sockets {
  readonly #fds = new Map<number, number>();
  readonly #handoverFd: number;

  /** @param sockets inherited from descriptor `firstFd` on. */
  constructor(sockets: readonly number[], firstFd: number, handoverFd: number) {
    for (const [index, socket] of sockets.entries()) this.#fds.set(socket, firstFd + index);
    this.#handoverFd = handoverFd;
  }

  /**
   * Takes what the primary has put into the channel for this reload, before it said so.
   * @throws ServiceError `engine_failed` when that is not what it said; then nothing was taken.
   */
  take(reload: number, sockets: readonly number[]): void {
    if (sockets.length === 0) return;
    const fds = engine().takeOver(this.#handoverFd, reload);
    if (fds.length !== sockets.length) {
      for (const fd of fds) closeSync(fd);
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

  get all(): readonly number[] {
    return [...this.#fds.keys()];
  }

  close(sockets: readonly number[]): void {
    for (const fd of this.fds(sockets)) closeSync(fd);
    for (const socket of sockets) this.#fds.delete(socket);
  }
}
