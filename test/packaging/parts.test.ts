/**
 * Owns: that the lists of what a package consists of are whole, valid and allowed, and that there is one version.
 * Must not know: how a package is made.
 * Runs: node:test; asks cargo, without a network.
 */
import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { readFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { dirname, join } from 'node:path';
import { it } from 'node:test';
import { Ajv } from 'ajv';
import { isAllowed } from '../../scripts/licences.ts';
import { thirdParties } from '../../scripts/parts.ts';
import { billOfMaterials } from '../../scripts/sbom.ts';

const root = join(import.meta.dirname, '../..');
const read = (path: string) => readFileSync(join(root, path), 'utf8');

it('package.json, Cargo.toml and CHANGELOG.md have the same version', () => {
  const { version } = JSON.parse(read('package.json')) as { version: string };
  assert.equal(/^version = "(.*)"$/m.exec(read('src/engine/Cargo.toml'))?.[1], version);
  assert.equal(/^## (\S+)/m.exec(read('CHANGELOG.md'))?.[1], version);
});

it('the SBOM is valid CycloneDX 1.6', () => {
  const library = createRequire(import.meta.url).resolve('@cyclonedx/cyclonedx-library/package.json');
  const schema = (name: string) =>
    JSON.parse(readFileSync(join(dirname(library), `res/schema/${name}.SNAPSHOT.schema.json`), 'utf8')) as object;
  const ajv = new Ajv({ strict: false, validateFormats: false, allErrors: true });
  for (const name of ['spdx', 'jsf-0.82', 'cryptography-defs'])
    ajv.addSchema(schema(name), `http://cyclonedx.org/schema/${name}.SNAPSHOT.schema.json`);
  const validate = ajv.compile(schema('bom-1.6'));

  const bom = billOfMaterials();
  assert.ok(validate(bom), JSON.stringify(validate.errors?.slice(0, 5), undefined, 2));
  const wrong = { ...bom, components: [{ type: 'library' }] };
  assert.ok(!validate(wrong), 'the schema finds nothing wrong with a component that has no name');
});

it('the SBOM names each part once, and only parts that it has are used', () => {
  const { components, dependencies, metadata } = billOfMaterials();
  const refs = [metadata.component, ...components].map((component) => component['bom-ref']);
  assert.equal(new Set(refs).size, refs.length);
  assert.deepEqual(dependencies.map(({ ref }) => ref).toSorted(), refs.toSorted());
  const used = new Set(dependencies.flatMap(({ dependsOn }) => dependsOn));
  assert.deepEqual(
    [...used].filter((ref) => !refs.includes(ref)),
    [],
  );
  // What nobody uses would be no part: a mistake in how dependencies are followed.
  assert.deepEqual(
    refs.filter((ref) => ref !== metadata.component.purl && !used.has(ref)),
    [],
  );
});

it('every dependency of package.json and Cargo.toml is a part, nothing that is for tests or building is', () => {
  const names = thirdParties().parts.map(({ name }) => name);
  const manifest = JSON.parse(read('package.json')) as Record<
    'dependencies' | 'devDependencies' | 'bundleDependencies',
    object
  >;
  for (const name of Object.keys(manifest.dependencies)) assert.ok(names.includes(name), name);
  for (const name of Object.keys(manifest.devDependencies)) assert.ok(!names.includes(name), name);
  // An installation without a registry has what is bundled and nothing else.
  assert.deepEqual(manifest.bundleDependencies, Object.keys(manifest.dependencies));

  const [, linked = ''] = /^\[dependencies\]\n([^]*?)^\[/m.exec(read('src/engine/Cargo.toml')) ?? [];
  for (const [, alias = '', crate = alias] of linked.matchAll(/^([a-z0-9_-]+) = (?:{ package = "([^"]+)")?/gm))
    assert.equal(names.includes(crate), crate !== 'napi-derive', crate);
  for (const crate of ['napi-build', 'cc', 'proptest', 'syn']) assert.ok(!names.includes(crate), crate);
});

it('crates that are linked for aarch64 have allowed licences too', () => {
  const options = ['--locked', '--offline', '--manifest-path', join(root, 'src/engine/Cargo.toml')];
  const edges = ['--edges', 'normal', '--target', 'aarch64-unknown-linux-gnu', '--prefix', 'none', '--format', '{l}'];
  const printed = execFileSync('cargo', ['tree', ...options, ...edges], { encoding: 'utf8' });
  const licences = new Set(printed.split('\n').map((line) => line.replace(' (*)', '').replaceAll('/', ' OR ')));
  licences.delete('');
  assert.ok(licences.size > 3);
  assert.deepEqual(
    [...licences].filter((licence) => !isAllowed(licence)),
    [],
  );
});

const expressions: Readonly<Record<string, boolean>> = {
  MIT: true,
  'GPL-3.0-only': false,
  '': false,
  'MIT OR GPL-3.0-only': true,
  'GPL-3.0-only OR MIT': true,
  'MIT AND GPL-3.0-only': false,
  'ISC AND (Apache-2.0 OR GPL-3.0-only)': true,
  'MIT OR GPL-3.0-only AND MPL-2.0': true,
  '(MIT OR GPL-3.0-only) AND MPL-2.0': false,
  'GPL-2.0-only WITH Classpath-exception-2.0': false,
  'MIT WITH something': false,
  '(MIT': false,
  'MIT)': false,
  'SEE LICENSE IN LICENSE': false,
};
for (const [expression, verdict] of Object.entries(expressions)) {
  it(`the licence ${JSON.stringify(expression)} is ${verdict ? '' : 'not '}allowed`, () => {
    assert.equal(isAllowed(expression), verdict);
  });
}
