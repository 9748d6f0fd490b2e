/**
 * Owns: a run of autocannon: HTTP requests over TLS connections that stay open, each answer compared, and what was negotiated.
 * Must not know: who answers, what is measured against what.
 * Runs: a process of its own on the load's cores. Says {"event":"started"} when every connection has had an answer, and at the
 * end one line with the results, as keygate-load does.
 */
import { readFileSync } from 'node:fs';
import { parseArgs } from 'node:util';
import type { TLSSocket } from 'node:tls';
import autocannon from 'autocannon';
import type { Client, Instance } from 'autocannon';
import type { RequestsResult } from './autocannon.ts';

/** What the upstream answers (bench/load/src/exchange.rs). */
const answer = 'keygate!\n';
/** autocannon looks so often whether it is to end. */
const sampleMs = 10;
const warmUpSecondsMax = 10;

const { values } = parseArgs({
  options: {
    to: { type: 'string' },
    certificate: { type: 'string' },
    tls: { type: 'string' },
    group: { type: 'string' },
    suite: { type: 'string' },
    connections: { type: 'string' },
    seconds: { type: 'string' },
  },
});
await main(given('connections', Number), given('seconds', Number));

async function main(connections: number, seconds: number): Promise<void> {
  const { promise: over, resolve, reject } = Promise.withResolvers<void>();
  const load: Instance = autocannon(
    {
      url: `https://${given('to')}`,
      servername: 'localhost',
      connections,
      // Only the bound: the clock starts when every connection is warm.
      duration: seconds + warmUpSecondsMax,
      sampleInt: sampleMs,
      expectBody: answer,
      tlsOptions: {
        ca: readFileSync(given('certificate')),
        ...versions(given('tls')),
        ecdhCurve: given('group'),
        ciphers: given('suite'),
      },
    },
    (error: unknown) => (error === null ? resolve() : reject(error)),
  );
  const warm = new Map<Client, { readonly socket: TLSSocket; readonly negotiated: Negotiated }>();
  let startedAt: number | undefined;
  let latenciesMs: number[] = [];
  let failures = 0;
  // autocannon's own percentiles are whole milliseconds.
  load.on('response', (client, status, _bytes, tookMs) => {
    if (status !== 200) failures += 1;
    latenciesMs.push(tookMs);
    if (warm.has(client)) return;
    const socket = socketOf(client);
    warm.set(client, { socket, negotiated: negotiatedBy(socket) });
    if (warm.size < connections) return;
    startedAt = performance.now();
    latenciesMs = [];
    say({ event: 'started' });
    setTimeout(() => load.stop(), seconds * 1000);
  });
  load.on('reqError', () => (failures += 1));
  load.addListener('reqMismatch', () => (failures += 1));
  await over;
  // A connection that the server ended was made anew without a word; its handshake is no request.
  failures += [...warm].filter(([client, { socket }]) => socketOf(client) !== socket).length;
  const [negotiated, ...others] = [...warm.values()].map((each) => each.negotiated);
  if (startedAt === undefined || negotiated === undefined)
    throw new Error(
      `${warm.size} of ${connections} connections have been answered after ${warmUpSecondsMax} s; ${failures} failures`,
    );
  const sortedMs = latenciesMs.toSorted((left, right) => left - right);
  const result: RequestsResult = {
    requests: latenciesMs.length,
    seconds: (performance.now() - startedAt) / 1000,
    failures,
    requestUs: { p50: percentileUs(sortedMs, 0.5), p99: percentileUs(sortedMs, 0.99) },
    negotiated,
    deviations: others.filter((each) => JSON.stringify(each) !== JSON.stringify(negotiated)).length,
  };
  say({ event: 'finished', ...result });
}

type Negotiated = RequestsResult['negotiated'];

/** Its types do not tell. */
function socketOf(client: Client): TLSSocket {
  return (client as unknown as { readonly conn: TLSSocket }).conn;
}

function negotiatedBy(conn: TLSSocket): Negotiated {
  const exchange = conn.getEphemeralKeyInfo() as { readonly name?: string } | null;
  return {
    protocol: String(conn.getProtocol()),
    cipherSuite: conn.getCipher().name,
    group: String(exchange?.name),
    authorized: conn.authorized,
  };
}

function versions(tls: string) {
  const version = `TLSv${tls}` as 'TLSv1.2' | 'TLSv1.3';
  return { minVersion: version, maxVersion: version };
}

function percentileUs(sortedMs: readonly number[], share: number): number | null {
  const value = sortedMs[Math.ceil(sortedMs.length * share) - 1];
  return value === undefined ? null : value * 1000;
}

function given(name: keyof typeof values): string;
function given<T>(name: keyof typeof values, as: (text: string) => T): T;
function given<T>(name: keyof typeof values, as?: (text: string) => T): T | string {
  const text = values[name];
  if (text === undefined) throw new Error(`--${name} is missing`);
  return as === undefined ? text : as(text);
}

function say(event: object): void {
  process.stdout.write(`${JSON.stringify(event)}\n`);
}
