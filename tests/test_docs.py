"""What the documentation shows: commands and options exist, Python compiles, studies are valid, the reference is whole."""

import re
import runpy
import shlex
from pathlib import Path

import pytest
import typer.main
import yaml

import rankscope as rs
from rankscope.cli import app
from rankscope.settings import AxolotlSettings, read_study

DOCS = Path("docs")
PAGES = sorted(path for path in DOCS.rglob("*.md") if path.name != "study-keys.md")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)
WORDS = {"N": "1000", "TOOL": "peft", "on|off|auto": "on"}  # what stands for a value


def blocks(page: Path, language: str) -> list[str]:
    return [text for kind, text in BLOCK.findall(page.read_text(encoding="utf-8")) if kind == language]


def commands(text: str) -> list[list[str]]:
    """The `rankscope …` of code blocks and of `code` in text, as words."""
    lines = re.findall(r"^\$ rankscope (.*)$", text, flags=re.MULTILINE)
    lines += re.findall(r"(?<!`)`rankscope ([a-z][^`]*)`", text)
    return [shlex.split(re.sub(r"\s+", " ", line), comments=True) for line in lines]


def check_command(words: list[str]) -> None:
    """Parse it as the command line does, without running it; raises where a command or an option does not exist."""
    name, *arguments = words
    command = typer.main.get_command(app).commands[name]
    if arguments and not {"--help"} & set(arguments):
        arguments = [WORDS.get(word, word) for word in arguments]
        context = command.make_context(name, arguments, resilient_parsing=False)
        context.close()


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_what_a_page_shows_is_valid(page: Path, tmp_path: Path) -> None:
    for words in commands(page.read_text(encoding="utf-8")):
        if "{" not in " ".join(words):  # a shell's list of folders
            check_command(words)
    for code in blocks(page, "python"):
        compile(code, str(page), "exec")
    for text in blocks(page, "yaml"):
        content = yaml.safe_load(text)
        if "plugins" in content:  # of axolotl
            AxolotlSettings.of(content["rankscope"])
        elif set(content) - {"task", "budget"} or ("budget" in content and "task" in content):
            path = tmp_path / "my.yaml"
            path.write_text(text, encoding="utf-8")
            assert read_study(path).name
        else:  # a single section
            study = tmp_path / "my.yaml"
            study.write_text(yaml.safe_dump({"task": "digits-shift", "budget": {"uniform_rank": 1}} | content))
            assert read_study(study).name


def test_a_mistyped_command_or_option_would_be_found() -> None:
    for wrong in (["serach", "my.yaml"], ["search", "my.yaml", "--trails", "3"], ["export", "a", "--to"]):
        with pytest.raises(Exception):  # noqa: B017 - of typer or click, by version
            check_command(wrong)


def test_the_page_of_commands_has_each_with_its_options() -> None:
    page = runpy.run_path("docs/build.py")["commands"]()
    for name, command in typer.main.get_command(app).commands.items():
        section = page.partition(f"## `rankscope {name}`")[2].partition("\n## ")[0]
        options = [option for parameter in command.params for option in parameter.opts if option.startswith("--")]
        assert all(f"`{option}" in section or f"/{option}" in section for option in options)


def test_every_public_name_is_in_the_reference() -> None:
    shown = re.findall(r"^::: rankscope\.(\w+)$", (DOCS / "api.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert sorted(shown) == sorted(name for name in rs.__all__ if name != "__version__")


def test_every_page_is_in_the_navigation() -> None:
    text = Path("mkdocs.yml").read_text(encoding="utf-8")
    shown = set(re.findall(r"^ +- (?:Home: )?([\w/-]+\.md)$", text.partition("\nnav:")[2], flags=re.MULTILINE))
    made = set(runpy.run_path("docs/build.py")["PAGES"].values()) | {"commands.md"}
    assert shown == {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")} | made


def test_links_lead_somewhere() -> None:
    """In the repository, as readers of it follow them; mkdocs checks those of the site."""
    made = {"commands.md", "changelog.md", "contributing.md"}
    for page in [*PAGES, Path("README.md"), Path("CONTRIBUTING.md")]:
        for link in re.findall(r"\]\(([^)#\s:]+)[)#]", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists() or link.rpartition("/")[2] in made, f"{page}: {link}"
