/**
 * Owns: from a checked document to a `Config`: names with units, absolute paths, defaults that depend on other sections.
 * Must not know: YAML, positions; nothing here can fail.
 * Runs: at start, on the main thread.
 */
import type {
  AdminConfig,
  CertificateConfig,
  ClientCertificatesConfig,
  Config,
  DnsConfig,
  HealthConfig,
  ListenerConfig,
  LogConfig,
  PolicyConfig,
  OcspConfig,
  TicketsConfig,
  TokenConfig,
  UpstreamConfig,
  UpstreamTlsConfig,
} from './config.ts';
import { absolutePath } from './path.ts';
import type { Policy } from './policies.ts';
import { resolvePolicies } from './policy-faults.ts';
import type { ClientCertificatesDocument, Document } from './schema.ts';
import type { SecretPlace } from './secret.ts';

/** @param directory what relative paths are relative to. */
export function normalise(document: Document, file: string, directory: string): Config {
  const tokens = named(document.tokens, (name, token) => tokenConfig(name, token, directory));
  const policies = named(Object.fromEntries(resolvePolicies(document.policies)), (_, policy) =>
    policyConfig(policy, document.tickets.lifetime, directory),
  );
  return {
    file,
    workers: document.workers,
    user: document.user,
    group: document.group,
    drainDeadlineMs: document.drainDeadline,
    reloadDeadlineMs: document.reloadDeadline,
    log: logConfig(document.log, directory),
    admin: document.admin && adminConfig(document.admin, directory),
    sandbox: {
      enabled: document.sandbox.enabled,
      writable: document.sandbox.writable.map((path) => absolutePath(path, directory)),
    },
    tokens,
    certificates: named(document.certificates, (name, certificate) =>
      certificateConfig(name, certificate, directory, Object.keys(tokens)),
    ),
    policies,
    tickets: ticketsConfig(document.tickets, Object.keys(tokens)),
    dns: document.dns && dnsConfig(document.dns, directory),
    transparency: document.transparency && {
      ...document.transparency,
      logs: absolutePath(document.transparency.logs, directory),
    },
    upstreams: named(document.upstreams, (name, upstream) => upstreamConfig(name, upstream, directory)),
    ocsp: ocspConfig(document.ocsp, directory),
    listeners: named(document.listeners, (name, listener) => listenerConfig(name, listener, directory)),
  };
}

/** Without a prototype: names like `constructor` are as good as any. */
function named<From, To>(
  entries: Readonly<Record<string, From>>,
  convert: (name: string, entry: From) => To,
): Record<string, To> {
  const result = Object.create(null) as Record<string, To>;
  for (const [name, entry] of Object.entries(entries)) result[name] = convert(name, entry);
  return result;
}

function logConfig({ level, file, access, keyLog }: Document['log'], directory: string): LogConfig {
  const absolute = (path: string | undefined) => (path === undefined ? undefined : absolutePath(path, directory));
  return {
    level,
    file: absolute(file),
    access: access && { ...access, file: absolute(access.file) },
    keyLog: absolute(keyLog),
  };
}

function adminConfig({ listen, token, tls }: NonNullable<Document['admin']>, directory: string): AdminConfig {
  return {
    listen,
    token: token && secretPlace(token, directory),
    tls: tls && {
      chain: absolutePath(tls.chain, directory),
      key: absolutePath(tls.key, directory),
      clientCertificates: tls.clientCertificates && absolutePath(tls.clientCertificates, directory),
    },
  };
}

function tokenConfig(name: string, token: Document['tokens'][string], directory: string): TokenConfig {
  return {
    name,
    module: absolutePath(token.module, directory),
    uri: token.uri,
    pin: secretPlace(token.pin, directory),
    lanes: token.lanes,
    sessions: token.sessions,
    weight: token.weight,
    queue: { max: token.queue.max, ageMs: token.queue.age },
    signDeadlineMs: token.signDeadline,
    verify: token.verify,
    isolate: token.isolate,
    loginLockWaitMs: token.loginLockWait,
  };
}

function secretPlace({ file, env, credential }: Document['tokens'][string]['pin'], directory: string): SecretPlace {
  if (file !== undefined) return { file: absolutePath(file, directory) };
  if (env !== undefined) return { env };
  // The schema demands exactly one; an empty name would be refused when it is read.
  return { credential: credential ?? '' };
}

