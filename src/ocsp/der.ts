/**
 * Owns: taking DER apart where the bytes themselves count: what is hashed or signed is never encoded anew.
 * Must not know: what the elements mean.
 * Runs: everywhere.
 */

/** One element (X.690 8.1): `whole` with its tag and length, `content` without. */
export interface DerElement {
  readonly tag: number;
  readonly whole: Buffer;
  readonly content: Buffer;
}

export const tags = { integer: 0x02, bitString: 0x03, octetString: 0x04, oid: 0x06, sequence: 0x30 } as const;

/** The explicit context tag [number]. */
export const contextTag = (number: number): number => 0xa0 + number;

/**
 * The elements that `bytes` consist of, with nothing behind the last one.
 * @throws RangeError for anything else, such as an indefinite length
 */
export function derElements(bytes: Buffer): DerElement[] {
  const elements: DerElement[] = [];
  for (let start = 0; start < bytes.length;) {
    const tag = bytes.readUInt8(start);
    if ((tag & 0x1f) === 0x1f) throw new RangeError('a tag of more than one byte');
    let length = bytes.readUInt8(start + 1);
    let content = start + 2;
    if (length >= 0x80) {
      const lengthBytes = length - 0x80;
      if (lengthBytes < 1 || lengthBytes > 4) throw new RangeError('a length that DER does not have');
      length = bytes.readUIntBE(content, lengthBytes);
      content += lengthBytes;
    }
    const end = content + length;
    if (end > bytes.length) throw new RangeError('an element that does not end');
    elements.push({ tag, whole: bytes.subarray(start, end), content: bytes.subarray(content, end) });
    start = end;
  }
  return elements;
}

/** @throws RangeError unless `bytes` are exactly one element with that tag */
export function derElement(bytes: Buffer, tag: number): DerElement {
  const [element, ...others] = derElements(bytes);
  if (element?.tag !== tag || others.length > 0) throw new RangeError('not the element that must be here');
  return element;
}
