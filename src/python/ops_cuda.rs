//! The ops on tensors of a CUDA device, which come and go by DLPack. Types and shapes are checked here, by name.

use std::sync::Arc;

use pyo3::prelude::*;

use super::dlpack::{DeviceTensor, Element, Input};
use super::enter;
use super::ops_shapes::{self as shapes, Rotation, refuse};
use crate::backend::cuda::ops::{Memory, MoeViews, Positions, Queue};

const BF16: &[Element] = &[Element::Bfloat16];
const F32: &[Element] = &[Element::Float32];
const FLOATS: &[Element] = &[Element::Bfloat16, Element::Float32];
const INTS: &[Element] = &[Element::Int32, Element::Int64];

type Arg<'a, 'py> = &'a Bound<'py, PyAny>;

/// The ops on a stream of a device, 0 for its default stream.
#[pyclass(frozen, module = "qwen35rs._core")]
pub(super) struct CudaOps {
    device: usize,
    stream: usize,
}

impl CudaOps {
    fn take(&self, name: &'static str, value: Arg<'_, '_>, elements: &[Element]) -> PyResult<Input> {
        Input::take(name, value, (self.device, self.stream), elements)
    }

    fn maybe(
        &self,
        name: &'static str,
        value: Option<Arg<'_, '_>>,
        elements: &[Element],
    ) -> PyResult<Option<Input>> {
        value.map(|value| self.take(name, value, elements)).transpose()
    }

    fn run<T: Send>(
        &self,
        py: Python<'_>,
        work: impl FnOnce(&Arc<Queue>) -> crate::Result<T> + Send,
    ) -> PyResult<T> {
        enter(py, || work(&Queue::open(self.device, self.stream)?))
    }

    fn tensor(&self, memory: Memory, dims: &[usize], element: Element) -> DeviceTensor {
        DeviceTensor::new(Arc::new(memory), dims, element)
    }

    fn bf16(&self, memory: Memory, dims: &[usize]) -> DeviceTensor {
        self.tensor(memory, dims, Element::Bfloat16)
    }

    fn f32(&self, memory: Memory, dims: &[usize]) -> DeviceTensor {
        self.tensor(memory, dims, Element::Float32)
    }
}

/// A scale that the kernels have built in.
fn check_scale(scale: Option<f32>, width: usize, of: &str) -> PyResult<()> {
    let own = (width as f32).sqrt().recip();
    match scale {
        None => Ok(()),
        Some(scale) if (scale - own).abs() <= 1e-6 * own => Ok(()),
        Some(scale) => {
            Err(refuse("scale", scale, format!("{of} ** -0.5 = {own} on a GPU, any for CPU arrays")))
        }
    }
}

#[pymethods]
impl CudaOps {
    #[new]
    fn new(device: usize, stream: usize) -> Self {
        Self { device, stream }
    }

    fn rms_norm(
        &self,
        py: Python<'_>,
        x: Arg<'_, '_>,
        weight: Arg<'_, '_>,
        eps: f32,
        residual: Option<Arg<'_, '_>>,
    ) -> PyResult<(DeviceTensor, Option<DeviceTensor>)> {
        let x = self.take("x", x, if residual.is_some() { BF16 } else { FLOATS })?;
        let weight = self.take("weight", weight, FLOATS)?;
        let residual = self.maybe("residual", residual, FLOATS)?;
        shapes::rms_norm(x.shape(), weight.shape())?;
        let dims = x.shape().dims;
        if let Some(found) = residual.as_ref().map(|r| r.shape().dims).filter(|&found| found != dims) {
            return Err(refuse("residual", format!("shape {found:?}"), format!("x's shape {dims:?}")));
        }
        let (x_view, weight, residual) = (x.view(), weight.view(), residual.as_ref().map(Input::view));
        let (y, sum) = self.run(py, |queue| queue.rms_norm(x_view, weight, eps, residual))?;
        Ok((self.bf16(y, dims), sum.map(|sum| self.f32(sum, dims))))
    }

    fn rope(
        &self,
        py: Python<'_>,
        x: Arg<'_, '_>,
        host_positions: Option<Vec<[u32; 3]>>,
        device_positions: Option<Arg<'_, '_>>,
        rotation: Rotation,
    ) -> PyResult<DeviceTensor> {
        let x = self.take("x", x, BF16)?;
        let on_device = self.maybe("positions", device_positions, INTS)?;
        let host = host_positions.unwrap_or_default();
        if let Some(&far) = host.iter().flatten().find(|&&p| i32::try_from(p).is_err()) {
            return Err(refuse("positions", far, "numbers below 2^31 on a GPU"));
        }
        let num_positions = match on_device.as_ref().map(|p| p.shape().dims) {
            None => host.len(),
            Some(&[n] | &[3, n]) => n,
            Some(found) => return Err(refuse("positions", format!("shape {found:?}"), "[n] or [3, n]")),
        };
        let (sizes, rope) = shapes::rope(x.shape(), num_positions, rotation)?;
        let positions = on_device.as_ref().map_or(Positions::Host(&host), |p| Positions::Device(p.view()));
        let x = x.view();
        let out = self.run(py, |queue| queue.rope(x, sizes, &rope, positions))?;
        Ok(self.bf16(out, &sizes))
    }

    fn route(
        &self,
        py: Python<'_>,
        logits: Arg<'_, '_>,
        top_k: usize,
    ) -> PyResult<(DeviceTensor, DeviceTensor)> {
        let logits = self.take("logits", logits, FLOATS)?;
        let [n, num_experts] = shapes::route(logits.shape(), top_k)?;
        let logits = logits.view();
        let (weights, experts) = self.run(py, |queue| queue.route(logits, num_experts, top_k))?;
        let dims = [n, top_k];
        Ok((self.f32(weights, &dims), self.tensor(experts, &dims, Element::Int32)))
    }

