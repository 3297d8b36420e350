"""Small models of other people's libraries, built from checkouts of their code: what `scripts.third_party_models` counts.

Every entry of `MODELS` imports the code it needs when it is called, so that what cannot be imported is missed alone.
"""

import dataclasses
import importlib
import importlib.machinery
import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import flax.linen as nn
import jax
import numpy as np

# Where the packages lie in the checkouts.
ROOTS = ("flax/examples", "big_vision", "vision_transformer", "scenic", "init2winit", "t5x")
# Imported by the code for losses, data or training, and not used by the models: a placeholder takes the name.
PLACEHOLDERS = ("jax_bitempered_loss", "seqio", "ott", "ott.geometry", "ott.tools", "init2winit.model_lib.lingvo_attention")
# What their own __init__ imports is a whole training framework.
BARE = ("t5x",)

_RNG = np.random.default_rng(0)


@dataclasses.dataclass(frozen=True)
class Example:
    """A model and what it is called on.

    Attributes:
      model: the Linen module.
      inputs: its arguments.
      kwargs: its keyword arguments.
      register: registers the model's own layers, by one call of `register_layer` for each class; None if it has none.
    """

    model: nn.Module
    inputs: tuple[Any, ...]
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    register: Callable[[Callable[..., None]], None] | None = None


MODELS: dict[str, Callable[[], Example]] = {}


def use_checkouts(folder: Path) -> None:
    """Makes the code in the checkouts importable; nothing else is to be imported from these projects before."""
    sys.path.extend(str(folder / root) for root in ROOTS)
    for name in BARE:
        package = types.ModuleType(name)
        package.__path__ = [str(folder / name / name)]
        sys.modules[name] = package
    for name in PLACEHOLDERS:
        sys.modules[name] = mock.MagicMock(__spec__=importlib.machinery.ModuleSpec(name, None))


def _model(name: str) -> Callable[[Callable[[], Example]], Callable[[], Example]]:
    def add(make: Callable[[], Example]) -> Callable[[], Example]:
        MODELS[name] = make
        return make

    return add


def _code(module: str) -> Any:
    return importlib.import_module(module)


def _image(*shape: int) -> np.ndarray:
    return _RNG.standard_normal(shape).astype(np.float32)


def _tokens(*shape: int, below: int = 64) -> np.ndarray:
    return _RNG.integers(1, below, shape)


def _config(**values: Any) -> Any:
    return _code("ml_collections").ConfigDict(values)


# --- flax's examples -------------------------------------------------------------------------------------------------------


@_model("flax: imagenet ResNet-18")
def _() -> Example:
    code = _code("imagenet.models")
    model = code.ResNet(stage_sizes=[2, 2, 2, 2], block_cls=code.ResNetBlock, num_classes=10, num_filters=16)
    return Example(model, (_image(2, 32, 32, 3),), {"train": False})


@_model("flax: imagenet ResNet-50")
def _() -> Example:
    code = _code("imagenet.models")
    model = code.ResNet(stage_sizes=[3, 4, 6, 3], block_cls=code.BottleneckResNetBlock, num_classes=10, num_filters=8)
    return Example(model, (_image(2, 32, 32, 3),), {"train": False})


_SIZES = {"vocab_size": 64, "output_vocab_size": 64, "emb_dim": 32, "num_heads": 4, "qkv_dim": 32, "mlp_dim": 64}
_SMALL_TRANSFORMER = {**_SIZES, "num_layers": 2, "max_len": 16}


@_model("flax: lm1b")
def _() -> Example:
    code = _code("lm1b.models")
    config = code.TransformerConfig(**_SMALL_TRANSFORMER, deterministic=True)
    return Example(code.TransformerLM(config), (_tokens(2, 12),))


@_model("flax: lm1b, tied embeddings")
def _() -> Example:
    code = _code("lm1b.models")
    config = code.TransformerConfig(**_SMALL_TRANSFORMER, deterministic=True, logits_via_embedding=True)
    return Example(code.TransformerLM(config), (_tokens(2, 12),))


@_model("flax: nlp_seq")
def _() -> Example:
    code = _code("nlp_seq.models")
    model = code.Transformer(code.TransformerConfig(**_SMALL_TRANSFORMER))
    return Example(model, (), {"inputs": _tokens(2, 12), "train": False})


