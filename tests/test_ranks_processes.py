"""Ranks that are processes, started as torchrun starts them. On the CPU; tests/gpu/test_shared_net.py has cards for them."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import qwen35rs
from golden.cases import Golden
from qwen35rs import LLM, SamplingParams

DATA = Path(__file__).parent / "golden" / "data"
QUESTIONS = ["What is 17 + 25?", "Who are you?", "Spell the word table backwards."]

RUN = """
import sys, json
from qwen35rs import LLM, SamplingParams
model, device, questions = json.loads(sys.argv[1])
llm = LLM(model, device=device, tensor_parallel_size=2)
print("ready", flush=True)
while True:
    out = llm.chat([[{"role": "user", "content": q}] for q in questions], SamplingParams(temperature=0, max_tokens=24))
    print(json.dumps([o.text for o in out]), flush=True)
    if len(sys.argv) < 3:
        break
"""


LOGITS = """
import sys, json
import numpy as np
from qwen35rs import LLM
(model, device, _), (ids, to, world, expert_parallel) = map(json.loads, sys.argv[1:])
llm = LLM(model, device=device, tensor_parallel_size=world, expert_parallel=expert_parallel, mtp=True)
np.savez(to, logits=llm.logits(ids), drafts=llm.mtp_logits(ids))
"""

SEVERAL = """
import sys, threading
from qwen35rs import LLM, RankError, SamplingParams
llm = LLM(device="cpu", tensor_parallel_size=2)
def ask():
    try:
        llm.generate("a", SamplingParams(max_tokens=8000, ignore_eos=True))
    except RankError as error:
        told.append(error)