    fn causal_conv1d(
        &self,
        py: Python<'_>,
        x: Arg<'_, '_>,
        weight: Arg<'_, '_>,
        state: Option<Arg<'_, '_>>,
    ) -> PyResult<(DeviceTensor, DeviceTensor)> {
        let x = self.take("x", x, BF16)?;
        let weight = self.take("weight", weight, FLOATS)?.without_middle();
        let state = self.maybe("state", state, BF16)?;
        let sizes @ [n, channels, kernel] =
            shapes::causal_conv1d(x.shape(), weight.shape(), state.as_ref().map(Input::shape))?;
        let (x, weight, state) = (x.view(), weight.view(), state.as_ref().map(Input::view));
        let (y, state) = self.run(py, |queue| queue.causal_conv1d(x, weight, sizes, state))?;
        Ok((self.bf16(y, &[n, channels]), self.bf16(state, &[kernel - 1, channels])))
    }

    #[allow(clippy::too_many_arguments)]
    fn gated_delta_rule(
        &self,
        py: Python<'_>,
        q: Arg<'_, '_>,
        k: Arg<'_, '_>,
        v: Arg<'_, '_>,
        g: Arg<'_, '_>,
        beta: Arg<'_, '_>,
        state: Option<Arg<'_, '_>>,
        chunked: bool,
        qk_l2norm: bool,
        scale: Option<f32>,
    ) -> PyResult<(DeviceTensor, DeviceTensor)> {
        let all = [
            self.take("q", q, BF16)?,
            self.take("k", k, BF16)?,
            self.take("v", v, BF16)?,
            self.take("g", g, FLOATS)?,
            self.take("beta", beta, FLOATS)?,
        ];
        let state = self.maybe("state", state, F32)?;
        let sizes @ [n, _, k_dim, num_v_heads, v_dim] =
            shapes::gated_delta_rule(all.each_ref().map(Input::shape), state.as_ref().map(Input::shape))?;
        if k_dim == 0 {
            return Err(refuse("q", "k_dim 0", "sizes of at least 1"));
        }
        if !qk_l2norm {
            return Err(refuse("qk_l2norm", "False", "True on a GPU, either for CPU arrays"));
        }
        check_scale(scale, k_dim, "k_dim")?;
        let (views, state) = (all.each_ref().map(Input::view), state.as_ref().map(Input::view));
        let (out, states) = self.run(py, |queue| queue.gated_delta_rule(views, sizes, state, chunked))?;
        Ok((self.bf16(out, &[n, num_v_heads, v_dim]), self.f32(states, &[num_v_heads, k_dim, v_dim])))
    }

    fn attention(
        &self,
        py: Python<'_>,
        q: Arg<'_, '_>,
        k: Arg<'_, '_>,
        v: Arg<'_, '_>,
        scale: Option<f32>,
    ) -> PyResult<DeviceTensor> {
        let all = [self.take("q", q, BF16)?, self.take("k", k, BF16)?, self.take("v", v, BF16)?];
        let sizes @ [n, _, num_q_heads, _, head_dim] = shapes::attention(all.each_ref().map(Input::shape))?;
        if head_dim > 1024 {
            return Err(refuse("q", format!("head_dim {head_dim}"), "at most 1024 on a GPU"));
        }
        check_scale(scale, head_dim, "head_dim")?;
        let views = all.each_ref().map(Input::view);
        let out = self.run(py, |queue| queue.attention(views, sizes))?;
        Ok(self.bf16(out, &[n, num_q_heads, head_dim]))
    }

    #[allow(clippy::too_many_arguments)]
    fn moe(
        &self,
        py: Python<'_>,
        x: Arg<'_, '_>,
        gate: Arg<'_, '_>,
        gate_up: Arg<'_, '_>,
        down: Arg<'_, '_>,
        top_k: usize,
        shared: Option<[Bound<'_, PyAny>; 4]>,
    ) -> PyResult<DeviceTensor> {
        let all = [
            self.take("x", x, BF16)?,
            self.take("gate", gate, BF16)?,
            self.take("gate_up", gate_up, BF16)?,
            self.take("down", down, BF16)?,
        ];
        let shared = match &shared {
            Some([gate_proj, up_proj, down_proj, gate]) => Some([
                self.take("shared gate_proj", gate_proj, BF16)?,
                self.take("shared up_proj", up_proj, BF16)?,
                self.take("shared down_proj", down_proj, BF16)?,
                self.take("shared gate", gate, BF16)?.into_rows(),
            ]),
            None => None,
        };
        let [n, hidden, num_experts, width, shared_width] = shapes::moe(
            all.each_ref().map(Input::shape),
            top_k,
            shared.as_ref().map(|shared| shared.each_ref().map(Input::shape)),
        )?;
        if num_experts > 8192 {
            return Err(refuse("gate", format!("{num_experts} experts"), "at most 8192 on a GPU"));
        }
        let [x, router, gate_up, down] = all.each_ref().map(Input::view);
        let shared = shared.as_ref().map(|shared| shared.each_ref().map(Input::view));
        let weights = MoeViews { router, gate_up, down, shared };
        let sizes = [hidden, num_experts, top_k, width, shared_width];
        let out = self.run(py, |queue| queue.moe(x, weights, sizes))?;
        Ok(self.bf16(out, &[n, hidden]))
    }
}
