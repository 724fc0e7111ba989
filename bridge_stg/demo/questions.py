"""Queries about synthetic scenes: by name, colour and motion, about absent things, and by a first box."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from bridge_stg.demo.sprites import COLOUR_NAMES, NAMES
from bridge_stg.demo.synthetic import DIRECTION_NAMES, Scene, Thing


@dataclass(frozen=True)
class Question:
    """A query about a scene. `thing` is the index of its target, None if the target is absent."""

    text: str
    thing: int | None
    kind: str  # `name`, `colour` (name and colour), `motion` (only the direction decides), `absent`
    name: int | None = None
    colour: int | None = None
    direction: int | None = None


def ask(rng: np.random.Generator, scene: Scene, *, absent: float = 0.2) -> list[Question]:
    """Return one unambiguous query per thing, in random order; a share `absent` of all is about absent things."""
    made = (_query_about(rng, scene, index, thing) for index, thing in enumerate(scene.things))
    queries = [query for query in made if query is not None]
    queries = [queries[i] for i in rng.permutation(len(queries))]
    if rng.random() < absent * max(len(queries), 1):
        missing = _absent_query(rng, scene)
        if missing is not None:
            queries.insert(int(rng.integers(len(queries) + 1)), missing)
    return queries


def ask_to_track(rng: np.random.Generator, scene: Scene, index: int) -> Question:
    """Return the query to track a thing: half of them are "the object", the others its colour and name."""
    thing = scene.things[index]
    named = rng.random() < 0.5
    text = f"the {COLOUR_NAMES[thing.colour]} {NAMES[thing.name]}" if named else "the object"
    return Question(text, index, "track", thing.name, thing.colour)


PHRASES = ("the {}", "the {}", "the {}", "{}", "a {}", "find the {}", "where is the {}", "show the {}")
UNNAMED, MOTIONS = "object", ("moving", "that moves")
QUERY_WORDS = (
    *NAMES, *COLOUR_NAMES, *DIRECTION_NAMES, UNNAMED,
    *dict.fromkeys(" ".join((*PHRASES, *MOTIONS, "an")).replace("{}", "").split()),
)  # fmt: skip
"""All words of the queries, and "an", which is "a" before a vowel."""


def _query_about(rng: np.random.Generator, scene: Scene, index: int, thing: Thing) -> Question | None:
    """Name a thing by a random choice of traits that no other thing shares."""

    def rivals(*traits: str) -> bool:
        others = (other for other in scene.things if other is not thing)
        return any(all(getattr(other, trait) == getattr(thing, trait) for trait in traits) for other in others)

    options = []
    if not rivals("name", "colour"):
        options += ["colour"] * 5
        if not rivals("name"):
            options += ["name"] * 3
        if thing.direction is not None:
            options += ["colour+motion"]
    elif thing.direction is not None and not rivals("name", "colour", "direction"):
        options += ["colour+motion"]
        if not rivals("name", "direction"):
            options += ["colour+motion", "name+motion"]
        if not rivals("direction"):
            options += ["motion"]
    if not options:
        return None
    form = str(rng.choice(options))
    decided_by_motion = form == "motion" or rivals("name", *["colour"] * ("colour" in form))
    kind = "motion" if decided_by_motion else form.partition("+")[0]
    name, colour = None if form == "motion" else thing.name, thing.colour if "colour" in form else None
    return _phrase(rng, Question("", index, kind, name, colour, thing.direction if "motion" in form else None))


def _phrase(rng: np.random.Generator, query: Question) -> Question:
    """Return the query with a random text that names its traits."""
    words = [COLOUR_NAMES[query.colour]] if query.colour is not None else []
    words.append(NAMES[query.name] if query.name is not None else UNNAMED)
    if query.direction is not None:
        words += [MOTIONS[0] if rng.random() < 0.7 else MOTIONS[1], DIRECTION_NAMES[query.direction]]
    return replace(query, text=PHRASES[rng.integers(len(PHRASES))].format(" ".join(words)))


def _absent_query(rng: np.random.Generator, scene: Scene) -> Question | None:
    """Return a query about an absent thing: with the name or the colour of a present one, or neither."""
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
            return _phrase(rng, Question("", None, "absent", name, None if named_only else colour))
    return None
