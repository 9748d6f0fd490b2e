/**
 * Owns: that every mode works with every kind of key, both TLS versions, and the clients and servers that people use. Which
 * combinations cannot be is a table with reasons.
 * Must not know: what is negotiated in detail (handshake.test.ts), what becomes of bad servers (bad-certificates.test.ts).
 * Runs: against one keygate on SoftHSM with a listener for every combination that needs one. By default combinations are chosen so that
 * each mode meets each kind of key in each version, and any two of the five otherwise; `npm run test:matrix` runs all.
 */
import assert from 'node:assert/strict';
import { createHash, generateKeyPairSync, X509Certificate } from 'node:crypto';
import type { KeyObject } from 'node:crypto';
import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { after, before, describe, it } from 'node:test';
import { createAuthority } from '../support/authority.ts';
import { covering } from '../support/covering.ts';
import { startKeygate } from '../support/keygate.ts';
import type { Keygate } from '../support/keygate.ts';
import { provisionedToken } from '../support/provisioned-token.ts';
import type { ProvisionedToken } from '../support/provisioned-token.ts';
import { browserClient, webClients } from '../support/web-clients.ts';
import type { BrowserClient, TlsVersion, WebClientName } from '../support/web-clients.ts';
import { webServers } from '../support/web-servers.ts';
import type { Identity, WebServer, WebServerName } from '../support/web-servers.ts';

const modes = ['offload', 'encrypt', 'bridge', 'passthrough'] as const;
/** With a key for servers made by Node; those of listeners and of client certificates are made in the token. */
const keys = {
  p256: () => generateKeyPairSync('ec', { namedCurve: 'P-256' }),
  p384: () => generateKeyPairSync('ec', { namedCurve: 'P-384' }),
  rsa2048: () => generateKeyPairSync('rsa', { modulusLength: 2048 }),
  rsa3072: () => generateKeyPairSync('rsa', { modulusLength: 3072 }),
  ed25519: () => generateKeyPairSync('ed25519'),
} as const satisfies Readonly<Record<string, () => { publicKey: KeyObject; privateKey: KeyObject }>>;
const versions = ['1.2', '1.3'] as const;

interface Combination {
  readonly mode: (typeof modes)[number];
  /** Of the listener's certificate (offload, bridge), the client certificate that the server sees (encrypt, bridge) and the server's own. */
  readonly key: keyof typeof keys;
  /** On every side that speaks TLS. */
  readonly version: TlsVersion;
  readonly client: WebClientName | 'Chromium';
  readonly server: WebServerName;
}

/** What keeps a combination from being; the first that fits. */
const impossible: readonly {
  readonly why: string;
  readonly fits: (one: Combination) => boolean;
  /** It can be tried, and fails. */
  readonly isRefused: boolean;
}[] = [
  {
    why: 'encrypt: the client speaks plaintext, and this one speaks nothing but TLS',
    fits: ({ mode, client }) => mode === 'encrypt' && client !== 'Chromium' && webClients[client].plain === undefined,
    isRefused: false,
  },
  {
    why: 'offload: the server speaks plaintext, and this one speaks nothing but TLS',
    fits: ({ mode, server }) => mode === 'offload' && !webServers[server].hasPlain,
    isRefused: false,
  },
  {
    why: 'Chromium verifies no Ed25519 signature, whoever ends its TLS',
    fits: ({ mode, key, client }) => client === 'Chromium' && key === 'ed25519' && mode !== 'encrypt',
    isRefused: true,
  },
];

const all: readonly Combination[] = modes.flatMap((mode) =>
  (Object.keys(keys) as (keyof typeof keys)[]).flatMap((key) =>
    versions.flatMap((version) =>
      ([...Object.keys(webClients), 'Chromium'] as Combination['client'][]).flatMap((client) =>
        (Object.keys(webServers) as WebServerName[]).map((server) => ({ mode, key, version, client, server })),
      ),
    ),
  ),
);
const reasonAgainst = (one: Combination) => impossible.find(({ fits }) => fits(one))?.why;
const possible = all.filter((one) => reasonAgainst(one) === undefined);
const isFull = process.env['KEYGATE_MATRIX'] === 'full';
const chosen = isFull ? possible : covering(possible, interactions);

