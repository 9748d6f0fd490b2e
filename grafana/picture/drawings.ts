/**
 * Owns: how each kind of panel is drawn, as Grafana would: lines, one number, buckets, states, a table.
 * Must not know: dashboards, or where data come from.
 * Runs: in `npm run pictures`.
 */
import type { Mapping, PanelModel } from '../dashboard-files.ts';
import { area, characterWidth, fitting, line, polyline, rectangle, text } from './svg.ts';
import type { Box, Point } from './svg.ts';
import { colourOf, palette, valueText } from './values.ts';

export interface Line {
  readonly name: string;
  readonly labels: Readonly<Record<string, string>>;
  readonly points: readonly Point[];
}

export interface Drawn {
  readonly panel: PanelModel;
  readonly lines: readonly Line[];
  /** In seconds; what is drawn begins and ends here. */
  readonly time: { readonly from: number; readonly to: number; readonly step: number };
  /** Moments in seconds that every panel shows. */
  readonly marks: readonly { readonly seconds: number; readonly colour: string }[];
}

export function drawing(drawn: Drawn, box: Box): string {
  const draw = { timeseries, stat, heatmap, 'state-timeline': states, table }[drawn.panel.type];
  if (draw === undefined) throw new Error(`cannot draw a panel of type ${drawn.panel.type}: ${drawn.panel.title}`);
  return draw(drawn, box);
}

const gridColour = '#e3e6ea';

function timeseries({ panel, lines, time, marks }: Drawn, box: Box): string {
  const { unit, decimals, thresholds, custom } = panel.fieldConfig?.defaults ?? {};
  const stacked = custom?.stacking?.mode === 'normal';
  const shown = lines
    .map((each, index) => ({
      ...each,
      colour: overridden(panel, each.name, 'color') ?? palette[index % palette.length] ?? '',
      points: overridden(panel, each.name, 'custom.transform') === undefined ? each.points : negative(each.points),
    }))
    .map((each) => ({ ...each, max: Math.max(...each.points.map(([, value]) => Math.abs(value))) }));
  const legends = shown.toSorted((a, b) => b.max - a.max).slice(0, legendRowsMax);
  const [left, right] = [box.x + 56, box.x + box.width - 10];
  const bottom = box.y + box.height - 38 - legends.length * legendHeight;
  const plot: Box = { x: left, y: box.y + 6, width: right - left, height: bottom - box.y - 6 };

  const totals = stacked ? stackedTotals(shown) : [];
  const values = [...shown.flatMap(({ points }) => points.map(([, value]) => value)), ...totals];
  const { at, ticks } = verticalAxis(values, plot);
  const x = (seconds: number) => left + ((seconds - time.from) / (time.to - time.from)) * plot.width;
  const out: string[] = [];
  for (const tick of ticks) {
    out.push(line(left, at(tick), right, at(tick), gridColour));
    out.push(text(left - 6, at(tick) + 4, valueText(Math.abs(tick), unit), 'dim end'));
  }
  out.push(timeLabels(time, x, bottom + 14));
  for (const { seconds, colour } of marks)
    out.push(line(x(seconds), plot.y, x(seconds), bottom, colourOf(colour), 'stroke-dasharray="2 3"'));
  const base = new Map<number, number>();
  for (const { points, colour } of shown) {
    const lower = points.map(([seconds]): Point => [x(seconds), at(stacked ? (base.get(seconds) ?? 0) : 0)]);
    if (stacked) for (const [seconds, value] of points) base.set(seconds, (base.get(seconds) ?? 0) + value);
    const upper = points.map(([seconds, value]): Point => [x(seconds), at(stacked ? (base.get(seconds) ?? 0) : value)]);
    for (const { from, to } of pieces(points, time.step)) {
      const [above, below] = [upper.slice(from, to), lower.slice(from, to)];
      out.push(area(above, below, colour, stacked ? 0.4 : 0.08), polyline(above, colour));
    }
  }
  const top = Math.max(...ticks);
  if (custom?.thresholdsStyle !== undefined)
    for (const { value, color } of thresholds?.steps ?? [])
      if (value !== null && value <= top)
        out.push(line(left, at(value), right, at(value), colourOf(color), 'stroke-dasharray="5 4"'));
  out.push(text(right - 64, bottom + 30, 'last', 'dim end'), text(right, bottom + 30, 'max', 'dim end'));
  for (const [index, { name, colour, points }] of legends.entries()) {
    const y = bottom + 44 + index * legendHeight;
    const last = Math.abs(points.at(-1)?.[1] ?? 0);
    const max = Math.max(...points.map(([, value]) => Math.abs(value)));
    const more =
      index === legendRowsMax - 1 && shown.length > legendRowsMax ? `  (+${shown.length - legendRowsMax})` : '';
    const width = box.width - 170;
    out.push(rectangle({ x: box.x + 12, y: y - 8, width: 10, height: 4 }, colour, 'rx="2"'));
    out.push(text(box.x + 28, y, `${fitting(name, width - 10)}${more}`));
    out.push(text(right - 64, y, valueText(last, unit, decimals), 'dim end'));
    out.push(text(right, y, valueText(max, unit, decimals), 'dim end'));
  }
  return out.join('\n');
}

