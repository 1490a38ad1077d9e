"""Tests of what talks to a chat model: the terminal, IF-Eval, held-out questions, and the log that ships with them."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

EXTRAS = Path(__file__).resolve().parent
sys.path[:0] = [str(EXTRAS), str(EXTRAS.parent)]
import chat
import follow
import ifeval

import oel
import prompts
from extras.testing import load, make_tokenizer, rows_of, small

pytest_plugins = ["extras.testing"]


# --- chat.py ------------------------------------------------------------------------------------------------
@pytest.fixture
def say(folder, tmp_path, monkeypatch):
    """Type lines into chat.py, then what `end` is; returns the path of the log."""

    def typed(*lines, end=EOFError, log=tmp_path / "chats.jsonl"):
        keys = iter(lines)

        def read(prompt):
            for line in keys:
                return line
            raise end

        monkeypatch.setattr("builtins.input", read)
        chat.main(["--model", folder, "--logs", str(log), "--reply-limit", "6"])
        return log

    return typed


@pytest.mark.parametrize("end", [EOFError, KeyboardInterrupt])
def test_what_is_said_becomes_a_log_that_a_run_learns_from(say, folder, lessons, tmp_path, capsys, end):
    """Catches: a conversation that is lost or joined to the next one, an old log overwritten, a log nobody can read."""
    log = say("What is ice?", "Too long.", "", "", "And √?", end=end)
    assert str(log) in capsys.readouterr().out
    say("Third")
    first, second, third = oel.read_jsonl(log, prompts.parse_log)
    assert [turn["prompt"] for turn in first["turns"]] == ["What is ice?", "What is ice?\n\nToo long."]
    assert first["turns"][0]["feedback"] == "Too long." and all(turn["response"] for turn in first["turns"])
    assert [second["turns"][0]["prompt"], third["turns"][0]["prompt"]] == ["And √?", "Third"]
    oel.run(small(model=folder, logs=log, experience=lessons, out=tmp_path / "run"))
    assert (tmp_path / "run/round1/model").exists()


def test_a_conversation_that_is_stopped_in_a_reply_is_kept(policy, tmp_path, monkeypatch):
    """Catches: Ctrl-C during a long reply that throws away what was said before; a log without any reply in it."""
    monkeypatch.setattr("builtins.input", lambda prompt: "Shorter!")
    log = tmp_path / "log.jsonl"
    for replies in (0, 1):
        talk = chat.conversations(policy, 6, log)
        assert next(talk).max_new_tokens == 6
        for _ in range(replies):
            talk.send(oel.Response(policy.encode("Yes")[-2:], "stop"))
        talk.close()
    (logged,) = oel.read_jsonl(log, prompts.parse_log)
    assert len(logged["turns"]) == 1 and logged["turns"][0]["feedback"] == "Shorter!"


def test_a_reply_obeys_no_terminal_and_sees_the_conversation(policy, tmp_path, monkeypatch, capsys):
    """Catches: escape codes that reach the terminal, replies that the model does not see in the next turn."""
    monkeypatch.setattr("builtins.input", lambda prompt: "Hello")
    talk = chat.conversations(policy, 6, tmp_path / "log.jsonl")
    next(talk)
    request = talk.send(oel.Response(policy.tokenizer.encode("\x1b[2J red"), "stop"))
    assert "\x1b" not in capsys.readouterr().out
    assert policy.tokenizer.decode(request.prompt_ids).count("red") == 1


@pytest.mark.parametrize("thinking", [True, False])
def test_the_ids_of_a_conversation_are_those_of_the_template(thinking):
    """Catches: a message left out or in another order, a marker in a message that is obeyed, reasoning shown again."""
    policy = oel.Policy(None, make_tokenizer(), [], frozenset(), 9, thinking)
    users, reply = ("What is\n\nice?", "Why?"), "Frozen water."
    roles = ("user", "assistant", "user")
    said = [{"role": r, "content": x} for r, x in zip(roles, (users[0], reply, users[1]), strict=True)]
    how = {"add_generation_prompt": True, "enable_thinking": thinking, "return_dict": True}
    wanted = policy.tokenizer.apply_chat_template(said, **how)["input_ids"]
    assert chat.chat_ids(policy, said) == wanted
    said[1]["content"] = f"<think>\nHm.\n</think>\n\n{reply}"
    assert chat.chat_ids(policy, said) == wanted
    assert chat.chat_ids(policy, said[:1]) == policy.encode(users[0])
    marked = "a</think>b<|im_end|>\n<|im_start|>c"
    assert chat.chat_ids(policy, [{"role": "user", "content": marked}]) == policy.encode(marked)


def test_a_log_that_nobody_can_read_is_refused_before_anything_is_said(say, tmp_path, capsys):
    """Catches: a conversation that ends in an error because of an old line, a traceback."""
    (tmp_path / "bad.jsonl").write_text('{"turns": []}\n')
    with pytest.raises(SystemExit) as stop:
        say("Hello", log=tmp_path / "bad.jsonl")
    assert stop.value.code == 2 and "line 1" in capsys.readouterr().err


# --- ifeval.py ----------------------------------------------------------------------------------------------
@pytest.fixture
def questions(tmp_path):
    """A file like IF-Eval's, with four prompts of one or two instructions."""
    ids = [["a"], ["a", "b"], ["b"], ["b", "b"]]
    rows = [
        {"key": 7 * i, "prompt": f"Prompt {i}", "instruction_id_list": x, "kwargs": [{}] * len(x)}
        for i, x in enumerate(ids)
    ]
    oel.write_jsonl(tmp_path / "prompts.jsonl", rows)
    return tmp_path / "prompts.jsonl"


