"""The wrapper for LoRA fine-tuning: a small stack of saved forwards over the engine's functional forward/backward."""

from __future__ import annotations

import operator
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from . import large
from .base import BaseMoEWrapper
from .base_weights import BIAS_NAMES, BaseWeights, base_weights
from .config import MoEConfig, SFTConfig
from .errors import cache_full, invalid_cache_index, lora_not_initialized, no_cache, weights_not_loaded
from .lora import LORA_NAMES, LoraTensors, PackedLora, check_lora, lora_shapes
from .methods import Method
from .runtime import reset_after_fork
from .train import Dropout, SavedForward, run_backward, run_forward

GRAD_NAMES = tuple(f"grad_{name}" for name in LORA_NAMES)


class LoraGrads(dict[str, Tensor]):
    """The LoRA gradients of one backward, fp32, under the names `GRAD_NAMES`, each on the device of its LoRA tensor:
    six, the last four without a gate, or none without LoRA."""

    grad_topk_weights: Tensor
    """Gradient of the routing weights: fp32, shaped like the weights of the forward."""


def _near(tensor: Tensor) -> Tensor:
    """A copy in CPU memory of what is on another device. What has no values, or is no tensor, is refused later."""
    return tensor.to("cpu") if isinstance(tensor, Tensor) and not tensor.is_cpu and not tensor.is_meta else tensor


class _Waiting(NamedTuple):
    saved: SavedForward
    hidden_shape: torch.Size
    weights_shape: torch.Size
    weights_device: torch.device


