"""The command before any work: what it imports, what it says to a mistyped word, and how it leaves."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rankscope.cli import app
from rankscope.cli.templates import TYPES
from rankscope.settings import read_study

HEAVY = "torch transformers peft optuna sklearn pandas accelerate matplotlib scipy pyarrow numpy".split()  # noqa: SIM905


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["search", "--help"], 0),
        (["serach", "a.yaml"], 2),
        (["search", "a.yaml", "--trails", "3"], 2),
        (["search"], 2),
        (["search", "a.yaml", "--trials", "many"], 2),
        (["profile", "none.yaml"], 2),
        (["profile", "README.md"], 2),
        (["search", "studies/digits.yaml", "--set", "search.sampler=tpo"], 2),
        (["profile", "studies/digits.yaml", "--set", "task=digits-shit"], 2),
        (["profile", "studies/digits.yaml", "--set", "task=none.py:make"], 2),
        (["profile", "studies/digits.yaml", "--set", "task={type: chats}"], 2),
        (["profile", "studies/digits.yaml", "--set", "task={type: chat, model: ./none, data: none.csv}"], 2),
        (["profile", "studies/digits.yaml", "--set", "task={type: chat, model: ./none, data: org/set}"], 2),
        (["train", "studies/digits.yaml", "--out", "none"], 2),
        (["report", "none"], 2),
        (["export", "none", "--to", "trl"], 2),
        (["export", "studies", "--to", "llama-factory"], 2),
        (["export", "none", "--padded"], 2),
        (["shrink", "none", "--parameters", "3"], 2),
    ],
)
def test_what_needs_no_work_imports_nothing_heavy(arguments: list[str], status: int) -> None:
    code = f"""
import sys
from pathlib import Path
from rankscope.cli import main
sys.argv = ["rankscope", *{arguments!r}]
try:
    main()
except SystemExit as done:
    print()
    print(done.code, sorted({set(HEAVY)!r} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == f"{status} []"


@pytest.mark.parametrize(
    ("arguments", "nearest"),
    [
        (["serach", "a.yaml"], "search"),
        (["search", "a.yaml", "--trails", "3"], "--trials"),
        (["compare", "a.yaml", "--method", "eva"], "--methods"),
    ],
)
def test_the_nearest_word_is_named_on_one_line(arguments: list[str], nearest: str) -> None:
    """In the words of typer or click, which differ between versions."""
    result = CliRunner().invoke(app, arguments)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert result.stderr.startswith("rankscope: No such ")
    assert nearest in re.findall(r"[a-z-]+", result.stderr.partition("No such ")[2])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--trials", "0"], "`--trials`: `search.n_trials`: input should be greater than 0, but got 0."),
        (["--trials", "3", "--set", "search.n_trials=4"],
         "`search.n_trials` must be given once, but is by --trials and --set; drop one."),
        (["--set", "search={n_trails: 4}"], "`--set`: unknown key `search.n_trails`; did you mean `search.n_trials`?"),
    ],
)  # fmt: skip
def test_a_flag_is_blamed_for_what_it_gives(flags: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["search", "studies/digits.yaml", *flags])
    assert (result.exit_code, result.stderr) == (2, f"rankscope: {message}\n")


def test_init_writes_a_study_of_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert CliRunner().invoke(app, ["init", "mine.yaml"]).exit_code == 0
    assert read_study("mine.yaml").name == "mine"
    result = CliRunner().invoke(app, ["init", "../x"])
    assert result.stderr.startswith("rankscope: `NAME`: `name`: must be fit to name a folder")


