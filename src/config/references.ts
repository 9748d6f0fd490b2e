/**
 * Owns: what keys say about each other: every name must be defined, no address bound twice, no admin server open to all.
 * Must not know: positions; whether the document is otherwise right, so that its problems are all reported at once.
 * Runs: at start, on the main thread.
 */
import { isIP, isIPv6 } from 'node:net';
import { availableParallelism } from 'node:os';
import { isLocal, parseAdminAddress, parseBindAddress, parseServerAddress } from './address.ts';
import { listenerModes } from './config.ts';
import type { TcpAddress, UnixAddress } from './config.ts';
import { builtInPolicies } from './policies.ts';
import { policyFaults } from './policy-faults.ts';
import type { Path, PlacedFault } from './source.ts';
import { suggest } from './suggestion.ts';

export function referenceFaults(document: unknown): PlacedFault[] {
  return [
    ...unknownNames(document),
    ...repeatedNames(document),
    ...builtInNames(document),
    ...policyFaults(mapping(document)),
    ...idle(document),
    ...misplacedTls(document),
    ...uncheckable(document),
    ...unknowable(document),
    ...scarceSessions(document),
    ...sharedBinds(document),
    ...destinationless(document),
    ...openAdmin(document),
  ];
}

function* unknownNames(document: unknown): Generator<PlacedFault> {
  const policies = [...builtInPolicies.map(({ name }) => name), ...namesIn(document, 'policies')];
  yield* undefinedNames(document, 'certificates', 'tokens', 'tokens', namesIn(document, 'tokens'));
  // `tickets` is one section and not several by name.
  const section = { all: { tickets: mapping(document)['tickets'] } };
  for (const fault of undefinedNames(section, 'all', 'tokens', 'tokens', namesIn(document, 'tokens')))
    yield { ...fault, path: fault.path.slice(1) };
  yield* undefinedNames(document, 'listeners', 'certificates', 'certificates', namesIn(document, 'certificates'));
  yield* undefinedNames(document, 'listeners', 'policy', 'policies', policies);
  yield* undefinedNames(document, 'policies', 'base', 'policies', policies);
  const upstreams = namesIn(document, 'upstreams');
  yield* undefinedNames(document, 'listeners', 'upstream', 'upstreams', upstreams);
  for (const [at, routes] of nested(document, 'listeners', 'routes')) {
    for (const fault of undefinedNames({ routes }, 'routes', 'upstream', 'upstreams', upstreams))
      yield { ...fault, path: [...at, Number(fault.path[1]), ...fault.path.slice(2)] };
  }
  const certificates = namesIn(document, 'certificates');
  for (const [at, tls] of nested(document, 'upstreams', 'tls')) {
    for (const [key, target, names] of [
      ['certificate', 'certificates', certificates],
      ['policy', 'policies', policies],
    ] as const) {
      for (const fault of undefinedNames({ all: { tls } }, 'all', key, target, names))
        yield { ...fault, path: [...at, ...fault.path.slice(2)] };
    }
  }
}

/** What `section.*.key` names although `target` does not define it. */
function* undefinedNames(
  document: unknown,
  section: string,
  key: string,
  target: string,
  names: readonly string[],
): Generator<PlacedFault> {
  // A listener may name every one of ten thousand certificates.
  const defined = new Set(names);
  let suggestions = 0;
  for (const [path, name] of texts(document, section, key)) {
    if (defined.has(name)) continue;
    const suggestion = suggestions < suggestionsMax ? suggest(name, names) : undefined;
    suggestions += 1;
    yield {
      path,
      code: 'config_reference',
      expected:
        names.length === 0
          ? `one of the ${target}; none is defined`
          : `one of the ${target}: ${names.slice(0, 20).join(', ')}`,
      ...(suggestion === undefined ? {} : { hint: `did you mean "${suggestion}"?` }),
    };
  }
}

/** Each compares with every name there is, and when thousands are wrong it is for one reason. */
const suggestionsMax = 10;

/** A list that says the same twice is a mistake: the second was meant to be something else. */
function* repeatedNames(document: unknown): Generator<PlacedFault> {
  const lists = [
    ['certificates', 'tokens'],
    ['listeners', 'certificates'],
    ['listeners', 'alpn'],
    ['upstreams', 'servers'],
    ['policies', 'groups'],
    ['policies', 'cipherSuites'],
    ['policies', 'signatureSchemes'],
  ] as const;
  for (const [section, key] of lists) {
    const seen = new Set<string>();
    for (const [path, text] of texts(document, section, key)) {
      const identity = JSON.stringify([path[1], text]);
      if (seen.has(identity)) yield { path, code: 'config_conflict', expected: 'each entry once' };
      seen.add(identity);
    }
  }
}

function* builtInNames(document: unknown): Generator<PlacedFault> {
  for (const { name } of builtInPolicies) {
    if (!namesIn(document, 'policies').includes(name)) continue;
    yield {
      path: ['policies', name],
      at: 'key',
      code: 'config_conflict',
      expected: 'another name: this policy is built in',
      hint: `give it a name of its own, such as ${name}-2`,
    };
  }
}

