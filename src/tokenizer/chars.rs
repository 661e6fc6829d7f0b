//! Classes of characters: what the pre-tokenizer's pattern and NFC ask about a code point.
//!
//! The facts are those of the reference's own engines (`unicode.rs`), spread over one flat table so that a look-up
//! is one load. Knows no pattern alternatives and no tokens.

use super::unicode::RANGES;

/// What the pattern makes of one character. The values are the low bits of [`CharTable`]'s bytes.
pub(super) const OTHER: u8 = 0;
/// A character that joins words: `\p{L}`, and `\p{M}` where the pattern says so.
pub(super) const WORD: u8 = 1;
/// `\p{N}`
pub(super) const NUMBER: u8 = 2;
/// U+0020
pub(super) const SPACE: u8 = 3;
/// `\s` but neither U+0020 nor a line end
pub(super) const WHITE: u8 = 4;
/// `[\r\n]`
pub(super) const NEWLINE: u8 = 5;
/// No character: the end of the text.
pub(super) const END: u8 = 6;

const CLASS_BITS: u8 = 7;
/// Part in NFC, shifted down: neither changes, nor reorders, nor joins what stands before it.
pub(super) const NFC_TRIVIAL: u8 = 0;
/// A mark that can only reorder.
pub(super) const NFC_MARK: u8 = 1;
/// May change or compose.
pub(super) const NFC_SUSPECT: u8 = 2;
/// Trivial for the reference, whose tables are older than those of `unicode-normalization`.
pub(super) const NFC_INERT: u8 = 3;

/// Class and part in NFC of every code point.
pub(super) struct CharTable(Box<[u8]>);

impl CharTable {
    /// `marks_join`: whether `\p{M}` counts as a word character (the Qwen3.5 pattern) or as any other (Qwen2, Qwen3).
    pub(super) fn new(marks_join: bool) -> Self {
        let mut table = vec![0u8; 0x11_0000].into_boxed_slice();
        let ends = RANGES.iter().skip(1).map(|range| range.0).chain([0x11_0000]);
        for (&(start, value), end) in RANGES.iter().zip(ends) {
            let class = match value & CLASS_BITS {
                1 => WORD,
                2 if marks_join => WORD,
                3 => NUMBER,
                4 => WHITE,
                _ => OTHER,
            };
            table[start as usize..end as usize].fill(class | value & !CLASS_BITS);
        }
        table[0x20] = SPACE;
        table[0x0a] = NEWLINE;
        table[0x0d] = NEWLINE;
        CharTable(table)
    }

    /// Class of the character that starts at `at`, and its length in bytes; `(END, 0)` at the end.
    /// `text` is UTF-8 and `at` a character boundary.
    #[inline(always)]
    pub(super) fn class(&self, text: &[u8], at: usize) -> (u8, usize) {
        match text.get(at) {
            None => (END, 0),
            Some(&byte) if byte < 0x80 => (self.0[byte as usize] & CLASS_BITS, 1),
            Some(_) => {
                let (code, len) = decode(text, at);
                (self.0[code] & CLASS_BITS, len)
            }
        }
    }

    /// Part in NFC of the character that starts at `at`, and its length in bytes.
    #[inline(always)]
    pub(super) fn nfc_part(&self, text: &[u8], at: usize) -> (u8, usize) {
        let (code, len) = decode(text, at);
        (self.0[code] >> 3, len)
    }
}

/// The code point at `at`, a character boundary of the UTF-8 in `text`, and its length in bytes.
#[inline(always)]
pub(super) fn decode(text: &[u8], at: usize) -> (usize, usize) {
    let tail = &text[at..];
    let low = |i: usize| (tail.get(i).copied().unwrap_or(0) & 0x3f) as usize;
    let lead = tail[0] as usize;
    match lead {
        0..=0x7f => (lead, 1),
        0x80..=0xdf => ((lead & 0x1f) << 6 | low(1), 2),
        0xe0..=0xef => ((lead & 0x0f) << 12 | low(1) << 6 | low(2), 3),
        _ => (((lead & 0x07) << 18 | low(1) << 12 | low(2) << 6 | low(3)).min(0x10_ffff), 4),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use unicode_normalization::char::{canonical_combining_class, is_public_assigned};
    use unicode_normalization::{IsNormalized, is_nfc_quick};

    #[test]
    fn decoding_finds_every_code_point() {
        for c in '\0'..=char::MAX {
            let text = c.to_string();
            assert_eq!(decode(text.as_bytes(), 0), (c as usize, c.len_utf8()));
        }
    }

    #[test]
    fn classes_differ_from_std_only_where_unicode_versions_do() {
        let table = CharTable::new(true);
        for c in ('\0'..='\u{2fff}').filter(|&c| is_public_assigned(c)) {
            let text = c.to_string();
            let (class, _) = table.class(text.as_bytes(), 0);
            assert_eq!(matches!(class, SPACE | WHITE | NEWLINE), c.is_whitespace(), "{c:?}");
            if class == NUMBER {
                assert!(c.is_numeric(), "{c:?}");
            }
        }
    }

    /// A code point that the crate would touch must be known as such, or be marked inert.
    #[test]
    fn nfc_part_of_every_code_point() {
        let table = CharTable::new(true);
        for c in '\0'..=char::MAX {
            let text = c.to_string();
            let (part, _) = table.nfc_part(text.as_bytes(), 0);
            let touched =
                canonical_combining_class(c) != 0 || is_nfc_quick([c].into_iter()) != IsNormalized::Yes;
            assert!(!touched || part != NFC_TRIVIAL, "U+{:04X} is unknown to unicode.rs", c as u32);
        }
    }
}
