/**
 * Owns: the dashboard about what keygate consists of: workers, the primary, their logs, and the scrapes that tell of them.
 * Must not know: how panels are drawn.
 * Runs: in `npm run dashboards`.
 */
import { MappingType } from '@grafana/grafana-foundation-sdk/dashboard';
import type { Board } from './dashboard.ts';
import { lines, number, states, units } from './panels.ts';
import { chosen, increase, rate, sum } from './queries.ts';

const worker = 'worker {{worker}} {{instance}}';

export const processes: Board = {
  uid: 'keygate-processes',
  title: 'processes and logs',
  description: 'Workers, the primary, their logs, and the scrapes that tell of them.',
  variables: [],
  rows: [
    {
      title: 'Now',
      panels: [
        number({
          title: 'Workers not ready',
          description:
            '/status.json shows the state and the failure of each; the log line worker_lost says why one died.',
          expr: `count(${chosen('keygate_worker_up')} == 0) or vector(0)`,
          decimals: 0,
          thresholds: [[1, 'red']],
          graph: false,
          width: 4,
        }),
        number({
          title: 'Workers replaced',
          description: 'In the time that is shown. The connections of a worker that died were lost.',
          expr: sum(increase(chosen('keygate_worker_restarts_total'))),
          decimals: 0,
          thresholds: [[0.5, 'red']],
          graph: false,
          width: 4,
        }),
        number({
          title: 'I/O thread, busiest',
          description:
            'Of all workers: the one thread that does everything per connection. At 100 % its worker is full: more cores and `workers`.',
          expr: `max(${rate(chosen('keygate_worker_io_cpu_seconds_total'))})`,
          unit: units.share,
          decimals: 0,
          thresholds: [
            [0.7, 'orange'],
            [0.9, 'red'],
          ],
          width: 4,
        }),
        number({
          title: 'Log lines dropped',
          description:
            'In the time that is shown: a full disk, or who reads the pipe has stopped. Connections do not wait for either.',
          expr: sum(increase(chosen('keygate_log_lines_total', [], 'outcome="dropped"'))),
          decimals: 0,
          thresholds: [[0.5, 'red']],
          graph: false,
          width: 4,
        }),
        number({
          title: 'Key log',
          description: 'On: the secrets of every connection are written to a file. Meant for debugging only.',
          expr: `max(${chosen('keygate_key_log_enabled')})`,
          mappings: [
            {
              type: MappingType.ValueToText,
              options: { 0: { text: 'off', color: 'green', index: 0 }, 1: { text: 'on', color: 'red', index: 1 } },
            },
          ],
          thresholds: [[1, 'red']],
          graph: false,
          width: 4,
        }),
        number({
          title: 'Sandbox',
          description: 'Off: a worker runs without Landlock or seccomp; the log line at its start says why.',
          expr: `min(${chosen('keygate_worker_sandbox')})`,
          mappings: [
            {
              type: MappingType.ValueToText,
              options: { 0: { text: 'off', color: 'red', index: 0 }, 1: { text: 'on', color: 'green', index: 1 } },
            },
          ],
          base: 'red',
          thresholds: [[1, 'green']],
          graph: false,
          width: 4,
        }),
      ],
    },
    {
      title: 'Workers',
      panels: [
        states({
          title: 'Ready',
          description: 'Red: not ready, or being replaced. Its siblings have its share of new connections.',
          queries: [{ expr: chosen('keygate_worker_up'), legend: worker }],
        }),
        states({
          title: 'Stuck',
          description:
            'Red: calls into a PKCS#11 module do not return, and a certificate cannot be signed for. The worker serves what needs no key until another can take its place.',
          queries: [{ expr: `1 - ${chosen('keygate_worker_stuck')}`, legend: worker }],
        }),
        lines({
          title: 'CPU of I/O threads',
          description: 'The thread that does everything per connection. At 1 core connections wait for it.',
          unit: units.cores,
          queries: [{ expr: rate(chosen('keygate_worker_io_cpu_seconds_total')), legend: worker }],
          thresholds: [[0.9, 'red']],
        }),
        lines({
          title: 'CPU of workers',
          description: 'All threads: with a token in software, most of it are signatures.',
          unit: units.cores,
          queries: [{ expr: rate(chosen('keygate_worker_cpu_seconds_total')), legend: worker }],
        }),
        lines({
          title: 'Memory of workers',
          description: 'Resident. It follows open connections; if it does not, report it.',
          unit: units.bytes,
          queries: [{ expr: chosen('keygate_worker_resident_memory_bytes'), legend: worker }],
        }),
        lines({
          title: 'Descriptors, of what may be',
          description: 'Share of LimitNOFILE. A connection takes two. At 1 accept(2) fails.',
          unit: units.share,
          queries: [
            {
              expr: `${chosen('keygate_worker_open_fds')} / on (job, instance) group_left ${chosen('process_max_fds')}`,
              legend: worker,
            },
            { expr: `${chosen('process_open_fds')} / ${chosen('process_max_fds')}`, legend: 'primary {{instance}}' },
          ],
          thresholds: [[0.8, 'red']],
        }),
        lines({
          title: 'Age of workers',
          description: 'A tooth is a replacement.',
          unit: units.seconds,
          queries: [{ expr: `time() - ${chosen('keygate_worker_start_time_seconds')}`, legend: worker }],
        }),
      ],
    },
    {
      title: 'JavaScript: primary and workers',
      panels: [
        lines({
          title: 'Event loop lag',
          description: 'No connection waits for it; scrapes, reloads and replacements do. Is the machine out of CPU?',
          unit: units.seconds,
          queries: [
            { expr: chosen('nodejs_eventloop_lag_p99_seconds'), legend: 'primary {{instance}} p99' },
            { expr: chosen('keygate_worker_event_loop_lag_seconds'), legend: `${worker} max` },
          ],
        }),
        lines({
          title: 'Primary: CPU and garbage collection',
          description: 'The primary does nothing per connection: this does not follow the load.',
          unit: units.cores,
          queries: [
            { expr: rate(chosen('process_cpu_seconds_total')), legend: 'CPU {{instance}}' },
            {
              expr: sum(rate(chosen('nodejs_gc_duration_seconds_sum')), 'instance'),
              legend: 'garbage collection {{instance}}',
            },
          ],
        }),
        lines({
          title: 'Primary: memory',
          description: "Resident, and the part of it that is JavaScript's.",
          unit: units.bytes,
          queries: [
            { expr: chosen('process_resident_memory_bytes'), legend: 'resident {{instance}}' },
            { expr: chosen('nodejs_heap_size_used_bytes'), legend: 'heap {{instance}}' },
          ],
        }),
      ],
    },
    {
      title: 'Logs, sandbox, scrapes',
      panels: [
        lines({
          title: 'Log lines',
          description:
            'By log and outcome. `sampled_out` and `rate_limited` are what `log.access` asks for; `dropped` is a full disk or a stalled reader.',
          unit: units.perSecond,
          queries: [
            { expr: sum(rate(chosen('keygate_log_lines_total')), 'log', 'outcome'), legend: '{{log}} {{outcome}}' },
          ],
          colours: { '.* dropped': 'red' },
        }),
        states({
          title: 'Sandbox',
          description: 'By worker and mechanism. Red: `sandbox.enabled` is false, or the kernel is too old for it.',
          queries: [{ expr: chosen('keygate_worker_sandbox'), legend: 'worker {{worker}} {{mechanism}} {{instance}}' }],
        }),
        lines({
          title: 'Duration of scrapes',
          description: 'Measured by Prometheus. Above 2 s an alert fires.',
          unit: units.seconds,
          queries: [{ expr: chosen('scrape_duration_seconds'), legend: '{{instance}}' }],
          thresholds: [[2, 'red']],
        }),
      ],
    },
  ],
};
