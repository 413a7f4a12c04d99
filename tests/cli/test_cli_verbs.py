"""`ktmoe sft`, `generate`, `demo`, and how errors look."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ktmoe.base import BaseMoEWrapper
from ktmoe.cli import demo_data, demo_model
from ktmoe.cli.__main__ import app, main


def invoke(*args: object, only_stdout: bool = False) -> str:
    result = CliRunner().invoke(app, [str(arg) for arg in args], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout if only_stdout else result.output


def run_main(monkeypatch: pytest.MonkeyPatch, *args: object) -> int:
    """The exit code of a real command line."""
    monkeypatch.setattr(sys, "argv", ["ktmoe", *map(str, args)])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


@pytest.fixture(scope="module")
def adapter(chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapter")


def test_sft_then_generate(chat_model: Path, rows_file: Path, adapter: Path) -> None:
    """Held-out loss falls, the adapter is a plain one, and it changes what is generated."""
    settings = ["--rank", 4, "--lr", 0.02, "--batch-size", 6, "--max-steps", 12, "--eval-fraction", 0.25]
    output = invoke("sft", "--model", chat_model, "--data", rows_file, "--output", adapter, *settings)
    before, after = map(float, re.findall(r"held-out loss \(6 rows\): ([0-9.]+) -> ([0-9.]+)", output)[0])
    assert after < 0.9 * before
    assert "step 12/12" in output
    assert re.search(r"[1-9][0-9,]* tokens at [0-9,]+ tok/s", output)
    assert (adapter / "adapter_model.safetensors").exists()
    assert json.loads((adapter / "adapter_config.json").read_text())["peft_type"] == "LORA"

    question = ["--prompt", "What is 1 plus 2?", "--max-new-tokens", 6]
    assert "6 tokens, " in invoke("generate", "--model", chat_model, *question, "--temperature", 0.7)
    tuning = ["--adapter", adapter]
    tuned = invoke("generate", "--model", chat_model, *tuning, *question, "--method", "AMXINT8", only_stdout=True)
    assert tuned.startswith("It is")


def test_gguf_file(chat_model: Path, rows_file: Path, tmp_path: Path) -> None:
    """One file is the whole model: config, tokenizer, weights. Or the file has the weights alone."""
    pytest.importorskip("gguf")
    from hf.gguf_checkpoint import llama_tensors, qwen3_keys, write_model
    from hf.tiny_models import make_checkpoint
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    sizes = {"vocab_size": len(tokenizer), "moe_intermediate_size": 64}
    folder = make_checkpoint("qwen3_moe", tmp_path / "original", **sizes)
    keys = qwen3_keys(AutoConfig.from_pretrained(folder)) | {"vocab_size": len(tokenizer)}
    types = {"_exps": "Q8_0"}
    file = write_model(tmp_path / "m.gguf", "qwen3moe", llama_tensors(folder), keys, tokenizer, types)
    settings = ["--method", "LLAMAFILE_SFT", "--rank", 4, "--lr", 0.02, "--batch-size", 6, "--max-steps", 2]
    output = invoke("sft", "--model", file, "--data", rows_file, "--output", tmp_path / "a", *settings)
    assert "experts held as LLAMAFILE_SFT" in output
    how = ["--method", "LLAMAFILE", "--adapter", tmp_path / "a", "--prompt", "What is", "--max-new-tokens", 6]
    alone = invoke("generate", "--model", file, *how, only_stdout=True)
    tokenizer.save_pretrained(folder)
    assert invoke("generate", "--model", folder, "--gguf-file", file, *how, only_stdout=True) == alone


def test_sft_options(chat_model: Path, rows_file: Path, tmp_path: Path) -> None:
    """The int8 method, experts only, accumulation, checkpointing, evaluation rows of their own, epochs."""
    settings = ["--method", "AMXINT8_SFT", "--no-attention", "--grad-accum", 2, "--gradient-checkpointing"]
    more = ["--eval-data", rows_file, "--epochs", 0.5, "--threads", 1, "--seed", 3, "--rank", 2, "--alpha", 4]
    output = invoke("sft", "--model", chat_model, "--data", rows_file, "--output", tmp_path / "a", *settings, *more)
    assert "held-out loss (24 rows)" in output
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 4)
    assert not config["target_modules"]


def test_packed_experts(
    chat_model: Path,
    rows_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What `ktmoe quantize` has made is used, in training too, and not packed again."""
    packed = tmp_path / "packed"
    question = ["generate", "--model", chat_model, "--prompt", "What is 1 plus 2?", "--max-new-tokens", 6]
    expected = invoke(*question, "--method", "LLAMAFILE", only_stdout=True)
    invoke("quantize", chat_model, "-o", packed, "-m", "LLAMAFILE")
    monkeypatch.setattr(BaseMoEWrapper, "put_expert", lambda *_: pytest.fail("an expert was packed"))
    assert invoke(*question, "--method", "LLAMAFILE", "--packed", packed, only_stdout=True) == expected
    training = ["sft", "--model", chat_model, "--data", rows_file, "--output", tmp_path / "a", "--max-steps", 2]
    assert "adapter saved" in invoke(*training, "--method", "LLAMAFILE_SFT", "--packed", packed)
    assert run_main(monkeypatch, *question, "--method", "AMXINT8", "--packed", packed) == 1
    assert "got LLAMAFILE (q4_k), expected AMXINT8" in " ".join(capsys.readouterr().err.split())


