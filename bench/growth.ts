/**
 * Owns: costs that grow with the configuration: what a certificate more costs in memory, at the start, in a reload and in each
 * handshake, and what a listener more costs in each scrape.
 * Must not know: how results are kept or shown; other contenders.
 * Runs: in the benchmark's process, which is idle while something is measured.
 *
 * Three keygates that differ in nothing but the size of their configuration run side by side, so that whatever else the machine
 * does meets all of them.
 */
import { once } from 'node:events';
import { mkdirSync, writeFileSync } from 'node:fs';
import { get, request } from 'node:http';
import type { IncomingMessage } from 'node:http';
import { join } from 'node:path';
import { text } from 'node:stream/consumers';
import { setTimeout as delay } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import type { Keys } from './keys.ts';
import { runHandshakes, startUpstream } from './load.ts';
import { CpuMeter, cpuSecondsSinceStart, freePort, Pinned, pssBytes } from './processes.ts';

export interface GrowthPlan {
  /** Of the keygate with many certificates, each for a name of its own, all of one key; from 2. */
  readonly certificates: number;
  /** Of the keygate with many listeners; from 2. */
  readonly listeners: number;
  readonly scrapes: number;
  /** Of handshakes with each of the two, in each round. */
  readonly seconds: number;
  readonly connections: number;
  readonly rounds: number;
}

export interface GrowthBed {
  readonly loadProgram: string;
  /** With P-256. */
  readonly keys: Keys;
}

/** Names end in their unit; CPU is user + system of primary and worker. `one_`: with one certificate and one listener. */
export interface GrowthRound {
  /** From exec until `/ready` says so, with the certificates. */
  readonly start_ms: number;
  readonly one_start_ms: number;
  readonly start_cpu_ms: number;
  readonly one_start_cpu_ms: number;
  /** Of `POST /reload`, with the certificates. */
  readonly reload_ms: number;
  readonly one_reload_ms: number;
  /** What each certificate more takes, in one worker and in the primary together, after the start. */
  readonly certificate_bytes: number;
  /** With the certificates, asking for all their names in turn. */
  readonly handshake_cpu_us: number;
  readonly one_handshake_cpu_us: number;
  /** With the listeners. */
  readonly scrape_cpu_ms: number;
  readonly one_scrape_cpu_ms: number;
  readonly scrape_bytes: number;
  readonly one_scrape_bytes: number;
}

/** @throws when a keygate does not start, a handshake fails, or an answer is not 200. */
export async function measureGrowth(
  bed: GrowthBed,
  plan: GrowthPlan,
  progress: (line: string) => void,
): Promise<readonly GrowthRound[]> {
  const rounds: GrowthRound[] = [];
  for (let round = 0; round < plan.rounds; round += 1) {
    progress(`growth: round ${round + 1}/${plan.rounds}`);
    rounds.push(await measureRound(bed, plan));
  }
  return rounds;
}

async function measureRound(bed: GrowthBed, plan: GrowthPlan): Promise<GrowthRound> {
  const upstream = await startUpstream(bed.loadProgram, cores.load);
  const started: Started[] = [];
  const begin = async (title: string, size: Size): Promise<Started> => {
    const one = await start(bed.keys, title, size, upstream.addresses);
    started.push(one);
    return one;
  };
  try {
    const one = await begin('one', { certificates: 1, listeners: 1 });
    const certificates = await begin('certificates', { certificates: plan.certificates, listeners: 1 });
    const listeners = await begin('listeners', { certificates: 1, listeners: plan.listeners });
    const grown = pssBytes(certificates.pinned.pid) - pssBytes(one.pinned.pid);
    const handshakes = await inTurn([one, certificates], async (each) => handshakeCpuUs(bed, plan, each));
    const scrapes = await inTurn([one, listeners], async (each) => scrapeCpuMs(plan, each));
    return {
      start_ms: certificates.startMs,
      one_start_ms: one.startMs,
      start_cpu_ms: certificates.startCpuMs,
      one_start_cpu_ms: one.startCpuMs,
      reload_ms: await reloadMs(certificates),
      one_reload_ms: await reloadMs(one),
      certificate_bytes: grown / (plan.certificates - 1),
      handshake_cpu_us: handshakes[1],
      one_handshake_cpu_us: handshakes[0],
      scrape_cpu_ms: scrapes[1],
      one_scrape_cpu_ms: scrapes[0],
      scrape_bytes: await scrapeBytes(listeners),
      one_scrape_bytes: await scrapeBytes(one),
    };
  } finally {
    await Promise.all([...started.map(({ pinned }) => pinned.stop()), upstream.pinned.stop()]);
  }
}

