"""FrozenLake and Sokoban as text, with the rules left out of what the player reads. A game is any class with

    reset(seed) -> str                 a fresh level (draw from Random(seed); never use seed % 3, see
                                       level_seeds); returns the first observation
    step(reply) -> (str, bool)         play the action found in a free-text reply; what the game says, and
                                       whether the episode is over (the last text tells how it ended)
    won -> bool                        whether the episode was won

and, if it likes, `task` (what the player is told to do), `invalid_moves` (how many were refused), and what the
evaluation probes: class methods `unseen()`, boards of other sizes, and `renamed(seed)`, the same game with other
letters, whose `rules()` say what they mean. Dynamics are checked against TextArena's games of these names.
"""

import functools
import random
import re
import runpy
import sys
import zlib
from pathlib import Path

MOVES = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}
WASD = {"w": "up", "s": "down", "a": "left", "d": "right"}
ACTION = re.compile(r"\[\s*(up|down|left|right|w|a|s|d)\s*\]", re.IGNORECASE)
SPLITS = ("held_out", "extraction", "deployment")
LETTERS = "ABCDEFGHIJKLMNOQRSTUVWXYZ"  # every capital but P, the player


def level_seeds(split: str, n: int, start: int = 0) -> list[int]:
    """The seeds of levels `start` to `start + n - 1` of a split. Splits are residues mod 3: never shared."""
    return [len(SPLITS) * (start + i) + SPLITS.index(split) for i in range(n)]


def parse_action(reply: str, strict: bool = False) -> str | None:
    """The last bracketed action in a reply, as up, down, left or right; None if there is none.
    Strict mode looks only after the closing think tag, so a thought that was cut off makes no move."""
    if strict:
        reply = reply.rpartition("</think>")[2] if "</think>" in reply else ""
    found = ACTION.findall(reply)
    return WASD.get(found[-1].lower(), found[-1].lower()) if found else None


class InvalidMove(Exception):
    """A move that the game refuses; the message says why."""


class GridGame:
    """What all games share: turns, invalid moves and the words of the feedback.
    A subclass has `new_level(pick, seed)`, `load(rows)`, `board()`, `render()`, and `move(direction)`, which
    returns (what happened, how the episode ended or "") and raises InvalidMove."""

    task = (
        "You are P on a grid and make one move a turn. Pick the action that reaches the goal in the fewest "
        "steps. The last board is the current one.\nActions: [up] [down] [left] [right], or [w] [a] [s] [d]. "
        "End your reply with one action in square brackets."
    )

    def __init__(self, max_turns: int, strict: bool, *letters: str):
        if not all(letters) or sorted("".join(letters)) != sorted({*"".join(letters)} & {*LETTERS}):
            raise ValueError(f"every thing on a board has capitals of its own, other than P; not {letters}")
        self.max_turns, self.strict = max_turns, strict
        self.start_episode()

    def start_episode(self) -> None:
        self.turn = self.invalid_moves = self.invalid_in_a_row = 0
        self.won = self.done = False

    @classmethod
    def from_board(cls, rows: list[str], **options):
        """A game on a given board, one symbol a cell, `P` the player. ValueError if the board is no board."""
        game = cls(**options)
        even = rows and all(isinstance(row, str) and row and len(row) == len(rows[0]) for row in rows)
        if not even or "".join(rows).count("P") != 1:
            raise ValueError(f"a board is a list of equally long strings with exactly one player P, not {rows!r}")
        game.load(rows)
        return game

    @classmethod
    def renamed(cls, seed: int, strict: bool = False):
        """The same game with letters that it does not use itself, at most three a thing, drawn by the seed."""
        rng, used = random.Random(seed), "".join(own for _, own in cls.things)
        letters = sorted([x for x in LETTERS if x not in used], key=lambda _: rng.random())
        return cls(**{thing: "".join(letters.pop() for _ in own[:3]) for thing, own in cls.things}, strict=strict)

    def reset(self, seed: int) -> str:
        """Start the level of this seed and return the first observation."""
        draw = random.Random(seed).random  # the one method whose numbers every Python keeps; one item needs none
        self.load(self.new_level(lambda xs: xs[int(draw() * len(xs))] if len(xs) > 1 else xs[0], seed))
        self.start_episode()
        return self.observation()

    def observation(self) -> str:
        return f"Board:\n{self.render()}"

    def step(self, reply: str) -> tuple[str, bool]:
        """Play the action in a reply. Returns what the game says and whether the episode is over."""
        if self.done:
            raise RuntimeError("this episode is over: call reset(seed) before the next step")
        self.turn += 1
        direction = parse_action(reply, self.strict)
        try:
            if direction is None:
                raise InvalidMove("none of the actions was in square brackets")
            text, ended = self.move(direction)
            self.invalid_in_a_row = 0
        except InvalidMove as reason:
            self.invalid_moves += 1
            self.invalid_in_a_row += 1
            text, ended = f"That move is not valid: {reason}.", ""
            if self.invalid_in_a_row == 2:
                ended = "That was the second invalid move in a row. The episode failed."
        if not ended and self.turn == self.max_turns:
            ended = "The turn limit was reached. The episode failed."
        self.done = bool(ended)
        return "\n".join([text, self.observation(), ended][: 2 + self.done]), self.done


