/**
 * Owns: `keygate serve`.
 * Must not know: how the service works.
 * Runs: main thread of the primary.
 */
import { loadConfig } from '../config/load.ts';
import { serve } from '../primary/serve.ts';

/** @throws ConfigError, TokenError, ServiceError */
export async function run({ config }: { readonly config: string }): Promise<void> {
  const service = await serve(loadConfig(config));
  await service.ended;
}
