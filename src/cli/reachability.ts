/**
 * Owns: whether upstream servers have addresses and accept connections right now.
 * Must not know: health checks of the engine; tokens.
 * Runs: on the main thread of a command.
 */
import { connect } from 'node:net';
import { formatAddress } from '../config/address.ts';
import type { Config, ServerAddress, TcpAddress, UnixAddress } from '../config/config.ts';
import type { Finding } from '../pkcs11/plan.ts';
import { resolveUpstream } from '../worker/upstream-names.ts';

/**
 * A server that does not answer is a warning: it may be started after keygate. An upstream without any address is an
 * error, because keygate would not start. Waits 2 s at most for each server.
 */
export async function examineUpstreams(config: Pick<Config, 'upstreams'>): Promise<Finding[]> {
  const findings: Finding[] = [];
  for (const upstream of Object.values(config.upstreams)) {
    const subject = `upstream ${upstream.name}`;
    const { servers, warnings, error } = await resolveUpstream(upstream);
    if (error !== undefined) findings.push({ severity: 'error', subject, message: error.message, error });
    findings.push(...warnings.map((message) => ({ severity: 'warning' as const, subject, message })));
    for (let start = 0; start < servers.length; start += connectsAtOnceMax) {
      const some = servers.slice(start, start + connectsAtOnceMax);
      findings.push(...(await Promise.all(some.map(async (address) => examineServer(subject, address)))));
    }
  }
  return findings;
}

const connectDeadlineMs = 2000;
const connectsAtOnceMax = 64;

async function examineServer(subject: string, address: ServerAddress): Promise<Finding> {
  if ('original' in address) return { severity: 'ok', subject, message: 'connects where each client wanted to go' };
  const reason = await whyUnreachable(address);
  const place = formatAddress(address);
  return reason === undefined
    ? { severity: 'ok', subject, message: `${place} accepts connections` }
    : { severity: 'warning', subject, message: `${place} cannot be reached: ${reason}` };
}

/** @returns undefined when it can be reached. */
async function whyUnreachable(address: TcpAddress | UnixAddress): Promise<string | undefined> {
  const { promise, resolve } = Promise.withResolvers<string | undefined>();
  const socket = connect('path' in address ? { path: address.path } : { host: address.host, port: address.port });
  socket.setTimeout(connectDeadlineMs, () => resolve(`no answer in ${connectDeadlineMs} ms`));
  socket.once('connect', () => resolve(undefined));
  socket.once('error', (error: NodeJS.ErrnoException) => resolve(error.code ?? error.message));
  try {
    return await promise;
  } finally {
    // A late error of a socket that nobody waits for must not end the command.
    socket.on('error', () => {}).destroy();
  }
}
