/**
 * Owns: what keeps TLS from being talked down, replayed, confused or flooded, as docs/tls.md has it.
 * Must not know: ordinary bad clients (hostile.test.ts), what good ones agree on (handshake.test.ts).
 * Runs: in a test process, against one keygate with SoftHSM; clients are openssl, gnutls-cli, Node, and bytes of our own making.
 */
import assert from 'node:assert/strict';
import { once } from 'node:events';
import { writeFileSync } from 'node:fs';
import type { Socket } from 'node:net';
import { join } from 'node:path';
import { after, before, beforeEach, describe, it } from 'node:test';
import { setTimeout as pause } from 'node:timers/promises';
import { contentTypes, forger } from '../support/forged-records.ts';
import type { Forger } from '../support/forged-records.ts';
import { startKeygate } from '../support/keygate.ts';
import type { Keygate } from '../support/keygate.ts';
import { provisionedToken } from '../support/provisioned-token.ts';
import type { ProvisionedToken } from '../support/provisioned-token.ts';
import {
  alertIn,
  alerts,
  answerTo,
  assertEchoes,
  clientHello,
  editedHello,
  handshakeMessage,
  inRecords,
  paddedHello,
  prefixed,
  program,
  rawClient,
  tappedClient,
  tlsClient,
} from '../support/tls-client.ts';
import type { ClientHelloParts, TlsOptions } from '../support/tls-client.ts';
import { echoUpstream } from '../support/upstream.ts';
import type { Upstream } from '../support/upstream.ts';

const extensions = { serverName: 0, alpn: 16, extendedMasterSecret: 23, supportedVersions: 43 } as const;
const fallbackScsv = 0x5600;

