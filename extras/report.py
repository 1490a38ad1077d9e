"""The story of a run as one HTML page, also while the run goes on.

    python extras/report.py runs/tiny-biglake-1

writes report.html into the run's folder, a page that needs nothing but itself: the result, loss and time,
every lesson, the same boards before and after, and where in a reply the lessons matter. Only that last part
loads the models and needs torch; `--no-heat-map` leaves it out.
"""

import argparse
import base64
import dataclasses
import hashlib
import html
import json
import math
import re
import sys
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

PHASES = {  # record in a round's folder, in the order of writing -> the phase that ends with it
    "trajectories.jsonl": "playing, to write lessons about",
    "experience": "writing the lessons",
    "in_context.jsonl": "playing with the lessons in the prompt",
    "logs.jsonl": "playing, to learn on",
    "model": "consolidating",
    "held_out.jsonl": "evaluating",
}
RATES = {  # in metrics.jsonl -> on the page
    "pass_rate": "pass rate",
    "in_context_pass_rate": "in context",
    "unseen_pass_rate": "unseen levels",
    "forgetting_pass_rate": "forgetting probe",
}
# What a record has to hold: a type, one of several in a tuple, [of every item], {of these keys}.
CONFIG = dict.fromkeys(("seed", "rounds", "steps", "eval_games", "probe_games"), int)
CONFIG |= {"model": str, "env": str, "logs": (str, type(None))}
METRICS = dict.fromkeys(RATES, (float, type(None))) | {"round": int, "step": int}
METRICS |= {"pass_rate": float, "reply_tokens": float, "seconds": float}
STEPS = {"round": int, "step": int, "tokens": int, "loss": float, "seconds": float}
TURN = {"prompt": str, "response": str, "feedback": str}
TRAJECTORY = {"id": str, "turns": [TURN], "outcome": {"won": bool, "reply_tokens": int}}


class Problem(Exception):
    """Something the user can fix, in one line."""


# --- reading ----------------------------------------------------------------------------------------------
@dataclass
class Run:
    folder: Path
    config: dict
    metrics: list[dict]
    steps: list[dict]
    played: dict[int, dict[str, list[dict]]]  # round -> file -> trajectories
    lists: dict[int, dict[str, list[str]]]  # round -> file -> lessons


def fits(value, kind) -> bool:
    """Whether a JSON value is of a kind; numbers have to be finite, and of a size that can be drawn."""
    if isinstance(kind, dict):
        return isinstance(value, dict) and all(fits(value.get(key), k) for key, k in kind.items())
    if isinstance(kind, list):
        return isinstance(value, list) and all(fits(item, kind[0]) for item in value)
    if isinstance(kind, tuple):
        return any(fits(value, k) for k in kind)
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool) and abs(value) < 1e9
    return isinstance(value, kind)


def read_jsonl(path: Path, kind: dict) -> list[dict]:
    """The objects of a JSONL file, none if it is not there (yet). Problem names a line that is none."""
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n") if path.exists() else [], 1):
        try:
            rows += [json.loads(line.decode())] if line.strip() else []
        except (ValueError, RecursionError) as error:
            raise Problem(f"{path}, line {number}: not JSON ({error})") from None
        if line.strip() and not fits(rows[-1], kind):
            raise Problem(f"{path}, line {number}: not what oel.py writes there")
    return rows


def read_run(folder: Path) -> Run:
    """All that a run has recorded so far. Problem if the folder is not that of a run."""
    if not folder.is_dir():
        raise Problem(f"{folder}: there is no such folder")
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        config = None
    if not fits(config, CONFIG):
        raise Problem(f"{folder} is not the folder of a run: it has no config.json, or not one of oel.py's")
    played, lists = {}, {}
    names = [re.fullmatch("round(0|[1-9][0-9]{0,5})", path.name) for path in folder.iterdir()]
    for r in sorted(int(name[1]) for name in names if name):
        plays = () if config.get("logs") else PHASES  # somebody else's logs are no games to show
        paths = [folder / f"round{r}" / name for name in plays if name.endswith(".jsonl")]
        played[r] = {path.name: read_jsonl(path, TRAJECTORY) for path in paths if path.exists()}
        for file in sorted((folder / f"round{r}/experience").glob("*.txt")):
            lines = [line.strip() for line in file.read_text("utf-8", "replace").splitlines() if line.strip()]
            lists.setdefault(r, {})[file.name] = [s.removeprefix("- EXPERIENCE ITEM:").strip() for s in lines]
    records = read_jsonl(folder / "metrics.jsonl", METRICS), read_jsonl(folder / "steps.jsonl", STEPS)
    return Run(folder, config, *records, played, lists)


