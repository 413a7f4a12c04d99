"""The C++ engine. Typed nd-arrays in (anything that speaks DLPack, or a DLPack capsule); nothing here knows torch.

Dimensions: n_tokens, hidden, inter, n_experts, top_k, rank. "bf16" below is the DLPack type (kDLBfloat, 16 bits).
Every function checks dtype, rank, shape, device and strides before any work; errors are TypeError (dtype, device),
ValueError (shape, value), RuntimeError (state) or MemoryError, with one message style:
``[function] what: got X, expected Y``.
The GIL is released during load, forward and backward.
"""

from typing import Any

Array = Any
"""An object with ``__dlpack__``, or a capsule named "dltensor"."""

# --- what this machine can do -------------------------------------------------------------------------------------
def cpu_report() -> dict[str, Any]:
    """Keys: model (str), features (dict name -> bool), amx_permission (str: "granted", "denied: ...", "no AMX"),
    isa_levels (list of dict: name, supported (bool), why (str)), affinity_cpus (int)."""

def isa_levels() -> list[str]:
    """The ISA levels that this host can run, best first; always ends with "portable"."""

def test_isa_levels() -> list[str]:
    """`isa_levels()` and the levels that exist for tests only ("emulated-amx": the AMX algorithm on software tiles)."""

def active_isa() -> str:
    """Best level, or the one that KTMOE_ISA in the environment names. RuntimeError if unknown or above the host."""

def kernel_name(op: str, format: str, isa: str) -> str:
    """The id of the kernel that a level uses, such as "forward/int8/amx"; op is "decode", "forward" or "backward"."""

# --- threads ------------------------------------------------------------------------------------------------------
class ThreadPool:
    """Workers of one engine, in sub-pools. The calling thread is worker 0 of the first one. Calls from several threads
    are served in arrival order."""

    def __init__(
        self,
        subpool_threads: list[int],
        subpool_nodes: list[int],  # NUMA node whose memory holds the sub-pool's weights; -1: wherever
        subpool_cpus: list[list[int]] = ...,  # where its own workers run; an empty list: anywhere
    ) -> None: ...
    @property
    def threads(self) -> int:
        """Of all sub-pools."""
    @property
    def started(self) -> bool:
        """False before the first use, and again in a forked child until it uses the pool."""

def node_memory_refused(node: int) -> str:
    """Why memory cannot be bound to this NUMA node; "" if it can, or node < 0."""

class Ticket:
    """One submitted task."""

    def wait(self) -> None:
        """Blocks until the task has run; raises what the task raised (each time it is asked), RuntimeError if the queue
        was closed before it began. Signal handlers run meanwhile: Ctrl-C ends the wait."""
    @property
    def done(self) -> bool: ...

class TaskQueue:
    """One FIFO of submitted forwards, run by one thread that starts on the first submit and sleeps when idle."""

    def __init__(self, capacity: int = 256) -> None: ...
    @property
    def capacity(self) -> int:
        """Tasks that may wait for their turn; the one that runs is not counted."""
    def submit_forward(
        self,
        layer: MoeLayer,
        hidden: Array,
        ids: Array,
        weights: Array,
        out: Array,
        lora: LoraAdapter | None = None,
        block: bool = True,
    ) -> Ticket:
        """Copies hidden, ids and weights before it returns; `out` is kept alive and written by the task.
        Waits for room in a full queue, as `Ticket.wait` waits; with block=False it is a RuntimeError."""
    def submit(self, job: ForwardJob, block: bool = True) -> Ticket:
        """The first part of a job, as `submit_forward` does it."""
    def submit_later(self, job: ForwardJob) -> Ticket:
        """The deferred experts of a job that has been submitted. It was admitted then: this does not wait for room."""
    def drain(self) -> None:
        """Waits until every submitted task has run (errors stay with their tickets)."""
    def close(self, timeout_s: float) -> None:
        """Later submits are a RuntimeError. Waits for at most timeout_s, then cancels the tasks that have not begun."""

