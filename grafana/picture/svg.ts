/**
 * Owns: the pieces of SVG that pictures are made of.
 * Must not know: what they show.
 * Runs: in `npm run pictures`.
 */

export interface Box {
  readonly x: number;
  readonly y: number;
  readonly width: number;
  readonly height: number;
}

/** Of a character, in the widest of the fonts below. */
export const characterWidth = 6.1;

export function text(x: number, y: number, content: string, className = '', colour?: string): string {
  const fill = colour === undefined ? '' : ` style="fill:${colour}"`;
  return `<text x="${short(x)}" y="${short(y)}" class="${className}"${fill}>${escaped(content)}</text>`;
}

/** As much of it as fits. */
export function fitting(content: string, width: number): string {
  const max = Math.max(1, Math.floor(width / characterWidth));
  return content.length <= max ? content : `${content.slice(0, max - 1)}…`;
}

export function rectangle({ x, y, width, height }: Box, colour: string, attributes = ''): string {
  return `<rect x="${short(x)}" y="${short(y)}" width="${short(width)}" height="${short(height)}" fill="${colour}" ${attributes}/>`;
}

export function line(x1: number, y1: number, x2: number, y2: number, colour: string, attributes = ''): string {
  return `<path d="M${short(x1)} ${short(y1)}L${short(x2)} ${short(y2)}" stroke="${colour}" ${attributes}/>`;
}

export type Point = readonly [x: number, y: number];

export function polyline(points: readonly Point[], colour: string, attributes = ''): string {
  return `<polyline points="${list(points)}" fill="none" stroke="${colour}" stroke-width="1.4" stroke-linejoin="round" ${attributes}/>`;
}

export function area(upper: readonly Point[], lower: readonly Point[], colour: string, opacity: number): string {
  return `<polygon points="${list([...upper, ...lower.toReversed()])}" fill="${colour}" fill-opacity="${opacity}"/>`;
}

/** A picture on a light ground of its own, which can be read on any page. */
export function picture(title: string, width: number, height: number, drawn: readonly string[]): string {
  return [
    `<svg xmlns="http://www.w3.org/2000/svg" width="${width}" height="${height}" viewBox="0 0 ${width} ${height}" role="img">`,
    `<title>${escaped(title)}</title>`,
    `<style>${styles}</style>`,
    `<rect width="${width}" height="${height}" rx="8" fill="#eef0f3"/>`,
    ...drawn,
    '</svg>',
    '',
  ].join('\n');
}

const styles = [
  'text{font-family:system-ui,-apple-system,"Segoe UI","DejaVu Sans",sans-serif;font-size:11px;fill:#1f2328}',
  '.title{font-size:12px;font-weight:600}.row{font-size:13px;font-weight:600}.head{font-size:17px;font-weight:600}',
  '.dim{fill:#59636e}.end{text-anchor:end}.middle{text-anchor:middle}',
  '.big{font-size:30px;font-weight:600;text-anchor:middle}',
].join('');

function list(points: readonly Point[]): string {
  return points.map(([x, y]) => `${short(x)},${short(y)}`).join(' ');
}

function short(value: number): string {
  return String(Number(value.toFixed(1)));
}

function escaped(content: string): string {
  return content.replaceAll('&', '&amp;').replaceAll('<', '&lt;').replaceAll('"', '&quot;');
}
