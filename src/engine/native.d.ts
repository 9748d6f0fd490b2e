// Printed from the Rust types by scripts/binding-types.ts; do not edit.

/** Which connections get a line in the access log. */
export interface AccessSettings {
  /** One in so many; 1: all. */
  sample: number
  /** Lines a second. */
  rate: number
  /** Connections that did not end as they should are not sampled. */
  failuresAlways: boolean
}

export interface AccessSnapshot {
  sampledOut: number
  rateLimited: number
}

export interface CertificateSettings {
  name: string
  /** DNS names in lower case, wildcards as `*.example.org`. */
  names: Array<string>
  /** DER, leaf first. */
  chain: Array<Buffer>
  /** The leaf's SubjectPublicKeyInfo, DER (RFC 5280 4.1). */
  publicKey: Buffer
  keys: Array<KeyPlace>
}

export interface CipherSnapshot {
  protocol: 'TLSv1.2' | 'TLSv1.3'
  /** IANA name. */
  cipher: string
  count: number
}

/** Certificates that clients show. */
export interface ClientCertificateSettings {
  /** False: clients without one are served too. */
  required: boolean
  /** DER; at least one. */
  roots: Array<Buffer>
  /** DER. */
  crls: Array<Buffer>
  /** Nobody named: everybody whom a root vouches for. */
  allow: ClientsSettings
  /** Undefined: no OCSP responder is asked. */
  status?: ClientStatusSettings
}

/** How often a client may come, in one worker. */
export interface ClientRateSettings {
  /** Connections per second. */
  rate: number
  /** At once. */
  burst: number
  /** Of an address that tell clients apart. */
  ipv4Bits: number
  ipv6Bits: number
}

/** Asking OCSP responders about clients' certificates. */
export interface ClientStatusSettings {
  /** Nobody is let in whose certificate is not said to be good. */
  hard: boolean
  /** `http://host:port/path`, instead of what certificates say. */
  responder?: string
  deadlineMs: number
}

/** What OCSP responders said of clients' certificates. */
export interface ClientStatusSnapshot {
  outcome: string
  count: number
}

/** Clients by what their certificates call them; one match is enough. */
export interface ClientsSettings {
  commonNames: Array<string>
  /** Lower case; `*.` stands for one label. */
  dnsNames: Array<string>
  /** Whole, or with `/*` at the end for whatever is below. */
  uris: Array<string>
  emails: Array<string>
  /** SHA-256 of SubjectPublicKeyInfo. */
  spki: Array<Buffer>
}

export interface CloseReason {
  side: string
  phase: string
  reason: string
  meaning: string
  /** Connections end like this on a day on which nothing is wrong. */
  ordinary: boolean
}

export interface CloseSnapshot {
  side: string
  phase: string
  reason: string
  count: number
}

export interface ConnectSnapshot {
  outcome: string
  count: number
}

