"""
GPT-2, trained in NumPy: the whole algorithm, written out.

There is no framework underneath. Every layer is a function that computes its outputs (forward)
followed by a function that computes its gradients (backward), and all the memory a run needs is one
flat array, laid out before the first step. It follows llm.c (github.com/karpathy/llm.c) in its names,
its layouts and its file formats; PyTorch appears only in test_gpt2.py, to check every number.

    python train_gpt2.py                                     # fine-tune GPT-2 124M on Shakespeare
    python train_gpt2.py --model d6 --num_iterations 200     # train a small one from scratch
    python train_gpt2.py --inference_only 1 --prompt "To be" # let it speak

What it refuses to do: no tensor class, no autograd, no layer objects, no devices, no mixed precision.
Sections 1 to 8 are the algorithm. Sections 9 to 12 make it a tool: files, data, sampling, the loop.

     1 Header          4 Rows and threads    7 Model backward    10 Data
     2 Configuration   5 Layers              8 AdamW             11 Sampling
     3 Memory          6 Model forward       9 Weights           12 Training and the command line

Throughout this program we have (with GPT-2 124M's values):

    B   batch size, sequences per batch              4
    T   sequence length, tokens per sequence         64, at most max_seq_len = 1024
    V   vocabulary size                              50257 = 256 bytes + 50000 merges + <|endoftext|>
    L   layers, also called blocks                   12
    C   channels, the width of the residual stream   768
    NH  attention heads                              12
    hs  head size, C / NH                            64
    OC  output channels of a matmul                  C, 3C or 4C
    l   a layer's number;  b, t: a sequence's, a position's
    inp, out     what a layer reads, what it writes; parameters: weight, bias
    dsomething   the gradient of the loss with respect to something, of the same shape

The contract for `=` and `+=`, which holds in every backward function:

    gradients of activations     are written with =, whatever stood there before ...
    ... but the residual stream's  is added to with +=, for two paths meet in it
    gradients of parameters      are written with = by the first micro-batch of a step, and added to
                                 by later ones (`add=True`). So nothing is ever cleared.

Everything is float32; the layers themselves take any float type, and the tests run them in float64.
"""
# ----------------------------------------------------------------------------------------------------
# 1. Header: what we stand on

import argparse, codecs, contextlib, ctypes, functools, glob, json, math, os, signal, sys, time, zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from types import SimpleNamespace

os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")  # BLAS threads sleep when idle, rather than spin
import numpy as np  # 2.1 or newer; tiktoken and requests are imported where they are used


class InputError(ValueError):
    """Something from outside is not as it must be. Its message is one line: found, expected, remedy."""


def require(condition, message):
    """Raise InputError(message) unless the condition holds."""
    if not condition:
        raise InputError(message)


# ----------------------------------------------------------------------------------------------------
# 2. Configuration: the five numbers that make a GPT-2

@dataclass(frozen=True)
class GPT2Config:
    """The shape of a model. The defaults are GPT-2 124M, the smallest of the four that OpenAI released."""
    max_seq_len: int = 1024
    vocab_size: int = 50257
    num_layers: int = 12
    num_heads: int = 12
    channels: int = 768

    def __post_init__(self):
        for name, value in asdict(self).items():
            require(type(value) is int and value > 0, f"{name} is {value!r}, expected a positive integer")
        require(self.channels % self.num_heads == 0,
                f"channels {self.channels} is not divisible by num_heads {self.num_heads}: choose a multiple")


# ----------------------------------------------------------------------------------------------------
# 3. Memory: two tables, one blob
#
# Everything lives in one array, allocated once and filled with zeros. A zeroed page that nobody touches
# costs no memory, so a run that only generates text never pays for gradients or moments.
#
#     |  params  |  grads   |    m     |    v     |  activations                      | work space  |
#     | wte .. lnfb         (four times the same table)  | encoded | ln1 .. residual3 | dresidual ..|
#
# A table is an ordered dict name -> shape. Its order is the order in memory. Sizes, views, checkpoints
# and the coverage of the tests all derive from these two tables.

def param_shapes(config):
    """The parameters, with llm.c's names, order and layouts: a matmul's weight is (OC, C)."""
    V, L, C = config.vocab_size, config.num_layers, config.channels
    return {
        "wte": (V, C),                   # token embeddings, and the classifier's weight: they are tied
        "wpe": (config.max_seq_len, C),  # position embeddings
        "ln1w": (L, C), "ln1b": (L, C),
        "qkvw": (L, 3 * C, C), "qkvb": (L, 3 * C),
        "attprojw": (L, C, C), "attprojb": (L, C),
        "ln2w": (L, C), "ln2b": (L, C),
        "fcw": (L, 4 * C, C), "fcb": (L, 4 * C),
        "fcprojw": (L, C, 4 * C), "fcprojb": (L, C),
        "lnfw": (C,), "lnfb": (C,),
    }


