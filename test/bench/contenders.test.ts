/**
 * Owns: that every contender does with its configuration what the benchmark believes it does. Node's client is the judge here,
 * and not the load generator, which has its own idea of TLS from the same library as keygate.
 * Must not know: what is fast.
 * Runs: in a test process; contenders are children.
 */
import assert from 'node:assert/strict';
import { once } from 'node:events';
import { mkdirSync, readFileSync } from 'node:fs';
import { createServer } from 'node:net';
import type { AddressInfo, Server } from 'node:net';
import { join } from 'node:path';
import { after, before, test } from 'node:test';
import { connect } from 'node:tls';
import type { ConnectionOptions, TLSSocket } from 'node:tls';
import { missingNeeds } from '../../bench/contenders/contender.ts';
import type { Contender } from '../../bench/contenders/contender.ts';
import { contenders } from '../../bench/contenders/contenders.ts';
import type { ContenderName } from '../../bench/contenders/contenders.ts';
import { makeKeys } from '../../bench/keys.ts';
import type { Keys } from '../../bench/keys.ts';
import { suiteOf } from '../../bench/negotiation.ts';
import { accepting, freePort, Pinned } from '../../bench/processes.ts';
import type { Setting } from '../../bench/scenarios.ts';

const question = 'keygate?\n';
const answer = 'keygate!\n';
const usual: Setting = {
  key: 'p256',
  tls: '1.3',
  group: 'X25519',
  resume: false,
  tokenLatencyMs: 0,
  workers: 1,
  certificates: 1,
  reload: false,
  sandbox: true,
};
/** Each way of configuring something differently is in one of them. */
const settings: Readonly<Record<string, Partial<Setting>>> = {
  'full TLS 1.3 handshakes': {},
  'resumed TLS 1.3 handshakes, two workers': { resume: true, workers: 2 },
  'full TLS 1.2 handshakes, RSA-2048': { tls: '1.2', key: 'rsa2048' },
  'resumed TLS 1.2 handshakes, P-384': { tls: '1.2', key: 'p384', resume: true },
  'a slow token, RSA-3072': { tokenLatencyMs: 2, key: 'rsa3072' },
  'Ed25519 and X25519MLKEM768': { key: 'ed25519', group: 'X25519MLKEM768' },
  'three certificates': { certificates: 3 },
};

let keys: Keys;
let upstreams: readonly Server[];

before(async () => {
  keys = makeKeys();
  // Two, and both are asked.
  upstreams = [0, 1].map(() =>
    createServer((socket) => {
      socket.on('error', () => {});
      socket.once('data', () => socket.end(answer));
    }).listen(0, '127.0.0.1'),
  );
  await Promise.all(upstreams.map((server) => once(server, 'listening')));
});
after(() => {
  for (const server of upstreams) server.close();
  keys.dispose();
});

for (const [name, contender] of Object.entries(contenders) as [ContenderName, Contender][]) {
  if (name === 'keygate-before') continue; // the same program
  const missing = missingNeeds(contender);
  for (const [title, variation] of Object.entries(settings)) {
    const setting = { ...usual, ...variation };
    const skip = missing.length > 0 ? `needs ${missing.join(', ')}` : (contender.cannot(setting) ?? false);
    test(`${name}: ${title}`, { skip }, async () => {
      await using running = await start(name, contender, setting);
      for (const { servername, certificate } of identities(setting)) {
        const first = await exchange(running.port, setting, { servername, ca: readFileSync(certificate) });
        assert.equal(first.reused, false);
        assert.equal(first.tickets, setting.resume ? 1 : 0);
        if (!setting.resume) continue;
        // More than there are workers: each opens the tickets of the other.
        for (let again = 0; again < 4; again += 1) {
          const { session } = first;
          const next = await exchange(running.port, setting, { servername, ca: readFileSync(certificate), session });
          assert.equal(next.reused, true);
          if (setting.tls === '1.3') assert.equal(next.tickets, 1);
        }
      }
    });
  }

  test(`${name}: its versions are known`, { skip: missing.length > 0 && `needs ${missing.join(', ')}` }, () => {
    for (const [part, version] of Object.entries(contender.versions())) assert.match(version, /\d/, part);
  });
}

test('who cannot do something says why, and everybody can do the usual', () => {
  for (const contender of Object.values(contenders)) {
    if (missingNeeds(contender).length === 0) assert.equal(contender.cannot(usual), undefined);
  }
  assert.match(contenders['nginx-file'].cannot({ ...usual, tokenLatencyMs: 2 }) ?? '', /no token that could be slow/);
});

interface Started extends AsyncDisposable {
  readonly port: number;
}

async function start(name: string, contender: Contender, setting: Setting): Promise<Started> {
  const directory = join(keys.token.directory, `${name}-${Object.values(setting).join('-')}`);
  mkdirSync(directory, { mode: 0o700 });
  const [port, adminPort] = [await freePort(), await freePort()];
  const token = keys.access(setting.tokenLatencyMs);
  const addresses = upstreams.map((server) => `127.0.0.1:${(server.address() as AddressInfo).port}`);
  const place = {
    setting,
    keys,
    token,
    directory,
    port,
    adminPort,
    upstreams: addresses,
    upstreamKind: 'line',
  } as const;
  const pinned = new Pinned(name, [0], contender.command(place));
  await accepting(pinned, port).catch(async (error: unknown) => {
    await pinned.stop();
    throw error;
  });
  return { port, [Symbol.asyncDispose]: () => pinned.stop() };
}

function identities({ key, certificates }: Setting): readonly { servername: string; certificate: string }[] {
  if (certificates === 1) return [{ servername: 'localhost', certificate: keys.files[key].certificate }];
  return keys.certificates(key, certificates).map(({ name, file }) => ({ servername: name, certificate: file }));
}

interface Exchange {
  readonly reused: boolean;
  readonly tickets: number;
  readonly session: Buffer | undefined;
}

/** One connection: handshake, question, answer, close; with everything as the setting says, and nothing else offered. */
async function exchange(port: number, setting: Setting, options: ConnectionOptions): Promise<Exchange> {
  // TLS 1.2: the curve of the certificate's key is one of the groups too, RFC 8422 section 5.3. Servers have the first only.
  const curve = setting.tls === '1.2' ? { p256: ':P-256', p384: ':P-384' }[setting.key as string] : undefined;
  const ecdhCurve = setting.group + (curve ?? '');
  const socket = connect({ port, host: '127.0.0.1', ecdhCurve, ...options });
  let sessions = 0;
  let session: Buffer | undefined;
  socket.on('session', (last: Buffer) => {
    sessions += 1;
    session = last;
  });
  let said = '';
  socket.setEncoding('utf8').on('data', (text: string) => (said += text));
  const closed = once(socket, 'close');
  await once(socket, 'secureConnect');
  assert.equal(socket.getProtocol(), `TLSv${setting.tls}`);
  assert.equal(socket.getCipher().standardName, suiteOf(setting).iana);
  const [reused, ticket] = [socket.isSessionReused(), socket.getTLSTicket()];
  // A resumed TLS 1.2 session has no key exchange; of a hybrid one OpenSSL tells no name, but nothing else was offered.
  if (setting.group === 'X25519' && !(reused && setting.tls === '1.2')) assert.equal(groupOf(socket), 'X25519');
  socket.write(question);
  await closed;
  assert.equal(said, answer);
  return { reused, tickets: setting.tls === '1.3' ? sessions : Number(ticket !== undefined), session };
}

function groupOf(socket: TLSSocket): string | undefined {
  const info = socket.getEphemeralKeyInfo();
  return info !== null && 'name' in info ? info.name : undefined;
}
