"""examples/cuda_graph_decode.py, run as a user would."""

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import cuda_graph_decode


@pytest.mark.parametrize("mode", [[], ["--mode", "per_token"]], ids=["weight-only", "per_token"])
def test_cuda_graph_decode_repeats_its_tokens(
    mode: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    cuda_graph_decode.main(["--steps", "12", "--batch", "3", *mode])
    out = capsys.readouterr().out
    assert len(re.findall(r"\d+ tokens/s, \d+\.\d\d ms a step", out)) == 2
    different = re.search(r"36 tokens, (\d+) different ones, the same both times", out)
    assert different is not None
    assert int(different[1]) > 12


def test_cuda_graph_decode_rejects_more_steps_than_the_cache_has(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        cuda_graph_decode.main(["--steps", "5000"])
    assert "the cache has 1024 positions" in capsys.readouterr().err
