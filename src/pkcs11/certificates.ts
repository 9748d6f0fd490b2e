/**
 * Owns: reading a certificate chain from its file and judging it: order, dates, key, names.
 * Must not know: tokens and private keys; whether clients trust the issuer.
 * Runs: on the main thread of a worker or of a command.
 */
import { X509Certificate } from 'node:crypto';
import type { KeyObject } from 'node:crypto';
import { closeSync, fstatSync, openSync, readFileSync } from 'node:fs';
import { accessHint } from '../config/access.ts';
import type { CertificateConfig } from '../config/config.ts';
import type { Problem } from '../errors.ts';
import { isMustStaple } from '../ocsp/subject.ts';
import { algorithmOf, describePublicKey } from './algorithm.ts';
import type { KeyAlgorithm } from './algorithm.ts';

export interface CertificateChain {
  /** Leaf first; at least one. */
  readonly chainDer: readonly Buffer[];
  /** What SNI may ask for: lower case, `*.` only as the whole first label; may be empty. */
  readonly names: readonly string[];
  readonly keyAlgorithm: KeyAlgorithm;
  /** SubjectPublicKeyInfo of the leaf in DER. */
  readonly spki: Buffer;
  /** When the first certificate of the chain expires. */
  readonly notAfter: Date;
}

export interface ChainReading {
  /** Undefined when there is any problem. */
  readonly chain: CertificateChain | undefined;
  /** Every problem, each with its line in the PEM file. */
  readonly problems: readonly Problem[];
  /** What a person should know although it works. */
  readonly warnings: readonly string[];
}

/** Real chains have two to four certificates of 1 to 2 KiB. */
export const chainBytesMax = 256 * 1024;
export const chainCertificatesMax = 10;
/** Warn while there is still time to renew. */
const expiryWarningDays = 14;

/** Issuers that were met before, by their PEM block: thousands of chains have one intermediate in common. */
export type KnownIssuers = Map<string, X509Certificate>;

/** Which end of TLS shows a certificate: a listener is a server, an upstream that names one is a client. */
export type Purpose = 'server' | 'client';

/** Reads and judges the chain as of `now`; never throws for what is wrong with the file. */
export function readChain(
  config: CertificateConfig,
  now = new Date(),
  issuers: KnownIssuers = new Map<string, X509Certificate>(),
  purposes: readonly Purpose[] = ['server'],
): ChainReading {
  const report = new Report(config);
  const text = readBounded(config.chain, report);
  const blocks = text === undefined ? [] : pemBlocks(text, report);
  const members = blocks.flatMap((block, index) => parseBlock(block, report, index === 0 ? undefined : issuers) ?? []);
  const [leaf] = members;
  if (leaf === undefined) {
    if (report.problems.length === 0) report.problem(1, 'no certificate', 'a PEM certificate');
    return report.reading(undefined);
  }
  checkOrder(members, report);
  // OCSP needs the issuer, which may be the root itself.
  if (config.ocsp === 'off' || members.length > 2) warnOfRoot(members, report);
  for (const member of members) checkDates(member, now, report);
  const key = checkKey(leaf, report);
  checkPurposes(leaf, purposes, report);
  if (config.ocsp === 'off' && isMustStaple(leaf.certificate.raw)) {
    report.warning(
      'it is must-staple (RFC 7633) and is not stapled, so clients that honour that refuse it: `ocsp: staple`',
    );
  }
  const names = serverNames(leaf.certificate, report);
  if (key === undefined) return report.reading(undefined);

  return report.reading({
    chainDer: members.map(({ certificate }) => certificate.raw),
    names,
    keyAlgorithm: key.algorithm,
    spki: key.publicKey.export({ format: 'der', type: 'spki' }),
    notAfter: new Date(Math.min(...members.map(({ certificate }) => certificate.validToDate.getTime()))),
  });
}