@_model("flax: wmt")
def _() -> Example:
    code = _code("wmt.models")
    config = code.TransformerConfig(**_SMALL_TRANSFORMER, deterministic=True, share_embeddings=True)
    return Example(code.Transformer(config), (_tokens(2, 12), _tokens(2, 10)))


@_model("flax: seq2seq LSTM")
def _() -> Example:
    code = _code("seq2seq.models")
    model = code.Seq2seq(teacher_force=True, hidden_size=32, vocab_size=16)
    one_hot = np.eye(16, dtype=np.float32)
    return Example(model, (one_hot[_tokens(2, 7, below=16)], one_hot[_tokens(2, 5, below=16)]))


@_model("flax: sst2 BiLSTM")
def _() -> Example:
    code = _code("sst2.models")
    model = code.TextClassifier(
        embedding_size=32,
        hidden_size=32,
        vocab_size=64,
        output_size=2,
        dropout_rate=0.1,
        word_dropout_rate=0.1,
        deterministic=True,
    )
    return Example(model, (_tokens(3, 9), np.array([9, 4, 6])), register=lambda register: register(**OPTIMIZED_LSTM_CELL))


def _lstm_step(cell: Any, params: Any, carry: Any, x: jax.Array) -> Any:
    """The equations of the cell: `x` times a kernel is two products where that is a pair of factors."""
    c, h = carry

    def times(x: jax.Array, dense: Any) -> jax.Array:
        kernel = dense["kernel"]
        y = x @ kernel.u @ kernel.v if hasattr(kernel, "u") else x @ kernel
        return y + dense.get("bias", 0)

    i, f, g, o = (times(x, params[f"i{gate}"]) + times(h, params[f"h{gate}"]) for gate in "ifgo")
    c = cell.gate_fn(f) * c + cell.gate_fn(i) * cell.activation_fn(g)
    h = cell.gate_fn(o) * cell.activation_fn(c)
    return (c, h), h


# The arguments of `register_layer` for flax's cell, whose eight kernels belong to modules inside.
OPTIMIZED_LSTM_CELL = {
    "cls": nn.OptimizedLSTMCell,
    "kernel": [f"{kind}{gate}/kernel" for kind in "ih" for gate in "ifgo"],
    "run": _lstm_step,
}


@_model("flax: ppo")
def _() -> Example:
    return Example(_code("ppo.models").ActorCritic(num_outputs=4), (_image(2, 84, 84, 4),))


@_model("flax: vae")
def _() -> Example:
    return Example(_code("vae.models").VAE(latents=8), (_image(2, 784), jax.random.key(0)))


def _graph() -> Any:
    nodes, edges = 7, 10
    return _code("jraph").GraphsTuple(
        nodes=_image(nodes, 12),
        edges=_image(edges, 8),
        receivers=_RNG.integers(0, nodes, edges),
        senders=_RNG.integers(0, nodes, edges),
        globals=_image(2, 8),
        n_node=np.array([3, 4]),
        n_edge=np.array([4, 6]),
    )


_GRAPH_NET = {"latent_size": 32, "num_mlp_layers": 2, "message_passing_steps": 2, "output_globals_size": 8}


@_model("flax: ogbg GraphNet")
def _() -> Example:
    return Example(_code("ogbg_molpcba.models").GraphNet(**_GRAPH_NET), (_graph(),))


@_model("flax: ogbg GraphConvNet")
def _() -> Example:
    return Example(_code("ogbg_molpcba.models").GraphConvNet(**_GRAPH_NET), (_graph(),))


# --- big_vision ------------------------------------------------------------------------------------------------------------

_VIT = {"width": 32, "depth": 2, "mlp_dim": 64, "num_heads": 4, "patch_size": (8, 8)}


@_model("big_vision: vit")
def _() -> Example:
    model = _code("big_vision.models.vit").Model(10, **_VIT, pool_type="map", rep_size=True)
    return Example(model, (_image(2, 32, 32, 3),))


@_model("big_vision: vit, scan over remat")
def _() -> Example:
    model = _code("big_vision.models.vit").Model(10, **_VIT, scan=True)
    return Example(model, (_image(2, 32, 32, 3),))


@_model("big_vision: bit")
def _() -> Example:
    model = _code("big_vision.models.bit").Model(10, width=0.5, depth=(1, 1, 1, 1))
    return Example(model, (_image(2, 32, 32, 3),))


