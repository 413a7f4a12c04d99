"""llama.cpp's routed experts on its CPU backend: three MUL_MAT_ID, SwiGLU and the weighted sum, as one graph.

Driven through ctypes: needs ggml's shared libraries (the package llama-cpp-python brings them), no headers.
"""

from __future__ import annotations

import ctypes
import os
from ctypes import POINTER, Structure, c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.problem import Problem

FOLDER = "KTMOE_BENCH_GGML"
"""Environment: the folder of libggml-base.so and libggml-cpu.so; without it the system's libraries are used."""

_TENSOR = c_void_p
_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "ggml_tensor_overhead": (c_size_t, ()),
    "ggml_graph_overhead": (c_size_t, ()),
    "ggml_type_name": (c_char_p, (c_int,)),
    "ggml_free": (None, (c_void_p,)),
    "ggml_nbytes": (c_size_t, (_TENSOR,)),
    "ggml_new_tensor_2d": (_TENSOR, (c_void_p, c_int, c_int64, c_int64)),
    "ggml_new_tensor_3d": (_TENSOR, (c_void_p, c_int, c_int64, c_int64, c_int64)),
    "ggml_view_2d": (_TENSOR, (c_void_p, _TENSOR, c_int64, c_int64, c_size_t, c_size_t)),
    "ggml_mul_mat_id": (_TENSOR, (c_void_p, _TENSOR, _TENSOR, _TENSOR)),
    "ggml_silu": (_TENSOR, (c_void_p, _TENSOR)),
    "ggml_mul": (_TENSOR, (c_void_p, _TENSOR, _TENSOR)),
    "ggml_add": (_TENSOR, (c_void_p, _TENSOR, _TENSOR)),
    "ggml_set_input": (None, (_TENSOR,)),
    "ggml_set_output": (None, (_TENSOR,)),
    "ggml_new_graph": (c_void_p, (c_void_p,)),
    "ggml_build_forward_expand": (None, (c_void_p, _TENSOR)),
    "ggml_quantize_chunk": (c_size_t, (c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p)),
    "ggml_gallocr_new": (c_void_p, (c_void_p,)),
    "ggml_gallocr_free": (None, (c_void_p,)),
    "ggml_gallocr_alloc_graph": (c_bool, (c_void_p, c_void_p)),
    "ggml_backend_cpu_init": (c_void_p, ()),
    "ggml_backend_cpu_set_n_threads": (None, (c_void_p, c_int)),
    "ggml_backend_cpu_buffer_type": (c_void_p, ()),
    "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, (c_void_p, c_void_p)),
    "ggml_backend_buft_alloc_buffer": (c_void_p, (c_void_p, c_size_t)),
    "ggml_backend_buffer_free": (None, (c_void_p,)),
    "ggml_backend_tensor_set": (None, (_TENSOR, c_void_p, c_size_t, c_size_t)),
    "ggml_backend_tensor_get": (None, (_TENSOR, c_void_p, c_size_t, c_size_t)),
    "ggml_backend_graph_compute": (c_int, (c_void_p, c_void_p)),
    "ggml_backend_get_device": (c_void_p, (c_void_p,)),
    "ggml_backend_dev_backend_reg": (c_void_p, (c_void_p,)),
    "ggml_backend_dev_supports_op": (c_bool, (c_void_p, _TENSOR)),
    "ggml_backend_reg_get_proc_address": (c_void_p, (c_void_p, c_char_p)),
}


class _InitParams(Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


class _TensorHead(Structure):
    """The first fields of ggml_tensor."""

    _fields_ = (("type", c_int), ("buffer", c_void_p))


class _Ggml:
    """The functions of `_SIGNATURES`, looked up in both libraries, without the prefix "ggml_"."""

    F32, I32 = 0, 26

    def __init__(self) -> None:
        folder = os.environ.get(FOLDER)
        names = [str(Path(folder) / f"lib{n}.so") if folder else f"lib{n}.so" for n in ("ggml-base", "ggml-cpu")]
        libraries = [ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL) for name in names]
        for name, (result, arguments) in _SIGNATURES.items():
            function = next((getattr(lib, name) for lib in libraries if hasattr(lib, name)), None)
            if function is None:
                raise RuntimeError(f"llama.cpp: {' and '.join(names)} have no {name}")
            function.restype, function.argtypes = result, arguments
            setattr(self, name.removeprefix("ggml_"), function)
        self._init = next(lib.ggml_init for lib in libraries if hasattr(lib, "ggml_init"))
        self._init.restype, self._init.argtypes = c_void_p, (_InitParams,)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)

    def context(self, tensors: int) -> c_void_p:
        """A context that holds descriptions of tensors and one graph, no data."""
        size = self.tensor_overhead() * tensors + self.graph_overhead()
        return c_void_p(self._init(_InitParams(size, None, True)))

    def type_number(self, name: str) -> int:
        for number in range(64):
            if (self.type_name(number) or b"").decode().lower() == name.lower():
                return number
        raise ValueError(f"llama.cpp: got variant {name!r}, expected a ggml type such as BF16, Q8_0 or Q4_K")


