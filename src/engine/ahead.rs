//! One step ahead: where the device chooses the tokens, the next step starts from them there, and the host reads them
//! while it runs.
//!
//! The host does not know then whether a token has ended its request. Where one has, what the step after it computes for
//! that request is dropped; its pages and its slot may be another's by then, whose steps come later on the device.

use super::{Engine, Row, StepOutput};
use crate::backend::{Backend, Sampling};
use crate::request::{Request, RequestId};
use crate::scheduler::Step;
use crate::{Error, Result};

/// A step that was launched, and counts as computed; its tokens are not read yet.
pub(super) struct Flight {
    step: Step,
    /// Where the token of each of its `logit_owners` goes.
    places: Vec<usize>,
}

/// Stands for a token that the host does not know.
const PLACEHOLDER: u32 = 0;

impl<B: Backend> Engine<B> {
    /// Launches a step whose tokens the device chooses. Where that failed, says for which requests.
    pub(super) fn launch(
        &mut self,
        step: Step,
        rows: &[Sampling],
        poll: &impl Fn(&[RequestId]) -> Result<()>,
    ) -> Result<Flight, (Vec<RequestId>, Error)> {
        let poll = || poll(&step.requests);
        if let Err(error) = self.runner.launch_sampled(&step.batch, rows, self.num_tokens, poll) {
            return Err((step.requests, error));
        }
        self.scheduler.commit(&step);
        let place = |id: &RequestId| self.scheduler.running(*id).map_or(0, |r| r.tokens.len());
        Ok(Flight { places: step.logit_owners.iter().map(place).collect(), step })
    }

    /// Launches the step after a flight, where it can be, then reads the flight's tokens.
    pub(super) fn land(
        &mut self,
        flight: &Flight,
        poll: &impl Fn(&[RequestId]) -> Result<()>,
    ) -> Result<Vec<StepOutput>> {
        let next = self.follow(flight, poll);
        let sampled = self.runner.sampled()?;
        let places = flight.step.logit_owners.iter().zip(&flight.places);
        let rows: Vec<_> = places.zip(sampled).map(|((&id, &at), token)| (id, Row::of(at, token))).collect();
        let outputs = self.commit_all(rows);
        match next {
            Ok(next) => {
                self.flight = next;
                Ok(outputs)
            }
            Err(failed) => {
                self.landed = outputs;
                Err(self.give_up(failed))
            }
        }
    }

    /// Launches the step after a flight if it is one token of each of the flight's requests, and nothing about it but the
    /// tokens depends on what they are.
    fn follow(
        &mut self,
        flight: &Flight,
        poll: &impl Fn(&[RequestId]) -> Result<()>,
    ) -> Result<Option<Flight>, (Vec<RequestId>, Error)> {
        let owners = &flight.step.logit_owners;
        let goes_on = |r: &Request| {
            r.params().is_some_and(|p| !p.looks_back() && Some(r.output().len() + 1) < p.max_tokens)
        };
        let all_go_on = || owners.iter().all(|&id| self.scheduler.running(id).is_some_and(goes_on));
        if !self.scheduler.is_lockstep(owners) || !all_go_on() {
            return Ok(None);
        }
        self.each(owners, |request| request.tokens.push(PLACEHOLDER));
        let mut step = self.scheduler.schedule();
        step.batch.follows = true;
        match self.device_sampling(&step) {
            Some(rows) => self.launch(step, &rows, poll).map(Some),
            None => {
                self.each(owners, |request| request.tokens.truncate(request.tokens.len() - 1));
                Ok(None)
            }
        }
    }

    fn each(&mut self, ids: &[RequestId], mut change: impl FnMut(&mut Request)) {
        for &id in ids {
            if let Some(request) = self.scheduler.running_mut(id) {
                change(request);
            }
        }
    }
}
