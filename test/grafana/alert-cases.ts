/**
 * Owns: series for each alert, one a minute, in promtool's notation: with which it fires and with which it must not.
 * Must not know: the rules.
 * Runs: in test processes.
 */

/** Values by series. */
export type Series = Readonly<Record<string, string>>;

export interface AlertCase {
  readonly fires: Series;
  /** At the limit, below it, and across a restart. */
  readonly quiet: readonly Series[];
  /** Of the alert that fires, beside its severity. */
  readonly labels: Readonly<Record<string, string>>;
  /** What the alert says. */
  readonly description: string;
  /** Minutes after which it fires. */
  readonly at?: number;
}

export function minutesOf(duration: string): number {
  const [, number, unit] = /^(\d+)([mh])$/.exec(duration) ?? [];
  if (number === undefined) throw new Error(`not a duration in minutes or hours: ${duration}`);
  return Number(number) * (unit === 'h' ? 60 : 1);
}

const a = { job: 'keygate', instance: 'a' };
type Labels = Readonly<Record<string, string>>;

/** Of instance a unless the labels say otherwise. */
function series(name: string, labels: Labels = {}): string {
  const pairs = Object.entries({ ...a, ...labels }).map(([label, value]) => `${label}="${value}"`);
  return `${name}{${pairs.join(',')}}`;
}

/** The same value all the time. */
const steady = (value: number): string => `${value}x120`;
const growing = (perMinute: number, minutes = 120): string => `0+${perMinute}x${minutes}`;
/** Counted to a number long ago, and begins anew at 0 after a quarter of an hour. */
const restarted = (value: number): string => `${value}x15 0x105`;
/** Grows all the time, and begins anew after a quarter of an hour. */
const restartedGrowing = (perMinute: number): string => `0+${perMinute}x15 0+${perMinute}x105`;
/** One step after a quarter of an hour. */
const step = (from: number, to: number): string => `${from}x15 ${to}x105`;

function closed(side: string, phase: string, reason: string): string {
  return series('keygate_connections_closed_total', { side, phase, reason });
}

const fullHandshakes = (perMinute: number | string): Series => ({
  [series('keygate_handshake_seconds_count', { listener: 'https', protocol: 'TLSv1.3', resumed: 'false' })]:
    typeof perMinute === 'string' ? perMinute : growing(perMinute),
});

/** A histogram that grows by `counts` a minute, by upper bound in seconds; cumulative as Prometheus has it. */
function latencies(name: string, labels: Labels, counts: Readonly<Record<string, number>>, values = growing): Series {
  return Object.fromEntries(
    Object.entries(counts).map(([le, count]) => [series(`${name}_bucket`, { ...labels, le }), values(count)]),
  );
}

/** For an alert on any increase of one counter: quiet while it stands, and when it begins anew. */
function anyIncrease(name: string, labels: Labels, description: string, at = 17): AlertCase {
  return {
    fires: { [name]: step(4, 6) },
    quiet: [{ [name]: steady(4) }, { [name]: restarted(4) }],
    labels: { ...a, ...labels },
    description,
    at,
  };
}

/** For an alert on a ratio of two gauges. */
function saturation(used: string, limit: string, labels: Labels, description: string, share = 0.8): AlertCase {
  return {
    fires: { [used]: steady(share * 1000 + 50), [limit]: steady(1000) },
    quiet: [
      { [used]: steady(share * 1000), [limit]: steady(1000) },
      { [used]: steady(0), [limit]: steady(1000) },
    ],
    labels: { ...a, ...labels },
    description,
  };
}

/** For an alert on a gauge that is 1 when all is well. */
function down(name: string, labels: Labels, description: string): AlertCase {
  return {
    fires: { [name]: steady(0) },
    quiet: [{ [name]: steady(1) }, { [name]: `1x15 0 1x105` }],
    labels: { ...a, ...labels },
    description,
  };
}

const token = { token: 'hsm' };
const upstream = { upstream: 'web', server: '10.0.0.1:80' };
const finding = { upstream: 'web', reason: 'expired', outcome: 'reported' };
const signSeconds = { ...token, mechanism: 'ecdsa' };
const daySeconds = 86_400;

