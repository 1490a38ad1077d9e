"""What the embedded policy is taught: worlds without end, and the right reply in each.

A world is a board whose letters mean something else every time. A lake is FrozenLake's open board of ice; a
room is Sokoban's, with walls. From worlds come the two kinds of examples:

    play       read the board, believe whatever the lessons say a letter is, guess the rest, plan, move
    extract    read the log of an episode, say what its last letters did, write that down as lessons

No letter has a preferred meaning here: `deal` gives roles to letters drawn uniformly from all capitals but P.
So H and G are holes, goals and harmless as often as Q and V are, X and O are boxes and targets no oftener than
those, and what they are in the deployed games is left for OEL to find. Only the drawing is always the same: P is
the player, # a wall, _ and blank are free.

Every token of a reply's reasoning is one local step: copy the next cell, look up one letter, list the cells
next to the last ones. A small transformer learns such steps soon; what it would have to work out silently it
learns late or never.
"""

import collections
import dataclasses
import random
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from envs import LETTERS, MOVES, FrozenLake, GridGame, Sokoban
from prompts import as_items, extraction_prompt, play_prompt, transcript, with_experience

Cell = tuple[int, int]
LAKE_ROLES = {"hole": 0.4, "goal": 0.4, "harmless": 0.2}  # what a letter may be, and how often a guess says so
ROOM_ROLES = {"hole": 0.25, "goal": 0.2, "harmless": 0.15, "box": 0.2, "target": 0.2}


# --- worlds: a board, and what its letters mean this once -------------------------------------------------
def letters_of(roles: dict[str, str], role: str) -> str:
    return "".join(letter for letter in roles if roles[letter] == role)


class Room(Sokoban):
    """Sokoban's room, where letters may also be holes and goals, as on the lake, and harmless."""

    def __init__(self, roles: dict[str, str], max_turns: int = 5):
        GridGame.__init__(self, max_turns, False, *roles)
        self.roles = roles
        self.box, self.target = letters_of(roles, "box"), letters_of(roles, "target")

    def load(self, rows: list[str]) -> None:
        super().load(rows)
        symbols = {(r, c): symbol for r, row in enumerate(rows) for c, symbol in enumerate(row)}
        special = self.box + self.target + "#_P"
        self.others = {cell: symbol for cell, symbol in symbols.items() if symbol not in special}

    def board(self) -> list[str]:
        rows = [list(row) for row in super().board()]
        for (r, c), letter in self.others.items():
            rows[r][c] = letter if rows[r][c] == "_" else rows[r][c]
        return ["".join(row) for row in rows]

    def move(self, direction: str) -> tuple[str, str]:
        text, ended = super().move(direction)
        self.won, ended = (self.won, ended) if self.boxes else (False, "")
        role = self.roles.get(self.others.get(self.player))
        if role == "hole":
            ended = "You fell into a hole. The episode failed."
        elif role == "goal":
            self.won, ended = True, "You reached the goal. The episode succeeded."
        return text, ended


@dataclasses.dataclass(frozen=True)
class World:
    rows: tuple[str, ...]
    roles: dict[str, str]  # letter -> role

    def game(self) -> GridGame:
        if "#" in self.rows[0]:
            return Room.from_board(list(self.rows), roles=self.roles)
        size = len(self.rows)
        letters = {role: letters_of(self.roles, role) for role in ("hole", "goal")}
        options = {"size": size, "max_turns": 5 if size == 3 else 8}  # those of the deployed games
        return FrozenLake.from_board(list(self.rows), **letters, **options)