@_model("big_vision: bit_paper")
def _() -> Example:
    model = _code("big_vision.models.bit_paper").Model(10, width=1, depth=(1, 1))
    return Example(model, (_image(2, 32, 32, 3),))


@_model("big_vision: mlp_mixer")
def _() -> Example:
    model = _code("big_vision.models.mlp_mixer").Model(
        10, patch_size=(8, 8), num_blocks=2, hidden_dim=32, tokens_mlp_dim=32, channels_mlp_dim=64
    )
    return Example(model, (_image(2, 32, 32, 3),))


@_model("big_vision: two towers")
def _() -> Example:
    text = _config(width=32, depth=1, mlp_dim=64, num_heads=4, vocab_size=64)
    image = _config(**{**_VIT, "depth": 1})
    model = _code("big_vision.models.proj.image_text.two_towers").Model(image=image, text=text, out_dim=32)
    return Example(model, (_image(2, 32, 32, 3), _tokens(2, 12)))


@_model("big_vision: gemma")
def _() -> Example:
    model = _code("big_vision.models.ppp.gemma").Model(
        variant="", width=32, depth=2, mlp_dim=64, num_heads=4, num_kv_heads=2, head_dim=16, norm_eps=1e-6, vocab_size=64
    )
    return Example(model, (_tokens(2, 12),))


# --- vision_transformer ----------------------------------------------------------------------------------------------------

_ENCODER = {"mlp_dim": 64, "num_heads": 4, "num_layers": 2}


@_model("vision_transformer: ViT")
def _() -> Example:
    model = _code("vit_jax.models_vit").VisionTransformer(
        num_classes=10, patches=_config(size=(8, 8)), transformer=_ENCODER, hidden_size=32, representation_size=32
    )
    return Example(model, (_image(2, 32, 32, 3),), {"train": False})


@_model("vision_transformer: hybrid ViT (StdConv)")
def _() -> Example:
    model = _code("vit_jax.models_vit").VisionTransformer(
        num_classes=10,
        patches=_config(size=(1, 1)),
        transformer=_ENCODER,
        hidden_size=32,
        resnet=_config(num_layers=(1, 1), width_factor=1),
    )
    return Example(model, (_image(2, 32, 32, 3),), {"train": False})


@_model("vision_transformer: mixer")
def _() -> Example:
    model = _code("vit_jax.models_mixer").MlpMixer(
        patches=_config(size=(8, 8)), num_classes=10, num_blocks=2, hidden_dim=32, tokens_mlp_dim=32, channels_mlp_dim=64
    )
    return Example(model, (_image(2, 32, 32, 3),), {"train": False})


# --- scenic ----------------------------------------------------------------------------------------------------------------


def _scenic(module: str, cls: str, *shape: int, **settings: Any) -> Example:
    model = getattr(_code(f"scenic.projects.{module}"), cls)(**settings)
    return Example(model, (_image(*(shape or (2, 32, 32, 3))),), {"train": False})


@_model("scenic: vit")
def _() -> Example:
    patches = _config(size=(8, 8))
    return _scenic("baselines.vit", "ViT", num_classes=10, patches=patches, hidden_size=32, **_ENCODER)


@_model("scenic: bit_resnet")
def _() -> Example:
    return _scenic("baselines.bit_resnet", "BitResNet", num_outputs=10, num_layers=26, width_factor=1)


@_model("scenic: axial_resnet")
def _() -> Example:
    heads = _config(num_heads=4)
    return _scenic("baselines.axial_resnet", "AxialResNet", num_outputs=10, axial_attention_configs=heads, num_layers=8)


@_model("scenic: mixer")
def _() -> Example:
    sizes = {"hidden_size": 32, "num_layers": 2, "channels_mlp_dim": 64, "sequence_mlp_dim": 32}
    return _scenic("baselines.mixer", "Mixer", num_classes=10, patch_size=(8, 8), **sizes)


@_model("scenic: unet")
def _() -> Example:
    return _scenic("baselines.unet", "UNet", num_classes=10, block_size=(16, 32))


@_model("scenic: resnet")
def _() -> Example:
    return _scenic("baselines.resnet", "ResNet", num_outputs=10, num_layers=18, num_filters=16)


