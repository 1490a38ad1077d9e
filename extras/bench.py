"""Speed, side by side with what the library offers, in one run: a ratio of two things measured in turn.

    python extras/bench.py sample              the sampler against model.generate and continuous batching of the hub
    python extras/bench.py sample --only games,experience
    python extras/bench.py sample --only chat --model HuggingFaceTB/SmolLM2-135M-Instruct
    python extras/bench.py distill             the gradient of one step against full logits and autograd

Every contestant produces the same tokens (greedy; bf16 ones the same number of tokens) or the same gradient, in turn:
A B C A B C. Printed are medians over the repeats, and ratios of those medians. On CUDA with the shape of Qwen3-1.7B,
on a CPU with smaller ones; weights are random but for the embedded policy, which does not change what a step costs.
"""

import argparse
import contextlib
import copy
import functools
import math
import multiprocessing
import os
import random
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
from torch.nn.functional import kl_div
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.utils import logging

import oel
import prompts
from envs import FrozenLake, level_seeds

SIZES = {
    "games": (32, 64, 128),
    "told": (32, 64, 128),
    "mixed": (6, 12),
    "experience": (16, 64),
    "chat": (16, 64),
}  # batch sizes tried on a CPU


# --- the contestants: each runs generators that yield Requests, and returns what they return ----------------
def ours(model, generators, stop_ids, size):
    return oel.drive(model, generators, stop_ids=stop_ids, temperature=0, rows=size)


class Limits(StoppingCriteria):
    """Rows of generate that have as many new tokens as their request wanted are done."""

    def __init__(self, width: int, limits: list[int], device):
        self.ends = width + torch.tensor(limits, device=device)

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids.shape[1] >= self.ends


def lockstep(model, generators, stop_ids, size):
    """model.generate, batch by batch, prompts of like length together; a turn begins when all have ended the last."""
    results, responses = [None] * len(generators), dict.fromkeys(range(len(generators)))
    settings = {"do_sample": False, "pad_token_id": 0, "eos_token_id": sorted(stop_ids) or None}
    if model.device.type == "cuda":
        settings["cache_implementation"] = "static"  # this makes generate compile the step, too
    while responses:
        requests = {}
        for i, response in responses.items():
            try:
                requests[i] = generators[i].send(response)
            except StopIteration as stop:
                results[i] = stop.value
        order, responses = sorted(requests, key=lambda i: len(requests[i].prompt_ids)), {}
        for batch in (order[k : k + size] for k in range(0, len(order), size)):
            width, limits = (
                max(len(requests[i].prompt_ids) for i in batch),
                [requests[i].max_new_tokens for i in batch],
            )
            ids = torch.zeros(len(batch), width, dtype=torch.long)
            for row, i in enumerate(batch):  # padding on the left
                ids[row, width - len(requests[i].prompt_ids) :] = torch.tensor(requests[i].prompt_ids)
            seen = torch.arange(width)[None] >= width - torch.tensor([[len(requests[i].prompt_ids)] for i in batch])
            found = model.generate(ids.to(model.device), attention_mask=seen.long().to(model.device), **settings,
                                   generation_config=GenerationConfig(), max_new_tokens=max(limits),
                                   stopping_criteria=StoppingCriteriaList([Limits(width, limits, model.device)]))  # fmt: skip
            for i, limit, row in zip(batch, limits, found[:, width:].tolist(), strict=True):
                end = next((k for k, token in enumerate(row[:limit]) if token in stop_ids), limit - 1)
                responses[i] = oel.Response(row[: end + 1], "stop" if row[end] in stop_ids else "length")
    return results


