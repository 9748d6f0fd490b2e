/**
 * Owns: `keygate serve`.
 * Must not know: how the service works.
 * Runs: main thread of the primary.
 */
import { loadConfig } from '../config/load.ts';
import { serve } from '../primary/serve.ts';
import type { ServeOptions } from '../primary/serve.ts';

/** @throws ConfigError, TokenError, ServiceError */
export async function run({ config, ...options }: { readonly config: string } & ServeOptions): Promise<void> {
  const service = await serve(loadConfig(config), options);
  await service.ended;
}
