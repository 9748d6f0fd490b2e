/**
 * Owns: the configuration document as people write it: keys, kinds, ranges, defaults and what each means.
 * Must not know: positions in a file, references between sections (references.ts), the normalised shape (normalise.ts).
 * Runs: at start, on the main thread.
 *
 * The reference in README and the JSON Schema for editors are printed from here, so a description is documentation.
 * The `error` of a kind is the "expected" of the problem it reports.
 */
import { isIP } from 'node:net';
import * as z from 'zod';
import {
  isLocal,
  parseAdminAddress,
  parseBindAddress,
  parseNetwork,
  parseProxyUrl,
  parseResolverAddress,
  parseServerAddress,
} from './address.ts';
import { checkModes, cipherSuites, groups, listenerModes, logLevels, signatureSchemes } from './config.ts';
import type { ListenerMode } from './config.ts';
import type { Fault, Parsed } from './fault.ts';
import { parsePath } from './path.ts';
import { parsePkcs11Uri, type Pkcs11Uri } from './pkcs11-uri.ts';
import { formatDuration, parseDuration } from './units.ts';

/** 7 days (RFC 8446 4.6.1). */
const ticketLifetimeMsMax = 7 * 24 * 3_600_000;

/** The engine counts milliseconds in 32 bits, which end after 49.7 days; worker/plan.ts asserts it. */
const lifetimeMsMax = 49 * 86_400_000;

const token = z.strictObject({
  module: path('Path of the PKCS#11 module.'),
  uri: kind('PKCS#11 URI', 'a PKCS#11 URI with a token label', tokenUri).describe(
    'Which token: `token` and, to be exact, `serial`, `manufacturer`, `model`. No PIN, no object.',
  ),
  pin: secretPlace('PIN').describe('Where the PIN is kept, never the PIN itself: exactly one of these.'),
  lanes: whole(1, 256, 8).describe('Signing threads per worker, each with a PKCS#11 session of its own.'),
  sessions: wholeNumber(3, 1_000_000, 'a whole number from 3 to 1000000')
    .optional()
    .describe(
      'PKCS#11 sessions that all workers together may open on the token, at least 3 for each. Default: as many as `lanes` need, and as many again for lanes that are lost in the module.',
    ),
  weight: whole(0, 1000, 1).describe(
    'How much more this token is asked than others that hold the same key, when all are as fast; 0: only while none of the others is up.',
  ),
  queue: z
    .strictObject({
      max: whole(1, 1_000_000, 1024).describe('Signatures that may wait for a lane, per worker and kind of key.'),
      age: duration(10, 60_000, '3s').describe('How long one may wait; then its handshake fails.'),
    })
    .prefault({})
    .describe('What waits for a lane.'),
  signDeadline: duration(10, 600_000, '5s').describe(
    'A signature that takes longer fails its handshake. A lane that is in the module for twice as long is lost, and another takes its place.',
  ),
  verify: z
    .strictObject({
      rsa: verifyRate('always').describe(
        'How often an RSA signature is verified before use: `always` or one in N. A fault in a signature can reveal the key.',
      ),
      ec: verifyRate(64).describe(
        'The same for ECDSA and EdDSA. The first signature of a session with a key is always verified.',
      ),
    })
    .prefault({})
    .describe('Checks of what the token signed.'),
  isolate: flag(true).describe(
    'Load the module so that it binds to its own libraries and not to those inside Node (RTLD_DEEPBIND).',
  ),
  loginLockWait: duration(0, 600_000, '10s').describe(
    'How long to wait for another process that is logging in to the same token.',
  ),
});

const certificate = z.strictObject({
  chain: path('PEM file with the leaf certificate first, then its issuers.'),
  key: kind('PKCS#11 URI', 'a PKCS#11 URI with object or id', keyUri).describe(
    'Which private key: `object` (label), `id`, or both.',
  ),
  tokens: z
    .array(reference('a token'), { error: 'a list of token names' })
    .min(1, 'at least one token')
    .optional()
    .describe('Tokens that hold this key. Default: all tokens.'),
  ocsp: oneOf(['off', 'staple'], 'off').describe(
    '`staple`: fetch the status of the certificate from its OCSP responder, and give it to clients that ask. The chain must have the issuer.',
  ),
});

const clients = z
  .strictObject(
    {
      commonNames: clientNames('a name', 'a name without control characters', parseCommonName).describe(
        "The subject's common name, letter by letter.",
      ),
      dnsNames: clientNames('DNS name', 'a DNS name, or one with * as its first label', parseRouteName).describe(
        'DNS names of subjectAltName; `*.example.org` stands for one label.',
      ),
      uris: clientNames('URI', 'a URI, or one that ends in /* below a host', parseClientUri).describe(
        'URIs of subjectAltName, such as SPIFFE IDs, letter by letter; `/*` at the end: whatever is below.',
      ),
      emails: clientNames('e-mail address', 'NAME@DOMAIN', parseEmail).describe(
        'E-mail addresses of subjectAltName, letter by letter.',
      ),
      keys: clientNames('pin', 'sha256/ and 32 bytes in base64', parseKeyPin).describe(
        'SHA-256 of public keys (SubjectPublicKeyInfo) as `sha256/BASE64`.',
      ),
    },
    { error: 'clients by what their certificates call them' },
  )
  .refine((kinds) => Object.values(kinds).some((names) => names.length > 0), 'at least one client');

