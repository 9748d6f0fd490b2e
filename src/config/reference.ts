/**
 * Owns: the reference of the configuration as Markdown, printed from the schema.
 * Must not know: where it is shown.
 * Runs: in `keygate config reference` and in scripts/docs.ts.
 */
import { jsonSchema, type JsonSchema } from './schema.ts';

/** One row per key. `NAME` in a key stands for a name of the user's choice. */
export function configReference(): string {
  const rows = [...keyRows(jsonSchema(), '')].map((cells) => `| ${cells.map(escapeCell).join(' | ')} |`);
  return ['| key | value | default | meaning |', '|---|---|---|---|', ...rows].join('\n');
}

function* keyRows(schema: JsonSchema, prefix: string): Generator<string[]> {
  const required = new Set(schema.required);
  for (const [name, property] of Object.entries(schema.properties ?? {})) {
    const key = `${prefix}${name}`;
    const value = property.default;
    const preset = required.has(name)
      ? 'required'
      : value === undefined || isEmpty(value)
        ? ''
        : `\`${JSON.stringify(value).replaceAll('"', '')}\``;
    yield [`\`${key}\``, kindOf(property), preset, property.description ?? ''];
    yield* keyRows(property, `${key}.`);
    if (property.additionalProperties) yield* keyRows(property.additionalProperties, `${key}.NAME.`);
  }
}

function kindOf(schema: JsonSchema): string {
  if (schema.title !== undefined) return schema.title;
  if (schema.enum !== undefined) return values(schema.enum);
  if (schema.const !== undefined) return values([schema.const]);
  if (schema.anyOf !== undefined) return schema.anyOf.map(kindOf).join(' or ');
  switch (schema.type) {
    case 'array':
      return `list: ${schema.items === undefined ? 'values' : kindOf(schema.items)}`;
    case 'object':
      return schema.additionalProperties ? 'mapping by name' : 'mapping';
    case 'integer':
      return `${schema.minimum} to ${schema.maximum}`;
    case 'boolean':
      return '`true`, `false`';
    default:
      return 'text';
  }
}

/** A version may be written as a number or as text; both look the same. */
function values(all: readonly unknown[]): string {
  return [...new Set(all.map((value) => `\`${String(value)}\``))].join(', ');
}

function isEmpty(value: unknown): boolean {
  return typeof value === 'object' && value !== null && Object.keys(value).length === 0;
}

function escapeCell(text: string): string {
  return text.replaceAll('|', String.raw`\|`);
}
