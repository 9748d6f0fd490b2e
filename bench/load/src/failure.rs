//! Owns the kinds of failure, and counting them. Knows no connection.

use std::collections::BTreeMap;

use serde::Serialize;

/// Why something did not count. The words are what the results call it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Failure {
    Connect,
    /// Closed or reset before the handshake was over.
    ClosedInHandshake,
    /// An alert, a wrong certificate, a wrong signature, a broken record.
    Tls,
    /// Closed or reset before the whole answer was there.
    ClosedBeforeAnswer,
    WrongAnswer,
    /// A full handshake where a resumed one was asked for, the other way round, or a HelloRetryRequest.
    WrongKind,
    WrongGroup,
    Deadline,
    /// Closed or reset when it was established and should stay.
    Lost,
    /// It was due, and as many as are allowed were in flight.
    NotBegun,
}

/// What went wrong with one connection.
#[derive(Debug, PartialEq, Eq)]
pub struct Fault {
    pub failure: Failure,
    /// What TLS says about it.
    pub detail: Option<String>,
}

impl From<Failure> for Fault {
    fn from(failure: Failure) -> Self {
        Self { failure, detail: None }
    }
}

#[derive(Debug, Default, Serialize)]
#[serde(transparent)]
pub struct Failures {
    counts: BTreeMap<Failure, u64>,
    #[serde(skip)]
    first_detail: Option<String>,
}

impl Failures {
    pub fn add(&mut self, fault: Fault) {
        *self.counts.entry(fault.failure).or_default() += 1;
        self.first_detail = self.first_detail.take().or(fault.detail);
    }

    pub fn of(&self, failure: Failure) -> u64 {
        self.counts.get(&failure).copied().unwrap_or_default()
    }

    pub fn total(&self) -> u64 {
        self.counts.values().sum()
    }

    /// Of the first failure that had one.
    pub fn detail(&self) -> Option<&str> {
        self.first_detail.as_deref()
    }

    /// For an error message.
    pub fn summary(&self) -> String {
        let counts = serde_json::to_string(&self.counts).unwrap_or_default();
        format!("{counts}; first TLS error: {}", self.detail().unwrap_or("none"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_are_counted_by_kind_and_the_first_detail_is_kept() {
        let mut failures = Failures::default();
        failures.add(Failure::NotBegun.into());
        for detail in ["first", "second"] {
            failures.add(Fault { failure: Failure::Tls, detail: Some(detail.to_owned()) });
        }
        assert_eq!(failures.total(), 3);
        assert_eq!(failures.summary(), r#"{"tls":2,"not_begun":1}; first TLS error: first"#);
    }
}
