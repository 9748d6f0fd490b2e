/**
 * Owns: that each fault of the fault module is what it says, and that its checker finds each broken rule of PKCS#11.
 * Must not know: keygate.
 * Runs: in this process, on a real SoftHSM with two keys, through pkcs11js. A process of its own where one must be lost.
 */
import assert from 'node:assert/strict';
import { spawnSync } from 'node:child_process';
import { createHash, verify, X509Certificate } from 'node:crypto';
import { after, afterEach, beforeEach, it } from 'node:test';
import pkcs11js from 'pkcs11js';
import { FaultModule } from '../support/fault-module.ts';
import type { Rule } from '../support/fault-module.ts';
import { provisionedToken } from '../support/provisioned-token.ts';
import { until } from '../support/until.ts';

const provisioned = await provisionedToken({ one: { kind: 'p256' }, two: { kind: 'p256' } });
const faults = new FaultModule(provisioned);
Object.assign(process.env, faults.env);
const pkcs11 = new pkcs11js.PKCS11();
pkcs11.load(faults.module);
after(() => {
  faults.close();
  provisioned.dispose();
});

/** CKS_RO_USER_FUNCTIONS. */
const roUserFunctions = 1;
const message = Buffer.alloc(32, 7);
const digest = createHash('sha256').update(message).digest();
let slot: Buffer;
let session: Buffer;

beforeEach(() => {
  pkcs11.C_Initialize({ flags: pkcs11js.CKF_OS_LOCKING_OK });
  [slot, session] = enter();
});
afterEach(() => {
  faults.clear();
  for (const name of ['C_Sign', 'C_SignInit'] as const) faults.only(name, {});
  pkcs11.C_Finalize();
});

it('without a fault it is the real module', () => {
  assert.ok(isBy('one', sign(keyOf('one'))));
  assert.deepEqual(faults.broken, []);
});

it('calls are late: by a fixed time, by one that varies, by a rare spike, and by a cap of their rate', () => {
  const key = keyOf('one');
  const signMs = () => {
    const startedAt = performance.now();
    sign(key);
    return performance.now() - startedAt;
  };
  faults.slow('C_Sign', { delayMs: 20 });
  assert.ok(signMs() >= 20);
  faults.slow('C_Sign', { delayMs: 4, sigma: 1 });
  const varied = Array.from({ length: 20 }, signMs);
  assert.ok(Math.max(...varied) > 2 * Math.min(...varied), varied.join(' '));
  faults.slow('C_Sign', { spikeMs: 50, spikeEvery: 5 });
  const spiked = Array.from({ length: 10 }, signMs).filter((ms) => ms >= 50);
  assert.equal(spiked.length, 2);
  faults.slow('C_Sign', { perSecond: 100 });
  const startedAt = performance.now();
  for (let count = 0; count < 11; count++) sign(key);
  assert.ok(performance.now() - startedAt >= 99);
});

it('an error is returned so many times, one time in so many, by chance, or for a time', async () => {
  const failures = (count: number) =>
    Array.from({ length: count }, () => codeOf(() => loggedIn())).filter((code) => code === 0x30).length;
  faults.fail('C_GetSessionInfo', 0x30, 2);
  assert.equal(failures(5), 2);
  faults.fail('C_GetSessionInfo', 0x30, { every: 5 });
  assert.equal(failures(10), 2);
  faults.fail('C_GetSessionInfo', 0x30, { perMillion: 500_000 });
  const byChance = failures(200);
  assert.ok(byChance > 50 && byChance < 150, `${byChance} of 200`);
  faults.fail('C_GetSessionInfo', 0x30, { forMs: 100 });
  assert.equal(failures(1), 1);
  await until('end of the storm', () => failures(1) === 0);
});

it('an error is for one process, one session or one token', () => {
  const key = keyOf('one');
  const [, other] = enter();
  faults.fail('C_SignInit', 0x30);
  for (const [concerned, code] of [
    [{ pid: process.pid }, 0x30],
    [{ pid: process.ppid }, undefined],
    [{ session }, 0x30],
    [{ session: other }, undefined],
    [{ token: provisioned.label }, 0x30],
    [{ token: 'another' }, undefined],
  ] as const) {
    faults.only('C_SignInit', concerned);
    assert.equal(
      codeOf(() => sign(key)),
      code,
      JSON.stringify(concerned),
    );
  }
});

it('a storm ends when its session is opened again, when its user logs in again, or when the module is initialised again', () => {
  const fails = (from = session) => codeOf(() => sign(keyOf('one', from), from)) !== undefined;
  faults.fail('C_SignInit', 0x30, { heal: 'reopen' });
  assert.ok(fails());
  assert.ok(!fails(enter()[1]));
  assert.ok(fails());

  faults.fail('C_SignInit', 0x30, { heal: 'login' });
  assert.ok(fails());
  pkcs11.C_Logout(session);
  pkcs11.C_Login(session, pkcs11js.CKU_USER, provisioned.pin);
  assert.ok(!fails());

  faults.fail('C_SignInit', 0x30, { heal: 'initialize' });
  assert.ok(fails(enter()[1]));
  again();
  assert.ok(!fails());
});

