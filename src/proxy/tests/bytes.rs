//! Bytes through the real tunnel arrive whole and in order, or the receiver sees a reset: under random cuts, ends, resets,
//! changes of the caller's address and a network that loses, doubles and swaps packets.
//!
//! A failure names its seed; a seed that has failed once belongs into [`SEEDS`].

use std::cell::Cell;
use std::io;
use std::time::Duration;

use futures_util::future::join_all;
use rand::rngs::StdRng;
use rand::{Rng as _, RngExt as _, SeedableRng as _};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::Notify;

use super::harness::Mesh;
use super::nat::Nat;
use super::reset;

/// Always tried.
const SEEDS: [u64; 2] = [1, 2];
/// Tried besides, new in each run.
const RANDOM_SEEDS: usize = 4;
/// Connections of one seed at once, over the tunnels of two workers.
const CONNECTIONS: usize = 12;
/// Longest transfer of one direction, in bytes.
const BYTES_MAX: usize = 400_000;
/// Longest write.
const CHUNK_BYTES_MAX: usize = 60_000;
/// Changes of address during one seed's transfers.
const MIGRATIONS: usize = 3;
/// One packet in so many is lost, one doubled, one late.
const TROUBLE: u32 = 150;
/// A seed's transfers take less, also on a busy machine.
const DEADLINE: Duration = Duration::from_mins(2);

/// Who does something first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Client,
    App,
}

/// How a connection ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// FIN both ways, at their own times.
    Both,
    /// FIN of one side; the other begins to send only after it has read that.
    Answer { first: Side },
    /// RST of one side after so many bytes, without a FIN; the other says nothing meanwhile where `quiet`.
    Reset { by: Side, after: usize, quiet: bool },
}

/// One connection of the test.
#[derive(Debug)]
struct Plan {
    up: Vec<u8>,
    down: Vec<u8>,
    end: End,
    seed: u64,
}

impl Plan {
    fn new(rng: &mut StdRng) -> Self {
        let mut bytes = || {
            let mut bytes = vec![0; rng.random_range(0..BYTES_MAX)];
            rng.fill_bytes(&mut bytes);
            bytes
        };
        let (up, down) = (bytes(), bytes());
        let side = if rng.random() { Side::Client } else { Side::App };
        let end = match rng.random_range(0..4) {
            0 => End::Both,
            1 => End::Answer { first: side },
            _ => {
                let all = if side == Side::Client { up.len() } else { down.len() };
                End::Reset { by: side, after: rng.random_range(0..=all), quiet: rng.random() }
            }
        };
        Self { up, down, end, seed: rng.random() }
    }

    /// What `side` sends, at most.
    fn sent_by(&self, side: Side) -> &[u8] {
        let all = if side == Side::Client { &self.up[..] } else { &self.down[..] };
        match self.end {
            End::Reset { by, after, .. } if by == side => &all[..after],
            End::Reset { by, quiet: true, .. } if by != side => &[],
            _ => all,
        }
    }

    /// Runs the connection and checks what both sides see.
    async fn run(&self, (client, app): (TcpStream, TcpStream), progress: &Progress) {
        tokio::join!(self.side(Side::Client, client, progress), self.side(Side::App, app, progress));
    }

    async fn side(&self, me: Side, stream: TcpStream, progress: &Progress) {
        let other = if me == Side::Client { Side::App } else { Side::Client };
        let mut rng = StdRng::seed_from_u64(self.seed ^ u64::from(me == Side::Client));
        let expected = self.sent_by(other);
        let what = |said: &str| format!("{me:?} of {:?}: {said}", self.end);
        if matches!(self.end, End::Reset { by, .. } if by == me) {
            reset(&stream);
            let (input, output) = stream.into_split();
            let mut got = Vec::new();
            self.resets(me, &mut rng, (input, output), &mut got, progress).await;
            return assert!(expected.starts_with(&got), "{}", what("other bytes than were sent"));
        }
        let (mut input, mut output) = stream.into_split();
        let (heard, broken) = (Notify::new(), Cell::new(false));
        let write = async {
            if matches!(self.end, End::Answer { first } if first != me) {
                heard.notified().await;
            }
            let sent = send(&mut output, self.sent_by(me), &mut rng).await;
            let sent = if matches!(self.end, End::Reset { .. }) { sent } else { sent.and(output.shutdown().await) };
            broken.set(sent.is_err());
            sent
        };
        let read = async {
            let mut got = Vec::new();
            let ended = receive(&mut input, &mut got, &broken, progress).await;
            heard.notify_one();
            (got, ended)
        };
        let (sent, (got, ended)) = tokio::join!(write, read);
        assert!(expected.starts_with(&got), "{}", what("other bytes than were sent"));
        match self.end {
            End::Both | End::Answer { .. } => {
                assert!(sent.is_ok() && matches!(ended, Ended::Whole), "{}", what("a transfer was cut off"));
                assert!(got.len() == expected.len(), "{}", what("a clean end before all bytes had come"));
            }
            End::Reset { .. } => assert!(matches!(ended, Ended::Cut), "{}", what("a reset looked like a clean end")),
        }
    }