def ends(run: Run) -> dict[int, dict]:
    """The metrics at the end of each round; of round 0, those before learning."""
    steps = run.config["steps"]
    return {row["round"]: row for row in run.metrics if row["step"] == steps or not row["round"]}


def finished_rounds(run: Run) -> int:
    """The number of the last finished round; -1 if not even the evaluation before learning is done.
    A run on --logs evaluates nothing: its only round ends when the model is saved."""
    if run.config.get("logs"):
        return int((run.folder / "round1/model").exists())
    return max(ends(run), default=-1)


def state(run: Run) -> str:
    """Where the run stands, told from which records are there."""
    done, rounds, steps = finished_rounds(run), run.config["rounds"], run.config["steps"]
    if done >= rounds:
        return f"finished, {done} of {rounds} rounds"
    folder, made = run.folder / f"round{done + 1}", sum(step["round"] == done + 1 for step in run.steps)
    phases = list(PHASES) if done >= 0 else ["held_out.jsonl"]
    phase = next((name for name in phases if not (folder / name).exists()), "held_out.jsonl")
    within = f" (step {made} of {steps} made)" if phase == "model" else ""
    return f"round {done + 1} of {rounds}: {PHASES[phase]}{within}, or stopped there"


def label(run: Run, r: int) -> str:
    """The policy behind round r's evaluation; with --eval-every that may be one from within the round."""
    last = [row["step"] for row in run.metrics if row["round"] == r][-1:]
    within = r and last and last[0] < run.config["steps"]
    return f"in round {r}, after step {last[0]}" if within else f"after round {r}" if r else "before learning"


# --- text, numbers, tables and charts as HTML -------------------------------------------------------------
UNSEEN = re.compile(  # controls, marks that turn or hide text, and what is no character
    "[\0-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff"
    "\ufff9-\ufffb\ufffe\uffff\U000e0000-\U000e007f]"
)
SYMBOLS = {chr(i): chr(0x2400 + i) for i in range(32)} | {"\x7f": "\u2421"}
MARKS = ("M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0Z", "M0-5.5L5.5 0L0 5.5L-5.5 0Z", "M-4-4H4V4H-4Z", "M0-5L5 4H-5Z")


def esc(value) -> str:
    """Whatever comes from the run as HTML text: no markup is left, and what would not show gets a symbol."""
    return html.escape(UNSEEN.sub(lambda found: SYMBOLS.get(found[0], "\ufffd"), str(value)))


def percent(x: float | None) -> str:
    return "–" if x is None else f"{100 * x:.1f}".removesuffix(".0") + "%"


def wilson(p: float, n: int) -> tuple[float, float]:
    """The 95% Wilson interval of a share p of n games."""
    z, n = 1.96, max(n, 1)
    spread = z * math.sqrt(max(0, p * (1 - p) / n + z * z / (4 * n * n)))
    return tuple((p + z * z / (2 * n) + side) / (1 + z * z / n) for side in (-spread, spread))