describe('protections', { timeout: 120_000 }, () => {
  const fixtures = new AsyncDisposableStack();
  let token: ProvisionedToken;
  let echo: Upstream;
  let keygate: Keygate;
  let earlier: Readonly<Record<string, number>>;

  before(async () => {
    token = fixtures.use(
      await provisionedToken({
        one: { kind: 'p256', dns: ['one.test'] },
        two: { kind: 'p256', dns: ['two.test'] },
      }),
    );
    echo = fixtures.use(await echoUpstream());
    keygate = fixtures.use(
      await startKeygate(token, {
        policies: { old: { maxVersion: '1.2' }, p384: { groups: ['secp384r1'] } },
        upstreams: { echo: { servers: [echo.address] } },
        listeners: {
          https: {},
          old: { policy: 'old' },
          p384: { policy: 'p384' },
          refusing: { unknownName: 'refuse' },
          alpn: { alpn: ['h2'] },
        },
      }),
    );
  });
  beforeEach(async () => {
    earlier = await keygate.closes();
  });
  after(async () => fixtures.disposeAsync());

  describe('early data', () => {
    it('is offered in no ticket', async () => {
      assert.equal(maxEarlyData(await opensslSessionOf({ port: keygate.port() })), undefined);
    });

    it('that comes nevertheless is rejected and reaches no server; the session is resumed and what follows counts', async () => {
      const { output } = await withEarlyData('early bird', 'GET late\n');
      assert.match(output, /^Reused, TLSv1\.3/m);
      assert.match(output, /^Early data was rejected$/m);
      assert.doesNotMatch(output, /early bird/);
      await keygate.closed('client/relay/closed', { before: earlier });
    });

    it('of more than 16 KiB ends the handshake', async () => {
      await withEarlyData('x'.repeat(40_000));
      await keygate.closed('client/handshake/protocol_error', { before: earlier });
    });

    /** Node puts its own words before OpenSSL's DER. */
    async function opensslSessionOf(options: TlsOptions): Promise<Buffer> {
      const session = await sessionOf(options);
      return session.subarray(session.indexOf(Buffer.from([0x30, 0x82])));
    }

    /** OpenSSL sends as much as the session allows, so the session is told that it may. */
    async function withEarlyData(early: string, input = '') {
      const connect = ['s_client', '-connect', `127.0.0.1:${keygate.port()}`];
      const files = { session: join(token.directory, 'session.pem'), early: join(token.directory, 'early') };
      const session = withMaxEarlyData(await opensslSessionOf({ port: keygate.port() }), 65_535);
      const base64 = session.toString('base64').replace(/.{64}/g, '$&\n');
      writeFileSync(
        files.session,
        `-----BEGIN SSL SESSION PARAMETERS-----\n${base64}\n-----END SSL SESSION PARAMETERS-----\n`,
      );
      writeFileSync(files.early, early);
      return program('openssl', [...connect, '-sess_in', files.session, '-early_data', files.early], input);
    }
  });

  describe('renegotiation', () => {
    it('that it would be a secure one is indicated (RFC 5746)', async () => {
      const { output } = await program('openssl', ['s_client', '-connect', `127.0.0.1:${keygate.port()}`, '-tls1_2']);
      assert.match(output, /^Secure Renegotiation IS supported$/m);
    });

    it('that is asked for is answered with no_renegotiation', async () => {
      const options = ['s_client', '-connect', `127.0.0.1:${keygate.port()}`, '-tls1_2', '-msg'];
      const { output } = await program('openssl', options, 'R\n');
      assert.match(output, /RENEGOTIATING/);
      assert.match(output, /<<< TLS 1.2, Alert \[length 0002\], warning no_renegotiation/);
    });

    it('with a SCSV instead of the extension is indicated too', async () => {
      const hello = editedHello(
        await clientHello({ maxVersion: 'TLSv1.2' }),
        ({ cipherSuites, extensions: offered }) => {
          offered.delete(0xff01);
          cipherSuites.push(0x00ff);
        },
      );
      const answer = await firstAnswerTo(keygate.port(), hello);
      assert.ok(answer.includes(Buffer.from([0xff, 0x01, 0, 1, 0])), answer.toString('hex'));
    });
  });

  describe('names (RFC 6066 3)', () => {
    const list = (...names: readonly string[]) =>
      prefixed(2, ...names.map((name) => Buffer.concat([Buffer.from([0]), prefixed(2, Buffer.from(name))])));

    for (const [what, name, alert, reason] of [
      ['with an empty label', list('one..test'), 'illegalParameter', 'protocol_error'],
      ['with a space', list('one .test'), 'illegalParameter', 'protocol_error'],
      ['with a NUL', list('one.test\0.evil.test'), 'illegalParameter', 'protocol_error'],
      ['in UTF-8', list('öne.test'), 'illegalParameter', 'protocol_error'],
      ['longer than any', list(`${'a.'.repeat(130)}test`), 'illegalParameter', 'protocol_error'],
      ['that is empty', list(''), 'decodeError', 'malformed'],
      ['beside another', list('one.test', 'two.test'), 'decodeError', 'malformed'],
    ] as const) {
      it(`a name ${what} is refused with ${alert}`, async () => {
        const hello = editedHello(await clientHello({ servername: 'one.test' }), ({ extensions: offered }) => {
          offered.set(extensions.serverName, name);
        });
        assert.equal(alertIn(await answerTo(keygate.port('refusing'), hello)), alerts[alert]);
        await keygate.closed(`client/handshake/${reason}`, { before: earlier });
      });
    }

    it('an extension without a name in it cannot be decoded', async () => {
      const hello = editedHello(await clientHello({ servername: 'one.test' }), ({ extensions: offered }) => {
        offered.set(extensions.serverName, Buffer.from([0, 9, 0]));
      });
      assert.equal(alertIn(await answerTo(keygate.port(), hello)), alerts.decodeError);
      await keygate.closed('client/handshake/malformed', { before: earlier });
    });

    it('an address counts as no name, so it gets the default certificate also where unknown names are refused', async () => {
      const hello = editedHello(await clientHello({ servername: 'one.test' }), ({ extensions: offered }) => {
        offered.set(extensions.serverName, list('192.0.2.1'));
      });
      assert.equal(handshakeTypeOf(await firstAnswerTo(keygate.port('refusing'), hello)), serverHello);
    });

    for (const version of ['TLSv1.2', 'TLSv1.3'] as const) {
      it(`a session of one name is not resumed for another, nor for none, in ${version}`, async () => {
        const options = { port: keygate.port(), minVersion: version, maxVersion: version };
        const session = await sessionOf({ ...options, servername: 'one.test' });
        for (const [servername, expected] of [
          ['two.test', false],
          ['', false],
          ['one.test', true],
        ] as const) {
          const client = await tlsClient({ ...options, session, servername });
          assert.equal(client.isSessionReused(), expected, servername);
          if (servername === 'two.test') assert.match(client.getPeerCertificate().subjectaltname ?? '', /two\.test/);
          client.destroy();
        }
      });
    }

    for (const [what, edit] of [
      ['another name', (offered: Map<number, Buffer>) => offered.set(extensions.serverName, list('two.test'))],
      ['no name', (offered: Map<number, Buffer>) => offered.delete(extensions.serverName)],
    ] as const) {
      it(`a client that asks for ${what} after a HelloRetryRequest is refused with illegal_parameter`, async () => {
        const hello = { ecdhCurve: 'X25519:P-384', servername: 'one.test' };
        let hellos = 0;
        const { tls, received } = await tappedClient({ port: keygate.port('p384'), ...hello }, (sent) => {
          // Before the second one stands a change_cipher_spec (RFC 8446 D.4).
          const [ahead, said] = sent[0] === 20 ? [sent.subarray(0, 6), sent.subarray(6)] : [Buffer.alloc(0), sent];
          if (!isHello(said)) return sent;
          hellos += 1;
          if (hellos === 1) return sent;
          return Buffer.concat([ahead, editedHello(said, ({ extensions: offered }) => void edit(offered))]);
        });
        await once(tls, 'error');
        assert.equal(hellos, 2);
        assert.equal(alertIn(received().subarray(-7)), alerts.illegalParameter);
        await keygate.closed('client/handshake/protocol_error', { before: earlier });
      });
    }
  });

  describe('application protocols (RFC 7301)', () => {
    for (const [what, content] of [
      ['an empty list', prefixed(2)],
      ['an empty name', prefixed(2, prefixed(1), prefixed(1, Buffer.from('h2')))],
      ['a name longer than the list', Buffer.from([0, 3, 9, 0x68, 0x32])],
    ] as const) {
      it(`${what} cannot be decoded, also where none is negotiated`, async () => {
        for (const listener of ['alpn', 'https']) {
          const hello = editedHello(await clientHello({ ALPNProtocols: ['h2'] }), ({ extensions: offered }) => {
            offered.set(extensions.alpn, content);
          });
          assert.equal(alertIn(await answerTo(keygate.port(listener), hello)), alerts.decodeError);
        }
        await keygate.closed('client/handshake/malformed', { before: earlier, count: 2 });
      });
    }
  });

  describe('versions', () => {
    /** RFC 8446 4.1.3 */
    const sentinel = Buffer.from('444f574e47524401', 'hex');

    it('a client of TLS 1.2 is told that we have 1.3, so that one of 1.3 notices who talked it down', async () => {
      const hello = await clientHello({ maxVersion: 'TLSv1.2' });
      assert.deepEqual(randomOf(await firstAnswerTo(keygate.port(), hello)).subarray(24), sentinel);
    });

    it('and is not where the policy has no 1.3', async () => {
      const hello = await clientHello({ maxVersion: 'TLSv1.2' });
      assert.notDeepEqual(randomOf(await firstAnswerTo(keygate.port('old'), hello)).subarray(24), sentinel);
    });

    it('a client of TLS 1.3 whose versions somebody cut on the way refuses the answer', async () => {
      const cut = (hello: Buffer) =>
        editedHello(hello, ({ extensions: offered }) => offered.delete(extensions.supportedVersions));
      const { tls } = await tappedClient({ port: keygate.port() }, (sent) => (isHello(sent) ? cut(sent) : sent));
      const [error] = (await once(tls, 'error')) as [NodeJS.ErrnoException];
      assert.equal(error.code, 'ERR_SSL_INAPPROPRIATE_FALLBACK');
    });

    it('TLS_FALLBACK_SCSV is not looked at: who sends it finds out by the same word', async () => {
      const hello = editedHello(await clientHello({ maxVersion: 'TLSv1.2' }), ({ cipherSuites }) => {
        cipherSuites.push(fallbackScsv);
      });
      assert.deepEqual(randomOf(await firstAnswerTo(keygate.port(), hello)).subarray(24), sentinel);
      const options = ['s_client', '-connect', `127.0.0.1:${keygate.port()}`, '-tls1_2', '-fallback_scsv'];
      assert.match((await program('openssl', options)).output, /inappropriate fallback/);
    });

    for (const [what, hello] of [
      ['SSL 2.0', async () => sslv2Hello(0x0002)],
      ['SSL 3.0 in the form of SSL 2.0', async () => sslv2Hello(0x0300)],
      ['TLS 1.2 in the form of SSL 2.0', async () => sslv2Hello(0x0303)],
      ['SSL 3.0', async () => oldHello(0x0300)],
      ['TLS 1.0', async () => oldHello(0x0301)],
      ['TLS 1.1', async () => oldHello(0x0302)],
      [
        'only versions that do not exist',
        async () =>
          editedHello(await clientHello(), ({ extensions: offered }) =>
            offered.set(extensions.supportedVersions, prefixed(1, Buffer.from([0x7f, 0x1c]))),
          ),
      ],
    ] as const) {
      for (const [pieces, answerOf] of [
        ['in one piece', answerTo],
        // The first byte of SSL 2.0 is no record of TLS, and nobody waits for more.
        ...(what.includes('SSL 2.0') ? [] : [['byte by byte', answerToBytes] as const]),
      ] as const) {
        it(`${what}, ${pieces}, is refused with protocol_version`, async () => {
          const answer = await answerOf(keygate.port(), await hello());
          assert.equal(alertIn(answer), alerts.protocolVersion, answer.toString('hex'));
          await keygate.closed('client/handshake/no_shared_protocol', { before: earlier });
        });
      }
    }
  });

  describe('compression', () => {
    it('is never agreed on', async () => {
      const hello = editedHello(await clientHello({ maxVersion: 'TLSv1.2' }), (parts) => {
        parts.compressionMethods = [1, 0];
      });
      const answer = await firstAnswerTo(keygate.port(), hello);
      const afterRandom = 5 + 4 + 2 + 32;
      const sessionIdBytes = answer.readUInt8(afterRandom);
      assert.equal(answer.readUInt8(afterRandom + 1 + sessionIdBytes + 2), 0);
    });

    for (const [what, version, methods] of [
      ['nothing but compression', 'TLSv1.2', [1]],
      ['compression at all in TLS 1.3', 'TLSv1.3', [1, 0]],
    ] as const) {
      it(`a client that offers ${what} is refused with illegal_parameter`, async () => {
        const hello = editedHello(await clientHello({ maxVersion: version }), (parts) => {
          parts.compressionMethods = [...methods];
        });
        assert.equal(alertIn(await answerTo(keygate.port(), hello)), alerts.illegalParameter);
        await keygate.closed('client/handshake/protocol_error', { before: earlier });
      });
    }
  });

  describe('records', () => {
    it('of 16384 bytes are taken before the handshake, and none that is a byte longer', async () => {
      const hello = paddedHello(await clientHello(), 17_000);
      const message = messageIn(hello);
      const fits = Buffer.concat([inRecords(message.subarray(0, 16_384)), inRecords(message.subarray(16_384))]);
      assert.equal(handshakeTypeOf(await firstAnswerTo(keygate.port(), fits)), serverHello);
      const longer = Buffer.concat([
        inRecords(message.subarray(0, 16_385), 16_385),
        inRecords(message.subarray(16_385)),
      ]);
      assert.equal(alertIn(await answerTo(keygate.port(), longer)), alerts.recordOverflow);
      const behind = [message.subarray(0, 100), message.subarray(100, 200), message.subarray(200, 16_585)];
      const pieces = behind.map((piece) => inRecords(piece, 16_385));
      assert.equal(alertIn(await answerToPieces(keygate.port(), pieces)), alerts.recordOverflow);
      await keygate.closed('client/handshake/malformed', { before: earlier, count: 2 });
    });

    it('are known by their headers, whatever is in them and in whichever pieces they come', async () => {
      // What looks like the header of a record that is too long is where one began before it was moved.
      const header = Buffer.from([22, 3, 3, 0x50, 0]);
      const hello = editedHello(await clientHello(), ({ extensions: offered }) =>
        offered.set(21, repeated(header, 400)),
      );
      const message = messageIn(hello);
      const pieces = [message.subarray(0, 700), message.subarray(700, 1400), message.subarray(1400)].map((piece) =>
        inRecords(piece),
      );
      const client = await rawClient(keygate.port());
      await writeApart(client, pieces);
      const [answer] = (await once(client, 'data')) as [Buffer];
      client.destroy();
      assert.equal(handshakeTypeOf(answer), serverHello);
    });

    it('without a byte are refused before the handshake', async () => {
      assert.equal(alertIn(await answerTo(keygate.port(), Buffer.from([22, 3, 1, 0, 0]))), alerts.decodeError);
      await keygate.closed('client/handshake/malformed', { before: earlier });
    });

    it('of one byte each may make up a ClientHello', async () => {
      const hello = messageIn(await clientHello());
      assert.equal(handshakeTypeOf(await firstAnswerTo(keygate.port(), inRecords(hello, 1))), serverHello);
    });

    it('of other kinds between the pieces of a ClientHello are refused', async () => {
      const hello = messageIn(await clientHello());
      const mixed = [
        inRecords(hello.subarray(0, 100)),
        Buffer.from([21, 3, 3, 0, 2, 1, 0]),
        inRecords(hello.subarray(100)),
      ];
      await answerTo(keygate.port(), Buffer.concat(mixed));
      await keygate.closed('client/handshake/protocol_error', { before: earlier });
    });

    it('may be as small as a client asks for by itself: max_fragment_length is not negotiated', async () => {
      const options = [
        's_client',
        '-connect',
        `127.0.0.1:${keygate.port()}`,
        '-tls1_2',
        '-maxfraglen',
        '512',
        '-tlsextdebug',
      ];
      const { output } = await program('openssl', options);
      assert.match(output, /^New, TLSv1\.2/m);
      assert.doesNotMatch(output, /server extension "max fragment length"/);
      const gnutls = ['--insecure', '--recordsize', '1024', '--port', String(keygate.port()), '127.0.0.1'];
      assert.match((await program('gnutls-cli', gnutls)).output, /Handshake was completed/);
    });

    for (const [what, bytes, code] of [
      ['16385 bytes of data', 16_385, 'ERR_SSL_TLSV1_ALERT_RECORD_OVERFLOW'],
      ['16640 bytes of data', 16_640, 'ERR_SSL_TLSV1_ALERT_RECORD_OVERFLOW'],
      ['19000 bytes of data', 19_000, 'ERR_SSL_TLSV1_ALERT_DECODE_ERROR'],
    ] as const) {
      it(`with ${what} end an established connection`, async () => {
        const client = await established();
        const failed = once(client.tls, 'error');
        client.raw.write(client.record(contentTypes.applicationData, Buffer.alloc(bytes)));
        const [error] = (await failed) as [NodeJS.ErrnoException];
        assert.equal(error.code, code);
        await keygate.closed('client/relay/protocol_error', { before: earlier });
      });
    }

    it('with 16384 bytes of data are taken', async () => {
      const client = await established();
      client.raw.write(client.record(contentTypes.applicationData, Buffer.alloc(16_384, 'a')));
      let bytes = 0;
      for await (const chunk of client.tls as AsyncIterable<Buffer>) {
        bytes += chunk.length;
        if (bytes === 16_384) break;
      }
      client.tls.destroy();
    });

    for (const [what, limit, make] of [
      [
        'without data, one after the other',
        32,
        (client: Forger) => client.record(contentTypes.applicationData, Buffer.alloc(0)),
      ],
      ['with a pointless alert', 4, (client: Forger) => client.record(contentTypes.alert, Buffer.from([1, 90]))],
      ['with a key update that wants another', 32, (client: Forger) => client.updateKey()],
    ] as const) {
      it(`${what}, are taken ${limit} times and not once more`, async () => {
        const client = await established();
        for (let count = 0; count < limit; count += 1) client.raw.write(make(client));
        client.raw.write(client.record(contentTypes.applicationData, Buffer.from('still there')));
        assert.equal(String(((await once(client.tls, 'data')) as [Buffer])[0]), 'still there');
        for (let count = 0; count <= limit; count += 1) client.raw.write(make(client));
        await keygate.closed('client/relay/protocol_error', { before: earlier });
        client.tls.destroy();
      });
    }

    for (const [what, make] of [
      ['a handshake message of more than 64 KiB', (client: Forger) => fragments(client, 16_000, 5)],
      ['a handshake message in pieces of one byte', (client: Forger) => fragments(client, 1, 4000, 60_000)],
      [
        'data between the pieces of a handshake message',
        (client: Forger) => [
          client.record(contentTypes.handshake, handshakeMessage(24, Buffer.alloc(100)).subarray(0, 10)),
          client.record(contentTypes.applicationData, Buffer.from('x')),
        ],
      ],
    ] as const) {
      it(`with ${what} end an established connection`, async () => {
        const client = await established();
        for (const record of make(client)) client.raw.write(record);
        await keygate.closed('client/relay/protocol_error', { before: earlier });
        client.tls.destroy();
      });
    }

    /** It is relayed already: what comes with Finished is still the handshake's. */
    async function established(): Promise<Forger> {
      const client = await forger({ port: keygate.port() });
      client.raw.write(client.record(contentTypes.applicationData, Buffer.from('there')));
      assert.equal(String(((await once(client.tls, 'data')) as [Buffer])[0]), 'there');
      return client;
    }
  });

  /** In TLS 1.3 it comes after the handshake, so after an echo it is there. */
  async function sessionOf(options: TlsOptions): Promise<Buffer> {
    const client = await tlsClient(options);
    const session = once(client, 'session');
    await assertEchoes(client);
    const bytes = client.getProtocol() === 'TLSv1.3' ? ((await session) as [Buffer])[0] : client.getSession();
    client.destroy();
    return bytes ?? assert.fail('no session');
  }
});

