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

/// Compiles a function several times, for vectors of several widths. A call runs the version for the widest vectors that this
/// processor has. What the function calls is compiled likewise if it is inlined. Such a call costs some ten instructions
/// more than another. The crate that uses this depends on `multiversion`.
#[macro_export]
macro_rules! wide {
    ($function:item) => {
        #[::multiversion::multiversion(targets("x86_64+avx512f+avx512vl", "x86_64+avx2", "aarch64+neon"))]
        $function
    };
}

/// Elements that one turn of a loop takes: as many as the widest vectors have, so that the compiler uses vectors of whatever width there
/// are, and needs few turns.
const LANES: usize = 16;

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

    /// Whether all of `values` are finite. One pass without branches, so that it costs next to nothing. This, and what
    /// follows, is inlined, for loops that are compiled for [`wide`] vectors.
    #[inline(always)]
    fn all_finite(values: &[Self]) -> bool {
        values.iter().fold(true, |all, value| all & value.is_finite())
    }

    /// Sums whose terms' magnitudes add up to less are finite for sure.
    const SAFE_SUM: f64;

    /// Whether all sums of `values` and `deltas`, pairwise, are finite.
    #[inline(always)]
    fn sums_are_finite(values: &[Self], deltas: &[Self]) -> bool {
        assert_eq!(values.len(), deltas.len());
        values.iter().zip(deltas).fold(true, |all, (value, delta)| all & value.plus(*delta).is_finite())
    }

    /// Adds `deltas` to `sums`, pairwise.
    #[inline(always)]
    fn add_all(sums: &mut [Self], deltas: &[Self]) {
        assert_eq!(sums.len(), deltas.len());
        let (wide_sums, sums) = sums.as_chunks_mut::<LANES>();
        let (wide_deltas, deltas) = deltas.as_chunks::<LANES>();
        for (sum, delta) in wide_sums.iter_mut().zip(wide_deltas) {
            for lane in 0..LANES {
                sum[lane] = sum[lane].plus(delta[lane]);
            }
        }
        for (sum, delta) in sums.iter_mut().zip(deltas) {
            *sum = sum.plus(*delta);
        }
    }
}

macro_rules! float {
    ($type:ty, $bits:ty, $name:ident) => {
        const _: () = {
            /// Its highest bit is set exactly if the value is not finite: then all bits of the exponent are set, and one
            /// added to them is carried into the sign's place. Of integers the compiler may take many at a time, in any order.
            #[inline(always)]
            const fn carry(value: $type) -> $bits {
                (value.to_bits() & <$bits>::MAX >> 1) + (1 << (<$type>::MANTISSA_DIGITS - 1))
            }
            impl Element for $type {
                const TYPE: ElementType = ElementType::$name;
                const SAFE_SUM: f64 = <$type>::MAX as f64 / 2.0;
                #[inline(always)]
                fn plus(self, delta: Self) -> Self {
                    self + delta
                }
                #[inline(always)]
                fn is_finite(self) -> bool {
                    <$type>::is_finite(self)
                }
                #[inline(always)]
                fn all_finite(values: &[Self]) -> bool {
                    values.iter().fold(0, |all, value| all | carry(*value)) >> (<$bits>::BITS - 1) == 0
                }
                #[inline(always)]
                fn sums_are_finite(values: &[Self], deltas: &[Self]) -> bool {
                    assert_eq!(values.len(), deltas.len());
                    let sums = values.iter().zip(deltas).map(|(value, delta)| value + delta);
                    sums.fold(0, |all, sum| all | carry(sum)) >> (<$bits>::BITS - 1) == 0
                }
                fn to_f64(self) -> f64 {
                    self.into()
                }
            }
        };
    };
}
float!(f32, u32, F32);
float!(f64, u64, F64);

wide! {
    /// As [`Element::all_finite`].
    pub fn all_finite<E: Element>(values: &[E]) -> bool {
        E::all_finite(values)
    }
}

wide! {
    /// As [`Element::add_all`].
    pub fn add_all<E: Element>(sums: &mut [E], deltas: &[E]) {
        E::add_all(sums, deltas);
    }
}

wide! {
    /// As [`Element::add_all`], if all sums are finite. Whether they are; else nothing is added.
    pub fn add_finite<E: Element>(sums: &mut [E], deltas: &[E]) -> bool {
        let finite = E::sums_are_finite(sums, deltas);
        if finite {
            E::add_all(sums, deltas);
        }
        finite
    }
}

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
            for len in 1..70 {
                for at in 0..len {
                    let mut values = vec![f32::MAX; len];
                    values[at] = bad;
                    assert!(!all_finite(&values) && !f32::all_finite(&values), "{bad} at {at} of {len}");
                    let wider: Vec<f64> = values.iter().map(|value| f64::from(*value)).collect();
                    assert!(!all_finite(&wider) && !f64::all_finite(&wider), "{bad} at {at} of {len}");
                }
            }
        }
        let extremes = [f32::MAX, f32::MIN, f32::MIN_POSITIVE, -0.0, f32::from_bits(1)];
        assert!((0..70).all(|len| all_finite(&extremes.repeat(14)[..len])));
        assert!(all_finite(&[f64::MAX, f64::MIN, f64::MIN_POSITIVE, -0.0, f64::from_bits(1)]));
    }

    #[test]
    fn what_is_added_is_finite_or_nothing_is() {
        for len in 0..70 {
            let deltas: Vec<f32> = (0..len).map(|at| at as f32).collect();
            let mut sums = vec![0.5; len];
            assert!(add_finite(&mut sums, &deltas));
            add_all(&mut sums, &deltas);
            let twice: Vec<f32> = (0..len).map(|at| 0.5 + 2.0 * at as f32).collect();
            assert_eq!(sums, twice);
            for at in 0..len {
                let mut great = sums.clone();
                great[at] = f32::MAX;
                let (before, mut deltas) = (great.clone(), deltas.clone());
                deltas[at] = f32::MAX;
                assert!(!add_finite(&mut great, &deltas), "the sum at {at} of {len} is infinite");
                assert_eq!(great, before);
            }
            let (mut whole, ones) = (vec![i64::MAX; len], vec![1; len]);
            assert!(add_finite(&mut whole, &ones));
            assert_eq!(whole, vec![i64::MIN; len]);
        }
    }
}
