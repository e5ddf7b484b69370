"""
GPT-2, trained in NumPy: the whole algorithm, written out.

There is no framework underneath. Every layer is a function that computes its output (forward),
followed by a function that computes its gradients (backward). Parameters, gradients, moments and
activations stand in one flat array, which is laid out before the first step. Names, layouts of the
parameters and file formats are those of llm.c (github.com/karpathy/llm.c). PyTorch appears only in
test_gpt2.py, which compares every tensor with it.

    python train_gpt2.py
        fine-tunes GPT-2 124M on Shakespeare

    python train_gpt2.py --model d6 --num_iterations 200 --learning_rate 1e-3 --output_dir data/d6
        trains a small model from scratch and keeps it

    python train_gpt2.py --model data/d6 --inference_only 1 --prompt "To be, or"
        lets a model continue a text

There is no tensor class here, no autograd, no layer object, no device and no mixed precision.

Sections 1 to 8 are the algorithm:

    1  imports                              5  the model forward
    2  layers                               6  the model backward
    3  the configuration                    7  AdamW
    4  memory                               8  data, one training step, sampling

The sections after them make it a tool: threads, weights, evaluation, several processes,
checkpoints, the loop, the command line.

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

Whether a backward function overwrites (=) or adds (+=) follows three rules:

    1. The gradient of an activation is overwritten, whatever stood there before.
    2. The gradient of the residual stream is added to, because the stream forks in each half of a
       layer: it is read by a layernorm, and by the addition at the end of that half. It starts
       each backward pass as 0.
    3. The gradient of a parameter is overwritten by the first micro-batch of a step and added to by
       the later ones. The argument `add` says which. So these gradients are never cleared.

There are two exceptions to rule 3, both in the embeddings. wte is used twice, by the encoder and by
the classifier. The classifier's backward pass comes first, at the end of forward(), and follows the
rule; when it takes the tokens in several pieces, only the first piece overwrites. The encoder then
always adds. And wpe has rows for positions that a short sequence does not reach; their gradient is
set to 0.

Everything is float32. The layers take any float type, and the tests run them in float64. A single
number, such as the learning rate, is a Python float, which is rounded where it meets an array.
"""

# --------------------------------------------------------------------------------------------------
# 1. Imports: what the algorithm needs. Section 9 has those of the tool

import functools
import math
import os
import signal
from dataclasses import asdict, dataclass
from types import SimpleNamespace

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends the program

# BLAS threads that have nothing to do wait for 2^20 cycles and then sleep. By default they keep a
# core busy for a tenth of a second, which costs 12 % of a step at T = 1024.
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "20")

import numpy as np  # 2.1 or newer

import prepro_tinyshakespeare as prepro  # text, tokens, downloads and every file format
from prepro_tinyshakespeare import InputError, require  # require(condition, message)

# --------------------------------------------------------------------------------------------------
# 2. The layers. Each forward is followed by its backward
#
# A backward function receives dout, the gradient of the loss with respect to its forward's output.
# It applies the chain rule and gives the gradient with respect to the forward's inputs.
#
#     function                        overwritten          added to  by `add`        only read
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
# "By `add`" is rule 3 of the header: overwritten if add is False, added to if it is True. Arguments
# may not overlap, with one exception: gelu_backward's dinp may be its dout. None of these functions
# returns anything. What one of them needs only while it runs, such as the scores of attention, it
# allocates itself; that is small beside the activations.


def encoder_forward(out, inp, wte, wpe):
    """Each token becomes the sum of its own embedding and that of its position.

    out (B, T, C); inp (B, T) token ids; wte (V, C); wpe (T, C), the rows of these T positions

        out[b, t] = wte[inp[b, t]] + wpe[t]
    """
    # The ids have been checked. With mode="raise", NumPy would check them again and make a copy.
    np.take(wte, inp, axis=0, out=out, mode="clip")
    out += wpe


