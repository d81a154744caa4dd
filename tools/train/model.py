"""The demo model in PyTorch: a Qwen3-MoE, for documents of different lengths laid end to end.

It is written for speed on a few CPU cores. Debian's PyTorch multiplies matrices with whatever BLAS
is installed, which may be the slow reference one; oneDNN, which it links against anyway, has a
good sgemm, so that is called directly where it is found. Each gradient is written out by hand and
straight into its buffer. A process uses one thread: train.py runs several processes instead, which
makes sums independent of how threads are scheduled.
"""
import ctypes
import math
from dataclasses import dataclass

import torch


@dataclass
class Config:
    vocab: int = 4096
    dim: int = 256
    layers: int = 6
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 32
    experts: int = 36
    used: int = 2
    width: int = 64  # of an expert
    ctx: int = 512
    eps: float = 1e-6
    rope_base: float = 10000.0


def shapes(c):
    """The parameters' names and shapes, in order. Names are those of GGUF."""
    q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    out = {"token_embd": (c.vocab, c.dim), "output_norm": (c.dim,)}
    for i in range(c.layers):
        b = f"blk.{i}."
        out[b + "attn_norm"] = (c.dim,)
        out[b + "attn_q"] = (q, c.dim)
        out[b + "attn_k"] = (kv, c.dim)
        out[b + "attn_v"] = (kv, c.dim)
        out[b + "attn_output"] = (c.dim, q)
        out[b + "attn_q_norm"] = (c.head_dim,)
        out[b + "attn_k_norm"] = (c.head_dim,)
        out[b + "ffn_norm"] = (c.dim,)
        out[b + "ffn_gate_inp"] = (c.experts, c.dim)
        out[b + "ffn_gate_exps"] = (c.experts, c.width, c.dim)
        out[b + "ffn_up_exps"] = (c.experts, c.width, c.dim)
        out[b + "ffn_down_exps"] = (c.experts, c.dim, c.width)
    return out


def views(flat, c):
    """The parameters as views of a flat tensor."""
    out, at = {}, 0
    for name, shape in shapes(c).items():
        n = math.prod(shape)
        out[name] = flat[at : at + n].view(shape)
        at += n
    return out


def count(c):
    return sum(math.prod(s) for s in shapes(c).values())


def initialize(params, c, seed):
    g = torch.Generator().manual_seed(seed)
    for name, p in params.items():
        if p.dim() == 1:
            p.fill_(1.0)
        elif name == "token_embd":
            p.normal_(0, 0.02, generator=g)
        else:
            p.normal_(0, p.shape[-1] ** -0.5, generator=g)
            if name.endswith(("attn_output", "ffn_down_exps")):
                p.mul_((2 * c.layers) ** -0.5)


# Matrix products.

try:
    _sgemm = ctypes.CDLL("libdnnl.so.2").dnnl_sgemm
    _sgemm.argtypes = (
        [ctypes.c_char] * 2 + [ctypes.c_int64] * 3 + [ctypes.c_float, ctypes.c_void_p]
        + [ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p]
        + [ctypes.c_int64]
    )
except OSError:
    _sgemm = None


def gemm(a, b, out=None, beta=0.0):
    """out = a b + beta out, for matrices with one stride of 1."""
    if out is None:
        out = torch.empty(a.shape[0], b.shape[1])
    if _sgemm is None:
        return out.addmm_(a, b, beta=beta) if beta else torch.mm(a, b, out=out)
    m, k = a.shape
    n = b.shape[1]
    if m == 0 or n == 0 or k == 0:
        return out.mul_(beta) if beta else out.zero_()
    (a0, a1), (b0, b1) = a.stride(), b.stride()
    ta, lda = (b"N", a0) if a1 == 1 else (b"T", a1)
    tb, ldb = (b"N", b0) if b1 == 1 else (b"T", b1)
    _sgemm(ta, tb, m, n, k, 1.0, a.data_ptr(), max(lda, 1), b.data_ptr(), max(ldb, 1), beta,
           out.data_ptr(), out.stride(0))
    return out


class Linear(torch.autograd.Function):
    """y = x W^T"""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return gemm(x, w.t())

    @staticmethod
    def backward(ctx, dy):
        x, w = ctx.saved_tensors
        dy = dy.contiguous()
        dx = gemm(dy, w) if ctx.needs_input_grad[0] else None
        dw = None
        if ctx.needs_input_grad[1]:
            dw = gemm(dy.t(), x)
        return dx, dw


