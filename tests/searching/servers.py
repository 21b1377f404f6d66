"""Servers on loopback: PostgreSQL from Debian's packages, as an unprivileged user, and Optuna's gRPC proxy."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


class Postgres:
    """A server in a temporary folder. It refuses to run as root, so then it runs as `nobody`."""

    def __init__(self) -> None:
        programs = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
        if not programs:
            pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
        self._programs, self.port = programs[-1].parent, free_port()
        self._folder = Path(tempfile.mkdtemp(prefix="rankscope-postgres-"))
        self._user = pwd.getpwnam("nobody") if os.geteuid() == 0 else None
        if self._user:
            os.chown(self._folder, self._user.pw_uid, -1)
        self._run("initdb", "--auth=trust", "--username=me", "--no-sync")
        self.start()

    def _run(self, program: str, *arguments: str) -> None:
        command = [self._programs / program, "-D", self._folder / "data", *arguments]
        user = {"user": self._user.pw_uid} if self._user else {}
        with (self._folder.parent / f"{self._folder.name}.log").open("a") as log:
            subprocess.run(command, check=True, stdout=log, stderr=log, cwd=self._folder, **user)

    def start(self) -> None:
        options = f"-p {self.port} -k {self._folder} -c listen_addresses=127.0.0.1 -c fsync=off"
        self._run("pg_ctl", "-w", "-o", options, "start")

    def restart(self, away: float = 0.0) -> None:
        """Stop at once, as a crash does, and start again after so many seconds."""
        self._run("pg_ctl", "-m", "immediate", "stop")
        time.sleep(away)
        self.start()

    def database(self, name: str) -> str:
        """The URL of a new database."""
        subprocess.run(
            [self._programs / "createdb", "-h", "127.0.0.1", "-p", str(self.port), "-U", "me", name], check=True
        )
        return f"postgresql://me:secret@127.0.0.1:{self.port}/{name}"

    def stop(self) -> None:
        self._run("pg_ctl", "-m", "immediate", "stop")
        shutil.rmtree(self._folder)


PROXY = """
import sys
import optuna
storage = optuna.storages.RDBStorage(sys.argv[1], engine_kwargs={"connect_args": {"timeout": 60}})
optuna.storages.run_grpc_proxy_server(storage, host="127.0.0.1", port=int(sys.argv[2]))
"""


@contextmanager
def grpc_proxy(database: str) -> Iterator[str]:
    """The URL of Optuna's proxy on an SQLite database."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", PROXY, database, str(port)], stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 60
        while socket.socket().connect_ex(("127.0.0.1", port)):
            assert time.monotonic() < deadline, "the proxy did not start"
            assert process.poll() is None, "the proxy ended"
            time.sleep(0.1)
        yield f"grpc://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()
