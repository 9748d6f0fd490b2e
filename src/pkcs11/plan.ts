/**
 * Owns: proving that a configuration can be served: every chain, token, PIN and key of it, all looked at before
 * anything fails.
 * Must not know: the engine; of listeners and upstreams more than which certificates they name.
 * Runs: on the main thread of a worker when it starts, and of `keygate check`.
 *
 * Its PKCS#11 sessions are closed when it returns, and modules that nothing else in the process uses are finalised: the
 * engine begins afresh, which SoftHSM with a read-only token directory needs (C_GetTokenInfo fails there after a
 * login). When the engine uses them already, its sessions and its login stay as they are.
 */
import { realpathSync } from 'node:fs';
import { availableParallelism } from 'node:os';
import type { Module } from 'graphene-pk11';
import type { CertificateConfig, Config, TokenConfig } from '../config/config.ts';
import type { PinSource } from '../config/pin.ts';
import { formatPkcs11Uri } from '../config/pkcs11-uri.ts';
import type { Pkcs11Uri } from '../config/pkcs11-uri.ts';
import { ConfigError, formatProblem, KeygateError, TokenError } from '../errors.ts';
import type { ErrorCode } from '../errors.ts';
import type { KeyAlgorithm } from './algorithm.ts';
import { readChain } from './certificates.ts';
import type { CertificateChain, ChainReading, KnownIssuers, Purpose } from './certificates.ts';
import { failureReason, tokenFailure } from './failure.ts';
import { findSecretKey, formatKey, KeySearch, proveConfined, proveKey, proveTicketKey } from './keys.ts';
import type { OpenToken, TokenKey } from './keys.ts';
import { closeSession, findToken, login, openModule, openSession } from './module.ts';
import type { NativeModuleGuard, OpenModule } from './module.ts';

/** As much of the configuration as this looks at. */
export type PlanConfig = Pick<Config, 'workers' | 'tokens' | 'certificates' | 'tickets' | 'upstreams' | 'listeners'>;

export interface PlanTools {
  readonly guard: NativeModuleGuard;
  /** The buffer is zeroed after use; asked at most once per token. */
  readonly readPin: (source: PinSource, place: string) => Buffer;
}

/** What the engine may rely on. */
export interface ProvedPlan {
  readonly tokens: readonly ProvedToken[];
  readonly certificates: readonly ProvedCertificate[];
  /** Where the ticket key is, or is expected once a token is back. */
  readonly ticketKey: readonly KeyInToken[];
  readonly warnings: readonly string[];
}

export interface ProvedToken {
  /** Name in the configuration. */
  readonly name: string;
  /** As the token says them, without padding; of one that is away, as the configuration does. */
  readonly label: string;
  readonly serial: string | undefined;
  /** It is out of reach, altogether or for one of its keys: the engine waits for it, and proves its keys then. */
  readonly isAway: boolean;
}

export interface ProvedCertificate extends CertificateChain {
  readonly name: string;
  /** In the order of the configuration; at least one was found, the others are in tokens that are away. */
  readonly perToken: readonly ProvedKey[];
}

/** Where the private key is; found by id and label when a token is back or a module was initialised again. */
interface ProvedKey extends KeyInToken {
  /** SubjectPublicKeyInfo in DER, the same for every token of the certificate. */
  readonly spki: Buffer;
}

export interface KeyInToken {
  /** Name of the token in the configuration. */
  readonly token: string;
  /** CKA_ID; undefined when the key has none. */
  readonly keyId: Buffer | undefined;
  /** CKA_LABEL; may be empty. */
  readonly keyLabel: string;
}

/** One thing that was looked at. */
export interface Finding {
  readonly severity: 'ok' | 'warning' | 'error';
  /** `token hsm-a`, `certificate www`. */
  readonly subject: string;
  readonly message: string;
  /** Of an error only. */
  readonly error?: KeygateError;
}

