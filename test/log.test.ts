/**
 * Owns: the table of log events: each is logged somewhere.
 * Must not know: who logs them; that nothing else is logged is the compiler's.
 * Runs: node:test; reads the sources.
 */
import assert from 'node:assert/strict';
import { globSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { it } from 'node:test';
import { logEvents } from '../src/log.ts';

const root = join(import.meta.dirname, '..');

it('every event of the table is logged', () => {
  const sources = ['src/{primary,worker}/**/*.ts', 'src/log.ts', 'src/engine/src/access_log.rs']
    .flatMap((pattern) => globSync(pattern, { cwd: root }))
    .map((file) => readFileSync(join(root, file), 'utf8'))
    .join('\n');
  // Of these the end of the name is computed.
  const computed = /event: `(?:\$\{what\}_(?:up|down)|reload_\$\{outcome\})`/;
  assert.match(sources, computed);
  const unlogged = Object.keys(logEvents).filter(
    (event) =>
      !sources.includes(`event: '${event}'`) &&
      !sources.includes(`event = '${event}'`) &&
      !sources.includes(`event: "${event}"`) &&
      !/^(?:token|server)_(?:up|down)$|^reload_(?:refused|rolled_back)$/.test(event),
  );
  assert.deepEqual(unlogged, []);
});