def deal(rng: random.Random) -> tuple[int, dict[str, str], list[str]]:
    """The size of a board, the roles of its letters, and the letters to put on it, as often as they occur.

    Letters are drawn uniformly and know nothing of the role that they are given.
    """
    size = rng.choices([3, 4, 6], [0.36, 0.14, 0.5])[0]
    if size == 6:  # a room: things to push, or things to walk to
        roles = ["box", "target"] if rng.random() < 0.7 else ["goal"]
        roles += rng.choices([[], ["hole"], ["harmless"], ["hole", "harmless"]], [0.6, 0.2, 0.1, 0.1])[0]
        letters = rng.sample(LETTERS, len(roles))
        return size, dict(zip(letters, roles, strict=True)), letters
    counts = {
        "goal": rng.choices([1, 2], [0.75, 0.25])[0],
        "hole": rng.randint(1, size),
        "harmless": rng.choices([0, 1, 2], [0.7, 0.2, 0.1])[0],
    }
    letters, roles, symbols = iter(rng.sample(LETTERS, 8)), {}, []
    for role, count in counts.items():
        for i in range(count):
            if i == 0 or rng.random() < 0.25:  # now and then a role has two letters
                roles[letter := next(letters)] = role
            symbols.append(letter)
    return size, roles, symbols


def lay(rng: random.Random, size: int, roles: dict[str, str], symbols: list[str]) -> World:
    """A board with these letters on it which a player who knows the roles can win."""
    everywhere = [(r, c) for r in range(size) for c in range(size)]
    inside = [(r, c) for r in range(1, size - 1) for c in range(1, size - 1)]
    while True:
        if size == 6:
            board = dict.fromkeys(everywhere, "#") | dict.fromkeys(inside, "_")
            things = ["P", *symbols, *"#" * rng.randint(0, 3)]
            places = rng.sample(inside, len(things))
        else:
            board = dict.fromkeys(everywhere, " ")
            things = ["P", *symbols]
            places = rng.sample(everywhere, len(things))
            if rng.random() < 0.35:  # as in the deployed game: from corner to corner
                places = [(0, 0), (size - 1, size - 1), *rng.sample(everywhere[1:-1], len(symbols) - 1)]
        board |= zip(places, things, strict=True)
        rows = ["".join(board[r, c] for c in range(size)) for r in range(size)]
        moves = plan(rng, rows, roles).moves
        if moves and (size < 6 or len(moves) <= 6 and rng.random() < len(moves) / 3):
            return World(tuple(rows), roles)


# --- planning: what the reasoning writes out --------------------------------------------------------------
def spell(cell: Cell) -> str:
    return f"({cell[0]},{cell[1]})"


def step_from(cell: Cell, move: str) -> Cell:
    return cell[0] + MOVES[move][0], cell[1] + MOVES[move][1]


def waves(start: list[Cell], free: set[Cell], end: Cell, pushing: bool = False) -> list[list[Cell]]:
    """Cells by distance from the nearest start, wave by wave, up to the wave of the end, over free cells.

    A box is only pushed from one cell to the next if the cell behind it is free as well, to stand on. The
    last wave holds the end if there is a way, and is empty if there is none.
    """
    found = [sorted(start)]
    seen = set(start)
    while found[-1] and end not in seen:
        near = set()
        for cell in found[-1]:
            for move in MOVES:
                before = step_from(cell, move)
                if before in free - seen and (not pushing or step_from(before, move) in free):
                    near.add(before)
        found.append(sorted(near))
        seen |= near
    return found


def written(name: str, found: list[list[Cell]]) -> str:
    text = name + "".join(f" {i} {''.join(map(spell, wave))}" for i, wave in enumerate(found) if wave)
    return text + ("\n" if found[-1] else " no way\n")


@dataclasses.dataclass
class Plan:
    text: str  # the reasoning, without the reading of the board
    move: str  # the move to make
    moves: list[str]  # all the moves to a win, as far as known; empty if there is none


