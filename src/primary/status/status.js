/**
 * Owns: the page at /status: signing in, the stream of measurements, and putting them into the page.
 * Must not know: how anything is measured; it shows what src/primary/overview.ts and history.ts say.
 * Runs: in a browser, under a policy without inline scripts and styles. What is told enters as text nodes only, so no name
 * and no message can become markup.
 */
const uPlot = globalThis.uPlot;

/** What is older than this is shown as old; a new measurement comes every second. */
const staleAfterMs = 4_000;
/** A stream that says nothing for so long is given up and opened anew. */
const silentAfterMs = 10_000;
const retryMinMs = 500;
const retryMaxMs = 5_000;
const historySeconds = 600;
const expiry = { badDays: 7, warnDays: 30 };
/** Scans and mistakes of single clients belong to every day. */
const loudFailureShare = 0.01;
const tokenKey = 'keygate-token';

const $ = (id) => document.getElementById(id);

/* --- the stream --- */

let stream;
let retryMs = retryMinMs;
let retryTimer;
let heardAt = 0;
/** The last moment that was told, by the clock of the server. */
let shownAtMs;

function connect() {
  clearTimeout(retryTimer);
  stream?.abort();
  if (document.hidden) return;
  const own = new AbortController();
  stream = own;
  void follow(own.signal)
    .then(
      () => undefined, // ended by the server: keygate stops, or other credentials are needed
      (error) => (own.signal.aborted ? undefined : error),
    )
    .then((failure) => {
      if (stream !== own) return;
      stream = undefined;
      if (failure?.signIn !== undefined) {
        askForToken(failure.signIn);
        return;
      }
      showFreshness(failure?.message);
      retryTimer = setTimeout(connect, retryMs);
      retryMs = Math.min(retryMs * 2, retryMaxMs);
    });
}

/** Reads events until the stream ends. EventSource would be shorter, but cannot send a token. */
async function follow(signal) {
  const token = sessionStorage.getItem(tokenKey);
  const headers = token === null ? {} : { authorization: `Bearer ${token}` };
  const response = await fetch('/status/events', { headers, signal, cache: 'no-store' });
  if (response.status === 401) {
    sessionStorage.removeItem(tokenKey);
    throw Object.assign(new Error(), {
      signIn: token === null ? '' : 'This token is not, or no longer, the right one.',
    });
  }
  if (response.status === 429) throw Object.assign(new Error(), { signIn: (await response.text()).trim() });
  if (!response.ok) throw new Error((await response.text()).trim());
  hideSignIn(token !== null);
  let text = '';
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    text += value;
    const events = text.split('\n\n');
    text = events.pop() ?? '';
    for (const event of events) {
      const [, name, data] = /^event: (\w+)\ndata: (.*)$/.exec(event) ?? [];
      if (name !== undefined) take(name, JSON.parse(data));
    }
  }
}

function take(name, data) {
  heardAt = performance.now();
  retryMs = retryMinMs;
  if (name === 'history') charts.replace(data.points);
  if (name === 'overview') {
    show(data);
    charts.add(data.now);
    shownAtMs = data.atMs;
    showFreshness();
  }
}

setInterval(() => {
  if (document.hidden || !$('sign-in').hidden) return;
  const silentMs = performance.now() - heardAt;
  if (silentMs > staleAfterMs) showFreshness();
  if (silentMs > silentAfterMs && stream !== undefined && heardAt !== 0) {
    heardAt = performance.now() - staleAfterMs - 1;
    connect();
  }
}, 1_000);

document.addEventListener('visibilitychange', () => {
  if (document.hidden) stream?.abort();
  else connect();
});

