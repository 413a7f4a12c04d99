"""What every wrapper shares: parameters, loading weights, checking inputs, and one plain forward."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from . import _ext, large
from .base_weights import BIAS_NAMES
from .capsule import rows_in_one_piece, to_dlpack
from .config import MoEConfig
from .errors import WeightFileError, not_available, weights_not_loaded
from .io.packed_dir import is_packed_dir, packed_file_of
from .io.read_ahead import read_ahead
from .lora import LoraMirror, PackedLora
from .memory import check_memory
from .methods import Method, method_for
from .packed_weights import PackedWeights, formats_of
from .packing import Progress, ReadExpert
from .runtime import CPUInfer, engine_for, isa_without_amx

if TYPE_CHECKING:  # what reads files is imported when something is loaded: `import ktmoe` stays quick
    from .io.published import PublishedExpert
    from .io.source import Source

# Looked up on every forward: module globals are cheaper than attributes of torch.
_BF16, _F32, _I64, _I32 = torch.bfloat16, torch.float32, torch.int64, torch.int32
_ID_DTYPES = (_I64, _I32)
_WEIGHT_DTYPES = (_F32, _BF16)
_empty_like = torch.empty_like
_CONTIGUOUS = torch.contiguous_format
_FEW_TOKENS = 64  # whose output is never large: no need to ask
_CPU = torch.device("cpu")


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

    Expert weights: gate and up [inter, hidden], down [hidden, inter]; y = down(silu(gate(x)) * up(x)), or another
    activation (see `KTMoEWrapper`), each projection with an optional bias. Biases are frozen, as the weights are.
    Experts that `gpu_experts_mask` marks contribute nothing to the output. The mask is shared: changes in place count
    from the next forward on. Those marked when the layer is made get no memory here, and can not come back.
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
        self.gpu_experts_mask = config.gpu_experts_mask
        self.weight_path = config.weight_path
        self.chunked_prefill_size = config.chunked_prefill_size
        self.cpu_save = config.cpu_save
        self.max_deferred_experts_per_token = config.max_deferred_experts_per_token
        self.cpu_infer: CPUInfer = engine_for(config)
        self._row = method
        self.gated = config.gated
        # Experts that have no memory here, whatever the shared mask says later.
        self._absent = config.gpu_experts_mask.to(torch.uint8)
        self.layer = self._new_layer(self._own_formats())
        # Not a method: who keeps it must not keep the wrapper, or its weights would wait for the garbage collector.
        dims = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self._new_mirror = functools.partial(LoraMirror, self.cpu_infer.pool, *dims, config.gated)
        self.mirror = self._new_mirror()
        """Packed LoRA of `ktmoe.autograd.moe_forward`."""
        self._cpu_experts = [e for e, absent in enumerate(self._absent.tolist()) if not absent]

    @property
    def num_gpu_experts(self) -> int:
        """Experts that `gpu_experts_mask` has on the GPU now."""
        return int(self.gpu_experts_mask.sum())

    def __repr__(self) -> str:
        c = self.config
        return (
            f"{type(self).__name__}(layer_idx={c.layer_idx}, method={self.method!r}, num_experts={c.num_experts}, "
            f"num_gpu_experts={self.num_gpu_experts}, hidden_size={c.hidden_size}, "
            f"moe_intermediate_size={c.moe_intermediate_size}, loaded={self.loaded})"
        )

    # --- formats --------------------------------------------------------------------------------------------------
    def _own_formats(self) -> tuple[str, str]:
        """Formats, as in `io.published`, in which bf16 weights are handed to the engine: gate/up and down."""
        if not self._row.published:
            return "bf16", "bf16"
        config = self.config
        return (self._row.format_of_floats(config.group_size, config.zero_point, config.gguf_type),) * 2

    @property
    def _formats(self) -> tuple[str, str]:
        """Formats in which the present layer takes weights."""
        return formats_of(self.layer) if self._row.published else self._own_formats()

    def _formats_of(self, source: Source) -> tuple[str, str]:
        """Formats in which weights of `source` are handed over: their own where the method computes with them."""
        if not self._row.published or source.kind == "bf16":
            return self._own_formats()
        if self._row.computes_with(source.kind):
            return source.formats
        path = self.weight_path or "the checkpoint"
        raise WeightFileError(
            f"{path}, layer {self.layer_idx}: holds {source.kind} experts, which method {self.method} "
            f"does not read; method {method_for(source.kind, self.mode)} does"
        )

    def adopt_formats(self, source: Source) -> None:
        """Makes the layer, without weights, fit a source: published formats stay what they are in the files."""
        formats = self._formats_of(source)
        if formats != self._formats:
            self.layer = self._new_layer(formats)

    def _new_layer(self, formats: tuple[str, str]) -> _ext.MoeLayer:
        """An empty engine layer for weights that are handed over in these formats."""
        return self._engine_layer(*(formats if self._row.published else (self._row.format, self._row.format)))

    def _engine_layer(self, gate_up_format: str, down_format: str) -> _ext.MoeLayer:
        """An empty engine layer of these formats. ValueError for a format that the engine does not have."""
        config = self.config
        layer = _ext.MoeLayer(
            self.cpu_infer.pool,
            config.num_experts,
            config.num_experts_per_tok,
            config.hidden_size,
            config.moe_intermediate_size,
            gate_up_format,
            "" if self._row.amx else isa_without_amx(),
            config.chunked_prefill_size,
            to_dlpack(self._absent) if bool(self._absent.any()) else None,
            config.activation,
            config.swiglu_limit,
            config.swiglu_alpha,
            down_format=down_format,
            check_finite=config.check_finite,
        )
        layer.share_gpu_mask(config.gpu_experts_mask)
        return layer

    # --- weights --------------------------------------------------------------------------------------------------
    @property
    def loaded(self) -> bool:
        """True when every expert that is not on the GPU has been loaded."""
        return self.layer.loaded

    def load_weights(self, physical_to_logical_map: Tensor | None = None, *, progress: Progress | None = None) -> None:
        """Loads this layer's experts from `weight_path`.

        A folder made by `ktmoe quantize` is mapped: nothing is read or copied, processes share the memory. Otherwise
        the experts of safetensors files in a Hugging Face layout (BF16, F16, F32, FP8, MXFP4, or compressed-tensors
        int4), of a GGUF file, or of a folder of GGUF files are packed, two in memory at a time, with the biases that
        they have; what cpu_save=True has kept beside the files is mapped instead if those have not changed since.
        RAWINT4, FP8 and LLAMAFILE (MXFP4 too) compute with files of their kind as they are and quantise plain ones; the
        other methods read all files as bf16.

        physical_to_logical_map: integers [num_experts]; slot e gets the weights of the file's expert map[e].
        None: slot e gets expert e. progress: called after each packed expert with the bytes read for it.
        WeightFileError if the files are missing, damaged or do not fit the layer, MemoryError if it clearly does not
        fit into memory, OSError if cpu_save cannot write; the layer is then not loaded.
        """
        if not self.weight_path:
            raise ValueError("weight_path: got an empty path, expected the folder of the model's weight files")
        is_packed = is_packed_dir(self.weight_path)
        packed = packed_file_of(self.weight_path, self.layer_idx) if is_packed else self._kept_file()
        if packed is not None:
            self.load_packed(packed, physical_to_logical_map)
            return
        with self._open_source() as source:
            where = f"{self.weight_path}, layer {self.layer_idx}"
            if physical_to_logical_map is None and source.n_experts != self.num_experts:
                raise WeightFileError(
                    f"{where}: got {source.n_experts} experts, expected num_experts={self.num_experts}"
                )
            slots = self._slots(physical_to_logical_map, source.n_experts, where)
            formats = self._formats_of(source)
            read = source.read_expert
            if self.cpu_save:
                names = tuple(source.biases(0))
                self._load_and_keep(
                    read, source.n_experts, physical_to_logical_map, progress, formats=formats, biases=names
                )
            else:
                self.load_experts(read, slots, progress, formats)

    def _open_source(self) -> Source:
        """This layer's experts in the weight files of `weight_path`."""
        from .io.sources import open_source

        shape = self.layer_idx, self.hidden_size, self.moe_intermediate_size
        prefer_gguf = self._row.published == "gguf"
        return open_source(self.weight_path, *shape, gated=self.gated, prefer_gguf=prefer_gguf)

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
        from .io.published import plain_expert

        first = up if gate is None else gate
        mapped = physical_to_logical_map is not None and isinstance(first, Tensor) and first.dim() == 3
        n = first.shape[0] if mapped else self.num_experts
        tensors = (gate, up, down, gate_bias, up_bias, down_bias)
        self._check_weights((n,), tensors)
        slots = self._slots(physical_to_logical_map, n, "gate, up, down")
        biases = {name: t for name, t in zip(BIAS_NAMES, tensors[3:], strict=True) if t is not None}

        def read(expert: int) -> PublishedExpert:
            own_gate = None if gate is None else gate[expert]
            return plain_expert(own_gate, up[expert], down[expert], **{name: b[expert] for name, b in biases.items()})

        formats = self._own_formats()
        if self.cpu_save:
            self._load_and_keep(read, n, physical_to_logical_map, formats=formats, biases=tuple(biases))
        else:
            self.load_experts(read, slots, formats=formats)

    def load_experts(
        self,
        read: ReadExpert,
        slots: Sequence[tuple[int, int]] | None = None,
        progress: Progress | None = None,
        formats: tuple[str, str] | None = None,
    ) -> None:
        """Packs experts into memory; the next one is read while one is packed.

        read(e): expert e, from a thread of its own. slots: (slot, e) of every expert on the CPU; None: slot e is
        expert e. progress: called after each expert with the bytes read. formats: of `ktmoe.io.published`, in which
        gate/up and down are handed to the engine; None: as they are now.
        MemoryError before any work if the layer clearly does not fit; whatever is raised, the layer is then not loaded.
        """
        slots = self._slots(None, self.num_experts, "") if slots is None else slots
        source_bytes = 2 * 3 * self.hidden_size * self.moe_intermediate_size
        target = self.layer if formats in (None, self._formats) else self._new_layer(formats)  # empty: costs nothing
        need = target.expert_bytes * len(slots) + 2 * source_bytes - self.layer.packed_bytes
        check_memory(need, f"layer {self.layer_idx}: {len(slots)} experts in {target.format}")

        def use(slot: tuple[int, int], weights: PublishedExpert) -> None:
            self.put_expert(slot[0], weights)
            if progress is not None:
                progress(weights.nbytes)

        with self._loading(formats):
            read_ahead(lambda slot: read(slot[1]), slots, use)

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
        from .io.published import plain_expert

        tensors = (gate, up, down, gate_bias, up_bias, down_bias)
        self._check_weights((), tensors)
        biases = {name: t for name, t in zip(BIAS_NAMES, tensors[3:], strict=True) if t is not None}
        self.put_expert(expert, plain_expert(gate, up, down, **biases))

    def put_expert(self, expert: int, weights: PublishedExpert) -> None:
        """Loads one expert in formats of `ktmoe.io.published`; through floats where the layer has other formats."""
        from .io.published import convert

        gate_up, down = self._formats
        own = zip(weights.matrices, (gate_up, gate_up, down), strict=True)
        ready = [None if m is None else convert(m, f, self.cpu_infer.pool) for m, f in own]
        arrays: list[Any] = [None if m is None else [to_dlpack(p.contiguous()) for p in m.parts] for m in ready]
        biases: dict[str, Any] = {name: to_dlpack(b.contiguous()) for name, b in weights.biases.items()}
        if self._formats == ("bf16", "bf16"):
            self.layer.load_expert(expert, *(None if parts is None else parts[0] for parts in arrays), **biases)
        else:
            self.layer.load_expert_raw(expert, *arrays, **biases)

    def expert_weights(self, expert: int) -> PublishedExpert:
        """The matrices of a loaded expert as plain tensors on the CPU, bit for bit in the formats of this layer.

        `matrices` are gate (None without one), up [inter, hidden], down [hidden, inter]; each has `format`, `parts`
        (see `ktmoe.io.published`) and `shape`. int4 (AMXINT4) comes as the exact int8 numbers it computes with.
        Without biases. ValueError for an expert that has no weights here.
        """
        from .export import export_expert

        return export_expert(self.layer, expert, self.hidden_size, self.moe_intermediate_size, self.gated)

    def copy_expert_weights_to(self, expert: int, gate: Tensor | None, up: Tensor, down: Tensor) -> None:
        """Writes the weights of a loaded expert into tensors of any float dtype, on any device.

        gate (None without one), up [inter, hidden], down [hidden, inter]. Errors as in `expert_weights`; TypeError or
        ValueError for a tensor that does not fit, before anything is written.
        """
        from .io.published import dequantize

        shape = self.moe_intermediate_size, self.hidden_size
        targets = (("gate", gate, shape), ("up", up, shape), ("down", down, shape[::-1]))
        for name, target, expected in targets:
            if name == "gate" and not self.gated:
                if target is not None:
                    raise TypeError(f"gate: got {_kind(target)}, expected None: these experts have no gate")
            elif not isinstance(target, Tensor) or not target.dtype.is_floating_point:
                raise TypeError(f"{name}: got {_kind(target)}, expected a floating point torch.Tensor")
            elif tuple(target.shape) != expected:
                raise ValueError(f"{name}: got shape {tuple(target.shape)}, expected {expected}")
        with torch.no_grad():
            for matrix, (_, target, _) in zip(self.expert_weights(expert).matrices, targets, strict=True):
                if matrix is not None and target is not None:
                    target.copy_(dequantize(matrix))

    def _check_weights(self, lead: tuple[int, ...], tensors: Sequence[Tensor | None]) -> None:
        """tensors: the three matrices and their biases, of as many experts as `lead` says."""
        h, i = self.hidden_size, self.moe_intermediate_size
        shapes = ((i, h), (i, h), (h, i), (i,), (i,), (h,))
        for name, tensor, shape in zip(("gate", "up", "down", *BIAS_NAMES), tensors, shapes, strict=True):
            is_bias = len(shape) == 1
            if name.startswith("gate") and not self.gated:
                if tensor is not None:
                    activation = self.config.activation
                    raise TypeError(f"{name}: got {_kind(tensor)}, expected None: {activation!r} experts have no gate")
            elif tensor is not None or not is_bias:
                _check_weight(name, tensor, (*lead, *shape), (_BF16, _F32) if is_bias else (_BF16,))

    @contextmanager
    def _loading(self, formats: tuple[str, str] | None = None) -> Iterator[None]:
        """A load that fails half-way, or is interrupted, leaves a layer without weights, never a mixture."""
        if formats in (None, self._formats):
            self.layer.unload()
        elif formats is not None:  # the engine's layer has its formats for life
            self.layer = self._new_layer(formats)
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

    def _unusual_inputs(
        self, hidden: Tensor, ids: Tensor, weights: Tensor, device: torch.device = _CPU
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Leading dimensions, strides, another device, or a mistake."""
        k = self.num_experts_per_tok
        _check_input("hidden_states", hidden, (_BF16,), device)
        _check_input("topk_ids", ids, _ID_DTYPES, device)
        _check_input("topk_weights", weights, _WEIGHT_DTYPES, device)
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

    def _forward(
        self,
        hidden: Tensor,
        ids: Tensor,
        weights: Tensor,
        packed: PackedLora | None = None,
        dropout: tuple[float, int] = (0.0, 0),
    ) -> Tensor:
        """One plain forward of inputs from `_inputs`: bf16 [n_tokens, hidden]. dropout: p and seed."""
        few = hidden.shape[0] <= _FEW_TOKENS
        out = _empty_like(hidden, memory_format=_CONTIGUOUS) if few else large.empty(hidden.shape, _BF16)
        if hidden.shape[0]:
            self.layer.forward(
                to_dlpack(hidden),
                to_dlpack(ids),
                to_dlpack(weights),
                to_dlpack(out),
                packed.adapter if packed is not None else None,
                *dropout,
            )
        return out

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Runs the layer. The arguments depend on the mode: see the backends."""
        raise NotImplementedError

    submit_forward = only_in("inference", "submit_forward")
    sync_forward = only_in("inference", "sync_forward")
    select_deferred_experts = only_in("inference", "select_deferred_experts")
    add_adapter = only_in("inference", "add_adapter")
    set_adapter = only_in("inference", "set_adapter")
    delete_adapter = only_in("inference", "delete_adapter")
    flush_deferred = only_in("inference", "flush_deferred")
    init_lora_weights = only_in("sft", "init_lora_weights")
    init_base_weights = only_in("sft", "init_base_weights")
    update_base_weights = only_in("sft", "update_base_weights")
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


def _check_input(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], device: torch.device) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: got {type(tensor).__name__}, expected a torch.Tensor")
    if tensor.device != device:
        raise TypeError(f"{name}: got device {tensor.device}, expected {device}")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name}: got dtype {tensor.dtype}, expected {' or '.join(map(str, dtypes))}")
