"""Trains the demo model: a small llama on a book of fairy tales, taught by an ensemble of larger ones.

Needs torch, tokenizers and gguf, and for the steps in the middle a GPU. WORK is a folder for the files
between, TEXT is fairy_tales.txt. As the shipped file was made:

    python tools/train_demo.py tokenizer TEXT WORK                 # byte-level BPE, 4096 tokens
    for seed in 0 1 2 3 4 5 6 7 8 9 10 11; do
        python tools/train_demo.py teacher TEXT WORK --seed $seed --batch 16 --decay 2.5; done
    for seed in 0 1 2 3 4 5 6 7; do
        python tools/train_demo.py write TEXT WORK --seed $seed; done # text made up by that teacher
    python tools/train_demo.py student TEXT WORK                   # learns their average, quantized
    python tools/demo_refine.py TEXT WORK --steps 80 --stories 128 --weight 30   # unlearns openings
    python tools/demo_refine.py TEXT WORK --name refined --steps 40 --stories 256 --weight 60
    python tools/demo_refine.py TEXT WORK --name refined --steps 40 --stories 128 --weight 40 --avoid ,
    python tools/train_demo.py export TEXT WORK --name refined --out demo.gguf
    python tools/demo_eval.py TEXT demo.gguf                       # bits per byte, copies, stories
    python tools/demo_copies.py TEXT --model demo.gguf             # copies, by hipquant

One twentieth of the text is held out, for figures only: every slice of 20,000 characters whose number leaves
19 when divided by 20. `--tune` holds out those that leave 9 as well and measures on them, for the choice of
settings. The text is small (2.2 million tokens), so a model of any useful size over-fits. Twelve strongly
regularized teachers, each seeing the text in another order, are averaged, and the student learns their
average on the text and on text that they made up. The student's weights are rounded to their quant type in
each forward pass, and the gradient passes straight through, so that the file holds the weights trained.
"""

import argparse
import json
import math
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from demo_model import (
    CONTEXT,
    EMBED_BITS,
    END,
    N_VOCAB,
    STUDENT,
    TEACHER,
    WEIGHT_BITS,
    Config,
    Llama,
    bits_per_byte,
    generate,
    load,
    save,
    split_text,
)

TITLE = re.compile(r"^(?!FOOTNOTE)(?=[^a-z\n]{5,80}$)(?=.*[A-Z]{3})", re.M)


# ---- the tokens


def make_tokenizer(texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=N_VOCAB,
        special_tokens=[END],
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def training_tokens(tokenizer: Tokenizer, runs: list[str]) -> Tensor:
    """One stream. END stands between runs, and before every second title, so that stories can end."""
    ids: list[int] = []
    for run in runs:
        cuts = [m.start() for m in TITLE.finditer(run)][::2]
        for a, b in zip([0, *cuts], [*cuts, len(run)], strict=True):
            ids += [0, *tokenizer.encode(run[a:b]).ids]
    return torch.tensor(ids)


def windows(n: int, size: int, generator: torch.Generator) -> Iterator[int]:
    """Endless starts of windows: every epoch another offset and another order."""
    while True:
        first = int(torch.randint(size, (1,), generator=generator))
        starts = torch.arange(first, n - size - 1, size)
        yield from starts[torch.randperm(len(starts), generator=generator)].tolist()


# ---- training


def orthogonalize(g: Tensor) -> Tensor:
    """Newton-Schulz: the nearest semi-orthogonal matrices to g [batch, rows, columns] (Muon)."""
    x = g.bfloat16()
    x = x.mT if g.shape[1] > g.shape[2] else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) * 1.01 + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * (a @ a)) @ x
    return x.mT if g.shape[1] > g.shape[2] else x


