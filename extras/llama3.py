"""
From GPT-2 to Llama 3: what has changed, written out. Read sections 1 to 8 of train_gpt2.py first.

    python -m extras.llama3
        trains a small GPT-2 and a Llama of its size, by bytes, on the same text, for as many
        updates, and prints their losses side by side

    python -m extras.llama3 --model DIR --prompt_ids 1 2 3
        continues token ids with a model of Hugging Face's LlamaForCausalLM

Five things have changed:

    1. rmsnorm takes the place of layernorm: it subtracts no mean and adds no bias.
    2. rope takes the place of wpe: queries and keys are rotated by their positions.
    3. Several heads of queries share one head of keys and one of values.
    4. swiglu takes the place of gelu: half of fc's channels decide what passes of the others.
    5. There are no biases, and the classifier is a matrix of its own, lmhead.

    x = wte[tokens]                                             (B, T, C)
    for each layer:
        x += attproj(attention(repkv(rope(qkv(rmsnorm(x))))))   C -> C + 2 NKV hs -> 3C -> C -> C
        x += fcproj(swiglu(fc(rmsnorm(x))))                     C -> 2F -> F -> C channels
    logits = rmsnorm(x) @ lmhead.T                              (B, T, V)

New letters, with the values of Llama 3 8B, which has C = 4096 and NH = 32:

    NKV   heads of keys, and of values    8
    G     queries that share a key        NH / NKV = 4
    F     channels between fc and fcproj  14336

All else is train_gpt2.py's and has gpt2. before its name: the residual stream, matmul, attention,
the loss, the blob, AdamW, data, sampling. Its three rules of = and += hold. Names are llm.c's.
"""

import copy
import json
import math
import os
import sys
from dataclasses import asdict, astuple, dataclass
from types import SimpleNamespace

import numpy as np

import train_gpt2 as gpt2
from extras import command_line, exit_code_of
from train_gpt2 import GPT2, InputError, Model, by_rows, require

# --------------------------------------------------------------------------------------------------
# 1. The new layers. Each forward is followed by its backward


def rmsnorm_forward(out, rstd, inp, weight, eps):
    """Give each token's channels the mean square 1, then scale (Zhang & Sennrich, 2019).

    out, inp (B, T, C); rstd (B, T), kept for backward; weight (C,); eps, a number

        rstd = 1 / sqrt(sum of inp^2 / C + eps)
        out  = inp * rstd * weight

    For the three channels 1, 2, 6: mean square 41 / 3 = 13.667, rstd 0.2705. With weight 1, out is
    0.271, 0.541, 1.623, where layernorm, which subtracts the mean, gives -0.926, -0.463, 1.389.
    """
    C = inp.shape[-1]
    mean_square = np.einsum("btc,btc->bt", inp, inp) / C
    rstd[...] = 1 / np.sqrt(mean_square + eps)

    np.multiply(inp, rstd[..., np.newaxis], out=out)
    out *= weight


def rmsnorm_backward(dinp, dweight, dout, inp, rstd, weight, add):
    """Add rmsnorm's part to dinp, the gradient of the residual stream; dweight by `add`.

    dinp, dout, inp (B, T, C); rstd (B, T); dweight, weight (C,)

    Call norm[i] = inp[i] * rstd, for channel i of one token. Then out[i] = norm[i] * weight[i], so

        dnorm[i]   = dout[i] * weight[i]
        dweight[i] = sum over tokens of dout[i] * norm[i]

    If one channel inp[j] grows by a small amount e,

        the mean square grows by   e * 2 * inp[j] / C
        rstd grows by              (that of the mean square) * -1/2 * rstd^3
                                   = -e * rstd^2 * norm[j] / C
        norm[i] grows by           e * rstd * ((1 if i == j, else 0) - norm[i] * norm[j] / C)

    The last, multiplied by dnorm[i] and summed over i, is e times the gradient:

        dinp[j] += rstd * (dnorm[j] - norm[j] * average(dnorm * norm))

    where the average is over the C channels. Layernorm has a third term, that of its mean.
    """
    C = inp.shape[-1]
    norm = inp * rstd[..., np.newaxis]
    gpt2.accumulate(dweight, np.einsum("btc,btc->c", dout, norm), add)

    dnorm = dout * weight
    average_with_norm = np.einsum("btc,btc->bt", dnorm, norm) / C
    dnorm -= norm * average_with_norm[..., np.newaxis]
    dinp += dnorm * rstd[..., np.newaxis]


