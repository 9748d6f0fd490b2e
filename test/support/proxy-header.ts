/**
 * Owns: reading PROXY protocol headers, versions 1 and 2, as strictly as HAProxy's document "The PROXY protocol" (sections
 * 2.1 and 2.2) states them. What breaks a rule throws.
 * Must not know: who sent them. Written from the document and not from the engine, so that it can judge the engine.
 * Runs: in test processes.
 */
import assert from 'node:assert/strict';

export interface ProxyHeader {
  readonly version: 1 | 2;
  /** Length of the header: the client's bytes begin there. */
  readonly bytes: number;
  readonly family: 'TCP4' | 'TCP6' | 'UNKNOWN';
  readonly source?: string;
  readonly sourcePort?: number;
  readonly destination?: string;
  readonly destinationPort?: number;
  /** By type, version 2 only. */
  readonly tlvs: ReadonlyMap<number, Buffer>;
  readonly ssl?: ProxySsl;
}

export interface ProxySsl {
  readonly client: number;
  readonly verify: number;
  readonly tlvs: ReadonlyMap<number, Buffer>;
}

/** Types of TLVs (section 2.2.7). */
export const proxyTlv = {
  alpn: 0x01,
  authority: 0x02,
  crc32c: 0x03,
  noop: 0x04,
  uniqueId: 0x05,
  ssl: 0x20,
  /** Keygate's own (section 2.2.8 leaves these to applications). */
  clientUri: 0xe6,
} as const;
/** Types within the SSL TLV (section 2.2.6). */
export const proxySslTlv = {
  version: 0x21,
  commonName: 0x22,
  cipher: 0x23,
  signatureAlgorithm: 0x24,
  keyAlgorithm: 0x25,
  clientCertificate: 0x28,
} as const;

/** Undefined while the header is not complete. */
export function parseProxyHeader(received: Buffer): ProxyHeader | undefined {
  const isVersion2 = signature.subarray(0, received.length).equals(received.subarray(0, signature.length));
  return isVersion2 ? parseVersion2(received) : parseVersion1(received);
}

const signature = Buffer.from('0d0a0d0a000d0a515549540a', 'hex');

function parseVersion1(received: Buffer): ProxyHeader | undefined {
  const end = received.indexOf('\r\n');
  if (end === -1) {
    assert.ok(received.length < 107, 'a version 1 header ends within 107 bytes');
    return undefined;
  }
  const line = received.toString('latin1', 0, end);
  const [, family, source, destination, sourcePort, destinationPort] =
    /^PROXY (?:UNKNOWN|(TCP[46]) (\S+) (\S+) (\d+) (\d+))$/.exec(line) ??
    assert.fail(`malformed: ${JSON.stringify(line)}`);
  const common = { version: 1, bytes: end + 2, tlvs: new Map() } as const;
  if (family === undefined) return { ...common, family: 'UNKNOWN' };
  return {
    ...common,
    family: family as 'TCP4' | 'TCP6',
    source: source ?? '',
    destination: destination ?? '',
    sourcePort: Number(sourcePort),
    destinationPort: Number(destinationPort),
  };
}

function parseVersion2(received: Buffer): ProxyHeader | undefined {
  if (received.length < 16) return undefined;
  assert.equal(received[12], 0x21, 'version 2, command PROXY');
  const bytes = 16 + received.readUInt16BE(14);
  if (received.length < bytes) return undefined;
  const header = received.subarray(0, bytes);
  const { family, addressBytes } = families[received[13] ?? 0] ?? assert.fail(`unexpected family ${received[13]}`);
  const end = 16 + 2 * addressBytes;
  const addresses =
    family === 'UNKNOWN'
      ? {}
      : {
          source: formatIp(header.subarray(16, 16 + addressBytes)),
          destination: formatIp(header.subarray(16 + addressBytes, end)),
          sourcePort: header.readUInt16BE(end),
          destinationPort: header.readUInt16BE(end + 2),
        };
  const tlvs = parseTlvs(header.subarray(family === 'UNKNOWN' ? end : end + 4));
  const crc = tlvs.get(proxyTlv.crc32c);
  if (crc !== undefined)
    assert.equal(crc.readUInt32BE(), crc32c(withoutChecksum(header, crc)), 'the CRC32C of the header');
  const ssl = tlvs.get(proxyTlv.ssl);
  return {
    version: 2,
    bytes,
    family,
    ...addresses,
    tlvs,
    ...(ssl === undefined
      ? {}
      : { ssl: { client: ssl.readUInt8(0), verify: ssl.readUInt32BE(1), tlvs: parseTlvs(ssl.subarray(5)) } }),
  };
}

/** Section 2.2: family in the high four bits, protocol in the low four. */
const families: Readonly<Record<number, { readonly family: ProxyHeader['family']; readonly addressBytes: number }>> = {
  0x00: { family: 'UNKNOWN', addressBytes: 0 },
  0x11: { family: 'TCP4', addressBytes: 4 },
  0x21: { family: 'TCP6', addressBytes: 16 },
};

function parseTlvs(bytes: Buffer): Map<number, Buffer> {
  const tlvs = new Map<number, Buffer>();
  for (let offset = 0; offset < bytes.length;) {
    const type = bytes.readUInt8(offset);
    const end = offset + 3 + bytes.readUInt16BE(offset + 1);
    assert.ok(end <= bytes.length, `TLV ${type} is longer than the header`);
    assert.ok(!tlvs.has(type) || type === proxyTlv.noop, `TLV ${type} twice`);
    tlvs.set(type, bytes.subarray(offset + 3, end));
    offset = end;
  }
  return tlvs;
}

function formatIp(bytes: Buffer): string {
  if (bytes.length === 4) return bytes.join('.');
  const groups = Array.from({ length: 8 }, (_, index) => bytes.readUInt16BE(index * 2).toString(16));
  return new URL(`http://[${groups.join(':')}]`).hostname.slice(1, -1);
}

/** The checksum is computed over the header with its own four bytes zero (section 2.2.3). */
function withoutChecksum(header: Buffer, crc: Buffer): Buffer {
  const copy = Buffer.from(header);
  copy.fill(0, crc.byteOffset - header.byteOffset, crc.byteOffset - header.byteOffset + 4);
  return copy;
}

/** CRC-32C (RFC 3720 12.1), bit by bit: a header is short. */
function crc32c(bytes: Buffer): number {
  let crc = 0xffffffff;
  for (const byte of bytes) {
    crc ^= byte;
    for (let bit = 0; bit < 8; bit += 1) crc = crc & 1 ? (crc >>> 1) ^ 0x82f63b78 : crc >>> 1;
  }
  return ~crc >>> 0;
}