export interface Examination {
  /** What can be served; undefined when an error stands in the way. */
  readonly plan: ProvedPlan | undefined;
  /** In the order of the configuration: tokens, then certificates. */
  readonly findings: readonly Finding[];
  /** Of the certificates whose chains can be used, also when no token has their keys. */
  readonly keyAlgorithms: ReadonlyMap<string, KeyAlgorithm>;
}

/**
 * Examines and insists.
 * A token that is out of reach is only a warning as long as every certificate has its key in another one, and is waited
 * for: a worker must be able to start while one of two tokens is down. A refused PIN or a wrong key is an error wherever it is.
 * @throws TokenError whose message has a line for every problem, a refused PIN first, because whoever starts workers
 * must stop at once; ConfigError when only certificate files are wrong.
 */
export function provePlan(config: PlanConfig, tools: PlanTools): ProvedPlan {
  const { plan, findings } = examinePlan(config, tools);
  if (plan !== undefined) return plan;
  throw combinedError(findings);
}

/** Looks at everything and does not throw for what it finds. Each token sees its PIN at most once. */
export function examinePlan(config: PlanConfig, tools: PlanTools): Examination {
  const tokens = Object.values(config.tokens).map((token): TokenState => ({
    config: token,
    keys: new Map(),
    warnings: [],
  }));
  const { key: ticketKey } = config.tickets;
  for (const token of tokens) {
    if (ticketKey?.tokens.includes(token.config.name) !== true) continue;
    token.ticketKey = { token, uri: ticketKey.uri, warnings: [] };
  }
  const now = new Date();
  const issuers: KnownIssuers = new Map();
  const purposesOf = purposesIn(config);
  const certificates = Object.values(config.certificates).map((certificate): CertificateState => ({
    config: certificate,
    reading: readChain(certificate, now, issuers, purposesOf(certificate.name)),
    keys: tokens
      .filter(({ config: { name } }) => certificate.tokens.includes(name))
      .map((token): KeyState => ({ shared: sharedKey(token, certificate.key) })),
  }));
  const modules: OpenModule[] = [];
  try {
    for (const group of groupByModule(tokens)) enterModule(group, modules, tools);
    // Without the login lock from here on: open sessions do not mind other logins, and RSA signatures take their time.
    for (const token of tokens) proveKeysConfined(token);
    for (const certificate of certificates) proveKeys(certificate);
    compareTicketKeys(tokens);
    for (const token of tokens) warnOfSessionLimit(token, config);
  } finally {
    for (const { open } of tokens) if (open !== undefined) closeSession(open.session);
    for (const module of modules) module.close();
  }
  return {
    plan: planOf(tokens, certificates),
    findings: [
      ...tokens.flatMap(tokenFindings),
      ...certificates.flatMap(certificateFindings),
      ...tokens.flatMap(ticketKeyFindings),
    ],
    keyAlgorithms: new Map(
      certificates.flatMap(({ config: { name }, reading: { chain } }) =>
        chain === undefined ? [] : [[name, chain.keyAlgorithm] as const],
      ),
    ),
  };
}

/** By certificate: what the configuration uses it for. One that nobody uses yet is taken for a server's. */
function purposesIn({ upstreams, listeners }: PlanConfig): (certificate: string) => readonly Purpose[] {
  const ofServers = new Set(Object.values(listeners).flatMap(({ certificates }) => certificates));
  const ofClients = new Set(Object.values(upstreams).map(({ tls }) => tls?.certificate));
  return (certificate) => {
    const isClients = ofClients.has(certificate);
    const isServers = ofServers.has(certificate) || !isClients;
    return [...(isServers ? (['server'] as const) : []), ...(isClients ? (['client'] as const) : [])];
  };
}

