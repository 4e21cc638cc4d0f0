# SPDX-License-Identifier: Apache-2.0
"""Reference implementation of TNT in NumPy and float64, for the tests of `tnt_flax.models`.

Written from the published description, image by image, with loops, to be read beside the paper.
`model` is any object with the fields of `tnt_flax.models.TNT`. Parameters are our tree, in which
groups of equal blocks are stacked.
"""

import math

import numpy as np


def tnt(model, params, images):
    """Returns (logits of all images, the trace of every image: see `one_image`)."""
    params = tree(lambda x: np.asarray(x, np.float64), params)
    results = [one_image(model, params, image) for image in np.asarray(images, np.float64)]
    return np.stack([logits for logits, _ in results]), [trace for _, trace in results]


def one_image(model, params, image):
    """Returns (logits, [(words, sentences, inner and outer attention) after every block])."""
    eps = model.norm_eps
    words = word_embedding(model, params["word_embed"]["conv"], image)
    words = words + params["word_pos"]  # (1, M, C): the same for every sentence
    stem = np.stack([to_sentence(params["proj"], sentence, False, eps) for sentence in words])

    start = np.zeros_like(stem) if model.zero_sentences else stem
    sentences = np.concatenate([params["cls_token"][0], start]) + params["sentence_pos"][0]
    if model.zero_sentences:
        sentences[1:] = sentences[1:] + stem

    trace = []
    for i, block in enumerate(unstacked_blocks(params)):
        words, inner_attention = words.copy(), []
        if i not in model.vanilla_blocks:
            for n in range(len(words)):
                words[n], weights = transformer(model, block["inner"], words[n], model.inner_heads)
                inner_attention.append(weights)
                bridge = to_sentence(block["proj"], words[n], model.norm_each_word, eps)
                sentences[1 + n] = sentences[1 + n] + bridge
        sentences, weights = transformer(model, block["outer"], sentences, model.outer_heads)
        trace.append((words, sentences.copy(), np.array(inner_attention), weights))

    features = layer_norm(params["norm"], sentences[0], eps)
    return dense(params["head"], features) if model.num_classes else features, trace


def word_embedding(model, conv, image):
    """(H, W, channels) to (N, M, C); a word is a 7x7 window around its 4x4 pixels."""
    if model.conv_first:
        grid = convolve(conv, image, model.inner_stride)
        patches = cut(grid, model.patch_size // model.inner_stride)
    else:
        patches = cut(image, model.patch_size)
        patches = [convolve(conv, patch, model.inner_stride) for patch in patches]
    return np.stack([patch.reshape(-1, patch.shape[-1]) for patch in patches])


def cut(grid, size):
    rows, columns = grid.shape[0] // size, grid.shape[1] // size
    corners = [(size * r, size * c) for r in range(rows) for c in range(columns)]
    return [grid[y : y + size, x : x + size] for y, x in corners]


def convolve(conv, image, stride):
    """7x7 windows that begin three pixels before every `stride`-th pixel, zeros outside."""
    kernel, bias = conv["kernel"], conv.get("bias", 0.0)
    height, width, channels = image.shape
    padded = np.zeros((height + 6, width + 6, channels))
    padded[3 : 3 + height, 3 : 3 + width] = image
    out = np.zeros((math.ceil(height / stride), math.ceil(width / stride), kernel.shape[-1]))
    for row, column in np.ndindex(out.shape[:2]):
        y, x = row * stride, column * stride
        window = padded[y : y + 7, x : x + 7]
        out[row, column] = (window[..., None] * kernel).sum(axis=(0, 1, 2)) + bias
    return out


def to_sentence(proj, words, norm_each_word, eps):
    """(M, C) to (D,): the words one after the other, normalised each or together."""
    if norm_each_word:
        words = np.stack([layer_norm(proj["norm1"], word, eps) for word in words])
    sentence = np.concatenate(list(words))
    if not norm_each_word:
        sentence = layer_norm(proj["norm1"], sentence, eps)
    sentence = dense(proj["dense"], sentence)
    return layer_norm(proj["norm2"], sentence, eps) if "norm2" in proj else sentence


def transformer(model, block, x, heads):
    """Pre-norm attention and MLP on (T, W); returns (result, attention weights)."""
    update, weights = attention(
        block["attention"], layer_norm(block["norm1"], x, model.norm_eps), heads
    )
    x = x + block.get("layer_scale1", 1.0) * update
    hidden = dense(block["fc1"], layer_norm(block["norm2"], x, model.norm_eps))
    update = dense(block["fc2"], GELU[model.gelu](hidden))
    if "se" in block:
        update = update + squeeze_excite(block["se"], update, model.norm_eps)
    return x + block.get("layer_scale2", 1.0) * update, weights


def attention(block, x, heads):
    query, key, value = (dense(block[name], x) for name in ("query", "key", "value"))
    tokens, width = x.shape
    size = width // heads
    weights, mixed = np.zeros((heads, tokens, tokens)), np.zeros((tokens, width))
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        for t in range(tokens):
            scores = [query[t, part] @ key[s, part] / math.sqrt(size) for s in range(tokens)]
            odds = np.exp(np.array(scores) - max(scores))
            weights[head, t] = odds / odds.sum()
            mixed[t, part] = sum(weights[head, t, s] * value[s, part] for s in range(tokens))
    return dense(block["out"], mixed), weights


def squeeze_excite(block, x, eps):
    gate = layer_norm(block["norm"], x.mean(axis=0), eps)
    gate = np.tanh(dense(block["fc2"], np.maximum(dense(block["fc1"], gate), 0)))
    return x * gate


def layer_norm(norm, x, eps):
    mean = x.mean(axis=-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(axis=-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + eps) * norm["scale"] + norm["bias"]


def dense(layer, x):
    return x @ layer["kernel"] + layer.get("bias", 0.0)


GELU = {
    "erf": lambda x: x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2,
    "tanh": lambda x: x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
}


def unstacked_blocks(params):
    """The parameters of block 0, 1, ..., from groups `blocks_{first block}` stacked on axis 0."""
    names = [name for name in params if name.startswith("blocks_")]
    for name in sorted(names, key=lambda name: int(name.removeprefix("blocks_"))):
        length = len(params[name]["outer"]["norm1"]["scale"])
        for i in range(length):
            yield tree(lambda x, i=i: x[i], params[name])


def tree(function, x):
    if isinstance(x, dict):
        return {name: tree(function, value) for name, value in x.items()}
    return function(x)


def random_params(shapes, seed=0, gain=1.0):
    """A tree of the shapes in `shapes` with no value at its initial one, norms and biases included.

    `gain` scales what is added to the words and sentences; the norms' outputs stay around 1.
    """
    rng = np.random.RandomState(seed)

    def fill(name, x):
        if isinstance(x, dict):
            return {key: fill(key, x[key]) for key in sorted(x)}
        values = rng.standard_normal(x.shape)
        if name == "scale":
            values = 1 + 0.3 * values
        elif name == "kernel":
            stacked = x.ndim in (3, 5)
            values = gain * values / math.sqrt(math.prod(x.shape[stacked:-1]))
        else:
            values = 0.3 * gain * values
        return values.astype(np.float32)

    return fill("", shapes)
