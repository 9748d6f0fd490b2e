/**
 * Owns: the normalised configuration, the only shape that anything above src/config sees.
 * Must not know: YAML, defaults, where a value stood in a file.
 * Runs: everywhere; plain data, so that it crosses to a worker as it is.
 *
 * Every duration is in milliseconds, every size in bytes, every path absolute, every reference checked.
 */
import type { PinSource } from './pin.ts';
import type { Pkcs11Uri } from './pkcs11-uri.ts';
import type { SecretPlace } from './secret.ts';

export interface Config {
  /** Absolute path of the file this came from. */
  readonly file: string;
  /** 1..1024, or one per available core. */
  readonly workers: number | 'auto';
  /** What the workers run as when the primary starts as root. */
  readonly user: string | undefined;
  readonly group: string | undefined;
  /** Connections that are still open this long after a drain began are closed. */
  readonly drainDeadlineMs: number;
  /** A reload that a worker has not prepared by then is rolled back. */
  readonly reloadDeadlineMs: number;
  readonly log: LogConfig;
  readonly admin: AdminConfig | undefined;
  readonly sandbox: SandboxConfig;
  /** At least one. This and the four below: by name, without a prototype. */
  readonly tokens: Readonly<Record<string, TokenConfig>>;
  readonly certificates: Readonly<Record<string, CertificateConfig>>;
  /** The built-in policies `modern`, `intermediate` and `fips` are among them. */
  readonly policies: Readonly<Record<string, PolicyConfig>>;
  readonly tickets: TicketsConfig;
  readonly ocsp: OcspConfig;
  /** There when an upstream's `dane` is not off. */
  readonly dns: DnsConfig | undefined;
  /** There when an upstream's `transparency` is not off. */
  readonly transparency: TransparencyConfig | undefined;
  readonly upstreams: Readonly<Record<string, UpstreamConfig>>;
  readonly listeners: Readonly<Record<string, ListenerConfig>>;
}

/** The most talkative first. */
export const logLevels = ['debug', 'info', 'warn', 'error'] as const;
export type LogLevel = (typeof logLevels)[number];

export interface LogConfig {
  readonly level: LogLevel;
  /** Absolute path; undefined: standard output. */
  readonly file: string | undefined;
  readonly access: AccessLogConfig | undefined;
  /** Absolute path. Everybody who reads it can decrypt every connection. */
  readonly keyLog: string | undefined;
}

export interface AccessLogConfig {
  /** Absolute path; undefined: where the log goes. */
  readonly file: string | undefined;
  /** One connection in so many; 1: all. */
  readonly sample: number;
  /** Lines per second and worker. */
  readonly rate: number;
  readonly failures: 'always' | 'sampled';
}

/** `host` is an IP address without brackets, or for upstream servers also a DNS name. */
export interface TcpAddress {
  readonly host: string;
  /** 1..65535; 0 only where a listener may choose any free port. */
  readonly port: number;
}

/** Absolute path of a unix stream socket, at most 107 bytes (unix(7)). */
export interface UnixAddress {
  readonly path: string;
}

/** Where the client wanted to go before it was redirected to us. */
export interface OriginalAddress {
  readonly original: true;
}

export type ServerAddress = TcpAddress | UnixAddress | OriginalAddress;

export interface AdminConfig {
  /** Reachable from other hosts only with a token or client certificates. */
  readonly listen: TcpAddress | UnixAddress;
  /** Where the bearer token is kept that requests must carry. */
  readonly token: SecretPlace | undefined;
  /** Absolute paths of PEM files; undefined: plain HTTP. */
  readonly tls: AdminTlsConfig | undefined;
}

export interface AdminTlsConfig {
  /** The leaf first, then its issuers. */
  readonly chain: string;
  /** A file: the primary loads no PKCS#11 module. */
  readonly key: string;
  /** Authorities that must have issued the client's certificate; undefined: clients need none. */
  readonly clientCertificates: string | undefined;
}

/** What workers give up once they have started. */
export interface SandboxConfig {
  readonly enabled: boolean;
  /** Absolute paths of files, and of directories with everything beneath, that a module must be able to write. */
  readonly writable: readonly string[];
}

