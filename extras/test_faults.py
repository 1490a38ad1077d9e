"""Tests of what goes wrong around a run: games that fail, folders and files that changed, options that clash."""

import dataclasses
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import envs
import oel
import prompts
from extras.testing import arguments, consolidated, files_in, kl_inputs, load, logs, small

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


ODD = {  # lines of a class -> what the message says
    "task = 5": "AssertionError('5 is not text')",
    "task = property(lambda self: 1 / 0)": "ZeroDivisionError",
    "strict = property()": "own.py:Game: AttributeError",
    "step = lambda self, reply: ('Well.', torch.ones(2))": "turn 1: RuntimeError",
}


@pytest.mark.parametrize("line, message", ODD.items())
def test_whatever_is_odd_about_a_game_is_named(line, message, game, folder, tmp_path, capsys):
    """Catches: an attribute of a game that fails where no one expects it, and ends in a traceback of ours."""
    env = game()
    (tmp_path / "own.py").write_text(f"import torch\n{(tmp_path / 'own.py').read_text()}\n    {line}\n")
    with pytest.raises(SystemExit) as stop:
        oel.main(arguments(small(model=folder, env=env, out=tmp_path / "run")))
    assert stop.value.code == 2 and message in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_game_may_be_false(game):
    """Catches: a game with a length, such as that of a list of things on its board, that counts as none."""
    env = game()
    file = Path(env.rpartition(":")[0])
    file.write_text(f"{file.read_text()}\n    __len__ = lambda self: 0\n")
    assert oel.make_game(small(env=env)) is not None


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


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes().splitlines(keepends=True)[0])