/** The data path of one worker. */
export declare class Engine {
  /**
   * Logs in to the tokens, finds the keys, starts to accept. Takes as long as the tokens' logins do. Every PIN is tried once.
   * `ticket_secrets`: as for `set_ticket_secrets`. `access_log` gets the lines of connections; `key_log`, where there
   * is one, the secrets of every connection. `staples`: as for `set_staples`. `inherited` is the engine's from now on.
   *
   * Throws an error whose message names the token, key or listener; a token's fault begins with `token_fault <code>: `.
   */
  constructor(settings: EngineSettings, ticketSecrets: Array<Buffer>, accessLog: LineLog, keyLog: LineLog | undefined | null, staples: Array<Staple>, inherited: InheritedSockets)
  /** Takes the sockets that the primary has handed over for this reload, in their order; those of others are closed. */
  takeOver(reload: number): Array<number>
  /**
   * Makes another configuration ready beside the one that serves, which notices nothing of it. Logs in to new tokens
   * and finds the keys of new certificates. In place of what was prepared before.
   *
   * Throws as the constructor does; then nothing is prepared.
   */
  prepare(settings: EngineSettings): void
  /**
   * What was prepared serves from now on; connections that are there go on with what they began with. Sockets that it has
   * no more are to be retired.
   *
   * Throws when nothing is prepared.
   */
  commit(): void
  /** Forgets what was prepared, if anything was. */
  discard(): void
  /** Frees what no handshake uses any more of former configurations. To be called now and then. */
  letGo(): void
  /**
   * Writes off signing threads that are lost in their modules and starts others. To be called now and then. Returns why this
   * process should be replaced, if it should: calls into a module that the certificate needs do not return.
   */
  look(): string | null
  /** Accepts also from a socket of a sibling that is gone. An unknown listener is ignored. */
  accept(listener: string, socket: number): void
  /** Leaves a socket to the sibling that is back. */
  stopAccepting(socket: number): void
  /**
   * Has a token derive the secrets of this epoch, in the background; `snapshot` tells what came of it. Nothing happens while
   * a token is still at it, or when no token derives secrets.
   */
  rotateTickets(epoch: number): void
  /**
   * `secrets`: 32 bytes for each epoch, the current one first. They are overwritten with zeros. Without effect when a token
   * has derived them.
   */
  setTicketSecrets(secrets: Array<Buffer>): void
  /** New handshakes see them at once, and certificates of later configurations have them from the start. No handshake waits. */
  setStaples(staples: Array<Staple>): void
  /**
   * What DNS says now about a server of an upstream, by its place in `servers`; also for handshakes that are under way. One
   * that is not there, or not any more, is ignored.
   */
  setTlsa(upstream: string, server: number, answer: TlsaAnswer): void
  /** Accepts no more connections, and closes every socket; established connections go on. */
  drain(): void
  /** Sockets that nobody will accept from any more, or ever has: what waits in their queues is accepted, then they are closed. */
  retire(sockets: Array<number>): void
  /**
   * Ends every connection, the lanes and the PKCS#11 modules. Returns within about `budget_ms` (per token) even if a
   * token hangs; the process must then end.
   */
  stop(budgetMs: number): void
  snapshot(): EngineSnapshot
}

export interface EngineSettings {
  tokens: Array<TokenSettings>
  certificates: Array<CertificateSettings>
  upstreams: Array<UpstreamSettings>
  listeners: Array<ListenerSettings>
  /** Undefined: `set_ticket_secrets` says which secrets are used. */
  ticketKey?: TicketKeySettings
  /** Undefined: no access log. */
  access?: AccessSettings
  /** Undefined: no upstream asks for it. */
  transparency?: TransparencySettings
}

export interface EngineSnapshot {
  /** False when the I/O thread has ended without being told to: the worker must be replaced. */
  running: boolean
  listeners: Array<ListenerSnapshot>
  upstreams: Array<UpstreamSnapshot>
  closes: Array<CloseSnapshot>
  tokens: Array<TokenSnapshot>
  /** Finished handshakes by cipher suite. */
  ciphers: Array<CipherSnapshot>
  /** Finished handshakes by key exchange group; a resumed TLS 1.2 session has none. */
  groups: Array<GroupSnapshot>
  access: AccessSnapshot
  tickets: TicketSnapshot
  /** CPU time of the I/O thread. */
  ioCpuUs: number
}

/** How often something was found about a certificate of a server, and what came of it. */
export interface FindingSnapshot {
  /** The third word of a close reason. */
  reason: string
  /** The certificate was refused, or this was only counted. */
  refused: number
  reported: number
}

export interface GroupSnapshot {
  /** IANA name. */
  group: string
  count: number
}

export interface HandoverChannel {
  /** The primary's end. */
  primary: number
  /** The end that one worker inherits. */
  worker: number
}

export interface HandshakeSnapshot {
  protocol: 'TLSv1.2' | 'TLSv1.3'
  resumed: boolean
  latency: LatencySnapshot
}

export interface HealthSettings {
  intervalMs: number
  timeoutMs: number
  fall: number
  rise: number
}

/** Descriptors. */
export interface InheritedSockets {
  /** Of all workers: each may have to accept from a sibling's. */
  sockets: Array<number>
  /** Through which others come. */
  handover?: number
}

/** Where a token holds a key. At least one of id and label. */
export interface KeyPlace {
  token: string
  id?: Buffer
  label?: string
}

/** Not cumulative; bucket i counts what is above bound i-1 and at most bound i, the last one what is above all bounds. */
export interface LatencySnapshot {
  buckets: Array<number>
  sumUs: number
}

