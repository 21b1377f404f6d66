"""The script that draws the WordNet sample, on a source of a few synsets."""

import re
import subprocess
import sys
from pathlib import Path

import pandas as pd

from data.wordnet import build

SCRIPT = Path(__file__).resolve().parents[2] / "data" / "wordnet" / "build.py"
LICENCE = "  1 This software and database is being provided to you\n"


def test_definitions_are_read_without_examples(tmp_path: Path) -> None:
    lines = {
        "noun": '02084071 05 n 01 dog 0 001 @ 02083346 n 0000 | a domestic canine; kept by man; "the dog barked"  \n',
        "verb": "00001740 29 v 01 breathe 0 000 01 + 02 00 | draw air into the lungs;  \n",
        "adj": '00001740 00 a 01 able 0 000 | having the means; "able to swim"; "she was able"  \n',
        "adv": "00001740 02 r 01 only 0 000 | without any others  \n",
    }
    for part, line in lines.items():
        (tmp_path / f"data.{part}").write_text(LICENCE + line)
    expected = [
        ("a domestic canine; kept by man", "noun.animal"),
        ("draw air into the lungs", "verb.body"),
        ("having the means", "adj.all"),
        ("without any others", "adv.all"),
    ]
    pd.testing.assert_frame_equal(build.read_glosses(tmp_path), pd.DataFrame(expected, columns=["text", "class"]))


def test_a_missing_source_names_the_package(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, SCRIPT, "--source", tmp_path], capture_output=True, text=True, check=False)
    message = f"`{tmp_path}/data.noun` is missing; run `apt-get install wordnet-base`, or pass --source.\n"
    assert (done.returncode, done.stderr) == (1, message)


def test_no_gloss_repeats_after_normalisation() -> None:
    table = pd.read_parquet(SCRIPT.with_name("glosses.parquet"))
    normal = [re.sub(r"\W+", " ", text.lower()).strip() for text in table["text"]]
    assert len(set(normal)) == len(table) == 8_200
    assert (SCRIPT.with_name("glosses.parquet").stat().st_size) < 1_000_000