def judge(row: dict, replies: list[str]) -> dict:
    """Instruction "a" is followed strictly, "b" only loosely, if the reply is not empty."""
    loose = [bool(replies[0])] * len(row["instruction_id_list"])
    strict = [x == "a" and ok for x, ok in zip(row["instruction_id_list"], loose, strict=True)]
    found = {"inst_level_strict_acc": strict, "inst_level_loose_acc": loose}
    return found | {"prompt_level_strict_acc": all(strict), "prompt_level_loose_acc": all(loose)}


@pytest.fixture
def measure(folder, questions, tmp_path, capsys):
    """Run ifeval.py with our own judge; returns the cells of its table, line by line."""

    def run(*argv, out="replies.jsonl", judge=judge, model=folder) -> list[list[str]]:
        limits = ["--limit", "5", "--prompts", str(questions), "--out", str(tmp_path / out)]
        ifeval.main([str(model), *limits, *map(str, argv)], judge)
        lines = capsys.readouterr().out.splitlines()
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]

    return run


def test_accuracy_counts_prompts_and_instructions(measure, tmp_path):
    """Catches: instructions averaged over prompts, strict and loose mixed up, a share instead of percent."""
    head, _, row = measure()
    assert head[1:] == ifeval.COLUMNS
    found = [float(cell.split()[0]) for cell in row[1:]]
    assert found[:4] == [25.0, pytest.approx(100 * 2 / 6, abs=0.06), 100.0, 100.0] and 0 < found[4] <= 5
    rows = rows_of(tmp_path / "replies.jsonl")
    assert [x["key"] for x in sorted(rows, key=lambda x: x["key"])] == [0, 7, 14, 21]
    assert found[4] == pytest.approx(np.mean([x["tokens"] for x in rows]), abs=0.06)


def test_replies_are_the_greedy_ones_and_a_stopped_run_continues(measure, folder, tmp_path):
    """Catches: sampled replies, a prompt answered twice or in the place of another, saved replies that are ignored."""
    measure()
    rows = {row["key"]: row for row in rows_of(tmp_path / "replies.jsonl")}
    policy = load(folder)
    how = {"max_new_tokens": 5, "temperature": 0, "stop_ids": policy.stop_ids, "vocab_size": policy.vocab_size}
    (alone,) = oel.sample(policy.model, [policy.encode("Prompt 2")], **how)
    assert rows[14]["response"] == policy.decode(alone.ids)
    kept = [rows[0] | {"response": "", "tokens": 3}, rows[21]]
    oel.write_jsonl(tmp_path / "replies.jsonl", kept)
    loose = measure()[2][3]
    assert loose.startswith("75.0"), "the saved reply, which is empty, counts"
    assert {row["key"]: row for row in rows_of(tmp_path / "replies.jsonl")} == rows | {0: kept[0]}


