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
file needs no other of this project: only NumPy, and tiktoken to turn text into GPT-2's tokens.

Throughout this program we have (with the default values)

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

    1. The gradient of an activation is overwritten, unless it is that of the residual stream.
    2. The gradient of the residual stream is added to, because each line with += uses x twice: in
       the layernorm, and in the addition. It starts each backward pass as 0.
    3. The gradient of a parameter is overwritten by the first batch of a step and added to by later
       ones, if several (then called micro-batches) make one step. The argument `add` says which.

wte is also the matrix of the last line, the classifier. So dwte is written twice: first by the
classifier, in forward(), following rule 3; then by encoder_backward, which always adds.

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
# attention, it allocates itself; that is small beside the blob.
#
# Names and arguments are those of llm.c where there is no reason against it. Two orders differ: its
# layernorm_backward has weight before mean, and its gelu_backward has inp before dout.


def encoder_forward(out, inp, wte, wpe):
    """Each token becomes the sum of its own embedding and that of its position.

    out (B, T, C); inp (B, T) token ids; wte (V, C); wpe (T, C), the rows of these T positions

        out[b, t] = wte[inp[b, t]] + wpe[t]
    """
    np.take(wte, inp, axis=0, out=out, mode="clip")  # the default copies out first; ids are < V
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
        dwpe[T:] = 0  # these positions had no token; logits may lie there: see room_for_logits


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

    Call r a row, one of the B*T pairs (b, t). The forward pass is

        out[r, o] = sum over c of inp[r, c] * weight[o, c] + bias[o]

    so the loss depends on inp[r, c] through every o, and on weight[o, c] through every r:

        dinp[r, c]    = sum over o of dout[r, o] * weight[o, c]       dinp    = dout @ weight
        dweight[o, c] = sum over r of dout[r, o] * inp[r, c]          dweight = dout.T @ inp
        dbias[o]      = sum over r of dout[r, o]                      dbias   = ones @ dout

    The last sum, too, is taken as a matrix product, because BLAS sums fastest.
    """
    dout = rows_of(dout)
    inp = rows_of(inp)

    jobs = [(rows_of(dinp), dout, weight, False, None), (dweight, dout.T, inp, add, None)]
    if dbias is not None:
        ones = np.ones((1, len(dout)), dout.dtype)  # (1, B*T)
        jobs.append((dbias[np.newaxis], ones, dout, add, None))
    products(*jobs)


def products(*jobs):
    """Matrix products, right in any order. A job is (out, a, b, add, bias).

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

# Added to the scores of ATT_ROWS positions as queries (rows) and the same positions as keys
# (columns). It makes them -inf where the key comes later than the query.
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
    training n is T. Behind the line, n may be only the new tokens of a text, and T counts the
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
    complete in one block, and for a long text the memory that it takes grows with T, not with its
    square. A block is compared with the keys up to its own end only, which saves nearly half of a
    long text's work. What is kept is lse, one number for each query and head, the natural logarithm
    of the softmax's denominator: with it, backward computes att again (Dao et al., 2022).
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
        lse[:, :, start:stop] = np.log(total) + peak  # + peak, which was subtracted

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

        num_keys = t1 - t0
        preatt = q[:, :, t0:] @ k[:, :, t0:t1].mT  # (B, NH, T - t0, num_keys)
        preatt[:, :, :num_keys] += HIDE_FUTURE[:num_keys, :num_keys]
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
    b, t = np.ogrid[:B, :T]  # (B, 1) and (1, T), which index every token
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


