/**
 * Owns: what the page at /status is told about tokens, listeners, servers, certificates, workers and ends of connections.
 * Must not know: how the page shows it.
 * Runs: node:test, in memory.
 */
import assert from 'node:assert/strict';
import { describe, it } from 'node:test';
import { parseConfig } from '../../src/config/load.ts';
import { engine } from '../../src/engine/binding.ts';
import type { EngineSnapshot } from '../../src/engine/native.d.ts';
import { History } from '../../src/primary/history.ts';
import { overviewOf } from '../../src/primary/overview.ts';
import type { Overview, Subjects } from '../../src/primary/overview.ts';
import type { SlotStatus } from '../../src/primary/slot.ts';
import { listenerOf, serverOf, snapshotOf, tokenOf, upstreamOf } from '../support/snapshot.ts';

const config = parseConfig(
  `tokens: { hsm: { module: /m.so, uri: "pkcs11:token=a", pin: { file: pin } } }
certificates: { www: { chain: www.pem, key: "pkcs11:object=www" } }
upstreams: { web: { servers: ["10.0.0.1:80"] } }
listeners:
  https: { bind: ["0.0.0.0:443"], certificates: [www], upstream: web, limits: { connections: 100, handshakes: 10 } }`,
  '/k.yaml',
);
const worker: SlotStatus = {
  slot: 0,
  state: 'ready',
  pid: 1,
  startedAt: new Date(0),
  restarts: 0,
  failure: undefined,
  stuck: undefined,
  answers: true,
  sandbox: undefined,
};
const configuration: Subjects['configuration'] = {
  file: '/k.yaml',
  generation: 1,
  hash: '0',
  since: new Date(0),
  lastReload: undefined,
};

describe('an overview', () => {
  it('of a primary that has measured nothing yet has no rows and no moment', () => {
    const { ready, now, tokens, closes } = overview([], { unreadiness: 'no worker is ready' });
    assert.deepEqual([ready, now, tokens, closes], [false, undefined, { rows: [], more: 0 }, { rows: [], more: 0 }]);
  });

  it('tells limits of all workers, and rates per second', () => {
    const listeners = (accepted: number) => [
      listenerOf({ accepted, connectionsOpen: 7, handshakesInFlight: 3, toClientBytes: accepted * 100 }),
    ];
    const { listeners: table } = overview(
      [snapshotOf({ listeners: listeners(0) }), snapshotOf({ listeners: listeners(20) })],
      { workers: [worker, { ...worker, slot: 1 }], addresses: { https: ['0.0.0.0:443'] } },
    );
    assert.deepEqual(table.rows, [
      {
        name: 'https',
        addresses: ['0.0.0.0:443'],
        open: 7,
        openMax: 200,
        inFlight: 3,
        inFlightMax: 20,
        accepted: 20,
        toUpstreamBytes: 0,
        toClientBytes: 2000,
      },
    ]);
  });

  it('counts as a failure of a token what it refused, signed wrong or never got to', () => {
    const token = (failed: number) =>
      tokenOf({
        mechanisms: [
          { mechanism: 'ecdsa', ok: failed * 10, failed, wrong: failed, latency: { buckets: [0], sumUs: 0 } },
        ],
        shedQueueFull: failed,
        shedQueueAged: failed,
        shedTokenDown: failed,
        cancelled: failed,
      });
    const [row] = overview([snapshotOf({ tokens: [token(0)] }), snapshotOf({ tokens: [token(1)] })]).tokens.rows;
    assert.deepEqual([row?.failures, row?.signatures], [5, 10]);
  });

  it('takes nothing for up while no worker is ready', () => {
    const last = snapshotOf({ tokens: [tokenOf({})], upstreams: [upstreamOf(serverOf({}))] });
    const up = ({ tokens, servers }: Overview) => [tokens.rows[0]?.up, servers.rows[0]?.up];
    assert.deepEqual(up(overview([last])), [true, true]);
    assert.deepEqual(up(overview([last], { workers: [{ ...worker, state: 'waiting' }] })), [false, false]);
  });

  it('does not hold it against a server that a client went away', () => {
    const connects = ['ok', 'cancelled', 'refused', 'deadline'].map((outcome) => ({ outcome, count: 2 }));
    const [row] = overview([snapshotOf({ upstreams: [upstreamOf(serverOf({ connects }))] })]).servers.rows;
    assert.equal(row?.failed, 4);
  });

  it('tells each reason that happened with its meaning, the normal ones apart', () => {
    const closes = engine()
      .closeReasons()
      .map(({ side, phase, reason }) => ({
        side,
        phase,
        reason,
        count: reason === 'closed' && phase === 'relay' ? 3 : 0,
      }));
    const { rows } = overview([snapshotOf({ closes })]).closes;
    assert.ok(rows.length > 0);
    for (const row of rows) {
      assert.deepEqual([row.reason, row.count, row.isNormal], ['closed', 3, true]);
      assert.ok(row.meaning.length > 10);
    }
  });

  it('leaves out what a person cannot look through, and never what is wrong', () => {
    const day = 86_400_000;
    const certificates = Array.from({ length: 250 }, (_, index) => ({
      name: `c${index}`,
      notAfterMs: (500 - index) * day,
    }));
    const tokens = Array.from({ length: 150 }, (_, index) => tokenOf({ name: `t${index}`, up: index !== 149 }));
    const told = overview([snapshotOf({ tokens })], { certificates });
    assert.deepEqual([told.certificates.rows.length, told.certificates.more], [100, 150]);
    assert.equal(told.certificates.rows[0]?.name, 'c249');
    assert.deepEqual([told.tokens.rows.length, told.tokens.more, told.tokens.rows[0]?.name], [100, 50, 't149']);
  });

  it('tells why the last reload came to nothing, shortly', () => {
    const reasons = Array.from({ length: 50 }, () => ({ code: 'config_value', message: 'wrong' }) as const);
    const lastReload = { outcome: 'refused', seconds: 1, changes: [], reasons, at: new Date(0) } as const;
    const told = overview([], { configuration: { ...configuration, lastReload } });
    assert.equal(told.configuration.lastReload?.outcome, 'refused');
    assert.equal(told.configuration.lastReload?.reasons.length, 3);
  });
});

/** One snapshot per second. */
function overview(snapshots: readonly EngineSnapshot[], subjects: Partial<Subjects> = {}): Overview {
  const history = new History(engine().latencyBoundsUs());
  for (const [index, snapshot] of snapshots.entries()) history.enter(snapshot, (index + 1) * 1000);
  return overviewOf({
    atMs: 10_000,
    unreadiness: undefined,
    config,
    configuration,
    addresses: {},
    workers: [worker],
    certificates: [],
    logLevel: 'info',
    history,
    ...subjects,
  });
}
