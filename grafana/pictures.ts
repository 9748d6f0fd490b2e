/**
 * Owns: the pictures of the dashboards in README: a keygate under load for a few minutes, and what its dashboards show then.
 * Must not know: how panels are drawn.
 * Runs: `npm run pictures`, by hand, as nothing else in the project does: two runs never give the same picture.
 *
 * There is no Grafana in this: the files in grafana/dashboards are read, asked and drawn as Grafana would. With a directory as
 * its argument it writes there, and PNGs besides.
 */
import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { setTimeout as pause } from 'node:timers/promises';
import { pngOf } from '../bench/charts.ts';
import { startScene } from '../test/grafana/scene.ts';
import type { Scene } from '../test/grafana/scene.ts';
import { dashboards } from './dashboard-files.ts';
import { boardPicture } from './picture/board.ts';

const shown = ['keygate-overview', 'keygate-handshakes', 'keygate-signing', 'keygate-relay'];
const [directory = join(import.meta.dirname, 'pictures')] = process.argv.slice(2);
const storySeconds = 150;
const scrapeMs = 1000;

await using scene = await startScene({ workers: 2, lanes: 2, queue: { max: 64, age: '1s' }, scrapeMs });
await scene.prometheus.answered('count_over_time(keygate_ready[1m]) > 1');
const startSeconds = Date.now() / 1000;
await story(scene);
const range = { startSeconds, endSeconds: startSeconds + storySeconds, stepSeconds: 2.5 };
const values: Readonly<Record<string, string>> = { $__rate_interval: '10s', $__range: `${storySeconds}s` };
const concrete = (expr: string) => expr.replaceAll(/\$\w+/g, (name) => values[name] ?? '.*');
for (const board of dashboards().filter(({ uid }) => shown.includes(uid))) {
  const svg = await boardPicture(board, scene.prometheus, range, concrete);
  writeFileSync(join(directory, `${board.uid}.svg`), svg);
  if (process.argv.length > 2) writeFileSync(join(directory, `${board.uid}.png`), pngOf(svg));
}

/** Clients all the time; a token that is slow for a while, a reload, a worker that dies, a file that is refused. */
async function story(on: Scene): Promise<void> {
  const ending = new AbortController();
  const session = await on.full();
  const clients = [
    traffic(14, () => on.full({ bytes: 4000 }), ending.signal),
    traffic(30, () => on.resumed(session, { bytes: 4000 }), ending.signal),
    traffic(5, () => on.full({ listener: 'api', bytes: 20_000 }), ending.signal),
    traffic(2, () => on.full({ version: 'TLSv1.2' }), ending.signal),
    traffic(2, () => on.rsa(), ending.signal),
    traffic(0.5, () => on.plainHttp(), ending.signal),
    traffic(0.3, () => on.unknownName(), ending.signal),
    traffic(0.2, () => on.refusedUpstream(), ending.signal),
    traffic(0.1, () => on.repair(), ending.signal),
  ];
  const acts: readonly (readonly [seconds: number, act: () => Promise<unknown> | void])[] = [
    [40, () => on.faults.delay('C_Sign', 150)],
    [65, () => on.faults.delay('C_Sign', 0)],
    [85, () => on.reload()],
    [105, () => killWorker(on)],
    [125, () => on.overLimit()],
    [135, () => on.refusedReload()],
    [storySeconds, () => ending.abort()],
  ];
  const begun = performance.now();
  for (const [seconds, act] of acts) {
    await pause(Math.max(0, seconds * 1000 - (performance.now() - begun)));
    await act();
  }
  await Promise.all(clients);
}

/** As many each second, at random moments. One that fails is what pictures are about. */
async function traffic(perSecond: number, visit: () => Promise<unknown>, ending: AbortSignal): Promise<void> {
  const visits = new Set<Promise<unknown>>();
  while (!ending.aborted) {
    await pause((-Math.log(1 - Math.random()) / perSecond) * 1000);
    const under = visit()
      .catch(() => {})
      .finally(() => visits.delete(under));
    visits.add(under);
  }
  await Promise.all(visits);
}

async function killWorker(on: Scene): Promise<void> {
  const [, second] = await on.keygate.workers();
  if (second !== undefined) process.kill(second.pid, 'SIGKILL');
}