const legendRowsMax = 4;
const legendHeight = 15;

function stat({ panel, lines, time }: Drawn, box: Box): string {
  const { unit, decimals, mappings = [], thresholds } = panel.fieldConfig?.defaults ?? {};
  const points = lines[0]?.points ?? [];
  const last = points.at(-1)?.[1];
  const mapped = mappings.map(({ options }) => options[String(last)]).find((one) => one !== undefined);
  const step = thresholds?.steps.findLast(({ value }) => value === null || value <= (last ?? 0));
  const colour = colourOf(mapped?.color ?? step?.color ?? 'text');
  const content = last === undefined ? '–' : (mapped?.text ?? valueText(last, unit, decimals));
  const hasGraph = panel.options?.['graphMode'] === 'area' && points.length > 1;
  const out: string[] = [];
  if (hasGraph) {
    const height = box.height * 0.36;
    const top = Math.max(...points.map(([, value]) => value)) || 1;
    const x = (seconds: number) => box.x + ((seconds - time.from) / (time.to - time.from)) * box.width;
    const upper = points.map(([s, value]): Point => [x(s), box.y + box.height - 3 - (value / top) * height]);
    const lower = points.map(([s]): Point => [x(s), box.y + box.height - 1]);
    out.push(area(upper, lower, colour, 0.15), polyline(upper, colour));
  }
  const y = box.y + box.height * (hasGraph ? 0.5 : 0.62);
  out.push(text(box.x + box.width / 2, y, content, 'big', colour));
  return out.join('\n');
}

/** Counts up to each bound become counts between bounds; rows at the edges that are empty are left out. */
function heatmap({ lines, time }: Drawn, box: Box): string {
  const byBound = lines
    .map(({ labels, points }) => ({ bound: Number(labels['le'] === '+Inf' ? Infinity : labels['le']), points }))
    .toSorted((a, b) => a.bound - b.bound);
  const rows = byBound.map(({ bound, points }, index) => {
    const below = new Map(byBound[index - 1]?.points);
    return { bound, cells: points.map(([s, value]): Point => [s, Math.max(0, value - (below.get(s) ?? 0))]) };
  });
  const filled = rows.map(({ cells }) => cells.some(([, count]) => count > 0.001));
  const shown = rows.slice(Math.max(0, filled.indexOf(true) - 1), filled.lastIndexOf(true) + 2);
  const max = Math.max(...shown.flatMap(({ cells }) => cells.map(([, count]) => count)));
  const [left, right, bottom] = [box.x + 56, box.x + box.width - 10, box.y + box.height - 26];
  const height = (bottom - box.y - 6) / shown.length;
  const x = (seconds: number) => left + ((seconds - time.from) / (time.to - time.from)) * (right - left);
  const out = [timeLabels(time, x, bottom + 14)];
  for (const [index, { bound, cells }] of shown.entries()) {
    const y = bottom - (index + 1) * height;
    out.push(text(left - 6, y + 4, bound === Infinity ? 'more' : valueText(bound, 's'), 'dim end'));
    const shades = cells.map(([, count]) => (count > 0.001 ? Math.ceil(Math.sqrt(count / max) * 10) : 0));
    for (const [cell, shade] of shades.entries()) {
      // Neighbours of one shade are one rectangle.
      if (shade === 0 || shade === shades[cell - 1]) continue;
      const same = shades.findIndex((other, place) => place > cell && other !== shade);
      const [from, to] = [cells[cell]?.[0] ?? time.from, cells[same]?.[0] ?? time.to];
      const place = { x: x(from), y: y + 0.5, width: x(to) - x(from), height: height - 1 };
      out.push(rectangle(place, '#1f5fae', `fill-opacity="${shade / 10}"`));
    }
  }
  return out.join('\n');
}

