/**
 * Owns: the dashboard that is looked at first: is it well, and if not, which dashboard is next?
 * Must not know: how panels are drawn.
 * Runs: in `npm run dashboards`.
 */
import { closesOverTime, closesTable } from './closes.ts';
import { boardUrl } from './dashboard.ts';
import type { Board } from './dashboard.ts';
import { lines, number, readyOrNot, states, table, units, upOrDown } from './panels.ts';
import { chosen, daysLeft, failedHandshakes, handshakes, quantile, rate, ratesSeen, sum } from './queries.ts';

const to = (uid: string, title: string) => [{ title, url: boardUrl(uid) }];
const toHandshakes = to('keygate-handshakes', 'Handshakes');
const toSigning = to('keygate-signing', 'Signing and tokens');
const toRelay = to('keygate-relay', 'Relay and upstreams');
const toCertificates = to('keygate-certificates', 'Certificates and configuration');
const toProcesses = to('keygate-processes', 'Processes and logs');

export const overview: Board = {
  uid: 'keygate-overview',
  title: 'overview',
  description: 'Is keygate well? The first row says so; a click on any number leads to the dashboard that says why.',
  variables: [],
  rows: [
    {
      title: 'Now',
      panels: [
        number({
          title: 'Ready',
          description:
            'Whether every chosen instance answers 200 to /ready. If not: /ready says why. Balancers take it out by themselves.',
          expr: `min(${chosen('keygate_ready')})`,
          mappings: [readyOrNot],
          base: 'red',
          thresholds: [[1, 'green']],
          graph: false,
          links: toProcesses,
        }),
        number({
          title: 'Full handshakes',
          description:
            'Handshakes that needed a signature, finished per second. Capacity is lanes / latency of the token, for each worker.',
          expr: sum(rate(handshakes([], false))),
          unit: units.perSecond,
          decimals: 1,
          base: 'blue',
          links: toHandshakes,
        }),
        number({
          title: 'Failures',
          description:
            'Handshakes per second that failed, without port scans, health checks and http:// on the TLS port. The table below says why.',
          expr: sum(rate(failedHandshakes)),
          unit: units.perSecond,
          decimals: 2,
          thresholds: [
            [0.1, 'orange'],
            [1, 'red'],
          ],
          links: toHandshakes,
        }),
        number({
          title: 'Signature p99',
          description:
            'All but one in a hundred signatures are made within this time. It is part of each full handshake; above 250 ms an alert fires.',
          expr: quantile(0.99, 'keygate_sign_seconds', []),
          unit: units.seconds,
          thresholds: [
            [0.1, 'orange'],
            [0.25, 'red'],
          ],
          links: toSigning,
        }),
        number({
          title: 'Sign queue',
          description:
            'Requests that wait for a lane, all tokens. Some are normal in bursts; a queue that stands means that the token is too slow for what comes.',
          expr: sum(chosen('keygate_sign_queue_depth')),
          decimals: 0,
          thresholds: [
            [32, 'orange'],
            [512, 'red'],
          ],
          links: toSigning,
        }),
        number({
          title: 'Tokens',
          description:
            'Whether every worker can sign with every token. Down: resumed handshakes and established connections go on, full ones fail unless another token has the key.',
          expr: `min(${chosen('keygate_token_up')})`,
          mappings: [upOrDown],
          base: 'red',
          thresholds: [[1, 'green']],
          graph: false,
          links: toSigning,
        }),
        number({
          title: 'Days to expiry',
          description:
            'Days left for the certificate that expires first. Renew it, put the chain in its place, reload.',
          expr: `min(${daysLeft})`,
          decimals: 0,
          base: 'red',
          thresholds: [
            [7, 'orange'],
            [30, 'green'],
          ],
          graph: false,
          links: toCertificates,
        }),
        number({
          title: 'Alerts',
          description:
            'Alerts of keygate that fire. The table at the end of this page names them; README says what to do for each.',
          expr: `count(${chosen('ALERTS', [], 'alertname=~"Keygate.*",alertstate="firing",severity!="info"')}) or vector(0)`,
          decimals: 0,
          thresholds: [[1, 'red']],
          graph: false,
        }),
      ],
    },
    {
      title: 'Clients',
      panels: [
        lines({
          title: 'Handshakes',
          description:
            'Finished and failed handshakes. Fewer resumed ones and more full ones mean more work for the token; failed ones are explained below.',
          unit: units.perSecond,
          stacked: true,
          queries: [
            { expr: sum(rate(handshakes([], false))), legend: 'full' },
            { expr: sum(rate(handshakes([], true))), legend: 'resumed' },
            { expr: sum(rate(failedHandshakes)), legend: 'failed' },
          ],
          colours: { full: 'blue', resumed: 'green', failed: 'red' },
          links: toHandshakes,
        }),
        lines({
          title: 'Open connections',
          description:
            'By listener. A limit is `limits.connections` for each worker; whoever comes beyond it is turned away.',
          queries: [{ expr: sum(chosen('keygate_connections_open'), 'listener'), legend: '{{listener}}' }],
          links: toRelay,
        }),
        lines({
          title: 'Relayed',
          description: 'Plaintext, to clients above the line and to upstreams below it.',
          unit: units.bytesPerSecond,
          queries: [{ expr: sum(rate(chosen('keygate_relay_bytes_total')), 'direction'), legend: '{{direction}}' }],
          colours: { to_client: 'blue', to_upstream: 'purple' },
          below: 'to_upstream',
          links: toRelay,
        }),
      ],
    },
    {
      title: 'Tokens and upstreams',
      panels: [
        lines({
          title: 'Signatures',
          description:
            'How long a signature takes once a lane has it (p50, p99), and how long it waits for a lane before (p99). Waiting without slow signing: too few lanes or too many full handshakes.',
          unit: units.seconds,
          queries: [
            { expr: quantile(0.5, 'keygate_sign_seconds', []), legend: 'sign p50' },
            { expr: quantile(0.99, 'keygate_sign_seconds', []), legend: 'sign p99' },
            { expr: quantile(0.99, 'keygate_sign_wait_seconds', []), legend: 'wait p99' },
          ],
          colours: { 'sign p50': 'green', 'sign p99': 'blue', 'wait p99': 'orange' },
          links: toSigning,
        }),
        lines({
          title: 'Connects to upstreams',
          description:
            'Attempts by outcome. `refused`: nobody listens; `deadline`: a full accept queue or a firewall; `cancelled`: the client had gone.',
          unit: units.perSecond,
          stacked: true,
          queries: [{ expr: ratesSeen(chosen('keygate_upstream_connects_total'), 'outcome'), legend: '{{outcome}}' }],
          colours: { ok: 'green', refused: 'red', deadline: 'orange' },
          links: toRelay,
        }),
        states({
          title: 'Up and down',
          description: 'Tokens, servers of upstreams and workers; red is down for at least one worker.',
          queries: [
            { expr: `min by (token) (${chosen('keygate_token_up')})`, legend: 'token {{token}}' },
            {
              expr: `min by (upstream, server) (${chosen('keygate_upstream_server_up')})`,
              legend: '{{upstream}} {{server}}',
            },
            { expr: chosen('keygate_worker_up'), legend: 'worker {{worker}} {{instance}}' },
          ],
        }),
      ],
    },
    {
      title: 'Why connections end',
      panels: [
        closesTable({
          title: 'Close reasons, all but the normal ones',
          description: 'How often connections ended for which reason, in the time that is shown.',
          labels: 'reason!="closed"',
        }),
        closesOverTime({
          title: 'Close reasons over time',
          description:
            'All but normal ends: a step that begins with a reload or a token that went down has its cause there.',
          labels: 'reason!="closed"',
        }),
      ],
    },
    {
      title: 'Alerts',
      panels: [
        table({
          title: 'Alerts that fire or are pending',
          description:
            'From the rules in grafana/prometheus/rules. README has a row for each: what is wrong and what to do.',
          queries: [{ expr: chosen('ALERTS', [], 'alertname=~"Keygate.*"') }],
          columns: {
            alertname: 'alert',
            severity: 'severity',
            alertstate: 'state',
            instance: 'instance',
            token: 'token',
            upstream: 'upstream',
            certificate: 'certificate',
            worker: 'worker',
          },
          sortBy: 'severity',
          properties: { alert: [{ id: 'custom.width', value: 300 }] },
          width: 24,
          height: 8,
        }),
      ],
    },
  ],
};
