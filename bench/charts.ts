/**
 * Owns: drawing: dots with intervals in rows, and lines over a sweep, as SVG; and SVG as PNG.
 * Must not know: what is drawn.
 * Runs: anywhere.
 *
 * The card is opaque and its colours follow the reader's light or dark theme, so that it can be read in an image tag on any page.
 * Tones are shapes as well as colours.
 */
import { Resvg } from '@resvg/resvg-js';
import type { Interval } from './statistics.ts';
import { ratioText } from './table.ts';

export type Tone = 'good' | 'bad' | 'open' | 'plain';
export type Scale = 'log' | 'linear';

export interface Dot {
  readonly value: Interval;
  readonly tone: Tone;
  /** Right of its panel. */
  readonly text: string;
}

export interface DotRow {
  readonly label: string;
  /** One for each panel; a text stands for a number that is not there. A row without cells is a heading. */
  readonly cells: readonly (Dot | string)[];
}

export interface DotChart {
  readonly title: string;
  /** How to read it. */
  readonly note: string;
  /** With the unit. */
  readonly axis: string;
  readonly scale: Scale;
  /** Headings, which may be empty. */
  readonly panels: readonly string[];
  readonly rows: readonly DotRow[];
  /** A line in each panel, and what stands above it. */
  readonly reference: { readonly value: number; readonly text: string } | undefined;
}

export interface LineChart {
  readonly title: string;
  readonly note: string;
  readonly xAxis: string;
  readonly yAxis: string;
  /** Both axes are logarithmic; points are sorted by x. */
  readonly lines: readonly { readonly label: string; readonly points: readonly LinePoint[] }[];
}

export interface LinePoint {
  readonly x: number;
  readonly value: Interval;
}

export function dotChart(chart: DotChart): string {
  const texts = chart.panels.map((_, panel) => chart.rows.map(({ cells }) => textOf(cells[panel])));
  const labelWidth = widthOf(chart.rows.map(({ label }) => label));
  const textWidths = texts.map((column) => widthOf(column) + gap);
  const plotWidth = chart.panels.length === 1 ? 360 : 110;
  const top =
    headHeight +
    (chart.panels.some((heading) => heading !== '') ? rowHeight : 0) +
    ((chart.reference?.text ?? '') === '' ? 0 : rowHeight);
  const bottom = top + chart.rows.length * rowHeight;
  const values = chart.rows.flatMap(({ cells }) =>
    cells.flatMap((cell) => (typeof cell === 'string' ? [] : [cell.value])),
  );
  const axis = axisOf(
    chart.scale,
    [
      ...values.flatMap(({ low, high }) => [low, high]),
      ...(chart.reference === undefined ? [] : [chart.reference.value]),
    ],
    plotWidth,
    chart.panels.length === 1 ? 7 : 3,
  );
  const drawn: string[] = [];
  let left = margin + labelWidth + gap;
  for (const [panel, heading] of chart.panels.entries()) {
    const textLeft = left + plotWidth + gap;
    drawn.push(text(left, headHeight + 4, heading, 'strong'));
    for (const tick of axis.ticks) {
      const x = left + axis.at(tick);
      drawn.push(line(x, top, x, bottom, 'grid'), text(x, bottom + 16, tickText(tick), 'dim middle'));
    }
    if (chart.reference !== undefined) {
      const x = left + axis.at(chart.reference.value);
      drawn.push(line(x, top, x, bottom, 'reference'), text(x, top - 6, chart.reference.text, 'dim middle'));
    }
    for (const [index, { cells }] of chart.rows.entries()) {
      const cell = cells[panel];
      if (cell === undefined) continue;
      const y = top + (index + 0.5) * rowHeight;
      if (typeof cell !== 'string') drawn.push(dot(cell, (value) => left + axis.at(value), y));
      drawn.push(text(textLeft, y + 4, textOf(cell), typeof cell === 'string' ? 'dim' : ''));
    }
    left = textLeft + (textWidths[panel] ?? 0) + gap;
  }
  for (const [index, { label, cells }] of chart.rows.entries()) {
    drawn.push(text(margin, top + (index + 0.5) * rowHeight + 4, label, cells.length === 0 ? 'strong' : ''));
  }
  drawn.push(text(margin + labelWidth + gap, bottom + 38, chart.axis, 'dim'));
  return card(chart, Math.max(left - gap + margin, headWidth(chart)), bottom + 52, drawn);
}

