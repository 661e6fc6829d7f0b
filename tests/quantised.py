"""Quantised matrices in numpy: made, and decoded again, in every layout that is read.

Written from the formats' descriptions, apart from the crate's code. `golden/make_quant.py` compares the decoders with the
packages that write these files; `test_quantised.py` compares them with its record, and the crate with them.

A tensor is `(dtype name, shape, bytes)`, as in `tiny.py`; a matrix, the parts of its module by name.
"""

import numpy as np

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # the outputs in a word, lowest bits first
FLOATS = {"F32": np.float32, "F16": np.float16}


def e4m3_table():
    """The number of every code."""
    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, code & 7
    small = mantissa * 2.0**-9
    large = (8 + mantissa) * 2.0 ** (exponent - 10.0)
    table = np.where(exponent == 0, small, large)
    table[code & 127 == 127] = np.nan
    return np.copysign(table, np.where(code >> 7, -1.0, 1.0)).astype(np.float32)


E4M3 = e4m3_table()


def to_e4m3(x):
    """The code nearest to each number."""
    codes = np.arange(127)  # not negative, and not NaN
    nearest = np.abs(np.minimum(np.abs(x), 448)[..., None] - E4M3[codes]).argmin(-1)
    return (nearest + 128 * np.signbit(x)).astype(np.uint8)


def tensor(dtype, array):
    """An array as a tensor; of BF16 and F8_E4M3 from float32, rounded."""
    array = np.asarray(array)
    if dtype == "BF16":
        bits = np.ascontiguousarray(array, np.float32).view(np.uint32).astype(np.uint64)
        data = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    elif dtype == "F8_E4M3":
        data = array if array.dtype == np.uint8 else to_e4m3(array)
    else:
        data = array.astype({"I32": np.int32, "I64": np.int64, "U8": np.uint8, **FLOATS}[dtype])
    return dtype, list(array.shape), np.ascontiguousarray(data).tobytes()


def numbers(entry):
    """A tensor as an array: floats as float32, exactly."""
    dtype, shape, data = entry
    if dtype == "BF16":
        array = (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)
    elif dtype == "F8_E4M3":
        array = E4M3[np.frombuffer(data, np.uint8)]
    elif dtype in FLOATS:
        array = np.frombuffer(data, FLOATS[dtype]).astype(np.float32)
    else:
        array = np.frombuffer(data, {"I32": np.int32, "I64": np.int64, "U8": np.uint8}[dtype])
    return array.reshape(shape)


# ------------------------------------------------------------------------------------------------ decoding


def nibbles(words):
    """Eight codes of each int32, lowest bits first: one more dimension."""
    return words.view(np.uint32)[..., None] >> (4 * np.arange(8, dtype=np.uint32)) & 15


def spread(values, sizes, shape):
    """Each value repeated over its block."""
    for axis, size in enumerate(sizes):
        values = np.repeat(values, size, axis=values.ndim - len(sizes) + axis)
    return values[..., : shape[-2], : shape[-1]]


