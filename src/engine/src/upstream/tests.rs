//! Upstreams against real sockets on loopback. A server can stop and start again on its own port, which no other test
//! can take meanwhile because the socket stays bound.

#![allow(clippy::unwrap_used)]

use std::future::pending;
use std::io::Read;
use std::net::{Ipv4Addr, Shutdown, TcpListener as BlockingListener, TcpStream as BlockingStream};
use std::sync::atomic::{AtomicU32, Ordering};

use socket2::{Domain, Socket, Type};
use tokio::net::UnixListener;
use tokio::sync::mpsc::{self, UnboundedReceiver};
use tokio::task::{LocalSet, yield_now};
use tokio::time::timeout;

use super::*;

const NOBODY: OnBehalf =
    OnBehalf { client: SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 9), destination: None };

#[tokio::test]
async fn round_robin_gives_every_server_the_same_number_of_connections() {
    let servers = [Peer::listening(), Peer::listening(), Peer::listening()];
    let upstream = Upstream::new(plan(&servers));
    let mut connections = Vec::new();
    for _ in 0..12 {
        connections.push(upstream.connect(&[], NOBODY).await.unwrap());
    }
    for index in 0..3 {
        assert_eq!(connections.iter().filter(|connected| connected.server == index).count(), 4);
        assert_eq!(count(&upstream, index, "ok"), 4);
        assert_eq!(upstream.stats().servers[index].connect_latency.snapshot().buckets.iter().sum::<u64>(), 4);
    }
}

#[tokio::test]
async fn workers_that_start_together_do_not_all_begin_with_the_same_server() {
    let servers = [Peer::listening(), Peer::listening()];
    let begins: Vec<_> = (0..64).map(|_| Upstream::new(plan(&servers)).next.get()).collect();
    assert!(begins.contains(&0) && begins.contains(&1), "{begins:?}");
}

#[tokio::test]
async fn least_connections_picks_the_server_with_fewer_open_connections() {
    let servers = [Peer::listening(), Peer::listening()];
    let upstream = Upstream::new(UpstreamPlan { balance: Balance::LeastConnections, ..plan(&servers) });
    let first = upstream.connect(&[], NOBODY).await.unwrap();
    let second = upstream.connect(&[], NOBODY).await.unwrap();
    assert_ne!(first.server, second.server);
    let emptied = second.server;
    drop(second);
    assert_eq!(upstream.connect(&[], NOBODY).await.unwrap().server, emptied);
    assert_eq!(upstream.connect(&[], NOBODY).await.unwrap().server, emptied);
}

#[tokio::test]
async fn least_connections_counts_connections_that_are_still_being_opened() {
    let servers = [Peer::listening(), Peer::listening()];
    let upstream = Upstream::new(UpstreamPlan { balance: Balance::LeastConnections, ..plan(&servers) });
    // Takes the turn away from round robin, which would part the two in any case.
    let (first, second) = tokio::join!(upstream.connect(&[], NOBODY), async {
        upstream.next.set((upstream.next.get() + 1) % 2);
        upstream.connect(&[], NOBODY).await
    });
    assert_ne!(first.unwrap().server, second.unwrap().server);
}

#[tokio::test]
async fn a_lease_outlives_the_stream_it_came_with() {
    let servers = [Peer::listening()];
    let upstream = Upstream::new(plan(&servers));
    let Connected { stream, lease, .. } = upstream.connect(&[], NOBODY).await.unwrap();
    drop(stream);
    assert_eq!(upstream.stats().servers[0].connections_open.get(), 1);
    drop(lease);
    assert_eq!(upstream.stats().servers[0].connections_open.get(), 0);
}

#[tokio::test]
async fn a_refused_connect_goes_on_to_the_next_server() {
    let servers = [Peer::stopped(), Peer::listening()];
    let upstream = Upstream::new(plan(&servers));
    upstream.next.set(0);
    assert_eq!(upstream.connect(&[], NOBODY).await.unwrap().server, 1);
    assert_eq!((count(&upstream, 0, "refused"), count(&upstream, 1, "ok")), (1, 1));
    assert_eq!(upstream.stats().servers[0].connections_open.get(), 0);
}

