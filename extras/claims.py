"""The paper's claims on the lake of many letters: every run behind them, one table, one figure.

    python extras/claims.py            three seeds of everything, some hours on two cores; continues where it stopped
    python extras/claims.py --quick    one seed, one short round of each: under ten minutes, and only a first look

Each setting is an ordinary run of `oel.py` in its own folder under runs/claims/ (see RUNS), so anything can be looked
at and rerun by hand. What they printed goes, number by number, into assets/claims.csv; assets/claims.md is the table,
assets/claims.svg the figure (which needs matplotlib). No run is left out, and none is chosen.
"""

import argparse
import concurrent.futures
import csv
import dataclasses
import itertools
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one thread a run, as many runs as cores
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import oel
import prompts
from envs import BigLake, level_seeds

TINY = oel.PRESETS["tiny"]  # three rounds of it play as many episodes as "one round"
STEPWISE = ["--rounds", "1", "--probe-games", "512", "--eval-every", "8"]
RUNS = {  # name of a setting -> options of oel.py, which plays the lake with the embedded policy by default
    "lessons": [],
    "one round": ["--rounds", "1", "--episodes", str(3 * TINY["episodes"]), "--steps", str(3 * TINY["steps"])],
    "raw logs": ["--context", "raw", "--rounds", "1"],
    "nothing": ["--context", "none", "--rounds", "1"],
    "on-policy": STEPWISE,
    "off-policy": ["--distill", "off-policy", "--kl", "forward", *STEPWISE],
    "another's lessons": ["--rounds", "1"],  # and --extractor
}
QUICK = ["--rounds", "1", "--steps", "4", "--eval-games", "32", "--probe-games", "32", "--lists", "3"]
EPISODES = (1, 2, 4, 8, 16, 32)  # after how many episodes' lessons the in-context pass rate is taken
CEILING = 0.99  # a pass rate from here on counts as all that can be reached


