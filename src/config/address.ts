/**
 * Owns: addresses as people write them: `host:port`, `[v6]:port`, `unix:/path`.
 * Must not know: what listens or connects there; name resolution.
 * Runs: everywhere.
 */
import { isIP, isIPv4, isIPv6, SocketAddress } from 'node:net';
import type { ServerAddress, TcpAddress, UnixAddress } from './config.ts';
import type { Fault, Parsed } from './fault.ts';

/** sun_path holds 108 bytes with the final zero (unix(7)). */
const unixPathBytesMax = 107;

/** An IP address and a port, 0 for any free port. IPv6 comes out in its canonical form (RFC 5952). */
export function parseBindAddress(text: string): Parsed<TcpAddress> {
  const expected = 'IP-ADDRESS:PORT such as 0.0.0.0:443 or [::]:443';
  const parsed = parseTcpAddress(text, 0);
  if ('fault' in parsed) return { fault: { ...parsed.fault, expected } };
  if (isIPv4(parsed.value.host) || isIPv6(parsed.value.host)) return parsed;
  return { fault: { expected, hint: 'listeners bind addresses, not names' } };
}

/** A server: an IP address or a DNS name with a port, a unix socket, or the word for the original destination. */
export function parseServerAddress(text: string): Parsed<ServerAddress> {
  if (text === 'original') return { value: { original: true } };
  return text.startsWith('unix:') ? parseUnixAddress(text) : parseTcpAddress(text, 1);
}

/** Where a resolver listens: an IP address and a port. */
export function parseResolverAddress(text: string): Parsed<TcpAddress> {
  const expected = 'IP-ADDRESS:PORT such as 127.0.0.1:53 or [::1]:53';
  const parsed = parseTcpAddress(text, 1);
  if ('fault' in parsed) return { fault: { ...parsed.fault, expected } };
  if (isIP(parsed.value.host) !== 0) return parsed;
  return { fault: { expected, hint: 'a name would have to be resolved first' } };
}

/** Where the admin server listens: an address of this host or a unix socket. */
export function parseAdminAddress(text: string): Parsed<TcpAddress | UnixAddress> {
  if (text.startsWith('unix:')) return parseUnixAddress(text);
  const parsed = parseBindAddress(text);
  if ('value' in parsed) return parsed;
  return { fault: { ...parsed.fault, expected: 'IP-ADDRESS:PORT such as 127.0.0.1:9180, or unix:/path' } };
}

/** Whether only who is on this host can connect there. */
export function isLocal(address: TcpAddress | UnixAddress): boolean {
  if ('path' in address) return true;
  return address.host === '::1' || (isIPv4(address.host) && address.host.startsWith('127.'));
}

/** `http://host:port`: where an HTTP proxy is. */
export function parseProxyUrl(text: string): Parsed<TcpAddress> {
  const expected = 'http://HOST:PORT such as http://proxy.internal:3128';
  if (/@/.test(text)) {
    return {
      fault: {
        code: 'config_secret',
        found: 'a URL with a user in it',
        expected,
        hint: 'a proxy that asks for a password is not supported',
      },
    };
  }
  const [, address] = /^http:\/\/([^/]*)\/?$/i.exec(text) ?? [];
  const parsed = address === undefined ? undefined : parseTcpAddress(address, 1);
  return parsed === undefined || 'fault' in parsed ? { fault: { expected } } : parsed;
}

/**
 * An IP network, `192.0.2.0/24`, or a single address. It comes out as a network in canonical form; bits beyond the prefix
 * are refused: they may be a mistyped prefix, and more is believed of those networks than of others.
 */
