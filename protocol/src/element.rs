//! The element types of a table.

use std::fmt;

use zerocopy::{FromBytes, Immutable, IntoBytes};

/// Type of the elements of a table, as it goes over the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum ElementType {
    /// IEEE 754 single precision.
    F32 = 1,
    /// IEEE 754 double precision.
    F64 = 2,
    /// 32-bit two's complement.
    I32 = 3,
    /// 64-bit two's complement.
    I64 = 4,
}

impl ElementType {
    /// The type that `code` stands for on the wire.
    pub fn from_code(code: u8) -> Option<Self> {
        [Self::F32, Self::F64, Self::I32, Self::I64].into_iter().find(|e| *e as u8 == code)
    }

    /// Bytes of one element.
    pub const fn size(self) -> usize {
        match self {
            Self::F32 | Self::I32 => 4,
            Self::F64 | Self::I64 => 8,
        }
    }
}

impl fmt::Display for ElementType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::F64 => "f64",
            Self::I32 => "i32",
            Self::I64 => "i64",
        })
    }
}

/// An element of a table. Updates are added: floating point as it comes, integers wrapping.
pub trait Element:
    Copy
    + Default
    + PartialEq
    + fmt::Debug
    + fmt::Display
    + Send
    + Sync
    + FromBytes
    + IntoBytes
    + Immutable
    + 'static
{
    /// Its name on the wire.
    const TYPE: ElementType;

    /// `self + delta`.
    fn plus(self, delta: Self) -> Self;

    /// Whether it is a number: neither NaN nor infinite. Always so for integers.
    fn is_finite(self) -> bool;

    /// Its value, rounded if it has more than 53 bits.
    fn to_f64(self) -> f64;

    /// Whether all of `values` are finite. One pass without branches, so that it costs next to nothing.
    fn all_finite(values: &[Self]) -> bool {
        values.iter().fold(true, |all, value| all & value.is_finite())
    }

    /// Sums whose terms' magnitudes add up to less are finite for sure.
    const SAFE_SUM: f64;

    /// Whether all sums of `values` and `deltas`, pairwise, are finite.
    fn sums_are_finite(values: &[Self], deltas: &[Self]) -> bool {
        assert_eq!(values.len(), deltas.len());
        values.iter().zip(deltas).fold(true, |all, (value, delta)| all & value.plus(*delta).is_finite())
    }

    /// Adds `deltas` to `sums`, pairwise.
    fn add_all(sums: &mut [Self], deltas: &[Self]) {
        assert_eq!(sums.len(), deltas.len());
        for (sum, delta) in sums.iter_mut().zip(deltas) {
            *sum = sum.plus(*delta);
        }
    }
}

macro_rules! float {
    ($type:ty, $name:ident, $bits:ty, $exponent:expr) => {
        impl Element for $type {
            const TYPE: ElementType = ElementType::$name;
            const SAFE_SUM: f64 = <$type>::MAX as f64 / 2.0;
            fn plus(self, delta: Self) -> Self {
                self + delta
            }
            fn is_finite(self) -> bool {
                <$type>::is_finite(self)
            }
            fn sums_are_finite(values: &[Self], deltas: &[Self]) -> bool {
                const MASK: $bits = $exponent;
                assert_eq!(values.len(), deltas.len());
                let sums = values.iter().zip(deltas).map(|(value, delta)| (value + delta).to_bits());
                sums.fold(0u32, |bad, bits| bad | u32::from(bits & MASK == MASK)) == 0
            }
            fn to_f64(self) -> f64 {
                self.into()
            }
            fn all_finite(values: &[Self]) -> bool {
                // The exponent of NaN and infinity is all ones: integer compares, which vectorise.
                const MASK: $bits = $exponent;
                values.iter().fold(0u32, |bad, value| bad | u32::from(value.to_bits() & MASK == MASK)) == 0
            }
        }
    };
}
float!(f32, F32, u32, 0x7f80_0000);
float!(f64, F64, u64, 0x7ff0_0000_0000_0000);

macro_rules! integer {
    ($type:ty, $name:ident) => {
        impl Element for $type {
            const TYPE: ElementType = ElementType::$name;
            const SAFE_SUM: f64 = f64::INFINITY;
            fn plus(self, delta: Self) -> Self {
                self.wrapping_add(delta)
            }
            fn is_finite(self) -> bool {
                true
            }
            fn to_f64(self) -> f64 {
                self as f64
            }
        }
    };
}
integer!(i32, I32);
integer!(i64, I64);

// The wire and the memory of a shard hold elements as they are in memory here.
const _: () = assert!(cfg!(target_endian = "little"), "Fervor's layouts are little-endian");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_and_sizes() {
        for element in [ElementType::F32, ElementType::F64, ElementType::I32, ElementType::I64] {
            assert_eq!(ElementType::from_code(element as u8), Some(element));
        }
        assert_eq!(ElementType::from_code(0), None);
        assert_eq!(<f64 as Element>::TYPE.size(), 8);
    }

    #[test]
    fn not_a_number_is_found_wherever_it_stands() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -f32::NAN] {
            for at in 0..33 {
                let mut values = [f32::MAX; 33];
                assert!(f32::all_finite(&values));
                values[at] = bad;
                assert!(!f32::all_finite(&values));
                assert!(!f64::all_finite(&[0.0, f64::from(bad)]));
            }
        }
    }
}
