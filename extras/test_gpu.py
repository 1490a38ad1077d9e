"""Tests of oel.py on a pretended GPU: same replies, no mixed devices, no waiting inside a decode step, its memory."""

import copy
import gc
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
import memory

import extras.pretended_gpu
import oel
from extras.pretended_gpu import Graph, PretendedGPU
from extras.testing import logs, make_samples, save_policy, small

pytest_plugins = ["extras.testing"]
CPU = torch.device("cpu")


def talks(policy) -> list:
    """Generators of two requests each. Second prompts are long, so the cache grows; replies end at different times."""

    def talk(i: int):
        first = yield oel.Request(policy.encode(f"Hello {i} " * (i + 1)), 4 + 5 * i)
        second = yield oel.Request(policy.encode("Hello " * (200 if i % 2 else 1)) + first.ids, 9)
        return first.ids, second.ids

    return [talk(i) for i in range(5)]


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_sampler_says_the_same_on_a_gpu_and_never_waits_in_a_decode_step(folder, dtype, graphs):
    """Catches: tensors of the host in a step, a copy read too early, .item(), a graph that reads what moved; in bf16
    also flash attention that is not used, or that reads a row too far or not far enough."""
    policy = oel.load_policy(folder, CPU, dtype=dtype)
    how = {"stop_ids": policy.stop_ids, "vocab_size": policy.vocab_size, "temperature": 0.7, "seed": 3, "rows": 3}
    expected = oel.drive(policy.model, talks(policy), **how)
    with PretendedGPU() as gpu:
        policy = oel.load_policy(folder, gpu.device, dtype=dtype)
        gpu.waits.clear()
        assert oel.drive(policy.model, talks(policy), graphs=graphs, **how) == expected
    flash = dtype == "bfloat16"
    assert (gpu.flashes > 3) == flash and (gpu.captures > 3) == graphs
    assert gpu.waits == {"flash_works: aten._local_scalar_dense.default": 1} if flash else not gpu.waits


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a real GPU is needed")
def test_flash_attention_is_that_of_the_general_kernel_on_a_real_gpu():
    """Catches: another scale, another order of heads, or keys of long rows that are left out."""
    config = SimpleNamespace(num_hidden_layers=1, num_attention_heads=16, num_key_value_heads=8, head_dim=128)
    model = SimpleNamespace(config=config, dtype=torch.bfloat16, device=torch.device("cuda"))
    cache, lengths = oel.KVCache(model, 4, 4096), torch.tensor([1, 300, 2047, 4096], device="cuda")
    cache.kv.normal_()
    query, new = (torch.randn(4, heads, 1, 128, dtype=torch.bfloat16, device="cuda") for heads in (16, 8))
    ids = torch.arange(4096, device="cuda")
    mask = torch.where(ids < lengths[:, None], 0.0, -torch.inf).bfloat16()[:, None, None]
    outs = []
    for given in (None, lengths.int()):
        view = oel.View(cache, slice(0, 4), ids[:4], lengths[:, None] - 1, 4096, given)
        layer = SimpleNamespace(layer_idx=0)
        outs.append(oel.attend(layer, query, new, new, mask, scaling=128**-0.5, oel_view=view)[0].float())
    assert oel.flash_works(model) and (outs[0] - outs[1]).abs().max() < 0.02


@pytest.mark.parametrize("wrong", [-1, +1])
def test_flash_attention_that_disagrees_with_the_general_kernel_is_not_used(folder, monkeypatch, wrong):
    """Catches: a kernel of another version of torch, which counts a row's tokens in another way, that is trusted."""
    kernel = extras.pretended_gpu.flash
    miscounts = lambda *args, seqused_k, **how: kernel(*args, seqused_k=seqused_k + wrong, **how)
    monkeypatch.setattr(extras.pretended_gpu, "flash", miscounts)
    with PretendedGPU() as gpu:
        policy = oel.load_policy(folder, gpu.device)
        oel.drive(policy.model, talks(policy), stop_ids=policy.stop_ids)
    assert gpu.flashes == 1, "by the comparison alone"