@_model("scenic: detr")
def _() -> Example:
    return _scenic(
        "baselines.detr.model",
        "DETR",
        num_classes=10,
        hidden_dim=32,
        num_queries=5,
        transformer_num_heads=4,
        transformer_num_encoder_layers=1,
        transformer_num_decoder_layers=1,
        transformer_qkv_dim=32,
        transformer_mlp_dim=64,
        backbone_num_filters=8,
        backbone_num_layers=9,
    )


@_model("scenic: clip")
def _() -> Example:
    model = _code("scenic.projects.baselines.clip.layers").CLIP(
        vocab_size=64,
        embed_dim=32,
        text_features=32,
        text_num_layers=1,
        text_num_heads=4,
        vision_features=64,
        vision_num_layers=1,
        vision_head_dim=16,
        vision_patch_size=8,
    )
    return Example(model, (_image(2, 32, 32, 3), _tokens(2, 12)))


@_model("scenic: vivit")
def _() -> Example:
    return _scenic(
        "vivit.model",
        "ViViT",
        *(2, 4, 16, 16, 3),
        num_classes=10,
        patches=_config(size=(8, 8, 2)),
        hidden_size=32,
        temporal_encoding_config=_config(method="3d_conv", kernel_init_method="central_frame_initializer"),
        attention_config=_config(type="factorized_self_attention_block", attention_order="space_time"),
        **_ENCODER,
    )


@_model("scenic: token_learner")
def _() -> Example:
    return _scenic(
        "token_learner.model",
        "TokenLearnerViT",
        num_classes=10,
        tokenizer=_config(
            type="dynamic", num_tokens=4, tokenlearner_loc=1, use_v11=True, use_tokenfuse=False, patches=_config(size=(8, 8))
        ),
        hidden_size=32,
        representation_size=None,
        **_ENCODER,
    )


# --- init2winit ------------------------------------------------------------------------------------------------------------


def _winit(module: str, cls: str, inputs: tuple[Any, ...], **settings: Any) -> Example:
    return Example(getattr(_code(f"init2winit.model_lib.{module}"), cls)(**settings), inputs, {"train": False})


@_model("init2winit: resnet")
def _() -> Example:
    return _winit("resnet", "ResNet", (_image(2, 32, 32, 3),), num_outputs=10, num_filters=16, num_layers=18)


@_model("init2winit: wide_resnet")
def _() -> Example:
    sizes = {"blocks_per_group": 1, "channel_multiplier": 1, "group_strides": ((1, 1), (2, 2), (2, 2))}
    return _winit("wide_resnet", "WideResnet", (_image(2, 32, 32, 3),), num_outputs=10, **sizes)


@_model("init2winit: densenet")
def _() -> Example:
    sizes = {"num_layers": 1, "growth_rate": 8, "reduction": 0.5, "use_kernel_size_as_stride_in_pooling": True}
    return _winit("adabelief_densenet", "DenseNet", (_image(2, 32, 32, 3),), num_outputs=10, **sizes)


@_model("init2winit: vgg")
def _() -> Example:
    return _winit("adabelief_vgg", "VGG", (_image(2, 32, 32, 3),), num_layers=11, num_outputs=10)


@_model("init2winit: transformer_lm")
def _() -> Example:
    sizes = {"emb_dim": 32, "num_heads": 4, "num_layers": 2, "qkv_dim": 32, "mlp_dim": 64, "max_len": 16}
    return _winit("transformer_lm", "TransformerLM", (_tokens(2, 12),), vocab_size=64, model_dtype="float32", **sizes)


@_model("init2winit: nanodo")
def _() -> Example:
    config = _code("init2winit.model_lib.nanodo").DoConfig(D=32, H=4, N=2, V=64, F=64, L=12)
    return _winit("nanodo", "TransformerDo", (_tokens(2, 12),), docfg=config)


@_model("init2winit: lstm_lm")
def _() -> Example:
    return _winit("lstm_lm", "LSTMLM", (_tokens(2, 12),), emb_dim=32, vocab_size=64, hidden_sizes=(32,))


@_model("init2winit: unet")
def _() -> Example:
    return _winit("unet", "UNet", (_image(2, 32, 32),), out_chans=1, chans=16, num_pool_layers=2)


