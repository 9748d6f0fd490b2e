/**
 * Owns: turning a configuration and what was proved of it into the engine's settings.
 * Must not know: PKCS#11 calls, the primary.
 * Runs: main thread of a worker, once per start and per reload.
 */
import { availableParallelism } from 'node:os';
import { formatAddress } from '../config/address.ts';
import type {
  ClientsConfig,
  ClientStatusConfig,
  Config,
  LimitsConfig,
  ListenerConfig,
  LogConfig,
  PolicyConfig,
  TokenConfig,
  UpstreamConfig,
  UpstreamTlsConfig,
  VerifyRate,
} from '../config/config.ts';
import { readPin } from '../config/pin.ts';
import { clientCertificatesOf, versionsOf } from '../config/policies.ts';
import type {
  CertificateSettings,
  ClientCertificateSettings,
  ClientsSettings,
  EngineSettings,
  KeyPlace,
  ListenerSettings,
  PolicySettings,
  TokenSettings,
  UpstreamSettings,
  UpstreamTlsSettings,
} from '../engine/native.d.ts';
import { ConfigError, ServiceError } from '../errors.ts';
import type { Log } from '../log.ts';
import type { KeyInToken, ProvedCertificate, ProvedPlan, ProvedToken } from '../pkcs11/plan.ts';
import { policyOf, unusableCertificates } from './effective-policy.ts';
import { readRevocationLists } from './revocation-lists.ts';
import { readRoots } from './roots.ts';
import { ticketEpoch } from './ticket-watch.ts';
import { readTransparencyLogs } from './transparency-logs.ts';
import { resolveUpstream } from './upstream-names.ts';

/** A listening socket to accept from. */
interface WorkerSocket {
  readonly listener: string;
  /** File descriptor in this process. */
  readonly fd: number;
}

/**
 * Servers without an address are left out with a warning. What DNS says of them is left to tlsa-watch.ts. Reads every PIN once more; the engine keeps them to log in
 * again, and wipes the buffers.
 * @throws ServiceError `upstream_unresolved`, or `engine_failed` for a number that the engine has no room for; TokenError
 * when a PIN's source has gone; ConfigError for a certificate that its policy lets sign nothing
 */
export async function engineSettings(
  config: Config,
  proved: ProvedPlan,
  sockets: readonly WorkerSocket[],
  log: Pick<Log, 'warn'>,
): Promise<EngineSettings> {
  const keys = new Map(proved.certificates.map(({ name, keyAlgorithm }) => [name, keyAlgorithm]));
  const [unusable, ...others] = unusableCertificates(config, keys);
  if (unusable !== undefined) throw new ConfigError([unusable, ...others]);
  const upstreams = await Promise.all(
    Object.values(config.upstreams).map((upstream) => upstreamSettings(upstream, config, log)),
  );
  const settings: EngineSettings = {
    tokens: proved.tokens.flatMap((found) => {
      const token = config.tokens[found.name];
      return token === undefined ? [] : [tokenSettings(token, config, found)];
    }),
    certificates: proved.certificates.map(certificateSettings),
    upstreams,
    listeners: Object.values(config.listeners).map((listener) => listenerSettings(listener, config, sockets)),
    ...ticketKeySettings(config, proved),
    ...accessSettings(config.log),
    ...transparencySettings(config, log),
  };
  assertNumbersFit(settings);
  return settings;
}

function ticketKeySettings(
  { tickets: { rotationMs } }: Config,
  { ticketKey }: ProvedPlan,
): Pick<EngineSettings, 'ticketKey'> {
  if (ticketKey.length === 0) return {};
  return { ticketKey: { places: ticketKey.map(keyPlace), rotationMs, epoch: ticketEpoch(rotationMs) } };
}

function accessSettings({ access }: LogConfig): Pick<EngineSettings, 'access'> {
  if (access === undefined) return {};
  const { sample, rate, failures } = access;
  return { access: { sample, rate, failuresAlways: failures === 'always' } };
}

function transparencySettings(
  { transparency, upstreams }: Config,
  log: Pick<Log, 'warn'>,
): Pick<EngineSettings, 'transparency'> {
  const isWanted = Object.values(upstreams).some(({ tls }) => tls !== undefined && tls.transparency !== 'off');
  if (!isWanted || transparency === undefined) return {};
  const { logs, warnings } = readTransparencyLogs(transparency);
  for (const warning of warnings) log.warn({ event: 'transparency_logs_old' }, warning);
  return { transparency: { logs: [...logs], scts: transparency.scts, operators: transparency.operators } };
}

const u32Max = 0xffff_ffff;

