//! Owns the limit of open descriptors. Knows not what they are for.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Standard streams, epoll, timer, and what the runtime may open.
const OTHERS: u64 = 32;

/// Takes what the hard limit allows.
/// Returns how many connections there may be.
pub fn raise() -> usize {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, ..limit };
    let allowed = match setrlimit(Resource::Nofile, raised) {
        Ok(()) => limit.maximum,
        Err(_) => limit.current,
    };
    usize::try_from(allowed.unwrap_or(u64::MAX).saturating_sub(OTHERS)).unwrap_or(usize::MAX)
}

/// Refuses before the first connection rather than failing at some later one.
pub fn raise_for(connections: usize) -> Result<(), String> {
    let allowed = raise();
    match connections <= allowed {
        true => Ok(()),
        false => Err(format!(
            "--connections {connections}: the hard limit of open descriptors allows {allowed}; \
             raise it (ulimit -Hn) or start several of these"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_connections_than_descriptors_are_refused() {
        let allowed = raise();
        assert!(raise_for(allowed).is_ok());
        assert!(raise_for(allowed + 1).is_err());
    }
}
