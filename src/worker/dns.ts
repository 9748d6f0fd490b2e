/**
 * Owns: one question for TLSA records (RFC 6698) to a resolver that validates DNSSEC, and how far its answer holds.
 * Must not know: what the records are compared with; when to ask again.
 * Runs: main thread of a worker and of `keygate check`.
 */
import { randomInt } from 'node:crypto';
import { createSocket } from 'node:dgram';
import { once } from 'node:events';
import { connect as connectTcp, isIPv6 } from 'node:net';
import type { Socket } from 'node:net';
import { connect as connectTls } from 'node:tls';
import {
  AUTHENTIC_DATA,
  CHECKING_DISABLED,
  decode,
  DNSSEC_OK,
  encode,
  RECURSION_DESIRED,
  type Answer,
  type DecodedPacket,
} from 'dns-packet';
import type { DnsConfig } from '../config/config.ts';
import type { TlsaRecord } from '../engine/native.d.ts';

/** What is known after one question. Only `secure` may be believed. */
export type TlsaLookup =
  /** DNSSEC vouches for these records; none: it vouches for that. */
  | { readonly state: 'secure'; readonly records: readonly TlsaRecord[]; readonly ttlMs: number }
  /** The zone is not signed, or the resolver does not validate. */
  | { readonly state: 'insecure' }
  /** There is an answer, and DNSSEC says that it is not the zone's. */
  | { readonly state: 'bogus' }
  /** No answer that says anything. */
  | { readonly state: 'indeterminate'; readonly why: string };

export interface Resolver {
  readonly address: DnsConfig['resolver'];
  /** Undefined: UDP and TCP. */
  readonly tls: { readonly name: string; readonly roots: readonly string[] } | undefined;
}

/** With what its declaration forgets. */
interface Message extends DecodedPacket {
  /** `NOERROR`, `NXDOMAIN`, `SERVFAIL`, ... */
  readonly rcode: string;
}

/** For one message and its answer. A resolver that has to ask around takes longer than one that knows. */
const exchangeDeadlineMs = 3000;
/** UDP loses things, also on loopback. */
const udpAttempts = 2;
/** No fragments anywhere (DNS flag day 2020). */
const udpBytesMax = 1232;
/** A chain of aliases is what the resolver has followed; this only ends loops. */
const aliasesMax = 16;

/** @param name `_443._tcp.example.org`. Never throws for what the resolver says or does not say. */
export async function lookUpTlsa(resolver: Resolver, name: string): Promise<TlsaLookup> {
  try {
    const answer = await ask(resolver, name, 0);
    switch (answer.rcode) {
      case 'NOERROR':
      case 'NXDOMAIN':
        return answer.flag_ad ? secure(answer, name) : { state: 'insecure' };
      case 'SERVFAIL': {
        // Without checking there is an answer: it is the checking that fails.
        const { rcode } = await ask(resolver, name, CHECKING_DISABLED);
        if (rcode === 'NOERROR' || rcode === 'NXDOMAIN') return { state: 'bogus' };
        return { state: 'indeterminate', why: 'the resolver failed (SERVFAIL)' };
      }
      default:
        return { state: 'indeterminate', why: `the resolver answered ${answer.rcode}` };
    }
  } catch (error) {
    const { code, message } = error as NodeJS.ErrnoException;
    return { state: 'indeterminate', why: code ?? message };
  }
}

/** The records at the end of the aliases that begin at `name`; they, the aliases or the denial say how long they hold. */
function secure({ answers = [], authorities = [] }: DecodedPacket, name: string): TlsaLookup {
  const ttls: number[] = [];
  let owner = canonical(name);
  for (let followed = 0; followed < aliasesMax; followed += 1) {
    const alias = answers.find((answer) => answer.type === 'CNAME' && canonical(answer.name) === owner);
    if (alias?.type !== 'CNAME') break;
    ttls.push(alias.ttl ?? 0);
    owner = canonical(alias.data);
  }
  const records = answers.flatMap((answer) => {
    if (answer.type !== 'TLSA' || canonical(answer.name) !== owner) return [];
    ttls.push(answer.ttl ?? 0);
    const { usage, selector, matchingType, certificate } = answer.data;
    return [{ usage, selector, matchingType, data: certificate }];
  });
  if (records.length === 0) ttls.push(...authorities.flatMap(negativeTtl));
  return { state: 'secure', records, ttlMs: Math.min(...ttls, ttlSecondsMax) * 1000 };
}

