"""Configs in today's and the published spellings, and what is wrong with the wrong ones."""

import json

import numpy as np
import pytest
import torch
import transformers

from dsparse import DsparseError, Model, ModelConfig
from dsparse.blocks import Run, plan_runs
from dsparse.config_huggingface import ALIASES, tiny_config
from dsparse.layers import rope_frequencies, softmax_scale

PUBLISHED_V3 = {  # as DeepSeek-V3's own config.json spells it
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3",
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_hidden_layers": 61,
    "num_attention_heads": 128, "num_key_value_heads": 128, "n_shared_experts": 1, "n_routed_experts": 256,
    "num_experts_per_tok": 8, "moe_layer_freq": 1, "first_k_dense_replace": 3, "n_group": 8, "topk_group": 4,
    "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True,
    "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "num_nextn_predict_layers": 1, "ep_size": 1, "vocab_size": 129280, "max_position_embeddings": 163840,
    "rope_theta": 10000, "rms_norm_eps": 1e-06, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "bos_token_id": 0, "eos_token_id": 1, "hidden_act": "silu", "attention_bias": False,
    "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
                     "original_max_position_embeddings": 4096, "type": "yarn"},
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}  # fmt: skip


def test_published_spelling():
    config = ModelConfig.from_huggingface(PUBLISHED_V3)
    assert config.mlp_layer_types == ("dense",) * 3 + ("sparse",) * 58
    rope = config.rope_parameters
    assert (rope.rope_type, rope.factor, rope.rope_theta, rope.mscale_all_dim) == ("yarn", 40, 10000, 1.0)
    assert (config.dtype, config.eos_token_id, config.num_nextn_predict_layers) == ("bfloat16", (1,), 1)


@pytest.mark.parametrize("alias", ALIASES)
def test_other_names_that_transformers_reads(alias):
    name, expected = ALIASES[alias], ModelConfig.from_huggingface(PUBLISHED_V3)
    renamed = {alias if key == name else key: value for key, value in PUBLISHED_V3.items()}
    assert ModelConfig.from_huggingface(renamed) == expected
    assert ModelConfig.from_huggingface(PUBLISHED_V3 | {alias: 5}) == expected
    with pytest.raises(DsparseError, match=r"n_group|num_mtp_layers"):
        ModelConfig.from_huggingface(renamed | {alias: 9 if name == "n_routed_experts" else -1})


@pytest.mark.parametrize("model_type", ["kimi_k2", "deepseek_v3"])
def test_shared_architecture_is_the_same_model(model_type):
    config = ModelConfig.from_huggingface(PUBLISHED_V3 | {"model_type": model_type})
    assert config.layers == ModelConfig.from_huggingface(PUBLISHED_V3).layers


def test_moonlight_has_no_query_compression():
    assert ModelConfig.from_huggingface(PUBLISHED_V3 | {"q_lora_rank": None}).q_lora_rank is None


def test_yarn_frequencies_equal_transformers():
    config = ModelConfig.from_huggingface(PUBLISHED_V3)
    fields = {k: v for k, v in PUBLISHED_V3.items() if k not in ("auto_map", "quantization_config", "architectures")}
    reference_config = transformers.DeepseekV3Config(**json.loads(json.dumps(fields)))
    attention = transformers.models.deepseek_v3.modeling_deepseek_v3.DeepseekV3RotaryEmbedding(reference_config)
    frequencies, factor = rope_frequencies(config.rope_parameters, config.qk_rope_head_dim)
    np.testing.assert_allclose(frequencies, attention.inv_freq.numpy(), rtol=1e-6)
    assert factor == pytest.approx(attention.attention_scaling)
    scaling = 192**-0.5 * (0.1 * np.log(40) + 1) ** 2
    assert softmax_scale(config.rope_parameters, config.qk_head_dim) == pytest.approx(scaling)


