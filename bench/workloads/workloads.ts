/**
 * Owns: the table of workloads.
 * Must not know: what any of them does.
 * Runs: in the benchmark's process.
 */
import { echo } from './echo.ts';
import { handshakeRate, handshakes, httpClose } from './handshakes.ts';
import { httpKeepAlive } from './http-keep-alive.ts';
import { idle } from './idle.ts';
import { overload } from './overload.ts';
import { relayDown, relayUp } from './relay.ts';
import { reload } from './reload.ts';
import { saturation } from './saturation.ts';
import { storm } from './storm.ts';
import type { Workload, WorkloadName } from './workload.ts';

export const workloads: Readonly<Record<WorkloadName, Workload>> = {
  handshakes,
  'handshake-rate': handshakeRate,
  'http-close': httpClose,
  'http-keep-alive': httpKeepAlive,
  idle,
  'relay-up': relayUp,
  'relay-down': relayDown,
  echo,
  storm,
  saturation,
  overload,
  reload,
};
