/**
 * Owns: what clients notice of a token that hangs, fails, lies or is too slow: never an established connection, never a
 * resumed handshake; a full handshake ends soon with an alert and a reason; and all is well again without a restart.
 * Must not know: how lanes repair themselves (src/engine/tests/signing has each rung of the ladder).
 * Runs: against a real `keygate serve` on SoftHSM behind the fault module, one token and one keygate per test.
 */
import assert from 'node:assert/strict';
import { once } from 'node:events';
import type { Socket } from 'node:net';
import { it } from 'node:test';
import type { TestContext } from 'node:test';
import { connect } from 'node:tls';
import type { SecureVersion } from 'node:tls';
import type { TokenSnapshot } from '../../src/engine/native.d.ts';
import type { GeneratedKind } from '../../src/pkcs11/provision.ts';
import { FaultModule } from '../support/fault-module.ts';
import { startKeygate } from '../support/keygate.ts';
import type { Keygate } from '../support/keygate.ts';
import { provisionedToken } from '../support/provisioned-token.ts';
import { assertEchoes, assertServes, clientHello, refusalOf, tlsClient } from '../support/tls-client.ts';
import { until } from '../support/until.ts';
import { echoUpstream } from '../support/upstream.ts';

/** What Node makes of the alert internal_error (RFC 8446 6.2). */
const signDeadlineMs = 1000;
const internalError = /^ERR_SSL_(TLSV1|SSL\/TLS)_ALERT_INTERNAL_ERROR$/;

/** The policy has P-384 alone; a client of TLS 1.3 guesses with its first group, and is told to try again if that is another. */
const flights: readonly {
  readonly name: string;
  readonly version: SecureVersion;
  readonly ecdhCurve: string;
  readonly guesses: boolean;
}[] = [
  { name: 'TLS 1.3', version: 'TLSv1.3', ecdhCurve: 'P-384:P-256', guesses: true },
  { name: 'TLS 1.3 after a HelloRetryRequest', version: 'TLSv1.3', ecdhCurve: 'P-256:P-384', guesses: false },
  { name: 'TLS 1.2', version: 'TLSv1.2', ecdhCurve: 'P-384:P-256', guesses: false },
];
/** How the client's share of a P-384 key exchange begins: the group, and 97 bytes of point (RFC 8446 4.2.8). */
const p384Share = Buffer.from('0018006104', 'hex');

for (const { name, version, ecdhCurve, guesses } of flights) {
  it(`${name}: while C_Sign hangs only full handshakes fail, at their deadline, until it goes on`, async (test) => {
    const { faults, keygate } = await faulty(test, {
      token: { lanes: 2, signDeadline: `${signDeadlineMs}ms`, queue: { age: '1m' } },
      document: { policies: { 'p384-only': { groups: ['secp384r1'] } } },
      listener: { policy: 'p384-only' },
    });
    const options = { port: keygate.port(), minVersion: version, maxVersion: version, ecdhCurve };
    assert.equal((await clientHello(options)).includes(p384Share), guesses);
    const established = await Promise.all([1, 2, 3].map(() => tlsClient(options)));
    for (const client of established) await assertEchoes(client);
    const session = await tlsSession(options);

    const before = await echoLatenciesMs(established);

    faults.hang('C_Sign');
    const refusals = Promise.all(
      Array.from({ length: 5 }, async () => {
        const askedAt = performance.now();
        return { refusal: await refusalOf(options), afterMs: performance.now() - askedAt };
      }),
    );
    await until('hang of every lane', () => faults.read('C_Sign', 'inFlight') === 2);
    const during = await echoLatenciesMs(established);
    test.diagnostic(`echo p50 and p99 in ms: ${percentiles(before)} before, ${percentiles(during)} while C_Sign hangs`);
    // No round trip waits for a token: even the slowest of a busy machine is far from the deadline of a signature.
    assert.ok(Math.max(...during) < signDeadlineMs, `${Math.max(...during)} ms`);
    for (let round = 0; round < 5; round++) {
      const resumed = await tlsClient({ ...options, session });
      assert.ok(resumed.isSessionReused());
      await assertEchoes(resumed);
      resumed.destroy();
    }
    for (const { refusal, afterMs } of await refusals) {
      assert.match(refusal, internalError);
      assert.ok(afterMs >= signDeadlineMs && afterMs < 5 * signDeadlineMs, `refused after ${afterMs} ms`);
    }
    await keygate.closed('token/signing/deadline', { count: 5 });
    assert.equal(faults.read('C_Sign', 'inFlight'), 2, 'it hung all the time');

    faults.release('C_Sign');
    const full = await tlsClient(options);
    assert.ok(!full.isSessionReused());
    for (const client of [full, ...established]) await assertEchoes(client);
    await assertNeverRestarted(keygate);
  });
}

