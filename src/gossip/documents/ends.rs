//! Policy that ends soon, told in the log and counted: each key once per step, however many documents it signed.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::DocumentView;
use crate::clock::UnixSeconds;
use crate::policy::Notice;

/// What one key signed, as far as it ends soon.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Ending {
    /// Hash of the key.
    pub(super) key: String,
    /// Whose it is.
    pub(super) signer: String,
    /// The first end.
    pub(super) ends: UnixSeconds,
    /// How near that is.
    pub(super) notice: Notice,
    /// How many documents end so soon.
    pub(super) documents: usize,
}

/// Remembers what was told.
#[derive(Debug, Default)]
pub(super) struct Ends {
    told: BTreeMap<String, Notice>,
}

impl Ends {
    /// Returns the first end of all policy that says something, what ends soon by key, and which of it is news.
    pub(super) fn look(
        &mut self,
        views: &[Arc<DocumentView>],
        now: UnixSeconds,
    ) -> (Option<UnixSeconds>, Vec<Ending>, Vec<Ending>) {
        let policy = || views.iter().filter(|view| view.says_policy());
        let first = policy().map(|view| view.not_after).min();
        let mut endings: BTreeMap<&str, Ending> = BTreeMap::new();
        for view in policy() {
            let notice = view.notice(now);
            if notice == Notice::Far {
                continue;
            }
            let ending = endings.entry(&view.signer_key).or_insert_with(|| Ending {
                key: view.signer_key.clone(),
                signer: view.signer.clone(),
                ends: view.not_after,
                notice,
                documents: 0,
            });
            ending.documents += 1;
            ending.ends = ending.ends.min(view.not_after);
            ending.notice = ending.notice.max(notice);
        }
        let endings: Vec<Ending> = endings.into_values().collect();
        let is_news = |ending: &&Ending| self.told.get(&ending.key).is_none_or(|told| *told < ending.notice);
        let news = endings.iter().filter(is_news).cloned().collect();
        // What is signed anew, or gone, may be told again.
        self.told = endings.iter().map(|ending| (ending.key.clone(), ending.notice)).collect();
        (first, endings, news)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::DocumentBody;
    use super::*;
    use crate::authz::{Action, Intention};
    use crate::policy::{DocumentDigest, DocumentId, DocumentKind};

    const DAY: Duration = Duration::from_hours(24);
    const END: UnixSeconds = UnixSeconds(2_000_000_000);

    fn view(key: &str, source: &str, ends: UnixSeconds, says: bool) -> Arc<DocumentView> {
        let intention = Intention::plain(source.parse().unwrap(), "db".parse().unwrap(), Action::Deny);
        let id = DocumentId { kind: DocumentKind::Intention, name: intention.name().parse().unwrap() };
        Arc::new(DocumentView {
            digest: DocumentDigest { id, version: 1, hash: 1 },
            signer: "alice".to_owned(),
            signer_key: key.to_owned(),
            signer_begins: END.minus(365 * DAY),
            not_before: END.minus(20 * DAY),
            not_after: ends,
            says: Vec::new(),
            reason: String::new(),
            is_forked: false,
            body: DocumentBody::Intention(says.then_some(intention)),
            bytes: Vec::new(),
        })
    }

    #[test]
    fn each_key_is_told_once_per_step_and_deletions_are_no_loss() {
        let later = END.plus(100 * DAY);
        let views = [
            view("k1", "a", END, true),
            view("k1", "b", END.plus(DAY), true),
            view("k1", "c", END.minus(DAY), false),
            view("k2", "d", later, true),
        ];
        let mut ends = Ends::default();
        let far = ends.look(&views, END.minus(30 * DAY));
        assert_eq!(far, (Some(END), Vec::new(), Vec::new()));
        let (_, endings, news) = ends.look(&views, END.minus(13 * DAY));
        assert_eq!((endings.len(), endings[0].documents, endings[0].ends), (1, 2, END));
        assert_eq!((news[0].signer.as_str(), news[0].notice), ("alice", Notice::Soon));
        let (_, endings, news) = ends.look(&views, END.minus(12 * DAY));
        assert_eq!((endings.len(), news.len()), (1, 0), "told once");
        let (_, _, news) = ends.look(&views, END.minus(2 * DAY));
        assert_eq!(news[0].notice, Notice::Near);
        // Signed anew: quiet, and told again when that comes to its end.
        assert_eq!(ends.look(&views[3..], END).1, []);
        assert_eq!(ends.look(&views[..1], END.minus(2 * DAY)).2.len(), 1);
        assert_eq!(ends.look(&[], END), (None, Vec::new(), Vec::new()));
    }
}
