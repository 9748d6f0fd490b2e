/**
 * Owns: the metrics: one table of names, types, labels and meanings, from which the scrape and the README are printed.
 * The only module that knows prom-client and the text format.
 * Must not know: how measurements are gathered or served.
 * Runs: main thread of the primary.
 *
 * The engine counts; nothing is counted here. So a scrape is a translation of absolute values, which prom-client's own
 * Counter and Histogram, made to be added to, are no help with. A listener has about a hundred series, a configuration may
 * have hundreds of listeners, and a scrape holds up whatever else the primary does: each series is one line of text,
 * written once.
 */
import { AggregatorRegistry, Registry, collectDefaultMetrics } from 'prom-client';
import { engine } from '../engine/binding.ts';
import type { EngineSnapshot, LatencySnapshot } from '../engine/native.d.ts';
import type { LogCounts } from '../log.ts';
import { version } from '../version.ts';
import type { Config } from '../config/config.ts';
import { clientCertificatesOf } from '../config/policies.ts';
import { fetchOutcomes } from '../ocsp/exchange.ts';
import { reloadOutcomes } from './reload.ts';
import type { Reloads } from './reload.ts';
import type { SlotStatus } from './slot.ts';
import type { Observation } from './snapshot-book.ts';
import { stapleStates } from './stapler.ts';
import type { StapleStatus } from './stapler.ts';
import type { TicketEpoch } from './ticket-epochs.ts';

export const metricsContentType = Registry.PROMETHEUS_CONTENT_TYPE;

export interface Measurements {
  /** Summed over the workers, living and dead. */
  readonly snapshot: EngineSnapshot;
  /** Of the workers together, and of the primary. */
  readonly logs: readonly LogCounts[];
  readonly processes: Observation['processes'];
  readonly cpu: Observation['cpu'];
  readonly workers: readonly SlotStatus[];
  readonly ready: boolean;
  readonly certificates: readonly { readonly name: string; readonly notAfterMs: number }[];
  readonly staples: readonly StapleStatus[];
  readonly config: Pick<Config, 'listeners' | 'tokens' | 'log' | 'policies'>;
  /** How many workers there are to be. */
  readonly slots: number;
  readonly reloads: Pick<Reloads, 'counts' | 'last' | 'since'>;
  readonly ticketEpoch: TicketEpoch;
}

/** A scrape in Prometheus' text format 0.0.4. */
export async function renderMetrics(measurements: Measurements): Promise<string> {
  const own = families.map((family) => familyText(family, measurements));
  const ofProcess = (await processRegistry().getMetricsAsJSON()).filter(({ name }) => processFamilies.has(name));
  // Each name comes once, so there is nothing to aggregate; and prom-client's own choice would omit some.
  const registry = AggregatorRegistry.aggregate([ofProcess.map((family) => ({ ...family, aggregator: 'first' }))]);
  return `${own.join('\n')}\n${await registry.metrics()}`;
}

/** The metrics as a Markdown table for README.md, without the markers around it. */
export function metricsTable(): string {
  const rows = families.map(({ name, type, help, labels }) => {
    const list = labels.map((label) => `\`${label}\``).join(', ');
    return `| \`${name}\` | ${type} | ${list} | ${help.replaceAll('|', '\\|')} |`;
  });
  const ofProcess = [...processFamilies].map((name) => `\`${name}\``).join(', ');
  return [
    '| metric | type | labels | meaning |',
    '|---|---|---|---|',
    ...rows,
    '',
    `And about the primary process itself: ${ofProcess}.`,
  ].join('\n');
}

interface Family {
  readonly name: string;
  readonly type: 'counter' | 'gauge' | 'histogram';
  readonly help: string;
  readonly labels: readonly string[];
  readonly read: (measurements: Measurements) => readonly Sample<readonly string[], number | LatencySnapshot>[];
}

/** The values of the labels, in their order, and what was measured. */
type Sample<Values, Measured> = readonly [labels: Values, value: Measured];

