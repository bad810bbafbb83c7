"""Small random models of transformers, and adapters of PEFT on them."""

import numpy as np
import peft
import pytest
import torch
import transformers as tf

from benchmarks.models import minilm

SIZES = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}
TEXT = SIZES | {"vocab_size": 64, "intermediate_size": 48}
HEADS = TEXT | {"num_key_value_heads": 2}
IMAGE = SIZES | {"intermediate_size": 48, "image_size": 16, "patch_size": 4}


def make_llama(**settings):
    return tf.LlamaForCausalLM(tf.LlamaConfig(**HEADS | settings))


def make_qwen3():
    return tf.Qwen3ForCausalLM(tf.Qwen3Config(**HEADS, head_dim=16))


def make_gpt2(**settings):
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64}
    tokens = {"bos_token_id": 1, "eos_token_id": 2}
    return tf.GPT2LMHeadModel(tf.GPT2Config(**sizes, **tokens, **settings))


def make_bert():
    return tf.BertModel(tf.BertConfig(**TEXT))


def make_vit():
    return tf.ViTModel(tf.ViTConfig(**IMAGE))


def make_mixtral():
    return tf.MixtralForCausalLM(tf.MixtralConfig(**HEADS, num_local_experts=3))


def make_qwen3_moe():
    sizes = {"num_experts": 3, "moe_intermediate_size": 24, "head_dim": 16}
    sizes |= {"num_experts_per_tok": 2}
    return tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**HEADS, **sizes))


def make_qwen2():
    return tf.Qwen2ForCausalLM(tf.Qwen2Config(**HEADS, tie_word_embeddings=False))


def shift(model, name, rng):
    """Add random numbers to one parameter of a model."""
    with torch.no_grad():
        parameter = model.state_dict()[name]
        parameter += torch.from_numpy(0.1 * rng.standard_normal(tuple(parameter.shape)))


def find_minilm():
    """Return the folder of MiniLM, whose package is optional."""
    try:
        return minilm.find_minilm()
    except FileNotFoundError as error:
        pytest.skip(str(error))


def load_bert(folder):
    return tf.BertModel.from_pretrained(folder, dtype=torch.float32).eval()


MODELS = {
    "llama": make_llama,
    "qwen3": make_qwen3,
    "gpt2": lambda: make_gpt2(tie_word_embeddings=False),
    "bert": make_bert,
    "vit": make_vit,
    "mixtral": make_mixtral,
}


def make_model(make):
    torch.manual_seed(0)
    return make().eval()


def compute(model):
    """Return the outputs of a model on one fixed input."""
    with torch.no_grad():
        if model.config.model_type == "vit":
            image = torch.arange(768.0).reshape(1, 3, 16, 16) / 800
            return model(pixel_values=image).last_hidden_state.numpy()
        found = model(input_ids=torch.tensor([[1, 5, 9, 33, 2]]))
    is_hidden = not hasattr(found, "logits")
    return (found.last_hidden_state if is_hidden else found.logits).numpy()


def reload(folder, model):
    """Return the model of a folder, in the class of another one."""
    return type(model).from_pretrained(folder, dtype=torch.float32).eval()


def list_shapes(model):
    """Return {path: (inputs, outputs) or (experts, inputs, outputs)} to adapt."""
    shapes = {}
    for path, module in model.named_modules():
        kind = type(module).__name__
        if kind == "Linear" and not path.endswith(("lm_head", "gate")):
            shapes[path] = (module.in_features, module.out_features)
        if kind == "Conv1D":
            shapes[path] = tuple(module.weight.shape)
        if kind == "Embedding" and path.endswith(("embed_tokens", "wte")):
            shapes[path] = tuple(module.weight.shape)
    for path, parameter in model.named_parameters():
        if parameter.ndim == 3 and "experts" in path:
            shapes[path] = tuple(parameter.transpose(1, 2).shape)
    return shapes


def train(model, **settings):
    """Return a PEFT model whose adapter has random factors."""
    settings = {"r": 3, "lora_alpha": 5} | settings
    adapted = peft.get_peft_model(model, peft.LoraConfig(**settings)).eval()
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if (
                "lora_" in name and "magnitude" not in name
            ) or "modules_to_save" in name:
                values = 0.2 * rng.standard_normal(tuple(parameter.shape))
                parameter.copy_(torch.from_numpy(values))
            elif "magnitude" in name or "tokens_delta" in name:
                parameter.mul_(1.5)
    return adapted
