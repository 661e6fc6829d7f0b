//! The engine: requests in, tokens out, one `step` at a time. It deals in token ids; text stops at the tokenizer.

mod ahead;
mod pages;
mod runner;
mod told;

use std::sync::Arc;
use std::time::Instant;

use rayon::prelude::*;

use self::ahead::Flight;
use self::pages::{Budget, Pages, at_least};
pub use self::runner::follow;
use self::runner::{Loaded, Runner};
use crate::backend::{Backend, Sampled, Sampling, Stats};
use crate::batch::{BatchLimits, CHUNK_LEN, MAX_LOGIT_ROWS};
use crate::cache::Cache;
use crate::lend::Lendable;
use crate::model::Model;
use crate::random::mix;
use crate::ranks::Group;
use crate::request::{FinishReason, Request, RequestId, SamplingParams, TokenLogprobs, Wanted};
use crate::sampler::{self, Context};
use crate::scheduler::{Scheduler, Step};
use crate::{Error, Result};

/// Sizes of an engine, fixed when it is made.
#[derive(Debug, Clone)]
pub struct EngineLimits {
    /// Longest prompt plus output of a request; `None` for the model's context, or what `kv_cache_bytes` holds.
    pub max_model_len: Option<usize>,
    /// Requests that run at once.
    pub max_num_seqs: usize,
    /// Prompt tokens of one step (at least [`CHUNK_LEN`]).
    pub max_num_batched_tokens: usize,
    /// Bytes of keys and values at most. `None` for 4 GiB, or on a device with memory of its own for what is left of
    /// `gpu_memory_utilization`.
    pub kv_cache_bytes: Option<usize>,
    /// Share, above 0 and at most 1, of a device's memory that is free once the weights are there, for pages, slots
    /// and buffers.
    pub gpu_memory_utilization: f64,
    /// Key of the random numbers of requests without a seed.
    pub seed: u64,
}

impl Default for EngineLimits {
    fn default() -> Self {
        Self {
            max_model_len: None,
            max_num_seqs: 32,
            max_num_batched_tokens: 512,
            kv_cache_bytes: None,
            gpu_memory_utilization: 0.9,
            seed: 0,
        }
    }
}

/// Bytes of keys and values where nothing says how many.
const KV_CACHE_BYTES: usize = 4 << 30;

/// What one step did for one request.
#[derive(Debug)]
pub struct StepOutput {
    /// Whose it is.
    pub id: RequestId,
    /// When its step ended: callers may read it later.
    pub at: Instant,
    /// The new token; `None` for a request that wanted logits.
    pub token: Option<u32>,
    /// Its log-probabilities, where asked for.
    pub logprobs: Option<TokenLogprobs>,
    /// Why the request ended, if it did. An ended request is forgotten.
    pub finish: Option<FinishReason>,
    /// Logits of the prompt, `[num_logit_rows, vocab]`, of a request that wanted them.
    pub logits: Vec<f32>,
    /// The same where they were wanted on the device, complete and waited for.
    pub device_logits: Option<Arc<dyn Lendable>>,
    /// Why the request failed, if it did.
    pub error: Option<String>,
}

impl StepOutput {
    fn new(id: RequestId, at: Instant) -> Self {
        Self {
            id,
            at,
            token: None,
            logprobs: None,
            finish: None,
            logits: Vec::new(),
            device_logits: None,
            error: None,
        }
    }
}

/// What an engine holds.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Report {
    /// What its device says.
    #[serde(flatten)]
    pub stats: Stats,
    /// Longest prompt plus output.
    pub max_model_len: usize,
    /// Pages of keys and values, each for [`PAGE_LEN`] tokens.
    pub num_pages: usize,
    /// Bytes of a page, in all layers.
    pub page_bytes: usize,
}

/// One model, on one device or as rank 0 of several, with its requests.
pub struct Engine<B: Backend> {
    runner: Runner<B>,
    scheduler: Scheduler,
    max_model_len: usize,
    num_pages: usize,
    next_id: u64,
    seed: u64,
    /// Tokens that exist; ids above are padding rows.
    num_tokens: usize,
    eos: Vec<u32>,
    samplers: Vec<sampler::Scratch>,
    /// The step whose tokens the device chooses now.
    flight: Option<Flight>,
    /// Outputs that an error came before.
    landed: Vec<StepOutput>,
}

