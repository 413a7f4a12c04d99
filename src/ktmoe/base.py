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
from .io.packed_dir import is_packed_dir, packed_file_of
from .io.read_ahead import read_ahead
from .lora import LoraMirror, PackedLora
from .memory import check_memory
from .methods import METHODS, Method
from .packed_weights import PackedWeights
from .packing import Progress, ReadExpert
from .runtime import CPUInfer, engine_for, isa_without_amx

# Looked up on every forward: module globals are cheaper than attributes of torch.
_BF16, _F32, _I64, _I32 = torch.bfloat16, torch.float32, torch.int64, torch.int32
_ID_DTYPES = (_I64, _I32)
_WEIGHT_DTYPES = (_F32, _BF16)
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


class BaseMoEWrapper(PackedWeights):
    """The routed experts of one MoE layer. Made by `KTMoEWrapper`; see there for the parameters.

    Expert weights: gate and up [inter, hidden], down [hidden, inter]; y = down(silu(gate(x)) * up(x)).
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
        self.layer = self._new_layer(method.format, method.format)
        self.mirror = LoraMirror(
            self.cpu_infer.pool, config.num_experts, config.hidden_size, config.moe_intermediate_size
        )
        """Packed LoRA of `ktmoe.autograd.moe_forward`."""
        self._cpu_experts = [e for e, on_gpu in enumerate(config.gpu_experts_mask.tolist()) if not on_gpu]

    def _new_layer(self, gate_up_format: str, down_format: str) -> _ext.MoeLayer:
        """An empty engine layer of these formats. ValueError for a format that the engine does not have."""
        config = self.config
        if gate_up_format != down_format:
            raise ValueError(f"formats: got {gate_up_format} and {down_format}, expected the same for gate/up and down")
        return _ext.MoeLayer(
            self.cpu_infer.pool,
            config.num_experts,
            config.num_experts_per_tok,
            config.hidden_size,
            config.moe_intermediate_size,
            gate_up_format,
            "" if METHODS[self.method].amx else isa_without_amx(),
            config.chunked_prefill_size,
            to_dlpack(config.gpu_experts_mask.to(torch.uint8)) if config.num_gpu_experts else None,
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

    def load_weights(self, physical_to_logical_map: Tensor | None = None, *, progress: Progress | None = None) -> None:
        """Loads this layer's experts from the folder `weight_path`.

        A folder made by `ktmoe quantize` is mapped: nothing is read or copied, processes share the memory. From
        safetensors files in a Hugging Face layout (BF16, F16, F32) the experts are packed, two in memory at a time;
        what cpu_save=True has kept beside them is mapped instead if those files have not changed since.

        physical_to_logical_map: integers [num_experts]; slot e gets the weights of the file's expert map[e].
        None: slot e gets expert e. progress: called after each packed expert with the bytes read for it.
        WeightFileError if the files are missing, damaged or do not fit the layer, MemoryError if it clearly does not
        fit into memory, OSError if cpu_save cannot write; the layer is then not loaded.
        """
        if not self.weight_path:
            raise ValueError("weight_path: got an empty path, expected the folder of the model's safetensors files")
        if is_packed_dir(self.weight_path):
            self.load_packed(packed_file_of(self.weight_path, self.layer_idx), physical_to_logical_map)
            return
        if (kept := self._kept_file()) is not None:
            self.load_packed(kept, physical_to_logical_map)
            return
        with open_experts(self.weight_path, self.layer_idx, self.hidden_size, self.moe_intermediate_size) as source:
            where = f"{self.weight_path}, layer {self.layer_idx}"
            if physical_to_logical_map is None and source.n_experts != self.num_experts:
                raise WeightFileError(
                    f"{where}: got {source.n_experts} experts, expected num_experts={self.num_experts}"
                )
            slots = self._slots(physical_to_logical_map, source.n_experts, where)
            if self.cpu_save:
                self._load_and_keep(source.read, source.n_experts, physical_to_logical_map, progress)
            else:
                self.load_experts(source.read, slots, progress)

    def load_weights_from_tensors(
        self, gate: Tensor, up: Tensor, down: Tensor, physical_to_logical_map: Tensor | None = None
    ) -> None:
        """Loads (quantises) this layer's experts from tensors, which are not needed afterwards.

        gate, up: bf16 CPU [n, inter, hidden]; down: bf16 CPU [n, hidden, inter]; n = num_experts unless a map is given.
        physical_to_logical_map: as in `load_weights`. TypeError or ValueError before anything is changed.
        """
        h, i = self.hidden_size, self.moe_intermediate_size
        mapped = physical_to_logical_map is not None and isinstance(gate, Tensor) and gate.dim() == 3
        n = gate.shape[0] if mapped else self.num_experts
        for name, tensor, shape in (("gate", gate, (n, i, h)), ("up", up, (n, i, h)), ("down", down, (n, h, i))):
            _check_weight(name, tensor, shape)
        slots = self._slots(physical_to_logical_map, n, "gate, up, down")

        def read(expert: int) -> tuple[Tensor, ...]:
            return gate[expert], up[expert], down[expert]

        if self.cpu_save:
            self._load_and_keep(read, n, physical_to_logical_map)
        else:
            self.load_experts(read, slots)

    def load_experts(
        self, read: ReadExpert, slots: Sequence[tuple[int, int]] | None = None, progress: Progress | None = None
    ) -> None:
        """Packs experts into memory; the next one is read while one is packed.

        read(e): the tensors of expert e, as `load_expert` takes them, from a thread of its own. slots: (slot, e) of
        every expert on the CPU; None: slot e is expert e. progress: called after each expert with the bytes read.
        MemoryError before any work if the layer clearly does not fit; whatever is raised, the layer is then not loaded.
        """
        slots = self._slots(None, self.num_experts, "") if slots is None else slots
        source_bytes = 2 * 3 * self.hidden_size * self.moe_intermediate_size
        need = self.layer.expert_bytes * len(slots) + 2 * source_bytes - self.layer.packed_bytes
        check_memory(need, f"layer {self.layer_idx}: {len(slots)} experts in {self.layer.format}")

        def use(slot: tuple[int, int], tensors: tuple[Tensor, ...]) -> None:
            self.load_expert(slot[0], *tensors)
            if progress is not None:
                progress(sum(tensor.nbytes for tensor in tensors))

        with self._loading():
            read_ahead(lambda slot: read(slot[1]), slots, use)

    def load_expert(self, expert: int, gate: Tensor, up: Tensor, down: Tensor) -> None:
        """Loads one expert, for callers that stream: gate, up bf16 CPU [inter, hidden]; down bf16 CPU [hidden, inter].

        Tensors that are not contiguous are copied first. Loading an expert again replaces it.
        ValueError for an expert that is on the GPU.
        """
        h, i = self.hidden_size, self.moe_intermediate_size
        for name, tensor, shape in (("gate", gate, (i, h)), ("up", up, (i, h)), ("down", down, (h, i))):
            _check_weight(name, tensor, shape)
        self.layer.load_expert(expert, *(to_dlpack(t.detach().contiguous()) for t in (gate, up, down)))

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


def _check_weight(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: got {type(tensor).__name__}, expected a torch.Tensor")
    if tensor.dtype is not _BF16:
        raise TypeError(f"{name}: got dtype {tensor.dtype}, expected torch.bfloat16")
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
