"""Random weights of any configuration, and the speeds that are measured with them."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from qwen35rs import ConfigError, OutOfMemoryError, RequestError, SamplingParams, _core, demo, speed
from qwen35rs.cli import app
from qwen35rs.llm import LLM
from typer.testing import CliRunner

SMALL = {"num_hidden_layers": 4, "vocab_size": 512, "mtp_num_hidden_layers": 1}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A config.json with nothing beside it."""
    path = tmp_path_factory.mktemp("dummy") / "config.json"
    path.write_text(json.dumps(demo.config(400, **SMALL)))
    return path


def test_a_dummy_model_needs_a_configuration_alone(config):
    tokens = list(range(1, 100))
    one, two = (LLM(path, load_format="dummy", mtp=True) for path in (config, config.parent))
    logits = one.logits(tokens)
    assert np.array_equal(logits, two.logits(tokens))
    assert np.isfinite(logits).all() and 1.0 < logits.std() < 10.0
    assert np.isfinite(one.mtp_logits(tokens)).all()
    (out,) = one.generate([tokens], SamplingParams(max_tokens=5))
    assert out.outputs[0].token_ids


def test_what_is_no_dummy_model(config):
    with pytest.raises(RequestError, match="load_format: found fast; allowed: auto, dummy"):
        LLM(config.parent, load_format="fast")
    with pytest.raises(RequestError, match=r"model: found 36b; allowed: Qwen3.5-0.8B, "):
        LLM("36b", load_format="dummy")
    with pytest.raises(ConfigError, match=r"found no weights; expected model\.safetensors"):
        LLM(config.parent)


def test_steps_and_prompts_are_timed(config):
    llm = LLM(
        config,
        load_format="dummy",
        max_num_seqs=3,
        max_num_batched_tokens=64,
        max_model_len=200,
        device="cpu",
    )
    step = speed.decode(llm, 3, 50, 6)
    facts = step.facts({"read_bytes_per_s": 1e9})
    assert step.num_steps >= 6 and facts["tokens_per_second"] == pytest.approx(3 / step.seconds)
    assert facts["share_of_floor"] == pytest.approx(step.num_bytes / 1e9 / step.seconds)
    # Weights once, each sequence's states twice.
    few, many = (llm._engine.step_facts(batch, 50, 4)[0] for batch in (1, 3))
    one, two = (llm._engine.step_facts(1, 50, hit)[0] for hit in (4, 5))
    expert = 3 * 128 * 64 * 2 * 4
    assert two - one == expert and 0 < many - few < many
    prompt = speed.prefill(llm, 100)
    assert prompt.seconds > 0 and len(prompt.runs) == 3 and prompt.facts(None)["share_of_floor"] is None
    with pytest.raises(
        RequestError, match="batch of 4 sequences of 50 tokens: found an LLM for 3 sequences of 200"
    ):
        speed.decode(llm, 4, 50)


def test_the_memory_of_a_card_is_planned():
    def plan(**changes):
        limits = {"mtp": False, "max_model_len": None, "max_num_seqs": 32, "max_num_batched_tokens": 512}
        limits |= {"quantization": None, "fp8_kv": False, "f16_state": False}
        text = _core.plan_memory("35b", gpu="h100", gpu_memory_utilization=0.9, **{**limits, **changes})
        return text and json.loads(text)

    plain = plan()
    assert plain is not None, "a package is built with CUDA"
    memory = plain["memory"]
    assert memory["weights"] == pytest.approx(69.3e9, rel=0.01)
    pages = memory["pages of keys"] + memory["pages of values"]
    assert pages == plain["num_pages"] * plain["page_bytes"]
    assert 0.95 * 79.6 < sum(memory.values()) / 2**30 < 79.6
    more = plan(max_num_seqs=64, mtp=True)["memory"]
    assert more["recurrent states"] == 2 * memory["recurrent states"] and more["weights"] > memory["weights"]
    with pytest.raises(RequestError, match="max_num_seqs: found 0; allowed: at least 1"):
        plan(max_num_seqs=0)