/** Filled in step by step; what has an error is left alone by the steps after. */
interface TokenState {
  readonly config: TokenConfig;
  open?: OpenToken;
  error?: KeygateError;
  /** Those that certificates want of it, by URI. */
  readonly keys: Map<string, SharedKey>;
  /** Where the configuration expects the ticket key in it. */
  ticketKey?: TicketKeyState;
  readonly warnings: string[];
}

interface TicketKeyState {
  readonly token: TokenState;
  readonly uri: Pkcs11Uri;
  key?: TokenKey;
  /** Tells it from other keys. */
  mac?: Buffer;
  error?: KeygateError;
  readonly warnings: string[];
}

interface CertificateState {
  readonly config: CertificateConfig;
  readonly reading: ChainReading;
  readonly keys: readonly KeyState[];
}

/** What a certificate has of a token. */
interface KeyState {
  readonly shared: SharedKey;
  proved?: boolean;
  error?: KeygateError;
}

/** What several certificates call by the same name is looked for and examined once: tokens are slow. */
interface SharedKey {
  readonly token: TokenState;
  readonly uri: Pkcs11Uri;
  key?: TokenKey;
  error?: KeygateError;
  readonly warnings: string[];
  /** By the public key that it was to belong to, in hex: what came of it; undefined is good. */
  readonly proofs: Map<string, KeygateError | undefined>;
}

function sharedKey(token: TokenState, uri: Pkcs11Uri): SharedKey {
  const name = formatPkcs11Uri(uri);
  const known = token.keys.get(name);
  if (known !== undefined) return known;
  const shared: SharedKey = { token, uri, warnings: [], proofs: new Map() };
  token.keys.set(name, shared);
  return shared;
}

/** Two names of one file are one module, with one C_Initialize and one login lock. */
function groupByModule(tokens: readonly TokenState[]): TokenState[][] {
  const groups = Map.groupBy(tokens, ({ config }) => {
    try {
      return realpathSync(config.module);
    } catch {
      return config.module;
    }
  });
  return [...groups.values()];
}

/** From C_Initialize until the keys are found, all under the login lock. */
function enterModule(group: readonly TokenState[], modules: OpenModule[], { guard, readPin }: PlanTools): void {
  const [first] = group;
  if (first === undefined) return;
  const { module: path, isolate } = first.config;
  const release = lockLogin(first, Math.max(...group.map(({ config }) => config.loginLockWaitMs)), guard);
  try {
    const opened = openModule(path, isolate, guard);
    modules.push(opened);
    const refused = new Map<string, KeygateError>();
    for (const state of group) attempt(state, () => enterToken(state, opened.module, refused, { guard, readPin }));
    for (const state of group) findKeys(state);
  } catch (error) {
    for (const state of group) state.error ??= asKeygateError(error, state);
  } finally {
    release?.();
  }
}

/** Going on without the lock is better than not starting: it keeps accidents away, and any local user can hold it. */
function lockLogin(
  { config, warnings }: TokenState,
  waitMs: number,
  guard: NativeModuleGuard,
): (() => void) | undefined {
  try {
    return guard.lockLogin(config.module, waitMs);
  } catch (error) {
    warnings.push(`token ${config.name}: logging in without the login lock: ${failureReason(error)}`);
    return undefined;
  }
}

/** @param refused logins by slot: a token that two names mean must not see a wrong PIN twice. */
function enterToken(
  state: TokenState,
  module: Module,
  refused: Map<string, KeygateError>,
  { guard, readPin }: PlanTools,
): void {
  const token = findToken(module, state.config.uri);
  const slot = token.slot.handle.toString('hex');
  const earlier = refused.get(slot);
  if (earlier !== undefined) throw earlier;
  const session = openSession(token);
  state.open = { session, token };
  try {
    const read = (): Buffer => readPin(state.config.pin, `tokens.${state.config.name}.pin`);
    state.warnings.push(...login(session, token, read, guard));
  } catch (error) {
    const failure = asKeygateError(error, state);
    refused.set(slot, failure);
    throw failure;
  }
}

