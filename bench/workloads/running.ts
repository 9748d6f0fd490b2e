/**
 * Owns: what every workload does with a subject: how the load reaches it, what it used meanwhile, what it must have negotiated.
 * Must not know: any workload.
 * Runs: in the benchmark's process, which is idle while a round runs.
 */
import type { ClientPlan, Failures, Latency, Outcome } from '../load.ts';
import { suiteOf } from '../negotiation.ts';
import { CpuMeter } from '../processes.ts';
import type { CpuUsed } from '../processes.ts';
import type { Parameters, Scenario } from '../scenarios.ts';
import type { Running } from './workload.ts';

/** What clients of every kind must know of the subject. */
export function target({ address, keys, setting }: Running): ClientPlan {
  const { key, tls, group, certificates } = setting;
  const several = certificates > 1 ? { serverName: `n{0..${certificates - 1}}.bench.test` } : {};
  return { to: address, certificate: keys.files[key].certificate, tls, group, ...several };
}

/** @param load calls `started` after the clients' warm-up, which is part of no number. */
export async function metered<Result extends { readonly seconds: number }>(
  { pinned, cores }: Running,
  load: (started: () => void) => Promise<Result>,
): Promise<{ readonly result: Result; readonly used: CpuUsed }> {
  const meter = new CpuMeter(pinned, cores.subject);
  const result = await load(() => meter.start());
  return { result, used: meter.stop(result.seconds) };
}

/** How busy the subject's cores were, for every sample. */
export function shares({ coreShare, strangersShare }: CpuUsed): Record<'core_share' | 'strangers_share', number> {
  return { core_share: coreShare, strangers_share: strangersShare };
}

/** @throws when there was nothing to measure. */
export function milliseconds(latency: Pick<Latency, 'p50' | 'p99'>, percentile: 'p50' | 'p99'): number {
  const us = latency[percentile];
  if (us === null) throw new Error(`no ${percentile}: nothing has been done`);
  return us / 1000;
}

/** For a message. */
export function reasons({ failures, tlsError }: Pick<Outcome, 'failures' | 'tlsError'>): string {
  return `failures ${JSON.stringify(failures)}, first of TLS: ${tlsError ?? 'none'}`;
}

export function sum(failures: Failures): number {
  return Object.values(failures).reduce((total, count) => total + count, 0);
}

/** What the scenario says for its workload. @throws when it does not. */
export function parameter(scenario: Scenario, name: keyof Parameters): number {
  const value = scenario.parameters?.[name];
  if (value === undefined) throw new Error(`scenario ${scenario.name}: parameter ${name} is missing`);
  return value;
}

/**
 * A subject that does less work than the others must not win by it.
 * @param more what else has been looked at: by name, expected and found.
 * @throws when another thing was negotiated than the setting says.
 */
export function expectNegotiated(
  { title, scenario, setting }: Running,
  { negotiated, deviations, ...how }: Outcome,
  more: Readonly<Record<string, readonly [expected: unknown, found: unknown]>> = {},
): void {
  const compared: typeof more = {
    protocol: [`TLSv1_${setting.tls.slice(2)}`, negotiated?.protocol],
    // rustls' own spelling of the suites of TLS 1.3.
    suite: [suiteOf(setting).iana.replace(/^TLS_AES/, 'TLS13_AES'), negotiated?.cipherSuite],
    // A resumed TLS 1.2 session has no key exchange, RFC 5246 section 7.3.
    group: [setting.resume && setting.tls === '1.2' ? null : setting.group, negotiated?.group],
    resumed: [setting.resume, negotiated?.resumed],
    deviations: [0, deviations],
    ...more,
  };
  const wrong = Object.entries(compared).filter(([, [expected, found]]) => expected !== found);
  if (wrong.length === 0) return;
  const list = wrong.map(
    ([name, [expected, found]]) => `${name}: expected ${String(expected)}, found ${String(found)}`,
  );
  throw new Error(`${title} in ${scenario.name}: ${list.join('; ')}; ${reasons(how)}`);
}