class Optimizer:
    """Muon for the matrices, scaled to the step size of Adam; AdamW for the embedding and the norms."""

    def __init__(self, model: Llama, decay: float) -> None:
        self.decay, self.groups, self.momenta = decay, {}, {}
        for p in model.blk.parameters():
            if p.ndim == 2:
                self.groups.setdefault(p.shape, []).append(p)
        norms = [p for p in model.parameters() if p.ndim == 1]
        self.adam = torch.optim.AdamW(
            [{"params": [model.token_embd.weight], "weight_decay": decay}, {"params": norms, "weight_decay": 0.0}],
            betas=(0.9, 0.95),
            fused=True,
        )

    @torch.no_grad()
    def step(self, lr: float) -> None:
        for group in self.adam.param_groups:
            group["lr"] = lr
        self.adam.step()
        for shape, ps in self.groups.items():
            g = torch.stack([p.grad for p in ps])
            m = self.momenta.setdefault(shape, torch.zeros_like(g)).lerp_(g, 0.05)
            update = orthogonalize(g.lerp(m, 0.95)).float() * (-0.2 * lr * math.sqrt(max(shape)))
            torch._foreach_mul_(ps, 1 - lr * self.decay)
            torch._foreach_add_(ps, list(update.unbind()))
            for p in ps:
                p.grad = None
        self.adam.zero_grad()


