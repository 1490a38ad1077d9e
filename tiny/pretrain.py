"""Make the embedded default policy from nothing: `python tiny/pretrain.py`.

OEL turns what a policy can do (play from what it reads, guess where nothing tells it, write down what it
saw) into knowledge. This script gives a 3.7M-parameter transformer exactly those abilities, and none of the
knowledge: teach.py makes the examples, in worlds whose letters mean something else every time, and what any
letter means in the deployed games is never taught.

The loss is on all tokens, the prompt's at weight 0.2: boards and lessons that repeat within a prompt teach
the copying and looking up that the reasoning then needs. About an hour on two CPU cores; a GPU is used if
there is one. The same command resumes a run that was stopped.

`--report` measures what came out. The files next to this script are the policy in Hugging Face format:
AutoModelForCausalLM.from_pretrained("tiny").
"""

import argparse
import collections
import concurrent.futures
import copy
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle threads sleep: kinder to whatever else is running
import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import teach

import oel
import prompts
from envs import FrozenLake, GridGame, Sokoban, level_seeds, parse_action

SEED = 0
STEPS = 4000
WARMUP = 100
LEARNING_RATE = 2e-3
PROMPT_WEIGHT = 0.2  # weight of a prompt token in the loss; a reply token has weight 1
BATCH_TOKENS = 6400
LENGTHS = (144, 208, 272, 352, 480)  # an example is padded to one of these: torch.compile sees five shapes
CHUNK = 4096  # examples generated at a time


