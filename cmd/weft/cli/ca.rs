//! Verbs of the CA: root, issuers, operators, tokens.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::{ClientArgs, FormatArgs, SignArgs};

#[derive(Debug, Subcommand)]
pub(crate) enum CaVerb {
    /// Makes a root (keep its key offline), the first issuer and an operator key; never overwrites.
    ///
    /// With -root-cert the certificates lead to a root of your own: ECDSA P-256, self-signed, path length 2 or none. Its
    /// key is read where it lies and not copied. Without -root-key it stays offline: signing requests are made, and
    /// `weft ca check` says what is left to sign.
    #[command(
        after_help = "Examples:\n  weft ca init -dir ./ca -trust-domain prod.example\n  weft ca init -dir ./ca -trust-domain prod.example -root-cert corp.pem -root-key corp.key"
    )]
    Init {
        /// Directory to make.
        #[arg(long)]
        dir: PathBuf,
        /// Trust domain of all identities: lower-case letters, digits, `.`, `-`, `_`.
        #[arg(long)]
        trust_domain: String,
        /// PEM file of a root of your own.
        #[arg(long, value_name = "FILE")]
        root_cert: Option<PathBuf>,
        /// PEM file of its key.
        #[arg(long, value_name = "FILE", requires = "root_cert")]
        root_key: Option<PathBuf>,
    },
    /// Checks the certificates of a CA directory, and says what is not signed yet.
    #[command(after_help = "Example:\n  weft ca check -ca ./ca")]
    Check {
        /// Directory of `weft ca init`.
        #[arg(long)]
        ca: PathBuf,
    },
    /// Replaces the root, with nobody interrupted: the new one is signed by the old one and spread; nodes renew under it.
    #[command(
        after_help = "Examples:\n  weft ca rotate -ca ./ca -http-addr 10.0.0.1:8500\n  weft ca rotate -ca ./ca -root-cert corp.pem -root-key corp.key\n  weft ca rotate -ca ./ca -finish"
    )]
    Rotate {
        /// Directory of `weft ca init`.
        #[arg(long)]
        ca: PathBuf,
        /// Takes the old root back, once every node has renewed.
        #[arg(long)]
        finish: bool,
        /// With -finish: also while nodes publish under the old root. They must join again with a token.
        #[arg(long, requires = "finish")]
        force: bool,
        /// PEM file of a root of your own that shall follow.
        #[arg(long, value_name = "FILE", requires = "root_key", conflicts_with = "finish")]
        root_cert: Option<PathBuf>,
        /// PEM file of its key.
        #[arg(long, value_name = "FILE", requires = "root_cert")]
        root_key: Option<PathBuf>,
        #[command(flatten)]
        sign: SignArgs,
    },
    /// Makes, lists and revokes operators: who signs policy, and what.
    #[command(subcommand)]
    Operator(OperatorVerb),
    /// Makes issuers: two or more nodes should be able to certify newcomers.
    #[command(subcommand)]
    Issuer(IssuerVerb),
}

#[derive(Debug, Subcommand)]
pub(crate) enum OperatorVerb {
    /// Certifies an operator; its key goes into one file. Needs the root key.
    #[command(
        after_help = "Examples:\n  weft ca operator create -name alice -may 'intentions,config:web*' -ca ./ca -out alice.operator\n  weft ca operator create -name ci -may intentions:web* -ttl 720h -ca ./ca -out ci.operator"
    )]
    Create(OperatorCreateArgs),
    /// Lists the operators of a CA directory.
    #[command(after_help = "Example:\n  weft ca operator list -ca ./ca")]
    List(CaListArgs),
    /// Takes an operator back: all that it signed is void on every node. Needs the root key.
    #[command(after_help = "Example:\n  weft ca operator revoke alice -ca ./ca -reason 'laptop stolen'")]
    Revoke(OperatorRevokeArgs),
    /// Certifies an operator's key again, with the rights that it has. Needs the root key; the operator adopts what it makes.
    #[command(after_help = "Example:\n  weft ca operator renew alice -ca ./ca -ttl 8760h")]
    Renew(OperatorRenewArgs),
    /// Puts a renewed certificate into an operator's file, after `weft ca operator renew` or `weft ca rotate`.
    #[command(after_help = "Example:\n  weft ca operator adopt ca/operators/alice.crt -operator alice.operator")]
    Adopt(OperatorAdoptArgs),
}

