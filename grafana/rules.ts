/**
 * Owns: reading the rule files: what Prometheus is told to record and to alert on, as others here look at it.
 * Must not know: what any rule means.
 * Runs: in scripts and tests.
 */
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { parse } from 'yaml';

const directory = join(import.meta.dirname, 'prometheus');

export const prometheusConfig = join(directory, 'prometheus.yml');
export const recordingFile = join(directory, 'rules/keygate-recording.yml');
export const alertsFile = join(directory, 'rules/keygate-alerts.yml');

export interface Alert {
  /** As it stands in the file. */
  readonly rule: Rule;
  readonly name: string;
  readonly expr: string;
  /** As Prometheus has it, such as `5m`. */
  readonly for: string;
  readonly severity: string;
  readonly summary: string;
  readonly description: string;
  readonly action: string;
  readonly runbook: string;
}

export interface Recording {
  readonly record: string;
  readonly expr: string;
}

export function alerts(): readonly Alert[] {
  return rulesIn(alertsFile).map((rule) => {
    const { alert = '', expr, for: duration = '0m', labels, annotations = {} } = rule;
    const text = (name: string) => {
      const value = annotations[name];
      if (value === undefined) throw new Error(`${alertsFile}: ${alert} lacks the annotation ${name}`);
      return value;
    };
    return {
      rule,
      name: alert,
      expr,
      for: duration,
      severity: labels?.['severity'] ?? '',
      summary: text('summary'),
      description: text('description'),
      action: text('action'),
      runbook: text('runbook'),
    };
  });
}

export function recordings(): readonly Recording[] {
  return rulesIn(recordingFile).map(({ record = '', expr }) => ({ record, expr }));
}

/** For README.md: what each alert means and what to do, a row each, which `runbook` leads to. */
export function alertsTable(): string {
  const rows = alerts().map(({ name, severity, for: duration, summary, action, runbook }) => {
    const anchor = runbook.slice(runbook.indexOf('#') + 1);
    const time = duration === '0m' ? 'at once' : `after ${duration}`;
    return `| <a id="${anchor}"></a>\`${name}\` | ${severity}, ${time} | ${summary} | ${action.trim().replaceAll('|', '\\|')} |`;
  });
  return ['| alert | severity | what is wrong | what to do |', '|---|---|---|---|', ...rows].join('\n');
}

interface Rule {
  readonly alert?: string;
  readonly record?: string;
  readonly expr: string;
  readonly for?: string;
  readonly labels?: Readonly<Record<string, string>>;
  readonly annotations?: Readonly<Record<string, string>>;
}

function rulesIn(file: string): readonly Rule[] {
  const { groups } = parse(readFileSync(file, 'utf8')) as {
    readonly groups: readonly { readonly rules: readonly Rule[] }[];
  };
  return groups.flatMap(({ rules }) => rules);
}
