/**
 * Owns: from the options of a command to a session that is logged in to one token, and back.
 * Must not know: what the command does with it.
 * Runs: on the main thread of a command.
 */
import { resolve } from 'node:path';
import type { Module } from 'graphene-pk11';
import { loadConfig } from '../config/load.ts';
import { readPin } from '../config/pin.ts';
import type { PinSource } from '../config/pin.ts';
import type { Pkcs11Uri } from '../config/pkcs11-uri.ts';
import { UsageError } from '../errors.ts';
import { failureReason } from '../pkcs11/failure.ts';
import type { OpenToken } from '../pkcs11/keys.ts';
import { closeSession, findToken, login, openModule, openSession } from '../pkcs11/module.ts';
import { nativeGuard } from '../pkcs11/native-guard.ts';

/** Which module; either of the two. */
export interface ModuleOptions {
  /** A configuration file. */
  readonly config?: string;
  /** Path of a PKCS#11 module. */
  readonly module?: string;
}

/** Which token and whose PIN. With a configuration `token` is a name in it, and the only token needs no name. */
export interface TokenOptions extends ModuleOptions, PinOptions {
  /** Name in the configuration, or with `module` the label of the token. */
  readonly token?: string;
}

/** Where the PIN is, one of three; a PIN is never an argument, because every user of the machine can see arguments. */
export interface PinOptions {
  readonly pinFile?: string;
  readonly pinEnv?: string;
  readonly pinCredential?: string;
}

interface ChosenModule {
  readonly module: string;
  readonly isolate: boolean;
  readonly loginLockWaitMs: number;
}

interface ChosenToken extends ChosenModule {
  readonly uri: Pkcs11Uri;
  readonly pin: PinSource;
}

/**
 * Opens the token, uses it and closes everything, whatever happens. The login lock is held until the login is done.
 * @throws UsageError, ConfigError, TokenError
 */
export async function withToken<Result>(
  options: TokenOptions,
  access: 'read' | 'read-write',
  use: (open: OpenToken) => Result | Promise<Result>,
): Promise<Result> {
  const chosen = chooseToken(options);
  return await withModule(chosen, async (module, release) => {
    const token = findToken(module, chosen.uri);
    const session = openSession(token, access);
    try {
      for (const warning of login(session, token, () => readPin(chosen.pin), nativeGuard)) warn(warning);
      release();
      return await use({ session, token });
    } finally {
      closeSession(session);
    }
  });
}

/** @param use gets the release of the login lock, which is released after it in any case. */
export async function withModule<Result>(
  chosen: ChosenModule,
  use: (module: Module, release: () => void) => Result | Promise<Result>,
): Promise<Result> {
  const release = lockLogin(chosen);
  try {
    const opened = openModule(chosen.module, chosen.isolate, nativeGuard);
    try {
      return await use(opened.module, release);
    } finally {
      opened.close();
    }
  } finally {
    release();
  }
}

/** The modules of the configuration, each once, or the one that is named. */
export function chooseModules({ config, module }: ModuleOptions): ChosenModule[] {
  if ((config === undefined) === (module === undefined))
    throw new UsageError('name either a configuration with --config or a module with --module');
  if (module !== undefined) return [{ ...moduleDefaults, module: resolve(module) }];
  const tokens = Object.values(loadConfig(config ?? '').tokens);
  return [...new Map(tokens.map((token) => [token.module, token])).values()];
}

/** @throws UsageError unless exactly one source is named. */
export function pinSource(options: PinOptions, flag = 'pin'): PinSource {
  const { pinFile, pinEnv, pinCredential } = options;
  const sources: PinSource[] = [
    ...(pinFile === undefined ? [] : [{ file: resolve(pinFile) }]),
    ...(pinEnv === undefined ? [] : [{ env: pinEnv }]),
    ...(pinCredential === undefined ? [] : [{ credential: pinCredential }]),
  ];
  const [source] = sources;
  if (source !== undefined && sources.length === 1) return source;
  throw new UsageError(
    `say where the PIN is with one of --${flag}-file, --${flag}-env and --${flag}-credential: found ${sources.length}`,
    {
      hint: 'a PIN itself is never an argument: every user of the machine could read it',
    },
  );
}

function warn(message: string): void {
  process.stderr.write(`warning: ${message}\n`);
}

const moduleDefaults = { isolate: true, loginLockWaitMs: 10_000 };

function chooseToken(options: TokenOptions): ChosenToken {
  const { config, module, token } = options;
  if (config === undefined) {
    const [chosen] = chooseModules(module === undefined ? {} : { module });
    if (chosen === undefined || token === undefined) throw new UsageError('name the token with --token LABEL');
    return { ...chosen, uri: { token }, pin: pinSource(options) };
  }
  if (module !== undefined) throw new UsageError('name either a configuration with --config or a module with --module');
  const { tokens } = loadConfig(config);
  const names = Object.keys(tokens);
  const name = token ?? (names.length === 1 ? names[0] : undefined);
  const chosen = name === undefined ? undefined : tokens[name];
  if (chosen !== undefined) return chosen;
  throw new UsageError(
    token === undefined
      ? 'the configuration has several tokens: name one with --token'
      : `token ${token}: the configuration has no such token`,
    { hint: `the configuration has ${names.join(', ')}` },
  );
}

function lockLogin({ module, loginLockWaitMs }: ChosenModule): () => void {
  try {
    return nativeGuard.lockLogin(module, loginLockWaitMs);
  } catch (error) {
    warn(`going on without the login lock: ${failureReason(error)}`);
    return () => {};
  }
}
