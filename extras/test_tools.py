"""Tests of what connects to other tools: adapters for their games, trackers, model cards, the walkthrough."""

import itertools
import json
import os
import random
import shutil
import sqlite3
import sys
from pathlib import Path

import pytest
import torch

EXTRAS = Path(__file__).resolve().parent
sys.path[:0] = [str(EXTRAS), str(EXTRAS.parent)]
import card
import track
from transformers import AutoConfig, AutoTokenizer

import oel
from envs import SPLITS, level_seeds
from extras.adapters import Gymnasium, PaperFrozenLake, PaperSokoban, ReasoningGym, TextArena, Verifiers
from extras.testing import build, files_in, load, make_tokenizer, plain_greedy, play, python, rows_of, small

pytest_plugins = ["extras.testing"]


# --- adapters.py --------------------------------------------------------------------------------------------
class Mastermind(TextArena):
    name = "Mastermind-v0-raw"


class Game2048(TextArena):
    name, max_turns = "2048-v0-raw", 8  # each turn draws a new tile


class Blackjack(Gymnasium):
    name, task, actions = "Blackjack-v1", "You play Blackjack.", ("stick", "hit")

    def text(self, observation) -> str:
        return f"You have {observation[0]}, the dealer shows {observation[1]}."


class Legs(ReasoningGym):
    name = "leg_counting"


def player(*replies):
    """A player that gives these replies in turn, again and again."""
    return lambda turn: replies[turn % len(replies)]


MOVES = player("[down]", "[right]", "[down]", "[left]", "[up]")
GAMES = [
    (PaperFrozenLake, "textarena", player("[right]", "[down]", "[left]", "[down]")),
    (PaperSokoban, "textarena", MOVES),
    (Mastermind, "textarena", player("[1 2 3 4]", "[5 6 1 2]")),
    (Game2048, "textarena", MOVES),
    (Blackjack, "gymnasium", player("[hit]", "[stick]")),
    (Legs, "reasoning_gym", player("<answer>7</answer>")),
]


@pytest.mark.parametrize(("game", "package", "replies"), GAMES, ids=lambda x: getattr(x, "__name__", None))
def test_a_level_is_the_same_whatever_is_played_at_the_same_time(game, package, replies):
    """Catches: levels drawn from a global generator, which other games, or a seed from elsewhere, would change."""
    pytest.importorskip(package)
    random.seed(0)
    alone = [play(game(), level, replies) for level in range(6)]
    assert alone == [play(game(), level, replies) for level in range(6)]
    assert len({str(trajectory["turns"]) for trajectory in alone}) > 2, "levels differ"
    random.seed(1)
    state, disturber = random.getstate(), game()

    def disturbed(turn):
        if turn % 2 == 0:
            disturber.reset(100 + turn)
        return replies(turn)

    assert alone == [play(game(), level, disturbed) for level in range(6)]
    assert random.getstate() == state, "nor do these games change what others draw"


@pytest.mark.parametrize(("game", "package", "replies"), GAMES, ids=lambda x: getattr(x, "__name__", None))
def test_a_round_of_an_adapter(game, package, replies, folder, lessons, tmp_path):
    """Catches: a protocol that oel.py does not follow, a name that a shell cannot say, numbers in what is learned."""
    pytest.importorskip(package)
    named = {"TextArena": "textarena", "Gymnasium": "gymnasium", "ReasoningGym": "reasoning_gym"}
    name = (
        game.__name__ if game in (PaperFrozenLake, PaperSokoban) else f"{named[game.__mro__[1].__name__]}/{game.name}"
    )
    out = tmp_path / "run"
    oel.run(small(model=folder, env=f"{EXTRAS}/adapters.py:{name}", experience=lessons, out=out))
    assert [row["round"] for row in rows_of(out / "metrics.jsonl")] == [0, 1]
    for trajectory in rows_of(out / "round1/held_out.jsonl"):
        assert trajectory["turns"][-1]["feedback"] and "reward" not in str(trajectory["turns"]).lower()
        assert trajectory["outcome"]["won"] in (True, False)