interface Size {
  readonly certificates: number;
  readonly listeners: number;
}

interface Started {
  readonly pinned: Pinned;
  readonly size: Size;
  readonly port: number;
  readonly adminPort: number;
  readonly startMs: number;
  readonly startCpuMs: number;
}

async function start(keys: Keys, title: string, size: Size, upstreams: readonly string[]): Promise<Started> {
  const [port, adminPort] = [await freePort(), await freePort()];
  const config = writeConfig(keys, title, size, { port, adminPort, upstreams });
  const startedAt = performance.now();
  const pinned = new Pinned(`keygate, ${title}`, cores.subject, {
    file: join(root, 'bin/keygate'),
    args: ['serve', '-c', config],
    env: keys.token.env,
  });
  await ready(pinned, adminPort);
  const [startMs, startCpuMs] = [performance.now() - startedAt, cpuSecondsSinceStart(pinned.pid) * 1000];
  // What it gives back after its start is not part of it, and must be over before its memory is looked at.
  await delay(settleMs);
  return { pinned, size, port, adminPort, startMs, startCpuMs };
}

const root = fileURLToPath(new URL('..', import.meta.url));
const cores = { subject: [0], load: [1] };
const settleMs = 1000;

function writeConfig(
  keys: Keys,
  title: string,
  { certificates, listeners }: Size,
  { port, adminPort, upstreams }: { port: number; adminPort: number; upstreams: readonly string[] },
): string {
  const { token } = keys;
  const key = keys.files.p256;
  const chains =
    certificates === 1 ? [{ name: 'localhost', file: key.certificate }] : keys.certificates('p256', certificates);
  const common = 'policy: bench, upstream: lines';
  const lines = [
    'workers: 1',
    'log: { level: warn }',
    `admin: { listen: "127.0.0.1:${adminPort}" }`,
    'tokens:',
    `  hsm: { module: ${token.module}, uri: "pkcs11:token=${key.token}", pin: { file: ${token.pinFile} } }`,
    'certificates:',
    ...chains.map(({ name, file }) => `  ${name}: { chain: ${file}, key: "pkcs11:object=${key.label}" }`),
    'policies:',
    '  bench: { minVersion: "1.3", groups: [X25519], cipherSuites: [TLS_AES_128_GCM_SHA256], tickets: false }',
    'upstreams:',
    `  lines: { servers: [${upstreams.map((address) => `"${address}"`).join(', ')}] }`,
    'listeners:',
    `  tls: { bind: ["127.0.0.1:${port}"], certificates: [${chains.map(({ name }) => name).join(', ')}], ${common} }`,
    ...Array.from(
      { length: listeners - 1 },
      (_, index) => `  more-${index}: { bind: ["127.0.0.1:0"], certificates: [${chains[0]?.name}], ${common} }`,
    ),
  ];
  const directory = join(token.directory, 'growth');
  mkdirSync(directory, { recursive: true, mode: 0o700 });
  const path = join(directory, `${title}.yaml`);
  writeFileSync(path, `${lines.join('\n')}\n`, { mode: 0o600 });
  return path;
}