def table(head: list[str], rows: list[list[str]], name: str) -> str:
    """Cells of HTML as a table, in a box that scrolls by itself where the screen is narrow."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    cells = [f'<th scope="row">{first}</th><td>{"</td><td>".join(rest)}</td>' for first, *rest in rows]
    body = "".join(f"<tr>{row}</tr>" for row in cells)
    box = f'<div class="wide" role="region" tabindex="0" aria-label="{name}">'
    return f"{box}<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"


def ticks(top: float, size: float = 1) -> list[tuple[float, str]]:
    """A few round multiples of `size`, from 0 to `top` or just above, and how they are written."""
    size *= max(1, 10 ** math.floor(math.log10(max(top / size / 4, 1))))
    step = next(size * m for m in (1, 2, 5, 10) if size * m * 5 >= top)
    return [(i * step, f"{i * step:,.12g}") for i in range(max(2, math.ceil(top / step) + 1))]


def chart(x_label: str, x_ticks: list, y_label: str, y_ticks: list, lines: list) -> str:
    """An SVG image of lines (mark, points), a point (x, y, low, high, text); axes end where ticks do."""

    def scale(at: list, start: float, end: float):
        low, high = at[0][0], at[-1][0]
        return lambda value: round(start + (value - low) / (high - low) * (end - start), 1)

    px, py = scale(x_ticks, 70, 398), scale(y_ticks, 226, 12)
    size = max(0.3, min(1, 40 / sum(len(points) for _, points in lines)))
    said = esc("; ".join(point[4] for _, points in lines for point in points))
    svg = f'<svg viewBox="0 0 420 270" role="img"><title>{y_label} by {x_label}</title><desc>{said}</desc>'
    for y, text in y_ticks:
        svg += f'<path class="grid" d="M56 {py(y)}H412"/>'
        svg += f'<text class="end" x="50" y="{py(y) + 4}">{text}</text>'
    for x, text in x_ticks:
        svg += f'<path class="grid" d="M{px(x)} 226v5"/><text x="{px(x)}" y="246">{text}</text>'
    svg += f'<text x="234" y="265">{x_label}</text>'
    svg += f'<text transform="translate(11 119) rotate(-90)">{y_label}</text>'
    for mark, points in lines:
        path = "L".join(f"{px(x)} {py(y)}" for x, y, *_ in points)
        svg += f'<g class="s{mark}"><path class="line" d="M{path}"/>'
        for x, y, low, high, text in points:
            svg += f'<g><title>{esc(text)}</title><path class="bar" d="M{px(x)} {py(low)}V{py(high)}"/>'
            svg += f'<path class="dot" transform="translate({px(x)} {py(y)}) scale({size:.2f})" '
            svg += f'd="{MARKS[mark]}"/></g>'
        svg += "</g>"
    return svg + "</svg>"


# --- the sections -----------------------------------------------------------------------------------------
def reading(run: Run) -> str:
    """The result in two sentences."""
    rows, n = list(ends(run).values()), run.config["eval_games"]
    if run.config.get("logs"):
        return "The run learned from the logs it was given. Nothing was played, so there is no pass rate."
    if not rows:
        return "Nothing is measured yet. The first numbers come when the held-out levels have been played."
    first, last = rows[0], rows[-1]
    won = [f"{round(row['pass_rate'] * n)} ({percent(row['pass_rate'])})" for row in (first, last)]
    text = f"{label(run, first['round']).capitalize()} the policy won {won[0]} of {n} held-out games"
    if first is last:
        return text + ". No round of learning is finished yet, so there is nothing to compare this with."
    one, two = sorted(wilson(row["pass_rate"], n) for row in (first, last))
    text += f", and {won[1]} after round {last['round']}, "
    text += "perhaps by chance: the" if one[1] >= two[0] else "more than by chance: not even the"
    text += f" 95% intervals overlap. The mean reply went from {first['reply_tokens']:.0f}"
    text += f" to {last['reply_tokens']:.0f} tokens"
    for key in ("unseen_pass_rate", "forgetting_pass_rate"):
        if None not in (first.get(key), last.get(key)):
            text += f", wins on the {RATES[key]} from {percent(first[key])} to {percent(last[key])}"
    if (told := last.get("in_context_pass_rate")) is not None:
        text += f"; with the last lessons in its prompt, not yet in its weights, it had won {percent(told)}"
    return text + "."


def results(run: Run) -> str:
    """Pass rates and reply length over the rounds: two charts and a table."""
    if not run.metrics:
        return "<p>No evaluation is finished yet.</p>"
    cfg, lines, lengths, rows, legend = run.config, [], [], [], ""
    x = "round", ticks(max(row["round"] for row in run.metrics))
    at = [max(0, row["round"] - 1 + row["step"] / max(cfg["steps"], 1)) for row in run.metrics]
    for mark, (key, name) in enumerate(RATES.items()):
        points, aside = [], (mark - 1.5) * min(0.02 * x[1][-1][0], 0.15)  # side by side where they coincide
        for r, p in zip(at, (row.get(key) for row in run.metrics), strict=True):
            if p is not None:
                low, high = wilson(p, cfg["probe_games" if mark else "eval_games"])
                said = f"round {r:.3g}, {name}: {percent(p)} ({percent(low)} to {percent(high)})"
                points.append((r + aside, p, low, high, said))
        lines += [(mark, points)] * bool(points)
        sign = f'<path class="line" d="M-11 0H11"/><path class="dot" d="{MARKS[mark]}"/>'
        sign = f'<svg viewBox="-11 -7 22 14" aria-hidden="true">{sign}</svg>'
        legend += f'<li class="s{mark}">{sign} {name}</li>' * bool(points)
    for r, row in zip(at, run.metrics, strict=True):
        low, high = map(percent, wilson(row["pass_rate"], cfg["eval_games"]))
        won, *others = (percent(row.get(key)) for key in RATES)
        won, n = f"{won} <small>({low} to {high})</small>", row["reply_tokens"]
        rows.append([str(row["round"]), str(row["step"]), won, *others, f"{n:.1f}"])
        lengths.append((r, n, n, n, f"round {r:.3g}: {n:.1f} tokens"))
    note = ""
    if cfg["env"] == "frozenlake" and cfg["eval_games"] > 19:
        note = f"A 3x3 lake has only 19 boards, so {cfg['eval_games']} games are repetitions of them, and "
        note += "the interval is too narrow as a statement about other boards. "
    rates = chart(*x, "games won", [(i / 4, f"{25 * i}%") for i in range(5)], lines)
    tokens = chart(*x, "tokens a reply", ticks(max(p[1] for p in lengths)), [(0, lengths)])
    return f"""<div class="two"><figure>{rates}<figcaption><ul>{legend}</ul></figcaption></figure>