/** A DNS name in ASCII of at most 253 characters, `*` only as the whole first label (RFC 6125 6.4.3). */
export function isServerName(name: string): boolean {
  return (
    name.length <= 253 &&
    /^(?:\*\.)?(?:[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?)(?:\.[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?)*$/i.test(name)
  );
}

interface Block {
  readonly pem: string;
  /** 1-based line of its BEGIN. */
  readonly line: number;
  readonly label: string;
}

interface Member {
  readonly certificate: X509Certificate;
  readonly line: number;
}

/** Collects; nothing is thrown before everything was looked at. */
class Report {
  readonly problems: Problem[] = [];
  readonly warnings: string[] = [];
  readonly #config: CertificateConfig;

  constructor(config: CertificateConfig) {
    this.#config = config;
  }

  /** @param line 1-based; undefined when the file itself is the problem. */
  problem(line: number | undefined, found: string, expected: string, hint?: string): void {
    this.problems.push({
      file: this.#config.chain,
      ...(line === undefined ? {} : { line, column: 1 }),
      path: `certificates.${this.#config.name}.chain`,
      code: 'config_certificate',
      found,
      expected,
      ...(hint === undefined ? {} : { hint }),
    });
  }

  warning(text: string): void {
    this.warnings.push(text);
  }

  reading(chain: CertificateChain | undefined): ChainReading {
    return { chain: this.problems.length === 0 ? chain : undefined, problems: this.problems, warnings: this.warnings };
  }
}

function readBounded(path: string, report: Report): string | undefined {
  let descriptor: number | undefined;
  try {
    descriptor = openSync(path, 'r');
    const stat = fstatSync(descriptor);
    if (!stat.isFile() || stat.size > chainBytesMax) {
      report.problem(
        undefined,
        stat.isFile() ? `${stat.size} bytes` : 'no regular file',
        `a file of at most ${chainBytesMax} bytes`,
      );
      return undefined;
    }
    return readFileSync(descriptor, 'utf8');
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException;
    report.problem(undefined, code ?? 'a read error', 'a readable file', accessHint(code).hint);
    return undefined;
  } finally {
    if (descriptor !== undefined) closeSync(descriptor);
  }
}

function pemBlocks(text: string, report: Report): Block[] {
  const blocks: Block[] = [];
  let line = 1;
  let counted = 0;
  for (const match of text.matchAll(/^-----BEGIN ([A-Z0-9 ]+)-----\r?$[^-]*^-----END \1-----\r?$/gm)) {
    line += text.slice(counted, match.index).split('\n').length - 1;
    counted = match.index;
    blocks.push({ pem: match[0], line, label: match[1] ?? '' });
  }
  const begun = text.match(/-----BEGIN /g)?.length ?? 0;
  if (begun !== blocks.length) report.problem(undefined, 'a PEM block that does not end', 'complete PEM blocks');
  if (blocks.length > chainCertificatesMax) {
    report.problem(
      blocks[chainCertificatesMax]?.line,
      `${blocks.length} PEM blocks`,
      `at most ${chainCertificatesMax}`,
    );
    return [];
  }
  return blocks;
}

function parseBlock(block: Block, report: Report, known: KnownIssuers | undefined): Member | undefined {
  if (block.label.endsWith('PRIVATE KEY')) {
    report.problem(
      block.line,
      'a private key in a file',
      'private keys in tokens only',
      'this key has left the token or was never in one: replace it',
    );
    return undefined;
  }
  if (block.label !== 'CERTIFICATE') {
    report.problem(block.line, `a PEM block ${block.label}`, 'CERTIFICATE');
    return undefined;
  }
  try {
    const certificate = known?.get(block.pem) ?? new X509Certificate(block.pem);
    known?.set(block.pem, certificate);
    return { certificate, line: block.line };
  } catch {
    report.problem(block.line, 'bytes that are no X.509 certificate', 'an X.509 certificate');
    return undefined;
  }
}

/** RFC 5246 7.4.2: each certificate certifies the one before it; TLS 1.3 allows any order, older clients do not. */
function checkOrder(members: readonly Member[], report: Report): void {
  for (const [index, member] of members.entries()) {
    const issuer = members[index + 1];
    if (issuer === undefined || isIssuedBy(member.certificate, issuer.certificate)) continue;
    const swapped = index === 0 && isIssuedBy(issuer.certificate, member.certificate);
    report.problem(
      issuer.line,
      `certificate of ${subjectOf(issuer.certificate)}`,
      `the issuer of ${subjectOf(member.certificate)}, which is ${nameOf(member.certificate.issuer)}`,
      swapped ? 'put the leaf first, then its issuers' : 'each certificate must be followed by its issuer',
    );
  }
}

function warnOfRoot(members: readonly Member[], report: Report): void {
  const last = members.at(-1);
  if (members.length > 1 && last !== undefined && isIssuedBy(last.certificate, last.certificate)) {
    report.warning(
      `line ${last.line}: the root is in the chain; clients have it already, and every handshake carries it`,
    );
  }
}

function isIssuedBy(certificate: X509Certificate, issuer: X509Certificate): boolean {
  return certificate.checkIssued(issuer) && certificate.verify(issuer.publicKey);
}

function checkDates({ certificate, line }: Member, now: Date, report: Report): void {
  const { validFromDate, validToDate } = certificate;
  const subject = subjectOf(certificate);
  if (now < validFromDate) {
    report.problem(
      line,
      `${subject} valid from ${validFromDate.toISOString()}`,
      `a certificate that is valid now (${now.toISOString()})`,
      'check the clock',
    );
  }
  if (now > validToDate) {
    report.problem(
      line,
      `${subject} expired at ${validToDate.toISOString()}`,
      `a certificate that is valid now (${now.toISOString()})`,
      'renew it',
    );
    return;
  }
  const days = Math.floor((validToDate.getTime() - now.getTime()) / 86_400_000);
  if (days < expiryWarningDays) report.warning(`${subject} expires in ${days} days, at ${validToDate.toISOString()}`);
}

function checkKey(
  { certificate, line }: Member,
  report: Report,
): { algorithm: KeyAlgorithm; publicKey: KeyObject } | undefined {
  const expected = 'EC P-256, P-384 or P-521, RSA with 2048 to 8192 bits, or Ed25519';
  try {
    const { publicKey } = certificate;
    const algorithm = algorithmOf(publicKey);
    if (algorithm !== undefined) return { algorithm, publicKey };
    report.problem(line, describePublicKey(publicKey), expected);
  } catch {
    report.problem(line, 'a public key of an unknown kind', expected);
  }
  return undefined;
}

function checkPurposes({ certificate }: Member, wanted: readonly Purpose[], report: Report): void {
  if (certificate.ca) report.warning('the first certificate is a CA certificate, which many clients refuse');
  const allowed: readonly string[] | undefined = certificate.keyUsage;
  if (allowed === undefined || allowed.includes(anyPurpose)) return;
  for (const purpose of wanted) {
    if (!allowed.includes(extendedKeyUsages[purpose])) {
      report.warning(`its extended key usage is not for TLS ${purpose}s (${purpose}Auth)`);
    }
  }
}

/** id-kp-serverAuth, id-kp-clientAuth and anyExtendedKeyUsage (RFC 5280 4.2.1.12). */
const extendedKeyUsages: Record<Purpose, string> = { server: '1.3.6.1.5.5.7.3.1', client: '1.3.6.1.5.5.7.3.2' };
const anyPurpose = '2.5.29.37.0';

function serverNames(certificate: X509Certificate, report: Report): string[] {
  if (certificate.subjectAltName === undefined) return namesFromSubject(certificate, report);
  const names = new Set<string>();
  // Node quotes a value with special characters as JSON, so a comma inside one begins no new name.
  for (const [, kind, value] of certificate.subjectAltName.matchAll(/([^:,]+):("(?:[^"\\]|\\.)*"|[^,]*)(?:, |$)/g)) {
    if (kind !== 'DNS' || value === undefined) continue;
    if (isServerName(value)) names.add(value.toLowerCase());
    else report.warning(`its name ${value} is none that SNI can ask for, and is left out`);
  }
  if (names.size === 0) report.warning('it has no DNS name, so SNI never selects it');
  return [...names];
}

function namesFromSubject(certificate: X509Certificate, report: Report): string[] {
  const name = /^CN=(.+)$/m.exec(certificate.subject)?.[1];
  if (name === undefined || !isServerName(name)) {
    report.warning('it has no subject alternative names, so SNI never selects it and clients refuse it');
    return [];
  }
  report.warning(`it has no subject alternative names, only CN=${name}, which clients no longer look at (RFC 9525 2)`);
  return [name.toLowerCase()];
}

function subjectOf(certificate: X509Certificate): string {
  return nameOf(certificate.subject);
}

/** On one line and bounded: a certificate may hold anything. */
function nameOf(name: string | undefined): string {
  const line = (name ?? '').split('\n').join(', ');
  return JSON.stringify(line.length > 120 ? `${line.slice(0, 120)}...` : line);
}