/** A log: lines go into a bounded queue, and a thread of its own writes them. Nobody who says something waits. */
export declare class LineLog {
  /**
   * `path`: a file that is appended to, and made when it is not there, readable for its group too unless `secret`; undefined:
   * standard output.
   *
   * Throws when the file cannot be opened.
   */
  static open(path: string | undefined | null, secret: boolean): LineLog
  /** One line, without its end. Dropped when the queue is full. */
  line(text: string): void
  /** Opens the file by its name again, after a rotation. Throws when it cannot be; the old one stays in use. */
  reopen(): void
  /** Waits at most `budget_ms` until everything said before has been written. False when it has not. */
  flush(budgetMs: number): boolean
  snapshot(): LogSnapshot
}

/** Lines of one log, by what became of them. */
export interface LineSnapshot {
  written: number
  /** The reader stalled, or the disk was full. */
  dropped: number
}

export interface ListenerSettings {
  name: string
  /** What clients speak: TLS that ends here, plaintext, or TLS that is passed on. */
  front: 'tls' | 'plain' | 'passthrough'
  /** Names of certificates; the first is the default. Empty where no TLS ends. */
  certificates: Array<string>
  unknownName: 'default' | 'refuse'
  alpn: Array<string>
  policy: PolicySettings
  /** Undefined: clients are asked for none. */
  clientCertificates?: ClientCertificateSettings
  routes: Array<RouteSettings>
  /** Where connections go that no route fits; undefined: they are refused. */
  upstream?: string
  handshakeDeadlineMs: number
  idleDeadlineMs: number
  halfClosedDeadlineMs: number
  /** 0: none. */
  lifetimeDeadlineMs: number
  proxyIn?: ProxyInSettings
  /** Clients were redirected here. */
  transparent: boolean
  connectionsMax: number
  handshakesMax: number
  perClient?: ClientRateSettings
  /** Inherited listening sockets of this worker's slot. */
  sockets: Array<number>
}

export interface ListenerSnapshot {
  name: string
  accepted: number
  acceptFailures: number
  connectionsOpen: number
  handshakesInFlight: number
  toUpstreamBytes: number
  toClientBytes: number
  handshakes: Array<HandshakeSnapshot>
  clientStatuses: Array<ClientStatusSnapshot>
}

export interface LogSnapshot {
  /** Given as text. */
  lines: LineSnapshot
  /** Of connections. */
  records: LineSnapshot
}

/** Keeps other processes of this host from logging in to tokens of the same module at the same moment. */
export declare class LoginLock {
  /** Waits at most `wait_ms`, blocking. Throws when the module cannot be opened or the time is over. */
  static acquire(module: string, waitMs: number): LoginLock
  release(): void
}

export interface MechanismSnapshot {
  mechanism: 'ecdsa' | 'rsa_pkcs' | 'rsa_pkcs_pss' | 'eddsa'
  ok: number
  failed: number
  /** Signatures that did not verify; none of them was sent. */
  wrong: number
  latency: LatencySnapshot
}

/** Somebody else in this process who uses a PKCS#11 module: as long as it lasts, the engine does not initialise it again. */
export declare class ModuleVisit {
  /**
   * Loads the module before anybody else does, with symbols of its own if `isolate`; it stays loaded. Blocks while the
   * engine initialises it again. Throws when it cannot be loaded, or that takes too long.
   */
  static begin(path: string, isolate: boolean): ModuleVisit
  end(): void
}

export interface OpenedListener {
  /** The caller's to close. */
  fd: number
  /** With the port that was chosen for port 0. */
  address: string
}

/** Why a PIN must not be presented to a token now. */
export interface PinObstacle {
  /**
   * The return code with which this token refused this PIN, in this process or in one beside it. Without one, the PIN was sent
   * by somebody, and the token has not answered.
   */
  refused?: number
}

/** A PIN that a token refused, as the workers of one keygate know it. */
export interface PinRefusal {
  /** Made with their secret. */
  digest: Buffer
  /** The return code of C_Login. */
  ckr: number
}