#[tokio::test]
async fn no_more_servers_are_tried_than_the_plan_allows() {
    let servers = [Peer::stopped(), Peer::stopped(), Peer::listening()];
    for (connect_attempts_max, reached) in [(0, false), (1, false), (2, false), (3, true), (4, true)] {
        let upstream = Upstream::new(UpstreamPlan { connect_attempts_max, ..plan(&servers) });
        upstream.next.set(0);
        assert_eq!(upstream.connect(&[], NOBODY).await.is_ok(), reached, "{connect_attempts_max} attempts");
    }
}

#[tokio::test]
async fn a_server_is_tried_once_for_a_connection_even_if_more_attempts_are_allowed() {
    let servers = [Peer::stopped()];
    let upstream = Upstream::new(UpstreamPlan { connect_attempts_max: 9, ..plan(&servers) });
    assert_eq!(reason(upstream.connect(&[], NOBODY).await), "refused");
    assert_eq!(count(&upstream, 0, "refused"), 1);
}

#[tokio::test]
async fn with_every_server_refusing_the_client_hears_so_long_before_the_deadline() {
    let servers = [Peer::stopped(), Peer::stopped()];
    let upstream =
        Upstream::new(UpstreamPlan { connect_deadline: Duration::from_secs(60), ..plan(&servers) });
    let refused = timeout(Duration::from_secs(5), upstream.connect(&[], NOBODY)).await.unwrap();
    assert_eq!(reason(refused), "refused");
}

#[tokio::test]
async fn an_upstream_without_servers_has_no_server() {
    let upstream = Upstream::new(plan(&[]));
    assert_eq!(reason(upstream.connect(&[], NOBODY).await), "no_server");
}

#[tokio::test]
async fn a_server_that_answers_nothing_leaves_time_for_the_next() {
    let hole = Hole::new();
    let alive = Peer::listening();
    let upstream = Upstream::new(UpstreamPlan {
        servers: vec![hole.peer.address(), alive.address()],
        connect_deadline: Duration::from_millis(400),
        ..plan(&[])
    });
    upstream.next.set(0);
    let started = Instant::now();
    assert_eq!(upstream.connect(&[], NOBODY).await.unwrap().server, 1);
    assert!(started.elapsed() >= Duration::from_millis(200), "{:?}", started.elapsed());
    assert_eq!(count(&upstream, 0, "deadline"), 1);
}

#[tokio::test]
async fn a_single_server_that_answers_nothing_gets_the_whole_deadline_and_no_more() {
    let hole = Hole::new();
    let upstream = Upstream::new(UpstreamPlan {
        servers: vec![hole.peer.address()],
        connect_deadline: Duration::from_millis(150),
        ..plan(&[])
    });
    let started = Instant::now();
    assert_eq!(reason(upstream.connect(&[], NOBODY).await), "deadline");
    assert!(started.elapsed() >= Duration::from_millis(150), "{:?}", started.elapsed());
    assert_eq!(count(&upstream, 0, "deadline"), 1);
}

#[tokio::test]
async fn a_connect_that_is_dropped_gives_its_place_back_and_counts_as_cancelled() {
    let hole = Hole::new();
    let upstream = Upstream::new(UpstreamPlan {
        servers: vec![hole.peer.address()],
        connect_deadline: Duration::from_secs(60),
        ..plan(&[])
    });
    assert!(timeout(Duration::from_millis(20), upstream.connect(&[], NOBODY)).await.is_err());
    assert_eq!(count(&upstream, 0, "cancelled"), 1);
    assert_eq!(upstream.stats().servers[0].connections_open.get(), 0);
}