# These functions are right for any part of a batch, too. Behind the line, in the section on
# threads, most of them are wrapped, as in gelu_forward = by_rows(gelu_forward, "out inp"): the new
# gelu_forward cuts its arguments into blocks of rows that fit a core's cache (attention's into
# blocks of heads), lets the cores share the blocks, and calls the function above for each.

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
# array, the blob. So no layer's output is allocated while training goes on, and the norm,
# checkpoints and several processes see each of its first four rows as one vector. The blob begins
# as zeros. The operating system finds memory for a part of it when that is first written to, so
# parts to which nothing is ever written take none.
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
    the gradients hold: 0 after update(), one more after each backward(). Gradients are computed in
    backward() and, at the end of forward(), in the classifier.
    """

    CLASSIFIER = "wte"  # the classifier's matrix, which must be the first parameter

    # The two tables: param_shapes and act_shapes. layer_params and layer_acts are a layer's part.

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
        everything; use it to look at all activations. 1 computes layernorm and
        GELU again, which takes 1 to 2 % of a step; the outputs of attproj and fcproj are not needed
        again. 2 keeps residual3 alone, and computes the next layer again from it. Without a
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
            "dresidual": (B, T, C),  # the gradient of the residual stream, from last to first
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

        self.micro_batch = 0  # how many micro-batches the gradients hold
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

        In the chapter start is 0. Behind the line, a text that grows is read in parts: acts["qkv"]
        holds the keys and values of the positions before start already, so that only the n new
        positions are computed. Returns lnf (B, n, C).
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

        whole   False: only what the layer's backward pass reads, not the last two lines
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

        weight (V, C) is the classifier's matrix. If dweight, its gradient, and dloss, how much one
        token's loss counts, are given, acts["dlnf"] and dweight are written, too.

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
        gradients_are_free = dweight is not None and not add
        room = self.room_for_logits(weight) if gradients_are_free else self.acts["logits"]
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

        After the forward pass of the first micro-batch, backward will overwrite all gradients but
        that of the classifier's matrix, weight (V, C). For 124M there is room for 1708 tokens,
        where acts["logits"] has 256, and larger pieces make the products faster, by 4 % of a step
        at B*T = 1024. Later micro-batches and validation must leave the gradients alone.
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
        """Fill grads with the gradients of the last forward pass, which must be a training one.

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
            if l < self.config.num_layers - 1:  # the last layer's are still in the shared memory
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
        self.micro_batch = 0  # the next batch overwrites the gradients, so nothing is cleared

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
    """One update from the loader's next micro_batches batches: (loss, norm before clipping).

    grad_clip   a gradient whose norm is larger is scaled down to this norm; 0 never scales

    FloatingPointError if the loss or the norm is not finite. The parameters are unchanged then.
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
    """Continue a list of at least one token id: yields each new id once it is known.

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
    """A token id drawn from softmax(logits / temperature), of the top_k likeliest, or 0: of all.

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
# From here on the file deals with callers, files and processes, and imports what they need.

import argparse
import codecs
import contextlib
import ctypes
import functools
import glob
import inspect
import itertools
import json
import os
import queue
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
import warnings
import zlib
from dataclasses import asdict, field, replace
from datetime import timedelta
from pathlib import Path

if sys.version_info < (3, 10):
    sys.exit(f"error: Python {sys.version.split()[0]} is too old: install Python 3.10 or newer")
if tuple(map(int, np.__version__.split(".")[:2])) < (2, 1):
    sys.exit(f'error: NumPy {np.__version__} is too old: pip install -U "numpy>=2.1"')


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


class GPT2(Model):
    """A GPT-2 that checks what it is given, and in which order it is called.

    The arguments are those of Model; a sequence_length of 0 is the model's context. So are forward,
    backward, grad_norm and update; a call that can't be made now is an InputError and changes
    nothing. `stage` says how far a step is:

        "no gradients"    forward() is next
        "first forward"   that of the first micro-batch is done, backward() is next
        "gradients"       grads hold those of all micro-batches so far. update() is next, or
                          forward() of another micro-batch
        "later forward"   that of a later micro-batch is done, backward() is next

    `interrupted` names a call that was left with its work half done, or is None. zero_grad() makes
    it possible to go on. After update(), some parameters have taken the step and others have not,
    and only a checkpoint has them as they were.

    Several threads may use a model. One passes through the layers at a time.
    """

    FREE = ("no gradients", "first forward", "gradients")  # when any pass through is allowed
    PROCESSES = 1  # that train one model, and have a part of m and v each: extras/processes.py

    def __init__(self, config, batch_size=4, sequence_length=64, seed=1337, recompute=1,
                 training=True, dtype=np.float32):  # fmt: skip
        self.check_config(config)
        most = config.max_seq_len
        T = sequence_length or most
        require(batch_size > 0, f"batch size {batch_size}: expected at least 1")
        require(0 < T <= most, f"sequence length {T}: expected 1 to {most}, the model's context")
        require(recompute in (0, 1, 2), f"recompute is {recompute!r}, expected 0, 1 or 2")
        kind = np.dtype(dtype).name
        right = kind in ("float32", "float64")
        require(right, f"dtype is {kind}, expected float32 or float64")

        self.interrupted = None
        self.vocabulary = usual_vocabulary(config.vocab_size)
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
        self.lock = threading.RLock()

    def __getstate__(self):
        """For copy and pickle: all but what cut_blob makes anew, views of the other blob."""
        made = {"flat", "params", "grads", "m", "v", "acts", "keys", "lock"}
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
        config, tensors, vocabulary = open_weights(find_weights(os.fspath(source)))
        model = cls(config, batch_size, sequence_length, None, recompute, training)
        copy_tensors(huggingface_views(model.params), tensors)
        model.vocabulary = vocabulary
        return model

    def save_pretrained(self, folder):
        """Write weights, config and, if it is known, the vocabulary, as Hugging Face reads them."""
        save_huggingface(folder, self.config, self.params, self.vocabulary)

    # One training step

    @property
    def stage(self):
        """How far the step is: see above. While inputs are kept, they wait for backward()."""
        if self.inputs is not None:
            return "later forward" if self.micro_batch else "first forward"
        return "gradients" if self.micro_batch else "no gradients"

    @contextlib.contextmanager
    def whole(self, call, *stages, spoils=True):
        """What stands in this block is done by one thread at a time, in one of these stages only.

        If it spoils something when it is left half done, `interrupted` will name the call.
        """
        with self.lock:
            cause = self.interrupted
            require(not cause, f"{cause} was interrupted: call zero_grad(), then forward()")
            expected = " or ".join(map(repr, stages))
            require(
                self.stage in stages,
                f"{call} can't follow here: the stage is {self.stage!r}, expected {expected}: a "
                "step is forward(), backward(), update(), and zero_grad() begins it anew",
            )
            self.interrupted = call if spoils else None
            yield
            self.interrupted = None

    def forward(self, inputs, targets, train=True, grad_scale=1.0):
        """Model.forward. inputs and targets may be anything that makes (B, T) integers."""
        shape = self.acts["losses"].shape  # (B, T)
        inputs = self.check_tokens(inputs, "inputs", shape)
        targets = self.check_tokens(targets, "targets", shape)
        train = train and self.training  # else it has no gradients, and backward() is refused
        with self.whole("forward()", *self.FREE, spoils=train):
            return super().forward(inputs, targets, train, grad_scale)

    def forward_tokens(self, tokens, start=0):
        # A pass overwrites the activations that a waiting backward() needs, which is dropped: the
        # next forward() overwrites its part of dwte. In a "later forward" that is part of a sum.
        self.inputs = None
        self.keys = []
        return super().forward_tokens(tokens, start)

    def backward(self):
        with self.whole("backward()", "first forward", "later forward"):
            super().backward()
            self.inputs = None

    def grad_norm(self):
        """Model.grad_norm. It may be called between backward() and update()."""
        with self.whole("grad_norm()", "gradients", spoils=False):
            return super().grad_norm()

    def update(self, learning_rate, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, step=None,
               grad_scale=1.0):  # fmt: skip
        require(step is None or step >= 1, f"update(step={step}): steps are counted from 1")
        with self.whole("update()", "gradients"):
            self.keys = []  # they are those of the old parameters
            super().update(learning_rate, beta1, beta2, eps, weight_decay, step, grad_scale)

    def batch_losses(self, inputs, targets):
        """The loss of each token, (B, T), in nats."""
        self.forward(inputs, targets, train=False)
        return self.acts["losses"]

    @property
    def moments(self):
        """AdamW's m and v, (2, parameters): what a checkpoint has besides the parameters."""
        return self.flat[2:]

    def zero_grad(self):
        """Forget the gradients. Nothing is cleared: the next micro-batch overwrites them."""
        self.micro_batch = 0
        self.inputs = None
        self.interrupted = None

    # Reading and writing

    def generate(self, tokens, max_new_tokens, temperature=1.0, top_k=0, rng=None):
        """Continue a list of token ids: an iterator over new ids, each as soon as it is known.

        The model sees at most sequence_length tokens: of a longer prompt, the last ones.

        temperature   0 always takes the likeliest token
        top_k         above 0, choose among the k likeliest
        rng           a NumPy Generator, or a seed; None gives a different text each time
        """
        tokens = self.check_tokens(tokens, "prompt")
        require(temperature >= 0, f"temperature is {temperature}, expected at least 0")
        rng = np.random.default_rng(rng)
        self.keys = []  # the parameters may have been changed in place
        return generate(self, tokens.tolist(), max_new_tokens, temperature, top_k, rng)

    def next_logits(self, tokens):
        with self.whole("generate()", *self.FREE, spoils=False):
            logits = self.acts["logits"][:, :1]
            matmul_forward(logits, self.read(tokens), self.params[self.CLASSIFIER])
            return logits[0, 0].copy()  # another thread may be next

    def read(self, tokens, wanted=1):
        """lnf (1, wanted, C) of the last tokens of a list.

        acts["qkv"] has the keys and values of the list before it, `keys`. The part in which the two
        begin alike is not computed again, so a new token takes the computation of one position.
        (With recompute=2, all layers of a model for training share one qkv, and nothing is kept.)
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
        continuations   at least one list of token ids; each by itself follows the context

        Together they may have sequence_length + 1 tokens. The context is computed once. As after
        generate(), a forward() that waited for its backward() is to be called again.
        """
        context = self.check_tokens(context, "context").tolist()
        texts = [self.check_tokens(text, "continuation").tolist() for text in continuations]
        longest = len(context) + max(map(len, texts))
        most = self.sequence_length + 1  # nothing is predicted from the last token
        require(longest <= most, f"context and continuation have {longest} tokens, at most {most}")

        with self.whole("token_losses()", *self.FREE, spoils=False):
            self.keys = []  # the parameters may have been changed in place
            lnfs = [self.read((context + text)[:-1], len(text)).copy() for text in texts]

            # The classifier reads its matrix once for up to 256 tokens, whichever text has them.
            lnf = np.concatenate(lnfs, axis=1)
            targets = np.concatenate(texts)[np.newaxis]
            losses = np.empty(targets.shape, self.blob.dtype)
            self.classifier(losses, lnf, targets, self.params[self.CLASSIFIER])
        ends = np.cumsum([len(text) for text in texts])
        return np.split(losses[0], ends[:-1])

    def check_tokens(self, tokens, what, shape=None):
        """Tokens as a new int64 array, of this shape or, without one, a list. Or an InputError."""
        require(not isinstance(tokens, str), f"{what}: found a text, expected ids: encode it first")
        tokens = np.asarray(list(tokens) if isinstance(tokens, bytes) else tokens)
        expected = shape or (max(1, tokens.size),)
        require(
            tokens.dtype.kind in "iu" and tokens.shape == expected,
            f"{what}: expected integers of shape {expected}, found {tokens.shape} of "
            f"{tokens.dtype}",
        )
        V = self.config.vocab_size
        low, high = tokens.min(), tokens.max()
        require(0 <= low and high < V, f"{what}: ids {low} to {high}, expected 0 to {V - 1}")
        return tokens.astype(np.int64, "C")


# --------------------------------------------------------------------------------------------------
# 10. The training loop


@dataclass
class Run:
    """A run of the training loop: the model, its data, and how far it is."""

    args: SimpleNamespace  # the value of every flag
    model: GPT2
    loader: object  # a DataLoader; None if nothing is to be trained
    validation: list  # shards
    data: dict  # the length and the CRC-32 of each shard: see open_run
    tokenizer: object  # None if the vocabulary can't be had
    folder: str = ""  # where all is written; nowhere if empty
    lock: object = None  # an open file that keeps the folder to this run
    step: int = 0  # updates done
    saved: int = -1  # in the last checkpoint
    entries: list = field(default_factory=list)  # of main.jsonl
    written: int = 0  # how many of them it has; 0: it is to be begun anew
    signals: list = field(default_factory=list)  # that have asked the run to stop
    missing: list = field(default_factory=list)  # what could not be written
    began: tuple = ()  # the step and the time of the first update of this process
    shown: float = 0.0  # when the last line was printed


def train(run):
    """Save, evaluate, sample, update, until all is done: returns True, or False after a signal.

    A checkpoint is written before the evaluation of its step. So whoever resumes evaluates again.
    """
    args = run.args
    while True:
        done = run.step >= args.num_iterations
        stop = bool(run.signals)  # asked once, because a signal may come at any moment
        if done or stop or run.step > 0 and is_due(run.step, args.checkpoint_every):
            save_checkpoint(run)
        if stop:
            return False

        if is_due(run.step, args.val_loss_every, done):
            validate(run)
        if is_due(run.step, args.sample_every, done):
            print_sample(run, args.max_new_tokens if done else min(args.max_new_tokens, 64))
        if done:
            return not run.signals
        if not run.signals:
            update(run)


def is_due(step, every, last=False):
    """Whether something that is done after every so many updates is due; never if every is 0."""
    return every > 0 and (last or step % every == 0)


def update(run):
    """One update, its entry in the log and, now and then, a line."""
    args, step, last = run.args, run.step, run.args.num_iterations
    tokens = args.total_batch_size
    micro_batches = tokens // (run.loader.B * run.loader.T)
    rate = scheduled_rate(args, step)
    decay, clip = args.weight_decay, args.grad_clip
    started = time.perf_counter()
    run.began = run.began or (step, started)
    try:
        loss, norm = train_step(run.model, run.loader, micro_batches, rate, decay, clip)
    except FloatingPointError as error:
        remedy = "try a smaller --learning_rate, or --grad_clip 1"
        raise InputError(f"update {step + 1}: {error}: {remedy}") from None
    now = time.perf_counter()
    seconds = now - started
    run.step = step = step + 1
    speed = {"ms": seconds * 1e3, "tokens_per_second": tokens / seconds}
    log(run, train_loss=loss, norm=norm, lr=rate, **speed)

    first, then = run.began
    every = args.log_every or math.ceil(last / 20)
    if step in (first + 1, last) or is_due(step, every) or now > run.shown + 10:
        run.shown = now
        seconds_left = round((now - then) / (step - first) * (last - step))
        left = f", {timedelta(seconds=seconds_left)} left" if step < last else ""
        print_now(
            f"step {step}/{last}: train loss {loss:.6f} (norm {norm:.4f}, lr {rate:.1e}, "
            f"{seconds * 1e3:.0f} ms{left})"
        )