@_model("init2winit: dlrm")
def _() -> Example:
    x = np.concatenate([_image(4, 4), _tokens(4, 26)], axis=1).astype(np.float32)
    sizes = {"mlp_bottom_dims": (64, 32), "mlp_top_dims": (64, 32, 1), "num_dense_features": 4, "embed_dim": 32}
    return _winit("dlrm", "DLRM", (x,), vocab_size=64, **sizes)


@_model("init2winit: vit")
def _() -> Example:
    return _winit("vit", "ViT", (_image(2, 32, 32, 3),), num_classes=10, **_VIT, use_glu=True)


@_model("init2winit: xformer_translate")
def _() -> Example:
    sizes = {
        "emb_dim": 32,
        "num_heads": 4,
        "enc_num_layers": 1,
        "dec_num_layers": 1,
        "qkv_dim": 32,
        "mlp_dim": 64,
        "max_len": 16,
    }
    inputs = (_tokens(2, 12), _tokens(2, 10))
    return _winit("xformer_translate", "Transformer", inputs, vocab_size=64, output_vocab_size=64, **sizes)


@_model("init2winit: deepspeech")
def _() -> Example:
    code = _code("init2winit.model_lib.deepspeech")
    config = code.DeepspeechConfig(vocab_size=32, encoder_dim=32, num_lstm_layers=1, num_ffn_layers=1, bidirectional=True)
    inputs = (_image(2, 3200), np.zeros((2, 3200), np.float32))
    return _winit("deepspeech", "DeepSpeechEncoderDecoder", inputs, config=config)


@_model("init2winit: conformer")
def _() -> Example:
    code = _code("init2winit.model_lib.conformer")
    config = code.ConformerConfig(vocab_size=32, encoder_dim=32, num_attention_heads=4, num_encoder_layers=1)
    inputs = (_image(2, 3200), np.zeros((2, 3200), np.float32))
    return _winit("conformer", "ConformerEncoderDecoder", inputs, config=config)


@_model("init2winit: gnn")
def _() -> Example:
    sizes = {"latent_dim": 32, "hidden_dims": (32,), "num_message_passing_steps": 2}
    settings = {"normalizer": "layer_norm", "dropout_rate": 0.0, "activation_function": "relu"}
    return _winit("gnn", "GNN", (_graph(),), num_outputs=8, **sizes, **settings)


# --- t5x -------------------------------------------------------------------------------------------------------------------

_T5_LAYERS = {"num_encoder_layers": 2, "num_decoder_layers": 2}
_T5 = {"vocab_size": 64, "emb_dim": 32, "num_heads": 4, "head_dim": 8, "mlp_dim": 64, **_T5_LAYERS}


def _general_axes(layer: Any) -> range:
    return range(1 if isinstance(layer.axis, int) else len(layer.axis))


@_model("t5x: t5")
def _() -> Example:
    code = _code("t5x.examples.t5.network")
    config = code.T5Config(**_T5, mlp_activations=("gelu", "linear"))
    inputs = (_tokens(2, 12), _tokens(2, 10), _tokens(2, 10))

    def register(register: Callable[..., None]) -> None:
        register(code.layers.DenseGeneral)

    return Example(code.Transformer(config), inputs, {"enable_dropout": False}, register)


def _scalable_t5(scan: bool) -> Example:
    code = _code("t5x.examples.scalable_t5.network")
    config = code.T5Config(**_T5, mlp_activations=("gelu", "linear"), scan_layers=scan)
    inputs = (_tokens(2, 12), _tokens(2, 10), _tokens(2, 10))

    def register(register: Callable[..., None]) -> None:
        register(code.layers.DenseGeneral, rows=_general_axes)

    return Example(code.Transformer(config), inputs, {"enable_dropout": False}, register)


@_model("t5x: scalable_t5")
def _() -> Example:
    return _scalable_t5(False)


@_model("t5x: scalable_t5, scan over remat")
def _() -> Example:
    return _scalable_t5(True)


@_model("t5x: decoder_only")
def _() -> Example:
    code = _code("t5x.examples.decoder_only.network")
    config = code.TransformerConfig(vocab_size=64, emb_dim=32, num_heads=4, num_layers=2, head_dim=8, mlp_dim=64)

    def register(register: Callable[..., None]) -> None:
        register(code.layers.DenseGeneral)

    inputs = (_tokens(2, 12), _tokens(2, 12))
    return Example(code.DecoderWrapper(config), inputs, {"enable_dropout": False}, register)


