/**
 * Owns: the fault module (test/fault-module) as tests see it: where it is built, and one control file per test.
 * Must not know: keygate; whoever loads the module gets `env`.
 * Runs: in test processes, on the main thread. The module maps the control file, so that a write here is seen at once by
 * every process that has loaded it.
 */
import { execFileSync } from 'node:child_process';
import { closeSync, mkdtempSync, openSync, readSync, writeSync } from 'node:fs';
import { join } from 'node:path';
import { getSystemErrorName } from 'node:util';
import type { DisposableToken } from './softhsm.ts';

/** Places in the control file, in the order of test/fault-module/README.md. */
const functions = [
  'C_Initialize',
  'C_Finalize',
  'C_GetSlotList',
  'C_GetTokenInfo',
  'C_GetMechanismInfo',
  'C_OpenSession',
  'C_CloseSession',
  'C_CloseAllSessions',
  'C_GetSessionInfo',
  'C_Login',
  'C_Logout',
  'C_FindObjectsInit',
  'C_FindObjects',
  'C_FindObjectsFinal',
  'C_GetAttributeValue',
  'C_SignInit',
  'C_Sign',
  'C_GetSlotInfo',
  'C_GetMechanismList',
] as const;
export type Pkcs11Function = (typeof functions)[number];

/** What a module tries that misbehaves, in the order of `DEEDS` in test/fault-module/src/control.rs. */
const deeds = [
  'program',
  'exec',
  'fork',
  'create',
  'overwrite',
  'truncate',
  'remove',
  'make directory',
  'change mode',
  'bind TCP',
  'listen',
  'raw socket',
  'odd socket',
  'trace',
  'read memory',
  'signal',
  'namespace',
  'keyring',
  'ring',
  'identity',
] as const;
export type Deed = (typeof deeds)[number];

const fields = {
  delayUs: 0,
  hang: 1,
  rv: 2,
  rvEvery: 3,
  rvLeft: 4,
  flipEvery: 5,
  flipLeft: 6,
  calls: 8,
  inFlight: 9,
  inFlightMax: 10,
  injected: 11,
  flipped: 12,
  rvUntilMs: 13,
  rvPerMillion: 14,
  rvHeal: 15,
  rvSinceUs: 16,
  onlyPid: 17,
  onlySession: 18,
  onlyToken: 19,
  delaySigma: 20,
  spikeUs: 21,
  spikeEvery: 22,
  rate: 23,
};
type Field = keyof typeof fields;

/** What the module is told, or counts, as a whole; test/fault-module/README.md says what each means. */
const words = {
  exitDelayUs: 5,
  misbehaveLeft: 6,
  sessionsOpen: 10,
  sessionsOpenMax: 11,
  sessionLimit: 12,
  slotsHidden: 13,
  slotShift: 14,
  objects: 15,
  handlesExchanged: 16,
  extractable: 17,
  sessionInfoLies: 18,
  logoutLeft: 19,
  closeLeft: 20,
  pinsRefused: 21,
  pinTries: 22,
  crashLeft: 23,
  crashSignal: 24,
  leakBytes: 25,
  damage: 26,
  initializations: 27,
};
type Word = keyof typeof words;
/** Those that `clear` leaves alone: what was counted. */
const counted: ReadonlySet<string> = new Set<Word>([
  'sessionsOpen',
  'sessionsOpenMax',
  'pinsRefused',
  'initializations',
]);

/** Words that count broken rules of PKCS#11. */
const rules = {
  'two threads in one PKCS#11 session': 2,
  'a call before C_Initialize or after C_Finalize': 3,
  'C_Finalize while a call is in flight': 4,
  'C_SignInit while an operation is active, or C_Sign without it': 7,
  'a forked process without C_Initialize of its own': 8,
  'a call on the I/O thread': 9,
};
export type Rule = keyof typeof rules;

/** In the order of `Damage` in test/fault-module/src/control.rs. */
const damages = ['flip', 'truncate', 'empty', 'leading zero', 'other key'] as const;
/** In the order of `Heal`. */
const heals = ['never', 'reopen', 'login', 'initialize'] as const;

