/**
 * Owns: the command line: which commands and options there are, and how a failure becomes a message and an exit code.
 * Must not know: what a command does; each is imported when it is run, so `--help` is fast and `serve` loads no PKCS#11.
 * Runs: on the main thread of the command, which for `serve` and `demo` becomes the primary.
 */
import { Command, CommanderError, InvalidArgumentError, Option } from 'commander';
import { ConfigError, exitCodes, formatProblem, KeygateError, UsageError } from '../errors.ts';
import type { ServeOptions } from '../primary/serve.ts';
import { describeVersion } from '../version.ts';
import type { CheckOptions } from './check.ts';
import type { DemoOptions } from './demo.ts';
import type { KeyGenerateOptions, KeyListOptions, KeySelfSignOptions, KeySubjectOptions } from './key.ts';
import type { TokenInitOptions, TokenListOptions } from './token.ts';

await main(process.argv);

async function main(argv: readonly string[]): Promise<void> {
  try {
    await commandLine().parseAsync([...argv]);
  } catch (error) {
    if (error instanceof CommanderError && error.exitCode === exitCodes.ok) return;
    const failure = error instanceof CommanderError ? usageError(error) : error;
    process.stderr.write(describeFailure(failure));
    // Not exitCode: a service that failed half-way may hold sockets and workers that would keep the process.
    process.exit(failure instanceof KeygateError ? failure.exitCode : exitCodes.other);
  }
}

function commandLine(): Command {
  const program = new Command('keygate')
    .description('TLS offloader whose private keys never leave a PKCS#11 token.')
    .version(describeVersion(), '-V, --version')
    // Settings that commands made below inherit. Messages of commander are printed by main() like all others.
    .exitOverride()
    .configureOutput({ outputError: () => {} })
    .showHelpAfterError(false)
    .addHelpText('after', exitCodeHelp());

  program
    .command('serve')
    .description('Serve until SIGTERM, then drain: connections that are open may end.')
    .requiredOption('-c, --config <file>', 'configuration file')
    .option('--allow-key-log', 'accept `log.keyLog`: the secrets of every connection are written to a file')
    .action(async (options: { config: string } & ServeOptions) => (await import('./serve.ts')).run(options));
  program
    .command('check')
    .description('Check configuration, tokens, keys, certificates and upstreams, and report all problems at once.')
    .requiredOption('-c, --config <file>', 'configuration file')
    .option('--json', 'print findings as JSON')
    .option('--allow-key-log', 'check for a serve with this flag')
    .action(async (options: CheckOptions) => (await import('./check.ts')).run(options));
  program
    .command('demo')
    .description('Make a SoftHSM token with keys and certificates in it, and serve with them on loopback.')
    .option('--port <port>', 'of the TLS listener; 0: any free one', port, 8443)
    .option('--http-upstream-port <port>', 'of the HTTP upstream; 0: any free one', port, 0)
    .option('--admin-port <port>', 'of the admin server; 0: any free one', port, 9180)
    .option(
      '--dir <directory>',
      'where token, PIN, certificates and configuration are kept (default: in the state directory of the user)',
    )
    .option('--workers <count>', 'worker processes (default: one per core)', whole(1, 1024))
    .action(async (options: DemoOptions) => (await import('./demo.ts')).run(options));

  addTokenCommands(program.command('token').description('Look at tokens, and initialise them.'));
  addKeyCommands(
    program.command('key').description('Look at keys in a token, make them, and make certificates for them.'),
  );
  addConfigCommands(program.command('config').description('What can stand in a configuration file.'));
  return program;
}

function addTokenCommands(token: Command): void {
  withModule(token.command('list').description('List tokens and what they can do. Needs no PIN.'))
    .option('--json', 'print as JSON')
    .action(async (options: TokenListOptions) => (await import('./token.ts')).list(options));
  withPin(
    token
      .command('init')
      .description('Initialise an empty token, and set its PINs.')
      .requiredOption('--module <path>', 'PKCS#11 module')
      .requiredOption('--label <label>', 'label of the new token, at most 32 bytes'),
    'pin',
    'PIN for its keys',
  );
  withPin(token.commands.at(-1) as Command, 'so-pin', 'PIN of its security officer').action(
    async (options: TokenInitOptions) => (await import('./token.ts')).init(options),
  );
}

