/**
 * Owns: opening a PKCS#11 module in this process, finding a token in it, and logging in.
 * Must not know: keys, certificates, the configuration file.
 * Runs: on the main thread of a worker or of a command, synchronously, never on the path of a connection; never in the
 * primary, and never in a worker thread (one thread's C_Finalize would pull the module from under the others).
 *
 * Synchronous on purpose: pkcs11js' asynchronous calls keep raw pointers into buffers that may be collected.
 */
import { isUtf8 } from 'node:buffer';
import { Module, SessionFlag, TokenFlag, UserType } from 'graphene-pk11';
import type { Session, Slot, Token } from 'graphene-pk11';
import { formatPkcs11Uri } from '../config/pkcs11-uri.ts';
import type { Pkcs11Uri } from '../config/pkcs11-uri.ts';
import { KeygateError, TokenError } from '../errors.ts';
import { ckrCode, ckrName, failureReason, tokenFailure } from './failure.ts';

/** What only native code can do for a module; the engine has it. */
export interface NativeModuleGuard {
  /**
   * Loads the module for the life of the process, before graphene does: bound to its own libcrypto when `isolate`,
   * and never unloaded when graphene's object is collected. Until what it returns is called, the engine does not finalise
   * the module to initialise it again: a call of graphene's that is running would crash.
   */
  enter(modulePath: string, isolate: boolean): () => void;
  /**
   * Waits at most `waitMs` for the machine-wide login lock of the module and returns its release.
   * SoftHSM 2.6 rewrites the token file in C_Login and unlocks it before the flush: whoever calls C_Initialize or
   * C_Login at that moment sees a token that is not there. Held from C_Initialize until the keys are found.
   * @throws when the lock is not free in time; the caller goes on and says so.
   */
  lockLogin(modulePath: string, waitMs: number): () => void;
  /**
   * To be asked before a login: this process and its siblings remember which PINs were refused, and which the token has not
   * answered yet. Without an obstacle, `pinAnswered` must follow.
   * @returns why this PIN must not be sent now, or undefined
   */
  presentPin(token: PinOwner, pin: Buffer): PinObstacle | undefined;
  /** Told what C_Login answered: a return code, 0 for CKR_OK; undefined where the PIN was not sent. */
  pinAnswered(token: PinOwner, pin: Buffer, ckr: number | undefined): void;
}

export interface PinObstacle {
  /** The return code with which the token refused it; without one it has not answered a login with it. */
  readonly refused?: number;
}

/** Whose PIN it is. */
export interface PinOwner {
  readonly modulePath: string;
  readonly serial: string;
}

/** A token that is present, as C_GetTokenInfo describes it (PKCS#11 v3.0 5.5); texts without blank padding. */
export interface TokenInSlot {
  readonly slot: Slot;
  readonly label: string;
  readonly serial: string;
  readonly manufacturer: string;
  readonly model: string;
  /** CKF_* bits. */
  readonly flags: number;
  readonly sessions: SessionCounts;
  /** Length that a PIN may have. */
  readonly pinBytes: { readonly min: number; readonly max: number };
  /** True when the token did not answer now and this is what it said earlier in this process. */
  readonly remembered: boolean;
}

/** Undefined where the token does not say; `Max` is Infinity where it has no limit. */
interface SessionCounts {
  readonly open: number | undefined;
  readonly max: number | undefined;
}

/** A module in use. Who initialised it finalises it; whoever found it initialised leaves it so. */
export interface OpenModule {
  readonly module: Module;
  /**
   * C_Finalize if this is who called C_Initialize: whoever uses the module next begins afresh. Otherwise nothing,
   * because the engine's sessions in the same process would be gone.
   */
  close(): void;
}

/**
 * Loads the module and calls C_Initialize with CKF_OS_LOCKING_OK; one that is initialised already is used as it is.
 * The caller holds the login lock.
 * @throws TokenError `token_module`, or what the guard throws of its own.
 */
