/**
 * Owns: disposable SoftHSM tokens that hold keys with self-signed certificates, and their part of a configuration.
 * Must not know: what is tested.
 * Runs: in test processes. The module is closed again before this returns, so that it never disturbs a keygate that logs in.
 */
import { readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import type { Purpose } from '../../src/pkcs11/certificates.ts';
import { createSelfSigned } from '../../src/pkcs11/issue.ts';
import { findPrivateKey } from '../../src/pkcs11/keys.ts';
import type { OpenToken } from '../../src/pkcs11/keys.ts';
import { closeSession, findToken, login, openModule, openSession } from '../../src/pkcs11/module.ts';
import { generateKeyPair } from '../../src/pkcs11/provision.ts';
import type { GeneratedKind } from '../../src/pkcs11/provision.ts';
import { disposableToken, unguarded } from './softhsm.ts';
import type { DisposableToken } from './softhsm.ts';

/** A certificate to make; 127.0.0.1 and ::1 are always among its addresses. */
export interface WantedCertificate {
  readonly kind: GeneratedKind;
  readonly dns?: readonly string[];
  /** Default: `server`. */
  readonly purpose?: Purpose;
  /** Label of a key that is there already; default: a new key with the certificate's name as its label. */
  readonly key?: string;
}

export interface ProvisionedToken extends DisposableToken, Disposable {
  /** A token in the configuration's `tokens`. */
  readonly settings: Readonly<Record<string, unknown>>;
  /** The configuration's `certificates`. */
  readonly certificates: Readonly<Record<string, { readonly chain: string; readonly key: string }>>;
  /** The certificate of that name in PEM, also what a client that verifies must trust. */
  pem(name: string): string;
  /** Changes what is in the token, logged in with a read-write session. */
  use<Result>(change: (open: OpenToken) => Result | Promise<Result>): Promise<Result>;
}

export async function provisionedToken(
  wanted: Readonly<Record<string, WantedCertificate>>,
  label?: string,
): Promise<ProvisionedToken> {
  const disposable = disposableToken(label === undefined ? {} : { label });
  const certificates: Record<string, { chain: string; key: string }> = {};
  const use: ProvisionedToken['use'] = async (change) => withOpenToken(disposable, change);
  await use(async (open) => {
    for (const [name, { kind, dns = ['localhost'], purpose = 'server', key = name }] of Object.entries(wanted)) {
      const privateKey = key === name ? generateKeyPair(open, name, kind).key : findPrivateKey(open, { object: key });
      const chain = join(disposable.directory, `${name}.pem`);
      writeFileSync(chain, await createSelfSigned(open, privateKey, { dns, ip: ['127.0.0.1', '::1'], purpose }, 30));
      certificates[name] = { chain, key: `pkcs11:object=${key}` };
    }
  });
  return {
    ...disposable,
    settings: {
      module: disposable.module,
      uri: `pkcs11:token=${disposable.label}`,
      pin: { file: disposable.pinFile },
      lanes: 2,
      // A sanitizer must see what a module does with memory (test/sanitizers).
      ...(process.env['KEYGATE_SANITIZER'] === undefined ? {} : { isolate: false }),
    },
    certificates,
    pem: (name) => readFileSync(join(disposable.directory, `${name}.pem`), 'utf8'),
    use,
    [Symbol.dispose]: disposable.dispose,
  };
}

async function withOpenToken<Result>(
  disposable: DisposableToken,
  use: (open: OpenToken) => Result | Promise<Result>,
): Promise<Result> {
  process.env['SOFTHSM2_CONF'] = disposable.env.SOFTHSM2_CONF;
  const opened = openModule(disposable.module, false, unguarded);
  try {
    const token = findToken(opened.module, { token: disposable.label });
    const session = openSession(token, 'read-write');
    try {
      login(session, token, () => Buffer.from(disposable.pin), unguarded);
      return await use({ session, token });
    } finally {
      closeSession(session);
    }
  } finally {
    opened.close();
  }
}
