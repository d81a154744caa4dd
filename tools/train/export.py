#!/usr/bin/env python3
"""Writes a checkpoint of train.py as a GGUF file for `sluice pack`, in F32 or quantized."""
import argparse
import struct

import needs
import numpy
import torch

import bpe
import corpus as corpus_
import gguf_types
import model as model_

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + "
    "message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
U32, I32, F32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9
ALIGN = 32


def string(text):
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def pair(key, kind, value):
    out = string(key) + struct.pack("<I", kind)
    if kind == STRING:
        return out + string(value)
    if kind == ARRAY:
        of, values = value
        out += struct.pack("<IQ", of, len(values))
        if of == STRING:
            return out + b"".join(map(string, values))
        return out + struct.pack(f"<{len(values)}i", *values)
    return out + struct.pack({U32: "<I", F32: "<f", BOOL: "<?"}[kind], value)


def metadata(c, tokenizer, name):
    """The GGUF's keys and values, encoded."""
    a = "qwen3moe."
    marks = [tokenizer.ids[m] for m in bpe.MARKS]
    kinds = [3 if i in marks else 1 for i in range(len(tokenizer))]
    return [
        pair("general.architecture", STRING, "qwen3moe"),
        pair("general.name", STRING, name),
        pair("general.alignment", U32, ALIGN),
        pair("general.quantization_version", U32, 2),
        pair(a + "block_count", U32, c.layers),
        pair(a + "context_length", U32, c.ctx),
        pair(a + "embedding_length", U32, c.dim),
        pair(a + "feed_forward_length", U32, c.width),
        pair(a + "expert_feed_forward_length", U32, c.width),
        pair(a + "attention.head_count", U32, c.heads),
        pair(a + "attention.head_count_kv", U32, c.kv_heads),
        pair(a + "attention.key_length", U32, c.head_dim),
        pair(a + "attention.value_length", U32, c.head_dim),
        pair(a + "attention.layer_norm_rms_epsilon", F32, c.eps),
        pair(a + "expert_count", U32, c.experts),
        pair(a + "expert_used_count", U32, c.used),
        pair(a + "rope.freq_base", F32, c.rope_base),
        pair("tokenizer.ggml.model", STRING, "gpt2"),
        pair("tokenizer.ggml.pre", STRING, "gpt-2"),
        pair("tokenizer.ggml.tokens", ARRAY, (STRING, tokenizer.tokens)),
        pair("tokenizer.ggml.token_type", ARRAY, (I32, kinds)),
        pair("tokenizer.ggml.merges", ARRAY, (STRING, [" ".join(m) for m in tokenizer.merges])),
        pair("tokenizer.ggml.bos_token_id", U32, tokenizer.ids[corpus_.END]),
        pair("tokenizer.ggml.eos_token_id", U32, tokenizer.ids[corpus_.IM_END]),
        pair("tokenizer.ggml.padding_token_id", U32, tokenizer.ids[corpus_.END]),
        pair("tokenizer.ggml.add_bos_token", BOOL, False),
        pair("tokenizer.chat_template", STRING, TEMPLATE),
    ]


def write(path, params, c, tokenizer, kind, dense, name):
    """Norms and routers stay F32; experts become `kind`, other matrices `dense`."""
    pairs, listed, blobs, at = metadata(c, tokenizer, name), [], [], 0
    for key, p in params.items():
        x = p.numpy()
        fmt = "f32"
        if key.endswith("_exps"):
            fmt = gguf_types.fitting(kind, x.shape[-1])
        elif x.ndim > 1 and not key.endswith("ffn_gate_inp"):
            fmt = gguf_types.fitting(dense, x.shape[-1])
        number, data = gguf_types.encode(fmt, numpy.ascontiguousarray(x, dtype=numpy.float32))
        dims = x.shape[::-1]
        listed.append(string(key + ".weight") + struct.pack("<I", len(dims)) +
                      struct.pack(f"<{len(dims)}Q", *dims) + struct.pack("<IQ", number, at))
        data += bytes(-len(data) % ALIGN)
        blobs.append(data)
        at += len(data)
    with open(path, "wb") as f:
        f.write(b"GGUF" + struct.pack("<IQQ", 3, len(listed), len(pairs)))
        f.write(b"".join(pairs) + b"".join(listed))
        f.write(bytes(-f.tell() % ALIGN))
        f.write(b"".join(blobs))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint")
    parser.add_argument("-o", "--output", required=True, help="the GGUF to write")
    parser.add_argument("--vocab", required=True, help="the tokenizer, made by bpe.py")
    parser.add_argument("--type", default="f32", choices=gguf_types.NAMES,
                        help="type of the experts (f32)")
    parser.add_argument("--dense", default=None, choices=gguf_types.NAMES,
                        help="type of the other matrices (as --type)")
    parser.add_argument("--name", default="sluice-demo")
    args = parser.parse_args()
    state = torch.load(args.checkpoint, map_location="cpu")
    c = model_.Config(**state["config"])
    write(args.output, model_.views(state["params"], c), c, bpe.Tokenizer(args.vocab), args.type,
          args.dense or args.type, args.name)


if __name__ == "__main__":
    main()
