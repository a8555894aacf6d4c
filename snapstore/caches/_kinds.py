"""The allow-list's entries: what an object of a known cache class is made of, and how it is read and filled.

State is taken attribute by attribute from a table, not through the libraries' own ``state`` properties: those leave out
what only matters half way (a batch's pending padding), lose values in some versions (mlx-lm 0.31 reads ``rotated`` back
as ``bool("False")``), and in others make classes from names that they find in the data. The attributes of one class are
the same in all of these versions, so a snapshot can also move between them.

The table is closed on both sides. An attribute that it does not know means a version that keeps more than we would
save, and is an error at capture; a class or attribute that it does not know, in a file, is an error at restore.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from snapstore._types import JSON
from snapstore.caches._tree import TreeDecoder, TreeEncoder


def always(_layer: Any) -> bool:
    """For layers that hold each token's state apart, so that a prefix is a slice."""
    return True


def never(_layer: Any) -> bool:
    """For layers that fold all tokens into one state."""
    return False


@dataclass(frozen=True, slots=True)
class Kind:
    """One class of the allow-list, by the names of its attributes.

    Attributes:
        fixed: settings given to the constructor. Saved to be compared: a restore must find the same.
        kept: the state.
        lazy: state that not every object has: some comes with the first use.
        apart: neither saved nor restored: it follows from the rest, or is the fresh object's own.
        in_place: the part of ``kept`` whose memory the library keeps and writes into; a restore does the same.
        sliceable: whether the object, as it is now, can be cut back to any shorter length without loss.
    """

    fixed: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    lazy: tuple[str, ...] = ()
    apart: tuple[str, ...] = ()
    in_place: tuple[str, ...] = ()
    sliceable: Callable[[Any], bool] = never

    def __or__(self, other: Kind) -> Kind:
        """The kind of a class that inherits from both. It can be sliced when both parts can."""
        return Kind(
            fixed=self.fixed + other.fixed,
            kept=self.kept + other.kept,
            lazy=self.lazy + other.lazy,
            apart=self.apart + other.apart,
            in_place=self.in_place + other.in_place,
            sliceable=lambda layer: self.sliceable(layer) and other.sliceable(layer),
        )

    @property
    def names(self) -> frozenset[str]:
        """Every attribute that an object of this kind may have."""
        return frozenset(self.fixed + self.kept + self.lazy + self.apart)


Table = Mapping[str, Kind]


@dataclass(frozen=True, slots=True)
class Fill:
    """A checked decision: these values go into that object. Nothing is changed until all are made."""

    target: Any
    kind: Kind
    values: dict[str, Any]


def class_name(obj: object) -> str:
    """How the allow-list and the metadata call an object's class."""
    return f"{type(obj).__module__}.{type(obj).__qualname__}"


def kind_of(obj: object, table: Table, path: str) -> Kind:
    """The entry for a live object."""
    name = class_name(obj)
    if name not in table:
        raise TypeError(
            f"{path} is a {name}, which is not on the allow-list of snapstore.caches. It knows: "
            f"{', '.join(sorted(known.rpartition('.')[2] for known in table))}"
        )
    return table[name]


def read(obj: Any, kind: Kind, encoder: TreeEncoder, path: str) -> dict[str, JSON]:
    """The record of one object: its class, its settings, its state."""
    attributes = vars(obj)
    unknown = attributes.keys() - kind.names
    if unknown:
        raise TypeError(
            f"{path}: {class_name(obj)} has attributes that snapstore.caches does not know, and will not lose: "
            f"{', '.join(sorted(unknown))}. Remove them, or use a snapstore that knows this version of the library"
        )
    return {
        "class": class_name(obj),
        "fixed": {name: encoder.encode(attributes[name], name) for name in kind.fixed if name in attributes},
        "state": {
            name: encoder.encode(attributes[name], f"{path}.{name}")
            for name in kind.kept + kind.lazy
            if name in attributes
        },
    }


def plan(obj: Any, kind: Kind, record: JSON, decoder: TreeDecoder, path: str) -> Fill:
    """What :func:`read` recorded, checked against the object that is to be filled with it."""
    fields = match_class(obj, record, path)
    fixed, state = _mapping(fields, "fixed", path), _mapping(fields, "state", path)
    attributes = vars(obj)
    here = {name: attributes[name] for name in kind.fixed if name in attributes}
    there = {name: decoder.decode(node) for name, node in fixed.items()}
    if here != there:
        raise ValueError(
            f"{path}: the snapshot was taken from a {class_name(obj)} with {_settings(there)}, and this one has "
            f"{_settings(here)}. Make the cache with the settings that it had at capture"
        )
    expected = {name for name in kind.kept if name in attributes}
    if state.keys() - kind.lazy != expected:
        raise ValueError(
            f"{path}: the snapshot has {', '.join(sorted(state)) or 'nothing'} where {class_name(obj)} has "
            f"{', '.join(sorted(expected)) or 'nothing'}. It comes from another version of the library: "
            "restore with that one, or compute the cache again"
        )
    values = {name: decoder.decode(node) for name, node in state.items()}
    for name in expected:
        _match_form(attributes[name], values[name], f"{path}.{name}")
    return Fill(obj, kind, values)


def match_class(obj: object, record: JSON, path: str) -> dict[str, JSON]:
    """The record as a dict, if it was made from an object of this very class.

    The name in the record is only ever compared. ``obj`` is on the allow-list, so an equal name is, too.
    """
    if not isinstance(record, dict) or not isinstance(record.get("class"), str):
        raise malformed(path)
    if record["class"] != class_name(obj):
        raise ValueError(
            f"{path}: the snapshot holds a {record['class']}, and the cache has a {class_name(obj)} there. "
            "Make the cache for the same model, with the same kinds of layers (batched, quantized) as at capture"
        )
    return record


def malformed(path: str) -> ValueError:
    """The error for metadata of the wrong form, whose values were not written by :func:`read`."""
    return ValueError(
        f"{path}: the metadata here is not what snapstore.caches.capture returned. "
        "Save a snapshot with that very value, and do not change it"
    )


def _mapping(record: dict[str, JSON], key: str, path: str) -> dict[str, JSON]:
    value = record.get(key)
    if not isinstance(value, dict):
        raise malformed(f"{path} ({key})")
    return value


def _settings(values: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in values.items()) or "no settings"


def _match_form(fresh: object, saved: object, path: str) -> None:
    """The slots that a constructor made must be the ones that the snapshot fills. An empty container may grow."""
    slots = _slots(fresh)
    if slots and (type(saved) is not type(fresh) or slots != _slots(saved)):
        raise ValueError(
            f"{path}: the slots in the snapshot are not those of this cache. Make the cache for the same model"
        )


def _slots(value: object) -> set[Any]:
    if isinstance(value, dict):
        return set(value)
    return set(range(len(value))) if isinstance(value, list) else set()