def continuous(model, generators, stop_ids, size):
    """The engine of model.generate_batch, through its manager: an episode's next turn enters at once."""
    results, waiting = [None] * len(generators), {}
    ends = sorted(stop_ids) or [-1]
    config = GenerationConfig(do_sample=False, eos_token_id=ends, pad_token_id=0, max_new_tokens=512)
    how = {"max_requests_per_batch": size}
    if model.device.type == "cpu":  # where it does not find out by itself how much memory is free: 2 GiB
        how |= {"page_size": 64, "num_blocks": (2 << 30) // oel.KVCache(model, 1, 1).kv.nbytes // 64}
        how |= {"max_batch_tokens": 1024}
    how = ContinuousBatchingConfig(**how)

    def advance(manager, i, response):
        try:
            request = generators[i].send(response)
        except StopIteration as stop:
            results[i] = stop.value
        else:
            name = manager.add_request(request.prompt_ids, max_new_tokens=request.max_new_tokens, eos_token_id=ends)
            waiting[name] = i

    options = {"generation_config": config, "continuous_batching_config": how, "block": True, "timeout": 5}
    with model.continuous_batching_context_manager(**options) as manager:
        for i in range(len(generators)):
            advance(manager, i, None)
        while waiting:
            found = manager.get_result(timeout=1)
            if found is None and not manager.is_running():
                raise RuntimeError("continuous batching of the hub stopped")
            if found is not None and found.is_finished():
                ids = found.generated_tokens
                response = oel.Response(ids, "stop" if ids[-1] in stop_ids else "length")
                advance(manager, waiting.pop(found.request_id), response)
    return results


CONTESTANTS = {"oel": ours, "generate": lockstep, "generate_batch": continuous}


# --- the workloads: (model, stop ids, a function that makes new generators, sizes to try) -------------------
def random_qwen3(layers: int, width: int, heads: int, kv_heads: int, mlp: int, dtype, device, head_dim=128):
    torch.manual_seed(0)
    config = Qwen3Config(vocab_size=151_936, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
                         num_key_value_heads=kv_heads, head_dim=head_dim, intermediate_size=mlp,
                         tie_word_embeddings=True, max_position_embeddings=8192)  # fmt: skip
    with torch.device(device):
        return Qwen3ForCausalLM._from_config(config, dtype=dtype, attn_implementation="sdpa").eval()


def asking(requests: list[oel.Request]):
    def ask(request):
        return [(yield request).ids]

    return lambda: [ask(request) for request in requests]


def games(device, told=None):
    """128 episodes of FrozenLake, played by the embedded policy, which loses most of them soon."""
    policy = oel.load_policy(str(oel.TINY), device)

    def play(level):
        trajectory = yield from oel.episode(policy, FrozenLake(), level, str(level), 256, told)
        return [turn["response"] for turn in trajectory["turns"]], trajectory["outcome"]["reply_tokens"]

    return policy.model, policy.stop_ids, lambda: [play(level) for level in level_seeds("held_out", 128)]


def told(device):
    """The same episodes with the rules in the prompt: the policy walks to the goal, at once or in several turns."""
    return games(device, prompts.as_items(FrozenLake().rules()))


def mixed(device):
    """Prompts of 100 to 600 tokens whose replies are of very unequal length, most of them short."""
    rng, cuda = random.Random(0), device.type == "cuda"
    shape = (28, 2048, 16, 8, 6144) if cuda else (28, 1024, 16, 8, 3072)
    model, (low, high), n = (
        random_qwen3(*shape, torch.bfloat16, device),
        (64, 1024) if cuda else (16, 256),
        256 if cuda else 24,
    )
    requests = []
    for _ in range(n):
        limit = round(low * (high / low) ** (rng.random() ** 1.5))
        requests.append(oel.Request([rng.randrange(1000, 150_000) for _ in range(rng.randint(100, 600))], limit))
    return model, frozenset(), asking(requests)


def experience(device):
    """64 prompts behind one experience of 2,048 tokens."""
    rng = random.Random(0)
    if device.type == "cuda":
        model, ids = random_qwen3(28, 2048, 16, 8, 6144, torch.bfloat16, device), range(1000, 150_000)
    else:
        policy = oel.load_policy(str(oel.TINY), device)
        model, ids = policy.model, range(256)
    told = [rng.choice(ids) for _ in range(2048)]
    requests = [oel.Request(told + [rng.choice(ids) for _ in range(64)], rng.randint(16, 64)) for _ in range(64)]
    return model, frozenset(), asking(requests)


def chat(device, model: str):
    """A real model's own replies, of at most 128 tokens, to 64 questions of chat_logs.jsonl."""
    policy = oel.load_policy(model, device, thinking=False)
    logs = oel.read_jsonl(Path(__file__).with_name("chat_logs.jsonl"), prompts.parse_log)
    requests = [oel.Request(policy.encode(log["turns"][0]["prompt"]), 128) for log in logs[:64]]
    return policy.model, policy.stop_ids, asking(requests)


WORKLOADS = {"games": games, "told": told, "mixed": mixed, "experience": experience}  # and chat, with --model


# --- measuring --------------------------------------------------------------------------------------------
def produced(results: list) -> int:
    """How many tokens a contestant has produced."""
    return sum(r[1] if isinstance(r, tuple) else len(r[0]) for r in results)


def measure(device, call) -> tuple[float, int, int, object]:
    """Seconds of a call, bytes of memory before it and at its peak, and what it returned."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    else:
        with contextlib.suppress(OSError):  # Linux: forget the highest resident size so far
            Path("/proc/self/clear_refs").write_text("5")
    peak = torch.cuda.max_memory_allocated if cuda else resident_peak
    before, began = peak(), time.perf_counter()
    result = call()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began, before, peak(), result


def timed(contestant, model, stop_ids, make, size) -> tuple[float, int, int, list]:
    """Seconds, tokens, bytes of memory at the peak and results of one contestant at one batch size."""
    generators = make()
    run = measure(model.device, lambda: contestant(model, generators, stop_ids, size))
    return run[0], produced(run[3]), run[2], run[3]


def resident_peak() -> int:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    return 0


def copy_bandwidth(device) -> float:
    """Bytes read and written a second by a large copy."""
    a = torch.empty(1 << (30 if device.type == "cuda" else 28), dtype=torch.uint8, device=device)
    b, times = torch.empty_like(a), []
    for _ in range(5):
        began = time.perf_counter()
        b.copy_(a)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return 2 * a.numel() / min(times[1:])


def traffic(model, stop_ids, make, size) -> int:
    """Bytes that our decoding steps have to read: the weights and the live cache, once a step."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    token, total = oel.KVCache(model, 1, 1).kv.nbytes, 0

    def count(module, args, kwargs):
        nonlocal total
        if kwargs["input_ids"].shape[1] == 1:
            total += weights + token * int((kwargs["position_ids"] + 1).sum())

    hook = model.get_decoder().register_forward_pre_hook(count, with_kwargs=True)
    ours(model, make(), stop_ids, size)
    hook.remove()
    return total


def compare(name: str, device, repeats: int) -> None:
    model, stop_ids, make = WORKLOADS[name](device)
    contestants, sizes, runs = dict(CONTESTANTS), {}, {}
    n, rows = len(make()), (64, 128, 256) if device.type == "cuda" else SIZES[name]
    print(f"\n{name}: {WORKLOADS[name].__doc__} {sum(p.numel() for p in model.parameters()):,} parameters, "
          f"{str(model.dtype)[6:]}, {n} sequences", flush=True)  # fmt: skip
    for label, contestant in list(contestants.items()):  # warm up, and find everyone's best batch size
        try:
            tried = {s: timed(contestant, model, stop_ids, make, s) for s in rows}
        except Exception as error:  # noqa: BLE001 (whatever a peer cannot do here)
            print(f"{label} does not run here: {type(error).__name__}: {' '.join(str(error).split())[:150]}")
            del contestants[label]
            continue
        sizes[label] = min(tried, key=lambda s: tried[s][0])
        print(f"{label}: " + ", ".join(f"{s} rows {t[0]:.1f} s" for s, t in tried.items()), flush=True)
    for _ in range(repeats):
        for label, contestant in contestants.items():
            runs.setdefault(label, []).append(timed(contestant, model, stop_ids, make, sizes[label]))
    same = [label for label in runs if runs[label][0][3] == runs["oel"][0][3]]
    print(f"the same texts as oel: {', '.join(same)}" if model.dtype == torch.float32 else "bf16: texts not compared")
    print(
        "| | rows | seconds | tokens | tokens/s | peak memory | speed of oel over it |\n|---|---|---|---|---|---|---|"
    )
    medians = {label: statistics.median(run[0] for run in runs[label]) for label in runs}
    for label, found in runs.items():
        seconds, tokens, peak = medians[label], found[0][1], max(run[2] for run in found)
        print(f"| {label} | {sizes[label]} | {seconds:.2f} | {tokens:,} | {tokens / seconds:,.0f} | {peak / 2**30:.2f} GiB | "
              f"{seconds / medians['oel']:.2f} |", flush=True)  # fmt: skip
    bandwidth = copy_bandwidth(device)
    share = traffic(model, stop_ids, make, sizes["oel"]) / bandwidth / medians["oel"]
    print(
        f"oel: {share:.0%} of the bandwidth limit (weights and live cache read once a step; {bandwidth / 1e9:.1f} GB/s)"
    )


# --- distill: the gradient of one optimizer step ------------------------------------------------------------
EXPERIENCES = {"experience-256": 256, "experience-2048": 2048}  # workload: tokens that only the teacher reads


def full_loss(policy, teacher, samples, cfg):
    """Eq. 2 the way the distillation trainers of TRL write it: all samples in one batch, the logits of every reply.

    This is the leanest of them, SDFT; others also keep the logits of the prompts, of which only the last counts.
    """
    replies = [s.response_ids for s in samples]
    longest = max(map(len, replies))

    def log_probabilities(model, prompt_ids):  # (B, T, V)
        width = max(map(len, prompt_ids))
        ids = torch.zeros(len(samples), width + longest, dtype=torch.long)
        seen = torch.zeros_like(ids)
        for row, (prompt, reply) in enumerate(zip(prompt_ids, replies, strict=True)):
            here = slice(width - len(prompt), width + len(reply))
            ids[row, here], seen[row, here] = torch.tensor(prompt + reply), 1
        batch = {"input_ids": ids.to(model.device), "attention_mask": seen.to(model.device)}
        logits = model(**batch, use_cache=False, logits_to_keep=longest + 1).logits[:, :-1]
        return (logits.float() / cfg.temperature).log_softmax(-1)

    logp = log_probabilities(policy.model, [s.prompt_ids for s in samples])
    with torch.no_grad():
        logq = log_probabilities(teacher, [s.teacher_ids for s in samples])
    kl = kl_div(logq, logp, reduction="none", log_target=True).sum(-1)  # p (log p - log q), over V
    counts = torch.arange(longest)[None] < torch.tensor([[len(reply)] for reply in replies])
    counts = counts.to(kl.device)
    return (kl * counts).sum() / counts.sum()


def full_logits(policy, teacher, samples, cfg) -> float:
    loss = full_loss(policy, teacher, samples, cfg)
    loss.backward()
    return loss.item()


STEPS = {"oel": oel.distill, "full logits": full_logits}


def step_inputs(told: int, device):
    """What oel.distill takes: a student, a teacher near it that is told more, replies to short prompts, settings."""
    rng, cuda = random.Random(0), device.type == "cuda"
    shape = (28, 2048, 16, 8, 6144, torch.bfloat16) if cuda else (2, 512, 8, 4, 1536, torch.float32)
    model = random_qwen3(*shape, device, head_dim=128 if cuda else 64)
    teacher = copy.deepcopy(model).requires_grad_(False)
    for p in teacher.parameters():
        p.add_(torch.randn_like(p), alpha=0.01)
    master = [p.detach().float() if cuda else p for p in model.parameters()]
    policy = oel.Policy(model, None, master, frozenset(), model.config.vocab_size)

    def text(tokens):
        return [rng.randrange(1000, 150_000) for _ in range(tokens)]

    replies, length = (64, 700) if cuda else (16, 256)
    lessons, samples = text(told), []
    for _ in range(replies):
        prompt = text(rng.randint(80, 120))
        samples.append(oel.Sample(prompt, lessons + prompt, text(length)))
    return policy, teacher, samples, oel.Config()


def take_gradients(policy) -> list[torch.Tensor]:
    """The gradients of a step, in float32, taken out of the policy."""
    pairs = list(zip(policy.model.parameters(), policy.master, strict=True))
    found = [(master.grad if p.grad is None else p.grad).float() for p, master in pairs]
    for p, master in pairs:
        p.grad = master.grad = None
    return found


def agree(name: str, device) -> bool:
    """Whether the contestants find the same loss and gradients: to 1e-4 of the largest, in float32."""
    policy, teacher, samples, cfg = step_inputs(EXPERIENCES[name], device)
    low, *_, high = sorted(len(s.prompt_ids) for s in samples)
    print(f"\n{name}: {len(samples)} replies of {len(samples[0].response_ids)} tokens to prompts of {low} to {high}, "
          f"{EXPERIENCES[name]:,} more for the teacher; {sum(p.numel() for p in policy.master):,} parameters, "
          f"{str(policy.model.dtype)[6:]}, {cfg.micro_tokens:,} micro_tokens", flush=True)  # fmt: skip
    found = [(step(policy, teacher, samples, cfg), take_gradients(policy)) for step in STEPS.values()]
    (loss, ours), (other, theirs) = found
    largest = max(g.abs().max() for g in ours)
    apart = max((a.sub_(b).abs_().max() / largest).item() for a, b in zip(ours, theirs, strict=True))
    print(f"loss {loss:.6f}; theirs differs by {abs(other - loss) / loss:.1e} of it, their gradients by {apart:.1e} of "
          "the largest entry", flush=True)  # fmt: skip
    return max(abs(other - loss) / loss, apart) < 1e-4 or policy.model.dtype != torch.float32


def one_step(name: str, device, label: str) -> tuple[float, int, int, float]:
    """Seconds of a contestant's step, bytes of memory before it and at its peak, and the loss."""
    policy, teacher, samples, cfg = step_inputs(EXPERIENCES[name], device)
    STEPS[label](policy, teacher, samples[:1], cfg)  # warm up
    take_gradients(policy)
    return measure(device, lambda: STEPS[label](policy, teacher, samples, cfg))


def alone(function, *arguments):
    """What a function returns, from a process of its own: nobody measures in memory that another has left behind."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, max_tasks_per_child=1) as pool:  # it ends even if this process is gone
        return pool.submit(function, *arguments).result()


def compare_steps(name: str, device, repeats: int) -> None:
    labels, runs = list(STEPS), {}
    try:
        if not alone(agree, name, device):
            sys.exit("the contestants do not compute the same: there is nothing to compare")
    except RuntimeError as error:  # out of memory, or killed for it
        print(f"full logits does not run here: {type(error).__name__}: {' '.join(str(error).split())[:150]}")
        labels = ["oel"]
    for _ in range(repeats):
        for label in labels:
            runs.setdefault(label, []).append(alone(one_step, name, device, label))
    print("| | seconds | peak memory above the weights | seconds over oel | memory over oel |")
    print("|---|---|---|---|---|")
    seconds = {label: statistics.median(run[0] for run in runs[label]) for label in runs}
    memory = {label: statistics.median(run[2] - run[1] for run in runs[label]) for label in runs}
    for label in runs:
        more = memory[label] / (memory["oel"] or math.nan)  # 0 where it cannot be read
        print(f"| {label} | {seconds[label]:.2f} | {memory[label] / 2**30:.2f} GiB | {seconds[label] / seconds['oel']:.2f} | "
              f"{more:.2f} |", flush=True)  # fmt: skip


BENCHMARKS = {"sample": (WORKLOADS, compare), "distill": (EXPERIENCES, compare_steps)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=BENCHMARKS)
    parser.add_argument("--only", default="", help="workloads, with commas [all]")
    parser.add_argument("--model", default="", help="hub name or folder, to add the workload chat")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="")
    args = parser.parse_args()
    if args.model:
        WORKLOADS["chat"] = functools.update_wrapper(functools.partial(chat, model=args.model), chat)
    workloads, benchmark = BENCHMARKS[args.what]
    chosen = args.only.split(",") if args.only else list(workloads)
    if unknown := set(chosen) - set(workloads):
        parser.error(f"there is no workload {', '.join(unknown)}; there are {', '.join(workloads)}")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    device = oel.find_device(args.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{os.cpu_count()} CPU cores"
    print(f"torch {torch.__version__}, {name}, {torch.get_num_threads()} threads, median of {args.repeats}")
    for workload in chosen:
        benchmark(workload, device, args.repeats)


if __name__ == "__main__":
    main()
