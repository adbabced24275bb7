"""`plan`: which stages are one group on a cluster, and how many copies of each group it has room for.

Stages run at once, each group in copies of its own, so a copy that waits for room which the others hold would hang the
run: where one copy of each does not fit, there are fewer groups. What the copies do, and how many there are at a time,
is not decided here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

from anyglot_synth.stages import Stage
from anyglot_synth.workers import WorkerError

Group = list[Stage]
Node = Mapping[str, float]
"""Its "CPU" and "GPU", or those of a copy."""


def groups_of(stages: Sequence[Stage]) -> list[Group]:
    """Neighbours that ask for the same, together."""
    return [list(same) for _, same in groupby(stages, key=lambda stage: (stage.cpus, stage.gpus))]


def fewer(groups: Sequence[Group]) -> list[Group]:
    """Neighbours without accelerators as one group, whatever they ask for: it is as large as its largest stage."""
    found: list[Group] = []
    for group in groups:
        if found and not size_of(found[-1])["GPU"] and not size_of(group)["GPU"]:
            found[-1] = found[-1] + group
        else:
            found.append(group)
    return found


def size_of(group: Sequence[Stage]) -> dict[str, float]:
    """What a copy of it takes."""
    return {"CPU": max(stage.cpus for stage in group), "GPU": max(stage.gpus for stage in group)}


def _copies(size: Node, node: Node) -> int:
    """How many copies of a size a node has room for."""
    return int(min((node.get(key, 0.0) / wants + 1e-9 for key, wants in size.items() if wants), default=1))


def room_for(groups: Sequence[Group], nodes: Sequence[Node]) -> list[int] | None:
    """The most copies that each group may have beside one of every other; None where not even one of each fits."""
    left = [dict(node) for node in sorted(nodes, key=lambda node: node.get("GPU", 0.0))]
    for group in sorted(groups, key=lambda group: (size_of(group)["GPU"], size_of(group)["CPU"]), reverse=True):
        size = size_of(group)
        node = next((node for node in left if _copies(size, node)), None)
        if node is None:
            return None
        node.update({key: node.get(key, 0.0) - wants for key, wants in size.items()})
    return [1 + sum(_copies(size_of(group), node) for node in left) for group in groups]


def plan(groups: Sequence[Group], nodes: Sequence[Node]) -> tuple[list[Group], list[int]]:
    """Groups of which one copy each fits at once (one that waits for room would hang the run), and the most of each.

    Raises `WorkerError` where there is no way.
    """
    for way in (list(groups), fewer(groups)):
        if most := room_for(way, nodes):
            return way, most
    sizes = [(", ".join(stage.name for stage in group), size_of(group)) for group in fewer(groups)]
    wants = "; ".join(f"{names} (cpus: {size['CPU']:g}, gpus: {size['GPU']:g})" for names, size in sizes)
    has = "; ".join(f"cpus: {node.get('CPU', 0.0):g}, gpus: {node.get('GPU', 0.0):g}" for node in nodes)
    raise WorkerError(
        f"the cluster has no room for one copy each of {wants}; its nodes have {has or 'nothing'}; set cpus and gpus "
        "of the stages lower, or add nodes"
    )
