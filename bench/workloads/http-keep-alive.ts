/**
 * Owns: the workload of HTTP requests over connections that stay open, by autocannon.
 * Must not know: who answers, how autocannon is run.
 * Runs: in the benchmark's process, which is idle while a round runs.
 */
import { runRequests } from '../autocannon.ts';
import type { RequestsResult } from '../autocannon.ts';
import type { CpuUsed } from '../processes.ts';
import { metered, milliseconds, shares, target } from './running.ts';
import type { Pace, Running, Workload } from './workload.ts';

export const httpKeepAlive: Workload = {
  metrics: [
    'request_cpu_us',
    'requests_per_second',
    'request_p50_ms',
    'request_p99_ms',
    'core_share',
    'strangers_share',
    'failures',
  ],
  upstream: 'http',
  async warmUp(running, pace) {
    await request(running, { ...pace, seconds: Math.min(pace.seconds, warmUpSecondsMax) });
  },
  async round(running, pace) {
    const { result, used } = await request(running, pace);
    return {
      request_cpu_us: (used.cpuSeconds / result.requests) * 1e6,
      requests_per_second: result.requests / result.seconds,
      request_p50_ms: milliseconds(result.requestUs, 'p50'),
      request_p99_ms: milliseconds(result.requestUs, 'p99'),
      ...shares(used),
      failures: result.failures,
    };
  },
};

const warmUpSecondsMax = 0.5;

/** @throws when the subject does other work than the setting says. */
function request(running: Running, { connections, seconds }: Pace): Promise<{ result: RequestsResult; used: CpuUsed }> {
  const { to, certificate } = target(running);
  const plan = { to, certificate, setting: running.setting, connections, seconds };
  return metered(running, (started) => runRequests(running.cores.load, plan, started));
}
