//! What is staged: the bytes that reach the buffers, on a card that is imagined.

use std::borrow::Cow;

use super::*;
use crate::weights::Checkpoint;
use crate::weights::write::{Entry, Made, Unit, write_checkpoint};

/// A tensor of bytes that say where they are.
struct Counted(usize, usize);

impl Counted {
    fn bytes(&self) -> Vec<u8> {
        (0..self.1).map(|i| ((i ^ i >> 8 ^ i >> 16) * 31 + self.0) as u8).collect()
    }
}

impl Unit for Counted {
    type Note = ();

    fn entries(&self) -> Vec<Entry> {
        vec![Entry { name: format!("t{}", self.0), dtype: DType::U8, shape: vec![self.1] }]
    }

    fn make(&self) -> Result<Made<'_, ()>> {
        Ok((vec![Cow::Owned(self.bytes())], ()))
    }
}

/// What was staged to the present buffer, by place.
type Staged = Vec<(usize, Vec<u8>)>;

#[track_caller]
fn check(buffer: &Pinned, staged: &mut Staged) {
    let mut end = 0;
    for (at, want) in staged.drain(..) {
        assert!(at >= end && at % ALIGN == 0);
        end = at + want.len();
        assert!(buffer.as_slice()[at..end] == want, "{} bytes at {at}", want.len());
    }
}

#[test]
fn what_is_staged_lies_in_the_buffers() {
    let dir = tempfile::tempdir().unwrap();
    let lengths = [1, 100, PIECE_BYTES, PIECE_BYTES + 1, 3 << 20, 5_000_001, 77, BUFFER_BYTES, 4096, 9 << 20];
    let tensors: Vec<Counted> =
        lengths.into_iter().cycle().take(30).enumerate().map(|(i, n)| Counted(i, n)).collect();
    write_checkpoint(dir.path(), &tensors, |_, _| Ok(()), |_, _| Ok(())).unwrap();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let device = Device::imagine(1 << 30);
    let mut uploader = Uploader { reads: true, ..Uploader::new(&device).unwrap() };
    let (mut staged, mut turn, mut turns) = (Staged::new(), 0, 0);
    for (i, counted) in tensors.iter().enumerate() {
        let want = counted.bytes();
        let (first, end) = (want.len() / 3, want.len());
        let at = if i % 4 == 3 {
            uploader.stage(end - first, 1, |place, out| {
                out.copy_from_slice(&want[first..][place]);
            })
        } else {
            uploader.stage_bytes(&checkpoint.get(&format!("t{i}")).unwrap(), first..end)
        };
        let at = at.unwrap() as usize;
        if uploader.turn != turn {
            // The other was read and sent before this one was begun.
            check(&uploader.buffers[turn], &mut staged);
            (turn, turns) = (uploader.turn, turns + 1);
        }
        staged.push((at, want[first..].to_vec()));
        if i == 17 {
            // The end of a part: the next goes on behind it.
            uploader.flush().unwrap();
            assert_eq!(uploader.sent, uploader.filled);
        }
    }
    uploader.flush().unwrap();
    check(&uploader.buffers[turn], &mut staged);
    assert!(turns > 5 && uploader.waiting.bytes.is_empty());
    assert_eq!(uploader.staging().unwrap(), 0);

    let error = uploader.room(BUFFER_BYTES + 1).unwrap_err().to_string();
    assert_eq!(error, "tensor: found 16777217; allowed: rows of up to 16777216 bytes");
}

#[test]
fn pieces_are_of_whole_units() {
    for (len, unit) in [(0, 7), (21, 7), (PIECE_BYTES * 3, 3 * 1024), (7 * PIECE_BYTES, PIECE_BYTES + 512)] {
        let len = len / unit * unit;
        let mut out = vec![0; len];
        fill_pieces(&mut out, unit, 5 * unit, |place, out| {
            assert!(place.start % unit == 0 && place.len() == out.len() && place.len() % unit == 0);
            for (i, out) in place.zip(out) {
                *out = (i / unit % 255) as u8 + 1;
            }
        });
        let want: Vec<u8> = (5 * unit..5 * unit + len).map(|i| (i / unit % 255) as u8 + 1).collect();
        assert!(out == want);
    }
}