    /// Sends its part while it reads, and closes: without linger, that is the RST.
    async fn resets(
        &self,
        me: Side,
        rng: &mut StdRng,
        (mut input, mut output): (OwnedReadHalf, OwnedWriteHalf),
        got: &mut Vec<u8>,
        progress: &Progress,
    ) {
        let broken = Cell::new(false);
        tokio::select! {
            sent = send(&mut output, self.sent_by(me), rng) => sent.expect("nobody else resets"),
            _ended = receive(&mut input, got, &broken, progress) => panic!("nobody else ends this connection"),
        }
        // Dropped, the half would send a FIN first.
        output.forget();
    }
}

/// Bytes that have arrived, over all connections.
#[derive(Debug, Default)]
struct Progress {
    bytes: Cell<usize>,
    moved: Notify,
}

impl Progress {
    fn add(&self, bytes: usize) {
        self.bytes.set(self.bytes.get() + bytes);
        self.moved.notify_one();
    }

    async fn reaches(&self, bytes: usize) {
        while self.bytes.get() < bytes {
            self.moved.notified().await;
        }
    }
}

/// Writes in random pieces.
async fn send(output: &mut OwnedWriteHalf, mut bytes: &[u8], rng: &mut StdRng) -> io::Result<()> {
    while !bytes.is_empty() {
        let longest = if rng.random() { CHUNK_BYTES_MAX } else { 600 };
        let (head, tail) = bytes.split_at(rng.random_range(1..=longest).min(bytes.len()));
        output.write_all(head).await?;
        bytes = tail;
        if rng.random_range(0..4) == 0 {
            tokio::task::yield_now().await;
        }
    }
    Ok(())
}

/// How reading ended.
enum Ended {
    /// FIN.
    Whole,
    /// A reset, or an end after this side's own writing had failed: the kernel tells each error once.
    Cut,
}

async fn receive(
    input: &mut (impl AsyncRead + Unpin),
    got: &mut Vec<u8>,
    broken: &Cell<bool>,
    progress: &Progress,
) -> Ended {
    loop {
        match input.read_buf(got).await {
            Ok(0) if broken.get() => return Ended::Cut,
            Ok(0) => return Ended::Whole,
            Ok(bytes) => progress.add(bytes),
            Err(error) => {
                assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
                return Ended::Cut;
            }
        }
    }
}

#[tokio::test]
async fn bytes_arrive_whole_and_in_order_or_a_reset_says_that_they_do_not() {
    for seed in SEEDS.into_iter().chain((0..RANDOM_SEEDS).map(|_| rand::random())) {
        eprintln!("seed {seed}");
        tokio::time::timeout(DEADLINE, with_seed(seed)).await.expect("all connections end in time");
    }
}

async fn with_seed(seed: u64) {
    let mut rng = StdRng::seed_from_u64(seed);
    let mesh = Mesh::start().await;
    let nat = Nat::to(mesh.b.addr, TROUBLE, StdRng::seed_from_u64(rng.random())).await;
    mesh.a.publish(&[mesh.upstream], &[("b", nat.addr(), "web-1")]);
    let plans: Vec<_> = (0..CONNECTIONS).map(|_| Plan::new(&mut rng)).collect();
    let progress = Progress::default();
    let test = async {
        let mut pairs = Vec::new();
        // One after the other: whose is whose.
        for _ in &plans {
            pairs.push(mesh.connect().await);
        }
        let planned: usize = plans.iter().map(|plan| plan.sent_by(Side::Client).len()).sum();
        let migrations = Cell::new(0);
        let migrate = async {
            // Spread over the first half; a reset may keep the last from its turn.
            for turn in 0..MIGRATIONS {
                progress.reaches(1 + planned / 2 * turn / MIGRATIONS).await;
                nat.migrate().await;
                migrations.set(turn + 1);
            }
            std::future::pending::<()>().await;
        };
        tokio::select! {
            () = migrate => {}
            _all = join_all(plans.iter().zip(pairs).map(|(plan, pair)| plan.run(pair, &progress))) => {}
        }
        assert!(migrations.get() > 0, "nothing was transferred");
        // The tunnels lived through it: none was dialled again.
        let tunnels = mesh.a.count("weft_quic_handshakes_total", &["dialer"]);
        assert!(tunnels <= 2, "{tunnels} tunnels were dialled for two workers");
        mesh.stop().await;
    };
    tokio::select! {
        () = nat.run() => {}
        () = test => {}
    }
}
