/**
 * Owns: src/engine/native.d.ts, the engine's types for TypeScript, printed from the Rust types.
 * Must not know: what the engine does.
 * Runs: `npm run types` writes the file; `--check`, a step of `npm test`, fails when it differs from the Rust source.
 *
 * napi-derive writes one JSON object per exported item into $NAPI_TYPE_DEF_TMP_FOLDER while rustc expands its macros.
 * The variable is set by a wrapper around rustc and not for cargo: napi-build would see it and rebuild the whole crate.
 */
import { execFileSync } from 'node:child_process';
import { existsSync, mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';

const root = join(import.meta.dirname, '..');
const folder = join(root, 'src/engine/target/napi-types');
// Not binding.d.ts: beside binding.ts the compiler takes that for binding.ts' own declarations and ignores it.
const target = join(root, 'src/engine/native.d.ts');

interface Item {
  readonly kind: 'const' | 'enum' | 'string_enum' | 'interface' | 'type' | 'fn' | 'struct' | 'impl';
  readonly name: string;
  readonly def: string;
  readonly js_doc?: string;
}

compileForTypes();
const printed = print(items());
if (!process.argv.includes('--check')) {
  writeFileSync(target, printed);
} else if (!existsSync(target) || readFileSync(target, 'utf8') !== printed) {
  console.error('src/engine/native.d.ts differs from the Rust types: run `npm run types` and commit the result');
  process.exitCode = 1;
}

/** Only type-checks, in the artefacts that clippy shares; when nothing changed, the items of the last time are still true. */
function compileForTypes(): void {
  mkdirSync(folder, { recursive: true });
  execFileSync(
    'cargo',
    ['check', '--release', '--lib', '--locked', '--manifest-path', join(root, 'src/engine/Cargo.toml')],
    {
      stdio: ['ignore', 'inherit', 'inherit'],
      env: {
        ...process.env,
        RUSTC_WORKSPACE_WRAPPER: join(root, 'scripts/rustc-with-types'),
        KEYGATE_TYPES_FOLDER: folder,
      },
    },
  );
}

function items(): readonly Item[] {
  const lines = readFileSync(join(folder, 'keygate-engine'), 'utf8').trimEnd().split('\n');
  return lines
    .map((line) => JSON.parse(line) as Item)
    .toSorted((left, right) => (left.name < right.name ? -1 : left.name > right.name ? 1 : 0));
}

function print(all: readonly Item[]): string {
  const members = Map.groupBy(
    all.filter(({ kind }) => kind === 'impl'),
    ({ name }) => name,
  );
  const declarations = all.flatMap((item) => declaration(item, members.get(item.name)?.map(({ def }) => def) ?? []));
  return `// Printed from the Rust types by scripts/binding-types.ts; do not edit.\n\n${declarations.join('\n\n')}\n`;
}

function declaration({ kind, name, def, js_doc: documentation = '' }: Item, members: readonly string[]): string[] {
  const comment = documentation.replaceAll(/ +$/gm, '').trimEnd();
  const head = comment === '' ? '' : `${comment}\n`;
  switch (kind) {
    case 'interface':
      return [`${head}export interface ${name} {\n${indent(def)}\n}`];
    case 'struct':
      return [
        `${head}export declare class ${name} {\n${indent([def, ...members].filter((part) => part.trim() !== '').join('\n'))}\n}`,
      ];
    case 'fn':
      return [`${head}export declare ${def}`];
    case 'type':
      return [`${head}export type ${name} = ${def}`];
    case 'string_enum':
      // `A = 'a', B = 'b'` becomes a union: TypeScript that is only stripped has no enums.
      return [`${head}export type ${name} = ${[...def.matchAll(/'[^']*'/g)].map(([value]) => value).join(' | ')}`];
    case 'const':
      return [`${head}${def}`];
    case 'impl':
      return [];
    case 'enum':
      throw new Error(`${name}: give it #[napi(string_enum)], numbers say nothing`);
  }
}

function indent(text: string): string {
  return (
    text
      .split('\n')
      // Members of a class come with a space too many; only the lines of a comment need theirs.
      .map((line) => (line.startsWith(' *') ? `  ${line}` : `  ${line.trim()}`).trimEnd())
      .join('\n')
  );
}
