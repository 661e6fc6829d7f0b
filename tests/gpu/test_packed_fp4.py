"""NVFP4 on its way to the device, and each of its numbers in products of few and of many rows. Products of all sizes are
in test_packed.py and its neighbours."""

import pytest
import torch
from launch import call
from packed import of_e2m1, of_e4m3
from test_packed import FP4, INT4_F16, PACKED, Matrix, drawn, drawn_fp8, filled, linear

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("rows", "k"), [(16, 64), (48, 192), (150, 320), (37, 1088)])
def test_checkpoints(rows, k):
    """Scales of every kind, those below 2^-6, zeros and ones with a sign too."""
    tall = rows + -rows % 16
    m = Matrix(FP4, 32 + tall + 16, k)
    codes, scales = drawn(256, rows, k // 2, seed=4).cuda(), drawn_fp8(rows, k // 16, seed=5)
    scales = torch.where(drawn(4, rows, k // 16, seed=6) == 0, scales & 0x87, scales).cuda()
    call("q35_pack_fp4", m.struct, 32, rows, codes, scales, 0.3)
    numbers = of_e2m1(torch.stack([codes & 15, codes >> 4], -1).view(rows, k))
    want = numbers * of_e4m3(scales).repeat_interleave(16, 1) * float(torch.tensor(0.3))
    part = m.dequantised()[32 : 32 + tall]
    assert torch.equal(part[:rows], want)
    assert (part[rows:] == 0).all()
    bytes_of, wholes = m.fp4_scales()
    assert (bytes_of[32 : 32 + tall] < 144).all()
    # What nothing wrote is what it was.
    assert (bytes_of[:32] == 0xFF).all() and (bytes_of[32 + tall :] == 0xFF).all()
    assert wholes[:2].isnan().all() and wholes[-1].isnan()
    assert (m.codes[: 16 * k] == 0x77).all() and (m.codes[(32 + tall) * k // 2 :] == 0x77).all()


def all_numbers(k):
    """A row for each scale that is a number, with every code, times 2."""
    m = Matrix(FP4, 256, k)
    low = torch.arange(0, k, 2) % 16
    codes = (low | (low + 1) << 4).to(torch.uint8).expand(256, -1).contiguous().cuda()
    scales = torch.arange(256).to(torch.uint8)
    scales = torch.where(scales % 128 == 127, scales - 1, scales)[:, None].expand(-1, k // 16)
    scales = scales.contiguous().cuda()
    call("q35_pack_fp4", m.struct, 0, 256, codes, scales, 2.0)
    torch.cuda.synchronize()
    code = torch.arange(k, device="cuda") % 16
    return m, of_e4m3(scales[:, :1]) * of_e2m1(code.to(torch.uint8)) * 2


@pytest.mark.parametrize("n", [16, 64])
@pytest.mark.parametrize("k", [128, 192])
def test_all_numbers(k, n):
    """Each product of a code and a scale comes out as it is: of every row one element counts."""
    m, want = all_numbers(k)
    rows = torch.eye(k, dtype=torch.bfloat16, device="cuda")
    for first in range(0, k, n):
        found = linear(m, rows[first : first + n].contiguous(), True)
        assert torch.equal(found.double().T, want[:, first : first + n])


def test_what_is_refused():
    m, int4 = Matrix(FP4, 32, 128), filled(INT4_F16, 32, 128, 64)
    codes = int4.codes

    def refused(name, *arguments):
        with pytest.raises(AssertionError, match="CUDA error 1$"):
            call(name, *arguments)

    refused("q35_pack_fp4", int4.struct, 0, 16, codes, codes, 1.0)
    refused("q35_pack_fp4", m.struct, 8, 16, codes, codes, 1.0)
    refused("q35_pack_fp4", m.struct, 16, 32, codes, codes, 1.0)
    refused("q35_pack_int4", m.struct, 0, 16, codes, PACKED)
    refused("q35_pack_fp8", m.struct, 0, 16, codes)
    refused("q35_pack_scales", m.struct, 0, 16, codes, 0, 1, 8, 1)
