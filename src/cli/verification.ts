/**
 * Owns: what certificates of servers and clients would be verified with right now: files that can be read, TLSA records that there are.
 * Must not know: how the engine verifies.
 * Runs: on the main thread of a command.
 */
import { isIP } from 'node:net';
import type { ClientCertificatesConfig, Config, UpstreamTlsConfig } from '../config/config.ts';
import { clientCertificatesOf } from '../config/policies.ts';
import { ConfigError } from '../errors.ts';
import type { Finding } from '../pkcs11/plan.ts';
import { lookUpTlsa } from '../worker/dns.ts';
import type { Resolver } from '../worker/dns.ts';
import { readRevocationLists } from '../worker/revocation-lists.ts';
import { pemOf, readRoots } from '../worker/roots.ts';
import { describeRecords } from '../worker/tlsa-watch.ts';
import { readTransparencyLogs } from '../worker/transparency-logs.ts';

type Examined = Pick<Config, 'file' | 'upstreams' | 'listeners' | 'policies' | 'dns' | 'transparency'>;

/** Waits some seconds at most for each server whose TLSA records are asked for. */
export async function examineVerification(config: Examined): Promise<Finding[]> {
  const findings: Finding[] = [];
  const attempt = (subject: string, examine: () => Finding[]) => {
    try {
      findings.push(...examine());
    } catch (error) {
      if (!(error instanceof ConfigError)) throw error;
      findings.push({ severity: 'error', subject, message: error.message, error });
    }
  };

  const upstreams = Object.values(config.upstreams).flatMap(({ name, servers, tls }) =>
    tls === undefined ? [] : [{ subject: `upstream ${name}`, servers, tls }],
  );
  for (const { subject, tls } of upstreams) attempt(subject, () => examineFiles(subject, tls, config.file));
  for (const listener of Object.values(config.listeners)) {
    const wanted = clientCertificatesOf(listener, config.policies);
    const subject = `listener ${listener.name}`;
    if (wanted !== undefined) attempt(subject, () => [examineClients(subject, wanted, config.file)]);
  }
  const { dns, transparency } = config;
  if (transparency !== undefined && upstreams.some(({ tls }) => tls.transparency !== 'off'))
    attempt('transparency', () => {
      const { logs, warnings } = readTransparencyLogs(transparency);
      return warnings.length === 0
        ? [{ severity: 'ok', subject: 'transparency', message: `${logs.length} logs count` }]
        : warnings.map((message) => ({ severity: 'warning', subject: 'transparency', message }));
    });

  const wanting = upstreams.filter(({ tls }) => tls.dane !== 'off');
  if (dns === undefined || wanting.length === 0) return findings;
  let resolver: Resolver | undefined;
  attempt('dns', () => {
    const tls = dns.tls && { name: dns.tls.name, roots: readRoots(dns.tls.roots, config.file).map(pemOf) };
    resolver = { address: dns.resolver, tls };
    return [];
  });
  if (resolver === undefined) return findings;
  for (const { subject, servers, tls } of wanting) {
    for (const server of servers) {
      const host = 'host' in server ? (tls.name ?? server.host) : undefined;
      if (host === undefined || !('host' in server) || isIP(host) !== 0) continue;
      findings.push(await examineTlsa(subject, `_${server.port}._tcp.${host}`, resolver, tls.dane));
    }
  }
  return findings;
}

function examineFiles(subject: string, tls: UpstreamTlsConfig, file: string): Finding[] {
  const roots = readRoots(tls.roots, file);
  const lists = readRevocationLists(tls.crls);
  const parts = [`${roots.length} trusted roots`];
  if (lists.length > 0) parts.push(`${lists.length} revocation lists`);
  if (tls.pins.length > 0) parts.push(`${tls.pins.length} pins`);
  const message = `certificates of servers: ${parts.join(', ')}`;
  if (tls.verify === 'enforce' || tls.dane === 'enforce') return [{ severity: 'ok', subject, message }];
  return [
    { severity: 'warning', subject, message: `${message}; any server is accepted, because tls.verify is report` },
  ];
}

function examineClients(
  subject: string,
  { mode, roots, crls, allow, ocsp }: ClientCertificatesConfig,
  file: string,
): Finding {
  const parts = [`${readRoots(roots, file, 'clientCertificates.roots').length} trusted roots`];
  const lists = readRevocationLists(crls, 'clientCertificates.crls');
  if (lists.length > 0) parts.push(`${lists.length} revocation lists`);
  const named = allow === undefined ? undefined : Object.values(allow).flat().length;
  parts.push(named === undefined ? 'all that they vouch for' : `${named} names that are let in`);
  if (ocsp !== undefined) parts.push(`OCSP asked of ${ocsp.responder ?? 'whom each certificate names'} (${ocsp.mode})`);
  const asked = mode === 'require' ? 'required' : 'asked for';
  return { severity: 'ok', subject, message: `certificates of clients are ${asked}: ${parts.join(', ')}` };
}

async function examineTlsa(
  subject: string,
  name: string,
  resolver: Resolver,
  mode: UpstreamTlsConfig['dane'],
): Promise<Finding> {
  const answer = await lookUpTlsa(resolver, name);
  const refused = mode === 'enforce' ? 'every handshake would be refused' : 'nothing to compare certificates with';
  switch (answer.state) {
    case 'secure':
      if (answer.records.length > 0)
        return { severity: 'ok', subject, message: `TLSA ${name}: ${describeRecords(answer.records)}` };
      return { severity: 'warning', subject, message: `TLSA ${name}: there is no record: ${refused}` };
    case 'indeterminate':
      return { severity: 'warning', subject, message: `TLSA ${name}: no answer (${answer.why}): ${refused}` };
    default:
      return { severity: 'warning', subject, message: `TLSA ${name}: the answer is ${answer.state}: ${refused}` };
  }
}
