"""Matrices of 4 and 8 bits in the order of `q35_packed`, with random codes, and the numbers they stand for."""

import torch
from launch import PackedMatrix

KINDS = {"bf16": 0, "int4_f16": 1, "int4_bf16": 2, "fp8_block": 3, "fp8_row": 4}
_STEP = 1 << 16  # rows that are drawn and laid out at a time


def lay_out(codes, bits):
    """Codes, uint8 [rows, k], in tiles."""
    rows, k = codes.shape
    tiles = codes.view(
        rows // 16, 2, 8, k // 64, 2, 2, 2, 4, 2
    )  # row: tile, +8, g; k: tile, 32, 16, 8, pair, element
    if bits == 8:
        return tiles.permute(0, 3, 4, 2, 7, 5, 6, 8, 1).reshape(-1)
    nibbles = tiles.permute(0, 3, 2, 7, 4, 5, 8, 6, 1)
    return (nibbles[..., 0] | nibbles[..., 1] << 4).reshape(-1)


def of_e4m3(codes):
    return codes.view(torch.float8_e4m3fn).to(torch.float32).double()


class Packed:
    """[rows, k] whose entries have about `scale` as their root mean square."""

    def __init__(self, rows, k, kind, group, zeros, *, scale, generator):
        self.rows, self.k, self.kind, self.group = rows, k, kind, group if 0 < group < k else k
        self.scales = self.zeros = None
        self.bits = {"bf16": 16, "int4": 4, "fp8_": 8}[kind[:4]]
        if self.bits == 16:
            self.codes = torch.empty(rows, k, dtype=torch.bfloat16, device="cuda")
            self.laid_out = self.codes.normal_(std=scale, generator=generator)
            return
        self.codes = torch.empty(rows, k, dtype=torch.uint8, device="cuda")
        for part in self.codes.split(_STEP):
            part.random_(0, 1 << self.bits, generator=generator)
            if self.bits == 8:
                part.masked_fill_((part & 0x7F) == 0x7F, 0)
        if self.kind == "fp8_block":
            self.group = 128
        elif self.kind == "fp8_row":
            self.group = k
        shape = (rows // 16, -(-k // self.group), 1 if self.kind == "fp8_block" else 16)
        rms = 4.6 if self.bits == 4 else 130.0
        scales = (0.5 + torch.rand(shape, generator=generator, device="cuda")) * (scale / rms)
        dtypes = {"int4_f16": torch.float16, "int4_bf16": torch.bfloat16}
        self.scales = scales.to(dtypes.get(kind, torch.float32))
        if zeros:
            self.zeros = torch.randint(5, 12, shape, generator=generator, device="cuda", dtype=torch.uint8)
        self._lay_out()

    def _lay_out(self):
        self.laid_out = torch.cat([lay_out(part, self.bits) for part in self.codes.split(_STEP)])

    def keep_small(self):
        """Of 8 bits, those numbers with the two smallest exponents alone, scaled up."""
        self.codes &= 0x8F
        self.scales *= 8000.0
        self._lay_out()

    def plain(self, start, end):
        """Rows start .. end - 1, whole tiles, in f64."""
        codes = self.codes[start:end]
        if self.bits == 16:
            return codes.double()

        def spread(t):  # [row tile, group, 16 or 1] to [row, k]
            t = t[start // 16 : end // 16].double().transpose(1, 2).expand(-1, 16, -1)
            return t.reshape(end - start, -1).repeat_interleave(self.group, dim=1)[:, : self.k]

        if self.bits == 8:
            return of_e4m3(codes) * spread(self.scales)
        return (codes.double() - (8 if self.zeros is None else spread(self.zeros))) * spread(self.scales)

    def struct(self):
        tensors = (self.laid_out, self.scales, self.zeros)
        pointers = (None if t is None else t.data_ptr() for t in tensors)
        return PackedMatrix(*pointers, self.rows, self.k, self.group, KINDS[self.kind])