function findKeys(state: TokenState): void {
  const { open, error, keys, ticketKey } = state;
  if (open === undefined || error !== undefined) return;
  if (ticketKey !== undefined) {
    attempt(ticketKey, () => {
      ticketKey.key = findSecretKey(open, ticketKey.uri);
    });
  }
  const search = new KeySearch(open);
  for (const shared of keys.values()) {
    attempt(shared, () => {
      shared.key = search.find(shared.uri);
    });
  }
}

function proveKeysConfined({ open, keys, ticketKey }: TokenState): void {
  if (ticketKey?.key !== undefined && open !== undefined) {
    const { key, warnings } = ticketKey;
    attempt(ticketKey, () => {
      warnings.push(...proveConfined(open, key));
      ticketKey.mac = proveTicketKey(open, key);
    });
  }
  for (const shared of keys.values()) {
    const { key, warnings } = shared;
    if (key === undefined || open === undefined) continue;
    attempt(shared, () => warnings.push(...proveConfined(open, key)));
  }
}

function proveKeys({ reading: { chain }, keys }: CertificateState): void {
  for (const state of keys) {
    const error = state.shared.error ?? (chain === undefined ? undefined : proofOf(state.shared, chain.spki));
    if (error !== undefined) state.error = error;
    // Without a chain there is nothing to belong to; its own problems are reported.
    else state.proved = state.shared.key !== undefined && chain !== undefined;
  }
}

/** Hosts whose tokens hold different keys would not resume each other's sessions, and nobody would notice. */
function compareTicketKeys(tokens: readonly TokenState[]): void {
  const [first, ...others] = tokens.flatMap(({ ticketKey }) => (ticketKey?.mac === undefined ? [] : [ticketKey]));
  for (const other of others) {
    if (first?.mac?.equals(other.mac ?? Buffer.alloc(0)) === true) continue;
    const names = [first, other].map((state) => state?.token.config.name).join(' and ');
    other.error = new TokenError('token_key_mismatch', `tokens ${names} hold different ticket keys`, {
      token: other.token.config.name,
      hint: 'copy one key to both by the means of the HSM, or name the tokens that hold the same one in `tickets.tokens`',
    });
  }
}

/** @returns why the key does not belong to the certificate; undefined also when there is no key. */
function proofOf({ token, key, proofs }: SharedKey, spki: Buffer): KeygateError | undefined {
  const { open } = token;
  if (key === undefined || open === undefined) return undefined;
  const owner = spki.toString('hex');
  if (!proofs.has(owner)) {
    const proof: { error?: KeygateError; readonly token: TokenState } = { token };
    attempt(proof, () => proveKey(open, key, spki));
    proofs.set(owner, proof.error);
  }
  return proofs.get(owner);
}

function warnOfSessionLimit(
  { config: { name, lanes, sessions }, open, warnings }: TokenState,
  { workers }: PlanConfig,
): void {
  const max = open?.token.sessions.max;
  const count = workers === 'auto' ? availableParallelism() : workers;
  // Beside its lanes each worker holds one session that keeps the login alive.
  const wanted = Math.min(count * (lanes + 1), sessions ?? Number.POSITIVE_INFINITY);
  if (max !== undefined && wanted > max) {
    warnings.push(
      `token ${name}: ${count} workers with ${lanes} lanes want ${wanted} sessions, the token allows ${max}`,
    );
  }
}

/** Keeps what a step throws. */
function attempt(state: TokenState | Pick<SharedKey, 'token' | 'error'>, step: () => void): void {
  try {
    step();
  } catch (error) {
    state.error = asKeygateError(error, 'token' in state ? state.token : state);
  }
}

function asKeygateError(error: unknown, { config }: TokenState): KeygateError {
  return error instanceof KeygateError ? error : tokenFailure(error, config.name, 'examining it');
}

