//! The CPU backend as a device that chooses tokens itself and tells them late, as a GPU does: the greedy ones only.

use std::any::Any;
use std::borrow::Cow;
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard};

use crate::Result;
use crate::backend::cpu::Cpu;
use crate::backend::{
    Backend, Caches, DecayWeights, Edit, KvCache, MoeTensors, Precision, Rope, Sampled, Sampling, StateType,
};
use crate::batch::{Batch, BatchLimits};
use crate::config::{AttentionConfig, DeltaConfig, ModelConfig};
use crate::lend::Lendable;
use crate::weights::{DType, Tensor};

type Buf = <Cpu as Backend>::Buf;
type Linear = <Cpu as Backend>::Linear;
type Screen = <Cpu as Backend>::Screen;
type Vector = <Cpu as Backend>::Vector;
type Moe = <Cpu as Backend>::Moe;
type Pages = <Cpu as Backend>::Pages;
type Slots = <Cpu as Backend>::Slots;
type Scratch = <Cpu as Backend>::Scratch;

#[derive(Default)]
pub(super) struct Late(Mutex<State>);

#[derive(Default)]
struct State {
    rows: Vec<Sampling>,
    chosen: Vec<Sampled>,
    sent: VecDeque<Vec<Sampled>>,
    /// Batches that followed another, and how many steps were sent.
    pub followed: usize,
    pub steps: usize,
}

impl Late {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    /// Batches whose tokens the host did not know, and all whose tokens were chosen here.
    pub fn counts(&self) -> (usize, usize) {
        let state = self.state();
        (state.followed, state.steps)
    }
}

/// Rows that are lent.
#[derive(Debug)]
pub(super) struct Lent(pub Mutex<Vec<f32>>);

impl Lendable for Lent {
    fn device(&self) -> usize {
        0
    }

    fn address(&self) -> u64 {
        0
    }

    fn share(&self, _stream: Option<usize>) -> Result<()> {
        Ok(())
    }
}

/// Ops that are the CPU's.
macro_rules! as_the_cpu {
    ($(fn $name:ident($($arg:ident: $of:ty),*) $(-> $out:ty)?;)*) => {
        $(fn $name(&self, $($arg: $of),*) $(-> $out)? { Cpu::default().$name($($arg),*) })*
    };
}

impl Backend for Late {
    type Buf = Buf;
    type Linear = Linear;
    type Screen = Screen;
    type Vector = Vector;
    type Moe = Moe;
    type Pages = Pages;
    type Slots = Slots;
    type Scratch = Scratch;

