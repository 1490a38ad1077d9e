"""What the embedded policy is taught: worlds without end, and the right reply in each.

A world is a board whose letters mean something else every time. From worlds come the two kinds of examples:

    play       read the board, believe whatever the lessons say a letter is, guess the rest, plan, move
    extract    read the log of an episode, say what its last letters did, write that down as lessons

No letter has a preferred meaning here: `worlds` deals roles to letters drawn uniformly from all capitals but
P. So H and G are holes, goals and harmless as often as Q and V are, and what they are in the deployed games
is left for OEL to find. Sokoban is not taught at all.

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
from envs import LETTERS, MOVES, FrozenLake
from prompts import as_items, extraction_prompt, play_prompt, with_experience

# --- worlds: a board, and what its letters mean this once -------------------------------------------------
Cell = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class World:
    rows: tuple[str, ...]
    roles: dict[str, str]  # letter -> "hole", "goal" or "harmless"

    def letters(self, role: str) -> str:
        return "".join(letter for letter, r in self.roles.items() if r == role)

    def game(self) -> FrozenLake:
        size = len(self.rows)
        options = {"size": size, "max_turns": 5 if size == 3 else 8}  # those of the deployed games
        hole, goal = self.letters("hole"), self.letters("goal")
        return FrozenLake.from_board(list(self.rows), hole=hole, goal=goal, **options)


def worlds(rng: random.Random):
    """Random worlds without end. Letters are drawn uniformly and know nothing of the role they are given."""
    while True:
        size = rng.choices([3, 4], [0.76, 0.24])[0]
        counts = {
            "hole": rng.randint(1, size),
            "goal": rng.choices([1, 2], [0.75, 0.25])[0],
            "harmless": rng.choices([0, 1, 2], [0.7, 0.2, 0.1])[0],
        }
        letters, roles, symbols = iter(rng.sample(LETTERS, 8)), {}, []
        for role in ("goal", "hole", "harmless"):
            for i in range(counts[role]):
                if i == 0 or rng.random() < 0.25:  # now and then a role has two letters
                    roles[letter := next(letters)] = role
                symbols.append(letter)
        cells = [" "] * size**2
        places = rng.sample(range(size**2), 1 + len(symbols))
        if rng.random() < 0.35:  # as in the deployed game: from corner to corner
            inner = rng.sample(range(1, size**2 - 1), len(symbols) - 1)
            places = [0, size**2 - 1, *inner]
        for place, symbol in zip(places, ["P", *symbols], strict=True):
            cells[place] = symbol
        world = World(tuple("".join(cells[i : i + size]) for i in range(0, size**2, size)), roles)
        game = world.game()
        if game.player in far_from_goals(game.board(), game.player, roles)[-1]:  # a goal can be reached
            yield world


# --- planning: what the reasoning writes out --------------------------------------------------------------
def neighbours(cell: Cell, size: int) -> dict[str, Cell]:
    """The moves that stay on the board, and the cells they lead to."""
    cells = {move: (cell[0] + dr, cell[1] + dc) for move, (dr, dc) in MOVES.items()}
    return {move: (r, c) for move, (r, c) in cells.items() if 0 <= r < size and 0 <= c < size}


def far_from_goals(board: list[str], player: Cell, roles: dict[str, str]) -> list[list[Cell]]:
    """Cells by distance from the nearest goal, wave by wave around holes, up to the player's wave.

    The last wave holds the player if a goal can be reached, and is empty if none can.
    """
    size = len(board)
    role = {(r, c): roles.get(board[r][c], "ice") for r in range(size) for c in range(size)}
    waves = [sorted(cell for cell in role if role[cell] == "goal")]
    seen = set(waves[0])
    while waves[-1] and player not in waves[-1]:
        near = {cell for last in waves[-1] for cell in neighbours(last, size).values()}
        waves.append(sorted(cell for cell in near - seen if role[cell] != "hole"))
        seen |= near
    return waves


def best_moves(board: list[str], player: Cell, roles: dict[str, str]) -> dict[str, Cell]:
    """The moves that start a shortest path to a goal; where there is none, one that stays out of holes."""
    ways = neighbours(player, len(board))
    waves = far_from_goals(board, player, roles)
    if waves[-1]:
        return {move: cell for move, cell in ways.items() if cell in waves[-2]}
    safe = [m for m, (r, c) in ways.items() if roles.get(board[r][c]) != "hole"]
    move = min(safe or ways, key=["right", "down", "left", "up"].index)
    return {move: ways[move]}


def guess(rng: random.Random, unknown: list[str], known: list[str]) -> dict[str, str]:
    """A meaning for each unknown letter, drawn afresh; there has to be a goal somewhere."""
    while unknown:
        drawn = rng.choices(["hole", "goal", "harmless"], [0.4, 0.4, 0.2], k=len(unknown))
        if "goal" in [*drawn, *known]:
            return dict(zip(unknown, drawn, strict=True))
    return {}


def on_board(board: list[str]) -> list[str]:
    """The letters on a board, in reading order, each once."""
    return list(dict.fromkeys(symbol for row in board for symbol in row if symbol in LETTERS))


def all_roles(rng: random.Random, board: list[str], known: dict[str, str]) -> dict[str, str]:
    """What each letter on the board is: known, or guessed."""
    letters = on_board(board)
    seen = {letter: known[letter] for letter in letters if letter in known}
    return seen | guess(rng, [x for x in letters if x not in known], list(seen.values()))


def spell(cell: Cell) -> str:
    return f"({cell[0]},{cell[1]})"


IS = {"hole": " is a hole\n", "goal": " is the goal\n", "harmless": " is harmless\n"}


def play_reply(rng: random.Random, board: list[str], player: Cell, known: dict, thinking: bool) -> str:
    """The reply to teach: the board cell by cell with roles, the distances from the goal, one move.

    Half of the guesses are stated flatly, in exactly the form of knowledge, and half with a hedge. Were all
    of them hedged, the student of OEL would never write what its teacher writes, and could not learn it.
    """
    roles = all_roles(rng, board, known)
    moves = best_moves(board, player, roles)
    move = rng.choice(sorted(moves))
    if not thinking:
        return f"[{move}]"
    text, met = "", set(known)
    for r, row in enumerate(board):
        for c, symbol in enumerate(row):
            text += spell((r, c)) + symbol.strip()
            if symbol in LETTERS:
                if symbol not in met and rng.random() < 0.5:
                    text += f" is new. No lesson says what {symbol} is, no board says what {symbol} does. "
                    text += f"Just a guess: {symbol}"
                text += IS[roles[symbol]]
                met.add(symbol)
            else:
                text += " is me\n" if symbol == "P" else " is ice\n"
    waves = far_from_goals(board, player, roles)
    text += "Far:" + "".join(f" {i} {''.join(map(spell, wave))}" for i, wave in enumerate(waves) if wave)
    text += "\n" if waves[-1] else " no way\n"
    text += f"Next: {spell(moves[move])} {move}\n"
    return f"<think>\n{text}</think>\n\n[{move}]"


# --- lessons ----------------------------------------------------------------------------------------------
WORDINGS = {
    "hole": [
        "{x} is a hole. Stepping on {x} loses.",  # the wording of FrozenLake.rules()
        "{x} is a hole.",
        "Never step on {x}: it is a hole.",
        "Stay away from {x}. Whoever walks onto {x} falls and loses.",
        "Stepping on {x} ends the episode with a loss.",
    ],
    "goal": [
        "{x} is the goal. Stepping on {x} wins.",
        "{x} is the goal.",
        "Walk to {x}: it is the goal.",
        "Go to {x}. Whoever walks onto {x} wins.",
        "Stepping on {x} ends the episode with a win.",
    ],
    "harmless": [
        "{x} is harmless. Stepping on {x} does nothing.",
        "{x} is harmless.",
        "Feel free to step on {x}: it is harmless.",
        "Pay no attention to {x}. Whoever walks onto {x} just walks on.",
        "Stepping on {x} changes nothing.",
    ],
}
HELD_OUT_WORDINGS = {  # never trained on: for tests of what the policy does with sentences new to it
    "hole": ["{x} loses.", "Walk around {x}, it is a hole.", "Stepping on {x} is a loss."],
    "goal": ["{x} wins.", "Walk onto {x}, it is the goal.", "Stepping on {x} is a win."],
    "harmless": ["{x} does nothing.", "Do not mind {x}, it is harmless."],
}
EDGE = [
    "There is nothing beyond the edge of the board: such moves are not valid.",
    "Moves off the board are not valid and cost turns.",
]
WALK = [
    "Empty cells do nothing. Only letters end an episode.",
    "The letters are worth walking to before the turns run out.",
]
ACT = ["Every reply needs one action in square brackets."]


def lesson_role(lesson: str) -> tuple[str, str] | None:
    """The (letter, role) that a lesson in one of our wordings claims; None for any other sentence."""
    for role, wordings in WORDINGS.items():
        for wording in wordings:
            pattern = re.escape(wording).replace(r"\{x\}", "(?P<x>[A-Z])", 1).replace(r"\{x\}", "(?P=x)")
            if found := re.fullmatch(pattern, lesson):
                return found["x"], role
    return None


def say(rng: random.Random, letter: str, role: str) -> str:
    return rng.choice(WORDINGS[role]).format(x=letter)


def random_role(rng: random.Random) -> str:
    return rng.choices(["hole", "goal", "harmless"], [0.4, 0.4, 0.2])[0]


def claims(rng: random.Random, roles: dict[str, str], letters: list[str]) -> list[tuple[str, str]]:
    """What a list of lessons says: (letter, role) pairs, with duplicates, contradictions and distractors."""
    if rng.random() < 0.3:  # lessons are believed whatever they say, so often they say anything
        roles = {letter: random_role(rng) for letter in letters}
    share = rng.choice([1, 1, 1, 0.5])
    pairs = []
    for letter in letters:
        if rng.random() < share:
            copies = rng.choice([1, 1, 1, 2, 2, 3, 4, 6])
            pairs += [(letter, roles[letter])] * copies
            if rng.random() < 0.1:  # some lessons are wrong: the majority holds
                pairs += [(letter, random_role(rng))] * rng.randint(1, copies)
    absent = [x for x in LETTERS if x not in letters]
    for letter in rng.sample(absent, rng.choice([0, 0, 1, 2, 3])):
        pairs += [(letter, random_role(rng))] * rng.choice([1, 1, 2])
    rng.shuffle(pairs)
    return pairs[:12]


def believed(rng: random.Random, pairs: list[tuple[str, str]]) -> dict[str, str]:
    """What a reader of these claims takes each letter for: the majority; on a tie either."""
    votes = collections.Counter(pairs)
    rng.shuffle(tied := list(votes))
    return {x: role for x, role in sorted(tied, key=lambda pair: votes[pair])}  # the most votes come last


def experience(rng: random.Random, pairs: list[tuple[str, str]]) -> str:
    lessons = [say(rng, letter, role) for letter, role in pairs]
    lessons += rng.sample([*EDGE, *WALK, *ACT], rng.choice([0, 0, 0, 1, 2]) if lessons else 1)
    rng.shuffle(lessons)
    return as_items(lessons)


# --- episodes ---------------------------------------------------------------------------------------------
def episode(rng: random.Random, world: World) -> tuple[list[dict], FrozenLake]:
    """An episode by a player that guesses, knows the roles, or moves at random; and the game at its end.

    Each turn also records the `board` and the `player` before it, and the `cell` it led to, if any.
    """
    game, turns, done = world.game(), [], False
    kind = rng.choices(["guess", "informed", "random"], [0.5, 0.25, 0.25])[0]
    observations = [game.observation()]
    while not done:
        board, player = game.board(), game.player
        known = {"guess": {}, "informed": world.roles, "random": {}}[kind]
        move = rng.choice(sorted(best_moves(board, player, all_roles(rng, board, known))))
        if rng.random() < {"guess": 0.05, "informed": 0.05, "random": 1.0}[kind]:
            move = rng.choice(list(MOVES))
        reply = f"[{move}]" if rng.random() > 0.01 else "None."
        prompt = play_prompt(game.task, observations)
        feedback, done = game.step(reply)
        observations.append(feedback)
        cell = neighbours(player, len(board)).get(move) if "[" in reply else None
        record = {"board": board, "player": player, "move": move, "cell": cell}
        turns.append({"prompt": prompt, "response": reply, "feedback": feedback, **record})
    return turns, game


def extraction_reply(rng: random.Random, turns: list[dict], game: FrozenLake, thinking: bool) -> str:
    """The reply to teach: where each move led and what was there, then lessons about the last two letters.

    If no letter was stepped on, the lesson is about the edge, the brackets, or what to walk to.
    """
    walk, met, edge = "", {}, []
    for turn in turns:
        if turn["response"] == "None.":
            walk, edge = walk + "no action\n", ACT
        elif turn["cell"] is None:
            walk, edge = walk + f"no cell {turn['move']}\n", EDGE
        else:
            r, c = turn["cell"]
            symbol = turn["board"][r][c]
            role = "hole" if symbol in game.hole else "goal" if symbol in game.goal else "harmless"
            walk += spell((r, c)) + (symbol + IS[role] if symbol in LETTERS else " is ice\n")
            if symbol in LETTERS:
                met.pop(symbol, None)  # the order is that of the last step onto each letter
                met[symbol] = role
    lessons = [say(rng, x, role) for x, role in list(met.items())[-2:]]
    if edge and (not lessons or rng.random() < 0.3):
        lessons.append(rng.choice(edge))
    lessons = lessons or [rng.choice(WALK)]
    return (f"<think>\n{walk}</think>\n\n" if thinking else "") + as_items(lessons)


@dataclasses.dataclass(frozen=True)
class Example:
    kind: str  # "play" or "extract"
    message: str  # what the user says
    thinking: bool
    reply: str


def examples(rng: random.Random):
    """Training examples without end, built by the functions that build the prompts of the deployed policy."""
    for world in worlds(rng):
        thinking = rng.random() < 0.85
        turns, game = episode(rng, world)
        letters = on_board(list(world.rows))
        pairs = claims(rng, world.roles, letters)
        if rng.random() < 0.15:
            previous = experience(rng, pairs) if rng.random() < 0.5 else ""
            message = extraction_prompt({"turns": turns}, previous, "items", reasoning=False)
            yield Example("extract", message, thinking, extraction_reply(rng, turns, game, thinking))
        else:
            # Mostly one board; longer histories cost more and teach little that is new.
            shown = 0 if rng.random() < 0.55 else rng.randrange(game.max_turns)
            turn = turns[min(shown, len(turns) - 1)]
            known = {}
            message = turn["prompt"]
            if rng.random() < 0.75:
                known = believed(rng, pairs)
                message = with_experience(message, experience(rng, pairs))
            reply = play_reply(rng, turn["board"], turn["player"], known, thinking)
            yield Example("play", message, thinking, reply)
