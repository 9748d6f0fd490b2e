/**
 * Owns: numbers as Grafana writes them, by the unit of a panel, and the colours of Grafana's names.
 * Must not know: panels.
 * Runs: in `npm run pictures`.
 */
import { units } from '../source/panels.ts';

export function valueText(value: number, unit: string | undefined, decimals?: number): string {
  switch (unit) {
    case units.share:
      return `${fixed(value * 100, decimals)}%`;
    case units.seconds:
      return secondsText(value, decimals);
    case units.bytes:
      return scaled(value, 1024, ['B', 'KiB', 'MiB', 'GiB']);
    case units.bytesPerSecond:
      return scaled(value, 1000, ['B/s', 'kB/s', 'MB/s', 'GB/s']);
    case units.perSecond:
      return `${fixed(value, decimals)}/s`;
    case units.cores:
      return `${fixed(value, decimals)} cores`;
    default:
      return fixed(value, decimals);
  }
}

const named: Readonly<Record<string, string>> = {
  green: '#3a9a4a',
  yellow: '#d9a400',
  orange: '#e8710a',
  red: '#d1242f',
  blue: '#2f6fd0',
  purple: '#8250c8',
  text: '#1f2328',
};

export function colourOf(name: string): string {
  return named[name] ?? '#59636e';
}

/** For series without a colour of their own; can be told apart by people who see fewer colours. */
export const palette: readonly string[] = [
  '#0072b2',
  '#d55e00',
  '#009e73',
  '#cc79a7',
  '#b8860b',
  '#56b4e9',
  '#7f7f7f',
  '#8c564b',
  '#17a2a2',
  '#a05195',
];

function secondsText(value: number, decimals: number | undefined): string {
  const size = Math.abs(value);
  if (size === 0) return '0 s';
  if (size < 0.001) return `${fixed(value * 1e6, decimals)} µs`;
  if (size < 1) return `${fixed(value * 1e3, decimals)} ms`;
  if (size < 120) return `${fixed(value, decimals)} s`;
  return size < 7200 ? `${fixed(value / 60, decimals)} min` : `${fixed(value / 3600, decimals)} h`;
}

function scaled(value: number, base: number, names: readonly string[]): string {
  const steps = Math.min(names.length - 1, Math.max(0, Math.floor(Math.log(Math.abs(value) || 1) / Math.log(base))));
  return `${fixed(value / base ** steps)} ${names[steps] ?? ''}`;
}

/** Three digits, unless the panel says how many there are after the point. */
function fixed(value: number, decimals?: number): string {
  if (decimals !== undefined) return value.toFixed(decimals);
  const size = Math.abs(value);
  if (size === 0 || size >= 100) return String(Math.round(value));
  return String(Number(value.toPrecision(3)));
}
