"""Flax models of transformers 4, built from configurations, and the U-Net of diffusers; nothing is downloaded."""

from typing import Any

import jax
import jax.numpy as jnp
import transformers as tr

from benchmarks.models import Draw, cross_entropy
from benchmarks.third_party.built import Built, squared_error

KEY = jax.random.key(0)


def classified(model: Any, *inputs: Any, labels: int = 10) -> Built:
    """The cross entropy of a model's logits, with one label per example."""

    def loss(params: Any, *example: Any) -> jax.Array:
        *inputs, label = example
        logits = model(*(a[None] for a in inputs), params=params, train=False).logits
        return cross_entropy(logits[0], label)

    return Built(loss, model.params, (*inputs, Draw().ids(labels, len(inputs[0]))))


def next_token(model: Any, B: int = 8, T: int = 16, V: int = 512) -> Built:
    def loss(params: Any, ids: Any) -> jax.Array:
        return cross_entropy(model(ids[None, :-1], params=params, train=False).logits[0], ids[1:]).mean()

    return Built(loss, model.params, (Draw().ids(V, B, T + 1),))


def bert(dtype: Any, B: int = 8, T: int = 16) -> Built:
    config = tr.BertConfig(
        vocab_size=512, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=512,
        max_position_embeddings=64, num_labels=10,
    )  # fmt: skip
    model = tr.FlaxBertForSequenceClassification(config, seed=0, dtype=dtype)
    return classified(model, Draw().ids(512, B, T))


def gpt2(dtype: Any) -> Built:
    config = tr.GPT2Config(vocab_size=512, n_positions=64, n_embd=128, n_layer=2, n_head=4)
    return next_token(tr.FlaxGPT2LMHeadModel(config, seed=0, dtype=dtype))


def llama(dtype: Any) -> Built:
    """A model with grouped queries, rotary positions and gated layers."""
    config = tr.LlamaConfig(
        vocab_size=512, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=384, max_position_embeddings=64,
    )  # fmt: skip
    return next_token(tr.FlaxLlamaForCausalLM(config, seed=0, dtype=dtype))


def vit(dtype: Any, B: int = 8) -> Built:
    config = tr.ViTConfig(
        hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=512, image_size=32, patch_size=8,
        num_labels=10,
    )  # fmt: skip
    return classified(tr.FlaxViTForImageClassification(config, seed=0, dtype=dtype), Draw().data(B, 3, 32, 32))


def beit(dtype: Any, B: int = 8) -> Built:
    """A model with relative positions gathered from a table, and layer scales."""
    config = tr.BeitConfig(
        hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=512, image_size=32, patch_size=8,
        num_labels=10, use_relative_position_bias=True,
    )  # fmt: skip
    return classified(tr.FlaxBeitForImageClassification(config, seed=0, dtype=dtype), Draw().data(B, 3, 32, 32))


def resnet(dtype: Any, B: int = 8) -> Built:
    """Bottleneck blocks with batch norm, which uses its running statistics."""
    config = tr.ResNetConfig(embedding_size=64, hidden_sizes=[64, 128, 256], depths=[1, 1, 1], num_labels=10)
    model = tr.FlaxResNetForImageClassification(config, seed=0, dtype=dtype, input_shape=(1, 32, 32, 3))
    state = model.params["batch_stats"]

    def loss(params: Any, x: Any, label: Any) -> jax.Array:
        out = model(x[None], params={"params": params, "batch_stats": state}, train=False)
        return cross_entropy(out.logits[0], label)

    draw = Draw()
    return Built(loss, model.params["params"], (draw.data(B, 3, 32, 32), draw.ids(10, B)))


def wav2vec2(dtype: Any, B: int = 8) -> Built:
    """FlaxWav2Vec2ForCTC with the same label in every frame. Its convolution of positions has weight norm."""
    config = tr.Wav2Vec2Config(
        vocab_size=32, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256,
        conv_dim=(64, 64, 64), conv_stride=(5, 2, 2), conv_kernel=(10, 3, 3), num_feat_extract_layers=3,
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4, do_stable_layer_norm=True,
        feat_extract_norm="layer", mask_time_prob=0.0,
    )  # fmt: skip
    model = tr.FlaxWav2Vec2ForCTC(config, seed=0, dtype=dtype, input_shape=(1, 512))

    def loss(params: Any, wave: Any, label: Any) -> jax.Array:
        logits = model(wave[None], params=params, train=False).logits[0]
        return cross_entropy(logits, jnp.broadcast_to(label, logits.shape[:1])).mean()

    draw = Draw()
    return Built(loss, model.params, (draw.data(B, 512), draw.ids(32, B)))


def whisper(dtype: Any, B: int = 8, T: int = 12) -> Built:
    config = tr.WhisperConfig(
        vocab_size=512, num_mel_bins=32, d_model=128, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=256, decoder_ffn_dim=256, max_source_positions=32,
        max_target_positions=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=3,
    )  # fmt: skip
    model = tr.FlaxWhisperForConditionalGeneration(config, seed=0, dtype=dtype, input_shape=(1, 32, 64))

    def loss(params: Any, mel: Any, target: Any) -> jax.Array:
        out = model(mel[None], decoder_input_ids=target[None, :-1], params=params, train=False)
        return cross_entropy(out.logits[0], target[1:]).mean()

    draw = Draw()
    return Built(loss, model.params, (draw.data(B, 32, 64), draw.ids(512, B, T + 1)))


def clip(dtype: Any, B: int = 8, T: int = 12) -> Built:
    """Two towers. The loss scores each image against four captions."""
    layers = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4}
    text = {**layers, "vocab_size": 512, "max_position_embeddings": 32, "eos_token_id": 511}
    vision = {**layers, "image_size": 32, "patch_size": 8}
    config = tr.CLIPConfig(text_config=text, vision_config=vision, projection_dim=64)
    model = tr.FlaxCLIPModel(config, seed=0, dtype=dtype)

    def loss(params: Any, ids: Any, image: Any) -> jax.Array:
        out = model(ids, image[None], params=params, train=False)
        return -jax.nn.log_softmax(out.logits_per_image[0])[0]

    draw = Draw()
    return Built(loss, model.params, (draw.ids(512, B, 4, T), draw.data(B, 3, 32, 32)))


def diffusion_unet(dtype: Any, B: int = 8) -> Built:
    """The U-Net of diffusers, with cross attention. The loss is the error of the noise that it predicts."""
    import diffusers

    module = diffusers.FlaxUNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, attention_head_dim=4, cross_attention_dim=64,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        dtype=dtype,
    )  # fmt: skip

    def loss(params: Any, x: Any, noise: Any, t: Any, context: Any) -> jax.Array:
        out = module.apply({"params": params}, 0.8 * x[None] + 0.6 * noise[None], t[None], context[None])
        return squared_error(out.sample[0], noise)

    draw = Draw()
    batch = (draw.data(B, 4, 8, 8), draw.data(B, 4, 8, 8), draw.ids(1000, B), draw.data(B, 6, 64))
    return Built(loss, module.init_weights(KEY), batch)