/** Ports of one address family that are taken. */
interface Taken {
  readonly first: Path;
  /** Where every address of the family is taken. */
  wildcard?: Path;
  readonly byHost: Map<string, Path>;
}

/** The kernel refuses an address beside its wildcard too; `[::]` is IPv6 and nothing else (process.rs). */
function* sharedBinds(document: unknown): Generator<PlacedFault> {
  const taken = new Map<string, Taken>();
  for (const [path, { host, port }] of boundAddresses(document)) {
    const family = `${isIPv6(host) ? 'IPv6' : 'IPv4'} ${port}`;
    const isWildcard = host === '0.0.0.0' || host === '::';
    const others = taken.get(family);
    const conflictsWith = others?.byHost.get(host) ?? others?.wildcard ?? (isWildcard ? others?.first : undefined);
    if (conflictsWith !== undefined)
      yield { path, code: 'config_conflict', expected: 'an address that nothing else binds', conflictsWith };
    const now = others ?? { first: path, byHost: new Map<string, Path>() };
    now.byHost.set(host, path);
    if (isWildcard) now.wildcard = path;
    taken.set(family, now);
  }
}

/** Without those that take any free port: it is another one each time. */
function* boundAddresses(document: unknown): Generator<[Path, TcpAddress]> {
  for (const [path, text] of texts(document, 'listeners', 'bind')) {
    const parsed = parseBindAddress(text);
    if ('value' in parsed && parsed.value.port !== 0) yield [path, parsed.value];
  }
  const admin = adminAddress(document);
  if (admin !== undefined && 'port' in admin && admin.port !== 0) yield [['admin', 'listen'], admin];
}

/** Whoever reaches the admin server can drain keygate: from other hosts nobody does without proof of who they are. */
function* openAdmin(document: unknown): Generator<PlacedFault> {
  const listen = adminAddress(document);
  const { token, tls } = mapping(mapping(document)['admin']);
  if (listen === undefined || isLocal(listen)) return;
  if (token !== undefined || mapping(tls)['clientCertificates'] !== undefined) return;
  yield {
    path: ['admin', 'listen'],
    code: 'config_conflict',
    expected:
      'a loopback address such as 127.0.0.1:9180 or unix:/path, or beside it admin.token or admin.tls.clientCertificates',
    hint: 'without either, everybody who can connect could drain keygate: require a bearer token, `token: { file: PATH }`, or certificates of clients, `tls: { chain: PATH, key: PATH, clientCertificates: PATH }`',
  };
}

function adminAddress(document: unknown): TcpAddress | UnixAddress | undefined {
  const { listen } = mapping(mapping(document)['admin']);
  const parsed = typeof listen === 'string' ? parseAdminAddress(listen) : undefined;
  return parsed !== undefined && 'value' in parsed ? parsed.value : undefined;
}

/** Mappings and lists at `section.*.key`, with where they stand. */
function* nested(document: unknown, section: string, key: string): Generator<[Path, object]> {
  for (const [name, entry] of Object.entries(mapping(mapping(document)[section]))) {
    const value = mapping(entry)[key];
    if (typeof value === 'object' && value !== null) yield [[section, name, key], value];
  }
}

/** A mode says on which sides TLS is spoken, and so must its upstreams. */
function* misplacedTls(document: unknown): Generator<PlacedFault> {
  const upstreams = mapping(mapping(document)['upstreams']);
  for (const [path, listener, target] of targets(document)) {
    const { mode = 'offload' } = listener;
    if (!listenerModes.some((known) => known === mode) || !(target in upstreams)) continue;
    const wantsTls = mode === 'encrypt' || mode === 'bridge';
    const hasTls = mapping(upstreams[target])['tls'] !== undefined;
    if (hasTls === wantsTls) continue;
    const expected = wantsTls ? 'an upstream with `tls`' : 'an upstream without `tls`';
    yield { path, code: 'config_conflict', expected: `${expected}, as mode ${String(mode)} says` };
  }
}

/** Every upstream that a listener names, with the listener. */
function* targets(document: unknown): Generator<[Path, Readonly<Record<string, unknown>>, string]> {
  for (const [name, entry] of Object.entries(mapping(mapping(document)['listeners']))) {
    const listener = mapping(entry);
    const { upstream, routes } = listener;
    if (typeof upstream === 'string') yield [['listeners', name, 'upstream'], listener, upstream];
    if (!Array.isArray(routes)) continue;
    for (const [index, route] of routes.entries()) {
      const target = mapping(route)['upstream'];
      if (typeof target === 'string') yield [['listeners', name, 'routes', index, 'upstream'], listener, target];
    }
  }
}

