//! Owns what other code in the same process may do to the module behind the engine's back (graphene, a vendor's tool).
//! Talks to SoftHSM directly: the fault module counts the engine's calls only.

use std::ffi::CString;
use std::ptr;

use cryptoki_sys as sys;

use crate::world::SOFTHSM;

/// Logs the process out of the token.
pub fn log_out() {
    let session = open_session();
    // SAFETY: takes no pointer.
    let out = unsafe { functions().C_Logout.expect("SoftHSM has it")(session) };
    assert_eq!(out, sys::CKR_OK);
    close_session(session);
}

/// Changes the user's PIN; the process is logged in.
pub fn change_pin(old: &str, new: &str) {
    let session = open_session();
    let set = functions().C_SetPIN.expect("SoftHSM has it");
    let (old_bytes, new_bytes) = (old.len() as sys::CK_ULONG, new.len() as sys::CK_ULONG);
    // SAFETY: both are readable for their lengths through the call, and only read.
    let changed =
        unsafe { set(session, old.as_ptr().cast_mut(), old_bytes, new.as_ptr().cast_mut(), new_bytes) };
    assert_eq!(changed, sys::CKR_OK);
    close_session(session);
}

/// Deletes the private key with this label; the process is logged in.
pub fn delete_private_key(label: &str) {
    let session = open_session();
    let class = sys::CKO_PRIVATE_KEY;
    let attribute = |kind, value: *const std::ffi::c_void, bytes: usize| sys::CK_ATTRIBUTE {
        type_: kind,
        pValue: value.cast_mut(),
        ulValueLen: bytes as sys::CK_ULONG,
    };
    let mut template = [
        attribute(sys::CKA_CLASS, ptr::from_ref(&class).cast(), size_of_val(&class)),
        attribute(sys::CKA_LABEL, label.as_ptr().cast(), label.len()),
    ];
    let (mut key, mut count) = (0, 0);
    let (start, find) = (functions().C_FindObjectsInit, functions().C_FindObjects);
    let (end, destroy) = (functions().C_FindObjectsFinal, functions().C_DestroyObject);
    // SAFETY: the template and what it points to live through the call.
    let started = unsafe { start.expect("SoftHSM has it")(session, template.as_mut_ptr(), 2) };
    assert_eq!(started, sys::CKR_OK);
    // SAFETY: room for the one handle asked for.
    let found = unsafe { find.expect("SoftHSM has it")(session, &mut key, 1, &mut count) };
    assert_eq!((found, count), (sys::CKR_OK, 1));
    // SAFETY: takes no pointer.
    assert_eq!(unsafe { end.expect("SoftHSM has it")(session) }, sys::CKR_OK);
    // SAFETY: takes no pointer.
    assert_eq!(unsafe { destroy.expect("SoftHSM has it")(session, key) }, sys::CKR_OK);
    close_session(session);
}

/// Closes every PKCS#11 session of the process, and with the last one the login.
pub fn close_all_sessions() {
    for slot in slots() {
        // SAFETY: takes no pointer.
        let closed = unsafe { functions().C_CloseAllSessions.expect("SoftHSM has it")(slot) };
        assert_eq!(closed, sys::CKR_OK);
    }
}

/// On the only token there is; SoftHSM shows one more slot, which is not initialised.
fn open_session() -> sys::CK_SESSION_HANDLE {
    let open = functions().C_OpenSession.expect("SoftHSM has it");
    let flags = sys::CKF_SERIAL_SESSION | sys::CKF_RW_SESSION;
    let mut session = 0;
    // SAFETY: no callback; `session` lives through the call.
    let opens = |slot| unsafe { open(slot, flags, ptr::null_mut(), None, &mut session) } == sys::CKR_OK;
    assert_eq!(slots().into_iter().map(opens).filter(|opened| *opened).count(), 1);
    session
}

fn close_session(session: sys::CK_SESSION_HANDLE) {
    // SAFETY: takes no pointer.
    let closed = unsafe { functions().C_CloseSession.expect("SoftHSM has it")(session) };
    assert_eq!(closed, sys::CKR_OK);
}

fn slots() -> Vec<sys::CK_SLOT_ID> {
    let mut slots = [0; 16];
    let mut count = 16;
    let list = functions().C_GetSlotList.expect("SoftHSM has it");
    // SAFETY: room for as many slots as `count` says.
    let listed = unsafe { list(sys::CK_TRUE, slots.as_mut_ptr(), &mut count) };
    assert_eq!(listed, sys::CKR_OK);
    slots[..count as usize].to_vec()
}

fn functions() -> &'static sys::CK_FUNCTION_LIST {
    let name = CString::new(SOFTHSM).expect("no zero byte");
    // SAFETY: a C string; the library is loaded already, so this gives the same instance.
    let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_NOLOAD) };
    assert!(!handle.is_null(), "SoftHSM is loaded before anybody meddles with it");
    // SAFETY: a live handle and a C string.
    let symbol = unsafe { libc::dlsym(handle, c"C_GetFunctionList".as_ptr()) };
    assert!(!symbol.is_null());
    // SAFETY: PKCS#11 gives this symbol exactly this type.
    let get: unsafe extern "C" fn(*mut *mut sys::CK_FUNCTION_LIST) -> sys::CK_RV =
        unsafe { std::mem::transmute(symbol) };
    let mut list = ptr::null_mut();
    // SAFETY: `list` lives through the call.
    assert_eq!(unsafe { get(&mut list) }, sys::CKR_OK);
    // SAFETY: SoftHSM's static table.
    unsafe { list.as_ref() }.expect("a list")
}
