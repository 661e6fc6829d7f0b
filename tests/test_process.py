"""What a program sees of an engine inside it: Ctrl-C, threads, the end of an LLM, memory, the import."""

import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest
import qwen35rs
import tiny
from qwen35rs import LLM, SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=12)


def python(code, *args, **kwargs):
    """Runs a program in a process of its own."""
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, args)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=60, env=env, **kwargs)


def test_ctrl_c(checkpoint):
    code = """
        import signal, sys, threading, time
        from qwen35rs import LLM, SamplingParams
        llm = LLM(sys.argv[1])
        endless = SamplingParams(max_tokens=2000, ignore_eos=True)
        calls = {
            "generate": lambda: llm.generate(["a"] * 200, endless),
            "stream": lambda: [d for _ in range(200) for d in llm.stream("a", endless)],
            "logits": lambda: [llm.logits([1] * 2000) for _ in range(500)],
        }
        for name, call in calls.items():
            sent = []
            def interrupt():
                time.sleep(0.3)
                sent.append(time.perf_counter())
                signal.raise_signal(signal.SIGINT)
            thread = threading.Thread(target=interrupt)
            thread.start()
            try:
                call()
            except KeyboardInterrupt:
                late = time.perf_counter() - sent[0]
                print(name, "ok" if late < 1 else late)
            thread.join()
            start = time.perf_counter()
            assert len(llm.generate("a", SamplingParams(max_tokens=3, ignore_eos=True))[0].token_ids) == 3
            assert time.perf_counter() - start < 1, "the interrupted requests still run"
    """
    done = python(code, checkpoint)
    assert done.stdout.split() == ["generate", "ok", "stream", "ok", "logits", "ok"], done.stderr


def test_ctrl_c_from_outside(checkpoint):
    code = """
        import sys
        from qwen35rs import LLM, SamplingParams
        llm = LLM(sys.argv[1])
        print("ready", flush=True)
        llm.generate(["a"] * 500, SamplingParams(max_tokens=2000, ignore_eos=True))
    """
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-c", textwrap.dedent(code), str(checkpoint)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.3)
    start = time.perf_counter()
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=20)
    assert time.perf_counter() - start < 2  # with the interpreter's own end
    assert process.returncode in (130, -signal.SIGINT) and "KeyboardInterrupt" in stderr


def test_threads_share_one_llm(llm):
    prompts = ["the", "a hen", "in the end", "x"]
    want = [out.text for out in llm.generate(prompts, GREEDY)]
    failures = []

    def work(i):
        try:
            for round in range(5):
                which = (i + round) % 4
                if i % 3 == 0:
                    next(
                        llm.stream(prompts[which], SamplingParams(max_tokens=24, seed=3))
                    )  # dropped in the middle
                elif i % 3 == 1:
                    assert "".join(d.text for d in llm.stream(prompts[which], GREEDY)) == want[which]
                else:
                    assert llm.generate(prompts[which], GREEDY)[0].text == want[which]
                    llm.logits([1, 2, 3])
        except BaseException as error:  # noqa: BLE001  shown by the main thread
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def engine_threads():
    names = []
    for task in os.listdir("/proc/self/task"):
        try:
            with open(f"/proc/self/task/{task}/comm") as f:
                names.append(f.read().strip())
        except FileNotFoundError:
            continue  # ended meanwhile
    return sum(name.startswith("qwen35rs-engi") for name in names)


def test_an_llm_that_is_collected_ends_its_thread(checkpoint):
    gc.collect()
    before = engine_threads()
    llm = LLM(checkpoint)
    stream = llm.stream("a", SamplingParams(max_tokens=2000, ignore_eos=True))
    next(stream)
    assert engine_threads() == before + 1
    del llm, stream
    gc.collect()
    deadline = time.monotonic() + 5
    while engine_threads() != before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert engine_threads() == before


def test_progress_is_silent_where_there_is_no_terminal(checkpoint, capfd):
    LLM(checkpoint, progress=True).generate(["a", "b"], GREEDY, progress=True)
    assert capfd.readouterr() == ("", "")


# ------------------------------------------------------------------------------------- memory, imports

MEMORY = """
    import sys
    import numpy
    from qwen35rs import LLM, SamplingParams

    def anonymous():
        with open("/proc/self/status") as f:
            return next(int(line.split()[1]) << 10 for line in f if line.startswith("RssAnon"))

    before = anonymous()
    llm = LLM(sys.argv[1], dtype=sys.argv[2], max_model_len=64)
    llm.generate([[1, 2, 3]], SamplingParams(temperature=0, max_tokens=2, ignore_eos=True))
    print(anonymous() - before)
"""


def test_a_checkpoint_is_held_once_or_not_at_all(tmp_path):
    # An embedding of 1.8 million rows of 40 float32: 288 MB, a hole in the file.
    path = tiny.write_checkpoint(tmp_path / "big", vocab=1_800_000, tokenizer=False, embedding=False)
    size = (path / "model.safetensors").stat().st_size
    assert size > 280e6
    # Logits of a step, their copy in the sampler, and its weights: a few rows of 7 MB each. The 8-bit copy of the
    # head has rows of 48 bytes and two floats.
    small, copy = 60e6, 1_800_000 * (48 + 8)
    as_it_is = python(MEMORY, path, "auto")
    assert float(as_it_is.stdout or "nan") < copy + small, as_it_is.stderr
    converted = python(MEMORY, path, "bfloat16")
    assert float(converted.stdout or "nan") < size / 2 + copy + small, converted.stderr


def test_the_import_is_light():
    done = python(
        """
        import sys
        import qwen35rs
        assert "LLM" in dir(qwen35rs)
        heavy = {"torch", "transformers", "rich", "huggingface_hub", "typer", "jinja2", "tokenizers", "ray"}
        print(sorted(heavy & set(sys.modules)))
        from qwen35rs import LLM, SamplingParams, Tokenizer, ops
        print(sorted(heavy & set(sys.modules)))
        """
    )
    assert done.stdout.split("\n")[:2] == ["[]", "[]"], done.stderr
    code = """
        import time
        import numpy
        start = time.perf_counter()
        import qwen35rs
        print(time.perf_counter() - start)
    """
    times = sorted(float(python(code).stdout) for _ in range(5))
    assert times[0] < 0.05, times  # the best: what the machine does besides is not ours


def test_what_replicas_need():
    done = python("""
        import sys
        sys.modules["ray"] = None  # as if it were not installed
        import qwen35rs.ray
    """)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: qwen35rs.ray: found no Ray Serve (")
    assert last.endswith("); pip install 'qwen35rs[ray]'")


def test_dir_and_all():
    for name in qwen35rs.__all__:
        assert getattr(qwen35rs, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        getattr(qwen35rs, "nothing")  # noqa: B009
