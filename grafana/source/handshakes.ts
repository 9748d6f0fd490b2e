/**
 * Owns: the dashboard about handshakes: how many, how fast, with what, and why they fail.
 * Must not know: how panels are drawn.
 * Runs: in `npm run dashboards`.
 */
import { closesOverTime, closesTable } from './closes.ts';
import type { Board } from './dashboard.ts';
import { buckets, lines, number, units } from './panels.ts';
import { chosen, failedHandshakes, handshakes, quantile, rate, ratesSeen, sum } from './queries.ts';

const listener = ['listener'] as const;
const full = sum(rate(handshakes(listener, false)));
const resumed = sum(rate(handshakes(listener, true)));
const failed = sum(rate(failedHandshakes));
const latency = (share: number, isResumed: boolean) =>
  quantile(share, 'keygate_handshake_seconds', listener, { labels: `resumed="${isResumed}"` });

export const handshakeBoard: Board = {
  uid: 'keygate-handshakes',
  title: 'handshakes',
  description:
    'How many, how fast, with what, and why they fail. Failures are counted for an instance, not for a listener.',
  variables: listener,
  rows: [
    {
      title: 'Now',
      panels: [
        number({
          title: 'Full',
          description: 'Finished handshakes with a signature of a token.',
          expr: full,
          unit: units.perSecond,
          decimals: 1,
          base: 'blue',
          width: 4,
        }),
        number({
          title: 'Resumed',
          description: 'Finished handshakes with a session ticket: no signature, and far cheaper.',
          expr: resumed,
          unit: units.perSecond,
          decimals: 1,
          width: 4,
        }),
        number({
          title: 'Failed',
          description: 'Without port scans, health checks and http:// on the TLS port. The rows below say why.',
          expr: failed,
          unit: units.perSecond,
          decimals: 2,
          thresholds: [
            [0.1, 'orange'],
            [1, 'red'],
          ],
          width: 4,
        }),
        number({
          title: 'Resumption',
          description:
            'Share of the finished handshakes that were resumed. It falls when tickets are lost: after a restart, or when clients change.',
          expr: `${resumed} / (${full} + ${resumed})`,
          unit: units.share,
          decimals: 0,
          base: 'blue',
          width: 4,
        }),
        number({
          title: 'In flight',
          description: 'Begun and not finished. Many: they wait for a token, or for clients that say nothing.',
          expr: sum(chosen('keygate_handshakes_in_flight', listener)),
          decimals: 0,
          base: 'blue',
          width: 4,
        }),
        number({
          title: 'Full, p99',
          description:
            'All but one in a hundred full handshakes are done within this time, from accept to Finished; the way to the client is in it twice.',
          expr: latency(0.99, false),
          unit: units.seconds,
          thresholds: [
            [0.5, 'orange'],
            [2, 'red'],
          ],
          width: 4,
        }),
      ],
    },
    {
      title: 'How many',
      panels: [
        lines({
          title: 'Handshakes',
          description: 'Finished and failed. Fewer resumed and more full ones mean more work for the token.',
          unit: units.perSecond,
          stacked: true,
          queries: [
            { expr: full, legend: 'full' },
            { expr: resumed, legend: 'resumed' },
            { expr: failed, legend: 'failed' },
          ],
          colours: { full: 'blue', resumed: 'green', failed: 'red' },
        }),
        lines({
          title: 'Finished, by listener',
          description: 'Full and resumed ones together.',
          unit: units.perSecond,
          queries: [
            {
              expr: sum(rate(chosen('keygate_handshake_seconds_count', listener)), 'listener'),
              legend: '{{listener}}',
            },
          ],
        }),
        lines({
          title: 'Shares',
          description: 'Resumed: of the finished ones. Failed: of all; above 5 % for ten minutes an alert fires.',
          unit: units.share,
          max: 1,
          queries: [
            { expr: `${resumed} / (${full} + ${resumed})`, legend: 'resumed' },
            { expr: `${failed} / (${full} + ${resumed} + ${failed})`, legend: 'failed' },
          ],
          colours: { resumed: 'green', failed: 'red' },
        }),
      ],
    },
    {
      title: 'How fast',
      panels: [
        lines({
          title: 'Full handshakes',
          description: 'From accept to Finished: two ways to the client and back, the wait for a lane, the signature.',
          unit: units.seconds,
          queries: [0.5, 0.9, 0.99].map((share) => ({ expr: latency(share, false), legend: `p${share * 100}` })),
          colours: { p50: 'green', p90: 'blue', p99: 'orange' },
        }),
        lines({
          title: 'Resumed handshakes',
          description:
            'The same without a signature. If these are slow too, it is the network, or the worker has no CPU.',
          unit: units.seconds,
          queries: [0.5, 0.9, 0.99].map((share) => ({ expr: latency(share, true), legend: `p${share * 100}` })),
          colours: { p50: 'green', p90: 'blue', p99: 'orange' },
        }),
        buckets({
          title: 'Full handshakes, all of them',
          description:
            'How many took how long. Two bands: two kinds of clients, or two tokens. Bounds are those of the buckets.',
          expr: sum(rate(chosen('keygate_handshake_seconds_bucket', listener, 'resumed="false"')), 'le'),
        }),
      ],
    },
    {
      title: 'With what',
      panels: [
        lines({
          title: 'TLS versions',
          description: 'Finished handshakes. Before you take a version out of a policy: who still uses it?',
          unit: units.perSecond,
          stacked: true,
          queries: [
            {
              expr: sum(rate(chosen('keygate_handshake_seconds_count', listener)), 'protocol'),
              legend: '{{protocol}}',
            },
          ],
        }),
        lines({
          title: 'Cipher suites',
          description: 'Finished handshakes, of all listeners.',
          unit: units.perSecond,
          stacked: true,
          queries: [
            {
              expr: ratesSeen(chosen('keygate_handshakes_by_cipher_total'), 'cipher'),
              legend: '{{cipher}}',
            },
          ],
        }),
        lines({
          title: 'Key exchange groups',
          description: 'Finished handshakes, of all listeners. X25519MLKEM768 is safe from quantum computers.',
          unit: units.perSecond,
          stacked: true,
          queries: [{ expr: ratesSeen(chosen('keygate_handshakes_by_group_total'), 'group'), legend: '{{group}}' }],
        }),
      ],
    },
    {
      title: 'Why they fail',
      panels: [
        closesTable({
          title: 'Handshakes that ended early',
          description: 'In the time that is shown, of all listeners.',
          labels: 'phase=~"accept|handshake|signing"',
        }),
        closesOverTime({
          title: 'Handshakes that ended early, over time',
          description: '`client/…` is the client, `token/…` the token, `proxy/…` a limit of keygate.',
          labels: 'phase=~"accept|handshake|signing"',
        }),
      ],
    },
    {
      title: 'Limits',
      panels: [
        lines({
          title: 'In flight, of what may be',
          description: 'Share of `limits.handshakes`. At 1 clients are turned away with proxy/accept/handshake_limit.',
          unit: units.share,
          queries: [
            {
              expr: `${sum(chosen('keygate_handshakes_in_flight', listener), 'listener')} / ${sum(chosen('keygate_listener_handshakes_limit', listener), 'listener')}`,
              legend: '{{listener}}',
            },
          ],
          thresholds: [[0.8, 'red']],
        }),
        lines({
          title: 'Accepted',
          description: 'Connections per second, by listener.',
          unit: units.perSecond,
          queries: [
            {
              expr: sum(rate(chosen('keygate_connections_accepted_total', listener)), 'listener'),
              legend: '{{listener}}',
            },
          ],
        }),
        lines({
          title: 'OCSP about clients',
          description:
            "What responders said of clients' certificates, per second; `unavailable`: no answer that holds. Nothing here: no listener asks.",
          unit: units.perSecond,
          queries: [
            {
              expr: sum(rate(chosen('keygate_client_certificate_statuses_total', listener)), 'listener', 'outcome'),
              legend: '{{listener}}: {{outcome}}',
            },
          ],
        }),
        lines({
          title: 'Turned away',
          description:
            'At a limit, or because accept(2) failed (no free descriptor). Anything but zero is lost clients: raise the limit, or LimitNOFILE.',
          unit: units.perSecond,
          queries: [
            {
              expr: sum(rate(chosen('keygate_connections_closed_total', [], 'side="proxy",phase="accept"')), 'reason'),
              legend: '{{reason}}',
            },
            {
              expr: sum(rate(chosen('keygate_accept_failures_total', listener)), 'listener'),
              legend: 'accept failed, {{listener}}',
            },
          ],
        }),
      ],
    },
  ],
};
