use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use std::io::{Read, Write};
use std::sync::Mutex;

use super::tcp::{EXCHANGE, FAILED};
use super::*;

const SHORT: Duration = Duration::from_millis(300);
const VERSION: &str = env!("CARGO_PKG_VERSION");
const HERE: u8 = 0x51;

/// Runs something on every rank of threads, then of processes (here threads too, over a socket); what each returned.
fn both<T: Send + 'static>(
    world: usize,
    run: impl Fn(&dyn Group) -> T + Send + Sync + 'static,
) -> Vec<Vec<T>> {
    let run = Arc::new(run);
    let meet = |meeting: Meeting| {
        let group = Tcp::meet_within(&meeting, Duration::from_secs(20), SHORT, quiet()).unwrap();
        Box::new(group) as Box<dyn Group>
    };
    let threads =
        Threads::group(world, SHORT, quiet()).into_iter().map(|g| Box::new(g) as Box<dyn Group>).collect();
    let on = |groups: Vec<Box<dyn FnOnce() -> Box<dyn Group> + Send>>| -> Vec<T> {
        let spawn = |make: Box<dyn FnOnce() -> Box<dyn Group> + Send>| {
            let run = Arc::clone(&run);
            std::thread::spawn(move || run(make().as_ref()))
        };
        let handles: Vec<_> = groups.into_iter().map(spawn).collect();
        handles.into_iter().map(|handle| handle.join().unwrap()).collect()
    };
    let made: Vec<Box<dyn Group>> = threads;
    let first = on(made
        .into_iter()
        .map(|group| Box::new(move || group) as Box<dyn FnOnce() -> Box<dyn Group> + Send>)
        .collect());
    let port = free_port();
    let second = on((0..world)
        .map(|rank| {
            let meeting = meeting(rank, world, port);
            Box::new(move || meet(meeting)) as Box<dyn FnOnce() -> Box<dyn Group> + Send>
        })
        .collect());
    vec![first, second]
}

/// Says nothing of waits.
fn quiet() -> Poll {
    Arc::new(|_, _| Ok(()))
}

fn come(rank: usize, world: usize, port: u16) -> Result<Tcp> {
    Tcp::meet_within(&meeting(rank, world, port), Duration::from_secs(20), SHORT, quiet())
}

fn free_port() -> u16 {
    TcpListener::bind("[::]:0").unwrap().local_addr().unwrap().port()
}

