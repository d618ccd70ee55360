//! The tables of ports and GIDs, as sysfs has them.
//!
//! They are read when devices are opened, and again after a device has said that they changed: a table has up to a thousand entries, too many to
//! read for each connection, or for each of several devices that are opened together.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use crate::{
    devices::{self, DeviceInfo, SYSFS},
    error::Error,
};

/// How long tables are believed when they do not have what is looked for.
pub(super) const FRESH: Duration = Duration::from_secs(1);

/// What sysfs says of all devices.
pub(super) type Tables = Arc<Vec<DeviceInfo>>;

/// The tables as this process has read them last, and when, unless a device has said since that they changed.
static RECENT: Mutex<Option<(Tables, Instant)>> = Mutex::new(None);

fn recent() -> MutexGuard<'static, Option<(Tables, Instant)>> {
    // Every change is one assignment.
    RECENT.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Reads the tables, unless they were read just now.
pub(super) fn recent_tables() -> Result<Tables, Error> {
    if let Some((tables, read)) = &*recent()
        && read.elapsed() < FRESH
    {
        return Ok(Arc::clone(tables));
    }
    read_tables()
}

/// Reads the tables.
pub(in crate::transport) fn read_tables() -> Result<Tables, Error> {
    let tables = devices::from_sysfs().map_err(Error::io(format!("reading {SYSFS}")))?;
    let tables = Arc::new(tables);
    *recent() = Some((Arc::clone(&tables), Instant::now()));
    Ok(tables)
}

/// A device has said that they changed.
pub(super) fn forget() {
    *recent() = None;
}
