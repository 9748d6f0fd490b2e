/**
 * Owns: keygate as a contender: what must be built, how it is configured and started.
 * Must not know: how it is measured.
 * Runs: in the benchmark's process.
 */
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { suiteOf } from '../negotiation.ts';
import type { Command } from '../processes.ts';
import { keygateVersion, softHsmVersion } from '../versions.ts';
import { backlog, connectionsMax, filesOf, idleSeconds, write } from './contender.ts';
import type { Contender, Need, Place } from './contender.ts';
import { softHsmNeed } from './openssl.ts';

const root = fileURLToPath(new URL('../..', import.meta.url));
const engineNeed: Need = { files: [join(root, 'src/engine/keygate-engine.node')], from: 'scripts/bootstrap' };

export const keygate: Contender = {
  title: 'keygate, key in SoftHSM',
  needs: [softHsmNeed, engineNeed],
  versions: () => ({ ...keygateVersion(root), softhsm: softHsmVersion() }),
  cannot: () => undefined,
  command,
};

/** Its defaults, but for what all are told. */
function command(place: Place): Command {
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
    file: join(root, 'bin/keygate'),
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
