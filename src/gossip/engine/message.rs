//! What two agents say on a stream, and what each side waits for.
//!
//! ```text
//!   Hello(id)            -> Welcome{id, members, goodbyes} | Refused | Outdated
//!   Pull(digests)        -> deltas
//!   Goodbye(leave)       -> noted
//!   RoundTrips           -> what the peer measured, by node (the carrier's business, as Documents are)
//!   Sync(hash, goodbyes) -> Same | Buckets(hashes)
//!        Digests of the differing buckets -> deltas that the beginner lacks, digests of what it has newer
//!        deltas ->
//! ```
//!
//! The carrier (a QUIC stream, the simulator) keeps the [`Stage`] between two messages; the engine keeps nothing per
//! exchange, so there is nothing to bound but their number.
//!
//! Not here: what an answer says (`engine::answer`), time limits and streams (`gossip::exchange`).

use serde::{Deserialize, Serialize};

use crate::membership::{Leave, Life, MemberEntry, MeshId};
use crate::model::NodeName;
use crate::replica::{Delta, Digest};
use crate::wire::{self, FRAME_BYTES_MAX, WireError};

/// Most bytes of deltas in one frame; room is left for the other fields.
pub const DELTAS_BYTES_MAX: usize = FRAME_BYTES_MAX - 64 * 1024;
/// Most digests in one frame: 4096 with the longest names fill it by less than its bound.
pub const DIGESTS_MAX: usize = 2048;
/// Most members in a welcome, each at most 110 bytes long.
pub const WELCOME_MEMBERS_MAX: usize = 1500;

/// The first frame of a stream.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Request {
    /// Asks to be let in.
    Hello(MeshId),
    /// Asks for what the peer has newer than these.
    Pull(Vec<Digest>),
    /// Says goodbye and asks to be told that it was heard.
    Goodbye(Leave),
    /// Compares two replicas.
    Sync {
        /// Over everything that the beginner holds.
        set_hash: u64,
        /// Goodbyes that the peer may have missed.
        farewells: Vec<Leave>,
    },
    /// Says something about signed documents; the carrier hands it to `gossip::documents`.
    Documents(Vec<u8>),
    /// Says something about shared maps; the carrier hands it to `gossip::shared`.
    Shared(Vec<u8>),
    /// Asks for the round trips that the peer measures; the carrier answers, which owns the connections.
    RoundTrips,
}

/// The answer to a hello.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum HelloReply {
    /// Come in.
    Welcome {
        /// Who answers.
        id: MeshId,
        /// Members that it knows, at most [`WELCOME_MEMBERS_MAX`].
        members: Vec<MemberEntry>,
        /// Goodbyes that it remembers.
        farewells: Vec<Leave>,
    },
    /// Stay out, with the reason.
    Refused(String),
    /// The name is free and a later life of it is remembered: come again with a greater one.
    Outdated(Life),
}

/// The answer to the opening of a sync.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum SyncReply {
    /// Nothing differs.
    Same,
    /// What each bucket holds.
    Buckets(Vec<u64>),
}

/// The differing buckets and what one side holds in them.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Held {
    /// Which buckets.
    pub buckets: Vec<u8>,
    /// What is held in them.
    pub digests: Vec<Digest>,
}

/// What one side sends of its own and asks of the other.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Trade {
    /// What the other lacks.
    pub deltas: Vec<Delta>,
    /// What to ask the other with.
    pub wanted: Vec<Digest>,
}

/// One message of an exchange; on the wire each is its content alone, since the [`Stage`] says which comes.
#[derive(Debug, Clone)]
pub enum Message {
    /// The first.
    Request(Request),
    /// Answers a hello.
    Hello(HelloReply),
    /// Answers the opening of a sync.
    Sync(SyncReply),
    /// What the beginner of a sync holds.
    Held(Held),
    /// What the other side gives and wants.
    Trade(Trade),
    /// Answers a pull, or ends a sync.
    Deltas(Vec<Delta>),
    /// Answers a goodbye.
    Noted,
    /// No message: the other side has ended the stream.
    End,
}

