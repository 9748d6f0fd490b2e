/**
 * Owns: the workload of twice as many new connections as the subject can take: what it still serves, and how long that takes.
 * Must not know: who answers.
 * Runs: in the benchmark's process, which is idle while a round runs.
 */
import { milliseconds, shares, sum } from './running.ts';
import { shakeHands, warmUpHandshakes } from './handshakes.ts';
import type { Workload } from './workload.ts';

export const overload: Workload = {
  metrics: [
    'goodput_share',
    'handshakes_per_second',
    'unserved_share',
    'handshake_p50_ms',
    'handshake_p99_ms',
    'handshake_cpu_us',
    'core_share',
    'strangers_share',
  ],
  upstream: 'line',
  async warmUp(running, pace) {
    await warmUpHandshakes(running, pace);
  },
  async round(running, pace) {
    // In the same round: what the machine gives today is what is asked for twice.
    const { result: calm } = await shakeHands(running, pace);
    const capacity = calm.handshakes / calm.seconds;
    const { result, used } = await shakeHands(
      running,
      { seconds: pace.seconds, connections: inFlightMax },
      { rate: Math.round(capacity * 2), deadlineSeconds },
    );
    const goodput = result.handshakes / result.seconds;
    return {
      goodput_share: goodput / capacity,
      handshakes_per_second: goodput,
      unserved_share: sum(result.failures) / result.intended,
      handshake_p50_ms: milliseconds(result.handshakeUs, 'p50'),
      handshake_p99_ms: milliseconds(result.handshakeUs, 'p99'),
      handshake_cpu_us: (used.cpuSeconds / result.handshakes) * 1e6,
      ...shares(used),
    };
  },
};

/** Clients beyond these find no place: a crowd, but a finite one. */
const inFlightMax = 1024;
/** Nobody waits longer for a page. */
const deadlineSeconds = 5;
