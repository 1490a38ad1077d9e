"""Online Experiential Learning (OEL) in one file: the method of arXiv 2603.16856, in the order in which it runs.

A language model is deployed, plays, and forgets. Here it learns from what it saw, with no reward and no labels:

    for each round:
        trajectories = deploy(policy, extraction levels)   # 1. It plays, and what happens is logged as text.
        experiences  = extract(policy, trajectories)       # 2. It reads them and writes lists of lessons.
        logs         = deploy(policy, deployment levels)   # 1. It plays other levels, to train on their prompts.
        consolidate(policy, logs, experiences)             # 3. The lessons go into its weights.
        evaluate(policy, held-out levels)

Extraction (section 2 of the paper) reads tau_1, tau_2, ... in turn and grows a list of lessons, at first empty:

    E_i = truncate(E_{i-1} + extract(tau_i, E_{i-1}))      (Eq. 1; without --previous, extract(tau_i) alone)

Consolidation is on-policy context distillation. The student pi_theta answers a logged prompt x WITHOUT the
experience e. The teacher, the same model frozen at the start of the round, scores that answer y WITH it:

    L(theta) = E_{x ~ logs, y ~ pi_theta(.|x)} mean_t KL(pi_theta(.|x, y_<t) || pi_teacher(.|e, x, y_<t))  (Eq. 2)

The mean is over all response tokens of a step. Both logits are divided by the temperature. Sampling has no gradient.

Shapes: B batch, T sequence, t its tokens that a pass runs, V vocabulary, D width, N response tokens, R cache rows.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import functools
import importlib
import json
import math
import os
import shutil
import sys
import tempfile
import time
import zlib
from collections import deque, namedtuple
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from filelock import FileLock
from tqdm import tqdm
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, AutoTokenizer, logging

import prompts

TINY = Path(__file__).resolve().parent / "tiny"  # the embedded default policy
FAMILIES = ["llama", "mistral", "olmo2", "qwen2", "qwen3", "smollm3"]  # add yours once its test passes
RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))  # process RANK of WORLD


def option(default, help: str, choices: tuple | None = None):
    kind = {"type": type(default), "choices": choices}
    kind = {"action": argparse.BooleanOptionalAction} if isinstance(default, bool) else kind
    return dataclasses.field(default=default, metadata={"help": f"{help} [{default}]".replace("%", "%%"), **kind})


@dataclasses.dataclass
class Config:
    """The options of the command line. The defaults: the paper's for Qwen3-1.7B, but 3 rounds and an exact KL."""

    model: str = option(str(TINY), "hub name or folder of the policy")
    env: str = option("frozenlake", "frozenlake, biglake, sokoban, or a class of your own as FILE.py:CLASS")
    logs: str = option("", "JSONL file of trajectories to learn from; then nothing is played")
    out: str = option("", "run folder (default: runs/MODEL-ENV-SEED)")
    seed: int = option(1, "seed of everything that is random")
    rounds: int = option(3, "rounds of deploy, extract, consolidate")
    device: str = option("", "cuda, mps or cpu (default: the best available)")
    smoke: bool = option(False, "run one very small round on the named model, to see that everything works")
    thinking: bool = option(True, "let the policy reason before it answers, if its template has the switch")
    reply_limit: int = option(1024, "new tokens in one reply, at most")
    max_turns: int = option(1000, "turns after which an episode is stopped")
    temperature: float = option(0.7, "temperature of every sample, and of both sides of the KL (section 4.1)")
    top_p: float = option(0.8, "nucleus of every sample but the games to train on and training, which use all tokens")
    top_k: int = option(20, "tokens to choose from, in the same phases as --top-p; 0: all")
    strict: bool = option(False, "look for actions behind </think> only; not for models that write none")
    lists: int = option(10, "independently sampled lists of lessons a round")
    episodes: int = option(15, "episodes that each list is folded over; every list gets the same levels")
    form: str = option("free", "form of the lessons", ("free", "items"))
    previous: bool = option(False, "show the extractor the list so far (E_{i-1})")
    reasoning: bool = option(True, "show the extractor the reasoning inside the replies")
    experience_budget: int = option(2048, "most tokens in a list of lessons, and of one extraction's reply")
    experience: str = option("", "file of lessons to consolidate; then none are extracted")
    extractor: str = option("", "another model that writes the lessons (default: the policy itself)")
    context: str = option("items", "teacher sees lessons of any form, raw logs, or nothing", ("items", "raw", "none"))
    distill: str = option("on-policy", "who replies: the student, or the teacher", ("on-policy", "off-policy"))
    kl: str = option("reverse", "direction of the KL", ("reverse", "forward"))
    steps: int = option(20, "optimizer steps a round")
    batch_episodes: int = option(64, "logged episodes a step; each of their prompts is answered once")
    lr: float = option(5e-6, "learning rate, constant")
    weight_decay: float = option(0.01, "weight decay of AdamW")
    adam_eps: float = option(1e-8, "epsilon of AdamW; gradients far below it make small steps, not full ones")
    clip: float = option(1.0, "largest norm of a step's gradient")
    micro_tokens: int = option(8192, "most padded tokens in a forward and backward pass; a longer sample runs alone")
    checkpointing: bool = option(True, "recompute activations in the backward pass to save memory")
    save_every: int = option(10, "steps between the states that a killed consolidation resumes from")
    eval_games: int = option(128, "held-out levels for the pass rate")
    probe_games: int = option(64, "levels for the in-context, unseen and forgetting pass rates")
    eval_every: int = option(0, "also evaluate after every so many steps; 0: after rounds only")
    rows: int = option(0, "replies sampled at once by a process, as far as memory holds them; 0: at most 256")
    dtype: str = option("", "dtype of the model (default: bfloat16 on CUDA)", ("bfloat16", "float32"))
    offload: bool = option(False, "keep float32 weights and AdamW's state in main memory; done where it has to be")
    graphs: bool = option(True, "on CUDA, replay decode steps as graphs; where that fails, run them as they are")


# Settings by model: the paper's (its 4B-Instruct plays Sokoban alone, the others FrozenLake alone), and ours.
BIGGER = {"form": "items", "previous": True, "experience_budget": 8192, "lr": 1e-6, "micro_tokens": 32768}
PRESETS = {
    "Qwen3-1.7B": {},
    "Qwen3-4B": {**BIGGER, "episodes": 25},
    "Qwen3-8B": {**BIGGER, "episodes": 50, "steps": 100},
    "Qwen3-4B-Instruct-2507": {**BIGGER, "env": "sokoban", "thinking": False, "episodes": 50, "steps": 100},
    "SmolLM2-135M-Instruct": {"thinking": False, "reply_limit": 128, "steps": 24, "batch_episodes": 16, "lr": 1e-5},
    "tiny": {"env": "biglake", "form": "items", "reasoning": False, "reply_limit": 256, "experience_budget": 256,
             "temperature": 1.0, "lists": 5, "episodes": 6, "steps": 24, "batch_episodes": 5, "lr": 1.5e-4,
             "adam_eps": 1e-4, "checkpointing": False, "micro_tokens": 1024, "probe_games": 32},
}  # fmt: skip
SMOKE = {"rounds": 1, "lists": 2, "episodes": 2, "steps": 1, "batch_episodes": 4, "reply_limit": 32,
         "experience_budget": 32, "eval_games": 4, "probe_games": 4}  # fmt: skip


class UsageError(ValueError):
    """An error that the user can fix. Its one line says what was wrong, where, and what to do."""


def require(condition, problem: str) -> None:
    if not condition:
        raise UsageError(problem)


def derive_seed(*parts: int) -> int:
    """One 32-bit seed from several numbers (run seed, round, phase, ...)."""
    return int(np.random.SeedSequence((len(parts), *parts)).generate_state(1)[0])


Phase = namedtuple("Phase", "levels seed nucleus")  # what to play, and how to sample the replies
Sample = namedtuple("Sample", "prompt_ids teacher_ids response_ids")  # student's prompt, teacher's, reply y
# Code that talks to the model is a generator: `response = yield Request(...)`. `drive`, below, runs many at once.
Request = namedtuple("Request", "prompt_ids max_new_tokens")  # a prompt, and the largest length of its reply
Response = namedtuple("Response", "ids finish")  # the reply, with its stop id if any; "stop" or "length"


