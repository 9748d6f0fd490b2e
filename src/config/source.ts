/**
 * Owns: YAML text, and where in it each value stands.
 * Must not know: which keys keygate has.
 * Runs: at start, on the main thread. Bounded by the size of the text, a number of aliases and a depth.
 */
import {
  isAlias,
  isMap,
  isNode,
  isScalar,
  isSeq,
  LineCounter,
  parseDocument,
  visit,
  type Document,
  type Node,
} from 'yaml';
import type { Problem } from '../errors.ts';
import type { Fault } from './fault.ts';

/** Each use of an alias copies what it names: without a limit, a short text can stand for gigabytes. */
const aliasesMax = 100;
const depthMax = 32;
const foundCharactersMax = 80;
/** The first syntax error makes a parser see others. */
const syntaxProblemsMax = 3;

export type Path = readonly (string | number)[];

/** A fault and what it is about. */
export interface PlacedFault extends Fault {
  readonly path: Path;
  /** `key`: the problem is the key at the end of `path`, not its value. */
  readonly at?: 'key' | 'value';
  /** Offset in the text, when `path` alone does not say which of two equal keys is meant. */
  readonly offset?: number;
  /** The other of two things that cannot both be; its position goes into the hint. */
  readonly conflictsWith?: Path;
}

export interface Source {
  /** Plain objects, arrays, strings, numbers, booleans, null; `undefined` unless usable. */
  readonly value: unknown;
  /** Whether `value` is what the text says. */
  readonly usable: boolean;
  /** Why the text is unusable; empty if it is usable. */
  readonly problems: readonly Problem[];
  /** What is wrong in a usable text and cannot be seen in `value`. */
  readonly faults: readonly PlacedFault[];
  problem(fault: PlacedFault): Problem;
}

/** @param isSecret whether what stands at a path must never be shown, not even when it is malformed. */
export function parseSource(text: string, file: string, isSecret: (path: Path) => boolean): Source {
  const lines = new LineCounter();
  const syntaxProblem = (found: string, offset = 0): Problem => {
    const { line, col: column } = lines.linePos(offset);
    return {
      file,
      line,
      column,
      path: '',
      code: 'config_syntax',
      found,
      expected: `YAML 1.2, at most ${depthMax} levels deep`,
    };
  };
  const problem = (fault: PlacedFault): Problem => place(document, fault, { file, lines, isSecret });
  const unusable = (...problems: readonly Problem[]): Source => ({
    value: undefined,
    usable: false,
    problems,
    faults: [],
    problem,
  });

  let document: Document;
  try {
    // Duplicate keys are found below, with their path.
    document = parseDocument(text, { lineCounter: lines, prettyErrors: false, stringKeys: true, uniqueKeys: false });
  } catch (error) {
    // The parser recurses.
    if (error instanceof RangeError) return unusable(syntaxProblem('nesting that is too deep'));
    throw error;
  }
  const faults = [...document.errors, ...document.warnings];
  if (faults.length > 0)
    return unusable(
      ...faults.slice(0, syntaxProblemsMax).map(({ message, pos }) => syntaxProblem(withoutContent(message), pos[0])),
    );

  const keys = hiddenKeyFaults(document);
  if (keys.tooDeep) return unusable(syntaxProblem('nesting that is too deep'));
  try {
    const value: unknown = document.toJS({ maxAliasCount: aliasesMax }) ?? {};
    return { value, usable: true, problems: [], faults: keys.faults, problem };
  } catch (error) {
    // What is left are aliases: used too often, or naming nothing.
    return unusable(syntaxProblem(withoutContent((error as Error).message), offsetOf(unresolvedAlias(document))));
  }
}

/** Finds what plain objects would hide: keys given twice, and `__proto__`. */
function hiddenKeyFaults(document: Document): { faults: PlacedFault[]; tooDeep: boolean } {
  const faults: PlacedFault[] = [];
  let tooDeep = false;
  const descend = (node: unknown, path: Path): void => {
    if (path.length > depthMax) {
      tooDeep = true;
    } else if (isSeq(node)) {
      for (const [index, item] of node.items.entries()) descend(item, [...path, index]);
    } else if (isMap(node)) {
      const seen = new Set<string>();
      for (const { key: keyNode, value } of node.items) {
        const key = keyName(keyNode);
        const keyPath = [...path, key];
        const at = { path: keyPath, at: 'key', offset: offsetOf(keyNode) } as const;
        if (seen.has(key)) faults.push({ ...at, code: 'config_duplicate_key', expected: 'each key once' });
        if (key === '__proto__')
          faults.push({ ...at, code: 'config_unknown_key', expected: 'a key that keygate knows' });
        seen.add(key);
        descend(value, keyPath);
      }
    }
  };
  descend(document.contents, []);
  return { faults, tooDeep };
}

