"""The multi-token-prediction module: its drafts against the definition in float64, and what is said without it."""

import json
import shutil

import numpy as np
import pytest
import tiny
from golden import reference
from golden.cases import DATA, Golden
from qwen35rs import LLM, ConfigError, RequestError, _core
from qwen35rs.cli import app
from typer.testing import CliRunner

# Published with one, its experts one by one beside a model's that are fused; dense; with fused experts.
SOURCES = ["moe_vision_mtp", "dense_bf16", "dense_r1", "moe_bf16"]


@pytest.fixture(scope="module", params=SOURCES)
def path(request, tmp_path_factory):
    if request.param == "moe_vision_mtp":
        return DATA / request.param
    return tiny.add_mtp(tmp_path_factory.mktemp("mtp") / "model", DATA / request.param)


@pytest.fixture(scope="module")
def llm(path):
    return LLM(path, mtp=True)


def tokens(length, seed=0):
    return np.random.default_rng(seed).integers(0, 140, length).tolist()


def distance(a, b):
    return np.abs(a - b).max() / np.abs(b).max()


@pytest.mark.parametrize("length", [2, 3, 65, 150])
def test_drafts_are_those_of_the_definition(path, llm, length):
    ids = tokens(length, length)
    drafts = llm.mtp_logits(ids)
    want = reference.Net(path).mtp_logits(ids)
    assert drafts.dtype == np.float32 and drafts.shape == want.shape == (length - 1, llm.logits(ids).shape[1])
    assert distance(drafts, want) <= Golden.TOLERANCE


class Changed(reference.Net):
    """The definition with one thing wrong."""

    def __init__(self, path, skipped="", zeroed="", swapped=False):
        super().__init__(path)
        self.skipped = skipped
        if zeroed:
            self.tensors[zeroed] = np.zeros_like(self.tensors[zeroed])
        if swapped:
            self.tensors["mtp.fc.weight"] = np.roll(
                self.tensors["mtp.fc.weight"], self.config["hidden_size"], 1
            )

    def norm(self, x, name):
        return x if name == self.skipped else super().norm(x, name)


NORMS = [f"mtp.{name}.weight" for name in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")]


@pytest.mark.parametrize(
    "change",
    [{"swapped": True}, *({kind: name} for kind in ("skipped", "zeroed") for name in NORMS)],
    ids=str,
)
def test_anything_else_is_told_apart(path, llm, change):
    ids = tokens(20)
    assert distance(Changed(path, **change).mtp_logits(ids), llm.mtp_logits(ids)) > 50 * Golden.TOLERANCE


def test_the_same_bits_in_pieces_and_beside_others(path, llm):
    ids = tokens(150)
    want = llm.mtp_logits(ids)
    assert np.array_equal(LLM(path, mtp=True, max_num_batched_tokens=64).mtp_logits(ids), want)
    assert np.array_equal(llm.mtp_logits(ids[:90]), want[:89])
    assert np.array_equal(llm.logits(ids), LLM(path).logits(ids)), "the module changes the model"


def test_without_it():
    plain = LLM(DATA / "moe_vision_mtp")
    assert not plain.has_mtp and LLM(DATA / "moe_vision_mtp", mtp=None).has_mtp
    with pytest.raises(RequestError, match=r"mtp_logits: found a model .*; allowed: LLM\(..., mtp=True\)"):
        plain.mtp_logits([1, 2, 3])
    with pytest.raises(ConfigError, match="mtp_num_hidden_layers: found 0; allowed: 1, where"):
        LLM(DATA / "dense_r1", mtp=True)
    assert not LLM(DATA / "dense_r1", mtp=None).has_mtp


def test_a_module_that_is_not_whole(tmp_path):
    path = tiny.add_mtp(tmp_path / "model", DATA / "dense_r1")
    whole = tiny.read_safetensors(path / "model.safetensors")
    bare = {name: tensor for name, tensor in whole.items() if not name.startswith("mtp.")}
    part = {name: tensor for name, tensor in whole.items() if name != "mtp.layers.0.mlp.up_proj.weight"}
    for tensors, words in [
        (bare, r"tensor mtp\.\*: found nothing; .* saved without it"),
        (part, r"tensor mtp\.layers\.0\.mlp\.up_proj\.weight: found nothing; expected shape"),
    ]:
        there = shutil.copytree(path, tmp_path / f"with {len(tensors)}")
        tiny.write_safetensors(there / "model.safetensors", tensors)
        with pytest.raises(ConfigError, match=words) as caught:
            LLM(there, mtp=True)
        found = json.loads(_core.inspect_checkpoint(there, False))
        assert (found["refused"], found["mtp_refused"]) == (None, str(caught.value))
        row = CliRunner().invoke(app, ["inspect", str(there)]).stdout
        assert "loaded with" not in row and ("none in the files" if tensors is bare else "(refused: ") in row
        for mtp in (False, None):
            assert not LLM(there, mtp=mtp).has_mtp, "the model needs none"


def test_sequences_that_cannot_be(llm):
    with pytest.raises(RequestError, match="prompt: found 1 tokens; allowed: 2 to 2048 tokens"):
        llm.mtp_logits([1])
    with pytest.raises(RequestError, match="prompt_token_ids: found 100000; allowed: token ids below"):
        llm.mtp_logits([1, 100_000])
    with pytest.raises(RequestError, match="token_ids: found 'abc'; allowed: a flat sequence of token ids"):
        llm.mtp_logits("abc")