it('a client that leaves while its signature is pending is closed at once, and what is not begun is never signed', async (test) => {
  const { faults, keygate } = await faulty(test, { token: { lanes: 1, signDeadline: '1m', queue: { age: '1m' } } });
  const signed = faults.read('C_Sign', 'calls');
  faults.hang('C_Sign');
  const clients = [1, 2, 3].map(() => pendingClient(keygate));
  await until('one signature begun and two waiting', async () => {
    const { queueDepthEc } = await tokenOf(keygate);
    return queueDepthEc === 2 && faults.read('C_Sign', 'inFlight') === 1;
  });

  for (const client of clients) client.destroy();
  await keygate.closed('client/handshake/closed', { count: 3 });
  const { listeners } = (await keygate.status()).engine;
  assert.deepEqual(
    listeners.map(({ connectionsOpen, handshakesInFlight }) => [connectionsOpen, handshakesInFlight]),
    [[0, 0]],
  );
  assert.equal(faults.read('C_Sign', 'inFlight'), 1, 'the lane is still inside');

  faults.release('C_Sign');
  await until('two cancelled signatures', async () => (await tokenOf(keygate)).cancelled === 2);
  assert.equal(faults.read('C_Sign', 'calls'), signed + 1);
  await assertServes(keygate.port());
  assert.equal((await tokenOf(keygate)).queueDepthEc, 0);
});

it('a client is turned away at once when the queue is full, and those who wait are served in the end', async (test) => {
  const { faults, keygate } = await faulty(test, {
    token: { lanes: 1, signDeadline: '1m', queue: { max: 2, age: '1m' } },
  });
  faults.hang('C_Sign');
  const waiting = [tlsClient({ port: keygate.port() })];
  await until('hang of the lane', () => faults.read('C_Sign', 'inFlight') === 1);
  waiting.push(tlsClient({ port: keygate.port() }), tlsClient({ port: keygate.port() }));
  await until('full queue', async () => (await tokenOf(keygate)).queueDepthEc === 2);

  assert.match(await refusalOf({ port: keygate.port() }), internalError);
  await keygate.closed('token/signing/queue_full');
  assert.deepEqual(Object.keys(await keygate.closes()), ['token/signing/queue_full']);
  assert.equal((await tokenOf(keygate)).shedQueueFull, 1);

  faults.release('C_Sign');
  for (const client of await Promise.all(waiting)) await assertEchoes(client);
});

it('a client is turned away when it has waited longer than the queue allows', async (test) => {
  const { faults, keygate } = await faulty(test, { token: { lanes: 1, signDeadline: '1m', queue: { age: '100ms' } } });
  faults.hang('C_Sign');
  const served = tlsClient({ port: keygate.port() });
  await until('hang of the lane', () => faults.read('C_Sign', 'inFlight') === 1);
  const refusal = refusalOf({ port: keygate.port() });
  await until('signature in the queue', async () => (await tokenOf(keygate)).queueDepthEc === 1);
  // No lane looks at the queue now; whoever comes next finds that the one before is too old.
  const others: Socket[] = [];
  await until('refusal of the one that is too old', async () => {
    others.push(pendingClient(keygate));
    return (await keygate.closes())['token/signing/queue_aged'] !== undefined;
  });
  assert.match(await refusal, internalError);
  for (const client of others) client.destroy();
  faults.release('C_Sign');
  await assertEchoes(await served);
});

for (const kind of ['p256', 'rsa2048'] as const) {
  it(`no client is ever sent a wrong signature (${kind})`, async (test) => {
    const { faults, keygate } = await faulty(test, { kind, token: { verify: { ec: 'always', rsa: 'always' } } });
    const established = await tlsClient({ port: keygate.port() });
    faults.damage();
    for (let attempt = 0; attempt < 5; attempt++)
      assert.match(await refusalOf({ port: keygate.port() }), internalError);
    const { 'token/signing/wrong_signature': wrong = 0, ...others } = await keygate.closes();
    assert.ok(wrong >= 1);
    assert.deepEqual(others, wrong === 5 ? {} : { 'token/signing/token_down': 5 - wrong });
    assert.equal((await tokenOf(keygate)).up, false);
    await assertEchoes(established);

    faults.clear();
    await untilServed(keygate);
    assert.ok(faults.read('C_Sign', 'flipped') >= 1);
    assert.equal((await tokenOf(keygate)).up, true);
    await assertNeverRestarted(keygate);
  });
}

/** PKCS#11 v3.0, CKR_*. */
const repairedUnseen = {
  CKR_SESSION_HANDLE_INVALID: 0xb3,
  CKR_SESSION_CLOSED: 0xb0,
  CKR_USER_NOT_LOGGED_IN: 0x101,
  CKR_KEY_HANDLE_INVALID: 0x60,
  CKR_OBJECT_HANDLE_INVALID: 0x82,
  CKR_OPERATION_ACTIVE: 0x90,
  CKR_OPERATION_NOT_INITIALIZED: 0x91,
  CKR_DEVICE_ERROR: 0x30,
  CKR_FUNCTION_FAILED: 0x6,
  CKR_GENERAL_ERROR: 0x5,
  'a throttled vendor': 0x8000_0011,
};