def run(cfg: Config) -> list[dict]:
    """The algorithm at the top of this file; returns metrics.jsonl. A stage with a record is not run again."""
    out, device = Path(cfg.out), find_device(cfg.device)
    with contextlib.nullcontext() if RANK else FileLock(f"{out.resolve()}.lock", blocking=False):
        own, experience, settings = check_inputs(cfg, out)
        done = gather(max([r for r in range(cfg.rounds + 1) if (out / f"round{r}/model").exists()], default=0))[0]
        source = str(out / f"round{done}/model") if done else cfg.model
        policy = load_policy(source, device, cfg.thinking, cfg.dtype, cfg.offload)
        require(cfg.logs or len(read_jsonl(out / "metrics.jsonl")) >= done, f"{out} lacks metrics: use another --out")
        texts = [experience + turn["prompt"] for log in own for turn in log["turns"]] or [experience]  # do they fit?
        budget = 0 if experience or cfg.context == "none" else cfg.experience_budget
        check_fits(policy.model, budget + max(len(policy.encode(x)) for x in texts), cfg.reply_limit)
        atomic(out / "config.json", lambda part: part.write_text(json.dumps(settings, indent=2) + "\n"))
        if cfg.logs:  # the user's logs take the place of what deploy would record
            write_jsonl(out / "round1/trajectories.jsonl", [log for log in own if not log["anchor"]])
            write_jsonl(out / "round1/logs.jsonl", [own[i % len(own)] for i in range(cfg.steps * cfg.batch_episodes)])
        measure(policy, cfg, 0, 0, out, time.perf_counter())
        for r in range(max(done, 1), cfg.rounds + 1):  # round `done` again: its evaluation may be missing
            play_round(policy, cfg, r, out)
        metrics = gather(read_jsonl(out / "metrics.jsonl"))[0]
    rows = [row for row in metrics if row["step"] in (0, cfg.steps)]
    print("ok" if cfg.smoke else f"done: {out}/round1/model" if cfg.logs else table(rows))
    return metrics


def phases(cfg: Config, r: int) -> dict[str, Phase]:
    """What round r plays, and how. A level is played in one phase of one round, but held-out levels in all rounds."""
    levels = (lambda *_: []) if cfg.logs else importlib.import_module("envs").level_seeds  # logs: nothing is played
    n, seed = cfg.steps * cfg.batch_episodes, functools.partial(derive_seed, cfg.seed)
    k = 0 if cfg.experience or cfg.context == "none" else cfg.episodes  # 0: no lessons are extracted
    return {
        "games to extract from": Phase(levels("extraction", k, r * k) * cfg.lists, seed(r, 0), nucleus=True),
        "extraction": Phase([], seed(r, 1), nucleus=True),
        "games to train on": Phase(levels("deployment", n, r * n), seed(r, 2), nucleus=False),
        "training": Phase([], seed(r, 3), nucleus=False),
        "evaluation": Phase(levels("held_out", cfg.eval_games), seed(0), nucleus=True),  # equal in all rounds
        "probes": Phase(levels("held_out", cfg.probe_games), seed(0), nucleus=True),
    }


def play_round(policy: Policy, cfg: Config, r: int, out: Path) -> None:
    """Round r of the algorithm. Changes the policy in place."""
    began, plan, folder = time.perf_counter(), phases(cfg, r), out / f"round{r}"

    def on_step(step: int, row: dict) -> None:
        add_row(out / "steps.jsonl", {"round": r, "step": step, **row})
        tqdm.write(f"round {r} step {step}: " + ", ".join(f"{name} {x:.4g}" for name, x in row.items()))
        if cfg.eval_every and step % cfg.eval_every == 0 and step < cfg.steps:
            measure(policy, cfg, r, step, out, began)

    if not gather((folder / "model").exists())[0]:  # process 0 decides: another machine may see a new file late
        # 1. and 2. Play, and write lists of lessons. `recorded` runs a stage, or reads what it wrote before.
        played = recorded(folder / "trajectories.jsonl", deploy, policy, cfg, plan["games to extract from"])
        lists = None  # --context none: a control without lessons
        if cfg.context != "none":
            lists = recorded(folder / "experience", extract, policy, cfg, played, plan["extraction"])
            recorded(folder / "in_context.jsonl", deploy, policy, cfg, plan["probes"], lists)  # a metric
        # 1. again. Play other levels; each of their prompts will be trained on once.
        logs = recorded(folder / "logs.jsonl", deploy, policy, cfg, plan["games to train on"])
        complete = len(logs) == cfg.steps * cfg.batch_episodes and all(x.strip() for x in lists or [])
        require(complete, f"{folder}: logs.jsonl or experience/ was cut: remove it, and it is made again")
        # 3. Train towards playing without the lessons as the policy did with them, for `cfg.steps` steps.
        consolidate(policy, cfg, logs, lists, plan["training"], folder / "state/step.pt", on_step)
        save_model(folder / "model", policy)
    shutil.rmtree(folder / "state", ignore_errors=True)
    measure(policy, cfg, r, cfg.steps, out, began)


def measure(policy: Policy, cfg: Config, r: int, step: int, out: Path, began: float) -> None:
    """Evaluate and add a row to metrics.jsonl, unless the row is there or nothing can be played (--logs)."""
    if cfg.logs or gather(any((x["round"], x["step"]) == (r, step) for x in read_jsonl(out / "metrics.jsonl")))[0]:
        return
    metrics, played = evaluate(policy, cfg, phases(cfg, r))
    write_jsonl(out / f"round{r}/held_out.jsonl", played)
    metrics["in_context_pass_rate"] = pass_rate(read_jsonl(out / f"round{r}/in_context.jsonl"))  # before training
    row = {"round": r, "step": step, **metrics, "seconds": time.perf_counter() - began}
    add_row(out / "metrics.jsonl", row)
    tqdm.write(table([row]))


# --- deploy: the user side, and the only part that plays --------------------------------------------------
def deploy(policy: Policy, cfg: Config, phase: Phase, experiences=None, variant: str = "") -> list[dict]:
    """Play one episode on each of the phase's levels; return the trajectories, [] if the game lacks the variant.
    Only probes play a variant ("renamed" shows the rules) or show `experiences`: episode i reads list i mod L."""

    def play(i: int, level: int):  # a generator: the game is made when it is its turn to be played
        if (game := make_game(cfg, variant, seed=i)) is None:
            return None
        with game_errors(f"--env {cfg.env} {variant}".strip()):
            game.strict = cfg.strict and cfg.thinking  # without thinking there is no closing tag to wait for
            lists = [prompts.as_items(game.rules())] if variant == "renamed" else experiences or [None]
        name, experience = f"{variant}{i}-level{level}", lists[i % len(lists)]
        with contextlib.closing(game) if hasattr(game, "close") else contextlib.nullcontext():
            return (yield from episode(policy, game, level, name, cfg.reply_limit, experience, cfg.max_turns))

    episodes = [play(i, level) for i, level in enumerate(phase.levels)]
    return [x for x in drive(policy.model, episodes, **sampling(policy, cfg, phase, variant or "deploy")) if x]


