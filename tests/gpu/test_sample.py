"""The choice of tokens on the GPU against a sort of the vocabulary in numpy: weights in f32, sums in f64."""

import ctypes
import itertools

import numpy as np
import pytest
import torch
from launch import Edit, Sampled, Sampling, call, structs

pytestmark = pytest.mark.gpu
VOCAB, NUM_TOKENS = 248_320, 248_077
SLACK = 1e-6  # how far from a boundary a random number may lie and choose the other side
F32 = np.float32


def params(**changed):
    plain = {
        "uniform": 0.5,
        "temperature": 1.0,
        "top_p": 1.0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "top_k": 0,
        "num_logprobs": -1,
        "edits": [],
    }
    assert changed.keys() <= plain.keys()
    return plain | changed


def edit(token, bias=0.0, banned=0, seen=0, count=0):
    return (token, bias, banned, seen, count)


class Sampler:
    """A workspace, used again and again."""

    def __init__(self, vocab, max_rows):
        self.vocab, self.max_rows = vocab, max_rows
        self.size = call("q35_sample_workspace", max_rows, vocab)
        self.space = torch.zeros(self.size + 4096, dtype=torch.uint8).cuda()
        self.space[self.size :] = 0xA5

    def run(self, logits, rows, num_tokens=None, replays=0):
        """What is chosen from logits [n, vocab] with the parameters of n rows: at once, or by the last replay of a
        graph."""
        n, vocab = logits.shape
        assert vocab == self.vocab and n == len(rows) <= self.max_rows
        edits, sampling = [], []
        for row in rows:
            plain = {k: v for k, v in row.items() if k != "edits"}
            sampling.append(Sampling(**plain, edit_start=len(edits), num_edits=len(row["edits"])))
            edits += [Edit(*e) for e in row["edits"]]
        device = torch.from_numpy(logits).cuda()
        before = device.view(torch.int32).clone()
        size = ctypes.sizeof(Sampled)
        out = torch.full((n * size + 64,), 0xA5, dtype=torch.uint8).cuda()
        tokens = torch.full((n + 1,), -7, dtype=torch.int32).cuda()
        given, edits_given = structs(sampling), structs(edits or [Edit()])
        arguments = (n, vocab, num_tokens or vocab, device, given, edits_given, self.space, out, tokens)
        call("q35_sample", *arguments)
        if replays:
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                call("q35_sample", *arguments)
            for _ in range(replays):
                out.fill_(0xA5)
                tokens[:n] = -7
                graph.replay()
        assert torch.equal(device.view(torch.int32), before), "changed the logits"
        assert (self.space[self.size :] == 0xA5).all() and (out[n * size :] == 0xA5).all()
        assert tokens[n] == -7
        data = out.cpu().numpy().tobytes()
        found = [Sampled.from_buffer_copy(data, i * size) for i in range(n)]
        assert tokens[:n].tolist() == [max(f.token, 0) for f in found]
        return found


def fma(a, b, c):
    return (a.astype(np.float64) * np.float64(F32(b)) + c.astype(np.float64)).astype(F32)


def fma_by(a, r, c):
    return (a.astype(np.float64) * r.astype(np.float64) + np.float64(F32(c))).astype(F32)


def weights(x, best, scale):
    """The exponential of the CPU backend, its fused steps by way of f64."""
    with np.errstate(all="ignore"):
        y = (x - F32(best)) * F32(scale)
        n = np.maximum(np.rint(np.maximum(y, F32(-88.0)) * F32(1.44269504088896340736)), F32(-126.0))
        r = fma(n, 2.1219444e-4, fma(n, -0.693359375, y))
        p = np.full_like(r, F32(1.98756915e-4))
        for c in (1.39819995e-3, 8.3334519e-3, 4.1665796e-2, 1.66666655e-1, 0.50000001):
            p = fma_by(p, r, c)
        square = r * r
        z = (p.astype(np.float64) * square + r).astype(F32) + F32(1.0)
        w = z * np.exp2(n.astype(np.float64)).astype(F32)
        return np.where(y >= F32(-87.33654), w, F32(0.0))


def edited(row, p):
    x = row.copy()
    with np.errstate(all="ignore"):
        if not p["edits"]:
            return x
        table = np.array(p["edits"], dtype=np.float64)
        table = table[(table[:, 0] >= 0) & (table[:, 0] < len(x))]
        at = table[:, 0].astype(np.int64)
        v = x[at] + table[:, 1].astype(F32)
        v = np.where(table[:, 2] != 0, F32(-np.inf), v)
        repetition = F32(p["repetition_penalty"])
        v = np.where(table[:, 3] != 0, np.where(v > 0, v / repetition, v * repetition), v)
        penalty = F32(p["frequency_penalty"]) * table[:, 4].astype(F32) + F32(p["presence_penalty"])
        x[at] = np.where(table[:, 4] > 0, v - penalty, v)
    return x