<figure>{tokens}<figcaption>Mean length of the replies behind the pass rate.</figcaption></figure></div>
{table(["round", "step", *RATES.values(), "tokens a reply"], rows, "Results")}
<p class="note">Round 0 is before learning. Bars are 95% Wilson intervals, of {cfg["eval_games"]} games for
the pass rate and {cfg["probe_games"]} for the others. {note}<em>In context</em> is the policy that entered the
round, with the round's lessons in its prompt; the pass rate of the same row has them in the weights. The
unseen levels are boards of another size (of FrozenLake 4x4, of biglake 3x3), on which it never learned.</p>"""


def losses(run: Run) -> str:
    """The loss of every step, a line a round."""
    steps, lines, ys = max(run.config["steps"], 1), defaultdict(list), []
    for s in run.steps:
        ys.append(y := math.log10(max(s["loss"], 1e-6)))
        said = f"round {s['round']}, step {s['step']}: {s['loss']:.3g}"
        lines[s["round"]].append(((s["round"] - 1) * steps + s["step"], y, y, y, said))
    if not lines:
        return "<p>No step of consolidation is made yet.</p>"
    decades = range(math.floor(min(ys)), math.floor(max(ys)) + 2)
    y = [(k, f"{10.0**k:g}" if k > -4 else f"1e{k}") for k in decades]
    x = f"step, {steps} a round", ticks(max(lines) * steps, steps)
    svg = chart(*x, "loss, nats a token", y, [(0, points) for points in lines.values()])
    told = "Mean reverse KL over a step's response tokens; the scale is logarithmic and ends at 1e-6."
    return f"<figure>{svg}<figcaption>{told}</figcaption></figure>"


def timing(run: Run) -> str:
    """Seconds and tokens a second of the phases: measured where the run did, else from the files' times."""

    def written(r: int, name: str) -> float:
        path = run.folder / f"round{r}" / name
        return path.stat().st_mtime if path.exists() else math.nan

    own = run.config.get("logs")  # then only two phases work: nothing is played or evaluated
    names = ["experience", "model"] if own else list(PHASES)
    columns = {"phase": [*map(PHASES.get, names), "the whole round"]}
    for r in run.played:
        cells, before = [], written(r, "logs.jsonl") if own else written(r - 1, "held_out.jsonl")
        spent, learned = (sum(s[key] for s in run.steps if s["round"] == r) for key in ("seconds", "tokens"))
        copied = written(r, "model") - written(r, "logs.jsonl") < 0.9 * spent  # a copy's times say nothing
        for name in names:
            now, read = written(r, name), [] if name == "held_out.jsonl" else run.played[r].get(name, [])
            took, tokens, sign = now - before, sum(t["outcome"]["reply_tokens"] for t in read), "≈ "
            if name == "model":
                took, tokens, sign = spent, learned, ""
            rate = f", {tokens / took:,.0f} tokens/s" if tokens and took > 0 else ""
            cells.append(f"{sign}{took:,.1f} s{rate}" if took > 0 and not (sign and copied) else "–")
            before = now
        columns[f"round {r}"] = [*cells, f"{ends(run)[r]['seconds']:,.1f} s" if r in ends(run) else "–"]
    if not run.played:
        return "<p>No record of any phase is there yet.</p>"
    rows = [list(row) for row in zip(*columns.values(), strict=True)]
    return f"""{table(list(columns), rows, "Time by phase")}
<p class="note">Consolidation and the whole round are as the run measured them. What is marked ≈ is derived:
the time from one record's writing to the next one's, pauses of a stopped run included, and the replies'
tokens by that time. It is left out where copying the folder has lost the times.</p>"""


