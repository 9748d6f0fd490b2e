/**
 * Owns: what a person sees at /status: live numbers of a keygate under load, in light and dark, on a desk and on a phone;
 * that it says so when they are old; that it signs in; that nothing in it breaks its own policy or needs a network.
 * Must not know: how the numbers are made (test/primary/overview.test.ts).
 * Runs: in a test process, against `keygate serve` with SoftHSM under load, in a real headless Chromium. Leaves pictures
 * in .keygate/artifacts.
 */
import assert from 'node:assert/strict';
import { mkdirSync, writeFileSync } from 'node:fs';
import { createServer } from 'node:net';
import type { AddressInfo } from 'node:net';
import { join } from 'node:path';
import { after, before, describe, it } from 'node:test';
import { setTimeout as pause } from 'node:timers/promises';
import { chromium } from 'playwright-core';
import type { Browser, BrowserContextOptions, Page } from 'playwright-core';
import { createSelfSigned } from '../../src/pkcs11/issue.ts';
import { findPrivateKey } from '../../src/pkcs11/keys.ts';
import { startKeygate } from '../support/keygate.ts';
import type { Keygate, KeygateDocument } from '../support/keygate.ts';
import { provisionedToken } from '../support/provisioned-token.ts';
import type { ProvisionedToken } from '../support/provisioned-token.ts';
import { answerTo, tlsClient } from '../support/tls-client.ts';
import { until } from '../support/until.ts';
import { echoUpstream } from '../support/upstream.ts';

const artifacts = join(import.meta.dirname, '../../.keygate/artifacts');
const desk = { width: 1280, height: 900 };
const phone = { width: 390, height: 844 };
/** Of the load that the pictures show; a chart is not worth looking at before. */
const loadSeconds = 8;

