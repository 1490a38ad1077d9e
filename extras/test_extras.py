"""Tests of what is around the method: many processes, adapters, the memory forecast, tables and pages of runs."""

import csv
import dataclasses
import importlib
import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

EXTRAS = Path(__file__).resolve().parent
sys.path[:0] = [str(EXTRAS), str(EXTRAS.parent)]
import oel
import prompts
from extras.testing import arguments, files_in, load, logs, python, relative, rows_of, save_policy, small

pytest_plugins = ["extras.testing"]


@pytest.fixture
def tool(monkeypatch, capsys):
    """Call the main of a module of extras/ with arguments; returns its exit code, stdout and stderr."""

    def call(name: str, *args) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, args)])
        try:
            code = importlib.import_module(name).main() or 0
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def own_logs(folder, lessons, tmp_path):
    """The folder of a finished run on --logs, in which a reply is hostile and no outcome is known."""
    played = [{**trajectory, "outcome": None} for trajectory in logs(2)]
    played[0]["turns"][0]["response"] = f"√\t\n{HOSTILE}\x9b2J\r"
    oel.write_jsonl(tmp_path / "logs.jsonl", played)
    oel.run(small(model=folder, logs=tmp_path / "logs.jsonl", experience=lessons, out=tmp_path / "own"))
    return tmp_path / "own"


# --- many processes -----------------------------------------------------------------------------------------
def torchrun(*args):
    """Run a program in two processes."""
    return python("-m", "torch.distributed.run", "--nproc-per-node", 2, *args)


def test_two_dashes_keep_logs_from_torchrun(tmp_path):
    """Catches: an option of ours that torchrun takes for one of its own (it has several that begin with --log)."""
    done = torchrun("--", EXTRAS.parent / "oel.py", "--logs", tmp_path / "none.jsonl")
    assert done.returncode and "oel.py: error: --logs" in done.stderr and "ambiguous" not in done.stderr


def test_two_processes_learn_what_one_learns(folder, lessons, tmp_path):
    """Catches: other noise, a share counted twice or not at all, a mean of the processes' means, two writers of one
    folder, a bad resume."""
    cfg = small(model=folder, batch_episodes=3, eval_games=4, experience=lessons, rounds=2, micro_tokens=400)
    one, two = (dataclasses.replace(cfg, out=str(tmp_path / name)) for name in ("one", "two"))
    oel.run(one)
    for rounds in (1, 2):
        done = torchrun("--", EXTRAS.parent / "oel.py", *arguments(dataclasses.replace(two, rounds=rounds)))
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.count("forgetting") == 4 - rounds, "one process prints"
        assert done.stderr.count("step 1/2:   0%") == 1, "and shows its progress"
    files, others = files_in(one.out), files_in(two.out)
    assert files.keys() == others.keys()
    for name in ("round1/logs.jsonl", "round1/in_context.jsonl"):
        assert files[name].read_bytes() == others[name].read_bytes()
    for a, b in zip(rows_of(files["steps.jsonl"]), rows_of(others["steps.jsonl"]), strict=True):
        assert (a["tokens"], a["replies"]) == (b["tokens"], b["replies"])
        near = 1e-5 if a["round"] == a["step"] == 1 else 1e-3  # later replies are those of other weights
        assert a["loss"] == pytest.approx(b["loss"], rel=near)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=near)
    first, second = (load(f"{c.out}/round1/model").master for c in (one, two))
    assert all(relative(a, b) < 1e-2 for a, b in zip(first, second, strict=True))