VARIATIONS = {
    "v3": ("deepseek_v3", {}),
    "v3 without groups": ("deepseek_v3", {"n_group": 1, "topk_group": 1}),
    "v3 not normalized": ("deepseek_v3", {"norm_topk_prob": False, "routed_scaling_factor": 1.3}),
    "v3 half-split rope": ("deepseek_v3", {"rope_interleave": False}),
    "v3 attention bias": ("deepseek_v3", {"attention_bias": True}),
    "v3 tied embeddings": ("deepseek_v3", {"tie_word_embeddings": True}),
    "moonlight": ("deepseek_v3", {"q_lora_rank": None, "n_shared_experts": 2}),
    "v3 yarn": ("deepseek_v3", {"rope_parameters": None, "rope_theta": 10000.0, "rope_scaling": {
        "type": "yarn", "factor": 8.0, "mscale": 0.8, "mscale_all_dim": 1.1, "beta_fast": 32, "beta_slow": 1,
        "original_max_position_embeddings": 64}}),
    "v3 dense only": ("deepseek_v3", {"first_k_dense_replace": 3}),
    "glm 4 lite": ("glm4_moe_lite", {}),
    "glm 4 lite, layers named": ("glm4_moe_lite", {"mlp_layer_types": ["sparse", "dense", "sparse"], "n_group": 1}),
    "v2": ("deepseek_v2", {}),
    "v2-lite": ("deepseek_v2", {"topk_method": "greedy", "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0}),
    "v2 query compression": ("deepseek_v2", {"q_lora_rank": 24, "routed_scaling_factor": 16.0, "topk_group": 2}),
    "v2 mlp bias": ("deepseek_v2", {"mlp_bias": True, "n_shared_experts": 1}),
}  # fmt: skip


@pytest.mark.parametrize("name", VARIATIONS)
def test_logits_of_every_variation_equal_transformers(name, tmp_path):
    from dsparse import from_pretrained

    family, changes = VARIATIONS[name]
    fields = tiny_config(family) | {"initializer_range": 0.1} | changes
    torch.manual_seed(0)
    classes = {"deepseek_v2": "DeepseekV2", "deepseek_v3": "DeepseekV3", "glm4_moe_lite": "Glm4MoeLite"}
    config = getattr(transformers, classes[family] + "Config")(**{k: v for k, v in fields.items() if k != "model_type"})
    reference = getattr(transformers, classes[family] + "ForCausalLM")(config).eval()
    for parameter_name, parameter in reference.named_parameters():
        if parameter.ndim == 1 or "gate.weight" in parameter_name:
            torch.nn.init.normal_(parameter, mean=float("norm" in parameter_name), std=0.3)
    for buffer_name, buffer in reference.named_buffers():
        if "correction_bias" in buffer_name:
            torch.nn.init.normal_(buffer, std=0.3)
    reference.save_pretrained(tmp_path)
    tokens = np.random.default_rng(0).integers(0, 256, (2, 150)).astype(np.int32)
    with torch.no_grad():
        expected = reference(torch.tensor(tokens).long()).logits.numpy()
    model = from_pretrained(tmp_path, dtype="float32")
    np.testing.assert_allclose(model(tokens), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type 'llama' is not supported"),
        ({"model_type": None}, "model_type None is not supported"),
        ({"n_group": 3}, "n_group .3. does not divide n_routed_experts"),
        ({"topk_group": 5}, "topk_group .5. exceeds n_group"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok .5. exceeds the 4 experts"),
        ({"hidden_size": 0}, "hidden_size must be a positive integer"),
        ({"hidden_size": "64"}, "hidden_size must be of type int, found '64'"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps must be a positive number, found '1e-6'"),
        ({"q_lora_rank": -3}, "q_lora_rank must be a positive whole number, found -3"),
        ({"n_shared_experts": -1}, "n_shared_experts must be a whole number from 0 on, found -1"),
        ({"num_nextn_predict_layers": -1}, "num_nextn_predict_layers must be a whole number from 0 on"),
        ({"vocab_size": None}, "lacks the field vocab_size"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"scoring_func": "tanh"}, "scoring_func 'tanh'"),
        ({"topk_method": "random"}, "topk_method 'random'"),
        ({"qk_rope_head_dim": 7}, "qk_rope_head_dim must be even"),
        ({"mlp_layer_types": ["dense"]}, "mlp_layer_types lists 1 layers"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "rope_type 'llama3' is not supported"),
        (
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 64]}},
            "weight_block_size .64, 64. is",
        ),
        ({"model_type": ["deepseek_v3"]}, "model_type ..deepseek_v3.. is not supported"),
        ({"dtype": "int4"}, "dtype 'int4' is not supported"),
        ({"num_hidden_layers": "3"}, "num_hidden_layers must be a positive whole number, found '3'"),
        ({"first_k_dense_replace": "x"}, "first_k_dense_replace must be a whole number from 0 on, found 'x'"),
        ({"moe_layer_freq": 0}, "moe_layer_freq must be a positive whole number, found 0"),
        ({"mlp_layer_types": 3}, "mlp_layer_types must be a list of names, found 3"),
        ({"layer_types": [None] * 3}, "layer_types must be a list of names"),
        ({"index_topk_pattern": 7}, "index_topk_pattern must be text or a list of names, found 7"),
        ({"eos_token_id": "</s>"}, "eos_token_id must be a whole number or a list of them"),
        ({"rope_theta": "10000"}, "rope_theta must be a positive number, found '10000'"),
        ({"rope_parameters": "yarn"}, "rope_parameters must be an object, found 'yarn'"),
        (
            {"rope_scaling": {"type": "yarn", "factor": "40"}},
            "rope_scaling.factor must be a positive number, found '40'",
        ),
        ({"quantization_config": ["fp8"]}, "quantization_config must be an object"),
    ],
)
def test_inconsistent_configs_are_named(changes, message):
    with pytest.raises(DsparseError, match=message):
        ModelConfig.from_huggingface(tiny_config("deepseek_v3") | changes)