/**
 * Every number that crosses the border is an u32 there, and Node-API wraps what does not fit instead of refusing it: a
 * lifetime of 50 days would be one of 7 hours.
 * @throws ServiceError `engine_failed`, naming the setting
 */
export function assertNumbersFit(value: unknown, place = 'settings'): void {
  if (typeof value === 'number' && (!Number.isInteger(value) || value < 0 || value > u32Max)) {
    throw new ServiceError('engine_failed', `${place}: found ${value}, expected a whole number from 0 to ${u32Max}`, {
      hint: 'a defect: the configuration must refuse it first; make the value smaller until that is mended',
    });
  }
  if (typeof value !== 'object' || value === null || Buffer.isBuffer(value)) return;
  for (const [key, member] of Object.entries(value)) {
    assertNumbersFit(member, Array.isArray(value) ? `${place}[${key}]` : `${place}.${key}`);
  }
}

function tokenSettings(token: TokenConfig, config: Config, { label, serial, isAway }: ProvedToken): TokenSettings {
  const { manufacturer, model } = token.uri;
  return {
    name: token.name,
    module: token.module,
    label,
    ...(serial === undefined ? {} : { serial }),
    ...(manufacturer === undefined ? {} : { manufacturer }),
    ...(model === undefined ? {} : { model }),
    away: isAway,
    pin: readPin(token.pin, `tokens.${token.name}.pin`),
    ...lanesOf(token, config),
    weight: token.weight,
    queueMax: token.queue.max,
    queueAgeMs: token.queue.ageMs,
    signDeadlineMs: token.signDeadlineMs,
    loginLockWaitMs: token.loginLockWaitMs,
    isolate: token.isolate,
    verifyRsaEvery: everyNth(token.verify.rsa),
    verifyEcEvery: everyNth(token.verify.ec),
  };
}

/** What a worker may have of a token's sessions. One keeps the login, and in one keys are looked for. */
export function lanesOf(
  { lanes, sessions }: Pick<TokenConfig, 'lanes' | 'sessions'>,
  { workers }: Pick<Config, 'workers'>,
): Pick<TokenSettings, 'lanes' | 'threadsMax'> {
  const withSpares = 2 * lanes;
  if (sessions === undefined) return { lanes, threadsMax: withSpares };
  const count = workers === 'auto' ? availableParallelism() : workers;
  const share = Math.max(1, Math.floor(sessions / count) - 2);
  return { lanes: Math.min(lanes, share), threadsMax: Math.min(withSpares, share) };
}

function everyNth(rate: VerifyRate): number {
  return rate === 'always' ? 1 : rate;
}

function certificateSettings(certificate: ProvedCertificate): CertificateSettings {
  return {
    name: certificate.name,
    names: [...certificate.names],
    chain: [...certificate.chainDer],
    publicKey: certificate.spki,
    keys: certificate.perToken.map(keyPlace),
  };
}

function keyPlace({ token, keyId, keyLabel }: KeyInToken): KeyPlace {
  return {
    token,
    ...(keyId === undefined ? {} : { id: keyId }),
    ...(keyLabel === '' ? {} : { label: keyLabel }),
  };
}

async function upstreamSettings(
  upstream: UpstreamConfig,
  config: Config,
  log: Pick<Log, 'warn'>,
): Promise<UpstreamSettings> {
  const { servers, hosts, warnings, error } = await resolveUpstream(upstream);
  if (error !== undefined) throw error;
  for (const warning of warnings) log.warn({ event: 'upstream_unresolved', upstream: upstream.name }, warning);
  return {
    name: upstream.name,
    servers: servers.map(formatAddress),
    balance: upstream.balance,
    transparent: upstream.transparent,
    connectDeadlineMs: upstream.connectDeadlineMs,
    connectAttemptsMax: upstream.attempts,
    ...(upstream.proxyProtocol === undefined ? {} : { proxyProtocol: upstream.proxyProtocol }),
    proxyClientCertificate: upstream.proxyClientCertificate,
    slowStartMs: upstream.slowStartMs,
    ...(upstream.health === undefined ? {} : { health: upstream.health }),
    passiveFailuresMax: upstream.passive.failures,
    passiveEjectionMs: upstream.passive.ejectionMs,
    ...(upstream.tls === undefined ? {} : { tls: upstreamTlsSettings(upstream.tls, hosts, config) }),
  };
}