/** Which of the calls fail; default: all of them, for ever. */
interface Storm {
  readonly times?: number;
  readonly every?: number;
  readonly perMillion?: number;
  readonly forMs?: number;
  /** What the user of the module must do for it to end. */
  readonly heal?: (typeof heals)[number];
}

interface Slowness {
  /** Fixed, or with `sigma` the median of a log-normal distribution. */
  readonly delayMs?: number;
  readonly sigma?: number;
  /** In place of nothing, for every `spikeEvery`th call. */
  readonly spikeMs?: number;
  readonly spikeEvery?: number;
  /** All processes together. */
  readonly perSecond?: number;
}

/** Whose calls a function's faults are for. */
interface Concerned {
  readonly pid?: number;
  readonly session?: Buffer;
  /** Label of a token, of which eight bytes count. */
  readonly token?: string;
}

const controlBytes = 8192;
const wordBytes = 8;
const magic = Buffer.from('KGFAULT1').readBigUInt64LE();
const layoutVersion = 2n;
const forEver = 0xffff_ffff_ffff_ffffn;
const functionsStart = 64;
const functionWords = 32;
const deedsStart = 960;

export class FaultModule {
  /** Absolute path of the module to configure. */
  readonly module: string;
  /** For every process that loads the module. */
  readonly env: Readonly<Record<string, string>>;
  readonly #control: number;

