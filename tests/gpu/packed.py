"""Matrices of 4 and 8 bits in the order of `q35_packed`, with random codes, and the numbers they stand for."""

import copy

import torch
from launch import PackedMatrix

KINDS = {"bf16": 0, "int4_f16": 1, "int4_bf16": 2, "fp8_block": 3, "fp8_row": 4, "fp4": 5}
GGUF = {"q4_k": 6, "q5_k": 7, "q6_k": 8, "q8_0": 9}
KINDS |= GGUF
_GGUF_BITS = {"q4_k": 4, "q5_k": 5, "q6_k": 6, "q8_0": 8}
_GGUF_RMS = {"q4_k": 300.0, "q5_k": 600.0, "q6_k": 1370.0, "q8_0": 74.0}  # where d is 1
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
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


def lay_out_fp4(codes):
    """Codes of e2m1, uint8 [rows, k], in tiles."""
    rows, k = codes.shape
    tiles = codes.view(
        rows // 16, 2, 8, k // 64, 4, 2, 4, 2
    )  # row: tile, +8, g; k: tile, step, 8, pair, element
    tiles = tiles.permute(0, 3, 2, 6, 4, 5, 1, 7)
    words = torch.zeros(tiles.shape[:5], dtype=torch.int32, device=codes.device)
    for i in range(4):
        for element in range(2):
            code = tiles[..., i // 2, i % 2, element].to(torch.int32)
            words |= (code & 7) << (3 * i + 16 * element) | (code >> 3) << (12 + (i ^ 1) + 16 * element)
    return words.view(torch.uint8).reshape(-1)


def lay_out_fp4_scales(scales, wholes):
    """Bytes [rows, k / 16] in tiles, and float32 [rows / 16] behind them."""
    rows, groups = scales.shape
    tiles = scales.view(rows // 16, 2, 8, groups // 4, 4).permute(0, 3, 2, 1, 4)
    return torch.cat([tiles.reshape(-1), wholes.view(torch.uint8)])


def lay_out_upper(codes):
    """Tiles of codes of up to 6 bits, uint8 [rows, k], with the upper two behind the others."""
    rows, k = codes.shape
    tiles = (codes >> 4).view(
        rows // 16, 2, 8, k // 64, 4, 2, 4, 2
    )  # row: tile, +8, g; k: tile, step, 8, pair, element
    tiles = tiles.permute(0, 3, 2, 6, 4, 5, 1, 7)
    words = torch.zeros(*tiles.shape[:4], 2, dtype=torch.int32, device=codes.device)
    for step in range(4):
        for i in range(4):
            for element in range(2):
                code = tiles[:, :, :, :, step, i // 2, i % 2, element].to(torch.int32)
                words[..., step // 2] |= code << (8 * (step % 2) + 2 * i + 16 * element)
    shape = (rows // 16, k // 64, -1)
    lower = lay_out(codes & 15, 4).view(shape)
    return torch.cat([lower, words.view(torch.uint8).reshape(shape)], -1).reshape(-1)


def by_tile(parts):
    """[rows, tiles along k, bytes] in the order of `q35_packed`."""
    rows, tiles, size = parts.shape
    return parts.view(rows // 16, 16, tiles, size).transpose(1, 2).reshape(-1)


def of_e2m1(codes):
    numbers = torch.tensor([*E2M1, *(-x for x in E2M1)], dtype=torch.float64, device=codes.device)
    return numbers[codes.int()]


def of_fp4_scales(scales):
    """What their bytes stand for."""
    scales = scales.double()
    return (8 + scales % 8) * torch.exp2(torch.floor(scales / 8) - 12)


def of_e4m3(codes):
    return codes.view(torch.float8_e4m3fn).to(torch.float32).double()


class Packed:
    """[rows, k] whose entries have about `scale` as their root mean square."""

    def __init__(self, rows, k, kind, group, zeros, *, scale, generator):
        self.rows, self.k, self.kind, self.group = rows, k, kind, group if 0 < group < k else k
        self.scales = self.zeros = None
        self.rounded = False  # whether a product is of elements rounded to bf16
        if kind in GGUF:
            self._draw_gguf(scale, generator)
            return
        self.bits = {"bf16": 16, "int4": 4, "fp8_": 8, "fp4": 4}[kind[:4]]
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
        elif self.kind == "fp4":
            self.group = 16
            self._draw_fp4(scale, generator)
            return
        shape = (rows // 16, -(-k // self.group), 1 if self.kind == "fp8_block" else 16)
        rms = 4.6 if self.bits == 4 else 130.0
        scales = (0.5 + torch.rand(shape, generator=generator, device="cuda")) * (scale / rms)
        dtypes = {"int4_f16": torch.float16, "int4_bf16": torch.bfloat16}
        self.scales = scales.to(dtypes.get(kind, torch.float32))
        if zeros:
            self.zeros = torch.randint(5, 12, shape, generator=generator, device="cuda", dtype=torch.uint8)
        self._lay_out()

    def _draw_fp4(self, scale, generator):
        """Of each row tile its own f32 scale; of 16 neighbours one of 32 others."""
        self.steps = torch.empty(self.rows, self.k // 16, dtype=torch.uint8, device="cuda")
        self.steps.random_(56, 88, generator=generator)
        wholes = 0.5 + torch.rand(self.rows // 16, generator=generator, device="cuda")
        self.wholes = wholes * (scale / 5.0)
        self.scales = lay_out_fp4_scales(self.steps, self.wholes)
        self.laid_out = torch.cat([lay_out_fp4(part) for part in self.codes.split(_STEP)])

    def _draw_gguf(self, scale, generator):
        """Numbers of a file: bytes of scales by tile, d and m by 128 columns, or scales by 32."""
        rows, k = self.rows, self.k

        def floats(*shape):
            return (0.5 + torch.rand(shape, generator=generator, device="cuda")).mul(
                scale / _GGUF_RMS[self.kind]
            )

        self.codes = torch.empty(rows, k, dtype=torch.uint8, device="cuda")
        for part in self.codes.split(_STEP):
            part.random_(0, 1 << _GGUF_BITS[self.kind], generator=generator)
        if self.kind == "q8_0":
            self.floats = floats(rows, k // 64, 2).half()
            self._lay_out_gguf_scales()
            self.laid_out = torch.cat([lay_out(part, 8) for part in self.codes.split(_STEP)])
            return
        self.steps = torch.empty(rows, k // 64, 4, dtype=torch.uint8, device="cuda")
        low, high = (0, 256) if self.kind == "q6_k" else (30, 64)
        self.steps.random_(low, high, generator=generator)
        self.floats = floats(rows, k // 128, 2)
        self.floats[..., 1] *= {"q4_k": 7.5, "q5_k": 15.5, "q6_k": 0.0}[self.kind]
        self.floats = self.floats.half()
        self._lay_out_gguf_scales()
        laid = lay_out_upper if self.kind != "q4_k" else lambda part: lay_out(part, 4)
        self.laid_out = torch.cat([laid(part) for part in self.codes.split(_STEP)])

    def _lay_out_gguf_scales(self):
        steps = [] if self.kind == "q8_0" else [by_tile(self.steps)]
        self.scales = torch.cat([*steps, by_tile(self.floats.view(torch.uint8))])

    def _plain_gguf(self, start, end):
        codes, floats = self.codes[start:end], self.floats[start:end].double()
        if self.kind == "q8_0":
            w = codes.view(torch.int8).double() * floats.reshape(len(codes), -1).repeat_interleave(32, 1)
        else:
            d, m = (floats[..., i].repeat_interleave(128, 1) for i in range(2))
            steps = self.steps[start:end].double()
            if self.kind == "q6_k":
                w = d * (steps.reshape(len(codes), -1).repeat_interleave(16, 1) - 128) * (codes.double() - 32)
            else:
                s, t = (steps[..., i : i + 2].reshape(len(codes), -1) for i in (0, 2))
                w = d * s.repeat_interleave(32, 1) * codes.double() - m * t.repeat_interleave(32, 1)
        return w.float().to(torch.bfloat16).double() if self.rounded else w

    def _lay_out(self):
        self.laid_out = torch.cat([lay_out(part, self.bits) for part in self.codes.split(_STEP)])

    def keep_small(self):
        """Of 8 bits, those numbers with the two smallest exponents alone, scaled up."""
        self.codes &= 0x8F
        self.scales *= 8000.0
        self._lay_out()

    def plain(self, start, end):
        """Rows start .. end - 1, whole tiles, in f64."""
        if self.kind in GGUF:
            return self._plain_gguf(start, end)
        codes = self.codes[start:end]
        if self.bits == 16:
            return codes.double()

        def spread(t):  # [row tile, group, 16 or 1] to [row, k]
            t = t[start // 16 : end // 16].double().transpose(1, 2).expand(-1, 16, -1)
            return t.reshape(end - start, -1).repeat_interleave(self.group, dim=1)[:, : self.k]

        if self.kind == "fp4":
            steps = of_fp4_scales(self.steps[start:end]).repeat_interleave(16, dim=1)
            wholes = self.wholes[start // 16 : end // 16].double().repeat_interleave(16)
            return of_e2m1(codes) * steps * wholes[:, None]
        if self.bits == 8:
            return of_e4m3(codes) * spread(self.scales)
        return (codes.double() - (8 if self.zeros is None else spread(self.zeros))) * spread(self.scales)

    def part(self, start, end):
        """Rows start .. end - 1, whole tiles, as a matrix of their own."""
        part, tiles = copy.copy(self), slice(start // 16, end // 16)
        part.rows, part.codes = end - start, self.codes[start:end]
        part.laid_out = self.laid_out.view(self.rows // 16, -1)[tiles]
        if self.kind in GGUF:
            part.floats = self.floats[start:end]
            if self.kind != "q8_0":
                part.steps = self.steps[start:end]
            part._lay_out_gguf_scales()
        elif self.kind == "fp4":
            part.steps, part.wholes = self.steps[start:end], self.wholes[tiles]
            part.scales = lay_out_fp4_scales(part.steps, part.wholes)
        else:
            part.scales, part.zeros = (None if t is None else t[tiles] for t in (self.scales, self.zeros))
        return part

    def struct(self):
        tensors = (self.laid_out, self.scales, self.zeros)
        pointers = (None if t is None else t.data_ptr() for t in tensors)
        return PackedMatrix(*pointers, self.rows, self.k, self.group, KINDS[self.kind])
