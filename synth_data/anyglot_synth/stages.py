"""`Item` and `Stage`: what passes through the pipeline, and what happens to it on the way.

A stage takes an item and gives it back with more in it, or ends it: filtered (its content is not wanted; final) or
failed (something broke; maybe another time). Stages know nothing of processes, of order or of what comes after them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from anyglot_synth.backends import BackendError
from anyglot_synth.dialogue import Dialogue, DialogueError
from anyglot_synth.store import Store
from anyglot_tokenizers.errors import MediaError

OK, FILTERED, FAILED = STATUSES = ("ok", "filtered", "failed")


class Filtered(Exception):
    """Raised by a stage that does not want an item.

    Args:
        reason: a short word for counts: "wer", "silence", "duplicate", ...
        detail: one line with the figures.
    """

    def __init__(self, reason: str, detail: str = "", **facts: Any) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail, self.facts = reason, detail, facts


@dataclass(frozen=True)
class Item:
    """A dialogue on its way.

    Args:
        index: its place in the source, from 0: what keeps the order.
        dialogue: as far as it is.
        status: "ok", "filtered" or "failed".
        stage: where it ended, if it did.
        reason: a short word for counts.
        detail: one line.
        retryable: of a failed one, whether another attempt may succeed.
        facts: what stages measured, by name (JSON): {"wer": [0.0, 0.2]}.
    """

    index: int
    dialogue: Dialogue
    status: str = OK
    stage: str = ""
    reason: str = ""
    detail: str = ""
    retryable: bool = False
    facts: Mapping[str, Any] = field(default_factory=dict)

    def with_facts(self, **facts: Any) -> Item:
        """A copy that knows more."""
        return replace(self, facts={**self.facts, **facts})


class Stage(ABC):
    """One step. Light until `setup`: it travels to worker processes and cluster nodes.

    Its configuration is `config()`: part of the job's fingerprint, so all that changes results must be in it.
    """

    name: ClassVar[str]
    cpus: float = 1.0
    """Cores that one copy takes on a cluster."""
    gpus: float = 0.0
    """Accelerators that one copy takes on a cluster."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """JSON of all that changes what the stage gives, versions of engines included."""

    def setup(self) -> None:
        """Loads what is heavy, once per process."""
        return None

    @abstractmethod
    def run(self, item: Item, store: Store) -> Item:
        """The item, further on. Raises `Filtered`, or `BackendError` where something broke."""

    def __call__(self, item: Item, store: Store) -> Item:
        """`run` with its endings written into the item. An item that has ended passes through.

        Raises:
            StoreError: the disk refuses: that is no matter of one item.
        """
        if item.status != OK:
            return item
        try:
            return self.run(item, store)
        except Filtered as end:
            ended = item.with_facts(**end.facts)
            return replace(ended, status=FILTERED, stage=self.name, reason=end.reason, detail=end.detail)
        except BackendError as error:
            return self._failed(item, "backend", error, error.retryable)
        except (DialogueError, MediaError) as error:
            return self._failed(item, "input", error)

    def _failed(self, item: Item, reason: str, error: Exception, retryable: bool = False) -> Item:
        return replace(item, status=FAILED, stage=self.name, reason=reason, detail=str(error), retryable=retryable)
