//! `_core` functions under `qwen35rs.ops`: the CPU ops on numpy arrays. `python/qwen35rs/ops.py` makes arrays of
//! what it is given; here shapes are checked, by name.

use numpy::{IntoPyArray, PyArrayDyn, PyArrayMethods, PyReadonlyArrayDyn, PyUntypedArrayMethods};
use pyo3::prelude::*;

use super::dlpack::DeviceTensor;
#[cfg(feature = "cuda")]
use super::ops_cuda::CudaOps;
use super::ops_shapes::{self as shapes, Rotation, Shape};
use super::to_py;
use crate::Error;
use crate::backend::cpu::attention::{self, PagedRows, Queries};
use crate::backend::cpu::delta_rule::{self, Head, OutRows};
use crate::backend::cpu::linear::Linear;
use crate::backend::cpu::moe::{self, Moe};
use crate::backend::cpu::parallel::{self, Shared};
use crate::backend::cpu::{conv1d, norm};
use crate::batch::PAGE_LEN;

type In<'py> = PyReadonlyArrayDyn<'py, f32>;
type Out<'py> = Bound<'py, PyArrayDyn<f32>>;

pub(crate) fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<DeviceTensor>()?;
    m.add_class::<CudaOps>()?;
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

    fn shape(&self) -> Shape<'a> {
        Shape { name: self.name, dims: self.shape }
    }
}

fn array<'py>(py: Python<'py>, data: Vec<f32>, shape: &[usize]) -> PyResult<Out<'py>> {
    data.into_pyarray(py).reshape(shape.to_vec())
}

#[pyfunction]
fn ops_rms_norm<'py>(py: Python<'py>, x: In<'py>, weight: In<'py>, eps: f32) -> PyResult<Out<'py>> {
    let (x, weight) = (Arg::new("x", &x)?, Arg::new("weight", &weight)?);
    let width = shapes::rms_norm(x.shape(), weight.shape())?;
    let scale: Vec<f32> = weight.data.iter().map(|w| w + 1.0).collect();
    let mut out = vec![0.0; x.data.len()];
    py.detach(|| {
        for (x, out) in x.data.chunks_exact(width).zip(out.chunks_exact_mut(width)) {
            norm::rms_norm(x, &scale, eps, out);
        }
    });
    array(py, out, x.shape)
}

#[pyfunction]
fn ops_rope<'py>(
    py: Python<'py>,
    x: In<'py>,
    positions: Vec<[u32; 3]>,
    rotation: Rotation,
) -> PyResult<Out<'py>> {
    let x = Arg::new("x", &x)?;
    let ([_, num_heads, head_dim], rope) = shapes::rope(x.shape(), positions.len(), rotation)?;
    let mut out = x.data.to_vec();
    let (mut cos, mut sin) = (vec![0.0; rope.axis.len()], vec![0.0; rope.axis.len()]);
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
    let [num_tokens, num_experts] = shapes::route(logits.shape(), top_k)?;
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
    let state = state.as_ref().map(|state| Arg::new("state", state)).transpose()?;
    let [num_tokens, channels, kernel] =
        shapes::causal_conv1d(x.shape(), weight.shape(), state.as_ref().map(Arg::shape))?;
    let tail_shape = [kernel - 1, channels];
    let mut tail = state.map_or_else(|| vec![0.0; (kernel - 1) * channels], |state| state.data.to_vec());
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
    let state = state.as_ref().map(|state| Arg::new("state", state)).transpose()?;
    let all = [&q, &k, &v, &g, &beta].map(Arg::shape);
    let [num_tokens, num_k_heads, k_dim, num_v_heads, v_dim] =
        shapes::gated_delta_rule(all, state.as_ref().map(Arg::shape))?;
    let state_shape = [num_v_heads, k_dim, v_dim];
    let mut states =
        state.map_or_else(|| vec![0.0; num_v_heads * k_dim * v_dim], |state| state.data.to_vec());
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
    let [num_tokens, num_keys, num_q_heads, num_kv_heads, head_dim] =
        shapes::attention([&q, &k, &v].map(Arg::shape))?;
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
    let shared = match &shared {
        Some([gate_proj, up_proj, down_proj, gate]) => Some([
            Arg::new("shared gate_proj", gate_proj)?,
            Arg::new("shared up_proj", up_proj)?,
            Arg::new("shared down_proj", down_proj)?,
            Arg::new("shared gate", gate)?,
        ]),
        None => None,
    };
    let all = [&x, &gate, &gate_up, &down].map(Arg::shape);
    let [num_tokens, hidden, _, width, shared_width] =
        shapes::moe(all, top_k, shared.as_ref().map(|shared| shared.each_ref().map(Arg::shape)))?;
    let mut layer = Moe {
        router: Linear::from_f32(gate.data, hidden),
        gate_up: Linear::from_f32(gate_up.data, hidden),
        down: Linear::from_f32(down.data, width),
        shared: None,
        shared_gate: None,
        top_k,
        here: 0..usize::MAX,
    };
    if let Some([gate_proj, up_proj, down_proj, shared_gate]) = &shared {
        let rows = [gate_proj.data, up_proj.data].concat();
        layer.shared =
            Some((Linear::from_f32(&rows, hidden), Linear::from_f32(down_proj.data, shared_width)));
        layer.shared_gate = Some(Linear::from_f32(shared_gate.data, hidden));
    }
    let mut out = vec![0.0; x.data.len()];
    py.detach(|| layer.forward(num_tokens, x.data, &mut moe::Scratch::default(), &mut out));
    array(py, out, x.shape)
}

/// In place of the ops on a GPU.
#[cfg(not(feature = "cuda"))]
#[pyclass(frozen, module = "qwen35rs._core")]
struct CudaOps;

#[cfg(not(feature = "cuda"))]
#[pymethods]
impl CudaOps {
    #[new]
    fn new(device: usize, _stream: usize) -> PyResult<Self> {
        crate::backend::Device::Cuda(device).require().map_err(to_py)?;
        Ok(Self)
    }
}
