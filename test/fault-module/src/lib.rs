//! Owns the function list that a PKCS#11 user gets: the real module's, with the entries replaced that can be made to
//! fail. Must not know keygate: it is any PKCS#11 user's test module. Runs on whichever thread calls it.

mod contract;
mod control;
mod damage;
mod disguise;
mod faults;
mod misbehaviour;
mod sessions;

use std::collections::HashMap;
use std::env;
use std::ffi::{CString, c_void};
use std::path::Path;
use std::ptr;
use std::slice;
use std::sync::OnceLock;
use std::sync::atomic::Ordering::SeqCst;
use std::thread;
use std::time::Duration;

use cryptoki_sys as sys;
use cryptoki_sys::{
    CK_ATTRIBUTE, CK_BBOOL, CK_BYTE, CK_FLAGS, CK_FUNCTION_LIST, CK_MECHANISM, CK_MECHANISM_INFO,
    CK_MECHANISM_TYPE, CK_NOTIFY, CK_OBJECT_HANDLE, CK_RV, CK_SESSION_HANDLE, CK_SESSION_INFO, CK_SLOT_ID,
    CK_SLOT_INFO, CK_TOKEN_INFO, CK_ULONG, CK_USER_TYPE,
};

use contract::Running;
use control::{Control, Function, FunctionControl, Word};
use damage::Signature;
use sessions::Signing;

/// PKCS#11 v3.0 5.4. CKR_GENERAL_ERROR, with a line on standard error, when the environment is not as README.md says.
///
/// # Safety
/// `list` must be null or point to a writable pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn C_GetFunctionList(list: *mut *mut CK_FUNCTION_LIST) -> CK_RV {
    if list.is_null() {
        return sys::CKR_ARGUMENTS_BAD;
    }
    match module() {
        Ok(module) => {
            // SAFETY: not null, and writable by the caller's promise. Callers only read the list they get.
            unsafe { *list = ptr::from_ref(&module.table).cast_mut() };
            sys::CKR_OK
        }
        Err(reason) => {
            eprintln!("fault-module: {reason}");
            sys::CKR_GENERAL_ERROR
        }
    }
}

struct FaultModule {
    real: &'static CK_FUNCTION_LIST,
    table: CK_FUNCTION_LIST,
    control: Control,
}

static MODULE: OnceLock<Result<FaultModule, String>> = OnceLock::new();

fn module() -> Result<&'static FaultModule, &'static str> {
    MODULE.get_or_init(load).as_ref().map_err(String::as_str)
}

fn load() -> Result<FaultModule, String> {
    let variable = |name: &str| env::var(name).map_err(|reason| format!("{name}: {reason}"));
    let control_path = variable("KEYGATE_FAULT_CONTROL")?;
    let control = Control::open(Path::new(&control_path))
        .map_err(|reason| format!("KEYGATE_FAULT_CONTROL {control_path}: {reason}"))?;
    // Before the real module registers its own: exit handlers run in reverse order.
    // SAFETY: a plain function, and this library is never unloaded while the process lives (see `load_real`'s caller).
    if unsafe { libc::atexit(linger_at_exit) } != 0 {
        return Err("atexit failed".into());
    }
    let real = load_real(&variable("KEYGATE_FAULT_MODULE")?)?;
    let mut table = *real;
    table.C_GetFunctionList = Some(C_GetFunctionList);
    table.C_Initialize = Some(initialize);
    table.C_Finalize = Some(finalize);
    table.C_GetSlotList = Some(get_slot_list);
    table.C_GetSlotInfo = Some(get_slot_info);
    table.C_GetMechanismList = Some(get_mechanism_list);
    table.C_GetTokenInfo = Some(get_token_info);
    table.C_GetMechanismInfo = Some(get_mechanism_info);
    table.C_OpenSession = Some(open_session);
    table.C_CloseSession = Some(close_session);
    table.C_CloseAllSessions = Some(close_all_sessions);
    table.C_GetSessionInfo = Some(get_session_info);
    table.C_Login = Some(login);
    table.C_Logout = Some(logout);
    table.C_FindObjectsInit = Some(find_objects_init);
    table.C_FindObjects = Some(find_objects);
    table.C_FindObjectsFinal = Some(find_objects_final);
    table.C_GetAttributeValue = Some(get_attribute_value);
    table.C_SignInit = Some(sign_init);
    table.C_Sign = Some(sign);
    Ok(FaultModule { real, table, control })
}

