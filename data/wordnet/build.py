"""Makes `glosses.parquet`, the data of the ready task `supersense`, from Debian's package `wordnet-base` (WordNet 3.0).

    apt-get install wordnet-base
    python data/wordnet/build.py [--source /usr/share/wordnet]

One row a gloss: `text`, `label` (an index), `class` (the lexicographer file, as in `noun.animal`), `split`. The gloss is
the definition, without its examples. Glosses that occur more than once are dropped, so that no text lies in two splits
or under two classes. Classes with fewer than 200 glosses are left out; of the others 200 are drawn, 100 to train, 40 to
validate and 60 to test. The seed is fixed.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import pandas as pd

HERE = Path(__file__).resolve().parent
SEED = 0
SPLITS = {"train": 100, "validation": 40, "test": 60}

# lexnames(5WN): the name of each lexicographer file, by number.
CLASSES = (  # noqa: SIM905
    "adj.all adj.pert adv.all noun.Tops noun.act noun.animal noun.artifact noun.attribute noun.body "
    "noun.cognition noun.communication noun.event noun.feeling noun.food noun.group noun.location noun.motive "
    "noun.object noun.person noun.phenomenon noun.plant noun.possession noun.process noun.quantity noun.relation "
    "noun.shape noun.state noun.substance noun.time verb.body verb.change verb.cognition verb.communication "
    "verb.competition verb.consumption verb.contact verb.creation verb.emotion verb.motion verb.perception "
    "verb.possession verb.social verb.stative verb.weather adj.ppl"
).split()


def read_glosses(source: Path) -> pd.DataFrame:
    """Every synset's definition with its lexicographer class."""
    rows = []
    for part in ("noun", "verb", "adj", "adv"):
        path = source / f"data.{part}"
        if not path.exists():
            sys.exit(f"`{path}` is missing; run `apt-get install wordnet-base`, or pass --source.")
        for line in path.read_text(encoding="latin-1").splitlines():
            if line.startswith(" "):  # the licence, at the head of the file
                continue
            fields, gloss = line.split(" | ", 1)
            definition = re.split(r';\s*"', gloss.strip(), maxsplit=1)[0].strip().rstrip(";")
            rows.append((definition, CLASSES[int(fields.split()[1])]))
    return pd.DataFrame(rows, columns=["text", "class"])


def main() -> None:
    """Reads, de-duplicates, draws a balanced sample, and writes the Parquet file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, default=Path("/usr/share/wordnet"))
    glosses = read_glosses(parser.parse_args().source)
    normal = glosses["text"].str.lower().str.replace(r"\W+", " ", regex=True).str.strip()
    glosses = glosses[~normal.duplicated(keep=False) & (normal.str.len() > 0)]
    size = sum(SPLITS.values())
    large = glosses.groupby("class").filter(lambda rows: len(rows) >= size)
    sample = large.groupby("class").sample(n=size, random_state=SEED)
    within = sample.groupby("class").cumcount()
    bounds = pd.Series(SPLITS).cumsum()
    sample["split"] = [next(name for name, bound in bounds.items() if i < bound) for i in within]
    sample["label"] = sample["class"].astype("category").cat.codes.astype("int16")
    sample = sample[["text", "label", "class", "split"]].reset_index(drop=True)
    sample.to_parquet(HERE / "glosses.parquet", compression="zstd", index=False)
    print(f"{len(sample):,} glosses, {sample['class'].nunique()} classes, {dict(sample['split'].value_counts())}")


if __name__ == "__main__":
    main()