def test_the_paper_s_games_hide_their_rules_and_can_be_won():
    """Catches: rules in the prompt, the first action instead of the last, a win or a reason that gets lost."""
    pytest.importorskip("textarena")
    game = PaperFrozenLake()
    for level, path in itertools.product(range(3), itertools.permutations("ddrr")):
        replies = [f"[up] or rather [{'down' if step == 'd' else 'right'}]" for step in path]
        trajectory = play(game, level, player(*replies))
        if trajectory["outcome"] == "won":
            break
        assert trajectory["turns"][-1]["feedback"].endswith("The episode failed.")
    assert game.won and game.invalid_moves == 0 and trajectory["turns"][-1]["feedback"].endswith("succeeded.")
    assert not any(word in str(trajectory["turns"][0]) for word in ("hole", "Hole", "safe"))
    lost = play(game, 0, player("[up]", "no idea"))
    assert len(lost["turns"]) == 2 and game.invalid_moves == 2, "the second invalid move in a row ends it"
    assert len(play(game, 0, player("[right]", "[left]"))["turns"]) == 5, "five turns at most"
    game.strict = True
    game.reset(0)
    assert "invalid" in game.step("<think> [down]")[0], "a thought that is cut off makes no move"


def test_an_adapter_answers_bad_input_in_one_line(capsys):
    """Catches: a traceback for a game of two players, or for actions that no word can say."""
    pytest.importorskip("textarena")
    pytest.importorskip("gymnasium")
    two = type("Two", (TextArena,), {"name": "TicTacToe-v0-raw"})()
    for attempt in (lambda: two.reset(0), type("Pole", (Gymnasium,), {"name": "Pendulum-v1"})):
        with pytest.raises(SystemExit) as stop:
            attempt()
        err = capsys.readouterr().err
        assert stop.value.code == 2 and err.startswith("adapters.py: error: ") and err.count("\n") == 1


def test_gymnasium_counts_replies_without_an_action():
    """Catches: a player that says nothing and plays on, an action that is not the one that was named."""
    pytest.importorskip("gymnasium")
    game = Blackjack()
    silent = play(game, 0, player("I wait"))
    assert len(silent["turns"]) == game.invalid_moves == 2
    assert play(game, 0, player("[hit] no, [stick]"))["turns"][0]["feedback"].startswith("You have")
    wins = sum(play(game, level, player("[stick]"))["outcome"] == "won" for level in range(60))
    assert 10 < wins < 40, "about 4 of 10 are won by standing"


def test_reasoning_gym_scores_the_answer():
    """Catches: an answer that is not found, or is found in the reasoning."""
    pytest.importorskip("reasoning_gym")
    game = Legs()
    game.reset(5)
    right = game.entry["answer"]
    for reply, won in (
        (f"<think>3</think><answer>{right}</answer>", True),
        (f"<answer>{right}</answer></think>", False),
    ):
        text, over = game.step(reply)
        assert over and game.won == won and text.endswith("correct.") and game.invalid_moves == (not won)


def test_a_taskset_of_verifiers_is_played_with_its_tools():
    """Catches: tools that are not called or fail loudly, a lost score, tasks that two splits share."""
    vf = pytest.importorskip("verifiers.v1")

    class Data(vf.TaskData):
        answer: int

    class Calculator(vf.Toolset[vf.ToolsetConfig]):
        @vf.tool
        async def multiply(self, a: int, b: int) -> str:
            """Multiply two integers."""
            return str(a * b)

    class Product(vf.Task[Data]):
        @classmethod
        def toolsets(cls, config):
            return [Calculator(vf.ToolsetConfig())]

        @vf.reward
        async def correct(self, trace):
            return float(trace.last_reply.endswith(str(self.data.answer)))

    class Products(vf.Taskset[Product]):
        def load(self):
            return [Product(Data(prompt=f"What is {i} times 7?", answer=7 * i)) for i in range(8)]

    game = type("Game", (Verifiers,), {"taskset": staticmethod(lambda: Products(vf.TasksetConfig()))})()
    call = '<tool_call>{"name": "multiply", "arguments": {"a": 4, "b": 7}}</tool_call>'
    won = play(game, 4, player(call, "It is 28"))
    assert won["outcome"] == "won" and "\n28" in won["turns"][0]["feedback"] and "Multiply two" in game.task
    assert play(game, 5, player(call, "It is 28"))["outcome"] == "lost"
    assert play(game, 5, player('<tool_call>{"name": "ask"}</tool_call>'))["turns"][0]["feedback"].endswith("'ask'")
    assert game.invalid_moves == game.max_turns - 1
    tasks = [{game.reset(level) for level in level_seeds(split, 9)} for split in SPLITS]
    assert not any(a & b for a, b in itertools.combinations(tasks, 2))


