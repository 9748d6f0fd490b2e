/**
 * Owns: what an admin server is started with in tests, and asking it.
 * Must not know: what is tested.
 * Runs: in test processes.
 */
import { once } from 'node:events';
import { request as httpRequest } from 'node:http';
import type { IncomingHttpHeaders, IncomingMessage } from 'node:http';
import { request as httpsRequest } from 'node:https';
import type { RequestOptions } from 'node:https';
import { text } from 'node:stream/consumers';
import type { AdminConfig, LogLevel } from '../../src/config/config.ts';
import type { AdminView } from '../../src/primary/admin.ts';

/** Any port of loopback, open to everybody there. */
export const loopback: AdminConfig = { listen: { host: '127.0.0.1', port: 0 }, token: undefined, tls: undefined };

/** Of a service that does not exist. */
export type TestView = AdminView & {
  unreadiness: string | undefined;
  logLevel: LogLevel;
  scrapes: number;
  drains: number;
  /** How much it is to tell a page once. */
  overviewBytes: number;
};

export function testView(): TestView {
  return {
    unreadiness: undefined,
    logLevel: 'info',
    scrapes: 0,
    drains: 0,
    overviewBytes: 0,
    async metrics() {
      return `scrapes ${++this.scrapes}\n`;
    },
    async status() {
      return { version: '1.2.3', listeners: { https: ['127.0.0.1:443'] } };
    },
    history: () => ({ points: [1, 2, 3] }),
    overview() {
      return { ready: this.unreadiness === undefined, filler: 'x'.repeat(this.overviewBytes) };
    },
    setLogLevel(level) {
      this.logLevel = level;
    },
    async reload() {
      return { outcome: 'committed', seconds: 0.5, changes: ['certificates.www changed'], reasons: [] };
    },
    upgrade: async () => ({ refused: 'nobody is there' }),
    drain() {
      this.drains += 1;
    },
  };
}

export interface Reply {
  readonly status: number | undefined;
  readonly headers: IncomingHttpHeaders;
  readonly body: string;
}

/** On a connection of its own. */
export async function ask(options: RequestOptions): Promise<Reply> {
  const response = await begin(options);
  return { status: response.statusCode, headers: response.headers, body: await text(response) };
}

/** An answer whose end is not waited for; HTTPS when the options say so. */
export async function begin(options: RequestOptions): Promise<IncomingMessage> {
  const send = options.protocol === 'https:' ? httpsRequest : httpRequest;
  const request = send({ host: '127.0.0.1', agent: false, ...options });
  request.end();
  const [response] = (await once(request, 'response')) as [IncomingMessage];
  return response;
}

export function brief({ status, body }: Reply): readonly [number | undefined, string] {
  return [status, body];
}