/** RFC 2308 5. */
function negativeTtl(answer: Answer): number[] {
  return answer.type === 'SOA' ? [Math.min(answer.ttl ?? 0, answer.data.minimum ?? 0)] : [];
}

/** RFC 8767 4: longer is a mistake. */
const ttlSecondsMax = 7 * 86_400;

function canonical(name: string): string {
  return name.toLowerCase().replace(/\.$/, '');
}

/** @throws Error when there is no answer to this question. */
async function ask(resolver: Resolver, name: string, flags: number): Promise<Message> {
  const id = randomInt(0x1_0000);
  const question = encode({
    type: 'query',
    id,
    // RFC 6840 5.7: with AD we say that we know what it means in the answer.
    flags: RECURSION_DESIRED | AUTHENTIC_DATA | flags,
    questions: [{ type: 'TLSA', class: 'IN', name }],
    additionals: [
      {
        type: 'OPT',
        name: '.',
        udpPayloadSize: udpBytesMax,
        flags: DNSSEC_OK,
        extendedRcode: 0,
        ednsVersion: 0,
        options: [],
        flag_do: true,
      },
    ],
  });
  const isAnswer = (message: Buffer) => answerTo(message, id, name);
  if (resolver.tls === undefined) {
    const answer = await overUdp(resolver, question, isAnswer);
    if (!answer.flag_tc) return answer;
  }
  return overStream(resolver, question, isAnswer);
}

type Understand = (message: Buffer) => Message | undefined;

/** Undefined for anything that does not answer this question. */
function answerTo(message: Buffer, id: number, name: string): Message | undefined {
  try {
    const packet = decode(message) as Message;
    const [question, ...others] = packet.questions ?? [];
    const fits =
      packet.id === id &&
      packet.type === 'response' &&
      others.length === 0 &&
      question?.type === 'TLSA' &&
      canonical(question.name) === canonical(name);
    return fits ? packet : undefined;
  } catch {
    return undefined;
  }
}

async function overUdp({ address }: Resolver, question: Buffer, understand: Understand): Promise<Message> {
  const socket = createSocket(isIPv6(address.host) ? 'udp6' : 'udp4');
  const { promise, resolve, reject } = Promise.withResolvers<Message>();
  socket.on('error', reject);
  socket.on('message', (message) => {
    const answer = understand(message);
    if (answer !== undefined) resolve(answer);
  });
  // Connected, so that the kernel drops what is not from the resolver, and tells when nobody is there.
  socket.connect(address.port, address.host, () => socket.send(question));
  let attempt = 1;
  const timer = setInterval(() => {
    attempt += 1;
    if (attempt > udpAttempts) reject(silence());
    else socket.send(question);
  }, exchangeDeadlineMs / udpAttempts);
  try {
    return await promise;
  } finally {
    clearInterval(timer);
    socket.close();
  }
}

async function overStream(resolver: Resolver, question: Buffer, understand: Understand): Promise<Message> {
  const { address, tls } = resolver;
  const socket: Socket =
    tls === undefined
      ? connectTcp(address)
      : connectTls({ ...address, ca: [...tls.roots], servername: tls.name, ALPNProtocols: ['dot'] });
  const timer = setTimeout(() => socket.destroy(silence()), exchangeDeadlineMs);
  try {
    await once(socket, tls === undefined ? 'connect' : 'secureConnect');
    const length = Buffer.alloc(2);
    length.writeUInt16BE(question.length);
    socket.write(Buffer.concat([length, question]));
    let received = Buffer.alloc(0);
    for await (const chunk of socket) {
      received = Buffer.concat([received, chunk as Buffer]);
      if (received.length < 2 || received.length < 2 + received.readUInt16BE(0)) continue;
      const answer = understand(received.subarray(2, 2 + received.readUInt16BE(0)));
      if (answer !== undefined) return answer;
      throw new Error('the resolver answered another question');
    }
    throw new Error('the resolver closed the connection');
  } finally {
    clearTimeout(timer);
    socket.on('error', () => {}).destroy();
  }
}

function silence(): Error {
  return new Error(`no answer in ${exchangeDeadlineMs} ms`);
}
