/**
 * Owns: what a scrape says about what was measured.
 * Must not know: HTTP.
 * Runs: in one test process, with the engine's own lists of reasons and bounds.
 */
import assert from 'node:assert/strict';
import { describe, it } from 'node:test';
import { engine } from '../../src/engine/binding.ts';
import type { EngineSnapshot, LatencySnapshot } from '../../src/engine/native.d.ts';
import { parseConfig } from '../../src/config/load.ts';
import type { WorkerSnapshot } from '../../src/messages.ts';
import { metricsTable, renderMetrics } from '../../src/primary/metrics.ts';
import type { SlotStatus } from '../../src/primary/slot.ts';
import { SnapshotBook } from '../../src/primary/snapshot-book.ts';
import type { Observation } from '../../src/primary/snapshot-book.ts';
import type { StapleStatus } from '../../src/primary/stapler.ts';
import { parseScrape } from '../support/prometheus-text.ts';
import type { ScrapedFamily } from '../support/prometheus-text.ts';

const boundsUs = engine().latencyBoundsUs();
const readyWorker: SlotStatus = {
  slot: 0,
  state: 'ready',
  pid: 1,
  restarts: 0,
  startedAt: new Date(Date.UTC(2029, 0, 1)),
  failure: undefined,
  stuck: undefined,
  answers: true,
  sandbox: undefined,
};
const certificates = [{ name: 'www', notAfterMs: Date.UTC(2030, 0, 1) }];
const staple: StapleStatus = {
  certificate: 'www',
  state: 'revoked',
  mustStaple: true,
  responder: 'http://ocsp.example.org/',
  thisUpdate: new Date(Date.UTC(2029, 0, 1)),
  nextUpdate: new Date(Date.UTC(2029, 0, 8)),
  nextFetch: undefined,
  problem: undefined,
  fetches: { ok: 7, unreachable: 3, http_error: 0, responder_error: 0, invalid: 0, unknown: 0 },
};
const config = parseConfig(
  `tokens: { hsm: { module: m.so, uri: "pkcs11:token=t", pin: { env: PIN }, queue: { max: 500 } } }
certificates: { www: { chain: c.pem, key: "pkcs11:object=k" } }
upstreams: { web: { servers: ["127.0.0.1:80"] } }
listeners: { https: { bind: ["127.0.0.1:443"], certificates: [www], upstream: web, clientCertificates: { roots: ca.pem, ocsp: {} }, limits: { connections: 300, handshakes: 40 } } }
`,
  '/etc/keygate.yaml',
);