/** An anchor that keeps the login, a lane, and one that keys are looked for in: less is no worker's life. */
function* scarceSessions(document: unknown): Generator<PlacedFault> {
  const { workers, tokens } = mapping(document);
  const count = typeof workers === 'number' ? workers : availableParallelism();
  for (const [name, token] of Object.entries(mapping(tokens))) {
    const { sessions } = mapping(token);
    if (typeof sessions !== 'number' || sessions >= 3 * count) continue;
    yield {
      path: ['tokens', name, 'sessions'],
      code: 'config_conflict',
      expected: `at least ${3 * count}: 3 for each of ${count} workers`,
      hint: 'allow keygate more sessions of the token, or run fewer `workers`',
    };
  }
}

/** What an upstream wants checked needs a section that says how, and DANE a name and a port to ask for. */
function* uncheckable(document: unknown): Generator<PlacedFault> {
  for (const [at, tls] of nested(document, 'upstreams', 'tls')) {
    const { dane, transparency, name } = mapping(tls);
    for (const [key, mode, section] of [
      ['dane', dane, 'dns'],
      ['transparency', transparency, 'transparency'],
    ] as const) {
      if ((mode !== 'report' && mode !== 'enforce') || mapping(document)[section] !== undefined) continue;
      yield {
        path: [...at, key],
        code: 'config_reference',
        expected: `off, or a section \`${section}\` at the top of the file`,
      };
    }
    if (dane !== 'report' && dane !== 'enforce') continue;
    for (const [path, text] of texts(document, 'upstreams', 'servers')) {
      const parsed = parseServerAddress(text);
      if (path[1] !== at[1] || 'fault' in parsed) continue;
      const host = 'host' in parsed.value ? parsed.value.host : undefined;
      const asked = host !== undefined && typeof name === 'string' ? name : host;
      if (asked !== undefined && isIP(asked) === 0) continue;
      const expected =
        host === undefined
          ? 'a server with a port: TLSA records are about one'
          : 'a DNS name, here or in `tls.name`: addresses have no TLSA records';
      yield { path, code: 'config_conflict', expected, conflictsWith: [...at, 'dane'] };
    }
  }
}

/** What is said of TLS where none ends would be believed to hold. Both have a default, so only here it is known who said it. */
function* idle(document: unknown): Generator<PlacedFault> {
  for (const [name, listener] of Object.entries(mapping(mapping(document)['listeners']))) {
    const { mode } = mapping(listener);
    if (mode !== 'encrypt' && mode !== 'passthrough') continue;
    for (const key of ['policy', 'unknownName']) {
      if (mapping(listener)[key] === undefined) continue;
      const path = ['listeners', name, key];
      yield { path, code: 'config_conflict', expected: `none: mode ${mode} ends no TLS` };
    }
  }
}

/** Routes by client need to know who the client is. */
function* unknowable(document: unknown): Generator<PlacedFault> {
  const policies = mapping(mapping(document)['policies']);
  for (const [at, routes] of nested(document, 'listeners', 'routes')) {
    const listener = mapping(mapping(mapping(document)['listeners'])[at[1] ?? '']);
    if (listener['clientCertificates'] !== undefined || asksClients(listener['policy'], policies)) continue;
    for (const [index, entry] of Object.entries(routes)) {
      if (mapping(entry)['clients'] === undefined) continue;
      const expected = 'clientCertificates at the listener or its policy: nobody else is known by a certificate';
      yield { path: [...at, Number(index), 'clients'], code: 'config_conflict', expected };
    }
  }
}

/** A policy, or one that it is made from. */
function asksClients(policy: unknown, policies: Readonly<Record<string, unknown>>): boolean {
  const seen = new Set<unknown>();
  for (let name = policy; typeof name === 'string' && !seen.has(name);) {
    seen.add(name);
    const { base, clientCertificates } = mapping(policies[name]);
    if (clientCertificates !== undefined) return true;
    name = base;
  }
  return false;
}

/** `original` is what the kernel knows of a redirected client; a client of any other listener wanted to come to us. */
function* destinationless(document: unknown): Generator<PlacedFault> {
  const servers = [...texts(document, 'upstreams', 'servers')];
  const originals = new Set(servers.flatMap(([[, name], server]) => (server === 'original' ? [name] : [])));
  for (const [path, listener, name] of targets(document)) {
    if (!originals.has(name) || listener['transparent'] === true) continue;
    yield {
      path,
      code: 'config_conflict',
      expected: 'another upstream, or transparent: true',
      hint: `the server of ${name} is the original destination of redirected clients`,
    };
  }
}

function namesIn(document: unknown, section: string): string[] {
  return Object.keys(mapping(mapping(document)[section]));
}

/** Every text at `section.*.key`, or in the list that stands there. */
function* texts(document: unknown, section: string, key: string): Generator<[Path, string]> {
  for (const [name, entry] of Object.entries(mapping(mapping(document)[section]))) {
    const value = mapping(entry)[key];
    if (typeof value === 'string') yield [[section, name, key], value];
    if (!Array.isArray(value)) continue;
    for (const [index, item] of value.entries())
      if (typeof item === 'string') yield [[section, name, key, index], item];
  }
}

function mapping(value: unknown): Readonly<Record<string, unknown>> {
  return typeof value === 'object' && value !== null && !Array.isArray(value) ? (value as Record<string, unknown>) : {};
}
