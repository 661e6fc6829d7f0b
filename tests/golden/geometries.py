"""The geometries of the committed goldens: every head ratio of the family, odd sizes, every layout.

Data only; `make_goldens.py` makes the checkpoints and `make_ops.py` borrows the vocabulary.
"""

from dataclasses import dataclass, field

NUM_GREEDY = 24
LADDER = [1, 2, 63, 64, 65, 200, 300]  # either side of the delta rule's 64-token chunks, and several of them

MOE, DENSE = "qwen3_5_moe", "qwen3_5"
FULL, LINEAR = "full_attention", "linear_attention"


@dataclass
class Case:
    """One checkpoint. `text` holds the fields of the text configuration that differ from `base_config`."""

    name: str
    about: str
    kind: str
    text: dict
    prompts: list = field(default_factory=lambda: [1, 5, 70])
    dtype: str = "float32"
    nested: bool = False  # the multimodal layout: text_config, and names under model.language_model
    extras: bool = False  # a vision tower and an MTP module, which the text model must leave alone
    per_expert: bool = False  # experts as 2-D matrices instead of stacks
    shards: int = 1
    f32_decay: bool = True  # A_log and the gated norm are float32 in a 16-bit checkpoint, as released
    num_greedy: int = NUM_GREEDY


def rope(section, theta=1e4, factor=0.25, **more):
    return {
        "rope_type": "default",
        "rope_theta": theta,
        "partial_rotary_factor": factor,
        "mrope_section": section,
        "mrope_interleaved": True,
    } | more


def dims(hidden, layers, vocab, heads, head_dim, delta, ffn, conv=4, **more):
    """heads: query, KV. delta: key and value heads, k_dim, v_dim. ffn: width, or E, top_k, width, shared width."""
    fields = {"hidden_size": hidden, "num_hidden_layers": layers, "vocab_size": vocab, "head_dim": head_dim}
    fields |= dict(zip(("num_attention_heads", "num_key_value_heads"), heads))
    names = ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim")
    fields |= {f"linear_{name}": value for name, value in zip(names, delta)} | {
        "linear_conv_kernel_dim": conv
    }
    if isinstance(ffn, int):
        fields["intermediate_size"] = ffn
    else:
        names = (
            "num_experts",
            "num_experts_per_tok",
            "moe_intermediate_size",
            "shared_expert_intermediate_size",
        )
        fields |= dict(zip(names, ffn))
    return fields | more


