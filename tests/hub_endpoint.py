# SPDX-License-Identifier: Apache-2.0
"""A Hub on loopback: huggingface.co's HTTP protocol for the unmodified `huggingface_hub` client.

Model repositories with branches, pull requests and their histories, held in memory; public or private, a bearer token
to write. Files that end in `LFS_SUFFIXES` travel by git LFS (batch, presigned PUT in one or in parts, verify;
downloads by redirect and in ranges), the others inside the commit. All hashes are computed from the bytes received.
There is no xet: the clients run with HF_HUB_DISABLE_XET=1.
"""

import os
import subprocess
import sys
import threading
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from transformers.utils.hub import hf_api

from .hub.faults import Fault, Faults
from .hub.handler import Handler
from .hub.store import HubStore


__all__ = ["Fault", "Handler", "HubEndpoint", "connect", "fresh_environment", "run_fresh"]

ROOT = Path(__file__).resolve().parents[1]


class HubEndpoint(HubStore):
    """Serves at `url` (for HF_ENDPOINT) while entered as a context; `token` of `user` is the one that may write.

    `requests` are the (method, path, status) of all requests, 0 for connections that were dropped; `faults` orders
    what is to go wrong.
    """

    def __init__(self, user: str = "owner"):
        super().__init__(user)
        self.requests: list[tuple[str, str, int]] = []
        self.faults = Faults()
        verbs = {f"do_{verb}": Handler.serve for verb in ("GET", "HEAD", "POST", "PUT")}
        state = {"store": self, "faults": self.faults, "log": self.requests, "lock": threading.Lock(), "uploads": {}}
        bound = type("BoundHandler", (Handler,), {**state, **verbs})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), bound)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        bound.url = self.url

    def __enter__(self) -> "HubEndpoint":
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


def connect(monkeypatch: Any, hub: HubEndpoint, token: str | None) -> None:
    """Make `hub` the Hub of this process, which was started offline. Uploads need no more than this; downloads read
    the address when `huggingface_hub` is imported and need a fresh process."""
    settings = {"ENDPOINT": hub.url, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True, "HF_TOKEN_PATH": os.devnull}
    for name, value in settings.items():
        monkeypatch.setattr(constants, name, value)
    # transformers' own client, which keeps the address it was first used with
    monkeypatch.setattr(hf_api(), "endpoint", hub.url)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1,localhost")
    monkeypatch.setenv("HF_TOKEN", token or "")


def fresh_environment(hub: HubEndpoint, home: Path, token: str | None) -> dict[str, str]:
    """For a process whose only Hub is `hub`, with its cache and its settings in `home`."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    return {
        **inherited,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        **({} if token is None else {"HF_TOKEN": token}),
    }


def run_fresh(hub: HubEndpoint, home: Path, *words: object, token: str | None = None) -> subprocess.CompletedProcess:
    """Run Python in a fresh process with a fresh cache."""
    command = [sys.executable, *map(str, words)]
    environment = fresh_environment(hub, home, token)
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
