"""Numbers of GGUF's types that `sluice pack` takes, from float32 arrays.

For each group of weights a few scales around the obvious one are tried, and that with the least
squared error is kept. K-quants need rows of a multiple of 256; narrower matrices get the type of
the next larger size in their place, as is usual for such files.
"""
import numpy as np

NUMBERS = {
    "f32": 0, "f16": 1, "bf16": 30, "q8_0": 8, "q6_k": 14, "q5_k": 13, "q5_1": 7, "q5_0": 6,
    "q4_k": 12, "q4_1": 3, "q4_0": 2, "iq4_nl": 20, "mxfp4": 39,
}
NAMES = tuple(NUMBERS)
INSTEAD = {"q6_k": "q8_0", "q5_k": "q5_1", "q4_k": "q5_0"}
IQ4_NL = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113],
                  np.float32)
MXFP4 = np.array([0, 1, 2, 3, 4, 6, 8, 12], np.float32) / 2
TRIES = np.linspace(0.7, 1.1, 21, dtype=np.float32)


def fitting(kind, width):
    """The type, or what stands in for it in rows of this width."""
    return INSTEAD[kind] if kind in INSTEAD and width % 256 else kind


def encode(kind, x):
    """The type's number in GGUF, and the array's bytes."""
    return NUMBERS[kind], ENCODERS[kind](x)


def f16(x):
    return x.astype(np.float16)


def bf16(x):
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16).tobytes()


def divide(a, b):
    return np.divide(a, b, out=np.zeros_like(a), where=b != 0)


def best(groups, tries, code, decode):
    """Codes and scales of least squared error: code(x, scale), decode(codes, scale)."""
    kept = None
    for scale in tries:
        scale = f16(scale).astype(np.float32)
        codes = code(groups, scale)
        error = np.square(decode(codes, scale) - groups).sum(-1, keepdims=True)
        if kept is None:
            kept = [error, codes, scale]
        better = error < kept[0]
        kept = [np.where(better, new, old) for new, old in zip((error, codes, scale), kept)]
    return kept[1], kept[2]


def symmetric(x, bits, size=32):
    """Codes around a middle, and scales."""
    groups, middle = x.reshape(-1, size), 1 << (bits - 1)
    most = np.abs(groups).max(-1, keepdims=True)
    # Either end of the range may take the largest weight: one side reaches a step further.
    signed = np.take_along_axis(groups, np.abs(groups).argmax(-1)[:, None], -1)
    tries = [t * most / (middle - 1) for t in TRIES] + [t * signed / -middle for t in TRIES]
    return best(groups, tries,
                lambda g, s: np.clip(np.rint(divide(g, s + 0 * g)), -middle, middle - 1),
                lambda c, s: c * s)


def nibbles(codes):
    """Two codes to a byte: weight i low, weight i + 16 high."""
    c = codes.astype(np.uint8) & 15
    return c[:, :16] | c[:, 16:] << 4


def fifth_bits(codes):
    bits = (codes.astype(np.uint8) >> 4 & 1).astype(np.uint8)
    return np.packbits(bits, axis=1, bitorder="little")


def join(*planes):
    rows = planes[0].shape[0]
    return np.concatenate([np.ascontiguousarray(p).view(np.uint8).reshape(rows, -1)
                           for p in planes], 1).tobytes()


def q8_0(x):
    codes, scale = symmetric(x, 8)
    return join(f16(scale), codes.astype(np.int8))


def q_0(x, bits):
    codes, scale = symmetric(x, bits)
    codes = codes + (1 << (bits - 1))
    high = [fifth_bits(codes)] if bits == 5 else []
    return join(f16(scale), *high, nibbles(codes))


def from_min(groups, bits):
    """Codes upward from a minimum; scales and minima, not yet rounded to any type."""
    lo, hi = groups.min(-1, keepdims=True), groups.max(-1, keepdims=True)
    most, kept = (1 << bits) - 1, None
    for t in TRIES:
        scale = t * (hi - lo) / most
        base = lo + (1 - t) / 2 * (hi - lo)
        codes = np.clip(np.rint(divide(groups - base, scale + 0 * groups)), 0, most)
        error = np.square(codes * scale + base - groups).sum(-1, keepdims=True)
        if kept is None:
            kept = [error, scale, base]
        better = error < kept[0]
        kept = [np.where(better, n, o) for n, o in zip((error, scale, base), kept)]
    return kept[1], kept[2]


def q_1(x, bits):
    groups = x.reshape(-1, 32)
    scale, base = (f16(v).astype(np.float32) for v in from_min(groups, bits))
    codes = np.clip(np.rint(divide(groups - base, scale + 0 * groups)), 0, (1 << bits) - 1)
    high = [fifth_bits(codes)] if bits == 5 else []
    return join(f16(scale), f16(base), *high, nibbles(codes))


