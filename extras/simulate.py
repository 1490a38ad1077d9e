"""A forecast, on paper, of how long a round of `python oel.py --model Qwen/Qwen3-1.7B` takes on a card.

    python extras/simulate.py            # a minute on one core; --card H100 for that card alone

No GPU is used, and none has confirmed a number. The schedule is that of a run: `oel.Sampler` admits, copies, moves
and retires. But no model runs: a script says how long each reply is, and every pass has a price. What is assumed:

- Lengths (guesses, and they matter most): replies in games are lognormal with sigma 0.5, clipped at 16 and 1,024
  (--reply-limit), and their mean is --mean. Those of extraction are too, with a mean of half of --experience-budget.
- Games (guesses): 3 to 5 turns, 4 to 8 in the unseen variant. A prompt has 200 tokens, and 62 for each turn before
  (unseen: 230 and 85). Lessons add 1,800 tokens, and rules 100. A prompt of extraction has 320, and for each turn a
  reply and 60. Prompts share the task, one of 19 boards, their own earlier turns, and the lessons of one list.
- Memory: the cache gets --share of what is free, in oel.py two fifths. Free is what CUDA leaves (a guess), minus 6
  bytes a parameter (weights, float32 masters), in training 16 (teacher, AdamW's moments); with --offload, 2 and 4.
- A decode step lasts as long as its traffic, at 70% of the nominal bandwidth (a guess): the weights, the keys and
  values that a row holds (up to `reach` with --padded, for GPUs and dtypes without flash attention), about 150 bytes a
  logit to sample, 40 with a nucleus. It lasts 8.5 ms at least, or 2 in a graph (guesses), for rows rounded up by a
  quarter at most. Capturing a graph adds 40 ms to a size's second step (a guess).
- A pass over prompts takes 2 FLOPs a parameter and token, padding too, at a guessed FLOP/s, then one reading of the
  weights; 8.5 ms at least. Gradients take 2 for 4 times the student's tokens (forward, again, and 2 backward) and
  once the teacher's, and 142 bytes a logit for the KL. Attention is left out; the head counts for too many tokens.
- With --offload each micro-batch moves its gradients, in float32, to pinned memory at 20 GB/s, and adds them: 12
  bytes a parameter at 25 GB/s (guesses). An optimizer step moves 24 there and 2, not pinned, to the card. Without
  --offload it moves 30 on the card.
- Of training, --steps of the 20 are simulated. Not counted: the host's work, loading, saving, the first evaluation.
"""

import argparse
import random
import sys
from collections import Counter, namedtuple
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import oel

PARAMETERS, VOCABULARY, TOKEN_BYTES = 1_720_574_976, 151_669, 2 * 28 * 8 * 128 * 2  # of Qwen3-1.7B (keys and values)
Card = namedtuple("Card", "free bandwidth flops offload")  # free bytes before anything is loaded, bytes/s, FLOP/s
CARDS = {"H100": Card(78.6 * 2**30, 0.7 * 3.35e12, 400e12, offload=False),
         "L40S": Card(43.9 * 2**30, 0.7 * 864e9, 145e12, offload=False),
         "4090": Card(23.2 * 2**30, 0.7 * 1.0e12, 100e12, offload=True)}  # fmt: skip
PHASES = ["games to extract from", "extraction", "in context", "games to train on", "training", "evaluation",
          "unseen", "renamed"]  # fmt: skip
STOP, EAGER, GRAPH, CAPTURE = 1, 8.5e-3, 2e-3, 40e-3  # id that ends a reply; seconds: shortest steps, and a capture
CONFIG = SimpleNamespace(num_hidden_layers=1, num_key_value_heads=1, head_dim=1, max_position_embeddings=40960)
MODEL = SimpleNamespace(config=CONFIG, dtype=torch.int8, device=torch.device("cpu"))  # all that a Sampler looks at
MODEL.get_output_embeddings = lambda: SimpleNamespace(weight=torch.zeros(1))