@pytest.mark.parametrize("offload", [False, True])
def test_a_round_on_a_gpu(folder, lessons, tmp_path, monkeypatch, offload):
    """Catches: devices that mix in any phase, weights that stay behind their master, memory that is never freed."""
    monkeypatch.setattr(oel, "find_device", lambda _: PretendedGPU.device)
    how = {"model": folder, "experience": lessons, "dtype": "bfloat16", "save_every": 1, "offload": offload}
    with PretendedGPU() as gpu:
        rows = oel.run(small(out=tmp_path / "run", graphs=True, **how))
        assert not gpu.unaligned and gpu.captures
        gc.collect()
    assert rows[-1]["round"] == 1 and gpu.live == 0, "nothing stays on the GPU"
    monkeypatch.undo()
    oel.run(small(out=tmp_path / "cpu", **how))
    on_gpu, on_cpu = (oel.read_jsonl(tmp_path / name / "steps.jsonl") for name in ("run", "cpu"))
    assert [row["loss"] for row in on_gpu] == pytest.approx([row["loss"] for row in on_cpu], rel=0.05)


def test_offload_needs_less_memory_of_the_gpu(folder):
    """Catches: a float32 master, a sum of gradients or a moment that stays on the GPU: 22 instead of 6 bytes."""
    peaks = []
    for offload in (False, True):
        with PretendedGPU() as gpu:
            policy = oel.load_policy(folder, gpu.device, offload=offload)
            teacher = copy.deepcopy(policy.model)
            oel.distill(policy, teacher, make_samples(policy)[:1], small())
            optimizer = torch.optim.AdamW(policy.master, 1e-3)
            optimizer.step()
            parameters = sum(p.numel() for p in policy.master)
            peaks.append(gpu.live / parameters)
            del policy, teacher, optimizer
    assert 19 < peaks[0] < 23 and 3.9 < peaks[1] < 6.1, "bytes a parameter: weights, teacher, masters, sums, moments"


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("offload", [True, False])
def test_the_memory_forecast_is_what_a_gpu_needs(folder, tmp_path, offload, checkpointing):
    """Catches: a forecast that leaves out the loss, the gradient or a layer, or that adds what never coexists."""
    sizes = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "vocab_size": 4096}
    big = save_policy(tmp_path / "big", max_position_embeddings=1024, **sizes)
    how = {"model": big, "offload": offload, "checkpointing": checkpointing, "micro_tokens": 1024}
    cfg, ids = small(dtype="bfloat16", **how), list(range(196))  # four of 196 + 60 tokens fill a pass
    samples = [oel.Sample(ids, [7] * 64 + ids, ids[i : i + 60]) for i in range(8)]
    with PretendedGPU() as gpu:
        policy = oel.load_policy(str(big), gpu.device, offload=offload)
        policy.vocab_size = 4096
        teacher = copy.deepcopy(policy.model).requires_grad_(False)
        optimizer = torch.optim.AdamW(policy.master, 1e-3, foreach=False)
        policy.model.train()
        if checkpointing:
            new = getattr(policy.model, "activation_checkpointing_enable", None)
            (new or policy.model.gradient_checkpointing_enable)({"use_reentrant": False})
        gpu.peak = 0
        for _ in range(2):  # the second step has AdamW's moments
            oel.distill(policy, teacher, samples, cfg)
            optimizer.step()
            optimizer.zero_grad()
            policy.copy_master()
    assert sum(memory.parts(cfg, True).values()) == pytest.approx(gpu.peak, rel=0.1)


def test_the_heads_gradient_in_float32_is_freed_before_the_backward_pass(tmp_path):
    """Catches: 4 bytes for every number of the head that are kept while the decoder needs its memory."""
    folder, live = save_policy(tmp_path / "wide", vocab_size=32768), []
    with PretendedGPU() as gpu:
        policy = oel.load_policy(str(folder), gpu.device, offload=True)
        policy.vocab_size, teacher = 32768, copy.deepcopy(policy.model)
        policy.model.get_decoder().norm.weight.register_hook(lambda _: live.append(gpu.live - before))
        before = gpu.live
        oel.distill(policy, teacher, make_samples(policy)[:1], small())
    assert live[0] < 5 * policy.model.get_output_embeddings().weight.numel(), "bf16, for some rows and for all"