def candidates(row, p, slack=0.0):
    """Tokens that may be chosen and their weights, in the order in which they are summed."""
    x = edited(row, p)
    with np.errstate(invalid="ignore"):
        numbers = x > -np.inf
    if not numbers.any():
        return None
    best = int(np.argmax(np.where(numbers, x, F32(-np.inf))))
    if p["temperature"] == 0 or p["top_k"] == 1 or x[best] == np.inf:
        return np.array([best]), np.ones(1)
    with np.errstate(over="ignore"):
        scale = min(F32(1.0) / F32(p["temperature"]), np.finfo(F32).max)
    min_p, top_p = F32(p["min_p"]), float(F32(p["top_p"]))
    if 0 < p["top_k"] < len(x):
        ids = np.flatnonzero(numbers)
        ids = ids[np.argsort(-x[ids], kind="stable")][: p["top_k"]]
        w = weights(x[ids], x[best], scale)
    else:
        w = weights(x, x[best], scale)
        if top_p >= 1:
            ids = np.flatnonzero((w >= min_p) & (w > 0))
            return ids, w[ids].astype(np.float64)
        ids = np.argsort(-w, kind="stable")
        w = w[ids]
    w64 = w.astype(np.float64)
    before = np.cumsum(w64) - w64
    inside = (before < (top_p + slack) * w64.sum()) & (w >= min_p)
    keep = max(1, len(inside) if inside.all() else int(np.argmin(inside)))
    return ids[:keep], w64[:keep]


def check(found, row, p):
    """One row of the output against the reference."""
    options = [candidates(row, p, slack) for slack in (0.0, -1e-8, 1e-8)]
    if options[0] is None:
        assert found.token == -1
        return
    for ids, w in options:
        at = np.flatnonzero(ids == found.token)
        if len(at) == 1 and w[at[0]] > 0:
            after = np.cumsum(w)
            low, high = (after[at[0]] - w[at[0]]) / after[-1], after[at[0]] / after[-1]
            if low - SLACK <= p["uniform"] <= high + SLACK:
                break
    else:
        raise AssertionError(f"{found.token} is not what {p['uniform']} chooses")
    if p["num_logprobs"] < 0:
        return
    with np.errstate(invalid="ignore", over="ignore"):
        raw = row.astype(np.float64)
        numbers = raw[raw > -np.inf]
        assert found.rank == 1 + (numbers > raw[found.token]).sum()
        ids = np.flatnonzero(raw > -np.inf)
        ids = ids[np.argsort(-raw[ids], kind="stable")][: p["num_logprobs"]]
        assert list(found.top_tokens[: found.num_top]) == ids.tolist()
        if numbers.max() == np.inf:
            return
        norm = numbers.max() + np.log(np.exp(numbers - numbers.max()).sum())
        want = np.array([raw[found.token] - norm, *(raw[ids] - norm)]).astype(F32)
        got = np.array([found.logprob, *found.top_logprobs[: found.num_top]], F32)
        close = np.abs(got - want) <= 2e-6 * np.maximum(1.0, np.abs(want))
    assert np.all(close | (got == want))


def sample(sampler, logits, rows, num_tokens=None):
    """Runs and checks every row."""
    found = sampler.run(logits, rows, num_tokens)
    for f, row, p in zip(found, logits, rows, strict=True):
        check(f, row[: num_tokens or len(row)], p)
    return found


def fields(found, p):
    """All of an output that is defined."""
    if p["num_logprobs"] < 0:
        return found.token
    lists = [list(x[: found.num_top]) for x in (found.top_tokens, found.top_logprobs)]
    return found.token, found.rank, found.logprob, lists


def random_row(rng, vocab, scale=2.0):
    return (scale * rng.standard_normal(vocab)).astype(F32)


def mixed_rows(rng, vocab, n):
    """Parameters of every kind, with edits where the index says so."""
    rows = []
    for i in range(n):
        p = params(
            uniform=float(rng.random()),
            temperature=[0.7, 1.0, 0.0, 1.3][i % 4],
            top_k=[0, 0, 50, 0, 1024, 2, 0, 1][i % 8],
            top_p=[1.0, 0.9, 0.95, 0.5, 1.0, 0.999][i % 6],
            min_p=[0.0, 0.0, 0.05, 0.0, 0.2][i % 5],
            num_logprobs=[-1, -1, 5, 0, -1, 32, -1][i % 7],
        )
        if i % 3 == 1:
            p |= {"repetition_penalty": 1.2, "frequency_penalty": 0.3, "presence_penalty": -0.4}
            ids = rng.choice(vocab, min(vocab, 200), replace=False)
            p["edits"] = [
                edit(int(t), float(rng.integers(-3, 4)), int(k % 9 == 0), int(k % 2), int(k % 4))
                for k, t in enumerate(ids)
            ]
        rows.append(p)
    return rows


