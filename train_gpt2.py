"""
GPT-2, trained in NumPy: the whole algorithm, written out.

There is no framework underneath. Every layer is a function that computes its output (forward),
followed by a function that computes its gradients (backward). Parameters, gradients, moments and
activations lie in one flat array, which is laid out before the first step. Names and layouts of the
parameters are those of llm.c (github.com/karpathy/llm.c). PyTorch appears only in the tests:
test_gpt2.py compares every tensor with it.

    python train_gpt2.py
        fine-tunes GPT-2 124M on Shakespeare; with --help it shows what else it does

There is no tensor class here, no autograd, no layer object, no device and no mixed precision.

Sections 1 to 8 are the algorithm:

    1  imports                              5  the model forward
    2  layers                               6  the model backward
    3  the configuration                    7  AdamW
    4  memory                               8  data, one training step, sampling

They are a program by themselves: demo(), at the end of section 8, puts it all together. Cut off at
the line where the algorithm ends, they train a small GPT on their own text and let it write:

    sed '/^# Here the algorithm ends/,$d' train_gpt2.py > chapter.py
    python -c "import chapter; chapter.demo()"

The sections after that line make a tool of it: fast, checked, with files and a command line. The
file stands alone: it needs NumPy, and tiktoken to turn text into GPT-2's tokens and back.

Throughout this program we have (with the values of GPT-2 124M)

    B     batch size, sequences per batch                 4
    T     sequence length, tokens per sequence            64, at most max_seq_len = 1024
    V     vocabulary size                                 50257: 256 bytes, 50000 merges, 1 end
    L     layers                                          12
    C     channels, the width of the residual stream      768
    NH    attention heads                                 12
    hs    head size, C / NH                               64
    OC    output channels of a matmul                     C, 3C or 4C; V for the classifier

    b, t, h, l   number of a sequence, of a position in it, of a head, of a layer
    inp, out     what a layer reads and what it writes; its parameters are weight and bias
    dsomething   the gradient of the loss with respect to something, in the shape of something

The model, where x is the residual stream and attproj, qkv, fc and fcproj are matmuls:

    x = wte[tokens] + wpe[positions]                            (B, T, C)
    for each layer:
        x += attproj(attention(qkv(layernorm(x))))              C -> 3C -> C -> C channels
        x += fcproj(gelu(fc(layernorm(x))))                     C -> 4C -> 4C -> C channels
    logits = layernorm(x) @ wte.T                               (B, T, V)

Whether a backward function overwrites (=) or adds (+=) follows three rules:

    1. The gradient of an activation is overwritten, whatever stood there before.
    2. The gradient of the residual stream is added to, because each line with += uses x twice: in
       the layernorm, and in the addition. It starts each backward pass as 0.
    3. The gradient of a parameter is overwritten by the first micro-batch of a step and added to by
       the later ones. The argument `add` says which. So nothing is cleared before a step.

wte is used at both ends of the model, so dwte has two writers in each micro-batch. The classifier
comes first, in forward(), and follows rule 3. encoder_backward comes last, and always adds.

Everything is float32. The layers take any float type, and the tests run them in float64. A single
number, such as the learning rate, is a Python float, which is rounded where it meets an array.
"""

# --------------------------------------------------------------------------------------------------
# 1. Imports: what the algorithm needs. Those of the tool stand where the tool begins

import math
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np  # 2.1 or newer

# --------------------------------------------------------------------------------------------------
# 2. The layers. Each forward is followed by its backward
#
# A backward function receives dout, the gradient of the loss with respect to its forward's output.
# It applies the chain rule and gives the gradient with respect to the forward's inputs.
#
#     function                        overwritten          added to  as `add` says   only read
#     encoder_forward                 out                                            the others
#     encoder_backward                                     dwte      dwpe            dout, inp
#     layernorm_forward               out, mean, rstd                                the others
#     layernorm_backward                                   dinp      dweight, dbias  the others
#     matmul_forward                  out                                            the others
#     matmul_backward                 dinp                           dweight, dbias  the others
#     attention_forward               out, lse                                       qkv
#     attention_backward              dqkv                                           the others
#     gelu_forward                    out                                            inp
#     gelu_backward                   dinp                                           dout, inp
#     residual_forward                out                                            inp1, inp2
#     crossentropy_softmax_forward    losses; logits,                                targets
#                                     which become probs
#     crossentropy_softmax_backward   probs, which                                   targets,
#                                     become dlogits                                 dloss
#
# "As `add` says" is rule 3 of the header: overwritten if add is False, added to if it is True.
# Arguments may not overlap, with one exception: gelu_backward's dinp may be its dout. These
# functions return nothing. What one of them needs only while it runs, such as the scores of
# attention, it allocates itself; that is small beside the activations.
#
# llm.c's functions have the same arguments, in the same order but for two: its layernorm_backward
# has weight before mean, and its gelu_backward has inp before dout.


def encoder_forward(out, inp, wte, wpe):
    """Each token becomes the sum of its own embedding and that of its position.

    out (B, T, C); inp (B, T) token ids; wte (V, C); wpe (T, C), the rows of these T positions

        out[b, t] = wte[inp[b, t]] + wpe[t]
    """
    np.take(wte, inp, axis=0, out=out, mode="clip")  # any other mode makes a copy first
    out += wpe


def encoder_backward(dwte, dwpe, dout, inp, add):
    """The gradient of a sum goes unchanged to both summands, a row of wte and a row of wpe.

    dwte (V, C) is always added to, because the classifier has written its part of it already
    dwpe (max_seq_len, C) follows `add`; dout (B, T, C); inp (B, T)

        dwte[inp[b, t]] += dout[b, t]
        dwpe[t]          = sum over b of dout[b, t]
    """
    # One row after the other, because a token that occurs twice adds to the same row of dwte twice.
    for token, row in zip(inp.reshape(-1), rows_of(dout), strict=True):
        dwte[token] += row

    T = dout.shape[1]
    accumulate(dwpe[:T], dout.sum(axis=0), add)
    if not add:
        dwpe[T:] = 0  # these positions had no token, and their rows hold what was there before


def accumulate(grad, value, add):
    """grad = value, or grad += value if `add`: rule 3 of the header."""
    if add:
        grad += value
    else:
        grad[...] = value


def rows_of(x):
    """(B, T, ...) seen as (B*T, ...): a row is what belongs to one token.

    copy=False: an error where no view is possible, since what is written into a copy is lost.
    """
    return x.reshape(-1, *x.shape[2:], copy=False)


LN_EPS = 1e-5  # keeps rstd finite when all channels are equal; OpenAI's value


def layernorm_forward(out, mean, rstd, inp, weight, bias):
    """Give each token's channels mean 0 and variance 1, then scale and shift (Ba et al., 2016).

    out, inp (B, T, C); mean, rstd (B, T), kept for backward; weight, bias (C,)

        mean = sum of inp / C
        var  = sum of (inp - mean)^2 / C        the biased variance: / C, not / (C - 1)
        rstd = 1 / sqrt(var + 1e-5)
        out  = (inp - mean) * rstd * weight + bias

    For the three channels 1, 2, 6: mean 3, var (4 + 1 + 9) / 3 = 4.667, rstd 0.463. With weight 1
    and bias 0, out is -0.926, -0.463, 1.389.
    """
    # einsum sums over the letters that are missing on the right: here c, the channel.
    # For sums of this kind it takes a third of the time of inp.sum(axis=-1).
    C = inp.shape[-1]
    np.divide(np.einsum("btc->bt", inp), C, out=mean)

    np.subtract(inp, mean[..., np.newaxis], out=out)
    var = np.einsum("btc,btc->bt", out, out) / C
    rstd[...] = 1 / np.sqrt(var + LN_EPS)

    out *= rstd[..., np.newaxis]
    out *= weight
    out += bias


def layernorm_backward(dinp, dweight, dbias, dout, inp, mean, rstd, weight, add):
    """Add layernorm's part to dinp, the gradient of the residual stream; dweight, dbias by `add`.

    dinp, dout, inp (B, T, C); mean, rstd (B, T); dweight, dbias, weight (C,)

    Call norm[i] = (inp[i] - mean) * rstd, for channel i of one token. The forward pass is

        out[i] = norm[i] * weight[i] + bias[i]

    so

        dnorm[i]   = dout[i] * weight[i]

    and, since all tokens share weight and bias,

        dweight[i] = sum over tokens of dout[i] * norm[i]
        dbias[i]   = sum over tokens of dout[i]

    Now from dnorm to dinp. If one channel inp[j] grows by a small amount e,

        mean grows by     e / C
        var  grows by     e * 2 * (inp[j] - mean) / C
        rstd grows by     (that of var) * -1/2 * rstd^3  =  -e * rstd^2 * norm[j] / C

    In the second line, the mean in each term (inp[i] - mean)^2 grows as well, but what this changes
    adds up to 0, since the sum of inp - mean is 0. The third line follows from the second, because
    rstd is (var + 1e-5)^(-1/2), whose derivative with respect to var is -1/2 * rstd^3.

    So norm[i] = (inp[i] - mean) * rstd grows, by the product rule, by

        e * rstd * ((1 if i == j, else 0) - 1 / C - norm[i] * norm[j] / C)

    Multiplied by dnorm[i] and summed over i, this is e times the gradient:

        dinp[j] += rstd * (dnorm[j] - average(dnorm) - norm[j] * average(dnorm * norm))

    where the averages are over the C channels.
    """
    C = inp.shape[-1]
    norm = inp - mean[..., np.newaxis]
    norm *= rstd[..., np.newaxis]

    accumulate(dweight, np.einsum("btc,btc->c", dout, norm), add)
    accumulate(dbias, np.einsum("btc->c", dout), add)

    dnorm = dout * weight
    average = np.einsum("btc->bt", dnorm) / C
    average_with_norm = np.einsum("btc,btc->bt", dnorm, norm) / C

    # dinp += rstd * (dnorm - average - norm * average_with_norm), in the memory of dnorm and norm
    dnorm -= average[..., np.newaxis]
    norm *= average_with_norm[..., np.newaxis]
    dnorm -= norm
    dnorm *= rstd[..., np.newaxis]
    dinp += dnorm


def matmul_forward(out, inp, weight, bias=None):
    """The linear layer, in which a step spends most of its time.

    out (B, T, OC); inp (B, T, C), where C is whatever inp has; weight (OC, C); bias (OC,)

        out[b, t, o] = sum over c of inp[b, t, c] * weight[o, c] + bias[o]

    It is one matrix product for all B*T rows. weight.T exchanges the strides of a view; BLAS, the
    library that multiplies matrices for NumPy, reads it as it is, and nothing is copied.
    """
    products((rows_of(out), rows_of(inp), weight.T, False, bias))


def matmul_backward(dinp, dweight, dbias, dout, inp, weight, add):
    """dinp is overwritten; dweight and dbias, if there is a bias, follow `add`.

    dinp, inp (B, T, C); dout (B, T, OC); dweight, weight (OC, C); dbias (OC,), or None

    Call n a row, one of the B*T pairs (b, t). The forward pass is

        out[n, o] = sum over c of inp[n, c] * weight[o, c] + bias[o]

    so the loss depends on inp[n, c] through every o, and on weight[o, c] through every n:

        dinp[n, c]    = sum over o of dout[n, o] * weight[o, c]       dinp    = dout @ weight
        dweight[o, c] = sum over n of dout[n, o] * inp[n, c]          dweight = dout.T @ inp
        dbias[o]      = sum over n of dout[n, o]                      dbias   = ones @ dout

    The last sum, too, is taken as a matrix product, which BLAS does fastest.
    """
    dout = rows_of(dout)
    inp = rows_of(inp)

    jobs = [(rows_of(dinp), dout, weight, False, None), (dweight, dout.T, inp, add, None)]
    if dbias is not None:
        ones = np.ones((1, len(dout)), dout.dtype)  # (1, B*T)
        jobs.append((dbias[np.newaxis], ones, dout, add, None))
    products(*jobs)


def products(*jobs):
    """Matrix products that do not depend on each other. A job is (out, a, b, add, bias).

    out (m, n) = a (m, k) @ b (k, n) + bias (n,), which may be None; or out += a @ b if add is True
    """
    for out, a, b, add, bias in jobs:
        if add:  # NumPy can't let BLAS add
            out += a @ b
        else:
            np.matmul(a, b, out=out)
        if bias is not None:
            out += bias


# What follows serves attention. What scores, queries, keys and values are is said in
# attention_forward.

ATT_ROWS = 128  # attention takes this many positions at a time

# Added to the scores of the same positions as queries (rows) and as keys (columns). It makes them
# -inf where the key comes later than the query.
HIDE_FUTURE = np.triu(np.full((ATT_ROWS, ATT_ROWS), -np.inf, np.float32), k=1)


def split_heads(x, NH):
    """(B, T, C) seen as (B, NH, T, hs). Head h has the channels from h * hs to (h + 1) * hs."""
    B, T = x.shape[:2]
    return x.reshape(B, T, NH, -1, copy=False).transpose(0, 2, 1, 3)


def split_qkv(qkv, NH):
    """Queries, keys and values, each seen as (B, NH, T, hs), of qkv (B, T, 3C).

    q[b, h, t, i] = qkv[b, t, h * hs + i]; k is found C channels further, v another C further.
    """
    B, T = qkv.shape[:2]
    return qkv.reshape(B, T, 3, NH, -1, copy=False).transpose(2, 0, 3, 1, 4)


def attention_forward(out, lse, qkv, NH):
    """Each position looks at itself and at those before it (Vaswani et al., 2017).

    This is the only layer in which information moves from one position to another. A position's
    query is compared with the keys of all positions that it may look at; the better a key matches,
    the more of that position's value goes into the result.

    qkv (B, T, 3C); out (B, n, C) and lse (B, n, NH) are those of the last n of the T positions. In
    training n is T. In generation n is the number of new tokens, usually 1, and T counts the
    tokens so far; row i of out and lse is then that of position t = T - n + i.

    Each head h computes, with its own hs channels of the query q[t], the key k[t2] and the value
    v[t2] (see split_qkv):

        preatt[t, t2] = q[t] . k[t2] / sqrt(hs)       for t2 <= t, otherwise -inf
        att[t, t2]    = exp(preatt[t, t2]) / sum over t2 of exp(preatt[t, t2])
        out[t]        = sum over t2 of att[t, t2] * v[t2]
        lse[t]        = log(sum over t2 of exp(preatt[t, t2]))        "log-sum-exp"

    A sum of hs terms of size 1 and random sign is about sqrt(hs) large. The division makes up for
    it, so that the softmax does not give nearly everything to one position. The same for all
    positions at once (.mT exchanges the last two axes):

        q, k, v = split_qkv(qkv, NH)
        preatt  = q @ k.mT / sqrt(hs), and -inf where t2 > t          (B, NH, T, T)
        att     = softmax(preatt)
        out     = att @ v                                             (B, NH, T, hs)

    The code computes this for a block of ATT_ROWS queries at a time. So a row of the softmax is
    complete in one block, and for a long text the memory that it takes grows with T, not with
    T * T. A block is compared with the keys up to its own end only, which saves nearly half of the
    work. What is kept is lse, one number for each query and head, the natural logarithm of the
    softmax's denominator: with it, backward computes att again (Dao et al., 2022; Dao, 2023).
    """
    q, k, v = split_qkv(qkv, NH)
    out = split_heads(out, NH)
    lse = lse.transpose(0, 2, 1)  # (B, NH, n)

    n, hs = out.shape[-2:]
    T = k.shape[-2]
    past = T - n  # positions before the first query
    q = q[:, :, past:] * hs**-0.5

    for start in range(0, n, ATT_ROWS):
        stop = min(start + ATT_ROWS, n)
        visible = past + stop  # the last query of the block sees this many keys

        rows = stop - start
        preatt = q[:, :, start:stop] @ k[:, :, :visible].mT  # (B, NH, rows, visible)
        preatt[..., past + start :] += HIDE_FUTURE[:rows, :rows]

        peak = preatt.max(axis=-1)  # subtracted, so that exp can't overflow
        preatt -= peak[..., np.newaxis]
        exp_att = np.exp(preatt, out=preatt)
        total = np.einsum("bhqk->bhq", exp_att)
        lse[:, :, start:stop] = np.log(total) + peak  # of the scores before peak was subtracted

        weighted_sum = exp_att @ v[:, :, :visible]  # (B, NH, rows, hs)
        np.divide(weighted_sum, total[..., np.newaxis], out=out[:, :, start:stop])


def attention_backward(dqkv, dout, out, lse, qkv, NH):
    """dqkv, qkv (B, T, 3C); dout, out (B, T, C); lse (B, T, NH). dqkv is overwritten.

    The forward pass, for each head and with scale = 1 / sqrt(hs), is

        preatt = q @ k.T * scale          (T, T)
        att    = softmax(preatt)          (T, T), each row by itself
        out    = att @ v                  (T, hs)

    Backward takes these lines from the last to the first. If z = x @ y, then dx = dz @ y.T and
    dy = x.T @ dz:

        datt    = dout @ v.T              (T, T)
        dv      = att.T @ dout            (T, hs)
        dpreatt = see below               (T, T)
        dq      = dpreatt @ k * scale     (T, hs)
        dk      = dpreatt.T @ q * scale   (T, hs)

    The softmax of one row: att[i] = exp(preatt[i]) / total, where total is the sum over all i. If
    preatt[j] grows by a small amount e, exp(preatt[j]) and total both grow by e * exp(preatt[j]),
    so

        att[j]            grows by   e * att[j] * (1 - att[j])
        att[i], i != j,   grows by   e * att[i] * (0 - att[j])

    Multiplied by datt[i] and summed over i, this is e * dpreatt[j]:

        dpreatt[j] = att[j] * (datt[j] - sum over i of att[i] * datt[i])

    With datt[i] = dout . v[i], the sum on the right becomes dout . (sum over i of att[i] * v[i]),
    which is dout . out: one number for each query, which is known before att and datt are. Where
    the key comes later than the query, att is 0, and so is dpreatt.

    For two scores 0 and log(3), att is 1/4 and 3/4. Then datt = (1, 0) gives the sum 1/4, and
    dpreatt = (1/4 * 3/4, 3/4 * -1/4) = (3/16, -3/16).

    The code goes by blocks of keys. That is possible although a row of the softmax, which is that
    of a query, seems to be needed whole: for its denominator, and for the sum of att * datt. Both
    are known in advance, one number for each query: lse, and dout . out. So each block of the
    (T, T) square can be computed without the others. If the square is cut by keys, dk and dv of a
    block are finished at once, and only dq is a running sum. If it were cut by queries, two would
    be running sums, dk and dv.

    Of the keys from t0 to t1, the queries before t0 see none, those from t0 to t1 see the keys up
    to themselves, and the later ones see all.
    """
    q, k, v = split_qkv(qkv, NH)
    dq, dk, dv = split_qkv(dqkv, NH)
    out = split_heads(out, NH)
    dout = split_heads(dout, NH)
    lse = lse.transpose(0, 2, 1)  # (B, NH, T)

    T, hs = q.shape[-2:]
    scale = hs**-0.5
    q = q * scale
    dout_dot_out = np.einsum("bhtc,bhtc->bht", dout, out)  # c is a channel of head h
    dq_sum = np.zeros_like(q)

    for t0 in range(0, T, ATT_ROWS):
        t1 = min(t0 + ATT_ROWS, T)

        rows = t1 - t0
        preatt = q[:, :, t0:] @ k[:, :, t0:t1].mT  # (B, NH, T - t0, rows)
        preatt[:, :, :rows] += HIDE_FUTURE[:rows, :rows]
        preatt -= lse[:, :, t0:, np.newaxis]
        att = np.exp(preatt, out=preatt)  # exp(preatt - lse) is att of the forward pass
        np.matmul(att.mT, dout[:, :, t0:], out=dv[:, :, t0:t1])

        datt = dout[:, :, t0:] @ v[:, :, t0:t1].mT  # of the same shape as att
        datt -= dout_dot_out[:, :, t0:, np.newaxis]
        dpreatt = np.multiply(att, datt, out=datt)
        np.matmul(dpreatt.mT, q[:, :, t0:], out=dk[:, :, t0:t1])  # q is scaled already
        dq_sum[:, :, t0:] += dpreatt @ k[:, :, t0:t1]

    np.multiply(dq_sum, scale, out=dq)