describe('a scrape', () => {
  it('is well formed, with and without measurements', async () => {
    for (const observation of [observed(anyWorker(() => 1)), new SnapshotBook().total()]) {
      assert.ok((await families(observation)).has('keygate_build_info'));
    }
  });

  it('tells every number that the engine counts', async () => {
    // A number of its own for each, so that none can stand for another.
    const given = new Map<number, string>();
    const worker = anyWorker((what) => {
      const number = 1_000_003 + 1009 * given.size;
      given.set(number, what);
      return number;
    });
    const told = new Set(valuesOf(await families(observed(worker))).values());
    // Counted in what they are measured in, told in seconds.
    for (const [number, what] of given)
      assert.ok(
        [number, number / 1e3, number / 1e6].some((value) => told.has(value)),
        `${what} is in no metric`,
      );
  });

  it('names what it counts by listener, token, upstream and reason', async () => {
    const snapshot = anySnapshot(() => 7);
    const scraped = await scrape(snapshot);
    for (const series of [
      'keygate_connections_accepted_total{listener="https"}',
      'keygate_relay_bytes_total{listener="https",direction="to_client"}',
      'keygate_signatures_total{token="hsm",mechanism="ecdsa",outcome="wrong"}',
      'keygate_sign_queue_depth{token="hsm",class="rsa"}',
      'keygate_sign_shed_total{token="hsm",reason="queue_aged"}',
      'keygate_lanes{token="hsm",state="lost"}',
      'keygate_pkcs11_recoveries_total{token="hsm",repair="key_refound"}',
      'keygate_upstream_connects_total{upstream="web",server="127.0.0.1:80",outcome="refused"}',
      'keygate_connections_closed_total{side="client",phase="handshake",reason="deadline"}',
    ]) {
      assert.equal(scraped.get(series), 7, series);
    }
  });

  it('has every close reason from the start, so that the first of a kind is a step from 0', async () => {
    const scraped = await scrape(nothing());
    const reasons = engine().closeReasons();
    assert.ok(reasons.length > 0);
    for (const { side, phase, reason } of reasons) {
      assert.equal(
        scraped.get(`keygate_connections_closed_total{side="${side}",phase="${phase}",reason="${reason}"}`),
        0,
      );
    }
  });

  it('counts a latency in every bucket whose bound it does not exceed, in seconds', async () => {
    const snapshot = anySnapshot(() => 0);
    // One at most 50 us, two of at most 100 us, three above every bound.
    const buckets = boundsUs.map(() => 0).concat(3);
    buckets.splice(0, 2, 1, 2);
    const [token] = snapshot.tokens;
    assert.ok(token);
    token.signWait = { buckets, sumUs: 30_000_250 };
    const scraped = await scrape(snapshot);
    const name = (suffix: string, le = '') => `keygate_sign_wait_seconds_${suffix}{token="hsm"${le}}`;
    assert.equal(scraped.get(name('bucket', ',le="0.00005"')), 1);
    assert.equal(scraped.get(name('bucket', ',le="0.0001"')), 3);
    assert.equal(scraped.get(name('bucket', ',le="10"')), 3);
    assert.equal(scraped.get(name('bucket', ',le="+Inf"')), 6);
    assert.equal(scraped.get(name('count')), 6);
    assert.equal(scraped.get(name('sum')), 30.00025);
  });

  it('does not call a token or server up when no worker could say so', async () => {
    const snapshot = anySnapshot(() => 0);
    const up = ['keygate_token_up{token="hsm"}', 'keygate_upstream_server_up{upstream="web",server="127.0.0.1:80"}'];
    const values = async (own: EngineSnapshot, workers: readonly SlotStatus[]) => {
      const scraped = await scrape(own, workers);
      return up.map((series) => scraped.get(series));
    };
    assert.deepEqual(await values(snapshot, [readyWorker]), [1, 1]);
    assert.deepEqual(await values(snapshot, [{ ...readyWorker, state: 'waiting' }]), [0, 0]);
    for (const token of snapshot.tokens) token.up = false;
    for (const server of snapshot.upstreams.flatMap(({ servers }) => servers)) server.up = false;
    assert.deepEqual(await values(snapshot, [readyWorker]), [0, 0]);
  });

  it('writes a label so that its value ends where it should', async () => {
    const snapshot = anySnapshot(() => 7);
    const server = snapshot.upstreams[0]?.servers[0];
    assert.ok(server);
    server.address = 'unix:/run/a"b\\c\nd';
    const scraped = await scrape(snapshot);
    const labels = 'upstream="web",server="unix:/run/a\\"b\\\\c\\nd"';
    assert.equal(scraped.get(`keygate_upstream_connections_open{${labels}}`), 7);
  });

  it('tells what a number may come to, for all workers together', async () => {
    const scraped = await scrape(nothing());
    assert.equal(scraped.get('keygate_listener_connections_limit{listener="https"}'), 600);
    assert.equal(scraped.get('keygate_listener_handshakes_limit{listener="https"}'), 80);
    assert.equal(scraped.get('keygate_sign_queue_limit{token="hsm",class="rsa"}'), 1000);
  });

  it('tells of each worker whether it is ready or stuck, and how often it was replaced', async () => {
    const scraped = await scrape(nothing(), [readyWorker, { ...readyWorker, slot: 1, state: 'starting', restarts: 3 }]);
    assert.equal(scraped.get('keygate_worker_up{worker="0"}'), 1);
    assert.equal(scraped.get('keygate_worker_up{worker="1"}'), 0);
    assert.equal(scraped.get('keygate_worker_restarts_total{worker="1"}'), 3);
    const stuck = await scrape(nothing(), [readyWorker, { ...readyWorker, slot: 1, stuck: 'calls do not return' }]);
    assert.equal(stuck.get('keygate_worker_stuck{worker="0"}'), 0);
    assert.equal(stuck.get('keygate_worker_stuck{worker="1"}'), 1);
  });

  it('tells when a certificate expires, in seconds', async () => {
    assert.equal(
      (await scrape(nothing())).get('keygate_certificate_expiry_timestamp_seconds{certificate="www"}'),
      Date.UTC(2030, 0, 1) / 1000,
    );
  });

  it('tells how the primary process itself is', async () => {
    const scraped = await scrape(nothing());
    assert.ok((scraped.get('process_resident_memory_bytes{}') ?? 0) > 1e6);
    assert.ok((scraped.get('process_start_time_seconds{}') ?? 0) > 1e9);
    assert.ok(scraped.has('nodejs_eventloop_lag_p99_seconds{}'));
  });

  it('never counts backwards when a worker dies and is replaced, and drops what only the living have', async () => {
    const book = new SnapshotBook();
    const rendered = async () => families(book.total());
    book.enter(
      1,
      0,
      anyWorker(() => 40),
    );
    book.enter(
      1,
      1,
      anyWorker(() => 2),
    );
    const before = await rendered();
    book.retire(0);
    const during = await rendered();
    book.enter(
      2,
      0,
      anyWorker(() => 1),
    );
    const after = await rendered();
    book.retire(0);
    book.retire(1);
    const none = await rendered();

    const accepted = 'keygate_connections_accepted_total{listener="https"}';
    assert.deepEqual(
      [before, during, after, none].map((one) => counts(one).get(accepted)),
      [42, 42, 43, 43],
    );
    for (const [earlier, later] of [
      [before, during],
      [during, after],
      [after, none],
    ] as const) {
      assert.ok(counts(earlier).size > 100);
      for (const [series, count] of counts(earlier)) {
        assert.ok(
          (counts(later).get(series) ?? -1) >= count,
          `${series} was ${count} and is ${counts(later).get(series)}`,
        );
      }
    }
    const open = [before, during, after, none].map((one) =>
      one.get('keygate_connections_open')?.series.get('keygate_connections_open{listener="https"}'),
    );
    assert.deepEqual(open, [42, 2, 3, 0]);
  });
});

