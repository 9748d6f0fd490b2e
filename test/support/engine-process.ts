/**
 * Owns: starting processes that hold an engine, and how they end.
 * Must not know: what is tested.
 * Runs: in test processes.
 */
import { fork } from 'node:child_process';
import type { ChildProcess } from 'node:child_process';
import { once } from 'node:events';
import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import type { TestContext } from 'node:test';
import { createSelfSigned } from '../../src/pkcs11/issue.ts';
import { generateKeyPair } from '../../src/pkcs11/provision.ts';
import type { GeneratedKind } from '../../src/pkcs11/provision.ts';
import type { EngineAnswer, EngineOrder, EngineParameters } from './engine-process-main.ts';
import { openDisposableToken } from './softhsm.ts';
import type { DisposableToken } from './softhsm.ts';

export interface EngineProcess {
  readonly child: ChildProcess;
  order(order: EngineOrder): void;
  /** @throws when the process ends instead of answering */
  answer(): Promise<EngineAnswer>;
  /** How it ended: `exit 0`, `SIGKILL`; `hung` when it had to be killed because it did not end. */
  ended(): Promise<string>;
}

export interface EngineToken {
  readonly disposable: DisposableToken;
  readonly parameters: EngineParameters;
}

/** A disposable token with one key and its certificate. */
export async function engineToken(test: TestContext, kind: GeneratedKind = 'p256'): Promise<EngineToken> {
  const { disposable, open } = openDisposableToken(test);
  const { key } = generateKeyPair(open, 'www', kind);
  const chain = join(disposable.directory, 'www.pem');
  writeFileSync(chain, await createSelfSigned(open, key, { dns: ['localhost'], ip: [] }, 30));
  const { module, label, pin } = disposable;
  return { disposable, parameters: { module, label, pin, chain, keyLabel: 'www', lanes: 4, upstream: '127.0.0.1:1' } };
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
