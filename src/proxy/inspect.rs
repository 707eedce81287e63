//! What a worker would do with a call, and what it holds for it: asked by `weft why`, never by a request.

use std::rc::Rc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};

use super::open::OpenTunnel;
use super::worker::Worker;
use crate::clock;
use crate::model::{InstanceId, NodeName, ServiceName};
use crate::routing::{Ask, Flow, GroupView};

/// Questions that wait for one worker.
const QUESTIONS_MAX: usize = 4;
/// A worker that is too busy to answer within this time is left out.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(1);

/// Who would call whom.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    /// The calling service; none: the node itself.
    pub source: Option<ServiceName>,
    /// The called service.
    pub destination: ServiceName,
}

/// One worker's view of a call.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct WorkerView {
    /// Which worker.
    pub worker: usize,
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

fn answer(worker: &Worker, question: &Question) -> WorkerView {
    let mut view = WorkerView { worker: worker.index, ..WorkerView::default() };
    let snapshot = worker.snapshot().load();
    match snapshot.services.get(&question.destination) {
        None => view.why_none = snapshot.why_unknown(question.destination.as_str()),
        Some(service) => {
            let now = clock::now();
            let source = question.source.as_ref();
            let flow = if service.protocol.is_http() { Flow::Request } else { Flow::Connection };
            let ask = Ask { snapshot: &snapshot, source, destination: &service.name, service, flow, now };
            view.group = worker.group(&ask);
            match worker.next(&ask) {
                Ok(instance) => view.next = Some((instance.node.info.name.clone(), instance.record.id.clone())),
                Err(why) => view.why_none = why.to_string(),
            }
            let left_out = service.instances.iter().filter(|instance| worker.is_avoided(instance, now));
            view.backing_off =
                left_out.map(|instance| (instance.node.info.name.clone(), instance.record.id.clone())).collect();
            let nodes: Vec<&NodeName> = service.instances.iter().map(|instance| &instance.node.info.name).collect();
            view.tunnels = worker.tunnels().open(question.source.as_ref(), &nodes);
        }
    }
    view
}
