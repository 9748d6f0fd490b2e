/**
 * Owns: PKCS#11 URIs (RFC 7512): a strict parser, a printer, and the rule which token they mean.
 * Must not know: PINs (a URI with `pin-value` or `pin-source` is refused), PKCS#11 calls.
 * Runs: everywhere.
 */

/** Percent-decoded path attributes. Holds no query attributes, so printing it cannot show a PIN. */
export interface Pkcs11Uri {
  readonly token?: string;
  readonly manufacturer?: string;
  readonly serial?: string;
  readonly model?: string;
  /** CKA_LABEL. */
  readonly object?: string;
  /** CKA_ID in lower-case hex. */
  readonly id?: string;
  readonly type?: 'public' | 'private' | 'cert' | 'secret-key' | 'data';
}
