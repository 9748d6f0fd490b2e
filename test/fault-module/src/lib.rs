//! Owns the function list that a PKCS#11 user gets: the real module's, with the entries replaced that can be made to
//! fail. Must not know keygate: it is any PKCS#11 user's test module. Runs on whichever thread calls it.

mod contract;
mod control;
mod misbehaviour;

use std::env;
use std::ffi::{CString, c_void};
use std::path::Path;
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::thread;
use std::time::Duration;

use cryptoki_sys as sys;
use cryptoki_sys::{
    CK_ATTRIBUTE, CK_BBOOL, CK_BYTE, CK_FLAGS, CK_FUNCTION_LIST, CK_MECHANISM, CK_MECHANISM_INFO,
    CK_MECHANISM_TYPE, CK_NOTIFY, CK_OBJECT_HANDLE, CK_RV, CK_SESSION_HANDLE, CK_SESSION_INFO, CK_SLOT_ID,
    CK_TOKEN_INFO, CK_ULONG, CK_USER_TYPE,
};

use contract::Running;
use control::{Control, Function, FunctionControl};

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
    // DEEPBIND, as keygate loads modules: in Node, SoftHSM would otherwise run on Node's OpenSSL.
    let flags = libc::RTLD_NOW | libc::RTLD_LOCAL | libc::RTLD_NODELETE | libc::RTLD_DEEPBIND;
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
        thread::sleep(Duration::from_micros(module.control.exit_delay_us().load(SeqCst)));
    }
}

