"""qwen35rs against Transformers on one GPU, at the full size of a model, with random weights.

    python benches/gpu_vs_transformers.py --model 35b-a3b --json FILE

One process after the other, since a card holds one of the two. Decode steps of one sequence after a prompt, and a long
prompt to its first token. Transformers runs at its best plain settings: bf16, sdpa attention, cache, a bare forward loop
without `generate`, only the last position through the head, flash-linear-attention where it is installed, and whichever
`experts_implementation` proves fastest for each of the two. It is not compiled. Needs torch and transformers, and
qwen35rs with CUDA.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

from origin import origin
from synthetic_checkpoint import text_config

EXPERTS = ("grouped_mm", "batched_mm")


def ours(args):
    from qwen35rs import LLM, speed

    start = time.perf_counter()
    llm = LLM(
        args.model,
        load_format="dummy",
        device="cuda",
        max_num_seqs=1,
        max_num_batched_tokens=args.prompt,
        max_model_len=args.prompt + 1024,
    )
    loaded = time.perf_counter() - start
    step, prompt = speed.decode(llm, 1, args.context, args.steps), speed.prefill(llm, args.prompt)
    return {"load_seconds": loaded, "decode_seconds": step.seconds, "prefill_seconds": prompt.seconds}


def theirs(args):
    import torch
    import transformers
    from transformers import DynamicCache, Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig
    from transformers.initialization import no_init_weights

    config = Qwen3_5MoeTextConfig(**text_config(args.model), dtype="bfloat16")
    start = time.perf_counter()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"), no_init_weights():
        model = Qwen3_5MoeForCausalLM(config).eval()
    with torch.no_grad():
        for name, x in model.named_parameters():
            if x.dim() > 1:
                x.normal_(std=x.shape[-1] ** -0.5)
            else:
                x.fill_(1.0 if name.endswith("linear_attn.norm.weight") else 0.0)
        for name, x in model.named_buffers():
            assert torch.isfinite(x).all(), name
    torch.cuda.synchronize()
    found = {"load_seconds": time.perf_counter() - start, "decode_seconds": {}, "prefill_seconds": {}}
    ids = torch.randint(0, config.vocab_size, (1, args.prompt), device="cuda")

    @torch.inference_mode()
    def forward(tokens, cache):
        # By place: Transformers 5.24 renamed `past_key_values`, the fourth, to `cache`.
        out = model(tokens, None, None, cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1].argmax(-1, keepdim=True)

    def decode():
        cache = DynamicCache(config=config)
        token, times = forward(ids[:, : args.context], cache), []
        for _ in range(8 + args.steps):
            torch.cuda.synchronize()
            start = time.perf_counter()
            token = forward(token, cache)
            token.item()
            times.append(time.perf_counter() - start)
        return statistics.median(times[8:])

    def prefill():
        times = []
        for _ in range(4):
            torch.cuda.synchronize()
            start = time.perf_counter()
            forward(ids, DynamicCache(config=config)).item()
            times.append(time.perf_counter() - start)
        return statistics.median(times[1:])

    for implementation in EXPERTS:
        model.set_experts_implementation(implementation)
        for key, work in (("decode_seconds", decode), ("prefill_seconds", prefill)):
            if (implementation, key) == ("batched_mm", "prefill_seconds"):
                continue  # it copies the weights of every token's experts
            try:
                found[key][implementation] = work()
            except torch.OutOfMemoryError as error:
                print(f"{implementation}, {key}: {error}", file=sys.stderr)
    found["versions"] = {"torch": torch.__version__, "transformers": transformers.__version__}
    try:
        import fla

        found["versions"]["flash-linear-attention"] = fla.__version__
    except ImportError:
        pass
    for key in ("decode_seconds", "prefill_seconds"):
        found[key] = min(found[key].values())
    return found


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="35b-a3b", help="a sparse size of the family")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--prompt", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--json", help="file for what was found")
    parser.add_argument("--only", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        print("FOUND " + json.dumps({"ours": ours, "theirs": theirs}[args.only](args)))
        return
    found = origin()
    for which in ("ours", "theirs"):
        command = [sys.executable, __file__, *sys.argv[1:], "--only", which]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
        found[which] = json.loads(lines[-1].removeprefix("FOUND "))
        print(which, found[which], flush=True)
    for key, what in (
        ("decode_seconds", f"decode, 1 sequence of {args.context}"),
        ("prefill_seconds", "prompt"),
    ):
        print(f"{what}: {found['theirs'][key] / found['ours'][key]:.2f} times as fast as Transformers")
    if args.json:
        with open(args.json, "w") as file:
            json.dump(found, file, indent=1)
            file.write("\n")


if __name__ == "__main__":
    main()
