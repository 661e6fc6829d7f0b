//! Merging against the plain definition.

use super::*;
use proptest::prelude::*;
use std::collections::HashMap;

/// The definition, word for word.
fn plain(merges: &[(u32, u32, u32)], piece: &[u8]) -> Vec<u32> {
    let ranks: HashMap<_, _> = merges.iter().enumerate().map(|(rank, m)| ((m.0, m.1), (rank, m.2))).collect();
    let mut ids: Vec<u32> = piece.iter().map(|&byte| byte.into()).collect();
    let best = |ids: &[u32]| {
        let ranked =
            ids.windows(2).enumerate().filter_map(|(i, p)| ranks.get(&(p[0], p[1])).map(|m| (*m, i)));
        ranked.min_by_key(|((rank, _), i)| (*rank, *i))
    };
    while let Some(((_, made), at)) = best(&ids) {
        ids[at] = made;
        ids.remove(at + 1);
    }
    ids
}

fn encoder(merges: &[(u32, u32, u32)]) -> Merges {
    {
        let mut tokens: Vec<Vec<u8>> = (0..=255).map(|byte| vec![byte]).collect();
        for merge in merges {
            let made = [tokens[merge.0 as usize].as_slice(), &tokens[merge.1 as usize]].concat();
            tokens.resize(tokens.len().max(merge.2 as usize + 1), Vec::new());
            tokens[merge.2 as usize] = made;
        }
        Merges::new(std::array::from_fn(|i| i as u32), merges, |id| &tokens[id as usize])
    }
}

/// Random merges over the letters a, b, c: each joins two ids that exist by then; pairs may repeat.
fn merges() -> impl Strategy<Value = Vec<(u32, u32, u32)>> {
    prop::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>()), 0..24).prop_map(
        |picks| {
            let mut ids: Vec<u32> = vec![97, 98, 99];
            let mut merges: Vec<(u32, u32, u32)> = Vec::new();
            for (left, right) in picks {
                let (left, right) = (ids[left.index(ids.len())], ids[right.index(ids.len())]);
                let made = merges
                    .iter()
                    .find(|m| (m.0, m.1) == (left, right))
                    .map_or(256 + merges.len() as u32, |m| m.2);
                merges.push((left, right, made));
                ids.push(made);
            }
            merges
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]
    #[test]
    fn both_paths_follow_the_definition(merges in merges(), piece in "[abc]{0,40}") {
        let encoder = encoder(&merges);
        let expected = plain(&merges, piece.as_bytes());
        let (mut short, mut long) = (Vec::new(), Vec::new());
        let mut scratch = MergeScratch::default();
        // Many pieces at a time, so that lanes fill and refill.
        let text = piece.repeat(3);
        let cuts: Vec<_> = (0..=piece.len()).flat_map(|n| [(0, n), (0, piece.len())]).collect();
        let mut spans = Vec::new();
        encoder.encode(text.as_bytes(), cuts.iter().copied(), &mut scratch, &mut short, &mut spans);
        for (cut, span) in cuts.iter().zip(&spans) {
            prop_assert_eq!(&short[span.0 as usize..span.1 as usize], plain(&merges, &piece.as_bytes()[..cut.1]));
        }
        encoder.encode_long(piece.as_bytes(), &mut scratch, &mut long);
        prop_assert_eq!(&long, &expected);
    }
}

/// Random merges over the bytes of é, è, 日 and a space.
fn byte_merges() -> impl Strategy<Value = Vec<(u32, u32, u32)>> {
    prop::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>()), 0..24).prop_map(
        |picks| {
            let mut tokens: Vec<Vec<u8>> = (0..=255).map(|byte| vec![byte]).collect();
            let mut ids: Vec<u32> = vec![0x20, 0xc3, 0xa9, 0xa8, 0xe6, 0x97, 0xa5];
            let mut merges: Vec<(u32, u32, u32)> = Vec::new();
            for (left, right) in picks {
                let (left, right) = (ids[left.index(ids.len())], ids[right.index(ids.len())]);
                let bytes = [tokens[left as usize].as_slice(), &tokens[right as usize]].concat();
                let made = tokens.iter().position(|token| *token == bytes).unwrap_or_else(|| {
                    tokens.push(bytes);
                    ids.push(tokens.len() as u32 - 1);
                    tokens.len() - 1
                });
                merges.push((left, right, made as u32));
            }
            merges
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]
    #[test]
    fn characters_that_start_whole_change_nothing(merges in byte_merges(), piece in "[éè日 ]{0,12}") {
        let encoder = encoder(&merges);
        let expected = plain(&merges, piece.as_bytes());
        let (mut short, mut long, mut spans) = (Vec::new(), Vec::new(), Vec::new());
        let mut scratch = MergeScratch::default();
        encoder.encode(piece.as_bytes(), [(0, piece.len())].into_iter(), &mut scratch, &mut short, &mut spans);
        encoder.encode_long(piece.as_bytes(), &mut scratch, &mut long);
        prop_assert_eq!(&short, &expected);
        prop_assert_eq!(&long, &expected);
    }
}

#[test]
fn a_pair_listed_twice_takes_its_later_rank() {
    let merges = [(97, 98, 256), (98, 97, 257), (97, 98, 256)];
    let mut out = Vec::new();
    encoder(&merges).encode(
        b"aba",
        [(0, 3)].into_iter(),
        &mut MergeScratch::default(),
        &mut out,
        &mut Vec::new(),
    );
    assert_eq!(out, [97, 257]);
}

/// è joins the byte before it at a lower rank than the one that makes it: of two in a row the left one is made first.
#[test]
fn a_character_used_before_it_is_made_does_not_start_whole() {
    let merges = [(0xc3, 0xa8, 256), (0xa8, 256, 257), (0xc3, 0xa8, 256)];
    let (mut out, text) = (Vec::new(), "èè".as_bytes());
    let mut scratch = MergeScratch::default();
    encoder(&merges).encode(text, [(0, 4)].into_iter(), &mut scratch, &mut out, &mut Vec::new());
    assert_eq!((&out, out.as_slice()), (&plain(&merges, text), &[256, 256][..]));
}
