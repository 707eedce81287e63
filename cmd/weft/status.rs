//! What systemd shows of an agent: readiness, and the state of its membership as `STATUS=` (`systemctl status weft`; sd_notify(3)).

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use sd_notify::NotifyState;
use tokio::sync::watch;
use tracing::warn;
use weft::config::{Config, IdentitySource};
use weft::gossip::Members;
use weft::model::MemberStatus;
use weft::telemetry::Chain;

/// Changes that come within this time are told as one.
const PAUSE: Duration = Duration::from_secs(1);
/// Most seeds that are named.
const SEEDS_SHOWN: usize = 3;

/// Tells systemd; without it this does nothing.
pub(crate) fn notify(states: &[NotifyState<'_>]) {
    if let Err(err) = sd_notify::notify(states) {
        warn!(error = %Chain(&err), "could not tell systemd");
    }
}

/// Says what an agent does until it is up. A newcomer may wait for an issuer, for as long as it takes.
pub(crate) fn of_start(config: &Config) -> String {
    if !matches!(config.identity, IdentitySource::Token(_)) {
        return "starting".to_owned();
    }
    let shown: Vec<&str> = config.join.iter().take(SEEDS_SHOWN).map(String::as_str).collect();
    let more = if config.join.len() > SEEDS_SHOWN { ", …" } else { "" };
    format!("waiting for a certificate: joining {}{more}", shown.join(", "))
}

/// Says how the membership is.
pub(crate) fn of(members: &Members) -> String {
    let count = |status| members.members.iter().filter(|member| member.status == status).count();
    let (alive, failed) = (count(MemberStatus::Alive), count(MemberStatus::Failed));
    let state = match (members.isolated, alive) {
        (true, _) => "isolated: nobody else answers".to_owned(),
        (false, 1) => "1 member alive".to_owned(),
        (false, alive) => format!("{alive} members alive"),
    };
    if failed == 0 { state } else { format!("{state}, {failed} failed") }
}

/// Tells systemd of each change of the members since `told`.
///
/// # Cancel safety
/// Cancelling loses nothing but what would have been told.
pub(crate) async fn follow(mut members: watch::Receiver<Arc<Members>>, mut told: String) -> Infallible {
    // Without systemd nobody is woken for it.
    if std::env::var_os("NOTIFY_SOCKET").is_none() {
        return std::future::pending().await;
    }
    loop {
        let status = of(&members.borrow_and_update());
        if status != told {
            told.clone_from(&status);
            // Systemd may be slow to read, and this thread is gossip's.
            let sent = tokio::task::spawn_blocking(move || notify(&[NotifyState::Status(&status)])).await;
            if let Err(err) = sent {
                warn!(error = %Chain(&err), "could not tell systemd");
            }
            tokio::time::sleep(PAUSE).await;
        }
        if members.changed().await.is_err() {
            return std::future::pending().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use weft::clock;
    use weft::gossip::MemberView;
    use weft::model::Generation;

    use super::*;

    #[test]
    fn the_membership_is_a_line() {
        #[track_caller]
        fn check(statuses: &[MemberStatus], isolated: bool, want: &str) {
            let member = |status: &MemberStatus| MemberView {
                name: "n1".parse().unwrap(),
                addr: "10.0.0.1:8301".parse().unwrap(),
                status: *status,
                generation: Generation { number: 1, nonce: 1 },
                since: clock::now(),
                forgotten_at: None,
                info: None,
            };
            let members = statuses.iter().map(member).collect();
            assert_eq!(of(&Members { members, isolated, ..Members::default() }), want);
        }
        let (alive, failed) = (MemberStatus::Alive, MemberStatus::Failed);
        check(&[alive], false, "1 member alive");
        check(&[alive, alive, MemberStatus::Left], false, "2 members alive");
        check(&[alive, alive, failed], false, "2 members alive, 1 failed");
        check(&[alive, failed], true, "isolated: nobody else answers, 1 failed");
        check(&[alive], true, "isolated: nobody else answers");
    }
}
