//! Types of GGUF's tensors: which number means which, and how large its blocks are.

use std::fmt;

/// A type that this crate reads. The others are known by name only.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[allow(non_camel_case_types)] // the format's own spelling
pub enum TensorType {
    /// 32-bit float.
    F32,
    /// 16-bit IEEE float.
    F16,
    /// bfloat16.
    BF16,
    /// 8-bit integers, a scale for 32.
    Q8_0,
    /// 4-bit integers, a scale for 32.
    Q4_0,
    /// 4-bit integers, a scale and a minimum for 32, in 6 bits.
    Q4_K,
    /// 5-bit integers, a scale and a minimum for 32, in 6 bits.
    Q5_K,
    /// 6-bit integers, a scale for 16, in 8 bits.
    Q6_K,
}

/// Type, number, name, elements of a block, bytes of a block; in the order of the declaration.
const KNOWN: [(TensorType, u32, &str, usize, usize); 8] = [
    (TensorType::F32, 0, "F32", 1, 4),
    (TensorType::F16, 1, "F16", 1, 2),
    (TensorType::BF16, 30, "BF16", 1, 2),
    (TensorType::Q8_0, 8, "Q8_0", 32, 34),
    (TensorType::Q4_0, 2, "Q4_0", 32, 18),
    (TensorType::Q4_K, 12, "Q4_K", 256, 144),
    (TensorType::Q5_K, 13, "Q5_K", 256, 176),
    (TensorType::Q6_K, 14, "Q6_K", 256, 210),
];

/// Numbers and names of the rest (`ggml_type` of ggml.h).
const OTHERS: [(u32, &str); 27] = [
    (3, "Q4_1"),
    (6, "Q5_0"),
    (7, "Q5_1"),
    (9, "Q8_1"),
    (10, "Q2_K"),
    (11, "Q3_K"),
    (15, "Q8_K"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (20, "IQ4_NL"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (23, "IQ4_XS"),
    (24, "I8"),
    (25, "I16"),
    (26, "I32"),
    (27, "I64"),
    (28, "F64"),
    (29, "IQ1_M"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (39, "MXFP4"),
    (40, "NVFP4"),
    (41, "Q1_0"),
    (42, "Q2_0"),
];

impl TensorType {
    /// The type of a number; or what the number is called.
    pub(super) fn from_number(number: u32) -> Result<Self, String> {
        if let Some(row) = KNOWN.iter().find(|row| row.1 == number) {
            return Ok(row.0);
        }
        match OTHERS.iter().find(|(other, _)| *other == number) {
            Some((_, name)) => Err(format!("type {name}")),
            None => Err(format!("type number {number}, which is not known")),
        }
    }

    /// The names of all of them.
    pub(super) fn names() -> String {
        let names: Vec<_> = KNOWN.iter().map(|row| row.2).collect();
        names.join(", ")
    }

    /// The format's name of the type.
    pub fn name(self) -> &'static str {
        KNOWN[self as usize].2
    }

    /// Elements of a block.
    pub fn block_len(self) -> usize {
        KNOWN[self as usize].3
    }

    /// Bytes of a block.
    pub fn block_bytes(self) -> usize {
        KNOWN[self as usize].4
    }

    /// Whether its elements are codes and not floats.
    pub fn is_quantised(self) -> bool {
        self.block_len() > 1
    }
}

impl fmt::Display for TensorType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::{KNOWN, OTHERS, TensorType};

    #[test]
    fn the_table_is_in_order_of_declaration_and_numbers_are_one() {
        for (i, row) in KNOWN.iter().enumerate() {
            assert_eq!((row.0 as usize, format!("{:?}", row.0)), (i, row.2.to_string()));
            assert_eq!(TensorType::from_number(row.1), Ok(row.0));
        }
        let mut numbers: Vec<u32> =
            KNOWN.iter().map(|row| row.1).chain(OTHERS.iter().map(|row| row.0)).collect();
        numbers.sort_unstable();
        numbers.dedup();
        assert_eq!(numbers.len(), KNOWN.len() + OTHERS.len());
        assert_eq!(TensorType::from_number(10), Err("type Q2_K".to_string()));
        assert_eq!(TensorType::from_number(99), Err("type number 99, which is not known".to_string()));
    }
}
