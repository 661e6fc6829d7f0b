//! Values of GGUF's metadata.

use std::fmt;
use std::ops::Range;

/// A value. Numbers of one sort are one, whatever their width in the file.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// Any integer.
    Integer(i128),
    /// 32 or 64 bits.
    Float(f64),
    /// `true` or `false`.
    Bool(bool),
    /// UTF-8.
    Text(String),
    /// Numbers, or texts.
    List(List),
}

/// A list that is still in its file.
#[derive(Debug, Clone, PartialEq)]
pub struct List {
    pub(super) kind: Kind,
    pub(super) len: usize,
    /// The bytes of its items.
    pub(super) range: Range<usize>,
}

/// What a value is, in the order of the format's numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    Text,
    List,
    U64,
    I64,
    F64,
}

impl Kind {
    pub fn from_number(number: u32) -> Option<Self> {
        use Kind::*;
        const ALL: [Kind; 13] = [U8, I8, U16, I16, U32, I32, F32, Bool, Text, List, U64, I64, F64];
        ALL.get(usize::try_from(number).ok()?).copied()
    }

    /// Bytes of an item; of a text, those of its length.
    pub fn size(self) -> usize {
        match self {
            Kind::U8 | Kind::I8 | Kind::Bool => 1,
            Kind::U16 | Kind::I16 => 2,
            Kind::U32 | Kind::I32 | Kind::F32 => 4,
            Kind::Text | Kind::List | Kind::U64 | Kind::I64 | Kind::F64 => 8,
        }
    }

    /// A number of [`Kind::size`] bytes; `None` for a bool that is neither 0 nor 1, and for what is no number.
    pub fn read(self, bytes: &[u8]) -> Option<Value> {
        let mut wide = [0; 8];
        wide.get_mut(..bytes.len())?.copy_from_slice(bytes);
        let bits = u64::from_le_bytes(wide);
        // Bits above the size are zero; a cast of what is signed extends its sign.
        Some(match self {
            Kind::U8 | Kind::U16 | Kind::U32 | Kind::U64 => Value::Integer(bits.into()),
            Kind::I8 => Value::Integer((bits as i8).into()),
            Kind::I16 => Value::Integer((bits as i16).into()),
            Kind::I32 => Value::Integer((bits as i32).into()),
            Kind::I64 => Value::Integer((bits as i64).into()),
            Kind::F32 => Value::Float(f32::from_bits(bits as u32).into()),
            Kind::F64 => Value::Float(f64::from_bits(bits)),
            Kind::Bool if bits > 1 => return None,
            Kind::Bool => Value::Bool(bits == 1),
            Kind::Text | Kind::List => return None,
        })
    }
}

impl List {
    /// Its numbers; `None` for a list of texts, and where a bool is neither 0 nor 1. `bytes` are those of the file.
    pub(super) fn numbers(&self, bytes: &[u8]) -> Option<Vec<Value>> {
        bytes[self.range.clone()].chunks_exact(self.kind.size()).map(|item| self.kind.read(item)).collect()
    }

    /// Its texts, which were checked; nothing for a list of numbers.
    pub(super) fn texts<'a>(&self, bytes: &'a [u8]) -> Option<impl Iterator<Item = &'a str>> {
        let mut rest = &bytes[self.range.clone()];
        let next = move || {
            let (len, after) = rest.split_first_chunk::<8>()?;
            let (text, after) = after.split_at_checked(usize::try_from(u64::from_le_bytes(*len)).ok()?)?;
            rest = after;
            std::str::from_utf8(text).ok()
        };
        (self.kind == Kind::Text).then(|| std::iter::from_fn(next))
    }
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const MAX_CHARS: usize = 80;
        match self {
            Value::Integer(n) => write!(f, "{n}"),
            Value::Float(x) => write!(f, "{x}"),
            Value::Bool(x) => write!(f, "{x}"),
            Value::Text(text) => match text.char_indices().nth(MAX_CHARS) {
                Some((end, _)) => write!(f, "{:?}...", &text[..end]),
                None => write!(f, "{text:?}"),
            },
            Value::List(list) => write!(f, "a list of {} items of {:?}", list.len, list.kind),
        }
    }
}
