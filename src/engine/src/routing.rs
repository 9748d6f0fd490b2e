//! Owns the choice of an upstream for a connection: by the name it asked for, the protocol it will speak and who the client is,
//! the first route that fits, else the default. Must not know how those were learnt, nor how upstreams are connected to. I/O thread only.

use std::rc::Rc;
use std::sync::Arc;

use crate::upstream::Upstream;
use crate::upstream_tls::UpstreamTls;
use crate::verify::{Clients, Identity};

/// As configured: upstreams by name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RoutesPlan {
    pub routes: Vec<RoutePlan>,
    /// For what no route fits; None: it is refused.
    pub default: Option<String>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RoutePlan {
    /// DNS names in lower case, wildcards as `*.example.org` (one label). Empty: any name, or none.
    pub names: Vec<String>,
    /// Empty: any protocol, or none.
    pub alpn: Vec<Vec<u8>>,
    /// Nobody named: any client, known or not.
    pub clients: Clients,
    /// None: refused.
    pub upstream: Option<String>,
}

impl RoutesPlan {
    pub fn upstreams(&self) -> impl Iterator<Item = &String> {
        self.routes.iter().filter_map(|route| route.upstream.as_ref()).chain(&self.default)
    }
}

/// Where a connection goes. Given to those who connect, and to nothing that lives longer: the TLS configuration holds a
/// generation's certificates.
#[derive(Clone)]
pub struct Target {
    pub upstream: Rc<Upstream>,
    /// None: plaintext.
    pub tls: Option<Arc<UpstreamTls>>,
}

pub struct Router {
    routes: Vec<(RoutePlan, Option<Target>)>,
    default: Option<Target>,
}

impl Router {
    /// `find`: an upstream by its name. A route to one that is not there refuses.
    pub fn new(plan: &RoutesPlan, find: impl Fn(&str) -> Option<Target>) -> Self {
        let target = |name: &Option<String>| name.as_deref().and_then(&find);
        Self {
            routes: plan.routes.iter().map(|route| (route.clone(), target(&route.upstream))).collect(),
            default: target(&plan.default),
        }
    }

    /// `name` in lower case; `client` as its verified certificate calls it. None: nobody is to serve this.
    pub fn route(
        &self,
        name: Option<&str>,
        alpn: Option<&[u8]>,
        client: Option<&Identity>,
    ) -> Option<&Target> {
        match self.routes.iter().find(|(route, _)| route.fits(name, alpn, client)) {
            Some((_, target)) => target.as_ref(),
            None => self.default.as_ref(),
        }
    }
}

impl RoutePlan {
    fn fits(&self, name: Option<&str>, alpn: Option<&[u8]>, client: Option<&Identity>) -> bool {
        let name_fits = self.names.is_empty()
            || name.is_some_and(|name| {
                let parent = name.split_once('.').map(|(_, parent)| parent);
                self.names
                    .iter()
                    .any(|own| own == name || own.strip_prefix("*.").is_some_and(|own| Some(own) == parent))
            });
        let alpn_fits =
            self.alpn.is_empty() || alpn.is_some_and(|alpn| self.alpn.iter().any(|own| own == alpn));
        let client_fits =
            self.clients.is_empty() || client.is_some_and(|client| self.clients.include(client));
        name_fits && alpn_fits && client_fits
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fits(names: &[&str], alpn: &[&str], name: Option<&str>, spoken: Option<&str>) -> bool {
        let route = RoutePlan {
            names: names.iter().map(|name| (*name).to_owned()).collect(),
            alpn: alpn.iter().map(|alpn| alpn.as_bytes().to_vec()).collect(),
            ..RoutePlan::default()
        };
        route.fits(name, spoken.map(str::as_bytes), None)
    }

    #[test]
    fn a_wildcard_stands_for_one_label() {
        for (name, expected) in [
            (Some("a.example.org"), true),
            (Some("example.org"), false),
            (Some("a.b.example.org"), false),
            (Some("xexample.org"), false),
            (Some("org"), false),
            (Some(""), false),
            (None, false),
        ] {
            assert_eq!(fits(&["*.example.org"], &[], name, None), expected, "{name:?}");
        }
    }

    #[test]
    fn a_route_fits_when_name_and_protocol_do() {
        assert!(fits(&[], &[], None, None));
        assert!(fits(&["a.test"], &["h2"], Some("a.test"), Some("h2")));
        assert!(!fits(&["a.test"], &["h2"], Some("a.test"), Some("http/1.1")));
        assert!(!fits(&["a.test"], &["h2"], Some("a.test"), None));
        assert!(!fits(&["a.test"], &["h2"], Some("b.test"), Some("h2")));
    }
    #[test]
    fn a_route_for_some_clients_is_not_for_the_others_nor_for_the_unknown() {
        let clients = Clients { emails: ["a@b.test".to_owned()].into(), ..Clients::default() };
        let route = RoutePlan { clients, ..RoutePlan::default() };
        let known = Identity { emails: vec!["a@b.test".into()], ..Identity::default() };
        assert!(route.fits(None, None, Some(&known)));
        assert!(!route.fits(None, None, Some(&Identity::default())));
        assert!(!route.fits(None, None, None));
    }
}
