"""The name table reads and writes every published name."""

import pytest
from published import config_dict, tensors

from dsparse import ModelConfig
from dsparse.checkpoints.mapping import TOP, TRANSFORMERS, Layout, Prefix, Rule, Slot


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_every_published_name_is_read_and_written(family: str, fp8: bool):
    published = tensors(ModelConfig.from_huggingface(config_dict(family)), fp8=fp8)
    slots = {name: TRANSFORMERS.parse(name)[0] for name in published}
    assert len(set(slots.values())) == len(slots)
    for name, slot in slots.items():
        shape = (*(i + 1 for i in slot.index), *published[name].shape)
        assert (name, slot, tuple(published[name].shape)) in list(TRANSFORMERS.tensors(slot.layer, slot.path, shape))


def test_examples():
    parse = TRANSFORMERS.parse
    assert parse("model.layers.12.mlp.experts.7.up_proj.weight")[0] == Slot(12, "mlp.experts.gate_up_proj", (7, 1))
    assert parse("model.layers.0.mlp.gate_proj.bias")[0] == Slot(0, "mlp.gate_up_bias", (0,))
    assert parse("model.layers.3.mlp.shared_experts.gate_proj.weight_scale_inv")[0] == Slot(
        3, "mlp.shared_experts.gate_up_proj_scale_inv", (0,)
    )
    assert parse("lm_head.weight")[0] == Slot(TOP, "lm_head.weight")
    assert parse("model.norm.weight")[0] == Slot(TOP, "norm.weight")
    assert TRANSFORMERS.aside_rule("model.layers.3.self_attn.rotary_emb.inv_freq")


def test_another_table():
    table = Layout(
        (Prefix("layers.{}."),),
        (Rule("embed.weight", "embed_tokens.weight"),),
        (Rule("ffn.w{1|3}.weight", "mlp.gate_up_proj"),),
    )
    assert table.parse("layers.4.ffn.w3.weight")[0] == Slot(4, "mlp.gate_up_proj", (1,))
    assert [name for name, *_ in table.tensors(4, "mlp.gate_up_proj", (2, 8, 4))] == [
        "layers.4.ffn.w1.weight",
        "layers.4.ffn.w3.weight",
    ]
    assert table.parse("embed.weight")[0] == Slot(TOP, "embed_tokens.weight")
