/**
 * Owns: the configuration that is served, and replacing it by what the file says now: all of it, or nothing.
 * Must not know: how workers prepare and commit, HTTP, signals.
 * Runs: main thread of the primary.
 *
 * ```text
 * read and check the file ──> open new sockets ──> every worker prepares aside ──> every worker commits ──> close old sockets
 *          └─── refused ───────────┘                         └── rolled back: all discard, nothing has changed
 * ```
 */
import { createHash, X509Certificate } from 'node:crypto';
import { readFileSync } from 'node:fs';
import { isDeepStrictEqual } from 'node:util';
import type { Config, LogConfig, TokenConfig } from '../config/config.ts';
import { fipsProblems } from '../config/fips.ts';
import { loadConfig } from '../config/load.ts';
import { isSoftHsm } from '../config/softhsm.ts';
import type { EngineBinding } from '../engine/binding.ts';
import { giveBackMemorySoon } from '../engine/memory.ts';
import { ConfigError, formatProblem, KeygateError } from '../errors.ts';
import type { ErrorCode, Problem } from '../errors.ts';
import type { Log } from '../log.ts';
import { closeSockets, openListeners, shutSockets } from './listeners.ts';
import type { ServiceManager } from './service-manager.ts';
import type { Stapler } from './stapler.ts';
import type { Workers } from './workers.ts';

export const reloadOutcomes = ['committed', 'refused', 'rolled_back'] as const;
/** `refused`: the file or what it asks for is wrong, and no worker heard of it. `rolled_back`: a worker could not serve it. */
export type ReloadOutcome = (typeof reloadOutcomes)[number];

export interface ReloadReport {
  readonly outcome: ReloadOutcome;
  readonly seconds: number;
  /** `certificates.www changed`; what it would have been, when it was rolled back. */
  readonly changes: readonly string[];
  /** Why not. */
  readonly reasons: readonly ReloadReason[];
}

interface ReloadReason {
  readonly code: ErrorCode;
  readonly message: string;
  readonly hint?: string;
  /** Slot of the worker that said so. */
  readonly worker?: number;
}

/** As far as the primary looks into a certificate. */
export interface CertificateFacts {
  readonly name: string;
  readonly notAfterMs: number;
  /** Of the file. */
  readonly fingerprint: string;
}

/** What a reload goes through; here only to be the same wherever it is needed. */
interface ReloadParts {
  readonly workers: Pick<Workers, 'listening' | 'prepare' | 'commit' | 'discard' | 'retire'>;
  readonly stapler: Pick<Stapler, 'follow'>;
  readonly native: EngineBinding;
  readonly serviceManager: Pick<ServiceManager, 'reloading' | 'reloaded'>;
  /** How many workers there are. */
  readonly slots: number;
  readonly log: Log;
  /** Reads the files of the admin server again; undefined when there is none. */
  readonly rereadAdmin: () => NextCredentials | undefined;
}

/** What the admin server would go by after a reload. */
export interface NextCredentials {
  readonly changes: readonly string[];
  commit(): void;
}

/** A log line and an answer that a person reads. */
const changesShownMax = 50;

export class Reloads {
  readonly #parts: ReloadParts;
  #config: Config;
  #certificates: readonly CertificateFacts[];
  #generation = 1;
  #since = new Date();
  /** A reload, or what must not meet one. */
  #underWay: Promise<unknown> | undefined;
  #wantedAgain = false;
  #last: (ReloadReport & { readonly at: Date }) | undefined;
  readonly #counts: Record<ReloadOutcome, number> = { committed: 0, refused: 0, rolled_back: 0 };
  readonly #onCommit: (config: Config) => void;

  /** @param onCommit is called with what is served from then on. */
  constructor(config: Config, parts: ReloadParts, onCommit: (config: Config) => void) {
    this.#config = config;
    this.#certificates = certificateFacts(config, []);
    this.#parts = parts;
    this.#onCommit = onCommit;
  }

  get config(): Config {
    return this.#config;
  }

  get certificates(): readonly CertificateFacts[] {
    return this.#certificates;
  }

  /** When what is served began to be served. */
  get since(): Date {
    return this.#since;
  }

  get counts(): Readonly<Record<ReloadOutcome, number>> {
    return this.#counts;
  }

  /** The last one that was tried. */
  get last(): (ReloadReport & { readonly at: Date }) | undefined {
    return this.#last;
  }

