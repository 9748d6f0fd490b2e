/**
 * Owns: a certificate authority of OpenSSL with its database, and its OCSP responder: a real `openssl ocsp`.
 * Must not know: keygate.
 * Runs: in test processes, with openssl in processes of its own and a directory that goes with the test.
 */
import { execFileSync, spawn } from 'node:child_process';
import type { ChildProcess } from 'node:child_process';
import { once } from 'node:events';
import { globSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { connect, createServer } from 'node:net';
import type { AddressInfo, Server, Socket } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import type { TestContext } from 'node:test';

/** Who signs responses: the authority, one whom it has certified for that, and those who should not. */
const signers = ['issuer', 'delegate', 'no-purpose', 'expired', 'stranger', 'strangers-delegate'] as const;
export type Signer = (typeof signers)[number];

export interface IssueOptions {
  /** What the certificate says who is to be asked; default: nobody. */
  readonly responder?: string;
  readonly mustStaple?: boolean;
  /** So that its OCSP requests are too long for GET. */
  readonly longSerial?: boolean;
}

export interface ResponderOptions {
  readonly signer?: Signer;
  /** Options of openssl ocsp; `-nmin N`: each response holds for so many minutes. */
  readonly validity?: readonly string[];
  /** Its clock is so many seconds late. */
  readonly lateSeconds?: number;
}

export interface Responder {
  readonly port: number;
  stop(): Promise<void>;
}

export interface OcspAuthority {
  readonly directory: string;
  /** PEM. */
  readonly certificate: string;
  /** A certificate in PEM for a request in PEM, with the names that are in the request. */
  issue(request: string, options?: IssueOptions): string;
  /** The same, for a key that nobody has any more. */
  issueAny(options?: IssueOptions): string;
  /** The same, with the key, both in PEM. */
  issueWithKey(options?: IssueOptions): { readonly cert: string; readonly key: string };
  revoke(certificate: string): void;
  /** As if the authority had never issued it. */
  forget(certificate: string): void;
  /** A response as the responder would give it. @param validity options of openssl ocsp, such as `-nmin 5` */
  respond(certificate: string, options?: { readonly signer?: Signer; readonly validity?: readonly string[] }): Buffer;
  /** Starts `openssl ocsp`. */
  startResponder(options?: ResponderOptions): Promise<Responder>;
}

export function ocspAuthority(test: Pick<TestContext, 'after'>): OcspAuthority {
  const directory = mkdtempSync(join(tmpdir(), 'keygate-ocsp-'));
  test.after(() => rmSync(directory, { recursive: true, force: true }));
  const at = (name: string) => join(directory, name);
  const openssl = (...args: readonly string[]) =>
    execFileSync('openssl', args, { cwd: directory, stdio: ['ignore', 'pipe', 'pipe'] });
  writeFileSync(at('ca.cnf'), caConfiguration);
  writeFileSync(at('index.txt'), '');
  writeFileSync(at('index.txt.attr'), 'unique_subject = no\n');
  writeFileSync(at('serial'), '1000\n');
  let issued = 0;
  const selfSigned = (name: string) =>
    openssl('req', '-x509', ...newKey(name), '-days', '30', '-subj', `/O=Test/CN=${name}`, '-out', `${name}.pem`);
  const sign = (
    request: string,
    extensions: string,
    out: string,
    ca: string,
    dates: readonly string[] = ['-days', '20'],
  ) => {
    writeFileSync(at(`${out}.ext`), extensions);
    openssl(
      'ca',
      '-batch',
      '-notext',
      '-config',
      'ca.cnf',
      '-cert',
      `${ca}.pem`,
      '-keyfile',
      `${ca}.key`,
      ...dates,
      '-extfile',
      `${out}.ext`,
      '-in',
      request,
      '-out',
      `${out}.pem`,
    );
  };
  const signer = (name: Signer, extensions: string, ca = 'issuer', dates?: readonly string[]) => {
    openssl('req', '-new', ...newKey(name), '-subj', `/O=Test/CN=${name}`, '-out', `${name}.csr`);
    sign(`${name}.csr`, extensions, name, ca, dates);
  };
  selfSigned('issuer');
  selfSigned('stranger');
  signer('delegate', 'extendedKeyUsage = OCSPSigning\nnoCheck = ignored\n');
  signer('no-purpose', 'extendedKeyUsage = serverAuth\n');
  signer('expired', 'extendedKeyUsage = OCSPSigning\n', 'issuer', [
    '-startdate',
    '20200101000000Z',
    '-enddate',
    '20200201000000Z',
  ]);
  signer('strangers-delegate', 'extendedKeyUsage = OCSPSigning\n', 'stranger');

  const file = (certificate: string): string => {
    issued += 1;
    const name = `given-${issued}.pem`;
    writeFileSync(at(name), certificate);
    return name;
  };
  const issue: OcspAuthority['issue'] = (request, { responder: url, mustStaple = false, longSerial = false } = {}) => {
    issued += 1;
    const name = `leaf-${issued}`;
    writeFileSync(at(`${name}.csr`), request);
    // 20 bytes are the most (RFC 5280 4.1.2.2).
    if (longSerial)
      writeFileSync(at('serial'), `7F${'A5'.repeat(18)}${(issued % 256).toString(16).padStart(2, '0')}\n`);
    const extensions = [
      'extendedKeyUsage = serverAuth, clientAuth',
      ...(url === undefined ? [] : [`authorityInfoAccess = OCSP;URI:${url}`]),
      ...(mustStaple ? ['tlsfeature = status_request'] : []),
    ];
    sign(`${name}.csr`, `${extensions.join('\n')}\n`, name, 'issuer');
    return readFileSync(at(`${name}.pem`), 'utf8');
  };
  const issueWithKey: OcspAuthority['issueWithKey'] = (options) => {
    issued += 1;
    const name = `any-${issued}`;
    openssl('req', '-new', ...newKey(name), '-subj', '/CN=any', '-out', `${name}.csr`);
    const cert = issue(readFileSync(at(`${name}.csr`), 'utf8'), options);
    return { cert, key: readFileSync(at(`${name}.key`), 'utf8') };
  };
  const responder = (name: Signer, validity: readonly string[]) => [
    'ocsp',
    '-index',
    'index.txt',
    '-CA',
    'issuer.pem',
    '-rsigner',
    `${name}.pem`,
    '-rkey',
    `${name}.key`,
    ...validity,
  ];
  return {
    directory,
    certificate: readFileSync(at('issuer.pem'), 'utf8'),
    issue,
    issueAny: (options) => issueWithKey(options).cert,
    issueWithKey,
    revoke(certificate) {
      openssl('ca', '-config', 'ca.cnf', '-cert', 'issuer.pem', '-keyfile', 'issuer.key', '-revoke', file(certificate));
    },
    forget(certificate) {
      const serial = openssl('x509', '-noout', '-serial', '-in', file(certificate))
        .toString()
        .trim()
        .replace('serial=', '');
      const lines = readFileSync(at('index.txt'), 'utf8').split('\n');
      writeFileSync(at('index.txt'), lines.filter((line) => !line.includes(`\t${serial}\t`)).join('\n'));
    },
    respond(certificate, { signer: name = 'issuer', validity = ['-nmin', '10'] } = {}) {
      const asked = ['-issuer', 'issuer.pem', '-cert', file(certificate), '-no_nonce', '-respout', 'response.der'];
      openssl(...responder(name, validity), ...asked, '-noverify');
      return readFileSync(at('response.der'));
    },
    async startResponder({ signer: name = 'issuer', validity = ['-nmin', '10'], lateSeconds = 0 } = {}) {
      const child = spawn('openssl', [...responder(name, validity), '-port', '0'], {
        cwd: directory,
        env: { ...process.env, ...(lateSeconds === 0 ? {} : lateClock(lateSeconds)) },
        stdio: ['ignore', 'pipe', 'pipe'],
      });
      child.stderr.resume();
      const kill = () => child.kill('SIGKILL');
      process.on('exit', kill);
      const stop = async () => {
        process.off('exit', kill);
        await end(child);
      };
      test.after(stop);
      return { port: await portOf(child), stop };
    },
  };
}

const newKey = (name: string) => [
  '-newkey',
  'ec',
  '-pkeyopt',
  'ec_paramgen_curve:P-256',
  '-nodes',
  '-keyout',
  `${name}.key`,
];

/** As `faketime` would preload it. */
function lateClock(seconds: number): Readonly<Record<string, string>> {
  const library = globSync('/usr/lib/*/faketime/libfaketime.so.1')[0];
  if (library === undefined) throw new Error('apt-get install faketime');
  return { LD_PRELOAD: library, FAKETIME: `-${seconds}s` };
}

const caConfiguration = `[ca]
default_ca = test
[test]
database = index.txt
serial = serial
new_certs_dir = .
default_md = sha256
policy = any
copy_extensions = copy
[any]
commonName = optional
organizationName = optional
`;

async function portOf(child: ChildProcess & { readonly stdout: import('node:stream').Readable }): Promise<number> {
  for await (const line of createInterface({ input: child.stdout })) {
    const port = /^ACCEPT .*:(\d+) /.exec(line)?.[1];
    if (port !== undefined) return Number(port);
  }
  throw new Error('openssl ocsp did not begin to listen');
}

async function end(child: ChildProcess): Promise<void> {
  if (child.exitCode !== null || child.signalCode !== null) return;
  child.kill('SIGKILL');
  await once(child, 'exit');
}

/** What a responder's address leads to. */
export type Behaviour =
  | {
      readonly forwardTo: number;
      /** What GET gets instead. */
      readonly butGet?: string;
    }
  /** Nobody listens. */
  | 'dead'
  /** Accepts, and says nothing. */
  | 'silent'
  /** These bytes, whatever was asked, and then the end, unless it `stays`. */
  | { readonly says: Buffer | string; readonly stays?: boolean };

/** The address that certificates name, with something behind it that changes. */
export interface ResponderAddress {
  readonly port: number;
  readonly url: string;
  /** First lines of the requests so far. */
  readonly requests: string[];
  become(behaviour: Behaviour): Promise<void>;
  close(): Promise<void>;
}

export async function responderAddress(behaviour: Behaviour): Promise<ResponderAddress> {
  const requests: string[] = [];
  const sockets = new Set<Socket>();
  let now = behaviour;
  let server = createServer();
  const serve = (socket: Socket): void => {
    sockets.add(socket);
    socket.on('close', () => sockets.delete(socket));
    socket.on('error', () => {});
    socket.once('data', (head: Buffer) => {
      requests.push(head.toString('latin1').split('\r\n', 1)[0] ?? '');
      if (typeof now === 'string') return;
      if ('says' in now) {
        if (now.stays === true) socket.write(now.says);
        else socket.end(now.says);
        return;
      }
      if (now.butGet !== undefined && head.toString('latin1').startsWith('GET ')) {
        socket.end(now.butGet);
        return;
      }
      const responder = connect(now.forwardTo, '127.0.0.1');
      responder.on('error', () => socket.destroy());
      responder.write(head);
      socket.pipe(responder).pipe(socket);
    });
  };
  const open = async (port: number): Promise<Server> => {
    const opened = createServer(serve).listen(port, '127.0.0.1');
    await once(opened, 'listening');
    return opened;
  };
  const shut = async (): Promise<void> => {
    if (!server.listening) return;
    const closed = once(server, 'close');
    server.close();
    for (const socket of sockets) socket.destroy();
    await closed;
  };
  server = await open(0);
  const { port } = server.address() as AddressInfo;
  if (behaviour === 'dead') await shut();
  return {
    port,
    url: `http://127.0.0.1:${port}/`,
    requests,
    async become(next) {
      now = next;
      if (next === 'dead') await shut();
      else if (!server.listening) server = await open(port);
    },
    close: shut,
  };
}

/** An HTTP answer with everything that a responder's has. */
export function httpAnswer(body: Buffer, type = 'application/ocsp-response'): Buffer {
  const head = `HTTP/1.1 200 OK\r\ncontent-type: ${type}\r\ncontent-length: ${body.length}\r\nconnection: close\r\n\r\n`;
  return Buffer.concat([Buffer.from(head), body]);
}
