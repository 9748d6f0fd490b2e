/**
 * Owns: when OCSP responses are fetched.
 * Must not know: responders; what becomes of a response (test/system/stapling.test.ts).
 * Runs: in one test process, on numbers.
 */
import assert from 'node:assert/strict';
import { describe, it } from 'node:test';
import * as fc from 'fast-check';
import { refreshAt, retryDelayMs } from '../../src/primary/stapler.ts';

const hour = 3_600_000;
const thisUpdate = new Date(Date.UTC(2030, 0, 1));
const holding = (ms: number) => ({ thisUpdate, nextUpdate: new Date(thisUpdate.getTime() + ms) });

describe('the next OCSP response', () => {
  it('is fetched when half of the time of the one before is over, not of all at the same moment', () => {
    const week = 7 * 24 * hour;
    const now = thisUpdate.getTime() + hour;
    assert.equal(refreshAt(holding(week), now, 0), thisUpdate.getTime() + week / 2);
    assert.equal(refreshAt(holding(week), now, 1), thisUpdate.getTime() + week * (5 / 8));
  });

  it('is not fetched at once when the one that came is old already', () => {
    const now = thisUpdate.getTime() + 7 * hour;
    assert.equal(refreshAt(holding(8 * hour), now, 0), now + hour / 8);
  });

  it('is always fetched later than now, and with time left for other tries', () => {
    const moments = fc.tuple(
      fc.integer({ min: 1000, max: 400 * 24 * hour }),
      fc.double({ min: 0, max: 0.999, noNaN: true }),
      fc.double({ min: 0, max: 1, noNaN: true }),
    );
    fc.assert(
      fc.property(moments, ([life, gone, random]) => {
        const answer = holding(life);
        const now = thisUpdate.getTime() + life * gone;
        const at = refreshAt(answer, now, random);
        const left = answer.nextUpdate.getTime() - now;
        assert.ok(at > now && at <= answer.nextUpdate.getTime() - Math.min(left * (3 / 8), life * (3 / 8)) + 1);
      }),
    );
  });

  it('is asked for again after a second, then after twice as long each time, up to ten minutes, with jitter', () => {
    const delays = [1, 2, 3, 4, 11, 1000].map((failures) => retryDelayMs(failures, 0.5));
    assert.deepEqual(delays, [1000, 2000, 4000, 8000, 600_000, 600_000]);
    assert.deepEqual([retryDelayMs(1, 0), retryDelayMs(1, 1)], [750, 1250]);
  });
});
