/**
 * Owns: the systemd units of native-config: free of warnings, and as closed as they are said to be.
 * Must not know: how keygate does under them (test/images/systemd.image.ts).
 * Runs: systemd's own judge, which needs no running systemd.
 */
import assert from 'node:assert/strict';
import { spawnSync } from 'node:child_process';
import { cpSync, mkdirSync, mkdtempSync, readFileSync, readdirSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { it } from 'node:test';
import type { TestContext } from 'node:test';
import { parse } from 'yaml';

const units = join(import.meta.dirname, '../../native-config/systemd');
const dropIns = readdirSync(join(units, 'drop-ins'));
/** Of systemd-analyze security, in tenths: 0 is closed, 100 is open. What is left is the network, which is the job. */
const exposureMax: Readonly<Record<string, number>> = {
  'keygate.service': 11,
  'own-ports.conf': 14,
  'hsm-device.conf': 15,
  'hsm-network.conf': 11,
  'transparent.conf': 15,
};

it('the units are free of warnings', (test) => {
  assertVerifies(laidOut(test));
});

it('the service is hardly exposed', (test) => {
  assertExposure(laidOut(test), 'keygate.service');
});

for (const dropIn of dropIns) {
  it(`with ${dropIn} the service is free of warnings and not exposed more than it says`, (test) => {
    const directory = laidOut(test);
    mkdirSync(join(directory, 'keygate.service.d'));
    cpSync(join(units, 'drop-ins', dropIn), join(directory, 'keygate.service.d', dropIn));
    assertVerifies(directory);
    assertExposure(directory, dropIn);
  });
}

it('the socket unit listens where the example configuration does', () => {
  const unit = readFileSync(join(units, 'keygate.socket'), 'utf8');
  const passed = [...unit.matchAll(/^ListenStream=(.+)$/gm)].map(([, address]) => address ?? '');
  const example = parse(readFileSync(join(units, '../keygate.yaml'), 'utf8')) as {
    readonly listeners: { readonly https: { readonly bind: readonly string[] } };
  };
  assert.deepEqual(new Set(passed), new Set(example.listeners.https.bind));
});

/** As an operator lays them out: drop-ins only where they are wanted. */
function laidOut(test: TestContext): string {
  const directory = mkdtempSync(join(tmpdir(), 'keygate-units-'));
  test.after(() => rmSync(directory, { recursive: true }));
  for (const unit of ['keygate.service', 'keygate.socket']) cpSync(join(units, unit), join(directory, unit));
  return directory;
}

function assertVerifies(directory: string): void {
  const { status, output } = analyze('verify', join(directory, 'keygate.service'), join(directory, 'keygate.socket'));
  assert.deepEqual({ status, output }, { status: 0, output: '' });
}

function assertExposure(directory: string, what: string): void {
  const threshold = exposureMax[what];
  assert.ok(threshold !== undefined, `${what} has no number in this test`);
  const service = join(directory, 'keygate.service');
  const { status, output } = analyze('security', '--offline=yes', `--threshold=${threshold}`, '--no-pager', service);
  assert.equal(status, 0, output);
  // A number that is far above the truth would not notice a lost line.
  const stricter = analyze('security', '--offline=yes', `--threshold=${threshold - 2}`, '--no-pager', service);
  assert.notEqual(stricter.status, 0, `${what} is exposed less than ${threshold}: lower the number`);
}

function analyze(...args: readonly string[]): { readonly status: number | null; readonly output: string } {
  const { status, stdout, stderr, error } = spawnSync('systemd-analyze', args, { encoding: 'utf8' });
  assert.ok(error === undefined, String(error));
  return { status, output: `${stdout}${stderr}` };
}
