/**
 * Owns: `keygate check`: everything that can be known before serving, all problems in one run.
 * Must not know: how tokens and chains are examined.
 * Runs: on the main thread of a command.
 */
import { loadConfig } from '../config/load.ts';
import type { Config } from '../config/config.ts';
import { fipsProblems } from '../config/fips.ts';
import { keyLogProblems } from '../config/key-log.ts';
import { readPin } from '../config/pin.ts';
import { ConfigError, exitCodes, formatProblem, ServiceError, TokenError } from '../errors.ts';
import { nativeGuard } from '../pkcs11/native-guard.ts';
import { examinePlan } from '../pkcs11/plan.ts';
import type { Finding } from '../pkcs11/plan.ts';
import { readCredentials } from '../primary/admin-credentials.ts';
import { engine } from '../engine/binding.ts';
import { becomeConfigured, demandTransparency, findAccount } from '../primary/privileges.ts';
import { explainPolicies } from './effective-policies.ts';
import type { EffectivePolicy } from './effective-policies.ts';
import { coloured, printJson, printLine } from './output.ts';
import type { Colour } from './output.ts';
import { examineUpstreams } from './reachability.ts';
import { examineVerification } from './verification.ts';
import { examineStapling } from './stapling.ts';

export interface CheckOptions {
  readonly config: string;
  readonly json?: boolean;
  /** As `serve` will be started. */
  readonly allowKeyLog?: boolean;
}

/**
 * Prints every finding and sets the exit code: 78 when the configuration or a certificate file is wrong, else 77 when a PIN
 * is, else 69 when a token or key is, else what serve would end with, else 0, also with warnings. Root becomes the configured user.
 */
export async function run({ config: file, json, allowKeyLog = false }: CheckOptions): Promise<void> {
  const { findings, policies } = await examine(file, allowKeyLog);
  const exitCode = exitCodeOf(findings);
  if (json === true) printJson({ ok: exitCode === exitCodes.ok, exitCode, findings: findings.map(describe), policies });
  else printFindings(findings);
  process.exitCode = exitCode;
}

interface Report {
  readonly findings: readonly Finding[];
  /** Of each listener and upstream. */
  readonly policies: readonly EffectivePolicy[];
}

async function examine(file: string, allowKeyLog: boolean): Promise<Report> {
  let config: Config;
  try {
    config = loadConfig(file);
    const [refused, ...others] = [
      ...(allowKeyLog ? [] : keyLogProblems(config)),
      ...fipsProblems(config, () => engine().isFips()),
    ];
    if (refused !== undefined) throw new ConfigError([refused, ...others]);
  } catch (error) {
    if (!(error instanceof ConfigError)) throw error;
    // Tokens and upstreams of a configuration that is wrong are guesses.
    const findings = error.problems.map((problem): Finding => ({
      severity: 'error',
      subject: 'config',
      message: formatProblem(problem),
      error: new ConfigError([problem]),
    }));
    return { findings, policies: [] };
  }
  const tools = { guard: nativeGuard, readPin };
  const isRoot = process.geteuid?.() === 0;
  const beforehand: Finding[] = [
    { severity: 'ok', subject: 'config', message: config.file },
    ...becomeUser(config),
    ...examineAdmin(config),
    ...examineTransparency(config, isRoot),
  ];
  const plan = examinePlan(config, tools);
  const { findings, policies } = explainPolicies(config, plan.keyAlgorithms);
  return {
    findings: [
      ...beforehand,
      ...plan.findings,
      ...findings,
      ...(await examineStapling(config)),
      ...(await examineUpstreams(config)),
      ...(await examineVerification(config)),
    ],
    policies,
  };
}

/**
 * As serve does between its sockets and its workers: what root can read says nothing about what they can read. From
 * here on PIN files, chains, modules and token directories are seen as workers will see them.
 */
function becomeUser(config: Config): Finding[] {
  const { user, group } = config;
  if (user === undefined) return [];
  const subject = `user ${user}`;
  try {
    const { uid, gid } = findAccount(user, group);
    const became = becomeConfigured(config) !== undefined;
    const seen = became ? 'all that follows is seen as this user' : 'not checked as this user, which needs root';
    return [{ severity: 'ok', subject, message: `uid ${uid}, gid ${gid}; ${seen}` }];
  } catch (error) {
    if (!(error instanceof ServiceError)) throw error;
    return [{ severity: 'error', subject, message: error.message, error }];
  }
}

/** Nothing to say of an admin server that needs no file. */
function examineAdmin({ admin }: Config): Finding[] {
  if (admin === undefined || (admin.token === undefined && admin.tls === undefined)) return [];
  const subject = 'admin';
  try {
    const { tls } = readCredentials(admin);
    const until = tls && `, the certificate until ${new Date(tls.notAfterMs).toISOString().slice(0, 10)}`;
    return [{ severity: 'ok', subject, message: `its files can be used${until ?? ''}` }];
  } catch (error) {
    if (!(error instanceof ServiceError)) throw error;
    return [{ severity: 'error', subject, message: error.message, error }];
  }
}

/** Who is not root cannot know what systemd or a container will give to `serve`. */
function examineTransparency(config: Config, isRoot: boolean): Finding[] {
  const subject = 'transparent upstreams';
  try {
    demandTransparency(config, engine());
    return [];
  } catch (error) {
    if (!(error instanceof ServiceError)) throw error;
    const { message } = error;
    return [isRoot ? { severity: 'error', subject, message, error } : { severity: 'warning', subject, message }];
  }
}

function exitCodeOf(findings: readonly Finding[]): number {
  const errors = findings.flatMap(({ error }) => error ?? []);
  if (errors.length === 0) return exitCodes.ok;
  return (
    (
      errors.find((error) => error instanceof ConfigError) ??
      errors.find(({ exitCode }) => exitCode === exitCodes.pin) ??
      errors.find((error) => error instanceof TokenError) ??
      errors[0]
    )?.exitCode ?? exitCodes.other
  );
}

const marks: Record<Finding['severity'], Colour> = { ok: 'green', warning: 'yellow', error: 'red' };

function printFindings(findings: readonly Finding[]): void {
  const width = Math.max(...findings.map(({ subject }) => subject.length));
  for (const { severity, subject, message, error } of findings) {
    printLine(`${coloured(marks[severity], severity.padEnd(7))}  ${subject.padEnd(width)}  ${message}`);
    // A configuration problem has its hint in its message.
    if (error?.hint !== undefined) printLine(`${' '.repeat(9 + width + 2)}${coloured('dim', error.hint)}`);
  }
  const count = (wanted: Finding['severity']) => {
    const { length } = findings.filter(({ severity }) => severity === wanted);
    return `${length} ${wanted}${length === 1 ? '' : 's'}`;
  };
  printLine(`${count('error')}, ${count('warning')}`);
}

function describe({ severity, subject, message, error }: Finding) {
  const { token, ckr } = error instanceof TokenError ? error : {};
  return { severity, subject, message, code: error?.code, hint: error?.hint, token, ckr };
}
