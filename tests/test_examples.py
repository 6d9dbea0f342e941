"""The shipped model and the scripts of examples/, run as a user would."""

import itertools
import json
import math
import shutil
import sys
import sysconfig
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("tokenizers")
EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

import demo  # noqa: E402
import train_tiny_moe  # noqa: E402
from tiny_moe.evaluate import evaluate  # noqa: E402
from tiny_moe.generate import generate  # noqa: E402
from tiny_moe.model import StaticCache  # noqa: E402
from tiny_moe.quantized import MODES, load_bf16, load_quantized, use_mode  # noqa: E402
from tiny_moe.tokenizer import load_tokenizer, token_bytes  # noqa: E402

CPU = {"dtype": torch.float32, "device": "cpu"}


def test_shipped_model_is_small_and_recorded() -> None:
    total = sum(file.stat().st_size for file in demo.CHECKPOINT.iterdir())
    assert total <= 8e6
    log = json.loads((demo.CHECKPOINT / "training_log.json").read_text())
    assert log["held_out"].keys() == {"bf16", *(mode or "weight_only" for mode in MODES)}
    perplexity = {name: quality["perplexity"] for name, quality in log["held_out"].items()}
    assert perplexity["bf16"] < perplexity["weight_only"] < perplexity["static"] < 6.0


def test_shipped_model_predicts_python_in_every_mode() -> None:
    tokenizer = load_tokenizer(demo.CHECKPOINT)
    batches = demo.held_out_batches(tokenizer, torch.device("cpu"))[:1]
    bf16 = evaluate(load_bf16(demo.CHECKPOINT, **CPU), batches, token_bytes(tokenizer))
    # 11 bits a token if nothing were learnt.
    assert bf16.perplexity < 12
    model = load_quantized(demo.CHECKPOINT, **CPU)
    for mode in MODES:
        use_mode(model, mode)
        quality = evaluate(model, batches, token_bytes(tokenizer))
        assert abs(math.log(quality.perplexity / bf16.perplexity)) < 0.05, mode


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_shipped_model_decodes_with_cache_as_without(mode: str | None) -> None:
    """Token by token or all at once; per_tensor is left out of bit equality, its scale is not."""
    model = load_quantized(demo.CHECKPOINT, **CPU)
    use_mode(model, mode)
    prompt = load_tokenizer(demo.CHECKPOINT).encode(demo.PROMPT).ids
    tokens = list(generate(model, prompt, max_new_tokens=12, temperature=0))
    assert len(tokens) == 12
    if mode == "per_tensor":
        return
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + tokens]))
    expected = logits[0, len(prompt) - 1 : -1].argmax(dim=-1)
    assert tokens == expected.tolist()


@pytest.mark.parametrize("mode", [None, "per_token"], ids=str)
def test_shipped_model_compiles_as_one_graph(mode: str | None) -> None:
    torch._dynamo.reset()
    model = load_quantized(demo.CHECKPOINT, **CPU)
    use_mode(model, mode)
    step = torch.compile(model, fullgraph=True, backend="aot_eager")
    prompt = load_tokenizer(demo.CHECKPOINT).encode(demo.PROMPT).ids
    cache = StaticCache(model.config)
    compiled = list(generate(model, prompt, max_new_tokens=8, step=step, cache=cache))
    assert compiled == list(generate(model, prompt, max_new_tokens=8))


def test_demo_prints_table_and_saves_plot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(demo, "CPU_BATCHES", 1)
    monkeypatch.setattr(demo, "COMPLETION_TOKENS", 20)
    monkeypatch.setattr(demo, "TIMED_TOKENS", 2)
    # Traced as one graph as ever; Inductor's C++ is what takes the minutes.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setattr(sys, "argv", ["demo.py", "--out", str(tmp_path)])
    demo.main()
    out = capsys.readouterr().out
    assert "class FileCache:" in out
    for name in (demo.BASELINE, *demo.NAMES.values()):
        assert name in out
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_train_tiny_moe_learns_and_exports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = tmp_path / "library"
    stdlib = Path(sysconfig.get_path("stdlib"))
    for package in ("importlib", "json", "multiprocessing"):
        shutil.copytree(stdlib / package, library / package)
    out = tmp_path / "out"
    arguments = ["--out", out, "--minutes", 0.1, "--text", library, "--batch", 4, "--context", 64]
    monkeypatch.setattr(sys, "argv", ["train", *map(str, arguments), "--device", "cpu"])
    monkeypatch.setattr(train_tiny_moe, "PROMPTS", train_tiny_moe.PROMPTS[:1])
    # As many steps on a slow machine: the clock reads 0.2 s more each time.
    clock = itertools.count(0.0, 0.2)
    monkeypatch.setattr(train_tiny_moe, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    train_tiny_moe.main()
    log = json.loads((out / "training_log.json").read_text())
    assert log["curve"][-1]["nats_per_token"] < log["curve"][0]["nats_per_token"]
    # What was measured before saving is what loads.
    model = load_quantized(out, **CPU, activation_scale="static")
    corpus = train_tiny_moe.read_corpus(library, model.config.vocab_size)
    batches = train_tiny_moe.token_batches(corpus.held_out_T, 4, 64)
    quality = evaluate(model, batches, token_bytes(corpus.tokenizer))
    assert math.isclose(
        quality.nats_per_token, log["held_out"]["static"]["nats_per_token"], rel_tol=1e-6
    )


@torch.no_grad()
def test_shipped_model_is_transformers_own() -> None:
    """The model of examples/ and that of transformers are two implementations of one checkpoint."""
    pytest.importorskip("transformers")
    from nvfp4_ops.huggingface import load_pretrained, set_activation_scale

    theirs = load_pretrained(demo.CHECKPOINT, dtype=torch.float32)
    ours = load_quantized(demo.CHECKPOINT, **CPU)
    ids = torch.tensor([load_tokenizer(demo.CHECKPOINT).encode(demo.PROMPT).ids])
    for mode in (None, "static"):
        set_activation_scale(theirs, mode)
        use_mode(ours, mode)
        torch.testing.assert_close(theirs(ids).logits, ours(ids), rtol=1e-3, atol=1e-3)


def test_shipped_tokenizer_is_what_transformers_uses() -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(demo.CHECKPOINT)
    ids = tokenizer(demo.PROMPT)["input_ids"]
    assert ids == load_tokenizer(demo.CHECKPOINT).encode(demo.PROMPT).ids
    assert tokenizer.decode(ids) == demo.PROMPT


def test_hugging_face_examples_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    import generate_compiled
    import load_pretrained
    import replace_experts

    torch._dynamo.reset()
    replace_experts.main()
    assert "2 layers, the last: NVFP4MoE(" in capsys.readouterr().out
    load_pretrained.main()
    assert "def read_lines(path" in capsys.readouterr().out
    monkeypatch.setattr(generate_compiled, "NEW_TOKENS", 3)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    generate_compiled.main()
    assert capsys.readouterr().out.count("tokens/s") == 2


def test_readme_example_runs() -> None:
    readme = (EXAMPLES.parent / "README.md").read_text(encoding="utf-8")
    code = readme.split("```python\n")[1].split("```")[0]
    assert len(code.strip().splitlines()) <= 16
    exec(compile(code, "README.md", "exec"), {})