impl Message {
    /// Encodes the message as one frame's content; [`Message::End`] is empty.
    ///
    /// # Errors
    /// [`WireError::TooLarge`] past 256 KiB.
    pub fn encode(&self) -> Result<Vec<u8>, WireError> {
        match self {
            Self::Request(request) => wire::encode(request),
            Self::Hello(reply) => wire::encode(reply),
            Self::Sync(reply) => wire::encode(reply),
            Self::Held(held) => wire::encode(held),
            Self::Trade(trade) => wire::encode(trade),
            Self::Deltas(deltas) => wire::encode(deltas),
            Self::Noted => wire::encode(&true),
            Self::End => Ok(Vec::new()),
        }
    }
}

/// What one side of an exchange waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Answers: waits for the request.
    Asked,
    /// Answers a sync: waits for what the beginner holds.
    Comparing,
    /// Answers a sync: waits for the deltas that it asked for.
    Taking,
    /// Began: waits for the answer to its hello.
    Greeting,
    /// Began: waits for the deltas that it pulls.
    Pulling,
    /// Began: waits until its goodbye is noted.
    Leaving,
    /// Began a sync: waits for the first answer.
    Opening {
        /// Further rounds after this one.
        rounds_left: usize,
    },
    /// Began a sync: waits for deltas and wishes.
    Trading {
        /// Further rounds after this one.
        rounds_left: usize,
    },
    /// Began a sync and gave what was wanted: waits until the other side has taken it and ends the stream.
    Ending {
        /// Further rounds after this one.
        rounds_left: usize,
    },
}

impl Stage {
    /// Tells whether the end of the stream is awaited: this side ends its own half then.
    pub fn awaits_end(self) -> bool {
        matches!(self, Self::Ending { .. })
    }

    /// Decodes the message that is awaited.
    ///
    /// # Errors
    /// If `frame` holds anything else; whatever comes where the end is awaited is refused.
    pub fn decode(self, frame: &[u8]) -> Result<Message, WireError> {
        match self {
            Self::Asked => wire::decode(frame, FRAME_BYTES_MAX).map(Message::Request),
            Self::Comparing => wire::decode(frame, FRAME_BYTES_MAX).map(Message::Held),
            Self::Taking | Self::Pulling => wire::decode(frame, FRAME_BYTES_MAX).map(Message::Deltas),
            Self::Greeting => wire::decode(frame, FRAME_BYTES_MAX).map(Message::Hello),
            Self::Leaving => wire::decode::<bool>(frame, FRAME_BYTES_MAX).map(|_noted| Message::Noted),
            Self::Opening { .. } => wire::decode(frame, FRAME_BYTES_MAX).map(Message::Sync),
            Self::Trading { .. } => wire::decode(frame, FRAME_BYTES_MAX).map(Message::Trade),
            Self::Ending { .. } => Err(WireError::Trailing { bytes: frame.len() }),
        }
    }
}

/// What a side does after a message.
#[derive(Debug, Clone)]
pub enum Step {
    /// Says this and waits for what the stage names.
    Say(Message, Stage),
    /// This stream is done; says this on a new one and waits.
    Again(Message, Stage),
    /// Says this and ends the stream.
    Last(Message),
    /// Ends the stream.
    Done,
}

/// Names an exchange that an engine began, so that its end can be told.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Exchange {
    /// A comparison with this peer.
    Sync(NodeName),
    /// A pull of states from this peer.
    Pull(NodeName),
    /// A goodbye to this peer.
    Goodbye(NodeName),
}

impl Exchange {
    /// Returns the label of the metric.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Sync(_) => "sync",
            Self::Pull(_) => "pull",
            Self::Goodbye(_) => "goodbye",
        }
    }
}

/// How an exchange ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// It was carried through.
    Complete,
    /// It broke off.
    Failed,
    /// It never began: there is no connection to the peer.
    NoLink,
}
