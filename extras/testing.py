"""What the tests share: a random policy, small runs, a game, stand-ins for what a test replaces, and fixtures.

A test module names this file as its plugin, so that all modules share the fixtures. (PYTEST_DONT_REWRITE: its
functions are imported too, and it has no tests.)
"""

import contextlib
import copy
import dataclasses
import functools
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import oel
import prompts
from envs import FrozenLake

ROOT, CPU = Path(oel.__file__).resolve().parent, torch.device("cpu")

# --- a random policy ----------------------------------------------------------------------------------------
# Merges that a careless split would break: words, punctuation at a line end, the insides of markers.
MERGES = "h e,t he,Ġ the,i n,in g,o u,Y ou,i m,e n,en d,t h,th in,thin k,< |,| >,Ċ Ċ,. Ċ,Ġ [,- -,Ġ Ġ,â Ī"
# Letters with the one sign before them; single digits; signs with the line ends after them; white space.
SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CHAT = """{% for x in messages %}{{ '<|im_start|>' + x.role + '\n' + x.content + '<|im_end|>\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}SWITCH{% endif %}"""
SWITCH = """{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"""


def make_tokenizer(thinking_switch: bool = True) -> transformers.PreTrainedTokenizerFast:
    """A byte-level tokenizer with Qwen3's markers and a chat template that behaves like Qwen3's.

    <|im_end|> ends a reply and <|endoftext|> pads; the think tags are single tokens that are not special.
    Without the switch the template ignores `enable_thinking`, like that of a model that never thinks.
    """
    merges = [tuple(pair.split()) for pair in MERGES.split(",")]
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet()) + ["".join(pair) for pair in merges]
    bpe = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    split = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.Sequence([split, to_bytes]), decoders.ByteLevel()
    bpe.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    bpe.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in ("<think>", "</think>")])
    template = CHAT.replace("SWITCH", SWITCH if thinking_switch else "")
    options = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "clean_up_tokenization_spaces": False}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, chat_template=template, **options)


GQA = {"num_key_value_heads": 2}
SIZE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZE |= {"max_position_embeddings": 4096, "initializer_range": 0.2}
SIZE |= dict.fromkeys(["bos_token_id", "eos_token_id", "pad_token_id"])
ROPE = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0}
ROPE |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
EXTRA = {"Qwen3": {"head_dim": 32}, "Qwen2": {}, "Llama": {"rope_parameters": ROPE}}


def build(family: str, seed: int = 0, **config):
    """A float32 model of one of the hub's families in eval mode. Its weights depend on the arguments alone.

    They are large, so that the logits differ by much more than rounding. No bias is zero and no norm is one, so
    that code which forgets them fails.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = getattr(transformers, f"{family}Config")(**{**SIZE, **config})
        model = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
        for name, weight in model.named_parameters():
            if weight.dim() == 1:  # biases around zero, norms around one
                weight.data.uniform_(-0.5, 0.5).add_("norm" in name)
    return model


def make_model(kind: str = "qwen3", **size):
    """A tiny model of a supported family.

    Qwen3's head is wider than width / heads, as in Qwen3-0.6B, and Llama's rope scaling already bends positions
    within the first hundred.
    """
    family = kind.capitalize()
    return build(family, **{"vocab_size": 320, **GQA, **EXTRA[family], **size})


def save_policy(folder, kind: str = "qwen3", thinking_switch: bool = True, **options):
    """Save a tiny model and its tokenizer in the hub's format; return the folder.

    As in Qwen3's folders, the model has more rows than the tokenizer has ids, and the generation config holds
    two stop ids and sampling defaults.
    """
    tokenizer, model = make_tokenizer(thinking_switch), make_model(kind, **options)
    stops = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    model.config.eos_token_id, model.config.pad_token_id = stops
    defaults = {"eos_token_id": stops, "pad_token_id": stops[1], "do_sample": True}
    model.generation_config.update(**defaults, temperature=0.6, top_k=20, top_p=0.95)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# --- a game, its logs, and lessons --------------------------------------------------------------------------
LESSONS = [prompts.as_items(["H loses.", "G wins."]), "Walk around H.\nIt is a hole."]


class HotCold:
    """A user's own game that inherits nothing: find a number. Whatever plays FrozenLake has to play it."""

    task = "Find a number from 0 to 9. End your reply with it."
    won = False

    def reset(self, seed: int) -> str:
        self.number, self.left, self.won = seed % 10, 4, False
        return "The number is hidden."

    def step(self, reply: str) -> tuple[str, bool]:
        guess = int((re.findall(r"\d", reply) or ["0"])[-1])
        self.left, self.won = self.left - 1, guess == self.number
        text = "Found." if self.won else "Higher." if guess < self.number else "Lower."
        over = self.won or not self.left
        return f"{text} The episode {'succeeded' if self.won else 'failed'}." if over else text, over