const certificate = (daysLeft: number): Series => ({
  [series('keygate_certificate_expiry_timestamp_seconds', { certificate: 'www' })]: steady(
    daysLeft * daySeconds + 1800,
  ),
});

/** `time()` begins at 0 and is half an hour when it is looked at. */
function expiry(daysLeft: number, quiet: readonly number[], description: string): AlertCase {
  return {
    fires: certificate(daysLeft),
    quiet: quiet.map(certificate),
    labels: { ...a, certificate: 'www' },
    description,
  };
}

export const alertCases: Readonly<Record<string, AlertCase>> = {
  KeygateDown: {
    ...down(series('up'), {}, 'a has not answered for a minute.'),
    quiet: [
      { [series('up')]: steady(1) },
      { [series('up')]: '1x15 0 1x105' },
      { [series('up', { job: 'other' })]: steady(0) },
    ],
  },
  KeygateAbsent: {
    fires: { [series('up', { job: 'other' })]: steady(1) },
    quiet: [{ [series('up')]: steady(0) }],
    labels: { job: 'keygate' },
    description: 'No target of the job "keygate" for five minutes.',
  },
  KeygateNotReady: down(series('keygate_ready'), {}, 'a has said 503 to /ready for a minute.'),
  KeygateScrapeSlow: {
    fires: { [series('scrape_duration_seconds')]: steady(2.5) },
    quiet: [
      { [series('scrape_duration_seconds')]: steady(2) },
      { [series('scrape_duration_seconds', { job: 'other' })]: steady(9) },
    ],
    labels: a,
    description: 'A scrape of a takes 2.5s.',
  },
  KeygateVersionsDiffer: {
    fires: {
      [series('keygate_build_info', { version: '1.0.0' })]: steady(1),
      [series('keygate_build_info', { instance: 'b', version: '1.1.0' })]: steady(1),
    },
    quiet: [
      {
        [series('keygate_build_info', { version: '1.0.0' })]: steady(1),
        [series('keygate_build_info', { instance: 'b', version: '1.0.0' })]: steady(1),
      },
    ],
    labels: { job: 'keygate' },
    description: '2 versions have been running for an hour.',
    at: 90,
  },

  KeygateTokenDown: down(
    series('keygate_token_up', token),
    token,
    'a: token hsm has been down for a minute for at least one worker.',
  ),
  KeygateAllTokensDown: {
    fires: {
      [series('keygate_token_up', token)]: steady(0),
      [series('keygate_token_up', { token: 'spare' })]: steady(0),
    },
    quiet: [
      { [series('keygate_token_up', token)]: steady(0), [series('keygate_token_up', { token: 'spare' })]: steady(1) },
    ],
    labels: a,
    description:
      'a: every token has been down for a minute for at least one worker. Full handshakes fail there; resumed ones and established connections go on.',
  },
  KeygateTokenFlaps: {
    fires: { [series('keygate_token_went_down_total', token)]: step(0, 4) },
    quiet: [
      { [series('keygate_token_went_down_total', token)]: step(0, 3) },
      { [series('keygate_token_went_down_total', token)]: restarted(9) },
    ],
    labels: { ...a, ...token },
    description: 'a: token hsm went down 4 times in 30 minutes.',
  },
  KeygateTokenSlow: {
    fires: latencies('keygate_sign_seconds', signSeconds, { '0.1': 0, '0.25': 98, '1': 100, '+Inf': 100 }),
    quiet: [
      latencies('keygate_sign_seconds', signSeconds, { '0.1': 0, '0.25': 99, '1': 100, '+Inf': 100 }),
      latencies(
        'keygate_sign_seconds',
        signSeconds,
        { '0.1': 100, '0.25': 100, '1': 100, '+Inf': 100 },
        restartedGrowing,
      ),
    ],
    labels: { ...a, ...token },
    description: 'a: token hsm signs within 625ms (p99).',
  },
  KeygateTokenHangs: anyIncrease(
    closed('token', 'signing', 'deadline'),
    { side: 'token', phase: 'signing', reason: 'deadline' },
    'a: 2 handshakes failed at signDeadline in 5 minutes.',
  ),
  KeygateTokenRefuses: anyIncrease(
    closed('token', 'signing', 'token_failed'),
    { side: 'token', phase: 'signing', reason: 'token_failed' },
    'a: 2 handshakes failed with token_failed in 10 minutes.',
  ),
  KeygateWrongSignature: anyIncrease(
    series('keygate_signatures_total', { ...signSeconds, outcome: 'wrong' }),
    { ...signSeconds, outcome: 'wrong' },
    'a: token hsm made 2 wrong ecdsa signatures in 10 minutes.',
  ),
  KeygateKeyLost: anyIncrease(
    closed('token', 'signing', 'key_lost'),
    { side: 'token', phase: 'signing', reason: 'key_lost' },
    'a: 2 handshakes failed with key_lost in 10 minutes.',
  ),
  KeygateSigningFails: {
    fires: { ...fullHandshakes(90), [closed('token', 'signing', 'token_down')]: growing(10) },
    quiet: [
      { ...fullHandshakes(95), [closed('token', 'signing', 'token_down')]: growing(5) },
      { ...fullHandshakes(restartedGrowing(95)), [closed('token', 'signing', 'token_down')]: restarted(5000) },
      { ...fullHandshakes(0), [closed('client', 'handshake', 'alert')]: growing(99) },
    ],
    labels: a,
    description: 'a: 10% of the handshakes that need a signature fail for it.',
  },
  KeygateSignQueueFills: saturation(
    series('keygate_sign_queue_depth', { ...token, class: 'ec' }),
    series('keygate_sign_queue_limit', { ...token, class: 'ec' }),
    { ...token, class: 'ec' },
    'a: the ec queue of token hsm is 55% full.',
    0.5,
  ),
  KeygateSignWaitLong: {
    fires: latencies('keygate_sign_wait_seconds', token, { '0.25': 98, '1': 100, '+Inf': 100 }),
    quiet: [
      // A third of the way from 250 ms to 1 s.
      latencies('keygate_sign_wait_seconds', token, { '0.25': 98.5, '1': 100, '+Inf': 100 }),
      latencies('keygate_sign_wait_seconds', token, { '0.25': 100, '1': 100, '+Inf': 100 }, restartedGrowing),
    ],
    labels: { ...a, ...token },
    description: 'a: requests to token hsm wait up to 625ms (p99).',
  },
  KeygateSignaturesShed: anyIncrease(
    series('keygate_sign_shed_total', { ...token, reason: 'queue_full' }),
    { ...token, reason: 'queue_full' },
    'a: 2 requests to token hsm refused in 5 minutes: queue_full.',
  ),
  KeygateLanesBusy: {
    fires: {
      [series('keygate_sign_seconds_sum', signSeconds)]: growing(228),
      [series('keygate_lanes', { ...token, state: 'idle' })]: steady(4),
      [series('keygate_lanes', { ...token, state: 'lost' })]: steady(4),
    },
    quiet: [
      {
        [series('keygate_sign_seconds_sum', signSeconds)]: growing(216),
        [series('keygate_lanes', { ...token, state: 'idle' })]: steady(4),
      },
      {
        [series('keygate_sign_seconds_sum', signSeconds)]: restartedGrowing(60),
        [series('keygate_lanes', { ...token, state: 'idle' })]: steady(4),
      },
    ],
    labels: { ...a, ...token },
    description: 'a: lanes of token hsm are busy 95% of the time.',
  },
  KeygateLanesLost: {
    fires: { [series('keygate_lanes', { ...token, state: 'lost' })]: steady(2) },
    quiet: [
      { [series('keygate_lanes', { ...token, state: 'lost' })]: steady(0) },
      { [series('keygate_lanes', { ...token, state: 'busy' })]: steady(9) },
    ],
    labels: { ...a, ...token, state: 'lost' },
    description: 'a: 2 lanes of token hsm have not come back from the module.',
  },
  KeygateNoLanes: {
    fires: {
      [series('keygate_lanes', { ...token, state: 'idle' })]: steady(0),
      [series('keygate_lanes', { ...token, state: 'busy' })]: steady(0),
      [series('keygate_lanes', { ...token, state: 'lost' })]: steady(8),
    },
    quiet: [
      {
        [series('keygate_lanes', { ...token, state: 'idle' })]: steady(0),
        [series('keygate_lanes', { ...token, state: 'busy' })]: steady(1),
        [series('keygate_lanes', { ...token, state: 'lost' })]: steady(7),
      },
    ],
    labels: { ...a, ...token },
    description: 'a: token hsm has no lane left.',
  },
  KeygateRepairsOften: {
    fires: { [series('keygate_pkcs11_recoveries_total', { ...token, repair: 'logged_in' })]: step(0, 11) },
    quiet: [
      { [series('keygate_pkcs11_recoveries_total', { ...token, repair: 'logged_in' })]: step(0, 10) },
      { [series('keygate_pkcs11_recoveries_total', { ...token, repair: 'logged_in' })]: restarted(99) },
    ],
    labels: { ...a, ...token, repair: 'logged_in' },
    description: 'a: token hsm: logged_in 11 times in 15 minutes.',
    at: 20,
  },
  KeygateLoginLockHeld: anyIncrease(
    series('keygate_login_lock_timeouts_total', token),
    token,
    'a: 2 logins to token hsm went ahead without the lock in 15 minutes.',
  ),

  KeygateHandshakesFail: {
    fires: { ...fullHandshakes(90), [closed('client', 'handshake', 'deadline')]: growing(10) },
    quiet: [
      { ...fullHandshakes(95), [closed('client', 'handshake', 'deadline')]: growing(5) },
      { ...fullHandshakes(90), [closed('client', 'handshake', 'closed')]: growing(10) },
      { ...fullHandshakes(90), [closed('client', 'handshake', 'plain_http')]: growing(10) },
      // Twelve a minute are too few to say.
      { ...fullHandshakes(6), [closed('client', 'handshake', 'deadline')]: growing(6) },
      { ...fullHandshakes(restartedGrowing(95)), [closed('client', 'handshake', 'deadline')]: restarted(5000) },
    ],
    labels: a,
    description: 'a: 10% of the handshakes fail; port scans and http:// are not counted.',
  },
  KeygateMostHandshakesFail: {
    fires: { ...fullHandshakes(40), [closed('token', 'signing', 'token_down')]: growing(60) },
    quiet: [
      { ...fullHandshakes(50), [closed('token', 'signing', 'token_down')]: growing(50) },
      { ...fullHandshakes(4), [closed('token', 'signing', 'token_down')]: growing(8) },
    ],
    labels: a,
    description: 'a: 60% of the handshakes fail; port scans and http:// are not counted.',
  },
  KeygateClientsRefuse: {
    fires: { ...fullHandshakes(95), [closed('client', 'handshake', 'alert')]: growing(5) },
    quiet: [
      { ...fullHandshakes(98), [closed('client', 'handshake', 'alert')]: growing(2) },
      { ...fullHandshakes(90), [closed('client', 'handshake', 'deadline')]: growing(10) },
    ],
    labels: a,
    description: 'a: 5% of the handshakes end with an alert from the client.',
  },
  KeygateConnectionsNearLimit: saturation(
    series('keygate_connections_open', { listener: 'https' }),
    series('keygate_listener_connections_limit', { listener: 'https' }),
    { listener: 'https' },
    'a: listener https has 85% of limits.connections.',
  ),
  KeygateHandshakesNearLimit: saturation(
    series('keygate_handshakes_in_flight', { listener: 'https' }),
    series('keygate_listener_handshakes_limit', { listener: 'https' }),
    { listener: 'https' },
    'a: listener https has 85% of limits.handshakes in flight.',
  ),
  KeygateConnectionsRefused: {
    ...anyIncrease(
      closed('proxy', 'accept', 'connection_limit'),
      { side: 'proxy', phase: 'accept', reason: 'connection_limit' },
      'a: 2 connections refused in 5 minutes: connection_limit.',
    ),
    quiet: [
      { [closed('proxy', 'accept', 'connection_limit')]: restarted(4) },
      { [closed('client', 'accept', 'reset')]: growing(5) },
    ],
  },
  KeygateAcceptFails: anyIncrease(
    series('keygate_accept_failures_total', { listener: 'https' }),
    { listener: 'https' },
    'a: accept failed 2 times in 5 minutes for listener https.',
  ),

  KeygateUpstreamServerDown: down(
    series('keygate_upstream_server_up', upstream),
    upstream,
    'a: 10.0.0.1:80 of upstream web has been down for a minute for at least one worker.',
  ),
  KeygateUpstreamDown: {
    fires: {
      [series('keygate_upstream_server_up', upstream)]: steady(0),
      [series('keygate_upstream_server_up', { ...upstream, server: '10.0.0.2:80' })]: steady(0),
      [series('keygate_upstream_server_up', { upstream: 'other', server: '10.0.0.3:80' })]: steady(1),
    },
    quiet: [
      {
        [series('keygate_upstream_server_up', upstream)]: steady(0),
        [series('keygate_upstream_server_up', { ...upstream, server: '10.0.0.2:80' })]: steady(1),
      },
    ],
    labels: { ...a, upstream: 'web' },
    description: 'a: no server of upstream web has been up for a minute.',
  },
  KeygateUpstreamConnectsFail: {
    fires: {
      [series('keygate_upstream_connects_total', { ...upstream, outcome: 'ok' })]: growing(90),
      [series('keygate_upstream_connects_total', { ...upstream, outcome: 'refused' })]: growing(10),
    },
    quiet: [
      {
        [series('keygate_upstream_connects_total', { ...upstream, outcome: 'ok' })]: growing(95),
        [series('keygate_upstream_connects_total', { ...upstream, outcome: 'refused' })]: growing(5),
      },
      {
        [series('keygate_upstream_connects_total', { ...upstream, outcome: 'ok' })]: growing(50),
        [series('keygate_upstream_connects_total', { ...upstream, outcome: 'cancelled' })]: growing(50),
      },
      {
        [series('keygate_upstream_connects_total', { ...upstream, outcome: 'ok' })]: restartedGrowing(95),
        [series('keygate_upstream_connects_total', { ...upstream, outcome: 'refused' })]: restarted(5000),
      },
    ],
    labels: { ...a, upstream: 'web' },
    description: 'a: 10% of the connects to upstream web fail.',
  },
  KeygateUpstreamCertificateBad: {
    fires: { [series('keygate_upstream_certificate_findings_total', finding)]: growing(1) },
    quiet: [{ [series('keygate_upstream_certificate_findings_total', finding)]: steady(7) }],
    labels: { ...a, upstream: 'web', reason: 'expired', outcome: 'reported' },
    description: 'a: certificates of upstream web are reported as expired.',
  },
  KeygateUpstreamSlow: {
    fires: latencies('keygate_upstream_connect_seconds', upstream, { '0.25': 0, '1': 98, '5': 100, '+Inf': 100 }),
    quiet: [latencies('keygate_upstream_connect_seconds', upstream, { '0.25': 0, '1': 99, '5': 100, '+Inf': 100 })],
    labels: { ...a, upstream: 'web' },
    description: 'a: connects to upstream web take up to 3s (p99).',
  },

  KeygateCertificateExpiresInAMonth: expiry(29, [30.1, 6.9], 'a: certificate www expires in 29d 0h 0m 0s.'),
  KeygateCertificateExpiresInAWeek: expiry(6, [7.1, 0.9], 'a: certificate www expires in 6d 0h 0m 0s.'),
  KeygateCertificateExpiresInADay: expiry(0.5, [1.1], 'a: certificate www expires in 12h 0m 0s.'),
  KeygateReloadFailed: {
    ...down(
      series('keygate_config_last_reload_successful'),
      {},
      'a serves the configuration from before: its last reload was refused or rolled back.',
    ),
    quiet: [{ [series('keygate_config_last_reload_successful')]: steady(1) }],
  },
  KeygateTicketKeysOld: {
    fires: { [series('keygate_ticket_epoch_start_timestamp_seconds')]: steady(-8 * daySeconds) },
    quiet: [{ [series('keygate_ticket_epoch_start_timestamp_seconds')]: steady(-8 * daySeconds + 1800) }],
    labels: a,
    description: 'a: the ticket key is 8d 0h 30m 0s old.',
  },

  KeygateWorkerDown: down(
    series('keygate_worker_up', { worker: '1' }),
    { worker: '1' },
    'a: worker 1 has not been ready for two minutes.',
  ),
  KeygateWorkerReplaced: anyIncrease(
    series('keygate_worker_restarts_total', { worker: '1' }),
    { worker: '1' },
    'a: worker 1 was replaced 2 times in 15 minutes.',
  ),
  KeygateWorkersCrash: {
    fires: {
      [series('keygate_worker_restarts_total', { worker: '0' })]: step(0, 2),
      [series('keygate_worker_restarts_total', { worker: '1' })]: step(0, 2),
    },
    quiet: [
      {
        [series('keygate_worker_restarts_total', { worker: '0' })]: step(0, 1),
        [series('keygate_worker_restarts_total', { worker: '1' })]: step(0, 2),
      },
      { [series('keygate_worker_restarts_total', { worker: '1' })]: restarted(9) },
    ],
    labels: a,
    description: 'a: workers were replaced 4 times in 15 minutes.',
    at: 20,
  },
  KeygateDefect: anyIncrease(
    closed('proxy', 'internal', 'panic'),
    { side: 'proxy', phase: 'internal', reason: 'panic' },
    'a: 2 connections ended with panic in an hour.',
    70,
  ),
  KeygateNoMemory: anyIncrease(
    closed('proxy', 'handshake', 'no_memory'),
    { side: 'proxy', phase: 'handshake', reason: 'no_memory' },
    'a: 2 handshakes failed for want of memory in 15 minutes.',
  ),
  KeygateFilesNearLimit: {
    fires: {
      [series('process_open_fds')]: steady(30),
      [series('process_max_fds')]: steady(1000),
      [series('keygate_worker_open_fds', { worker: '1' })]: steady(850),
    },
    quiet: [
      {
        [series('process_open_fds')]: steady(800),
        [series('process_max_fds')]: steady(1000),
        [series('keygate_worker_open_fds', { worker: '1' })]: steady(800),
      },
    ],
    labels: { ...a, worker: '1', process: 'worker 1' },
    description: 'a: worker 1 has 85% of its descriptors open.',
  },
  KeygatePrimaryLags: {
    fires: { [series('nodejs_eventloop_lag_p99_seconds')]: steady(0.75) },
    quiet: [
      { [series('nodejs_eventloop_lag_p99_seconds')]: steady(0.5) },
      { [series('nodejs_eventloop_lag_p99_seconds', { job: 'other' })]: steady(9) },
    ],
    labels: a,
    description: 'a: the event loop of the primary lags 750ms (p99).',
  },
  KeygateWorkerLags: {
    fires: { [series('keygate_worker_event_loop_lag_seconds', { worker: '1' })]: steady(1.5) },
    quiet: [{ [series('keygate_worker_event_loop_lag_seconds', { worker: '1' })]: steady(1) }],
    labels: { ...a, worker: '1' },
    description: 'a: the event loop of worker 1 lags 1.5s.',
  },
  KeygateWorkerSaturated: {
    fires: { [series('keygate_worker_io_cpu_seconds_total', { worker: '1' })]: growing(57) },
    quiet: [
      { [series('keygate_worker_io_cpu_seconds_total', { worker: '1' })]: growing(54) },
      { [series('keygate_worker_io_cpu_seconds_total', { worker: '1' })]: restartedGrowing(30) },
    ],
    labels: { ...a, worker: '1' },
    description: 'a: the I/O thread of worker 1 is busy 95% of the time.',
  },
  KeygateLogLinesDropped: {
    ...anyIncrease(
      series('keygate_log_lines_total', { log: 'access', outcome: 'dropped' }),
      { log: 'access' },
      'a: 2 lines of the access log dropped in 10 minutes.',
    ),
    quiet: [
      { [series('keygate_log_lines_total', { log: 'access', outcome: 'dropped' })]: restarted(9) },
      { [series('keygate_log_lines_total', { log: 'access', outcome: 'rate_limited' })]: growing(9) },
    ],
  },
  KeygateKeyLogEnabled: {
    fires: { [series('keygate_key_log_enabled')]: steady(1) },
    quiet: [{ [series('keygate_key_log_enabled')]: steady(0) }],
    labels: a,
    description: 'a writes a key log: who reads it can read the traffic.',
  },
  KeygateSandboxOff: down(
    series('keygate_worker_sandbox', { worker: '1', mechanism: 'landlock' }),
    { worker: '1', mechanism: 'landlock' },
    'a: worker 1 runs without landlock.',
  ),
};