CASES = [
    Case(
        "dense_r1",
        "dense, V/K 1, query/KV 2, tied, only full_attention_interval given",
        DENSE,
        dims(
            40,
            4,
            211,
            (4, 2),
            24,
            (2, 2, 16, 16),
            56,
            full_attention_interval=4,
            tie_word_embeddings=True,
            rope_parameters=rope([1, 1, 1]),
        ),
        LADDER,
    ),
    Case(
        "dense_r3",
        "dense, V/K 3, query/KV 6, untied, nested names, interval 2, conv kernel 3, k_dim below v_dim",
        DENSE,
        dims(
            72,
            2,
            201,
            (6, 1),
            16,
            (2, 6, 8, 12),
            50,
            conv=3,
            full_attention_interval=2,
            rope_parameters=rope([2, 1, 1], theta=1e5, factor=0.5),
        ),
        [5, 65, 130],
        nested=True,
    ),
    Case(
        "dense_attention_first",
        "dense, attention first and two in a row, V/K 2, query/KV 1, hidden 104, whole heads rotate",
        DENSE,
        dims(
            104,
            5,
            101,
            (2, 2),
            8,
            (1, 2, 8, 12),
            20,
            tie_word_embeddings=True,
            layer_types=[FULL, LINEAR, LINEAR, FULL, FULL],
            rope_parameters=rope([2, 1, 1], factor=1.0),
        ),
        [1, 3, 100],
    ),
    Case(
        "dense_attention_only",
        "dense, no delta-rule layer, query/KV 16",
        DENSE,
        dims(
            56,
            2,
            163,
            (16, 1),
            8,
            (1, 1, 8, 8),
            64,
            layer_types=[FULL, FULL],
            rope_parameters=rope([1, 0, 0]),
        ),
        [1, 17, 150],
    ),
    Case(
        "dense_delta_only",
        "dense, no attention layer, k_dim above v_dim, conv kernel 2",
        DENSE,
        dims(
            48,
            3,
            157,
            (2, 1),
            16,
            (3, 3, 24, 10),
            40,
            conv=2,
            layer_types=[LINEAR] * 3,
            rope_parameters=rope([1, 1, 0]),
        ),
        [1, 64, 129, 200],
    ),
    Case(
        "dense_yarn",
        "dense, YaRN by factor alone, prompts inside and past the original context of 64",
        DENSE,
        dims(
            48,
            4,
            151,
            (2, 1),
            40,
            (2, 4, 12, 8),
            40,
            full_attention_interval=2,
            max_position_embeddings=512,
            rope_parameters=rope(
                [4, 3, 3], theta=1e4, factor=0.5, rope_type="yarn", original_max_position_embeddings=64
            )
            | {"factor": 4.0},
        ),
        [10, 250],
    ),
    Case(
        "moe_ranks",
        "sparse, bf16, every size that is shared by ranks divisible by 2, 3, 4 and 8, an MTP module",
        MOE,
        dims(
            32,
            3,
            192,
            (24, 1),
            8,
            (24, 24, 8, 8),
            (24, 4, 48, 24),
            layer_types=[LINEAR, FULL, LINEAR],
            mtp_num_hidden_layers=1,
            rope_parameters=rope([1, 0, 0]),
        ),
        [1, 5, 70],
        dtype="bfloat16",
        nested=True,
        extras=True,
    ),
    Case(
        "moe_r4",
        "16 experts top-4, V/K 4, query/KV 4, k_dim above v_dim, untied, nested names, odd vocabulary",
        MOE,
        dims(
            40,
            4,
            131,
            (8, 2),
            12,
            (2, 8, 12, 8),
            (16, 4, 6, 10),
            full_attention_interval=4,
            rope_parameters=rope([1, 1, 0], theta=1e7, factor=1 / 3),
        ),
        LADDER,
        nested=True,
    ),
    Case(
        "moe_top1",
        "top-1 of 5 experts, odd widths, tied, conv kernel 5, hidden 50",
        MOE,
        dims(
            50,
            2,
            201,
            (2, 1),
            16,
            (2, 4, 10, 14),
            (5, 1, 24, 13),
            conv=5,
            tie_word_embeddings=True,
            layer_types=[LINEAR, FULL],
            rope_parameters=rope([1, 1, 0]),
        ),
        [1, 40, 90],
    ),
    Case(
        "moe_all",
        "every expert chosen, experts one by one, two shards with an index, delta-rule layers last",
        MOE,
        dims(
            48,
            4,
            167,
            (6, 3),
            10,
            (1, 3, 8, 12),
            (6, 6, 10, 12),
            layer_types=[LINEAR, FULL, FULL, LINEAR],
            rope_parameters=rope([2, 1, 0], theta=5e5, factor=0.6),
        ),
        [2, 66],
        per_expert=True,
        shards=2,
    ),
    Case(
        "moe_vision_mtp",
        "a multimodal checkpoint: vision tower and MTP tensors present, three shards, text only is run",
        MOE,
        dims(
            40,
            4,
            173,
            (4, 1),
            24,
            (2, 4, 8, 8),
            (8, 2, 8, 12),
            full_attention_interval=4,
            mtp_num_hidden_layers=1,
            rope_parameters=rope([1, 1, 1]),
        ),
        [7, 65],
        nested=True,
        extras=True,
        shards=3,
    ),
    Case(
        "moe_yarn",
        "16 experts top-3, YaRN with its own betas, attention factor and no truncation, past its context",
        MOE,
        dims(
            40,
            3,
            179,
            (2, 2),
            40,
            (2, 2, 12, 16),
            (16, 3, 6, 8),
            layer_types=[FULL, LINEAR, FULL],
            max_position_embeddings=300,
            rope_parameters=rope(
                [6, 5, 5],
                theta=100.0,
                factor=0.8,
                rope_type="yarn",
                original_max_position_embeddings=100,
                beta_fast=8.0,
                beta_slow=2.0,
                attention_factor=1.2,
                truncate=False,
            )
            | {"factor": 2.5},
        ),
        [4, 180],
    ),
    Case(
        "moe_bf16",
        "bf16 with float32 A_log and gated norm, 32 experts top-8, interval 3, nested names",
        MOE,
        dims(
            48,
            3,
            161,
            (8, 2),
            16,
            (2, 8, 16, 16),
            (32, 8, 8, 16),
            full_attention_interval=3,
            rope_parameters=rope([1, 1, 0], theta=1e7),
        ),
        [1, 33, 140],
        dtype="bfloat16",
        nested=True,
    ),
    Case(
        "dense_bf16",
        "bf16 throughout, A_log too, tied, nested names",
        DENSE,
        dims(
            72,
            4,
            151,
            (4, 2),
            24,
            (2, 4, 16, 24),
            48,
            full_attention_interval=4,
            tie_word_embeddings=True,
            rope_parameters=rope([1, 1, 1], theta=1e7),
        ),
        [1, 33, 140],
        dtype="bfloat16",
        nested=True,
        f32_decay=False,
    ),
    Case(
        "family_heads_bf16",
        "bf16, the family's heads: 256 wide, 64 rotating, theta 1e7, sections 11 11 10, delta 128 by 128",
        MOE,
        dims(
            40,
            2,
            151,
            (2, 1),
            256,
            (1, 2, 128, 128),
            (8, 2, 32, 32),
            layer_types=[LINEAR, FULL],
            max_position_embeddings=262144,
            rope_parameters=rope([11, 11, 10], theta=1e7),
        ),
        [3, 130],
        dtype="bfloat16",
    ),
    Case(
        "moe_f16",
        "float16 weights, top-2 of 12 experts, experts one by one",
        MOE,
        dims(
            40,
            3,
            191,
            (4, 2),
            16,
            (2, 4, 12, 12),
            (12, 2, 12, 20),
            layer_types=[LINEAR, LINEAR, FULL],
            tie_word_embeddings=True,
            rope_parameters=rope([1, 1, 0]),
        ),
        [2, 80],
        dtype="float16",
        per_expert=True,
        f32_decay=False,
    ),
]
