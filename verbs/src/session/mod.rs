//! What two processes say to each other before data flows between them: who they are, and how they can be reached.
//!
//! A *session* is an encrypted stream of messages between two processes, over TCP. Each has authenticated the other by a pre-shared
//! key, if there is one. Over it they agree on *lanes*: connections of one of the providers, which carry the data; and each hears whether the
//! other lives. This module is about bytes alone. The sockets, and what becomes of the messages, are in [`transport::any`](crate::transport::any).
//!
//! | file | what it is |
//! |---|---|
//! | [`key`] | pre-shared keys, and files of them |
//! | `noise` | the handshake and the cipher (Noise Protocol Framework) |
//! | `wire` | the messages |
//!
//! # Trust
//!
//! **Who may come in.** A server that has keys talks to those who have one of them, and to nobody else. Who has none learns the
//! server's version, and no more.
//!
//! **What crosses the wire in clear.** The name of the client's key; the token of a lane, which opens that lane, once; and what lanes
//! carry. RDMA encrypts nothing, and neither does the `tcp` provider. So a lane's messages, rows and updates, the names of tables in them,
//! and the provider's keys of regions in its requests, can be read by whoever reads the wire, and changed by whoever can change it. The
//! session keeps from him what he would need to begin: he has no lane of his own, unless he takes a token out of the wire and uses it
//! before its owner.
//!
//! **What the fabric can do.** RDMA protects memory with keys of 32 bits that cross it in clear with every request. Somebody who can
//! inject packets into the fabric can guess or copy them (ReDMArk, USENIX Security 2021). Fervor registers rows for remote READ alone, and
//! moves a queue pair to its error state before memory that it could write is used again; but on a fabric that strangers share, nothing
//! above replaces a partition (pkey, VLAN) of one's own.

use std::fmt;

pub mod key;
pub(crate) mod noise;
pub(crate) mod wire;

pub use key::{KEY_FILE_VARIABLE, Key, KeyRing};
pub use wire::Way;

/// Why a session does not come about, or ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Reason {
    /// What was said is no message.
    Malformed = 1,
    /// The other end has another version.
    Version = 2,
    /// The server wants a key, and none was named.
    KeyNeeded = 3,
    /// The server has no such key, or another secret under its name.
    WrongKey = 4,
    /// A key was named, and the server has none.
    NoKeys = 5,
    /// What was said is not from the other end, or was said before.
    Forged = 6,
}

impl Reason {
    fn from_code(code: u8) -> Self {
        use Reason::*;
        let all = [Malformed, Version, KeyNeeded, WrongKey, NoKeys, Forged];
        all.into_iter().find(|reason| *reason as u8 == code).unwrap_or(Malformed)
    }
}

impl Reason {
    /// What a server logs of a client that it turns away for this.
    pub(crate) fn of_client(self) -> &'static str {
        match self {
            Reason::Malformed => "what it said is no opening of a session",
            Reason::Version => "it has another version of Fervor",
            Reason::KeyNeeded => "it named no key",
            Reason::WrongKey => "it named a key that is not known here, or has another secret",
            Reason::NoKeys => "it named a key, and this server was started without --key-file",
            Reason::Forged => "what it sent is not from the one who began the session, or was sent before",
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Reason::Malformed => "it does not speak Fervor's protocol for sessions",
            Reason::Version => "it has another version of Fervor; use the same on both sides",
            Reason::KeyNeeded => {
                "it talks to those who have its key; set FERVOR_KEY_FILE to the key's file, or FERVOR_KEY to the key"
            }
            Reason::WrongKey => "it does not know this key, or has another secret under its name",
            Reason::NoKeys => {
                "it has no key, so it cannot prove who it is; start it with --key-file, or connect without a key"
            }
            Reason::Forged => "somebody between here and there has changed or repeated what was said",
        })
    }
}