/// One call: check the contract, wait as the test says, fail as the test says, or do it.
fn call(
    function: Function,
    session: Option<CK_SESSION_HANDLE>,
    real: impl FnOnce(&'static CK_FUNCTION_LIST) -> Option<CK_RV>,
) -> CK_RV {
    // Only reachable through the table, so the module is loaded.
    let Ok(module) = module() else { return sys::CKR_GENERAL_ERROR };
    let running = Running::start(module.control, function, session);
    let control = module.control.of(function);
    wait(&control);
    if function == Function::Finalize && !running.is_alone() {
        // Doing it would crash the process, and the test could not say why.
        module.control.finalize_in_flight().fetch_add(1, SeqCst);
        return sys::CKR_FUNCTION_FAILED;
    }
    let rv = control.rv.load(SeqCst);
    let fails = rv != 0 && FunctionControl::selects(running.number, control.rv_every, control.rv_left);
    if !fails || function == Function::Sign {
        let result = real(module.real).unwrap_or(sys::CKR_FUNCTION_NOT_SUPPORTED);
        if !fails {
            return result;
        }
    }
    control.injected.fetch_add(1, SeqCst);
    rv as CK_RV
}

fn wait(control: &FunctionControl<'_>) {
    let delay_us = control.delay_us.load(SeqCst);
    if delay_us > 0 {
        thread::sleep(Duration::from_micros(delay_us));
    }
    // The test that releases it may be a Node process, which can write a word and wake nobody.
    while control.hang.load(SeqCst) != 0 {
        thread::sleep(HANG_POLL);
    }
}

const HANG_POLL: Duration = Duration::from_micros(500);

extern "C" fn initialize(arguments: *mut c_void) -> CK_RV {
    call(Function::Initialize, None, |real| {
        // SAFETY: the caller's arguments, passed on as they came; so in every function below.
        let result = unsafe { real.C_Initialize?(arguments) };
        if matches!(result, sys::CKR_OK | sys::CKR_CRYPTOKI_ALREADY_INITIALIZED) {
            contract::initialized(true);
        }
        Some(result)
    })
}

extern "C" fn finalize(reserved: *mut c_void) -> CK_RV {
    call(Function::Finalize, None, |real| {
        // Before the call: what comes in meanwhile comes too late.
        contract::initialized(false);
        // SAFETY: see `initialize`.
        Some(unsafe { real.C_Finalize?(reserved) })
    })
}

extern "C" fn sign(
    session: CK_SESSION_HANDLE,
    data: *mut CK_BYTE,
    data_bytes: CK_ULONG,
    signature: *mut CK_BYTE,
    signature_bytes: *mut CK_ULONG,
) -> CK_RV {
    call(Function::Sign, Some(session), |real| {
        if let Ok(module) = module()
            && FunctionControl::selects(1, &AtomicU64::new(1), module.control.misbehave_left())
        {
            misbehaviour::misbehave(module.control);
        }
        // SAFETY: see `initialize`.
        let result = unsafe { real.C_Sign?(session, data, data_bytes, signature, signature_bytes) };
        if result == sys::CKR_OK && !signature.is_null() {
            // SAFETY: after CKR_OK the real module has written this length.
            let written = unsafe { *signature_bytes };
            // SAFETY: and as many bytes of signature.
            damage(unsafe { std::slice::from_raw_parts_mut(signature, written as usize) });
        }
        Some(result)
    })
}

fn damage(signature: &mut [u8]) {
    let Ok(module) = module() else { return };
    let control = module.control.of(Function::Sign);
    let call = control.calls.load(SeqCst);
    if FunctionControl::selects(call, control.flip_every, control.flip_left)
        && let Some(byte) = signature.last_mut()
    {
        *byte ^= 1;
        control.flipped.fetch_add(1, SeqCst);
    }
}

/// The functions that have nothing of their own: name, entry, place, session, arguments.
macro_rules! passed_on {
    ($($name:ident = $entry:ident, $function:ident, $session:expr, ($($argument:ident: $kind:ty),*);)*) => {$(
        extern "C" fn $name($($argument: $kind),*) -> CK_RV {
            // SAFETY: see `initialize`.
            call(Function::$function, $session, |real| Some(unsafe { real.$entry?($($argument),*) }))
        }
    )*};
}

passed_on! {
    get_slot_list = C_GetSlotList, GetSlotList, None,
        (present: CK_BBOOL, list: *mut CK_SLOT_ID, count: *mut CK_ULONG);
    get_token_info = C_GetTokenInfo, GetTokenInfo, None, (slot: CK_SLOT_ID, info: *mut CK_TOKEN_INFO);
    get_mechanism_info = C_GetMechanismInfo, GetMechanismInfo, None,
        (slot: CK_SLOT_ID, kind: CK_MECHANISM_TYPE, info: *mut CK_MECHANISM_INFO);
    open_session = C_OpenSession, OpenSession, None,
        (slot: CK_SLOT_ID, flags: CK_FLAGS, context: *mut c_void, notify: CK_NOTIFY, session: *mut CK_SESSION_HANDLE);
    close_session = C_CloseSession, CloseSession, Some(session), (session: CK_SESSION_HANDLE);
    close_all_sessions = C_CloseAllSessions, CloseAllSessions, None, (slot: CK_SLOT_ID);
    get_session_info = C_GetSessionInfo, GetSessionInfo, Some(session),
        (session: CK_SESSION_HANDLE, info: *mut CK_SESSION_INFO);
    login = C_Login, Login, Some(session),
        (session: CK_SESSION_HANDLE, user: CK_USER_TYPE, pin: *mut CK_BYTE, pin_bytes: CK_ULONG);
    logout = C_Logout, Logout, Some(session), (session: CK_SESSION_HANDLE);
    find_objects_init = C_FindObjectsInit, FindObjectsInit, Some(session),
        (session: CK_SESSION_HANDLE, template: *mut CK_ATTRIBUTE, count: CK_ULONG);
    find_objects = C_FindObjects, FindObjects, Some(session),
        (session: CK_SESSION_HANDLE, found: *mut CK_OBJECT_HANDLE, count_max: CK_ULONG, count: *mut CK_ULONG);
    find_objects_final = C_FindObjectsFinal, FindObjectsFinal, Some(session), (session: CK_SESSION_HANDLE);
    get_attribute_value = C_GetAttributeValue, GetAttributeValue, Some(session),
        (session: CK_SESSION_HANDLE, object: CK_OBJECT_HANDLE, template: *mut CK_ATTRIBUTE, count: CK_ULONG);
    sign_init = C_SignInit, SignInit, Some(session),
        (session: CK_SESSION_HANDLE, mechanism: *mut CK_MECHANISM, key: CK_OBJECT_HANDLE);
}
