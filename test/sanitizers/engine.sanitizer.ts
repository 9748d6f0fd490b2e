/**
 * Owns: the engine under AddressSanitizer and ThreadSanitizer, in Node, while clients and servers leave wherever they can, hand
 * shakes of every kind are made and bytes are relayed: no fault of memory and no race.
 * Must not know: how it is built and what is looked at (guest.sh).
 * Runs: by `npm run test:sanitizers` and `npm run test:faults`, as root. In a Debian of its own, because the standard library must
 * be built with the sanitizer too, and Debian's unstable has a compiler with its source. What is built stays in .keygate: the
 * first run takes about 15 minutes, each further one as long as what has changed.
 */
import assert from 'node:assert/strict';
import { execFileSync, spawnSync } from 'node:child_process';
import { cpSync, existsSync, mkdirSync, rmSync } from 'node:fs';
import { homedir } from 'node:os';
import { dirname, join } from 'node:path';
import { it } from 'node:test';
import { debianRoot, whyNotHere } from '../images/debian-root.ts';

const checkout = join(import.meta.dirname, '../..');
const kept = join(checkout, '.keygate/sanitizers');
const compiler = [
  'rustc',
  'cargo',
  'rust-src',
  'clang',
  'libclang-rt-dev',
  'llvm',
  'g++',
  'libc6-dev',
  'cmake',
  'make',
];
const packages = [...compiler, 'softhsm2', 'openssl', 'procps', 'ca-certificates', 'libatomic1'];
const tests = ['leaving', 'relay', 'faults'].map((name) => `test/system/${name}.test.ts`);

for (const sanitizer of ['address', 'thread']) {
  it(`the ${sanitizer} sanitizer finds nothing in the engine`, { skip: whyNotHere('unshare') }, () => {
    const root = debianRoot('sanitizers', packages, 'sid');
    const work = copyOfCheckout();
    const { status, stdout } = spawnSync(
      'unshare',
      [
        '--mount',
        '--propagation=private',
        '--pid',
        '--fork',
        '--kill-child=KILL',
        'sh',
        '-euc',
        inRoot,
        'sh',
        root,
        work,
        sanitizer,
        ...tests,
      ],
      {
        encoding: 'utf8',
        stdio: ['ignore', 'pipe', 'inherit'],
        env: { ...process.env, KEPT: kept, CARGO: cargoRegistry(), CHECKOUT: checkout },
      },
    );
    assert.equal(status, 0, stdout);
    assert.match(stdout, /^ℹ pass [1-9]/m);
  });
}

/** Of what is or could be committed; the engine that is built there is not the checkout's. */
function copyOfCheckout(): string {
  const work = join(kept, 'work');
  const files = execFileSync('git', ['-C', checkout, 'ls-files', '-z', '--cached', '--others', '--exclude-standard'], {
    encoding: 'utf8',
  })
    .split('\0')
    .filter(Boolean);
  for (const folder of ['src', 'test']) rmSync(join(work, folder), { recursive: true, force: true });
  for (const file of files) {
    if (!existsSync(join(checkout, file))) continue;
    mkdirSync(dirname(join(work, file)), { recursive: true });
    // With its time, which says whether it has to be compiled again.
    cpSync(join(checkout, file), join(work, file), { preserveTimestamps: true });
  }
  return work;
}

/** What cargo has downloaded already; it asks for the rest. */
function cargoRegistry(): string {
  const registry = join(process.env['CARGO_HOME'] ?? join(homedir(), '.cargo'), 'registry');
  mkdirSync(registry, { recursive: true });
  return registry;
}

/** Its mounts end with it. */
const inRoot = `
root=$1 work=$2
shift 2
mkdir -p "$KEPT/targets" "$work/node_modules" "$root/work" "$root/targets" "$root/root/.cargo/registry"
mount --bind "$work" "$root/work"
mount --bind "$CHECKOUT/node_modules" "$root/work/node_modules"
mount --bind "$KEPT/targets" "$root/targets"
mount --bind "$CARGO" "$root/root/.cargo/registry"
mount -t proc proc "$root/proc"
mount -t sysfs sysfs "$root/sys"
mount --rbind /dev "$root/dev"
mount -t tmpfs tmpfs "$root/tmp"
cp "\${SSL_CERT_FILE:-/etc/ssl/certs/ca-certificates.crt}" "$root/tmp/authorities.crt"
exec chroot "$root" env -i HOME=/root LANG=C.UTF-8 TMPDIR=/tmp PATH=/work/node_modules/.bin:/usr/bin:/bin:/usr/sbin:/sbin \\
  SSL_CERT_FILE=/tmp/authorities.crt CARGO_HTTP_CAINFO=/tmp/authorities.crt /work/test/sanitizers/guest.sh "$@"
`;
