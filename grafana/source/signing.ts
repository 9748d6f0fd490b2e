/**
 * Owns: the dashboard about signing and tokens: how fast, how full, how well.
 * Must not know: how panels are drawn.
 * Runs: in `npm run dashboards`.
 */
import { closesOverTime, closesTable } from './closes.ts';
import type { Board } from './dashboard.ts';
import { buckets, lines, number, states, units, upOrDown } from './panels.ts';
import { chosen, increase, quantile, rate, ratesSeen, sum } from './queries.ts';

const token = ['token'] as const;
const own = (name: string, labels?: string) => chosen(name, token, labels);
const utilisation = (...by: string[]) =>
  `${sum(rate(own('keygate_sign_seconds_sum')), ...by)} / ${sum(own('keygate_lanes', 'state!="lost"'), ...by)}`;

export const signing: Board = {
  uid: 'keygate-signing',
  title: 'signing and tokens',
  description: 'How fast tokens sign, how full they are, and how well they are.',
  variables: token,
  rows: [
    {
      title: 'Now',
      panels: [
        number({
          title: 'Tokens',
          description:
            'Whether every worker can sign with every chosen token. The log has the CKR code of what went wrong.',
          expr: `min(${own('keygate_token_up')})`,
          mappings: [upOrDown],
          base: 'red',
          thresholds: [[1, 'green']],
          graph: false,
        }),
        number({
          title: 'Signatures',
          description: 'Made per second.',
          expr: sum(rate(own('keygate_signatures_total', 'outcome="ok"'))),
          unit: units.perSecond,
          decimals: 1,
          base: 'blue',
        }),
        number({
          title: 'Signature p99',
          description:
            'How long a lane is busy with one, repairs and verification included. Above 250 ms an alert fires.',
          expr: quantile(0.99, 'keygate_sign_seconds', token),
          unit: units.seconds,
          thresholds: [
            [0.1, 'orange'],
            [0.25, 'red'],
          ],
        }),
        number({
          title: 'Wait p99',
          description:
            'How long requests wait for a lane. Above 500 ms an alert fires; at `queue.age` handshakes are refused.',
          expr: quantile(0.99, 'keygate_sign_wait_seconds', token),
          unit: units.seconds,
          thresholds: [
            [0.1, 'orange'],
            [0.5, 'red'],
          ],
        }),
        number({
          title: 'Queue used',
          description: 'The fullest queue. At 100 % handshakes are refused with token/signing/queue_full.',
          expr: `max(${own('keygate_sign_queue_depth')} / ${own('keygate_sign_queue_limit')})`,
          unit: units.share,
          decimals: 0,
          thresholds: [
            [0.1, 'orange'],
            [0.5, 'red'],
          ],
        }),
        number({
          title: 'Lanes busy',
          description:
            'Share of the time that lanes are busy. Above 90 % the queue is next: more `lanes`, or another token.',
          expr: utilisation(),
          unit: units.share,
          decimals: 0,
          thresholds: [
            [0.7, 'orange'],
            [0.9, 'red'],
          ],
        }),
        number({
          title: 'Lanes lost',
          description:
            'Stuck in the PKCS#11 module, now. See to the HSM; if the module never returns, restart the worker.',
          expr: sum(own('keygate_lanes', 'state="lost"')),
          decimals: 0,
          thresholds: [[1, 'red']],
          graph: false,
        }),
        number({
          title: 'Wrong signatures',
          description:
            'In the time that is shown. None was sent. Take the token out of service: a fault in an RSA signature can reveal the key.',
          expr: sum(increase(own('keygate_signatures_total', 'outcome="wrong"'))),
          decimals: 0,
          thresholds: [[0.5, 'red']],
          graph: false,
        }),
      ],
    },
    {
      title: 'How fast',
      panels: [
        lines({
          title: 'Signatures, by token',
          description:
            'How long a lane is busy with one. It limits a worker to lanes / latency full handshakes per second.',
          unit: units.seconds,
          queries: [0.5, 0.99].map((share) => ({
            expr: quantile(share, 'keygate_sign_seconds', token, { by: ['token'] }),
            legend: `{{token}} p${share * 100}`,
          })),
          thresholds: [[0.25, 'red']],
        }),
        lines({
          title: 'Wait for a lane, by token',
          description: 'Waiting without slow signatures: too few lanes, or too many full handshakes.',
          unit: units.seconds,
          queries: [0.5, 0.99].map((share) => ({
            expr: quantile(share, 'keygate_sign_wait_seconds', token, { by: ['token'] }),
            legend: `{{token}} p${share * 100}`,
          })),
          thresholds: [[0.5, 'red']],
        }),
        buckets({
          title: 'Signatures, all of them',
          description: 'How many took how long. A second band is a second kind of key, or repairs.',
          expr: sum(rate(own('keygate_sign_seconds_bucket')), 'le'),
        }),
        lines({
          title: 'Signatures p99, by mechanism',
          description: 'An RSA signature takes many times as long as an EC one, on most tokens.',
          unit: units.seconds,
          queries: [
            {
              expr: `${quantile(0.99, 'keygate_sign_seconds', token, { by: ['mechanism'] })} and ${sum(increase(own('keygate_sign_seconds_count')), 'mechanism')} > 0`,
              legend: '{{mechanism}}',
            },
          ],
        }),
        lines({
          title: 'Signatures made, by mechanism',
          description: 'Per second. RSA ones cost a token most.',
          unit: units.perSecond,
          stacked: true,
          queries: [
            {
              expr: ratesSeen(own('keygate_signatures_total', 'outcome="ok"'), 'mechanism'),
              legend: '{{mechanism}}',
            },
          ],
        }),
        lines({
          title: 'Signatures that failed',
          description:
            '`failed`: the token refused, the log has the CKR code. `wrong`: it did not verify and was not sent; see to it at once.',
          unit: units.perSecond,
          queries: [
            {
              expr: sum(rate(own('keygate_signatures_total', 'outcome!="ok"')), 'token', 'outcome'),
              legend: '{{token}} {{outcome}}',
            },
          ],
          colours: { '.* failed': 'orange', '.* wrong': 'red' },
        }),
      ],
    },
    {
      title: 'How full',
      panels: [
        lines({
          title: 'Queue',
          description:
            'Requests that wait for a lane. EC and RSA have queues of their own, so that RSA cannot hold up EC.',
          queries: [{ expr: sum(own('keygate_sign_queue_depth'), 'token', 'class'), legend: '{{token}} {{class}}' }],
        }),
        lines({
          title: 'Queue, of what may be',
          description: 'Share of `queue.max`. Above a half for two minutes an alert fires.',
          unit: units.share,
          queries: [
            {
              expr: `${sum(own('keygate_sign_queue_depth'), 'token', 'class')} / ${sum(own('keygate_sign_queue_limit'), 'token', 'class')}`,
              legend: '{{token}} {{class}}',
            },
          ],
          thresholds: [[0.5, 'red']],
        }),
        lines({
          title: 'Refused and given up',
          description:
            'Requests per second without a signature: refused because of the queue or a token that is down, or cancelled because the client had gone.',
          unit: units.perSecond,
          queries: [
            { expr: sum(rate(own('keygate_sign_shed_total')), 'reason'), legend: '{{reason}}' },
            { expr: sum(rate(own('keygate_sign_cancelled_total'))), legend: 'cancelled' },
          ],
          colours: { queue_full: 'red', queue_aged: 'orange', token_down: 'purple', cancelled: 'blue' },
        }),
        lines({
          title: 'Lanes',
          description: 'By state, as a scrape finds them. A lost one is stuck in the module.',
          stacked: true,
          queries: [{ expr: sum(own('keygate_lanes'), 'state'), legend: '{{state}}' }],
          colours: { idle: 'green', busy: 'blue', lost: 'red' },
        }),
        lines({
          title: 'Lanes busy, by token',
          description: 'Share of the time, from how long signatures took: nothing between two scrapes is missed.',
          unit: units.share,
          queries: [
            {
              expr: utilisation('token'),
              legend: '{{token}}',
            },
          ],
          thresholds: [[0.9, 'red']],
        }),
        lines({
          title: 'PKCS#11 sessions',
          description:
            'One for each lane; a closed one is opened by the next request. The token limits how many there may be.',
          queries: [{ expr: sum(own('keygate_pkcs11_sessions'), 'token', 'state'), legend: '{{token}} {{state}}' }],
        }),
      ],
    },
    {
      title: 'How well',
      panels: [
        states({
          title: 'Up and down',
          description: 'Red: at least one worker cannot sign with the token.',
          queries: [{ expr: own('keygate_token_up'), legend: '{{token}} {{instance}}' }],
        }),
        lines({
          title: 'Repairs',
          description:
            'Sessions opened again, logins repeated, keys found again, modules initialised again. Handshakes pay for each: something between keygate and the token ends sessions.',
          unit: units.perSecond,
          queries: [{ expr: sum(rate(own('keygate_pkcs11_recoveries_total')), 'repair'), legend: '{{repair}}' }],
        }),
        lines({
          title: 'Incidents',
          description:
            'In the time that is shown up to each moment: how often a token went down for a worker, lanes that were lost in a module, requests that another token had to sign, and logins that did not wait for the lock.',
          queries: [
            {
              expr: sum(increase(own('keygate_lanes_written_off_total')), 'token'),
              legend: '{{token}} lanes lost',
            },
            {
              expr: sum(increase(own('keygate_sign_failovers_total')), 'token'),
              legend: '{{token}} failed over',
            },
            { expr: sum(increase(own('keygate_token_went_down_total')), 'token'), legend: '{{token}} went down' },
            {
              expr: sum(increase(own('keygate_login_lock_timeouts_total')), 'token'),
              legend: '{{token}} login lock held',
            },
          ],
        }),
      ],
    },
    {
      title: 'Handshakes that a token ended',
      panels: [
        closesTable({
          title: 'Handshakes without a signature',
          description: 'In the time that is shown, of all tokens.',
          labels: 'side="token"',
        }),
        closesOverTime({
          title: 'Handshakes without a signature, over time',
          description: 'Of all tokens.',
          labels: 'side="token"',
        }),
      ],
    },
  ],
};
