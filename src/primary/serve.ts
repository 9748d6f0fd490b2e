/**
 * Owns: the life of the primary: open the listeners, give up root, start the workers, watch over them, reload, drain, leave.
 * Must not know: TLS, tokens, HTTP details. Never loads a PKCS#11 module, never starts the engine.
 * Runs: main thread of the primary.
 */
import { availableParallelism } from 'node:os';
import type { Config, LogLevel } from '../config/config.ts';
import { engine } from '../engine/binding.ts';
import { giveBackMemory } from '../engine/memory.ts';
import { openLog } from '../log.ts';
import type { Log } from '../log.ts';
import { startAdmin } from './admin.ts';
import type { Admin, AdminView } from './admin.ts';
import { History } from './history.ts';
import { noListeners, openListeners, shutListeners } from './listeners.ts';
import type { Listeners } from './listeners.ts';
import { renderMetrics } from './metrics.ts';
import { overviewOf } from './overview.ts';
import { dropPrivileges } from './privileges.ts';
import { Reloads } from './reload.ts';
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
  const listeners = openListeners(noListeners, config, slots, engine());
  dropPrivileges(config, log);

  engine().harden();

  const workers = new Workers(config, slots, listeners, new TicketEpochs(), log);
  const ended = Promise.withResolvers<void>();
  const allReady = Promise.withResolvers<void>();
  workers.once('allReady', allReady.resolve);
  workers.once('drained', ended.resolve);
  workers.once('failed', ended.reject);
  const rotateEvery = (intervalMs: number) => setInterval(() => workers.rotateTickets(), intervalMs);
  let rotation = rotateEvery(config.tickets.rotationMs);
  let rotationMs = config.tickets.rotationMs;
  // It shows what reloads do, and they have it read its files again.
  const opened: { admin?: Admin | undefined } = {};
  const parts = { workers, native: engine(), slots, log, rereadAdmin: () => opened.admin?.reread() };
  const reloads = new Reloads(config, parts, (next) => {
    log.level = next.log.level;
    if (next.tickets.rotationMs === rotationMs) return;
    rotationMs = next.tickets.rotationMs;
    clearInterval(rotation);
    rotation = rotateEvery(rotationMs);
  });

  // Before anything is forked: a signal during the start must end what was started.
  let draining = false;
  const drain = (deadlineMs: number): void => {
    workers.drain(deadlineMs);
    if (!draining) shutListeners(workers.listening, engine());
    draining = true;
    log.info({ event: 'drain_started', deadlineMs }, 'draining');
  };
  let signals = 0;
  const stop = (signal: string): void => {
    signals += 1;
    log.info({ event: 'signal', signal }, `${signal} received`);
    // Who asks twice does not want to wait.
    drain(signals === 1 ? reloads.config.drainDeadlineMs : 0);
  };
  process.on('SIGTERM', stop);
  process.on('SIGINT', stop);
  process.on('SIGHUP', () => reloads.request());

  const history = new History(engine().latencyBoundsUs());
  const drainNow = () => drain(reloads.config.drainDeadlineMs);
  const admin = await openAdmin({ reloads, workers, history, drain: drainNow, log });
  opened.admin = admin;
  const observation = setInterval(() => {
    workers
      .observe()
      .then((snapshot) => {
        history.enter(snapshot, Date.now());
        admin?.announce();
      })
      .catch((error: unknown) => {
        // A defect in what is shown must not end what serves.
        log.error({ event: 'admin_status', error }, 'the status page could not be told what was measured');
      });
  }, observeIntervalMs);
  workers.start();
  const end = ended.promise.finally(async () => {
    clearInterval(observation);
    clearInterval(rotation);
    await admin?.close();
    const { closes } = await workers.observe();
    const cut = closes.find(({ side, phase }) => side === 'proxy' && phase === 'drain')?.count ?? 0;
    log.info({ event: 'ended', cut }, cut === 0 ? 'no worker is left' : 'connections were cut at the deadline');
  });
  await Promise.race([allReady.promise, end]);
  giveBackMemory(engine());
  const { addresses } = workers.listening;
  if (workers.unreadiness === undefined) {
    log.info({ event: 'ready', addresses, admin: admin?.address }, 'keygate is ready');
  }
  return { addresses, adminAddress: admin?.address, ended: end };
}

interface AdminParts {
  readonly reloads: Reloads;
  readonly workers: Workers;
  readonly history: History;
  readonly drain: () => void;
  readonly log: Log;
}

async function openAdmin({ reloads, workers, history, drain, log }: AdminParts): Promise<Admin | undefined> {
  const { admin } = reloads.config;
  if (admin === undefined) return undefined;
  const view: AdminView = {
    get unreadiness() {
      return workers.unreadiness;
    },
    metrics: async () => {
      const { certificates } = reloads;
      return renderMetrics({ snapshot: await workers.observe(), workers: workers.status, certificates, reloads });
    },
    status: async () => ({
      version,
      ready: workers.unreadiness === undefined,
      unreadiness: workers.unreadiness,
      configuration: reloads.status,
      listeners: workers.listening.addresses,
      workers: workers.status,
      certificates: reloads.certificates.map(({ name, notAfterMs }) => ({ name, notAfterMs })),
      engine: await workers.observe(),
    }),
    history: () => ({ points: history.points }),
    overview: () =>
      overviewOf({
        atMs: Date.now(),
        unreadiness: workers.unreadiness,
        config: reloads.config,
        configuration: reloads.status,
        addresses: workers.listening.addresses,
        workers: workers.status,
        certificates: reloads.certificates,
        logLevel: view.logLevel,
        history,
      }),
    get logLevel() {
      return log.level as LogLevel;
    },
    setLogLevel(level) {
      log.level = level;
      workers.setLogLevel(level);
    },
    reload: async () => reloads.reload(),
    drain,
  };
  return startAdmin(admin, view, log);
}
