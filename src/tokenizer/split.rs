//! The pre-tokenizer: where one piece of text ends and the next begins.
//!
//! The pattern of the family, with `L` standing for `\p{L}\p{M}` (Qwen3.5) or `\p{L}` (Qwen2, Qwen3):
//!
//! ```text
//! (?i:'s|'t|'re|'ve|'m|'ll|'d) | [^\r\n L N]? L+ | N | ?[^\s L N]+[\r\n]* | \s*[\r\n]+ | \s+(?!\S) | \s+
//! ```
//!
//! `next_piece` is that pattern, exactly, for any text. `window.rs` finds the same ends 64 ASCII bytes at a time.

use super::chars::{CharTable, END, NEWLINE, NUMBER, OTHER, SPACE, WHITE, WORD};

/// End of the piece that starts at `start`, which is before the end of `text` and where a piece ends or text begins.
#[inline]
pub(super) fn next_piece(chars: &CharTable, text: &[u8], start: usize) -> usize {
    let (class, len) = chars.class(text, start);
    let second = start + len;
    match class {
        WORD => word_end(chars, text, second),
        NUMBER => second,
        OTHER => {
            if text[start] == b'\''
                && let Some(end) = contraction_end(text, second)
            {
                return end;
            }
            match chars.class(text, second) {
                (WORD, len) => word_end(chars, text, second + len),
                _ => symbols_end(chars, text, second),
            }
        }
        SPACE | WHITE => match chars.class(text, second) {
            (WORD, len) => word_end(chars, text, second + len),
            (OTHER, len) if class == SPACE => symbols_end(chars, text, second + len),
            _ => white_end(chars, text, start),
        },
        _ => white_end(chars, text, start),
    }
}

/// `L*`
fn word_end(chars: &CharTable, text: &[u8], mut at: usize) -> usize {
    loop {
        let (class, len) = chars.class(text, at);
        if class != WORD {
            return at;
        }
        at += len;
    }
}

/// `[^\s L N]*[\r\n]*`
fn symbols_end(chars: &CharTable, text: &[u8], mut at: usize) -> usize {
    loop {
        let (class, len) = chars.class(text, at);
        if class != OTHER {
            break;
        }
        at += len;
    }
    while at < text.len() && matches!(text[at], b'\r' | b'\n') {
        at += 1;
    }
    at
}

/// `\s*[\r\n]+ | \s+(?!\S) | \s+` at the start of a run of white space.
fn white_end(chars: &CharTable, text: &[u8], start: usize) -> usize {
    let (mut at, mut last, mut after_newline) = (start, start, None);
    loop {
        let (class, len) = chars.class(text, at);
        match class {
            SPACE | WHITE => {}
            NEWLINE => after_newline = Some(at + len),
            _ => {
                return match after_newline {
                    Some(end) => end,
                    // The last one of several goes with what follows it.
                    None if class != END && last > start => last,
                    None => at,
                };
            }
        }
        last = at;
        at += len;
    }
}

/// End of `(?i:s|t|re|ve|m|ll|d)` at `at`. Under Unicode case folding the long s is an s.
pub(super) fn contraction_end(text: &[u8], at: usize) -> Option<usize> {
    let lower = |i: usize| text.get(i).map_or(0, |byte| byte | 0x20);
    match lower(at) {
        b's' | b't' | b'm' | b'd' => Some(at + 1),
        b'r' | b'v' if lower(at + 1) == b'e' => Some(at + 2),
        b'l' if lower(at + 1) == b'l' => Some(at + 2),
        _ if text[at..].starts_with("\u{17f}".as_bytes()) => Some(at + 2),
        _ => None,
    }
}

#[cfg(test)]
pub(super) fn pieces<'a>(chars: &CharTable, text: &'a str) -> Vec<&'a str> {
    let (mut at, mut out) = (0, Vec::new());
    while at < text.len() {
        let end = next_piece(chars, text.as_bytes(), at);
        out.push(&text[at..end]);
        at = end;
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_alternative_of_the_pattern() {
        let chars = CharTable::new(true);
        for (text, expected) in [
            ("don't I'LL 'ſa", vec!["don", "'t", " I", "'LL", " '", "ſa"]),
            ("'ſa", vec!["'ſ", "a"]),
            ("'some 'some", vec!["'s", "ome", " '", "some"]),
            ("(foo ((foo", vec!["(foo", " ((", "foo"]),
            ("12 3", vec!["1", "2", " ", "3"]),
            ("a  b", vec!["a", " ", " b"]),
            ("a \t1", vec!["a", " ", "\t", "1"]),
            ("\t\tx", vec!["\t", "\tx"]),
            ("\t(", vec!["\t", "("]),
            ("a  ", vec!["a", "  "]),
            ("x;\r\n\n  y", vec!["x", ";\r\n\n", " ", " y"]),
            ("x \n \n  y", vec!["x", " \n \n", " ", " y"]),
            ("x;\n \n y", vec!["x", ";\n", " \n", " y"]),
            ("\u{301}a \u{301}", vec!["\u{301}a", " \u{301}"]),
            ("\u{a0}x\u{3000}", vec!["\u{a0}x", "\u{3000}"]),
        ] {
            assert_eq!(pieces(&chars, text), expected, "{text:?}");
        }
    }

    #[test]
    fn marks_are_symbols_in_the_older_pattern() {
        let chars = CharTable::new(false);
        assert_eq!(pieces(&chars, "e\u{301}e"), ["e", "\u{301}e"]);
    }
}