def episode(policy: Policy, game, level: int, name: str, reply_limit: int, experience=None, max_turns=1000):
    """Play one episode, as a generator that returns the trajectory {"id", "turns", "outcome"}. A turn is a dict of
    "prompt", WITHOUT experience, "response", and "feedback", the game's next words. "outcome" is for metrics."""
    turns, done, won, where = [], False, False, f"{type(game).__name__}, level {level}"
    counts = {"reply_tokens": 0, "truncated": 0, "unclosed": 0}
    with game_errors(where):
        observations = [prompts.checked_text(game.reset(level))]
        task = prompts.checked_text(getattr(game, "task", ""))
    while not done and len(turns) < max_turns:
        prompt = prompts.play_prompt(task, observations)
        message = prompt if experience is None else prompts.with_experience(prompt, experience)
        response = yield Request(policy.encode(message), reply_limit)
        reply = policy.decode(response.ids)
        with game_errors(f"{where}, turn {len(turns) + 1}"):
            feedback, done = game.step(reply)
            observations.append(prompts.checked_text(feedback))
            won, done, counts["invalid"] = bool(game.won), bool(done), int(getattr(game, "invalid_moves", 0))
        turns.append({"prompt": prompt, "response": reply, "feedback": feedback})
        counts["reply_tokens"] += len(response.ids)
        counts["truncated"] += response.finish == "length"
        counts["unclosed"] += "<think>" in reply and "</think>" not in reply
    if not done:
        tqdm.write(f"{where}: stopped after turn {max_turns} (--max-turns)", file=sys.stderr)
    return {"id": name, "turns": turns, "outcome": {"won": won, "turns": len(turns), **counts}}


@contextlib.contextmanager
def game_errors(where: str):
    """Print the traceback of whatever a game raises, and raise a UsageError that says where it was."""
    try:
        yield
    except Exception as error:
        sys.excepthook(*sys.exc_info())
        raise UsageError(f"{where}: {error!r}; correct the game, and the same command continues") from error


def make_game(cfg: Config, variant: str = "", seed: int = 0):
    """A game, or its variant "unseen" (other sizes) or "renamed" (new letters); None where it has no such variant."""
    file, _, name = cfg.env.rpartition(":")
    with game_errors(f"--env {cfg.env}"):
        envs = importlib.import_module("envs")  # not at the top: --logs needs no game
        games = envs.games_in(file) if not file or Path(file).exists() else {}
        maker = getattr(games.get(name), variant, None) if variant else games.get(name)
        game = None if maker is None else maker(seed=seed) if variant == "renamed" else maker()
    require(maker or variant, f"--env {cfg.env}: no game {name}; choose {', '.join(envs.GAMES)}, or FILE.py:CLASS")
    return game


def sampling(policy: Policy, cfg: Config, phase: Phase, desc: str) -> dict:
    """The options with which a phase calls the sampler."""
    how = {"stop_ids": policy.stop_ids, "vocab_size": policy.vocab_size, "temperature": cfg.temperature}
    how |= {"top_p": cfg.top_p, "top_k": cfg.top_k} if phase.nucleus else {}
    how |= {"graphs": cfg.graphs and getattr(policy.model, "graphs_work", policy.model.device.type == "cuda")}
    return {**how, "rows": cfg.rows, "seed": phase.seed, "desc": desc}


# --- extract: text in, text out ---------------------------------------------------------------------------
def extract(policy: Policy, cfg: Config, trajectories: list[dict], phase: Phase) -> list[str]:
    """Write up to `cfg.lists` lists in parallel, each from its own share of the trajectories; drop empty ones."""
    if cfg.experience:
        return [Path(cfg.experience).read_text("utf-8-sig").strip()]
    limit = {"budget": cfg.experience_budget, "count_tokens": policy.count_tokens}  # not the extractor's tokens
    size = math.ceil(len(trajectories) / cfg.lists)  # of a share; in games it has each level once
    shares = [trajectories[i : i + size] for i in range(0, len(trajectories), size)]
    if cfg.context == "raw":  # the baseline: the logs themselves, up to the same number of tokens
        lists = [prompts.raw_experience(x, cfg.reasoning, **limit) for x in shares]
    else:  # A chain is read in turn (Eq. 1): with --previous a whole share, else a single trajectory.
        if cfg.extractor:
            policy = load_policy(cfg.extractor, policy.model.device, cfg.thinking, cfg.dtype, offload=None)
        chains, n = (shares, 1) if cfg.previous else ([[x] for x in trajectories], size)  # n make a list (Eq. 1)
        folds = [lesson_list(policy, cfg, chain) for chain in chains]
        parts = drive(policy.model, folds, **sampling(policy, cfg, phase, "extract"))
        lists = [prompts.accumulate("", "\n".join(parts[i : i + n]), **limit) for i in range(0, len(parts), n)]
    lists += [prompts.as_items(["Look before every move."])] if cfg.smoke else []  # so few tokens hold no lesson
    require(any(lists), "no lesson in any list: try more --experience-budget, --form free or another model")
    return [experience for experience in lists if experience]


def lesson_list(policy: Policy, cfg: Config, trajectories: list[dict]):
    """Grow a list of lessons, at first empty, from trajectories in turn; without --previous from one. A generator."""
    experience, budget = "", cfg.experience_budget
    for trajectory in trajectories:
        message = prompts.extraction_prompt(trajectory, experience if cfg.previous else "", cfg.form, cfg.reasoning)
        response = yield Request(policy.encode(message), budget)
        lessons = prompts.parse_lessons(policy.decode(response.ids), cfg.form)
        experience = prompts.accumulate(experience, lessons, budget, policy.count_tokens)  # Eq. 1
    return experience


# --- consolidate: the only part that changes weights ------------------------------------------------------
def consolidate(policy, cfg, logs: list[dict], experiences, phase: Phase, state=None, on_step=lambda *_: None):
    """Distil the lists into the policy's weights (Eq. 2); `experiences` None is a control. A step takes the next
    `cfg.batch_episodes` logs. `state`: file to resume from. FloatingPointError if a step is not finite."""
    teacher = copy.deepcopy(policy.model).requires_grad_(False).eval()  # the policy with which the round began
    optimizer = torch.optim.AdamW(policy.master, cfg.lr, (0.9, 0.999), cfg.adam_eps, cfg.weight_decay, fused=True)
    policy.model.train()  # checkpointing needs training mode; these models have no dropout
    if cfg.checkpointing:
        new = getattr(policy.model, "activation_checkpointing_enable", None)  # its name in newer transformers
        (new or policy.model.gradient_checkpointing_enable)({"use_reentrant": False})
    done = 0
    if RANK == 0 and state and state.exists():  # continue a consolidation that was stopped
        try:
            done, weights, moments = torch.load(state, map_location="cpu", weights_only=True).values()
            optimizer.load_state_dict(moments)
            for master, weight in zip(policy.master, weights, strict=True):
                master.data.copy_(weight)
        except Exception as error:
            raise UsageError(f"{state} is damaged: remove it, and this consolidation begins again") from error
    done = gather(done)[0]  # process 0 alone has read the state; copy_master gives its weights to all
    policy.copy_master()
    for step in range(done + 1, cfg.steps + 1):
        began = time.perf_counter()
        samples = sample_responses(policy, teacher, cfg, logs, experiences, phase, step)
        loss = distill(policy, teacher, samples, cfg)
        grad_norm = torch.nn.utils.clip_grad_norm_(policy.master, cfg.clip).item()
        if not math.isfinite(loss + grad_norm):
            raise FloatingPointError(f"step {step}: loss {loss}, gradient {grad_norm}; no weight was changed")
        optimizer.step()
        optimizer.zero_grad()
        policy.copy_master()
        row = {"loss": loss, "grad_norm": grad_norm, "tokens": sum(len(s.response_ids) for s in samples)}
        on_step(step, {**row, "replies": len(samples), "seconds": time.perf_counter() - began})
        if state and step % cfg.save_every == 0 and step < cfg.steps:
            progress = {"step": step, "master": policy.master, "optimizer": optimizer.state_dict()}
            atomic(state, functools.partial(torch.save, progress))


