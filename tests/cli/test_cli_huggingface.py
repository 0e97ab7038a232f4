"""The commands on folders of transformers: their own class, weights and tokenizer, and real text."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.support.command_line import TOY, invoke

WORDS = [f"w{i}" for i in range(60)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama with its tokenizer, as from_pretrained reads it."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    place = tmp_path_factory.mktemp("llama")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=3, head_dim=4, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(1)
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(place)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("texts") / "texts.txt"
    file.write_text(" ".join(WORDS[i * i % 59] for i in range(900)))
    return file


def target(folder: Path, share: float) -> str:
    return str(int(share * transformers.AutoModelForCausalLM.from_pretrained(folder).num_parameters()))


def copied(folder: Path, to: Path, **changes: Any) -> Path:
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    body = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({**body, **changes}))
    return to


@pytest.mark.parametrize("method", [None, "activation", "l2"])
def test_prune_writes_a_plain_folder_from_the_weights_of_the_folder(
    folder: Path, texts: Path, tmp_path: Path, method: str | None
) -> None:
    more = [] if method is None else ["--method", method]
    code, out, err = invoke(
        "prune", f"hf:{folder}", "--params", "0.7", "--uniform", "--data", str(texts), "--out",
        str(tmp_path / "out"), *more,
    )  # fmt: skip
    assert code == 0, err
    assert "perplexity of the last 180 tokens" in out
    pruned = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert type(pruned).__name__ == "LlamaForCausalLM"
    assert pruned.dtype == torch.bfloat16  # as it was stored
    assert pruned.num_parameters() <= int(target(folder, 0.7))
    dense = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert torch.equal(pruned.model.embed_tokens.weight, dense.model.embed_tokens.weight)
    assert len(transformers.AutoTokenizer.from_pretrained(tmp_path / "out")) == len(WORDS)


def test_without_uniform_the_result_is_a_checkpoint_of_ours(folder: Path, tmp_path: Path) -> None:
    code, out, err = invoke(
        "prune", f"hf:{folder}", "--params", target(folder, 0.8), "--out", str(tmp_path / "out")
    )  # fmt: skip
    assert code == 0, err
    assert "--uniform" in out
    assert (tmp_path / "out" / "manifest.json").is_file()
    code, again, err = invoke("inspect", f"hf:{tmp_path / 'out'}")
    assert code == 0, err
    assert "lm_head" in again


def test_inspect_and_verify_read_the_class_of_the_folder(folder: Path) -> None:
    code, out, err = invoke("inspect", f"hf:{folder}")
    assert code == 0, err
    assert "lm_head" in out
    code, out, err = invoke("verify", f"hf:{folder}")
    assert code == 0, err
    assert "pruned == masked" in out


@pytest.mark.parametrize("model", ["folder", "config", "timm:test_resnet", "torchvision:squeezenet1_1"])
def test_random_weights_are_pruned_only_on_request(folder: Path, tmp_path: Path, model: str) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text((folder / "config.json").read_text())
    name = {"folder": f"hf:{bare}", "config": f"hf:{folder / 'config.json'}"}.get(model, model)
    args = ("prune", name, "--speed-up", "1.1", "--out", str(tmp_path / "out"))
    code, _, err = invoke(*args)
    assert code == 1
    assert "--random-weights" in err
    assert not (tmp_path / "out").exists()
    if model == "folder":
        assert invoke(*args, "--random-weights")[0] == 0


@pytest.mark.parametrize(
    ("changes", "hint"),
    [
        ({"auto_map": {"AutoModel": "own.Model"}}, "code of its own"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized"),
        ({"architectures": ["LamaForCausalLM"]}, "LamaForCausalLM"),
        ({"architectures": "LlamaForCausalLM"}, "['LlamaForCausalLM']"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "score.weight"),
        ({"architectures": ["LlamaModel"]}, "lm_head.weight"),
        ({"num_hidden_layers": 3}, "lacks"),
        ({"num_hidden_layers": 1}, "also holds"),
        ({"intermediate_size": 39}, "[24, 40], and LlamaForCausalLM has [24, 39]"),
        ({"vocab_size": 65}, "[64, 24], and LlamaForCausalLM has [65, 24]"),
        ({"model_type": "lama"}, "lama"),
    ],
)
def test_a_folder_that_does_not_fit_its_class_is_refused(
    folder: Path, tmp_path: Path, changes: dict[str, Any], hint: str
) -> None:
    place = copied(folder, tmp_path / "in", **changes)
    code, _, err = invoke("prune", f"hf:{place}", "--speed-up", "1.1", "--out", str(tmp_path / "out"))
    assert code == 1
    assert hint in err
    assert not (tmp_path / "out").exists()


class Harmful:
    """A pickle of it would make a file as it is read."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


def damage(kind: str, place: Path) -> str:
    """Damage the weights of a folder; return what names the model."""
    file, config = place / "model.safetensors", place / "config.json"
    data = file.read_bytes()
    if kind == "cut off":
        file.write_bytes(data[:-100])
    elif kind == "no header":
        file.write_bytes(data[:5])
    elif kind == "pickle":
        file.unlink()
        torch.save({"a": Harmful(place / "harm")}, place / "pytorch_model.bin")
    elif kind == "missing shard":
        transformers.AutoModelForCausalLM.from_pretrained(place).save_pretrained(place, max_shard_size="4KB")
        file.unlink(missing_ok=True)
        min(place.glob("model-*")).unlink()
    else:  # GGUF
        for name in (config, file):
            name.unlink()
        for name in ("a.gguf", "b.gguf")[: 2 if kind == "two GGUF" else 1]:
            (place / name).write_bytes(b"GGUF\x03")
    return f"hf:{place}"


