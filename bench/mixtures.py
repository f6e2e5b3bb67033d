"""A mixture of experts in a half, a quarter and an eighth of its size, and llama.cpp beside it.

    python -m bench.mixtures [--like olmoe-1b-7b] [--dir DIR] [--quick] [--json FILE]

As root, with cgroups: each run lives in a memory cgroup of a share of the model's file, the disk
as it is or held to an eMMC's speed. A prompt of 256 tokens, then the tokens that the model writes:
with prefetch and a warm start as the plan decides, without the one, without the other. Beside
the misses stand those of an optimal cache (Belady, 1966) of the same rows on the same trace; the
floor is as in bench.end_to_end.

llama.cpp (llama-cpp-python, with its memory-mapped file, and without the copy of 4-bit weights that
it makes where memory allows) runs in the same cgroups, on a GGUF of the very same weights, and so
with the same routing; a prompt of 32 tokens is enough for it. Without it, or without gguf, those
rows are skipped with a message.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np
from tqdm import tqdm

from bench.cache_policies import Recorder
from bench.cgroup import Disk, NoCgroups, run_limited
from bench.limits import machine, random_read_bandwidth
from bench.models import synthetic_model
from flashinfer import Model
from flashinfer.cli.common import add_json, write_json
from flashinfer.formats.bundle.reader import Bundle
from flashinfer.paper.prefetch import NoPrefetch
from flashinfer.plan.profile import load, save
from flashinfer.probe.measuring import dram_bandwidth
from flashinfer.probe.probing import probe
from flashinfer.study.optimal import optimal_misses
from flashinfer.synth.shapes import MIXTURES

DISKS = (Disk("as it is"), Disk("eMMC, 250 MB/s", 250_000_000))
SHARES = (0.5, 0.25, 0.125)
PROMPT, TOKENS = 256, 32
THEIR_PROMPT = 32
FIRST = 300  # token t + 1 follows token t
VARIANTS = {
    "ours": {},
    "ours, no prefetch": {"prefetch": False},
    "ours, cold": {"warm": False},
}


# ---------------------------------------------------------------- in a process of its own


def run_ours(path, memory, device, tokens, n_prompt=PROMPT, prefetch=True, warm=None):
    """Figures of a prompt and of the tokens after it, printed as JSON."""
    profile = load(device)
    with Model.open(path, memory=memory, context=512, device=profile, warm=warm) as model:
        if not prefetch:
            for layer in model.layers:
                layer.feed_forward.prefetch = NoPrefetch()
        prompt = list(range(FIRST, FIRST + n_prompt))
        list(model.generate(prompt, tokens + 1, temperature=0, stop_at_eos=False))
        figures = model.stats.as_dict()
        figures["slots"] = model.plan.slots
        caches = [layer.feed_forward.store.cache for layer in model.layers]
        figures["guesses"] = int(sum(cache.guesses for cache in caches))
        figures["right_guesses"] = int(sum(cache.right_guesses for cache in caches))
    print(json.dumps(figures))


LLAMA = """
import json, sys, time
import llama_cpp.llama_cpp as binding
from llama_cpp import Llama
defaults = binding.llama_model_default_params
def without_copies():
    parameters = defaults()
    parameters.use_extra_bufts = False
    return parameters
binding.llama_model_default_params = without_copies
path, first, n_prompt, n_tokens, threads = sys.argv[1], *map(int, sys.argv[2:])
model = Llama(path, n_ctx=512, n_threads=threads, n_threads_batch=threads, verbose=False)
begun = time.perf_counter()
model.eval(list(range(first, first + n_prompt)))
prompt = n_prompt / (time.perf_counter() - begun)
begun = time.perf_counter()
for token in range(first + n_prompt, first + n_prompt + n_tokens):
    model.eval([token])
speed = n_tokens / (time.perf_counter() - begun)
print(json.dumps({"tokens_per_second": speed, "prompt_tokens_per_second": prompt}))
"""


# ---------------------------------------------------------------- what is measured


def limited(command, memory, disk, path, seconds):
    """The JSON that a command prints in such cgroups, or a word where there is none."""
    with suppress(OSError):  # cold, as after a start
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("3")
    try:
        run = run_limited(
            command, memory, disk, path, capture_output=True, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return f"longer than {seconds} s"
    if run.returncode:
        return "killed" if run.returncode == -9 else run.stderr.strip().splitlines()[-1]
    return json.loads(run.stdout)


def trace_of(path, tokens):
    """[layer][token] Selection of the tokens after the prompt and as many before them."""
    with Model.open(path, context=512, warm=False) as model:
        recorders = []
        for layer in model.layers:
            layer.feed_forward.prefetch = NoPrefetch()
            recorders.append(Recorder(layer.feed_forward.predictor))
            layer.feed_forward.predictor = recorders[-1]
        for token in range(FIRST + PROMPT - tokens, FIRST + PROMPT + tokens):
            model.forward([token])
        return [recorder.chosen for recorder in recorders]


def optimal_share(traces, rows, units, tokens):
    """Misses of an optimal cache of these rows a layer, of all uses, along the first ``tokens`` of
    the trace's second half; the first half warms it."""
    warm = len(traces[0]) // 2
    traces = [trace[: warm + tokens] for trace in traces]
    used = sum(np.mean([len(s.units) for s in trace[warm:]]) for trace in traces)
    missed = sum(optimal_misses(t, units, n, warm) for t, n in zip(traces, rows, strict=True))
    return missed / used