def sample_responses(policy, teacher, cfg, logs, experiences, phase: Phase, step: int) -> list[Sample]:
    """Answer each prompt of the step's logs once: y ~ pi_theta(.|x), or off-policy y ~ pi_teacher(.|e, x)."""
    rng, texts = np.random.default_rng(derive_seed(phase.seed, step)), []
    for log in logs[(step - 1) * cfg.batch_episodes : step * cfg.batch_episodes]:
        for x in (turn["prompt"] for turn in log["turns"]):
            told = experiences is not None and not log.get("anchor")  # else both models read the same prompt
            texts += [x, prompts.with_experience(x, experiences[rng.integers(len(experiences))]) if told else x]
    ids = prompts.chat_ids(policy.tokenizer, texts, policy.thinking)  # in one call, which uses all cores
    prompt_ids, teacher_ids = ids[::2], ids[1::2]
    check_fits(teacher, max(map(len, teacher_ids)), cfg.reply_limit)
    phase = phase._replace(seed=derive_seed(phase.seed, step, 1))  # new noise in every step
    who = (teacher, teacher_ids) if cfg.distill == "off-policy" else (policy.model, prompt_ids)
    ys = sample(*who, max_new_tokens=cfg.reply_limit, **sampling(policy, cfg, phase, f"step {step}/{cfg.steps}"))
    return [Sample(x, e_x, y.ids) for x, e_x, y in zip(prompt_ids, teacher_ids, ys, strict=True)]


def distill(policy: Policy, teacher, samples: list[Sample], cfg: Config) -> float:
    """Put the gradient of Eq. 2 over the samples into the `.grad` of `policy.master`; return the loss in nats.
    Both are the mean over all response tokens of the samples, however these are cut into micro-batches."""
    student, num_tokens = policy.model, sum(len(s.response_ids) for s in samples)
    batches, losses = micro_batches(samples, cfg.micro_tokens), [torch.zeros((), device=student.device)]
    for batch in batches[RANK::WORLD]:
        prompt_ids, teacher_ids, response_ids = zip(*batch)
        # 1. The teacher. A shared prefix runs once. Equal prompts run like the student: equal weights give a KL of 0.
        shared = len(batch) > 1 and teacher_ids != prompt_ids
        prefix = prompts.common_prefix([x[:-1] for x in teacher_ids]) if shared else 0  # one id is left to run
        with torch.no_grad():
            teacher_hidden = response_hidden(teacher, teacher_ids, response_ids, prefix)
        # 2. The student, with a graph for the backward pass: hidden states (N, D).
        hidden = response_hidden(student, prompt_ids, response_ids)
        # 3. Eq. 2, from the hidden states and the heads (V, D) without the rows that the tokenizer never uses.
        heads = [m.get_output_embeddings().weight[: policy.vocab_size] for m in (student, teacher)]
        kl, *grads = reverse_kl(hidden, teacher_hidden, *heads, cfg.temperature, cfg.kl)
        losses.append(kl.sum())
        # 4. The rest of the backward pass, through the decoder. The float32 gradient of the head is freed before it.
        grads = {x: g.div_(num_tokens).to(x.dtype) for x, g in zip((hidden, heads[0]), grads) if g is not None}
        torch.autograd.backward([*grads], [*grads.values()])
        policy.add_grads_to_master()
    if 0 < len(batches) % WORLD <= RANK:  # no batch was left for this process, and the others wait for it
        policy.add_grads_to_master()
    return sum(gather(torch.stack(losses).cpu().double().sum().item())) / num_tokens


@torch.no_grad()
def reverse_kl(hs, ht, ws, wt, temperature: float, direction="reverse", *, chunk=256):
    """KL(student || teacher) at N positions, in nats and exact over V, and the gradients of its sum (Eq. 2).

    Takes hidden states (N, D), heads (V, D) and the temperature. Returns the KL (N,) and its gradients wrt hs
    (N, D) and ws (V, D; None if it is frozen). "forward" is KL(teacher || student). For reverse, with
    p = softmax(hs ws.T / temperature), q that of the teacher, and d = log p - log q, the KL is sum_j p_j d_j, and its
    gradient wrt the student's logits p_j (d_j - KL) / temperature. When one p_j is nearly 1, its d_j and the KL agree
    in almost all digits, and rounding destroys d_j - KL. So we first subtract that d_j from both."""
    require((len(hs), len(ws)) == (len(ht), len(wt)), f"sizes do not match: {[len(x) for x in (hs, ht, ws, wt)]}")
    exact = torch.float64 if hs.dtype == torch.float64 else torch.float32
    kl, hidden_grad = [], torch.empty_like(hs)
    head_grad = torch.zeros_like(ws, dtype=exact) if ws.requires_grad else None
    # The (N, V) logits never exist at once: n positions at a time, in three (n, V) buffers, work, log_p and log_q.
    # To save memory each is overwritten: work by the logits, d and the gradient, log_p by p, log_q by q or p * d.
    buffers = torch.empty(3, min(chunk, len(hs)), len(ws), dtype=exact, device=hs.device)
    # In float32 `products` and `grads` are `work` itself; in bf16 both are one more buffer, with aligned rows.
    space = buffers[0] if hs.dtype == exact else buffers.new_empty(len(buffers[0]), round_up(len(ws), 64))
    wide = {"out_dtype": exact} if hs.is_cuda and hs.dtype != exact else {}  # float32 products
    grads, products = (space.view(kind)[:, : len(ws)] for kind in (hs.dtype, exact if wide else hs.dtype))
    for start in range(0, len(hs), chunk):
        rows = slice(start, start + chunk)
        work, log_p, log_q = buffers[:, : len(hs[rows])]
        for hidden, head, log_probs in ((hs, ws, log_p), (ht, wt, log_q)):
            logits = work.copy_(torch.mm(hidden[rows], head.T, **wide, out=products[: len(work)]))
            torch.log_softmax(logits.div_(temperature), -1, out=log_probs)
        d, p = torch.sub(log_p, log_q, out=work), log_p.exp_()
        if direction == "forward":  # -sum_j q_j d_j, with the gradient p_j - q_j
            kl.append(-torch.linalg.vecdot(q := log_q.exp_(), d))
            grad = torch.sub(p, q, out=work)
        else:
            d.sub_(offset := d.gather(-1, p.argmax(-1, keepdim=True)))  # (n, 1)
            mean = torch.mul(p, d, out=log_q).sum(-1, keepdim=True)  # (n, 1)
            kl.append((mean + offset)[:, 0])
            grad = d.sub_(mean).mul_(p)
        grad = grads[: len(work)].copy_(grad.div_(temperature))
        hidden_grad[rows] = grad @ ws
        if head_grad is not None:
            head_grad.add_(grad.T @ hs[rows])  # chunks of bf16 are summed in float32
    return torch.cat(kl), hidden_grad, head_grad


def response_hidden(model, prompt_ids: list[list[int]], response_ids: list[list[int]], prefix: int = 0):
    """Hidden states (N, D) from which the response tokens are predicted. Replies are found by length, not by id, so
    a sampled stop token counts. The first `prefix` ids, equal in all prompts, run once."""
    decoder, cache = model.get_decoder(), None
    there = {"device": model.device, "non_blocking": model.device.type == "cuda"}
    if prefix:
        cache = decoder(input_ids=torch.tensor([prompt_ids[0][:prefix]]).to(**there), use_cache=True).past_key_values
        cache.batch_repeat_interleave(len(prompt_ids))
    sequences = [prompt[prefix:] + reply for prompt, reply in zip(prompt_ids, response_ids, strict=True)]
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(x) for x in sequences], batch_first=True)  # (B, T)
    # In the flattened (B * T) ids, each response token is predicted at the place before its own.
    ends = [row * ids.shape[1] + len(tokens) - 1 for row, tokens in enumerate(sequences)]
    places = torch.tensor([i for end, reply in zip(ends, response_ids) for i in range(end - len(reply), end)])  # (N,)
    hidden = decoder(input_ids=ids.to(**there), past_key_values=cache, use_cache=prefix > 0)[0]  # (B, T, D)
    return hidden.flatten(0, 1).index_select(0, places.to(**there))