@pytest.mark.parametrize("vocab", [1, 2, 7, 8, 15, 16, 100, 2047, 2048, 2051, 5000])
def test_every_mix_of_filters(vocab):
    rng = np.random.default_rng(vocab)
    sampler = Sampler(vocab, 64)
    mixes = itertools.product(
        [0.0, 0.7, 1.0], [0, 1, 2, 50, 1024], [0.0, 0.3, 0.9, 1.0], [0.0, 0.1, 1.0], [-1, 0, 20]
    )
    rows = [
        params(temperature=t, top_k=k, top_p=p, min_p=m, num_logprobs=n, uniform=float(rng.random()))
        for t, k, p, m, n in mixes
    ]
    for start in range(0, len(rows), 60):
        some = rows[start : start + 60]
        sample(sampler, np.stack([random_row(rng, vocab) for _ in some]), some)


@pytest.mark.parametrize("n", [1, 5, 64])
def test_the_whole_vocabulary(n):
    rng = np.random.default_rng(n)
    sampler = Sampler(VOCAB, n)
    logits = np.stack([random_row(rng, VOCAB, [1.0, 2.0, 4.0][i % 3]) for i in range(n)])
    logits[:, NUM_TOKENS:] = 1e4  # padding
    rows = mixed_rows(rng, NUM_TOKENS, n)
    sample(sampler, logits, rows, NUM_TOKENS)
    sample(sampler, logits, [p | {"uniform": float(rng.random())} for p in rows[::-1]], NUM_TOKENS)


@pytest.mark.parametrize("num_tokens", [1, 3, 4, 97, 99, 100])
def test_padding_is_never_chosen(num_tokens):
    rng = np.random.default_rng(num_tokens)
    logits = np.stack([random_row(rng, 100) for _ in range(40)])
    logits[:, num_tokens:] = np.inf
    sample(Sampler(100, 40), logits, mixed_rows(rng, 100, 40), num_tokens)


