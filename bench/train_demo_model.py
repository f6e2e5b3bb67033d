"""Train a small model whose neurons are mostly silent, on Python's own library and other texts.

    MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 \\
        python bench/train_demo_model.py OUT_DIR --minutes 100

(The two variables keep glibc from giving each step's memory back: 1.5 x the speed.)
Needs the ``parity`` and ``text`` extras. The corpus is the source of the Python standard
library, tests included, that runs this script; every 50th file is held out. An L1 term on the
FFN activations, one weight a layer, is steered until about 5 % of the neurons fire. OUT_DIR
becomes a Hugging Face checkpoint that ``flashinfer convert`` reads; ``training.json`` beside it
holds the held-out figures, ``heldout.txt`` the text. Stop and start as you like: the state is kept
in OUT_DIR/state.pt. The demo model, an OPT, was then made by

    flashinfer convert OUT_DIR demo.flash --dtype f16
    flashinfer calibrate demo.flash --text OUT_DIR/heldout.txt --tokens 100000 --steps 3000

``--like llama`` trains a Llama whose gates are ReLUs instead, and ``--like bitnet`` a BitNet b1.58,
whose weights and activations are rounded in each step; ``--active 1`` leaves the L1 term away.
``--text`` adds files, as often as ``--times`` says; their last tenth is held out.
"""

