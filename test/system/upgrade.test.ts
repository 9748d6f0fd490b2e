/**
 * Owns: that another keygate takes over without a client that notices, or that nothing happens.
 * Must not know: how the two agree.
 * Runs: against real `keygate serve` processes with SoftHSM.
 */
import assert from 'node:assert/strict';
import { once } from 'node:events';
import { readFileSync, writeFileSync } from 'node:fs';
import { after, before, describe, it } from 'node:test';
import type { TestContext } from 'node:test';
import { startKeygate } from '../support/keygate.ts';
import type { Keygate, KeygateDocument } from '../support/keygate.ts';
import { provisionedToken } from '../support/provisioned-token.ts';
import type { ProvisionedToken } from '../support/provisioned-token.ts';
import { assertEchoes, rawClient, tlsClient, untilRefused } from '../support/tls-client.ts';
import { until } from '../support/until.ts';
import { echoUpstream } from '../support/upstream.ts';
import type { Upstream } from '../support/upstream.ts';

describe('a successor', { timeout: 110_000 }, () => {
  const fixtures = new AsyncDisposableStack();
  let token: ProvisionedToken;
  let echo: Upstream;

  before(async () => {
    token = fixtures.use(await provisionedToken({ p256: { kind: 'p256' } }));
    echo = fixtures.use(await echoUpstream());
  });
  after(async () => fixtures.disposeAsync());

  it('takes over while clients come and stay: none is refused, none is cut, and sessions go on', async (test) => {
    const keygate = await started(test, { workers: 2, drainDeadline: '30s' });
    const port = keygate.port();
    const stays = await tlsClient({ port });
    const [session] = (await Promise.all([once(stays, 'session'), assertEchoes(stays)]))[0] as [Buffer];
    const crowd = comingAndGoing(port);

    const successor = await upgrade(keygate);
    await until('state in which the former accepts nothing any more', () =>
      keygate.log.some(({ event }) => event === 'drain_started'),
    );
    await crowd.moreThan(20);
    await crowd.stop();
    await assertEchoes(stays);
    const resumed = await tlsClient({ port, session });
    await assertEchoes(resumed);
    assert.ok(resumed.isSessionReused());
    resumed.destroy();

    const { pid: served } = await successor.admin();
    assert.notEqual(served, keygate.pid);
    assert.ok(isRunning(keygate.pid), 'the former waits for who stays');
    stays.end();
    await until('end of the former', () => !isRunning(keygate.pid));
    const ended = keygate.log.find(({ event }) => event === 'ended');
    assert.equal(ended?.['cut'], 0);
  });

  it('may have settings that a reload cannot have, and successors of its own', async (test) => {
    const settings = (workers: number) => ({ workers, drainDeadline: '30s' });
    const keygate = await started(test, settings(2));
    const port = keygate.port();
    // The former ones stay, and nobody may wait for them.
    const stays = [await tlsClient({ port })];
    for (const workers of [1, 2]) {
      keygate.configure(document(settings(workers)));
      await upgrade(keygate);
      assert.equal((await keygate.workers()).length, workers);
      for (let count = 0; count < 20; count += 1) await visit(port);
      stays.push(await tlsClient({ port }));
    }
    for (const client of stays) {
      await assertEchoes(client);
      client.destroy();
    }
  });

  it('may lack a listener: its clients stay, and who comes is refused at once', async (test) => {
    const keygate = await started(test, { listeners: { https: {}, api: {} }, workers: 2, drainDeadline: '30s' });
    const port = keygate.port('api');
    const stays = await tlsClient({ port });
    keygate.configure(document({ workers: 2, drainDeadline: '30s' }));
    await upgrade(keygate);
    await keygate.logged({ event: 'drain_started' });
    await assert.rejects(rawClient(port), { code: 'ECONNREFUSED' });
    await visit(keygate.port());
    await assertEchoes(stays);
    assert.ok(isRunning(keygate.pid), 'the former waits for who stays');
    stays.destroy();
    await until('end of the former', () => !isRunning(keygate.pid));
  });

  it('that is killed leaves its addresses to the next keygate, also while the former drains', async (test) => {
    const keygate = await started(test, { drainDeadline: '30s' });
    const port = keygate.port();
    const stays = await tlsClient({ port });
    const { admin } = await upgrade(keygate);
    await keygate.logged({ event: 'drain_started' });
    process.kill((await admin()).pid, 'SIGKILL');
    await untilRefused(port);
    const next = await started(test, { listeners: { https: { bind: [`127.0.0.1:${port}`] } } });
    await visit(next.port());
    await assertEchoes(stays);
    stays.destroy();
  });

  it('that cannot start changes nothing, and why is said', async (test) => {
    const keygate = await started(test, {});
    const good = readFileSync(keygate.file);
    writeFileSync(keygate.file, 'listeners: {}\n');
    const { status, body } = await keygate.admin('/upgrade', 'POST');
    assert.equal(status, 409);
    assert.match(body, /the successor left with 78, before it was prepared; the log says why/);
    await keygate.logged({ event: 'upgrade_failed' });
    await visit(keygate.port());
    writeFileSync(keygate.file, good);
    assert.equal((await keygate.reload()).outcome, 'committed');
    await upgrade(keygate);
    await visit(keygate.port());
  });

  it('does not outlive a keygate that is told to leave meanwhile', async (test) => {
    const keygate = await started(test, {});
    const since = keygate.log.length;
    const asked = keygate.admin('/upgrade', 'POST').catch(() => ({ status: 0 }));
    await keygate.logged({ event: 'starting' }, { since });
    process.kill(keygate.pid, 'SIGTERM');
    assert.notEqual((await asked).status, 200);
    assert.equal((await keygate.ended()).exitCode, 0);
  });

  it('that dies before it is ready changes nothing', async (test) => {
    const keygate = await started(test, {});
    keygate.configure(
      document({ reloadDeadline: '1s', tokens: { hsm: { ...token.settings, uri: 'pkcs11:token=none' } } }),
    );
    const { status } = await keygate.admin('/upgrade', 'POST');
    assert.equal(status, 409);
    await visit(keygate.port());
  });

  function document(settings: object): KeygateDocument {
    return { upstreams: { echo: { servers: [echo.address] } }, listeners: { https: {} }, ...settings };
  }

  async function started(test: TestContext, settings: object): Promise<Keygate> {
    const keygate = await startKeygate(token, document(settings));
    test.after(async () => {
      // Whoever serves now: the group is that of the first.
      try {
        process.kill(-keygate.pid, 'SIGTERM');
      } catch {
        // All have left.
      }
      await keygate.stop();
    });
    return keygate;
  }

  /** Its admin server is another one from then on. */
  async function upgrade(keygate: Keygate) {
    const since = keygate.log.length;
    const { status, body } = await keygate.admin('/upgrade', 'POST');
    assert.equal(status, 200, body);
    const { pid } = JSON.parse(body) as { readonly pid: number };
    const ready = await keygate.logged({ event: 'ready' }, { since });
    keygate.adminAddress = String(ready['admin']);
    return { admin: async () => ({ pid, ...(await keygate.status()) }) };
  }

  async function visit(port: number): Promise<void> {
    const client = await tlsClient({ port });
    await assertEchoes(client);
    client.destroy();
  }

  /** One client after the other, without a pause; a failure is thrown by `stop`. */
  function comingAndGoing(port: number) {
    const crowd = { isOver: false, visits: 0 };
    const all = (async () => {
      while (!crowd.isOver) {
        await visit(port);
        crowd.visits += 1;
      }
    })();
    all.catch(() => {});
    return {
      async moreThan(count: number) {
        const wanted = crowd.visits + count;
        await Promise.race([all, until('visits', () => crowd.visits > wanted)]);
      },
      async stop() {
        crowd.isOver = true;
        await all;
      },
    };
  }
});

function isRunning(pid: number): boolean {
  try {
    return !/^State:\s+Z/m.test(readFileSync(`/proc/${pid}/status`, 'utf8'));
  } catch {
    return false;
  }
}