DAMAGE = {  # what happens to a folder between two commands -> what the second one says
    "no config": (lambda run: (run / "config.json").unlink(), "config.json is missing"),
    "another config": (lambda run: (run / "config.json").write_text("[1]"), "config.json is missing or damaged"),
    "a deep config": (
        lambda run: (run / "config.json").write_text("[" * 100000),
        "config.json is missing or damaged",
    ),
    "no metrics": (lambda run: (run / "metrics.jsonl").write_text(""), "lacks metrics: use another --out"),
    "a cut record": (lambda run: cut(run / "round2/logs.jsonl"), "round2: logs.jsonl or experience/ was cut"),
    "an emptied list": (lambda run: (run / "round2/experience/00.txt").write_text("\n"), "experience/ was cut"),
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


def test_a_file_that_is_new_in_the_models_folder_is_noticed(policy, lessons, tmp_path):
    """Catches: other stop ids, in a generation_config.json that was not there when the run began."""
    policy.model.save_pretrained(tmp_path / "model")
    policy.tokenizer.save_pretrained(tmp_path / "model")
    file = tmp_path / "model/generation_config.json"
    text = file.read_text()
    file.unlink()
    cfg = small(model=tmp_path / "model", out=tmp_path / "run", rounds=0, experience=lessons)
    oel.run(cfg)
    file.write_text(text)
    with pytest.raises(oel.UsageError, match="generation_config.json was None"):
        oel.run(cfg)


def test_a_list_is_cut_with_few_looks_at_its_length():
    """Catches: all that is left tokenized again for every line that goes, which took a minute for ten long lists."""
    looks, lines = [], [f"lesson {i}" for i in range(1000)]
    count = lambda text: looks.append(text) or len(text.split())
    assert prompts.accumulate("\n".join(lines), "the last", 100, count) == "\n".join([*lines[-49:], "the last"])
    assert len(looks) <= 11


def test_another_seed_is_another_run(killed):
    """Catches: a second seed that goes on with the first one's weights."""
    with pytest.raises(oel.UsageError, match="seed was 1, is 2"):
        oel.run(dataclasses.replace(killed, seed=2))


def test_an_extractor_that_changed_is_noticed(folder, lessons, tmp_path):
    """Catches: lists of one run that two different models have written."""
    cfg = small(model=folder, extractor=copied(folder, tmp_path / "other"), out=tmp_path / "run", rounds=0)
    oel.run(cfg)
    (tmp_path / "other/generation_config.json").write_text("{}")
    with pytest.raises(oel.UsageError, match="other/generation_config.json was"):
        oel.run(cfg)


def test_what_is_written_is_on_disk_before_it_has_its_name(policy, tmp_path, monkeypatch):
    """Catches: files that a power cut leaves empty, because their name came before their content."""
    synced, sync = [], os.fsync
    monkeypatch.setattr(oel.os, "fsync", lambda n: sync(n) or synced.append(Path(f"/dev/fd/{n}").resolve().name))
    oel.write_jsonl(tmp_path / "rows.jsonl", [{"round": 1}])
    assert synced == ["rows.jsonl.part"] and (tmp_path / "rows.jsonl").read_bytes()
    oel.save_model(tmp_path / "model", policy)
    assert sorted(synced[1:]) == sorted(path.name for path in (tmp_path / "model").iterdir())


def test_a_run_from_before_an_option_goes_on(killed, tmp_path):
    """Catches: a new option, with its default, that makes all older run folders unusable."""
    path = tmp_path / "run/config.json"
    config = {k: v for k, v in json.loads(path.read_text()).items() if k != "max_turns"}
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
    turns[1]["turns"][0]["prompt"] = "Walk on. " * 20  # fits, but not behind a list of as many tokens as it may have
    oel.write_jsonl(tmp_path / "fits.jsonl", turns)
    for option in (
        {"experience": tmp_path / "long.txt"},
        {"logs": tmp_path / "logs.jsonl"},
        {"logs": tmp_path / "fits.jsonl", "experience_budget": 4000},
    ):
        with pytest.raises(oel.UsageError, match="exceed a context of"):
            oel.run(small(model=folder, out=tmp_path / "run", **option))
        assert not (tmp_path / "run").exists()


def test_options_that_would_be_ignored_are_refused(refused, lessons):
    """Catches: --context raw that trains on lessons."""
    assert "--context raw" in refused(experience=lessons, context="raw")


def test_a_byte_order_mark_is_no_lesson(refused, folder, lessons, tmp_path):
    """Catches: lessons that begin with a mark that editors write, or a file that has nothing else."""
    lessons.write_bytes(b"\xef\xbb\xbfX loses.\n")
    assert oel.extract(load(folder), small(experience=lessons), [], None) == ["X loses."]
    lessons.write_bytes(b"\xef\xbb\xbf\n")
    assert "is empty" in refused(experience=lessons)


def test_no_turn_of_a_log_is_without_a_prompt():
    """Catches: a second turn that asks nothing, and is trained on."""
    (log,) = logs(1)
    log["turns"][1]["prompt"] = " "
    with pytest.raises(ValueError, match="without a prompt"):
        prompts.parse_log(json.dumps(log))


def test_a_chat_may_begin_with_a_greeting():
    """Catches: a whole file refused because an assistant spoke first, or a greeting that is trained on as a reply."""
    talk = [("assistant", "Tea or coffee?"), ("user", "The second."), ("assistant", "Here it is."), ("user", "Cold!")]
    (turn,) = prompts.chat_turns([{"role": role, "content": text} for role, text in talk])
    assert turn == {"prompt": "Tea or coffee?\n\nThe second.", "response": "Here it is.", "feedback": "Cold!"}
    with pytest.raises(ValueError, match="no turn"):
        prompts.parse_log(json.dumps({"messages": [{"role": "assistant", "content": "Hello?"}]}))


def test_raw_logs_need_no_extractor(policy):
    """Catches: a second model that is loaded, or looked for, to write lessons that nobody asked for."""
    cfg = small(context="raw", extractor="no/such/model", experience_budget=10_000)
    (experience,) = oel.extract(policy, cfg, logs(1), oel.Phase([], 0, nucleus=False))
    assert experience == prompts.transcript(prompts.parse_log(json.dumps(logs(1)[0])), cfg.reasoning)


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
    for name in ("cuda:2", "cuda:x", "cuda:", "cuda:\u00b2", "cpu:99999999999999", "mps"):
        with pytest.raises(oel.UsageError, match=f"--device {name} is not available"):
            oel.find_device(name)


def test_ctrl_c_in_a_smoke_run_promises_nothing(folder, tmp_path, monkeypatch, capsys):
    """Catches: a message that the same command continues what was played in a temporary folder."""
    monkeypatch.setattr(oel, "drive", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(SystemExit) as stop:
        oel.main(["--smoke", "--model", folder, "--out", str(tmp_path / "run")])
    err = capsys.readouterr().err
    assert stop.value.code == 130 and "oel.py: stopped" in err and "continues" not in err


# --- what an attack found -----------------------------------------------------------------------------------
def copied(folder, to: Path, **changes) -> Path:
    """A copy of a policy's folder, with other values in its config.json."""
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({**config, **changes}))
    return to


def test_a_model_is_trained_without_dropout(folder, tmp_path):
    """Catches: dropout of a config, which would disturb the student alone."""
    policy = load(copied(folder, tmp_path / "model", attention_dropout=0.5))
    (row,) = consolidated(policy, small(steps=1), experiences=None)
    assert abs(row["loss"]) < 1e-6 and not policy.model.config.attention_dropout


def test_settings_of_a_model_that_changed_are_noticed(folder, lessons, tmp_path):
    """Catches: a rotary base or stop ids that are others when the run goes on."""
    cfg = small(model=copied(folder, tmp_path / "model"), out=tmp_path / "run", rounds=0, experience=lessons)
    oel.run(cfg)
    config = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps({**config, "rope_theta": 7.0}))
    with pytest.raises(oel.UsageError, match="model/config.json was"):
        oel.run(cfg)