impl<B: Backend> Engine<B> {
    /// Allocates pages, slots and buffers. `num_tokens` is the tokenizer's size (rows of the head above it are
    /// padding and never sampled); `eos` are the model's stop tokens.
    ///
    /// # Errors
    /// [`Error::Request`] for limits that cannot be, [`Error::OutOfMemory`] where they do not fit.
    pub fn new(model: Model<B>, limits: &EngineLimits, num_tokens: usize, eos: Vec<u32>) -> Result<Self> {
        Self::among(model, None, limits, num_tokens, eos)
    }

    /// The same as rank 0 of a group, the others of which [`follow`].
    ///
    /// # Errors
    /// As [`Engine::new`], and where the ranks lose each other.
    pub fn among(
        model: Model<B>,
        group: Option<Arc<dyn Group>>,
        limits: &EngineLimits,
        num_tokens: usize,
        eos: Vec<u32>,
    ) -> Result<Self> {
        let loaded = Loaded::new(model, group);
        let (model, config) = (&loaded.model, loaded.model.config());
        limits.check(config.max_context())?;
        let page_bytes = model.page_bytes();
        if let Some(bytes) = limits.kv_cache_bytes {
            at_least("kv_cache_bytes", bytes, page_bytes)?;
        }
        // On a device with memory of its own: what of it is for more than weights.
        let free = loaded.free_memory()?.filter(|_| limits.kv_cache_bytes.is_none());
        let budget = |buffers: usize| {
            let bytes = (free? as f64 * limits.gpu_memory_utilization) as usize;
            Some(Budget { bytes, slot_bytes: model.slot_bytes(), buffers })
        };
        // Sizes that are also limits of the buffers, then, once the buffers are there, what is left for pages.
        let fit = |buffers: usize| Pages::fit(limits, config.max_context(), page_bytes, budget(buffers));
        let pages = match fit(0) {
            // It fits no better with buffers, which say how much is missing.
            Err(Error::OutOfMemory { .. }) if free.is_some() => Pages::least(limits, config.max_context()),
            pages => pages?,
        };
        // More than all sequences' prompts never come together.
        let all_prompts = pages.max_model_len.next_multiple_of(CHUNK_LEN).saturating_mul(limits.max_num_seqs);
        let prefill = limits.max_num_batched_tokens.min(all_prompts);
        let workspace = loaded.workspace(&BatchLimits {
            max_tokens: prefill.saturating_add(limits.max_num_seqs),
            max_seqs: limits.max_num_seqs,
            max_len: pages.max_model_len,
            max_pages: pages.num_pages,
        })?;
        let pages = match (free, loaded.free_memory()?) {
            (Some(before), Some(now)) => fit(before.saturating_sub(now))?,
            _ => pages,
        };
        let Pages { max_model_len, num_pages } = pages;
        let cache = Cache::new(num_pages, limits.max_num_seqs);
        let num_tokens = num_tokens.min(config.vocab);
        Ok(Self {
            runner: loaded.with_memory(num_pages, limits.max_num_seqs, workspace)?,
            scheduler: Scheduler::new(cache, prefill, limits.max_num_seqs),
            max_model_len,
            num_pages,
            next_id: 0,
            seed: limits.seed,
            num_tokens,
            eos,
            samplers: Vec::new(),
            flight: None,
            landed: Vec::new(),
        })
    }

    /// The model.
    pub fn model(&self) -> &Model<B> {
        self.runner.model()
    }

    /// Whether no other rank has a part of the model.
    pub fn is_alone(&self) -> bool {
        self.runner.is_alone()
    }

    /// Tells the ranks that share the model why it ends, where an error ends it.
    pub fn fail(&self, why: &Error) {
        self.runner.fail(&why.to_string());
    }

    /// Longest prompt plus output of a request.
    pub fn max_model_len(&self) -> usize {
        self.max_model_len
    }

    /// What it holds, and what its device says of itself.
    pub fn report(&self) -> Report {
        Report {
            stats: self.model().backend().stats(),
            max_model_len: self.max_model_len,
            num_pages: self.num_pages,
            page_bytes: self.model().page_bytes(),
        }
    }

    /// Whether nothing is left to do.
    pub fn is_idle(&self) -> bool {
        self.scheduler.is_idle() && self.landed.is_empty()
    }