def floor(figures, bundle, disk, reads, dram):
    """Seconds that a token's bytes take at least, from flash or from DRAM, whichever is more."""
    nbytes = figures["flash_bytes_per_token"]
    seconds = disk.least_seconds(nbytes / reads, nbytes, figures["reads_per_token"])
    touched = sum(
        bundle.tensors[spec.name].nbytes
        for spec in bundle.specs
        if spec.role in ("small", "attention", "head")
    )
    touched += sum(
        layer.ffn.routed_units * bundle.unit_bytes(number)
        for number, layer in enumerate(bundle.config.layers)
    )
    return max(seconds, touched / dram)


def measure(model, gguf, disks, tokens, engines):
    traces, rows, dram, known = trace_of(model, tokens), [], dram_bandwidth(), None
    engines = [engine for engine in engines if gguf or engine != "llama.cpp"]
    cases = [(s, d, e) for s in SHARES for d in disks for e in engines]
    with Bundle(model) as bundle, tempfile.TemporaryDirectory() as folder:
        for share, disk, engine in tqdm(cases, desc="runs", leave=False):
            if known != share:  # a shared machine changes: its figures just before they are used
                known, profile = share, probe(model)
                reads = random_read_bandwidth(model, 1 << 20)
            limit = int(bundle.file.size * share) // 4096 * 4096
            slow = disk is not DISKS[0] or engine == "llama.cpp"
            n = max(4, tokens // 4) if slow else tokens
            device = Path(folder) / "device.json"
            save(profile.held(disk.bytes_per_second), device)
            if engine == "llama.cpp":
                arguments = [LLAMA, gguf, FIRST, THEIR_PROMPT, n, profile.threads]
            else:
                call = f"run_ours({str(model)!r}, {limit}, {str(device)!r}, {n}, **{{}})"
                options = repr(VARIANTS[engine])
                arguments = ["from bench.mixtures import run_ours; " + call.format(options)]
            command = [sys.executable, "-c", *map(str, arguments)]
            patience = 600 if slow else 240
            figures = limited(command, limit, disk, model, patience)
            row = {"share": share, "disk": disk.name, "engine": engine, "limit_bytes": limit,
                   "reads": reads}  # fmt: skip
            if isinstance(figures, str):
                rows.append({**row, "says": figures})
                continue
            row.update({k: v for k, v in figures.items() if k != "token_ids"})
            if "slots" in figures:
                row["floor_seconds"] = floor(figures, bundle, disk, reads, dram)
                row["ratio"] = 1 / figures["tokens_per_second"] / row["floor_seconds"]
                row["optimal"] = optimal_share(
                    traces, figures["slots"], bundle.config.layers[0].ffn.units, n
                )
            rows.append(row)
    return {"machine": machine(), "dram": dram, "rows": rows}


# ---------------------------------------------------------------- the same weights as GGUF


def write_gguf(bundle, path):
    """The synthetic bundle of an OLMoE as a GGUF file in q4_0, for llama.cpp."""
    import gguf

    config, kind = bundle.config, gguf.GGMLQuantizationType.Q4_0
    attention, ffn = config.layers[0].attention, config.layers[0].ffn
    writer = gguf.GGUFWriter(path, "olmoe", use_temp_file=True)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(ffn.d_ffn)
    writer.add_head_count(attention.num_attention_heads)
    writer.add_head_count_kv(attention.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.norm.epsilon)
    writer.add_rope_freq_base(attention.rotary.base)
    writer.add_expert_count(ffn.experts)
    writer.add_expert_used_count(ffn.router.experts_per_token)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    names = {"embed_tokens": "token_embd", "lm_head": "output", "final_norm": "output_norm"}
    parts = {"attention_norm": "attn_norm", "router": "ffn_gate_inp", "q_proj": "attn_q",
             "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output",
             "q_norm": "attn_q_norm", "k_norm": "attn_k_norm", "ffn_norm": "ffn_norm"}  # fmt: skip
    for spec in tqdm(bundle.specs, desc="gguf", leave=False):
        pieces = spec.name.split(".")
        values = bundle.read(spec.name)
        if spec.name.endswith("ffn.bundles"):
            shape = (ffn.experts, ffn.d_ffn, ffn.parts, config.hidden_size)
            gate, up, down = np.moveaxis(values.reshape(shape), 2, 0)
            for part, matrix in (("gate", gate), ("up", up), ("down", down.swapaxes(1, 2))):
                raw = np.stack([gguf.quants.quantize(np.ascontiguousarray(m), kind)
                                for m in matrix])  # fmt: skip
                writer.add_tensor(f"blk.{pieces[1]}.ffn_{part}_exps.weight", raw, raw_dtype=kind)
            continue
        name = f"blk.{pieces[1]}.{parts[pieces[2]]}" if len(pieces) > 2 else names[pieces[0]]
        if values.ndim == 1 or "router" in pieces:
            writer.add_tensor(f"{name}.weight", values)
        else:
            writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def print_table(figures):
    gave = ", ".join(f"{speed / 1e6:.0f}" for speed in {r["share"]: r["reads"] for r in
                     figures["rows"]}.values())  # fmt: skip
    print(f"{figures['machine']}; DRAM {figures['dram'] / 1e9:.0f} GB/s, random reads of 1 MiB "
          f"{gave} MB/s\n")  # fmt: skip
    print("| memory | disk | engine | tokens/s | expected | read/token | missed | optimal | "
          "peak RSS | time/floor | prompt of 256, tokens/s |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for row in figures["rows"]:
        head = f"| {100 * row['share']:g} % | {row['disk']} | {row['engine']} |"
        if "says" in row:
            print(f"{head} {row['says']} | | | | | | | |")
            continue
        prompt_speed = f"{row['prompt_tokens_per_second']:.1f} |"
        if "slots" not in row:
            print(f"{head} {row['tokens_per_second']:.2f} | | | | | | | {prompt_speed}")
            continue
        print(
            f"{head} {row['tokens_per_second']:.2f} | {row['expected_tokens_per_second']:.2f} | "
            f"{row['flash_bytes_per_token'] / 1e6:.0f} MB | "
            f"{100 * (1 - row['cache_hit_rate']):.1f} % | {100 * row['optimal']:.1f} % | "
            f"{row['peak_rss_bytes'] / 1e6:.0f} of {row['limit_bytes'] / 1e6:.0f} MB | "
            f"{row['ratio']:.2f} | {prompt_speed}"
        )
    ours = [r for r in figures["rows"] if r["engine"] == "ours" and "ratio" in r]
    if ours:
        print(f"\nmedian time/floor: {statistics.median(r['ratio'] for r in ours):.2f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--like", choices=MIXTURES, default="olmoe-1b-7b", metavar="NAME",
                        help="a published shape (olmoe-1b-7b); see flashinfer synth")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="only with the disk as it is")
    parser.add_argument("--dir", default=".", type=Path, help="room for two models of 4 GB")
    parser.add_argument(
        "--tokens", type=int, default=TOKENS, help="to write; a quarter where that is slow"
    )
    every = [*VARIANTS, "llama.cpp"]
    parser.add_argument("--engine", choices=every, action="append", help="only this one")
    parser.add_argument("--keep", action="store_true", help="do not remove the models")
    add_json(parser)
    args = parser.parse_args()
    model = args.dir / f"bench-{args.like}-q4_0.flash"
    theirs = model.with_suffix(".gguf")
    try:
        with ExitStack() as stack:
            stack.enter_context(synthetic_model(model, args.like, "q4_0", args.keep))
            if not args.keep:
                stack.callback(theirs.unlink, missing_ok=True)
            engines = args.engine or every
            try:
                if "llama.cpp" not in engines:
                    raise ImportError("it was not asked for")
                import gguf
                import llama_cpp

                del gguf, llama_cpp
                if args.like != "olmoe-1b-7b":
                    raise ImportError("its GGUF is written for olmoe-1b-7b only")
                if not theirs.exists():
                    with Bundle(model) as bundle:
                        write_gguf(bundle, theirs)
            except ImportError as error:
                print(f"llama.cpp is skipped: {error}", file=sys.stderr)
                theirs = None
            disks = DISKS[:1] if args.quick else DISKS
            figures = measure(model, theirs, disks, args.tokens, engines)
    except NoCgroups as error:
        raise SystemExit(f"skipped: {error}") from None
    print_table(figures)
    write_json(args.json, figures)


if __name__ == "__main__":
    main()
