//! The shapes that each op takes, wherever its arrays are.

use pyo3::prelude::*;

use super::to_py;
use crate::Error;
use crate::backend::Rope;
use crate::config::{RopeConfig, YarnConfig};

/// An argument's shape, with its name for errors.
#[derive(Clone, Copy)]
pub(super) struct Shape<'a> {
    pub name: &'static str,
    pub dims: &'a [usize],
}

/// Any size.
const ANY: usize = usize::MAX;

pub(super) fn refuse(name: &str, found: impl ToString, allowed: impl Into<String>) -> PyErr {
    to_py(Error::request(name, found, allowed))
}

impl Shape<'_> {
    /// Checks against `dims` and gives the sizes back.
    fn fit<const N: usize>(&self, dims: [usize; N], words: &str) -> PyResult<[usize; N]> {
        let fits = self.dims.len() == N && self.dims.iter().zip(dims).all(|(&s, d)| d == ANY || s == d);
        match <[usize; N]>::try_from(self.dims) {
            Ok(shape) if fits => Ok(shape),
            _ => Err(refuse(self.name, format!("shape {:?}", self.dims), words)),
        }
    }
}

/// The width.
pub(super) fn rms_norm(x: Shape<'_>, weight: Shape<'_>) -> PyResult<usize> {
    let Some(&width) = x.dims.last().filter(|&&w| w > 0) else {
        return Err(refuse("x", format!("shape {:?}", x.dims), "[..., width], width >= 1"));
    };
    weight.fit([width], &format!("[{width}]"))?;
    Ok(width)
}

#[derive(FromPyObject)]
#[pyo3(from_item_all)]
pub(super) struct Yarn {
    factor: f64,
    original_max_position_embeddings: usize,
    beta_fast: f64,
    beta_slow: f64,
    attention_factor: f64,
    truncate: bool,
}

/// The settings of a rotary embedding, as `ops.rope` takes them.
#[derive(FromPyObject)]
pub(super) struct Rotation(usize, f64, [usize; 3], Option<Yarn>);

/// Tokens, heads, head_dim; and the embedding.
pub(super) fn rope(x: Shape<'_>, num_positions: usize, rotation: Rotation) -> PyResult<([usize; 3], Rope)> {
    let Rotation(rotary_dim, theta, mrope_section, yarn) = rotation;
    let sizes = x.fit([ANY; 3], "[num_tokens, num_heads, head_dim]")?;
    let [num_tokens, _, head_dim] = sizes;
    if num_positions != num_tokens {
        let allowed = format!("[{num_tokens}] or [3, {num_tokens}]");
        return Err(refuse("positions", format!("{num_positions} of them"), allowed));
    }
    if rotary_dim == 0 || !rotary_dim.is_multiple_of(2) || rotary_dim > head_dim {
        return Err(refuse("rotary_dim", rotary_dim, format!("an even number, 2 to head_dim = {head_dim}")));
    }
    if mrope_section.iter().sum::<usize>() != rotary_dim / 2 {
        let allowed = format!("three numbers that sum to rotary_dim / 2 = {}", rotary_dim / 2);
        return Err(refuse("mrope_section", format!("{mrope_section:?}"), allowed));
    }
    let yarn = yarn.map(|y| YarnConfig {
        factor: y.factor,
        original_max_position: y.original_max_position_embeddings,
        beta_fast: y.beta_fast,
        beta_slow: y.beta_slow,
        attention_factor: y.attention_factor,
        truncate: y.truncate,
    });
    Ok((sizes, Rope::new(&RopeConfig { theta, rotary_dim, mrope_section, yarn })))
}

fn check_top_k(top_k: usize, num_experts: usize) -> PyResult<()> {
    if top_k == 0 || top_k > num_experts {
        return Err(refuse("top_k", top_k, format!("1 to num_experts = {num_experts}")));
    }
    Ok(())
}

/// Tokens, experts.
pub(super) fn route(logits: Shape<'_>, top_k: usize) -> PyResult<[usize; 2]> {
    let sizes = logits.fit([ANY; 2], "[num_tokens, num_experts]")?;
    check_top_k(top_k, sizes[1])?;
    Ok(sizes)
}

/// Tokens, channels, kernel.
pub(super) fn causal_conv1d(
    x: Shape<'_>,
    weight: Shape<'_>,
    state: Option<Shape<'_>>,
) -> PyResult<[usize; 3]> {
    let [num_tokens, channels] = x.fit([ANY; 2], "[num_tokens, channels]")?;
    let [_, kernel] = weight.fit([channels, ANY], &format!("[{channels}, kernel]"))?;
    if kernel == 0 {
        return Err(refuse("weight", "kernel 0", "at least one tap"));
    }
    if let Some(state) = state {
        let tail = [kernel - 1, channels];
        state.fit(tail, &format!("[kernel - 1, channels] = {tail:?}"))?;
    }
    Ok([num_tokens, channels, kernel])
}