SHARED = """
import sys, torch, torch.distributed as dist
sys.path.insert(0, sys.argv[1])
import oel
from extras.testing import LESSONS, consolidated, small
dist.init_process_group("gloo")
policy = oel.load_policy(sys.argv[2], torch.device("cpu"))
whole = sum(p.numel() for p in policy.model.parameters())
assert sum(m.numel() for m in policy.master) == (0 if oel.RANK else whole), "process 0 alone has the masters"
for i, p in enumerate(policy.model.parameters()):  # a gradient from one process only, as where no batch was left
    p.grad = torch.full_like(p, i) if oel.RANK else None
policy.add_grads_to_master()
grads = [m.grad for m in policy.master]
assert all(g is None if oel.RANK else bool((g == i).all()) for i, g in enumerate(grads)), grads
for master in policy.master:
    master.fill_(7)
policy.copy_master()
assert all(bool((p == 7).all()) for p in policy.model.parameters()), "all have the new weights"
calls = []
oel.atomic(oel.Path(sys.argv[3]), lambda part: (calls.append(part), part.write_text("x")))
assert oel.Path(sys.argv[3]).read_text() == "x" and len(calls) == 1 - oel.RANK, "one writes, and all find it"
assert oel.gather(oel.RANK) == [0, 1]
for offload in (False, True):  # stopped after the first step, and continued by processes that know only the state
    found = []
    for name, stop in (("whole", 0), ("cut", 1), ("cut", 0)):
        policy = oel.load_policy(sys.argv[2], torch.device("cpu"), offload=offload)
        try:
            consolidated(policy, small(steps=2), state=oel.Path(f"{sys.argv[3]}-{name}-{offload}.pt"), stop_at=stop)
        except KeyboardInterrupt:
            continue
        found.append([p.detach().clone() for p in policy.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found))
"""


def test_process_0_has_the_masters_and_writes(folder, tmp_path):
    """Catches: a copy of the masters in every process, a gradient or new weights that stay in one, two writers."""
    (tmp_path / "shared.py").write_text(SHARED)
    done = torchrun(tmp_path / "shared.py", EXTRAS.parent, folder, tmp_path / "record")
    assert done.returncode == 0, done.stderr[:4000]


