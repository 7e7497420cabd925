# SPDX-License-Identifier: Apache-2.0
"""What can go wrong between a client and the Hub, on order: connections that drop, short and slow downloads, storage
that corrupts."""

import re
from dataclasses import dataclass, field
from typing import BinaryIO


class Dropped(Exception):  # noqa: N818
    """The connection is closed without an answer."""


@dataclass
class Fault:
    """Applies to the next `times` requests whose "METHOD /path" matches.

    Attributes:
        after: bytes of the body, sent or received, after which the connection closes; None for all.
        pause: seconds between pieces of the answer's body.
    """

    request: str
    after: int | None = None
    pause: float = 0.0
    times: int = 1


@dataclass
class Faults:
    """`uploads` and `downloads` to come; `part_size` above which uploads are in parts; `corrupt` what is stored."""

    uploads: list[Fault] = field(default_factory=list)
    downloads: list[Fault] = field(default_factory=list)
    part_size: int = 5 << 20
    corrupt: bool = False

    def clear(self) -> None:
        self.__init__()  # type: ignore[misc]

    @staticmethod
    def take(faults: list[Fault], method: str, path: str) -> Fault | None:
        for fault in faults:
            if fault.times > 0 and re.match(fault.request, f"{method} {path}"):
                fault.times -= 1
                return fault
        return None

    def read(self, method: str, path: str, file: BinaryIO, length: int) -> bytes:
        """The body of a request, unless its connection drops."""
        fault = self.take(self.uploads, method, path)
        body = file.read(length if fault is None or fault.after is None else min(length, fault.after))
        if fault is not None or len(body) < length:
            raise Dropped
        return body

    def download(self, method: str, path: str, length: int) -> tuple[int, float]:
        """How many bytes of an answer are sent, and the pause between its pieces."""
        fault = self.take(self.downloads, method, path)
        if fault is None:
            return length, 0.0
        return length if fault.after is None else min(length, fault.after), fault.pause

    def stored(self, content: bytes) -> bytes:
        return content[:-1] + bytes([content[-1] ^ 1]) if self.corrupt else content