fn load_real(path: &str) -> Result<&'static CK_FUNCTION_LIST, String> {
    let failed = |what: &str| format!("KEYGATE_FAULT_MODULE {path}: {what}");
    let name = CString::new(path).map_err(|_| failed("contains a zero byte"))?;
    // As keygate loads modules: in Node, SoftHSM would otherwise run on Node's OpenSSL. A sanitizer refuses it.
    let is_isolated = env::var_os("KEYGATE_SANITIZER").is_none();
    let deepbind = if is_isolated { libc::RTLD_DEEPBIND } else { 0 };
    let flags = libc::RTLD_NOW | libc::RTLD_LOCAL | libc::RTLD_NODELETE | deepbind;
    // SAFETY: `name` is a C string; running the constructors of the module the test names is what loading it means.
    let handle = unsafe { libc::dlopen(name.as_ptr(), flags) };
    if handle.is_null() {
        return Err(failed("cannot be loaded"));
    }
    // SAFETY: a live handle and a C string.
    let symbol = unsafe { libc::dlsym(handle, c"C_GetFunctionList".as_ptr()) };
    if symbol.is_null() {
        return Err(failed("exports no C_GetFunctionList"));
    }
    // SAFETY: PKCS#11 gives this exported symbol exactly this type.
    let get: unsafe extern "C" fn(*mut *mut CK_FUNCTION_LIST) -> CK_RV =
        unsafe { std::mem::transmute(symbol) };
    let mut list = ptr::null_mut();
    // SAFETY: `list` lives through the call.
    let status = unsafe { get(&mut list) };
    if status != sys::CKR_OK {
        return Err(failed(&format!("C_GetFunctionList returned 0x{status:X}")));
    }
    // SAFETY: the module's static table, kept by RTLD_NODELETE; null becomes `None`.
    unsafe { list.as_ref() }.ok_or_else(|| failed("returned no list"))
}

/// Keeps the process alive once the real module's exit handlers have run: a thread that is still inside has time to meet
/// what they tore down.
extern "C" fn linger_at_exit() {
    if let Ok(module) = module() {
        thread::sleep(Duration::from_micros(module.control.read(Word::ExitDelayUs)));
    }
}

