//! Why a layout is taken, or none, in sentences.

use super::layout::{Layout, best};
use super::{Gpu, Link, PlanOptions, Scheme};

/// Of a layout that was chosen `among` those of its precision, which are some of the `fitting`.
pub(super) fn why(
    gpu: &Gpu,
    chosen: &Layout,
    among: &[&Layout],
    fitting: &[&Layout],
    schemes: &[Scheme],
    num_seqs: usize,
    options: &PlanOptions,
) -> Vec<String> {
    let mut why = vec![fits(gpu, chosen, schemes, options)];
    why.extend(too_few(chosen, fitting, schemes, num_seqs));
    let Some(tokens) = chosen.tokens_per_s else {
        why.push("The card's bandwidth is not known: this runs the most requests at once.".into());
        return why;
    };
    let others: Vec<&Layout> =
        among.iter().copied().filter(|l| l.tensor_parallel_size != chosen.tensor_parallel_size).collect();
    if chosen.running > 1 {
        let against = best(&others).and_then(|l| Some(format!(", {:.0} with {}", l.tokens_per_s?, size(l))));
        let against = against.unwrap_or_default();
        why.push(format!(
            "{} requests at once: at most {tokens:.0} tokens/s in all{against}.",
            chosen.running
        ));
    }
    let alone = |layout: &Layout| layout.tokens_per_s_alone.unwrap_or(0.0);
    let fastest = others.iter().copied().max_by(|a, b| alone(a).total_cmp(&alone(b)));
    // Where it was chosen for one request, what it was chosen against.
    let against = match fastest.filter(|layout| chosen.running == 1 || alone(layout) > alone(chosen)) {
        Some(layout) => format!(", {:.0} with {}", alone(layout), size(layout)),
        None => String::new(),
    };
    why.push(format!("One request alone: at most {:.0} tokens/s{against}.", alone(chosen)));
    why
}

fn size(layout: &Layout) -> String {
    format!("tensor_parallel_size {}", layout.tensor_parallel_size)
}

/// That it fits, and what would not.
fn fits(gpu: &Gpu, chosen: &Layout, schemes: &[Scheme], options: &PlanOptions) -> String {
    let worse: Vec<_> =
        schemes.iter().take_while(|&&scheme| scheme != chosen.scheme).map(|scheme| scheme.name()).collect();
    let fits = format!(
        "{} fits, {:.1} GiB of weights on a card, with up to {} tokens of context",
        chosen.scheme.name(),
        chosen.weights_gib_per_card,
        chosen.max_context
    );
    let alone = gpu.link == Link::Network && chosen.tensor_parallel_size == 1;
    let place = if alone { " on one card, and only a network joins them" } else { "" };
    match worse.is_empty() {
        true => format!("{fits}."),
        false => {
            format!("{} fit no sequence of {} tokens{place}; {fits}.", worse.join(", "), options.context)
        }
    }
}

/// Where not all requests run at once: how many do, and which precision would run more.
fn too_few(chosen: &Layout, fitting: &[&Layout], schemes: &[Scheme], num_seqs: usize) -> Option<String> {
    if chosen.running >= num_seqs {
        return None;
    }
    let of = |scheme: &Scheme| fitting.iter().copied().filter(|l| l.scheme == *scheme).collect::<Vec<_>>();
    let more = schemes.iter().filter_map(|scheme| best(&of(scheme)));
    let more = more.filter(|layout| layout.running > chosen.running).max_by_key(|layout| layout.running);
    let more = more.map_or(String::new(), |l| format!("; {} would run {}", l.scheme.name(), l.running));
    Some(format!("{} of {num_seqs} requests fit at once{more}.", chosen.running))
}

/// Where nothing fits: what the smallest takes, what it leaves, and what a sequence needs.
pub(super) fn why_not(gpu: &Gpu, layouts: &[Layout], options: &PlanOptions) -> String {
    let smallest = layouts.iter().min_by(|a, b| a.weights_gib_per_card.total_cmp(&b.weights_gib_per_card));
    let Some(layout) = smallest else {
        return "No precision that was asked for says anything about this model.".into();
    };
    let cards = match layout.tensor_parallel_size {
        1 => "the card".into(),
        n => format!("each of {n} cards that share it"),
    };
    let room = match layout.free_gib_per_card {
        free if free > 0.0 => format!("which leaves {free:.2} GiB for sequences"),
        _ => "which leaves nothing for sequences".into(),
    };
    format!(
        "Nothing fits: {} takes {:.1} GiB of weights on {cards} of {:.1} GiB, {room}; one of {} tokens needs {:.2} GiB.",
        layout.scheme.name(),
        layout.weights_gib_per_card,
        gpu.memory_gib,
        options.context,
        layout.seq_gib_per_card,
    )
}