const clientCertificates = z
  .strictObject({
    mode: oneOf(['require', 'request'], 'require').describe(
      '`require`: clients without a certificate are refused; `request`: they are served too, and bad certificates are refused.',
    ),
    roots: path('PEM file of authorities whose certificates count.'),
    crls: z
      .array(path('PEM or DER file.'), { error: 'a list of paths' })
      .max(64, 'at most 64 files')
      .default([])
      .describe(
        "Lists of revoked certificates, PEM or DER, read at start and reload. With any, one must be of the issuer of the client's certificate and not out of date.",
      ),
    allow: clients
      .optional()
      .describe('Clients that are let in; one match is enough. Default: all that `roots` vouch for.'),
    ocsp: z
      .strictObject({
        mode: oneOf(['soft', 'hard'], 'soft').describe(
          '`soft`: a client is let in when there is no answer that holds; `hard`: only if one says that its certificate is good.',
        ),
        responder: kind('URL', 'http://HOST[:PORT]/PATH', parseResponderUrl)
          .describe('Who is asked. Default: whom the certificate names.')
          .optional(),
        timeout: duration(100, 60_000, '3s').describe('For one answer; the handshake waits for it.'),
      })
      .optional()
      .describe("Ask an OCSP responder whether the client's certificate was revoked. Default: nobody is asked."),
  })
  .describe(
    'Certificates that clients show (mutual TLS), for modes `offload` and `bridge`. Default: none are asked for.',
  );

const tlsVersion = z
  .literal(['1.2', '1.3', 1.2, 1.3], { error: '"1.2" or "1.3"' })
  .transform((version) => String(version) as '1.2' | '1.3');

/** What is not named is as in `base`, so nothing has a default here; policy-faults.ts judges what comes of it. */
export const policy = z.strictObject({
  base: reference('a policy')
    .prefault('intermediate')
    .describe('The policy that this one is like, but for what is named here: built-in, or one of `policies`.'),
  minVersion: tlsVersion.optional().describe('Lowest TLS version.'),
  maxVersion: tlsVersion.optional().describe('Highest TLS version.'),
  groups: words('group', groups).optional().describe('Key exchange groups. Which one is taken is said by the client.'),
  cipherSuites: words('cipher suite', cipherSuites)
    .optional()
    .describe('Cipher suites by IANA name, preferred first. Default: those of `base` for the versions.'),
  cipherOrder: z
    .enum(['client', 'server'], { error: 'one of client, server' })
    .optional()
    .describe(
      'Whose preference counts between `cipherSuites`; clients without hardware for AES then get ChaCha20. Built-in: `client`.',
    ),
  signatureSchemes: words('signature scheme', signatureSchemes)
    .optional()
    .describe(
      'Signature schemes by IANA name, preferred first: what keys sign with, and what is accepted of servers and clients. Every certificate must have one.',
    ),
  extendedMasterSecret: z
    .enum(['optional', 'required'], { error: 'one of optional, required' })
    .optional()
    .describe('Whether TLS 1.2 without it (RFC 7627) is refused.'),
  tickets: z
    .boolean({ error: 'true or false' })
    .optional()
    .describe('Whether TLS sessions can be resumed with session tickets. Of listeners.'),
  ticketLifetime: requiredDuration(1000, ticketLifetimeMsMax)
    .optional()
    .describe(
      'How long a session ticket is accepted, whoever issued it; at most `tickets.lifetime`, which is the default.',
    ),
  clientCertificates: clientCertificates
    .optional()
    .describe('As `listeners.NAME.clientCertificates`, for listeners that have none of their own. Of listeners.'),
});

export const tickets = z
  .strictObject({
    key: kind('PKCS#11 URI', 'a PKCS#11 URI with object or id', secretKeyUri)
      .describe(
        "A secret key in the tokens, made by `keygate key generate --type ticket`: every keygate with it resumes the others' TLS sessions. Default: random keys, known to this keygate alone.",
      )
      .optional(),
    tokens: z
      .array(reference('a token'), { error: 'a list of token names' })
      .min(1, 'at least one token')
      .optional()
      .describe('Tokens that hold `key`. Default: all tokens.'),
    lifetime: duration(1000, ticketLifetimeMsMax, '12h').describe(
      'How long a session ticket is accepted; at most `rotation`.',
    ),
    rotation: duration(1000, ticketLifetimeMsMax, '12h').describe(
      'How long one ticket key issues tickets. A key opens tickets for one rotation more, so a stolen key opens the tickets of at most two rotations.',
    ),
  })
  .refine(({ lifetime, rotation }) => lifetime <= rotation, {
    path: ['lifetime'],
    error: 'a lifetime of at most the rotation: keys are kept for one rotation after their last ticket',
    params: { code: 'config_conflict' },
  })
  .refine(({ key, tokens }) => key !== undefined || tokens === undefined, {
    path: ['tokens'],
    error: 'no tokens without a key',
    params: { code: 'config_conflict' },
  });

