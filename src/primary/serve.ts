/**
 * Owns: the life of the primary: open the listeners, give up root, start the workers, watch over them, reload, drain, leave.
 * Must not know: TLS, tokens, HTTP details. Never loads a PKCS#11 module, never starts the engine.
 * Runs: main thread of the primary.
 */
import { availableParallelism } from 'node:os';
import type { Config, LogLevel } from '../config/config.ts';
import { fipsProblems } from '../config/fips.ts';
import { keyLogProblems } from '../config/key-log.ts';
import { engine } from '../engine/binding.ts';
import { giveBackMemory } from '../engine/memory.ts';
import type { EngineSnapshot } from '../engine/native.d.ts';
import { ConfigError } from '../errors.ts';
import { openLogs } from '../log.ts';
import type { Log, Logs } from '../log.ts';
import { startAdmin } from './admin.ts';
import type { Admin, AdminView } from './admin.ts';
import { History } from './history.ts';
import { closeSockets, inheritListeners, noListeners, openListeners, shutSockets } from './listeners.ts';
import type { Listeners } from './listeners.ts';
import { LogLosses } from './log-losses.ts';
import { renderMetrics } from './metrics.ts';
import type { Measurements } from './metrics.ts';
import { overviewOf } from './overview.ts';
import { takePassedSockets } from './passed-sockets.ts';
import { becomeConfigured, demandTransparency, logPrivileges } from './privileges.ts';
import { Reloads } from './reload.ts';
import { ServiceManager } from './service-manager.ts';
import { Stapler } from './stapler.ts';
import { findPredecessor, handOver } from './succession.ts';
import { TicketEpochs } from './ticket-epochs.ts';
import type { TicketEpoch } from './ticket-epochs.ts';
import { version } from '../version.ts';
import { Workers } from './workers.ts';

/** Keeps what workers have counted from being lost with them. */
const observeIntervalMs = 1000;

/** How often it is said that there is a key log. */
const keyLogReportIntervalMs = 10 * 60_000;

export interface ServeOptions {
  /** Whether the configuration may ask for a key log. */
  readonly allowKeyLog?: boolean;
}

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
 * @throws ServiceError `bind_failed`, `privileges`, `log_failed`, `admin_failed`; ConfigError `config_key_log`; what the
 * first worker failed with
 */