class ForwardJob:
    """A forward in two parts: `out` = the experts that run now, and what `earlier`, the job of a layer before, has put
    off; if `later` is given, `later` = the other experts. protected_k: as in `ktmoe.deferred.select_deferred_experts`,
    with the routing weights as scores. hidden, ids and weights are copied."""

    def __init__(
        self,
        layer: MoeLayer,
        hidden: Array,
        ids: Array,
        weights: Array,
        out: Array,  # bf16 [n_tokens, hidden]
        lora: LoraAdapter | None = None,
        protected_k: int = 0,
        later: Array | None = None,  # bf16 [n_tokens, hidden]
        earlier: ForwardJob | None = None,
    ) -> None: ...

class StreamErrors:
    """Of the forwards that ran on streams."""

    def __init__(self) -> None: ...
    def check(self) -> None:
        """Raises the first error since the last call, if there is one."""

class StreamForward:
    """A `ForwardJob` that a CUDA stream starts and waits for, through host functions of the driver library
    (KTMOE_CUDA_DRIVER, or libcuda.so.1). It works on the caller's memory, which it keeps alive and the stream fills and
    empties. An error fills the output with NaN and goes to `errors`. A captured graph may run it again and again."""

    def __init__(
        self,
        queue: TaskQueue,
        errors: StreamErrors,
        name: str,  # for messages
        layer: MoeLayer,
        arrays: list[Array],  # n_tokens, int32 [1], read when the stream starts the forward: rows behind become zeros;
        # hidden, ids, weights, out of all rows, as in MoeLayer.forward, C-contiguous
        lora: LoraAdapter | None = None,
        protected_k: int = 0,
        later: Array | None = None,
        earlier: StreamForward | None = None,
        life: str = "once",  # "once" | "kept": launched often | "captured": launched into graphs
    ) -> None: ...
    # Each enqueues one step on a stream (CUstream as an integer). RuntimeError if there is no driver or it refuses.
    def start(self, stream: int) -> None: ...
    def wait(self, stream: int) -> None: ...
    def wait_later(self, stream: int) -> None: ...
    def settle(self, stream: int) -> None:
        """Waits for both parts, whatever becomes of them."""

# --- one layer ----------------------------------------------------------------------------------------------------
class LoraAdapter:
    """The packed mirror of the LoRA matrices of one layer: six, or four (no gate) with gated=False."""

    def __init__(
        self, n_experts: int, hidden: int, inter: int, rank: int, scaling: float, gated: bool = True
    ) -> None: ...
    def update(
        self,
        pool: ThreadPool,
        gate_a: Array | None,  # [n_experts, rank, hidden]   bf16 or fp32, any strides; None exactly without a gate
        gate_b: Array | None,  # [n_experts, inter, rank]
        up_a: Array,  # [n_experts, rank, hidden]
        up_b: Array,  # [n_experts, inter, rank]
        down_a: Array,  # [n_experts, rank, inter]
        down_b: Array,  # [n_experts, hidden, rank]
    ) -> None:
        """Copies (rounds to bf16) the tensors, once for all parts of the layer. Gives a `version` that no adapter of
        this process has had."""
    @property
    def rank(self) -> int: ...
    @property
    def scaling(self) -> float: ...
    @property
    def version(self) -> int:
        """0 before the first update."""

class ForwardCache:
    """What one backward needs. Owned by the caller; freed with the object."""

    @property
    def nbytes(self) -> int: ...
    @property
    def n_tokens(self) -> int: ...

LAYOUT_VERSION: int
"""Of the packed bytes: a file with another one cannot be attached."""

