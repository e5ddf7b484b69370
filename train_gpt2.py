"""
GPT-2, trained in NumPy: the whole algorithm, written out.

There is no framework underneath. Every layer is a function that computes its outputs (forward), followed by one that computes
its gradients (backward), and all the memory of a run is one flat array, laid out before the first step. Names, layouts and
formats are those of llm.c (github.com/karpathy/llm.c); PyTorch appears only in test_gpt2.py, which checks every number.

    python train_gpt2.py                                               fine-tune GPT-2 124M on Shakespeare
    python train_gpt2.py --model d6 --num_iterations 200 --learning_rate 1e-3 --output_dir data/d6
                                                                       train a small one from scratch, keep it
    python train_gpt2.py --model data/d6 --inference_only 1 --prompt "To be, or"            let a model speak

What it refuses to do: no tensor class, no autograd, no layer objects, no devices, no mixed precision.
Sections 1 to 8 are the algorithm: 2 Configuration, 3 Memory, 4 Rows and threads, 5 Layers, 6 Model forward,
7 Model backward, 8 AdamW. Sections 9 to 12 make it a tool: 9 Weights, 10 Data, 11 Sampling, 12 Training.

Throughout this program we have (with GPT-2 124M's values)
    B   batch size, sequences per batch              4
    T   sequence length, tokens per sequence         64, at most max_seq_len = 1024
    V   vocabulary size                              50257 = 256 bytes + 50000 merges + <|endoftext|>
    L   layers, also called blocks                   12
    C   channels, the width of the residual stream   768
    NH  attention heads                              12
    hs  head size, C / NH                            64
    OC  output channels of a matmul                  C, 3C or 4C; V for the classifier
    l, b, t      the number of a layer, of a sequence in the batch, of a position in the sequence
    inp, out     what a layer reads, what it writes; its parameters are weight and bias
    dsomething   the gradient of the loss with respect to something, of the same shape

The contract for `=` and `+=`, which holds in every backward function (the one exception, dwte, says so)
    gradients of activations     are written with =, whatever stood there before, or in place over dout ...
    ... but the residual stream's  is added to with +=, because two paths meet in it
    gradients of parameters      are written with = by the first micro-batch of a step, and added to by
                                 later ones (`add=True`), so that none of them is ever cleared

Everything is float32; the layers themselves take any float type, and the tests run them in float64."""
# ---- 1. What this file stands on -----------------------------------------------------------------------------------
import argparse, bisect, codecs, contextlib, ctypes, functools, glob, json, math, os, shutil, signal, sys, time, zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from types import SimpleNamespace

os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "20")  # BLAS threads wait for 2^20 cycles, then sleep
import numpy as np  # 2.1 or newer; tiktoken and requests are imported where they are used

class InputError(ValueError):
    """Something from outside is not as it must be. Its message is one line: found, expected, remedy."""

def require(condition, message):
    """Raise InputError(message) unless the condition holds."""
    if not condition:
        raise InputError(message)

# ---- 2. Configuration: the five numbers that make a GPT-2 ----------------------------------------------------------
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
        require(self.channels % self.num_heads == 0, f"{self.channels} channels can't be shared by {self.num_heads} heads")

# ---- 3. Memory: two tables, one blob -------------------------------------------------------------------------------
# Everything lives in one array, allocated once and filled with zeros. A zeroed page that nobody touches
# costs no memory, so a run that only generates text never pays for gradients or moments.
#
#     |  params  |  grads   |    m     |    v     |  activations                             | work space   |
#     |  wte .. lnfb, four times the same table   | encoded, ln1 .. residual3, lnf .. losses | dresidual .. |
#
# A table is an ordered dict name -> shape. Its order is the order in memory. Sizes, views, checkpoints
# and the coverage of the tests all derive from these two tables.

def param_shapes(config):
    """The parameters, with llm.c's names, order and layouts: a matmul's weight is (OC, C)."""
    V, L, C = config.vocab_size, config.num_layers, config.channels
    return {
        "wte": (V, C),                   # token embeddings, and the classifier's weight: they are tied
        "wpe": (config.max_seq_len, C),  # position embeddings
        "ln1w": (L, C), "ln1b": (L, C), "qkvw": (L, 3 * C, C), "qkvb": (L, 3 * C),
        "attprojw": (L, C, C), "attprojb": (L, C), "ln2w": (L, C), "ln2b": (L, C),
        "fcw": (L, 4 * C, C), "fcb": (L, 4 * C), "fcprojw": (L, C, 4 * C), "fcprojb": (L, C),
        "lnfw": (C,), "lnfb": (C,),
    }

