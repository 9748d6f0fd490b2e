/**
 * Owns: what comes of policies that are made from one another, and whether that makes sense.
 * Must not know: positions; whether the document is otherwise right, so that its problems are all reported at once.
 * Runs: at start, on the main thread.
 */
import type * as z from 'zod';
import type { Fault } from './fault.ts';
import { builtInPolicies, cipherSuiteVersion, derivePolicy, fipsPolicy, isSchemeOf, versionsOf } from './policies.ts';
import type { Policy } from './policies.ts';
import { policy as policySchema, tickets as ticketsSchema } from './schema.ts';
import type { PlacedFault } from './source.ts';
import { formatDuration } from './units.ts';

type PolicyDocument = z.output<typeof policySchema>;
type Documents = Readonly<Record<string, PolicyDocument>>;

/** Every policy by its name, the built-in ones too; without those whose bases lead nowhere. */
export function resolvePolicies(documents: Documents): ReadonlyMap<string, Policy> {
  return resolve(documents).policies;
}

export function* policyFaults({ policies, tickets }: Readonly<Record<string, unknown>>): Generator<PlacedFault> {
  const documents: Record<string, PolicyDocument> = {};
  for (const [name, value] of Object.entries(typeof policies === 'object' ? { ...policies } : {})) {
    const parsed = policySchema.safeParse(value);
    if (parsed.success) documents[name] = parsed.data;
  }
  const { policies: resolved, circular } = resolve(documents);
  for (const name of circular) {
    const expected = 'a policy that is not made from this one';
    yield { path: ['policies', name, 'base'], code: 'config_conflict', expected };
  }
  const { data } = ticketsSchema.safeParse(tickets ?? {});
  for (const [name, document] of Object.entries(documents)) {
    const policy = resolved.get(name);
    if (policy === undefined) continue;
    for (const { keys, ...fault } of faultsOf(policy, data?.lifetime ?? Infinity)) {
      // What it has of its base is the fault of the base, which is reported itself.
      const key = keys.find((wanted) => document[wanted] !== undefined);
      if (key !== undefined) yield { path: ['policies', name, key], code: 'config_conflict', ...fault };
    }
  }
}

/** A chain of bases may be as long as the document. */
function resolve(documents: Documents): { policies: ReadonlyMap<string, Policy>; circular: readonly string[] } {
  const policies = new Map(builtInPolicies.map((policy) => [policy.name, policy]));
  const unusable = new Set<string>();
  const circular: string[] = [];
  for (const start of Object.keys(documents)) {
    const chain = new Set<string>();
    let name = start;
    for (;;) {
      const document = Object.hasOwn(documents, name) ? documents[name] : undefined;
      if (policies.has(name) || unusable.has(name) || chain.has(name) || document === undefined) break;
      chain.add(name);
      name = document.base;
    }
    if (chain.has(name)) circular.push(name);
    let base = policies.get(name);
    for (const made of [...chain].toReversed()) {
      const document = documents[made];
      if (base === undefined || document === undefined) unusable.add(made);
      else
        policies.set(
          made,
          (base = derivePolicy(made, base, { ...document, ticketLifetimeMs: document.ticketLifetime })),
        );
    }
  }
  return { policies, circular };
}

/** About the first of `keys` that the policy names itself. */
type PolicyFault = Fault & { readonly keys: readonly (keyof PolicyDocument)[] };

function* faultsOf(policy: Policy, ticketLifetimeMsMax: number): Generator<PolicyFault> {
  const { minVersion, maxVersion, groups, cipherSuites, signatureSchemes, ticketLifetimeMs } = policy;
  if (minVersion > maxVersion) {
    const expected = `a minVersion of at most maxVersion, found ${minVersion} and ${maxVersion}`;
    yield { keys: ['minVersion', 'maxVersion'], expected };
    return;
  }
  if (minVersion === '1.2' && groups.every((group) => group === 'X25519MLKEM768')) {
    const expected = 'a group that TLS 1.2 has as well: X25519, secp256r1 or secp384r1';
    yield { keys: ['groups', 'minVersion', 'maxVersion'], expected };
  }
  const versions = versionsOf(policy);
  for (const version of versions) {
    if (!cipherSuites.some((suite) => cipherSuiteVersion(suite) === version)) {
      const expected = `a cipher suite for TLS ${version}, which the policy allows`;
      const hint = 'cipherSuites that are not named are those of `base` for the versions';
      yield { keys: ['cipherSuites', 'minVersion', 'maxVersion'], expected, hint };
    }
    if (!signatureSchemes.some((scheme) => isSchemeOf(scheme, version))) {
      const expected = `a signature scheme for TLS ${version}, which the policy allows`;
      yield { keys: ['signatureSchemes', 'minVersion', 'maxVersion'], expected };
    }
  }
  const forbidden = cipherSuites.filter((suite) => !versions.includes(cipherSuiteVersion(suite)));
  if (forbidden.length > 0) {
    const expected = `no cipher suite for a version that the policy forbids (${forbidden.join(', ')})`;
    yield { keys: ['cipherSuites'], expected };
  }
  if (ticketLifetimeMs !== undefined && ticketLifetimeMs > ticketLifetimeMsMax) {
    yield {
      keys: ['ticketLifetime'],
      expected: `at most tickets.lifetime, which is ${formatDuration(ticketLifetimeMsMax)}`,
    };
  }
  if (policy.fips) yield* unapproved(policy);
}

/** What a policy that is made from `fips` has beyond it. */
function* unapproved(policy: Policy): Generator<PolicyFault> {
  for (const key of ['groups', 'cipherSuites', 'signatureSchemes'] as const) {
    const known: readonly string[] = fipsPolicy[key];
    const beyond = policy[key].filter((word) => !known.includes(word));
    if (beyond.length === 0) continue;
    yield { keys: [key], expected: `what policy fips has: ${known.join(', ')}`, found: beyond.join(', ') };
  }
  if (policy.extendedMasterSecret !== 'required') {
    yield { keys: ['extendedMasterSecret'], expected: 'required, as in policy fips' };
  }
}
