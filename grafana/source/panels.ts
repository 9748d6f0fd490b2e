/**
 * Owns: how panels look: one function for each kind of panel, and the sizes, colours and units that they share.
 * Must not know: what is shown, or where on a dashboard.
 * Runs: in `npm run dashboards`.
 */
import {
  BigValueColorMode,
  BigValueGraphMode,
  BigValueTextMode,
  GraphGradientMode,
  GraphThresholdsStyleConfigBuilder,
  GraphThresholdsStyleMode,
  LegendDisplayMode,
  LegendPlacement,
  ReduceDataOptionsBuilder,
  SortOrder,
  StackingConfigBuilder,
  StackingMode,
  TableSortByFieldStateBuilder,
  TooltipDisplayMode,
  VisibilityMode,
  VizLegendOptionsBuilder,
  VizOrientation,
  VizTooltipOptionsBuilder,
} from '@grafana/grafana-foundation-sdk/common';
import type { DataSourceRef } from '@grafana/grafana-foundation-sdk/common';
import {
  DashboardLinkBuilder,
  FieldColorBuilder,
  FieldColorModeId,
  MappingType,
  ThresholdsConfigBuilder,
  ThresholdsMode,
} from '@grafana/grafana-foundation-sdk/dashboard';
import type { DynamicConfigValue, GridPos, Panel, ValueMapping } from '@grafana/grafana-foundation-sdk/dashboard';
import { PanelBuilder as BarGauge } from '@grafana/grafana-foundation-sdk/bargauge';
import {
  HeatmapColorMode,
  HeatmapColorOptionsBuilder,
  HeatmapColorScale,
  PanelBuilder as Heatmap,
  YAxisConfigBuilder,
} from '@grafana/grafana-foundation-sdk/heatmap';
import { DataqueryBuilder, PromQueryFormat } from '@grafana/grafana-foundation-sdk/prometheus';
import { PanelBuilder as Stat } from '@grafana/grafana-foundation-sdk/stat';
import { PanelBuilder as StateTimeline } from '@grafana/grafana-foundation-sdk/statetimeline';
import { PanelBuilder as Table } from '@grafana/grafana-foundation-sdk/table';
import { PanelBuilder as TimeSeries } from '@grafana/grafana-foundation-sdk/timeseries';

/** Of a grid that is 24 wide. */
export interface Sized {
  readonly width: number;
  readonly height: number;
  readonly panel: Placeable;
}

/** What all the SDK's builders of panels have in common. */
interface Placeable {
  id(id: number): this;
  gridPos(gridPos: GridPos): this;
  build(): Panel;
}

/** What every panel has. */
interface Common {
  readonly title: string;
  /** What it means, and what to do. */
  readonly description: string;
  readonly unit?: string;
  readonly width?: number;
  readonly height?: number;
  /** `[from, colour]`, ascending; below the first it is `base`. */
  readonly thresholds?: readonly Threshold[];
  readonly base?: Colour;
  readonly links?: readonly Link[];
}

export type Colour = 'green' | 'yellow' | 'orange' | 'red' | 'blue' | 'purple' | 'text';
type Threshold = readonly [from: number, colour: Colour];

export interface Link {
  readonly title: string;
  readonly url: string;
}

export interface Query {
  readonly expr: string;
  /** `{{label}}` is the value of a label. */
  readonly legend: string;
}

/** Units by Grafana's ids. */
export const units = {
  perSecond: 'suffix:/s',
  seconds: 's',
  bytes: 'bytes',
  bytesPerSecond: 'Bps',
  share: 'percentunit',
  count: 'short',
  cores: 'suffix: cores',
  time: 'dateTimeAsIso',
} as const;

export const datasource: DataSourceRef = { type: 'prometheus', uid: '${datasource}' };

interface Lines extends Common {
  readonly queries: readonly Query[];
  readonly stacked?: boolean;
  readonly max?: number;
  /** Legends by regular expression, and their colour: the same thing has the same colour on every panel. */
  readonly colours?: Readonly<Record<string, Colour>>;
  /** Legends by regular expression that are drawn below zero. */
  readonly below?: string;
}