const serverHello = 2;

/** What comes first; then the connection is let go. */
async function firstAnswerTo(port: number, bytes: Buffer): Promise<Buffer> {
  const client = await rawClient(port);
  client.write(bytes);
  const [answer] = (await once(client, 'data')) as [Buffer];
  client.destroy();
  return answer;
}

/** As `answerTo`, with each byte on its own as far as the kernel allows. */
async function answerToBytes(port: number, bytes: Buffer): Promise<Buffer> {
  return answerToPieces(
    port,
    [...bytes].map((byte) => Buffer.from([byte])),
  );
}

async function answerToPieces(port: number, pieces: readonly Buffer[]): Promise<Buffer> {
  const client = await rawClient(port);
  const answers: Buffer[] = [];
  client.on('data', (answer: Buffer) => answers.push(answer));
  const ended = once(client, 'end');
  await writeApart(client, pieces);
  await ended;
  client.destroy();
  return Buffer.concat(answers);
}

/** Each is in the server's socket before the next, so that it is most often read on its own. */
async function writeApart(client: Socket, pieces: readonly Buffer[]): Promise<void> {
  for (const piece of pieces) {
    await new Promise((written) => client.write(piece, written));
    if (pieces.length < 10) await pause(20);
  }
}

function repeated(bytes: Buffer, count: number): Buffer {
  return Buffer.concat(Array.from({ length: count }, () => bytes));
}