def iq4_nl(x):
    between = (IQ4_NL[1:] + IQ4_NL[:-1]) / 2
    groups = x.reshape(-1, 32)
    most = np.abs(groups).max(-1, keepdims=True)
    codes, scale = best(groups, [t * s * most / 127 for t in TRIES for s in (1, -1)],
                        lambda g, s: np.searchsorted(between, divide(g, s + 0 * g)),
                        lambda c, s: IQ4_NL[c.astype(int)] * s)
    return join(f16(scale), nibbles(codes))


def mxfp4(x):
    between = (MXFP4[1:] + MXFP4[:-1]) / 2
    groups = x.reshape(-1, 32)
    most = np.abs(groups).max(-1, keepdims=True)
    top = np.where(most > 0, np.floor(np.log2(np.maximum(most, 1e-30))), -100)
    kept = None
    for shift in (-2, -1):
        power = np.clip(top + shift, -126, 127)
        scale = np.exp2(power)
        codes = np.searchsorted(between, np.abs(groups) / scale)
        error = np.square(MXFP4[codes] * scale - np.abs(groups)).sum(-1, keepdims=True)
        if kept is None:
            kept = [error, codes, power]
        better = error < kept[0]
        kept = [np.where(better, n, o) for n, o in zip((error, codes, power), kept)]
    codes = kept[1].astype(np.uint8) | (groups < 0).astype(np.uint8) << 3
    return join((kept[2] + 127).astype(np.uint8), nibbles(codes))


def pack_sixes(scales, mins):
    """Eight scales and eight minima of 6 bits in 12 bytes."""
    s, m = scales.astype(np.uint8), mins.astype(np.uint8)
    return np.concatenate([s[:, :4] | (s[:, 4:] >> 4) << 6, m[:, :4] | (m[:, 4:] >> 4) << 6,
                           (s[:, 4:] & 15) | (m[:, 4:] & 15) << 4], 1)


def q_k(x, bits):
    """Q4_K and Q5_K: eight groups of 32 share two f16 numbers, by which their scales and minima
    are multiplied."""
    blocks = x.reshape(-1, 8, 32)
    # Minima are subtracted and can't be negative.
    groups = np.minimum(blocks.min(-1, keepdims=True), 0)
    padded = np.concatenate([blocks, groups], -1).reshape(-1, 33)
    scale, base = (v.reshape(-1, 8) for v in from_min(padded, bits))
    base = np.minimum(base, 0)
    d = f16(scale.max(-1, keepdims=True) / 63).astype(np.float32)
    dmin = f16(-base.min(-1, keepdims=True) / 63).astype(np.float32)
    s = np.clip(np.rint(divide(scale, d + 0 * scale)), 0, 63)
    m = np.clip(np.rint(divide(-base, dmin + 0 * base)), 0, 63)
    step, low = (s * d)[..., None], (m * dmin)[..., None]
    codes = np.clip(np.rint(divide(blocks + low, step + 0 * blocks)), 0, (1 << bits) - 1)
    codes = codes.astype(np.uint8)
    low4 = codes & 15
    qs = (low4[:, 0::2] | low4[:, 1::2] << 4).reshape(-1, 128)
    high = []
    if bits == 5:
        bit = (codes >> 4) << np.arange(8, dtype=np.uint8)[None, :, None]
        high = [np.bitwise_or.reduce(bit, 1)]
    return join(f16(d), f16(dmin), pack_sixes(s, m), *high, qs)


def q6_k(x):
    codes, scale = symmetric(x, 6, 16)
    scale = scale.reshape(-1, 16)
    # The largest scale, with its sign, becomes -128, where int8 reaches furthest.
    largest = np.take_along_axis(scale, np.abs(scale).argmax(-1)[:, None], -1)
    d = f16(largest / -128).astype(np.float32)
    s = np.clip(np.rint(divide(scale, d + 0 * scale)), -128, 127)
    step = (s * d)[..., None]
    blocks = x.reshape(-1, 16, 16)
    c = np.clip(np.rint(divide(blocks, step + 0 * blocks)), -32, 31) + 32
    c = c.astype(np.uint8).reshape(-1, 2, 4, 32)
    low, high = c & 15, c >> 4
    ql = np.concatenate([low[:, :, 0] | low[:, :, 2] << 4, low[:, :, 1] | low[:, :, 3] << 4], -1)
    qh = high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6
    return join(ql.reshape(-1, 128), qh.reshape(-1, 64), s.astype(np.int8), f16(d))


ENCODERS = {
    "f32": lambda x: x.astype(np.float32).tobytes(), "f16": lambda x: f16(x).tobytes(),
    "bf16": bf16, "q8_0": q8_0, "q6_k": q6_k, "q5_k": lambda x: q_k(x, 5),
    "q5_1": lambda x: q_1(x, 5), "q5_0": lambda x: q_0(x, 5), "q4_k": lambda x: q_k(x, 4),
    "q4_1": lambda x: q_1(x, 4), "q4_0": lambda x: q_0(x, 4), "iq4_nl": iq4_nl, "mxfp4": mxfp4,
}
