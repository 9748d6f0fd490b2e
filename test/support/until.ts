/**
 * Owns: waiting for what has no event, such as a number on a metrics page.
 * Must not know: what is awaited.
 * Runs: in test processes.
 */
import { setTimeout as pause } from 'node:timers/promises';

const pauseMs = 10;

/**
 * Asks again until there is an answer.
 * @param what completes the sentence "no ... within N ms".
 * @param probe answers undefined or false for "not yet".
 */
export async function until<Answer>(
  what: string,
  probe: () => Answer | Promise<Answer>,
  { deadlineMs = 10_000, found }: { readonly deadlineMs?: number; readonly found?: () => unknown } = {},
): Promise<Exclude<Answer, undefined | false>> {
  const end = performance.now() + deadlineMs;
  for (;;) {
    const answer = await probe();
    if (answer !== undefined && answer !== false) return answer as Exclude<Answer, undefined | false>;
    if (performance.now() > end) {
      const last = found === undefined ? '' : `; found ${JSON.stringify(found())}`;
      throw new Error(`no ${what} within ${deadlineMs} ms${last}`);
    }
    await pause(pauseMs);
  }
}