function interactions(one: Combination): string[] {
  const words = Object.entries(one).map(([axis, value]) => `${axis} ${value}`);
  const pairs = words.flatMap((word, index) => words.slice(index + 1).map((other) => `${word}, ${other}`));
  return [...pairs, `${one.mode} ${one.key} ${one.version}`];
}

describe('a client gets its page', { timeout: isFull ? 900_000 : 110_000 }, () => {
  const fixtures = new AsyncDisposableStack();
  let token: ProvisionedToken;
  let keygate: Keygate;
  let chromium: BrowserClient;
  let roots: string;

  before(async () => {
    const names = Object.keys(webServers).map((server) => hostOf(server));
    token = fixtures.use(
      await provisionedToken(
        Object.fromEntries(
          (Object.keys(keys) as (keyof typeof keys)[]).flatMap((kind) => [
            [kind, { kind, dns: names }],
            [clientOf(kind), { kind, key: kind, purpose: 'client' }],
          ]),
        ),
      ),
    );
    const authority = await createAuthority();
    roots = join(token.directory, 'roots.pem');
    writeFileSync(roots, authority.rootPem);
    const identities: Identity[] = [];
    for (const [name, generate] of Object.entries(keys)) {
      const { publicKey, privateKey } = generate();
      const [chain, key] = [join(token.directory, `server-${name}.pem`), join(token.directory, `server-${name}.key`)];
      writeFileSync(chain, `${await authority.issue(publicKey, { names })}\n${authority.intermediatePem}\n`);
      writeFileSync(key, privateKey.export({ type: 'pkcs8', format: 'pem' }));
      identities.push({ name, chain, key });
    }
    const servers: Record<string, WebServer> = {};
    for (const [name, program] of Object.entries(webServers)) {
      servers[name] = fixtures.use(await program.start(token.directory, identities));
    }
    keygate = fixtures.use(await startKeygate(token, { log: { access: {} }, ...sectionsFor(servers, roots) }));
    const pems = [authority.intermediatePem, ...Object.keys(keys).map((key) => token.pem(key))];
    chromium = fixtures.use(browserClient(pems.map((pem) => pinOf(pem))));
  });
  after(async () => fixtures.disposeAsync());

  for (const one of chosen) {
    const { mode, key, version, client, server } = one;
    it(`in mode ${mode} with a key of kind ${key} and TLS ${version}: ${client}, from ${server}`, async () => {
      const since = keygate.log.length;
      const page = await pageOf(one);
      const seen = webServers[server].seen(page);
      assert.ok(seen !== undefined, `${client} got ${page}`);
      assert.equal(seen.protocol, mode === 'offload' ? '' : `TLSv${version}`);
      if (seen.name !== undefined) assert.equal(seen.name, mode === 'offload' ? '' : hostOf(server));
      const isShown = mode === 'encrypt' || mode === 'bridge';
      assert.equal(seen.certificate, isShown ? sha1Of(token.pem(clientOf(key))) : '');

      const serverName = mode === 'encrypt' ? undefined : hostOf(server);
      // A browser may try a connection and drop it.
      const wanted = { event: 'connection', listener: listenerOf(one), serverName, phase: 'relay' };
      const line = await keygate.logged(wanted, { since });
      assert.equal(line['protocol'], mode === 'offload' || mode === 'bridge' ? `TLSv${version}` : undefined);
      assert.equal(line['upstreamHandshakeMs'] !== undefined, isShown);
      if (client === 'Chromium' && (mode === 'offload' || mode === 'bridge'))
        assert.equal(chromium.group, version === '1.3' ? 'X25519MLKEM768' : 'X25519');
    });
  }

  for (const { why, isRefused } of impossible) {
    it(`not where that cannot be: ${why}`, async (test) => {
      const [first, ...others] = all.filter((one) => reasonAgainst(one) === why);
      assert.ok(first !== undefined, 'nothing is kept out');
      test.diagnostic(`${others.length + 1} of ${all.length} combinations`);
      if (isRefused) assert.equal(webServers[first.server].seen(await pageOf(first)), undefined);
    });
  }

  it('in combinations that show each mode with each key in each version, and each two of the five', (test) => {
    test.diagnostic(`${chosen.length} of ${possible.length} possible combinations`);
    const shown = new Set(chosen.flatMap((one) => interactions(one)));
    for (const one of possible) for (const interaction of interactions(one)) assert.ok(shown.has(interaction));
  });

  /** What the client prints. */
  async function pageOf(one: Combination): Promise<string> {
    const { mode, key, version, client, server } = one;
    const program = client === 'Chromium' ? chromium : webClients[client];
    const visit = {
      port: keygate.port(listenerOf(one)),
      name: hostOf(server),
      path: `/${Object.values(one).map(encodeURIComponent).join('/')}`,
      version,
      trusted: mode === 'passthrough' ? roots : (token.certificates[key]?.chain ?? ''),
    };
    return (await (mode === 'encrypt' ? program.plain?.(visit) : program.tls(visit))) ?? '';
  }
});

