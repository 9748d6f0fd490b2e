//! Owns how often one client may come: so many connections per second and so many at once, of an address or of the network
//! that one client is taken to have. Knows nothing of connections. I/O thread only.
//!
//! Memory is the same however many addresses a flood has. There are two rows of times; an address has a place in each, which
//! it may share with others, and is turned away only when both places say so. Those who share one with a busy address do not
//! notice; who shares both with busy ones does, which is why the rows are long. Which places those are nobody outside can know.

use std::cell::Cell;
use std::hash::{BuildHasher, RandomState};
use std::net::IpAddr;
use std::rc::Rc;
use std::time::Duration;

use tokio::time::Instant;

use crate::parties::network_of;

/// In one row. With 5,000 addresses over the rate, 6 strangers in 1,000 are taken for one of them.
const PLACES: usize = 65_536;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientRatePlan {
    /// Connections per second, on average; at least 1.
    pub rate: u32,
    /// At once; at least 1.
    pub burst: u32,
    /// How much of an address tells clients apart.
    pub ipv4_bits: u8,
    pub ipv6_bits: u8,
}

pub struct ClientRate {
    plan: ClientRatePlan,
    began: Instant,
    rows: [Row; 2],
}

/// When an address would come next if it kept the rate (GCRA, ITU-T I.371), in nanoseconds after the beginning.
struct Row {
    key: RandomState,
    times: Box<[Cell<u64>]>,
}

impl ClientRate {
    pub fn new(plan: ClientRatePlan) -> Self {
        let row = || Row { key: RandomState::new(), times: vec![Cell::new(0); PLACES].into() };
        Self { plan, began: Instant::now(), rows: [row(), row()] }
    }

    /// After a reload. Without a change it is `former` itself: what clients have come too often is not forgiven them.
    pub fn succeeding(former: Option<&Rc<Self>>, plan: ClientRatePlan) -> Rc<Self> {
        let same = former.filter(|former| former.plan == plan);
        same.map_or_else(|| Rc::new(Self::new(plan)), Rc::clone)
    }

    /// Whether the client may come now; if so, it has.
    pub fn admits(&self, client: IpAddr, now: Instant) -> bool {
        let ClientRatePlan { rate, burst, ipv4_bits, ipv6_bits } = self.plan;
        let network = network_of(client, ipv4_bits, ipv6_bits);
        let places = self.rows.each_ref().map(|row| row.place_of(&network));
        let now = nanoseconds(now.saturating_duration_since(self.began));
        let interval = nanoseconds(Duration::from_secs(1) / rate.max(1));
        // Both have counted this client, and each others as well: the one that has counted less is nearer to the truth.
        let due = places.iter().map(|place| place.get()).min().unwrap_or(0).max(now);
        if due - now > interval.saturating_mul(u64::from(burst.saturating_sub(1))) {
            return false;
        }
        let next = due.saturating_add(interval);
        for place in places {
            place.set(place.get().max(next));
        }
        true
    }
}

impl Row {
    fn place_of(&self, network: &(u8, u128)) -> &Cell<u64> {
        // The remainder is below the length.
        #[allow(clippy::cast_possible_truncation)]
        let index = (self.key.hash_one(network) % self.times.len() as u64) as usize;
        &self.times[index]
    }
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{Ipv4Addr, Ipv6Addr};

    fn limited(rate: u32, burst: u32) -> ClientRate {
        ClientRate::new(ClientRatePlan { rate, burst, ipv4_bits: 32, ipv6_bits: 64 })
    }

    fn address(text: &str) -> IpAddr {
        text.parse().expect("an address")
    }

    /// How many of so many are admitted at that time.
    fn admitted(clients: &ClientRate, client: IpAddr, count: usize, at: Instant) -> usize {
        (0..count).filter(|_| clients.admits(client, at)).count()
    }

    #[test]
    fn a_client_may_come_as_often_as_the_burst_and_then_at_the_rate() {
        let clients = limited(10, 5);
        let (client, start) = (address("192.0.2.1"), clients.began);
        assert_eq!(admitted(&clients, client, 100, start), 5);
        assert_eq!(admitted(&clients, client, 100, start + Duration::from_millis(99)), 0);
        assert_eq!(admitted(&clients, client, 100, start + Duration::from_millis(100)), 1);
        assert_eq!(
            admitted(&clients, client, 100, start + Duration::from_millis(1100)),
            5,
            "no more than the burst"
        );
        assert_eq!(
            admitted(&clients, client, 100, start + Duration::from_secs(86_400)),
            5,
            "however long it was away"
        );
    }

    #[test]
    fn others_do_not_notice() {
        let clients = limited(1, 3);
        let start = clients.began;
        admitted(&clients, address("192.0.2.1"), 1000, start);
        assert_eq!(admitted(&clients, address("192.0.2.2"), 9, start), 3);
    }

    #[test]
    fn a_client_is_a_network_of_ipv6_and_an_address_of_ipv4_over_whichever_socket() {
        let clients = limited(1, 3);
        let start = clients.began;
        for (one, same, other) in [
            ("2001:db8::1", "2001:db8::ffff:1", "2001:db8:0:1::1"),
            ("192.0.2.1", "::ffff:192.0.2.1", "192.0.2.2"),
        ] {
            assert_eq!(admitted(&clients, address(one), 9, start), 3);
            assert_eq!(admitted(&clients, address(same), 9, start), 0, "{same}");
            assert_eq!(admitted(&clients, address(other), 1, start), 1, "{other}");
        }
    }

    #[test]
    fn a_flood_from_many_addresses_costs_few_strangers_their_turn() {
        let clients = limited(1, 2);
        let start = clients.began;
        for bot in 0..5000_u32 {
            admitted(&clients, Ipv4Addr::from_bits(bot).into(), 10, start);
        }
        let strangers = (0..5000_u128).map(|stranger| IpAddr::from(Ipv6Addr::from_bits(stranger << 64)));
        let turned_away = strangers.filter(|stranger| !clients.admits(*stranger, start)).count();
        assert!(turned_away < 250, "{turned_away} of 5000");
    }
}