@pytest.mark.parametrize(("batch", "context", "steps"), [(9, 32, 4), (40, 64, 3), (16, 130, 5)])
def test_as_many_steps_as_were_asked_for(config, batch, context, steps):
    room = speed.room_for(batch, context, steps, 64)
    limits = {"max_num_seqs": batch, "max_num_batched_tokens": 64, "max_model_len": room}
    step = speed.decode(LLM(config, load_format="dummy", device="cpu", **limits), batch, context, steps)
    assert step.num_steps == steps and step.seconds > 0


def test_steps_that_are_seen_late_keep_their_times(config):
    llm = LLM(config, load_format="dummy", device="cpu", max_model_len=200)
    engine, seen = llm._engine, []

    class Late:
        """As where Python is held up while the engine runs."""

        def __getattr__(self, name):
            return getattr(engine, name)

        def generate(self, *arguments):
            deltas = engine.generate(*arguments)
            time.sleep(0.5)
            for delta in deltas:
                seen.append(time.perf_counter())
                yield delta

    llm._engine = Late()
    step = speed.decode(llm, 1, 32, 8)
    assert step.seconds > 4 * np.median(np.diff(seen[:10]))


def test_a_tokenizer_beside_a_configuration(tmp_path):
    demo.make_checkpoint(tmp_path, vocab="bytes")
    llm = LLM(tmp_path / "config.json", load_format="dummy", device="cpu")
    assert llm.generate("hello", SamplingParams(max_tokens=2))[0].outputs[0].token_ids


def test_weights_larger_than_the_machine_are_refused():
    with pytest.raises(
        OutOfMemoryError, match=r"random weights \(\d+ bytes; the machine has \d+ available\)"
    ):
        LLM("397b", load_format="dummy", device="cpu")


def test_ctrl_c_while_weights_are_made():
    code = "from qwen35rs import LLM; print('go', flush=True); LLM('2b', load_format='dummy', device='cpu')"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == b"go\n"
    time.sleep(1.5)
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert b"KeyboardInterrupt" in errors and time.monotonic() - start < 5


REFUSED = [
    (["bench", "engine", "--max-num-batched-tokens", "0"], "max_num_batched_tokens: found 0; allowed: 64 to"),
    (["bench", "engine", "--batch", "0"], "batch: found 0; allowed: 1 to"),
    (["bench", "engine", "--prefill", "100000"], "prefill, need sequences that are too long: found 100001;"),
    (["plan", "35b", "--max-num-seqs", "4"], "max_num_seqs: found it without --memory"),
    (["plan", "35b", "--memory", "--max-num-seqs", "-1"], "max_num_seqs: found -1; allowed: numbers from 1"),
    (["plan", "35b", "--memory", "--scheme", "fp8"], "scheme: found it with --memory"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_what_is_refused_is_named(arguments, message):
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1 and message in result.stderr, result.output


def test_what_does_not_fit_says_how_large_it_is():
    result = CliRunner().invoke(app, ["plan", "35b", "--gpu", "4090", "--memory"])
    assert (
        "4090: does not fit: weights (64.6 GiB; the device has 23.3 GiB free); what would fit: "
        'quantization="mixed" (' in result.stdout
    )
    assert result.exit_code == 1, result.output
    # One of two cards holds it: that is an answer.
    result = CliRunner().invoke(app, ["plan", "35b", "--gpu", "4090", "--gpu", "h100", "--memory"])
    assert result.exit_code == 0 and "does not fit" in result.stdout, result.output


def test_buffers_that_do_not_fit_are_not_blamed_on_the_weights():
    arguments = [
        "plan",
        "122b",
        "--gpu",
        "h100",
        "--memory",
        "--quantization",
        "int4",
        "--max-num-seqs",
        "512",
    ]
    result = CliRunner().invoke(app, [*arguments, "--json"])
    found = json.loads(result.stdout)["memory"]["h100"]
    assert result.exit_code == 1 and "lower max_num_seqs to " in found["error"], found["error"]
    assert "weights" not in found["error"] and 60 < found["ranks"][0]["weights"] / 2**30 < 61
