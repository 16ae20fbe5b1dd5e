"""DeepSeek-V4 models of transformers with random weights, and the same weights in a dsparse model."""

import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

import dsparse
from dsparse.config_huggingface import tiny_config


def stable_topk(monkeypatch) -> None:
    """torch breaks ties of its top-k arbitrarily; lowest position first makes selections comparable."""
    unstable = torch.Tensor.topk

    def topk(self, k, dim=-1, largest=True, sorted=True):
        if not largest or self.dtype == torch.bool:
            return unstable(self, k, dim, largest, sorted)
        values, positions = torch.sort(self + 0.0, dim=dim, descending=True, stable=True)
        return torch.return_types.topk((values.narrow(dim, 0, k), positions.narrow(dim, 0, k)))

    monkeypatch.setattr(torch.Tensor, "topk", topk)
    monkeypatch.setattr(torch, "topk", lambda x, k, dim=-1, largest=True, sorted=True: topk(x, k, dim, largest, sorted))


def random_reference(seed: int = 0, **overrides) -> DeepseekV4ForCausalLM:
    """A tiny reference model in which every parameter, biases and sinks too, matters."""
    config = DeepseekV4Config(
        **{k: v for k, v in (tiny_config("deepseek_v4") | overrides).items() if k != "model_type"}
    )
    torch.manual_seed(seed)
    model = DeepseekV4ForCausalLM(config).float().eval()
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for name, tensor in tensors.items():
            if name.endswith("tid2eid"):
                rows = [torch.randperm(config.n_routed_experts)[: tensor.shape[1]] for _ in range(len(tensor))]
                tensor.copy_(torch.stack(rows))
            elif "inv_freq" in name:
                continue
            elif "norm" in name and tensor.ndim == 1:
                tensor.copy_(1 + 0.2 * torch.randn_like(tensor))
            elif tensor.ndim <= 1 or name.endswith("position_bias"):
                tensor.copy_(0.5 * torch.randn_like(tensor))
            else:
                tensor.normal_(0, 1.5 / tensor.shape[-1] ** 0.5)
    return model


def model_of(reference: DeepseekV4ForCausalLM, config: dict | None = None) -> dsparse.Model:
    """The reference's weights in a dsparse model."""
    without_mtp = {"num_nextn_predict_layers": 0}  # the reference has no such layers
    config = dsparse.ModelConfig.from_huggingface((config or reference.config.to_dict()) | without_mtp)
    model = nnx.eval_shape(lambda: dsparse.Model(config, rngs=nnx.Rngs(0)))
    weights = {
        name.removeprefix("model."): tensor.detach().float().numpy() for name, tensor in reference.state_dict().items()
    }
    filled = []
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        if path[0] != "stacks":
            value = weights[".".join(map(str, path))]
        else:
            run = model.runs[path[1]]
            layers = [run.start + path[3] + repeat * run.pattern for repeat in range(run.repeats)]
            value = np.stack([layer_tensor(weights, f"layers.{layer}", path[4:]) for layer in layers])
        assert value.size == np.prod(variable.shape), path
        filled.append((path, variable.replace(jnp.asarray(value.reshape(variable.shape), variable.dtype))))
    return nnx.merge(nnx.graphdef(model), nnx.from_flat_state(filled))


def layer_tensor(weights: dict[str, np.ndarray], layer: str, path: tuple[str, ...]) -> np.ndarray:
    name = ".".join((layer, *map(str, path)))
    if name.endswith("shared_experts.gate_up_proj"):
        return np.stack([weights[name.replace("gate_up_proj", f"{half}_proj.weight")] for half in ("gate", "up")])
    return weights[name]
