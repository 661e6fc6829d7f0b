"""qwen35rs against Transformers on the CPU: decode speed, time to first token, peak memory.

    python benches/engine_vs_transformers.py                      # both engines, two threads
    python benches/engine_vs_transformers.py --engines transformers --profile

Makes a random bf16 checkpoint in a temporary directory (deleted afterwards), loads it in one process
per engine with the same number of threads, and alternates the engines: while one is timed the other
waits in a pipe read. Every repeat has a fresh random prompt, so no prefix cache can answer it. Reported
are medians over the repeats and the ratio of the medians. Needs torch, transformers and safetensors.

Transformers runs at its best plain settings: bf16, sdpa attention, KV and state cache, a bare forward
loop without `generate`, only the last position through the head, and whichever `experts_implementation`
proves fastest here for prefill and for decode, chosen apart (`--experts` pins one). It is not compiled.
"""

import argparse
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from origin import origin

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benches" / "results" / "cpu" / "engine_vs_transformers.json"

# The mixers of Qwen3.5-0.8B (hidden 1024: 8 query and 2 KV heads of 256, 16 key heads of 128) with the
# value heads per key head (2), the expert and shared widths (512) and the untied head of 35B-A3B, two
# periods of its 3:1 layer pattern, and 32 experts of which 4 run. The vocabulary is the real one.
TEXT_CONFIG = {
    "model_type": "qwen3_5_moe_text",
    "architectures": ["Qwen3_5MoeForCausalLM"],
    "dtype": "bfloat16",
    "vocab_size": 248320,
    "hidden_size": 1024,
    "num_hidden_layers": 8,
    "full_attention_interval": 4,
    "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000000.0,
        "partial_rotary_factor": 0.25,
        "mrope_section": [11, 11, 10],
        "mrope_interleaved": True,
    },
}


