//! Owns the return codes of PKCS#11: their names and the action each one asks for.
//! Must not know sessions, lanes or TLS. Pure; runs on any thread.

use std::fmt;

use cryptoki_sys::{self as sys, CK_RV};

/// A return value other than CKR_OK (PKCS#11 v3.0 section 5.1). Prints its name, `CKR_DEVICE_ERROR (0x30)`.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Ckr(pub CK_RV);

/// What a lane does about a failed call before it gives up. One rung of the ladder, never several at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Repair {
    /// The same call in the same PKCS#11 session.
    Retry,
    /// A new PKCS#11 session.
    Reopen,
    /// C_Login (one lane for all), then find the keys again.
    Relogin,
    /// Find the private key again.
    Refind,
    /// The device is gone, or the module has forgotten that it was initialised: initialise it again, and find the slot anew.
    Reinitialize,
    /// The PIN does not open the token. Never repeated: each try brings the token closer to being locked.
    PinRefused,
    /// Wrong configuration of this key or a fault of ours: repeating cannot help and other keys are not concerned.
    Hopeless,
}

/// What a lane does about a token before it tries whether it can sign again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rung {
    Login,
    Reset,
}

impl Ckr {
    pub const OK: Ckr = Ckr(sys::CKR_OK);
    pub const DEVICE_ERROR: Ckr = Ckr(sys::CKR_DEVICE_ERROR);
    pub const FUNCTION_FAILED: Ckr = Ckr(sys::CKR_FUNCTION_FAILED);
    pub const FUNCTION_NOT_SUPPORTED: Ckr = Ckr(sys::CKR_FUNCTION_NOT_SUPPORTED);
    pub const NOT_INITIALIZED: Ckr = Ckr(sys::CKR_CRYPTOKI_NOT_INITIALIZED);
    pub const ALREADY_INITIALIZED: Ckr = Ckr(sys::CKR_CRYPTOKI_ALREADY_INITIALIZED);
    pub const USER_NOT_LOGGED_IN: Ckr = Ckr(sys::CKR_USER_NOT_LOGGED_IN);
    pub const USER_ALREADY_LOGGED_IN: Ckr = Ckr(sys::CKR_USER_ALREADY_LOGGED_IN);
    pub const SESSION_HANDLE_INVALID: Ckr = Ckr(sys::CKR_SESSION_HANDLE_INVALID);
    pub const TOKEN_NOT_PRESENT: Ckr = Ckr(sys::CKR_TOKEN_NOT_PRESENT);
    pub const SESSION_COUNT: Ckr = Ckr(sys::CKR_SESSION_COUNT);

    /// CKR_OK is `Ok`, all else is `Err`.
    pub fn check(value: CK_RV) -> Result<(), Ckr> {
        if value == sys::CKR_OK { Ok(()) } else { Err(Ckr(value)) }
    }

    pub fn repair(self) -> Repair {
        match self.0 {
            sys::CKR_DEVICE_ERROR
            | sys::CKR_DEVICE_MEMORY
            | sys::CKR_HOST_MEMORY
            | sys::CKR_FUNCTION_FAILED
            | sys::CKR_FUNCTION_CANCELED
            | sys::CKR_GENERAL_ERROR => Repair::Retry,
            // Vendors report "busy" and "throttled" in their own range.
            vendor if vendor & sys::CKR_VENDOR_DEFINED != 0 => Repair::Retry,
            // A short buffer leaves the operation active (v3.0 section 5.2): only a new session is clean again.
            sys::CKR_SESSION_HANDLE_INVALID
            | sys::CKR_SESSION_CLOSED
            | sys::CKR_OPERATION_ACTIVE
            | sys::CKR_OPERATION_NOT_INITIALIZED
            | sys::CKR_SESSION_COUNT
            | sys::CKR_BUFFER_TOO_SMALL => Repair::Reopen,
            sys::CKR_USER_NOT_LOGGED_IN => Repair::Relogin,
            sys::CKR_OBJECT_HANDLE_INVALID | sys::CKR_KEY_HANDLE_INVALID => Repair::Refind,
            sys::CKR_CRYPTOKI_NOT_INITIALIZED
            | sys::CKR_DEVICE_REMOVED
            | sys::CKR_TOKEN_NOT_PRESENT
            | sys::CKR_TOKEN_NOT_RECOGNIZED
            | sys::CKR_SLOT_ID_INVALID
            // No PIN was tried: SoftHSM says this while another process rewrites the token file.
            | sys::CKR_USER_PIN_NOT_INITIALIZED => Repair::Reinitialize,
            sys::CKR_PIN_INCORRECT
            | sys::CKR_PIN_INVALID
            | sys::CKR_PIN_LEN_RANGE
            | sys::CKR_PIN_LOCKED
            | sys::CKR_PIN_EXPIRED => Repair::PinRefused,
            _ => Repair::Hopeless,
        }
    }

    /// Whether a token that answers with it may sign after that.
    pub fn is_helped_by(self, rung: Rung) -> bool {
        match self.repair() {
            Repair::Reopen | Repair::Relogin | Repair::Refind => true,
            Repair::Retry | Repair::Reinitialize => rung == Rung::Reset,
            Repair::PinRefused | Repair::Hopeless => false,
        }
    }

    /// Whether it says that this PIN is wrong; it is, until it is another. A locked one may be right again.
    pub fn blames_pin(self) -> bool {
        matches!(self.0, sys::CKR_PIN_INCORRECT | sys::CKR_PIN_INVALID | sys::CKR_PIN_LEN_RANGE)
    }

    /// The name in the standard, `None` for a vendor's own or an unknown code.
    pub fn name(self) -> Option<&'static str> {
        NAMES.iter().find(|(value, _)| *value == self.0).map(|(_, name)| *name)
    }
}