function addKeyCommands(key: Command): void {
  withToken(key.command('list').description('List keys, and whether they could leave the token.'))
    .option('--json', 'print as JSON')
    .action(async (options: KeyListOptions) => (await import('./key.ts')).list(options));
  withToken(key.command('generate').description('Generate a key inside the token that cannot leave it.'))
    .requiredOption('--label <label>', 'label of the new key')
    .requiredOption(
      '--type <type>',
      'p256, p384, rsa2048, rsa3072, rsa4096, ed25519, or ticket for the secret behind session tickets',
    )
    .action(async (options: KeyGenerateOptions) => (await import('./key.ts')).generate(options));
  withSubject(
    withToken(key.command('csr').description('Make a certificate signing request with a key of the token.')),
  ).action(async (options: KeySubjectOptions) => (await import('./key.ts')).csr(options));
  withSubject(
    withToken(key.command('self-sign').description('Make a self-signed certificate with a key of the token.')),
  )
    .option('--days <count>', 'how long it is valid', whole(1, 3650), 90)
    .action(async (options: KeySelfSignOptions) => (await import('./key.ts')).selfSign(options));
}

function addConfigCommands(config: Command): void {
  config
    .command('schema')
    .description('Print the JSON Schema of the configuration, for editors.')
    .action(async () => (await import('./config.ts')).schema());
  config
    .command('reference')
    .description('Print every key with its kind, default and meaning, as Markdown.')
    .action(async () => (await import('./config.ts')).reference());
}

function withModule(command: Command): Command {
  return command
    .option('-c, --config <file>', 'configuration file that names the modules')
    .option('--module <path>', 'PKCS#11 module, instead of a configuration');
}

function withToken(command: Command): Command {
  return withPin(
    withModule(command).option('--token <name>', 'label of the token; with --config its name there'),
    'pin',
    'PIN, unless --config says where it is',
  );
}

/** A PIN itself is no option: every user of the machine can read the arguments of every process. */
function withPin(command: Command, flag: string, what: string): Command {
  return command
    .option(`--${flag}-file <file>`, `file that holds the ${what}`)
    .option(`--${flag}-env <name>`, `environment variable that holds the ${what}`)
    .option(`--${flag}-credential <name>`, `systemd credential that holds the ${what}`);
}

function withSubject(command: Command): Command {
  return command
    .requiredOption('--label <label>', 'label of the private key')
    .option('--id <hex>', 'CKA_ID of the private key, where the label means several')
    .option('--subject <name>', 'distinguished name, such as CN=www.example.org (default: the first DNS name)')
    .option('--dns <name>', 'DNS name; may be repeated', collect)
    .option('--ip <address>', 'IP address; may be repeated', collect)
    .addOption(
      new Option('--purpose <purpose>', 'whose certificate it is in TLS')
        .choices(['server', 'client'])
        .default('server'),
    )
    .option('--out <file>', 'file to write that does not exist yet (default: standard output)');
}

function collect(value: string, before: readonly string[] = []): readonly string[] {
  return [...before, value];
}

function port(text: string): number {
  return whole(0, 65_535)(text);
}

function whole(min: number, max: number): (text: string) => number {
  return (text) => {
    const value = /^[0-9]{1,7}$/.test(text) ? Number(text) : Number.NaN;
    if (value >= min && value <= max) return value;
    throw new InvalidArgumentError(`Expected a whole number from ${min} to ${max}.`);
  };
}

function exitCodeHelp(): string {
  return `
Exit codes:
  ${exitCodes.ok}   done
  ${exitCodes.usage}  the command line is wrong
  ${exitCodes.unavailable}  a token, a key or a service is unavailable
  ${exitCodes.pin}  the PIN of a token is refused, locked or cannot be read
  ${exitCodes.config}  the configuration or a certificate file is wrong
  ${exitCodes.other}   anything else`;
}

function usageError({ code, message }: CommanderError): UsageError {
  const hint = { hint: 'keygate --help, or keygate COMMAND --help, shows what there is' };
  // Without a command commander has printed its help already.
  return code === 'commander.help'
    ? new UsageError('a command is missing', hint)
    : new UsageError(message.replace(/^error: /, ''), hint);
}

function describeFailure(failure: unknown): string {
  if (!(failure instanceof KeygateError))
    return `keygate: internal error: ${failure instanceof Error ? failure.stack : String(failure)}\n`;
  const lines =
    failure instanceof ConfigError
      ? failure.problems.map(formatProblem)
      : [`keygate: ${failure.code}: ${failure.message}`];
  if (failure.hint !== undefined) lines.push(`hint: ${failure.hint}`);
  if (failure instanceof ConfigError)
    lines.push(
      `keygate: ${failure.problems.length} ${failure.problems.length === 1 ? 'problem' : 'problems'} in the configuration`,
    );
  return `${lines.join('\n')}\n`;
}
