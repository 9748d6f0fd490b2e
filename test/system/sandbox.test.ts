/**
 * Owns: what a PKCS#11 module cannot do in a worker, what goes on working there, and how an operator sees and changes it.
 * Must not know: how it is forbidden (engine/src/sandbox.rs).
 * Runs: against a real `keygate serve` on SoftHSM behind the fault module. Every other system test runs in the sandbox too.
 */
import assert from 'node:assert/strict';
import { mkdirSync, readFileSync, readdirSync, readlinkSync, statSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { it } from 'node:test';
import type { TestContext } from 'node:test';
import { createSelfSigned } from '../../src/pkcs11/issue.ts';
import { generateKeyPair } from '../../src/pkcs11/provision.ts';
import { FaultModule } from '../support/fault-module.ts';
import { startKeygate } from '../support/keygate.ts';
import type { Keygate, KeygateDocument } from '../support/keygate.ts';
import { P11KitServer } from '../support/p11-kit.ts';
import { provisionedToken } from '../support/provisioned-token.ts';
import type { ProvisionedToken } from '../support/provisioned-token.ts';
import { assertServes } from '../support/tls-client.ts';
import { until } from '../support/until.ts';
import { echoUpstream } from '../support/upstream.ts';

it('a module that misbehaves on a lane is refused everything, and signs on', async (test) => {
  const { keygate, faults, prey } = await service(test);
  faults.misbehave();
  await assertServes(keygate.port());
  assert.deepEqual(faults.deeds, {
    program: 'EPERM',
    exec: 'EPERM',
    fork: 'EPERM',
    create: 'EACCES',
    overwrite: 'EACCES',
    truncate: 'EACCES',
    remove: 'EACCES',
    'make directory': 'EACCES',
    // With `sandbox.writable` set, as for the fault module's own file, modes may be changed: src/sandbox.rs tests it without.
    'change mode': 'done',
    'bind TCP': 'EACCES',
    listen: 'EPERM',
    'raw socket': 'EPERM',
    'odd socket': 'EPERM',
    trace: 'EPERM',
    'read memory': 'EPERM',
    signal: 'EPERM',
    namespace: 'EPERM',
    keyring: 'EPERM',
    ring: 'EPERM',
    identity: 'EPERM',
  });
  assert.deepEqual(readdirSync(prey), ['kept']);
  assert.equal(readFileSync(join(prey, 'kept'), 'utf8'), 'kept');
  await assertServes(keygate.port());
  assert.equal(keygate.log.filter(({ event }) => event === 'worker_lost').length, 0);
});

it('with the sandbox off a module can do what the user can, and a warning says so', async (test) => {
  const { keygate, faults, prey } = await service(test, { sandbox: { enabled: false } });
  faults.misbehave();
  await assertServes(keygate.port());
  const { program, exec, fork, create, overwrite, truncate, remove, listen, trace, signal, ...others } = faults.deeds;
  assert.deepEqual(
    { program, exec, fork, create, overwrite, truncate, remove, listen, trace, signal, bind: others['bind TCP'] },
    {
      program: 'done',
      exec: 'ENOENT',
      fork: 'done',
      create: 'done',
      overwrite: 'done',
      truncate: 'done',
      remove: 'done',
      listen: 'done',
      trace: 'ESRCH',
      signal: 'done',
      bind: 'done',
    },
  );
  assert.deepEqual(readdirSync(prey).toSorted(), ['created', 'made']);
  const { workers } = await keygate.status();
  assert.deepEqual(workers[0]?.sandbox, { landlockAbi: 0, seccomp: false });
  const events = keygate.log.map(({ event }) => event);
  assert.deepEqual(
    ['sandbox_entered', 'sandbox_limited', 'sandbox_off'].map((name) => events.includes(name)),
    [false, false, true],
  );
});

it('every thread of a worker is in the sandbox, and none starts a debugger', async (test) => {
  const { keygate } = await service(test);
  await assertServes(keygate.port());
  const [worker] = await keygate.workers();
  assert.ok(worker !== undefined);
  const threads = readdirSync(`/proc/${worker.pid}/task`).map((thread) => {
    const status = readFileSync(`/proc/${worker.pid}/task/${thread}/status`, 'utf8');
    const field = (name: string) => new RegExp(`^${name}:\\s+(.*)$`, 'm').exec(status)?.[1];
    return { name: field('Name'), noNewPrivileges: field('NoNewPrivs'), seccomp: field('Seccomp') };
  });
  const named = new Set(threads.map(({ name }) => name));
  for (const name of ['node-MainThread', 'node-V8Worker', 'keygate-io', 'lane-1']) assert.ok(named.has(name), name);
  const outside = threads.filter(({ noNewPrivileges, seccomp }) => noNewPrivileges !== '1' || seccomp !== '2');
  assert.deepEqual(outside, []);
  const open = readdirSync(`/proc/${worker.pid}/fd`).map((fd) => readlinkSync(`/proc/${worker.pid}/fd/${fd}`));
  assert.deepEqual(
    open.filter((target) => target.includes('io_uring')),
    [],
  );
  process.kill(worker.pid, 'SIGUSR1');
  await assertServes(keygate.port());
  const names = readdirSync(`/proc/${worker.pid}/task`).map((thread) =>
    readFileSync(`/proc/${worker.pid}/task/${thread}/comm`, 'utf8').trim(),
  );
  assert.deepEqual(
    names.filter((name) => /inspector/i.test(name)),
    [],
  );
});

it('what holds is in the log of each worker that starts, and in the status', async (test) => {
  const { keygate } = await service(test);
  const first = await keygate.logged({ event: 'sandbox_entered', worker: 0 });
  assert.deepEqual([Number(first['landlockAbi']) > 0, first['seccomp']], [true, true]);
  const since = keygate.log.length;
  const [worker] = await keygate.workers();
  assert.ok(worker !== undefined);
  process.kill(worker.pid, 'SIGKILL');
  await keygate.logged({ event: 'sandbox_entered', worker: 0 }, { since });
  await keygate.logged({ event: 'worker_ready', worker: 0 }, { since });
  const { workers } = await keygate.status();
  assert.deepEqual(workers[0]?.sandbox, { landlockAbi: first['landlockAbi'], seccomp: true });
  await assertServes(keygate.port());
});

it('a reload takes a new key in SoftHSM, a new chain, a new address and an upstream by its name', async (test) => {
  using token = await provisionedToken({ www: { kind: 'p256' } });
  const upstream = await echoUpstream();
  test.after(async () => upstream.close());
  const document = {
    upstreams: { echo: { servers: [upstream.address] } },
    listeners: { https: { certificates: ['www'] } },
    certificates: token.certificates,
  };
  await using keygate = await startKeygate(token, document);
  const { writable } = await keygate.logged({ event: 'sandbox_entered' });
  assert.deepEqual(writable, [join(token.directory, 'tokens')]);
  const { certificates } = await withNewKey(token);
  const report = await keygate.reload({
    certificates,
    upstreams: { named: { servers: [upstream.address.replace('127.0.0.1', 'localhost')] } },
    listeners: { https: { certificates: ['www'] }, more: { certificates: ['renewed'] } },
  });
  assert.equal(report.outcome, 'committed', JSON.stringify(report));
  keygate.addresses = (await keygate.status()).listeners;
  assert.match(await assertServes(keygate.port('more')), /renewed\.test/);
  assert.match(await assertServes(keygate.port()), /localhost/);
});

it('a token that loses its login is logged in to again', async (test) => {
  const { keygate, faults } = await service(test);
  await assertServes(keygate.port());
  const logins = faults.read('C_Login', 'calls');
  const userNotLoggedIn = 0x101;
  faults.fail('C_SignInit', userNotLoggedIn, 1);
  await until('client that is served, and a new login', async () => {
    await assertServes(keygate.port()).catch(() => {});
    return faults.read('C_Login', 'calls') > logins;
  });
  await assertServes(keygate.port());
});

it('SoftHSM that cannot write serves, also after a reload, and a restart of the worker shows it new keys', async (test) => {
  const { token, keygate, document } = await service(test, onlyControl);
  const tokens = join(token.directory, 'tokens');
  const changes = () =>
    readdirSync(tokens, { recursive: true, encoding: 'utf8' })
      .map((name) => `${name} ${statSync(join(tokens, name)).mtimeMs}`)
      .toSorted();
  const { certificates } = await withNewKey(token);
  const [before, since] = [changes(), keygate.log.length];
  const renewed = { ...document, certificates, listeners: { https: { certificates: ['renewed'] } } };
  for (let round = 0; round < 2; round++) {
    const refused = await keygate.reload(renewed);
    assert.equal(refused.reasons[0]?.code, 'token_key_not_found', JSON.stringify(refused));
    assert.match(refused.reasons[0]?.hint ?? '', /after a restart/);
    assert.equal((await keygate.reload(document)).outcome, 'committed');
    assert.match(await assertServes(keygate.port()), /localhost/);
  }
  const [worker] = await keygate.workers();
  assert.ok(worker !== undefined);
  process.kill(worker.pid, 'SIGKILL');
  await keygate.logged({ event: 'worker_ready', worker: 0 }, { since });
  await until('reload that finds the key', async () => (await keygate.reload(renewed)).outcome === 'committed');
  assert.match(await assertServes(keygate.port()), /renewed\.test/);
  assert.deepEqual(changes(), before, 'something was written');
});

it('a path that a module should be able to write, and that is not there, is a warning and no reason not to start', async (test) => {
  const missing = '/nonexistent/state';
  const { keygate, faults } = await service(test, ({ control }) => ({ sandbox: { writable: [control, missing] } }));
  const { missing: reasons } = await keygate.logged({ event: 'sandbox_limited' });
  assert.match(String(reasons), /^nothing can be written to \/nonexistent\/state: /);
  faults.misbehave();
  await assertServes(keygate.port());
  assert.equal(faults.deeds.program, 'EPERM');
});

it('a token behind the socket of p11-kit is served from', async (test) => {
  using token = await provisionedToken({ www: { kind: 'p256' } });
  const upstream = await echoUpstream();
  const server = new P11KitServer(test, token);
  test.after(async () => upstream.close());
  await server.start();
  const document = {
    tokens: { hsm: { ...token.settings, module: server.module } },
    upstreams: { echo: { servers: [upstream.address] } },
    listeners: { https: {} },
  };
  await using keygate = await startKeygate(token, document, { env: server.env });
  assert.deepEqual((await keygate.logged({ event: 'sandbox_entered' }))['writable'], []);
  for (let client = 0; client < 5; client++) await assertServes(keygate.port());

  // SoftHSM itself could not write there, and would not see new keys: that is said, and not found out.
  const both = { ...document, tokens: { ...document.tokens, direct: token.settings } };
  const { outcome, reasons } = await keygate.reload(both);
  assert.equal(outcome, 'refused');
  assert.equal(reasons[0]?.code, 'config_restart');
  assert.match(reasons[0].message, /tokens\.direct\.module/);
});

it('the sandbox cannot be changed by a reload, nor where log lines go', async (test) => {
  const { token, keygate, document } = await service(test);
  const access = { file: join(token.directory, 'access.log') };
  for (const [change, place] of [
    [{ sandbox: { enabled: false } }, /sandbox/],
    [{ log: { access } }, /log\./],
  ] as const) {
    const report = await keygate.reload({ ...document, ...change });
    assert.deepEqual([report.status, report.outcome, report.reasons[0]?.code], [422, 'refused', 'config_restart']);
    assert.match(report.reasons[0]?.message ?? '', place);
  }
  await assertServes(keygate.port());
});

/** Nothing else may be written: not even the token directory. */
const onlyControl = ({ control }: { readonly control: string }) => ({ sandbox: { writable: [control] } });

/** Makes another key and its certificate `renewed` in the token. */
async function withNewKey(token: ProvisionedToken): Promise<{ readonly certificates: object }> {
  const chain = join(token.directory, 'renewed.pem');
  const pem = await token.use(async (open) => {
    const { key } = generateKeyPair(open, 'renewed', 'p256');
    return createSelfSigned(open, key, { dns: ['renewed.test'], ip: [] }, 30);
  });
  writeFileSync(chain, pem);
  return { certificates: { ...token.certificates, renewed: { chain, key: 'pkcs11:object=renewed' } } };
}

interface Service {
  readonly token: ProvisionedToken;
  readonly faults: FaultModule;
  readonly keygate: Keygate;
  readonly document: KeygateDocument;
  /** What a module that misbehaves tries to change. */
  readonly prey: string;
}

/** One worker; ends with the test, asserting that it ends well. */
async function service(
  test: TestContext,
  more: object | ((places: { readonly control: string }) => object) = {},
): Promise<Service> {
  const token = await provisionedToken({ www: { kind: 'p256' } });
  const upstream = await echoUpstream();
  const faults = new FaultModule(token);
  const prey = join(token.directory, 'prey');
  mkdirSync(prey);
  writeFileSync(join(prey, 'kept'), 'kept');
  const document = {
    tokens: { hsm: { ...token.settings, module: faults.module } },
    certificates: token.certificates,
    upstreams: { echo: { servers: [upstream.address] } },
    listeners: { https: { certificates: ['www'] } },
    drainDeadline: '0s',
    ...(typeof more === 'function' ? more({ control: faults.env['KEYGATE_FAULT_CONTROL'] ?? '' }) : more),
  };
  const keygate = await startKeygate(token, document, { env: { ...faults.env, KEYGATE_FAULT_PREY: prey } });
  test.after(async () => {
    try {
      await keygate.stop();
    } finally {
      await upstream.close();
      faults.close();
      token.dispose();
    }
  });
  return { token, faults, keygate, document, prey };
}

/** @returns the names in the certificate. */
