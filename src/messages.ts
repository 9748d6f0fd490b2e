/**
 * Owns: what primary and worker say to each other; they meet nowhere else.
 * Must not know: how either side does it.
 * Runs: types only; the values cross as structured clones (cluster's `advanced` serialization), so byte arrays stay bytes.
 */
import type { Config } from './config/config.ts';
import type { EngineSnapshot } from './engine/native.d.ts';
import type { ErrorCode, Problem } from './errors.ts';

/** A listening socket as a worker inherits it. */
export interface InheritedSocket {
  readonly listener: string;
  /** File descriptor in the worker. */
  readonly fd: number;
}

export type PrimaryMessage =
  /** The first message to every worker. `ticketSecrets`: 32 bytes each, the current epoch first. */
  | {
      readonly type: 'start';
      readonly config: Config;
      readonly sockets: readonly InheritedSocket[];
      readonly ticketSecrets: readonly Uint8Array[];
    }
  /** The epoch has changed. */
  | { readonly type: 'tickets'; readonly ticketSecrets: readonly Uint8Array[] }
  /** Accept from a sibling's sockets too, until it is back. */
  | { readonly type: 'adopt'; readonly sockets: readonly InheritedSocket[] }
  | { readonly type: 'release'; readonly sockets: readonly InheritedSocket[] }
  /** Accept nothing any more, let connections end, close the rest at the deadline, exit 0. */
  | { readonly type: 'drain'; readonly deadlineMs: number }
  /** What the worker measured last is known. */
  | { readonly type: 'leave' }
  /** Answer with `snapshot` and the same id. */
  | { readonly type: 'observe'; readonly id: number };

export type WorkerMessage =
  /** Said before each step of the start that can hang: "proving the tokens hsm-a, hsm-b". */
  | { readonly type: 'doing'; readonly what: string }
  /** The tokens are logged in, the keys proved, connections accepted. */
  | { readonly type: 'ready'; readonly warnings: readonly string[] }
  /** The worker cannot serve and exits. */
  | { readonly type: 'failed'; readonly failure: WorkerFailure }
  /** Every connection has ended; the worker waits for `leave`. */
  | { readonly type: 'ended'; readonly snapshot: EngineSnapshot }
  | { readonly type: 'snapshot'; readonly id: number; readonly snapshot: EngineSnapshot };

export interface WorkerFailure {
  readonly code: ErrorCode;
  readonly message: string;
  readonly hint: string | undefined;
  readonly exitCode: number;
  /** Of a ConfigError. */
  readonly problems: readonly Problem[] | undefined;
  /** No other worker may try: each try costs one of the PIN's few. */
  readonly haltsForking: boolean;
}
