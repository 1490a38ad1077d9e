"""LoRA (arXiv 2106.09685) for small cards: beside every weight two thin matrices learn, and the model is kept once.

    python extras/lora.py --lora 32 --lr 5e-5 --model Qwen/Qwen3-1.7B      # all other options are those of oel.py

A linear layer W of the decoder becomes y = W x + 32 / R * B A x, with R rows in A and R columns in B. W stays as it is:
without the product the model is what it was when the round began, so it is its own teacher. At the end of a round the
products are added to the float32 weights, which wait in main memory, and learning begins anew from there. On the GPU
are the bf16 weights, once, and for A and B alone their gradients and AdamW's state.
"""

import dataclasses
import functools
import os
import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
import oel

SCALE = 32  # over the rank: so the same learning rate suits several


@dataclasses.dataclass
class Config(oel.Config):
    lora: int = oel.option(32, "rank of the adapters; their --lr wants to be about ten times that of whole weights")


class LowRank(oel.Policy):
    """A policy whose adapters learn. `master` are the adapters, `weights` the model's own in float32, by name."""

    def __init__(self, policy: oel.Policy, rank: int, device: torch.device):
        super().__init__(**vars(policy))
        model, self.on = self.model.requires_grad_(False), True
        names = [name for name, _ in model.named_parameters()]
        self.weights = dict(zip(names, policy.master, strict=True))
        self.adapted = {
            f"{name}.weight": layer
            for name, layer in model.named_modules()
            if isinstance(layer, torch.nn.Linear) and layer is not model.get_output_embeddings()
        }
        for layer in self.adapted.values():
            layer.A = torch.nn.Parameter(torch.empty(rank, layer.in_features))
            layer.B = torch.nn.Parameter(torch.empty(layer.out_features, rank))
            layer.register_forward_hook(self.add)
        model.to(device)
        self.master = [p for layer in self.adapted.values() for p in (layer.A, layer.B)]
        self.restart()

    def restart(self) -> None:
        """B zero, and the same A in every round: so a run that was stopped goes on as it would have."""
        draw = torch.Generator().manual_seed(0)
        for layer in self.adapted.values():
            layer.A.data.copy_((torch.rand(layer.A.shape, generator=draw) * 2 - 1) / layer.in_features**0.5)
            layer.B.data.zero_()

    def add(self, layer, inputs, output):
        """The hook of an adapted layer."""
        A, B = (x.to(output.dtype) for x in (layer.A, layer.B))
        return output + SCALE / len(A) * (inputs[0] @ A.T @ B.T) if self.on else output

    def frozen(self):
        return Teacher(self)

    def add_grads_to_master(self) -> None:
        """The adapters are float32 weights themselves."""

    copy_master = add_grads_to_master

    @torch.no_grad()
    def merge(self) -> None:
        for name, layer in self.adapted.items():
            exact = self.weights[name]
            exact += (SCALE / len(layer.A) * layer.B @ layer.A).to(exact.device)
            layer.weight.copy_(exact)
        self.restart()


class Teacher:
    """The model of a LowRank policy without its adapters; in all else the very same."""

    def __init__(self, policy: LowRank):
        self.policy = policy

    def __getattr__(self, name):
        return getattr(self.policy.model, name)

    def get_decoder(self):
        return self.decode

    def decode(self, **inputs):
        model, training = self.policy.model, self.policy.model.training
        self.policy.on = False
        model.eval()  # in training mode activations are recomputed, which leaves no keys and values to share
        try:
            return model.get_decoder()(**inputs)
        finally:
            self.policy.on = True
            model.train(training)


def load_policy(load, rank: int, source: str, device: torch.device, thinking: bool = True, dtype: str = ""):
    """oel.load_policy, with adapters; the float32 weights stay in main memory."""
    dtype = dtype or ("bfloat16" if device.type == "cuda" else "float32")
    return LowRank(load(source, torch.device("cpu"), thinking, dtype), rank, device)


def save_model(path: Path, policy: LowRank) -> None:
    """oel.save_model, of the whole model: whoever loads it needs to know nothing of adapters."""
    policy.merge()
    with oel.atomic(path) as part:
        policy.model.save_pretrained(part, state_dict=policy.weights)
        policy.tokenizer.save_pretrained(part)


def main() -> None:
    oel.Config = Config
    cfg = oel.parse_args()
    oel.load_policy = functools.partial(load_policy, oel.load_policy, cfg.lora)
    oel.save_model = save_model
    if "RANK" in os.environ:  # torchrun
        import many_gpus

        return many_gpus.main()
    oel.main()


if __name__ == "__main__":
    main()