function upstreamTlsSettings(
  tls: UpstreamTlsConfig,
  hosts: readonly (string | undefined)[],
  config: Config,
): UpstreamTlsSettings {
  return {
    // A socket without a name was refused with the configuration.
    names: hosts.map((host) => tls.name ?? host ?? ''),
    verification: {
      roots: readRoots(tls.roots, config.file),
      crls: readRevocationLists(tls.crls),
      pins: tls.pins.map((pin) => Buffer.from(pin, 'base64')),
      pkix: tls.verify,
      dane: tls.dane,
      tlsa: [],
      transparency: tls.transparency,
    },
    sendName: tls.sni,
    ...(tls.certificate === undefined ? {} : { certificate: tls.certificate }),
    alpn: [...tls.alpn],
    policy: policySettings(policyOf(tls.policy, config)),
    resume: tls.resume,
    deadlineMs: tls.deadlineMs,
  };
}

function listenerSettings(
  listener: ListenerConfig,
  config: Config,
  sockets: readonly WorkerSocket[],
): ListenerSettings {
  const { deadlines, limits, proxyProtocol } = listener;
  return {
    name: listener.name,
    front: fronts[listener.mode],
    certificates: [...listener.certificates],
    unknownName: listener.unknownName,
    alpn: [...listener.alpn],
    policy: policySettings(policyOf(listener.policy, config)),
    ...clientCertificateSettings(listener, config),
    routes: listener.routes.map(({ names, alpn, clients, upstream }) => ({
      names: [...names],
      alpn: [...alpn],
      ...(clients === undefined ? {} : { clients: clientsSettings(clients) }),
      ...(upstream === undefined ? {} : { upstream }),
    })),
    ...(listener.upstream === undefined ? {} : { upstream: listener.upstream }),
    handshakeDeadlineMs: deadlines.handshakeMs,
    idleDeadlineMs: deadlines.idleMs,
    halfClosedDeadlineMs: deadlines.halfClosedMs,
    lifetimeDeadlineMs: deadlines.lifetimeMs,
    ...(proxyProtocol === undefined
      ? {}
      : { proxyIn: { from: [...proxyProtocol.from], deadlineMs: proxyProtocol.deadlineMs } }),
    transparent: listener.transparent,
    connectionsMax: limits.connections,
    handshakesMax: limits.handshakes,
    ...perClient(limits.perClient),
    sockets: sockets.filter((socket) => socket.listener === listener.name).map(({ fd }) => fd),
  };
}

function perClient(limit: LimitsConfig['perClient']): Pick<ListenerSettings, 'perClient'> {
  if (limit === undefined) return {};
  const { rate, burst, ipv4Prefix: ipv4Bits, ipv6Prefix: ipv6Bits } = limit;
  return { perClient: { rate, burst, ipv4Bits, ipv6Bits } };
}

function clientCertificateSettings(
  listener: ListenerConfig,
  { policies, file }: Config,
): Pick<ListenerSettings, 'clientCertificates'> {
  const wanted = clientCertificatesOf(listener, policies);
  if (wanted === undefined || fronts[listener.mode] !== 'tls') return {};
  const nobody = { commonNames: [], dnsNames: [], uris: [], emails: [], keys: [] };
  return {
    clientCertificates: {
      required: wanted.mode === 'require',
      roots: readRoots(wanted.roots, file, 'clientCertificates.roots'),
      crls: readRevocationLists(wanted.crls, 'clientCertificates.crls'),
      allow: clientsSettings(wanted.allow ?? nobody),
      ...statusSettings(wanted.ocsp),
    },
  };
}

function statusSettings(ocsp: ClientStatusConfig | undefined): Pick<ClientCertificateSettings, 'status'> {
  if (ocsp === undefined) return {};
  const { mode, responder, timeoutMs: deadlineMs } = ocsp;
  return { status: { hard: mode === 'hard', deadlineMs, ...(responder === undefined ? {} : { responder }) } };
}

function clientsSettings({ commonNames, dnsNames, uris, emails, keys }: ClientsConfig): ClientsSettings {
  return {
    commonNames: [...commonNames],
    dnsNames: [...dnsNames],
    uris: [...uris],
    emails: [...emails],
    spki: keys.map((key) => Buffer.from(key, 'base64')),
  };
}

function policySettings(policy: PolicyConfig): PolicySettings {
  return {
    versions: versionsOf(policy),
    cipherSuites: [...policy.cipherSuites],
    groups: [...policy.groups],
    signatureSchemes: [...policy.signatureSchemes],
    cipherOrder: policy.cipherOrder,
    requireExtendedMasterSecret: policy.extendedMasterSecret === 'required',
    ...(policy.tickets ? { ticketLifetimeMs: policy.ticketLifetimeMs } : {}),
    fips: policy.fips,
  };
}

const fronts = { offload: 'tls', bridge: 'tls', encrypt: 'plain', passthrough: 'passthrough' } as const;
