/**
 * Owns: starting processes that hold an engine, and how they end.
 * Must not know: what is tested.
 * Runs: in test processes.
 */
import assert from 'node:assert/strict';
import { fork } from 'node:child_process';
import type { ChildProcess } from 'node:child_process';
import { once } from 'node:events';
import type { TestContext } from 'node:test';
import type { EngineAnswer, EngineOrder, EngineParameters } from './engine-process-main.ts';
import type { ProvisionedToken } from './provisioned-token.ts';

export interface EngineProcess {
  readonly child: ChildProcess;
  order(order: EngineOrder): void;
  /** @throws when the process ends instead of answering */
  answer(): Promise<EngineAnswer>;
  /** How it ended: `exit 0`, `SIGKILL`; `hung` when it had to be killed because it did not end. */
  ended(): Promise<string>;
}

/** Of an engine that serves the certificate `www` of the token, and whose upstream nobody answers. */
export function engineParameters({ module, label, pin, certificates: { www } }: ProvisionedToken): EngineParameters {
  assert.ok(www !== undefined, 'the token has no certificate www');
  return { module, label, pin, chain: www.chain, keyLabel: 'www', lanes: 4, upstream: '127.0.0.1:1' };
}

export function startEngineProcess(
  test: TestContext,
  parameters: EngineParameters,
  env: Readonly<Record<string, string>>,
  account: { readonly uid?: number; readonly gid?: number } = {},
): EngineProcess {
  const child = fork(main, [JSON.stringify(parameters)], {
    env: { ...process.env, ...env },
    stdio: ['ignore', 'ignore', 'pipe', 'ipc'],
    ...account,
  });
  test.after(() => child.kill('SIGKILL'));
  let errors = '';
  child.stderr?.setEncoding('utf8').on('data', (text: string) => {
    errors += text;
  });
  const exit = once(child, 'exit') as Promise<[number | null, string | null]>;
  return {
    child,
    order: (order) => void child.send(order, () => {}), // one that has ended is seen by answer() or ended()
    async answer() {
      const [message] = await Promise.race([
        once(child, 'message') as Promise<[EngineAnswer]>,
        exit.then(([code, signal]) => {
          throw new Error(`the engine's process ended with ${code ?? signal} instead of answering: ${errors}`);
        }),
      ]);
      return message;
    },
    async ended() {
      let hung = false;
      const timer = setTimeout(() => {
        hung = true;
        child.kill('SIGKILL');
      }, endDeadlineMs);
      const [code, signal] = await exit;
      clearTimeout(timer);
      return hung ? 'hung' : (signal ?? `exit ${code}`);
    },
  };
}

const main = new URL('engine-process-main.ts', import.meta.url).pathname;
/** Far more than stopping takes, on a machine that does other things too. */
const endDeadlineMs = 15_000;
