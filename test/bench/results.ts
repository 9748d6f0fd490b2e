/**
 * Owns: results that nobody has measured, for the tests of what is made of them.
 * Must not know: what is made of them.
 * Runs: in test processes.
 */
import type { Result, ScenarioResult, SubjectResult } from '../../bench/result.ts';
import type { Sample } from '../../bench/metrics.ts';

export function aResult(...scenarios: readonly ScenarioResult[]): Result {
  return {
    format: 2,
    started_at: '2026-11-24T09:00:00.000Z',
    machine: {
      cpu: 'a CPU',
      cpu_flags: ['avx2'],
      cores: 2,
      memory_bytes: 24 * 2 ** 30,
      kernel: '6.1',
      load_average: [0.5, 1, 2],
    },
    pace: { rounds: 5, seconds: 2, connections: 16 },
    versions: { keygate: { keygate: '0.1.0 (aaaaaaa)' }, nginx: { nginx: '1.22', openssl: '3.0' } },
    scenarios: [...scenarios],
    failed: [],
  };
}

export function aScenario(subjects: readonly SubjectResult[], more: Partial<ScenarioResult> = {}): ScenarioResult {
  return {
    name: 'full',
    title: 'full handshakes',
    workload: 'handshakes',
    metrics: ['handshake_cpu_us', 'handshakes_per_second', 'core_share', 'failures'],
    subjects: [...subjects],
    left_out: [],
    goals: [],
    ...more,
  };
}

/** Of so many microseconds in each round. */
export function aSubject(contender: string, cpuUs: readonly number[], more: Sample = {}): SubjectResult {
  return {
    contender,
    title: `${contender}, key in a token`,
    rounds: cpuUs.map((us) => ({
      handshake_cpu_us: us,
      handshakes_per_second: 1e6 / us,
      core_share: 0.9,
      failures: 0,
      ...more,
    })),
  };
}

/** Five rounds, a few per cent apart. */
export function around(value: number): number[] {
  return [0.98, 1.01, 1, 0.99, 1.02].map((factor) => value * factor);
}
