/**
 * Owns: that the schema documents itself, and that its JSON Schema says the same as the loader.
 * Must not know: how either is made.
 * Runs: node:test, in memory.
 */
import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { it } from 'node:test';
import { Ajv2020 } from 'ajv/dist/2020.js';
import { parse } from 'yaml';
import { parseConfig } from '../../src/config/load.ts';
import { configReference } from '../../src/config/reference.ts';
import { jsonSchema, type JsonSchema } from '../../src/config/schema.ts';
import { ConfigError } from '../../src/errors.ts';

const example = readFileSync(join(import.meta.dirname, '../../native-config/keygate.yaml'), 'utf8');
const accepts = new Ajv2020({ strict: true, allowUnionTypes: true }).compile(jsonSchema());

it('the JSON Schema accepts the example', () => {
  assert.ok(accepts(parse(example)), JSON.stringify(accepts.errors));
});

const wrong: Record<string, (text: string) => string> = {
  'an unknown section': (text) => `${text}\nfoo: 1`,
  'an unknown key': (text) => text.replace('lanes:', 'lanse:'),
  'too many lanes': (text) => text.replace('lanes: 8', 'lanes: 257'),
  'a missing key': (text) => text.replace(/^ +uri:.*\n/m, ''),
  'a duration without a unit': (text) => text.replace('tcp: 5s', 'tcp: 5'),
  'another balance': (text) => text.replace('least-connections', 'random'),
  'a name with a blank': (text) => text.replace('  https:', '  "h t":'),
  'no listener': (text) => text.slice(0, text.indexOf('listeners:')),
};
for (const [what, change] of Object.entries(wrong)) {
  it(`the JSON Schema and the loader both refuse ${what}`, () => {
    const text = change(example);
    assert.notEqual(text, example);
    assert.ok(!accepts(parse(text)));
    assert.throws(() => parseConfig(text, '/k.yaml'), ConfigError);
  });
}

it('every key has a description', () => {
  for (const [path, schema] of keys(jsonSchema(), '')) assert.ok((schema.description ?? '').length > 0, path);
});

it('every default is one that the loader accepts and the JSON Schema describes', () => {
  const withDefaults = parse(example) as Record<string, unknown>;
  for (const [path, schema] of keys(jsonSchema(), '')) {
    if (!path.includes('.') && schema.default !== undefined) withDefaults[path] = schema.default;
  }
  assert.ok(accepts(withDefaults), JSON.stringify(accepts.errors));
  assert.ok(parseConfig(JSON.stringify(withDefaults), '/k.yaml'));
});

it('the reference has one row per key, in a table of four columns', () => {
  const [head, ruler, ...rows] = configReference().split('\n');
  assert.equal(head, '| key | value | default | meaning |');
  assert.equal(ruler, '|---|---|---|---|');
  const paths = [...keys(jsonSchema(), '')].map(([path]) => `\`${path}\``);
  assert.deepEqual(
    rows.map((row) => row.split(/(?<!\\)\|/).map((cell) => cell.trim())[1]),
    paths,
  );
  for (const row of rows) assert.equal(row.split(/(?<!\\)\|/).length, 6, row);
});

function* keys(schema: JsonSchema, prefix: string): Generator<[string, JsonSchema]> {
  for (const [name, property] of Object.entries(schema.properties ?? {})) {
    yield [`${prefix}${name}`, property];
    yield* keys(property, `${prefix}${name}.`);
    if (property.additionalProperties) yield* keys(property.additionalProperties, `${prefix}${name}.NAME.`);
  }
}