def plan(rng: random.Random, board: list[str], roles: dict[str, str]) -> Plan:
    """Plan by what the letters are taken for: walk to a goal; if there is none, push the first box to a target.

    A target that is nowhere to be seen is under the player.
    """
    symbols = {(r, c): symbol for r, row in enumerate(board) for c, symbol in enumerate(row)}
    player = next(cell for cell, symbol in symbols.items() if symbol == "P")
    role = {cell: roles.get(symbol) for cell, symbol in symbols.items() if symbol != "#"}
    goals, boxes, targets = ([c for c in role if role[c] == what] for what in ("goal", "box", "target"))
    free = {cell for cell in role if role[cell] not in ("hole", "box")}
    if goals or not boxes:
        found = waves(goals, free, player)
        return walk(rng, player, free, written("Far:", found), found)
    box, targets = boxes[0], targets or [player]
    found = waves(targets, free | {box}, box, pushing=True)
    text = written("Box:", found)
    moves = solve(rng, free | {box}, player, box, targets) if found[-1] else []
    if not moves:
        return walk(rng, player, free, text + ("Push: no way\n" if found[-1] else ""), [[]])
    stand = player
    for move in moves:  # up to the first push
        if step_from(stand, move) == box:
            break
        stand = step_from(stand, move)
    text += f"Push: {spell(box)} {move} {spell(step_from(box, move))} from {spell(stand)}\n"
    text += written("Far:", waves([stand], free, player))
    text += f"Next: {spell(step_from(player, moves[0]))} {moves[0]}\n"
    return Plan(text, moves[0], moves)


def walk(rng: random.Random, player: Cell, free: set[Cell], text: str, found: list[list[Cell]]) -> Plan:
    """Go down the waves; where they do not lead to the player, step onto a free cell if there is one."""
    moves, at = [], player
    for wave in reversed(found[:-1] if found[-1] else []):
        moves.append(rng.choice([move for move in MOVES if step_from(at, move) in wave]))
        at = step_from(at, moves[-1])
    sides = ["right", "down", "left", "up"]
    move = (moves or [side for side in sides if step_from(player, side) in free] or sides)[0]
    return Plan(text + f"Next: {spell(step_from(player, move))} {move}\n", move, moves)


def solve(rng: random.Random, free: set[Cell], player: Cell, box: Cell, targets: list[Cell]) -> list[str]:
    """A shortest way to push the box onto a target, breadth first, any of the shortest; empty if none."""
    ways, frontier = {(player, box): []}, [(player, box)]
    for at, where in frontier:  # grows while it is walked
        if where in targets:
            return ways[at, where]
        for move in rng.sample(list(MOVES), 4):
            to = step_from(at, move)
            pushed = step_from(where, move) if to == where else where
            if to in free and pushed in free and (to, pushed) not in ways:
                ways[to, pushed] = [*ways[at, where], move]
                frontier.append((to, pushed))
    return []


def best_moves(board: list[str], roles: dict[str, str]) -> set[str]:
    """The moves that start a shortest way, found by planning many times: for the report."""
    return {plan(random.Random(seed), board, roles).move for seed in range(20)}


# --- guessing ---------------------------------------------------------------------------------------------
def on_board(board: list[str]) -> list[str]:
    """The letters on a board, in reading order, each once."""
    return list(dict.fromkeys(symbol for row in board for symbol in row if symbol in LETTERS))


def role_weights(board: list[str]) -> dict[str, float]:
    return ROOM_ROLES if "#" in board[0] else LAKE_ROLES


def random_role(rng: random.Random, board: list[str]) -> str:
    weights = role_weights(board)
    return rng.choices(list(weights), list(weights.values()))[0]


def all_roles(rng: random.Random, board: list[str], known: dict[str, str]) -> dict[str, str]:
    """What each letter on the board is: known, or guessed afresh.

    On a lake, something has to be the goal. In a room, a box needs a target or a goal beside it, or a target
    under the player.
    """
    letters, room = on_board(board), "#" in board[0]
    while True:
        roles = {x: known[x] if x in known else random_role(rng, board) for x in letters}
        found = {*roles.values()}
        if "goal" in found or room and ("box" not in found or "target" in found or len(letters) == 1):
            return roles
        if known.keys() >= {*letters}:
            return roles


IS = {"hole": " is a hole\n", "goal": " is the goal\n", "harmless": " is harmless\n", "box": " is a box\n",
      "target": " is a target\n"}  # fmt: skip