/** Values over time. */
export function lines({ queries, stacked = false, max, colours = {}, below, ...common }: Lines): Sized {
  const panel = new TimeSeries()
    .legend(
      new VizLegendOptionsBuilder()
        .displayMode(LegendDisplayMode.Table)
        .placement(LegendPlacement.Bottom)
        .showLegend(true)
        .calcs(['lastNotNull', 'max']),
    )
    .tooltip(new VizTooltipOptionsBuilder().mode(TooltipDisplayMode.Multi).sort(SortOrder.Descending))
    .lineWidth(1)
    .fillOpacity(stacked ? 40 : 10)
    .gradientMode(stacked ? GraphGradientMode.None : GraphGradientMode.Opacity)
    .showPoints(VisibilityMode.Never)
    .axisSoftMin(0)
    .colorScheme(new FieldColorBuilder().mode(FieldColorModeId.PaletteClassicByName));
  if (stacked) panel.stacking(new StackingConfigBuilder().mode(StackingMode.Normal).group('A'));
  if (max !== undefined) panel.max(max);
  if (common.thresholds !== undefined)
    panel.thresholdsStyle(new GraphThresholdsStyleConfigBuilder().mode(GraphThresholdsStyleMode.Dashed));
  for (const [legend, colour] of Object.entries(colours))
    panel.overrideByRegexp(legend, [{ id: 'color', value: { mode: 'fixed', fixedColor: colour } }]);
  if (below !== undefined) panel.overrideByRegexp(below, [{ id: 'custom.transform', value: 'negative-Y' }]);
  withQueries(panel, queries);
  return sized(panel, common, { width: 8, height: 8 });
}

interface Number extends Common {
  readonly expr: string;
  readonly mappings?: readonly ValueMapping[];
  readonly graph?: boolean;
  readonly decimals?: number;
}

/** One number, now, with its recent course behind it. */
export function number({ expr, mappings = [], graph = true, decimals, ...common }: Number): Sized {
  const panel = new Stat()
    .reduceOptions(new ReduceDataOptionsBuilder().calcs(['lastNotNull']).values(false))
    .graphMode(graph ? BigValueGraphMode.Area : BigValueGraphMode.None)
    .colorMode(BigValueColorMode.Value)
    .textMode(BigValueTextMode.Value)
    .colorScheme(new FieldColorBuilder().mode(FieldColorModeId.Thresholds))
    .mappings([...mappings])
    .noValue('–');
  if (decimals !== undefined) panel.decimals(decimals);
  withQueries(panel, [{ expr, legend: '' }]);
  return sized(panel, common, { width: 3, height: 4 });
}

interface Bars extends Common {
  readonly query: Query;
  readonly decimals?: number;
}

/** The last value of each series, one below the other. */
export function bars({ query, decimals, ...common }: Bars): Sized {
  const panel = new BarGauge()
    .reduceOptions(new ReduceDataOptionsBuilder().calcs(['lastNotNull']).values(false))
    .orientation(VizOrientation.Horizontal)
    .colorScheme(new FieldColorBuilder().mode(FieldColorModeId.Thresholds));
  if (decimals !== undefined) panel.decimals(decimals);
  panel.datasource(datasource).withTarget(target(query, 0).instant());
  return sized(panel, common, { width: 8, height: 8 });
}

interface Buckets extends Common {
  readonly expr: string;
}

/** A histogram over time: how many are how slow. The bounds are those of the engine's buckets (src/engine/src/stats.rs). */
export function buckets({ expr, ...common }: Buckets): Sized {
  const panel = new Heatmap()
    .calculate(false)
    .color(
      new HeatmapColorOptionsBuilder()
        .mode(HeatmapColorMode.Scheme)
        .scheme('Blues')
        .scale(HeatmapColorScale.Exponential)
        .exponent(0.5)
        .steps(64),
    )
    .yAxis(new YAxisConfigBuilder().unit(units.seconds))
    .cellGap(1);
  panel.datasource(datasource).withTarget(target({ expr, legend: '{{le}}' }, 0).format(PromQueryFormat.Heatmap));
  return sized(panel, { ...common, unit: units.perSecond }, { width: 8, height: 8 });
}

