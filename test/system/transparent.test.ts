/**
 * Owns: transparent mode, as client and server see it: clients redirected to keygate reach whom they meant, and servers see who
 * the client is. Over IPv4 and IPv6, by REDIRECT and by TPROXY, with the rules of native-config, and by workers that have given
 * up root.
 * Must not know: how sockets are made.
 * Runs: in a test process as root, with keygate, client and server each in a network namespace.
 */
import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { chmodSync, chownSync, readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { after, before, describe, it } from 'node:test';
import { refusedKeygate, startKeygate } from '../support/keygate.ts';
import type { Keygate, KeygateDocument, LogLine } from '../support/keygate.ts';
import { addresses, Network, whyNoNetwork } from '../support/network.ts';
import type { Family } from '../support/network.ts';
import { whyNotNobody } from '../support/nobody.ts';
import { provisionedToken } from '../support/provisioned-token.ts';
import type { ProvisionedToken } from '../support/provisioned-token.ts';
import { program } from '../support/tls-client.ts';
import { until } from '../support/until.ts';

const bind = ['0.0.0.0:8443', '[::]:8443'];
const families = ['ipv4', 'ipv6'] as const;
/** CAP_NET_RAW, as /proc/PID/status has it. */
const netRaw = '0000000000002000';

describe('transparent mode', { skip: whyNoNetwork() || whyNotNobody(), timeout: 110_000 }, () => {
  const fixtures = new AsyncDisposableStack();
  let token: ProvisionedToken;
  let network: Network;
  let document: KeygateDocument;
  let keygate: Keygate;

  before(async () => {
    network = fixtures.use(new Network());
    token = fixtures.use(await provisionedToken({ ec: { kind: 'p256', dns: ['www.example.org'] } }));
    giveToNobody(token.directory);
    fixtures.use(await startServer(network));
    network.routes('up');
    document = {
      user: 'nobody',
      workers: 2,
      log: { access: {} },
      admin: { listen: `unix:${join(token.directory, 'admin.sock')}` },
      upstreams: {
        original: { servers: ['original'], transparent: true, connectDeadline: '2s' },
        plain: { servers: ['original'], proxyProtocol: 'v1' },
        bare: { servers: ['original'] },
        fixed: { servers: [`${addresses.server.ipv4}:443`, `[${addresses.server.ipv6}]:443`], transparent: true },
      },
      listeners: {
        https: { bind, transparent: true, upstream: 'original' },
        plain: { bind: ['0.0.0.0:8444', '[::]:8444'], transparent: true, upstream: 'plain' },
        bare: { bind: ['0.0.0.0:8446', '[::]:8446'], transparent: true, upstream: 'bare' },
        fixed: { bind: ['0.0.0.0:8445', '[::]:8445'], upstream: 'fixed' },
      },
    };
    keygate = fixtures.use(await startKeygate(token, document, { launcher: network.on('keygate') }));
  });
  after(async () => fixtures.disposeAsync());

  for (const rules of ['redirect', 'tproxy'] as const) {
    for (const family of families) {
      it(`by ${rules.toUpperCase()}, a server sees the client's ${family} address, and the log whom it meant`, async () => {
        network.use(...(rules === 'redirect' ? (['redirect', 'return'] as const) : (['tproxy'] as const)));
        const since = keygate.log.length;
        const { seen } = await ask(family, 443);
        assert.equal(seen, addresses.client[family]);
        const line = await keygate.logged({ event: 'connection', listener: 'https' }, { since });
        assert.equal(line['destination'], place(addresses.server[family], 443));
        assert.ok(String(line['client']).startsWith(place(addresses.client[family], '')), JSON.stringify(line));
        assert.equal(line['server'], 'original');
      });

      it(`by ${rules.toUpperCase()}, the PROXY header says whom an ${family} client meant`, async () => {
        network.use(rules);
        redirectAlso(rules, 444, 8444);
        const { seen, line } = await ask(family, 444);
        assert.notEqual(seen, addresses.client[family], 'this upstream is not transparent');
        const client = addresses.client[family];
        const wanted = `PROXY TCP${family.at(-1)} ${client} ${addresses.server[family]} `;
        assert.ok(line.startsWith(wanted) && line.endsWith(' 444'), line);
      });
    }
  }

  for (const family of families) {
    it(`a server that is named sees the client's ${family} address too`, async () => {
      network.use('return');
      const { seen } = await ask(family, 8445, addresses.keygate[family]);
      assert.equal(seen, addresses.client[family]);
    });

    it(`an ${family} client that came by itself is not led in a circle`, async () => {
      network.use('return');
      for (const [port, listener] of [
        [8443, 'https'],
        [8444, 'plain'],
      ] as const) {
        assert.deepEqual(await endOf(listener, async () => ask(family, port, addresses.keygate[family])), loop);
      }
    });

    it(`rules that catch keygate's own ${family} connections lead to no circle`, async () => {
      network.use('redirect', 'return');
      redirectAlso('redirect', 446, 8446);
      network.rules(`table inet circle {
        chain output {
          type nat hook output priority -100
          tcp dport 443 redirect to :8443
          tcp dport 446 redirect to :8446
        }
      }`);
      // With the client's address as its source, the connection that turns back is one that the kernel does not deliver.
      for (const [port, listener] of [
        [446, 'bare'],
        [443, 'https'],
      ] as const) {
        // TLS in TLS, so that the handshake with keygate's own connection succeeds and it would connect once more.
        const since = keygate.log.length;
        await assert.rejects(async () => ask(family, port, addresses.server[family], 'nested'));
        if (listener === 'bare') await keygate.logged({ event: 'connection', listener, ...loop }, { since });
        const isFirst = (line: LogLine) => line.event === 'connection' && line['reason'] !== 'loop';
        await until('end of the connection that came first', () => keygate.log.slice(since).some(isFirst));
        const ended = keygate.log.slice(since).filter(({ event }) => event === 'connection');
        assert.equal(ended.length, listener === 'bare' ? 2 : 1, JSON.stringify(ended));
      }
    });
  }

  it('workers have that one capability and no other, and pass it on to nobody', async () => {
    const workers = await keygate.workers();
    for (const pid of [keygate.pid, ...workers.map((worker) => worker.pid)]) {
      assert.equal(statusOf(pid, 'CapEff'), netRaw);
      assert.equal(statusOf(pid, 'CapPrm'), netRaw);
    }
    for (const { pid } of workers) assert.equal(statusOf(pid, 'CapAmb'), '0'.repeat(16));
  });

  it('a worker that is started later has it too', async () => {
    network.use('tproxy');
    const since = keygate.log.length;
    for (const { pid } of await keygate.workers()) process.kill(pid, 'SIGKILL');
    for (const worker of [0, 1]) await keygate.logged({ event: 'worker_ready', worker }, { since });
    for (let client = 0; client < 8; client += 1) {
      assert.equal((await ask('ipv4', 443)).seen, addresses.client.ipv4);
    }
  });

  it('is refused at start without the capability', async () => {
    const { upstreams } = document;
    const others = { one: { bind: ['127.0.0.1:0'], upstream: 'fixed' } };
    const root = [...network.on('keygate'), 'setpriv', '--bounding-set=-net_raw,-net_admin'];
    const listeners = { one: { bind: ['127.0.0.1:0'], transparent: true, upstream: 'original' } };
    const listening = await refusedKeygate(token, { ...document, upstreams, listeners }, { launcher: root });
    assert.match(listening.stderr, /bind_failed: listener one.*EPERM.*\n.*CAP_NET_RAW/);
    const connecting = await refusedKeygate(token, { ...document, listeners: others }, { launcher: root });
    assert.match(connecting.stderr, /privileges: cannot keep CAP_NET_RAW as user nobody/);
    const nobodys = await refusedKeygate(token, { ...document, listeners: others }, { launcher: asNobody('') });
    assert.match(nobodys.stderr, /privileges: upstream original is transparent, .* CAP_NET_RAW/);
  });

  it('works for who never was root and was given the capability, as by systemd', async () => {
    network.use('return');
    const listeners = { one: { bind: ['0.0.0.0:8447'], upstream: 'fixed' } };
    const admin = { listen: `unix:${join(token.directory, 'nobody.sock')}` };
    const launcher = asNobody('--inh-caps=+net_raw --ambient-caps=+net_raw');
    await using other = await startKeygate(token, { ...document, user: undefined, admin, listeners }, { launcher });
    assert.equal(other.port('one'), 8447);
    assert.equal((await ask('ipv4', 8447, addresses.keygate.ipv4)).seen, addresses.client.ipv4);
  });

  it('a reload that needs the capability is refused where it was not kept', async () => {
    const without = {
      ...document,
      admin: { listen: `unix:${join(token.directory, 'other.sock')}` },
      upstreams: { fixed: { servers: [`${addresses.server.ipv4}:443`] } },
      listeners: { fixed: { bind: ['127.0.0.1:0'] } },
    };
    await using other = await startKeygate(token, without, { launcher: network.on('keygate') });
    for (const { pid } of await other.workers()) assert.equal(statusOf(pid, 'CapEff'), '0'.repeat(16));
    const upstreams = { fixed: { servers: [`${addresses.server.ipv4}:443`], transparent: true } };
    other.configure({ ...without, upstreams });
    giveToNobody(token.directory);
    const report = await other.reload();
    assert.deepEqual([report.outcome, report.reasons[0]?.code], ['refused', 'config_restart']);
  });

  const loop = { side: 'proxy', phase: 'connect', reason: 'loop' };

  /** Becomes nobody before it becomes keygate. */
  function asNobody(options: string): readonly string[] {
    const become = `setpriv --reuid=nobody --regid=nogroup --clear-groups ${options}`;
    const script = `chown -R nobody:nogroup "$0" && exec ${become} "$@"`;
    return [...network.on('keygate'), 'sh', '-c', script, token.directory];
  }

  /** How the next connection of a listener ends, whose client gets no answer. */
  async function endOf(listener: string, asks: () => Promise<unknown>) {
    const since = keygate.log.length;
    await assert.rejects(asks);
    const { side, phase, reason }: LogLine = await keygate.logged({ event: 'connection', listener }, { since });
    return { side, phase, reason };
  }

  /** A second port, for another listener. */
  function redirectAlso(rules: 'redirect' | 'tproxy', port: number, to: number): void {
    network.rules(
      rules === 'redirect'
        ? `table inet also {
             chain prerouting {
               type nat hook prerouting priority dstnat
               iifname client fib daddr type != local tcp dport ${port} redirect to :${to}
             }
           }`
        : `table inet also {
             chain prerouting {
               type filter hook prerouting priority mangle - 1
               meta l4proto tcp socket transparent 1 meta mark set 1 accept
               iifname client fib daddr type != local tcp dport ${port} tproxy to :${to} meta mark set 1 accept
             }
           }`,
    );
  }

  /** What the server answers to a TLS client in the client's namespace. @throws when it gets no answer */
  async function ask(family: Family, port: number, host: string = addresses.server[family], nested = '') {
    const [command = '', ...args] = network.on('client');
    const { exitCode, output } = await program(command, [
      ...args,
      process.execPath,
      '-e',
      clientScript,
      host,
      `${port}`,
      nested,
    ]);
    assert.equal(exitCode, 0, output);
    const [seen = '', line = ''] = output.trim().split('|');
    return { seen, line };
  }
});

/** Says something, and prints what comes back. */
const clientScript = `
  const { connect } = require('node:tls');
  const [host, port, nested] = process.argv.slice(1);
  const options = { rejectUnauthorized: false, servername: 'www.example.org' };
  const outer = connect({ host, port, ...options });
  outer.on('error', (error) => { console.log(error.code); process.exit(1); });
  const socket = nested ? connect({ socket: outer, ...options }) : outer;
  socket.on('close', () => process.exit(3));
  socket.setTimeout(10_000, () => process.exit(2));
  socket.on('error', (error) => { console.log(error.code); process.exit(1); });
  let answer = '';
  socket.on('secureConnect', () => socket.write('hello\\n'));
  socket.on('data', (chunk) => { answer += chunk; });
  socket.on('end', () => { console.log(answer); process.exit(answer === '' ? 1 : 0); });
`;

/** Answers the first line of every connection with who it came from, and that line. */
const serverScript = `
  for (const port of [443, 444]) {
    require('node:net').createServer((socket) => {
      socket.on('error', () => {});
      socket.once('data', (data) => {
        socket.end(socket.remoteAddress.replace('::ffff:', '') + '|' + data.toString().split('\\r\\n')[0].split('\\n')[0] + '\\n');
      });
    }).listen({ host: '::', port }, () => console.log('listening'));
  }
`;

async function startServer(network: Network): Promise<AsyncDisposable> {
  const [command = '', ...args] = network.on('server');
  const child = spawn(command, [...args, process.execPath, '-e', serverScript], {
    stdio: ['ignore', 'pipe', 'inherit'],
  });
  // A line for each port; both may come at once.
  const lines = createInterface({ input: child.stdout });
  const { promise: isListening, resolve } = Promise.withResolvers<void>();
  let ports = 0;
  lines.on('line', () => {
    ports += 1;
    if (ports === 2) resolve();
  });
  await isListening;
  return {
    async [Symbol.asyncDispose]() {
      const ended = once(child, 'exit');
      child.kill('SIGTERM');
      await ended;
    },
  };
}

function giveToNobody(path: string): void {
  const [uid, gid] = [65_534, 65_534];
  chownSync(path, uid, gid);
  chmodSync(path, 0o700);
  for (const entry of readdirSync(path, { withFileTypes: true, recursive: true })) {
    chownSync(join(entry.parentPath, entry.name), uid, gid);
  }
}

function place(host: string, port: number | ''): string {
  return host.includes(':') ? `[${host}]:${port}` : `${host}:${port}`;
}

function statusOf(pid: number, field: string): string | undefined {
  return new RegExp(`^${field}:\\s+(\\S+)`, 'm').exec(readFileSync(`/proc/${pid}/status`, 'utf8'))?.[1];
}
