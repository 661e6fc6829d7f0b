//! `_core` functions under `qwen35rs.ops`: the CPU ops on numpy arrays. `python/qwen35rs/ops.py` makes arrays of
//! what it is given; here shapes are checked, by name.

use numpy::{IntoPyArray, PyArrayDyn, PyArrayMethods, PyReadonlyArrayDyn, PyUntypedArrayMethods};
use pyo3::prelude::*;

use super::to_py;
use crate::Error;
use crate::backend::Rope;
use crate::backend::cpu::attention::{self, PagedRows, Queries};
use crate::backend::cpu::delta_rule::{self, Head, OutRows};
use crate::backend::cpu::linear::Linear;
use crate::backend::cpu::moe::{self, Moe};
use crate::backend::cpu::parallel::{self, Shared};
use crate::backend::cpu::{conv1d, norm};
use crate::batch::PAGE_LEN;
use crate::config::{RopeConfig, YarnConfig};

type In<'py> = PyReadonlyArrayDyn<'py, f32>;
type Out<'py> = Bound<'py, PyArrayDyn<f32>>;

pub(crate) fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_function(wrap_pyfunction!(ops_rms_norm, m)?)?;
    m.add_function(wrap_pyfunction!(ops_rope, m)?)?;
    m.add_function(wrap_pyfunction!(ops_route, m)?)?;
    m.add_function(wrap_pyfunction!(ops_causal_conv1d, m)?)?;
    m.add_function(wrap_pyfunction!(ops_gated_delta_rule, m)?)?;
    m.add_function(wrap_pyfunction!(ops_attention, m)?)?;
    m.add_function(wrap_pyfunction!(ops_moe, m)?)
}

/// An argument's data and shape, with its name for errors.
struct Arg<'a> {
    name: &'static str,
    data: &'a [f32],
    shape: &'a [usize],
}

impl<'a> Arg<'a> {
    fn new(name: &'static str, array: &'a In<'_>) -> PyResult<Self> {
        parallel::claim().map_err(to_py)?;
        let data =
            array.as_slice().map_err(|e| to_py(Error::request(name, e, "a C-contiguous float32 array")))?;
        Ok(Self { name, data, shape: array.shape() })
    }

    /// Checks the shape against `dims` (0 for any size) and gives it back.
    fn dims<const N: usize>(&self, dims: [usize; N], words: &str) -> PyResult<[usize; N]> {
        let fits = self.shape.len() == N && self.shape.iter().zip(dims).all(|(&s, d)| d == ANY || s == d);
        match <[usize; N]>::try_from(self.shape) {
            Ok(shape) if fits => Ok(shape),
            _ => Err(refuse(self.name, format!("shape {:?}", self.shape), words)),
        }
    }
}

/// Any size.
const ANY: usize = usize::MAX;

fn refuse(name: &str, found: impl ToString, allowed: impl Into<String>) -> PyErr {
    to_py(Error::request(name, found, allowed))
}

fn array<'py>(py: Python<'py>, data: Vec<f32>, shape: &[usize]) -> PyResult<Out<'py>> {
    data.into_pyarray(py).reshape(shape.to_vec())
}

#[pyfunction]
fn ops_rms_norm<'py>(py: Python<'py>, x: In<'py>, weight: In<'py>, eps: f32) -> PyResult<Out<'py>> {
    let (x, weight) = (Arg::new("x", &x)?, Arg::new("weight", &weight)?);
    let Some(&width) = x.shape.last().filter(|&&w| w > 0) else {
        return Err(refuse("x", format!("shape {:?}", x.shape), "[..., width], width >= 1"));
    };
    weight.dims([width], &format!("[{width}]"))?;
    let scale: Vec<f32> = weight.data.iter().map(|w| w + 1.0).collect();
    let mut out = vec![0.0; x.data.len()];
    py.detach(|| {
        for (x, out) in x.data.chunks_exact(width).zip(out.chunks_exact_mut(width)) {
            norm::rms_norm(x, &scale, eps, out);
        }
    });
    array(py, out, x.shape)
}

#[derive(FromPyObject)]
#[pyo3(from_item_all)]
struct Yarn {
    factor: f64,
    original_max_position_embeddings: usize,
    beta_fast: f64,
    beta_slow: f64,
    attention_factor: f64,
    truncate: bool,
}