function unresolvedAlias(document: Document): Node | undefined {
  let found: Node | undefined;
  let aliases = 0;
  visit(document, {
    Alias(_, node) {
      aliases += 1;
      if (node.resolve(document) === undefined) found = node;
      return found === undefined && aliases < aliasesMax ? undefined : visit.BREAK;
    },
  });
  return found;
}

interface Context {
  readonly file: string;
  readonly lines: LineCounter;
  readonly isSecret: (path: Path) => boolean;
}

function place(document: Document, fault: PlacedFault, { file, lines, isSecret }: Context): Problem {
  const { keyNode, node, missing } = locate(document, fault.path);
  const onKey = fault.at === 'key' || missing;
  const { line, col: column } = lines.linePos(fault.offset ?? offsetOf(onKey ? keyNode : node));
  // A key inside a secret may be the secret itself, written in the wrong place.
  const secret = isSecret(fault.path);
  const shown = secret && fault.at === 'key' ? fault.path.slice(0, -1) : fault.path;
  const value = secret
    ? 'something that is not shown because it may be a secret'
    : describe(fault.at === 'key' ? fault.path.at(-1) : node);
  return {
    file,
    line,
    column,
    path: formatPath(shown),
    code: missing ? 'config_missing_key' : (fault.code ?? 'config_value'),
    found: missing ? 'nothing' : (fault.found ?? value),
    expected: fault.expected,
    ...hintOf(fault, document, lines),
  };
}

function hintOf({ hint, conflictsWith }: PlacedFault, document: Document, lines: LineCounter): { hint?: string } {
  if (conflictsWith === undefined) return hint === undefined ? {} : { hint };
  const { line, col } = lines.linePos(offsetOf(locate(document, conflictsWith).node));
  return { hint: `it cannot be beside ${formatPath(conflictsWith)} at ${line}:${col}` };
}

/** Follows a path as far as it goes. */
function locate(document: Document, path: Path): { keyNode: unknown; node: unknown; missing: boolean } {
  let keyNode: unknown = document.contents;
  let node: unknown = document.contents;
  for (const step of path) {
    if (isAlias(node)) node = node.resolve(document);
    if (isMap(node)) {
      const pair = node.items.findLast(({ key }) => keyName(key) === step);
      if (pair === undefined) return { keyNode, node, missing: true };
      keyNode = pair.key;
      // `key:` at the end of a line may have no node of its own.
      node = pair.value ?? pair.key;
    } else if (isSeq(node) && typeof step === 'number' && step < node.items.length) {
      node = node.items[step];
      keyNode = node;
    } else {
      return { keyNode, node, missing: true };
    }
  }
  return { keyNode, node, missing: false };
}

function keyName(key: unknown): string {
  return isScalar(key) ? String(key.value) : String(key);
}

function offsetOf(node: unknown): number {
  return isNode(node) ? (node.range?.[0] ?? 0) : 0;
}

function describe(node: unknown): string {
  if (isMap(node)) return 'a mapping';
  if (isSeq(node)) return 'a list';
  if (isAlias(node)) return 'an alias';
  const value = isScalar(node) ? node.value : node;
  if (value === null || value === undefined) return 'nothing';
  if (typeof value === 'string') return JSON.stringify(shortened(value));
  return shortened(isScalar(node) && node.source !== undefined ? node.source : JSON.stringify(value));
}

function shortened(text: string): string {
  return text.length > foundCharactersMax ? `${text.slice(0, foundCharactersMax)}...` : text;
}

/** `listeners.https.bind[0]`. */
function formatPath(path: Path): string {
  return path
    .map((step, index) => {
      if (typeof step === 'number') return `[${step}]`;
      const name = /^[\w.-]{1,80}$/.test(step) ? step : describe(step);
      return index === 0 ? name : `.${name}`;
    })
    .join('');
}

/** Messages of the YAML parser quote names after a colon; a PIN with a special character first reads as one. */
function withoutContent(message: string): string {
  const [phrase = message] = message.split(':');
  return `${phrase.slice(0, 1).toLowerCase()}${phrase.slice(1)}`;
}
