"""What a wheel may hold and weigh: python tests/wheel_size.py FILE"""

import sys
import zipfile
from pathlib import Path

MODEL_BYTES, WHEEL_BYTES = 16_000_000, 24_000_000


def main(path: str) -> None:
    with zipfile.ZipFile(path) as wheel:
        names = wheel.namelist()
        model = sum(i.compress_size for i in wheel.infolist() if i.filename.startswith("qwen35rs/model/"))
    size = Path(path).stat().st_size
    print(f"{Path(path).name}: {size:,} bytes, the model {model:,} of them, {len(names)} files")
    assert "qwen35rs/model/model.safetensors" in names and 0 < model <= MODEL_BYTES, model
    assert size <= WHEEL_BYTES, size
    extra = [n for n in names if not n.startswith("qwen35rs") or n.endswith((".svg", ".npz", "log.json"))]
    assert not extra, extra


if __name__ == "__main__":
    main(*sys.argv[1:])
