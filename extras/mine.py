"""
A work sheet: the layers of GPT-2, their wiring and AdamW, without their bodies. Write them.

    python -m extras.exercises mine.py

Fill in one function or several, in any order, and ask the tutor. What you leave as it is, or take
out of this file, is the trainer's own. What you write may call other functions of this file, filled
in or not.

    B, T, C     sequences in a batch, positions in a sequence, channels
    V           tokens in the vocabulary
    NH, hs      attention heads, channels of a head: C = NH * hs
    OC          output channels of a matmul
    b, t, h     number of a sequence, of a position in it, of a head
    dx          the gradient of the loss with respect to x, in the shape of x. dout is given: the
                gradient with respect to what the forward function wrote into out

A function returns nothing. It writes its results into arrays that it is given, with out[...] = x or
out += x; after out = x, `out` would be a name for another array. There are three ways to write:

    overwritten     whatever stood there before, perhaps NaN
    added to        with +=
    follows `add`   overwritten if add is False, added to if it is True

All other arguments are only read. Arrays are float64 when the tutor asks, and float32 in training.

A course of three evenings, in the order of the sheet:

    1. From residual to encoder: layers that treat each number, or each row, by itself. Then you
       can train a perceptron by hand: matmul, GELU, matmul.
    2. Layernorm, the loss and AdamW: sums over a row. Then all is yours but attention.
    3. Attention, and the wiring: how the layers follow each other, and what is added to what. Then
       you have written a GPT, and can take it to another language: see extras/porting_kit.py.
"""

import numpy as np  # noqa: F401


def residual_forward(out, inp1, inp2):
    """The sum of two arrays.

    out (B, T, C), overwritten; inp1, inp2 (B, T, C)

        out = inp1 + inp2
    """
    raise NotImplementedError


def gelu_forward(out, inp):
    """Keep large numbers and turn very negative ones into 0, smoothly.

    out (B, T, C), overwritten; inp (B, T, C); the C of this layer is four times that of others

        u   = sqrt(2 / pi) * (inp + 0.044715 * inp^3)
        out = inp * 0.5 * (1 + tanh(u))
    """
    raise NotImplementedError


def gelu_backward(dinp, dout, inp):
    """The gradient of gelu_forward.

    dinp (B, T, C), overwritten; dout, inp (B, T, C). dinp and dout may be one and the same array
    """
    raise NotImplementedError


def matmul_forward(out, inp, weight, bias=None):
    """The linear layer.

    out (B, T, OC), overwritten; inp (B, T, C); weight (OC, C); bias (OC,), or None

        out[b, t, o] = sum over c of inp[b, t, c] * weight[o, c] + bias[o]
    """
    raise NotImplementedError


def matmul_backward(dinp, dweight, dbias, dout, inp, weight, add):
    """The gradients of matmul_forward.

    dinp (B, T, C), overwritten; dweight (OC, C), follows `add`; dbias (OC,), too, or None
    dout (B, T, OC); inp (B, T, C); weight (OC, C)
    """
    raise NotImplementedError


def encoder_forward(out, inp, wte, wpe):
    """Each token becomes the sum of its own embedding and that of its position.

    out (B, T, C), overwritten; inp (B, T) token ids; wte (V, C); wpe (T, C)

        out[b, t] = wte[inp[b, t]] + wpe[t]
    """
    raise NotImplementedError


def encoder_backward(dwte, dwpe, dout, inp, add):
    """The gradients of encoder_forward.

    dwte (V, C), added to, whatever `add` is
    dwpe (max_seq_len, C), follows `add`; max_seq_len may be more than T. The rows from T on had no
        token: their gradient is 0
    dout (B, T, C); inp (B, T) token ids. A token may occur more than once
    """
    raise NotImplementedError


def layernorm_forward(out, mean, rstd, inp, weight, bias):
    """Give the channels of each token mean 0 and variance 1, then scale and shift.

    out (B, T, C), mean, rstd (B, T), all overwritten; inp (B, T, C); weight, bias (C,)

        mean = sum of inp / C
        var  = sum of (inp - mean)^2 / C
        rstd = 1 / sqrt(var + 1e-5)
        norm = (inp - mean) * rstd
        out  = norm * weight + bias

    The sums are over the C channels of a token.
    """
    raise NotImplementedError


def layernorm_backward(dinp, dweight, dbias, dout, inp, mean, rstd, weight, add):
    """The gradients of layernorm_forward.

    dinp (B, T, C), added to, whatever `add` is; dweight, dbias (C,), follow `add`
    dout, inp (B, T, C); mean, rstd (B, T), as the forward function wrote them; weight (C,)
    """
    raise NotImplementedError


