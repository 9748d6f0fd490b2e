/**
 * Owns: `keygate demo`: a SoftHSM token, keys in it, certificates, a small HTTP upstream and a running keygate, in one command.
 * Must not know: PKCS#11. It runs keygate's own commands in processes of their own, as an operator would, because this
 * process becomes the primary, which never loads a module.
 * Runs: main thread of the primary.
 */
import { execFile } from 'node:child_process';
import { randomInt, X509Certificate } from 'node:crypto';
import { once } from 'node:events';
import { existsSync, mkdirSync, readFileSync, renameSync, rmSync, writeFileSync } from 'node:fs';
import { createServer } from 'node:http';
import type { AddressInfo } from 'node:net';
import { homedir, networkInterfaces } from 'node:os';
import { join, resolve } from 'node:path';
import { fileURLToPath } from 'node:url';
import { promisify, styleText } from 'node:util';
import { parseConfig } from '../config/load.ts';
import { ServiceError, UsageError } from '../errors.ts';
import { serve } from '../primary/serve.ts';

export interface DemoOptions {
  /** Of the TLS listener; 0: any free one. */
  readonly port: number;
  /** Of the HTTP upstream; 0: any free one. */
  readonly httpUpstreamPort: number;
  /** Of the admin server; 0: any free one. */
  readonly adminPort: number;
  /** Where token, PIN, certificates and configuration are kept. */
  readonly dir?: string;
  /** Default: one per core. */
  readonly workers?: number;
}

const tokenLabel = 'keygate-demo';
const keys = ['p256', 'rsa2048'] as const;
/** A certificate that ends sooner is made anew. */
const renewBeforeMs = 2 * 86_400_000;
const commandDeadlineMs = 60_000;
const modulePaths = [
  '/usr/lib/softhsm/libsofthsm2.so',
  '/usr/lib/x86_64-linux-gnu/softhsm/libsofthsm2.so',
  '/usr/lib/aarch64-linux-gnu/softhsm/libsofthsm2.so',
  '/usr/lib64/pkcs11/libsofthsm2.so',
  '/usr/lib64/softhsm/libsofthsm2.so',
];

/**
 * What an earlier start has left is used again, however that start ended: it is asked what is there, and nothing is
 * believed to be there because a step once began.
 * @throws UsageError, ServiceError `demo_failed`, and what `serve` throws
 */
export async function run(options: DemoOptions): Promise<void> {
  const { port, adminPort } = options;
  if (port === adminPort && port !== 0)
    throw new UsageError(`--port and --admin-port: found ${port} for both, expected two`);
  const module = findSoftHsm();
  const directory = resolve(
    options.dir ?? join(process.env['XDG_STATE_HOME'] ?? join(homedir(), '.local/state'), 'keygate/demo'),
  );
  const files = {
    tokens: join(directory, 'tokens'),
    softHsmConfig: join(directory, 'softhsm2.conf'),
    pin: join(directory, 'pin'),
    securityOfficerPin: join(directory, 'so-pin'),
    config: join(directory, 'keygate.yaml'),
  };
  await step('private directory', directory, () => {
    mkdirSync(files.tokens, { recursive: true, mode: 0o700 });
    writeOnce(
      files.softHsmConfig,
      `directories.tokendir = ${files.tokens}\nobjectstore.backend = file\nlog.level = ERROR\n`,
    );
    writeOnce(files.pin, `${randomPin()}\n`);
    writeOnce(files.securityOfficerPin, `${randomPin()}\n`);
  });
  // Inherited by the commands below and by the workers.
  process.env['SOFTHSM2_CONF'] = files.softHsmConfig;

  const onToken = ['--module', module, '--token', tokenLabel, '--pin-file', files.pin];
  const labels = await step('SoftHSM token', tokenLabel, async () => {
    const pins = ['--pin-file', files.pin, '--so-pin-file', files.securityOfficerPin];
    return (await hasToken(module, files.tokens))
      ? await privateKeyLabels(onToken)
      : await keygate('token', 'init', '--module', module, '--label', tokenLabel, ...pins).then(() => []);
  });
  for (const type of keys) {
    const chain = join(directory, `${type}.pem`);
    await step(`${type} key in the token, and its certificate`, chain, async () => {
      if (!labels.includes(type)) {
        // First, or a start that ends in between would leave a certificate of another key.
        rmSync(chain, { force: true });
        await keygate('key', 'generate', ...onToken, '--label', type, '--type', type);
      }
      if (isCurrent(chain)) return;
      const names = ['--dns', 'localhost', '--ip', '127.0.0.1', '--ip', '::1'];
      const subject = ['--subject', 'CN=localhost', ...names, '--days', '90'];
      writeWhole(chain, await keygate('key', 'self-sign', ...onToken, '--label', type, ...subject));
    });
  }
  const upstream = await step('HTTP upstream', '127.0.0.1', async () => startUpstream(options.httpUpstreamPort));
  const configuration = demoConfig(module, options, upstream.port);

  const service = await serve(parseConfig(configuration, files.config)).catch((error: unknown) => {
    throw withOption(error);
  });
  // Now that it serves: a demo whose port is busy must not change the files of the one that holds it.
  writeWhole(files.config, configuration);
  announce(service.addresses['https']?.[0] ?? '', service.adminAddress, join(directory, 'p256.pem'), directory);
  await service.ended;
  upstream.close();
}

function findSoftHsm(): string {
  const found = modulePaths.find((path) => existsSync(path));
  if (found !== undefined) return found;
  throw new ServiceError('demo_failed', `SoftHSM is not installed: none of ${modulePaths.join(', ')} exists`, {
    unavailable: true,
    hint: 'apt-get install softhsm2',
  });
}

