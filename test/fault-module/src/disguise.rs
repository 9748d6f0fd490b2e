//! Owns what the token pretends to be: other slot ids, other object handles, objects that are twice there or not at all, a
//! key that could be taken out. Must not know when calls fail. Runs on whichever thread calls the module.

use std::slice;

use cryptoki_sys as sys;
use cryptoki_sys::{CK_ATTRIBUTE, CK_OBJECT_HANDLE, CK_SESSION_INFO, CK_SLOT_ID, CK_TOKEN_INFO, CK_ULONG};

use crate::control::{Control, Word};
use crate::sessions;

/// The slot that the real module knows by another id.
pub fn real_slot(control: Control, shown: CK_SLOT_ID) -> CK_SLOT_ID {
    shown.wrapping_sub(slot_shift(control))
}

/// Both ways are the same.
pub fn handle(control: Control, handle: CK_OBJECT_HANDLE) -> CK_OBJECT_HANDLE {
    let is_exchanged =
        control.read(Word::HandlesExchanged) != 0 && sessions::initializations().is_multiple_of(2);
    handle ^ CK_OBJECT_HANDLE::from(is_exchanged)
}

/// After C_GetSlotList. `list` is null when only their number was asked for.
///
/// # Safety
/// `list` is null or has `count` ids.
pub unsafe fn slots(control: Control, list: *mut CK_SLOT_ID, count: &mut CK_ULONG) {
    if control.read(Word::SlotsHidden) != 0 {
        *count = 0;
    }
    if !list.is_null() {
        // SAFETY: by the caller's promise.
        for slot in unsafe { slice::from_raw_parts_mut(list, *count as usize) } {
            *slot = slot.wrapping_add(slot_shift(control));
        }
    }
}

/// After C_FindObjects with room for `room` handles.
pub fn found(control: Control, handles: &mut [CK_OBJECT_HANDLE], count: &mut CK_ULONG) {
    match control.read(Word::Objects) {
        1 => *count = 0,
        2 => {
            // The second one is no object at all; nobody may use either.
            let room = handles.len() as CK_ULONG;
            for index in *count..(2 * *count).min(room) {
                handles[index as usize] = CK_OBJECT_HANDLE::MAX - index;
            }
            *count = (2 * *count).min(room);
        }
        _ => {}
    }
    for found in &mut handles[..*count as usize] {
        *found = handle(control, *found);
    }
}

/// After C_GetAttributeValue.
pub fn attributes(control: Control, template: &mut [CK_ATTRIBUTE]) {
    for attribute in template {
        let is_extractable = attribute.type_ == sys::CKA_EXTRACTABLE && attribute.ulValueLen == 1;
        if is_extractable && control.read(Word::Extractable) != 0 && !attribute.pValue.is_null() {
            // SAFETY: the module has just written this one byte there.
            unsafe { *attribute.pValue.cast::<u8>() = sys::CK_TRUE };
        }
    }
}

/// After C_GetTokenInfo.
pub fn token_info(control: Control, info: &mut CK_TOKEN_INFO) {
    let tries = control.read(Word::PinTries);
    let refused = control.read(Word::PinsRefused);
    if tries == 0 {
        return;
    }
    info.flags |= match refused {
        0 => 0,
        refused if refused >= tries => sys::CKF_USER_PIN_LOCKED,
        refused if refused + 1 == tries => sys::CKF_USER_PIN_FINAL_TRY | sys::CKF_USER_PIN_COUNT_LOW,
        _ => sys::CKF_USER_PIN_COUNT_LOW,
    };
}

/// After C_GetSessionInfo.
pub fn session_info(control: Control, info: &mut CK_SESSION_INFO) {
    if control.read(Word::SessionInfoLies) != 0 {
        info.state = match info.state {
            sys::CKS_RO_USER_FUNCTIONS | sys::CKS_RW_USER_FUNCTIONS => sys::CKS_RO_PUBLIC_SESSION,
            _ => sys::CKS_RO_USER_FUNCTIONS,
        };
    }
}

fn slot_shift(control: Control) -> CK_SLOT_ID {
    control.read(Word::SlotShift).wrapping_mul(sessions::initializations())
}