# See gelu_forward.
GELU_SCALE = math.sqrt(2 / math.pi)  # gives 0.5 * (1 + tanh(u)) the slope of Phi at x = 0
GELU_CUBE = 0.044715  # makes it close to Phi elsewhere; GPT-2 was trained with this constant


def gelu_forward(out, inp):
    """Keep large numbers and turn very negative ones into 0, smoothly. out, inp (B, T, 4C).

    GELU (Hendrycks & Gimpel, 2016) is x * Phi(x), where Phi(x) is the probability that a number of
    the standard normal distribution is below x. In place of Phi(x), GPT-2 has 0.5 * (1 + tanh(u)),
    which is close to it. For each number x by itself, with s = sqrt(2 / pi):

        u   = s * (x + 0.044715 * x^3)
        out = x * 0.5 * (1 + tanh(u))
            = x / (1 + exp(-2u))              since tanh(u) = (1 - exp(-2u)) / (1 + exp(-2u))

    The last line is computed, since exp takes half the time of tanh where there is no AVX-512. For
    x below -10, exp may overflow to infinity. Then out is 0, as it should be.
    """
    with np.errstate(over="ignore"):
        np.multiply(inp, inp, out=out)  # x^2
        out *= -2 * GELU_SCALE * GELU_CUBE
        out += -2 * GELU_SCALE
        out *= inp  # -2u
        np.exp(out, out=out)
        out += 1  # 1 + exp(-2u)
        np.divide(inp, out, out=out)


def gelu_backward(dinp, dout, inp):
    """dinp, dout, inp (B, T, 4C). dinp may be dout, which it then replaces.

    With u as in gelu_forward and sig = 1 / (1 + exp(-2u)), whose derivative with respect to x is
    sig * (1 - sig) * 2u':

        out  = x * sig
        u'   = s * (1 + 3 * 0.044715 * x^2)
        dinp = dout * (sig + x * sig * (1 - sig) * 2u')
             = dout * sig * (1 + (1 - sig) * x * 2u')
    """
    with np.errstate(over="ignore"):
        x_squared = inp * inp
        sig = x_squared * (-2 * GELU_SCALE * GELU_CUBE)
        sig += -2 * GELU_SCALE
        sig *= inp  # -2u
        np.exp(sig, out=sig)
        sig += 1
        np.divide(1, sig, out=sig)

        slope = x_squared  # in the same memory
        slope *= 2 * GELU_SCALE * 3 * GELU_CUBE
        slope += 2 * GELU_SCALE  # 2u'
        slope *= inp  # x * 2u'
        slope *= 1 - sig
        slope += 1  # 1 + (1 - sig) * x * 2u'

        slope *= sig
        np.multiply(dout, slope, out=dinp)


def residual_forward(out, inp1, inp2):
    """out = inp1 + inp2, all (B, T, C). Its backward needs no code: dinp1 = dinp2 = dout."""
    np.add(inp1, inp2, out=out)


def crossentropy_softmax_forward(losses, logits, targets):
    """The loss of each token: minus the logarithm of the probability of what came next, in nats.

    losses, targets (B, T); logits (B, T, V), overwritten by the probabilities

        probs  = exp(logits) / sum of exp(logits)
        losses = -log(probs[target]) = log(sum of exp(logits)) - logits[target]

    The largest logit is subtracted first, so that exp can't overflow. It cancels in both lines. The
    logarithm is the natural one, so the unit of the loss is the nat.
    """
    B, T = targets.shape
    b, t = np.ogrid[:B, :T]
    logits -= logits.max(axis=-1, keepdims=True)
    np.negative(logits[b, t, targets], out=losses)  # of each token, the entry of its target

    probs = np.exp(logits, out=logits)
    total = np.einsum("btv->bt", probs)
    losses += np.log(total)
    probs *= (1 / total)[..., np.newaxis]


def crossentropy_softmax_backward(probs, targets, dloss):
    """probs (B, T, V) from the forward pass, overwritten by dlogits; targets (B, T).

    dloss is one number: how much the loss of one token counts, 1 / (B*T) if the loss is the mean of
    one batch, and less if several batches make one step.

        loss = log(sum over i of exp(logits[i])) - logits[target]

    The derivative of the logarithm with respect to logits[i] is exp(logits[i]) / sum = probs[i], so

        dlogits[i] = (probs[i] - (1 if i is the target, else 0)) * dloss
    """
    B, T = targets.shape
    b, t = np.ogrid[:B, :T]
    dlogits = probs  # in the same memory
    dlogits[b, t, targets] -= 1
    dlogits *= dloss


# These functions are right for any B and T, also for a part of a batch. Behind the line, in the
# section on threads, each of them is wrapped once, by name: it is handed blocks that fit a core's
# cache, and the cores share the blocks. The function is the body of every block.

# --------------------------------------------------------------------------------------------------
# 3. The configuration


@dataclass(frozen=True)
class GPT2Config:
    """The shape of a model. The defaults are GPT-2 124M, the smallest that OpenAI released."""

    max_seq_len: int = 1024
    vocab_size: int = 50257
    num_layers: int = 12
    num_heads: int = 12
    channels: int = 768


# --------------------------------------------------------------------------------------------------
# 4. Memory: two tables and one blob
#
# All that a layer leaves for another layer, for the backward pass or for the next step lies in one
# array, the blob. So no layer's output is allocated while training goes on, and AdamW, the norm and
# checkpoints see all parameters as one vector. The blob begins as zeros. The operating system finds
# memory for a part of it when that is first written to, so parts to which nothing is ever written
# take none.
#
#     | params    | grads           | m         | v         | acts                              |
#     | wte..lnfb | wte | wpe..lnfb | wte..lnfb | wte..lnfb | encoded..losses | dresidual..dln1 |
#     |           |     | logits    |           |           |                 |                 |
#
#     | <---- flat: four rows of equal length ------------> | activations     | work space of   |
#     |                                                     |                 | backward        |
#
# Logits and gradients share memory in the first forward pass of a step, before backward has written
# any gradients: see room_for_logits.
#
# A table is a dict from names to shapes, and its order is the order in memory. Sizes, views,
# checkpoints and the coverage of the tests follow from the two tables param_shapes and act_shapes.


def count(shapes):
    """Number of elements of all tensors in a table."""
    return sum(math.prod(shape) for shape in shapes.values())


def places(shapes):
    """Where the tensors of a table lie in a flat array: {name: slice}."""
    slices = {}
    start = 0
    for name, shape in shapes.items():
        stop = start + math.prod(shape)
        slices[name] = slice(start, stop)
        start = stop
    return slices


def carve(flat, shapes):
    """Cut a flat array into named views, in the table's order: {"wte": (V, C) view, ...}."""
    return {name: flat[place].reshape(shapes[name]) for name, place in places(shapes).items()}


LOGITS_ROWS = 256  # the classifier takes this many tokens at a time, or more: see room_for_logits


