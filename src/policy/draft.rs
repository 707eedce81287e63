//! What an operator is about to sign: the next version of an intention or a config entry.

use super::document::{Content, Document, DocumentError, DocumentId, DocumentKind};
use super::written::{ConfigBody, IntentionBody, check_written};
use crate::authz::{CompileError, Guard, Intention, Origin, Party};
use crate::clock::UnixSeconds;
use crate::model::{NodeName, OperatorScope, Right};
use crate::pki::{DocumentKey, DocumentSigner, PkiError, SpkiHash, Utc};

/// Why nothing is signed.
#[derive(Debug, thiserror::Error)]
pub enum DraftError {
    /// It cannot be written.
    #[error(transparent)]
    Document(#[from] DocumentError),
    /// Every node would quarantine it.
    #[error("no node could use the intention: {0}")]
    Compile(#[from] CompileError),
    /// The operator may not.
    #[error("operator `{operator}` may sign `{may}`, not {right} of `{name}`: use the file of an operator who may")]
    NotAllowed {
        /// Who would sign.
        operator: NodeName,
        /// What it may sign.
        may: OperatorScope,
        /// What it would need.
        right: Right,
        /// Over which name.
        name: String,
    },
    /// A deletion would be forgotten before what it deletes.
    #[error(
        "the deletion would end at {} with the signer's certificate, and what it deletes at {}: a node that was off could \
         bring that back; sign with an operator whose certificate lasts longer",
        Utc(*.ends), Utc(*.held_ends)
    )]
    EndsEarly {
        /// The deletion's end.
        ends: UnixSeconds,
        /// The end of what is held.
        held_ends: UnixSeconds,
    },
    /// The key cannot be used.
    #[error("cannot use the operator's key")]
    Key(#[from] PkiError),
}

/// Something to sign.
#[derive(Debug, Clone)]
pub struct Draft {
    id: DocumentId,
    body: Vec<u8>,
    right: Right,
    name: String,
    is_deletion: bool,
}

impl Draft {
    /// An intention, which is compiled to see whether it can be used.
    ///
    /// # Errors
    /// [`DraftError::Compile`], [`DraftError::Document`].
    pub fn intention(intention: Intention) -> Result<Self, DraftError> {
        Guard::compile(intention.clone(), Origin::default())?;
        intention.check().map_err(DocumentError::Intention)?;
        let (source, destination) = (intention.source.clone(), intention.destination.clone());
        Self::of_intention(&source, &destination, Some(intention))
    }

    /// The end of an intention.
    ///
    /// # Errors
    /// [`DraftError::Document`].
    pub fn no_intention(source: &Party, destination: &Party) -> Result<Self, DraftError> {
        Self::of_intention(source, destination, None)
    }

    fn of_intention(source: &Party, destination: &Party, says: Option<Intention>) -> Result<Self, DraftError> {
        let id = DocumentId { kind: DocumentKind::Intention, name: format!("{source}:{destination}").parse()? };
        let is_deletion = says.is_none();
        let (body, name) = (IntentionBody(says).to_bytes()?, destination.to_string());
        Ok(Self { id, body, right: Right::Intentions, name, is_deletion })
    }

    /// A config entry in JSON.
    ///
    /// # Errors
    /// [`DraftError::Document`] saying what it must be like.
    pub fn entry(text: String) -> Result<Self, DraftError> {
        let (kind, name) = check_written(&text)?;
        Self::of_entry(&kind, &name, Some(text))
    }

    /// The end of a config entry.
    ///
    /// # Errors
    /// [`DraftError::Document`].
    pub fn no_entry(kind: &str, name: &str) -> Result<Self, DraftError> {
        Self::of_entry(kind, name, None)
    }

    fn of_entry(kind: &str, name: &str, says: Option<String>) -> Result<Self, DraftError> {
        let id = DocumentId { kind: DocumentKind::Config, name: format!("{kind}:{name}").parse()? };
        let is_deletion = says.is_none();
        Ok(Self { id, body: ConfigBody(says).to_bytes()?, right: Right::Config, name: name.to_owned(), is_deletion })
    }

    /// Which document it is a version of.
    pub fn id(&self) -> &DocumentId {
        &self.id
    }

    /// Signs it as `version`, from `now` until the signer's certificate ends; `held_ends` is the end of the version that
    /// it replaces.
    ///
    /// # Errors
    /// [`DraftError`]: the signer may not, or its certificate ends too early.
    pub fn sign(
        self,
        version: u64,
        held_ends: Option<UnixSeconds>,
        key: &DocumentKey,
        now: UnixSeconds,
    ) -> Result<Document, DraftError> {
        if let (DocumentSigner::Operator(operator), may) = key.may(now)?
            && !may.allows(self.right, &self.name)
        {
            return Err(DraftError::NotAllowed { operator, may, right: self.right, name: self.name });
        }
        let (_, ends) = key.validity()?;
        if let Some(held_ends) = held_ends.filter(|held_ends| self.is_deletion && *held_ends > ends) {
            return Err(DraftError::EndsEarly { ends, held_ends });
        }
        let content = Content {
            trust_domain: key.bundle()?.trust_domain,
            id: self.id,
            version,
            not_before: now,
            not_after: ends,
            signer: SpkiHash([0; 32]),
            body: self.body,
        };
        Ok(Document::sign(content, key)?)
    }
}
