//! What a call of the client can fail with.

use fervor_verbs::Error as TransportError;

/// A call that failed. After [`Error::ServerLost`] or [`Error::Fault`] every further call that needs a server fails alike; a
/// `get` may still be answered from the cache.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// The transport said so: no such address, nobody there, no memory.
    #[error("{0}")]
    Transport(String),
    /// No server was named, or one twice.
    #[error("{0}")]
    Servers(String),
    /// An option makes no sense.
    #[error("{0}")]
    Options(String),
    /// A server refused the connection.
    #[error("the server at {address} refused: {reason}")]
    Refused {
        /// The server.
        address: String,
        /// What it said.
        reason: String,
    },
    /// A server is gone: it could not be reached again within [`ClientOptions::lease`](crate::ClientOptions::lease).
    #[error("the server at {address} is lost: {cause}")]
    ServerLost {
        /// The server.
        address: String,
        /// What happened to the connection.
        cause: String,
    },
    /// A server ended the connection and said why.
    #[error("the server at {address} ended the connection: {reason}")]
    Fault {
        /// The server.
        address: String,
        /// What it said.
        reason: String,
    },
    /// The table cannot be made or joined.
    #[error("table `{name}`: {reason}")]
    Table {
        /// The table.
        name: String,
        /// Why not.
        reason: String,
    },
    /// The table has no such row.
    #[error("row {row} is out of range: the table `{table}` has {rows} rows")]
    Row {
        /// The row.
        row: u64,
        /// The table.
        table: String,
        /// Its rows.
        rows: u64,
    },
    /// A row has no such column.
    #[error("column {column} is out of range: the table `{table}` has {width} columns")]
    Column {
        /// The column.
        column: u64,
        /// The table.
        table: String,
        /// Its columns.
        width: usize,
    },
    /// A buffer is not as long as what it is for.
    #[error("the buffer has {length} elements, but the table `{table}` needs {needed} here")]
    Length {
        /// Elements given.
        length: usize,
        /// The table.
        table: String,
        /// Elements needed.
        needed: usize,
    },
    /// An update is not a number.
    #[error(
        "the update of row {row} of the table `{table}` has {value} at column {column}: NaN and infinity are refused, \
         since they would spoil the row for everybody (a table made with `non_finite` takes them)"
    )]
    NonFinite {
        /// The table.
        table: String,
        /// The row.
        row: u64,
        /// The column.
        column: usize,
        /// The value.
        value: String,
    },
    /// The table belongs to another client.
    #[error(
        "the table `{table}` was opened by another client than this worker's: open it with the worker's client"
    )]
    ForeignTable {
        /// The table.
        table: String,
    },
    /// The client only reads.
    #[error(
        "the table `{table}` cannot be updated by this client, which only reads: its key has role=read, or \
         ClientOptions::observer is set"
    )]
    Observer {
        /// The table.
        table: String,
    },
    /// A read was older than the table's model allows, and [`ClientOptions::check`](crate::ClientOptions::check) is set.
    #[error(
        "the staleness bound is violated: worker {worker}, at clock {clock}, read row {row} of the table `{table}` as of \
         clock {copy}, but {model} allows nothing before clock {needed}: this is a bug of Fervor, not of the program"
    )]
    Stale {
        /// Number of the worker within its client, counted from 1.
        worker: u64,
        /// Its clock.
        clock: u64,
        /// The table.
        table: String,
        /// The row.
        row: u64,
        /// The clock of the copy: that many clocks of all workers are in it.
        copy: u64,
        /// The table's model, with its bound.
        model: String,
        /// The least clock that the model allows.
        needed: u64,
    },
    /// Workers are still there.
    #[error("{workers} workers are still there: drop them before the client is closed")]
    Workers {
        /// How many.
        workers: usize,
    },
}

impl From<TransportError> for Error {
    fn from(error: TransportError) -> Self {
        Self::Transport(error.to_string())
    }
}
