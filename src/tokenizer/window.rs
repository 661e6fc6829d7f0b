//! The pre-tokenizer over 64 bytes at once: one bit per byte and class, and the starts of pieces by bit arithmetic.
//!
//! A window begins where a piece begins, so that nothing has to be carried from one to the next. It answers only for
//! ASCII and only as far as it can see; `split.rs` decides everything else, and is what this must equal.

use super::split::contraction_end;

/// Bytes in a window.
pub(super) const WINDOW: usize = 64;

/// `starts(window, len)`: bit i is set where a piece starts at byte i of the first `len` bytes, as far as that is
/// certain. Bit 0 is always set; what follows the last set bit is undecided. Also the length of the ASCII prefix.
pub(super) type Starts = fn(&[u8; WINDOW], usize) -> (u64, usize);

/// One bit per byte for each class; bits of bytes that are not ASCII are set in `non_ascii` alone.
struct Masks {
    word: u64,
    number: u64,
    space: u64,
    white: u64,
    newline: u64,
    apostrophe: u64,
    non_ascii: u64,
}

/// The fastest version that this machine can run.
pub(super) fn starts_for_this_machine() -> Starts {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512bw") && is_x86_feature_detected!("bmi2") {
            return |window, len| {
                // SAFETY: the features were detected on the line above.
                unsafe { x86::starts_avx512(window, len) }
            };
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("bmi2") {
            return |window, len| {
                // SAFETY: the features were detected on the line above.
                unsafe { x86::starts_avx2(window, len) }
            };
        }
    }
    starts_portable
}

fn starts_portable(window: &[u8; WINDOW], len: usize) -> (u64, usize) {
    let mut masks = Masks { word: 0, number: 0, space: 0, white: 0, newline: 0, apostrophe: 0, non_ascii: 0 };
    for (i, &byte) in window.iter().enumerate() {
        let bit = |condition: bool| u64::from(condition) << i;
        masks.word |= bit(byte.is_ascii_alphabetic());
        masks.number |= bit(byte.is_ascii_digit());
        masks.space |= bit(byte == b' ');
        masks.white |= bit(matches!(byte, b'\t' | 0x0b | 0x0c));
        masks.newline |= bit(matches!(byte, b'\n' | b'\r'));
        masks.apostrophe |= bit(byte == b'\'');
        masks.non_ascii |= bit(byte >= 0x80);
    }
    starts(&masks, window, len)
}

