//! RDMA that a host may do without: what becomes of it when memory cannot be pinned.
//!
//! A device's memory is pinned, and the system may allow too little of that. A host that may go other ways then drops RDMA, once, and says why;
//! it goes on with them. But a lane of RDMA must be able to name every region of its host. So RDMA is dropped only as long as the
//! host has no endpoint of it, and with that no lane. Afterwards memory that cannot be pinned is an error, as it is for a host that
//! insists on RDMA.
//!
//! ```text
//!  Open ── an endpoint is made ─▶ Used: memory that cannot be pinned is an error
//!    └──── memory cannot be pinned ─▶ Dropped: what is registered from now on, is registered without RDMA
//! ```

use std::sync::{Mutex, MutexGuard, PoisonError};

use super::shared::say;
use crate::error::Error;

#[cfg_attr(not(feature = "rdma"), allow(dead_code, reason = "there is no RDMA to do without"))]
#[derive(Debug, Default)]
enum State {
    #[default]
    Open,
    Used,
    Dropped(String),
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Pinning {
    /// The host may go no other way.
    pub(super) insists: bool,
    state: Mutex<State>,
}

#[cfg_attr(not(feature = "rdma"), allow(dead_code, reason = "there is no RDMA to do without"))]
impl Pinning {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Why RDMA was dropped, if it was.
    pub(super) fn dropped(&self) -> Option<String> {
        match &*self.state() {
            State::Dropped(why) => Some(why.clone()),
            _ => None,
        }
    }

    /// What comes of registering memory: nothing, if RDMA has been dropped, or is now.
    pub(super) fn register<T>(
        &self,
        register: impl FnOnce() -> Result<T, Error>,
    ) -> Result<Option<T>, Error> {
        if self.dropped().is_some() {
            return Ok(None);
        }
        match register() {
            Err(error @ Error::Memlock { .. }) => self.drop_rdma(&mut self.state(), error).map(|()| None),
            registered => registered.map(Some),
        }
    }

    /// Makes an endpoint: from then on RDMA is not dropped any more.
    pub(super) fn endpoint<T>(
        &self,
        make: impl FnOnce() -> Result<T, Error>,
        dropped: impl FnOnce(&str) -> Error,
    ) -> Result<T, Error> {
        // Under the lock: nobody drops it meanwhile.
        let mut state = self.state();
        if let State::Dropped(why) = &*state {
            return Err(dropped(why));
        }
        match make() {
            Ok(endpoint) => {
                *state = State::Used;
                Ok(endpoint)
            }
            Err(error @ Error::Memlock { .. }) => {
                let why = error.to_string();
                self.drop_rdma(&mut state, error)?;
                Err(dropped(&why))
            }
            Err(error) => Err(error),
        }
    }

    fn drop_rdma(&self, state: &mut State, error: Error) -> Result<(), Error> {
        match state {
            _ if self.insists => Err(error),
            State::Used => Err(error),
            State::Dropped(_) => Ok(()),
            State::Open => {
                say(format_args!("going without RDMA: {error}"));
                *state = State::Dropped(error.to_string());
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unpinned<T>() -> Result<T, Error> {
        Err(Error::Memlock { bytes: 9, limit: 8 })
    }

    fn dropped(why: &str) -> Error {
        Error::NoDevice { reason: why.to_owned() }
    }

    #[test]
    fn memory_that_cannot_be_pinned_drops_rdma_once() {
        let pinning = Pinning::default();
        assert!(matches!(pinning.register(|| Ok(1)), Ok(Some(1))));
        assert_eq!(pinning.dropped(), None);
        assert!(matches!(pinning.register(unpinned::<()>), Ok(None)));
        let why = pinning.dropped().unwrap();
        assert!(why.contains("9 bytes") && why.contains("ulimit -l"), "{why}");
        // What fits is registered without it, too: its lanes could not name the other.
        assert!(matches!(pinning.register(|| Ok(1)), Ok(None)));
        let error = pinning.endpoint(|| Ok(1), dropped).unwrap_err().to_string();
        assert!(error.contains("ulimit -l"), "{error}");
    }

    #[test]
    fn it_is_not_dropped_once_there_is_an_endpoint_or_where_it_is_insisted_on() {
        let used = Pinning::default();
        assert!(matches!(used.endpoint(|| Ok(1), dropped), Ok(1)));
        let insists = Pinning { insists: true, ..Pinning::default() };
        for pinning in [used, insists] {
            assert!(matches!(pinning.register(unpinned::<()>), Err(Error::Memlock { .. })));
            assert!(matches!(pinning.endpoint(unpinned::<()>, dropped), Err(Error::Memlock { .. })));
            assert_eq!(pinning.dropped(), None);
        }
        // Its own buffers may be what does not fit.
        let open = Pinning::default();
        assert!(matches!(open.endpoint(unpinned::<()>, dropped), Err(Error::NoDevice { .. })));
        assert!(open.dropped().is_some());
    }
}
