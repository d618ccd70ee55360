//! What the workers share: how often each word has each topic. In a table of a parameter server, or behind locks of this
//! process; that is all that the two differ in.

use std::ops::Range;

use anyhow::Result;

use super::sampler::Sampler;
use crate::job::Accesses;

/// The shared counts as one worker sees them. Errors are what the parameter server's client says.
pub trait Counts {
    /// Adds the topics that the worker's tokens have at the beginning, and waits until all workers have done that.
    ///
    /// # Errors
    /// See the trait.
    fn start(&mut self, sampler: &mut Sampler) -> Result<()>;

    /// Waits until all workers are here.
    ///
    /// # Errors
    /// See the trait.
    fn meet(&mut self) -> Result<()>;

    /// Draws new topics for all tokens of a part of the worker's share.
    ///
    /// # Errors
    /// See the trait.
    fn sample(&mut self, sampler: &mut Sampler, part: usize) -> Result<()>;

    /// Ends the worker's clock.
    ///
    /// # Errors
    /// See the trait.
    fn clock(&mut self) -> Result<()>;

    /// Waits until all workers are done. What is read then is exact, whatever the model.
    ///
    /// # Errors
    /// See the trait.
    fn settle(&mut self) -> Result<()>;

    /// Calls `with` for each of `words` and its row.
    ///
    /// # Errors
    /// See the trait.
    fn rows(&mut self, words: Range<u32>, with: &mut dyn FnMut(u32, &[i32])) -> Result<()>;

    /// The topic totals.
    ///
    /// # Errors
    /// See the trait.
    fn totals(&mut self) -> Result<Vec<i32>>;

    /// What the accesses so far have cost.
    fn accesses(&self) -> Accesses;
}