    /// Queues a request for text. `index` tells the samples of one prompt apart.
    ///
    /// # Errors
    /// [`Error::Request`] naming what cannot be served.
    pub fn add(&mut self, prompt: &[u32], params: &SamplingParams, index: u64) -> Result<RequestId> {
        params.check(self.model().config().vocab)?;
        let longest = self.max_model_len - 1;
        self.check_prompt(prompt, 1, longest)?;
        let mut params = params.clone();
        let room = self.max_model_len - prompt.len();
        params.max_tokens = Some(params.max_tokens.unwrap_or(room).min(room));
        let seed = match params.seed {
            Some(seed) => mix(seed) ^ index,
            None => mix(self.seed ^ mix(self.next_id)),
        };
        let request = self.request(prompt, Wanted::Tokens(params), seed);
        Ok(self.queue(request))
    }

    /// Queues a request for the logits of its prompt.
    ///
    /// # Errors
    /// As [`Engine::add`].
    pub fn add_logits(&mut self, prompt: &[u32]) -> Result<RequestId> {
        self.check_prompt(prompt, 1, self.max_model_len)?;
        let request = self.request(prompt, Wanted::Logits, 0);
        Ok(self.queue(request))
    }

    /// As [`Engine::add_logits`]; they stay on the device.
    ///
    /// # Errors
    /// As [`Engine::add`], where the device's memory is the host's, and where there is no room for them.
    pub fn add_device_logits(&mut self, prompt: &[u32]) -> Result<RequestId> {
        self.check_prompt(prompt, 1, self.max_model_len)?;
        let vocab = self.model().config().vocab;
        let Some(memory) = self.model().backend().lendable(prompt.len(), vocab)? else {
            return Err(Error::request("on_device", "a model on the CPU", "a model on a CUDA device"));
        };
        let request = self.request(prompt, Wanted::DeviceLogits, 0);
        Ok(self.queue(Request { device_logits: Some(memory), ..request }))
    }

    /// Queues a request for the MTP module's drafts over its prompt, of at least two tokens.
    ///
    /// # Errors
    /// As [`Engine::add`], and where the model was loaded without the module.
    pub fn add_mtp_logits(&mut self, prompt: &[u32]) -> Result<RequestId> {
        if !self.model().has_mtp() {
            let found = "a model that was loaded without its multi-token-prediction module";
            return Err(Error::request("mtp_logits", found, "LLM(..., mtp=True)"));
        }
        self.check_prompt(prompt, 2, self.max_model_len)?;
        let request = self.request(prompt, Wanted::MtpLogits, 0);
        Ok(self.queue(request))
    }

    fn check_prompt(&self, prompt: &[u32], shortest: usize, longest: usize) -> Result<()> {
        if prompt.len() < shortest || prompt.len() > longest {
            let found = format!("{} tokens", prompt.len());
            let allowed = format!("{shortest} to {longest} tokens (max_model_len is {})", self.max_model_len);
            return Err(Error::request("prompt", found, allowed));
        }
        let vocab = self.model().config().vocab;
        match prompt.iter().find(|&&id| id as usize >= vocab) {
            Some(id) => Err(Error::request("prompt_token_ids", id, format!("token ids below {vocab}"))),
            None => Ok(()),
        }
    }

    fn request(&mut self, prompt: &[u32], wanted: Wanted, seed: u64) -> Request {
        self.next_id += 1;
        Request {
            id: RequestId(self.next_id - 1),
            tokens: prompt.to_vec(),
            num_prompt: prompt.len(),
            computed_len: 0,
            wanted,
            seed,
            pages: Vec::new(),
            slot: None,
            logits: Vec::new(),
            device_logits: None,
        }
    }

    fn queue(&mut self, request: Request) -> RequestId {
        let id = request.id;
        self.scheduler.add(request);
        id
    }

    /// Forgets a request, whatever it was doing.
    pub fn abort(&mut self, id: RequestId) {
        self.scheduler.remove(id);
    }

