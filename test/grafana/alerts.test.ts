/**
 * Owns: when each alert fires, when it does not, and what it says then: at its limit, below it, and over a restart of keygate,
 * which begins every counter anew.
 * Must not know: keygate. Prometheus' own test runner evaluates the rules, over series that are made up.
 * Runs: in test processes, with promtool.
 */
import assert from 'node:assert/strict';
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, describe, it } from 'node:test';
import { stringify } from 'yaml';
import { alerts, recordingFile } from '../../grafana/rules.ts';
import type { Alert } from '../../grafana/rules.ts';
import { program } from '../support/tls-client.ts';
import { alertCases, minutesOf } from './alert-cases.ts';
import type { AlertCase, Series } from './alert-cases.ts';

const directory = mkdtempSync(join(tmpdir(), 'keygate-alerts-'));
after(() => rmSync(directory, { recursive: true }));

describe('an alert', () => {
  for (const alert of alerts()) {
    it(`${alert.name} fires above its limit, not at it, not before its time, and not for a restart`, async () => {
      const known = alertCases[alert.name];
      assert.ok(known, `no case for ${alert.name} in alert-cases.ts`);
      await assertPromtoolAgrees(alert, known);
    });

    it(`${alert.name} names a place in README that is there`, () => {
      const anchor = /^README\.md#(?<anchor>.+)$/.exec(alert.runbook)?.groups?.['anchor'];
      assert.ok(anchor, `${alert.runbook} is no place in README.md`);
      assert.ok(readme.includes(`<a id="${anchor}"></a>`), `README.md has no anchor ${anchor}: npm run docs`);
    });
  }

  it('has a case only while it is there', () => {
    const names = alerts().map(({ name }) => name);
    for (const name of Object.keys(alertCases)) assert.ok(names.includes(name), `${name} is in no rule file`);
  });
});

const readme = readFileSync(new URL('../../README.md', import.meta.url), 'utf8');

async function assertPromtoolAgrees(alert: Alert, { fires, quiet, labels, description, at = 30 }: AlertCase) {
  const firing = {
    exp_labels: { severity: alert.severity, ...labels },
    exp_annotations: {
      summary: alert.summary,
      description,
      action: alert.action,
      runbook: alert.runbook,
    },
  };
  const forMinutes = minutesOf(alert.for);
  const expectation = (minutes: number, expected: readonly object[]) => ({
    eval_time: `${minutes}m`,
    alertname: alert.name,
    exp_alerts: expected,
  });
  const [rule, file] = [join(directory, `${alert.name}.yml`), join(directory, `${alert.name}.test.yml`)];
  // The others have cases of their own, and cost time.
  writeFileSync(rule, stringify({ groups: [{ name: alert.name, rules: [alert.rule] }] }));
  writeFileSync(
    file,
    stringify({
      rule_files: [...(alert.expr.includes(':') ? [recordingFile] : []), rule],
      evaluation_interval: '1m',
      tests: [
        {
          name: 'fires',
          interval: '1m',
          input_series: inputOf(fires),
          alert_rule_test: [
            // What was wrong from the beginning is pending until `for` is over.
            ...(forMinutes >= 2 ? [expectation(forMinutes - 1, [])] : []),
            expectation(at, [firing]),
          ],
        },
        ...quiet.map((series, index) => ({
          name: `quiet ${index}`,
          interval: '1m',
          input_series: inputOf(series),
          alert_rule_test: Array.from({ length: at / 5 }, (_, step) => expectation((step + 1) * 5, [])),
        })),
      ],
    }),
  );
  const { exitCode, output } = await program('promtool', ['test', 'rules', file]);
  assert.equal(exitCode, 0, output);
}

function inputOf(series: Series): object[] {
  return Object.entries(series).map(([name, values]) => ({ series: name, values }));
}
