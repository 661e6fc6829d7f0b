//! Which ways there are, from what ranks say of their cards.

use super::{Way, ways};
use crate::backend::cuda::peers::Card;
use crate::ranks::Collectives;

/// Ranks by host, process and card.
fn cards(ranks: &[(&str, u32, u8)]) -> Vec<Card> {
    ranks
        .iter()
        .map(|&(host, process, card)| Card::named(format!("{host} {process}"), 0, [card; 16]))
        .collect()
}

fn refused(ranks: &[(&str, u32, u8)], wish: Collectives, deterministic: bool) -> String {
    ways(&cards(ranks), wish, deterministic).unwrap_err().to_string()
}

const THREADS: [(&str, u32, u8); 2] = [("a", 1, 1), ("a", 1, 2)];
const PROCESSES: [(&str, u32, u8); 2] = [("a", 1, 1), ("a", 2, 2)];
const ONE_CARD: [(&str, u32, u8); 2] = [("a", 1, 1), ("a", 1, 1)];
const HOSTS: [(&str, u32, u8); 4] = [("a", 1, 1), ("a", 2, 2), ("b", 1, 3), ("b", 2, 4)];

#[test]
fn memory_that_all_address_is_preferred_where_all_are_on_one_host() {
    for ranks in [&THREADS, &PROCESSES] {
        let found = |wish| ways(&cards(ranks), wish, false).unwrap();
        assert_eq!(found(Collectives::Auto), [Way::Direct, Way::Nccl]);
        assert_eq!(found(Collectives::Direct), [Way::Direct]);
        assert_eq!(found(Collectives::Nccl), [Way::Nccl]);
    }
}

#[test]
fn ranks_that_have_one_card_are_not_given_to_nccl() {
    assert_eq!(ways(&cards(&ONE_CARD), Collectives::Auto, false).unwrap(), [Way::Direct]);
    let error = refused(&ONE_CARD, Collectives::Nccl, false);
    assert!(
        error.starts_with("cuda: ranks 0 and 1 have one card, and NCCL wants one for each; allowed: "),
        "{error}"
    );
}

#[test]
fn hosts_are_joined_by_nccl() {
    assert_eq!(ways(&cards(&HOSTS), Collectives::Auto, false).unwrap(), [Way::Nccl]);
    let error = refused(&HOSTS, Collectives::Direct, false);
    assert!(error.starts_with("cuda: rank 0 is on a, rank 2 on b; allowed: "), "{error}");
    assert!(error.contains("QWEN35RS_COLLECTIVES=direct"), "{error}");
    let error = refused(&[("a", 1, 1), ("a", 2, 1), ("b", 1, 3)], Collectives::Auto, false);
    assert!(error.starts_with("cuda: rank 0 is on a, rank 2 on b; ranks 0 and 1 have one card"), "{error}");
}

#[test]
fn more_ranks_than_address_each_other_go_by_nccl() {
    let many: Vec<_> = (0..9).map(|rank| ("a", rank, rank as u8)).collect();
    assert_eq!(ways(&cards(&many[..8]), Collectives::Auto, false).unwrap()[0], Way::Direct);
    assert_eq!(ways(&cards(&many), Collectives::Auto, false).unwrap(), [Way::Nccl]);
    assert!(refused(&many, Collectives::Direct, false).starts_with("cuda: 9 ranks: more than 8 "));
}

#[test]
fn sums_whose_order_follows_the_batch_are_not_deterministic() {
    // Two are added up in one way only.
    let two = cards(&[("a", 1, 1), ("b", 1, 2)]);
    assert_eq!(ways(&two, Collectives::Auto, true).unwrap(), [Way::Nccl]);
    assert!(refused(&HOSTS, Collectives::Auto, true).contains("deterministic=True"));
}
