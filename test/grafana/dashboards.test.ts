/**
 * Owns: that dashboards and rules are about what keygate really says: each of their expressions has an answer from a real
 * Prometheus that has scraped a real keygate under load.
 * Must not know: what any panel shows; the exceptions below say where nothing is to be seen, and why.
 * Runs: in a test process, with a token, a keygate and a Prometheus of its own.
 */
import assert from 'node:assert/strict';
import { cpSync, mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, describe, it } from 'node:test';
import { fileURLToPath } from 'node:url';
import { parse } from 'yaml';
import { dashboards } from '../../grafana/dashboard-files.ts';
import { alerts, alertsFile, recordingFile, recordings } from '../../grafana/rules.ts';
import type { Range } from '../support/prometheus.ts';
import { program } from '../support/tls-client.ts';
import { startScene } from './scene.ts';
import type { Scene } from './scene.ts';

/** Targets of panels without data after this load. One that has data must go from the list. */
const withoutData: Readonly<Record<string, string>> = {};

/** Series that a rule or panel chooses and that this load does not make. One that is there must go from the list. */
const withoutSeries: Readonly<Record<string, string>> = {};

/** Recorded series without a value after this load; one that has a value must go from the list. */
const withoutRecord: Readonly<Record<string, string>> = {};

const readme = readFileSync(new URL('../../README.md', import.meta.url), 'utf8');
const grafana = fileURLToPath(new URL('../../grafana', import.meta.url));
const scrapeMs = 500;
const boards = dashboards();
const targets = boards.flatMap(({ targets: own }) => own);

describe('dashboards', () => {
  it('are six, with panels that have numbers of their own and say what they mean', () => {
    assert.equal(boards.length, 6);
    for (const { uid, panels } of boards) {
      const ids = panels.map(({ id }) => id);
      assert.equal(new Set(ids).size, ids.length, `${uid}: a panel's id twice`);
      for (const { title, description = '' } of panels.filter(({ type }) => type !== 'row'))
        assert.ok(description.length > 15, `${uid}: ${title}: no description`);
    }
  });

  it('ask the Prometheus that is chosen', () => {
    for (const { key, datasource } of targets)
      assert.deepEqual(datasource, { type: 'prometheus', uid: '${datasource}' }, key);
  });

  it('and rules are found when they are copied as README says', async () => {
    const directory = mkdtempSync(join(tmpdir(), 'keygate-grafana-'));
    try {
      cpSync(join(grafana, 'prometheus'), directory, { recursive: true });
      const { exitCode, output } = await program('promtool', ['check', 'config', join(directory, 'prometheus.yml')]);
      assert.equal(exitCode, 0, output);
      assert.match(output, /2 rule files found/);
    } finally {
      rmSync(directory, { recursive: true });
    }
    const provider = parse(readFileSync(join(grafana, 'provisioning/dashboards/keygate.yaml'), 'utf8')) as {
      readonly providers: readonly { readonly options: { readonly path: string } }[];
    };
    const path = provider.providers[0]?.options.path;
    assert.ok(
      path !== undefined && readme.includes(`cp grafana/dashboards/*.json ${path}/`),
      `README copies to ${path}`,
    );
  });

  it('lead to dashboards that are there', () => {
    const links = boards.flatMap(({ panels }) =>
      panels.flatMap(({ fieldConfig }) => fieldConfig?.defaults.links ?? []),
    );
    const inside = links.map(({ url }) => url).filter((url) => !url.startsWith('${readme}#'));
    const uids = inside.map((url) => /^\/d\/([^?]+)\?\$\{__url_time_range\}&\$\{__all_variables\}$/.exec(url)?.[1]);
    assert.ok(uids.length > 5);
    for (const uid of uids)
      assert.ok(
        boards.some((board) => board.uid === uid),
        `no dashboard ${uid}`,
      );
  });
});

