/**
 * Owns: costs that grow with the configuration as a scenario: two subjects, keygate with much of everything and with one of each.
 * Must not know: how they are measured.
 * Runs: in the benchmark's process, which is idle while something is measured.
 */
import { measureGrowth } from '../growth.ts';
import type { GrowthBed } from '../growth.ts';
import type { MetricName, Sample } from '../metrics.ts';
import type { ScenarioResult } from '../result.ts';
import type { Scenario } from '../scenarios.ts';
import { parameter } from './running.ts';
import type { Pace } from './workload.ts';

const metrics: readonly MetricName[] = [
  'handshake_cpu_us',
  'start_ms',
  'start_cpu_ms',
  'reload_ms',
  'certificate_bytes',
  'scrape_cpu_ms',
  'scrape_bytes',
];
/** One takes a fraction of the clock's tick. */
const scrapes = 50;

/** @throws when a keygate does not start, a handshake fails, or an answer is not what it must be. */
export async function growth(
  scenario: Scenario,
  bed: GrowthBed,
  { rounds, seconds, connections }: Pace,
  progress: (line: string) => void,
): Promise<ScenarioResult> {
  const { name, title, workload, goals, parameters } = scenario;
  const [certificates, listeners] = [parameter(scenario, 'certificates'), parameter(scenario, 'listeners')];
  const grown = await measureGrowth(bed, { certificates, listeners, scrapes, seconds, connections, rounds }, progress);
  const much = grown.map((round): Sample => ({
    handshake_cpu_us: round.handshake_cpu_us,
    start_ms: round.start_ms,
    start_cpu_ms: round.start_cpu_ms,
    reload_ms: round.reload_ms,
    certificate_bytes: round.certificate_bytes,
    scrape_cpu_ms: round.scrape_cpu_ms,
    scrape_bytes: round.scrape_bytes,
  }));
  // Without the bytes of a certificate more: they are the difference between the two.
  const one = grown.map((round): Sample => ({
    handshake_cpu_us: round.one_handshake_cpu_us,
    start_ms: round.one_start_ms,
    start_cpu_ms: round.one_start_cpu_ms,
    reload_ms: round.one_reload_ms,
    scrape_cpu_ms: round.one_scrape_cpu_ms,
    scrape_bytes: round.one_scrape_bytes,
  }));
  return {
    name,
    title,
    workload,
    metrics: [...metrics],
    subjects: [
      { contender: 'keygate', title: `keygate, ${certificates} certificates; ${listeners} listeners`, rounds: much },
      { contender: 'keygate', title: 'keygate, one of each', rounds: one },
    ],
    left_out: [],
    goals: goals.map((goal) => ({ ...goal })),
    parameters: { ...parameters },
  };
}