def scheduled_rate(args, step):
    """The learning rate of the update after `step` of them."""
    peak, final = args.learning_rate, args.learning_rate_decay_frac
    return learning_rate_at(step, args.num_iterations, peak, args.warmup_iters, final)


def describe(run):
    """Print what the run is, and what is normal for it."""
    args, V = run.args, run.model.config.vocab_size
    updates, tokens = args.num_iterations, args.total_batch_size
    epochs = updates * tokens / sum(n for n, _ in run.data["training"])
    print_now(f"{updates:,} updates of {tokens:,} tokens, {epochs:.3g} epochs, {THREADS} threads")
    print_now(f"what it learns is kept in {run.folder or 'no folder: name one with --output_dir'}")
    if epochs > 10 and not args.overfit_single_batch:
        print_now("it may learn so small a text by heart: the least val loss is what counts")
    if not run.step and args.model in FRESH:
        print_now(f"a model that knows nothing has a loss of ln({V}) = {math.log(V):.2f}")


VAL_TOKENS = 30_720  # that a validation reads by default; of GPT-2's tokens, 1,280


def validate(run):
    """Print and log the loss on the validation data; keep the weights if they are the best so far.

    It reads passages of T tokens, all of them if nothing is trained. Each counts once, whatever the
    batch size: zeros fill up the last batch, and one that is shorter. A signal ends it without log.
    """
    args, model = run.args, run.model
    B, T = model.batch_size * model.PROCESSES, model.sequence_length
    V = model.config.vocab_size
    number = args.val_max_steps * args.batch_size
    if run.loader and not number:
        usual = 1280 if usual_vocabulary(V) == "gpt2" else VAL_TOKENS
        number = max(5, usual // T)

    def passages():
        for shard in run.validation:
            for start in range(0, len(shard) - 1, T):
                yield shard[start : start + T + 1]

    lengths = np.array(run.tokenizer.lengths if run.tokenizer else [0] * V)
    nats, tokens, nbytes = 0.0, 0, 0
    rest = itertools.islice(passages(), number or None)
    while batch := list(itertools.islice(rest, B)):
        if run.signals:
            return
        filled = np.zeros((B, T + 1), int)
        for row, passage in zip(filled, batch, strict=False):
            row[: len(passage)] = passage
        losses = model.batch_losses(filled[:, :-1], filled[:, 1:])
        for row, passage in zip(losses, batch, strict=False):
            predicted = passage[1:]
            nats += float(row[: len(predicted)].sum(dtype=np.float64))
            tokens += len(predicted)
            nbytes += int(lengths[predicted].sum())

    require(tokens, "the validation data has no token after its first")
    loss = nats / tokens
    require(math.isfinite(loss), f"the validation loss is {loss}: try a smaller --learning_rate")
    found = {"val_loss": loss, "val_tokens": tokens}
    bits = ""
    if nbytes:
        found["bits_per_byte"] = nats / math.log(2) / nbytes
        bits = f" ({found['bits_per_byte']:.2f} bits per byte)"
    print_now(f"val loss {loss:.6f}{bits}")
    if run.folder and run.step > 0 and loss < best_so_far(run)[0]:
        with kept(run, "the best weights"):
            run.model.save_pretrained(os.path.join(run.folder, "best"))
            found["best"] = True
    log(run, **found)


def best_so_far(run):
    """(loss, step) of the weights in best/."""
    written = [(entry["val_loss"], entry["step"]) for entry in run.entries if entry.get("best")]
    return min(written, default=(math.inf, 0))


def print_sample(run, length):
    """Print a sample of so many tokens, if the vocabulary is there."""
    if run.tokenizer and not run.signals:
        print_now("--- sample")
        texts = sample_text(run.args, run.model, run.tokenizer, length, run.step)
        for text in itertools.takewhile(lambda _: not run.signals, texts):
            print_now(text, end="")
        print_now("")


def sample_text(args, model, tokens, length, step=0):
    """A sample, as an iterator over pieces of text. Its random numbers follow from seed and step.

    What would move a terminal's cursor or ring its bell is shown as an escape such as \\x1b.
    """
    rng = np.random.default_rng([args.seed, step])
    utf8 = codecs.getincrementaldecoder("utf-8")("replace")
    prompt = tokens.encode(args.prompt) if args.prompt else [tokens.first]

    yield args.prompt
    for token in model.generate(prompt, length, args.temperature, args.top_k, rng):
        text = utf8.decode(tokens.decode(token))  # half a character waits for its other half
        marks = [c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text]
        yield "".join(marks)


def log(run, **values):
    """Append an entry to main.jsonl. If that can't be done, it is written whole the next time."""
    run.entries.append({"step": run.step} | values)
    if not run.folder:
        return
    path = os.path.join(run.folder, "main.jsonl")
    new = "".join(json.dumps(entry) + "\n" for entry in run.entries[run.written :])
    anew = run.written == 0
    run.written = 0
    with kept(run, "the log"):
        with atomic_write(path) if anew else open(path, "ab") as file:
            file.write(new.encode())
        run.written = len(run.entries)


def entries_until(args, step):
    """The entries of main.jsonl that a run has when it resumes at a step, before it evaluates."""
    entries = []
    path = os.path.join(args.output_dir, "main.jsonl")
    evaluates = is_due(step, args.val_loss_every, step == args.num_iterations)
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        for line in file:
            with contextlib.suppress(ValueError, KeyError, TypeError):  # half a line, for instance
                entry = json.loads(line)
                again = evaluates and entry["step"] == step and "val_loss" in entry
                if entry["step"] <= step and not again:
                    entries.append(entry)
    return entries


@contextlib.contextmanager
def kept(run, what):
    """Write something in this block. What can't be written ends no run, but is said, once.

    It stays in run.missing until it has been written after all.
    """
    try:
        yield
        run.missing = [other for other in run.missing if other != what]
    except OSError as error:
        if what not in run.missing:
            print_now(f"can't write {what}: {error}; the run goes on")
            run.missing.append(what)


def finish(run, complete):
    """Leave the weights of a complete run in its folder, and print the last lines.

    InputError if something could not be written.
    """
    folder = run.folder
    if folder and complete:
        with kept(run, "the weights"):
            run.model.save_pretrained(folder)

    best, step = best_so_far(run)
    weights = os.path.join(folder, "best") if step else folder
    if step:
        print_now(f"best val loss {best:.4f} at update {step}, in {weights}")

    summary = [f"{'' if complete else 'stopped: '}{run.step} updates"]
    if run.began:
        first, then = run.began
        seconds = time.perf_counter() - then
        speed = (run.step - first) * run.args.total_batch_size / seconds
        losses = [entry["train_loss"] for entry in run.entries if "train_loss" in entry]
        summary.append(f"train loss {losses[0]:.4f} -> {losses[-1]:.4f}")
        summary += [f"{seconds:.1f} s", f"{speed:.0f} tok/s"]
    go_on = f"go on with {quoted('--output_dir', folder, '--resume', '1')}"
    if folder and not run.missing:
        summary.append(f"saved in {folder}" if complete else go_on)
    print_now(", ".join(summary))
    if folder and complete and not run.missing:
        flag = quoted("--model", weights)
        print_now(f"let it write: python train_gpt2.py {flag} --inference_only 1")
        print_now(f"look inside:  python -m extras.look_inside {flag}")

    remedy = go_on if run.saved >= 0 else "begin again with another --output_dir"
    require(not run.missing, f"{folder} lacks {', '.join(run.missing)}: make room, then {remedy}")


def print_now(text, end="\n", to="stdout"):
    """Print at once. That a terminal is gone, or a disk is full, must not end a run."""
    stream = getattr(sys, to)  # None, if it was closed before the program began
    with contextlib.suppress(OSError, ValueError):
        if stream:
            stream.write(f"{text}{end}")  # at one go: the lines of several processes don't mix
            stream.flush()


def quoted(*words):
    """Words of a command, quoted for the shell of this system."""
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


# --------------------------------------------------------------------------------------------------
# 11. Checkpoints
#
# A checkpoint is one file, DIR/checkpoint_STEP.safetensors. It holds the parameters under Hugging
# Face's names; AdamW's "moments" m and v, each laid out like the parameters; in the metadata, as
# JSON, the state of the run; and at the end a checksum of everything before it. What the checksum
# vouches for is trusted. The last two checkpoints are kept.

CHECKPOINT = "train_gpt2 2"  # the format; its version changes with the meaning of anything in it


def list_checkpoints(folder):
    """The checkpoints in a folder, newest first."""
    names = glob.glob(f"checkpoint_{'[0-9]' * 8}.safetensors", root_dir=folder)
    paths = [os.path.join(folder, name) for name in sorted(names, reverse=True)]
    return list(filter(os.path.isfile, paths))


def save_checkpoint(run):
    """Write DIR/checkpoint_STEP.safetensors, unless it is there, and keep one before it."""
    model, folder = run.model, run.folder
    if not folder or run.saved == run.step:
        return
    state = {
        "step": run.step,
        "position": run.loader.position,
        "data": run.data,
        "settings": vars(run.args),
        "threads": THREADS,
    }
    metadata = {
        "checkpoint": CHECKPOINT,
        "state": json.dumps(state),
        "n_head": str(model.config.num_heads),
    }
    tensors = huggingface_views(model.params) | {"moments": model.moments}
    path = os.path.join(folder, f"checkpoint_{run.step:08d}.safetensors")
    with kept(run, "a checkpoint"):
        save_config(folder, model.config, model.vocabulary)
        write_safetensors(path, tensors, metadata, checksum=True)
        run.saved = run.step
    until_now = [other for other in list_checkpoints(folder) if other <= path]
    for old in until_now[2:]:  # there may be damaged ones of later steps, which don't count
        with contextlib.suppress(OSError):
            os.remove(old)


def newest_checkpoint(folder):
    """(path, state) of the newest whole checkpoint in a folder; ("", None) if nothing is there.

    InputError if there are only damaged ones, or weights alone, or one of another format.
    """
    for path in list_checkpoints(folder):
        try:
            _, metadata = read_safetensors(path, checksum=True)
        except (InputError, OSError) as error:
            print_now(f"{path} is damaged: {error}: taking the one before it")
            continue
        found = metadata.get("checkpoint")
        remedy = "resume it with the program that wrote it"
        require(found == CHECKPOINT, f"{path} is a {found!r}, expected {CHECKPOINT!r}: {remedy}")
        return path, json.loads(metadata["state"])
    weights = weights_in(folder) or weights_in(os.path.join(folder, "best"))
    how = "begin anew with another --output_dir, from a --model"
    require(not weights, f"{folder} holds weights, but no whole checkpoint to resume: {how}")
    return "", None


def lock_folder(folder, resume):
    """Keep a folder to this process, as long as the file that is returned is open.

    InputError if another process has it, or if it holds what a new run would overwrite.
    """
    os.makedirs(folder, exist_ok=True)
    file = open(os.path.join(folder, ".lock"), "ab")
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise InputError(f"{folder}: another run is writing there: choose another") from None
    except OSError:
        pass  # this file system has none

    weights = weights_in(folder) or weights_in(os.path.join(folder, "best"))
    new = not weights and not os.path.exists(os.path.join(folder, "main.jsonl"))
    require(resume or new, f"{folder} holds a run: go on with --resume 1, or choose another")
    return file


# --------------------------------------------------------------------------------------------------
# 12. Files and weights
#
# Whatever is read from outside is checked before it is used. A model is read in three steps:
# find_weights gives a path, open_weights sizes and views, and copy_tensors the numbers.

PREPRO = "python prepro_tinyshakespeare.py"


def prepro(name, *args):
    """Call a function of prepro_tinyshakespeare.py. What can't be fetched is a ConnectionError."""
    try:
        import prepro_tinyshakespeare as prep
    except ImportError:
        found = "prepro_tinyshakespeare.py is missing: put it beside train_gpt2.py"
        raise ConnectionError(found) from None
    try:
        return getattr(prep, name)(*args)
    except prep.InputError as error:
        raise InputError(str(error)) from None


def in_data(name):
    """data/NAME here, or beside this file, if there is a data/ only there."""
    beside = Path(__file__).absolute().parent / "data"
    folder = beside if beside.is_dir() and not os.path.isdir("data") else "data"
    return f"{folder}/{name}"


@contextlib.contextmanager
def atomic_write(path):
    """A file for bytes, which takes the place of `path` when it is whole and on the disk."""
    temporary = f"{path}.tmp"  # the same name each time: what a killed run left is overwritten
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)


