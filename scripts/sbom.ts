/**
 * Owns: the software bill of materials, as CycloneDX 1.6.
 * Must not know: where the list of parts comes from.
 * Runs: `npm run sbom`, and before npm packs. Writes dist/sbom.cdx.json. The same checkout gives the same file.
 */
import { execFileSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import { mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { thirdParties } from './parts.ts';
import type { Part } from './parts.ts';

const root = join(import.meta.dirname, '..');

if (import.meta.main) {
  mkdirSync(join(root, 'dist'), { recursive: true });
  writeFileSync(join(root, 'dist/sbom.cdx.json'), `${JSON.stringify(billOfMaterials(), undefined, 2)}\n`);
}

export function billOfMaterials() {
  const { version } = JSON.parse(readFileSync(join(root, 'package.json'), 'utf8')) as { version: string };
  const { parts, ofKeygate, ofEngine } = thirdParties();
  const keygate = ownComponent('application', `pkg:npm/keygate@${version}`, 'keygate', version);
  const engine = ownComponent('library', `pkg:cargo/keygate-engine@${version}`, 'keygate-engine', version);
  const components = [engine, ...parts.map(component)];
  const dependencies = [
    { ref: keygate.purl, dependsOn: [engine.purl, ...ofKeygate] },
    { ref: engine.purl, dependsOn: ofEngine },
    ...parts.map(({ purl, uses }) => ({ ref: purl, dependsOn: uses })),
  ];
  return {
    $schema: 'http://cyclonedx.org/schema/bom-1.6.schema.json',
    bomFormat: 'CycloneDX',
    specVersion: '1.6',
    serialNumber: serialNumber([components, dependencies]),
    version: 1,
    metadata: {
      timestamp: timestamp(),
      lifecycles: [{ phase: 'build' }],
      component: keygate,
      properties: [{ name: 'keygate:platform', value: `${process.platform}-${process.arch}` }],
    },
    components,
    dependencies,
  };
}

function ownComponent(type: string, purl: string, name: string, version: string) {
  return { 'bom-ref': purl, type, name, version, purl, licenses: licences('Apache-2.0') };
}

function component({ purl, name, version, licence, hash }: Part) {
  return {
    'bom-ref': purl,
    type: 'library',
    name,
    version,
    purl,
    licenses: licences(licence),
    ...(hash === undefined ? {} : { hashes: [{ alg: hash.algorithm, content: hash.hex }] }),
  };
}

function licences(expression: string) {
  return expression.includes(' ') ? [{ expression }] : [{ license: { id: expression } }];
}

/** A UUID (RFC 9562, version 8) of what the list says. */
function serialNumber(content: unknown): string {
  const hex = createHash('sha256').update(JSON.stringify(content)).digest('hex');
  return `urn:uuid:${hex.slice(0, 8)}-${hex.slice(8, 12)}-8${hex.slice(13, 16)}-8${hex.slice(17, 20)}-${hex.slice(20, 32)}`;
}

/** When the source was made, where its history is known; SOURCE_DATE_EPOCH as in https://reproducible-builds.org. */
function timestamp(): string {
  const epoch = process.env['SOURCE_DATE_EPOCH'];
  if (epoch !== undefined) return new Date(Number(epoch) * 1000).toISOString();
  try {
    const log = ['-C', root, 'log', '-1', '--format=%ct'];
    const seconds = execFileSync('git', log, { encoding: 'utf8', stdio: ['ignore', 'pipe', 'ignore'] }).trim();
    return new Date(Number(seconds) * 1000).toISOString();
  } catch {
    return new Date().toISOString();
  }
}