def rope_frequencies(config):
    """How fast each pair of a head's channels turns, in radians per position: (hs / 2,).

        freq[i] = rope_theta^(-2i / hs)          from 1 for i = 0 to nearly 1 / rope_theta

    Llama 3.1 reads longer texts than those of original_max_seq_len tokens that it first learned
    from. A pair that makes few turns in one of those would come to angles that are new to it, so it
    is slowed down by rope_factor. One that makes many turns has had all angles, and is left alone.
    In between, the frequency is a mixture:

        turns = original_max_seq_len * freq / (2 pi)
        keep  = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor), cut to 0 .. 1
        freq  = keep * freq + (1 - keep) * freq / rope_factor
    """
    hs = config.channels // config.num_heads
    low, high = config.low_freq_factor, config.high_freq_factor

    freq = config.rope_theta ** (-np.arange(0, hs, 2) / hs)
    turns = config.original_max_seq_len * freq / (2 * math.pi)
    keep = np.clip((turns - low) / (high - low), 0, 1)
    return keep * freq + (1 - keep) * freq / config.rope_factor


def rope_forward(qkv, positions, freq, heads):
    """Rotate queries and keys by angles that grow with their positions (Su et al., 2021), in place.

    qkv (B, T, ...), whose first `heads` heads are queries and keys; positions (B, T), integers
    freq (hs / 2,): see rope_frequencies

    Channels i and i + hs/2 of a head are the coordinates of a point, which is rotated around 0:

        angle = position * freq[i]
        x, y  = x * cos(angle) - y * sin(angle), x * sin(angle) + y * cos(angle)

    (Meta's own files pair channel 2i with 2i + 1. In Hugging Face's, qkvw has its rows in the order
    that makes halves of them, as here.)

    The product of two points depends on their lengths and on the angle between them, to which the
    rotations add (t - t2) * freq[i], if t is the query's position and t2 the key's. So attention's
    scores depend on how far two tokens are apart, wherever they are. For freq 1, the query (1, 0)
    becomes (-0.990, 0.141) at position 3, and the key (1, 0) becomes (0.540, 0.841) at position 1.
    Their product is -0.416 = cos(2), as it is at positions 13 and 11.
    """
    B, T = qkv.shape[:2]
    points = qkv[..., : heads * 2 * len(freq)].reshape(B, T, heads, 2, -1, copy=False)
    x, y = points[..., 0, :], points[..., 1, :]
    angle = positions[..., np.newaxis, np.newaxis] * freq  # (B, T, 1, hs / 2), for all heads
    cos, sin = np.cos(angle).astype(x.dtype), np.sin(angle).astype(x.dtype)
    x[...], y[...] = x * cos - y * sin, x * sin + y * cos


def rope_backward(dqkv, positions, freq, heads):
    """From the gradient of what rope_forward wrote to that of what it read, in place; see there.

    With c = cos(angle) and s = sin(angle), x goes into x * c - y * s and into x * s + y * c. By the
    chain rule, and likewise for y,

        dx, dy = dx * c + dy * s, -dx * s + dy * c

    which is the rotation by -angle, since cos(-angle) = c and sin(-angle) = -s.
    """
    rope_forward(dqkv, -positions, freq, heads)


