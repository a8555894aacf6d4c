"""Log records that machines can read too: the event comes first in the text, and with its facts in ``extra``.

A failure has the reason that also labels its metric (``_reasons``). What fails again and again is told once, then
summed up now and then, and once more when it works again.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

from snapstore._reasons import reason_of

SUMMARY_S = 60.0
"""While something goes on failing: how often it is summed up."""


class Repeats:
    """The failures of one thread's work, as log records. For that thread alone.

    Args:
        log: where they go.
        event: of one failure; ``<event>_again`` sums up, ``<event>_over`` says that it works again.
        monotonic_s: the clock.
    """

    def __init__(self, log: logging.Logger, event: str, monotonic_s: Callable[[], float]) -> None:
        self._log = log
        self._event = event
        self._monotonic_s = monotonic_s
        self._failed = 0
        self._untold: Counter[str] = Counter()
        self._told_s = 0.0

    def failed(self, error: BaseException, what: str, **facts: Any) -> None:
        """``what`` failed: a warning if it is the first time or of a new reason, else one more to be summed up."""
        reason = reason_of(error)
        known = self._failed > 0 and reason in self._untold
        self._failed += 1
        extra = {"event": self._event, "reason": reason, **facts}
        text = f"{type(error).__name__}: {error}"
        self._log.log(
            logging.DEBUG if known else logging.WARNING,
            "%s (%s): %s: %s; what follows of this kind is summed up",
            self._event,
            reason,
            what,
            text,
            extra=extra,
        )
        if not known:
            self._untold[reason] = 0
            self._told_s = self._told_s or self._monotonic_s()
            return
        self._untold[reason] += 1
        if self._monotonic_s() - self._told_s >= SUMMARY_S:
            self._sum_up(what, text)

    def worked(self) -> None:
        """It has worked: what failed before is over."""
        if self._failed:
            event = f"{self._event}_over"
            extra = {"event": event, "count": self._failed, "reasons": self._reasons()}
            self._log.info("%s: it works again after %d failures", event, self._failed, extra=extra)
            self._failed, self._told_s = 0, 0.0
            self._untold.clear()

    def _sum_up(self, what: str, text: str) -> None:
        event = f"{self._event}_again"
        counts = {reason: count for reason, count in self._reasons().items() if count}
        extra = {"event": event, "count": sum(counts.values()), "reasons": counts}
        shown = ", ".join(f"{reason} {count}" for reason, count in counts.items())
        self._log.warning("%s: %s; the last: %s: %s", event, shown, what, text, extra=extra)
        for reason in self._untold:
            self._untold[reason] = 0
        self._told_s = self._monotonic_s()

    def _reasons(self) -> dict[str, int]:
        return dict(sorted(self._untold.items()))