def lessons(run: Run) -> str:
    """Every list of every round, with counts, and with what the round before had not."""
    text = ""
    for r, files in run.lists.items():
        known = {lesson for told in run.lists.get(r - 1, {}).values() for lesson in told}
        count = Counter(lesson for told in files.values() for lesson in told)
        new = {lesson for lesson in count if known and lesson not in known}
        shown = {lesson: esc(lesson) + ' <b class="won">new</b>' * (lesson in new) for lesson in count}
        rows = []
        for lesson, n in count.most_common():
            within = sum(lesson in told for told in files.values())
            rows.append([shown[lesson], str(n), f"{within} of {len(files)}"])
        text += f"<details><summary>Round {r}: {len(files)} lists, {count.total()} lessons, "
        text += f"{len(count)} different" + f", {len(new)} of them new" * bool(known) + "</summary>"
        text += table(["lesson", "times", "lists"], rows, f"Lessons of round {r}") + '<div class="two">'
        for name, told in files.items():
            items = "".join(f"<li>{shown[lesson]}</li>" for lesson in told)
            text += f"<section><h3>{esc(name)}</h3><ol>{items}</ol></section>"
        text += "</div></details>"
    note = '<p class="note">New is what stands in no list of the round before.</p>'
    return text + note if text else "<p>No lesson is written yet.</p>"


def last_board(prompt: str) -> str:
    return f"<pre>{esc(prompt.rpartition(chr(10) * 2)[2])}</pre>"


def episode(trajectory: dict) -> str:
    """The turns of an episode: the board unless the game has just shown it, the reply, what the game said."""
    text, shown = "", None
    for i, turn in enumerate(trajectory["turns"], 1):
        text += last_board(turn["prompt"]) if not shown or not turn["prompt"].endswith(shown) else ""
        text += f'<h4>Reply {i}</h4><pre class="reply">{esc(turn["response"])}</pre>'
        text += f"<h4>The game</h4><pre>{esc(turn['feedback'])}</pre>"
        shown = turn["feedback"]
    return text


def boards(run: Run, pairs: int) -> str:
    """Held-out boards as the policy of every round played them, side by side."""
    files = {r: {t["id"]: t for t in f.get("held_out.jsonl", [])} for r, f in run.played.items()}
    files = {r: played for r, played in files.items() if played}
    if not files:
        return "<p>No held-out board is played yet.</p>"
    kinds, text, called = defaultdict(list), "", {r: label(run, r) for r in files}
    for name in next(iter(files.values())):  # kinds: won or not, by round -> boards
        if all(name in played for played in files.values()):
            kinds[tuple(played[name]["outcome"]["won"] for played in files.values())].append(name)
    chosen = [name for names in zip_longest(*kinds.values()) for name in names if name is not None][:pairs]
    for name in chosen:
        heads = columns = ""
        for r, played in files.items():
            won = played[name]["outcome"]["won"]
            end = '<b class="won">✓ won</b>' if won else '<b class="lost">✗ lost</b>'
            heads += f' <span data-round="{r}" data-won="{won}">{called[r]} {end}</span>'
            columns += f'<section data-round="{r}"><h3>{called[r]}</h3>{episode(played[name])}</section>'
        text += f'<details class="board"{" open" * (name == chosen[0])}><summary>{esc(name)}{heads}</summary>'
        text += f'<div class="two">{columns}</div></details>'
    both = Counter((kind[0], kind[-1]) for kind, names in kinds.items() for _ in names)
    note = f'<p class="note">{len(chosen)} of {both.total()} boards stand below, in turn from every pattern '
    note += "of wins and losses over the rounds, so that what is rare is seen; --pairs sets how many.</p>"
    if len(files) < 2:
        return f"<p>There is no round yet to compare with.</p>{note}{text}"
    picks = ""
    for name, at in (("before", min(called)), ("after", max(called))):
        words = "".join(f'<option value="{r}"{" selected" * (r == at)}>{called[r]}</option>' for r in called)
        picks += f'<select id="{name}" aria-label="{name}">{words}</select> '
    names = ("all", "newly won", "newly lost", "won", "lost")  # the last two: by the second choice
    buttons = "".join(f'<button type="button" data-keep="{name}">{name}</button>' for name in names)
    return f"""<p>Played {called[min(called)]} and {called[max(called)]}: {both[False, True]} boards
newly won, {both[True, False]} newly lost, {both[True, True]} won both times, {both[False, False]} lost both times.</p>
{note}<div id="controls" hidden>{picks}<div role="group" aria-label="Boards to show">{buttons}</div>
<output></output></div>{text}"""