def play(game, seed: int, player) -> dict:
    """Play one episode by the protocol alone; return its trajectory. `player(turn)` gives the reply."""
    observations, turns, over = [game.reset(seed)], [], False
    while not over:
        prompt, reply = prompts.play_prompt(game.task, observations), player(len(turns))
        feedback, over = game.step(reply)
        observations.append(feedback)
        turns.append({"prompt": prompt, "response": reply, "feedback": feedback})
    return {"id": f"test-{seed}", "turns": turns, "outcome": "won" if game.won else "lost"}


def logs(n: int = 4) -> list[dict]:
    """Trajectories of FrozenLake, each of two refused moves."""
    return [play(FrozenLake(), seed, lambda turn: "no idea") for seed in range(n)]


# --- sampling and distilling ------------------------------------------------------------------------------
def plain_greedy(model, ids: list[int], limit: int, stop_ids=()) -> list[int]:
    """What transformers' own generate answers, one prompt at a time, so without any padding."""
    prompt, stops = torch.tensor([ids]), list(stop_ids) or None
    options = {"max_new_tokens": limit, "do_sample": False, "eos_token_id": stops, "pad_token_id": 0}
    return model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[0, len(ids) :].tolist()


def greedy(model, prompt_ids: list[list[int]], limit, stop_ids=(), **options):
    """Greedy replies, with one limit or one for each prompt."""
    limits = limit if isinstance(limit, list) else [limit] * len(prompt_ids)
    options = {"stop_ids": set(stop_ids), "temperature": 0, **options}
    return oel.drive(model, [ask(*pair) for pair in zip(prompt_ids, limits, strict=True)], **options)


def ask(prompt_ids: list[int], limit: int):
    return (yield oel.Request(prompt_ids, limit))


def draw_prompts(lengths: list[int], seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(5, 300) for _ in range(n)] for n in lengths]


def input_shapes(model) -> list[torch.Size]:
    """A list that grows by the shape of the input ids, (B, T), with every pass of the model's decoder."""
    shapes = []

    def note(module, args, options):
        shapes.append(options["input_ids"].shape)

    model.get_decoder().register_forward_pre_hook(note, with_kwargs=True)
    return shapes


def make_samples(policy) -> list[oel.Sample]:
    """Samples of unequal lengths; the replies hold stop ids, padding ids and id 0, and one is a single id."""
    draw, stop, samples = random.Random(0), policy.tokenizer.eos_token_id, []
    for i, n in enumerate([9, 1, 30, 2, 17]):
        prompt = prompts.play_prompt("TASK", ["x" * (1 + 13 * i)])
        reply = [draw.randrange(policy.vocab_size) for _ in range(n - 1)] + [stop]
        reply[1:-1:4] = [[0, policy.tokenizer.pad_token_id, stop][j % 3] for j in range(len(reply[1:-1:4]))]
        texts = prompt, prompts.with_experience(prompt, LESSONS[i % 2])
        samples.append(oel.Sample(*map(policy.encode, texts), reply))
    return samples


def frozen(policy):
    """Another model of the same shape as a teacher, so that student and teacher differ in weights as well."""
    teacher = copy.deepcopy(policy.model).requires_grad_(False)
    draw = torch.Generator().manual_seed(1)
    for p in teacher.parameters():
        p += 0.02 * torch.randn(p.shape, generator=draw)
    return teacher


