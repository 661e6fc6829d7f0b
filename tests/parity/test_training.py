"""What `training/` computes is what Transformers and this engine compute."""

import itertools
import sys
from pathlib import Path

import pytest
import torch
from qwen35rs import LLM, SamplingParams, tasks

sys.path.insert(0, str(Path(__file__).parents[2] / "training"))

import checkpoint
import kernels
import mix
import net as network
from evaluate import place
from transformers import AutoModelForCausalLM
from transformers.models.qwen3_5_moe.configuration_qwen3_5_moe import Qwen3_5MoeTextConfig

CPU = torch.device("cpu")
SMALL = {"num_hidden_layers": 4, "hidden_size": 64, "moe_intermediate_size": 16}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return checkpoint.make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def items():
    names = ("arithmetic", "text", "tools", "json", "talk")
    return [i for name in names for i in itertools.islice(tasks.items(name, split="train"), 2)]


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    net = network.Net(Qwen3_5MoeTextConfig(**checkpoint.text_config(**SMALL))).eval()
    with torch.no_grad():
        for p in net.parameters():  # as a file in bf16 has them
            p.copy_(p.bfloat16())
        for name, p in net.mtp.named_parameters():
            if "norm" in name:  # begin at zero
                p.normal_(std=0.3).copy_(p.bfloat16())
    yield net
    network.set_row(None)


def test_a_packed_row_is_its_conversations_alone(net, items, tokenizer):
    documents = [mix.Encoder(tokenizer)(i) for i in items]
    row = mix.pack(documents, sum(len(d[0]) for d in documents) + 100, 0)
    tokens, _, positions = place(row, CPU)
    with torch.no_grad():
        logits = net.lm.lm_head(net.hidden(tokens, positions)[0])
        network.set_row(None)
        net.lm.config._attn_implementation = "eager"
        for (ids, _, _), at in zip(documents, row["cu_seqlens"].tolist(), strict=False):
            alone = net.lm(torch.from_numpy(ids).long()[None], use_cache=False).logits[0]
            torch.testing.assert_close(logits[at : at + len(ids)], alone, rtol=1e-4, atol=1e-4)
        net.lm.config._attn_implementation = "packed"


def test_only_what_the_assistant_says_counts_in_full(items, tokenizer):
    encode = mix.Encoder(tokenizer)
    for one in items:
        ids, weights, first = encode(one)
        assert encode.tokenizer.decode(ids[first:], skip_special_tokens=False) == one.completion + "\n"
        assert (weights[first:-1] >= 0.5).all() and weights[-1] == pytest.approx(0.03)


def test_batches_do_not_depend_on_the_worker(tokenizer):
    one, two = (mix.Batches(tokenizer, 5000, 100, seed=3) for _ in range(2))
    two[50]
    assert torch.equal(one[7]["tokens"], two[7]["tokens"])
    assert not torch.equal(one[8]["tokens"], one[7]["tokens"])


def test_the_checkpoint_is_read_by_both(net, items, tokenizer, tmp_path):
    num = checkpoint.write(tmp_path, net.lm, net.mtp, checkpoint.text_config(**SMALL), tokenizer)
    assert num == sum(p.numel() for p in net.parameters())
    network.set_row(None)
    ours, theirs = LLM(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    for one in items[::2]:
        ids = ours.tokenizer.apply_chat_template(one.messages, tools=one.tools, enable_thinking=one.thinking)
        found = ours.generate({"prompt_token_ids": ids}, params)[0].outputs[0].token_ids
        wanted = theirs.generate(
            torch.tensor([ids]),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=None,
            suppress_tokens=list(range(len(ours.tokenizer), theirs.config.vocab_size)),  # padding
        )
        assert found == wanted[0, len(ids) :].tolist()


def test_the_engine_drafts_what_the_module_does(net, items, tokenizer, tmp_path):
    checkpoint.write(tmp_path, net.lm, net.mtp, checkpoint.text_config(**SMALL), tokenizer)
    llm = LLM(tmp_path, mtp=True)
    for one in items[::3]:
        ids, weights, first = mix.Encoder(tokenizer)(one)
        tokens, _, positions = place(mix.pack([(ids, weights, first)], len(ids) + 1, 0), CPU)
        with torch.no_grad():
            h, m, _ = net.hidden(tokens, positions)
            said, drafted = (net.lm.lm_head(x)[: len(ids) - 1].numpy() for x in (h, m))
        for ours, theirs in ((llm.logits(ids)[:-1], said), (llm.mtp_logits(ids), drafted)):
            assert abs(ours - theirs).max() < 2e-4 * abs(theirs).max()
    network.set_row(None)


def test_the_backward_step_in_pytorch():
    """Against automatic differentiation of the chunk's equations."""
    torch.manual_seed(1)
    length, heads, dim, scale = 9, 2, 8, 0.3
    q, k, v, h = (
        torch.randn(s, requires_grad=True) for s in [(length, heads, dim)] * 3 + [(heads, dim, dim)]
    )
    g = (-torch.rand(length, heads) * 40).cumsum(0).requires_grad_()  # in powers of two; strong decay
    do, dh, dv = (
        torch.randn(length, heads, dim),
        torch.randn(1, heads, dim, dim),
        torch.zeros(length, heads, dim),
    )
    decay = torch.exp2((g[:, None] - g[None]).clamp(max=0)) * torch.ones(length, length).tril()[..., None]
    inside = torch.einsum("ihd,jhd,ijh,jhe->ihe", q, k, decay, v) * scale
    before = torch.einsum("ihd,hde->ihe", q * torch.exp2(g)[..., None], h) * scale
    after = torch.exp2(g[-1])[:, None, None] * h
    after = after + torch.einsum("jhd,jhe->hde", k * torch.exp2(g[-1] - g)[..., None], v)
    total = ((inside + before) * do).sum() + (after * dh[0]).sum()
    wanted = torch.autograd.grad(total, (q, k, g))
    wanted = (*wanted[:2], wanted[2] / torch.log(torch.tensor(2.0)))
    found = kernels.chunk_bwd_dqkwg(
        *(x.detach()[None] for x in (q, k, v)), do[None], h.detach()[None, None], dh[None], None,
        g.detach()[None], dv[None], scale, torch.tensor([0, length]), torch.tensor([[0, 0]]),
    )  # fmt: skip
    for a, b in zip((found[0], found[1], found[3]), wanted, strict=True):
        torch.testing.assert_close(a[0], b, rtol=1e-4, atol=1e-4)