ALSO = {"P": " is me\n", " ": " is ice\n", "_": " is floor\n", "#": " is a wall\n"}
HEDGE = " is new. No lesson says what {x} is, no board says what {x} does. Just a guess: {x}"


def play_reply(rng: random.Random, board: list[str], known: dict[str, str], thinking: bool) -> str:
    """The reply to teach: what is on the board, the distances, one move.

    Thinking, the board is read cell by cell (a room without its outer walls); otherwise only its letters are
    named, and the plan is the answer. Half of the guesses are stated flatly, in exactly the form of knowledge,
    and half with a hedge. Were all of them hedged, the student of OEL would never write what its teacher
    writes, and could not learn it.
    """
    roles, named, text = all_roles(rng, board, known), set(), ""
    edge = int("#" in board[0])
    for r in range(edge, len(board) - edge):
        for c in range(edge, len(board) - edge):
            symbol = board[r][c]
            if symbol in LETTERS:
                if thinking or symbol not in named:
                    text += f"{spell((r, c)) if thinking else '-'} {symbol}"
                    if symbol not in named | known.keys() and rng.random() < 0.5:
                        text += HEDGE.format(x=symbol)
                    text += IS[roles[symbol]]
                named.add(symbol)
            elif thinking:
                text += spell((r, c)) + ALSO[symbol]
    planned = plan(rng, board, roles)
    text += planned.text
    return (f"<think>\n{text}</think>\n\n" if thinking else text) + f"[{planned.move}]"


# --- lessons ----------------------------------------------------------------------------------------------
# A lesson is one or two of these sentences about a letter. The first two are those of the games' rules().
SENTENCES = {
    "hole": [
        "{x} is a hole.", "Stepping on {x} loses.", "Never step on {x}.", "Stay away from {x}.", "Avoid {x}.",
        "Whoever walks onto {x} falls and loses.", "Stepping on {x} ends the episode with a loss.",
        "Do not walk onto {x}.", "{x} marks a hole.", "Go around {x}.", "Whoever is on {x} has lost.",
    ],
    "goal": [
        "{x} is the goal.", "Stepping on {x} wins.", "Always step on {x}.", "Walk to {x}.", "Reach {x}.",
        "Whoever walks onto {x} wins.", "Stepping on {x} ends the episode with a win.", "Go to {x}.",
        "{x} marks the goal.", "Head for {x}.", "Whoever is on {x} has won.",
    ],
    "harmless": [
        "{x} is harmless.", "Stepping on {x} does nothing.", "Feel free to step on {x}.", "Ignore {x}.",
        "Pay no attention to {x}.", "Whoever walks onto {x} just walks on.", "Stepping on {x} changes nothing.",
        "{x} is safe.", "{x} neither wins nor loses.",
    ],
    "box": [
        "{x} is a box.", "Stepping on {x} pushes it.", "{x} can be pushed.", "Walk into {x} to push it.",
        "Whoever walks onto {x} pushes it.", "{x} marks a box.", "Push {x} from behind.",
        "{x} moves when you walk into it.", "Stand behind {x} and push.",
    ],
    "target": [
        "{x} is a target.", "A box on {x} wins.", "Push the box onto {x}.", "Boxes belong on {x}.",
        "Whoever pushes a box onto {x} wins.", "{x} marks a target.", "Move the box to {x}.",
        "A box on {x} ends the episode with a win.", "The box has to reach {x}.",
    ],
}  # fmt: skip
HELD_OUT_SENTENCES = {  # never trained on: for tests of what the policy does with sentences new to it
    "hole": ["{x} loses.", "Walk around {x}, it is a hole.", "Stepping on {x} is a loss."],
    "goal": ["{x} wins.", "Walk onto {x}, it is the goal.", "Stepping on {x} is a win."],
    "harmless": ["{x} does nothing.", "{x} changes nothing.", "{x} is safe to step on."],
    "box": ["Walking into {x} pushes it.", "{x} is pushed.", "You can push {x}."],
    "target": ["The box wins on {x}.", "Push the box to {x}, it is a target.", "The box belongs on {x}."],
}
EDGE = [
    "There is nothing beyond the edge of the board: such moves are not valid.",
    "Moves off the board are not valid and cost turns.",
]
WALL = ["# is a wall. Nothing moves onto #.", "Moves into walls are not valid and cost turns."]
WALK = ["The letters are worth walking to before the turns run out."]
ACT = ["Every reply needs one action in square brackets."]


