//! What a worker would do with a call, and what it holds for it: asked by `weft why`, never by a request.

use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};

use super::listener::known_protocol;
use super::open::OpenTunnel;
use super::worker::Worker;
use crate::clock;
use crate::model::{InstanceId, NodeName, Protocol, ServiceName};
use crate::routing::{Ask, Flow, GroupView, NoInstance};
use crate::traffic::{Resolved, Target};

/// Questions that wait for one worker.
const QUESTIONS_MAX: usize = 4;
/// A worker that is too busy to answer within this time is left out.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(1);

/// Who would call whom.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    /// The calling service; none: the node itself.
    pub source: Option<ServiceName>,
    /// The service that is named.
    pub destination: ServiceName,
    /// Where config entries lead a call to it.
    pub to: Arc<Resolved>,
}

/// One worker's view of a call.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct WorkerView {
    /// Which worker.
    pub worker: usize,
    /// The target that it would call: the first, or where that has nobody, one of those that stand in for it.
    pub target: String,
    /// Whom its next call goes to.
    pub next: Option<(NodeName, InstanceId)>,
    /// Why it goes to nobody.
    pub why_none: String,
    /// Instances that it could not connect lately, and leaves out while there are others.
    pub backing_off: Vec<(NodeName, InstanceId)>,
    /// What it knows of the instances.
    pub group: GroupView,
    /// The tunnels that it holds for such calls.
    pub tunnels: Vec<OpenTunnel>,
}

/// A question on its way.
pub(super) type Asked = (Question, oneshot::Sender<WorkerView>);

/// Asks the workers. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Inspector(pub(super) Vec<mpsc::Sender<Asked>>);

/// Makes the two ends of one worker's queue.
pub(super) fn queue() -> (mpsc::Sender<Asked>, mpsc::Receiver<Asked>) {
    mpsc::channel(QUESTIONS_MAX)
}

impl Inspector {
    /// Asks every worker; who does not answer in time is left out.
    ///
    /// # Cancel safety
    /// Cancelling forgets the answers.
    pub async fn ask(&self, question: &Question) -> Vec<WorkerView> {
        let mut answers = Vec::new();
        for worker in &self.0 {
            let (reply, answer) = oneshot::channel();
            if worker.try_send((question.clone(), reply)).is_ok() {
                answers.push(answer);
            }
        }
        let mut views = Vec::new();
        for answer in answers {
            views.extend(tokio::time::timeout(ANSWER_TIME_MAX, answer).await.ok().and_then(Result::ok));
        }
        views
    }
}

/// Answers questions until the worker ends.
pub(super) async fn run(worker: &Rc<Worker>, mut questions: mpsc::Receiver<Asked>) {
    while let Some((question, reply)) = questions.recv().await {
        let _unwanted = reply.send(answer(worker, &question));
    }
    worker.closes().await;
}

/// Looks where a call would: at the next target where one has nobody that could take it.
fn answer(worker: &Worker, question: &Question) -> WorkerView {
    let to = &question.to;
    let (first, is_over) = look(worker, question, &to.target);
    if first.next.is_some() || is_over {
        return first;
    }
    let mut others = to.failover.iter().map(|target| look(worker, question, target));
    others.find(|(view, is_over)| view.next.is_some() || *is_over).map_or(first, |(view, _)| view)
}

/// Looks at one target; true: it has as much under way as it bears, which leads to no other.
fn look(worker: &Worker, question: &Question, target: &Arc<Target>) -> (WorkerView, bool) {
    let mut view = WorkerView { worker: worker.index, target: target.id.clone(), ..WorkerView::default() };
    let snapshot = worker.snapshot().load();
    let Ok(service) = worker.instances(target) else {
        view.why_none = snapshot.why_unknown(target.service.as_str());
        return (view, false);
    };
    let now = clock::now();
    let (source, destination) = (question.source.as_ref(), &target.service);
    // How a call is carried is decided where it begins, by the service that it names, and where that says nothing, by where
    // the name leads.
    let is_request = known_protocol(&snapshot, &question.destination).is_some_and(Protocol::is_http);
    let flow = if is_request { Flow::Request } else { Flow::Connection };
    let ask = Ask { snapshot: &snapshot, source, destination, service: &service, flow, now };
    view.group = worker.group(&ask);
    let mut is_over = false;
    match worker.next(&ask) {
        Ok(instance) => view.next = Some((instance.node.info.name.clone(), instance.record.id.clone())),
        Err(why) => {
            is_over = matches!(why, NoInstance::Overflow { .. });
            view.why_none = why.to_string();
        }
    }
    let left_out = service.instances.iter().filter(|instance| worker.is_avoided(instance, now));
    view.backing_off = left_out.map(|instance| (instance.node.info.name.clone(), instance.record.id.clone())).collect();
    let nodes: Vec<&NodeName> = service.instances.iter().map(|instance| &instance.node.info.name).collect();
    view.tunnels = worker.tunnels().open(source, &nodes);
    // Looking may end an interval, and so eject: the log and the metrics say it with the answer, not at the next request.
    worker.tell_notices();
    (view, is_over)
}