export async function serve(config: Config, { allowKeyLog = false }: ServeOptions = {}): Promise<Service> {
  // A signal ends a process that does not listen to it. One that comes early is obeyed below: nothing here awaits before.
  for (const signal of ['SIGHUP', 'SIGUSR2'] as const) process.on(signal, () => {});
  const [refused, ...others] = [
    ...(allowKeyLog ? [] : keyLogProblems(config)),
    ...fipsProblems(config, () => engine().isFips()),
  ];
  if (refused !== undefined) throw new ConfigError([refused, ...others]);
  const slots = config.workers === 'auto' ? availableParallelism() : config.workers;
  const predecessor = await findPredecessor(process.env);
  const former =
    predecessor === undefined
      ? { ...noListeners, passed: takePassedSockets(process.env, engine()) }
      : inheritListeners(predecessor.inheritance.listeners, slots);
  const listeners = openListeners(former, config, slots, engine());
  closeSockets(listeners.retired);
  for (const { fd, backlog } of listeners.resized) engine().setBacklog(fd, backlog);
  const account = becomeConfigured(config);
  demandTransparency(config, engine());
  // As the account that workers have too: a file that root made would be closed to them.
  const logs = openLogs(config.log);
  const { log } = logs;
  const serviceManager = new ServiceManager(process.env, engine(), log);
  log.info({ event: 'starting', version, node: process.versions.node, file: config.file }, `keygate ${version}`);
  logPrivileges(account, log);
  if (config.log.keyLog !== undefined) reportKeyLog(config.log.keyLog, log);

  engine().harden();
  if (config.sandbox.enabled) engine().refuseRings();

  const epochs = new TicketEpochs(predecessor?.inheritance.tickets);
  const stapler = new Stapler(config, log);
  const workers = new Workers(config, slots, listeners, epochs, () => stapler.staples, log);
  stapler.on('changed', (staples) => workers.giveStaples(staples));
  const rotateEvery = (intervalMs: number) =>
    setInterval(() => {
      workers.rotateTickets();
      if (reloads.config.tickets.key !== undefined) return;
      log.info({ event: 'tickets_rotated', epoch: epochs.current.number }, 'another key issues session tickets');
    }, intervalMs);
  let rotation = rotateEvery(config.tickets.rotationMs);
  let rotationMs = config.tickets.rotationMs;
  // It shows what reloads do, and they have it read its files again.
  const opened: { admin?: Admin | undefined } = {};
  const rereadAdmin = () => opened.admin?.reread();
  const parts = { workers, stapler, native: engine(), serviceManager, slots, log, rereadAdmin };
  const reloads = new Reloads(config, parts, (next) => {
    log.level = next.log.level;
    if (next.tickets.rotationMs === rotationMs) return;
    rotationMs = next.tickets.rotationMs;
    clearInterval(rotation);
    rotation = rotateEvery(rotationMs);
  });

  // Before anything is forked: a signal during the start must end what was started.
  let drainEndsAtMs = Infinity;
  let isSucceeded = false;
  const draining = new AbortController();
  const drain = (deadlineMs: number): void => {
    const endsAtMs = performance.now() + deadlineMs;
    // Whoever asked before counts on it: a drain only becomes shorter.
    if (endsAtMs >= drainEndsAtMs) return;
    workers.drain(deadlineMs);
    if (drainEndsAtMs === Infinity) {
      const { sockets } = workers.listening;
      // A successor's are not shut; should it go, nobody may wait in their queues.
      if (isSucceeded) closeSockets(sockets);
      else shutSockets(sockets, engine());
    }
    drainEndsAtMs = endsAtMs;
    draining.abort();
    serviceManager.stopping();
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
  const reopenLogs = (): void => {
    logs.reopen();
    workers.reopenLogs();
  };
  process.on('SIGHUP', () => {
    reopenLogs();
    reloads.request();
  });
  process.on('SIGUSR2', reopenLogs);

  const losses = new LogLosses(log);
  const history = new History(engine().latencyBoundsUs());
  const drainNow = () => drain(reloads.config.drainDeadlineMs);
  const upgrade = async (): Promise<{ readonly pid: number } | { readonly refused: string }> => {
    if (drainEndsAtMs !== Infinity) return { refused: 'keygate drains' };
    const done = reloads.without(async () => {
      const { pid, retired } = await handOver({
        inheritance: { listeners: workers.listening, tickets: epochs.inheritance },
        env: serviceManager.env,
        deadlineMs: reloads.config.reloadDeadlineMs,
        closeAdmin: () => opened.admin?.retire(),
        openAdmin: openOwnAdmin,
        signal: draining.signal,
      });
      isSucceeded = true;
      serviceManager.succeededBy(pid);
      log.info({ event: 'upgraded', pid }, 'a successor has taken over');
      try {
        await workers.retire(workers.listening.sockets.filter(({ socket }) => retired.includes(socket)));
      } catch (error) {
        log.error({ event: 'retire_failed', error }, 'sockets that the successor does not have could not be closed');
      }
      // Whatever happened: two must not serve.
      drainNow();
      return { pid };
    });
    try {
      return (await done) ?? { refused: 'a reload or another upgrade is under way' };
    } catch (error) {
      log.error({ event: 'upgrade_failed', error }, 'the successor could not take over; nothing has changed');
      return { refused: error instanceof Error ? error.message : String(error) };
    }
  };
  const openOwnAdmin = async (): Promise<void> => {
    opened.admin = await openAdmin({
      reloads,
      workers,
      stapler,
      epochs,
      slots,
      logs,
      history,
      upgrade,
      drain: drainNow,
    });
  };
  // A predecessor still has the address.
  if (predecessor === undefined) await openOwnAdmin();
  const observation = setInterval(() => {
    workers
      .observe()
      .then(({ engine: measured, logs: ofWorkers }) => {
        losses.look([ofWorkers, logs.counts]);
        history.enter(measured, Date.now());
        opened.admin?.announce();
      })
      .catch((error: unknown) => {
        // A defect in what is shown must not end what serves.
        log.error({ event: 'admin_status', error }, 'the status page could not be told what was measured');
      });
  }, observeIntervalMs);
  // What is in the cache is there before the first client; whatever is not comes when it comes.
  void stapler.follow(config);
  workers.start();
  const end = workers.ended.finally(async () => {
    clearInterval(observation);
    clearInterval(rotation);
    stapler.stop();
    await opened.admin?.close();
    const { engine: measured } = await workers.observe();
    const cut = measured.closes.find(({ side, phase }) => side === 'proxy' && phase === 'drain')?.count ?? 0;
    log.info({ event: 'ended', cut }, cut === 0 ? 'no worker is left' : 'connections were cut at the deadline');
  });
  await Promise.race([workers.allReady, end]);
  if (predecessor !== undefined && workers.unreadiness === undefined) {
    await predecessor.prepared();
    await openOwnAdmin();
    predecessor.serving(listeners.retired.map(({ socket }) => socket));
  }
  giveBackMemory(engine());
  const { addresses } = workers.listening;
  const { admin } = opened;
  if (workers.unreadiness === undefined) {
    log.info({ event: 'ready', addresses, admin: admin?.address }, 'keygate is ready');
    serviceManager.ready();
  }
  return { addresses, adminAddress: admin?.address, ended: end };
}

interface Parts {
  readonly reloads: Reloads;
  readonly workers: Workers;
  readonly stapler: Stapler;
  readonly epochs: TicketEpochs;
  readonly slots: number;
  readonly logs: Logs;
  readonly history: History;
  readonly upgrade: AdminView['upgrade'];
  readonly drain: () => void;
}

async function openAdmin(parts: Parts): Promise<Admin | undefined> {
  const { reloads, workers, stapler, history, upgrade, drain } = parts;
  const { log } = parts.logs;
  const { admin } = reloads.config;
  if (admin === undefined) return undefined;
  const view: AdminView = {
    get unreadiness() {
      return workers.unreadiness;
    },
    metrics: async () => renderMetrics(await measurements(parts)),
    status: async () => {
      const { engine: measured, processes, logs } = await workers.observe();
      return {
        version,
        ready: workers.unreadiness === undefined,
        unreadiness: workers.unreadiness,
        configuration: reloads.status,
        keyLog: reloads.config.log.keyLog,
        listeners: workers.listening.addresses,
        workers: workers.status.map((worker) => ({ ...worker, process: processes.get(worker.slot) })),
        certificates: reloads.certificates.map(({ name, notAfterMs }) => ({
          name,
          notAfterMs,
          ocsp: stapler.status(name),
        })),
        logs,
        engine: measured,
      };
    },
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
    upgrade,
    drain,
  };
  return startAdmin(admin, view, log);
}

async function measurements({ reloads, workers, stapler, epochs, slots, logs }: Parts): Promise<Measurements> {
  const { engine: snapshot, logs: ofWorkers, processes, cpu } = await workers.observe();
  return {
    snapshot,
    logs: [ofWorkers, logs.counts],
    processes,
    cpu,
    workers: workers.status,
    ready: workers.unreadiness === undefined,
    certificates: reloads.certificates,
    staples: stapler.statuses,
    config: reloads.config,
    slots,
    reloads,
    ticketEpoch: ticketEpochOf(snapshot, reloads.config, epochs),
  };
}

/** What tokens have derived, or what the primary has drawn. */
function ticketEpochOf({ tickets: { epoch } }: EngineSnapshot, { tickets }: Config, epochs: TicketEpochs): TicketEpoch {
  return epoch === undefined ? epochs.current : { number: epoch, since: new Date(epoch * tickets.rotationMs) };
}

/** Again and again: a key log that was forgotten is a hole. */
function reportKeyLog(file: string, log: Log): void {
  const report = (): void => {
    log.warn(
      { event: 'key_log_enabled', file },
      'the secrets of every connection are written down: whoever reads the key log can read the traffic',
    );
  };
  report();
  setInterval(report, keyLogReportIntervalMs).unref();
}