    as_the_cpu! {
        fn buf(rows: usize, width: usize, precision: Precision) -> Result<Buf>;
        fn scratch(config: &ModelConfig, limits: &BatchLimits, caches: Caches) -> Result<Scratch>;
        fn linear_weight(tensors: &[Tensor], dtype: Option<DType>) -> Result<Linear>;
        fn table_weight(tensor: &Tensor, dtype: Option<DType>) -> Result<Linear>;
        fn screen(head: &Tensor, dtype: Option<DType>) -> Result<Screen>;
        fn vector(tensor: &Tensor, offset: f32) -> Result<Vector>;
        fn conv_weight(tensor: &Tensor) -> Result<Vector>;
        fn moe_weights(tensors: MoeTensors<'_>, dtype: Option<DType>) -> Result<Moe>;
        fn pages(num_pages: usize, dims: &AttentionConfig, kv: KvCache) -> Result<Pages>;
        fn slots(num_slots: usize, dims: &DeltaConfig, state: StateType) -> Result<Slots>;
        fn page_bytes(dims: &AttentionConfig, kv: KvCache) -> usize;
        fn slot_bytes(dims: &DeltaConfig, state: StateType) -> usize;
        fn rmsnorm_residual(n: usize, delta: Option<&Buf>, residual: &mut Buf, w: &Vector, eps: f32, out: &mut Buf);
        fn linear(n: usize, x: &Buf, w: &Linear, out: &mut Buf);
        fn top_logits(n: usize, x: &Buf, head: (&Linear, &Screen), k: usize, num_tokens: usize, out: &mut Buf);
        fn causal_conv1d(
            batch: &Batch, dims: &DeltaConfig, weight: &Vector, projected: &Buf, slots: &mut Slots, out: &mut Buf
        );
        fn gated_delta_rule(
            batch: &Batch, dims: &DeltaConfig, decay: DecayWeights<'_, Vector>, mixed: &Buf, projected: &Buf,
            slots: &mut Slots, out: &mut Buf
        );
        fn gated_rmsnorm(n: usize, dims: &DeltaConfig, w: &Vector, eps: f32, projected: &Buf, core: &mut Buf);
        fn qk_norm_rope_write(
            batch: &Batch, dims: &AttentionConfig, rope: &Rope, norms: (&Vector, &Vector), eps: f32, projected: &Buf,
            q: &mut Buf, pages: &mut Pages
        );
        fn gated_attention(
            batch: &Batch, dims: &AttentionConfig, q: &Buf, projected: &Buf, pages: &Pages, scratch: &mut Scratch,
            out: &mut Buf
        );
        fn silu_mul(n: usize, gate_up: &Buf, out: &mut Buf);
        fn moe(n: usize, x: &Buf, weights: &Moe, scratch: &mut Scratch, out: &mut Buf);
        fn gather(rows: &[usize], x: &Buf, out: &mut Buf);
        fn scatter(rows: &[usize], x: &Buf, out: &mut Buf);
        fn concat(n: usize, left: &Buf, right: &Buf, out: &mut Buf);
        fn keep_rows(rows: &[usize], buf: &mut Buf);
        fn clear_slot(slots: &mut Slots, slot: usize);
    }

    fn read<'a>(&self, buf: &'a mut Buf, rows: usize) -> Cow<'a, [f32]> {
        Cpu::default().read(buf, rows)
    }

    fn embed(&self, batch: &Batch, table: &Linear, out: &mut Buf) {
        let mut state = self.state();
        let mut token_ids = batch.token_ids.clone();
        if batch.follows {
            token_ids = state.chosen.iter().map(|row| row.token.unwrap_or(0)).collect();
            assert_eq!(token_ids.len(), batch.num_tokens());
            state.followed += 1;
        }
        Cpu::default().embed(&Batch { token_ids, ..batch.clone() }, table, out);
    }

    fn lendable(&self, rows: usize, width: usize) -> Result<Option<Arc<dyn Lendable>>> {
        Ok(Some(Arc::new(Lent(Mutex::new(vec![f32::NAN; rows * width])))))
    }

    fn lend_rows(&self, n: usize, x: &Buf, to: &dyn Lendable, at: usize) -> Result<()> {
        let to: &dyn Any = to;
        let mut to = to.downcast_ref::<Lent>().unwrap().0.lock().unwrap();
        for i in 0..n {
            let row = x.row(i);
            to[(at + i) * row.len()..][..row.len()].copy_from_slice(row);
        }
        Ok(())
    }

    const SAMPLES: bool = true;

    fn can_sample(&self, rows: &[Sampling]) -> bool {
        rows.iter().all(|row| row.temperature == 0.0 && row.logprobs.is_none())
    }

    fn begin_sampling(&self, rows: &[Sampling]) {
        self.state().rows = rows.to_vec();
    }

    fn sample(&self, first: usize, n: usize, num_tokens: usize, logits: &Buf) {
        let state = &mut *self.state();
        if first == 0 {
            state.chosen.clear();
        }
        for (i, rule) in state.rows[first..first + n].iter().enumerate() {
            let row = &logits.row(i)[..num_tokens];
            let value = |id: usize| match rule.edits.iter().find(|edit| edit.token as usize == id) {
                Some(edit) => Edit::apply(edit, rule, row[id]),
                None => row[id],
            };
            let best = (0..num_tokens).rev().max_by(|&a, &b| value(a).total_cmp(&value(b)));
            state.chosen.push(Sampled { token: best.map(|id| id as u32), logprobs: None });
        }
    }

    fn send_sampled(&self) {
        let state = &mut *self.state();
        assert!(state.sent.len() < 2, "three steps whose tokens nobody has read");
        state.sent.push_back(state.chosen.clone());
        state.steps += 1;
    }

    fn sampled(&self) -> Result<Vec<Sampled>> {
        Ok(self.state().sent.pop_front().expect("tokens that were sent"))
    }
}