class MoeLayer:
    """The routed experts of one layer, cut along inter into one part for each sub-pool of `pool`."""

    def __init__(
        self,
        pool: ThreadPool,
        n_experts: int,
        top_k: int,
        hidden: int,
        inter: int,
        format: str,  # of gate and up: "bf16" | "int8" | a published format, see ktmoe.io.published
        isa: str = "",  # "" = active_isa()
        chunk_tokens: int = 0,  # 0 = engine's own bound on scratch
        on_gpu: Array | None = None,  # bool or uint8 [n_experts]: these get no memory here and are skipped
        activation: str = "silu",  # "silu" | "gelu_tanh" | "relu2" (no gate)
        swiglu_limit: float = 0.0,  # silu only; 0: no clamp
        swiglu_alpha: float = 0.0,  # silu only; > 0: gate * sigmoid(alpha * gate) * (up + 1)
        down_format: str = "",  # "" = format
        check_finite: bool = False,  # inputs that are not finite are a ValueError
    ) -> None: ...
    def load_expert(
        self,
        expert: int,
        gate: Array | None,  # None exactly without a gate
        up: Array,
        down: Array,
        gate_bias: Array | None = None,  # fp32 [inter]
        up_bias: Array | None = None,  # fp32 [inter]
        down_bias: Array | None = None,  # fp32 [hidden]
    ) -> None:
        """gate, up [inter, hidden], down [hidden, inter], bf16, C-contiguous. Packs (quantises) with all threads.
        A GPU expert is a ValueError. Loading an expert twice replaces it with its biases. Of the biases a missing one
        counts as zeros; all experts have biases or none (ValueError)."""
    def load_expert_raw(
        self,
        expert: int,
        gate: list[Array] | None,
        up: list[Array],
        down: list[Array],
        gate_bias: Array | None = None,
        up_bias: Array | None = None,
        down_bias: Array | None = None,
    ) -> None:
        """As `load_expert`, for published formats, packed without loss. The arrays of a matrix of n rows and k columns:

        int4_g32, _g64, _g128  uint8 [n, kp / 2] (low nibble = even k, value = (nibble - 8) * scale), bf16 [n, kp / g];
                               kp = k rounded up to the group g
        int4_g32z, _g64z, _g128z    the same with value = (nibble - zero) * scale, and uint8 zeros 0..15 [n, kp / g]
        fp8                    uint8 [n, k] (e4m3fn), fp32 scales [n, ceil(k / 128)]
        q4_0, q8_0, iq4_nl, mxfp4, q4_k, q5_k, q6_k    uint8 [n, bytes of a row], as GGUF stores rows (k rounded up)
        bf16                   bf16 [n, k]
        A scale or code that is not finite, or a zero point above 15, is a ValueError naming matrix and row; the expert
        is then not loaded."""
    @property
    def parts(self) -> list[tuple[int, int]]:
        """(first, number) of the columns of h of each part; fewer parts than sub-pools where inter is small."""
    def share_gpu_mask(self, mask: Array) -> None:
        """bool or uint8 [n_experts], C-contiguous, shared from now on: read before each forward; 1 = skipped here.
        Experts that were on the GPU when the layer was made have no memory here: RuntimeError in a forward that needs
        one."""
    @property
    def loaded(self) -> bool:
        """True when every CPU expert has been loaded."""
    def unload(self) -> None:
        """Drops all packed weights."""
    @property
    def packed_bytes(self) -> int: ...
    @property
    def expert_bytes(self) -> int:
        """Packed bytes of one expert, a multiple of 4096. They depend on the weights, formats and LAYOUT_VERSION alone,
        not on the ISA, the threads, the parts or the machine."""
    def read_expert(self, expert: int, out: Array) -> None:
        """Copies the packed bytes of a loaded expert to uint8 [expert_bytes]."""
    def attach(
        self,
        packed: Array,
        row: list[int],
        gate_bias: Array | None = None,  # fp32 [n, inter], copied
        up_bias: Array | None = None,  # fp32 [n, inter]
        down_bias: Array | None = None,  # fp32 [n, hidden]
    ) -> None:
        """Runs on the caller's packed bytes, uint8 [n, expert_bytes], 64-byte aligned, kept alive with the layer:
        expert e is packed[row[e]] (entries of GPU experts are ignored). Replaces all experts. Copies nothing, but for a
        layer of several parts, which get copies of their own."""
    @property
    def isa(self) -> str: ...
    @property
    def format(self) -> str:
        """Of gate and up."""
    @property
    def down_format(self) -> str: ...
    def dequantize_expert(self, expert: int, gate: Array | None, up: Array, down: Array) -> None:
        """Writes the weights that the kernels use: fp32 [inter, hidden], [inter, hidden], [hidden, inter]."""
    def forward(
        self,
        hidden: Array,  # [n_tokens, hidden] bf16, last stride 1
        ids: Array,  # [n_tokens, top_k] int32 | int64, C-contiguous; -1 and n_experts mean "not routed here"
        weights: Array,  # [n_tokens, top_k] fp32 | bf16, C-contiguous
        out: Array,  # [n_tokens, hidden] bf16, C-contiguous, not overlapping hidden
        lora: LoraAdapter | None = None,
        dropout: float = 0.0,  # 0 <= p < 1: drops elements of what LoRA's A multiplies, as csrc/moe/dropout.h says
        seed: int = 0,  # uint64; the same seed drops the same elements
    ) -> None: ...
    def forward_train(
        self,
        hidden: Array,
        ids: Array,
        weights: Array,
        out: Array,
        lora: LoraAdapter | None = None,
        dropout: float = 0.0,
        seed: int = 0,
    ) -> ForwardCache:
        """As `forward`, bitwise the same `out`, and keeps what `backward` needs (own copies)."""
    def backward(
        self,
        cache: ForwardCache,
        grad_out: Array,  # [n_tokens, hidden] bf16, last stride 1
        lora: LoraAdapter | None,
        grad_in: Array | None,  # out: [n_tokens, hidden] bf16 or fp32
        grad_weights: Array | None,  # out: [n_tokens, top_k] fp32
        lora_grads: list[Array]
        | None,  # out: fp32 C-contiguous arrays of the shapes in LoraAdapter.update, those not None
        base_grads: list[Array]
        | None = None,  # out: fp32 or bf16, gate (if there is one), up [n, inter, hidden], down [n, hidden, inter]
    ) -> None:
        """Writes (overwrites) every output given. A cache may be used more than once.
        RuntimeError "LoRA weights changed ..." if `lora` was updated since the forward."""