def test_yarn_without_a_factor_or_a_longest_length():
    stated = tiny_config("deepseek_v3") | {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0}}
    del stated["max_position_embeddings"]
    rope = ModelConfig.from_huggingface(stated).rope_parameters
    assert (rope.factor, rope.original_max_position_embeddings) == (1.0, 4096)


def test_what_a_family_fixes_is_not_read_from_its_config():
    """As in transformers: V3.2's indexer is half-split and its attention interleaved whatever the config says."""
    stated = {"rope_interleave": False, "indexer_rope_interleave": True, "mlp_bias": True}
    v32 = ModelConfig.tiny("deepseek_v32", **stated)
    assert (v32.rope_interleave, v32.indexer_rope_interleave, v32.mlp_bias) == (True, False, False)
    assert ModelConfig.tiny("deepseek_v3", rope_interleave=False).rope_interleave is False
    v4 = ModelConfig.tiny("deepseek_v4", norm_topk_prob=False, n_shared_experts=2, n_group=4)
    assert (v4.norm_topk_prob, v4.n_shared_experts, v4.n_group) == (True, 1, 1)


@pytest.mark.parametrize(
    ("content", "message"), [("{", "not valid JSON"), ("[]", "expected a JSON object"), (None, "not found")]
)
def test_unreadable_config_files_are_named(tmp_path, content, message):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(DsparseError, match=message) as error:
        ModelConfig.from_huggingface(tmp_path)
    assert "config.json" in str(error.value)


def test_runs_trace_the_fewest_layers():
    assert plan_runs("abbbb") == (Run(0, 1, 1), Run(1, 1, 4))
    assert plan_runs("hhhchc") == (Run(0, 1, 2), Run(2, 2, 2))
    assert plan_runs("a" * 3 + "b" * 58) == (Run(0, 1, 3), Run(3, 1, 58))
    assert sum(run.pattern for run in plan_runs("abcabcabcx")) == 4
    for keys in ("abcab", "x", "aabbaabb"):
        runs = plan_runs(keys)
        assert [r.start for r in runs[1:]] == [r.start + r.pattern * r.repeats for r in runs[:-1]]


def test_model_shape_follows_config():
    import jax
    from flax import nnx

    config = ModelConfig.from_huggingface(PUBLISHED_V3 | {"num_nextn_predict_layers": 0})
    model = nnx.eval_shape(lambda: Model(config, rngs=nnx.Rngs(0)))
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))
    assert count == 671_026_419_200 - 0  # DeepSeek-V3's published 671B without the multi-token prediction module