#[pyfunction]
#[allow(clippy::too_many_arguments)]
fn ops_rope<'py>(
    py: Python<'py>,
    x: In<'py>,
    positions: Vec<[u32; 3]>,
    rotary_dim: usize,
    theta: f64,
    mrope_section: [usize; 3],
    yarn: Option<Yarn>,
) -> PyResult<Out<'py>> {
    let x = Arg::new("x", &x)?;
    let [num_tokens, num_heads, head_dim] = x.dims([ANY; 3], "[num_tokens, num_heads, head_dim]")?;
    if positions.len() != num_tokens {
        let allowed = format!("[{num_tokens}] or [3, {num_tokens}]");
        return Err(refuse("positions", format!("{} of them", positions.len()), allowed));
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
    let rope = Rope::new(&RopeConfig { theta, rotary_dim, mrope_section, yarn });
    let mut out = x.data.to_vec();
    let (mut cos, mut sin) = (vec![0.0; rotary_dim / 2], vec![0.0; rotary_dim / 2]);
    for (token, &position) in out.chunks_exact_mut((num_heads * head_dim).max(1)).zip(&positions) {
        attention::rotation(&rope, position, &mut cos, &mut sin);
        token.chunks_exact_mut(head_dim).for_each(|head| attention::rotate(head, &cos, &sin));
    }
    array(py, out, x.shape)
}

#[pyfunction]
fn ops_route<'py>(
    py: Python<'py>,
    logits: In<'py>,
    top_k: usize,
) -> PyResult<(Out<'py>, Bound<'py, PyArrayDyn<i32>>)> {
    let logits = Arg::new("logits", &logits)?;
    let [num_tokens, num_experts] = logits.dims([ANY; 2], "[num_tokens, num_experts]")?;
    if top_k == 0 || top_k > num_experts {
        return Err(refuse("top_k", top_k, format!("1 to num_experts = {num_experts}")));
    }
    let (mut weights, mut experts) = (vec![0.0; num_tokens * top_k], vec![0u32; num_tokens * top_k]);
    py.detach(|| moe::route(logits.data, num_experts, top_k, &mut weights, &mut experts));
    let experts: Vec<i32> = experts.into_iter().map(|e| e as i32).collect();
    let shape = [num_tokens, top_k];
    Ok((array(py, weights, &shape)?, experts.into_pyarray(py).reshape(shape.to_vec())?))
}

#[pyfunction]
fn ops_causal_conv1d<'py>(
    py: Python<'py>,
    x: In<'py>,
    weight: In<'py>,
    state: Option<In<'py>>,
) -> PyResult<(Out<'py>, Out<'py>)> {
    let (x, weight) = (Arg::new("x", &x)?, Arg::new("weight", &weight)?);
    let [num_tokens, channels] = x.dims([ANY; 2], "[num_tokens, channels]")?;
    let [_, kernel] = weight.dims([channels, ANY], &format!("[{channels}, kernel]"))?;
    if kernel == 0 {
        return Err(refuse("weight", "kernel 0", "at least one tap"));
    }
    let tail_shape = [kernel - 1, channels];
    let mut tail = match &state {
        Some(state) => {
            let state = Arg::new("state", state)?;
            state.dims(tail_shape, &format!("[kernel - 1, channels] = {tail_shape:?}"))?;
            state.data.to_vec()
        }
        None => vec![0.0; (kernel - 1) * channels],
    };
    let taps: Vec<f32> =
        (0..kernel * channels).map(|i| weight.data[i % channels * kernel + i / channels]).collect();
    let mut out = vec![0.0; num_tokens * channels];
    py.detach(|| conv1d::causal_conv1d(x.data, channels, &taps, channels, &mut tail, &mut out));
    Ok((array(py, out, &[num_tokens, channels])?, array(py, tail, &tail_shape)?))
}