export function openModule(path: string, isolate: boolean, guard: NativeModuleGuard): OpenModule {
  let leave = () => {};
  try {
    leave = guard.enter(path, isolate);
    const module = loadedModules.get(path) ?? Module.load(path);
    loadedModules.set(path, module);
    const isOurs = initialise(module);
    return {
      module,
      close() {
        if (isOurs) finalise(module);
        leave();
      },
    };
  } catch (error) {
    leave();
    throw moduleFailure(error, path);
  }
}

/** Every token that is present, initialised or not. */
export function listTokens(module: Module): TokenInSlot[] {
  let slots: Slot[];
  try {
    slots = [...module.getSlots(true)];
  } catch (error) {
    throw moduleFailure(error, module.libFile);
  }
  return slots.map((slot) => describeToken(module, slot)).filter((token) => token !== undefined);
}

/**
 * The one initialised token that the URI means, by label, serial, manufacturer and model; never by slot id, which
 * changes when a module is initialised again.
 * @throws TokenError `token_not_found`, listing the tokens that are there.
 */
export function findToken(module: Module, uri: Pkcs11Uri): TokenInSlot {
  const tokens = listTokens(module).filter((token) => (token.flags & TokenFlag.TOKEN_INITIALIZED) !== 0);
  const matching = tokens.filter((token) => matchesToken(uri, token));
  const [token] = matching;
  if (token !== undefined && matching.length === 1) return token;
  const wanted = uri.token ?? formatPkcs11Uri(uri);
  const found = matching.length === 0 ? tokens : matching;
  const list = found.map(({ label, serial }) => `"${label}" (serial ${serial})`).join(', ') || 'none';
  throw new TokenError(
    'token_not_found',
    matching.length === 0
      ? `token ${wanted}: ${formatPkcs11Uri(uri)} is not in module ${module.libFile}; tokens there: ${list}`
      : `token ${wanted}: ${formatPkcs11Uri(uri)} means ${matching.length} tokens in module ${module.libFile}: ${list}`,
    {
      token: wanted,
      hint: matching.length === 0 ? 'see keygate token list' : 'add serial=... to the URI',
    },
  );
}

function matchesToken(uri: Pkcs11Uri, token: TokenInSlot): boolean {
  return (
    matchesField(uri.token, token.label) &&
    matchesField(uri.serial, token.serial) &&
    matchesField(uri.manufacturer, token.manufacturer) &&
    matchesField(uri.model, token.model)
  );
}

function matchesField(wanted: string | undefined, found: string): boolean {
  return wanted === undefined || wanted === found;
}

/** Opens a session; the caller closes it. Closing the last session of the process logs out (PKCS#11 v3.0 5.6). */
export function openSession(token: TokenInSlot, access: 'read' | 'read-write' = 'read'): Session {
  const flags = access === 'read' ? SessionFlag.SERIAL_SESSION : SessionFlag.SERIAL_SESSION | SessionFlag.RW_SESSION;
  try {
    return token.slot.open(flags);
  } catch (error) {
    throw tokenFailure(error, token.label, 'C_OpenSession');
  }
}

/** Closes a session whose work is done or has failed; a session that the token has lost already is closed. */
export function closeSession(session: Session): void {
  try {
    session.close();
  } catch {
    // The failure that lost the session was reported where it happened.
  }
}

/**
 * Logs in as the user, once, unless the process is logged in to the token already; then the PIN is not sent at all.
 * Refuses to send a PIN that could lock the token.
 * @param readPin asked only when the PIN is needed; the buffer is zeroed here.
 * @param guard remembers PINs that were refused or not answered, so that they are not sent again
 * @returns warnings for the operator.
 * @throws TokenError `token_pin_locked`, `token_login`, or `token_operation` where a login with this PIN is not answered yet.
 */
