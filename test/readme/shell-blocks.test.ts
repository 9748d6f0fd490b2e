/**
 * Owns: that what the documents for users tell them to type works, and prints what the documents say.
 * Must not know: what the commands do.
 * Runs: node:test; each section in a shell of its own.
 */
import assert from 'node:assert/strict';
import { existsSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { describe, it } from 'node:test';
import type { TestContext } from 'node:test';
import { runSection, shellSections, whyNoOwnNetwork } from '../support/shell-blocks.ts';

const root = join(import.meta.dirname, '../..');

for (const document of ['README.md', 'docs/modes.md', 'docs/production.md', 'docs/tls.md']) {
  describe(document, () => {
    const sections = shellSections(join(root, document));
    for (const section of sections) {
      if (section.blocks.every(({ notRun }) => notRun !== undefined)) continue;
      // It copies examples, with their ports.
      const skip = document === 'docs/modes.md' && whyNoOwnNetwork();
      it(`the commands of "${section.heading}" do what it says`, { skip }, async () =>
        runSection(join(root, document), section),
      );
    }

    it('says of each block that is not run why, or which test does what it says', (test) => {
      for (const { line, commands, notRun } of sections.flatMap(({ blocks }) => blocks)) {
        if (notRun === undefined) continue;
        test.diagnostic(`${document}:${line} is not run: ${notRun}: ${commands.split('\n')[0]}`);
        for (const [path] of notRun.matchAll(/\btest\/\S+\.ts\b/g)) assert.ok(existsSync(join(root, path)), path);
      }
    });
  });
}

it('the walkthrough is run from its first to its last command', () => {
  const walkthrough = shellSections(join(root, 'README.md')).find(({ heading }) => heading === 'Walkthrough');
  const blocks = walkthrough?.blocks ?? [];
  assert.ok(blocks.length > 5, `found ${blocks.length} blocks`);
  assert.deepEqual(
    blocks.filter(({ notRun }) => notRun !== undefined),
    [],
  );
});

const faults: Readonly<Record<string, { document: string; says: RegExp }>> = {
  'a command that fails': {
    document: fenced('sh', 'true', 'false', 'true'),
    says: /:2: a command failed:[^]*\n\+ true\n\+ false\n/,
  },
  'a command that fails in a later block': {
    document: `${fenced('sh', 'true')}\n${fenced('sh', 'false')}`,
    says: /:7: a command failed/,
  },
  'another output': {
    document: `${fenced('sh', 'echo one')}\n${fenced('text', 'two')}`,
    says: /prints something else/,
  },
  'more output': {
    document: `${fenced('sh', 'echo one; echo two')}\n${fenced('text', 'one')}`,
    says: /prints something else/,
  },
};
for (const [what, { document, says }] of Object.entries(faults)) {
  it(`${what} is found`, async (test) => {
    const file = written(test, document);
    const [section] = shellSections(file);
    assert.ok(section !== undefined);
    await assert.rejects(runSection(file, section), says);
  });
}

it('what varies is left out of the output, and what is left in the background is ended', async (test) => {
  const block = fenced('sh', 'echo "from $$ to"', 'echo end >&2', 'sleep 600 &');
  const file = written(test, `${block}\n${fenced('text', 'from … to', 'end')}`);
  const [section] = shellSections(file);
  assert.ok(section !== undefined);
  await runSection(file, section);
});

for (const language of ['bash', 'console', '']) {
  it(`commands in a block of the language "${language}" are found`, (test) => {
    assert.throws(() => shellSections(written(test, fenced(language, 'keygate check -c x'))), /say sh|but not sh/);
  });
}

function fenced(language: string, ...lines: readonly string[]): string {
  return ['', `\`\`\`${language}`, ...lines, '```', ''].join('\n');
}

function written(test: TestContext, text: string): string {
  const directory = mkdtempSync(join(tmpdir(), 'keygate-document-'));
  test.after(() => rmSync(directory, { recursive: true }));
  const file = join(directory, 'document.md');
  writeFileSync(file, `## A section${text}`);
  return file;
}