class FrozenLake(GridGame):
    """Walk from the top left to the goal at the bottom right; stepping on a hole loses. Of several letters for a
    thing, each one on a board is drawn at random. Letters without a meaning are harmless."""

    things = (("hole", "H"), ("goal", "G"))

    def __init__(self, size=3, num_holes=2, max_turns=5, hole="H", goal="G", harmless="", strict=False):
        super().__init__(max_turns, strict, hole, goal, *harmless)
        if size < 2 + bool(harmless) or not 0 <= num_holes <= (size - 1) ** 2:  # an L of free cells always fits
            raise ValueError(f"no {size}x{size} board with {num_holes} holes and a sure path to the goal")
        self.size, self.num_holes, self.hole, self.goal, self.harmless = size, num_holes, hole, goal, harmless

    @classmethod
    def unseen(cls, strict=False):
        """4x4 with three holes: 334 boards, all of shortest length 6, never trained on."""
        return cls(size=4, num_holes=3, max_turns=8, strict=strict)

    def rules(self) -> list[str]:
        """The rules in words. Only the forgetting probe and the reports ever show them."""
        holes = [f"{x} is a hole. Stepping on {x} loses." for x in self.hole]
        goals = [f"{x} is the goal. Stepping on {x} wins." for x in self.goal]
        return holes + goals + [f"{x} is harmless. Stepping on {x} does nothing." for x in self.harmless]

    def new_level(self, pick, seed: int) -> list[str]:
        n = self.size
        while True:
            cells = [" "] * (n * n)
            cells[0], cells[-1] = "P", pick(self.goal)
            for letters in [self.hole] * self.num_holes + [self.harmless] * (2 if self.harmless else 0):
                cells[pick([i for i, cell in enumerate(cells) if cell == " "])] = pick(letters)
            rows = ["".join(cells[i : i + n]) for i in range(0, n * n, n)]
            if self.solvable(rows):
                return rows

    def solvable(self, rows: list[str]) -> bool:
        """Whether the bottom-right cell can be reached from the top-left one without a hole."""
        n, seen, frontier = range(len(rows)), set(), {(0, 0)}
        while frontier:
            seen |= frontier
            steps = {(r + dr, c + dc) for r, c in frontier for dr, dc in MOVES.values()} - seen
            frontier = {(r, c) for r, c in steps if r in n and c in n and rows[r][c] not in self.hole}
        return (n[-1], n[-1]) in seen

    def load(self, rows: list[str]) -> None:
        self.player = next((r, row.index("P")) for r, row in enumerate(rows) if "P" in row)
        self.cells = [list(row.replace("P", " ")) for row in rows]

    def symbols(self) -> list[list[str]]:
        cells = [list(row) for row in self.cells]
        r, c = self.player
        cells[r][c] = "P/" + cells[r][c] if cells[r][c] in self.goal else "P"
        return cells

    def board(self) -> list[str]:
        """The rows, one symbol a cell; a player on the goal shows as `P/G`."""
        return ["".join(row) for row in self.symbols()]

    def render(self) -> str:
        rule = "+-----" * len(self.cells[0]) + "+"
        rows = ["|" + "|".join(f"{cell:^5}" for cell in row) + "|" for row in self.symbols()]
        return "\n".join([rule] + [line for row in rows for line in (row, rule)])

    def move(self, direction: str) -> tuple[str, str]:
        r, c = self.player[0] + MOVES[direction][0], self.player[1] + MOVES[direction][1]
        if r not in range(len(self.cells)) or c not in range(len(self.cells[0])):
            raise InvalidMove(f"{direction} leads off the board")
        self.player, ended = (r, c), ""
        if self.cells[r][c] in self.hole:
            ended = "You fell into a hole. The episode failed."
        elif self.cells[r][c] in self.goal:
            self.won, ended = True, "You reached the goal. The episode succeeded."
        return f"You moved {direction} to ({r},{c}).", ended


class BigLake(FrozenLake):
    """A lake with ten letters for holes and four for harmless things. A fall ends the episode: one letter learned."""

    things = (("hole", "HKMQTVBCDJ"), ("goal", "G"), ("harmless", "EFLN"))

    def __init__(self, size=4, num_holes=4, max_turns=8, **options):
        super().__init__(size, num_holes, max_turns, **{**dict(self.things), **options})

    @classmethod
    def unseen(cls, strict=False):
        """3x3 with two holes and two harmless things, never trained on."""
        return cls(size=3, num_holes=2, max_turns=5, strict=strict)