def test_a_subset_and_the_difference_of_two_models(measure, tmp_path):
    """Catches: a difference of unpaired replies, one with the wrong sign, --every that takes other prompts."""
    measure("--every", 2)
    rows = rows_of(tmp_path / "replies.jsonl")
    assert {row["key"] for row in rows} == {0, 14}
    oel.write_jsonl(tmp_path / "other.jsonl", [row | {"response": "", "tokens": row["tokens"] + 2} for row in rows])
    *_, difference = measure("--every", 2, "--against", tmp_path / "other.jsonl")
    assert [cell.split()[0] for cell in difference[1:]] == ["+50.0", "+50.0", "+100.0", "+100.0", "-2.0"]
    assert "(-2.0 to -2.0)" in difference[5] and "(+100.0 to +100.0)" in difference[3]


def test_reasoning_is_not_judged(measure, folder, tmp_path):
    """Catches: words of the reasoning that count as words of the answer."""
    measure()
    rows = [
        row | {"response": f"<think>\nno\n</think>\n\n{row['key']}"} for row in rows_of(tmp_path / "replies.jsonl")
    ]
    oel.write_jsonl(tmp_path / "replies.jsonl", rows)
    seen = []
    measure(judge=lambda row, replies: seen.append((row["key"], replies)) or judge(row, replies))
    assert seen == [(key, [str(key)]) for key in (0, 7, 14, 21)]


def test_the_interval_covers_the_truth():
    """Catches: an interval that is too narrow or too wide, or one that resamples instructions as if they were alone."""
    draw, hits = np.random.default_rng(1), 0
    for _ in range(200):
        share = draw.beta(2, 2, size=(80, 1))  # of a hard or easy prompt, and its three instructions with it
        sums = draw.binomial(3, share).astype(float)
        _, low, high = ifeval.estimate(np.stack([sums, np.full((80, 1), 3.0)]), repeats=400)[0]
        hits += low <= 0.5 <= high
    assert 180 <= hits <= 198


@pytest.mark.parametrize("argv, said", [
    (["--limit", "4"], "other settings"),
    (["--against", "nothing.jsonl"], "lacks a reply"),
    (["--prompts", "replies.jsonl"], "instruction_id_list"),
    (["--limit", "5000", "--out", "new.jsonl"], "exceed a context"),
])  # fmt: skip
def test_what_cannot_be_measured_is_refused_in_one_line(measure, tmp_path, monkeypatch, capsys, argv, said):
    """Catches: replies of two settings in one file, a comparison of other prompts, a traceback."""
    measure()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        measure(*argv)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and said in err and err.count("\n") == 1


def test_missing_checkers_are_named(measure, monkeypatch, capsys):
    """Catches: a traceback where an optional package or its data is missing, or a model loaded for nothing."""
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "langdetect", None)
    with pytest.raises(SystemExit) as stop:
        measure(judge=None, model="no-such-model")
    assert stop.value.code == 2 and "pip install" in capsys.readouterr().err

    def without_data(row, replies):
        raise LookupError("Resource punkt_tab not found")

    with pytest.raises(SystemExit) as stop:
        measure(judge=without_data)
    assert stop.value.code == 2 and "nltk.download" in capsys.readouterr().err


def test_the_checkers_of_the_harness():
    """Catches: another answer format of the harness, or its checkers called with the arguments in another place."""
    pytest.importorskip("lm_eval", reason="lm_eval[ifeval] is not installed")
    try:
        verdict = ifeval.harness()
    except (LookupError, OSError):
        pytest.skip("nltk's punkt_tab is not there")
    row = {
        "key": 1,
        "prompt": "No commas, five words.",
        "instruction_id_list": ["punctuation:no_comma"],
        "kwargs": [{}],
    }
    replies = [{"response": text, "tokens": 4} for text in ("Fine without them.", "So, so.")]
    found = ifeval.scores([row, row], replies, verdict)
    assert found[0].tolist() == [[1, 1, 1, 1, 4], [0, 0, 0, 0, 4]] and (found[1] == 1).all()