const dns = z
  .strictObject({
    resolver: kind('address', 'IP-ADDRESS:PORT', parseResolverAddress).describe(
      '`127.0.0.1:53`. Its word that DNSSEC has validated an answer is taken, so it must be on loopback, or reached with `tls`.',
    ),
    tls: z
      .strictObject({
        name: kind('name', 'a DNS name or an IP address', parseServerName).describe(
          "What the resolver's certificate must be for.",
        ),
        roots: path('PEM file of trusted certificates, or `system` for those of this host.').prefault('system'),
      })
      .optional()
      .describe('Ask over TLS (RFC 7858). Default: UDP, and TCP for long answers.'),
  })
  .refine(({ resolver, tls }) => tls !== undefined || isLocal(resolver), {
    path: ['resolver'],
    error: 'a loopback address such as 127.0.0.1:53, or dns.tls beside it',
    params: { hint: 'anybody on the way to a resolver elsewhere could say that DNSSEC has validated an answer' },
  })
  .describe('A resolver that validates DNSSEC, for `dane`. Default: none.');

const transparency = z
  .strictObject({
    logs: path('The list of logs as JSON, in the format of https://www.gstatic.com/ct/log_list/v3/log_list.json.'),
    scts: whole(1, 16, 2).describe('Signed certificate timestamps that a certificate needs, each of another log.'),
    operators: whole(1, 16, 2).describe('Operators that these logs must be of, at least.'),
  })
  .refine(({ scts, operators }) => operators <= scts, {
    path: ['operators'],
    error: 'at most as many operators as scts',
    params: { code: 'config_conflict' },
  })
  .describe('Which logs of Certificate Transparency count, for `transparency` of upstreams. Default: none.');

const upstreamTls = z
  .strictObject({
    name: kind('name', 'a DNS name or an IP address', parseServerName)
      .describe(
        "What the server's certificate must be for, and what is asked for (SNI). Default: the host of each server.",
      )
      .optional(),
    verify: oneOf(['enforce', 'report'], 'enforce').describe(
      '`enforce`: a server is refused unless its certificate leads to `roots`, is for its name, valid, not in `crls` and pinned. `report`: that is only counted, and **any server is accepted** unless `dane` is enforced.',
    ),
    roots: path('PEM file of trusted certificates, or `system` for those of this host.').prefault('system'),
    crls: z
      .array(path('PEM or DER file.'), { error: 'a list of paths' })
      .max(64, 'at most 64 files')
      .default([])
      .describe(
        "Lists of revoked certificates, PEM or DER, read at start and reload. With any, one must be of the issuer of the server's certificate and not out of date.",
      ),
    pins: z
      .array(kind('pin', 'sha256/ and 32 bytes in base64', parseKeyPin), { error: 'a list of pins' })
      .max(64, 'at most 64 pins')
      .default([])
      .describe(
        'SHA-256 of public keys (SubjectPublicKeyInfo) as `sha256/BASE64`, of which the verified chain must have one. Empty: any.',
      ),
    dane: oneOf(checkModes, 'off').describe(
      'TLSA records from `dns`: `report` counts servers that fit none; `enforce` refuses them, also when there is no answer that DNSSEC vouches for. A record of usage 2 or 3 then stands in for `verify`.',
    ),
    transparency: oneOf(checkModes, 'off').describe(
      'Certificate Transparency by the top-level `transparency`: `report` counts servers with too few SCTs, `enforce` refuses them.',
    ),
    certificate: reference('a certificate')
      .describe('Shown to a server that asks who we are (mutual TLS); its key is in a token. Default: none.')
      .optional(),
    policy: reference('a policy')
      .prefault('intermediate')
      .describe('Which TLS is offered: `modern`, `intermediate`, `fips` or one of `policies`.'),
    alpn: alpnNames().describe('ALPN protocol names that are offered, preferred first. Empty: none.'),
    sni: flag(true).describe('Whether the name is sent to the server. An IP address never is (RFC 6066 3).'),
    resume: flag(true).describe('Whether TLS sessions with a server are resumed.'),
    deadline: duration(100, 600_000, '10s').describe('From connected to the end of the handshake.'),
  })
  .describe('TLS to the servers, for listeners with mode `encrypt` or `bridge`. Default: plaintext.');
const ocsp = z.strictObject({
  cache: path(
    'Directory in which responses are kept, so that keygate has them when it starts without a network; writable for `user`. Default: none.',
  ).optional(),
  proxy: kind('URL', 'http://HOST:PORT', parseProxyUrl)
    .describe('HTTP proxy through which responders are asked. Default: directly.')
    .optional(),
  nonce: flag(false).describe('Ask with a nonce, and refuse answers without it; most public responders have none.'),
  timeout: duration(100, 60_000, '10s').describe(
    'For one answer of a responder. No handshake and no start waits for it.',
  ),
});

