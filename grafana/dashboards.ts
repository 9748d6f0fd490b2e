/**
 * Owns: the dashboards as files: grafana/dashboards/*.json is printed from grafana/source and never edited.
 * Must not know: what is on a dashboard.
 * Runs: `npm run dashboards` writes; `--check`, a step of `npm test`, fails when a file differs, lacks or is too many.
 */
import { readFileSync, readdirSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { certificates } from './source/certificates.ts';
import { dashboardOf } from './source/dashboard.ts';
import { handshakeBoard } from './source/handshakes.ts';
import { overview } from './source/overview.ts';
import { processes } from './source/processes.ts';
import { relay } from './source/relay.ts';
import { signing } from './source/signing.ts';

const directory = join(import.meta.dirname, 'dashboards');
const boards = [overview, handshakeBoard, signing, relay, certificates, processes];

const wanted = new Map(
  boards.map((board) => [`${board.uid}.json`, `${JSON.stringify(dashboardOf(board), undefined, 2)}\n`]),
);
const present = readdirSync(directory).filter((name) => name.endsWith('.json'));
const differing = [...wanted].filter(([name, text]) => !present.includes(name) || read(name) !== text);
const superfluous = present.filter((name) => !wanted.has(name));

if (!process.argv.includes('--check')) {
  for (const [name, text] of differing) writeFileSync(join(directory, name), text);
  for (const name of superfluous) rmSync(join(directory, name));
} else if (differing.length + superfluous.length > 0) {
  const names = [...differing.map(([name]) => name), ...superfluous].join(', ');
  console.error(
    `grafana/dashboards differs from the code (${names}): run \`npm run dashboards\` and commit the result`,
  );
  process.exitCode = 1;
}

function read(name: string): string {
  return readFileSync(join(directory, name), 'utf8');
}