/** @param failure why there is nothing new, when that is known */
function showFreshness(failure) {
  const isLive = stream !== undefined && heardAt !== 0 && performance.now() - heardAt <= staleAfterMs;
  const label = $('freshness');
  label.className = isLive ? 'live' : 'stale';
  // Said once, not every second.
  setText(label, isLive ? 'Live' : 'No connection');
  $('board').classList.toggle('stale', !isLive);
  $('stale').hidden = isLive;
  if (isLive) {
    setText($('stale'), '');
    return;
  }
  const since = shownAtMs === undefined ? '' : ` What is below is old: it is of ${clock(shownAtMs)}.`;
  if (failure !== undefined || $('stale').textContent === '')
    setText($('stale'), `No answer from keygate.${since} Trying again. ${failure ?? ''}`);
  document.title = 'stale · keygate';
}

/* --- signing in --- */

function askForToken(failure) {
  $('board').hidden = true;
  $('sign-out').hidden = true;
  $('sign-in').hidden = false;
  $('freshness').className = 'waiting';
  setText($('freshness'), 'Not signed in');
  setText($('sign-in-failure'), failure);
  document.title = 'sign in · keygate';
  $('token').focus();
}

function hideSignIn(hasToken) {
  $('sign-in').hidden = true;
  $('token').value = '';
  $('sign-out').hidden = !hasToken;
}

$('sign-in').addEventListener('submit', (event) => {
  event.preventDefault();
  const token = $('token').value.trim();
  // What no header can hold is no token.
  if (!/^[\x21-\x7e]+$/.test(token)) {
    setText($('sign-in-failure'), 'A token has no such characters.');
    return;
  }
  sessionStorage.setItem(tokenKey, token);
  connect();
});

$('sign-out').addEventListener('click', () => {
  sessionStorage.removeItem(tokenKey);
  stream?.abort();
  connect();
});

/* --- at a glance --- */

function show(overview) {
  $('board').hidden = false;
  const attention = attentionOf(overview);
  const kind = overview.ready ? (attention.length === 0 ? 'good' : 'warn') : 'bad';
  document.title = `${overview.ready ? 'ready' : 'NOT READY'} · keygate`;
  setText($('version'), overview.version);
  document.querySelector('.verdict').className = `verdict ${kind}`;
  setText($('verdict-mark'), { good: '✓', warn: '!', bad: '✕' }[kind]);
  setText($('verdict-word'), overview.ready ? 'Ready' : 'Not ready');
  setText($('verdict-reason'), overview.ready ? summaryOf(overview) : overview.unreadiness);
  fillList($('attention'), attention);
  showFacts(overview);
  showTiles(overview);
  fill('tokens', overview.tokens, tokenCells, 'No token has been used yet.');
  fill('listeners', overview.listeners, listenerCells, 'No listener is open.');
  fill('servers', overview.servers, serverCells, 'There is no server.');
  fill('certificates', overview.certificates, certificateCells(overview.atMs), 'No certificate could be read.');
  fill('workers', overview.workers, workerCells(overview.atMs), 'There is no worker.');
  const { rows, more } = overview.closes;
  const byRate = rows.toSorted((a, b) => b.perSecond - a.perSecond || b.count - a.count);
  fill('failures', { rows: byRate.filter(({ isNormal }) => !isNormal), more }, closeCells, 'None has failed.');
  fill('endings', { rows: byRate.filter(({ isNormal }) => isNormal), more: 0 }, closeCells, 'None has ended.');
}

function summaryOf({ workers, tokens, servers }) {
  const upOf = (what, { rows }, isUp) => `${rows.filter(isUp).length} of ${rows.length} ${what}`;
  return [
    upOf('workers', workers, ({ state }) => state === 'ready'),
    upOf('tokens', tokens, ({ up }) => up),
    upOf('upstream servers up', servers, ({ up }) => up),
  ].join(', ');
}

