/**
 * Owns: clients that go on all the time while something is done to keygate: established connections that echo, resumed and
 * full handshakes, one after the other; and what became of them.
 * Must not know: what is done to keygate.
 * Runs: in test processes.
 */
import assert from 'node:assert/strict';
import { once } from 'node:events';
import { setImmediate } from 'node:timers/promises';
import type { TLSSocket } from 'node:tls';
import { assertEchoes, tlsClient } from './tls-client.ts';
import type { TlsOptions } from './tls-client.ts';
import { until } from './until.ts';

/** What Node makes of the alert internal_error (RFC 8446 6.2). */
const internalError = /^ERR_SSL_(TLSV1|SSL\/TLS)_ALERT_INTERNAL_ERROR$/;
const establishedCount = 4;

/** In milliseconds of `performance`. */
interface Handshake {
  readonly beganAt: number;
  readonly succeededAt: number;
}

export class Load {
  /** Of established connections; each was echoing. */
  lost = 0;
  echoes = 0;
  /** Full handshakes that were refused with an alert; with `mayTurnAway` also clients who found nobody, or whose connection ended without an answer. */
  refused = 0;
  /** Whether keygate may have nothing to serve clients with. */
  mayTurnAway = false;
  /** Those that succeeded, in this order. */
  readonly full: Handshake[] = [];
  readonly resumed: Handshake[] = [];
  /** Codes of errors that no client may see: a signature that is wrong is one. */
  readonly unexpected: string[] = [];
  readonly #options: TlsOptions;
  readonly #loops: Promise<void>[];
  readonly #clients: readonly TLSSocket[];
  #isOver = false;

  /** @param options with `ca`: every client verifies what the server shows and signs */
  static async start(options: TlsOptions): Promise<Load> {
    const established = Array.from({ length: establishedCount }, async () => tlsClient(options));
    const first = await tlsClient(options);
    const coming = once(first, 'session');
    await assertEchoes(first);
    // In TLS 1.3 it comes after the handshake.
    const session = first.getProtocol() === 'TLSv1.3' ? ((await coming) as [Buffer])[0] : first.getSession();
    first.destroy();
    assert.ok(session !== undefined, 'no session');
    return new Load(options, await Promise.all(established), session);
  }

  private constructor(options: TlsOptions, clients: readonly TLSSocket[], session: Buffer) {
    this.#options = options;
    this.#clients = clients;
    this.#loops = [
      ...clients.map(async (client) => this.#echo(client)),
      this.#handshakes(this.full),
      this.#handshakes(this.full),
      this.#handshakes(this.resumed, session),
    ];
  }

  /** @returns how many milliseconds after `from`, of `performance`, a full handshake succeeded that began after this call */
  async healed({ from = performance.now(), deadlineMs = 10_000 } = {}): Promise<number> {
    const calledAt = performance.now();
    const first = await until('full handshake', () => this.full.find(({ beganAt }) => beganAt > calledAt), {
      deadlineMs,
    });
    return first.succeededAt - from;
  }

  async stop(): Promise<void> {
    this.#isOver = true;
    await Promise.all(this.#loops);
    for (const client of this.#clients) client.destroy();
  }

  async #echo(client: TLSSocket): Promise<void> {
    try {
      while (!this.#isOver) {
        await assertEchoes(client);
        this.echoes += 1;
        await setImmediate();
      }
    } catch {
      this.lost += 1;
    }
  }

  async #handshakes(succeeded: Handshake[], session?: Buffer): Promise<void> {
    while (!this.#isOver) {
      const beganAt = performance.now();
      try {
        const client = await tlsClient({ ...this.#options, ...(session === undefined ? {} : { session }) });
        assert.equal(client.isSessionReused(), session !== undefined, 'resumed as it was meant to be');
        await assertEchoes(client);
        client.destroy();
        succeeded.push({ beganAt, succeededAt: performance.now() });
      } catch (error) {
        const { code, message } = error as NodeJS.ErrnoException;
        const isTurnedAway = message === 'the peer ended early' || code === 'ECONNRESET' || code === 'ECONNREFUSED';
        if (session === undefined && internalError.test(code ?? '')) this.refused += 1;
        else if (isTurnedAway && this.mayTurnAway) this.refused += 1;
        else this.unexpected.push(code ?? message);
      }
      await setImmediate();
    }
  }
}
