/**
 * Owns: what the workers measured over the last minutes: one point per observation for the charts of /status, and rates and
 * quantiles over the last seconds for its numbers.
 * Must not know: how snapshots are made, what is shown of them.
 * Runs: main thread of the primary. Bounded: so many points, and so many snapshots.
 */
import type { EngineSnapshot, LatencySnapshot } from '../engine/native.d.ts';

/** Ten minutes of one observation per second. */
export const pointsMax = 600;
/** Rates and quantiles are of so many observations: of one alone they would jump. */
const recentMax = 6;

/** A moment on the charts. Rates are per second and since the moment before; null where nothing was measured. */
export interface Point {
  readonly atMs: number;
  readonly full: number | null;
  readonly resumed: number | null;
  readonly toUpstreamBytes: number | null;
  readonly toClientBytes: number | null;
  readonly connectionsOpen: number;
  readonly queueDepth: number;
  /** Of the signatures of the last seconds. */
  readonly signP50Ms: number | null;
  readonly signP99Ms: number | null;
  readonly waitP99Ms: number | null;
}

interface Moment {
  readonly atMs: number;
  readonly snapshot: EngineSnapshot;
}

export class History {
  readonly #boundsUs: readonly number[];
  readonly #points: Point[] = [];
  /** The last moments, the newest last. */
  readonly #recent: Moment[] = [];

  /** @param boundsUs of every latency histogram. */
  constructor(boundsUs: readonly number[]) {
    this.#boundsUs = boundsUs;
  }

  /** Begins anew when the clock was set back: charts go forward only. */
  enter(snapshot: EngineSnapshot, atMs: number): void {
    if (atMs <= (this.#recent.at(-1)?.atMs ?? -Infinity)) {
      this.#recent.length = 0;
      this.#points.length = 0;
    }
    const before = this.#recent.at(-1);
    this.#recent.push({ atMs, snapshot });
    if (this.#recent.length > recentMax) this.#recent.shift();
    const rate = (of: (each: EngineSnapshot) => number): number | null => {
      if (before === undefined) return null;
      return rounded((Math.max(0, of(snapshot) - of(before.snapshot)) * 1000) / (atMs - before.atMs));
    };
    this.#points.push({
      atMs,
      full: rate((each) => handshakes(each, false)),
      resumed: rate((each) => handshakes(each, true)),
      toUpstreamBytes: rate(({ listeners }) => sumOf(listeners, ({ toUpstreamBytes }) => toUpstreamBytes)),
      toClientBytes: rate(({ listeners }) => sumOf(listeners, ({ toClientBytes }) => toClientBytes)),
      connectionsOpen: sumOf(snapshot.listeners, ({ connectionsOpen }) => connectionsOpen),
      queueDepth: sumOf(snapshot.tokens, ({ queueDepthEc, queueDepthRsa }) => queueDepthEc + queueDepthRsa),
      signP50Ms: this.quantileMs(0.5, signLatencies),
      signP99Ms: this.quantileMs(0.99, signLatencies),
      waitP99Ms: this.quantileMs(0.99, ({ tokens }) => tokens.map(({ signWait }) => signWait)),
    });
    if (this.#points.length > pointsMax) this.#points.shift();
  }

  /** The oldest first. */
  get points(): readonly Point[] {
    return this.#points;
  }

  get newest(): EngineSnapshot | undefined {
    return this.#recent.at(-1)?.snapshot;
  }

  /** How much a count grew per second, over the last seconds. What was not there before has grown from nothing. */
  rate(count: (snapshot: EngineSnapshot) => number | undefined): number {
    const [oldest] = this.#recent;
    const newest = this.#recent.at(-1);
    if (oldest === undefined || newest === undefined || newest === oldest) return 0;
    const grown = (count(newest.snapshot) ?? 0) - (count(oldest.snapshot) ?? 0);
    return rounded((Math.max(0, grown) * 1000) / (newest.atMs - oldest.atMs));
  }

  /** Of what was measured within the last seconds, in milliseconds; null when that is nothing. */
  quantileMs(quantile: number, latencies: (snapshot: EngineSnapshot) => readonly LatencySnapshot[]): number | null {
    const [oldest] = this.#recent;
    const newest = this.#recent.at(-1);
    if (oldest === undefined || newest === undefined || newest === oldest) return null;
    const former = totals(latencies(oldest.snapshot));
    const counts = totals(latencies(newest.snapshot)).map((count, index) => Math.max(0, count - (former[index] ?? 0)));
    const us = quantileUs(quantile, counts, this.#boundsUs);
    return us === undefined ? null : rounded(us / 1000);
  }
}

/** As Prometheus estimates it: evenly spread within a bucket; what is above all bounds is at the last one. */
function quantileUs(quantile: number, counts: readonly number[], boundsUs: readonly number[]): number | undefined {
  const total = sumOf(counts, (count) => count);
  if (total === 0) return undefined;
  let below = 0;
  for (const [index, count] of counts.entries()) {
    const rank = quantile * total - below;
    const bound = boundsUs[index];
    if (bound === undefined) break;
    if (rank <= count) {
      const lower = boundsUs[index - 1] ?? 0;
      return lower + (bound - lower) * (rank / count);
    }
    below += count;
  }
  return boundsUs.at(-1);
}

function signLatencies({ tokens }: EngineSnapshot): readonly LatencySnapshot[] {
  return tokens.flatMap(({ mechanisms }) => mechanisms.map(({ latency }) => latency));
}

function handshakes({ listeners }: EngineSnapshot, wanted: boolean): number {
  return sumOf(listeners, (listener) =>
    sumOf(listener.handshakes, ({ resumed, latency }) =>
      resumed === wanted ? sumOf(latency.buckets, (count) => count) : 0,
    ),
  );
}

/** Bucket by bucket. */
function totals(latencies: readonly LatencySnapshot[]): number[] {
  const sums: number[] = [];
  for (const { buckets } of latencies) {
    for (const [index, count] of buckets.entries()) sums[index] = (sums[index] ?? 0) + count;
  }
  return sums;
}

function sumOf<T>(items: readonly T[], value: (item: T) => number): number {
  return items.reduce((sum, item) => sum + value(item), 0);
}

/** Three digits that mean something: what is sent to pages every second is text. */
function rounded(value: number): number {
  return value >= 100 ? Math.round(value) : Number(value.toPrecision(3));
}