@pytest.mark.parametrize("cuda, backend", [(False, "cpu:gloo"), (True, "cpu:gloo,cuda:nccl")])
def test_processes_talk_by_gloo_and_on_gpus_by_nccl_too(monkeypatch, cuda, backend):
    """Catches: torch's default, which for a wheel with CUDA is NCCL alone, even where there is no GPU."""
    asked = []
    monkeypatch.setattr(oel, "WORLD", 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(
        oel.dist, "init_process_group", lambda name, timeout: sys.exit(asked.append((name, timeout.days)))
    )
    with pytest.raises(SystemExit):
        oel.main([])
    assert asked == [(backend, 1)]


def test_a_process_takes_the_gpu_of_its_number(monkeypatch):
    """Catches: all processes of a machine on one GPU."""
    monkeypatch.setattr(oel, "WORLD", 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    assert {str(oel.find_device(name)) for name in ("", "cuda", "cuda:0")} == {"cuda:1"}
    assert str(oel.find_device("cpu")) == "cpu"
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(oel.UsageError, match="--device cuda:2 is not available"):
        oel.find_device()


# --- memory.py ----------------------------------------------------------------------------------------------
def test_what_does_not_fit_is_said_before_anything_is_loaded(folder, monkeypatch):
    """Catches: settings that are reported to fit and do not, or a forecast that leaves out the optimizer."""
    import memory

    cfg = small(model=folder, micro_tokens=1_000_000, device="cpu")
    n = sum(p.numel() for p in load(folder).master)

    def weights(offload, half):
        return memory.parts(dataclasses.replace(cfg, offload=offload), half)["weights and optimizer"]

    assert weights(False, False) == 20 * n and weights(False, True) == 22 * n
    assert weights(True, False) == 12 * n and weights(True, True) == 6 * n
    assert "too much" not in memory.forecast(dataclasses.replace(cfg, micro_tokens=1000))
    monkeypatch.setattr(os, "sysconf", lambda name: 2**14)  # 256 MiB
    assert "too much: --offload --micro-tokens 2048 needs 0." in memory.forecast(cfg)
    monkeypatch.setattr(os, "sysconf", lambda name: 2)
    assert "take a smaller model" in memory.forecast(cfg)


def test_a_decode_step_is_counted_for_the_whole_depth(folder, tmp_path):
    """Catches: a count of one layer, of views, or of the narrow model's weights and cache instead of the real ones."""
    import memory

    found = {}
    for layers in (2, 3):
        model = save_policy(tmp_path / str(layers), num_hidden_layers=layers)
        found[layers] = memory.decode_step(small(model=model, dtype="float32"))
    policy = load(model)
    (few, _, _), (kernels, weights, token) = found.values()
    assert 30 < kernels - few < 80 and few > 2 * 30
    assert weights == 2 * sum(p.numel() for p in policy.master)
    assert token == 2 * oel.KVCache(policy.model, 1, 1).kv.nbytes // 4, "bf16 where this model has float32"


# --- glance.py, curves.py and claims.py ----------------------------------------------------------------------
def test_runs_on_logs_and_of_adapters_are_read_or_refused_in_a_line(whole, own_logs, tmp_path, tool):
    """Catches: a traceback about an outcome that no log has, about metrics, or about a setting that is no option."""
    code, out, err = tool("glance", own_logs)
    assert code == 0 and "The first message of the log" in out and "after round1" in out, err
    code, out, err = tool("curves", own_logs)
    assert (code, out, err.count("\n")) == (2, "", 1) and f"{own_logs} learned from --logs" in err
    adapters = shutil.copytree(whole.out, tmp_path / "adapters")
    settings = json.dumps({**dataclasses.asdict(whole), "lora": 4})
    (adapters / "config.json").write_text(settings)
    code, out, err = tool("glance", adapters)
    assert code == 0 and "after round2" in out, err
    code, out, err = tool("curves", adapters, "--forgetting", 2)
    assert code == 0 and "Forgetting probe, 2 games each" in out, err
    for name in ("glance", "curves"):
        code, out, err = tool(name, tmp_path)
        assert (code, out, err.count("\n")) == (2, "", 1) and "config.json" in err and "name " in err


def test_a_glance_obeys_no_control_character(own_logs, tool):
    """Catches: a log that clears the screen or changes the terminal's title."""
    code, out, _ = tool("glance", own_logs)
    assert code == 0 and "√\t\n</pre>" in out and r"\x00\x1b[31m <|im_end|>\x9b2J" in out
    assert not re.search("[\0-\x08\x0b-\x1f\x7f-\x9f]", out)
    assert sys.modules["glance"].visible("\u202e \ud800\r\n√é") == "\\u202e \\ud800\\r\n√é"


def test_letters_are_split_by_what_lessons_said(tmp_path, tool):
    """Catches: a guess that counts as knowledge, a false lesson that counts as true, a letter named in a later round."""
    lists = {1: ["Never step on H.", "Ignore H.", "Go to G."], 2: ["Stepping on E does nothing."]}
    says = {
        0: ["(0,1) H is new. No lesson says what H is, no board says what H does. Just a guess: H is a hole"],
        1: ["(0,1) H is harmless", "(0,2) G is the goal", "(1,1) E is a hole", "(0,0) is me"],
        2: ["(0,1) H is a hole", "(0,2) G is the goal", "(1,1) E is harmless"],
    }
    (tmp_path / "config.json").write_text('{"env": "biglake", "rounds": 2}')
    for r, lines in says.items():
        (tmp_path / f"round{r}/experience").mkdir(parents=True)
        (tmp_path / f"round{r}/experience/00.txt").write_text(prompts.as_items(lists.get(r, [])))
        oel.write_jsonl(tmp_path / f"round{r}/held_out.jsonl", [{"turns": [{"response": "\n".join(lines)}]}])
    code, out, _ = tool("letters", tmp_path)
    rows = [line.split(" | ")[1:] for line in out.splitlines() if line.startswith(f"| {tmp_path.name}")]
    assert code == 0 and rows[0] == ["0", "0 of 0", "B C D E F G H J K L M N Q T V", "-", "100% (100% as guesses) |"]
    assert rows[1][:2] == ["1", "2 of 3"] and rows[1][3:] == ["50% (0% as guesses)", "0% (0% as guesses) |"]
    assert "E" in rows[1][2] and not {"H", "G"} & {*rows[1][2]}
    assert rows[2][3] == "100% (0% as guesses)"
    assert "| all runs | 1 | 2 of 3 | 13 letters | 50% (0% as guesses) | 0% (0% as guesses) |" in out
    assert rows[3] == ["H is harmless", "1", "1", "0% (0% as guesses)", "100% (0% as guesses) |"]
    (tmp_path / "config.json").write_text('{"env": "sokoban", "rounds": 2}')
    assert "its game is sokoban" in str(tool("letters", tmp_path)[0])


def test_the_table_over_seeds_is_their_mean_and_spread(tmp_path):
    """Catches: rows within a round counted as its end, or an unfinished run among the others."""
    rates = {"a": (0.0, 0.5), "b": (0.2, 1.0), "c": (0.4,)}
    none = dict.fromkeys(("in_context_pass_rate", "unseen_pass_rate", "forgetting_pass_rate"))
    for name, values in rates.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text('{"steps": 4, "rounds": 1}')
        rows = [{"round": r, "step": 4 * r, "pass_rate": value} for r, value in enumerate(values)]
        rows.insert(1, {"round": 1, "step": 2, "pass_rate": 0.9})
        rows = [{**none, **row, "reply_tokens": 9.0} for row in rows]
        oel.write_jsonl(tmp_path / name / "metrics.jsonl", rows)
    done = python(EXTRAS / "curves.py", tmp_path / "a", tmp_path / "b")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "| 0 | 10.0% (14.1%) | 9.0 (0.0) | 0.0%, 20.0% |" in done.stdout
    assert "| 1 | 75.0% (35.4%) | 9.0 (0.0) | 50.0%, 100.0% |" in done.stdout
    failed = python(EXTRAS / "curves.py", *(tmp_path / name for name in rates))
    assert failed.returncode == 2 and "has 0 of 1 rounds" in failed.stderr


def test_runs_of_other_settings_are_not_averaged(whole, tmp_path, tool):
    """Catches: one mean over runs that learned differently, without a word."""
    runs = [tmp_path / name for name in ("a", "b")]
    for seed, run in enumerate(runs):
        run.mkdir()
        shutil.copy(Path(whole.out, "metrics.jsonl"), run)
        settings = {**dataclasses.asdict(whole), "seed": seed, "out": str(run), "device": str(seed)}
        (run / "config.json").write_text(json.dumps(settings))
    assert tool("curves", *runs)[0] == 0, "seed, folder and device may differ"
    (runs[1] / "config.json").write_text(json.dumps({**settings, "lr": 0.02, "lora": 4}))
    code, out, err = tool("curves", *runs)
    assert (code, out) == (2, "") and "differ in lora None and 4, lr 0.01 and 0.02: name" in err


def test_forgetting_is_compared_where_both_pass_equally_often():
    """Catches: off-policy, which learns faster, compared at its end with on-policy half-way."""
    import claims

    def rows(setting, curve):
        kinds = ("pass_rate", "forgetting_pass_rate")
        return [
            {"setting": setting, "seed": 1, "round": int(step > 0), "step": step, "metric": kind, "value": x}
            for step, point in curve.items()
            for kind, x in zip(kinds, point, strict=True)
        ]

    on = rows("on-policy", {0: (0.1, 1.0), 3: (0.5, 0.98), 6: (0.8, 0.96)})
    off = rows("off-policy", {0: (0.1, 1.0), 3: (0.6, 0.8), 6: (1.0, 0.6)})
    close = rows("off-policy", {0: (0.1, 1.0), 3: (0.8, 0.955)})
    here, held = claims.forgetting(claims.Numbers(on + off))
    assert here.startswith("where both pass 80.0%: on-policy 96.0%, at the end 96.0% passing 80.0%, off")
    assert here.endswith("off-policy 70.0%, at the end 60.0% passing 100.0%")
    assert held == "yes" and claims.forgetting(claims.Numbers(on + close))[1] == "equal"
    assert (claims.more(0.5, 0.6), claims.more(None, 1)) == ("no", "not measured")


def test_a_comparison_of_equal_values_says_nothing():
    """Catches: "equal" where nothing else could be seen, or "yes" from a mean that is within its spread."""
    import claims

    assert claims.compared([1.0, 0.99, 1.0], [1.0] * 3) == "says nothing: 6 of 6 values at the ceiling"
    assert claims.compared([0.5, 0.8], [0.5, 0.8]) == "says nothing: 2 of 2 seeds equal"
    assert (claims.compared([0.5, 0.8], [0.8, 0.5]), claims.compared([0.9], [])) == ("equal", "not measured")
    assert claims.compared([1.0, 1.0], [0.5, 1.0]) == "yes", "only one side is at the ceiling"


def test_the_table_of_the_claims_is_made_from_their_numbers():
    """Catches: a table in assets/ or in the README that was edited, or judged by another rule than claims.py's."""
    import claims

    kinds = {"seed": int, "round": int, "step": int, "value": float}
    with (EXTRAS.parent / "assets/claims.csv").open() as file:
        rows = [{k: kinds.get(k, str)(v) for k, v in row.items()} for row in csv.DictReader(file)]
    table = claims.table(claims.Numbers(rows))
    for file in ("assets/claims.md", "extras/README.md"):
        assert table in (EXTRAS.parent / file).read_text(encoding="utf-8"), file


# --- report.py ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "won, n, low, high",
    [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0), (64, 128, 0.4146, 0.5854)],
)
def test_wilson_intervals(won, n, low, high):
    import report

    assert report.wilson(won / n, n) == pytest.approx((low, high), abs=1e-4)