const upstreamKeys = z.strictObject({
  tls: upstreamTls.optional(),
  servers: z
    .array(kind('address', 'HOST:PORT, unix:/path or original', parseServerAddress), { error: 'a list of servers' })
    .min(1, 'at least one server')
    .max(256, 'at most 256 servers')
    .describe(
      '`host:port`, `[v6]:port` or `unix:/path`; or `original` alone: where the client of a `transparent` listener wanted to go.',
    ),
  balance: oneOf(['round-robin', 'least-connections'], 'round-robin').describe('How the next server is chosen.'),
  proxyProtocol: z
    .enum(['v1', 'v2'], { error: 'v1 or v2' })
    .optional()
    .describe('Tell the upstream about the client with the PROXY protocol. Default: off.'),
  proxyClientCertificate: flag(false).describe(
    "Whether that tells the client's whole certificate too (v2, PP2_SUBTYPE_SSL_CLIENT_CERT), which needs servers that read a header of up to 4096 bytes from several packets.",
  ),
  transparent: flag(false).describe(
    "Servers see the client's address as the source of its connections. Needs CAP_NET_RAW and rules for the way back.",
  ),
  connectDeadline: duration(10, 600_000, '5s').describe('For connecting to one server.'),
  attempts: whole(1, 16, 3).describe('Servers tried for one connection.'),
  health: z
    .strictObject({
      tcp: requiredDuration(100, 3_600_000).describe('Connect to each server this often.'),
      timeout: duration(10, 600_000, '2s').describe('A check that takes longer has failed.'),
      fall: whole(1, 100, 3).describe('Failed checks in a row until a server is down.'),
      rise: whole(1, 100, 2).describe('Passed checks in a row until it is up again.'),
    })
    .optional()
    .describe('Active checks. Default: off.'),
  passive: z
    .strictObject({
      failures: whole(1, 1000, 3).describe('Failed connects in a row until a server is ejected.'),
      ejection: duration(100, 3_600_000, '10s').describe('How long it stays ejected.'),
    })
    .prefault({})
    .describe('What failed connects of clients say about a server.'),
  slowStart: duration(100, 3_600_000, 'none', 'none').describe(
    'How long a server that comes up again gets less than its share of new connections: a tenth at first, then more and more.',
  ),
});

const upstream = upstreamKeys
  .refine(({ servers }) => servers.length === 1 || !servers.some((server) => 'original' in server), {
    path: ['servers'],
    error: 'original alone, or other servers',
    params: { code: 'config_conflict' },
  })
  .refine(({ servers, health }) => health === undefined || !servers.some((server) => 'original' in server), {
    path: ['health'],
    error: 'no checks of original, which is another server for each client',
    params: { code: 'config_conflict' },
  })
  .refine(
    ({ servers, tls }) => tls?.name !== undefined || tls === undefined || !servers.some((it) => 'original' in it),
    {
      path: ['tls'],
      error: 'a name in tls: original has none that its certificate could be for',
      params: { code: 'config_conflict' },
    },
  )
  .refine(({ proxyProtocol, proxyClientCertificate }) => proxyProtocol === 'v2' || !proxyClientCertificate, {
    path: ['proxyClientCertificate'],
    error: 'false without proxyProtocol: v2, which alone has room for it',
    params: { code: 'config_conflict' },
  })
  .refine(({ servers, transparent: isTransparent }) => !isTransparent || !servers.some((server) => 'path' in server), {
    path: ['transparent'],
    error: 'false with a unix socket, which has no source address',
    params: { code: 'config_conflict' },
  });

const proxyIn = z.strictObject(
  {
    from: z
      .array(kind('network', 'a network such as 192.0.2.0/24', parseNetwork), { error: 'a list of networks' })
      .min(1, 'at least one network')
      .max(256, 'at most 256 networks')
      .describe(
        'Networks of proxies. Their connections must begin with a PROXY header; those of others are never read for one.',
      ),
    deadline: duration(100, 600_000, '5s').describe('From accept to the end of the header.'),
  },
  { error: 'proxies in front: {from: [NETWORK, ...]}' },
);

const route = z
  .strictObject({
    names: z
      .array(kind('name', 'a DNS name, or one with * as its first label', parseRouteName), { error: 'a list of names' })
      .max(10_000, 'at most 10000 names')
      .default([])
      .describe('Names that clients ask for (SNI); `*.example.org` stands for one label. Empty: any, or none.'),
    alpn: alpnNames().describe(
      'Application protocols that were agreed on, or in mode `passthrough` the first that is offered. Empty: any, or none.',
    ),
    clients: clients
      .optional()
      .describe('Clients by their certificates; one match is enough. Default: any, with or without a certificate.'),
    upstream: reference('an upstream').describe('Where such connections go.').optional(),
    refuse: z.literal(true, { error: 'true' }).describe('Or that nobody serves them.').optional(),
  })
  .refine(
    ({ upstream: to, refuse }) => (to === undefined) !== (refuse === undefined),
    'exactly one of upstream and refuse',
  );