const handshakeTypeOf = (answer: Buffer): number | undefined => (answer[0] === 22 ? answer[5] : undefined);
const isHello = (sent: Buffer): boolean => sent[0] === 22 && sent[5] === 1;
const randomOf = (answer: Buffer): Buffer => answer.subarray(5 + 4 + 2, 5 + 4 + 2 + 32);

/** Without the headers of its records. */
function messageIn(records: Buffer): Buffer {
  const fragments: Buffer[] = [];
  for (let at = 0; at < records.length;) {
    const end = at + 5 + records.readUInt16BE(at + 3);
    fragments.push(records.subarray(at + 5, end));
    at = end;
  }
  return Buffer.concat(fragments);
}

/** RFC 5246 E.2 */
function sslv2Hello(version: number): Buffer {
  const body = Buffer.from([1, version >> 8, version & 0xff, 0, 3, 0, 0, 0, 16, 1, 0, 0x80, ...Buffer.alloc(16, 7)]);
  return Buffer.concat([Buffer.from([0x80, body.length]), body]);
}

/** As clients of that time said it: without the extensions that came later. */
async function oldHello(version: number): Promise<Buffer> {
  const hello = editedHello(await clientHello({ maxVersion: 'TLSv1.2' }), (parts: ClientHelloParts) => {
    parts.version = version;
    parts.extensions.clear();
  });
  hello.writeUInt16BE(version, 1);
  return hello;
}