class Simulated(oel.Sampler):
    """A Sampler that runs no model. It ends each reply at its scripted length, and records its passes."""

    def decode(self) -> None:
        self.cuda = True  # for this call alone: then `reach` is rounded as on a GPU
        super().decode()
        self.cuda = False

    def forward(self, rows, ids: torch.Tensor, start: torch.Tensor, last, reach: int) -> None:
        cache, used = self.cache, start + last + 1
        cache.used[rows] = used  # with the token that follows, the reply has used - prompt_len + 1
        planned = self.lengths[cache.noise[rows] % 4096]  # the noise key is as good as random
        cache.token[rows] = torch.where(used - cache.prompt_len[rows] + 1 == planned, STOP, 0)
        if isinstance(rows, slice):
            filled = (used + 1).clamp(max=cache.length).float().mean().item()  # tokens in a row, on average
            self.steps.append((cache.length, len(cache.token), reach, len(ids), filled))
        else:
            self.prefills.append(ids.shape)

    def seconds(self, card: Card, phase: str, graphs: bool, padded: bool) -> float:
        """What the recorded passes take on a card, where a decode step of each size of each cache has its graph."""
        logit, total, seen = 150 if phase in ("games to train on", "training") else 40, 0.0, Counter()
        traffic = lambda rows, tokens: 2 * PARAMETERS + rows * (tokens * TOKEN_BYTES + VOCABULARY * logit)  # bytes
        fit = lambda n, capacity: min(oel.round_up(n, 1 << max(n.bit_length() - 3, 0)), capacity) if graphs else n
        for length, capacity, reach, rows, filled in self.steps:
            size = length, reach, fit(rows, capacity)
            seen[size] += 1
            shortest = GRAPH if graphs and seen[size] > 1 else EAGER
            total += max(shortest, traffic(size[2], reach if padded else filled) / card.bandwidth)
            total += CAPTURE * (graphs and seen[size] == 2)
        for rows, tokens in self.prefills:
            total += max(EAGER, 2 * PARAMETERS * rows * tokens / card.flops + traffic(rows, 0) / card.bandwidth)
        return total

    def gradient_seconds(self, cfg, card: Card) -> float:
        """Of a step of training: distil the replies that were made, each with one of the lists of lessons."""
        rng, samples = random.Random(0), [reply for replies in self.results for reply in replies]
        samples = [s._replace(teacher_ids=[900 + rng.randrange(cfg.lists)] * 1800 + s.prompt_ids) for s in samples]
        batches = oel.micro_batches(samples, cfg.micro_tokens)
        student = sum(len(b) * max(len(s.prompt_ids) + len(s.response_ids) for s in b) for b in batches)  # tokens
        kl = sum(len(s.response_ids) for s in samples) * VOCABULARY * 142 / card.bandwidth
        move = len(batches) * PARAMETERS * (4 / 20e9 + 12 / 25e9) if card.offload else 0
        tokens = 5 * student + 1800 * len(batches)  # also the teacher's, whose lessons run once in a batch
        return 2 * PARAMETERS * tokens / card.flops + kl + move


def scripted_lengths(mean: float, limit: int) -> np.ndarray:
    """4,096 equally likely lengths of replies with this mean. It is above the median, which is found by trying."""
    spread = np.exp(0.5 * torch.special.ndtri((torch.arange(4096) + 0.5) / 4096).numpy())
    tried = [(median * spread).clip(16, limit) for median in np.geomspace(mean / 4, 4 * mean, 400)]
    return min(tried, key=lambda lengths: abs(lengths.mean() - mean)).round().astype(int)