@pytest.mark.parametrize("kind", TYPES)
def test_init_writes_a_study_for_each_type(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its options are those of the task, also the ones in comments."""
    from rankscope.tasks import ready

    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["init", "mine", "--type", kind])
    assert result.stdout == "wrote mine.yaml; name your model and data there; then: rankscope profile mine.yaml\n"
    text = Path("mine.yaml").read_text()
    assert max(map(len, text.splitlines())) <= 130
    study = read_study("mine.yaml")
    assert (study.name, study.compare.n_seeds) == ("mine", 5)
    if kind == "trainer":
        assert study.task == "train.py:make_trainer"
        return
    for task in (study.task, read_study(_uncommented(text, tmp_path / "all.yaml")).task):
        options = dict(task)
        factory = ready._TYPES[options.pop("type")]
        ready._check_options(factory, ready._common(factory, options), what=kind)


def _uncommented(text: str, path: Path) -> Path:
    """The study with the options that stand in comments."""
    path.write_text(re.sub(r"^(  |)# (\w+: )", r"\1\2", text, flags=re.MULTILINE))
    return path


def test_what_init_cannot_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["init", "mine", "--type", "chats"])
    assert result.stderr.startswith("rankscope: `--type` must be one of sequence-classification, causal-lm, chat, ")
    result = CliRunner().invoke(app, ["init", "mine", "--type", "chat", "--template", "digits"])
    assert result.stderr == "rankscope: one of --type TYPE and --template NAME may be given, and not both; drop one.\n"
    assert not list(tmp_path.iterdir())


def test_the_help_at_80_columns_cuts_nothing() -> None:
    result = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"})
    assert "..." not in result.stdout.partition("Commands:")[2]
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert "every target module into profile.parquet, and draw them." in " ".join(result.stdout.split())
    assert "--install-completion" in result.stdout


def test_completion_is_installed_and_completes(tmp_path: Path) -> None:
    def run_with(*arguments: str, **variables: str) -> str:
        given = {**os.environ, "HOME": str(tmp_path), **variables}
        code = "import sys; from rankscope.cli import main; sys.argv[0] = 'rankscope'; main()"
        command = [sys.executable, "-c", code, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, env=given).stdout

    run_with("--install-completion", "bash", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert (tmp_path / ".bash_completions" / "rankscope.sh").exists()
    completing = {"_RANKSCOPE_COMPLETE": "complete_bash", "COMP_WORDS": "rankscope tr", "COMP_CWORD": "1"}
    assert run_with(**completing).split() == ["train"]


PROGRESS = """
import sys, time
import rankscope.cli.session as session
from rankscope.training.watching import tell
session.EVERY = 0.05
with session.progress("training") as update:
    with session.progress("loading model and data"):
        time.sleep(0.3)
    update(1, 4)
    tell("step", 20, 300)
    time.sleep(0.3)
time.sleep(0.1)
"""


def test_off_terminals_progress_is_a_line_now_and_then() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRESS], capture_output=True, text=True, check=True)
    lines = done.stderr.splitlines()
    assert done.stdout == ""
    assert lines[0] == "loading model and data (0 min)"
    assert lines[-1] == "training: 1 of 4, step 20 of 300 (0 min)"
    assert 4 < len(lines) < 15


TALKS = """
import rankscope.cli as cli
from rankscope.cli import reports_errors

@cli.app.command("talk")
@reports_errors
def talk() -> None:
    {work}

import sys
from pathlib import Path
sys.argv = ["rankscope", "talk"]
cli.main()
"""


def run(work: str, **options: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", TALKS.format(work=work)], stderr=subprocess.PIPE, text=True, check=False, **options
    )


@pytest.mark.parametrize("work", ["print('a' * 10**6)", "print('a')"])
def test_a_reader_that_goes_is_no_error(work: str) -> None:
    reader = subprocess.Popen(["true"], stdin=subprocess.PIPE)
    reader.wait()
    done = run(work, stdout=reader.stdin)
    reader.stdin.close()
    assert (done.returncode, done.stderr) == (141, "")


def test_another_broken_pipe_is_an_error() -> None:
    """As a worker's that died, where the output can still be read."""
    done = run("raise BrokenPipeError(32, 'Broken pipe')", stdout=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (2, "rankscope: [Errno 32] Broken pipe\n")


def test_a_path_that_cannot_be_used_is_one_line() -> None:
    done = run("open('/none/a', 'w')", stdout=subprocess.PIPE)
    message = "rankscope: `/none/a` cannot be used (No such file or directory); check the path.\n"
    assert (done.returncode, done.stderr) == (2, message)


def test_an_interrupt_is_one_line() -> None:
    done = run("import signal; signal.raise_signal(signal.SIGINT)", stdout=subprocess.DEVNULL)
    assert (done.returncode, done.stderr) == (130, "rankscope: interrupted; files are written whole or not at all.\n")


def test_a_terminal_without_our_signs_gets_their_codes() -> None:
    done = run(r"print('0.1 \u00b1 0.2')", stdout=subprocess.PIPE, env={"PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stdout, done.stderr) == (0, "0.1 \\xb1 0.2\n", "")


def test_a_narrow_terminal_cuts_no_figure() -> None:
    table = """
from rankscope.cli.session import print_table
columns = {"method": "{m}", "parameters": "{p:,}", "test": "{t}"}
print_table("[t]", columns, [{"m": "controller-one-shot", "p": 6912, "t": "+0.0 [-12.0, +12.0]"}])
"""
    done = subprocess.run(
        [sys.executable, "-c", table], capture_output=True, text=True, env={**os.environ, "COLUMNS": "30"}, check=True
    )
    assert all(text in done.stdout for text in ("[t]", "controller-o", "ne-shot", "6,912", "+0.0 [-12.0, +12.0]"))


def test_names_are_shortened_and_blocks_stay_apart() -> None:
    table = """
from rankscope.cli.session import print_table
names = [f"model.vision_tower.encoder.layers.{i}.self_attn.out_proj" for i in (3, 11)]
columns = {"module": "{m}", "rank cost": "{p:,}", "energy": "{p:.3f}", "signal": "{p:.3f}", "in rank 1": "{p:.6f}"}
print_table("t", columns, [{"m": name, "p": 128} for name in names])
"""
    for width, shown in (("140", "model.vision_tower.encoder.layers.3.self_attn.out_proj"), ("80", "3…out_proj")):
        environment = {**os.environ, "COLUMNS": width}
        done = subprocess.run(
            [sys.executable, "-c", table], capture_output=True, text=True, env=environment, check=True
        )
        assert shown in done.stdout
        assert shown.replace("3", "11") in done.stdout
        assert max(map(len, done.stdout.splitlines())) <= int(width)
        assert len(done.stdout.splitlines()) == 7


def test_importing_says_nothing() -> None:
    """As in a worker of `--jobs`, where bitsandbytes advised to install a kernel."""
    done = subprocess.run([sys.executable, "-c", "import rankscope.lora"], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


@pytest.mark.parametrize("jobs", [1, 8])
def test_a_flag_wins_over_the_study_whether_it_is_higher_or_lower(
    jobs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    monkeypatch.setattr("rankscope.cli.commands.run_compare", lambda session, **_: found.append(session.study.compare))
    study = tmp_path / "s.yaml"
    study.write_text("task: digits-shift\nbudget: {uniform_rank: 1}\ncompare: {n_jobs: 4, n_seeds: 5}\n")
    result = CliRunner().invoke(app, ["compare", str(study), "--jobs", str(jobs), "--out", str(tmp_path / "out")])
    assert (result.exit_code, result.output) == (0, "")
    assert [(each.n_jobs, each.n_seeds) for each in found] == [(jobs, 5)]