const listener = z
  .strictObject({
    bind: z
      .array(kind('address', 'IP-ADDRESS:PORT', parseBindAddress), { error: 'a list of addresses' })
      .min(1, 'at least one address')
      .max(64, 'at most 64 addresses')
      .describe('`0.0.0.0:443` for IPv4, `[::]:443` for IPv6 only; port 0 takes any free port.'),
    mode: kind('mode', 'offload', parseMode)
      .prefault('offload')
      .describe(
        '`offload`: TLS from the client, plaintext to the upstream; `encrypt`: the other way round; `bridge`: TLS on both sides; `passthrough`: TLS is not ended, only routed.',
      ),
    certificates: z
      .array(reference('a certificate'), { error: 'a list of certificate names' })
      .min(1, 'at least one certificate')
      .optional()
      .describe('For `offload` and `bridge`. Chosen by the name the client asks for (SNI); the first is the default.'),
    unknownName: oneOf(['default', 'refuse'], 'default').describe(
      'What a client gets that asks for another name: the default certificate, or an alert.',
    ),
    alpn: alpnNames().describe('ALPN protocol names, preferred first. Empty: not negotiated.'),
    policy: reference('a policy')
      .prefault('intermediate')
      .describe('Which TLS the listener speaks: `modern`, `intermediate`, `fips` or one of `policies`.'),
    clientCertificates: clientCertificates.optional(),
    upstream: reference('an upstream')
      .describe('Where connections go that no route fits. Without it, those are refused.')
      .optional(),
    routes: z
      .array(route, { error: 'a list of routes' })
      .max(1000, 'at most 1000 routes')
      .default([])
      .describe('The first that fits says where a connection goes.'),
    proxyProtocol: proxyIn
      .optional()
      .describe('Proxies in front say by the PROXY protocol (v1 or v2) who the client is. Default: off.'),
    transparent: flag(false).describe(
      'Clients are redirected here by nftables (REDIRECT or TPROXY): where they wanted to go counts as the destination. Needs CAP_NET_RAW to bind.',
    ),
    deadlines: z
      .strictObject({
        handshake: duration(100, 600_000, '10s').describe('From accept to the end of the handshake.'),
        idle: duration(1000, 7 * 86_400_000, '5m').describe('Without a byte in either direction.'),
        lifetime: duration(1000, lifetimeMsMax, 'none', 'none').describe('From accept to close, whatever happens.'),
        halfClosed: duration(1000, 7 * 86_400_000, '1m').describe('Without a byte, once one side has ended its half.'),
      })
      .prefault({})
      .describe('When a connection is closed.'),
    limits: z
      .strictObject({
        connections: whole(1, 1_000_000, 20_000).describe('Open connections, per worker.'),
        handshakes: whole(1, 1_000_000, 1024).describe('Handshakes in flight, per worker.'),
        perClient: z
          .strictObject({
            rate: wholeNumber(1, 1_000_000, 'a whole number from 1 to 1000000').describe(
              'Connections per second on average, per worker.',
            ),
            burst: wholeNumber(1, 1_000_000, 'a whole number from 1 to 1000000')
              .optional()
              .describe('Connections at once, per worker. Default: `rate`.'),
            ipv4Prefix: whole(8, 32, 32).describe('Bits of an IPv4 address that tell clients apart.'),
            ipv6Prefix: whole(16, 128, 64).describe(
              'Bits of an IPv6 address that tell clients apart: a client has a network of its own.',
            ),
          })
          .optional()
          .describe(
            'How often one client may come, by its address, which is the one that a PROXY header says. Default: as it likes.',
          ),
      })
      .prefault({})
      .describe('Over a limit a client is turned away at once.'),
    backlog: whole(1, 65_535, 4096).describe(
      'Accept queue, per worker (listen(2)); the kernel caps it at net.core.somaxconn.',
    ),
  })
  .check((context) => {
    for (const fault of listenerFaults(context.value)) {
      context.issues.push({
        code: 'custom',
        input: context.value,
        message: fault.expected,
        params: { ...fault },
        path: [fault.key],
      });
    }
  });

const workersExpected = 'auto, or a whole number from 1 to 1024';

