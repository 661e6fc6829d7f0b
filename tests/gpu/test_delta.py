"""The launchers of cuda/delta.cu against float64."""

import pytest
import torch
from launch import Batch, DeltaDims, call, error, poisoned, randn, same_bits

pytestmark = pytest.mark.gpu
BF16 = 4e-3
# K, V, k_dim, v_dim, conv_kernel. The first two are the family's.
FAMILY = [(16, 32, 128, 128, 4), (16, 64, 128, 128, 4)]
ODD = [
    (2, 4, 64, 64, 4),
    (1, 3, 64, 96, 3),
    (2, 2, 128, 32, 2),
    (2, 6, 24, 10, 4),
    (1, 2, 50, 33, 5),
    (1, 2, 1, 1, 2),
]
# (cached_len, query_len, chunked_len)
RAGGED = [
    (0, 300, 300),
    (64, 1, 0),
    (7, 0, 0),
    (0, 5, 5),
    (128, 63, 63),
    (0, 64, 64),
    (64, 65, 65),
    (3, 5, 0),
    (64, 72, 70),
    (0, 77, 73),
    (0, 2, 0),
    (192, 1, 1),
    (0, 3, 3),
]


def width(dims):
    k, v, k_dim, v_dim, _ = dims
    return 2 * k * k_dim + v * v_dim


def used(batch):
    """Which slots a batch changes."""
    mask = torch.zeros(batch.num_slots, dtype=torch.bool, device="cuda")
    mask[[slot for slot, (_, q, _) in zip(batch.slots, batch.seqs, strict=True) if q]] = True
    return mask


class Conv:
    def __init__(self, dims, seqs, *, pad, seed=0):
        self.dims, self.channels = dims, width(dims)
        self.kernel, self.stride = dims[4], self.channels + pad
        self.batch = Batch(seqs, seed=seed)
        self.weight = randn(self.kernel, self.channels, dtype=torch.float32, seed=seed)
        self.x = randn(self.batch.num_tokens, self.stride, seed=seed + 1)
        self.tails = poisoned(self.batch.num_slots, self.kernel - 1, self.channels)
        self.tails[self.batch.slots] = randn(len(seqs), self.kernel - 1, self.channels, seed=seed + 2)

    def run(self):
        tails, out = self.tails.clone(), poisoned(self.batch.num_tokens + 1, self.channels)
        name, dims = "q35_causal_conv1d", DeltaDims(*self.dims)
        call(name, self.batch.struct, dims, self.weight, self.x, self.stride, tails, out)
        assert out[-1].isnan().all()
        return out[:-1], tails

    def want(self):
        outs, tails = [], self.tails.double()
        for start, slot, (_, n, _) in zip(self.batch.starts, self.batch.slots, self.batch.seqs, strict=True):
            x = torch.cat([tails[slot], self.x[start : start + n, : self.channels].double()])
            y = sum(x[tap : tap + n] * self.weight[tap].double() for tap in range(self.kernel))
            outs.append(torch.nn.functional.silu(y))
            tails[slot] = x[n:]
        return torch.cat(outs), tails


@pytest.mark.parametrize("dims", FAMILY + ODD)
@pytest.mark.parametrize("pad", [8, 3])
def test_conv1d(dims, pad):
    # Below and above the limits of the tile sizes, and sequences that begin anywhere in a tile.
    for seqs in ([(64, 1, 0)] * 3, RAGGED, [*RAGGED, *[(9, 1, 0)] * 20, (0, 700, 700)]):
        conv = Conv(dims, seqs, pad=pad)
        out, tails = conv.run()
        want, want_tails = conv.want()
        assert error(out, want) < BF16
        mask = used(conv.batch)
        assert torch.equal(tails[mask].double(), want_tails[mask])
        assert same_bits(tails[~mask], conv.tails[~mask])
        again, again_tails = conv.run()
        assert same_bits(again, out) and same_bits(again_tails, tails)