describe('on a real Prometheus', () => {
  let scene: Scene;
  let range: Range;

  before(async () => {
    scene = await startScene({ workers: 2, lanes: 2, queue: { max: 4, age: '300ms' }, scrapeMs });
    await scene.prometheus.answered('count_over_time(keygate_ready[1m]) > 1');
    const startSeconds = Date.now() / 1000;
    await everythingThatCanHappen(scene);
    // The alert is the last thing to come of it all: of the last reload, by way of a scrape and the rules.
    await scene.prometheus.answered('ALERTS{alertname="KeygateReloadFailed",alertstate="firing"}');
    await scene.prometheus.answered(`keygate_reloads_total{outcome="refused"} == 1`);
    range = { startSeconds, endSeconds: Date.now() / 1000 + 1, stepSeconds: 0.5 };
  });
  after(async () => scene[Symbol.asyncDispose]());

  it('every target of every panel has data', async () => {
    await assertOnlyExcepted(withoutData, targets, async ({ expr, instant, key }) => {
      const asked = concrete(expr);
      const series = await failure(key, instant ? scene.prometheus.now(asked) : scene.prometheus.over(asked, range));
      return series.length > 0;
    });
  });

  it('every variable has values, and every mark a place', async () => {
    for (const { uid, variables, marks } of boards) {
      for (const { name, query } of variables) {
        const [, series = '', label = ''] = /^label_values\((.+), (\w+)\)$/.exec(query) ?? [];
        assert.ok((await scene.prometheus.values(label, concrete(series))).length > 0, `${uid}: $${name} has no value`);
      }
      for (const { expr } of marks)
        assert.ok((await scene.prometheus.now(concrete(expr))).length > 0, `${uid}: ${expr}`);
    }
  });

  it('every rule is evaluated, and recorded rules have values', async () => {
    await assertOnlyExcepted(
      withoutRecord,
      recordings().map((rule) => ({ ...rule, key: rule.record })),
      async ({ record, expr }) => {
        await failure(record, scene.prometheus.now(expr));
        return (await scene.prometheus.now(record)).length > 0;
      },
    );
    for (const { name, expr } of alerts()) await failure(name, scene.prometheus.now(expr));
  });

  it('every series that a panel or rule is about is there', async () => {
    const expressions = [...targets, ...alerts(), ...recordings()].map(({ expr }) => concrete(expr));
    const selectors = [...new Set(expressions.flatMap(selectorsIn))].map((key) => ({ key }));
    assert.ok(selectors.length > 100);
    await assertOnlyExcepted(withoutSeries, selectors, async ({ key }) => {
      return (await failure(key, scene.prometheus.now(`last_over_time(${key}[10m])`))).length > 0;
    });
  });

  it('close reasons on panels lead to rows of README', async () => {
    const series = await scene.prometheus.now('keygate_connections_closed_total');
    assert.ok(series.length > 10);
    for (const { side, phase, reason } of series.map(({ metric }) => metric))
      assert.ok(readme.includes(`<a id="${side}-${phase}-${reason}"></a>`), `${side}/${phase}/${reason} has no anchor`);
  });

  it('promtool finds nothing to say about configuration, rules and the scrape', async () => {
    const scrape = (await scene.keygate.admin('/metrics')).body;
    for (const [args, input] of [
      [['check', 'config', '--lint-fatal', scene.prometheus.config], ''],
      [['check', 'rules', '--lint-fatal', alertsFile, recordingFile], ''],
      [['check', 'metrics'], scrape],
    ] as const) {
      const { exitCode, output } = await program('promtool', args, input);
      assert.equal(exitCode, 0, output);
      if (input !== '') assert.equal(output, '');
    }
  });
});

/** What panels are about, once: the last reload is refused, so that an alert fires. */
async function everythingThatCanHappen(scene: Scene): Promise<void> {
  const session = await scene.full();
  for (let count = 0; count < 5; count += 1) await scene.resumed(session);
  await scene.full({ version: 'TLSv1.2' });
  await scene.full({ listener: 'api', bytes: 100_000 });
  await scene.rsa();
  await scene.plainHttp();
  await scene.unknownName();
  await scene.refusedUpstream();
  await scene.overLimit();
  assert.ok((await scene.burst(30, 150)) > 0, 'nobody was refused');
  await scene.repair();
  await scene.wrongSignature();
  await scene.reload();
  await scene.refusedReload();
}

/** Fails on what is without an answer and not excepted, and on what is excepted and has an answer, or is not there at all. */
async function assertOnlyExcepted<Asked extends { readonly key: string }>(
  excepted: Readonly<Record<string, string>>,
  asked: readonly Asked[],
  hasAnswer: (one: Asked) => Promise<boolean>,
): Promise<void> {
  const silent: string[] = [];
  for (const one of asked) if (!(await hasAnswer(one))) silent.push(one.key);
  assert.deepEqual(
    [...new Set(silent)].toSorted(),
    Object.keys(excepted).toSorted(),
    'found is what had no answer, expected what the list of exceptions says',
  );
}

/** `name{labels}` for each series that an expression is about, with or without labels. */
function selectorsIn(expr: string): string[] {
  const names = /\b(?:keygate_|process_|nodejs_|scrape_|instance\w*:|up\b|ALERTS\b)[\w:]*(?:\{[^}]*\})?/g;
  return [...expr.matchAll(names)].map(([selector]) => {
    const chosen = selector.replaceAll(/\w+=~"\.\*",?/g, '').replace(/,\}$/, '}');
    return chosen.endsWith('}') ? chosen : `${chosen}{}`;
  });
}

/** As Grafana fills it in when everything is chosen. */
function concrete(expr: string): string {
  const values: Readonly<Record<string, string>> = { $__rate_interval: '5s', $__range: '2m' };
  return expr.replaceAll(/\$\w+/g, (name) => values[name] ?? '.*');
}

async function failure<Result>(what: string, asked: Promise<Result>): Promise<Result> {
  try {
    return await asked;
  } catch (error) {
    throw new Error(what, { cause: error });
  }
}