def test_one_folder_has_one_lock_by_whatever_name(folder, lessons, tmp_path):
    """Catches: a second run in the same folder, by way of a link."""
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "run")
    with FileLock(f"{(tmp_path / 'run').resolve()}.lock"), pytest.raises(TimeoutError):
        oel.run(small(model=folder, out=tmp_path / "link", rounds=0, experience=lessons))


def test_a_pipe_is_no_file(folder, tmp_path):
    """Catches: logs or lessons that are read once and then compared, or read again, as if they were empty."""
    for name, text in (("logs", json.dumps(logs(1)[0])), ("experience", "X loses.")):
        end, start = os.pipe()
        os.write(start, text.encode())
        os.close(start)
        with pytest.raises(oel.UsageError, match=f"--{name} /dev/fd"):  # what a shell makes of <(command)
            oel.run(small(model=folder, out=tmp_path / "run", **{name: f"/dev/fd/{end}"}))
        os.close(end)


def test_a_backup_of_a_list_is_no_list(killed, tmp_path):
    """Catches: one more list of lessons, which an editor left behind."""
    (tmp_path / "run/round2/experience/00.txt~").write_text("X wins.")
    found = oel.recorded(tmp_path / "run/round2/experience", None)
    assert found == [(tmp_path / "run/round2/experience/00.txt").read_text()]


def test_a_state_of_another_model_is_refused(policy, tmp_path):
    """Catches: a bare traceback of torch's about sizes or groups."""
    other = [torch.zeros(3)]
    torch.save({"step": 1, "master": other, "optimizer": torch.optim.AdamW(other).state_dict()}, tmp_path / "step.pt")
    with pytest.raises(oel.UsageError, match="step.pt is damaged"):
        consolidated(policy, small(), state=tmp_path / "step.pt")


def test_a_folder_that_no_text_can_name_is_refused_at_once(folder, tmp_path, capsys):
    """Catches: a round that is played and trained, and can then not be saved."""
    with pytest.raises(SystemExit) as stop:
        oel.main(arguments(small(model=folder, out=f"{tmp_path}/o\udcff")))
    assert stop.value.code == 2 and not list(tmp_path.iterdir()) and "surrogates" in capsys.readouterr().err


