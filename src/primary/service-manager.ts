/**
 * Owns: telling systemd how keygate does (Type=notify, sd_notify(3)): ready, reloading, stopping.
 * Must not know: why.
 * Runs: main thread of the primary. Without a service manager that wants to know, nothing happens.
 */
import type { EngineBinding } from '../engine/binding.ts';
import type { Log } from '../log.ts';

export class ServiceManager {
  /** What a successor needs to be heard as well. */
  readonly env: NodeJS.ProcessEnv;
  readonly #socket: string | undefined;
  readonly #native: EngineBinding;
  readonly #log: Log;
  /** What was said last. Nobody is ready because of a reload, or once it has stopped. */
  #state: 'starting' | 'serving' | 'stopping' = 'starting';

  /** Takes the socket's name out of the environment: workers have nothing to say there. */
  constructor(env: NodeJS.ProcessEnv, native: EngineBinding, log: Log) {
    this.#socket = env['NOTIFY_SOCKET'];
    this.env = this.#socket === undefined ? {} : { NOTIFY_SOCKET: this.#socket };
    delete env['NOTIFY_SOCKET'];
    this.#native = native;
    this.#log = log;
  }

  ready(): void {
    if (this.#state !== 'starting') return;
    this.#state = 'serving';
    this.#tell('READY=1', 'STATUS=serving');
  }

  reloading(): void {
    if (this.#state !== 'serving') return;
    // Type=notify-reload (systemd 253) tells by the time that this is an answer to its signal.
    this.#tell('RELOADING=1', `MONOTONIC_USEC=${process.hrtime.bigint() / 1000n}`, 'STATUS=reloading');
  }

  /** @param status shown by `systemctl status`: what is served now. */
  reloaded(status: string): void {
    if (this.#state === 'serving') this.#tell('READY=1', `STATUS=${status.replaceAll('\n', ' ')}`);
  }

  /** Another process is the service from now on, and says itself how it does. */
  succeededBy(pid: number): void {
    this.#tell(`MAINPID=${pid}`);
    this.#state = 'stopping';
  }

  stopping(): void {
    if (this.#state === 'stopping') return;
    this.#state = 'stopping';
    this.#tell('STOPPING=1', 'STATUS=draining');
  }

  #tell(...lines: readonly string[]): void {
    if (this.#socket === undefined) return;
    try {
      this.#native.notify(this.#socket, lines.join('\n'));
    } catch (error) {
      this.#log.warn({ event: 'notify_failed', error }, 'the service manager cannot be told how keygate does');
    }
  }
}