#[pyfunction]
#[allow(clippy::too_many_arguments)]
fn ops_gated_delta_rule<'py>(
    py: Python<'py>,
    q: In<'py>,
    k: In<'py>,
    v: In<'py>,
    g: In<'py>,
    beta: In<'py>,
    state: Option<In<'py>>,
    chunked: bool,
    qk_l2norm: bool,
    scale: Option<f32>,
) -> PyResult<(Out<'py>, Out<'py>)> {
    let [q, k, v] = [Arg::new("q", &q)?, Arg::new("k", &k)?, Arg::new("v", &v)?];
    let (g, beta) = (Arg::new("g", &g)?, Arg::new("beta", &beta)?);
    let [num_tokens, num_k_heads, k_dim] = q.dims([ANY; 3], "[num_tokens, num_k_heads, k_dim]")?;
    k.dims([num_tokens, num_k_heads, k_dim], &format!("q's shape {:?}", q.shape))?;
    let [_, num_v_heads, v_dim] =
        v.dims([num_tokens, ANY, ANY], &format!("[{num_tokens}, num_v_heads, v_dim]"))?;
    if num_k_heads == 0 || num_v_heads % num_k_heads != 0 {
        let allowed = format!("a multiple of num_k_heads = {num_k_heads}");
        return Err(refuse("v", format!("{num_v_heads} heads"), allowed));
    }
    let per_head = format!("[{num_tokens}, {num_v_heads}]");
    g.dims([num_tokens, num_v_heads], &per_head)?;
    beta.dims([num_tokens, num_v_heads], &per_head)?;
    let state_shape = [num_v_heads, k_dim, v_dim];
    let mut states = match &state {
        Some(state) => {
            let state = Arg::new("state", state)?;
            state.dims(state_shape, &format!("[num_v_heads, k_dim, v_dim] = {state_shape:?}"))?;
            state.data.to_vec()
        }
        None => vec![0.0; num_v_heads * k_dim * v_dim],
    };
    let mut out = vec![0.0; v.data.len()];
    py.detach(|| {
        let (out, states) = (Shared::new(&mut out), Shared::new(&mut states));
        parallel::for_each(num_v_heads, 3 * num_tokens * k_dim * v_dim, |head| {
            let k_head = head * num_k_heads / num_v_heads;
            let column = |x: &Arg<'_>| -> Vec<f32> {
                x.data.iter().skip(head).step_by(num_v_heads).copied().collect()
            };
            let (g, beta) = (column(&g), column(&beta));
            let args = Head {
                q: q.data.get(k_head * k_dim..).unwrap_or_default(),
                k: k.data.get(k_head * k_dim..).unwrap_or_default(),
                v: v.data.get(head * v_dim..).unwrap_or_default(),
                strides: [num_k_heads * k_dim, num_k_heads * k_dim, num_v_heads * v_dim],
                g: &g,
                beta: &beta,
                k_dim,
                v_dim,
                scale: scale.unwrap_or((k_dim as f32).sqrt().recip()),
                qk_l2norm,
            };
            let chunked_len = if chunked { num_tokens } else { 0 };
            // SAFETY: a task has its own head: its state and its columns of `out`.
            unsafe {
                let state = states.slice(head * k_dim * v_dim, k_dim * v_dim);
                let rows = OutRows { out: out.get().add(head * v_dim), stride: num_v_heads * v_dim };
                delta_rule::gated_delta_rule(args, chunked_len, state, rows);
            }
        });
    });
    Ok((array(py, out, v.shape)?, array(py, states, &state_shape)?))
}