/** Parses to `Document`. Every section is checked even when another is wrong. */
export const documentSchema = z.strictObject(
  {
    workers: z
      .union([z.literal('auto'), wholeNumber(1, 1024, workersExpected)], { error: workersExpected })
      .default('auto')
      .describe('Worker processes; `auto`: one per core that keygate may use.'),
    user: account().describe('What workers run as when keygate is started as root. Default: no change.'),
    group: account().describe('Default: the primary group of `user`.'),
    drainDeadline: duration(0, 86_400_000, '30s').describe(
      'Connections still open this long after a drain began are closed.',
    ),
    reloadDeadline: duration(100, 3_600_000, '1m').describe(
      'A reload that a worker has not prepared by then is rolled back.',
    ),
    log: z
      .strictObject({
        level: oneOf(logLevels, 'info').describe('The least severe level that is logged.'),
        file: path('Appended to, and opened again by SIGHUP and SIGUSR2. Default: standard output.').optional(),
        access: z
          .strictObject({
            file: path('As `log.file`. Default: where the log goes.').optional(),
            sample: whole(1, 1_000_000, 1).describe('One connection in so many gets a line; 1: all.'),
            failures: oneOf(['always', 'sampled'], 'always').describe(
              'Whether connections that did not end as they should are sampled too.',
            ),
            rate: whole(1, 1_000_000, 1000).describe(
              'Lines per second and worker; twice as many after a quiet second.',
            ),
          })
          .optional()
          .describe('A line for each connection that has ended. Default: off.'),
        keyLog: path(
          'TLS secrets of *every* connection, for Wireshark: whoever reads the file reads the traffic. Refused without `serve --allow-key-log`.',
        ).optional(),
      })
      .prefault({})
      .describe('Logging, as JSON lines.'),
    admin: z
      .strictObject({
        listen: kind('address', 'IP-ADDRESS:PORT or unix:/path', parseAdminAddress).describe(
          '`127.0.0.1:9180` or `unix:/path`. Another address than a loopback one needs `token` or `tls.clientCertificates`.',
        ),
        token: secretPlace('token')
          .optional()
          .describe(
            'Where the bearer token is kept that requests must carry, 16 to 1024 characters: exactly one of these. Default: none is needed.',
          ),
        tls: z
          .strictObject({
            chain: path('PEM file with the certificate of the admin server first, then its issuers.'),
            key: path(
              "PEM file of its private key, which other users cannot read. A file, because the admin server is the primary's, which never loads a PKCS#11 module.",
            ),
            clientCertificates: path(
              'PEM file of authorities: only clients with a certificate that one of them issued may connect. Default: clients need none.',
            ).optional(),
          })
          .optional()
          .describe('HTTPS instead of HTTP, TLS 1.2 or newer. Default: off.'),
      })
      .optional()
      .describe('Admin server: metrics, health, status, log level, reload, drain. Default: off.'),
    sandbox: z
      .strictObject({
        enabled: flag(true).describe('`false`: workers may do whatever `user` may.'),
        writable: z
          .array(kind('path', 'a path', parsePath), { error: 'a list of paths' })
          .max(64, 'at most 64 paths')
          .default([])
          .describe('Files, and directories with all that is in them, that a PKCS#11 module must be able to write.'),
      })
      .prefault({})
      .describe('What workers, and so the PKCS#11 modules in them, are kept from: see [Sandbox](#sandbox).'),
    tokens: z
      .record(name(), token, { error: 'tokens by name' })
      .default({})
      .describe('PKCS#11 tokens, by a name of your choice.'),
    certificates: z
      .record(name(), certificate, { error: 'certificates by name' })
      .default({})
      .describe('Certificates and where their private keys are.'),
    policies: z
      .record(name(), policy, { error: 'policies by name' })
      .default({})
      .describe('TLS policies beside the built-in ones: see [docs/tls.md](docs/tls.md#policies).'),
    tickets: tickets.prefault({}).describe('Session tickets.'),
    ocsp: ocsp.prefault({}).describe('How the responses are fetched that `certificates.NAME.ocsp` asks for.'),
    dns: dns.optional(),
    transparency: transparency.optional(),
    upstreams: section('upstream', upstream).describe('Services that connections go to.'),
    listeners: section('listener', listener).describe('Addresses that clients connect to.'),
  },
  { error: 'a mapping with the sections tokens, certificates, upstreams and listeners' },
);

export type Document = z.output<typeof documentSchema>;
export type ClientCertificatesDocument = z.output<typeof clientCertificates>;

/** JSON Schema (draft 2020-12) of the document, for editors. Faults that a JSON Schema cannot say are left to `keygate check`. */
export function jsonSchema(): JsonSchema {
  return z.toJSONSchema(documentSchema, { io: 'input' }) as JsonSchema;
}

/** Where a PIN or the admin server's token may stand by mistake. */
export function isSecret([part, second, third]: readonly (string | number)[]): boolean {
  return (part === 'tokens' && third === 'pin') || (part === 'admin' && second === 'token');
}

let printed: JsonSchema | undefined;

/** The keys that a mapping of the document may have; empty where names are free. */
export function knownKeys(mapping: readonly (string | number)[]): readonly string[] {
  printed ??= jsonSchema();
  let schema: JsonSchema | undefined = printed;
  for (const step of mapping)
    schema =
      typeof step === 'number'
        ? schema?.items
        : (schema?.properties?.[step] ?? (schema?.additionalProperties || undefined));
  return Object.keys(schema?.properties ?? {});
}

/** As much of JSON Schema as documentSchema comes out as. */
export interface JsonSchema {
  readonly properties?: Readonly<Record<string, JsonSchema>>;
  readonly required?: readonly string[];
  readonly additionalProperties?: JsonSchema | false;
  readonly items?: JsonSchema;
  readonly title?: string;
  readonly description?: string;
  readonly default?: unknown;
  readonly type?: string;
  readonly enum?: readonly unknown[];
  readonly const?: unknown;
  readonly anyOf?: readonly JsonSchema[];
  readonly minimum?: number;
  readonly maximum?: number;
}

function section<T extends z.ZodType>(singular: string, value: T) {
  return z
    .record(name(), value, { error: `${singular}s by name` })
    .refine((entries) => Object.keys(entries).length > 0, `at least one ${singular}`);
}

function name() {
  return z
    .string()
    .regex(
      /^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$/,
      'a name of 1 to 64 letters, digits, "-", "_" and ".", beginning with a letter or digit',
    );
}

/** Whether the name is defined is the business of references.ts. */
function reference(what: string) {
  return z.string({ error: `the name of ${what}` }).meta({ title: `name of ${what}` });
}

function secretPlace(what: string) {
  return z
    .strictObject(
      {
        file: path('A file that other users cannot read; one newline at its end is ignored.').optional(),
        env: kind('name', 'the name of an environment variable', parseVariableName)
          .describe('An environment variable.')
          .optional(),
        credential: kind('name', 'the name of a systemd credential', parseCredentialName)
          .describe('A systemd credential, read from `$CREDENTIALS_DIRECTORY`.')
          .optional(),
      },
      { error: `a place where the ${what} is kept: {file: PATH}, {env: NAME} or {credential: NAME}` },
    )
    .refine(
      (places) => Object.values(places).filter((place) => place !== undefined).length === 1,
      'exactly one of file, env and credential',
    );
}