def test_every_interval_is_of_the_games_that_were_played():
    """Catches: the interval of the in-context rate taken over the number of held-out games."""
    import report

    keys = ("pass_rate", "in_context_pass_rate", "unseen_pass_rate", "forgetting_pass_rate")
    row = {"round": 1, "step": 4, "reply_tokens": 9.0, **dict.fromkeys(keys, 0.5)}
    games = {"env": "sokoban", "eval_games": 100, "probe_games": 10}
    run = report.Run(Path("run"), {"steps": 4, "rounds": 1, **games}, [row], [], {}, {})
    page = report.results(run)
    wide, narrow = (" to ".join(map(report.percent, report.wilson(0.5, n))) for n in (10, 100))
    assert page.count(f"50% ({wide})") == 3 * page.count(f"50% ({narrow})") > 0, "three rates are of the probes"


def test_the_page_says_that_a_lake_has_few_boards():
    """Catches: intervals of 128 games that read as if each game had another board."""
    import report

    row = {"round": 0, "step": 0, "reply_tokens": 9.0, "pass_rate": 0.5}
    for env, games, said in (("frozenlake", 128, True), ("frozenlake", 4, False), ("sokoban", 128, False)):
        config = {"steps": 4, "rounds": 1, "env": env, "eval_games": games, "probe_games": 64}
        page = report.results(report.Run(Path("run"), config, [row], [], {}, {}))
        assert (f"only 19 boards, so {games} games are repetitions" in page) == said


