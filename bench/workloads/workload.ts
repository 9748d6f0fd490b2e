/**
 * Owns: what a workload is: how one round is measured on somebody who runs.
 * Must not know: any workload, any contender.
 * Runs: in the benchmark's process, which is idle while a round runs.
 */
import type { ContenderName } from '../contenders/contenders.ts';
import type { Keys } from '../keys.ts';
import type { UpstreamPlan } from '../load.ts';
import type { MetricName, Sample } from '../metrics.ts';
import type { Pinned } from '../processes.ts';
import type { Scenario, Setting } from '../scenarios.ts';

export type WorkloadName =
  | 'handshakes'
  | 'handshake-rate'
  | 'http-close'
  | 'http-keep-alive'
  | 'idle'
  | 'relay-up'
  | 'relay-down'
  | 'echo'
  | 'storm'
  | 'saturation'
  | 'overload'
  | 'reload';

export interface Workload {
  /** What every round has. The first is what subjects are compared by, and what is drawn. */
  readonly metrics: readonly MetricName[];
  /** What the upstream does with a connection (`keygate-load upstream --serve`). */
  readonly upstream: UpstreamKind;
  /** Where it listens and how it writes, where the usual will not do. */
  readonly upstreamPlan?: (scenario: Scenario) => UpstreamPlan;
  /** @throws when the subject does not do what the scenario says: who does less work must not win by it. */
  warmUp(running: Running, pace: Pace): Promise<void>;
  /** @throws as warmUp does, and when the subject dies. */
  round(running: Running, pace: Pace): Promise<Sample>;
}

export type UpstreamKind = 'line' | 'http' | 'echo' | 'sink' | 'source';

export interface Pace {
  /** 1..100. */
  readonly rounds: number;
  /** Of each subject in each round, 0.1..60. */
  readonly seconds: number;
  /** Clients, each with one connection at a time, 1..4096. */
  readonly connections: number;
}

/** A subject that accepts connections. */
export interface Running {
  readonly title: string;
  readonly contender: ContenderName;
  readonly scenario: Scenario;
  /** The scenario's, with what the subject varies. */
  readonly setting: Setting;
  readonly pinned: Pinned;
  /** `127.0.0.1:PORT`. */
  readonly address: string;
  /** keygate's admin server; others have none. */
  readonly adminAddress: string | undefined;
  readonly cores: Cores;
  readonly keys: Keys;
  readonly loadProgram: string;
}

/** Lists as taskset reads them. */
export interface Cores {
  readonly subject: readonly number[];
  readonly load: readonly number[];
}