/** Label values are names from the configuration, slots, or words from closed lists; never what a client sent. */
const families: readonly Family[] = [
  gauge('connections_open', 'Connections that are open.', ['listener'], ({ snapshot }) =>
    snapshot.listeners.map(({ name, connectionsOpen }) => [[name], connectionsOpen]),
  ),
  counter('connections_accepted_total', 'Connections accepted.', ['listener'], ({ snapshot }) =>
    snapshot.listeners.map(({ name, accepted }) => [[name], accepted]),
  ),
  counter(
    'accept_failures_total',
    'Failures of accept(2) itself, such as no free descriptor.',
    ['listener'],
    ({ snapshot }) => snapshot.listeners.map(({ name, acceptFailures }) => [[name], acceptFailures]),
  ),
  counter('connections_closed_total', 'Connections ended, by close reason.', ['side', 'phase', 'reason'], closes),
  gauge('handshakes_in_flight', 'Handshakes begun and not finished.', ['listener'], ({ snapshot }) =>
    snapshot.listeners.map(({ name, handshakesInFlight }) => [[name], handshakesInFlight]),
  ),
  gauge(
    'listener_connections_limit',
    'What connections_open may come to: limits.connections of every worker.',
    ['listener'],
    ({ config, slots }) =>
      Object.values(config.listeners).map(({ name, limits }) => [[name], limits.connections * slots]),
  ),
  gauge(
    'listener_handshakes_limit',
    'What handshakes_in_flight may come to: limits.handshakes of every worker.',
    ['listener'],
    ({ config, slots }) =>
      Object.values(config.listeners).map(({ name, limits }) => [[name], limits.handshakes * slots]),
  ),
  histogram(
    'handshake_seconds',
    'Finished handshakes, from accept to Finished.',
    ['listener', 'protocol', 'resumed'],
    ({ snapshot }) =>
      snapshot.listeners.flatMap(({ name, handshakes }) =>
        handshakes.map(({ protocol, resumed, latency }) => [[name, protocol, String(resumed)], latency] as const),
      ),
  ),
  counter(
    'client_certificate_statuses_total',
    "What OCSP responders said of clients' certificates.",
    ['listener', 'outcome'],
    ({ snapshot, config }) =>
      snapshot.listeners.flatMap(({ name, clientStatuses }) =>
        asksForStatus(config, name)
          ? clientStatuses.map(({ outcome, count }) => [[name, outcome], count] as const)
          : [],
      ),
  ),
  counter(
    'handshakes_by_cipher_total',
    'Finished handshakes, resumed ones too, by cipher suite (IANA name).',
    ['protocol', 'cipher'],
    ({ snapshot }) => snapshot.ciphers.map(({ protocol, cipher, count }) => [[protocol, cipher], count]),
  ),
  counter(
    'handshakes_by_group_total',
    'Finished handshakes by key exchange group (IANA name); a resumed TLS 1.2 session exchanges no key.',
    ['group'],
    ({ snapshot }) => snapshot.groups.map(({ group, count }) => [[group], count]),
  ),
  counter('relay_bytes_total', 'Plaintext relayed.', ['listener', 'direction'], ({ snapshot }) =>
    snapshot.listeners.flatMap(({ name, toUpstreamBytes, toClientBytes }) => [
      [[name, 'to_upstream'], toUpstreamBytes] as const,
      [[name, 'to_client'], toClientBytes] as const,
    ]),
  ),

  gauge(
    'token_up',
    '1 while every running worker can sign with the token; 0 when one cannot, or none runs.',
    ['token'],
    (measurements) => measurements.snapshot.tokens.map(({ name, up }) => [[name], upForAll(up, measurements)]),
  ),
  counter(
    'lanes_written_off_total',
    'Lanes that were lost in the module for longer than anybody waits, and replaced.',
    ['token'],
    ({ snapshot }) => snapshot.tokens.map(({ name, lanesWrittenOff }) => [[name], lanesWrittenOff]),
  ),
  counter(
    'sign_failovers_total',
    'Requests that went on to another token, because this one failed or took too long.',
    ['token'],
    ({ snapshot }) => snapshot.tokens.map(({ name, failedOver }) => [[name], failedOver]),
  ),
  counter('token_went_down_total', 'How often the token went down for a worker.', ['token'], ({ snapshot }) =>
    snapshot.tokens.map(({ name, wentDown }) => [[name], wentDown]),
  ),
  histogram('sign_wait_seconds', 'How long requests waited for a lane.', ['token'], ({ snapshot }) =>
    snapshot.tokens.map(({ name, signWait }) => [[name], signWait]),
  ),
  histogram(
    'sign_seconds',
    'How long a lane was busy with one request, repairs and verification included.',
    ['token', 'mechanism'],
    ({ snapshot }) =>
      snapshot.tokens.flatMap(({ name, mechanisms }) =>
        mechanisms.map(({ mechanism, latency }) => [[name, mechanism], latency] as const),
      ),
  ),
  counter(
    'signatures_total',
    'Signatures, by outcome: ok, failed, or wrong (did not verify and was not sent).',
    ['token', 'mechanism', 'outcome'],
    ({ snapshot }) =>
      snapshot.tokens.flatMap(({ name, mechanisms }) =>
        mechanisms.flatMap(({ mechanism, ok, failed, wrong }) => [
          [[name, mechanism, 'ok'], ok] as const,
          [[name, mechanism, 'failed'], failed] as const,
          [[name, mechanism, 'wrong'], wrong] as const,
        ]),
      ),
  ),
  gauge(
    'sign_queue_depth',
    'Requests that wait for a lane; the two classes of keys have queues of their own.',
    ['token', 'class'],
    ({ snapshot }) =>
      snapshot.tokens.flatMap(({ name, queueDepthEc, queueDepthRsa }) => [
        [[name, 'ec'], queueDepthEc] as const,
        [[name, 'rsa'], queueDepthRsa] as const,
      ]),
  ),
  gauge(
    'sign_queue_limit',
    'What sign_queue_depth may come to: queue.max of every worker.',
    ['token', 'class'],
    ({ config, slots }) =>
      Object.values(config.tokens).flatMap(({ name, queue }) => [
        [[name, 'ec'], queue.max * slots] as const,
        [[name, 'rsa'], queue.max * slots] as const,
      ]),
  ),
  counter('sign_shed_total', 'Requests refused without a signature, by reason.', ['token', 'reason'], ({ snapshot }) =>
    snapshot.tokens.flatMap(({ name, shedQueueFull, shedQueueAged, shedTokenDown }) => [
      [[name, 'queue_full'], shedQueueFull] as const,
      [[name, 'queue_aged'], shedQueueAged] as const,
      [[name, 'token_down'], shedTokenDown] as const,
    ]),
  ),
  counter(
    'sign_cancelled_total',
    'Requests whose connection had ended when a lane came to them.',
    ['token'],
    ({ snapshot }) => snapshot.tokens.map(({ name, cancelled }) => [[name], cancelled]),
  ),
  gauge('lanes', 'Lanes by state; a lost one is stuck in the module.', ['token', 'state'], ({ snapshot }) =>
    snapshot.tokens.flatMap(({ name, lanesIdle, lanesBusy, lanesLost }) => [
      [[name, 'idle'], lanesIdle] as const,
      [[name, 'busy'], lanesBusy] as const,
      [[name, 'lost'], lanesLost] as const,
    ]),
  ),
  gauge(
    'pkcs11_sessions',
    'PKCS#11 sessions of lanes; a closed one is opened by the next request.',
    ['token', 'state'],
    ({ snapshot }) =>
      snapshot.tokens.flatMap(({ name, sessionsOpen, lanesIdle, lanesBusy }) => [
        [[name, 'open'], sessionsOpen] as const,
        [[name, 'closed'], Math.max(0, lanesIdle + lanesBusy - sessionsOpen)] as const,
      ]),
  ),
  counter(
    'pkcs11_recoveries_total',
    'Repairs: a PKCS#11 session reopened, a login repeated, a key found again, the module initialised again.',
    ['token', 'repair'],
    ({ snapshot }) =>
      snapshot.tokens.flatMap(({ name, reopened, loggedIn, refound, reinitialized }) => [
        [[name, 'session_reopened'], reopened] as const,
        [[name, 'logged_in'], loggedIn] as const,
        [[name, 'key_refound'], refound] as const,
        [[name, 'module_reinitialised'], reinitialized] as const,
      ]),
  ),
  counter(
    'login_lock_timeouts_total',
    'Logins that went ahead because another process held the login lock too long.',
    ['token'],
    ({ snapshot }) => snapshot.tokens.map(({ name, loginLockTimeouts }) => [[name], loginLockTimeouts]),
  ),

  gauge(
    'upstream_server_up',
    '1 while every running worker holds the server for healthy; 0 when one does not, or none runs.',
    ['upstream', 'server'],
    (measurements) => servers(measurements).map(([labels, { up }]) => [labels, upForAll(up, measurements)]),
  ),
  gauge(
    'upstream_connections_open',
    'Connections to the server that are open.',
    ['upstream', 'server'],
    (measurements) => servers(measurements).map(([labels, { connectionsOpen }]) => [labels, connectionsOpen]),
  ),
  counter(
    'upstream_connects_total',
    'Attempts to connect, by outcome; health checks are not counted.',
    ['upstream', 'server', 'outcome'],
    (measurements) =>
      servers(measurements).flatMap(([labels, { connects }]) =>
        connects.map(({ outcome, count }) => [[...labels, outcome], count] as const),
      ),
  ),
  histogram('upstream_connect_seconds', 'Attempts to connect that succeeded.', ['upstream', 'server'], (measurements) =>
    servers(measurements).map(([labels, { connectLatency }]) => [labels, connectLatency]),
  ),

  histogram(
    'upstream_handshake_seconds',
    'TLS handshakes with the server that finished, from connected to Finished.',
    ['upstream', 'server', 'resumed'],
    (measurements) =>
      servers(measurements).flatMap(([labels, { fullHandshakeLatency, resumedHandshakeLatency }]) => [
        [[...labels, 'false'], fullHandshakeLatency] as const,
        [[...labels, 'true'], resumedHandshakeLatency] as const,
      ]),
  ),
  counter(
    'upstream_certificates_accepted_total',
    'Certificates that servers showed and that were accepted; a resumed TLS session shows none.',
    ['upstream'],
    ({ snapshot }) =>
      snapshot.upstreams.flatMap(({ name, findings, certificatesAccepted }) =>
        findings.length === 0 ? [] : [[[name], certificatesAccepted] as const],
      ),
  ),
  counter(
    'upstream_certificate_findings_total',
    'What was found about certificates of servers, by whether they were refused for it or it was only reported; the reasons are those of upstream/handshake.',
    ['upstream', 'reason', 'outcome'],
    ({ snapshot }) =>
      snapshot.upstreams.flatMap(({ name, findings }) =>
        findings.flatMap(({ reason, refused, reported }) => [
          [[name, reason, 'refused'], refused] as const,
          [[name, reason, 'reported'], reported] as const,
        ]),
      ),
  ),
  gauge('ready', '1 while /ready says so.', [], ({ ready }) => [[[], Number(ready)]]),
  gauge('worker_up', '1 while the worker is ready and answers.', ['worker'], ({ workers }) =>
    workers.map(({ slot, state, answers }) => [[String(slot)], Number(state === 'ready' && answers)]),
  ),
  gauge(
    'worker_stuck',
    '1 while calls into a module do not return in the worker and it waits for another in its place.',
    ['worker'],
    ({ workers }) => workers.map(({ slot, stuck }) => [[String(slot)], Number(stuck !== undefined)]),
  ),
  counter('worker_restarts_total', 'How often the worker was replaced.', ['worker'], ({ workers }) =>
    workers.map(({ slot, restarts }) => [[String(slot)], restarts]),
  ),
  gauge('worker_start_time_seconds', 'When the worker was forked, in Unix time.', ['worker'], ({ workers }) =>
    workers.flatMap(({ slot, startedAt }) =>
      startedAt === undefined ? [] : [[[String(slot)], startedAt.getTime() / 1000] as const],
    ),
  ),
  counter(
    'worker_cpu_seconds_total',
    'CPU time of the worker and those before it in its slot, all threads.',
    ['worker'],
    ({ cpu }) => perWorker(cpu, ({ cpuUs }) => cpuUs / 1e6),
  ),
  counter(
    'worker_io_cpu_seconds_total',
    'CPU time of the one thread that does everything per connection; at 1 per second the worker is saturated.',
    ['worker'],
    ({ cpu }) => perWorker(cpu, ({ ioCpuUs }) => ioCpuUs / 1e6),
  ),
  gauge('worker_resident_memory_bytes', 'Resident memory of the worker.', ['worker'], ({ processes }) =>
    perWorker(processes, ({ residentBytes }) => residentBytes),
  ),
  gauge(
    'worker_open_fds',
    'Open file descriptors of the worker; it may have process_max_fds of them.',
    ['worker'],
    ({ processes }) => perWorker(processes, ({ openFds }) => openFds),
  ),
  gauge(
    'worker_event_loop_lag_seconds',
    'The longest delay of the JavaScript thread lately. No connection waits for that thread; start, reload and scrapes do.',
    ['worker'],
    ({ processes }) => perWorker(processes, ({ eventLoopLagMs }) => eventLoopLagMs / 1000),
  ),
  gauge(
    'worker_sandbox',
    '1 while the worker is confined by the mechanism; 0 where sandbox.enabled is false or the kernel lacks it.',
    ['worker', 'mechanism'],
    ({ workers }) =>
      workers.flatMap(({ slot, state, sandbox }) => {
        if (state !== 'ready') return [];
        const { landlockAbi = 0, seccomp = false } = sandbox ?? {};
        return [
          [[String(slot), 'landlock'], Number(landlockAbi > 0)] as const,
          [[String(slot), 'seccomp'], Number(seccomp)] as const,
        ];
      }),
  ),
  counter(
    'log_lines_total',
    'Lines of the logs: written; left out by sample or rate; or dropped, because of a full disk or a stalled reader.',
    ['log', 'outcome'],
    logLines,
  ),
  gauge('key_log_enabled', '1 while the secrets of every connection are written to log.keyLog.', [], ({ config }) => [
    [[], Number(config.log.keyLog !== undefined)],
  ]),
  gauge(
    'ticket_epoch',
    'Number of the key that issues session tickets: from the start of keygate, or from 1970 when tokens derive it.',
    [],
    (measurements) => [[[], measurements.ticketEpoch.number]],
  ),
  gauge(
    'ticket_epoch_start_timestamp_seconds',
    'Since when that key issues tickets, in Unix time.',
    [],
    ({ ticketEpoch }) => [[[], ticketEpoch.since.getTime() / 1000]],
  ),
  gauge(
    'certificate_expiry_timestamp_seconds',
    'When the certificate expires, in Unix time.',
    ['certificate'],
    ({ certificates }) => certificates.map(({ name, notAfterMs }) => [[name], notAfterMs / 1000]),
  ),
  gauge(
    'ocsp_status',
    '1 for what clients get that ask for the OCSP status of the certificate: a response that says good or revoked, or none (missing).',
    ['certificate', 'status'],
    ({ staples }) =>
      staples.flatMap(({ certificate, state }) =>
        stapleStates.map((status) => [[certificate, status], Number(state === status)] as const),
      ),
  ),
  gauge(
    'ocsp_must_staple',
    '1 when the certificate is must-staple (RFC 7633): without a response some clients refuse it.',
    ['certificate'],
    ({ staples }) => staples.map(({ certificate, mustStaple }) => [[certificate], Number(mustStaple)]),
  ),
  gauge(
    'ocsp_response_expiry_timestamp_seconds',
    'When the response that is served ends, in Unix time; the next one is fetched after half of its time.',
    ['certificate'],
    ({ staples }) =>
      staples.flatMap(({ certificate, nextUpdate }) =>
        nextUpdate === undefined ? [] : [[[certificate], nextUpdate.getTime() / 1000] as const],
      ),
  ),
  counter(
    'ocsp_fetches_total',
    'Questions to OCSP responders, by outcome: ok; unreachable (no answer in time); http_error (an answer that is none of OCSP); responder_error (the responder cannot answer); invalid (not signed as it must be, about another certificate, out of date); unknown (the responder does not know the certificate).',
    ['certificate', 'outcome'],
    ({ staples }) =>
      staples.flatMap(({ certificate, fetches }) =>
        fetchOutcomes.map((outcome) => [[certificate, outcome], fetches[outcome]] as const),
      ),
  ),
  counter('reloads_total', 'Reloads of the configuration, by outcome.', ['outcome'], ({ reloads }) =>
    reloadOutcomes.map((outcome) => [[outcome], reloads.counts[outcome]]),
  ),
  gauge('reload_seconds', 'How long the last reload took, from reading the file to its outcome.', [], ({ reloads }) =>
    reloads.last === undefined ? [] : [[[], reloads.last.seconds]],
  ),
  gauge(
    'config_last_reload_successful',
    '0 when the last reload came to nothing: the configuration that is served is not the one in the file.',
    [],
    ({ reloads: { last } }) => [[[], Number(last === undefined || last.outcome === 'committed')]],
  ),
  gauge(
    'config_last_reload_timestamp_seconds',
    'Since when the configuration that is served is served, in Unix time.',
    [],
    ({ reloads }) => [[[], reloads.since.getTime() / 1000]],
  ),
  gauge('build_info', 'Always 1; the labels say which keygate and which Node.js run.', ['version', 'node'], () => [
    [[version, process.versions.node], 1],
  ]),
];

