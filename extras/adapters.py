"""Games of other packages, in the protocol of envs.py. From the shell, a game is PACKAGE/NAME:

    python oel.py --model Qwen/Qwen3-1.7B --env extras/adapters.py:textarena/Mastermind-v0-raw
    python oel.py --model Qwen/Qwen3-1.7B --env extras/adapters.py:gymnasium/Blackjack-v1
    python oel.py --model Qwen/Qwen3-1.7B --env extras/adapters.py:reasoning_gym/leg_counting
    python oel.py --model Qwen/Qwen3-1.7B --env extras/adapters.py:PaperFrozenLake

For other options, better words or a taskset of verifiers, subclass an adapter in a file of your own:

    from extras.adapters import TextArena

    class BigLake(TextArena):
        name, options, max_turns = "FrozenLake-v0-raw", {"size": 5, "num_holes": 6}, 12

The level is the seed of the game. What a game says goes into the logs; its reward only decides `won`.
"""

import asyncio
import contextlib
import functools
import importlib
import importlib.util
import inspect
import json
import random
import re
import sys
from typing import NoReturn

import prompts
from envs import GridGame, parse_action

OVER = {True: "The episode succeeded.", False: "The episode failed."}


def fail(message: str) -> NoReturn:
    """End with one line about what the user can fix."""
    print(f"adapters.py: error: {' '.join(message.split())[:300]}", file=sys.stderr)
    sys.exit(2)


def package(name: str):
    try:
        return importlib.import_module(name)
    except ImportError as error:
        fail(f"this game needs {name}: pip install {name.partition('.')[0].replace('_', '-')} ({error})")


def answer(reply: str, strict: bool) -> str:
    """The answer in a reply. With --strict, a reply that never closes its reasoning has none."""
    return "" if strict and "</think>" not in reply else prompts.answer(reply)


class TextArena:
    """A game of TextArena for one player. The names end in -raw: other versions repeat all earlier turns."""

    package, name, options, max_turns, strict = "textarena", "", {}, 20, False
    task = ""  # what the player is told to do, in place of the game's own rules

    @classmethod
    def names(cls) -> list[str]:
        return [name for name in package("textarena.envs.registration").ENV_REGISTRY if name.endswith("-raw")]

    def reset(self, level: int) -> str:
        self.won, self.turn, self.invalid_moves = False, 0, 0
        self.draws = random.Random(level).getstate()
        textarena = package("textarena")
        with self.own_draws():
            try:
                self.game = textarena.make(self.name, **self.options)
                self.game.reset(num_players=1, seed=level)
            except Exception as error:  # noqa: BLE001 (two players, a word list that is not there, ...)
                fail(f"{self.name} does not start for one player: {error}")
        rules, observation = self.heard()
        self.task = type(self).task or rules
        return observation

    def step(self, reply: str) -> tuple[str, bool]:
        self.turn += 1
        with self.own_draws():
            over, _ = self.game.step(self.action(reply))
        state, texts = self.game.state, [self.heard()[1]]
        self.invalid_moves += state.error_count > 0 or state.game_info[0]["invalid_move"]
        if over:
            rewards, info = self.game.close()
            self.won = rewards[0] >= 1
            texts.append(info[0]["reason"])
        elif self.turn == self.max_turns:
            over = True
            texts.append("The turn limit was reached.")
        texts += [OVER[self.won]] if over else []
        return "\n".join(filter(None, texts)), over

    def action(self, reply: str) -> str:
        return answer(reply, self.strict)

    def heard(self) -> tuple[str, str]:
        """The game's rules, and all else that it has said since the last turn but the echo of the reply."""
        _, messages = self.game.get_observation()
        rules = [text.strip() for _, text, kind in messages if kind.name == "PROMPT"]
        news = [text.strip() for _, text, kind in messages if kind.name not in ("PROMPT", "PLAYER_ACTION")]
        return "\n".join(rules), "\n".join(news)

    @contextlib.contextmanager
    def own_draws(self):
        """TextArena draws from Python's global generator. Games that are played at once must not disturb each
        other, so each has a state of its own."""
        outside = random.getstate()
        random.setstate(self.draws)
        try:
            yield
        finally:
            self.draws = random.getstate()
            random.setstate(outside)


class PaperFrozenLake(TextArena):
    """The paper's Frozen Lake: 3x3 with two holes, five turns, the rules cut out, the last action counts."""

    name, options, max_turns = "FrozenLake-v0-raw", {"size": 3, "num_holes": 2}, 5
    task = GridGame.task

    def action(self, reply: str) -> str:
        return f"[{parse_action(reply, self.strict)}]"  # [None] is no action


class PaperSokoban(PaperFrozenLake):
    """The paper's Sokoban: a 6x6 room with one box, on the same terms."""

    name, options = "Sokoban-v0-raw", {"dim_room": (6, 6), "num_boxes": 1}


