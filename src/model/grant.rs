//! What an operator may sign: rights, each narrowed to names.

use std::fmt;
use std::str::FromStr;

use super::name::NameError;
use super::scope::NamePattern;

/// Most grants of one operator: they must fit its certificate.
pub const GRANTS_MAX: usize = 32;

/// A kind of thing that an operator signs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Right {
    /// Join tokens.
    Tokens,
    /// Revocations.
    Revocations,
    /// Intentions; the name is that of the destination.
    Intentions,
    /// Config entries; the name is the entry's.
    Config,
}

impl Right {
    const ALL: [Self; 4] = [Self::Tokens, Self::Revocations, Self::Intentions, Self::Config];

    /// The word that a grant is written with.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Tokens => "tokens",
            Self::Revocations => "revocations",
            Self::Intentions => "intentions",
            Self::Config => "config",
        }
    }
}

impl fmt::Display for Right {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Why a text is no operator's scope.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GrantError {
    /// No such right.
    #[error("operator right `{0}` is unknown; there are `tokens`, `revocations`, `intentions`, `config` and `*`")]
    Unknown(String),
    /// A right that names narrow to nothing that could be checked.
    #[error("operator right `{0}` takes no name: write `{0}` alone")]
    Unnamed(&'static str),
    /// The pattern is malformed.
    #[error("operator right `{text}` has a malformed name pattern")]
    Pattern {
        /// The grant.
        text: String,
        /// What is wrong.
        #[source]
        source: NameError,
    },
    /// More grants than allowed.
    #[error("operator has {found} rights; at most {GRANTS_MAX} are allowed")]
    TooMany {
        /// Their number.
        found: usize,
    },
    /// None at all.
    #[error("an operator without rights signs nothing: give some, as intentions,config:web*")]
    Empty,
}

/// One right; none: all of them.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Grant {
    right: Option<Right>,
    /// None: all names.
    names: Option<NamePattern>,
}

impl FromStr for Grant {
    type Err = GrantError;

    fn from_str(text: &str) -> Result<Self, GrantError> {
        let (word, names) = text.split_once(':').map_or((text, None), |(word, names)| (word, Some(names)));
        let right = Right::ALL.into_iter().find(|right| right.as_str() == word);
        if right.is_none() && word != "*" {
            return Err(GrantError::Unknown(word.to_owned()));
        }
        if names.is_some() && right == Some(Right::Tokens) {
            return Err(GrantError::Unnamed("tokens"));
        }
        if names.is_some() && right.is_none() {
            return Err(GrantError::Unnamed("*"));
        }
        let parsed = names.map(str::parse).transpose();
        let names = parsed.map_err(|source| GrantError::Pattern { text: text.to_owned(), source })?;
        Ok(Self { right, names })
    }
}

impl fmt::Display for Grant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.right.map_or("*", Right::as_str))?;
        self.names.as_ref().map_or(Ok(()), |names| write!(f, ":{names}"))
    }
}

/// What an operator may sign: a union of rights, `intentions,config:web*`; `*` is everything that operators may.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OperatorScope(Vec<Grant>);

impl OperatorScope {
    /// Everything that operators may.
    pub fn all() -> Self {
        Self(vec![Grant { right: None, names: None }])
    }

    /// Tells whether it covers `right` over `name`.
    ///
    /// A name that is a wildcard itself (`*`) is covered by a pattern that matches the star as a character: what such a
    /// pattern leaves out, the wildcard would reach.
    pub fn allows(&self, right: Right, name: &str) -> bool {
        let covers = |grant: &Grant| {
            grant.right.is_none_or(|own| own == right) && grant.names.as_ref().is_none_or(|names| names.matches(name))
        };
        self.0.iter().any(covers)
    }
}

impl FromStr for OperatorScope {
    type Err = GrantError;

    fn from_str(text: &str) -> Result<Self, GrantError> {
        let parts = || text.split(',').map(str::trim).filter(|part| !part.is_empty());
        match parts().count() {
            0 => Err(GrantError::Empty),
            found if found > GRANTS_MAX => Err(GrantError::TooMany { found }),
            _ => parts().map(str::parse).collect::<Result<Vec<Grant>, _>>().map(Self),
        }
    }
}

impl fmt::Display for OperatorScope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, grant) in self.0.iter().enumerate() {
            let comma = if at == 0 { "" } else { "," };
            write!(f, "{comma}{grant}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scope_covers_its_rights_over_its_names_and_nothing_else() {
        #[track_caller]
        fn check(scope: &str, right: Right, name: &str, want: bool) {
            assert_eq!(scope.parse::<OperatorScope>().unwrap().allows(right, name), want, "{scope} {right} {name}");
        }
        check("intentions", Right::Intentions, "db", true);
        check("intentions", Right::Intentions, "*", true);
        check("intentions", Right::Config, "db", false);
        check("intentions:web*,config", Right::Intentions, "web-2", true);
        check("intentions:web*,config", Right::Intentions, "db", false);
        check("intentions:web*,config", Right::Intentions, "*", false);
        check("intentions:web*,config", Right::Config, "db", true);
        check("intentions:web*", Right::Tokens, "", false);
        check("*", Right::Revocations, "node.a", true);
        check(" tokens , intentions:a ", Right::Tokens, "", true);
        assert!(OperatorScope::all().allows(Right::Tokens, ""));
    }

    #[test]
    fn what_is_no_scope_is_refused_with_the_remedy() {
        #[track_caller]
        fn check(text: &str, part: &str) {
            let error = text.parse::<OperatorScope>().unwrap_err().to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
        check("", "signs nothing");
        check("intention", "`intentions`");
        check("tokens:web", "takes no name");
        check("*:web", "takes no name");
        check("config:", "malformed");
        check(&["config"; GRANTS_MAX + 1].join(","), "at most 32");
        for text in ["*", "intentions,config:web*"] {
            assert_eq!(text.parse::<OperatorScope>().unwrap().to_string(), text);
        }
    }
}
