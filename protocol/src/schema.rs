//! What a table is.

use std::fmt;

use crate::{
    element::ElementType,
    limits::{MAX_NAME, MAX_ROW_BYTES, MAX_ROWS},
    row::Layout,
};

/// Consistency model of a table: how old a copy of a row may be that `get` returns, and whether the server
/// pushes changes into the workers' caches.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Model {
    /// Bulk synchronous: a `get` sees every update of the clocks before. SSP with staleness 0.
    Bsp,
    /// Stale synchronous parallel: a copy may be `staleness` clocks old; one too old is read again.
    Ssp {
        /// Greatest difference of clocks.
        staleness: u32,
    },
    /// Eager SSP: as SSP, and the server pushes every changed row to those who hold it when its clock advances.
    Essp {
        /// Greatest difference of clocks.
        staleness: u32,
    },
    /// Nothing is waited for: each `get` reads the row as it is.
    Async,
    /// Value-bounded asynchronous parallel: a `get` waits for nothing, and the server pushes after each batch. An `inc`
    /// waits while the worker's updates that are not yet visible to all would exceed `v0 / sqrt(t)` in any element, at its
    /// `t`-th clock. The weak form of arXiv 1312.7869; see [`crate::value`].
    Vap {
        /// The bound in the first clock: positive and finite.
        v0: f32,
    },
}

impl Model {
    /// Greatest difference of clocks, or none.
    pub fn staleness(self) -> Option<u32> {
        match self {
            Self::Bsp => Some(0),
            Self::Ssp { staleness } | Self::Essp { staleness } => Some(staleness),
            Self::Async | Self::Vap { .. } => None,
        }
    }

    /// Whether the server pushes all changed rows when its clock advances.
    pub fn eager(self) -> bool {
        matches!(self, Self::Essp { .. } | Self::Vap { .. })
    }

    /// Whether it pushes them after each batch, and proves when they are visible.
    pub fn value_bounded(self) -> bool {
        matches!(self, Self::Vap { .. })
    }

    /// Whether clients keep copies of their own accord: not if each `get` reads the row as it is.
    pub fn cached(self) -> bool {
        self != Self::Async
    }

    /// Its form on the wire: a code and a parameter.
    pub fn to_wire(self) -> (u8, u32) {
        match self {
            Self::Bsp => (1, 0),
            Self::Ssp { staleness } => (2, staleness),
            Self::Essp { staleness } => (3, staleness),
            Self::Async => (4, 0),
            Self::Vap { v0 } => (5, v0.to_bits()),
        }
    }

    /// The model of [`Model::to_wire`].
    pub fn from_wire(code: u8, parameter: u32) -> Option<Self> {
        match (code, parameter) {
            (1, 0) => Some(Self::Bsp),
            (2, staleness) => Some(Self::Ssp { staleness }),
            (3, staleness) => Some(Self::Essp { staleness }),
            (4, 0) => Some(Self::Async),
            (5, bits) => Some(Self::Vap { v0: f32::from_bits(bits) }),
            _ => None,
        }
    }
}

impl fmt::Display for Model {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bsp => f.write_str("BSP"),
            Self::Ssp { staleness } => write!(f, "SSP({staleness})"),
            Self::Essp { staleness } => write!(f, "ESSP({staleness})"),
            Self::Async => f.write_str("Async"),
            Self::Vap { v0 } => write!(f, "VAP({v0})"),
        }
    }
}

/// What a table is. Clients that name the same table must agree on all of it.
#[derive(Debug, Clone, PartialEq)]
pub struct Schema {
    /// Name, at most [`MAX_NAME`] bytes.
    pub name: String,
    /// Type of the elements.
    pub element: ElementType,
    /// Number of rows over all shards.
    pub rows: u64,
    /// Elements of a row.
    pub width: u32,
    /// Consistency model.
    pub model: Model,
    /// Whether updates may be NaN or infinite.
    pub non_finite: bool,
    /// Bytes per second that each shard may push of it besides rounds, the most changed rows first: *continuous* eager
    /// pushing, under ESSP and Async. 0: none; `u64::MAX`: whatever the network takes.
    pub continuous: u64,
}

/// A schema that no table can have.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum SchemaError {
    /// The name is empty or too long.
    #[error("the name of a table has 1 to {MAX_NAME} bytes, not {0}")]
    Name(usize),
    /// No rows, or too many.
    #[error("a table has 1 to {MAX_ROWS} rows, not {0}")]
    Rows(u64),
    /// A row has no elements, or too many.
    #[error("a row of {element} has 1 to {} elements, not {width}", MAX_ROW_BYTES / element.size())]
    Width {
        /// The width asked for.
        width: u64,
        /// Type of the elements.
        element: ElementType,
    },
    /// No updates could ever be made, or any.
    #[error("the bound of VAP is a positive, finite number, not {0}")]
    Bound(f32),
    /// The rows are not pushed, or as soon as they change.
    #[error("continuous pushing is for ESSP and Async, not {0}")]
    Continuous(Model),
    /// Too many to be ranked.
    #[error("a table that is pushed continuously has fewer than {most} rows, not {0}", most = u32::MAX)]
    Ranked(u64),
}

impl Schema {
    /// Checks that there can be such a table.
    ///
    /// # Errors
    /// What is out of range.
    pub fn check(&self) -> Result<(), SchemaError> {
        if self.name.is_empty() || self.name.len() > MAX_NAME {
            return Err(SchemaError::Name(self.name.len()));
        }
        if self.rows == 0 || self.rows > MAX_ROWS {
            return Err(SchemaError::Rows(self.rows));
        }
        if self.width == 0 || self.row_bytes() > MAX_ROW_BYTES {
            return Err(SchemaError::Width { width: self.width.into(), element: self.element });
        }
        match self.model {
            Model::Vap { v0 } if !(v0 > 0.0 && v0.is_finite()) => return Err(SchemaError::Bound(v0)),
            Model::Essp { .. } | Model::Async => {}
            _ if self.continuous > 0 => return Err(SchemaError::Continuous(self.model)),
            _ => {}
        }
        if self.continuous > 0 && self.rows >= u32::MAX.into() {
            return Err(SchemaError::Ranked(self.rows));
        }
        Ok(())
    }

    /// Whether the server pushes changed rows into the clients' caches.
    pub fn eager(&self) -> bool {
        self.model.eager() || self.continuous > 0
    }

    /// Whether clients keep copies.
    pub fn cached(&self) -> bool {
        self.model.cached() || self.continuous > 0
    }

    /// Bytes of data in a row.
    pub fn row_bytes(&self) -> usize {
        self.width as usize * self.element.size()
    }

    /// How its rows lie in memory.
    pub fn layout(&self) -> Layout {
        Layout::new(self.row_bytes())
    }
}

impl fmt::Display for Schema {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}`: {} rows of {} {}, {}", self.name, self.rows, self.width, self.element, self.model)?;
        if self.continuous > 0 {
            write!(f, ", pushed continuously at {} bytes per second", self.continuous)?;
        }
        if self.non_finite { f.write_str(", NaN and infinity allowed") } else { Ok(()) }
    }
}
