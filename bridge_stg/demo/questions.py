"""Questions about synthetic scenes: by name, colour and motion, about what is not there, and by a first box."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bridge_stg.demo.sprites import COLOUR_NAMES, NAMES
from bridge_stg.demo.synthetic import DIRECTION_NAMES, Scene, Thing


@dataclass(frozen=True)
class Question:
    """A sentence about a scene. `thing` is the index of what it names, None if it is not there."""

    text: str
    thing: int | None
    kind: str
    """`name`, `colour` (name and colour), `motion` (only the direction decides), `absent`."""
    name: int | None = None
    colour: int | None = None
    direction: int | None = None


def ask(rng: np.random.Generator, scene: Scene, *, absent: float = 0.2) -> list[Question]:
    """Return one unambiguous question a thing, in random order; a share `absent` of them about what is not there."""
    questions = []
    for index, thing in enumerate(scene.things):
        question = _question_about(rng, scene, index, thing)
        if question is not None:
            questions.append(question)
    order = rng.permutation(len(questions))
    questions = [questions[i] for i in order]
    if rng.random() < absent * max(len(questions), 1):
        missing = _absent_question(rng, scene)
        if missing is not None:
            questions.insert(int(rng.integers(len(questions) + 1)), missing)
    return questions


def ask_to_track(rng: np.random.Generator, scene: Scene, index: int) -> Question:
    """Return what to track a thing by: nothing but its box in one of two cases, else its name and colour."""
    thing = scene.things[index]
    named = rng.random() < 0.5
    text = f"the {COLOUR_NAMES[thing.colour]} {NAMES[thing.name]}" if named else "the object"
    return Question(text, index, "track", thing.name, thing.colour)


PHRASES = ("the {}", "the {}", "the {}", "{}", "a {}", "find the {}", "where is the {}", "show the {}")


def _question_about(rng: np.random.Generator, scene: Scene, index: int, thing: Thing) -> Question | None:
    """Name a thing by traits that no other thing shares, with as few of them as a coin decides."""

    def rivals(name: bool, colour: bool, direction: bool) -> bool:
        return any(
            (not name or other.name == thing.name)
            and (not colour or other.colour == thing.colour)
            and (not direction or other.direction == thing.direction)
            for i, other in enumerate(scene.things)
            if i != index
        )  # fmt: skip

    options = []
    if not rivals(True, True, False):
        options += ["colour"] * 5
        if not rivals(True, False, False):
            options += ["name"] * 3
        if thing.direction is not None:
            options += ["colour+motion"] * 1
    elif thing.direction is not None and not rivals(True, True, True):
        options += (
            ["colour+motion", "colour+motion", "name+motion"] if not rivals(True, False, True) else ["colour+motion"]
        )
        if not rivals(False, False, True):
            options += ["motion"]
    if not options:
        return None
    form = str(rng.choice(options))
    decided_by_motion = rivals("name" in form or "colour" in form, "colour" in form, False) or form == "motion"
    return _phrase(
        rng, index, "motion" if decided_by_motion else form.split("+")[0],
        None if form == "motion" else thing.name, thing.colour if "colour" in form else None,
        thing.direction if "motion" in form else None,
    )  # fmt: skip


def _phrase(
    rng: np.random.Generator, index: int | None, kind: str, name: int | None, colour: int | None, direction: int | None
) -> Question:
    words = [COLOUR_NAMES[colour]] if colour is not None else []
    words.append(NAMES[name] if name is not None else "object")
    if direction is not None:
        words.append(("moving " if rng.random() < 0.7 else "that moves ") + DIRECTION_NAMES[direction])
    text = PHRASES[rng.integers(len(PHRASES))].format(" ".join(words))
    return Question(text, index, kind, name, colour, direction)


def _absent_question(rng: np.random.Generator, scene: Scene) -> Question | None:
    """Ask for something near to what is there: same name in another colour, same colour, or neither."""
    present = {(t.name, t.colour) for t in scene.things}
    model = scene.things[rng.integers(len(scene.things))] if scene.things else None
    for _ in range(20):
        name, colour = int(rng.integers(len(NAMES))), int(rng.integers(len(COLOUR_NAMES)))
        draw = rng.random()
        if model is not None and draw < 0.4:
            name = model.name
        elif model is not None and draw < 0.6:
            colour = model.colour
        named_only = rng.random() < 0.3 and all(name != n for n, _ in present)
        if (name, colour) not in present:
            return _phrase(rng, None, "absent", name, None if named_only else colour, None)
    return None
