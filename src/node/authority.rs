//! The operator's key that signs policy for clients of the API: loaded at the start, watched for its end.

use std::sync::Arc;
use std::time::Duration;

use prometheus::Gauge;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use super::{NodeError, part};
use crate::clock::{self, UnixSeconds};
use crate::config::{Config, PolicyAuthority};
use crate::metrics::Metrics;
use crate::pki::{DocumentKey, Identity, Utc};
use crate::policy::{Notice, notice};

/// How often its end is looked at.
const LOOK: Duration = Duration::from_mins(1);

/// Loads the key, if there is to be one.
pub(super) fn load(
    config: &Config,
    dev: Option<Arc<DocumentKey>>,
    identity: &Identity,
) -> Result<Option<Arc<DocumentKey>>, NodeError> {
    let path = match &config.policy_authority {
        PolicyAuthority::None => return Ok(None),
        PolicyAuthority::Dev => return Ok(dev),
        PolicyAuthority::File(path) => path,
    };
    let key = DocumentKey::load_operator(path).map_err(part("policy authority"))?;
    let (ours, theirs) =
        (&identity.bundle().trust_domain, key.bundle().map_err(part("policy authority"))?.trust_domain);
    if *ours != theirs {
        let text = format!("{} is an operator of trust domain `{theirs}`, this mesh is `{ours}`", path.display());
        return Err(NodeError::Part { part: "policy authority", source: text.into() });
    }
    let (signer, may) = key.may(clock::wall()).map_err(part("policy authority"))?;
    info!(?signer, %may, "this agent signs policy for clients of its API that show the admin token");
    Ok(Some(Arc::new(key)))
}

/// Days until its certificate ends; -1 where there is none.
pub(super) fn gauge(metrics: &Metrics) -> Result<Gauge, prometheus::Error> {
    let help = "Days until the certificate of this agent's policy_authority ends; -1 where it has none.";
    let gauge = metrics.add(Gauge::new("weft_policy_authority_end_days", help)?)?;
    gauge.set(-1.0);
    Ok(gauge)
}

/// Counts down and tells each step once, until `stop`.
pub(super) async fn watch(key: Arc<DocumentKey>, gauge: Gauge, stop: CancellationToken) {
    let Ok((begins, ends)) = key.validity() else { return };
    let mut told = Notice::Far;
    loop {
        let now = clock::wall();
        gauge.set(days(ends, now));
        let found = notice(begins, ends, now);
        if found > told {
            told = found;
            tell(found, ends);
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(LOOK) => {}
        }
    }
}

fn tell(found: Notice, ends: UnixSeconds) {
    let ends = Utc(ends);
    if found == Notice::Ended {
        error!(%ends, "the certificate of policy_authority has ended: this agent signs nothing more, and what it signed has ended");
    } else {
        warn!(
            %ends,
            "the certificate of policy_authority ends soon, and all that it signed with it: certify it again (`weft ca operator \
             renew`, `adopt`), restart this agent, and sign what it signed anew (`weft export`, `weft import -sign`)"
        );
    }
}

#[expect(clippy::cast_precision_loss, reason = "seconds until a certificate ends are far below 2^52")]
fn days(ends: UnixSeconds, now: UnixSeconds) -> f64 {
    ends.since(now).as_secs() as f64 / 86_400.0
}
