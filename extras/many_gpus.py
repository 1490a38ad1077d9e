"""A run on several GPUs or machines: the options are those of oel.py, and every process does its share.

    torchrun --nproc-per-node 8 extras/many_gpus.py --model Qwen/Qwen3-1.7B
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \
        extras/many_gpus.py ...
    torchrun --nproc-per-node 2 extras/many_gpus.py    # the embedded policy on a CPU, to see that it works

All that samples goes through `oel.drive`, all that learns through `oel.distill`: this file wraps the two. A process
drives every n-th generator, and all hear of the results; it takes the gradient of every n-th sample, and the sum goes
to all; it keeps AdamW's state of its share of the weights, and all hear of what they have become. So every process always has the same weights, and draws what a single one would have drawn. The first one
keeps the run folder, which all machines must see; the others keep a copy made of links, thrown away at the end.
"""

import os
import shutil
import sys
import tempfile
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.optim import ZeroRedundancyOptimizer
from transformers import PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import oel

RANK = int(os.environ.get("RANK", "0"))


class NoBar(oel.tqdm):
    """The first process alone shows its progress."""

    def __init__(self, *args, **how):
        super().__init__(*args, **{**how, "disable": True})


def share_drive(drive):
    """oel.drive, each process with its generators in their places: a reply's noise depends on the place."""

    def absent():
        return
        yield

    def shared(model, generators, **how):
        world, everyone = dist.get_world_size(), [None] * dist.get_world_size()
        mine = [g if i % world == RANK else absent() for i, g in enumerate(generators)]
        dist.all_gather_object(everyone, drive(model, mine, **how))
        return [everyone[i % world][i] for i in range(len(generators))]

    return shared


def share_distill(distill):
    """oel.distill, whose mean is over the tokens of this process: weighted by them, the processes' sum is the whole."""

    def shared(policy, teacher, samples, cfg):
        mine = samples[RANK :: dist.get_world_size()]
        tokens, all_tokens = (sum(len(s.response_ids) for s in part) for part in (mine, samples))
        weight = tokens / all_tokens
        loss = torch.tensor(distill(policy, teacher, mine, cfg) * weight if mine else 0.0)
        loss = loss.to(policy.model.device)
        for master in policy.master:
            master.grad = torch.zeros_like(master) if master.grad is None else master.grad * weight
            dist.all_reduce(master.grad)
        dist.all_reduce(loss)
        return loss.item()

    return shared


class SharedAdamW(ZeroRedundancyOptimizer):
    """AdamW whose state is spread over the processes; the first one gathers it to save it."""

    def __init__(self, params, lr, betas, eps, weight_decay, fused=None, adamw=torch.optim.AdamW):
        how = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "fused": fused}
        super().__init__(params, adamw, **how)

    def state_dict(self) -> dict:
        self.consolidate_state_dict(to=0)
        return {} if RANK else super().state_dict()


def main() -> None:
    if "RANK" not in os.environ:
        sys.exit(
            "this is for torchrun: torchrun --nproc-per-node N extras/many_gpus.py; in one process, python oel.py"
        )
    if RANK:  # one process speaks and writes the models
        oel.tqdm, sys.stdout = NoBar, open(os.devnull, "w")  # noqa: SIM115 (until the process ends)
        save = torch.save  # which processes also use to send each other objects
        torch.save = lambda what, to, **how: to.touch() if isinstance(to, Path) else save(what, to, **how)
        PreTrainedModel.save_pretrained = lambda model, to, **how: to.mkdir()
    cfg = oel.parse_args()
    cuda = torch.cuda.is_available() and (cfg.device or "cuda").startswith("cuda")
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # some have nothing to do while others write lessons, and wait
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(days=1))
    oel.drive, oel.distill = share_drive(oel.drive), share_distill(oel.distill)
    torch.optim.AdamW = SharedAdamW
    with tempfile.TemporaryDirectory() as scratch:
        argv, there = sys.argv[1:], Path(cfg.out).resolve()
        if RANK:
            here = f"{scratch}/run"
            if there.is_dir():  # a run that continues: its records count here too
                ignore = shutil.ignore_patterns("*.part")
                shutil.copytree(there, here, copy_function=os.symlink, ignore=ignore)
            argv += ["--out", here]
        dist.barrier()  # nobody writes before all have seen the same
        oel.main(argv)
    sys.stdout.flush()
    os._exit(0)  # not by way of gloo's threads, which now and then abort a process that ends


if __name__ == "__main__":
    main()
