/**
 * Owns: what a contender is, and what all of them need for their commands.
 * Must not know: any of them, how they are measured.
 * Runs: in the benchmark's process.
 */
import { existsSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import type { KeyFiles, Keys, TokenAccess } from '../keys.ts';
import { openFilesMax } from '../processes.ts';
import type { Command } from '../processes.ts';
import type { Setting } from '../scenarios.ts';
import type { Versions } from '../versions.ts';
import type { UpstreamKind } from '../workloads/workload.ts';

export interface Contender {
  readonly title: string;
  /** It has keygate's admin server, which is asked what it measured. */
  readonly isKeygate?: true;
  /** Debian's packages, and a file that each of them must have put there. */
  readonly needs: readonly Need[];
  readonly versions: () => Versions;
  /** Why it cannot do what the setting says; undefined when it can. Asked only when nothing that it needs is missing. */
  readonly cannot: (setting: Setting) => string | undefined;
  /** Writes its configuration and says how it is started. */
  readonly command: (place: Place) => Command;
}

export interface Need {
  /** Any one of them. */
  readonly files: readonly string[];
  readonly from: string;
}

export interface Place {
  readonly setting: Setting;
  readonly keys: Keys;
  /** The token, with the setting's latency. */
  readonly token: TokenAccess;
  /** Private to this subject and scenario; exists. */
  readonly directory: string;
  readonly port: number;
  /** For contenders that have an admin server. */
  readonly adminPort: number;
  /** One or more addresses of the same upstream: one has ports for 28,000 connections only. */
  readonly upstreams: readonly string[];
  readonly upstreamKind: UpstreamKind;
}

/** What is missing, and where it comes from; empty when all is there. */
export function missingNeeds(contender: Contender): readonly string[] {
  return contender.needs
    .filter(({ files }) => !files.some(existsSync))
    .map(({ files, from }) => `${files.join(' or ')} (${from})`);
}

/** What every contender is told where it has a word for it, so that they differ in nothing but themselves. */
export const backlog = 4096;
/** Longer than any round: an idle connection stays. */
export const idleSeconds = 3600;

export function filesOf(place: Place): KeyFiles {
  return place.keys.files[place.setting.key];
}

/** Readable by its owner only: some of them hold the PIN. */
export function write(place: Place, name: string, lines: readonly string[]): string {
  const path = join(place.directory, name);
  writeFileSync(path, `${lines.join('\n')}\n`, { mode: 0o600 });
  return path;
}

/** As many connections as the ports of the upstream's addresses and the open files allow: each takes two of these. */
export function connectionsMax(place: Place): number {
  return Math.min(portsPerAddress * place.upstreams.length, Math.floor((openFilesMax() - otherFiles) / 2));
}

const portsPerAddress = 28_000;
const otherFiles = 500;