#[tokio::test]
async fn a_server_that_keeps_refusing_is_ejected_and_returns_after_a_connection_succeeds() {
    let servers = [Peer::stopped(), Peer::listening()];
    let upstream =
        Upstream::new(UpstreamPlan { passive: passive(3, Duration::from_millis(50)), ..plan(&servers) });
    let mut changes = changes_of(&upstream);
    for failures in 1..=3 {
        assert!(changes.try_recv().is_err(), "ejected before failure {failures}");
        upstream.next.set(0);
        assert_eq!(upstream.connect(&[], NOBODY).await.unwrap().server, 1);
        assert_eq!(count(&upstream, 0, "refused"), failures);
    }
    assert_eq!(changes.try_recv().unwrap(), (0, false, ChangeCause::Connections));
    assert_eq!(upstream.stats().servers[0].up.get(), 0);

    upstream.next.set(0);
    assert_eq!(upstream.connect(&[], NOBODY).await.unwrap().server, 1);
    assert_eq!(count(&upstream, 0, "refused"), 3, "an ejected server is left alone");

    servers[0].start();
    until(async || upstream.connect(&[], NOBODY).await.unwrap().server == 0).await;
    assert_eq!(changes.try_recv().unwrap(), (0, true, ChangeCause::Connections));
    assert_eq!(upstream.stats().servers[0].up.get(), 1);
}

#[tokio::test]
async fn a_server_that_returns_gets_less_than_its_share_until_its_slow_start_is_over() {
    let servers = [Peer::stopped(), Peer::listening()];
    let upstream = Upstream::new(UpstreamPlan {
        passive: passive(1, Duration::from_millis(10)),
        slow_start: Duration::from_secs(3600),
        ..plan(&servers)
    });
    upstream.next.set(0);
    upstream.connect(&[], NOBODY).await.unwrap();
    assert_eq!(count(&upstream, 0, "refused"), 1);
    servers[0].start();
    until(async || upstream.connect(&[], NOBODY).await.unwrap().server == 0).await;

    // A tenth of its turns, of which there are a hundred.
    let before = count(&upstream, 0, "ok");
    for _ in 0..200 {
        upstream.connect(&[], NOBODY).await.unwrap();
    }
    let turns = count(&upstream, 0, "ok") - before;
    assert!((1..=40).contains(&turns), "{turns} of 200");

    let over =
        Upstream::succeeding(&upstream, UpstreamPlan { slow_start: Duration::ZERO, ..upstream.plan.clone() });
    let before = count(&over, 0, "ok");
    for _ in 0..200 {
        over.connect(&[], NOBODY).await.unwrap();
    }
    assert_eq!(count(&over, 0, "ok") - before, 100);
}

#[tokio::test]
async fn a_server_in_its_slow_start_is_taken_when_there_is_no_other() {
    let servers = [Peer::stopped()];
    let upstream = Upstream::new(UpstreamPlan {
        passive: passive(1, Duration::from_millis(10)),
        slow_start: Duration::from_secs(3600),
        ..plan(&servers)
    });
    assert!(upstream.connect(&[], NOBODY).await.is_err());
    servers[0].start();
    until(async || upstream.connect(&[], NOBODY).await.is_ok()).await;
    for _ in 0..50 {
        upstream.connect(&[], NOBODY).await.unwrap();
    }
}

#[tokio::test]
async fn one_connection_tries_an_ejected_server_and_its_failure_ejects_again_at_once() {
    let servers = [Peer::stopped(), Peer::listening()];
    let upstream =
        Upstream::new(UpstreamPlan { passive: passive(3, Duration::from_millis(50)), ..plan(&servers) });
    let mut changes = changes_of(&upstream);
    until(async || {
        upstream.connect(&[], NOBODY).await.unwrap();
        count(&upstream, 0, "refused") == 4
    })
    .await;
    upstream.next.set(0);
    upstream.connect(&[], NOBODY).await.unwrap();
    assert_eq!(count(&upstream, 0, "refused"), 4);
    assert_eq!(changes.try_recv().unwrap(), (0, false, ChangeCause::Connections));
    assert!(changes.try_recv().is_err(), "a failed try is no news");
}