export interface TokenConfig {
  readonly name: string;
  /** Absolute path of the PKCS#11 module. */
  readonly module: string;
  /** Says which token; has `token` or `serial`, never `object` or `id`. */
  readonly uri: Pkcs11Uri;
  readonly pin: PinSource;
  /** 1..256 signing threads per worker, each with a PKCS#11 session of its own. */
  readonly lanes: number;
  /** PKCS#11 sessions that all workers together may open; at least 3 for each worker. */
  readonly sessions: number | undefined;
  /** How much more it is asked than others with the same key; 0: only when none of those is up. */
  readonly weight: number;
  /** Signatures that wait for a lane: how many, and for how long. */
  readonly queue: { readonly max: number; readonly ageMs: number };
  readonly signDeadlineMs: number;
  /** How often a signature is verified before it is used: always, or one in N. */
  readonly verify: { readonly rsa: VerifyRate; readonly ec: VerifyRate };
  /** Load the module with RTLD_DEEPBIND, so that it binds to its own libcrypto and not to Node's. */
  readonly isolate: boolean;
  /** How long a worker waits for another process that is logging in to the same token. */
  readonly loginLockWaitMs: number;
}

/** `always`, or N >= 2: one signature in N. */
export type VerifyRate = 'always' | number;

export interface CertificateConfig {
  readonly name: string;
  /** Absolute path of a PEM file: the leaf first, then its issuers. */
  readonly chain: string;
  /** Says which private key; has `object` or `id`. */
  readonly key: Pkcs11Uri;
  /** Names of tokens that hold the key; at least one. */
  readonly tokens: readonly string[];
  /** Whether clients get an OCSP response with it. */
  readonly ocsp: 'off' | 'staple';
}

export type TlsVersion = '1.2' | '1.3';

export interface PolicyConfig {
  readonly name: string;
  readonly minVersion: TlsVersion;
  readonly maxVersion: TlsVersion;
  /** Key exchange groups by their IANA names, preferred first. */
  readonly groups: readonly Group[];
  /** Cipher suites by their IANA names, preferred first. */
  readonly cipherSuites: readonly CipherSuite[];
  /** Whose preference counts. */
  readonly cipherOrder: 'client' | 'server';
  /** By their IANA names, preferred first: what our keys sign with, and what is accepted of peers. */
  readonly signatureSchemes: readonly SignatureScheme[];
  /** Whether TLS 1.2 without it (RFC 7627) is refused. */
  readonly extendedMasterSecret: 'optional' | 'required';
  /** Whether TLS sessions can be resumed with session tickets. */
  readonly tickets: boolean;
  /** How long one is accepted; at most `tickets.lifetimeMs`. */
  readonly ticketLifetimeMs: number;
  /** For listeners that have none of their own. */
  readonly clientCertificates: ClientCertificatesConfig | undefined;
  /** Made from `fips`: nothing in it but what FIPS 140-3 approves, and an engine that is built with such a module. */
  readonly fips: boolean;
}

/** Over one of these, a client is turned away. All per worker. */
export interface LimitsConfig {
  readonly connections: number;
  readonly handshakes: number;
  readonly perClient:
    | {
        /** Per second. */
        readonly rate: number;
        readonly burst: number;
        readonly ipv4Prefix: number;
        readonly ipv6Prefix: number;
      }
    | undefined;
}

/** Certificates that clients show. */
export interface ClientCertificatesConfig {
  readonly mode: 'require' | 'request';
  /** Absolute path of a PEM file. */
  readonly roots: string;
  /** Absolute paths. */
  readonly crls: readonly string[];
  /** Undefined: everybody whom a root vouches for. */
  readonly allow: ClientsConfig | undefined;
  /** Undefined: no OCSP responder is asked. */
  readonly ocsp: ClientStatusConfig | undefined;
}

/** Asking OCSP responders about clients' certificates. */
export interface ClientStatusConfig {
  /** `hard`: nobody is let in whose certificate is not said to be good. */
  readonly mode: 'soft' | 'hard';
  /** A URL instead of what certificates say. */
  readonly responder: string | undefined;
  /** For one answer. */
  readonly timeoutMs: number;
}

