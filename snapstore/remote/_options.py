"""``StoreOptions.remote_options``: what is the tier's own, and what goes to obstore."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from snapstore._options import seconds

MiB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class TierOptions:
    """Choices of a tier.

    Attributes:
        transfers: threads that talk to the remote store.
        max_in_flight_bytes: of uploads at once.
        timeout_s: for each request, and for each answer that a caller waits for.
        node: this node's name, of which each remote life has a hash in its name; the host's by default.
    """

    transfers: int = 8
    max_in_flight_bytes: int = 256 * MiB
    timeout_s: float = 10.0
    node: str | None = None

    def __post_init__(self) -> None:
        for name in ("transfers", "max_in_flight_bytes"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"remote_options[{name!r}] must be an int, not {type(value).__name__}")
            if value < 1:
                raise ValueError(f"remote_options[{name!r}] must be 1 or more, not {value}")
        if not seconds(self.timeout_s, "remote_options['timeout_s']"):
            raise ValueError("remote_options['timeout_s'] must be more than 0")
        if self.node is not None and not isinstance(self.node, str):
            raise TypeError(f"remote_options['node'] must be a str, not {type(self.node).__name__}")


def split_options(given: Mapping[str, Any]) -> tuple[TierOptions, dict[str, Any]]:
    """The tier's own, and the rest."""
    known = {option.name for option in fields(TierOptions)}
    own = {name: value for name, value in given.items() if name in known}
    return TierOptions(**own), {name: value for name, value in given.items() if name not in known}