/** What somebody should look at although, or because, connections are served. */
function attentionOf({ atMs, workers, tokens, servers, certificates, configuration: { lastReload } }) {
  return [
    ...tokens.rows.filter(({ up }) => !up).map(({ name }) => `Token ${name} is down`),
    ...tokens.rows
      .filter(({ lanesLost }) => lanesLost > 0)
      .map((row) => `Token ${row.name} has lost ${row.lanesLost} lanes`),
    ...servers.rows.filter(({ up }) => !up).map((row) => `Server ${row.address} of upstream ${row.upstream} is down`),
    ...workers.rows
      .filter(({ state }) => state !== 'ready')
      .map(({ slot, state, failure }) => `Worker ${slot} is ${state}${failure === undefined ? '' : `: ${failure}`}`),
    ...certificates.rows
      .filter(({ notAfterMs }) => daysLeft(notAfterMs, atMs) <= expiry.warnDays)
      .map(({ name, notAfterMs }) => `Certificate ${name}: ${leftOf(notAfterMs, atMs)}`),
    ...(lastReload === undefined || lastReload.outcome === 'committed'
      ? []
      : [`The last reload was ${lastReload.outcome.replace('_', ' ')}: ${lastReload.reasons[0]?.message ?? ''}`]),
  ].slice(0, 8);
}

function showFacts({ atMs, configuration, logLevel }) {
  const { file, generation, since, lastReload } = configuration;
  setText($('fact-generation'), `generation ${generation}, for ${durationOf(atMs - Date.parse(since))}`);
  setText(
    $('fact-reload'),
    lastReload === undefined
      ? 'none since the start'
      : `${lastReload.outcome.replace('_', ' ')} at ${clock(Date.parse(lastReload.at))}`,
  );
  setText($('fact-log'), logLevel);
  setText($('fact-file'), file);
}

function showTiles({ now, closes }) {
  const failing = closes.rows.filter(({ isNormal }) => !isNormal).reduce((sum, { perSecond }) => sum + perSecond, 0);
  const ending = closes.rows.reduce((sum, { perSecond }) => sum + perSecond, 0);
  const { full, resumed, signP50Ms, signP99Ms, waitP99Ms, queueDepth, connectionsOpen } = now ?? {};
  const { toUpstreamBytes = 0, toClientBytes = 0 } = now ?? {};
  tile(
    'handshakes',
    count((full ?? 0) + (resumed ?? 0)),
    '/s',
    `${count(full ?? 0)} full · ${count(resumed ?? 0)} resumed`,
  );
  tile(
    'sign',
    ...parts(milliseconds(signP50Ms)),
    (signP50Ms ?? null) === null ? 'nothing signed' : `p50 · p99 ${milliseconds(signP99Ms)}`,
  );
  tile('queue', count(queueDepth ?? 0), 'waiting', `p99 of the wait ${milliseconds(waitP99Ms)}`);
  tile('open', count(connectionsOpen ?? 0), '', `${count(ending)} ended per second`);
  tile(
    'bytes',
    ...parts(bytes(toUpstreamBytes + toClientBytes)),
    `↑ ${bytes(toUpstreamBytes)} · ↓ ${bytes(toClientBytes)}`,
  );
  tile('failures', count(failing), '/s', ending === 0 ? 'nothing ended' : `${percent(failing / ending)} of what ended`);
  $('tile-failures').parentElement.classList.toggle('bad', failing > ending * loudFailureShare);
}

function tile(name, value, unit, more) {
  const cell = $(`tile-${name}`);
  if (cell.childElementCount === 0) {
    cell.append(element('span', 'value', element('span'), element('span', 'unit')), element('span', 'more'));
  }
  const [main, note] = cell.children;
  setText(main.children[0], value);
  setText(main.children[1], unit);
  setText(note, more);
}

/* --- tables --- */

