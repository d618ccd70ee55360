//! Small states of the core, all of them.