# --- Hugging Face ----------------------------------------------------------------------------------------------------------


def _mask(*shape: int) -> np.ndarray:
    return np.ones(shape, np.int32)


def _places(batch: int, length: int) -> np.ndarray:
    return np.broadcast_to(np.arange(length), (batch, length))


_BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


@_model("transformers: GPT-2")
def _() -> Example:
    code, hf = _code("transformers.models.gpt2.modeling_flax_gpt2"), _code("transformers")
    config = hf.GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=4)
    inputs = (_tokens(2, 12), _mask(2, 12), _places(2, 12))
    return Example(code.FlaxGPT2LMHeadModule(config), inputs, {}, lambda register: register(code.FlaxConv1D, rows=1))


@_model("transformers: BERT")
def _() -> Example:
    code, hf = _code("transformers.models.bert.modeling_flax_bert"), _code("transformers")
    config = hf.BertConfig(vocab_size=64, max_position_embeddings=16, **_BERT)
    inputs = (_tokens(2, 12), _mask(2, 12), np.zeros((2, 12), np.int32), _places(2, 12), None)
    return Example(code.FlaxBertForMaskedLMModule(config), inputs)


@_model("transformers: ViT")
def _() -> Example:
    code, hf = _code("transformers.models.vit.modeling_flax_vit"), _code("transformers")
    config = hf.ViTConfig(image_size=32, patch_size=8, **_BERT)
    return Example(code.FlaxViTForImageClassificationModule(config), (_image(2, 32, 32, 3),))


@_model("transformers: T5")
def _() -> Example:
    code, hf = _code("transformers.models.t5.modeling_flax_t5"), _code("transformers")
    config = hf.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    inputs = (_tokens(2, 12), _mask(2, 12), _tokens(2, 10), _mask(2, 10))
    return Example(code.FlaxT5ForConditionalGenerationModule(config), inputs)


@_model("transformers: Llama")
def _() -> Example:
    code, hf = _code("transformers.models.llama.modeling_flax_llama"), _code("transformers")
    config = hf.LlamaConfig(vocab_size=64, max_position_embeddings=16, **_BERT)
    return Example(code.FlaxLlamaForCausalLMModule(config), (_tokens(2, 12), _mask(2, 12), _places(2, 12)))


@_model("transformers: CLIP")
def _() -> Example:
    code, hf = _code("transformers.models.clip.modeling_flax_clip"), _code("transformers")
    text = {"vocab_size": 64, "max_position_embeddings": 16, **_BERT}
    vision = {"image_size": 32, "patch_size": 8, **_BERT}
    config = hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=32)
    inputs = (_tokens(2, 12), _image(2, 32, 32, 3), _mask(2, 12), _places(2, 12))
    return Example(code.FlaxCLIPModule(config), inputs)


@_model("transformers: ResNet")
def _() -> Example:
    code, hf = _code("transformers.models.resnet.modeling_flax_resnet"), _code("transformers")
    config = hf.ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic")
    return Example(code.FlaxResNetForImageClassificationModule(config), (_image(2, 32, 32, 3),))


@_model("transformers: Whisper")
def _() -> Example:
    code, hf = _code("transformers.models.whisper.modeling_flax_whisper"), _code("transformers")
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    sizes = {"d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_mel_bins": 8, "pad_token_id": 0}
    config = hf.WhisperConfig(vocab_size=64, max_source_positions=20, max_target_positions=16, **layers, **sizes)
    inputs = (_image(2, 8, 40), _tokens(2, 12), _mask(2, 12), _places(2, 12))
    return Example(code.FlaxWhisperForConditionalGenerationModule(config), inputs)


@_model("transformers: wav2vec 2.0 (weight norm)")
def _() -> Example:
    code, hf = _code("transformers.models.wav2vec2.modeling_flax_wav2vec2"), _code("transformers")
    config = hf.Wav2Vec2Config(
        vocab_size=32,
        conv_dim=(16, 16),
        conv_stride=(5, 2),
        conv_kernel=(10, 3),
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
        do_stable_layer_norm=True,
        feat_extract_norm="layer",
        **_BERT,
    )
    return Example(code.FlaxWav2Vec2ForCTCModule(config), (_image(2, 400), _mask(2, 400)))
