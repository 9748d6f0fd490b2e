//! Owns what is counted about one token. Written by the I/O thread (submit) and the lanes, read by the JavaScript
//! thread. Must not know names or labels of metrics: those are TypeScript's.

use super::pkcs11::Mechanism;
use crate::stats::{Counter, Gauge, Histogram};

#[derive(Debug, Default)]
pub struct TokenStats {
    /// From submit to the moment a lane takes the request.
    pub sign_wait: Histogram,
    pub ecdsa: MechanismStats,
    pub rsa_pkcs: MechanismStats,
    pub rsa_pkcs_pss: MechanismStats,
    pub eddsa: MechanismStats,
    pub queue_depth_ec: Gauge,
    pub queue_depth_rsa: Gauge,
    pub lanes_idle: Gauge,
    pub lanes_busy: Gauge,
    /// Lanes written off inside the module, which have not come back.
    pub lanes_lost: Gauge,
    /// How often a lane was written off.
    pub written_off: Counter,
    /// PKCS#11 sessions of lanes.
    pub sessions_open: Gauge,
    pub reopened: Counter,
    pub logged_in: Counter,
    /// How often this token had its module initialised again.
    pub reinitialized: Counter,
    pub refound: Counter,
    pub shed_queue_full: Counter,
    pub shed_queue_aged: Counter,
    pub shed_token_down: Counter,
    /// Requests that went on to another token, because this one failed or took too long.
    pub failed_over: Counter,
    /// Requests nobody waited for any more when a lane came to them.
    pub cancelled: Counter,
    /// How often the token went down (circuit opened).
    pub went_down: Counter,
    /// How often the login went ahead without the login lock, because another process held it too long.
    pub login_lock_timeouts: Counter,
}

#[derive(Debug, Default)]
pub struct MechanismStats {
    /// How long the lane was busy with one request: the token's calls, repairs and the check of the signature.
    pub sign: Histogram,
    pub ok: Counter,
    pub failed: Counter,
    pub wrong: Counter,
}

impl TokenStats {
    pub fn of(&self, mechanism: Mechanism) -> &MechanismStats {
        match mechanism {
            Mechanism::Ecdsa => &self.ecdsa,
            Mechanism::RsaPkcs => &self.rsa_pkcs,
            Mechanism::RsaPkcsPss(_) => &self.rsa_pkcs_pss,
            Mechanism::Eddsa => &self.eddsa,
        }
    }
}