export function parseNetwork(text: string): Parsed<string> {
  const expected = 'a network such as 192.0.2.0/24 or 2001:db8::/32, or an IP address';
  const match = /^(?<address>[0-9A-Fa-f:.]+)(?:\/(?<prefix>0|[1-9][0-9]{0,2}))?$/.exec(text);
  const { address = '', prefix } = match?.groups ?? {};
  if (!isIPv4(address) && !isIPv6(address)) return { fault: { expected } };
  const family = isIPv4(address) ? 'ipv4' : 'ipv6';
  const width = family === 'ipv4' ? 32 : 128;
  const bits = Number(prefix ?? width);
  if (bits > width) return { fault: { expected: `${expected}; a prefix of at most ${width}` } };
  const hostBits = BigInt(width - bits);
  const value = numberOf(address, family);
  if ((value >> hostBits) << hostBits !== value) {
    return { fault: { expected, hint: `${text} has bits beyond its prefix: write the network's own address` } };
  }
  return { value: `${new SocketAddress({ address, family }).address}/${bits}` };
}

function numberOf(address: string, family: 'ipv4' | 'ipv6'): bigint {
  if (family === 'ipv4') return address.split('.').reduce((value, part) => (value << 8n) | BigInt(part), 0n);
  // The URL parser writes an IPv4 address at the end in hexadecimal too.
  const [, plain = ''] = /^\[(.*)\]$/.exec(new URL(`http://[${address}]`).hostname) ?? [];
  const [head = '', tail] = plain.split('::');
  const groups = (part: string) => (part === '' ? [] : part.split(':'));
  const [before, after] = [groups(head), groups(tail ?? '')];
  const zeros = Array.from({ length: 8 - before.length - after.length }, () => '0');
  return [...before, ...zeros, ...after].reduce((value, part) => (value << 16n) | BigInt(`0x${part}`), 0n);
}

/** `192.0.2.1:443`, `[2001:db8::1]:443`, `unix:/run/web.sock`, `original`. */
export function formatAddress(address: ServerAddress): string {
  if ('original' in address) return 'original';
  if ('path' in address) return `unix:${address.path}`;
  return address.host.includes(':') ? `[${address.host}]:${address.port}` : `${address.host}:${address.port}`;
}

function parseTcpAddress(text: string, portMin: 0 | 1): Parsed<TcpAddress> {
  const fault: Fault = { expected: 'HOST:PORT such as 10.0.0.1:8080, [::1]:8080 or web.internal:8080, or unix:/path' };
  const match = /^(?:\[(?<v6>[0-9A-Fa-f:.]+)\]|(?<host>[^[\]:\s/]+)):(?<port>0|[1-9][0-9]{0,4})$/.exec(text);
  if (match?.groups === undefined) return { fault };
  const { v6, host, port } = match.groups;
  const portNumber = Number(port);
  if (portNumber < portMin || portNumber > 65_535)
    return { fault: { ...fault, expected: `a port from ${portMin} to 65535` } };
  if (v6 !== undefined) {
    if (!isIPv6(v6)) return { fault: { ...fault, found: `"${v6}", which is not an IPv6 address` } };
    return { value: { host: new SocketAddress({ address: v6, family: 'ipv6' }).address, port: portNumber } };
  }
  if (host !== undefined && (isIPv4(host) || isDnsName(host)))
    return { value: { host: host.toLowerCase(), port: portNumber } };
  return { fault };
}

/** RFC 1123 2.1. The last label is not all digits, so a mistyped IPv4 address does not pass as a name. */
function isDnsName(host: string): boolean {
  const labels = host.split('.');
  return (
    host.length <= 253 &&
    labels.every((label) => /^[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?$/.test(label)) &&
    !/^[0-9]+$/.test(labels.at(-1) ?? '')
  );
}

function parseUnixAddress(text: string): Parsed<UnixAddress> {
  const path = text.slice('unix:'.length);
  if (
    path.startsWith('/') &&
    !path.includes('\0') &&
    !path.endsWith('/') &&
    Buffer.byteLength(path) <= unixPathBytesMax
  ) {
    return { value: { path } };
  }
  return { fault: { expected: `unix: and the absolute path of a socket, at most ${unixPathBytesMax} bytes` } };
}