# --- the heat map: the only part that needs torch and the models ------------------------------------------
HEAT = (0.01, 0.03, 0.1, 0.3, 1, 3)  # nats at which a darker colour begins


def scored(run: Run, r: int, n: int = 3) -> list[tuple]:
    """A few logged prompts of round r, each with a reply [(token, KL), ...] before and one after learning."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import torch

    import oel
    import prompts

    oel.logging.disable_progress_bar()
    known = {f.name for f in dataclasses.fields(oel.Config)}  # config.json also has checksums
    cfg = oel.Config(**{name: value for name, value in run.config.items() if name in known})
    folder = run.folder / f"round{r}"
    finished = finished_rounds(run) >= cfg.rounds  # if not, the run needs its accelerator for itself
    device = oel.find_device(cfg.device if finished else "cpu")
    logs = read_jsonl(folder / "logs.jsonl", {"turns": [TURN]})
    logged = [turn["prompt"] for trajectory in logs for turn in trajectory["turns"]]
    if not logged:
        raise Problem(f"round{r}/logs.jsonl is not there, or empty")
    logged = logged[:: max(1, len(logged) // n)][:n]
    experience = min((folder / "experience").iterdir()).read_text(encoding="utf-8")
    sources = [str(run.folder / f"round{r - 1}/model") if r > 1 else cfg.model, str(folder / "model")]
    teacher, after = (oel.load_policy(source, device, cfg.thinking) for source in sources)
    how = oel.sampling(teacher, cfg, oel.Phase([], oel.derive_seed(cfg.seed, r), nucleus=False), None)

    @torch.no_grad()
    def score(student, x: str, ids: list[int], reply: list[int]) -> list[tuple[str, float]]:
        told = teacher.encode(prompts.with_experience(x, experience))
        p = oel.response_hidden(student.model, [ids], [reply])  # (N, D)
        q = oel.response_hidden(teacher.model, [told], [reply])
        heads = [s.model.get_output_embeddings().weight.detach()[: s.vocab_size] for s in (student, teacher)]
        kl = oel.reverse_kl(p, q, *heads, cfg.temperature)[0].clamp(min=0).tolist()
        return [(student.tokenizer.decode([i]), k) for i, k in zip(reply, kl, strict=True)]

    columns = [logged]
    for student in (teacher, after):
        asked = [student.encode(x) for x in logged]
        sampled = oel.sample(student.model, asked, max_new_tokens=cfg.reply_limit, **how)
        triples = zip(logged, asked, sampled, strict=True)
        columns.append([score(student, x, ids, y.ids) for x, ids, y in triples])
    return list(zip(*columns, strict=True))


def heat_map(run: Run, r: int) -> str:
    """Replies with each token in the colour of its KL, or why there are none."""
    if not 1 <= r <= finished_rounds(run):
        return "<p>There is no finished round to look into.</p>"
    try:
        found = scored(run, r)
    except Exception as error:  # noqa: BLE001 - half a folder, a missing package, full memory: the page stays
        return f"<p>The models could not be asked: {esc(type(error).__name__)}: {esc(error)}</p>"
    text = ""
    for prompt, *replies in found:
        text += f'{last_board(prompt)}<div class="two">'
        for when, reply in zip(("Before", "After"), replies, strict=True):
            spans = ""
            for token, k in reply:
                heat, word = sum(k >= start for start in HEAT), esc(token.replace("\n", "⏎\n"))
                spans += f'<span class="k{heat}" title="{k:.4f} nats, {esc(repr(token))}">{word}</span>'
            mean = sum(k for _, k in reply) / len(reply)
            text += f"<section><h3>{when}: {mean:.4f} nats a token</h3>"
            text += f'<pre class="reply">{spans}</pre></section>'
        text += "</div>"
    scale = "".join(f'<span class="k{i}">{start:g}</span>' for i, start in enumerate((0, *HEAT)))
    return f"""<p>Replies to logged prompts of round {r}, by the policy before and after its consolidation. A
