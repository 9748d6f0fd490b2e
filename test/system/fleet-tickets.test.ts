/**
 * Owns: session tickets whose secrets a token derives: keygates that share nothing but the token's key resume each other's TLS
 * sessions, through rotations, restarts and a token that is gone.
 * Must not know: how secrets are derived.
 * Runs: against real `keygate serve` processes on SoftHSM; some tokens are behind the fault module.
 */
import assert from 'node:assert/strict';
import { once } from 'node:events';
import { globSync } from 'node:fs';
import { it } from 'node:test';
import type { TestContext } from 'node:test';
import { connect } from 'node:tls';
import { generateTicketKey } from '../../src/pkcs11/provision.ts';
import { keygate as command } from '../support/command.ts';
import { FaultModule } from '../support/fault-module.ts';
import { refusedKeygate, startKeygate } from '../support/keygate.ts';
import type { Keygate, KeygateDocument } from '../support/keygate.ts';
import { P11KitServer } from '../support/p11-kit.ts';
import { provisionedToken } from '../support/provisioned-token.ts';
import type { ProvisionedToken } from '../support/provisioned-token.ts';
import { assertEchoes, tlsClient } from '../support/tls-client.ts';
import { until } from '../support/until.ts';
import { echoUpstream } from '../support/upstream.ts';

const versions = ['TLSv1.2', 'TLSv1.3'] as const;
const key = 'pkcs11:object=tickets';
const ckrDeviceError = 0x30;

for (const version of versions) {
  it(`${version}: two keygates with the same key in the token resume each other's sessions, also after a restart`, async (test) => {
    const { token, start } = await fleet(test);
    const [first, second] = [await start(), await start()];
    const session = await sessionOf(first, version);
    assert.equal(await resumes(second, version, session), true);
    assert.equal(await resumes(first, version, await sessionOf(second, version)), true);
    await first.stop();
    assert.equal(await resumes(await start(), version, session), true);
    // What makes them agree is the key: with another one, or random keys, they do not.
    await token.use((open) => generateTicketKey(open, 'other'));
    assert.equal(await resumes(await start({ key: 'pkcs11:object=other' }), version, session), false);
    assert.equal(await resumes(await start({}), version, session), false);
  });
}

it('resumption makes no call into the token', async (test) => {
  const { start, faults } = await fleet(test);
  const keygate = await start();
  const session = await sessionOf(keygate, 'TLSv1.3');
  const calls = faults.read('C_SignInit', 'calls');
  assert.equal(await resumes(keygate, 'TLSv1.3', session), true);
  assert.equal(faults.read('C_SignInit', 'calls'), calls);
});

it('tickets are accepted one rotation longer than they are issued, and no longer, by every keygate', async (test) => {
  const { start } = await fleet(test);
  const settings = { key, rotation: '2s', lifetime: '2s' };
  const [first, second] = [await start(settings), await start(settings)];
  const epoch = await nextEpoch(first);
  const session = await lastSessionOf(first, epoch);
  await reached(second, epoch + 1);
  assert.equal(await resumes(second, 'TLSv1.3', session), true, 'one epoch later');
  await reached(second, epoch + 2);
  assert.equal(await resumes(second, 'TLSv1.3', session), false, 'two epochs later');
  const rotated = await second.logged({ event: 'tickets_rotated' });
  assert.equal(typeof rotated['epoch'], 'number');
  assert.equal(await second.metric('keygate_ticket_epoch'), await epochOf(second));
});

it('a keygate whose clock is further ahead than tickets live refuses those of others, and its own are taken by them', async (test) => {
  const { start } = await fleet(test);
  const settings = { key, rotation: farFromItsEnds().rotation, lifetime: '1m' };
  const now = await start(settings);
  const session = await sessionOf(now, 'TLSv1.3');
  const ahead = await start(settings, { env: clockAhead(120_000) });
  assert.equal(await resumes(ahead, 'TLSv1.3', session), false);
  assert.equal(await resumes(now, 'TLSv1.3', await sessionOf(ahead, 'TLSv1.3')), true);
});

it("keygates whose clocks are an epoch apart resume each other's sessions", async (test) => {
  const { start } = await fleet(test);
  const { rotation, toNextMs } = farFromItsEnds();
  const settings = { key, rotation, lifetime: rotation };
  const now = await start(settings);
  const session = await sessionOf(now, 'TLSv1.3');
  const ahead = await start(settings, { env: clockAhead(toNextMs + 60_000) });
  assert.equal(await epochOf(ahead), (await epochOf(now)) + 1);
  assert.equal(await resumes(ahead, 'TLSv1.3', session), true);
  assert.equal(await resumes(now, 'TLSv1.3', await sessionOf(ahead, 'TLSv1.3')), true);
});