/// The pattern, on masks. Names: `x << 1` is "the byte before is x", `x >> 1` "the byte after is x".
#[inline(always)]
fn starts(masks: &Masks, window: &[u8; WINDOW], len: usize) -> (u64, usize) {
    let len = len.min(masks.non_ascii.trailing_zeros() as usize);
    if len == 0 {
        return (1, 0);
    }
    let valid = u64::MAX >> (WINDOW - len);
    let &Masks { word, number, space, white, newline, .. } = masks;
    let (word, number, newline) = (word & valid, number & valid, newline & valid);
    let blank = (space | white) & valid;
    let gap = blank | newline;
    let other = valid & !(word | number | gap);

    // A symbol alone and with no space before it goes with the word after it, unless it is a contraction.
    let first_other = other & !(other << 1) & !(space << 1);
    let prefix = first_other & !(other >> 1);
    let mut forced = 0;
    let mut quotes = prefix & masks.apostrophe & (word >> 1);
    while quotes != 0 {
        let at = quotes.trailing_zeros() as usize;
        if let Some(end) = contraction_end(&window[..len], at + 1) {
            forced |= 1u64.checked_shl(end as u32).unwrap_or(0);
        }
        quotes &= quotes - 1;
    }
    let word_starts = word & !((word | blank | prefix) << 1);

    // Line ends right after symbols belong to them; the rest of the white space forms runs.
    let taken = newline & !newline.wrapping_add(newline & !(newline << 1) & (other << 1));
    let run = gap & !taken;
    let run_starts = run & !(run << 1);
    // The last blank before something else starts a piece; so does the first blank after the run's last line end.
    let last_blank = blank & !(gap >> 1) & (valid >> 1);
    let mut after_newline = blank & ((newline & !taken) << 1);
    let ends_in_newline = after_newline.wrapping_add(blank) & !blank & newline;
    if ends_in_newline != 0 {
        let (mut covered, mut through) = (ends_in_newline >> 1 & blank, blank);
        for shift in [1, 2, 4, 8, 16, 32] {
            covered |= through & covered >> shift;
            through &= through >> shift;
        }
        after_newline &= !covered;
    }

    let starts = 1 | word_starts | number | first_other | run_starts | last_blank | after_newline | forced;
    // Beyond the last byte that is not white space, a start depends on what the window does not show.
    let seen = valid & !gap;
    let known = if seen == 0 { 1 } else { u64::MAX >> seen.leading_zeros() };
    (starts & known, len)
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Masks, WINDOW, starts};
    use std::arch::x86_64::*;

    #[target_feature(enable = "avx512bw,avx512f,bmi1,bmi2,lzcnt,popcnt")]
    pub(super) fn starts_avx512(window: &[u8; WINDOW], len: usize) -> (u64, usize) {
        // SAFETY: the load is unaligned and the window has the 64 bytes that it reads.
        let bytes = unsafe { _mm512_loadu_si512(window.as_ptr().cast()) };
        let is = |byte: u8| _mm512_cmpeq_epi8_mask(bytes, _mm512_set1_epi8(byte as i8));
        let within = |v: __m512i, from: u8, count: u8| {
            _mm512_cmplt_epu8_mask(
                _mm512_sub_epi8(v, _mm512_set1_epi8(from as i8)),
                _mm512_set1_epi8(count as i8),
            )
        };
        let newline = is(b'\n') | is(b'\r');
        let masks = Masks {
            word: within(_mm512_or_si512(bytes, _mm512_set1_epi8(0x20)), b'a', 26),
            number: within(bytes, b'0', 10),
            space: is(b' '),
            white: within(bytes, b'\t', 5) & !newline,
            newline,
            apostrophe: is(b'\''),
            non_ascii: _mm512_movepi8_mask(bytes),
        };
        starts(&masks, window, len)
    }

    #[target_feature(enable = "avx2,bmi1,bmi2,lzcnt,popcnt")]
    pub(super) fn starts_avx2(window: &[u8; WINDOW], len: usize) -> (u64, usize) {
        // SAFETY: the loads are unaligned and the window has the 64 bytes that they read.
        let (low, high) = unsafe {
            let at = window.as_ptr();
            (_mm256_loadu_si256(at.cast()), _mm256_loadu_si256(at.add(32).cast()))
        };
        let bits = |a: __m256i, b: __m256i| {
            u64::from(_mm256_movemask_epi8(a) as u32) | u64::from(_mm256_movemask_epi8(b) as u32) << 32
        };
        let is = |byte: u8| {
            let byte = _mm256_set1_epi8(byte as i8);
            bits(_mm256_cmpeq_epi8(low, byte), _mm256_cmpeq_epi8(high, byte))
        };
        // x - from <= count - 1 without a sign: min(x - from, count - 1) == x - from
        let within = |a: __m256i, b: __m256i, from: u8, count: u8| {
            let (from, most) = (_mm256_set1_epi8(from as i8), _mm256_set1_epi8(count as i8 - 1));
            let (a, b) = (_mm256_sub_epi8(a, from), _mm256_sub_epi8(b, from));
            bits(
                _mm256_cmpeq_epi8(_mm256_min_epu8(a, most), a),
                _mm256_cmpeq_epi8(_mm256_min_epu8(b, most), b),
            )
        };
        let lower = _mm256_set1_epi8(0x20);
        let newline = is(b'\n') | is(b'\r');
        let masks = Masks {
            word: within(_mm256_or_si256(low, lower), _mm256_or_si256(high, lower), b'a', 26),
            number: within(low, high, b'0', 10),
            space: is(b' '),
            white: within(low, high, b'\t', 5) & !newline,
            newline,
            apostrophe: is(b'\''),
            non_ascii: bits(low, high),
        };
        starts(&masks, window, len)
    }
}

#[cfg(test)]
mod tests {
    use super::super::chars::CharTable;
    use super::super::split::next_piece;
    use super::*;
    use proptest::prelude::*;

    fn versions() -> Vec<Starts> {
        let mut all: Vec<Starts> = vec![starts_portable, starts_for_this_machine()];
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("bmi2") {
            // SAFETY: the features were detected.
            all.push(|window, len| unsafe { x86::starts_avx2(window, len) });
        }
        all
    }

    fn check(text: &str) {
        let chars = CharTable::new(true);
        let mut window = [0; WINDOW];
        let len = text.len().min(WINDOW);
        window[..len].copy_from_slice(&text.as_bytes()[..len]);
        for starts in versions() {
            let (bits, ascii) = starts(&window, len);
            assert_eq!(ascii, text.bytes().take(len).take_while(u8::is_ascii).count());
            let last = 63 - bits.leading_zeros() as usize;
            let (mut at, mut expected) = (0, 0u64);
            while at <= last {
                expected |= 1 << at;
                at = next_piece(&chars, text.as_bytes(), at);
                if at >= text.len() {
                    break;
                }
            }
            assert_eq!(bits, expected, "{text:?}: {bits:b} instead of {expected:b}");
        }
    }

    #[test]
    fn plain_cases() {
        for text in [
            "a",
            " ",
            "\n",
            "a b",
            "if x:\n        return 'it''s'\n\n  \n  y = [1,  22]\n",
            "é",
            "aé",
            "'s'll've",
        ] {
            check(text);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4000))]
        #[test]
        fn equals_the_pattern(text in "[ab's t\\n\\r\\t(.;1LlreRVEſé]{0,90}") {
            check(&text);
        }
        #[test]
        fn equals_the_pattern_on_white_space(text in "[ \\n\\ta.]{0,90}") {
            check(&text);
        }
    }
}
