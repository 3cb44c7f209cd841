"""Tiny seeded checkpoints of every family, with the logits of transformers in float32.

    python crates/convert/testdata/make_checkpoints.py

Needs torch, transformers (made with 5.23.0) and safetensors. Weights are 16-bit floats, so that a conversion to them loses nothing.
Each folder gets config.json, the tensors and golden.safetensors: `tokens` [n] and `logits` [n, vocabulary], or for
encoders `tokens`, `mask` and `hidden` of the last layer, all computed in 32-bit floats.
"""

import json
import shutil
from pathlib import Path

import torch
import transformers as t
from safetensors.torch import save_file

HERE = Path(__file__).parent
VOCABULARY, TOKENS = 64, 24
SMALL = dict(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)
LLAMA3 = dict(rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=16)


def rope(**parameters):
    return dict(rope_parameters=dict(parameters))


def gemma(**more):
    local = dict(rope_type="default", rope_theta=10000.0)
    whole = dict(rope_type="linear", factor=2.0, rope_theta=1000000.0)
    layers = ["sliding_attention", "sliding_attention", "full_attention"]
    return SMALL | dict(num_hidden_layers=3, num_key_value_heads=1, head_dim=16, query_pre_attn_scalar=12, layer_types=layers,
                        rope_parameters=dict(sliding_attention=local, full_attention=whole)) | more


DECODERS = {
    "llama2": (t.LlamaConfig, SMALL | dict(num_key_value_heads=4, tie_word_embeddings=False)),
    "llama3": (t.LlamaConfig, SMALL | dict(num_key_value_heads=2, tie_word_embeddings=False, rms_norm_eps=1e-5) | rope(**LLAMA3)),
    "llama-biased": (t.LlamaConfig, SMALL | dict(num_key_value_heads=2, attention_bias=True, mlp_bias=True, tie_word_embeddings=True)
                     | rope(rope_type="linear", factor=2.0, rope_theta=10000.0)),
    "smollm2": (t.LlamaConfig, SMALL | dict(hidden_size=36, num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
                                             rms_norm_eps=1e-5) | rope(rope_type="default", rope_theta=100000.0)),
    "mistral": (t.MistralConfig, SMALL | dict(num_key_value_heads=2, sliding_window=None, head_dim=16)),
    "mistral-window": (t.MistralConfig, SMALL | dict(num_key_value_heads=2, sliding_window=8)),
    "qwen2": (t.Qwen2Config, SMALL | dict(num_key_value_heads=2, tie_word_embeddings=True)
              | rope(rope_type="default", rope_theta=1000000.0)),
    "qwen2-window": (t.Qwen2Config, SMALL | dict(num_key_value_heads=2, use_sliding_window=True, sliding_window=8,
                                                 max_window_layers=1)),
    "qwen3": (t.Qwen3Config, SMALL | dict(num_key_value_heads=2, head_dim=16, tie_word_embeddings=True)),
    "gemma3": (t.Gemma3TextConfig, gemma(sliding_window=8)),
}


def randomize(model, generator):
    """Every parameter anew, norms and biases too, as 16-bit floats."""
    gemma_norms = "Gemma" in type(model).__name__
    with torch.no_grad():
        for name, p in model.named_parameters():
            values = torch.randn(p.shape, generator=generator)
            if "norm" in name.lower() and name.endswith("weight"):
                values = values * 0.2 + (0.0 if gemma_norms else 1.0)
            elif "embed" in name:
                values = values * 0.8
            elif p.dim() == 1:
                values = values * 0.3
            else:
                values = values * 0.25
            p.copy_(values.half().float())


def save(model, folder, golden, shard=None):
    shutil.rmtree(folder, ignore_errors=True)
    model.half().save_pretrained(folder, **({"max_shard_size": shard} if shard else {}))
    for extra in ["generation_config.json"]:
        (folder / extra).unlink(missing_ok=True)
    save_file({k: v.contiguous() for k, v in golden.items()}, folder / "golden.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")


def decoder(name, config_class, options, seed):
    config = config_class(**options)
    config._attn_implementation = "eager"
    model = t.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(seed)
    randomize(model, generator)
    tokens = torch.randint(3, VOCABULARY, (1, TOKENS), generator=generator)
    with torch.no_grad():
        logits = model(tokens).logits[0]
    golden = dict(tokens=tokens[0].to(torch.int32), logits=logits.float())
    save(model, HERE / name, golden, shard="20KB" if name == "llama2" else None)


def encoder(name, config_class, model_class, options, seed):
    model = model_class(config_class(**SMALL | options), add_pooling_layer=True).eval()
    generator = torch.Generator().manual_seed(seed)
    randomize(model, generator)
    tokens = torch.randint(3, VOCABULARY, (1, 16), generator=generator)
    mask = torch.ones(1, 16, dtype=torch.int64)
    mask[0, 11:] = 0
    with torch.no_grad():
        out = model(tokens, attention_mask=mask)
    golden = dict(tokens=tokens[0].to(torch.int32), mask=mask[0].to(torch.int32), hidden=out.last_hidden_state[0],
                  pooled=out.pooler_output[0])
    save(model, HERE / name, golden)


def main():
    for seed, (name, (config_class, options)) in enumerate(DECODERS.items()):
        decoder(name, config_class, options, seed + 1)
    encoder("bert", t.BertConfig, t.BertModel, dict(type_vocab_size=2), 100)
    encoder("roberta", t.RobertaConfig, t.RobertaModel, dict(type_vocab_size=1, pad_token_id=1, bos_token_id=0), 101)
    total = sum(f.stat().st_size for f in HERE.rglob("*") if f.is_file())
    print(f"{total / 1e6:.2f} MB in {len(DECODERS) + 2} checkpoints")


if __name__ == "__main__":
    main()