def test_a_step_of_distillation_hardly_waits(folder):
    """Catches: copies and boolean indices that make the host wait for the GPU, layer by layer."""
    with PretendedGPU() as gpu:
        policy = oel.load_policy(folder, gpu.device)
        teacher, cfg = copy.deepcopy(policy.model), small(batch_episodes=6)
        lists, phase = ["X loses.", "Y wins."], oel.Phase([], 1, nucleus=False)
        samples = oel.sample_responses(policy, teacher, cfg, logs(6), lists, phase, 1)
        gpu.waits.clear()
        oel.distill(policy, teacher, samples, cfg)
        assert not gpu.unaligned
    batches = oel.micro_batches(samples, cfg.micro_tokens)
    assert len(batches) == 2 and min(map(len, batches)) > 1, "each has a prefix that runs once"
    assert gpu.waits.pop("distill: a blocking copy to the host") == 1, "for the loss"
    assert sum(gpu.waits.values()) <= len(batches), f"more than a check of the library for each batch: {gpu.waits}"


def test_cudnn_attention_is_off(folder):
    """Catches: attention of cuDNN, which torch prefers on new GPUs, and which makes a plan for every new shape."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    oel.load_policy(folder, CPU)
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_where_no_graph_can_be_captured_steps_run_as_they_are(folder, monkeypatch, caplog):
    """Catches: a GPU or model without graphs on which nothing runs, or that is warned of in every step."""
    policy = oel.load_policy(folder, CPU)
    how = {"stop_ids": policy.stop_ids, "vocab_size": policy.vocab_size, "temperature": 0.7, "seed": 3, "rows": 3}
    expected = oel.drive(policy.model, talks(policy), **how)
    logger, warned = oel.logging.get_logger("oel"), []
    monkeypatch.setattr(logger, "warning", lambda text, *_, **__: warned.append(text))
    type(logger).warning_once.cache_clear() if hasattr(type(logger).warning_once, "cache_clear") else None
    with PretendedGPU() as gpu:
        policy = oel.load_policy(folder, gpu.device, dtype="float32")
        forward = oel.Sampler.forward

        def fails(*args):
            if gpu.graph:
                raise RuntimeError("operation not permitted when stream is capturing")
            return forward(*args)

        monkeypatch.setattr(oel.Sampler, "forward", fails)
        phase, tries = oel.Phase([], 3, nucleus=False), []
        for _ in range(2):
            tries.append(oel.sampling(policy, small(), phase, "play")["graphs"])
            assert oel.drive(policy.model, talks(policy), graphs=tries[-1], **how) == expected
    assert tries == [True, False], "a later sampler does not try again"
    assert gpu.captures == 1 and len(warned) == 1 and "capturing" in warned[0]


@pytest.mark.parametrize("bytes_each, offload", [(40, False), (25, True), (7, True), (5, None)])
def test_the_optimizer_moves_out_where_it_has_to(folder, bytes_each, offload):
    """Catches: a run that dies for memory after it has played, where --offload would fit or a smaller model would."""
    n = sum(p.numel() for p in oel.load_policy(folder, CPU).master)
    with PretendedGPU(memory=n * bytes_each) as gpu:
        if offload is None:
            with pytest.raises(oel.UsageError, match="needs .* GiB; take a smaller model"):
                oel.load_policy(folder, gpu.device)
        else:
            masters = oel.load_policy(folder, gpu.device).master
            assert all(master.is_cuda != offload for master in masters)
        oel.load_policy(folder, torch.device("cuda"), offload=None)  # to write lessons alone, it fits


def test_a_gpu_has_the_logits_in_float32(folder):
    """Catches: products that are rounded to bf16, and a KL of which the first digits are noise."""
    hs, ws, wt = (torch.randn(n, 64).bfloat16() for n in (20, 300, 300))
    hs, wt = hs * 3, (ws + 0.05 * wt).bfloat16()
    exact, grad, _ = oel.reverse_kl(*(x.double() for x in (hs, hs, ws, wt)), 0.7)
    rounded, _, _ = oel.reverse_kl(hs, hs, ws, wt, 0.7)
    with PretendedGPU() as gpu:
        found, found_grad, _ = oel.reverse_kl(*(x.to(gpu.device) for x in (hs, hs, ws, wt)), 0.7)
        found, found_grad = found.cpu().double(), found_grad.cpu().double()
        assert not gpu.unaligned
    assert (found - exact).abs().max() < 1e-3 * exact.max() < (rounded.double() - exact).abs().max()
    assert (found_grad - grad).norm() < 0.02 * grad.norm()


# --- the pretended GPU itself: faults that it has to notice -------------------------------------------------
def on_gpu(*shape) -> torch.Tensor:
    return torch.zeros(*shape, device="cuda")


def recorded(body) -> Graph:
    graph = Graph()
    with torch.cuda.graph(graph):
        body()
    return graph


RAISING = {
    "a tensor made on the host": lambda: on_gpu(3) + torch.ones(3),
    "a mask made on the host": lambda: torch.where(torch.ones(3, dtype=torch.bool), on_gpu(3), on_gpu(3)),
    "a product with weights that were not moved": lambda: on_gpu(2, 3) @ torch.ones(3, 2),
    "a number that is fetched in a graph": lambda: recorded(lambda: on_gpu(3).sum().item()),
    "a graph that reads the host": lambda: recorded(lambda: on_gpu(3).add_(torch.ones(3))),
    "a copy to the host in a graph": lambda: recorded(lambda: on_gpu(3).to("cpu", non_blocking=True)),
}
WAITING = {
    "a number": lambda: on_gpu(3).sum().item(),
    "a list": lambda: on_gpu(3).tolist(),
    "a boolean index": lambda: on_gpu(3)[on_gpu(3) > 0],
    "a copy to the host": lambda: on_gpu(3).cpu(),
    "a copy to the GPU": lambda: torch.ones(3).to("cuda"),
    "an index from the host": lambda: on_gpu(3)[torch.tensor([1])],
    "a tensor of Python numbers": lambda: torch.tensor([1, 2], device="cuda"),
    "a comparison": lambda: torch.equal(on_gpu(3), on_gpu(3)),
}


@pytest.mark.parametrize("fault", RAISING.values(), ids=RAISING)
def test_what_a_gpu_refuses_is_refused(fault):
    with PretendedGPU(), pytest.raises(RuntimeError):
        fault()


@pytest.mark.parametrize("fault", WAITING.values(), ids=WAITING)
def test_what_a_gpu_waits_for_is_counted(fault):
    with PretendedGPU() as gpu:
        fault()
    assert sum(gpu.waits.values()) >= 1


def test_a_late_copy_is_garbage_until_its_event():
    with PretendedGPU():
        copied = on_gpu(3).to("cpu", non_blocking=True)
        early = copied.tolist()
        event = torch.cuda.current_stream().record_event()
        event.synchronize()
        assert early != [0, 0, 0] == copied.tolist()


def test_a_graph_keeps_the_numbers_and_the_memory_of_its_time():
    with PretendedGPU():
        x, step = on_gpu(3), 1
        graph = recorded(lambda: x.add_(step))
        assert x.sum().item() == 0, "nothing has happened yet"
        step = 5
        graph.replay()
        assert x.sum().item() == 3, "a Python number is baked in"
        old, x = x, on_gpu(3)
        graph.replay()
        assert (old.sum().item(), x.sum().item()) == (6, 0), "memory that is new is not what the graph writes"


def test_memory_is_counted_and_freed():
    with PretendedGPU(memory=1000) as gpu:
        x = on_gpu(100)
        assert (gpu.live, torch.cuda.mem_get_info()) == (400, (600, 1000))
        x = x[:10]  # a view keeps it all
        assert gpu.live == 400
        del x
        assert (gpu.live, gpu.peak) == (0, 400)


def test_the_sampler_gives_its_memory_back_before_anything_else_is_made(folder, monkeypatch):
    """Catches: AdamW's moments that lie in the middle of the last cache, so that the next one is smaller for good."""
    with PretendedGPU() as gpu:
        policy = oel.load_policy(folder, gpu.device)
        before, live = gpu.live, []
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: live.append(gpu.live))
        oel.drive(policy.model, talks(policy), stop_ids=policy.stop_ids)
    assert live[-1] == before and len(live) > 1


def test_a_model_that_is_not_trained_needs_no_float32(folder):
    """Catches: an extractor, or one of eight processes, that loads four bytes a parameter to keep two."""
    trained, other = (oel.load_policy(folder, CPU, dtype="bfloat16", offload=how) for how in (False, None))
    assert {p.dtype for p in other.master} == {torch.bfloat16} and {p.dtype for p in trained.master} == {
        torch.float32
    }
    for one, two in zip(trained.model.parameters(), other.model.parameters(), strict=True):
        assert one.dtype == torch.bfloat16 and torch.equal(one, two)
    for one, two in zip(trained.model.buffers(), other.model.buffers(), strict=True):
        assert one.dtype == torch.float32 and torch.equal(one, two), "rotary frequencies are not rounded"
