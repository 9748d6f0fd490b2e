/**
 * Owns: the workload of connections that stay open and say nothing: how much memory each takes, and how fast they come.
 * Must not know: who holds them.
 * Runs: in the benchmark's process, which reads the memory while the connections idle.
 */
import { startIdle } from '../load.ts';
import type { Sample } from '../metrics.ts';
import { CpuMeter, openFilesMax, pssBytes } from '../processes.ts';
import type { Scenario } from '../scenarios.ts';
import { expectNegotiated, parameter, reasons, shares, sum, target } from './running.ts';
import type { Running, Workload } from './workload.ts';

export const idle: Workload = {
  metrics: [
    'idle_connection_bytes',
    'idle_connections',
    'ramp_connections_per_second',
    'handshake_cpu_us',
    'core_share',
    'strangers_share',
    'failures',
  ],
  upstream: 'echo',
  upstreamPlan: (scenario) => ({ listen: addressesFor(crowdOf(scenario)) }),
  async warmUp(running) {
    await ramp(running, warmUpConnections);
    memoryBefore.set(running, pssBytes(running.pinned.pid));
  },
  async round(running) {
    return await ramp(running, crowdOf(running.scenario));
  },
};

/** As many as the scenario says, or as this machine can: each takes two open files of who holds it. */
function crowdOf(scenario: Scenario): number {
  return Math.min(parameter(scenario, 'idleConnections'), Math.floor((openFilesMax() - otherFiles) / 2));
}

const otherFiles = 500;
const warmUpConnections = 16;
/** Before the first crowd, and not before each: what a program keeps for the next crowd belongs to the crowd. */
const memoryBefore = new WeakMap<Running, number>();

/** @throws when the connections are not what the setting says, or some do not relay any more. */
async function ramp(running: Running, connections: number): Promise<Sample> {
  const { pinned, cores, loadProgram, title } = running;
  const meter = new CpuMeter(pinned, cores.subject);
  const plan = { ...target(running), connections };
  const crowd = await startIdle(loadProgram, cores.load, plan, () => meter.start());
  const used = meter.stop(crowd.held.seconds);
  const { open, seconds } = crowd.held;
  const bytes = pssBytes(pinned.pid) - (memoryBefore.get(running) ?? 0);
  const { asked, answered } = await crowd.check();
  const end = await crowd.end();
  expectNegotiated(running, end);
  if (answered < asked || open === 0) throw new Error(`${title}: ${answered} of ${asked} echoes: ${reasons(end)}`);
  return {
    idle_connection_bytes: bytes / open,
    idle_connections: open,
    ramp_connections_per_second: open / seconds,
    handshake_cpu_us: (used.cpuSeconds / open) * 1e6,
    ...shares(used),
    failures: sum(end.failures),
  };
}

/** So that no address of the upstream runs out of ports: Linux has 28,000 for each. */
function addressesFor(connections: number): string {
  const count = Math.ceil(connections / connectionsPerAddress);
  return Array.from({ length: count }, (_, index) => `127.0.0.${index + 1}:0`).join(',');
}

const connectionsPerAddress = 20_000;
