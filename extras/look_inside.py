"""
A look inside: what a model expects of a text, and where its attention goes.

    python -m extras.look_inside --model data/d6 --prompt "To be, or not to be"
        for each token: its loss, that is how surprising it was, and the five
        tokens that are likeliest to follow; then the logit lens: what the model
        would predict if it ended after an earlier layer

    python -m extras.look_inside --layer 5 --head 1
        also the attention of head 1 in layer 5 of GPT-2 124M

In a program, attention() and logit_lens() give the same as arrays:

    model = GPT2.from_pretrained("gpt2", B, T, recompute=0)
    model.forward(inputs, targets, train=False)
    att = attention(model, 5)           # (B, NH, T, T)
    for logits in logit_lens(model):    # L + 1 times (B, T, V)
"""

import sys
import unicodedata

import numpy as np

import train_gpt2 as gpt2
from extras import command_line, exit_code_of
from train_gpt2 import GPT2, require

PROMPT = "First Citizen:\nBefore we proceed any further, hear me speak."

# As much as fits into 80 columns: a token takes 7, and with its probability 12.
TOKEN_WIDTH = 7
CANDIDATES = 5  # likeliest tokens after each position
LENS_POSITIONS = 6
ATTENTION_POSITIONS = 33

LEVELS = [0.02, 0.1, 0.25, 0.5]  # of attention; at each of them begins a darker shade


# --------------------------------------------------------------------------------------------------
# The arrays


def attention(model, l):
    """att (B, NH, T, T) of layer l in the last forward pass, as attention_forward describes it.

    att[b, h, t, t2] is how much position t takes of the value of position t2. Attention goes by
    blocks and does not keep att. With lse, the logarithm of the softmax's denominator, it is

        att = exp(q . k / sqrt(hs) - lse), and 0 where t2 > t
    """
    check_number("layer", l, model.config.num_layers)
    qkv = kept_by_layers(model, "qkv")[l]
    lse = kept_by_layers(model, "att_lse")[l].transpose(0, 2, 1)  # (B, NH, T)

    q, k, _ = gpt2.split_qkv(qkv, model.config.num_heads)
    T, hs = q.shape[-2:]
    preatt = (q * hs**-0.5) @ k.mT
    preatt += np.triu(np.full((T, T), -np.inf, preatt.dtype), k=1)
    return np.exp(preatt - lse[..., None])


def logit_lens(model, start=0):
    """What the model would predict if it ended here: logits (B, T - start, V), L + 1 times.

    They are made of the residual stream of the last forward pass: first of the embeddings, then of
    the output of each layer. The last ones are the model's own logits.

    start   the first position; those before it are left out
    """
    residuals = [model.acts["encoded"], *kept_by_layers(model, "residual3")]
    return (logits_of(model, residual[:, start:]) for residual in residuals)


def logits_of(model, residual):
    """The logits (B, n, V) that lnf and wte make of a residual stream (B, n, C)."""
    params = model.params
    residual = np.ascontiguousarray(residual)
    B, n, _ = residual.shape
    V = model.config.vocab_size

    lnf = np.empty_like(residual)
    mean, rstd = np.empty((2, B, n), residual.dtype)
    gpt2.layernorm_forward(lnf, mean, rstd, residual, params["lnfw"], params["lnfb"])

    logits = np.empty((B, n, V), residual.dtype)
    gpt2.matmul_forward(logits, lnf, params["wte"])
    return logits


def kept_by_layers(model, name):
    """acts[name] (L, ...). InputError if there was no forward pass, or layers share the memory."""
    # rstd is 0 until it is computed. After generate(), not all activations are of one text.
    computed = not model.keys and model.acts["lnf_rstd"].all()
    require(computed, "there was no forward pass: call model.forward(inputs, targets) first")

    view = model.acts[name]
    require(
        len(view) == model.config.num_layers,
        f"acts[{name!r}] is not kept for each layer: make the model with recompute=0 and "
        "training=True",
    )
    return view


def check_number(what, number, end):
    """InputError unless number is one of 0, ..., end - 1."""
    require(0 <= number < end, f"{what} {number}: expected 0 to {end - 1}")


# --------------------------------------------------------------------------------------------------
# The text


def characters():
    """(what is shown for a space, the shades of attention), as the output's encoding allows."""
    encoding = getattr(sys.stdout, "encoding", "") or ""
    return ("·", " ░▒▓█") if "utf" in encoding.lower() else ("_", " .:*#")


def shown(data):
    """The bytes of a token as text that takes TOKEN_WIDTH columns."""
    space, _ = characters()
    text = data.decode("utf-8", "backslashreplace").replace(" ", space)
    text = "".join(map(one_column, text))
    if len(text) > TOKEN_WIDTH:
        text = text[: TOKEN_WIDTH - 1] + "~"
    return text.ljust(TOKEN_WIDTH)


def one_column(character):
    r"""A character, or an escape such as \n if a terminal does not show it in one column."""
    wide = unicodedata.east_asian_width(character) in ("W", "F")
    mark = unicodedata.category(character).startswith("M")  # it would stand on the one before it
    if character.isprintable() and not wide and not mark:
        return character
    return character.encode("unicode_escape").decode()


