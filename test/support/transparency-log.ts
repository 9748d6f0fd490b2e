/**
 * Owns: small logs of Certificate Transparency (RFC 6962): keys that sign what they are shown, and the list that names them.
 * Must not know: certificates; authority.ts puts SCTs into them.
 * Runs: in test processes.
 */
import { createHash, generateKeyPairSync, sign } from 'node:crypto';

export class TransparencyLog {
  readonly operator: string;
  /** SubjectPublicKeyInfo, DER. */
  readonly key: Buffer;
  readonly id: Buffer;
  readonly #privateKey;

  constructor(operator: string) {
    const { publicKey, privateKey } = generateKeyPairSync('ec', { namedCurve: 'P-256' });
    this.operator = operator;
    this.key = publicKey.export({ format: 'der', type: 'spki' });
    this.id = createHash('sha256').update(this.key).digest();
    this.#privateKey = privateKey;
  }

  /** An SCT for a certificate as it is without the list of SCTs (RFC 6962 3.2). */
  signPrecertificate(issuerSpki: Buffer, tbs: Buffer, at = new Date(Date.now() - 3_600_000)): Buffer {
    const timestamp = Buffer.alloc(8);
    timestamp.writeBigUInt64BE(BigInt(at.getTime()));
    const length = Buffer.alloc(3);
    length.writeUIntBE(tbs.length, 0, 3);
    const issuer = createHash('sha256').update(issuerSpki).digest();
    const noExtensions = Buffer.from([0, 0]);
    const signed = Buffer.concat([
      Buffer.from([0, 0]),
      timestamp,
      Buffer.from([0, 1]),
      issuer,
      length,
      tbs,
      noExtensions,
    ]);
    const signature = sign('sha256', signed, this.#privateKey);
    return Buffer.concat([Buffer.from([0]), this.id, timestamp, noExtensions, Buffer.from([4, 3]), vector(signature)]);
  }
}

/** A SignedCertificateTimestampList (RFC 6962 3.3). */
export function sctList(scts: readonly Buffer[]): Buffer {
  return vector(Buffer.concat(scts.map(vector)));
}

/** A list in Google's format, version 3. `state` of the logs: `usable` and the like. */
export function logList(logs: readonly TransparencyLog[], state = 'usable', parts: object = {}): string {
  return JSON.stringify({
    version: '1.0',
    log_list_timestamp: new Date().toISOString(),
    operators: logs.map(({ operator, id, key }) => ({
      name: operator,
      logs: [
        {
          description: `a log of ${operator}`,
          log_id: id.toString('base64'),
          key: key.toString('base64'),
          url: 'https://log.test/',
          mmd: 86_400,
          state: { [state]: { timestamp: '2024-01-01T00:00:00Z' } },
          ...parts,
        },
      ],
      tiled_logs: [],
    })),
  });
}

/** `opaque<0..2^16-1>` (RFC 5246 4.3). */
function vector(bytes: Buffer): Buffer {
  const length = Buffer.alloc(2);
  length.writeUInt16BE(bytes.length);
  return Buffer.concat([length, bytes]);
}
