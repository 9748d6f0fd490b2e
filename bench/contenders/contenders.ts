/**
 * Owns: who can be measured.
 * Must not know: how any of them is configured or measured.
 * Runs: in the benchmark's process.
 *
 * All of them: as many workers as the setting says, its one version, suite and group, no TLS session cache where it can be
 * switched off, one session ticket per full handshake or none, no access log, the same certificate and private key, an
 * accept queue of 4096, the upstream over TCP by turns, no limit on idle connections within a run.
 */
import type { Contender } from './contender.ts';
import { haproxyFile } from './haproxy.ts';
import { hitchFile } from './hitch.ts';
import { keygate, keygateBefore } from './keygate.ts';
import { nginxFile, nginxSoftHsm } from './nginx.ts';
import { nodeFile } from './node.ts';
import { stunnelSoftHsm } from './stunnel.ts';

export const contenders = {
  keygate,
  'keygate-before': keygateBefore,
  'nginx-softhsm': nginxSoftHsm,
  'nginx-file': nginxFile,
  'haproxy-file': haproxyFile,
  'hitch-file': hitchFile,
  'stunnel-softhsm': stunnelSoftHsm,
  'node-file': nodeFile,
} as const satisfies Record<string, Contender>;

export type ContenderName = keyof typeof contenders;