def likeliest(logits, number, decode):
    """The likeliest next tokens after logits (V,): one text, of probabilities in % and tokens."""
    exp = np.exp(logits - logits.max())
    probs = exp / exp.sum()
    ids = np.argpartition(probs, -number)[-number:].tolist()
    ids.sort(key=lambda i: -probs[i])
    return "".join(f"{100 * probs[i]:4.0f} {shown(decode(i))}" for i in ids)


def show_tokens(model, texts, decode):
    """Lines: for each token of the prompt its loss, and what the model expects next."""
    space, _ = characters()
    yield "Each token, its loss (in nats; how surprising it was), and the five that are"
    yield f"likeliest to follow, each after its probability in %. {space} is a space, ~ a cut."
    yield ""

    logits = logits_of(model, model.acts["residual3"][-1])[0]
    losses = ["", *(f"{loss:.2f}" for loss in model.acts["losses"][0])]  # losses[t] of token t
    for t, text in enumerate(texts):
        yield f"{t:4} {text} {losses[t]:>7}{likeliest(logits[t], CANDIDATES, decode)}"


def show_lens(model, texts, decode):
    """Lines: what is likeliest to follow each of the last tokens, a line for each layer."""
    yield "The logit lens: the token that would be likeliest to follow if the model ended"
    yield "after that layer, and its probability in %."
    yield ""

    start = max(0, len(texts) - LENS_POSITIONS)
    yield "after   " + "".join(f"     {text}" for text in texts[start:])
    for number, logits in enumerate(logit_lens(model, start)):
        place = f"layer {number - 1}" if number > 0 else "encoded"
        yield f"{place:8}" + "".join(likeliest(row, 1, decode) for row in logits[0])


def show_attention(model, texts, l, h):
    """Lines: the attention of one head as a picture."""
    _, shades = characters()
    levels = [f"{shade} {level:.0%}" for shade, level in zip(shades[1:], LEVELS, strict=True)]
    yield f"Attention in layer {l}, head {h}: how much the token of a row takes from that of a"
    yield f"column. The shades begin at {', '.join(levels)}."
    start = max(0, len(texts) - ATTENTION_POSITIONS)
    if start > 0:
        yield f"The first {start} tokens are left out, as rows and as columns."
    yield ""

    texts = texts[start:]
    height = max(len(text.rstrip()) for text in texts)
    above = [text.rstrip().rjust(height) for text in texts]
    for letters in zip(*above, strict=True):  # the columns' tokens, written from top to bottom
        yield " " * 13 + " ".join(letters)
    for t, row in enumerate(attention(model, l)[0, h, start:, start:]):
        blocks = [shades[i] * 2 for i in np.searchsorted(LEVELS, row)]
        yield f"{start + t:4} {texts[t]} " + "".join(blocks)


# --------------------------------------------------------------------------------------------------
# The program


def look(source, prompt, l, h):
    """Print all that the program shows; attention unless l and h are None."""
    weights = GPT2.from_pretrained(source, 1, 1, training=False)
    config = weights.config
    if l is not None:
        check_number("layer", l, config.num_layers)
        check_number("head", h, config.num_heads)

    tokenizer = gpt2.tokenizer(weights.vocabulary)
    tokens = tokenizer.encode(prompt)
    T, most = len(tokens), config.max_seq_len
    require(0 < T <= most, f"the prompt has {T} tokens: write one of 1 to {most} for this model")

    model = GPT2(config, 1, T, None, recompute=0)
    model.params = weights.params  # its own were never written: they take no memory
    targets = [*tokens[1:], 0]  # what follows the last one is not known, and its loss not shown
    model.forward([tokens], [targets], train=False)

    def decode(token):
        return tokenizer.decode(token) if tokenizer.lengths[token] else b"<|endoftext|>"

    texts = [shown(decode(token)) for token in tokens]
    parts = [show_tokens(model, texts, decode), show_lens(model, texts, decode)]
    if l is not None:
        parts.append(show_attention(model, texts, l, h))
    for number, lines in enumerate(parts):
        if number > 0:
            print()
        for line in lines:
            print(line.rstrip(), flush=True)


def main(argv=None):
    """The command line. Returns the exit code."""
    parser = command_line("look_inside", __doc__)
    add = parser.add_argument
    add("--model", default="gpt2", metavar="X", help="as of the trainer (default: gpt2)")
    add("--prompt", default=PROMPT, metavar="TEXT", help=f"the text (default: {PROMPT!r})")
    add("--layer", type=int, metavar="L", help="show attention in this layer, counted from 0")
    add("--head", type=int, metavar="H", help="and in this head of it, counted from 0")
    args = parser.parse_args(argv)
    if (args.layer is None) != (args.head is None):
        parser.error("--layer and --head go together")
    return exit_code_of(look, args.model, args.prompt, args.layer, args.head)


if __name__ == "__main__":
    sys.exit(main())