def test_a_tool_call_that_is_no_list_is_kept_whole():
    """Catches: the keys of a call, or the letters of a text, in place of the call."""
    for call in ({"name": "go", "arguments": "up"}, "go up"):
        (turn,) = prompts.chat_turns([{"role": "user", "content": "?"}, {"role": "assistant", "tool_calls": call}])
        assert json.loads(turn["response"]) == call


def test_the_in_context_rate_is_that_of_its_round(whole, tmp_path, monkeypatch):
    """Catches: the rate of the round before."""
    for r in (1, 2):
        oel.write_jsonl(tmp_path / f"round{r}/in_context.jsonl", [{"outcome": {"won": r == 2}}])
    monkeypatch.setattr(oel, "evaluate", lambda *_: ({"pass_rate": 0.0}, []))
    for r in (1, 2):
        oel.measure(None, whole, r, whole.steps, tmp_path, 0.0)
        assert oel.read_jsonl(tmp_path / "metrics.jsonl")[-1]["in_context_pass_rate"] == (r == 2)


def test_raw_logs_are_shown_as_reasoning_says(policy):
    """Catches: --context raw that shows the reasoning although it is told not to."""
    played = [{"id": "", "turns": [{"prompt": "P", "response": "<think>why</think>[up]", "feedback": "F"}]}]
    for reasoning in (True, False):
        (text,) = oel.extract(policy, small(context="raw", reasoning=reasoning, experience_budget=900), played, None)
        assert ("why" in text) == reasoning and "[up]" in text


def test_another_extractor_is_loaded_as_the_policy_is(folder, policy, monkeypatch):
    """Catches: --dtype or --no-thinking that does not reach the model that writes the lessons."""
    cfg, made = small(extractor=folder, dtype="bfloat16", thinking=False, smoke=True), []
    monkeypatch.setattr(oel, "load_policy", lambda *args, **how: made.append((args, how)) or policy)
    oel.extract(policy, cfg, logs(2), oel.Phase([], 0, nucleus=True))
    assert made == [((folder, policy.model.device, False, "bfloat16"), {"offload": None})]


def test_damaged_files_of_a_model_are_refused(folder, policy, tmp_path):
    """Catches: stop ids that get lost with half a file, and layers that are in the weights and not in the model."""
    (copied(folder, tmp_path / "half") / "generation_config.json").write_text('{"eos_token_id": 5')
    with pytest.raises(oel.UsageError, match="no policy in .*half"):
        load(tmp_path / "half")
    layers = policy.model.config.num_hidden_layers - 1
    with pytest.raises(oel.UsageError, match="lack or add.*unexpected_keys"):
        load(copied(folder, tmp_path / "short", num_hidden_layers=layers, layer_types=["full_attention"] * layers))
    with torch.no_grad():
        policy.model.get_input_embeddings().weight[7, 7] = float("nan")
    oel.save_model(tmp_path / "nan", policy)
    with pytest.raises(oel.UsageError, match="not finite"):
        load(tmp_path / "nan")


def test_both_the_models_and_the_tokenizers_stop_ids_stop(folder, tmp_path):
    """Catches: a reply that runs on over the end that only one of the two files names."""
    path = copied(folder, tmp_path / "model")
    (path / "generation_config.json").write_text('{"eos_token_id": 5}')
    policy = load(path)
    assert policy.stop_ids == {5, policy.tokenizer.eos_token_id}


def test_a_resumed_model_is_brought_up_to_date(folder, tmp_path):
    """Catches: bf16 weights that stay behind the float32 ones that a saved state holds."""
    cfg, path = small(steps=3, dtype="bfloat16"), tmp_path / "step.pt"
    whole, part = (load(folder, dtype="bfloat16") for _ in range(2))
    rows = consolidated(whole, cfg)
    with pytest.raises(KeyboardInterrupt):
        consolidated(part, cfg, state=path, stop_at=3)
    resumed = consolidated(load(folder, dtype="bfloat16"), cfg, state=path)
    assert [row["loss"] for row in resumed] == [row["loss"] for row in rows[2:]]