function counter<const Labels extends readonly string[]>(
  name: `${string}_total`,
  help: string,
  labels: Labels,
  read: Read<Labels, number>,
): Family {
  return { name: `keygate_${name}`, type: 'counter', help, labels, read };
}

function gauge<const Labels extends readonly string[]>(
  name: string,
  help: string,
  labels: Labels,
  read: Read<Labels, number>,
): Family {
  return { name: `keygate_${name}`, type: 'gauge', help, labels, read };
}

function histogram<const Labels extends readonly string[]>(
  name: `${string}_seconds`,
  help: string,
  labels: Labels,
  read: Read<Labels, LatencySnapshot>,
): Family {
  return { name: `keygate_${name}`, type: 'histogram', help, labels, read };
}

/** As many values as labels: the compiler counts them. */
type Read<Labels extends readonly string[], Measured> = (
  measurements: Measurements,
) => readonly Sample<{ readonly [Index in keyof Labels]: string }, Measured>[];

/** Every reason is there from the first scrape on: a rate over a series that begins at 1 misses that 1. */
function closes({ snapshot }: Measurements): readonly Sample<readonly [string, string, string], number>[] {
  const counts = new Map(
    snapshot.closes.map(({ side, phase, reason, count }) => [`${side}/${phase}/${reason}`, count]),
  );
  return engine()
    .closeReasons()
    .map(({ side, phase, reason }) => [[side, phase, reason], counts.get(`${side}/${phase}/${reason}`) ?? 0]);
}