#[tokio::test]
async fn while_one_connection_tries_an_ejected_server_the_others_stay_away() {
    let ejected = Peer::stopped();
    let upstream = Upstream::new(UpstreamPlan {
        servers: vec![ejected.address()],
        passive: passive(1, Duration::from_millis(300)),
        connect_attempts_max: 1,
        ..plan(&[])
    });
    upstream.next.set(0);
    assert_eq!(reason(upstream.connect(&[], NOBODY).await), "refused");
    until(async || !upstream.servers[0].is_ejected()).await;
    let tries = upstream.servers[0].lease(&upstream.plan.passive);
    assert!(upstream.servers[0].is_ejected());
    drop(tries);
}

#[tokio::test]
async fn a_success_forgets_the_failures_before_it() {
    let servers = [Peer::stopped()];
    let upstream =
        Upstream::new(UpstreamPlan { passive: passive(2, Duration::from_secs(60)), ..plan(&servers) });
    let mut changes = changes_of(&upstream);
    for _ in 0..3 {
        assert_eq!(reason(upstream.connect(&[], NOBODY).await), "refused");
        servers[0].start();
        upstream.connect(&[], NOBODY).await.unwrap();
        servers[0].stop();
    }
    assert!(changes.try_recv().is_err());
}

#[tokio::test]
async fn when_every_server_is_ejected_they_are_tried_nevertheless() {
    let servers = [Peer::stopped(), Peer::stopped()];
    let upstream =
        Upstream::new(UpstreamPlan { passive: passive(1, Duration::from_secs(60)), ..plan(&servers) });
    assert_eq!(reason(upstream.connect(&[], NOBODY).await), "refused");
    servers[0].start();
    assert_eq!(upstream.connect(&[], NOBODY).await.unwrap().server, 0);
}

#[tokio::test]
async fn a_limit_of_no_failures_ejects_never() {
    let servers = [Peer::stopped()];
    let upstream =
        Upstream::new(UpstreamPlan { passive: passive(0, Duration::from_secs(60)), ..plan(&servers) });
    for _ in 0..5 {
        assert_eq!(reason(upstream.connect(&[], NOBODY).await), "refused");
    }
    assert_eq!(upstream.stats().servers[0].up.get(), 1);
}

#[tokio::test]
async fn an_error_on_this_side_is_not_held_against_the_server() {
    let too_long = ServerAddress::Unix(PathBuf::from("/".repeat(200)));
    let upstream = Upstream::new(UpstreamPlan {
        servers: vec![too_long],
        passive: passive(1, Duration::from_secs(60)),
        ..plan(&[])
    });
    assert_eq!(reason(upstream.connect(&[], NOBODY).await), "other");
    assert_eq!(upstream.stats().servers[0].up.get(), 1);
}

#[tokio::test]
async fn checks_take_a_dead_server_out_and_bring_it_back() {
    let servers = [Peer::listening(), Peer::listening()];
    let upstream = Upstream::new(UpstreamPlan { health: Some(health(2, 2)), ..plan(&servers) });
    let mut changes = changes_of(&upstream);
    let checks = upstream.clone().check_health();
    checking(checks, async {
        servers[0].stop();
        assert_eq!(changes.recv().await.unwrap(), (0, false, ChangeCause::Check));
        assert_eq!(upstream.stats().servers[0].up.get(), 0);
        for _ in 0..4 {
            assert_eq!(upstream.connect(&[], NOBODY).await.unwrap().server, 1);
        }
        assert_eq!(count(&upstream, 0, "refused"), 0);

        servers[1].stop();
        assert_eq!(changes.recv().await.unwrap(), (1, false, ChangeCause::Check));
        assert_eq!(reason(upstream.connect(&[], NOBODY).await), "no_server");

        servers[0].start();
        assert_eq!(changes.recv().await.unwrap(), (0, true, ChangeCause::Check));
        assert_eq!(upstream.connect(&[], NOBODY).await.unwrap().server, 0);
        assert_eq!(upstream.stats().servers[0].up.get(), 1);
    })
    .await;
}