class LlamaCpp:
    """variant: a ggml type. Weights lie where llama.cpp itself would put them: repacked if it can."""

    packed_bytes = 0

    def __init__(
        self, variant: str, problem: Problem, *, layers: int, threads: int, max_tokens: int, sft: bool
    ) -> None:
        self.g, self.shape, self.layers = _Ggml(), problem.shape, layers
        self.type = self.g.type_number(variant)
        self.backend = self.g.backend_cpu_init()
        self.g.backend_cpu_set_n_threads(self.backend, threads)
        self.buffer_type = self._best_buffer_type()
        packed = [torch.cat(problem.per_expert(w, self._quantized)) for w in problem.weights]
        self.weights = [self._load(packed) for _ in range(layers)]
        self.graphs: dict[int, _Graph] = {}

    def _new_weights(self, context: c_void_p) -> list[int]:
        s, new = self.shape, self.g.new_tensor_3d
        sizes = ((s.hidden, s.inter), (s.hidden, s.inter), (s.inter, s.hidden))
        return [new(context, self.type, k, n, s.experts) for k, n in sizes]

    def _best_buffer_type(self) -> int:
        """The CPU backend's extra buffer types repack; llama.cpp takes the first that supports the operation."""
        g, s = self.g, self.shape
        device = g.backend_get_device(self.backend)
        address = g.backend_reg_get_proc_address(g.backend_dev_backend_reg(device), b"ggml_backend_dev_get_extra_bufts")
        if address:
            extra = ctypes.CFUNCTYPE(POINTER(c_void_p), c_void_p)(address)(device)
            for index in range(64):
                if not extra or not extra[index]:
                    break
                context = g.context(4)
                weights = g.new_tensor_3d(context, self.type, s.hidden, s.inter, s.experts)
                rows = g.new_tensor_3d(context, g.F32, s.hidden, s.top_k, 512)
                product = g.mul_mat_id(context, weights, rows, g.new_tensor_2d(context, g.I32, s.top_k, 512))
                buffer = g.backend_buft_alloc_buffer(extra[index], 0)
                _TensorHead.from_address(weights).buffer = buffer
                good = bool(buffer) and g.backend_dev_supports_op(device, product)
                g.backend_buffer_free(buffer)
                g.free(context)
                if good:
                    return int(extra[index])
        return int(g.backend_cpu_buffer_type())

    def _quantized(self, expert: Tensor) -> Tensor:
        """The bytes of one matrix of one expert, by ggml's own rounding."""
        values = expert.float().contiguous()
        packed = torch.empty(values.numel() * 4, dtype=torch.uint8)
        size = self.g.quantize_chunk(self.type, values.data_ptr(), packed.data_ptr(), 0, *expert.shape, None)
        return packed[:size].clone()

    def _load(self, packed: list[Tensor]) -> list[int]:
        tensors = self._new_weights(context := self.g.context(4))
        if not self.g.backend_alloc_ctx_tensors_from_buft(context, self.buffer_type):
            raise MemoryError("llama.cpp: no memory for the weights")
        for tensor, data in zip(tensors, packed, strict=True):
            self.g.backend_tensor_set(tensor, data.data_ptr(), 0, len(data))
        return tensors

    def forward(self, layer: int, x: Tensor, ids: Tensor, mix: Tensor) -> Tensor:
        graph = self.graphs.get(layer)
        if graph is None or graph.tokens != len(x):
            graph = self.graphs[layer] = _Graph(self.g, self.shape, self.weights[layer], len(x))
        return graph.run(self.backend, x, ids, mix)


class _Graph:
    """One layer's computation for one number of tokens, built once and run often."""

    def __init__(self, g: Any, shape: Any, weights: list[int], tokens: int) -> None:
        self.g, self.tokens, h, k = g, tokens, shape.hidden, shape.top_k
        self.context = c = g.context(64)
        self.x = g.new_tensor_3d(c, g.F32, h, 1, tokens)
        self.ids = g.new_tensor_2d(c, g.I32, k, tokens)
        self.mix = g.new_tensor_3d(c, g.F32, 1, k, tokens)
        for tensor in (self.x, self.ids, self.mix):
            g.set_input(tensor)
        gate, up = (g.mul_mat_id(c, w, self.x, self.ids) for w in weights[:2])
        rows = g.mul_mat_id(c, weights[2], g.mul(c, g.silu(c, gate), up), self.ids)
        rows = g.mul(c, rows, self.mix)  # fp32 [tokens, top_k, hidden]
        slots = [g.view_2d(c, rows, h, tokens, 4 * h * k, 4 * h * slot) for slot in range(k)]
        total = slots[0]
        for slot in slots[1:]:
            total = g.add(c, total, slot)
        self.y = total
        g.set_output(total)
        self.graph = g.new_graph(c)
        g.build_forward_expand(self.graph, total)
        self.memory = g.gallocr_new(g.backend_cpu_buffer_type())
        if not g.gallocr_alloc_graph(self.memory, self.graph):
            raise MemoryError("llama.cpp: no memory for the activations")
        self.out = torch.empty(tokens, h)

    def run(self, backend: int, x: Tensor, ids: Tensor, mix: Tensor) -> Tensor:
        # The activations of llama.cpp are fp32; the conversion is part of its call here and small.
        for tensor, data in ((self.x, x.float()), (self.ids, ids.int()), (self.mix, mix)):
            self.g.backend_tensor_set(tensor, data.data_ptr(), 0, data.nbytes)
        if self.g.backend_graph_compute(backend, self.graph):
            raise RuntimeError("llama.cpp: the graph failed")
        self.g.backend_tensor_get(self.y, self.out.data_ptr(), 0, self.out.nbytes)
        return self.out

    def __del__(self) -> None:
        self.g.gallocr_free(self.memory)
        self.g.free(self.context)
