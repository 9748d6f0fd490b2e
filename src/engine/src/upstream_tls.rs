//! Owns TLS towards an upstream, from ClientHello to Finished: what is offered, who it must be, the key that shows who we are.
//! Must not know how a server was chosen or connected to, nor what is sent afterwards. I/O thread only.
//!
//! ```text
//!  step (ClientHello) ──> flush ──> read ──> step ──┬─ needs more ──────> flush ──> read
//!                                                   ├─ wants signature ─> lane ───> step (again)
//!                                                   ├─ established ─────> flush ──> Established
//!                                                   └─ failed ──────────> alert ──> Close
//! ```

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::time::{Instant, timeout_at};

use crate::close::Close;
use crate::handshake::{Established, Leftover};
use crate::policy::resumption;
use crate::relay::Scratch;
use crate::step::{StepFault, receive, run_step, write_all};
use crate::stream::Stream;
use crate::tls::{Tls, TlsPhase, UNPROCESSED_MAX};
use crate::verify::{Findings, Standing};

/// How an upstream is spoken to.
pub struct UpstreamTls {
    /// The upstream's.
    pub name: String,
    /// In the order of `UpstreamPlan::servers`.
    pub servers: Vec<ServerTls>,
    /// What was found about its certificates.
    pub findings: Arc<Findings>,
    /// From connected to Finished.
    pub deadline: Duration,
}

/// How one server is spoken to.
pub struct ServerTls {
    /// Who it must be.
    name: ServerName<'static>,
    /// With the TLS sessions that can be resumed, and after how many changes of `tlsa` they began.
    config: Mutex<(u64, Arc<ClientConfig>)>,
    resumes: bool,
    /// What DNS says about it.
    pub tlsa: Arc<Standing>,
}

impl ServerTls {
    pub fn new(name: ServerName<'static>, config: ClientConfig, resumes: bool, tlsa: Arc<Standing>) -> Self {
        let config = Mutex::new((tlsa.changes(), Arc::new(config)));
        Self { name, config, resumes, tlsa }
    }

    /// A resumption shows no certificate: when DNS says something else, sessions are forgotten.
    fn config(&self) -> Arc<ClientConfig> {
        let changes = self.tlsa.changes();
        let mut current = self.config.lock().unwrap_or_else(PoisonError::into_inner);
        if current.0 != changes {
            let mut config = ClientConfig::clone(&current.1);
            config.resumption = resumption(self.resumes);
            *current = (changes, Arc::new(config));
        }
        current.1.clone()
    }
}

/// Takes a connection to the server with this index through the handshake.
///
/// # Errors
/// Why the connection must be closed. The server was sent the alert that belongs to it.
pub async fn shake_hands(
    server: &Stream,
    upstream: &UpstreamTls,
    index: usize,
    deadline: Instant,
    scratch: &Scratch,
) -> Result<Established, Close> {
    let it = upstream.servers.get(index).ok_or(Close::ProxyInternalPanic)?;
    let mut tls =
        Tls::client(it.config(), it.name.clone()).map_err(|_| Close::UpstreamHandshakeProtocolError)?;
    loop {
        let mut step = run_step(tls, server, deadline, Close::UpstreamHandshakeClosed).await?;
        let to_server = step.tls.take_to_peer();
        let phase = match step.result {
            Ok(phase) if step.tls.unprocessed().len() <= UNPROCESSED_MAX => phase,
            Ok(_) => return Err(Close::UpstreamHandshakeProtocolError),
            Err(fault) => {
                let _ = server.try_write(&to_server);
                return Err(match fault {
                    StepFault::Unsigned(error) => Close::from_sign_error(&error),
                    StepFault::Tls(error) => Close::from_upstream_tls_error(&error),
                });
            }
        };
        timeout_at(deadline, write_all(server, &to_server))
            .await
            .map_err(|_| Close::UpstreamHandshakeDeadline)?
            .map_err(|_| Close::UpstreamHandshakeReset)?;
        match phase {
            TlsPhase::Handshaking => tls = step.tls,
            TlsPhase::PeerClosed if step.tls.is_handshaking() => return Err(Close::UpstreamHandshakeClosed),
            TlsPhase::Established | TlsPhase::PeerClosed => {
                let leftover = Leftover { plaintext: step.plaintext, ended: phase == TlsPhase::PeerClosed };
                return Ok(Established { tls: step.tls, leftover });
            }
        }
        let received = timeout_at(deadline, receive(server, &mut tls, scratch))
            .await
            .map_err(|_| Close::UpstreamHandshakeDeadline)?
            .map_err(|_| Close::UpstreamHandshakeReset)?;
        if received == 0 {
            return Err(Close::UpstreamHandshakeClosed);
        }
    }
}