@pytest.mark.parametrize("dims", [FAMILY[0], ODD[3]])
def test_conv1d_alone_is_itself(dims):
    together = Conv(dims, [*RAGGED, (0, 900, 900)], pad=8)
    out, tails = together.run()
    for i, seq in enumerate(together.batch.seqs):
        alone = Conv(dims, [seq], pad=8)
        start, slot, mine = together.batch.starts[i], together.batch.slots[i], alone.batch.slots[0]
        alone.weight, alone.x = together.weight, together.x[start : start + seq[1]].contiguous()
        alone.tails[mine] = together.tails[slot]
        found, found_tails = alone.run()
        assert same_bits(found, out[start : start + seq[1]])
        assert same_bits(found_tails[mine], tails[slot])


class Delta:
    def __init__(self, dims, seqs, *, seed=0, pad=0, mean=0.0, decay=1.0):
        self.dims = dims
        _, v, k_dim, v_dim, _ = dims
        self.batch = Batch(seqs, seed=seed)
        self.ba_start = 6 + pad
        self.stride = self.ba_start + 2 * v + 1
        n = self.batch.num_tokens
        self.mixed = randn(n, width(dims), seed=seed, mean=mean)
        self.projected = randn(n, self.stride, seed=seed + 1)
        self.a_log = decay + randn(v, dtype=torch.float32, seed=seed + 2, scale=0.5)
        self.dt_bias = randn(v, dtype=torch.float32, seed=seed + 3)
        self.states = poisoned(self.batch.num_slots, v, k_dim, v_dim, dtype=torch.float32)
        fresh = randn(len(seqs), v, k_dim, v_dim, dtype=torch.float32, seed=seed + 4)
        self.states[self.batch.slots] = fresh

    def run(self):
        _, v, _, v_dim, _ = self.dims
        dims = DeltaDims(*self.dims)
        states, out = self.states.clone(), poisoned(self.batch.num_tokens + 1, v * v_dim)
        # A workspace for larger batches too, with NaN in it and a guard behind it.
        size = call("q35_delta_workspace", self.batch.num_tokens + 70, len(self.batch.seqs) + 2, dims)
        assert size >= call("q35_delta_workspace", self.batch.num_tokens, len(self.batch.seqs), dims)
        size = call("q35_delta_workspace", self.batch.num_tokens, len(self.batch.seqs), dims)
        workspace = poisoned(size + 64, dtype=torch.float32)
        arguments = (self.a_log, self.dt_bias, self.mixed, self.projected, self.stride, self.ba_start)
        call("q35_gated_delta_rule", self.batch.struct, dims, *arguments, states, workspace, out)
        assert out[-1].isnan().all() and workspace[size:].isnan().all()
        return out[:-1], states

    def want(self):
        """The recurrence in f64, all sequences side by side."""
        k, v, k_dim, v_dim, _ = self.dims
        n, seqs = self.batch.num_tokens, self.batch.seqs
        q, key, value = self.mixed.double().split([k * k_dim, k * k_dim, v * v_dim], dim=-1)

        def normed(x):
            x = x.reshape(n, k, k_dim)
            x = x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()
            return x.repeat_interleave(v // k, dim=1)

        q, key, value = normed(q) / k_dim**0.5, normed(key), value.reshape(n, v, v_dim)
        b = self.projected[:, self.ba_start : self.ba_start + v].double()
        a = self.projected[:, self.ba_start + v : self.ba_start + 2 * v].double() + self.dt_bias.double()
        decay = (-self.a_log.double().exp() * torch.nn.functional.softplus(a)).exp()
        beta = b.sigmoid()
        out = torch.zeros(n, v, v_dim, dtype=torch.float64, device="cuda")
        states = self.states.double()
        lens = torch.tensor([s[1] for s in seqs])
        starts, slots = torch.tensor(self.batch.starts), torch.tensor(self.batch.slots)
        for i in range(int(lens.max())):
            live = lens > i
            t, at = (starts[live] + i).cuda(), slots[live].cuda()
            s = states[at] * decay[t][..., None, None]
            d = beta[t][..., None] * (value[t] - torch.einsum("shk,shkv->shv", key[t], s))
            s = s + key[t][..., None] * d[..., None, :]
            states[at], out[t] = s, torch.einsum("shk,shkv->shv", q[t], s)
        return out.reshape(n, v * v_dim), states

    def check(self, state_error=1e-4):
        out, states = self.run()
        want, want_states = self.want()
        for start, slot, (_, n, _) in zip(self.batch.starts, self.batch.slots, self.batch.seqs, strict=True):
            if n:
                assert error(out[start : start + n], want[start : start + n]) < BF16
                assert error(states[slot], want_states[slot]) < state_error
        mask = used(self.batch)
        assert same_bits(states[~mask], self.states[~mask])
        again, again_states = self.run()
        assert same_bits(again, out) and same_bits(again_states, states)
        return out, states


@pytest.mark.parametrize("dims", FAMILY + ODD)
@pytest.mark.parametrize("decay", [1.0, -4.0])
def test_delta_ragged(dims, decay):
    Delta(dims, RAGGED, decay=decay, pad=2).check()


@pytest.mark.parametrize("dims", [FAMILY[1], ODD[0], ODD[3]])
def test_delta_decode(dims):
    for seqs in ([(64, 1, 0)], [(64, 1, 1)], [(100 + i, 1 + i % 8, 0) for i in range(40)]):
        Delta(dims, seqs, decay=-2.0).check()


@pytest.mark.parametrize("length", [8, 9, 16, 17, 63, 64, 65, 72, 73, 128, 129, 640])
def test_delta_chunk_borders(length):
    Delta(
        ODD[0], [(0, length, length), (64, length, length - 1), (0, length + 1, length)], decay=-3.0
    ).check()


@pytest.mark.parametrize("dims", FAMILY)
def test_delta_long_prompts(dims):
    # Many chunks one after the other, with sequences that end in between and that have more slices than the card has
    # multiprocessors.
    Delta(dims, [(0, 1500, 1500), (64, 1000, 1000), (0, 449, 449), (128, 192, 192)], decay=-5.0).check()


def test_delta_keys_alike():
    # Keys that share a large mean and hardly decay: the inverse has large entries that cancel.
    Delta(FAMILY[0], [(0, 300, 300), (64, 150, 150)], mean=1.0, decay=-5.0).check()


def test_delta_total_decay():
    # g near -1e4 at one token: nothing of before is left, and what follows is as exact as ever.
    delta = Delta(ODD[0], [(0, 200, 200), (0, 7, 0)], decay=-2.0)
    a = delta.projected[:, delta.ba_start + 4 : delta.ba_start + 8]
    a[[20, 100, 203]] = 7e4
    delta.check()


@pytest.mark.parametrize("dims", [FAMILY[0], ODD[0], ODD[3]])
def test_delta_alone_is_itself(dims):
    # Enough heads together that the slices of the walk are wide, narrow alone.
    together = Delta(dims, [*RAGGED, (64, 130, 130)], decay=-1.0)
    out, states = together.run()
    for i, seq in enumerate(together.batch.seqs):
        alone = Delta(dims, [seq])
        start, slot, mine = together.batch.starts[i], together.batch.slots[i], alone.batch.slots[0]
        rows = slice(start, start + seq[1])
        alone.a_log, alone.dt_bias = together.a_log, together.dt_bias
        alone.mixed, alone.projected = (
            together.mixed[rows].contiguous(),
            together.projected[rows].contiguous(),
        )
        alone.states[mine] = together.states[slot]
        found, found_states = alone.run()
        assert same_bits(found, out[rows]) and same_bits(found_states[mine], states[slot])


@pytest.mark.parametrize("dims", [FAMILY[0], ODD[3]])
def test_delta_split_prompt(dims):
    # A prompt in two steps, split at a border of its chunks, is the prompt in one.
    whole = Delta(dims, [(0, 300, 300)], decay=-2.0)
    out, states = whole.run()
    slot = whole.batch.slots[0]
    state = whole.states[slot]
    for begin, end in ((0, 128), (128, 300)):
        part = Delta(dims, [(begin, end - begin, end - begin)])
        part.a_log, part.dt_bias = whole.a_log, whole.dt_bias
        part.mixed, part.projected = (
            whole.mixed[begin:end].contiguous(),
            whole.projected[begin:end].contiguous(),
        )
        part.states[part.batch.slots[0]] = state
        found, found_states = part.run()
        state = found_states[part.batch.slots[0]]
        assert same_bits(found, out[begin:end])
    assert same_bits(state, states[slot])


@pytest.mark.parametrize("dims", [(1, 2, 128, 64, 4), (1, 2, 24, 10, 4)])
def test_delta_many_steps(dims):
    # In two calls it is the same: the state goes through memory unchanged.
    delta = Delta(dims, [(5, 4096, 0)], decay=-4.0)
    _, states = delta.check(state_error=1e-5)
    slot = delta.batch.slots[0]
    half = Delta(dims, [(5, 2048, 0)])
    half.a_log, half.dt_bias = delta.a_log, delta.dt_bias
    state = delta.states[slot]
    for begin in (0, 2048):
        rows = slice(begin, begin + 2048)
        half.mixed, half.projected = delta.mixed[rows].contiguous(), delta.projected[rows].contiguous()
        half.states[half.batch.slots[0]] = state
        state = half.run()[1][half.batch.slots[0]]
    assert same_bits(state, states[slot])


class Decode:
    """A step of a layer, of a number of sequences of one new token or of any: by the three launchers one after the
    other, and by the one."""

    def __init__(self, dims, seqs, *, pad=8, seed=0):
        k, v, k_dim, v_dim, _ = dims
        if isinstance(seqs, int):
            # chunked_len is 1 for a prompt of one token.
            seqs = [(64 * (i % 7), 1, i % 2) for i in range(seqs)]
        num_seqs = len(seqs)
        conv = Conv(dims, seqs, pad=0, seed=seed)
        self.dims, self.batch, self.weight, self.tails = dims, conv.batch, conv.weight, conv.tails
        self.z_start = conv.channels
        self.ba_start = self.z_start + v * v_dim
        self.stride = -(-(self.ba_start + 2 * v) // 8) * 8 + pad
        self.projected = randn(self.batch.num_tokens, self.stride, seed=seed + 5)
        self.a_log = randn(v, dtype=torch.float32, seed=seed + 6, scale=0.5, mean=-1.0)
        self.dt_bias = randn(v, dtype=torch.float32, seed=seed + 7)
        self.norm = randn(v_dim, dtype=torch.float32, seed=seed + 8, mean=1.0)
        self.states = poisoned(self.batch.num_slots, v, k_dim, v_dim, dtype=torch.float32)
        fresh = randn(num_seqs, v, k_dim, v_dim, dtype=torch.float32, seed=seed + 9)
        self.states[self.batch.slots] = fresh
        self.counters = torch.zeros(num_seqs * k + 1, dtype=torch.int32, device="cuda")
        self.counters[-1] = 77
        self.copied = torch.empty_like(self.counters)

    def buffers(self):
        n, v, v_dim = self.batch.num_tokens, self.dims[1], self.dims[3]
        mixed, out = poisoned(n, width(self.dims)), poisoned(n + 1, v * v_dim)
        return self.tails.clone(), self.states.clone(), mixed, out

    def run(self, buffers):
        tails, states, mixed, out = buffers
        weights = (self.weight, self.a_log, self.dt_bias, self.norm, 1e-6)
        places = (self.projected, self.stride, self.z_start, self.ba_start)
        dims, batch = DeltaDims(*self.dims), self.batch.struct
        self.copied.copy_(self.counters)  # a step begins with copies
        call("q35_delta_decode", batch, dims, *weights, *places, tails, states, self.counters, mixed, out)

    def space(self):
        size = call("q35_delta_workspace", self.batch.num_tokens, len(self.batch.seqs), DeltaDims(*self.dims))
        return poisoned(max(1, size), dtype=torch.float32)

    def run_prompt(self, buffers, space):
        tails, states, mixed, out = buffers
        weights = (self.weight, self.a_log, self.dt_bias, self.norm, 1e-6)
        places = (self.projected, self.stride, self.z_start, self.ba_start)
        dims, batch = DeltaDims(*self.dims), self.batch.struct
        call("q35_delta_prompt", batch, dims, *weights, *places, tails, states, space, mixed, out)

    def one_by_one(self, buffers):
        tails, states, mixed, out = buffers
        _, v, _, v_dim, _ = self.dims
        batch, dims, x, stride = self.batch.struct, DeltaDims(*self.dims), self.projected, self.stride
        call("q35_causal_conv1d", batch, dims, self.weight, x, stride, tails, mixed)
        space = self.space()
        rates = (self.a_log, self.dt_bias)
        call("q35_gated_delta_rule", batch, dims, *rates, mixed, x, stride, self.ba_start, states, space, out)
        call(
            "q35_gated_rmsnorm",
            self.batch.num_tokens,
            v,
            v_dim,
            self.norm,
            1e-6,
            x,
            stride,
            self.z_start,
            out,
        )

    def counted(self):
        return not self.counters[:-1].any() and self.counters[-1] == 77


# The fused sizes, with 1, 2, 3 and 4 value heads to a key head, then sizes that take the three launchers.
DECODE = [
    *FAMILY,
    (2, 2, 128, 128, 4),
    (2, 4, 64, 64, 4),
    (1, 3, 64, 64, 4),
    (2, 4, 64, 64, 3),
    (2, 4, 128, 64, 4),
    (2, 6, 24, 10, 4),
]


@pytest.mark.parametrize("dims", DECODE)
@pytest.mark.parametrize("num_seqs", [1, 2, 7, 16, 17, 65])
def test_decode_is_the_three(dims, num_seqs):
    step = Decode(dims, num_seqs)
    want, found = step.buffers(), step.buffers()
    # Steps follow each other as in a run: each reads what the last one left.
    for _ in range(3):
        step.one_by_one(want)
    for _ in range(3):
        step.run(found)
    for a, b in zip(want[:2], found[:2], strict=True):
        assert same_bits(a, b)
    assert same_bits(want[3], found[3])
    assert found[3][:-1].isfinite().all() and found[3][-1].isnan().all()
    assert step.counted()


def test_decode_odd_stride():
    # The gate is not at a multiple of 16 bytes: not fused, and still right.
    step = Decode((2, 4, 64, 64, 4), 5, pad=3)
    want, found = step.buffers(), step.buffers()
    step.one_by_one(want)
    step.run(found)
    assert same_bits(want[0], found[0]) and same_bits(want[1], found[1]) and same_bits(want[3], found[3])


@pytest.mark.parametrize("dims", [FAMILY[0], (2, 4, 64, 64, 4)])
def test_decode_in_a_graph(dims):
    step = Decode(dims, 9)
    want, found = step.buffers(), step.buffers()
    for _ in range(4):
        step.one_by_one(want)
    start = [x.clone() for x in found]
    step.run(found)
    for x, fresh in zip(found, start, strict=True):
        x.copy_(fresh)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step.run(found)
        step.run(found)
    graph.replay()
    graph.replay()
    assert same_bits(want[0], found[0]) and same_bits(want[1], found[1]) and same_bits(want[3], found[3])
    assert step.counted()


# The fused sizes, with 1 to 5 value heads to a key head, then sizes that take the three launchers.
PROMPTS = [
    *FAMILY,
    (2, 2, 128, 64, 4),
    (1, 3, 128, 96, 4),
    (1, 5, 128, 32, 4),
    (2, 4, 64, 64, 4),
    (2, 4, 128, 64, 3),
    (2, 6, 24, 10, 4),
]


@pytest.mark.parametrize("dims", PROMPTS)
@pytest.mark.parametrize("pad", [0, 3])
def test_prompt_is_the_three(dims, pad):
    # All of a sequence in chunks, a rest behind them, none in chunks; of one token too.
    for seqs in ([(0, 200, 200)], [*RAGGED, (0, 20, 0), (64, 9, 9), (0, 700, 700)], [(64, 8, 8), (0, 1, 1)]):
        step = Decode(dims, seqs, pad=pad)
        want, found = step.buffers(), step.buffers()
        for _ in range(2):
            step.one_by_one(want)
        for _ in range(2):
            step.run_prompt(found, step.space())
        for a, b in zip(want, found, strict=True):
            assert same_bits(a, b)
        assert found[3][:-1].isfinite().all() and found[3][-1].isnan().all()


@pytest.mark.parametrize("dims", [FAMILY[0], (2, 4, 128, 64, 4)])
def test_prompt_in_a_graph(dims):
    step = Decode(dims, [(0, 300, 300), (64, 70, 70), (3, 1, 0)])
    want, found = step.buffers(), step.buffers()
    for _ in range(4):
        step.one_by_one(want)
    start, space = [x.clone() for x in found], step.space()
    step.run_prompt(found, space)
    for x, fresh in zip(found, start, strict=True):
        x.copy_(fresh)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step.run_prompt(found, space)
        step.run_prompt(found, space)
    graph.replay()
    graph.replay()
    for a, b in zip(want, found, strict=True):
        assert same_bits(a, b)


@pytest.mark.parametrize("dims", [FAMILY[1], ODD[0], ODD[1]])
def test_delta_one_after_the_other(dims):
    # Convolution and rule without a break between them, again and again: each kernel waits for what it reads.
    rule = Delta(dims, [(0, 500, 500), (64, 70, 70), (3, 1, 0)], decay=-2.0)
    conv = Conv(dims, rule.batch.seqs, pad=8)
    n, v, v_dim = rule.batch.num_tokens, dims[1], dims[3]
    struct, size = DeltaDims(*dims), call("q35_delta_workspace", n, 3, DeltaDims(*dims))
    space, mixed = poisoned(max(1, size), dtype=torch.float32), poisoned(n, width(dims))
    batch, fixed = rule.batch.struct, (rule.projected, rule.stride, rule.ba_start)
    found = []
    for pause in (True, False):
        tails, states, out = conv.tails.clone(), rule.states.clone(), poisoned(n, v * v_dim)
        for _ in range(5):
            call("q35_causal_conv1d", batch, struct, conv.weight, conv.x, conv.stride, tails, mixed)
            if pause:
                torch.cuda.synchronize()
            call(
                "q35_gated_delta_rule",
                *(batch, struct, rule.a_log, rule.dt_bias, mixed, *fixed, states, space, out),
            )
            if pause:
                torch.cuda.synchronize()
        found.append((tails, states, out))
    assert all(same_bits(a, b) for a, b in zip(*found, strict=True))


def test_delta_workspace_is_by_tokens():
    # Sequences cost their entry in a list, not the memory of a chunk each.
    dims = DeltaDims(16, 64, 128, 128, 4)
    few, many = (call("q35_delta_workspace", 8192, seqs, dims) for seqs in (1, 256))
    assert many - few < 4096
    assert many < 60 << 20


def test_no_tokens():
    delta = Delta(ODD[0], [(0, 0, 0), (64, 0, 0)])
    assert same_bits(delta.run()[1], delta.states)
    conv = Conv(ODD[0], [(0, 0, 0)], pad=8)
    assert same_bits(conv.run()[1], conv.tails)


def test_delta_many_sequences():
    # More sequences than the plan takes at a time, some without chunks, and more items than the walk has blocks.
    seqs = [(0, 9 + 2 * i, 9 + 2 * i) if i % 5 else (64, 1, 0) for i in range(40)]
    Delta((16, 64, 64, 128, 4), seqs, decay=-2.0).check()
