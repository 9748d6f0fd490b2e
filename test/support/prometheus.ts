/**
 * Owns: a real Prometheus in a directory of its own, with the project's configuration and rules: its start, its answers, its end.
 * Must not know: which rules and metrics there are.
 * Runs: in test processes, and for the pictures of the dashboards.
 */
import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import type { ChildProcess } from 'node:child_process';
import { once } from 'node:events';
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { parse, stringify } from 'yaml';
import { freePort } from '../../bench/processes.ts';
import { prometheusConfig } from '../../grafana/rules.ts';
import { until } from './until.ts';

export interface Series {
  readonly metric: Readonly<Record<string, string>>;
  /** Seconds and value. One of an instant, several of a range. */
  readonly points: readonly (readonly [seconds: number, value: number])[];
}

export interface Range {
  readonly startSeconds: number;
  readonly endSeconds: number;
  readonly stepSeconds: number;
}

const startDeadlineMs = 20_000;

/** Scrapes `target`, `host:port`, as often as it can, as the one target of the project's own configuration. */
export async function startPrometheus(target: string, intervalMs: number): Promise<Prometheus> {
  const directory = mkdtempSync(join(tmpdir(), 'keygate-prometheus-'));
  const config = join(directory, 'prometheus.yml');
  writeFileSync(config, stringify(configurationFor(target, intervalMs)));
  const port = await freePort();
  const child = spawn(
    // It must not outlive a test process that is killed (setpriv(1) becomes it).
    'setpriv',
    [
      '--pdeathsig=KILL',
      'prometheus',
      `--config.file=${config}`,
      `--storage.tsdb.path=${join(directory, 'data')}`,
      `--web.listen-address=127.0.0.1:${port}`,
      '--log.level=warn',
    ],
    { stdio: ['ignore', 'ignore', 'pipe'] },
  );
  const prometheus = new Prometheus(child, directory, config, `http://127.0.0.1:${port}`);
  try {
    await prometheus.ready();
  } catch (error) {
    await prometheus.stop();
    throw error;
  }
  return prometheus;
}

export class Prometheus {
  /** The configuration file. */
  readonly config: string;
  readonly #url: string;
  readonly #child: ChildProcess;
  readonly #directory: string;
  readonly #exit: Promise<unknown>;
  #said = '';

  constructor(child: ChildProcess, directory: string, config: string, url: string) {
    [this.#child, this.#directory, this.config, this.#url] = [child, directory, config, url];
    child.stderr?.setEncoding('utf8').on('data', (text: string) => {
      this.#said += text;
    });
    child.once('error', (error) => {
      this.#said += String(error);
    });
    this.#exit = once(child, 'close').catch(() => {});
  }

  async ready(): Promise<void> {
    await until(
      'answer of Prometheus',
      async () => {
        assert.ok(this.#child.exitCode === null && this.#child.pid !== undefined, `Prometheus ended: ${this.#said}`);
        try {
          return (await fetch(`${this.#url}/-/ready`)).ok;
        } catch {
          return false; // does not listen yet
        }
      },
      { deadlineMs: startDeadlineMs, found: () => this.#said },
    );
  }

  /** As it is now. @throws what Prometheus says of the expression */
  async now(expr: string): Promise<readonly Series[]> {
    return seriesOf(await this.#ask('query', { query: expr }));
  }

  async over(expr: string, { startSeconds, endSeconds, stepSeconds }: Range): Promise<readonly Series[]> {
    const range = { start: String(startSeconds), end: String(endSeconds), step: String(stepSeconds) };
    return seriesOf(await this.#ask('query_range', { query: expr, ...range }));
  }

  /** Every value that a label has in the series that match. */
  async values(label: string, series: string): Promise<readonly string[]> {
    return (await this.#ask(`label/${label}/values`, { 'match[]': series })) as readonly string[];
  }

  /** Resolves with the answer when the expression has one. */
  async answered(expr: string, deadlineMs = 20_000): Promise<readonly Series[]> {
    return until(
      `answer to ${expr}`,
      async () => {
        const series = await this.now(expr);
        return series.length > 0 && series;
      },
      { deadlineMs },
    );
  }

  async stop(): Promise<void> {
    this.#child.kill('SIGTERM');
    await this.#exit;
    rmSync(this.#directory, { recursive: true, force: true });
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.stop();
  }

  async #ask(path: string, parameters: Readonly<Record<string, string>>): Promise<unknown> {
    const response = await fetch(`${this.#url}/api/v1/${path}?${new URLSearchParams(parameters).toString()}`);
    const answer = (await response.json()) as Answer;
    if (answer.status !== 'success')
      throw new Error(`${answer.error ?? response.status}: ${JSON.stringify(parameters)}`);
    return answer.data;
  }
}

interface Answer {
  readonly status: string;
  readonly error?: string;
  readonly data?: unknown;
}

interface Result {
  readonly result: readonly {
    readonly metric: Readonly<Record<string, string>>;
    readonly value?: readonly [number, string];
    readonly values?: readonly (readonly [number, string])[];
  }[];
}

/** Without what is not a number: 0/0 is no data. */
function seriesOf(data: unknown): readonly Series[] {
  return (data as Result).result
    .map(({ metric, value, values = value === undefined ? [] : [value] }) => ({
      metric,
      points: values
        .map(([seconds, text]) => [seconds, Number(text)] as const)
        .filter(([, value]) => !Number.isNaN(value)),
    }))
    .filter(({ points }) => points.length > 0);
}

interface Configuration {
  readonly global: object;
  readonly rule_files: readonly string[];
  readonly scrape_configs: readonly { readonly job_name: string }[];
}

/** The one that people copy, with another target and without their patience. */
function configurationFor(target: string, intervalMs: number): Configuration {
  const theirs = parse(readFileSync(prometheusConfig, 'utf8')) as Configuration;
  const [job, ...others] = theirs.scrape_configs;
  assert.ok(job !== undefined && others.length === 0, `${prometheusConfig} has more than one scrape job`);
  return {
    ...theirs,
    global: {
      scrape_interval: `${intervalMs}ms`,
      scrape_timeout: `${intervalMs}ms`,
      evaluation_interval: `${intervalMs}ms`,
    },
    rule_files: theirs.rule_files.map((glob) => join(prometheusConfig, '..', glob)),
    scrape_configs: [{ ...job, static_configs: [{ targets: [target] }] } as Configuration['scrape_configs'][number]],
  };
}
