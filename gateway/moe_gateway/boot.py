"""What a worker of a pod is given by its parent before it serves: a line of JSON, and sockets that are open already."""

from __future__ import annotations

import socket
from dataclasses import dataclass

from pydantic import Field

from moe_api.base import Model
from moe_core.config import GatewayConfig, SiblingsConfig

SERVE = b"serve\n"
"""The parent's word that a worker has every command of before and may take requests."""


class Boot(Model):
    """First line on a worker's stdin. The end of its stdin is the end of its parent."""

    config: GatewayConfig
    hash: str = Field(description="of the file that the configuration is from")
    listen_fd: int = Field(description="the pod's listening socket, which all its workers accept from")
    siblings: SiblingsConfig | None = None
    tell_fd: int | None = Field(default=None, description="this worker's own port among its siblings (UDP)")
    tell_key: str | None = Field(default=None, description="what signs their datagrams where no file does")


@dataclass(frozen=True)
class Inherited:
    """Sockets of a worker, as its server uses them."""

    listen: socket.socket
    siblings: SiblingsConfig | None = None
    tell: socket.socket | None = None
    tell_key: bytes | None = None


def inherited(boot: Boot) -> Inherited:
    """The sockets of a process that was started with their descriptors."""
    listen = socket.socket(fileno=boot.listen_fd)
    listen.setblocking(False)
    tell = None if boot.tell_fd is None else socket.socket(fileno=boot.tell_fd)
    if tell is not None:
        tell.setblocking(False)
    return Inherited(listen, boot.siblings, tell, None if boot.tell_key is None else boot.tell_key.encode())