function asksForStatus({ listeners, policies }: Measurements['config'], name: string): boolean {
  const listener = listeners[name];
  return listener !== undefined && clientCertificatesOf(listener, policies)?.ocsp !== undefined;
}

function servers({
  snapshot,
}: Measurements): readonly Sample<readonly [string, string], EngineSnapshot['upstreams'][number]['servers'][number]>[] {
  return snapshot.upstreams.flatMap(({ name, servers: all }) =>
    all.map((server) => [[name, server.address], server] as const),
  );
}

function perWorker<Use>(
  bySlot: ReadonlyMap<number, Use>,
  read: (use: Use) => number,
): readonly Sample<readonly [string], number>[] {
  return [...bySlot].map(([slot, use]) => [[String(slot)], read(use)]);
}

function logLines({ logs, snapshot: { access } }: Measurements): readonly Sample<readonly [string, string], number>[] {
  const lines = (['event', 'access', 'key'] as const).flatMap((log) =>
    (['written', 'dropped'] as const).map((outcome) => {
      const sum = logs.reduce((count, counts) => count + counts[log][outcome], 0);
      return [[log, outcome], sum] as const;
    }),
  );
  return [...lines, [['access', 'sampled_out'], access.sampledOut], [['access', 'rate_limited'], access.rateLimited]];
}