describe('the status page', { timeout: 110_000 }, () => {
  const fixtures = new AsyncDisposableStack();
  const stopping = new AbortController();
  let token: ProvisionedToken;
  let document: KeygateDocument;
  let keygate: Keygate;
  let browser: Browser;

  before(async () => {
    mkdirSync(artifacts, { recursive: true });
    token = fixtures.use(await provisionedToken({ www: { kind: 'p256' }, shop: { kind: 'rsa2048' } }));
    const echo = fixtures.use(await echoUpstream());
    const chains = await issueChains(token);
    document = {
      workers: 2,
      certificates: {
        www: { chain: chains.long, key: 'pkcs11:object=www' },
        soon: { chain: chains.soon, key: 'pkcs11:object=www' },
        shop: { chain: chains.shop, key: 'pkcs11:object=shop' },
      },
      upstreams: {
        web: { servers: [echo.address, `127.0.0.1:${await closedPort()}`], passive: { ejection: '1m' } },
      },
      listeners: {
        https: { certificates: ['www', 'soon'] },
        shop: { certificates: ['shop'], limits: { connections: 8 } },
      },
    };
    keygate = fixtures.use(await startKeygate(token, document));
    browser = await launch();
    fixtures.defer(async () => browser.close());
    const loads = Promise.all([load(keygate, stopping.signal), load(keygate, stopping.signal)]);
    fixtures.defer(async () => {
      stopping.abort();
      await loads;
    });
    await pause(loadSeconds * 1000, undefined, { signal: stopping.signal });
  });
  after(async () => fixtures.disposeAsync());

  for (const colorScheme of ['light', 'dark'] as const) {
    it(`shows everything at a glance, ${colorScheme}, and obeys its policy`, async () => {
      await using tab = await open(browser, keygate, { colorScheme, viewport: desk });
      const { page } = tab;
      await page.waitForSelector('#freshness.live');
      assert.equal(await page.title(), 'ready · keygate');
      assert.equal(await page.textContent('#verdict-word'), 'Ready');
      assert.match(
        await page.innerText('#verdict-reason'),
        /^2 of 2 workers, 1 of 1 tokens, 1 of 2 upstream servers up$/,
      );
      assert.match(await page.innerText('#attention'), /Certificate soon: 4 days left/);
      assert.match(await rowOf(page, 'tokens', 'hsm'), /up.*\d+ busy · \d+ idle.*\/s.*(?:ms|µs)/);
      assert.match(await rowOf(page, 'listeners', 'https'), /127\.0\.0\.1:\d+.*\d+ of 40k.*\/s.*B\/s/);
      assert.match(await rowOf(page, 'certificates', 'soon'), /^soon 4 days left/);
      assert.equal(await page.locator('#certificates .pill.bad').count(), 1);
      assert.match(await page.innerText('#servers'), /web\s+127\.0\.0\.1:\d+\s+up[^]*web\s+127\.0\.0\.1:\d+\s+down/);
      assert.equal(await page.locator('#workers tbody tr').count(), 2);
      assert.match(await rowOf(page, 'failures', 'client/handshake/plain_http'), /The client spoke plain HTTP/);
      assert.match(await rowOf(page, 'endings', 'client/relay/closed'), /Normal/);
      assert.equal(await page.locator('#failures th:text("client/relay/closed")').count(), 0);
      // The numbers move.
      const before = await page.textContent('#endings tbody td');
      const first = await page.innerText('#tile-handshakes');
      await until('other number of handshakes', async () => (await page.innerText('#tile-handshakes')) !== first);
      await until('other count', async () => (await page.innerText('#endings tbody')) !== before);
      // A page that was just opened has the minutes before it.
      const label = (await page.getAttribute('#chart-handshakes .plot', 'aria-label')) ?? '';
      assert.match(label, /^Handshakes per second over the last ten minutes; now [\d.]+k? and [\d.]+/);
      assert.ok((await inkOf(page, '#chart-handshakes canvas')) > 500, 'the chart is empty');
      assert.equal(await page.evaluate('document.documentElement.scrollWidth <= innerWidth'), true);
      await page.screenshot({ path: join(artifacts, `status-${colorScheme}.png`), fullPage: true });
      tab.assertClean();
    });
  }

  it('can be read on a phone', async () => {
    await using tab = await open(browser, keygate, { viewport: phone, colorScheme: 'light', deviceScaleFactor: 2 });
    const { page } = tab;
    await page.waitForSelector('#freshness.live');
    assert.equal(
      await page.evaluate('document.documentElement.scrollWidth <= innerWidth'),
      true,
      'it scrolls sideways',
    );
    await page.screenshot({ path: join(artifacts, 'status-phone.png'), fullPage: true });
    await page.screenshot({ path: join(artifacts, 'status-phone-top.png') });
    tab.assertClean();
  });

  it('changes its colours with the theme, charts too', async () => {
    await using tab = await open(browser, keygate, { viewport: desk, colorScheme: 'light' });
    const { page } = tab;
    await page.waitForSelector('.uplot');
    const light = await page.evaluate('getComputedStyle(document.body).backgroundColor');
    await page.emulateMedia({ colorScheme: 'dark' });
    assert.notEqual(await page.evaluate('getComputedStyle(document.body).backgroundColor'), light);
    await page.waitForSelector('.uplot');
    tab.assertClean();
  });

  it('shows what it is told as the text that it is', async () => {
    await using tab = await open(browser, keygate, { viewport: desk });
    const { page } = tab;
    await page.waitForSelector('#freshness.live');
    const { status } = await keygate.reload({ ...document, '<img src=x onerror=alert(1)>': 1 });
    assert.equal(status, 422);
    await page.waitForSelector('#attention :text("The last reload was refused")');
    assert.match(await page.innerText('#attention'), /<img src=x onerror=alert\(1\)>/);
    assert.equal(await page.locator('main img').count(), 0);
    assert.equal((await keygate.reload(document)).status, 200);
    await page.waitForSelector('#attention :text("The last reload was refused")', { state: 'detached' });
    assert.match(await page.innerText('#fact-reload'), /^committed at \d\d:\d\d:\d\d$/);
    tab.assertClean();
  });

  it('says that what it shows is old while keygate is silent, and is live again when it speaks', async () => {
    await using tab = await open(browser, keygate, { viewport: desk });
    const { page } = tab;
    await page.waitForSelector('#freshness.live');
    process.kill(keygate.pid, 'SIGSTOP');
    try {
      await page.waitForSelector('#freshness.stale');
      assert.match(
        await page.innerText('#stale'),
        /^No answer from keygate\. What is below is old: it is of \d\d:\d\d:\d\d\./,
      );
      assert.equal(await page.title(), 'stale · keygate');
      await page.screenshot({ path: join(artifacts, 'status-stale.png'), fullPage: true });
    } finally {
      process.kill(keygate.pid, 'SIGCONT');
    }
    await page.waitForSelector('#freshness.live');
    assert.equal(await page.locator('#stale').isVisible(), false);
    tab.assertClean();
  });

  it('leaves its connections when it is not looked at', async () => {
    await using tab = await open(browser, keygate, { viewport: desk });
    const { page } = tab;
    await page.waitForSelector('#freshness.live');
    await page.evaluate(`
      Object.defineProperty(document, 'hidden', { value: true, configurable: true });
      document.dispatchEvent(new Event('visibilitychange'));
    `);
    await page.waitForSelector('#freshness.stale');
    await page.evaluate(`
      delete document.hidden;
      document.dispatchEvent(new Event('visibilitychange'));
    `);
    await page.waitForSelector('#freshness.live');
    tab.assertClean();
  });

  it('says why keygate is not ready, and stays, as old, when it has stopped', async () => {
    await using tab = await open(browser, keygate, { viewport: desk });
    const { page } = tab;
    await page.waitForSelector('#freshness.live');
    stopping.abort();
    const held = await tlsClient({ port: keygate.port() });
    await keygate.admin('/drain', 'POST');
    await page.waitForSelector('.verdict.bad');
    assert.equal(await page.title(), 'NOT READY · keygate');
    assert.match(await page.innerText('.verdict-text'), /^Not ready\s+draining/);
    await page.screenshot({ path: join(artifacts, 'status-not-ready.png') });
    held.destroy();
    await keygate.stop();
    await page.waitForSelector('#board.stale');
    assert.equal(await page.title(), 'stale · keygate');
    assert.ok(await page.locator('#tokens tbody tr').isVisible());
  });
});

