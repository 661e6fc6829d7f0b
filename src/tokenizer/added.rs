//! Added tokens: finding them in text before anything else is done to it, as the reference does.
//!
//! The leftmost match wins, and of those the longest; a match that is not wanted is skipped whole.

use super::AddedToken;

/// Finds added tokens in text.
#[derive(Default)]
pub(super) struct Matcher {
    tokens: Vec<Pattern>,
    /// Whether a token starts with this byte.
    first: Vec<bool>,
    /// The bytes that tokens start with, where there are at most three.
    few: Vec<u8>,
}

struct Pattern {
    text: String,
    id: u32,
    lstrip: bool,
    rstrip: bool,
    special: bool,
}

/// A match: the text it covers, what it strips included.
#[derive(Debug, PartialEq)]
pub(super) struct Match {
    pub(super) start: usize,
    pub(super) end: usize,
    pub(super) id: u32,
}

impl Matcher {
    pub(super) fn new<'a>(tokens: impl Iterator<Item = &'a AddedToken>) -> Self {
        let mut matcher = Matcher { tokens: Vec::new(), first: vec![false; 256], few: Vec::new() };
        for token in tokens {
            let AddedToken { id, lstrip, rstrip, special, .. } = *token;
            let text = token.content.clone();
            if let Some(&byte) = text.as_bytes().first() {
                matcher.first[byte as usize] = true;
                matcher.tokens.push(Pattern { text, id, lstrip, rstrip, special });
            }
        }
        // The longest first; of equals the special one, which the reference lists first.
        matcher.tokens.sort_by_key(|token| (std::cmp::Reverse(token.text.len()), !token.special));
        let bytes: Vec<u8> = (0..=255).filter(|&byte| matcher.first[byte as usize]).collect();
        if bytes.len() <= 3 {
            matcher.few = bytes;
        }
        matcher
    }

    pub(super) fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// Calls `each` for every match, in order. With `plain_special` special tokens are passed over as text.
    pub(super) fn matches(&self, text: &str, plain_special: bool, mut each: impl FnMut(Match)) {
        let (mut at, mut done) = (0, 0);
        while let Some(start) = self.candidate(text.as_bytes(), at) {
            let Some(token) =
                self.tokens.iter().find(|t| text.as_bytes()[start..].starts_with(t.text.as_bytes()))
            else {
                at = start + 1;
                continue;
            };
            let end = start + token.text.len();
            at = end;
            if plain_special && token.special {
                continue;
            }
            let strip_start = if token.lstrip { text[..start].trim_end().len().max(done) } else { start };
            let strip_end = if token.rstrip { text.len() - text[end..].trim_start().len() } else { end };
            each(Match { start: strip_start, end: strip_end, id: token.id });
            done = strip_end;
        }
    }

    /// First place at or after `at` where a token may start.
    fn candidate(&self, text: &[u8], at: usize) -> Option<usize> {
        let tail = text.get(at..)?;
        let found = match *self.few {
            [a] => memchr::memchr(a, tail),
            [a, b] => memchr::memchr2(a, b, tail),
            [a, b, c] => memchr::memchr3(a, b, c, tail),
            _ => tail.iter().position(|&byte| self.first.get(byte as usize) == Some(&true)),
        };
        found.map(|offset| at + offset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(text: &str, id: u32, special: bool, strip: (bool, bool)) -> AddedToken {
        AddedToken {
            id,
            content: text.into(),
            special,
            lstrip: strip.0,
            rstrip: strip.1,
            normalized: false,
            single_word: false,
        }
    }

    fn found(tokens: &[AddedToken], text: &str, plain_special: bool) -> Vec<(usize, usize, u32)> {
        let matcher = Matcher::new(tokens.iter());
        let mut out = Vec::new();
        matcher.matches(text, plain_special, |m| out.push((m.start, m.end, m.id)));
        out
    }

    #[test]
    fn leftmost_then_longest() {
        let tokens = [
            token("<a", 1, true, (false, false)),
            token("<a>b", 2, false, (false, false)),
            token("b<", 3, true, (false, false)),
        ];
        assert_eq!(found(&tokens, "x<a>b<a", false), [(1, 5, 2), (5, 7, 1)]);
        assert_eq!(found(&tokens, "b<a>b", false), [(0, 2, 3)]);
        // A special token that is passed over still covers its text.
        assert_eq!(found(&tokens, "b<a>b", true), []);
        assert_eq!(found(&tokens, "<a<a>b", true), [(2, 6, 2)]);
    }

    #[test]
    fn stripping_takes_white_space_but_not_what_is_taken() {
        let tokens = [token("<s>", 1, true, (true, true)), token("<l>", 2, true, (true, false))];
        assert_eq!(found(&tokens, "a \n<s>\u{3000}b", false), [(1, 9, 1)]);
        assert_eq!(found(&tokens, "<s>  <l>", false), [(0, 5, 1), (5, 8, 2)]);
    }
}
