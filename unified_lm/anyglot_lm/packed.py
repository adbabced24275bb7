"""`PackedLM`: the language model as training sees it, packed ids in, loss sums and what the logs need out.

One module holds the Hugging Face model, the vocabulary's slices and the weights of the loss, so that whatever a
distributed strategy wraps (`fully_shard` gathers the rows of embedding and head when the root's `forward` runs) covers
the loss too. It knows nothing of Lightning, data or optimizers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import PreTrainedModel

from anyglot_lm.attention import faster_on_cpu
from anyglot_lm.loss import IGNORE, SliceTable, SpanNLL, span_kl, span_nll
from anyglot_lm.model import hidden_states
from anyglot_lm.tuning import SplitRows, before_training, lora_layers, output_rows
from anyglot_lm.vocabulary import Vocabulary
from anyglot_lm.weighting import SpanWeights, weighted_sum
from anyglot_tokenizers.errors import ManifestError


def class_names(vocabulary: Vocabulary) -> list[str]:
    """Names of the slice classes in logs: "text", then "image", or "speech/0", "speech/1" for several codebooks."""
    return ["text" if name == "open" else name for name in vocabulary.slice_names()]


class PackedOutput(NamedTuple):
    """What `PackedLM` gives for a batch of N = B x T positions.

    `total` is the differentiable sum over the batch; `nll` holds values per position, without those of plain text that
    is kept; `hidden` `[B, T, D]` is what the last layer gave, before the final norm, detached (None if the backbone has
    no `norm`); `kept` `[2]` the summed KL of plain text that is kept and its number of ids, detached (None without
    `keep_text`).
    """

    total: Tensor
    nll: SpanNLL
    hidden: Tensor | None
    kept: Tensor | None = None


class PackedLM(nn.Module):
    """See the module docstring.

    Args:
        model: a causal LM whose rows are those of `vocabulary`.
        vocabulary: gives the legal slices.
        weights: factors of the loss by class; equal ones by default.
        sliced: compete inside the grammar's slice, or over the whole vocabulary.
        z_loss: factor of logsumexp².
        keep_text: what an id of plain text costs in training instead of its nll: this factor times KL(the model before
            || it), so that the language model stays what it was (Li & Hoiem 2016, arXiv 1606.09282). Before: without
            LoRA, with the input rows of then, and saying nothing but text. 0: its nll. Under DDP, not under FSDP2.
        compile: run the decoder through torch.compile.

    Raises:
        ManifestError: `keep_text` below 0, or of a model without LoRA.
    """

    _class_of_id: Tensor
    _text_only: Tensor

    def __init__(
        self,
        model: PreTrainedModel,
        vocabulary: Vocabulary,
        weights: SpanWeights | None = None,
        *,
        sliced: bool = True,
        z_loss: float = 0.0,
        keep_text: float = 0.0,
        compile: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.model.train()
        faster_on_cpu(self.model)
        self.weights = weights if weights is not None else SpanWeights(class_names(vocabulary))
        self.sliced, self.z_loss, self.keep_text = sliced, z_loss, keep_text
        rows = model.get_input_embeddings()
        known = isinstance(rows, SplitRows) and lora_layers(model)
        if keep_text < 0 or (keep_text and not known):
            raise ManifestError(
                f"keep_text {keep_text}: at least 0, and more only of a model with LoRA, compared with itself "
                "without it; choose preset lora, or leave keep_text out"
            )
        if keep_text and isinstance(rows, SplitRows):
            rows.remember()
        self._text_size = vocabulary.text_size
        lo, hi, class_of_id = vocabulary.slice_table()
        self._lo, self._hi = [int(i) for i in lo], [int(i) for i in hi]
        self.register_buffer("_class_of_id", torch.tensor(class_of_id, dtype=torch.long), persistent=False)
        text_only = torch.arange(vocabulary.size) < vocabulary.text_size
        text_only[[vocabulary.controls[name] for name in ("bos", "assistant", "eos")]] = True
        self.register_buffer("_text_only", text_only, persistent=False)
        self.__dict__["_before_norm"] = None
        norm = getattr(model.base_model, "norm", None)
        if norm is not None:
            norm.register_forward_pre_hook(self._keep)
        decoder: Any = torch.compile(model.base_model) if compile else model.base_model
        self.__dict__["_decoder"] = decoder  # not a second submodule: checkpoints hold the plain model's names

    @property
    def table(self) -> SliceTable:
        """The slices that labels compete in."""
        return SliceTable(self._lo, self._hi, self._class_of_id)

    def forward(self, input_ids_BT: Tensor, position_ids_BT: Tensor, labels_BT: Tensor) -> PackedOutput:
        """Loss of one packed batch; int64 `[B, T]` each, labels shifted already."""
        plain_BT = reference_ND = None
        if self.keep_text and self.training:
            is_text_BT = (labels_BT >= 0) & (labels_BT < self._text_size)
            plain_BT = self._plain_text(input_ids_BT, position_ids_BT) & is_text_BT
            reference_ND = self._reference(input_ids_BT, position_ids_BT, plain_BT)
        hidden_BTD = hidden_states(self.__dict__["_decoder"], input_ids_BT, position_ids_BT)
        rows = output_rows(self.model)
        learnt_BT = labels_BT if plain_BT is None else labels_BT.masked_fill(plain_BT, IGNORE)
        nll = span_nll(hidden_BTD.flatten(0, 1), rows, learnt_BT.flatten(), self.table, sliced=self.sliced)
        before, self.__dict__["_before_norm"] = self.__dict__["_before_norm"], None
        total = weighted_sum(nll, self.weights, self.z_loss)
        if plain_BT is None:
            return PackedOutput(total, nll, before)
        kept = torch.zeros(2, device=total.device)
        if reference_ND is not None:
            labels_N = labels_BT[plain_BT]
            how: dict[str, Any] = {"sliced": self.sliced, "reference_size": self._text_size}
            kl_N = span_kl(hidden_BTD[plain_BT], rows, reference_ND, rows, labels_N, self.table, **how)
            total = total + self.keep_text * kl_N.sum()
            kept[0], kept[1] = kl_N.detach().sum(), len(kl_N)
        return PackedOutput(total, nll, before, kept)

    def _plain_text(self, input_ids_BT: Tensor, position_ids_BT: Tensor) -> Tensor:
        """bool `[B, T]`: ids of documents that are a text and nothing else."""
        document_BT = (position_ids_BT == 0).long().cumsum(1)
        other_BT = F.pad(torch.zeros_like(document_BT), (0, 1))
        other_BT.scatter_add_(1, document_BT, (~self._text_only[input_ids_BT]).long())
        return other_BT.gather(1, document_BT) == 0

    @torch.no_grad()
    def _reference(self, input_ids_BT: Tensor, position_ids_BT: Tensor, plain_BT: Tensor) -> Tensor | None:
        """Final hidden states `[N, D]` of plain text as they were before training; None where there is none."""
        some_B = plain_BT.any(1)
        if not some_B.any():
            return None
        with before_training(self.model):
            found = hidden_states(self.model.base_model, input_ids_BT[some_B], position_ids_BT[some_B])
        torch.clear_autocast_cache()  # copies made without gradients are not for the pass that has some
        return found[plain_BT[some_B]]

    def _keep(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.__dict__["_before_norm"] = inputs[0].detach()

    def shard(self, mesh: DeviceMesh, param_dtype: torch.dtype = torch.float32) -> None:
        """FSDP2: each decoder layer and the rest are sharded over `mesh`, in place.

        Args:
            mesh: one-dimensional, the data-parallel ranks.
            param_dtype: of gathered weights and of the arithmetic; gradients are reduced in float32.
        """
        policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32)
        for layer in self.model.base_model.layers:
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(self, mesh=mesh, mp_policy=policy)