LOGITS_ROWS = 256  # the classifier works through this many tokens at a time: 51 MB of logits, never B*T*V


def act_shapes(config, B, T, recompute):
    """The activations, in the order in which they are computed, then backward's work space.

    Where the leading dimension is L, every layer keeps its own for the backward pass. Where it is 1,
    all layers share one, because backward needs it no more (attproj, fcproj) or computes it again
    (recompute >= 1: fch_gelu; recompute >= 2: also ln1 and ln2). recompute = 0 keeps everything, which
    is what you want when you compare another implementation with this one.
    """
    V, L, C, NH = config.vocab_size, config.num_layers, config.channels, config.num_heads
    kept, gelus, norms = L if recompute == 0 else 1, L if recompute < 1 else 1, L if recompute < 2 else 1
    return {
        "encoded": (B, T, C),
        "ln1": (norms, B, T, C), "ln1_mean": (L, B, T), "ln1_rstd": (L, B, T),
        "qkv": (L, B, T, 3 * C),         # in generation these are the keys and values of earlier tokens
        "att_lse": (L, B, T, NH),        # log of the softmax's sum: all of attention that is stored
        "atty": (L, B, T, C),
        "attproj": (kept, B, T, C),
        "residual2": (L, B, T, C),
        "ln2": (norms, B, T, C), "ln2_mean": (L, B, T), "ln2_rstd": (L, B, T),
        "fch": (L, B, T, 4 * C),
        "fch_gelu": (gelus, B, T, 4 * C),
        "fcproj": (kept, B, T, C),
        "residual3": (L, B, T, C),
        "lnf": (B, T, C), "lnf_mean": (B, T), "lnf_rstd": (B, T),
        "logits": (1, min(B * T, LOGITS_ROWS), V),   # a piece; then its probabilities; then its gradient
        "losses": (B, T),
        "dresidual": (B, T, C),          # the gradient of the residual stream, from the top down
        "dln": (B, T, C),                # dlnf, then in every layer: dln2, datty, dln1
        "dfch": (B, T, 4 * C),           # in every layer: dfch_gelu, dfch, and then, being free, dqkv
    }


NOT_PER_LAYER = {"wte", "wpe", "lnfw", "lnfb", "encoded", "lnf", "lnf_mean", "lnf_rstd",
                 "logits", "losses", "dresidual", "dln", "dfch"}


def size(shapes):
    """Number of elements of a whole table."""
    return sum(math.prod(shape) for shape in shapes.values())


def carve(flat, shapes):
    """Cut a flat array into named views, in the table's order: {"wte": (V, C) view, ...}."""
    views, start = {}, 0
    for name, shape in shapes.items():
        views[name] = flat[start:start + math.prod(shape)].reshape(shape)
        start += math.prod(shape)
    return views


def layer(views, l, rows=...):
    """Layer l's own views, as attributes: layer(params, 3).qkvw is params["qkvw"][3].

    A tensor that all layers share has a leading dimension of 1, hence the modulo. rows selects
    positions, as in layer(acts, 3, np.s_[:1, 5:6]).
    """
    return SimpleNamespace(**{name: view[l % len(view)][rows] for name, view in views.items()
                              if name not in NOT_PER_LAYER})


def memory_plan(config, B, T, recompute=1):
    """What the blob will hold, in bytes: {"parameters": ..., "gradients": ..., ...}."""
    n = 4 * size(param_shapes(config))
    return {"parameters": n, "gradients": n, "moments": 2 * n,
            "activations": 4 * size(act_shapes(config, B, T, recompute))}


# ----------------------------------------------------------------------------------------------------
# 4. Rows and threads: the only parallel machinery
#
# Big matrix products are BLAS's business, and it has its own threads. All the rest works on rows: what
# happens to one token's channels. We cut the rows into blocks that stay in a core's cache from the first
# operation to the last (NumPy makes one pass over memory per operation, which is slow in RAM and fast in
# cache), and spread the blocks over threads, which really run side by side, since NumPy lets go of the
# interpreter lock while it computes. The two kinds of threads never run on top of each other.

BLOCK_BYTES = 512 * 1024   # of one array in a block. Less, and two threads fight over the lock; more, and
                           # it leaves the cache. It never depends on the number of threads: same blocks,
                           # same sums, same bits.
CPUS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
ROW_THREADS = int(os.environ.get("OPENBLAS_NUM_THREADS") or os.environ.get("OMP_NUM_THREADS") or CPUS)
BLAS_THREADS = ROW_THREADS
POOL = ThreadPoolExecutor(max_workers=64)  # starts a thread only when it needs one


