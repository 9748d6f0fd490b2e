/**
 * Owns: what all dashboards have in common: variables, links between them, marks on every panel, the grid.
 * Must not know: any panel.
 * Runs: in `npm run dashboards`.
 */
import {
  AnnotationQueryBuilder,
  DashboardBuilder,
  DashboardCursorSync,
  DashboardLinkBuilder,
  DashboardLinkType,
  DatasourceVariableBuilder,
  QueryVariableBuilder,
  RowBuilder,
  TextBoxVariableBuilder,
  VariableRefresh,
  VariableSort,
} from '@grafana/grafana-foundation-sdk/dashboard';
import type { Dashboard } from '@grafana/grafana-foundation-sdk/dashboard';
import { datasource } from './panels.ts';
import type { Sized } from './panels.ts';
import { chosen } from './queries.ts';
import type { Variable } from './queries.ts';

export interface Board {
  /** Of the file and in the address. */
  readonly uid: string;
  readonly title: string;
  readonly description: string;
  readonly variables: readonly Variable[];
  /** Rows of a dashboard: what is asked first stands first. */
  readonly rows: readonly { readonly title: string; readonly panels: readonly Sized[] }[];
}

/** A copy of README that browsers can open: set it as the value of the variable "README" on the dashboards. */
const readmeUrl = 'https://example.org/keygate/README.md';

/** From a panel to a dashboard, with the same time and the same choices. */
export const boardUrl = (uid: string): string => `/d/${uid}?\${__url_time_range}&\${__all_variables}`;

export function dashboardOf({ uid, title, description, variables, rows }: Board): Dashboard {
  const board = new DashboardBuilder(`keygate: ${title}`)
    .uid(uid)
    .description(description)
    .tags([tag])
    .editable()
    .tooltip(DashboardCursorSync.Crosshair)
    .refresh('30s')
    .time({ from: 'now-1h', to: 'now' })
    .variables([
      new DatasourceVariableBuilder('datasource').label('Prometheus').type('prometheus'),
      choice('job', 'keygate_build_info'),
      choice('instance', 'keygate_build_info{job=~"$job"}'),
      ...variables.map((variable) => choice(variable, chosen(metricWith[variable]))),
      new TextBoxVariableBuilder('readme')
        .label('README')
        .description('Where the links of close reasons lead: the address of your copy of README.md.')
        .defaultValue(readmeUrl)
        .current({ selected: true, text: readmeUrl, value: readmeUrl }),
    ])
    .annotations([
      mark(
        'reload',
        'blue',
        chosen('keygate_config_last_reload_timestamp_seconds'),
        'configuration of {{instance}} committed',
      ),
      mark(
        'worker started',
        'orange',
        chosen('keygate_worker_start_time_seconds'),
        'worker {{worker}} of {{instance}} started',
      ),
    ])
    .links([
      new DashboardLinkBuilder('keygate')
        .type(DashboardLinkType.Dashboards)
        .tags([tag])
        .includeVars(true)
        .keepTime(true),
    ]);
  let [id, y] = [1, 0];
  for (const row of rows) {
    board.withRow(new RowBuilder(row.title).id(id++).gridPos({ x: 0, y, w: gridWidth, h: 1 }));
    y += 1;
    let [x, rowHeight] = [0, 0];
    for (const { panel, width, height } of row.panels) {
      if (x + width > gridWidth) {
        [x, y, rowHeight] = [0, y + rowHeight, 0];
      }
      board.withPanel(panel.id(id++).gridPos({ x, y, w: width, h: height }));
      [x, rowHeight] = [x + width, Math.max(rowHeight, height)];
    }
    y += rowHeight;
  }
  return board.build();
}

const tag = 'keygate';
const gridWidth = 24;

const metricWith: Readonly<Record<Variable, string>> = {
  listener: 'keygate_connections_open',
  token: 'keygate_token_up',
  upstream: 'keygate_upstream_server_up',
};

/** One, several or all of the values that a label has. */
function choice(label: string, series: string): QueryVariableBuilder {
  const query = `label_values(${series}, ${label})`;
  return new QueryVariableBuilder(label)
    .label(label)
    .datasource(datasource)
    .query({ query, refId: `variable-${label}` })
    .definition(query)
    .refresh(VariableRefresh.OnTimeRangeChanged)
    .sort(VariableSort.NaturalAsc)
    .multi(true)
    .includeAll(true)
    .allValue('.*')
    .current({ selected: true, text: ['All'], value: ['$__all'] });
}

/** On every panel, at the time that is the value of the series. */
function mark(name: string, colour: string, series: string, text: string): AnnotationQueryBuilder {
  return new AnnotationQueryBuilder()
    .name(name)
    .datasource(datasource)
    .enable(true)
    .iconColor(colour)
    .expr(`${series} * 1000`)
    .useValueForTime(true)
    .step('60s')
    .titleFormat(name)
    .textFormat(text);
}