  get status() {
    return {
      file: this.#config.file,
      generation: this.#generation,
      hash: hashOf(this.#config),
      since: this.#since,
      lastReload: this.#last,
    };
  }

  /** Reads the file once more after the reload that is under way: it may have changed since that one read it. */
  request(): void {
    if (this.#underWay === undefined) void this.reload();
    else this.#wantedAgain = true;
  }

  /** Does not throw: what is wrong is in the report and in one line of the log. Refused at once while another is under way. */
  async reload(): Promise<ReloadReport> {
    if (this.#underWay !== undefined) return busyReport;
    const began = performance.now();
    this.#parts.serviceManager.reloading();
    return this.#alone(async () => {
      const report = { ...(await this.#try()), seconds: Math.round(performance.now() - began) / 1000 };
      this.#conclude(report);
      return report;
    });
  }

  /** Does what no reload may be under way for; undefined: one is, or something else of the kind. */
  async without<T>(work: () => Promise<T>): Promise<T | undefined> {
    return this.#underWay === undefined ? this.#alone(work) : undefined;
  }

  async #alone<T>(work: () => Promise<T>): Promise<T> {
    const done = work();
    this.#underWay = done;
    try {
      return await done;
    } finally {
      this.#underWay = undefined;
      if (this.#wantedAgain) {
        this.#wantedAgain = false;
        this.request();
      }
    }
  }

  async #try(): Promise<Omit<ReloadReport, 'seconds'>> {
    const { workers, stapler, native, slots, rereadAdmin } = this.#parts;
    let next: Config;
    let admin;
    let listeners;
    try {
      next = loadConfig(this.#config.file);
      const [first, ...others] = [...restartProblems(this.#config, next), ...fipsProblems(next, () => native.isFips())];
      if (first !== undefined) throw new ConfigError([first, ...others]);
      admin = rereadAdmin();
      listeners = openListeners(workers.listening, next, slots, native);
    } catch (error) {
      return { outcome: 'refused', changes: [], reasons: reasonsOf(error) };
    }
    const certificates = certificateFacts(next, this.#certificates);
    const changes = [...changesOf(this.#config, next, this.#certificates, certificates), ...(admin?.changes ?? [])];
    // While the workers prepare: new certificates have staples by the time they are served, if their responders are quick.
    void stapler.follow(this.#config, next);
    const refusal = (await workers.prepare(next, listeners, next.reloadDeadlineMs)) ?? (await workers.commit());
    if (refusal !== undefined) {
      workers.discard();
      void stapler.follow(this.#config);
      // A worker that hangs has them still, and whoever listens there next must be able to.
      shutSockets(listeners.opened, native);
      closeSockets(listeners.opened);
      const { code, message, hint } = refusal.failure;
      const worker = refusal.worker === undefined ? {} : { worker: refusal.worker };
      return {
        outcome: 'rolled_back',
        changes,
        reasons: [{ code, message, ...(hint === undefined ? {} : { hint }), ...worker }],
      };
    }
    this.#config = next;
    this.#certificates = certificates;
    this.#generation += 1;
    this.#since = new Date();
    void stapler.follow(next);
    this.#onCommit(next);
    admin?.commit();
    await workers.retire(listeners.retired);
    return { outcome: 'committed', changes, reasons: [] };
  }

  #conclude(report: ReloadReport): void {
    giveBackMemorySoon(this.#parts.native);
    this.#counts[report.outcome] += 1;
    this.#last = { ...report, at: new Date() };
    const { log, serviceManager } = this.#parts;
    const { outcome, seconds, changes, reasons } = report;
    const why = reasons[0] === undefined ? '' : `; the last reload was ${outcome}: ${reasons[0].message}`;
    serviceManager.reloaded(`serving generation ${this.#generation}${why}`);
    if (outcome === 'committed') {
      const event = 'reload_committed';
      const details = { event, seconds, generation: this.#generation, changes: shown(changes) } as const;
      log.info(details, 'the new configuration is served');
    } else {
      const details = { event: `reload_${outcome}`, seconds, reasons } as const;
      log.error(details, 'the new configuration is not served; the old one goes on');
    }
  }
}

const busyReport: ReloadReport = {
  outcome: 'refused',
  seconds: 0,
  changes: [],
  reasons: [{ code: 'reload_busy', message: 'another reload is under way; ask again when it has ended' }],
};

/** What workers, sockets and tokens were made with once and for all. */
function restartProblems(former: Config, next: Config): Problem[] {
  const keys = ['workers', 'user', 'group', 'admin', 'sandbox'] as const;
  const fixed: Fixed[] = keys.map((key) => ({ path: key, old: former[key], now: next[key] }));
  // Levels and samples are settings; a file is opened once, by each process.
  for (const [path, file] of Object.entries(logFiles)) {
    fixed.push({ path, old: file(former.log), now: file(next.log) });
  }
  for (const [name, token] of Object.entries(next.tokens)) {
    for (const [key, now] of Object.entries(token)) {
      const old = former.tokens[name]?.[key as keyof TokenConfig];
      if (name in former.tokens && !tokenSettings.has(key)) {
        fixed.push({ path: `tokens.${name}.${key}`, old, now, isOfToken: true });
      }
    }
  }
  // What the sandbox lets be written is settled when a worker starts.
  if (next.sandbox.enabled && !Object.values(former.tokens).some(isSoftHsm)) {
    const first = Object.entries(next.tokens).find(([, token]) => isSoftHsm(token));
    if (first !== undefined) fixed.push({ path: `tokens.${first[0]}.module`, old: 'no SoftHSM', now: first[1].module });
  }
  // Root was given up, and workers have entered their sandbox, with or without what that needs.
  const transparent = ({ upstreams }: Config) => Object.values(upstreams).find((upstream) => upstream.transparent);
  const first = transparent(next);
  if (first !== undefined && transparent(former) === undefined) {
    fixed.push({ path: `upstreams.${first.name}.transparent`, old: false, now: true });
  }
  return fixed
    .filter(({ old, now }) => !isDeepStrictEqual(old, now))
    .map(({ path, old, now, isOfToken }) => ({
      file: next.file,
      path,
      code: 'config_restart',
      found: JSON.stringify(now) ?? 'nothing',
      expected: `${JSON.stringify(old) ?? 'nothing'} as before`,
      hint: `restart keygate to change it${isOfToken === true ? ', or give the token another name' : ''}`,
    }));
}

/** What a token that stays adopts; certificates have the deadline, and those are new. */
const tokenSettings: ReadonlySet<string> = new Set<keyof TokenConfig>(['pin', 'weight', 'signDeadlineMs']);

const logFiles: Readonly<Record<string, (log: LogConfig) => string | undefined>> = {
  'log.file': ({ file }) => file,
  // Where the log goes, lines of connections can begin and end at any time.
  'log.access.file': ({ file, access }) => access?.file ?? file,
  'log.keyLog': ({ keyLog }) => keyLog,
};

interface Fixed {
  readonly path: string;
  readonly old: unknown;
  readonly now: unknown;
  /** Of a token that both have: under another name it would be another token. */
  readonly isOfToken?: boolean;
}

/** Every section and key that differs, by name; a certificate also when its file does. */
function changesOf(
  former: Config,
  next: Config,
  formerCertificates: readonly CertificateFacts[],
  certificates: readonly CertificateFacts[],
): string[] {
  const files = (facts: readonly CertificateFacts[]) =>
    new Map(facts.map(({ name, fingerprint }) => [name, fingerprint]));
  const [oldFiles, newFiles] = [files(formerCertificates), files(certificates)];
  const sections = ['tokens', 'certificates', 'policies', 'upstreams', 'listeners'] as const;
  const changed = sections.flatMap((section) => {
    const [old, now] = [former[section], next[section]];
    const removed = Object.keys(old).filter((name) => !(name in now));
    return [
      ...Object.entries(now).flatMap(([name, value]) => {
        if (!(name in old)) return [`${section}.${name} added`];
        const sameFile = section !== 'certificates' || oldFiles.get(name) === newFiles.get(name);
        return sameFile && isDeepStrictEqual(old[name], value) ? [] : [`${section}.${name} changed`];
      }),
      ...removed.map((name) => `${section}.${name} removed`),
    ];
  });
  const keys = ['log', 'tickets', 'ocsp', 'drainDeadlineMs', 'reloadDeadlineMs'] as const;
  return [
    ...changed,
    ...keys
      .filter((key) => !isDeepStrictEqual(former[key], next[key]))
      .map((key) => `${key.replace(/Ms$/, '')} changed`),
  ];
}

/** The first ones, and how many there are. */
export function shown(changes: readonly string[]): readonly string[] {
  const more = changes.length - changesShownMax;
  return more > 0 ? [...changes.slice(0, changesShownMax), `and ${more} more`] : changes;
}

function reasonsOf(error: unknown): ReloadReason[] {
  if (error instanceof ConfigError) {
    return error.problems.map((problem) => ({ code: problem.code, message: formatProblem(problem) }));
  }
  // A defect in reading a file must not end what serves.
  if (!(error instanceof KeygateError)) return [{ code: 'config_unreadable', message: String(error) }];
  const { code, message, hint } = error;
  return [{ code, message, ...(hint === undefined ? {} : { hint }) }];
}

/**
 * A chain that cannot be read is the workers' to report, with everything else that is wrong with it. One that is as it was
 * need not be parsed again, which with thousands of them is a quarter of what a reload costs here.
 */
function certificateFacts({ certificates }: Config, former: readonly CertificateFacts[]): readonly CertificateFacts[] {
  const known = new Map(former.map((facts) => [facts.name, facts]));
  return Object.values(certificates).flatMap(({ name, chain }) => {
    try {
      const text = readFileSync(chain);
      const fingerprint = createHash('sha256').update(text).digest('base64');
      const same = known.get(name);
      if (same?.fingerprint === fingerprint) return [same];
      return [{ name, notAfterMs: new X509Certificate(text).validToDate.getTime(), fingerprint }];
    } catch {
      return [];
    }
  });
}

/** Tells configurations apart; made of places of secrets, never of secrets. */
function hashOf(config: Config): string {
  return createHash('sha256').update(JSON.stringify(config)).digest('hex').slice(0, 16);
}