describe('the status page of an admin server with a token', { timeout: 60_000 }, () => {
  const fixtures = new AsyncDisposableStack();
  const secret = 'a-token-of-many-characters';
  let keygate: Keygate;
  let browser: Browser;

  before(async () => {
    const token = fixtures.use(await provisionedToken({ www: { kind: 'p256' } }));
    const echo = fixtures.use(await echoUpstream());
    const file = join(token.directory, 'admin-token');
    writeFileSync(file, `${secret}\n`, { mode: 0o600 });
    keygate = fixtures.use(
      await startKeygate(token, {
        admin: { listen: '127.0.0.1:0', token: { file } },
        upstreams: { web: { servers: [echo.address] } },
        listeners: { https: {} },
      }),
    );
    browser = await launch();
    fixtures.defer(async () => browser.close());
  });
  after(async () => fixtures.disposeAsync());

  it('asks for the token, keeps it for the tab, and forgets it', async () => {
    await using tab = await open(browser, keygate, { viewport: desk });
    const { page } = tab;
    await page.waitForSelector('#sign-in');
    assert.equal(await page.locator('#board').isVisible(), false);
    await page.screenshot({ path: join(artifacts, 'status-sign-in.png') });
    await page.fill('#token', 'another-token-of-many-characters');
    await page.keyboard.press('Enter');
    await page.waitForSelector('#sign-in-failure:not(:empty)');
    assert.equal(await page.locator('#board').isVisible(), false);
    await page.fill('#token', secret);
    await page.keyboard.press('Enter');
    await page.waitForSelector('#freshness.live');
    assert.equal(await page.textContent('#verdict-word'), 'Ready');
    await page.reload();
    await page.waitForSelector('#freshness.live');
    await page.click('#sign-out');
    await page.waitForSelector('#sign-in');
    assert.equal(await page.evaluate('sessionStorage.length'), 0);
    assert.equal(await page.locator('#board').isVisible(), false);
    // Chromium itself writes a line for each answer of 401.
    tab.assertClean((line) => !line.includes('401'));
  });
});

