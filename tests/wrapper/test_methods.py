"""The METHODS table against the specification."""

import pytest

from ktmoe.methods import METHODS, methods_of, resolve

SPECIFIED = {
    "inference": {
        "AMXINT4": "AMXMoEWrapper",
        "AMXINT8": "AMXMoEWrapper",
        "RAWINT4": "NativeMoEWrapper",
        "FP8": "NativeMoEWrapper",
        "LLAMAFILE": "LlamafileMoEWrapper",
        "MOE_INT4": "GeneralMoEWrapper",
        "MOE_INT8": "GeneralMoEWrapper",
        "BF16": "NativeMoEWrapper",
    },
    "sft": dict.fromkeys(
        ("AMXBF16_SFT", "AMXINT8_SFT", "AMXINT4_SFT", "AMXINT4_KGroup_SFT", "FP8_SFT", "LLAMAFILE_SFT"),
        "AMXSFTMoEWrapper",
    ),
}


def test_the_table_has_the_specified_methods_and_backends() -> None:
    for mode, rows in SPECIFIED.items():
        assert {m.name: m.backend for m in methods_of(mode)} == rows


@pytest.mark.parametrize("row", METHODS.values(), ids=lambda m: m.name)
def test_resolve(row) -> None:
    other = "sft" if row.mode == "inference" else "inference"
    with pytest.raises(ValueError, match=f"^Method {row.name} not supported in {other} mode"):
        resolve(row.name, other)
    with pytest.raises(ValueError, match="^Unknown mode: train"):
        resolve(row.name, "train")
    assert resolve(row.name, row.mode) is row
