"""transformers models with random weights, as references."""

import contextlib

import numpy as np
import torch
import transformers

import dsparse

transformers.utils.logging.set_verbosity_error()


@contextlib.contextmanager
def stable_topk():
    """torch.topk with ties going to the lowest index: torch leaves them open, and relu makes many scores exactly 0."""
    method, function = torch.Tensor.topk, torch.topk

    def stable(x, k, dim=-1, largest=True, sorted=True):
        if not largest:
            return function(x, k, dim, largest, sorted)
        values, indices = torch.sort(x + 0.0, dim=dim, descending=True, stable=True)
        return torch.return_types.topk((values.narrow(dim, 0, k), indices.narrow(dim, 0, k)))

    torch.Tensor.topk = torch.topk = stable
    try:
        yield
    finally:
        torch.Tensor.topk, torch.topk = method, function


def random_model(model_type: str, seed: int = 0, **overrides):
    """A tiny model whose every weight matters: norms, biases and router corrections away from their initial values."""
    config = dict(dsparse.ModelConfig.tiny(model_type).huggingface) | overrides
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(**config)
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3.0)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.2)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.add_(torch.randn_like(buffer) * 0.2)
    return model


def random_pair(folder, model_type: str, **overrides):
    """A random transformers model and the same weights in dsparse, by way of the files it saves."""
    reference = random_model(model_type, **overrides)
    reference.save_pretrained(folder)
    return dsparse.from_pretrained(folder, dtype="float32"), reference


def reference_logits(reference, tokens, **options) -> np.ndarray:
    with torch.no_grad():
        return reference(torch.tensor(np.asarray(tokens)).long(), use_cache=False, **options).logits.numpy()


def reference_continuation(reference, tokens, new: int) -> np.ndarray:
    with torch.no_grad():
        out = reference.generate(torch.tensor(tokens).long(), max_new_tokens=new, do_sample=False, eos_token_id=None)
    return out[:, tokens.shape[1] :].numpy()