def encoder_backward(dwte, dwpe, dout, inp, add):
    """The gradient of a sum is the gradient of both summands: a row of wte, and a row of wpe.

    dwte (V, C) is always added to, since the classifier has written its part before
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
        dwpe[T:] = 0  # no token stood at these positions


def accumulate(grad, value, add):
    """grad = value, or grad += value if `add`: rule 3 of the header."""
    if add:
        grad += value
    else:
        grad[...] = value


def rows_of(x):
    """(B, T, ...) seen as (B*T, ...): a row is what belongs to one token."""
    return x.reshape(-1, *x.shape[2:], copy=False)


def as_one_sequence(x):
    """(B, T, ...) seen as (1, B*T, ...), which can be cut anywhere."""
    return x.reshape(1, -1, *x.shape[2:], copy=False)


# NumPy makes one pass over memory for each operation, which is slow where arrays are larger than a
# core's cache. In layernorm, GELU and the loss the rows do not depend on each other. So these
# layers are written for a block of rows, small enough for the cache, and the decorator `by_rows`
# runs them on one block after the other.
#
# parallel(task, n), of section 9, returns the list [task(0), ..., task(n - 1)]. It spreads the
# tasks over the cores. Within a task, BLAS has one core for a matrix product; elsewhere it has all.

# The size of the widest array in a block. A few such arrays stay in a core's L2 cache or close to
# it. With smaller blocks, the threads wait for each other to get at the Python interpreter.
BLOCK_BYTES = 512 * 1024


def by_rows(num_row_args):
    """Make a layer that was written for a block of rows work on whole arrays.

    The first `num_row_args` arguments have something for each token, in the shape (B, T, ...). The
    decorated body sees a block of them as (rows, ...): B and T have become one axis, n in the sums
    below. It sees the other arguments as they are. If the body returns sums over its rows, they are
    added up in the order of the blocks. The size of a block does not depend on the number of
    threads, so neither do the results, to the last bit.
    """

    def decorate(body):
        @functools.wraps(body)
        def run(*args):
            arrays = [rows_of(a) for a in args[:num_row_args]]
            others = args[num_row_args:]
            bytes_per_row = max(a[0].nbytes for a in arrays)
            rows_per_block = max(1, BLOCK_BYTES // bytes_per_row)

            def block(i):
                rows = slice(i * rows_per_block, (i + 1) * rows_per_block)
                return body(*[a[rows] for a in arrays], *others)

            results = parallel(block, math.ceil(len(arrays[0]) / rows_per_block))
            if results[0] is None:
                return None

            total = results[0]
            for result in results[1:]:
                total = [a + b for a, b in zip(total, result, strict=True)]
            return total

        return run

    return decorate


LN_EPS = 1e-5  # keeps rstd finite when all channels are equal; OpenAI's value


@by_rows(4)
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
    # einsum sums over the letters that are missing on the right. Here n is a row and c a channel.
    # For sums of this kind it takes a third of the time of inp.sum(axis=-1).
    C = inp.shape[-1]
    np.divide(np.einsum("nc->n", inp), C, out=mean)

    np.subtract(inp, mean[:, None], out=out)
    var = np.einsum("nc,nc->n", out, out) / C
    rstd[:] = 1 / np.sqrt(var + LN_EPS)

    out *= rstd[:, None]
    out *= weight
    out += bias


def layernorm_backward(dinp, dweight, dbias, dout, inp, mean, rstd, weight, add):
    """Add layernorm's part to dinp, the gradient of the residual stream; dweight, dbias by `add`.

    dinp, dout, inp (B, T, C); mean, rstd (B, T); dweight, dbias, weight (C,)

    Call norm[i] = (inp[i] - mean) * rstd, for channel i of one token. The forward pass is

        out[i] = norm[i] * weight[i] + bias[i]

    and, since all tokens share weight and bias,

        dweight[i] = sum over tokens of dout[i] * norm[i]
        dbias[i]   = sum over tokens of dout[i]
        dnorm[i]   = dout[i] * weight[i]

    Now from dnorm to dinp. If one channel inp[j] grows by a small amount e,

        mean grows by     e / C
        var  grows by     e * 2 * (inp[j] - mean) / C
        rstd grows by     (that of var) * -1/2 * rstd^3  =  -e * rstd^2 * norm[j] / C

    (The growth of the mean changes all terms of var a little, but these changes add up to 0, since
    the sum of inp - mean is 0.) So norm[i] = (inp[i] - mean) * rstd grows, by the product rule, by

        e * rstd * ((1 if i == j, else 0) - 1 / C - norm[i] * norm[j] / C)

    Multiplied by dnorm[i] and summed over i, this is e times the gradient:

        dinp[j] += rstd * (dnorm[j] - average(dnorm) - norm[j] * average(dnorm * norm))
    """
    sums = layernorm_backward_rows(dinp, dout, inp, mean, rstd, weight)
    dweight_sum, dbias_sum = sums
    accumulate(dweight, dweight_sum, add)
    accumulate(dbias, dbias_sum, add)


@by_rows(5)
def layernorm_backward_rows(dinp, dout, inp, mean, rstd, weight):
    """Add to dinp for a block of rows, and return the sums (dweight, dbias) over these rows."""
    C = inp.shape[-1]
    norm = inp - mean[:, None]
    norm *= rstd[:, None]

    dweight = np.einsum("nc,nc->c", dout, norm)
    dbias = np.einsum("nc->c", dout)

    dnorm = dout * weight
    average = np.einsum("nc->n", dnorm) / C
    average_with_norm = np.einsum("nc,nc->n", dnorm, norm) / C

    # dinp += rstd * (dnorm - average - norm * average_with_norm), in the memory of dnorm and norm
    dnorm -= average[:, None]
    norm *= average_with_norm[:, None]
    dnorm -= norm
    dnorm *= rstd[:, None]
    dinp += dnorm
    return dweight, dbias


def matmul_forward(out, inp, weight, bias=None):
    """The linear layer, in which a step spends most of its time.

    out (B, T, OC); inp (B, T, C), where C is whatever inp has; weight (OC, C); bias (OC,)

        out[b, t, o] = sum over c of inp[b, t, c] * weight[o, c] + bias[o]

    BLAS computes it on all cores, for all B*T rows at once. weight.T exchanges the strides of a
    view; BLAS reads it as it is, and nothing is copied.
    """
    np.matmul(rows_of(inp), weight.T, out=rows_of(out))
    if bias is not None:
        out += bias


def matmul_backward(dinp, dweight, dbias, dout, inp, weight, add):
    """dinp is overwritten; dweight and dbias, if there is a bias, follow `add`.

    dinp, inp (B, T, C); dout (B, T, OC); dweight, weight (OC, C); dbias (OC,), or None

    Call n a row, one of the B*T pairs (b, t). The forward pass is

        out[n, o] = sum over c of inp[n, c] * weight[o, c] + bias[o]

    so the loss depends on inp[n, c] through every o, and on weight[o, c] through every n:

        dinp[n, c]    = sum over o of dout[n, o] * weight[o, c]       dinp    = dout @ weight
        dweight[o, c] = sum over n of dout[n, o] * inp[n, c]          dweight = dout.T @ inp
        dbias[o]      = sum over n of dout[n, o]                      dbias   = ones @ dout
    """
    dout = rows_of(dout)
    inp = rows_of(inp)

    np.matmul(dout, weight, out=rows_of(dinp))
    if add:
        add_product(dweight, dout, inp)
    else:
        np.matmul(dout.T, inp, out=dweight)
    if dbias is not None:
        ones = np.ones(len(dout), dout.dtype)
        accumulate(dbias, ones @ dout, add)


def add_product(dweight, dout, inp):
    """dweight += dout.T @ inp, some rows of dweight at a time.

    NumPy has no way to let BLAS add to what is there. A block of the product takes about 1 MiB, and
    is added while it is still in cache.
    """
    rows_per_block = max(1, 2 * BLOCK_BYTES // inp[0].nbytes)

    def block(i):
        rows = slice(i * rows_per_block, (i + 1) * rows_per_block)
        dweight[rows] += dout[:, rows].T @ inp

    parallel(block, math.ceil(len(dweight) / rows_per_block))


ATT_ROWS = 128  # attention takes this many positions at a time
FUTURE = np.triu(np.full((ATT_ROWS, ATT_ROWS), -np.inf, np.float32), k=1)


def hide_future(att):
    """att (..., n, n), n <= ATT_ROWS, of n queries and their own n keys: -inf where key > query."""
    n = att.shape[-1]
    att += FUTURE[:n, :n]


def split_heads(x, NH):
    """(B, T, C) seen as (B, NH, T, hs). Head h has the channels from h * hs to (h + 1) * hs."""
    B, T, C = x.shape
    return x.reshape(B, T, NH, C // NH, copy=False).transpose(0, 2, 1, 3)


def split_qkv(qkv, NH):
    """Queries, keys and values, each seen as (B, NH, T, hs), of qkv (B, T, 3C).

    q[b, h, t, i] = qkv[b, t, h * hs + i]; k is found C channels further, v another C further.
    """
    C = qkv.shape[-1] // 3
    q = split_heads(qkv[..., :C], NH)
    k = split_heads(qkv[..., C : 2 * C], NH)
    v = split_heads(qkv[..., 2 * C :], NH)
    return q, k, v


def head_groups(B, NH, queries, T, itemsize):
    """Attention's work, cut into pieces: a list of (b, slice of heads).

    Heads and sequences do not depend on each other, and write to different places. A piece is one
    head of one sequence, or more of them as long as the scores of a block of queries, whose shape
    is (heads, ATT_ROWS, T), take at most 1 MiB. (Backward has two such arrays, for blocks of keys.)
    """
    bytes_per_head = min(ATT_ROWS, queries) * T * itemsize
    heads_per_group = max(1, 2 * BLOCK_BYTES // bytes_per_head)

    groups = []
    for b in range(B):
        for h in range(0, NH, heads_per_group):
            heads = slice(h, min(h + heads_per_group, NH))
            groups.append((b, heads))
    return groups


def attention_forward(out, lse, qkv, NH):
    """Each position looks at itself and at those before it (Vaswani et al., 2017).

    This is the only layer in which information moves from one position to another.

    qkv (B, T, 3C); out (B, n, C) and lse (B, n, NH) are those of the last n of the T positions. In
    training n is T. In generation n is the number of new tokens, usually 1, and T counts the
    tokens so far; row i of out and lse is then that of position t = T - n + i.

    Each head h computes, with its own hs channels of the query q[t], the key k[t2] and the value
    v[t2] (see split_qkv):

        att[t, t2] = q[t] . k[t2] / sqrt(hs)          for t2 <= t, otherwise -inf
        p[t, t2]   = exp(att[t, t2]) / sum over t2 of exp(att[t, t2])
        out[t]     = sum over t2 of p[t, t2] * v[t2]
        lse[t]     = log(sum over t2 of exp(att[t, t2]))

    p would take T * T numbers for each head. It is not kept: lse, the natural logarithm of the
    softmax's denominator, is enough to compute p again in backward (Dao et al., 2022; Dao, 2023).
    """
    B, T, _ = qkv.shape
    n = out.shape[1]

    q, k, v = split_qkv(qkv, NH)
    q = q[:, :, T - n :]
    out = split_heads(out, NH)
    lse = lse.transpose(0, 2, 1)
    groups = head_groups(B, NH, n, T, qkv.itemsize)

    def group(i):
        b, heads = groups[i]
        attention_forward_heads(
            out[b, heads], lse[b, heads], q[b, heads], k[b, heads], v[b, heads]
        )

    parallel(group, len(groups))


def attention_forward_heads(out, lse, q, k, v):
    """Some heads of one sequence: out, q (heads, n, hs); lse (heads, n); k, v (heads, T, hs).

    It goes by blocks of queries, so that a row of the softmax is complete in one block. A block is
    compared with the keys up to its own end only. When T is long, this saves nearly half of the
    work.
    """
    _, n, hs = q.shape
    past = k.shape[1] - n  # positions before the first query

    q = q * hs**-0.5
    if n > 1:  # keys and values are read more than once, so it pays to bring them together
        k = np.ascontiguousarray(k)
        v = np.ascontiguousarray(v)

    for start in range(0, n, ATT_ROWS):
        stop = min(start + ATT_ROWS, n)
        visible = past + stop  # the last query of the block sees this many keys

        att = q[:, start:stop] @ k[:, :visible].swapaxes(1, 2)  # (heads, stop - start, visible)
        hide_future(att[:, :, past + start :])

        peak = att.max(axis=-1)  # subtracted, so that exp can't overflow
        att -= peak[:, :, None]
        exp_att = np.exp(att, out=att)
        total = np.einsum("hqk->hq", exp_att)
        lse[:, start:stop] = np.log(total) + peak  # that of att before peak was subtracted

        weighted_sum = exp_att @ v[:, :visible]  # (heads, stop - start, hs)
        np.divide(weighted_sum, total[:, :, None], out=out[:, start:stop])


def attention_backward(dqkv, dout, out, lse, qkv, NH):
    """dqkv, qkv (B, T, 3C); dout, out (B, T, C); lse (B, T, NH). dqkv is overwritten.

    The forward pass, for each head and with scale = 1 / sqrt(hs), is

        att = q @ k.T * scale         (T, T)
        p   = softmax(att)            (T, T), each row by itself
        out = p @ v                   (T, hs)

    From its last line to its first. If z = x @ y, then dx = dz @ y.T and dy = x.T @ dz:

        dp   = dout @ v.T             (T, T)
        dv   = p.T @ dout             (T, hs)
        datt = see below              (T, T)
        dq   = datt @ k * scale       (T, hs)
        dk   = datt.T @ q * scale     (T, hs)

    The softmax of one row: p[i] = exp(att[i]) / total, where total is the sum over all i. If att[j]
    grows by a small amount e, exp(att[j]) and total both grow by e * exp(att[j]), so

        p[j]            grows by   e * p[j] * (1 - p[j])
        p[i], i != j,   grows by   e * p[i] * (0 - p[j])

    Multiplied by dp[i] and summed over i, this is e * datt[j]:

        datt[j] = p[j] * (dp[j] - sum over i of p[i] * dp[i])

    The sum on the right need not be taken over T numbers. With dp[i] = dout . v[i] it becomes
    dout . (sum over i of p[i] * v[i]) = dout . out, a sum over hs numbers.

    For two scores 0 and log(3), p is 1/4 and 3/4. Then dp = (1, 0) gives the sum 1/4, and
    datt = (1/4 * 3/4, 3/4 * -1/4) = (3/16, -3/16).
    """
    B, T, _ = qkv.shape
    q, k, v = split_qkv(qkv, NH)
    dq, dk, dv = split_qkv(dqkv, NH)
    out = split_heads(out, NH)
    dout = split_heads(dout, NH)
    lse = lse.transpose(0, 2, 1)
    groups = head_groups(B, NH, T, T, qkv.itemsize)

    def group(i):
        b, heads = groups[i]
        attention_backward_heads(
            dq[b, heads], dk[b, heads], dv[b, heads], dout[b, heads], out[b, heads],
            lse[b, heads], q[b, heads], k[b, heads], v[b, heads],
        )  # fmt: skip

    parallel(group, len(groups))


def attention_backward_heads(dq, dk, dv, dout, out, lse, q, k, v):
    """Some heads of one sequence: lse (heads, T), all others (heads, T, hs).

    It goes by blocks of keys. The keys from t0 to t1 are seen by the queries from t0 on: in part by
    the first t1 - t0 of them, all by the later ones. So a block of keys meets all of its queries at
    once, and its dk and dv are complete. A query meets several blocks of keys, and its dq is a sum.
    """
    _, T, hs = q.shape
    scale = hs**-0.5
    q = q * scale
    k = np.ascontiguousarray(k)
    v = np.ascontiguousarray(v)
    dout = np.ascontiguousarray(dout)

    dout_dot_out = np.einsum("htc,htc->ht", dout, out)  # h is a head here, c one of its channels
    dq_sum = np.zeros_like(q)

    for t0 in range(0, T, ATT_ROWS):
        t1 = min(t0 + ATT_ROWS, T)

        att = q[:, t0:] @ k[:, t0:t1].swapaxes(1, 2)  # (heads, T - t0, t1 - t0)
        hide_future(att[:, : t1 - t0])

        att -= lse[:, t0:, None]
        p = np.exp(att, out=att)  # exp(att - lse) is p of the forward pass
        np.matmul(p.swapaxes(1, 2), dout[:, t0:], out=dv[:, t0:t1])

        dp = dout[:, t0:] @ v[:, t0:t1].swapaxes(1, 2)  # of the same shape as p
        dp -= dout_dot_out[:, t0:, None]
        datt = np.multiply(p, dp, out=dp)
        np.matmul(datt.swapaxes(1, 2), q[:, t0:], out=dk[:, t0:t1])  # q is scaled already
        dq_sum[:, t0:] += datt @ k[:, t0:t1]

    np.multiply(dq_sum, scale, out=dq)


GELU_SCALE = math.sqrt(2 / math.pi)  # gives 0.5 * (1 + tanh(u)) the slope of Phi at x = 0
GELU_CUBE = 0.044715  # makes it close to Phi elsewhere; GPT-2 was trained with this constant


@by_rows(2)
def gelu_forward(out, inp):
    """Keep large numbers and turn very negative ones into 0, smoothly. out, inp (B, T, 4C).

    GELU (Hendrycks & Gimpel, 2016) is x * Phi(x), where Phi(x) is the probability that a number of
    the standard normal distribution is below x. GPT-2 has 0.5 * (1 + tanh(u)) in place of Phi(x),
    which is close to it. For each number x by itself, with s = sqrt(2 / pi):

        u   = s * (x + 0.044715 * x^3)
        out = 0.5 * x * (1 + tanh(u))
    """
    np.multiply(inp, inp, out=out)  # x^2
    out *= GELU_SCALE * GELU_CUBE
    out += GELU_SCALE
    out *= inp  # u
    np.tanh(out, out=out)
    out += 1
    out *= inp
    out *= 0.5


@by_rows(3)
def gelu_backward(dinp, dout, inp):
    """dinp, dout, inp (B, T, 4C). dinp may be dout, which it then replaces.

    With u as in gelu_forward and th = tanh(u), whose derivative is (1 - th^2) * u':

        out  = 0.5 * x * (1 + th)
        u'   = s * (1 + 3 * 0.044715 * x^2)
        dinp = dout * 0.5 * ((1 + th) + x * (1 - th^2) * u')
             = dout * 0.5 * (1 + th) * (1 + (1 - th) * x * u')
    """
    x_squared = inp * inp
    th = x_squared * (GELU_SCALE * GELU_CUBE)
    th += GELU_SCALE
    th *= inp
    np.tanh(th, out=th)

    slope = x_squared  # in the same memory
    slope *= 3 * GELU_CUBE * GELU_SCALE
    slope += GELU_SCALE  # u'
    slope *= inp
    slope *= 1 - th
    slope += 1

    th += 1
    th *= 0.5
    slope *= th
    np.multiply(dout, slope, out=dinp)


def residual_forward(out, inp1, inp2):
    """out = inp1 + inp2, all (B, T, C). Its backward needs no code: dinp1 = dinp2 = dout."""
    np.add(inp1, inp2, out=out)


@by_rows(3)
def crossentropy_softmax_forward(losses, logits, targets):
    """The loss of each token: minus the logarithm of the probability of what came next, in nats.

    losses, targets (B, T); logits (B, T, V), overwritten by the probabilities

        probs  = exp(logits) / sum of exp(logits)
        losses = -log(probs[target]) = log(sum of exp(logits)) - logits[target]

    The largest logit is subtracted first, so that exp can't overflow. It cancels in both lines.
    """
    logits -= logits.max(axis=-1, keepdims=True)
    rows = np.arange(len(targets))
    np.negative(logits[rows, targets], out=losses)  # of each row, the entry of its target

    probs = np.exp(logits, out=logits)
    total = np.einsum("nv->n", probs)
    losses += np.log(total)
    probs *= (1 / total)[:, None]


@by_rows(2)
def crossentropy_softmax_backward(probs, targets, dloss):
    """probs (B, T, V) from the forward pass, overwritten by dlogits; targets (B, T).

    dloss is one number: how much the loss of one token counts, 1 / (B*T) when the loss is the mean.

        loss = log(sum over i of exp(logits[i])) - logits[target]

    The derivative of the logarithm by logits[i] is exp(logits[i]) / sum = probs[i], so

        dlogits[i] = (probs[i] - (1 if i is the target, else 0)) * dloss
    """
    dlogits = probs  # in the same memory
    rows = np.arange(len(targets))
    dlogits[rows, targets] -= 1
    dlogits *= dloss


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

    def __post_init__(self):
        for name, value in asdict(self).items():
            whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
            require(whole and value > 0, f"{name} is {value!r}, expected a positive integer")
            object.__setattr__(self, name, int(value))  # the way to set it in a frozen class

        C, NH = self.channels, self.num_heads
        require(C % NH == 0, f"{C} channels can't be shared by {NH} heads")


# --------------------------------------------------------------------------------------------------
# 4. Memory: two tables and one blob
#
# Everything that outlives a layer stands in one array, the blob. It is allocated once, filled with
# zeros. The system gives memory to a page of zeros only when something is written to it.
#
#     | params     | grads      | m          | v          | activations     | work space      |
#     | wte..lnfb  | wte..lnfb  | wte..lnfb  | wte..lnfb  | encoded..losses | dresidual..dln1 |
#
#     | <------- flat: four rows of equal length -------------> | <------------- acts ----------> |
#                        |
#                        all but dwte: logits, in the forward pass of the first micro-batch of a
#                        step, because backward has not written there yet (see room_for_logits)
#
# A table is a dict from names to shapes, and its order is the order in memory. Sizes, views,
# checkpoints and the coverage of the tests all follow from the two tables below.


def param_shapes(config):
    """The parameters, in llm.c's order. A matmul's weight has the shape (OC, C)."""
    V, L, C = config.vocab_size, config.num_layers, config.channels
    return {
        "wte": (V, C),  # token embeddings; the classifier uses the same matrix
        "wpe": (config.max_seq_len, C),  # position embeddings
        "ln1w": (L, C),
        "ln1b": (L, C),
        "qkvw": (L, 3 * C, C),
        "qkvb": (L, 3 * C),
        "attprojw": (L, C, C),
        "attprojb": (L, C),
        "ln2w": (L, C),
        "ln2b": (L, C),
        "fcw": (L, 4 * C, C),
        "fcb": (L, 4 * C),
        "fcprojw": (L, C, 4 * C),
        "fcprojb": (L, C),
        "lnfw": (C,),
        "lnfb": (C,),
    }


# The backward pass needs what forward computed. It can be kept, or computed again (Chen et al.,
# 2016). What is computed again is kept for one layer at a time, in memory that all layers share.
SHARED_BY_LAYERS = {
    # 0 keeps everything. Use it to compare another implementation with this one.
    0: [],
    # 1 computes layernorm and GELU again, which takes 1 to 2 % of a step, and shares the outputs of
    # the two projections (attproj and fcproj), which backward never reads.
    1: ["ln1", "attproj", "ln2", "fch_gelu", "fcproj"],
    # 2 keeps a layer's output, residual3, and computes the next layer again from it.
    2: ["ln1", "ln1_mean", "ln1_rstd", "qkv", "att_lse", "atty", "attproj", "residual2",
        "ln2", "ln2_mean", "ln2_rstd", "fch", "fch_gelu", "fcproj"],
}  # fmt: skip

# Without a backward pass, only the keys and values of earlier tokens are needed again.
SHARED_IN_GENERATION = [*SHARED_BY_LAYERS[2], "residual3"]
SHARED_IN_GENERATION.remove("qkv")

LOGITS_ROWS = 256  # the classifier takes this many tokens at a time, or more: see room_for_logits


def act_shapes(config, B, T, recompute=1, training=True):
    """The activations in the order in which they are computed, then the backward pass's work space.

    recompute   0 keeps all that backward needs, 1 and 2 keep less and compute it again: see
                SHARED_BY_LAYERS
    training    False: a model that only generates and validates has no work space for backward
    """
    V, L, C, NH = config.vocab_size, config.num_layers, config.channels, config.num_heads
    shapes = {
        "encoded": (B, T, C),
        "ln1": (L, B, T, C),
        "ln1_mean": (L, B, T),
        "ln1_rstd": (L, B, T),
        "qkv": (L, B, T, 3 * C),  # queries, keys, values
        "att_lse": (L, B, T, NH),  # what attention's backward needs to compute the softmax again
        "atty": (L, B, T, C),
        "attproj": (L, B, T, C),
        "residual2": (L, B, T, C),
        "ln2": (L, B, T, C),
        "ln2_mean": (L, B, T),
        "ln2_rstd": (L, B, T),
        "fch": (L, B, T, 4 * C),
        "fch_gelu": (L, B, T, 4 * C),
        "fcproj": (L, B, T, C),
        "residual3": (L, B, T, C),
        "lnf": (B, T, C),
        "lnf_mean": (B, T),
        "lnf_rstd": (B, T),
        "logits": (1, min(B * T, LOGITS_ROWS), V),  # a piece; in turns logits, probs and dlogits
        "losses": (B, T),
    }

    shared = SHARED_BY_LAYERS[recompute] if training else SHARED_IN_GENERATION
    for name in shared:
        shapes[name] = (1, *shapes[name][1:])  # one for all layers

    if training:
        shapes |= {
            "dresidual": (B, T, C),  # the gradient of the residual stream, from the top down
            "dlnf": (B, T, C),  # written by forward already: see GPT2.classifier
            "dfch": (B, T, 4 * C),  # first dfch_gelu, which gelu_backward turns into dfch in place
            "dln2": (B, T, C),
            "datty": (B, T, C),
            "dqkv": (B, T, 3 * C),
            "dln1": (B, T, C),
        }
    return shapes


# These have no leading dimension for the layer. All others are indexed [l] first.
NOT_PER_LAYER = {
    "wte", "wpe", "lnfw", "lnfb",
    "encoded", "lnf", "lnf_mean", "lnf_rstd", "logits", "losses",
    "dresidual", "dlnf", "dfch", "dln2", "datty", "dqkv", "dln1",
}  # fmt: skip


def count(shapes):
    """Number of elements of all tensors in a table."""
    return sum(math.prod(shape) for shape in shapes.values())


def carve(flat, shapes):
    """Cut a flat array into named views, in the table's order: {"wte": (V, C) view, ...}."""
    views = {}
    start = 0
    for name, shape in shapes.items():
        stop = start + math.prod(shape)
        views[name] = flat[start:stop].reshape(shape)
        start = stop
    return views


def of_layer(view, l):
    """Layer l's part of a view (L, ...). A view (1, ...) is shared: then it is the one part."""
    return view[l] if len(view) > 1 else view[0]


def layer(views, l, tokens=...):
    """The views of layer l as attributes: layer(params, 3).qkvw is params["qkvw"][3].

    tokens   of activations (B, T, ...), an index into B and T; all of them by default
    """
    own = SimpleNamespace()
    for name, view in views.items():
        if name not in NOT_PER_LAYER:
            setattr(own, name, of_layer(view, l)[tokens])
    return own


def init_weights(params, seed):
    """Fill the parameters of a new model, as llm.c and Hugging Face do (Radford et al., 2019).

    Weights are normal with a standard deviation of 0.02. The two projections into the residual
    stream have 0.02 / sqrt(2L), because the outputs of 2L of them are added up there. The weights
    of layernorm are 1. Biases are 0, as they are in a new blob. The numbers are NumPy's: another
    program draws others from the same seed.
    """
    rng = np.random.default_rng(seed)
    L = len(params["qkvw"])

    for name, view in params.items():
        is_bias = name.endswith("b")
        if name in ("ln1w", "ln2w", "lnfw"):
            view[...] = 1
        elif not is_bias:
            rng.standard_normal(out=view.reshape(-1), dtype=view.dtype)
            into_residual = name in ("attprojw", "fcprojw")
            view *= 0.02 / math.sqrt(2 * L) if into_residual else 0.02


# --------------------------------------------------------------------------------------------------
# 5. The model forward: a line or two for each layer
#
# Where the time of a step goes (124M, B = 4, T = 64, two cores of an Intel Xeon): of 1119 ms, the
# matrix products take 758, AdamW 192, attention 49, GELU 48, layernorm 47, everything else 25.


class GPT2:
    """A GPT-2, and the memory of its parameters, gradients, moments and activations.

    config                        GPT2Config
    batch_size, sequence_length   B and T of its batches
    seed                          of fresh weights; None leaves them zero, to be read from a file
    recompute                     0, 1 or 2: see SHARED_BY_LAYERS
    training                      False: a model that generates and validates, without gradients
    dtype                         float32; the tests also use float64

    params, grads, m, v, acts are dicts of named views of the array `blob`. flat is its first part:
    four rows, each of which holds all parameters, gradients, m or v. (With training=False it is one
    row, of parameters.)

    One step is forward(), backward(), update(). Several micro-batches make one step if forward()
    and backward() are called for each of them before update(). `stage` says how far the step is:

        "no gradients"    forward() is next
        "first forward"   that of the first micro-batch is done, backward() is next
        "gradients"       grads hold those of all micro-batches so far. update() is next, or
                          forward() of another micro-batch
        "later forward"   that of a later micro-batch is done, backward() is next

    or, after a call that was interrupted, a sentence that says so.
    """

    def __init__(
        self,
        config,
        batch_size=4,
        sequence_length=64,
        seed=1337,
        recompute=1,
        training=True,
        dtype=np.float32,
    ):
        B, T = batch_size, sequence_length
        require(B > 0, f"batch size {B}: expected at least 1")
        require(
            0 < T <= config.max_seq_len,
            f"sequence length {T}: expected 1 to {config.max_seq_len}, the model's context",
        )
        require(
            recompute in SHARED_BY_LAYERS,
            f"recompute is {recompute!r}, expected one of {list(SHARED_BY_LAYERS)}",
        )
        self.config = config
        self.batch_size = B
        self.sequence_length = T
        self.recompute = recompute
        self.training = training

        shapes = param_shapes(config)
        acts = act_shapes(config, B, T, recompute, training)
        n = count(shapes)
        rows = 4 if training else 1  # without training there are parameters only
        self.blob = np.zeros(rows * n + count(acts), dtype)
        self.flat = self.blob[: rows * n].reshape(rows, n)

        self.params = carve(self.flat[0], shapes)
        self.grads = carve(self.flat[1], shapes) if training else {}
        self.m = carve(self.flat[2], shapes) if training else {}
        self.v = carve(self.flat[3], shapes) if training else {}
        self.acts = carve(self.blob[rows * n :], acts)

        self.stage = "no gradients"
        self.inputs = None  # of the last forward pass; encoder_backward needs them
        self.updates = 0  # how many updates there have been
        self.keys_owner = None  # the generator whose keys and values are in acts["qkv"]
        if seed is not None:
            init_weights(self.params, seed)

    def forward(self, inputs, targets, train=True, grad_scale=1.0):
        """The mean cross-entropy, in nats, of predicting targets from inputs: a float.

        inputs, targets (B, T) integers; targets[b, t] is what comes after inputs[b, t]

        train        False: for validation, without a backward pass
        grad_scale   the gradients will be those of loss * grad_scale. It is 1/k where k
                     micro-batches make one step
        """
        inputs = self.check_tokens(inputs, "inputs")
        targets = self.check_tokens(targets, "targets")
        expected = (self.batch_size, self.sequence_length)
        require(
            inputs.shape == targets.shape == expected,
            f"inputs {inputs.shape}, targets {targets.shape}: expected {expected}",
        )
        require(
            self.training or not train,
            "a model made with training=False has no gradients: use forward(..., train=False)",
        )

        self.forward_rows(inputs)
        if not train:
            self.classifier(targets)
            return float(self.acts["losses"].mean())

        add = self.stage == "gradients"  # then this is a later micro-batch
        if add:
            self.stage = "forward() was interrupted while it added to the gradients"
        self.classifier(targets, dloss=grad_scale / targets.size, add=add)
        self.inputs = inputs.copy()
        self.stage = "later forward" if add else "first forward"
        return float(self.acts["losses"].mean())

    def forward_rows(self, tokens, start=0):
        """All layers up to lnf for tokens (B, n) at the positions start to start + n.

        In training the tokens are a whole batch, and start is 0. In generation B is 1, and
        acts["qkv"] holds the keys and values of the positions before start already, so that only
        the n new positions are computed. Returns lnf (B, n, C).
        """
        self.begin_forward()
        B, n = tokens.shape
        params, acts = self.params, self.acts

        residual = acts["encoded"][:B, :n]
        encoder_forward(residual, tokens, params["wte"], params["wpe"][start : start + n])
        for l in range(self.config.num_layers):
            p, a = self.forward_layer(l, residual, start)
            matmul_forward(a.fcproj, a.fch_gelu, p.fcprojw, p.fcprojb)
            residual_forward(a.residual3, a.residual2, a.fcproj)
            residual = a.residual3  # with training=False, the same memory in every layer

        lnf = acts["lnf"][:B, :n]
        mean = acts["lnf_mean"][:B, :n]
        rstd = acts["lnf_rstd"][:B, :n]
        layernorm_forward(lnf, mean, rstd, residual, params["lnfw"], params["lnfb"])
        return lnf

    def forward_layer(self, l, residual, start=0):
        """Layer l from residual (B, n, C), its input, up to fch_gelu: all that its backward needs.

        The last two lines of a layer stand in forward_rows, because recompute_layer does without
        them. Returns the layer's parameters and its activations for these tokens: see layer().
        """
        B, n, _ = residual.shape
        p = layer(self.params, l)
        a = layer(self.acts, l, np.s_[:B, :n])  # in training, all of them

        # Attention looks back to position 0. So qkv alone is indexed by position, where the other
        # activations begin with the first of the n tokens.
        qkv_so_far = of_layer(self.acts["qkv"], l)[:B, : start + n]
        new_qkv = qkv_so_far[:, start:]

        layernorm_forward(a.ln1, a.ln1_mean, a.ln1_rstd, residual, p.ln1w, p.ln1b)
        matmul_forward(new_qkv, a.ln1, p.qkvw, p.qkvb)
        attention_forward(a.atty, a.att_lse, qkv_so_far, self.config.num_heads)
        matmul_forward(a.attproj, a.atty, p.attprojw, p.attprojb)
        residual_forward(a.residual2, residual, a.attproj)

        layernorm_forward(a.ln2, a.ln2_mean, a.ln2_rstd, a.residual2, p.ln2w, p.ln2b)
        matmul_forward(a.fch, a.ln2, p.fcw, p.fcb)
        gelu_forward(a.fch_gelu, a.fch)
        return p, a

    def classifier(self, targets, dloss=None, add=False):
        """acts["losses"] from acts["lnf"]; and, if dloss is given, the classifier's backward pass.

        The logits (B, T, V) would be the largest array of all. Each token's logits only serve its
        own loss, so we take some tokens at a time, a piece, all the way: logits, probabilities,
        losses, gradients. This is why the classifier's backward pass runs here, and not in
        backward(): the logits of these tokens are gone when the next ones come. It leaves dlnf, and
        its part of dwte. dloss is the weight of one token's loss.
        """
        wte = self.params["wte"]
        lnf = as_one_sequence(self.acts["lnf"])
        losses = as_one_sequence(self.acts["losses"])
        targets = as_one_sequence(targets)

        gradients_are_free = dloss is not None and not add
        room = self.room_for_logits() if gradients_are_free else self.acts["logits"]
        num_tokens = targets.size
        tokens_per_piece = room.shape[1]

        for start in range(0, num_tokens, tokens_per_piece):
            stop = min(start + tokens_per_piece, num_tokens)
            piece = np.s_[:, start:stop]

            logits = room[:, : stop - start]
            matmul_forward(logits, lnf[piece], wte)
            crossentropy_softmax_forward(losses[piece], logits, targets[piece])

            if dloss is not None:
                dwte = self.grads["wte"]
                dlnf = as_one_sequence(self.acts["dlnf"])
                dlogits = logits  # in the same memory, which holds the probabilities now
                crossentropy_softmax_backward(dlogits, targets[piece], dloss)
                add_piece = add or start > 0
                matmul_backward(dlnf[piece], dwte, None, dlogits, lnf[piece], wte, add_piece)

    def room_for_logits(self):
        """Memory (1, tokens, V) for logits while the gradients hold nothing of use.

        In the forward pass of the first micro-batch that is so for all gradients but dwte, because
        backward will overwrite them. For 124M there is room for 1708 tokens, where acts["logits"]
        has 256, and larger pieces make the products faster, by 4 % of a step at B*T = 1024. Later
        micro-batches and validation must leave the gradients alone, and use acts["logits"].
        """
        V, C = self.params["wte"].shape
        free = self.flat[1, V * C :]  # all gradients but dwte, which stands first
        tokens = min(self.acts["losses"].size, len(free) // V)
        if tokens < self.acts["logits"].shape[1]:  # a small model with a large vocabulary
            return self.acts["logits"]
        return free[: tokens * V].reshape(1, tokens, V)

    # ----------------------------------------------------------------------------------------------
    # 6. The model backward: section 5 in reverse order

    def backward(self):
        """Fill grads with the gradients of the last forward pass.

        The first micro-batch since an update or zero_grad overwrites them, later ones add. The
        classifier has left dlnf and its part of dwte.
        """
        self.refuse_interrupted()
        require(
            self.stage in ("first forward", "later forward"),
            "backward(): there is no forward() to go back from, or another one has overwritten its "
            "activations: call forward() first",
        )
        add = self.stage == "later forward"
        self.stage = "backward() was interrupted, and the gradients are incomplete"

        params, grads, acts = self.params, self.grads, self.acts
        L, NH = self.config.num_layers, self.config.num_heads
        dresidual, dlnf, dfch = acts["dresidual"], acts["dlnf"], acts["dfch"]
        dln2, datty, dqkv, dln1 = acts["dln2"], acts["datty"], acts["dqkv"], acts["dln1"]

        dresidual[...] = 0
        layernorm_backward(
            dresidual, grads["lnfw"], grads["lnfb"],
            dlnf, acts["residual3"][-1], acts["lnf_mean"], acts["lnf_rstd"], params["lnfw"], add,
        )  # fmt: skip

        for l in reversed(range(L)):
            p, g, a = layer(params, l), layer(grads, l), layer(acts, l)
            residual = acts["residual3"][l - 1] if l > 0 else acts["encoded"]
            self.recompute_layer(l, residual)

            # residual3 = residual2 + fcproj. dresidual is the gradient of fcproj, and one part of
            # that of residual2. layernorm_backward adds the other part.
            matmul_backward(dfch, g.fcprojw, g.fcprojb, dresidual, a.fch_gelu, p.fcprojw, add)
            gelu_backward(dfch, dfch, a.fch)  # from dfch_gelu to dfch, in place
            matmul_backward(dln2, g.fcw, g.fcb, dfch, a.ln2, p.fcw, add)
            layernorm_backward(
                dresidual, g.ln2w, g.ln2b, dln2, a.residual2, a.ln2_mean, a.ln2_rstd, p.ln2w, add
            )

            # residual2 = residual + attproj, likewise.
            matmul_backward(datty, g.attprojw, g.attprojb, dresidual, a.atty, p.attprojw, add)
            attention_backward(dqkv, datty, a.atty, a.att_lse, a.qkv, NH)
            matmul_backward(dln1, g.qkvw, g.qkvb, dqkv, a.ln1, p.qkvw, add)
            layernorm_backward(
                dresidual, g.ln1w, g.ln1b, dln1, residual, a.ln1_mean, a.ln1_rstd, p.ln1w, add
            )

        encoder_backward(grads["wte"], grads["wpe"], dresidual, self.inputs, add)
        self.stage = "gradients"

    def recompute_layer(self, l, residual):
        """Compute again what forward did not keep of layer l: see SHARED_BY_LAYERS.

        residual (B, T, C) is the layer's input. Means and rstds come out as they were.
        """
        last = self.config.num_layers - 1
        if l == last:
            return  # the shared memory still holds what forward computed last

        if self.recompute == 1:
            p = layer(self.params, l)
            a = layer(self.acts, l)
            layernorm_forward(a.ln1, a.ln1_mean, a.ln1_rstd, residual, p.ln1w, p.ln1b)
            layernorm_forward(a.ln2, a.ln2_mean, a.ln2_rstd, a.residual2, p.ln2w, p.ln2b)
            gelu_forward(a.fch_gelu, a.fch)

        if self.recompute == 2:
            self.forward_layer(l, residual)

    def zero_grad(self):
        """Forget the gradients. Nothing is cleared: the next micro-batch overwrites them."""
        self.stage = "no gradients"

    # ----------------------------------------------------------------------------------------------
    # 7. AdamW

    def grad_norm(self, part=np.s_[:]):
        """The length of the gradient, as one vector of all parameters, or of a part of it: a float.

        It may be called between backward() and update(). The squares are added up in float32 within
        a chunk, and in Python's float64 over the chunks.
        """
        self.require_gradients("grad_norm()")
        grads = self.flat[1, part]

        def squares(i):
            chunk = grads[i * ADAMW_CHUNK : (i + 1) * ADAMW_CHUNK]
            return float(np.dot(chunk, chunk))

        return math.sqrt(sum(parallel(squares, math.ceil(len(grads) / ADAMW_CHUNK))))

    def update(
        self,
        learning_rate,
        beta1=0.9,
        beta2=0.999,
        eps=1e-8,
        weight_decay=0.0,
        step=None,
        grad_scale=1.0,
        part=np.s_[:],
    ):
        """One step of AdamW on all parameters.

        weight_decay   applies to matrices and embeddings, not to biases and layernorms
        step           the number of this update, from 1; the model counts by itself if it is None
        grad_scale     what the gradients are multiplied by first, less than 1 if they are clipped
        part           the slice of the flat vector of parameters that is updated: all of it, unless
                       several processes share the work
        """
        self.require_gradients("update()")
        step = self.updates + 1 if step is None else step
        require(step >= 1, f"update(step={step}): steps are counted from 1")
        self.stage = "update() was interrupted, and some parameters have changed, others have not"

        p, g, m, v = self.flat
        chunks = adamw_chunks(self.params, part)

        def update_chunk(i):
            name, chunk = chunks[i]
            decay = learning_rate * weight_decay if is_decayed(name) else 0.0
            adamw(
                p[chunk], g[chunk], m[chunk], v[chunk],
                decay, learning_rate, beta1, beta2, eps, step, grad_scale,
            )  # fmt: skip

        parallel(update_chunk, len(chunks))
        self.keys_owner = None  # the keys and values are those of the old parameters
        self.updates = step
        self.stage = "no gradients"

    # ----------------------------------------------------------------------------------------------
    # The order of calls, and what else one does with a model

    def begin_forward(self):
        """Refuse a forward pass that would spoil the gradients, or forget what it overwrites."""
        self.refuse_interrupted()
        require(
            self.stage != "later forward",  # has added its part to dwte, which can't be taken back
            "the last forward() waits for its backward(): call backward() or zero_grad() first",
        )
        if self.stage == "first forward":
            self.stage = "no gradients"  # no backward() can follow without its activations
        self.keys_owner = None

    def require_gradients(self, call):
        """InputError unless grads hold gradients. After forward() they may hold logits."""
        self.refuse_interrupted()
        require(
            self.stage == "gradients",
            f"{call} needs gradients: call forward() and backward() first",
        )

    def refuse_interrupted(self):
        """InputError if a call was interrupted, and has left its work half done.

        If it was update(), some parameters have taken the step and others have not. zero_grad()
        makes it possible to go on from there. Only a checkpoint has the parameters as they were.
        """
        stages = ("no gradients", "first forward", "gradients", "later forward")
        require(self.stage in stages, f"{self.stage}: call zero_grad(), then forward()")

    @classmethod
    def from_pretrained(
        cls, source, batch_size=4, sequence_length=64, recompute=1, training=True
    ):
        """A model with weights from outside.

        source: "gpt2", "gpt2-medium", "gpt2-large" or "gpt2-xl"; a folder of Hugging Face's; a
        .safetensors file; or a .bin file of llm.c's. Errors: InputError, OSError.
        """
        return load_pretrained(cls, source, batch_size, sequence_length, recompute, training)

    def save_pretrained(self, folder):
        """Write config.json and model.safetensors, which Hugging Face's GPT2LMHeadModel reads."""
        prepro.save_huggingface(folder, asdict(self.config), self.params)

    def generate(self, tokens, max_new_tokens, temperature=1.0, top_k=0, rng=None):
        """Continue a list of token ids: an iterator over new ids, each as soon as it is known.

        The model looks back over at most sequence_length tokens; of a longer prompt it reads the
        last ones.

        temperature   0 always takes the likeliest token
        top_k         above 0, choose among the k likeliest
        rng           a NumPy Generator, or a seed
        """
        tokens = self.check_tokens(list(tokens), "prompt")
        rng = np.random.default_rng(0 if rng is None else rng)
        return generate_tokens(self, tokens.tolist(), max_new_tokens, temperature, top_k, rng)

    def __getstate__(self):
        """What copy.deepcopy and pickle keep: not the views, which __init__ carves anew."""
        return {
            "config": self.config,
            "batch_size": self.batch_size,
            "sequence_length": self.sequence_length,
            "recompute": self.recompute,
            "training": self.training,
            "blob": self.blob,
            "stage": self.stage,
            "inputs": self.inputs,
            "updates": self.updates,
        }

    def __setstate__(self, state):
        self.__init__(
            state["config"],
            state["batch_size"],
            state["sequence_length"],
            seed=None,
            recompute=state["recompute"],
            training=state["training"],
            dtype=state["blob"].dtype,
        )
        self.blob[...] = state["blob"]
        self.stage = state["stage"]
        self.inputs = state["inputs"]
        self.updates = state["updates"]

    def check_tokens(self, tokens, what):
        """tokens as an integer array, or InputError if one of them is no id of the vocabulary."""
        tokens = np.ascontiguousarray(tokens)
        V = self.config.vocab_size
        require(
            tokens.size > 0 and tokens.dtype.kind in "iu",
            f"{what}: expected integers, found {tokens.size} of {tokens.dtype}",
        )
        lowest, highest = tokens.min(), tokens.max()
        require(
            0 <= lowest and highest < V,
            f"{what}: ids {lowest} to {highest}, expected 0 to {V - 1}",
        )
        return tokens


# --------------------------------------------------------------------------------------------------
# 7. AdamW, continued: what update() does with each chunk of the parameters

ADAMW_CHUNK = 1 << 17  # elements; with chunks half as large, an update takes a tenth longer


def adamw_chunks(params, part):
    """AdamW's work, cut into pieces: a list of (name, slice of the flat vector of parameters).

    A chunk never crosses the border of a tensor, nor of `part`, the slice that is to be updated.
    """
    num_params = sum(view.size for view in params.values())
    part_start, part_stop, _ = part.indices(num_params)

    chunks = []
    tensor_start = 0
    for name, view in params.items():
        tensor_stop = tensor_start + view.size
        start = max(tensor_start, part_start)
        stop = min(tensor_stop, part_stop)
        for i in range(start, stop, ADAMW_CHUNK):
            chunk = slice(i, min(i + ADAMW_CHUNK, stop))
            chunks.append((name, chunk))
        tensor_start = tensor_stop
    return chunks


def is_decayed(name):
    """Whether weight decay applies to a parameter: to matrices and embeddings, as is usual.

    A layernorm's scale has its best value near 1, not near 0, and biases are few and small.
    """
    return not name.startswith("ln") and not name.endswith("b")


def adamw(p, g, m, v, decay, learning_rate, beta1, beta2, eps, step, grad_scale):
    """AdamW (Loshchilov & Hutter, 2017) on parameters p, gradients g and moments m, v: flat arrays.

    p, m and v are updated in place; g is multiplied by grad_scale.

        m = beta1 * m + (1 - beta1) * g              the running mean of the gradient
        v = beta2 * v + (1 - beta2) * g^2            the running mean of its square
        p = p - decay * p - learning_rate * (m / c1) / (sqrt(v / c2) + eps)

    m and v start at 0 and are too small at first; c1 = 1 - beta1^step and c2 = 1 - beta2^step make
    up for it. decay is learning_rate * weight_decay.

    c1 and c2 are numbers, while m and v are arrays. We multiply the fraction by sqrt(c2), above and
    below, and get a formula with two passes over memory fewer:

        p = p - decay * p - (learning_rate * sqrt(c2) / c1) * m / (sqrt(v) + eps * sqrt(c2))
    """
    c1 = 1 - beta1**step
    c2 = 1 - beta2**step
    if grad_scale != 1.0:
        g *= grad_scale

    change = g - m  # m + (1 - beta1) * (g - m) is the formula above
    change *= 1 - beta1
    m += change

    np.multiply(g, g, out=change)  # the same for v
    change -= v
    change *= 1 - beta2
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

    source        an array of token ids, or a pattern of token files: see open_shards
    shuffle_seed  None: the windows of a shard in the order of the text. A number: in an order that
                  is drawn anew for each epoch
    rank, size    of `size` processes that share the data, this is number `rank`

    A shard is cut into windows of T tokens, and a batch is B windows. position is what the next
    batch depends on: [shard, offset, epoch], where offset counts the tokens seen of this shard.
    Windows at the end of a shard that do not fill a batch are left out.
    """

    def __init__(self, source, B, T, vocab_size, shuffle_seed=None, rank=0, size=1):
        self.B, self.T = B, T
        self.shuffle_seed = shuffle_seed
        self.rank, self.size = rank, size
        self.names, self.shards = open_shards(source)
        self.sizes = [len(shard) for shard in self.shards]

        for name, shard in zip(self.names, self.shards, strict=True):
            require(
                len(shard) >= B * T + 1,
                f"{name}: has {len(shard)} tokens, a batch needs B*T + 1 = {B * T + 1}: "
                "use a smaller --batch_size",
            )
            highest = shard.max()
            require(
                highest < vocab_size,
                f"{name}: holds token {highest}, the model's vocabulary ends at {vocab_size - 1}",
            )
        self.seek([0, 0, 0])

    def seek(self, position):
        """Go to a position. One without an epoch, from an old checkpoint, is in epoch 0."""
        shard, offset = position[:2]
        epoch = position[2] if len(position) > 2 else 0
        self.position = [shard, offset, epoch]
        self.first, self.order = self.windows(shard, epoch)

    def windows(self, shard, epoch):
        """Where the first window of a shard begins, and the order in which windows are taken."""
        num_tokens, B, T = self.sizes[shard], self.B, self.T
        if self.shuffle_seed is None:
            return 0, np.arange((num_tokens - 1) // T)

        # Each epoch cuts the shard at other places: the first window begins at one of its first T
        # tokens, but not so late that less than a batch is left. Seed, shard and epoch alone fix
        # the order, so a run that is resumed at a position finds the same windows.
        rng = np.random.default_rng([self.shuffle_seed, shard, epoch])
        first = int(rng.integers(min(T, num_tokens - B * T)))
        return first, rng.permutation((num_tokens - 1 - first) // T)

    def next_batch(self):
        """inputs, targets (B, T), int64. The targets are the inputs, one token further."""
        for turn in range(self.size):  # the batches of the other processes are passed over
            if turn == self.rank:
                inputs, targets = self.read_batch()
            self.advance()
        return inputs, targets

    def read_batch(self):
        """The batch at the present position."""
        shard, offset, _ = self.position
        tokens = self.shards[shard]
        next_window = offset // self.T

        inputs = np.empty((self.B, self.T), np.int64)
        targets = np.empty((self.B, self.T), np.int64)
        for b in range(self.B):
            start = self.first + self.order[next_window + b] * self.T
            stop = start + self.T
            inputs[b] = tokens[start:stop]
            targets[b] = tokens[start + 1 : stop + 1]
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


def train_step(
    model, loader, micro_batches, learning_rate, weight_decay=0.0, grad_clip=0.0, step=None,
    check=lambda value, what: None,
):  # fmt: skip
    """One update from the next micro_batches batches of the loader: returns (loss, norm).

    Where several processes train together, train_step_together (section 12) takes its place.

    grad_clip   a gradient whose norm is larger is scaled down to this norm; 0 never scales
    check       called with the loss so far, and with the norm, and their names, before they are
                used. It may raise an error, if one of them is not finite
    """
    loss = 0.0
    for _ in range(micro_batches):
        inputs, targets = loader.next_batch()
        loss += model.forward(inputs, targets, grad_scale=1 / micro_batches) / micro_batches
        check(loss, "loss")
        model.backward()

    norm = model.grad_norm()
    check(norm, "gradient norm")
    clip = grad_clip / norm if 0 < grad_clip < norm else 1.0
    model.update(learning_rate, weight_decay=weight_decay, step=step, grad_scale=clip)
    return loss, norm


def generate_tokens(model, tokens, max_new_tokens, temperature, top_k, rng):
    """GPT2.generate, whose arguments are described there.

    After the prompt, each new token costs one position, because the keys and values of those before
    it are kept in acts["qkv"]. When there are more than sequence_length tokens, the newer half of
    them begins a new window.

    Two things spoil the keys. Another generator, another forward pass or an update may come in
    between; the model remembers whose keys it has. And in a model for training with recompute = 2,
    all layers share one qkv. In both cases the whole window is computed again.
    """
    T = model.sequence_length
    keeps_keys = len(model.acts["qkv"]) == model.config.num_layers
    owner = object()  # stands for this generator
    window = tokens[-T:]
    done = 0  # how many tokens of the window have their keys and values in acts["qkv"]

    for _ in range(max_new_tokens):
        if len(window) > T:
            window = window[-max(1, T // 2) :]
            done = 0
        if model.keys_owner is not owner or not keeps_keys:
            done = 0

        lnf = model.forward_rows(np.array([window[done:]]), start=done)
        model.keys_owner = owner
        done = len(window)

        logits = model.acts["logits"][:, :1]
        matmul_forward(logits, lnf[:, -1:], model.params["wte"])
        window.append(sample(logits[0, 0], temperature, top_k, rng))
        yield window[-1]


def sample(logits, temperature, top_k, rng):
    """One token id drawn from softmax(logits / temperature), logits (V,).

    Lay the tokens side by side on a line, each as long as it is likely, and drop a pin on the line.
    """
    if temperature < 1e-30:  # 0, or so small that float32 would take it for 0
        return int(logits.argmax())

    logits = (logits - logits.max()) / temperature
    if 0 < top_k < len(logits):
        kth_largest = np.partition(logits, -top_k)[-top_k]
        logits[logits < kth_largest] = -np.inf

    ends = np.exp(logits).cumsum()  # where each token ends on the line
    pin = rng.random(dtype=np.float32) * ends[-1]
    token = np.searchsorted(ends, pin, "right")  # the first token that ends behind the pin
    return int(min(token, len(logits) - 1))  # with NaN among the logits, there is none


# --------------------------------------------------------------------------------------------------
# Here the algorithm ends, and you may stop reading. What follows makes a tool of it.
# --------------------------------------------------------------------------------------------------
# 9. Threads
#
# From here on the file deals with files, processes and command lines, and imports what they need.

import argparse
import codecs
import contextlib
import ctypes
import glob
import json
import shutil
import sys
import threading
import time
import traceback
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor, wait

# There are two kinds. BLAS has threads of its own, which serve the large matrix products. The
# threads of `parallel` run blocks of rows; they run side by side because NumPy lets go of the
# interpreter lock while it computes. While they run, BLAS is held to one thread, so that the two
# kinds never compete for a core.


def threads_named():
    """OPENBLAS_NUM_THREADS or OMP_NUM_THREADS, if one of them is a number, else None."""
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
        first = os.environ.get(name, "").split(",")[0]  # "4,2" would be nested threads
        if first.isdecimal() and int(first) > 0:
            return int(first)
    return None


def threads_wanted():
    """The number of threads that the user named, else the number of cores of this process."""
    if threads_named():
        return threads_named()
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def find_blas_threads_setter():
    """The function of NumPy's own OpenBLAS that sets its number of threads.

    Where NumPy has another BLAS, a function that does nothing.
    """
    here = os.path.dirname(np.__file__)
    libraries = glob.glob(here + "/../numpy.libs/*openblas*")
    libraries += glob.glob(here + "/.dylibs/*openblas*")

    for path in libraries:
        with contextlib.suppress(OSError, AttributeError):
            return ctypes.CDLL(path).scipy_openblas_set_num_threads64_
    return lambda n: None


def keep_freed_pages():
    """Tell glibc to keep freed memory, so that temporaries need not be mapped and zeroed again.

    Saves 4 % of a step at B = 4, T = 64. Other systems have no mallopt.
    """
    M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1
    with contextlib.suppress(AttributeError, OSError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(M_TRIM_THRESHOLD, 1 << 30)


def make_pool():
    """The threads of `parallel`. Each is started when it is needed first."""
    global POOL
    POOL = ThreadPoolExecutor(max_workers=64)


ROW_THREADS = BLAS_THREADS = threads_wanted()
set_blas_threads = find_blas_threads_setter()
keep_freed_pages()
make_pool()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=make_pool)  # threads do not come along into a new process


def parallel(task, n):
    """[task(0), ..., task(n - 1)], computed by ROW_THREADS threads while BLAS has one."""
    results = [None] * n
    numbers = iter(range(n))

    def work():
        for i in numbers:  # whoever is free takes the next
            results[i] = task(i)

    helpers = []
    set_blas_threads(1)
    try:
        for _ in range(min(ROW_THREADS, n) - 1):
            with contextlib.suppress(RuntimeError):  # no more threads are to be had
                helpers.append(POOL.submit(work))
        work()
    finally:
        wait(helpers)
        set_blas_threads(BLAS_THREADS)

    for helper in helpers:
        helper.result()
    return results


# --------------------------------------------------------------------------------------------------
# 10. Weights and tokens from files
#
# The formats are described in prepro_tinyshakespeare.py, which checks whatever it reads.


def open_shards(source):
    """(names, arrays of token ids) of a pattern of token files, or of one array.

    A token file is mapped into memory, not read.
    """
    if not isinstance(source, (str, os.PathLike)):
        return ["the text"], [source]

    names = sorted(glob.glob(os.fspath(source)))
    require(
        names,
        f"{source}: no such token file: write one with python prepro_tinyshakespeare.py",
    )
    return names, [prepro.open_tokens(name) for name in names]


def check_vocabulary(loader, vocab_size, what):
    """InputError if a model of GPT-2's tokens is given a file of bytes."""
    highest = max(int(shard.max()) for shard in loader.shards)
    of_bytes = vocab_size >= 50257 and highest < 256
    require(
        not of_bytes,
        f"{what} {loader.names[0]}: holds bytes, and the model's vocabulary is GPT-2's: write its "
        "tokens without --bytes 1, or use --model bytes",
    )


def load_pretrained(cls, source, batch_size, sequence_length, recompute, training):
    """GPT2.from_pretrained, whose arguments are described there."""
    path = find_weights(source)
    config = GPT2Config(**prepro.read_sizes(path))
    tensors = prepro.find_tensors(path, param_shapes(config))
    model = cls(config, batch_size, sequence_length, None, recompute, training)
    prepro.read_tensors(tensors, model.params)
    return model


def find_weights(source):
    """The path of a model: of a name that OpenAI gave, fetched if need be, or source itself."""
    source = os.fspath(source)
    if source in prepro.WEIGHTS and not os.path.exists(source):
        return prepro.fetch_weights(source)

    names = ", ".join([*prepro.WEIGHTS, *FRESH, "bytes"])
    require(os.path.exists(source), f"--model {source!r}: no such file, and none of {names}")

    stopped_run = list_checkpoints(source)
    if stopped_run and not holds_weights(source):
        raise InputError(
            f"{source}: holds checkpoints of a run that was stopped: use --model {stopped_run[0]}"
        )
    return source


def write_tensors(model, inputs, targets, folder):
    """Write what a port to another language checks itself against, in llm.c's two formats.

    The model, and one batch (B, T) with its logits, its loss and all gradients. Returns the paths:
    FOLDER/gpt2_124M.bin and FOLDER/gpt2_124M_debug_state.bin for 124 million parameters.
    """
    millions = round(model.flat.shape[1] / 1e6)
    model_path = os.path.join(folder, f"gpt2_{millions}M.bin")
    state_path = os.path.join(folder, f"gpt2_{millions}M_debug_state.bin")
    prepro.write_llmc_model(model_path, asdict(model.config), model.params)

    model.zero_grad()
    loss = model.forward(inputs, targets)
    model.backward()

    def logits_pieces():
        lnf = rows_of(model.acts["lnf"])
        for i in range(0, len(lnf), LOGITS_ROWS):
            yield lnf[i : i + LOGITS_ROWS] @ model.params["wte"].T

    prepro.write_llmc_state(state_path, inputs, targets, logits_pieces(), loss, model.grads)
    return [model_path, state_path]


# --------------------------------------------------------------------------------------------------
# 11. Evaluation: HellaSwag (Zellers et al., 2019)
#
# An example has a context and four endings, one of which is right. The model's answer is the ending
# that it finds likeliest: the one with the least sum of its tokens' losses, for the score "acc", or
# with the least mean, for "acc_norm".
#
# The plain way runs the model on four sequences, context + ending. Here the context is computed
# once, and the four endings follow it in one sequence of rows:
#
#     rows         | context     | ending 0   | ending 1   | ending 2   | ending 3   |
#     positions    | 0 ... n - 1 | n ...      | n ...      | n ...      | n ...      |
#
# Only attention has to know of this: an ending looks back at the context and at itself.


def evaluation_acts(config, rows):
    """Activations (1, rows, ...) for run_packed, which all layers share."""
    shapes = act_shapes(config, 1, rows, training=False)
    shapes["qkv"] = (1, *shapes["qkv"][1:])
    return carve(np.zeros(count(shapes), np.float32), shapes)


def packed_attention(out, lse, qkv, NH, n, parts):
    """attention_forward for a context of n rows and the parts (slices) that follow it."""
    attention_forward(out[:, :n], lse[:, :n], qkv[:, :n], NH)
    for part in parts:
        if part.start < part.stop:
            visible = np.concatenate([qkv[:, :n], qkv[:, part]], axis=1)
            attention_forward(out[:, part], lse[:, part], visible, NH)


def run_packed(model, acts, tokens, positions, n, parts):
    """lnf (1, N, C) of a packed sequence, tokens (1, N), positions (N,). The rest as above.

    These are the layers of section 5, with another attention.
    """
    params, NH = model.params, model.config.num_heads
    N = tokens.size
    a = layer(acts, 0, np.s_[:, :N])

    residual = acts["encoded"][:, :N]
    encoder_forward(residual, tokens, params["wte"], params["wpe"][positions])
    for l in range(model.config.num_layers):
        p = layer(params, l)
        layernorm_forward(a.ln1, a.ln1_mean, a.ln1_rstd, residual, p.ln1w, p.ln1b)
        matmul_forward(a.qkv, a.ln1, p.qkvw, p.qkvb)
        packed_attention(a.atty, a.att_lse, a.qkv, NH, n, parts)
        matmul_forward(a.attproj, a.atty, p.attprojw, p.attprojb)
        residual_forward(a.residual2, residual, a.attproj)

        layernorm_forward(a.ln2, a.ln2_mean, a.ln2_rstd, a.residual2, p.ln2w, p.ln2b)
        matmul_forward(a.fch, a.ln2, p.fcw, p.fcb)
        gelu_forward(a.fch_gelu, a.fch)
        matmul_forward(a.fcproj, a.fch_gelu, p.fcprojw, p.fcprojb)
        residual_forward(a.residual3, a.residual2, a.fcproj)
        residual = a.residual3

    lnf, mean, rstd = acts["lnf"][:, :N], acts["lnf_mean"][:, :N], acts["lnf_rstd"][:, :N]
    layernorm_forward(lnf, mean, rstd, residual, params["lnfw"], params["lnfb"])
    return lnf


def ending_losses(model, acts, context, endings):
    """The losses of the tokens of each ending after a context: a list of arrays.

    context and the endings are lists of token ids. Where they come from, no ending with its context
    is longer than the model's context.
    """
    n = len(context)
    tokens, positions = list(context), list(range(n))
    predicting = []  # for each token of each ending, the row that predicts it
    parts = []
    for ending in endings:
        begin = len(tokens)
        tokens += ending[:-1]  # nothing is predicted from the last one
        positions += range(n, n + len(ending) - 1)
        parts.append(slice(begin, len(tokens)))
        predicting += [n - 1, *range(begin, len(tokens))]

    tokens, positions = np.array([tokens]), np.array(positions)
    lnf = run_packed(model, acts, tokens, positions, n, parts)[:, predicting]
    targets = np.array([sum(endings, [])])

    losses = np.empty(targets.shape, lnf.dtype)
    for start in range(0, targets.size, LOGITS_ROWS):
        piece = np.s_[:, start : start + LOGITS_ROWS]
        logits = acts["logits"][:, : targets[piece].size]
        matmul_forward(logits, lnf[piece], model.params["wte"])
        crossentropy_softmax_forward(losses[piece], logits, targets[piece])

    ends = np.cumsum([len(ending) for ending in endings])
    return np.split(losses[0], ends[:-1])


def fitting(example, max_seq_len):
    """An example whose context has lost its beginning, if it is too long for the model."""
    longest = max(len(ending) for ending in example.endings)
    room = max_seq_len - longest
    require(room > 0, f"HellaSwag: an ending has {longest} tokens, the model reads {max_seq_len}")
    return example._replace(context=example.context[-room:])


def rows_needed(example):
    """How many rows an example takes when it is packed."""
    return len(example.context) + sum(len(ending) - 1 for ending in example.endings)


def hellaswag(run):
    """Answer the run's examples and print the score: acc_norm, or None if a signal came before.

    Several processes take turns with the examples.
    """
    model, world = run.model, run.world
    examples = [fitting(example, model.config.max_seq_len) for example in run.examples]
    acts = evaluation_acts(model.config, max(map(rows_needed, examples)))

    right, right_norm = [], []  # for each example, whether the answer was
    with Progress("hellaswag") as progress:
        for first in range(0, len(examples), world.size):
            if run.must_stop():
                break
            for example in examples[first:][world.rank : world.rank + 1]:  # one; none at the end
                losses = ending_losses(model, acts, example.context, example.endings)
                right.append(np.argmin([loss.sum() for loss in losses]) == example.label)
                right_norm.append(np.argmin([loss.mean() for loss in losses]) == example.label)
            progress.done = (first + world.size) / len(examples)

    answered, acc, acc_norm = (world.sum(n) for n in (len(right), sum(right), sum(right_norm)))
    if answered == 0:
        return None

    line = f"hellaswag {acc_norm}/{answered} acc_norm {acc_norm / answered:.4f} "
    line += f"acc {acc / answered:.4f}"
    old_and_new = zip(run.examples, examples, strict=True)
    cut = sum(len(new.context) < len(old.context) for old, new in old_and_new)
    if cut:
        line += f" ({cut} contexts were too long and lost their beginning)"
    whole = answered == len(examples)
    if not whole:
        line += f" (stopped after {answered} of {len(examples)})"
    print_now(line)
    return acc_norm / answered if whole else None


# --------------------------------------------------------------------------------------------------
# 12. Several processes (skip this on first reading)
#
#     mpiexec -n 4 python train_gpt2.py ...
#
# starts this program four times, on one machine or on several. Each process has all parameters and
# all gradients, and takes its own batches. And each owns a quarter of the flat vector: it alone
# updates that part of the parameters, and it alone has AdamW's m and v for it. It never touches the
# rest of m and v, which therefore costs no memory (ZeRO, stage 1; Rajbhandari et al., 2020). The
# processes exchange numbers by MPI.

PIECE = 1 << 20  # elements that are sent at a time


class World:
    """The processes that train together. With one alone, the methods do nothing.

    comm         MPI's communicator; None for one process
    rank, size   this is number `rank` of `size` processes
    local_size   how many of them share this machine
    """

    def __init__(self, comm=None, local_size=1):
        self.comm = comm
        self.rank = comm.rank if comm else 0
        self.size = comm.size if comm else 1
        self.local_size = local_size

    def part(self, n, rank=None):
        """The slice of a vector of n elements that a process owns: this one, or another."""
        rank = self.rank if rank is None else rank
        width = math.ceil(n / self.size)
        return slice(min(n, rank * width), min(n, (rank + 1) * width))

    def wait(self):
        """Go on when all processes have come here."""
        if self.comm:
            self.comm.Barrier()

    def sum(self, number):
        """The sum of one number of each process, in the order of the processes."""
        return sum(self.comm.allgather(number)) if self.comm else number

    def greatest(self, number):
        """The greatest of one number of each process."""
        return max(self.comm.allgather(number)) if self.comm else number

    def sum_gradients(self, grads):
        """Add up the gradients (n,) of all processes. Each part of the sum goes to its owner.

        MPI takes the pieces for all owners side by side. They are copied there, a piece of each
        part at a time, so that there is no second copy of the whole.
        """
        n = len(grads)
        parts = [grads[self.part(n, rank)] for rank in range(self.size)]
        side_by_side = np.zeros((self.size, PIECE // self.size), grads.dtype)
        total = np.empty(PIECE // self.size, grads.dtype)

        for start in range(0, len(parts[0]), len(total)):
            piece = slice(start, start + len(total))
            for rank, part in enumerate(parts):
                side_by_side[rank, : len(part[piece])] = part[piece]
            self.comm.Reduce_scatter_block(side_by_side, total)
            own = parts[self.rank][piece]
            own[...] = total[: len(own)]

    def gather_params(self, params):
        """Fill in the parts of the parameters (n,) that other processes have updated."""
        from mpi4py import MPI

        parts = [self.part(len(params), rank) for rank in range(self.size)]
        starts = [part.start for part in parts]
        lengths = [part.stop - part.start for part in parts]
        self.comm.Allgatherv(MPI.IN_PLACE, [params, (lengths, starts)])

    def pieces(self, row):
        """A row of m or v (n,), piece by piece, for process 0. The other processes send theirs."""
        for owner in range(self.size):
            part = row[self.part(len(row), owner)]
            for start in range(0, len(part), PIECE):
                piece = part[start : start + PIECE]
                if owner > 0 and self.rank == owner:
                    self.comm.Send(piece, dest=0)
                if owner > 0 and self.rank == 0:
                    piece = np.empty_like(piece)
                    self.comm.Recv(piece, source=owner)
                yield piece

    def crc32(self, row):
        """The CRC-32 of a row of m or v. Each process continues where the one before it ended."""
        value = 0
        for owner in range(self.size):
            if self.rank == owner:
                value = zlib.crc32(row[self.part(len(row))], value)
            if self.comm:
                value = self.comm.bcast(value, root=owner)
        return value

    @contextlib.contextmanager
    def first_rank_first(self):
        """Process 0 does what stands in here, then all others do: they find what it fetched."""
        if self.rank > 0:
            self.wait()
        try:
            yield
        finally:
            if self.rank == 0:
                self.wait()

    def check_alike(self, facts):
        """InputError unless all processes give the same facts: a dict of what can be in JSON."""
        if not self.comm:
            return
        text = {name: json.dumps(value, sort_keys=True) for name, value in facts.items()}
        hashes = {name: zlib.crc32(value.encode()) for name, value in text.items()}
        for rank, other in enumerate(self.comm.allgather(hashes)):
            for name in hashes:
                same = other[name] == hashes[name]
                require(same, f"process {rank} has other {name} than process {self.rank}")


ALONE = World()


def train_step_together(
    world, model, loader, micro_batches, learning_rate, weight_decay=0.0, grad_clip=0.0, step=None,
    check=lambda value, what: None,
):  # fmt: skip
    """train_step on several processes, each with micro_batches batches of its own.

    The result is that of one process with all these batches.
    """
    scale = 1 / (micro_batches * world.size)
    loss = 0.0
    for _ in range(micro_batches):
        inputs, targets = loader.next_batch()
        loss += model.forward(inputs, targets, grad_scale=scale) * scale
        check(loss, "loss")
        model.backward()
    loss = world.sum(loss)

    params, grads = model.flat[:2]
    part = world.part(len(params))
    world.sum_gradients(grads)
    norm = math.sqrt(world.sum(model.grad_norm(part) ** 2))
    check(norm, "gradient norm")

    clip = grad_clip / norm if 0 < grad_clip < norm else 1.0
    model.update(learning_rate, weight_decay=weight_decay, step=step, grad_scale=clip, part=part)
    world.gather_params(params)
    return loss, norm


def launched():
    """(rank, size) of this process, from what mpiexec left in the environment; (0, 1) without."""
    names = (
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),  # Open MPI
        ("PMI_RANK", "PMI_SIZE"),  # MPICH, Intel MPI, Microsoft MPI
    )
    for rank, size in names:
        if os.environ.get(rank, "").isdecimal() and os.environ.get(size, "").isdecimal():
            return int(os.environ[rank]), int(os.environ[size])
    return 0, 1


def join_world():
    """The World that mpiexec started this process in, with this process's share of the cores."""
    _, size = launched()
    if size == 1:
        return ALONE
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError):
        raise InputError(
            f"mpiexec started {size} processes, and mpi4py is missing, which they need: "
            "pip install mpi4py mpich"
        ) from None

    comm = MPI.COMM_WORLD
    local_size = comm.Split_type(MPI.COMM_TYPE_SHARED).size
    share_cores(local_size)
    if comm.rank > 0:
        sys.stdout = open(os.devnull, "w")  # process 0 speaks for all
    return World(comm, local_size)


def share_cores(local_size):
    """Use this process's share of the machine's cores, unless the user has set the number."""
    global ROW_THREADS, BLAS_THREADS
    if not threads_named():
        share = max(1, (os.cpu_count() or 1) // local_size)
        ROW_THREADS = BLAS_THREADS = min(threads_wanted(), share)
        set_blas_threads(BLAS_THREADS)


def end_all(world, code):
    """End all processes of a run because this one can't go on. Alone, return the exit code."""
    if world.comm:
        sys.stderr.flush()
        time.sleep(0.5)  # so that mpiexec passes on what was printed, before it ends everything
        world.comm.Abort(code)
    return code


# --------------------------------------------------------------------------------------------------
# 13. Checkpoints
#
# DIR/checkpoint_STEP is a folder with what save_pretrained writes; main.log; and
# optimizer.safetensors, which holds AdamW's m and v, each one row laid out like the parameters,
# and, as metadata, the state of the run in JSON. Each part has a checksum in it. The folder is
# written under another name and then renamed. The last two checkpoints are kept.


@dataclass
class Run:
    """A run of the training loop: the model, its data, and how far it is."""

    args: SimpleNamespace  # the value of every flag
    model: GPT2
    world: World
    stopped: list  # the numbers of the signals that have come
    loader: DataLoader = None
    val_loader: DataLoader = None
    step: int = 0  # updates done
    position: list = None  # of the loader, when the run was saved
    evaluated: bool = False  # whether the validation and the sample of this step are done
    examples: list = None  # of HellaSwag, if they are asked for
    log: list = None  # the lines of main.log
    tokens: list = None  # the number of tokens in each shard of the training data
    tokens_crc32: list = None  # and their checksums
    saved_as_evaluated: bool = None  # what the checkpoint of this step says about `evaluated`

    def must_stop(self):
        """Whether a signal has come to this process, or to another one. All get the same answer."""
        number = self.world.greatest(self.stopped[0] if self.stopped else 0)
        if number and not self.stopped:
            self.stopped.append(number)
        return bool(number)

    def writes(self):
        """Whether this process writes to --output_dir."""
        return bool(self.args.output_dir) and self.world.rank == 0


def list_checkpoints(folder):
    """The checkpoints in a folder, newest first."""
    if not folder:
        return []
    pattern = os.path.join(glob.escape(folder), "checkpoint_" + "[0-9]" * 8)
    return sorted(glob.glob(pattern), reverse=True)


def checksums(moments, params, folder):
    """CRC-32s of the parameters as they stand in the blob, of m and v, and of the small files."""
    sums = [zlib.crc32(params), *moments]
    for name in ("config.json", "generation_config.json", "main.log"):
        data = np.fromfile(os.path.join(folder, name), np.uint8)
        sums.append(zlib.crc32(data))
    return sums


def save_checkpoint(model, folder, state, world=ALONE):
    """Write DIR/checkpoint_STEP, and delete all but the last two.

    state: a dict of what a run needs besides the model, see state_of; "log" are main.log's lines.
    Of several processes, the first one writes, and the others send it their parts of m and v.
    """
    params, _, m, v = model.flat
    moments = {"m": m, "v": v}
    sums = [world.crc32(row) for row in moments.values()]
    if world.rank > 0:
        for row in moments.values():
            for _ in world.pieces(row):
                pass
        return

    final = os.path.join(folder, f"checkpoint_{state['step']:08d}")
    temporary = os.path.join(folder, "checkpoint.tmp")
    shutil.rmtree(temporary, ignore_errors=True)

    model.save_pretrained(temporary)
    write_log(os.path.join(temporary, "main.log"), state["log"])

    text = json.dumps({**state, "log": None, "crc32": checksums(sums, params, temporary)})
    metadata = {"state": text, "crc32": str(zlib.crc32(text.encode()))}
    path = os.path.join(temporary, "optimizer.safetensors")
    prepro.write_safetensors(path, moments, metadata, world.pieces)

    replace_folder(temporary, final)
    for old in list_checkpoints(folder)[2:]:
        shutil.rmtree(old, ignore_errors=True)


def state_of(run):
    """What a checkpoint keeps of a run, besides the model."""
    return {
        "step": run.step,
        "position": run.loader.position,
        "evaluated": run.evaluated,
        "log": run.log,
        "settings": vars(run.args),
        "tokens": run.tokens,
        "tokens_crc32": run.tokens_crc32,
    }


def replace_folder(temporary, final):
    """Rename a folder. One that has this name already is moved away first, and deleted at last."""
    old = f"{final}.old"
    if os.path.exists(final):
        shutil.rmtree(old, ignore_errors=True)
        os.replace(final, old)
    os.replace(temporary, final)
    prepro.sync_folder(os.path.dirname(final))
    shutil.rmtree(old, ignore_errors=True)


def recover_replaced(folder):
    """Give a checkpoint its name back if the run was killed within replace_folder."""
    for old in glob.glob(os.path.join(glob.escape(folder), "checkpoint_*.old")):
        final = old.removesuffix(".old")
        if not os.path.exists(final):
            os.replace(old, final)


def read_state(folder):
    """(state, m and v as StoredTensors) of a checkpoint. InputError unless all is as it must be."""
    path = os.path.join(folder, "optimizer.safetensors")
    moments, metadata = prepro.read_safetensors(path)
    text = str(metadata.get("state")).encode(errors="replace")
    right = str(zlib.crc32(text)) == metadata.get("crc32")
    require(right, "its state does not match its checksum")

    state = prepro.parse_json(text, path)
    settings = state.get("settings")
    require(isinstance(settings, dict), "its settings are not as expected")
    for name, value in settings.items():
        known = name in DEFAULTS and isinstance(value, (type(DEFAULTS[name]), int))
        known = known and isinstance(value, str) == isinstance(DEFAULTS[name], str)
        require(known, f"its setting {name!r} is not as expected")
    if "shuffle" not in settings:  # written before there was such a flag
        settings["shuffle"] = 0
        settings["recompute"] = {2: 1, 3: 2}.get(settings.get("recompute"), 1)
    if settings.get("total_batch_size") == 0:  # likewise: one batch of one process
        B, T = settings.get("batch_size", 4), settings.get("sequence_length", 64)
        settings["total_batch_size"] = B * T

    require(prepro.are_sizes(state.get("crc32")), "its checksums are not as expected")
    sums = state.get("tokens_crc32", [])
    require(prepro.are_sizes(sums, most=1 << 16), "its checksums are not as expected")
    step, position = state.get("step"), state.get("position")
    require(prepro.are_sizes([step]), "its step is not as expected")
    right = prepro.are_sizes(position) and len(position) in (2, 3)
    require(right, "its position is not as expected")
    right = prepro.are_sizes(state.get("tokens"), most=1 << 16)
    require(right, "its tokens are not as expected")
    require(type(state.get("evaluated")) is bool, "its state is not as expected")
    return state, moments


def load_checkpoint(folder, named, world=ALONE):
    """(args, model, state) of a checkpoint, with the flags in `named` that may change.

    InputError if a bit of it is wrong.
    """
    state, moments = read_state(folder)
    changed = {name: value for name, value in named.items() if name in MAY_CHANGE}
    args = SimpleNamespace(**DEFAULTS | state["settings"] | changed)

    config = GPT2Config(**prepro.read_sizes(folder))
    tensors = prepro.find_tensors(folder, param_shapes(config))
    model = make_model(args, config, world)
    params, _, m, v = model.flat
    with Progress(f"reading {folder}"):
        prepro.read_tensors(tensors, model.params)
        sums = [read_moments(moments, "m", m, world), read_moments(moments, "v", v, world)]
        right = state["crc32"] == checksums(sums, params, folder)
        require(right, "its data does not match its checksum")

    model.updates = state["step"]
    log = np.fromfile(os.path.join(folder, "main.log"), np.uint8).tobytes()
    state["log"] = log.decode(errors="replace").splitlines()
    return args, model, state


def read_moments(moments, name, row, world):
    """Read this process's part of m or v into row (n,). The CRC-32 of all of it, as in the file."""
    stored = moments.get(name)
    right = stored is not None and (stored.dtype, stored.shape) == ("F32", row.shape)
    require(right, f"{name} is not as expected")

    part = world.part(len(row))
    value = 0
    start = 0
    for piece in prepro.read_pieces(stored, name):
        value = zlib.crc32(piece, value)
        begin = max(start, part.start)
        end = min(start + len(piece), part.stop)
        if begin < end:
            row[begin:end] = piece[begin - start : end - start]
        start += len(piece)
    return value


def resume(named, stopped, world=ALONE):
    """The Run of the newest whole checkpoint in --output_dir. None if there is no checkpoint."""
    output_dir = named.get("output_dir", "")
    recover_replaced(output_dir)
    folders = list_checkpoints(output_dir)
    for folder in folders:
        try:
            args, model, state = load_checkpoint(folder, named, world)
        except (InputError, OSError) as error:
            print_now(f"{folder} is damaged: {error}: taking the one before it")
            continue

        refuse_changed_flags(args, named)
        print_now(f"resuming from {folder}")
        for newer in folders[: folders.index(folder)]:  # a whole one will take its name
            shutil.rmtree(f"{newer}.damaged", ignore_errors=True)
            os.replace(newer, f"{newer}.damaged")
        return Run(
            args=args,
            model=model,
            world=world,
            stopped=stopped,
            step=state["step"],
            position=state["position"],
            evaluated=state["evaluated"],
            saved_as_evaluated=state["evaluated"],
            log=state["log"],
            tokens=state["tokens"],
            tokens_crc32=state.get("tokens_crc32"),
        )

    whole = not folders
    require(whole, f"no checkpoint in {output_dir} is whole: choose another --output_dir")
    require(
        not holds_weights(output_dir),
        f"{output_dir} holds weights, but no checkpoint to resume from: fine-tune from them with "
        f"--model {output_dir} and another --output_dir",
    )
    print_now("no checkpoint to resume from: starting anew")
    return None


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


def holds_weights(folder):
    """Whether a folder holds the weights of a finished run."""
    return os.path.exists(os.path.join(folder, "model.safetensors"))


def refuse_used_folder(folder):
    """InputError if a folder holds a run, which a new run would overwrite."""
    log = os.path.join(folder, "main.log")
    used = list_checkpoints(folder) or holds_weights(folder)
    used = used or os.path.exists(log) and os.path.getsize(log) > 0
    require(
        not used,
        f"{folder} holds a run: go on with --resume 1, or choose another --output_dir",
    )


def lock_folder(folder):
    """Keep a folder to this process until it ends. Returns a file that must stay open."""
    os.makedirs(folder, exist_ok=True)
    handle = open(os.path.join(folder, ".lock"), "ab")
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(handle.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return handle
    except OSError:
        handle.close()
        raise InputError(
            f"{folder}: another run is writing there: choose another --output_dir"
        ) from None


# --------------------------------------------------------------------------------------------------
# 14. The training loop


def train(run):
    """Train, validate, sample and save, until all updates are done or a signal has come."""
    args = run.args
    micro_batches = count_micro_batches(args, run.world.size)
    first_step = run.step
    began = time.perf_counter()
    seconds = None  # that the last update took
    loader = FirstBatch(run.loader) if args.overfit_single_batch else run.loader
    one_step = train_step
    if run.world.size > 1:
        one_step = functools.partial(train_step_together, run.world)
    if run.writes():
        write_log(os.path.join(args.output_dir, "main.log"), run.log)

    while True:
        last = run.step >= args.num_iterations
        if not run.evaluated:
            run.evaluated = evaluate(run, last)

        stop = run.must_stop()  # asked once, because a signal may come at any moment
        if args.output_dir and (last or stop or is_due(run.step, args.checkpoint_every)):
            save(run, run.step > first_step)
        if last or stop:
            break

        learning_rate = learning_rate_at(run.step, args)
        started = time.perf_counter()
        with Progress(f"step {run.step + 1}", seconds):
            loss, norm = one_step(
                run.model, loader, micro_batches,
                learning_rate, args.weight_decay, args.grad_clip, run.step + 1,
                functools.partial(check_finite, model=run.model, step=run.step),
            )  # fmt: skip
        seconds = time.perf_counter() - started

        run.step += 1
        run.evaluated = False
        print_now(
            f"step {run.step}/{args.num_iterations}: train loss {loss:.6f} (norm {norm:.4f}, "
            f"lr {learning_rate:.2e}, {seconds * 1e3:.0f} ms, "
            f"{args.total_batch_size / seconds:.0f} tok/s)"
        )
        write_log_line(run, "trl", loss)

    seconds = time.perf_counter() - began
    finish(run, seconds, (run.step - first_step) * args.total_batch_size / seconds, last)


class FirstBatch:
    """A loader that gives the first batch again and again."""

    def __init__(self, loader):
        self.loader = loader

    def next_batch(self):
        self.loader.seek([0, 0, 0])
        return self.loader.next_batch()


def count_micro_batches(args, size=1):
    """How many batches each of `size` processes takes for one update.

    --total_batch_size counts the tokens of all. InputError if they can't share it out.
    """
    tokens = args.batch_size * args.sequence_length * size
    total = args.total_batch_size
    nearest = max(1, total // tokens) * tokens
    what = "B*T" if size == 1 else f"B*T * {size} processes"
    require(
        total == nearest,
        f"--total_batch_size {total} is no multiple of {what} = {tokens}: try {nearest}",
    )
    return total // tokens


def is_due(step, every):
    """Whether something that is done after every so many updates is due; never if every is 0."""
    return every > 0 and step > 0 and step % every == 0


def learning_rate_at(step, args):
    """Of the update that follows `step` others: a rise to the peak, then half a cosine down."""
    peak = args.learning_rate
    if step < args.warmup_iters:
        return peak * (step + 1) / args.warmup_iters

    low = peak * args.learning_rate_decay_frac
    done = (step - args.warmup_iters) / (args.num_iterations - args.warmup_iters)
    return low + (peak - low) * 0.5 * (1 + math.cos(math.pi * done))


def evaluate(run, last):
    """Validate and sample, where that is due. Returns False if a signal came before it was done."""
    args = run.args
    if run.must_stop():
        return False

    if args.val_loss_every and (last or run.step % args.val_loss_every == 0):
        loss = validate(run)
        if loss is None:
            return False
        check_finite(loss, "loss", run.model, run.step)
        print_now(f"val loss {loss:.6f}")
        write_log_line(run, "tel", loss)
        if run.examples:
            score = hellaswag(run)
            if score is None:
                return False
            write_log_line(run, "eval", score)

    sampling = args.sample_every and run.step and (last or run.step % args.sample_every == 0)
    if sampling and run.world.rank == 0:
        print_now("--- sample")
        try:
            print_sample(run.model, args, run.step, run.stopped)
        except InputError as error:  # no vocabulary: nothing trained is lost for want of a sample
            print_now(f"none: {error}")
    return True


def validate(run):
    """The mean loss of the first val_max_steps batches of the validation data. None if stopped.

    Several processes take turns with the batches.
    """
    steps, size = run.args.val_max_steps, run.world.size
    run.val_loader.seek([0, 0, 0])
    losses = []
    with Progress("validating") as progress:
        for first in range(0, steps, size):
            if run.must_stop():
                return None
            inputs, targets = run.val_loader.next_batch()  # each process gets another one
            if first + run.world.rank < steps:
                losses.append(run.model.forward(inputs, targets, train=False))
            progress.done = (first + size) / steps
    return run.world.sum(sum(losses)) / steps


def save(run, changed):
    """A checkpoint of this step; if the disk is full, ask for room, so that nothing is lost."""
    folder = run.args.output_dir
    exists = os.path.join(folder, f"checkpoint_{run.step:08d}") in list_checkpoints(folder)
    exists = bool(run.world.greatest(exists))
    if exists and not changed and run.saved_as_evaluated == run.evaluated:
        return

    while True:
        try:
            with Progress(f"saving to {folder}"):
                save_checkpoint(run.model, folder, state_of(run), run.world)
            run.saved_as_evaluated = run.evaluated
            return
        except (OSError, InputError) as error:
            shutil.rmtree(os.path.join(folder, "checkpoint.tmp"), ignore_errors=True)
            kept = list_checkpoints(folder)
            message = f"can't save to {folder}: {prepro.reason(error)}; the last whole checkpoint "
            message += f"is {kept[0]}" if kept else "is none"
            if not (sys.stdin and sys.stdin.isatty()) or run.world.size > 1:
                raise InputError(message) from None
            print_now(f"{message}. Make room and press Enter, or give up with Ctrl-C")
            sys.stdin.readline()


def finish(run, seconds, tokens_per_second, last):
    """Leave the weights in --output_dir, and print the last line."""
    args = run.args
    complete = last and not run.stopped
    if run.writes() and complete:
        publish_weights(args.output_dir)

    summary = [f"{run.step} updates"]
    for kind, name in (("trl", "train"), ("tel", "val")):
        losses = [float(line.split(":")[2]) for line in run.log if f" {kind}:" in line]
        if losses:
            curve = sparkline(losses)
            summary.append(f"{name} loss {losses[0]:.4f} -> {losses[-1]:.4f} {curve}")
    summary += [f"{seconds:.1f} s", f"{tokens_per_second:.0f} tok/s"]
    if args.output_dir and complete:
        summary.append(f"saved in {args.output_dir}")
    elif args.output_dir:
        summary.append(f"go on with --output_dir {args.output_dir} --resume 1")
    print_now(("" if complete else "stopped: ") + ", ".join(summary))


def publish_weights(folder):
    """Put the last checkpoint's weights into the folder itself, as hard links where that works."""
    checkpoint = list_checkpoints(folder)[0]
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        source = os.path.join(checkpoint, name)
        temporary = os.path.join(folder, f"{name}.tmp")
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
        os.replace(temporary, os.path.join(folder, name))
        with contextlib.suppress(FileNotFoundError):  # it stays if both are the same file already
            os.remove(temporary)
    prepro.sync_folder(folder)


def check_finite(value, what, model, step):
    """InputError if a loss or a norm is NaN or infinite. It names the tensor where that began."""
    if math.isfinite(value):
        return
    tables = (model.params, model.acts) if what == "loss" else (model.grads,)
    names = in_order_of_computation(model.config.num_layers)
    if what != "loss":
        names.reverse()

    culprit = "the last sum"
    for name, l in names:
        view = find_view(tables, name, l, model.config.num_layers)
        if view is not None and not np.isfinite(view).all():
            culprit = name if l is None else f"{name} of layer {l}"
            break
    raise InputError(
        f"update {step + 1}: the {what} is {value}; it began in {culprit}. The last checkpoint is "
        "as it was. Try a smaller --learning_rate, or --grad_clip 1"
    )


def in_order_of_computation(num_layers):
    """(name, l) of every tensor that forward uses, in order; l is None outside the layers."""
    first = ["wte", "wpe", "encoded"]
    of_layers = [
        "ln1w", "ln1b", "qkvw", "qkvb", "attprojw", "attprojb",
        "ln2w", "ln2b", "fcw", "fcb", "fcprojw", "fcprojb",
        "ln1_mean", "ln1_rstd", "ln1", "qkv", "att_lse", "atty", "attproj", "residual2",
        "ln2_mean", "ln2_rstd", "ln2", "fch", "fch_gelu", "fcproj", "residual3",
    ]  # fmt: skip
    last = ["lnfw", "lnfb", "lnf_mean", "lnf_rstd", "lnf", "logits", "losses"]

    names = [(name, None) for name in first]
    for l in range(num_layers):
        names += [(name, l) for name in of_layers]
    names += [(name, None) for name in last]
    return names


def find_view(tables, name, l, num_layers):
    """A tensor in one of the tables. None if it is not there, or if a later layer overwrote it."""
    for table in tables:
        if name not in table:
            continue
        view = table[name]
        if l is None:
            return view
        if len(view) == num_layers:
            return view[l]
        return view[0] if l == num_layers - 1 else None  # shared: holds the last layer's
    return None


def write_log(path, lines):
    """Write main.log anew."""
    with prepro.atomic_write(path) as file:
        for line in lines:
            file.write(f"{line}\n".encode())


def write_log_line(run, kind, value):
    """Add a line to main.log, in llm.c's format.

    kind: trl is a training loss, tel a validation loss, eval the acc_norm of HellaSwag.
    """
    line = f"s:{run.step} {kind}:{value:.4f}"
    run.log.append(line)
    if run.writes():
        with open(os.path.join(run.args.output_dir, "main.log"), "a") as file:
            file.write(line + "\n")


def sparkline(values, width=60):
    """A row of characters whose heights follow the values."""
    encoding = getattr(sys.stdout, "encoding", "") or ""
    blocks = "▁▂▃▄▅▆▇█" if "utf" in encoding.lower() else "_.-=+*#@"

    groups = np.array_split(values, min(width, len(values)))
    means = np.array([group.mean() for group in groups])
    heights = (means - means.min()) / max(np.ptp(means), 1e-9)
    return "".join(blocks[round(height * 7)] for height in heights.tolist())


def print_now(text, end="\n"):
    """Print at once. If nobody reads any more, SIGPIPE has told the run to stop."""
    with contextlib.suppress(BrokenPipeError):
        print(text, end=end, flush=True)


class Progress:
    """A line on the terminal that says what takes so long. It appears after two seconds.

    with Progress("validating") as progress: progress.done = 0.5
    """

    def __init__(self, what, expected=None):
        self.what = what
        self.expected = expected  # seconds
        self.done = None  # a fraction, where it is known

    def __enter__(self):
        self.started = time.monotonic()
        self.shown = False
        self.ended = threading.Event()
        if sys.stderr and sys.stderr.isatty():
            threading.Thread(target=self.show, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.ended.set()
        if self.shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)

    def show(self):
        """Write the line anew each second, until the end."""
        while not self.ended.wait(1.0):
            seconds = time.monotonic() - self.started
            if seconds < 2:
                continue
            left = None
            if self.done:
                left = seconds / self.done - seconds
            elif self.expected:
                left = self.expected - seconds
            estimate = f", {max(0, left):.0f} s left" if left is not None else ""
            self.shown = True
            line = f"\r\033[K{self.what}: {seconds:.0f} s{estimate}"
            print(line, end="", file=sys.stderr, flush=True)


# --------------------------------------------------------------------------------------------------
# 15. The command line

# name: (default, meaning). The defaults are those of llm.c's CPU trainer.
FLAGS = {
    "model": (
        "gpt2",
        "gpt2[-medium, -large, -xl]; d6, d12, d24, d36, d48 or bytes: fresh weights; or a folder, "
        ".safetensors or .bin",
    ),
    "input_bin": (
        "data/tiny_shakespeare_train.bin",
        "training tokens: a path or a glob pattern",
    ),
    "input_val_bin": ("data/tiny_shakespeare_val.bin", "validation tokens, likewise"),
    "output_dir": ("", "where weights, log and checkpoints go; nowhere if empty"),
    "batch_size": (4, "B, sequences per batch"),
    "sequence_length": (
        64,
        "T, tokens per sequence (when only generating: the model's whole context)",
    ),
    "total_batch_size": (0, "tokens per update of all processes; 0: B*T times their number"),
    "num_iterations": (40, "updates"),
    "learning_rate": (1e-4, "its peak"),
    "warmup_iters": (0, "updates over which it rises to the peak"),
    "learning_rate_decay_frac": (
        1.0,
        "fraction of the peak to which a cosine takes it by the end",
    ),
    "weight_decay": (0.0, "AdamW's, on matrices and embeddings"),
    "grad_clip": (0.0, "largest norm of the gradient; 0: any"),
    "shuffle": (
        0,
        "1: take the passages of the text in an order drawn anew for each epoch; that is the "
        "default for fresh weights",
    ),
    "val_loss_every": (10, "updates between validations; 0: none"),
    "val_max_steps": (5, "batches per validation"),
    "hellaswag_eval": (0, "1: score the model on HellaSwag after every validation"),
    "hellaswag_limit": (0, "use the first so many examples of HellaSwag; 0: all 10042"),
    "sample_every": (20, "updates between samples; 0: none"),
    "inference_only": (0, "1: continue --prompt, or score HellaSwag, and train nothing"),
    "overfit_single_batch": (0, "1: train on the first batch again and again"),
    "write_tensors": (0, "1: write what a port checks itself against, to --output_dir or data"),
    "recompute": (
        1,
        "0: store everything; 1: compute layernorm and GELU again in backward; 2: whole layers",
    ),
    "checkpoint_every": (
        0,
        "updates between checkpoints in --output_dir; 0: only at the end, or when stopped",
    ),
    "resume": (0, "1: go on from the newest whole checkpoint in --output_dir"),
    "seed": (1337, "of fresh weights, of the order of passages and of samples"),
    "prompt": ("", "text to continue; if empty, a new text begins"),
    "max_new_tokens": (64, "length of a sample, in tokens"),
    "top_k": (0, "sample among the k likeliest; 0: among all"),
    "temperature": (1.0, "of samples: below 1 bolder, above 1 wilder, 0 always the likeliest"),
}
DEFAULTS = {name: default for name, (default, _) in FLAGS.items()}
AT_LEAST_ONE = {"batch_size", "sequence_length", "val_max_steps"}

# These may differ when a run is resumed.
MAY_CHANGE = {
    "num_iterations", "val_loss_every", "val_max_steps", "sample_every", "checkpoint_every",
    "hellaswag_eval", "hellaswag_limit", "resume", "output_dir", "max_new_tokens", "temperature",
    "top_k", "prompt",
}  # fmt: skip

# dL has L layers and these channels, in heads of 64.
FRESH = {"d6": 384, "d12": 768, "d24": 1024, "d36": 1280, "d48": 1600}

# --model bytes: what trains where nothing can be fetched. Its vocabulary is the 256 bytes.
BYTES_CONFIG = GPT2Config(64, 256, 2, 4, 128)
BYTES_DEFAULTS = {
    "model": "bytes",
    "input_bin": "",
    "batch_size": 16,
    "num_iterations": 1200,
    "learning_rate": 4e-3,
    "warmup_iters": 100,
    "learning_rate_decay_frac": 0.05,
    "weight_decay": 0.1,
    "grad_clip": 1.0,
    "shuffle": 1,
    "val_loss_every": 200,
    "val_max_steps": 30,
    "sample_every": 1200,
    "max_new_tokens": 400,
    "temperature": 0.6,
}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, without the whole usage before it."""

    def error(self, message):
        rank, _ = launched()
        if rank == 0:
            print(f"error: {message} (--help lists all flags)", file=sys.stderr)
        sys.exit(2)


def flag_type(name):
    """A function from the text of a flag to its value."""
    kind = type(DEFAULTS[name])
    low = 1 if name in AT_LEAST_ONE else 0
    expected = {int: "a whole number", float: "a number", str: "a text"}[kind]

    def convert(text):
        try:
            value = kind(text)
            right = kind is str or low <= value < 1 << 63
        except ValueError:
            right = False
        if not right:
            raise argparse.ArgumentTypeError(f"expected {expected} of at least {low}, not {text!r}")
        return value

    return convert


def parse_args(argv=None):
    """The flags that argv names: {flag: value}. Leaves with exit code 2 if they make no sense."""
    examples = "\n\n" + __doc__[__doc__.index("    python") : __doc__.index("There is no tensor")]
    parser = Parser(usage=examples, argument_default=argparse.SUPPRESS, allow_abbrev=False)
    for name, (default, meaning) in FLAGS.items():
        text = f"{meaning} (default: {default!r})".replace("%", "%%")
        parser.add_argument(f"--{name}", type=flag_type(name), metavar="X", help=text)

    argv = sys.argv[1:] if argv is None else argv
    for argument in argv:
        if argument.endswith("=--"):  # argparse takes the value -- for the end of the flags
            parser.error(f"{argument}: the value can't be --")

    named = vars(parser.parse_args(argv))
    if named.get("recompute", 0) == 3:  # the name of this level before
        named["recompute"] = 2
    return named


def check_flags(named):
    """InputError if the flags can't be meant."""
    recompute = named.get("recompute", 1)
    known = recompute in SHARED_BY_LAYERS
    require(known, f"--recompute {recompute}: expected one of {list(SHARED_BY_LAYERS)}")
    require(
        named.get("prompt") != "",
        "--prompt is empty: give it some text, or leave it out for one of the model's own",
    )
    for name in ("checkpoint_every", "resume"):
        alone = named.get(name) and not named.get("output_dir")
        require(not alone, f"--{name} needs --output_dir")


def settings(named):
    """The value of every flag: what was named, else the default of this kind of model."""
    model = named.get("model", DEFAULTS["model"])
    if model == "bytes":
        return SimpleNamespace(**DEFAULTS | BYTES_DEFAULTS | named)
    shuffle = {"shuffle": int(model in FRESH)}
    return SimpleNamespace(**DEFAULTS | shuffle | named)


def available_memory():
    """Bytes this process may still take of the machine, its container and its own limit."""
    free = [math.inf]
    with contextlib.suppress(OSError, IndexError, ValueError):
        with open("/proc/meminfo") as file:
            kibibytes = file.read().split("MemAvailable:")[1].split()[0]
        free.append(1024 * int(kibibytes))

    with contextlib.suppress(OSError, ValueError):  # "max", where the container sets no limit
        with open("/sys/fs/cgroup/memory.max") as file:
            limit = int(file.read())
        with open("/sys/fs/cgroup/memory.current") as file:
            free.append(limit - int(file.read()))

    with contextlib.suppress(ImportError):  # not on Windows
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit != resource.RLIM_INFINITY:
            free.append(limit)
    return min(free)


def memory_plan(args, config, size=1):
    """The bytes that a model takes on one of `size` processes, by what they are for: a dict."""
    training = not args.inference_only
    params = 4 * count(param_shapes(config))
    acts = act_shapes(config, args.batch_size, args.sequence_length, args.recompute, training)

    plan = {"parameters": params}
    if training:
        plan["gradients"] = params
        plan["moments"] = 2 * params // size
    plan["activations"] = 4 * count(acts)
    return plan


def make_model(args, config, world):
    """Print the memory plan, refuse it if the machine has not got so much, else make the model."""
    most = config.max_seq_len
    require(
        args.sequence_length <= most,
        f"the model's context is {most}: use --sequence_length {most} or less",
    )
    plan = memory_plan(args, config, world.size)
    need = sum(plan.values())
    free = available_memory() / world.local_size

    sizes = ", ".join(f"{name} {value}" for name, value in asdict(config).items())
    print_now(f"model: {plan['parameters'] // 4:,} parameters: {sizes}")
    parts = ", ".join(f"{name} {nbytes / 1e6:.0f}" for name, nbytes in plan.items())
    whose = f" in each of {world.size} processes" if world.size > 1 else ""
    print_now(f"memory{whose}: {parts}, in all {need / 1e6:.0f} MB")

    if need > free:  # no InputError: a checkpoint that does not fit is not damaged
        raise MemoryError(
            f"B={args.batch_size}, T={args.sequence_length} needs {need / 1e6:.0f} MB, the machine "
            f"has {free / 1e6:.0f}: use {what_fits(args, config, world, free)}"
        )
    return GPT2(
        config,
        args.batch_size,
        args.sequence_length,
        seed=None,
        recompute=args.recompute,
        training=not args.inference_only,
    )


def what_fits(args, config, world, free):
    """The largest batch size that fits into free bytes, as advice."""
    fits, too_large = 0, args.batch_size
    while too_large - fits > 1:
        middle = (fits + too_large) // 2
        smaller = SimpleNamespace(**vars(args) | {"batch_size": middle})
        if sum(memory_plan(smaller, config, world.size).values()) <= free:
            fits = middle
        else:
            too_large = middle
    return f"--batch_size {fits}" if fits else "a smaller --model or --sequence_length"


def begin(named, stopped, world=ALONE):
    """The Run that the flags ask for, from its beginning."""
    try:
        args = settings(named)
        return open_model(args, named, stopped, world)
    except (InputError, OSError) as error:
        by_name = {"model", "input_bin", "input_val_bin", "inference_only", "write_tensors"}
        by_name |= {"output_dir", "resume"}
        if by_name & named.keys():
            raise  # what was asked for by name is not replaced by something else
        print_now(
            f"{error}\n--> so a small GPT will learn from scratch, by bytes, what this project's "
            "own files look like"
        )
        args = settings(named | {"model": "bytes"})
        return open_model(args, named, stopped, world)


def open_model(args, named, stopped, world):
    """A Run with the model that args name, its weights drawn or read."""
    if args.model not in (*prepro.WEIGHTS, *FRESH, "bytes"):
        find_weights(args.model)  # an error if it is not there, before anything is fetched

    data_named = {"input_bin", "input_val_bin"} & named.keys()
    if not args.inference_only and args.model != "bytes" and not data_named:
        args.input_bin, args.input_val_bin = prepro.prepare_tinyshakespeare()

    path = None
    if args.model == "bytes":
        config = BYTES_CONFIG
    elif args.model in FRESH:
        C = FRESH[args.model]
        config = GPT2Config(1024, 50257, int(args.model[1:]), C // 64, C)
    else:
        path = find_weights(args.model)
        config = GPT2Config(**prepro.read_sizes(path))

    tensors = prepro.find_tensors(path, param_shapes(config)) if path else None
    if args.inference_only:
        args.batch_size = 1
        args.sequence_length = named.get("sequence_length", config.max_seq_len)

    if args.total_batch_size == 0:
        args.total_batch_size = args.batch_size * args.sequence_length * world.size

    model = make_model(args, config, world)
    with Progress(f"reading {path}" if path else "drawing weights"):
        if path:
            prepro.read_tensors(tensors, model.params)
        else:
            init_weights(model.params, args.seed)
    return Run(args, model, world, stopped, position=[0, 0, 0], log=[])


def open_data(run):
    """Give a run its loaders. InputError if the training data is not what it was."""
    args = run.args
    train_source, val_source = args.input_bin, args.input_val_bin
    if args.model == "bytes" and not args.input_bin:
        train_source, val_source = prepro.own_text()

    seed = args.seed if args.shuffle else None
    with Progress("checking the tokens"):
        run.loader = open_loader(run, train_source, seed)
        if args.val_loss_every:
            run.val_loader = open_loader(run, val_source, None)
        sums = [zlib.crc32(np.ascontiguousarray(shard)) for shard in run.loader.shards]

    sizes = run.loader.sizes
    require(
        run.tokens in (None, sizes),
        f"there are {sizes} tokens of training data, there were {run.tokens} when this run began",
    )
    require(
        run.tokens_crc32 in (None, sums),
        "the training data has changed since this run began: put it back, or start another run",
    )
    run.tokens = sizes
    run.tokens_crc32 = sums
    shard = run.position[0]
    require(shard < len(sizes), f"the run stopped in shard {shard}, there are {len(sizes)}")
    run.loader.seek(run.position)


def open_examples(run):
    """HellaSwag's examples, fetched if need be."""
    V = run.model.config.vocab_size
    path = prepro.prepare_hellaswag()
    examples = prepro.read_hellaswag(path)[: run.args.hellaswag_limit or None]
    highest = max(max(map(max, [example.context, *example.endings])) for example in examples)
    require(
        highest < V, f"{path}: holds token {highest}, the model's vocabulary ends at {V - 1}"
    )
    return examples


def open_loader(run, source, shuffle_seed):
    """A DataLoader for the run's model."""
    args, V = run.args, run.model.config.vocab_size
    try:
        loader = DataLoader(
            source, args.batch_size, args.sequence_length, V, shuffle_seed,
            run.world.rank, run.world.size,
        )  # fmt: skip
    except InputError as error:
        if V <= 256 and "vocabulary ends" in str(error):
            raise InputError(
                f"{error}: the model reads bytes, and this is no file of bytes: write one with "
                "python prepro_tinyshakespeare.py --input my.txt --bytes 1"
            ) from None
        raise
    check_vocabulary(loader, V, "")
    return loader


def print_sample(model, args, step, stopped=()):
    """Print a sample as it comes. Its random numbers depend on the seed and the step alone."""
    encode, decode, first = prepro.tokenizer(model.config.vocab_size)
    rng = np.random.default_rng([args.seed, step])
    utf8 = codecs.getincrementaldecoder("utf-8")("replace")
    prompt = encode(args.prompt) or [first]

    print_now(args.prompt, end="")
    new_tokens = model.generate(prompt, args.max_new_tokens, args.temperature, args.top_k, rng)
    for token in new_tokens:
        print_now(utf8.decode(decode(token)), end="")
        if stopped:
            break
    print_now(utf8.decode(b"", final=True))


@contextlib.contextmanager
def signals_noted(stopped, while_training):
    """While this lasts, signals are added to the list `stopped` instead of ending the program.

    While training, Ctrl-C, SIGTERM and SIGUSR1 finish the step first; the same signal once more
    ends the program at once. SIGPIPE says that nobody reads any more.
    """

    def note(number, frame):
        if number in stopped:
            os._exit(128 + number)
        stopped.append(number)
        with contextlib.suppress(OSError, AttributeError, ValueError):
            # print() may be what the signal has interrupted, so it can't be used here
            message = b"\nfinishing this step; once more, and it stops at once\n"
            os.write(sys.stdout.fileno(), message)

    handlers = {}
    if while_training:
        handlers = {signal.SIGINT: note, signal.SIGTERM: note}
        if hasattr(signal, "SIGUSR1"):
            handlers[signal.SIGUSR1] = note  # what clusters send before a job's time is over
    if hasattr(signal, "SIGPIPE"):
        handlers[signal.SIGPIPE] = lambda number, frame: stopped.append(number)
    if threading.current_thread() is not threading.main_thread():
        handlers = {}  # only the main thread may set them

    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_command(named, stopped, world):
    """Do what the flags say."""
    output_dir = named.get("output_dir")
    writes_run = output_dir and not named.get("inference_only") and not named.get("write_tensors")
    if writes_run and not named.get("resume"):
        refuse_used_folder(output_dir)

    with world.first_rank_first():
        run = resume(named, stopped, world) if named.get("resume") else None
        run = run or begin(named, stopped, world)
        if not run.args.inference_only:
            open_data(run)
        if run.args.hellaswag_eval:
            run.examples = open_examples(run)

    if run.args.inference_only and run.examples:
        with signals_noted(stopped, while_training=True):
            hellaswag(run)
    elif run.args.inference_only:
        if world.rank == 0:
            with signals_noted(stopped, while_training=False):
                print_sample(run.model, run.args, 0, stopped)
            stopped.clear()  # a reader that goes away is no error
    elif run.args.write_tensors:
        if world.rank == 0:
            inputs, targets = run.loader.next_batch()
            for path in write_tensors(run.model, inputs, targets, output_dir or "data"):
                print_now(path)
    else:
        world.check_alike({
            "training data": [run.tokens, run.tokens_crc32],
            "weights": zlib.crc32(run.model.flat[0]),
            "settings": vars(run.args),
        })  # fmt: skip
        with signals_noted(stopped, while_training=True):
            train(run)


def main(argv=None):
    """Run the command line. Returns the exit code.

    0; 1 for what a one-line error explains; 2 for the flags; 130, 141 or 143 if it was stopped.
    """
    named = parse_args(argv)
    stopped = []
    world = ALONE
    lock = contextlib.nullcontext()
    try:
        world = join_world()
        world.check_alike({"flags": named, "code": own_code(), "NumPy": np.__version__})
        check_flags(named)
        if named.get("output_dir") and not named.get("inference_only") and world.rank == 0:
            lock = lock_folder(named["output_dir"])
        with lock, warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # check_finite finds what overflows
            run_command(named, stopped, world)
        world.wait()
    except KeyboardInterrupt:
        return end_all(world, 130)
    except (InputError, OSError, MemoryError) as error:
        report_error(error)
        return end_all(world, 1)
    except Exception:
        if world.comm is None:
            raise
        traceback.print_exc()
        return end_all(world, 1)
    return 128 + stopped[0] if stopped else 0


def report_error(error):
    """Print an error, once if all processes have the same one."""
    rank, _ = launched()
    if rank > 0:
        time.sleep(1)  # process 0 may be about to say the same, and to end this one
    print(f"error: {error}", file=sys.stderr, flush=True)


def own_code():
    """The CRC-32s of the two files that a run consists of."""
    return [zlib.crc32(np.fromfile(path, np.uint8)) for path in (__file__, prepro.__file__)]


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if sys.stdout:  # None, if it was closed
        sys.stdout.reconfigure(errors="replace")  # a sample may hold what a terminal can't show
    sys.exit(main())
