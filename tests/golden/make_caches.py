"""Records rows of a cache in fp8 as torch.float8_e4m3fn rounds them: tests/golden/caches.json. Run with torch."""

import json
from pathlib import Path

import torch


def row(x):
    scale = (x.abs().max() / 448).float()
    # torch has no saturation: what rounding left above the largest number would become NaN.
    codes = (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    return {
        "x": (x.view(torch.int32).long() & 0xFFFFFFFF).tolist(),
        "scale": int(scale.view(torch.int32)),
        "codes": codes.tolist(),
    }


generator = torch.Generator().manual_seed(8)
rows = []
for spread in (0.0, 1.0, 4.0, 8.0):
    for size in (1e-30, 1e-3, 1.0, 3e4):
        x = torch.randn(40, generator=generator)
        rows.append(row(x * torch.exp(spread * torch.randn(40, generator=generator)) * size))
Path(__file__).with_name("caches.json").write_text(json.dumps(rows) + "\n")
