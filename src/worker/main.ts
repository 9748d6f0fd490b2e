/**
 * Owns: the life of a worker process: prove the tokens, start the engine, obey the primary, reload, drain, leave.
 * Must not know: the other workers; whatever happens per byte or per handshake.
 * Runs: main thread of a worker, forked by src/primary/worker-process.ts.
 */
import cluster from 'node:cluster';
import type { Engine, EngineSettings, Staple as EngineStaple } from '../engine/native.d.ts';
import { engine as loadEngine } from '../engine/binding.ts';
import { giveBackMemory, giveBackMemorySoon } from '../engine/memory.ts';
import type { Config, TicketsConfig } from '../config/config.ts';
import { readPin } from '../config/pin.ts';
import { ConfigError, exitCodes, KeygateError, pinCodes, ServiceError } from '../errors.ts';
import { openLogs } from '../log.ts';
import type { Log, Logs } from '../log.ts';
import type { PinRefusal, PrimaryMessage, Staple, WorkerFailure, WorkerMessage, WorkerSnapshot } from '../messages.ts';
import { nativeGuard } from '../pkcs11/native-guard.ts';
import { provePlan } from '../pkcs11/plan.ts';
import { engineSettings } from './plan.ts';
import { FindingWatch } from './finding-watch.ts';
import { HealthWatch } from './health-watch.ts';
import { ProcessMeter } from './process-meter.ts';
import { enterSandbox } from './sandbox.ts';
import { pemOf, readRoots } from './roots.ts';
import { Sockets } from './sockets.ts';
import { TicketWatch } from './ticket-watch.ts';
import { TlsaWatch, tlsaTargets } from './tlsa-watch.ts';

/** How long the I/O thread and each token get to stop when the process leaves. */
const stopBudgetMs = 200;
/** How often the engine is looked at: whether it runs, and what became of tokens and servers. */
const watchIntervalMs = 1000;
/** How often a draining worker looks whether its last connection has ended. */
const drainIntervalMs = 50;
/** What a worker without a primary may take beyond the drain deadline before the kernel ends it. */
const overtimeSeconds = 5;

let logs: Logs | undefined;
const processUse = new ProcessMeter();
let engine: Engine | undefined;
let sockets: Sockets | undefined;
/** The reload whose second phase has not come yet, and what it brought. */
let preparing:
  | {
      readonly reload: number;
      readonly sockets: readonly number[];
      readonly config: Config;
      readonly tlsa: TlsaWatch | undefined;
    }
  | undefined;
let tickets: TicketsConfig | undefined;
let drainDeadlineMs = 0;
/** Of the configuration that serves. */
let tlsa: TlsaWatch | undefined;
/** Of the primary; not used while a token derives them. */
let ticketSecrets: readonly Uint8Array[] = [];
/** Those that came before there was an engine, in their order. */
let earlyStaples: readonly Staple[] = [];
let draining = false;
let drainTimer: NodeJS.Timeout | undefined;
let leaving = false;

// Ctrl-C, systemd and pkill reach workers too; the primary decides what that means for them. A worker that went by itself
// would leave its accept queue to nobody.
for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP', 'SIGUSR2'] as const) process.on(signal, () => {});
process.on('uncaughtException', (error) => {
  if (logs === undefined) process.stderr.write(`keygate: a defect ended a worker: ${error.stack}\n`);
  logs?.log.fatal({ event: 'worker_crashed', error }, 'a defect ended this worker');
  process.exit(1);
});
// However the process leaves, the lanes must be out of the module first: its destructors run at exit.
process.on('exit', () => {
  engine?.stop(stopBudgetMs);
});
process.on('disconnect', outlivePrimary);
process.on('message', (message: PrimaryMessage) => {
  obey(message);
});

function obey(message: PrimaryMessage): void {
  switch (message.type) {
    case 'start':
      start(message).catch(fail);
      return;
    case 'tickets':
      ticketSecrets = message.ticketSecrets;
      useTicketSecrets();
      return;
    case 'staples':
      if (engine === undefined) earlyStaples = [...earlyStaples, ...message.staples];
      else engine.setStaples(message.staples.map(engineStaple));
      return;
    case 'adopt':
      if (!draining) for (const { listener, fd } of sockets?.uses(message.accept) ?? []) engine?.accept(listener, fd);
      return;
    case 'release':
      for (const fd of sockets?.fds(message.sockets) ?? []) engine?.stopAccepting(fd);
      return;
    case 'retire':
      if (engine !== undefined) sockets?.retire(engine, message.sockets);
      tell({ type: 'retired' });
      return;
    case 'prepare':
      void prepare(message);
      return;
    case 'commit':
      commit(message);
      return;
    case 'discard':
      discard(message.reload);
      return;
    case 'drain':
      drain(message.deadlineMs);
      return;
    case 'log-level':
      if (logs !== undefined) logs.log.level = message.level;
      return;
    case 'leave':
      return process.exit(0);
    case 'observe':
      if (engine !== undefined) tell({ type: 'snapshot', id: message.id, snapshot: measure(engine) });
      return;
    case 'reopen-logs':
      logs?.reopen();
      return;
  }
}

