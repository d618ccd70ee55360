//! Posts in one line, for tests.

use crate::transport::{Connection, Payload, Post, PostError, RemoteAddress, Sge};

/// A [`Post`] of each kind, with its fields in the order in which the kind has them.
pub trait Posts: Connection {
    /// [`Post::Send`].
    ///
    /// # Errors
    /// As [`Connection::post`].
    fn send(
        &mut self,
        payload: Payload<'_, Self::Region>,
        immediate: Option<u32>,
        signal: Option<u64>,
    ) -> Result<(), PostError> {
        self.post(Post::Send { payload, immediate, signal })
    }

    /// [`Post::Write`].
    ///
    /// # Errors
    /// As [`Connection::post`].
    fn write(
        &mut self,
        payload: Payload<'_, Self::Region>,
        to: RemoteAddress,
        immediate: Option<u32>,
        signal: Option<u64>,
    ) -> Result<(), PostError> {
        self.post(Post::Write { payload, to, immediate, signal })
    }

    /// [`Post::Read`].
    ///
    /// # Errors
    /// As [`Connection::post`].
    fn read(
        &mut self,
        into: &[Sge<'_, Self::Region>],
        from: RemoteAddress,
        signal: Option<u64>,
    ) -> Result<(), PostError> {
        self.post(Post::Read { into, from, signal })
    }
}

impl<C: Connection> Posts for C {}