def read_json(path):
    """The JSON object in a file: a dict."""
    try:
        value = json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: expected JSON: {error}") from None
    require(isinstance(value, dict), f"{path}: expected a JSON object, found {value!r:.40}")
    return value


def open_tokens(path):
    """The tokens in a file, uint16: a map of it, which stays what it was if the file is replaced.

        256 int32: 20240520, version 1, number of tokens, vocab_size, vocabulary_crc, zeros
        the tokens, uint16

    vocab_size: 256 is bytes, 50257 GPT-2's tokens, 0, as in llm.c, unknown. vocabulary_crc: the
    CRC-32 of a vocabulary of one's own, or 0. The map has these two, and its path, as attributes.
    """
    with open(path, "rb") as file:
        size = os.path.getsize(path)
        header = np.fromfile(file, "<u4", 5).tolist()
        right = size > 1024 and header[:2] == [20240520, 1] and size == 1024 + 2 * header[2]
        found = f"{size} bytes that begin with {header[:3]}, not 20240520, 1, their number"
        require(right, f"{path}: no whole token file: {found}: write it with {PREPRO}")
        tokens = np.memmap(file, "<u2", "r", 1024)
    tokens.path = path
    tokens.vocab_size, tokens.vocabulary_crc = header[3:]
    return tokens


def open_shards(paths):
    """The token files of a list of paths and patterns, by name: maps, as of open_tokens."""
    names = set()
    for path in paths:
        found = [path] if os.path.exists(path) else glob.glob(path)
        require(found, f"{path}: no such token file: write one with {PREPRO}")
        names.update(found)
    return [open_tokens(name) for name in sorted(names)]


def text_at_hand():
    """(training, validation): the bytes of a text that needs no network. Says which it is.

    It is Tiny Shakespeare if that lies in data/, or else what lies here of this project's files. Of
    its passages, 1,000 bytes and the rest of a line, every tenth validates: so all kinds do.
    """
    here = Path(__file__).absolute().parent
    names = Path(__file__).name, "test_gpt2.py", "prepro_tinyshakespeare.py", "README.md"
    own = [here / name for name in names] + sorted(here.glob("extras/*.py"))
    tiny = Path(in_data("tiny_shakespeare.txt"))
    large = tiny.exists() and tiny.stat().st_size > 20_000
    paths = [tiny] if large else list(filter(Path.exists, own))

    text = b"".join(map(Path.read_bytes, paths)).replace(b"\r\n", b"\n")
    passages = re.findall(rb"(?s:.{1,1000})[^\n]*\n?", text)
    validation = passages[5::10]
    del passages[5::10]
    more = f" and {len(paths) - 1} more files" if paths[1:] else ""
    print_now(f"the text is that of {paths[0].name}{more}")
    return b"".join(passages), b"".join(validation)


# A vocabulary, of a model or of a token file, is "bytes", "gpt2", or one's own, a list of bytes by
# id, which <|endoftext|> follows as the last id. None is one that is not known.


def usual_vocabulary(vocab_size):
    """The vocabulary that has so many tokens. GPT-2's may be padded to a multiple of 128."""
    if vocab_size == 256:
        return "bytes"
    return "gpt2" if 50257 <= vocab_size <= 50304 else None


def tokenizer(vocabulary):
    """How a model reads and writes: encode(text) gives ids, decode(id) bytes, `first` is the id
    that begins a new text, lengths[id] the number of bytes that an id stands for in a text.
    InputError if the vocabulary is not known, ConnectionError if GPT-2's can't be fetched.
    """
    remedy = "put its vocab.json beside the weights, or use model.generate"
    require(vocabulary, f"the vocabulary of the model is not known: {remedy}")
    if vocabulary == "bytes":
        tokens, first = [bytes([i]) for i in range(256)], ord("\n")
        encode = lambda text: list(text.encode(errors="surrogateescape"))
    elif vocabulary == "gpt2":
        gpt2 = prepro("get_encoding")
        first, encode = gpt2.eot_token, gpt2.encode_ordinary
        tokens = [*map(gpt2.decode_single_token_bytes, range(first)), b""]
        tokens += [b"<%d>" % i for i in range(50257, 50304)]  # no text has them
    else:
        tokens, first = [*vocabulary, b""], vocabulary.index(b"\n")
        encode = lambda text: prepro("encoding_of", vocabulary).encode_ordinary(text)

    # <|endoftext|> has no bytes in a text, and is shown as the end of a line.
    decode = lambda i: tokens[i] or b"\n"
    lengths = list(map(len, tokens))
    return SimpleNamespace(encode=encode, decode=decode, first=first, lengths=lengths)


def vocabulary_of(shard):
    """That of a token file. One's own lies in PREFIX.tiktoken, beside PREFIX_train.bin."""
    if shard.vocabulary_crc == 0:
        return usual_vocabulary(shard.vocab_size or 50257)
    path = re.sub(r"(_train|_val)?(_\d+)?\.bin$", ".tiktoken", shard.path)
    vocabulary = prepro("read_vocabulary", path)
    same = len(vocabulary) + 1 == shard.vocab_size and belongs(shard, 0, vocabulary)
    require(same, f"{path} is not the vocabulary of {shard.path}: write both with {PREPRO}")
    return vocabulary


def saved_vocabulary(folder, vocab_size):
    """That which lies beside weights, as Hugging Face keeps it, or else the usual one."""
    usual = usual_vocabulary(vocab_size)
    if usual == "bytes":
        return usual
    try:
        found = prepro("read_vocabulary", folder)
    except (ConnectionError, FileNotFoundError):  # this file stands alone, or there is none
        return usual
    except InputError:
        return None
    own = isinstance(found, list) and len(found) + 1 == vocab_size
    return found if own or found == usual else None


def belongs(shard, vocab_size, vocabulary):
    """Whether the tokens of a file are those of a model. llm.c's files, which do not say, pass."""
    model = vocabulary or vocab_size
    if isinstance(vocabulary, list):
        model = zlib.crc32(prepro("vocabulary_file", vocabulary))
    size = shard.vocab_size
    return (shard.vocabulary_crc or usual_vocabulary(size) or size) in (0, model)


ARRAY_TYPES = {  # only BF16, which NumPy does not have, is uint16 here
    "BOOL": "u1", "U8": "u1", "I8": "i1", "F16": "<f2", "BF16": "<u2", "I16": "<i2",
    "F32": "<f4", "I32": "<i4", "F64": "<f8", "I64": "<i8",
}  # fmt: skip