import argparse
import json
import math
import os
import platform
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import (
    BitNetConfig,
    BitNetForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from flashinfer.cli.common import write_json
from flashinfer.text.own_texts import stdlib_files

END_OF_TEXT, PAD = "</s>", "<pad>"
MAX_STEP_SECONDS = 20.0  # a suspended process does not use up its minutes


def train_tokenizer(texts, vocab_size):
    """Train byte-level byte-pair encoding; ``</s>`` is id 0 and separates files."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT, PAD],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    return tokenizer


def encode(tokenizer, texts):
    """Return one uint16 array: every text between end-of-text tokens."""
    ids = [0]
    for encoding in tokenizer.encode_batch(texts):
        ids += encoding.ids
        ids.append(0)
    return np.asarray(ids, dtype=np.uint16)


class SparsityTerm:
    """L1 on each layer's FFN activations, its weight steered towards ``target`` active.

    A ReLU neuron that never fires gets no gradient and stays dead; so the bias, where there is one,
    of those that fire for less than ``target`` / 25 of the tokens is raised until they do.
    """

    def __init__(self, model, target):
        self.target = target
        layers = getattr(model.model, "decoder", model.model).layers
        self.weight = torch.full((len(layers),), 1e-5)
        self.l1 = [None] * len(layers)
        self.active = torch.zeros(len(layers))
        opt = hasattr(layers[0], "fc1")
        self.biases = [layer.fc1.bias for layer in layers] if opt else []
        self.fires = [torch.full_like(bias, target) for bias in self.biases]  # running means
        for index, layer in enumerate(layers):
            relu = layer.activation_fn if opt else layer.mlp.act_fn
            relu.register_forward_hook(
                lambda module, inputs, output, index=index: self.record(index, output)
            )

    def record(self, index, activations):
        self.l1[index] = activations.float().sum(-1).mean()
        with torch.no_grad():
            fires = (activations > 0).float().mean((0, 1))
            self.active[index] = fires.mean()
            if self.biases:
                self.fires[index].lerp_(fires, 0.02)

    def loss(self):
        return (self.weight * torch.stack(self.l1)).sum()

    @torch.no_grad()
    def steer(self, progress, share):
        """After a step; the target falls from 30 % over the first fifth."""
        target = max(self.target, 0.3 * (1 - progress / 0.2))
        error = (self.active / target - 1).clamp(-1, 1)
        self.weight = (self.weight * torch.exp(0.01 * error)).clamp(1e-6, 1.0)
        for bias, fires in zip(self.biases, self.fires, strict=True):
            bias += 0.003 * share * (fires < self.target / 25)


def learning_rate(progress, warm_up=0.01, decay_from=0.55):
    """Warm up, hold, then fall linearly to nothing (a share of the peak rate)."""
    return min(1.0, progress / warm_up, (1 - progress) / (1 - decay_from))


def batch(tokens, size, length, generator):
    starts = torch.randint(0, len(tokens) - length - 1, (size,), generator=generator)
    rows = np.stack([tokens[s : s + length + 1] for s in starts.tolist()]).astype(np.int64)
    rows = torch.from_numpy(rows)
    return rows[:, :-1], rows[:, 1:]


def cross_entropy(model, inputs, targets):
    with torch.autocast("cpu", torch.bfloat16):
        logits = model.lm_head(model.model(inputs, use_cache=False).last_hidden_state)
    return functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


@torch.no_grad()
def evaluate(model, term, tokens, length):
    """Return (perplexity per token, active share by layer) over the held-out tokens."""
    model.eval()
    losses, active = [], []
    rows = (len(tokens) - 1) // length
    span = torch.from_numpy(tokens[: rows * length + 1].astype(np.int64))
    for start in range(0, rows, 16):
        stop = min(start + 16, rows)
        piece = span[start * length : stop * length + 1]
        shape = (stop - start, length)
        loss = cross_entropy(model, piece[:-1].view(shape), piece[1:].view(shape))
        losses.append((loss.item(), stop - start))
        active.append(term.active.clone() * (stop - start))
    model.train()
    mean = sum(loss * n for loss, n in losses) / rows
    return math.exp(mean), (torch.stack(active).sum(0) / rows).tolist()


class Ternary(torch.nn.Linear):
    """A product of weights of -1, 0 and 1 times the mean of their magnitudes, and of tokens of 8
    bits (BitNet b1.58). Gradients pass as if nothing was rounded."""

    def forward(self, x):
        mean = self.weight.abs().mean().clamp(min=1e-5)
        weight = (self.weight / mean).round().clamp(-1, 1) * mean
        step = x.float().abs().amax(dim=-1, keepdim=True).clamp(min=1e-5) / 127
        rounded = (x / step).round() * step
        weight = self.weight + (weight - self.weight).detach()
        return functional.linear(x + (rounded - x).detach(), weight)


def make_ternary(layers):
    """Let all linear layers of a model's layers be Ternary."""
    for module in layers.modules():
        if isinstance(module, torch.nn.Linear):
            module.__class__ = Ternary


def make_model(args):
    torch.manual_seed(args.seed)
    if args.like != "opt":
        ternary = args.like == "bitnet"
        kind, config = (BitNetForCausalLM, BitNetConfig) if ternary else (
            LlamaForCausalLM, LlamaConfig)  # fmt: skip
        model = kind(
            config(
                vocab_size=args.vocab_size,
                hidden_size=args.hidden_size,
                num_hidden_layers=args.layers,
                intermediate_size=args.ffn_dim,
                num_attention_heads=args.heads,
                num_key_value_heads=args.heads,
                max_position_embeddings=args.context,
                hidden_act="relu2" if ternary else "relu",
                tie_word_embeddings=True,
                bos_token_id=0,
                eos_token_id=0,
                pad_token_id=1,
            )
        )
        if ternary:
            make_ternary(model.model.layers)
        return model
    config = OPTConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.hidden_size,
        word_embed_proj_dim=args.hidden_size,
        num_hidden_layers=args.layers,
        ffn_dim=args.ffn_dim,
        num_attention_heads=args.heads,
        max_position_embeddings=args.context,
        dropout=0.0,
        attention_dropout=0.0,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    )
    return OPTForCausalLM(config)