def strange_rows(vocab, rng):
    tied = rng.integers(-4, 5, vocab).astype(F32) / 4
    holes = random_row(rng, vocab)
    holes[rng.random(vocab) < 0.3] = np.nan
    holes[rng.random(vocab) < 0.3] = -np.inf
    single = np.full(vocab, -np.inf, F32)
    single[vocab // 2] = -3.0
    infinite = random_row(rng, vocab)
    infinite[[vocab // 3, vocab - 1]] = np.inf
    ends = np.full(vocab, np.finfo(F32).min, F32)
    ends[vocab // 2] = np.finfo(F32).max
    zeros = np.where(rng.random(vocab) < 0.5, F32(0.0), F32(-0.0))
    close = (1000 + rng.random(vocab) * 1e-3).astype(F32)
    steep = (1e30 * rng.standard_normal(vocab)).astype(F32)
    constants = [np.full(vocab, v, F32) for v in (np.nan, -np.inf, np.inf, 0.0, -7.5)]
    return [tied, holes, single, infinite, ends, zeros, close, steep, *constants]


@pytest.mark.parametrize("vocab", [9, 100, 5003])
@pytest.mark.parametrize("temperature", [0.0, 1e-45, 1e-39, 1e-6, 1.0, 1e6, 3e38])
def test_strange_rows(vocab, temperature):
    rng = np.random.default_rng(vocab)
    logits = np.stack(strange_rows(vocab, rng))
    sampler = Sampler(vocab, len(logits))
    for top_k, top_p, min_p in itertools.product([0, 3, 1000], [0.0, 0.5, 1.0], [0.0, 0.5, 1.0]):
        p = params(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, num_logprobs=4)
        sample(sampler, logits, [p | {"uniform": float(rng.random())} for _ in logits])


@pytest.mark.parametrize("temperature", [1.0, 30.0])
def test_strange_rows_of_the_whole_vocabulary(temperature):
    """More ties than the lists hold."""
    rng = np.random.default_rng(0)
    logits = np.stack(strange_rows(VOCAB, rng))
    sampler = Sampler(VOCAB, len(logits))
    for top_k, top_p, min_p in [
        (0, 0.5, 0.0),
        (0, 0.999, 0.0),
        (0, 1.0, 0.0),
        (1024, 1.0, 0.0),
        (0, 0.9, 0.3),
    ]:
        p = params(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, num_logprobs=32)
        sample(sampler, logits, [p | {"uniform": float(rng.random())} for _ in logits], NUM_TOKENS)


@pytest.mark.parametrize(("vocab", "count"), [(100, 100), (5000, 3000), (VOCAB, 1000), (VOCAB, 248_000)])
def test_edits(vocab, count):
    rng = np.random.default_rng(count)
    sampler = Sampler(vocab, 4)
    logits = np.stack([random_row(rng, vocab) for _ in range(4)])
    logits[0, :7] = [0.0, -0.0, np.nan, np.inf, -np.inf, 3e38, -3e38]
    rows = []
    for i in range(4):
        ids = rng.permutation(vocab)[: count if i != 2 else 0]
        parts = zip(
            ids.tolist(),
            rng.integers(-8, 9, len(ids)).tolist(),
            (rng.random((len(ids), 2)) < [0.1, 0.6]).tolist(),
            rng.integers(0, 5, len(ids)).tolist(),
            strict=True,
        )
        edits = [edit(t, b / 4, int(flags[0]), int(flags[1]), c) for t, b, flags, c in parts]
        edits += [edit(-1, 50.0), edit(vocab, 50.0)]  # no such tokens
        rows.append(
            params(
                repetition_penalty=1.3,
                frequency_penalty=0.25,
                presence_penalty=0.5,
                temperature=[0.0, 1.0, 0.8, 1.0][i],
                top_k=[0, 40, 0, 0][i],
                top_p=[1.0, 0.9, 1.0, 0.8][i],
                num_logprobs=[3, -1, 2, 32][i],
                edits=edits,
            )
        )
    for _ in range(3):
        sample(sampler, logits, [p | {"uniform": float(rng.random())} for p in rows])
    # The marks of edits are gone.
    sample(sampler, logits, [p | {"edits": [], "uniform": float(rng.random())} for p in rows])


def test_everything_banned():
    rng = np.random.default_rng(0)
    p = params(edits=[edit(t, banned=1) for t in range(100)], num_logprobs=5)
    found = Sampler(100, 2).run(np.stack([random_row(rng, 100)] * 2), [p, params()])
    assert found[0].token == -1 and found[0].num_top == 0 and found[1].token >= 0


@pytest.mark.parametrize("vocab", [5000, VOCAB])
def test_a_row_is_the_same_in_any_company_and_any_workspace(vocab):
    rng = np.random.default_rng(1)
    logits = np.stack([random_row(rng, vocab) for _ in range(40)])
    rows = mixed_rows(rng, vocab, 40)
    large, small = Sampler(vocab, 64), Sampler(vocab, 5)
    together = [fields(f, p) for f, p in zip(large.run(logits, rows), rows, strict=True)]
    again = [fields(f, p) for f, p in zip(large.run(logits, rows), rows, strict=True)]
    assert again == together
    for size in (1, 5):
        for start in range(0, 40, 5):
            some = rows[start : start + size]
            found = small.run(logits[start : start + size], some)
            assert [fields(f, p) for f, p in zip(found, some, strict=True)] == together[start : start + size]


@pytest.mark.parametrize(
    "changed",
    [{}, {"top_p": 0.8}, {"top_k": 12}, {"min_p": 0.1}, {"top_k": 30, "top_p": 0.9, "min_p": 0.02}],
)
def test_tokens_come_as_often_as_they_should(changed):
    vocab, draws = 100, 2048
    rng = np.random.default_rng(7)
    row = random_row(rng, vocab, 1.5)
    rows = [params(**changed, uniform=(i + 0.5) / draws) for i in range(draws)]
    found = Sampler(vocab, draws).run(np.stack([row] * draws), rows)
    ids, w = candidates(row, rows[0])
    counts = np.bincount([f.token for f in found], minlength=vocab)
    assert counts.sum() == counts[ids].sum()
    assert np.abs(counts[ids] - draws * w / w.sum()).max() <= 1.01
    exact = np.exp(row[ids].astype(np.float64) - row.max().astype(np.float64))
    assert np.abs(w / w.sum() - exact / exact.sum()).max() < 1e-6


def test_rows_that_do_not_start_at_16_bytes():
    rng = np.random.default_rng(3)
    rows = mixed_rows(rng, 1003, 9)
    sample(Sampler(1003, 9), np.stack([random_row(rng, 1003) for _ in rows]), rows)


@pytest.mark.parametrize("n", [2, 20])
def test_replays_of_a_graph(n):
    rng = np.random.default_rng(n)
    logits = np.stack([random_row(rng, VOCAB) for _ in range(n)])
    rows = mixed_rows(rng, VOCAB, n)
    sampler = Sampler(VOCAB, n)
    want = [fields(f, p) for f, p in zip(sampler.run(logits, rows), rows, strict=True)]
    found = sampler.run(logits, rows, replays=5)
    assert [fields(f, p) for f, p in zip(found, rows, strict=True)] == want
