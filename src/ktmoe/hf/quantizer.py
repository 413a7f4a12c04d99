"""The transformers hook: swaps the experts on the meta model and fills them from the checkpoint, expert by expert.

transformers never reads a tensor for which the model has no parameter, so the bf16 experts are not in RAM at any time
except for the one that is being packed and the next one. At the second start they come packed out of the cache.
A checkpoint may be quantised already: its experts are read as they were published, what is beside them becomes floats.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import nn
from transformers.quantizers import HfQuantizer, register_quantizer

from ktmoe.hf import peft_bridge
from ktmoe.hf.cached import ExpertCache, fill_layers, map_folder
from ktmoe.hf.checkpoint import CheckpointFiles
from ktmoe.hf.config import QUANT_METHOD, KTMoEConfig
from ktmoe.hf.experts import KTExperts
from ktmoe.hf.experts_on_disk import ExpertsOnDisk, PlainExperts, QuantisedExperts
from ktmoe.hf.gguf_weights import conversions
from ktmoe.hf.quantised import floats_beside_experts
from ktmoe.hf.structure import ExpertsSpec, find_experts
from ktmoe.io.gguf_files import files_of


@register_quantizer(QUANT_METHOD)
class KTMoEQuantizer(HfQuantizer):
    """Holds the experts of one model in ktmoe. Made by transformers from a `KTMoEConfig`."""

    def __init__(self, quantization_config: KTMoEConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        checkpoint = quantization_config.checkpoint
        self._gguf: str | None = checkpoint["path"] if checkpoint and checkpoint["quant_method"] == "gguf" else None
        # The checkpoint, which is never in our packed form. The loader then leaves dtypes to our conversions.
        self.pre_quantized = checkpoint is not None and self._gguf is None
        self._files: list[Path] = []
        self._conversions: list[Any] = []

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> Any:
        self._files = [Path(name) for name in (files_of(self._gguf) if self._gguf else checkpoint_files or ())]
        if not self._gguf and (not self._files or any(file.suffix != ".safetensors" for file in self._files)):
            raise ValueError(
                "ktmoe streams experts from safetensors files; this model has none. "
                "Load it with plain transformers and save_pretrained() it once."
            )
        specs = find_experts(model, model.config)
        for spec in specs:
            _replace_module(model, spec.name, KTExperts(spec, self.quantization_config))
        # Their checkpoint names have no parameter any more; that is not worth a warning.
        prefix, all_of_it = str(model.base_model_prefix), self.pre_quantized
        ignored = {_unexpected_pattern(spec, prefix, all_of_it) for spec in specs}
        model._keys_to_ignore_on_load_unexpected = set(model._keys_to_ignore_on_load_unexpected or ()) | ignored
        peft_bridge.install()
        return model

    def update_weight_conversions(self, weight_conversions: list[Any], model: nn.Module) -> list[Any]:
        """Called with the table that the loader will use (the user's ``key_mapping`` included): remembered for us."""
        self._conversions = super().update_weight_conversions(weight_conversions, model)
        if self._gguf is not None:
            table = conversions(self.quantization_config.checkpoint["architecture"], model.config)
            return self._conversions if table is None else table
        return self._conversions + floats_beside_experts(self, self.quantization_config.checkpoint)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        from transformers.utils import logging

        layers = list(ktmoe_layers(model))
        config = self.quantization_config
        if config.packed is not None:
            map_folder(layers, config.packed, self._files)
            return model
        specs = [layer.spec for layer in layers]
        with ExitStack() as stack:
            experts: ExpertsOnDisk
            if config.checkpoint is not None:
                experts = QuantisedExperts(self._files[0] if self._gguf else self._files[0].parent)
            else:
                files = stack.enter_context(CheckpointFiles(self._files))
                experts = PlainExperts(files, specs, self._conversions, str(model.base_model_prefix))
            # A folder may have several GGUF models.
            variant = f"{config.variant}-{self._files[0].stem}" if self._gguf else config.variant
            kept = ExpertCache.open(self._files, variant, experts) if config.cache else None
            desc = f"Packing experts ({config.method})"
            with logging.tqdm(total=sum(spec.n_experts for spec in specs), desc=desc, unit="expert") as bar:
                fill_layers(layers, experts, kept, _Speed(bar))
        unfilled = [layer.spec.name for layer in layers if not layer.backend.loaded]
        if unfilled:
            raise RuntimeError(f"Weights not loaded: {', '.join(unfilled)}")
        return model

    def is_serializable(self) -> bool:
        """False: packed experts are no checkpoint. Adapters save as usual."""
        return False

    @property
    def is_trainable(self) -> bool:
        """True for every method: the experts themselves refuse gradients with a text that names the method to use."""
        return True


class _Speed:
    """Advances a bar by one expert, and shows the rate at which the source is read."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar
        self._bytes = 0
        self._began = time.monotonic()

    def __call__(self, nbytes: int) -> None:
        self._bytes += nbytes
        seconds = time.monotonic() - self._began
        if self._bytes and seconds:
            self._bar.set_postfix_str(f"{self._bytes / seconds / 1e9:.2f} GB/s", refresh=False)
        self._bar.update(1)


def ktmoe_layers(model: nn.Module) -> Iterator[KTExperts]:
    """The experts modules of a model that ktmoe holds, in order."""
    return (module for module in model.modules() if isinstance(module, KTExperts))


def _replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)


def _unexpected_pattern(spec: ExpertsSpec, base_model_prefix: str, all_of_it: bool) -> str:
    """A regex for names of this module's parameters, or all of its tensors, with or without the base model's prefix."""
    name = spec.name.removeprefix(f"{base_model_prefix}.")
    tensors = "" if all_of_it else f"({'|'.join((*spec.stacks, *spec.biases))})$"
    return rf"(^|\.){re.escape(name)}\.{tensors}"