/** A year, days, and what the token was made with. */
async function issueChains(token: ProvisionedToken): Promise<Record<'long' | 'soon' | 'shop', string>> {
  const issue = async (name: string, days: number, key: string) =>
    token.use(async (opened) => {
      const chain = join(token.directory, `${name}.pem`);
      const names = { dns: [`${name}.test`], ip: [] };
      writeFileSync(chain, await createSelfSigned(opened, findPrivateKey(opened, { object: key }), names, days));
      return chain;
    });
  return {
    long: await issue('long', 365, 'www'),
    soon: await issue('soon', 5, 'www'),
    shop: token.certificates['shop']?.chain ?? '',
  };
}

/** Full and resumed handshakes, bytes both ways, connections that stay a while, and clients that do not speak TLS. */
async function load(keygate: Keygate, signal: AbortSignal): Promise<void> {
  const ports = [keygate.port('https'), keygate.port('shop')];
  let session: Buffer | undefined;
  for (let round = 0; !signal.aborted; round += 1) {
    try {
      const [port = 0] = round % 5 === 0 ? ports.slice(1) : ports;
      const isResumed = round % 3 !== 0 && session !== undefined && port === ports[0];
      const client = await tlsClient({ port, ...(isResumed ? { session } : {}) });
      client.once('session', (ticket) => {
        if (port === ports[0]) session = ticket;
      });
      client.write(Buffer.alloc(1024 * (1 + (round % 64))));
      client.once('data', () => setTimeout(() => client.end(), (round % 7) * 40));
      client.resume();
      if (round % 25 === 0) await answerTo(ports[0] ?? 0, Buffer.from('GET / HTTP/1.1\r\nHost: x\r\n\r\n'));
    } catch {
      // keygate was stopped under it
    }
    await pause(4 + 12 * Math.abs(Math.sin(round / 90)), undefined, { signal }).catch(() => {});
  }
}

async function launch(): Promise<Browser> {
  return chromium.launch({
    executablePath: process.env['CHROMIUM'] ?? '/usr/bin/chromium',
    args: ['--no-sandbox', '--disable-gpu', '--no-proxy-server'],
  });
}

interface Tab extends AsyncDisposable {
  readonly page: Page;
  /** Fails for errors, for what the policy forbade, and for requests to anywhere else. */
  assertClean(isWrong?: (line: string) => boolean): void;
}

async function open(browser: Browser, keygate: Keygate, options: BrowserContextOptions): Promise<Tab> {
  const context = await browser.newContext(options);
  const page = await context.newPage();
  const origin = `http://${keygate.adminAddress}`;
  const wrong: string[] = [];
  page.on('console', (message) => {
    if (['error', 'warning'].includes(message.type())) wrong.push(message.text());
  });
  page.on('pageerror', (error) => wrong.push(String(error)));
  page.on('request', (request) => {
    if (!request.url().startsWith(`${origin}/`)) wrong.push(`a request to ${request.url()}`);
  });
  await page.exposeFunction('violated', (what: string) => wrong.push(what));
  await page.addInitScript(`
    document.addEventListener('securitypolicyviolation', (event) =>
      violated(event.violatedDirective + ' ' + event.blockedURI));
  `);
  await page.goto(`${origin}/status`);
  return {
    page,
    assertClean: (isWrong = () => true) => assert.deepEqual(wrong.filter(isWrong), []),
    [Symbol.asyncDispose]: async () => context.close(),
  };
}

async function rowOf(page: Page, table: string, name: string): Promise<string> {
  const row = page.locator(`#${table} tbody tr`, { has: page.locator('th', { hasText: new RegExp(`^${name}$`) }) });
  return (await row.innerText()).replaceAll(/\s+/g, ' ').trim();
}

/** How many pixels of a canvas are painted. */
async function inkOf(page: Page, canvas: string): Promise<number> {
  return Number(
    await page.evaluate(`
      (() => {
        const canvas = document.querySelector(${JSON.stringify(canvas)});
        const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
        let painted = 0;
        for (let index = 3; index < data.length; index += 4) if (data[index] !== 0) painted += 1;
        return painted;
      })()`),
  );
}

/** Where nobody listens. */
async function closedPort(): Promise<number> {
  const server = createServer();
  const { promise, resolve } = Promise.withResolvers<void>();
  server.listen(0, '127.0.0.1', resolve);
  await promise;
  const { port } = server.address() as AddressInfo;
  server.close();
  return port;
}
