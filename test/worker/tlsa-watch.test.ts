/**
 * Owns: what counts as DNS' word about a server while zones change, break and come back, and the resolver goes.
 * Must not know: how certificates are compared with it.
 * Runs: node:test, with nsd and unbound as children.
 */
import assert from 'node:assert/strict';
import { after, before, describe, it } from 'node:test';
import type { TlsaAnswer } from '../../src/engine/native.d.ts';
import { TlsaWatch, tlsaTargets } from '../../src/worker/tlsa-watch.ts';
import { signedZones } from '../support/signed-zones.ts';
import type { SignedZones } from '../support/signed-zones.ts';
import { until } from '../support/until.ts';

const first = 'aa'.repeat(32);
const second = 'bb'.repeat(32);
const tlsa = (data: string) => [`_443._tcp.www IN TLSA 3 1 1 ${data}`];

describe('what DNS says about a server', { timeout: 110_000 }, () => {
  let zones: SignedZones;
  before(async () => {
    zones = await signedZones();
    for (const kind of ['secure', 'insecure', 'bogus'] as const) zones.publish(kind, tlsa(first));
  });
  after(async () => zones[Symbol.asyncDispose]());

  /** Of one server of a zone; what was told last. */
  async function watched(
    zone: string,
    { graceMs, former }: { readonly graceMs?: number; readonly former?: TlsaWatch } = {},
  ): Promise<Watched> {
    const lines: string[] = [];
    const write = (_: object, message: string) => void lines.push(message);
    const watch = new TlsaWatch(
      {
        resolver: zones.resolver,
        targets: [{ upstream: 'web', server: 0, name: `_443._tcp.www.${zone}.test` }],
        log: { info: write, warn: write },
        ...(graceMs === undefined ? {} : { graceMs }),
      },
      former,
    );
    await watch.ask();
    let told: TlsaAnswer | undefined;
    watch.begin((_, answer) => {
      told = answer;
    });
    return {
      watch,
      lines,
      told: () => summary(told),
      /** Waits for it. */
      tells: async (wanted: string) =>
        until(`word of ${wanted}`, () => summary(told) === wanted, { deadlineMs: 20_000, found: () => [told, lines] }),
      [Symbol.dispose]: () => watch.end(),
    };
  }

  it('follows a record that changes, that goes and that comes back', async () => {
    using www = await watched('secure');
    await www.tells(`secure ${first}`);
    zones.publish('secure', tlsa(second));
    await www.tells(`secure ${second}`);
    zones.publish('secure', []);
    await www.tells('secure');
    zones.publish('secure', tlsa(first));
    await www.tells(`secure ${first}`);
    assert.ok(www.lines.some((line) => line.includes('secure, 3 1 1 bbbbbbbb...')));
    assert.ok(www.lines.some((line) => line.includes('secure, no record')));
  });

  it('is never what an unsigned or a forged zone says', async () => {
    using insecure = await watched('insecure');
    using bogus = await watched('bogus');
    await insecure.tells('insecure');
    await bogus.tells('unavailable');
    assert.ok(bogus.lines.some((line) => line.endsWith('the last answer was bogus')));
  });

  it('stays for a while when the zone is forged, and then is nothing until the zone is whole again', async () => {
    using www = await watched('secure', { graceMs: 4000 });
    await www.tells(`secure ${first}`);
    zones.forge(true);
    await until('doubt', () => www.lines.some((line) => line.endsWith('the last answer was bogus')));
    assert.equal(www.told(), `secure ${first}`);
    await www.tells('unavailable');
    zones.forge(false);
    await www.tells(`secure ${first}`);
  });

  it('stays for a while when the resolver goes, over a reload too, and is asked for again when it is back', async () => {
    using www = await watched('secure', { graceMs: 8000 });
    await www.tells(`secure ${first}`);
    await zones.stopResolver();
    await until('doubt', () => www.lines.some((line) => line.includes('found no answer: ECONNREFUSED')));
    assert.equal(www.told(), `secure ${first}`);
    using afterReload = await watched('secure', { graceMs: 8000, former: www.watch });
    assert.equal(afterReload.told(), `secure ${first}`);
    using anew = await watched('secure');
    assert.equal(anew.told(), 'unavailable');
    await afterReload.tells('unavailable');
    await zones.startResolver();
    await afterReload.tells(`secure ${first}`);
    await anew.tells(`secure ${first}`);
  });

  it('is known for each server of each upstream that wants it', () => {
    const verification = { roots: [], crls: [], pins: [], pkix: 'enforce', tlsa: [], transparency: 'off' } as const;
    const upstream = (name: string, dane: 'off' | 'report' | 'enforce') => ({
      name,
      servers: ['127.0.0.1:443', '[::1]:8443'],
      balance: 'round-robin' as const,
      proxyClientCertificate: false,
      slowStartMs: 0,
      transparent: false,
      connectDeadlineMs: 1,
      connectAttemptsMax: 1,
      passiveFailuresMax: 1,
      passiveEjectionMs: 1,
      tls: {
        names: ['a.test', 'b.test'],
        verification: { ...verification, roots: [], crls: [], pins: [], tlsa: [], dane },
        sendName: true,
        alpn: [],
        policy: {
          versions: [],
          cipherSuites: [],
          groups: [],
          signatureSchemes: [],
          cipherOrder: 'client' as const,
          requireExtendedMasterSecret: false,
          fips: false,
        },
        resume: true,
        deadlineMs: 1,
      },
    });
    assert.deepEqual(tlsaTargets([upstream('off', 'off'), upstream('web', 'report')]), [
      { upstream: 'web', server: 0, name: '_443._tcp.a.test' },
      { upstream: 'web', server: 1, name: '_8443._tcp.b.test' },
    ]);
  });
});

interface Watched extends Disposable {
  readonly watch: TlsaWatch;
  readonly lines: readonly string[];
  told(): string;
  tells(wanted: string): Promise<unknown>;
}

function summary(answer: TlsaAnswer | undefined): string {
  return [answer?.state, ...(answer?.records ?? []).map(({ data }) => data.toString('hex'))].join(' ');
}
