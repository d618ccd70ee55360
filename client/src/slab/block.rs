//! The memory that slabs lie in: pieces that servers on this host see, or memory of the client's own.

use std::sync::{Arc, Mutex, PoisonError};

use fervor_verbs::Piece;
use zerocopy::IntoBytes;

/// Bytes of a piece of named memory: the longest row, its number, and what aligns them, fit.
pub const PIECE_BYTES: usize = (1 << 20) + 4096;
/// Memory that servers on this host see, in pieces.
#[derive(Debug, Default)]
pub struct Pool {
    pub(super) free: Mutex<Vec<Piece>>,
}

impl Pool {
    /// Of these pieces, each of [`PIECE_BYTES`].
    pub fn new(pieces: Vec<Piece>) -> Arc<Self> {
        Arc::new(Self { free: Mutex::new(pieces) })
    }

    fn take(self: &Arc<Self>) -> Option<Borrowed> {
        let piece = self.free.lock().unwrap_or_else(PoisonError::into_inner).pop();
        piece.map(|piece| Borrowed { piece: Some(piece), pool: self.clone() })
    }
}

/// A piece of a pool, which gets it back.
#[derive(Debug)]
pub struct Borrowed {
    piece: Option<Piece>,
    pool: Arc<Pool>,
}

impl Borrowed {
    fn piece(&self) -> &Piece {
        self.piece.as_ref().expect("it is there until the end")
    }
}

impl Drop for Borrowed {
    fn drop(&mut self) {
        let mut free = self.pool.free.lock().unwrap_or_else(PoisonError::into_inner);
        free.extend(self.piece.take());
    }
}

/// Some memory of a slab.
#[derive(Debug)]
pub enum Block {
    Named(Borrowed),
    Own(Vec<u64>),
}

impl Block {
    /// From the pool, or of `bytes` bytes.
    pub fn new(pool: Option<&Arc<Pool>>, bytes: usize) -> Self {
        match pool.filter(|_| bytes <= PIECE_BYTES).and_then(Pool::take) {
            Some(piece) => Self::Named(piece),
            None => Self::Own(vec![0; bytes.div_ceil(8)]),
        }
    }

    #[inline]
    pub fn bytes(&self) -> &[u8] {
        match self {
            Self::Named(borrowed) => borrowed.piece().bytes(),
            Self::Own(words) => words.as_bytes(),
        }
    }

    #[inline]
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        match self {
            Self::Named(borrowed) => borrowed.piece.as_mut().expect("it is there until the end").bytes_mut(),
            Self::Own(words) => words.as_mut_bytes(),
        }
    }

    /// Its first byte in the named memory.
    pub fn offset(&self) -> Option<u64> {
        match self {
            Self::Named(borrowed) => Some(borrowed.piece().offset() as u64),
            Self::Own(_) => None,
        }
    }
}
