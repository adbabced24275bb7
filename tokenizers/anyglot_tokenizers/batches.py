"""Training batches as a function of (seed, step): order, crops and random changes of images and sounds.

Epochs of shuffled items run on into one another. On several devices each takes its rows of the same global batch, so
that what a step sees does not depend on their number. Nothing here decodes files (`folder.py` does) or knows a model.

Shapes: B items, H x W pixels, C channels, S samples.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol, cast

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from anyglot_tokenizers.errors import ManifestError, MediaError

ENDLESS = 2**40  # batches in the one virtual epoch; max_steps ends the run
Batch = dict[str, Tensor]


class MediaSet(Protocol):
    """Checked media that are read when they are needed: images uint8 `[H, W, 3]`, or sounds `[C, samples]`.

    Sounds may be int16 (full scale 32768) to save memory; batches are float32 in any case.
    """

    fingerprint: str
    is_image: bool
    channels: int

    def __len__(self) -> int: ...

    def __getitem__(self, item: int, /) -> Tensor: ...


@dataclass(frozen=True)
class Augment:
    """Random changes of training media; the defaults change nothing.

    Args:
        zoom: images: a square of this share of the shorter side is cut out anywhere and resized, the share drawn
            between the two numbers.
        flip: images: chance of a mirrored item.
        swap: images: chance that the color channels are permuted.
        gain_db: sounds: gain drawn evenly from -gain_db to gain_db (never beyond full scale).
    """

    zoom: tuple[float, float] = (1.0, 1.0)
    flip: float = 0.0
    swap: float = 0.0
    gain_db: float = 0.0

    def __post_init__(self) -> None:
        low, high = self.zoom
        if not 0 < low <= high <= 1 or not 0 <= self.flip <= 1 or not 0 <= self.swap <= 1 or self.gain_db < 0:
            raise ManifestError(f"{self}: need 0 < zoom <= 1 (low, high), chances in [0, 1] and gain_db >= 0")


NONE = Augment()


class StepBatches(Dataset[Batch]):
    """Batch b as a pure function of (seed, b): epochs of shuffled items, random crops and changes.

    Args:
        media: images uint8 `[N, H, W, 3]`; a sequence of float sounds `[samples]` or `[C, samples]` at the
            tokenizer's rate; or a `MediaSet`.
        batch_size: items per batch, over all devices; batches run on across epoch ends.
        seed: of order, crops and changes.
        crop: samples per sound (shorter ones are padded with silence and come with their length), or pixels per side
            of an image (None: images stay as they are, where `augment` zooms squares of their shorter side).
        augment: random changes.

    A batch is `{"media": float32 [B, 3, H, W] or [B, C, crop]}`, for audio with `"lengths"` int64 `[B]`.
    Raises MediaError for empty, misshapen or non-finite media.
    """

    def __init__(
        self,
        media: Tensor | np.ndarray | Sequence[Any] | MediaSet,
        *,
        batch_size: int,
        seed: int = 0,
        crop: int | None = None,
        augment: Augment = NONE,
    ) -> None:
        if batch_size < 1 or (crop is not None and crop < 1):
            raise ManifestError(f"batch_size {batch_size} and crop {crop} must be positive")
        if len(media) == 0:
            raise MediaError("training media", "no items", "give at least one")
        self.batch_size, self.seed, self.crop, self.augment = batch_size, seed, crop, augment
        self.rows = range(batch_size)
        self.media: Any = media
        if hasattr(media, "fingerprint"):
            self.is_image, self.channels = cast(MediaSet, media).is_image, cast(MediaSet, media).channels
        elif isinstance(media, Tensor | np.ndarray):
            self.media, self.is_image, self.channels = torch.as_tensor(media), True, 3
            if self.media.dtype != torch.uint8 or self.media.ndim != 4 or self.media.shape[3] != 3:
                shape = f"{self.media.dtype}{list(self.media.shape)}"
                raise MediaError("training images", f"are {shape}", "need uint8[items, height, width, 3]")
        else:
            sounds = [_sound(index, torch.as_tensor(sound)) for index, sound in enumerate(media)]
            self.media, self.is_image, self.channels = sounds, False, _channels(sounds[0])
            if any(_channels(sound) != self.channels for sound in sounds):
                raise MediaError("training sounds", "differ in their number of channels", "mix them to the same")
        if not self.is_image and crop is None:
            raise ManifestError("audio batches need crop, in samples")
        self._order: tuple[int, np.ndarray] | None = None

    @property
    def num_items(self) -> int:
        """Items in the collection."""
        return len(self.media)

    @property
    def fingerprint(self) -> str:
        """sha256 over seed, batch size, crop, changes and the media (shapes and samples of the content)."""
        digest = hashlib.sha256(f"{self.seed}/{self.batch_size}/{self.crop}/{self.num_items}".encode())
        if self.augment != NONE:
            digest.update(repr(asdict(self.augment)).encode())
        if hasattr(self.media, "fingerprint"):
            digest.update(str(self.media.fingerprint).encode())
            return digest.hexdigest()
        picks = {round(position) for position in np.linspace(0, self.num_items - 1, 64)}
        for item in range(self.num_items):
            content = self.media[item]
            digest.update(f"{content.dtype}{list(content.shape)}".encode())
            if item in picks:
                digest.update(content.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def share(self, rank: int, world: int) -> None:
        """From now on give the rows of device `rank` of `world` only. Raises ManifestError if the batch is not even."""
        if self.batch_size % world:
            raise ManifestError(f"batch_size {self.batch_size} is no multiple of the {world} devices")
        self.rows = range(rank, self.batch_size, world)

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, batch: int) -> Batch:
        first = batch * self.batch_size
        items = [self._item(position) for position in range(first, first + self.batch_size)]
        return self._images(items, batch) if self.is_image else self._sounds(items, batch)

    @property
    def _as_they_are(self) -> bool:
        """Whether nothing is cut or changed in images that are one tensor."""
        if self.augment != NONE or not isinstance(self.media, Tensor):
            return False
        return self.crop is None or self.media.shape[1:3] == (self.crop, self.crop)

    def _images(self, items: list[int], batch: int) -> Batch:
        if self._as_they_are:
            pixels_BHWC = self.media[[items[row] for row in self.rows]]
            return {"media": pixels_BHWC.permute(0, 3, 1, 2).contiguous().float() / 255}
        rng = np.random.default_rng([self.seed, 1, batch])
        draws_B6 = rng.random((self.batch_size, 6))  # drawn for all rows, so that each row's do not depend on `rows`
        changed = [self._change(self.media[items[row]], draws_B6[row]) for row in self.rows]
        return {"media": _stacked(changed).float() / 255}

    def _change(self, pixels_HWC: Tensor, draws: np.ndarray) -> Tensor:
        """One image uint8 `[3, side, side]`: a square cut out, resized, mirrored, its colors permuted."""
        height, width = pixels_HWC.shape[:2]
        low, high = self.augment.zoom
        if self.crop is None and low == 1:
            image_CHW = pixels_HWC.permute(2, 0, 1)
        else:
            side = min(height, width) * (low + (high - low) * draws[0])
            box = (draws[1] * (width - side), draws[2] * (height - side), side)
            image_CHW = cut(pixels_HWC, box, self.crop or min(height, width))
        if draws[3] < self.augment.flip:
            image_CHW = image_CHW.flip(2)
        if draws[4] < self.augment.swap:
            image_CHW = image_CHW[np.random.default_rng(int(draws[5] * 2**32)).permutation(3)]
        return image_CHW

    def _sounds(self, items: list[int], batch: int) -> Batch:
        assert self.crop is not None
        rng = np.random.default_rng([self.seed, 1, batch])
        sounds = [self.media[item] for item in items]
        starts = [int(rng.integers(0, max(sound.shape[-1] - self.crop, 0) + 1)) for sound in sounds]
        gains = 10 ** (rng.uniform(-1, 1, self.batch_size) * self.augment.gain_db / 20)
        pieces = [_floats(sounds[row][..., starts[row] : starts[row] + self.crop]) for row in self.rows]
        if self.augment.gain_db:
            limits = [1 / max(float(piece.abs().max()), 1e-6) for piece in pieces]
            pieces = [p * min(gains[row], limit) for p, row, limit in zip(pieces, self.rows, limits, strict=True)]
        return _padded(pieces, self.channels, self.crop)

    def _item(self, position: int) -> int:
        epoch, offset = divmod(position, self.num_items)
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng([self.seed, 0, epoch]).permutation(self.num_items))
        return int(self._order[1][offset])


def held_out_batches(batches: StepBatches, limit: int) -> Iterator[Batch]:
    """`limit` items, evenly spaced over a collection, in order and unchanged: centred squares, beginnings of sounds."""
    count = min(limit, batches.num_items)
    chosen = [place * batches.num_items // count for place in range(count)]
    for start in range(0, count, batches.batch_size):
        items = [batches.media[item] for item in chosen[start : start + batches.batch_size]]
        if batches.is_image:
            yield {"media": _stacked([_centre(item, batches.crop) for item in items]).float() / 255}
            continue
        assert batches.crop is not None
        yield _padded([_floats(item[..., : batches.crop]) for item in items], batches.channels, batches.crop)


def cut(pixels_HWC: Tensor, box: tuple[float, float, float], side: int) -> Tensor:
    """The square (left, top, side) of an image uint8 `[H, W, 3]`, resized (bicubic, antialiased), `[3, side, side]`."""
    from PIL import Image

    left, top, extent = box
    if (left, top, extent) == (0, 0, side) and pixels_HWC.shape[:2] == (side, side):
        return pixels_HWC.permute(2, 0, 1).contiguous()
    edge = (left, top, min(left + extent, pixels_HWC.shape[1]), min(top + extent, pixels_HWC.shape[0]))
    image = Image.fromarray(pixels_HWC.numpy()).resize((side, side), Image.Resampling.BICUBIC, box=edge)
    return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())


def _centre(pixels_HWC: Tensor, side: int | None) -> Tensor:
    height, width = pixels_HWC.shape[:2]
    if side is None:
        return pixels_HWC.permute(2, 0, 1).contiguous()
    extent = min(height, width)
    return cut(pixels_HWC, ((width - extent) / 2, (height - extent) / 2, extent), side)


def _stacked(images_CHW: list[Tensor]) -> Tensor:
    sizes = sorted({tuple(image.shape[1:]) for image in images_CHW})
    if len(sizes) > 1:
        said = " and ".join("x".join(map(str, size)) for size in sizes[:2])
        raise MediaError("training images", f"of one batch are {said} pixels", "give a crop, which makes them alike")
    return torch.stack(images_CHW)


def _sound(index: int, sound: Tensor) -> Tensor:
    name = f"training sound {index}"
    if sound.ndim not in (1, 2) or not sound.is_floating_point() or sound.numel() == 0:
        raise MediaError(name, f"is {sound.dtype}{list(sound.shape)}", "need float[samples], not empty")
    if not bool(torch.isfinite(sound).all()):
        raise MediaError(name, "holds NaN or infinite samples", "clean or drop it")
    return sound


def _channels(sound: Tensor) -> int:
    return 1 if sound.ndim == 1 else sound.shape[0]


def _floats(sound: Tensor) -> Tensor:
    return sound if sound.is_floating_point() else sound.float() / 32768


def _padded(pieces: list[Tensor], channels: int, crop: int) -> Batch:
    media_BCS = torch.zeros(len(pieces), channels, crop)
    for row, piece in enumerate(pieces):
        media_BCS[row, :, : piece.shape[-1]] = piece
    return {"media": media_BCS, "lengths": torch.tensor([piece.shape[-1] for piece in pieces])}


class _From(Sampler[int]):
    def __init__(self, start: int) -> None:
        self.start = start

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, ENDLESS))

    def __len__(self) -> int:
        return ENDLESS


class TokenizerDataModule(L.LightningDataModule):
    """Batches by step for a Trainer; its state is the number of steps done, from which the next run goes on."""

    def __init__(self, batches: Dataset[Batch], num_workers: int = 0) -> None:
        super().__init__()
        self.batches = batches
        self.num_workers = num_workers
        self.start = 0

    def train_dataloader(self) -> DataLoader[Batch]:
        """This device's rows of the batches from the current step on."""
        if self.trainer is not None and isinstance(self.batches, StepBatches):
            self.batches.share(self.trainer.global_rank, self.trainer.world_size)
        return DataLoader(self.batches, batch_size=None, sampler=_From(self.start), num_workers=self.num_workers)

    def state_dict(self) -> dict[str, Any]:
        """Steps done.

        The trainer's own batch counter lags by one where checkpoints are written, so it is not used.
        """
        return {"step": self.trainer.global_step if self.trainer else self.start}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved step."""
        self.start = int(state_dict["step"])