/** Resolves when the admin server says that a worker is ready. */
async function ready(pinned: Pinned, adminPort: number): Promise<void> {
  const until = performance.now() + startDeadlineMs;
  for (;;) {
    const status = await readiness(adminPort);
    if (status === 200) return;
    if (pinned.ended) throw new Error(`did not start: ${pinned.obituary}`);
    if (performance.now() > until) throw new Error(`not ready after ${startDeadlineMs} ms: ${pinned.obituary}`);
    // Nothing tells when it is; the interval is the resolution of start_ms.
    await delay(readyIntervalMs);
  }
}

const startDeadlineMs = 120_000;
const readyIntervalMs = 20;

/** Undefined while nobody listens. */
async function readiness(adminPort: number): Promise<number | undefined> {
  try {
    return (await answerOf(adminPort, '/ready')).status;
  } catch {
    return undefined;
  }
}

/** The mean of two measurements of each, there and back: what gets slower meanwhile gets slower for both. */
async function inTurn(
  [first, second]: readonly [Started, Started],
  measured: (each: Started) => Promise<number>,
): Promise<readonly [number, number]> {
  // Warm, and asked for everything once.
  for (const each of [first, second]) await measured(each);
  const there = [await measured(first), await measured(second)] as const;
  const back = [await measured(second), await measured(first)] as const;
  return [(there[0] + back[1]) / 2, (there[1] + back[0]) / 2];
}

async function handshakeCpuUs({ loadProgram, keys }: GrowthBed, plan: GrowthPlan, each: Started): Promise<number> {
  const { certificates } = each.size;
  const meter = new CpuMeter(each.pinned, cores.subject);
  const { handshakes, seconds, failures } = await runHandshakes(
    loadProgram,
    cores.load,
    {
      to: `127.0.0.1:${each.port}`,
      certificate: keys.files.p256.certificate,
      serverName: certificates === 1 ? 'localhost' : `n{0..${certificates - 1}}.bench.test`,
      connections: plan.connections,
      seconds: plan.seconds,
    },
    () => meter.start(),
  );
  const { cpuSeconds } = meter.stop(seconds);
  if (Object.keys(failures).length > 0) throw new Error(`handshakes failed: ${JSON.stringify(failures)}`);
  return (cpuSeconds / handshakes) * 1e6;
}

async function scrapeCpuMs({ scrapes }: GrowthPlan, each: Started): Promise<number> {
  const startedAt = performance.now();
  const meter = new CpuMeter(each.pinned, cores.subject);
  for (let scrape = 0; scrape < scrapes; scrape += 1) await scrapeBytes(each);
  const { cpuSeconds } = meter.stop((performance.now() - startedAt) / 1000);
  return (cpuSeconds / scrapes) * 1000;
}

async function scrapeBytes({ adminPort }: Started): Promise<number> {
  const { status, body } = await answerOf(adminPort, '/metrics');
  if (status !== 200) throw new Error(`GET /metrics: expected 200, found ${status}: ${body}`);
  return Buffer.byteLength(body);
}

async function reloadMs({ adminPort }: Started): Promise<number> {
  const startedAt = performance.now();
  const { status, body } = await answerOf(adminPort, '/reload', 'POST');
  if (status !== 200) throw new Error(`POST /reload: expected 200, found ${status}: ${body}`);
  // What was done is told as JSON; anything else is another server.
  JSON.parse(body);
  return performance.now() - startedAt;
}

async function answerOf(
  port: number,
  path: string,
  method: 'GET' | 'POST' = 'GET',
): Promise<{ readonly status: number | undefined; readonly body: string }> {
  // Without the header a POST is taken for one of a foreign web page.
  const place = { host: '127.0.0.1', port, path, agent: false, headers: method === 'POST' ? { 'x-keygate': '1' } : {} };
  const asked = method === 'GET' ? get(place) : request({ ...place, method }).end();
  const [response] = (await once(asked, 'response')) as [IncomingMessage];
  return { status: response.statusCode, body: await text(response) };
}
