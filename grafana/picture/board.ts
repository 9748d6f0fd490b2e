/**
 * Owns: a dashboard as one picture: its panels asked of a Prometheus and laid out on Grafana's grid.
 * Must not know: how a panel is drawn.
 * Runs: in `npm run pictures`.
 */
import type { Prometheus, Range, Series } from '../../test/support/prometheus.ts';
import type { DashboardFile, PanelModel } from '../dashboard-files.ts';
import { drawing } from './drawings.ts';
import type { Drawn, Line } from './drawings.ts';
import { picture, rectangle, text } from './svg.ts';

/** In pixels. */
const [cellWidth, cellHeight, gap, headHeight] = [50, 32, 8, 44];
const gridWidth = 24;

export async function boardPicture(
  board: DashboardFile,
  prometheus: Prometheus,
  range: Range,
  concrete: (expr: string) => string,
): Promise<string> {
  const drawn = [text(16, 28, board.title, 'head')];
  const time = { from: range.startSeconds, to: range.endSeconds, step: range.stepSeconds };
  const marks = await marksOf(board, prometheus, range, concrete);
  let bottom = 0;
  for (const panel of board.panels) {
    const { x, y, w, h } = panel.gridPos;
    const outer = {
      x: gap / 2 + x * cellWidth + gap / 2,
      y: headHeight + y * cellHeight,
      width: w * cellWidth - gap,
      height: h * cellHeight - gap,
    };
    bottom = Math.max(bottom, outer.y + outer.height);
    if (panel.type === 'row') {
      drawn.push(text(outer.x + 4, outer.y + 20, panel.title, 'row'));
      continue;
    }
    drawn.push(
      rectangle(outer, '#ffffff', 'rx="4" stroke="#dfe2e7"'),
      text(outer.x + 10, outer.y + 18, panel.title, 'title'),
    );
    const inner = { ...outer, y: outer.y + 24, height: outer.height - 24 };
    drawn.push(drawing({ panel, lines: await linesOf(panel, prometheus, range, concrete), time, marks }, inner));
  }
  return picture(`${board.title}: a picture of the dashboard`, gridWidth * cellWidth + gap, bottom + gap, drawn);
}

async function linesOf(
  { targets = [] }: PanelModel,
  prometheus: Prometheus,
  range: Range,
  concrete: (expr: string) => string,
): Promise<Line[]> {
  const lines: Line[] = [];
  for (const { expr, instant, legendFormat = '' } of targets) {
    const asked = concrete(expr);
    const series = instant === true ? await prometheus.now(asked) : await prometheus.over(asked, range);
    for (const { metric, points } of series)
      lines.push({ name: legendOf(legendFormat, metric), labels: metric, points });
  }
  return lines;
}

/** The moments within the range, each once. */
async function marksOf(
  { marks }: DashboardFile,
  prometheus: Prometheus,
  range: Range,
  concrete: (expr: string) => string,
): Promise<Drawn['marks']> {
  const found: { readonly seconds: number; readonly colour: string }[] = [];
  for (const { expr, iconColor } of marks) {
    const series = await prometheus.over(concrete(expr), range);
    const moments = new Set(series.flatMap(({ points }) => points.map(([, milliseconds]) => milliseconds / 1000)));
    for (const seconds of moments)
      if (seconds > range.startSeconds && seconds < range.endSeconds) found.push({ seconds, colour: iconColor });
  }
  return found;
}

function legendOf(format: string, labels: Series['metric']): string {
  return format.replaceAll(/\{\{(\w+)\}\}/g, (_, label: string) => labels[label] ?? '');
}