def gradients(policy) -> list[torch.Tensor]:
    """The gradients that a step left, taken away."""
    found = [p.grad for p in policy.master]
    for p in policy.master:
        p.grad = None
    return found


N, D, V = 13, 24, 50


def plain_kl(hs, ht, ws, wt, temperature, direction="reverse"):
    """The same by autograd over all logits at once."""
    logp, logq = (hs @ ws.T / temperature).log_softmax(-1), (ht @ wt.T / temperature).log_softmax(-1).detach()
    forward = direction == "forward"
    return (logq.exp() * (logq - logp) if forward else logp.exp() * (logp - logq)).sum(-1)


def kl_inputs(scale: float, dtype=torch.float64):
    """Hidden states and heads that make logits of about this size; the student's leaves want gradients."""
    draw = torch.Generator().manual_seed(int(scale))
    shapes = [(N, D), (N, D), (V, D), (V, D)]
    hs, ht, ws, wt = (torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes)
    wt = ws + 0.3 * wt
    hs, ht = (h * scale / D**0.5 for h in (hs, hs + 0.3 * ht))
    hs, ht, ws, wt = (x.to(dtype) for x in (hs, ht, ws, wt))
    return hs.requires_grad_(), ht, ws.requires_grad_(), wt


def assert_kl_is_exact(given, tolerance: float, **options) -> None:
    """Compare the KL and both gradients with those of float64 autograd on the same inputs."""
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in given]
    found, *grads = oel.reverse_kl(*given, 0.7, chunk=5, **options)
    wanted = plain_kl(*exact, 0.7, **options)
    wanted.sum().backward()
    assert found.shape == (N,) and relative(found, wanted.detach()) < tolerance
    for grad, side in zip(grads, (exact[0], exact[2]), strict=True):
        assert grad.dtype == given[0].dtype and relative(grad, side.grad) < tolerance


# --- small runs ---------------------------------------------------------------------------------------------
def load(source, *more, **options):
    return oel.load_policy(str(source), CPU, *more, **options)


def rows_of(path) -> list[dict]:
    """The rows of a JSONL file."""
    return oel.read_jsonl(Path(path))


def files_in(folder) -> dict[str, Path]:
    """All files below a folder by their names relative to it."""
    return {str(file.relative_to(folder)): file for file in Path(folder).rglob("*") if file.is_file()}


def small(**options) -> oel.Config:
    """Settings under which everything is over in a second. Paths may be given as such."""
    few = {"lists": 2, "episodes": 1, "steps": 2, "batch_episodes": 1, "eval_games": 2, "probe_games": 2}
    few |= {"reply_limit": 8, "experience_budget": 24, "save_every": 1, "lr": 1e-2, "rounds": 1}
    options = {name: str(x) if isinstance(x, Path) else x for name, x in options.items()}
    return oel.Config(**{**few, "checkpointing": False, **options})


def arguments(cfg: oel.Config) -> list[str]:
    """The command line that gives these settings, whatever the preset."""
    argv = []
    for name, value in dataclasses.asdict(cfg).items():
        option = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            argv.append(option if value else option.replace("--", "--no-", 1))
        elif value != "":
            argv += [option, str(value)]
    return argv


def python(*args, **options) -> subprocess.CompletedProcess:
    """Run a Python program from the root of the repository, with one thread."""
    options = {"cwd": ROOT, "env": {**os.environ, "OMP_NUM_THREADS": "1"}, "capture_output": True, **options}
    return subprocess.run([sys.executable, *map(str, args)], check=False, text=True, **options)


def consolidated(policy, cfg, experiences=LESSONS, played=None, state=None, stop_at=0) -> list[dict]:
    """Consolidate; return the rows that are logged, one for each step. Step `stop_at` is interrupted at its end."""
    rows = []

    def on_step(step, row):
        rows.append({"step": step, **row})
        if step == stop_at:
            raise KeyboardInterrupt

    oel.consolidate(policy, cfg, played or logs(), experiences, oel.Phase([], 0, nucleus=False), state, on_step)
    return rows


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-300)).item()


