/**
 * Owns: running autocannon as a load of its own process, and the shape of what it says.
 * Must not know: who answers.
 * Runs: in the benchmark's process; autocannon runs in autocannon-main.ts on the load's cores.
 */
import { fileURLToPath } from 'node:url';
import type { ClientPlan, Latency } from './load.ts';
import { suiteOf } from './negotiation.ts';
import type { Setting } from './scenarios.ts';
import { runProgram } from './talk.ts';

export interface RequestsPlan extends Pick<ClientPlan, 'to' | 'certificate'> {
  readonly setting: Setting;
  readonly connections: number;
  readonly seconds: number;
}

export interface RequestsResult {
  /** Answered as they had to be. */
  readonly requests: number;
  readonly seconds: number;
  /** Errors, timeouts, connections that were lost, answers other than the expected one. */
  readonly failures: number;
  readonly requestUs: Pick<Latency, 'p50' | 'p99'>;
  /** OpenSSL's names, of one connection; all were compared with it. */
  readonly negotiated: {
    readonly protocol: string;
    readonly cipherSuite: string;
    readonly group: string;
    /** By the certificate that was to be shown. */
    readonly authorized: boolean;
  };
  readonly deviations: number;
}

const main = fileURLToPath(new URL('autocannon-main.ts', import.meta.url));

/**
 * @param started called when every connection has had an answer.
 * @throws when there was not a connection, or another thing was negotiated than the setting says.
 */
export async function runRequests(
  cores: readonly number[],
  { to, certificate, setting, connections, seconds }: RequestsPlan,
  started: () => void,
): Promise<RequestsResult> {
  const { tls, group } = setting;
  const suite = suiteOf(setting).openssl;
  const result = await runProgram<RequestsResult>(
    { file: process.execPath, args: [main] },
    cores,
    { to, certificate, tls, group, suite, connections, seconds },
    started,
  );
  const { protocol, cipherSuite, authorized, group: found } = result.negotiated;
  const compared = { protocol: [`TLSv${tls}`, protocol], cipherSuite: [suite, cipherSuite], group: [group, found] };
  const wrong = Object.entries({ ...compared, authorized: [true, authorized], deviations: [0, result.deviations] })
    .filter(([, [expected, value]]) => expected !== value)
    .map(([name, [expected, value]]) => `${name}: expected ${expected}, found ${value}`);
  if (wrong.length > 0) throw new Error(`autocannon: ${wrong.join('; ')}`);
  return result;
}
