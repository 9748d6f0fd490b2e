/**
 * Owns: the panels about why connections end: a table with the meaning of each reason, and the reasons over time. Both lead to
 * the row of README about a reason.
 * Must not know: which dashboards show them.
 * Runs: in `npm run dashboards`, with the engine's own list of reasons.
 */
import { MappingType } from '@grafana/grafana-foundation-sdk/dashboard';
import { engine } from '../../src/engine/binding.ts';
import { lines, table, units } from './panels.ts';
import type { Sized } from './panels.ts';
import { closeRates, closesByReason } from './queries.ts';

interface Closes {
  readonly title: string;
  readonly description: string;
  /** Of `keygate_connections_closed_total`. */
  readonly labels: string;
}

export function closesTable({ title, description, labels }: Closes): Sized {
  const meanings = engine()
    .closeReasons()
    .map(
      ({ side, phase, reason, meaning }, index) => [`${side}/${phase}/${reason}`, { text: meaning, index }] as const,
    );
  const link = {
    title: 'What README says of ${__value.text}',
    url: '${readme}#${__data.fields.anchor}',
    targetBlank: true,
  };
  return table({
    title,
    description: `${description} A click on a reason leads to its row in README (variable "README").`,
    queries: [{ expr: closesByReason(labels) }],
    columns: { close_reason: 'close reason', Value: 'connections', meaning: 'meaning', anchor: 'anchor' },
    sortBy: 'connections',
    descending: true,
    properties: {
      'close reason': [
        { id: 'links', value: [link] },
        { id: 'custom.width', value: 260 },
      ],
      connections: [
        { id: 'custom.width', value: 100 },
        { id: 'decimals', value: 0 },
      ],
      meaning: [{ id: 'mappings', value: [{ type: MappingType.ValueToText, options: Object.fromEntries(meanings) }] }],
      // Only for the link.
      anchor: [{ id: 'custom.hidden', value: true }],
    },
  });
}

export function closesOverTime({ title, description, labels }: Closes): Sized {
  return lines({
    title,
    description: `${description} A click on a line leads to the row of its reason in README.`,
    unit: units.perSecond,
    width: 12,
    height: 9,
    stacked: true,
    queries: [{ expr: closeRates(labels), legend: '{{side}}/{{phase}}/{{reason}}' }],
    links: [
      {
        title: 'README: ${__field.labels.side}/${__field.labels.phase}/${__field.labels.reason}',
        url: '${readme}#${__field.labels.side}-${__field.labels.phase}-${__field.labels.reason}',
      },
    ],
  });
}