def micro_batches(samples: list[Sample], budget: int) -> list[list[Sample]]:
    """Cut samples into batches that share an experience and cost at most `budget` padded tokens, or hold one sample.
    The teacher's prompt counts a quarter, because its pass keeps nothing for a backward pass."""
    experience = lambda s: s.teacher_ids[: len(s.teacher_ids) - len(s.prompt_ids)]  # it stands first in the prompt
    cost = lambda s: max(len(s.prompt_ids), len(s.teacher_ids) // 4) + len(s.response_ids)
    batches = []
    for s in sorted(samples, key=lambda s: (experience(s), cost(s))):
        if not batches or experience(s) != experience(batches[-1][0]) or (len(batches[-1]) + 1) * cost(s) > budget:
            batches.append([])
        batches[-1].append(s)
    return batches


def evaluate(policy: Policy, cfg: Config, plan: dict[str, Phase]) -> tuple[dict, list[dict]]:
    """The metrics of a policy on held-out levels, and the trajectories behind its pass rate."""
    played = deploy(policy, cfg, plan["evaluation"])
    total = {key: sum(t["outcome"][key] for t in played) for key in played[0]["outcome"]}
    metrics = {"pass_rate": pass_rate(played), "reply_tokens": total["reply_tokens"] / total["turns"]}
    for name, variant in (("unseen", "unseen"), ("forgetting", "renamed")):
        metrics[f"{name}_pass_rate"] = pass_rate(deploy(policy, cfg, plan["probes"], variant=variant))
    return metrics | {f"{x}_rate": total[x] / total["turns"] for x in ("invalid", "truncated", "unclosed")}, played


def pass_rate(trajectories: list[dict]) -> float | None:
    return sum(t["outcome"]["won"] for t in trajectories) / len(trajectories) if trajectories else None


# --- the policy -------------------------------------------------------------------------------------------
@dataclasses.dataclass
class Policy:
    """A model with its tokenizer: text in, text out. In bf16 on CUDA and in float32 elsewhere (--dtype)."""

    model: torch.nn.Module
    tokenizer: object
    master: list[torch.Tensor]  # float32 parameters, optimized and saved by process 0: bf16 would lose a step of 1e-6
    stop_ids: frozenset[int]
    vocab_size: int  # ids the tokenizer knows; a head may have more rows, which are never sampled or scored
    thinking: bool = True

    def encode(self, message: str) -> list[int]:
        return prompts.chat_ids(self.tokenizer, [message], self.thinking)[0]

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def count_tokens(self, text: str) -> int:
        return len(prompts.plain_ids(self.tokenizer, [text])[0])

    def add_grads_to_master(self) -> None:  # a p that is its own master has its gradient already
        for p, master in zip(self.model.parameters(), self.master, strict=True):
            if p is not master and p.requires_grad:
                grad, p.grad = torch.zeros_like(p) if p.grad is None else p.grad, None
                WORLD > 1 and dist.reduce(grad := grad.float(), 0)
                if RANK == 0:  # non_blocking: through pinned memory, and in float32, which a CPU adds far faster
                    grad = grad.to(master.device, master.dtype, non_blocking=p.is_cuda)
                    p.is_cuda and not master.is_cuda and torch.cuda.current_stream().synchronize()  # until it arrives
                    master.grad = (torch.zeros_like(master) if master.grad is None else master.grad).add_(grad)

    def copy_master(self) -> None:  # brings the model up to date, in every process
        for p, master in zip(self.model.parameters(), self.master, strict=True):
            if RANK == 0:
                p.data.copy_(master)
            WORLD > 1 and dist.broadcast(p.data, 0)


def load_policy(source: str, device: torch.device, thinking=True, dtype="", offload: bool | None = False) -> Policy:
    """Load a policy. Options as in Config, but `offload` None: it will not be trained. UsageError if that fails."""
    half = (dtype or ("bfloat16" if device.type == "cuda" else "float32")) == "bfloat16"
    kind = torch.bfloat16 if half and (RANK or offload is None) else torch.float32  # float32 for masters
    try:
        [json.loads(file.read_bytes()) for file in Path(source).glob("*.json")]  # transformers may skip a damaged one
        tokenizer = AutoTokenizer.from_pretrained(source)
        how = {"dtype": kind, "attention_dropout": 0.0, "use_safetensors": True, "output_loading_info": True}
        config = AutoConfig.from_pretrained(source)  # our cache cannot do sliding windows, rotary scaling by length
        window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
        rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type")
        good = config.model_type in FAMILIES and not window and rope not in ("dynamic", "longrope")
        what = f"{config.model_type} with sliding window {window} and rotary embedding {rope} is not supported"
        require(good, f"{what}; choose {', '.join(FAMILIES)} with full attention")
        model, info = AutoModelForCausalLM.from_pretrained(source, **how)
        prompts.chat_ids(tokenizer, ["OEL"], thinking)  # raises what is wrong with the chat template
        eos = getattr(model.generation_config, "eos_token_id", None)
        stops = {*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id} - {None}
        vocab_size, ids = max(tokenizer.get_vocab().values()) + 1, model.config.vocab_size
        finite = all(p.isfinite().all() for p in model.parameters())
        require(finite and not any(info.values()), f"its weights lack or add something, or are not finite: {info}")
        require(vocab_size <= ids, f"its tokenizer has {vocab_size} ids, but its model only {ids}")
        require(stops and tokenizer.encode("OEL", add_special_tokens=False), "no stop token or no vocabulary")
    except Exception as error:  # noqa: BLE001 (whatever is wrong with the files)
        raise UsageError(f"no policy in {source!r}: {' '.join(str(error).split())[:300]}") from None
    master = params = list(model.eval().parameters())
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)  # the one for streams and graphs
        n, free = sum(p.numel() for p in params), torch.cuda.mem_get_info(device)[0]
        need = n * (2 if half else 4) * (1 if offload is None else 3)  # bytes of student, teacher and gradient
        require(need < 0.92 * free, f"{source} needs {need >> 30} of {free >> 30} GiB; take a smaller model")
        offload = n * (22 if half else 20 if WORLD == 1 else 28) > 0.85 * free if offload is False else offload
    if half or offload or WORLD > 1:  # else the parameters are their own masters
        master = [torch.empty(0) if RANK else p.detach().to(device if offload is False else "cpu") for p in params]
        for p in params:  # not model.to(bf16), which would also round the rotary frequencies
            p.data = p.data.to(torch.bfloat16 if half else p.dtype)
    torch.backends.cuda.enable_cudnn_sdp(False)  # it makes a plan for every new shape, and most of ours are new
    return Policy(model.to(device), tokenizer, master, frozenset(stops), vocab_size, thinking)


def check_fits(model, prompt_len: int, reply_len: int) -> None:
    context = getattr(model.config, "max_position_embeddings", math.inf)
    fits = min(prompt_len, reply_len) > 0 and prompt_len + reply_len <= context
    require(fits, f"{prompt_len} tokens of prompt and lessons + {reply_len} of reply exceed a context of {context}")


def find_device(name: str = "") -> torch.device:
    best = getattr(torch.accelerator.current_accelerator(check_available=True), "type", "cpu")  # mps, ...
    if WORLD > 1 and (name or best).startswith("cuda"):  # each process takes its own, whatever is typed
        name = f"cuda:{os.environ.get('LOCAL_RANK', RANK)}"
    known = ["", "cpu", "cpu:0", best, *(f"{best}:{i}" for i in range(torch.accelerator.device_count()))]
    require(name in known, f"--device {name} is not available; the best one is {best}")
    return torch.device(name or best)


# --- the sampler ------------------------------------------------------------------------------------------
Job = namedtuple("Job", "owner turn request ids")  # index of the generator, and of its request; ids: the reply so far
View = namedtuple("View", "cache rows row_ids positions reach lengths")  # for attend; lengths may be None


def sample(model, prompt_ids: list[list[int]], *, max_new_tokens: int, **options) -> list[Response]:
    """One reply of at most `max_new_tokens` to each prompt of token ids; options as in `Sampler`."""
    ask = lambda ids: (yield Request(ids, max_new_tokens))  # a generator that returns the response
    return drive(model, [ask(ids) for ids in prompt_ids], **options)


def drive(model, generators: list, *, desc: str | None = None, **options) -> list:
    """Run generators that yield Requests and are sent Responses; return what they return. See `Sampler`."""
    with contextlib.ExitStack() as undo, torch.inference_mode():
        AttentionInterface.register("oel", attend)
        undo.callback(torch.cuda.empty_cache)  # else what training keeps is put into this cache's memory
        undo.callback(model.train, model.training)  # afterwards the model is as it was before
        undo.callback(model.set_attn_implementation, model.config._attn_implementation)
        undo.callback(lambda: [x.close() for x in generators])  # where one has failed, the others end too
        model.eval().set_attn_implementation("oel")
        bar = tqdm(total=len(generators), desc=desc, leave=False, disable=RANK > 0 or not desc, mininterval=0.5)
        results = gather(Sampler(model, generators, undo.enter_context(bar), **options).run())
    return [results[i % WORLD][i] for i in range(len(generators))]


