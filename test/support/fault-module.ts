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
};
type Field = keyof typeof fields;

const controlBytes = 4096;
const wordBytes = 8;
const magic = Buffer.from('KGFAULT1').readBigUInt64LE();
const layoutVersion = 1n;
const forEver = 0xffff_ffff_ffff_ffffn;
/** Words that count broken rules of PKCS#11: a session in two threads, a call before C_Initialize, a C_Finalize too early. */
const violationWords = [2, 3, 4];
const exitDelayWord = 5;
const misbehaveWord = 6;
const deedsStart = 448;

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

  delay(name: Pkcs11Function, delayMs: number): void {
    this.#set(name, 'delayUs', BigInt(delayMs * 1000));
  }

  /** The next `times` calls return `ckr`; without `times`, all of them. */
  fail(name: Pkcs11Function, ckr: number, times?: number): void {
    this.#set(name, 'rv', BigInt(ckr));
    this.#set(name, 'rvLeft', times === undefined ? forEver : BigInt(times));
  }

  /** The next `times` signatures have one bit wrong; without `times`, all of them. */
  damage(times?: number): void {
    this.#set('C_Sign', 'flipLeft', times === undefined ? forEver : BigInt(times));
  }

  /** Processes that load the module wait so long after the exit handlers of the real one, where a thread still inside it crashes. */
  lingerAtExit(delayMs: number): void {
    this.#write(exitDelayWord, BigInt(delayMs * 1000));
  }

  /** The next signature begins with an attempt at every deed. The processes need KEYGATE_FAULT_PREY. */
  misbehave(): void {
    this.#write(misbehaveWord, 1n);
  }

  /** What became of each: "done", or the name of an errno; undefined when it was not tried. */
  get deeds(): Readonly<Record<Deed, string | undefined>> {
    const outcomes = deeds.map((deed, index) => [deed, outcomeOf(this.#read(deedsStart + index))]);
    return Object.fromEntries(outcomes) as Record<Deed, string | undefined>;
  }

  /** No faults any more. What was counted stays. */
  clear(): void {
    for (const name of functions)
      for (const field of ['hang', 'delayUs', 'rvLeft', 'rv', 'flipLeft'] as const) this.#set(name, field, 0n);
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
    return violationWords.reduce((sum, word) => sum + Number(this.#read(word)), 0);
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
  return 16 + 16 * functions.indexOf(name) + fields[field];
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