function states({ lines, time }: Drawn, box: Box): string {
  const labelWidth = Math.min(box.width * 0.4, Math.max(...lines.map(({ name }) => name.length)) * characterWidth + 14);
  const [left, right, bottom] = [box.x + 10 + labelWidth, box.x + box.width - 10, box.y + box.height - 26];
  const height = Math.min(34, (bottom - box.y - 6) / Math.max(1, lines.length));
  const x = (seconds: number) => left + ((seconds - time.from) / (time.to - time.from)) * (right - left);
  const out = [timeLabels(time, x, bottom + 14)];
  for (const [index, { name, points }] of lines.entries()) {
    const y = box.y + 6 + index * height;
    out.push(text(left - 8, y + height / 2 + 4, fitting(name, labelWidth), 'end'));
    const changes = points.filter(([, value], place) => value !== points[place - 1]?.[1]);
    for (const [change, [seconds, value]] of changes.entries()) {
      const end = changes[change + 1]?.[0] ?? time.to;
      const place = { x: x(seconds), y: y + 3, width: x(end) - x(seconds), height: height - 6 };
      out.push(rectangle(place, colourOf(value >= 1 ? 'green' : 'red'), 'fill-opacity="0.8" rx="1"'));
    }
  }
  return out.join('\n');
}

function table({ panel, lines }: Drawn, box: Box): string {
  const organize = panel.transformations?.find(({ id }) => id === 'organize')?.options ?? {};
  const columns = Object.entries((organize['renameByName'] ?? {}) as Readonly<Record<string, string>>).filter(
    ([, title]) => property(panel, title, 'custom.hidden') !== true,
  );
  const fixedWidths = columns.map(([, title]) => Number(property(panel, title, 'custom.width') ?? 0) * 0.75);
  const flexible = fixedWidths.filter((width) => width === 0).length;
  const rest = (box.width - 24 - fixedWidths.reduce((sum, width) => sum + width, 0)) / Math.max(1, flexible);
  const widths = fixedWidths.map((width) => width || rest);
  const lefts = widths.map((_, index) => box.x + 12 + widths.slice(0, index).reduce((sum, width) => sum + width, 0));
  const out = columns.map(([, title], index) => text(lefts[index] ?? 0, box.y + 18, title, 'dim'));
  let y = box.y + 26;
  for (const row of lines.toSorted((a, b) => (b.points.at(-1)?.[1] ?? 0) - (a.points.at(-1)?.[1] ?? 0))) {
    const cells = columns.map(([name, title], index) => wrapped(cellText(panel, row, name, title), widths[index] ?? 0));
    const height = 7 + 13 * Math.max(...cells.map((texts) => texts.length));
    if (y + height > box.y + box.height) break;
    out.push(line(box.x + 10, y, box.x + box.width - 10, y, gridColour));
    for (const [index, texts] of cells.entries()) {
      const isLink = property(panel, columns[index]?.[1] ?? '', 'links') !== undefined;
      for (const [place, content] of texts.entries())
        out.push(text(lefts[index] ?? 0, y + 14 + place * 13, content, '', isLink ? colourOf('blue') : undefined));
    }
    y += height;
  }
  return out.join('\n');
}

