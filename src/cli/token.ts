/**
 * Owns: `keygate token list` and `keygate token init`.
 * Must not know: keys, certificates.
 * Runs: on the main thread of a command.
 */
import { resolve } from 'node:path';
import { TokenFlag } from 'graphene-pk11';
import { readPin } from '../config/pin.ts';
import { UsageError } from '../errors.ts';
import { mechanisms } from '../pkcs11/algorithm.ts';
import { failureReason } from '../pkcs11/failure.ts';
import { listTokens } from '../pkcs11/module.ts';
import type { TokenInSlot } from '../pkcs11/module.ts';
import { initialiseToken, tokenLabelBytesMax } from '../pkcs11/provision.ts';
import { printJson, printLine, printTable } from './output.ts';
import { chooseModules, pinSource, withModule } from './with-token.ts';
import type { ModuleOptions, PinOptions } from './with-token.ts';

export interface TokenListOptions extends ModuleOptions {
  readonly json?: boolean;
}

export interface TokenInitOptions extends PinOptions {
  readonly module: string;
  readonly label: string;
  readonly soPinFile?: string;
  readonly soPinEnv?: string;
  readonly soPinCredential?: string;
}

/** Every token of the modules: no PIN is needed. @throws UsageError, ConfigError, TokenError `token_module` */
export async function list(options: TokenListOptions): Promise<void> {
  const tokens = [];
  for (const chosen of chooseModules(options)) {
    tokens.push(
      ...(await withModule(chosen, (module) => listTokens(module).map((token) => describe(token, chosen.module)))),
    );
  }
  if (options.json === true) {
    printJson(tokens);
    return;
  }
  printTable(
    ['LABEL', 'SERIAL', 'MODEL', 'STATE', 'SESSIONS', 'MECHANISMS'],
    tokens.map(({ label, serial, model, state, sessions, mechanisms: names }) => [
      label === '' ? '-' : label,
      serial === '' ? '-' : serial,
      model,
      state.join(' '),
      `${sessions.open ?? '?'} of ${sessions.max ?? 'unlimited'}`,
      names.map((name) => name.replace('CKM_', '')).join(' '),
    ]),
  );
}

/** Initialises an empty token and sets its PINs. @throws UsageError, TokenError */
export async function init(options: TokenInitOptions): Promise<void> {
  const { label, module: path } = options;
  const length = Buffer.byteLength(label);
  if (length < 1 || length > tokenLabelBytesMax || label !== label.trim()) {
    throw new UsageError(
      `label: found ${JSON.stringify(label)}, expected 1 to ${tokenLabelBytesMax} bytes without blanks at its ends`,
    );
  }
  const user = pinSource(options);
  const securityOfficer = pinSource(securityOfficerPin(options), 'so-pin');
  const [chosen] = chooseModules({ module: resolve(path) });
  if (chosen === undefined) return;
  const token = await withModule(chosen, (module) => {
    const pins = { user: readPin(user), securityOfficer: readPin(securityOfficer) };
    return initialiseToken(module, label, pins);
  });
  printLine(`token "${token.label}" (serial ${token.serial}): initialised`);
}

interface TokenDescription {
  readonly module: string;
  readonly label: string;
  readonly serial: string;
  readonly manufacturer: string;
  readonly model: string;
  /** What a person must know, most telling first. */
  readonly state: readonly string[];
  /** Absent: the token does not say, or has no limit. */
  readonly sessions: { readonly open?: number; readonly max?: number };
  /** Those that keygate uses, as far as the token has them. */
  readonly mechanisms: readonly string[];
}

function describe(token: TokenInSlot, module: string): TokenDescription {
  const { label, serial, manufacturer, model, flags, sessions } = token;
  return {
    module,
    label,
    serial,
    manufacturer,
    model,
    state: stateOf(flags),
    sessions: {
      ...(sessions.open === undefined ? {} : { open: sessions.open }),
      ...(sessions.max === undefined || !Number.isFinite(sessions.max) ? {} : { max: sessions.max }),
    },
    mechanisms: mechanismsOf(token),
  };
}

function stateOf(flags: number): string[] {
  if ((flags & TokenFlag.TOKEN_INITIALIZED) === 0) return ['empty'];
  const states: [number, string][] = [
    [TokenFlag.ERROR_STATE, 'failed'],
    [TokenFlag.USER_PIN_LOCKED, 'pin-locked'],
    [TokenFlag.USER_PIN_FINAL_TRY, 'pin-final-try'],
    [TokenFlag.USER_PIN_COUNT_LOW, 'pin-count-low'],
    [TokenFlag.WRITE_PROTECTED, 'write-protected'],
  ];
  const found = states.filter(([flag]) => (flags & flag) !== 0).map(([, name]) => name);
  if ((flags & TokenFlag.USER_PIN_INITIALIZED) === 0) found.push('no-user-pin');
  return found.length === 0 ? ['ready'] : found;
}

function mechanismsOf({ slot }: TokenInSlot): string[] {
  try {
    const offered = new Set(slot.lib.C_GetMechanismList(slot.handle));
    return Object.entries(mechanisms)
      .filter(([, number]) => offered.has(number))
      .map(([name]) => name);
  } catch (error) {
    // A list is for looking at what is there, also when some of it is broken.
    return [failureReason(error)];
  }
}

function securityOfficerPin({ soPinFile, soPinEnv, soPinCredential }: TokenInitOptions): PinOptions {
  return {
    ...(soPinFile === undefined ? {} : { pinFile: soPinFile }),
    ...(soPinEnv === undefined ? {} : { pinEnv: soPinEnv }),
    ...(soPinCredential === undefined ? {} : { pinCredential: soPinCredential }),
  };
}
