/**
 * Owns: three hosts in network namespaces, with veth pairs for cables: a client, keygate between, and servers behind it. The
 * rules and routes of native-config/nftables are what keygate's host is set up with.
 * Must not know: what is tested.
 * Runs: in test processes, as root.
 */
import { execFileSync, spawnSync } from 'node:child_process';
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';

const native = join(import.meta.dirname, '../../native-config/nftables');

export const addresses = {
  client: { ipv4: '10.77.1.2', ipv6: 'fd77:1::2' },
  /** Towards the client. */
  keygate: { ipv4: '10.77.1.1', ipv6: 'fd77:1::1' },
  server: { ipv4: '10.77.2.2', ipv6: 'fd77:2::2' },
} as const;

export type Family = 'ipv4' | 'ipv6';
type Host = keyof typeof addresses;

/** For a test's `skip`: false, or why it cannot run here. */
export function whyNoNetwork(): string | false {
  if (process.geteuid?.() !== 0) return 'only root can make network namespaces';
  for (const [command, args] of [
    ['ip', ['-V']],
    ['nft', ['-v']],
  ] as const) {
    if (spawnSync(command, args).status !== 0) return `${command} is not installed`;
  }
  const tried = spawnSync('unshare', ['--net', 'nft', '-f', '-'], {
    input:
      'table inet t {\n chain c {\n type filter hook prerouting priority mangle\n socket transparent 1 accept\n }\n}\n',
    encoding: 'utf8',
  });
  return tried.status === 0 ? false : `this kernel has no network namespaces with nftables: ${tried.stderr.trim()}`;
}

export type Rules = 'redirect' | 'tproxy' | 'return';

export class Network implements Disposable {
  readonly #hosts: Readonly<Record<Host, string>>;
  readonly #directory = mkdtempSync(join(tmpdir(), 'keygate-network-'));

  constructor() {
    const name = (host: string) => `keygate-${process.pid}-${host}`;
    this.#hosts = { client: name('client'), keygate: name('keygate'), server: name('server') };
    try {
      this.#build();
    } catch (error) {
      this[Symbol.dispose]();
      throw error;
    }
  }

  /** What a command is begun with to run there. */
  on(host: Host): readonly string[] {
    return ['ip', 'netns', 'exec', this.#hosts[host]];
  }

  run(host: Host, command: string, ...args: readonly string[]): string {
    const [ip = '', ...rest] = this.on(host);
    return execFileSync(ip, [...rest, command, ...args], { encoding: 'utf8', stdio: ['ignore', 'pipe', 'pipe'] });
  }

  /** Loads one of the files as it is, for the interface that is here. In place of those before. */
  use(...all: readonly Rules[]): void {
    this.run('keygate', 'nft', 'flush', 'ruleset');
    for (const rules of all) {
      const text = readFileSync(join(native, `${rules}.nft`), 'utf8').replace('"eth0"', '"client"');
      this.rules(text);
    }
  }

  /** Beside those that are there. */
  rules(text: string): void {
    const file = join(this.#directory, 'rules.nft');
    writeFileSync(file, text);
    this.run('keygate', 'nft', '-f', file);
  }

  routes(change: 'up' | 'down'): void {
    this.run('keygate', join(native, 'routes'), change);
  }

  #build(): void {
    const { client, keygate, server } = this.#hosts;
    for (const host of [client, keygate, server]) {
      ip('netns', 'add', host);
      ip('-n', host, 'link', 'set', 'lo', 'up');
    }
    // Named after who is at the other end.
    ip('link', 'add', 'keygate', 'netns', client, 'type', 'veth', 'peer', 'name', 'client', 'netns', keygate);
    ip('link', 'add', 'keygate', 'netns', server, 'type', 'veth', 'peer', 'name', 'server', 'netns', keygate);
    for (const [host, device, net, own] of [
      [client, 'keygate', 1, 2],
      [keygate, 'client', 1, 1],
      [keygate, 'server', 2, 1],
      [server, 'keygate', 2, 2],
    ] as const) {
      ip('-n', host, 'addr', 'add', `10.77.${net}.${own}/24`, 'dev', device);
      ip('-n', host, 'addr', 'add', `fd77:${net}::${own}/64`, 'dev', device, 'nodad');
      ip('-n', host, 'link', 'set', device, 'up');
    }
    // keygate's host is the router of both.
    for (const [host, net] of [
      [client, 1],
      [server, 2],
    ] as const) {
      ip('-n', host, 'route', 'add', 'default', 'via', `10.77.${net}.1`);
      ip('-n', host, '-6', 'route', 'add', 'default', 'via', `fd77:${net}::1`);
    }
  }

  [Symbol.dispose](): void {
    // With a namespace go its interfaces, rules and routes.
    for (const host of Object.values(this.#hosts)) spawnSync('ip', ['netns', 'del', host], { stdio: 'ignore' });
    rmSync(this.#directory, { recursive: true, force: true });
  }
}

function ip(...args: readonly string[]): void {
  execFileSync('ip', args, { stdio: ['ignore', 'ignore', 'pipe'] });
}
