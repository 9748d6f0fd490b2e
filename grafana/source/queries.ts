/**
 * Owns: how panels ask: which series the variables of a dashboard choose, and the expressions that more than one panel has.
 * Must not know: panels.
 * Runs: in `npm run dashboards`.
 *
 * Expressions are over raw series, not over recorded ones: a dashboard works on any Prometheus that scrapes keygate.
 */

/** The variables that narrow the choice further, and the label that each is about. */
export type Variable = 'listener' | 'token' | 'upstream';

/** `name{...}`: the series of `name` that the variables choose, and with `labels` besides. */
export function chosen(name: string, variables: readonly Variable[] = [], labels = ''): string {
  const choices = ['job', 'instance', ...variables].map((variable) => `${variable}=~"$${variable}"`);
  return `${name}{${[...choices, ...(labels === '' ? [] : [labels])].join(',')}}`;
}

/** Per second, over a time that fits the step and the scrapes (Grafana's own choice). */
export function rate(series: string): string {
  return `rate(${series}[$__rate_interval])`;
}

/** Over the time that the dashboard shows. */
export function increase(series: string): string {
  return `increase(${series}[$__range])`;
}

export function sum(of: string, ...labels: readonly string[]): string {
  return labels.length === 0 ? `sum(${of})` : `sum by (${labels.join(', ')}) (${of})`;
}

/** Rates by labels of what happened at all in the time that is shown: without a line at 0 for everything that could happen. */
export function ratesSeen(series: string, ...labels: readonly string[]): string {
  return `${sum(rate(series), ...labels)} and ${sum(increase(series), ...labels)} > 0`;
}

/** A latency in seconds that a share of all stays within. `series` is the name of the histogram. */
export function quantile(
  share: number,
  series: string,
  variables: readonly Variable[],
  { labels = '', by = [] }: { readonly labels?: string; readonly by?: readonly string[] } = {},
): string {
  const buckets = rate(chosen(`${series}_bucket`, variables, labels));
  return `histogram_quantile(${share}, ${sum(buckets, ...by, 'le')})`;
}

const closed = (labels: string) => chosen('keygate_connections_closed_total', [], labels);

/** Without those who never meant to finish one: port scans, health checks, http:// on the TLS port. */
export const failedHandshakes = closed('phase=~"handshake|signing",reason!~"closed|reset|plain_http|not_tls"');

export const handshakes = (variables: readonly Variable[], resumed: boolean): string =>
  chosen('keygate_handshake_seconds_count', variables, `resumed="${resumed}"`);

/** In days. */
export const daysLeft = `(${chosen('keygate_certificate_expiry_timestamp_seconds')} - time()) / 86400`;

/** Of the reasons that match: how often, with what a table needs to show them and to lead to README. */
export function closesByReason(labels: string): string {
  const words = '"side", "phase", "reason"';
  const counted = `${sum(increase(closed(labels)), 'side', 'phase', 'reason')} >= 0.5`;
  const withAnchor = `label_join(${counted}, "anchor", "-", ${words})`;
  const withName = `label_join(${withAnchor}, "close_reason", "/", ${words})`;
  return `label_join(${withName}, "meaning", "/", ${words})`;
}

/** The same reasons over time. */
export function closeRates(labels: string): string {
  return ratesSeen(closed(labels), 'side', 'phase', 'reason');
}