#[tokio::test]
async fn a_check_that_gets_no_answer_has_failed() {
    let hole = Hole::new();
    let upstream = Upstream::new(UpstreamPlan {
        servers: vec![hole.peer.address()],
        health: Some(HealthPlan { timeout: Duration::from_millis(20), ..health(1, 1) }),
        ..plan(&[])
    });
    let mut changes = changes_of(&upstream);
    checking(upstream.clone().check_health(), async {
        assert_eq!(changes.recv().await.unwrap(), (0, false, ChangeCause::Check));
    })
    .await;
}

#[test]
fn only_checks_in_a_row_change_a_servers_standing() {
    for (fall, rise, down_after, up_after) in [(0, 0, 1, 1), (1, 1, 1, 1), (2, 3, 2, 3)] {
        let health = health(fall, rise);
        let peer = [Peer::listening()];
        let upstream = Upstream::new(plan(&peer));
        let server = &upstream.servers[0];
        for (passed, needed) in [(false, down_after), (true, up_after), (false, down_after)] {
            for _ in 1..needed {
                assert_eq!(server.checked(passed, &health), None);
            }
            assert_eq!(server.checked(!passed, &health), None, "a contrary check begins the count anew");
            for _ in 1..needed {
                assert_eq!(server.checked(passed, &health), None);
            }
            assert_eq!(server.checked(passed, &health), Some(passed), "fall {fall}, rise {rise}");
        }
    }
}

#[test]
fn a_check_for_which_this_host_has_nothing_left_says_nothing_about_the_server() {
    let failed = |code| super::health::verdict(&Err(std::io::Error::from_raw_os_error(code).into()));
    for code in [libc::EMFILE, libc::ENFILE, libc::ENOMEM, libc::ENOBUFS, libc::EADDRNOTAVAIL] {
        assert_eq!(failed(code), None, "{code}");
    }
    for code in [libc::ECONNREFUSED, libc::EHOSTUNREACH, libc::EACCES] {
        assert_eq!(failed(code), Some(false), "{code}");
    }
    assert_eq!(super::health::verdict(&Ok(())), Some(true));
}

#[tokio::test]
async fn a_check_introduces_itself_to_a_server_that_expects_a_header() {
    for version in [ProxyVersion::V1, ProxyVersion::V2] {
        let server = Peer::listening();
        let upstream = Upstream::new(UpstreamPlan {
            servers: vec![server.address()],
            proxy_protocol: Some(version),
            health: Some(health(1, 1)),
            ..plan(&[])
        });
        let accept = tokio::task::spawn_blocking(move || {
            let (mut stream, peer) = server.accept();
            let mut header = Vec::new();
            stream.read_to_end(&mut header).unwrap();
            (header, peer, stream.local_addr().unwrap())
        });
        let (header, peer, own) = checking(upstream.check_health(), async { accept.await.unwrap() }).await;
        let expected = match version {
            ProxyVersion::V1 => {
                format!("PROXY TCP4 127.0.0.1 127.0.0.1 {} {}\r\n", peer.port(), own.port()).into_bytes()
            }
            ProxyVersion::V2 => b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0".to_vec(),
        };
        assert_eq!(header, expected);
    }
}

#[tokio::test]
async fn dropping_the_checks_ends_them() {
    let servers = [Peer::listening()];
    let upstream = Upstream::new(UpstreamPlan { health: Some(health(1, 1)), ..plan(&servers) });
    LocalSet::new()
        .run_until(async {
            assert!(timeout(Duration::from_millis(20), upstream.clone().check_health()).await.is_err());
            until(async || Rc::strong_count(&upstream) == 1).await;
        })
        .await;
}

#[tokio::test]
async fn without_a_health_plan_there_is_nothing_to_check() {
    let servers = [Peer::listening()];
    let upstream = Upstream::new(plan(&servers));
    timeout(Duration::from_secs(5), upstream.check_health()).await.unwrap();
}