class Model:
    """A GPT-2, and the memory of its parameters, gradients, moments and activations.

    config                        GPT2Config
    batch_size, sequence_length   B and T of its batches
    seed                          of fresh weights; None leaves them 0, for the caller to fill
    recompute                     0, 1 or 2: see shared_by_layers
    training                      False: a model that generates and validates, without gradients
    dtype                         float32; the tests also use float64

    params, grads, m, v, acts are dicts of named views of the array `blob`, which is drawn above.
    flat is its first part, four rows (with training=False one row, of parameters).

    One step is forward(), backward(), update(). Several micro-batches make one step if forward()
    and backward() are called for each of them before update(). `micro_batch` says how many of them
    the gradients hold: 0 after update(), one more after each backward(). Gradients are written only
    in backward() and, at the end of forward(), in the classifier.
    """

    CLASSIFIER = "wte"  # the classifier's matrix, which stands first among the parameters

    # The two tables. What stands in layer_params and layer_acts, every layer has.

    @staticmethod
    def layer_params(config):
        """The parameters of a layer, in llm.c's order. A matmul's weight has the shape (OC, C).

        The names that end in w are weights, those that end in b biases. ln1 and ln2 are the layer's
        two layernorms; attproj is the matmul after attention; fc and fcproj are those around GELU.
        """
        C = config.channels
        return {
            "ln1w": (C,),
            "ln1b": (C,),
            "qkvw": (3 * C, C),
            "qkvb": (3 * C,),
            "attprojw": (C, C),
            "attprojb": (C,),
            "ln2w": (C,),
            "ln2b": (C,),
            "fcw": (4 * C, C),
            "fcb": (4 * C,),
            "fcprojw": (C, 4 * C),
            "fcprojb": (C,),
        }

    @classmethod
    def param_shapes(cls, config):
        """The parameters of the whole model."""
        V, L, C = config.vocab_size, config.num_layers, config.channels
        one_layer = cls.layer_params(config)
        return {
            "wte": (V, C),  # token embeddings; the classifier uses the same matrix
            "wpe": (config.max_seq_len, C),  # position embeddings
            **{name: (L, *shape) for name, shape in one_layer.items()},
            "lnfw": (C,),  # the last layernorm
            "lnfb": (C,),
        }

    @staticmethod
    def layer_acts(config, B, T):
        """The activations of a layer, in the order in which they are computed."""
        C, NH = config.channels, config.num_heads
        return {
            "ln1": (B, T, C),
            "ln1_mean": (B, T),
            "ln1_rstd": (B, T),
            "qkv": (B, T, 3 * C),  # queries, keys, values
            "att_lse": (B, T, NH),  # what attention's backward needs to compute the softmax again
            "atty": (B, T, C),  # the output of attention
            "attproj": (B, T, C),
            "residual2": (B, T, C),
            "ln2": (B, T, C),
            "ln2_mean": (B, T),
            "ln2_rstd": (B, T),
            "fch": (B, T, 4 * C),  # the output of fc
            "fch_gelu": (B, T, 4 * C),
            "fcproj": (B, T, C),
            "residual3": (B, T, C),  # the output of the layer
        }

    @staticmethod
    def shared_by_layers(names, recompute, training):
        """Those of a layer's activations that are not kept: all layers have one memory for them.

        What backward needs can be kept, or computed again (Chen et al., 2016). recompute=0 keeps
        everything; use it to compare another implementation with this one. 1 computes layernorm and
        GELU again, which takes 1 to 2 % of a step; the outputs of attproj and fcproj are not needed
        again. 2 keeps a layer's output and computes the next layer again from it. Without a
        backward pass, only the keys and values of earlier tokens are needed again.
        """
        if not training:
            return [name for name in names if name != "qkv"]
        if recompute == 2:
            return [name for name in names if name != "residual3"]
        if recompute == 1:
            return ["ln1", "attproj", "ln2", "fch_gelu", "fcproj"]
        return []

    @staticmethod
    def work_shapes(config, B, T):
        """The backward pass's work space, which all layers share."""
        C = config.channels
        return {
            "dresidual": (B, T, C),  # the gradient of the residual stream, from the top down
            "dlnf": (B, T, C),  # written by the classifier
            "dfch": (B, T, 4 * C),  # first dfch_gelu, which gelu_backward turns into dfch in place
            "dln2": (B, T, C),
            "datty": (B, T, C),
            "dqkv": (B, T, 3 * C),
            "dln1": (B, T, C),
        }

    @classmethod
    def act_shapes(cls, config, B, T, recompute=1, training=True):
        """All activations, then the work space. What the layers share has the shape (1, ...)."""
        V, L, C = config.vocab_size, config.num_layers, config.channels
        one_layer = cls.layer_acts(config, B, T)
        shared = cls.shared_by_layers(list(one_layer), recompute, training)
        shapes = {
            "encoded": (B, T, C),
            **{name: (1 if name in shared else L, *one_layer[name]) for name in one_layer},
            "lnf": (B, T, C),  # the output of the last layernorm
            "lnf_mean": (B, T),
            "lnf_rstd": (B, T),
            "logits": (1, min(B * T, LOGITS_ROWS), V),  # of some tokens, or see room_for_logits
            "losses": (B, T),
        }
        if training:
            shapes |= cls.work_shapes(config, B, T)
        return shapes

    def __init__(self, config, batch_size=4, sequence_length=64, seed=1337, recompute=1,
                 training=True, dtype=np.float32):  # fmt: skip
        self.config = config
        self.batch_size = batch_size
        self.sequence_length = sequence_length
        self.recompute = recompute
        self.training = training

        self.micro_batch = 0  # how many of them the gradients hold
        self.updates = 0  # how many updates there have been
        self.inputs = None  # of the last training forward pass; encoder_backward needs them

        self.param_table = self.param_shapes(config)
        self.act_table = self.act_shapes(config, batch_size, sequence_length, recompute, training)
        self.rows = 4 if training else 1  # without training there are parameters only
        self.blob = np.zeros(self.rows * count(self.param_table) + count(self.act_table), dtype)
        self.cut_blob()
        if seed is not None:
            self.init_weights(seed)

    def cut_blob(self):
        """Make all views of the blob: first the rows of `flat`, then the activations."""
        end = self.rows * count(self.param_table)
        self.flat = self.blob[:end].reshape(self.rows, -1)
        self.params = carve(self.flat[0], self.param_table)
        self.grads = carve(self.flat[1], self.param_table) if self.training else {}
        self.m = carve(self.flat[2], self.param_table) if self.training else {}
        self.v = carve(self.flat[3], self.param_table) if self.training else {}
        self.acts = carve(self.blob[end:], self.act_table)

    def init_weights(self, seed):
        """Fill the parameters of a new model, as llm.c and Hugging Face do (Radford et al., 2019).

        Weights are normal with a standard deviation of 0.02. The two projections into the residual
        stream have 0.02 / sqrt(2L), because 2L such outputs are added up there. The weights of
        layernorm are 1. Biases are 0, as they are in a new blob. The random numbers come from
        NumPy's generator; llm.c and PyTorch draw others from the same seed.
        """
        rng = np.random.default_rng(seed)
        into_residual = 0.02 / math.sqrt(2 * self.config.num_layers)

        for name, view in self.params.items():
            is_bias = name.endswith("b")
            if name in ("ln1w", "ln2w", "lnfw"):
                view[...] = 1
            elif not is_bias:
                rng.standard_normal(out=view.reshape(-1), dtype=view.dtype)
                view *= into_residual if name in ("attprojw", "fcprojw") else 0.02

    def params_of(self, views, l):
        """Layer l's part of the parameters, or of their gradients, as attributes."""
        names = self.layer_params(self.config)
        return SimpleNamespace(**{name: views[name][l] for name in names})

    def acts_of(self, l, B, n, start=0):
        """Layer l's activations as attributes: those of B sequences and n tokens.

        The first token is at position `start`. Attention looks back, so qkv begins at position 0.
        """
        a = SimpleNamespace()
        for name in self.layer_acts(self.config, B, n):
            view = self.acts[name]  # (L, ...), or (1, ...) if the layers share it
            of_layer = view[l] if len(view) > 1 else view[0]
            stop = start + n if name == "qkv" else n
            setattr(a, name, of_layer[:B, :stop])
        return a

    # ----------------------------------------------------------------------------------------------
    # 5. The model forward: a line or two for each layer
    #
    # What the header calls x is not overwritten in place. So it has a name at each place: encoded
    # at first, residual2 after the first half of a layer, and residual3 after the second.

    def forward(self, inputs, targets, train=True, grad_scale=1.0):
        """The mean cross-entropy, in nats, of predicting targets from inputs: a float.

        inputs, targets (B, T) integers; targets[b, t] is what comes after inputs[b, t]

        train        False: for validation, without a backward pass
        grad_scale   the gradients will be those of loss * grad_scale. Pass 1/k if k
                     micro-batches make one step

        In training, it also takes the first steps back, from the losses to the output of the last
        layernorm, while the logits are at hand: see classifier. The logits of the batch are not
        kept; they are acts["lnf"] @ params["wte"].T, (B, T, V).
        """
        weight, dweight = self.params[self.CLASSIFIER], self.grads.get(self.CLASSIFIER)
        losses = self.acts["losses"]
        lnf = self.forward_tokens(inputs)
        if not train:
            self.classifier(losses, lnf, targets, weight)
        else:
            self.inputs = inputs
            self.classifier(losses, lnf, targets, weight, dweight, grad_scale / targets.size)
        return float(losses.mean())

    def forward_tokens(self, tokens, start=0):
        """All layers up to lnf for tokens (B, n) at the positions start to start + n.

        In training and validation the tokens are a whole batch, and start is 0. In generation B is
        1, and acts["qkv"] may hold the keys and values of the positions before start already, so
        that only the n new positions are computed. Returns lnf (B, n, C).
        """
        B, n = tokens.shape
        params, acts = self.params, self.acts

        residual = acts["encoded"][:B, :n]
        encoder_forward(residual, tokens, params["wte"], params["wpe"][start : start + n])

        for l in range(self.config.num_layers):
            p = self.params_of(params, l)
            a = self.acts_of(l, B, n, start)
            self.forward_layer(p, a, residual)
            residual = a.residual3  # with training=False, the same memory in every layer

        lnf = acts["lnf"][:B, :n]
        mean = acts["lnf_mean"][:B, :n]
        rstd = acts["lnf_rstd"][:B, :n]
        layernorm_forward(lnf, mean, rstd, residual, params["lnfw"], params["lnfb"])
        return lnf

    def forward_layer(self, p, a, residual, whole=True):
        """One layer, with parameters p and activations a, from its input, residual (B, n, C).

        whole   False: all that the layer's backward pass reads, which is all but the last lines
        """
        NH = self.config.num_heads
        n = residual.shape[1]
        new_qkv = a.qkv[:, -n:]  # all of it, except in generation

        # residual2 = residual + attproj(attention(qkv(layernorm(residual))))
        layernorm_forward(a.ln1, a.ln1_mean, a.ln1_rstd, residual, p.ln1w, p.ln1b)
        matmul_forward(new_qkv, a.ln1, p.qkvw, p.qkvb)
        attention_forward(a.atty, a.att_lse, a.qkv, NH)
        matmul_forward(a.attproj, a.atty, p.attprojw, p.attprojb)
        residual_forward(a.residual2, residual, a.attproj)

        # residual3 = residual2 + fcproj(gelu(fc(layernorm(residual2))))
        layernorm_forward(a.ln2, a.ln2_mean, a.ln2_rstd, a.residual2, p.ln2w, p.ln2b)
        matmul_forward(a.fch, a.ln2, p.fcw, p.fcb)
        gelu_forward(a.fch_gelu, a.fch)
        if whole:
            matmul_forward(a.fcproj, a.fch_gelu, p.fcprojw, p.fcprojb)
            residual_forward(a.residual3, a.residual2, a.fcproj)

    def classifier(self, losses, lnf, targets, weight, dweight=None, dloss=None):
        """Write losses (B, n), those of predicting targets (B, n) from lnf (B, n, C).

        weight (V, C) is the classifier's matrix. If dweight, its gradient, and dloss, the weight of
        one token's loss, are given, acts["dlnf"] and dweight are written, too.

        The logits (B, n, V) would be one of the largest arrays. Each token's logits only serve its
        own loss, so we take some tokens at a time, a piece, all the way: logits, probabilities,
        losses and gradients. This is why the classifier's backward pass runs here, and not in
        backward(): the logits of these tokens are gone when the next ones come. Of several pieces,
        the first one follows rule 3, and the others add to dweight.
        """
        lnf = rows_of(lnf)[np.newaxis]  # (1, B*n, C), so that a piece may be any run of tokens
        losses = rows_of(losses)[np.newaxis]
        targets = rows_of(targets)[np.newaxis]

        add = self.micro_batch > 0
        gradients_are_unused = dweight is not None and not add
        room = self.room_for_logits(weight) if gradients_are_unused else self.acts["logits"]
        tokens_per_piece = room.shape[1]

        for start in range(0, targets.size, tokens_per_piece):
            stop = min(start + tokens_per_piece, targets.size)
            piece = np.s_[:, start:stop]

            logits = room[:, : stop - start]
            matmul_forward(logits, lnf[piece], weight)
            crossentropy_softmax_forward(losses[piece], logits, targets[piece])

            if dweight is not None:
                dlnf = rows_of(self.acts["dlnf"])[np.newaxis]
                dlogits = logits  # in the same memory, which holds the probabilities now
                crossentropy_softmax_backward(dlogits, targets[piece], dloss)
                add_piece = add or start > 0
                matmul_backward(dlnf[piece], dweight, None, dlogits, lnf[piece], weight, add_piece)

    def room_for_logits(self, weight):
        """Memory (1, tokens, V) for logits while the gradients hold nothing of use.

        In the forward pass of the first micro-batch, backward will overwrite all gradients but that
        of the classifier's matrix, weight (V, C). For 124M there is room for 1708 tokens, where
        acts["logits"] has 256, and larger pieces make the products faster, by 4 % of a step at
        B*T = 1024. Later micro-batches and validation must leave the gradients alone.
        """
        V = len(weight)
        free = self.flat[1, weight.size :]  # the classifier's matrix stands first
        tokens = min(self.acts["losses"].size, len(free) // V)
        if tokens < self.acts["logits"].shape[1]:  # a small model with a large vocabulary
            return self.acts["logits"]
        return free[: tokens * V].reshape(1, tokens, V)

    def next_logits(self, tokens):
        """The logits (V,) of what comes after a list of at most T tokens: see generate."""
        logits = self.acts["logits"][:, :1]
        lnf = self.forward_tokens(np.array([tokens]))
        matmul_forward(logits, lnf[:, -1:], self.params[self.CLASSIFIER])
        return logits[0, 0]

    # ----------------------------------------------------------------------------------------------
    # 6. The model backward: section 5 in reverse order

    def backward(self):
        """Fill grads with the gradients of the last training forward pass.

        The first micro-batch of a step overwrites them, later ones add. The classifier has left
        dlnf and its part of dwte.
        """
        params, grads, acts = self.params, self.grads, self.acts
        B, T = self.inputs.shape
        add = self.micro_batch > 0
        w = SimpleNamespace(**{name: acts[name] for name in self.work_shapes(self.config, B, T)})

        w.dresidual[...] = 0
        layernorm_backward(
            w.dresidual, grads["lnfw"], grads["lnfb"],
            w.dlnf, acts["residual3"][-1], acts["lnf_mean"], acts["lnf_rstd"], params["lnfw"], add,
        )  # fmt: skip

        for l in reversed(range(self.config.num_layers)):
            p = self.params_of(params, l)
            g = self.params_of(grads, l)
            a = self.acts_of(l, B, T)
            residual = acts["residual3"][l - 1] if l > 0 else acts["encoded"]
            if l < self.config.num_layers - 1:  # else, the shared memory still holds this layer's
                self.compute_again(p, a, residual)
            self.backward_layer(p, g, a, w, residual, add)

        encoder_backward(grads["wte"], grads["wpe"], w.dresidual, self.inputs, add)
        self.micro_batch += 1

    def backward_layer(self, p, g, a, w, residual, add):
        """One layer: write its gradients g, and take w.dresidual from its output to its input.

        p, g, a    the layer's parameters, their gradients, and its activations
        w          the work space: see work_shapes
        residual   (B, T, C), the layer's input
        """
        # residual3 = residual2 + fcproj. dresidual is the gradient of fcproj, and one part of that
        # of residual2. layernorm_backward adds the other part.
        matmul_backward(w.dfch, g.fcprojw, g.fcprojb, w.dresidual, a.fch_gelu, p.fcprojw, add)
        gelu_backward(w.dfch, w.dfch, a.fch)  # from dfch_gelu to dfch, in place
        matmul_backward(w.dln2, g.fcw, g.fcb, w.dfch, a.ln2, p.fcw, add)
        layernorm_backward(
            w.dresidual, g.ln2w, g.ln2b, w.dln2, a.residual2, a.ln2_mean, a.ln2_rstd, p.ln2w, add
        )

        # residual2 = residual + attproj, likewise.
        NH = self.config.num_heads
        matmul_backward(w.datty, g.attprojw, g.attprojb, w.dresidual, a.atty, p.attprojw, add)
        attention_backward(w.dqkv, w.datty, a.atty, a.att_lse, a.qkv, NH)
        matmul_backward(w.dln1, g.qkvw, g.qkvb, w.dqkv, a.ln1, p.qkvw, add)
        layernorm_backward(
            w.dresidual, g.ln1w, g.ln1b, w.dln1, residual, a.ln1_mean, a.ln1_rstd, p.ln1w, add
        )

    def compute_again(self, p, a, residual):
        """Compute what forward did not keep of a layer, from its input: see shared_by_layers."""
        if self.recompute == 1:
            layernorm_forward(a.ln1, a.ln1_mean, a.ln1_rstd, residual, p.ln1w, p.ln1b)
            layernorm_forward(a.ln2, a.ln2_mean, a.ln2_rstd, a.residual2, p.ln2w, p.ln2b)
            gelu_forward(a.fch_gelu, a.fch)

        if self.recompute == 2:
            self.forward_layer(p, a, residual, whole=False)

    # ----------------------------------------------------------------------------------------------
    # 7. AdamW

    def grad_norm(self):
        """The Euclidean norm of all gradients as one vector: a float."""
        return math.sqrt(sum_of_squares(self.flat[1]))

    def update(self, learning_rate, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, step=None,
               grad_scale=1.0):  # fmt: skip
        """One step of AdamW on all parameters.

        weight_decay   applies to matrices and embeddings: see is_decayed
        step           the number of this update, from 1; the model counts by itself if it is None
        grad_scale     what the gradients are multiplied by first, less than 1 if they are clipped
        """
        step = self.updates + 1 if step is None else step
        p, g, m, v = self.flat

        for name, place in places(self.param_table).items():
            decay = learning_rate * weight_decay if self.is_decayed(name) else 0.0
            adamw(
                p[place], g[place], m[place], v[place],
                decay, learning_rate, beta1, beta2, eps, step, grad_scale,
            )  # fmt: skip

        self.updates = step
        self.micro_batch = 0  # the next one overwrites the gradients, so nothing is cleared

    @staticmethod
    def is_decayed(name):
        """Whether weight decay applies to a parameter: to matrices and embeddings, as is usual.

        A layernorm's scale has its best value near 1, not near 0, and biases are few and small.
        """
        return not name.startswith("ln") and not name.endswith("b")


def sum_of_squares(x):
    """The sum of the squares of an array's numbers: a float."""
    return float(np.vdot(x, x))


def adamw(p, g, m, v, decay, learning_rate, beta1, beta2, eps, step, grad_scale):
    """AdamW (Loshchilov & Hutter, 2017) on parameters p, gradients g and moments m, v: flat arrays.

    p, m and v are updated in place; what is called g below is g * grad_scale.

        m = beta1 * m + (1 - beta1) * g              the running mean of the gradient
        v = beta2 * v + (1 - beta2) * g^2            the running mean of its square
        p = p - decay * p - learning_rate * (m / c1) / (sqrt(v / c2) + eps)

    The quotient says how well the recent gradients agree: it is 1 or -1 if they are all alike, and
    near 0 where their signs vary. So a parameter usually moves by no more than learning_rate,
    however large its gradients are. eps keeps the quotient finite where v is 0.

    m is a weighted sum of all gradients so far. Since it starts at 0, its weights do not add up to
    1 but to c1 = 1 - beta1^step, so it is divided by c1; likewise v by c2 = 1 - beta2^step.

    decay is learning_rate * weight_decay. The term weight_decay * p is not added to g, as it is in
    Adam with an L2 penalty, and so is not divided by sqrt(v). This is the W, for weight decay.

    c1 and c2 are numbers, while m and v are arrays. We multiply numerator and denominator by
    sqrt(c2), and get a formula with two fewer passes over memory:

        p = p - decay * p - (learning_rate * sqrt(c2) / c1) * m / (sqrt(v) + eps * sqrt(c2))
    """
    c1 = 1 - beta1**step
    c2 = 1 - beta2**step

    m *= beta1
    change = (1 - beta1) * grad_scale * g
    m += change

    v *= beta2
    np.square(g, out=change)
    change *= (1 - beta2) * grad_scale**2
    v += change

    np.sqrt(v, out=change)
    change += eps * math.sqrt(c2)
    np.divide(m, change, out=change)
    change *= learning_rate * math.sqrt(c2) / c1
    if decay:
        p *= 1 - decay
    p -= change


# --------------------------------------------------------------------------------------------------
# 8. Data, one training step, and sampling


class DataLoader:
    """Batches of consecutive tokens, shard after shard, over and over.

    shards        a list of arrays of token ids, or of whatever has a length and gives slices. Each
                  has at least B*T + 1 tokens
    shuffle_seed  None: the windows of a shard in the order of the text. A number: in an order that
                  is drawn anew for each epoch

    A shard is cut into windows of T tokens, and a batch is B windows. position is what the next
    batch depends on: [shard, offset, epoch], where offset counts the tokens seen of this shard.
    The last windows in this order are left out if they do not fill a batch.
    """

    def __init__(self, shards, B, T, shuffle_seed=None):
        self.B, self.T = B, T
        self.shuffle_seed = shuffle_seed
        self.shards = shards
        self.seek([0, 0, 0])

    def seek(self, position):
        """Go to a position, for instance to that of a checkpoint."""
        self.position = list(position)
        shard, _, epoch = position
        num_tokens, B, T = len(self.shards[shard]), self.B, self.T
        if self.shuffle_seed is None:
            self.first = 0  # where the first window of the shard begins
            self.order = np.arange((num_tokens - 1) // T)  # the windows, in the order of their use
            return

        # Each epoch cuts the shard at other places: the first window begins at one of its first T
        # tokens, but not so late that less than a batch is left. The order depends on the seed, the
        # shard and its length, epoch, B and T alone, so a run that is resumed at a position finds
        # the same windows.
        rng = np.random.default_rng([self.shuffle_seed, shard, epoch])
        self.first = int(rng.integers(min(T, num_tokens - B * T)))
        self.order = rng.permutation((num_tokens - 1 - self.first) // T)

    def next_batch(self):
        """inputs, targets (B, T), int64. The targets are the inputs, one token further."""
        shard, offset, _ = self.position
        tokens = self.shards[shard]
        next_window = offset // self.T

        inputs = np.empty((self.B, self.T), np.int64)
        targets = np.empty((self.B, self.T), np.int64)
        for b in range(self.B):
            start = self.first + self.order[next_window + b] * self.T
            window = tokens[start : start + self.T + 1]
            inputs[b] = window[:-1]
            targets[b] = window[1:]

        self.advance()
        return inputs, targets

    def advance(self):
        """Go to the next batch: in this shard, in the next one, or in the first of a new epoch."""
        shard, offset, epoch = self.position
        offset += self.B * self.T
        if offset // self.T + self.B <= len(self.order):
            self.position = [shard, offset, epoch]
        elif shard + 1 < len(self.shards):
            self.seek([shard + 1, 0, epoch])
        else:
            self.seek([0, 0, epoch + 1])


def learning_rate_at(step, num_iterations, peak, warmup_iters=0, final_frac=1.0):
    """The learning rate of the next update, when `step` of num_iterations updates are done.

    It rises to its peak in a straight line over warmup_iters updates. From there, half a period of
    a cosine takes it down towards final_frac * peak (Loshchilov & Hutter, 2016).
    """
    if step < warmup_iters:
        return peak * (step + 1) / warmup_iters

    low = peak * final_frac
    done = (step - warmup_iters) / (num_iterations - warmup_iters)
    return low + (peak - low) * 0.5 * (1 + math.cos(math.pi * done))


def train_step(model, loader, micro_batches, learning_rate, weight_decay=0.0, grad_clip=0.0):
    """One update from the next micro_batches batches of the loader: returns (loss, norm).

    grad_clip   a gradient whose norm is larger is scaled down to this norm; 0 never scales

    FloatingPointError if the loss or the norm is not finite. Then no parameter has changed; call
    zero_grad() before going on.
    """
    loss = 0.0
    for _ in range(micro_batches):
        inputs, targets = loader.next_batch()
        loss += model.forward(inputs, targets, grad_scale=1 / micro_batches) / micro_batches
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss}")
        model.backward()

    norm = model.grad_norm()
    if not math.isfinite(norm):
        raise FloatingPointError(f"the gradient norm is {norm}")
    clip = grad_clip / norm if 0 < grad_clip < norm else 1.0
    model.update(learning_rate, weight_decay=weight_decay, grad_scale=clip)
    return loss, norm


def generate(model, tokens, max_new_tokens, temperature, top_k, rng):
    """Continue a list of token ids: an iterator over new ids, each as soon as it is known.

    The model sees a window of at most T tokens. When there are more, the newer half of them becomes
    the new window. temperature, top_k and rng, a NumPy Generator: see sample.
    """
    T = model.sequence_length
    window = list(tokens[-T:])
    for _ in range(max_new_tokens):
        if len(window) > T:
            window = window[-max(1, T // 2) :]
        token = sample(model.next_logits(window), temperature, top_k, rng)
        window.append(token)
        yield token


def sample(logits, temperature, top_k, rng):
    """One token id drawn from softmax(logits / temperature), logits (V,).

    Lay the tokens side by side on a line, each as long as it is likely, and drop a pin on the line.
    """
    if temperature < 1e-30:  # as good as 0, and float32 could not divide by much less
        return int(logits.argmax())

    logits = (logits - logits.max()) / temperature
    if 0 < top_k < len(logits):
        kth_largest = np.partition(logits, -top_k)[-top_k]
        logits[logits < kth_largest] = -np.inf

    ends = np.exp(logits).cumsum()  # where each token ends on the line
    pin = rng.random(dtype=np.float32) * ends[-1]
    token = np.searchsorted(ends, pin, "right")  # the first token that ends behind the pin
    return int(min(token, len(logits) - 1))  # if a logit is NaN, no token ends behind the pin


def demo(path=__file__, steps=1000):
    """All of it together: train a small GPT on the bytes of a file, this one, and let it write."""
    config = GPT2Config(max_seq_len=64, vocab_size=256, num_layers=2, num_heads=4, channels=128)
    model = Model(config, batch_size=16, sequence_length=64)
    loader = DataLoader([np.fromfile(path, np.uint8)], 16, 64, shuffle_seed=1337)
    for step in range(steps):
        rate = learning_rate_at(step, steps, 4e-3, warmup_iters=100, final_frac=0.05)
        loss, norm = train_step(model, loader, 1, rate, weight_decay=0.1, grad_clip=1.0)
        print(f"step {step + 1}/{steps}: train loss {loss:.4f} (norm {norm:.4f})")
    written = generate(model, list(b"def "), 300, 0.6, 0, np.random.default_rng(1337))
    print("def " + bytes(written).decode(errors="replace"))


# --------------------------------------------------------------------------------------------------
# Here the algorithm ends, and you may stop reading. What follows makes a tool of it.
# --------------------------------------------------------------------------------------------------
# 9. A model for the hand: the same calls, checked, and what one does besides training
#
# From here on the file deals with its caller, with files, processes and command lines, and imports
# what they need.

import argparse
import codecs
import collections
import contextlib
import ctypes
import difflib
import functools
import glob
import inspect
import itertools
import json
import os
import queue
import re
import shlex
import shutil
import signal
import stat
import statistics
import sys
import threading
import time
import traceback
import warnings
import zlib
from dataclasses import asdict
from typing import NamedTuple


class InputError(ValueError):
    """Input that can't be used. The message is one line: what was found, and what to do."""


def require(condition, message):
    """Raise InputError(message) unless the condition holds."""
    if not condition:
        raise InputError(message)


class Views(dict):
    """Named views of a flat array. Their numbers may be changed, the views themselves may not."""

    def __setitem__(self, name, value):
        same = value is self.get(name)  # as in views[name] *= 2, which ends with this assignment
        require(name in self, f"{name!r} is none of {', '.join(self)}")
        require(same, f"[{name!r}] is a part of the blob: write [{name!r}][...] = value")

    def update(self, values):  # that of dict does not go through __setitem__
        for name, value in values.items():
            self[name] = value

    def __repr__(self):
        return "\n".join(f"{name:10} {view.shape}" for name, view in self.items())


# The stages in which a pass through the layers is allowed.
FREE = ("no gradients", "first forward", "gradients")


class GPT2(Model):
    """A GPT-2 that checks what it is given, and in which order it is called.

    The arguments are those of Model. So are forward, backward, grad_norm and update; a call that
    can't be made now is an InputError and changes nothing. `stage` says how far a step is:

        "no gradients"    forward() is next
        "first forward"   that of the first micro-batch is done, backward() is next
        "gradients"       grads hold those of all micro-batches so far. update() is next, or
                          forward() of another micro-batch
        "later forward"   that of a later micro-batch is done, backward() is next

    `interrupted` names a call that was left with its work half done, otherwise it is None. If it is
    set, zero_grad() makes it possible to go on. If it is update(), some parameters have taken the
    step and others have not, and only a checkpoint has them as they were.

    Several threads may use one model: one passes through the layers at a time, the others wait.
    """

    def __init__(self, config, batch_size=4, sequence_length=64, seed=1337, recompute=1,
                 training=True, dtype=np.float32):  # fmt: skip
        self.check_config(config)
        T = sequence_length
        require(batch_size > 0, f"batch size {batch_size}: expected at least 1")
        require(
            0 < T <= config.max_seq_len,
            f"sequence length {T}: expected 1 to {config.max_seq_len}, the model's context",
        )
        require(recompute in (0, 1, 2), f"recompute is {recompute!r}, expected 0, 1 or 2")
        single_or_double = np.dtype(dtype) in (np.float32, np.float64)
        require(single_or_double, f"dtype is {np.dtype(dtype)}, expected float32 or float64")

        self.waiting = False  # whether a forward pass waits for its backward()
        self.interrupted = None
        super().__init__(config, batch_size, T, seed, recompute, training, dtype)

    @staticmethod
    def check_config(config):
        """InputError unless there can be a model of this shape."""
        for name, value in asdict(config).items():
            whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
            require(whole and value > 0, f"{name} is {value!r}, expected a positive integer")
        C, NH = config.channels, config.num_heads
        require(C % NH == 0, f"{C} channels can't be shared by {NH} heads")

    def cut_blob(self):
        super().cut_blob()
        for name in ("params", "grads", "m", "v", "acts"):
            setattr(self, name, Views(getattr(self, name)))
        self.keys = []  # the tokens whose keys and values are in acts["qkv"]
        self.reader = None  # a second model with the same params: see token_losses
        self.lock = threading.RLock()

    def __getstate__(self):
        """For copy and pickle: all but what cut_blob makes. Copied views would not be parts of the
        copied blob.
        """
        made = {"flat", "params", "grads", "m", "v", "acts", "keys", "reader", "lock"}
        return {name: value for name, value in vars(self).items() if name not in made}

    def __setstate__(self, state):
        vars(self).update(state)
        self.cut_blob()

    def __repr__(self):
        sizes = ", ".join(f"{name}={value}" for name, value in asdict(self.config).items())
        return f"{type(self).__name__} of {count(self.param_table):,} parameters: {sizes}"

    @classmethod
    def from_pretrained(cls, source, batch_size=4, sequence_length=64, recompute=1, training=True):
        """A model with weights from outside.

        source: "gpt2", "gpt2-medium", "gpt2-large" or "gpt2-xl"; a Hugging Face folder; or a
        .safetensors file. Errors: InputError, OSError.
        """
        return load_pretrained(cls, source, batch_size, sequence_length, recompute, training)

    def save_pretrained(self, folder):
        """Write config.json and model.safetensors, which Hugging Face's GPT2LMHeadModel reads."""
        save_huggingface(folder, self.config, self.params)

    # One training step

    @property
    def stage(self):
        """How far the step is: see above."""
        if self.waiting:
            return "later forward" if self.micro_batch else "first forward"
        return "gradients" if self.micro_batch else "no gradients"

    @contextlib.contextmanager
    def whole(self, call, *stages, spoils=True):
        """What stands in this block is done by one thread at a time, in one of these stages only.

        If it spoils something when it is left half done, `interrupted` will name the call.
        """
        with self.lock:
            require(
                self.interrupted is None,
                f"{self.interrupted} was interrupted: call zero_grad(), then forward()",
            )
            require(
                self.stage in stages,
                f"{call} can't follow here: the stage is {self.stage!r}, expected "
                f"{' or '.join(map(repr, stages))}: a step is forward(), backward(), update(), and "
                "zero_grad() begins it anew",
            )
            self.interrupted = call if spoils else None
            yield
            self.interrupted = None

    def forward(self, inputs, targets, train=True, grad_scale=1.0):
        """Model.forward. inputs and targets may be anything that makes (B, T) integers."""
        inputs = self.check_tokens(inputs, "inputs")
        targets = self.check_tokens(targets, "targets")
        expected = self.acts["losses"].shape  # B and T, which __init__ has fixed
        require(
            inputs.shape == targets.shape == expected,
            f"inputs {inputs.shape}, targets {targets.shape}: expected {expected}",
        )
        require(
            self.training or not train,
            "a model made with training=False has no gradients: use forward(..., train=False)",
        )
        with self.whole("forward()", *FREE, spoils=train):
            loss = super().forward(inputs.copy(), targets, train, grad_scale)
            self.waiting = train
        return loss

    def forward_tokens(self, tokens, start=0):
        # A pass overwrites the activations that a waiting backward() needs. If that is of the first
        # micro-batch, it is dropped: the next forward() will overwrite its part of dwte. That of a
        # later one has been added to a sum already, which is why FREE does not have its stage.
        self.waiting = False
        self.keys = []
        return super().forward_tokens(tokens, start)

    def backward(self):
        """Model.backward."""
        with self.whole("backward()", "first forward", "later forward"):
            super().backward()
            self.waiting = False

    def grad_norm(self):
        """Model.grad_norm. It may be called between backward() and update()."""
        with self.whole("grad_norm()", "gradients", spoils=False):
            return super().grad_norm()

    def update(self, learning_rate, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, step=None,
               grad_scale=1.0):  # fmt: skip
        """Model.update."""
        require(step is None or step >= 1, f"update(step={step}): steps are counted from 1")
        with self.whole("update()", "gradients"):
            self.keys = []  # they are those of the old parameters
            super().update(learning_rate, beta1, beta2, eps, weight_decay, step, grad_scale)

    def zero_grad(self):
        """Forget the gradients. Nothing is cleared: the next micro-batch overwrites them."""
        self.micro_batch = 0
        self.waiting = False
        self.interrupted = None

    # Reading and writing

    def generate(self, tokens, max_new_tokens, temperature=1.0, top_k=0, rng=None):
        """Continue a list of token ids: an iterator over new ids, each as soon as it is known.

        The model looks back over at most sequence_length tokens; of a longer prompt it reads the
        last ones.

        temperature   0 always takes the likeliest token
        top_k         above 0, choose among the k likeliest
        rng           a NumPy Generator, or a seed; None gives a different text each time
        """
        tokens = self.check_tokens(tokens, "prompt", ndim=1)
        require(temperature >= 0, f"temperature is {temperature}, expected at least 0")
        rng = np.random.default_rng(rng)
        self.keys = []  # the parameters may have been changed in place
        return generate(self, tokens.tolist(), max_new_tokens, temperature, top_k, rng)

    def next_logits(self, tokens):
        """Model.next_logits."""
        with self.whole("generate()", *FREE, spoils=False):
            logits = self.acts["logits"][:, :1]
            matmul_forward(logits, self.read(tokens), self.params[self.CLASSIFIER])
            return logits[0, 0].copy()  # another thread may be next

    def read(self, tokens, wanted=1):
        """lnf (1, wanted, C) of the last tokens of a list.

        The keys and values of the tokens before them are kept in acts["qkv"], and `keys` are these
        tokens. So where a list begins like the one before it, that part is not computed again, and
        a new token takes the computation of one position. (With recompute=2, all layers of a model
        for training share one qkv, and the whole list is computed each time.)
        """
        start = 0
        if len(self.acts["qkv"]) == self.config.num_layers:
            same = len(os.path.commonprefix([self.keys, tokens]))
            start = min(same, len(tokens) - wanted)
        lnf = self.forward_tokens(np.array([tokens[start:]]), start)
        self.keys = list(tokens)
        return lnf[:, -wanted:]

    def token_losses(self, context, continuations):
        """How unlikely each token of some continuations is: a list of arrays (n,), in nats.

        context         a list of at least one token id
        continuations   lists of token ids; each one by itself follows the context

        Context and continuation may have max_seq_len + 1 tokens together. Any model can do this,
        at any stage of a step, whatever its batch size and sequence length: a second model, the
        reader, has the same parameters, no gradients, and room for one sequence of max_seq_len
        tokens. The context is computed once, since all continuations begin like the first.
        """
        context = self.check_tokens(context, "context", ndim=1).tolist()
        texts = [self.check_tokens(c, "continuation", ndim=1).tolist() for c in continuations]
        longest = len(context) + max(map(len, texts), default=0)
        most = self.config.max_seq_len + 1  # nothing is predicted from the last token
        require(longest <= most, f"context and continuation have {longest} tokens, at most {most}")
        if not texts:
            return []

        with self.lock:
            if self.reader is None:
                T, dtype = self.config.max_seq_len, self.blob.dtype
                self.reader = type(self)(self.config, 1, T, None, training=False, dtype=dtype)
                self.reader.params = self.params  # its own were never written: they take no memory
            reader = self.reader
            reader.keys = []
            lnfs = [reader.read((context + text)[:-1], len(text)).copy() for text in texts]

            # The classifier reads its matrix once for up to 256 tokens, whichever text has them.
            targets = np.concatenate(texts)[np.newaxis]
            losses = np.empty(targets.shape, self.blob.dtype)
            lnf = np.concatenate(lnfs, axis=1)
            reader.classifier(losses, lnf, targets, self.params[self.CLASSIFIER])
        ends = np.cumsum([len(text) for text in texts])
        return np.split(losses[0], ends[:-1])

    def check_tokens(self, tokens, what, ndim=2):
        """tokens as an int64 array, or InputError if one of them is not in the vocabulary."""
        require(not isinstance(tokens, str), f"{what}: found a text, expected ids: encode it first")
        tokens = np.asarray(list(tokens) if isinstance(tokens, bytes) else tokens)
        V = self.config.vocab_size
        require(
            tokens.size > 0 and tokens.dtype.kind in "iu" and tokens.ndim == ndim,
            f"{what}: expected integers in {ndim} dimensions, found {tokens.shape} of "
            f"{tokens.dtype}",
        )
        lowest, highest = tokens.min(), tokens.max()
        require(
            0 <= lowest and highest < V,
            f"{what}: ids {lowest} to {highest}, expected 0 to {V - 1}",
        )
        return tokens.astype(np.int64, "C", copy=False)


# --------------------------------------------------------------------------------------------------
# 9. Threads, and the limits of the machine
#
# NumPy lets go of the interpreter lock while it computes. So the threads of `parallel` run side by
# side, each on its own block of rows or of a matrix product. BLAS is held to one thread meanwhile:
# its own threads would compete with ours for the cores.


def text_of(*path):
    """A text file that the system has made; "" if it is not there."""
    with contextlib.suppress(OSError), open(os.path.join(*path)) as file:
        return file.read()
    return ""


def control_groups(root="/"):
    """The folders of this process's control groups and of those around them. All limits hold.

    /proc/self/cgroup has a line "0::PATH" (version 2), or lines such as "4:cpu,cpuacct:PATH"
    (version 1). In a container the path may be that of the host; then only the outermost is there.
    """
    folders = []
    for line in text_of(root, "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        top = os.path.join(root, "sys/fs/cgroup", controllers)
        while path.strip("/"):
            folders.append(top + path)
            path = os.path.dirname(path)
        folders.append(top)
    return folders


def cores_allowed(root="/"):
    """How many cores this process should use, within its affinity and the quotas of its groups.

    Physical ones, as two threads on one core only share its multipliers. All get equal blocks and
    wait for the slowest. So where cores differ, it is as many of the fastest as do most at the pace
    of the last of them; on macOS, the fast ones. A quota is used up in a part of each period, and
    for the rest all threads are stopped: with one core, two of them take six times as long as one.
    """
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):  # Linux
        paces = {}
        for cpu in os.sched_getaffinity(0):
            folder = os.path.join(root, f"sys/devices/system/cpu/cpu{cpu}")
            core = text_of(folder, "topology/thread_siblings_list") or cpu
            paces[core] = int(text_of(folder, "cpu_capacity") or 1024)
        paces = sorted(paces.values(), reverse=True)
        cores = max(range(1, len(paces) + 1), key=lambda number: number * paces[number - 1])
    elif sys.platform == "darwin":  # the first of these two that there is
        found = os.popen("sysctl -in hw.perflevel0.physicalcpu hw.physicalcpu").read().split()
        cores = int(found[0]) if found else cores

    for folder in control_groups(root):
        quota = text_of(folder, "cpu.max") or text_of(folder, "cpu.cfs_quota_us")
        numbers = [*quota.split(), *text_of(folder, "cpu.cfs_period_us").split()]
        if numbers and numbers[0].isdecimal():  # "50000 100000" is half a core; "max", "-1": none
            cores = min(cores, math.ceil(int(numbers[0]) / int(numbers[1])))
    return max(1, cores)


def available_memory(root="/"):
    """Bytes that are free for this process: in the machine, and below the limits of its groups.

    Copies of files count as free, since they give way; after a download they are most of what is
    used. On macOS it is all memory that the machine has; on Windows it is not known, and infinite.
    """
    free = [math.inf]
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", ()):
        free.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    words = text_of(root, "proc/meminfo").split()  # ..., "MemAvailable:", "4096", "kB", ...
    if "MemAvailable:" in words:
        free.append(1024 * int(words[words.index("MemAvailable:") + 1]))

    for folder in control_groups(root):
        limit = text_of(folder, "memory.max") or text_of(folder, "memory.limit_in_bytes")
        usage = text_of(folder, "memory.current") or text_of(folder, "memory.usage_in_bytes")
        if usage and limit.strip().isdecimal():  # it may be "max"
            words = text_of(folder, "memory.stat").split()  # "anon", "4096", "active_file", ...
            values = dict(zip(words[::2], words[1::2], strict=True))
            # In version 1, total_... includes the groups inside, as the usage does.
            names = ("inactive_file", "active_file")
            files = [values.get(f"total_{name}", values.get(name, 0)) for name in names]
            free.append(int(limit) - int(usage) + sum(map(int, files)))
    return max(0, min(free))


BLAS_THREADS = (  # what sets a BLAS's number of threads, and what tells it
    ("scipy_openblas_set_num_threads64_", "scipy_openblas_get_num_threads64_"),  # NumPy's wheels
    ("openblas_set_num_threads", "openblas_get_num_threads"),  # Debian, conda-forge, Homebrew
    ("openblas_set_num_threads64_", "openblas_get_num_threads64_"),
    ("MKL_Set_Num_Threads", "MKL_Get_Max_Threads"),  # Anaconda
    ("flexiblas_set_num_threads", "flexiblas_get_num_threads"),  # Fedora
    ("bli_thread_set_num_threads", "bli_thread_get_num_threads"),  # BLIS
    ("BLASSetThreading", "BLASGetThreading"),  # macOS: 1 is one thread, 0 is all
)


def find_blas():
    """The two functions of BLAS_THREADS for the BLAS that NumPy uses; None if it is another one."""
    folder = glob.escape(os.path.dirname(np.__file__))
    windows = glob.glob(folder + "/../numpy.libs/*openblas*.dll")
    with contextlib.suppress(OSError):
        # Elsewhere a name that is looked up in NumPy's library is looked up in its BLAS, too.
        blas = ctypes.CDLL(windows[0] if windows else np._core._multiarray_umath.__file__)
        for names in BLAS_THREADS:
            if all(hasattr(blas, name) for name in names):
                return [getattr(blas, name) for name in names]


@contextlib.contextmanager
def blas_held_to(n):
    """BLAS has one thread in this block if n is 1, at most n otherwise; then as many as before.

    The number is that of the whole process, so one thread enters such a block at a time.
    """
    set_threads, threads = BLAS or (lambda n: None, lambda: n)
    lock, _, _ = helpers_of(os.getpid())
    with lock:
        before = threads()
        set_threads(1 if n == 1 else min(n, before))
        try:
            yield
        finally:
            set_threads(before)


def threads_wanted(local_size=1):
    """The number of threads that the user named, else a share of the cores, as in share_cores.

    It is 1 if BLAS has threads of its own that we can't hold back.
    """
    if BLAS is None:
        return 1
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
        first = os.environ.get(name, "").split(",")[0]  # "4,2" would be nested threads
        if first.isdecimal() and int(first) > 0:
            return int(first)
    return max(1, cores_allowed() // local_size)


BLAS = find_blas()
THREADS = threads_wanted()


def share_cores(local_size):
    """Use one of local_size equal shares of the cores: as many processes of this run have them."""
    global THREADS
    THREADS = threads_wanted(local_size)


def keep_freed_pages():
    """Tell glibc to keep freed memory: 2,000 page faults less in a step of 60 ms, which are 3 %."""
    M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1
    with contextlib.suppress(AttributeError, OSError, TypeError):  # others have no mallopt
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(M_TRIM_THRESHOLD, 1 << 30)


@functools.cache
def helpers_of(process):
    """(lock, queue, list of threads) of a process of this number: those of `parallel`.

    They are made when they are needed first. After a fork the new process has another number,
    and gets helpers of its own.
    """
    keep_freed_pages()
    return threading.Lock(), queue.SimpleQueue(), []


def help_for_ever(calls):
    """What a helper does: wait for a call of `parallel`, take part in it, and say how it went.

    A step of a small model has hundreds of calls; Python's ThreadPoolExecutor would cost 5 % of it.
    """
    if BLAS:
        BLAS[0](1)  # some BLAS keep this number for each thread
    while True:
        work, done = calls.get()
        try:
            work()
            done.put(None)
        except BaseException as error:
            done.put(error)
        del work, done  # while it waits, a helper keeps nothing alive


def parallel(task, n):
    """[task(0), ..., task(n - 1)], computed by THREADS threads while BLAS has one.

    A task may not call parallel. Calls from several threads come one after the other.
    """
    results = [None] * n
    numbers = [None] * THREADS  # each None ends the work of a thread
    numbers.extend(reversed(range(n)))

    def work():
        # Whoever is free takes the next number: never the same twice, even without Python's lock.
        for i in iter(numbers.pop, None):
            results[i] = task(i)

    _, calls, helpers = helpers_of(os.getpid())
    with blas_held_to(1):
        wanted = min(THREADS, n) - 1
        with contextlib.suppress(RuntimeError):  # the system allows no more threads
            while len(helpers) < wanted:
                helper = threading.Thread(target=help_for_ever, args=[calls], daemon=True)
                helper.start()
                helpers.append(helper)

        called = min(wanted, len(helpers))
        done = queue.SimpleQueue()
        for _ in range(called):
            calls.put((work, done))
        try:
            work()
        finally:
            errors = [done.get() for _ in range(called)]
    for error in filter(None, errors):
        raise error
    return results


# Blocks. NumPy makes one pass over memory for each operation, which is slow where arrays are larger
# than a core's cache. So the functions of section 2 are run block by block, on several cores.

BLOCK_BYTES = 1 << 20  # of a block's widest array: with smaller ones, threads wait for the lock


def blocks(n, nbytes, block_bytes=BLOCK_BYTES):
    """n things of nbytes each, cut into blocks of at most block_bytes: a list of slices.

    Their number is a multiple of that of the threads, so that all have the same to do. For less
    than an eighth of block_bytes no thread is woken: it would wait for the interpreter lock.
    """
    least = block_bytes // 8
    threads = max(1, min(THREADS, n * nbytes // least))
    return cut(n, threads * math.ceil(n * nbytes / (threads * block_bytes)))


def cut(n, number):
    """n things, cut into `number` slices of nearly the same length; into n if that is less."""
    number = min(n, number)
    ends = [n * i // number for i in range(number + 1)]
    return [slice(start, stop) for start, stop in itertools.pairwise(ends)]


def by_rows(layer, arrays, sums="", block_bytes=BLOCK_BYTES):
    """The same layer, run by blocks of rows, which the cores share.

    arrays   the names of the arguments that have an entry for each token, (B, T, ...), or of flat
             ones. The layer gets a block of them as (1, rows, ...)
    sums     the names of those that follow `add`. Each block has its own, and these are added up in
             the order of the blocks, as are the numbers that a layer returns
    """
    names = list(inspect.signature(layer).parameters)
    of_rows = [names.index(name) for name in arrays.split()]
    of_sums = [names.index(name) for name in sums.split()]

    @functools.wraps(layer)
    def run(*args):
        rows = [rows_of(args[i]) for i in of_rows]
        slices = blocks(len(rows[0]), max(array[0].nbytes for array in rows), block_bytes)
        if len(slices) == 1:
            with blas_held_to(1):
                return layer(*args)

        def block(number):
            own = list(args)
            for i, array in zip(of_rows, rows, strict=True):
                own[i] = array[np.newaxis, slices[number]]
            for i in of_sums:
                own[i] = np.empty_like(args[i])
            if of_sums:
                own[names.index("add")] = False
            result = layer(*own)
            return [own[i] for i in of_sums] if of_sums else result

        results = parallel(block, len(slices))
        if of_sums:
            for i, parts in zip(of_sums, zip(*results, strict=True), strict=True):
                accumulate(args[i], sum(parts[1:], parts[0]), args[names.index("add")])
        elif results[0] is not None:
            return sum(results)

    return run


def by_heads(layer, thirds):
    """The same layer, run by blocks of heads, which do not depend on each other.

    A block is some sequences with all of their heads or, if that is too much, some heads of one
    sequence. Its size is counted as that of preatt, at most ATT_ROWS * T numbers for each head.

    Of an argument (B, T, C) the layer gets a block (sequences, T, heads, hs). thirds are the names
    of those (B, T, 3C), which have queries, keys and values: (sequences, T, 3, heads, hs). lse is
    (B, T, NH), and a block of it (sequences, T, heads).
    """
    names = list(inspect.signature(layer).parameters)[:-1]  # without NH, the last

    @functools.wraps(layer)
    def run(*args):
        NH = args[-1]
        views = {}
        for name, array in zip(names, args, strict=False):
            B, T = array.shape[:2]
            parts = (3, NH, -1) if name in thirds.split() else (NH, -1)
            views[name] = array.reshape(B, T, *parts, copy=False)

        n = views["out"].shape[1]
        nbytes = min(ATT_ROWS, n) * views["qkv"].shape[1] * args[0].itemsize  # of one head
        number = len(blocks(B * NH, nbytes))
        of_sequences = cut(B, number)
        of_heads = cut(NH, math.ceil(number / len(of_sequences)))
        pieces = list(itertools.product(of_sequences, of_heads))

        def piece(i):
            sequences, heads = pieces[i]
            own = {name: view[sequences, ..., heads, :] for name, view in views.items()}
            own["lse"] = own["lse"][..., 0]
            layer(*own.values(), heads.stop - heads.start)

        parallel(piece, len(pieces))

    return run


def by_blocks(products):
    """The same products, cut into blocks, of which each thread gets as many multiplications.

    All are given to the cores at once, because it takes 30 to 70 microseconds each time until the
    other cores have begun. BLAS could use threads of its own instead. But a BLAS thread waits by
    asking again and again whether the others are done, and keeps its core busy meanwhile: if
    another program has the core of one of them, a step takes five times as long.
    """

    @functools.wraps(products)
    def run(*jobs):
        if len(jobs) == 1 and len(jobs[0][0]) == 1:
            # One token: in generation, nearly always. Most of its products take some 0.1 ms. To
            # start our threads would cost about as much as they save; BLAS's own start sooner. For
            # 124M on two cores of an AMD EPYC: 80 tokens a second instead of 60.
            with blas_held_to(THREADS):
                return products(*jobs)
        work = [out.size * len(b) for out, _, b, _, _ in jobs]  # multiplications
        pieces = []
        for job, own in zip(jobs, work, strict=True):
            pieces += product_blocks(*job, math.ceil(THREADS * own / sum(work)))
        parallel(lambda i: products(pieces[i]), len(pieces))

    return run


def product_blocks(out, a, b, add, bias, number):
    """A job of `products`, cut into `number` blocks: a list of jobs.

    BLAS copies the rows of a and the columns of b that a block needs, and a column costs half as
    much again. So blocks are nearly square, as then there is least to copy. They are fewer if they
    would have less than 2^20 multiplications, some 15 microseconds. What is added to out is cut
    into so many that a block of a @ b is still in the cache then.
    """
    m, n = out.shape
    number = max(1, min(number, out.size * len(b) >> 20))
    if add:
        number *= math.ceil(out.nbytes / (number * BLOCK_BYTES))

    ways = [(i, number // i) for i in range(1, number + 1) if number % i == 0]
    of_rows, of_columns = min(ways, key=lambda way: m / way[0] + 1.5 * n / way[1])
    pieces = []
    for rows in cut(m, of_rows):
        for columns in cut(n, of_columns):
            own_bias = None if bias is None else bias[columns]
            pieces.append((out[rows, columns], a[rows], b[:, columns], add, own_bias))
    return pieces


layernorm_forward = by_rows(layernorm_forward, "out mean rstd inp")
layernorm_backward = by_rows(layernorm_backward, "dinp dout inp mean rstd", "dweight dbias")
products = by_blocks(products)
attention_forward = by_heads(attention_forward, "qkv")
attention_backward = by_heads(attention_backward, "dqkv qkv")
gelu_forward = by_rows(gelu_forward, "out inp")
gelu_backward = by_rows(gelu_backward, "dinp dout inp")
residual_forward = by_rows(residual_forward, "out inp1 inp2", block_bytes=2 * BLOCK_BYTES)
crossentropy_softmax_forward = by_rows(crossentropy_softmax_forward, "losses logits targets")
crossentropy_softmax_backward = by_rows(crossentropy_softmax_backward, "probs targets")
sum_of_squares = by_rows(sum_of_squares, "x", block_bytes=BLOCK_BYTES // 2)
adamw = by_rows(adamw, "p g m v", block_bytes=BLOCK_BYTES // 2)


# --------------------------------------------------------------------------------------------------
# 10. Files
#
# Whatever is read from outside is checked before it is used.


@contextlib.contextmanager
def atomic_write(path):
    """A binary file to write to, which takes the place of `path` when it is whole and on the disk.

    It is written to PATH.tmp, flushed, and renamed. So PATH is never half a file, and if writing
    fails, the old PATH is still there.
    """
    temporary = f"{path}.tmp"  # the same name each time: what a killed run left is overwritten
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        with contextlib.suppress(OSError):  # Windows has no such handles
            folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
            os.fsync(folder)  # so that the new name survives a power cut
            os.close(folder)
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)


def regular_file(path):
    """InputError if path is a folder, a pipe or a device. Reading a pipe could wait for ever."""
    try:
        mode = os.stat(path).st_mode
    except ValueError as error:  # a name in an index may hold what no file's name can
        raise InputError(f"{path!a}: expected a file's name: {error}") from None
    require(stat.S_ISREG(mode), f"{path}: expected a file, found a folder, a pipe or a device")


MAX_JSON = 1 << 20  # bytes; the header of GPT-2 XL's weights has 70 KB


def read_json(path):
    """The JSON object in a small file: a dict."""
    regular_file(path)
    with open(path, "rb") as file:
        return parse_json(file.read(MAX_JSON), path)


def parse_json(data, path):
    """The JSON object in bytes that were read from path: a dict."""
    try:
        value = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: expected JSON: {error}") from None
    found = type(value).__name__
    require(isinstance(value, dict), f"{path}: expected a JSON object, found {found}")
    return value


def are_sizes(value):
    """Whether value is a short list of integers that can be sizes."""
    if not isinstance(value, list) or len(value) > 8:
        return False
    return all(type(i) is int and 0 <= i < 1 << 48 for i in value)


def in_data(name):
    """data/NAME here, or beside this file, if there is a data/ only there."""
    beside = os.path.join(os.path.dirname(os.path.abspath(__file__)), "data")
    if not os.path.isdir("data") and os.path.isdir(beside):
        return f"{beside}/{name}"
    return f"data/{name}"


@contextlib.contextmanager
def project_file():
    """Import one of the project's other files in here, and call it: its errors become InputError.

    Whoever has copied this file alone does not have them.
    """
    try:
        yield
    except ImportError as error:
        raise InputError(
            f"{error.name} is needed here, and does not lie beside {os.path.abspath(__file__)}: "
            "get it from where this file comes from"
        ) from error
    except ValueError as error:
        raise InputError(str(error)) from error


def provide(what):
    """The path of "gpt2", "tiny_shakespeare" or "vocabulary": fetched if it is not in data/."""
    with project_file():
        import prepro_tinyshakespeare

        return prepro_tinyshakespeare.provide(what)


# llm.c's token file:
#
#     256 int32: 20240520, version 1, number of tokens, size of the vocabulary (0: unknown), zeros
#     the tokens, uint16

TOKENS = 20240520


class TokenFile:
    """A file of token ids: it has a length, and its slices are uint16 arrays.

    Each slice is read anew. So any number of files may be in use, and one that is cut short while a
    run goes on is an error. (If it were mapped into memory, the system would end the process.)
    """

    def __init__(self, path):
        regular_file(path)
        self.path = path
        header = np.fromfile(path, "<i4", 256).tolist()
        require(
            len(header) == 256 and header[:2] == [TOKENS, 1],
            f"{path}: not a token file of version 1: it begins with {header[:2]}, expected "
            f"{[TOKENS, 1]}: write it with python prepro_tinyshakespeare.py",
        )
        self.count, self.vocab_size = header[2:4]
        found, expected = os.path.getsize(path), 1024 + 2 * self.count
        require(
            found == expected and self.count > 0,
            f"{path}: has {found} bytes, {self.count} tokens make {expected}: write it anew",
        )

    def __len__(self):
        return self.count

    def __getitem__(self, piece):
        start, stop, _ = piece.indices(self.count)
        tokens = np.fromfile(self.path, "<u2", stop - start, offset=1024 + 2 * start)
        require(len(tokens) == stop - start, f"{self.path}: has become shorter")
        return tokens


def open_shards(pattern):
    """The token files that a path or a pattern names: a list of TokenFile."""
    names = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern))
    require(
        names, f"{pattern}: no such token file: write one with python prepro_tinyshakespeare.py"
    )
    return [TokenFile(name) for name in names]


PASSAGE = 1000  # bytes


def text_at_hand():
    """(names, training, validation): a text that needs no network, as bytes, uint8 arrays.

    Tiny Shakespeare, if it lies in data/, otherwise this project's main files. Every tenth passage
    is for validation, so that it has passages of all kinds.
    """
    here = os.path.dirname(os.path.abspath(__file__))
    names = ["train_gpt2.py", "test_gpt2.py", "prepro_tinyshakespeare.py", "README.md"]
    paths = [os.path.join(here, name) for name in names]
    shakespeare = in_data("tiny_shakespeare.txt")
    if os.path.exists(shakespeare) and os.path.getsize(shakespeare) > 20 * PASSAGE:
        paths = [shakespeare]

    texts = {path: np.fromfile(path, np.uint8) for path in paths if os.path.exists(path)}
    text = np.concatenate(list(texts.values()))
    passages = np.split(text, range(PASSAGE, len(text), PASSAGE))
    validation = passages[5::10]
    del passages[5::10]
    names = ", ".join(map(os.path.basename, texts))
    return names, np.concatenate(passages), np.concatenate(validation)


def tokenizer(vocab_size):
    """How a model reads and writes: an object with

    encode   a function from a text to a list of ids
    decode   a function from an id to bytes
    first    the id that begins a new text

    InputError if it needs GPT-2's vocabulary, and that can't be had.
    """
    if vocab_size == 256:
        return SimpleNamespace(
            encode=lambda text: list(text.encode(errors="surrogateescape")),
            decode=lambda i: bytes([i]),
            first=ord("\n"),
        )
    if not is_gpt2s(vocab_size):

        def refuse(text):
            raise InputError(
                f"the model's {vocab_size} tokens are neither bytes nor GPT-2's, so a prompt can't "
                "be put into them: use model.generate with ids"
            )

        return SimpleNamespace(encode=refuse, decode=lambda i: b"%d " % i, first=0)

    gpt2 = gpt2_encoding()

    def decode(i):
        padding = i >= gpt2.n_vocab
        return b"" if padding else gpt2.decode_single_token_bytes(i)

    return SimpleNamespace(encode=gpt2.encode_ordinary, decode=decode, first=gpt2.eot_token)


def is_gpt2s(vocab_size):
    """Whether a vocabulary is GPT-2's 50257 tokens, perhaps padded to a multiple of 128."""
    return 50257 <= vocab_size <= 50304


def gpt2_encoding():
    """tiktoken's "gpt2". InputError if it is missing."""
    try:
        import tiktoken

        if not os.environ.get("TIKTOKEN_CACHE_DIR"):
            os.environ["TIKTOKEN_CACHE_DIR"] = provide("vocabulary")
        return tiktoken.get_encoding("gpt2")
    except ImportError:
        raise InputError("GPT-2's tokens need tiktoken: pip install tiktoken") from None
    except InputError:
        raise
    except Exception as error:  # whatever it is, it comes from tiktoken's files or its network
        raise InputError(f"tiktoken can't load GPT-2's vocabulary: {error}") from None


# safetensors, Hugging Face's format:
#
#     8 bytes: n, little-endian
#     n bytes of JSON: {name: {"dtype": ..., "shape": ..., "data_offsets": [begin, end]}, ...}
#     the tensors, one after the other, without holes


class StoredTensor(NamedTuple):
    """Where a tensor lies in a file."""

    path: str
    offset: int  # in bytes, from the beginning of the file
    dtype: str  # "F32", "F16", "BF16", ...
    shape: tuple
    transposed: bool = False  # Hugging Face keeps four of the matrices as (C, OC)


ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F16": 2, "BF16": 2, "I16": 2,
    "F32": 4, "I32": 4, "F64": 8, "I64": 8,
}  # fmt: skip
FLOATS = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}  # bfloat16 is the upper half of a float32


def read_safetensors(path):
    """The header of a .safetensors file, checked: ({name: StoredTensor}, metadata)."""
    regular_file(path)
    total = os.path.getsize(path)
    with open(path, "rb") as file:
        n = int.from_bytes(file.read(8), "little")
        plausible = 8 <= total >= n + 8 and n <= MAX_JSON
        require(plausible, f"{path}: not a .safetensors file: {total} bytes, a header of {n}")
        header = parse_json(file.read(n), path)

    metadata = header.pop("__metadata__", {})
    require(isinstance(metadata, dict), f"{path}: __metadata__ is not a JSON object")
    for name, entry in header.items():
        right = isinstance(entry, dict) and isinstance(entry.get("dtype"), str)
        right = right and entry["dtype"] in ITEM_BYTES
        right = right and are_sizes(entry.get("shape")) and are_sizes(entry.get("data_offsets"))
        require(
            right,
            f"{path}: tensor {name!r}: expected dtype, shape and data_offsets, found {entry!r:.99}",
        )

    tensors = {}
    end = 0
    # In the order of their places, each tensor must begin where the one before it ends.
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape = entry["dtype"], tuple(entry["shape"])
        begin = end
        end = begin + math.prod(shape) * ITEM_BYTES[dtype]
        require(
            entry["data_offsets"] == [begin, end],
            f"{path}: tensor {name!r}, {dtype} {list(shape)}, lies at {entry['data_offsets']}, "
            f"expected {[begin, end]}",
        )
        tensors[name] = StoredTensor(path, 8 + n + begin, dtype, shape)
    described = 8 + n + end
    require(
        described == total,
        f"{path}: has {total} bytes, its header describes {described}: fetch it again",
    )
    return tensors, metadata


def write_safetensors(path, tensors, metadata, checksum=False):
    """tensors {name: (shape, pieces)}, written as float32; metadata {str: str}.

    pieces     arrays that hold the tensor's numbers in order: one array, or what other processes
               send. One that is a transposed view is copied, one at a time
    checksum   whether a last tensor, "crc32", holds the CRC-32 of all bytes before it
    """
    header = {"__metadata__": metadata}
    end = 0
    for name, (shape, _) in tensors.items():
        begin = end
        end = begin + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    if checksum:
        header["crc32"] = {"dtype": "U8", "shape": [4], "data_offsets": [end, end + 4]}

    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    text = len(text).to_bytes(8, "little") + text
    crc32 = zlib.crc32(text)
    with atomic_write(path) as file:
        file.write(text)
        for _, pieces in tensors.values():
            for piece in pieces:
                piece = np.ascontiguousarray(piece, "<f4")
                file.write(piece)
                crc32 = zlib.crc32(piece, crc32) if checksum else 0
        if checksum:
            file.write(crc32.to_bytes(4, "little"))


def read_tensor(out, stored, what):
    """Read a StoredTensor into the array out, some rows at a time, so that there is no copy."""
    if stored.transposed:
        out = out.T
    rows_per_piece = max(1, (1 << 20) // max(1, math.prod(out.shape[1:])))

    with open(stored.path, "rb") as file:
        file.seek(stored.offset)
        for start in range(0, len(out), rows_per_piece):
            target = out[start : start + rows_per_piece]
            piece = np.fromfile(file, FLOATS[stored.dtype], target.size)
            require(piece.size == target.size, f"{stored.path}: ends in the middle of {what}")
            if stored.dtype == "BF16":
                piece = (piece.astype("<u4") << 16).view("<f4")
            finite = np.isfinite(piece).all()
            require(finite, f"{stored.path}: {what} holds a value that is not finite")
            target[...] = piece.reshape(target.shape)


# Hugging Face's GPT-2. A model is read in three steps: find_weights gives its path, open_weights
# its sizes and where its tensors lie, and read_weights the numbers.

HF_NAMES = {
    "wte": "wte.weight",
    "wpe": "wpe.weight",
    "ln1w": "h.{}.ln_1.weight",
    "ln1b": "h.{}.ln_1.bias",
    "qkvw": "h.{}.attn.c_attn.weight",
    "qkvb": "h.{}.attn.c_attn.bias",
    "attprojw": "h.{}.attn.c_proj.weight",
    "attprojb": "h.{}.attn.c_proj.bias",
    "ln2w": "h.{}.ln_2.weight",
    "ln2b": "h.{}.ln_2.bias",
    "fcw": "h.{}.mlp.c_fc.weight",
    "fcb": "h.{}.mlp.c_fc.bias",
    "fcprojw": "h.{}.mlp.c_proj.weight",
    "fcprojb": "h.{}.mlp.c_proj.bias",
    "lnfw": "ln_f.weight",
    "lnfb": "ln_f.bias",
}
HF_TRANSPOSED = {"qkvw", "attprojw", "fcw", "fcprojw"}
HF_CONFIG = {  # what config.json may say besides the sizes: the first is what we write
    "model_type": ["gpt2"],
    "activation_function": ["gelu_new", "gelu_pytorch_tanh"],
    "layer_norm_epsilon": [LN_EPS],
    "tie_word_embeddings": [True],
    "scale_attn_weights": [True],
    "scale_attn_by_inverse_layer_idx": [False],
}
CONVERT = (
    "To convert a GPT-2 in another format, in Python with transformers: "
    "GPT2LMHeadModel.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
)

# Layers and channels of OpenAI's models. A fresh model has such sizes, too; its heads have 64.
OPENAI = {
    "gpt2": (12, 768),
    "gpt2-medium": (24, 1024),
    "gpt2-large": (36, 1280),
    "gpt2-xl": (48, 1600),
}
FRESH = {"d6": (6, 384)} | {f"d{sizes[0]}": sizes for sizes in OPENAI.values()}


def load_pretrained(cls, source, batch_size, sequence_length, recompute, training):
    """GPT2.from_pretrained, whose arguments are described there."""
    config, tensors = open_weights(find_weights(os.fspath(source)))
    model = cls(config, batch_size, sequence_length, None, recompute, training)
    read_weights(model.params, tensors)
    return model


def find_weights(source):
    """The path of a model: of one of OpenAI's, which is fetched if need be, or source itself."""
    if source in OPENAI:
        refuse_two_meanings(source)
        path = in_data(f"{source}.safetensors")
        return path if os.path.exists(path) else provide(source)
    names = ", ".join(OPENAI)
    require(os.path.exists(source), f"{source!r}: no such model: no file, and none of {names}")
    return source


def refuse_two_meanings(name):
    """InputError if the name of a model is here also a folder that holds a model."""
    require(
        not holds_a_model(name),
        f"{name!r} is the name of a model, and here also a folder that holds one: write ./{name} "
        "for the folder, or rename it",
    )


def holds_weights(folder):
    """Whether a folder holds the weights of a model."""
    names = ("model.safetensors", "model.safetensors.index.json")
    return any(os.path.exists(os.path.join(folder, name)) for name in names)


def open_weights(path):
    """(GPT2Config, {(name, l): StoredTensor}) of a model in Hugging Face's format, or in llm.c's.

    l is a layer's number, or None for a tensor that is not cut by layers. InputError unless there
    is exactly what a GPT-2 has.
    """
    if path.endswith(".bin") and not os.path.isdir(path):
        with project_file():
            from extras import llmc

            shapes_of = lambda sizes: GPT2.param_shapes(GPT2Config(**sizes))
            sizes, found = llmc.open_model(path, shapes_of)
        tensors = {(name, None): StoredTensor(path, *where) for name, where in found.items()}
        return GPT2Config(**sizes), tensors

    tensors, metadata = read_parts(path)
    config = find_config(path, tensors, metadata)
    return config, find_tensors(path, tensors, GPT2.param_shapes(config))


def read_weights(params, tensors):
    """Read what open_weights found into params {name: array}."""
    for (name, l), stored in tensors.items():
        out = params[name] if l is None else params[name][l]
        read_tensor(out, stored, name if l is None else f"{name} of layer {l}")


def tensors_of(shapes):
    """(name, l, shape, Hugging Face's name) of every tensor that a file holds, in order."""
    tensors = []
    for name, shape in shapes.items():
        if '{}' not in HF_NAMES.get(name, ''):
            tensors.append((name, None, shape, HF_NAMES[name]))
            continue
        for l in range(shape[0]):
            tensors.append((name, l, shape[1:], HF_NAMES[name].format(l)))
    return tensors


def read_parts(source):
    """({Hugging Face's name: StoredTensor}, metadata) of a folder, a file, or an index of files."""
    path = source
    if os.path.isdir(source):
        if not holds_weights(source):
            newest = shlex.join(list_checkpoints(source)[:1])
            require(not newest, f"{source}: holds a run that was stopped: use --model {newest}")
            raise InputError(f"{source}: holds no model.safetensors. {CONVERT}")
        path = os.path.join(source, "model.safetensors")
        path = path if os.path.exists(path) else path + ".index.json"
    require(
        path.endswith((".safetensors", ".json")),
        f"{path}: expected a folder, a .safetensors file, or llm.c's .bin. {CONVERT}",
    )

    parts = [path]
    if path.endswith(".json"):
        weight_map = read_json(path).get("weight_map")
        right = isinstance(weight_map, dict) and all(type(x) is str for x in weight_map.values())
        require(right, f"{path}: expected a weight_map to files beside it")
        names = {os.path.basename(name) for name in weight_map.values()}
        parts = [os.path.join(os.path.dirname(path), name) for name in sorted(names)]

    tensors, metadata = {}, {}
    for part in parts:
        found, metadata = read_safetensors(part)
        for name, stored in found.items():
            wrapped = name.startswith(("_orig_mod.", "module."))
            require(
                not wrapped,
                f"{path}: tensor {name!r} comes from a wrapped model: save the state_dict() of "
                "its .module or ._orig_mod",
            )
            name = name.removeprefix("transformer.")
            require(name not in tensors, f"{path}: tensor {name!r} is there twice")
            is_mask = name.endswith((".attn.bias", ".attn.masked_bias"))
            is_state = "state" in metadata and name in ("m", "v", "crc32")  # of a checkpoint
            if not is_mask and not is_state:
                tensors[name] = stored
    return tensors, metadata


def find_config(source, tensors, metadata):
    """The GPT2Config that follows from the tensors, and from config.json, which must agree.

    The tensors do not show how many heads there are. That stands in the metadata of the files that
    we write, or in the config.json beside a file; and OpenAI's own sizes are known.
    """
    wte = tensors.get("wte.weight") or tensors.get("lm_head.weight")
    wpe = tensors.get("wpe.weight")
    right = wte and wpe and len(wte.shape) == len(wpe.shape) == 2
    require(right, f"{source}: expected GPT-2's matrices wte.weight and wpe.weight")
    V, C = wte.shape
    L = sum(name.endswith(".ln_1.weight") for name in tensors)

    heads = metadata.get("n_head")
    heads = int(heads) if re.fullmatch(r"[1-9]\d{0,8}", str(heads), re.ASCII) else None
    folder = source if os.path.isdir(source) else os.path.dirname(source)
    path = os.path.join(folder, "config.json")
    if os.path.isdir(source) or (heads is None and os.path.exists(path)):
        description = read_json(path)
        expected = HF_CONFIG | {
            "vocab_size": [V],
            "n_positions": [wpe.shape[0]],
            "n_embd": [C],
            "n_layer": [L],
            "n_inner": [4 * C],
            "n_head": [heads or description.get("n_head")],
        }
        for key, values in expected.items():
            found = description.get(key)
            right = found is None or found in values
            require(right, f"{path} says {key} = {found!r}, expected {values[0]!r}")
        heads = expected["n_head"][0]

    if heads is None and (L, C) in OPENAI.values():
        heads = C // 64
    require(
        type(heads) is int,
        f'{source}: how many heads? Put a config.json with {{"n_head": NUMBER}} beside it',
    )
    try:
        return GPT2Config(wpe.shape[0], V, L, heads, C)
    except InputError as error:
        raise InputError(f"{source}: {error}") from None


def find_tensors(path, tensors, shapes):
    """Where all parameters lie: {(name, l): StoredTensor}, of {Hugging Face's name: StoredTensor}.

    The classifier, lm_head.weight, must be wte.weight, or stand in its place.
    """
    head = tensors.pop("lm_head.weight", None)
    if head:
        wte = tensors.setdefault("wte.weight", head)
        same = wte == head or np.array_equal(raw_bytes(head), raw_bytes(wte))
        require(same, f"{path}: lm_head.weight differs from wte.weight; in GPT-2 they are the same")

    found = {}
    for name, l, shape, hf_name in tensors_of(shapes):
        transposed = name in HF_TRANSPOSED
        expected = shape[::-1] if transposed else shape
        stored = tensors.pop(hf_name, None)
        require(
            stored and stored.shape == expected and stored.dtype in FLOATS,
            f"{path}: tensor {hf_name!r}: expected shape {expected} and one of {list(FLOATS)}, "
            f"found {(stored.shape, stored.dtype) if stored else 'none'}",
        )
        found[name, l] = stored._replace(transposed=transposed)

    extra = next(iter(tensors), "")
    require(not tensors, f"{path}: tensor {extra!r} is not part of a GPT-2")
    return found


def raw_bytes(stored):
    """A stored tensor's bytes, mapped into memory."""
    nbytes = math.prod(stored.shape) * ITEM_BYTES[stored.dtype]
    return np.memmap(stored.path, np.uint8, "r", stored.offset, nbytes)


def huggingface_tensors(params):
    """The parameters under Hugging Face's names: {name: (shape, [array])}."""
    tensors = {}
    for name, l, _, hf_name in tensors_of({name: view.shape for name, view in params.items()}):
        view = params[name] if l is None else params[name][l]
        view = view.T if name in HF_TRANSPOSED else view
        tensors[f"transformer.{hf_name}"] = (view.shape, [view])
    return tensors


MODEL_CARD = """\
A GPT-2 of {parameters:,} parameters. Its vocabulary is {vocabulary}. To continue a text with it:

    python train_gpt2.py --model {quoted} --inference_only 1 --prompt "To be, or"

There is no tokenizer in this folder, so transformers.pipeline can't read a prompt. Use
GPT2LMHeadModel.from_pretrained({folder!r}).generate(ids) with ids from tiktoken or of bytes.
"""


def save_huggingface(folder, config, params, metadata=()):
    """GPT2.save_pretrained: config.json, generation_config.json, README.md, model.safetensors.

    metadata   more for the last of them, {name: text}
    """
    V = config.vocab_size
    ends = dict.fromkeys(("bos_token_id", "eos_token_id"), 50256 if is_gpt2s(V) else None)
    description = {
        "architectures": ["GPT2LMHeadModel"],
        "dtype": "float32",
        "vocab_size": V,
        "n_positions": config.max_seq_len,
        "n_embd": config.channels,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        **{key: values[0] for key, values in HF_CONFIG.items()},
        **ends,
    }
    vocabulary = "GPT-2's" if is_gpt2s(V) else "the bytes" if V == 256 else f"one of {V} tokens"
    parameters = count(GPT2.param_shapes(config))
    folder = os.fspath(folder)
    card = MODEL_CARD.format(
        parameters=parameters, vocabulary=vocabulary, folder=folder, quoted=shlex.quote(folder)
    )
    texts = {
        "config.json": json.dumps(description, indent=2),
        "generation_config.json": json.dumps(ends, indent=2),
        "README.md": card,
    }
    os.makedirs(folder, exist_ok=True)
    for name, text in texts.items():
        path = os.path.join(folder, name)
        if name != "README.md" or not os.path.exists(path):
            with atomic_write(path) as file:
                file.write(text.encode(errors="surrogateescape"))
    path = os.path.join(folder, "model.safetensors")
    metadata = {"format": "pt", "n_head": str(config.num_heads), **dict(metadata)}
    write_safetensors(path, huggingface_tensors(params), metadata)


# --------------------------------------------------------------------------------------------------
# 11. The training loop


@dataclass
class Run:
    """A run of the training loop: the model, its data, and how far it is."""

    args: SimpleNamespace  # the value of every flag
    world: object  # one_process(), or the Processes of extras/processes.py
    model: object  # a GPT2, or one that several processes share
    loader: object
    val_loader: object  # of one passage at a time; None without validation
    data: dict  # the checksums of the data, see open_data
    tokenizer: object  # None if there can't be samples
    examples: list  # of HellaSwag, if they are asked for
    log: object  # a Log
    step: int = 0  # updates done
    saved: dict = None  # the state in the newest checkpoint

    def state(self):
        """What a checkpoint has besides the model. The flag --resume says nothing of the run."""
        settings = {name: value for name, value in vars(self.args).items() if name != "resume"}
        return {
            "step": self.step,
            "position": list(self.loader.position),
            "data": self.data,
            "settings": settings,
        }


def train(run):
    """Evaluate, save, update and log. Returns False if a signal came before all was done."""
    args, stopped = run.args, run.world.stopped
    micro_batches = count_micro_batches(args, run.world.size)
    first_step, began, clock = run.step, time.perf_counter(), Clock(args)

    while True:
        last = run.step >= args.num_iterations
        if is_due(run.step, args.val_loss_every, last):
            with clock.timing("validation"):
                validate(run)
                score_hellaswag(run)
        if run.step > 0 and is_due(run.step, args.sample_every, last):
            with clock.timing("sample"):
                sample_aloud(run)
        run.log.write()

        stop = bool(stopped)  # asked once, because a signal may come at any moment
        if last or stop or run.step > 0 and is_due(run.step, args.checkpoint_every):
            with clock.timing("checkpoint"):
                save(run)
        if last or stop:
            break
        update_until_due(run, clock, micro_batches, first_step)

    complete = not stop
    finish(run, complete, run.step - first_step, time.perf_counter() - began)
    return complete


def update_until_due(run, clock, micro_batches, first_step):
    """Make updates until there is something to print or to do, and print how the last one went."""
    args, stopped = run.args, run.world.stopped
    pauses = lines_every(args), args.val_loss_every, args.sample_every, args.checkpoint_every

    with Progress("") as progress:
        while True:
            left = clock.left(run.step, evaluated=True)
            progress.what = f"step {run.step + 1}/{args.num_iterations}{left}"
            learning_rate = learning_rate_at(
                run.step, args.num_iterations, args.learning_rate,
                args.warmup_iters, args.learning_rate_decay_frac,
            )  # fmt: skip
            with clock.timing("update"):
                loss, norm = train_step(
                    run.model, run.loader, micro_batches,
                    learning_rate, args.weight_decay, args.grad_clip,
                )  # fmt: skip
            run.step += 1
            seconds = clock.seconds["update"][-1]
            run.log.add(
                run.step, train_loss=loss, norm=norm, lr=learning_rate,
                ms=seconds * 1e3, tokens_per_second=args.total_batch_size / seconds,
            )  # fmt: skip

            ends = run.step in (first_step + 1, args.num_iterations) or stopped
            if ends or any(is_due(run.step, every) for every in pauses):
                break
            run.log.write()

    print_now(
        f"step {run.step}/{args.num_iterations}: train loss {loss:.6f} (norm {norm:.4f}, "
        f"lr {learning_rate:.1e}, {seconds * 1e3:.0f} ms{clock.left(run.step)})"
    )


def lines_every(args):
    """Updates between two printed lines: --log_every, or 1, 2, 5, 10, ... for 40 to 100 lines."""
    numbers = (digit * 10**power for power in itertools.count() for digit in (1, 2, 5))
    return args.log_every or next(n for n in numbers if args.num_iterations <= 100 * n)


def is_due(step, every, last=False):
    """Whether something that is done after every so many updates is due; never if every is 0."""
    return every > 0 and (last or step % every == 0)


def count_micro_batches(args, size):
    """How many batches each of `size` processes takes for one update.

    --total_batch_size counts the tokens of all. InputError if they can't share it out.
    """
    tokens = args.batch_size * args.sequence_length * size
    what = "B*T" if size == 1 else f"B*T * {size} processes"
    require(
        args.total_batch_size > 0 and args.total_batch_size % tokens == 0,
        f"--total_batch_size {args.total_batch_size} is not a multiple of {what} = {tokens}: try "
        f"{max(1, args.total_batch_size // tokens) * tokens}",
    )
    return args.total_batch_size // tokens


class Clock:
    """How long the parts of a run have taken, and so how long the rest of it will take."""

    def __init__(self, args):
        self.last_step = args.num_iterations
        self.every = {
            "update": 1,
            "validation": args.val_loss_every,
            "sample": args.sample_every,
            "checkpoint": args.checkpoint_every,
        }
        self.seconds = {part: collections.deque(maxlen=25) for part in self.every}

    @contextlib.contextmanager
    def timing(self, part):
        """Time a part of the run."""
        started = time.perf_counter()
        yield
        self.seconds[part].append(time.perf_counter() - started)

    def left(self, step, evaluated=False):
        """What to add to a line: ", 0:59 left", or "" before the first update."""
        if not self.seconds["update"]:
            return ""
        minutes, seconds = divmod(round(self.seconds_left(step, evaluated)), 60)
        hours, minutes = divmod(minutes, 60)
        time_left = f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
        return f", {time_left} left"

    def seconds_left(self, step, evaluated=False):
        """The time from when the update of this number is done to the end of the run.

        evaluated   whether all else that is due at this step is done as well

        A part takes the median of its last times. One that has not come yet counts as nothing.
        """
        left, last = 0.0, self.last_step
        for part, every in self.every.items():
            if self.seconds[part]:
                done = step if evaluated or part == "update" else step - 1
                number = last // every - done // every if every else 0
                number += 1 if every == 0 or last % every else 0  # each comes once more at the end
                left += number * statistics.median(self.seconds[part])
        return left


def describe(run):
    """Print what the run is, and what is normal for it."""
    args = run.args
    updates, tokens = args.num_iterations, args.total_batch_size
    epochs = updates * tokens / sum(n for n, _ in run.data["training"])
    print_now(f"run: {updates:,} updates of {tokens:,} tokens, {epochs:.3g} epochs")

    fresh = args.model in (*FRESH, "bytes")
    V = run.model.config.vocab_size
    if fresh and run.step == 0:
        print_now(f"a model that knows nothing has a loss of ln({V}) = {math.log(V):.2f}")
    if run.val_loader:
        passages, T = val_passages(run), args.sequence_length
        print_now(f"a validation reads {passages:,} passages of {T:,} tokens")
        found = read_best(args.output_dir) if args.output_dir else None
        if found and found.val_tokens != passages * T:
            best = best_folder(args.output_dir)
            print_now(
                f"{best} rests on {found.val_tokens:,} tokens and stays as it is: move it away to "
                "have the best of this run there"
            )
    if epochs > 10 and run.val_loader and not args.overfit_single_batch:
        best = "the best weights are kept in " + best_folder(args.output_dir)
        kept = best if args.output_dir else "--output_dir would keep the best weights"
        print_now(f"it may learn so small a text by heart; {kept}")
    if args.warmup_iters > updates:
        print_now(f"the learning rate would reach its peak only at update {args.warmup_iters}")

    name_processes(run)


SMALL = 20_000_000  # parameters: where waking threads takes a large part of a step


def name_processes(run):
    """Print that several processes may be faster, if the model is small and mpi4py is there."""
    small = count(GPT2.param_shapes(run.model.config)) < SMALL
    shared = run.args.batch_size % THREADS == 0
    with contextlib.suppress(ImportError):
        if small and shared and THREADS > 1 and run.world.size == 1:
            import mpi4py  # noqa: F401

            print_now(
                f"so small a model may be faster as {THREADS} processes: mpiexec -n {THREADS} "
                f"python train_gpt2.py ... --batch_size {run.args.batch_size // THREADS}"
            )


VAL_TOKENS = {256: 30_720}  # of a validation, by the size of the vocabulary; 1,280 of any other


def val_passages(run):
    """How many passages of T tokens a validation reads: by default the same for any B."""
    B, T = run.args.batch_size, run.args.sequence_length
    if run.args.val_max_steps:
        return run.args.val_max_steps * B * run.world.size
    wanted = max(5, VAL_TOKENS.get(run.model.config.vocab_size, 1280) // T)
    return min(wanted, sum((n - 1) // T for n, _ in run.data["validation"]))


def validate(run):
    """Print the mean loss of the first passages of the validation data."""
    model, world = run.model, run.world
    B, T = model.acts["losses"].shape
    passages = val_passages(run)
    steps = math.ceil(passages / (B * world.size))
    run.val_loader.seek([0, 0, 0])
    total = 0.0
    with Progress("validating") as progress:
        for i in range(steps):
            if world.stopped:
                return
            rows = [run.val_loader.next_batch() for _ in range(B)]  # a passage each
            inputs, targets = map(np.concatenate, zip(*rows, strict=True))
            model.forward(inputs, targets, train=False)
            numbers = (i * B + np.arange(B)) * world.size + world.rank  # processes take turns
            wanted = model.acts["losses"][numbers < passages]
            total += float(wanted.sum(dtype=np.float64))
            progress.done = (i + 1) / steps

    loss = sum(world.gathered(total, "the validation loss")) / (passages * T)
    if not math.isfinite(loss):
        raise FloatingPointError(f"the validation loss is {loss}")
    print_now(f"val loss {loss:.6f}")
    run.log.add(run.step, val_loss=loss, val_tokens=passages * T)
    if run.args.output_dir and run.step > 0 and world.rank == 0:
        keep_best(run, loss, passages * T)


def best_folder(output_dir):
    """Where the weights with the least validation loss are."""
    return os.path.join(output_dir, "best")


class Best(NamedTuple):
    """What the best weights of a run are: the metadata of DIR/best/model.safetensors."""

    step: int
    val_loss: float
    val_tokens: int  # on which val_loss rests


def read_best(output_dir):
    """The Best in a folder, or None."""
    path = os.path.join(best_folder(output_dir), "model.safetensors")
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        _, metadata = read_safetensors(path)
        best = Best(*[kind(metadata[name]) for name, kind in Best.__annotations__.items()])
        return best if math.isfinite(best.val_loss) else None
    return None


def keep_best(run, loss, tokens):
    """Write the weights to DIR/best, if their validation loss is less than that of those there."""
    found = read_best(run.args.output_dir)
    if found and (found.val_tokens != tokens or found.val_loss <= loss):
        return  # losses on other tokens can't be compared
    metadata = {name: str(value) for name, value in Best(run.step, loss, tokens)._asdict().items()}
    folder = best_folder(run.args.output_dir)
    try:
        with Progress(f"saving to {folder}"):
            save_huggingface(folder, run.model.config, run.model.params, metadata)
    except OSError as error:
        print_now(f"can't keep the best weights: {error}")


def score_hellaswag(run):
    """Print the model's score on HellaSwag, if that is asked for and not in main.log already."""
    stopped = run.world.stopped
    if not run.examples or stopped or run.log.has(run.step, "eval"):
        return
    with project_file(), Progress("hellaswag") as progress:
        from extras import hellaswag

        score, line = hellaswag.score(run.model, run.examples, stopped, progress)
    print_now(line)
    if score is not None:
        run.log.add(run.step, eval=score)


def sample_aloud(run):
    """Print a sample, if the model's tokens are known and no signal has come."""
    if run.tokenizer and not run.world.stopped:
        print_now("--- sample")
        print_sample(run.args, run.model, run.tokenizer, run.step, run.world.stopped, print_now)


def print_sample(args, model, tokens, step, stopped, show):
    """Show a sample as it comes. Its random numbers depend on the seed and the step alone."""
    rng = np.random.default_rng([args.seed, step])
    utf8 = codecs.getincrementaldecoder("utf-8")("replace")
    prompt = tokens.encode(args.prompt) if args.prompt else [tokens.first]

    show(args.prompt, end="")
    for token in model.generate(prompt, args.max_new_tokens, args.temperature, args.top_k, rng):
        show(utf8.decode(tokens.decode(token)), end="")
        if stopped:
            break
    show(utf8.decode(b"", final=True))


def save(run):
    """Write a checkpoint, unless the newest one is the same.

    One that can't be written does not end the run: the next one may find room on the disk.
    """
    folder, state = run.args.output_dir, run.state()
    if not folder or state == run.saved:
        return
    try:
        with Progress(f"saving to {folder}"):
            save_checkpoint(run)
        run.saved = state
    except OSError as error:
        newest = f"that of step {run.saved['step']}" if run.saved else "none"
        print_now(f"can't save step {run.step}: {error}; the last checkpoint is {newest}")


def finish(run, complete, updates, seconds):
    """Leave the weights of a complete run in --output_dir, and print the last line.

    InputError if something could not be saved.
    """
    args, folder = run.args, run.args.output_dir
    missing = []
    if folder and run.saved != run.state():
        missing.append("a checkpoint of the last step")
    if folder and complete and run.world.rank == 0:
        try:
            save_huggingface(folder, run.model.config, run.model.params)
        except OSError as error:
            missing.append(f"the weights ({error})")
    if not run.log.write():
        missing.append("the last lines of main.log")

    losses = {"train": run.log.values("train_loss"), "val": run.log.values("val_loss")}
    for name, values in losses.items():
        if values:
            print_now(f"{name:5} loss {values[0]:7.4f} {sparkline(values)} {values[-1]:.4f}")
    best = read_best(folder) if folder else None
    if best:
        print_now(
            f"best val loss {best.val_loss:.4f} at update {best.step} of {args.num_iterations}, "
            f"on {best.val_tokens:,} tokens, in {best_folder(folder)}"
        )

    summary = [f"{run.step} updates"]
    if losses["train"]:
        summary.append(f"train loss {losses['train'][0]:.4f} -> {losses['train'][-1]:.4f}")
    tokens_per_second = updates * args.total_batch_size / seconds
    summary += [f"{seconds:.1f} s", f"{tokens_per_second:.0f} tok/s"]
    go_on = f"go on with {shlex.join(['--output_dir', folder, '--resume', '1'])}"
    if not folder:
        summary.append("nothing is kept without --output_dir")
    elif not missing:
        summary.append(f"saved in {folder}" if complete else go_on)
    print_now(("" if complete else "stopped: ") + ", ".join(summary))

    remedy = go_on if run.saved else "begin again with another --output_dir"
    require(not missing, f"{folder} lacks {' and '.join(missing)}: make room, then {remedy}")


def first_not_finite(model):
    """The first tensor that holds NaN or infinity, in the order in which they are computed."""
    L = model.config.num_layers
    acts = {name: view for name, view in model.acts.items() if not name.startswith("d")}
    for views, first_of in ((model.params, min), (acts, min), (model.grads, max)):
        found = []
        outside = -1  # stands for what comes before the layers, and L for what comes after them
        for number, (name, view) in enumerate(views.items()):
            if '{}' not in HF_NAMES.get(name, ''):
                parts = {outside: view}
            else:
                first = L - len(view)  # what the layers share is the last layer's
                parts = {first + i: part for i, part in enumerate(view)}
                outside = L
            bad = [l for l, part in parts.items() if not np.isfinite(part).all()]
            found += [(l, number, name) for l in bad]
        if found:
            l, _, name = first_of(found)  # backward comes to the last layer first
            return f"{name} of layer {l}" if 0 <= l < L else name
    return None


class FirstBatch:
    """A loader that gives the first batch of another one again and again."""

    position = (0, 0, 0)

    def __init__(self, loader):
        self.batch = loader.next_batch()

    def next_batch(self):
        return self.batch


class Log:
    """What is known of each step, in two files: main.jsonl, and main.log in llm.c's format.

    An entry is a dict of numbers: a step, and what was added to it until it was written. The files
    are begun anew with the entries of the run so far, and then appended to. What can't be written
    now is written with the next entry. Without a folder there are entries and no files.
    """

    def __init__(self, folder, entries=()):
        self.entries = list(entries)
        self.written = {}  # how many of them are in each file
        for name in ("main.log", "main.jsonl") if folder else ():
            path = os.path.join(folder, name)
            with atomic_write(path) as file:
                file.write(log_lines(path, self.entries))
            self.written[path] = len(self.entries)

    def add(self, step, **values):
        """Add values to a step's entry, unless they are there: whoever resumes evaluates again."""
        new = {name: value for name, value in values.items() if not self.has(step, name)}
        in_files = max(self.written.values(), default=0)
        if len(self.entries) > in_files and self.entries[-1]["step"] == step:
            self.entries[-1] |= new
        elif new:
            self.entries.append({"step": step} | new)

    def has(self, step, name):
        """Whether there is such a value of the newest step, which has at most two entries."""
        return any(entry["step"] == step and name in entry for entry in self.entries[-2:])

    def values(self, name):
        """The values of this name, of all entries that have one."""
        return [entry[name] for entry in self.entries if name in entry]

    def write(self):
        """Append what the files lack. Returns False if that can't be done now."""
        return all([self.append(path) for path in self.written])

    def append(self, path):
        """Append what one of the files lacks, likewise."""
        with contextlib.suppress(OSError):
            if not os.path.exists(path):  # somebody has moved it, or its folder, away
                os.makedirs(os.path.dirname(path), exist_ok=True)
                self.written[path] = 0
            with open(path, "ab", buffering=0) as file:
                end, text = file.tell(), log_lines(path, self.entries[self.written[path] :])
                if file.write(text) == len(text):
                    self.written[path] = len(self.entries)
                else:
                    file.truncate(end)  # no half lines
        return self.written[path] == len(self.entries)


def log_lines(path, entries):
    """The lines of entries, as bytes: JSON for main.jsonl, and s:STEP KIND:VALUE for main.log.

    The kinds are trl for a training loss, tel for a validation loss, eval for HellaSwag's acc_norm.
    """
    lines = []
    for entry in entries:
        if path.endswith(".jsonl"):
            lines.append(json.dumps(entry))
            continue
        for name, kind in (("train_loss", "trl"), ("val_loss", "tel"), ("eval", "eval")):
            if name in entry:
                lines.append(f"s:{entry['step']} {kind}:{entry[name]:.4f}")
    return "".join(f"{line}\n" for line in lines).encode()


def sparkline(values, width=50):
    """A row of characters whose heights follow the values."""
    encoding = getattr(sys.stdout, "encoding", "") or ""
    blocks = "▁▂▃▄▅▆▇█" if "utf" in encoding.lower() else "_.-=+*#@"

    groups = np.array_split(values, min(width, len(values)))
    means = np.array([group.mean() for group in groups])
    heights = (means - means.min()) / max(np.ptp(means), 1e-9)
    return "".join(blocks[round(height * 7)] for height in heights.tolist())


def print_now(text, end="\n", to="stdout"):
    """Print at once. That a terminal is gone, or a disk is full, must not end a run."""
    stream = getattr(sys, to)  # None, if it was closed before the program began
    with contextlib.suppress(OSError, ValueError):
        if stream:
            stream.write(f"{text}{end}")  # at one go: the lines of several processes don't mix
            stream.flush()


class Progress:
    """A line on the terminal that says what takes so long. It appears after two seconds.

    with Progress("validating") as progress: progress.done = 0.5
    """

    def __init__(self, what):
        self.what = what
        self.done = None  # a fraction, where it is known

    def __enter__(self):
        self.started = time.monotonic()
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.show, daemon=True)
        if sys.stderr and sys.stderr.isatty():
            self.thread.start()
        return self

    def __exit__(self, *error):
        self.ended.set()
        if self.thread.is_alive():
            self.thread.join()

    def show(self):
        """Write the line anew each second, and erase it in the end."""
        while not self.ended.wait(1.0):
            seconds = time.monotonic() - self.started
            if seconds > 2:
                done = self.done
                estimate = f", {seconds / done - seconds:.0f} s left" if done else ""
                line = f"{self.what}: {seconds:.0f} s{estimate}"
                width = shutil.get_terminal_size().columns - 1  # a wrapped line can't be erased
                print_now(f"\r\033[K{line[-width:]}", end="", to="stderr")
        if time.monotonic() - self.started > 2:
            print_now("\r\033[K", end="", to="stderr")


# --------------------------------------------------------------------------------------------------
# 12. Checkpoints
#
# A checkpoint is one file, DIR/checkpoint_STEP.safetensors. It holds the parameters under Hugging
# Face's names; "m" and "v", each one row laid out like the parameters; in the metadata the number
# of heads and, as JSON, the state of the run; and at the end a checksum of everything before it. It
# is written under another name and then renamed, and the last two are kept. The state is that
# before the evaluation of its step: whoever resumes the run evaluates again.

# The fields of Run.state.
STATE = {"step": int, "position": list, "data": dict, "settings": dict}


def list_checkpoints(folder):
    """The checkpoints in a folder, newest first."""
    if not folder:
        return []
    pattern = os.path.join(glob.escape(folder), f"checkpoint_{'[0-9]' * 8}.safetensors")
    return sorted(glob.glob(pattern), reverse=True)


def save_checkpoint(run):
    """Write DIR/checkpoint_STEP.safetensors, and delete all before it but one.

    Of several processes the first one writes, and the others send it their parts of m and v. They
    do so even if it can't write them: it takes what is left of them all the same.
    """
    model, world, folder, state = run.model, run.world, run.args.output_dir, run.state()
    metadata = {"n_head": str(model.config.num_heads), "state": json.dumps(state)}
    rows = {"m": model.flat[2], "v": model.flat[3]}
    moments = {name: (row.shape, world.pieces(row)) for name, row in rows.items()}
    newest = os.path.join(folder, f"checkpoint_{state['step']:08d}.safetensors")
    try:
        if world.rank == 0:
            os.makedirs(folder, exist_ok=True)
            for half in glob.glob(os.path.join(glob.escape(folder), "checkpoint_*.tmp")):
                os.remove(half)  # a killed run has left it
            tensors = huggingface_tensors(model.params) | moments
            write_safetensors(newest, tensors, metadata, checksum=True)
    finally:
        for _, pieces in moments.values():
            for _ in pieces:
                pass

    if world.rank == 0:
        # There may be damaged ones of later steps. They do not count.
        until_now = [path for path in list_checkpoints(folder) if path <= newest]
        for old in until_now[2:]:
            with contextlib.suppress(OSError):
                os.remove(old)


def read_state(path):
    """(state, {name: StoredTensor}) of a checkpoint. InputError unless all is as it was written."""
    tensors, metadata = read_safetensors(path)
    stored = tensors.get("crc32")
    require(stored and stored.shape == (4,), f"{path}: not a checkpoint, it has no checksum")

    crc32 = 0
    with open(path, "rb") as file:
        for start in range(0, stored.offset, 1 << 20):
            crc32 = zlib.crc32(file.read(min(1 << 20, stored.offset - start)), crc32)
        found = int.from_bytes(file.read(4), "little")
    require(crc32 == found, f"{path}: its data does not match its checksum")

    state = parse_json(str(metadata.get("state")).encode(errors="surrogatepass"), path)
    right = all(type(state.get(name)) is kind for name, kind in STATE.items())
    right = right and are_sizes([state["step"], *state["position"]]) and len(state["position"]) == 3
    right = right and state["settings"].keys() <= DEFAULTS.keys()
    right = right and not state["settings"].get("inference_only")
    require(right, f"{path}: its state is not as expected")
    words = [f"--{name}={value}" for name, value in state["settings"].items()]
    state["settings"] = parse_flags(words)
    return state, tensors


def load_checkpoint(path, named, world):
    """(args, model, state) of a checkpoint, with the flags in `named` that may change."""
    state, tensors = read_state(path)
    changed = {name: value for name, value in named.items() if name in FLAGS_THAT_MAY_CHANGE}
    args = SimpleNamespace(**DEFAULTS | state["settings"] | changed)

    config, parameters = open_weights(path)
    model = make_model(args, config, world)
    with Progress(f"reading {path}"):
        read_weights(model.params, parameters)
        for name, row in (("m", model.flat[2]), ("v", model.flat[3])):
            stored = tensors.get(name)
            right = stored and (stored.dtype, stored.shape) == ("F32", row.shape)
            require(right, f"{path}: {name} is not as expected")
            own = world.part(len(row))  # a slice: other processes may have the rest
            read_tensor(row[own], stored._replace(offset=stored.offset + 4 * own.start), name)
    model.updates = state["step"]
    return args, model, state


def resume(named, world):
    """load_checkpoint of the newest whole checkpoint in --output_dir. None if there is none."""
    folder = named["output_dir"]
    paths = list_checkpoints(folder)
    for path in paths:
        try:
            args, model, state = load_checkpoint(path, named, world)
        except (InputError, OSError) as error:
            print_now(f"{path} is damaged: {error}: taking the one before it")
            continue
        refuse_changed_flags(args, named)
        print_now(f"resuming from {path}")
        return args, model, state

    require(not paths, f"no checkpoint in {folder} is whole: choose another --output_dir")
    require(
        not holds_weights(folder),
        f"{folder} holds weights, but no checkpoint to resume from: fine-tune from them with "
        f"--model {shlex.quote(folder)} and another --output_dir",
    )
    others = glob.glob(os.path.join(glob.escape(os.path.dirname(folder)), "*", "checkpoint_*"))
    close = difflib.get_close_matches(folder, sorted(set(map(os.path.dirname, others))))
    meant = f": did you mean {shlex.quote(close[0])}?" if close else ""
    print_now(f"{folder} holds NO RUN TO RESUME, so a new one begins{meant}")
    return None


def old_entries(folder, step):
    """The entries of main.jsonl up to a step. Half a line, which a killed run left, is left out."""
    path, other = os.path.join(folder, "main.jsonl"), os.path.join(folder, "main.log")
    if not os.path.exists(path):
        alone = os.path.exists(other)  # it would be begun anew, without the lines that it has
        require(not alone, f"{folder} has main.log, but no main.jsonl: put it back, or move both")
        return []
    regular_file(path)
    entries = []
    with open(path, "rb") as file:
        for line in file:
            with contextlib.suppress(InputError):
                entry = parse_json(line, path)
                numbers = all(type(x) in (int, float) and abs(x) < 1e300 for x in entry.values())
                if numbers and type(entry.get("step")) is int and entry["step"] <= step:
                    entries.append(entry)
    lost = step - len({entry["step"] for entry in entries if "train_loss" in entry})
    if lost:
        print_now(f"{path} lacks {lost} of {step} updates, and the logs go on without them")
    return entries


def refuse_changed_flags(args, named):
    """InputError if a flag is named that a resumed run can't change."""
    clashes = []
    for name, value in named.items():
        before = getattr(args, name)
        if value != before:
            clashes.append(f"--{name} {value!r} (it was {before!r})")
    require(
        not clashes,
        f"the run in {args.output_dir} can't go on with {', '.join(clashes)}: leave that out, or "
        "start another",
    )


def refuse_used_folder(folder):
    """InputError if a folder holds a run, which a new run would overwrite."""
    log = os.path.join(folder, "main.log")
    used = holds_a_model(folder) or os.path.exists(log) and os.path.getsize(log) > 0
    require(
        not used,
        f"{folder} holds a run: go on with --resume 1, or choose another --output_dir",
    )


def holds_a_model(folder):
    """Whether a folder holds weights, or checkpoints of a run, or its best weights."""
    weights = holds_weights(folder) or holds_weights(best_folder(folder))
    return weights or bool(list_checkpoints(folder))


@contextlib.contextmanager
def folder_locked(folder):
    """Keep a folder to this process. If it was made for it and stays empty, it is removed again."""
    was_there = os.path.isdir(folder)
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, ".lock")
    try:
        with open(path, "ab") as handle:
            take_lock(handle, folder)
            yield
    finally:
        if not was_there and os.listdir(folder) == [".lock"]:
            with contextlib.suppress(OSError):
                os.remove(path)
                os.rmdir(folder)


def take_lock(handle, folder):
    """Lock an open file until it is closed. InputError if another process has locked it."""
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(handle.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise InputError(
            f"{folder}: another run is writing there: choose another --output_dir"
        ) from None
    except OSError:
        pass  # this file system has no locks


# 13. The command line

# name: (default, meaning). The defaults are those of llm.c's CPU trainer.
FLAGS_OF_A_RUN = {
    "model": (
        "gpt2",
        "gpt2[-medium, -large, -xl]; d6, d12, d24, d36, d48 or bytes: fresh weights; or a folder, "
        ".safetensors or .bin",
    ),
    "batch_size": (4, "B, sequences per batch"),
    "sequence_length": (64, "T, tokens per sequence (only generating: the whole context)"),
    "total_batch_size": (0, "tokens per update of all processes; 0: B*T times their number"),
    "learning_rate": (1e-4, "its peak"),
    "warmup_iters": (0, "updates over which it rises to the peak"),
    "learning_rate_decay_frac": (1.0, "fraction of the peak to which a cosine takes it in the end"),
    "weight_decay": (0.0, "AdamW's, on matrices and embeddings"),
    "grad_clip": (0.0, "largest norm of the gradient; 0: any"),
    "shuffle": (0, "1: the passages of the text in a new order each epoch (fresh weights: 1)"),
    "inference_only": (0, "1: continue --prompt, and train nothing"),
    "overfit_single_batch": (0, "1: train on the first batch again and again"),
    "recompute": (1, "0: store all; 1: compute layernorm and GELU again in backward; 2: layers"),
    "seed": (1337, "of fresh weights, of the order of passages and of samples"),
}
FLAGS_THAT_MAY_CHANGE = {
    "input_bin": ("data/tiny_shakespeare_train.bin", "training tokens: a path or a glob pattern"),
    "input_val_bin": ("data/tiny_shakespeare_val.bin", "validation tokens, likewise"),
    "output_dir": ("", "where weights, log and checkpoints go; nowhere if empty"),
    "num_iterations": (40, "updates"),
    "val_loss_every": (10, "updates between validations; 0: none"),
    "val_max_steps": (0, "batches per validation; 0: 1,280 tokens (30,720 bytes), for any B"),
    "hellaswag_eval": (0, "1: score the model on HellaSwag after every validation"),
    "hellaswag_limit": (0, "use the first so many examples of HellaSwag; 0: all 10042"),
    "sample_every": (20, "updates between samples; 0: none"),
    "log_every": (0, "updates between printed lines; 0: so that there are 40 to 100 of them"),
    "checkpoint_every": (0, "updates between checkpoints; 0: only at the end, or when stopped"),
    "resume": (0, "1: go on from the newest whole checkpoint in --output_dir"),
    "prompt": ("", "text to continue; if empty, a new text begins"),
    "max_new_tokens": (64, "length of a sample, in tokens"),
    "top_k": (0, "sample among the k likeliest; 0: among all"),
    "temperature": (1.0, "of samples: below 1 more cautious, above 1 wilder, 0 the likeliest"),
}
FLAGS = FLAGS_OF_A_RUN | FLAGS_THAT_MAY_CHANGE
DEFAULTS = {name: default for name, (default, _) in FLAGS.items()}
RANGES = {  # all other numbers are at least 0
    "batch_size": (1, math.inf),
    "sequence_length": (1, math.inf),
    "recompute": (0, 2),
}

# --model bytes: what trains where nothing can be fetched. Its vocabulary is the 256 bytes.
BYTES_CONFIG = GPT2Config(64, 256, 2, 4, 128)
BYTES_DEFAULTS = {
    "model": "bytes",
    "input_bin": "",
    "input_val_bin": "",
    "batch_size": 16,
    "num_iterations": 1400,
    "learning_rate": 4e-3,
    "warmup_iters": 100,
    "learning_rate_decay_frac": 0.05,
    "recompute": 0,
    "weight_decay": 0.1,
    "grad_clip": 1.0,
    "shuffle": 1,
    "val_loss_every": 350,
    "sample_every": 1400,
    "max_new_tokens": 400,
    "temperature": 0.6,
}

EXAMPLES = """

    python train_gpt2.py
        fine-tunes GPT-2 124M on Shakespeare

    python train_gpt2.py --model d6 --num_iterations 200 --learning_rate 1e-3 --output_dir data/d6
        trains a small model from scratch and keeps it

    python train_gpt2.py --model data/d6 --inference_only 1 --prompt "To be, or"
        lets a model continue a text

Environment: OPENBLAS_NUM_THREADS is the number of threads, by default that of the cores
"""


class UsageError(InputError):
    """Flags that make no sense."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises its errors. A checkpoint's flags come to it as well."""

    def error(self, message):
        raise UsageError(f"{message} (--help lists all flags)")


def flag_type(name):
    """A function from the text of a flag to its value."""
    kind = type(DEFAULTS[name])
    low, high = RANGES.get(name, (0, math.inf))
    expected = {int: "a whole number", float: "a number", str: "a text"}[kind]
    expected += f" of at least {low}" if high == math.inf else f" from {low} to {high}"

    def convert(text):
        try:
            value = kind(text)
            right = kind is str or low <= value <= high and value < 1 << 63
        except ValueError:
            right = False
        if not right:
            raise argparse.ArgumentTypeError(f"expected {expected}, not {text!r}")
        return value

    return convert


def parse_flags(argv):
    """The flags that argv names: {flag: value}. UsageError if they make no sense."""
    parser = Parser(usage=EXAMPLES, argument_default=argparse.SUPPRESS, allow_abbrev=False)
    groups = {"what a run is": FLAGS_OF_A_RUN, "what may change later": FLAGS_THAT_MAY_CHANGE}
    for title, flags in groups.items():
        group = parser.add_argument_group(title)
        for name, (default, meaning) in flags.items():
            text = f"{meaning} (default: {default!r})".replace("%", "%%")
            group.add_argument(f"--{name}", type=flag_type(name), metavar="X", help=text)

    for argument in argv:
        if argument.endswith("=--"):  # argparse takes the value -- for the end of the flags
            parser.error(f"{argument}: the value can't be --")
    return vars(parser.parse_args(argv))


def check_flags(named):
    """InputError if two flags do not go together, or the prompt is empty."""
    require(
        named.get("prompt") != "",
        "--prompt is empty: give it some text, or leave the flag out",
    )
    for name in ("checkpoint_every", "resume"):
        alone = named.get(name) and not named.get("output_dir")
        require(not alone, f"--{name} needs --output_dir")
    both = named.get("hellaswag_eval") and named.get("inference_only")
    require(
        not both,
        "--hellaswag_eval scores a model while it trains; without training: python -m "
        "extras.hellaswag --model ...",
    )


def settings(named):
    """The value of every flag, from those that were typed: `named`, {flag: value}.

    What was not typed has the default of this kind of model.
    """
    model = named.get("model", DEFAULTS["model"])
    of_its_kind = BYTES_DEFAULTS if model == "bytes" else {"shuffle": int(model in FRESH)}
    return SimpleNamespace(**DEFAULTS | of_its_kind | named)


def memory_plan(args, config, size=1):
    """The bytes that a model takes on one of `size` processes, by what they are for: a dict."""
    training = not args.inference_only
    params = 4 * count(GPT2.param_shapes(config))
    acts = GPT2.act_shapes(config, args.batch_size, args.sequence_length, args.recompute, training)

    plan = {"parameters": params}
    if training:
        plan["gradients"] = params
        plan["moments"] = 2 * params // size
    plan["activations"] = 4 * count(acts)
    return plan


def make_model(args, config, world):
    """Print the memory plan, and make the model. MemoryError if the machine has too little."""
    B, T, most = args.batch_size, args.sequence_length, config.max_seq_len
    fits = T <= most
    require(fits, f"the model's context is {most}: use --sequence_length {most} or less")
    plan = memory_plan(args, config, world.size)
    need = sum(plan.values())
    free = available_memory() / world.local_size

    sizes = ", ".join(f"{name} {value}" for name, value in asdict(config).items())
    print_now(f"model: {plan['parameters'] // 4:,} parameters: {sizes}")
    parts = ", ".join(f"{name} {nbytes / 1e6:.0f}" for name, nbytes in plan.items())
    whose = f" in each of {world.size} processes" if world.size > 1 else ""
    print_now(f"memory{whose}: {parts}, in all {need / 1e6:.0f} MB")

    if need > free:  # not an InputError: a checkpoint that does not fit is not damaged
        logits = GPT2.act_shapes(config, B, T)["logits"]
        per_sequence = (plan["activations"] - 4 * math.prod(logits)) / B
        fitting = int(B - (need - free) / per_sequence)
        remedy = f"--batch_size {fitting}" if fitting > 0 else "a smaller --model"
        raise MemoryError(
            f"B={B}, T={T} needs {need / 1e6:.0f} MB, {free / 1e6:.0f} MB are free: try {remedy}"
        )
    return GPT2(config, B, T, None, args.recompute, training=not args.inference_only)


def begin(named, world):
    """(args, model) of a new run."""
    args = settings(named)
    if args.model in (*FRESH, *OPENAI, "bytes"):
        refuse_two_meanings(args.model)
    try:
        path = fetch(args, named)
    except (InputError, OSError) as error:
        if {"model", "input_bin", "input_val_bin", "inference_only", "resume"} & named.keys():
            raise  # what was asked for by name is not replaced by something else
        cause = getattr(error.__cause__, "cause", error)  # without prepro's advice
        print_now(f"{cause}\n--> so a small GPT will learn from scratch, by bytes")
        if os.path.exists(in_data("tiny_shakespeare_train.bin")):
            print_now("    (the tokens of GPT-2 are here: --model d6 would learn them)")
        args, path = settings(named | {"model": "bytes"}), None

    if args.model == "bytes":
        config = BYTES_CONFIG
    elif args.model in FRESH:
        L, C = FRESH[args.model]
        config = GPT2Config(1024, 50257, L, C // 64, C)
    else:
        config, tensors = open_weights(path)

    if args.inference_only:
        args.batch_size = 1
        args.sequence_length = named.get("sequence_length", config.max_seq_len)
    if args.total_batch_size == 0:
        args.total_batch_size = args.batch_size * args.sequence_length * world.size
    count_micro_batches(args, world.size)  # an error if there is no such number

    model = make_model(args, config, world)
    with Progress(f"reading {path}" if path else "drawing weights"):
        if path:
            read_weights(model.params, tensors)
        else:
            model.init_weights(args.seed)
    return args, model


def fetch(args, named):
    """Fetch a run's tokens and weights, if need be. Returns the path of the weights, or None."""
    path = None
    if args.model not in (*FRESH, *OPENAI, "bytes"):
        path = find_weights(args.model)  # an error if it is not there, before anything is fetched

    data_named = {"input_bin", "input_val_bin"} & named.keys()
    if data_named == {"input_bin"} and args.val_loss_every:
        raise InputError("--input_bin without its --input_val_bin: name it, or --val_loss_every 0")
    if data_named == {"input_val_bin"}:
        raise InputError("--input_val_bin without its --input_bin: name that too")
    of_bytes = path and open_weights(path)[0].vocab_size == 256
    if of_bytes and not data_named:
        args.input_bin = args.input_val_bin = ""  # the text at hand, as for --model bytes
    elif not args.inference_only and args.model != "bytes" and not data_named:
        paths = [in_data(f"tiny_shakespeare_{name}.bin") for name in ("train", "val")]
        there = all(map(os.path.exists, paths))
        args.input_bin, args.input_val_bin = paths if there else provide("tiny_shakespeare")

    return find_weights(args.model) if args.model in OPENAI else path


def open_data(args, config, world, state):
    """(loader, val_loader, data) of a run, where data are the checksums of all shards.

    InputError if the data is not what it was when the run began.
    """
    sources = {"training": args.input_bin, "validation": args.input_val_bin}
    wanted = ["training", "validation"] if args.val_loss_every else ["training"]
    if config.vocab_size == 256 and not args.input_bin:
        names, *texts = text_at_hand()
        sources = {"training": names, "validation": names}
        shards = {what: [text] for what, text in zip(wanted, texts, strict=False)}
    else:
        shards = {what: open_shards(sources[what]) for what in wanted}

    data = dict(state["data"])
    for what, files in shards.items():
        with Progress(f"checking the {what} tokens"):
            found = [check_shard(shard, args, config) for shard in files]
        require(
            data.get(what, found) == found,
            f"the {what} data has changed since this run began: put it back, or start another run",
        )
        data[what] = found
        print_now(f"{what} data: {sources[what]}, {sum(n for n, _ in found):,} tokens")

    B, T = args.batch_size, args.sequence_length
    loader = DataLoader(shards["training"], B, T, args.seed if args.shuffle else None)
    shard, offset, _ = state["position"]
    right = shard < len(loader.shards) and offset + B * T < len(loader.shards[shard])
    require(right, f"the run stopped at {state['position']}, which is not in the training data")
    loader.seek(state["position"])
    loader = world.share_loader(loader)
    if args.overfit_single_batch:
        loader = FirstBatch(loader)
    val_loader = None
    if args.val_loss_every:
        val_loader = world.share_loader(DataLoader(shards["validation"], 1, T))  # see validate
    return loader, val_loader, data


def check_shard(shard, args, config):
    """[number of tokens, CRC-32] of a shard. InputError if it can't serve the model."""
    name = getattr(shard, "path", "the text")
    B, T, V = args.batch_size, args.sequence_length, config.vocab_size
    require(
        len(shard) > B * T,
        f"{name}: has {len(shard)} tokens, a batch needs B*T + 1 = {B * T + 1}: use a smaller "
        + ("--sequence_length" if B == 1 else "--batch_size"),
    )
    crc32, highest = 0, 0
    for start in range(0, len(shard), 1 << 20):
        piece = np.ascontiguousarray(shard[start : start + (1 << 20)])
        crc32 = zlib.crc32(piece, crc32)
        highest = max(highest, int(piece.max()))

    kinds = {0: "unknown", 256: "bytes", 50257: "GPT-2's"}
    theirs = getattr(shard, "vocab_size", 256)
    fits = theirs in (0, V) or theirs == 50257 and is_gpt2s(V)
    require(
        fits and highest < V,
        f"{name}: its tokens are {kinds.get(theirs, f'of {theirs}')}, up to {highest}, and those "
        f"of the model are {kinds.get(V, f'of {V}')}: write its text anew with python "
        "prepro_tinyshakespeare.py --input my.txt" + (" --bytes 1" if V == 256 else ""),
    )
    return [len(shard), crc32]


def open_tokenizer(args, vocab_size):
    """The tokenizer of a run. None, and a line that says why, if there can't be samples."""
    try:
        tokens = tokenizer(vocab_size)
        if args.prompt:
            tokens.encode(args.prompt)
    except InputError as error:
        if args.inference_only:
            raise
        cause = getattr(error.__cause__, "cause", error)  # without prepro's advice
        print_now(f"{cause}; so there will be no samples")
        return None
    if vocab_size != 256 and not is_gpt2s(vocab_size):
        print_now(f"samples are printed as ids: {vocab_size} tokens are neither bytes nor GPT-2's")
    if "<|endoftext|>" in args.prompt:
        print_now("note: <|endoftext|> in a prompt is thirteen characters, not the token")
    return tokens


def open_examples(args, config):
    """HellaSwag's examples, fetched if need be."""
    with project_file():
        from extras import hellaswag

        return hellaswag.load(args.hellaswag_limit, config.vocab_size, config.max_seq_len)


def one_process():
    """What extras/processes.py does for several processes, for one."""
    signals = []
    return SimpleNamespace(
        rank=0,
        size=1,
        local_size=1,
        asked=signals,  # the numbers of the signals that have come to this process
        stopped=signals,  # and of those that all processes know of
        part=lambda n: slice(0, n),
        pieces=lambda row: iter([row]),
        share_model=lambda model: model,
        share_loader=lambda loader: loader,
        difference=lambda facts: "",
        gathered=lambda value, what: [value],
        report=lambda line: print_now(line, to="stderr"),
        end_all=lambda code: code,
    )


def join_processes():
    """The processes that mpiexec has started, or one_process()."""
    names = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")  # Open MPI; MPICH, Intel MPI, Microsoft MPI
    if all(os.environ.get(name, "1") == "1" for name in names):
        return one_process()
    with project_file():
        from extras import processes

        return processes.join()


def require_alike(world, facts):
    """InputError unless all processes have the same facts: a function that gives {name: value}."""
    if world.size > 1:
        difference = world.difference(facts())
        require(not difference, difference)


@contextlib.contextmanager
def signals_noted(asked, while_training):
    """While this lasts, signals are added to the list `asked` instead of ending the program.

    While training, Ctrl-C, SIGTERM, SIGHUP and SIGUSR1 finish the step first; the same signal once
    more ends the program at once. SIGPIPE comes from a reader that has enough, as in `| head`, and
    is noted in silence.
    """

    def note(number, frame):
        if number in asked:
            os._exit(128 + number)
        asked.append(number)
        with contextlib.suppress(OSError, AttributeError, ValueError):
            # print() may be what the signal has interrupted, so it can't be used here
            message = b"\nfinishing this step; once more, and it stops at once\n"
            os.write(sys.stdout.fileno(), message)

    names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if while_training else ()
    handlers = {getattr(signal, name): note for name in names if hasattr(signal, name)}
    if hasattr(signal, "SIGPIPE"):
        handlers[signal.SIGPIPE] = lambda number, frame: asked.append(number)
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        handlers.pop(signal.SIGHUP, None)  # started with nohup
    if threading.current_thread() is not threading.main_thread():
        handlers = {}  # only the main thread may set them

    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_command(named, world):
    """Continue a prompt, or train. Returns whether it was done to its end."""
    folder = named.get("output_dir")
    if folder and not named.get("inference_only") and not named.get("resume"):
        refuse_used_folder(folder)

    found = resume(named, world) if named.get("resume") else None
    args, model, saved = found or (*begin(named, world), None)
    state = saved or {"step": 0, "position": [0, 0, 0], "data": {}}
    config, step = model.config, state["step"]

    tokens = None
    if args.inference_only or args.sample_every:
        tokens = open_tokenizer(args, config.vocab_size)
    if args.inference_only:
        show = functools.partial(print, flush=True)  # here a text that can't be printed is an error
        with signals_noted(world.asked, while_training=False):
            with contextlib.suppress(BrokenPipeError):  # but for a reader that has enough
                print_sample(args, model, tokens, 0, world.asked, show)
        return True

    loader, val_loader, data = open_data(args, config, world, state)
    examples = open_examples(args, config) if args.hellaswag_eval else None
    require_alike(world, lambda: {
        "data": data, "weights": zlib.crc32(model.flat[0]), "settings": vars(args)
    })  # fmt: skip
    if not folder:
        print_now("nothing of this run will be kept: --output_dir names a folder to keep it in")
    entries = old_entries(folder, step) if saved else []
    log = Log(folder if world.rank == 0 else "", entries)
    shared = world.share_model(model)
    run = Run(args, world, shared, loader, val_loader, data, tokens, examples, log, step, saved)
    describe(run)
    try:
        with signals_noted(world.asked, while_training=True):
            return train(run)
    except FloatingPointError as error:  # in all processes, though perhaps by the data of one
        places = world.gathered(first_not_finite(model), "the search for what is not finite")
        place = next(filter(None, places), "a sum over all of them")
        raise InputError(
            f"update {run.step + 1}: {error}; it began in {place}: try a smaller --learning_rate, "
            "or --grad_clip 1"
        ) from None
    finally:
        log.write()


def main(argv=None):
    """Run the command line. Returns the exit code.

    0; 1 for what a one-line error explains; 2 for the flags; 128 + its number after a signal.
    """
    world = one_process()
    try:
        world = join_processes()
        share_cores(world.local_size)
        named = parse_flags(sys.argv[1:] if argv is None else argv)
        check_flags(named)
        require_alike(world, lambda: {
            "flags": named,
            "code": zlib.crc32(np.fromfile(__file__, np.uint8)),
            "NumPy": np.__version__,
        })  # fmt: skip

        lock = contextlib.nullcontext()
        if named.get("output_dir") and not named.get("inference_only") and world.rank == 0:
            lock = folder_locked(named["output_dir"])
        with lock, warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # what overflows is found by its loss
            complete = run_command(named, world)
        return 0 if complete else 128 + world.stopped[0]
    except KeyboardInterrupt:
        return world.end_all(130)
    except (InputError, OSError, MemoryError) as error:
        world.report(f"error: {error}")
        return world.end_all(2 if isinstance(error, UsageError) else 1)
    except Exception:
        if world.size == 1:
            raise
        traceback.print_exc()
        return world.end_all(1)


def flush_at_last():
    """Forget what can't be written, or Python would fail to, and change the exit code."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream:
                stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


if __name__ == "__main__":
    if sys.stdout:
        sys.stdout.reconfigure(errors="replace")  # a sample may hold what a terminal can't show
    exit_code = main()
    flush_at_last()
    sys.exit(exit_code)