  /** Switched off at first. The control file lies beside the token, and goes with it. */
  constructor(token: DisposableToken) {
    this.module = builtModule();
    const path = join(mkdtempSync(join(token.directory, 'faults-')), 'control');
    this.env = { ...token.env, KEYGATE_FAULT_MODULE: token.module, KEYGATE_FAULT_CONTROL: path };
    this.#control = openSync(path, 'wx+', 0o600);
    writeSync(this.#control, Buffer.alloc(controlBytes), 0, controlBytes, 0);
    this.#write(1, layoutVersion);
    this.#write(0, magic);
  }

  /** Calls that are made from now on do not return. */
  hang(name: Pkcs11Function): void {
    this.#set(name, 'hang', 1n);
  }

  /** Calls that hang go on. */
  release(name: Pkcs11Function): void {
    this.#set(name, 'hang', 0n);
  }

  slow(name: Pkcs11Function, { delayMs = 0, sigma = 0, spikeMs = 0, spikeEvery = 1, perSecond = 0 }: Slowness): void {
    this.#set(name, 'delaySigma', BigInt(Math.round(sigma * 1000)));
    this.#set(name, 'delayUs', BigInt(Math.round(delayMs * 1000)));
    this.#set(name, 'spikeEvery', BigInt(spikeEvery));
    this.#set(name, 'spikeUs', BigInt(spikeMs * 1000));
    this.#set(name, 'rate', BigInt(perSecond));
  }

  delay(name: Pkcs11Function, delayMs: number): void {
    this.slow(name, { delayMs });
  }

  /** Calls return `ckr`: the next so many, or those of the storm. */
  fail(name: Pkcs11Function, ckr: number, storm: number | Storm = {}): void {
    const {
      times,
      every = 1,
      perMillion = 0,
      forMs,
      heal = 'never',
    } = typeof storm === 'number' ? { times: storm } : storm;
    const nowUs = process.hrtime.bigint() / 1000n;
    this.#set(name, 'rvHeal', BigInt(heals.indexOf(heal)));
    this.#set(name, 'rvSinceUs', nowUs);
    this.#set(name, 'rvUntilMs', forMs === undefined ? 0n : nowUs / 1000n + BigInt(forMs));
    this.#set(name, 'rvEvery', BigInt(every));
    this.#set(name, 'rvPerMillion', BigInt(perMillion));
    this.#set(name, 'rv', BigInt(ckr));
    this.#set(name, 'rvLeft', times === undefined ? forEver : BigInt(times));
  }

  /** From now on faults of this function are for these callers alone. */
  only(name: Pkcs11Function, { pid = 0, session, token = '' }: Concerned): void {
    this.#set(name, 'onlyPid', BigInt(pid));
    this.#set(name, 'onlySession', session?.readBigUInt64LE() ?? 0n);
    // As in CK_TOKEN_INFO, where a label is padded with blanks.
    this.#set(name, 'onlyToken', token === '' ? 0n : Buffer.from(token.padEnd(wordBytes)).readBigUInt64LE());
  }

  /** The next `times` signatures are wrong, or odd; without `times`, all of them. */
  damage(times?: number, kind: (typeof damages)[number] = 'flip'): void {
    this.set('damage', damages.indexOf(kind));
    this.#set('C_Sign', 'flipLeft', times === undefined ? forEver : BigInt(times));
  }

  /** For what concerns more than one function. */
  set(word: Word, value: number): void {
    this.#write(words[word], BigInt(value));
  }

  get(word: Word): number {
    return Number(this.#read(words[word]));
  }

  /** Processes that load the module wait so long after the exit handlers of the real one, where a thread still inside it crashes. */
  lingerAtExit(delayMs: number): void {
    this.set('exitDelayUs', delayMs * 1000);
  }

  /** The next signature begins with an attempt at every deed. The processes need KEYGATE_FAULT_PREY. */
  misbehave(): void {
    this.set('misbehaveLeft', 1);
  }

  /** What became of each: "done", or the name of an errno; undefined when it was not tried. */
  get deeds(): Readonly<Record<Deed, string | undefined>> {
    const outcomes = deeds.map((deed, index) => [deed, outcomeOf(this.#read(deedsStart + index))]);
    return Object.fromEntries(outcomes) as Record<Deed, string | undefined>;
  }

  /** No faults any more. What was counted stays. */
  clear(): void {
    for (const name of functions)
      for (const field of ['hang', 'delayUs', 'spikeUs', 'rate', 'rvLeft', 'rv', 'flipLeft'] as const)
        this.#set(name, field, 0n);
    for (const [word, place] of Object.entries(words)) if (!counted.has(word)) this.#write(place, 0n);
  }

  /** Nothing can be switched or read any more. */
  close(): void {
    closeSync(this.#control);
  }

  read(name: Pkcs11Function, field: Field): number {
    return Number(this.#read(wordOf(name, field)));
  }

  /** How often the user of the module broke a rule of PKCS#11. */
  get violations(): number {
    return this.broken.reduce((sum, rule) => sum + Number(this.#read(rules[rule])), 0);
  }

  /** The rules that it broke. */
  get broken(): readonly Rule[] {
    return (Object.keys(rules) as Rule[]).filter((rule) => this.#read(rules[rule]) > 0n);
  }

  #set(name: Pkcs11Function, field: Field, value: bigint): void {
    this.#write(wordOf(name, field), value);
  }

  #write(word: number, value: bigint): void {
    const bytes = Buffer.alloc(wordBytes);
    bytes.writeBigUInt64LE(value);
    writeSync(this.#control, bytes, 0, wordBytes, word * wordBytes);
  }

  #read(word: number): bigint {
    const bytes = Buffer.alloc(wordBytes);
    readSync(this.#control, bytes, 0, wordBytes, word * wordBytes);
    return bytes.readBigUInt64LE();
  }
}

function outcomeOf(word: bigint): string | undefined {
  if (word === 0n) return undefined;
  return word === 1n ? 'done' : getSystemErrorName(-Number(word >> 32n));
}

function wordOf(name: Pkcs11Function, field: Field): number {
  return functionsStart + functionWords * functions.indexOf(name) + fields[field];
}

let built: string | undefined;

/** Cargo decides whether there is something to build; it takes its own lock when several test files ask. */
function builtModule(): string {
  if (built !== undefined) return built;
  const crate = new URL('../fault-module/', import.meta.url).pathname;
  execFileSync(
    'cargo',
    [
      'build',
      '--release',
      '--locked',
      '--quiet',
      '--manifest-path',
      join(crate, 'Cargo.toml'),
      '--target-dir',
      join(crate, 'target'),
    ],
    {
      stdio: ['ignore', 'ignore', 'inherit'],
    },
  );
  built = join(crate, 'target/release/libkeygate_fault_module.so');
  return built;
}