function cellText(panel: PanelModel, { labels, points }: Line, name: string, title: string): string {
  const decimals = property(panel, title, 'decimals') as number | undefined;
  const raw = name === 'Value' ? valueText(points.at(-1)?.[1] ?? 0, undefined, decimals) : (labels[name] ?? '');
  const mappings = (property(panel, title, 'mappings') ?? []) as readonly Mapping[];
  return mappings.map(({ options }) => options[raw]?.text).find((one) => one !== undefined) ?? raw;
}

/** In two lines at most. */
function wrapped(content: string, width: number): string[] {
  const max = Math.floor((width - 6) / characterWidth);
  if (content.length <= max) return [content];
  const end = content.lastIndexOf(' ', max);
  if (end < 0) return [fitting(content, width - 6)];
  return [content.slice(0, end), fitting(content.slice(end + 1), width - 6)];
}

function timeLabels({ from, to }: Drawn['time'], x: (seconds: number) => number, y: number): string {
  const step = 30;
  const labels = Array.from({ length: Math.floor((to - from) / step) + 1 }, (_, index) => index * step);
  return labels
    .map((seconds) => {
      const clock = `${Math.floor(seconds / 60)}:${String(seconds % 60).padStart(2, '0')}`;
      return text(x(from + seconds), y, clock, 'dim middle');
    })
    .join('\n');
}

interface VerticalAxis {
  readonly at: (value: number) => number;
  readonly ticks: readonly number[];
}

/** Round steps, from what is lowest, or 0, to what is highest. */
function verticalAxis(values: readonly number[], plot: Box): VerticalAxis {
  const [low, high] = [Math.min(0, ...values), Math.max(0, ...values)];
  const span = high - low || 1;
  const rough = span / Math.max(2, Math.floor(plot.height / 32));
  const decade = 10 ** Math.floor(Math.log10(rough));
  const stepSize = [1, 2, 2.5, 5, 10].map((digit) => digit * decade).find((each) => each >= rough) ?? rough;
  const [first, last] = [Math.floor(low / stepSize), Math.max(1, Math.ceil(high / stepSize))];
  const ticks = Array.from({ length: last - first + 1 }, (_, index) => (first + index) * stepSize);
  const [bottom, top] = [first * stepSize, last * stepSize];
  return { ticks, at: (value) => plot.y + plot.height * (1 - (value - bottom) / (top - bottom)) };
}

function stackedTotals(lines: readonly { readonly points: readonly Point[] }[]): number[] {
  const totals = new Map<number, number>();
  for (const { points } of lines)
    for (const [seconds, value] of points) totals.set(seconds, (totals.get(seconds) ?? 0) + value);
  return [...totals.values()];
}

function negative(points: readonly Point[]): Point[] {
  return points.map(([seconds, value]) => [seconds, -value]);
}

/** Where a line begins and ends: it has gaps where there were no data. */
function pieces(points: readonly Point[], step: number): { readonly from: number; readonly to: number }[] {
  const begins = points.flatMap(([seconds], index) => {
    const before = points[index - 1];
    return before === undefined || seconds - before[0] > step * 1.5 ? [index] : [];
  });
  return begins.map((from, index) => ({ from, to: begins[index + 1] ?? points.length }));
}

/** What an override by regular expression says of a series. */
function overridden(panel: PanelModel, name: string, id: string): string | undefined {
  for (const { matcher, properties } of panel.fieldConfig?.overrides ?? []) {
    if (matcher.id !== 'byRegexp' || !new RegExp(`^(?:${matcher.options})$`).test(name)) continue;
    const value = properties.find((one) => one.id === id)?.value;
    if (id === 'color' && value !== undefined) return colourOf((value as { readonly fixedColor: string }).fixedColor);
    if (value !== undefined) return value as string;
  }
  return undefined;
}

/** What an override by name says of a column. */
function property(panel: PanelModel, title: string, id: string): unknown {
  return panel.fieldConfig?.overrides
    .find(({ matcher }) => matcher.id === 'byName' && matcher.options === title)
    ?.properties.find((one) => one.id === id)?.value;
}