def find_blas_threads_setter():
    """The function of NumPy's own OpenBLAS that sets its number of threads, or one that does nothing."""
    here = os.path.dirname(np.__file__)
    for path in glob.glob(here + "/../numpy.libs/*openblas*") + glob.glob(here + "/.dylibs/*openblas*"):
        with contextlib.suppress(OSError, AttributeError):
            return ctypes.CDLL(path).scipy_openblas_set_num_threads64_
    return lambda n: None


set_blas_threads = find_blas_threads_setter()
with contextlib.suppress(AttributeError, OSError, TypeError):  # glibc only: let freed temporaries be used
    ctypes.CDLL(None).mallopt(-3, 32 << 20)                    # again, instead of giving their pages back
    ctypes.CDLL(None).mallopt(-1, 1 << 30)                     # and faulting them in anew each time


def parallel(task, n):
    """[task(0), ..., task(n - 1)], computed by ROW_THREADS threads while BLAS is held to one thread."""
    results, todo = [None] * n, iter(range(n))

    def work():
        for i in todo:  # whoever is free takes the next
            results[i] = task(i)

    set_blas_threads(1)
    helpers = [POOL.submit(work) for _ in range(min(ROW_THREADS, n) - 1)]
    try:
        work()
        for helper in helpers:
            helper.result()
    finally:
        set_blas_threads(BLAS_THREADS)
    return results


