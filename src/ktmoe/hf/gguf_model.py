"""Models whose weights are GGUF files: where they are, their config, and loading them into transformers."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ktmoe.errors import WeightFileError
from ktmoe.hf.gguf_weights import read_beside_experts
from ktmoe.hf.quantised import drop_quantization
from ktmoe.io.gguf_file import is_gguf
from ktmoe.io.gguf_files import files_of, split_pattern
from ktmoe.io.gguf_header import read_header
from ktmoe.io.gguf_tensors import GgufTensors
from ktmoe.io.model_shape import read_model_shape
from ktmoe.runtime import WorkerPoolConfig, get_engine

_DOWNLOAD_KEYS = ("revision", "token", "cache_dir", "local_files_only", "force_download")


@dataclass(frozen=True)
class GgufModel:
    """A model in GGUF files."""

    name: str
    """What the user calls it."""
    home: str
    """The folder or Hub id that may have a config and settings for generation."""
    path: str
    """The file, the first of them if there are several."""

    @classmethod
    def find(cls, model: str, gguf_file: str | None, **kwargs: Any) -> GgufModel | None:
        """None for a model in safetensors.

        model: a GGUF file, a folder or a Hub id. gguf_file: a path, or the name of a file in `model`, which is
        downloaded from a Hub id. kwargs: of ``from_pretrained``. WeightFileError if there is no such file.
        """
        if gguf_file is None:
            if not is_gguf(model):
                return None
            path = files_of(model)[0]
            return cls(model, os.path.dirname(path) or ".", path)
        for path in (os.path.join(model, gguf_file), gguf_file):
            if os.path.isfile(path):
                return cls(model, model, files_of(path)[0])
        if os.path.isdir(model) or os.path.isabs(gguf_file):
            raise WeightFileError(f"gguf_file: got {gguf_file!r}, but there is no such file, in {model} or by itself")
        from huggingface_hub import snapshot_download

        wanted = ["*.json", "*.model", "*.jinja", "tokenizer*", split_pattern(gguf_file)]
        how = {key: kwargs[key] for key in _DOWNLOAD_KEYS if key in kwargs}
        folder = snapshot_download(model, allow_patterns=wanted, **how)
        return cls(model, folder, files_of(os.path.join(folder, gguf_file))[0])

    def config(self, **kwargs: Any) -> Any:
        """The config in `home`, or else what transformers can make of the file. kwargs: of AutoConfig.from_pretrained.

        ValueError for a file that transformers cannot make one of.
        """
        from transformers import AutoConfig

        if not os.path.isdir(self.home) or os.path.exists(os.path.join(self.home, "config.json")):
            return AutoConfig.from_pretrained(self.home, **kwargs)
        with self._read_by_transformers("config") as where:
            config = AutoConfig.from_pretrained(**where)
        # Not among what transformers reads.
        with GgufTensors(self.path) as tensors:
            shared = next((s[-1] for name, s in tensors.shapes.items() if name.endswith("ffn_down_shexp.weight")), None)
        sizes = {"moe_intermediate_size": read_model_shape(self.path).inter, "shared_expert_intermediate_size": shared}
        for key, size in sizes.items():
            if size is not None and hasattr(config, key):
                setattr(config, key, size)
        return config

    def tokenizer(self) -> Any:
        """The tokenizer in `home`, or else what transformers makes of the file. ValueError: as for `config`."""
        from transformers import AutoTokenizer

        names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
        if not os.path.isdir(self.home) or any(os.path.exists(os.path.join(self.home, name)) for name in names):
            return AutoTokenizer.from_pretrained(self.home)
        with self._read_by_transformers("tokenizer") as where:
            return AutoTokenizer.from_pretrained(**where)

    def load(self, config: Any, model_class: Any, settings: Any, **kwargs: Any) -> Any:
        """What ``model_class.from_pretrained`` returns. settings: the `KTMoEConfig`. kwargs: of ``from_pretrained``,
        but for those that say where a model is.

        WeightFileError, NotImplementedError: see `read_beside_experts`.
        """
        dtype = kwargs.pop("dtype", kwargs.pop("torch_dtype", None))
        if dtype in (None, "auto"):
            dtype = config.dtype or torch.bfloat16
        drop_quantization(config)  # it tells of other files
        with torch.device("meta"):
            empty = model_class.from_config(config) if hasattr(model_class, "from_config") else model_class(config)
        engine = get_engine(WorkerPoolConfig.plan(settings.cpuinfer_threads, settings.threadpool_count))
        with GgufTensors(self.path) as tensors:
            state = read_beside_experts(tensors, empty, dtype, engine.pool)
            settings.checkpoint = {"quant_method": "gguf", "path": self.path, "architecture": tensors.architecture}
        wants_info = kwargs.pop("output_loading_info", False)
        loaded, info = type(empty).from_pretrained(
            None,
            config=config,
            state_dict=state,
            dtype=dtype,
            quantization_config=settings,
            output_loading_info=True,
            **kwargs,
        )
        for what in ("missing_keys", "unexpected_keys"):
            if info[what]:  # transformers only warns, and makes up what is missing
                raise WeightFileError(f"{self.path}: {what.replace('_', ' ')}: {', '.join(sorted(info[what])[:3])}")
        self._finish(loaded)
        return (loaded, info) if wants_info else loaded

    @contextlib.contextmanager
    def _read_by_transformers(self, what: str) -> Iterator[dict[str, str]]:
        """Arguments of its ``from_pretrained``. Its reader trusts a file: ours walks through the header first."""
        read_header(self.path)
        folder, name = os.path.split(self.path)
        try:
            yield {"pretrained_model_name_or_path": folder or ".", "gguf_file": name}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self.path}: transformers cannot make a {what} of it ({error}). Name the original model, which has "
                "one, and the file as gguf_file"
            ) from error

    def _finish(self, model: Any) -> None:
        """What transformers does for a model that it loads by its name."""
        from transformers import GenerationConfig

        model.name_or_path = model.config.name_or_path = self.name
        if model.can_generate():
            with contextlib.suppress(OSError):  # there is none; the model has made one from its config
                model.generation_config = GenerationConfig.from_pretrained(self.home)