told = []
print("ready", flush=True)
threads = [threading.Thread(target=ask) for _ in range(3)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
[print(error, flush=True) for error in told]  # by one thread: lines of several may come into each other
"""


def start(rank, world, port, *more, model=None, device="cpu", run=RUN, patience=60):
    """Rank `rank`; it goes on and on where there is `more`."""
    environment = os.environ | {
        "QWEN35RS_PATIENCE": str(patience),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
    }
    what = json.dumps([None if model is None else str(model), device, QUESTIONS])
    command = [sys.executable, "-c", run, what, *more]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def free_port():
    with socket.socket() as one:
        one.bind(("", 0))
        return one.getsockname()[1] - 1  # the ranks take the one after it


@pytest.fixture
def port():
    return free_port()


def test_processes_say_the_same_and_end_together(port, processes):
    params = SamplingParams(temperature=0, max_tokens=24)
    alone = LLM(device="cpu").chat([[{"role": "user", "content": q}] for q in QUESTIONS], params)
    processes += [start(rank, 2, port) for rank in range(2)]
    out, err = processes[0].communicate(timeout=60)
    assert processes[0].returncode == 0, err
    assert json.loads(out.splitlines()[-1]) == [out.text for out in alone]
    out, err = processes[1].communicate(timeout=20)
    assert (processes[1].returncode, out) == (0, ""), err


@pytest.mark.parametrize("world", [3, 4])
@pytest.mark.parametrize("expert_parallel", [False, True])
def test_more_than_two_processes(port, processes, tmp_path, world, expert_parallel):
    golden = Golden("moe_ranks")
    prompt = max(golden.prompts, key=lambda prompt: len(prompt.sequence))
    to = str(tmp_path / "said.npz")
    what = json.dumps([prompt.sequence, to, world, expert_parallel])
    processes += [start(rank, world, port, what, model=golden.path, run=LOGITS) for rank in range(world)]
    for process in processes:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    said, one = np.load(to), LLM(golden.path, device="cpu", mtp=True)
    for want, got in [
        (prompt.logits, said["logits"][prompt.rows]),
        (one.logits(prompt.sequence), said["logits"]),
        (one.mtp_logits(prompt.sequence), said["drafts"]),
    ]:
        assert np.abs(want - got).max() <= 2e-5 * np.abs(want).max()


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_killed_ends_the_other(port, processes, victim):
    processes += [start(rank, 2, port, "on and on") for rank in range(2)]
    assert processes[0].stdout.readline() == "ready\n"
    processes[0].stdout.readline()
    processes[victim].send_signal(signal.SIGKILL)
    since = time.monotonic()
    _, err = processes[1 - victim].communicate(timeout=60)
    assert time.monotonic() - since < 5
    assert processes[1 - victim].returncode == 1
    assert f"qwen35rs.RankError: ranks: rank {victim} has ended" in err


def test_a_rank_that_is_stopped_in_a_step_ends_every_request(port, processes):
    processes += [start(rank, 2, port, run=SEVERAL, patience=2) for rank in range(2)]
    assert processes[0].stdout.readline() == "ready\n"
    time.sleep(0.5)
    processes[1].send_signal(signal.SIGSTOP)
    since = time.monotonic()
    out, err = processes[0].communicate(timeout=60)
    assert 1.5 < time.monotonic() - since < 12
    # One of them may be told by its own step, the others by the end of the engine: in the same words.
    lines = out.splitlines()
    assert len(lines) == 3 and all("rank 1 kept the others waiting for 2s" in line for line in lines), (
        out,
        err,
    )
    assert processes[0].returncode == 0, err
    # Once it goes on it hears of that.
    processes[1].send_signal(signal.SIGCONT)
    _, err = processes[1].communicate(timeout=30)
    assert processes[1].returncode == 1 and "qwen35rs.RankError: ranks: " in err


@pytest.mark.parametrize("world", [1, 2])
def test_all_of_it_may_be_stopped_for_longer_than_ranks_wait(port, processes, world):
    """Ctrl-Z, and fg: of ranks that are threads of one process, and of processes."""
    processes += [start(rank, world, port, "on and on", patience=1) for rank in range(world)]
    assert processes[0].stdout.readline() == "ready\n"
    first = processes[0].stdout.readline()
    for process in processes:
        process.send_signal(signal.SIGSTOP)
    time.sleep(3)
    for process in reversed(processes):
        process.send_signal(signal.SIGCONT)
    # What was written before it was stopped may be read first.
    assert [processes[0].stdout.readline() for _ in range(4)] == [first] * 4
    assert all(process.poll() is None for process in processes)


def test_a_rank_that_says_nothing_while_others_load_is_named(port, processes):
    processes.append(start(0, 2, port, patience=6))
    stalled = connected(port + 1)
    numbers = b"".join(number.to_bytes(8, "little") for number in (1, 2))
    stalled.sendall(b"qwen35rs" + numbers + qwen35rs.__version__.encode().ljust(40, b"\0"))
    assert stalled.recv(9, socket.MSG_WAITALL)[0] == 2
    stalled.sendall(b"\x51")
    assert stalled.recv(9, socket.MSG_WAITALL)[0] == 2
    _, err = processes[0].communicate(timeout=60)
    note, *_ = err.splitlines()
    assert re.match(
        r"qwen35rs: waiting for 10 seconds: rank 1 has not come so far; its last sign of life", note
    )
    assert processes[0].returncode == 1
    assert "qwen35rs.RankError: ranks: rank 1 has given no sign of life for 12 seconds" in err
    stalled.close()


def connected(port):
    while True:
        try:
            return socket.create_connection(("localhost", port))
        except OSError:
            time.sleep(0.05)


def test_ranks_of_one_host_need_its_memory_together(port, processes):
    run = RUN.replace("tensor_parallel_size=2", "tensor_parallel_size=2, load_format='dummy'")
    processes += [start(rank, 2, port, model="397b", run=run) for rank in range(2)]
    for process in processes:
        _, err = process.communicate(timeout=60)
        found = re.search(r"OutOfMemoryError: .*random weights \((\d+) bytes; the machine has \d+", err)
        # A rank's part is half of it.
        assert found and int(found[1]) > 2 * 350e9, err


def test_an_interrupted_rank_ends_the_other(port, processes):
    processes += [start(rank, 2, port, "on and on") for rank in range(2)]
    assert processes[0].stdout.readline() == "ready\n"
    processes[1].send_signal(signal.SIGINT)
    _, err = processes[1].communicate(timeout=30)
    assert "KeyboardInterrupt" in err
    _, err = processes[0].communicate(timeout=30)
    assert processes[0].returncode == 1 and "qwen35rs.RankError" in err


def test_ranks_that_differ_are_refused(port, processes):
    processes += [start(0, 2, port), start(1, 2, port, model=DATA / "moe_bf16")]
    for process in processes:
        _, err = process.communicate(timeout=60)
        assert process.returncode == 1
        assert "qwen35rs.RankError: ranks: config " in err
        assert "rank 1 has" in err


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("kv_cache_dtype='fp8'", "kv_cache_dtype: rank 0 has auto, rank 1 has fp8"),
        ("state_dtype='float16'", "state_dtype: rank 0 has float32, rank 1 has float16"),
        ("dtype='bfloat16'", "dtype: rank 0 has auto, rank 1 has bfloat16"),
        ("quantization='int4'", "quantization: rank 0 has none, rank 1 has int4"),
    ],
)
def test_options_that_differ_are_named_as_users_write_them(port, processes, option, said):
    other = RUN.replace("tensor_parallel_size=2", f"tensor_parallel_size=2, {option}")
    processes += [start(0, 2, port), start(1, 2, port, run=other)]
    for process in processes:
        _, err = process.communicate(timeout=60)
        assert process.returncode == 1
        assert f"RankError: ranks: {said}; start all ranks with the same " in err


def test_a_checkpoint_with_one_other_byte_is_refused(port, processes, tmp_path):
    for name in ("one", "other"):
        shutil.copytree(DATA / "dense_bf16", tmp_path / name)
    weights = tmp_path / "other" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    header_len = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + header_len])
    (name,) = (name for name in header if name.endswith("layers.0.linear_attn.out_proj.weight"))
    data[8 + header_len + header[name]["data_offsets"][0]] ^= 1
    weights.write_bytes(data)
    processes += [start(rank, 2, port, model=tmp_path / name) for rank, name in enumerate(("one", "other"))]
    for process in processes:
        _, err = process.communicate(timeout=60)
        assert process.returncode == 1
        assert "qwen35rs.RankError: ranks: checkpoint: rank 0 has " in err


def test_a_rank_says_whom_it_waits_for(port, processes):
    # Rank 1 finds nobody where rank 0 should be; rank 0 waits for one that never comes.
    processes += [start(1, 2, port), start(0, 2, free_port())]
    for process, reason in zip(
        processes, ("rank 0 is not to be reached", "rank 1 of 2 has not come"), strict=True
    ):
        line = process.stderr.readline()
        assert line.startswith(f"qwen35rs: waiting for 10 seconds: {reason}"), line
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
        assert "KeyboardInterrupt" in err


def test_processes_meet_once(port, processes):
    again = (
        RUN
        + """
del llm
LLM(model, device=device, tensor_parallel_size=2)
"""
    )
    processes += [start(0, 2, port, run=again), start(1, 2, port)]
    _, err = processes[0].communicate(timeout=60)
    assert processes[0].returncode == 1
    assert "RankError: ranks: the other processes follow the first LLM of this one, and end with it" in err
    _, err = processes[1].communicate(timeout=20)
    assert processes[1].returncode == 0, err


def test_a_port_that_is_taken_is_named(processes):
    with socket.socket(socket.AF_INET6) as other:
        other.bind(("::", 0))
        other.listen()
        port = other.getsockname()[1]
        processes += [start(0, 2, port - 1)]
        _, err = processes[0].communicate(timeout=60)
    assert f"RequestError: the port after MASTER_PORT, or QWEN35RS_PORT: found {port}, which cannot be" in err


def test_the_number_of_processes_is_that_of_ranks(port, processes):
    processes += [start(0, 4, port)]
    _, err = processes[0].communicate(timeout=60)
    assert "RequestError: tensor_parallel_size: found 2; allowed: 4, the number of processes" in err