def gather(mine) -> list:
    """What every process gives, in all of them, once all are here. `gather(x)[0]` is what process 0 says."""
    everyone = [mine] * WORLD
    WORLD > 1 and dist.all_gather_object(everyone, mine)
    return everyone


class Sampler:
    """Continuous batching: new prompts take the rows of replies that ended, while others go on. The noise of a reply
    depends on (seed, which generator, which of its requests) alone. UsageError if a request exceeds the context."""

    def __init__(self, model, generators, bar, *, stop_ids, seed=0, rows=0, vocab_size=None, graphs=False, **picking):
        self.model, self.generators, self.bar, self.vocab_size = model, generators, bar, vocab_size
        self.stop_ids, self.seed, self.graphs, self.cuda = stop_ids, seed, graphs, model.device.type == "cuda"
        self.pick, self.flash = functools.partial(pick, **picking), self.cuda and flash_works(model)
        self.head = model.get_output_embeddings().weight[: vocab_size and round_up(vocab_size, 64)]
        self.results, self.waiting = [None] * len(generators), deque()  # waiting: jobs that have no row yet
        self.unstarted = deque(range(RANK, len(generators), WORLD))  # generators that have not been asked yet
        self.cache, self.row_len = KVCache(model, 0, 0), 1  # row_len: tokens that a row must hold, prompt and reply
        self.jobs, self.captured = [], {}  # each row's job, or None; sizes of a decode step -> its graph, or None
        torch.cuda.empty_cache()  # has no effect without CUDA
        memory = torch.cuda.mem_get_info(model.device)[0] if self.cuda else 12 << 30  # bytes
        self.token_budget = memory * 2 // 5 // KVCache(model, 1, 1).kv.nbytes  # an old and a larger cache coexist
        self.max_rows = min(rows or 256, len(self.unstarted))

    def run(self) -> list:
        self.admit()
        while any(self.jobs):
            newest = self.cache.token[: len(self.jobs)].clone().to("cpu", non_blocking=self.cuda)
            wait = torch.cuda.current_stream().record_event().synchronize if self.cuda else lambda: None
            self.decode()  # ahead: in vain for replies that end here, but the GPU never waits for the host
            wait()  # for the copy alone
            self.retire(newest.tolist())
            self.admit()
        return self.results

    def advance(self, owner: int, turn: int, response: Response | None) -> None:
        """Send a generator its response (None starts it). Its first request waits at the end, others in front."""
        try:
            request = self.generators[owner].send(response)
        except StopIteration as stop:
            self.results[owner] = stop.value
            self.bar.update(WORLD)  # the others are about as far
            return
        check_fits(self.model, len(request.prompt_ids), request.max_new_tokens)
        self.waiting.insert(0 if turn else len(self.waiting), Job(owner, turn, request, []))
        self.row_len = max(self.row_len, round_up(len(request.prompt_ids) + request.max_new_tokens, 256))

    def admit(self) -> None:
        """Have up to `max_rows` generators started. Prefill once over 1/8 of the rows are free or all can start."""
        used = sum(job is not None for job in self.jobs)
        while self.unstarted and used + len(self.waiting) < self.max_rows:
            self.advance(self.unstarted.popleft(), 0, None)
        capacity = max(1, min(self.max_rows, self.token_budget // self.row_len))
        free, wanted = capacity - used, len(self.waiting) + len(self.unstarted)
        if not self.waiting or free < min(wanted, capacity // 8 + 1):
            return
        if self.row_len > self.cache.length:
            self.compact()
            larger = KVCache(self.model, capacity, self.row_len)
            for row in range(len(self.jobs)):
                larger.copy_row(row, self.cache, row, self.cache.length)
            self.cache, self.captured = larger, {}  # the graphs read the old cache
        n = len(self.waiting) if self.jobs else 1  # the first one alone: then others copy what they share with it
        self.jobs += [None] * (capacity - len(self.jobs))
        self.prefill(self.assign_rows(n))

    def assign_rows(self, n: int) -> list[tuple[int, int, int]]:
        """Give n jobs a row each, and copy what is known of their prompts: [(tokens to run, tokens copied, row)]."""
        # A vacant donor goes to the first job that matches it; whoever else copies from it is placed later.
        vacant, placed = [row for row, job in enumerate(self.jobs) if job is None], []
        for job in [self.waiting.popleft() for _ in range(min(n, len(vacant)))]:
            ids = job.request.prompt_ids  # the last of them must run, whatever is known of the others
            common = (self.cache.prompts[:, : len(ids)] == ids).cumprod(1).sum(1)
            donor, shared = int(common.argmax()), min(int(common.max()), len(ids) - 1)
            row = donor if donor in vacant else vacant[0]
            vacant.remove(row)
            self.jobs[row] = job
            placed.append((row, donor, shared))
        for row, donor, shared in reversed(placed):  # in reverse: each copies before its donor is overwritten
            if row != donor:
                self.cache.copy_row(row, self.cache, donor, shared)
        return [(len(self.jobs[row].request.prompt_ids) - shared, shared, row) for row, _, shared in placed]

    def retire(self, tokens: list[int]) -> None:
        """Add each row's newest token to its reply. Where that ends the reply, advance its generator."""
        for row, (job, token) in enumerate(zip(self.jobs, tokens, strict=True)):
            if job:  # else its reply ended before, and the row is still decoded, but ignored
                job.ids.append(token)
                finish = "stop" if token in self.stop_ids else "length"
                if finish == "stop" or len(job.ids) == job.request.max_new_tokens:
                    self.jobs[row] = None
                    self.advance(job.owner, job.turn + 1, Response(job.ids, finish))
        if not self.waiting and not self.unstarted:  # nothing will fill the free rows
            self.compact()

    def compact(self) -> None:
        """Move the last rows into the gaps, so that no more rows are decoded than there are replies."""
        while not all(self.jobs):
            if last := self.jobs.pop():
                gap, n = self.jobs.index(None), len(last.request.prompt_ids) + len(last.ids)
                self.cache.copy_row(gap, self.cache, len(self.jobs), n)
                self.jobs[gap] = last

    def prefill(self, assigned: list[tuple[int, int, int]]) -> None:
        """Run prompts, each (tokens to run, copied, row), in passes of like length; sample their first tokens."""
        cache, device, assigned = self.cache, self.model.device, sorted(assigned)
        while assigned:
            lengths = np.array(assigned)[:, 0]  # rising; a pass may pad them by a tenth and 64, up to 16384
            fits = lengths * range(1, len(lengths) + 1) <= np.minimum(1.1 * lengths.cumsum() + 64, 16384)
            n = max(1, int(fits.cumprod().sum()))
            packed = []  # of each prompt: tokens copied, row, length, noise key, and the ids to run
            for _, old, row in assigned[:n]:
                owner, turn, (ids, _), _ = self.jobs[row]
                cache.prompts[row] = ids + [-1] * (cache.length - len(ids))
                packed.append(torch.tensor([old, row, len(ids), derive_seed(self.seed, owner, turn), *ids[old:]]))
            reach = round_up(max(int(x[2]) for x in packed), 8)
            packed = torch.nn.utils.rnn.pad_sequence(packed, batch_first=True).to(device, non_blocking=self.cuda)
            start, rows, lengths = packed.T[:3]
            cache.state[2:, rows] = packed.T[2:4]  # prompt length, noise key
            self.forward(rows, packed[:, 4:], start, lengths - start - 1, reach)
            assigned = assigned[n:]

    def decode(self) -> None:
        """One more token for every row in use. Sizes are rounded, for few graphs and aligned memory."""
        cache, n = self.cache, len(self.jobs)
        n = min(round_up(n, 1 << max(n.bit_length() - 3, 0)), len(cache.token)) if self.graphs else n
        longest = max(len(job.request.prompt_ids) + len(job.ids) for job in self.jobs if job)
        reach = min(round_up(longest + 1, 256 if self.cuda else 32), cache.length)  # + 1: ids lack the newest
        step = lambda: self.forward(slice(0, n), cache.token[:n, None], cache.used[:n], 0, reach)
        if not self.graphs or (n, reach) not in self.captured:  # a first step may initialise what no graph can
            self.captured[n, reach] = None
            return step()
        if self.captured[n, reach] is None:
            graph, pool = torch.cuda.CUDAGraph(), next((x.pool() for x in self.captured.values() if x), None)
            try:  # the outer stream is the one to return to, also where the capture fails
                with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, pool=pool):
                    step()
            except RuntimeError as error:
                logging.get_logger("oel").warning_once(f"CUDA graphs fail here, use --no-graphs: {error}")
                self.graphs = self.model.graphs_work = False  # no later sampler tries again
                return step()
            self.captured[n, reach] = graph
        self.captured[n, reach].replay()

    def forward(self, rows, ids: torch.Tensor, start: torch.Tensor, last, reach: int) -> None:
        """Run ids (B, t) in the given rows from position `start` (B,) on; sample what follows ids[b, last[b]]."""
        cache, device, (B, t) = self.cache, ids.device, ids.shape
        # What passes the end (padding, ended replies) goes to the last place, which no reply reads.
        positions = (start[:, None] + torch.arange(t, device=device)).clamp(max=cache.length - 1)  # (B, t)
        later = torch.arange(reach, device=device) > positions[:, None, :, None]
        mask = torch.where(later, -math.inf, later.new_zeros((), dtype=self.model.dtype))  # (B, 1, t, reach)
        lengths = (positions[:, 0] + 1).int() if self.flash and isinstance(rows, slice) else None  # (B,), in decode
        view = View(cache, rows, torch.arange(len(cache.token), device=device)[rows], positions, reach, lengths)
        how = {"position_ids": positions, "attention_mask": mask, "use_cache": False}
        hidden = self.model.get_decoder()(input_ids=ids, **how, oel_view=view)[0]  # (B, t, D), by way of attend
        cache.used[rows] = start + last + 1
        key = mix((cache.noise[rows] + (cache.used[rows] - cache.prompt_len[rows]) * 0x632BE5AB).int())
        logits = (hidden[torch.arange(B, device=device), last] @ self.head.T)[:, : self.vocab_size]  # (B, V)
        cache.token[rows] = self.pick(logits, key)


class KVCache:
    """Keys and values of R rows, one reply each, and what the device knows of these replies."""

    def __init__(self, model, num_rows: int, length: int):
        c, self.length = model.config, length
        head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        shape = (2, c.num_hidden_layers, num_rows, length, c.num_key_value_heads, head_dim)  # keys, values
        self.kv = torch.zeros(shape, dtype=model.dtype, device=model.device)  # not empty: a masked NaN times 0 is NaN
        # Four numbers a row: newest token (sampled, but not in kv yet), tokens in kv, prompt length, noise key.
        self.state = torch.zeros(4, num_rows, dtype=torch.long, device=model.device)
        self.token, self.used, self.prompt_len, self.noise = self.state
        self.prompts = np.full((num_rows, length), -1)  # the token ids of each row's prompt

    def copy_row(self, row: int, cache: KVCache, source: int, n: int) -> None:
        """Copy the first n tokens of a row of a cache, this one or another, and all else that is known of it."""
        self.kv[:, :, row, :n] = cache.kv[:, :, source, :n]
        self.state[:, row] = cache.state[:, source]
        self.prompts[row, : cache.length] = cache.prompts[source]


def attend(module, query, key, value, attention_mask, *, scaling, oel_view, **kwargs):
    """Attention of the model's layers over a KVCache: query (B, Hq, t, head_dim) -> (B, t, Hq, head_dim). It writes
    `positions` (B, t) of `row_ids` (B,), and reads `reach` tokens of `rows`: the same rows, in decode as a slice."""
    kv, view = oel_view.cache.kv[:, module.layer_idx], oel_view  # (2, R, length, Hkv, head_dim)
    for old, new in zip(kv, (key, value), strict=True):  # each new (B, Hkv, t, head_dim)
        old[view.row_ids[:, None], view.positions] = new.transpose(1, 2)
    if view.lengths is not None:  # in decode on a GPU flash attention reads each row only as far as it is filled
        starts = torch.arange(len(query) + 1, dtype=torch.int32, device=query.device)  # where each row's query is
        how = (starts, starts * kv.shape[2], 1, view.reach, 0.0, False, False)  # starts of keys; 1 query, reach keys
        flash = functools.partial(torch.ops.aten._flash_attention_forward, scale=scaling, seqused_k=view.lengths)
        return flash(query[:, :, 0], *kv[:, view.rows].flatten(1, 2), *how)[0][:, None], None
    keys, values = kv[:, view.rows, : view.reach].transpose(2, 3)  # each (B, Hkv, reach, head_dim)
    if query.shape[2] > 1:  # else the queries of a key head are stacked along t, so that no key is repeated
        keys, values = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (keys, values))
    q = query.reshape(len(query), keys.shape[1], -1, query.shape[-1])
    out = torch.nn.functional.scaled_dot_product_attention(q, keys, values, attention_mask, scale=scaling)
    return out.reshape(query.shape).transpose(1, 2), None


def flash_works(model) -> bool:
    """Whether flash attention finds 512 in a row of that value alone, and 1 in a row of 511 zeros and 512."""
    cache, at = KVCache(model, 2, 512), torch.arange(0, 512, 511, device=model.device)  # long enough to be split
    query = cache.kv.new_zeros(2, model.config.num_attention_heads, 1, cache.kv.shape[-1])
    view = View(cache, slice(2), at // 511, at[:, None], 512, (at + 1).int())
    new = query[:, : cache.kv.shape[-2]] + 512
    with contextlib.suppress(RuntimeError):
        seen = attend(argparse.Namespace(layer_idx=0), query, new, new, None, scaling=1.0, oel_view=view)[0]
        return (seen[:, 0, :, 0] * (at[:, None] + 1) - 512).abs().max().item() < 1
    return False


def pick(logits: torch.Tensor, key: torch.Tensor, temperature=1.0, top_k=0, top_p=1.0) -> torch.Tensor:
    """Sample a token for each row: logits (B, V), key (B,) -> ids (B,). Top-k comes before top-p.
    The Gumbel trick: the argmax of logits + noise samples their softmax; the noise is a hash of (key, token)."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    ids = torch.arange(logits.shape[1], dtype=torch.int32, device=logits.device).expand_as(logits)
    if top_k or top_p < 1:
        logits, ids = logits.topk(min(top_k or logits.shape[1], logits.shape[1]))  # (B, K), falling
        p = logits.softmax(-1)
        logits = logits.masked_fill(p.cumsum(-1) - p >= top_p, -math.inf)  # the first token always stays
    # -log(1 - u) is exponential. u comes from 31 random bits; it is never 0, nor 1 when it is rounded to float32.
    u = ((mix(ids.int() * -0x61C8864F + key[:, None]) & 0x7FFFFFFF) + 0.5).mul_(2.0**-31).clamp_(max=1 - 2.0**-24)
    return ids.gather(1, (logits - u.neg_().log1p_().neg_().log_()).argmax(-1, keepdim=True))[:, 0].long()


def mix(x: torch.Tensor) -> torch.Tensor:
    """Scramble int32 numbers (the finalizer of MurmurHash3; products keep their low 32 bits)."""
    x = (x ^ (x >> 16 & 0xFFFF)) * -0x7A143595
    x = (x ^ (x >> 13 & 0x7FFFF)) * -0x3D4D51CB
    return x ^ (x >> 16 & 0xFFFF)


def round_up(n: int, multiple: int) -> int:
    return math.ceil(n / multiple) * multiple


# --- the run folder ---------------------------------------------------------------------------------------
def check_inputs(cfg: Config, out: Path) -> tuple[list[dict], str, dict]:
    """The logs, the experience, and what config.json is to hold. UsageError for anything that cannot be used."""
    require(cfg.context != "raw" or not cfg.experience, "--context raw takes no --experience")
    logs = read_jsonl(Path(cfg.logs), prompts.parse_log) if cfg.logs else []
    good = not cfg.logs or Path(cfg.logs).is_file() and any(not log["anchor"] for log in logs)
    require(good, f"--logs {cfg.logs}: it is empty, no regular file, or holds anchors alone")
    experience = file.read_text("utf-8-sig", "replace").strip() if (file := Path(cfg.experience)).is_file() else ""
    good = not cfg.experience or experience and "\ufffd" not in experience
    require(good, f"--experience {cfg.experience} is empty, no file or not UTF-8; it should hold lessons")
    cfg.logs or getattr(make_game(cfg), "close", lambda: None)()  # raises now what is wrong with the game
    files = [x for model in {cfg.model, cfg.extractor or cfg.model} for x in Path(model).glob("*.[sj]*")]
    content = {f"content of {f}": zlib.crc32(Path(f).read_bytes()) for f in (cfg.logs, cfg.experience, *files) if f}
    new = {**dataclasses.asdict(cfg), **content}
    try:  # an option that is newer than the run has its default
        old = {**dataclasses.asdict(Config()), **json.loads((out / "config.json").read_text())}
    except (OSError, TypeError, ValueError, RecursionError):
        require(not any(out.glob("round*")), f"{out}/config.json is missing or damaged: choose another --out")
        old = new
    free = {"out", "rounds", "device", "rows", "micro_tokens", "checkpointing", "offload", "graphs", "save_every"}
    names = sorted({*old, *new} - free)
    changed = [f"{k} was {old.get(k)!r}, is {new.get(k)!r}" for k in names if old.get(k) != new.get(k)]
    require(not changed, f"{out} has other settings ({'; '.join(changed)}): choose another --out")
    return logs, experience, new


def recorded(path: Path, stage, *args) -> list:
    """Run a stage once; always return what its record holds: a JSONL file, or a folder of lists of lessons."""
    if not gather(path.exists() and (any(path.glob("*.txt")) if path.is_dir() else path.stat().st_size))[0]:
        if path.suffix:
            write_jsonl(path, stage(*args))
        else:
            texts = {f"{i:02}.txt": text + "\n" for i, text in enumerate(stage(*args))}
            atomic(path, lambda part: [part.mkdir()] + [(part / x).write_text(y, "utf-8") for x, y in texts.items()])
    found = read_jsonl(path) if path.suffix else [f.read_text("utf-8") for f in sorted(path.glob("*.txt"))]
    return gather(found if RANK == 0 else None)[0]


def add_row(path: Path, row: dict) -> None:
    """Add a row, in place of this and all later (round, step) rows, which a killed run had left."""
    write_jsonl(path, [x for x in read_jsonl(path) if (x["round"], x["step"]) < (row["round"], row["step"])] + [row])


def write_jsonl(path: Path, rows: list[dict]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    atomic(path, lambda part: part.write_text(text, "utf-8"))


def read_jsonl(path: Path, parse=json.loads) -> list[dict]:
    """The objects of a JSONL file, none if there is no file."""
    try:
        return prompts.parse_jsonl(path.read_bytes() if path.exists() else b"", parse)
    except ValueError as error:
        raise UsageError(f"{path}, {error}") from None


def atomic(path: Path, write) -> None:
    """`write` a temporary neighbour, a file or a folder, that takes the name only when it is complete. Process 0
    alone writes, after all have come here, and all go on when it is done: so they find the same files."""
    gather(None)
    if RANK:
        return gather(None)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    discard = lambda: shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink(missing_ok=True)
    try:
        discard()  # what a killed run has left
        write(temporary)
        for file in filter(Path.is_file, [temporary, *temporary.rglob("*")]):
            with file.open("rb+") as data:
                os.fsync(data.fileno())  # on disk before it takes the name, or a power cut may leave it empty
        temporary.replace(path)
    except Exception as error:  # torch and safetensors raise errors of their own for a full disk
        raise OSError(f"{path} was not written ({error}); what was there before is kept") from error
    finally:
        discard()
    gather(None)


def save_model(path: Path, policy: Policy) -> None:
    """A Hugging Face folder, complete or absent: float32 weights, for others to load in the config's dtype."""
    model, tokenizer = policy.model, policy.tokenizer
    weights = dict(zip(dict(model.named_parameters()), policy.master, strict=True))
    atomic(path, lambda part: (model.save_pretrained(part, state_dict=weights), tokenizer.save_pretrained(part)))


def table(rows: list[dict]) -> str:
    """Rows of metrics.jsonl as text, below a line of names."""
    names = ["round", "step", "pass_rate", "reply_tokens", "in_context", "unseen", "forgetting"]
    values = [[row.get(name, row.get(f"{name}_pass_rate")) for name in names] for row in rows]
    show = lambda x: f"{x:.3f}" if isinstance(x, float) else "-" if x is None else str(x).replace("_", " ")
    return "\n".join("  ".join(show(x).rjust(12) for x in line) for line in [names, *values])


def main(argv: list[str] | None = None) -> None:
    """The command line. An error that the user can fix is one line on stderr, with exit code 2."""
    cfg = parse_args(argv)
    if WORLD > 1:
        backend = "cpu:gloo" + ",cuda:nccl" * torch.cuda.is_available()
        dist.init_process_group(backend, timeout=48 * dist.default_pg_timeout)  # a day: some wait while others write
        sys.stdout = sys.stdout if RANK == 0 else open(os.devnull, "w")  # noqa: SIM115 (until the process ends)
    logging.disable_progress_bar()  # those of transformers, one for every file it opens; ours stay
    try:
        print("\n".join(f"{name:20} {x}" for name, x in {**vars(cfg), "device": find_device(cfg.device)}.items()))
        with tempfile.TemporaryDirectory() as scratch:
            run(dataclasses.replace(cfg, out=gather(f"{scratch}/run")[0]) if cfg.smoke else cfg)
    except (UsageError, FloatingPointError, UnicodeError, OSError, torch.OutOfMemoryError) as error:
        busy = f"{cfg.out} is in use by another run: let it end, or choose another --out"
        print(f"oel.py: error: {busy if isinstance(error, TimeoutError) else error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("oel.py: stopped" + ("" if cfg.smoke else f"; the same command continues {cfg.out}"), file=sys.stderr)
        sys.exit(130)


def parse_args(argv: list[str] | None = None) -> Config:
    """The command line as a Config: what was typed, else the model's preset, else the default."""
    parser = argparse.ArgumentParser(description="Presets by model replace [defaults].", allow_abbrev=False)
    flags = {f: "--" + f.name.replace("_", "-") for f in dataclasses.fields(Config)}
    for f, flag in flags.items():
        parser.add_argument(flag, default=argparse.SUPPRESS, **f.metadata)
    typed = parser.parse_args(argv)
    name = Path(getattr(typed, "model", TINY)).name
    if name not in PRESETS:
        print(f"no preset for {name}: using the settings of Qwen3-1.7B")
    cfg = Config(**{**PRESETS.get(name, {}), **(SMOKE if getattr(typed, "smoke", False) else {}), **vars(typed)})
    cfg.rounds = 1 if cfg.logs else cfg.rounds
    cfg.out = cfg.out or f"runs/{name}-{Path(cfg.logs or cfg.env.split(':')[-1]).stem}-{cfg.seed}"
    for f, flag in flags.items():
        value, most = getattr(cfg, f.name), 1 if f.name in ("top_p", "lr", "weight_decay") else 10**9
        zero_ok = not f.default or f.name in ("seed", "rounds", "top_k", "weight_decay", "lr")
        if type(f.default) in (int, float) and not (1e-30 < value <= most or value == 0 and zero_ok):
            parser.error(f"{flag} is {value}: it must be {'0 or more' if zero_ok else 'more than 0'}, {most} at most")
    return cfg


if __name__ == "__main__":
    main()
