/**
 * Owns: records of TLS 1.3 that no client would send, encrypted as the server expects them: the keys are those of a real client.
 * Must not know: what the server makes of them.
 * Runs: in test processes.
 */
import assert from 'node:assert/strict';
import { createCipheriv, createHmac } from 'node:crypto';
import { once } from 'node:events';
import { handshakeMessage, prefixed, tappedClient } from './tls-client.ts';
import type { TappedClient, TlsOptions } from './tls-client.ts';

export const contentTypes = { alert: 21, handshake: 22, applicationData: 23 } as const;

/** A client that has shaken hands and must not send by itself any more. */
export interface Forger extends TappedClient {
  /** The next record: `content`, of any length, encrypted. */
  record(contentType: number, content: Buffer): Buffer;
  /** A key update that wants one of the server (RFC 8446 4.6.3); what follows is under the next key. */
  updateKey(): Buffer;
}

export async function forger(options: TlsOptions): Promise<Forger> {
  const client = await tappedClient({ ...options, ciphers: 'TLS_AES_128_GCM_SHA256', minVersion: 'TLSv1.3' });
  let secret: Buffer | undefined;
  client.tls.on('keylog', (line: Buffer) => {
    const [label, , hex = ''] = line.toString().trim().split(' ');
    if (label === 'CLIENT_TRAFFIC_SECRET_0') secret = Buffer.from(hex, 'hex');
  });
  await once(client.tls, 'secureConnect');
  client.tls.on('error', () => {});
  assert.ok(secret !== undefined, 'no secret of the client');
  let [current, sequence] = [secret, 0n];
  const forged: Forger = {
    ...client,
    updateKey() {
      const update = forged.record(contentTypes.handshake, handshakeMessage(24, Buffer.from([1])));
      [current, sequence] = [expandLabel(current, 'traffic upd', 32), 0n];
      return update;
    },
    record(contentType, content) {
      const key = expandLabel(current, 'key', 16);
      const iv = expandLabel(current, 'iv', 12);
      const nonce = Buffer.from(iv);
      nonce.writeBigUInt64BE(nonce.readBigUInt64BE(4) ^ sequence, 4);
      sequence += 1n;
      // RFC 8446 5.2
      const header = Buffer.from([contentTypes.applicationData, 3, 3, 0, 0]);
      header.writeUInt16BE(content.length + 1 + 16, 3);
      const cipher = createCipheriv('aes-128-gcm', key, nonce).setAAD(header);
      const encrypted = [cipher.update(content), cipher.update(Buffer.from([contentType])), cipher.final()];
      return Buffer.concat([header, ...encrypted, cipher.getAuthTag()]);
    },
  };
  return forged;
}

/** HKDF-Expand-Label (RFC 8446 7.1) of what one block of SHA-256 gives. */
function expandLabel(secret: Buffer, label: string, bytes: number): Buffer {
  const info = Buffer.concat([
    Buffer.from([0, bytes]),
    prefixed(1, Buffer.from(`tls13 ${label}`)),
    Buffer.from([0, 1]),
  ]);
  return createHmac('sha256', secret).update(info).digest().subarray(0, bytes);
}