@pytest.mark.parametrize("kind", ["cut off", "no header", "pickle", "missing shard", "GGUF", "two GGUF"])
def test_damaged_weights_are_refused(folder: Path, tmp_path: Path, kind: str) -> None:
    model = damage(kind, copied(folder, tmp_path / "in"))
    code, _, err = invoke("prune", model, "--speed-up", "1.1", "--uniform", "--out", str(tmp_path / "out"))
    assert code == 1
    assert model in err
    assert ("a.gguf" in err) if kind == "two GGUF" else ("Restore the files" in err)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "in" / "harm").exists()


def test_weights_in_another_form_are_refused_with_the_remedy(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "w.pth")
    for weights in (str(tmp_path / "w.pth"), "IMAGENET1K_V1"):
        code, _, err = invoke(
            "prune", "timm:test_resnet", "--params", "0.8", "--out", str(tmp_path / "out"), "--weights", weights
        )
        assert code == 1
        assert f"{weights}: not a readable safetensors file" in err
        assert "save_file" in err


def test_adapters_are_refused(folder: Path, tmp_path: Path) -> None:
    place = copied(folder, tmp_path / "in")
    (place / "adapter_config.json").write_text("{}")
    code, _, err = invoke("inspect", f"hf:{place}")
    assert code == 1
    assert "merge_and_unload" in err


def test_a_damaged_config_is_refused(folder: Path, tmp_path: Path) -> None:
    place = copied(folder, tmp_path / "in")
    for text in ("{", "[]"):
        (place / "config.json").write_text(text)
        code, _, err = invoke("inspect", f"hf:{place}")
        assert code == 1
        assert "config.json" in err


@pytest.mark.parametrize(
    ("args", "hint"),
    [
        (["--data", "/nowhere.txt"], "/nowhere.txt"),
        (["--data", "SHORT"], "at least 64"),
        (["--uniform", "--out", "FULL"], "overwrite"),
        (["--method", "taylor"], "--method"),
    ],
)
def test_bad_options_are_refused_before_the_work(folder: Path, tmp_path: Path, args: list[str], hint: str) -> None:
    (tmp_path / "short.txt").write_text("w1 w2 w3")
    names = {"SHORT": str(tmp_path / "short.txt"), "FULL": str(folder)}
    given = [names.get(arg, arg) for arg in args]
    out = [] if "--out" in args else ["--out", str(tmp_path / "out")]
    code, _, err = invoke("prune", f"hf:{folder}", "--speed-up", "1.1", *given, *out)
    assert code == 1
    assert hint in err
    assert not (tmp_path / "out").exists()


def test_texts_are_for_language_models(folder: Path, texts: Path, tmp_path: Path) -> None:
    code, _, err = invoke(
        "prune",
        TOY,
        "--input-shape",
        "1,3,8,8",
        "--speed-up",
        "2",
        "--data",
        str(texts),
        "--out",
        str(tmp_path / "out"),
    )
    assert code == 1
    assert "causal language models" in err


def test_blocks_are_removed_before_units_and_count_in_the_target(folder: Path, texts: Path, tmp_path: Path) -> None:
    allowed = int(target(folder, 0.6))
    out = tmp_path / "out"
    code, text, error = invoke(
        "prune", f"hf:{folder}", "--params", "0.6", "--uniform", "--data", str(texts), "--remove-blocks", "1",
        "--out", str(out),
    )  # fmt: skip
    assert code == 0, error
    assert "removed model.layers." in text
    assert "shorter" in text
    again = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert again.config.num_hidden_layers == 1
    assert again.num_parameters() <= allowed
    for options, reason in (
        (["--speed-up-latency", "2", "--remove-blocks", "1"], "--remove-blocks goes with"),
        (["--params", "0.5", "--remove-blocks", "2"], "one entry of each container stays"),
    ):
        code, _, error = invoke("prune", f"hf:{folder}", *options, "--out", str(tmp_path / "no"))
        assert code == 1
        assert reason in " ".join(error.split())
    assert not (tmp_path / "no").exists()


def test_texts_compensate_what_was_removed(folder: Path, texts: Path, tmp_path: Path) -> None:
    kept = {}
    for name, more in (("with", []), ("without", ["--no-compensate"])):
        code, out, err = invoke(
            "prune", f"hf:{folder}", "--params", "0.7", "--uniform", "--data", str(texts), "--out",
            str(tmp_path / name), *more,
        )  # fmt: skip
        assert code == 0, err
        assert ("compensated" in out) == (name == "with")
        (error,) = re.findall(r"with these weights and this selection (\S+)", out)
        assert float(error) < 1e-5  # the compensated model without the units, and with zeros in their place
        kept[name] = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)
    dense = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(texts.read_text(), return_tensors="pt")["input_ids"][:, :512].view(8, 64)
    with torch.no_grad():
        wanted = dense(tokens).logits
        lost = {name: float((model(tokens).logits - wanted).square().mean()) for name, model in kept.items()}
    for part in ("gate_proj", "up_proj"):  # the same units went, and what they read stays as it was
        first, second = (getattr(model.model.layers[0].mlp, part).weight for model in kept.values())
        assert torch.equal(first, second)
    assert lost["with"] < lost["without"]
