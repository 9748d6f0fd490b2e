/**
 * Owns: keygate as a contender, also of another checkout: what must be built, how it is configured and started.
 * Must not know: how it is measured.
 * Runs: in the benchmark's process.
 */
import { join, resolve } from 'node:path';
import { fileURLToPath } from 'node:url';
import { suiteOf } from '../negotiation.ts';
import type { Command } from '../processes.ts';
import { keygateVersion, softHsmVersion } from '../versions.ts';
import { backlog, connectionsMax, filesOf, idleSeconds, write } from './contender.ts';
import type { Contender, Place } from './contender.ts';
import { softHsmNeed } from './openssl.ts';

const root = fileURLToPath(new URL('../..', import.meta.url));

export const keygate = keygateIn(root, 'keygate, key in SoftHSM');

/** Without another checkout it is the same keygate, and the ratio of the two is what noise makes. */
const before = process.env['KEYGATE_BENCH_BEFORE'];
export const keygateBefore = keygateIn(
  resolve(before ?? root),
  before === undefined ? 'keygate, once more' : 'keygate before',
);

/** @param checkout is built: the file of its engine is there, and its packages are installed */
function keygateIn(checkout: string, title: string): Contender {
  return {
    title,
    isKeygate: true,
    needs: [softHsmNeed, { files: [join(checkout, 'src/engine/keygate-engine.node')], from: 'scripts/bootstrap' }],
    versions: () => ({ ...keygateVersion(checkout), softhsm: softHsmVersion() }),
    cannot: () => undefined,
    command: (place) => command(join(checkout, 'bin/keygate'), place),
  };
}

/** Its defaults, but for what all are told. */
function command(program: string, place: Place): Command {
  const { setting, token } = place;
  const key = filesOf(place);
  const chains = chainsOf(place);
  const version = `minVersion: "${setting.tls}", maxVersion: "${setting.tls}"`;
  const suites = `groups: [${setting.group}], cipherSuites: [${suiteOf(setting).iana}]`;
  const config = write(place, 'keygate.yaml', [
    `workers: ${setting.workers}`,
    'log: { level: warn }',
    ...sandboxOf(place),
    `admin: { listen: "127.0.0.1:${place.adminPort}" }`,
    'tokens:',
    `  hsm: { module: ${token.module}, uri: "pkcs11:token=${key.token}", pin: { file: ${token.pinFile} } }`,
    'certificates:',
    ...chains.map(({ name, file }) => `  ${name}: { chain: ${file}, key: "pkcs11:object=${key.label}" }`),
    'policies:',
    `  bench: { ${version}, ${suites}, tickets: ${setting.resume} }`,
    'upstreams:',
    `  bench: { servers: [${place.upstreams.map((address) => `"${address}"`).join(', ')}] }`,
    'listeners:',
    '  tls:',
    `    bind: ["127.0.0.1:${place.port}"]`,
    '    policy: bench',
    '    upstream: bench',
    `    backlog: ${backlog}`,
    `    deadlines: { idle: ${idleSeconds}s, halfClosed: ${idleSeconds}s }`,
    `    limits: { connections: ${connectionsMax(place)} }`,
    `    certificates: [${chains.map(({ name }) => name).join(', ')}]`,
  ]);
  return {
    file: program,
    args: ['serve', '-c', config],
    env: token.env,
    cwd: place.directory,
  };
}

/** The module of slow tokens counts in a file of its own. */
function sandboxOf({ setting, token }: Place): readonly string[] {
  if (!setting.sandbox) return ['sandbox: { enabled: false }'];
  const control = token.env['KEYGATE_FAULT_CONTROL'];
  return control === undefined ? [] : [`sandbox: { writable: [${control}] }`];
}

function chainsOf(place: Place): readonly { readonly name: string; readonly file: string }[] {
  const { certificates, key } = place.setting;
  if (certificates === 1) return [{ name: 'www', file: filesOf(place).certificate }];
  return place.keys.certificates(key, certificates).map(({ file }, index) => ({ name: `n${index}`, file }));
}
