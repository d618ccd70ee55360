//! Bytes of bookkeeping: how much heap memory a shard's records of tables and clients take, and how much they
//! may take.
//!
//! The ledger counts what grows with tables and clients: sets of images, rankings, subscriptions. It does not
//! count what the number of clients alone bounds: numbers, answers, acknowledgements.

/// See the module.
#[derive(Debug)]
pub struct Ledger {
    limit: usize,
    used: usize,
}

impl Ledger {
    /// With nothing in it.
    pub fn new(limit: usize) -> Self {
        Self { limit, used: 0 }
    }

    /// Takes `bytes` bytes for `what`.
    ///
    /// # Errors
    /// There are not so many left, with the cure.
    pub fn charge(&mut self, bytes: usize, what: impl FnOnce() -> String) -> Result<(), String> {
        if bytes > self.limit - self.used {
            return Err(format!(
                "{} needs {bytes} bytes of bookkeeping in this shard, which has {} bytes, {} of them free: start the server with \
                 more --bookkeeping",
                what(),
                self.limit,
                self.limit - self.used
            ));
        }
        self.used += bytes;
        Ok(())
    }

    /// Gives back what was charged.
    pub fn refund(&mut self, bytes: usize) {
        self.used = self.used.checked_sub(bytes).expect("no more is given back than was charged");
    }

    /// Bytes that are taken.
    #[cfg(test)]
    pub fn used(&self) -> usize {
        self.used
    }
}
