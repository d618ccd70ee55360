//! Why a server does not start.

use fervor_verbs::Error;

/// Why a server does not start.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The configuration makes no sense.
    #[error("{0}")]
    Config(String),
    /// The transport said so.
    #[error(transparent)]
    Transport(#[from] Error),
}