# --- track.py -----------------------------------------------------------------------------------------------
@pytest.fixture
def sent(monkeypatch):
    """What a stand-in for a tracker is sent, as (values, step)."""
    rows = []
    monkeypatch.setitem(track.TRACKERS, "tensorboard", lambda *_: (lambda *row: rows.append(row), lambda: None))
    return rows


def grow(run: Path, whole: Path, metrics: int, steps: int) -> None:
    """Let a run have so many rows of another."""
    run.mkdir(exist_ok=True)
    (run / "config.json").write_bytes((whole / "config.json").read_bytes())
    for name, n in (("metrics.jsonl", metrics), ("steps.jsonl", steps)):
        oel.write_jsonl(run / name, rows_of(whole / name)[:n])


def test_no_row_is_sent_twice(whole, sent, tmp_path):
    """Catches: rows sent anew after a restart, or after a resumed run dropped them and wrote them again."""
    run, every = tmp_path / "run", Path(whole.out)
    counts = []
    for metrics, steps in ((1, 1), (2, 3), (1, 1), (2, 2), (3, 4)):  # the third is what a killed run goes back to
        grow(run, every, metrics, steps)
        counts.append(track.track(run, "tensorboard", once=True))
    assert counts == [2, 3, 0, 0, 2] and [step for _, step in sent] == [0, 1, 2, 2, 3, 4, 4]
    assert track.track(run, "tensorboard", pause=1e9) == 0, "it does not wait for a finished run"
    assert sent[-1][0]["evaluation/pass_rate"] == rows_of(every / "metrics.jsonl")[-1]["pass_rate"]
    assert all(value is not None for values, _ in sent for value in values.values())


def test_a_row_is_listed_before_it_is_sent(whole, monkeypatch, tmp_path):
    """Catches: a row that a kill while it is being sent makes appear twice."""

    def stopped(values, step):
        raise KeyboardInterrupt

    grow(tmp_path / "run", Path(whole.out), 1, 0)
    monkeypatch.setitem(track.TRACKERS, "tensorboard", lambda *_: (stopped, lambda: None))
    with pytest.raises(KeyboardInterrupt):
        track.track(tmp_path / "run", "tensorboard")
    assert (
        track.new_rows(
            tmp_path / "run", json.loads((tmp_path / "run/tracked-tensorboard.json").read_text())["sent"], 2
        )
        == []
    )


@pytest.mark.parametrize("name", ["tensorboard", "trackio", "wandb"])
def test_trackers_get_all_rows(whole, monkeypatch, tmp_path, name):
    """Catches: a tracker that refuses the rows, or loses those that are sent after a restart."""
    pytest.importorskip(name)
    run = tmp_path / "run"
    how = {
        "TRACKIO_DIR": str(tmp_path / "trackio"),
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "HF_HUB_OFFLINE": "1",
    }
    for metrics, steps in ((2, 2), (3, 4)):
        grow(run, Path(whole.out), metrics, steps)
        done = python(EXTRAS / "track.py", run, "--to", name, "--once", env={**os.environ, **how})
        assert done.returncode == 0, done.stderr
    assert f"3 rows sent to {name}\n" in done.stdout
    if name == "tensorboard":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(run / "tensorboard")).Reload()
        assert [x.step for x in events.Scalars("evaluation/pass_rate")] == [0, 2, 4]
        assert [x.step for x in events.Scalars("training/loss")] == [1, 2, 3, 4]
    elif name == "trackio":
        (base,) = (tmp_path / "trackio").glob("*.db")
        steps = sqlite3.connect(base).execute("select step from metrics order by step").fetchall()
        assert [step for (step,) in steps] == [0, 1, 2, 2, 3, 4, 4]
    else:
        assert len(list(run.glob("wandb/offline-run-*/*.wandb"))) == 2


