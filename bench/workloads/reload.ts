/**
 * Owns: the workload of short connections while the configuration is loaded again and again, or is not: that is what its
 * subjects differ in.
 * Must not know: how a reload is done.
 * Runs: in the benchmark's process, which asks for reloads while a round runs.
 */
import { milliseconds, shares, sum } from './running.ts';
import { shakeHands, warmUpHandshakes } from './handshakes.ts';
import type { Running, Workload } from './workload.ts';

export const reload: Workload = {
  metrics: [
    'handshake_cpu_us',
    'handshakes_per_second',
    'handshake_p50_ms',
    'handshake_p99_ms',
    'reloads',
    'reload_ms',
    'core_share',
    'strangers_share',
    'failures',
  ],
  upstream: 'line',
  async warmUp(running, pace) {
    await warmUpHandshakes(running, pace);
    if (running.setting.reload) await reloadOnce(running);
  },
  async round(running, pace) {
    const shaking = shakeHands(running, pace);
    let over = false;
    const end = () => {
      over = true;
    };
    shaking.then(end, end);
    const reloadMs = running.setting.reload ? await reloadUntil(running, () => over) : [];
    const { result, used } = await shaking;
    return {
      handshake_cpu_us: (used.cpuSeconds / result.handshakes) * 1e6,
      handshakes_per_second: result.handshakes / result.seconds,
      handshake_p50_ms: milliseconds(result.handshakeUs, 'p50'),
      handshake_p99_ms: milliseconds(result.handshakeUs, 'p99'),
      reloads: reloadMs.length,
      ...(reloadMs.length === 0 ? {} : { reload_ms: median(reloadMs) }),
      ...shares(used),
      failures: sum(result.failures),
    };
  },
};

/** One after the other without a pause. Milliseconds of each. */
async function reloadUntil(running: Running, over: () => boolean): Promise<readonly number[]> {
  const tookMs: number[] = [];
  do tookMs.push(await reloadOnce(running));
  while (!over());
  return tookMs;
}

/** Milliseconds. @throws when not all workers have taken it over. */
async function reloadOnce({ title, adminAddress }: Running): Promise<number> {
  if (adminAddress === undefined) throw new Error(`${title} cannot reload: it has no admin server`);
  const startedAt = performance.now();
  const response = await fetch(`http://${adminAddress}/reload`, { method: 'POST', headers: { 'x-keygate': '1' } });
  const text = await response.text();
  // What was done is told as JSON; a refusal of the request is not.
  const outcome = response.ok ? (JSON.parse(text) as { readonly outcome?: string }).outcome : undefined;
  if (outcome !== 'committed')
    throw new Error(`${title}: POST /reload: expected committed, found ${response.status}: ${text}`);
  return performance.now() - startedAt;
}

function median(values: readonly number[]): number {
  return values.toSorted((left, right) => left - right)[Math.floor(values.length / 2)] as number;
}
