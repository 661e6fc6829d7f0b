//! The sparse block: routing, the experts that were hit and the shared expert, f32.

use std::cmp::Ordering;
use std::ops::Range;

use super::gemm::Panel;
use super::linear::Linear;
use super::norm::{axpy, silu_mul};
use super::parallel::{self, Shared};

/// Weights of one sparse block.
pub struct Moe {
    /// `[E, H]`
    pub router: Linear,
    /// `[E * 2M, H]`: per expert, gate rows then up rows.
    pub gate_up: Linear,
    /// `[E * H, M]`
    pub down: Linear,
    /// `[2S, H]` and `[H, S]`
    pub shared: Option<(Linear, Linear)>,
    /// `[1, H]`
    pub shared_gate: Option<Linear>,
    /// Experts a token is sent to.
    pub top_k: usize,
    /// The experts that are here, of the router's.
    pub here: Range<usize>,
}

/// Scratch of [`Moe::forward`], kept between calls.
#[derive(Default)]
pub struct Scratch {
    logits: Vec<f32>,
    weights: Vec<f32>,
    experts: Vec<u32>,
    /// `gate|up` of every assignment.
    gate_up: Vec<f32>,
    /// `silu(gate) * up` of every assignment.
    act: Vec<f32>,
    /// Output of every assignment.
    y: Vec<f32>,
    /// Whether each token's last assignment is to the shared expert.
    has_shared: bool,
}

impl Scratch {
    /// What the last [`Moe::forward`], of `n` tokens, multiplied down matrices with: expert (`None` for the shared one),
    /// token, and at least as many activations as the expert is wide.
    pub fn assignments(&self, n: usize) -> impl Iterator<Item = (Option<usize>, usize, &[f32])> {
        let top_k = self.experts.len() / n.max(1);
        let per_token = top_k + usize::from(self.has_shared);
        let width = self.act.len() / (n * per_token).max(1);
        let act = self.act.chunks_exact(width.max(1));
        act.enumerate().map(move |(row, act)| {
            let (t, r) = (row / per_token, row % per_token);
            ((r < top_k).then(|| self.experts[t * top_k + r] as usize), t, act)
        })
    }
}

/// Softmax over all experts, the `top_k` largest, renormalised to sum to one.
///
/// `logits` `[num_tokens, E]`; `weights`, `experts` `[num_tokens, top_k]`, best first. Ties go to the lower
/// index. NaN ranks below every number; infinities share the weight equally. A row of which nothing finite is
/// left (all NaN or all -inf) gets equal weights.
pub fn route(logits: &[f32], num_experts: usize, top_k: usize, weights: &mut [f32], experts: &mut [u32]) {
    let rows = logits.chunks_exact(num_experts.max(1));
    let mut order: Vec<u32> = Vec::with_capacity(num_experts);
    for ((row, w), e) in rows.zip(weights.chunks_exact_mut(top_k)).zip(experts.chunks_exact_mut(top_k)) {
        order.clear();
        order.extend(0..num_experts as u32);
        let rank = |a: &u32, b: &u32| descending(row[*a as usize], row[*b as usize]).then(a.cmp(b));
        if top_k < num_experts {
            order.select_nth_unstable_by(top_k - 1, rank);
        }
        order[..top_k].sort_unstable_by(rank);
        e.copy_from_slice(&order[..top_k]);
        // The softmax's denominator cancels in the renormalisation.
        let max = row[e[0] as usize];
        for (w, &e) in w.iter_mut().zip(&*e) {
            let x = row[e as usize];
            *w = if x == max { 1.0 } else { (x - max).exp() };
            if w.is_nan() {
                *w = if max.is_nan() { 1.0 } else { 0.0 };
            }
        }
        let sum: f32 = w.iter().sum();
        w.iter_mut().for_each(|w| *w /= sum);
    }
}

/// Larger first, NaN last.
fn descending(a: f32, b: f32) -> Ordering {
    b.partial_cmp(&a).unwrap_or_else(|| a.is_nan().cmp(&b.is_nan()))
}

/// One expert and the tokens that were sent to it.
struct Group<'a> {
    gate_up: &'a Linear,
    down: &'a Linear,
    /// Which `gate|up` and `down` block of the linears is its own.
    index: usize,
    width: usize,
    /// Its tokens.
    tokens: Vec<u32>,
    /// Rows of `y` (and of the other per-assignment buffers) that its tokens write.
    rows: Vec<u32>,
}