export function lineChart(chart: LineChart): string {
  const points = chart.lines.flatMap((each) => each.points);
  const [plotWidth, plotHeight, left, top] = [560, 300, margin + 56, headHeight + rowHeight];
  const bottom = top + plotHeight;
  const horizontal = axisOf(
    'log',
    points.map(({ x }) => x),
    plotWidth,
    8,
  );
  const vertical = axisOf(
    'log',
    points.flatMap(({ value }) => [value.low, value.high]),
    plotHeight,
    6,
  );
  const at = { x: (value: number) => left + horizontal.at(value), y: (value: number) => bottom - vertical.at(value) };
  const drawn = [text(margin, headHeight + 4, chart.yAxis, 'dim')];
  for (const tick of vertical.ticks) {
    drawn.push(
      line(left, at.y(tick), left + plotWidth, at.y(tick), 'grid'),
      text(left - 8, at.y(tick) + 4, tickText(tick), 'dim end'),
    );
  }
  for (const x of new Set(points.map((point) => point.x))) {
    drawn.push(line(at.x(x), top, at.x(x), bottom, 'grid'), text(at.x(x), bottom + 16, tickText(x), 'dim middle'));
  }
  drawn.push(text(left, bottom + 38, chart.xAxis, 'dim'));
  const ends = apart(
    chart.lines.map(({ points: own }) => at.y(own.at(-1)?.value.median ?? 1)),
    rowHeight - 3,
    bottom,
  );
  for (const [index, { label, points: own }] of chart.lines.entries()) {
    const colour = `series-${index % seriesColours.length}`;
    const path = own.map(({ x, value }) => `${coordinate(at.x(x))},${coordinate(at.y(value.median))}`).join(' ');
    drawn.push(`<polyline points="${path}" class="line ${colour}"/>`);
    for (const { x, value } of own) {
      drawn.push(line(at.x(x), at.y(value.low), at.x(x), at.y(value.high), `whisker ${colour}`));
      drawn.push(marker(index, at.x(x), at.y(value.median), colour));
    }
    const y = ends[index] ?? top;
    drawn.push(marker(index, left + plotWidth + 22, y, colour), text(left + plotWidth + 34, y + 4, label, ''));
  }
  const width = left + plotWidth + 34 + widthOf(chart.lines.map(({ label }) => label)) + margin;
  return card(chart, Math.max(width, headWidth(chart)), bottom + 52, drawn);
}

/** In light colours, twice as large as the SVG says, for dense screens. */
export function pngOf(svg: string): Buffer {
  const options = { fitTo: { mode: 'zoom' as const, value: 2 }, font: { defaultFontFamily: 'DejaVu Sans' } };
  return new Resvg(svg, options).render().asPng();
}

const margin = 20;
const gap = 12;
const rowHeight = 22;
/** Of the title and the note. */
const headHeight = 76;
const fontSize = 12;
/** Of an average character, in the widest of the fonts below: a text that is narrower does no harm. */
const characterWidth = 6.8;
/** Can be told apart by people who see fewer colours (Okabe and Ito). */
const seriesColours = ['#0072b2', '#d55e00', '#009e73', '#cc79a7', '#b8860b', '#56b4e9', '#7f7f7f', '#8c564b'];

