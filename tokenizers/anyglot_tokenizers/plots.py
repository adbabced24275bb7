"""Pictures for the run folder: image grids and spectrograms, drawn with numpy alone, and a step's reconstructions.

Shapes: B items, H x W pixels, C channels, S samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from anyglot_tokenizers.media import write_audio, write_image

ANCHORS = (
    (0.0, 0.0, 0.02),
    (0.24, 0.04, 0.38),
    (0.58, 0.15, 0.40),
    (0.87, 0.32, 0.23),
    (0.98, 0.65, 0.12),
    (1, 1, 0.75),
)
"""Colors from quiet to loud, evenly spaced."""


def image_grid(rows: list[Tensor], gap: int = 2) -> Tensor:
    """Rows of images, each float `[B, 3, H, W]` in [0, 1], as one picture `[3, height, width]` on white."""
    lines = []
    for images_BCHW in rows:
        padded = torch.nn.functional.pad(images_BCHW.detach().float().cpu().clamp(0, 1), (0, gap, 0, gap), value=1.0)
        lines.append(torch.cat(list(padded), dim=2))
    return torch.cat(lines, dim=1)


def spectrogram(audio_CS: Tensor, n_fft: int = 1024, height: int = 192, floor_db: float = -80.0) -> Tensor:
    """Power over time of the channels' mean as a picture float `[3, height, frames]`: low below, quiet dark.

    The frequency axis is linear, cut into `height` bands; the loudest band is 0 dB and `floor_db` is black.
    """
    hop = max(n_fft // 4, audio_CS.shape[-1] // 1200)  # at most about 1200 columns
    mono_S = audio_CS.detach().float().cpu().mean(0)
    window = torch.hann_window(n_fft)
    spectrum_FT = torch.stft(mono_S, n_fft, hop, window=window, pad_mode="constant", return_complex=True).abs().square()
    bands_HT = torch.nn.functional.adaptive_avg_pool2d(spectrum_FT[None], (height, spectrum_FT.shape[1]))[0]
    level_HT = 10 * (bands_HT / bands_HT.max().clamp(min=1e-12)).clamp(min=1e-12).log10()
    share_HT = (1 - level_HT / floor_db).clamp(0, 1).flip(0).numpy()
    places = np.linspace(0, 1, len(ANCHORS))
    colors = [np.interp(share_HT, places, [anchor[channel] for anchor in ANCHORS]) for channel in range(3)]
    return torch.from_numpy(np.stack(colors)).float()


def write_reconstructions(
    folder: Path, originals: Sequence[Tensor], reconstructions: Sequence[Tensor], sample_rate: int | None
) -> None:
    """Originals beside their reconstructions, in a new folder; media that are neither pictures nor sounds are left out.

    Pictures `[3, H, W]` of one size: `images.png`, originals above. Sounds `[C, S]`: for each `N_original.wav`,
    `N_reconstructed.wav`, and `N.png` with the spectrogram of the original above.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if sample_rate is None:
        if originals and originals[0].ndim == 3:
            write_image(folder / "images.png", image_grid([torch.stack([*originals]), torch.stack([*reconstructions])]))
        return
    for index, pair in enumerate(zip(originals, reconstructions, strict=True)):
        for name, audio_CS in zip(("original", "reconstructed"), pair, strict=True):
            write_audio(folder / f"{index}_{name}.wav", audio_CS, sample_rate)
        write_image(folder / f"{index}.png", image_grid([spectrogram(audio_CS)[None] for audio_CS in pair]))
