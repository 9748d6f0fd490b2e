/**
 * Owns: which files the page at /status consists of, and where they are on disk and on the admin server.
 * Must not know: what the page shows (status/status.js), who may see it.
 * Runs: main thread of the primary, once at its start: what is served does not change with the files.
 */
import { readFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { fileURLToPath } from 'node:url';

export interface StatusFile {
  readonly type: string;
  readonly body: Buffer;
}

/** By path. They hold no data, so that a browser may have them before anybody has signed in. */
export function statusFiles(): ReadonlyMap<string, StatusFile> {
  // Beside this module, in src/ and in dist/ alike.
  const own = (name: string) => fileURLToPath(new URL(`status/${name}`, import.meta.url));
  const uplot = (name: string) => createRequire(import.meta.url).resolve(`uplot/dist/${name}`);
  const files = [
    ['/status', html, own('status.html')],
    ['/status.css', css, own('status.css')],
    ['/status.js', js, own('status.js')],
    ['/status/icon.svg', svg, own('icon.svg')],
    ['/status/uplot.js', js, uplot('uPlot.iife.min.js')],
    ['/status/uplot.css', css, uplot('uPlot.min.css')],
  ] as const;
  return new Map(files.map(([path, type, file]) => [path, { type, body: readFileSync(file) }]));
}

const html = 'text/html; charset=utf-8';
const css = 'text/css; charset=utf-8';
const js = 'text/javascript; charset=utf-8';
const svg = 'image/svg+xml';