HOSTILE = "</pre><script>alert(1)</script><img src=x onerror=alert(2)>\x00\x1b[31m <|im_end|>"


def test_the_page_of_a_run_shows_hostile_text_and_runs_none_of_it(whole, tmp_path):
    """Catches: markup or a control character of a reply or a lesson that becomes part of the page."""
    run = tmp_path / "run"
    shutil.copytree(whole.out, run, ignore=shutil.ignore_patterns("model"))
    for file in run.glob("round*/held_out.jsonl"):
        played = rows_of(file)
        for turn in played[0]["turns"]:
            turn["response"] = turn["feedback"] = HOSTILE
        oel.write_jsonl(file, played)
    (run / "round1/experience/00.txt").write_text(f"- EXPERIENCE ITEM: {HOSTILE}\n")
    done = python(EXTRAS / "report.py", run, "--no-heat-map")
    assert done.returncode == 0, done.stderr[-2000:]
    page = (run / "report.html").read_text()
    assert "&lt;script&gt;alert(1)" in page and "<script>alert" not in page and "<img" not in page
    assert "\x00" not in page and "\x1b" not in page and not re.search(r"(src|href)=.?(https?:|//)", page)
    assert "Finished, 2 of 2 rounds" in page
    (run / "metrics.jsonl").write_text('{"round": 0}\nnonsense\n')
    failed = python(EXTRAS / "report.py", run, "--no-heat-map")
    assert failed.returncode == 2 and "metrics.jsonl, line" in failed.stderr


def test_the_page_shows_where_the_lessons_matter(whole, tmp_path):
    """Catches: a heat map that is a sentence about an exception, because oel.py has changed."""
    run = shutil.copytree(whole.out, tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "lora": 4}))  # no option
    done = python(EXTRAS / "report.py", run)
    assert done.returncode == 0, done.stderr[-2000:]
    page = (run / "report.html").read_text()
    assert "could not be asked" not in page
    colours = [float(nats) for nats in re.findall(r'title="([0-9.]+) nats', page)]
    assert len(colours) > 8 and max(colours) > 0


def test_the_page_of_a_run_on_logs_is_finished_and_has_no_pass_rate(own_logs, tool):
    """Catches: a finished run that is said to evaluate still, or sections about games that nobody played."""
    assert tool("report", own_logs)[0] == 0
    page = (own_logs / "report.html").read_text()
    assert "Finished, 1 of 1 rounds" in page and "learns from logs.jsonl" in page
    assert "Nothing was played, so there is no pass rate" in page
    assert "round 1, step 2: " in page and "H loses." in page, "the losses and the lessons are there"
    assert "No evaluation" not in page and "held-out" not in page and "could not be asked" not in page
    assert re.search(r'title="[0-9.]+ nats', page), "the models are there, so the heat map is"
