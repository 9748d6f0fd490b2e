/**
 * Owns: DNS zones for tests, signed with ldns, served by nsd, and a validating resolver (unbound) that knows their keys; all on
 * loopback and in a private directory.
 * Must not know: what is asked.
 * Runs: in test processes; nsd and unbound are children.
 */
import { execFileSync } from 'node:child_process';
import { once } from 'node:events';
import { mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { createServer } from 'node:net';
import type { AddressInfo } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { lookUpTlsa } from '../../src/worker/dns.ts';
import type { Resolver } from '../../src/worker/dns.ts';
import { startDaemon } from './daemon.ts';
import type { Daemon } from './daemon.ts';

/**
 * How a zone answers: vouched for by DNSSEC, not signed, signed and changed afterwards, or not signed below a signed zone, which
 * proves that it is not.
 */
export type ZoneKind = 'secure' | 'insecure' | 'bogus' | 'delegated';

/** `secure.test`, `delegated.secure.test`. */
export const zoneOf = (kind: ZoneKind): string => (kind === 'delegated' ? 'delegated.secure.test' : `${kind}.test`);

const isSigned = (kind: ZoneKind): boolean => kind === 'secure' || kind === 'bogus';

export interface SignedZones extends AsyncDisposable {
  /** UDP and TCP. */
  readonly resolver: Resolver;
  /** TLS, on the same host; the certificate is for resolver.test. */
  readonly tlsPort: number;
  /** What a zone has from now on, beside its SOA and NS: lines of a zone file. */
  publish(kind: ZoneKind, records: readonly string[]): void;
  /** nsd serves the secure zone with a record changed after it was signed, or as it should again. */
  forge(isForged: boolean): void;
  /** The resolver is gone, or is there again with an empty cache. */
  stopResolver(): Promise<void>;
  /** `validates: false`: it asks as before, and believes everything. */
  startResolver(how?: { readonly validates?: boolean }): Promise<void>;
}

export interface SignedZonesOptions {
  /** Of every record, also of the ones that say that there is none. */
  readonly ttl?: number;
  /** For `tlsPort`, PEM. */
  readonly certificate?: { readonly chain: string; readonly key: string };
}

const kinds: readonly ZoneKind[] = ['secure', 'insecure', 'bogus', 'delegated'];

export async function signedZones({ ttl = 1, certificate }: SignedZonesOptions = {}): Promise<SignedZones> {
  const directory = mkdtempSync(join(tmpdir(), 'keygate-zones-'));
  const zones = new Map(kinds.map((kind) => [kind, makeZone(directory, kind)]));
  const [nsdPort = 0, port = 0, tlsPort = 0] = await freePorts(3);
  const resolver: Resolver = { address: { host: '127.0.0.1', port }, tls: undefined };

  let serial = 1;
  let forged = false;
  const records = new Map<ZoneKind, readonly string[]>(kinds.map((kind) => [kind, []]));
  const write = (kind: ZoneKind): void => {
    serial += 1;
    const zone = zones.get(kind);
    const isForged = kind === 'bogus' || (kind === 'secure' && forged);
    zone?.write(records.get(kind) ?? [], { ttl, serial, isForged });
  };
  for (const kind of kinds) write(kind);

  writeFileSync(join(directory, 'nsd.conf'), nsdConf(directory, nsdPort));
  // Whether they answer is seen by the resolver's answers.
  const nsd = await startDaemon('/usr/sbin/nsd', ['-d', '-c', join(directory, 'nsd.conf')], () => true);
  let unbound: Daemon | undefined;

  const self: SignedZones = {
    resolver,
    tlsPort,
    publish(kind, lines) {
      records.set(kind, lines);
      write(kind);
      process.kill(nsd.pid, 'SIGHUP');
    },
    forge(isForged) {
      forged = isForged;
      write('secure');
      process.kill(nsd.pid, 'SIGHUP');
    },
    async stopResolver() {
      await unbound?.end();
      unbound = undefined;
    },
    async startResolver({ validates = true } = {}) {
      const ports = { nsdPort, port, tlsPort };
      writeFileSync(join(directory, 'unbound.conf'), unboundConf(directory, ports, zones, certificate, validates));
      unbound = await startDaemon(
        '/usr/sbin/unbound',
        ['-d', '-c', join(directory, 'unbound.conf')],
        async () => (await lookUpTlsa(resolver, 'ready.secure.test')).state === (validates ? 'secure' : 'insecure'),
      );
    },
    async [Symbol.asyncDispose]() {
      await self.stopResolver();
      await nsd.end();
      rmSync(directory, { recursive: true, force: true });
    },
  };
  try {
    await self.startResolver();
    return self;
  } catch (error) {
    await self[Symbol.asyncDispose]();
    throw error;
  }
}

interface Zone {
  /** For the resolver: the DS record of its key; undefined: it is not signed. */
  readonly anchor: string | undefined;
  write(
    records: readonly string[],
    how: { readonly ttl: number; readonly serial: number; readonly isForged: boolean },
  ): void;
}

function makeZone(directory: string, kind: ZoneKind): Zone {
  const name = zoneOf(kind);
  const place = join(directory, kind);
  mkdirSync(place);
  const run = (command: string, args: readonly string[]) =>
    execFileSync(command, args, { cwd: place, encoding: 'utf8', stdio: ['ignore', 'pipe', 'pipe'] }).trim();
  const file = join(place, 'zone');
  const served = join(place, 'served');
  const key = !isSigned(kind) ? undefined : run('ldns-keygen', ['-a', 'ECDSAP256SHA256', '-k', name]);
  return {
    anchor: key === undefined ? undefined : run('ldns-key2ds', ['-n', '-2', `${key}.key`]),
    write(records, { ttl, serial, isForged }) {
      const lines = [
        `$ORIGIN ${name}.`,
        `$TTL ${ttl}`,
        `@ IN SOA ns.${name}. hostmaster.${name}. ${serial} 3600 600 86400 ${ttl}`,
        `@ IN NS ns.${name}.`,
        'ns IN A 127.0.0.1',
        ...(kind === 'secure' ? ['delegated IN NS ns.delegated', 'ns.delegated IN A 127.0.0.1'] : []),
        ...records,
        '',
      ];
      writeFileSync(file, lines.join('\n'));
      if (key === undefined) {
        writeFileSync(served, lines.join('\n'));
        return;
      }
      run('ldns-signzone', ['-f', served, 'zone', key]);
      // Another digit in the data of every TLSA record; the signatures stay as they are.
      if (isForged)
        writeFileSync(
          served,
          readFileSync(served, 'utf8').replace(/(\sTLSA\s+\d \d \d )([0-9a-f])/g, (_, before: string, digit: string) =>
            [before, digit === '0' ? '1' : '0'].join(''),
          ),
        );
    },
  };
}

function nsdConf(directory: string, port: number): string {
  return [
    'server:',
    `  ip-address: 127.0.0.1@${port}`,
    '  server-count: 1',
    '  username: ""',
    '  database: ""',
    '  zonefiles-check: yes',
    ...['pidfile', 'zonelistfile', 'xfrdfile'].map((key) => `  ${key}: "${join(directory, key)}"`),
    `  xfrdir: "${directory}"`,
    '  rrl-ratelimit: 0',
    'remote-control:',
    '  control-enable: no',
    ...kinds.flatMap((kind) => [
      'zone:',
      `  name: "${zoneOf(kind)}"`,
      `  zonefile: "${join(directory, kind, 'served')}"`,
    ]),
    '',
  ].join('\n');
}

function unboundConf(
  directory: string,
  { nsdPort, port, tlsPort }: { readonly nsdPort: number; readonly port: number; readonly tlsPort: number },
  zones: ReadonlyMap<ZoneKind, Zone>,
  certificate: SignedZonesOptions['certificate'],
  validates: boolean,
): string {
  const tls: string[] = [];
  if (certificate !== undefined) {
    const [key, chain] = [join(directory, 'resolver.key'), join(directory, 'resolver.pem')];
    writeFileSync(key, certificate.key);
    writeFileSync(chain, certificate.chain);
    tls.push(
      `  interface: 127.0.0.1@${tlsPort}`,
      `  tls-port: ${tlsPort}`,
      `  tls-service-key: "${key}"`,
      `  tls-service-pem: "${chain}"`,
    );
  }
  return [
    'server:',
    `  interface: 127.0.0.1@${port}`,
    ...tls,
    '  username: ""',
    '  chroot: ""',
    `  directory: "${directory}"`,
    `  pidfile: "${join(directory, 'unbound.pid')}"`,
    '  use-syslog: no',
    '  logfile: ""',
    `  module-config: "${validates ? 'validator ' : ''}iterator"`,
    '  do-not-query-localhost: no',
    '  target-fetch-policy: "0 0 0 0 0"',
    // By default unbound knows that nothing under test. exists (RFC 6761 6.2).
    '  local-zone: "test." nodefault',
    '  val-bogus-ttl: 1',
    '  infra-host-ttl: 1',
    '  num-threads: 1',
    ...kinds.flatMap((kind) => {
      const anchor = zones.get(kind)?.anchor;
      return anchor === undefined || !validates ? [] : [`  trust-anchor: "${anchor.replaceAll('\t', ' ')}"`];
    }),
    'remote-control:',
    '  control-enable: no',
    ...kinds.flatMap((kind) => ['stub-zone:', `  name: "${zoneOf(kind)}"`, `  stub-addr: 127.0.0.1@${nsdPort}`]),
    '',
  ].join('\n');
}

/** Neither server can tell which port it was given for port 0. */
async function freePorts(count: number): Promise<number[]> {
  const servers = await Promise.all(
    Array.from({ length: count }, async () => {
      const server = createServer().listen(0, '127.0.0.1');
      await once(server, 'listening');
      return server;
    }),
  );
  const ports = servers.map((server) => (server.address() as AddressInfo).port);
  for (const server of servers) server.close();
  return ports;
}