/// A connection to whoever listens there, sooner or later.
fn knock(port: u16) -> TcpStream {
    loop {
        if let Ok(stream) = TcpStream::connect(("localhost", port)) {
            return stream;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// The kind of a message, and what it says.
fn message(stream: &mut TcpStream) -> std::io::Result<(u8, String)> {
    let mut head = [0; 9];
    stream.read_exact(&mut head)?;
    let mut bytes = vec![0; head[1] as usize];
    stream.read_exact(&mut bytes)?;
    Ok((head[0], String::from_utf8(bytes).unwrap()))
}

/// A rank that meets rank 0, and does nothing more.
fn silent(rank: usize, world: usize, port: u16) -> TcpStream {
    let mut stream = knock(port);
    stream.write_all(&meet::hello(rank, world, VERSION)).unwrap();
    message(&mut stream).unwrap();
    stream.write_all(&[HERE]).unwrap();
    message(&mut stream).unwrap();
    stream
}

fn meeting(rank: usize, world: usize, port: u16) -> Meeting {
    Meeting { rank, local_rank: rank, world, address: format!("localhost:{port}") }
}

#[test]
fn exchanges_come_in_the_order_of_ranks() {
    for world in [1, 2, 3, 8] {
        let all = both(world, move |group| {
            (0..50u8).all(|round| {
                let mine = vec![group.rank() as u8 ^ round; group.rank() * 1000 + usize::from(round)];
                let all = group.exchange(&mine, round % 2 == 0).unwrap();
                all.len() == world
                    && all.iter().enumerate().all(|(rank, bytes)| {
                        bytes.len() == rank * 1000 + usize::from(round)
                            && bytes.iter().all(|&b| b == rank as u8 ^ round)
                    })
            })
        });
        assert!(all.into_iter().flatten().all(|ok| ok), "{world}");
    }
}

#[test]
fn orders_come_in_order_until_rank_0_ends() {
    let all = both(3, |group| {
        if group.rank() == 0 {
            (0..20u8).for_each(|i| group.send(&[i; 3]).unwrap());
            return Vec::new();
        }
        std::iter::from_fn(|| group.receive().unwrap().map(|order| order[0])).collect::<Vec<u8>>()
    });
    for ranks in all {
        assert_eq!(ranks, [vec![], (0..20).collect(), (0..20).collect()]);
    }
}

#[test]
fn a_rank_that_ends_fails_the_others() {
    let all = both(3, |group| match group.rank() {
        2 => String::new(),
        _ => group.exchange(b"x", true).unwrap_err().to_string(),
    });
    for ranks in all {
        assert!(ranks[..2].iter().all(|e| e.contains("rank 2 has ended")), "{ranks:?}");
    }
}

#[test]
fn a_rank_that_stalls_or_fails_ends_the_wait_of_the_others() {
    let start = Instant::now();
    let all = both(3, |group| {
        group.exchange(b"all are here", true).unwrap();
        if group.rank() == 2 {
            std::thread::sleep(4 * SHORT);
            return group.exchange(b"too late", false).unwrap_err().to_string();
        }
        let error = group.exchange(b"x", false).unwrap_err().to_string();
        assert_eq!(group.check().unwrap_err().to_string(), error);
        error
    });
    for ranks in all {
        assert!(ranks.iter().all(|e| e.contains("rank 2 kept the others waiting for 300ms")), "{ranks:?}");
    }
    assert!(start.elapsed() < Duration::from_secs(20));
    let all = both(3, |group| match group.rank() {
        1 => {
            group.fail("no luck");
            std::thread::sleep(SHORT);
            String::new()
        }
        _ => group.exchange(b"x", true).unwrap_err().to_string(),
    });
    for ranks in all {
        assert!(ranks[0].contains("rank 1: no luck") && ranks[2].contains("rank 1: no luck"), "{ranks:?}");
    }
}

#[test]
fn a_rank_that_loads_is_waited_for_as_long_as_it_lives() {
    let all = both(3, |group| {
        if group.rank() == 1 {
            // Longer than one without a sign of life is waited for.
            std::thread::sleep(6 * SHORT);
        }
        group.exchange(b"x", true).map(|all| all.len()).map_err(|e| e.to_string())
    });
    assert!(all.iter().flatten().all(|all| *all == Ok(3)), "{all:?}");
}

#[test]
fn a_rank_that_is_stopped_while_others_wait_is_named_first_in_notes_then_in_the_error() {
    for stopped in [1, 2] {
        let port = free_port();
        let said = Arc::new(Mutex::new(Vec::new()));
        let notes = Arc::clone(&said);
        let poll: Poll = Arc::new(move |waited, what: &str| {
            notes.lock().unwrap().push((waited, what.to_string()));
            Ok(())
        });
        let other = std::thread::spawn(move || {
            come(3 - stopped, 3, port).unwrap().exchange(b"x", true).unwrap_err().to_string()
        });
        let fake = std::thread::spawn(move || silent(stopped, 3, port));
        let group = Tcp::meet_within(&meeting(0, 3, port), Duration::from_secs(20), SHORT, poll).unwrap();
        let _fake = fake.join().unwrap();
        said.lock().unwrap().clear();
        let start = Instant::now();
        let error = group.exchange(b"x", true).unwrap_err().to_string();
        assert!(start.elapsed() < Duration::from_secs(10));
        let why = format!("rank {stopped} has given no sign of life for");
        assert!(error.contains(&why), "{error}");
        assert!(other.join().unwrap().contains(&why));
        let said = said.lock().unwrap();
        let (waited, what) = said.last().unwrap();
        assert!(*waited >= SHORT, "{said:?}");
        assert!(what.starts_with(&format!("rank {stopped} has not come so far; its last sign")), "{what}");
    }
}

#[test]
fn what_waits_for_a_rank_ends_where_the_user_ends_it() {
    let poll: Poll = Arc::new(|waited, _| match waited > SHORT {
        true => Err(Error::Interrupted),
        false => Ok(()),
    });
    let group = Threads::group(2, SHORT, poll);
    assert!(matches!(group[0].exchange(b"x", true), Err(Error::Interrupted)));
}

#[test]
fn a_rank_that_fails_is_heard_while_another_is_waited_for() {
    let all = both(3, |group| match group.rank() {
        2 => {
            group.fail("no luck");
            std::thread::sleep(2 * SHORT);
            Duration::ZERO
        }
        1 => {
            std::thread::sleep(10 * SHORT);
            let error = group.exchange(b"x", true).unwrap_err().to_string();
            assert!(error.contains("rank 2: no luck"), "{error}");
            Duration::ZERO
        }
        _ => {
            let start = Instant::now();
            let error = group.exchange(b"x", true).unwrap_err().to_string();
            assert!(error.contains("rank 2: no luck"), "{error}");
            start.elapsed()
        }
    });
    assert!(all.iter().flatten().all(|waited| *waited < 5 * SHORT), "{all:?}");
}

#[test]
fn time_in_which_the_process_was_stopped_is_not_waited() {
    let mut clock = waiting::Clock::start();
    (0..3).for_each(|_| {
        std::thread::sleep(waiting::PIECE / 2);
        clock.tick();
    });
    assert!(clock.tick() >= waiting::PIECE);
    std::thread::sleep(10 * waiting::PIECE);
    assert!(clock.tick() <= 8 * waiting::PIECE, "{:?}", clock.tick());
}

#[test]
fn patience_of_users() {
    let from = |text: Option<&str>| {
        let text = text.map(String::from);
        patience(move |name| text.clone().filter(|_| name == "QWEN35RS_PATIENCE")).map_err(|e| e.to_string())
    };
    assert_eq!((from(None), from(Some(" 5"))), (Ok(PATIENCE), Ok(Duration::from_secs(5))));
    for wrong in ["", "0", "-1", "1.5", "a minute", "86401", "99999999999999999999"] {
        let error = format!("QWEN35RS_PATIENCE: found {wrong:?}; allowed: seconds, 1 to 86400");
        assert_eq!(from(Some(wrong)), Err(error));
    }
}

#[test]
fn what_differs_is_named() {
    let all = both(3, |group| {
        let dtype = if group.rank() == 2 { "float32" } else { "auto" };
        let same = agree(group, &[("version".into(), "1".into())]);
        let things = [("path".into(), "a".into()), ("dtype".into(), dtype.into())];
        (same.is_ok(), agree(group, &things).unwrap_err().to_string())
    });
    for ranks in all {
        assert!(ranks.iter().all(|r| r.0 && r.1.contains("dtype: rank 0 has auto, rank 2 has float32")));
    }
    let all = both(3, |group| {
        let (host, mine) = [("one", 5), ("another", 7), ("one", 20)][group.rank()];
        sum_of_host(group, host, mine).unwrap()
    });
    assert_eq!(all, [[25, 7, 25], [25, 7, 25]]);
    let all = both(3, |group| {
        let mine = [Some(7), None, Some(5)][group.rank()];
        (least(group, mine).unwrap(), least(group, None).unwrap())
    });
    assert!(all.into_iter().flatten().all(|x| x == (Some(5), None)));
}

#[test]
fn strangers_at_the_port_do_not_disturb_and_other_worlds_are_refused() {
    let port = free_port();
    let host = std::thread::spawn(move || {
        come(0, 2, port).and_then(|group| group.exchange(b"0", true).map(|all| all.len()))
    });
    let mut stranger = knock(port);
    Write::write_all(&mut stranger, b"GET / HTTP/1.1\r\nHost: somebody\r\n\r\n").unwrap();
    let refused = come(1, 3, port);
    let text = refused.err().unwrap().to_string();
    assert!(text.contains("rank 1 of 3 ranks, and rank 0 is of 2"), "{text}");
    let group = come(1, 2, port).unwrap();
    assert_eq!(group.exchange(b"1", true).unwrap().len(), 2);
    assert_eq!(host.join().unwrap().unwrap(), 2);
}

#[test]
fn a_look_tells_of_a_rank_that_is_gone() {
    let all = both(3, |group| {
        let fresh = group.check().is_ok();
        group.exchange(b"all have looked", true).unwrap();
        match group.rank() {
            1 => group.fail("no luck"),
            _ => std::thread::sleep(SHORT),
        }
        let looked = group.check().map_err(|e| e.to_string());
        // What fails behind it says the same.
        let later = match group.rank() {
            0 => group.send(&[0; 9]).unwrap_err(),
            _ => group.receive().unwrap_err(),
        };
        (fresh, looked, later.to_string())
    });
    for ranks in all {
        for (rank, (fresh, looked, later)) in ranks.into_iter().enumerate() {
            // Rank 2 hears it from rank 0, which may not have looked before it does.
            let told = looked.err().unwrap_or_else(|| later.clone());
            assert!(fresh && told.contains("rank 1: no luck") && later == told, "{rank}: {told}, {later}");
        }
    }
    // An end in order is no failure.
    let all = both(2, |group| {
        if group.rank() == 0 {
            group.end();
        } else {
            assert!(group.receive().unwrap().is_none());
        }
        group.check().is_ok() || group.rank() > 0
    });
    assert!(all.into_iter().flatten().all(|ok| ok));
}

#[test]
fn why_a_rank_failed_is_heard_behind_a_write_that_fails() {
    let port = free_port();
    let other = std::thread::spawn(move || {
        let group = come(1, 2, port).unwrap();
        group.exchange(b"1", true).unwrap();
        group.fail("no luck");
    });
    let group = come(0, 2, port).unwrap();
    group.exchange(b"0", true).unwrap();
    // Without a look before it.
    other.join().unwrap();
    let error = (0..100).find_map(|_| group.write(0, 1, &[&[7; 1 << 20]]).err()).unwrap();
    assert!(error.to_string().contains("rank 1: no luck"), "{error}");
}

#[test]
fn one_who_does_not_read_ends_the_wait_of_one_who_writes() {
    let port = free_port();
    let other = std::thread::spawn(move || come(1, 2, port).unwrap());
    let group = come(0, 2, port).unwrap();
    let _other = other.join().unwrap();
    let start = Instant::now();
    // More than the buffers of a connection hold.
    let error = (0..1000).find_map(|_| group.send(&vec![7; 1 << 20]).err()).unwrap();
    assert!(error.to_string().contains("rank 1 kept the others waiting for 300ms"), "{error}");
    assert!(start.elapsed() < Duration::from_secs(10));
}

#[test]
fn a_rank_that_comes_again_takes_its_place_and_two_of_one_rank_are_refused() {
    let port = free_port();
    let host = std::thread::spawn(move || come(0, 3, port)?.exchange(b"0", true).map(drop));
    drop(come(1, 3, port).unwrap());
    let again = come(1, 3, port).unwrap();
    // Also where it has begun to talk.
    again.write(0, 2, &[b"1"]).unwrap();
    for (rank, why) in [(1, "two processes say that they are rank 1"), (3, "that it is rank 3 of 3")] {
        let refused = come(rank, 3, port).err().unwrap().to_string();
        assert!(refused.contains(why), "{refused}");
    }
    let third = std::thread::spawn(move || come(2, 3, port)?.exchange(b"2", true).map(drop));
    third.join().unwrap().unwrap();
    host.join().unwrap().unwrap();
}

#[test]
fn who_came_and_went_before_it_was_looked_at_is_not_there() {
    let port = free_port();
    // Rank 1's attempt, over before rank 0 listens to it: three of them, and three that say nothing.
    let hello = meet::hello(1, 2, VERSION);
    let host = std::thread::spawn(move || come(0, 2, port)?.exchange(b"0", true).map(|all| all.len()));
    let silent: Vec<_> = (0..3).map(|_| knock(port)).collect();
    for _ in 0..3 {
        knock(port).write_all(&hello).unwrap();
    }
    let group = come(1, 2, port).unwrap();
    assert_eq!(group.exchange(b"1", true).unwrap().len(), 2);
    assert_eq!(host.join().unwrap().unwrap(), 2);
    drop(silent);
}

#[test]
fn another_version_is_refused_on_both_sides_by_name() {
    // Also where versions differ behind many characters.
    for version in ["9.9.9", &format!("{VERSION}-alpha.1+of.another.build"), ""] {
        let port = free_port();
        let host = std::thread::spawn(move || come(0, 3, port).err().unwrap().to_string());
        let first = come(1, 3, port).unwrap();
        let mut other = knock(port);
        other.write_all(&meet::hello(2, 3, version)).unwrap();
        let (kind, why) = message(&mut other).unwrap();
        assert_eq!(kind, FAILED);
        assert_eq!(why, format!("rank 2 is of qwen35rs {version}, rank 0 of qwen35rs {VERSION}"));
        // One that has met already hears it, too.
        assert!(first.exchange(b"1", true).unwrap_err().to_string().contains(&why));
        let error = host.join().unwrap();
        assert!(
            error.starts_with(&format!("ranks: {why}; start each rank once, all with the same ")),
            "{error}"
        );
    }
}

#[test]
fn why_one_was_sent_away_is_said_while_another_is_waited_for() {
    let port = free_port();
    let host = std::thread::spawn(move || {
        Tcp::meet_within(&meeting(0, 2, port), 8 * SHORT, SHORT, quiet()).err().unwrap().to_string()
    });
    assert!(come(1, 4, port).is_err());
    let error = host.join().unwrap();
    let why = "(who came was sent away: it is rank 1 of 4 ranks, and rank 0 is of 2)";
    assert!(error.contains("rank 1 of 2 has not come") && error.contains(why), "{error}");
}

#[test]
fn who_was_too_slow_for_its_place_comes_again() {
    // Rank 0 has given up a visitor that takes its time to say that it is there.
    let port = free_port();
    let host = std::thread::spawn(move || come(0, 2, port)?.exchange(b"0", true).map(|all| all.len()));
    let mut slow = knock(port);
    slow.write_all(&meet::hello(1, 2, VERSION)).unwrap();
    assert_eq!(message(&mut slow).unwrap().0, EXCHANGE);
    std::thread::sleep(Duration::from_millis(1500));
    drop(slow.write_all(&[HERE]));
    assert!(message(&mut slow).is_err());
    assert_eq!(come(1, 2, port).unwrap().exchange(b"1", true).unwrap().len(), 2);
    assert_eq!(host.join().unwrap().unwrap(), 2);
    // And a visitor that was given up knows it.
    let listener = TcpListener::bind("[::]:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let visitor = std::thread::spawn(move || come(1, 2, port).map(drop));
    for seated in [false, true] {
        let (mut stream, _) = listener.accept().unwrap();
        stream.read_exact(&mut [0; 64]).unwrap();
        stream.write_all(&[EXCHANGE, 0, 0, 0, 0, 0, 0, 0, 0]).unwrap();
        stream.read_exact(&mut [0]).unwrap();
        if seated {
            stream.write_all(&[EXCHANGE, 0, 0, 0, 0, 0, 0, 0, 0]).unwrap();
        }
    }
    visitor.join().unwrap().unwrap();
}

#[test]
fn strangers_do_not_stop_the_clock() {
    let port = free_port();
    let done = Arc::new(AtomicBool::new(false));
    let ended = Arc::clone(&done);
    let strangers = std::thread::spawn(move || {
        while !ended.load(Ordering::Relaxed) {
            if let Ok(mut stream) = TcpStream::connect(("localhost", port)) {
                drop(Write::write_all(&mut stream, &[0; 64]));
            }
        }
    });
    let start = Instant::now();
    let error = Tcp::meet_within(&meeting(0, 2, port), 2 * SHORT, SHORT, quiet()).err().unwrap();
    assert!(error.to_string().contains("rank 1 of 2 has not come"), "{error}");
    assert!(start.elapsed() < Duration::from_secs(8));
    done.store(true, Ordering::Relaxed);
    strangers.join().unwrap();
}

#[test]
fn who_does_not_come_is_named() {
    let alone = |rank| Tcp::meet_within(&meeting(rank, 3, free_port()), SHORT, SHORT, quiet()).err().unwrap();
    assert!(alone(0).to_string().contains("rank 1 of 3 has not come"), "{}", alone(0));
    assert!(alone(2).to_string().contains("rank 0 is not to be reached"), "{}", alone(2));
    let interrupted = Tcp::meet(&meeting(0, 2, free_port()), SHORT, Arc::new(|_, _| Err(Error::Interrupted)));
    assert!(matches!(interrupted.err(), Some(Error::Interrupted)));
}

#[test]
fn meetings_from_variables() {
    let from = |vars: &[(&str, &str)]| {
        let vars: Vec<(String, String)> = vars.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
        let var = move |name: &str| vars.iter().find(|(k, _)| k == name).map(|(_, v)| v.clone());
        Meeting::from_env(var).map_err(|e| e.to_string())
    };
    let host = [("MASTER_ADDR", "node0"), ("MASTER_PORT", "29500")];
    let with = |vars: &[(&'static str, &'static str)]| from(&[&host[..], vars].concat());
    assert_eq!(from(&[]), Ok(None));
    assert_eq!(with(&[("WORLD_SIZE", "1"), ("RANK", "0")]), Ok(None));
    let torchrun = with(&[("WORLD_SIZE", "4"), ("RANK", "3"), ("LOCAL_RANK", "1")]);
    let want = Meeting { rank: 3, local_rank: 1, world: 4, address: "node0:29501".into() };
    assert_eq!(torchrun, Ok(Some(want.clone())));
    let slurm = with(&[("SLURM_STEP_NUM_TASKS", "4"), ("SLURM_PROCID", "3"), ("SLURM_LOCALID", "1")]);
    assert_eq!(slurm, Ok(Some(want)));
    // A batch script is one process, whatever its job may start.
    assert_eq!(with(&[("SLURM_NTASKS", "4"), ("SLURM_PROCID", "0")]), Ok(None));
    let port = with(&[("WORLD_SIZE", "2"), ("RANK", "0"), ("QWEN35RS_PORT", "7")]).unwrap().unwrap();
    assert_eq!(port.address, "node0:7");
    let named = |vars: &[(&'static str, &'static str)], name: &str| {
        let error = from(vars).unwrap_err();
        assert!(error.starts_with(name), "{error}");
    };
    named(&[("WORLD_SIZE", "two"), ("RANK", "0")], "WORLD_SIZE");
    named(&[("WORLD_SIZE", "0"), ("RANK", "0")], "WORLD_SIZE: found 0; allowed: at least 1");
    let port_0 = [("WORLD_SIZE", "2"), ("RANK", "0"), ("MASTER_ADDR", "x"), ("QWEN35RS_PORT", "0")];
    named(&port_0, "QWEN35RS_PORT: found 0; allowed: 1 to 65535");
    named(&[("WORLD_SIZE", "2"), ("RANK", "2")], "RANK: found 2; allowed: 0 to 1");
    named(&[("WORLD_SIZE", "2"), ("SLURM_PROCID", "2")], "SLURM_PROCID: found 2; allowed: 0 to 1");
    named(
        &[("WORLD_SIZE", "2")],
        "RANK: found nothing; allowed: which of the 2 processes this is (WORLD_SIZE is 2)",
    );
    let huge =
        [("WORLD_SIZE", "2"), ("RANK", "0"), ("MASTER_ADDR", "x"), ("MASTER_PORT", "18446744073709551615")];
    named(&huge, "MASTER_PORT");
    named(&[("WORLD_SIZE", "2"), ("RANK", "1")], "MASTER_ADDR");
    named(&[("WORLD_SIZE", "2"), ("RANK", "1"), ("MASTER_ADDR", "x")], "MASTER_PORT");
    let high = with(&[("WORLD_SIZE", "2"), ("RANK", "0"), ("QWEN35RS_PORT", "65536")]).unwrap_err();
    assert!(high.starts_with("the port after MASTER_PORT, or QWEN35RS_PORT: found 65536"), "{high}");
}