function tokenCells({
  name,
  up,
  lanesIdle,
  lanesBusy,
  lanesLost,
  queueDepth,
  signatures,
  p50Ms,
  p99Ms,
  failures,
  ...rest
}) {
  const lost = lanesLost === 0 ? '' : ` · ${lanesLost} lost`;
  const repairs = [
    [rest.reopened, 'session', 'sessions'],
    [rest.loggedIn, 'login', 'logins'],
    [rest.refound, 'key', 'keys'],
    [rest.wentDown, 'time down', 'times down'],
  ].filter(([times]) => times > 0);
  return [
    { text: name },
    pill(up, 'up', 'down'),
    {
      meter: [
        [lanesBusy, ''],
        [lanesLost, 'bad'],
      ],
      of: lanesIdle + lanesBusy + lanesLost,
      text: `${lanesBusy} busy · ${lanesIdle} idle${lost}`,
    },
    { number: count(queueDepth), loud: queueDepth > lanesIdle + lanesBusy },
    { number: `${count(signatures)} /s` },
    { number: milliseconds(p50Ms) },
    { number: milliseconds(p99Ms) },
    { number: `${count(failures)} /s`, loud: failures > 0 },
    { text: repairs.map(([times, one, many]) => `${times} ${times === 1 ? one : many}`).join(', ') || 'none' },
  ];
}

function listenerCells({
  name,
  addresses,
  open,
  openMax,
  inFlight,
  inFlightMax,
  accepted,
  toUpstreamBytes,
  toClientBytes,
}) {
  return [
    { text: name },
    { text: addresses.join(', '), code: true },
    limited(open, openMax),
    limited(inFlight, inFlightMax),
    { number: `${count(accepted)} /s` },
    { number: bytes(toUpstreamBytes) },
    { number: bytes(toClientBytes) },
  ];
}

function limited(value, max) {
  const share = value / max;
  const kind = share >= 0.95 ? 'bad' : share >= 0.8 ? 'warn' : '';
  return { meter: [[value, kind]], of: max, text: `${count(value)} of ${count(max)}` };
}

function serverCells({ upstream, address, up, open, connects, failures, failed }) {
  return [
    { text: upstream, key: `${upstream} ${address}` },
    { text: address, code: true },
    pill(up, 'up', 'down'),
    { number: count(open) },
    { number: `${count(connects)} /s` },
    { number: `${count(failures)} /s`, loud: failures > 0 },
    { number: count(failed) },
  ];
}

function certificateCells(atMs) {
  return ({ name, notAfterMs }) => {
    const days = daysLeft(notAfterMs, atMs);
    const kind = days <= expiry.badDays ? 'bad' : days <= expiry.warnDays ? 'warn' : 'good';
    return [
      { text: name },
      { pill: kind, text: leftOf(notAfterMs, atMs) },
      { text: new Date(notAfterMs).toISOString().slice(0, 10), quiet: true },
    ];
  };
}

function workerCells(atMs) {
  return ({ slot, state, pid, startedAt, restarts, failure }) => [
    { text: String(slot) },
    { pill: state === 'ready' ? 'good' : state === 'waiting' ? 'bad' : 'warn', text: state, note: failure },
    { number: pid === undefined ? '' : String(pid) },
    { number: startedAt === undefined ? '' : durationOf(atMs - Date.parse(startedAt)) },
    { number: count(restarts), loud: restarts > 0 },
  ];
}

function closeCells({ side, phase, reason, meaning, isNormal, count: total, perSecond }) {
  return [
    { text: `${side}/${phase}/${reason}`, code: true },
    { number: `${count(perSecond)} /s`, loud: !isNormal && perSecond > 0 },
    { number: count(total) },
    { text: meaning, wrap: true, quiet: true },
  ];
}

function pill(isUp, up, down) {
  return { pill: isUp ? 'good' : 'bad', text: isUp ? up : down };
}

/** What each row of each table shows now, so that only what has changed is touched: a selection survives the next second. */
const shown = new WeakMap();