function planOf(tokens: readonly TokenState[], certificates: readonly CertificateState[]): ProvedPlan | undefined {
  const shared = tokens.flatMap(({ keys }) => [...keys.values()]);
  const ticketKeys = tokens.flatMap(({ ticketKey }) => ticketKey ?? []);
  const keys = certificates.flatMap((certificate) => certificate.keys);
  const states = [
    ...tokens.map((token) => ({ token, error: token.error })),
    ...ticketKeys,
    ...keys.map(({ shared: { token }, error }) => ({ token, error })),
  ];
  const errors = states.flatMap(({ token, error }) => (error === undefined ? [] : [{ token, error }]));
  if (!errors.every(({ error }) => isOutOfReach(error))) return undefined;
  const proved = certificates.flatMap(provedCertificate);
  if (proved.length < certificates.length) return undefined;
  // With what is wrong with it first of all.
  const away = new Map(errors.toReversed().map(({ token, error }) => [token, error]));
  const isUnreachable = ticketKeys.length > 0 && ticketKeys.every(({ mac }) => mac === undefined);
  return {
    tokens: tokens.map((token) => {
      const { name, uri } = token.config;
      const { label = uri.token ?? '', serial = uri.serial } = token.open?.token ?? {};
      return { name, label, serial, isAway: away.has(token) };
    }),
    certificates: proved,
    ticketKey: ticketKeys.map(keyInToken),
    warnings: [
      ...certificates.flatMap(({ config: { name }, reading }) =>
        reading.warnings.map((warning) => `certificate ${name}: ${warning}`),
      ),
      ...[...tokens, ...shared, ...ticketKeys].flatMap(({ warnings }) => warnings),
      ...tokens.flatMap((token) => {
        const error = away.get(token);
        return error === undefined ? [] : [`token ${token.config.name} is used once it is back: ${error.message}`];
      }),
      // A worker that came back must not want more than one that is running.
      ...(isUnreachable
        ? [
            'no token with the ticket key is in reach: tickets are of random keys, good for this keygate alone, until one is',
          ]
        : []),
    ],
  };
}

function keyInToken({ token, uri, key }: Pick<TicketKeyState, 'token' | 'uri' | 'key'>): KeyInToken {
  return { token: token.config.name, ...(key === undefined ? expectedNames(uri) : namesOf(key)) };
}

/** Of a key that could not be looked at. */
function expectedNames({ id, object = '' }: Pkcs11Uri): Pick<KeyInToken, 'keyId' | 'keyLabel'> {
  return { keyId: id === undefined ? undefined : Buffer.from(id, 'hex'), keyLabel: object };
}

function namesOf({ id, label }: TokenKey): Pick<KeyInToken, 'keyId' | 'keyLabel'> {
  return { keyId: id.length === 0 ? undefined : id, keyLabel: label };
}

/** Empty when the chain is wrong or no token has the key. */
function provedCertificate({
  config: { name, tokens },
  reading: { chain },
  keys,
}: CertificateState): ProvedCertificate[] {
  if (chain === undefined || !keys.some(({ proved }) => proved === true)) return [];
  const perToken = tokens.flatMap((token) => {
    const state = keys.find(({ shared }) => shared.token.config.name === token);
    return state === undefined ? [] : [{ ...keyInToken(state.shared), spki: chain.spki }];
  });
  return [{ ...chain, name, perToken }];
}

/** What may pass by itself, as opposed to what a person must correct. */
function isOutOfReach(error: KeygateError): boolean {
  return outOfReachCodes.has(error.code);
}

const outOfReachCodes: ReadonlySet<ErrorCode> = new Set(['token_module', 'token_not_found', 'token_operation']);

function tokenFindings({ config: { name }, open, error, warnings }: TokenState): Finding[] {
  const subject = `token ${name}`;
  if (error !== undefined || open === undefined)
    return [...warningFindings(subject, warnings), ...errorFinding(subject, error)];
  const { label, serial, model } = open.token;
  return [
    { severity: 'ok', subject, message: `"${label}" (serial ${serial}, ${model}): logged in` },
    ...warningFindings(subject, warnings),
  ];
}

