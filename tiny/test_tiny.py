"""Tests of the embedded policy, and of what teach.py says it is taught."""

import collections
import itertools
import random
import re
import sys
from pathlib import Path

import pytest
import torch
import transformers

TINY = Path(__file__).resolve().parent
sys.path[:0] = [str(TINY), str(TINY.parent)]
import teach

import envs
import oel
import prompts
from extras.testing import consolidated, load, small


# --- what it is taught --------------------------------------------------------------------------------------
def uniform(counts: dict[str, int]) -> bool:
    mean = sum(counts.values()) / len(counts)
    return max(abs(n - mean) for n in counts.values()) < 4.5 * mean**0.5


def test_no_letter_is_anything_more_often_than_another_in_training():
    """Catches: a policy that knows what H, G, X or O are before OEL begins."""
    rng, counts = random.Random(0), {}
    for _ in range(12000):
        size, roles, symbols = teach.deal(rng)
        assert roles.keys() == {*symbols}
        for letter, role in roles.items():
            counts.setdefault((size == 6, role), dict.fromkeys(envs.LETTERS, 0))[letter] += 1
    assert len(counts) == 8  # hole, goal and harmless everywhere, box and target in rooms
    assert all(map(uniform, counts.values())), counts


def test_no_letter_is_said_to_be_anything_more_often_than_another_in_training():
    """Catches: worlds that are even, but lessons or guesses that are not: an example may say what H is."""
    counts = {role: dict.fromkeys(envs.LETTERS, 0) for role in teach.SENTENCES}
    for example in itertools.islice(teach.examples(random.Random(1)), 2500):
        claims = set()
        for line in (example.message + "\n" + example.reply).splitlines():
            if claim := teach.lesson_role(line.removeprefix(prompts.MARKER).strip()):
                claims.add(claim)
            if found := re.search(r"([A-Z]) is (?:a |the )?(hole|goal|harmless|box|target)$", line):
                claims.add((found[1], found[2]))
        for letter, role in claims:
            counts[role][letter] += 1
    assert min(min(of_role.values()) for of_role in counts.values()) > 20
    assert all(map(uniform, counts.values())), counts


@pytest.mark.parametrize(
    "name, maker", [("frozenlake", envs.FrozenLake), ("biglake", envs.BigLake), ("sokoban", envs.Sokoban)]
)
def test_the_player_that_is_imitated_wins_if_it_knows_the_letters(name, maker):
    """Catches: a planner with a bug, which teaches the bug and limits what any lesson can bring."""
    for level in envs.level_seeds("held_out", 25):
        game, rng = maker(), random.Random(level)
        game.reset(level)
        roles = {letter: thing for thing, _ in game.things for letter in getattr(game, thing)}
        while not game.done:
            game.step(teach.play_reply(rng, game.board(), roles, thinking=level % 2 == 0))
        assert game.won, (name, level)


def test_a_room_speaks_as_the_games_do():
    """Catches: worlds with other sentences than the deployed game's, so that learning does not transfer."""
    for level in envs.level_seeds("extraction", 20):
        game = envs.Sokoban()
        game.reset(level)
        room = teach.Room.from_board(game.board(), roles={"X": "box", "O": "target"})
        assert room.observation() == game.observation()
        rng, done = random.Random(level), False
        while not done:
            move = f"[{rng.choice(list(envs.MOVES))}]"
            text, done = game.step(move)
            assert room.step(move) == (text, done) and room.won == game.won
    for letter, role in (("H", "hole"), ("G", "goal")):
        lake = envs.FrozenLake.from_board(["P" + letter, "  "], size=2, num_holes=0)
        room = teach.Room.from_board(["####", f"#P{letter}#", "####"], roles={letter: role})
        (on_ice, _), (inside, _) = lake.step("[right]"), room.step("[right]")
        assert on_ice.splitlines()[-1] == inside.splitlines()[-1] and lake.won == room.won


def test_what_the_policy_is_taught_to_write_is_true():
    """Catches: reasoning that misreads the board, and lessons that the log does not support."""
    rng, kinds = random.Random(2), set()
    for _ in range(300):
        world = teach.lay(rng, *teach.deal(rng))
        turns = teach.episode(rng, world)
        board = turns[-1]["board"]
        for thinking in (True, False):
            reply = teach.extraction_reply(rng, world.roles, turns, thinking)
            for lesson in prompts.parse_lessons(reply).splitlines():
                claim = teach.lesson_role(lesson.removeprefix(prompts.MARKER).strip())
                assert claim is None or world.roles[claim[0]] == claim[1]
                kinds.add(claim and claim[1])
            reply = teach.play_reply(rng, board, world.roles, thinking)
            for r, c, letter, role in re.findall(r"\((\d),(\d)\) ([A-Z]) is (?:a |the )?(\w+)\n", reply):
                assert board[int(r)][int(c)] == letter and world.roles[letter] == role
            assert all(f" {letter} is" in reply for letter in teach.on_board(board))
            assert envs.parse_action(reply, strict=thinking)
    assert kinds == {None, *teach.SENTENCES}


NO_CLAIMS = ["H is a hole. H is the goal.", "H is a hole. G is a hole.", "Go up.", "H is a hole. Go up.", ""]


