"""Quantised matrices and what the packages that define their formats make of them: `quant/`.

    pip install torch transformers compressed-tensors nvidia-modelopt omegaconf pulp scipy
    pip install --no-deps auto-gptq autoawq
    python tests/golden/make_quant.py

A case is a safetensors file of modules with their parts, `expected.<module>` in float32 for each, and a line in
`quant/cases.json` with its `quantization_config`. Who decoded it:

| case | decoder |
|---|---|
| fp8_block, fp8_small | Transformers 5.23, `Fp8Dequantize`, on matrices padded to whole blocks |
| float_quantized | compressed-tensors 0.20, `dequantize` |
| pack_quantized, pack_asymmetric | compressed-tensors 0.20, packed by its compressor, `dequantize` |
| gptq, gptq_v2 | AutoGPTQ 0.7.1, `qlinear_cuda_old` without its kernels, times the identity matrix |
| awq | AutoAWQ 0.2.9, `dequantize_gemm` |
| modelopt | ModelOpt 0.47, `NVFP4QTensor.dequantize`; torch's float8 for FP8 |
| nvfp4_packed | compressed-tensors 0.20, `dequantize` |

Each decoder is given scales that were widened to float32 first, so that only the last product rounds. Where codes are
random words, every code is in every place. The numpy decoders of `tests/quantised.py` must agree, bit for bit.
"""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import quantised
import tiny

OUT = Path(__file__).resolve().parent / "quant"
GENERATOR = torch.Generator().manual_seed(20261122)


def source(package, path):
    """One file of a package, without the imports of the whole package, which want older companions."""
    folder = importlib.util.find_spec(package).submodule_search_locations[0]
    spec = importlib.util.spec_from_file_location(path.replace("/", "_"), f"{folder}/{path}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def normal(*shape, scale=1.0):
    return scale * torch.randn(*shape, generator=GENERATOR)


def integers(low, high, *shape, dtype=torch.int32):
    return torch.randint(low, high, shape, generator=GENERATOR).to(dtype)


def random_words(*shape):
    return integers(-(2**31), 2**31, *shape)


def e4m3(*shape):
    """Random codes, but for NaN, the bits of which nobody promises."""
    codes = integers(0, 256, *shape, dtype=torch.uint8)
    codes[codes & 127 == 127] = 0x42
    return codes.view(torch.float8_e4m3fn)


def scales(*shape, dtype):
    return (0.01 * normal(*shape).exp()).to(dtype)


# ------------------------------------------------------------------------------------------------------- FP8


def transformers_fp8(codes, scale_inv, block):
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    rows, cols = codes.shape[-2:]
    size = [n * s for n, s in zip(scale_inv.shape[-2:], block, strict=True)]
    padded = torch.zeros(*codes.shape[:-2], *size, dtype=torch.uint8)
    padded[..., :rows, :cols] = codes.view(torch.uint8)
    padded = padded.view(torch.float8_e4m3fn)
    wide = Fp8Dequantize(None)._dequantize_one(padded, scale_inv, torch.float32)
    return wide[..., :rows, :cols].contiguous()


def fp8_case(name, block, shapes):
    tensors, modules = {}, {}
    for i, (shape, dtype) in enumerate(shapes):
        grid = [-(-n // b) for n, b in zip(shape[-2:], block, strict=True)]
        codes, scale = e4m3(*shape), scales(*shape[:-2], *grid, dtype=dtype)
        stacked = len(shape) == 3
        module = "experts.gate_up_proj" if stacked else f"m{i}"
        tensors[module if stacked else f"{module}.weight"] = codes
        tensors[f"{module}_scale_inv" if stacked else f"{module}.weight_scale_inv"] = scale
        tensors[f"expected.{module}"] = transformers_fp8(codes, scale, block)
        modules[module] = {"shape": list(shape), "block": block}
    config = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "weight_block_size": block,
    }
    return name, config, modules, tensors


def compressed(codes, scale, args, zero_point=None, global_scale=None):
    """By compressed-tensors' own function."""
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    return dequantize(
        codes,
        scale.to(torch.float32),
        zero_point=zero_point,
        args=QuantizationArgs(**args),
        dtype=torch.float32,
        global_scale=global_scale,
    ).contiguous()


def compressed_config(form, groups):
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{i}": {"targets": ["Linear"], "weights": weights, "input_activations": None}
            for i, weights in enumerate(groups)
        },
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }


def float_quantized():
    args = {"num_bits": 8, "type": "float", "symmetric": True}
    by = {
        "tensor": (args | {"strategy": "tensor"}, [1], torch.float32),
        "row": (args | {"strategy": "channel"}, [33, 1], torch.bfloat16),
        "block": (args | {"strategy": "block", "block_structure": [16, 24]}, [3, 3], torch.float16),
    }
    tensors, modules = {}, {}
    for module, (weights, shape, dtype) in by.items():
        codes, scale = e4m3(33, 50), scales(*shape, dtype=dtype)
        tensors |= {f"{module}.weight": codes, f"{module}.weight_scale": scale}
        # It takes blocks as float32, and does not read float8 in all of its forms.
        tensors[f"expected.{module}"] = compressed(codes.to(torch.float32), scale, weights)
        modules[module] = {"shape": [33, 50], "block": [16, 24]}
    config = compressed_config("float-quantized", [weights for weights, _, _ in by.values()])
    return "float_quantized", config, modules, tensors


# ------------------------------------------------------------------------------------------------------ int4


def pack_quantized(name, symmetric):
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    tensors, modules, groups = {}, {}, []
    sizes = [(32, [24, 96]), (64, [16, 128]), (128, [9, 256]), (None, [21, 44])]
    for (group, shape), dtype in zip(
        sizes, [torch.bfloat16, torch.float16, torch.float32, torch.bfloat16], strict=True
    ):
        args = {"num_bits": 4, "type": "int", "symmetric": symmetric, "group_size": group or -1}
        args |= {"strategy": "group" if group else "channel"}
        groups.append(args)
        num_groups = shape[1] // (group or shape[1])
        scale = scales(shape[0], num_groups, dtype=dtype)
        zero_point = None if symmetric else integers(-8, 8, shape[0], num_groups, dtype=torch.int8)
        weights = QuantizationArgs(**args)
        state = {"weight": normal(*shape, scale=0.06), "weight_scale": scale.to(torch.float32)}
        if not symmetric:
            state["weight_zero_point"] = zero_point
        scheme = QuantizationScheme(targets=["Linear"], weights=weights)
        parts = PackedQuantizationCompressor.compress(state, scheme)
        module = f"group_{group}"
        tensors |= {f"{module}.{part}": value for part, value in parts.items()}
        tensors[f"{module}.weight_scale"] = scale
        wide = dict(parts, weight_scale=scale.to(torch.float32))
        tensors[f"expected.{module}"] = PackedQuantizationCompressor.decompress(wide, scheme)[
            "weight"
        ].contiguous()
        modules[module] = {"shape": shape, "group": group}
    return name, compressed_config("pack-quantized", groups), modules, tensors