#[derive(Debug, Args)]
pub(crate) struct OperatorRenewArgs {
    /// Its name.
    pub(crate) name: String,
    /// Directory of `weft ca init`.
    #[arg(long)]
    pub(crate) ca: PathBuf,
    /// How long it is certified from now on.
    #[arg(long, default_value = "8760h")]
    pub(crate) ttl: String,
}

#[derive(Debug, Args)]
pub(crate) struct OperatorAdoptArgs {
    /// PEM file of the new certificate.
    pub(crate) certificate: PathBuf,
    /// The operator's file.
    #[arg(long, value_name = "FILE", env = "WEFT_OPERATOR")]
    pub(crate) operator: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct OperatorCreateArgs {
    /// Its name.
    #[arg(long)]
    pub(crate) name: String,
    /// What it may sign: tokens, revocations, intentions, config, joined by commas; the last three may end in :PATTERN over
    /// names (of an intention: the destination). `*` is everything.
    #[arg(long)]
    pub(crate) may: String,
    /// Directory of `weft ca init`.
    #[arg(long)]
    pub(crate) ca: PathBuf,
    /// File to make, with key, certificate and root.
    #[arg(long, value_name = "FILE")]
    pub(crate) out: PathBuf,
    /// How long it is certified; what it signs ends with its certificate.
    #[arg(long, default_value = "8760h")]
    pub(crate) ttl: String,
}

/// Flags of the verbs that list what a CA directory made.
#[derive(Debug, Args)]
pub(crate) struct CaListArgs {
    /// Directory of `weft ca init`.
    #[arg(long)]
    pub(crate) ca: PathBuf,
    #[command(flatten)]
    pub(crate) client: ClientArgs,
    #[command(flatten)]
    pub(crate) output: FormatArgs,
}

#[derive(Debug, Args)]
pub(crate) struct OperatorRevokeArgs {
    /// Its name.
    pub(crate) name: String,
    /// Directory of `weft ca init`.
    #[arg(long)]
    pub(crate) ca: PathBuf,
    #[command(flatten)]
    pub(crate) sign: SignArgs,
}

#[derive(Debug, Subcommand)]
pub(crate) enum IssuerVerb {
    /// Makes the next issuer directory; copy it to the node that shall use it.
    #[command(after_help = "Example:\n  weft ca issuer create -ca ./ca")]
    Create {
        /// Directory of `weft ca init`.
        #[arg(long)]
        ca: PathBuf,
    },
    /// Lists the issuers of a CA directory, and what the mesh has heard of them.
    #[command(after_help = "Example:\n  weft ca issuer list -ca ./ca")]
    List(CaListArgs),
    /// Ends an issuer: it signs nothing more, what it signed stays good. For a stolen one use `weft revoke`.
    #[command(after_help = "Example:\n  weft ca issuer retire issuer-2 -ca ./ca")]
    Retire {
        /// Its name in the CA directory.
        name: String,
        /// Directory of `weft ca init`.
        #[arg(long)]
        ca: PathBuf,
        #[command(flatten)]
        sign: SignArgs,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum TokenVerb {
    /// Makes a token that lets a node join; it goes to standard output alone.
    #[command(after_help = "Example:\n  weft token create -ca ./ca -node 'web-*' -serve 'web,api-*' -ttl 1h")]
    Create {
        /// Directory of `weft ca init`.
        #[arg(long)]
        ca: PathBuf,
        /// Name, or pattern of names, that the newcomer may take.
        #[arg(long)]
        node: String,
        /// Services that it may serve: patterns joined by commas. Default '' (none: it may only call).
        #[arg(long, default_value = "")]
        serve: String,
        /// How long the token is good, as 30m or 24h.
        #[arg(long, default_value = "1h")]
        ttl: String,
        /// How often it may be used; 0: as often as wanted until it ends.
        #[arg(long, default_value_t = 0)]
        uses: u32,
    },
    /// Lists the tokens that were made with a CA directory, and how often the agent, if it is an issuer, saw them used.
    #[command(after_help = "Example:\n  weft token list -ca ./ca")]
    List(CaListArgs),
    /// Takes a token back on every issuer.
    #[command(after_help = "Example:\n  weft token revoke 1f0e…-… -ca ./ca")]
    Revoke {
        /// Its id; `weft token list` names it.
        id: String,
        /// Directory of `weft ca init`.
        #[arg(long)]
        ca: PathBuf,
        #[command(flatten)]
        sign: SignArgs,
    },
}
