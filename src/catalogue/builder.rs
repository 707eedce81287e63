//! x
/// x
#[derive(Debug)]
pub struct Builder;