#[tokio::test]
async fn a_unix_socket_is_a_server_like_any_other() {
    let directory = PrivateDirectory::new();
    let path = directory.0.join("server");
    let listener = UnixListener::bind(&path).unwrap();
    let upstream = Upstream::new(UpstreamPlan { servers: vec![ServerAddress::Unix(path)], ..plan(&[]) });
    let connected = upstream.connect(&[], NOBODY).await.unwrap();
    let (accepted, _) = listener.accept().await.unwrap();
    connected.stream.try_write(b"hello").unwrap();
    connected.stream.shutdown_write().unwrap();
    accepted.readable().await.unwrap();
    let mut bytes = [0; 8];
    assert_eq!(accepted.try_read(&mut bytes).unwrap(), 5);
    assert_eq!(accepted.try_read(&mut bytes).unwrap(), 0);
}

#[tokio::test]
async fn a_unix_socket_nobody_listens_on_refuses_and_a_missing_one_is_unreachable() {
    let directory = PrivateDirectory::new();
    let path = directory.0.join("server");
    let upstream =
        Upstream::new(UpstreamPlan { servers: vec![ServerAddress::Unix(path.clone())], ..plan(&[]) });
    assert_eq!(reason(upstream.connect(&[], NOBODY).await), "unreachable");
    drop(UnixListener::bind(&path).unwrap());
    assert_eq!(reason(upstream.connect(&[], NOBODY).await), "refused");
}

#[tokio::test]
async fn the_original_destination_is_no_server_without_one_and_never_this_host() {
    let original = UpstreamPlan { servers: vec![ServerAddress::Original], ..plan(&[]) };
    let upstream = Upstream::new(UpstreamPlan { passive: passive(1, Duration::from_secs(60)), ..original });
    assert_eq!(reason(upstream.connect(&[], NOBODY).await), "no_server");
    let here = Peer::listening();
    let ServerAddress::Tcp(address) = here.address() else { panic!("a TCP server") };
    let client = "192.0.2.1:9".parse().unwrap();
    let circle = OnBehalf { client, destination: Some(address) };
    assert_eq!(reason(upstream.connect(&[], circle).await), "loop");
    // A client that asks in a circle takes the upstream from nobody.
    assert_eq!(count(&upstream, 0, "loop"), 1);
    assert_eq!(upstream.stats().servers[0].up.get(), 1);
}

#[tokio::test]
async fn a_server_of_another_family_than_the_clients_is_not_blamed_for_it() {
    let servers = [Peer::listening()];
    let transparent = UpstreamPlan { transparent: true, ..plan(&servers) };
    let upstream =
        Upstream::new(UpstreamPlan { passive: passive(1, Duration::from_secs(60)), ..transparent });
    let ipv6 = OnBehalf { client: "[2001:db8::1]:9".parse().unwrap(), destination: None };
    assert_eq!(reason(upstream.connect(&[], ipv6).await), "other");
    assert_eq!(upstream.stats().servers[0].up.get(), 1);
}

#[tokio::test]
async fn a_server_that_is_near_has_the_first_bytes_when_it_is_connected() {
    let server = BlockingListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let servers = vec![ServerAddress::Tcp(server.local_addr().unwrap())];
    let upstream = Upstream::new(UpstreamPlan { servers, ..plan(&[]) });
    let connected = upstream.connect(b"hello", NOBODY).await.unwrap();
    assert_eq!(connected.taken, 5);
    let (mut accepted, _) = server.accept().unwrap();
    let mut bytes = [0; 5];
    accepted.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"hello");
}

#[tokio::test]
async fn a_server_that_answers_nothing_yet_takes_no_bytes_and_leaves_them_all_to_the_next() {
    let hole = Hole::new();
    let alive = Peer::listening();
    let upstream = Upstream::new(UpstreamPlan {
        servers: vec![hole.peer.address(), alive.address()],
        connect_deadline: Duration::from_millis(100),
        ..plan(&[])
    });
    upstream.next.set(0);
    let connected = upstream.connect(b"hello", NOBODY).await.unwrap();
    assert_eq!((connected.server, connected.taken), (1, 5));
    assert_eq!(count(&upstream, 0, "deadline"), 1);
}