def crossentropy_softmax_forward(losses, logits, targets):
    """The loss of each token: minus the logarithm of the probability of what came next.

    losses (B, T), overwritten; logits (B, T, V), overwritten by probs; targets (B, T) token ids

        probs  = exp(logits) / sum of exp(logits)     the sum is over the V logits of a token
        losses = -log(probs[target])

    The largest logit may be a thousand, and exp would overflow.
    """
    raise NotImplementedError


def crossentropy_softmax_backward(probs, targets, dloss):
    """The gradient with respect to the logits.

    probs (B, T, V), as the forward function wrote them, overwritten by dlogits
    targets (B, T) token ids; dloss, a number: the gradient with respect to each of the losses
    """
    raise NotImplementedError


def adamw(p, g, m, v, decay, learning_rate, beta1, beta2, eps, step, grad_scale):
    """One step of AdamW.

    p, g, m, v (n,): parameters, gradients, and two moments. All four change in place: afterwards g
        holds the scaled gradient
    step: the number of this update, from 1; the others are numbers

        g = grad_scale * g
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g^2
        p = p - decay * p - learning_rate * (m / c1) / (sqrt(v / c2) + eps)

    where c1 = 1 - beta1^step and c2 = 1 - beta2^step.
    """
    raise NotImplementedError


def attention_forward(out, lse, qkv, NH):
    """Each position looks at itself and at those before it.

    out (B, T, C), lse (B, T, NH), both overwritten
    qkv (B, T, 3C): a query in the first C channels, a key in the next C, a value in the last C. Of
        each, head h has the channels from h * hs to (h + 1) * hs

    For each head, with its own hs channels of the query q[t], the key k[t2] and the value v[t2]:

        preatt[t, t2] = q[t] . k[t2] / sqrt(hs)       for t2 <= t, otherwise -inf
        att[t, t2]    = exp(preatt[t, t2]) / sum over t2 of exp(preatt[t, t2])
        out[t]        = sum over t2 of att[t, t2] * v[t2]
        lse[t]        = log(sum over t2 of exp(preatt[t, t2]))

    The largest preatt of a row may be a thousand, and exp would overflow.
    """
    raise NotImplementedError


def attention_backward(dqkv, dout, out, lse, qkv, NH):
    """The gradients of attention_forward with respect to queries, keys and values.

    dqkv (B, T, 3C), overwritten, with the channels in the order of qkv
    dout (B, T, C); out (B, T, C), lse (B, T, NH), as the forward function wrote them; qkv (B, T,
        3C). No gradient arrives through lse, which the forward function only keeps for this one:
        with it, att[t, t2] is exp(preatt[t, t2] - lse[t])

    The largest preatt of a row may be a thousand, and exp would overflow: exp(preatt[t, t2]), and
    for t2 > t, where att is 0, also exp(preatt[t, t2] - lse[t]).
    """
    raise NotImplementedError


def forward_layer(p, a, residual, NH):
    """One layer of the model, from its input to its output: ten calls of the functions above.

        residual2 = residual + attproj(attention(qkv(ln1(residual))))
        residual3 = residual2 + fcproj(gelu(fc(ln2(residual2))))

    ln1 and ln2 are layernorms; qkv, attproj, fc and fcproj are matmuls.

    residual (B, T, C), the layer's input; NH, the number of heads
    p   the parameters, as attributes: ln1w, ln1b (C,), qkvw (3C, C), qkvb (3C,), attprojw (C, C),
        attprojb (C,), ln2w, ln2b (C,), fcw (4C, C), fcb (4C,), fcprojw (C, 4C), fcprojb (C,)
    a   the activations, as attributes. All are overwritten, in this order:
        ln1 (B, T, C), ln1_mean, ln1_rstd (B, T), qkv (B, T, 3C), att_lse (B, T, NH), atty, the
        output of attention, attproj, residual2, ln2 (B, T, C), ln2_mean, ln2_rstd (B, T), fch, the
        output of fc, fch_gelu (B, T, 4C), fcproj, residual3 (B, T, C), the layer's output
    """
    raise NotImplementedError


def backward_layer(p, g, a, w, residual, add, NH):
    """The gradients of forward_layer, from its output to its input: eight calls.

    p, a, residual and NH are those of forward_layer. They are only read; attproj and fcproj are not
        there any more, because all layers share their memory
    g   the gradients of the parameters, as attributes with the same names. They follow `add`
    w   the work space, as attributes, in the order in which it is written:
        dresidual (B, T, C) is given, as the gradient of residual3. The layer adds to it twice: it
            becomes that of residual2, and in the end that of residual
        dfch (B, T, 4C) becomes the gradient of fch_gelu, and then, in place, that of fch
        dln2, datty (B, T, C), dqkv (B, T, 3C), dln1 (B, T, C) become those of ln2, atty, qkv, ln1
    """
    raise NotImplementedError
