/**
 * Owns: which name is suggested for a misspelt one, and when none is.
 * Must not know: what the names name.
 * Runs: node:test, in memory.
 */
import assert from 'node:assert/strict';
import { it } from 'node:test';
import { suggest } from '../../src/config/suggestion.ts';

const names = ['listeners', 'tokens', 'upstreams', 'bind', 'alpn'];

it('one slip suggests the name: a letter lost, added, wrong, swapped, or its case', () => {
  for (const slip of ['tokns', 'tokenss', 'tokems', 'tokesn', 'Tokens', 'TOKENS'])
    assert.equal(suggest(slip, names), 'tokens', slip);
});

it('the nearest of several is suggested', () =>
  assert.equal(suggest('upstrem', ['upstream', 'upstreams']), 'upstream'));

it('what is far from every name suggests nothing', () => {
  for (const text of ['', 'x', 'certificates', 'bond-street', 'a'.repeat(10_000)])
    assert.equal(suggest(text, names), undefined, text.slice(0, 20));
});

it('without names nothing is suggested', () => assert.equal(suggest('token', []), undefined));
