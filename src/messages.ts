/**
 * Owns: what primary and worker say to each other; they meet nowhere else.
 * Must not know: how either side does it.
 * Runs: types only; the values cross as structured clones (cluster's `advanced` serialization), so byte arrays stay bytes.
 */
import type { Config, LogLevel } from './config/config.ts';
import type { EngineSnapshot, SandboxReport } from './engine/native.d.ts';
import type { ErrorCode, Problem } from './errors.ts';
import type { LogCounts } from './log.ts';

/** A listening socket has the same number in the primary and in every worker, whatever its descriptor is there. */
export interface SocketUse {
  readonly socket: number;
  /** For whom it accepts. */
  readonly listener: string;
}

/** What a certificate is served with. */
export interface Staple {
  /** SHA-256 of the first certificate of a chain, DER: a name may be of another certificate in the next configuration. */
  readonly leaf: Uint8Array;
  /** An OCSP response in DER; undefined: none any more. */
  readonly response: Uint8Array | undefined;
}

/** A PIN that a token refused, as the workers of one keygate know it: 32 bytes made with their secret. */
export interface PinRefusal {
  readonly digest: Uint8Array;
  readonly ckr: number;
}

export type PrimaryMessage =
  /** The first message to every worker. `ticketSecrets`: 32 bytes each, the current epoch first. */
  | {
      readonly type: 'start';
      readonly config: Config;
      /** All sockets of all workers, as the worker inherits them from descriptor `firstFd` on. */
      readonly sockets: readonly number[];
      readonly firstFd: number;
      /** The channel through which sockets come later. */
      readonly handoverFd: number;
      /** Those of the worker's own slot. */
      readonly accept: readonly SocketUse[];
      readonly ticketSecrets: readonly Uint8Array[];
      /** 32 bytes with which workers tell each other of PINs that were presented. */
      readonly refusalSecret: Uint8Array;
      /** What workers that are no more knew of them. */
      readonly refusals: readonly PinRefusal[];
      /** Also of certificates that are not served yet. */
      readonly staples: readonly Staple[];
    }
  /** The epoch has changed. */
  | { readonly type: 'tickets'; readonly ticketSecrets: readonly Uint8Array[] }
  /** Those that have changed. */
  | { readonly type: 'staples'; readonly staples: readonly Staple[] }
  /** Accept from a sibling's sockets too, until it is back. */
  | { readonly type: 'adopt'; readonly accept: readonly SocketUse[] }
  | { readonly type: 'release'; readonly sockets: readonly number[] }
  /** Nobody has these any more: accept what waits there and close them, then answer with `retired`. */
  | { readonly type: 'retire'; readonly sockets: readonly number[] }
  /** First phase of a reload: make this ready aside, and answer with `prepared` or `refused`. */
  | {
      readonly type: 'prepare';
      readonly reload: number;
      readonly config: Config;
      /** New ones, in the order in which the handover channel has them. */
      readonly sockets: readonly number[];
      readonly accept: readonly SocketUse[];
    }
  /** Second phase: what was prepared serves from now on; answer with `committed`. */
  | { readonly type: 'commit'; readonly reload: number }
  /** Or not. */
  | { readonly type: 'discard'; readonly reload: number }
  /** Their files may have been renamed. */
  | { readonly type: 'reopen-logs' }
  /** Accept nothing any more, let connections end, close the rest at the deadline, exit 0. */
  | { readonly type: 'drain'; readonly deadlineMs: number }
  /** What the worker measured last is known. */
  | { readonly type: 'leave' }
  /** Until a reload commits its own. */
  | { readonly type: 'log-level'; readonly level: LogLevel }
  /** Answer with `snapshot` and the same id. */
  | { readonly type: 'observe'; readonly id: number };

export type WorkerMessage =
  /** Said before each step of a start or a reload that can hang: "proving the tokens hsm-a, hsm-b". */
  | { readonly type: 'doing'; readonly what: string }
  /** The tokens are logged in, the keys proved, connections accepted. */
  | { readonly type: 'ready'; readonly warnings: readonly string[]; readonly sandbox: WorkerSandbox | undefined }
  /** The worker cannot serve and exits. */
  | { readonly type: 'failed'; readonly failure: WorkerFailure; readonly refusals: readonly PinRefusal[] }
  | { readonly type: 'prepared'; readonly reload: number; readonly warnings: readonly string[] }
  /** The worker goes on with what it has. */
  | { readonly type: 'refused'; readonly reload: number; readonly failure: WorkerFailure }
  | { readonly type: 'committed'; readonly reload: number }
  | { readonly type: 'retired' }
  /** Said each second while it is so: it cannot mend a token that it needs, because calls into the module do not return. */
  | { readonly type: 'stuck'; readonly why: string }
  /** Every connection has ended; the worker waits for `leave`. */
  | { readonly type: 'ended'; readonly snapshot: WorkerSnapshot }
  | { readonly type: 'snapshot'; readonly id: number; readonly snapshot: WorkerSnapshot };

/** What a worker has measured. */
export interface WorkerSnapshot {
  readonly engine: EngineSnapshot;
  readonly process: ProcessUse;
  readonly logs: LogCounts;
}

/** What a worker uses of its host. */
export interface ProcessUse {
  /** Since it began, all threads; of these those of the I/O thread are `engine.ioCpuUs`. */
  readonly cpuUs: number;
  readonly residentBytes: number;
  readonly openFds: number;
  /** The longest time since the snapshot before that its JavaScript thread came too late. No connection waits for that thread. */
  readonly eventLoopLagMs: number;
}

/** What is in force in a worker; undefined where the configuration wants none. */
export type WorkerSandbox = Readonly<SandboxReport>;

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