class HalfLinear(torch.autograd.Function):
    """y = x W^T with factors rounded to bfloat16, which CPUs that can multiply twice as fast."""

    @staticmethod
    def forward(ctx, x, w):
        x, w = x.bfloat16(), w.bfloat16()
        ctx.save_for_backward(x, w)
        return torch.mm(x, w.t()).float()

    @staticmethod
    def backward(ctx, dy):
        x, w = ctx.saved_tensors
        dy = dy.bfloat16()
        dx = torch.mm(dy, w).float() if ctx.needs_input_grad[0] else None
        dw = torch.mm(dy.t(), x).float() if ctx.needs_input_grad[1] else None
        return dx, dw


class HalfHead(torch.autograd.Function):
    """Each row's cross entropy against its target, of logits with factors in bfloat16. Rows that
    are as good as certain take no part in the gradient: there are many, and it is next to 0."""

    CERTAIN = 0.002

    @staticmethod
    def forward(ctx, x, w, targets):
        x, w = x.bfloat16(), w.bfloat16()
        logits = torch.mm(x, w.t()).float()
        total = torch.logsumexp(logits, 1, keepdim=True)
        losses = total.squeeze(1) - logits.gather(1, targets.unsqueeze(1)).squeeze(1)
        rows = (losses > HalfHead.CERTAIN).nonzero().squeeze(1)
        p = logits.index_select(0, rows).sub_(total.index_select(0, rows)).exp_()
        p[torch.arange(len(rows)), targets.index_select(0, rows)] -= 1
        ctx.save_for_backward(x, w, rows, p)
        return losses

    @staticmethod
    def backward(ctx, dlosses):
        x, w, rows, p = ctx.saved_tensors
        d = p.mul_(dlosses.index_select(0, rows).unsqueeze(1)).bfloat16()
        dx = torch.zeros(x.shape)
        dx.index_copy_(0, rows, torch.mm(d, w).float())
        dw = None
        if ctx.needs_input_grad[1]:
            dw = torch.mm(d.t(), x.index_select(0, rows)).float()
        return dx, dw, None


class Norm(torch.autograd.Function):
    """RMS norm over the last dimension."""

    @staticmethod
    def forward(ctx, x, w, eps):
        r = torch.rsqrt(x.square().mean(-1, keepdim=True).add_(eps))
        xr = x * r
        ctx.save_for_backward(xr, r, w)
        return xr * w

    @staticmethod
    def backward(ctx, dy):
        xr, r, w = ctx.saved_tensors
        t = dy * xr
        dw = t.view(-1, w.shape[0]).sum(0) if ctx.needs_input_grad[1] else None
        s = gemm(t.view(-1, w.shape[0]), w.view(-1, 1)).view(r.shape).div_(w.shape[0])
        dx = (dy * w).sub_(xr * s).mul_(r)
        return dx, dw, None


class Rope(torch.autograd.Function):
    """Turns pairs that are half a head apart: x [n, heads, head_dim], cos and sin [n, 1, half]."""

    @staticmethod
    def turn(x, cos, sin):
        h = x.shape[-1] // 2
        a, b = x[..., :h], x[..., h:]
        out = torch.empty_like(x)
        torch.mul(a, cos, out=out[..., :h]).sub_(b * sin)
        torch.mul(b, cos, out=out[..., h:]).add_(a * sin)
        return out

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return Rope.turn(x, cos, sin)

    @staticmethod
    def backward(ctx, dy):
        cos, sin = ctx.saved_tensors
        return Rope.turn(dy, cos, -sin), None, None