/// Tokens, num_k_heads, k_dim, num_v_heads, v_dim; of q, k, v, g, beta.
pub(super) fn gated_delta_rule(
    [q, k, v, g, beta]: [Shape<'_>; 5],
    state: Option<Shape<'_>>,
) -> PyResult<[usize; 5]> {
    let [num_tokens, num_k_heads, k_dim] = q.fit([ANY; 3], "[num_tokens, num_k_heads, k_dim]")?;
    k.fit([num_tokens, num_k_heads, k_dim], &format!("q's shape {:?}", q.dims))?;
    let [_, num_v_heads, v_dim] =
        v.fit([num_tokens, ANY, ANY], &format!("[{num_tokens}, num_v_heads, v_dim]"))?;
    if num_k_heads == 0 || num_v_heads % num_k_heads != 0 {
        let allowed = format!("a multiple of num_k_heads = {num_k_heads}");
        return Err(refuse("v", format!("{num_v_heads} heads"), allowed));
    }
    let per_head = format!("[{num_tokens}, {num_v_heads}]");
    g.fit([num_tokens, num_v_heads], &per_head)?;
    beta.fit([num_tokens, num_v_heads], &per_head)?;
    if let Some(state) = state {
        let shape = [num_v_heads, k_dim, v_dim];
        state.fit(shape, &format!("[num_v_heads, k_dim, v_dim] = {shape:?}"))?;
    }
    Ok([num_tokens, num_k_heads, k_dim, num_v_heads, v_dim])
}

/// Tokens, keys, num_q_heads, num_kv_heads, head_dim; of q, k, v.
pub(super) fn attention([q, k, v]: [Shape<'_>; 3]) -> PyResult<[usize; 5]> {
    let [num_tokens, num_q_heads, head_dim] = q.fit([ANY; 3], "[num_tokens, num_q_heads, head_dim]")?;
    let words = format!("[num_keys, num_kv_heads, {head_dim}]");
    let [num_keys, num_kv_heads, _] = k.fit([ANY, ANY, head_dim], &words)?;
    v.fit([num_keys, num_kv_heads, head_dim], &format!("k's shape {:?}", k.dims))?;
    if num_keys < num_tokens {
        let allowed = format!("at least the {num_tokens} query tokens");
        return Err(refuse("k", format!("{num_keys} keys"), allowed));
    }
    if num_kv_heads == 0 || num_q_heads % num_kv_heads != 0 {
        let allowed = format!("a multiple of num_kv_heads = {num_kv_heads}");
        return Err(refuse("q", format!("{num_q_heads} heads"), allowed));
    }
    Ok([num_tokens, num_keys, num_q_heads, num_kv_heads, head_dim])
}

/// Tokens, hidden, experts, width and the shared expert's width, 0 without one; of x, gate, gate_up, down.
pub(super) fn moe(
    [x, gate, gate_up, down]: [Shape<'_>; 4],
    top_k: usize,
    shared: Option<[Shape<'_>; 4]>,
) -> PyResult<[usize; 5]> {
    let [num_tokens, hidden] = x.fit([ANY; 2], "[num_tokens, hidden]")?;
    let [num_experts, _] = gate.fit([ANY, hidden], &format!("[num_experts, {hidden}]"))?;
    let [_, _, width] = down.fit([num_experts, hidden, ANY], &format!("[{num_experts}, {hidden}, width]"))?;
    gate_up.fit([num_experts, 2 * width, hidden], &format!("[{num_experts}, {}, {hidden}]", 2 * width))?;
    check_top_k(top_k, num_experts)?;
    if hidden == 0 || width == 0 {
        return Err(refuse("x", format!("hidden {hidden}, width {width}"), "sizes of at least 1"));
    }
    let mut shared_width = 0;
    if let Some([gate_proj, up_proj, down_proj, shared_gate]) = shared {
        [shared_width, _] = gate_proj.fit([ANY, hidden], &format!("[shared_width, {hidden}]"))?;
        up_proj.fit([shared_width, hidden], &format!("[{shared_width}, {hidden}]"))?;
        down_proj.fit([hidden, shared_width], &format!("[{hidden}, {shared_width}]"))?;
        shared_gate.fit([1, hidden], &format!("[1, {hidden}]"))?;
    }
    Ok([num_tokens, hidden, num_experts, width, shared_width])
}