# --- stand-ins ----------------------------------------------------------------------------------------------
def spy(monkeypatch, name: str, owner=oel) -> mock.Mock:
    """Note the calls of a function of `oel` (in `call_args_list`), which works as before."""
    monkeypatch.setattr(owner, name, mock.Mock(wraps=getattr(owner, name)))
    return getattr(owner, name)


def count_characters(monkeypatch, n: int) -> None:
    """Count one token for n characters: text that a random policy wrote has more tokens than were sampled."""
    monkeypatch.setattr(oel.Policy, "count_tokens", lambda self, text: len(text) // n)


def scripted(monkeypatch, answer) -> list[str]:
    """Replace the sampler: `answer(prompt as text)` is the policy's reply. Returns the list of prompts it gets."""
    seen, tokenizer = [], make_tokenizer()

    def converse(talk, stop_ids):
        response = None
        try:
            while True:
                request = talk.send(response)
                seen.append(tokenizer.decode(request.prompt_ids))
                ids = tokenizer.encode(answer(seen[-1]))[: request.max_new_tokens]
                response = oel.Response(ids, "stop" if ids[-1] in stop_ids else "length")
        except StopIteration as stop:
            return stop.value

    def drive(model, generators, **how):
        return [converse(talk, how["stop_ids"]) for talk in generators]

    monkeypatch.setattr(oel, "drive", drive)
    return seen


class Watch(TorchDispatchMode):
    """Refuses operations that wait for the device: a step with one of them could not be captured."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        waiting = ("_local_scalar_dense", "nonzero", "lift_fresh", "masked_select")
        assert not any(name in str(function) for name in waiting), function
        return function(*args, **(kwargs or {}))


@pytest.fixture
def graphs(monkeypatch):
    """Replace CUDA graphs by one that replays its step; the list of the sizes that graphs were made for."""
    made = []

    class Graph:
        def pool(self):
            return "pool"

        def replay(self):
            with Watch():
                self.step()

    @contextlib.contextmanager
    def record(graph, pool):  # nothing runs while a graph is captured
        forward = oel.Sampler.forward

        def note(sampler, rows, ids, start, last, reach):
            others = [other for other in sampler.captured.values() if other not in (None, graph)]
            assert (pool is None) == (not others), "graphs of one cache share the memory of the first"
            graph.step = functools.partial(forward, sampler, rows, ids, start, last, reach)
            made.append((len(ids), reach))

        with monkeypatch.context() as during:
            during.setattr(oel.Sampler, "forward", note)
            yield

    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", record)
    return made


# --- fixtures -----------------------------------------------------------------------------------------------
@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A saved random policy shaped like Qwen3, with its thinking switch."""
    return str(save_policy(tmp_path_factory.mktemp("policy") / "qwen3-like"))


@pytest.fixture
def policy(folder):
    """That policy, loaded anew: a test may change its weights."""
    return load(folder)


@pytest.fixture
def refused(folder, tmp_path, capsys):
    """A command that has to fail with exit code 2, without a traceback or a run folder; returns its stderr."""

    def command(*argv: str, **options) -> str:
        cfg = small(**{"model": folder, "out": tmp_path / "run", **options})
        with pytest.raises(SystemExit) as stop:
            oel.main([*arguments(cfg), *argv])
        err = capsys.readouterr().err
        assert stop.value.code == 2 and "Traceback" not in err and not (tmp_path / "run").exists()
        return err

    return command


@pytest.fixture
def lessons(tmp_path):
    """A file with lessons, for --experience."""
    (tmp_path / "lessons.txt").write_text(LESSONS[0])
    return tmp_path / "lessons.txt"


@pytest.fixture(scope="session")
def whole(folder, tmp_path_factory):
    """The settings of a run of two rounds that nothing interrupted; `out` is its folder."""
    with pytest.MonkeyPatch.context() as patched:
        count_characters(patched, 4)
        cfg = small(model=folder, rounds=2, form="free", out=tmp_path_factory.mktemp("runs") / "whole")
        oel.run(cfg)
    return cfg
