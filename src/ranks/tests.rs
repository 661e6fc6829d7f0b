use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::*;

const SHORT: Duration = Duration::from_millis(300);

/// Runs something on every rank of threads, then of processes (here threads too, over a socket); what each returned.
fn both<T: Send + 'static>(
    world: usize,
    run: impl Fn(&dyn Group) -> T + Send + Sync + 'static,
) -> Vec<Vec<T>> {
    let run = Arc::new(run);
    let meet = |meeting: Meeting| {
        let group = Tcp::meet_within(&meeting, Duration::from_secs(20), SHORT, |_, _| Ok(())).unwrap();
        Box::new(group) as Box<dyn Group>
    };
    let threads = Threads::group(world, SHORT).into_iter().map(|g| Box::new(g) as Box<dyn Group>).collect();
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

fn free_port() -> u16 {
    TcpListener::bind("[::]:0").unwrap().local_addr().unwrap().port()
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
    let all = both(2, |group| match group.rank() {
        0 => group.exchange(b"x", false).unwrap_err().to_string(),
        _ => {
            std::thread::sleep(4 * SHORT);
            String::new()
        }
    });
    for ranks in all {
        assert!(ranks[0].contains("rank 1 kept the others waiting for 300ms"), "{ranks:?}");
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
        let mine = [Some(7), None, Some(5)][group.rank()];
        (least(group, mine).unwrap(), least(group, None).unwrap())
    });
    assert!(all.into_iter().flatten().all(|x| x == (Some(5), None)));
}

#[test]
fn strangers_at_the_port_do_not_disturb_and_other_worlds_are_refused() {
    let port = free_port();
    let host = std::thread::spawn(move || {
        Tcp::meet_within(&meeting(0, 2, port), Duration::from_secs(20), SHORT, |_, _| Ok(()))
            .and_then(|group| group.exchange(b"0", true).map(|all| all.len()))
    });
    let mut stranger = loop {
        if let Ok(stream) = TcpStream::connect(("localhost", port)) {
            break stream;
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    std::io::Write::write_all(&mut stranger, b"GET / HTTP/1.1\r\nHost: somebody\r\n\r\n").unwrap();
    let refused = Tcp::meet_within(&meeting(1, 3, port), Duration::from_secs(20), SHORT, |_, _| Ok(()));
    let text = refused.err().unwrap().to_string();
    assert!(text.contains("of 3 ranks") && text.contains("and of 2"), "{text}");
    let group =
        Tcp::meet_within(&meeting(1, 2, port), Duration::from_secs(20), SHORT, |_, _| Ok(())).unwrap();
    assert_eq!(group.exchange(b"1", true).unwrap().len(), 2);
    assert_eq!(host.join().unwrap().unwrap(), 2);
}

#[test]
fn who_does_not_come_is_named() {
    let alone =
        |rank| Tcp::meet_within(&meeting(rank, 3, free_port()), SHORT, SHORT, |_, _| Ok(())).err().unwrap();
    assert!(alone(0).to_string().contains("rank 1 of 3 has not come"), "{}", alone(0));
    assert!(alone(2).to_string().contains("rank 0 is not to be reached"), "{}", alone(2));
    let interrupted = Tcp::meet(&meeting(0, 2, free_port()), |_, _| Err(Error::Interrupted));
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
    let slurm = with(&[("SLURM_NTASKS", "4"), ("SLURM_PROCID", "3"), ("SLURM_LOCALID", "1")]);
    assert_eq!(slurm, Ok(Some(want)));
    let port = with(&[("WORLD_SIZE", "2"), ("RANK", "0"), ("QWEN35RS_PORT", "7")]).unwrap().unwrap();
    assert_eq!(port.address, "node0:7");
    let named = |vars: &[(&'static str, &'static str)], name: &str| {
        let error = from(vars).unwrap_err();
        assert!(error.starts_with(name), "{error}");
    };
    named(&[("WORLD_SIZE", "two"), ("RANK", "0")], "WORLD_SIZE");
    named(&[("WORLD_SIZE", "2"), ("RANK", "2")], "RANK");
    named(&[("WORLD_SIZE", "2"), ("RANK", "1")], "MASTER_ADDR");
    named(&[("WORLD_SIZE", "2"), ("RANK", "1"), ("MASTER_ADDR", "x")], "MASTER_PORT");
    let high = with(&[("WORLD_SIZE", "2"), ("RANK", "0"), ("QWEN35RS_PORT", "65536")]).unwrap_err();
    assert!(high.starts_with("the port after MASTER_PORT, or QWEN35RS_PORT: found 65536"), "{high}");
}