def repkv_forward(qkv, grouped, NH, NKV):
    """Repeat each key and value for the G queries that share it (Ainslie et al., 2023).

    grouped (B, T, C + 2 NKV hs), NH heads of queries, then NKV of keys, then NKV of values
    qkv (B, T, 3C), NH heads of each, as attention reads them: head h has the key of head h // G

    Fewer keys are fewer weights, and could be less to keep of the text so far. Here attention takes
    as many heads of keys as of queries, so the weights are saved and the memory is not.
    """
    B, T, width = qkv.shape
    C = width // 3
    shared = grouped[..., C:].reshape(B, T, 2 * NKV, -1)
    qkv[..., :C] = grouped[..., :C]
    qkv[..., C:] = shared.repeat(NH // NKV, axis=2).reshape(B, T, 2 * C)


def repkv_backward(dgrouped, dqkv, NH, NKV):
    """Arguments as in repkv_forward. dgrouped is overwritten.

    The loss depends on a key through each of its G copies, so its gradient is the sum of theirs: if
    these are 3 and 4, it is 7.
    """
    B, T, width = dqkv.shape
    C = width // 3
    dcopies = dqkv[..., C:].reshape(B, T, 2 * NKV, NH // NKV, -1)
    dgrouped[..., :C] = dqkv[..., :C]
    dgrouped[..., C:] = dcopies.sum(axis=3).reshape(B, T, -1)


def swiglu_forward(out, inp):
    """Let gates decide what passes of the channels beside them (Shazeer, 2020).

    inp (B, T, 2F), the output of fc: F gates, then F channels that are called up; out (B, T, F)

        sig = 1 / (1 + exp(-gate))
        out = gate * sig * up

    For gate = log(3) = 1.0986 and up = 2: sig 3/4, out 1.648.
    """
    gate, up = np.split(inp, 2, axis=-1)
    with np.errstate(over="ignore"):  # of a gate below -88, for which 0 is right
        np.multiply(gate / (1 + np.exp(-gate)), up, out=out)


def swiglu_backward(dinp, dout, inp):
    """dinp, inp (B, T, 2F); dout (B, T, F). dinp is overwritten.

    The derivative of sig with respect to gate is sig * (1 - sig). By the product rule,

        dup   = dout * gate * sig
        dgate = dout * up * (sig + gate * sig * (1 - sig))

    For gate = log(3), up = 2 and dout = 1: dup 0.824, dgate 2 * (0.75 + 0.824 / 4) = 1.912.
    """
    gate, up = np.split(inp, 2, axis=-1)
    dgate, dup = np.split(dinp, 2, axis=-1)
    with np.errstate(over="ignore"):
        sig = 1 / (1 + np.exp(-gate))

    gate_sig = gate * sig
    np.multiply(dout, gate_sig, out=dup)
    np.multiply(dout, up * (sig + gate_sig * (1 - sig)), out=dgate)


# --------------------------------------------------------------------------------------------------
# 2. The model


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of a model. The defaults are Llama 3 8B."""

    max_seq_len: int = 8192
    vocab_size: int = 128256
    num_layers: int = 32
    num_heads: int = 32
    num_kv_heads: int = 8
    channels: int = 4096
    ffn_channels: int = 14336
    norm_eps: float = 1e-5
    rope_theta: float = 500000.0
    rope_factor: float = 1.0  # 1: all frequencies stay. It is 8 in Llama 3.1
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_seq_len: int = 8192

    @property
    def grouped_channels(self):
        """Channels of all heads of queries, keys and values."""
        return self.channels + 2 * self.num_kv_heads * self.channels // self.num_heads


class LlamaModel(Model):
    """What is not as in Model, where it is said what each method does."""

    CLASSIFIER = "lmhead"

    @staticmethod
    def layer_params(config):
        C, F = config.channels, config.ffn_channels
        shapes = Model.layer_params(config)
        weights = {name: shapes[name] for name in shapes if name.endswith("w")}
        return weights | {
            "qkvw": (config.grouped_channels, C),  # rows for the queries, keys and values
            "fcw": (2 * F, C),  # rows for gates and up
            "fcprojw": (C, F),
        }

    @classmethod
    def param_shapes(cls, config):
        shapes = super().param_shapes(config)
        del shapes["wpe"], shapes["lnfb"]
        return {"lmhead": shapes["wte"], **shapes}

    @staticmethod
    def layer_acts(config, B, T):
        shapes = Model.layer_acts(config, B, T)
        del shapes["ln1_mean"], shapes["ln2_mean"], shapes["fch_gelu"]
        return shapes | {
            "grouped": (B, T, config.grouped_channels),  # what qkvw makes; rope rotates it in place
            "fch": (B, T, 2 * config.ffn_channels),
            "fch_swiglu": (B, T, config.ffn_channels),
        }

    @staticmethod
    def shared_by_layers(names, recompute, training):
        if training and recompute == 1:  # what backward does not read: rope and repkv are linear
            return ["grouped", "attproj", "fcproj"]
        return Model.shared_by_layers(names, recompute, training)

    @staticmethod
    def work_shapes(config, B, T):
        return Model.work_shapes(config, B, T) | {
            "dfch": (B, T, 2 * config.ffn_channels),
            "dfch_swiglu": (B, T, config.ffn_channels),
            "dgrouped": (B, T, config.grouped_channels),
        }

    @classmethod
    def act_shapes(cls, config, B, T, recompute=1, training=True):
        shapes = super().act_shapes(config, B, T, recompute, training)
        del shapes["lnf_mean"]
        return shapes

    def forward_tokens(self, tokens, start=0):
        B, n = tokens.shape
        params, acts = self.params, self.acts

        residual = acts["encoded"][:B, :n]
        np.take(params["wte"], tokens, axis=0, out=residual, mode="clip")

        for l in range(self.config.num_layers):
            a = self.acts_of(l, B, n, start)
            self.forward_layer(self.params_of(params, l), a, residual)
            residual = a.residual3

        lnf = acts["lnf"][:B, :n]
        rstd = acts["lnf_rstd"][:B, :n]
        rmsnorm_forward(lnf, rstd, residual, params["lnfw"], self.config.norm_eps)
        return lnf

    def forward_layer(self, p, a, residual, whole=True):
        NH, NKV, eps = self.config.num_heads, self.config.num_kv_heads, self.config.norm_eps
        B, n = residual.shape[:2]
        T = a.qkv.shape[1]  # n, except in generation
        positions = np.tile(np.arange(T - n, T), (B, 1))

        # residual2 = residual + attproj(attention(repkv(rope(qkv(rmsnorm(residual))))))
        rmsnorm_forward(a.ln1, a.ln1_rstd, residual, p.ln1w, eps)
        gpt2.matmul_forward(a.grouped, a.ln1, p.qkvw)
        rope_forward(a.grouped, positions, rope_frequencies(self.config), NH + NKV)
        repkv_forward(a.qkv[:, T - n :], a.grouped, NH, NKV)
        gpt2.attention_forward(a.atty, a.att_lse, a.qkv, NH)
        gpt2.matmul_forward(a.attproj, a.atty, p.attprojw)
        gpt2.residual_forward(a.residual2, residual, a.attproj)

        # residual3 = residual2 + fcproj(swiglu(fc(rmsnorm(residual2))))
        rmsnorm_forward(a.ln2, a.ln2_rstd, a.residual2, p.ln2w, eps)
        gpt2.matmul_forward(a.fch, a.ln2, p.fcw)
        swiglu_forward(a.fch_swiglu, a.fch)
        if whole:
            gpt2.matmul_forward(a.fcproj, a.fch_swiglu, p.fcprojw)
            gpt2.residual_forward(a.residual3, a.residual2, a.fcproj)

    def backward(self):
        params, grads, acts = self.params, self.grads, self.acts
        B, T = self.inputs.shape
        add = self.micro_batch > 0
        w = SimpleNamespace(**acts)  # backward_layer takes the work space from it

        w.dresidual[...] = 0
        last, rstd = acts["residual3"][-1], acts["lnf_rstd"]
        rmsnorm_backward(w.dresidual, grads["lnfw"], w.dlnf, last, rstd, params["lnfw"], add)

        for l in reversed(range(self.config.num_layers)):
            p = self.params_of(params, l)
            a = self.acts_of(l, B, T)
            residual = acts["residual3"][l - 1] if l > 0 else acts["encoded"]
            if self.recompute == 2 and l < self.config.num_layers - 1:
                self.forward_layer(p, a, residual, whole=False)
            self.backward_layer(p, self.params_of(grads, l), a, w, residual, add)

        if not add:
            grads["wte"][...] = 0  # by rule 3; in GPT-2 the classifier has written its part here
        np.add.at(grads["wte"], self.inputs, w.dresidual)
        self.micro_batch += 1

    def backward_layer(self, p, g, a, w, residual, add):
        NH, NKV = self.config.num_heads, self.config.num_kv_heads
        B, T = residual.shape[:2]
        positions = np.tile(np.arange(T), (B, 1))

        # residual3 = residual2 + fcproj
        dout, inp = w.dresidual, a.fch_swiglu
        gpt2.matmul_backward(w.dfch_swiglu, g.fcprojw, None, dout, inp, p.fcprojw, add)
        swiglu_backward(w.dfch, w.dfch_swiglu, a.fch)
        gpt2.matmul_backward(w.dln2, g.fcw, None, w.dfch, a.ln2, p.fcw, add)
        rmsnorm_backward(w.dresidual, g.ln2w, w.dln2, a.residual2, a.ln2_rstd, p.ln2w, add)

        # residual2 = residual + attproj
        gpt2.matmul_backward(w.datty, g.attprojw, None, w.dresidual, a.atty, p.attprojw, add)
        gpt2.attention_backward(w.dqkv, w.datty, a.atty, a.att_lse, a.qkv, NH)
        repkv_backward(w.dgrouped, w.dqkv, NH, NKV)
        rope_backward(w.dgrouped, positions, rope_frequencies(self.config), NH + NKV)
        gpt2.matmul_backward(w.dln1, g.qkvw, None, w.dgrouped, a.ln1, p.qkvw, add)
        rmsnorm_backward(w.dresidual, g.ln1w, w.dln1, residual, a.ln1_rstd, p.ln1w, add)


class Llama(GPT2, LlamaModel):
    """LlamaModel with the calls, checks and sampling of GPT2, whose super() is LlamaModel here."""

    @staticmethod
    def check_config(config):
        """InputError unless there can be a model of this shape."""
        for name, value in asdict(config).items():
            kind = type(getattr(LlamaConfig, name))
            right = type(value) in (int, kind) and 0 < value < math.inf
            require(right, f"{name} is {value!r}, expected a positive {kind.__name__}")

        C, NH, NKV = config.channels, config.num_heads, config.num_kv_heads
        require(C % (2 * NH) == 0, f"{C} channels are no even number for each of {NH} heads")
        require(NH % NKV == 0, f"{NH} heads of queries can't share {NKV} heads of keys")
        low, high = config.low_freq_factor, config.high_freq_factor
        require(low < high, f"low_freq_factor {low} is not below high_freq_factor {high}")

    @classmethod
    def from_pretrained(cls, source, batch_size=4, sequence_length=64, recompute=1, training=True):
        """A model from a folder of Hugging Face's LlamaForCausalLM. Errors: InputError, OSError.

        If the classifier there is wte (as in Llama 3.2 1B), lmhead is a copy, trained by itself.
        """
        config, tensors = open_llama(source)
        model = cls(config, batch_size, sequence_length, None, recompute, training)
        gpt2.copy_tensors(huggingface_views(config, model.params), tensors)
        return model

    def save_pretrained(self, folder):
        """Write config.json and model.safetensors, which LlamaForCausalLM reads."""
        text = json.dumps(huggingface_config(self.config), indent=2)
        os.makedirs(folder, exist_ok=True)
        with gpt2.atomic_write(os.path.join(folder, "config.json")) as file:
            file.write(text.encode())
        views = huggingface_views(self.config, self.params)
        gpt2.write_safetensors(os.path.join(folder, "model.safetensors"), views, {"format": "pt"})


# As the trainer wraps its own layers: blocks of rows, which the cores share.
rmsnorm_forward = by_rows(rmsnorm_forward, "out rstd inp")
rmsnorm_backward = by_rows(rmsnorm_backward, "dinp dout inp rstd", "dweight")
rope_forward = by_rows(rope_forward, "qkv positions")
repkv_forward = by_rows(repkv_forward, "qkv grouped")
repkv_backward = by_rows(repkv_backward, "dgrouped dqkv")
swiglu_forward = by_rows(swiglu_forward, "out inp")
swiglu_backward = by_rows(swiglu_backward, "dinp dout inp")

# --------------------------------------------------------------------------------------------------
# 3. Hugging Face's files

HF_NAMES = (  # of LlamaConfig's fields, in their order
    "max_position_embeddings", "vocab_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "hidden_size", "intermediate_size", "rms_norm_eps", "rope_theta",
    "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
)  # fmt: skip


def huggingface_config(config):
    """What config.json says of a model, as transformers 4 and 5 read it."""
    values = dict(zip(HF_NAMES, astuple(config), strict=True))
    scaling = {name: values.pop(name) for name in HF_NAMES[9:]} | {"rope_type": "llama3"}
    return values | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "rope_scaling": None if config.rope_factor == 1 else scaling,
        "head_dim": config.channels // config.num_heads,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": None,  # here they are not known
        "eos_token_id": None,
    }


def huggingface_views(config, params):
    """The same memory under Hugging Face's names, where qkvw is three matrices, and fcw two."""
    C, F = config.channels, config.ffn_channels
    keys = (config.grouped_channels - C) // 2
    views = {
        "lm_head": params["lmhead"],
        "model.embed_tokens": params["wte"],
        "model.norm": params["lnfw"],
    }
    for l in range(config.num_layers):
        of_layer = {
            "input_layernorm": params["ln1w"][l],
            "self_attn.q_proj": params["qkvw"][l, :C],
            "self_attn.k_proj": params["qkvw"][l, C : C + keys],
            "self_attn.v_proj": params["qkvw"][l, C + keys :],
            "self_attn.o_proj": params["attprojw"][l],
            "post_attention_layernorm": params["ln2w"][l],
            "mlp.gate_proj": params["fcw"][l, :F],
            "mlp.up_proj": params["fcw"][l, F:],
            "mlp.down_proj": params["fcprojw"][l],
        }
        views |= {f"model.layers.{l}.{name}": view for name, view in of_layer.items()}
    return {f"{name}.weight": view for name, view in views.items()}


def open_llama(folder):
    """(LlamaConfig, {Hugging Face's name: view}) of a folder. InputError if it is no Llama."""
    path = os.path.join(folder, "config.json")
    told = gpt2.read_json(path)
    tensors, _ = gpt2.read_parts(folder)

    try:
        if told.pop("tie_word_embeddings", False):
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]

        # In older files, rope_theta stands by itself, and type is what is now rope_type.
        older = told.pop("rope_scaling", None)
        found = {"rope_theta": 10000.0} | told | (told.get("rope_parameters") or older or {})
        kind = found.get("rope_type", found.get("type", "default"))
        names = {"default": HF_NAMES[:9], "llama3": HF_NAMES}.get(kind)
        require(names, f"rotary embeddings of type {kind!r}, expected 'default' or 'llama3'")

        found["num_hidden_layers"] = sum(name.endswith(".q_proj.weight") for name in tensors)
        config = LlamaConfig(*map(found.get, names))
        Llama.check_config(config)
        for key, expected in huggingface_config(config).items():
            right = expected is None or told.get(key) in (None, expected)
            require(right, f"it says {key} = {told.get(key)!r}, expected {expected!r}")
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: {error}") from None
    return config, tensors


# --------------------------------------------------------------------------------------------------
# 4. The program

# As many parameters as the GPT-2 of `python train_gpt2.py --model bytes` has, within 1 %.
SMALL = LlamaConfig(64, 256, 2, 4, 2, 128, 352, rope_theta=10000.0)


def compare(updates):
    """Train that GPT-2, then a Llama, and print their losses side by side. Returns the Llama."""
    run = gpt2.open_run(["--model", "bytes", "--num_iterations", str(updates)])
    other = copy.deepcopy(run)
    other.model = Llama(SMALL, run.loader.B, run.loader.T, run.args.seed)
    for each in (run, other):
        print(f"\n{each.model}")
        gpt2.train(each)

    ours, others = run.entries[-1]["val_loss"], other.entries[-1]["val_loss"]
    print(f"\nval loss of the GPT-2 {ours:.4f}, of the Llama {others:.4f}")
    return other.model


def work(args):
    """What main does with its flags."""
    folder = args.output_dir
    taken = folder and os.path.exists(os.path.join(folder, "config.json"))
    require(not taken, f"{folder} holds a model: choose another --output_dir")
    if args.model:
        most = open_llama(args.model)[0].max_seq_len
        T = min(most, len(args.prompt_ids) + args.max_new_tokens)
        model = Llama.from_pretrained(args.model, 1, T, training=False)
        print(*model.generate(args.prompt_ids, args.max_new_tokens, args.temperature, rng=1337))
    else:
        model = compare(args.num_iterations)
    if folder:
        model.save_pretrained(folder)
        print(f"saved in {folder}")


def main(argv=None):
    """The command line. Returns the exit code."""
    parser = command_line("llama3", __doc__)
    add = parser.add_argument
    add("--model", metavar="DIR", help="a folder of LlamaForCausalLM; without it, train")
    add("--prompt_ids", type=int, nargs="+", default=[1], metavar="ID", help="what it continues")
    add("--max_new_tokens", type=int, default=64, metavar="N", help="how many ids to add")
    add("--temperature", type=float, default=1.0, metavar="X", help="0: always the likeliest")
    add("--num_iterations", type=int, default=1400, metavar="N", help="updates of each model")
    add("--output_dir", metavar="DIR", help="where to save the Llama")
    return exit_code_of(work, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
