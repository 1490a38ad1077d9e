"""Online Experiential Learning (OEL) in one file. The method of arXiv 2603.16856, from top to bottom.

A language model is deployed, plays, and forgets. Here it learns from what it saw, with no reward and no label:

    for each round:
        trajectories = deploy(policy, extraction seeds)   # 1. it plays, and what happened is logged as text
        experiences  = extract(policy, trajectories)      # 2. it reads the logs and writes lessons, several lists
        logs         = deploy(policy, deployment seeds)   # 1. again, on other levels: prompts to learn on
        consolidate(policy, logs, experiences)            # 3. the lessons go into its weights
        evaluate(policy, held-out seeds)

Extraction (section 2 of the paper) folds a list over trajectories tau_i, starting from nothing:

    E_i = truncate(E_{i-1} + extract(tau_i, E_{i-1}))      (Eq. 1; without --previous, extract(tau_i) alone)

Consolidation is on-policy context distillation. The student pi_theta answers a logged prompt x WITHOUT the
experience e; the teacher, the same model frozen at the start of the round, scores the same answer y WITH it:

    L(theta) = E_{x ~ logs, y ~ pi_theta(.|x)} mean_t KL(pi_theta(.|x, y_<t) || pi_teacher(.|e, x, y_<t))  (Eq. 2)

Both sides have the temperature at which y is sampled. The gradient is taken for fixed y: that theta changes which
prefixes are visited is ignored, so the step is plain supervised learning on the student's own replies.

Shapes: B batch, T sequence, V vocabulary, D width, N response tokens, R rows of the KV cache.
"""

import argparse
import contextlib
import copy
import dataclasses
import difflib
import functools
import json
import math
import os
import random
import runpy
import shutil
import sys
import tempfile
import time
import traceback
from collections import namedtuple
from collections.abc import Callable, Generator
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from tqdm import tqdm
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer, logging

import prompts

TINY = Path(__file__).resolve().parent / "tiny"  # the embedded default policy
run_file = functools.cache(runpy.run_path)  # a game of one's own
FAMILIES = ["llama", "mistral", "olmo2", "qwen2", "qwen3", "smollm3"]  # add a model's when its test passes


# --- settings ---------------------------------------------------------------------------------------------
def option(default, help: str, choices: tuple | None = None):
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


@dataclasses.dataclass
class Config:
    """The options: run, how the policy writes, extraction, consolidation, evaluation. Defaults: for Qwen3-1.7B."""

    model: str = option(str(TINY), "hub name or folder of the policy")
    env: str = option("frozenlake", "frozenlake, sokoban, or a class of your own: FILE.py:CLASS")
    logs: str = option("", "JSONL file of trajectories to learn from instead; nothing is played")
    out: str = option("", "run folder (default: runs/MODEL-ENV-SEED)")
    seed: int = option(1, "seed of everything that is drawn")
    rounds: int = option(3, "rounds of deploy, extract, consolidate")
    device: str = option("", "cuda, mps or cpu (default: the first that is there)")
    smoke: bool = option(False, "one very small round on the named model, to see that everything runs")
    thinking: bool = option(True, "let the policy reason before it answers, if its template has the switch")
    reply_limit: int = option(1024, "new tokens in one reply of a game")
    temperature: float = option(0.7, "of every sample, and of both sides of the KL (section 4.1)")
    top_p: float = option(0.8, "nucleus for extraction and evaluation; logged prompts and students use none")
    top_k: int = option(20, "likewise")
    strict: bool = option(False, "ignore actions inside the reasoning, so a thought cut off makes no move")
    lists: int = option(10, "independently sampled experience lists a round")
    episodes: int = option(15, "episodes that each list is folded over, on the same levels for every list")
    form: str = option("free", "form of the lessons", ("free", "items"))
    previous: bool = option(False, "show the extractor the list so far (E_{i-1})")
    reasoning: bool = option(True, "show the extractor the reasoning inside the replies")
    experience_budget: int = option(2048, "tokens of an experience list, and new tokens of an extraction")
    experience: str = option("", "file with lessons to consolidate instead of extracting any")
    extractor: str = option("", "another model to write the lessons (default: the policy itself)")
    context: str = option("items", "what the teacher reads: lessons, logs, nothing", ("items", "raw", "none"))
    distill: str = option("on-policy", "who answers: student or teacher", ("on-policy", "off-policy"))
    steps: int = option(20, "optimizer steps a round")
    batch_episodes: int = option(64, "logged episodes a step; each of their prompts is answered once")
    lr: float = option(5e-6, "learning rate, constant")
    weight_decay: float = option(0.01, "of AdamW")
    adam_eps: float = option(1e-8, "of AdamW: gradients far below it make small steps instead of full ones")
    clip: float = option(1.0, "largest norm of a step's gradient")
    kl_top_k: int = option(0, "sum the KL over the student's top tokens only (the authors: 256); 0: exact")
    micro_tokens: int = option(8192, "padded tokens of one forward and backward pass")
    checkpointing: bool = option(True, "recompute activations in the backward pass to save memory")
    save_every: int = option(10, "steps between states that a killed consolidation resumes from")
    eval_games: int = option(128, "held-out levels for the pass rate")
    probe_games: int = option(64, "levels for in-context, unseen and forgetting pass rates")
    eval_every: int = option(0, "also evaluate every so many steps of consolidation; 0: after rounds only")
    rows: int = option(0, "replies that are sampled at the same time; 0: what memory holds, 256 at most")
    dtype: str = option("", "of the model (default: bfloat16 on CUDA)", ("bfloat16", "float32"))
    graphs: bool = option(False, "replay decoding steps as CUDA graphs (not tried on a GPU yet)")


# The paper's settings by model (its appendix), and ours for the embedded policy. They hold for both games.
ITEMS = {"form": "items", "previous": True, "experience_budget": 8192, "lr": 1e-6, "micro_tokens": 32768}
PRESETS = {
    "Qwen3-1.7B": {},
    "Qwen3-4B": {**ITEMS, "episodes": 25},
    "Qwen3-8B": {**ITEMS, "episodes": 50, "steps": 100},
    "Qwen3-4B-Instruct-2507": {**ITEMS, "thinking": False, "episodes": 50, "steps": 100},
    "tiny": {"form": "items", "reasoning": False, "reply_limit": 256, "experience_budget": 256, "lists": 5,
             "episodes": 6, "steps": 12, "batch_episodes": 16, "lr": 3e-4, "adam_eps": 1e-4,
             "checkpointing": False},
}  # fmt: skip
SMOKE = {"rounds": 1, "lists": 2, "episodes": 2, "steps": 1, "batch_episodes": 4, "reply_limit": 32,
         "experience_budget": 32, "eval_games": 4, "probe_games": 4}  # fmt: skip


class UsageError(ValueError):
    """Something the user can mend: one line that says what was wrong, where, and what to do."""