/** What may be agreed on in TLS. Of lists, what is preferred stands first, and an empty one means everything. */
export interface PolicySettings {
  /** `1.2`, `1.3`. */
  versions: Array<string>
  /** This and the lists that follow: IANA names. */
  cipherSuites: Array<string>
  groups: Array<string>
  /** What certificates of ours sign with, and what is accepted of servers. */
  signatureSchemes: Array<string>
  /** Whose preference counts between cipher suites. (Between groups it is the client's.) */
  cipherOrder: 'client' | 'server'
  /** Refuse TLS 1.2 without it (RFC 7627). */
  requireExtendedMasterSecret: boolean
  /** How old a session ticket may be; undefined: there are none. Of listeners. */
  ticketLifetimeMs?: number
  /** Refuse to begin with anything that the FIPS module is not validated for. */
  fips: boolean
}

/** Who must begin with a PROXY header. */
export interface ProxyInSettings {
  /** `192.0.2.0/24`, `2001:db8::/32` */
  from: Array<string>
  deadlineMs: number
}

/** The first route that fits says where a connection goes. */
export interface RouteSettings {
  /** DNS names in lower case, wildcards as `*.example.org`; empty: any. */
  names: Array<string>
  /** Application protocols; empty: any. */
  alpn: Array<string>
  /** Undefined: any, with or without a certificate. */
  clients?: ClientsSettings
  /** Undefined: it is refused. */
  upstream?: string
}

export interface SandboxReport {
  /** Version of what the kernel has of Landlock; 0: none is in force. */
  landlockAbi: number
  seccomp: boolean
  /** What is not in force although it should be, and why, for people. */
  missing: Array<string>
}

/** What a process in the sandbox may still write or do; everything else is decided in sandbox.rs. */
export interface SandboxSettings {
  /** Files that are opened for appending, again and again: others may be created beside and beneath them. */
  logs: Array<string>
  /** Files, and directories with everything in them, that modules are known to keep their state in. */
  states: Array<string>
  /** The same, as the configuration says it; with any, modes and owners may be changed. */
  writable: Array<string>
  /** Whether connections may be given a source address, as those of transparent upstreams are. */
  bindsTcp: boolean
}

export interface ServerSnapshot {
  address: string
  up: boolean
  connectionsOpen: number
  connects: Array<ConnectSnapshot>
  connectLatency: LatencySnapshot
  /** TLS handshakes with it that finished. */
  fullHandshakeLatency: LatencySnapshot
  resumedHandshakeLatency: LatencySnapshot
}

/** What clients that ask for the status of a certificate get (RFC 6066 8). */
export interface Staple {
  /** SHA-256 of the first certificate of the chain, DER. */
  leaf: Buffer
  /** An OCSP response, DER, as the responder sent it; undefined: none. */
  response?: Buffer
}

/** The secret key from which tokens derive the secrets of session tickets. */
export interface TicketKeySettings {
  /** At least one; all must hold the same key. */
  places: Array<KeyPlace>
  /** How long an epoch lasts. */
  rotationMs: number
  /** The epoch that issues tickets. */
  epoch: number
}

export interface TicketSnapshot {
  /** A token is to derive the secrets. */
  wanted: boolean
  /** The epoch whose secrets a token has derived and that issues tickets; undefined: none has. */
  epoch?: number
  /** A token is at it. */
  deriving: boolean
  /** Why the last try came to nothing; the secrets that were there are used on. */
  failure?: string
}

/** What is known about the TLSA records of a server. */
export interface TlsaAnswer {
  /** Validated by DNSSEC (then also that there is no record), not signed, or not to be had. */
  state: 'secure' | 'insecure' | 'unavailable'
  /** Empty unless `secure`. */
  records: Array<TlsaRecord>
  /** How long a secure answer holds. */
  validMs: number
}

/** A TLSA record (RFC 6698 2.1). */
export interface TlsaRecord {
  usage: number
  selector: number
  matchingType: number
  data: Buffer
}