    /// Runs one step: schedule, run, commit. Where the device chooses the tokens, the step after it is launched before
    /// they are waited for, if it can be (see `ahead.rs`). `poll` is called between layers with the step's requests and
    /// may end it; nothing is lost then, and the requests that were in it start over at the next step.
    ///
    /// # Errors
    /// What `poll` returned.
    pub fn step(&mut self, poll: impl Fn(&[RequestId]) -> Result<()>) -> Result<Vec<StepOutput>> {
        if !self.landed.is_empty() {
            return Ok(std::mem::take(&mut self.landed));
        }
        if let Some(flight) = self.flight.take() {
            return self.land(&flight, &poll);
        }
        let step = self.scheduler.schedule();
        self.runner.clear_slots(&step.new_slots)?;
        if step.requests.is_empty() {
            return match self.scheduler.is_idle() {
                true => Ok(Vec::new()),
                false => Err(Error::Internal("requests wait and none can run".into())),
            };
        }
        if let Some(rows) = self.device_sampling(&step) {
            return match self.launch(step, &rows, &poll) {
                Ok(flight) => self.land(&flight, &poll),
                Err(failed) => Err(self.give_up(failed)),
            };
        }
        match self.run(&step, &|| poll(&step.requests)) {
            Ok(rows) => {
                self.scheduler.commit(&step);
                Ok(self.commit_all(rows))
            }
            Err(error) => Err(self.give_up((step.requests, error))),
        }
    }

    /// Takes back what a step that failed reserved.
    fn give_up(&mut self, (requests, error): (Vec<RequestId>, Error)) -> Error {
        self.scheduler.abort(&requests);
        error
    }

    fn run(&mut self, step: &Step, poll: &impl Fn() -> Result<()>) -> Result<Vec<(RequestId, Row)>> {
        self.runner.forward(&step.batch, poll)?;
        if !step.drafts.hidden_rows.is_empty() {
            self.runner.forward_mtp(&step.drafts, poll)?;
        }
        let mut rows = self.lend_logits(step, poll)?;
        rows.extend(self.read_logits(step, poll)?);
        Ok(rows)
    }

    /// Copies the rows of logits that are wanted on the device. Changes no request.
    fn lend_logits(&mut self, step: &Step, poll: &impl Fn() -> Result<()>) -> Result<Vec<(RequestId, Row)>> {
        let Self { runner, scheduler, .. } = self;
        let (mut rows, mut first) = (Vec::new(), 0);
        for group in step.logit_owners.chunk_by(|a, b| a == b) {
            let end = first + group.len();
            if let Some(request) = scheduler.running(group[0])
                && let Some(memory) = &request.device_logits
            {
                let mut at = request.computed_len;
                for start in (first..end).step_by(MAX_LOGIT_ROWS) {
                    poll()?;
                    let part: Vec<usize> = (start..end.min(start + MAX_LOGIT_ROWS)).collect();
                    runner.lend_logits(&part, memory.as_ref(), at)?;
                    at += part.len();
                }
                rows.push((request.id, Row::Lent));
            }
            first = end;
        }
        Ok(rows)
    }

    /// How the step's tokens are chosen, where the device can do it, for all of them.
    fn device_sampling(&self, step: &Step) -> Option<Vec<Sampling>> {
        if !B::SAMPLES || !step.drafts.hidden_rows.is_empty() {
            return None;
        }
        let row = |id: &RequestId| {
            let request = self.scheduler.running(*id)?;
            Some(context(request, self.num_tokens, &self.eos)?.sampling())
        };
        let rows: Vec<_> = step.logit_owners.iter().map(row).collect::<Option<_>>()?;
        (!rows.is_empty() && self.model().backend().can_sample(&rows)).then_some(rows)
    }

