/**
 * Owns: what a worker hands to the engine: numbers that fit, and servers whose names have addresses.
 * Must not know: the engine, tokens.
 * Runs: node:test, in memory; looks up names that never resolve (RFC 6761 6.4).
 */
import assert from 'node:assert/strict';
import { it } from 'node:test';
import pino from 'pino';
import { parseConfig } from '../../src/config/load.ts';
import { ServiceError } from '../../src/errors.ts';
import { assertNumbersFit, engineSettings, lanesOf } from '../../src/worker/plan.ts';

it('a number that the engine has no room for is refused by name', () => {
  for (const lifetimeDeadlineMs of [2 ** 32, -1, 0.5, Number.NaN, Number.POSITIVE_INFINITY]) {
    assert.throws(
      () => assertNumbersFit({ listeners: [{ lifetimeDeadlineMs }] }),
      (error) =>
        error instanceof ServiceError &&
        error.code === 'engine_failed' &&
        error.message.startsWith(`settings.listeners[0].lifetimeDeadlineMs: found ${lifetimeDeadlineMs}`),
    );
  }
  assertNumbersFit({ listeners: [{ lifetimeDeadlineMs: 2 ** 32 - 1, idleDeadlineMs: 0 }] });
});

it('the longest durations that a configuration may have fit', async () => {
  const { listeners } = await settingsFor(['127.0.0.1:1'], 'deadlines: { lifetime: 49d, idle: 7d, halfClosed: 7d }');
  assert.equal(listeners[0]?.lifetimeDeadlineMs, 49 * 86_400_000);
});

it('a server whose name has no address is left out with a warning as long as another one is left', async () => {
  const warnings: string[] = [];
  const log = pino({}, { write: (line) => void warnings.push((JSON.parse(line) as { msg: string }).msg) });
  const { upstreams } = await settingsFor(['gone.invalid:80', '[::1]:81', 'unix:/run/web.sock'], undefined, log);
  assert.deepEqual(upstreams[0]?.servers, ['[::1]:81', 'unix:/run/web.sock']);
  assert.equal(warnings.length, 1);
  assert.match(warnings[0] ?? '', /^upstream web: gone\.invalid:80 \(E[A-Z_]+\) has no address/);
});

it('an upstream none of whose servers has an address is refused, naming them all', async () => {
  await assert.rejects(
    settingsFor(['gone.invalid:80', 'lost.invalid:81']),
    (error) =>
      error instanceof ServiceError &&
      error.code === 'upstream_unresolved' &&
      /gone\.invalid:80 .*lost\.invalid:81 /.test(error.message),
  );
});

it("a token's sessions are divided among the workers: one for the login, one for searches, the rest for lanes", () => {
  const table = [
    { lanes: 8, sessions: undefined, workers: 4, share: [8, 16] },
    { lanes: 8, sessions: 72, workers: 4, share: [8, 16] },
    { lanes: 8, sessions: 71, workers: 4, share: [8, 15] },
    { lanes: 8, sessions: 40, workers: 4, share: [8, 8] },
    { lanes: 8, sessions: 39, workers: 4, share: [7, 7] },
    { lanes: 8, sessions: 12, workers: 4, share: [1, 1] },
  ] as const;
  for (const { lanes, sessions, workers, share } of table) {
    const found = lanesOf({ lanes, sessions }, { workers });
    assert.deepEqual([found.lanes, found.threadsMax], share, `${sessions} sessions`);
    if (sessions !== undefined) assert.ok(workers * (found.threadsMax + 2) <= sessions);
  }
});

async function settingsFor(
  servers: readonly string[],
  ofListener = 'backlog: 1',
  log = pino({}, { write: (line) => assert.fail(line) }),
) {
  const config = parseConfig(
    [
      'tokens: { a: { module: /m.so, uri: "pkcs11:token=a", pin: { file: pin } } }',
      'certificates: { www: { chain: www.pem, key: "pkcs11:object=www" } }',
      `upstreams: { web: { servers: ${JSON.stringify(servers)} } }`,
      `listeners: { https: { bind: ["127.0.0.1:0"], certificates: [www], upstream: web, ${ofListener} } }`,
    ].join('\n'),
    '/k.yaml',
  );
  return engineSettings(config, { tokens: [], certificates: [], ticketKey: [], warnings: [] }, [], log);
}