export function login(
  session: Session,
  token: TokenInSlot,
  readPin: () => Buffer,
  guard: Pick<NativeModuleGuard, 'presentPin' | 'pinAnswered'>,
): string[] {
  if (isLoggedIn(session)) return [];
  refuseDangerousLogin(token);
  const pin = readPin();
  const owner = { modulePath: token.slot.module.libFile, serial: token.serial };
  try {
    const obstacle = guard.presentPin(owner, pin);
    if (obstacle !== undefined) throw refusePin(token.label, obstacle);
    let ckr: number | undefined = 0;
    try {
      sendPin(session, token.label, pin, UserType.USER);
    } catch (error) {
      ckr = ckrCode(error);
      throw error;
    } finally {
      guard.pinAnswered(owner, pin, ckr);
    }
  } finally {
    pin.fill(0);
  }
  return (token.flags & TokenFlag.USER_PIN_COUNT_LOW) === 0
    ? []
    : [`token ${token.label}: a wrong PIN was given to it since the last good login`];
}

/** The PIN becomes a JavaScript string for the length of this call, because pkcs11js takes nothing else. */
export function sendPin(session: Session, label: string, pin: Buffer, user: UserType): void {
  if (!isUtf8(pin)) {
    // It would reach the token with replacement characters, as a different and wrong PIN.
    throw new TokenError('pin_invalid', `token ${label}: the PIN is not UTF-8, as PKCS#11 wants it`, { token: label });
  }
  try {
    session.login(pin.toString('utf8'), user);
  } catch (error) {
    if (ckrName(error) === 'CKR_USER_ALREADY_LOGGED_IN') return;
    const hint = loginHints[ckrName(error) ?? ''];
    throw tokenFailure(error, label, 'C_Login', {
      code: ckrName(error) === 'CKR_PIN_LOCKED' ? 'token_pin_locked' : 'token_login',
      ...(hint === undefined ? {} : { hint }),
    });
  }
}

/** @returns whether it was not initialised before. Not graphene's initialize, which keeps that to itself. */
function initialise(module: Module): boolean {
  try {
    module.lib.C_Initialize({ flags: osLockingOk });
    return true;
  } catch (error) {
    if (ckrName(error) === 'CKR_CRYPTOKI_ALREADY_INITIALIZED') return false;
    throw error;
  }
}

function finalise(module: Module): void {
  try {
    module.lib.C_Finalize();
  } catch {
    // A module that does not let go is in no state to be used; what it was used for is done.
  }
}

/** CKF_OS_LOCKING_OK: without it SoftHSM takes no locks at all and crashes when the engine's lanes sign. */
const osLockingOk = 0x2;

const loginHints: Record<string, string> = {
  CKR_PIN_INCORRECT:
    'the PIN was tried once and will not be tried again; correct it where it is kept, then start again',
  CKR_PIN_LOCKED: 'the security officer must set a new user PIN',
  CKR_PIN_EXPIRED: 'set a new user PIN',
  CKR_USER_PIN_NOT_INITIALIZED: 'the security officer must set a user PIN',
};

/** Held for the life of the process: pkcs11js unloads a module when its object is collected. */
const loadedModules = new Map<string, Module>();

/** What each slot's token said last, by slot handle. */
const rememberedTokens = new WeakMap<Module, Map<string, TokenInSlot>>();

function describeToken(module: Module, slot: Slot): TokenInSlot | undefined {
  const remembered = rememberedTokens.get(module) ?? new Map<string, TokenInSlot>();
  rememberedTokens.set(module, remembered);
  const key = slot.handle.toString('hex');
  const earlier = remembered.get(key);
  try {
    const token = tokenInSlot(slot, slot.getToken());
    // SoftHSM that cannot write answers once without a label and a serial number, when another process has written.
    const isBlank = (token.flags & TokenFlag.TOKEN_INITIALIZED) !== 0 && token.label === '' && token.serial === '';
    if (isBlank && earlier !== undefined) return { ...earlier, slot, remembered: true };
    remembered.set(key, token);
    return token;
  } catch (error) {
    // SoftHSM answers CKR_GENERAL_ERROR for ever once another process logged in at the wrong moment or the token
    // directory is read-only, while sessions and keys are fine. login() sends no PIN on the strength of a memory.
    if (earlier !== undefined && ckrName(error) === 'CKR_GENERAL_ERROR') return { ...earlier, slot, remembered: true };
    // The token was taken out, or is unreadable: to whoever looks for it by label it is not there.
    return undefined;
  }
}

