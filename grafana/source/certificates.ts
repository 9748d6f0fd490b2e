/**
 * Owns: the dashboard about what changes by hand: certificates, configuration, ticket keys, versions.
 * Must not know: how panels are drawn.
 * Runs: in `npm run dashboards`.
 */
import { MappingType } from '@grafana/grafana-foundation-sdk/dashboard';
import type { Board } from './dashboard.ts';
import { bars, lines, number, table, units } from './panels.ts';
import { chosen, daysLeft, increase, sum } from './queries.ts';

const daysThresholds = [
  [1, 'orange'],
  [7, 'yellow'],
  [30, 'green'],
] as const;

export const certificates: Board = {
  uid: 'keygate-certificates',
  title: 'certificates and configuration',
  description: 'What changes by hand: certificates, configuration, ticket keys, versions.',
  variables: [],
  rows: [
    {
      title: 'Now',
      panels: [
        number({
          title: 'Days left',
          description: 'Of the certificate that expires first. Alerts fire at 30, 7 and 1.',
          expr: `min(${daysLeft})`,
          decimals: 0,
          base: 'red',
          thresholds: daysThresholds,
          graph: false,
          width: 4,
        }),
        number({
          title: 'Last reload',
          description:
            'Failed: what is served is not what is in the file. The log line reload_refused or reload_rolled_back says why.',
          expr: `min(${chosen('keygate_config_last_reload_successful')})`,
          mappings: [
            {
              type: MappingType.ValueToText,
              options: { 0: { text: 'failed', color: 'red', index: 0 }, 1: { text: 'well', color: 'green', index: 1 } },
            },
          ],
          base: 'red',
          thresholds: [[1, 'green']],
          graph: false,
          width: 4,
        }),
        number({
          title: 'Configuration served for',
          description: 'Since the last reload that was committed, or the start; of the instance where it was last.',
          expr: `min(time() - ${chosen('keygate_config_last_reload_timestamp_seconds')})`,
          unit: units.seconds,
          decimals: 0,
          base: 'blue',
          graph: false,
          width: 4,
        }),
        number({
          title: 'A reload took',
          description:
            'The last one, from reading the file to its outcome; the slowest of the instances. Keys are proved in the token meanwhile.',
          expr: `max(${chosen('keygate_reload_seconds')})`,
          unit: units.seconds,
          base: 'blue',
          graph: false,
          width: 4,
        }),
        number({
          title: 'Ticket key in use for',
          description:
            'The oldest. It is replaced after `tickets.rotation`; tickets of the key before are still accepted.',
          expr: `max(time() - ${chosen('keygate_ticket_epoch_start_timestamp_seconds')})`,
          unit: units.seconds,
          decimals: 0,
          thresholds: [[8 * 86_400, 'red']],
          graph: false,
          width: 4,
        }),
        number({
          title: 'Versions',
          description: 'How many versions of keygate run. More than one: a rollout is under way, or was forgotten.',
          expr: `count(count by (version) (${chosen('keygate_build_info')}))`,
          decimals: 0,
          thresholds: [[2, 'orange']],
          graph: false,
          width: 4,
        }),
      ],
    },
    {
      title: 'Certificates',
      panels: [
        bars({
          title: 'Days left, by certificate',
          description: 'The fewest of all instances. Renew it, put the chain in its place, reload.',
          query: { expr: `min by (certificate) (${daysLeft})`, legend: '{{certificate}}' },
          decimals: 0,
          base: 'red',
          thresholds: daysThresholds,
          width: 12,
        }),
        table({
          title: 'Certificates',
          description: 'When each expires, by instance. Two dates for one certificate: an instance was not reloaded.',
          queries: [{ expr: `${chosen('keygate_certificate_expiry_timestamp_seconds')} * 1000` }],
          columns: { certificate: 'certificate', instance: 'instance', Value: 'expires' },
          sortBy: 'expires',
          properties: { expires: [{ id: 'unit', value: units.time }] },
          height: 8,
        }),
      ],
    },
    {
      title: 'Configuration and tickets',
      panels: [
        lines({
          title: 'Reloads, by outcome',
          description:
            'In the time that is shown up to each moment. Refused or rolled back: the file is wrong, what was served goes on.',
          queries: [{ expr: sum(increase(chosen('keygate_reloads_total')), 'outcome'), legend: '{{outcome}}' }],
          colours: { committed: 'green', refused: 'orange', rolled_back: 'red' },
        }),
        lines({
          title: 'Ticket epoch',
          description:
            'Number of the ticket key, from the start of keygate. It steps up once every `tickets.rotation`.',
          queries: [{ expr: chosen('keygate_ticket_epoch'), legend: '{{instance}}' }],
        }),
        table({
          title: 'Versions',
          description: 'What runs where.',
          queries: [{ expr: chosen('keygate_build_info') }],
          columns: { instance: 'instance', version: 'version', node: 'Node.js' },
          sortBy: 'instance',
          width: 8,
          height: 8,
        }),
      ],
    },
  ],
};