class Gymnasium:
    """A Gymnasium environment with discrete actions, or with text as actions. It is won if its last reward is
    positive. A subclass may have a `task`, words for the `actions`, and write the observation as text."""

    package, name, options, max_turns, strict = "gymnasium", "", {}, 20, False
    task, actions = "", ()

    @classmethod
    def names(cls) -> list[str]:
        return list(package("gymnasium").registry)

    def __init__(self):
        try:
            self.env = package("gymnasium").make(self.name, **self.options)
        except Exception as error:  # noqa: BLE001 (such as a simulator that is not installed)
            fail(f"{self.name} cannot be made: {error}")
        space = self.env.action_space
        if not hasattr(space, "n") and type(space).__name__ != "Text":
            fail(f"{self.name} has the actions {space}: they have to be discrete, or text")
        if hasattr(space, "n"):
            self.actions = self.actions or [str(i) for i in range(space.n)]
            names = " ".join(f"[{action}]" for action in self.actions)
            self.task = f"{self.task}\nActions: {names}. End your reply with one action in square brackets.".strip()

    def reset(self, level: int) -> str:
        self.won, self.turn, self.invalid_moves, self.had_action = False, 0, 0, True
        observation, _ = self.env.reset(seed=level)
        return self.text(observation)

    def text(self, observation) -> str:
        return str(observation)

    def step(self, reply: str) -> tuple[str, bool]:
        self.turn += 1
        action, reward, over = answer(reply, self.strict), 0, False
        if self.actions:
            found = [x for x in re.findall(r"\[\s*(.+?)\s*\]", action.lower()) if x in self.actions]
            action = self.actions.index(found[-1]) if found else None
        if action is None:  # twice in a row ends the episode
            self.invalid_moves += 1
            texts, over = ["There was no action in square brackets."], not self.had_action
        else:
            observation, reward, terminated, truncated, _ = self.env.step(action)
            texts, over = [self.text(observation)], terminated or truncated
        self.had_action = action is not None
        if not over and self.turn == self.max_turns:
            over = True
            texts.append("The turn limit was reached.")
        if over:
            self.won = bool(reward > 0)
            texts.append(OVER[self.won])
        return "\n".join(texts), over


class ReasoningGym:
    """A task of reasoning-gym: one question, one answer, and whether it is correct."""

    package, name, options, strict = "reasoning_gym", "", {}, False
    task = "Answer the question. End your reply with <answer>your answer</answer>."

    @classmethod
    def names(cls) -> list[str]:
        return list(package("reasoning_gym.factory").DATASETS)

    def reset(self, level: int) -> str:
        self.data = package("reasoning_gym").create_dataset(self.name, seed=level, size=1, **self.options)
        self.entry, self.invalid_moves = self.data[0], 0
        return self.entry["question"]

    def step(self, reply: str) -> tuple[str, bool]:
        found = package("reasoning_gym.utils").extract_answer(answer(reply, self.strict))
        self.won = found is not None and self.data.score_answer(found, self.entry) >= 1
        self.invalid_moves = int(found is None)
        text = "There was no <answer>." if found is None else f"You answered {found}."
        return f"{text} That is {'' if self.won else 'not '}correct.", True


class Verifiers:
    """Tasks of a verifiers taskset. Tools are called in this process, not by MCP; a reply without a call is the answer.
    A subclass has `taskset`, which makes it. Tasks that need a container are not for this adapter."""

    max_turns, strict = 10, False
    CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)

    @classmethod
    @functools.cache
    def stream(cls) -> tuple:
        return iter(cls.taskset()), []

    def reset(self, level: int) -> str:
        source, tasks = self.stream()
        while len(tasks) <= level and (task := next(source, None)):
            tasks.append(task)
        if len(tasks) < 3:
            fail(f"{type(self).__name__} has {len(tasks)} tasks: the three splits need at least one each")
        whole = len(tasks) - len(tasks) % 3  # so that splits, which are residues modulo 3, share no task
        self.job = job = tasks[level if level < len(tasks) else level % whole]
        vf, decorators = package("verifiers.v1"), package("verifiers.v1.utils.decorators")
        toolsets = job.toolsets(job.config)
        for toolset in toolsets:
            asyncio.run(toolset.setup_task(job))
        self.tools = {f.__name__: f for x in toolsets for f in decorators.discover_decorated(x, "tool")}
        record = vf.TraceTask(type=type(job).__name__, data=job.data)
        self.trace = vf.Trace(task=record, agent=vf.AgentInfo(config=vf.AgentConfig()))
        self.log(vf.UserMessage(content=job.data.prompt_text))
        self.won, self.turn, self.invalid_moves = False, 0, 0
        about = [f"{name}{inspect.signature(f)}: {inspect.getdoc(f)}" for name, f in self.tools.items()]
        how = 'To use one, end your reply with <tool_call>{"name": ..., "arguments": {...}}</tool_call>.'
        self.task = "\n".join([job.data.system_prompt or "", "Tools:", *about, how, "Else your reply is final."])
        return job.data.prompt_text

    def log(self, message) -> None:
        nodes = self.trace.nodes
        node = package("verifiers.v1").MessageNode
        parent = len(nodes) - 1 if nodes else None
        nodes.append(node(message=message, parent=parent, sampled=message.role == "assistant"))

    def step(self, reply: str) -> tuple[str, bool]:
        vf, said = package("verifiers.v1"), answer(reply, self.strict)
        calls = self.CALL.findall(said)
        self.turn += 1
        self.log(vf.AssistantMessage(content=said))
        if calls and self.turn < self.max_turns:
            try:
                call = json.loads(calls[-1])
                result = self.tools[call["name"]](**call["arguments"])
                text = str(asyncio.run(result) if inspect.isawaitable(result) else result)
            except Exception as error:  # noqa: BLE001 (whatever the player got wrong)
                self.invalid_moves += 1
                text = f"The call failed: {type(error).__name__}: {error}"
            self.log(vf.ToolMessage(tool_call_id=str(self.turn), content=text))
            return f"You called {calls[-1].strip()}\n{text}", False
        asyncio.run(self.job.score(self.trace))
        self.won = self.trace.reward >= 1
        return f"You answered: {said}\n{OVER[self.won]}", True


if __name__ == "<run_path>":  # when --env runs this file, it has all games of the packages that are installed
    for adapter in (TextArena, Gymnasium, ReasoningGym):
        if importlib.util.find_spec(adapter.package):
            for name in adapter.names():
                globals()[f"{adapter.package}/{name}"] = type(name, (adapter,), {"name": name})
        else:
            print(f"adapters.py: {adapter.package} is not installed, so its games are not there", file=sys.stderr)
