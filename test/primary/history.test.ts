/**
 * Owns: what the primary remembers of the last minutes: rates, quantiles, and that it is bounded.
 * Must not know: where snapshots come from, what is shown.
 * Runs: node:test, in memory.
 */
import assert from 'node:assert/strict';
import { describe, it } from 'node:test';
import type { EngineSnapshot, LatencySnapshot } from '../../src/engine/native.d.ts';
import { History, pointsMax } from '../../src/primary/history.ts';
import { listenerOf, snapshotOf, tokenOf } from '../support/snapshot.ts';

const boundsUs = [100, 200, 1000];

describe('the history of the last minutes', () => {
  it('has no rate for the first moment, and the growth per second for each that follows', () => {
    const history = new History(boundsUs);
    history.enter(snapshot({ full: 100, resumed: 50, toClient: 1000, toUpstream: 0 }), 10_000);
    history.enter(snapshot({ full: 110, resumed: 50, toClient: 5000, toUpstream: 500 }), 12_000);
    const [first, second] = history.points;
    assert.deepEqual([first?.full, first?.resumed, first?.toClientBytes], [null, null, null]);
    assert.deepEqual(
      [second?.full, second?.resumed, second?.toClientBytes, second?.toUpstreamBytes],
      [5, 0, 2000, 250],
    );
  });

  it('takes a count that went back for one that stood still', () => {
    const history = new History(boundsUs);
    history.enter(snapshot({ full: 100 }), 1000);
    history.enter(snapshot({ full: 10 }), 2000);
    assert.equal(history.points.at(-1)?.full, 0);
    assert.equal(
      history.rate(({ listeners }) => listeners[0]?.accepted),
      0,
    );
  });

  it('keeps ten minutes, the newest last', () => {
    const history = new History(boundsUs);
    for (let moment = 1; moment <= pointsMax + 5; moment += 1) history.enter(snapshot({}), moment * 1000);
    assert.equal(history.points.length, pointsMax);
    assert.deepEqual([history.points[0]?.atMs, history.points.at(-1)?.atMs], [6000, (pointsMax + 5) * 1000]);
  });

  it('begins anew when the clock was set back', () => {
    const history = new History(boundsUs);
    history.enter(snapshot({ full: 1 }), 5000);
    history.enter(snapshot({ full: 2 }), 6000);
    history.enter(snapshot({ full: 3 }), 2000);
    assert.deepEqual(
      history.points.map(({ atMs, full }) => [atMs, full]),
      [[2000, null]],
    );
  });

  it('estimates quantiles of what was signed lately, not of what was signed before', () => {
    const history = new History(boundsUs);
    history.enter(snapshot({ signed: [0, 0, 1_000_000, 0] }), 1000);
    assert.equal(history.points.at(-1)?.signP50Ms, null);
    history.enter(snapshot({ signed: [100, 100, 1_000_000, 0] }), 2000);
    const { signP50Ms, signP99Ms } = history.points.at(-1) ?? {};
    assert.equal(signP50Ms, 0.1);
    assert.equal(signP99Ms, 0.198);
  });

  it('puts what is above all bounds at the last one, and knows no quantile of nothing', () => {
    const history = new History(boundsUs);
    history.enter(snapshot({ signed: [0, 0, 0, 0] }), 1000);
    history.enter(snapshot({ signed: [0, 0, 0, 7] }), 2000);
    assert.equal(history.points.at(-1)?.signP50Ms, 1);
    for (let moment = 3; moment < 12; moment += 1) history.enter(snapshot({ signed: [0, 0, 0, 7] }), moment * 1000);
    assert.equal(history.points.at(-1)?.signP50Ms, null);
  });

  it('has rates over the last seconds, which forget what was before', () => {
    const history = new History(boundsUs);
    const fullOf = ({ listeners }: EngineSnapshot) => listeners[0]?.handshakes[0]?.latency.buckets[0];
    assert.equal(history.rate(fullOf), 0);
    for (let moment = 1; moment <= 4; moment += 1) history.enter(snapshot({ full: moment * 30 }), moment * 1000);
    assert.equal(history.rate(fullOf), 30);
    for (let moment = 5; moment <= 15; moment += 1) history.enter(snapshot({ full: 120 }), moment * 1000);
    assert.equal(history.rate(fullOf), 0);
  });
});

interface Counts {
  readonly full?: number;
  readonly resumed?: number;
  readonly toClient?: number;
  readonly toUpstream?: number;
  readonly signed?: number[];
}

function snapshot({ full = 0, resumed = 0, toClient = 0, toUpstream = 0, signed = [] }: Counts): EngineSnapshot {
  const latency = (buckets: number[]): LatencySnapshot => ({ buckets, sumUs: 0 });
  const handshakes = [
    { protocol: 'TLSv1.3', resumed: false, latency: latency([full]) } as const,
    { protocol: 'TLSv1.3', resumed: true, latency: latency([resumed]) } as const,
  ];
  const mechanisms = [{ mechanism: 'ecdsa', ok: 0, failed: 0, wrong: 0, latency: latency(signed) } as const];
  return snapshotOf({
    listeners: [listenerOf({ accepted: full, toClientBytes: toClient, toUpstreamBytes: toUpstream, handshakes })],
    tokens: [tokenOf({ mechanisms })],
  });
}