function certificateConfig(
  name: string,
  certificate: Document['certificates'][string],
  directory: string,
  allTokens: readonly string[],
): CertificateConfig {
  return {
    name,
    chain: absolutePath(certificate.chain, directory),
    key: certificate.key,
    tokens: certificate.tokens ?? allTokens,
    ocsp: certificate.ocsp,
  };
}

function ticketsConfig(
  { key, tokens, lifetime, rotation }: Document['tickets'],
  allTokens: readonly string[],
): TicketsConfig {
  return {
    key: key && { uri: key, tokens: tokens ?? allTokens },
    lifetimeMs: lifetime,
    rotationMs: rotation,
  };
}

function ocspConfig({ cache, proxy, nonce, timeout }: Document['ocsp'], directory: string): OcspConfig {
  return {
    cache: cache === undefined ? undefined : absolutePath(cache, directory),
    proxy,
    nonce,
    timeoutMs: timeout,
  };
}

function dnsConfig({ resolver, tls }: NonNullable<Document['dns']>, directory: string): DnsConfig {
  return { resolver, tls: tls && { name: tls.name, roots: rootsPath(tls.roots, directory) } };
}

/** Undefined: those of this host. */
function rootsPath(roots: string, directory: string): string | undefined {
  return roots === 'system' ? undefined : absolutePath(roots, directory);
}

function policyConfig(policy: Policy, ticketLifetimeMs: number, directory: string): PolicyConfig {
  const { clientCertificates } = policy;
  return {
    ...policy,
    ticketLifetimeMs: policy.ticketLifetimeMs ?? ticketLifetimeMs,
    clientCertificates: clientCertificates && clientCertificatesConfig(clientCertificates, directory),
  };
}

function clientCertificatesConfig(
  { mode, roots, crls, allow, ocsp }: ClientCertificatesDocument,
  directory: string,
): ClientCertificatesConfig {
  return {
    mode,
    roots: absolutePath(roots, directory),
    crls: crls.map((file) => absolutePath(file, directory)),
    allow,
    ocsp: ocsp && { mode: ocsp.mode, responder: ocsp.responder, timeoutMs: ocsp.timeout },
  };
}

function upstreamConfig(name: string, upstream: Document['upstreams'][string], directory: string): UpstreamConfig {
  return {
    name,
    servers: upstream.servers,
    balance: upstream.balance,
    proxyProtocol: upstream.proxyProtocol,
    proxyClientCertificate: upstream.proxyClientCertificate,
    slowStartMs: upstream.slowStart,
    transparent: upstream.transparent,
    connectDeadlineMs: upstream.connectDeadline,
    attempts: upstream.attempts,
    health: upstream.health && healthConfig(upstream.health),
    passive: { failures: upstream.passive.failures, ejectionMs: upstream.passive.ejection },
    tls: upstream.tls && upstreamTlsConfig(upstream.tls, directory),
  };
}

function upstreamTlsConfig(
  { name, roots, crls, certificate, deadline, ...same }: NonNullable<Document['upstreams'][string]['tls']>,
  directory: string,
): UpstreamTlsConfig {
  return {
    name,
    roots: rootsPath(roots, directory),
    crls: crls.map((file) => absolutePath(file, directory)),
    certificate,
    ...same,
    deadlineMs: deadline,
  };
}

function healthConfig({
  tcp,
  timeout,
  fall,
  rise,
}: NonNullable<Document['upstreams'][string]['health']>): HealthConfig {
  return { intervalMs: tcp, timeoutMs: timeout, fall, rise };
}

function listenerConfig(name: string, listener: Document['listeners'][string], directory: string): ListenerConfig {
  const {
    deadlines,
    limits,
    certificates = [],
    clientCertificates,
    routes,
    upstream,
    proxyProtocol,
    ...same
  } = listener;
  const { perClient } = limits;
  return {
    name,
    ...same,
    certificates,
    clientCertificates: clientCertificates && clientCertificatesConfig(clientCertificates, directory),
    upstream,
    routes: routes.map(({ names, alpn, clients, upstream: to }) => ({ names, alpn, clients, upstream: to })),
    proxyProtocol: proxyProtocol && { from: proxyProtocol.from, deadlineMs: proxyProtocol.deadline },
    deadlines: {
      handshakeMs: deadlines.handshake,
      idleMs: deadlines.idle,
      lifetimeMs: deadlines.lifetime,
      halfClosedMs: deadlines.halfClosed,
    },
    limits: { ...limits, perClient: perClient && { ...perClient, burst: perClient.burst ?? perClient.rate } },
  };
}
