/**
 * Owns: whether the certificates that are to be stapled can be: what their responders say right now.
 * Must not know: how responses are kept and served.
 * Runs: on the main thread of a command.
 */
import { accessSync, constants } from 'node:fs';
import { dirname } from 'node:path';
import type { CertificateConfig, Config } from '../config/config.ts';
import { askResponder, isAnswer } from '../ocsp/exchange.ts';
import type { Finding } from '../pkcs11/plan.ts';
import { StapledCertificates } from '../primary/stapled-certificate.ts';

const questionsAtOnceMax = 8;

/** All that is found is a warning: keygate serves without staples, and goes on asking. Waits `ocsp.timeout` for a dead responder, once. */
export async function examineStapling(config: Pick<Config, 'certificates' | 'ocsp'>): Promise<Finding[]> {
  const stapled = Object.values(config.certificates).filter(({ ocsp }) => ocsp === 'staple');
  const certificates = new StapledCertificates();
  const dead = new Set<string>();
  const findings: Finding[] = stapled.length === 0 ? [] : cacheFindings(config.ocsp.cache);
  for (let start = 0; start < stapled.length; start += questionsAtOnceMax) {
    const some = stapled.slice(start, start + questionsAtOnceMax);
    const found = some.map(async (certificate) => examine(certificate, certificates, config, dead));
    findings.push(...(await Promise.all(found)).flat());
  }
  return findings;
}

async function examine(
  config: CertificateConfig,
  certificates: StapledCertificates,
  { ocsp }: Pick<Config, 'ocsp'>,
  dead: Set<string>,
): Promise<Finding[]> {
  const subject = `certificate ${config.name}`;
  const certificate = certificates.read(config);
  // A chain that cannot be served has errors of its own.
  if (certificate === undefined) return [];
  const must = certificate.mustStaple ? ', and it is must-staple (RFC 7633): clients that honour that refuse it' : '';
  const warning = (what: string): Finding[] => [{ severity: 'warning', subject, message: `OCSP: ${what}${must}` }];
  const [responder] = certificate.responders;
  if (certificate.subject === undefined || responder === undefined) return warning(certificate.obstacle ?? '');
  if (dead.has(responder.host)) return warning(`${responder.href} does not answer`);
  const found = await askResponder(responder, certificate.subject, ocsp);
  if (!isAnswer(found)) {
    if (found.outcome === 'unreachable') dead.add(responder.host);
    return warning(`no response from ${responder.href}: ${found.reason}`);
  }
  const until = found.nextUpdate.toISOString();
  if (found.status === 'revoked') {
    const { revokedAt } = found;
    return [
      {
        severity: 'warning',
        subject,
        message: `OCSP: revoked${revokedAt === undefined ? '' : ` at ${revokedAt.toISOString()}`}, says ${responder.href}`,
      },
    ];
  }
  return [
    {
      severity: 'ok',
      subject,
      message: `OCSP: good until ${until}, says ${responder.href}${certificate.mustStaple ? '; must-staple' : ''}`,
    },
  ];
}

function cacheFindings(cache: string | undefined): Finding[] {
  const subject = 'ocsp';
  if (cache === undefined) {
    return [
      {
        severity: 'warning',
        subject,
        message: 'no `cache`: after a start without a network certificates are served without staples',
      },
    ];
  }
  const why = whyNotWritable(cache);
  return why === undefined
    ? [{ severity: 'ok', subject, message: `${cache} can be written` }]
    : [{ severity: 'warning', subject, message: `${cache} cannot be written, so responses are not kept: ${why}` }];
}

/** What is not there is made. */
function whyNotWritable(directory: string): string | undefined {
  try {
    accessSync(directory, constants.W_OK | constants.X_OK);
    return undefined;
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException;
    const parent = dirname(directory);
    return code === 'ENOENT' && parent !== directory ? whyNotWritable(parent) : (code ?? String(error));
  }
}
