"""What a run will need on its device, from the model's config alone, before anything is downloaded or loaded.

    python extras/memory.py --model Qwen/Qwen3-1.7B          # the options are those of oel.py

A forecast: weights, gradients and optimizer to the byte, activations by what a decoder layer keeps for its backward pass.
It is within a tenth of what a pretended GPU counts (test_gpu.py).
The sampler's cache is not in it: that takes two fifths of what is free (--rows and the limits make it smaller), and twice
as much for a moment where it has to grow. A second
line says what a decode step costs.
"""

import dataclasses
import os
import sys
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import oel
from extras.pretended_gpu import PretendedGPU


def parts(cfg, half: bool) -> dict[str, float]:
    """Bytes by what they are for."""
    try:
        config = AutoConfig.from_pretrained(cfg.model)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # noqa: BLE001 (whatever is wrong with the files)
        raise oel.UsageError(f"no config in {cfg.model!r}: {' '.join(str(error).split())[:300]}") from None
    n, size = sum(p.numel() for p in model.parameters()), 2 if half else 4
    head = model.get_output_embeddings()
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    # student, teacher and a gradient; without --offload also AdamW's two moments, and for half precision the masters
    # and the sum of their gradients
    weights = n * (3 * size + (0 if cfg.offload else 16 if half else 8))
    # of a token in a layer: what its matrix products read and write, and its norms in float32
    kept = sum(m.in_features + m.out_features for m in linear) / config.num_hidden_layers * size
    kept = cfg.micro_tokens * (kept + 2 * config.hidden_size * 8)
    stream = cfg.micro_tokens * config.hidden_size * size * config.num_hidden_layers * cfg.checkpointing
    head_gradient = config.vocab_size * config.hidden_size * 2 * size
    scores = min(256, cfg.micro_tokens) * config.vocab_size * (12 if not half else 12 + 2 * size + 4)
    # The most is needed either while the loss is computed, with all that the layers keep, but before there is a gradient
    # (in float32 it stays from the last pass), or while the backward pass is in a layer, which then keeps everything.
    in_the_loss = scores + (0 if cfg.checkpointing else kept * config.num_hidden_layers) - n * size * half
    return {
        "weights and optimizer": weights,
        f"a pass of {cfg.micro_tokens:,} tokens": stream + head_gradient + max(in_the_loss, kept),
    }


class Kernels(TorchDispatchMode):
    """Counts the operations that are no views. A GPU, here a pretended one, runs about as many kernels."""

    count, views = (
        0,
        {"detach", "expand", "expand_as", "numpy_T", "permute", "reshape", "select", "slice", "split", "t"},
    )
    views |= {"squeeze", "transpose", "unsqueeze", "view"}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function._schema.name.split("::")[1] not in self.views
        return function(*args, **(kwargs or {}))


def decode_step(cfg) -> tuple[int, int, int]:
    """Kernels of a decode step, counted on a narrow model of the same depth; the bytes of weights that it reads, and
    those of each token in a row's cache."""
    config = AutoConfig.from_pretrained(cfg.model)
    with torch.device("meta"):
        weights = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters()) * 2
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * 2
    config.hidden_size, config.intermediate_size, config.vocab_size, config.head_dim = 64, 64, 64, 16
    config.num_attention_heads, config.num_key_value_heads, config.pad_token_id = 4, 2, None
    model = AutoModelForCausalLM.from_config(config).bfloat16().eval()

    class Counted(oel.Sampler):
        kernels = None

        def decode(self) -> None:
            with Kernels() as kernels:
                super().decode()
            Counted.kernels = kernels.count

    def reply():
        yield oel.Request([1, 2, 3], 3)

    with PretendedGPU() as gpu, torch.inference_mode():
        oel.AttentionInterface.register("oel", oel.attend)
        model.set_attn_implementation("oel")
        how = {"stop_ids": (), "temperature": cfg.temperature}
        Counted(model.to(gpu.device), [reply()], oel.tqdm(disable=True), **how).run()
    return Counted.kernels, weights, token


def forecast(cfg) -> str:
    """One line: what is needed and what there is; where it does not fit, which setting would."""
    try:
        device = oel.find_device(cfg.device)
        half = (cfg.dtype or ("bfloat16" if device.type == "cuda" else "float32")) == "bfloat16"
        found = parts(cfg, half)
        choices = {
            "--offload": {"offload": True},
            "--offload --micro-tokens 2048": {"offload": True, "micro_tokens": 2048},
        }
        others = {name: sum(parts(dataclasses.replace(cfg, **how), half).values()) for name, how in choices.items()}
    except oel.UsageError as error:
        return f"memory: no forecast: {error}"
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    there = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else there
    line = ", ".join(f"{x / 2**30:.1f} {name}" for name, x in found.items())
    line = f"memory: about {sum(found.values()) / 2**30:.1f} GiB ({line}) of {there / 2**30:.1f} on {device}"
    if sum(found.values()) < 0.92 * there:
        return line
    fits = [f"{name} needs {x / 2**30:.1f}" for name, x in others.items() if x < 0.92 * there]
    return line + f"; that is too much: {fits[0] if fits else 'take a smaller model'}"


def main() -> None:
    cfg = oel.parse_args()
    print(forecast(cfg))
    kernels, weights, token = decode_step(cfg)
    print(f"a decode step in bf16: {kernels:,} kernels; it reads {weights / 2**30:.1f} GiB of weights and "
          f"{token / 2**20:.2f} MiB for each token of each row's cache")  # fmt: skip


if __name__ == "__main__":
    main()
