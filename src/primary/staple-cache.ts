/**
 * Owns: OCSP responses on disk, one file for each certificate, so that keygate has them when it starts without a network.
 * Must not know: whether they can be believed: whoever reads one verifies it like one from the network.
 * Runs: main thread of the primary. Files are small; the one read per certificate, at start, is synchronous.
 */
import { readFileSync } from 'node:fs';
import { mkdir, open, readdir, rename, rm, stat } from 'node:fs/promises';
import { join } from 'node:path';
import { responseBytesMax } from '../ocsp/response.ts';

/** No response holds that long; what is older is of a certificate that is served no more. */
const fileAgeMsMax = 60 * 86_400_000;

export class StapleCache {
  readonly #directory: string;

  /** @param directory made by the first write when it is not there. */
  constructor(directory: string) {
    this.#directory = directory;
  }

  /** @returns undefined when there is none, or none that can be read. */
  read(certificate: Buffer): Buffer | undefined {
    try {
      const bytes = readFileSync(this.#path(certificate));
      return bytes.length > responseBytesMax ? undefined : bytes;
    } catch {
      return undefined;
    }
  }

  /** A reader sees the former file or this one, also after a crash. @throws what the file system says */
  async write(certificate: Buffer, response: Buffer): Promise<void> {
    await mkdir(this.#directory, { recursive: true, mode: 0o750 });
    const path = this.#path(certificate);
    const unfinished = `${path}.${process.pid}.new`;
    try {
      const file = await open(unfinished, 'w', 0o640);
      try {
        await file.writeFile(response);
        await file.sync();
      } finally {
        await file.close();
      }
      await rename(unfinished, path);
    } catch (error) {
      await rm(unfinished, { force: true });
      throw error;
    }
  }

  /** Removes files of ours that nobody has written for long. What cannot be removed stays. */
  async prune(): Promise<void> {
    const names = await readdir(this.#directory).catch(() => []);
    for (const name of names.filter((each) => ownName.test(each))) {
      const path = join(this.#directory, name);
      const { mtimeMs } = await stat(path).catch(() => ({ mtimeMs: Date.now() }));
      if (Date.now() - mtimeMs > fileAgeMsMax) await rm(path, { force: true }).catch(() => {});
    }
  }

  #path(certificate: Buffer): string {
    return join(this.#directory, `${certificate.toString('hex')}.ocsp`);
  }
}

const ownName = /^[0-9a-f]{64}\.ocsp(?:\.\d+\.new)?$/;