it('while the token is out of reach the former key is used on, the log says so, and it rotates when the token is back', async (test) => {
  const { start, faults } = await fleet(test);
  const keygate = await start({ key, rotation: '1s', lifetime: '1s' });
  await nextEpoch(keygate);
  faults.fail('C_SignInit', ckrDeviceError);
  const failed = await keygate.logged({ event: 'tickets_not_rotated' });
  assert.match(String(failed['reason']), /token hsm, key tickets: C_Sign.* CKR_DEVICE_ERROR/);
  const stopped = await epochOf(keygate);
  assert.equal((await keygate.admin('/ready')).status, 200);
  faults.clear();
  await reached(keygate, stopped + 1, 30_000);
});

it('a reload changes from random keys to those of the token and back', async (test) => {
  const { start, document } = await fleet(test);
  const [other, keygate] = [await start(), await start({})];
  const session = await sessionOf(other, 'TLSv1.3');
  assert.equal(await resumes(keygate, 'TLSv1.3', session), false);
  assert.equal((await keygate.reload(document({ key }))).outcome, 'committed');
  assert.equal(await resumes(keygate, 'TLSv1.3', session), true);
  assert.equal((await keygate.reload(document({}))).outcome, 'committed');
  assert.equal(await resumes(keygate, 'TLSv1.3', session), false);
  assert.equal(await resumes(keygate, 'TLSv1.3', await sessionOf(keygate, 'TLSv1.3')), true);
});

it('a token with the ticket key that is away at the start derives tickets once it is back', async (test) => {
  const { token, start, document, add } = await fleet(test);
  const server = new P11KitServer(test, token);
  const other = await start();
  const keygate = await add(
    {
      ...document({ key, tokens: ['far'] }),
      tokens: { hsm: token.settings, far: { ...token.settings, module: server.module } },
      certificates: { www: { ...token.certificates['www'], tokens: ['hsm'] } },
    },
    server.env,
  );
  const warning =
    'no token with the ticket key is in reach: tickets are of random keys, good for this keygate alone, until one is';
  await keygate.logged({ event: 'token_warning', message: warning });
  assert.equal(await resumes(keygate, 'TLSv1.3', await sessionOf(keygate, 'TLSv1.3')), true);
  const session = await sessionOf(other, 'TLSv1.3');
  assert.equal(await resumes(keygate, 'TLSv1.3', session), false);
  await server.start();
  await until('secrets of the token', async () => (await keygate.status()).engine.tickets.epoch !== undefined, {
    deadlineMs: 30_000,
  });
  assert.equal(await resumes(keygate, 'TLSv1.3', session), true);
});

it('a ticket key that is not there is refused at the start and by check, which name what is there', async (test) => {
  const { token, document, faults } = await fleet(test);
  const { exitCode, stderr } = await refusedKeygate(token, document({ key: 'pkcs11:object=ticket' }), {
    env: faults.env,
  });
  assert.equal(exitCode, 69);
  assert.match(
    stderr,
    /token_key_not_found: .*secret key pkcs11:object=ticket: not found; secret keys there: "tickets"/,
  );
});

it('tokens that hold different ticket keys are refused', async (test) => {
  const { token, document } = await fleet(test);
  token.addToken('twin');
  const where = ['--module', token.module, '--token', 'twin', '--pin-file', token.pinFile];
  const made = await command(['key', 'generate', ...where, '--label', 'tickets', '--type', 'ticket'], token.env);
  assert.equal(made.exitCode, 0, made.stderr);
  const { exitCode, stderr } = await refusedKeygate(token, {
    ...document({ key }),
    tokens: { hsm: token.settings, twin: { ...token.settings, uri: 'pkcs11:token=twin' } },
    certificates: { www: { ...token.certificates['www'], tokens: ['hsm'] } },
  });
  assert.equal(exitCode, 69);
  assert.match(stderr, /token_key_mismatch: .*tokens hsm and twin hold different ticket keys/);
});

it('check says where the ticket key is and that it cannot leave', async (test) => {
  const { start, faults } = await fleet(test);
  const keygate = await start();
  const { stdout, exitCode } = await command(['check', '-c', keygate.file], faults.env);
  assert.equal(exitCode, 0);
  assert.match(stdout, /tickets.*key "tickets" .* in token hsm: cannot leave it, derives ticket keys/);
});