function clientNames<T>(title: string, error: string, parse: (text: string) => Parsed<T>) {
  return z
    .array(kind(title, error, parse), { error: `a list: ${error}` })
    .max(10_000, 'at most 10000')
    .default([]);
}

function words<const T extends readonly string[]>(what: string, known: T) {
  return z
    .array(z.enum(known, { error: `one of ${known.join(', ')}` }), { error: `a list of ${what}s` })
    .min(1, `at least one ${what}`);
}

function alpnNames() {
  const error = 'a protocol name of 1 to 255 characters';
  return z
    .array(z.string({ error: 'a protocol name' }).min(1, error).max(255, error), { error: 'a list of protocol names' })
    .max(16, 'at most 16 protocol names')
    .default([]);
}

function account() {
  return z
    .string({ error: 'a name' })
    .regex(/^[A-Za-z_][A-Za-z0-9_.-]{0,31}$/, 'the name of an account, not its number')
    .optional();
}

function oneOf<const T extends readonly [string, ...string[]]>(values: T, preset: T[number]) {
  return z.enum(values, { error: `one of ${values.join(', ')}` }).default(preset as never);
}

function flag(preset: boolean) {
  return z.boolean({ error: 'true or false' }).default(preset);
}

function whole(min: number, max: number, preset: number) {
  return wholeNumber(min, max, `a whole number from ${min} to ${max}`).default(preset);
}

function wholeNumber(min: number, max: number, error: string) {
  return z.int({ error }).min(min, error).max(max, error);
}

function verifyRate(preset: 'always' | number) {
  const error = 'always, or a whole number N from 2 to 1000000 for one in N';
  return z.union([z.literal('always'), wholeNumber(2, 1_000_000, error)], { error }).default(preset);
}

/** A duration in a range of milliseconds; the word `none` stands for 0 where it is allowed. */
function duration(min: number, max: number, preset: string, word?: 'none') {
  return requiredDuration(min, max, word).prefault(preset);
}

function requiredDuration(min: number, max: number, word?: 'none') {
  const range = `duration from ${formatDuration(min)} to ${formatDuration(max)}${word === undefined ? '' : `, or ${word}`}`;
  return kind(range, `a ${range}, such as 250ms, 5s, 1m, 2h or 7d`, (text): Parsed<number> => {
    if (text === word) return { value: 0 };
    const parsed = parseDuration(text);
    if ('fault' in parsed || (parsed.value >= min && parsed.value <= max)) return parsed;
    return { fault: { expected: `a ${range}` } };
  });
}

function path(meaning: string) {
  return kind('path', 'a path', parsePath).describe(meaning);
}

/** A string with a meaning of its own. The title shows in editors and in the reference. */
function kind<T>(title: string, error: string, parse: (text: string) => Parsed<T>) {
  return z
    .string({ error })
    .transform((text, context): T => {
      const parsed = parse(text);
      if ('value' in parsed) return parsed.value;
      context.issues.push({ code: 'custom', input: text, message: parsed.fault.expected, params: { ...parsed.fault } });
      return z.NEVER;
    })
    .meta({ title });
}

function tokenUri(text: string): Parsed<Pkcs11Uri> {
  const parsed = parsePkcs11Uri(text);
  if ('fault' in parsed) return parsed;
  const { token: label, object, id, type } = parsed.value;
  if (label === undefined) return { fault: { expected: 'a URI with token=LABEL' } };
  if (object ?? id ?? type)
    return {
      fault: { expected: 'a URI without object, id and type', hint: 'objects are named by the key of a certificate' },
    };
  return parsed;
}

function keyUri(text: string): Parsed<Pkcs11Uri> {
  return objectUri(text, 'private');
}

function secretKeyUri(text: string): Parsed<Pkcs11Uri> {
  return objectUri(text, 'secret-key');
}

function objectUri(text: string, wanted: NonNullable<Pkcs11Uri['type']>): Parsed<Pkcs11Uri> {
  const parsed = parsePkcs11Uri(text);
  if ('fault' in parsed) return parsed;
  const { object, id, type, ...tokenAttributes } = parsed.value;
  if (Object.keys(tokenAttributes).length > 0) {
    return {
      fault: { expected: 'a URI with only object, id and type', hint: 'say which tokens hold the key with "tokens"' },
    };
  }
  if (type !== undefined && type !== wanted) return { fault: { expected: `type=${wanted} or no type` } };
  if ((object ?? id) === undefined) return { fault: { expected: 'a URI with object=LABEL or id=%XX...' } };
  return parsed;
}

function parseVariableName(text: string): Parsed<string> {
  return /^[A-Za-z_][A-Za-z0-9_]{0,127}$/.test(text)
    ? { value: text }
    : { fault: { expected: 'the name of an environment variable' } };
}

/** Slashes would lead out of the directory. */
function parseCredentialName(text: string): Parsed<string> {
  if (/^[A-Za-z0-9_][A-Za-z0-9_.-]{0,254}$/.test(text)) return { value: text };
  return { fault: { expected: 'the name of a systemd credential, without slashes' } };
}