#[tokio::test]
async fn connections_are_opened_with_nodelay() {
    let servers = [Peer::listening()];
    let connected = Upstream::new(plan(&servers)).connect(&[], NOBODY).await.unwrap();
    let Stream::Tcp(tcp) = &connected.stream else { panic!("a TCP server gives a TCP stream") };
    assert!(tcp.nodelay().unwrap());
}

#[test]
fn every_reason_of_an_attempt_is_an_outcome_that_is_counted() {
    let servers = [Peer::stopped()];
    let upstream = Upstream::new(plan(&servers));
    for reason in CONNECT_REASONS.into_iter().filter(|reason| *reason != "no_server") {
        assert_eq!(count(&upstream, 0, reason), 0);
    }
    for (kind, reason) in [
        (io::ErrorKind::ConnectionRefused, "refused"),
        (io::ErrorKind::TimedOut, "deadline"),
        (io::ErrorKind::HostUnreachable, "unreachable"),
        (io::ErrorKind::NetworkUnreachable, "unreachable"),
        (io::ErrorKind::ConnectionReset, "reset"),
        (io::ErrorKind::AddrNotAvailable, "other"),
    ] {
        assert_eq!(ConnectError::from(io::Error::from(kind)).reason(), reason);
        assert!(CONNECT_REASONS.contains(&reason));
    }
}

fn plan(servers: &[Peer]) -> UpstreamPlan {
    UpstreamPlan {
        name: "web".to_owned(),
        servers: servers.iter().map(|server| server.address()).collect(),
        balance: Balance::RoundRobin,
        connect_deadline: Duration::from_secs(5),
        connect_attempts_max: 3,
        proxy_protocol: None,
        proxy_client_certificate: false,
        transparent: false,
        health: None,
        passive: passive(0, Duration::ZERO),
        slow_start: Duration::ZERO,
    }
}

fn passive(failures_max: u32, ejection: Duration) -> PassivePlan {
    PassivePlan { failures_max, ejection }
}

fn health(fall: u32, rise: u32) -> HealthPlan {
    HealthPlan { interval: Duration::from_millis(10), timeout: Duration::from_secs(5), fall, rise }
}

fn count(upstream: &Upstream, server: usize, outcome: &str) -> u64 {
    upstream.stats().servers[server].connects(outcome).unwrap().get()
}

fn reason(connected: Result<Connected, ConnectError>) -> &'static str {
    connected.unwrap_err().reason()
}

fn changes_of(upstream: &Upstream) -> UnboundedReceiver<(usize, bool, ChangeCause)> {
    let (sender, receiver) = mpsc::unbounded_channel();
    upstream.on_change(move |change| {
        assert_eq!(change.upstream, "web");
        // The receiver may be gone before the upstream is.
        let _ = sender.send((change.server, change.up, change.cause));
    });
    receiver
}

/// Runs `body` beside `checks`.
async fn checking<T>(checks: impl Future<Output = ()>, body: impl Future<Output = T>) -> T {
    let both = async {
        tokio::select! {
            () = async { checks.await; pending().await } => unreachable!("checks never end"),
            done = body => done,
        }
    };
    timeout(Duration::from_secs(10), LocalSet::new().run_until(both)).await.unwrap()
}

async fn until(mut done: impl AsyncFnMut() -> bool) {
    let wait = async {
        while !done().await {
            yield_now().await;
        }
    };
    timeout(Duration::from_secs(10), wait).await.unwrap();
}

/// A server's end: bound all its life, listening or refusing. Connections wait in its queue unless a test takes them.
struct Peer(Socket);

impl Peer {
    fn stopped() -> Self {
        let free = Peer::bound(0);
        // Linux gives a port that it chose itself away when the socket stops listening, but not one that was asked for.
        Peer::bound(free.port())
    }

