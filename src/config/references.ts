/**
 * Owns: what sections say about each other: every name must be defined, no address bound twice.
 * Must not know: positions; whether the document is otherwise right, so that its problems are all reported at once.
 * Runs: at start and reload, on the main thread.
 */
import { formatAddress, parseBindAddress } from './address.ts';
import { builtInPolicies } from './policies.ts';
import type { Path, PlacedFault } from './source.ts';
import { suggest } from './suggestion.ts';

export function referenceFaults(document: unknown): PlacedFault[] {
  return [...unknownNames(document), ...repeatedNames(document), ...builtInNames(document), ...sharedBinds(document)];
}

function* unknownNames(document: unknown): Generator<PlacedFault> {
  const policies = [...builtInPolicies.map(({ name }) => name), ...namesIn(document, 'policies')];
  for (const [path, name] of texts(document, 'certificates', 'tokens'))
    yield* unlessDefined(path, name, 'tokens', namesIn(document, 'tokens'));
  for (const [path, name] of texts(document, 'listeners', 'certificates'))
    yield* unlessDefined(path, name, 'certificates', namesIn(document, 'certificates'));
  for (const [path, name] of texts(document, 'listeners', 'policy'))
    yield* unlessDefined(path, name, 'policies', policies);
  for (const [path, name] of texts(document, 'listeners', 'upstream'))
    yield* unlessDefined(path, name, 'upstreams', namesIn(document, 'upstreams'));
}

function* unlessDefined(path: Path, name: string, section: string, defined: readonly string[]): Generator<PlacedFault> {
  if (defined.includes(name)) return;
  const suggestion = suggest(name, defined);
  yield {
    path,
    code: 'config_reference',
    expected:
      defined.length === 0
        ? `one of the ${section}; none is defined`
        : `one of the ${section}: ${defined.slice(0, 20).join(', ')}`,
    ...(suggestion === undefined ? {} : { hint: `did you mean "${suggestion}"?` }),
  };
}

/** A list that says the same twice is a mistake: the second was meant to be something else. */
function* repeatedNames(document: unknown): Generator<PlacedFault> {
  const lists = [
    ['certificates', 'tokens'],
    ['listeners', 'certificates'],
    ['listeners', 'alpn'],
    ['upstreams', 'servers'],
    ['policies', 'groups'],
    ['policies', 'cipherSuites'],
  ] as const;
  for (const [section, key] of lists) {
    const seen = new Set<string>();
    for (const [path, text] of texts(document, section, key)) {
      const identity = JSON.stringify([path[1], text]);
      if (seen.has(identity)) yield { path, code: 'config_conflict', expected: 'each entry once' };
      seen.add(identity);
    }
  }
}

function* builtInNames(document: unknown): Generator<PlacedFault> {
  for (const { name } of builtInPolicies) {
    if (!namesIn(document, 'policies').includes(name)) continue;
    yield {
      path: ['policies', name],
      at: 'key',
      code: 'config_conflict',
      expected: 'another name: this policy is built in',
      hint: `give it a name of its own, such as ${name}-2`,
    };
  }
}

function* sharedBinds(document: unknown): Generator<PlacedFault> {
  const owners = new Map<string, string>();
  for (const [path, text] of texts(document, 'listeners', 'bind')) {
    const parsed = parseBindAddress(text);
    // Port 0 is another port each time.
    if ('fault' in parsed || parsed.value.port === 0) continue;
    const address = formatAddress(parsed.value);
    const owner = owners.get(address);
    if (owner !== undefined)
      yield {
        path,
        code: 'config_conflict',
        expected: `an address of its own: the listener ${owner} binds ${address} already`,
      };
    owners.set(address, String(path[1]));
  }
}

function namesIn(document: unknown, section: string): string[] {
  return Object.keys(mapping(mapping(document)[section]));
}

/** Every text at `section.*.key`, or in the list that stands there. */
function* texts(document: unknown, section: string, key: string): Generator<[Path, string]> {
  for (const [name, entry] of Object.entries(mapping(mapping(document)[section]))) {
    const value = mapping(entry)[key];
    if (typeof value === 'string') yield [[section, name, key], value];
    if (!Array.isArray(value)) continue;
    for (const [index, item] of value.entries())
      if (typeof item === 'string') yield [[section, name, key, index], item];
  }
}

function mapping(value: unknown): Readonly<Record<string, unknown>> {
  return typeof value === 'object' && value !== null && !Array.isArray(value) ? (value as Record<string, unknown>) : {};
}