async function start(message: Extract<PrimaryMessage, { type: 'start' }>): Promise<void> {
  const { config, accept } = message;
  ({ ticketSecrets, staples: earlyStaples } = message);
  ({ tickets, drainDeadlineMs } = config);
  const opened = openLogs(config.log, Number(process.env['KEYGATE_SLOT']));
  logs = opened;
  sockets = new Sockets(message.sockets, message.firstFd);
  const native = loadEngine();
  native.harden();
  native.endWithParent();
  const known = message.refusals.map(({ digest, ckr }) => ({ digest: Buffer.from(digest), ckr }));
  native.shareRefusals(message.refusalSecret, known);
  const sandbox = enterSandbox(config, native, opened.log);
  native.endHandingDown();
  const { settings, warnings, asked } = await prove(config, sockets.uses(accept), opened.log);
  const secrets = ticketSecrets.map((secret) => Buffer.from(secret));
  const inherited = { sockets: sockets.fds(message.sockets), handover: message.handoverFd };
  engine = new native.Engine(settings, secrets, opened.access, opened.key, earlyStaples.map(engineStaple), inherited);
  earlyStaples = [];
  useTlsa(asked);
  watch(engine, opened);
  prepareToOutlivePrimary();
  tell({ type: 'ready', warnings, sandbox });
  // In a turn of its own, where nothing above refers to what was read any more.
  setImmediate(() => giveBackMemory(native));
}

async function prove(
  config: Config,
  accept: ReturnType<Sockets['uses']>,
  log: Log,
): Promise<{ settings: EngineSettings; warnings: readonly string[]; asked: TlsaWatch | undefined }> {
  tell({ type: 'doing', what: `it proved the tokens ${Object.keys(config.tokens).join(', ')}` });
  const proved = provePlan(config, { guard: nativeGuard, readPin });
  const settings = await engineSettings(config, proved, accept, log);
  const asked = await askTlsa(config, settings, log);
  tell({ type: 'doing', what: `the engine logged in to the tokens ${Object.keys(config.tokens).join(', ')}` });
  return { settings, warnings: proved.warnings, asked };
}

/** Fills in what DNS says about servers, so that the first connection is judged by it. */
async function askTlsa({ dns, file }: Config, { upstreams }: EngineSettings, log: Log): Promise<TlsaWatch | undefined> {
  const targets = tlsaTargets(upstreams);
  if (dns === undefined || targets.length === 0) return undefined;
  tell({ type: 'doing', what: 'it asked for TLSA records' });
  const resolver = {
    address: dns.resolver,
    tls: dns.tls && { name: dns.tls.name, roots: readRoots(dns.tls.roots, file).map(pemOf) },
  };
  const asked = new TlsaWatch({ resolver, targets, log }, tlsa);
  await asked.ask();
  for (const { name, tls } of upstreams) if (tls !== undefined) tls.verification.tlsa = asked.answers(name);
  return asked;
}

/** In place of what was asked for the former configuration. */
function useTlsa(next: TlsaWatch | undefined): void {
  tlsa?.end();
  tlsa = next;
  tlsa?.begin(({ upstream, server }, answer) => engine?.setTlsa(upstream, server, answer));
}

/** Until now this process would have ended with the primary: it had nobody to lose. */
function prepareToOutlivePrimary(): void {
  loadEngine().outliveParent(Math.ceil(drainDeadlineMs / 1000) + overtimeSeconds);
  // Or node:cluster ends the process when the channel to the primary breaks.
  if (cluster.worker !== undefined) cluster.worker.exitedAfterDisconnect = true;
}

/** What is established goes on. The engine hears of it as well, also while this thread hangs: a primary that starts anew has other sockets. */
function outlivePrimary(): void {
  if (engine === undefined || sockets === undefined || leaving) process.exit(1);
  logs?.log.error({ event: 'primary_lost', deadlineMs: drainDeadlineMs }, 'the primary is gone: draining');
  if (preparing !== undefined) discard(preparing.reload);
  // In whichever order they hear of it.
  sockets.retire(engine, sockets.all);
  // One that drained already goes on, with the deadline that it has.
  if (!draining) drain(drainDeadlineMs);
}

/** Whatever goes wrong is the primary's to know; this worker serves on with what it has. */
async function prepare({
  reload,
  config,
  accept,
  ...message
}: Extract<PrimaryMessage, { type: 'prepare' }>): Promise<void> {
  try {
    if (engine === undefined || sockets === undefined || logs === undefined || draining) {
      throw new ServiceError('worker_failed', 'the worker does not serve');
    }
    preparing = { reload, sockets: message.sockets, config, tlsa: undefined };
    sockets.take(engine, reload, message.sockets);
    const { settings, warnings, asked } = await prove(config, sockets.uses(accept), logs.log);
    // The primary may have thought better of it while names were looked up.
    if (preparing?.reload !== reload) return;
    engine.prepare(settings);
    preparing = { ...preparing, tlsa: asked };
    tell({ type: 'prepared', reload, warnings });
  } catch (error) {
    discard(reload);
    tell({ type: 'refused', reload, failure: describeFailure(error) });
  }
}

