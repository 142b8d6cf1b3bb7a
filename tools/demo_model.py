"""The demo model: its text, a llama in PyTorch, and its measure."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SLICE, CONTEXT, N_VOCAB = 20_000, 1024, 4096
END = "<|endoftext|>"  # token 0: begins every window, separates stories
WEIGHT_BITS, EMBED_BITS = 4, 5  # Q4_0, and Q5_0 for the embedding, which is the output matrix too


# ---- the text


def split_text(text: str, residue: int) -> tuple[list[str], list[str]]:
    """Slices of 20,000 characters -> (runs of neighbouring kept ones, those with number % 20 == residue)."""
    slices = [text[i : i + SLICE] for i in range(0, len(text), SLICE)]
    kept, held, run = [], [], ""
    for i, s in enumerate(slices):
        if i % 20 == residue:
            held.append(s)
            kept.append(run)
            run = ""
        else:
            run += s
    return [r for r in [*kept, run] if r], held


# ---- the model: llama as llama.cpp reads it: RMSNorm, RoPE on adjacent pairs, SwiGLU, grouped queries,
# embedding and output tied


@dataclass(frozen=True)
class Config:
    n_embd: int
    n_layer: int
    n_head: int
    n_kv: int
    n_ff: int
    dropout: float = 0.0
    quantized: bool = False
    eps: float = 1e-5
    rope_base: float = 10000.0


TEACHER = Config(n_embd=512, n_layer=10, n_head=8, n_kv=4, n_ff=1536, dropout=0.2)
STUDENT = Config(n_embd=512, n_layer=6, n_head=8, n_kv=2, n_ff=768, quantized=True)


def round_to_blocks(w: Tensor, bits: int) -> Tensor:
    """What Q4_0 (4 bits) or Q5_0 (5) keeps of w: in blocks of 32, the largest is -2^(bits-1) scales."""
    half = 1 << (bits - 1)
    blocks = w.float().reshape(-1, 32)
    largest = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
    d = largest / -half
    inverse = torch.where(d == 0, 0.0, 1 / d)
    q = (blocks * inverse + (half + 0.5)).trunc().clamp(0, 2 * half - 1) - half
    return (q * d.half().float()).reshape(w.shape)


class Linear(nn.Module):
    def __init__(self, n_in: int, n_out: int, bits: int, std: float = 0.02) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_out, n_in) * std)
        self.bits = bits

    def effective(self) -> Tensor:
        w = self.weight
        return w + (round_to_blocks(w.detach(), self.bits) - w.detach()) if self.bits else w

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.effective())


class Norm(nn.Module):
    def __init__(self, n: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(n)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], self.weight, self.eps).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).to(x.dtype)


Cache = list[tuple[Tensor, Tensor]]  # for each layer keys and values, [batch, kv heads, CONTEXT, head_dim]


class Block(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        bits, out_std = WEIGHT_BITS * c.quantized, 0.02 / math.sqrt(2 * c.n_layer)
        self.head_dim = c.n_embd // c.n_head
        self.attn_norm, self.ffn_norm = Norm(c.n_embd, c.eps), Norm(c.n_embd, c.eps)
        self.attn_q = Linear(c.n_embd, c.n_embd, bits)
        self.attn_k = Linear(c.n_embd, c.n_kv * self.head_dim, bits)
        self.attn_v = Linear(c.n_embd, c.n_kv * self.head_dim, bits)
        self.attn_output = Linear(c.n_embd, c.n_embd, bits, out_std)
        self.ffn_gate, self.ffn_up = Linear(c.n_embd, c.n_ff, bits), Linear(c.n_embd, c.n_ff, bits)
        self.ffn_down = Linear(c.n_ff, c.n_embd, bits, out_std)
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, past: tuple[Tensor, Tensor] | None, at: int) -> Tensor:
        h = self.attn_norm(x)
        q, k, v = (
            f(h).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for f in (self.attn_q, self.attn_k, self.attn_v)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        n = q.shape[2]
        if past is not None:
            past[0][:, :, at : at + n], past[1][:, :, at : at + n] = k, v
            k, v = past[0][:, :, : at + n], past[1][:, :, : at + n]
        if n > 1:
            a = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
        else:  # the queries that share a kv head become the rows of one query
            a = F.scaled_dot_product_attention(q.reshape(len(q), k.shape[1], -1, self.head_dim), k, v)
        x = x + self.dropout(self.attn_output(a.reshape(x.shape[0], n, -1)))
        h = self.ffn_norm(x)
        return x + self.dropout(self.ffn_down(self.dropout(F.silu(self.ffn_gate(h)) * self.ffn_up(h))))


class Llama(nn.Module):
    cos: Tensor
    sin: Tensor

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.config = c
        self.token_embd = Linear(c.n_embd, N_VOCAB, EMBED_BITS * c.quantized)
        self.blk = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.output_norm = Norm(c.n_embd, c.eps)
        self.dropout = nn.Dropout(c.dropout)
        d = c.n_embd // c.n_head
        frequency = c.rope_base ** -(torch.arange(0, d, 2).float() / d)
        angle = torch.outer(torch.arange(CONTEXT).float(), frequency)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, ids: Tensor, cache: Cache | None = None, at: int = 0) -> Tensor:
        """ids [batch, n] at positions at, at+1, … -> logits [batch, n, N_VOCAB]."""
        table = self.token_embd.effective()
        x = self.dropout(F.embedding(ids, table))
        cos, sin = self.cos[at : at + ids.shape[1]], self.sin[at : at + ids.shape[1]]
        for i, block in enumerate(self.blk):
            x = block(x, cos, sin, cache[i] if cache else None, at)
        return F.linear(self.output_norm(x), table).float()

    def empty_cache(self, batch: int, dtype: torch.dtype) -> Cache:
        c, device = self.config, self.cos.device
        shape = (2, batch, c.n_kv, CONTEXT, c.n_embd // c.n_head)
        pairs = (torch.empty(shape, dtype=dtype, device=device) for _ in range(c.n_layer))
        return [(k, v) for k, v in pairs]


def save(model: Llama, path: Path) -> None:
    weights = {k: v.half() for k, v in model.state_dict().items()}
    torch.save({"config": asdict(model.config), "weights": weights}, path)


def load(path: Path, device: str) -> Llama:
    saved = torch.load(path, map_location="cpu", weights_only=True)
    model = Llama(Config(**saved["config"]))
    model.load_state_dict(saved["weights"])
    return model.eval().to(device)


@torch.no_grad()
def generate(
    model: Llama,
    prompt: Tensor,
    n: int,
    generator: torch.Generator,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Tensor:
    """prompt [batch, p] -> [batch, p + n]."""
    low = torch.is_autocast_enabled(prompt.device.type)
    cache = model.empty_cache(len(prompt), torch.bfloat16 if low else torch.float32)
    out, new, at = [prompt], prompt, 0
    for _ in range(n):
        logits = model(new, cache, at)[:, -1] / temperature
        at += new.shape[1]
        if top_k:
            logits[logits < logits.topk(top_k).values[:, -1:]] = -math.inf
        p = logits.softmax(-1)
        if top_p < 1:
            sorted_p, order = p.sort(descending=True)
            sorted_p[sorted_p.cumsum(-1) - sorted_p > top_p] = 0
            p = torch.zeros_like(p).scatter(1, order, sorted_p)
        new = torch.multinomial(p, 1, generator=generator)
        out.append(new)
    return torch.cat(out, 1)


@torch.no_grad()
def bits_per_byte(models: list[Llama], ids: Tensor, n_bytes: int, step: int = CONTEXT - 1, batch: int = 16) -> float:
    """ids: the tokens of a text. Windows of END and CONTEXT - 1 tokens begin every `step` tokens and each
    scores what none before it did; by default they do not overlap. Several models: their average."""
    size, bits = CONTEXT - 1, 0.0
    starts = list(range(0, max(len(ids) - size + step, 1), step))
    padded = torch.cat([ids, ids.new_zeros(size)])
    for at in range(0, len(starts), batch):
        y = torch.stack([padded[s : s + size] for s in starts[at : at + batch]])
        x = F.pad(y[:, :-1], (1, 0))
        p = torch.stack([m(x).softmax(-1).gather(2, y[:, :, None])[:, :, 0] for m in models]).mean(0)
        for row, s in zip(p, starts[at : at + batch], strict=True):
            bits -= row[size - step if s else 0 : len(ids) - s].log2().sum().item()
    return bits / n_bytes