/** Dead workers say nothing of what is up, and where no worker says anything nothing is. */
function upForAll(up: boolean, { workers }: Measurements): number {
  return Number(up && workers.some(({ state }) => state === 'ready'));
}

function familyText({ name, type, help, labels, read }: Family, measurements: Measurements): string {
  let text = `# HELP ${name} ${help}\n# TYPE ${name} ${type}\n`;
  for (const [values, value] of read(measurements)) {
    const pairs = labels.map((label, index) => `${label}="${escaped(values[index] ?? '')}"`).join(',');
    text += typeof value === 'number' ? `${name}${braced(pairs)} ${value}\n` : histogramText(name, pairs, value);
  }
  return text;
}

/** Prometheus' buckets count everything up to their bound, the engine's only what is above the bound before. */
function histogramText(name: string, pairs: string, { buckets, sumUs }: LatencySnapshot): string {
  const bucket = `${name}_bucket{${pairs === '' ? '' : `${pairs},`}le="`;
  let count = 0;
  let text = '';
  for (const [index, bound] of latencyBounds().entries()) {
    count += buckets[index] ?? 0;
    text += `${bucket}${bound}"} ${count}\n`;
  }
  return `${text}${name}_sum${braced(pairs)} ${sumUs / 1e6}\n${name}_count${braced(pairs)} ${count}\n`;
}