def test_user_errors_have_no_traceback(
    chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "bad.jsonl"
    rows.write_text('{"prompt": "x", "completion": "y"}\n{"prompt": "x"}\n')
    base = ["sft", "--model", chat_model, "--output", tmp_path / "out", "--data", rows]
    assert run_main(monkeypatch, *base) == 1
    errors = capsys.readouterr().err
    assert f"Error: {rows}:2: " in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "out").exists()
    assert run_main(monkeypatch, "generate", "--model", rows, "--prompt", "x") == 1
    assert "is a file, expected a model folder" in capsys.readouterr().err
    assert run_main(monkeypatch, "generate", "--model", tmp_path / "nowhere", "--prompt", "x") == 1
    assert f"Error: there is no model folder or GGUF file {tmp_path / 'nowhere'}" in capsys.readouterr().err
    assert run_main(monkeypatch, "generate", "--model", chat_model, "--prompt", "x", "--adapter", tmp_path) == 1
    assert "is not a PEFT adapter" in capsys.readouterr().err


def test_wrong_usage_is_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["sft", "--model", "m", "--output", tmp_path, "--data", tmp_path / "rows"]
    for wrong, text in (
        (["nonsense"], "No such command"),
        (["sft"], "Missing option"),
        ([*base, "--method", "AMXINT8"], "AMXINT8 is for inference only; methods that train: AMXBF16_SFT"),
        ([*base, "--method", "FAST"], "unknown method 'FAST'"),
        ([*base, "--rank", "0"], "rank"),
        ([*base, "--eval-data", "x", "--eval-fraction", "0.1"], "not both"),
    ):
        assert run_main(monkeypatch, *wrong) == 2
        assert text in capsys.readouterr().err


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(monkeypatch, "--version") == 0
    assert capsys.readouterr().out.startswith("ktmoe ")


@pytest.fixture(scope="module")
def docs() -> list[demo_data.Doc]:
    return demo_data.collect_docs()


def test_demo_data(docs: list[demo_data.Doc]) -> None:
    assert [doc.name for doc in docs] == sorted(doc.name for doc in docs)
    train, held_out = demo_data.question_answers(docs)
    assert (train, held_out) == demo_data.question_answers(docs)
    assert len(train) > 2000
    assert len(held_out) > 200
    assert not {pair.name for pair in train} & {pair.name for pair in held_out}
    assert not {pair.answer for pair in train} & {pair.answer for pair in held_out}
    dedent = next(pair for pair in (*train, *held_out) if pair.name == "textwrap.dedent")
    assert dedent.question == "What does textwrap.dedent do?"
    assert dedent.answer == "Remove any common leading whitespace from every line in `text`."


def test_demo_from_end_to_end(docs: list[demo_data.Doc], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole demo on a sliver of its text, twice: the second run takes the model from the cache."""
    monkeypatch.setenv("KTMOE_CACHE", str(tmp_path / "cache"))
    sliver = [doc for doc in docs if doc.name.startswith(("textwrap", "json", "os", "logging", "enum"))]
    monkeypatch.setattr(demo_data, "collect_docs", lambda: sliver)
    quick = demo_model.ModelSettings(
        vocab=400, hidden=64, layers=1, experts=4, inter=48, batch=4, length=32, steps=5, seconds=20.0
    )
    monkeypatch.setattr(demo_model, "QUICK", quick)
    output = invoke("demo", "--quick", "--output", tmp_path / "out")
    assert "saved in" in output
    before, after = map(float, re.findall(r"held-out loss \(\d+ questions\) +([0-9.]+) +([0-9.]+)", output)[0])
    assert after < before
    assert "apart" in output
    assert {"train.jsonl", "heldout.jsonl", "loss.png", "adapter"} <= {
        file.name for file in (tmp_path / "out").iterdir()
    }
    assert (tmp_path / "out" / "loss.png").read_bytes().startswith(b"\x89PNG")
    folder = next((tmp_path / "cache" / "demo").iterdir())
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert "model.layers.0.mlp.experts.3.down_proj.weight" in file.keys()  # noqa: SIM118
    assert demo_model.cached_model(quick, demo_data.training_text(sliver[::8], with_topics=False), print) == (
        folder,
        True,
    )