function tokenInSlot(slot: Slot, token: Token): TokenInSlot {
  return {
    slot,
    label: token.label.trimEnd(),
    serial: token.serialNumber.trimEnd(),
    manufacturer: token.manufacturerID.trimEnd(),
    model: token.model.trimEnd(),
    flags: token.flags,
    sessions: {
      open: isUnavailable(token.sessionCount) ? undefined : token.sessionCount,
      max: isUnavailable(token.maxSessionCount) ? undefined : token.maxSessionCount || Number.POSITIVE_INFINITY,
    },
    pinBytes: { min: token.minPinLen, max: token.maxPinLen },
    remembered: false,
  };
}

/** CK_UNAVAILABLE_INFORMATION is ~0, of which pkcs11js keeps 32 or 64 bits. */
function isUnavailable(count: number): boolean {
  return count >= 0xffff_ffff || count < 0;
}

function isLoggedIn(session: Session): boolean {
  return session.state === roUserFunctions || session.state === rwUserFunctions;
}

/** CKS_RO_USER_FUNCTIONS and CKS_RW_USER_FUNCTIONS. */
const roUserFunctions = 1;
const rwUserFunctions = 3;

function refuseDangerousLogin(token: TokenInSlot): void {
  const { label, flags } = token;
  const refuse = (code: 'token_pin_locked' | 'token_login', reason: string, hint: string) => {
    throw new TokenError(code, `token ${label}: ${reason}`, { token: label, hint });
  };
  if (token.remembered) {
    refuse(
      'token_login',
      'C_GetTokenInfo fails, so that nothing says how many PIN tries are left',
      'start keygate again',
    );
  }
  if ((flags & TokenFlag.USER_PIN_LOCKED) !== 0) {
    refuse('token_pin_locked', 'the user PIN is locked', 'the security officer must set a new user PIN');
  }
  if ((flags & TokenFlag.USER_PIN_FINAL_TRY) !== 0) {
    refuse(
      'token_pin_locked',
      'one more wrong PIN would lock the token, so none was sent',
      'log in once by hand with the right PIN, such as with pkcs11-tool --login --list-objects',
    );
  }
  if ((flags & TokenFlag.USER_PIN_INITIALIZED) === 0) {
    refuse('token_login', 'it has no user PIN', 'the security officer must set a user PIN');
  }
}

function refusePin(label: string, { refused }: PinObstacle): TokenError {
  if (refused === undefined) {
    return new TokenError(
      'token_operation',
      `token ${label}: it has not answered a login with this PIN yet, and the PIN is not sent again before it has`,
      { token: label },
    );
  }
  return new TokenError(
    'token_login',
    `token ${label}: it has refused this PIN before (CKR 0x${refused.toString(16)}), which is not sent again`,
    { token: label, hint: 'correct it where it is kept, then reload' },
  );
}

function moduleFailure(error: unknown, path: string): KeygateError {
  if (error instanceof KeygateError) return error;
  const ckr = ckrName(error);
  return new TokenError('token_module', `module ${path}: ${withoutPath(failureReason(error), path)}`, {
    ...(ckr === undefined ? {} : { ckr }),
    hint: 'check the path, and what the module itself needs (SOFTHSM2_CONF, a client configuration, a daemon)',
    cause: error,
  });
}

/** Everyone who hands a loading error on puts the path before it: the dynamic linker, the engine, and we. */
function withoutPath(reason: string, path: string): string {
  const prefix = `${path}: `;
  const at = reason.lastIndexOf(prefix);
  return at < 0 ? reason : reason.slice(at + prefix.length);
}
