/**
 * Owns: which licences the parts of a package may have, and the file that names the parts with the texts of their licences.
 * Must not know: where the list of parts comes from.
 * Runs: `npm run licences`, and before npm packs: writes dist/THIRD-PARTY-LICENCES. `--check`, a step of `npm test`, only
 * looks. Either fails when a licence is not allowed, or a text is missing.
 */
import { mkdirSync, readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { thirdParties } from './parts.ts';
import type { Part } from './parts.ts';

/** SPDX identifiers. None asks for more than that its text and notices are passed on. */
const allowed: ReadonlySet<string> = new Set([
  '0BSD',
  'Apache-2.0',
  'BSD-2-Clause',
  'BSD-3-Clause',
  'BSL-1.0',
  'CC0-1.0',
  'ISC',
  'MIT',
  'MIT-0',
  'Unicode-3.0',
  'Unlicense',
  'Zlib',
]);

/** Parts that come without a text, and where it is. */
const textElsewhere: Readonly<Record<string, string>> = {
  napi: 'MIT; https://github.com/napi-rs/napi-rs/blob/main/LICENSE',
  'napi-sys': 'MIT; https://github.com/napi-rs/napi-rs/blob/main/LICENSE',
  'rust-std': 'Apache-2.0, as in LICENSE; https://github.com/rust-lang/rust/blob/master/COPYRIGHT',
};

const root = join(import.meta.dirname, '..');

if (import.meta.main) main();

function main(): void {
  const { parts } = thirdParties();
  const problems = parts.flatMap(problemsOf);
  for (const problem of problems) console.error(problem);
  if (problems.length > 0) process.exitCode = 1;
  if (problems.length > 0 || process.argv.includes('--check')) return;
  mkdirSync(join(root, 'dist'), { recursive: true });
  writeFileSync(join(root, 'dist/THIRD-PARTY-LICENCES'), print(parts));
}

function problemsOf(part: Part): string[] {
  const { purl, name, licence, directory } = part;
  if (!isAllowed(licence)) {
    return [`${purl}: found licence ${JSON.stringify(licence)}, expected one that scripts/licences.ts allows`];
  }
  const hasText = name in textElsewhere || textsOf(part).length > 0;
  return hasText ? [] : [`${purl}: no licence text in ${directory ?? 'this machine: run scripts/bootstrap'}`];
}

/**
 * Whether an SPDX expression (https://spdx.github.io/spdx-spec/v2.3/SPDX-license-expressions) can be satisfied: of OR one
 * side is enough, AND needs both, and binds more tightly.
 */
export function isAllowed(expression: string): boolean {
  const tokens = expression.match(/[()]|[^\s()]+/g) ?? [];
  return either(tokens) && tokens.length === 0;
}

/** Takes what it reads from `tokens`, to the end of the expression or of its parentheses. */
function either(tokens: string[]): boolean {
  const sides = [both(tokens)];
  while (tokens[0] === 'OR') {
    tokens.shift();
    sides.push(both(tokens));
  }
  return sides.includes(true);
}

function both(tokens: string[]): boolean {
  const sides = [one(tokens)];
  while (tokens[0] === 'AND') {
    tokens.shift();
    sides.push(one(tokens));
  }
  return !sides.includes(false);
}

function one(tokens: string[]): boolean {
  const token = tokens.shift() ?? '';
  if (token !== '(') return allowed.has(token);
  const verdict = either(tokens);
  return tokens.shift() === ')' && verdict;
}

function textsOf({ directory }: Part): string[] {
  if (directory === undefined) return [];
  const names = readdirSync(directory).filter((name) =>
    /^(?:licen[cs]e|copying|copyright|notice|unlicense)/i.test(name),
  );
  return names.toSorted().map((name) => readFileSync(join(directory, name), 'utf8').replaceAll('\r\n', '\n').trim());
}

/** Many parts have the same text: it is printed once, after all of them. */
function print(parts: readonly Part[]): string {
  const users = new Map<string, string[]>();
  for (const part of parts) {
    for (const text of textsOf(part)) users.set(text, [...(users.get(text) ?? []), `${part.name} ${part.version}`]);
  }
  const list = parts.map(({ name, version, licence }) => `${name} ${version}: ${textElsewhere[name] ?? licence}`);
  const texts = [...users].map(([text, names]) => `${'='.repeat(80)}\n${names.join(', ')}\n\n${text}`);
  const introduction = `keygate is under the Apache License 2.0, which is in LICENSE. A package of it also has these parts.`;
  return `${[introduction, list.join('\n'), ...texts].join('\n\n')}\n`;
}
