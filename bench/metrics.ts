/**
 * Owns: the numbers that a round can have: their names, units and which way is better.
 * Must not know: how any of them is measured.
 * Runs: anywhere.
 */

export interface Metric {
  /** For people, with the unit. */
  readonly title: string;
  readonly better: 'less' | 'more' | 'neither';
  /** After the decimal point, in tables. */
  readonly digits: number;
  /** Shown as the sum of all rounds: a median would hide the one that failed. */
  readonly total?: true;
}

/** Names end in their unit. Times are those of the round, CPU is user + system of all processes of who is measured. */
export const metrics = {
  handshake_cpu_us: { title: 'CPU µs/handshake', better: 'less', digits: 0 },
  handshakes_per_second: { title: 'handshakes/s', better: 'more', digits: 0 },
  handshake_p50_ms: { title: 'handshake p50 ms', better: 'less', digits: 2 },
  handshake_p99_ms: { title: 'handshake p99 ms', better: 'less', digits: 2 },
  /** Of its cores; well below 1 means that the load, the token or others set the pace. */
  core_share: { title: 'core used by it', better: 'neither', digits: 2 },
  /** What others used of its cores: the noise. */
  strangers_share: { title: 'by others', better: 'neither', digits: 2 },
  failures: { title: 'failures', better: 'less', digits: 0, total: true },
  /** Of the signatures that the token makes in the same time when nothing else is asked of it. */
  token_share: { title: "share of the token's rate", better: 'more', digits: 2 },
  token_signatures_per_second: { title: 'token signatures/s', better: 'neither', digits: 0 },
  /** Successful handshakes/s under twice the load that it can take, of those that it makes in a closed loop. */
  goodput_share: { title: 'goodput at 2x ÷ capacity', better: 'more', digits: 2 },
  /** Of the connections that were to begin. */
  unserved_share: { title: 'not served', better: 'less', digits: 2 },
  relay_cpu_s_per_gib: { title: 'CPU s/GiB', better: 'less', digits: 2 },
  relay_gib_per_second: { title: 'GiB/s', better: 'more', digits: 2 },
  message_cpu_us: { title: 'CPU µs/message', better: 'less', digits: 1 },
  messages_per_second: { title: 'messages/s', better: 'more', digits: 0 },
  echo_p50_ms: { title: 'echo p50 ms', better: 'less', digits: 2 },
  echo_p99_ms: { title: 'echo p99 ms', better: 'less', digits: 2 },
  quiet_echo_p99_ms: { title: 'echo p99 ms before', better: 'less', digits: 2 },
  /** p99 of the echo during the storm divided by its own p99 before it. */
  storm_p99_ratio: { title: 'echo p99 storm ÷ quiet', better: 'less', digits: 2 },
  request_cpu_us: { title: 'CPU µs/request', better: 'less', digits: 0 },
  requests_per_second: { title: 'requests/s', better: 'more', digits: 0 },
  request_p50_ms: { title: 'request p50 ms', better: 'less', digits: 2 },
  request_p99_ms: { title: 'request p99 ms', better: 'less', digits: 2 },
  idle_connections: { title: 'idle connections', better: 'more', digits: 0 },
  idle_connection_bytes: { title: 'bytes/idle connection', better: 'less', digits: 0 },
  ramp_connections_per_second: { title: 'connections/s in the ramp', better: 'more', digits: 0 },
  reloads: { title: 'reloads', better: 'neither', digits: 0 },
  reload_ms: { title: 'reload ms', better: 'less', digits: 0 },
  start_ms: { title: 'start ms', better: 'less', digits: 0 },
  start_cpu_ms: { title: 'CPU ms/start', better: 'less', digits: 0 },
  certificate_bytes: { title: 'bytes/certificate', better: 'less', digits: 0 },
  scrape_cpu_ms: { title: 'CPU ms/scrape', better: 'less', digits: 2 },
  scrape_bytes: { title: 'bytes/scrape', better: 'less', digits: 0 },
} as const satisfies Record<string, Metric>;

export type MetricName = keyof typeof metrics;

/** What one round says; only what its workload measures. */
export type Sample = Readonly<Partial<Record<MetricName, number>>>;

/** As in tables. Small numbers get more digits: 0.01 of a GiB/s would hide what is compared. */
export function numberText(metric: MetricName): (value: number) => string {
  const { digits } = metrics[metric];
  const more = (value: number) => (value < 10 ** -digits ? 2 : value < 10 ** (1 - digits) ? 1 : 0);
  return (value) => value.toFixed(digits > 0 && value !== 0 ? digits + more(value) : digits);
}
