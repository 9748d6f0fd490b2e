/**
 * Owns: giving up root once the sockets are bound. Workers are forked afterwards and inherit what is left.
 * Must not know: anything else.
 * Runs: main thread of the primary, once.
 */
import { userInfo } from 'node:os';
import type { Config } from '../config/config.ts';
import { ServiceError } from '../errors.ts';
import type { Log } from '../log.ts';

/** @throws ServiceError `privileges` when `user` is set and cannot be become. */
export function dropPrivileges(config: Config, log: Log): void {
  const isRoot = process.geteuid?.() === 0;
  const { user } = config;
  if (user === undefined) {
    if (isRoot) {
      log.warn({ event: 'privileges_kept' }, 'running as root: set `user` in the configuration');
    }
    return;
  }
  if (!isRoot) {
    return; // started as somebody already; systemd's User= or a shell decided who
  }
  const group = config.group ?? primaryGroupOf(user);
  try {
    // Node has it; its type declarations do not.
    (process as NodeJS.Process & { initgroups(user: string, group: string | number): void }).initgroups(user, group);
    process.setgid?.(group);
    process.setuid?.(user);
  } catch (cause) {
    throw new ServiceError('privileges', `cannot become user ${user}, group ${group}: ${String(cause)}`, { cause });
  }
  if (process.geteuid?.() === 0 || process.getegid?.() === 0) {
    throw new ServiceError('privileges', `still root after becoming user ${user}, group ${group}`);
  }
  log.info({ event: 'privileges_dropped', user, group }, 'privileges dropped');
}

/** Not always named like the user: nobody's is nogroup. Node looks up the effective user only, so become it for a moment. */
function primaryGroupOf(user: string): number {
  try {
    process.seteuid?.(user);
    return userInfo().gid;
  } catch (cause) {
    throw new ServiceError('privileges', `cannot become user ${user}: ${String(cause)}`, { cause });
  } finally {
    process.seteuid?.(0);
  }
}