interface Fleet {
  readonly token: ProvisionedToken;
  readonly faults: FaultModule;
  /** A keygate of the fleet, stopped when the test ends. Default: with the key. */
  start(tickets?: object, options?: { readonly env?: Readonly<Record<string, string>> }): Promise<Keygate>;
  /** Another one, of its own configuration. */
  add(document: KeygateDocument, env: Readonly<Record<string, string>>): Promise<Keygate>;
  document(tickets: object): KeygateDocument;
}

async function fleet(test: TestContext): Promise<Fleet> {
  const token = await provisionedToken({ www: { kind: 'p256' } });
  await token.use((open) => generateTicketKey(open, 'tickets'));
  const upstream = await echoUpstream();
  const faults = new FaultModule(token);
  const started: Keygate[] = [];
  test.after(async () => {
    try {
      for (const keygate of started) await keygate.stop();
      assert.equal(faults.violations, 0, 'keygate broke a rule of PKCS#11');
    } finally {
      await upstream.close();
      faults.close();
      token.dispose();
    }
  });
  const document = (tickets: object) => ({
    upstreams: { echo: { servers: [upstream.address] } },
    listeners: { https: {} },
    tokens: { hsm: { ...token.settings, module: faults.module } },
    tickets,
  });
  const add = async (configuration: KeygateDocument, env: Readonly<Record<string, string>>): Promise<Keygate> => {
    const keygate = await startKeygate(token, configuration, { env: { ...faults.env, ...env } });
    started.push(keygate);
    return keygate;
  };
  return {
    token,
    faults,
    async start(...args) {
      const [tickets = { key }, { env = {} } = {}] = args;
      return add(document(tickets), env);
    },
    add,
    document,
  };
}

/** What resumes a TLS session of a full handshake. */
async function sessionOf(keygate: Keygate, version: (typeof versions)[number]): Promise<Buffer> {
  const client = connect({
    host: '127.0.0.1',
    port: keygate.port(),
    rejectUnauthorized: false,
    minVersion: version,
    maxVersion: version,
  });
  const [session] = (await once(client, 'session')) as [Buffer];
  client.end();
  await once(client.resume(), 'close');
  return session;
}

async function resumes(keygate: Keygate, version: (typeof versions)[number], session: Buffer): Promise<boolean> {
  const client = await tlsClient({ port: keygate.port(), minVersion: version, maxVersion: version, session });
  await assertEchoes(client);
  const resumed = client.isSessionReused();
  client.end();
  await once(client.resume(), 'close');
  return resumed;
}

async function epochOf(keygate: Keygate): Promise<number> {
  const { epoch } = (await keygate.status()).engine.tickets;
  assert.ok(epoch !== undefined, 'no token derives ticket keys');
  return epoch;
}

/** The epoch that begins next, when it has begun. */
async function nextEpoch(keygate: Keygate): Promise<number> {
  const now = await epochOf(keygate);
  return until('next epoch', async () => {
    const epoch = await epochOf(keygate);
    return epoch > now && epoch;
  });
}

async function reached(keygate: Keygate, epoch: number, deadlineMs = 10_000): Promise<void> {
  await until(`epoch ${epoch}`, async () => (await epochOf(keygate)) >= epoch, { deadlineMs });
}

/** The last one that it gave before this epoch ended. */
async function lastSessionOf(keygate: Keygate, epoch: number): Promise<Buffer> {
  let last = await sessionOf(keygate, 'TLSv1.3');
  await until(`end of epoch ${epoch}`, async () => {
    const session = await sessionOf(keygate, 'TLSv1.3');
    if ((await epochOf(keygate)) > epoch) return true;
    last = session;
    return false;
  });
  return last;
}

/** A rotation of whose present epoch neither the begin nor the end is near: none begins while a test runs. */
function farFromItsEnds(): { readonly rotation: string; readonly toNextMs: number } {
  for (const days of [7, 6, 5]) {
    const rotationMs = days * 86_400_000;
    const toNextMs = rotationMs - (Date.now() % rotationMs);
    if (toNextMs > rotationMs / 10 && toNextMs < (rotationMs * 9) / 10) return { rotation: `${days}d`, toNextMs };
  }
  return assert.fail('every rotation is near an end');
}

/** libfaketime, as `faketime` would preload it. */
function clockAhead(ms: number): Record<string, string> {
  const library = globSync('/usr/lib/*/faketime/libfaketime.so.1')[0];
  assert.ok(library !== undefined, 'apt-get install faketime');
  return { LD_PRELOAD: library, FAKETIME: `+${Math.round(ms / 1000)}` };
}