# --- running ----------------------------------------------------------------------------------------------
def start(folder: Path, setting: str, options: list[str]) -> str:
    """One run of oel.py, or the rest of it, and what else is measured on it (more.json); its folder's name.

    RuntimeError with the end of its log if it fails.
    """
    log, more = folder.with_suffix(".log"), folder / "more.json"
    if not finished(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as out:
            command = [sys.executable, str(HERE.parent / "oel.py"), "--out", str(folder), *options]
            done = subprocess.run(command, check=False, stdout=out, stderr=out)
        if done.returncode:
            raise RuntimeError(f"{folder.name} failed: {log.read_text().splitlines()[-1]}")
    if not more.exists():
        found = [x for r in (0, 1) for x in accumulation(folder, r)] if setting == "lessons" else []
        found += counterfactual(folder) if setting in ("lessons", "on-policy", "off-policy") else []
        oel.atomic(more, lambda part: part.write_text(json.dumps(found)))
    return folder.name


def finished(folder: Path) -> bool:
    """Whether a run has the last row that it will have."""
    config, metrics = folder / "config.json", oel.read_jsonl(folder / "metrics.jsonl")
    cfg = json.loads(config.read_text()) if config.exists() else {}
    return bool(metrics) and (metrics[-1]["round"], metrics[-1]["step"]) == (cfg["rounds"], cfg["steps"])


def ends(folder: Path) -> list[dict]:
    """The rows of metrics.jsonl after whole rounds."""
    cfg = json.loads((folder / "config.json").read_text())
    return [row for row in oel.read_jsonl(folder / "metrics.jsonl") if row["step"] in (0, cfg["steps"])]


def settings(folder: Path) -> oel.Config:
    """The options of a run; its config.json also holds checksums of files."""
    config = json.loads((folder / "config.json").read_text())
    return oel.Config(**{f.name: config[f.name] for f in dataclasses.fields(oel.Config) if f.name in config})


def after(folder: Path, cfg: oel.Config, r: int) -> oel.Policy:
    """The policy of a run after round r; 0 is the one that it began with."""
    source = str(folder / f"round{r}/model") if r else cfg.model
    return oel.load_policy(source, oel.find_device(cfg.device), cfg.thinking)


def accumulation(folder: Path, r: int) -> list[tuple]:
    """In-context pass rate of the policy after round r, after the lessons of k new episodes in every list."""
    cfg = settings(folder)
    if r >= cfg.rounds:
        return []
    policy, phase = after(folder, cfg, r), oel.phases(cfg, r + 1)
    most = EPISODES[-1] if cfg.rounds > 1 else 4
    levels = level_seeds("extraction", most, 0) * cfg.lists
    trajectories = oel.deploy(policy, cfg, phase["games to extract from"]._replace(levels=levels))
    found = []
    for k in (k for k in EPISODES if k <= most):
        try:
            first = [t for i, t in enumerate(trajectories) if i % most < k]
            lists = oel.extract(policy, cfg, first, phase["extraction"])
        except oel.UsageError:  # no lesson in any
            lists = []
        lists += [None] * (cfg.lists - len(lists))  # a list without lessons plays without
        played = oel.deploy(policy, cfg, phase["evaluation"], lists)
        found.append((r, 0, f"in_context_after_{k}_episodes", oel.pass_rate(played)))
    return found


def counterfactual(folder: Path) -> list[tuple]:
    """Told the rules of a lake where holes are harmless or the goal, and harmless things and the goal are holes: how
    often the first and the last policy win on it."""
    cfg = settings(folder)
    found = []
    for r in (0, cfg.rounds):
        policy = after(folder, cfg, r)
        games = [BigLake(hole="EFLNG", goal="H", harmless="KMQT") for _ in range(cfg.eval_games)]
        told = prompts.as_items(games[0].rules())
        levels = level_seeds("held_out", len(games))
        episodes = [oel.episode(policy, g, x, str(x), cfg.reply_limit, told) for g, x in zip(games, levels)]
        how = oel.sampling(policy, cfg, oel.phases(cfg, r)["evaluation"], "counterfactual")
        found.append((r, 0, "counterfactual_pass_rate", oel.pass_rate(oel.drive(policy.model, episodes, **how))))
    return found


# --- numbers ----------------------------------------------------------------------------------------------
def found_in(folder: Path) -> list[tuple[int, int, str, float | None]]:
    """The (round, step, metric, value) of one run."""
    found = [tuple(one) for one in json.loads((folder / "more.json").read_text())]
    for row in oel.read_jsonl(folder / "metrics.jsonl"):
        for metric in ("pass_rate", "reply_tokens", "unseen_pass_rate", "forgetting_pass_rate"):
            found.append((row["round"], row["step"], metric, row[metric]))
        found.append((row["round"], row["step"], "in_context_pass_rate", row["in_context_pass_rate"]))
    for before, after in itertools.pairwise(ends(folder)):
        if after["in_context_pass_rate"] is None:  # without lessons there is nothing to show in context
            continue
        gains = [after[metric] - before["pass_rate"] for metric in ("in_context_pass_rate", "pass_rate")]
        found.append((after["round"], after["step"], "in_context_gain", gains[0]))
        found.append((after["round"], after["step"], "consolidated_gain", gains[1]))
    return found


def run_folder(root: Path, setting: str, seed: int) -> Path:
    """Where the run of a setting and a seed lies."""
    return root / f"{setting.replace(' ', '-').replace(chr(39), '')}-{seed}"


def numbers(root: Path, seeds: list[int]) -> list[dict]:
    """Every number behind the claims, one a row."""
    columns = ("setting", "seed", "round", "step", "metric", "value")
    rows = []
    for setting in RUNS:
        for seed in seeds:
            if (path := run_folder(root, setting, seed)).exists():  # another's lessons need another policy
                found = [f for f in found_in(path) if f[-1] is not None]
                rows += [dict(zip(columns, (setting, seed, *f), strict=True)) for f in found]
    return rows


def mean_and_spread(values: list[float]) -> str:
    """Mean (standard deviation over seeds), as percentages."""
    spread = f" ({statistics.stdev(values):.1%})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1%}{spread}" if values else "not measured"


class Numbers:
    """Mean and spread over seeds of what `numbers` found."""

    def __init__(self, rows: list[dict]):
        self.rows = rows

    def values(self, setting: str, metric: str, round: int | None = None, step: int | None = None) -> list[float]:
        wanted = {"setting": setting, "metric": metric, "round": round, "step": step}
        wanted = {key: value for key, value in wanted.items() if value is not None}
        return [row["value"] for row in self.rows if all(row[key] == value for key, value in wanted.items())]

    def mean(self, *where, **more) -> float | None:
        values = self.values(*where, **more)
        return statistics.mean(values) if values else None

    def shown(self, *where, **more) -> str:
        return mean_and_spread(self.values(*where, **more))

    def rounds(self, setting: str) -> list[int]:
        return sorted({row["round"] for row in self.rows if row["setting"] == setting})

    def ends(self, setting: str, metric: str) -> list[str]:
        """A metric after every round. The last step of a round is its end."""
        shown = []
        for r in self.rounds(setting):
            steps = {row["step"] for row in self.rows if (row["setting"], row["round"]) == (setting, r)}
            shown.append(self.shown(setting, metric, r, max(steps)))
        return shown


# --- the table --------------------------------------------------------------------------------------------
def more(a: float | None, b: float | None) -> str:
    """Whether one mean is larger than the other, by a point at least."""
    if a is None or b is None:
        return "not measured"
    return "equal" if abs(a - b) < 0.01 else "yes" if a > b else "no"


def uninformative(a: list[float], b: list[float]) -> str:
    """Why a comparison of pass rates, one a seed, says nothing; "" if it says something."""
    if min(a + b, default=0) >= CEILING:
        return f"says nothing: {len(a + b)} of {len(a + b)} values at the ceiling"
    return f"says nothing: {len(a)} of {len(a)} seeds equal" if a and a == b else ""


def compared(a: list[float], b: list[float]) -> str:
    """Whether the pass rates a have the larger mean, if the comparison says anything."""
    if not a or not b:
        return "not measured"
    return uninformative(a, b) or more(statistics.mean(a), statistics.mean(b))


def table(n: Numbers) -> str:
    """The claims as Markdown: the paper's figure, ours, and whether it held. Ours is mean (spread) over seeds."""
    lines = ["| claim | the paper | here | held |", "|---|---|---|---|"]

    def add(claim: str, paper: str, here: str, held: str) -> None:
        lines.append(f"| {claim} | {paper} | {here} | {held} |")

    rates = [n.mean("lessons", "pass_rate", r) for r in n.rounds("lessons")]
    rises = all(b > a or b >= CEILING for a, b in itertools.pairwise(rates))
    add("Pass rate rises every round", "yes, both games", " → ".join(n.ends("lessons", "pass_rate")),
        "yes" if rises else "no")  # fmt: skip
    lengths = [n.mean("lessons", "reply_tokens", r) for r in n.rounds("lessons")]
    add("Replies get shorter", "to about 70% in three rounds (Frozen Lake)",
        " → ".join(f"{x:.1f}" for x in lengths) + f" tokens: to {lengths[-1] / lengths[0]:.0%}",
        more(lengths[0] / lengths[-1], 1))  # fmt: skip
    three, one = n.values("lessons", "pass_rate", 3), n.values("one round", "pass_rate", 1)
    add("Three rounds beat one with as many episodes and steps", "not tried",
        f"{mean_and_spread(three)} against {mean_and_spread(one)}", compared(three, one))  # fmt: skip
    for metric, where, paper in (
        ("in_context_pass_rate", "in context", "18.2% against 10.9% (Sokoban)"),
        ("pass_rate", "consolidated", "21.4% against 7.8% (Sokoban)"),
    ):
        names = ("lessons", "raw logs", "nothing")
        add(f"Lessons beat raw logs, {where}, round 1", paper,
            ", ".join(f"{name} {n.shown(name, metric, 1)}" for name in names),
            compared(*(n.values(name, metric, 1) for name in names[:2])))  # fmt: skip
    add("Off-policy distillation forgets, on-policy does not (512 games)",
        "IF-Eval stays at 66% to 67%; off-policy falls", *forgetting(n))  # fmt: skip
    told = {way: [n.shown(way, "counterfactual_pass_rate", r) for r in (0, 1)] for way in ("on-policy", "off-policy")}
    last = [n.values(way, "counterfactual_pass_rate", 1) for way in told]
    add("After on-policy distillation it believes its prompt more than after off-policy (holes and others exchanged, and "
        "said so)", "-", ", ".join(f"{way} {' → '.join(shown)}" for way, shown in told.items()), compared(*last))  # fmt: skip
    for metric, where, paper in (
        ("in_context_pass_rate", "in context", "23.8% against 18.0% (Frozen Lake)"),
        ("pass_rate", "consolidated", "31.1% against 22.7% (Frozen Lake)"),
    ):
        own, other = (n.values(name, metric, 1) for name in ("lessons", "another's lessons"))
        add(f"Own lessons beat a better player's, {where}, round 1", f"{paper}, a bigger model's",
            f"{mean_and_spread(own)} against {mean_and_spread(other)}", compared(own, other))  # fmt: skip
    for r in (0, 1):
        name = "in_context_after_{}_episodes".format
        measured = [k for k in EPISODES if n.values("lessons", name(k), r)]
        curve = [n.mean("lessons", name(k), r) for k in measured]
        shown = ", ".join(f"{k}: {n.shown('lessons', name(k), r)}" for k in measured)
        flat = next((k for k, rate in zip(measured, curve, strict=True) if rate > max(curve) - 0.01), None)
        add(f"Accumulation saturates: the policy after round {r}, in context after k episodes", "rises, then levels off",
            shown or "not measured", f"yes, from {flat} on" if flat and 1 < flat < measured[-1] else "no")  # fmt: skip
    pairs = [
        [n.mean("lessons", metric, r) for metric in ("in_context_pass_rate", "pass_rate")]
        for r in n.rounds("lessons")
    ]
    add("More is internalised than the lessons bring in context", "31.1% from 23.8% in context (Frozen Lake)",
        "in context → consolidated, by round: " + ", ".join(f"{a:.1%} → {b:.1%}" for a, b in pairs[1:]),
        "yes" if all(b > a for a, b in pairs[1:]) else "no")  # fmt: skip
    unseen = n.ends("lessons", "unseen_pass_rate")
    first, last = (n.mean("lessons", "unseen_pass_rate", r) for r in (0, n.rounds("lessons")[-1]))
    add("It learns rules, not boards: 3x3 boards, never trained on", "-", " → ".join(unseen), more(last, first))
    told = [n.mean("lessons", "counterfactual_pass_rate", r) for r in (0, n.rounds("lessons")[-1])]
    add("It still believes its prompt after three rounds (holes and others exchanged, and said so)", "-",
        " → ".join(n.shown("lessons", "counterfactual_pass_rate", r) for r in (0, n.rounds("lessons")[-1])),
        "not measured" if None in told else "yes" if told[1] > told[0] - 0.05 else "no")  # fmt: skip
    return "\n".join(lines)


def at_level(curve: list[tuple[float, float]], level: float) -> float:
    """What was kept when a curve of (pass rate, kept) first passed a level, on the straight line between steps."""
    for (rate, kept), (later, less) in itertools.pairwise(curve):
        if later >= level:
            share = (level - rate) / (later - rate) if later > rate else 1.0
            return kept + min(1.0, max(0.0, share)) * (less - kept)
    return curve[-1][1]


def forgetting(n: Numbers) -> tuple[str, str]:
    """The forgetting probe of both ways of distilling where they pass equally often, and at the end."""
    equal, end, levels = {}, {}, []
    for seed in sorted({row["seed"] for row in n.rows if row["setting"] == "on-policy"}):
        curves = {}
        for way in ("on-policy", "off-policy"):
            rows = [row for row in n.rows if (row["setting"], row["seed"]) == (way, seed)]
            values = {m: {row["step"]: row["value"] for row in rows if row["metric"] == m}
                      for m in ("pass_rate", "forgetting_pass_rate")}  # fmt: skip
            curves[way] = [
                (values["pass_rate"][s], values["forgetting_pass_rate"][s]) for s in sorted(values["pass_rate"])
            ]
        levels.append(min(max(rate for rate, _ in curve) for curve in curves.values()))  # that both of them reach
        for way, curve in curves.items():
            equal.setdefault(way, []).append(at_level(curve, levels[-1]))
            end.setdefault(way, []).append(curve[-1])
    if not levels:
        return "", "not measured"
    here = f"where both pass {mean_and_spread(levels)}: " + ", ".join(
        f"{way} {mean_and_spread(equal[way])}, at the end {mean_and_spread([kept for _, kept in end[way]])} "
        f"passing {mean_and_spread([rate for rate, _ in end[way]])}"
        for way in equal
    )
    return here, more(statistics.mean(equal["on-policy"]), statistics.mean(equal["off-policy"]))


# --- the figure -------------------------------------------------------------------------------------------
def draw(n: Numbers, path: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        print("claims.py: no figure: it needs matplotlib (pip install matplotlib)")
        return
    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams.update({"svg.hashsalt": "oel", "font.size": 8, "axes.spines.top": False})
    figure, axes = pyplot.subplots(2, 3, figsize=(10, 5.4), layout="constrained")
    (rates, lengths, contexts), (forgets, accumulates, internalised) = axes
    rounds = n.rounds("lessons")
    for panel, metric in ((rates, "pass_rate"), (rates, "in_context_pass_rate"), (lengths, "reply_tokens")):
        known = [r for r in rounds if n.values("lessons", metric, r)]
        means = [n.mean("lessons", metric, r) for r in known]
        low, high = ([f(n.values("lessons", metric, r)) for r in known] for f in (min, max))
        color = "C1" if metric.startswith("in") else "C0"
        panel.plot(
            known, means, f"{color}o-", markersize=3, label=metric.removesuffix("_pass_rate").replace("_", " ")
        )
        panel.fill_between(known, low, high, color=color, alpha=0.15)
    ones = n.values("one round", "pass_rate", 1)
    rates.plot([rounds[-1]] * len(ones), ones, "kx", markersize=4, label="one round, as many episodes")
    rates.set(title="pass rate by round", xticks=rounds, ylim=(-0.03, 1.03))
    lengths.set(title="reply tokens by round", xticks=rounds)
    rates.legend(frameon=False, fontsize=7)
    names = ("lessons", "raw logs", "nothing", "another's lessons")
    for i, name in enumerate(names):
        for j, metric in enumerate(("in_context_pass_rate", "pass_rate")):
            where, values = i + 0.4 * j - 0.2, n.values(name, metric, 1)
            contexts.bar(where, n.mean(name, metric, 1) or 0, 0.4, color=f"C{1 - j}", alpha=0.7)
            contexts.plot([where] * len(values), values, "k.", markersize=3)
    contexts.set(title="round 1: in context (left), consolidated", ylim=(0, 1.03))
    contexts.set_xticks(range(len(names)), names)
    for i, way in enumerate(("on-policy", "off-policy")):
        for seed in sorted({row["seed"] for row in n.rows if row["setting"] == way}):
            one = Numbers([row for row in n.rows if row["seed"] == seed])
            steps = sorted({row["step"] for row in one.rows if row["setting"] == way})
            line = [
                [one.mean(way, metric, int(s > 0), s) for s in steps]
                for metric in ("pass_rate", "forgetting_pass_rate")
            ]
            forgets.plot(*line, f"C{i}.-", linewidth=0.8, markersize=3, label=way if seed == 1 else None)
    forgets.set(title="forgetting probe, by pass rate, step by step", xlabel="pass rate", ylim=(0.7, 1.005))
    if n.values("on-policy", "pass_rate"):
        forgets.legend(frameon=False)
    for r in (0, 1):
        means = [n.mean("lessons", f"in_context_after_{k}_episodes", r) for k in EPISODES]
        accumulates.plot(EPISODES, means, f"C{r}o-", markersize=3, label=f"the policy after round {r}")
    accumulates.set(title="in context after k episodes' lessons", xlabel="k", xscale="log", ylim=(-0.03, 1.03))
    accumulates.set_xticks(EPISODES, map(str, EPISODES))
    accumulates.legend(frameon=False)
    for r in rounds[1:]:
        gains = [n.values("lessons", f"{kind}_gain", r) for kind in ("in_context", "consolidated")]
        internalised.plot(*gains, f"C{r}o", markersize=4, alpha=0.6, label=f"round {r}")
    internalised.legend(frameon=False)
    internalised.axline((0, 0), slope=1, color="grey", linewidth=0.8)
    internalised.set(title="gain of each round", xlabel="in context", ylabel="consolidated")
    figure.savefig(path, metadata={"Date": None, "Creator": None})


# --- main -------------------------------------------------------------------------------------------------
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one seed and one short round of each setting")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 1 to N of every setting [3]")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at the same time [all cores]")
    parser.add_argument("--extractor", default="", help="another policy, whose lessons are compared with one's own")
    parser.add_argument("--assets", type=Path, default=HERE.parent / "assets", help="where table and figure go")
    args = parser.parse_args()
    root = HERE.parent / "runs" / ("claims-quick" if args.quick else "claims")
    seeds = [1] if args.quick else list(range(1, args.seeds + 1))
    todo = []
    for seed in seeds:
        for name, options in RUNS.items():
            if name == "another's lessons":
                if not args.extractor:
                    continue
                options = [*options, "--extractor", args.extractor]
            options = ["--probe-games", "64", *options, "--seed", str(seed), *(QUICK if args.quick else [])]
            todo.append((run_folder(root, name, seed), name, options))
    with concurrent.futures.ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
        try:
            for done in concurrent.futures.as_completed([pool.submit(start, *one) for one in todo]):
                print(f"done: {done.result()}", flush=True)
        except RuntimeError as error:
            pool.shutdown(cancel_futures=True)
            sys.exit(f"claims.py: {error}; the same command goes on from here")
    rows = numbers(root, seeds)
    text = f"Seeds {seeds[0]} to {seeds[-1]}, embedded policy, `python extras/claims.py`.\n\n{table(Numbers(rows))}\n"
    print(text)
    if args.quick:
        return
    args.assets.mkdir(exist_ok=True)
    with (args.assets / "claims.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    (args.assets / "claims.md").write_text(text)
    draw(Numbers(rows), args.assets / "claims.svg")


if __name__ == "__main__":
    main()
