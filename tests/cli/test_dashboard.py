"""`rankscope dashboard` as a real process: what a browser sees, how it ends, and one line for bad input."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.request import urlopen

import optuna
import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from tests.cli.terminal import invoke

STUDY = """
task: digits-shift
budget: {uniform_rank: 1}
profile: {head_steps: 5}
training: {steps: 2, learning_rate: 0.01}
search: {n_trials: 3, confirm_fraction: 0}
"""
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
needs_chromium = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs Debian's Chromium: apt-get install chromium chromium-driver"
)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1500,1500",
)  # fmt: skip
PATIENCE = 60  # seconds until a page must show something, on a busy machine


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A study file, and the output folder of its search."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "short.yaml").write_text(STUDY)
    assert invoke("search", folder / "short.yaml", "--out", folder / "out")[0] == 0
    return folder / "short.yaml", folder / "out"


@contextmanager
def running(*arguments: object, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """`rankscope dashboard` in a process of its own; in the end Ctrl-C must make it leave with status 0 and no complaint."""
    command = [sys.executable, "-m", "rankscope", "dashboard", *map(str, arguments)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job inherits that it is ignored
    ) as process:  # fmt: skip
        try:
            yield process
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=PATIENCE)
            assert (process.returncode, errors) == (0, "")
        finally:
            process.kill()


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path}/browser"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.mark.browser
@needs_chromium
def test_a_browser_shows_a_trial_s_picture_and_the_study_s_note(
    searched: tuple[Path, Path], browser: webdriver.Chrome
) -> None:
    study, out = searched
    with running(study, "--out", out, "--port", 0) as process:
        line = process.stdout.readline()
        shown = re.fullmatch(r"study `short`: (http://127\.0\.0\.1:\d+/dashboard/studies/1) \(Ctrl-C ends\)\n", line)
        assert shown, process.stderr.read()
        wait = WebDriverWait(browser, PATIENCE)

        browser.get(f"{shown[1]}/trials?numbers=2")
        pictures = "return [...document.images].filter(i => i.complete && i.naturalWidth > 0).map(i => i.alt)"
        name = "ranks of trial 2.png"
        wait.until(lambda driver: driver.execute_script(pictures) == [name, name])  # in its note, and as an artifact
        text = browser.find_element(By.TAG_NAME, "body").text
        assert re.search(
            r"sampler, 6,\d{3} adapter parameters: validation accuracy 0\.\d+, [+-]0\.\d{4} to uniform", text
        )

        browser.get(f"{shown[1]}/note")
        wait.until(lambda driver: "Which LoRA rank where" in driver.find_element(By.TAG_NAME, "body").text)
        text = browser.find_element(By.TAG_NAME, "body").text
        assert "one LoRA rank for each of 36 target modules, 6,912 adapter parameters in all at most" in text
        assert "The best value observed is not the recommendation." in text


@contextmanager
def plain_dashboard(out: Path) -> Iterator[str]:
    """`optuna-dashboard` itself on a search's files, as a process of its own; yields its address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [Path(sys.executable).with_name("optuna-dashboard"), f"sqlite:///{out}/search.db", "--port", port]
    command += ["--artifact-dir", out / "artifacts", "--server", "wsgiref", "--quiet"]
    with subprocess.Popen([*map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            for _ in range(10 * PATIENCE):
                with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                    break
                time.sleep(0.1)
            yield f"http://127.0.0.1:{port}/dashboard/studies/1"
        finally:
            process.kill()


@pytest.mark.browser
@needs_chromium
def test_the_plain_optuna_dashboard_shows_what_the_search_attached(
    searched: tuple[Path, Path], browser: webdriver.Chrome
) -> None:
    _, out = searched
    with plain_dashboard(out) as address:
        wait = WebDriverWait(browser, PATIENCE)
        browser.get(f"{address}/trials?numbers=1")
        pictures = "return [...document.images].filter(i => i.complete && i.naturalWidth > 0).map(i => i.alt)"
        wait.until(lambda driver: driver.execute_script(pictures) == ["ranks of trial 1.png"] * 2)
        assert (
            "one-shot, 6,912 adapter parameters: validation accuracy" in browser.find_element(By.TAG_NAME, "body").text
        )

        browser.get(f"{address}/note")
        wait.until(lambda driver: "★ Recommended: trial" in driver.find_element(By.TAG_NAME, "body").text)
        wait.until(lambda driver: len(driver.execute_script(pictures)) == 1)
        (name,) = browser.execute_script(pictures)
        assert re.fullmatch(r"recommended ranks, trial \d\.png", name)


def test_json_without_a_profile_at_hand_and_with_the_user_s_browser(
    searched: tuple[Path, Path], tmp_path: Path
) -> None:
    study, out = searched
    shutil.copy(out / "search.db", tmp_path / "other.db")
    script = tmp_path / "browser"
    script.write_text(f"#!/bin/sh\necho $1 > {tmp_path}/opened\n")
    script.chmod(0o755)
    arguments = (
        study,
        "--out",
        tmp_path,
        "--set",
        f"search.storage=sqlite:///{tmp_path}/other.db",
        "--port",
        0,
        "--json",
        "--open",
    )
    with running(*arguments, BROWSER=f"{script} %s") as process:
        lines = [process.stdout.readline() for _ in range(4)]
        printed = json.loads("".join(lines))
        assert printed.keys() == {"study", "url"}
        assert printed["study"] == "short"
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/dashboard/studies/1", printed["url"])
        with urlopen(printed["url"], timeout=PATIENCE) as page:  # answered only after the browser was opened
            assert b"<title>Optuna Dashboard</title>" in page.read()
        assert (tmp_path / "opened").read_text() == f"{printed['url']}\n"
    assert {path.name for path in tmp_path.iterdir()} == {"other.db", "browser", "opened"}


def test_a_port_in_use_is_one_line(searched: tuple[Path, Path]) -> None:
    study, out = searched
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status, stdout, stderr = invoke("dashboard", study, "--out", out, "--port", port)
    assert (status, stdout) == (2, "")
    assert stderr == (
        f"rankscope: `port` must be one to listen on, but {port} is not (address already in use); "
        "choose another, or 0 for any that is free.\n"
    )


def test_no_search_yet_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "short.yaml").write_text(STUDY)
    status, stdout, stderr = invoke("dashboard", tmp_path / "short.yaml", "--out", tmp_path / "out")
    assert (status, stdout) == (2, "")
    assert stderr == (
        f"rankscope: `storage` must hold an earlier search, but there is no file `{tmp_path}/out/search.db`; "
        "run `rankscope search` first.\n"
    )
    assert not (tmp_path / "out").exists()


def test_a_storage_with_other_studies_only(tmp_path: Path) -> None:
    (tmp_path / "short.yaml").write_text(STUDY)
    url = f"sqlite:///{tmp_path}/other.db"
    optuna.create_study(storage=url, study_name="mine")
    status, _, stderr = invoke("dashboard", tmp_path / "short.yaml", "--set", f"search.storage={url}")
    assert status == 2
    assert stderr == (
        "rankscope: `storage` must hold a search of study `short`, but its studies are: mine; "
        "run `rankscope search` first.\n"
    )
    optuna.create_study(storage=url, study_name="short")
    status, _, stderr = invoke("dashboard", tmp_path / "short.yaml", "--set", f"search.storage={url}")
    assert status == 2
    assert stderr == (
        "rankscope: study `short` must be rankscope's, but is foreign; use another study name or storage.\n"
    )


@pytest.mark.parametrize("content", [b"nothing of the kind", b""])  # an empty file is a database without tables
def test_a_file_that_is_no_database_is_left_alone(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "short.yaml").write_text(STUDY)
    (tmp_path / "search.db").write_bytes(content)
    status, _, stderr = invoke("dashboard", tmp_path / "short.yaml", "--out", tmp_path)
    assert status == 2
    assert re.fullmatch(
        r"rankscope: `storage` must be a database that Optuna can open, but 'sqlite:///.*/search\.db' is not: .*\n",
        stderr,
    )
    assert (tmp_path / "search.db").read_bytes() == content


def test_without_the_extra_it_is_named(tmp_path: Path) -> None:
    (tmp_path / "short.yaml").write_text(STUDY)
    code = "import sys; sys.modules['optuna_dashboard'] = None; from rankscope.cli import main; main()"
    command = [sys.executable, "-c", code, "dashboard", str(tmp_path / "short.yaml"), "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "rankscope: the dashboard needs the package optuna-dashboard, but it is not installed; "
        "run pip install 'rankscope[dashboard]'.\n"
    )