/** The certificate of the same key that is shown to servers. */
const clientOf = (key: string): string => `client-${key}`;

/** The name that a client asks for, by which a listener chooses the server. */
const hostOf = (server: string): string => `${server.replaceAll(' ', '-').replaceAll('_', '-').toLowerCase()}.test`;

/** Who speaks plaintext asks for no name, so there each server has listeners of its own. */
const listenerOf = ({ mode, key, version, server }: Combination): string =>
  [mode, key, ...(mode === 'bridge' || mode === 'encrypt' ? [version] : []), ...(mode === 'encrypt' ? [server] : [])]
    .join('-')
    .replaceAll(/[ ._]/g, '-');

const policyOf = (version: TlsVersion): string => `only-${version.replace('.', '-')}`;

/** The configuration: a listener and an upstream for whatever a combination can ask for. */
function sectionsFor(servers: Readonly<Record<string, WebServer>>, roots: string) {
  const upstreams: Record<string, object> = {};
  const listeners: Record<string, { routes?: object[] }> = {};
  for (const one of possible) {
    const { mode, key, version, server } = one;
    const address = servers[server]?.addresses[mode === 'offload' ? 'plain' : key];
    const isSecure = mode === 'encrypt' || mode === 'bridge';
    const upstream = [mode, key, server, ...(isSecure ? [version] : [])].join('-').replaceAll(/[ ._]/g, '-');
    const tls = { roots, name: hostOf(server), certificate: clientOf(key), policy: policyOf(version) };
    if (upstreams[upstream] !== undefined) continue;
    upstreams[upstream] = { servers: [address], ...(isSecure ? { tls } : {}) };
    const settings = {
      mode,
      certificates: mode === 'offload' || mode === 'bridge' ? [key] : undefined,
      ...(mode === 'bridge' ? { policy: policyOf(version) } : {}),
    };
    const route = { names: [hostOf(server)], upstream };
    const name = listenerOf(one);
    if (mode === 'encrypt') listeners[name] = { ...settings, upstream } as object;
    else
      listeners[name] = {
        ...settings,
        upstream: undefined,
        routes: [...(listeners[name]?.routes ?? []), route],
      } as object;
  }
  const policies = Object.fromEntries(
    versions.map((version) => [policyOf(version), { minVersion: version, maxVersion: version }]),
  );
  return { policies, upstreams, listeners };
}

function pinOf(pem: string): string {
  const spki = new X509Certificate(pem).publicKey.export({ format: 'der', type: 'spki' });
  return createHash('sha256').update(spki).digest('base64');
}

function sha1Of(pem: string): string {
  return createHash('sha1').update(new X509Certificate(pem).raw).digest('hex');
}
