"""Makes the data of the ready tasks `emoji-scenes` and `digit-scenes`: `glyphs.parquet`, `emoji.parquet`, `digits.parquet`.

    npm pack emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0
    python data/scenes/build.py [--source FOLDER_OF_THE_TWO_ARCHIVES]

A scene is a 2 x 2 grid. Its row holds the four things by name, or by their index in scikit-learn's digits, in reading order;
size and offset of each in its cell of 56 pixels; the background; and eight questions, two of each kind, whose answers are
single tokens of SmolLM2. `rankscope.tasks.scenes` draws the image. No two scenes are alike, digits are split by their image,
and the split `shift` draws test scenes in another style: Twitter's emoji, or digits in dark ink on light paper.
"""

from __future__ import annotations

import argparse
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from sklearn.datasets import load_digits

HERE = Path(__file__).resolve().parent
SIZES = {"train": 1600, "validation": 160, "test": 320, "shift": 320}
OBJECTS = {
    "animals": {"dog": "1f415", "cat": "1f408", "horse": "1f40e", "pig": "1f416", "rabbit": "1f407", "bird": "1f426"},
    "fruits": {
        "apple": "1f34e",
        "banana": "1f34c",
        "lemon": "1f34b",
        "grape": "1f347",
        "cherry": "1f352",
        "pear": "1f350",
    },
    "vehicles": {
        "car": "1f697",
        "bus": "1f68c",
        "train": "1f686",
        "bicycle": "1f6b2",
        "ship": "1f6a2",
        "truck": "1f69a",
    },
    "clothes": {"shirt": "1f455", "dress": "1f457", "coat": "1f9e5", "hat": "1f3a9", "shoe": "1f45e", "boot": "1f462"},
}
CATEGORY = {name: category for category, names in OBJECTS.items() for name in names}
PLACES = ("top left", "top right", "bottom left", "bottom right")
REGIONS = {"top": (0, 1), "bottom": (2, 3), "left": (0, 2), "right": (1, 3)}
NUMBERS = (  # noqa: SIM905
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen"
).split()
Question = dict[str, str]


def glyphs(source: Path) -> pd.DataFrame:
    """The pictures of all objects in both styles."""
    rows = []
    for style in ("google", "twitter"):
        archive = source / f"emoji-datasource-{style}-16.0.0.tgz"
        if not archive.exists():
            sys.exit(f"`{archive}` is missing; run `npm pack emoji-datasource-{style}@16.0.0`, or pass --source.")
        with tarfile.open(archive) as files:
            for name, code in ((name, code) for names in OBJECTS.values() for name, code in names.items()):
                png = files.extractfile(f"package/img/{style}/64/{code}.png").read()
                rows.append({"name": name, "category": CATEGORY[name], "style": style, "png": png})
    return pd.DataFrame(rows)


def ask(kind: str, question: str, answer: str | bool) -> Question:
    """One question with its one-word answer."""
    answer = answer if isinstance(answer, str) else ("yes" if answer else "no")
    return {"kind": kind, "question": question, "answer": answer}


def emoji_things(rng: np.random.Generator, split: str) -> list[str]:
    """Four different objects of one to four categories, so that counts are spread."""
    categories = rng.choice(list(OBJECTS), size=rng.integers(1, 5), replace=False)
    return rng.choice([name for name in CATEGORY if CATEGORY[name] in categories], size=4, replace=False).tolist()


def emoji_questions(rng: np.random.Generator, things: list[str]) -> Iterator[Question]:
    """What is where, how many of a category, is there a thing, what is beside it."""
    for place in rng.choice(4, size=2, replace=False):
        yield ask("where", f"What is {PLACES[place]}?", things[place])
    counts = {category: sum(CATEGORY[name] == category for name in things) for category in OBJECTS}
    present = [category for category in OBJECTS if counts[category]]
    first = rng.choice(present)
    for category in (first, rng.choice([each for each in OBJECTS if each != first])):
        yield ask("count", f"How many {category}?", NUMBERS[counts[category]])
    for name in (rng.choice(things), rng.choice([name for name in CATEGORY if name not in things])):
        yield ask("exist", f"Is there a {name}?", name in things)
    for place in rng.choice(4, size=2, replace=False):
        yield ask("beside", f"What is beside the {things[place]}?", things[place ^ 1])


def digit_things(rng: np.random.Generator, split: str) -> list[int]:
    """Four images of digits. Neighbours in the file are by one writer, so that each split has writers of its own."""
    start, stop = {"train": (0, 1000), "validation": (1000, 1300)}.get(split, (1300, 1797))
    return rng.choice(np.arange(start, stop), size=4, replace=False).tolist()


def digit_questions(rng: np.random.Generator, things: list[int]) -> Iterator[Question]:
    """Which digit is where, sums and largest digits of rows and columns, comparisons."""
    values = load_digits().target[things].tolist()
    for place in rng.choice(4, size=2, replace=False):
        yield ask("where", f"What digit is {PLACES[place]}?", NUMBERS[values[place]])
    for row in ("top", "bottom"):
        yield ask("sum", f"Sum of the {row} row?", NUMBERS[sum(values[place] for place in REGIONS[row])])
    for region in rng.choice([*REGIONS, "all"], size=2, replace=False):
        where = "overall" if region == "all" else f"{'in the' if region in ('top', 'bottom') else 'on the'} {region}"
        yield ask("largest", f"Largest digit {where}?", NUMBERS[max(values[i] for i in REGIONS.get(region, range(4)))])
    pairs = [(a, b) for a in range(4) for b in range(4) if values[a] > values[b]] or [(0, 1)]
    for a, b in (pairs[rng.integers(len(pairs))], pairs[rng.integers(len(pairs))][::-1]):
        yield ask("compare", f"Is {PLACES[a]} larger than {PLACES[b]}?", values[a] > values[b])


def scenes(
    things_of: Callable[..., list[Any]], questions_of: Callable[..., Any], styles: tuple[str, str]
) -> pd.DataFrame:
    """All scenes of one kind, each with a layout of its own."""
    rng, seen, rows = np.random.default_rng(0), set(), []
    for split, size in SIZES.items():
        while sum(row["split"] == split for row in rows[-size:]) < size:
            things = things_of(rng, split)
            if tuple(things) in seen:
                continue
            seen.add(tuple(things))
            sizes = rng.integers(38, 55, size=4)
            row = {"split": split, "style": styles[split == "shift"], "things": things, "sizes": sizes.astype("uint8")}
            row["lefts"], row["tops"] = (rng.integers(0, 57 - sizes).astype("uint8") for _ in range(2))
            row["background"] = rng.integers(215, 256, size=3).astype("uint8")
            rows.append(row | {"questions": list(questions_of(rng, things))})
    return pd.DataFrame(rows)


def main() -> None:
    """Writes the three Parquet files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, default=Path())
    glyphs(parser.parse_args().source).to_parquet(HERE / "glyphs.parquet", compression="zstd", index=False)
    kinds = {
        "emoji": scenes(emoji_things, emoji_questions, ("google", "twitter")),
        "digits": scenes(digit_things, digit_questions, ("light ink", "dark ink")),
    }
    for name, table in kinds.items():
        table.to_parquet(HERE / f"{name}.parquet", compression="zstd", index=False)
        asked = pd.DataFrame([each for row in table["questions"][table["split"] == "test"] for each in row])
        shares = asked.groupby("kind")["answer"].agg(lambda answers: answers.value_counts(normalize=True).iloc[0])
        print(f"{name}: {len(table):,} scenes; majority answer by kind: {shares.round(3).to_dict()}")


if __name__ == "__main__":
    main()
