/**
 * Owns: the parts of a configuration that a plan is made of, for tests that need no file.
 * Must not know: YAML.
 * Runs: in test processes.
 */
import type { CertificateConfig, TicketKeyConfig, TokenConfig } from '../../src/config/config.ts';
import type { PlanConfig } from '../../src/pkcs11/plan.ts';
import type { DisposableToken } from './softhsm.ts';

export function planConfig(
  tokens: readonly TokenConfig[],
  certificates: readonly CertificateConfig[],
  ticketKey?: TicketKeyConfig,
): PlanConfig {
  const byName = <T extends { readonly name: string }>(items: readonly T[]) =>
    Object.fromEntries(items.map((item) => [item.name, item]));
  return {
    workers: 1,
    tokens: byName(tokens),
    certificates: byName(certificates),
    tickets: { key: ticketKey, lifetimeMs: 1000, rotationMs: 1000 },
    upstreams: {},
    listeners: {},
  };
}

export function tokenConfig(
  disposable: Pick<DisposableToken, 'module' | 'label' | 'pinFile'>,
  overrides: Partial<TokenConfig> = {},
): TokenConfig {
  return {
    name: 'hsm',
    module: disposable.module,
    uri: { token: disposable.label },
    pin: { file: disposable.pinFile },
    lanes: 2,
    sessions: undefined,
    weight: 1,
    queue: { max: 100, ageMs: 1000 },
    signDeadlineMs: 5000,
    verify: { rsa: 'always', ec: 100 },
    isolate: true,
    loginLockWaitMs: 5000,
    ...overrides,
  };
}