function fill(id, { rows, more }, cellsOf, none) {
  const body = $(id).tBodies[0];
  const wanted = rows.map((row) => {
    const cells = cellsOf(row);
    return [cells[0].key ?? cells[0].text, cells];
  });
  const columns = $(id).tHead.rows[0].cells.length;
  if (rows.length === 0) wanted.push(['', [{ text: none, quiet: true, columns }]]);
  if (more > 0) wanted.push(['…', [{ text: `and ${more} more, which /status.json has`, quiet: true, columns }]]);
  const present = new Map([...body.rows].map((row) => [row.dataset.key, row]));
  for (const [index, [key, cells]] of wanted.entries()) {
    const row = present.get(key) ?? newRow(key, cells);
    present.delete(key);
    if (body.rows[index] !== row) body.insertBefore(row, body.rows[index] ?? null);
    for (const [column, cell] of cells.entries()) fillCell(row.cells[column], cell);
  }
  for (const row of present.values()) row.remove();
}

function newRow(key, cells) {
  const row = element('tr');
  row.dataset.key = key;
  for (const [column, { columns }] of cells.entries()) {
    const cell = element(column === 0 && columns === undefined ? 'th' : 'td');
    if (cell.tagName === 'TH') cell.scope = 'row';
    if (columns !== undefined) cell.colSpan = columns;
    row.append(cell);
  }
  return row;
}

function fillCell(place, cell) {
  const now = JSON.stringify(cell);
  if (shown.get(place) === now) return;
  shown.set(place, now);
  const classes = ['quiet', 'loud', 'code', 'wrap'].filter((name) => cell[name] === true);
  place.className = [...('number' in cell ? ['number'] : []), ...classes].join(' ');
  place.title = cell.note ?? '';
  if ('meter' in cell) place.replaceChildren(meter(cell));
  else if ('pill' in cell) place.replaceChildren(element('span', `pill ${cell.pill}`, cell.text));
  else if ('number' in cell) place.replaceChildren(...withUnit(cell.number));
  else if (cell.code === true) place.replaceChildren(...breakable(cell.text));
  else place.replaceChildren(cell.text);
}

function meter({ meter: segments, of, text }) {
  const track = element('span', 'track');
  track.setAttribute('aria-hidden', 'true'); // the text says the same
  for (const [value, kind] of segments) {
    const part = element('i', kind);
    const share = of === 0 ? 0 : (100 * value) / of;
    // A little of something must be seen.
    part.style.width = value === 0 ? '0' : `max(2px, ${share}%)`;
    track.append(part);
  }
  return element('span', 'meter', track, text);
}

/** The number as it is, its unit beside it in small. */
function withUnit(text) {
  const [value, unit] = parts(text);
  return unit === '' ? [value] : [`${value} `, element('small', '', unit)];
}

/** So that on a phone a line ends between words, not within one. */
function breakable(text) {
  return text.split('/').flatMap((part, index) => (index === 0 ? [part] : ['/', element('wbr'), part]));
}

function fillList(list, lines) {
  if (shown.get(list) === lines.join('\n')) return;
  shown.set(list, lines.join('\n'));
  list.replaceChildren(...lines.map((line) => element('li', '', line)));
}

/* --- charts --- */

/** Half a request does not wait. */
const wholeSteps = [1, 2, 5]
  .flatMap((step) => [0, 1, 2, 3, 4, 5].map((power) => step * 10 ** power))
  .toSorted((a, b) => a - b);

const definitions = [
  {
    id: 'chart-handshakes',
    title: 'Handshakes per second',
    series: [
      ['resumed', 'resumed'],
      ['full', 'full'],
    ],
    format: count,
  },
  {
    id: 'chart-sign',
    title: 'Sign latency',
    series: [
      ['p50', 'signP50Ms'],
      ['p99', 'signP99Ms'],
      ['p99 of the wait', 'waitP99Ms'],
    ],
    format: milliseconds,
  },
  {
    id: 'chart-queue',
    title: 'Signing queue',
    series: [['requests that wait', 'queueDepth']],
    format: count,
    incrs: wholeSteps,
  },
  {
    id: 'chart-bytes',
    title: 'Relayed per second',
    series: [
      ['to clients', 'toClientBytes'],
      ['to upstream', 'toUpstreamBytes'],
    ],
    format: bytes,
  },
];