it('a token that fails once costs no client its handshake', async (test) => {
  const { faults, keygate } = await faulty(test, { token: { lanes: 1 } });
  for (const [name, ckr] of Object.entries(repairedUnseen)) {
    for (const call of ['C_SignInit', 'C_Sign'] as const) {
      await test.test(`${call} returns ${name}`, async () => {
        const before = faults.read(call, 'injected');
        faults.fail(call, ckr, 1);
        await assertServes(keygate.port());
        assert.equal(faults.read(call, 'injected'), before + 1);
      });
    }
  }
  await assertNeverRestarted(keygate);
  assert.equal(faults.violations, 0);
});

it('a token that goes on failing is taken out of service, and comes back by itself', async (test) => {
  const { faults, keygate } = await faulty(test, { token: { queue: { age: '300ms' } } });
  const codes = {
    ...repairedUnseen,
    CKR_DEVICE_REMOVED: 0x32,
    CKR_TOKEN_NOT_PRESENT: 0xe0,
    CKR_CRYPTOKI_NOT_INITIALIZED: 0x190,
  };
  for (const [name, ckr] of Object.entries(codes)) {
    await test.test(`C_Sign returns ${name}`, async () => {
      const established = await tlsClient({ port: keygate.port() });
      faults.fail('C_Sign', ckr);
      await until('token out of service', async () => {
        assert.match(await refusalOf({ port: keygate.port() }), internalError);
        return !(await tokenOf(keygate)).up;
      });
      const before = await keygate.closes();
      assert.match(await refusalOf({ port: keygate.port() }), internalError);
      await keygate.closed('token/signing/token_down', { before });
      await assertEchoes(established);
      established.destroy();
      faults.clear();
      await untilServed(keygate);
    });
  }
  await assertNeverRestarted(keygate);
  assert.equal(faults.violations, 0);
});

interface Faulty {
  readonly faults: FaultModule;
  readonly keygate: Keygate;
}

interface FaultySettings {
  readonly kind?: GeneratedKind;
  /** Over those of the provisioned token. */
  readonly token?: object;
  readonly listener?: object;
  readonly document?: object;
}

/** A keygate with an echo upstream on a token that can be made to fail. Ends with the test, asserting that it ends well. */
async function faulty(
  test: TestContext,
  { kind = 'p256', token = {}, listener = {}, document = {} }: FaultySettings,
): Promise<Faulty> {
  const provisioned = await provisionedToken({ www: { kind } });
  const upstream = await echoUpstream();
  const faults = new FaultModule(provisioned);
  const keygate = await startKeygate(
    provisioned,
    {
      upstreams: { echo: { servers: [upstream.address] } },
      listeners: { https: listener },
      tokens: { hsm: { ...provisioned.settings, module: faults.module, ...token } },
      drainDeadline: '0s',
      ...document,
    },
    { env: faults.env },
  );
  test.after(async () => {
    try {
      await keygate.stop();
      assert.equal(faults.violations, 0, 'keygate broke a rule of PKCS#11');
    } finally {
      await upstream.close();
      faults.close();
      provisioned.dispose();
    }
  });
  return { faults, keygate };
}

/** What resumes a TLS session of a full handshake. */
/** Of 200 round trips on each of the connections, which go on at the same time. */
async function echoLatenciesMs(clients: readonly Socket[]): Promise<number[]> {
  const latenciesMs: number[] = [];
  for (let round = 0; round < 200; round++) {
    const echoes = clients.map(async (client) => {
      const askedAt = performance.now();
      await assertEchoes(client, `round ${round}`);
      latenciesMs.push(performance.now() - askedAt);
    });
    await Promise.all(echoes);
  }
  return latenciesMs;
}

function percentiles(latenciesMs: readonly number[]): string {
  const sorted = latenciesMs.toSorted((a, b) => a - b);
  return [0.5, 0.99].map((share) => sorted[Math.floor(share * (sorted.length - 1))]?.toFixed(2)).join(' and ');
}

async function tlsSession(options: { readonly port: number }): Promise<Buffer> {
  const client = connect({ host: '127.0.0.1', rejectUnauthorized: false, ...options });
  const [session] = (await once(client, 'session')) as [Buffer];
  client.destroy();
  return session;
}

/** A client that has begun a handshake and does not mind how it ends. */
function pendingClient(keygate: Keygate): Socket {
  return connect({ host: '127.0.0.1', port: keygate.port(), rejectUnauthorized: false }).on('error', () => {});
}

async function untilServed(keygate: Keygate): Promise<void> {
  await until('full handshake', async () => {
    try {
      await assertServes(keygate.port());
      return true;
    } catch (error) {
      assert.match(String((error as NodeJS.ErrnoException).code), internalError);
      return false;
    }
  });
}

async function tokenOf(keygate: Keygate): Promise<TokenSnapshot> {
  const [token] = (await keygate.status()).engine.tokens;
  assert.ok(token !== undefined);
  return token;
}

async function assertNeverRestarted(keygate: Keygate): Promise<void> {
  const { workers } = await keygate.status();
  assert.deepEqual(
    workers.map(({ state, restarts }) => [state, restarts]),
    workers.map(() => ['ready', 0]),
  );
}