def gptq(name, minus_one):
    """With zero points of all kinds in one module and the official symmetric ones, stored as 7, in the other."""
    linear = source("auto_gptq", "nn_modules/qlinear/qlinear_cuda_old").QuantLinear
    tensors, modules = {}, {}
    for module, rows, cols, group, dtype in [
        ("any", 64, 96, 32, torch.float16),
        ("symmetric", 32, 64, 32, torch.bfloat16),
    ]:
        words, zeros = random_words(cols // 8, rows), random_words(cols // group, rows // 8)
        if module == "symmetric":
            zeros.fill_(0x77777777)
        scale = scales(cols // group, rows, dtype=dtype)
        layer = linear(4, group, cols, rows, bias=False, weight_dtype=torch.float32)
        layer.qweight, layer.qzeros, layer.scales = words, zeros, scale.to(torch.float32)
        # Each output is one product: the rest of its sum is zero.
        tensors[f"expected.{module}"] = layer(torch.eye(cols)).T.contiguous()
        stored = zeros if minus_one else plus_one(zeros)
        tensors |= {f"{module}.qweight": words, f"{module}.qzeros": stored, f"{module}.scales": scale}
        tensors[f"{module}.g_idx"] = torch.arange(cols, dtype=torch.int32) // group
        modules[module] = {"shape": [rows, cols], "group": group, "minus_one": minus_one}
    config = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 32,
        "sym": False,
        "desc_act": False,
        "checkpoint_format": "gptq" if minus_one else "gptq_v2",
        "dynamic": {"lm_head": {}, "-:.*attn.*": {}, "-:.*mtp.*": {}},
    }
    return name, config, modules, tensors


def plus_one(zeros):
    """Each four bits plus one, as the second version stores them."""
    nibbles = (zeros.numpy().view(np.uint32)[..., None] >> (4 * np.arange(8, dtype=np.uint32)) & 15) + 1 & 15
    words = np.bitwise_or.reduce(nibbles << (4 * np.arange(8, dtype=np.uint32)), -1)
    return torch.from_numpy(words.astype(np.uint32).view(np.int32))


def awq():
    dequantize = source("awq", "utils/packing_utils").dequantize_gemm
    tensors, modules = {}, {}
    for module, rows, cols, dtype in [("half", 64, 96, torch.float16), ("bf16", 24, 64, torch.bfloat16)]:
        words, zeros = random_words(cols, rows // 8), random_words(cols // 32, rows // 8)
        scale = scales(cols // 32, rows, dtype=dtype)
        wide = dequantize(words, zeros, scale.to(torch.float32), 4, 32)
        tensors |= {f"{module}.qweight": words, f"{module}.qzeros": zeros, f"{module}.scales": scale}
        tensors[f"expected.{module}"] = wide.T.contiguous()
        modules[module] = {"shape": [rows, cols], "group": 32}
    config = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
    return "awq", config | {"modules_to_not_convert": ["mtp"]}, modules, tensors


# ----------------------------------------------------------------------------------------------------- NVFP4


def positive_e4m3(*shape):
    return integers(1, 127, *shape, dtype=torch.uint8).view(torch.float8_e4m3fn)


def modelopt():
    from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor

    tensors, modules = {}, {}
    for module, rows, cols, whole in [("a", 40, 96, 1 / 300), ("b", 7, 16, 2.3456e-4)]:
        codes, scale = integers(0, 256, rows, cols // 2, dtype=torch.uint8), positive_e4m3(rows, cols // 16)
        whole = torch.tensor(whole)
        packed = NVFP4QTensor(torch.Size([rows, cols]), torch.float32, codes)
        wide = packed.dequantize(torch.float32, scale=scale, double_scale=whole, block_sizes={-1: 16})
        tensors |= {
            f"{module}.weight": codes,
            f"{module}.weight_scale": scale,
            f"{module}.weight_scale_2": whole,
        }
        tensors |= {f"{module}.input_scale": torch.tensor(0.5), f"expected.{module}": wide.contiguous()}
        modules[module] = {"shape": [rows, cols], "nvfp4": True}
    # Experts in NVFP4 with FP8 beside them, as one release has it.
    codes, scale = e4m3(20, 30), torch.tensor(0.037)
    tensors |= {"c.weight": codes, "c.weight_scale": scale, "expected.c": codes.to(torch.float32) * scale}
    modules["c"] = {"shape": [20, 30], "block": [128, 128]}
    layers = {name: {"quant_algo": "NVFP4", "group_size": 16} for name in "ab"} | {"c": {"quant_algo": "FP8"}}
    config = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    return "modelopt", config | {"kv_cache_scheme": {"num_bits": 8, "type": "float"}}, modules, tensors


def nvfp4_packed():
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8

    args = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": 16}
    tensors, modules = {}, {}
    # Of a scale like the first, any other order of the arithmetic gives other bits.
    for module, rows, cols, whole in [("a", 40, 96, 3333.3), ("b", 7, 16, 2100.0)]:
        codes, scale = integers(0, 256, rows, cols // 2, dtype=torch.uint8), positive_e4m3(rows, cols // 16)
        whole = torch.tensor([whole])
        wide = unpack_fp4_from_uint8(codes, rows, cols, torch.float32)
        tensors |= {f"{module}.weight_packed": codes, f"{module}.weight_scale": scale}
        tensors |= {
            f"{module}.weight_global_scale": whole,
            f"{module}.input_global_scale": torch.tensor([3.0]),
        }
        tensors[f"expected.{module}"] = compressed(wide, scale, args, global_scale=whole)
        modules[module] = {"shape": [rows, cols], "nvfp4": True}
    return "nvfp4_packed", compressed_config("nvfp4-pack-quantized", [args]), modules, tensors


def main():
    OUT.mkdir(exist_ok=True)
    half, single = torch.bfloat16, torch.float32
    cases = {}
    for name, config, modules, tensors in [
        fp8_case("fp8_block", [128, 128], [((130, 136), half), ((128, 20), single)]),
        fp8_case("fp8_small", [16, 8], [((40, 20), half), ((3, 20, 12), single), ((16, 8), half)]),
        float_quantized(),
        pack_quantized("pack_quantized", True),
        pack_quantized("pack_asymmetric", False),
        gptq("gptq", True),
        gptq("gptq_v2", False),
        awq(),
        modelopt(),
        nvfp4_packed(),
    ]:
        path = OUT / f"{name}.safetensors"
        assert all(value.dtype == single for key, value in tensors.items() if key.startswith("expected."))
        save_file({key: value.contiguous() for key, value in tensors.items()}, path)
        cases[name] = {"quantization_config": config, "modules": modules}
        check(path, cases[name])
        assert load_file(path).keys() == tensors.keys()
    (OUT / "cases.json").write_text(json.dumps(cases, indent=1) + "\n")


def check(path, case):
    """The numpy decoders agree."""
    saved = tiny.read_safetensors(path)
    for module, facts in case["modules"].items():
        want = quantised.numbers(saved[f"expected.{module}"])
        got = quantised.decode(quantised.parts_of(saved, module), case["quantization_config"], facts)
        assert quantised.same_bits(got, want), (path.name, module)


if __name__ == "__main__":
    main()