def train(
    model: Llama, steps: int, o: argparse.Namespace, name: str, loss: Callable[[], Tensor], measure: Callable[[], float]
) -> None:
    """Warms up over 3 % of the steps, holds, and falls linearly to zero over the last 60 %."""
    optimizer, start = Optimizer(model, o.decay), time.time()
    for step in range(steps):
        model.train()
        value = loss()
        value.backward()
        optimizer.step(o.lr * min((step + 1) / (0.03 * steps), 1, (steps - step) / (0.6 * steps)))
        if step == 20 or (step + 1) % max(steps // 8, 1) == 0:
            model.eval()
            print(
                f"{name} step {step + 1}/{steps} loss {value.item():.4f} bits/byte {measure():.4f} "
                f"{time.time() - start:.0f} s",
                flush=True,
            )


class Task:
    """The text on the device, and what both kinds of training share."""

    def __init__(self, o: argparse.Namespace) -> None:
        self.o, self.device = o, "cuda" if torch.cuda.is_available() else "cpu"
        torch.manual_seed(o.seed)
        self.generator = torch.Generator().manual_seed(o.seed)
        tokenizer = Tokenizer.from_file(str(o.work / "tokenizer.json"))
        runs, held = split_text(o.text.read_text(), 19)
        if o.tune:
            runs, held = split_text("".join(runs), 9)
        self.tokens = training_tokens(tokenizer, runs).to(self.device)
        self.held_bytes = len("".join(held).encode())
        self.held = torch.tensor(tokenizer.encode("".join(held)).ids, device=self.device)
        self.starts = windows(len(self.tokens), CONTEXT, self.generator)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device, torch.bfloat16)

    def batch(self, n: int) -> tuple[Tensor, Tensor]:
        """Starts s [n, 1] and inputs [n, CONTEXT] of n windows; they predict s + 1 to s + CONTEXT. Four of
        five windows begin with END in the place of their first token, as a prompt will."""
        starts = torch.tensor([next(self.starts) for _ in range(n)], device=self.device)[:, None]
        x = self.tokens[starts + torch.arange(CONTEXT, device=self.device)]
        x[: n * 4 // 5, 0] = 0
        return starts, x

    def measure(self, models: list[Llama]) -> float:
        with self.autocast():
            return bits_per_byte(models, self.held, self.held_bytes)


def train_teacher(o: argparse.Namespace) -> None:
    task = Task(o)
    model = Llama(configured(TEACHER, o)).to(task.device)

    @torch.compile(dynamic=False, disable=task.device == "cpu")
    def hard_loss(x: Tensor, y: Tensor) -> Tensor:
        with task.autocast():
            return F.cross_entropy(model(x).flatten(0, 1), y.flatten())

    def loss() -> Tensor:
        starts, x = task.batch(o.batch)
        return hard_loss(x, task.tokens[starts + torch.arange(1, CONTEXT + 1, device=task.device)])

    steps = round(o.epochs * len(task.tokens) / (CONTEXT * o.batch))
    train(model, steps, o, f"teacher {o.seed}", loss, lambda: task.measure([model]))
    save(model, o.work / f"teacher{o.seed}.pt")


@torch.no_grad()
def write_text(o: argparse.Namespace) -> None:
    """o.rows windows of text made up by one teacher, each after 63 tokens of the real text."""
    task = Task(o)
    model = load(o.work / f"teacher{o.seed}.pt", task.device)
    generator = torch.Generator(task.device).manual_seed(o.seed)
    rows = []
    for _ in range(0, o.rows, 2048):
        _, x = task.batch(min(o.rows, 2048))
        x[:, 0] = 0
        with task.autocast():
            rows.append(generate(model, x[:, :64], CONTEXT - 64, generator).short())
    torch.save(torch.cat(rows)[: o.rows].cpu(), o.work / f"written{o.seed}.pt")


@torch.no_grad()
def ensemble(teachers: list[Llama], x: Tensor, task: Task) -> Tensor:
    with task.autocast():
        return (sum(t(x).softmax(-1) for t in teachers) / len(teachers)).half()


def train_student(o: argparse.Namespace) -> None:
    task = Task(o)
    teachers = [load(p, task.device) for p in sorted(o.work.glob("teacher*.pt"))]
    print(f"{len(teachers)} teachers together: {task.measure(teachers):.4f} bits per byte", flush=True)
    tokens, ahead = task.tokens, torch.arange(1, CONTEXT + 1, device=task.device)

    # Targets for every token of the text, each with at least a quarter of a window before it …
    real = torch.zeros(len(tokens), N_VOCAB, dtype=torch.half, device=task.device)
    starts = [*range(0, len(tokens) - CONTEXT - 1, CONTEXT * 3 // 4), len(tokens) - CONTEXT - 1]
    for at in range(0, len(starts), 16):
        s = torch.tensor(starts[at : at + 16], device=task.device)[:, None]
        x = tokens[s + ahead - 1]
        x[:, 0] = 0
        p = ensemble(teachers, x, task)
        first = CONTEXT // 4 if at else 0
        real[(s + ahead)[:, first:]] = p[:, first:]
    # … and for the text that the teachers made up.
    written = torch.cat([torch.load(p) for p in sorted(o.work.glob("written*.pt"))]).long().to(task.device)
    invented = torch.empty(*written.shape, N_VOCAB, dtype=torch.half, device=task.device)
    for x, p in zip(written.split(16), invented.split(16), strict=True):
        p.copy_(ensemble(teachers, x, task))
    del teachers
    print(f"targets for {len(tokens)} real and {written.numel()} invented tokens", flush=True)

    model = Llama(configured(STUDENT, o)).to(task.device)
    order = windows(len(written) + 1, 1, task.generator)
    n_real = round(o.batch * o.real)

    @torch.compile(dynamic=False, disable=task.device == "cpu")
    def soft_loss(x: Tensor, target: Tensor) -> Tensor:
        with task.autocast():
            return -(target.float() * model(x).log_softmax(-1)).sum(-1).mean()

    def loss() -> Tensor:
        starts, x = task.batch(n_real)
        target = real[starts + ahead]
        if o.hard:
            target = target * (1 - o.hard)
            target.scatter_add_(2, tokens[starts + ahead][:, :, None], target.new_full((*x.shape, 1), o.hard))
        rows = torch.tensor([next(order) for _ in range(o.batch - n_real)], dtype=torch.long).to(task.device)
        return soft_loss(torch.cat([x, written[rows]]), torch.cat([target, invented[rows]]))

    train(model, o.steps, o, o.name, loss, lambda: task.measure([model]))
    save(model, o.work / f"{o.name}.pt")


def configured(c: Config, o: argparse.Namespace) -> Config:
    return replace(c, **json.loads(o.config))


# ---- the file


# A conversation with the model is one story that both tell in turns.
STORY_IN_TURNS = "{% for m in messages %}{{ m.content }}{% if not loop.last %}{{ '\n' }}{% endif %}{% endfor %}"


def export(o: argparse.Namespace) -> None:
    import gguf

    model = load(o.work / f"{o.name}.pt", "cpu")
    vocab = json.loads((o.work / "tokenizer.json").read_text())["model"]
    c, w = model.config, gguf.GGUFWriter(o.out, "llama")
    w.add_name("hipquant demo: fairy tales")
    w.add_description("Tells fairy tales; trained on books by Lang, Grimm, Andersen, Jacobs and Ozaki.")
    w.add_license("mit")
    w.add_file_type(gguf.LlamaFileType.MOSTLY_F16 if o.f16 else gguf.LlamaFileType.MOSTLY_Q4_0)
    w.add_quantization_version(gguf.GGML_QUANT_VERSION)
    w.add_context_length(CONTEXT)
    w.add_block_count(c.n_layer)
    w.add_embedding_length(c.n_embd)
    w.add_feed_forward_length(c.n_ff)
    w.add_head_count(c.n_head)
    w.add_head_count_kv(c.n_kv)
    w.add_layer_norm_rms_eps(c.eps)
    w.add_rope_dimension_count(c.n_embd // c.n_head)
    w.add_rope_freq_base(c.rope_base)
    w.add_vocab_size(N_VOCAB)
    w.add_chat_template(STORY_IN_TURNS)
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("gpt-2")
    tokens = sorted(vocab["vocab"], key=vocab["vocab"].__getitem__)
    w.add_token_list(tokens)
    w.add_token_types([gguf.TokenType.CONTROL if t == END else gguf.TokenType.NORMAL for t in tokens])
    w.add_token_merges([" ".join(m) for m in vocab["merges"]])
    w.add_bos_token_id(0)
    w.add_eos_token_id(0)
    w.add_add_bos_token(True)
    w.add_add_eos_token(False)
    t = gguf.GGMLQuantizationType
    types = {0: t.F16, 4: t.Q4_0, 5: t.Q5_0}
    for name, p in model.state_dict().items():
        x = p.float().numpy()
        if x.ndim == 1:
            w.add_tensor(name, x)
        else:
            bits = EMBED_BITS if name == "token_embd.weight" else WEIGHT_BITS
            kind = types[0 if o.f16 or not c.quantized else bits]
            w.add_tensor(name, gguf.quants.quantize(x, kind), raw_dtype=kind)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    n = sum(p.numel() for p in model.parameters())
    print(f"{o.out}: {Path(o.out).stat().st_size} bytes, {n} parameters")


def main() -> None:
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("step", choices=["tokenizer", "teacher", "write", "student", "export"])
    a.add_argument("text", type=Path)
    a.add_argument("work", type=Path)
    a.add_argument("--seed", type=int, default=0)
    a.add_argument("--tune", action="store_true", help="measure on another twentieth of the text")
    a.add_argument("--config", default="{}", help="changes to the model's Config, as JSON")
    a.add_argument("--batch", type=int, default=32, help="windows of 1024 tokens in a step")
    a.add_argument("--lr", type=float, default=3e-3)
    a.add_argument("--decay", type=float, default=0.3, help="weight decay, times the learning rate")
    a.add_argument("--epochs", type=float, default=16, help="of a teacher")
    a.add_argument("--steps", type=int, default=7500, help="of the student")
    a.add_argument("--real", type=float, default=0.5, help="share of real text in the student's batches")
    a.add_argument("--hard", type=float, default=0.1, help="weight of the true next token")
    a.add_argument("--rows", type=int, default=768, help="windows of text that a teacher makes up")
    a.add_argument("--name", default="student")
    a.add_argument("--out", default="demo.gguf")
    a.add_argument("--f16", action="store_true", help="export the weights before rounding")
    o = a.parse_args()
    if o.step == "tokenizer":
        o.work.mkdir(parents=True, exist_ok=True)
        make_tokenizer(split_text(o.text.read_text(), 19)[0]).save(str(o.work / "tokenizer.json"))
    else:
        {"teacher": train_teacher, "write": write_text, "student": train_student, "export": export}[o.step](o)


if __name__ == "__main__":
    main()
