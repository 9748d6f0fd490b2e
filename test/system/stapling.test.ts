/**
 * Owns: OCSP stapling as clients and operators see it: which response a client gets, when, and what is said when there is none.
 * Must not know: how a response is verified (test/ocsp).
 * Runs: against a real `keygate serve` on SoftHSM and a real `openssl ocsp`, one token, one authority and one keygate per test.
 */
import assert from 'node:assert/strict';
import { X509Certificate } from 'node:crypto';
import { once } from 'node:events';
import { readdirSync, readFileSync, statSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { it } from 'node:test';
import type { TestContext } from 'node:test';
import { connect as connectTls } from 'node:tls';
import type { ConnectionOptions } from 'node:tls';
import { verifyResponse } from '../../src/ocsp/response.ts';
import { ocspIssuer, ocspSubject } from '../../src/ocsp/subject.ts';
import { createSigningRequest } from '../../src/pkcs11/issue.ts';
import { findPrivateKey } from '../../src/pkcs11/keys.ts';
import type { StapleStatus } from '../../src/primary/stapler.ts';
import { keygate as command } from '../support/command.ts';
import { startKeygate } from '../support/keygate.ts';
import type { Keygate, KeygateDocument } from '../support/keygate.ts';
import { httpAnswer, ocspAuthority, responderAddress } from '../support/ocsp-authority.ts';
import type { Behaviour, IssueOptions, OcspAuthority, ResponderAddress } from '../support/ocsp-authority.ts';
import { provisionedToken } from '../support/provisioned-token.ts';
import type { ProvisionedToken } from '../support/provisioned-token.ts';
import { program } from '../support/tls-client.ts';
import { until } from '../support/until.ts';
import { echoUpstream } from '../support/upstream.ts';

it('clients that ask get the response of the responder, in every worker and version', async (test) => {
  const bench = await openBench(test);
  const keygate = await bench.start({ workers: 2 });
  await keygate.logged({ event: 'ocsp_stapled', certificate: 'www' });
  for (const version of ['TLSv1.2', 'TLSv1.3'] as const) {
    for (let client = 0; client < 12; client += 1) {
      assert.equal(bench.statusIn(await stapleOf(keygate, { minVersion: version, maxVersion: version })), 'good');
    }
    const trust = ['-CAfile', join(bench.authority.directory, 'issuer.pem'), '-verify_return_error', '-status'];
    const flag = version === 'TLSv1.2' ? '-tls1_2' : '-tls1_3';
    const seen = await program('openssl', ['s_client', '-connect', `127.0.0.1:${keygate.port()}`, flag, ...trust]);
    assert.match(seen.output, /OCSP Response Status: successful/);
    assert.match(seen.output, /Cert Status: good/);
    assert.equal(seen.exitCode, 0, seen.output);
  }
  // RFC 5019 5: short enough for GET, and asked once for both workers.
  assert.equal(bench.address.requests.length, 1);
  assert.match(bench.address.requests[0] ?? '', /^GET \/M[\w%]+ HTTP\/1\.1$/);
  const { state, nextUpdate, nextFetch, fetches } = await ocspStatus(keygate);
  assert.deepEqual([state, fetches.ok], ['good', 1]);
  const expiry = await keygate.metric('keygate_ocsp_response_expiry_timestamp_seconds', { certificate: 'www' });
  assert.equal(expiry, Date.parse(String(nextUpdate)) / 1000);
  assert.ok(Date.parse(String(nextFetch)) / 1000 < expiry - 120);
  assert.equal(await keygate.metric('keygate_ocsp_status', { certificate: 'www', status: 'good' }), 1);
});

it('a response of a delegated signer is served, with the certificate of the signer', async (test) => {
  const bench = await openBench(test);
  await bench.respond({ signer: 'delegate' });
  const keygate = await bench.start();
  const staple = await untilStapled(keygate);
  assert.equal(bench.statusIn(staple), 'good');
});

it('that a certificate is revoked is told to clients, the log and the metrics', async (test) => {
  const bench = await openBench(test);
  bench.authority.revoke(bench.leaf());
  await bench.respond();
  const keygate = await bench.start();
  const line = await keygate.logged({ event: 'ocsp_revoked', certificate: 'www' });
  assert.equal(line.level, 'error');
  assert.equal(bench.statusIn(await untilStapled(keygate)), 'revoked');
  assert.equal(await keygate.metric('keygate_ocsp_status', { certificate: 'www', status: 'revoked' }), 1);
});

it('what the responder does not know is not stapled, and asked again until it knows', async (test) => {
  const bench = await openBench(test);
  const index = join(bench.authority.directory, 'index.txt');
  const known = readFileSync(index);
  bench.authority.forget(bench.leaf());
  await bench.respond();
  const keygate = await bench.start();
  await keygate.logged({ event: 'ocsp_fetch_failed', outcome: 'unknown' });
  assert.equal(await stapleOf(keygate), undefined);
  writeFileSync(index, known);
  await bench.respond();
  assert.equal(bench.statusIn(await untilStapled(keygate)), 'good');
});

const redirect =
  'HTTP/1.1 302 Found\r\nlocation: http://127.0.0.1:1/\r\ncontent-length: 0\r\nconnection: close\r\n\r\n';
const faults: readonly {
  readonly name: string;
  readonly behaviour: (bench: Bench) => Behaviour | Promise<Behaviour>;
  readonly outcome: string;
  readonly reason: RegExp;
}[] = [
  { name: 'dead', behaviour: () => 'dead', outcome: 'unreachable', reason: /ECONNREFUSED/ },
  { name: 'silent', behaviour: () => 'silent', outcome: 'unreachable', reason: /no answer in 700 ms/ },
  {
    name: 'slow',
    behaviour: () => ({
      says: 'HTTP/1.1 200 OK\r\ncontent-type: application/ocsp-response\r\ncontent-length: 9\r\n\r\n',
      stays: true,
    }),
    outcome: 'unreachable',
    reason: /no answer in 700 ms/,
  },
  {
    name: 'that speaks no HTTP',
    behaviour: () => ({ says: 'SSH-2.0-server\r\n' }),
    outcome: 'unreachable',
    reason: /HPE_/,
  },
  { name: 'that redirects', behaviour: () => ({ says: redirect }), outcome: 'http_error', reason: /HTTP status 302/ },
  {
    name: 'that sends a web page',
    behaviour: () => ({ says: httpAnswer(Buffer.from('<html>'), 'text/html') }),
    outcome: 'http_error',
    reason: /content-type "text\/html"/,
  },
  {
    name: 'that sends too much',
    behaviour: () => ({ says: httpAnswer(Buffer.alloc(1024 * 1024)) }),
    outcome: 'http_error',
    reason: /more than 16384 bytes/,
  },
  {
    name: 'that sends garbage',
    behaviour: () => ({ says: httpAnswer(Buffer.from('garbage')) }),
    outcome: 'invalid',
    reason: /not an OCSP response/,
  },
  {
    name: 'that says try later',
    behaviour: () => ({ says: httpAnswer(Buffer.from('30030a0103', 'hex')) }),
    outcome: 'responder_error',
    reason: /tryLater/,
  },
  {
    name: 'whose responses a stranger has signed',
    behaviour: async ({ authority }) => ({ forwardTo: (await authority.startResponder({ signer: 'stranger' })).port }),
    outcome: 'invalid',
    reason: /not issued by the issuer/,
  },
  {
    name: 'whose responses have ended',
    behaviour: async ({ authority }) => ({
      forwardTo: (await authority.startResponder({ validity: ['-nmin', '1'], lateSeconds: 90 })).port,
    }),
    outcome: 'invalid',
    reason: /held until/,
  },
];

for (const { name, behaviour, outcome, reason } of faults) {
  it(`a responder ${name} holds nobody up, is not believed, and is asked again without a reload`, async (test) => {
    const bench = await openBench(test);
    await bench.address.become(await behaviour(bench));
    const keygate = await bench.start({ ocsp: { timeout: '700ms' } });
    const line = await keygate.logged({ event: 'ocsp_fetch_failed', certificate: 'www' });
    assert.deepEqual([line.level, line['outcome']], ['warn', outcome]);
    assert.match(String(line['reason']), reason);
    assert.equal(await stapleOf(keygate), undefined);
    assert.ok(((await keygate.metric('keygate_ocsp_fetches_total', { outcome })) ?? 0) > 0);
    assert.equal(await keygate.metric('keygate_ocsp_status', { status: 'missing' }), 1);
    const { problem } = await ocspStatus(keygate);
    assert.match(String(problem), reason);
    await bench.respond();
    assert.equal(bench.statusIn(await untilStapled(keygate)), 'good');
    assert.equal((await ocspStatus(keygate)).problem, undefined);
  });
}

it('a response in the cache is served from the first handshake on, with a dead responder', async (test) => {
  const bench = await openBench(test);
  const cache = join(bench.authority.directory, 'cache', 'ocsp');
  const first = await bench.start({ ocsp: { cache } });
  const staple = await untilStapled(first);
  const file = await until('response in the cache', () => cachedFile(cache));
  assert.deepEqual(readFileSync(file), staple);
  // Whoever has an account here need not know whom we ask.
  assert.equal(statSync(file).mode & 0o007, 0);
  await first.stop();
  await bench.address.become('dead');
  const second = await bench.start({ ocsp: { cache } });
  assert.deepEqual(await stapleOf(second), staple);
  await second.stop();

  // What somebody else has put there is not believed.
  const forged = bench.authority.respond(bench.leaf(), { signer: 'stranger' });
  for (const bytes of [forged, Buffer.from('garbage'), Buffer.alloc(0)]) {
    writeFileSync(file, bytes);
    const third = await bench.start({ ocsp: { cache } });
    assert.equal(await stapleOf(third), undefined);
    await third.stop();
  }
  assert.deepEqual(readdirSync(cache).length, 1);
});

it('a cache that cannot be written is said, and responses are served all the same', async (test) => {
  const bench = await openBench(test);
  const cache = join(bench.authority.directory, 'issuer.pem');
  const keygate = await bench.start({ ocsp: { cache } });
  await keygate.logged({ event: 'ocsp_cache_failed', directory: cache });
  assert.equal(bench.statusIn(await untilStapled(keygate)), 'good');
});

it('the next response is fetched well before the one before ends, and replaces it without a gap', async (test) => {
  const bench = await openBench(test);
  // Each response holds for a minute, of which 24 s have gone when it comes: the half is near.
  await bench.respond({ validity: ['-nmin', '1'], lateSeconds: 24 });
  const keygate = await bench.start();
  const first = await untilStapled(keygate);
  const { nextUpdate } = bench.answerIn(first);
  await until(
    'other response',
    async () => {
      const staple = await stapleOf(keygate);
      assert.ok(staple !== undefined, 'a gap between two responses');
      return !staple.equals(first);
    },
    { deadlineMs: 20_000 },
  );
  assert.ok(nextUpdate.getTime() - Date.now() > 15_000, 'it was late');
  assert.equal((await ocspStatus(keygate)).fetches.ok, 2);
});

it('a response that has ended is served no more, which for a must-staple certificate is said as an error', async (test) => {
  const bench = await openBench(test, { mustStaple: true });
  await bench.respond({ validity: ['-nmin', '1'], lateSeconds: 50 });
  const keygate = await bench.start({ ocsp: { timeout: '700ms' } });
  const { nextUpdate } = bench.answerIn(await untilStapled(keygate));
  await bench.address.become('dead');
  const line = await keygate.logged({ event: 'ocsp_expired', certificate: 'www' }, { deadlineMs: 20_000 });
  assert.ok(nextUpdate.getTime() > Date.now() - 1000 && nextUpdate.getTime() < Date.now() + 1000);
  const loud = await keygate.logged({ event: 'ocsp_must_staple_missing' });
  assert.deepEqual([line.level, loud.level], ['warn', 'error']);
  // Clients that do not know must-staple are served. The worker hears of it after the log does.
  await until('handshake without a response', async () => (await stapleOf(keygate)) === undefined);
  assert.equal(await keygate.metric('keygate_ocsp_must_staple', { certificate: 'www' }), 1);
  assert.equal(await keygate.metric('keygate_ocsp_status', { status: 'missing' }), 1);
  assert.equal(await keygate.metric('keygate_ocsp_response_expiry_timestamp_seconds'), undefined);
  await keygate.logged({ event: 'ocsp_must_staple_missing' }, { since: keygate.log.length });
});

it('a must-staple certificate that is not to be stapled is a warning of check and of a start', async (test) => {
  const bench = await openBench(test, { mustStaple: true });
  const keygate = await bench.start({ certificates: { www: { ...bench.entry('www'), ocsp: 'off' } } });
  await until('warning in the log', () =>
    keygate.log.some(({ event, message }) => event === 'token_warning' && /www.*must-staple/.test(message)),
  );
  const { exitCode, stdout } = await command(['check', '-c', keygate.file], bench.token.env);
  assert.match(stdout, /^warning +certificate www +.*must-staple/m);
  assert.equal(exitCode, 0);
  assert.equal(bench.address.requests.length, 0);
});

it('staples stay through a reload, new certificates get theirs with it, and those removed are asked for no more', async (test) => {
  const bench = await openBench(test, {}, ['www', 'other']);
  const { www, other } = { www: bench.entry('www'), other: bench.entry('other') };
  const keygate = await bench.start({ certificates: { www }, workers: 2 });
  const staple = await untilStapled(keygate);
  const reload = async (certificates: Readonly<Record<string, object>>) => {
    const report = await keygate.reload(bench.document({ certificates, workers: 2 }));
    assert.equal(report.outcome, 'committed', JSON.stringify(report));
  };
  await reload({ www, other });
  assert.deepEqual(await stapleOf(keygate), staple);
  await keygate.logged({ event: 'ocsp_stapled', certificate: 'other' });
  assert.equal(bench.address.requests.length, 2);

  // Another certificate under a name that was there: never the response of the other.
  await reload({ www: other });
  assert.equal(bench.statusIn(await stapleOf(keygate), 'other'), 'good');
  assert.equal(await keygate.metric('keygate_ocsp_status', { certificate: 'other' }), undefined);
  assert.equal(await keygate.metric('keygate_ocsp_fetches_total', { certificate: 'www', outcome: 'ok' }), 1);

  await reload({ www: { ...other, ocsp: 'off' } });
  await until('certificate without a staple', async () => (await stapleOf(keygate)) === undefined);
  assert.equal(await keygate.metric('keygate_ocsp_status'), undefined);

  await bench.address.become('dead');
  await reload({ www });
  await keygate.logged({ event: 'ocsp_fetch_failed', certificate: 'www' });
  const rolledBack = await keygate.reload(
    bench.document({ certificates: { www: { ...other, key: 'pkcs11:object=www' } } }),
  );
  assert.equal(rolledBack.outcome, 'refused');
  assert.equal((await ocspStatus(keygate)).certificate, 'www');
});

it('a worker that replaces another has the staples from its first handshake on', async (test) => {
  const bench = await openBench(test);
  const keygate = await bench.start();
  const staple = await untilStapled(keygate);
  await bench.address.become('dead');
  const [worker] = await keygate.workers();
  const since = keygate.log.length;
  process.kill(worker?.pid ?? 0, 'SIGKILL');
  await keygate.logged({ event: 'worker_ready' }, { since });
  assert.deepEqual(await stapleOf(keygate), staple);
});

it('responders are asked through a proxy, by its way of saying it', async (test) => {
  const bench = await openBench(test);
  const proxy = await responderAddress({ says: httpAnswer(bench.authority.respond(bench.leaf())) });
  test.after(() => proxy.close());
  await bench.address.become('dead');
  const keygate = await bench.start({ ocsp: { proxy: `http://127.0.0.1:${proxy.port}` } });
  assert.equal(bench.statusIn(await untilStapled(keygate)), 'good');
  assert.ok(proxy.requests[0]?.startsWith(`GET ${bench.address.url}M`), String(proxy.requests));
});

it('what is too long for GET is posted, and so is what GET does not get', async (test) => {
  const bench = await openBench(test, { longSerial: true, path: `/${'long'.repeat(30)}` });
  const keygate = await bench.start();
  assert.equal(bench.statusIn(await untilStapled(keygate)), 'good');
  assert.match(bench.address.requests[0] ?? '', /^POST \/long/);

  const refusals = ['HTTP/1.1 405 No\r\ncontent-length: 0\r\nconnection: close\r\n\r\n', ''];
  for (const butGet of refusals) {
    const picky = await openBench(test);
    await picky.address.become({ forwardTo: (await picky.authority.startResponder()).port, butGet });
    const other = await picky.start();
    assert.equal(picky.statusIn(await untilStapled(other)), 'good');
    assert.deepEqual(
      picky.address.requests.map((line) => line.split(' ', 1)[0]),
      ['GET', 'POST'],
    );
  }
});

it('with `nonce` an answer that was made before is refused, and one that was made for us is not', async (test) => {
  const bench = await openBench(test);
  await bench.address.become({ says: httpAnswer(bench.authority.respond(bench.leaf())) });
  const keygate = await bench.start({ ocsp: { nonce: true } });
  const line = await keygate.logged({ event: 'ocsp_fetch_failed', outcome: 'invalid' });
  assert.match(String(line['reason']), /nonce/);
  await bench.respond();
  assert.equal(bench.statusIn(await untilStapled(keygate)), 'good');
});

it('a certificate without a responder or without its issuer is served without, and that is said', async (test) => {
  const bench = await openBench(test, { mustStaple: true }, ['www', 'alone']);
  writeFileSync(join(bench.token.directory, 'alone.pem'), bench.leaf('alone'));
  bench.issue('www', { nobody: true });
  const certificates = { www: bench.entry('www'), alone: bench.entry('alone') };
  const keygate = await bench.start({ certificates });
  const messages = { www: /names no OCSP responder/, alone: /has no issuer/ };
  for (const [certificate, expected] of Object.entries(messages)) {
    assert.match((await keygate.logged({ event: 'ocsp_impossible', certificate })).message, expected);
    const { state, problem } = await ocspStatus(keygate, certificate);
    assert.equal(state, 'missing');
    assert.match(String(problem), expected);
  }
  assert.equal(await stapleOf(keygate), undefined);
  const { exitCode, stdout } = await command(['check', '-c', keygate.file], bench.token.env);
  assert.match(stdout, /^warning +certificate www +OCSP: it names no OCSP responder/m);
  assert.match(stdout, /^warning +certificate alone +OCSP: its chain has no issuer.*must-staple/m);
  assert.match(stdout, /^warning +ocsp +no `cache`/m);
  assert.equal(exitCode, 0);
});

it('check asks the responder, and tells what it says', async (test) => {
  const bench = await openBench(test, { mustStaple: true });
  const keygate = await bench.start({ ocsp: { cache: bench.authority.directory } });
  const check = async () => (await command(['check', '-c', keygate.file], bench.token.env)).stdout;
  assert.match(await check(), /^ok +certificate www +OCSP: good until .*, says http:\/\/127.*; must-staple$/m);
  bench.authority.revoke(bench.leaf());
  await bench.respond();
  assert.match(await check(), /^warning +certificate www +OCSP: revoked at /m);
  await bench.address.become('dead');
  assert.match(
    await check(),
    /^warning +certificate www +OCSP: no response from .*: ECONNREFUSED, and it is must-staple/m,
  );
});

interface Bench {
  readonly token: ProvisionedToken;
  readonly authority: OcspAuthority;
  /** What the certificates name; behind it, at first, an openssl that says good. */
  readonly address: ResponderAddress;
  /** Starts another openssl behind the address. */
  respond(options?: Parameters<OcspAuthority['startResponder']>[0]): Promise<void>;
  /** A new certificate for the key of this name, with the chain in its file. */
  issue(name: string, options?: { readonly nobody?: boolean }): void;
  /** The certificate in PEM. */
  leaf(name?: string): string;
  /** Its part of a configuration. */
  entry(name: string): { readonly chain: string; readonly key: string; readonly ocsp: string };
  document(sections?: Readonly<Record<string, unknown>>): KeygateDocument;
  start(sections?: Readonly<Record<string, unknown>>): Promise<Keygate>;
  answerIn(staple: Buffer | undefined, name?: string): Extract<ReturnType<typeof verifyResponse>, { status: string }>;
  statusIn(staple: Buffer | undefined, name?: string): string;
}

interface BenchOptions extends IssueOptions {
  /** Of the responder's URL. */
  readonly path?: string;
}

async function openBench(
  test: TestContext,
  { path, ...issueOptions }: BenchOptions = {},
  names: readonly string[] = ['www'],
): Promise<Bench> {
  const fixtures = new AsyncDisposableStack();
  test.after(async () => fixtures.disposeAsync());
  const authority = ocspAuthority(test);
  const token = fixtures.use(
    await provisionedToken(Object.fromEntries(names.map((name) => [name, { kind: 'p256' as const }]))),
  );
  const echo = fixtures.use(await echoUpstream());
  const address = await responderAddress('dead');
  fixtures.defer(() => address.close());
  const requests = new Map<string, string>();
  await token.use(async (open) => {
    for (const name of names) {
      const key = findPrivateKey(open, { object: name });
      requests.set(name, await createSigningRequest(open, key, { dns: ['localhost'], ip: ['127.0.0.1'] }));
    }
  });
  const leaves = new Map<string, string>();
  const bench: Bench = {
    token,
    authority,
    address,
    async respond(options) {
      await address.become({ forwardTo: (await authority.startResponder(options)).port });
    },
    issue(name, { nobody = false } = {}) {
      const responder = nobody ? {} : { responder: path === undefined ? address.url : new URL(path, address.url).href };
      leaves.set(name, authority.issue(requests.get(name) ?? '', { ...issueOptions, ...responder }));
      writeFileSync(join(token.directory, `${name}.pem`), `${leaves.get(name)}${authority.certificate}`);
    },
    leaf: (name = 'www') => leaves.get(name) ?? '',
    entry: (name) => ({ chain: join(token.directory, `${name}.pem`), key: `pkcs11:object=${name}`, ocsp: 'staple' }),
    document: (sections = {}) => ({
      certificates: { www: bench.entry('www') },
      upstreams: { echo: { servers: [echo.address] } },
      listeners: { https: {} },
      ...sections,
    }),
    async start(sections) {
      const keygate = await startKeygate(token, bench.document(sections));
      fixtures.defer(async () => {
        await keygate.stop();
      });
      return keygate;
    },
    answerIn(staple, name = 'www') {
      assert.ok(staple !== undefined, 'no staple');
      const issuer = ocspIssuer(new X509Certificate(authority.certificate));
      const answer = verifyResponse(
        staple,
        ocspSubject(new X509Certificate(bench.leaf(name)), issuer),
        undefined,
        Date.now(),
      );
      assert.ok('status' in answer, JSON.stringify(answer));
      return answer;
    },
    statusIn: (staple, name) => bench.answerIn(staple, name).status,
  };
  for (const name of names) bench.issue(name);
  await bench.respond();
  return bench;
}

/** What a client gets that asks; undefined: nothing. */
async function stapleOf(keygate: Keygate, wanted: ConnectionOptions = {}): Promise<Buffer | undefined> {
  const socket = connectTls({
    host: '127.0.0.1',
    port: keygate.port(),
    rejectUnauthorized: false,
    requestOCSP: true,
    ...wanted,
  });
  let staple: Buffer | undefined;
  socket.on('OCSPResponse', (response: Buffer | null) => {
    staple = response ?? undefined;
  });
  await once(socket, 'secureConnect');
  socket.destroy();
  return staple;
}

async function untilStapled(keygate: Keygate): Promise<Buffer> {
  return until('staple', async () => stapleOf(keygate), { deadlineMs: 20_000 });
}

async function ocspStatus(keygate: Keygate, name = 'www'): Promise<StapleStatus> {
  const { certificates } = (await keygate.status()) as unknown as {
    certificates: readonly { readonly name: string; readonly ocsp?: StapleStatus }[];
  };
  const found = certificates.find((certificate) => certificate.name === name)?.ocsp;
  assert.ok(found !== undefined, JSON.stringify(certificates));
  return found;
}

function cachedFile(cache: string): string | undefined {
  try {
    const name = readdirSync(cache).find((each) => each.endsWith('.ocsp'));
    return name === undefined ? undefined : join(cache, name);
  } catch {
    return undefined;
  }
}
