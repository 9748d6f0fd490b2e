//! Owns what becomes of a signature that is to be wrong, or odd. Must not know when. Runs on the thread that signs, within
//! its PKCS#11 session.

use std::ptr;

use cryptoki_sys as sys;
use cryptoki_sys::{CK_FUNCTION_LIST, CK_OBJECT_HANDLE, CK_RV, CK_SESSION_HANDLE, CK_SLOT_ID, CK_ULONG};

use crate::control::Damage;
use crate::sessions::{self, Signing};

/// One in 128 signatures has a leading zero in r or s.
const TRIES_MAX: usize = 10_000;

/// A signature that the real module has made, and how to make another.
pub struct Signature<'a> {
    pub real: &'static CK_FUNCTION_LIST,
    pub session: CK_SESSION_HANDLE,
    pub data: &'a [u8],
    pub bytes: &'a mut [u8],
    pub length: &'a mut CK_ULONG,
}

impl Signature<'_> {
    /// Whether it could be done.
    pub fn damage(&mut self, kind: u64) -> bool {
        let known = sessions::of(self.session).and_then(|session| Some((session.slot, session.signing?)));
        match kind {
            kind if kind == Damage::Truncate as u64 => *self.length = self.length.saturating_sub(1),
            kind if kind == Damage::Empty as u64 => *self.length = 0,
            kind if kind == Damage::LeadingZero as u64 => {
                return known.is_some_and(|(_, signing)| self.until_leading_zero(signing));
            }
            kind if kind == Damage::OtherKey as u64 => {
                return known.is_some_and(|(slot, mut signing)| {
                    let other = self.other_key(slot, signing.key);
                    signing.key = other.unwrap_or(signing.key);
                    other.is_some() && self.again(&mut signing) == Some(sys::CKR_OK)
                });
            }
            _ => match self.bytes.get_mut((*self.length as usize).saturating_sub(1)) {
                Some(last) => *last ^= 1,
                None => return false,
            },
        }
        true
    }

    fn until_leading_zero(&mut self, mut signing: Signing) -> bool {
        (0..TRIES_MAX).any(|_| {
            let half = *self.length as usize / 2;
            if self.bytes.first() == Some(&0) || self.bytes.get(half) == Some(&0) {
                return true;
            }
            *self.length = self.bytes.len() as CK_ULONG;
            self.again(&mut signing) != Some(sys::CKR_OK)
        }) && self.bytes.contains(&0)
    }

    fn again(&mut self, signing: &mut Signing) -> Option<CK_RV> {
        let mut mechanism = signing.mechanism();
        // SAFETY: the mechanism points into `signing`, which lives through the call.
        let began = unsafe { self.real.C_SignInit?(self.session, &mut mechanism, signing.key) };
        if began != sys::CKR_OK {
            return Some(began);
        }
        *self.length = self.bytes.len() as CK_ULONG;
        // SAFETY: `data` is only read; `bytes` has as much room as `length` says.
        Some(unsafe {
            self.real.C_Sign?(
                self.session,
                self.data.as_ptr().cast_mut(),
                self.data.len() as CK_ULONG,
                self.bytes.as_mut_ptr(),
                self.length,
            )
        })
    }

    /// Some private key of the token whose signatures are as long.
    fn other_key(&self, slot: CK_SLOT_ID, key: CK_OBJECT_HANDLE) -> Option<CK_OBJECT_HANDLE> {
        let mut session = 0;
        // SAFETY: no callback; `session` lives through the call.
        let opened = unsafe {
            self.real.C_OpenSession?(slot, sys::CKF_SERIAL_SESSION, ptr::null_mut(), None, &mut session)
        };
        if opened != sys::CKR_OK {
            return None;
        }
        let other = self.first_but(session, key);
        // SAFETY: takes no pointer.
        unsafe { self.real.C_CloseSession?(session) };
        other
    }

    fn first_but(&self, session: CK_SESSION_HANDLE, key: CK_OBJECT_HANDLE) -> Option<CK_OBJECT_HANDLE> {
        let mut class = sys::CKO_PRIVATE_KEY;
        let mut template = [sys::CK_ATTRIBUTE {
            type_: sys::CKA_CLASS,
            pValue: ptr::from_mut(&mut class).cast(),
            ulValueLen: size_of_val(&class) as CK_ULONG,
        }];
        let (mut handles, mut count) = ([0; 16], 0);
        // SAFETY: the template and what it points to live through the call.
        let started = unsafe { self.real.C_FindObjectsInit?(session, template.as_mut_ptr(), 1) };
        if started != sys::CKR_OK {
            return None;
        }
        // SAFETY: room for the 16 handles asked for.
        unsafe { self.real.C_FindObjects?(session, handles.as_mut_ptr(), 16, &mut count) };
        // SAFETY: takes no pointer.
        unsafe { self.real.C_FindObjectsFinal?(session) };
        handles[..count as usize].iter().copied().find(|other| *other != key)
    }
}
