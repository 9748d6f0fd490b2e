/**
 * Owns: a program on the load's cores that says what happens: one JSON object per line, each with an `event`.
 * Must not know: what the program does.
 * Runs: in the benchmark's process.
 */
import { once } from 'node:events';
import { basename } from 'node:path';
import { createInterface } from 'node:readline';
import { Pinned } from './processes.ts';
import type { Command } from './processes.ts';

/**
 * Runs a program that says `started` and in the end `finished`.
 * @param started called when every client is warm and the clock starts.
 * @throws what the program said last when it gave up.
 */
export async function runProgram<Result extends object>(
  command: Command,
  cores: readonly number[],
  flags: Flags,
  started: () => void = () => {},
): Promise<Result> {
  const talk = new Talk(command, cores, flags);
  await talk.event('started');
  started();
  const result = await talk.event<Result>('finished');
  await talk.exit;
  return result;
}

export type Flags = Readonly<Record<string, string | number | boolean | undefined>>;

export class Talk {
  readonly pinned: Pinned;
  readonly exit: Promise<unknown>;
  readonly #said: AsyncIterator<string>;

  constructor(command: Command, cores: readonly number[], flags: Flags) {
    const args = [...command.args, ...argumentsOf(flags)];
    const name = [command.file, ...command.args].map((word) => basename(word)).join(' ');
    this.pinned = new Pinned(name, cores, { ...command, args });
    const { stdout } = this.pinned.child;
    if (stdout === null) throw new Error(`${this.pinned.name}: no pipe from its standard output`);
    this.exit = once(this.pinned.child, 'close');
    this.#said = createInterface({ input: stdout })[Symbol.asyncIterator]();
  }

  /**
   * The next event of a name; `others` hears those before it.
   * @throws what the program said last when it ends before.
   */
  async event<Event extends object>(name: string, others: (event: Said) => void = () => {}): Promise<Event> {
    for (;;) {
      const { value, done } = await this.#said.next();
      if (done === true) break;
      const event = JSON.parse(value) as Said;
      if (event.event === name) return event as unknown as Event;
      others(event);
    }
    await this.exit;
    throw new Error(this.pinned.obituary);
  }
}

interface Said {
  readonly event: string;
}

/** `{ serverName: 'x', resume: true }` becomes `--server-name x --resume`. */
function argumentsOf(flags: Flags): readonly string[] {
  return Object.entries(flags).flatMap(([name, value]) => {
    const flag = `--${name.replaceAll(/[A-Z]/g, (letter) => `-${letter.toLowerCase()}`)}`;
    if (value === undefined || value === false) return [];
    return value === true ? [flag] : [flag, String(value)];
  });
}