function fragments(client: Forger, bytes: number, count: number, announced = 70_000): Buffer[] {
  const message = handshakeMessage(24, Buffer.alloc(announced));
  return Array.from({ length: count }, (_, index) =>
    client.record(contentTypes.handshake, message.subarray(index * bytes, (index + 1) * bytes)),
  );
}

/** Element 15 of OpenSSL's DER of a session, an INTEGER; it is left out when it is 0. */
function maxEarlyData(session: Buffer): number | undefined {
  const element = elementsOf(session).find(([tag]) => tag === 0xaf);
  return element === undefined ? undefined : element.readUIntBE(4, element.readUInt8(3));
}

function withMaxEarlyData(session: Buffer, bytes: number): Buffer {
  const integer = Buffer.from([0x02, 0x03, 0x00, bytes >> 8, bytes & 0xff]);
  const elements = elementsOf(session);
  const behind = elements.findIndex(([tag = 0]) => tag > 0xaf);
  elements.splice(
    behind === -1 ? elements.length : behind,
    0,
    Buffer.concat([Buffer.from([0xaf, integer.length]), integer]),
  );
  const body = Buffer.concat(elements);
  return Buffer.concat([Buffer.from([0x30, 0x82]), prefixed(2, body)]);
}

/** What is in a SEQUENCE, element by element. */
function elementsOf(sequence: Buffer): Buffer[] {
  const elements: Buffer[] = [];
  for (let at = headBytes(sequence); at < sequence.length;) {
    const rest = sequence.subarray(at);
    const end = headBytes(rest) + contentBytes(rest);
    elements.push(rest.subarray(0, end));
    at += end;
  }
  return elements;
}

const headBytes = ([, length = 0]: Uint8Array): number => (length < 0x80 ? 2 : 2 + (length & 0x7f));
const contentBytes = (der: Buffer): number =>
  der.readUInt8(1) < 0x80 ? der.readUInt8(1) : der.readUIntBE(2, der.readUInt8(1) & 0x7f);