def weight_shapes(c: dict) -> dict[str, tuple[int, ...]]:
    """Every tensor of the text model, by its checkpoint name."""
    hidden, head_dim = c["hidden_size"], c["head_dim"]
    q_width, kv_width = c["num_attention_heads"] * head_dim, c["num_key_value_heads"] * head_dim
    v_heads = c["linear_num_value_heads"]
    v_width = v_heads * c["linear_value_head_dim"]
    channels = 2 * c["linear_num_key_heads"] * c["linear_key_head_dim"] + v_width
    experts, width, shared = (
        c["num_experts"],
        c["moe_intermediate_size"],
        c["shared_expert_intermediate_size"],
    )
    shapes = {"model.embed_tokens.weight": (c["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    shapes["lm_head.weight"] = (c["vocab_size"], hidden)
    for layer, kind in enumerate(c["layer_types"]):
        block = {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}
        if kind == "full_attention":
            block |= {
                "self_attn.q_proj.weight": (2 * q_width, hidden),
                "self_attn.k_proj.weight": (kv_width, hidden),
                "self_attn.v_proj.weight": (kv_width, hidden),
                "self_attn.o_proj.weight": (hidden, q_width),
                "self_attn.q_norm.weight": (head_dim,),
                "self_attn.k_norm.weight": (head_dim,),
            }
        else:
            block |= {
                "linear_attn.in_proj_qkv.weight": (channels, hidden),
                "linear_attn.in_proj_z.weight": (v_width, hidden),
                "linear_attn.in_proj_b.weight": (v_heads, hidden),
                "linear_attn.in_proj_a.weight": (v_heads, hidden),
                "linear_attn.conv1d.weight": (channels, 1, c["linear_conv_kernel_dim"]),
                "linear_attn.A_log": (v_heads,),
                "linear_attn.dt_bias": (v_heads,),
                "linear_attn.norm.weight": (c["linear_value_head_dim"],),
                "linear_attn.out_proj.weight": (hidden, v_width),
            }
        block |= {
            "mlp.gate.weight": (experts, hidden),
            "mlp.experts.gate_up_proj": (experts, 2 * width, hidden),
            "mlp.experts.down_proj": (experts, hidden, width),
            "mlp.shared_expert.gate_proj.weight": (shared, hidden),
            "mlp.shared_expert.up_proj.weight": (shared, hidden),
            "mlp.shared_expert.down_proj.weight": (hidden, shared),
            "mlp.shared_expert_gate.weight": (1, hidden),
        }
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in block.items()}
    return shapes


def make_checkpoint(directory: Path, seed: int) -> int:
    """Random weights of a trained model's scale: unit gain per matrix, spread routers and decays."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in weight_shapes(TEXT_CONFIG).items():
        if name.endswith("A_log"):
            tensor = torch.empty(shape).uniform_(0.01, 16, generator=generator).log()
        elif name.endswith("linear_attn.norm.weight"):
            tensor = 1 + 0.1 * torch.empty(shape).normal_(generator=generator)
        elif len(shape) == 1:
            tensor = 0.1 * torch.empty(shape).normal_(generator=generator)
        else:
            tensor = torch.empty(shape, dtype=torch.bfloat16).normal_(generator=generator)
            tensor *= 0.3 if "conv1d" in name else shape[-1] ** -0.5
        tensors[name] = tensor.to(torch.bfloat16)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(TEXT_CONFIG, indent=2))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": 248046}))
    return sum(t.nbytes for t in tensors.values())


def floor_bytes(c: dict) -> int:
    """Weight bytes that one decoded token must read: all but the embedding and the experts not chosen."""
    total = 0
    for name, shape in weight_shapes(c).items():
        size = 2
        for extent in shape:
            size *= extent
        if "mlp.experts" in name:
            size = size * c["num_experts_per_tok"] // c["num_experts"]
        total += 0 if "embed_tokens" in name else size
    return total


class TransformersEngine:
    def __init__(self, directory: str, threads: int):
        import torch
        from transformers import AutoModelForCausalLM, DynamicCache

        torch.set_num_threads(threads)
        self.torch = torch
        self.model = AutoModelForCausalLM.from_pretrained(
            directory, dtype="bfloat16", attn_implementation="sdpa"
        )
        self.model.eval()
        self.new_cache = lambda: DynamicCache(config=self.model.config)

    def select(self, experts: str):
        self.model.set_experts_implementation(experts)

    def forward(self, tokens: list[int], cache) -> int:
        # By place: Transformers 5.24 renamed `past_key_values`, the fourth, to `cache`.
        out = self.model(self.torch.tensor([tokens]), None, None, cache, use_cache=True, logits_to_keep=1)
        return int(out.logits[0, -1].argmax())

    def generate(self, prompt: list[int], num_tokens: int) -> list[int]:
        with self.torch.inference_mode():
            cache = self.new_cache()
            tokens = [self.forward(prompt, cache)]
            while len(tokens) < num_tokens:
                tokens.append(self.forward(tokens[-1:], cache))
        return tokens

    def profile(self, prompt: list[int], num_tokens: int) -> str:
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CPU]) as prof:
            self.generate(prompt, num_tokens)
        return prof.key_averages().table(sort_by="self_cpu_time_total", row_limit=25)

    def split(self, prompt: list[int], num_tokens: int) -> dict[str, float]:
        """Milliseconds per decoded token in each part of the net, by timing hooks on its modules."""
        spent, started, handles = {}, {}, []
        parts = {"linear_attn": "delta_net", "self_attn": "attention", "mlp": "moe", "lm_head": "head"}
        counting = [False]

        def before(module, *_):
            started[module] = time.perf_counter()

        def after(part):
            def hook(module, *_):
                if counting[0]:
                    spent[part] = spent.get(part, 0.0) + time.perf_counter() - started[module]

            return hook

        for name, module in self.model.named_modules():
            part = parts.get(name.rsplit(".", 1)[-1])
            if part:
                handles += [
                    module.register_forward_pre_hook(before),
                    module.register_forward_hook(after(part)),
                ]
        with self.torch.inference_mode():
            cache = self.new_cache()
            token = self.forward(prompt, cache)
            counting[0] = True
            begin = time.perf_counter()
            for _ in range(num_tokens):
                token = self.forward([token], cache)
            total = time.perf_counter() - begin
        for handle in handles:
            handle.remove()
        split = {part: 1e3 * seconds / num_tokens for part, seconds in sorted(spent.items())}
        split["rest"] = 1e3 * total / num_tokens - sum(split.values())
        return split


class Qwen35rsEngine:
    def __init__(self, directory: str, threads: int):
        from qwen35rs import LLM, SamplingParams

        self.llm = LLM(directory)
        self.params = SamplingParams

    def select(self, experts: str):
        pass

    def generate(self, prompt: list[int], num_tokens: int) -> list[int]:
        params = self.params(temperature=0, max_tokens=num_tokens, ignore_eos=True)
        return list(self.llm.generate([{"prompt_token_ids": prompt}], params)[0].outputs[0].token_ids)


ENGINES = {"transformers": TransformersEngine, "qwen35rs": Qwen35rsEngine}


def memory() -> dict[str, float]:
    """Peak resident set of this process, and what of the present one is anonymous or file pages, in GiB."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        name: round(int(fields[key].split()[0]) / 2**20, 3)
        for name, key in [("peak_rss", "VmHWM"), ("anonymous", "RssAnon"), ("file_pages", "RssFile")]
    }


def serve(name: str, directory: str, threads: int):
    """A worker: loads one engine, then answers one JSON line per command."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints goes to stderr
    begin = time.perf_counter()
    engine = ENGINES[name](directory, threads)
    print(json.dumps({"load_s": time.perf_counter() - begin, **memory()}), file=out)
    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "generate":
            begin = time.perf_counter()
            tokens = engine.generate(command["prompt"], command["num_tokens"])
            reply = {"seconds": time.perf_counter() - begin, "num_tokens": len(tokens)}
        elif command["do"] == "select":
            engine.select(command["experts"])
            reply = {}
        elif command["do"] == "memory":
            reply = memory()
        elif command["do"] == "split":
            reply = engine.split(command["prompt"], command["num_tokens"])
        elif command["do"] == "profile":
            reply = {"table": engine.profile(command["prompt"], command["num_tokens"])}
        print(json.dumps(reply), file=out)


class Worker:
    def __init__(self, name: str, directory: str, threads: int):
        limits = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve", name, directory, "--threads", str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | dict.fromkeys(limits, str(threads)) | {"HF_HUB_OFFLINE": "1"},
        )
        self.loaded = self.reply()

    def reply(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a worker ended with status {self.process.wait()}")
        return json.loads(line)

    def ask(self, **command) -> dict:
        print(json.dumps(command), file=self.process.stdin, flush=True)
        return self.reply()

    def seconds(self, prompt: list[int], num_tokens: int) -> float:
        reply = self.ask(do="generate", prompt=prompt, num_tokens=num_tokens)
        assert reply["num_tokens"] == num_tokens, reply
        return reply["seconds"]

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def read_bandwidth(threads: int) -> float:
    """GB/s of the best of ten passes that sum one GiB, in a process of its own."""
    code = (
        "import sys, time, torch; torch.set_num_threads(int(sys.argv[1]));"
        "x = torch.ones(2**28);best = 9e9\n"
        "for _ in range(10):\n"
        "    t = time.perf_counter(); x.sum(); best = min(best, time.perf_counter() - t)\n"
        "print(x.nbytes / best / 1e9)"
    )
    return float(subprocess.check_output([sys.executable, "-c", code, str(threads)]))


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed: found on the path"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--engines", nargs="+", choices=list(ENGINES), default=list(ENGINES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--decode-tokens", type=int, default=48)
    parser.add_argument("--decode-prompt", type=int, default=128)
    parser.add_argument("--prefill-prompt", type=int, default=512)
    parser.add_argument("--experts", choices=["eager", "batched_mm", "grouped_mm"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--profile", action="store_true", help="where Transformers spends a decoded token")
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--serve", nargs=2, metavar=("ENGINE", "DIRECTORY"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(*args.serve, args.threads)

    import random

    rng = random.Random(args.seed)

    def prompt(length: int) -> list[int]:
        return [rng.randrange(248000) for _ in range(length)]

    workload = {
        "decode": (args.decode_prompt, 1 + args.decode_tokens),
        "prefill": (args.prefill_prompt, 1),
    }
    load = os.getloadavg()[0]
    if load > 0.5:
        print(
            f"warning: the load average is {load:.1f}; figures taken beside other work mean little",
            file=sys.stderr,
        )
    bandwidth = {str(n): round(read_bandwidth(n), 2) for n in sorted({1, args.threads})}
    with tempfile.TemporaryDirectory(prefix="qwen35rs-bench-") as directory:
        print("writing the checkpoint ...", file=sys.stderr)
        num_bytes = make_checkpoint(Path(directory), args.seed)
        experts = {"decode": args.experts, "prefill": args.experts}
        tried = {}
        if "transformers" in args.engines and not args.experts:
            trial = Worker("transformers", directory, args.threads)  # its memory does not count
            for choice in ("eager", "grouped_mm", "batched_mm"):
                trial.ask(do="select", experts=choice)
                for phase, (length, _) in workload.items():
                    runs = [trial.seconds(prompt(length), 9 if phase == "decode" else 1) for _ in range(3)]
                    tried.setdefault(phase, {})[choice] = round(1e3 * min(runs), 1)
            trial.close()
            experts = {phase: min(times, key=times.get) for phase, times in tried.items()}
            print(f"experts implementations, ms: {tried}", file=sys.stderr)

        workers = {name: Worker(name, directory, args.threads) for name in args.engines}
        samples = {name: {"prefill_ms": [], "decode_ms_per_token": []} for name in workers}
        for repeat in range(args.repeats + 1):  # the first one warms up
            for phase, (length, count) in workload.items():
                text = prompt(length)
                for name, worker in workers.items():
                    worker.ask(do="select", experts=experts[phase]) if experts[phase] else None
                    seconds = worker.seconds(text, count)
                    if phase == "decode":
                        first = worker.seconds(prompt(length), 1)  # other tokens, so that nothing is reused
                        key, value = "decode_ms_per_token", 1e3 * (seconds - first) / (count - 1)
                    else:
                        key, value = "prefill_ms", 1e3 * seconds
                    if repeat:
                        samples[name][key].append(value)
                    print(f"{name:>12} {key} {value:.2f}", file=sys.stderr)
        engines = {}
        for name, worker in workers.items():
            decode = statistics.median(samples[name]["decode_ms_per_token"])
            prefill = statistics.median(samples[name]["prefill_ms"])
            engines[name] = {
                "version": version(name),
                "decode_ms_per_token": round(decode, 2),
                "decode_tokens_per_s": round(1e3 / decode, 2),
                "decode_weights_gb_per_s": round(floor_bytes(TEXT_CONFIG) / decode / 1e6, 2),
                "time_to_first_token_ms": round(prefill, 1),
                "prefill_tokens_per_s": round(1e3 * args.prefill_prompt / prefill, 1),
                "load_s": round(worker.loaded["load_s"], 2),
                "memory_gib": worker.ask(do="memory"),
                "samples": {key: [round(v, 2) for v in values] for key, values in samples[name].items()},
            }
        if "transformers" in workers:
            engines["transformers"] |= {
                "torch": importlib.metadata.version("torch"),
                "experts_implementation": experts,
                "experts_implementations_tried_ms": tried,
            }
            if args.profile:
                text = prompt(args.decode_prompt)
                workers["transformers"].ask(do="select", experts=experts["decode"])
                split = workers["transformers"].ask(do="split", prompt=text, num_tokens=args.decode_tokens)
                engines["transformers"]["decode_split_ms"] = {k: round(v, 2) for k, v in split.items()}
                print(
                    workers["transformers"].ask(do="profile", prompt=text, num_tokens=33)["table"],
                    file=sys.stderr,
                )
        for worker in workers.values():
            worker.close()

    result = origin() | {
        "threads": args.threads,
        "load_average_before": round(load, 2),
        "read_bandwidth_gb_per_s_by_threads": bandwidth,
        "checkpoint": {"bytes": num_bytes, "bytes_read_per_decoded_token": floor_bytes(TEXT_CONFIG)},
        "workload": {
            "decode": f"{args.decode_tokens} greedy tokens after a prompt of {args.decode_prompt}, batch 1",
            "prefill": f"one token after a prompt of {args.prefill_prompt}, batch 1",
            "repeats": args.repeats,
        },
        "engines": engines,
    }
    if len(engines) == 2:
        ours, peer = engines["qwen35rs"], engines["transformers"]
        result["ratio"] = {
            "decode": round(peer["decode_ms_per_token"] / ours["decode_ms_per_token"], 2),
            "prefill": round(peer["time_to_first_token_ms"] / ours["time_to_first_token_ms"], 2),
            "peak_rss": round(ours["memory_gib"]["peak_rss"] / peer["memory_gib"]["peak_rss"], 2),
        }
    text = json.dumps(result, indent=2)
    print(text)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
