/**
 * Owns: the pages that are open at /status: how many there may be, what they are sent, and that a slow one is dropped.
 * Must not know: what an overview holds; who may open one.
 * Runs: main thread of the primary.
 *
 * Server-sent events (WHATWG HTML 9.2): first `history`, then `overview` each time something was measured, which is also
 * what keeps the connection alive.
 */
import type { ServerResponse } from 'node:http';

/** Less than the admin server's connections: scrapes and probes must get in. */
export const pagesMax = 16;
/** What a page may have not taken yet; one that reads nothing is cut off in seconds. */
const unsentBytesMax = 1024 * 1024;

interface Source {
  /** Of the last minutes. */
  history(): object;
  /** As of now. */
  overview(): object;
}

export class StatusFeed {
  readonly #source: Source;
  readonly #pages = new Set<ServerResponse>();

  constructor(source: Source) {
    this.#source = source;
  }

  get isFull(): boolean {
    return this.#pages.size >= pagesMax;
  }

  /** Its headers have been sent, and nothing else. */
  add(page: ServerResponse): void {
    // Others that asked at the same time came first.
    if (this.isFull) return void page.end();
    this.#pages.add(page);
    page.once('close', () => this.#pages.delete(page));
    page.write(event('history', this.#source.history()) + event('overview', this.#source.overview()));
  }

  /** Something was measured. */
  announce(): void {
    if (this.#pages.size === 0) return;
    const news = event('overview', this.#source.overview());
    for (const page of this.#pages) {
      if (page.writableLength > unsentBytesMax) this.#cut(page);
      else page.write(news);
    }
  }

  #cut(page: ServerResponse): void {
    this.#pages.delete(page);
    page.destroy();
  }

  /** Whoever may go on opens a new one. */
  end(): void {
    for (const page of this.#pages) page.end();
    this.#pages.clear();
  }
}

function event(name: string, data: object): string {
  return `event: ${name}\ndata: ${JSON.stringify(data)}\n\n`;
}