def conversations(cfg, phase: str, lengths: np.ndarray, rng: random.Random) -> list[list[list[int]]]:
    """What each generator of a phase asks: its prompts in turn, in made-up ids that are equal where real ones are."""

    def game(i: int, front=(), first=200, more=62, turns=(3, 5)):
        board = i % (cfg.episodes if phase == "games to extract from" else 19)  # every list gets the same levels
        begin = [*front, *[2] * 100, *[10 + board] * (first - 105)]
        return [[*begin, *[1000 + i] * (more * turn), *[3] * 5] for turn in range(rng.randint(*turns))]

    read = lambda: 200 + sum(60 + int(rng.choice(lengths)) for _ in range(rng.randint(3, 5)))
    n, ask = {
        "games to extract from": (cfg.lists * cfg.episodes, game),
        "extraction": (cfg.lists * cfg.episodes, lambda i: [[2] * 120 + [1000 + i] * read()]),
        "in context": (cfg.probe_games, lambda i: game(i, front=[900 + i % cfg.lists] * 1800)),
        "games to train on": (cfg.steps * cfg.batch_episodes, game),
        "training": (cfg.batch_episodes, game),  # a step, whose prompts are all asked at once
        "evaluation": (cfg.eval_games, game),
        "unseen": (cfg.probe_games, lambda i: game(i, first=230, more=85, turns=(4, 8))),
        "renamed": (cfg.probe_games, lambda i: game(i, front=[1000 + i] * 100)),
    }[phase]
    return [[ids] for i in range(n) for ids in ask(i)] if phase == "training" else [*map(ask, range(n))]


def simulate(cfg, card: Card, phase: str, mean: float, share: float, seed: int) -> Simulated:
    """Run a phase, or a step of training. In `results` is what each generator asked, with the replies."""

    def talk(prompts: list[list[int]]):
        replies = []
        for ids in prompts:
            replies.append(oel.Sample(ids, ids, (yield oel.Request(ids, limit)).ids))
        return replies

    games = mean, cfg.reply_limit
    asked = conversations(cfg, phase, scripted_lengths(*games), random.Random(f"{phase} {seed}"))
    mean, limit = (cfg.experience_budget / 2, cfg.experience_budget) if phase == "extraction" else games
    sampler = Simulated(MODEL, [*map(talk, asked)], oel.tqdm(disable=True), stop_ids={STOP}, seed=seed)
    loaded = PARAMETERS * ((2, 4) if card.offload else (6, 16))[phase == "training"]  # bytes
    sampler.token_budget = int(share * (card.free - loaded)) // TOKEN_BYTES
    sampler.lengths, sampler.steps, sampler.prefills = torch.from_numpy(scripted_lengths(mean, limit)), [], []
    sampler.run()
    return sampler


def forecast(cfg, card: Card, mean: float, share: float, steps: int, padded=False) -> dict[str, list[float]]:
    """Seconds of all in a round, eager and with graphs, and their sum in minutes. `steps` of training are run."""
    table = {}
    for phase in PHASES:
        n, scale = (steps, cfg.steps / steps) if phase == "training" else (1, 1)
        runs = [simulate(cfg, card, phase, mean, share, seed) for seed in range(n)]
        table[phase] = [scale * sum(x.seconds(card, phase, how, padded) for x in runs) for how in (False, True)]
        if phase == "training":
            table["gradients"] = [scale * sum(x.gradient_seconds(cfg, card) for x in runs)] * 2
    table["optimizer"] = [cfg.steps * PARAMETERS * (24 / 25e9 + 2 / 8e9 if card.offload else 30 / card.bandwidth)] * 2
    return {**table, "minutes of a round": [sum(x) / 60 for x in zip(*table.values(), strict=True)]}


def main() -> None:
    parser = argparse.ArgumentParser(description="How long a round takes on a card: a forecast, on paper.")
    parser.add_argument("--card", choices=CARDS, nargs="+", default=list(CARDS), help="default: all")
    parser.add_argument("--mean", type=float, default=600, help="mean length of a reply in a game [%(default)s]")
    parser.add_argument("--share", type=float, default=0.4, help="of free memory, for the cache [%(default)s]")
    parser.add_argument("--steps", type=int, default=1, choices=range(1, 21), metavar="N", help="of 20 [%(default)s]")
    parser.add_argument("--padded", action="store_true", help="read each row as far as the longest")
    args = parser.parse_args()
    cfg = oel.parse_args(["--model", "Qwen/Qwen3-1.7B"])
    columns = [forecast(cfg, CARDS[card], args.mean, args.share, args.steps, args.padded) for card in args.card]
    print(f"{'forecast in seconds':22}", *(f"{x + how:>12}" for x in args.card for how in (" eager", " graphs")))
    for name in columns[0]:
        print(f"{name:22}", *(f"{x:12.1f}" for column in columns for x in column[name]))


if __name__ == "__main__":
    main()
