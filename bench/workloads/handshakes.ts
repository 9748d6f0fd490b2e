/**
 * Owns: the workloads of short connections, closed loop: connect, handshake, one line or one HTTP request there and its answer
 * back, close, again.
 * Must not know: who answers.
 * Runs: in the benchmark's process, which is idle while a round runs.
 */
import { runHandshakes } from '../load.ts';
import type { HandshakesPlan, HandshakesResult } from '../load.ts';
import type { MetricName } from '../metrics.ts';
import type { CpuUsed } from '../processes.ts';
import { expectNegotiated, metered, milliseconds, shares, sum, target } from './running.ts';
import type { Pace, Running, Workload } from './workload.ts';

export const handshakes = shortConnections('line', ['handshake_cpu_us', 'handshakes_per_second']);

/** Compared by what is done and not by what it costs: for a token that takes its time while the CPU waits. */
export const handshakeRate = shortConnections('line', ['handshakes_per_second', 'handshake_cpu_us']);

export const httpClose = shortConnections('http', ['handshake_cpu_us', 'handshakes_per_second']);

function shortConnections(exchange: 'line' | 'http', first: readonly MetricName[]): Workload {
  return {
    metrics: [...first, 'handshake_p50_ms', 'handshake_p99_ms', 'core_share', 'strangers_share', 'failures'],
    upstream: exchange,
    async warmUp(running, pace) {
      await warmUpHandshakes(running, pace, { exchange });
    },
    async round(running, pace) {
      const { result, used } = await shakeHands(running, pace, { exchange });
      return {
        handshake_cpu_us: (used.cpuSeconds / result.handshakes) * 1e6,
        handshakes_per_second: result.handshakes / result.seconds,
        handshake_p50_ms: milliseconds(result.handshakeUs, 'p50'),
        handshake_p99_ms: milliseconds(result.handshakeUs, 'p99'),
        ...shares(used),
        failures: sum(result.failures),
      };
    },
  };
}

/** Also waits for the login to the token: until then connections wait in the accept queue. */
export async function warmUpHandshakes(
  running: Running,
  pace: Pace,
  more: Partial<HandshakesPlan> = {},
): Promise<void> {
  await shakeHands(running, { ...pace, seconds: Math.min(pace.seconds, warmUpSecondsMax) }, more);
}

/** Caches, branch predictors, memory pools and just-in-time compilers have seen it all by then. */
const warmUpSecondsMax = 0.5;

/**
 * One run of the load, with what the subject used meanwhile.
 * @param more what this load does besides what the setting says.
 * @throws when another thing was negotiated than the setting says.
 */
export async function shakeHands(
  running: Running,
  { seconds, connections }: Pick<Pace, 'seconds' | 'connections'>,
  more: Partial<HandshakesPlan> = {},
): Promise<{ readonly result: HandshakesResult; readonly used: CpuUsed }> {
  const { resume } = running.setting;
  const plan: HandshakesPlan = { ...target(running), resume, connections, seconds, ...more };
  const { result, used } = await metered(running, (started) =>
    runHandshakes(running.loadProgram, running.cores.load, plan, started),
  );
  expectNegotiated(running, result, {
    'tickets per handshake': [resume ? 1 : 0, Math.round((result.tickets / result.handshakes) * 100) / 100],
  });
  return { result, used };
}
