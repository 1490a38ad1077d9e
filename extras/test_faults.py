"""Tests of what goes wrong around a run: games that fail, folders and files that changed, options that clash."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import envs
import oel
import prompts
from extras.testing import arguments, files_in, logs, small

pytest_plugins = ["extras.testing"]

GAME = """
from rules import OVER

class Game:
    won = False
    def reset(self, level):
        {reset}
        self.turn = 0
        return "Where to?"
    def step(self, reply):
        self.turn += 1
        {step}
        return "Go on.", self.turn == OVER
"""
FAILING = {  # what happens in reset or step -> what the message says
    ("raise RuntimeError('no board')", ""): ["level", "RuntimeError('no board')"],
    ("", "raise RuntimeError('lost')"): ["level", "turn 1", "RuntimeError('lost')"],
    ("", "return None, True"): ["turn 1", "None is not text"],
    ("", "return 'no pair'"): ["turn 1", "ValueError"],
    ("", "return '\\ud800', True"): ["turn 1", "surrogates"],
    ("", "if self.turn == 2: del Game.won"): ["turn 2", "won"],
    ("return 7", ""): ["level", "7 is not text"],
}


@pytest.fixture
def game(tmp_path):
    """Write a game of two turns beside a module that it imports; returns its --env."""

    def write(reset: str = "", step: str = "") -> str:
        (tmp_path / "rules.py").write_text("OVER = 2\n")
        (tmp_path / "own.py").write_text(GAME.format(reset=reset or "pass", step=step or "pass"))
        envs.games_in.cache_clear()
        return f"{tmp_path / 'own.py'}:Game"

    yield write
    sys.modules.pop("rules", None)


@pytest.mark.parametrize("lines, messages", FAILING.items())
def test_a_game_that_fails_is_named_with_level_and_turn(lines, messages, game, folder, lessons, tmp_path, capsys):
    """Catches: a bare traceback of ours, no traceback of the game, a run folder that the corrected game cannot use."""
    cfg = small(model=folder, env=game(*lines), out=tmp_path / "run", experience=lessons)
    with pytest.raises(SystemExit) as stop:
        oel.main(arguments(cfg))
    err = capsys.readouterr().err
    last = err.strip().splitlines()[-1]
    assert stop.value.code == 2 and last.startswith("oel.py: error: Game, level ")
    assert all(message in last for message in messages) and "Traceback" in err
    assert ("own.py" in err) == ("raise" in "".join(lines)), "the traceback shows where in the game"
    game()
    oel.main(arguments(cfg))  # the same command, once the game is corrected
    assert len(oel.read_jsonl(tmp_path / "run/metrics.jsonl")) == 2


def test_a_game_that_cannot_be_made_is_an_error(game, folder, tmp_path, capsys):
    """Catches: an exception in a constructor, or while the file runs, that ends in a bare traceback."""
    for line in ("def __init__(self): raise KeyError('board')", "def reset(self) oops"):
        env = game()
        (tmp_path / "own.py").write_text(f"class Game:\n    {line}\n")
        with pytest.raises(SystemExit) as stop:
            oel.main(arguments(small(model=folder, env=env, out=tmp_path / "run")))
        assert stop.value.code == 2 and capsys.readouterr().err.splitlines()[-1].startswith("oel.py: error: --env ")
    assert not (tmp_path / "run").exists()


def test_a_variant_without_its_rules_is_named(game, folder, lessons, tmp_path, capsys):
    """Catches: a game with renamed() but no rules() that ends in a bare traceback after its first evaluation."""
    env = game()
    (tmp_path / "own.py").write_text(
        (tmp_path / "own.py").read_text() + "    renamed = classmethod(lambda cls, seed: cls())\n"
    )
    with pytest.raises(SystemExit) as stop:
        oel.main(arguments(small(model=folder, env=env, out=tmp_path / "run", experience=lessons)))
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and "own.py:Game renamed: AttributeError" in last and "'rules'" in last


def test_an_episode_without_end_is_stopped(game, folder, lessons, tmp_path, capsys):
    """Catches: a run that hangs for ever, or an episode that is stopped without a word."""
    env = game(step="return 'On and on.', False")
    oel.run(small(model=folder, env=env, out=tmp_path / "run", experience=lessons, max_turns=3))
    (played,) = oel.read_jsonl(tmp_path / "run/round1/logs.jsonl")[:1]
    assert len(played["turns"]) == 3 and not played["outcome"]["won"]
    assert "Game, level 8: stopped after turn 3 (--max-turns)" in "".join(capsys.readouterr())


# --- folders and files --------------------------------------------------------------------------------------
@pytest.fixture
def killed(folder, lessons, tmp_path, monkeypatch):
    """The settings of a run that was stopped in the consolidation of round 2."""
    cfg = small(model=folder, out=tmp_path / "run", rounds=2, form="free", experience=lessons)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        consolidate = oel.consolidate

        def stop(policy, cfg, played, lists, phase, *more):
            if Path(more[0]).parts[-3] == "round2":
                raise KeyboardInterrupt
            consolidate(policy, cfg, played, lists, phase, *more)

        patched.setattr(oel, "consolidate", stop)
        oel.run(cfg)
    return cfg


def test_an_emptied_record_is_made_again(killed, tmp_path):
    """Catches: an empty file, as a power cut leaves it, that counts as a record and ends in a traceback."""
    before = {name: path.read_bytes() for name, path in files_in(tmp_path / "run/round2").items()}
    (tmp_path / "run/round2/logs.jsonl").write_bytes(b"")
    (tmp_path / "run/round2/experience/00.txt").unlink()
    oel.run(killed)
    after = files_in(tmp_path / "run/round2")
    assert "logs.jsonl" in before and all(after[name].read_bytes() == text for name, text in before.items())


DAMAGE = {  # what happens to a folder between two commands -> what the second one says
    "no config": (lambda run: (run / "config.json").unlink(), "config.json is missing"),
    "another config": (lambda run: (run / "config.json").write_text("[1]"), "config.json is missing or damaged"),
    "no metrics": (lambda run: (run / "metrics.jsonl").write_text(""), "metrics.jsonl lacks rounds"),
    "other lessons": (lambda run: (run.parent / "lessons.txt").write_text("Stay away from X."), "lessons.txt was"),
}


@pytest.mark.parametrize("damage, message", DAMAGE.values(), ids=DAMAGE)
def test_a_folder_that_does_not_fit_is_not_used(damage, message, killed, tmp_path):
    """Catches: a run that goes on with other settings or lessons than it began with, or with a gap in its table."""
    damage(tmp_path / "run")
    with pytest.raises(oel.UsageError, match=message):
        oel.run(killed)


def test_weights_that_changed_behind_their_name_are_noticed(policy, lessons, tmp_path):
    """Catches: another model in the same folder, from which round 1 would go on."""
    policy.model.save_pretrained(tmp_path / "model")
    policy.tokenizer.save_pretrained(tmp_path / "model")
    cfg = small(model=tmp_path / "model", out=tmp_path / "run", rounds=0, experience=lessons)
    oel.run(cfg)
    with torch.no_grad():
        policy.model.get_input_embeddings().weight[7] += 0.5
    policy.model.save_pretrained(tmp_path / "model")
    with pytest.raises(oel.UsageError, match="model.safetensors was"):
        oel.run(cfg)


def test_a_run_from_before_an_option_goes_on(killed, tmp_path):
    """Catches: a new option, with its default, that makes all older run folders unusable."""
    path = tmp_path / "run/config.json"
    config = {k: v for k, v in json.loads(path.read_text()).items() if k != "max_turns" and "content" not in k}
    path.write_text(json.dumps(config))
    oel.run(killed)
    path.write_text(json.dumps({**config, "lr": 0.5}))
    with pytest.raises(oel.UsageError, match="lr was 0.5"):
        oel.run(killed)


# --- lengths and options ------------------------------------------------------------------------------------
def test_what_is_too_long_is_said_before_anything_is_played(folder, tmp_path, monkeypatch):
    """Catches: lessons or a log beyond the context that stop a run after hours, and stay in its folder."""
    monkeypatch.setattr(oel, "drive", None)
    long, turns = "Walk on. " * 4000, logs(2)
    turns[1]["turns"][0]["prompt"] = long
    oel.write_jsonl(tmp_path / "logs.jsonl", turns)
    (tmp_path / "long.txt").write_text(long)
    for option in ({"experience": tmp_path / "long.txt"}, {"logs": tmp_path / "logs.jsonl"}):
        with pytest.raises(oel.UsageError, match="exceed a context of"):
            oel.run(small(model=folder, out=tmp_path / "run", **option))
        assert not (tmp_path / "run").exists()


def test_options_that_would_be_ignored_are_refused(refused, lessons):
    """Catches: --context raw that trains on lessons, or --kl-top-k without effect."""
    assert "--context raw" in refused(experience=lessons, context="raw")
    assert "--kl-top-k" in refused(kl_top_k=4, distill="off-policy")


def test_a_chat_too_long_to_read_is_refused_at_once():
    """Catches: prompts that repeat all that was said, of a chat of thousands of turns: minutes and gigabytes."""
    turns = [{"role": role, "content": "Well, hello there. " * 30} for role in ("user", "assistant")]
    with pytest.raises(ValueError, match="message .*: the chat is longer"):
        prompts.parse_log(json.dumps({"messages": turns * 5000}))


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    """Catches: the eighth GPU of a machine that has two."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    assert oel.find_device("cuda:1") == torch.device("cuda:1") and oel.find_device().type == "cuda"
    for name in ("cuda:2", "cuda:x", "cuda:", "mps"):
        with pytest.raises(oel.UsageError, match=f"--device {name} is not available"):
            oel.find_device(name)


def test_ctrl_c_in_a_smoke_run_promises_nothing(folder, tmp_path, monkeypatch, capsys):
    """Catches: a message that the same command continues what was played in a temporary folder."""
    monkeypatch.setattr(oel, "drive", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(SystemExit) as stop:
        oel.main(["--smoke", "--model", folder, "--out", str(tmp_path / "run")])
    err = capsys.readouterr().err
    assert stop.value.code == 130 and "stopped in round 0, evaluation" in err and "continues" not in err