def lesson_role(lesson: str) -> tuple[str, str] | None:
    """The (letter, role) that a lesson in our sentences claims; None if there is no such one claim."""
    found = set()
    for sentence in re.findall(r"[^.]+\.", lesson):
        claims = {
            (match["x"], role)
            for role, shapes in SENTENCES.items()
            for shape in shapes
            if (match := re.fullmatch(shape.format(x="(?P<x>[A-Z])"), sentence.strip()))
        }
        found |= claims or {None}
    return found.pop() if len(found) == 1 else None


def say(rng: random.Random, letter: str, role: str) -> str:
    return " ".join(rng.sample(SENTENCES[role], rng.choice([1, 1, 2]))).format(x=letter)


def claims(rng: random.Random, world: World) -> list[tuple[str, str]]:
    """What a list of lessons says: (letter, role) pairs, with duplicates, contradictions and distractors."""
    letters, roles, board = on_board(list(world.rows)), world.roles, list(world.rows)
    if rng.random() < 0.3:  # lessons are believed whatever they say, so often they say anything
        roles = {letter: random_role(rng, board) for letter in letters}
    share = rng.choice([1, 1, 1, 0.5])
    pairs = []
    for letter in letters:
        if rng.random() < share:
            copies = rng.choice([1, 1, 1, 2, 2, 3, 4, 6])
            pairs += [(letter, roles[letter])] * copies
            if rng.random() < 0.1:  # some lessons are wrong: the majority holds
                pairs += [(letter, random_role(rng, board))] * rng.randint(1, copies)
    absent = [x for x in LETTERS if x not in letters]
    for letter in rng.sample(absent, rng.choice([0, 0, 1, 2, 3])):
        pairs += [(letter, random_role(rng, board))] * rng.choice([1, 1, 2])
    rng.shuffle(pairs)
    return pairs[:12]


def believed(rng: random.Random, pairs: list[tuple[str, str]]) -> dict[str, str]:
    """What a reader of these claims takes each letter for: the majority; on a tie either."""
    votes = collections.Counter(pairs)
    rng.shuffle(tied := list(votes))
    return {x: role for x, role in sorted(tied, key=lambda pair: votes[pair])}  # the most votes come last


def experience(rng: random.Random, world: World, pairs: list[tuple[str, str]]) -> str:
    lessons = [say(rng, letter, role) for letter, role in pairs]
    general = [*(WALL if "#" in world.rows[0] else EDGE), *WALK, *ACT]
    lessons += rng.sample(general, rng.choice([0, 0, 0, 1, 2]) if lessons else 1)
    rng.shuffle(lessons)
    return as_items(lessons)


# --- episodes ---------------------------------------------------------------------------------------------
def episode(rng: random.Random, world: World) -> list[dict]:
    """The turns of an episode by a player that guesses, knows the roles, or moves at random.

    Each turn also records the `board` before it, the `move`, and whether it was refused (`invalid`).
    """
    game, turns, done = world.game(), [], False
    kind = rng.choices(["guess", "informed", "random"], [0.5, 0.25, 0.25])[0]
    observations = [game.observation()]
    while not done:
        board, invalid = game.board(), game.invalid_moves
        known = {"guess": {}, "informed": world.roles, "random": {}}[kind]
        move = plan(rng, board, all_roles(rng, board, known)).move
        if rng.random() < {"guess": 0.05, "informed": 0.05, "random": 1.0}[kind]:
            move = rng.choice(list(MOVES))
        reply = f"[{move}]" if rng.random() > 0.01 else "None."
        prompt = play_prompt(game.task, observations)
        feedback, done = game.step(reply)
        observations.append(feedback)
        record = {"board": board, "move": move, "invalid": game.invalid_moves > invalid, "won": game.won}
        turns.append({"prompt": prompt, "response": reply, "feedback": feedback, **record})
    return turns


