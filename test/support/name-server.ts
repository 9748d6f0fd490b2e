/**
 * Owns: a name server that can be made to fail, and what makes one program's lookups (getaddrinfo(3)) come to it.
 * Must not know: who asks.
 * Runs: in test processes, as root: on port 53 of a loopback address, and in a mount namespace of its own for the program.
 */
import { spawnSync } from 'node:child_process';
import { randomInt } from 'node:crypto';
import { createSocket } from 'node:dgram';
import type { Socket } from 'node:dgram';
import { once } from 'node:events';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { AUTHORITATIVE_ANSWER, decode, encode } from 'dns-packet';

/** For a test's `skip`: false, or why it cannot run here. */
export function whyNoNameServer(): string | false {
  if (process.geteuid?.() !== 0) return 'only root can give a program a resolv.conf of its own';
  const tried = spawnSync('unshare', ['--mount', ...mounting('/dev/null'), 'true'], { encoding: 'utf8' });
  return tried.status === 0 ? false : `no mount namespaces here: ${tried.stderr.trim()}`;
}

function mounting(file: string): readonly string[] {
  return ['sh', '-c', 'mount --bind "$0" /etc/resolv.conf && exec "$@"', file];
}

/** RFC 1035 4.1.1. */
const responseCodes = { truth: 0, unknown: 3 } as const;
/** The truth, that there is no such name, or nothing. */
type Saying = keyof typeof responseCodes | 'silence';

export class NameServer implements AsyncDisposable {
  /** What a program is begun with, to ask here; it becomes the program by exec. */
  readonly launcher: readonly string[];
  readonly #hosts: Readonly<Record<string, string>>;
  readonly #socket: Socket;
  #says: Saying = 'truth';
  readonly #directory = mkdtempSync(join(tmpdir(), 'keygate-names-'));

  /**
   * @param hosts IPv4 addresses by name
   * @param options of resolv.conf(5)
   */
  static async start(hosts: Readonly<Record<string, string>>, options = ''): Promise<NameServer> {
    // Somebody else on this machine may have port 53 of 127.0.0.1.
    const socket = createSocket('udp4').bind(53, `127.53.${randomInt(256)}.${randomInt(1, 255)}`);
    await once(socket, 'listening');
    return new NameServer(socket, hosts, options);
  }

  private constructor(socket: Socket, hosts: Readonly<Record<string, string>>, options: string) {
    this.#socket = socket;
    this.#hosts = hosts;
    const file = join(this.#directory, 'resolv.conf');
    writeFileSync(file, `nameserver ${socket.address().address}\n${options === '' ? '' : `options ${options}\n`}`);
    this.launcher = ['unshare', '--mount', ...mounting(file)];
    socket.on('message', (message, { address, port }) => {
      if (this.#says !== 'silence') socket.send(this.#reply(message, responseCodes[this.#says]), port, address);
    });
  }

  /** From now on. At first: the truth. */
  answer(says: Saying): void {
    this.#says = says;
  }

  #reply(message: Buffer, responseCode: number): Buffer {
    const { id = 0, questions = [] } = decode(message);
    const answers = questions.flatMap(({ name, type }) => {
      const data = this.#hosts[name];
      // Of a name that is there and has no address of this family nothing is said.
      if (responseCode !== 0 || type !== 'A' || data === undefined) return [];
      return [{ type, name, ttl: 1, data } as const];
    });
    return encode({ type: 'response', id, flags: AUTHORITATIVE_ANSWER | responseCode, questions, answers });
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#socket.close();
    await once(this.#socket, 'close');
    rmSync(this.#directory, { recursive: true, force: true });
  }
}