function commit({ reload }: Extract<PrimaryMessage, { type: 'commit' }>): void {
  // Half a reload would be worse than a new worker: whatever throws here ends this one.
  if (engine === undefined || sockets === undefined || logs === undefined || preparing?.reload !== reload) {
    throw new Error(`told to commit reload ${reload}, which is not prepared`);
  }
  engine.commit();
  const { config, tlsa: asked } = preparing;
  logs.log.level = config.log.level;
  ({ tickets, drainDeadlineMs } = config);
  prepareToOutlivePrimary();
  useTicketSecrets();
  useTlsa(asked);
  preparing = undefined;
  tell({ type: 'committed', reload });
  giveBackMemorySoon(loadEngine());
}

function discard(reload: number): void {
  if (preparing?.reload !== reload) return;
  engine?.discard();
  if (engine !== undefined) sockets?.retire(engine, preparing.sockets);
  preparing = undefined;
}

function measure(running: Engine): WorkerSnapshot {
  if (logs === undefined) throw new Error('invariant: the logs are opened before the engine starts');
  return { engine: running.snapshot(), process: processUse.take(), logs: logs.counts };
}

function useTicketSecrets(): void {
  // Also where a ticket key is configured: no token with it may have been in reach.
  engine?.setTicketSecrets(ticketSecrets.map((secret) => Buffer.from(secret)));
}

function engineStaple({ leaf, response }: Staple): EngineStaple {
  return { leaf: Buffer.from(leaf), ...(response === undefined ? {} : { response: Buffer.from(response) }) };
}

function watch(running: Engine, { log }: Logs): void {
  const health = new HealthWatch(log);
  const ticketWatch = new TicketWatch(log);
  const findings = new FindingWatch(log);
  setInterval(() => {
    if (leaving) return;
    const snapshot = running.snapshot();
    if (!snapshot.running) throw new Error('the I/O thread ended by itself');
    health.look(snapshot);
    findings.look(snapshot);
    if (tickets !== undefined) ticketWatch.look(running, snapshot.tickets, tickets.rotationMs);
    running.letGo();
    const why = running.look();
    if (why !== null && !draining) tell({ type: 'stuck', why });
  }, watchIntervalMs).unref();
}

/** A second call moves the deadline. */
function drain(deadlineMs: number): void {
  if (engine === undefined) process.exit(0);
  engine.drain();
  clearTimeout(drainTimer);
  drainTimer = setTimeout(leave, deadlineMs);
  if (draining) return;
  draining = true;
  const running = engine;
  setInterval(() => {
    if (running.snapshot().listeners.every(({ connectionsOpen }) => connectionsOpen === 0)) leave();
  }, drainIntervalMs);
}

/** Ends what is left, and the process once the primary knows what became of it. */
function leave(): void {
  if (engine === undefined || leaving) return;
  leaving = true;
  engine.stop(stopBudgetMs);
  if (!process.connected) process.exit(0);
  tell({ type: 'ended', snapshot: measure(engine) });
}

function fail(error: unknown): void {
  const failure = describeFailure(error);
  // Exit only when the primary has the reason: process.exit would drop what the channel still holds.
  tell({ type: 'failed', failure, refusals: pinRefusals() }, () => process.exit(failure.exitCode));
}

function pinRefusals(): PinRefusal[] {
  try {
    return loadEngine().pinRefusals();
  } catch {
    return []; // without the engine nobody has logged in
  }
}

function describeFailure(error: unknown): WorkerFailure {
  const message = error instanceof Error ? error.message : String(error);
  if (error instanceof KeygateError) {
    const { code, hint, exitCode } = error;
    const problems = error instanceof ConfigError ? error.problems : undefined;
    return { code, message, hint, exitCode, problems, haltsForking: pinCodes.has(code) };
  }
  // The engine's own words for a refused PIN (signing/token_error.rs).
  if (message.startsWith('token_fault pin_')) {
    const exitCode = exitCodes.pin;
    return { code: 'token_login', message, hint: undefined, exitCode, problems: undefined, haltsForking: true };
  }
  if (message.startsWith('token_fault ')) {
    const exitCode = exitCodes.unavailable;
    return { code: 'token_operation', message, hint: undefined, exitCode, problems: undefined, haltsForking: false };
  }
  return { code: 'engine_failed', message, hint: undefined, exitCode: 1, problems: undefined, haltsForking: false };
}

/** Nobody to tell is no error here: 'disconnect' says that the primary is gone. */
function tell(message: WorkerMessage, sent: () => void = () => {}): void {
  if (process.connected) process.send?.(message, undefined, undefined, sent);
}