def read_safetensors(path, checksum=False):
    """({name: a view of the file}, metadata) of a .safetensors file, Hugging Face's format:

    8 bytes: n, little-endian
    n bytes of JSON: {name: {"dtype": "F32", "shape": [61, 24], "data_offsets": [0, 5856]}, ...}
    the tensors, which fill the rest; with a checksum, the CRC-32 of all before it is the last
    """
    tensors, end = {}, 0
    try:
        file = np.asarray(np.memmap(path, np.uint8, "r"))
        n = min(int.from_bytes(file[:8].tobytes(), "little"), 1 << 22)  # no header is larger
        header, data = json.loads(file[8 : 8 + n].tobytes()), file[8 + n :]
        metadata = header.pop("__metadata__", None) or {}  # null is as good as nothing
        right = isinstance(metadata, dict)
        # In the order of their places, each tensor must begin where the one before it ends.
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            start, stop = entry["data_offsets"]
            right &= start == end <= stop
            end = stop
            flat = data[start:stop].view(ARRAY_TYPES[entry["dtype"]])
            tensors[name] = flat.reshape(entry["shape"])
        right &= end == len(data)
        if checksum:
            right &= zlib.crc32(file[:-4]).to_bytes(4, "little") == file[-4:].tobytes()
    except (AttributeError, KeyError, OverflowError, RecursionError, TypeError, ValueError):
        right = False  # what should be an object, a list or a number is something else
    require(right, f"{path} is no whole .safetensors file: fetch it again, or save it again")
    return tensors, metadata


def write_safetensors(path, tensors, metadata, checksum=False):
    """Write tensors {name: array, or what gives one in pieces}, as float32; metadata {str: str}."""
    header = {"__metadata__": metadata}
    end = 0
    for name, tensor in tensors.items():
        begin = end
        end += 4 * math.prod(tensor.shape)
        header[name] = {"dtype": "F32", "shape": tensor.shape, "data_offsets": [begin, end]}
    if checksum:
        header["crc32"] = {"dtype": "U8", "shape": [4], "data_offsets": [end, end + 4]}

    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    n = len(text).to_bytes(8, "little")
    crc = zlib.crc32(n + text)
    with atomic_write(path) as file:
        file.write(n + text)
        for tensor in tensors.values():
            for piece in [tensor] if isinstance(tensor, np.ndarray) else tensor:
                piece = np.ascontiguousarray(piece, "<f4")  # copies a transposed view
                file.write(piece)
                crc = zlib.crc32(piece, crc)
        if checksum:
            file.write(crc.to_bytes(4, "little"))