#[pyfunction]
fn ops_attention<'py>(
    py: Python<'py>,
    q: In<'py>,
    k: In<'py>,
    v: In<'py>,
    scale: Option<f32>,
) -> PyResult<Out<'py>> {
    let [q, k, v] = [Arg::new("q", &q)?, Arg::new("k", &k)?, Arg::new("v", &v)?];
    let [num_tokens, num_q_heads, head_dim] = q.dims([ANY; 3], "[num_tokens, num_q_heads, head_dim]")?;
    let words = format!("[num_keys, num_kv_heads, {head_dim}]");
    let [num_keys, num_kv_heads, _] = k.dims([ANY, ANY, head_dim], &words)?;
    v.dims([num_keys, num_kv_heads, head_dim], &format!("k's shape {:?}", k.shape))?;
    if num_keys < num_tokens {
        return Err(refuse(
            "k",
            format!("{num_keys} keys"),
            format!("at least the {num_tokens} query tokens"),
        ));
    }
    if num_kv_heads == 0 || num_q_heads % num_kv_heads != 0 {
        let allowed = format!("a multiple of num_kv_heads = {num_kv_heads}");
        return Err(refuse("q", format!("{num_q_heads} heads"), allowed));
    }
    let (group, stride) = (num_q_heads / num_kv_heads, num_q_heads * head_dim);
    let scale = scale.unwrap_or((head_dim as f32).sqrt().recip());
    let mut out = vec![0.0; q.data.len()];
    const TILE: usize = 16;
    let tiles = num_tokens.div_ceil(TILE);
    py.detach(|| {
        let out = Shared::new(&mut out);
        parallel::for_each(tiles * num_kv_heads, 2 * TILE * num_keys * group * head_dim, |task| {
            let (first, head) = (task / num_kv_heads * TILE, task % num_kv_heads);
            let len = TILE.min(num_tokens - first);
            let at = first * stride + head * group * head_dim;
            let queries = Queries {
                q: &q.data[at..],
                stride,
                group,
                head_dim,
                first_pos: num_keys - num_tokens + first,
                num_tokens: len,
                scale,
            };
            let row_stride = num_kv_heads * head_dim;
            let page = |x: &[f32], i: usize| x[i * PAGE_LEN * row_stride + head * head_dim..].as_ptr();
            let (k, v) = (|i: usize| page(k.data, i), |i: usize| page(v.data, i));
            // SAFETY: a task has its own tokens and its own group of heads.
            let rows = Shared::new(unsafe { out.slice(at, (len - 1) * stride + group * head_dim) });
            attention::attend(
                queries,
                PagedRows { page: &k, row_stride },
                PagedRows { page: &v, row_stride },
                rows,
            );
        });
    });
    array(py, out, q.shape)
}

#[pyfunction]
fn ops_moe<'py>(
    py: Python<'py>,
    x: In<'py>,
    gate: In<'py>,
    gate_up: In<'py>,
    down: In<'py>,
    top_k: usize,
    shared: Option<[In<'py>; 4]>,
) -> PyResult<Out<'py>> {
    let (x, gate) = (Arg::new("x", &x)?, Arg::new("gate", &gate)?);
    let (gate_up, down) = (Arg::new("gate_up", &gate_up)?, Arg::new("down", &down)?);
    let [num_tokens, hidden] = x.dims([ANY; 2], "[num_tokens, hidden]")?;
    let [num_experts, _] = gate.dims([ANY, hidden], &format!("[num_experts, {hidden}]"))?;
    let [_, _, width] =
        down.dims([num_experts, hidden, ANY], &format!("[{num_experts}, {hidden}, width]"))?;
    gate_up.dims([num_experts, 2 * width, hidden], &format!("[{num_experts}, {}, {hidden}]", 2 * width))?;
    if top_k == 0 || top_k > num_experts {
        return Err(refuse("top_k", top_k, format!("1 to num_experts = {num_experts}")));
    }
    if hidden == 0 || width == 0 {
        return Err(refuse("x", format!("hidden {hidden}, width {width}"), "sizes of at least 1"));
    }
    let mut layer = Moe {
        router: Linear::from_f32(gate.data, hidden),
        gate_up: Linear::from_f32(gate_up.data, hidden),
        down: Linear::from_f32(down.data, width),
        shared: None,
        shared_gate: None,
        top_k,
    };
    if let Some([gate_proj, up_proj, down_proj, shared_gate]) = &shared {
        let gate_proj = Arg::new("shared gate_proj", gate_proj)?;
        let [shared_width, _] = gate_proj.dims([ANY, hidden], &format!("[shared_width, {hidden}]"))?;
        let up_proj = Arg::new("shared up_proj", up_proj)?;
        up_proj.dims([shared_width, hidden], &format!("[{shared_width}, {hidden}]"))?;
        let down_proj = Arg::new("shared down_proj", down_proj)?;
        down_proj.dims([hidden, shared_width], &format!("[{hidden}, {shared_width}]"))?;
        let shared_gate = Arg::new("shared gate", shared_gate)?;
        shared_gate.dims([1, hidden], &format!("[1, {hidden}]"))?;
        let rows = [gate_proj.data, up_proj.data].concat();
        layer.shared =
            Some((Linear::from_f32(&rows, hidden), Linear::from_f32(down_proj.data, shared_width)));
        layer.shared_gate = Some(Linear::from_f32(shared_gate.data, hidden));
    }
    let mut out = vec![0.0; x.data.len()];
    py.detach(|| layer.forward(num_tokens, x.data, &mut moe::Scratch::default(), &mut out));
    array(py, out, x.shape)
}
