/**
 * Owns: that policies of FIPS 140-3 are served only by an engine that is built with such a module.
 * Must not know: how it is built.
 * Runs: at start and reload, on the main thread of the primary, and in `check`.
 */
import type { Problem } from '../errors.ts';
import type { Config } from './config.ts';

/** @param isFips asked only where it matters. */
export function fipsProblems(
  { file, policies, listeners, upstreams }: Pick<Config, 'file' | 'policies' | 'listeners' | 'upstreams'>,
  isFips: () => boolean,
): Problem[] {
  const uses = [
    ...Object.values(listeners).map(({ name, policy }) => ({ path: `listeners.${name}.policy`, policy })),
    ...Object.values(upstreams).flatMap(({ name, tls }) =>
      tls === undefined ? [] : [{ path: `upstreams.${name}.tls.policy`, policy: tls.policy }],
    ),
  ].filter(({ policy }) => policies[policy]?.fips === true);
  if (uses.length === 0 || isFips()) return [];
  return uses.map(({ path, policy }) => ({
    file,
    path,
    code: 'config_unsupported',
    found: policy,
    expected: 'a policy that is not made from fips: this engine is built without a FIPS 140-3 module',
    hint: 'build it with KEYGATE_ENGINE_FEATURES=fips scripts/bootstrap; docs/tls.md says what that takes',
  }));
}
