/**
 * Owns: the page at /status: what a browser is sent to show /status.json and keep it fresh.
 * Must not know: what the status holds, beyond the shape of a latency; it prints whatever is there.
 * Runs: the strings run in a browser, under a policy that allows no inline script or style.
 */

export const statusPage = `<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>keygate</title>
<link rel="stylesheet" href="/status.css">
<script type="module" src="/status.js"></script>
</head>
<body>
<header><h1>keygate</h1><p id="freshness" role="status">loading</p></header>
<main id="status"></main>
<noscript><p>Without scripts, read <a href="/status.json">/status.json</a>.</p></noscript>
</body>
</html>
`;

export const statusStyle = `:root { color-scheme: light dark; font: 15px/1.4 system-ui, sans-serif; }
body { max-width: 75rem; margin: 1rem auto; padding: 0 1rem; }
header { display: flex; align-items: baseline; gap: 1rem; }
h1 { font-size: 1.4rem; margin: 0; }
h2 { font-size: 1rem; margin: 1.2rem 0 .3rem; }
#freshness.stale { color: #c22; font-weight: bold; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { border: 1px solid #8886; padding: .15rem .5rem; text-align: left; vertical-align: top; }
th { font-weight: 600; background: #8882; }
`;

// Text only ever enters the page as text nodes, so no name or message can become markup.
export const statusScript = `const refreshMs = 2000;
const freshness = document.getElementById('freshness');
const main = document.getElementById('status');
refresh();

async function refresh() {
  try {
    const response = await fetch('/status.json', { signal: AbortSignal.timeout(refreshMs * 2) });
    if (!response.ok) throw new Error('status ' + response.status);
    const status = await response.json();
    main.replaceChildren(...sections(status));
    freshness.textContent = 'as of ' + new Date().toLocaleTimeString();
    freshness.className = '';
  } catch (error) {
    freshness.textContent = 'no answer: what is below is old (' + error.message + ')';
    freshness.className = 'stale';
  }
  setTimeout(refresh, refreshMs);
}

function sections(status) {
  const entries = Object.entries(status);
  const plain = entries.filter(([, value]) => !isObject(value));
  const deep = entries.filter(([, value]) => isObject(value));
  return [show(Object.fromEntries(plain)), ...deep.flatMap(([name, value]) => [element('h2', name), show(value)])];
}

function show(value) {
  if (!isObject(value)) return document.createTextNode(String(value ?? ''));
  if (Array.isArray(value.buckets)) return document.createTextNode(latency(value));
  if (!Array.isArray(value)) return table(Object.entries(value).map(([name, own]) => [element('th', name), element('td', show(own))]));
  // Counts of what never happened would hide those of what did.
  const rows = value.filter((row) => !isObject(row) || row.count !== 0);
  if (!rows.every(isObject)) return document.createTextNode(rows.join(', '));
  const columns = [...new Set(rows.flatMap(Object.keys))];
  return table([
    columns.map((name) => element('th', name)),
    ...rows.map((row) => columns.map((name) => element('td', show(row[name])))),
  ]);
}

function latency({ buckets, sumUs }) {
  const count = buckets.reduce((sum, own) => sum + own, 0);
  return count === 0 ? '' : count + ' of mean ' + (sumUs / count / 1000).toFixed(2) + ' ms';
}

function table(rows) {
  return element('table', ...rows.map((cells) => element('tr', ...cells)));
}

function element(name, ...children) {
  const made = document.createElement(name);
  made.append(...children);
  return made;
}

function isObject(value) {
  return typeof value === 'object' && value !== null;
}
`;
