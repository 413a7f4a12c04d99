"""Signals, child processes and data loaders; and the list of what covers each fault that the engine must survive."""

import ast
import multiprocessing
import os
import signal
import threading
from pathlib import Path

import pytest
import torch
import torch_oracle as ref
from oracle import child

SHAPE = ref.Shape()
TESTS = Path(__file__).parents[1]

# Each fault, and the tests that show what happens then.
COVERED = {
    "shard truncated, missing, of another size": [
        "test_a_truncated_shard_names_file_and_tensor",
        "test_missing_tensor_and_missing_shard",
        "test_every_truncation_is_refused",
    ],
    "bytes flipped": ["test_a_flipped_bit_is_found_by_verify", "test_a_scale_that_is_not_finite_is_refused"],
    "made by another version": ["test_another_layout_version", "test_edited_metadata"],
    "NaN or Inf in one row": ["test_a_bad_row_stays_alone", "test_other_rows_keep_their_bits"],
    "NaN or Inf with check_finite=True": ["test_hidden_states", "test_routing_weights", "test_training"],
    "expert ids out of range": [
        "test_other_ids_are_refused_by_position_and_value",
        "test_absent_slots_contribute_nothing",
    ],
    "an expert twice in one token": ["test_a_duplicate_expert_counts_twice"],
    "ids of either type": ["test_types_of_ids_and_weights"],
    "wrong dtype, rank, shape, device": ["test_bad_inputs_are_named", "test_bad_tensor_is_named_and_changes_nothing"],
    "strided rows, overlapping output": ["test_strided_rows_of_hidden", "test_out_may_not_overlap_hidden"],
    "no tokens": ["test_zero_tokens", "test_no_tokens"],
    "more tokens than a chunk": ["test_chunks_equal_calls_chunk_by_chunk"],
    "calls in the wrong order": ["test_not_loaded", "test_text", "test_state_survives_refused_calls"],
    "LoRA changed between forward and backward": ["test_lora_errors", "test_the_loop_of_the_specification"],
    "exception inside a worker": ["test_the_pool_works_at_once_after_an_error", "test_errors_stay_with_their_caller"],
    "many Python threads": ["test_forwards", "test_training_steps", "test_first_use_by_all_at_once"],
    "exit while it runs": ["test_clean_exit", "test_exit_with_work_on_the_stream"],
    "fork": ["test_while_another_thread_runs_forwards", "test_fork_cycles", "test_workers_of_a_data_loader"],
    "spawn": ["test_a_spawned_process"],
    "Ctrl-C": ["test_ctrl_c_during_a_forward", "test_ctrl_c_ends_a_wait", "test_a_load_that_breaks_off_leaves_nothing"],
    "no memory": [
        "test_a_load_that_cannot_fit_is_refused_before_it_starts",
        "test_loading",
        "test_forward",
        "test_a_training_step",
    ],
    "fewer nodes, cpus, rights than asked": [
        "test_more_subpools_than_nodes_is_one_warning_and_works",
        "test_too_many_threads_are_cut_with_a_warning",
        "test_a_refused_mbind_is_one_warning_and_works",
    ],
    "killed while writing": ["test_killed_at_any_step", "test_what_a_killed_process_leaves_is_used_again"],
    "disk full, read-only": [
        "test_disk_full",
        "test_disk_that_is_too_small",
        "test_a_cache_that_cannot_be_written_is_one_warning",
    ],
    "file replaced or cut while open": [
        "test_a_file_that_is_replaced_while_it_is_open",
        "test_a_file_that_shrinks_while_it_is_open",
        "test_a_mapping_outlives_the_file",
    ],
    "no AMX, unknown level": ["test_a_level_above_the_host_is_refused", "test_an_unknown_level_lists_the_choices"],
    "torch missing": ["test_works_without_torch"],
    "bounded queue, submit after close": [
        "test_a_full_queue",
        "test_submit_after_close",
        "test_close_cancels_what_has_not_begun",
    ],
    "long use": ["test_create_and_destroy", "test_mixed_use_by_call_count", "test_no_memory_is_kept_per_call"],
    "nothing changes outside": [
        "test_signals_affinity_and_folder_stay",
        "test_float_behaviour_stays",
        "test_no_output",
    ],
}


@pytest.fixture(scope="module")
def names() -> set[str]:
    found = set()
    for path in TESTS.rglob("test_*.py"):
        found |= {n.name for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)}
    return found


@pytest.mark.parametrize("fault", COVERED)
def test_each_fault_has_its_tests(fault: str, names: set[str]) -> None:
    assert set(COVERED[fault]) <= names


def test_ctrl_c_during_a_forward() -> None:
    """It surfaces when the forward returns; the next call is right."""

    def body(say: object) -> None:
        wrapper = ref.loaded(SHAPE, "BF16", cpuinfer_threads=2)
        few, many = ref.batch(SHAPE, 5), ref.batch(SHAPE, 60_000)
        want = wrapper.forward(*few)
        signal.signal(signal.SIGINT, signal.default_int_handler)

        def for_ever() -> None:
            while True:
                wrapper.forward(*many)

        for _ in range(3):
            threading.Timer(0.02, os.kill, [os.getpid(), signal.SIGINT]).start()
            with pytest.raises(KeyboardInterrupt):
                for_ever()
            assert torch.equal(wrapper.forward(*few), want)

    child.run(body, timeout=60).check()


class _Computing(torch.utils.data.Dataset):
    """Items that need a forward: in workers, and in the parent meanwhile."""

    def __init__(self, wrapper) -> None:
        self.wrapper = wrapper

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.wrapper.forward(*ref.batch(SHAPE, 7, seed=index))


def test_workers_of_a_data_loader() -> None:
    def body(say: object) -> None:
        wrapper = ref.loaded(SHAPE, "AMXINT8", cpuinfer_threads=2)
        data = _Computing(wrapper)
        want = torch.stack([data[i] for i in range(len(data))])
        loader = torch.utils.data.DataLoader(data, batch_size=3, num_workers=2, multiprocessing_context="fork")
        for _ in range(2):
            wrapper.submit_forward(*ref.batch(SHAPE, 50))
            got = []
            for batch in loader:
                got.append(batch)
                wrapper.forward(*ref.batch(SHAPE, 9))
            assert torch.equal(torch.cat(got), want)
            wrapper.sync_forward()

    child.run(body, timeout=120).check()


def _spawned(queue: "multiprocessing.Queue[list[float]]") -> None:
    wrapper = ref.loaded(SHAPE, "AMXINT8")
    queue.put(wrapper.forward(*ref.batch(SHAPE, 3)).float().flatten().tolist())


def test_a_spawned_process() -> None:
    """int8 has the same bits in any process."""
    wrapper = ref.loaded(SHAPE, "AMXINT8")
    want = wrapper.forward(*ref.batch(SHAPE, 3)).float().flatten().tolist()
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_spawned, args=(queue,))
    process.start()
    try:
        assert queue.get(timeout=120) == want
    finally:
        process.join(60)
        process.kill()
    assert process.exitcode == 0
