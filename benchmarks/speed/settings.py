"""Name what the speed benchmark measures, and on which models."""

from __future__ import annotations

STEPS = ("ResNet-56, batch 128 at 32", "ResNet-50, batch 8 at 224", "ViT-B/16, batch 4", "BERT-base, 8 x 64 tokens")
PLANS = ("Llama-like, 8 layers", "Llama-like, 32 layers", "Llama-like, 128 layers", "DenseNet-201", "ViT-L/16")
CUTS = ("Llama-like, 32 layers", "DenseNet-201", "ViT-L/16")
PROBES = {
    "force": STEPS, "force_peer": STEPS, "steered": STEPS, "trace": PLANS, "trace_peer": PLANS, "surgery": CUTS,
    "surgery_peer": CUTS[1:], "meta": ("Llama, 6.7 billion parameters",),
}  # fmt: skip
"""Probe -> the models that it measures."""