function parseMode(text: string): Parsed<ListenerMode> {
  const mode = listenerModes.find((known) => known === text);
  if (mode !== undefined) return { value: mode };
  const expected = listenerModes.join(', ');
  if (text !== 'forward') return { fault: { expected } };
  return { fault: { code: 'config_unsupported', expected, hint: `mode ${text} is not in this version` } };
}

/** In lower case, as names are compared. */
function parseRouteName(text: string): Parsed<string> {
  const lowered = text.toLowerCase();
  const label = '[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?';
  const isName = new RegExp(`^(?:\\*\\.)?${label}(?:\\.${label})*$`).test(lowered);
  if (lowered.length <= 253 && isName) return { value: lowered };
  return { fault: { expected: 'a DNS name, or one with * as its first label' } };
}

function parseKeyPin(text: string): Parsed<string> {
  const [, digest] = /^sha256\/([A-Za-z0-9+/]{43}=)$/.exec(text) ?? [];
  if (digest !== undefined && Buffer.from(digest, 'base64').toString('base64') === digest) return { value: digest };
  return {
    fault: {
      expected: 'sha256/ and 32 bytes in base64',
      hint: 'openssl x509 -in cert.pem -noout -pubkey | openssl pkey -pubin -outform der | openssl dgst -sha256 -binary | base64',
    },
  };
}

/** As the engine understands them (client_status.rs). */
function parseResponderUrl(text: string): Parsed<string> {
  const url = URL.parse(text);
  const isPlain = url !== null && url.protocol === 'http:' && url.username === '' && url.password === '';
  if (isPlain && text.startsWith('http://') && url.hash === '' && /^[!-~]{1,2000}$/.test(text)) return { value: text };
  return { fault: { expected: 'http://HOST[:PORT]/PATH' } };
}

function parseCommonName(text: string): Parsed<string> {
  // X.520 allows 64 characters; issuers do not keep to it.
  return /^\P{Cc}{1,255}$/u.test(text) ? { value: text } : { fault: { expected: 'a name without control characters' } };
}

/** Letter by letter as it stands in certificates: nothing is made lower case, and nothing is decoded. */
function parseClientUri(text: string): Parsed<string> {
  const scheme = '[A-Za-z][A-Za-z0-9+.-]*';
  const isWhole = new RegExp(`^${scheme}:[!-)+-~]{1,2000}$`).test(text);
  // Below a host, or all hosts would be meant.
  const isTree = new RegExp(`^${scheme}://[!-)+-.0-~]{1,255}/(?:[!-)+-~]{1,1700}/)?\\*$`).test(text);
  if (isWhole || isTree) return { value: text };
  return { fault: { expected: 'a URI, or one that ends in /* below a host' } };
}

function parseEmail(text: string): Parsed<string> {
  return /^[!-?A-~]{1,64}@[A-Za-z0-9.-]{1,253}$/.test(text) ? { value: text } : { fault: { expected: 'NAME@DOMAIN' } };
}

function parseServerName(text: string): Parsed<string> {
  if (isIP(text) !== 0) return { value: text };
  const parsed = parseRouteName(text);
  return 'value' in parsed && !text.startsWith('*') ? parsed : { fault: { expected: 'a DNS name or an IP address' } };
}

interface ListenerDocument {
  readonly mode: ListenerMode;
  readonly certificates?: readonly string[] | undefined;
  readonly alpn: readonly string[];
  readonly clientCertificates?: object | undefined;
  readonly routes: readonly object[];
  readonly upstream?: string | undefined;
  readonly proxyProtocol?: object | undefined;
  readonly transparent: boolean;
}

function* listenerFaults({
  mode,
  certificates,
  alpn,
  clientCertificates: ofClients,
  routes,
  upstream: preset,
  proxyProtocol,
  transparent: isTransparent,
}: ListenerDocument): Generator<Fault & { readonly key: keyof ListenerDocument }> {
  const endsTls = mode === 'offload' || mode === 'bridge';
  if (endsTls && certificates === undefined) {
    yield { key: 'certificates', code: 'config_missing_key', expected: `certificates: mode ${mode} ends TLS` };
  }
  if (!endsTls && certificates !== undefined) {
    yield { key: 'certificates', code: 'config_conflict', expected: `none: mode ${mode} ends no TLS` };
  }
  if (!endsTls && alpn.length > 0) {
    yield { key: 'alpn', code: 'config_conflict', expected: `none: mode ${mode} ends no TLS` };
  }
  if (!endsTls && ofClients !== undefined) {
    yield { key: 'clientCertificates', code: 'config_conflict', expected: `none: mode ${mode} ends no TLS` };
  }
  if (mode === 'encrypt' && routes.length > 0) {
    yield { key: 'routes', code: 'config_conflict', expected: 'none: plaintext says no name to route by' };
  }
  if (isTransparent && proxyProtocol !== undefined) {
    const expected = 'false with proxyProtocol: one of them says what the destination was';
    yield { key: 'transparent', code: 'config_conflict', expected };
  }
  if (preset === undefined && routes.length === 0) {
    yield { key: 'upstream', code: 'config_missing_key', expected: 'an upstream, or routes' };
  }
}
