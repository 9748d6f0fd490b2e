/**
 * Owns: giving up root, as seen from a process that has done it.
 * Must not know: what keygate does before and after.
 * Runs: node:test; what needs root runs as root only, in child processes, because there is no way back.
 */
import assert from 'node:assert/strict';
import { execFileSync, spawnSync } from 'node:child_process';
import { it } from 'node:test';
import { ServiceError } from '../../src/errors.ts';
import { findAccount } from '../../src/primary/privileges.ts';

const asRoot = { skip: process.geteuid?.() !== 0 && 'needs root' };

it('without a group, the process gets the primary group of the user', asRoot, () => {
  // On Debian the primary group of nobody is nogroup: there is no group with the name of the user.
  assert.deepEqual(identityAfterDrop({ user: 'nobody' }), {
    uid: numberFrom('id', '-u', 'nobody'),
    gid: numberFrom('id', '-g', 'nobody'),
    groups: [numberFrom('id', '-g', 'nobody')],
  });
});

it('a configured group replaces the primary group, and no group of root is left', asRoot, () => {
  const gid = Number(execFileSync('getent', ['group', 'daemon'], { encoding: 'utf8' }).split(':')[2]);
  const { gid: found, groups } = identityAfterDrop({ user: 'nobody', group: 'daemon' });
  assert.equal(found, gid);
  assert.ok(!groups.includes(0), `groups ${groups.join(' ')}`);
});

it('an account that is root after all is refused', asRoot, () => {
  assert.match(drop({ user: 'root' }).stderr, /still root after becoming user root/);
});

it('an unknown user and an unknown group are told apart, each with a hint', () => {
  assert.throws(() => findAccount('keygate-nobody'), failure(/^user: found keygate-nobody/, /useradd/));
  assert.throws(() => findAccount('nobody', 'keygate-none'), failure(/^group: found keygate-none/, /groupadd/));
});

function failure(message: RegExp, hint: RegExp): (error: unknown) => boolean {
  return (error) =>
    error instanceof ServiceError &&
    error.code === 'privileges' &&
    message.test(error.message) &&
    hint.test(error.hint ?? '');
}

interface Wanted {
  readonly user: string;
  readonly group?: string;
}

function identityAfterDrop(wanted: Wanted): { uid: number; gid: number; groups: number[] } {
  const { stdout, stderr } = drop(wanted);
  assert.notEqual(stdout, '', stderr);
  return JSON.parse(stdout) as { uid: number; gid: number; groups: number[] };
}

function drop(wanted: Wanted): { stdout: string; stderr: string } {
  const url = new URL('../../src/primary/privileges.ts', import.meta.url).href;
  const script = `
    import { becomeConfigured } from ${JSON.stringify(url)};
    becomeConfigured(${JSON.stringify({ upstreams: {}, ...wanted })});
    console.log(JSON.stringify({ uid: process.getuid(), gid: process.getgid(), groups: process.getgroups() }));
  `;
  return spawnSync(process.execPath, ['--input-type=module', '--eval', script], { encoding: 'utf8' });
}

function numberFrom(command: string, ...args: readonly string[]): number {
  return Number(execFileSync(command, args, { encoding: 'utf8' }));
}
