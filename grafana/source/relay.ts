/**
 * Owns: the dashboard about connections, what is relayed, and the upstreams.
 * Must not know: how panels are drawn.
 * Runs: in `npm run dashboards`.
 */
import { closesOverTime, closesTable } from './closes.ts';
import type { Board } from './dashboard.ts';
import { buckets, lines, number, states, units } from './panels.ts';
import { chosen, quantile, rate, ratesSeen, sum } from './queries.ts';

const both = ['listener', 'upstream'] as const;
const ofListener = (name: string, labels?: string) => chosen(name, ['listener'], labels);
const ofUpstream = (name: string, labels?: string) => chosen(name, ['upstream'], labels);
const failing = (...by: string[]) =>
  `${sum(rate(ofUpstream('keygate_upstream_connects_total', 'outcome!~"ok|cancelled"')), ...by)} / ${sum(rate(ofUpstream('keygate_upstream_connects_total', 'outcome!="cancelled"')), ...by)}`;

export const relay: Board = {
  uid: 'keygate-relay',
  title: 'relay and upstreams',
  description: 'Connections, what they carry, how upstreams take them, and why they end.',
  variables: both,
  rows: [
    {
      title: 'Now',
      panels: [
        number({
          title: 'Open connections',
          description: 'Of the chosen listeners.',
          expr: sum(ofListener('keygate_connections_open')),
          decimals: 0,
          base: 'blue',
          width: 4,
        }),
        number({
          title: 'Accepted',
          description: 'Connections per second.',
          expr: sum(rate(ofListener('keygate_connections_accepted_total'))),
          unit: units.perSecond,
          decimals: 1,
          base: 'blue',
          width: 4,
        }),
        number({
          title: 'To clients',
          description: 'Plaintext per second.',
          expr: sum(rate(ofListener('keygate_relay_bytes_total', 'direction="to_client"'))),
          unit: units.bytesPerSecond,
          base: 'blue',
          width: 4,
        }),
        number({
          title: 'To upstreams',
          description: 'Plaintext per second.',
          expr: sum(rate(ofListener('keygate_relay_bytes_total', 'direction="to_upstream"'))),
          unit: units.bytesPerSecond,
          base: 'blue',
          width: 4,
        }),
        number({
          title: 'Connects that fail',
          description:
            'Share of the attempts. Another server is tried, up to `attempts`; the panels below say which one fails how.',
          expr: failing(),
          unit: units.share,
          decimals: 1,
          thresholds: [
            [0.01, 'orange'],
            [0.05, 'red'],
          ],
          width: 4,
        }),
        number({
          title: 'Servers down',
          description:
            'Servers that at least one worker does not use at present, because of failed checks or connects.',
          expr: `count(${ofUpstream('keygate_upstream_server_up')} == 0) or vector(0)`,
          decimals: 0,
          thresholds: [[1, 'red']],
          graph: false,
          width: 4,
        }),
      ],
    },
    {
      title: 'Connections',
      panels: [
        lines({
          title: 'Open connections, by listener',
          description:
            'A number that only grows: connections that nobody ends (`deadlines.idle`, `deadlines.lifetime`).',
          queries: [{ expr: sum(ofListener('keygate_connections_open'), 'listener'), legend: '{{listener}}' }],
        }),
        lines({
          title: 'Open connections, of what may be',
          description:
            'Share of `limits.connections`. At 1 clients are turned away with proxy/accept/connection_limit.',
          unit: units.share,
          queries: [
            {
              expr: `${sum(ofListener('keygate_connections_open'), 'listener')} / ${sum(ofListener('keygate_listener_connections_limit'), 'listener')}`,
              legend: '{{listener}}',
            },
          ],
          thresholds: [[0.8, 'red']],
        }),
        lines({
          title: 'Relayed, by listener',
          description: 'Plaintext: to clients above the line, to upstreams below it.',
          unit: units.bytesPerSecond,
          queries: [
            {
              expr: sum(rate(ofListener('keygate_relay_bytes_total')), 'listener', 'direction'),
              legend: '{{listener}} {{direction}}',
            },
          ],
          below: '.*to_upstream',
        }),
      ],
    },
    {
      title: 'Upstreams',
      panels: [
        lines({
          title: 'Connects, by outcome',
          description:
            '`refused`: nobody listens; `deadline`: a full accept queue or a firewall; `unreachable`: the network; `cancelled`: the client had gone.',
          unit: units.perSecond,
          stacked: true,
          queries: [
            {
              expr: ratesSeen(ofUpstream('keygate_upstream_connects_total'), 'outcome'),
              legend: '{{outcome}}',
            },
          ],
          colours: { ok: 'green', refused: 'red', deadline: 'orange', unreachable: 'purple' },
        }),
        lines({
          title: 'Connects that fail, by server',
          description: 'Per second. A server that fails in a row is left out for `passive.ejection`.',
          unit: units.perSecond,
          queries: [
            {
              expr: sum(
                rate(ofUpstream('keygate_upstream_connects_total', 'outcome!~"ok|cancelled"')),
                'upstream',
                'server',
              ),
              legend: '{{upstream}} {{server}}',
            },
          ],
        }),
        states({
          title: 'Servers up and down',
          description: 'Red: at least one worker does not use the server.',
          queries: [
            {
              expr: `min by (upstream, server) (${ofUpstream('keygate_upstream_server_up')})`,
              legend: '{{upstream}} {{server}}',
            },
          ],
        }),
        lines({
          title: 'Time to connect, by upstream',
          description: 'A lost SYN is repeated after 1 s: a p99 at a second is a full accept queue or lost packets.',
          unit: units.seconds,
          queries: [0.5, 0.99].map((share) => ({
            expr: quantile(share, 'keygate_upstream_connect_seconds', ['upstream'], { by: ['upstream'] }),
            legend: `{{upstream}} p${share * 100}`,
          })),
          thresholds: [[1, 'red']],
        }),
        lines({
          title: 'What is wrong with certificates of servers',
          description:
            'Per second. `refused`: the connection ended for it; `reported`: it was only counted. The reasons are those of `upstream/handshake`. Nothing here: no TLS to servers, or nothing wrong.',
          unit: units.perSecond,
          queries: [
            {
              expr: sum(
                rate(ofUpstream('keygate_upstream_certificate_findings_total')),
                'upstream',
                'reason',
                'outcome',
              ),
              legend: '{{upstream}} {{reason}}, {{outcome}}',
            },
          ],
        }),
        lines({
          title: 'Connections to upstreams, by server',
          description: 'One server far from the others: it is slow to end them, or it was down and is filled again.',
          queries: [
            {
              expr: sum(ofUpstream('keygate_upstream_connections_open'), 'upstream', 'server'),
              legend: '{{upstream}} {{server}}',
            },
          ],
        }),
        buckets({
          title: 'Time to connect, all of them',
          description: 'How many took how long.',
          expr: sum(rate(ofUpstream('keygate_upstream_connect_seconds_bucket')), 'le'),
        }),
      ],
    },
    {
      title: 'Why connections end',
      panels: [
        closesTable({
          title: 'Ends after the handshake',
          description: 'In the time that is shown, of all listeners. `…/closed` is normal.',
          labels: 'phase=~"connect|relay|drain|internal"',
        }),
        closesOverTime({
          title: 'Ends after the handshake, over time',
          description: 'Of all listeners. `…/closed` is normal.',
          labels: 'phase=~"connect|relay|drain|internal"',
        }),
      ],
    },
  ],
};