it('a signature has a bit flipped, is cut off, is empty, is of another key, or has a leading zero and is right', () => {
  const key = keyOf('one');
  const damaged = (kind: Parameters<FaultModule['damage']>[1]) => {
    faults.damage(1, kind);
    return sign(key);
  };
  assert.ok(!isBy('one', damaged('flip')));
  assert.equal(damaged('truncate').length, 63);
  assert.equal(damaged('empty').length, 0);
  const foreign = damaged('other key');
  assert.ok(isBy('two', foreign) && !isBy('one', foreign));
  const odd = damaged('leading zero');
  assert.ok(odd[0] === 0 || odd[32] === 0);
  assert.ok(isBy('one', odd));
  assert.ok(isBy('one', sign(key)), 'once each');
});

it('sessions are limited, closed behind the back of their user, and lied about', () => {
  const key = keyOf('one');
  faults.set('sessionLimit', 2);
  enter();
  assert.equal(codeOf(enter), pkcs11js.CKR_SESSION_COUNT);
  faults.set('sessionLimit', 0);
  assert.ok(loggedIn());
  faults.set('sessionInfoLies', 1);
  assert.ok(!loggedIn());
  faults.set('sessionInfoLies', 0);
  faults.set('closeLeft', 1);
  assert.equal(
    codeOf(() => sign(key)),
    pkcs11js.CKR_SESSION_HANDLE_INVALID,
  );
  assert.equal(codeOf(loggedIn), pkcs11js.CKR_SESSION_HANDLE_INVALID);
});

it('everybody is logged out before a signature', () => {
  const key = keyOf('one');
  faults.set('logoutLeft', 1);
  assert.notEqual(
    codeOf(() => sign(key)),
    undefined,
  );
  assert.ok(!loggedIn());
});

it('PINs are counted, and lock the token', () => {
  pkcs11.C_Logout(session);
  faults.set('pinTries', 2);
  const flags = () => pkcs11.C_GetTokenInfo(slot).flags;
  const login = (pin: string) => codeOf(() => pkcs11.C_Login(session, pkcs11js.CKU_USER, pin));
  assert.equal(login('00000000'), pkcs11js.CKR_PIN_INCORRECT);
  assert.ok(flags() & pkcs11js.CKF_USER_PIN_FINAL_TRY);
  assert.equal(login('00000000'), pkcs11js.CKR_PIN_INCORRECT);
  assert.ok(flags() & pkcs11js.CKF_USER_PIN_LOCKED);
  assert.equal(login(provisioned.pin), pkcs11js.CKR_PIN_LOCKED);
  assert.equal(faults.get('pinsRefused'), 2);
});

it('slots are empty, or have other ids after another initialisation', () => {
  faults.set('slotsHidden', 1);
  assert.deepEqual(pkcs11.C_GetSlotList(true), []);
  faults.set('slotsHidden', 0);
  faults.set('slotShift', 1000);
  const shown = initialisedSlot();
  again();
  assert.notDeepEqual(slot, shown);
  assert.ok(isBy('one', sign(keyOf('one'))));
  assert.equal(
    codeOf(() => pkcs11.C_GetTokenInfo(shown)),
    pkcs11js.CKR_SLOT_ID_INVALID,
  );
});

it('objects are there twice, not at all, or under the handle of another after another initialisation', () => {
  faults.set('objects', 1);
  assert.deepEqual(find('one'), []);
  faults.set('objects', 2);
  assert.equal(find('one').length, 2);
  faults.set('objects', 0);
  const exchanged = [1, 2].map(() => {
    again();
    const before = names();
    faults.set('handlesExchanged', 1);
    const changed = [...names()].some(([handle, name]) => before.get(handle) !== name);
    assert.ok(isBy('one', sign(keyOf('one'))));
    faults.set('handlesExchanged', 0);
    return changed;
  });
  assert.equal(exchanged.filter(Boolean).length, 1);
});

it('a key says that it can be taken out', () => {
  const attribute = () =>
    pkcs11.C_GetAttributeValue(session, keyOf('one'), [{ type: pkcs11js.CKA_EXTRACTABLE }])[0]?.value;
  assert.deepEqual(attribute(), Buffer.from([0]));
  faults.set('extractable', 1);
  assert.deepEqual(attribute(), Buffer.from([1]));
});

it('C_Initialize fails, and memory is lost', () => {
  const key = keyOf('one');
  faults.set('leakBytes', 64 * 1024 * 1024);
  const before = process.memoryUsage.rss();
  sign(key);
  faults.set('leakBytes', 0);
  assert.ok(process.memoryUsage.rss() - before > 32 * 1024 * 1024);
  pkcs11.C_Finalize();
  faults.fail('C_Initialize', 0x5, 1);
  assert.equal(
    codeOf(() => pkcs11.C_Initialize()),
    0x5,
  );
  pkcs11.C_Initialize({ flags: pkcs11js.CKF_OS_LOCKING_OK });
});

