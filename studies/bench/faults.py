"""Faults, for real: damaged files, a full disk, a read-only folder, Ctrl-C. What is lost, and what the user reads.

    python studies/bench/faults.py --out studies/results/faults.json

A row is a case: how many `tries`, how many `refused` with one line, how many were `harmless` (the content was the same), how many
went `lost` (something else was read, or an earlier file was harmed), a `message`, and for Ctrl-C the `seconds` until the command
said so, and until it had `ended`. The disk is a small tmpfs; where mounting is not allowed, its cases are left out, which a row
says. Killed workers and databases are shown in scale_out.py.

`--quick`: fewer damaged files, and Ctrl-C in one command.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _harness import Claim, run_benchmark
from large_inventories import Inventory
from safetensors.torch import save_file
from typer.testing import CliRunner

import rankscope as rs
from rankscope.cli import app
from rankscope.comparison import read_comparison
from rankscope.errors import RankscopeError
from rankscope.files import read_json, read_tensors, seal_tensors, write_json
from rankscope.profiling import read_profile

HEARD = 5.0  # seconds after Ctrl-C
TASK = """
from pathlib import Path
from rankscope.tasks import DigitsShift

class Marked(DigitsShift):
    def loss(self, model, batch):
        Path("started").touch()
        return super().loss(model, batch)

def make():
    return Marked()
"""
STUDY = """
name: faults
task: task.py:make
budget: {uniform_rank: 1}
profile: {head_steps: 2000, keep_partial: true}
training: {steps: 400, learning_rate: 0.01}
compare: {methods: [uniform], n_seeds: 4, n_tuning_seeds: 1}
"""
COMMANDS = {
    "profile, in the head's warm-up": ["profile"],
    "train": ["train", "--allocation", "allocation.json"],
    "compare --jobs 2": ["compare", "--jobs", "2"],
}


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


def interrupted(folder: Path, commands: dict[str, list[str]]) -> Iterator[dict[str, Any]]:
    """Ctrl-C once, and twice in a row, while a command works."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, and so would ours
    (folder / "task.py").write_text(TASK)
    (folder / "faults.yaml").write_text(STUDY)
    targets = rs.find_targets(rs.load_task("digits-shift").build_model())
    rs.RankAllocation(targets, (1,) * 36, strategy="uniform").to_json(folder / "allocation.json")
    for name, (command, *flags) in commands.items():
        for times in (1, 2):
            (folder / "started").unlink(missing_ok=True)
            words = [sys.executable, "-m", "rankscope", command, "faults.yaml", "--out", f"{command}-{times}", *flags]
            process = subprocess.Popen(words, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            while not (folder / "started").exists() and process.poll() is None:
                time.sleep(0.1)
            time.sleep(1.0)
            began = time.monotonic()
            for _ in range(times):
                process.send_signal(signal.SIGINT)
                time.sleep(0.3 * (times - 1))
            assert process.stderr is not None
            lines, heard = [], None
            for line in process.stderr:
                if line.startswith(("rankscope:", "Traceback")):  # others tell how far the command is
                    heard = heard or time.monotonic() - began
                    lines.append(line.rstrip())
            told = process.wait() in (130, -signal.SIGINT) and len(lines) == 1
            yield {
                "case": f"Ctrl-C {'once' if times == 1 else 'twice'}: {name}", "tries": 1,
                "lost": int(not told), "status": process.returncode,
                "seconds": heard, "ended": time.monotonic() - began, "message": " ".join(lines[-3:]),
            }  # fmt: skip


def measure(quick: bool) -> tuple[list[dict[str, Any]], list[Claim]]:
    """All cases."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows += damaged(folder, 40 if quick else 400)
        rows += disks(folder)
        rows += interrupted(folder, dict(list(COMMANDS.items())[: 1 if quick else None]))
    slowest = max(row["seconds"] or 0.0 for row in rows if "seconds" in row)
    harmed = [row for row in rows if row["case"].endswith(("flipped", "cut off"))]
    return rows, [
        Claim.at_most(f"damaged files read as something else, of {sum(row['tries'] for row in harmed):,}",
                      sum(row["lost"] for row in harmed), 0),
        Claim.at_most("full disks and read-only folders that harm a file or take more than a line",
                      sum(row["lost"] for row in rows if row["case"] in ("disk full", "read-only folder")), 0),
        Claim.at_most("interrupted commands that say more than a line",
                      sum(row["lost"] for row in rows if row["case"].startswith("Ctrl-C")), 0),
        Claim.at_most("seconds until Ctrl-C is heard", slowest, HEARD),
    ]  # fmt: skip


if __name__ == "__main__":
    run_benchmark(measure, __doc__ or "")
