/**
 * Owns: how a process ends that has lanes inside a PKCS#11 module: in its own way, soon, and never by a crash.
 * Must not know: the primary, which only sees the exit.
 * Runs: real engines in child processes under a load of full handshakes, on SoftHSM behind the fault module.
 */
import assert from 'node:assert/strict';
import { it } from 'node:test';
import type { TestContext } from 'node:test';
import { connect } from 'node:tls';
import { engineParameters, startEngineProcess } from '../support/engine-process.ts';
import type { EngineProcess } from '../support/engine-process.ts';
import { FaultModule } from '../support/fault-module.ts';
import { provisionedToken } from '../support/provisioned-token.ts';
import { until } from '../support/until.ts';

interface Way {
  readonly name: string;
  readonly leave: (engine: EngineProcess) => void;
  readonly ends: string;
}

const ways: readonly Way[] = [
  { name: 'process.exit', leave: ({ order }) => order({ do: 'exit' }), ends: 'exit 0' },
  {
    name: 'process.exit without a stopped engine',
    leave: ({ order }) => order({ do: 'exit unstopped' }),
    ends: 'exit 0',
  },
  { name: 'an uncaught exception', leave: ({ order }) => order({ do: 'throw' }), ends: 'exit 1' },
  { name: 'SIGTERM', leave: ({ child }) => child.kill('SIGTERM'), ends: 'exit 0' },
  { name: 'SIGINT', leave: ({ child }) => child.kill('SIGINT'), ends: 'SIGINT' },
  { name: 'the end of the primary', leave: ({ child }) => child.disconnect(), ends: 'exit 1' },
];

const repetitions = 10;
const atOnce = 5;
/** Time for a lane to meet what the exit handlers of SoftHSM and its libcrypto tore down. */
const lingerMs = 100;
/** More than lanes, so that each lane always has something to sign. */
const clientsPerEngine = 6;

for (const { name, leave, ends } of ways) {
  it(`${name} while lanes sign ends with ${ends}, ${repetitions} times`, { timeout: 120_000 }, async (test) => {
    await repeat(test, ends, leave, async (faults, engines) => {
      const signed = faults.read('C_Sign', 'calls');
      await until('load on the lanes', () => faults.read('C_Sign', 'calls') >= signed + engines * clientsPerEngine * 3);
    });
  });

  it(`${name} while C_Sign hangs ends with ${ends}, ${repetitions} times`, { timeout: 120_000 }, async (test) => {
    await repeat(test, ends, leave, async (faults, engines, lanes) => {
      faults.hang('C_Sign');
      await until('hang of every lane', () => faults.read('C_Sign', 'inFlight') === engines * lanes);
    });
  });
}

async function repeat(
  test: TestContext,
  ends: string,
  leave: Way['leave'],
  prepare: (faults: FaultModule, engines: number, lanes: number) => Promise<void>,
): Promise<void> {
  // An RSA signature takes a millisecond, so that a lane is inside SoftHSM and not on its way there. One lane is left to EC.
  const token = await provisionedToken({ www: { kind: 'rsa2048' } });
  test.after(token.dispose);
  const parameters = engineParameters(token);
  const lanes = parameters.lanes - 1;
  for (let done = 0; done < repetitions; done += atOnce) {
    // A control file for each time: a killed process never leaves the calls that it is counted in.
    const faults = new FaultModule(token);
    faults.lingerAtExit(lingerMs);
    const engines = Array.from({ length: atOnce }, () =>
      startEngineProcess(test, { ...parameters, module: faults.module }, faults.env),
    );
    const clients = await Promise.all(engines.map(async (engine) => load(await started(engine))));
    try {
      await prepare(faults, engines.length, lanes);
      for (const engine of engines) leave(engine);
      for (const engine of engines) assert.equal(await engine.ended(), ends);
      assert.equal(faults.violations, 0);
    } finally {
      for (const stop of clients) stop();
      faults.close();
    }
  }
}

async function started(engine: EngineProcess): Promise<string> {
  engine.order({ do: 'start' });
  const answer = await engine.answer();
  assert.ok('address' in answer);
  return answer.address;
}

/** Keeps so many clients in full handshakes, one after the other, until it is stopped. */
function load(address: string): () => void {
  const [host, port] = address.split(':');
  let stopped = false;
  const shakeHands = (): void => {
    if (stopped) return;
    const client = connect({ host, port: Number(port), rejectUnauthorized: false });
    client.on('error', () => {});
    client.once('secureConnect', () => client.destroy());
    client.once('close', () => setImmediate(shakeHands));
  };
  for (let count = 0; count < clientsPerEngine; count++) shakeHands();
  return () => {
    stopped = true;
  };
}
