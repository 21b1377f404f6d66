"""Servers on loopback: PostgreSQL and MariaDB from Debian's packages, as an unprivileged user, and Optuna's gRPC proxy."""

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
from typing import Any

import pytest


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    """Wait until a process listens on a port of loopback."""
    deadline = time.monotonic() + 60
    while True:
        with socket.socket() as calling:
            if calling.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert time.monotonic() < deadline, "the server did not start"
        assert process.poll() is None, "the server ended"
        time.sleep(0.1)


class Home:
    """A database server's temporary folder, with its log. Servers refuse to run as root, so then they run as `nobody`."""

    def __init__(self, name: str) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix=f"rankscope-{name}-"))
        user = pwd.getpwnam("nobody") if os.geteuid() == 0 else None
        if user:
            os.chown(self.folder, user.pw_uid, -1)
        self.log = (self.folder.parent / f"{self.folder.name}.log").open("a")
        self.options: dict[str, Any] = {"stdout": self.log, "stderr": self.log, "cwd": self.folder}
        self.options |= {"user": user.pw_uid} if user else {}

    def remove(self) -> None:
        self.log.close()
        Path(self.log.name).unlink()
        shutil.rmtree(self.folder)


class Postgres:
    """A PostgreSQL server."""

    def __init__(self) -> None:
        programs = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
        if not programs:
            pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
        self._programs, self.port, self._home = programs[-1].parent, free_port(), Home("postgres")
        self._run("initdb", "--auth=trust", "--username=me", "--no-sync")
        self.start()

    def _run(self, program: str, *arguments: str) -> None:
        command = [self._programs / program, "-D", self._home.folder / "data", *arguments]
        subprocess.run(command, check=True, **self._home.options)

    def start(self) -> None:
        options = f"-p {self.port} -k {self._home.folder} -c listen_addresses=127.0.0.1 -c fsync=off"
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
        self._home.remove()


class MariaDB:
    """A MariaDB server, which `mysql://` opens."""

    def __init__(self) -> None:
        places = f"{os.environ.get('PATH', '')}:/usr/sbin"
        programs = [shutil.which(name, path=places) for name in ("mariadb-install-db", "mariadbd", "mariadb")]
        if None in programs:
            pytest.skip("MariaDB is not installed: apt-get install mariadb-server-core mariadb-client-core")
        install, self._server, self._client = programs
        self.port, self._home = free_port(), Home("mariadb")
        terms = ["--auth-root-authentication-method=normal", "--skip-test-db"]  # root without a password, by socket
        command = [install, "--no-defaults", f"--datadir={self._home.folder}/data", *terms]
        subprocess.run(command, check=True, **self._home.options)
        self.start()

    def start(self) -> None:
        listening = [f"--port={self.port}", "--bind-address=127.0.0.1", f"--socket={self._home.folder}/socket"]
        kept = [f"--datadir={self._home.folder}/data", "--innodb-flush-log-at-trx-commit=2"]  # written, but not synced
        command = [self._server, "--no-defaults", "--skip-name-resolve", *listening, *kept]
        self._process = subprocess.Popen(command, **self._home.options)
        wait_for(self.port, self._process)

    def restart(self, away: float = 0.0) -> None:
        """Stop at once, as a crash does, and start again after so many seconds."""
        self._process.kill()
        self._process.wait()
        time.sleep(away)
        self.start()

    def database(self, name: str) -> str:
        """The URL of a new database."""
        made = f"CREATE DATABASE {name}; GRANT ALL ON {name}.* TO me@127.0.0.1 IDENTIFIED BY 'secret'"
        socket_file = f"--socket={self._home.folder}/socket"
        subprocess.run([self._client, "--no-defaults", socket_file, "--user=root", "-e", made], check=True)
        return f"mysql://me:secret@127.0.0.1:{self.port}/{name}"

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        self._home.remove()


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
        wait_for(port, process)
        yield f"grpc://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()