# --- tokenizer --------------------------------------------------------------------------------------------
# Text is cut into pieces, and every piece that occurs often in the examples is a token; any other piece is
# spelled in bytes. The cells of a board are pieces at fixed distances, and a letter is the same piece on a
# board, in a lesson and in the reasoning. The sentences that games and prompts repeat are one piece each;
# everything else, lessons above all, is cut into words.
REPEATED = [
    *GridGame.task.splitlines(keepends=True), prompts.EXTRACT, prompts.PREVIOUS,
    *prompts.FORMS["items"].splitlines(keepends=True),
    *prompts.NOTES.split("{}"), "The log:", "End of the log. Now write the lessons.", "What came back: ",
    ".\nBoard:\n", "Board:\n",
    "You moved ", " and pushed a box to ", "The turn limit was reached. The episode failed.",
    "You fell into a hole. The episode failed.", "You reached the goal. The episode succeeded.",
    "Every box is on a target. The episode succeeded.", "That move is not valid: ",
    "That was the second invalid move in a row. The episode failed.",
    *teach.EDGE, *teach.WALL, *teach.WALK, *teach.ACT, *teach.IS.values(), *teach.ALSO.values(),
    *(part for part in teach.HEDGE.replace(" {x}", "{x}").split("{x}") if part),
]  # fmt: skip
PIECES = [
    *map(re.escape, sorted(REPEATED, key=len, reverse=True)),
    r"\+(?:-----\+)+\n?",  # the rule of a lake's board
    r"  (?=  \|)",  # an empty cell of it; one is `|     |`, a letter's is `|  H  |`
    r" {0,2}\|(?: (?=..  \|)|\n)?",  # what stands between two of its cells
    r"#(?: #){5}\n?",  # the outer wall of a room
    r" ?[#_√]\n?",  # a cell of a room
    r"\([0-9],[0-9]\)",
    r" (?:[0-9]|to|from|up|down|left|right) (?=\()",
    r"(?:Far|Box):",
    r"(?:Next|Push|Reply [0-9]): (?=[(\[])",
    r"\[[a-z]+\]",
    r"- EXPERIENCE ITEM:",
    r" ?(?<![A-Za-z])[A-Z](?![A-Za-z])",
    r"\n+",
    r" ?[A-Za-z]+\n?",
    r" ?[0-9]+",
    r" ?[^\sA-Za-z0-9]",
    r"\s",
]
TEMPLATE = (
    "{%- for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + "
    "'<|im_end|>\n' }}{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}"
    "{%- endif %}{%- endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of the pieces that the examples are made of, over bytes, with Qwen3's markers."""
    pieces = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("|".join(PIECES)), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    stream, counts = teach.examples(random.Random(SEED)), collections.Counter()
    for example in itertools.islice(stream, 10_000):
        for text in (example.message, *re.split("</?think>", example.reply)):
            counts.update(piece for piece, _ in pieces.pre_tokenize_str(text))
    often = [piece for piece, count in counts.most_common() if count >= 20]
    often += [f"{role}Ċ" for role in ("user", "assistant", "system")]  # Ċ is a line break in bytes
    vocabulary = dict.fromkeys([*sorted(pre_tokenizers.ByteLevel.alphabet()), *often])
    vocabulary = {piece: i for i, piece in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer, tokenizer.decoder = pieces, decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=False) for t in ("<think>", "</think>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )


# --- batches ----------------------------------------------------------------------------------------------
def encode(tokenizer, batch: list[teach.Example]) -> list[tuple[list[int], list[int]]]:
    """The (prompt_ids, reply_ids) of each example: chat_ids in bulk; the end of the reply is trained on."""
    frames = {}
    for thinking in (True, False):
        chat = [{"role": "user", "content": "MESSAGE"}]
        frames[thinking] = tokenizer.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=True, enable_thinking=thinking
        )
    messages = [frames[e.thinking].replace("MESSAGE", e.message) for e in batch]
    replies = [e.reply + tokenizer.eos_token for e in batch]
    prompt_ids = tokenizer(messages, add_special_tokens=False)["input_ids"]
    reply_ids = tokenizer(replies, add_special_tokens=False)["input_ids"]
    assert prompt_ids[:1] == prompts.chat_ids(tokenizer, [batch[0].message], batch[0].thinking)
    return list(zip(prompt_ids, reply_ids, strict=True))


def batches(tokenizer, chunk: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The shuffled batches of one chunk of examples: token ids (B, T) and loss weights (B, T).

    A chunk depends on its number alone, so a resumed run sees the same examples. An example goes to the
    shortest length that holds it; what does not fill a batch, and the few longer than all, are left out.
    """
    rng = random.Random(f"{SEED}, chunk {chunk}")
    stream = teach.examples(rng)
    waiting, made = {length: [] for length in LENGTHS}, []
    for prompt, reply in encode(tokenizer, [next(stream) for _ in range(CHUNK)]):
        length = next((n for n in LENGTHS if len(prompt) + len(reply) <= n), None)
        if length is None:
            continue
        waiting[length].append((prompt, reply))
        if len(waiting[length]) == BATCH_TOKENS // length:
            ids = torch.full((BATCH_TOKENS // length, length), tokenizer.pad_token_id)
            weights = torch.zeros(ids.shape)
            for row, (p, r) in enumerate(waiting[length]):
                ids[row, : len(p) + len(r)] = torch.tensor(p + r)
                weights[row, : len(p)] = PROMPT_WEIGHT
                weights[row, len(p) : len(p) + len(r)] = 1.0
            made.append((ids, weights))
            waiting[length] = []
    rng.shuffle(made)
    return made


def prefetched(tokenizer, chunk: int, index: int):
    """(chunk, index, ids, weights) from a place onwards without end; chunks are made in other processes."""
    workers = max(1, (os.cpu_count() or 2) // 2)
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=spawn) as pool:
        ahead = collections.deque(pool.submit(batches, tokenizer, chunk + i) for i in range(workers + 1))
        try:
            while True:
                made = ahead.popleft().result()
                ahead.append(pool.submit(batches, tokenizer, chunk + workers + 1))
                for i in range(index, len(made)):
                    yield chunk, i, *made[i]
                chunk, index = chunk + 1, 0
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


# --- training ---------------------------------------------------------------------------------------------
def new_model(tokenizer, layers: int) -> Qwen3ForCausalLM:
    torch.manual_seed(SEED)
    stops = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    # At these lengths plain attention, fused by the compiler, beats the flash kernel's backward pass on CPUs.
    model = Qwen3ForCausalLM._from_config(config, attn_implementation="eager")
    model.generation_config.eos_token_id = stops
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def loss_of(model, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted mean cross-entropy. Padding stands right of the text, where causal attention never looks."""
    T = ids.shape[1]
    mask = torch.full((T, T), -1e9, dtype=torch.bfloat16, device=ids.device).triu(1)[None, None]
    hidden = model.model(ids, attention_mask={"full_attention": mask}, use_cache=False).last_hidden_state
    logits = model.lm_head(hidden[:, :-1]).float()  # (B, T-1, V)
    losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")  # (B * (T-1),)
    w = weights[:, 1:].flatten()
    return (losses * w).sum() / w.sum()


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine to one percent."""
    if step < WARMUP:
        return LEARNING_RATE * (step + 1) / WARMUP
    cosine = 0.5 + 0.5 * math.cos(math.pi * (step - WARMUP) / max(1, steps - WARMUP))
    return LEARNING_RATE * (0.01 + 0.99 * cosine)


def save(state: dict, path: Path) -> None:
    """All or nothing: a killed run never leaves half a file."""
    torch.save(state, temporary := path.with_suffix(".tmp"))
    os.replace(temporary, path)


def export(model, tokenizer, folder: Path, scratch: Path) -> None:
    """The policy in Hugging Face format, in bf16, each file replaced whole."""
    shutil.rmtree(scratch, ignore_errors=True)
    half = copy.deepcopy(model).to(torch.bfloat16)
    half.resize_token_embeddings(pad_to_multiple_of=64, mean_resizing=False)  # GPUs like such sizes
    half.get_input_embeddings().weight.data[len(tokenizer) :] = 0
    half.save_pretrained(scratch)
    tokenizer.save_pretrained(scratch)
    settings = json.loads((scratch / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that every version of the library knows
    settings = {key: value for key, value in settings.items() if "local" not in key}
    (scratch / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    folder.mkdir(parents=True, exist_ok=True)
    for file in sorted(scratch.iterdir()):
        file.chmod(0o644)
        shutil.move(file, temporary := folder / (file.name + ".tmp"))
        os.replace(temporary, folder / file.name)
    scratch.rmdir()


def new_optimizers(model) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embeddings and scales, at rates that are alike."""
    inner = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    chosen = {id(p) for p in inner}
    others = [p for p in model.parameters() if id(p) not in chosen]
    muon = torch.optim.Muon(inner, LEARNING_RATE, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(others, LEARNING_RATE, (0.9, 0.95), weight_decay=0.0, fused=True)]


def compiled_or_not(function):
    """torch.compile(function); where that fails (no C compiler, say) the function itself, with a message."""
    compiled, works = torch.compile(function, dynamic=False), True

    def call(*args):
        nonlocal works
        try:
            return (compiled if works else function)(*args)
        except Exception as error:
            if not works:
                raise
            works = False
            print(f"torch.compile failed ({type(error).__name__}): going on without, more slowly", flush=True)
            return function(*args)

    return call


def train(steps: int, layers: int, run: Path, out: Path) -> None:
    logging.disable_progress_bar()
    run.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer_path, state_path = run / "tokenizer", run / "state.pt"
    if not tokenizer_path.exists():
        build_tokenizer().save_pretrained(run / "tokenizer.tmp")
        os.replace(run / "tokenizer.tmp", tokenizer_path)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    model = new_model(tokenizer, layers).to(device)
    optimizers = new_optimizers(model)
    at = {"step": 0, "chunk": 0, "index": 0, "examples": 0, "tokens": 0, "seconds": 0.0}
    if state_path.exists():
        state = torch.load(state_path, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        at = state["at"]
        print(f"continuing after step {at['step']}", flush=True)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters, {len(tokenizer)} tokens, {device}, {steps} steps", flush=True)

    def keep():
        moments = [optimizer.state_dict() for optimizer in optimizers]
        save({"model": model.state_dict(), "optimizers": moments, "at": at}, state_path)
        export(model, tokenizer, out, run / "export")

    loss_function, recent, mark = compiled_or_not(loss_of), [], (time.time(), at["tokens"])
    todo = range(at["step"], steps)
    for step, (chunk, index, ids, weights) in zip(todo, prefetched(tokenizer, at["chunk"], at["index"])):
        began = time.time()
        for group in [group for optimizer in optimizers for group in optimizer.param_groups]:
            group["lr"] = learning_rate(step, steps)
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = loss_function(model, ids.to(device), weights.to(device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        recent.append(loss.item())
        at["step"], at["chunk"], at["index"] = step + 1, chunk, index + 1
        at["examples"] += len(ids)
        at["tokens"] += int((weights > 0).sum())  # padding does not count
        at["seconds"] += time.time() - began
        if (step + 1) % 50 == 0:
            speed = (at["tokens"] - mark[1]) / (time.time() - mark[0])
            left = (steps - step - 1) * at["tokens"] / (step + 1) / speed
            print(
                f"step {step + 1:>5}/{steps}  loss {sum(recent) / len(recent):.4f}  "
                f"examples {at['examples']:,}  {speed:,.0f} tokens/s  {left / 60:.0f} min left",
                flush=True,
            )
            recent, mark = [], (time.time(), at["tokens"])
        if (step + 1) % 250 == 0:
            keep()
    keep()
    print(f"done: {json.dumps(at)}", flush=True)


# --- the report -------------------------------------------------------------------------------------------
SAMPLING = {"temperature": 0.7, "top_p": 0.8, "top_k": 20}


def ask(policy, messages: list[str]) -> list[str]:
    """The replies to messages, from the very sampler that OEL uses."""
    prompts, stops = [policy.encode(message) for message in messages], policy.stop_ids
    replies = oel.sample(policy.model, prompts, max_new_tokens=256, stop_ids=stops, seed=SEED, **SAMPLING)
    return [policy.decode(reply.ids) for reply in replies]


def play(policy, games: list, told: list[str] | None = None) -> list[dict]:
    """The trajectories of held-out maps, one per game, with an experience for each in the prompt or none."""
    levels, told = level_seeds("held_out", len(games)), told or [None] * len(games)
    episodes = [
        oel.episode(policy, game, level, str(level), 256, experience)
        for game, level, experience in zip(games, levels, told, strict=True)
    ]
    return oel.drive(policy.model, episodes, stop_ids=policy.stop_ids, seed=SEED, **SAMPLING)


def optimal_first_moves(policy, games: list) -> float:
    """With true lessons about letters of other worlds: how often the first move starts a shortest path."""
    observations = [game.reset(seed) for game, seed in zip(games, level_seeds("held_out", len(games)))]
    messages = [
        prompts.with_experience(prompts.play_prompt(game.task, [text]), prompts.as_items(game.rules()))
        for game, text in zip(games, observations, strict=True)
    ]
    right = 0
    for game, reply in zip(games, ask(policy, messages), strict=True):
        roles = {getattr(game, thing): thing for thing, _ in game.things}
        right += parse_action(reply) in teach.best_moves(game.board(), roles)
    return right / len(games)


def true_lessons(policy, games: list) -> tuple[int, int]:
    """Its lessons on episodes that it played without experience: how many are true, and how many in all."""
    messages = [prompts.extraction_prompt(played, reasoning=False) for played in play(policy, games)]
    true = total = 0
    for game, reply in zip(games, ask(policy, messages), strict=True):
        roles = {getattr(game, thing): thing for thing, _ in game.things}
        for line in prompts.parse_lessons(reply).splitlines():
            lesson = line.removeprefix(prompts.MARKER).strip()
            claim = teach.lesson_role(lesson)
            total += 1
            true += (
                roles.get(claim[0]) == claim[1]
                if claim
                else lesson in [*teach.EDGE, *teach.WALL, *teach.WALK, *teach.ACT]
            )
    return true, total


def logs(policy, make, n: int) -> list[str]:
    """Raw experience: an episode of its own on another map, in full, for each of n games."""
    levels = level_seeds("extraction", n)
    episodes = [oel.episode(policy, make(), level, str(level), 256) for level in levels]
    played = oel.drive(policy.model, episodes, stop_ids=policy.stop_ids, seed=SEED, **SAMPLING)
    return [prompts.transcript(trajectory, reasoning=False) for trajectory in played]


def report(folder: Path) -> None:
    """What the policy can do with what it is told: 128 held-out maps a figure, sampled as SAMPLING says."""
    policy, n = oel.load_policy(str(folder), oel.find_device()), 128
    print(f"{n} held-out maps a figure, {SAMPLING}")
    print("| pass rate, tokens a reply | no experience | true lessons | false lessons | raw log | new wordings |")
    print("|---|---|---|---|---|---|")
    for name, make, false in [
        ("FrozenLake 3x3", FrozenLake, FrozenLake(hole="G", goal="H")),
        ("FrozenLake 4x4", FrozenLake.unseen, FrozenLake(hole="G", goal="H")),
        ("Sokoban", Sokoban, Sokoban(box="O", target="X")),
    ]:
        letters = {thing: getattr(make(), thing) for thing, _ in make().things}
        new = [[teach.HELD_OUT_SENTENCES[thing][i].format(x=x) for thing, x in letters.items()] for i in range(3)]
        for policy.thinking in (True, False):
            cells = []
            for told in [
                None,
                [prompts.as_items(make().rules())] * n,
                [prompts.as_items(false.rules())] * n,
                logs(policy, make, n),
                [prompts.as_items(new[i % 3]) for i in range(n)],
            ]:
                played = play(policy, [make() for _ in range(n)], told)
                tokens, turns = (sum(t["outcome"][key] for t in played) for key in ("reply_tokens", "turns"))
                cells.append(f"{oel.pass_rate(played):.1%}, {tokens / turns:.1f}")
            thinking = "thinking" if policy.thinking else "no thinking"
            print(f"| {name}, {thinking} | {' | '.join(cells)} |", flush=True)
    print("| other letters | optimal first moves with true lessons | own lessons that are true |")
    print("|---|---|---|")
    for game in (FrozenLake, Sokoban):
        for policy.thinking in (True, False):
            renamed = [game.renamed(seed) for seed in range(n)]
            moves, (true, total) = optimal_first_moves(policy, renamed), true_lessons(policy, renamed)
            thinking = "thinking" if policy.thinking else "no thinking"
            print(f"| {game.__name__}, {thinking} | {moves:.1%} | {true / max(1, total):.1%} ({true} of {total}) |")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the embedded default policy, or report on it.")
    parser.add_argument("--report", action="store_true", help="measure the policy in --out instead")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps in all")
    parser.add_argument("--layers", type=int, default=6, help="another number needs another --run and --out")
    parser.add_argument("--run", type=Path, default=HERE.parent / "runs" / "tiny-pretrain")
    parser.add_argument("--out", type=Path, default=HERE, help="where the Hugging Face files go")
    args = parser.parse_args()
    if args.report:
        report(args.out)
    elif args.layers != 6 and args.out == HERE:
        parser.error("a policy of another size would replace the embedded one: give it a folder with --run and --out")
    else:
        train(args.steps, args.layers, args.run, args.out)


if __name__ == "__main__":
    main()