    fn bound(port: u16) -> Self {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        socket.set_reuse_address(true).unwrap();
        socket.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, port)).into()).unwrap();
        Peer(socket)
    }

    fn listening() -> Self {
        let peer = Peer::stopped();
        peer.start();
        peer
    }

    fn start(&self) {
        self.0.listen(4_096).unwrap();
    }

    fn stop(&self) {
        self.0.shutdown(Shutdown::Both).unwrap();
    }

    fn port(&self) -> u16 {
        self.0.local_addr().unwrap().as_socket().unwrap().port()
    }

    fn address(&self) -> ServerAddress {
        ServerAddress::Tcp((Ipv4Addr::LOCALHOST, self.port()).into())
    }

    fn accept(&self) -> (BlockingStream, SocketAddr) {
        BlockingListener::from(self.0.try_clone().unwrap()).accept().unwrap()
    }
}

#[tokio::test]
async fn after_a_reload_servers_that_stay_keep_their_standing_and_their_counts() {
    let servers = [Peer::stopped(), Peer::listening()];
    let former = Upstream::new(UpstreamPlan {
        passive: PassivePlan { failures_max: 1, ejection: Duration::from_secs(60) },
        ..plan(&servers)
    });
    former.next.set(0);
    let connected = former.connect(&[], NOBODY).await.unwrap();
    assert!(former.servers[0].is_ejected());

    let mut reordered = former.plan().clone();
    reordered.servers.reverse();
    let next = Upstream::succeeding(&former, reordered);
    assert!(next.servers[1].is_ejected() && !next.servers[0].is_ejected());
    assert_eq!((count(&next, 1, "refused"), count(&next, 0, "ok")), (1, 1));
    assert_eq!(next.stats().servers[0].connections_open.get(), 1);
    drop(connected);
    assert_eq!(next.stats().servers[0].connections_open.get(), 0);
}

#[tokio::test]
async fn servers_at_one_address_are_still_counted_apart_after_a_reload() {
    let server = Peer::listening();
    let twice = UpstreamPlan { servers: vec![server.address(), server.address()], ..plan(&[]) };
    let former = Upstream::new(twice.clone());
    former.next.set(0);
    drop(former.connect(&[], NOBODY).await.unwrap());
    let next = Upstream::succeeding(&former, UpstreamPlan { connect_attempts_max: 9, ..twice });
    assert_eq!((count(&next, 0, "ok"), count(&next, 1, "ok")), (1, 0));
}

#[tokio::test]
async fn after_a_reload_that_does_not_change_it_an_upstream_is_the_same() {
    let servers = [Peer::listening()];
    let former = Upstream::new(plan(&servers));
    assert!(Rc::ptr_eq(&former, &Upstream::succeeding(&former, former.plan().clone())));
}

#[tokio::test]
async fn a_server_that_was_down_is_not_when_a_reload_ends_its_checks() {
    let servers = [Peer::stopped()];
    let health =
        HealthPlan { interval: Duration::from_secs(60), timeout: Duration::from_secs(1), fall: 1, rise: 1 };
    let former = Upstream::new(UpstreamPlan { health: Some(health.clone()), ..plan(&servers) });
    former.servers[0].checked(false, &health);
    let other = UpstreamPlan { connect_attempts_max: 9, ..former.plan().clone() };
    assert!(Upstream::succeeding(&former, other.clone()).servers[0].is_down());
    assert!(!Upstream::succeeding(&former, UpstreamPlan { health: None, ..other }).servers[0].is_down());
}

/// A server whose queue is full and which accepts nobody: the kernel drops what more arrives.
struct Hole {
    peer: Peer,
    _queued: Vec<Socket>,
}

impl Hole {
    fn new() -> Self {
        let peer = Peer::stopped();
        peer.0.listen(0).unwrap();
        let queued = (0..4)
            .map(|_| {
                let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
                socket.set_nonblocking(true).unwrap();
                // In progress, or left waiting once the queue is full; neither is an error here.
                let _ = socket.connect(&peer.0.local_addr().unwrap());
                socket
            })
            .collect();
        Hole { peer, _queued: queued }
    }
}

struct PrivateDirectory(PathBuf);

impl PrivateDirectory {
    fn new() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("keygate-upstream-{}-{number}", std::process::id()));
        std::fs::create_dir(&path).unwrap();
        PrivateDirectory(path)
    }
}

impl Drop for PrivateDirectory {
    fn drop(&mut self) {
        // Left behind at worst.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
