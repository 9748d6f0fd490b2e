/**
 * Owns: the life of the primary: open the listeners, give up root, start the workers, watch over them, drain, leave.
 * Must not know: TLS, tokens, HTTP details. Never loads a PKCS#11 module, never starts the engine.
 * Runs: main thread of the primary.
 */
import { X509Certificate } from 'node:crypto';
import { readFileSync } from 'node:fs';
import { availableParallelism } from 'node:os';
import type { Config } from '../config/config.ts';
import { engine } from '../engine/binding.ts';
import { giveBackMemory } from '../engine/memory.ts';
import { openLog } from '../log.ts';
import type { Log } from '../log.ts';
import { startAdmin } from './admin.ts';
import type { Admin } from './admin.ts';
import { openListeners, shutListeners } from './listeners.ts';
import type { Listeners } from './listeners.ts';
import { renderMetrics } from './metrics.ts';
import { dropPrivileges } from './privileges.ts';
import { TicketEpochs } from './ticket-epochs.ts';
import { version } from '../version.ts';
import { Workers } from './workers.ts';

/** Keeps what workers have counted from being lost with them. */
const observeIntervalMs = 1000;

/** A running keygate. */
export interface Service {
  /** By listener, with the port that was chosen for port 0. */
  readonly addresses: Listeners['addresses'];
  readonly adminAddress: string | undefined;
  /** Resolves when keygate was told to stop and every worker has left; rejects when it can serve no more. */
  readonly ended: Promise<void>;
}

/**
 * Starts keygate; resolves when every worker is ready.
 * @throws ServiceError `bind_failed`, `privileges`, `admin_failed`; what the first worker failed with
 */
export async function serve(config: Config): Promise<Service> {
  const log = openLog(config.log.level);
  const slots = config.workers === 'auto' ? availableParallelism() : config.workers;
  const listeners = openListeners(config, slots, engine());
  dropPrivileges(config, log);

  engine().harden();

  const workers = new Workers(config, listeners, new TicketEpochs(), log);
  const ended = Promise.withResolvers<void>();
  const allReady = Promise.withResolvers<void>();
  workers.once('allReady', allReady.resolve);
  workers.once('drained', ended.resolve);
  workers.once('failed', ended.reject);

  // Before anything is forked: a signal during the start must end what was started.
  let draining = false;
  const drain = (deadlineMs: number): void => {
    workers.drain(deadlineMs);
    if (!draining) shutListeners(listeners, engine());
    draining = true;
    log.info({ event: 'drain_started', deadlineMs }, 'draining');
  };
  let signals = 0;
  const stop = (signal: string): void => {
    signals += 1;
    log.info({ event: 'signal', signal }, `${signal} received`);
    // Who asks twice does not want to wait.
    drain(signals === 1 ? config.drainDeadlineMs : 0);
  };
  process.on('SIGTERM', stop);
  process.on('SIGINT', stop);
  process.on('SIGHUP', () => {
    log.warn(
      { event: 'reload_unsupported' },
      'SIGHUP ignored: this version cannot reload its configuration, restart it',
    );
  });

  const admin = await openAdmin(config, listeners, workers, () => drain(config.drainDeadlineMs), log);
  const timers = [
    setInterval(() => void workers.observe(), observeIntervalMs),
    setInterval(() => {
      workers.rotateTickets();
    }, config.tickets.rotationMs),
  ];
  workers.start();
  const end = ended.promise.finally(async () => {
    for (const timer of timers) clearInterval(timer);
    await admin?.close();
    const { closes } = await workers.observe();
    const cut = closes.find(({ side, phase }) => side === 'proxy' && phase === 'drain')?.count ?? 0;
    log.info({ event: 'ended', cut }, cut === 0 ? 'no worker is left' : 'connections were cut at the deadline');
  });
  await Promise.race([allReady.promise, end]);
  giveBackMemory(engine());
  if (workers.unreadiness === undefined) {
    log.info({ event: 'ready', addresses: listeners.addresses, admin: admin?.address }, 'keygate is ready');
  }
  return { addresses: listeners.addresses, adminAddress: admin?.address, ended: end };
}

async function openAdmin(
  config: Config,
  listeners: Listeners,
  workers: Workers,
  drain: () => void,
  log: Log,
): Promise<Admin | undefined> {
  if (config.admin === undefined) return undefined;
  const certificates = expiries(config);
  const view = {
    get unreadiness() {
      return workers.unreadiness;
    },
    metrics: async () => renderMetrics({ snapshot: await workers.observe(), workers: workers.status, certificates }),
    status: async () => ({
      version,
      ready: workers.unreadiness === undefined,
      unreadiness: workers.unreadiness,
      listeners: listeners.addresses,
      workers: workers.status,
      certificates,
      engine: await workers.observe(),
    }),
    drain,
  };
  return startAdmin(config.admin.listen, view, log);
}

/** A chain that cannot be read is the workers' to report, with everything else that is wrong with it. */
function expiries(config: Config): readonly { name: string; notAfterMs: number }[] {
  return Object.values(config.certificates).flatMap(({ name, chain }) => {
    try {
      return [{ name, notAfterMs: new X509Certificate(readFileSync(chain)).validToDate.getTime() }];
    } catch {
      return [];
    }
  });
}
