/**
 * Owns: foreign programs that serve while a test lasts, and end with it.
 * Must not know: what they serve.
 * Runs: in test processes; the programs are children.
 */
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { until } from './until.ts';

export interface Daemon extends AsyncDisposable {
  readonly pid: number;
  /** Standard output and standard error so far. */
  readonly said: string;
  end(): Promise<void>;
}

/**
 * Resolves when it is ready.
 * @throws what it said, when it ends instead
 */
export async function startDaemon(
  command: string,
  args: readonly string[],
  isReady: (daemon: Daemon) => boolean | Promise<boolean>,
): Promise<Daemon> {
  // It must not outlive a test process that is killed (setpriv(1) becomes it).
  const child = spawn('setpriv', ['--pdeathsig=TERM', command, ...args], {
    stdio: ['ignore', 'pipe', 'pipe'],
  });
  let said = '';
  for (const stream of [child.stdout, child.stderr])
    stream.setEncoding('utf8').on('data', (chunk: string) => (said += chunk));
  const closed = once(child, 'close');
  const hasEnded = () => child.exitCode !== null || child.signalCode !== null;
  const end = async () => {
    if (!hasEnded()) child.kill('SIGTERM');
    await closed;
  };
  const daemon: Daemon = {
    pid: child.pid ?? 0,
    get said() {
      return said;
    },
    end,
    [Symbol.asyncDispose]: end,
  };
  try {
    await until(
      `${command} that is ready`,
      async () => {
        if (hasEnded()) throw new Error(`${command} ended: ${said}`);
        return isReady(daemon);
      },
      { found: () => said },
    );
    return daemon;
  } catch (error) {
    await end();
    throw error;
  }
}
