/**
 * Owns: the workload of small messages there and back over connections that stay open.
 * Must not know: who relays.
 * Runs: in the benchmark's process, which is idle while a round runs.
 */
import { runEcho } from '../load.ts';
import type { EchoResult } from '../load.ts';
import type { CpuUsed } from '../processes.ts';
import { expectNegotiated, metered, milliseconds, parameter, reasons, shares, sum, target } from './running.ts';
import type { Pace, Running, Workload } from './workload.ts';

export const echo: Workload = {
  metrics: [
    'message_cpu_us',
    'messages_per_second',
    'echo_p50_ms',
    'echo_p99_ms',
    'core_share',
    'strangers_share',
    'failures',
  ],
  upstream: 'echo',
  async warmUp(running, pace) {
    await warmUpEcho(running, pace);
  },
  async round(running, pace) {
    const { result, used } = await echoFor(running, pace);
    return {
      message_cpu_us: (used.cpuSeconds / result.messages) * 1e6,
      messages_per_second: result.messages / result.seconds,
      echo_p50_ms: milliseconds(result.latencyUs, 'p50'),
      echo_p99_ms: milliseconds(result.latencyUs, 'p99'),
      ...shares(used),
      failures: sum(result.failures),
    };
  },
};

export async function warmUpEcho(running: Running, pace: Pace): Promise<void> {
  await echoFor(running, { ...pace, seconds: Math.min(pace.seconds, warmUpSecondsMax) });
}

const warmUpSecondsMax = 0.5;

/**
 * At fixed spacing, whether answered or not.
 * @param begun called when the connections are established.
 * @throws when another thing was negotiated than the setting says, or no echo came.
 */
export async function echoFor(
  running: Running,
  { connections, seconds }: Pick<Pace, 'connections' | 'seconds'>,
  begun: () => void = () => {},
): Promise<{ readonly result: EchoResult; readonly used: CpuUsed }> {
  const { loadProgram, cores, scenario, title } = running;
  const [bytes, rate] = [parameter(scenario, 'messageBytes'), parameter(scenario, 'echoesPerSecond')];
  const plan = { ...target(running), connections, seconds, bytes, rate };
  const { result, used } = await metered(running, (started) =>
    runEcho(loadProgram, cores.load, plan, () => {
      started();
      begun();
    }),
  );
  expectNegotiated(running, result);
  if (result.messages === 0) throw new Error(`${title}: no echo: ${reasons(result)}`);
  return { result, used };
}
