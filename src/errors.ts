/**
 * Owns: the four error classes, the table of stable codes and the exit codes (sysexits) that belong to them.
 * Must not know: anything above it; this is the bottom layer.
 * Runs: everywhere, on the main thread of any process.
 */

/** One place in a configuration that is wrong, and what to do about it. */
export interface Problem {
  /** Absolute path of the file. */
  readonly file: string;
  /** 1-based; absent when the problem is the file itself. */
  readonly line?: number;
  /** 1-based, in UTF-16 code units like editors count. */
  readonly column?: number;
  /** Dotted path of the key: `listeners.https.bind[0]`; empty for the document. */
  readonly path: string;
  readonly code: ErrorCode;
  /** What was found, quoted and shortened; never a secret. */
  readonly found: string;
  readonly expected: string;
  /** What to do: a suggestion for a misspelt name, a command to run. */
  readonly hint?: string;
}

/** Exit codes of the command line, by sysexits.h. */
export const exitCodes = {
  ok: 0,
  other: 1,
  usage: 64,
  unavailable: 69,
  pin: 77,
  config: 78,
} as const;

/**
 * Every code keygate reports, with its summary. Codes are stable: scripts and alerts match on them.
 * README lists the same table; test/errors.test.ts holds the two equal.
 */
export const errorCodes = {
  // UsageError, exit 64
  usage: 'the command line is not understood',

  // ConfigError, exit 78
  config_unreadable: 'the file cannot be read',
  config_too_large: 'the file is too large',
  config_syntax: 'not valid YAML',
  config_duplicate_key: 'duplicate key',
  config_unknown_key: 'unknown key',
  config_missing_key: 'missing key',
  config_type: 'wrong kind of value',
  config_value: 'invalid value',
  config_reference: 'undefined name',
  config_conflict: 'conflicting settings',
  config_unsupported: 'not supported by this version',
  config_secret: 'secret in the configuration',
  config_certificate: 'unusable certificate file',
  config_restart: 'cannot change by a reload',
  config_key_log: 'TLS secrets would be written without permission',

  // TokenError, exit 77: each further try could cost one of the PIN's few
  pin_unavailable: 'the PIN cannot be read from its source',
  pin_invalid: 'the PIN source holds something that cannot be a PIN',
  pin_exposed: 'the PIN file can be read by other users',
  token_login: 'the token refused the login',
  token_pin_locked: 'the PIN of the token is locked or on its final try',

  // TokenError, exit 69
  token_module: 'the PKCS#11 module cannot be loaded or initialised',
  token_not_found: 'no token, or more than one, answers to the URI',
  token_key_not_found: 'no private key, or more than one, answers to the URI',
  token_key_exposed: 'the private key could leave the token',
  token_key_mismatch: 'the private key does not belong to the certificate',
  token_mechanism: 'the token lacks a mechanism that keygate needs',
  token_operation: 'the token failed an operation',

  // ServiceError, exit 1, or 69 where a service that keygate needs is unavailable
  engine_missing: 'the engine is not built or cannot be loaded',
  engine_failed: 'the engine reported a failure',
  bind_failed: 'a listener cannot be bound',
  admin_failed: 'the admin server cannot be started or reached',
  privileges: 'privileges cannot be dropped',
  log_failed: 'a log cannot be opened',
  upstream_unresolved: 'the name of an upstream server has no address',
  worker_failed: 'a worker ended or never became ready',
  reload_busy: 'another reload is under way',
  demo_failed: 'the demo cannot be set up',
  output_failed: 'a result cannot be written',
} as const;

export type ErrorCode = keyof typeof errorCodes;

/** Whoever tries again must have somebody look at the PIN first. */
export const pinCodes: ReadonlySet<string> = new Set<ErrorCode>([
  'pin_unavailable',
  'pin_invalid',
  'pin_exposed',
  'token_login',
  'token_pin_locked',
]);

interface Details {
  /** What to do about it. */
  readonly hint?: string;
  readonly cause?: unknown;
}

/** What the four classes share; thrown only as one of them. */
export abstract class KeygateError extends Error {
  abstract readonly exitCode: number;
  readonly code: ErrorCode;
  readonly hint: string | undefined;

  constructor(code: ErrorCode, message: string, details: Details = {}) {
    super(message, details.cause === undefined ? undefined : { cause: details.cause });
    this.name = new.target.name;
    this.code = code;
    this.hint = details.hint;
  }
}

/** The command line is wrong. */
export class UsageError extends KeygateError {
  readonly exitCode = exitCodes.usage;

  constructor(message: string, details: Details = {}) {
    super('usage', message, details);
  }
}

/** The configuration is wrong; carries every problem found, never only the first. */
export class ConfigError extends KeygateError {
  readonly exitCode = exitCodes.config;
  readonly problems: readonly Problem[];

  /** @param problems at least one. */
  constructor(problems: readonly [Problem, ...Problem[]], details: Details = {}) {
    super(problems[0].code, problems.map(formatProblem).join('\n'), details);
    this.problems = problems;
  }
}

/** A token, its PIN or a key in it cannot be used. The message never holds a PIN. */
export class TokenError extends KeygateError {
  readonly exitCode: number;
  /** Label of the token or name in the configuration. */
  readonly token: string | undefined;
  /** Name of the return value, `CKR_PIN_INCORRECT`, when a module gave one. */
  readonly ckr: string | undefined;

  constructor(code: ErrorCode, message: string, details: Details & { token?: string; ckr?: string } = {}) {
    super(code, message, details);
    this.exitCode = pinCodes.has(code) ? exitCodes.pin : exitCodes.unavailable;
    this.token = details.token;
    this.ckr = details.ckr;
  }
}

/** keygate itself, or something it needs, failed. */
export class ServiceError extends KeygateError {
  readonly exitCode: number;

  /** @param details.unavailable true where sysexits calls it EX_UNAVAILABLE (69) instead of 1. */
  constructor(code: ErrorCode, message: string, details: Details & { unavailable?: boolean } = {}) {
    super(code, message, details);
    this.exitCode = details.unavailable === true ? exitCodes.unavailable : exitCodes.other;
  }
}

/** `keygate.yaml:5:5 listeners.https.bufer: unknown key, expected one of ...; did you mean "buffer"?` */
export function formatProblem(problem: Problem): string {
  const { file, line, column, path, code, found, expected, hint } = problem;
  const position = line === undefined ? file : `${file}:${line}:${column ?? 1}`;
  const subject = path === '' ? position : `${position} ${path}`;
  const message = `${subject}: ${errorCodes[code]}: found ${found}, expected ${expected}`;
  return hint === undefined ? message : `${message}; ${hint}`;
}
