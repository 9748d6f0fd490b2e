/**
 * Owns: the workload that asks how much of what the token can sign arrives as handshakes: as many threads as keygate has lanes
 * sign in a loop on the subject's cores, and right after that the subject shakes hands on them.
 * Must not know: who answers.
 * Runs: in the benchmark's process, which is idle while a round runs.
 */
import { tokenRate } from '../token-rate.ts';
import { milliseconds, shares, sum } from './running.ts';
import { shakeHands, warmUpHandshakes } from './handshakes.ts';
import type { Workload } from './workload.ts';

export const saturation: Workload = {
  metrics: [
    'token_share',
    'token_signatures_per_second',
    'handshakes_per_second',
    'handshake_cpu_us',
    'handshake_p50_ms',
    'handshake_p99_ms',
    'core_share',
    'strangers_share',
    'failures',
  ],
  upstream: 'line',
  async warmUp(running, pace) {
    await warmUpHandshakes(running, pace);
  },
  async round(running, pace) {
    const { keys, setting, cores } = running;
    const signaturesPerSecond = await tokenRate(keys, setting, cores.subject, pace.seconds / 2);
    const { result, used } = await shakeHands(running, pace);
    const handshakesPerSecond = result.handshakes / result.seconds;
    return {
      token_share: handshakesPerSecond / signaturesPerSecond,
      token_signatures_per_second: signaturesPerSecond,
      handshakes_per_second: handshakesPerSecond,
      handshake_cpu_us: (used.cpuSeconds / result.handshakes) * 1e6,
      handshake_p50_ms: milliseconds(result.handshakeUs, 'p50'),
      handshake_p99_ms: milliseconds(result.handshakeUs, 'p99'),
      ...shares(used),
      failures: sum(result.failures),
    };
  },
};