class Charts {
  #points = [];
  #plots = [];

  replace(points) {
    this.#points = points;
    this.#draw();
  }

  add(point) {
    // The first one that is told is in the history as well.
    if (point !== undefined && point.atMs > (this.#points.at(-1)?.atMs ?? -Infinity)) this.#points.push(point);
    if (this.#points.length > historySeconds) this.#points.shift();
    this.#draw();
  }

  /** In the colours of the theme, which a canvas does not follow by itself. */
  restyle() {
    for (const { plot } of this.#plots) plot.destroy();
    this.#plots = [];
    this.#draw();
  }

  #draw() {
    // A size is there only when the board is.
    if ($('board').hidden) return;
    if (this.#plots.length === 0) this.#plots = definitions.map(newChart);
    // Of a while in which nothing was measured nothing is drawn.
    const isAfterGap = (point, index) => index > 0 && point.atMs - this.#points[index - 1].atMs > staleAfterMs;
    const points = this.#points.flatMap((point, index) =>
      isAfterGap(point, index) ? [{ atMs: point.atMs - 1 }, point] : [point],
    );
    const times = points.map(({ atMs }) => atMs / 1000);
    for (const { plot, fields, place, title, outputs, format } of this.#plots) {
      plot.setData([times, ...fields.map((field) => points.map((point) => point[field] ?? null))]);
      const newest = fields.map((field) => format(this.#points.at(-1)?.[field]));
      for (const [index, output] of outputs.entries())
        if ((plot.cursor.idx ?? null) === null) setText(output, newest[index]);
      place.setAttribute('aria-label', `${title} over the last ten minutes; now ${newest.join(' and ')}`);
    }
  }
}

function newChart({ id, title, series, format, incrs }) {
  const figure = $(id);
  const outputs = series.map(() => element('span', 'now'));
  const key = element(
    'span',
    'key',
    ...series.map(([label], index) => element('span', '', element('i', `series-${index + 1}`), label, outputs[index])),
  );
  const place = element('div', 'plot');
  place.setAttribute('role', 'img');
  figure.replaceChildren(element('figcaption', '', element('b', '', title), key), place);
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  const axis = { stroke: colour('ink-soft'), font: '12px system-ui, sans-serif', ticks: { show: false } };
  const plot = new uPlot(
    {
      width: Math.max(100, place.clientWidth),
      height: place.clientHeight,
      padding: [8, 8, 0, 0],
      legend: { show: false },
      cursor: { sync: { key: 'status' }, y: false, points: { size: 7 }, drag: { x: false, y: false } },
      scales: {
        x: {
          time: true,
          range: (_, oldest, newest) => span(oldest, newest),
        },
        y: { range: (_, __, highest) => [0, niceMax(highest)] },
      },
      axes: [
        {
          ...axis,
          grid: { show: false },
          size: 26,
          space: 90,
          values: (_, times, __, ___, stepSeconds) => times.map((time) => clock(time * 1000, stepSeconds < 60)),
        },
        {
          ...axis,
          grid: { stroke: colour('line'), width: 1 },
          size: 62,
          ...(incrs === undefined ? {} : { incrs }),
          space: 30,
          values: (_, values) => values.map((value) => (value === 0 ? '0' : format(value))),
        },
      ],
      series: [
        {},
        ...series.map(([label], index) => ({
          label,
          stroke: colour(`series-${index + 1}`),
          width: 1.75,
          points: { show: false },
          ...(index === 0 && series.length < 3 ? { fill: `${colour(`series-${index + 1}`)}1f` } : {}),
        })),
      ],
      hooks: {
        setCursor: [
          ({ data, cursor: { idx } }) => {
            const at = idx ?? data[0].length - 1;
            for (const [index, output] of outputs.entries()) setText(output, format(data[index + 1]?.[at]));
          },
        ],
      },
    },
    [[], ...series.map(() => [])],
    place,
  );
  new ResizeObserver(() =>
    plot.setSize({ width: Math.max(100, place.clientWidth), height: place.clientHeight }),
  ).observe(place);
  return { plot, place, title, outputs, format, fields: series.map(([, field]) => field) };
}

/** Ten minutes, or as much of them as there is; in seconds. */
function span(oldest, newest) {
  const end = newest ?? Date.now() / 1000;
  return [Math.max(end - historySeconds, Math.min(oldest ?? end, end - 30)), end];
}

/** Room above the highest value, and a scale also where everything is 0. */
function niceMax(highest) {
  return Number.isFinite(highest) && highest > 0 ? highest * 1.15 : 1;
}

const charts = new Charts();
matchMedia('(prefers-color-scheme: dark)').addEventListener('change', () => charts.restyle());

/* --- words and numbers --- */

function count(value) {
  if ((value ?? null) === null) return '–';
  if (value >= 1e6) return `${significant(value / 1e6)}M`;
  if (value >= 1e4) return `${significant(value / 1e3)}k`;
  return Number.isInteger(value) || value >= 100 ? String(Math.round(value)) : significant(value);
}

function milliseconds(value) {
  if ((value ?? null) === null) return '–';
  return value >= 1000
    ? `${significant(value / 1000)} s`
    : value >= 1
      ? `${significant(value)} ms`
      : `${Math.round(value * 1000)} µs`;
}

/** Per second. */
function bytes(value) {
  if ((value ?? null) === null) return '–';
  const power = value < 1000 ? 0 : Math.min(4, Math.floor(Math.log10(value) / 3));
  return `${power === 0 ? Math.round(value) : significant(value / 1000 ** power)} ${['B', 'kB', 'MB', 'GB', 'TB'][power]}/s`;
}

function percent(share) {
  return `${share > 0 && share < 0.001 ? '< 0.1' : significant(100 * share)} %`;
}

function significant(value) {
  return value >= 100 ? String(Math.round(value)) : String(Number(value.toPrecision(value >= 10 ? 3 : 2)));
}

/** The number and its unit. */
function parts(text) {
  const blank = text.indexOf(' ');
  return blank < 0 ? [text, ''] : [text.slice(0, blank), text.slice(blank + 1)];
}

function daysLeft(notAfterMs, atMs) {
  return Math.floor((notAfterMs - atMs) / 86_400_000);
}

function leftOf(notAfterMs, atMs) {
  const days = daysLeft(notAfterMs, atMs);
  if (days < 0) return 'expired';
  return days === 0 ? 'expires today' : `${days} day${days === 1 ? '' : 's'} left`;
}

function durationOf(ms) {
  const minutes = Math.floor(Math.max(0, ms) / 60_000);
  if (minutes < 1) return `${Math.max(0, Math.floor(ms / 1000))} s`;
  if (minutes < 60) return `${minutes} min`;
  const hours = Math.floor(minutes / 60);
  return hours < 48 ? `${hours} h ${minutes % 60} min` : `${Math.floor(hours / 24)} d ${hours % 24} h`;
}

function clock(ms, withSeconds = true) {
  const seconds = withSeconds ? { second: '2-digit' } : {};
  return new Date(ms).toLocaleTimeString([], { hour: '2-digit', minute: '2-digit', hourCycle: 'h23', ...seconds });
}

function element(name, className = '', ...children) {
  const made = document.createElement(name);
  if (className !== '') made.className = className;
  made.append(...children);
  return made;
}

/** Only what has changed: what listens to a page reads every change aloud. */
function setText(place, text) {
  if (place.textContent !== text) place.textContent = text;
}

connect();