/** A token and how to use it. Durations are milliseconds. */
export interface TokenSettings {
  name: string
  module: string
  /** The token's label, without padding. */
  label: string
  serial?: string
  /** What it must say of itself beside that, if anything. */
  manufacturer?: string
  model?: string
  /** It was out of reach: it is waited for, and nothing of its module is called on the JavaScript thread. */
  away: boolean
  /** Overwritten with zeros when it has been taken. */
  pin: Buffer
  /** Signing threads, each with a PKCS#11 session: 1 to 256. */
  lanes: number
  /** Lanes that are lost in the module included: at least `lanes`. */
  threadsMax: number
  /** How much more it is asked than others with the same keys; 0: only when none of those is up. */
  weight: number
  queueMax: number
  queueAgeMs: number
  signDeadlineMs: number
  loginLockWaitMs: number
  /** Load the module with symbols of its own (RTLD_DEEPBIND). */
  isolate: boolean
  /** Verify each n-th RSA signature before use; 1: all. */
  verifyRsaEvery: number
  /** Verify the first EC or Ed25519 signature of each PKCS#11 session and key, then each n-th; 1: all. */
  verifyEcEvery: number
}

export interface TokenSnapshot {
  name: string
  up: boolean
  /** Why it is not up. */
  downReason?: string
  mechanisms: Array<MechanismSnapshot>
  signWait: LatencySnapshot
  queueDepthEc: number
  queueDepthRsa: number
  lanesIdle: number
  lanesBusy: number
  lanesLost: number
  lanesWrittenOff: number
  sessionsOpen: number
  reopened: number
  loggedIn: number
  refound: number
  reinitialized: number
  failedOver: number
  shedQueueFull: number
  shedQueueAged: number
  shedTokenDown: number
  cancelled: number
  wentDown: number
  loginLockTimeouts: number
}

/** A log of Certificate Transparency whose SCTs count. */
export interface TransparencyLogSettings {
  /** SHA-256 of the key. */
  id: Buffer
  /** SubjectPublicKeyInfo, DER. */
  key: Buffer
  operator: string
  /** Unix time in seconds; SCTs that it has signed from then on do not count. */
  retiredAt?: number
  /** It takes certificates that end from here on and before there, in Unix time in seconds. */
  endsFrom?: number
  endsBefore?: number
}

export interface TransparencySettings {
  logs: Array<TransparencyLogSettings>
  /** SCTs that a certificate needs, each of another log. */
  scts: number
  operators: number
}

export interface UpstreamSettings {
  name: string
  /** `192.0.2.1:80`, `[2001:db8::1]:80` or `unix:/path`: addresses, not names. Or `original` alone. */
  servers: Array<string>
  balance: 'round-robin' | 'least-connections'
  connectDeadlineMs: number
  connectAttemptsMax: number
  proxyProtocol?: 'v1' | 'v2'
  /** Whether its header has the client's whole certificate. */
  proxyClientCertificate: boolean
  /** 0: none. */
  slowStartMs: number
  /** The client's address is the source of its connections. */
  transparent: boolean
  health?: HealthSettings
  passiveFailuresMax: number
  passiveEjectionMs: number
  /** Undefined: plaintext. */
  tls?: UpstreamTlsSettings
}

export interface UpstreamSnapshot {
  name: string
  servers: Array<ServerSnapshot>
  /** Certificates of servers that were accepted. */
  certificatesAccepted: number
  /** Of each reason; empty without TLS. */
  findings: Array<FindingSnapshot>
}

/** TLS towards an upstream. */
export interface UpstreamTlsSettings {
  /** DNS names or IP addresses that the servers' certificates must be for, in the order of `servers`. */
  names: Array<string>
  verification: VerificationSettings
  /** Whether the name is sent (SNI). An IP address never is. */
  sendName: boolean
  /** Name of a certificate to show when a server asks for one. */
  certificate?: string
  alpn: Array<string>
  policy: PolicySettings
  /** Whether TLS sessions are resumed. */
  resume: boolean
  deadlineMs: number
}

/** How the certificates of an upstream's servers are verified. */
export interface VerificationSettings {
  /** Trusted certificates, DER. */
  roots: Array<Buffer>
  /** Lists of revoked certificates, DER. */
  crls: Array<Buffer>
  /** SHA-256 of SubjectPublicKeyInfos; empty: any key. */
  pins: Array<Buffer>
  /** PKIX and pins. */
  pkix: 'report' | 'enforce'
  dane: 'off' | 'report' | 'enforce'
  /** In the order of `servers`; empty when `dane` is off. */
  tlsa: Array<TlsaAnswer>
  transparency: 'off' | 'report' | 'enforce'
}

