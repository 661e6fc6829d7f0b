"""`benches/load.py`: the checkpoints it makes are those that `qwen35rs quantize` would, and what it says of a load."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import qwen35rs
from qwen35rs import LLM, RequestError, _core, demo, llm

BENCHES = Path(__file__).parent.parent / "benches"
sys.path.insert(0, str(BENCHES))
import load
import synthetic_checkpoint

SPARSE = {"num_hidden_layers": 5, "vocab_size": 512, "num_experts": 4}
SPARSE |= {"hidden_size": 256, "moe_intermediate_size": 128, "shared_expert_intermediate_size": 128}


@pytest.fixture(scope="module", params=["sparse", "dense"])
def geometry(request, tmp_path_factory):
    described = demo.config(400, **SPARSE)
    if request.param == "dense":
        text = described["text_config"]
        for name in [name for name in text if "expert" in name or name.startswith("moe_")]:
            del text[name]
        text |= {"intermediate_size": 384, "model_type": "qwen3_5_text", "tie_word_embeddings": True}
        described |= {"architectures": ["Qwen3_5ForConditionalGeneration"]}
        described |= {"model_type": "qwen3_5", "tie_word_embeddings": True}
    path = tmp_path_factory.mktemp("geometry") / "config.json"
    path.write_text(json.dumps(described))
    return path


def stored(directory):
    """Type and shape of each tensor, in the order of the file."""
    with open(directory / "model.safetensors", "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    facts = [
        (info["data_offsets"], name, info["dtype"], info["shape"])
        for name, info in header.items()
        if info.get("shape")
    ]
    return [tuple(map(str, fact[1:])) for fact in sorted(facts)]


@pytest.mark.parametrize("quantization", ["int4", "mixed", "fp8"])
def test_the_layout_is_that_of_quantize(geometry, quantization, tmp_path):
    plain, made, want = tmp_path / "plain", tmp_path / "made", tmp_path / "want"
    synthetic_checkpoint.write(plain, geometry, "none")
    facts = synthetic_checkpoint.write(made, geometry, quantization, group=64)
    assert facts["bytes"] == json.loads(_core.inspect_checkpoint(made, False))["tensor_bytes"]
    _core.quantize_checkpoint(plain, want, scheme=quantization, group_size=64, progress=None)
    assert sorted(stored(made)) == sorted(stored(want))
    experts = [[fact for fact in stored(path) if ".experts." in fact[0]] for path in (made, want)]
    assert experts[0] == experts[1]
    sections = [
        json.loads((path / "config.json").read_text())["quantization_config"] for path in (made, want)
    ]
    for section in sections:
        section[name] = sorted(section[name := "ignore" if "ignore" in section else "modules_to_not_convert"])
    assert sections[0] == sections[1]
    logits = LLM(made, device="cpu").logits([1, 2, 3])
    assert np.isfinite(logits).all() and 0.1 < logits.std() < 100


def test_shards_are_like_those_of_quantize(geometry, tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic_checkpoint, "SHARD_BYTES", 300_000)
    monkeypatch.setattr(synthetic_checkpoint, "BLOCK_BYTES", 1 << 16)
    facts = synthetic_checkpoint.write(tmp_path / "made", geometry, "int4")
    found = json.loads(_core.inspect_checkpoint(tmp_path / "made", False))
    assert facts["files"] > 3 and facts["bytes"] == found["tensor_bytes"]
    assert np.isfinite(LLM(tmp_path / "made", device="cpu").logits([1, 2])).all()
    assert synthetic_checkpoint.write(tmp_path / "made", geometry, "int4") is None
    with pytest.raises(RequestError, match="directory: found .* no checkpoint like this one"):
        synthetic_checkpoint.write(tmp_path / "made", geometry, "fp8")
    with pytest.raises(RequestError, match="layers: found 6; allowed: 1 to 5"):
        synthetic_checkpoint.write(tmp_path / "other", geometry, layers=6)


def test_what_is_half_written_is_gone(geometry, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(synthetic_checkpoint, "config_json", interrupt)
    with pytest.raises(KeyboardInterrupt):
        synthetic_checkpoint.write(tmp_path / "made", geometry, "int4")
    assert not list((tmp_path / "made").iterdir())


def test_a_load_that_quantises_is_timed(geometry, tmp_path, monkeypatch):
    """The scheme comes to the processes that load, and from them to the model."""
    out = tmp_path / "found.json"
    options = ["--device", "cpu", "--threads", "1", "--load-quantization", "mixed"]
    command = [sys.executable, BENCHES / "load.py", "-m", geometry, "--quantization", "fp8", "--layers", "2"]
    command += [*options, "--runs", "1", tmp_path / "checkpoint", "--json", out]
    said = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    found = json.loads(out.read_text())
    assert found["quantization"] == "fp8" and "cold load to mixed on cpu" in said
    assert [row["quantization"] for row in (found["cold"], *found["warm"])] == ["mixed", "mixed"]
    asked = []

    def model(*arguments, **named):
        asked.append(named["quantization"])
        return LLM(*arguments, **named)

    monkeypatch.setattr(qwen35rs, "LLM", model)
    monkeypatch.setattr(llm._LoadBar, "update", llm._LoadBar.update)  # which `load` changes
    monkeypatch.setattr(sys, "argv", ["load.py", str(tmp_path / "checkpoint"), *options, "--only", "load"])
    load.main()
    assert asked == ["mixed"]


def test_a_load_is_timed(tmp_path):
    config, out = tmp_path / "config.json", tmp_path / "found.json"
    config.write_text(json.dumps(demo.config(400, **SPARSE)))
    command = [sys.executable, BENCHES / "load.py", "-m", config, "--layers", "2", "--device", "cpu"]
    command += ["--runs", "1", tmp_path / "checkpoint", "--json", out]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    found = json.loads(out.read_text())
    size = sum(path.stat().st_size for path in (tmp_path / "checkpoint").glob("*.safetensors"))
    assert found["bytes"] == size and found["written"]["bytes"] < size
    for row in (found["cold"], *found["warm"]):
        assert 0 < row["weights_seconds"] < row["seconds"] and row["device"] == "cpu"
        assert row["gb_per_s"] == pytest.approx(size / 1e9 / row["weights_seconds"])
    assert found["host_to_device"] is None and found["warm_bound"]["slowest"] == "processor"
    assert found["cold_bound"]["slowest"] in ("disk", "processor")
    for name in ("cold_read", "warm_read", "mapped_copy"):
        assert found[name]["gb_per_s"] == pytest.approx(size / 1e9 / found[name]["seconds"])
    nothing = subprocess.run([*command[:2], tmp_path], check=False, capture_output=True, text=True)
    assert nothing.returncode == 1 and "found no *.safetensors" in nothing.stderr
    wrong = subprocess.run([*command, "--device", "xpu"], check=False, capture_output=True, text=True)
    assert (
        wrong.returncode == 1
        and wrong.stderr.startswith("error: device: found")
        and wrong.stderr.count("\n") == 1
    )
