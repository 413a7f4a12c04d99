"""Exceptions and the exact error texts that clients rely on.

Each helper returns an exception whose message starts with the text of the specification, word for word; what was
seen and what to do about it follow after it. Callers write ``raise weights_not_loaded(3)``.
"""

from __future__ import annotations


class WeightFileError(ValueError):
    """A weight file or folder is missing, damaged, hostile, or not in a layout that ktmoe reads.

    The message names the file and, where there is one, the tensor.
    """


_MODE_TITLE = {"inference": "inference", "sft": "SFT"}


def unknown_mode(mode: object) -> ValueError:
    """`mode` is neither "inference" nor "sft"."""
    return ValueError(f'Unknown mode: {mode}. Expected "inference" or "sft"')


def method_not_supported(method: object, mode: str, choices: list[str]) -> ValueError:
    """`method` does not exist in `mode`."""
    return ValueError(f"Method {method} not supported in {mode} mode. Methods of this mode: {', '.join(choices)}")


def not_available(name: str, mode: str) -> RuntimeError:
    """The method `name` was called on a wrapper of the other mode."""
    other = "sft" if mode == "inference" else "inference"
    return RuntimeError(
        f'{name}() not available in {_MODE_TITLE[mode]} mode. Create the wrapper with mode="{other}" to use it'
    )


def weights_not_loaded(layer_idx: int) -> RuntimeError:
    """A forward or backward before the experts of the layer were loaded."""
    return RuntimeError(f"Weights not loaded. Call load_weights(...) first (layer {layer_idx})")


def lora_not_initialized(layer_idx: int) -> RuntimeError:
    """A training call before `init_lora_weights`."""
    return RuntimeError(f"LoRA weights not initialized. Call init_lora_weights(...) first (layer {layer_idx})")


def cache_full(depth: int) -> RuntimeError:
    """More forwards are waiting for their backward than `max_cache_depth`."""
    return RuntimeError(
        f"Forward cache full. {depth} forward(s) wait for backward(): call it, raise max_cache_depth, "
        "or drop them with clear_forward_cache()"
    )


def no_cache() -> RuntimeError:
    """A backward without a forward that was saved for it."""
    return RuntimeError("No forward cache available. Call forward_sft(..., save_for_backward=True) first")


def invalid_cache_index(index: object, depth: int) -> RuntimeError:
    """`cache_idx` does not name a waiting forward."""
    expected = f"0..{depth - 1}" if depth else "none, no forward is waiting"
    return RuntimeError(f"Invalid cache index. Got {index}, expected {expected}")


def engine_closed() -> RuntimeError:
    """Work was submitted to an engine after `CPUInfer.close`."""
    return RuntimeError("the engine is closed: nothing can be submitted after CPUInfer.close()")


def shut_down() -> RuntimeError:
    """Work was submitted after the engine stopped."""
    return RuntimeError("ktmoe is shut down: the interpreter is exiting, nothing can be submitted any more")
