//! The engine's thread, with callers that come and go.

use std::cell::RefCell;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::Duration;

use super::{Event, Generation, Job, Service};
use crate::backend::cpu::Cpu;
use crate::engine::Engine;
use crate::engine::tests::{limits, model, model_on};
use crate::ranks::Group;
use crate::request::{SamplingParams, Wanted};
use crate::{Error, Result};

const LONG: Duration = Duration::from_secs(30);

fn service() -> Service {
    let make = || Ok((Engine::new(model("moe_bf16"), &limits(), usize::MAX, vec![])?, ()));
    Service::start(make, || Ok(()), |wait| wait()).unwrap().0
}

fn job(i: u64, max_tokens: usize) -> Job {
    let params = SamplingParams { seed: Some(i), max_tokens: Some(max_tokens), ..SamplingParams::default() };
    Job {
        prompt: (0..10 + i as u32 * 7).map(|t| t % 150).collect(),
        wanted: Wanted::Tokens(params),
        index: i,
    }
}

/// The tokens of each request.
fn finish(mut generation: Generation) -> Vec<Vec<u32>> {
    let mut tokens = vec![Vec::new(); generation.ids.len()];
    loop {
        match generation.wait(LONG).unwrap() {
            Event::Output(i, output) => tokens[i].extend(output.token),
            Event::Done => return tokens,
            Event::Timeout => panic!("nothing for {LONG:?}"),
        }
    }
}

#[test]
fn many_callers_some_of_which_leave() {
    let service = service();
    let alone: Vec<_> = (0..6).map(|i| finish(service.submit(vec![job(i, 20)]).unwrap()).remove(0)).collect();
    std::thread::scope(|scope| {
        for thread in 0..6 {
            let (service, alone) = (service.clone(), &alone);
            scope.spawn(move || {
                for round in 0..6 {
                    let i = (thread + round) % 6;
                    let mut generation = service.submit(vec![job(i, 20), job((i + 1) % 6, 20)]).unwrap();
                    match (thread + round) % 3 {
                        0 => {
                            // Leaves in the middle.
                            for _ in 0..round {
                                generation.wait(LONG).unwrap();
                            }
                        }
                        1 => {
                            // Closes one: no output of it follows, and the other is as ever.
                            generation.close(0);
                            generation.close(0);
                            let tokens = finish(generation);
                            assert_eq!((&tokens[0][..], &tokens[1]), (&[][..], &alone[(i as usize + 1) % 6]));
                        }
                        _ => {
                            let tokens = finish(generation);
                            assert_eq!(
                                [&tokens[0], &tokens[1]],
                                [&alone[i as usize], &alone[(i as usize + 1) % 6]]
                            );
                        }
                    }
                }
            });
        }
    });
    // Nothing of all that is left to run.
    assert_eq!(finish(service.submit(vec![job(3, 20)]).unwrap())[0], alone[3]);
}

#[test]
fn all_or_none_of_a_submission_is_queued() {
    let service = service();
    let bad = Job { prompt: vec![1, 9999], ..job(0, 3) };
    let Err(Error::Request { field, .. }) = service.submit(vec![job(0, 3), bad.clone()]) else {
        panic!("accepted")
    };
    assert_eq!(field, "request 1: prompt_token_ids");
    let Err(Error::Request { field, .. }) = service.submit(vec![bad]) else { panic!("accepted") };
    assert_eq!(field, "prompt_token_ids");
    assert_eq!(finish(service.submit(vec![]).unwrap()).len(), 0);
    assert_eq!(finish(service.submit(vec![job(0, 3)]).unwrap())[0].len(), 3);
}

#[test]
fn the_thread_ends_with_the_last_handle() {
    thread_local! {
        static ALIVE: RefCell<Option<Sender<()>>> = const { RefCell::new(None) };
    }
    let (alive, ended) = channel();
    let make = move || {
        ALIVE.set(Some(alive)); // dropped when the thread ends
        Ok((Engine::new(model("moe_bf16"), &limits(), usize::MAX, vec![])?, ()))
    };
    let service = Service::start(make, || Ok(()), |wait| wait()).unwrap().0;
    let mut generation = service.submit(vec![job(0, 200)]).unwrap();
    drop(service.clone());
    drop(service);
    // A generation keeps it.
    assert!(matches!(generation.wait(LONG).unwrap(), Event::Output(0, _)));
    assert_eq!(ended.try_recv(), Err(std::sync::mpsc::TryRecvError::Empty));
    drop(generation);
    assert_eq!(ended.recv_timeout(LONG), Err(RecvTimeoutError::Disconnected));
}

#[test]
fn an_engine_that_cannot_be_made() {
    let failing = || -> crate::Result<(Engine<crate::backend::cpu::Cpu>, ())> { Err(Error::Interrupted) };
    assert!(matches!(Service::start(failing, || Ok(()), |wait| wait()), Err(Error::Interrupted)));
    let panicking = || -> crate::Result<(Engine<crate::backend::cpu::Cpu>, ())> { panic!("no such luck") };
    match Service::start(panicking, || Ok(()), |wait| wait()) {
        Err(Error::Internal(what)) => assert_eq!(what, "no such luck"),
        _ => panic!("made"),
    }
}

/// A rank alone that panics where it is to add up.
struct Panics;

impl Group for Panics {
    fn rank(&self) -> usize {
        0
    }

    fn world(&self) -> usize {
        1
    }

    fn exchange(&self, mine: &[u8], unhurried: bool) -> Result<Vec<Arc<[u8]>>> {
        assert!(unhurried, "no such luck");
        Ok(vec![mine.into()])
    }

    fn send(&self, _: &[u8]) -> Result<()> {
        Ok(())
    }

    fn receive(&self) -> Result<Option<Arc<[u8]>>> {
        Ok(None)
    }

    fn check(&self) -> Result<()> {
        Ok(())
    }

    fn fail(&self, _: &str) {}

    fn end(&self) {}
}

#[test]
fn callers_hear_what_a_panic_in_a_step_said() {
    let group: Arc<dyn Group> = Arc::new(Panics);
    let make = move || {
        let model = model_on("moe_bf16", Cpu::among(Arc::clone(&group)));
        Ok((Engine::among(model, Some(group), &limits(), usize::MAX, vec![])?, ()))
    };
    let service = Service::start(make, || Ok(()), |wait| wait()).unwrap().0;
    let mut under_way = service.submit(vec![job(0, 20)]).unwrap();
    let told = |error: Error| {
        assert!(error.to_string().contains("the engine's thread ended: no such luck"), "{error}")
    };
    told(under_way.wait(LONG).err().unwrap());
    told(service.submit(vec![job(1, 20)]).err().unwrap());
    told(service.report().err().unwrap());
}