class Attention(torch.autograd.Function):
    """Causal attention within documents: q [n, heads, d], k and v [n, kv_heads, d]. A document is
    a trunk, rows trunk[0] to trunk[1], and branches that each see the trunk and themselves. The
    heads that share a key are stacked as the rows of one product."""

    @staticmethod
    def pieces(documents):
        """(first row, last, trunk's first, trunk's last) of each trunk and branch."""
        for (s, m), branches in documents:
            yield s, m, s, s
            for a, b in branches:
                yield a, b, s, m

    @staticmethod
    def stack(x, kv):
        n, heads, d = x.shape
        return x.view(n, kv, heads // kv, d).transpose(0, 1).reshape(kv, -1, d)

    @staticmethod
    def unstack(x, n):
        kv, rows, d = x.shape
        return x.view(kv, n, rows // n, d).transpose(0, 1).reshape(n, -1, d)

    @staticmethod
    def forward(ctx, q, k, v, documents):
        n, heads, d = q.shape
        kv = k.shape[1]
        g = heads // kv
        q = Attention.stack(q, kv)
        out = torch.empty_like(q)
        saved = []
        for a, b, s, m in Attention.pieces(documents):
            t = m - s
            p = torch.empty(kv, (b - a) * g, t + b - a)
            for h in range(kv):
                rows = q[h, a * g : b * g]
                if t:
                    gemm(rows, k[s:m, h].t(), p[h, :, :t])
                gemm(rows, k[a:b, h].t(), p[h, :, t:])
            p.mul_(d ** -0.5)
            p[:, :, t:] += causal(b - a, g)
            p = torch.softmax(p, -1)
            for h in range(kv):
                rows = out[h, a * g : b * g]
                gemm(p[h, :, t:], v[a:b, h], rows)
                if t:
                    gemm(p[h, :, :t], v[s:m, h], rows, 1.0)
            saved.append(p)
        ctx.save_for_backward(q, k, v)
        ctx.saved, ctx.documents = saved, documents
        return Attention.unstack(out, n)

    @staticmethod
    def backward(ctx, dout):
        q, k, v = ctx.saved_tensors
        n, kv, d = k.shape
        g = q.shape[1] // n
        dout = Attention.stack(dout.contiguous(), kv)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for p, (a, b, s, m) in zip(ctx.saved, Attention.pieces(ctx.documents)):
            t = m - s
            dp = torch.empty_like(p)
            for h in range(kv):
                rows = dout[h, a * g : b * g]
                gemm(rows, v[a:b, h].t(), dp[h, :, t:])
                gemm(p[h, :, t:].t(), rows, dv[a:b, h], 1.0)
                if t:
                    gemm(rows, v[s:m, h].t(), dp[h, :, :t])
                    gemm(p[h, :, :t].t(), rows, dv[s:m, h], 1.0)
            ds = torch._softmax_backward_data(dp, p, -1, torch.float32).mul_(d ** -0.5)
            for h in range(kv):
                rows, own = q[h, a * g : b * g], dq[h, a * g : b * g]
                gemm(ds[h, :, t:], k[a:b, h], own)
                gemm(ds[h, :, t:].t(), rows, dk[a:b, h], 1.0)
                if t:
                    gemm(ds[h, :, :t], k[s:m, h], own, 1.0)
                    gemm(ds[h, :, :t].t(), rows, dk[s:m, h], 1.0)
        ctx.saved = None
        return Attention.unstack(dq, n), dk, dv, None


_masks = {}


def causal(t, g):
    """What keeps t positions, of g rows each, from looking ahead."""
    if (t, g) not in _masks:
        mask = torch.full((t, t), float("-inf")).triu_(1)
        _masks[t, g] = mask.repeat_interleave(g, 0)
    return _masks[t, g]


class Experts(torch.autograd.Function):
    """The chosen experts' outputs, weighted and summed. order lists (token, choice) pairs by
    expert; ends[e] is where expert e's end."""

    @staticmethod
    def forward(ctx, x, weight, gate, up, down, order, ends):
        used = weight.shape[1]
        tokens = order // used
        xs = x.index_select(0, tokens)
        rows, f = xs.shape[0], gate.shape[1]
        a, b = torch.empty(rows, f), torch.empty(rows, f)
        y = torch.empty(rows, x.shape[1])
        s = 0
        for e, end in enumerate(ends):
            gemm(xs[s:end], gate[e].t(), a[s:end])
            gemm(xs[s:end], up[e].t(), b[s:end])
            s = end
        sig = torch.sigmoid(a)
        h = a * sig
        h.mul_(b)
        s = 0
        for e, end in enumerate(ends):
            gemm(h[s:end], down[e].t(), y[s:end])
            s = end
        # Back to the tokens' order, where a token's choices lie side by side.
        ys = torch.empty_like(y).index_copy_(0, order, y).view(-1, used, x.shape[1])
        out = torch.bmm(weight.unsqueeze(1), ys).squeeze(1) if used > 4 else sum(
            ys[:, i] * weight[:, i : i + 1] for i in range(used))
        ctx.save_for_backward(xs, weight, gate, up, down, order, a, b, sig, h, ys)
        ctx.ends = ends
        return out

    @staticmethod
    def backward(ctx, dout):
        xs, weight, gate, up, down, order, a, b, sig, h, ys = ctx.saved_tensors
        used = weight.shape[1]
        dweight = torch.stack([(ys[:, i] * dout).sum(-1) for i in range(used)], 1)
        tokens = order // used
        dy = dout.index_select(0, tokens).mul_(weight.view(-1).index_select(0, order).unsqueeze(1))
        dh = torch.empty_like(h)
        wants = ctx.needs_input_grad
        ddown = torch.empty_like(down) if wants[4] else None
        s = 0
        for e, end in enumerate(ctx.ends):
            gemm(dy[s:end], down[e], dh[s:end])
            if wants[4]:
                gemm(dy[s:end].t(), h[s:end], ddown[e])
            s = end
        silu = a * sig
        db = dh * silu
        # silu' = sig + silu (1 - sig)
        da = dh.mul_(b).mul_(silu.mul_(1 - sig).add_(sig))
        dgate = torch.empty_like(gate) if wants[2] else None
        dup = torch.empty_like(up) if wants[3] else None
        dxs = torch.empty_like(xs)
        s = 0
        for e, end in enumerate(ctx.ends):
            gemm(da[s:end], gate[e], dxs[s:end])
            gemm(db[s:end], up[e], dxs[s:end], 1.0)
            if wants[2]:
                gemm(da[s:end].t(), xs[s:end], dgate[e])
            if wants[3]:
                gemm(db[s:end].t(), xs[s:end], dup[e])
            s = end
        dxs = torch.empty_like(dxs).index_copy_(0, order, dxs).view(-1, used, xs.shape[1])
        dx = dxs[:, 0].clone()
        for i in range(1, used):
            dx += dxs[:, i]
        return dx, dweight, dgate, dup, ddown, None, None


class HalfExperts(torch.autograd.Function):
    """As Experts, with factors in bfloat16, and gate and up in one product."""

    @staticmethod
    def forward(ctx, x, weight, gate, up, down, order, ends):
        used, f = weight.shape[1], gate.shape[1]
        tokens = order // used
        xs = x.bfloat16().index_select(0, tokens)
        both, down = torch.cat([gate, up], 1).bfloat16(), down.bfloat16()
        ab = torch.empty(len(xs), 2 * f, dtype=torch.bfloat16)
        s = 0
        for e, end in enumerate(ends):
            if end > s:
                torch.mm(xs[s:end], both[e].t(), out=ab[s:end])
            s = end
        a, b = ab[:, :f].float(), ab[:, f:].float()
        sig = torch.sigmoid(a)
        h = (a * sig).mul_(b).bfloat16()
        y = torch.empty_like(xs)
        s = 0
        for e, end in enumerate(ends):
            if end > s:
                torch.mm(h[s:end], down[e].t(), out=y[s:end])
            s = end
        ys = torch.empty_like(y).index_copy_(0, order, y).view(-1, used, x.shape[1])
        out = ys[:, 0] * weight[:, :1]
        for i in range(1, used):
            out = out.addcmul_(ys[:, i].float(), weight[:, i : i + 1])
        ctx.save_for_backward(xs, weight, both, down, order, a, b, sig, h, ys)
        ctx.ends = ends
        return out

    @staticmethod
    def backward(ctx, dout):
        xs, weight, both, down, order, a, b, sig, h, ys = ctx.saved_tensors
        used, f = weight.shape[1], a.shape[1]
        dweight = torch.stack([(ys[:, i] * dout).sum(-1) for i in range(used)], 1)
        tokens, wants = order // used, any(ctx.needs_input_grad[2:5])
        dy = dout.index_select(0, tokens).mul_(weight.view(-1).index_select(0, order).unsqueeze(1))
        dy = dy.bfloat16()
        dh = torch.empty_like(h)
        ddown = torch.zeros_like(down) if wants else None
        s = 0
        for e, end in enumerate(ctx.ends):
            if end > s:
                torch.mm(dy[s:end], down[e], out=dh[s:end])
                if wants:
                    torch.mm(dy[s:end].t(), h[s:end], out=ddown[e])
            s = end
        dh, silu = dh.float(), a * sig
        dab = torch.empty(len(xs), 2 * f, dtype=torch.bfloat16)
        dab[:, f:] = dh * silu
        dab[:, :f] = dh.mul_(b).mul_(silu.mul_(1 - sig).add_(sig))
        dboth = torch.zeros_like(both) if wants else None
        dxs = torch.empty_like(xs)
        s = 0
        for e, end in enumerate(ctx.ends):
            if end > s:
                torch.mm(dab[s:end], both[e], out=dxs[s:end])
                if wants:
                    torch.mm(dab[s:end].t(), xs[s:end], out=dboth[e])
            s = end
        dxs = torch.empty_like(dxs).index_copy_(0, order, dxs).view(-1, used, xs.shape[1])
        dx = dxs[:, 0].float()
        for i in range(1, used):
            dx += dxs[:, i]
        if not wants:
            return dx, dweight, None, None, None, None, None
        dboth = dboth.float()
        return dx, dweight, dboth[:, :f], dboth[:, f:], ddown.float(), None, None


def rope_table(c, positions):
    half = c.head_dim // 2
    freq = c.rope_base ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = positions.double().unsqueeze(1) * freq
    return angle.cos().float().unsqueeze(1), angle.sin().float().unsqueeze(1)


def positions_of(documents):
    """Each row's position: a branch goes on where its trunk ends."""
    out = []
    for (s, m), branches in documents:
        out.append(torch.arange(m - s))
        out += [torch.arange(m - s, m - s + b - a) for a, b in branches]
    return torch.cat(out)


def forward(p, c, ids, documents, balance=None, counts=None, half=False, sets=None, outside=None,
            price=None):
    """The last hidden states [n, dim] of documents laid end to end, ready for the head. Appends
    each layer's balancing loss to `balance`, and its experts' choices to `counts` where given;
    `half` rounds the factors of large products to bfloat16. With `sets`, a sets.Sets, rows use
    only experts that it lets them use, and what the router wants outside of its row's set is
    appended to `outside` as a loss. Balancing makes experts the dearer the more these rows use
    them, or as `price` [layers, experts] says."""
    n = ids.shape[0]
    linear, experts = (HalfLinear.apply, HalfExperts.apply) if half else (Linear.apply, Experts.apply)
    positions = positions_of(documents)
    cos, sin = rope_table(c, positions)
    x = torch.nn.functional.embedding(ids, p["token_embd"])
    for i in range(c.layers):
        b = f"blk.{i}."
        h = Norm.apply(x, p[b + "attn_norm"], c.eps)
        q = linear(h, p[b + "attn_q"]).view(n, c.heads, c.head_dim)
        k = linear(h, p[b + "attn_k"]).view(n, c.kv_heads, c.head_dim)
        v = linear(h, p[b + "attn_v"]).view(n, c.kv_heads, c.head_dim)
        q = Rope.apply(Norm.apply(q, p[b + "attn_q_norm"], c.eps), cos, sin)
        k = Rope.apply(Norm.apply(k, p[b + "attn_k_norm"], c.eps), cos, sin)
        x = x + linear(Attention.apply(q, k, v, documents).view(n, -1), p[b + "attn_output"])
        h = Norm.apply(x, p[b + "ffn_norm"], c.eps)
        probs = torch.softmax(Linear.apply(h, p[b + "ffn_gate_inp"]), -1)
        allowed = probs
        if sets is not None:
            inside, free = sets.of(i)
            if outside is not None:
                outside.append(-(probs * inside).sum(-1).add(1e-6).log().mean())
            allowed = probs * free
        top, chosen = allowed.topk(c.used, -1)
        weight = top / top.sum(-1, keepdim=True)
        order = torch.sort(chosen.view(-1), stable=True)[1]
        used = torch.bincount(chosen.view(-1), minlength=c.experts)
        x = x + experts(h, weight, p[b + "ffn_gate_exps"], p[b + "ffn_up_exps"],
                        p[b + "ffn_down_exps"], order, used.cumsum(0).tolist())
        if balance is not None:
            here = used.float() / used.sum()
            balance.append(c.experts * (here * probs.mean(0)).sum() if price is None else
                           (price[i] * probs.mean(0)).sum())
        if counts is not None:
            counts.append(chosen)
    return Norm.apply(x, p["output_norm"], c.eps)


def logits(p, hidden):
    return Linear.apply(hidden, p["token_embd"])


def losses(p, hidden, targets, half=False):
    """The cross entropy of each row."""
    if half:
        return HalfHead.apply(hidden, p["token_embd"], targets)
    return torch.nn.functional.cross_entropy(logits(p, hidden), targets, reduction="none")