interface States extends Common {
  readonly queries: readonly Query[];
}

/** What is up and what is down, over time. */
export function states({ queries, ...common }: States): Sized {
  const panel = new StateTimeline()
    .mergeValues(true)
    .showValue(VisibilityMode.Never)
    .rowHeight(0.8)
    .lineWidth(0)
    .fillOpacity(80)
    .legend(new VizLegendOptionsBuilder().showLegend(false))
    .mappings([upOrDown])
    .colorScheme(new FieldColorBuilder().mode(FieldColorModeId.Thresholds));
  withQueries(panel, queries);
  return sized(panel, { ...common, base: 'red', thresholds: [[1, 'green']] }, { width: 8, height: 8 });
}

interface Columns extends Common {
  readonly queries: readonly { readonly expr: string }[];
  /** Names that Prometheus gives, in the order in which they are shown under names of ours. Others are left out. */
  readonly columns: Readonly<Record<string, string>>;
  readonly sortBy: string;
  readonly descending?: boolean;
  /** Properties of columns by the names that are shown. */
  readonly properties?: Readonly<Record<string, readonly DynamicConfigValue[]>>;
}

/** One row for each series, as they are now or over the range of the dashboard. */
export function table({ queries, columns, sortBy, descending = false, properties = {}, ...common }: Columns): Sized {
  const names = Object.keys(columns);
  const panel = new Table()
    .datasource(datasource)
    .filterable(false)
    .withTransformation({ id: 'merge', options: {} })
    .withTransformation({ id: 'filterFieldsByName', options: { include: { names } } })
    .withTransformation({
      id: 'organize',
      options: {
        indexByName: Object.fromEntries(names.map((name, index) => [name, index])),
        renameByName: columns,
      },
    });
  for (const [index, { expr }] of queries.entries())
    panel.withTarget(target({ expr, legend: '' }, index).format(PromQueryFormat.Table).instant());
  for (const [column, values] of Object.entries(properties)) panel.overrideByName(column, [...values]);
  panel.sortBy([new TableSortByFieldStateBuilder().displayName(sortBy).desc(descending)]);
  return sized(panel, common, { width: 12, height: 9 });
}

export const readyOrNot: ValueMapping = {
  type: MappingType.ValueToText,
  options: {
    0: { text: 'not ready', color: 'red', index: 0 },
    1: { text: 'ready', color: 'green', index: 1 },
  },
};

export const upOrDown: ValueMapping = {
  type: MappingType.ValueToText,
  options: { 0: { text: 'down', color: 'red', index: 0 }, 1: { text: 'up', color: 'green', index: 1 } },
};

type AnyPanel = TimeSeries | Stat | StateTimeline | BarGauge | Heatmap | Table;

function withQueries(panel: TimeSeries | Stat | StateTimeline, queries: readonly Query[]): void {
  panel.datasource(datasource);
  for (const [index, query] of queries.entries()) panel.withTarget(target(query, index).range());
}

function target({ expr, legend }: Query, index: number): DataqueryBuilder {
  const refId = String.fromCodePoint('A'.codePointAt(0)! + index);
  return new DataqueryBuilder().datasource(datasource).refId(refId).expr(expr).legendFormat(legend);
}

function sized(
  panel: AnyPanel,
  { title, description, unit = units.count, width, height, thresholds = [], base = 'green', links = [] }: Common,
  size: { readonly width: number; readonly height: number },
): Sized {
  panel
    .title(title)
    .description(description)
    .unit(unit)
    .thresholds(
      new ThresholdsConfigBuilder()
        .mode(ThresholdsMode.Absolute)
        .steps([{ value: null, color: base }, ...thresholds.map(([value, color]) => ({ value, color }))]),
    )
    .dataLinks(links.map(dataLink));
  return { panel, width: width ?? size.width, height: height ?? size.height };
}

function dataLink({ title, url }: Link): DashboardLinkBuilder {
  return new DashboardLinkBuilder(title).url(url).targetBlank(url.startsWith('${readme}'));
}
