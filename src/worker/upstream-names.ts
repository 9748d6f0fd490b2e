/**
 * Owns: from the names of upstream servers to addresses, which is all that the engine connects to.
 * Must not know: the engine, whether anybody answers there.
 * Runs: main thread of a worker, once per start, and of `keygate check`.
 */
import { lookup } from 'node:dns/promises';
import { isIP } from 'node:net';
import { formatAddress } from '../config/address.ts';
import type { ServerAddress, UpstreamConfig } from '../config/config.ts';
import { ServiceError } from '../errors.ts';

export interface ResolvedUpstream {
  /** Without names, in the order of the configuration. */
  readonly servers: readonly ServerAddress[];
  /** As configured, of each of them: what its certificate is for unless told otherwise. Undefined for a socket. */
  readonly hosts: readonly (string | undefined)[];
  /** One sentence for each server that is left out. */
  readonly warnings: readonly string[];
  /** `upstream_unresolved`, when no server is left. */
  readonly error: ServiceError | undefined;
}

/** A resolver that does not answer must not keep a worker from serving with the servers that are known. */
const lookupDeadlineMs = 5000;

/**
 * Looks up every name once. A server whose name has no address is left out as long as another one is left: a worker
 * that is replaced during an outage of DNS must be able to start.
 */
export async function resolveUpstream({
  name,
  servers,
}: Pick<UpstreamConfig, 'name' | 'servers'>): Promise<ResolvedUpstream> {
  const answers = await Promise.all(servers.map(resolveServer));
  const resolved = answers.filter((answer) => 'address' in answer);
  const failures = answers.flatMap((answer) => ('failure' in answer ? [answer.failure] : []));
  if (resolved.length > 0) {
    const warnings = failures.map(
      (failure) => `upstream ${name}: ${failure} has no address and is left out until a worker starts anew`,
    );
    return {
      servers: resolved.map(({ address }) => address),
      hosts: resolved.map(({ host }) => host),
      warnings,
      error: undefined,
    };
  }
  const error = new ServiceError(
    'upstream_unresolved',
    `upstream ${name}: no server has an address: ${failures.join(', ')}`,
    {
      unavailable: true,
      hint: 'use addresses, or make the names resolvable on this host (getent ahosts NAME asks as keygate does)',
    },
  );
  return { servers: [], hosts: [], warnings: [], error };
}

type Answer = { readonly address: ServerAddress; readonly host: string | undefined } | { readonly failure: string };

async function resolveServer(server: ServerAddress): Promise<Answer> {
  if (!('host' in server)) return { address: server, host: undefined };
  if (isIP(server.host) !== 0) return { address: server, host: server.host };
  const late = Promise.withResolvers<never>();
  const timer = setTimeout(() => {
    late.reject(new Error(`no answer in ${lookupDeadlineMs} ms`));
  }, lookupDeadlineMs);
  try {
    const { address } = await Promise.race([lookup(server.host), late.promise]);
    return { address: { host: address, port: server.port }, host: server.host };
  } catch (error) {
    const { code, message } = error as NodeJS.ErrnoException;
    return { failure: `${formatAddress(server)} (${code ?? message})` };
  } finally {
    clearTimeout(timer);
  }
}
