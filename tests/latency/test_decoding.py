"""The time of one more token of a language model, with the keys and values of its prompt in a cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

import etp_graph as etp
from etp_graph.latency import Decoding, NextToken, WallClock, record_calls
from etp_graph.latency._decoding import next_token_call

transformers = pytest.importorskip("transformers")

IDS = torch.arange(12).reshape(2, 6)


def llama(**more: Any) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, **more,
    )  # fmt: skip
    model: nn.Module = transformers.LlamaForCausalLM(config)
    return model


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=4, n_positions=32)
    )
    return model


def t5() -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=40, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    )
    return model


PROMPTS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "llama": (llama, {"input_ids": IDS, "use_cache": False}),
    "llama, token numbers": (llama, IDS),
    "llama, padded": (llama, {"input_ids": IDS, "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])}),
    "gpt2": (gpt2, (IDS,)),
    "t5": (t5, {"input_ids": IDS, "decoder_input_ids": IDS[:, :3], "attention_mask": torch.ones_like(IDS)}),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_the_step_is_one_token_behind_the_prompt(name: str) -> None:
    """Its logits are those of the last position of the whole text, each time it is run."""
    build, prompt = PROMPTS[name]
    model = build().eval()
    run = next_token_call(model, prompt)
    whole = dict(prompt) if isinstance(prompt, dict) else {"input_ids": IDS}
    key = "decoder_input_ids" if name == "t5" else "input_ids"
    whole[key] = torch.cat([whole[key], whole[key][:, -1:]], dim=1)
    if "attention_mask" in whole and name != "t5":
        whole["attention_mask"] = torch.cat([whole["attention_mask"], torch.ones(2, 1, dtype=torch.long)], dim=1)
    with torch.no_grad():
        want = model(**{**whole, "use_cache": False}).logits[:, -1:]
        for _ in range(3):
            got: Any = run()
            torch.testing.assert_close(got.logits, want, rtol=1e-4, atol=1e-5)


def test_both_costs_are_measured_in_turns() -> None:
    models = (llama(), llama())
    models[0].train()
    found = etp.benchmark(models, {"input_ids": IDS}, repetitions=2, warm_up=0, decode=True)
    assert len(found) == 2 and all(isinstance(one, Decoding) for one in found)
    for one in found:
        assert one.token.p50_ms > 0 and one.prefill.p50_ms > 0
        assert one.token.throughput == pytest.approx(2 / one.token.p50_ms * 1e3)
        assert str(one).splitlines()[1].startswith("token")
    assert models[0].training and models[1].training
    single = etp.benchmark(models[0], {"input_ids": IDS}, repetitions=1, warm_up=0, decode=True)
    assert isinstance(single, Decoding)


def test_layers_are_recorded_with_one_token() -> None:
    model = llama()
    plan = etp.trace(model, {"input_ids": IDS}, check=False)
    long, _ = record_calls(model, plan, {"input_ids": IDS})
    short, _ = record_calls(model, plan, NextToken({"input_ids": IDS}))
    assert [layer.name for layer in long] == [layer.name for layer in short]
    assert {layer.shape[:2] for layer in short} == {(2, 1)} and {layer.shape[:2] for layer in long} == {(2, 6)}


def test_a_budget_may_be_the_time_of_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    plan = etp.trace(model, {"input_ids": IDS}, check=False)
    budget = etp.Budget(speed_up_latency=1.05, decode=True, tolerance=1.0, max_ratio=0.5)
    scores = etp.criteria.magnitude(model, plan)
    seen = []

    class Clock(WallClock):
        def models(self, models: Sequence[nn.Module], example_inputs: Any) -> list[float]:
            seen.append(example_inputs)
            return [float(sum(p.numel() for p in one.parameters())) for one in models]

    monkeypatch.setattr("etp_graph.budget._allocate.WallClock", Clock)
    selection = etp.allocate(model, plan, scores, budget=budget, example_inputs={"input_ids": IDS})
    assert seen and all(isinstance(inputs, NextToken) for inputs in seen)
    assert selection.flat(plan).sum() < plan.n_units


@pytest.mark.parametrize(
    ("build", "prompt", "match"),
    [
        (lambda: nn.Linear(4, 4), torch.randn(2, 4), "the forward of Linear takes no cache"),
        (llama, {"input_ids": IDS[:, :0]}, "no input_ids"),
        (llama, {"inputs_embeds": torch.randn(1, 3, 32)}, "no input_ids"),
        (t5, {"input_ids": IDS}, "no decoder_input_ids"),
    ],
)
def test_what_has_no_next_token_is_refused(build: Callable[[], nn.Module], prompt: Any, match: str) -> None:
    with pytest.raises(etp.EtpError, match=match):
        etp.benchmark(build(), prompt, repetitions=1, warm_up=0, decode=True)


def test_a_token_has_no_cost_to_count() -> None:
    with pytest.raises(etp.BudgetError, match="decode=True belongs to latency_ms"):
        etp.Budget(params=0.5, decode=True)
    with pytest.raises(etp.BudgetError, match="decode='yes'"):
        etp.Budget(latency_ms=1.0, decode="yes")  # type: ignore[arg-type]


def test_a_cache_with_a_full_window_is_refused() -> None:
    torch.manual_seed(0)
    config = transformers.MistralConfig(
        vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=4,
    )  # fmt: skip
    model = transformers.MistralForCausalLM(config)
    with pytest.raises(etp.EtpError, match="or cannot forget it"):
        etp.benchmark(model, {"input_ids": IDS}, repetitions=1, warm_up=0, decode=True)