class Sokoban(GridGame):
    """Push every box onto a target. Boxes are pushed by walking into them, one at a time, never pulled."""

    things = (("box", "X"), ("target", "O"))

    def __init__(self, size=6, max_turns=5, box="X", target="O", strict=False):
        super().__init__(max_turns, strict, box, target)
        if size < 5 or len(box + target) != 2:
            raise ValueError(f"a room is at least 5x5, with one letter each: {size}x{size}, {box!r}, {target!r}")
        self.size, self.box, self.target = size, box, target

    def rules(self) -> list[str]:
        return [
            f"{self.box} is a box. Stepping on {self.box} pushes it.",
            f"{self.target} is a target. A box on {self.target} wins.",
            "# is a wall. Nothing moves onto #.",
        ]

    def new_level(self, pick, seed: int) -> list[str]:
        """A room with one box, up to three inner walls, and a shortest solution of 1 to 5 moves, each as often.
        A room belongs to one split, by its checksum: no held-out room is ever played to learn from."""
        n, wanted = self.size, 1 + seed // len(SPLITS) % 5
        inside = [(r, c) for r in range(1, n - 1) for c in range(1, n - 1)]
        while True:
            cells = [["_" if (r, c) in inside else "#" for c in range(n)] for r in range(n)]
            for symbol in "#" * pick([0, 1, 2, 3]) + "XOP":
                r, c = pick([(r, c) for r, c in inside if cells[r][c] == "_"])
                cells[r][c] = symbol
            rows = ["".join(row) for row in cells]
            if zlib.crc32("".join(rows).encode()) % len(SPLITS) == seed % len(SPLITS):
                self.load([row.translate(str.maketrans("XO", self.box + self.target)) for row in rows])
                if self.solution_length(limit=5) == wanted:
                    return self.board()

    def load(self, rows: list[str]) -> None:
        cells = {(r, c): symbol for r, row in enumerate(rows) for c, symbol in enumerate(row)}
        walls, targets, boxes, players = (
            {cell for cell, symbol in cells.items() if symbol in symbols}
            for symbols in ("#", self.target + "√", self.box + "√", "P")
        )
        self.shape = (len(rows), len(rows[0]))
        self.walls, self.targets, self.boxes, (self.player,) = walls, targets, frozenset(boxes), players

    def board(self) -> list[str]:
        """The rows, one symbol a cell; `√` is a box on a target, and the player hides what is under it."""
        cells = dict.fromkeys(self.targets, self.target) | dict.fromkeys(self.walls, "#") | {self.player: "P"}
        cells |= {box: "√" if box in self.targets else self.box for box in self.boxes}
        return ["".join(cells.get((r, c), "_") for c in range(self.shape[1])) for r in range(self.shape[0])]

    def render(self) -> str:
        return "\n".join(" ".join(row) for row in self.board())

    def after(self, player, boxes, direction: str):
        """The (player, boxes) after a move, or None where the way is blocked."""
        (r, c), (dr, dc) = player, MOVES[direction]
        ahead, beyond = (r + dr, c + dc), (r + 2 * dr, c + 2 * dc)

        def free(cell):
            inside = cell[0] in range(self.shape[0]) and cell[1] in range(self.shape[1])
            return inside and cell not in self.walls | boxes

        if ahead in boxes and free(beyond):
            return ahead, boxes - {ahead} | {beyond}
        return (ahead, boxes) if free(ahead) else None

    def solution_length(self, limit: int) -> int | None:
        """Fewest moves that put every box on a target, by breadth-first search; None beyond the limit."""
        frontier, seen = {(self.player, self.boxes)}, set()
        for length in range(limit + 1):
            if any(boxes <= self.targets for _, boxes in frontier):
                return length
            seen |= frontier
            frontier = {after for state in frontier for d in MOVES if (after := self.after(*state, d))} - seen
        return None

    def move(self, direction: str) -> tuple[str, str]:
        if (moved := self.after(self.player, self.boxes, direction)) is None:
            raise InvalidMove(f"the way {direction} is blocked")
        pushed = sorted(moved[1] - self.boxes)
        self.player, self.boxes = moved
        push = f" and pushed a box to ({pushed[0][0]},{pushed[0][1]})" if pushed else ""
        self.won = self.boxes <= self.targets
        ended = "Every box is on a target. The episode succeeded." if self.won else ""
        return f"You moved {direction} to ({self.player[0]},{self.player[1]}){push}.", ended


GAMES = {"frozenlake": FrozenLake, "biglake": BigLake, "sokoban": Sokoban}


@functools.cache  # the file of a user's own game runs once
def games_in(file: str) -> dict:
    """GAMES, or what a named Python file defines; that file may import its neighbours."""
    if file:
        sys.path.append(str(Path(file).resolve().parent))
    return runpy.run_path(file) if file else GAMES