describe('the table of metrics', () => {
  it('has the name, type, labels and meaning of what a scrape has, and nothing else', async () => {
    const rows = metricsTable()
      .split('\n')
      .filter((line) => line.startsWith('| `'))
      .map((line) => line.split('|').map((cell) => cell.trim().replaceAll('`', '')));
    const told = rows.map(([, name, type, labels, help]) => ({
      name,
      type,
      labels: labels?.replaceAll(', ', ','),
      help,
    }));
    const scraped = [...(await families(observed(anyWorker(() => 1)))).values()]
      .filter(({ name }) => name.startsWith('keygate_'))
      .map(({ name, type, labels, help }) => ({ name, type, labels: [...labels].join(), help }));
    assert.deepEqual(told, scraped);
  });

  it('names everything else in a scrape below', async () => {
    const names = [...(await families(new SnapshotBook().total())).keys()].filter(
      (name) => !name.startsWith('keygate_'),
    );
    const last = metricsTable().split('\n').at(-1) ?? '';
    assert.deepEqual([...last.matchAll(/`(\w+)`/g)].map(([, name = '']) => name).toSorted(), names.toSorted());
  });
});

async function scrape(
  engineSnapshot: EngineSnapshot,
  workers: readonly SlotStatus[] = [readyWorker],
): Promise<Map<string, number>> {
  return valuesOf(await families({ ...new SnapshotBook().total(), engine: engineSnapshot }, workers));
}

function valuesOf(scraped: ReadonlyMap<string, ScrapedFamily>): Map<string, number> {
  return new Map([...scraped.values()].flatMap(({ series }) => [...series]));
}

async function families(
  { engine: snapshot, logs, processes, cpu }: Observation,
  workers: readonly SlotStatus[] = [readyWorker],
): Promise<Map<string, ScrapedFamily>> {
  const text = await renderMetrics({
    snapshot,
    logs: [logs],
    processes,
    cpu,
    workers,
    ready: true,
    certificates,
    staples: [staple],
    config,
    slots: 2,
    reloads: { counts: { committed: 0, refused: 0, rolled_back: 0 }, last: undefined, since: new Date() },
    ticketEpoch: { number: 1, since: new Date() },
  });
  return parseScrape(text);
}

function observed(worker: WorkerSnapshot): Observation {
  const book = new SnapshotBook();
  book.enter(1, 0, worker);
  return book.total();
}