/**
 * Takes a listening TCP socket that was opened elsewhere, and says where it listens. The caller's to close.
 * Throws with what it is instead.
 */
export declare function adoptListener(fd: number): string

/** The closed list of reasons why a connection can end. */
export declare function closeReasons(): Array<CloseReason>

/** What this process was handed down, the programs that it starts are not. */
export declare function endHandingDown(): void

/** Ends this process, by SIGKILL, when the process that forked it has ended. */
export declare function endWithParent(): void

/**
 * Gives up, for good and for every thread, what a worker has no business with. To be called before a module is loaded and
 * before the engine starts. What the kernel does not have is missing in the report, and no error.
 */
export declare function enterSandbox(settings: SandboxSettings): SandboxReport

/** After setuid: of all capabilities CAP_NET_RAW is left, to this thread and to the processes that it forks. */
export declare function handDownNetRaw(): void

/** Puts sockets into the channel, for the worker to take when it hears of the reload. */
export declare function handOver(channel: number, reload: number, fds: Array<number>): void

/** No new privileges, no core dump, no ptrace by the same user: for processes that hold a PIN. */
export declare function harden(): void

/** Whether the engine is built with the FIPS module of AWS-LC, and that passed its self-test. */
export declare function isFips(): boolean

/** Has the coming setuid keep what `hand_down_net_raw` needs, on this thread alone. */
export declare function keepCapabilitiesOverSetuid(): void

/** Upper bounds of every latency histogram, in microseconds. */
export declare function latencyBoundsUs(): Array<number>

/** Sends `state`, lines of `NAME=value`, to the service manager's datagram socket. Throws when it is not taken. */
export declare function notify(socket: string, state: string): void

/** Opens a channel through which a running worker is handed sockets. Both ends are the caller's to close. */
export declare function openHandover(): HandoverChannel

/**
 * Opens a listening socket at an address and port; `transparent`: also for connections that TPROXY gives it.
 * Throws with the code of bind(2) first in the message: EADDRINUSE, EACCES, …
 */
export declare function openListener(address: string, backlog: number, transparent: boolean): OpenedListener

/**
 * As `endWithParent`, but by SIGALRM and `forSeconds` later, whatever becomes of JavaScript meanwhile; an engine retires all its
 * sockets at once. Each call holds in place of the one before.
 */
export declare function outliveParent(forSeconds: number): void

/** What C_Login returned, so that lanes and the processes beside this one know it; nothing where it was not called. */
export declare function pinAnswered(module: string, serial: string, pin: Uint8Array, ckr?: number | undefined | null): void

/** What this process knows, for those that come after it. */
export declare function pinRefusals(): Array<PinRefusal>

/** To be called before a C_Login by somebody else than lanes; without an obstacle, `pin_answered` is to follow. */
export declare function presentPin(module: string, serial: string, pin: Uint8Array): PinObstacle | null

/** Throws if somebody already listens at the address, or if it cannot be bound. */
export declare function probeAddress(address: string): void

/** Throws EPERM unless this process may use addresses of others (IP_TRANSPARENT). */
export declare function probeForeignAddress(): void

/**
 * For the primary, before it forks workers in a sandbox: no ring of io_uring can be made any more, here and in them. Where the
 * kernel cannot be asked for that, the report of `enterSandbox` in the worker says so.
 */
export declare function refuseRings(): void

/** Why this is not a list of revoked certificates (DER) that the engine understands; undefined: it is one. */
export declare function revocationListFault(der: Buffer): string | null

/** Has a worker accept nothing any more, also one whose JavaScript thread hangs. No socket can be handed to it after that. */
export declare function sayFarewell(channel: number): void

/** Sets the length of a listening socket's accept queue, also of one that has waiting connections. */
export declare function setBacklog(fd: number, backlog: number): void

/**
 * `secret`: 32 random bytes that all workers of a keygate have, and nobody else: with it they tell each other which PINs were
 * refused. `known`: by those that are no more. Before the first login.
 */
export declare function shareRefusals(secret: Uint8Array, known: Array<PinRefusal>): void

/** Refuses clients on a listening socket from now on, in every process that holds it. The descriptor stays open. */
export declare function shutListener(fd: number): void

/** Gives memory that is free inside this process back to the system. */
export declare function trimMemory(): void