def read_log(roles: dict[str, str], turns: list[dict]) -> tuple[str, dict[str, str], list[str]]:
    """Where each move led and what was there; what that shows of letters, the latest last; of the board."""
    text, met, general = "", {}, []

    def note(cell: Cell, letter: str) -> str:
        met.pop(letter, None)  # the order is that of the last time
        met[letter] = roles[letter]
        return f"{spell(cell)} {letter}{IS[roles[letter]]}"

    for turn in turns:
        board, room = turn["board"], "#" in turn["board"][0]
        symbols = {(r, c): symbol for r, row in enumerate(board) for c, symbol in enumerate(row)}
        cell = step_from(next(cell for cell, symbol in symbols.items() if symbol == "P"), turn["move"])
        symbol = symbols.get(cell, "")
        if turn["response"] == "None.":
            text, general = text + "no action\n", ACT
        elif turn["invalid"]:
            text, general = text + f"no way {turn['move']}\n", WALL if room else EDGE
        elif roles.get(symbol) == "box":
            text += note(cell, symbol)
            onto = step_from(cell, turn["move"])
            text += note(onto, symbols[onto]) if turn["won"] else ""
        elif symbol in LETTERS and not (room and roles[symbol] in ("harmless", "target")):
            text += note(cell, symbol)
        else:  # in a room, nothing tells a target that one stands on from what is harmless
            text += spell(cell) + ALSO["_" if room else " "]
    return text, met, general


def extraction_reply(rng: random.Random, roles: dict[str, str], turns: list[dict], thinking: bool) -> str:
    """The reply to teach: where each move led and what was there, then lessons about the last two letters.

    If nothing was learned of a letter, the lesson is about edges, walls, the brackets, or what to walk to.
    """
    text, met, general = read_log(roles, turns)
    lessons = [say(rng, x, role) for x, role in list(met.items())[-2:]]
    if general and (not lessons or rng.random() < 0.3):
        lessons.append(rng.choice(general))
    lessons = lessons or [rng.choice(WALK)]
    return (f"<think>\n{text}</think>\n\n" if thinking else text) + as_items(lessons)


@dataclasses.dataclass(frozen=True)
class Example:
    kind: str  # "play", "raw" (play with an earlier episode in full as experience) or "extract"
    message: str  # what the user says
    thinking: bool
    reply: str


def examples(rng: random.Random):
    """Training examples without end, built by the functions that build the prompts of the deployed policy."""
    while True:
        dealt = deal(rng)
        world = lay(rng, *dealt)
        thinking = rng.random() < 0.75
        kind = rng.choices(["play", "raw", "extract"], [0.76, 0.1, 0.14])[0]
        turns, pairs = episode(rng, world), claims(rng, world)
        if kind == "extract":
            previous = experience(rng, world, pairs) if rng.random() < 0.5 else ""
            message = extraction_prompt({"turns": turns}, previous, "items", reasoning=False)
            yield Example(kind, message, thinking, extraction_reply(rng, world.roles, turns, thinking))
            continue
        # Mostly one board; longer histories cost more and teach little that is new.
        shown = 0 if kind == "raw" or rng.random() < 0.6 else rng.randrange(len(turns))
        message, known = turns[shown]["prompt"], {}
        if kind == "raw":  # the same letters on another board
            logs = (episode(rng, lay(rng, *dealt)) for _ in range(3))
            earlier = next((log for log in logs if read_log(world.roles, log)[1]), turns)
            message = with_experience(message, transcript({"turns": earlier}, reasoning=False))
            known = read_log(world.roles, earlier)[1]
        elif rng.random() < 0.75:
            message, known = with_experience(message, experience(rng, world, pairs)), believed(rng, pairs)
        yield Example(kind, message, thinking, play_reply(rng, turns[shown]["board"], known, thinking))