/** Clients by what their certificates call them; one match is enough, and at least one is named. */
export interface ClientsConfig {
  readonly commonNames: readonly string[];
  /** In lower case, wildcards as `*.example.org`. */
  readonly dnsNames: readonly string[];
  /** With `/*` at the end: whatever is below. */
  readonly uris: readonly string[];
  readonly emails: readonly string[];
  /** SHA-256 of SubjectPublicKeyInfo in base64. */
  readonly keys: readonly string[];
}

export const groups = ['X25519MLKEM768', 'X25519', 'secp256r1', 'secp384r1'] as const;
export type Group = (typeof groups)[number];

/** What rustls has with aws-lc-rs, in Mozilla's order; the first three are TLS 1.3, the others TLS 1.2. */
export const cipherSuites = [
  'TLS_AES_128_GCM_SHA256',
  'TLS_AES_256_GCM_SHA384',
  'TLS_CHACHA20_POLY1305_SHA256',
  'TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256',
  'TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256',
  'TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384',
  'TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384',
  'TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256',
  'TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256',
] as const;
export type CipherSuite = (typeof cipherSuites)[number];

/** What keys in tokens sign with and the engine verifies; no key signs with P-521 or ML-DSA. */
export const signatureSchemes = [
  'ecdsa_secp256r1_sha256',
  'ecdsa_secp384r1_sha384',
  'ecdsa_secp521r1_sha512',
  'ed25519',
  'rsa_pss_rsae_sha256',
  'rsa_pss_rsae_sha384',
  'rsa_pss_rsae_sha512',
  'rsa_pkcs1_sha256',
  'rsa_pkcs1_sha384',
  'rsa_pkcs1_sha512',
  'mldsa44',
  'mldsa65',
  'mldsa87',
] as const;
export type SignatureScheme = (typeof signatureSchemes)[number];

/**
 * Invariant: lifetimeMs <= rotationMs. The keys of the previous, the current and the next epoch are kept, so a ticket
 * issued at the end of an epoch can be opened for one more rotation and no longer.
 */
export interface TicketsConfig {
  /** Tokens derive the secrets of tickets from it; undefined: they are random. */
  readonly key: TicketKeyConfig | undefined;
  /** At most 7 days (RFC 8446 4.6.1). */
  readonly lifetimeMs: number;
  readonly rotationMs: number;
}

export interface TicketKeyConfig {
  /** Says which secret key; has `object` or `id`. */
  readonly uri: Pkcs11Uri;
  /** Names of tokens that hold it; at least one. */
  readonly tokens: readonly string[];
}

/** How OCSP responses are fetched. */
export interface OcspConfig {
  /** Absolute path of the directory where they are kept; undefined: nowhere. */
  readonly cache: string | undefined;
  /** An HTTP proxy. */
  readonly proxy: TcpAddress | undefined;
  /** Ask with a nonce, and refuse answers without it. */
  readonly nonce: boolean;
  /** For one answer, from looking up the name to the last byte. */
  readonly timeoutMs: number;
}

export interface UpstreamConfig {
  readonly name: string;
  /** At least one, no two equal; the original destination stands alone. */
  readonly servers: readonly ServerAddress[];
  readonly balance: 'round-robin' | 'least-connections';
  /** PROXY protocol version sent to the upstream. */
  readonly proxyProtocol: 'v1' | 'v2' | undefined;
  /** Whether that tells the client's whole certificate; with `v2`. */
  readonly proxyClientCertificate: boolean;
  /** 0: none. */
  readonly slowStartMs: number;
  /** Servers see the client's address as the source of its connections. */
  readonly transparent: boolean;
  readonly connectDeadlineMs: number;
  /** How many servers are tried for one connection, 1..16. */
  readonly attempts: number;
  /** Active checks; undefined when off. */
  readonly health: HealthConfig | undefined;
  /** A server is ejected for a while after this many failed connects in a row. */
  readonly passive: { readonly failures: number; readonly ejectionMs: number };
  /** Undefined: plaintext. */
  readonly tls: UpstreamTlsConfig | undefined;
}

export const checkModes = ['off', 'report', 'enforce'] as const;
/** Whether a check's failure is only counted or refuses. */
export type CheckMode = (typeof checkModes)[number];

