"""Ranks that are processes, started as torchrun starts them. On the CPU; tests/gpu/test_shared_net.py has cards for them."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
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


def start(rank, world, port, *more, model=None, device="cpu", run=RUN):
    """Rank `rank`; it goes on and on where there is `more`."""
    environment = os.environ | {
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