    /// Samples, or copies, the other rows of logits that are wanted. Changes no request.
    fn read_logits(&mut self, step: &Step, poll: &impl Fn() -> Result<()>) -> Result<Vec<(RequestId, Row)>> {
        let Self { runner, scheduler, samplers, num_tokens, eos, .. } = self;
        let vocab = runner.model().config().vocab;
        let mut rows = Vec::with_capacity(step.batch.logit_rows.len());
        let mut owned: Vec<_> = step.logit_owners.iter().enumerate().collect();
        owned.retain(|(_, id)| scheduler.running(**id).is_some_and(|r| r.device_logits.is_none()));
        for chunk in owned.chunks(MAX_LOGIT_ROWS) {
            poll()?;
            let (at, requests): (Vec<usize>, Vec<&Request>) =
                chunk.iter().filter_map(|(at, id)| Some((*at, scheduler.running(**id)?))).unzip();
            let contexts: Vec<Option<Context<'_>>> =
                requests.iter().map(|request| context(request, *num_tokens, eos)).collect();
            let candidates = contexts.iter().map(|c| c.as_ref().and_then(Context::num_candidates));
            let top = candidates.collect::<Option<Vec<_>>>().and_then(|k| k.into_iter().max());
            let logits = runner.logits(&at, top.map(|k| (k, *num_tokens)))?;
            samplers.resize_with(contexts.len().max(samplers.len()), Default::default);
            let work = samplers.par_iter_mut().zip(contexts).zip(logits.par_chunks_exact(vocab));
            rows.par_extend(work.zip(requests).map(|(((scratch, context), logits), request)| {
                let row = match context {
                    Some(context) => {
                        Row::Token(request.tokens.len(), sampler::sample(logits, &context, scratch))
                    }
                    None => Row::Logits(logits.to_vec()),
                };
                (request.id, row)
            }));
        }
        Ok(rows)
    }

    /// Gives the requests of a step what it made for them.
    fn commit_all(&mut self, rows: Vec<(RequestId, Row)>) -> Vec<StepOutput> {
        let now = Instant::now();
        let outputs = rows.into_iter().filter_map(|row| self.commit(row, now)).collect();
        debug_assert_eq!(self.scheduler.check_integrity(), Ok(()));
        outputs
    }

    /// Gives a request its token (or its rows of logits), and ends it where it is done.
    fn commit(&mut self, (id, row): (RequestId, Row), now: Instant) -> Option<StepOutput> {
        let vocab = self.model().config().vocab;
        let request = self.scheduler.running_mut(id)?;
        let mut output = StepOutput::new(id, now);
        match row {
            Row::Logits(row) => {
                if request.logits.is_empty() {
                    request.logits.reserve_exact(request.num_logit_rows() * vocab);
                }
                request.logits.extend(row);
                if request.logits.len() < request.num_logit_rows() * vocab {
                    return None;
                }
                output.finish = Some(FinishReason::Length);
            }
            Row::Lent => {
                if request.computed_len < request.num_prompt {
                    return None;
                }
                output.finish = Some(FinishReason::Length);
            }
            Row::Token(_, None) => {
                output.error = Some(NO_TOKEN.into());
            }
            Row::Token(place, Some((token, logprobs))) => {
                request.set_token(place, token);
                let (num_output, params) = (place + 1 - request.num_prompt, request.params()?);
                let stop = params.stop_token_ids.contains(&token)
                    || (!params.ignore_eos && self.eos.contains(&token));
                output.finish = match () {
                    () if stop && num_output >= params.min_tokens => Some(FinishReason::Stop),
                    () if Some(num_output) >= params.max_tokens => Some(FinishReason::Length),
                    () => None,
                };
                (output.token, output.logprobs) = (Some(token), logprobs);
            }
        }
        if output.finish.is_some() || output.error.is_some() {
            let request = self.scheduler.remove(id)?;
            (output.logits, output.device_logits) = (request.logits, request.device_logits);
        }
        Some(output)
    }
}

/// What the sampler must know of a request; `None` for one that wants logits.
fn context<'a>(request: &'a Request, num_tokens: usize, eos: &'a [u32]) -> Option<Context<'a>> {
    Some(Context {
        params: request.params()?,
        prompt: &request.tokens[..request.num_prompt],
        output: request.output(),
        seed: request.seed,
        num_tokens,
        eos,
    })
}

const NO_TOKEN: &str = "the model gave no finite logit to choose from: its weights are not sane, or min_tokens, stop \
    tokens and logit_bias leave no token";

/// What a row of logits became.
enum Row {
    /// A token, at its place in the request; `None` where no logit was finite.
    Token(usize, Option<(u32, Option<TokenLogprobs>)>),
    /// Itself.
    Logits(Vec<f32>),
    /// Part of the memory that the request lends.
    Lent,
}

impl Row {
    fn of(place: usize, sampled: Sampled) -> Self {
        let logprobs = sampled.logprobs.map(|l| TokenLogprobs { chosen: l.chosen, rank: l.rank, top: l.top });
        Row::Token(place, sampled.token.map(|token| (token, logprobs)))
    }
}

#[cfg(test)]
pub(crate) mod tests;