def test_lessons_are_recognised():
    """The truth of the policy's own lessons is measured with this."""
    rng = random.Random(3)
    for role, letter in itertools.product(teach.SENTENCES, "AHX"):
        for _ in range(20):
            assert teach.lesson_role(teach.say(rng, letter, role)) == (letter, role)
    for game in (envs.FrozenLake(), envs.Sokoban()):
        for (thing, letter), rule in zip(game.things, game.rules(), strict=False):
            assert teach.lesson_role(rule) == (letter, thing)
    assert all(teach.lesson_role(text) is None for text in NO_CLAIMS)
    held_out = {s for sentences in teach.HELD_OUT_SENTENCES.values() for s in sentences}
    assert not held_out & {s for sentences in teach.SENTENCES.values() for s in sentences}


def test_the_plans_that_are_taught_can_be_played():
    """Catches: boxes pushed through walls, or out of corners that no one can stand behind."""
    rng = random.Random(4)
    for _ in range(250):
        world = teach.lay(rng, *teach.deal(rng))
        game, moves = world.game(), teach.plan(rng, list(world.rows), world.roles).moves
        game.max_turns = len(moves)
        for move in moves:
            game.step(f"[{move}]")
        assert game.won and not game.invalid_moves
    board = ["######", "#_X__#", "#____#", "#_O__#", "#P___#", "######"]
    stuck = teach.plan(rng, board, {"X": "box", "O": "target"})
    assert stuck.text.startswith("Box: 0 (3,2) 1 (2,2)(3,3) 2 (2,3) no way\n") and not stuck.moves


def test_the_deployed_lake_has_letters_for_holes_and_harmless_things():
    """Catches: a letter that is never drawn, a harmless one that kills, or a variant that uses the deployed letters."""
    holes, harmless, seen = "HKMQTVBCDJ", "EFLN", collections.Counter()
    for level in range(600):
        game = envs.BigLake()
        game.reset(level)
        seen.update("".join(game.board()))
    assert seen["G"] == seen["P"] == 600 and seen.keys() == {*holes, *harmless, *"GP "}
    assert sum(seen[x] for x in holes) == 2400 and uniform({x: seen[x] for x in holes})
    assert sum(seen[x] for x in harmless) == 1200 and uniform({x: seen[x] for x in harmless})
    for letter, done in [*dict.fromkeys(holes, True).items(), *dict.fromkeys(harmless, False).items()]:
        game = envs.BigLake.from_board(["P" + letter, "  "])
        assert game.step("[right]")[1] == done and not game.won
    other, small = envs.BigLake.renamed(3), envs.BigLake.unseen()
    letters = other.hole + other.goal + other.harmless
    assert len({*letters}) == 7 and not {*letters} & {*holes, *harmless, *"GP"}
    assert [rule[0] for rule in other.rules()] == [*letters]
    assert small.reset(1).count("|") == 12 and sum(x in "".join(small.board()) for x in holes + harmless) >= 2


# --- the policy ---------------------------------------------------------------------------------------------
def test_the_embedded_policy_is_small():
    model = transformers.AutoModelForCausalLM.from_pretrained(TINY)
    assert sum(p.numel() for p in model.parameters()) <= 5_000_000
    assert sum(file.stat().st_size for file in TINY.glob("*") if file.is_file()) <= 12_000_000


@pytest.mark.parametrize("thinking", ["--thinking", "--no-thinking"])
@pytest.mark.parametrize("name", ["frozenlake", "biglake", "sokoban"])
def test_the_embedded_policy_plays_by_what_it_reads(name, thinking):
    """Catches: weights, tokenizer, template and prompts of which one was changed and the others were not."""
    cfg = oel.parse_args(["--env", name, thinking])
    policy = load(cfg.model, cfg.thinking)
    phase = oel.Phase(envs.level_seeds("held_out", 16), 1, nucleus=True)
    rules = [prompts.as_items(oel.make_game(cfg).rules())]
    without, with_rules = (
        oel.pass_rate(oel.deploy(policy, cfg, phase, experiences)) for experiences in (None, rules)
    )
    many = (name, thinking) == ("biglake", "--no-thinking")  # fifteen rules, and no room to look each up
    assert without <= 0.5 and with_rules >= (0.4 if many else 0.8)


def test_a_gradient_of_noise_hardly_moves_the_embedded_policy(monkeypatch):
    """Catches: Adam's first step, a full one for a gradient of any size. Noise once ruined a good policy."""

    def noise(policy, teacher, samples, *_, **__):
        for p in policy.master:
            p.grad = torch.full_like(p, 1e-7)
        return 0.0

    monkeypatch.setattr(oel, "distill", noise)
    moved = []
    for eps in (oel.PRESETS["tiny"]["adam_eps"], 1e-8):
        policy = load(oel.TINY)
        before = [p.detach().clone() for p in policy.master]
        consolidated(policy, small(steps=1, lr=1e-3, weight_decay=0.0, adam_eps=eps), None)
        moved.append(max((p - b).abs().max().item() for p, b in zip(policy.master, before, strict=True)))
    assert moved[0] < 2e-6 and moved[1] > 5e-4
