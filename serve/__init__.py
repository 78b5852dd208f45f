"""Talking to a finished run, and watching one that trains."""

from __future__ import annotations

import socket

from jaxchat.errors import UsageError


def bind(host: str, port: int) -> socket.socket:
    """Return a listening socket; `UsageError` where the address cannot be had."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        raise UsageError(f"cannot serve on {host}:{port} ({error}); choose another --port or --host") from None