class AMXSFTMoEWrapper(BaseMoEWrapper):
    """AMXBF16_SFT, AMXINT8_SFT, ...: frozen experts with LoRA on gate, up and down.

    Keeps up to max_cache_depth forwards and runs their backwards last-in-first-out. The LoRA tensors belong to the
    caller; changed values are noticed by the next forward. Not for use from two threads at once (RuntimeError); for
    any other order than a stack, and inside torch's autograd, use `ktmoe.autograd.moe_forward`.

    lora_dropout drops elements of what each LoRA A multiplies (x, and h), while `training` is True (`train()`,
    `eval()`). Masks follow torch's CPU generator: what restores it, such as torch.utils.checkpoint, repeats them.
    With full_weight_grad the experts' own weights are trained, with LoRA or without: see `init_base_weights`.
    """

    def __init__(self, config: MoEConfig, method: Method, sft: SFTConfig | None = None) -> None:
        super().__init__(config, method)
        self.sft_config = sft or SFTConfig()
        self.lora_rank = self.sft_config.lora_rank
        self.lora_alpha = self.sft_config.lora_alpha
        self.lora_scaling = self.sft_config.scaling
        self.max_cache_depth = self.sft_config.max_cache_depth
        self.lora_dropout = self.sft_config.lora_dropout
        self.full_weight_grad = self.sft_config.full_weight_grad
        if self.full_weight_grad and method.format != "bf16":
            raise ValueError(
                f"full_weight_grad: got True with method {method.name}, expected False: only bf16 weights are trained"
            )
        self.training = True
        # Not the mirror of moe_forward: two users with different adapters would pack in turns.
        self._own_mirror = self._new_mirror()
        self._lora: LoraTensors | None = None
        self._grad_buffers: tuple[Tensor, ...] | None = None
        self._base: BaseWeights | None = None
        self._waiting: list[_Waiting] = []
        self._busy = threading.Lock()
        reset_after_fork(self)

    def _after_fork(self) -> None:
        self._busy = threading.Lock()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if not self._busy.acquire(blocking=False):
            raise RuntimeError(f"Layer {self.layer_idx} is in use by another thread: one training layer, one thread")
        try:
            yield
        finally:
            self._busy.release()

    def train(self, mode: bool = True) -> AMXSFTMoEWrapper:
        """Switches dropout on or off; returns the wrapper, as torch modules do."""
        self.training = mode
        return self

    def eval(self) -> AMXSFTMoEWrapper:
        """Switches dropout off."""
        return self.train(False)

    # --- LoRA weights ---------------------------------------------------------------------------------------------
    def init_lora_weights(
        self,
        gate_lora_a: Tensor | None,
        gate_lora_b: Tensor | None,
        up_lora_a: Tensor,
        up_lora_b: Tensor,
        down_lora_a: Tensor,
        down_lora_b: Tensor,
        grad_gate_lora_a: Tensor | None = None,
        grad_gate_lora_b: Tensor | None = None,
        grad_up_lora_a: Tensor | None = None,
        grad_up_lora_b: Tensor | None = None,
        grad_down_lora_a: Tensor | None = None,
        grad_down_lora_b: Tensor | None = None,
    ) -> None:
        """Sets the LoRA matrices: bf16 or fp32 tensors that stay the caller's, and are read again when they change.

        gate/up A [num_experts, rank, hidden], gate/up B [num_experts, inter, rank], down A [num_experts, rank, inter],
        down B [num_experts, hidden, rank]. Experts without a gate (activation="relu2") have no gate matrices: None.
        The optional buffers, all or none, have the same shapes; each backward overwrites them with its gradients (fp32
        contiguous buffers are written without a copy).
        TypeError (dtype, device) or ValueError (shape); what was set before then stays.
        """
        tensors = (gate_lora_a, gate_lora_b, up_lora_a, up_lora_b, down_lora_a, down_lora_b)
        shapes = self._lora_shapes()
        check_lora(tensors, shapes)
        given = (grad_gate_lora_a, grad_gate_lora_b, grad_up_lora_a, grad_up_lora_b, grad_down_lora_a, grad_down_lora_b)
        buffers = tuple(g.detach() for g in given if g is not None)
        if len(buffers) not in (0, len(shapes)):
            expected = "six" if self.gated else "four (the experts have no gate)"
            raise ValueError(f"grad buffers: got {len(buffers)}, expected all {expected} or none")
        if buffers:
            check_lora(given, shapes, prefix="grad_")
        with self._alone():
            lora = LoraTensors(*tensors, self.lora_scaling, self.lora_rank)
            self._own_mirror.acquire(lora, force=True)
            self._lora, self._grad_buffers = lora, buffers or None

    def update_lora_weights(self) -> None:
        """Reads the LoRA tensors again, changed or not. Needed only after writes that torch cannot see.

        torch sees in-place operations and the steps of `torch.optim` optimizers; it does not see writes through
        `.data`, NumPy or another process.
        """
        if self._lora is None:
            raise lora_not_initialized(self.layer_idx)
        with self._alone():
            self._own_mirror.acquire(self._lora, force=True)

    # --- base weights ---------------------------------------------------------------------------------------------
    def init_base_weights(
        self,
        gate: Tensor | None,
        up: Tensor,
        down: Tensor,
        grad_gate: Tensor | None = None,
        grad_up: Tensor | None = None,
        grad_down: Tensor | None = None,
        *,
        gate_bias: Tensor | None = None,
        up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
    ) -> None:
        """Loads the experts from tensors that are to be trained and stay the caller's. Needs full_weight_grad=True.

        gate, up [num_experts, inter, hidden], down [num_experts, hidden, inter], bf16 or fp32; shapes, gate and biases
        (frozen) otherwise as in `load_weights_from_tensors`. The experts compute with their bf16 rounding, as of now or
        of the last `update_base_weights`. Each backward overwrites the gradients: contiguous CPU tensors of the same
        shapes, fp32, or bf16 (rounded once for every chunked_prefill_size tokens); None: new fp32 tensors,
        `base_grads`.
        RuntimeError without full_weight_grad; TypeError or ValueError before anything is changed.
        """
        if not self.full_weight_grad:
            raise RuntimeError("init_base_weights() needs full_weight_grad=True")
        biases = dict(zip(BIAS_NAMES, (gate_bias, up_bias, down_bias), strict=True))
        shape = self.num_experts, self.hidden_size, self.moe_intermediate_size
        base = base_weights((gate, up, down), (grad_gate, grad_up, grad_down), biases, shape, self.gated)
        with self._alone():
            self._refuse_waiting("init_base_weights")
            self._pack_base(base)
            self._base = base

    def update_base_weights(self) -> None:
        """Packs the tensors of `init_base_weights` again, after an optimizer has changed them.

        RuntimeError before `init_base_weights`, and while forwards wait: their backward needs the weights they had.
        """
        if self._base is None:
            raise RuntimeError("Base weights not initialized. Call init_base_weights(...) before update_base_weights()")
        with self._alone():
            self._refuse_waiting("update_base_weights")
            self._pack_base(self._base)

    @property
    def base_grads(self) -> tuple[Tensor | None, ...] | None:
        """Gradients of gate, up and down, written by each backward; None before `init_base_weights`."""
        return None if self._base is None else self._base.grads

    def _refuse_waiting(self, name: str) -> None:
        if self._waiting:
            raise RuntimeError(
                f"{name}() while {len(self._waiting)} forward(s) wait for their backward, which needs their weights. "
                "Call backward(...) or clear_forward_cache() first"
            )

    def _pack_base(self, base: BaseWeights) -> None:
        from .io.published import plain_expert

        try:
            for e in self._cpu_experts:
                matrices, biases = base.expert(e)
                self.put_expert(e, plain_expert(*matrices, **biases))  # type: ignore[arg-type]  # up and down are there
        except BaseException:
            self.layer.unload()  # never a mixture of old and new experts
            raise

    # --- forward and backward -------------------------------------------------------------------------------------
    def forward_sft(
        self, hidden_states: Tensor, expert_ids: Tensor, weights: Tensor, save_for_backward: bool = True
    ) -> Tensor:
        """The weighted sum of the routed experts with their LoRA terms: bf16, shaped like hidden_states.

        Arguments and errors as in `InferenceMoEWrapper.forward`; tensors on other devices are copied here, and the
        result back. save_for_backward=True keeps what `backward` needs (RuntimeError without LoRA weights, unless base
        weights are trained, and when max_cache_depth forwards wait already); save_for_backward=False keeps nothing, and
        without LoRA weights runs the base experts alone.
        """
        if not isinstance(save_for_backward, bool):
            raise TypeError(f"save_for_backward: got {save_for_backward!r}, expected a bool")
        device = hidden_states.device if isinstance(hidden_states, Tensor) else None
        hidden, ids, flat_weights = self._inputs(_near(hidden_states), _near(expert_ids), _near(weights))
        with self._alone():
            packed: PackedLora | None = None
            if self._lora is not None:
                packed = self._own_mirror.acquire(self._lora)
            training = self.training and packed is not None
            if not save_for_backward:
                drop = Dropout.draw(self.lora_dropout if training else 0.0)
                return self._forward(hidden, ids, flat_weights, packed, drop).view(hidden_states.shape).to(device)
            if packed is None and self._base is None:
                raise lora_not_initialized(self.layer_idx)
            if len(self._waiting) >= self.max_cache_depth:
                raise cache_full(self.max_cache_depth)
            drop = Dropout.draw(self.lora_dropout if training else 0.0)
            out, saved = run_forward(self.layer, hidden, ids, flat_weights, packed, drop)
            self._waiting.append(_Waiting(saved, hidden_states.shape, weights.shape, weights.device))
            return out.view(hidden_states.shape).to(device)

    forward = forward_sft

    def backward(self, grad_output: Tensor, cache_idx: int | None = None) -> tuple[Tensor, LoraGrads]:
        """Gradients of one waiting forward, the latest one unless `cache_idx` (0 = oldest) says otherwise.

        grad_output: bf16, shaped like the output of that forward. Returns (grad_input, grad_loras): grad_input bf16 of
        the same shape; grad_loras has the fp32 gradients (six, or four for experts without a gate) and the attribute
        `grad_topk_weights`. Where gate_lora_a is up_lora_a both names have the sum. The values of the LoRA weights are
        those of that forward, whatever happened to the tensors since. Gradients of base weights go to where
        `init_base_weights` said.
        RuntimeError if weights or LoRA are not set, if no forward waits, or if `cache_idx` names none; TypeError and
        ValueError for grad_output, after which the forward still waits.
        """
        if not self.layer.loaded:
            raise weights_not_loaded(self.layer_idx)
        if self._lora is None and self._base is None:
            raise lora_not_initialized(self.layer_idx)
        with self._alone():
            index = self._waiting_index(cache_idx)
            saved, hidden_shape, weights_shape, weights_device = self._waiting[index]
            grads = run_backward(
                self.layer,
                saved,
                self._grad_rows(_near(grad_output), hidden_shape),
                hidden_dtype=torch.bfloat16,
                top_k=self.num_experts_per_tok,
                lora=self._grad_targets() if saved.packed is not None else None,
                base=self._base.targets if self._base is not None else None,
            )
            del self._waiting[index]
            assert grads.hidden is not None  # all three were asked for
            assert grads.weights is not None
            of_lora = grads.lora or []
            for buffer, grad in zip(self._grad_buffers or (), of_lora, strict=False):
                if buffer is not grad:
                    buffer.copy_(grad)
            names = GRAD_NAMES[len(GRAD_NAMES) - len(of_lora) :]
            devices = [t.device for t in self._lora.tensors] if self._lora is not None else []
        result = LoraGrads((n, g.to(d)) for n, g, d in zip(names, of_lora, devices, strict=False))
        result.grad_topk_weights = grads.weights.view(weights_shape).to(weights_device)
        return grads.hidden.view(hidden_shape).to(grad_output.device), result

    def clear_forward_cache(self) -> None:
        """Drops all forwards that wait for a backward, for example after a step that was abandoned."""
        with self._alone():
            self._waiting.clear()

    def _waiting_index(self, cache_idx: int | None) -> int:
        depth = len(self._waiting)
        if cache_idx is None:
            if not depth:
                raise no_cache()
            return depth - 1
        index = operator.index(cache_idx)
        if not 0 <= index < depth:
            raise invalid_cache_index(cache_idx, depth)
        return index

    def _lora_shapes(self) -> tuple[tuple[int, int, int], ...]:
        dims = self.num_experts, self.hidden_size, self.moe_intermediate_size
        return lora_shapes(*dims, self.lora_rank, self.gated)

    def _grad_targets(self) -> list[Tensor]:
        """fp32 tensors for the engine to write: the caller's buffers where they fit, new ones elsewhere.

        The A that gate and up share has one, which gets the sum.
        """
        shapes = self._lora_shapes()
        buffers = self._grad_buffers or (None,) * len(shapes)
        first = 1 if self._shared_a else 0
        targets = [
            b if b is not None and _is_target(b) else large.empty_f32(shape)
            for b, shape in zip(buffers[first:], shapes[first:], strict=True)
        ]
        return [targets[1], *targets] if self._shared_a else targets

    @property
    def _shared_a(self) -> bool:
        return self._lora is not None and self._lora.gate_a is self._lora.up_a

    def _grad_rows(self, grad_output: Tensor, shape: torch.Size) -> Tensor:
        if not isinstance(grad_output, Tensor):
            raise TypeError(f"grad_output: got {type(grad_output).__name__}, expected a torch.Tensor")
        if grad_output.dtype is not torch.bfloat16 or not grad_output.is_cpu:
            raise TypeError(f"grad_output: got {grad_output.dtype} on {grad_output.device}, expected bfloat16 on cpu")
        if grad_output.shape != shape:
            raise ValueError(f"grad_output: got shape {tuple(grad_output.shape)}, expected {tuple(shape)}")
        return grad_output.detach().reshape(-1, self.hidden_size)


def _is_target(buffer: Tensor) -> bool:
    """True for what the engine can write gradients into."""
    return buffer.dtype is torch.float32 and buffer.is_cpu and buffer.is_contiguous()
