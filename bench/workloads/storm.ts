/**
 * Owns: the workload of established connections in a storm of handshakes: the latency of their echo before it and in it.
 * Must not know: who answers.
 * Runs: in the benchmark's process, which is idle while a round runs.
 */
import type { HandshakesResult } from '../load.ts';
import { echoFor, warmUpEcho } from './echo.ts';
import { shakeHands } from './handshakes.ts';
import { milliseconds, parameter, shares, sum } from './running.ts';
import type { Pace, Running, Workload } from './workload.ts';

export const storm: Workload = {
  metrics: [
    'storm_p99_ratio',
    'quiet_echo_p99_ms',
    'echo_p50_ms',
    'echo_p99_ms',
    'handshakes_per_second',
    'core_share',
    'strangers_share',
    'failures',
  ],
  upstream: 'echo',
  async warmUp(running, pace) {
    await warmUpEcho(running, pace);
    await shakeHands(running, { ...pace, connections: 1 }, { exchange: 'none' });
  },
  async round(running, pace) {
    const { result: quiet } = await echoFor(running, pace);
    // The storm begins when the echo's connections are established and ends after the last echo.
    let raging: Promise<HandshakesResult> | undefined;
    const { result: echoed, used } = await echoFor(running, pace, () => {
      raging = rage(running, pace);
      // Its failure is awaited below; until then it is nobody's.
      raging.catch(() => {});
    });
    const raged = await raging;
    if (raged === undefined) throw new Error('the echo did not start');
    const [quietMs, stormMs] = [quiet, echoed].map(({ latencyUs }) => milliseconds(latencyUs, 'p99')) as [
      number,
      number,
    ];
    return {
      storm_p99_ratio: stormMs / quietMs,
      quiet_echo_p99_ms: quietMs,
      echo_p50_ms: milliseconds(echoed.latencyUs, 'p50'),
      echo_p99_ms: stormMs,
      handshakes_per_second: raged.handshakes / raged.seconds,
      ...shares(used),
      failures: sum(quiet.failures) + sum(echoed.failures),
    };
  },
};

/**
 * Yields, so that an echo waits for who is measured and not for the clients of the storm, which share the echo's core.
 * Whether the subject can keep up is its business: what could not begin is no failure of who is measured here.
 */
async function rage(running: Running, { seconds }: Pace): Promise<HandshakesResult> {
  const rate = parameter(running.scenario, 'stormPerSecond');
  const { result } = await shakeHands(
    running,
    { seconds, connections: inFlightMax },
    { rate, exchange: 'none', yielding: true },
  );
  return result;
}

/** Of the storm. */
const inFlightMax = 256;
