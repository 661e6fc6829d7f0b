//! Element types of safetensors files.

use serde::Serialize;

/// Element types that a safetensors header can name. Only `F32`, `F16` and `BF16` load as they are; others are codes and
/// scales of quantised matrices, or known so that a checkpoint which holds them can be inspected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[allow(non_camel_case_types)] // the header's own spelling
pub enum DType {
    /// 32-bit float.
    F32,
    /// 16-bit IEEE float.
    F16,
    /// bfloat16.
    BF16,
    /// 64-bit float.
    F64,
    /// Two 32-bit floats.
    C64,
    /// 8-bit float, 4 exponent bits, no infinity.
    F8_E4M3,
    /// 8-bit float, 5 exponent bits.
    F8_E5M2,
    /// As `F8_E4M3`, with one zero and a shifted bias.
    F8_E4M3FNUZ,
    /// As `F8_E5M2`, with one zero and a shifted bias.
    F8_E5M2FNUZ,
    /// A power of two.
    F8_E8M0,
    /// 6-bit float, 2 exponent bits.
    F6_E2M3,
    /// 6-bit float, 3 exponent bits.
    F6_E3M2,
    /// 4-bit float, two to a byte.
    F4,
    /// 64-bit integer.
    I64,
    /// 64-bit unsigned integer.
    U64,
    /// 32-bit integer.
    I32,
    /// 32-bit unsigned integer.
    U32,
    /// 16-bit integer.
    I16,
    /// 16-bit unsigned integer.
    U16,
    /// 8-bit integer.
    I8,
    /// 8-bit unsigned integer.
    U8,
    /// A byte that is 0 or 1.
    BOOL,
}

impl DType {
    /// Every type, with the header's name and the bits of an element.
    pub const ALL: [(DType, &'static str, usize); 22] = [
        (DType::F32, "F32", 32),
        (DType::F16, "F16", 16),
        (DType::BF16, "BF16", 16),
        (DType::F64, "F64", 64),
        (DType::C64, "C64", 64),
        (DType::F8_E4M3, "F8_E4M3", 8),
        (DType::F8_E5M2, "F8_E5M2", 8),
        (DType::F8_E4M3FNUZ, "F8_E4M3FNUZ", 8),
        (DType::F8_E5M2FNUZ, "F8_E5M2FNUZ", 8),
        (DType::F8_E8M0, "F8_E8M0", 8),
        (DType::F6_E2M3, "F6_E2M3", 6),
        (DType::F6_E3M2, "F6_E3M2", 6),
        (DType::F4, "F4", 4),
        (DType::I64, "I64", 64),
        (DType::U64, "U64", 64),
        (DType::I32, "I32", 32),
        (DType::U32, "U32", 32),
        (DType::I16, "I16", 16),
        (DType::U16, "U16", 16),
        (DType::I8, "I8", 8),
        (DType::U8, "U8", 8),
        (DType::BOOL, "BOOL", 8),
    ];

    /// The type that a header spells `name`.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.iter().find(|(_, n, _)| *n == name).map(|(dtype, _, _)| *dtype)
    }

    /// The header's name of the type.
    pub fn name(self) -> &'static str {
        self.row().1
    }

    /// Bits of an element.
    pub fn bits(self) -> usize {
        self.row().2
    }

    /// Bytes of an element, rounded up for the types below a byte.
    pub fn size(self) -> usize {
        self.bits().div_ceil(8)
    }

    /// Whether weights of this type can be loaded as they are.
    pub fn is_loadable(self) -> bool {
        matches!(self, DType::F32 | DType::F16 | DType::BF16)
    }

    fn row(self) -> &'static (DType, &'static str, usize) {
        // `ALL` is in the order of the declaration; a test holds it to that.
        &Self::ALL[self as usize]
    }
}

impl std::fmt::Display for DType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::DType;

    #[test]
    fn table_is_in_order_of_declaration() {
        for (i, (dtype, name, _)) in DType::ALL.iter().enumerate() {
            assert_eq!(*dtype as usize, i);
            assert_eq!(format!("{dtype:?}"), *name);
            assert_eq!(DType::from_name(name), Some(*dtype));
        }
        assert_eq!(DType::from_name("bf16"), None);
    }
}