/// One call: check the contract, wait as the test says, fail as the test says, or do it.
fn call(
    function: Function,
    session: Option<CK_SESSION_HANDLE>,
    real: impl FnOnce(&'static CK_FUNCTION_LIST, Control) -> Option<CK_RV>,
) -> CK_RV {
    // Only reachable through the table, so the module is loaded.
    let Ok(module) = module() else { return sys::CKR_GENERAL_ERROR };
    let running = Running::start(module.control, function, session);
    let control = module.control.of(function);
    let is_concerned = faults::concern(&control, session);
    if is_concerned {
        faults::wait(&control, running.number);
    }
    if function == Function::Finalize && !running.is_alone() {
        // Doing it would crash the process, and the test could not say why.
        module.control.count(Word::FinalizeInFlight);
        return sys::CKR_FUNCTION_FAILED;
    }
    let failure = if is_concerned { faults::failure(&control, session, running.number) } else { None };
    match failure {
        None => real(module.real, module.control).unwrap_or(sys::CKR_FUNCTION_NOT_SUPPORTED),
        Some(rv) => {
            if function == Function::Sign {
                // A failed C_Sign ends the operation.
                real(module.real, module.control);
            }
            control.injected.fetch_add(1, SeqCst);
            rv
        }
    }
}

extern "C" fn initialize(arguments: *mut c_void) -> CK_RV {
    call(Function::Initialize, None, |real, control| {
        // SAFETY: the caller's arguments, passed on as they came; so in every function below.
        let result = unsafe { real.C_Initialize?(arguments) };
        if matches!(result, sys::CKR_OK | sys::CKR_CRYPTOKI_ALREADY_INITIALIZED) {
            contract::initialized(true);
        }
        if result == sys::CKR_OK {
            sessions::initialized(tokens(real).unwrap_or_default());
            control.count(Word::Initializations);
        }
        Some(result)
    })
}

/// The first bytes of the label of the token in each slot. None of the entries above is used: nobody counts these calls.
fn tokens(real: &CK_FUNCTION_LIST) -> Option<HashMap<CK_SLOT_ID, u64>> {
    let (mut slots, mut count) = ([0; 64], 64);
    // SAFETY: room for as many slots as `count` says.
    let listed = unsafe { real.C_GetSlotList?(sys::CK_TRUE, slots.as_mut_ptr(), &mut count) };
    if listed != sys::CKR_OK {
        return None;
    }
    let label = |slot: &CK_SLOT_ID| {
        let mut info = CK_TOKEN_INFO::default();
        // SAFETY: `info` lives through the call.
        let told = unsafe { real.C_GetTokenInfo?(*slot, &mut info) };
        let mut first = [0; 8];
        first.copy_from_slice(&info.label[..8]);
        (told == sys::CKR_OK).then(|| (*slot, u64::from_le_bytes(first)))
    };
    Some(slots[..count as usize].iter().filter_map(label).collect())
}

extern "C" fn finalize(reserved: *mut c_void) -> CK_RV {
    call(Function::Finalize, None, |real, control| {
        // Before the call: what comes in meanwhile comes too late.
        contract::initialized(false);
        // SAFETY: see `initialize`.
        let result = unsafe { real.C_Finalize?(reserved) };
        forget(control, sessions::all_closed(None));
        Some(result)
    })
}

extern "C" fn open_session(
    slot: CK_SLOT_ID,
    flags: CK_FLAGS,
    context: *mut c_void,
    notify: CK_NOTIFY,
    session: *mut CK_SESSION_HANDLE,
) -> CK_RV {
    call(Function::OpenSession, None, |real, control| {
        let limit = control.read(Word::SessionLimit);
        let open = control.word(Word::SessionsOpen).fetch_add(1, SeqCst) + 1;
        let slot = disguise::real_slot(control, slot);
        let result = match open > limit && limit > 0 {
            true => sys::CKR_SESSION_COUNT,
            // SAFETY: see `initialize`.
            false => unsafe { real.C_OpenSession?(slot, flags, context, notify, session) },
        };
        if result == sys::CKR_OK {
            control.word(Word::SessionsOpenMax).fetch_max(open, SeqCst);
            // SAFETY: after CKR_OK the real module has written it.
            sessions::opened(unsafe { *session }, slot);
        } else {
            forget(control, 1);
        }
        Some(result)
    })
}

extern "C" fn close_session(session: CK_SESSION_HANDLE) -> CK_RV {
    call(Function::CloseSession, Some(session), |real, control| {
        forget(control, u64::from(sessions::closed(session)));
        // SAFETY: see `initialize`.
        Some(unsafe { real.C_CloseSession?(session) })
    })
}

extern "C" fn close_all_sessions(slot: CK_SLOT_ID) -> CK_RV {
    call(Function::CloseAllSessions, None, |real, control| {
        let slot = disguise::real_slot(control, slot);
        forget(control, sessions::all_closed(Some(slot)));
        // SAFETY: see `initialize`.
        Some(unsafe { real.C_CloseAllSessions?(slot) })
    })
}

fn forget(control: Control, sessions: u64) {
    control.word(Word::SessionsOpen).fetch_sub(sessions, SeqCst);
}

extern "C" fn login(
    session: CK_SESSION_HANDLE,
    user: CK_USER_TYPE,
    pin: *mut CK_BYTE,
    pin_bytes: CK_ULONG,
) -> CK_RV {
    call(Function::Login, Some(session), |real, control| {
        let tries = control.read(Word::PinTries);
        if tries > 0 && control.read(Word::PinsRefused) >= tries {
            return Some(sys::CKR_PIN_LOCKED);
        }
        // SAFETY: see `initialize`.
        let result = unsafe { real.C_Login?(session, user, pin, pin_bytes) };
        match result {
            sys::CKR_OK => {
                control.word(Word::PinsRefused).store(0, SeqCst);
                sessions::logged_in();
            }
            sys::CKR_PIN_INCORRECT => control.count(Word::PinsRefused),
            _ => {}
        }
        Some(result)
    })
}

extern "C" fn sign_init(
    session: CK_SESSION_HANDLE,
    mechanism: *mut CK_MECHANISM,
    key: CK_OBJECT_HANDLE,
) -> CK_RV {
    call(Function::SignInit, Some(session), |real, control| {
        // The real module answers as it does when somebody else has done it.
        if control.takes(Word::LogoutLeft) {
            // SAFETY: takes no pointer.
            unsafe { real.C_Logout?(session) };
        }
        let key = disguise::handle(control, key);
        // SAFETY: see `initialize`.
        let result = unsafe { real.C_SignInit?(session, mechanism, key) };
        if result == sys::CKR_OK {
            // SAFETY: a mechanism that the real module has just read.
            sessions::signing(session, unsafe { Signing::copy(mechanism, key) });
        } else if result == sys::CKR_OPERATION_ACTIVE {
            control.count(Word::OperationOrder);
        }
        Some(result)
    })
}

extern "C" fn sign(
    session: CK_SESSION_HANDLE,
    data: *mut CK_BYTE,
    data_bytes: CK_ULONG,
    signature: *mut CK_BYTE,
    signature_bytes: *mut CK_ULONG,
) -> CK_RV {
    call(Function::Sign, Some(session), |real, control| {
        if control.takes(Word::MisbehaveLeft) {
            misbehaviour::misbehave(control);
        }
        if control.takes(Word::CrashLeft) {
            crash(control.read(Word::CrashSignal));
        }
        Box::leak(vec![1_u8; control.read(Word::LeakBytes) as usize].into_boxed_slice());
        // The real module answers as it does when somebody else has done it.
        if control.takes(Word::CloseLeft) {
            forget(control, u64::from(sessions::closed(session)));
            // SAFETY: takes no pointer.
            unsafe { real.C_CloseSession?(session) };
        }
        // SAFETY: `signature_bytes` is the caller's, readable; see `initialize`.
        let room = unsafe { signature_bytes.as_ref() }.copied().unwrap_or(0);
        // SAFETY: see `initialize`.
        let result = unsafe { real.C_Sign?(session, data, data_bytes, signature, signature_bytes) };
        if result == sys::CKR_OPERATION_NOT_INITIALIZED {
            control.count(Word::OperationOrder);
        }
        // Who asks for the length alone, or has too little room, may go on (v3.0 5.2).
        if result == sys::CKR_BUFFER_TOO_SMALL || signature.is_null() {
            return Some(result);
        }
        let function = control.of(Function::Sign);
        if result == sys::CKR_OK
            && FunctionControl::selects(function.calls.load(SeqCst), function.flip_every, function.flip_left)
        {
            let mut made = Signature {
                real,
                session,
                // SAFETY: the caller's data, and its room for a signature, as it came.
                data: unsafe { slice::from_raw_parts(data, data_bytes as usize) },
                // SAFETY: as above.
                bytes: unsafe { slice::from_raw_parts_mut(signature, room as usize) },
                // SAFETY: as above.
                length: unsafe { &mut *signature_bytes },
            };
            function.flipped.fetch_add(u64::from(made.damage(control.read(Word::Damage))), SeqCst);
        }
        sessions::signing(session, None);
        Some(result)
    })
}

/// As a module that reads where nothing is; without a core, and not through the handler of a host that has one.
fn crash(signal: u64) {
    let signal = if signal == 0 { libc::SIGSEGV } else { signal as i32 };
    // SAFETY: the default action ends the process.
    unsafe {
        libc::signal(signal, libc::SIG_DFL);
        libc::raise(signal);
    }
}

/// The functions that have little of their own: name, entry, place, session, arguments; with which of these the real one is
/// called, and what becomes of its answer if that is CKR_OK.
macro_rules! passed_on {
    ($($name:ident = $entry:ident, $function:ident, $session:expr, ($($argument:ident: $kind:ty),*),
        |$control:ident| ($($real:expr),*) $then:block)*) => {$(
        extern "C" fn $name($($argument: $kind),*) -> CK_RV {
            call(Function::$function, $session, |real, $control| {
                let _ = $control;
                // SAFETY: see `initialize`.
                let result = unsafe { real.$entry?($($real),*) };
                if result == sys::CKR_OK {
                    $then
                }
                Some(result)
            })
        }
    )*};
}

passed_on! {
    get_slot_list = C_GetSlotList, GetSlotList, None,
        (present: CK_BBOOL, list: *mut CK_SLOT_ID, count: *mut CK_ULONG),
        |control| (present, list, count) {
            // SAFETY: after CKR_OK the list, unless it is null, has as many ids as `count` says.
            unsafe { disguise::slots(control, list, &mut *count) };
        }
    get_slot_info = C_GetSlotInfo, GetSlotInfo, None, (slot: CK_SLOT_ID, info: *mut CK_SLOT_INFO),
        |control| (disguise::real_slot(control, slot), info) {}
    get_token_info = C_GetTokenInfo, GetTokenInfo, None, (slot: CK_SLOT_ID, info: *mut CK_TOKEN_INFO),
        |control| (disguise::real_slot(control, slot), info) {
            // SAFETY: after CKR_OK the real module has written it.
            disguise::token_info(control, unsafe { &mut *info });
        }
    get_mechanism_list = C_GetMechanismList, GetMechanismList, None,
        (slot: CK_SLOT_ID, list: *mut CK_MECHANISM_TYPE, count: *mut CK_ULONG),
        |control| (disguise::real_slot(control, slot), list, count) {}
    get_mechanism_info = C_GetMechanismInfo, GetMechanismInfo, None,
        (slot: CK_SLOT_ID, kind: CK_MECHANISM_TYPE, info: *mut CK_MECHANISM_INFO),
        |control| (disguise::real_slot(control, slot), kind, info) {}
    get_session_info = C_GetSessionInfo, GetSessionInfo, Some(session),
        (session: CK_SESSION_HANDLE, info: *mut CK_SESSION_INFO),
        |control| (session, info) {
            // SAFETY: after CKR_OK the real module has written it.
            let info = unsafe { &mut *info };
            info.slotID = info.slotID.wrapping_sub(disguise::real_slot(control, 0));
            disguise::session_info(control, info);
        }
    logout = C_Logout, Logout, Some(session), (session: CK_SESSION_HANDLE), |control| (session) {}
    find_objects_init = C_FindObjectsInit, FindObjectsInit, Some(session),
        (session: CK_SESSION_HANDLE, template: *mut CK_ATTRIBUTE, count: CK_ULONG),
        |control| (session, template, count) {}
    find_objects = C_FindObjects, FindObjects, Some(session),
        (session: CK_SESSION_HANDLE, found: *mut CK_OBJECT_HANDLE, count_max: CK_ULONG, count: *mut CK_ULONG),
        |control| (session, found, count_max, count) {
            // SAFETY: the caller's room for as many handles as it says, and their number.
            unsafe { disguise::found(control, slice::from_raw_parts_mut(found, count_max as usize), &mut *count) };
        }
    find_objects_final = C_FindObjectsFinal, FindObjectsFinal, Some(session), (session: CK_SESSION_HANDLE),
        |control| (session) {}
    get_attribute_value = C_GetAttributeValue, GetAttributeValue, Some(session),
        (session: CK_SESSION_HANDLE, object: CK_OBJECT_HANDLE, template: *mut CK_ATTRIBUTE, count: CK_ULONG),
        |control| (session, disguise::handle(control, object), template, count) {
            // SAFETY: the caller's template, which the real module has just filled in.
            disguise::attributes(control, unsafe { slice::from_raw_parts_mut(template, count as usize) });
        }
}