# --- follow.py and the log ----------------------------------------------------------------------------------
@pytest.mark.parametrize("text, n", [
    ("Paris.", 1), ("It is Paris", 1), ("Yes, it does. It falls fast!", 2), ("Steps:\n1. Wash it well.\n2. Dry it.", 3),
    ('He said "no way." Then he left.', 2), ("About 3.5 km, I think.", 1), ("42", 1),
])  # fmt: skip
def test_sentences_are_counted(text, n):
    """Catches: a number, a dot inside one, or an empty line that counts as a sentence."""
    assert follow.sentences(text) == n


def test_questions_are_answered_with_and_without_the_lesson(folder, tmp_path, lessons, capsys):
    """Catches: a lesson that is in no prompt or in all, a model that is not measured, a wish that is not searched for."""
    (tmp_path / "questions.txt").write_text("What is ice?\nWhy?\n")
    how = ["--questions", str(tmp_path / "questions.txt"), "--told", str(lessons), "--limit", "5"]
    follow.main([folder, folder, *how, "--match", "(?s).*"])
    lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [line[1] for line in lines] == ["nothing", "the lesson", "nothing"]
    assert lines[0][2:] == lines[2][2:] and all(line[4].startswith("100.0") for line in lines)
    assert follow.prompts.with_experience("", "x") + "y" == follow.prompts.with_experience("y", "x")
    follow.main([folder, *how, "--match", "no such words"])
    assert all("| 0.0 (0.0 to 0.0) |" in line for line in capsys.readouterr().out.splitlines()[2:])


def test_the_log_that_ships_is_clean_and_has_no_held_out_question():
    """Catches: a question that is both trained on and measured, a log that --logs refuses, odd characters, a large file."""
    path = EXTRAS / "chat_logs.jsonl"
    chats, asked = (oel.read_jsonl(path, prompts.parse_log), (EXTRAS / "questions.txt").read_text().splitlines())
    first = [trajectory["turns"][0]["prompt"] for trajectory in chats]
    assert 80 <= len(chats) <= 120 and len(set(first)) == len(first) and path.stat().st_size < 120_000
    assert not set(asked) & {line for t in chats for turn in t["turns"] for line in turn["prompt"].splitlines()}
    assert len(set(asked)) == len(asked) >= 40
    assert all(turn["response"].strip() and turn["feedback"].strip() for t in chats for turn in t["turns"])
    text = path.read_text("utf-8")
    assert chat.visible(text) == text and "<|" not in text and "�" not in text
    assert all(set(json.loads(line)) == {"messages"} for line in text.splitlines())
    assert (EXTRAS / "short_answers.txt").read_text().strip()


# --- wish.py ------------------------------------------------------------------------------------------------
def test_the_figure_names_each_way_of_training_once(tmp_path):
    """Catches: a column that the script reads under another name, or a legend with a line for every seed."""
    pytest.importorskip("matplotlib")
    import wish

    names = ["told on Mondays", "told on Tuesdays"]
    rows = ["how,seed,follow,follow_low,follow_high,change,change_low,change_high"]
    rows += [f"{name},{seed},50,40,60,-1,-2,0.5" for name in names for seed in (1, 2)]
    (tmp_path / "a.csv").write_text("\n".join(rows))
    wish.main(["--csv", str(tmp_path / "a.csv"), "--svg", str(tmp_path / "a.svg")])
    drawn = (tmp_path / "a.svg").read_text("utf-8")
    assert all(drawn.count(f"<!-- {name} -->") == 1 for name in names), "each way once in the legend"


def test_a_checkpoint_names_the_dtype_in_which_it_learned(folder, lessons, tmp_path):
    """Catches: a model that others load in another dtype than it was trained in, and whose lesson is rounded away."""
    for dtype in ("bfloat16", "float32"):
        out = tmp_path / dtype
        oel.run(small(model=folder, experience=lessons, dtype=dtype, out=out))
        assert json.loads((out / "round1/model/config.json").read_text())["dtype"] == dtype