impl Moe {
    /// `out[t] = sum_r weight_r * expert_r(x[t]) + sigmoid(shared_gate · x[t]) * shared(x[t])`, in the order of
    /// the routing weights. `x`, `out` `[n, H]`.
    pub fn forward(&self, n: usize, x: &[f32], scratch: &mut Scratch, out: &mut [f32]) {
        let (hidden, num_experts, top_k) = (self.router.num_in, self.router.num_out, self.top_k);
        let Scratch { logits, weights, experts, gate_up, act, y, has_shared } = scratch;
        *has_shared = self.shared.is_some();
        logits.resize(n * num_experts, 0.0);
        weights.resize(n * top_k, 0.0);
        experts.resize(n * top_k, 0);
        self.router.forward(x, logits, n);
        route(&logits[..n * num_experts], num_experts, top_k, weights, experts);

        let groups = self.groups(n, &experts[..n * top_k]);
        let (per_token, widest) =
            (top_k + usize::from(self.shared.is_some()), groups.iter().map(|g| g.width).max().unwrap_or(0));
        gate_up.resize(n * per_token * 2 * widest, 0.0);
        act.resize(n * per_token * widest, 0.0);
        y.resize(n * per_token * hidden, 0.0);

        let (gate_up, act_out) = (Shared::new(gate_up), Shared::new(act));
        over_groups(
            &groups,
            |g| g.width,
            2 * hidden,
            |group, features| {
                let Group { width, index, .. } = *group;
                let row_of = |t: usize| x[group.tokens[t] as usize * hidden..].as_ptr();
                // SAFETY: a token has `hidden` floats.
                let panel = unsafe { Panel::new(group.tokens.len(), hidden, row_of, false) };
                for part in 0..2 {
                    let first = (2 * index + part) * width;
                    let rows = first + features.start..first + features.end;
                    let at = |t: usize| group.rows[t] as usize * 2 * widest + part * widest + features.start;
                    // SAFETY: a token has `hidden` floats; an assignment's features are this task's alone.
                    unsafe {
                        let to = |t: usize| gate_up.get().add(at(t));
                        group.gate_up.rows(rows, group.tokens.len(), row_of, panel.as_ref(), to);
                    }
                }
                for &row in &group.rows {
                    let (row, len) = (row as usize, features.len());
                    // SAFETY: this task wrote these features of these assignments, and nobody else touches them.
                    unsafe {
                        let gate = gate_up.slice(row * 2 * widest + features.start, len);
                        let up = gate_up.slice(row * 2 * widest + widest + features.start, len);
                        silu_mul(gate, up, act_out.slice(row * widest + features.start, len));
                    }
                }
            },
        );

        let y_out = Shared::new(y);
        over_groups(
            &groups,
            |_| hidden,
            widest,
            |group, features| {
                let first = group.index * hidden;
                let rows = first + features.start..first + features.end;
                let at = |t: usize| group.rows[t] as usize * hidden + features.start;
                // SAFETY: an assignment has `widest` activations; its features are this task's alone.
                unsafe {
                    let row_of = |t: usize| act[group.rows[t] as usize * widest..].as_ptr();
                    let panel = Panel::new(group.tokens.len(), group.width, row_of, false);
                    let to = |t: usize| y_out.get().add(at(t));
                    group.down.rows(rows, group.tokens.len(), row_of, panel.as_ref(), to);
                }
            },
        );

        let out = Shared::new(&mut out[..n * hidden]);
        parallel::for_each(n, per_token * hidden, |t| {
            // SAFETY: one row per token.
            let out = unsafe { out.slice(t * hidden, hidden) };
            out.fill(0.0);
            for r in (0..top_k).filter(|r| self.here.contains(&(experts[t * top_k + r] as usize))) {
                axpy(weights[t * top_k + r], &y[(t * per_token + r) * hidden..][..hidden], out);
            }
            if self.shared.is_some() {
                let mut gate = [f32::INFINITY];
                if let Some(w) = &self.shared_gate {
                    w.forward(&x[t * hidden..][..hidden], &mut gate, 1);
                }
                let gate = 1.0 / (1.0 + (-gate[0]).exp());
                axpy(gate, &y[(t * per_token + top_k) * hidden..][..hidden], out);
            }
        });
    }

    fn groups(&self, n: usize, experts: &[u32]) -> Vec<Group<'_>> {
        let per_token = self.top_k + usize::from(self.shared.is_some());
        let mut by_expert: Vec<(u32, u32)> =
            experts.iter().enumerate().map(|(i, &e)| (e, i as u32)).collect();
        by_expert.sort_unstable();
        let mut groups: Vec<Group<'_>> = by_expert
            .chunk_by(|a, b| a.0 == b.0)
            .filter(|chunk| self.here.contains(&(chunk[0].0 as usize)))
            .map(|chunk| {
                let place = |i: u32| (i as usize / self.top_k, i as usize % self.top_k);
                Group {
                    gate_up: &self.gate_up,
                    down: &self.down,
                    index: chunk[0].0 as usize - self.here.start,
                    width: self.down.num_in,
                    tokens: chunk.iter().map(|&(_, i)| place(i).0 as u32).collect(),
                    rows: chunk.iter().map(|&(_, i)| (place(i).0 * per_token + place(i).1) as u32).collect(),
                }
            })
            .collect();
        if let Some((gate_up, down)) = &self.shared {
            groups.push(Group {
                gate_up,
                down,
                index: 0,
                width: down.num_in,
                tokens: (0..n as u32).collect(),
                rows: (0..n).map(|t| (t * per_token + self.top_k) as u32).collect(),
            });
        }
        groups
    }
}

/// Runs `task(group, features)` over blocks of each group's `num_features(group)` output features.
fn over_groups<'a>(
    groups: &'a [Group<'a>],
    num_features: impl Fn(&Group<'_>) -> usize,
    num_in: usize,
    task: impl Fn(&Group<'a>, Range<usize>) + Sync + Send,
) {
    let total: usize = groups.iter().map(|g| g.tokens.len() * num_features(g)).sum();
    let mut tasks = Vec::new();
    for (i, group) in groups.iter().enumerate() {
        let n = num_features(group);
        // Blocks in proportion to the group's share of the work, a multiple of 32 features each.
        let per_task = parallel::items_per_task(total, num_in).div_ceil(group.tokens.len().max(1));
        let per_task = per_task.next_multiple_of(32).min(n.max(1));
        tasks.extend((0..n).step_by(per_task).map(|f| (i, f..(f + per_task).min(n))));
    }
    let work = total * num_in / tasks.len().max(1);
    parallel::for_each(tasks.len(), work, |i| {
        let (group, features) = &tasks[i];
        task(&groups[*group], features.clone());
    });
}
