/**
 * Owns: asking a responder: GET or POST (RFC 5019 5, RFC 6960 A.1), directly or through a proxy, with a limit on everything.
 * Must not know: when to ask, what becomes of the answer.
 * Runs: main thread of the primary and of `keygate check`.
 */
import { randomBytes } from 'node:crypto';
import { request as httpRequest } from 'node:http';
import type { IncomingMessage } from 'node:http';
import type { OcspConfig } from '../config/config.ts';
import { ocspRequest } from './request.ts';
import { responseBytesMax, verifyResponse } from './response.ts';
import type { OcspAnswer, OcspRefusal } from './response.ts';
import type { OcspSubject } from './subject.ts';

export const fetchOutcomes = ['ok', 'unreachable', 'http_error', 'responder_error', 'invalid', 'unknown'] as const;
/**
 * `unreachable`: no answer in time; `http_error`: an answer that is none of OCSP; the others: see `OcspRefusal`.
 */
export type FetchOutcome = (typeof fetchOutcomes)[number];

export interface FetchFailure {
  readonly outcome: Exclude<FetchOutcome, 'ok'>;
  readonly reason: string;
}

/** RFC 5019 5: longer ones must be posted; shorter ones can come from a cache. */
const getUrlBytesMax = 255;
const nonceBytes = 32;
const headerBytesMax = 8 * 1024;

/** Asks once, which takes as long as `timeoutMs` allows at most. Does not throw. */
export async function askResponder(
  responder: URL,
  subject: OcspSubject,
  { nonce: wantsNonce, proxy, timeoutMs }: OcspConfig,
  ending?: AbortSignal,
): Promise<OcspAnswer | FetchFailure> {
  const nonce = wantsNonce ? randomBytes(nonceBytes) : undefined;
  const body = ocspRequest(subject, nonce);
  const deadline = AbortSignal.timeout(timeoutMs);
  const signal = ending === undefined ? deadline : AbortSignal.any([deadline, ending]);
  const send = async (call: Call) => exchange(call, proxy, signal);
  const post: Call = { url: responder, method: 'POST', body };
  try {
    const short = nonce === undefined ? getUrl(responder, body) : undefined;
    const first = short === undefined ? undefined : await orNothing(send({ url: short, method: 'GET' }), signal);
    // All know POST (RFC 6960 A.1); some refuse GET, or break off.
    const found = first === undefined || 'outcome' in first ? await send(post) : first;
    return 'outcome' in found ? found : verifyResponse(found.bytes, subject, nonce, Date.now());
  } catch (error) {
    return { outcome: 'unreachable', reason: whyUnreachable(error, deadline, timeoutMs) };
  }
}

export function isAnswer(result: OcspAnswer | OcspRefusal | FetchFailure): result is OcspAnswer {
  return 'status' in result;
}

async function orNothing<Found>(exchanged: Promise<Found>, signal: AbortSignal): Promise<Found | undefined> {
  try {
    return await exchanged;
  } catch (error) {
    if (signal.aborted) throw error;
    return undefined;
  }
}

interface Call {
  readonly url: URL;
  readonly method: 'GET' | 'POST';
  readonly body?: Buffer;
}

function getUrl(responder: URL, body: Buffer): URL | undefined {
  if (responder.search !== '') return undefined;
  const slash = responder.href.endsWith('/') ? '' : '/';
  const href = `${responder.href}${slash}${encodeURIComponent(body.toString('base64'))}`;
  return Buffer.byteLength(href) <= getUrlBytesMax ? new URL(href) : undefined;
}

/** @throws when there is no answer; a redirect is not followed: it could lead anywhere */
async function exchange(
  { url, method, body }: Call,
  proxy: OcspConfig['proxy'],
  signal: AbortSignal,
): Promise<{ readonly bytes: Buffer } | FetchFailure> {
  const direct = { host: url.hostname.replace(/^\[(.*)\]$/, '$1'), port: Number(url.port || 80) };
  const answered = Promise.withResolvers<IncomingMessage>();
  const asked = httpRequest({
    ...(proxy ?? direct),
    method,
    path: proxy === undefined ? `${url.pathname}${url.search}` : url.href,
    headers: {
      host: url.host,
      accept: responseType,
      ...(body === undefined ? {} : { 'content-type': 'application/ocsp-request', 'content-length': body.length }),
    },
    agent: false,
    maxHeaderSize: headerBytesMax,
    signal,
  });
  asked.once('response', answered.resolve);
  asked.on('error', answered.reject);
  asked.end(body);
  const response = await answered.promise;
  try {
    return await read(response);
  } finally {
    asked.destroy();
  }
}

const responseType = 'application/ocsp-response';

async function read(response: IncomingMessage): Promise<{ readonly bytes: Buffer } | FetchFailure> {
  const { statusCode, headers } = response;
  if (statusCode !== 200) return { outcome: 'http_error', reason: `HTTP status ${statusCode}` };
  const type = headers['content-type']?.split(';', 1)[0]?.trim().toLowerCase();
  if (type !== responseType) return { outcome: 'http_error', reason: `content-type ${JSON.stringify(type ?? '')}` };
  const chunks: Buffer[] = [];
  let length = 0;
  for await (const chunk of response as AsyncIterable<Buffer>) {
    length += chunk.length;
    if (length > responseBytesMax) {
      return { outcome: 'http_error', reason: `an answer of more than ${responseBytesMax} bytes` };
    }
    chunks.push(chunk);
  }
  return { bytes: Buffer.concat(chunks) };
}

function whyUnreachable(error: unknown, deadline: AbortSignal, timeoutMs: number): string {
  if (deadline.aborted) return `no answer in ${timeoutMs} ms`;
  const { code, message } = error as NodeJS.ErrnoException;
  return code ?? message;
}