def parse_args(argv: list[str] | None = None) -> Config:
    """The command line as a Config: what was typed, else the model's preset, else the default."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    for f in dataclasses.fields(Config):
        name, about = "--" + f.name.replace("_", "-"), f"{f.metadata['help']} [{f.default}]"
        kind = {"type": f.type, "choices": f.metadata["choices"]}
        kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else kind
        parser.add_argument(name, default=argparse.SUPPRESS, help=about.replace("%", "%%"), **kind)
    typed, unknown = parser.parse_known_args(argv)
    if unknown:
        near = difflib.get_close_matches(unknown[0].split("=")[0], parser._option_string_actions, n=1)
        parser.error(f"unknown option {unknown[0]!r}" + (f"; did you mean {near[0]}?" if near else ""))
    typed = vars(typed)
    name = Path(typed.get("model", TINY)).name
    if name not in PRESETS:
        print(f"no preset for {name}: using the settings of Qwen3-1.7B")
    cfg = Config(**{**PRESETS.get(name, {}), **(SMOKE if typed.get("smoke") else {}), **typed})
    cfg.rounds = 1 if cfg.logs else cfg.rounds
    cfg.out = cfg.out or f"runs/{name}-{Path(cfg.logs or cfg.env.split(':')[-1]).stem}-{cfg.seed}"
    for f in dataclasses.fields(cfg):
        value = getattr(cfg, f.name)
        may_be_zero = f.default == 0 or f.name in ("seed", "rounds", "top_k", "weight_decay", "lr")
        most = 1 if f.name == "top_p" else sys.float_info.max
        if f.type in (int, float) and not (0 < value <= most or value == 0 and may_be_zero):
            wanted = ("0 or more" if may_be_zero else "more than 0") + (", 1 at most" if most == 1 else "")
            parser.error(f"--{f.name.replace('_', '-')} is {value}: it must be {wanted}")
    return cfg


def derive_seed(*parts: int) -> int:
    """One 32-bit seed from several numbers (run seed, round, phase, ...)."""
    return int(np.random.SeedSequence((len(parts), *parts)).generate_state(1)[0])


# --- the policy -------------------------------------------------------------------------------------------
@dataclasses.dataclass
class Policy:
    """A model, in bf16 on CUDA and in float32 elsewhere (--dtype), with its tokenizer: text in, text out.

    `master` are its parameters in float32, which are optimized and saved: a step of 1e-6 would be lost in bf16.
    """

    model: torch.nn.Module
    tokenizer: object
    master: list[torch.Tensor]
    stop_ids: frozenset[int]
    vocab_size: int  # ids the tokenizer knows; a head may have more rows, which are never sampled or scored
    thinking: bool = True

    def encode(self, message: str) -> list[int]:
        return prompts.chat_ids(self.tokenizer, message, self.thinking)

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def count_tokens(self, text: str) -> int:
        return len(prompts.plain_ids(self.tokenizer, text))

    def learning(self) -> list[torch.nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def copy_master(self) -> None:
        """Bring the model up to date with its master weights."""
        for p, master in zip(self.learning(), self.master, strict=True):
            p.data.copy_(master)

    def frozen(self):
        """The teacher of a round: the model as it is now."""
        return copy.deepcopy(self.model).requires_grad_(False).eval()


def find_device(wanted: str = "") -> torch.device:
    there = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    if wanted and wanted.split(":")[0] not in there:
        raise UsageError(f"--device {wanted} is not to be had here; there is {', '.join(there)}")
    return torch.device(wanted or there[0])


def load_policy(source: str, device: torch.device, thinking: bool = True, dtype: str = "") -> Policy:
    """Load a policy from a hub name or a folder: safetensors only, no remote code. `dtype` is --dtype."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, use_safetensors=True)
    except Exception as error:  # noqa: BLE001 (whatever is wrong with the files)
        raise UsageError(f"no policy in {source!r}: {' '.join(str(error).split())[:300]}") from None
    check_supported(model)
    vocab_size, ids = max(tokenizer.get_vocab().values()) + 1, model.config.vocab_size
    if tokenizer.chat_template is None or not tokenizer.encode("OEL", add_special_tokens=False):
        raise UsageError(f"the tokenizer of {source!r} lacks chat template or vocabulary: take a chat model")
    if vocab_size > ids:
        raise UsageError(f"the tokenizer of {source!r} has {vocab_size} ids, but its model only {ids}")
    model.eval().to(device)
    master = list(model.parameters())
    if (dtype or ("bfloat16" if device.type == "cuda" else "float32")) == "bfloat16":
        master = [p.detach() for p in master]
        for p in model.parameters():  # not model.to(bf16), which would round the rotary frequencies too
            p.data = p.data.to(torch.bfloat16)
    eos = getattr(model.generation_config, "eos_token_id", None)
    stops = {*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id} - {None}
    return Policy(model, tokenizer, master, frozenset(stops), vocab_size, thinking)


def check_supported(model) -> None:
    """The sampler keeps keys and values itself: families tested against generate, with attention to all before."""
    config = model.config
    slides = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type")
    if config.model_type not in FAMILIES or slides or rope in ("dynamic", "longrope"):
        what = f"{type(model).__name__} with sliding window {slides or None} and rotary embedding {rope}"
        raise UsageError(f"{what} is not supported: the sampler takes {', '.join(FAMILIES)} without these")


# --- the sampler ------------------------------------------------------------------------------------------
# Everything that talks to the model is a generator: it yields a Request and is sent the Response. `drive` runs any
# number of them at once: when a reply ends, its generator moves on, and its next prompt takes a free row.
Request = namedtuple("Request", "ids max_new_tokens")  # token ids of a prompt, and how long the reply may be
Response = namedtuple("Response", "ids finish")  # the reply, with its stop id if any; "stop" or "length"