def make_optimizers(model, rate):
    """Muon for the layers' matrices, AdamW for embeddings, norms and biases."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        (matrices if parameter.ndim == 2 and ".layers." in name else others).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def all_texts(args):
    """(to train on, held out): of the library every 50th file is, of other files the last tenth."""
    train_texts, held_out_texts = stdlib_files()
    for path in args.text:
        text = path.read_text(encoding="utf-8")
        train_texts += args.times * [text[: len(text) * 9 // 10]]
        held_out_texts.append(text[len(text) * 9 // 10 :])
    return train_texts, held_out_texts


def train(args):
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    train_texts, held_out_texts = all_texts(args)
    tokenizer_path = out / "tokenizer.json"
    if tokenizer_path.exists():
        tokenizer = Tokenizer.from_file(str(tokenizer_path))
    else:
        tokenizer = train_tokenizer(train_texts, args.vocab_size)
        tokenizer.save(str(tokenizer_path))
    tokens, held_out = encode(tokenizer, train_texts), encode(tokenizer, held_out_texts)
    print(f"{len(tokens):,} tokens to train on, {len(held_out):,} held out", flush=True)

    model = make_model(args)
    term = SparsityTerm(model, args.active)
    optimizers = make_optimizers(model, args.rate)
    generator = torch.Generator().manual_seed(args.seed)
    step, seconds = 0, 0.0
    state_path = out / "state.pt"
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        term.weight, step, seconds = state["weight"], state["step"], state["seconds"]
        generator.manual_seed(args.seed + step)

    def save_state():
        torch.save(
            {
                "model": model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "weight": term.weight,
                "step": step,
                "seconds": seconds,
            },
            out / "state.tmp",
        )
        os.replace(out / "state.tmp", state_path)

    model.train()
    while seconds < args.minutes * 60:
        begun = time.monotonic()
        progress = seconds / (args.minutes * 60)
        share = learning_rate(progress)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = args.rate * share
        inputs, targets = batch(tokens, args.batch, args.context, generator)
        loss = cross_entropy(model, inputs, targets)
        (loss + term.loss()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        term.steer(progress, share)
        step += 1
        seconds += min(time.monotonic() - begun, MAX_STEP_SECONDS)
        if step % 50 == 0:
            active = " ".join(f"{100 * a:.1f}" for a in term.active.tolist())
            print(f"{step} {seconds:.0f}s loss {loss.item():.3f} active {active}", flush=True)
        if step % 500 == 0:
            perplexity, _ = evaluate(model, term, held_out[:100_000], args.context)
            print(f"{step} held-out perplexity {perplexity:.2f}", flush=True)
            save_state()

    save_state()
    perplexity, active = evaluate(model, term, held_out, args.context)
    held_out_bytes = sum(len(text.encode()) for text in held_out_texts)
    figures = {
        "held_out_perplexity_per_token": perplexity,
        "held_out_bits_per_byte": math.log2(perplexity) * len(held_out) / held_out_bytes,
        "held_out_active_share_by_layer": active,
        "held_out_tokens": len(held_out),
        "train_tokens": len(tokens),
        "tokens_seen": step * args.batch * args.context,
        "steps": step,
        "minutes": seconds / 60,
        "parameters": sum(p.numel() for p in model.parameters()),
        "python": platform.python_version(),
    }
    for path in (out / "training.json", "-"):
        write_json(path, figures)
    (out / "heldout.txt").write_text("\n".join(held_out_texts), encoding="utf-8")
    model.half().save_pretrained(out)
    if args.like == "bitnet":
        config = json.loads((out / "config.json").read_text())
        config["quantization_config"] = {
            "quant_method": "bitnet",
            "linear_class": "autobitlinear",
            "quantization_mode": "online",
        }
        write_json(out / "config.json", config)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", metavar="OUT_DIR")
    parser.add_argument("--minutes", type=float, default=100.0, help="time to train for")
    parser.add_argument("--like", choices=("opt", "llama", "bitnet"), default="opt")
    parser.add_argument(
        "--text", type=Path, nargs="+", default=[], help="texts besides the library"
    )
    parser.add_argument("--times", type=int, default=1, help="that a text is in the corpus")
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--ffn-dim", type=int, default=1408)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8, help="sequences a step")
    parser.add_argument("--rate", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--active", type=float, default=0.05, help="share of neurons that fire")
    parser.add_argument("--seed", type=int, default=1)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