def by_rows(count):
    """Decorator: run a layer on blocks of rows, in parallel.

    The first `count` arguments hold something for every token, shape (B, T, ...); the body sees a block
    of them as (rows, ...). The other arguments it sees whole. If the body returns arrays (sums over its
    rows), the results are added up in the order of the blocks. The undecorated body is `.__wrapped__`.
    """
    def decorate(body):
        @functools.wraps(body)
        def run(*args):
            rows = [a.reshape(-1, *a.shape[2:], copy=False) for a in args[:count]]  # never a copy
            step = max(1, BLOCK_BYTES // max(a[0].nbytes for a in rows))
            n = -(-len(rows[0]) // step)
            if n == 1:
                return body(*rows, *args[count:])
            sums = parallel(lambda i: body(*(a[i * step:(i + 1) * step] for a in rows), *args[count:]), n)
            return None if sums[0] is None else [functools.reduce(np.add, parts) for parts in zip(*sums)]
        return run
    return decorate


# ----------------------------------------------------------------------------------------------------
# 5. Layers, each forward followed by its backward
#
# A backward function receives dout, the gradient of the loss with respect to its forward's output, and
# applies the chain rule. A derivation quotes the forward line it differentiates.

def encoder_forward(out, inp, wte, wpe):
    """out (B, T, C): a token's embedding plus its position's. inp (B, T) integers, wte (V, C), wpe (T, C)."""
    np.take(wte, inp, axis=0, out=out, mode="clip")  # the ids were checked; "raise" would buffer a copy
    out += wpe


def encoder_backward(dwte, dwpe, dout, inp, add):
    """out[b, t] = wte[inp[b, t]] + wpe[t]: each row of dout goes to one row of dwte and one of dwpe.

    dwte is always added to, even by the first micro-batch: the classifier has written its part before.
    """
    for token, row in zip(inp.flat, dout.reshape(-1, dout.shape[-1])):
        dwte[token] += row
    T = dout.shape[1]
    accumulate(dwpe[:T], dout.sum(axis=0), add)
    if not add:
        dwpe[T:] = 0  # positions beyond T took no part


def accumulate(grad, value, add):
    """A parameter's gradient: grad = value, or grad += value from a step's second micro-batch on."""
    if add:
        grad += value
    else:
        grad[...] = value


LN_EPS = 1e-5  # keeps the division by the standard deviation finite; OpenAI's value


@by_rows(4)
def layernorm_forward(out, mean, rstd, inp, weight, bias):
    """Give each token's channels mean 0 and variance 1, then scale and shift (Ba et al., 2016).

    out, inp (B, T, C); mean, rstd (B, T), kept for backward; weight, bias (C,).
        out = (inp - mean) * rstd * weight + bias,    rstd = 1 / sqrt(var + eps)
    """
    inp.mean(axis=-1, out=mean)
    np.subtract(inp, mean[:, None], out=out)
    var = np.einsum("ij,ij->i", out, out) / inp.shape[-1]
    rstd[:] = 1 / np.sqrt(var + LN_EPS)
    out *= rstd[:, None]
    out *= weight
    out += bias


@by_rows(5)
def layernorm_backward(dinp, dout, inp, mean, rstd, weight):
    """Returns the sums (dweight, dbias) over the rows; dinp is the residual stream's, so it is added to.

    With norm = (inp - mean) * rstd the forward is out = norm * weight + bias, so
        dweight = sum of dout * norm,    dbias = sum of dout,    dnorm = dout * weight.
    mean and rstd depend on every channel of inp. Through them, dnorm loses the two directions in which
    inp can move without norm changing: up and down as a whole, and in proportion to norm itself:
        dinp = (dnorm - average(dnorm) - norm * average(dnorm * norm)) * rstd
    """
    C = inp.shape[-1]
    norm = inp - mean[:, None]
    norm *= rstd[:, None]
    dnorm = dout * weight
    along = np.einsum("ij,ij->i", dnorm, norm) / C
    dnorm -= dnorm.mean(axis=-1)[:, None]
    dnorm -= norm * along[:, None]
    dnorm *= rstd[:, None]
    dinp += dnorm
    norm *= dout
    return norm.sum(axis=0), dout.sum(axis=0)


def rows_of(x):
    """(B, T, C) seen as (B*T, C): one large matrix product is faster than B small ones."""
    return x.reshape(-1, x.shape[-1], copy=False)


def matmul_forward(out, inp, weight, bias=None):
    """out (B, T, OC) = inp (B, T, C) @ weight.T + bias; weight (OC, C). Nine tenths of all time is here.

    weight.T is a view with its strides exchanged, which BLAS reads as it is: nothing is copied.
    """
    np.matmul(rows_of(inp), weight.T, out=rows_of(out))
    if bias is not None:
        out += bias


def matmul_backward(dinp, dweight, dbias, dout, inp, weight, add):
    """out[n, o] = sum over c of inp[n, c] * weight[o, c] + bias[o]. Each sum's partner comes back:

        dinp[n, c]    = sum over o of dout[n, o] * weight[o, c]     dinp    = dout @ weight
        dweight[o, c] = sum over n of dout[n, o] * inp[n, c]        dweight = dout.T @ inp
        dbias[o]      = sum over n of dout[n, o]
    """
    np.matmul(rows_of(dout), weight, out=rows_of(dinp))
    matmul_dweight(dweight, rows_of(dout), rows_of(inp), add)
    if dbias is not None:
        accumulate(dbias, np.ones(dout[..., 0].size, dout.dtype) @ rows_of(dout), add)


def matmul_dweight(dweight, dout, inp, add):
    """dweight (OC, C) = or += dout.T @ inp. BLAS can't add through NumPy, so += goes by blocks in cache."""
    step = len(dweight) if not add else max(1, (1 << 19) // dweight.shape[1])
    for o in range(0, len(dweight), step):
        if add:
            dweight[o:o + step] += dout[:, o:o + step].T @ inp
        else:
            np.matmul(dout.T, inp, out=dweight)


def heads(x, NH):
    """(B, T, C) seen as (B, NH, T, hs): every head has hs neighbouring channels for its own."""
    B, T, C = x.shape
    return x.reshape(B, T, NH, C // NH, copy=False).transpose(0, 2, 1, 3)


def split_qkv(qkv, NH):
    """(B, T, 3C) seen as queries, keys and values, each (B, NH, T, hs)."""
    return [heads(x, NH) for x in np.split(qkv, 3, axis=-1)]


ATT_ROWS = 128  # attention goes by blocks of this many positions
FUTURE = np.triu(np.full((ATT_ROWS, ATT_ROWS), -np.inf, np.float32), k=1)  # -inf where key t2 > query t


def head_group(NH, T, itemsize):
    """How many heads to take at once so that a block of attention, (heads, ATT_ROWS, T), stays in cache."""
    return max(1, min(NH, BLOCK_BYTES // (min(ATT_ROWS, T) * T * itemsize)))


def attention_forward(out, lse, qkv, NH):
    """Each position looks at itself and those before it: the only layer that mixes information across time.

    qkv (B, T, 3C): queries, keys, values. out (B, n, C) and lse (B, n, NH) are for the last n of the T
    positions: all in training, one for each new token in generation. For each head
        att[t, t2] = q[t] . k[t2] / sqrt(hs)    for t2 <= t, otherwise -inf
        p[t, :]    = softmax(att[t, :])         (Vaswani et al., 2017)
        out[t]     = sum over t2 of p[t, t2] * v[t2]
    A block of queries sees only the keys up to its own end, which saves nearly half of the work. p is
    never stored: lse = log(sum(exp(att))) is enough to compute it again (Dao et al., 2022).
    """
    B, T, C3 = qkv.shape
    n, scale, group = out.shape[1], (C3 // 3 // NH) ** -0.5, head_group(NH, T, qkv.itemsize)
    q, k, v = split_qkv(qkv, NH)
    out, lse = heads(out, NH), lse.transpose(0, 2, 1)[..., None]
    groups = [(b, slice(h, h + group)) for b in range(B) for h in range(0, NH, group)]

    def block(i):
        at = groups[i]
        q_, kT, v_ = q[at][:, T - n:] * scale, k[at].swapaxes(-1, -2), v[at]
        if n > 1:  # they are read more than once: worth bringing their numbers together
            kT, v_ = np.ascontiguousarray(kT), np.ascontiguousarray(v_)
        for n0 in range(0, n, ATT_ROWS):
            n1 = min(n0 + ATT_ROWS, n)
            t0, t1 = T - n + n0, T - n + n1
            att = q_[:, n0:n1] @ kT[..., :t1]                              # (heads, t1 - t0, t1)
            att[..., t0:] += FUTURE[:t1 - t0, :t1 - t0]
            peak = att.max(axis=-1, keepdims=True)
            att -= peak                                                    # so that exp can't overflow
            np.exp(att, out=att)
            total = np.einsum("htc->ht", att)[..., None]
            np.divide(att @ v_[:, :t1], total, out=out[at][:, n0:n1])
            lse[at][:, n0:n1] = np.log(total) + peak

    parallel(block, len(groups))


def attention_backward(dqkv, dout, out, lse, qkv, NH):
    """dqkv (B, T, 3C) from dout (B, T, C). By blocks of keys: keys t0 to t1 are seen by queries from t0 on.

        out = p @ v                  dv = p.T @ dout,    dp = dout @ v.T
        p   = softmax(att)           datt = p * (dp - sum of p * dp over a row)
        att = q @ k.T * scale        dq = datt @ k * scale,    dk = datt.T @ q * scale
    The softmax's line: p[i] = exp(att[i]) / sum(exp(att)), so dp[i]/datt[j] = p[i] * ((i == j) - p[j]).
    Its sum of p * dp is the sum of dout * out, since out = p @ v: rows of hs numbers instead of T.
    """
    B, T, C = out.shape
    scale, group = (C // NH) ** -0.5, head_group(NH, T, qkv.itemsize)
    q, k, v = split_qkv(qkv, NH)
    dq, dk, dv = split_qkv(dqkv, NH)
    out, dout, lse = heads(out, NH), heads(dout, NH), lse.transpose(0, 2, 1)
    groups = [(b, slice(h, h + group)) for b in range(B) for h in range(0, NH, group)]

    def block(i):
        at = groups[i]
        q_, k_, vT = q[at] * scale, np.ascontiguousarray(k[at]), np.ascontiguousarray(v[at].swapaxes(-1, -2))
        dout_, lse_ = np.ascontiguousarray(dout[at]), lse[at][..., None]
        row_sum = np.einsum("htc,htc->ht", dout_, out[at])[..., None]
        for t0 in range(0, T, ATT_ROWS):
            keys, t1 = slice(t0, t0 + ATT_ROWS), min(t0 + ATT_ROWS, T)
            p = q_[:, t0:] @ k_[:, keys].swapaxes(-1, -2)                  # att: (heads, T - t0, t1 - t0)
            p -= lse_[:, t0:]
            p[:, :t1 - t0] += FUTURE[:t1 - t0, :t1 - t0]
            np.exp(p, out=p)                                               # p, as in the forward pass
            np.matmul(p.swapaxes(-1, -2), dout_[:, t0:], out=dv[at][:, keys])
            datt = dout_[:, t0:] @ vT[..., keys]                           # dp
            datt -= row_sum[:, t0:]
            datt *= p
            np.matmul(datt.swapaxes(-1, -2), q_[:, t0:], out=dk[at][:, keys])
            datt *= scale
            accumulate(dq[at][:, t0:], datt @ k_[:, keys], add=t0 > 0)

    parallel(block, len(groups))


GELU_SCALE = math.sqrt(2 / math.pi)  # makes tanh's slope at 0 that of the normal distribution it imitates
GELU_CUBE = 0.044715                 # fitted by Hendrycks & Gimpel (2016), and what GPT-2 was trained with


@by_rows(2)
def gelu_forward(out, inp):
    """A smooth gate, applied to each number x: out = 0.5 * x * (1 + tanh(s * (x + 0.044715 * x^3)))."""
    np.multiply(inp, inp, out=out)      # x^2
    out *= GELU_SCALE * GELU_CUBE
    out += GELU_SCALE
    out *= inp                          # u = s * (x + 0.044715 * x^3)
    np.tanh(out, out=out)
    out += 1
    out *= inp
    out *= 0.5


@by_rows(2)
def gelu_backward(dout, inp):
    """dout becomes dinp, in place. With u as above and th = tanh(u), whose derivative is 1 - th^2:

        out  = 0.5 * x * (1 + th)
        dinp = dout * 0.5 * (1 + th + x * (1 - th^2) * s * (1 + 3 * 0.044715 * x^2))
             = dout * 0.5 * (1 + th) * (1 + (1 - th) * x * s * (1 + 3 * 0.044715 * x^2))
    """
    square = inp * inp
    th = square * (GELU_SCALE * GELU_CUBE)
    th += GELU_SCALE
    th *= inp
    np.tanh(th, out=th)
    square *= 3 * GELU_CUBE * GELU_SCALE
    square += GELU_SCALE
    square *= inp                       # x * s * (1 + 3 * 0.044715 * x^2), the derivative of u times x
    square *= 1 - th
    square += 1
    th += 1
    th *= 0.5
    th *= square
    dout *= th


def residual_forward(out, inp1, inp2):
    """out = inp1 + inp2. Its backward is no code at all: dinp1 = dinp2 = dout."""
    np.add(inp1, inp2, out=out)


@by_rows(3)
def crossentropy_softmax_forward(losses, logits, targets):
    """losses[n] = -log(softmax(logits[n])[targets[n]]), in nats; logits (B, T, V) become probabilities."""
    own = np.arange(len(targets))
    logits -= logits.max(axis=-1, keepdims=True)
    np.negative(logits[own, targets], out=losses)
    probs = np.exp(logits, out=logits)
    total = np.einsum("nv->n", probs)
    losses += np.log(total)
    probs *= (1 / total)[:, None]


@by_rows(2)
def crossentropy_softmax_backward(probs, targets, dloss):
    """probs (B, T, V) become dlogits, in place. dloss: the weight of one token's loss, a number.

    loss = log(sum(exp(logits))) - logits[target], and the log's derivative is exp(logits) / sum(...), so
        dlogits = (probs - (1 at the target, 0 elsewhere)) * dloss
    """
    dlogits = probs
    dlogits[np.arange(len(targets)), targets] -= 1
    dlogits *= dloss


# ----------------------------------------------------------------------------------------------------
# 6. Model forward: a line or two per layer

class GPT2:
    """A GPT-2 and all the memory it will ever use. See section 3 for what its tables hold.

    config, batch_size (B), sequence_length (T): the largest batch it can take. seed: of the fresh weights;
    None leaves them zero, to be loaded. recompute: see act_shapes. dtype: float32; float64 in tests.
    params, grads, m, v, acts: dicts of named views of `blob`.
    """

    def __init__(self, config, batch_size=4, sequence_length=64, seed=1337, recompute=1, dtype=np.float32):
        B, T = batch_size, sequence_length
        require(B > 0 and T > 0, f"batch size {B} and sequence length {T} must be positive")
        require(T <= config.max_seq_len,
                f"sequence length {T} is beyond the model's context of {config.max_seq_len}: "
                f"use --sequence_length {config.max_seq_len} or less")
        require(recompute in (0, 1, 2), f"recompute is {recompute!r}, expected 0, 1 or 2")
        self.config, self.batch_size, self.sequence_length, self.recompute = config, B, T, recompute
        params, acts = param_shapes(config), act_shapes(config, B, T, recompute)
        n, line = size(params), 64 // np.dtype(dtype).itemsize  # a cache line has 64 bytes: start at one
        self.blob = np.zeros(4 * n + size(acts) + line, dtype)
        self.blob = self.blob[-self.blob.ctypes.data % 64 // self.blob.itemsize:][:4 * n + size(acts)]
        self.flat = self.blob[:4 * n].reshape(4, n)  # rows: parameters, gradients, m, v
        self.params, self.grads, self.m, self.v = (carve(part, params) for part in self.flat)
        self.acts = carve(self.blob[4 * n:], acts)
        self.micro_batches = 0      # backward passes since the last update: the next one sets, or adds
        self.pending = None         # the inputs of a forward pass whose backward pass is still to come
        if seed is not None:
            self.init_weights(seed)

    def init_weights(self, seed):
        """GPT-2's own: N(0, 0.02), the projections into the residual stream scaled by 1/sqrt(2L) because
        2L of them add up there; layernorm weights 1, biases 0 (Radford et al., 2019)."""
        rng = np.random.default_rng(seed)
        for name, view in self.params.items():
            if name in ("ln1w", "ln2w", "lnfw"):
                view[...] = 1
            elif not name.endswith("b"):
                projection = name in ("attprojw", "fcprojw")
                rng.standard_normal(out=view.reshape(-1), dtype=view.dtype)
                view *= 0.02 / math.sqrt(2 * self.config.num_layers) if projection else 0.02

    def forward_rows(self, tokens, first=0):
        """Compute every activation up to lnf for tokens (b, n), which stand at positions first .. first+n-1.

        In training that is the whole batch. In generation b is 1, and the positions before `first` have
        left their keys and values in acts["qkv"], so n new tokens cost n positions. Returns lnf (b, n, C).
        """
        b, n = tokens.shape
        rows, seen = np.s_[:b, first:first + n], np.s_[:b, :first + n]
        params, acts, NH = self.params, self.acts, self.config.num_heads
        residual = acts["encoded"][rows]
        encoder_forward(residual, tokens, params["wte"], params["wpe"][first:first + n])
        for l in range(self.config.num_layers):
            p, a, qkv = layer(params, l), layer(acts, l, rows), acts["qkv"][l][seen]
            layernorm_forward(a.ln1, a.ln1_mean, a.ln1_rstd, residual, p.ln1w, p.ln1b)
            matmul_forward(a.qkv, a.ln1, p.qkvw, p.qkvb)
            attention_forward(a.atty, a.att_lse, qkv, NH)
            matmul_forward(a.attproj, a.atty, p.attprojw, p.attprojb)
            residual_forward(a.residual2, residual, a.attproj)
            layernorm_forward(a.ln2, a.ln2_mean, a.ln2_rstd, a.residual2, p.ln2w, p.ln2b)
            matmul_forward(a.fch, a.ln2, p.fcw, p.fcb)
            gelu_forward(a.fch_gelu, a.fch)
            matmul_forward(a.fcproj, a.fch_gelu, p.fcprojw, p.fcprojb)
            residual_forward(a.residual3, a.residual2, a.fcproj)
            residual = a.residual3
        lnf = acts["lnf"][rows]
        layernorm_forward(lnf, acts["lnf_mean"][rows], acts["lnf_rstd"][rows], residual,
                          params["lnfw"], params["lnfb"])
        return lnf

    def check_tokens(self, tokens, what):
        """tokens as an integer array; InputError if it is none or an id is outside the vocabulary."""
        tokens, V = np.asarray(tokens), self.config.vocab_size
        require(tokens.dtype.kind in "iu" and tokens.size > 0,
                f"{what} must be integers, found {tokens.dtype} of shape {tokens.shape}")
        low, high = int(tokens.min()), int(tokens.max())
        require(0 <= low and high < V, f"{what}: id {low if low < 0 else high} is outside the vocabulary, 0 to {V - 1}")
        return tokens

    def forward(self, inputs, targets, train=True, grad_scale=1.0):
        """The mean cross-entropy, in nats, of predicting targets (B, T) from inputs (B, T): a float.

        With train, the classifier's backward pass runs at once (see classifier), and backward() may follow;
        the gradients will be those of loss * grad_scale (1/k when k micro-batches make a step).
        """
        inputs, targets = self.check_tokens(inputs, "inputs"), self.check_tokens(targets, "targets")
        shape = (self.batch_size, self.sequence_length)
        require(inputs.shape == targets.shape == shape,
                f"inputs {inputs.shape} and targets {targets.shape} must both have the model's (B, T) = {shape}")
        require(not (train and self.micro_batches and self.pending is not None),
                "two training forward passes in a row: call backward() between them, or forward(train=False)")
        self.forward_rows(inputs)
        self.classifier(targets, grad_scale / targets.size if train else None)
        self.pending = inputs if train else None
        return float(self.acts["losses"].mean())

    def classifier(self, targets, dloss=None):
        """acts["losses"] from acts["lnf"], and with dloss also dlnf (in acts["dln"]) and dwte.

        The logits would be the largest array of all, B*T*V. But rows are independent here, so we take
        a piece of them all the way: logits, probabilities, loss, gradient of the logits, of lnf and wte.
        """
        def flat(x):  # (B, T, ...) as (1, B*T, ...), to be cut anywhere
            return x.reshape(1, -1, *x.shape[2:])
        wte, acts = self.params["wte"], self.acts
        lnf, dlnf, losses, targets = (flat(x) for x in (acts["lnf"], acts["dln"], acts["losses"], targets))
        step = acts["logits"].shape[1]
        for start in range(0, targets.size, step):
            rows = np.s_[:, start:start + step]
            logits = acts["logits"][:, :targets[rows].size]
            matmul_forward(logits, lnf[rows], wte)
            crossentropy_softmax_forward(losses[rows], logits, targets[rows])
            if dloss is not None:
                dlogits = logits  # which hold probabilities now, and their own gradient after this line
                crossentropy_softmax_backward(dlogits, targets[rows], dloss)
                matmul_backward(dlnf[rows], self.grads["wte"], None, dlogits, lnf[rows], wte,
                                add=start > 0 or self.micro_batches > 0)

    # ------------------------------------------------------------------------------------------------
    # 7. Model backward: the same lines, reversed

    def backward(self):
        """Fill grads with the gradients of the forward pass just made; add to them if it is not the
        first since the last update (or zero_grad)."""
        require(self.pending is not None, "backward() needs a training forward pass before it: call forward()")
        params, grads, acts, NH = self.params, self.grads, self.acts, self.config.num_heads
        add, inputs = self.micro_batches > 0, self.pending
        dres, dln, dfch = acts["dresidual"], acts["dln"], acts["dfch"]
        dqkv = dfch.reshape(-1)[:3 * dres.size].reshape(*inputs.shape, -1)  # the same memory, used in turns

        def layernorm(dinp, dout, inp, mean, rstd, weight, dweight, dbias):
            sums = layernorm_backward(dinp, dout, inp, mean, rstd, weight)
            accumulate(dweight, sums[0], add)
            accumulate(dbias, sums[1], add)

        dres[...] = 0
        layernorm(dres, dln, acts["residual3"][-1], acts["lnf_mean"], acts["lnf_rstd"],
                  params["lnfw"], grads["lnfw"], grads["lnfb"])
        for l in reversed(range(self.config.num_layers)):
            p, g, a = layer(params, l), layer(grads, l), layer(acts, l)
            residual = acts["residual3"][l - 1] if l > 0 else acts["encoded"]
            if self.recompute >= 1:
                gelu_forward(a.fch_gelu, a.fch)
            if self.recompute >= 2:
                layernorm_forward(a.ln2, a.ln2_mean, a.ln2_rstd, a.residual2, p.ln2w, p.ln2b)
            # residual3 = residual2 + fcproj: dres is the gradient of both, and stays where it is
            matmul_backward(dfch, g.fcprojw, g.fcprojb, dres, a.fch_gelu, p.fcprojw, add)
            gelu_backward(dfch, a.fch)
            matmul_backward(dln, g.fcw, g.fcb, dfch, a.ln2, p.fcw, add)
            layernorm(dres, dln, a.residual2, a.ln2_mean, a.ln2_rstd, p.ln2w, g.ln2w, g.ln2b)
            # residual2 = residual + attproj: the same again
            if self.recompute >= 2:
                layernorm_forward(a.ln1, a.ln1_mean, a.ln1_rstd, residual, p.ln1w, p.ln1b)
            matmul_backward(dln, g.attprojw, g.attprojb, dres, a.atty, p.attprojw, add)
            attention_backward(dqkv, dln, a.atty, a.att_lse, a.qkv, NH)
            matmul_backward(dln, g.qkvw, g.qkvb, dqkv, a.ln1, p.qkvw, add)
            layernorm(dres, dln, residual, a.ln1_mean, a.ln1_rstd, p.ln1w, g.ln1w, g.ln1b)
        encoder_backward(grads["wte"], grads["wpe"], dres, inputs, add)
        self.pending, self.micro_batches = None, self.micro_batches + 1

    def zero_grad(self):
        """Forget the gradients. Nothing is cleared: the next backward pass writes over them."""
        self.micro_batches = 0

    # ------------------------------------------------------------------------------------------------
    # 8. AdamW

    def grad_norm(self):
        """The length of the gradient seen as one vector of all parameters: a float."""
        chunks = [self.flat[1, i:i + ADAMW_CHUNK] for i in range(0, self.flat.shape[1], ADAMW_CHUNK)]
        return math.sqrt(sum(parallel(lambda i: float(np.dot(chunks[i], chunks[i])), len(chunks))))

    def update(self, learning_rate, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, step=1, grad_scale=1.0):
        """One step of AdamW on all parameters; step counts from 1. grad_scale: what clipping multiplies
        the gradients by. Weight decay applies to matrices and embeddings, not to biases and layernorms."""
        work = []
        start = 0
        for name, view in self.params.items():
            decay = learning_rate * weight_decay if not name.endswith("b") and "ln" not in name else 0.0
            ends = [*range(start, start + view.size, ADAMW_CHUNK), start + view.size]
            work += [(self.flat[:, i:j], decay) for i, j in zip(ends, ends[1:])]
            start += view.size
        parallel(lambda i: adamw(*work[i][0], learning_rate, beta1, beta2, eps, work[i][1], step, grad_scale),
                 len(work))
        self.micro_batches = 0


ADAMW_CHUNK = 1 << 17  # elements: five arrays of 512 KiB. Smaller, and the threads fight over the lock


def adamw(p, g, m, v, learning_rate, beta1, beta2, eps, decay, step, grad_scale):
    """AdamW (Loshchilov & Hutter, 2017) on a chunk of parameters p, gradients g and moments m, v, in place.

        m = beta1 * m + (1 - beta1) * g         the gradient's running mean
        v = beta2 * v + (1 - beta2) * g^2       the running mean of its square
        p = p - decay * p - learning_rate * (m / c1) / (sqrt(v / c2) + eps)
    m and v start at 0; c1 = 1 - beta1^step and c2 = 1 - beta2^step make up for that. They are numbers, so
    we multiply the fraction by sqrt(c2) and apply them to eps and the learning rate: two passes less.
    """
    c1, c2 = 1 - beta1 ** step, 1 - beta2 ** step
    if grad_scale != 1.0:
        g *= grad_scale
    t = g - m
    t *= 1 - beta1
    m += t
    np.multiply(g, g, out=t)
    t -= v
    t *= 1 - beta2
    v += t
    np.sqrt(v, out=t)
    t += eps * math.sqrt(c2)
    np.divide(m, t, out=t)
    t *= learning_rate * math.sqrt(c2) / c1
    if decay:
        p *= 1 - decay
    p -= t
