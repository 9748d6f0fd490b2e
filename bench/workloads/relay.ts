/**
 * Owns: the workloads of bulk in one direction: what a GiB costs, in writes of a given size.
 * Must not know: who relays.
 * Runs: in the benchmark's process, which is idle while a round runs.
 */
import { runRelay } from '../load.ts';
import type { RelayResult } from '../load.ts';
import type { CpuUsed } from '../processes.ts';
import { expectNegotiated, metered, parameter, reasons, shares, sum, target } from './running.ts';
import type { Pace, Running, Workload } from './workload.ts';

/** From the client to the upstream. */
export const relayUp = relay('up');

/** From the upstream to the client. */
export const relayDown = relay('down');

function relay(direction: 'up' | 'down'): Workload {
  return {
    metrics: ['relay_cpu_s_per_gib', 'relay_gib_per_second', 'core_share', 'strangers_share', 'failures'],
    upstream: direction === 'up' ? 'sink' : 'source',
    upstreamPlan: (scenario) => (direction === 'up' ? {} : { message: parameter(scenario, 'messageBytes') }),
    async warmUp(running, pace) {
      await relayFor(running, direction, { ...pace, seconds: Math.min(pace.seconds, warmUpSecondsMax) });
    },
    async round(running, pace) {
      const { result, used } = await relayFor(running, direction, pace);
      const gib = (direction === 'up' ? result.upBytes : result.downBytes) / 2 ** 30;
      return {
        relay_cpu_s_per_gib: used.cpuSeconds / gib,
        relay_gib_per_second: gib / result.seconds,
        ...shares(used),
        failures: sum(result.failures),
      };
    },
  };
}

const warmUpSecondsMax = 0.5;

/** @throws when nothing arrived. */
async function relayFor(
  running: Running,
  direction: 'up' | 'down',
  { connections, seconds }: Pace,
): Promise<{ readonly result: RelayResult; readonly used: CpuUsed }> {
  const message = parameter(running.scenario, 'messageBytes');
  const plan = { ...target(running), direction, message, connections, seconds };
  const { result, used } = await metered(running, (started) =>
    runRelay(running.loadProgram, running.cores.load, plan, started),
  );
  expectNegotiated(running, result);
  if (result.upBytes + result.downBytes === 0) throw new Error(`${running.title}: no byte arrived: ${reasons(result)}`);
  return { result, used };
}