def test_own_logs_are_trained_on_in_their_order(folder, lessons, tmp_path):
    """Catches: logs that are shifted, or prompts whose length counts without the lessons that come before them."""
    own = logs(3)
    oel.write_jsonl(tmp_path / "logs.jsonl", own)
    cfg = small(
        model=folder, out=tmp_path / "run", logs=tmp_path / "logs.jsonl", experience=lessons, batch_episodes=2
    )
    oel.run(cfg)
    ids = [log["id"] for log in oel.read_jsonl(tmp_path / "run/round1/logs.jsonl")]
    assert ids == [str(own[i % 3].get("id", "")) for i in range(4)] and len(set(ids)) == 3
    context = load(folder).model.config.max_position_embeddings
    monstrous = "Walk on. " * 300
    (tmp_path / "long.txt").write_text(monstrous)
    left = context - len(load(folder).encode(monstrous)) - 8
    own[1]["turns"][0]["prompt"] = "word " * (left // 2)
    assert len(load(folder).encode(own[1]["turns"][0]["prompt"])) + 8 < context
    oel.write_jsonl(tmp_path / "logs.jsonl", own)
    with pytest.raises(oel.UsageError, match="exceed a context"):
        oel.run(
            small(model=folder, out=tmp_path / "two", logs=tmp_path / "logs.jsonl", experience=tmp_path / "long.txt")
        )
    assert not (tmp_path / "two").exists(), "it is said before anything is played"


# --- faults that all other tests let through ----------------------------------------------------------------
def test_the_defaults_are_the_papers():
    """Catches: another nucleus, learning rate, or number of episodes or steps than the paper's."""
    cfg = oel.parse_args(["--model", "Qwen/Qwen3-1.7B"])
    assert (cfg.temperature, cfg.top_p, cfg.top_k, cfg.reply_limit) == (0.7, 0.8, 20, 1024)
    assert (cfg.lr, cfg.weight_decay, cfg.steps, cfg.batch_episodes, cfg.eval_games) == (5e-6, 0.01, 20, 64, 128)
    assert (cfg.lists, cfg.episodes, cfg.form, cfg.previous, cfg.experience_budget) == (10, 15, "free", False, 2048)
    for name, episodes, steps in (("4B", 25, 20), ("8B", 50, 100), ("4B-Instruct-2507", 50, 100)):
        cfg = oel.parse_args(["--model", f"Qwen/Qwen3-{name}"])
        assert (cfg.episodes, cfg.steps, cfg.lr, cfg.form, cfg.previous) == (episodes, steps, 1e-6, "items", True)
        assert cfg.experience_budget == 8192


def test_the_games_have_the_sizes_that_the_results_are_of():
    """Catches: a lake with another number of holes or turns, or rules that exchange hole and goal."""
    lakes = [envs.FrozenLake(), envs.FrozenLake.unseen(), envs.BigLake(), envs.BigLake.unseen()]
    sizes = [(game.size, game.num_holes, game.max_turns) for game in lakes]
    assert sizes == [(3, 2, 5), (4, 3, 8), (4, 4, 8), (3, 2, 5)]
    assert (envs.Sokoban().size, envs.Sokoban().max_turns) == (6, 5)
    for said in ("H is a hole. Stepping on H loses.", "G is the goal. Stepping on G wins."):
        assert said in envs.FrozenLake().rules() and said in envs.BigLake().rules()
    assert "E is harmless. Stepping on E does nothing." in envs.BigLake().rules()


def test_eq_1_keeps_what_is_said_twice():
    """Catches: lines that are dropped because an earlier one is equal, which Eq. 1 does not do."""
    assert prompts.accumulate("a\nb", "a\nc", 100, len) == "a\nb\na\nc"


def test_the_answer_is_behind_the_last_closing_tag():
    """Catches: an answer that still holds reasoning, where a reply closes its reasoning twice."""
    assert prompts.answer("<think>[up]</think> no [left] </think> [right]") == "[right]"


def test_reply_tokens_are_a_mean_over_all_turns(monkeypatch):
    """Catches: a mean of the episodes' means, in which a turn of a short episode counts more."""
    rest = {"invalid": 0, "truncated": 0, "unclosed": 0}
    outcomes = [{"won": True, "turns": 1, "reply_tokens": 10}, {"won": False, "turns": 9, "reply_tokens": 360}]
    monkeypatch.setattr(oel, "deploy", lambda *_, **__: [{"outcome": {**x, **rest}} for x in outcomes])
    metrics, _ = oel.evaluate(None, small(), oel.phases(small(), 1))
    assert (metrics["reply_tokens"], metrics["pass_rate"]) == (37, 0.5)


def test_lessons_are_counted_without_the_chat_template(policy):
    """Catches: a budget that every list of lessons spends on the markers of a chat."""
    assert policy.count_tokens("") == 0
    assert policy.count_tokens("abc") == len(policy.tokenizer.encode("abc", add_special_tokens=False))


@pytest.mark.parametrize("reasoning", [True, False])
def test_the_extractor_sees_reasoning_only_if_it_should(policy, reasoning):
    """Catches: --no-reasoning without effect where lessons are written."""
    log = logs(1)[0]
    log["turns"][0]["response"] = "<think>SECRET</think> [right]"
    request = next(oel.lesson_list(policy, small(reasoning=reasoning), [log]))
    assert ("SECRET" in policy.decode(request.prompt_ids)) == reasoning


def test_noise_does_not_depend_on_the_length_of_the_prompt(policy):
    """Catches: noise by the place in the row. A reply would change with what stands before it even where the
    model's probabilities do not."""
    with torch.no_grad():
        policy.model.get_output_embeddings().weight.zero_()  # all tokens are equally probable
    how = {"max_new_tokens": 8, "stop_ids": frozenset(), "vocab_size": policy.vocab_size, "seed": 3}
    short, long = (oel.sample(policy.model, [[5] * n], **how)[0].ids for n in (3, 40))
    assert short == long and len(set(short)) > 1


@pytest.mark.parametrize("nucleus", [True, False])
def test_every_phase_samples_at_the_temperature(policy, nucleus):
    """Catches: a temperature that is fixed in some phases."""
    how = oel.sampling(policy, small(temperature=0.3, top_p=0.4, top_k=5), oel.Phase([], 9, nucleus), "")
    assert (how["temperature"], how["seed"]) == (0.3, 9)
    assert (how.get("top_p"), how.get("top_k")) == ((0.4, 5) if nucleus else (None, None))


def test_a_run_loads_its_policy_as_the_options_say(folder, tmp_path, monkeypatch):
    """Catches: --no-thinking, --dtype or --offload that a run does not hand on."""
    asked = []
    monkeypatch.setattr(oel, "load_policy", lambda *how: asked.append(how) or oel.require(False, "enough"))
    cfg = small(model=folder, out=tmp_path / "run", thinking=False, dtype="bfloat16", offload=True)
    with pytest.raises(oel.UsageError, match="enough"):
        oel.run(cfg)
    assert asked == [(str(folder), torch.device("cpu"), False, "bfloat16", True)]


def test_masters_are_the_weights_before_they_are_rounded(folder):
    """Catches: float32 masters that were rounded to bf16 first, so that a run begins with another policy."""
    plain, half = (load(folder, dtype=dtype) for dtype in ("float32", "bfloat16"))
    assert all(torch.equal(a, b) for a, b in zip(plain.master, half.master, strict=True))
    assert any(not torch.equal(m, m.bfloat16().float()) for m in half.master), "rounding would show"


def test_a_sampled_stop_token_is_trained_on(policy, monkeypatch):
    """Catches: replies that lose their last token before training, so that the student never learns when to end."""
    ids = [*policy.encode("yes")[:3], policy.tokenizer.eos_token_id]
    monkeypatch.setattr(oel, "sample", lambda model, prompt_ids, **_: [oel.Response(ids, "stop") for _ in prompt_ids])
    samples = oel.sample_responses(policy, policy.model, small(), logs(1), None, oel.Phase([], 0, nucleus=False), 1)
    assert samples and all(s.response_ids == ids for s in samples)


def test_settings_are_compared_by_the_run_that_holds_the_folder(folder, tmp_path, monkeypatch):
    """Catches: settings that are compared before the lock, so that another run may have taken the folder since."""
    cfg, order = small(model=folder, out=tmp_path / "run"), []
    monkeypatch.setattr(oel, "FileLock", lambda *_, **__: order.append("lock") or FileLock(str(tmp_path / "x.lock")))
    monkeypatch.setattr(oel, "check_inputs", lambda *_: order.append("compare") or oel.require(False, "enough"))
    with pytest.raises(oel.UsageError, match="enough"):
        oel.run(cfg)
    assert order == ["lock", "compare"]


# --- what is played and written at once ---------------------------------------------------------------------
@pytest.mark.parametrize("fails", [False, True])
def test_no_more_games_are_open_than_can_be_played(policy, monkeypatch, fails):
    """Catches: games that are all made before the first is played, or never closed, above all where one fails."""
    opened, most = [], []

    class Game:
        won, task = False, "Go."

        def __init__(self):
            opened.append(self)
            most.append(len(opened))

        def reset(self, level):
            if fails and level > 12:
                raise RuntimeError("no board")
            return "Where to?"

        def step(self, reply):
            return "Over.", True

        def close(self):
            opened.remove(self)

    monkeypatch.setattr(envs, "games_in", lambda file: {"mine": Game})
    monkeypatch.setattr(oel, "make_game", lambda *_, **__: Game())
    cfg, phase = small(env="mine", rows=3, reply_limit=4), oel.Phase([*range(2, 30, 3)], 0, nucleus=False)
    if fails:
        with pytest.raises(oel.UsageError, match="no board"):
            oel.deploy(policy, cfg, phase)
    else:
        assert len(oel.deploy(policy, cfg, phase)) == 10
    assert max(most) <= 4 and not opened  # three with a row, and one that waits for the next


def test_a_budget_counts_in_the_tokens_of_who_reads_the_list(policy, monkeypatch):
    """Catches: a list of another extractor that fits in its own tokens, and is then too long for the policy."""
    other = dataclasses.replace(policy)
    monkeypatch.setattr(other, "count_tokens", lambda text: 1, raising=False)
    monkeypatch.setattr(oel, "load_policy", lambda *_, **__: other)
    monkeypatch.setattr(oel, "drive", lambda model, folds, **_: [f"- EXPERIENCE ITEM: {i}" for i in range(4)])
    lists = oel.extract(policy, small(extractor="x", lists=1, experience_budget=50), logs(4), oel.Phase([], 0, True))
    assert 20 < policy.count_tokens(lists[0]) <= 50


@pytest.mark.parametrize("previous", [False, True])
def test_extractions_wait_only_for_what_they_read(policy, monkeypatch, previous):
    """Catches: episodes that are read one after the other although no extraction sees the list so far; parts of a list
    in another order, or in another list."""
    turns = []

    def lesson_list(policy, cfg, trajectories):
        turns.append([t["id"] for t in trajectories])
        return prompts.as_items([t["id"] for t in trajectories])
        yield

    monkeypatch.setattr(oel, "lesson_list", lesson_list)
    cfg = small(lists=2, form="items", previous=previous, experience_budget=200)
    lists = oel.extract(policy, cfg, logs(5), oel.Phase([], 0, nucleus=True))
    ids = [f"test-{i}" for i in range(5)]
    assert turns == ([ids[:3], ids[3:]] if previous else [[x] for x in ids])
    assert lists == [prompts.as_items(ids[:3]), prompts.as_items(ids[3:])]


def test_a_list_is_cut_alike_however_it_is_written(policy, monkeypatch):
    """Catches: a list that is cut in another way when its parts are written at once (Eq. 1)."""
    monkeypatch.setattr(oel.Policy, "count_tokens", lambda self, text: len(text.split()))
    monkeypatch.setattr(oel, "drive", lambda model, folds, **_: [answer(fold) for fold in folds])
    said = []

    def answer(fold):
        request = next(fold)
        while True:
            said.append(request)
            try:
                request = fold.send(oel.Response(policy.encode(f"{len(said)} " * (3 * len(said) % 7 + 1)), "stop"))
            except StopIteration as stop:
                return stop.value

    monkeypatch.setattr(oel.Policy, "decode", lambda self, ids: f"one {len(said)} " * (3 * len(said) % 7 + 1))
    found = []
    for previous in (True, False):
        said.clear()
        cfg = small(lists=1, form="free", previous=previous, experience_budget=23)
        found.append(oel.extract(policy, cfg, logs(7), oel.Phase([], 0, nucleus=True)))
    assert found[0] == found[1] and 12 < len(found[0][0].split()) <= 23


def test_an_anchor_is_told_nothing_and_read_by_no_extractor(policy, folder, tmp_path, monkeypatch):
    """Catches: anchors whose teacher reads the lessons, so that what should stay is changed too."""
    lines = logs(3)
    lines[1]["anchor"] = True
    file = tmp_path / "logs.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    parsed = oel.read_jsonl(file, prompts.parse_log)
    assert [log["anchor"] for log in parsed] == [False, True, False]
    samples = oel.sample_responses(
        policy, policy.model, small(batch_episodes=3), parsed, ["G wins."], oel.Phase([], 0, nucleus=False), 1
    )
    told = [s.teacher_ids != s.prompt_ids for s in samples]
    assert told == [not log["anchor"] for log in parsed for _ in log["turns"]]
    run, read = tmp_path / "run", []
    monkeypatch.setattr(oel, "extract", lambda *args: read.extend(x["id"] for x in args[2]) or ["G wins."])
    oel.run(small(model=folder, logs=file, out=run, form="free", steps=3))
    assert read == ["test-0", "test-2"]
    assert [x["id"] for x in oel.read_jsonl(run / "round1/logs.jsonl")] == ["test-0", "test-1", "test-2"]
    file.write_text(json.dumps(lines[1]) + "\n")
    with pytest.raises(oel.UsageError, match="anchors"):
        oel.run(small(model=folder, logs=file, out=tmp_path / "other"))


def test_equal_sides_have_no_divergence():
    hs, _, ws, _ = kl_inputs(20, torch.float32)
    for found in oel.reverse_kl(hs, hs, ws, ws, 0.7):
        assert not found.any()


def test_the_chat_models_of_the_readme_have_presets():
    cfg = oel.parse_args(["--model", "HuggingFaceTB/SmolLM2-135M-Instruct"])
    assert (cfg.thinking, cfg.reply_limit, cfg.steps, cfg.lr) == (False, 128, 24, 1e-5)


def test_what_costs_only_time_or_memory_may_change(folder, lessons, tmp_path):
    """Catches: a run that died of too little memory, and cannot go on with less of it."""
    cfg = small(model=folder, experience=lessons, out=tmp_path / "run", rounds=1)
    oel.run(cfg)
    less = {"micro_tokens": 64, "rows": 2, "checkpointing": True, "offload": True, "graphs": False, "save_every": 1}
    assert oel.run(dataclasses.replace(cfg, rounds=2, **less))[-1]["round"] == 2
    with pytest.raises(oel.UsageError, match="steps was"):
        oel.run(dataclasses.replace(cfg, steps=cfg.steps + 1))