HF_NAMES = {  # w is .weight there, b .bias
    "wte": "wte",
    "wpe": "wpe",
    "ln1": "h.{}.ln_1",
    "qkv": "h.{}.attn.c_attn",
    "attproj": "h.{}.attn.c_proj",
    "ln2": "h.{}.ln_2",
    "fc": "h.{}.mlp.c_fc",
    "fcproj": "h.{}.mlp.c_proj",
    "lnf": "ln_f",
}
OPENAI = {  # layers and channels; a head has 64 of them
    "gpt2": (12, 768),
    "gpt2-medium": (24, 1024),
    "gpt2-large": (36, 1280),
    "gpt2-xl": (48, 1600),
}
FRESH = {  # GPT2Configs of models that begin with random weights; 0 is that of the data
    "bytes": (64, 256, 2, 4, 128),
    "d2": (64, 0, 2, 4, 128),
    "d6": (1024, 50257, 6, 6, 384),
    **{f"d{L}": (1024, 50257, L, C // 64, C) for L, C in OPENAI.values()},
}


def huggingface_views(params):
    """The same memory under Hugging Face's names. The matrices of a layer are transposed there."""
    views = {}
    for name, array in params.items():
        hf_name = HF_NAMES[name.rstrip("wb")] + (".bias" if name.endswith("b") else ".weight")
        if "{}" in hf_name:
            views |= {hf_name.format(l): view.T for l, view in enumerate(array)}
        else:
            views[hf_name] = array
    return views


def huggingface_config(config):
    """What config.json says of a model."""
    return {
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.max_seq_len,
        "n_embd": config.channels,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": LN_EPS,
        "tie_word_embeddings": True,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
    }


def find_weights(name):
    """The path of a model: of one of OpenAI's, which is fetched if need be, or name itself."""
    if name in OPENAI:
        refuse_two_meanings(name)
        return prepro("provide", name)
    others = f"{', '.join(OPENAI)} (OpenAI's), {', '.join(FRESH)} (fresh, for training)"
    require(os.path.exists(name), f"{name!r}: no such model: no file or folder, nor {others}")
    return name


def refuse_two_meanings(name):
    """InputError if the name of a model is here also a folder that holds a model."""
    both = weights_in(name) or weights_in(f"{name}/best")
    require(not both, f"{name!r} is a model, and a folder that holds one: write ./{name} for it")


def weights_in(folder):
    """The files of a folder's weights: one, or several parts, or else its newest checkpoint."""
    place = os.path.join(glob.escape(folder), "model")
    whole = glob.glob(f"{place}.safetensors") or sorted(glob.glob(f"{place}-*-of-*.safetensors"))
    return whole or list_checkpoints(folder)[:1]


def open_weights(path):
    """(GPT2Config, {Hugging Face's name: view}, vocabulary) of a folder or a file.

    InputError if a config.json beside it tells of something else than a GPT-2. The classifier,
    lm_head.weight, must be wte.weight, or stand in its place. Heads are counted by the metadata of
    our files, or by config.json, or else the size must be one of OpenAI's.
    """
    tensors, metadata = read_parts(path)
    head = tensors.pop("lm_head.weight", None)
    if head is not None:
        same = np.array_equal(head, tensors.setdefault("wte.weight", head))
        require(same, f"{path}: lm_head.weight differs from wte.weight; in GPT-2 they are the same")
    try:
        V, C = tensors["wte.weight"].shape
        max_seq_len, _ = tensors["wpe.weight"].shape
    except (KeyError, ValueError):
        raise InputError(f"{path}: expected matrices wte.weight and wpe.weight") from None
    L = sum(name.endswith(".ln_1.weight") for name in tensors)

    folder = path if os.path.isdir(path) else os.path.dirname(path) or "."
    beside = os.path.join(folder, "config.json")
    told = read_json(beside) if os.path.exists(beside) else {}
    usual = C // 64 if (L, C) in OPENAI.values() else None
    heads = str(metadata.get("n_head") or told.get("n_head") or usual)
    message = 'how many heads has it? Put a config.json with {"n_head": NUMBER} beside it'
    require(re.fullmatch("[0-9]{1,6}", heads), f"{path}: {message}")
    config = GPT2Config(max_seq_len, V, L, int(heads), C)
    GPT2.check_config(config)
    for key, expected in huggingface_config(config).items():
        found = told.get(key)
        right = found in (None, expected) or (found, expected) == ("gelu_pytorch_tanh", "gelu_new")
        require(right, f"{beside} says {key} = {found!r}, expected {expected!r}")
    return config, tensors, saved_vocabulary(folder, V)


def read_parts(path):
    """({Hugging Face's name: view}, metadata) of a folder or a file."""
    parts = weights_in(path) if os.path.isdir(path) else [path]
    right = parts and parts[0].endswith(".safetensors")
    advice = "llm.c's .bin: python -m extras.llmc; others: transformers' save_pretrained"
    require(right, f"{path}: expected weights in a .safetensors file ({advice})")
    tensors = {}
    for part in parts:
        found, metadata = read_safetensors(part)
        for name, stored in found.items():
            name = name.removeprefix("transformer.")
            require(name not in tensors, f"{path}: tensor {name!r} is there twice")
            # Older files have the causal mask, and checkpoints the state of a run.
            if not name.endswith((".attn.bias", ".attn.masked_bias", "moments", "crc32")):
                tensors[name] = stored
    return tensors, metadata


def copy_tensors(views, tensors):
    """Move tensors, as of read_safetensors, into views {name: float32 array}.

    InputError unless they are just what the views expect, and finite.
    """
    odd = sorted(set(views) ^ set(tensors))
    require(not odd, f"tensor {odd[:1]} is missing, or is not part of the model")
    for name, out in views.items():
        array = tensors.pop(name)  # so that no file stays mapped
        right = array.shape == out.shape and array.dtype in ("<f4", "<f2", "<u2")
        found = f"found {array.shape} of {array.dtype}, expected floats {out.shape}"
        require(right, f"tensor {name!r}: {found}")
        if array.dtype == "<u2":  # BF16, the upper half of a float32
            np.left_shift(array, 16, out.view(np.uint32), dtype=np.uint32)
        else:
            out[...] = array
        finite = np.isfinite([out.min(), out.max()]).all()
        require(finite, f"tensor {name!r} holds a value that is not finite")


def save_huggingface(folder, config, params, vocabulary):
    """GPT2.save_pretrained: model.safetensors, and the files that transformers needs beside it."""
    save_config(folder, config, vocabulary)
    tensors = {f"transformer.{name}": view for name, view in huggingface_views(params).items()}
    metadata = {"format": "pt", "n_head": str(config.num_heads)}
    write_safetensors(os.path.join(folder, "model.safetensors"), tensors, metadata)


def save_config(folder, config, vocabulary):
    """config.json, generation_config.json and, if it is at hand, the vocabulary."""
    end = 50256 if vocabulary == "gpt2" else None
    if isinstance(vocabulary, list):
        end = len(vocabulary)
    ends = {"bos_token_id": end, "eos_token_id": end}
    about = {"architectures": ["GPT2LMHeadModel"], "dtype": "float32"}
    generation = {"max_length": min(config.max_seq_len, 256)}  # pipeline would go on beyond it
    files = {
        "config.json": json.dumps(huggingface_config(config) | ends | about, indent=2).encode(),
        "generation_config.json": json.dumps(ends | generation, indent=2).encode(),
    }
    with contextlib.suppress(ConnectionError):  # this file stands alone
        files |= prepro("huggingface_files", vocabulary)
    os.makedirs(folder, exist_ok=True)
    for name, data in files.items():
        with atomic_write(os.path.join(folder, name)) as file:
            file.write(data)


# --------------------------------------------------------------------------------------------------
# 13. Threads, blocks, and the limits of the machine
#
# NumPy lets go of the interpreter lock while it computes. So the threads of `parallel` run side by
# side, each on its own block. BLAS is held to one thread meanwhile. Its own keep asking whether the
# others are done: if another program has the core of one, a step takes five times as long.


def text_of(*path):
    """A text file that the system has made; "" if it is not there."""
    with contextlib.suppress(OSError), open(os.path.join(*path)) as file:
        return file.read()
    return ""


def control_groups(root="/"):
    """The folder of this process's control group (version 2) and those around it. All limits hold.

    In a container the path may be that of the host; then only the outermost is there.
    """
    path = text_of(root, "proc/self/cgroup").partition("0::")[2].strip()
    folder = Path(root, "sys/fs/cgroup", path.lstrip("/"))
    return [folder, *folder.parents]  # above sys/fs/cgroup they hold no limits


def cores_allowed(root="/"):
    """How many cores this process should use, within its affinity and the quotas of its groups.

    Physical ones, as two threads on one core only share its multipliers. All get equal blocks and
    wait for the slowest, so of slow and fast cores it is as many as do most at the slowest's pace.
    Beyond a quota all are stopped for the rest of its period: two threads take six times as long.
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
        quota, _, period = text_of(folder, "cpu.max").partition(" ")
        if quota.isdecimal():  # "50000 100000" is half a core, "max 100000" all
            cores = min(cores, math.ceil(int(quota) / int(period)))
    return max(1, cores)


def available_memory(root="/"):
    """Bytes that are free for this process: in the machine, and below the limits of its groups.

    Copies of files count as free, since they give way; after a download they are most of what is
    used. On macOS it is all memory that the machine has; on Windows it is not known, and infinite.
    """
    free = [math.inf]
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", ()):
        free.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for kib in re.findall(r"MemAvailable: *(\d+)", text_of(root, "proc/meminfo")):
        free.append(1024 * int(kib))

    for folder in control_groups(root):
        limit = text_of(folder, "memory.max").strip()
        usage = text_of(folder, "memory.current")
        if usage and limit.isdecimal():  # it may be "max"
            files = re.findall(r"active_file (\d+)", text_of(folder, "memory.stat"))  # and inactive
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
    """BLAS has at most n threads in this block. The number is that of the whole process, so one
    thread enters at a time.
    """
    set_threads, threads = BLAS or (lambda n: None, lambda: n)
    with LOCK:
        before = threads()
        set_threads(1 if n == 1 else min(n, before))
        try:
            yield
        finally:
            set_threads(before)


def threads_wanted(processes=1):
    """The number of threads that the user named, else one of so many equal shares of the cores.

    It is 1 if BLAS has threads of its own that we can't hold back.
    """
    if BLAS is None:
        return 1
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
        first = os.environ.get(name, "").split(",")[0]  # "4,2" would be nested threads
        if first.isdecimal() and int(first) > 0:
            return int(first)
    return max(1, cores_allowed() // processes)


BLAS = find_blas()
THREADS = threads_wanted()

# Tell glibc to keep freed memory: 2,000 page faults less in a step of 60 ms, which are 3 %.
with contextlib.suppress(AttributeError, OSError, TypeError):  # others have no mallopt
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD
    mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD


def begin_without_helpers():
    """Make what `parallel` needs. A fork copies no threads, so the new process begins anew."""
    global LOCK, CALLS, HELPERS
    LOCK, CALLS, HELPERS = threading.Lock(), queue.SimpleQueue(), []


begin_without_helpers()
if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=begin_without_helpers)


def help_for_ever():
    """What a helper, one of our threads, does: its part of each call of `parallel`.

    A step of a small model has hundreds of calls; Python's ThreadPoolExecutor would cost 5 % of it.
    """
    if BLAS:
        BLAS[0](1)  # some BLAS keep this number for each thread
    while True:
        CALLS.get()()  # under no name: while it waits, a helper keeps nothing alive


def parallel(task, pieces):
    """[task(piece) for piece in pieces], computed by THREADS threads while BLAS has one.

    A task may not call parallel. Calls from several threads come one after the other.
    """
    n = len(pieces)
    results = [None] * n
    numbers = [None] * THREADS  # each None ends the work of a thread
    numbers.extend(reversed(range(n)))
    done = queue.SimpleQueue()

    def work():
        try:
            # Whoever is free takes the next number. Even without Python's lock, none comes twice.
            for i in iter(numbers.pop, None):
                results[i] = task(pieces[i])
            done.put(None)
        except BaseException as error:
            done.put(error)

    with blas_held_to(1):
        called = min(THREADS, n) - 1
        while len(HELPERS) < called:
            helper = threading.Thread(target=help_for_ever, daemon=True)
            helper.start()
            HELPERS.append(helper)

        for _ in range(called):
            CALLS.put(work)
        work()
        errors = [done.get() for _ in range(called + 1)]
    for error in filter(None, errors):
        raise error
    return results


# Blocks. NumPy makes one pass over memory for each operation, which is slow where arrays are larger
# than a core's cache. So the functions of section 2 are run block by block, on several cores.

BLOCK_BYTES = 1 << 20  # of a block's widest array: with smaller ones, threads wait for the lock


def blocks(n, nbytes, block_bytes=BLOCK_BYTES):
    """n things of nbytes each, cut into blocks of at most block_bytes: a list of slices.

    All threads get the same number of them. For less than an eighth of block_bytes no thread is
    woken: it would wait for the interpreter lock.
    """
    threads = max(1, min(THREADS, 8 * n * nbytes // block_bytes))
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
    sums     the names of those that follow `add`, the last argument. Each block has its own, and
             these are added up in the order of the blocks, as are the numbers that a layer returns
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

        def block(place):
            own = list(args)
            for i, array in zip(of_rows, rows, strict=True):
                own[i] = array[np.newaxis, place]
            for i in of_sums:
                own[i] = np.empty_like(args[i])
                own[-1] = False  # add
            result = layer(*own)
            return [own[i] for i in of_sums] or result

        results = parallel(block, slices)
        if not of_sums:
            return None if results[0] is None else sum(results)
        for i, parts in zip(of_sums, zip(*results, strict=True), strict=True):
            accumulate(args[i], sum(parts[1:], parts[0]), args[-1])

    return run


def by_heads(layer):
    """The same layer, run by blocks of heads, which do not depend on each other.

    A block is some sequences with all of their heads or, if that is too much, some heads of one
    sequence. Its size is counted as that of preatt, at most ATT_ROWS * T numbers for each head. The
    layer gets (sequences, T, 3, heads, hs) of qkv and dqkv, and (sequences, T, 1, heads, hs) of
    what is (B, T, C).
    """

    @functools.wraps(layer)
    def run(*args):
        *others, lse, qkv, NH = args  # as both layers have them
        B, n = lse.shape[:2]
        nbytes = min(ATT_ROWS, n) * qkv.shape[1] * qkv.itemsize  # of one head
        number = len(blocks(B * NH, nbytes))
        of_sequences = cut(B, number)
        of_heads = cut(NH, math.ceil(number / len(of_sequences)))

        hs = qkv.shape[2] // (3 * NH)
        views = [x.reshape(*x.shape[:2], -1, NH, hs, copy=False) for x in (*others, qkv)]

        def block(place):
            sequences, heads = place
            *own, own_qkv = [view[sequences, ..., heads, :] for view in views]
            layer(*own, lse[sequences, :, heads], own_qkv, heads.stop - heads.start)

        parallel(block, list(itertools.product(of_sequences, of_heads)))

    return run


one_by_one = products  # section 2's


@functools.wraps(one_by_one)
def products(*jobs):
    """The same products, cut into blocks, of which each thread gets as many multiplications.

    All are given to the cores at once, because it takes 30 to 70 microseconds each time until the
    other cores have begun. BLAS copies the rows of a and the columns of b that a block needs, and a
    column costs half as much again. So blocks are nearly square. None has less than 2^20
    multiplications, some 15 microseconds, unless a @ b is added to out: then a block of it should
    still be in the cache.
    """
    if len(jobs) == 1 and len(jobs[0][0]) == 1:
        # One token, as in generation. Most of its products take some 0.1 ms, and BLAS's own threads
        # start sooner than ours: 80 tokens a second of 124M in place of 60, on an AMD.
        with blas_held_to(THREADS):
            return one_by_one(*jobs)

    all_work = sum(out.size * len(b) for out, _, b, _, _ in jobs)  # multiplications
    pieces = []
    for out, a, b, add, bias in jobs:
        m, n = out.shape
        work = out.size * len(b)
        number = max(1, min(math.ceil(THREADS * work / all_work), work >> 20))
        if add:
            number *= math.ceil(out.nbytes / (number * BLOCK_BYTES))

        ways = [(i, number // i) for i in range(1, number + 1) if number % i == 0]
        of_rows, of_columns = min(ways, key=lambda way: m / way[0] + 1.5 * n / way[1])
        for rows, columns in itertools.product(cut(m, of_rows), cut(n, of_columns)):
            own_bias = None if bias is None else bias[columns]
            pieces.append((out[rows, columns], a[rows], b[:, columns], add, own_bias))
    parallel(one_by_one, pieces)


layernorm_forward = by_rows(layernorm_forward, "out mean rstd inp")
layernorm_backward = by_rows(layernorm_backward, "dinp dout inp mean rstd", "dweight dbias")
attention_forward = by_heads(attention_forward)
attention_backward = by_heads(attention_backward)
gelu_forward = by_rows(gelu_forward, "out inp")
gelu_backward = by_rows(gelu_backward, "dinp dout inp")
residual_forward = by_rows(residual_forward, "out inp1 inp2", block_bytes=2 * BLOCK_BYTES)
crossentropy_softmax_forward = by_rows(crossentropy_softmax_forward, "losses logits targets")
crossentropy_softmax_backward = by_rows(crossentropy_softmax_backward, "probs targets")
sum_of_squares = by_rows(sum_of_squares, "x", block_bytes=BLOCK_BYTES // 2)
adamw = by_rows(adamw, "p g m v", block_bytes=BLOCK_BYTES // 2)


# --------------------------------------------------------------------------------------------------
# 14. The command line

# What a model that begins with random weights has in place of the usual defaults.
FROM_SCRATCH = {  # d6, d12, ...; bytes; d2
    "batch_size": (8, 16, 16),
    "num_iterations": (1000, 1400, 1400),
    "learning_rate": (1e-3, 4e-3, 2e-3),
    "warmup_iters": (100, 100, 100),
    "learning_rate_decay_frac": (0.05, 0.05, 0.05),
    "weight_decay": (0.1, 0.1, 0.1),
    "grad_clip": (1.0, 1.0, 1.0),
    "shuffle": (1, 1, 1),
    "recompute": (1, 0, 0),
    "val_loss_every": (100, 200, 200),
    "sample_every": (100, 200, 200),
    "max_new_tokens": (64, 400, 200),
    "temperature": (1.0, 0.6, 0.6),
}

# The flags with which a run may go on that have other values than before.
MAY_CHANGE = {
    "input_bin", "input_val_bin", "output_dir", "num_iterations", "val_loss_every",
    "sample_every", "log_every", "checkpoint_every", "resume", "prompt",
    "max_new_tokens", "top_k", "temperature",
}  # fmt: skip


def parse_args(argv, settings=None):
    """The value of every flag. Leaves with one line and exit code 2 if one makes no sense.

    settings   those of the run that is resumed: they take the place of the defaults
    """
    parser = argparse.ArgumentParser(
        usage="python train_gpt2.py [--FLAG VALUE ...]",
        epilog=inspect.getdoc(main),
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def error(message):
        print_now(f"error: {message} (--help lists all flags)", to="stderr")
        sys.exit(2)

    def flag(name, default, meaning, **more):
        more = {"type": type(default), "help": f"{meaning} (default: {default!r})"} | more
        parser.add_argument(f"--{name}", default=default, metavar="X", **more)

    parser.error = error
    path = os.path.expanduser
    flag("model", "", "gpt2[-medium, -large, -xl]; a folder or .safetensors; or fresh weights: "
         "d6, d12, d24, d36, d48 with GPT-2's tokens, d2 with those of the data, bytes. "
         "If empty, gpt2, or d2 where that can't be fetched", type=path)  # fmt: skip
    flag("input_bin", [], "training tokens: paths or a pattern; if none, Shakespeare",
         type=path, nargs="+")  # fmt: skip
    flag("input_val_bin", [], "validation tokens, likewise", type=path, nargs="+")
    flag("output_dir", "", "where weights, log and checkpoints go; nowhere if empty", type=path)
    flag("resume", 0, "1: go on from the newest whole checkpoint in --output_dir")
    flag("num_iterations", 40, "updates; 0: only validate, all of the text")
    flag("batch_size", 4, "B, sequences per batch")
    flag("sequence_length", 64, "T, tokens per sequence; 0: as many as the model can read")
    flag("total_batch_size", 0, "tokens per update; 0: B*T, times the number of processes")
    flag("learning_rate", 1e-4, "its peak")
    flag("warmup_iters", 0, "updates over which it rises to the peak")
    flag("learning_rate_decay_frac", 1.0, "fraction of the peak to which a cosine takes it")
    flag("weight_decay", 0.0, "AdamW's, on matrices and embeddings")
    flag("grad_clip", 0.0, "largest norm of the gradient; 0: any")
    flag("shuffle", 0, "1: the passages of the text in a new order each epoch")
    flag("overfit_single_batch", 0, "1: train on the first batch again and again")
    flag("recompute", 1, "0: keep all; 1: compute layernorm and GELU again in backward; 2: layers")
    flag("seed", 1337, "of fresh weights, of the order of passages and of samples")
    flag("val_loss_every", 10, "updates between validations; 0: none")
    flag("val_max_steps", 0, "batches per validation; 0: 1,280 tokens of GPT-2's, 30,720 others")
    flag("sample_every", 20, "updates between samples; 0: none")
    flag("log_every", 0, "updates between printed lines; 0: a twentieth of all")
    flag("checkpoint_every", 0, "updates between checkpoints; 0: at the end, or when stopped")
    flag("inference_only", 0, "1: continue --prompt, and train nothing")
    flag("prompt", "", "text to continue; if empty, a new text begins")
    flag("max_new_tokens", 64, "length of a sample, in tokens")
    flag("top_k", 0, "sample among the k likeliest; 0: among all")
    flag("temperature", 1.0, "of samples: below 1 more cautious, above 1 wilder, 0 the likeliest")

    args = parser.parse_args(argv)
    if args.model in FRESH:
        column = {"bytes": 1, "d2": 2}.get(args.model, 0)
        parser.set_defaults(**{name: values[column] for name, values in FROM_SCRATCH.items()})
    if args.inference_only:
        parser.set_defaults(batch_size=1, sequence_length=0, num_iterations=0)
    parser.set_defaults(**settings or {})
    args = parser.parse_args(argv)

    for name, value in vars(args).items():
        if isinstance(value, (int, float)) and not 0 <= value <= 10**12:
            parser.error(f"--{name} {value}: expected a number from 0 to 10^12")
    if not args.output_dir and (args.checkpoint_every or args.resume):
        parser.error("--checkpoint_every and --resume need --output_dir")
    if args.output_dir and args.num_iterations == 0:
        parser.error("nothing is trained, so nothing is written to --output_dir: leave it out")
    return args


def find(args, checkpoint=""):
    """What a run needs, fetched if need be: config, tensors and vocabulary of the model, and data.

    checkpoint   the path of the one that the run is resumed from, in place of the model's name.
    tensors are None if the weights are to be drawn; data {"training": shards, ...} is what is read.
    """
    training = open_shards(args.input_bin)  # first: a wrong path is told before a fetch
    validation = open_shards(args.input_val_bin)
    name = checkpoint or args.model or "gpt2"
    if name in FRESH and not args.inference_only:
        refuse_two_meanings(name)
        config, tensors = GPT2Config(*FRESH[name]), None
        vocabulary = usual_vocabulary(config.vocab_size)
    else:
        config, tensors, vocabulary = open_weights(find_weights(name))
    found = SimpleNamespace(config=config, tensors=tensors, vocabulary=vocabulary, data={})
    if args.inference_only:
        return found

    if not training and not validation:
        training, validation = usual_data(config.vocab_size)
    if args.num_iterations > 0:
        found.data["training"] = training
    if args.num_iterations == 0 or args.val_loss_every > 0:
        found.data["validation"] = validation
    for what, shards in found.data.items():
        require(shards, f"no {what} data is named: name both --input_bin and --input_val_bin")
    if name in FRESH and name != "bytes":
        shard = (training or validation)[0]
        found.config = replace(config, vocab_size=shard.vocab_size or 50257)
        found.vocabulary = vocabulary_of(shard)

    V = found.config.vocab_size
    flags = {"gpt2": "", "bytes": " --bytes 1"}
    how = flags.get(usual_vocabulary(V), " --vocabulary MODEL_FOLDER")
    for shard in itertools.chain(*found.data.values()):
        if isinstance(shard, np.memmap):  # a file, and not the bytes of a text at hand
            highest = shard.max()
            require(
                belongs(shard, V, found.vocabulary) and highest < V,
                f"{shard.path}: its tokens, of {shard.vocab_size} and up to {highest}, are not "
                f"the model's, of {V}: write its text anew with {PREPRO} --input TEXT{how}",
            )
    return found


def usual_data(V):
    """[training, validation]: shards of a text in V tokens; 0 is those that are learned from it."""
    if V == 256:
        return [[np.frombuffer(text, np.uint8)] for text in text_at_hand()]

    prefix = in_data("tiny_shakespeare" if usual_vocabulary(V) else "first")
    paths = [f"{prefix}_train.bin", f"{prefix}_val.bin"]
    missing = not all(map(os.path.exists, paths))
    if missing and usual_vocabulary(V):
        paths = prepro("provide", "tiny_shakespeare")
    elif missing:
        require(V == 0, f"the model has {V} tokens of its own: name --input_bin, --input_val_bin")
        texts = [text.decode(errors="replace") for text in text_at_hand()]
        prepro("write_files", prepro("token_files", prefix, *texts, 1024))
    return [open_shards([path]) for path in paths]


def args_or_fall_back(argv):
    """(args, found): the value of every flag and, if nothing is asked for by name, what find gives.

    Then a small model takes the place of a GPT-2 that can't be fetched. It learns bytes if need be.
    """
    args = parse_args(argv)
    named = args.model or args.input_bin or args.input_val_bin or args.resume
    if named or args.inference_only or args.num_iterations == 0:  # a new model writes noise
        return args, None
    for small in ("d2", "bytes"):
        try:
            return args, find(args)
        except ConnectionError as error:
            print_now(f"{error.args[0]}\n--> so a small GPT learns from scratch (--model {small})")
        first = in_data("first")
        folder = args.output_dir or ("" if os.path.exists(first) else first)
        args = parse_args([*argv, "--model", small, f"--output_dir={folder}"])
    return args, find(args)


def resumed_args(argv, state):
    """The flags of a run that goes on. InputError if one has changed that may not."""
    before, step = state["settings"], state["step"]
    args = parse_args(argv, before)
    for name in ("total_batch_size", "sequence_length"):  # of which 0 stands for another number
        setattr(args, name, getattr(args, name) or before[name])
    for name, value in vars(args).items():
        message = f"the run can't go on with --{name} {value!r} (it was {before[name]!r})"
        same = name in MAY_CHANGE or value == before[name]
        require(same, f"{message}: leave that out, or start another")
    message = f"the run has done {step} updates: use --num_iterations {step} or more"
    require(args.num_iterations >= step, message)
    was, now = (scheduled_rate(x, step) for x in (SimpleNamespace(**before), args))
    if was != now:
        print_now(f"note: the learning rate was {was:.2e} and goes on with {now:.2e}")
    if state["threads"] != THREADS:
        print_now(f"note: with {THREADS} threads in place of {state['threads']}, last bits differ")
    return args


def make_loader(args, shards, processes):
    """The DataLoader of a run. Shards that fill no batch are left out.

    args.total_batch_size, if it is 0, becomes the tokens of one batch of all processes.
    """
    B, T = args.batch_size, args.sequence_length
    batch = B * T * processes
    total = args.total_batch_size = args.total_batch_size or batch
    remedy = f"try {max(1, total // batch) * batch}"
    message = f"--total_batch_size {total} is not a multiple of B*T of all processes, {batch}"
    require(total % batch == 0, f"{message}: {remedy}")

    long = [shard for shard in shards if len(shard) > B * T]
    remedy = "use a smaller --batch_size or --sequence_length"
    require(long, f"no file of the training data has {B * T + 1} tokens, B*T + 1: {remedy}")
    if len(long) < len(shards):
        print_now(f"{len(shards) - len(long)} shards are shorter than a batch and are left out")
    if args.overfit_single_batch:
        long = [long[0][: B * T + 1]]
    return DataLoader(long, B, T, args.seed if args.shuffle else None)


def build(args, found, make):
    """Print the memory plan, and make the model. MemoryError if the machine has too little."""
    config, B, T = found.config, args.batch_size, args.sequence_length
    training = "training" in found.data
    params = 4 * count(make.param_shapes(config))

    def activations(B):
        return 4 * count(make.act_shapes(config, B, T, args.recompute, training))

    plan = {"parameters": params, "activations": activations(B)}
    if training:
        plan |= {"gradients": params, "moments": 2 * params // make.PROCESSES}
    need, free = sum(plan.values()), available_memory()
    parts = ", ".join(f"{name} {nbytes / 1e6:.0f}" for name, nbytes in plan.items())
    print_now(f"memory: {parts}, in all {need / 1e6:.0f} MB")
    if need > free:
        per_sequence = activations(B + 1) - activations(B)
        fitting = B - math.ceil((need - free) / per_sequence)
        remedy = f"--batch_size {fitting}" if fitting > 0 else "a smaller --model"
        found = f"B={B}, T={T} needs {need / 1e6:.0f} MB, {free / 1e6:.0f} MB are free"
        raise MemoryError(f"{found}: try {remedy}")
    seed = None if found.tensors else args.seed
    model = make(config, B, T, seed, args.recompute, training)
    if found.tensors:
        copy_tensors(huggingface_views(model.params), found.tensors)
    model.vocabulary = found.vocabulary
    print_now(model)
    return model


def open_run(argv, make=GPT2, first=True):
    """The Run that these flags describe: a new one, or one that is resumed.

    make    the class of the model
    first   False: another process writes to the folder
    """
    args, found = args_or_fall_back(argv)
    folder = args.output_dir if first else ""
    lock = lock_folder(folder, args.resume) if folder else None
    checkpoint, state = newest_checkpoint(args.output_dir) if args.resume else ("", None)
    if state:
        args = resumed_args(argv, state)
    elif args.resume:
        empty = f"{args.output_dir} holds NO RUN TO RESUME"
        require(args.model, f"{empty}: name a --model to begin one")
        print_now(f"{empty}, so a new one begins")
    found = found or find(args, checkpoint)
    args.sequence_length = args.sequence_length or found.config.max_seq_len

    data = state["data"] if state else {}
    for what, shards in found.data.items():
        facts = [[len(shard), zlib.crc32(shard)] for shard in shards]
        print_now(f"{what} data: {sum(n for n, _ in facts):,} tokens")
        same = data.setdefault(what, facts) == facts
        require(same, f"the {what} data has changed: put it back, or start another run")
    model = build(args, found, make)
    shards = found.data.get("training")
    loader = make_loader(args, shards, make.PROCESSES) if shards else None
    try:
        tokens = tokenizer(model.vocabulary)
        if args.prompt:
            tokens.encode(args.prompt)
    except (InputError, ConnectionError) as error:
        if args.inference_only:
            raise
        print_now(f"no samples: {error}")
        tokens = None

    run = Run(args, model, loader, found.data.get("validation"), data, tokens, folder, lock)
    if state:
        stored, _ = read_safetensors(checkpoint)
        model.moments[...] = stored["moments"]
        model.updates = run.step = run.saved = state["step"]
        loader.seek(state["position"])
        run.entries = entries_until(args, run.step)
        print_now(f"resuming from {checkpoint}")
    if loader:
        describe(run)
    return run


@contextlib.contextmanager
def noted(signals):
    """In this block a signal that asks for an end is added to a list, and the block goes on.

    Ctrl-C, SIGTERM, SIGHUP and what batch systems send first finish the update. The same signal
    once more does what it did before, which ends the program at once.
    """
    before = {}

    def note(number, frame):
        signal.signal(number, before[number])
        signals.append(number)
        with contextlib.suppress(RuntimeError):  # it has interrupted a line that is being printed
            print_now("\nfinishing this update; once more, and it stops at once")

    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"):
        number = getattr(signal, name, None)
        handler = number and signal.getsignal(number)  # SIG_IGN under nohup
        in_main_thread = threading.current_thread() is threading.main_thread()
        if in_main_thread and handler not in (None, signal.SIG_IGN):
            before[number] = handler
            signal.signal(number, note)
    try:
        yield
    finally:
        for number, usual in before.items():
            signal.signal(number, usual)


def main(argv=()):
    """Run a command line, for example one of these, and return the exit code.

    python train_gpt2.py                                       fine-tunes GPT-2 on Shakespeare
    python train_gpt2.py --model d6 --output_dir data/d6       trains a small model, and keeps it
    python train_gpt2.py --model data/d6 --inference_only 1    lets it write
    python train_gpt2.py --model data/d6 --num_iterations 0    evaluates it

    The code is 1 for what a one-line error explains, 2 for the flags, 128 + n after signal n.
    OPENBLAS_NUM_THREADS in the environment is the number of threads, by default that of the cores.
    """
    try:
        sizes = {os.environ.get(name, "1") for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")}
        require(sizes == {"1"}, "instead: mpiexec -n N python -m extras.processes FLAGS")
        warnings.filterwarnings("ignore", category=RuntimeWarning, module=__name__)
        run = open_run(argv)
        args = run.args
        if args.inference_only:
            with contextlib.suppress(BrokenPipeError):  # a reader that has enough, as in `| head`
                for text in sample_text(args, run.model, run.tokenizer, args.max_new_tokens):
                    print(text, end="", flush=True)
                print(flush=True)
        elif not run.loader:
            validate(run)
            loss = run.entries[-1]["val_loss"]
            print_now(f"perplexity {math.exp(min(loss, 700)):.2f}")
        else:
            with noted(run.signals):
                complete = train(run)
                finish(run, complete)
            return 0 if complete else 128 + run.signals[0]
        return 0
    except SystemExit as end:  # parse_args
        return end.code
    except KeyboardInterrupt:
        return 130
    except (InputError, OSError, MemoryError) as error:
        print_now(f"error: {error}", to="stderr")
        return 1


if __name__ == "__main__":
    with contextlib.suppress(AttributeError):  # what an editor puts in place of stdout
        sys.stdout.reconfigure(errors="replace")  # a sample may hold what a terminal can't show
    exit_code = main(sys.argv[1:])
    sys.stdout = None  # all is flushed; what can't be written must not change the exit code
    sys.exit(exit_code)