/** Every series that may only grow. */
function counts(scraped: ReadonlyMap<string, ScrapedFamily>): Map<string, number> {
  const growing = [...scraped.values()].filter(({ name, type }) => type !== 'gauge' && name.startsWith('keygate_'));
  return new Map(growing.flatMap(({ series }) => [...series]));
}

function nothing(): EngineSnapshot {
  return new SnapshotBook().total().engine;
}

/** Everything that a worker can tell. */
function anyWorker(of: (what: string) => number): WorkerSnapshot {
  const lines = (log: string) => ({ written: of(`${log} written`), dropped: of(`${log} dropped`) });
  return {
    engine: anySnapshot(of),
    process: {
      cpuUs: of('cpuUs'),
      residentBytes: of('residentBytes'),
      openFds: of('openFds'),
      eventLoopLagMs: of('eventLoopLagMs'),
    },
    logs: { event: lines('event'), access: lines('access'), key: lines('key') },
  };
}

/** A snapshot with everything the engine can tell, each number from `of`; the compiler says when one is missing. */
function anySnapshot(of: (what: string) => number): EngineSnapshot {
  const latency = (what: string): LatencySnapshot => ({
    buckets: [of(`${what}: first bucket`), ...boundsUs.map(() => 0)],
    sumUs: of(`${what}: sum`),
  });
  return {
    running: true,
    listeners: [
      {
        name: 'https',
        accepted: of('accepted'),
        acceptFailures: of('acceptFailures'),
        connectionsOpen: of('connectionsOpen'),
        handshakesInFlight: of('handshakesInFlight'),
        toUpstreamBytes: of('toUpstreamBytes'),
        toClientBytes: of('toClientBytes'),
        handshakes: [
          { protocol: 'TLSv1.2', resumed: false, latency: latency('full 1.2') },
          { protocol: 'TLSv1.3', resumed: true, latency: latency('resumed 1.3') },
        ],
        clientStatuses: [{ outcome: 'good', count: of('client status') }],
      },
    ],
    upstreams: [
      {
        name: 'web',
        servers: [
          {
            address: '127.0.0.1:80',
            up: true,
            connectionsOpen: of('server connectionsOpen'),
            connects: ['ok', 'refused'].map((outcome) => ({ outcome, count: of(outcome) })),
            connectLatency: latency('connectLatency'),
            fullHandshakeLatency: latency('fullHandshakeLatency'),
            resumedHandshakeLatency: latency('resumedHandshakeLatency'),
          },
        ],
        certificatesAccepted: of('certificatesAccepted'),
        findings: [{ reason: 'expired', refused: of('findings refused'), reported: of('findings reported') }],
      },
    ],
    closes: engine()
      .closeReasons()
      .map(({ side, phase, reason }) => ({ side, phase, reason, count: of(reason) })),
    tokens: [
      {
        name: 'hsm',
        up: true,
        mechanisms: (['ecdsa', 'rsa_pkcs'] as const).map((mechanism) => ({
          mechanism,
          ok: of('ok'),
          failed: of('failed'),
          wrong: of('wrong'),
          latency: latency(mechanism),
        })),
        signWait: latency('signWait'),
        queueDepthEc: of('queueDepthEc'),
        queueDepthRsa: of('queueDepthRsa'),
        lanesIdle: of('lanesIdle'),
        lanesBusy: of('lanesBusy'),
        lanesLost: of('lanesLost'),
        lanesWrittenOff: of('lanesWrittenOff'),
        sessionsOpen: of('sessionsOpen'),
        reopened: of('reopened'),
        loggedIn: of('loggedIn'),
        refound: of('refound'),
        reinitialized: of('reinitialized'),
        failedOver: of('failedOver'),
        shedQueueFull: of('shedQueueFull'),
        shedQueueAged: of('shedQueueAged'),
        shedTokenDown: of('shedTokenDown'),
        cancelled: of('cancelled'),
        wentDown: of('wentDown'),
        loginLockTimeouts: of('loginLockTimeouts'),
      },
    ],
    ciphers: [{ protocol: 'TLSv1.3', cipher: 'TLS_AES_128_GCM_SHA256', count: of('cipher') }],
    groups: [{ group: 'X25519', count: of('group') }],
    access: { sampledOut: of('sampledOut'), rateLimited: of('rateLimited') },
    tickets: { wanted: false, deriving: false },
    ioCpuUs: of('ioCpuUs'),
  };
}
