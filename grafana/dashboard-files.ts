/**
 * Owns: reading grafana/dashboards/*.json as Grafana does: panels and what they ask, variables, marks, links.
 * Must not know: how the files are made.
 * Runs: in tests, and for the pictures of the dashboards.
 */
import { readFileSync, readdirSync } from 'node:fs';
import { join } from 'node:path';

export interface DashboardFile {
  readonly uid: string;
  readonly title: string;
  readonly panels: readonly PanelModel[];
  readonly targets: readonly PanelTarget[];
  readonly variables: readonly { readonly name: string; readonly query: string }[];
  /** Annotations: the value of `expr` is a time in milliseconds. */
  readonly marks: readonly { readonly expr: string; readonly iconColor: string }[];
}

export interface PanelTarget {
  /** Dashboard, panel and letter. */
  readonly key: string;
  readonly expr: string;
  readonly instant: boolean;
  readonly datasource: unknown;
}

/** The part of a panel's JSON that is read here. */
export interface PanelModel {
  readonly id: number;
  readonly type: string;
  readonly title: string;
  readonly description?: string;
  readonly gridPos: { readonly x: number; readonly y: number; readonly w: number; readonly h: number };
  readonly targets?: readonly {
    readonly refId: string;
    readonly expr: string;
    readonly instant?: boolean;
    readonly legendFormat?: string;
    readonly datasource?: unknown;
  }[];
  readonly fieldConfig?: {
    readonly defaults: {
      readonly unit?: string;
      readonly decimals?: number;
      readonly max?: number;
      readonly mappings?: readonly Mapping[];
      readonly thresholds?: { readonly steps: readonly { readonly value: number | null; readonly color: string }[] };
      readonly links?: readonly { readonly url: string }[];
      readonly custom?: {
        readonly stacking?: { readonly mode: string };
        readonly thresholdsStyle?: { readonly mode: string };
      };
    };
    readonly overrides: readonly {
      readonly matcher: { readonly id: string; readonly options: string };
      readonly properties: readonly { readonly id: string; readonly value: unknown }[];
    }[];
  };
  readonly transformations?: readonly { readonly id: string; readonly options: Readonly<Record<string, unknown>> }[];
  readonly options?: Readonly<Record<string, unknown>>;
}

export interface Mapping {
  readonly type: string;
  readonly options: Readonly<Record<string, { readonly text?: string; readonly color?: string }>>;
}

export function dashboards(): readonly DashboardFile[] {
  const directory = join(import.meta.dirname, 'dashboards');
  return readdirSync(directory)
    .filter((name) => name.endsWith('.json'))
    .map((name) => fileOf(JSON.parse(readFileSync(join(directory, name), 'utf8')) as Model));
}

interface Model {
  readonly uid: string;
  readonly title: string;
  readonly panels: readonly PanelModel[];
  readonly templating: {
    readonly list: readonly { readonly type: string; readonly name: string; readonly query: unknown }[];
  };
  readonly annotations: { readonly list: DashboardFile['marks'] };
}

function fileOf({ uid, title, panels, templating, annotations }: Model): DashboardFile {
  return {
    uid,
    title,
    panels,
    targets: panels.flatMap((panel) =>
      (panel.targets ?? []).map(({ refId, expr, instant = false, datasource }) => ({
        key: `${uid}: ${panel.title}: ${refId}`,
        expr,
        instant,
        datasource,
      })),
    ),
    variables: templating.list.flatMap(({ type, name, query }) =>
      type === 'query' ? [{ name, query: (query as { readonly query: string }).query }] : [],
    ),
    marks: annotations.list,
  };
}