LOGITS_ROWS = 256  # where the classifier finds no better room, it works through this many tokens at a time
def act_shapes(config, B, T, recompute):
    """The activations, in the order in which they are computed, then backward's work space. Where the leading dimension
    is L, every layer keeps its own for the backward pass. Where it is 1, all layers share one: recompute = 0 keeps all,
    which is what you want when you compare another implementation with this one; 1 shares what backward does not need
    (attproj, fcproj) and fch_gelu, which it computes again; 2 also ln1 and ln2, likewise; 3 keeps a layer's input and
    computes the layer again (Chen et al., 2016). 4, for generation, has no backward pass: it keeps keys and values."""
    V, L, C, NH = config.vocab_size, config.num_layers, config.channels, config.num_heads
    until_1, until_2, until_3, until_4 = (L if recompute < level else 1 for level in (1, 2, 3, 4))  # until_2: L up to recompute = 1
    return {
        "encoded": (B, T, C),
        "ln1": (until_2, B, T, C), "ln1_mean": (until_3, B, T), "ln1_rstd": (until_3, B, T),
        "qkv": (1 if recompute == 3 else L, B, T, 3 * C),  # in generation: keys and values of earlier tokens
        "att_lse": (until_3, B, T, NH),  # log of the softmax's sum: of T * T numbers, T are stored
        "atty": (until_3, B, T, C), "attproj": (until_1, B, T, C), "residual2": (until_3, B, T, C),
        "ln2": (until_2, B, T, C), "ln2_mean": (until_3, B, T), "ln2_rstd": (until_3, B, T),
        "fch": (until_3, B, T, 4 * C), "fch_gelu": (until_1, B, T, 4 * C),
        "fcproj": (until_1, B, T, C), "residual3": (until_4, B, T, C),
        "lnf": (B, T, C), "lnf_mean": (B, T), "lnf_rstd": (B, T),
        "logits": (1, min(B * T, LOGITS_ROWS), V),   # a piece; then its probabilities; then its gradient; see classifier
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
    """Layer l's own views, as attributes: layer(params, 3).qkvw is params["qkvw"][3]. A tensor that all layers share
    has a leading dimension of 1, hence the modulo. rows, for activations: an index into (B, T), as np.s_[:1, 5:6] makes it."""
    return SimpleNamespace(**{n: view[l % len(view)][rows] for n, view in views.items() if n not in NOT_PER_LAYER})

def init_weights(params, seed):
    """As for GPT-2 (Radford et al., 2019): normal, standard deviation 0.02, but the projections into the residual stream
    divided by sqrt(2L), because 2L of them add up there; layernorm weights 1; biases stay 0, as they are in a new blob."""
    rng, L = np.random.default_rng(seed), len(params["qkvw"])
    for name, view in params.items():
        if name in ("ln1w", "ln2w", "lnfw"):
            view[...] = 1
        elif not name.endswith("b"):
            rng.standard_normal(out=view.reshape(-1), dtype=view.dtype)
            view *= 0.02 / math.sqrt(2 * L) if name in ("attprojw", "fcprojw") else 0.02

# ---- 4. Rows and threads: the only parallel machinery --------------------------------------------------------------
# Big matrix products are BLAS's business, and it has its own threads. All the rest works on rows, the channels of one token.
# We cut the rows into blocks that stay in a core's cache from the first operation to the last (NumPy makes one pass over
# memory per operation: slow in RAM, fast in cache), and spread the blocks over threads, which really run side by side, since
# NumPy lets go of the interpreter lock while it computes. The two kinds of threads never run on top of each other: see
# parallel. Of the widest array, a block has BLOCK_BYTES. Smaller, and the threads fight over the interpreter lock; larger, and
# it leaves the cache. It never depends on the number of threads: same blocks, same sums, same bits.
BLOCK_BYTES = 512 * 1024
CPUS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
THREADS = os.environ.get("OPENBLAS_NUM_THREADS") or os.environ.get("OMP_NUM_THREADS") or str(CPUS)
ROW_THREADS = BLAS_THREADS = int(THREADS.split(",")[0])  # "4,2" is OpenMP's way to speak of nested threads
POOL = ThreadPoolExecutor(max_workers=64)  # starts a thread only when it needs one

def find_blas_threads_setter():
    """The function of NumPy's own OpenBLAS that sets its number of threads, or one that does nothing."""
    here = os.path.dirname(np.__file__)
    for path in glob.glob(here + "/../numpy.libs/*openblas*") + glob.glob(here + "/.dylibs/*openblas*"):
        with contextlib.suppress(OSError, AttributeError):
            return ctypes.CDLL(path).scipy_openblas_set_num_threads64_
    return lambda n: None

set_blas_threads = find_blas_threads_setter()
with contextlib.suppress(AttributeError, OSError, TypeError):  # glibc: M_MMAP_THRESHOLD and M_TRIM_THRESHOLD, so that freed
    ctypes.CDLL(None).mallopt(-3, 32 << 20), ctypes.CDLL(None).mallopt(-1, 1 << 30)  # temporaries keep their pages

def parallel(task, n):
    """[task(0), ..., task(n - 1)], computed by ROW_THREADS threads while BLAS is held to one thread."""
    results, todo = [None] * n, iter(range(n))
    def work():
        for i in todo:  # whoever is free takes the next
            results[i] = task(i)
    set_blas_threads(1)
    helpers = [POOL.submit(work) for _ in range(min(ROW_THREADS, n) - 1)]
    work()
    for helper in helpers:
        helper.result()
    set_blas_threads(BLAS_THREADS)
    return results

def by_rows(count):
    """Decorator: run a layer on blocks of rows, in parallel. The first `count` arguments hold something for every token,
    shape (B, T, ...); the body sees a block of them as (rows, ...). The others it sees whole. If it returns arrays (sums
    over its rows), they are added up in the order of the blocks."""
    def decorate(body):
        @functools.wraps(body)
        def run(*args):
            rows = [a.reshape(-1, *a.shape[2:], copy=False) for a in args[:count]]  # never a copy
            step = max(1, BLOCK_BYTES // max(a[0].nbytes for a in rows))
            n = -(-len(rows[0]) // step)  # rounded up
            sums = parallel(lambda i: body(*(a[i * step:(i + 1) * step] for a in rows), *args[count:]), n)
            return None if sums[0] is None else [functools.reduce(np.add, parts) for parts in zip(*sums)]
        return run
    return decorate

# ---- 5. Layers, each forward followed by its backward --------------------------------------------------------------
# A backward function receives dout, the gradient of the loss with respect to its forward's output, and
# applies the chain rule. A derivation quotes the forward line it differentiates.

def encoder_forward(out, inp, wte, wpe):
    """out (B, T, C): a token's embedding plus its position's. inp (B, T) integers, wte (V, C), wpe (T, C)."""
    np.take(wte, inp, axis=0, out=out, mode="clip")  # the ids were checked; "raise" would buffer a copy
    out += wpe

def encoder_backward(dwte, dwpe, dout, inp, add):
    """out[b, t] = wte[inp[b, t]] + wpe[t]: each row of dout goes to one row of dwte and one of dwpe. dwte is always added
    to, even by the first micro-batch: the classifier (section 6) has written its part before."""
    for token, row in zip(inp.flat, dout.reshape(-1, dout.shape[-1])):
        dwte[token] += row
    accumulate(dwpe[:dout.shape[1]], dout.sum(axis=0), add)
    if not add:
        dwpe[dout.shape[1]:] = 0  # positions beyond T took no part

def accumulate(grad, value, add):
    """grad = value, or, for parameters from a step's second micro-batch on, grad += value."""
    np.add(grad, value, out=grad) if add else np.copyto(grad, value)

LN_EPS = 1e-5  # keeps the division by the standard deviation finite; OpenAI's value
@by_rows(4)
def layernorm_forward(out, mean, rstd, inp, weight, bias):
    """Give each token's channels mean 0 and variance 1, then scale and shift (Ba et al., 2016).
    out, inp (B, T, C); mean, rstd (B, T), kept for backward; weight, bias (C,).
        out = (inp - mean) * rstd * weight + bias,    rstd = 1 / sqrt(var + eps)"""
    np.divide(np.einsum("ij->i", inp), inp.shape[-1], out=mean)  # einsum sums rows three times as fast as inp.sum(axis=-1)
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
        dinp = (dnorm - average(dnorm) - norm * average(dnorm * norm)) * rstd"""
    norm = inp - mean[:, None]
    norm *= rstd[:, None]
    dweight, dbias = np.einsum("ij,ij->j", dout, norm), np.einsum("ij->j", dout)
    dnorm = dout * weight
    along = np.einsum("ij,ij->i", dnorm, norm) / inp.shape[-1]
    dnorm -= (np.einsum("ij->i", dnorm) / inp.shape[-1])[:, None]
    norm *= along[:, None]
    dnorm -= norm
    dnorm *= rstd[:, None]
    dinp += dnorm
    return dweight, dbias

def rows_of(x):
    """(B, T, C) seen as (B*T, C): one large matrix product is faster than B small ones."""
    return x.reshape(-1, x.shape[-1], copy=False)

def matmul_forward(out, inp, weight, bias=None):
    """out (B, T, OC) = inp (B, T, C) @ weight.T + bias; weight (OC, C), C being whatever inp has. Most time is spent here.
    weight.T is a view with its strides exchanged, which BLAS reads as it is: nothing is copied."""
    np.matmul(rows_of(inp), weight.T, out=rows_of(out))
    if bias is not None:
        out += bias

def matmul_backward(dinp, dweight, dbias, dout, inp, weight, add):
    """out[n, o] = sum over c of inp[n, c] * weight[o, c] + bias[o]. So
        dinp[n, c]    = sum over o of dout[n, o] * weight[o, c]     dinp    = dout @ weight
        dweight[o, c] = sum over n of dout[n, o] * inp[n, c]        dweight = dout.T @ inp
        dbias[o]      = sum over n of dout[n, o]                    dbias   = ones @ dout"""
    dout, inp = rows_of(dout), rows_of(inp)
    np.matmul(dout, weight, out=rows_of(dinp))
    if not add:
        np.matmul(dout.T, inp, out=dweight)
    else:  # NumPy can't make BLAS add, so we do it, block by block, while the product is in cache
        step = max(1, 2 * BLOCK_BYTES // inp[0].nbytes)
        def block(i):
            dweight[i * step:(i + 1) * step] += dout[:, i * step:(i + 1) * step].T @ inp
        parallel(block, -(-len(weight) // step))
    if dbias is not None:
        accumulate(dbias, np.ones(len(dout), dout.dtype) @ dout, add)

ATT_ROWS = 128  # attention goes by blocks of this many positions
FUTURE = np.triu(np.full((ATT_ROWS, ATT_ROWS), -np.inf, np.float32), k=1)  # -inf where key t2 > query t
def heads(x, NH, parts=1):
    """(B, T, parts * C) seen as (parts, B, NH, T, hs): every head has hs neighbouring channels for its own."""
    B, T, width = x.shape
    return x.reshape(B, T, parts, NH, width // parts // NH, copy=False).transpose(2, 0, 3, 1, 4)

def head_groups(x, NH, n):
    """Attention's work for n queries of x (B, T, ...), in pieces: (b, slice of heads) pairs, each an index into what heads()
    returns. A piece has as many heads as fit in cache with their scores for one block of queries, (heads, ATT_ROWS, T)."""
    B, T = x.shape[:2]
    step = max(1, 2 * BLOCK_BYTES // (min(ATT_ROWS, n) * T * x.itemsize))
    return [(b, slice(h, h + step)) for b in range(B) for h in range(0, NH, step)]

def attention_forward(out, lse, qkv, NH):
    """Each position looks at itself and those before it: the only layer that mixes information across time.
    qkv (B, T, 3C): queries, keys, values. out (B, n, C) and lse (B, n, NH) are for the last n of the T
    positions: all in training, one for each new token in generation. For each head
        att[t, t2] = q[t] . k[t2] / sqrt(hs)    for t2 <= t, otherwise -inf
        p[t, :]    = softmax(att[t, :])         (Vaswani et al., 2017)
        out[t]     = sum over t2 of p[t, t2] * v[t2]
    A block of queries sees only the keys up to its own end, which saves nearly half of the work when T is long. p is
    never stored: lse = log(sum(exp(att))) is enough to compute it again (Dao et al., 2022)."""
    B, T, C3 = qkv.shape
    n, scale, groups = out.shape[1], (C3 // 3 // NH) ** -0.5, head_groups(qkv, NH, out.shape[1])
    (q, k, v), (out,), lse = heads(qkv, NH, 3), heads(out, NH), lse.transpose(0, 2, 1)[..., None]
    def block(i):
        at = groups[i]
        q_, k_, v_ = q[at][:, T - n:] * scale, k[at], v[at]
        if n > 1:  # they are read more than once: worth bringing their numbers together
            k_, v_ = np.ascontiguousarray(k_), np.ascontiguousarray(v_)
        for n0 in range(0, n, ATT_ROWS):
            n1 = min(n0 + ATT_ROWS, n)
            t0, t1 = T - n + n0, T - n + n1
            att = q_[:, n0:n1] @ k_[:, :t1].swapaxes(-1, -2)               # (heads, t1 - t0, t1)
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
    The softmax: p[i] = exp(att[i]) / sum(exp(att)) changes by p[i] * ((i == j) - p[j]) per change of att[j], and
    summing that times dp[i] over i gives the line for datt. The sum of p * dp is that of dout * out, as out = p @ v: hs
    products per row instead of T."""
    B, T, C = out.shape
    scale, groups = (C // NH) ** -0.5, head_groups(qkv, NH, T)
    (q, k, v), (dq, dk, dv) = heads(qkv, NH, 3), heads(dqkv, NH, 3)
    (out,), (dout,), lse = heads(out, NH), heads(dout, NH), lse.transpose(0, 2, 1)[..., None]
    def block(i):
        at = groups[i]
        q_, k_, v_, dout_ = q[at] * scale, *(np.ascontiguousarray(x[at]) for x in (k, v, dout))
        lse_, row_sum, dq_ = lse[at], np.einsum("htc,htc->ht", dout_, out[at])[..., None], np.zeros_like(q_)
        for t0 in range(0, T, ATT_ROWS):
            t1 = min(t0 + ATT_ROWS, T)
            keys, queries = np.s_[:, t0:t1], np.s_[:, t0:]
            p = q_[queries] @ k_[keys].swapaxes(-1, -2)                    # att: (heads, T - t0, t1 - t0)
            p -= lse_[queries]
            p[:, :t1 - t0] += FUTURE[:t1 - t0, :t1 - t0]
            np.exp(p, out=p)                                               # p, as in the forward pass
            np.matmul(p.swapaxes(-1, -2), dout_[queries], out=dv[at][keys])
            datt = dout_[queries] @ v_[keys].swapaxes(-1, -2)              # dp
            datt -= row_sum[queries]
            datt *= p
            np.matmul(datt.swapaxes(-1, -2), q_[queries], out=dk[at][keys])  # q_ is scaled already
            dq_[queries] += datt @ k_[keys]
        np.multiply(dq_, scale, out=dq[at])
    parallel(block, len(groups))

GELU_SCALE = math.sqrt(2 / math.pi)  # gives 0.5 * (1 + tanh) the slope at 0 of the cumulative normal it imitates
GELU_CUBE = 0.044715                 # fitted by Hendrycks & Gimpel (2016), and what GPT-2 was trained with
@by_rows(2)
def gelu_forward(out, inp):
    """A smooth gate, on each number x: out = 0.5 * x * (1 + tanh(u)), u = s * (x + 0.044715 * x^3), s = GELU_SCALE."""
    np.multiply(inp, inp, out=out)      # x^2
    out *= GELU_SCALE * GELU_CUBE
    out += GELU_SCALE
    out *= inp                          # u
    np.tanh(out, out=out)
    out += 1
    out *= inp
    out *= 0.5

@by_rows(2)
def gelu_backward(dout, inp):
    """dout becomes dinp, in place. With s and u as in gelu_forward and th = tanh(u), whose derivative is 1 - th^2:
        out  = 0.5 * x * (1 + th)
        dinp = dout * 0.5 * (1 + th + x * (1 - th^2) * s * (1 + 3 * 0.044715 * x^2))
             = dout * 0.5 * (1 + th) * (1 + (1 - th) * x * s * (1 + 3 * 0.044715 * x^2))"""
    square = inp * inp
    th = square * (GELU_SCALE * GELU_CUBE)
    th += GELU_SCALE
    th *= inp
    np.tanh(th, out=th)
    square *= 3 * GELU_CUBE * GELU_SCALE
    square += GELU_SCALE
    square *= inp                       # x * s * (1 + 3 * 0.044715 * x^2): x times the derivative of u
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
    logits -= logits.max(axis=-1, keepdims=True)
    np.negative(logits[np.arange(len(targets)), targets], out=losses)
    probs = np.exp(logits, out=logits)
    total = np.einsum("nv->n", probs)
    losses += np.log(total)
    probs *= (1 / total)[:, None]

@by_rows(2)
def crossentropy_softmax_backward(probs, targets, dloss):
    """probs (B, T, V) become dlogits, in place. dloss: the weight of one token's loss, a number.
    loss = log(sum(exp(logits))) - logits[target], and the log's derivative is exp(logits) / sum(...), so
        dlogits = (probs - (1 at the target, 0 elsewhere)) * dloss"""
    dlogits = probs
    dlogits[np.arange(len(targets)), targets] -= 1
    dlogits *= dloss

# ---- 6. Model forward: a line or two per layer ---------------------------------------------------------------------
class GPT2:
    """A GPT-2 and all the memory it will ever use: params, grads, m, v, acts are dicts of named views of `blob`.
    config: GPT2Config; batch_size, sequence_length: the B and T of its batches; seed: of fresh weights, None
    leaves them zero, to be loaded; recompute: see act_shapes; dtype: float32, or float64 in tests."""
    def __init__(self, config, batch_size=4, sequence_length=64, seed=1337, recompute=1, dtype=np.float32):
        B, T, most = batch_size, sequence_length, config.max_seq_len
        require(B > 0 and 0 < T <= most, f"batch size {B}, sequence length {T}: at least 1, and the model's context is {most}")
        require(recompute in (0, 1, 2, 3, 4), f"recompute is {recompute!r}, expected 0 to 3 or, only to generate, 4")
        self.config, self.batch_size, self.sequence_length, self.recompute = config, B, T, recompute
        params, acts = param_shapes(config), act_shapes(config, B, T, recompute)
        n, line = size(params), 64 // np.dtype(dtype).itemsize  # a cache line has 64 bytes: start at one
        self.blob = np.zeros(4 * n + size(acts) + line, dtype)
        self.blob = self.blob[-self.blob.ctypes.data % 64 // self.blob.itemsize:][:4 * n + size(acts)]
        self.flat = self.blob[:4 * n].reshape(4, n)  # rows: parameters, gradients, m, v
        self.params, self.grads, self.m, self.v = (carve(part, params) for part in self.flat)
        self.acts, V = carve(self.blob[4 * n:], acts), config.vocab_size
        spare = self.flat[1, self.params["wte"].size:]  # all gradients but dwte: until backward() writes them, room for logits
        rows = min(B * T, len(spare) // V)
        self.rooms = spare[:rows * V].reshape(1, rows, V), self.acts["logits"]  # see classifier: the first is free at times only
        self.micro_batches = 0  # backward passes since the last update: the first one sets, later ones add
        self.pending = None     # the inputs of a forward pass whose backward pass is still to come
        if seed is not None:
            init_weights(self.params, seed)

    def forward_rows(self, tokens, first=0):
        """Compute every activation up to lnf for tokens (b, n) at positions first .. first+n-1; returns lnf (b, n, C).
        In training that is the whole batch. In generation b is 1, and the positions before `first` have left their keys and
        values in acts["qkv"] (not if recompute = 3, where layers share it), so that n new tokens cost n positions."""
        require(not self.micro_batches or self.pending is None, "the last forward pass waits for its backward() or zero_grad()")
        (b, n), params, acts, self.pending = tokens.shape, self.params, self.acts, None
        rows = np.s_[:b, first:first + n]
        residual = acts["encoded"][rows]
        encoder_forward(residual, tokens, params["wte"], params["wpe"][first:first + n])
        for l in range(self.config.num_layers):
            p, a = self.forward_layer(l, residual, rows)
            matmul_forward(a.fcproj, a.fch_gelu, p.fcprojw, p.fcprojb)
            residual_forward(a.residual3, a.residual2, a.fcproj)
            residual = a.residual3
        lnf = acts["lnf"][rows]
        layernorm_forward(lnf, acts["lnf_mean"][rows], acts["lnf_rstd"][rows], residual, params["lnfw"], params["lnfb"])
        return lnf

    def forward_layer(self, l, residual, rows):
        """Layer l from residual, its input, up to fch_gelu: all that backward needs of it. Returns its views (params, acts)."""
        p, a, NH = layer(self.params, l), layer(self.acts, l, rows), self.config.num_heads
        qkv = self.acts["qkv"][l % len(self.acts["qkv"])][rows[0], :rows[1].stop]  # attention looks back to position 0
        layernorm_forward(a.ln1, a.ln1_mean, a.ln1_rstd, residual, p.ln1w, p.ln1b)
        matmul_forward(a.qkv, a.ln1, p.qkvw, p.qkvb)
        attention_forward(a.atty, a.att_lse, qkv, NH)
        matmul_forward(a.attproj, a.atty, p.attprojw, p.attprojb)
        residual_forward(a.residual2, residual, a.attproj)
        layernorm_forward(a.ln2, a.ln2_mean, a.ln2_rstd, a.residual2, p.ln2w, p.ln2b)
        matmul_forward(a.fch, a.ln2, p.fcw, p.fcb)
        gelu_forward(a.fch_gelu, a.fch)
        return p, a

    def check_tokens(self, tokens, what):
        """tokens as an integer array; InputError if it isn't one, or if an id is outside the vocabulary."""
        tokens, V = np.asarray(tokens), self.config.vocab_size
        require(tokens.size and tokens.dtype.kind in "iu", f"{what}: expected integers, found {tokens.size} of {tokens.dtype}")
        require(0 <= tokens.min() and tokens.max() < V, f"{what}: ids {tokens.min()} to {tokens.max()}, expected 0 to {V - 1}")
        return tokens

    def forward(self, inputs, targets, train=True, grad_scale=1.0):
        """The mean cross-entropy, in nats, of predicting targets (B, T) from inputs (B, T): a float. With train, the
        classifier's backward pass runs at once (see there), and backward() is to follow; the gradients will be
        those of loss * grad_scale, 1/k where k micro-batches make a step. dwte's part is written (later: added to) right here."""
        inputs, targets = self.check_tokens(inputs, "inputs"), self.check_tokens(targets, "targets")
        require(inputs.shape == targets.shape == self.acts["losses"].shape,
                f"inputs {inputs.shape}, targets {targets.shape}: expected {self.acts['losses'].shape}")
        self.forward_rows(inputs)
        self.classifier(targets, grad_scale / targets.size if train else None)
        self.pending = inputs.copy() if train else None
        return float(self.acts["losses"].mean())

    def classifier(self, targets, dloss=None):
        """acts["losses"] from acts["lnf"], and with dloss (see crossentropy_softmax_backward) also dlnf, which is left
        in acts["dln"], and the classifier's part of dwte. The logits would be the largest array of all, B*T*V. But
        rows are independent here, so we take a piece of them all the way: logits, probabilities, losses, gradients. The larger
        the piece, the faster: we take the larger of the two rooms, the first only while it is free (no gradients in it yet)."""
        acts, wte, room = self.acts, self.params["wte"], max(self.rooms[self.micro_batches > 0:], key=lambda room: room.shape[1])
        acts["logits"], step = room, room.shape[1]
        lnf, dlnf, losses, targets = (x.reshape(1, targets.size, *x.shape[2:])  # one row of tokens, to be cut anywhere
                                      for x in (acts["lnf"], acts["dln"], acts["losses"], targets))
        for start in range(0, targets.size, step):
            rows = np.s_[:, start:start + step]
            logits = room[:, :targets[rows].size]
            matmul_forward(logits, lnf[rows], wte)
            crossentropy_softmax_forward(losses[rows], logits, targets[rows])
            if dloss is not None:
                dlogits = logits  # which hold probabilities now, and their own gradient after this line
                crossentropy_softmax_backward(dlogits, targets[rows], dloss)
                matmul_backward(dlnf[rows], self.grads["wte"], None, dlogits, lnf[rows], wte, add=start or self.micro_batches)

    # ---- 7. Model backward: the same lines, reversed ---------------------------------------------------------------
    def backward(self):
        """Fill grads with the gradients of the last forward pass; the first since an update or zero_grad writes
        them, later ones add. From here on rooms[0] holds gradients."""
        require(self.pending is not None, "backward() needs a training forward pass before it: call forward()")
        require(self.recompute < 4, "recompute = 4 keeps nothing for a backward pass: use 0, 1, 2 or 3")
        params, grads, acts, NH = self.params, self.grads, self.acts, self.config.num_heads
        add, inputs = self.micro_batches > 0, self.pending
        dres, dln, dfch = acts["dresidual"], acts["dln"], acts["dfch"]
        dqkv = dfch.reshape(-1)[:3 * dres.size].reshape(*inputs.shape, -1)  # the first three quarters of dfch, used in turns
        def layernorm(dinp, dout, inp, mean, rstd, weight, *dparams):
            for dparam, total in zip(dparams, layernorm_backward(dinp, dout, inp, mean, rstd, weight)):
                accumulate(dparam, total, add)
        dres[...] = 0
        layernorm(dres, dln, acts["residual3"][-1], acts["lnf_mean"], acts["lnf_rstd"], params["lnfw"],
                  grads["lnfw"], grads["lnfb"])
        for l in reversed(range(self.config.num_layers)):
            p, g, a = layer(params, l), layer(grads, l), layer(acts, l)
            residual = acts["residual3"][l - 1] if l > 0 else acts["encoded"]
            if self.recompute == 3 and l < self.config.num_layers - 1:  # the last layer's are still there
                self.forward_layer(l, residual, np.s_[:, :inputs.shape[1]])
            if 1 <= self.recompute <= 2:
                gelu_forward(a.fch_gelu, a.fch)
            if self.recompute == 2:
                layernorm_forward(a.ln2, a.ln2_mean, a.ln2_rstd, a.residual2, p.ln2w, p.ln2b)
            # residual3 = residual2 + fcproj: dres is the gradient of both, and stays where it is
            matmul_backward(dfch, g.fcprojw, g.fcprojb, dres, a.fch_gelu, p.fcprojw, add)
            gelu_backward(dfch, a.fch)
            matmul_backward(dln, g.fcw, g.fcb, dfch, a.ln2, p.fcw, add)
            layernorm(dres, dln, a.residual2, a.ln2_mean, a.ln2_rstd, p.ln2w, g.ln2w, g.ln2b)
            # residual2 = residual + attproj: the same again
            if self.recompute == 2:
                layernorm_forward(a.ln1, a.ln1_mean, a.ln1_rstd, residual, p.ln1w, p.ln1b)
            matmul_backward(dln, g.attprojw, g.attprojb, dres, a.atty, p.attprojw, add)
            attention_backward(dqkv, dln, a.atty, a.att_lse, a.qkv, NH)
            matmul_backward(dln, g.qkvw, g.qkvb, dqkv, a.ln1, p.qkvw, add)
            layernorm(dres, dln, residual, a.ln1_mean, a.ln1_rstd, p.ln1w, g.ln1w, g.ln1b)
        encoder_backward(grads["wte"], grads["wpe"], dres, inputs, add)
        self.pending, self.micro_batches, acts["logits"] = None, self.micro_batches + 1, self.rooms[1]

    def zero_grad(self):
        """Forget the gradients. Nothing is cleared: the next forward pass puts logits in their place, backward() new gradients."""
        self.pending, self.micro_batches = None, 0

    # ---- 8. AdamW --------------------------------------------------------------------------------------------------
    def grad_norm(self):
        """The length of the gradient seen as one vector of all parameters: a float. Only between backward() and update()."""
        chunks = [self.flat[1, i:i + ADAMW_CHUNK] for i in range(0, self.flat.shape[1], ADAMW_CHUNK)]
        return math.sqrt(sum(parallel(lambda i: float(np.dot(chunks[i], chunks[i])), len(chunks))))

    def update(self, learning_rate, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, step=1, grad_scale=1.0):
        """One step of AdamW on all parameters; step counts from 1. grad_scale: what clipping multiplies
        the gradients by. Weight decay applies to matrices and embeddings, not to biases and layernorms."""
        require(self.micro_batches and self.pending is None, "update() needs gradients: call forward() and backward() before it")
        chunks = []
        for name in self.params:
            pgmv = [views[name].reshape(-1) for views in (self.params, self.grads, self.m, self.v)]
            decay = 0.0 if "ln" in name or name.endswith("b") else learning_rate * weight_decay
            chunks += [(*(x[i:i + ADAMW_CHUNK] for x in pgmv), decay) for i in range(0, pgmv[0].size, ADAMW_CHUNK)]
        parallel(lambda i: adamw(*chunks[i], learning_rate, beta1, beta2, eps, step, grad_scale), len(chunks))
        self.zero_grad()

ADAMW_CHUNK = 1 << 17  # elements: five arrays of 512 KiB. Smaller, and the threads fight over the lock
def adamw(p, g, m, v, decay, learning_rate, beta1, beta2, eps, step, grad_scale):
    """AdamW (Loshchilov & Hutter, 2017) on a chunk of parameters p, gradients g and moments m, v, in place.
        m = beta1 * m + (1 - beta1) * g         the gradient's running mean
        v = beta2 * v + (1 - beta2) * g^2       the running mean of its square
        p = p - decay * p - learning_rate * (m / c1) / (sqrt(v / c2) + eps)
    m and v start at 0; c1 = 1 - beta1^step and c2 = 1 - beta2^step make up for that. decay is learning_rate * weight_decay.
    c1, c2 are numbers: fraction times sqrt(c2) above and below, they move into eps and the learning rate: two passes fewer."""
    c1, c2 = 1 - beta1 ** step, 1 - beta2 ** step
    if grad_scale != 1.0:
        g *= grad_scale
    t = g - m  # m + (1 - beta1) * (g - m): the same, with one temporary
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

# ---- 9. Weights: reading them and writing them ---------------------------------------------------------------------
# safetensors, Hugging Face's format, is  8 bytes: n, little-endian
#     | n bytes of JSON: {name: {"dtype", "shape", "data_offsets": [begin, end]}, ...} | the tensors, without holes.
# llm.c's model file is  256 int32: 20240326, version, max_seq_len, vocab_size, num_layers, num_heads, channels,
#     padded_vocab_size | the 16 tensors in the order of param_shapes, in version 5 as bfloat16, otherwise float32; wte
#     is followed by rows of zeros up to padded_vocab_size, a multiple of 128 (not in version 1).
# Nothing is believed before it is checked, and a file becomes real in one moment or not at all.

HF_NAMES = {"wte": "wte.weight", "wpe": "wpe.weight", "ln1w": "h.{}.ln_1.weight", "ln1b": "h.{}.ln_1.bias",
            "qkvw": "h.{}.attn.c_attn.weight", "qkvb": "h.{}.attn.c_attn.bias", "attprojw": "h.{}.attn.c_proj.weight",
            "attprojb": "h.{}.attn.c_proj.bias", "ln2w": "h.{}.ln_2.weight", "ln2b": "h.{}.ln_2.bias",
            "fcw": "h.{}.mlp.c_fc.weight", "fcb": "h.{}.mlp.c_fc.bias", "fcprojw": "h.{}.mlp.c_proj.weight",
            "fcprojb": "h.{}.mlp.c_proj.bias", "lnfw": "ln_f.weight", "lnfb": "ln_f.bias"}
HF_TRANSPOSED = {"qkvw", "attprojw", "fcw", "fcprojw"}  # Hugging Face keeps these as (C_in, C_out)
ITEM_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F16": 2, "BF16": 2, "I16": 2, "F32": 4, "I32": 4, "F64": 8, "I64": 8}
FLOATS = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}  # bfloat16 is the upper half of a float32
MAX_HEADER = 1 << 20                                  # bytes of JSON; GPT-2 XL's header has 70 KB

@contextlib.contextmanager
def atomic_write(path):
    """A binary file to write to, which takes the place of `path` only when it is whole and on the disk."""
    temporary = f"{path}.tmp"  # always the same, so that what a killed run left is taken up by the next
    try:
        with open(temporary, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
            require(os.path.getsize(temporary) == f.tell(), f"{path}: not all of it reached the disk: nothing was replaced")
        os.replace(temporary, path)
        sync_folder(os.path.dirname(path))
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)

def sync_folder(folder):
    """Make a rename in a folder survive a power cut, where the system can (Windows opens no folders)."""
    with contextlib.suppress(OSError):
        handle = os.open(folder or ".", os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)

def read_json(path, text=None):
    """The JSON object in a small file, or in bytes `text` that stood in it: a dict."""
    try:
        text = text or np.fromfile(path, np.uint8, min(os.path.getsize(path), MAX_HEADER)).tobytes()
        value = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: expected JSON: {error}") from None
    require(isinstance(value, dict), f"{path}: expected a JSON object, found {type(value).__name__}")
    return value

def read_safetensors(path):
    """The header of a .safetensors file, checked: {name: (path, offset, dtype, shape)} and its metadata."""
    total = os.path.getsize(path)
    with open(path, "rb") as f:
        n = int.from_bytes(f.read(8), "little")
        require(8 <= total >= n + 8 and n <= MAX_HEADER, f"{path}: no .safetensors file: {total} bytes, a header of {n}")
        header = read_json(path, f.read(n))
    metadata, tensors, end = header.pop("__metadata__", {}), {}, 0
    require(isinstance(metadata, dict), f"{path}: __metadata__ is no JSON object")
    def sizes(x):
        return isinstance(x, list) and len(x) < 9 and all(type(i) is int and 0 <= i < 1 << 48 for i in x)
    for name, t in header.items():
        require(isinstance(t, dict) and sizes(t.get("shape")) and sizes(t.get("data_offsets")), f"{path}: tensor {name!r}: "
                f"expected dtype, shape and data_offsets, found {t!r:.99}")
        require(t.get("dtype") in list(ITEM_BYTES), f"{path}: tensor {name!r} has the unknown dtype {t.get('dtype')!r}")
    for name, t in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = end, end + math.prod(t["shape"]) * ITEM_BYTES[t["dtype"]]
        require(t["data_offsets"] == [begin, end], f"{path}: tensor {name!r}, {t['dtype']} {t['shape']}, lies at "
                f"{t['data_offsets']}, expected {[begin, end]}")
        tensors[name] = (path, 8 + n + begin, t["dtype"], tuple(t["shape"]))
    require(8 + n + end == total, f"{path}: has {total} bytes, its header describes {8 + n + end}: fetch it again")
    return tensors, metadata

def write_safetensors(path, tensors, metadata):
    """tensors {name: float32 array}, metadata {str: str}. A transposed view is copied, one at a time."""
    header, end = {"__metadata__": metadata}, 0
    for name, array in tensors.items():
        header[name] = {"dtype": "F32", "shape": array.shape, "data_offsets": [end, end + 4 * array.size]}
        end += 4 * array.size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with atomic_write(path) as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for array in tensors.values():
            f.write(np.ascontiguousarray(array, "<f4"))

def read_tensor(out, tensor, name):
    """Read a tensor (path, offset, dtype, shape) into the view out, in pieces: there is never a second copy."""
    path, offset, dtype, shape = tensor
    step = max(1, (1 << 20) // max(1, math.prod(shape[1:])))
    with open(path, "rb") as f:
        f.seek(offset)
        for i in range(0, len(out), step):
            piece = np.fromfile(f, FLOATS[dtype], out[i:i + step].size)
            require(piece.size == out[i:i + step].size, f"{path}: ends in the middle of {name}")
            if dtype == "BF16":
                piece = (piece.astype("<u4") << 16).view("<f4")
            require(np.isfinite(piece).all(), f"{path}: {name} holds a value that is not finite")
            out[i:i + step] = piece.reshape(out[i:i + step].shape)

def model_tensors(config):
    """(name, l, shape) of every tensor that a file holds, in order; params[name][l] is its view, with l = ... for all of it."""
    for name, shape in param_shapes(config).items():
        for l in [...] if name in NOT_PER_LAYER else range(config.num_layers):
            yield name, l, shape if l is ... else shape[1:]

def open_huggingface(source):
    """The same as open_weights, of a folder, a .safetensors file, or the index of one in several parts."""
    if folder := os.path.isdir(source):
        source = os.path.join(source, "model.safetensors")
        source += "" if os.path.exists(source) else ".index.json"
    told, description = {}, os.path.join(os.path.dirname(source), "config.json")
    if folder or os.path.basename(source).startswith("model.safetensors") and os.path.exists(description):
        told = read_json(description)  # it alone says how many heads there are
    files, found = [source], {}
    if source.endswith(".json"):  # several files, and an index that tells which tensor is where
        parts = read_json(source).get("weight_map")
        require(isinstance(parts, dict) and all(isinstance(p, str) and p == os.path.basename(p) and p.isprintable()
                and p.endswith(".safetensors") for p in parts.values()), f"{source}: expected a weight_map to files beside it")
        files = [os.path.join(os.path.dirname(source), part) for part in sorted(set(parts.values()))]
    for file in files:
        for name, tensor in read_safetensors(file)[0].items():
            name = name.removeprefix("transformer.")
            require(name not in found, f"{source}: tensor {name!r} is there twice")
            if not name.endswith((".attn.bias", ".attn.masked_bias")):  # the causal mask, no parameter
                found[name] = tensor
    def shape(name):
        return found[name][3] if name in found else ()
    require(len(shape("wte.weight")) == len(shape("wpe.weight")) == 2, f"{source}: expected GPT-2's matrices wte.weight "
            f"and wpe.weight, found shapes {shape('wte.weight')} and {shape('wpe.weight')}")
    (V, C), maxT, L = shape("wte.weight"), shape("wpe.weight")[0], sum(n.endswith(".ln_1.weight") for n in found)
    NH = told.get("n_head", C // 64 if C % 64 == 0 else None)
    for key, value in {"model_type": "gpt2", "vocab_size": V, "n_positions": maxT, "n_embd": C, "n_layer": L, "n_inner": 4 * C,
                       "activation_function": "gelu_new", "layer_norm_epsilon": LN_EPS, "tie_word_embeddings": True,
                       "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}.items():
        require(told.get(key) in (None, value), f"{source}: its config.json says {key} = {told.get(key)!r}, expected {value!r}")
    require(type(NH) is int, f"{source}: how many heads? {C} channels are no multiple of 64, and no config.json says n_head")
    config, tensors, head = GPT2Config(maxT, V, L, NH, C), {}, found.pop("lm_head.weight", None)
    for name, l, want in model_tensors(config):
        key, want = HF_NAMES[name].format(l), want[::-1] if name in HF_TRANSPOSED else want
        require(shape(key) == want, f"{source}: tensor {key!r}: expected shape {want}, found {shape(key) or 'none'}")
        require(found[key][2] in FLOATS, f"{source}: tensor {key!r} is {found[key][2]}, expected {', '.join(FLOATS)}")
        tensors[name, l] = found.pop(key)
    require(not found, f"{source}: tensor {next(iter(found), '')!r} is no part of a GPT-2")
    if head is not None:
        one, two = (np.memmap(t[0], np.uint8, "r", t[1], math.prod(t[3]) * ITEM_BYTES[t[2]]) for t in (head, tensors["wte", ...]))
        require(np.array_equal(one, two), f"{source}: lm_head.weight differs from wte.weight; in GPT-2 they are the same")
    return config, tensors

def open_llmc(path):
    """The same as open_weights, of an llm.c model file."""
    magic, version, maxT, V, L, NH, C, padded = [*np.fromfile(path, "<i4", 8).tolist(), *[0] * 8][:8]
    require(magic == 20240326, f"{path}: no llm.c model: it begins with {magic}, expected 20240326")
    require(version in (1, 3, 5), f"{path}: version {version}, expected 1 or 3 (float32) or 5 (bfloat16)")
    config, tensors, offset, dtype = GPT2Config(maxT, V, L, NH, C), {}, 1024, "BF16" if version == 5 else "F32"
    padding = padded - V if version > 1 else 0
    need = offset + (size(param_shapes(config)) + padding * C) * ITEM_BYTES[dtype]
    require(padding >= 0, f"{path}: padded vocabulary of {padded} for {V} tokens: no model's header")
    require(os.path.getsize(path) == need, f"{path}: has {os.path.getsize(path)} bytes, its header describes {need}")
    for name, l, shape in model_tensors(config):
        tensors[name, l] = (path, offset, dtype, shape)
        offset += (math.prod(shape) + (padding * C if name == "wte" else 0)) * ITEM_BYTES[dtype]
    return config, tensors

def open_weights(source):
    """(config, {(name, l): tensor}) of one of OpenAI's four names, a folder, a .safetensors or an llm.c .bin file."""
    if source in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl") and not os.path.exists(source):
        import prepro_tinyshakespeare
        source = prepro_tinyshakespeare.fetch_weights(source)
    require(os.path.exists(source), f"--model {source!r}: no such file, nor gpt2[-medium, -large, -xl], {', '.join(FRESH)}")
    return open_llmc(source) if source.endswith(".bin") else open_huggingface(source)

def load_weights(model, tensors):
    """Read what open_weights found into its place in the blob; returns the model."""
    for (name, l), tensor in tensors.items():
        view, transposed = model.params[name][l], name in HF_TRANSPOSED and not tensor[0].endswith(".bin")
        read_tensor(view.T if transposed else view, tensor, name if l is ... else f"{name} of layer {l}")
    return model

def from_pretrained(cls, source, batch_size=4, sequence_length=64, recompute=1):
    """A GPT2 with weights from outside; open_weights says what source may be. Errors: InputError, OSError."""
    config, tensors = open_weights(source)
    return load_weights(cls(config, batch_size, sequence_length, None, recompute), tensors)

def save_pretrained(model, folder):
    """config.json, generation_config.json and model.safetensors, as Hugging Face's GPT2LMHeadModel reads them."""
    c, ends = model.config, dict.fromkeys(["bos_token_id", "eos_token_id"], 50256 if model.config.vocab_size == 50257 else None)
    description = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "dtype": "float32", "vocab_size": c.vocab_size,
                   "n_positions": c.max_seq_len, "n_embd": c.channels, "n_layer": c.num_layers, "n_head": c.num_heads,
                   "activation_function": "gelu_new", "layer_norm_epsilon": LN_EPS, "tie_word_embeddings": True, **ends}
    os.makedirs(folder, exist_ok=True)
    for name, content in (("config.json", description), ("generation_config.json", ends)):
        with atomic_write(os.path.join(folder, name)) as f:
            f.write(json.dumps(content, indent=2).encode())
    tensors = {"transformer." + HF_NAMES[name].format(l): model.params[name][l].T if name in HF_TRANSPOSED else
               model.params[name][l] for name, l, _ in model_tensors(c)}
    write_safetensors(os.path.join(folder, "model.safetensors"), tensors, {"format": "pt"})

# ---- 10. Data: token files and batches -----------------------------------------------------------------------------
# llm.c's token file: 256 int32: 20240520, version 1, number of tokens | the tokens as uint16. They are mapped
# into memory, not read. A batch is the next B*T tokens, and its targets are the same, one token further.

def open_tokens(path, least):
    """The tokens of a file, as a memory map of uint16 with at least `least` elements."""
    header, nbytes = np.fromfile(path, "<i4", 256).tolist(), os.path.getsize(path)
    require(len(header) == 256 and header[0] == 20240520,
            f"{path}: no token file: magic number {header[:1]}, expected 20240520: write it with prepro_tinyshakespeare.py")
    require(header[1] == 1, f"{path}: token file of version {header[1]}, expected 1")
    require(nbytes == 1024 + 2 * header[2], f"{path}: has {nbytes} bytes, {header[2]} tokens make {1024 + 2 * header[2]}")
    require(header[2] >= least, f"{path}: has {header[2]} tokens, a batch needs B*T + 1 = {least}: use a smaller --batch_size")
    return np.memmap(path, "<u2", "r", 1024)

class DataLoader:
    """Batches in llm.c's order: shard after shard, over and over. source: a glob pattern of token files, or an array
    of token ids; position: [shard, offset in it]."""
    def __init__(self, source, B, T, vocab_size):
        self.B, self.T, self.top, files = B, T, vocab_size - 1, isinstance(source, str)
        self.names = sorted(glob.glob(source)) if files else ["the text"]
        require(self.names, f"{source}: no such token file: write one with python prepro_tinyshakespeare.py")
        self.shards = [open_tokens(path, B * T + 1) for path in self.names] if files else [source]
        self.sizes = [len(shard) for shard in self.shards]
        self.seek([0, 0])

    def seek(self, position):
        """Go to a position, and make sure that its shard holds no id beyond the vocabulary."""
        self.position, highest = list(position), self.shards[position[0]].max()
        require(highest <= self.top, f"{self.names[position[0]]}: holds token {highest}, the model's vocabulary ends at {self.top}")

    def next_batch(self):
        """inputs, targets (B, T), int64."""
        (shard, start), n = self.position, self.B * self.T
        tokens = np.array(self.shards[shard][start:start + n + 1], np.int64)
        self.position[1] += n
        if start + 2 * n + 1 > len(self.shards[shard]):
            self.seek([(shard + 1) % len(self.shards), 0])
        return tokens[:-1].reshape(self.B, self.T), tokens[1:].reshape(self.B, self.T)

# ---- 11. Sampling --------------------------------------------------------------------------------------------------
def generate(model, tokens, max_new_tokens, temperature=1.0, top_k=0, rng=None):
    """Continue a list of token ids: an iterator over max_new_tokens new ids, each as soon as it is known. temperature
    0 always takes the likeliest, top_k > 0 chooses among the k likeliest. Each token costs one position (see
    forward_rows), unless recompute = 3; when the context is full, its newer half becomes the beginning of a new one."""
    rng, T = rng or np.random.default_rng(0), model.sequence_length
    window, done = model.check_tokens(list(tokens), "prompt").tolist()[-T:], 0
    for _ in range(max_new_tokens):
        if len(window) > T:
            window, done = window[-max(1, T // 2):], 0
        lnf = model.forward_rows(np.array([window[done:]]), first=done)
        done, logits = len(window) * (model.recompute != 3), model.acts["logits"][:, :1]
        matmul_forward(logits, lnf[:, -1:], model.params["wte"])
        window.append(sample(logits[0, 0], temperature, top_k, rng))
        yield window[-1]

def sample(logits, temperature, top_k, rng):
    """One token id drawn from softmax(logits / temperature), logits (V,)."""
    if temperature < 1e-30:
        return int(logits.argmax())
    logits = (logits - logits.max()) / temperature
    if 0 < top_k < len(logits):
        logits[logits < np.partition(logits, -top_k)[-top_k]] = -np.inf
    cumulative = np.exp(logits, out=logits).cumsum()
    return int(min(np.searchsorted(cumulative, rng.random(dtype=np.float32) * cumulative[-1], "right"), len(logits) - 1))

GPT2.from_pretrained, GPT2.save_pretrained, GPT2.generate = classmethod(from_pretrained), save_pretrained, generate

# ---- 12. Training and the command line -----------------------------------------------------------------------------
FLAGS = {  # name: (default, meaning). The one place where defaults stand; they are those of llm.c's CPU trainer
    "model": ("gpt2", "gpt2[-medium, -large, -xl]; d6, d12, d24, d36, d48: fresh weights; or a folder, .safetensors or .bin"),
    "input_bin": ("data/tiny_shakespeare_train.bin", "training tokens: a path or a glob pattern"),
    "input_val_bin": ("data/tiny_shakespeare_val.bin", "validation tokens, likewise"),
    "output_dir": ("", "where weights, log and checkpoints go; nowhere if empty"),
    "batch_size": (4, "B, sequences per batch"),
    "sequence_length": (64, "T, tokens per sequence (when only generating: the model's whole context)"),
    "total_batch_size": (0, "tokens per update, a multiple of B*T; 0: B*T"), "num_iterations": (40, "updates"),
    "learning_rate": (1e-4, "its peak"), "warmup_iters": (0, "updates over which it rises to the peak"),
    "learning_rate_decay_frac": (1.0, "fraction of the peak to which a cosine takes it by the end"),
    "weight_decay": (0.0, "AdamW's, on matrices and embeddings"), "grad_clip": (0.0, "largest norm of the gradient; 0: any"),
    "val_loss_every": (10, "updates between validations; 0: none"), "val_max_steps": (5, "batches per validation"),
    "sample_every": (20, "updates between samples; 0: none"), "inference_only": (0, "1: continue --prompt and train nothing"),
    "overfit_single_batch": (0, "1: train on the first batch again and again"),
    "write_tensors": (0, "1: write what a port checks itself against, to --output_dir or data"),
    "recompute": (1, "0: store everything; 1: compute GELU again in backward; 2: layernorm too; 3: whole layers"),
    "checkpoint_every": (0, "updates between checkpoints in --output_dir; 0: only when stopped"),
    "resume": (0, "1: go on from the newest whole checkpoint in --output_dir"),
    "seed": (1337, "of fresh weights and of samples"), "prompt": ("", "text to continue; if empty, a new text begins"),
    "max_new_tokens": (64, "length of a sample, in tokens"), "top_k": (0, "sample among the k likeliest; 0: among all"),
    "temperature": (1.0, "of samples: below 1 bolder, above 1 wilder, 0 always the likeliest token"),
}
DEFAULTS = {name: default for name, (default, _) in FLAGS.items()}
MAY_CHANGE = {"num_iterations", "val_loss_every", "val_max_steps", "sample_every", "checkpoint_every", "resume",
              "output_dir", "max_new_tokens", "temperature", "top_k", "prompt"}     # when a run is resumed
FRESH = {"d6": 384, "d12": 768, "d24": 1024, "d36": 1280, "d48": 1600}  # dL: L layers, channels, heads of 64
EMBEDDED_CONFIG = GPT2Config(64, 256, 4, 4, 128)  # what trains where nothing can be fetched: a vocabulary of bytes,
EMBEDDED = {"model": "bytes", "input_bin": "", "batch_size": 8, "num_iterations": 1200, "learning_rate": 2e-3,  # a minute
            "warmup_iters": 50, "learning_rate_decay_frac": 0.05, "weight_decay": 0.1, "grad_clip": 1.0, "val_loss_every": 200,
            "val_max_steps": 30, "sample_every": 1200, "max_new_tokens": 400, "temperature": 0.7}

def parse(argv):
    """The flags that argv names: {flag: value}. Leaves with exit code 2 if they make no sense."""
    examples = "\n\n" + __doc__.split("\n\n")[2]
    parser = argparse.ArgumentParser(usage=examples, argument_default=argparse.SUPPRESS, allow_abbrev=False)
    for name, (default, text) in FLAGS.items():
        def value(text, kind=type(default), low=int(name in ("batch_size", "sequence_length", "val_max_steps"))):
            if kind is not str and not low <= kind(text) < 1 << 63:
                raise ValueError
            return kind(text)
        value.__name__ = {int: "whole number", float: "number", str: "text"}[type(default)]
        parser.add_argument(f"--{name}", type=value, metavar="X", help=f"{text} (default: {default!r})")
    return vars(parser.parse_args(argv))

def available_memory():
    """Bytes this process may still take of the machine, its container and its own limit; inf if nothing tells."""
    free = [math.inf]
    with contextlib.suppress(OSError, IndexError):  # MemAvailable, in KiB
        free.append(1024 * int(open("/proc/meminfo").read().split("MemAvailable:")[1].split()[0]))
    with contextlib.suppress(OSError, ValueError):  # "max", where the container sets no limit
        free.append(int(open("/sys/fs/cgroup/memory.max").read()) - int(open("/sys/fs/cgroup/memory.current").read()))
    with contextlib.suppress(ImportError):          # not on Windows
        import resource
        free.append(resource.getrlimit(resource.RLIMIT_AS)[0] % (1 << 64))  # -1 means no limit
    return min(free)

def make_model(s, config):
    """Print the memory plan, refuse it if the machine plainly has not got that much, else allocate the model."""
    n, most = 4 * size(param_shapes(config)), config.max_seq_len  # bytes, tokens
    require(s.sequence_length <= most, f"the model's context is {most}: use --sequence_length {most} or less")
    plan = {"parameters": n} if s.inference_only else {"parameters": n, "gradients": n, "moments": 2 * n}
    def total(B):
        plan["activations"] = 4 * size(act_shapes(config, B, s.sequence_length, s.recompute))
        return sum(plan.values())
    free = available_memory()
    fits, need = bisect.bisect(range(1, s.batch_size + 1), free, key=total), total(s.batch_size)
    say(f"model: {n // 4:,} parameters: " + ", ".join(f"{k} {v}" for k, v in asdict(config).items()))
    say("memory: " + ", ".join(f"{k} {v / 1e6:.0f}" for k, v in plan.items()) + f", in all {need / 1e6:.0f} MB")
    if fits < s.batch_size:  # no InputError: it is nobody's fault, and no damage of a checkpoint
        raise MemoryError(f"B={s.batch_size}, T={s.sequence_length} needs {need / 1e6:.0f} MB, the machine has {free / 1e6:.0f}: "
                          "use " + (f"--batch_size {fits}" if fits else "a smaller --model or --sequence_length"))
    return GPT2(config, s.batch_size, s.sequence_length, None, s.recompute)

def learning_rate(step, s):
    """Of the update that follows `step` others: a rise to the peak, then half a cosine down."""
    if step < s.warmup_iters:
        return s.learning_rate * (step + 1) / s.warmup_iters
    done, low = (step - s.warmup_iters) / (s.num_iterations - s.warmup_iters), s.learning_rate * s.learning_rate_decay_frac
    return low + (s.learning_rate - low) * 0.5 * (1 + math.cos(math.pi * done))

def check_finite(value, what, model, step):
    """InputError if a loss or a norm is NaN or infinite, naming the tensor where that began, in the order of computation."""
    if not math.isfinite(value):
        tables, names = (model.params, model.acts) if what == "loss" else (model.grads,), [*model.params, *model.acts]
        order = [(n, l) for l in range(model.config.num_layers) for n in names if n not in NOT_PER_LAYER]
        first, last = ("wte", "wpe", "encoded"), model.config.num_layers - 1
        order = [(n, None) for n in first] + order + [(n, None) for n in names if n in NOT_PER_LAYER and n not in first]
        bad = (f"{name}{'' if l is None else f' of layer {l}'}" for name, l in (order if what == "loss" else reversed(order))
               for t in tables if name in t and (l in (None, last) or len(t[name]) > 1)  # shared: holds the last layer's
               and not np.isfinite(t[name] if l is None else t[name][l % len(t[name])]).all())
        raise InputError(f"update {step + 1}: the {what} is {value}; it began in {next(bad, 'the last sum')}. The last checkpoint "
                         "is as it was. Try a smaller --learning_rate, or --grad_clip 1")

def checkpoints(folder):
    """The checkpoints in a folder, newest first."""
    return sorted(glob.glob(os.path.join(glob.escape(folder), "checkpoint_" + "[0-9]" * 8)), reverse=True) if folder else []

def checksums(model, folder):
    """CRC-32s of parameters, m and v as they stand in the blob, and of a checkpoint's small files."""
    files = (np.fromfile(os.path.join(folder, n), np.uint8) for n in ("config.json", "generation_config.json", "main.log"))
    return [zlib.crc32(data) for data in (model.flat[0], model.flat[2], model.flat[3], *files)]

def save_checkpoint(model, folder, state):
    """DIR/checkpoint_STEP: what save_pretrained writes; main.log; and optimizer.safetensors: AdamW's m and v, each one row
    laid out like the parameters, and as metadata the state of the run, in JSON. The last two checkpoints are kept."""
    final, temporary = os.path.join(folder, f"checkpoint_{state['step']:08d}"), os.path.join(folder, "checkpoint.tmp")
    if final not in checkpoints(folder):
        shutil.rmtree(temporary, ignore_errors=True)
        model.save_pretrained(temporary)
        with atomic_write(os.path.join(temporary, "main.log")) as f:
            f.write("".join(f"{line}\n" for line in state["log"]).encode())
        text = json.dumps({**state, "log": None, "crc32": checksums(model, temporary)})
        write_safetensors(os.path.join(temporary, "optimizer.safetensors"), {"m": model.flat[2], "v": model.flat[3]},
                          {"state": text, "crc32": str(zlib.crc32(text.encode()))})
        os.replace(temporary, final)
        sync_folder(folder)
    for old in checkpoints(folder)[2:]:
        shutil.rmtree(old, ignore_errors=True)

def load_checkpoint(folder, given):
    """(settings, model, state) of a checkpoint, with what is given of MAY_CHANGE; InputError if a bit of it is wrong."""
    moments, metadata = read_safetensors(os.path.join(folder, "optimizer.safetensors"))
    text = str(metadata.get("state")).encode(errors="replace")
    require(str(zlib.crc32(text)) == metadata.get("crc32"), "its state does not match its checksum")
    state, (config, weights) = read_json(folder, text), open_huggingface(folder)
    state["log"] = np.fromfile(os.path.join(folder, "main.log"), np.uint8).tobytes().decode(errors="replace").splitlines()
    s = SimpleNamespace(**DEFAULTS | state["settings"] | {name: given[name] for name in MAY_CHANGE & given.keys()})
    model = load_weights(make_model(s, config), weights)
    for name, row in (("m", model.flat[2]), ("v", model.flat[3])):
        require(moments.get(name, " " * 4)[2:] == ("F32", row.shape), f"{name} is not as expected")
        read_tensor(row, moments[name], name)
    require(state["crc32"] == checksums(model, folder), "its data does not match its checksum")
    return s, model, state

def lock(folder):
    """Keep the folder to this process until it ends, however it ends. Returns a file that must stay open."""
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
        raise InputError(f"{folder}: another run is writing there: choose another --output_dir") from None

def picture(values, width=60):
    """A row of characters whose heights follow the values."""
    blocks = "▁▂▃▄▅▆▇█" if "utf" in (getattr(sys.stdout, "encoding", "") or "").lower() else "_.-=+*#@"
    means = np.array([group.mean() for group in np.array_split(values, min(width, len(values)))])
    return "".join(blocks[round(h)] for h in ((means - means.min()) / max(np.ptp(means), 1e-9) * 7).tolist())

def say(text, end="\n"):
    """Print at once; if nobody reads any more (Ctrl-C ends a `| tee` too), in vain. SIGPIPE has then told train() to stop."""
    with contextlib.suppress(BrokenPipeError):
        print(text, end=end, flush=True)

def speak(model, s, step):
    """Print a sample as it comes. Its random numbers depend on the seed and the step alone."""
    from prepro_tinyshakespeare import tokenizer
    encode, decode, start = tokenizer(model.config.vocab_size)
    rng, utf8 = np.random.default_rng([s.seed, step]), codecs.getincrementaldecoder("utf-8")("replace")
    say(s.prompt, end="")
    for token in model.generate(encode(s.prompt) or [start], s.max_new_tokens, s.temperature, s.top_k, rng):
        say(utf8.decode(decode(token)), end="")
    say(utf8.decode(b"", final=True))

def prepare(given):
    """From the flags given to (settings, model, loaders of training and of validation data, state to start from)."""
    import prepro_tinyshakespeare as prepro
    s, model, state = SimpleNamespace(**DEFAULTS | given), None, {"step": 0, "position": [0, 0], "evaluated": False, "log": []}
    old = checkpoints(s.output_dir)
    require(given.get("prompt") != "", "--prompt is empty: give it some text, or leave it out for one of the model's own")
    require(s.inference_only or s.resume or not old, f"{s.output_dir} holds a run's checkpoints: go on with --resume 1, or "
            "choose another --output_dir")
    for folder in old if s.resume else ():
        try:
            s, model, state = load_checkpoint(folder, given)
        except (InputError, OSError) as error:
            say(f"{folder} is damaged: {error}: taking the one before it")
            continue
        clash = [f"--{name} {given[name]!r} (it was {value!r})" for name, value in state["settings"].items()
                 if name not in MAY_CHANGE and given.get(name, value) != value]
        require(not clash, f"the run in {s.output_dir} can't go on with {', '.join(clash)}: leave that out, or start another")
        say(f"resuming from {folder}")
        for newer in old[:old.index(folder)]:  # out of the way of the whole one that will take its name
            shutil.rmtree(f"{newer}.damaged", ignore_errors=True)
            os.replace(newer, f"{newer}.damaged")
        break
    require(model or not (old and s.resume), f"no checkpoint in {s.output_dir} is whole: choose another --output_dir")
    if not model:
        say("no checkpoint to resume from: starting anew\n" * bool(s.resume), end="")
        try:
            if not s.inference_only and not {"input_bin", "input_val_bin"} & given.keys():
                s.input_bin, s.input_val_bin = prepro.prepare_tinyshakespeare()
            C = FRESH.get(s.model)
            config, weights = (GPT2Config(1024, 50257, int(s.model[1:]), C // 64, C), None) if C else open_weights(s.model)
        except (InputError, OSError) as error:
            if {"model", "input_bin", "input_val_bin", "inference_only", "write_tensors"} & given.keys():
                raise  # what was asked for by name is not replaced by something else
            say(f"{error}\n--> so a small GPT will learn from scratch, by bytes, what this project's own files look like")
            s, config, weights = SimpleNamespace(**DEFAULTS | EMBEDDED | given), EMBEDDED_CONFIG, None
        if s.inference_only:
            s.batch_size, s.sequence_length, s.recompute = 1, given.get("sequence_length", config.max_seq_len), 4
        model = make_model(s, config)
        load_weights(model, weights) if weights else init_weights(model.params, s.seed)
    if s.inference_only:
        return s, model, None, None, state
    sources = prepro.own_text() if s.model == EMBEDDED["model"] else (s.input_bin, s.input_val_bin)
    loader, val_loader = (DataLoader(source, s.batch_size, s.sequence_length, model.config.vocab_size) for source in sources)
    require(state.setdefault("tokens", loader.sizes) == loader.sizes, f"there are {loader.sizes} tokens of training data, there "
            f"were {state['tokens']} when this run began")
    loader.seek(state["position"])
    return s, model, loader, val_loader, state

def train(s, model, loader, val_loader, state, stopped):
    """Train, validate, sample, save. As soon as the list `stopped` holds something, the run ends, losing nothing."""
    step, evaluated, lines, tokens = state["step"], state["evaluated"], state["log"], s.batch_size * s.sequence_length
    k, rest = divmod(s.total_batch_size or tokens, tokens)  # micro-batches per update
    require(k and not rest, f"--total_batch_size {s.total_batch_size} is no multiple of B*T = {tokens}: try {max(1, k) * tokens}")
    began, start, log_path = time.perf_counter(), step, os.path.join(s.output_dir, "main.log")
    if s.output_dir:
        with atomic_write(log_path) as f:
            f.write("".join(f"{line}\n" for line in lines).encode())
    def log(kind, loss):
        lines.append(f"s:{step} {kind}:{loss:.4f}")
        if s.output_dir:
            with open(log_path, "a") as f:
                f.write(lines[-1] + "\n")
    while True:
        last, stop = step >= s.num_iterations, bool(stopped)  # asked once: it may become true at any moment
        if not evaluated and not stop:
            if s.val_loss_every and (last or step % s.val_loss_every == 0):
                val_loader.position = [0, 0]
                loss = sum(model.forward(*val_loader.next_batch(), train=False) for _ in range(s.val_max_steps)) / s.val_max_steps
                check_finite(loss, "loss", model, step)
                say(f"val loss {loss:.6f}")
                log("tel", loss)
            if s.sample_every and step and (last or step % s.sample_every == 0):
                say("--- sample")
                try:
                    speak(model, s, step)
                except InputError as error:  # no vocabulary: nothing trained is lost for want of a sample
                    say(f"none: {error}")
            evaluated = True
        if s.output_dir and (stop or s.checkpoint_every and (last or step % s.checkpoint_every == 0 and step > start)):
            state.update(step=step, position=loader.position, evaluated=evaluated, log=lines, settings=vars(s))
            save_checkpoint(model, s.output_dir, state)
        if last or stop:
            break
        t0, loss, lr = time.perf_counter(), 0.0, learning_rate(step, s)
        for _ in range(k):
            if s.overfit_single_batch:
                loader.position = [0, 0]
            loss += model.forward(*loader.next_batch(), grad_scale=1 / k) / k
            check_finite(loss, "loss", model, step)
            model.backward()
        norm = model.grad_norm()
        check_finite(norm, "gradient norm", model, step)
        step, evaluated, clip = step + 1, False, s.grad_clip or math.inf
        model.update(lr, weight_decay=s.weight_decay, step=step, grad_scale=clip / norm if norm > clip else 1.0)
        seconds = time.perf_counter() - t0
        say(f"step {step}/{s.num_iterations}: train loss {loss:.6f} (norm {norm:.4f}, lr {lr:.2e}, {seconds * 1e3:.0f} ms, "
              f"{k * tokens / seconds:.0f} tok/s)")
        log("trl", loss)
    seconds, summary = time.perf_counter() - began, [f"{step} updates"]
    for kind, name in (("trl", "train"), ("tel", "val")):
        losses = [float(line.split(":")[2]) for line in lines if f" {kind}:" in line]
        summary += [f"{name} loss {losses[0]:.4f} -> {losses[-1]:.4f} {picture(losses)}"] if losses else []
    summary += [f"{seconds:.1f} s", f"{(step - start) * k * tokens / seconds:.0f} tok/s"]
    if s.output_dir and not stop:
        model.save_pretrained(s.output_dir)
    if s.output_dir:
        summary += [f"go on with --output_dir {s.output_dir} --resume 1" if stop else f"saved in {s.output_dir}"]
    say("stopped: " * stop + ", ".join(summary))

def main(argv=None):
    """Run the command line. Returns the exit code: 0; 1 for what a one-line error explains; 130, 141 or 143 if stopped."""
    given, stopped = parse(argv), []
    def on_signal(number, frame):
        if number in stopped:
            os._exit(128 + number)
        stopped.append(number)
        with contextlib.suppress(OSError, AttributeError):  # print() may be what the signal interrupted
            os.write(sys.stdout.fileno(), b"\nfinishing this step; once more, and it stops at once\n")
    try:
        with lock(given["output_dir"]) if given.get("output_dir") and not given.get("inference_only") else contextlib.nullcontext():
            s, model, loader, val_loader, state = prepare(given)
            if s.inference_only:
                speak(model, s, 0)
            elif s.write_tensors:
                from prepro_tinyshakespeare import write_tensors
                say("\n".join(write_tensors(model, *loader.next_batch(), s.output_dir or "data")))
            else:
                for number in (signal.SIGINT, signal.SIGTERM):
                    signal.signal(number, on_signal)
                if hasattr(signal, "SIGPIPE"):  # nobody reads any more
                    signal.signal(signal.SIGPIPE, lambda number, frame: stopped.append(number))
                train(s, model, loader, val_loader, state, stopped)
    except KeyboardInterrupt:
        return 130
    except (InputError, OSError, MemoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 128 + stopped[0] if stopped else 0

if __name__ == "__main__":
    sys.modules["train_gpt2"] = sys.modules["__main__"]  # so that prepro_tinyshakespeare imports this very module
    np.seterr(all="ignore")                              # what overflows is found by check_finite
    sys.stdout and sys.stdout.reconfigure(errors="replace")  # a sample may hold what the terminal can't show; None if closed
    sys.exit(main())