it('a signature ends its process', () => {
  for (const [signal, name] of [
    [0, 'SIGSEGV'],
    [6, 'SIGABRT'],
  ] as const) {
    faults.set('crashSignal', signal);
    faults.set('crashLeft', 1);
    assert.equal(elsewhere('sign').signal, name);
  }
});

// Last, because what was broken stays counted.
it('broken rules of PKCS#11 are found', async () => {
  const key = keyOf('one');
  assert.equal(faults.violations, 0);

  pkcs11.C_SignInit(session, { mechanism: pkcs11js.CKM_ECDSA }, key);
  assert.equal(
    codeOf(() => pkcs11.C_SignInit(session, { mechanism: pkcs11js.CKM_ECDSA }, key)),
    pkcs11js.CKR_OPERATION_ACTIVE,
  );
  assert.ok(broke('C_SignInit while an operation is active, or C_Sign without it'));

  // Also of the processes that were lost in it.
  const inFlight = faults.read('C_Sign', 'inFlight');
  faults.hang('C_Sign');
  const room = Buffer.alloc(64);
  const hanging = pkcs11.C_SignAsync(session, digest, room);
  await until('hang', () => faults.read('C_Sign', 'inFlight') > inFlight);
  loggedIn();
  assert.ok(broke('two threads in one PKCS#11 session'));
  assert.notEqual(
    codeOf(() => pkcs11.C_Finalize()),
    undefined,
  );
  assert.ok(broke('C_Finalize while a call is in flight'));
  faults.release('C_Sign');
  await hanging;

  elsewhere('before C_Initialize');
  assert.ok(broke('a call before C_Initialize or after C_Finalize'));
  elsewhere('on the I/O thread');
  assert.ok(broke('a call on the I/O thread'));
});

/** A session on the token, logged in. */
function enter(): [Buffer, Buffer] {
  const found = initialisedSlot();
  const opened = pkcs11.C_OpenSession(found, pkcs11js.CKF_SERIAL_SESSION);
  const code = codeOf(() => pkcs11.C_Login(opened, pkcs11js.CKU_USER, provisioned.pin));
  assert.ok(code === undefined || code === pkcs11js.CKR_USER_ALREADY_LOGGED_IN, `${code}`);
  return [found, opened];
}

function again(): void {
  pkcs11.C_Finalize();
  pkcs11.C_Initialize({ flags: pkcs11js.CKF_OS_LOCKING_OK });
  [slot, session] = enter();
}

function initialisedSlot(): Buffer {
  const found = pkcs11.C_GetSlotList(true).find((id) => pkcs11.C_GetTokenInfo(id).label.trim() === provisioned.label);
  assert.ok(found !== undefined);
  return found;
}

function find(label: string, from = session): Buffer[] {
  pkcs11.C_FindObjectsInit(from, [
    { type: pkcs11js.CKA_CLASS, value: pkcs11js.CKO_PRIVATE_KEY },
    ...(label === '' ? [] : [{ type: pkcs11js.CKA_LABEL, value: label }]),
  ]);
  const found = pkcs11.C_FindObjects(from, 8);
  pkcs11.C_FindObjectsFinal(from);
  return found;
}

function keyOf(label: string, from = session): Buffer {
  const [key, ...others] = find(label, from);
  assert.ok(key !== undefined && others.length === 0);
  return key;
}

/** Of the private keys, by handle. */
function names(): Map<string, string> {
  const label = (key: Buffer) =>
    String(pkcs11.C_GetAttributeValue(session, key, [{ type: pkcs11js.CKA_LABEL }])[0]?.value);
  return new Map(find('').map((key) => [key.toString('hex'), label(key)]));
}

function sign(key: Buffer, from = session): Buffer {
  pkcs11.C_SignInit(from, { mechanism: pkcs11js.CKM_ECDSA }, key);
  return pkcs11.C_Sign(from, digest, Buffer.alloc(64));
}

function isBy(name: string, signature: Buffer): boolean {
  const { publicKey } = new X509Certificate(provisioned.pem(name));
  return verify('sha256', message, { key: publicKey, dsaEncoding: 'ieee-p1363' }, signature);
}

function loggedIn(): boolean {
  return pkcs11.C_GetSessionInfo(session).state === roUserFunctions;
}

function broke(rule: Rule): boolean {
  return faults.broken.includes(rule);
}

/** CKR_*; undefined when it is CKR_OK. */
function codeOf(call: () => unknown): number | undefined {
  try {
    call();
    return undefined;
  } catch (error) {
    assert.ok(error instanceof Error && 'code' in error, String(error));
    return Number(error.code);
  }
}

function elsewhere(what: string) {
  return spawnSync(
    process.execPath,
    [new URL('bystander.ts', import.meta.url).pathname, what, faults.module, provisioned.pin],
    {
      env: { ...process.env, ...faults.env },
      encoding: 'utf8',
    },
  );
}