/** A resolver whose word that DNSSEC has validated an answer is taken. */
export interface DnsConfig {
  /** A loopback address unless `tls` is there. */
  readonly resolver: TcpAddress;
  readonly tls: { readonly name: string; /** As of an upstream. */ readonly roots: string | undefined } | undefined;
}

export interface TransparencyConfig {
  /** Absolute path of a list of logs (Google's, version 3). */
  readonly logs: string;
  readonly scts: number;
  /** At most `scts`. */
  readonly operators: number;
}

export interface UpstreamTlsConfig {
  /** Of PKIX and pins. */
  readonly verify: 'enforce' | 'report';
  /** Absolute paths. */
  readonly crls: readonly string[];
  /** SHA-256 in base64; empty: any key. */
  readonly pins: readonly string[];
  readonly dane: CheckMode;
  readonly transparency: CheckMode;
  /** DNS name or IP address that the certificate must be for; undefined: the host of each server. */
  readonly name: string | undefined;
  /** Absolute path of a PEM file; undefined: the roots of this host. */
  readonly roots: string | undefined;
  /** Name of a certificate that is shown to servers that ask. */
  readonly certificate: string | undefined;
  /** Name of a policy. */
  readonly policy: string;
  readonly alpn: readonly string[];
  readonly sni: boolean;
  readonly resume: boolean;
  readonly deadlineMs: number;
}

/** A TCP connect to each server every `intervalMs`. */
export interface HealthConfig {
  readonly intervalMs: number;
  readonly timeoutMs: number;
  /** Failed checks in a row until a server is down. */
  readonly fall: number;
  /** Passed checks in a row until it is up again. */
  readonly rise: number;
}

export const listenerModes = ['offload', 'encrypt', 'bridge', 'passthrough'] as const;
/** Where TLS is: at the client, at the upstream, at both, or passed on. */
export type ListenerMode = (typeof listenerModes)[number];

export interface RouteConfig {
  /** In lower case, wildcards as `*.example.org`; empty: any. */
  readonly names: readonly string[];
  /** Empty: any. */
  readonly alpn: readonly string[];
  /** Undefined: any, with or without a certificate. */
  readonly clients: ClientsConfig | undefined;
  /** Name of an upstream; undefined: refused. */
  readonly upstream: string | undefined;
}

export interface ListenerConfig {
  readonly name: string;
  /** At least one; no two listeners share one. */
  readonly bind: readonly TcpAddress[];
  readonly mode: ListenerMode;
  /** Names of certificates; the first is the default. At least one where TLS ends here, else none. */
  readonly certificates: readonly string[];
  /** What a client gets whose SNI matches no certificate: the default certificate, or an alert. */
  readonly unknownName: 'default' | 'refuse';
  /** ALPN protocol names, preferred first; empty: ALPN is not negotiated. */
  readonly alpn: readonly string[];
  /** Name of a policy. */
  readonly policy: string;
  /** Instead of the policy's. */
  readonly clientCertificates: ClientCertificatesConfig | undefined;
  /** Name of an upstream, for what no route fits; undefined: that is refused. */
  readonly upstream: string | undefined;
  /** The first that fits counts. */
  readonly routes: readonly RouteConfig[];
  readonly proxyProtocol: ProxyInConfig | undefined;
  /** Clients were redirected here: their original destination counts. */
  readonly transparent: boolean;
  readonly deadlines: ListenerDeadlines;
  /** Per worker. */
  readonly limits: LimitsConfig;
  /** Length of the accept queue per worker, listen(2). */
  readonly backlog: number;
}

/** Proxies in front, whose connections must begin with a PROXY header. Nobody else's may. */
export interface ProxyInConfig {
  /** Networks in their canonical form, `192.0.2.0/24`; at least one. */
  readonly from: readonly string[];
  /** From accept to the end of the header. */
  readonly deadlineMs: number;
}

export interface ListenerDeadlines {
  readonly handshakeMs: number;
  readonly idleMs: number;
  /** 0: none. */
  readonly lifetimeMs: number;
  /** How long a connection may stay after one side has ended its half. */
  readonly halfClosedMs: number;
}