impl fmt::Display for Ckr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => write!(f, "{name} (0x{:X})", self.0),
            None if self.0 & sys::CKR_VENDOR_DEFINED != 0 => write!(f, "CKR_VENDOR_DEFINED (0x{:X})", self.0),
            None => write!(f, "an unknown return code (0x{:X})", self.0),
        }
    }
}

impl fmt::Debug for Ckr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl std::error::Error for Ckr {}

macro_rules! names {
    ($($name:ident)*) => { &[$((sys::$name, stringify!($name))),*] };
}

const NAMES: &[(CK_RV, &str)] = names![
    CKR_CANCEL CKR_HOST_MEMORY CKR_SLOT_ID_INVALID CKR_GENERAL_ERROR CKR_FUNCTION_FAILED CKR_ARGUMENTS_BAD
    CKR_NEED_TO_CREATE_THREADS CKR_CANT_LOCK CKR_ATTRIBUTE_READ_ONLY CKR_ATTRIBUTE_SENSITIVE
    CKR_ATTRIBUTE_TYPE_INVALID CKR_ATTRIBUTE_VALUE_INVALID CKR_ACTION_PROHIBITED CKR_DATA_INVALID
    CKR_DATA_LEN_RANGE CKR_DEVICE_ERROR CKR_DEVICE_MEMORY CKR_DEVICE_REMOVED CKR_FUNCTION_CANCELED
    CKR_FUNCTION_NOT_PARALLEL CKR_FUNCTION_NOT_SUPPORTED CKR_KEY_HANDLE_INVALID CKR_KEY_SIZE_RANGE
    CKR_KEY_TYPE_INCONSISTENT CKR_KEY_FUNCTION_NOT_PERMITTED CKR_MECHANISM_INVALID CKR_MECHANISM_PARAM_INVALID
    CKR_OBJECT_HANDLE_INVALID CKR_OPERATION_ACTIVE CKR_OPERATION_NOT_INITIALIZED CKR_PIN_INCORRECT
    CKR_PIN_INVALID CKR_PIN_LEN_RANGE CKR_PIN_EXPIRED CKR_PIN_LOCKED CKR_SESSION_CLOSED CKR_SESSION_COUNT
    CKR_SESSION_HANDLE_INVALID CKR_SESSION_PARALLEL_NOT_SUPPORTED CKR_SESSION_READ_ONLY CKR_SESSION_EXISTS
    CKR_SIGNATURE_INVALID CKR_SIGNATURE_LEN_RANGE CKR_TEMPLATE_INCOMPLETE CKR_TEMPLATE_INCONSISTENT
    CKR_TOKEN_NOT_PRESENT CKR_TOKEN_NOT_RECOGNIZED CKR_TOKEN_WRITE_PROTECTED CKR_USER_ALREADY_LOGGED_IN
    CKR_USER_NOT_LOGGED_IN CKR_USER_PIN_NOT_INITIALIZED CKR_USER_TYPE_INVALID
    CKR_USER_ANOTHER_ALREADY_LOGGED_IN CKR_USER_TOO_MANY_TYPES CKR_RANDOM_NO_RNG CKR_DOMAIN_PARAMS_INVALID
    CKR_CURVE_NOT_SUPPORTED CKR_BUFFER_TOO_SMALL CKR_CRYPTOKI_NOT_INITIALIZED
    CKR_CRYPTOKI_ALREADY_INITIALIZED CKR_MUTEX_BAD CKR_MUTEX_NOT_LOCKED CKR_FIPS_SELF_TEST_FAILED
    CKR_LIBRARY_LOAD_FAILED CKR_PUBLIC_KEY_INVALID CKR_FUNCTION_REJECTED CKR_TOKEN_RESOURCE_EXCEEDED
    CKR_OPERATION_CANCEL_FAILED CKR_KEY_EXHAUSTED
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_return_code_prints_its_name_in_the_standard() {
        assert_eq!(Ckr(0x30).to_string(), "CKR_DEVICE_ERROR (0x30)");
        assert_eq!(Ckr(0x8000_0011).to_string(), "CKR_VENDOR_DEFINED (0x80000011)");
        assert_eq!(Ckr(0x7777).to_string(), "an unknown return code (0x7777)");
    }

    #[test]
    fn a_refused_pin_is_never_answered_with_another_try() {
        for code in [0xA0, 0xA1, 0xA2, 0xA3, 0xA4] {
            assert_eq!(Ckr(code).repair(), Repair::PinRefused, "{}", Ckr(code));
        }
    }

    #[test]
    fn errors_of_one_key_do_not_concern_the_others() {
        for code in [0x70, 0x71, 0x62, 0x63, 0x68, 0x20, 0x21, 0x7] {
            assert_eq!(Ckr(code).repair(), Repair::Hopeless, "{}", Ckr(code));
        }
    }

    #[test]
    fn every_other_code_asks_for_the_repair_that_was_seen_to_help() {
        let table = [
            (&[0x30, 0x31, 0x5, 0x6, 0x50, 0x8000_0011][..], Repair::Retry),
            (&[0xB3, 0xB0, 0x90, 0x91, 0xB1, 0x150], Repair::Reopen),
            (&[0x101], Repair::Relogin),
            (&[0x82, 0x60], Repair::Refind),
            (&[0x190, 0x32, 0xE0, 0xE1, 0x3, 0x102], Repair::Reinitialize),
        ];
        for (codes, repair) in table {
            for code in codes {
                assert_eq!(Ckr(*code).repair(), repair, "{}", Ckr(*code));
            }
        }
    }
}
