/**
 * Owns: the parts of README.md that are printed from the code: they stand between markers and are never edited.
 * Must not know: the rest of README.md.
 * Runs: `npm run docs` writes; `--check`, a step of `npm test`, fails when README.md differs.
 */
import { readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { alertsTable } from '../grafana/rules.ts';
import { configReference } from '../src/config/reference.ts';
import { engine } from '../src/engine/binding.ts';
import { errorCodes, exitCodes } from '../src/errors.ts';
import { logEvents } from '../src/log.ts';
import { metricsTable } from '../src/primary/metrics.ts';

const readme = join(import.meta.dirname, '../README.md');

const sections: Readonly<Record<string, () => string>> = {
  'exit-codes': exitCodeTable,
  'error-codes': errorCodeTable,
  'config-example': configExample,
  'config-reference': configReference,
  'close-reasons': closeReasonTable,
  metrics: metricsTable,
  events: eventTable,
  alerts: alertsTable,
  'latency-bounds': latencyBounds,
};

const current = readFileSync(readme, 'utf8');
const printed = Object.entries(sections).reduce((text, [name, print]) => replaceSection(text, name, print()), current);
if (!process.argv.includes('--check')) {
  writeFileSync(readme, printed);
} else if (printed !== current) {
  console.error('README.md differs from the code: run `npm run docs` and commit the result');
  process.exitCode = 1;
}

function replaceSection(text: string, name: string, content: string): string {
  const [begin, end] = [`<!-- ${name}: printed by npm run docs -->`, `<!-- ${name}: end -->`];
  const [from, to] = [text.indexOf(begin), text.indexOf(end)];
  if (from < 0 || to < from) throw new Error(`README.md has no section between ${begin} and ${end}`);
  return `${text.slice(0, from)}${begin}\n\n${content}\n\n${text.slice(to)}`;
}

function exitCodeTable(): string {
  const meanings: Record<keyof typeof exitCodes, string> = {
    ok: 'done; for `serve`: drained',
    other: 'anything else',
    usage: 'the command line is wrong',
    unavailable: 'a token, a key or a service is unavailable',
    pin: 'the PIN of a token is refused, locked or cannot be read: starting again could cost one of its tries',
    config: 'the configuration or a certificate file is wrong',
  };
  const rows = Object.entries(exitCodes).map(
    ([name, code]) => `| ${code} | ${meanings[name as keyof typeof exitCodes]} |`,
  );
  return ['| exit code | meaning |', '|---|---|', ...rows].join('\n');
}

function errorCodeTable(): string {
  const rows = Object.entries(errorCodes).map(([code, summary]) => `| \`${code}\` | ${summary} |`);
  return ['| error code | meaning |', '|---|---|', ...rows].join('\n');
}

function closeReasonTable(): string {
  const rows = engine()
    .closeReasons()
    // Dashboards and access logs lead here by these three words.
    .map(({ side, phase, reason, meaning }) => {
      const anchor = `<a id="${side}-${phase}-${reason}"></a>`;
      return `| ${anchor}\`${side}/${phase}/${reason}\` | ${meaning} |`;
    });
  return ['| side/phase/reason | meaning |', '|---|---|', ...rows].join('\n');
}

function eventTable(): string {
  const rows = Object.entries(logEvents).map(([event, meaning]) => `| \`${event}\` | ${meaning} |`);
  return ['| event | meaning |', '|---|---|', ...rows].join('\n');
}

function latencyBounds(): string {
  const bounds = engine()
    .latencyBoundsUs()
    .map((us) => (us < 1000 ? `${us} µs` : us < 1e6 ? `${us / 1000} ms` : `${us / 1e6} s`));
  return `Bounds: ${bounds.join(', ')}.`;
}

function configExample(): string {
  const text = readFileSync(join(import.meta.dirname, '../native-config/keygate.yaml'), 'utf8');
  return `\`\`\`yaml\n${text.trimEnd()}\n\`\`\``;
}