/** Shows what is being done, and how long it took. */
async function step<T>(what: string, where: string, work: () => T | Promise<T>): Promise<T> {
  const startedAt = performance.now();
  process.stdout.write(`  ${what} ... `);
  try {
    const result = await work();
    process.stdout.write(`${styleText('green', 'ok')} ${where} (${Math.round(performance.now() - startedAt)} ms)\n`);
    return result;
  } catch (error) {
    process.stdout.write(`${styleText('red', 'failed')}\n`);
    throw error;
  }
}

/** Whether the token is there and has its PIN. One without a PIN holds no key yet: it is removed and made anew. */
async function hasToken(module: string, directory: string): Promise<boolean> {
  const tokens = JSON.parse(await keygate('token', 'list', '--module', module, '--json')) as {
    readonly label: string;
    readonly state: readonly string[];
  }[];
  const token = tokens.find(({ label }) => label === tokenLabel);
  if (token?.state.includes('no-user-pin') !== true) return token !== undefined;
  rmSync(directory, { recursive: true });
  mkdirSync(directory, { mode: 0o700 });
  return false;
}

async function privateKeyLabels(onToken: readonly string[]): Promise<string[]> {
  const found = JSON.parse(await keygate('key', 'list', ...onToken, '--json')) as {
    readonly label: string;
    readonly kind: string;
  }[];
  return found.filter(({ kind }) => kind === 'private').map(({ label }) => label);
}

/** Runs one of keygate's own commands and returns what it printed. */
async function keygate(...args: readonly string[]): Promise<string> {
  const extension = import.meta.url.endsWith('.ts') ? 'ts' : 'js';
  const main = fileURLToPath(new URL(`main.${extension}`, import.meta.url));
  try {
    return (await promisify(execFile)(process.execPath, [main, ...args], { timeout: commandDeadlineMs })).stdout;
  } catch (cause) {
    const { stderr = '' } = cause as { stderr?: string };
    throw new ServiceError(
      'demo_failed',
      `keygate ${args.slice(0, 2).join(' ')} failed: ${stderr.trim() || String(cause)}`,
      {
        cause,
        hint: 'remove the demo directory to start afresh',
      },
    );
  }
}

function writeOnce(path: string, text: string): void {
  if (!existsSync(path)) writeWhole(path, text);
}

/** All or nothing, also when the process is killed: a half of a PIN would be believed by the next start. */
function writeWhole(path: string, text: string): void {
  const unfinished = `${path}.new`;
  writeFileSync(unfinished, text, { mode: 0o600 });
  renameSync(unfinished, path);
}

/** The configuration is written anew at every start: to change a port in it would help nobody. */
function withOption(error: unknown): unknown {
  if (!(error instanceof ServiceError)) return error;
  const option = { bind_failed: '--port', admin_failed: '--admin-port' }[error.code as string];
  if (option === undefined) return error;
  return new ServiceError(error.code, error.message, {
    cause: error,
    hint: `choose another ${option}, or 0 for any free one`,
  });
}

function randomPin(): string {
  return Array.from({ length: 12 }, () => randomInt(10)).join('');
}

function isCurrent(chain: string): boolean {
  try {
    return new X509Certificate(readFileSync(chain)).validToDate.getTime() > Date.now() + renewBeforeMs;
  } catch {
    return false; // not there, or cut off
  }
}

async function startUpstream(port: number): Promise<{ port: number; close(): void }> {
  const server = createServer((request, response) => {
    response.setHeader('content-type', 'text/plain; charset=utf-8');
    response.end(
      `keygate demo: ${request.method} ${request.url} arrived as plaintext; the private key is still in the token.\n`,
    );
  });
  server.listen(port, '127.0.0.1');
  try {
    await once(server, 'listening');
  } catch (cause) {
    throw new ServiceError('demo_failed', `the HTTP upstream cannot listen on 127.0.0.1:${port}: ${String(cause)}`, {
      cause,
      hint: 'choose another --http-upstream-port, or 0 for any free one',
    });
  }
  return {
    port: (server.address() as AddressInfo).port,
    close() {
      server.close();
      server.closeAllConnections();
    },
  };
}

function demoConfig(module: string, { port, adminPort, workers }: DemoOptions, upstreamPort: number): string {
  // Containers often have no IPv6, not even the loopback address.
  const hasIPv6 = Object.values(networkInterfaces()).some((each) => each?.some(({ address }) => address === '::1'));
  const addresses = hasIPv6 ? ['127.0.0.1', '[::1]'] : ['127.0.0.1'];
  return `# Written by \`keygate demo\` at every start. Copy it to begin a configuration of your own.
workers: ${workers ?? 'auto'}
admin: { listen: "127.0.0.1:${adminPort}" }
tokens:
  demo: { module: ${JSON.stringify(module)}, uri: "pkcs11:token=${tokenLabel}", pin: { file: pin } }
certificates:
${keys.map((type) => `  ${type}: { chain: ${type}.pem, key: "pkcs11:object=${type}" }`).join('\n')}
upstreams:
  web: { servers: ["127.0.0.1:${upstreamPort}"] }
listeners:
  https: { bind: [${addresses.map((address) => JSON.stringify(`${address}:${port}`)).join(', ')}], mode: offload, certificates: [${keys.join(', ')}], policy: intermediate, upstream: web }
`;
}

function announce(address: string, admin: string | undefined, certificate: string, directory: string): void {
  const port = address.slice(address.lastIndexOf(':') + 1);
  process.stdout.write(`
${styleText('bold', 'keygate is running')}: TLS on https://localhost:${port}, two certificates (EC and RSA), keys in the token ${tokenLabel}.

  try it   curl --cacert ${certificate} https://localhost:${port}/
  admin    http://${admin ?? ''}/status
  files    ${directory}
  stop     Ctrl-C, or kill ${process.pid}

`);
}