function certificateFindings({ config: { name }, reading, keys }: CertificateState): Finding[] {
  const subject = `certificate ${name}`;
  const { chain, problems, warnings } = reading;
  return [
    ...(chain === undefined ? [] : [{ severity: 'ok' as const, subject, message: describeChain(chain) }]),
    ...problems.map((problem) => ({
      severity: 'error' as const,
      subject,
      message: formatProblem(problem),
      error: new ConfigError([problem]),
    })),
    ...warningFindings(subject, warnings),
    ...keys.flatMap((state) => keyFindings(subject, state)),
  ];
}

function keyFindings(subject: string, { shared: { token, key, warnings }, proved, error }: KeyState): Finding[] {
  if (error !== undefined) return [...warningFindings(subject, warnings), ...errorFinding(subject, error)];
  // The token's own error says why nothing is known about its keys.
  if (key === undefined) return [];
  const belongs = proved === true ? ', belongs to the certificate' : '';
  return [
    {
      severity: 'ok',
      subject,
      message: `key ${formatKey(key)} in token ${token.config.name}: cannot leave it${belongs}`,
    },
    ...warningFindings(subject, warnings),
  ];
}

function ticketKeyFindings({ config: { name }, ticketKey }: TokenState): Finding[] {
  if (ticketKey === undefined) return [];
  const { key, mac, warnings, error } = ticketKey;
  const message = `key ${key === undefined ? '' : formatKey(key)} in token ${name}: cannot leave it, derives ticket keys`;
  return [
    ...(mac === undefined || error !== undefined ? [] : [{ severity: 'ok' as const, subject: 'tickets', message }]),
    ...warningFindings('tickets', warnings),
    ...errorFinding('tickets', error),
  ];
}

function describeChain({ keyAlgorithm, chainDer, names, notAfter }: CertificateChain): string {
  return `${keyAlgorithm}, ${chainDer.length} in chain, until ${notAfter.toISOString().slice(0, 10)}, for ${names.join(' ') || 'no name'}`;
}

function warningFindings(subject: string, warnings: readonly string[]): Finding[] {
  return warnings.map((message) => ({ severity: 'warning', subject, message }));
}

function errorFinding(subject: string, error: KeygateError | undefined): Finding[] {
  return error === undefined ? [] : [{ severity: 'error', subject, message: error.message, error }];
}

/** A line for every error, each with the name in the configuration that it is about: several may share a key. */
function combinedError(findings: readonly Finding[]): KeygateError {
  const errors = findings.flatMap(({ subject, error }) => (error === undefined ? [] : [{ subject, error }]));
  errors.sort((a, b) => urgency(a.error) - urgency(b.error));
  const first = errors[0]?.error;
  if (first === undefined) throw new Error('invariant: a plan is missing without an error');
  if (first instanceof ConfigError) {
    const [problem, ...rest] = errors.flatMap(({ error }) => (error instanceof ConfigError ? error.problems : []));
    return problem === undefined ? first : new ConfigError([problem, ...rest]);
  }
  const { token, ckr } = first instanceof TokenError ? first : {};
  const lines = errors.map(({ subject, error }) =>
    error instanceof ConfigError ? error.message : `${subject}: ${error.message}`,
  );
  return new TokenError(first.code, lines.join('\n'), {
    ...(token === undefined ? {} : { token }),
    ...(ckr === undefined ? {} : { ckr }),
    ...(first.hint === undefined ? {} : { hint: first.hint }),
  });
}

function urgency(error: KeygateError): number {
  if (error.code === 'token_login' || error.code === 'token_pin_locked') return 0;
  return error instanceof ConfigError ? 2 : 1;
}