class Rows:
    """A KV cache of R rows. `drive` sets where a pass writes (index, at) and what it sees (rows, reach)."""

    def __init__(self, model, rows: int, length: int):
        c, self.length = model.config, length
        head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        shape = (2, c.num_hidden_layers, rows, c.num_key_value_heads, length, head_dim)  # 2: keys and values
        # zeros, not garbage: what lies behind the mask is multiplied by 0, and NaN * 0 is NaN
        self.kv = torch.zeros(shape, dtype=model.dtype, device=model.device)
        # Four numbers a row: newest token (not in the cache yet), tokens in the cache, of them prompt, noise key.
        self.state = torch.zeros(4, rows, dtype=torch.long, device=model.device)
        self.token, self.used, self.asked, self.noise = self.state
        self.prompts = np.full((rows, length), -1)  # the ids of each row's prompt

    def take(self, row: int, old: "Rows", source: int, n: int) -> None:
        """Copy n tokens of a row of a cache, this very one or another, to a row of this one."""
        self.kv[:, :, row, :, :n] = old.kv[:, :, source, :, :n]
        self.state[:, row] = old.state[:, source]
        self.prompts[row, : old.length] = old.prompts[source]

    def most_alike(self, ids: np.ndarray) -> tuple[int, int]:
        """The row whose prompt begins most like `ids`, and how many need not be read: never the last one."""
        shared = (self.prompts[:, : len(ids)] == ids).cumprod(1).sum(1)
        return int(shared.argmax()), min(int(shared.max()), len(ids) - 1)

    def store(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Write new keys and values (B, Hkv, t, head_dim); return those to see, (2, B, Hkv, reach, head_dim)."""
        for cache, new in zip(self.kv[:, layer], (key, value), strict=True):
            cache[self.index[:, None], :, self.at] = new.transpose(1, 2)
        return self.kv[:, layer, self.rows, :, : self.reach]


def attend(module, query, key, value, attention_mask, *, scaling, oel_rows, **kwargs):
    """Attention over Rows for the model's own layers: query (B, Hq, t, head_dim) -> (B, t, Hq, head_dim).

    The Hq / Hkv queries that share a key head stand in for a longer sequence: no key is repeated for them.
    """
    keys, values = oel_rows.store(module.layer_idx, key, value)
    q = query.reshape(len(query), key.shape[1], -1, query.shape[-1])
    out = torch.nn.functional.scaled_dot_product_attention(q, keys, values, attention_mask, scale=scaling)
    return out.reshape(query.shape).transpose(1, 2), None


AttentionInterface.register("oel", attend)


def mix(x: torch.Tensor) -> torch.Tensor:
    """Scramble 32-bit numbers held in int64 (the finalizer of MurmurHash3)."""
    low = 0xFFFFFFFF
    x = (x ^ (x >> 16 & 0xFFFF)) * 0x85EBCA6B & low
    x = (x ^ (x >> 13)) * 0xC2B2AE35 & low
    return x ^ (x >> 16)


def pick(logits: torch.Tensor, key: torch.Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0):
    """Sample a token for each row: logits (B, V), key (B,) -> ids (B,).

    Gumbel's trick: argmax of logits / T + noise is a sample of the softmax. The noise of a token is a hash of
    (key, token), so that a row draws the same whatever its neighbours are. Top-k comes before top-p.
    """
    logits = logits.float()
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    ids = torch.arange(logits.shape[1], device=logits.device).expand_as(logits)
    if top_k or top_p < 1:
        logits, ids = logits.topk(min(top_k or logits.shape[1], logits.shape[1]))  # (B, K), in falling order
        p = logits.softmax(-1)
        logits = logits.masked_fill(p.cumsum(-1) - p >= top_p, -math.inf)  # the first always stays
    # -log(1 - u) is exponential; u comes from 32 bits and is never 0, nor 1 once it is rounded to float32
    u = ((mix(ids * 0x9E3779B1 + key[:, None]) + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)
    choice = (logits - torch.log(-torch.log1p(-u))).argmax(-1, keepdim=True)
    return ids.gather(1, choice)[:, 0]


def check_fits(model, prompt: int, reply: int) -> None:
    context = getattr(model.config, "max_position_embeddings", math.inf)
    if prompt < 1 or reply < 1 or prompt + reply > context:
        raise UsageError(f"a prompt of {prompt} and a reply of {reply} tokens: the context holds {context}")


def record(decode: Callable, sizes: tuple[int, ...], pool):
    """A CUDA graph of a step whose sizes are fixed: all of its kernels start with one call."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        decode(*sizes)
    return graph


def drive(
    model, generators: list[Generator], *, stop_ids, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
    seed: int = 0, rows: int = 0, vocab_size: int | None = None, desc: str | None = None,
    ahead: bool | None = None, graphs: bool = False,
) -> list:  # fmt: skip
    """Run generators that yield Requests and are sent Responses; return what they return. Its loop is at the end.

    Continuous batching: while some replies go on, new prompts are read into the rows of those that ended, from
    where they differ from the prompt in any row (an earlier turn of the episode, the same experience). A
    reply's noise depends on (seed, which generator, which of its requests) alone. `ahead` (default: on CUDA) decodes
    before it is known which replies ended. UsageError for a request that does not fit the model's context.
    """
    results, waiting = [None] * len(generators), []  # (generator, turn, request); the last is next in line
    live = []  # of each row in use: (generator, turn, request, reply so far), or None once the reply has ended
    head, cuda = model.get_output_embeddings().weight[:vocab_size], model.device.type == "cuda"
    torch.cuda.empty_cache()  # nothing to do without CUDA
    memory = torch.cuda.mem_get_info(model.device)[0] if cuda else 12 << 30  # bytes
    budget = memory // 4 // Rows(model, 1, 1).kv.nbytes  # tokens; old and new cache coexist
    ahead = cuda if ahead is None else ahead
    need, cache, graph_of = 1, Rows(model, 0, 0), {}  # tokens a row is to hold; the rows; sizes -> graph
    bar = tqdm(total=len(generators), desc=desc, leave=False, disable=desc is None, mininterval=0.5)

    def advance(i: int, turn: int, response: Response | None) -> None:
        """Hand a generator its response, and put its next request first in line."""
        nonlocal need
        try:
            request = generators[i].send(response)  # None starts it
        except StopIteration as stop:
            results[i] = stop.value
            bar.update()
            return
        check_fits(model, len(request.ids), request.max_new_tokens)
        waiting.append((i, turn, request))
        need = max(need, -(-(len(request.ids) + request.max_new_tokens) // 256) * 256)

    def move(target: Rows) -> None:
        """Live rows go to the front of a larger cache that takes over, or of this one: the last fill the gaps."""
        nonlocal cache
        kept = [row for row, taken in enumerate(live) if taken]
        if target is cache:
            last = [row for row in kept if row >= len(kept)]
            kept = [row if live[row] else last.pop() for row in range(len(kept))]  # 0 - 2 - 4 becomes 0 4 2
        live[:] = [live[row] for row in kept]
        for row, (source, (_, _, request, reply)) in enumerate(zip(kept, live, strict=True)):
            if target is not cache or source != row:
                target.take(row, cache, source, len(request.ids) + len(reply))
        cache = target

    def admit() -> None:
        """Read prompts into free rows, once over an eighth is free or all can enter; sample their first tokens."""
        most = max(1, min(rows or 256, len(generators), budget // need))  # that many fit
        if not waiting or any(live) and most - sum(map(bool, live)) < min(len(waiting), most // 8 + 1):
            return
        if need > cache.length:
            graph_of.clear()
            move(Rows(model, most, need))
            bar.set_postfix_str(f"{most} rows of {need} tokens", refresh=False)
        n = len(waiting) if live else 1  # into an empty cache one is read alone: the others share with it
        live.extend([None] * (most - len(live)))
        vacant, new = [row for row, taken in enumerate(live) if not taken], []
        for _ in range(min(n, len(vacant))):
            i, turn, request = waiting.pop()
            donor, shared = cache.most_alike(np.array(request.ids))
            row = donor if donor in vacant else vacant[0]
            vacant.remove(row)
            live[row] = (i, turn, request, [])
            new.append((row, donor, shared))
        for row, donor, shared in reversed(new):  # a donor is copied before its own row is given away
            if row != donor:
                cache.take(row, cache, donor, shared)
        read(sorted((len(live[row][2].ids) - shared, shared, row) for row, _, shared in new))

    def read(new: list[tuple[int, int, int]]) -> None:
        """Read the rest of new prompts, each (tokens to read, from where, row); like lengths share a pass."""
        while new:
            width = np.array(new)[:, 0]  # rising; a pass pads all to its last, by no more than a tenth and 64
            fits = width * range(1, len(new) + 1) <= np.minimum(1.1 * width.cumsum() + 64, 16384)
            n = max(1, int(fits.cumprod().sum()))
            rest, texts = [], [live[row][2].ids for _, _, row in new[:n]]
            for text, (_, start, row) in zip(texts, new):
                rest.append(torch.tensor(text[start:]))
                cache.prompts[row] = text + [-1] * (cache.length - len(text))
            _, start, rows = torch.tensor(new[:n], device=model.device).T
            known = [(len(text), derive_seed(seed, *live[row][:2])) for text, (_, _, row) in zip(texts, new)]
            cache.state[2:, rows] = torch.tensor(known, device=model.device).T  # asked and noise
            ids, reach = torch.nn.utils.rnn.pad_sequence(rest, True), -(-max(map(len, texts)) // 8) * 8
            forward(rows, ids.to(model.device), start, cache.asked[rows] - start - 1, reach)
            new = new[n:]

    def forward(rows, ids: torch.Tensor, start: torch.Tensor, last, reach: int) -> None:
        """Read ids (B, t) into rows from position `start` (B,) on; sample what follows ids[b, last[b]]."""
        (B, t), device, cache.rows, cache.reach = ids.shape, ids.device, rows, reach
        cache.index = torch.arange(len(cache.token), device=device)[rows]
        cache.at = (start[:, None] + torch.arange(t, device=device)).clamp(max=cache.length - 1)
        later = torch.arange(reach, device=device) > cache.at[:, None, :, None]
        repeat = model.config.num_attention_heads // model.config.num_key_value_heads if t > 1 else 1
        # as in attend, the queries of a key head one after the other: (B, 1, repeat * t, reach)
        mask = torch.where(later, -math.inf, 0.0).to(model.dtype).repeat(1, 1, repeat, 1)
        how = {"position_ids": cache.at, "attention_mask": mask, "use_cache": False, "oel_rows": cache}
        hidden = model.get_decoder()(input_ids=ids, **how).last_hidden_state  # (B, t, D)
        cache.used[rows] = start + last + 1
        key = mix(cache.noise[rows] + (cache.used[rows] - cache.asked[rows]) * 0x632BE5AB)
        logits = hidden[torch.arange(B, device=device), last] @ head.T  # (B, V)
        cache.token[rows] = pick(logits, key, temperature, top_k, top_p)

    def decode(n: int, reach: int) -> None:
        """Read the newest token of each of n rows, sample the next; of rows whose reply ended nobody looks at it."""
        forward(slice(0, n), cache.token[:n, None], cache.used[:n], 0, reach)

    def step() -> None:
        """Decode all rows in use, as far as the longest reaches; sizes are rounded: few graphs, aligned reads."""
        n = min(1 << (len(live) - 1).bit_length(), len(cache.token)) if graphs else len(live)
        longest, unit = max(len(r[2].ids) + len(r[3]) + 1 for r in live if r), 256 if cuda else 32
        sizes = n, min(-(-longest // unit) * unit, cache.length)
        if not graphs or sizes not in graph_of:  # the first time without: lazy set-up cannot be recorded
            graph_of[sizes] = None
            return decode(*sizes)
        if graph_of[sizes] is None:
            graph_of[sizes] = record(decode, sizes, next((g.pool() for g in graph_of.values() if g), None))
        graph_of[sizes].replay()

    def retire(tokens: list[int]) -> None:
        """Add each row's newest token to its reply; where that ends it, advance its generator."""
        for row, token in enumerate(tokens):
            if live[row]:
                i, turn, request, reply = live[row]
                reply.append(token)
                if token in stop_ids or len(reply) == request.max_new_tokens:
                    live[row] = None
                    advance(i, turn + 1, Response(reply, "stop" if token in stop_ids else "length"))
        if not waiting and not all(live):  # stop decoding ended rows
            move(cache)

    with contextlib.ExitStack() as undo, torch.inference_mode(), bar:
        undo.enter_context(torch.cuda.device(model.device if cuda else -1))  # -1: no change
        undo.callback(model.train, model.training)  # afterwards the model is as it was
        undo.callback(model.set_attn_implementation, model.config._attn_implementation)
        model.eval().set_attn_implementation("oel")
        for i in reversed(range(len(generators))):  # the first one ends up first in line
            advance(i, 0, None)
        while any(live) or waiting:
            admit()
            newest = cache.token[: len(live)].clone().to("cpu", non_blocking=cuda)
            copied = torch.cuda.current_stream().record_event() if cuda else None
            if ahead:  # the next tokens are made while these are looked at; for nothing where a reply ends
                step()
            if cuda:
                copied.synchronize()
            retire(newest.tolist())
            if any(live) and not ahead:
                step()
    return results


def sample(model, prompt_ids: list[list[int]], *, max_new_tokens: int | list[int], **how) -> list[Response]:
    """One reply to each prompt, given as token ids, with one limit or one for each; more options as in `drive`."""
    limits = max_new_tokens if isinstance(max_new_tokens, list) else [max_new_tokens] * len(prompt_ids)

    def ask(request: Request):
        return (yield request)

    return drive(model, [ask(Request(*asked)) for asked in zip(prompt_ids, limits, strict=True)], **how)


# --- deploy: the user side; with evaluate, all that plays ---------------------------------------------------
def settings(policy: Policy, cfg: Config, seed: int, truncate: bool, desc: str | None = None) -> dict:
    """How a phase samples: lessons, their episodes and evaluation from a nucleus; logs and students from all."""
    nucleus = {"top_p": cfg.top_p, "top_k": cfg.top_k} if truncate else {}
    return dict(stop_ids=policy.stop_ids, vocab_size=policy.vocab_size, temperature=cfg.temperature, seed=seed,
                rows=cfg.rows, graphs=cfg.graphs, desc=desc, **nucleus)  # fmt: skip


def make_game(cfg: Config, variant: str = "", seed: int = 0):
    """A game, or its variant "unseen" or "renamed"; None where the game has no such variant."""
    from envs import GAMES  # here, because extract and consolidate need no environment

    file, _, name = cfg.env.rpartition(":")
    games = run_file(file) if file else GAMES
    if name not in games:
        raise UsageError(f"--env {cfg.env}: no game {name}; there are {', '.join(GAMES)}, and FILE.py:CLASS")
    maker = getattr(games[name], variant, None) if variant else games[name]
    options = {"seed": seed} if variant == "renamed" else {}
    options |= {"strict": True} if cfg.strict and cfg.thinking else {}  # no thought, no closing tag to come
    return maker and maker(**options)


def episode(policy: Policy, game, level: int, name: str, reply_limit: int, experience: str | None = None):
    """Play one episode, as a generator. Returns the trajectory: {"id", "turns", "outcome"}.

    A turn is {"prompt", "response", "feedback"}: the whole user message WITHOUT experience, the reply as the
    model wrote it, and all that the game said then. `outcome` is for people; nothing learns from it.
    """
    observations, turns, done = [game.reset(level)], [], False
    counts = {"reply_tokens": 0, "truncated": 0, "unclosed": 0}
    while not done:
        prompt = prompts.play_prompt(getattr(game, "task", ""), observations)
        read = prompt if experience is None else prompts.with_experience(prompt, experience)
        response = yield Request(policy.encode(read), reply_limit)
        reply = policy.decode(response.ids)
        feedback, done = game.step(reply)
        observations.append(feedback)
        turns.append({"prompt": prompt, "response": reply, "feedback": feedback})
        counts["reply_tokens"] += len(response.ids)
        counts["truncated"] += response.finish == "length"
        counts["unclosed"] += "<think>" in reply and "</think>" not in reply
    counts["invalid"] = getattr(game, "invalid_moves", 0)
    return {"id": name, "turns": turns, "outcome": {"won": bool(game.won), "turns": len(turns), **counts}}


def deploy(policy: Policy, cfg: Config, levels: list[int], seed: int, truncate: bool) -> list[dict]:
    """Play an episode on the level of each seed in `levels`, without experience; return the trajectories."""
    new = [episode(policy, make_game(cfg), x, f"{i}-level{x}", cfg.reply_limit) for i, x in enumerate(levels)]
    return drive(policy.model, new, **settings(policy, cfg, seed, truncate, "deploy"))


# --- extract: text in, text out ---------------------------------------------------------------------------
def lesson_list(policy: Policy, cfg: Config, trajectories: list[dict]):
    """Fold one experience list over trajectories (Eq. 1), as a generator. It starts empty."""
    experience, budget = "", cfg.experience_budget
    for trajectory in trajectories:
        message = prompts.extraction_prompt(trajectory, experience * cfg.previous, cfg.form, cfg.reasoning)
        response = yield Request(policy.encode(message), budget)
        lessons = prompts.parse_lessons(policy.decode(response.ids), cfg.form)
        experience = prompts.accumulate(experience, lessons, budget, policy.count_tokens)  # Eq. 1
    return experience


def extract(policy: Policy, cfg: Config, trajectories: list[dict], seed: int) -> list[str]:
    """At most `cfg.lists` lists at the same time, each from its own share of the trajectories; empty ones go."""
    policy = load_policy(cfg.extractor, policy.model.device, cfg.thinking) if cfg.extractor else policy
    share = -(-len(trajectories) // cfg.lists)
    shares = [trajectories[i : i + share] for i in range(0, len(trajectories), share)]
    if cfg.context == "raw":
        how = (cfg.reasoning, cfg.experience_budget, policy.count_tokens)
        lists = [prompts.raw_experience(part, *how) for part in shares]
    else:
        folds = [lesson_list(policy, cfg, part) for part in shares]
        lists = drive(policy.model, folds, **settings(policy, cfg, seed, truncate=True, desc="extract"))
    lists += [prompts.as_items(["Look before every move."])] * cfg.smoke  # so few tokens hold none
    if not any(lists):
        raise UsageError("no lesson in any list: try --form free, more --experience-budget or another model")
    return [experience for experience in lists if experience]


# --- consolidate: the only part that changes weights ------------------------------------------------------
@torch.no_grad()
def reverse_kl(hs, ht, ws, wt, temperature: float, *, top_k=0, forward=False, chunk=256):
    """KL(student || teacher) at each of N positions, in nats and exact over V, and the gradients of its sum (Eq. 2).

    Hidden states (N, D) of student and teacher, their heads (V, D), the temperature of the student's samples -> KL
    (N,), gradients by hs (N, D) and by ws (V, D), or None for a frozen head. `top_k`: the authors' sum over the
    student's top tokens; `forward`: KL(teacher || student). The logits exist for a chunk of positions at a time.

    With p and q the softmax of hs ws^T / T and ht wt^T / T, and d = log p - log q, the gradient by the student's
    logits is p_j (d_j - sum_i p_i d_i) / T. Where it is all but certain, d_j and the sum cancel to the last digit,
    so d is measured from its value at the likeliest token.
    """
    if (len(hs), len(ws)) != (len(ht), len(wt)):
        raise ValueError(f"student and teacher differ: {[tuple(x.shape) for x in (hs, ht, ws, wt)]}")
    exact = torch.float64 if hs.dtype == torch.float64 else torch.float32
    kl, grad_hidden = [], torch.empty_like(hs)
    grad_weight = torch.zeros_like(ws, dtype=exact) if ws.requires_grad else None
    # used again by every chunk: on a CPU, new tensors of this size cost as much as what fills them
    room = torch.empty(3, min(chunk, len(hs)), len(ws), dtype=exact, device=hs.device)
    for start in range(0, len(hs), chunk):
        here = slice(start, start + chunk)
        spare, logp, logq = room[:, : len(hs[here])]  # (n, V)
        for h, w, out in ((hs, ws, logp), (ht, wt, logq)):
            logits = torch.mm(h[here], w.T, out=spare if h.dtype == exact else None).to(exact)
            torch.log_softmax(logits.div_(temperature), -1, out=out)
        d = torch.sub(logp, logq, out=spare)
        base = d.gather(-1, logp.argmax(-1, keepdim=True))  # (n, 1)
        p = logp.exp_()
        if forward:  # KL(q || p) instead, for the off-policy variant
            kl.append(-torch.linalg.vecdot(logq.exp_(), d))
            slope = torch.sub(p, logq, out=spare)  # exp_: logq has become q
        else:
            if top_k:  # only the student's top tokens count; this is not a KL, and can be negative
                kept = torch.zeros_like(d).scatter_(-1, p.topk(min(top_k, len(ws)), -1).indices, 1)
                d.add_(1).mul_(kept)  # 1 from d log p, which only cancels if all are kept
                base = -torch.linalg.vecdot(p, kept)[:, None]  # takes the 1 out again
            else:
                d.sub_(base)
            mean = torch.mul(p, d, out=logq).sum(-1, keepdim=True)  # (n, 1); nobody needs logq any more
            kl.append((mean + base)[:, 0])
            slope = d.sub_(mean).mul_(p)
        slope = slope.div_(temperature).to(hs.dtype)  # (n, V), by the student's logits
        grad_hidden[here] = slope @ ws
        if grad_weight is not None:
            add = grad_weight.addmm_ if slope.dtype == exact else lambda a, b: grad_weight.add_(a @ b)
            add(slope.T, hs[here])
    return torch.cat(kl), grad_hidden, grad_weight


# A reply of the student, and the two prompts before it: without and with the experience.
Sample = namedtuple("Sample", "prompt_ids teacher_ids response_ids")


def response_hidden(model, prompt_ids: list[list[int]], response_ids: list[list[int]], shared: int = 0):
    """Hidden states (N, D) from which each response token is predicted, and those tokens (N,).

    Padding is on the right, where causal attention never looks. Which positions count is known from lengths, not
    from ids: a sampled stop token is learned like any other. The first `shared` tokens are read once for all.
    """
    decoder, known = model.get_decoder(), None
    if shared:
        prefix = torch.tensor([prompt_ids[0][:shared]], device=model.device)
        known = decoder(input_ids=prefix, use_cache=True).past_key_values
        known.batch_repeat_interleave(len(prompt_ids))
    full = [prompt[shared:] + reply for prompt, reply in zip(prompt_ids, response_ids, strict=True)]
    ids = torch.zeros(len(full), max(map(len, full)), dtype=torch.long)  # (B, T)
    counts = torch.zeros_like(ids, dtype=torch.bool)
    for row, (tokens, reply) in enumerate(zip(full, response_ids, strict=True)):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        counts[row, len(tokens) - len(reply) - 1 : len(tokens) - 1] = True  # position t predicts token t + 1
    hidden = decoder(input_ids=ids.to(model.device), past_key_values=known, use_cache=shared > 0)[0]
    return hidden[counts.to(model.device)], ids.roll(-1, 1)[counts]  # (B, T, D) -> (N, D)


def micro_batches(samples: list[Sample], budget: int) -> list[list[Sample]]:
    """Cut samples into batches of one experience and like length: of `budget` padded tokens, or one sample."""

    def size(s: Sample) -> tuple[list[int], int]:
        experience = s.teacher_ids[: len(s.teacher_ids) - len(s.prompt_ids)]  # begins with it
        # the teacher's prompt counts a quarter: its experience is read once for all, and no gradient needs it
        return experience, max(len(s.prompt_ids), len(s.teacher_ids) // 4) + len(s.response_ids)

    batches, former = [], None
    for s in sorted(samples, key=size):
        experience, width = size(s)
        if experience != former or (len(batches[-1]) + 1) * width > budget:
            batches.append([])
        batches[-1].append(s)
        former = experience
    return batches


def distill(policy: Policy, teacher, samples: list[Sample], cfg: Config, verify=False) -> torch.Tensor:
    """The gradient of Eq. 2 over samples, by hand, into the `.grad` of `policy.master`.

    Returns what each position of the replies adds to the loss (longest reply,): their sum is the mean over all
    response tokens of the samples, however they are cut into micro-batches.
    """
    student, n = policy.model, sum(len(s.response_ids) for s in samples)
    loss = torch.zeros(max(len(s.response_ids) for s in samples), dtype=torch.float64)
    for batch in micro_batches(samples, cfg.micro_tokens):
        asked, told, replies = zip(*batch)
        # read once what all prompts share, but not their last token; a control reads as the student does
        shared = len(os.path.commonprefix([x[:-1] for x in told])) if len(batch) > 1 and asked != told else 0
        with torch.no_grad():
            teacher_hidden, seen = response_hidden(teacher, told, replies, shared)
            if verify and shared:  # for one batch: to read what they share once changes nothing but rounding
                apart, verify = response_hidden(teacher, told, replies)[0], False
                assert (apart - teacher_hidden).abs().mean() < 0.05 * apart.abs().mean(), "teacher's cache"
        student_hidden, predicted = response_hidden(student, asked, replies)
        assert torch.equal(seen, predicted), "student and teacher must score the same response ids"
        heads = [m.get_output_embeddings().weight[: policy.vocab_size] for m in (student, teacher)]  # (V, D)
        how = {"top_k": cfg.kl_top_k, "forward": cfg.distill == "off-policy"}
        kl, *grads = reverse_kl(student_hidden, teacher_hidden, *heads, cfg.temperature, **how)
        sides = zip((student_hidden, heads[0]), grads)
        given = [(x, grad.div_(n).to(x.dtype)) for x, grad in sides if grad is not None]
        torch.autograd.backward(*zip(*given))  # the rest of the way, through the decoder
        place = torch.cat([torch.arange(len(reply)) for reply in replies])
        loss.index_add_(0, place, kl.cpu().double() / n)
        for p, master in zip(policy.learning(), policy.master, strict=True):
            if p is not master and p.grad is not None:  # bf16 gradients add up in float32
                master.grad = p.grad.float() if master.grad is None else master.grad.add_(p.grad)
                p.grad = None
    return loss


def consolidate(
    policy: Policy, cfg: Config, logs: list[dict], experiences: list[str] | None, seed: int,
    state: Path | None = None, on_step: Callable[[int, dict], None] = lambda step, record: None,
) -> None:  # fmt: skip
    """On-policy context distillation (Eq. 2) of the experience lists into the policy's weights, if they stay finite.

    Every step answers each prompt of the next `cfg.batch_episodes` logged trajectories once and updates once.
    `experiences=None` is a control: the teacher knows no more than the student. `state` is a file to resume from.
    """
    teacher = policy.frozen()
    optimizer = torch.optim.AdamW(policy.master, cfg.lr, (0.9, 0.999), cfg.adam_eps, cfg.weight_decay)
    assert len(logs) >= cfg.steps * cfg.batch_episodes, f"{len(logs)} logs are too few"
    policy.model.train()  # checkpointing asks for it; these models have no dropout
    if cfg.checkpointing:  # under its new name or its old one; it acts in training mode only
        former = getattr(policy.model, "gradient_checkpointing_enable", None)
        getattr(policy.model, "activation_checkpointing_enable", former)({"use_reentrant": False})
    done = 0
    if state and state.exists():  # go on where a consolidation was stopped
        try:
            saved = torch.load(state, map_location="cpu", weights_only=True)
        except Exception as error:
            raise UsageError(f"{state} is damaged: remove it, and this consolidation begins again") from error
        done = saved["step"]
        optimizer.load_state_dict(saved["optimizer"])
        for master, weight in zip(policy.master, saved["master"], strict=True):
            master.data.copy_(weight)
        policy.copy_master()
    for step in range(done + 1, cfg.steps + 1):
        began = time.perf_counter()
        # 1. logged prompts, each with one list drawn at random for the teacher
        batch = logs[(step - 1) * cfg.batch_episodes : step * cfg.batch_episodes]
        logged = [turn["prompt"] for trajectory in batch for turn in trajectory["turns"]]
        draw = random.Random(derive_seed(seed, step))
        control = experiences is None
        told = [x if control else prompts.with_experience(x, draw.choice(experiences)) for x in logged]
        # 2. y ~ pi_theta(.|x): the student answers without the experience (off-policy: the teacher, with it)
        prompt_ids, teacher_ids = ([policy.encode(x) for x in texts] for texts in (logged, told))
        check_fits(teacher, max(map(len, teacher_ids)), cfg.reply_limit)
        author = (teacher, teacher_ids) if cfg.distill == "off-policy" else (policy.model, prompt_ids)
        how = settings(policy, cfg, derive_seed(seed, step, 1), False, f"step {step}/{cfg.steps}")
        responses = sample(*author, max_new_tokens=cfg.reply_limit, **how)
        samples = [Sample(x, e_x, y.ids) for x, e_x, y in zip(prompt_ids, teacher_ids, responses)]
        # 3. the gradient of the mean reverse KL, clipped, and one update
        loss_at = distill(policy, teacher, samples, cfg, verify=step == done + 1)
        loss = loss_at.sum().item()
        grad_norm = torch.nn.utils.clip_grad_norm_(policy.master, cfg.clip).item()
        if not math.isfinite(loss + grad_norm):
            raise FloatingPointError(f"step {step}: loss {loss}, gradient {grad_norm}; no weight was changed")
        optimizer.step()
        optimizer.zero_grad()
        policy.copy_master()
        lengths, seconds = np.array([len(s.response_ids) for s in samples]), time.perf_counter() - began
        # positions of a reply: 0, 1 to 2, 3 to 6, ...
        parts = [(2**i - 1, 2 ** (i + 1) - 1) for i in range(int(lengths.max()).bit_length())]
        n, kl = int(lengths.sum()), [loss_at[a:b].sum() / (lengths.clip(a, b) - a).sum() for a, b in parts]
        on_step(step, {"loss": loss, "grad_norm": grad_norm, "tokens": n, "replies": len(samples), "seconds": seconds,
                       "tokens_per_second": n / seconds, "kl_by_position": [x.item() * n for x in kl]})  # fmt: skip
        if state and step % cfg.save_every == 0 and step < cfg.steps:
            with atomic(state) as part:
                torch.save({"step": step, "master": policy.master, "optimizer": optimizer.state_dict()}, part)
    policy.model.eval()


# --- evaluate ---------------------------------------------------------------------------------------------
def wilson(won: int, n: int) -> tuple[float, float]:
    """The 95% Wilson interval of a pass rate."""
    z, p = 1.96, won / n
    middle, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (middle - spread) / (1 + z * z / n)), min(1.0, (middle + spread) / (1 + z * z / n))


def play_held_out(policy: Policy, cfg: Config, n: int, seed: int, variant="", experiences=None) -> list[dict]:
    """Play n held-out levels, used for nothing else; level i reads list i mod L of the experiences, if any."""
    from envs import level_seeds

    games = [game for i in range(n) if (game := make_game(cfg, variant, i))]
    episodes = []
    for i, (game, level) in enumerate(zip(games, level_seeds("held_out", len(games)), strict=True)):
        lists = [prompts.as_items(game.rules())] if variant == "renamed" else experiences or [None]
        told = lists[i % len(lists)]
        episodes.append(episode(policy, game, level, f"{variant}level{level}", cfg.reply_limit, told))
    return drive(policy.model, episodes, **settings(policy, cfg, seed, True, variant or "held out"))


def pass_rate(trajectories: list[dict]) -> float | None:
    return sum(t["outcome"]["won"] for t in trajectories) / len(trajectories) if trajectories else None


def evaluate(policy: Policy, cfg: Config, seed: int) -> tuple[dict, list[dict]]:
    """The metrics of a policy on held-out levels, and the trajectories behind its pass rate."""
    n, played = cfg.probe_games, play_held_out(policy, cfg, cfg.eval_games, seed)
    total = {key: sum(t["outcome"][key] for t in played) for key in played[0]["outcome"]}
    low, high = wilson(total["won"], len(played))
    metrics = {"pass_rate": pass_rate(played), "pass_rate_low": low, "pass_rate_high": high}
    metrics["reply_tokens"] = total["reply_tokens"] / total["turns"]
    metrics["unseen_pass_rate"] = pass_rate(play_held_out(policy, cfg, n, seed, "unseen"))  # 4x4 boards
    metrics["forgetting_pass_rate"] = pass_rate(play_held_out(policy, cfg, n, seed, "renamed"))  # told rules
    rates = {f"{key}_rate": total[key] / total["turns"] for key in ("invalid", "truncated", "unclosed")}
    return {**metrics, **rates}, played


# --- the run folder ---------------------------------------------------------------------------------------
@contextlib.contextmanager
def atomic(path: Path):
    """Write to a temporary neighbour, a file or a folder, that takes the name only when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    discard(temporary)
    try:
        yield temporary
        temporary.replace(path)
    except Exception as error:  # torch and safetensors have their own for a full disk
        raise OSError(f"{path} was not written ({error}); what was there is kept") from error
    finally:
        discard(temporary)


def discard(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def write_jsonl(path: Path, rows: list[dict]) -> None:
    with atomic(path) as part:
        part.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def read_jsonl(path: Path, parse: Callable = json.loads) -> list[dict]:
    """The objects of a JSONL file, none if there is no file; UsageError names the line that is none."""
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n") if path.exists() else [], 1):
        try:
            rows += [{**parse(line)}] if line.strip() else []  # ** refuses what is no object
        except (TypeError, ValueError) as error:
            raise UsageError(f"{path}, line {number}: {error}; mend or remove it") from None
    return rows


def recorded(path: Path, stage: Callable[[], list[dict]]) -> list[dict]:
    """What a stage returns, always as read back from its record, which is computed if it is not there."""
    if not path.exists():
        write_jsonl(path, stage())
    return read_jsonl(path)


def save_model(path: Path, policy: Policy) -> None:
    """A Hugging Face folder, complete or absent: float32 weights, for others to load in the config's dtype."""
    names = [name for name, _ in policy.model.named_parameters()]
    with atomic(path) as part:
        policy.model.save_pretrained(part, state_dict=dict(zip(names, policy.master, strict=True)))
        policy.tokenizer.save_pretrained(part)


# --- main -------------------------------------------------------------------------------------------------
def run(cfg: Config) -> list[dict]:
    """The algorithm at the top of this file, with a record of everything; returns the rows of metrics.jsonl.

    A stage whose record exists is not run: so the same command continues a run that was stopped.
    """
    out = Path(cfg.out)
    if (out / "config.json").exists():
        there, now = json.loads((out / "config.json").read_text()), dataclasses.asdict(cfg)
        # a run may move, and go on for more rounds
        kept = sorted({*there, *now} - {"out", "rounds", "device"})
        changed = [f"{k} was {there.get(k)!r}, is {now.get(k)!r}" for k in kept if there.get(k) != now.get(k)]
        if changed:
            raise UsageError(f"{out} has other settings ({'; '.join(changed)}): choose another --out")
    own = read_jsonl(Path(cfg.logs), prompts.parse_log) if cfg.logs else make_game(cfg)
    if not own:
        raise UsageError(f"--logs {cfg.logs}: there is no such file, or nothing is in it")
    given = Path(cfg.experience).read_text("utf-8", "replace").strip() if cfg.experience else ""
    if cfg.experience and (not given or "\ufffd" in given):
        raise UsageError(f"--experience {cfg.experience}: it is empty or no UTF-8; it should hold lessons")
    done = max((r for r in range(1, cfg.rounds + 1) if (out / f"round{r}/model").exists()), default=0)
    source = str(out / f"round{done}/model") if done else cfg.model
    device = find_device(cfg.device)
    if cfg.graphs and device.type != "cuda":
        raise UsageError(f"--graphs replays CUDA graphs, and this is a {device.type} device: leave it out")
    policy = load_policy(source, device, cfg.thinking, cfg.dtype)
    check_fits(policy.model, cfg.experience_budget, cfg.reply_limit)
    _held = FileLock(out / "lock", blocking=False, is_singleton=True).acquire()  # TimeoutError: in use
    with atomic(out / "config.json") as part:
        part.write_text(json.dumps(dataclasses.asdict(cfg), indent=2) + "\n")
    if cfg.logs:  # they stand in for the records of what is not played
        logs = [own[i % len(own)] for i in range(cfg.steps * cfg.batch_episodes)]
        for name, rows in {"trajectories": own, "logs": logs, "in_context": []}.items():
            write_jsonl(out / f"round1/{name}.jsonl", rows)
    metrics, steps = read_jsonl(out / "metrics.jsonl"), read_jsonl(out / "steps.jsonl")

    def measure(r: int, step: int, began: float, in_context: float | None = None) -> None:
        """Evaluate and add a row to metrics.jsonl, unless it is there."""
        if cfg.logs or any((row["round"], row["step"]) == (r, step) for row in metrics):
            return
        found, played = evaluate(policy, cfg, derive_seed(cfg.seed, 0))
        write_jsonl(out / f"round{r}/held_out.jsonl", played)
        metrics.append({"round": r, "step": step, **found, "in_context_pass_rate": in_context,
                        "seconds": time.perf_counter() - began})  # fmt: skip
        write_jsonl(out / "metrics.jsonl", metrics)
        tqdm.write(table(metrics[-1:]))

    if done == 0:
        measure(0, 0, time.perf_counter())
    for r in range(max(done, 1), cfg.rounds + 1):
        play_round(policy, cfg, r, out / f"round{r}", given, steps, measure)
    print(table([row for row in metrics if row["step"] in (0, cfg.steps)]) or f"done: {out}/round1/model")
    return metrics


def play_round(policy: Policy, cfg: Config, r: int, folder: Path, given: str, steps: list, measure) -> None:
    """Round r: play, write lessons, play again, learn, be measured. Changes the policy, and adds to steps."""
    began, (play, read, log, learn) = time.perf_counter(), [derive_seed(cfg.seed, r, i) for i in range(4)]
    if not cfg.logs:
        from envs import level_seeds
    # 1. and 2. the same levels for every list, one list after the other; each episode has its own noise
    if not (folder / "experience").exists():
        lists = [given] if given and cfg.context != "none" else []
        if not given and cfg.context != "none":
            played = recorded(folder / "trajectories.jsonl", lambda: deploy(
                policy, cfg, level_seeds("extraction", cfg.episodes, r * cfg.episodes) * cfg.lists, play, True,
            ))  # fmt: skip
            lists = extract(policy, cfg, played, read)
        with atomic(folder / "experience") as part:
            part.mkdir()
            for i, experience in enumerate(lists):
                (part / f"{i:02}.txt").write_text(experience + "\n", encoding="utf-8")
    experiences = [file.read_text(encoding="utf-8") for file in sorted((folder / "experience").iterdir())]
    in_context = pass_rate(recorded(folder / "in_context.jsonl", lambda: play_held_out(
        policy, cfg, cfg.probe_games, derive_seed(cfg.seed, 0), experiences=experiences)))  # fmt: skip
    # 1. again, on other levels: the prompts to learn on, each used once
    n = cfg.steps * cfg.batch_episodes
    logs = recorded(folder / "logs.jsonl", lambda: deploy(
        policy, cfg, level_seeds("deployment", n, r * n), log, False))  # fmt: skip

    def on_step(step: int, record: dict) -> None:
        steps[:] = [s for s in steps if (s["round"], s["step"]) < (r, step)]
        steps.append({"round": r, "step": step, **record})
        write_jsonl(folder.parent / "steps.jsonl", steps)
        tqdm.write(f"round {r} step {step}: loss {record['loss']:.4f}, gradient {record['grad_norm']:.3f}, "
                   f"{record['tokens']} tokens, {record['tokens_per_second']:,.0f} tokens/s")  # fmt: skip
        if cfg.eval_every and step % cfg.eval_every == 0 and step < cfg.steps:
            measure(r, step, began)

    # 3. and what was written down goes into the weights
    if not (folder / "model").exists():
        consolidate(policy, cfg, logs, experiences or None, learn, folder / "state/step.pt", on_step)
        save_model(folder / "model", policy)
    discard(folder / "state")
    measure(r, cfg.steps, began, in_context)


def table(rows: list[dict]) -> str:
    """Rows of metrics.jsonl as text, a line each; nothing if there are none."""
    names = ["round", "step", "pass_rate", "pass_rate_low", "pass_rate_high", "reply_tokens"]
    names += ["in_context_pass_rate", "unseen_pass_rate", "forgetting_pass_rate"]
    lines = [[name.replace("_pass_rate", "").replace("_", " ") for name in names]] * bool(rows)
    for values in (map(row.get, names) for row in rows):
        lines.append([f"{x:.3f}" if isinstance(x, float) else "-" if x is None else str(x) for x in values])
    return "\n".join("  ".join(x.rjust(max(5, len(top))) for x, top in zip(xs, lines[0])) for xs in lines)


def main(argv: list[str] | None = None) -> None:
    """The command line. What the user can mend is one line on stderr and exit code 2."""
    cfg = parse_args(argv)
    print("\n".join(f"{name:20} {value}" for name, value in dataclasses.asdict(cfg).items()))
    logging.disable_progress_bar()  # the hub's, for every file it opens; ours stay
    try:
        for file in TINY.parent.glob("extras/memory.py"):  # what the run will need, before anything is loaded
            print(runpy.run_path(str(file))["forecast"](cfg))
        with tempfile.TemporaryDirectory() as scratch:
            run(dataclasses.replace(cfg, out=scratch) if cfg.smoke else cfg)
        if cfg.smoke:
            print("ok")
    except (UsageError, FloatingPointError, UnicodeDecodeError, OSError, torch.OutOfMemoryError) as error:
        in_use = f"{cfg.out} is in use by another run: let it end, or choose another --out"
        print(f"oel.py: error: {in_use if isinstance(error, TimeoutError) else error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as error:
        phases = {"play_round", "measure", "deploy", "extract", "play_held_out", "consolidate"}
        calls = [f for f, _ in traceback.walk_tb(error.__traceback__) if f.f_code.co_name in phases]
        where = " > ".join(f"{f.f_code.co_name} {f.f_locals.get('r', '')}".strip() for f in calls) or "run"
        print(f"oel.py: stopped in {where}; the same command goes on from {cfg.out}", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":  # or torchrun oel.py
    many = TINY.parent / "extras/many_gpus.py"
    main() if "TORCHELASTIC_RUN_ID" not in os.environ else runpy.run_path(str(many), run_name="__main__")
