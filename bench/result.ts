/**
 * Owns: the shape of a result file, writing and reading it.
 * Must not know: how anything was measured, how it is shown.
 * Runs: anywhere.
 */
import { mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import { dirname } from 'node:path';
import { z } from 'zod';
import { metrics } from './metrics.ts';
import type { MetricName } from './metrics.ts';

const metricName = z.enum(Object.keys(metrics) as [MetricName, ...MetricName[]]);
const sample = z.partialRecord(metricName, z.number());

const subjectResult = z.strictObject({
  contender: z.string(),
  title: z.string(),
  /** In the order in which they were measured. */
  rounds: z.array(sample).min(1),
});

/** As in scenarios.ts. */
const goal = z.strictObject({
  title: z.string(),
  metric: metricName,
  against: z.string().optional(),
  max: z.number().optional(),
  min: z.number().optional(),
});

const scenarioResult = z.strictObject({
  name: z.string(),
  title: z.string(),
  workload: z.string(),
  /** The first is what subjects are compared by. */
  metrics: z.array(metricName).min(1),
  subjects: z.array(subjectResult),
  /** Who was not measured, and why. */
  left_out: z.array(z.strictObject({ title: z.string(), reason: z.string() })),
  goals: z.array(goal),
  /** What its workload reads besides the setting; what differs between scenarios of one workload is the axis of a plot. */
  parameters: z.record(z.string(), z.union([z.number(), z.string()])).optional(),
});

const result = z.strictObject({
  format: z.literal(2),
  started_at: z.iso.datetime(),
  machine: z.strictObject({
    cpu: z.string(),
    /** Instructions that some of the libraries compute with and others do not. */
    cpu_flags: z.array(z.string()).optional(),
    cores: z.number(),
    memory_bytes: z.number(),
    kernel: z.string(),
    load_average: z.array(z.number()),
  }),
  pace: z.strictObject({ rounds: z.number(), seconds: z.number(), connections: z.number() }),
  /** By contender, and of the load. */
  versions: z.record(z.string(), z.record(z.string(), z.string())),
  scenarios: z.array(scenarioResult),
  /** What could not be measured, and the goals that nobody can judge for that reason. */
  failed: z.array(z.strictObject({ name: z.string(), reason: z.string(), goals: z.array(goal).optional() })),
});

export type GoalResult = z.infer<typeof goal>;
export type SubjectResult = z.infer<typeof subjectResult>;
export type ScenarioResult = z.infer<typeof scenarioResult>;
export type Result = z.infer<typeof result>;

export function writeResult(path: string, what: Result): void {
  mkdirSync(dirname(path), { recursive: true });
  // A number that a round could not have (a percentile of nothing) is absent; JSON would make it null.
  const known = (_: string, value: unknown) =>
    typeof value === 'number' && !Number.isFinite(value) ? undefined : value;
  writeFileSync(path, `${JSON.stringify(what, known, 1)}\n`);
}

/** @throws with the path and what is wrong in it. */
export function readResult(path: string): Result {
  let parsed: unknown;
  try {
    parsed = JSON.parse(readFileSync(path, 'utf8'));
  } catch (error) {
    throw new Error(`${path}: ${error instanceof Error ? error.message : String(error)}`, { cause: error });
  }
  const checked = result.safeParse(parsed);
  if (!checked.success) throw new Error(`${path}: not a result of npm run bench: ${z.prettifyError(checked.error)}`);
  return checked.data;
}