def decode_fp8(parts, block):
    """`weight` [.., out, in]; scales of blocks, rows or the matrix."""
    codes = numbers(parts["weight"])
    scales = numbers(parts.get("weight_scale_inv", parts.get("weight_scale")))
    rows, cols = codes.shape[-2:]
    stack = list(codes.shape[:-2])
    if scales.size == max(1, np.prod(stack)):
        sizes, grid = (rows, cols), [1, 1]
    elif scales.size == np.prod(stack) * rows and scales.shape[-1:] in ((1,), (rows,)):
        sizes, grid = (1, cols), [rows, 1]
    else:
        sizes, grid = block, [-(-rows // block[0]), -(-cols // block[1])]
    return codes * spread(scales.reshape(stack + grid), sizes, codes.shape)


def decode_int4(codes, zeros, scales, group):
    """[out, in], [out, groups] and [out, groups] to numbers: the difference is exact, the product is rounded once."""
    size = group or codes.shape[1]
    zeros, scales = (spread(x, (1, size), codes.shape) for x in (zeros, scales))
    return (codes.astype(np.float32) - zeros.astype(np.float32)) * scales


def decode_gptq(parts, group, minus_one=True):
    codes = nibbles(numbers(parts["qweight"]))  # [in / 8, out, 8]
    codes = codes.transpose(1, 0, 2).reshape(codes.shape[1], -1)
    zeros = nibbles(numbers(parts["qzeros"]))  # [groups, out / 8, 8]
    zeros = zeros.reshape(len(zeros), -1).T
    zeros = (zeros + 1) % 16 if minus_one else zeros
    return decode_int4(codes, zeros, numbers(parts["scales"]).T, group)


def decode_awq(parts, group):
    place = np.argsort(AWQ_ORDER)
    codes = nibbles(numbers(parts["qweight"]))[..., place]  # [in, out / 8, 8]
    zeros = nibbles(numbers(parts["qzeros"]))[..., place]
    codes, zeros = codes.reshape(len(codes), -1).T, zeros.reshape(len(zeros), -1).T
    return decode_int4(codes, zeros, numbers(parts["scales"]).T, group)


def decode_packed(parts, group):
    rows, cols = numbers(parts["weight_shape"])
    codes = nibbles(numbers(parts["weight_packed"])).reshape(rows, -1)[:, :cols]
    scales = numbers(parts["weight_scale"])
    zeros = np.full(scales.shape, 8)
    if "weight_zero_point" in parts:
        words = nibbles(numbers(parts["weight_zero_point"]))  # [out / 8, groups, 8]
        zeros = words.transpose(0, 2, 1).reshape(-1, words.shape[1])[:rows]
    return decode_int4(codes, zeros, scales, group)


def decode_nvfp4(parts):
    divides = "weight_packed" in parts
    codes = numbers(parts["weight_packed" if divides else "weight"])
    codes = E2M1[np.stack([codes & 15, codes >> 4], -1)].reshape(len(codes), -1)
    scales = numbers(parts["weight_scale"])
    whole = numbers(parts["weight_global_scale" if divides else "weight_scale_2"]).reshape(-1)[0]
    steps = scales / whole if divides else scales * whole
    return codes * spread(steps, (1, 16), codes.shape)


# ------------------------------------------------------------------------------------------------- making


def largest(x, sizes):
    """The largest magnitude of each block."""
    rows, cols = x.shape
    grid = [-(-rows // sizes[0]), -(-cols // sizes[1])]
    padded = np.zeros((grid[0] * sizes[0], grid[1] * sizes[1]), np.float32)
    padded[:rows, :cols] = np.abs(x)
    return padded.reshape(grid[0], sizes[0], grid[1], sizes[1]).max((1, 3)) + 1e-6


def make_fp8(x, block, dtype="BF16", name="weight_scale_inv"):
    """`block` of `(1, in)` is a row, of the whole shape the matrix."""
    rows, cols = x.shape
    scales = tensor(dtype, largest(x, block) / 448)
    wide = numbers(scales)
    if tuple(block) == (rows, cols):
        scales = (dtype, [], scales[2])
    return {"weight": tensor("F8_E4M3", x / spread(wide, block, x.shape)), name: scales}


def words(codes):
    """Eight codes of the last dimension to an int32, lowest bits first."""
    codes = np.concatenate([codes, np.zeros((*codes.shape[:-1], -codes.shape[-1] % 8), codes.dtype)], -1)
    codes = codes.reshape(*codes.shape[:-1], -1, 8).astype(np.uint32) << (4 * np.arange(8, dtype=np.uint32))
    return np.bitwise_or.reduce(codes, -1).view(np.int32)


def round_int4(x, group, dtype, symmetric=False):
    """Codes, zero points and scales, `[out, ...]`."""
    size = group or x.shape[1]
    if symmetric:
        scales = largest(x, (1, size)) / 7
        zeros = np.full(scales.shape, 8)
    else:
        pad = np.pad(x, ((0, 0), (0, -x.shape[1] % size)), mode="edge").reshape(len(x), -1, size)
        low, high = np.minimum(pad.min(-1), 0), np.maximum(pad.max(-1), 0)
        scales = (high - low) / 15 + 1e-6
        zeros = np.clip(np.round(-low / scales), 0, 15).astype(int)
    scales = tensor(dtype, scales)
    steps = spread(numbers(scales), (1, size), x.shape)
    codes = np.clip(np.round(x / steps) + spread(zeros, (1, size), x.shape), 0, 15).astype(int)
    return codes, zeros, numbers(scales)


def make_gptq(x, group, dtype="F16", minus_one=True, symmetric=False, order=True):
    codes, zeros, scales = round_int4(x, group, dtype, symmetric)
    parts = {
        "qweight": tensor("I32", words(codes).T),
        "qzeros": tensor("I32", words((zeros.T - minus_one) % 16)),
        "scales": tensor(dtype, scales.T),
    }
    if order:
        parts["g_idx"] = tensor("I32", np.arange(x.shape[1]) // (group or x.shape[1]))
    return parts


def make_awq(x, group, dtype="F16"):
    codes, zeros, scales = round_int4(x, group, dtype)

    def pack(rows):
        return words(rows.reshape(len(rows), -1, 8)[..., AWQ_ORDER].reshape(rows.shape))

    return {
        "qweight": tensor("I32", pack(codes.T)),
        "qzeros": tensor("I32", pack(zeros.T)),
        "scales": tensor(dtype, scales.T),
    }


def make_packed(x, group, dtype="BF16", symmetric=True):
    codes, zeros, scales = round_int4(x, group, dtype, symmetric)
    parts = {
        "weight_packed": tensor("I32", words(codes)),
        "weight_scale": tensor(dtype, scales),
        "weight_shape": tensor("I64", np.array(x.shape)),
    }
    if not symmetric:
        parts["weight_zero_point"] = tensor("I32", words(zeros.T).T)
    return parts


def make_nvfp4(x, divides):
    whole = np.float32(448 * 6 / np.abs(x).max())
    scales = tensor("F8_E4M3", largest(x, (1, 16)) / 6 * whole)
    steps = spread(np.maximum(numbers(scales), 2.0**-9) / whole, (1, 16), x.shape)
    codes = np.abs((x / steps)[..., None] - E2M1).argmin(-1)
    packed = tensor("U8", codes[:, ::2] | codes[:, 1::2] << 4)
    if divides:
        return {
            "weight_packed": packed,
            "weight_scale": scales,
            "weight_global_scale": tensor("F32", np.array([whole])),
        }
    return {"weight": packed, "weight_scale": scales, "weight_scale_2": tensor("F32", np.float32(1) / whole)}


# ---------------------------------------------------------------------------------------- recorded matrices


def parts_of(saved, module):
    """The parts of a module of a file, by the names of a module of its own."""
    if module in saved:  # stacked experts
        return {"weight": saved[module], "weight_scale_inv": saved[f"{module}_scale_inv"]}
    return {
        name.removeprefix(f"{module}."): entry
        for name, entry in saved.items()
        if name.startswith(f"{module}.")
    }


def decode(parts, config, facts):
    """A module of `golden/quant/cases.json`."""
    if facts.get("nvfp4"):
        return decode_nvfp4(parts)
    if "block" in facts:
        return decode_fp8(parts, facts["block"])
    if "weight_packed" in parts:
        return decode_packed(parts, facts["group"])
    if config["quant_method"] == "gptq":
        return decode_gptq(parts, facts["group"], facts["minus_one"])
    return decode_awq(parts, facts["group"])


def same_bits(a, b):
    """Equal to the bit, except that a zero may be of either sign: ModelOpt's table has only one."""
    return a.shape == b.shape and np.array_equal(
        np.where(a == 0, 0, a).view(np.int32), np.where(b == 0, 0, b).view(np.int32)
    )
