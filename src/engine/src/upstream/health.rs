//! Owns the active checks: when they run and what a check is. What a result means is server.rs. Runs on the I/O thread.

use std::io::{self, Write};
use std::rc::Rc;

use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::server::Server;
use super::{ChangeCause, ConnectError, HealthPlan, Upstream, random_fraction};
use crate::proxy_header::{self, Endpoints, ProxyVersion};
use crate::stream::Stream;

/// One task for each server, so that one that answers nothing does not delay the checks of the others. The tasks
/// end with this future.
pub async fn check(upstream: Rc<Upstream>) {
    let Some(health) = upstream.plan.health.clone() else { return };
    let mut checks = JoinSet::new();
    for server in upstream.servers.clone() {
        checks.spawn_local(check_server(upstream.clone(), server, health.clone()));
    }
    checks.join_all().await;
}

async fn check_server(upstream: Rc<Upstream>, server: Rc<Server>, health: HealthPlan) {
    // Workers start together: without this every server would hear from all of them at the same moment, for ever.
    sleep(health.interval.mul_f64(random_fraction())).await;
    loop {
        let result = check_once(&server, &health, upstream.plan.proxy_protocol).await;
        if let Some(passed) = verdict(&result)
            && let Some(up) = server.checked(passed, &health)
        {
            upstream.tell(&server, up, ChangeCause::Check);
        }
        sleep(health.interval.mul_f64(0.875 + random_fraction() / 4.0)).await;
    }
}

/// Whether the server passed; None: this host had nothing to check it with, which must not take every server down.
pub(super) fn verdict(result: &Result<(), ConnectError>) -> Option<bool> {
    match result {
        Ok(()) => Some(true),
        Err(ConnectError::Other(error)) if is_exhaustion(error) => None,
        Err(_) => Some(false),
    }
}

/// No descriptors, memory or ports left.
fn is_exhaustion(error: &io::Error) -> bool {
    use libc::{EADDRNOTAVAIL, EMFILE, ENFILE, ENOBUFS, ENOMEM};
    matches!(error.raw_os_error(), Some(EMFILE | ENFILE | ENOMEM | ENOBUFS | EADDRNOTAVAIL))
}

async fn check_once(
    server: &Server,
    health: &HealthPlan,
    proxy: Option<ProxyVersion>,
) -> Result<(), ConnectError> {
    let checked = async {
        let stream = server.open(&[], None, health.timeout).await?.stream;
        match proxy {
            // A server that expects a header would log every check without one as an error.
            Some(version) => Ok(introduce(&stream, version).await?),
            None => Ok(()),
        }
    };
    timeout(health.timeout, checked).await.unwrap_or(Err(ConnectError::Deadline))
}

async fn introduce(mut stream: &Stream, version: ProxyVersion) -> io::Result<()> {
    let own = match (stream.local_addr()?, stream.peer_addr()?) {
        (Some(source), Some(destination)) => Some(Endpoints { source, destination }),
        _ => None,
    };
    let mut header = Vec::new();
    proxy_header::write_local(version, own, &mut header);
    stream.writable().await?;
    // The first bytes of a connection always find room for a header.
    stream.write_all(&header)
}
