/**
 * Owns: who keygate is: finding the account that is configured, and giving up root for it.
 * Must not know: what needs root, what is done without it.
 * Runs: main thread of the primary, once its sockets are bound and before workers are forked, which inherit what is left;
 * and of `keygate check`, which looks at everything as the workers will.
 */
import { execFileSync } from 'node:child_process';
import type { Config } from '../config/config.ts';
import { engine } from '../engine/binding.ts';
import type { EngineBinding } from '../engine/binding.ts';
import { ServiceError } from '../errors.ts';
import type { Log } from '../log.ts';

/** An account of this host. */
interface Account {
  readonly user: string;
  readonly uid: number;
  /** The configured group, or the primary group of the user. */
  readonly gid: number;
}

/** Directories of accounts may be on the network. */
const lookupDeadlineMs = 10_000;

/** @param account what `becomeConfigured` returned. */
export function logPrivileges(account: Account | undefined, log: Log): void {
  if (account !== undefined) {
    log.info({ event: 'privileges_dropped', ...account }, 'privileges dropped');
  } else if (process.geteuid?.() === 0) {
    log.warn({ event: 'privileges_kept' }, 'running as root: set `user` in the configuration');
  }
}

/**
 * Becomes the configured account for good. When an upstream is transparent, one capability stays, for workers alone to use:
 * CAP_NET_RAW.
 * @returns undefined when there is nothing to do: no account is configured, or somebody else than root started keygate,
 * and systemd's User= or a shell has decided who.
 * @throws ServiceError `privileges`
 */
export function becomeConfigured(config: Pick<Config, 'user' | 'group' | 'upstreams'>): Account | undefined {
  if (config.user === undefined || process.geteuid?.() !== 0) return undefined;
  const account = findAccount(config.user, config.group);
  const { user, uid, gid } = account;
  const keepsOne = transparentUpstream(config) !== undefined;
  try {
    if (keepsOne) engine().keepCapabilitiesOverSetuid();
    // Node has it; its type declarations do not.
    (process as NodeJS.Process & { initgroups(user: string, group: number): void }).initgroups(user, gid);
    process.setgid?.(gid);
    process.setuid?.(uid);
  } catch (cause) {
    throw new ServiceError('privileges', `cannot become user ${user} (uid ${uid}, gid ${gid}): ${String(cause)}`, {
      cause,
      hint: 'keygate needs CAP_SETUID and CAP_SETGID for this; under systemd, User= does it instead of `user`',
    });
  }
  if (process.geteuid?.() === 0 || process.getegid?.() === 0) {
    throw new ServiceError('privileges', `still root after becoming user ${user} (uid ${uid}, gid ${gid})`, {
      hint: 'name a user and a group that are not root',
    });
  }
  if (keepsOne) {
    try {
      engine().handDownNetRaw();
    } catch (cause) {
      throw new ServiceError('privileges', `cannot keep CAP_NET_RAW as user ${user}: ${String(cause)}`, {
        cause,
        hint: transparencyHint,
      });
    }
  }
  return account;
}

/**
 * Asks the kernel for what the workers will ask of it: a socket with a client's address.
 * @throws ServiceError `privileges`, naming the upstream
 */
export function demandTransparency(config: Pick<Config, 'upstreams'>, native: EngineBinding): void {
  const upstream = transparentUpstream(config);
  if (upstream === undefined) return;
  try {
    native.probeForeignAddress();
  } catch (cause) {
    throw new ServiceError(
      'privileges',
      `upstream ${upstream} is transparent, for which this process lacks CAP_NET_RAW: ${String(cause)}`,
      { cause, hint: transparencyHint },
    );
  }
}

const transparencyHint =
  'start as root with `user`, and in a container with CAP_NET_RAW; under systemd: AmbientCapabilities=CAP_NET_RAW. A reload cannot get it';

function transparentUpstream({ upstreams }: Pick<Config, 'upstreams'>): string | undefined {
  return Object.values(upstreams).find(({ transparent }) => transparent)?.name;
}

/** @throws ServiceError `privileges`, telling an unknown user and an unknown group apart. */
export function findAccount(user: string, group?: string): Account {
  // passwd(5): name, password, uid, gid, ...
  const [, , uid, primaryGid] = lookUp('passwd', user) ?? [];
  if (uid === undefined) {
    throw new ServiceError('privileges', `user: found ${user}, expected an account of this host`, {
      hint: `create it (useradd --system --user-group ${user}), or correct \`user\``,
    });
  }
  if (group === undefined) return { user, uid: Number(uid), gid: Number(primaryGid) };
  // group(5): name, password, gid, ...
  const [, , gid] = lookUp('group', group) ?? [];
  if (gid === undefined) {
    throw new ServiceError('privileges', `group: found ${group}, expected a group of this host`, {
      hint: `create it (groupadd --system ${group}), or leave \`group\` out for the primary group of ${user}`,
    });
  }
  return { user, uid: Number(uid), gid: Number(gid) };
}

/** Asks the name service switch, which knows more than /etc/passwd. @returns undefined when there is no such name. */
function lookUp(database: 'passwd' | 'group', name: string): string[] | undefined {
  try {
    const stdio = ['ignore', 'pipe', 'pipe'] as const;
    return execFileSync('getent', [database, name], { encoding: 'utf8', timeout: lookupDeadlineMs, stdio: [...stdio] })
      .trim()
      .split(':');
  } catch (cause) {
    // getent(1): one of the names is not in the database.
    if ((cause as { status?: number | null }).status === 2) return undefined;
    throw new ServiceError('privileges', `cannot look up ${name} in ${database}: ${String(cause)}`, {
      cause,
      hint: `see what \`getent ${database} ${name}\` says`,
    });
  }
}
