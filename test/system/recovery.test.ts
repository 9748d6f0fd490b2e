/**
 * Owns: the campaign that shows that nobody restarts keygate by hand: whatever a token, a module, what is between them or the host
 * does, established connections and resumed handshakes go on, no client is sent a wrong signature, full handshakes are back as
 * soon as they can be, and neither descriptors nor memory are left behind. Its table is in .keygate/artifacts/faults.md.
 * Must not know: how lanes repair themselves (src/engine/tests/signing).
 * Runs: against a real `keygate serve` under a continuous load, on SoftHSM behind the fault module or p11-kit's server. With
 * KEYGATE_FAULTS=long (`npm run test:faults`) each fault of the table lasts, for each kind of key and version of TLS.
 */
import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { globSync, mkdirSync, readdirSync, readFileSync, readlinkSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { after, it } from 'node:test';
import { setTimeout as pause } from 'node:timers/promises';
import type { TestContext } from 'node:test';
import type { TokenSnapshot } from '../../src/engine/native.d.ts';
import { generateTicketKey } from '../../src/pkcs11/provision.ts';
import { FaultModule } from '../support/fault-module.ts';
import { residentBytes, startKeygate } from '../support/keygate.ts';
import type { Keygate } from '../support/keygate.ts';
import { Load } from '../support/load.ts';
import { NameServer, whyNoNameServer } from '../support/name-server.ts';
import { P11KitServer } from '../support/p11-kit.ts';
import { provisionedToken } from '../support/provisioned-token.ts';
import { assertServes, untilRefused } from '../support/tls-client.ts';
import { until } from '../support/until.ts';
import { echoUpstream } from '../support/upstream.ts';
import type { Upstream } from '../support/upstream.ts';

/** Of the issue: a fault that is lifted is forgotten by then. */
const healedMsMax = 2000;
/** PKCS#11 v3.0, CKR_*. */
const deviceError = 0x30;
const functionFailed = 0x6;
const cryptokiNotInitialized = 0x190;
const tokenNotPresent = 0xe0;

const isLong = process.env['KEYGATE_FAULTS'] === 'long';
/** How long a fault goes on once it is to be seen. */
const lastsMs = isLong ? 3000 : 0;
/** What caches and allocators may keep: twice what they do. A leak of each connection would be more. */
const growthBytesMax = 24 * 1024 * 1024;

interface Fault {
  readonly name: string;
  readonly token?: object;
  readonly document?: object;
  readonly env?: (directory: string) => Readonly<Record<string, string>>;
  /** The server has a name, and the name server can be made to fail; default: it is known by its address. */
  readonly named?: 'alone' | 'beside another';
  readonly skip?: string | false;
  readonly inject: (parts: Parts) => void | Promise<void>;
  /** Default: no fault any more. @returns the keygate that serves from now on, where it is another */
  readonly lift?: (parts: Parts) => void | Promise<void | Keygate>;
  /** Nobody lifts it: keygate itself ends it, or lives with it. */
  readonly liftedByNobody?: boolean;
  /** What is to be seen while it lasts, or when keygate has ended it. */
  readonly during?: (token: TokenSnapshot, load: Load, keygate: Keygate, parts: Parts) => boolean | Promise<boolean>;
  /** Nobody gets through while it lasts: those who come wait, or are turned away. */
  readonly turnsAway?: boolean;
  /** Calls do not return for so long that keygate itself may put another worker in the place of one. */
  readonly mayReplace?: boolean;
  /** Full handshakes that fail for it; default: none. */
  readonly refuses?: boolean;
}

const faultTable: readonly Fault[] = [
  {
    name: 'a device that answers again only when the module was initialised again',
    inject: ({ faults }) => {
      for (const call of ['C_SignInit', 'C_OpenSession'] as const)
        faults.fail(call, deviceError, { heal: 'initialize' });
    },
    liftedByNobody: true,
    during: ({ reinitialized }) => reinitialized === 1,
  },
  {
    name: 'a module that has forgotten that it was initialised',
    inject: ({ faults }) => faults.fail('C_SignInit', cryptokiNotInitialized, { heal: 'initialize' }),
    liftedByNobody: true,
    during: ({ reinitialized }) => reinitialized === 1,
  },
  {
    name: 'a token that is pulled, and comes back in another slot',
    token: { queue: { age: '300ms' } },
    inject({ faults }) {
      faults.set('slotShift', 1000);
      faults.set('slotsHidden', 1);
      faults.fail('C_SignInit', tokenNotPresent, { heal: 'initialize' });
    },
    lift: ({ faults }) => faults.set('slotsHidden', 0),
    during: ({ up }, { refused }) => !up && refused > 0,
    refuses: true,
  },
  {
    name: 'handles that mean other keys after each initialisation',
    token: { verify: { ec: 1_000_000 } },
    inject({ faults }) {
      faults.set('handlesExchanged', 1);
      faults.fail('C_SignInit', cryptokiNotInitialized, { heal: 'initialize' });
    },
    during: ({ reinitialized }) => reinitialized === 1,
  },
  {
    name: 'somebody else who logs everybody out',
    inject: ({ faults }) => faults.set('logoutLeft', 1),
    liftedByNobody: true,
    during: ({ loggedIn }) => loggedIn === 2,
  },
  {
    name: 'a login that takes a second, and all are logged out',
    inject({ faults }) {
      faults.slow('C_Login', { delayMs: 1000 });
      faults.set('logoutLeft', 1);
    },
    during: ({ loggedIn }) => loggedIn === 2,
  },
  {
    name: 'a login that hangs, and all are logged out',
    token: { signDeadline: '300ms', queue: { age: '300ms' } },
    inject({ faults }) {
      faults.hang('C_Login');
      faults.set('logoutLeft', 1);
    },
    during: ({ up, loggedIn }, { refused }) => !up && loggedIn === 1 && refused > 0,
    mayReplace: true,
    refuses: true,
  },
  {
    name: 'a session that is closed behind our back',
    inject: ({ faults }) => faults.set('closeLeft', 1),
    liftedByNobody: true,
    during: ({ reopened }) => reopened === 1,
  },
  {
    name: 'sessions that are closed behind our back as soon as they are opened',
    inject: ({ faults }) => faults.set('closeLeft', 1000),
    during: ({ reopened, wentDown }) => reopened >= 3 && wentDown >= 1,
    refuses: true,
  },
  {
    name: 'a vendor that is busy one time in ten',
    inject: ({ faults }) => faults.fail('C_Sign', functionFailed, { perMillion: 100_000 }),
    during: ({ reopened }) => reopened >= 3,
    refuses: true,
  },
  {
    name: 'wrong signatures',
    token: { verify: { ec: 'always' } },
    inject: ({ faults }) => faults.damage(),
    during: ({ up, wentDown }) => !up && wentDown > 0,
    refuses: true,
  },
  {
    name: 'a module that hangs',
    token: { signDeadline: '300ms', queue: { age: '300ms' } },
    inject: ({ faults }) => faults.hang('C_Sign'),
    during: ({ lanesLost, up }, { refused }) => lanesLost > 0 && !up && refused > 0,
    mayReplace: true,
    refuses: true,
  },
  {
    name: 'a rare call that takes far longer than anybody waits',
    token: { lanes: 2, signDeadline: '300ms' },
    inject: ({ faults }) => faults.slow('C_Sign', { spikeMs: 3000, spikeEvery: 50 }),
    during: ({ lanesWrittenOff }) => lanesWrittenOff >= 2,
    mayReplace: true,
    refuses: true,
  },
  {
    name: 'a device that does ten signatures a second',
    token: { signDeadline: '1s', queue: { age: '1s' } },
    inject: ({ faults }) => faults.slow('C_Sign', { perSecond: 10 }),
    during: ({ lanesBusy }) => lanesBusy > 0,
  },
  {
    name: 'a full disk for the log',
    document: { log: { access: { file: '/dev/full' } } },
    inject: () => {},
    liftedByNobody: true,
    during: async (_, __, keygate) =>
      ((await keygate.metric('keygate_log_lines_total', { outcome: 'dropped' })) ?? 0) > 0,
  },
  ...['+3600', '-3600'].map((offset): Fault => ({
    name: `a clock that jumps by ${offset} s`,
    env: fakedClock,
    inject: ({ directory }) => writeFileSync(clockFile(directory), offset),
    lift: ({ directory }) => writeFileSync(clockFile(directory), '+0'),
  })),
  {
    name: 'no file descriptors',
    inject: ({ keygate }) => limitDescriptors(keygate, 'none'),
    during: async (_, __, keygate) => {
      const { engine } = await keygate.status();
      return engine.listeners.some(({ acceptFailures }) => acceptFailures > 0);
    },
    lift: ({ keygate }) => limitDescriptors(keygate, 'enough'),
    turnsAway: true,
    refuses: true,
  },
  {
    name: 'a name of the only server that DNS does not know any more, at a reload',
    named: 'alone',
    skip: whyNoNameServer(),
    async inject({ names, keygate, upstream }) {
      assert.ok(upstream.sockets.size > 0, 'the server is in use');
      names?.answer('unknown');
      const { outcome, reasons } = await keygate.reload();
      assert.deepEqual([outcome, reasons.map(({ code }) => code)], ['rolled_back', ['upstream_unresolved']]);
    },
    during: async (_, load) => fullHandshakes(load),
    lift: knownAgain,
  },
  {
    name: 'a resolver that does not answer any more, at a reload, and one of two servers has a name',
    named: 'beside another',
    skip: whyNoNameServer(),
    async inject({ names, keygate, upstream, other }) {
      assert.ok(upstream.sockets.size > 0 && other.sockets.size > 0, 'both servers are in use');
      names?.answer('silence');
      const { outcome } = await keygate.reload();
      assert.equal(outcome, 'committed');
    },
    during: async (_, load, keygate, { upstream, other }) => {
      const [before, beside] = [upstream.accepted, other.accepted];
      await fullHandshakes(load);
      // What came with the former configuration may still have been on its way.
      const isLeftOut = upstream.accepted === before && other.accepted > beside;
      return isLeftOut && keygate.log.some(({ event }) => event === 'upstream_unresolved');
    },
    lift: knownAgain,
  },
  {
    name: 'the only server stops listening, and comes back',
    inject: ({ upstream }) => upstream.refuse(),
    lift: async ({ upstream }) => upstream.listen(),
    during: (_, { refused }) => refused > 5,
    turnsAway: true,
    refuses: true,
  },
  {
    name: 'the primary is killed, and its service manager starts another',
    document: { tickets: { key: 'pkcs11:object=tickets' } },
    inject: ({ keygate }) => void process.kill(keygate.pid, 'SIGKILL'),
    lift: async ({ another }) => another(),
    turnsAway: true,
    refuses: true,
  },
];

async function fullHandshakes(load: Load): Promise<boolean> {
  const before = load.full.length;
  return until('full handshakes', () => load.full.length > before + 10);
}

/** Of resolv.conf(5): as it is by default keygate gives up before the resolver does, after some seconds. */
const resolving = isLong ? '' : 'timeout:1 attempts:1';

/** Names have addresses again, and a reload asks for them. */
async function knownAgain({ names, keygate, upstream }: Parts): Promise<void> {
  names?.answer('truth');
  const { outcome } = await keygate.reload();
  assert.equal(outcome, 'committed');
  const { accepted } = upstream;
  await until('connection to the server with the name', () => upstream.accepted > accepted);
}

/** libfaketime looks into the file again and again; what is monotonic stays so. */
function fakedClock(directory: string): Readonly<Record<string, string>> {
  const library = globSync('/usr/lib/*/faketime/libfaketime.so.1')[0];
  assert.ok(library !== undefined, 'apt-get install faketime');
  writeFileSync(clockFile(directory), '+0');
  return {
    LD_PRELOAD: library,
    FAKETIME_TIMESTAMP_FILE: clockFile(directory),
    FAKETIME_CACHE_DURATION: '1',
    FAKETIME_DONT_FAKE_MONOTONIC: '1',
  };
}

function clockFile(directory: string): string {
  return join(directory, 'clock');
}

/** Of the workers: not one more, or as many as they could want. The primary answers meanwhile. */
async function limitDescriptors(keygate: Keygate, to: 'none' | 'enough'): Promise<void> {
  for (const { pid } of (await keygate.status()).workers) {
    const [, hard = ''] = /^Max open files +\d+ +(\d+)/m.exec(readFileSync(`/proc/${pid}/limits`, 'utf8')) ?? [];
    // Descriptors are numbered from 0, and a new one must be below the limit.
    const limit = to === 'enough' ? hard : '1';
    execFileSync('prlimit', ['--pid', String(pid), `--nofile=${limit}:`]);
  }
}

/** A line of the table. */
interface Finding {
  readonly fault: string;
  readonly lost: number;
  readonly healed: string;
  readonly wrong: number;
  readonly refused: number;
  /** Workers that keygate itself put in the place of others. */
  readonly replaced: number;
  /** Processes that were not there before, and that neither keygate nor its service manager started. */
  readonly byHand: number;
  readonly descriptors: readonly [number, number];
  readonly megabytes: readonly [number, number];
}
const findings: Finding[] = [];

after(() => {
  const heads = ['fault', 'established lost', 'healed after', 'wrong signatures', 'refused', 'workers replaced'];
  heads.push('restarted by hand', 'descriptors', 'memory');
  const lines = findings.map(({ fault, lost, healed, wrong, refused, replaced, byHand, descriptors, megabytes }) =>
    [
      fault,
      lost,
      healed,
      wrong,
      refused,
      replaced,
      byHand,
      descriptors.join(' → '),
      `${megabytes.join(' → ')} MB`,
    ].join(' | '),
  );
  const table = [heads.join(' | '), heads.map(() => '---').join(' | '), ...lines].map((line) => `| ${line} |\n`);
  const artifacts = join(import.meta.dirname, '../../.keygate/artifacts');
  mkdirSync(artifacts, { recursive: true });
  writeFileSync(join(artifacts, 'faults.md'), table.join(''));
  process.stdout.write(`\n${table.join('')}\n`);
});

function record(
  fault: string,
  { keygate, load }: UnderLoad,
  { before, now, healedMs, fromStart, byServiceManager = [] }: Measured,
): void {
  const replaced = keygate.log.filter(({ event }) => event === 'worker_replaced').length;
  const known = [...before.pids, ...byServiceManager];
  const byHand = now.pids.filter((pid) => !known.includes(pid)).length - replaced;
  findings.push({
    fault,
    lost: load.lost,
    healed: `${Math.ceil(healedMs)} ms${fromStart ? ' from its start' : ''}`,
    wrong: load.unexpected.length,
    refused: load.refused,
    replaced,
    byHand,
    descriptors: [before.descriptors.length, now.descriptors.length],
    megabytes: [before.bytes, now.bytes].map((bytes) => Math.round(bytes / 1e6)) as [number, number],
  });
  assert.equal(byHand, 0);
}

interface Measured {
  readonly before: Vitals;
  readonly now: Vitals;
  readonly healedMs: number;
  /** Not from the moment at which the fault was lifted. */
  readonly fromStart: boolean;
  /** The next keygate and its workers. */
  readonly byServiceManager?: readonly number[];
}

interface Vitals {
  readonly pids: readonly number[];
  /** What each of them is of, as /proc says it. */
  readonly descriptors: readonly string[];
  readonly bytes: number;
}

/** Of all its processes. */
async function vitalsOf(keygate: Keygate): Promise<Vitals> {
  const pids = [
    keygate.pid,
    ...(await keygate.status()).workers.flatMap(({ pid }) => (pid === undefined ? [] : [pid])),
  ];
  return {
    pids,
    descriptors: pids.flatMap(descriptorsOf),
    bytes: pids.reduce((sum, pid) => sum + residentBytes(pid), 0),
  };
}

function descriptorsOf(pid: number): string[] {
  return readdirSync(`/proc/${pid}/fd`).map((descriptor) => {
    try {
      return readlinkSync(`/proc/${pid}/fd/${descriptor}`);
    } catch {
      return 'closed meanwhile';
    }
  });
}

/** When nobody is connected: no descriptor is left of those who were, and no memory that grows with them. */
async function assertNoGrowth(keygate: Keygate, before: Vitals, moduleLosesMax = 0): Promise<Vitals> {
  let now = before;
  const descriptorsMax = before.descriptors.length + moduleLosesMax;
  // What a reload needed is given back some seconds later (src/engine/memory.ts).
  await until(
    'state without descriptors and memory that were not there before',
    async () => {
      now = await vitalsOf(keygate);
      return now.descriptors.length <= descriptorsMax && now.bytes - before.bytes < growthBytesMax;
    },
    { found: () => ({ before, now }) },
  );
  return now;
}

interface Client {
  readonly kind: 'p256' | 'rsa2048';
  readonly version: 'TLSv1.2' | 'TLSv1.3';
}

const clients: readonly (Client & { readonly what: string })[] = isLong
  ? (['p256', 'rsa2048'] as const).flatMap((kind) =>
      (['TLSv1.2', 'TLSv1.3'] as const).map((version) => ({ kind, version, what: `, ${kind} and ${version}` })),
    )
  : [{ kind: 'p256', version: 'TLSv1.3', what: '' }];

for (const fault of faultTable) {
  for (const { kind, version, what } of clients) {
    const name = `${fault.name}${what}`;
    it(`${name}: nothing established is lost, and nobody restarts`, { skip: fault.skip ?? false }, async (test) => {
      const parts = await underLoad(test, fault, { kind, version });
      const { faults, load, before } = parts;
      let { keygate } = parts;
      load.mayTurnAway = fault.turnsAway ?? false;
      const struckAt = performance.now();
      await fault.inject(parts);
      if (fault.during !== undefined) {
        const { during } = fault;
        await until(`effect of ${name}`, async () => during(await tokenOf(keygate), load, keygate, parts), {
          deadlineMs: 15_000,
          found: () => keygate.log.slice(-20),
        });
      }
      let healedMs = fault.liftedByNobody === true ? await load.healed({ from: struckAt }) : undefined;
      await pause(lastsMs);
      const [resumedBefore, echoesBefore] = [load.resumed.length, load.echoes];
      await until('echoes', () => load.echoes > echoesBefore + 20);
      if (fault.turnsAway !== true) await until('resumed handshakes', () => load.resumed.length > resumedBefore + 5);
      let byServiceManager: readonly number[] = [];
      if (healedMs === undefined) {
        if (fault.lift === undefined) faults.clear();
        else keygate = (await fault.lift(parts)) ?? keygate;
        if (keygate !== parts.keygate) byServiceManager = (await vitalsOf(keygate)).pids;
        healedMs = await load.healed({ deadlineMs: 20_000 });
      }
      await assertHealed(test, load, healedMs, { mayRefuse: fault.refuses ?? false });
      await until('token that is up', async () => (await tokenOf(keygate)).up);
      await assertNeverRestarted(keygate, fault.mayReplace ?? false);
      assert.deepEqual(faults.broken, []);
      const now = await assertNoGrowth(keygate, before);
      const fromStart = fault.liftedByNobody === true;
      record(name, { keygate, load }, { before, now, healedMs, fromStart, byServiceManager });
    });
  }
}

it('a wrong PIN is not tried again, by no worker and over no initialisation', async (test) => {
  const { faults, keygate, load } = await underLoad(test, { document: { workers: 2 } });
  faults.fail('C_Login', 0xa0);
  faults.fail('C_SignInit', cryptokiNotInitialized, { heal: 'initialize' });
  const { downReason } = await until('token out of service for its PIN', async () => {
    const token = await tokenOf(keygate);
    return token.downReason?.includes('CKR_PIN_INCORRECT') === true && token;
  });
  assert.match(downReason ?? '', /C_Login/);
  const logins = faults.read('C_Login', 'injected');
  assert.equal(logins, 1);
  await until('many more full handshakes', () => load.refused > 50);
  assert.equal(faults.read('C_Login', 'injected'), logins);
  const { unreadiness } = await until('word of both workers', async () => {
    const status = await keygate.status();
    return status.unreadiness !== undefined && status;
  });
  assert.match(unreadiness ?? '', /no token is up: token hsm: C_Login returned CKR_PIN_INCORRECT/);
  assert.equal(faults.read('C_Login', 'injected'), logins);
  await load.stop();
  assert.deepEqual([load.lost, load.unexpected], [0, []]);
});

/** Of one lane, which is soon given up. */
const hasty = { lanes: 1, signDeadline: '200ms', queue: { age: '200ms' } };

it('a module that hangs for good costs its worker the slot, and nobody a connection', async (test) => {
  const { faults, keygate, load } = await underLoad(test, { token: hasty });
  const [{ pid } = { pid: undefined }] = (await keygate.status()).workers;
  // In this process alone: the next one finds that all is well.
  faults.only('C_Sign', { pid: pid ?? 0 });
  faults.hang('C_Sign');
  await keygate.logged({ event: 'worker_stuck', worker: 0 }, { deadlineMs: 15_000 });
  await keygate.logged({ event: 'worker_replaced', worker: 0, workerPid: pid }, { deadlineMs: 15_000 });
  const healedMs = await load.healed();
  test.diagnostic(`full handshakes succeed ${healedMs.toFixed(0)} ms after the successor was ready`);
  const [{ pid: successor, restarts } = { pid: undefined, restarts: undefined }] = (await keygate.status()).workers;
  assert.notEqual(successor, pid);
  assert.equal(restarts, 1);
  assert.equal(isThere(pid), true, 'it keeps its connections');
  const echoes = load.echoes;
  await until('echoes', () => load.echoes > echoes + 100);
  await load.stop();
  assert.deepEqual([load.lost, load.unexpected], [0, []]);
  await until('end of the former worker', () => !isThere(pid));
});

it('a module that hangs in every worker is tried ever more rarely, and reported', async (test) => {
  const { faults, keygate, load } = await underLoad(test, { token: hasty });
  const hung = keygate.log.length;
  faults.hang('C_Sign');
  // A successor hangs where it proves its key; it is ended, and the worker that is stuck serves on.
  await keygate.logged({ event: 'worker_stuck' }, { since: hung, deadlineMs: 15_000 });
  const resumed = load.resumed.length;
  await until('resumed handshakes', () => load.resumed.length > resumed + 20);
  await until('word of it', async () => (await keygate.status()).unreadiness?.includes('no token is up') === true);
  assert.equal(keygate.log.slice(hung).filter(({ event }) => event === 'worker_stuck').length, 1);
  faults.release('C_Sign');
  assert.ok((await load.healed()) < healedMsMax);
  await load.stop();
  assert.deepEqual([load.lost, load.unexpected], [0, []]);
});

const outOfProcess: readonly {
  readonly name: string;
  readonly break: (server: P11KitServer) => void | Promise<void>;
  readonly mend?: (server: P11KitServer) => void | Promise<void>;
  /** Descriptors of its own that p11-kit's client may never close. */
  readonly moduleLosesMax?: number;
}[] = [
  { name: 'whose connection is cut', break: (server) => server.signalChildren('SIGKILL') },
  {
    name: 'that is gone with all its processes, and started again',
    break: async (server) => server.stop(),
    mend: async (server) => server.start(),
    // Its client (0.24.1) forgets a connection that ends before C_Initialize is answered: one may wait for the server that is killed.
    moduleLosesMax: 1,
  },
  {
    name: 'that stands still for a while',
    break: (server) => server.signalChildren('SIGSTOP'),
    mend: (server) => server.signalChildren('SIGCONT'),
  },
  // The worker's successor has a connection of its own.
  { name: 'that stands still for good', break: (server) => server.signalChildren('SIGSTOP') },
];

for (const { name, break: breakIt, mend, moduleLosesMax } of outOfProcess) {
  it(`a token behind a socket ${name}: nothing established is lost, and nobody restarts`, async (test) => {
    const { server, keygate, load, before: vitals } = await behindSocket(test);
    const before = keygate.log.length;
    let from = performance.now();
    await breakIt(server);
    if (mend !== undefined) {
      await until('refusals', () => load.refused > 0);
      const resumed = load.resumed.length;
      await until('resumed handshakes', () => load.resumed.length > resumed + 5);
      await mend(server);
      from = performance.now();
    }
    const deadlineMs = mend === undefined && name.includes('for good') ? 20_000 : healedMsMax;
    const healedMs = await load.healed({ from, deadlineMs: 20_000 });
    await assertHealed(test, load, healedMs, { mayRefuse: true, deadlineMs });
    const replaced = keygate.log.slice(before).some(({ event }) => event === 'worker_replaced');
    assert.equal(replaced, name.includes('for good'));
    assert.deepEqual(
      keygate.log.slice(before).filter(({ event }) => event === 'worker_lost'),
      [],
    );
    const now = await assertNoGrowth(keygate, vitals, moduleLosesMax);
    const measured = { before: vitals, now, healedMs, fromStart: mend === undefined };
    record(`a token behind a socket ${name}`, { keygate, load }, measured);
  });
}

it('a PIN that was changed in the token, or mistyped for a while, is taken from a reload', async (test) => {
  const provisioned = await provisionedToken({ www: { kind: 'p256' } });
  await using upstream = await echoUpstream();
  const faults = new FaultModule(provisioned);
  test.after(() => {
    faults.close();
    provisioned.dispose();
  });
  const document = {
    workers: 2,
    upstreams: { echo: { servers: [upstream.address] } },
    listeners: { https: {} },
    tokens: { hsm: { ...provisioned.settings, module: faults.module } },
  };
  await using keygate = await startKeygate(provisioned, document, { env: faults.env });
  provisioned.pkcs11Tool('--change-pin', '--new-pin', 'another-one');
  const [first, second] = (await keygate.status()).workers;
  // SoftHSM reads it anew when it is initialised again: one worker must, and the other one is gone.
  faults.only('C_SignInit', { pid: first?.pid ?? 0 });
  faults.fail('C_SignInit', cryptokiNotInitialized, { heal: 'initialize' });
  await until('refusal of the former PIN', async () => {
    await assertServes(keygate.port()).catch(() => {});
    return (await tokenOf(keygate)).downReason?.includes('PIN') === true;
  });
  faults.clear();
  const since = keygate.log.length;
  process.kill(second?.pid ?? 0, 'SIGKILL');
  await until('nobody who is forked', async () => (await keygate.status()).unreadiness?.includes('PIN') === true);
  writeFileSync(provisioned.pinFile, 'another-one\n');
  const { outcome, reasons } = await keygate.reload();
  assert.deepEqual([outcome, reasons], ['committed', []]);
  await keygate.logged({ event: 'worker_ready', worker: second?.slot }, { since });
  await until('token that is up', async () => (await tokenOf(keygate)).up);
  for (let client = 0; client < 10; client++) await assertServes(keygate.port());

  // A typo costs the next worker its start. The right one, put back, is no other than those who serve have.
  writeFileSync(provisioned.pinFile, 'mistyped\n');
  const mistyped = keygate.log.length;
  process.kill((await keygate.workers()).find(({ slot }) => slot === second?.slot)?.pid ?? 0, 'SIGKILL');
  await keygate.logged({ event: 'worker_lost', code: 'token_login' }, { since: mistyped });
  // A reload for another reason costs the token no further try of it.
  const tries = faults.read('C_Login', 'calls');
  for (let reload = 0; reload < 2; reload++) {
    const since = keygate.log.length;
    assert.equal((await keygate.reload()).outcome, 'committed');
    await keygate.logged({ event: 'worker_lost', code: 'token_login' }, { since });
  }
  assert.equal(faults.read('C_Login', 'calls'), tries);
  writeFileSync(provisioned.pinFile, 'another-one\n');
  assert.equal((await keygate.reload()).outcome, 'committed');
  await keygate.logged({ event: 'worker_ready', worker: second?.slot }, { since: mistyped });
});

it('one of two tokens that is away at the start, and again at a reload, is used once it is back', async (test) => {
  const provisioned = await provisionedToken({ www: { kind: 'p256' } });
  await using upstream = await echoUpstream();
  const server = new P11KitServer(test, provisioned);
  test.after(() => provisioned.dispose());
  const document = {
    upstreams: { echo: { servers: [upstream.address] } },
    listeners: { https: {} },
    tokens: {
      far: { ...provisioned.settings, module: server.module },
      // Asked when there is no other.
      near: { ...provisioned.settings, weight: 0 },
    },
  };
  await using keygate = await startKeygate(provisioned, document, { env: server.env });
  const warned = await keygate.logged({ event: 'token_warning' });
  assert.match(warned.message, /^token far is used once it is back: .* is not in module/);
  const far = async (): Promise<TokenSnapshot> => tokenOf(keygate, 'far');
  assert.match((await far()).downReason ?? '', /its module shows no such token|it was away at the start/);
  await assertServes(keygate.port());
  assert.equal(signaturesOf(await far()), 0);

  await server.start();
  await until('token that is there', async () => (await far()).up);
  await assertServes(keygate.port());
  await until('signatures by it', async () => signaturesOf(await far()) > 0);

  await server.stop();
  await until('token that is away', async () => {
    await assertServes(keygate.port());
    return !(await far()).up;
  });
  const { outcome } = await keygate.reload({ ...document, listeners: { https: { limits: { connections: 1000 } } } });
  assert.equal(outcome, 'committed');
  await assertServes(keygate.port());
  await server.start();
  const signed = signaturesOf(await far());
  await until('token that is back', async () => (await far()).up);
  await assertServes(keygate.port());
  await until('signatures by it', async () => signaturesOf(await far()) > signed);
  await assertNeverRestarted(keygate);
});

interface UnderLoad {
  readonly keygate: Keygate;
  readonly load: Load;
}

/** What a fault is made of. */
interface Parts extends UnderLoad {
  readonly faults: FaultModule;
  /** Of the token. */
  readonly directory: string;
  readonly upstream: Upstream;
  /** Known by its address; configured with the server with a name that is `beside another`. */
  readonly other: Upstream;
  /** Of a server that is `named`. */
  readonly names: NameServer | undefined;
  /** Starts another keygate, with the same configuration and ports, in place of one that was killed. */
  readonly another: () => Promise<Keygate>;
}

/** On a token that can be made to fail; with a second key, so that handles can be confused. Ends with the test. */
async function underLoad(
  test: TestContext,
  { token = {}, document = {}, env = () => ({}), named }: Pick<Fault, 'token' | 'document' | 'env' | 'named'> = {},
  { kind, version }: Client = { kind: 'p256', version: 'TLSv1.3' },
): Promise<Parts & { readonly before: Vitals }> {
  const provisioned = await provisionedToken({ www: { kind }, other: { kind, dns: ['other.test'] } });
  await provisioned.use((open) => generateTicketKey(open, 'tickets'));
  const { directory } = provisioned;
  const [upstream, other] = [await echoUpstream(), await echoUpstream()];
  const names = named === undefined ? undefined : await NameServer.start({ 'echo.test': '127.0.0.1' }, resolving);
  const servers = [names === undefined ? upstream.address : upstream.address.replace('127.0.0.1', 'echo.test')];
  if (named === 'beside another') servers.push(other.address);
  const faults = new FaultModule(provisioned);
  const start = async (https: object): Promise<Keygate> =>
    startKeygate(
      provisioned,
      {
        upstreams: { echo: { servers } },
        listeners: { https },
        tokens: { hsm: { ...provisioned.settings, module: faults.module, ...token } },
        drainDeadline: '10s',
        ...document,
      },
      { env: { ...faults.env, ...env(directory) }, launcher: names?.launcher ?? [] },
    );
  const keygate = await start({});
  let serving = keygate;
  const another = async (): Promise<Keygate> => {
    await untilRefused(keygate.port());
    serving = await start({ bind: [`127.0.0.1:${keygate.port()}`] });
    return serving;
  };
  const before = await vitalsOf(keygate);
  const load = await Load.start({
    port: keygate.port(),
    ca: provisioned.pem('www'),
    minVersion: version,
    maxVersion: version,
  });
  test.after(async () => {
    try {
      faults.clear();
      // It ends what waits for it as well.
      await Promise.all([load.stop(), serving.stop()]);
      await keygate.ended();
      assert.deepEqual(faults.broken, []);
    } finally {
      await Promise.all([upstream.close(), other.close(), names?.[Symbol.asyncDispose]()]);
      faults.close();
      provisioned.dispose();
    }
  });
  return { faults, keygate, load, directory, upstream, other, names, another, before };
}

async function behindSocket(
  test: TestContext,
): Promise<UnderLoad & { readonly server: P11KitServer; readonly before: Vitals }> {
  const provisioned = await provisionedToken({ www: { kind: 'p256' } });
  const upstream = await echoUpstream();
  const server = new P11KitServer(test, provisioned);
  await server.start();
  const token = { ...provisioned.settings, module: server.module, signDeadline: '300ms', queue: { age: '300ms' } };
  const keygate = await startKeygate(
    provisioned,
    {
      upstreams: { echo: { servers: [upstream.address] } },
      listeners: { https: {} },
      tokens: { hsm: token },
      drainDeadline: '10s',
    },
    { env: server.env },
  );
  const before = await vitalsOf(keygate);
  const load = await Load.start({ port: keygate.port(), ca: provisioned.pem('www') });
  test.after(async () => {
    try {
      await load.stop();
      await keygate.stop();
    } finally {
      await upstream.close();
      provisioned.dispose();
    }
  });
  return { server, keygate, load, before };
}

/** Ends the load. */
async function assertHealed(
  test: TestContext,
  load: Load,
  healedMs: number,
  { mayRefuse, deadlineMs = healedMsMax }: { readonly mayRefuse: boolean; readonly deadlineMs?: number },
): Promise<void> {
  const { refused } = load;
  test.diagnostic(
    `healed in ${healedMs.toFixed(0)} ms; refused ${refused}, full ${load.full.length}, resumed ${load.resumed.length}, echoes ${load.echoes}`,
  );
  assert.ok(healedMs < deadlineMs, `${healedMs} ms`);
  await load.stop();
  assert.deepEqual([load.lost, load.unexpected], [0, []]);
  if (!mayRefuse) assert.equal(refused, 0);
}

async function tokenOf(keygate: Keygate, name = 'hsm'): Promise<TokenSnapshot> {
  // There is none before a worker has answered for the first time.
  return until(
    'answer of a worker',
    async () => (await keygate.status()).engine.tokens.find((token) => token.name === name) ?? false,
  );
}

/** Signatures so far; a full handshake takes one. */
function signaturesOf({ mechanisms }: TokenSnapshot): number {
  return mechanisms.reduce((sum, { ok }) => sum + ok, 0);
}

async function assertNeverRestarted(keygate: Keygate, mayReplace = false): Promise<void> {
  const happened = (wanted: string): number => keygate.log.filter(({ event }) => event === wanted).length;
  assert.equal(happened('worker_lost'), 0);
  if (!mayReplace) assert.equal(happened('worker_replaced'), 0);
  await until('workers that are as they were, or in the place of one that was stuck', async () => {
    const { workers } = await keygate.status();
    const restarts = workers.reduce((sum, worker) => sum + worker.restarts, 0);
    return workers.every(({ state }) => state === 'ready') && restarts === happened('worker_replaced');
  });
}

function isThere(pid: number | undefined): boolean {
  try {
    process.kill(pid ?? 0, 0);
    return pid !== undefined;
  } catch {
    return false;
  }
}
