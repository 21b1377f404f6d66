"""Faults, for real: damaged files, a full disk, a read-only folder, Ctrl-C. What is lost, and what the user reads.

    python studies/bench/faults.py --out studies/results/faults.json

A row is a case: how many `tries`, how many `refused` with one line, how many were `harmless` (the content was the same), how many
went `lost` (something else was read, an earlier file was harmed, or what is said is not so), a `message`. Ctrl-C has how many
finished trainings were `doubled`, done again by the next call, the `seconds` until the command said that it was interrupted, and
those until it had `ended`, after the last Ctrl-C. The disk is a small tmpfs; where mounting is not allowed, its cases are left
out, which a row says. Killed workers and databases are shown in scale_out.py.

`--quick`: fewer damaged files, and Ctrl-C in `profile` only.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _harness import Claim, run_benchmark
from _interrupts import ENDED, HEARD, interrupted
from large_inventories import Inventory
from safetensors.torch import save_file
from typer.testing import CliRunner

import rankscope as rs
from rankscope.cli import app
from rankscope.comparison import read_comparison
from rankscope.errors import RankscopeError
from rankscope.files import read_json, read_tensors, seal_tensors, write_json
from rankscope.profiling import read_profile


def damaged(folder: Path, tries: int) -> Iterator[dict[str, Any]]:
    """Bits flipped, and ends cut off, at random places of each kind of file."""
    inventory = Inventory("blocks", 60, folder)
    inventory.report()  # which writes comparison.parquet
    tensors = {name: torch.randn(8, 64) for name in ("a", "b")}
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    seal_tensors(folder / "adapter_model.safetensors")
    inventory.profile.to_parquet(folder / "profile.parquet")
    inventory.random.to_json(folder / "allocation.json")
    write_json(folder / "run.json", {"metric": 0.5, "ranks": dict(inventory.random.ranks)}, sealed=True)
    runs = read_comparison(folder / "comparison.parquet")
    runs.assign(schema=2).to_parquet(folder / "comparison.parquet", write_page_checksum=True)
    readers: dict[str, Callable[[Path], Any]] = {
        "profile.parquet": lambda path: (lambda p: (p.table.to_json(), dict(p.metadata)))(read_profile(path)),
        "comparison.parquet": lambda path: read_comparison(path).to_json(),
        "allocation.json": lambda path: rs.RankAllocation.from_json(path).to_dict(),
        "run.json": lambda path: read_json(path, what="a run"),
        "adapter_model.safetensors": lambda path: sorted(
            (name, each.tolist()) for name, each in read_tensors(path, what="weights").items()
        ),
    }
    rng = np.random.default_rng(0)
    for name, read in readers.items():
        path = folder / name
        whole, content = path.read_bytes(), read(path)
        for how in ("a bit flipped", "cut off"):
            row = {"case": f"{name}: {how}", "tries": tries, "refused": 0, "harmless": 0, "lost": 0, "message": ""}
            for place in rng.integers(0, len(whole), tries).tolist():
                data = bytearray(whole[:place] if how == "cut off" else whole)
                if how != "cut off":
                    data[place] ^= 1 << int(rng.integers(8))
                path.write_bytes(bytes(data))
                try:
                    row["harmless" if read(path) == content else "lost"] += 1
                except RankscopeError as error:
                    row["refused"] += 1
                    row["message"] = str(error).replace(f"{folder}/", "")
                except Exception as error:  # a page instead of a line
                    row["lost"] += 1
                    row["message"] = f"{type(error).__name__}: {error}"
            path.write_bytes(whole)
            yield row


@contextmanager
def small_disk(size: str) -> Iterator[Path | None]:
    """A tmpfs of this size; None where mounting is not allowed."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            yield None
            return
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", folder], check=True)


def disks(folder: Path) -> Iterator[dict[str, Any]]:
    """`rankscope allocate` onto a disk that is full, and into a folder that is read-only; what was there must stay."""
    study = folder / "plain.yaml"
    study.write_text("task: digits-shift\nbudget: {uniform_rank: 1}\nallocation: {strategy: uniform}\n")
    with small_disk("64k") as disk:
        if disk is None:
            yield {
                "case": "disk full, read-only folder",
                "tries": 0,
                "lost": 0,
                "message": "mounting is not allowed here",
            }
            return
        earlier = rs.RankAllocation(rs.find_targets(rs.load_task("digits-shift").build_model()), (1,) * 36)
        earlier.to_json(disk / "allocation.json")
        kept = (disk / "allocation.json").read_bytes()
        with suppress(OSError):  # until it is full
            (disk / "filler").write_bytes(b"x" * 2**20)
        for case, before in (("disk full", []), ("read-only folder", ["mount", "-o", "remount,ro", str(disk)])):
            if before:
                subprocess.run(before, check=True)
            result = CliRunner().invoke(app, ["allocate", str(study), "--out", str(disk), "--force"])
            told = result.exit_code == 2 and result.stderr.count("\n") == 1
            unharmed = (disk / "allocation.json").read_bytes() == kept and not list(disk.glob(".*"))
            message = result.stderr.strip().replace(str(disk), "out")
            yield {
                "case": case,
                "tries": 1,
                "refused": int(told),
                "lost": int(not (told and unharmed)),
                "message": message,
            }


def measure(quick: bool) -> tuple[list[dict[str, Any]], list[Claim]]:
    """All cases."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for row in chain(damaged(folder, 40 if quick else 400), disks(folder), interrupted(folder, quick=quick)):
            told = f"{row['lost']} lost: {row['message']}" if row["lost"] else "nothing lost"
            print(f"{row['case']}: {told}", file=sys.stderr, flush=True)
            rows.append(row)
    stopped = [row for row in rows if row["case"].startswith("Ctrl-C")]
    harmed = [row for row in rows if row["case"].endswith(("flipped", "cut off"))]
    return rows, [
        Claim.at_most(f"damaged files read as something else, of {sum(row['tries'] for row in harmed):,}",
                      sum(row["lost"] for row in harmed), 0),
        Claim.at_most("full disks and read-only folders that harm a file or take more than a line",
                      sum(row["lost"] for row in rows if row["case"] in ("disk full", "read-only folder")), 0),
        Claim.at_most(f"interrupts that lose finished work or say what is not so, of {len(stopped)}",
                      sum(row["lost"] for row in stopped), 0),
        Claim.at_most("finished trainings done again after interrupts", sum(row["doubled"] for row in stopped), 0),
        Claim.at_most("seconds until Ctrl-C is heard", max(row["seconds"] or 0.0 for row in stopped), HEARD),
        Claim.at_most("seconds until a second Ctrl-C ends the command",
                      max(row["ended"] for row in stopped if "twice" in row["case"]), ENDED),
    ]  # fmt: skip


if __name__ == "__main__":
    run_benchmark(measure, __doc__ or "")
