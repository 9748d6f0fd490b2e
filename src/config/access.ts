/**
 * Owns: what to do about a file that the operating system refuses to open.
 * Must not know: what is in the file.
 * Runs: everywhere.
 */
import { userInfo } from 'node:os';

/** @param code of open(2); for anything but a refusal there is no hint. */
export function accessHint(code: string | undefined): { readonly hint?: string } {
  if (code !== 'EACCES' && code !== 'EPERM') return {};
  return {
    hint: `user ${userName()} must be allowed to read it and to enter the directories above it; workers are that user because of \`user\` in the configuration, or because of who started keygate`,
  };
}

function userName(): string {
  try {
    return userInfo().username;
  } catch {
    // An account without a name, as in containers.
    return `${process.geteuid?.()}`;
  }
}
