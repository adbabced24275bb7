"""`StageData`: the data's side of a stage: shard folders, their mixture, and the plan of the whole run.

Takes plain values only, as `Stage` does. The plan follows from the packs of an optimizer step and not from the number
of devices, so a run may go on with other devices, micro-batches or workers. With `adapt_rounds` the run is made of
rounds; the mixture of each but the first is set by what the round before learnt, and the plan grows round by round.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np

from anyglot_lm.data import TokenDataModule
from anyglot_lm.files import read_json
from anyglot_lm.mixture import lagging_weights
from anyglot_lm.plan import Phase, Plan, build_plan, extend_plan
from anyglot_lm.remap import remap_shards
from anyglot_lm.segments import Template
from anyglot_lm.shards import ShardReader, open_shards
from anyglot_lm.vocabulary import Vocabulary
from anyglot_tokenizers.errors import AnyglotError, ManifestError


@dataclass
class PhaseConfig:
    """A stretch of the run with a mixture of its own (a curriculum has several).

    Args:
        share: its part of the run.
        weights: share of ids by task or shard folder.
        condition_dropout: share of documents without their prompt.
    """

    share: float
    weights: dict[str, float] | None = None
    condition_dropout: float = 0.0


class StageData(TokenDataModule):
    """See the module docstring.

    Args:
        shards: shard folders; of a folder of `anyglot prepare` its `shards` are taken.
        replay: shard folders of what the model already knows. Folders of an older vocabulary are remapped.
        replay_share: share of all ids that the replay folders get together.
        weights: share of ids by task or shard folder, default in proportion to what there is.
        phases: a curriculum, instead of `weights` and `condition_dropout`.
        modality_budgets: share of ids by modality; the mixture nearest to the weights that meets them is taken.
        max_repetition: a source is gone through at most that often; what it cannot give goes to the others.
        condition_dropout: share of documents without their prompt, for classifier-free guidance.
        adapt_rounds: rounds of the adaptive mixture, 1 for a fixed one.
        adapt_strength: how much a modality that lags gets, 0 to 1.
        seq_len: ids per pack; longer documents are left out (and counted).
        batch_size: packs per device and micro-batch.
        packs_per_step: packs per optimizer step, of all devices and micro-batches; default one batch per device.
        num_workers: loader processes.
        seed: of the order of the data.
        val_shards: shard folders of the validation set.
        val_packs: packs of the validation set.
        val_every: optimizer steps between validations.
    """

    plan: Plan
    together = 1
    """Documents of a shard folder that make up one unit of the plan: 2 for pairs."""

    def __init__(
        self,
        shards: list[str],
        replay: list[str] | None = None,
        replay_share: float = 0.0,
        weights: dict[str, float] | None = None,
        phases: list[PhaseConfig] | None = None,
        modality_budgets: dict[str, float] | None = None,
        max_repetition: float | None = None,
        condition_dropout: float = 0.0,
        adapt_rounds: int = 1,
        adapt_strength: float = 0.5,
        seq_len: int = 1024,
        batch_size: int = 1,
        packs_per_step: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        val_shards: list[str] | None = None,
        val_packs: int = 16,
        val_every: int = 100,
    ) -> None:
        L.LightningDataModule.__init__(self)
        self.prepare_data_per_node = False
        if not val_shards:  # Lightning takes this as: there is no validation
            self.val_dataloader = None  # type: ignore[method-assign,assignment]
        if not shards:
            raise ManifestError("data.shards is empty; give shard folders, such as those anyglot prepare writes")
        if bool(replay) != (replay_share > 0) or not 0 <= replay_share < 1:
            raise ManifestError(
                f"data.replay_share is {replay_share} with {len(replay or [])} replay folders; give both or neither, "
                "and a share below 1"
            )
        if (phases and (weights or replay or adapt_rounds > 1)) or (weights and replay):
            raise ManifestError(
                "data.phases excludes weights, replay and adapt_rounds, and data.weights excludes replay: give the "
                "shares of replay shards among the weights"
            )
        if phases and condition_dropout:
            raise ManifestError(
                f"data.condition_dropout is {condition_dropout} with data.phases, which have their own; give every "
                "phase its condition_dropout, and set data.condition_dropout to 0"
            )
        least = {"batch_size": batch_size, "adapt_rounds": adapt_rounds, "val_packs": val_packs, "val_every": val_every}
        least |= {"seq_len": seq_len, "packs_per_step": 1 if packs_per_step is None else packs_per_step}
        low = [f"data.{name} {value}" for name, value in least.items() if value < 1]
        none = {"num_workers": num_workers, "seed": seed, "adapt_strength": adapt_strength}
        low += [f"data.{name} {value}" for name, value in none.items() if value < 0]
        if low:
            raise ManifestError(f"{', '.join(low)}: too low; give 1 or more ({', '.join(none)}: 0 or more)")
        self.shards, self.replay, self.replay_share = shards, replay or [], replay_share
        self.weights, self.phases, self.modality_budgets = weights, phases, modality_budgets
        self.max_repetition, self.condition_dropout = max_repetition, condition_dropout
        self.adapt_rounds, self.adapt_strength = adapt_rounds, adapt_strength
        self.seq_len, self.packs_per_step, self.seed = seq_len, packs_per_step, seed
        self.val_shards, self.val_packs, self.val_every = val_shards, val_packs, val_every
        self.batch_size, self.num_workers = batch_size, num_workers

    def attach(self, run_dir: Path, vocabulary: Vocabulary, template: Template, max_steps: int, round: int = 0) -> None:
        """Say which run the data are for, before `Trainer.fit`.

        Args:
            run_dir: of the stage; all ranks must see it.
            vocabulary, template: the model's, which shards must be of.
            max_steps: optimizer steps of the whole run.
            round: of the adaptive mixture; the plan of every round but the first must be there (`next_round`).
        """
        self.template = template
        self.run_dir, self.vocabulary, self.max_steps, self.round = run_dir, vocabulary, max_steps, round

    def accumulation(self, world: int) -> int:
        """Micro-batches per optimizer step on `world` data-parallel ranks.

        Raises:
            ManifestError: `packs_per_step` is no multiple of what the ranks take at once.
        """
        group = self.batch_size * world
        self._per_step = self.packs_per_step or group
        if self._per_step % group:
            raise ManifestError(
                f"data.packs_per_step {self._per_step} is no multiple of data.batch_size {self.batch_size} x {world} "
                f"devices; use for example {-(-self._per_step // group) * group}"
            )
        return self._per_step // group

    def prepare_data(self) -> None:
        """Write what all ranks read: remapped shards and plans. Lightning calls it on the first rank only.

        Raises:
            ManifestError, FingerprintError, PlanError: shards that are missing or of another vocabulary, or a mixture
                that cannot be had.
        """
        own, replay = [shards_at(path) for path in self.shards], [shards_at(path) for path in self.replay]
        replay = [_remapped(path, self.vocabulary, self.run_dir / "remapped") for path in replay]
        if not self.round:
            self._build([*own, *replay], self._phases(own, replay), self._path(0))
        else:
            self._check_round(own, replay)
        if self.val_shards:
            phases = [Phase(num_packs=self.val_packs)]
            self._build([shards_at(path) for path in self.val_shards], phases, self.run_dir / "val_plan")

    def _check_round(self, own: list[Path], replay: list[Path]) -> None:
        """Raises ManifestError: the plan of this round, which is there, was made with other settings than these.

        Budgets, limits and the strength count from the next round on: where the data runs short, they have to give.
        """
        path, readers = self._path(self.round), open_shards([*own, *replay])
        fingerprints = [r.fingerprint for r in readers]
        recorded = [s["fingerprint"] for s in read_json(path / "plan.json")["shards"]]
        if fingerprints != recorded:
            raise ManifestError(
                f"{path}: made with the shards {', '.join(f[:12] for f in recorded)}, not "
                f"{', '.join(f[:12] for f in fingerprints)}; give the old shards back, or choose another run_dir"
            )
        plan = Plan.load(path, [r.path for r in readers])
        known = plan.phases[-1].parameters
        settings: dict[str, tuple[Any, Any]] = {
            name: (known[name], getattr(self, name)) for name in ("seq_len", "seed", "condition_dropout")
        }
        weights = plan.phases[0].parameters["weights"] or {}, self._weights(own, replay) or {}
        shares = [{name: round(w / (sum(x.values()) or 1), 6) for name, w in x.items()} for x in weights]
        settings["weights (replay_share is in them)"] = shares[0], shares[1]
        packs = round_end(self.max_steps, self.adapt_rounds, self.round) * self._per_step
        settings["packs of all rounds so far"] = len(plan), packs
        changed = [f"{name} {there}, not {here}" for name, (there, here) in settings.items() if there != here]
        if changed:
            raise ManifestError(
                f"{path}: made with {'; '.join(changed)} (steps, rounds, packs_per_step and devices give the packs); "
                "give the old settings back, or choose another run_dir"
            )
        plan.save(path)  # its shards may have been moved

    def setup(self, stage: str) -> None:
        """Open the plans that the first rank wrote."""
        self.use(self._path(self.round), self.run_dir / "val_plan" if self.val_shards else None)
        if self.trainer is not None and self.trainer.is_global_zero:
            print(self.plan.describe(), file=sys.stderr, flush=True)
        super().setup(stage)

    def _build(self, shards: list[Path], phases: list[Phase], path: Path) -> None:
        readers = open_shards(shards, self.vocabulary, self.template)
        if self._keeps(readers, phases, path):
            return
        build_plan(
            readers,
            seq_len=self.seq_len,
            seed=self.seed,
            phases=phases,
            together=self.together,
            path=path,
            vocabulary=self.vocabulary,
            template=self.template,
        )

    def _keeps(self, readers: list[ShardReader], phases: list[Phase], path: Path) -> bool:
        """Whether the plan at `path` is of these shards and settings. A run keeps the plan that it began with, also
        where this version of Anyglot would draw other documents.
        """
        try:
            plan = Plan.load(path, [r.path for r in readers])
        except AnyglotError:  # there is none, or it is damaged or of other shards
            return False
        wanted = [phase.parameters(self.seq_len, self.seed, self.together) for phase in phases]
        if [phase.parameters for phase in plan.phases] != wanted:
            return False
        plan.save(path)  # its shards may have been moved
        return True

    def _phases(self, own: list[Path], replay: list[Path]) -> list[Phase]:
        """Of the whole run, or of the first round."""
        if not self.phases:
            steps = round_end(self.max_steps, self.adapt_rounds, 0)
            return [self._phase(self._weights(own, replay), steps, self.condition_dropout)]
        shares = np.cumsum([p.share for p in self.phases])
        steps = np.diff(np.round(shares / shares[-1] * self.max_steps).astype(int), prepend=0).tolist()
        return [self._phase(p.weights, n, p.condition_dropout) for p, n in zip(self.phases, steps, strict=True)]

    def next_round(self, metrics: Mapping[str, float]) -> None:
        """Write the plan of the next round: this one, and packs in which modalities that lag have a larger share.

        Args:
            metrics: the last log line of the round that is over.
        """
        before, ends = self.plan, [round_end(self.max_steps, self.adapt_rounds, self.round + i) for i in (0, 1)]
        classes = [key.removeprefix("loss/") for key in metrics if key.startswith("loss/")]
        first = {name.partition("/")[0]: name for name in reversed(classes)}  # of several codebooks the first
        weights = {source.name: source.weight for source in before.phases[-1].sources}
        targets = {task: task.rpartition("->")[2].partition("+")[0] if "->" in task else "text" for task in weights}
        weights = lagging_weights(
            weights,
            {modality: metrics[f"loss/{name}"] for modality, name in first.items()},
            {modality: metrics[f"uniform/{name}"] for modality, name in first.items()},
            targets,
            self.adapt_strength,
        )
        phase = self._phase(weights, ends[1] - ends[0], self.condition_dropout)
        assert phase.num_packs is not None
        extend_plan(
            before,
            phase.weights,
            num_packs=phase.num_packs,
            condition_dropout=phase.condition_dropout,
            max_repetition=phase.max_repetition,
            limit=phase.limit,
            modality_budgets=phase.modality_budgets,
            path=self._path(self.round + 1),
        )

    def is_over(self) -> bool:
        """Whether this round is over: the plan of the next one is there."""
        return (self._path(self.round + 1) / "plan.json").exists()

    def _path(self, round: int) -> Path:
        return self.run_dir / (f"plan-{round}" if self.adapt_rounds > 1 else "plan")

    def _phase(self, weights: dict[str, float] | None, steps: int, condition_dropout: float) -> Phase:
        return Phase(
            weights,
            steps * self._per_step,
            condition_dropout=condition_dropout,
            max_repetition=self.max_repetition,
            limit="cap" if self.max_repetition is not None else "raise",
            modality_budgets=self.modality_budgets,
        )

    def _weights(self, own: list[Path], replay: list[Path]) -> dict[str, float] | None:
        """Share of ids by source: those given, or the natural ones with replay at its share.

        Sources are tasks, or folders where a task is both learnt anew and replayed.
        """
        if self.weights is not None or (not replay and self.adapt_rounds == 1):
            return self.weights
        tasks = {path: ShardReader(path).meta["tasks"] for path in (*own, *replay)}
        both = {t["name"] for p in own for t in tasks[p]} & {t["name"] for p in replay for t in tasks[p]}
        if both and self.adapt_rounds > 1:
            raise ManifestError(
                f"data.adapt_rounds weighs tasks, and {', '.join(sorted(both))} is both learnt anew and replayed; give "
                "the tasks other names, or leave out adapt_rounds"
            )
        weights: dict[str, float] = {}
        for folders, share in ((own, 1 - self.replay_share), (replay, self.replay_share)):
            total = sum(task["ids"] for path in folders for task in tasks[path])
            for path in folders:
                for task in tasks[path]:
                    source = str(path) if both else task["name"]
                    weights[source] = weights.get(source, 0.0) + share * task["ids"] / total
        return weights


def round_end(max_steps: int, rounds: int, round: int) -> int:
    """The optimizer step at which a round ends."""
    return max_steps * (round + 1) // rounds


def shards_at(path: str) -> Path:
    """The shard folder at `path`, or in the folder of `anyglot prepare` there."""
    for place in (Path(path), Path(path) / "shards"):
        if (place / "meta.json").is_file():
            return place
    raise ManifestError(f"{path}: holds no shards (meta.json); write some with anyglot prepare --model START")


def _remapped(path: Path, vocabulary: Vocabulary, folder: Path) -> Path:
    """The shards at `path` in the ids of `vocabulary`: themselves, or a copy in `folder` named by its origin."""
    reader = ShardReader(path)
    if reader.vocabulary.fingerprint == vocabulary.fingerprint:
        return path
    out = folder / f"{reader.fingerprint[:16]}-{vocabulary.fingerprint[:16]}"
    if not (out / "meta.json").exists():
        remap_shards(path, out, vocabulary)
    return out