def unpack_expert(
    packed: Array,  # uint8, C-contiguous: what MoeLayer.read_expert gives
    hidden: int,
    inter: int,
    gate_up_format: str,
    down_format: str,
    gate: list[Array] | None,  # out, as up; None exactly without a gate
    up: list[Array],  # out: the parts of a matrix [inter, hidden] in its format
    down: list[Array],  # out: of [hidden, inter]
) -> None:
    """Packed bytes back into plain arrays, without loss. Parts are those of `MoeLayer.load_expert_raw`, bit for bit; of
    bf16: the numbers; of int8 and int4: exact int8 [n, k] and one fp32 scale a row [n]."""

def quantize(
    format: str,
    weights: Array,  # bf16 or fp32 [n, k], rows contiguous
    parts: list[Array],  # out: as `MoeLayer.load_expert_raw` takes them
    pool: ThreadPool | None = None,  # whose threads share the work; None: the caller's thread
    isa: str = "",
) -> None:
    """Floats in a published format. The same bytes on every level. ValueError for one that is only read from files."""

def dequantize(
    format: str,
    parts: list[Array],  # as `MoeLayer.load_expert_raw` takes them
    weights: Array,  # out: bf16 (rounded to nearest even) or fp32 [n, k]
    pool: ThreadPool | None = None,
    isa: str = "",
) -> None:
    """The numbers that a matrix in a published format stands for. What is not finite comes out as such."""

# --- for tests: see csrc/bindings/bind_testing.cc -----------------------------------------------------------------
testing: Any