function styles(): string {
  const theme = (colours: Readonly<Record<string, string>>) =>
    [
      `.card{fill:${colours['card']};stroke:${colours['grid']}}`,
      `text{fill:${colours['text']}}.dim{fill:${colours['dim']}}`,
      `.grid{stroke:${colours['grid']}}.reference{stroke:${colours['text']}}`,
      ...['good', 'bad', 'open', 'plain'].map((tone) => `.${tone}{stroke:${colours[tone]};fill:${colours[tone]}}`),
      `.open-dot{stroke:${colours['open']};fill:${colours['card']}}`,
    ].join('');
  return [
    `text{font-family:system-ui,-apple-system,"Segoe UI","DejaVu Sans",sans-serif;font-size:${fontSize}px}`,
    '.title{font-size:16px;font-weight:600}.strong{font-weight:600}.middle{text-anchor:middle}.end{text-anchor:end}',
    '.whisker{stroke-width:2.5}.reference{stroke-dasharray:4 3}.line{fill:none;stroke-width:2}',
    ...seriesColours.map(
      (colour, index) => `.series-${index}{stroke:${colour};fill:${colour}}.line.series-${index}{fill:none}`,
    ),
    theme({
      card: '#ffffff',
      text: '#1f2328',
      dim: '#59636e',
      grid: '#d8dee4',
      good: '#1a7f37',
      bad: '#cf222e',
      open: '#9a6700',
      plain: '#0969da',
    }),
    `@media (prefers-color-scheme:dark){${theme({ card: '#0d1117', text: '#e6edf3', dim: '#9198a1', grid: '#30363d', good: '#3fb950', bad: '#f85149', open: '#d29922', plain: '#4493f8' })}}`,
  ].join('\n');
}

function card(
  { title, note }: { readonly title: string; readonly note: string },
  width: number,
  height: number,
  drawn: readonly string[],
): string {
  const [w, h] = [Math.ceil(width), Math.ceil(height)];
  return [
    `<svg xmlns="http://www.w3.org/2000/svg" width="${w}" height="${h}" viewBox="0 0 ${w} ${h}" role="img">`,
    `<title>${escaped(title)}</title>`,
    `<style>${styles()}</style>`,
    `<rect class="card" x="0.5" y="0.5" width="${w - 1}" height="${h - 1}" rx="6"/>`,
    text(margin, 32, title, 'title'),
    text(margin, 52, note, 'dim'),
    ...drawn.filter((element) => element !== ''),
    '</svg>',
    '',
  ].join('\n');
}

/** Good is a circle, bad a diamond, undecided a hollow circle. */
function dot({ value, tone }: Dot, at: (value: number) => number, y: number): string {
  const whisker = line(at(value.low), y, at(value.high), y, `whisker ${tone}`);
  const x = at(value.median);
  if (tone === 'bad') return whisker + marker(1, x, y, tone);
  return `${whisker}<circle cx="${coordinate(x)}" cy="${coordinate(y)}" r="4.5" class="${tone === 'open' ? 'open-dot' : tone}"/>`;
}

/** Another shape for each of four neighbours. */
function marker(index: number, x: number, y: number, colour: string): string {
  const [at, r] = [`translate(${coordinate(x)} ${coordinate(y)})`, 4.5];
  const shapes = [
    `<circle r="${r}"`,
    `<path d="M0 ${-r - 1}L${r + 1} 0L0 ${r + 1}L${-r - 1} 0Z"`,
    `<rect x="${-r + 0.5}" y="${-r + 0.5}" width="${2 * r - 1}" height="${2 * r - 1}"`,
    `<path d="M0 ${-r - 0.5}L${r} ${r - 0.5}L${-r} ${r - 0.5}Z"`,
  ];
  return `${shapes[index % shapes.length]} transform="${at}" class="${colour}"/>`;
}

interface Axis {
  readonly ticks: readonly number[];
  readonly at: (value: number) => number;
}

