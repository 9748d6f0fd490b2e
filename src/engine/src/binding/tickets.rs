//! Owns the border of session tickets: their secrets, given or derived in a token. Those that are given are taken out of
//! JavaScript's memory here. Must not know when an epoch begins. JavaScript thread only.

use napi::Result;
use napi::bindgen_prelude::Buffer;
use napi_derive::napi;
use zeroize::{Zeroize, Zeroizing};

use super::token::{KeyPlace, key_place, load_fault};
use super::{Shared, invalid, signed};
use crate::generation::Generation;
use crate::ticket_keys::TicketStanding;
use crate::tickets::EpochSecret;

/// The secret key from which tokens derive the secrets of session tickets.
#[napi(object)]
pub struct TicketKeySettings {
    /// At least one; all must hold the same key.
    pub places: Vec<KeyPlace>,
    /// How long an epoch lasts.
    pub rotation_ms: u32,
    /// The epoch that issues tickets.
    pub epoch: i64,
}

#[napi(object)]
pub struct TicketSnapshot {
    /// A token is to derive the secrets.
    pub wanted: bool,
    /// The epoch whose secrets a token has derived and that issues tickets; undefined: none has.
    pub epoch: Option<i64>,
    /// A token is at it.
    pub deriving: bool,
    /// Why the last try came to nothing; the secrets that were there are used on.
    pub failure: Option<String>,
}

pub(super) fn load_ticket_key(next: &mut Generation, settings: Option<TicketKeySettings>) -> Result<()> {
    let Some(TicketKeySettings { places, rotation_ms, epoch }) = settings else { return Ok(()) };
    let places = places.into_iter().map(key_place).collect();
    next.load_ticket_key(places, rotation_ms.into(), epoch.unsigned_abs()).map_err(load_fault)
}

pub(super) fn use_secrets(secrets: Vec<Buffer>, Shared { ticketer, rotation, .. }: &Shared) -> Result<()> {
    // All are taken, and wiped in JavaScript's memory, before the first bad one is reported.
    let secrets: Vec<_> = secrets.into_iter().map(epoch_secret).collect();
    let secrets = secrets.into_iter().collect::<Result<Vec<_>>>()?;
    let Some((current, others)) = secrets.split_first() else {
        return Err(invalid("ticket secrets: expected at least one"));
    };
    rotation.use_unless_derived(ticketer, current, others);
    Ok(())
}

fn epoch_secret(mut buffer: Buffer) -> Result<EpochSecret> {
    let secret = <[u8; 32]>::try_from(buffer.as_ref()).map(Zeroizing::new);
    buffer.as_mut().zeroize();
    secret.map_err(|_| invalid(format!("ticket secret: expected 32 bytes, found {}", buffer.len())))
}

pub(super) fn ticket_snapshot(standing: TicketStanding) -> TicketSnapshot {
    let TicketStanding { wanted, epoch, deriving, failure } = standing;
    TicketSnapshot { wanted, epoch: epoch.map(signed), deriving, failure }
}