token's colour is the exact reverse KL there, to the policy that entered the round and reads its first list of
lessons: how far the lessons would change what is written there. Pointing at a token tells the number.</p>
<p class="scale">nats, from {scale}</p>{text}"""


# --- the page ---------------------------------------------------------------------------------------------
STYLE = """
:root { color-scheme: light dark; --paper: #fdfcfa; --ink: #1d1c1a; --soft: #5f5b54; --rule: #ddd8ce; --box:
  #f4f1eb; --s0: #0068a5; --s1: #b04a00; --s2: #00765a; --s3: #97467a; --heat: 224 120 20; }
@media (prefers-color-scheme: dark) { :root { --paper: #161618; --ink: #e8e6e1; --soft: #a9a59c; --rule:
  #3a3a3f; --box: #202023; --s0: #62b5ea; --s1: #f0a050; --s2: #45c8a0; --s3: #e39ac6; --heat: 168 72 0; } }
* { box-sizing: border-box; } [hidden] { display: none !important; }
:focus-visible { outline: 2px solid var(--s0); }
body { margin: auto; max-width: 68rem; padding: 1.5rem 1rem 4rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, sans-serif; overflow-wrap: anywhere; } p { max-width: 44rem; }
a { color: var(--s0); } h1, h2, .lede { font-family: Charter, "Iowan Old Style", Palatino, Georgia, serif; }
.lede { font-size: 1.2rem; } h1 { font-size: 2rem; line-height: 1.15; margin: 0; }
h2 { font-size: 1.4rem; margin: 3rem 0 .75rem; } h3::first-letter { text-transform: uppercase; }
h3 { font-size: 1rem; margin: 1rem 0 .25rem; } h4 { font-weight: normal; margin: .6rem 0 .2rem; }
h4, .note, figcaption, .state, summary span, #controls, table { font-size: .875rem; }
nav a { margin-right: 1rem; } h4, .note, figcaption, .state, summary span, thead { color: var(--soft); }
.won { color: var(--s0); }
.two { display: grid; gap: 0 2rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); }
.two > * { min-width: 0; margin-bottom: 1.25rem; } figure { margin: 0 0 1rem; max-width: 32rem; }
figure > svg { display: block; width: 100%; }
text { font-size: 12px; fill: var(--soft); text-anchor: middle; } .end { text-anchor: end; }
.lost { color: var(--s1); }
ul { display: flex; flex-wrap: wrap; gap: 0 1rem; margin: .25rem 0; padding: 0; list-style: none; }
li svg { width: 1.5rem; } .s0 { color: var(--s0); } .s1 { color: var(--s1); } .s2 { color: var(--s2); }
.s3 { color: var(--s3); } .line, .bar { fill: none; stroke: currentColor; stroke-width: 1.5; }
.dot { fill: currentColor; } .grid { stroke: var(--rule); } .s1 .line { stroke-dasharray: 6 3; }
.s2 .line { stroke-dasharray: 2 3; } .s3 .line { stroke-dasharray: 9 3 2 3; }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
td { white-space: nowrap; } th { font-weight: 500; }
th, td { padding: .35rem .75rem .35rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid
  var(--rule); } details { border-bottom: 1px solid var(--rule); padding: .5rem 0; }
summary { cursor: pointer; padding: .2rem; } summary span { margin-left: .75rem; }
ol { padding-left: 1.5rem; margin: 0 0 1rem; } tbody th { min-width: 3rem; }
pre { margin: 0; padding: .6rem .75rem; overflow-x: auto; background: var(--box); border-radius: 4px; font:
  .8rem/1.4 ui-monospace, Menlo, Consolas, monospace; overflow-wrap: normal; }
.reply { white-space: pre-wrap; overflow-wrap: anywhere; background: none; box-shadow: inset 3px 0
  var(--rule); }
#controls { display: flex; flex-wrap: wrap; gap: .5rem 1rem; align-items: center; margin: 1rem 0; }
button, select { font: inherit; color: inherit; background: var(--paper); border: 1px solid var(--soft);
  border-radius: 4px; padding: .35rem .7rem; margin: .15rem .3rem .15rem 0; }
[aria-pressed=true] { background: var(--ink); color: var(--paper); } .scale span { padding: .15rem .5rem; }
.k1 { background: rgb(var(--heat) / .2); } .k2 { background: rgb(var(--heat) / .34); }
.k3 { background: rgb(var(--heat) / .5); } .k4 { background: rgb(var(--heat) / .66); }
.k5 { background: rgb(var(--heat) / .82); } .k6 { background: rgb(var(--heat)); }
@media print { #controls, nav { display: none; } pre, tr, figure { break-inside: avoid; } * {
  print-color-adjust: exact; } }
"""
SCRIPT = """
const controls = document.getElementById("controls");
const [before, after] = controls?.querySelectorAll("select") ?? [];
let keep = "all";
function show() {
  let n = 0;
  for (const board of document.querySelectorAll(".board")) {
    const won = {};
    for (const part of board.querySelectorAll("[data-round]")) {
      part.hidden = ![before.value, after.value].includes(part.dataset.round);
      won[part.dataset.round] ??= part.dataset.won == "True";
    }
    const was = won[before.value], is = won[after.value];
    board.hidden = !{all: true, "newly won": is && !was, "newly lost": was && !is, won: is, lost: !is}[keep];
    n += !board.hidden;
  }
  for (const b of controls.querySelectorAll("button")) b.setAttribute("aria-pressed", b.dataset.keep == keep);
  controls.querySelector("output").textContent = n + (n == 1 ? " board" : " boards");
}
if (controls) {
  controls.addEventListener("change", show);
  controls.addEventListener("click", event => { keep = event.target.dataset.keep ?? keep; show(); });
  controls.hidden = false;
  show();
}
"""


def page(run: Run, pairs: int, heat: str) -> str:
    """The whole page. Only this style and this script may act in it: a policy names them by their hashes."""
    cfg, now = run.config, time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    style, script = (base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in (STYLE, SCRIPT))
    policy = f"default-src 'none'; style-src 'sha256-{style}'; script-src 'sha256-{script}'; base-uri 'none'"
    name = esc(Path(cfg["model"]).name)
    game = f"from {esc(Path(cfg['logs']).name)}" if cfg.get("logs") else esc(cfg["env"])
    settings = table(["setting", "value"], [[esc(key), esc(cfg[key])] for key in cfg], "Settings")
    sections = {
        "Results": results(run),
        "Loss and time": losses(run) + timing(run),
        "Lessons": lessons(run),
        "Boards, before and after": boards(run, pairs),
        "Where the lessons matter": heat,
        "Settings": f"<details><summary>What the run was started with</summary>{settings}</details>",
    }
    if cfg.get("logs"):  # nothing was played
        del sections["Results"], sections["Boards, before and after"]
    links = "".join(f'<a href="#part{i}">{title}</a>' for i, title in enumerate(sections))
    parts = [f'<section id="part{i}"><h2>{t}</h2>{s}</section>' for i, (t, s) in enumerate(sections.items())]
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name} learns {game}, seed {cfg["seed"]}</title>
<style>{STYLE}</style></head><body><header><h1>{name} learns {game}</h1>
<p class="state">Online experiential learning, seed {cfg["seed"]}. {state(run).capitalize()}. As of {now}.</p>
<p class="lede">{reading(run)}</p><nav aria-label="Sections">{links}</nav></header>
<main>{"".join(parts)}</main>
<script>{SCRIPT}</script></body></html>
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run, finished or not")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to write the page [RUN/report.html]")
    parser.add_argument("--pairs", type=int, default=40, metavar="N", help="boards to show side by side [40]")
    parser.add_argument("--round", type=int, metavar="R", help="round of the heat map [the last one]")
    parser.add_argument("--no-heat-map", action="store_true", help="load no models")
    args = parser.parse_args()
    out = args.out or args.run / "report.html"
    part = Path(f"{out}.part")
    try:
        run = read_run(args.run)
        r = finished_rounds(run) if args.round is None else args.round
        heat = "<p>Left out: --no-heat-map.</p>" if args.no_heat_map else heat_map(run, r)
        part.write_bytes(page(run, max(args.pairs, 0), heat).encode())
        part.replace(out)
    except (Problem, OSError) as error:
        if part.is_file():
            part.unlink()
        print(f"report.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