/** Linear axes begin at 0. A logarithmic one has no 0: what is below its lowest positive value is drawn there. */
function axisOf(scale: Scale, values: readonly number[], length: number, ticksMax: number): Axis {
  const high = Math.max(...values, Number.MIN_VALUE);
  if (scale === 'linear') {
    const step = niceSteps(high / ticksMax).find((each) => each * ticksMax >= high) ?? high;
    const end = Math.ceil(high / step) * step;
    const ticks = Array.from({ length: Math.round(end / step) + 1 }, (_, index) => index * step);
    return { ticks, at: (value) => (value / end) * length };
  }
  const positive = values.filter((value) => value > 0);
  const [from, to] = [Math.min(...positive, high) / 1.15, high * 1.15];
  const at = (value: number) => (Math.log(Math.max(value, from) / from) / Math.log(to / from)) * length;
  const candidates = [[1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9], [1, 1.5, 2, 3, 5, 7], [1, 2, 5], [1, 3], [1]].map(
    (digits) => ticksBetween(from, to, digits),
  );
  const decades = candidates.at(-1) ?? [];
  const sparse = decades.filter((_, index) => index % Math.ceil(decades.length / ticksMax) === 0);
  return { ticks: candidates.find((ticks) => ticks.length <= ticksMax) ?? sparse, at };
}

function ticksBetween(from: number, to: number, digits: readonly number[]): number[] {
  const [first, last] = [Math.floor(Math.log10(from)), Math.ceil(Math.log10(to))];
  return Array.from({ length: last - first + 1 }, (_, index) => 10 ** (first + index))
    .flatMap((decade) => digits.map((digit) => digit * decade))
    .filter((tick) => tick >= from && tick <= to);
}

function niceSteps(atLeast: number): number[] {
  const decade = 10 ** Math.floor(Math.log10(atLeast));
  return [1, 2, 2.5, 5, 10].map((digit) => digit * decade);
}

/** Moves labels down until none covers the one above it, and then all of them up as far as the last one is too low. */
function apart(positions: readonly number[], distance: number, max: number): number[] {
  const moved = [...positions];
  const order = positions.map((_, index) => index).toSorted((a, b) => (positions[a] ?? 0) - (positions[b] ?? 0));
  let lowest = -Infinity;
  for (const index of order) {
    lowest = Math.max(moved[index] ?? 0, lowest + distance);
    moved[index] = lowest;
  }
  const overflow = Math.max(0, lowest - max);
  return moved.map((position) => position - overflow);
}

function tickText(value: number): string {
  const units = [
    [2 ** 20, ' Mi'],
    [2 ** 10, ' Ki'],
  ] as const;
  for (const [unit, name] of units)
    if (value >= unit && Number.isInteger(value / unit)) return `${value / unit}${name}`;
  return String(Number(value >= 1 ? value.toFixed(2) : ratioText(value)));
}

function textOf(cell: Dot | string | undefined): string {
  return typeof cell === 'object' ? cell.text : (cell ?? '');
}

function widthOf(texts: readonly string[]): number {
  return Math.max(0, ...texts.map(({ length }) => length)) * characterWidth;
}

function line(x1: number, y1: number, x2: number, y2: number, className: string): string {
  return `<line x1="${coordinate(x1)}" y1="${coordinate(y1)}" x2="${coordinate(x2)}" y2="${coordinate(y2)}" class="${className}"/>`;
}

function text(x: number, y: number, content: string, className: string): string {
  if (content === '') return '';
  return `<text x="${coordinate(x)}" y="${coordinate(y)}" class="${className}">${escaped(content)}</text>`;
}

/** A title's characters are larger. */
function headWidth({ title, note }: { readonly title: string; readonly note: string }): number {
  return margin * 2 + Math.max(widthOf([title]) * 1.5, widthOf([note]));
}

function coordinate(value: number): string {
  return value.toFixed(1);
}

function escaped(content: string): string {
  return content.replaceAll('&', '&amp;').replaceAll('<', '&lt;').replaceAll('"', '&quot;');
}