let bounds: readonly string[] | undefined;

/** In seconds. */
function latencyBounds(): readonly string[] {
  bounds ??= [
    ...engine()
      .latencyBoundsUs()
      .map((us) => String(us / 1e6)),
    '+Inf',
  ];
  return bounds;
}

function braced(pairs: string): string {
  return pairs === '' ? '' : `{${pairs}}`;
}

/** Names from a configuration have none of these, addresses of upstream servers may. */
function escaped(value: string): string {
  return /["\\\n]/.test(value) ? value.replaceAll('\\', '\\\\').replaceAll('"', '\\"').replaceAll('\n', '\\n') : value;
}

/** Of what prom-client knows about a process: what tells a sick primary, under the names that dashboards know. */
const processFamilies: ReadonlySet<string> = new Set([
  'process_cpu_seconds_total',
  'process_start_time_seconds',
  'process_resident_memory_bytes',
  'process_open_fds',
  'process_max_fds',
  'nodejs_eventloop_lag_p99_seconds',
  'nodejs_eventloop_lag_max_seconds',
  'nodejs_heap_size_used_bytes',
  'nodejs_gc_duration_seconds',
]);

let observed: Registry | undefined;

/** Made by the first scrape: it measures the event loop from then on, which a process that nobody scrapes is spared. */
function processRegistry(): Registry {
  if (observed === undefined) {
    observed = new Registry();
    collectDefaultMetrics({ register: observed });
  }
  return observed;
}