# --- card.py ------------------------------------------------------------------------------------------------
@pytest.fixture
def shared(whole, tmp_path):
    """A copy of a finished run, with a card."""
    run = Path(shutil.copytree(whole.out, tmp_path / "run"))
    done = python(EXTRAS / "card.py", run, "--license", "apache-2.0")
    assert done.stdout == f"{run}/round2/model/README.md\n", done.stderr
    return run


def test_a_card_tells_what_was_and_was_not_measured(shared, whole):
    """Catches: a header that the hub refuses, lessons of another round, paths of one's own machine."""
    text = (shared / "round2/model/README.md").read_text()
    header = text.split("---\n")[1]
    assert "license: apache-2.0" in header and "base_model" not in header, "a folder is no hub name"
    for path in (shared / "round2/experience").iterdir():
        assert card.visible(path.read_text().strip()) in text
    for row in rows_of(shared / "metrics.jsonl"):
        assert f"| {row['round']} | {row['pass_rate']:.3f} |" in text
    assert "in_context" in text.split("What was not")[0] and "safety" in text.split("What was not")[1]
    assert str(Path(whole.model).parent) not in text and str(shared) not in text
    assert not files_in(shared / "round1/model").keys() & {"README.md"}, "only the newest round has one"
    config = {**json.loads((shared / "config.json").read_text()), "model": "Qwen/Qwen3-1.7B"}
    assert "base_model: Qwen/Qwen3-1.7B\n" in card.card(shared, config, 2)


def test_nothing_in_a_lesson_closes_its_fence():
    """Catches: lessons that become headings or code of the card."""
    assert card.block("a\n````\n# b") == "`````\na\n````\n# b\n`````"


ROPES = {
    "default": {"rope_type": "default", "rope_theta": 5e5},
    "llama3": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
}  # fmt: skip


@pytest.mark.parametrize("rope", ROPES)
def test_the_older_form_says_the_same(rope, tmp_path):
    """Catches: settings that transformers 5 reads otherwise than before, or that 4 does not find."""
    model, tokenizer = (
        build("Llama", vocab_size=320, num_key_value_heads=2, rope_parameters=ROPES[rope]),
        make_tokenizer(),
    )
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    ids = list(range(5, 205))
    wanted = plain_greedy(model, ids, 20)
    card.older_form(tmp_path)
    card.older_form(tmp_path)  # again
    old, names = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("config", "tokenizer_config"))
    scaling = {key: x for key, x in ROPES[rope].items() if key != "rope_theta"}
    assert old["rope_theta"] == 5e5 and old["rope_scaling"] == (None if rope == "default" else scaling)
    assert names["tokenizer_class"] == "PreTrainedTokenizerFast" and len(names["model_input_names"]) == 2
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters == ROPES[rope]
    again = oel.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert plain_greedy(again, ids, 20) == wanted
    assert AutoTokenizer.from_pretrained(tmp_path).encode("the end <think>") == tokenizer.encode("the end <think>")


def test_a_run_goes_on_after_its_card(shared, whole):
    """Catches: a model whose older form oel.py no longer loads."""
    a, b = (load(Path(out) / "round2/model") for out in (shared, whole.out))
    assert all(torch.equal(x, y) for x, y in zip(a.master, b.master, strict=True))


@pytest.mark.parametrize("name", ["card", "track"])
def test_a_folder_without_a_run_is_refused(name, tmp_path):
    """Catches: a traceback for a wrong folder."""
    options = ["--to", "tensorboard"] if name == "track" else []
    done = python(EXTRAS / f"{name}.py", tmp_path, *options)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and str(tmp_path) in done.stderr


# --- walkthrough.py -----------------------------------------------------------------------------------------
def test_the_walkthrough_runs_and_learns():
    """Catches: cells that no longer fit oel.py, functions of its own, a lesson that is not learned."""
    source = (EXTRAS / "walkthrough.py").read_text()
    assert "def " not in source and "class " not in source and source.count("# %%") >= 13
    done = python(EXTRAS / "walkthrough.py")
    assert done.returncode == 0, done.stderr
    before, after = done.stdout.split("The same board again")
    assert "H is the goal" in before and "- EXPERIENCE ITEM:" in before and "H is a hole" in after
