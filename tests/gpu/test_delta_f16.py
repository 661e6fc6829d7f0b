"""The delta rule with states in f16: against float64 that is rounded where the contract says, and cut anywhere."""

import pytest
import test_delta
import torch
from launch import DeltaDims, error, same_bits
from test_delta import BF16, DECODE, FAMILY, ODD, PROMPTS, RAGGED, Decode, Delta, used

pytestmark = pytest.mark.gpu
LARGEST = 65504


@pytest.fixture(autouse=True)
def half_states(monkeypatch):
    monkeypatch.setattr(test_delta, "DeltaDims", lambda *dims: DeltaDims(*dims, 1))


def to_half(x):
    """Rounded as a state is."""
    return x.float().clamp(-LARGEST, LARGEST).half()


class Half(Delta):
    def __init__(self, dims, seqs, **options):
        super().__init__(dims, seqs, **options)
        self.states = self.states.half()

    def rounded_after(self, i, query, chunked):
        """Whether the state is rounded after the i-th new token."""
        _, _, k_dim, v_dim, _ = self.dims
        fast = k_dim in (64, 128) and v_dim % 32 == 0
        rest = chunked % 64
        in_chunks = (chunked - rest if rest <= 8 else chunked) if fast else 0
        return i < query and (i >= in_chunks or (i + 1) % 64 == 0 or i + 1 == in_chunks)

    def want(self):
        """As in f64, with the state rounded to f16 in between."""
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
        for start, slot, (_, query, chunked) in zip(self.batch.starts, self.batch.slots, seqs, strict=True):
            s = states[slot]
            for i in range(query):
                t = start + i
                s = s * decay[t][:, None, None]
                d = beta[t][:, None] * (value[t] - torch.einsum("hk,hkv->hv", key[t], s))
                s = s + key[t][..., None] * d[:, None, :]
                out[t] = torch.einsum("hk,hkv->hv", q[t], s)
                if self.rounded_after(i, query, chunked):
                    s = to_half(s).double()
            states[slot] = s
        return out.reshape(n, v * v_dim), states

    def check(self, state_error=5e-4):
        """A state may be one step off where f32 falls on the other side of a tie."""
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


@pytest.mark.parametrize("dims", FAMILY + ODD)
@pytest.mark.parametrize("decay", [1.0, -4.0])
def test_ragged(dims, decay):
    Half(dims, RAGGED, decay=decay, pad=2).check()


@pytest.mark.parametrize("length", [8, 9, 64, 65, 72, 73, 129])
def test_chunk_borders(length):
    seqs = [(0, length, length), (64, length, length - 1), (0, length + 1, length)]
    Half(ODD[0], seqs, decay=-3.0).check()


@pytest.mark.parametrize("dims", [*FAMILY, ODD[0], ODD[3]])
def test_cut_anywhere(dims):
    """A prompt in two steps, and what was generated token by token or computed again at once."""
    whole = Half(dims, [(0, 310, 300)], decay=-2.0)
    out, states = whole.run()
    slot = whole.batch.slots[0]
    state = whole.states[slot]
    for begin, end, chunked in ((0, 128, 128), (128, 300, 172), (300, 301, 0), (301, 306, 0), (306, 310, 0)):
        part = Half(dims, [(begin, end - begin, chunked)])
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


@pytest.mark.parametrize("dims", [FAMILY[0], FAMILY[1], ODD[0]])
def test_alone_is_itself(dims):
    together = Half(dims, [*RAGGED, (64, 130, 130)], decay=-1.0)
    out, states = together.run()
    for i, seq in enumerate(together.batch.seqs):
        alone = Half(dims, [seq])
        start, slot, mine = together.batch.starts[i], together.batch.slots[i], alone.batch.slots[0]
        rows = slice(start, start + seq[1])
        alone.a_log, alone.dt_bias = together.a_log, together.dt_bias
        alone.mixed = together.mixed[rows].contiguous()
        alone.projected = together.projected[rows].contiguous()
        alone.states[mine] = together.states[slot]
        found, found_states = alone.run()
        assert same_bits(found, out[rows]) and same_bits(found_states[mine], states[slot])


@pytest.mark.parametrize("dims", [*FAMILY, ODD[0], ODD[3]])
@pytest.mark.parametrize("query", [(1, 0), (100, 100)])
def test_saturates_and_shows_nan(dims, query):
    case = Half(dims, [(0, *query)], decay=-6.0)
    k, v, k_dim, v_dim, _ = dims
    values = case.mixed[:, 2 * k * k_dim :].view(-1, v, v_dim)
    values[:, :, 0], values[:, :, 1], values[:, :, 2] = 1e7, -1e7, float("nan")
    case.projected[:, case.ba_start : case.ba_start + v] = 4.0
    _, states = case.run()
    state = states[case.batch.slots[0]].float()
    assert state[:, :, 2].isnan().any() and not state.isinf().any()
    rest = state[:, :, [i for i in range(v_dim) if i != 2]]
    assert rest.isfinite().all() and rest.abs().max() == LARGEST


@pytest.mark.parametrize("dims", DECODE)
@pytest.mark.parametrize("num_seqs", [1, 7, 65])
def test_decode_is_the_three(dims, num_seqs):
    step = Decode(dims, num_seqs)
    step.states = step.states.half()
    want, found = step.buffers(), step.buffers()
    for _ in range(3):
        step.one_by_one(want)
    for _ in range(3):
        step.run(found)
    assert all(same_bits(want[i], found[i]) for i in (0, 1, 3))
    assert found[3][:-1].isfinite().all() and found[3][-1].isnan().all()
    assert step.counted()


@pytest.mark.parametrize("dims", PROMPTS)
def test_prompt_is_the_three(dims):
    step = Decode(dims, RAGGED)
    step.states = step.states.half()
    want, found = step.buffers(), step.buffers()
    step.one_by_one(want)
    step.run_prompt(found, step.space())
    assert all(same_bits(want[i], found[i]) for i in (0, 1, 3))
