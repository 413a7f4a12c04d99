"""What every wrapper shares: parameters, loading weights, checking inputs, and one plain forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor

from . import _ext
from .capsule import rows_in_one_piece, to_dlpack
from .config import MoEConfig
from .errors import WeightFileError, not_available, weights_not_loaded
from .io.experts import open_experts
from .lora import LoraMirror, PackedLora
from .methods import Method
from .runtime import CPUInfer, engine_for, isa_without_amx

# Looked up on every forward: module globals are cheaper than attributes of torch.
_BF16, _F32, _I64, _I32 = torch.bfloat16, torch.float32, torch.int64, torch.int32
_ID_DTYPES = (_I64, _I32)
_WEIGHT_DTYPES = (_F32, _BF16)
_BIASES = ("gate_bias", "up_bias", "down_bias")
_empty_like = torch.empty_like
_CONTIGUOUS = torch.contiguous_format


def only_in(mode: str, name: str) -> Callable[..., Any]:
    """A method of the other mode: raises the text of the specification. The one place where such stubs are made."""
    wrong = "sft" if mode == "inference" else "inference"

    def method(self: BaseMoEWrapper, *args: Any, **kwargs: Any) -> NoReturn:
        raise not_available(name, wrong)

    method.__name__ = method.__qualname__ = name
    method.__doc__ = f'Only with mode="{mode}"; RuntimeError otherwise.'
    return method


class BaseMoEWrapper:
    """The routed experts of one MoE layer. Made by `KTMoEWrapper`; see there for the parameters.

    Expert weights: gate and up [inter, hidden], down [hidden, inter]; y = down(silu(gate(x)) * up(x)), or another
    activation (see `KTMoEWrapper`), each projection with an optional bias. Biases are frozen, as the weights are.
    Experts that `gpu_experts_mask` marks get no memory here and contribute nothing to the output.
    """

    def __init__(self, config: MoEConfig, method: Method) -> None:
        self.config = config
        self.method = method.name
        self.mode = method.mode
        self.layer_idx = config.layer_idx
        self.num_experts = config.num_experts
        self.num_experts_per_tok = config.num_experts_per_tok
        self.hidden_size = config.hidden_size
        self.moe_intermediate_size = config.moe_intermediate_size
        self.num_gpu_experts = config.num_gpu_experts
        self.gpu_experts_mask = config.gpu_experts_mask
        self.weight_path = config.weight_path
        self.chunked_prefill_size = config.chunked_prefill_size
        self.cpu_save = config.cpu_save
        self.max_deferred_experts_per_token = config.max_deferred_experts_per_token
        self.cpu_infer: CPUInfer = engine_for(config)
        assert method.format is not None  # methods.resolve refused the others
        self.layer = _ext.MoeLayer(
            self.cpu_infer.pool,
            config.num_experts,
            config.num_experts_per_tok,
            config.hidden_size,
            config.moe_intermediate_size,
            method.format,
            "" if method.amx else isa_without_amx(),
            config.chunked_prefill_size,
            to_dlpack(config.gpu_experts_mask.to(torch.uint8)) if config.num_gpu_experts else None,
            config.activation,
            config.swiglu_limit,
            config.swiglu_alpha,
        )
        self.gated = config.gated
        self.mirror = self._new_mirror()
        """Packed LoRA of `ktmoe.autograd.moe_forward`."""
        self._cpu_experts = [e for e, on_gpu in enumerate(config.gpu_experts_mask.tolist()) if not on_gpu]

    def _new_mirror(self) -> LoraMirror:
        return LoraMirror(
            self.cpu_infer.pool, self.num_experts, self.hidden_size, self.moe_intermediate_size, self.gated
        )

    def __repr__(self) -> str:
        c = self.config
        return (
            f"{type(self).__name__}(layer_idx={c.layer_idx}, method={self.method!r}, num_experts={c.num_experts}, "
            f"num_gpu_experts={c.num_gpu_experts}, hidden_size={c.hidden_size}, "
            f"moe_intermediate_size={c.moe_intermediate_size}, loaded={self.loaded})"
        )

    # --- weights --------------------------------------------------------------------------------------------------
    @property
    def loaded(self) -> bool:
        """True when every expert that is not on the GPU has been loaded."""
        return self.layer.loaded

    def load_weights(self, physical_to_logical_map: Tensor | None = None) -> None:
        """Loads this layer's experts from `weight_path`, a folder with safetensors files in a Hugging Face layout.

        physical_to_logical_map: integers [num_experts]; slot e gets the weights of the file's expert map[e].
        None: slot e gets expert e. BF16, F16 and F32 files are read, one expert in memory at a time, with the biases
        that they have.
        WeightFileError if the files are missing, damaged or do not fit the layer; the layer is then not loaded.
        """
        if not self.weight_path:
            raise ValueError("weight_path: got an empty path, expected the folder of the model's safetensors files")
        dims = self.hidden_size, self.moe_intermediate_size
        with open_experts(self.weight_path, self.layer_idx, *dims, gated=self.gated) as source:
            where = f"{self.weight_path}, layer {self.layer_idx}"
            if physical_to_logical_map is None and source.n_experts != self.num_experts:
                raise WeightFileError(
                    f"{where}: got {source.n_experts} experts, expected num_experts={self.num_experts}"
                )
            slots = self._slots(physical_to_logical_map, source.n_experts, where)
            with self._loading():
                for slot, logical in slots:
                    self.load_expert(slot, *source.read(logical), **source.biases(logical))

    def load_weights_from_tensors(
        self,
        gate: Tensor | None,
        up: Tensor,
        down: Tensor,
        physical_to_logical_map: Tensor | None = None,
        *,
        gate_bias: Tensor | None = None,
        up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
    ) -> None:
        """Loads (quantises) this layer's experts from tensors, which are not needed afterwards.

        gate, up: bf16 CPU [n, inter, hidden]; down: bf16 CPU [n, hidden, inter]; n = num_experts unless a map is given.
        gate is None for activation="relu2". gate_bias, up_bias [n, inter], down_bias [n, hidden]: bf16 or fp32; one
        that is missing beside others counts as zeros.
        physical_to_logical_map: as in `load_weights`. TypeError or ValueError before anything is changed.
        """
        first = up if gate is None else gate
        mapped = physical_to_logical_map is not None and isinstance(first, Tensor) and first.dim() == 3
        n = first.shape[0] if mapped else self.num_experts
        tensors = (gate, up, down, gate_bias, up_bias, down_bias)
        self._check_weights((n,), tensors)
        slots = self._slots(physical_to_logical_map, n, "gate, up, down")
        with self._loading():
            for slot, logical in slots:
                biases = {n: t[logical] for n, t in zip(_BIASES, tensors[3:], strict=True) if t is not None}
                own_gate = None if gate is None else gate[logical]
                self.load_expert(slot, own_gate, up[logical], down[logical], **biases)

    def load_expert(
        self,
        expert: int,
        gate: Tensor | None,
        up: Tensor,
        down: Tensor,
        *,
        gate_bias: Tensor | None = None,
        up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
    ) -> None:
        """Loads one expert, for callers that stream: gate, up bf16 CPU [inter, hidden]; down bf16 CPU [hidden, inter].

        gate is None for activation="relu2". gate_bias, up_bias [inter], down_bias [hidden]: bf16 or fp32, as in
        `load_weights_from_tensors`. Tensors that are not contiguous are copied first. Loading an expert again replaces
        it and its biases. ValueError for an expert that is on the GPU, and if some experts come with biases and others
        without.
        """
        tensors = (gate, up, down, gate_bias, up_bias, down_bias)
        self._check_weights((), tensors)
        given = [None if t is None else t.detach() for t in tensors]
        given[3:] = [None if t is None else t.to(_F32) for t in given[3:]]
        self.layer.load_expert(expert, *(None if t is None else to_dlpack(t.contiguous()) for t in given))

    def _check_weights(self, lead: tuple[int, ...], tensors: Sequence[Tensor | None]) -> None:
        """tensors: the three matrices and their biases, of as many experts as `lead` says."""
        h, i = self.hidden_size, self.moe_intermediate_size
        shapes = ((i, h), (i, h), (h, i), (i,), (i,), (h,))
        for name, tensor, shape in zip(("gate", "up", "down", *_BIASES), tensors, shapes, strict=True):
            is_bias = len(shape) == 1
            if name.startswith("gate") and not self.gated:
                if tensor is not None:
                    activation = self.config.activation
                    raise TypeError(f"{name}: got {_kind(tensor)}, expected None: {activation!r} experts have no gate")
            elif tensor is not None or not is_bias:
                _check_weight(name, tensor, (*lead, *shape), (_BF16, _F32) if is_bias else (_BF16,))

    @contextmanager
    def _loading(self) -> Iterator[None]:
        """A load that fails half-way, or is interrupted, leaves a layer without weights, never a mixture."""
        self.layer.unload()
        try:
            yield
        except BaseException:
            self.layer.unload()
            raise

    def _slots(self, mapping: Tensor | None, n_logical: int, source: str) -> list[tuple[int, int]]:
        """(slot, logical expert) of every expert that lives on the CPU."""
        if mapping is None:
            return [(e, e) for e in self._cpu_experts]
        mapping = torch.as_tensor(mapping, device="cpu")
        if mapping.dtype.is_floating_point or mapping.dtype is torch.bool:
            raise TypeError(f"physical_to_logical_map: got dtype {mapping.dtype}, expected integers")
        if tuple(mapping.shape) != (self.num_experts,):
            raise ValueError(
                f"physical_to_logical_map: got shape {tuple(mapping.shape)}, expected ({self.num_experts},)"
            )
        logical = mapping.tolist()
        for slot, expert in enumerate(logical):
            if not 0 <= expert < n_logical:
                raise ValueError(
                    f"physical_to_logical_map[{slot}]: got {expert}, expected 0..{n_logical - 1} ({source})"
                )
        return [(e, logical[e]) for e in self._cpu_experts]

    # --- running --------------------------------------------------------------------------------------------------
    def _inputs(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The inputs as the engine takes them: 2-D, rows in one piece. Copies nothing in the usual case.

        RuntimeError before the weights are loaded; TypeError (dtype, device) or ValueError (shape).
        """
        if not self.layer.loaded:
            raise weights_not_loaded(self.layer_idx)
        try:
            if (
                hidden.dtype is _BF16
                and ids.dtype in _ID_DTYPES
                and weights.dtype in _WEIGHT_DTYPES
                and hidden.is_cpu
                and ids.is_cpu
                and weights.is_cpu
                and hidden.is_contiguous()
                and ids.is_contiguous()
                and weights.is_contiguous()
                and len(shape := hidden.shape) == 2
                and shape[0]
                and shape[1] == self.hidden_size
                and ids.shape == weights.shape == (shape[0], self.num_experts_per_tok)
            ):
                return hidden, ids, weights
        except AttributeError:  # not a tensor; named below
            pass
        return self._unusual_inputs(hidden, ids, weights)

    def _unusual_inputs(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Leading dimensions, strides, or a mistake."""
        k = self.num_experts_per_tok
        _check_input("hidden_states", hidden, (_BF16,))
        _check_input("topk_ids", ids, _ID_DTYPES)
        _check_input("topk_weights", weights, _WEIGHT_DTYPES)
        lead = tuple(hidden.shape[:-1])
        if hidden.dim() < 2 or hidden.shape[-1] != self.hidden_size:
            raise ValueError(f"hidden_states: got shape {tuple(hidden.shape)}, expected (..., {self.hidden_size})")
        n = 1
        for size in lead:
            n *= size
        for name, tensor in (("topk_ids", ids), ("topk_weights", weights)):
            if tuple(tensor.shape) not in ((*lead, k), (n, k)):
                raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected {(*lead, k)} or {(n, k)}")
        rows = rows_in_one_piece(hidden.detach().reshape(n, self.hidden_size))
        ids, weights = ids.reshape(n, k).contiguous(), weights.detach().reshape(n, k).contiguous()
        return rows, rows_in_one_piece(ids), rows_in_one_piece(weights)

    def _forward(self, hidden: Tensor, ids: Tensor, weights: Tensor, packed: PackedLora | None = None) -> Tensor:
        """One plain forward of inputs from `_inputs`: bf16 [n_tokens, hidden]."""
        out = _empty_like(hidden, memory_format=_CONTIGUOUS)
        if hidden.shape[0]:
            self.layer.forward(
                to_dlpack(hidden),
                to_dlpack(ids),
                to_dlpack(weights),
                to_dlpack(out),
                packed.adapter if packed is not None else None,
            )
        return out

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Runs the layer. The arguments depend on the mode: see the backends."""
        raise NotImplementedError

    submit_forward = only_in("inference", "submit_forward")
    sync_forward = only_in("inference", "sync_forward")
    select_deferred_experts = only_in("inference", "select_deferred_experts")
    init_lora_weights = only_in("sft", "init_lora_weights")
    update_lora_weights = only_in("sft", "update_lora_weights")
    forward_sft = only_in("sft", "forward_sft")
    backward = only_in("sft", "backward")
    clear_forward_cache = only_in("sft", "clear_forward_cache")


def _kind(value: object) -> str:
    return "None" if value is None else type(value).__name__


def _check_weight(name: str, tensor: object, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: got {_kind(tensor)}, expected a torch.Tensor")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name}: got dtype {tensor.dtype}, expected {' or '.join(map(str, dtypes))}")
    if not tensor.is_cpu:
        raise TypeError(f"{name}: got device {tensor.device}, expected cpu")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected {shape}")


def _check_input(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: got {type(tensor).__name__}, expected a torch.Tensor")
    if tensor.is_cuda:
        raise NotImplementedError(f"{name}: got a tensor on {tensor.device}; only CPU tensors are supported so far")
    if not tensor.is_cpu:
        raise TypeError(f"{name}: got device {tensor.device}, expected cpu")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name}: got dtype {tensor.dtype}, expected {' or '.join(map(str, dtypes))}")
